"""Loss on held-out documents, with the memory carried and with it taken away.

    python launch/evaluate.py --run-dir runs/books_cpu

The most common failure of a memory model is to ignore its memory. So an evaluation reads every segment several times,
each time with a state of its own:
    carried     as in training
    no_memory   the memory is reset at every segment, the rest of the state (the previous segment's context) is kept
    no_state    everything is reset at every segment
    shuffled    every lane reads with the memory of the next one: equal statistics, but the memory of another document
The next lane is the next of those that still read a document, and another one. Segments at which only one document is
read have no other memory to offer: they are left out of `shuffled`, and where there are no others its figures are n/a.

The gap no_memory - carried is what the memory is worth. What the memory is, `RecurrentCell.memory_leaves` says; for a
cell without memory, no_memory and shuffled equal carried.

Documents are dealt over lanes and lanes over ranks as in training; per-token losses are summed in float64 and divided
once, at the end, over all ranks: every token has the same weight, whatever the number of ranks. With `warmup_segments`
long documents are cut over the lanes (data/pieces.py).
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.data.dataset import TokenDataset
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.pieces import Pieces, cut
from memformer_dist.data.segments import CHUNK_TICKS, SegmentReader
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import CorpusError
from memformer_dist.metrics import LossByAge, Losses, gap
from memformer_dist.segment import Segment, Tensors, concatenate, select_rows
from memformer_dist.token_texts import NO_TEXT, UNKNOWN_TEXT, TextCount, TokenTexts
from memformer_dist.world import World

MODES = ("carried", "no_memory", "no_state", "shuffled")


class Plan(NamedTuple):
    """What an evaluation reads: each document once, lane by lane."""

    dataset: TokenDataset  # the documents, or their pieces
    schedule: LaneSchedule

    def segments(self, limit: int | None = None) -> int:
        """How many every lane reads, warm-up included."""
        return min(self.schedule.ticks, limit or self.schedule.ticks)

    def tokens(self, limit: int | None = None) -> int:
        """How many all lanes read, warm-up included."""
        spans = SegmentReader(self.dataset, self.schedule).spans(0, self.segments(limit))
        return int((spans.stop - spans.start).sum())

    def read(self, reader: WindowReader, tick: int) -> tuple[Segment, np.ndarray]:
        """The segment of the reader's lanes at a tick, and the documents that ALL lanes read: int64 [B], -1 for none."""
        segment, reading = reader.segment(tick), self.schedule.at(tick).document
        if isinstance(self.dataset, Pieces):
            return self.dataset.in_documents(segment), self.dataset.documents_of(reading)
        return segment, reading


def plan(
    dataset: TokenDataset, world_size: int, *, lanes: int, segment_length: int, warmup_segments: int | None = None
) -> Plan:
    """What an evaluation reads; the number of ranks adds lanes that read nothing, and changes nothing else.

    Args:
        lanes: documents read side by side by all ranks together; fewer where there are fewer documents.
        warmup_segments: cut long documents over the lanes, each piece with so many segments before it whose labels do
            not count; None: never cut.
    """

    def dealt(dataset: TokenDataset, order: Callable[[int], np.ndarray] | None = None) -> LaneSchedule:
        return LaneSchedule(
            dataset.lengths,
            seed=0,
            lanes=evaluation_lanes(dataset, lanes, world_size),
            segment_length=segment_length,
            epochs=1,
            order=order,
            dealt=min(lanes, len(dataset.lengths)),
        )

    whole = Plan(dataset, dealt(dataset))
    if warmup_segments is None:
        return whole
    pieces = cut(
        dataset, lanes=lanes, segment_length=segment_length, warmup_segments=warmup_segments, ticks=whole.segments()
    )
    return whole if pieces is None else Plan(pieces, dealt(pieces, pieces.order))


