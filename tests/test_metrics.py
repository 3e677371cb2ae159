"""The figures of a run: every formula on numbers worked out by hand; what a run logs; FLOPs and peaks."""

import fnmatch
import json
import math

import pytest
import torch

from memformer_dist import metrics
from memformer_dist.cells.base import token_losses
from memformer_dist.cells.memformer import Memformer, MemformerConfig
from memformer_dist.metrics import Constants, Losses, Observed
from memformer_dist.progress import Interval, Position
from memformer_dist.segment import IGNORE, Segment

# ------------------------------------------------------------------------------------------------------------- formulas

TWO_STEPS = (
    {
        "segments": 3,
        "tokens": 90,
        "input_tokens": 100,
        "documents": 2,
        "applied": True,
        "losses": [40.0, 20.0, 0.0, 0.0, 30.0, 20.0, 20.0, 0.0, 0.0, 50.0],  # nats at five ages, labels at five ages
        "right": 27.0,
        "drift": 0.25,
        "step_s": 1.5,
        "rollout_s": 0.5,
        "wait_s": 0.125,
    },
    {
        "segments": 5,
        "tokens": 60,
        "input_tokens": 76,
        "documents": 1,
        "applied": False,
        "losses": [math.nan] * 10,
        "right": 5.0,
        "drift": 0.5,
        "step_s": 2.5,
        "rollout_s": 0.5,
        "wait_s": 0.25,
    },
)
CONSTANTS = Constants(world_size=2, positions=40, state_bytes=1000, flops_per_token=6e9, peak_flops=1e12)


def observed(**fields) -> Observed:
    interval = Interval()
    for step in TWO_STEPS:
        interval.add(**step)
    values = {
        "constants": CONSTANTS,
        "interval": interval,
        "learning_rate": 1e-3,
        "gradient_norm": 2.0,
        "state_gradient_squares": [100.0, 16.0, 4.0, 1.0, 0.0],
        "diagnosis": {"write_norm": 0.75},
    }
    return Observed(**(values | fields))


def test_every_scalar_of_training():
    assert metrics.training_scalars(observed()) == {
        "loss/train": 90 / 90,  # of the first step: the second was skipped
        "loss/by_segment_age/0": 2.0,
        "loss/by_segment_age/1": 1.0,
        "loss/by_segment_age/8+": 0.6,
        "accuracy/train": 27 / 90,
        "optim/lr": 1e-3,
        "optim/grad_norm": 2.0,
        "optim/skipped": 1,
        "memory/write_norm": 0.75,
        "mrbp/window": 5,
        "mrbp/replay_drift": 0.5,
        "mrbp/rollout_share": 0.25,
        "mrbp/state_bytes": 5000,
        "data/pad_fraction": 1 - 176 / 320,
        "data/wait_s": 0.375,
        "data/documents_started": 3,
        "perf/tokens_per_s": 37.5,
        "perf/tokens_per_s_per_device": 18.75,
        "perf/step_s": 2.0,
        "perf/mfu": pytest.approx(37.5 * 6e9 / 2e12),
    }


def test_what_is_unknown_is_not_logged():
    everything = metrics.training_scalars(observed(allocated_bytes=3 << 29, allocation_retries=0))
    assert everything["device/max_allocated_gib"] == 1.5 and everything["device/alloc_retries"] == 0
    unknown = metrics.training_scalars(observed(constants=CONSTANTS._replace(peak_flops=None)))
    assert everything.keys() - unknown.keys() == {"perf/mfu", "device/max_allocated_gib", "device/alloc_retries"}


def test_a_drift_that_is_not_a_number_is_infinite():
    interval = Interval()
    for drift in (math.nan, 0.5):
        interval.add(**TWO_STEPS[0] | {"drift": drift})
    assert interval.drift == math.inf


def test_skipped_steps_have_no_part_in_the_loss():
    interval = Interval()
    interval.add(**TWO_STEPS[1])
    assert interval.losses == [] and math.isnan(observed(interval=interval).losses.loss)
    assert interval.right == 0 and math.isnan(observed(interval=interval).accuracy)


def test_a_label_is_right_where_it_has_more_than_half_of_the_probability():
    """Never more of them than are the likeliest token, and all that are where the others share what is left."""
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(50, 8, 5), torch.randint(5, (50, 8))
    labels[::7, 2:] = IGNORE
    segment = Segment(labels, labels, *[torch.zeros(50)] * 5)
    found = int(metrics.count_right(segment, token_losses(logits, labels)))
    probability = logits.softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    assert found == int(((probability > 0.5) & (labels != IGNORE)).sum()) > 0
    assert found < int(((logits.argmax(-1) == labels) & (labels != IGNORE)).sum())


def test_every_scalar_of_an_evaluation():
    losses = {
        mode: Losses(loss, {})
        for mode, loss in zip(("carried", "no_memory", "no_state", "shuffled"), (1, 3, 6, 10), strict=True)
    }
    assert metrics.evaluation_scalars("final", losses) == {
        "final/loss": 1,
        "final/loss_no_memory": 3,
        "final/loss_no_state": 6,
        "final/loss_shuffled": 10,
        "final/gap": 2,
        "final/gap_shuffled": 9,
    }


