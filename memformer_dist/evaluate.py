"""Loss on held-out documents, with the memory carried and with it taken away.

    python launch/evaluate.py --run-dir runs/books_cpu

The most common failure of a memory model is to ignore its memory. So an evaluation reads every segment several times,
each time with a state of its own:
    carried     as in training
    no_memory   the memory is reset at every segment, the rest of the state (the previous segment's context) is kept
    no_state    everything is reset at every segment
    shuffled    every lane reads with the memory of the next one: equal statistics, but the memory of another document
The next lane is the next of those that still read a document. Segments at which only one lane does have no other memory
to offer: they are left out of `shuffled`, and where there are no others its figures are n/a.

The gap no_memory - carried is what the memory is worth. What the memory is, `RecurrentCell.memory_leaves` says; for a
cell without memory, no_memory and shuffled equal carried.

Documents are dealt over lanes and lanes over ranks as in training; per-token losses are summed in float64 and divided
once, at the end, over all ranks: every token has the same weight, whatever the number of ranks.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.data.dataset import TokenDataset
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.segments import CHUNK_TICKS
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import CorpusError
from memformer_dist.metrics import LossByAge, Losses, gap
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
    schedule = evaluation_schedule(dataset, lanes, world.size, segment_length)
    lanes, ticks = schedule.lanes, min(schedule.ticks, segments or schedule.ticks)
    reader = WindowReader(dataset, schedule, lanes=world.lanes_of_rank(lanes), stop=ticks)
    _raise_on_all(world, _prepare_all(reader, ticks))
    evaluation = Evaluation(forward, cell, world, len(reader.lanes), lanes_per_group)
    for tick in show(range(ticks)):
        if tick % CHUNK_TICKS == 0:  # a shard may have left the cache since, and may be out of reach now
            _raise_on_all(world, reader.prepare(tick, CHUNK_TICKS))
        evaluation.read(reader.segment(tick), schedule.at(tick).document >= 0)
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
        self.carried_beside_shuffled = LossByAge(world.device)
        self.states = {mode: cell.empty_state(lanes, device=world.device) for mode in self.modes}

    def read(self, segment: Segment, alive: np.ndarray) -> None:
        """The next segment of every lane, in every mode. `alive`, bool [B]: which lanes of ALL ranks read a document."""
        starts = list(self.states.values())
        shuffled = "shuffled" in self.modes and int(alive.sum()) > 1
        if shuffled:
            starts[-1] = self._with_strange_memory(self.states["shuffled"], alive)
        for group in self.groups:
            self._read_group(segment, group, starts, shuffled)

    def _with_strange_memory(self, state: Tensors, alive: np.ndarray) -> Tensors:
        """The memory of every lane that is alive is that of the next one, over all ranks."""
        leaves = {name: _next_lane(getattr(state, name), alive, self.world) for name in self.memory_leaves}
        return state._replace(**leaves)

    def _read_group(self, segment: Segment, group: slice, starts: list[Tensors], shuffled: bool) -> None:
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
            if mode != "shuffled" or shuffled:
                self.sums[mode].add(text, mode_nll)
            if mode == "carried" and shuffled:
                self.carried_beside_shuffled.add(text, mode_nll)
            for held, new in zip(self.states[mode], mode_after, strict=True):
                held[live] = new[: len(live)]

    def losses(self) -> dict[str, Losses]:
        """Over all ranks, by mode."""
        sums = {mode: self._over_ranks(losses) for mode, losses in self.sums.items()}
        found = {mode: Losses.of(values) for mode, values in sums.items()}
        beside = self._over_ranks(self.carried_beside_shuffled)
        ages = len(beside) // 2
        if "shuffled" in found and beside[ages:] != sums["carried"][ages:]:  # it has not all labels
            found["shuffled"] = found["shuffled"]._replace(carried=Losses.of(beside).loss)
        return {mode: found.get(mode, found["carried"]) for mode in MODES}

    def _over_ranks(self, losses: LossByAge) -> list[float]:
        return self.world.all_reduce_sum(losses.sums.flatten().tolist())


def _in_mode(segment: Segment, mode: str) -> Segment:
    always = torch.ones_like(segment.reset)
    if mode == "no_memory":
        return segment._replace(reset_memory=always)
    return segment._replace(reset=always) if mode == "no_state" else segment


def _next_lane(memory: Tensor, alive: np.ndarray, world: World) -> Tensor:
    """Row i gets what the next lane that is alive has; the last of them gets the first's. Other rows stay.

    Args:
        memory: [lanes of this rank, ...].
        alive: bool [B], of the lanes of all ranks.
    """
    rows = [np.flatnonzero(of_rank) for of_rank in alive.reshape(world.size, -1)]  # by rank
    mine = torch.from_numpy(rows[world.rank]).to(memory.device)
    first = memory[:1] if len(mine) == 0 else memory[mine[:1]]
    firsts = [torch.empty_like(first) for _ in range(world.size)]
    dist.all_gather(firsts, first.contiguous())
    if len(mine) == 0:
        return memory
    following = next(rank for step in range(world.size) if len(rows[rank := (world.rank + 1 + step) % world.size]))
    exchanged = memory.clone()
    exchanged[mine] = torch.cat([memory[mine[1:]], firsts[following]])
    return exchanged


def evaluation_schedule(dataset: TokenDataset, lanes: int, world_size: int, segment_length: int) -> LaneSchedule:
    """Which lane reads which document: each of them once."""
    dealt, lanes = min(lanes, len(dataset.lengths)), evaluation_lanes(dataset, lanes, world_size)
    return LaneSchedule(dataset.lengths, seed=0, lanes=lanes, segment_length=segment_length, epochs=1, dealt=dealt)


def evaluation_lanes(dataset: TokenDataset, lanes: int, world_size: int) -> int:
    """No more lanes than documents, but a multiple of the ranks; those that this adds read nothing."""
    return math.ceil(min(lanes, len(dataset.lengths)) / world_size) * world_size


def _raise_on_all(world: World, problem: str | None) -> None:
    """Raise CorpusError on every rank if there is a problem on one."""
    if message := world.first_problem(problem):
        raise CorpusError(message)


def _prepare_all(reader: WindowReader, ticks: int) -> str | None:
    """Check all that will be read, chunk by chunk: the cache of a remote corpus may not hold all shards at once."""
    problems = (reader.prepare(tick, CHUNK_TICKS) for tick in range(0, ticks, CHUNK_TICKS))
    return next(filter(None, problems), None)


def summary(losses: dict[str, Losses]) -> dict:
    """The figures of an evaluation under the names that summary.json uses; None for what was not measured."""
    figures: dict = {"eval_loss": losses["carried"].loss}
    for mode in MODES[1:]:
        figures[f"eval_loss_{mode}"] = None if losses[mode].is_missing else losses[mode].loss
    figures["gap"] = gap(losses, "no_memory")
    figures["gap_shuffled"] = gap(losses, "shuffled")
    ages = losses["carried"].by_age
    figures["eval_loss_by_segment_age"] = {
        mode: {age: found.by_age.get(age) for age in ages} for mode, found in losses.items()
    }
    return figures