@torch.no_grad()
def evaluate(
    forward: Callable,
    cell: RecurrentCell,
    reads: Plan,
    world: World,
    *,
    segments: int | None = None,
    lanes_per_group: int | None = None,
    texts: TokenTexts | None = None,
    show: Callable[[range], Iterable[int]] = lambda ticks: ticks,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Losses] | None:
    """Losses by mode over every document once, or over the first segments of every lane. A collective call.

    Args:
        forward: forward("advance" | "readout", segment, tensors), in evaluation mode: the cell itself or its engine.
        segments: stop after so many segments of every lane, warm-up included.
        lanes_per_group: lanes of a rank that go through the model at once, each of them once per mode; None: all.
        texts: counts the text that labels stand for.
        show: given the segments to come, yields them: logs.tracked, for example.
        stop: asked after every segment on every rank; the answers must agree. A stopped evaluation returns None.

    Raises CorpusError, on every rank, if a document is damaged.
    """
    lanes, ticks = world.lanes_of_rank(reads.schedule.lanes), reads.segments(segments)
    reader = WindowReader(reads.dataset, reads.schedule, lanes=lanes, stop=ticks)
    _raise_on_all(world, _prepare_all(reader, ticks))
    evaluation = Evaluation(forward, cell, world, len(reader.lanes), lanes_per_group, texts)
    for tick in show(range(ticks)):
        if tick % CHUNK_TICKS == 0:  # a shard may have left the cache since, and may be out of reach now
            _raise_on_all(world, reader.prepare(tick, CHUNK_TICKS))
        evaluation.read(*reads.read(reader, tick))
        if stop():
            return None
    return evaluation.losses()


class Evaluation:
    """The states and losses of every mode, on the lanes of one rank. Collective, as the functions below."""

    def __init__(
        self,
        forward: Callable,
        cell: RecurrentCell,
        world: World,
        lanes: int,
        lanes_per_group: int | None = None,
        texts: TokenTexts | None = None,
    ):
        self.forward, self.world, self.memory_leaves, self.texts = forward, world, cell.memory_leaves, texts
        # Without memory the other modes repeat `carried`.
        self.modes = MODES if cell.memory_leaves else ("carried", "no_state")
        share = lanes_per_group or lanes
        self.groups = [slice(first, min(first + share, lanes)) for first in range(0, lanes, share)]
        self.sums = {mode: LossByAge(world.device) for mode in self.modes}
        self.carried_beside_shuffled = LossByAge(world.device)
        self.text = self.text_beside_shuffled = UNKNOWN_TEXT if texts is None else NO_TEXT
        self.last_tokens = torch.full((lanes,), -1)
        self.held = np.full(lanes * world.size, -1)  # the documents in which the lanes of all ranks wrote their memory
        # Copies, because these are written to: leaves of an empty state may be expanded, or one tensor twice.
        self.states = {mode: _copied(cell.empty_state(lanes, device=world.device)) for mode in self.modes}

    def read(self, segment: Segment, reading: np.ndarray) -> None:
        """The next segment of every lane, in every mode. `reading`, int64 [B]: the documents of ALL lanes, -1 for none."""
        starts = list(self.states.values())
        others = lanes_of_other_documents(reading, self.held)
        shuffled = "shuffled" in self.modes and bool((reading >= 0).any() and (others[reading >= 0] >= 0).all())
        if shuffled:
            starts[-1] = self._with_strange_memory(self.states["shuffled"], others)
        for group in self.groups:
            self._read_group(segment, group, starts, shuffled)
        self.held = reading
        if self.texts is not None:
            self._count_text(segment, self.texts, shuffled)

    def _with_strange_memory(self, state: Tensors, others: np.ndarray) -> Tensors:
        """The memory of every lane that reads is that of one which reads another document, over all ranks."""
        leaves = {name: _exchanged(getattr(state, name), others, self.world) for name in self.memory_leaves}
        return state._replace(**leaves)

    def _count_text(self, segment: Segment, texts: TokenTexts, shuffled: bool) -> None:
        count = texts.count(segment, torch.where(segment.reset, -1, self.last_tokens))
        self.last_tokens = segment.tokens[:, -1].clone()
        self.text = self.text.plus(count)
        if shuffled:
            self.text_beside_shuffled = self.text_beside_shuffled.plus(count)

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
        text, text_beside = (self._text_over_ranks(x) for x in (self.text, self.text_beside_shuffled))
        found = {mode: Losses.of(values)._replace(text=text) for mode, values in sums.items()}
        beside = self._over_ranks(self.carried_beside_shuffled)
        ages = len(beside) // 2
        if "shuffled" in found and beside[ages:] != sums["carried"][ages:]:  # it has not all labels
            found["shuffled"] = found["shuffled"]._replace(carried=Losses.of(beside).loss, text=text_beside)
        return {mode: found.get(mode, found["carried"]) for mode in MODES}

    def _over_ranks(self, losses: LossByAge) -> list[float]:
        return self.world.all_reduce_sum(losses.sums.flatten().tolist())

    def _text_over_ranks(self, count: TextCount) -> TextCount:
        total = TextCount(*self.world.all_reduce_sum(list(count)))
        return UNKNOWN_TEXT if math.isnan(total.words) else total  # on one rank, on all


