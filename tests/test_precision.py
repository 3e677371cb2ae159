"""Window gradients in bf16 against fp32 over 64 segments, through the engine; and what makes that comparison fail.

Made where the recurrence does not expand (bmn_init_norm 0.3): where gradients grow on their way back through the boundaries,
rounding the weights to bf16 alone, with all arithmetic in fp32, turns the gradient as far (docs/precision.md).
"""

import pytest
import torch

from memformer_dist.cells.memformer import Memformer, MemformerConfig
from tests.ranks import run_ranks
from tests.test_engine import Rows, weights_of
from tests.toy import full_bptt, labels_in, random_window, seeded_call

SEGMENTS, LANES, LENGTH, VOCABULARY = 64, 2, 16, 32
COSINE, SHARE = 0.999, 1e-3  # of every tensor whose fp32 gradient norm is at least this share of the whole


def new_cell(layout: str, dropout: float = 0.1) -> Memformer:
    torch.manual_seed(0)
    config = MemformerConfig(
        layout=layout,
        width=64,
        heads=4,
        feed_forward=128,
        slots=8,
        encoder_layers=2 if layout == "encoder_decoder" else 0,
        decoder_layers=3,
        dropout=dropout,
        bmn_init_norm=0.3,
    )
    return Memformer(config, vocab_size=VOCABULARY, bos_id=1, segment_length=LENGTH).train()


def new_window():
    """One long document on every lane: no boundary is cut by a reset."""
    window = random_window(SEGMENTS, LANES, LENGTH, seed=0, vocabulary=VOCABULARY)
    return [segment._replace(reset=torch.full_like(segment.reset, t == 0)) for t, segment in enumerate(window)]


def window_gradient(process, layout, precision) -> dict[str, torch.Tensor]:
    """What a step of SGD at learning rate 1 takes off the fp32 weights."""
    from deepspeed.runtime import torch_autocast

    from memformer_dist.engine import Engine

    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # DeepSpeed's flag for a whole process, see docs/log.md
    cell = new_cell(layout)
    before = {name: parameter.detach().clone() for name, parameter in cell.named_parameters()}
    settings = {"zero_optimization": {"stage": 2}}
    reduce = "segment" if precision == "bf16_parameters" else "window"
    optimizer = torch.optim.SGD(cell.parameters(), lr=1.0)
    engine = Engine(cell, optimizer, process, settings=settings, precision=precision, reduce=reduce)
    window, start = new_window(), engine.module.empty_state(LANES)
    accumulated = engine.accumulate(
        [Rows(window, slice(0, LANES), start=0)], [start], valid_tokens=labels_in(window), readout_group=4
    )
    assert accumulated.drift == 0, "the recomputation under autocast is not the rollout's"
    assert all(x.dtype == torch.float32 for x in accumulated.states[0] if x.is_floating_point())
    assert accumulated.state_gradient_squares.dtype == torch.float32
    engine.step(1.0)
    after = weights_of(engine)
    return {name: before[name] - after[name].reshape(before[name].shape) for name in before}


def cosines(found, expected) -> dict[str, float]:
    whole = torch.stack([x.double().norm() for x in expected.values()]).norm()
    return {
        name: float(torch.nn.functional.cosine_similarity(found[name].double().flatten(), x.double().flatten(), dim=0))
        for name, x in expected.items()
        if x.double().norm() >= SHARE * whole
    }


def cosine_rank(process, layout):
    expected = window_gradient(process, layout, "fp32")
    for precision in ("bf16", "bf16_parameters"):
        close = cosines(window_gradient(process, layout, precision), expected)
        assert len(close) > 20 and "writer.value.weight" in close
        name, least = min(close.items(), key=lambda item: item[1])
        assert COSINE <= least < 1, f"{precision}: {name}"  # 1: nothing was rounded


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder"])
def test_bf16_gradients_of_64_segments_point_where_those_of_fp32_do(layout):
    """In both kinds of bf16, in training mode with dropout; states, their gradients and the replay's drift besides."""
    run_ranks(1, cosine_rank, layout)


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder"])
def test_the_comparison_sees_a_gradient_that_is_cut_at_the_boundaries(layout):
    """The control: what 64 segments teach through their states has its share in these tensors."""
    gradient = {}
    for cut in (False, True):
        cell, window = new_cell(layout, dropout=0.0), new_window()
        start = cell.empty_state(LANES)
        full_bptt(seeded_call(cell), window, start, loss_scale=1 / labels_in(window), detach_memory=cut)
        gradient[cut] = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in cell.named_parameters()}
    assert min(cosines(gradient[True], gradient[False]).values()) < 0.9
