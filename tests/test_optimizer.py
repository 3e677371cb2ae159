"""The learning rate's schedules, and what becomes of them when a run is extended."""

import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memformer_dist.optimizer import OptimizerConfig, decay_begins, decay_start, learning_rate
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import STEP_TOKENS, last_checkpoint, records, run_rank, settings, tensors

WSD = "warmup_stable_decay"


def test_learning_rate_follows_tokens():
    config = OptimizerConfig(learning_rate=1.0, warmup_tokens=100, final_learning_rate_ratio=0.1)
    assert learning_rate(config, 50, 1100) == 0.5
    assert learning_rate(config, 100, 1100) == 1.0
    assert learning_rate(config, 600, 1100) == pytest.approx(0.55)
    assert learning_rate(config, 1100, 1100) == learning_rate(config, 2000, 1100) == pytest.approx(0.1)


def test_warmup_stable_decay():
    """Of arXiv 2405.18392, equation 1, with the decay 1 - sqrt, down to a ratio instead of 0."""
    config = OptimizerConfig(
        learning_rate=2.0, schedule=WSD, warmup_tokens=100, decay_share=0.25, final_learning_rate_ratio=0.1
    )
    assert [learning_rate(config, tokens, 1000) for tokens in (50, 100, 500, 750)] == [1.0, 2.0, 2.0, 2.0]
    for tokens in range(751, 1001):
        expected = 2.0 * (0.1 + 0.9 * (1 - math.sqrt((tokens - 750) / 250)))
        assert learning_rate(config, tokens, 1000) == pytest.approx(expected)
    assert learning_rate(config, 5000, 1000) == pytest.approx(0.2)
    assert decay_start(config, 1000) == 750
    longer = [learning_rate(config, tokens, 4000) for tokens in range(751)]
    assert longer == [learning_rate(config, tokens, 1000) for tokens in range(751)], "whatever training.tokens"


@given(
    schedule=st.sampled_from(["cosine", WSD]),
    total=st.integers(1, 10**6),
    warmup=st.integers(0, 2 * 10**6),
    share=st.floats(0.01, 1),
    ratio=st.floats(0, 1),
)
def test_schedules_rise_and_then_fall(schedule, total, warmup, share, ratio):
    config = OptimizerConfig(
        learning_rate=1.0, schedule=schedule, warmup_tokens=warmup, decay_share=share, final_learning_rate_ratio=ratio
    )
    rates = [learning_rate(config, round(total * part / 50), total) for part in range(61)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) <= 1.0 + 1e-12 and (warmup >= total or rates[50] == pytest.approx(ratio, abs=1e-12))


def test_the_step_at_which_the_decay_begins():
    config = OptimizerConfig(schedule=WSD, warmup_tokens=100, decay_share=0.25)
    steps = range(0, 1000, 70)
    assert [before for before in steps if decay_begins(config, before, before + 70, 1000)] == [700]
    assert decay_begins(config, 750, 820, 1000) and not decay_begins(config, 680, 750, 1000), "750 has the peak"
    assert not any(decay_begins(OptimizerConfig(), before, before + 70, 1000) for before in steps)
    whole = OptimizerConfig(schedule=WSD, decay_share=1)
    assert not any(decay_begins(whole, before, before + 70, 1000) for before in steps), "there is nothing to keep yet"


# ---- extended runs ---------------------------------------------------------------------------------------------------


def extended_rank(world, folder, short, long, cosine_short, cosine_long) -> None:
    run_rank(world, long, folder / "long")
    run_rank(world, short, folder / "short")
    shutil.copytree(folder / "short", folder / "extended")
    anchor = next(path for path in sorted((folder / "extended" / "checkpoints").iterdir()))
    for path in (folder / "extended" / "checkpoints").iterdir():
        if path != anchor:
            shutil.rmtree(path)
    for name in ("short", "extended"):
        run_rank(world, long, folder / name)
    run_rank(world, cosine_short, folder / "cosine")
    run_rank(world, cosine_long, folder / "cosine")


@pytest.mark.slow
def test_an_extended_run_is_the_run_that_had_these_tokens_from_the_start(corpus_dir, tmp_path, capfd):
    """Bit for bit, from the checkpoint before the decay, which is never removed. From the end it is another run: control."""

    def raw(tokens, schedule=WSD):
        return settings(
            corpus_dir,
            dropout=0.1,
            tokens=tokens * STEP_TOKENS,
            optimizer={"schedule": schedule, "decay_share": 0.5},
        ) | {"checkpoint": {"every_tokens": STEP_TOKENS}}

    run_ranks(1, extended_rank, tmp_path, raw(6), raw(15), raw(4, "cosine"), raw(6, "cosine"))
    figures = ("loss/train", "optim/lr", "optim/grad_norm")
    long, extended, jumped = (records(tmp_path / name, *figures) for name in ("long", "extended", "short"))
    assert extended == long and jumped[:3] == long[:3] and jumped != long
    rates = [row[3] for row in jumped]
    assert min(rates[3:6]) < rates[2] == max(rates), "the first run decayed"
    for prefix in ("weights", "moments", "lanes"):
        found, expected, other = (tensors(last_checkpoint(tmp_path / x), prefix) for x in ("extended", "long", "short"))
        assert expected and all(torch.equal(found[name], expected[name]) for name in expected), prefix
        assert prefix == "lanes" or any(not torch.equal(other[name], expected[name]) for name in expected)

    said = capfd.readouterr().err
    assert "optimizer.learning_rate" not in said
    assert "rank 0  training.tokens: the learning rate stays 0.003 at this step\n" in said
    assert "rank 0  training.tokens: the learning rate goes from 0.0003 to 0.003 at this step\n" in said
    steps = sorted(path.name for path in (tmp_path / "short" / "checkpoints").iterdir())
    anchor = tmp_path / "short" / "checkpoints" / steps[0]
    assert f"this checkpoint lies in the decay; {anchor} does not: to resume from there, move the later ones" in said
    assert (
        "training.tokens: the learning rate goes from 0.0003 to "
        in said.rpartition("this checkpoint lies in the decay")[2]
    )