def test_what_was_not_measured_is_not_logged():
    """One document was read at a time: no other memory to read with, so no figure either."""
    losses = {mode: Losses(1.0, {"0": 1.0}) for mode in ("carried", "no_memory", "no_state")}
    losses["shuffled"] = Losses.of([0.0] * 2 * len(metrics.AGES))
    assert losses["shuffled"].is_missing
    assert list(metrics.evaluation_scalars("eval", losses)) == [
        "eval/loss",
        "eval/loss_no_memory",
        "eval/loss_no_state",
        "eval/gap",
    ]
    losses["shuffled"] = Losses(4.0, {"0": 4.0}, carried=1.5)
    assert metrics.evaluation_scalars("eval", losses)["eval/gap_shuffled"] == 2.5


def test_norms_at_the_boundaries():
    """The first square belongs to the state that enters the window, which is no boundary within it."""
    assert metrics.training_curves(observed()) == {"memory/grad_norm_by_boundary": [2.0, 1.0, 0.5, 0.0]}
    assert metrics.training_curves(observed(state_gradient_squares=[100.0])) == {}


def test_a_run_logs_what_the_tables_name_and_nothing_else(trained_run):
    """Every name of a record is one of the tables', and every one of the tables' occurs, but for those of a GPU."""
    records = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    logged = set().union(*records) - {"step", "tokens", "time"}
    families = [f"{family}/{metric.name}" for metric in metrics.EVALUATION for family in ("eval", "final")]
    named = [metric.name for metric in metrics.TRAINING] + [metrics.BOUNDARY_NORMS] + families
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in named) for name in logged)
    absent = {pattern for pattern in named if not any(fnmatch.fnmatch(name, pattern) for name in logged)}
    assert {name.partition("/")[0] for name in absent} - {"perf"} == {"device", "eval"} and len(absent) == 3 + 7
    assert all(metric.meaning for metric in (*metrics.TRAINING, *metrics.EVALUATION))


def test_a_position_counts_applied_steps_alone_as_updates():
    position = Position()
    for applied in (True, False):
        position.add(segments=3, tokens=10, applied=applied, seconds=0.5, processor_s=0.25)
    assert position == Position(step=2, tick=6, tokens=20, updates=1, seconds=1.0, processor_s=0.5)


# ----------------------------------------------------------------------------------------------------------- perf/mfu


def training_flops_by_hand(config: MemformerConfig, vocabulary: int, size: int) -> int:
    """Of a segment of one lane: 2 m n k per matrix product, times three, because the backward pass has two for each."""
    width, slots = config.width, config.slots

    def product(rows: int, inner: int, columns: int) -> int:
        return 2 * rows * inner * columns

    def layers(number: int, source: int) -> int:
        self_attention = product(size, width, 3 * width) + 2 * product(size, width, size) + product(size, width, width)
        cross_attention = 2 * product(size, width, width) + product(source, width, 2 * width)
        cross_attention += 2 * product(size, width, source)
        return number * (self_attention + cross_attention + 2 * product(size, width, config.feed_forward))

    if config.layout == "encoder_decoder":
        stacks = layers(config.encoder_layers, slots) + layers(config.decoder_layers, size)
    else:
        stacks = layers(config.decoder_layers, slots)
    # Queries and own keys of the slots, keys and values of the tokens, scores and mixture.
    writer = 2 * product(slots, width, width) + 2 * product(size, width, width) + 2 * product(slots, width, size)
    return 3 * (stacks + writer + product(size, width, vocabulary))


@pytest.mark.parametrize("layout", [{"encoder_layers": 2}, {"layout": "decoder", "encoder_layers": 0}])
def test_flops_per_token(layout):
    config = MemformerConfig(width=12, decoder_layers=3, heads=2, feed_forward=20, slots=5, **layout)

    def found(vocabulary: int, size: int) -> float:
        return metrics.training_flops_per_token(
            lambda: Memformer(config, vocab_size=vocabulary, bos_id=1, segment_length=size), size
        )

    assert found(17, 7) == training_flops_by_hand(config, 17, 7) / 7
    assert found(17, 11) == training_flops_by_hand(config, 17, 11) / 11
    assert found(17, 7) != training_flops_by_hand(config.model_copy(update={"slots": 6}), 17, 7) / 7


@pytest.mark.parametrize(
    "name, configured, expected",
    [
        ("NVIDIA H200", None, 989e12),
        ("NVIDIA A100-SXM4-80GB", None, 312e12),
        ("NVIDIA A100-SXM4-80GB", 100.0, 100e12),
        ("NVIDIA GeForce RTX 4090", None, None),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2e12),
    ],
)
def test_peak_of_a_device(name, configured, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert metrics.peak_flops(torch.device("cuda", 0), configured) == expected


def test_peak_of_a_cpu_is_what_the_configuration_says():
    assert metrics.peak_flops(torch.device("cpu"), None) is None
    assert metrics.peak_flops(torch.device("cpu"), 0.5) == 5e11
