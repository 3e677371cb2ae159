"""Checkpoints whose every number says which step it is of, without a training."""

import torch
from torch import nn

from memformer_dist import saving
from memformer_dist.checkpoint import Checkpoint, Contents, ReadoutGroup
from memformer_dist.config import RunConfig
from memformer_dist.curriculum import Progress
from memformer_dist.progress import Position
from memformer_dist.vocabulary import Vocabulary
from tests.helpers.toy import ToyCell, ToyState

LANES, SEGMENT_LENGTH = 8, 6
MODEL = {"width": 8, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "feed_forward": 12, "slots": 3}


class FakeEngine:
    """What `save` needs of an engine: every tensor of step n is n times a number of its own."""

    def __init__(self, cell: nn.Module, step: int | None = None):
        self.module, self.step = cell, step

    def tensors(self):
        for number, (name, parameter) in enumerate(self.module.named_parameters(), start=1):
            weight = parameter if self.step is None else torch.full_like(parameter, self.step * number)
            yield name, weight, {"exp_avg": 10 * weight.detach(), "exp_avg_sq": 100 * weight.detach()}


def contents(step: int, *, keep: int = 2, anchor: bool = False, model: dict = MODEL) -> Contents:
    config = RunConfig(
        model=model,
        data={"corpus": "nowhere", "lanes": LANES, "segment_length": SEGMENT_LENGTH},
        mrbp={"window": {"first": 1, "last": 9, "metric": "loss/train", "threshold": 0.1, "every_steps": 5}},
        training={"tokens": 1000},
        checkpoint={"keep": keep},
    )
    vocabulary = Vocabulary(size=11, bos_id=1, eos_id=2, tokenizer_sha256="0" * 64)
    position = Position(step=step, tick=2 * step, tokens=7 * step, updates=step, seconds=0.1 * step)
    return Contents(
        position=position,
        curriculum=Progress(window=step + 1, steps=step, nll=step / 3, labels=7.0),
        readout_group=ReadoutGroup(segments=2, lanes=4),
        corpus="f" * 64,
        anchor=anchor,
        vocabulary=vocabulary,
        config=config,
    )


def lane_state(lanes: range, step: int) -> ToyState:
    """Every lane knows its number and its step."""
    memory = torch.tensor([[1000.0 * step + lane] * 7 for lane in lanes])
    return ToyState(memory, 1000 * step + torch.tensor(lanes))


def save(run_dir, world, step, *, cell=None, **about):
    lanes = world.lanes_of_rank(LANES)
    return saving.save(
        run_dir,
        FakeEngine(cell, None) if cell else FakeEngine(ToyCell(), step),
        world,
        contents=contents(step, **about),
        lanes=lanes,
        state=lane_state(lanes, step),
    )


def assert_of_step(saved: Checkpoint, step: int) -> None:
    """Every tensor is of that step and in its place."""
    cell = ToyCell()
    saved.load_weights(cell)
    for number, (name, parameter) in enumerate(cell.named_parameters(), start=1):
        assert torch.all(parameter == step * number), name
        assert torch.equal(saved.moment(name, "exp_avg"), 10 * parameter), name
        assert torch.equal(saved.moment(name, "exp_avg_sq"), 100 * parameter), name
    state = saved.load_lanes(range(LANES), cell.empty_state(LANES))
    assert all(map(torch.equal, state, lane_state(range(LANES), step)))
    assert saved.contents == contents(step) and saved.path.name == f"step-{step:08d}"


def names(run_dir) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())
