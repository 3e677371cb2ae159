"""Loss on held-out documents, with the memory carried and with it taken away.

    python launch/evaluate.py --run-dir runs/books_cpu

A memory model that ignores its memory is the commonest failure, so an evaluation reads every segment several times, each
with a state of its own:
    carried     as in training
    no_memory   the memory is reset at every segment, the rest of the state (the previous segment's context) is kept
    no_state    everything is reset at every segment
    shuffled    lane i reads with the memory of lane i+1: a memory of equal statistics that knows another document
The gap no_memory - carried is what the memory is worth.

Documents are dealt over lanes and lanes over ranks as in training; per-token losses are summed in float64 and divided once, at
the end, over all ranks: the result weighs every token alike, whatever the number of ranks.
"""

import math
from typing import Callable, Iterable, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from memformer_dist.data.dataset import TokenDataset
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.segments import CHUNK_TICKS
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import CorpusError
from memformer_dist.segment import IGNORE, Segment, concatenate
from memformer_dist.world import World

MODES = ("carried", "no_memory", "no_state", "shuffled")
AGES = ("0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64+")  # segments since the document's start


class LossByAge:
    """Sums of per-token losses and counts of labels by segment age, in float64."""

    def __init__(self, device: torch.device, ages: tuple[str, ...] = AGES):
        self.sums = torch.zeros(2, len(ages), dtype=torch.float64, device=device)  # [nll | labels, age]

    def add(self, segment: Segment, nll: Tensor) -> None:
        """nll [L, S] of one segment."""
        age = segment.offset // nll.shape[1]  # [L]
        bucket = torch.frexp(age.double()).exponent.clamp(0, self.sums.shape[1] - 1).long()  # 0, 1, 2-3, 4-7 ...
        labels = (segment.labels != IGNORE).sum(1).double()
        bucket, labels = (x.to(nll.device, non_blocking=True) for x in (bucket, labels))
        self.sums[0].index_add_(0, bucket, nll.double().sum(1))
        self.sums[1].index_add_(0, bucket, labels)


class Losses(NamedTuple):
    """Of one mode, over all ranks: nats a token."""

    loss: float
    by_age: dict[str, float]  # AGES that occur

    @classmethod
    def of(cls, sums: list[float], ages: tuple[str, ...] = AGES) -> "Losses":
        nll, labels = sums[: len(ages)], sums[len(ages) :]
        by_age = {age: n / count for age, n, count in zip(ages, nll, labels) if count}
        return cls(sum(nll) / sum(labels) if any(labels) else math.nan, by_age)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def evaluation_lanes(corpus: TokenDataset, lanes: int, world_size: int) -> int:
    """No more lanes than documents, but a multiple of the ranks."""
    return math.ceil(min(lanes, len(corpus.lengths)) / world_size) * world_size


def _prepare_all(reader: WindowReader, ticks: int) -> str | None:
    """Check everything that will be read, chunk by chunk: the cache of a remote corpus may not hold all shards at once."""
    problems = (reader.prepare(tick, CHUNK_TICKS) for tick in range(0, ticks, CHUNK_TICKS))
    return next(filter(None, problems), None)


@torch.no_grad()
def evaluate(
    forward: Callable,
    empty_state: Callable,
    corpus: TokenDataset,
    world: World,
    *,
    lanes: int,
    segment_length: int,
    ticks: int | None = None,
    lanes_per_group: int | None = None,
    show: Callable[[range], Iterable[int]] = lambda ticks: ticks,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Losses] | None:
    """Losses by mode over every document once (or the first `ticks` segments of each lane). A collective call.

    Args:
        forward: forward("advance" | "readout", segment, tensors), in evaluation mode.
        lanes: at the most; documents are read side by side.
        lanes_per_group: lanes of a rank that go through the model at once, each of them once for every mode; None: all.
        show: given the ticks to come, yields them: tqdm, for example.
        stop: asked once a tick on every rank; must answer alike on all of them. A stopped evaluation returns None.

    Raises CorpusError, on every rank, when a document is damaged.
    """
    lanes = evaluation_lanes(corpus, lanes, world.size)
    schedule = LaneSchedule(corpus.lengths, seed=0, lanes=lanes, segment_length=segment_length, epochs=1)
    block = world.lanes_of_rank(lanes)
    ticks = min(schedule.ticks, ticks or schedule.ticks)
    reader = WindowReader(corpus, schedule, lanes=block, stop=ticks)
    if message := world.broadcast_first(_prepare_all(reader, ticks)):
        raise CorpusError(message)
    share = lanes_per_group or len(block)
    groups = [slice(first, min(first + share, len(block))) for first in range(0, len(block), share)]
    losses = {mode: LossByAge(world.device) for mode in MODES}
    states = {mode: empty_state(len(block), device=world.device) for mode in MODES}
    for tick in show(range(ticks)):
        if tick % CHUNK_TICKS == 0 and (message := world.broadcast_first(reader.prepare(tick, CHUNK_TICKS))):
            raise CorpusError(message)  # a shard that has left the cache since could not be fetched again
        read = reader.segment(tick)
        strangers = _next_lane(states["shuffled"].memory, world)
        for group in groups:
            # Lanes that have run dry are left out. Where all have, one goes through the model, which every rank must do
            # equally often (ZeRO-3), and leaves its state as it was.
            live = torch.nonzero(read.length[group]).flatten() + group.start
            rows = live if len(live) else torch.tensor([group.start])
            text = Segment(*(column[rows] for column in read))
            always = torch.ones_like(text.reset)
            # The modes go through the model side by side, as more lanes.
            segments = [text, text._replace(reset_memory=always), text._replace(reset=always), text]
            together = concatenate(segments).to(world.device)
            starts = [states[mode] for mode in MODES]
            starts[-1] = starts[-1]._replace(memory=strangers)
            start = starts[0]._make(torch.cat([x[rows] for x in column]) for column in zip(*starts))
            features, after = forward("advance", together, start)
            nll = forward("readout", together, features)
            for mode, mode_nll, *mode_after in zip(MODES, *(x.split(len(rows)) for x in (nll, *after))):
                losses[mode].add(text, mode_nll)
                for held, new in zip(states[mode], mode_after):
                    held[live] = new[: len(live)]
        if stop():
            return None
    return {mode: Losses.of(world.all_reduce_sum(loss.sums.flatten().tolist())) for mode, loss in losses.items()}


def summary(losses: dict[str, Losses]) -> dict:
    """The figures of an evaluation under the names that summary.json uses."""
    figures = {"eval_loss": losses["carried"].loss}
    for mode in MODES[1:]:
        figures[f"eval_loss_{mode}"] = losses[mode].loss
    figures["gap"] = losses["no_memory"].loss - losses["carried"].loss
    figures["eval_loss_by_segment_age"] = {mode: loss.by_age for mode, loss in losses.items()}
    return figures


def _next_lane(memory: Tensor, world: World) -> Tensor:
    """Row i gets what global lane i+1 has; the last lane gets the first's."""
    firsts = [torch.empty_like(memory[:1]) for _ in range(world.size)]
    dist.all_gather(firsts, memory[:1].contiguous())
    return torch.cat([memory[1:], firsts[(world.rank + 1) % world.size]])
