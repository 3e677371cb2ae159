"""Loss on held-out documents, with the memory carried and with it taken away.

    python launch/evaluate.py --run-dir runs/books_cpu

The most common failure of a memory model is to ignore its memory. So an evaluation reads every segment several times,
each time with a state of its own:
    carried     as in training
    no_memory   the memory is reset at every segment, the rest of the state (the previous segment's context) is kept
    no_state    everything is reset at every segment
    shuffled    lane i reads with the memory of lane i+1: equal statistics, but the memory of another document
The gap no_memory - carried is what the memory is worth. What the memory is, `RecurrentCell.memory_leaves` says; for a
cell without memory, no_memory and shuffled equal carried.

Documents are dealt over lanes and lanes over ranks as in training; per-token losses are summed in float64 and divided
once, at the end, over all ranks: every token has the same weight, whatever the number of ranks.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.data.dataset import TokenDataset
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.segments import CHUNK_TICKS
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import CorpusError
from memformer_dist.metrics import LossByAge, Losses
from memformer_dist.segment import Segment, Tensors, concatenate, select_rows
from memformer_dist.world import World

MODES = ("carried", "no_memory", "no_state", "shuffled")


@torch.no_grad()
def evaluate(
    forward: Callable,
    cell: RecurrentCell,
    dataset: TokenDataset,
    world: World,
    *,
    lanes: int,
    segment_length: int,
    segments: int | None = None,
    lanes_per_group: int | None = None,
    show: Callable[[range], Iterable[int]] = lambda ticks: ticks,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Losses] | None:
    """Losses by mode over every document once. A collective call.

    Args:
        forward: forward("advance" | "readout", segment, tensors), in evaluation mode: the cell itself or its engine.
        lanes: documents read side by side by all ranks together; fewer where there are fewer documents.
        segments: stop after so many segments of every lane.
        lanes_per_group: lanes of a rank that go through the model at once, each of them once per mode; None: all.
        show: given the segments to come, yields them: logs.tracked, for example.
        stop: asked after every segment on every rank; the answers must agree. A stopped evaluation returns None.

    Raises CorpusError, on every rank, if a document is damaged.
    """
    lanes = evaluation_lanes(dataset, lanes, world.size)
    schedule = LaneSchedule(dataset.lengths, seed=0, lanes=lanes, segment_length=segment_length, epochs=1)
    ticks = min(schedule.ticks, segments or schedule.ticks)
    reader = WindowReader(dataset, schedule, lanes=world.lanes_of_rank(lanes), stop=ticks)
    _raise_on_all(world, _prepare_all(reader, ticks))
    evaluation = Evaluation(forward, cell, world, len(reader.lanes), lanes_per_group)
    for tick in show(range(ticks)):
        if tick % CHUNK_TICKS == 0:  # a shard may have left the cache since, and may be out of reach now
            _raise_on_all(world, reader.prepare(tick, CHUNK_TICKS))
        evaluation.read(reader.segment(tick))
        if stop():
            return None
    return evaluation.losses()


class Evaluation:
    """The states and losses of every mode, on the lanes of one rank. Collective, as the functions below."""

    def __init__(
        self, forward: Callable, cell: RecurrentCell, world: World, lanes: int, lanes_per_group: int | None = None
    ):
        self.forward, self.world, self.memory_leaves = forward, world, cell.memory_leaves
        # Without memory the other modes repeat `carried`.
        self.modes = MODES if cell.memory_leaves else ("carried", "no_state")
        share = lanes_per_group or lanes
        self.groups = [slice(first, min(first + share, lanes)) for first in range(0, lanes, share)]
        self.sums = {mode: LossByAge(world.device) for mode in self.modes}
        self.states = {mode: cell.empty_state(lanes, device=world.device) for mode in self.modes}

    def read(self, segment: Segment) -> None:
        """The next segment of every lane, in every mode."""
        starts = list(self.states.values())
        if "shuffled" in self.modes:
            starts[-1] = self._with_strange_memory(self.states["shuffled"])
        for group in self.groups:
            self._read_group(segment, group, starts)

    def _with_strange_memory(self, state: Tensors) -> Tensors:
        """The memory of lane i is that of global lane i+1."""
        return state._replace(**{name: _next_lane(getattr(state, name), self.world) for name in self.memory_leaves})

    def _read_group(self, segment: Segment, group: slice, starts: list[Tensors]) -> None:
        # Lanes that have run dry are left out. If all have, one goes through the model and leaves its state as it was:
        # every rank must call the model equally often (ZeRO-3).
        live = torch.nonzero(segment.length[group]).flatten() + group.start
        rows = live if len(live) else torch.tensor([group.start])
        text = select_rows(segment, rows)
        # The modes go through the model side by side, as more lanes.
        side_by_side = concatenate([_in_mode(text, mode) for mode in self.modes]).to(self.world.device)
        start = starts[0]._make(torch.cat([x[rows] for x in column]) for column in zip(*starts, strict=True))
        features, after = self.forward("advance", side_by_side, start)
        nll = self.forward("readout", side_by_side, features)
        parts = (x.split(len(rows)) for x in (nll, *after))
        for mode, mode_nll, *mode_after in zip(self.modes, *parts, strict=True):
            self.sums[mode].add(text, mode_nll)
            for held, new in zip(self.states[mode], mode_after, strict=True):
                held[live] = new[: len(live)]

    def losses(self) -> dict[str, Losses]:
        """Over all ranks, by mode."""
        found = {mode: Losses.of(self.world.all_reduce_sum(x.sums.flatten().tolist())) for mode, x in self.sums.items()}
        return {mode: found.get(mode, found["carried"]) for mode in MODES}


def _in_mode(segment: Segment, mode: str) -> Segment:
    always = torch.ones_like(segment.reset)
    if mode == "no_memory":
        return segment._replace(reset_memory=always)
    return segment._replace(reset=always) if mode == "no_state" else segment


def _next_lane(memory: Tensor, world: World) -> Tensor:
    """Row i gets what global lane i+1 has; the last lane gets the first's."""
    firsts = [torch.empty_like(memory[:1]) for _ in range(world.size)]
    dist.all_gather(firsts, memory[:1].contiguous())
    return torch.cat([memory[1:], firsts[(world.rank + 1) % world.size]])


def evaluation_lanes(dataset: TokenDataset, lanes: int, world_size: int) -> int:
    """No more lanes than documents, but a multiple of the ranks."""
    return math.ceil(min(lanes, len(dataset.lengths)) / world_size) * world_size


def _raise_on_all(world: World, problem: str | None) -> None:
    """Raise CorpusError on every rank if there is a problem on one."""
    if message := world.broadcast_first(problem):
        raise CorpusError(message)


def _prepare_all(reader: WindowReader, ticks: int) -> str | None:
    """Check all that will be read, chunk by chunk: the cache of a remote corpus may not hold all shards at once."""
    problems = (reader.prepare(tick, CHUNK_TICKS) for tick in range(0, ticks, CHUNK_TICKS))
    return next(filter(None, problems), None)


def summary(losses: dict[str, Losses]) -> dict:
    """The figures of an evaluation under the names that summary.json uses."""
    figures: dict = {"eval_loss": losses["carried"].loss}
    for mode in MODES[1:]:
        figures[f"eval_loss_{mode}"] = losses[mode].loss
    figures["gap"] = losses["no_memory"].loss - losses["carried"].loss
    figures["eval_loss_by_segment_age"] = {mode: loss.by_age for mode, loss in losses.items()}
    return figures