def _copied(state: Tensors) -> Tensors:
    return state._make(x.clone(memory_format=torch.contiguous_format) for x in state)


def _in_mode(segment: Segment, mode: str) -> Segment:
    always = torch.ones_like(segment.reset)
    if mode == "no_memory":
        return segment._replace(reset_memory=always)
    return segment._replace(reset=always) if mode == "no_state" else segment


def lanes_of_other_documents(reading: np.ndarray, held: np.ndarray) -> np.ndarray:
    """For each lane the next one, behind the last comes the first, that reads and holds another document.

    Args:
        reading: int64 [B], the documents that lanes are about to read; -1 for none.
        held: int64 [B], those in which they wrote the memory that they hold: of a document's pieces one lane may have
            ended one and begun another document, with that memory still.

    Returns int64 [B], -1 for a lane that reads nothing or has no such other.
    """
    others = np.full(len(reading), -1)
    alive = np.flatnonzero(reading >= 0)
    behind = alive[(np.arange(len(alive))[:, None] + np.arange(1, len(alive))) % max(len(alive), 1)]  # in their order
    own = reading[alive, None]
    is_other = (reading[behind] != own) & (held[behind] != own)
    found = is_other.any(1)
    if found.any():
        others[alive[found]] = behind[found, is_other.argmax(1)[found]]
    return others


def _exchanged(memory: Tensor, others: np.ndarray, world: World) -> Tensor:
    """Row i gets what the lane others[i] has; rows of lanes that have no other stay.

    Args:
        memory: [lanes of this rank, ...].
        others: int64 [B], of the lanes of all ranks.
    """
    share = len(memory)
    rank_of_lane = np.arange(len(others)) // share
    across = (others >= 0) & (others // share != rank_of_lane)
    offered = [np.unique(others[across & (others // share == rank)]) for rank in range(world.size)]
    width = max(map(len, offered))
    rows, lanes = [memory], [np.arange(share) + world.rank * share]
    if width:
        mine = np.resize(np.append(offered[world.rank], world.rank * share), width) - world.rank * share
        sent = memory[torch.from_numpy(mine).to(memory.device)]
        received = [torch.empty_like(sent) for _ in range(world.size)]
        dist.all_gather(received, sent)
        for rank, of_rank in enumerate(offered):
            rows.append(received[rank][: len(of_rank)])
            lanes.append(of_rank)
    row_of_lane = np.full(len(others), -1)
    row_of_lane[np.concatenate(lanes)] = np.arange(sum(map(len, lanes)))
    wanted = others[rank_of_lane == world.rank]
    source = np.where(wanted < 0, np.arange(share), row_of_lane[wanted])
    return torch.cat(rows)[torch.from_numpy(source).to(memory.device)]


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
    """The figures of an evaluation under the names that summary.json uses; None for what was not measured, or is no number."""
    carried = losses["carried"]
    figures: dict = {"eval_loss": _finite(carried.loss)}
    for mode in MODES[1:]:
        figures[f"eval_loss_{mode}"] = _finite(losses[mode].loss)
    figures["gap"] = _finite(gap(losses, "no_memory"))
    figures["gap_shuffled"] = _finite(gap(losses, "shuffled"))
    figures["eval_bits_per_byte"] = _finite(carried.bits_per_byte)
    for mode in MODES[1:]:
        figures[f"eval_bits_per_byte_{mode}"] = _finite(losses[mode].bits_per_byte)
    figures["eval_tokens"] = int(carried.labels)
    figures["eval_bytes"] = None if carried.bits_per_byte is None else int(carried.text.bytes)
    figures["eval_loss_by_segment_age"] = {
        mode: {age: _finite(found.by_age.get(age)) for age in carried.by_age} for mode, found in losses.items()
    }
    return figures


def _finite(figure: float | None) -> float | None:
    """JSON has no nan, which is what a model that has diverged comes to."""
    return figure if figure is not None and math.isfinite(figure) else None
