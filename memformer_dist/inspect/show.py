"""What a lane reads, in words: your data as training sees it.

    dataset, schedule = open_corpus("corpora/books", "train", lanes=16, segment_length=64, seed=0)
    for line in show(dataset, schedule, lane=3, segments=range(100, 105)):
        print(line)

The segments come from the reader and the schedule of training. ⟦These brackets⟧ enclose what does not count in the
loss. ⟨EOS⟩ is the end of a document, which is predicted like a token. The first token of a document is never
predicted; it is shown like the second one.
"""

from collections.abc import Iterator
from pathlib import Path

from memformer_dist.config import RunConfig
from memformer_dist.data.dataset import TokenDataset
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.open_data import lane_schedule, open_data, open_mixture, training_schedule
from memformer_dist.data.stream import Stream
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import UserError
from memformer_dist.places import Places
from memformer_dist.segment import IGNORE, Segment
from memformer_dist.tokenizer import TextStream, Tokenizer, open_tokenizer

OPEN, CLOSE, EOS = "⟦", "⟧", "⟨EOS⟩"


def open_corpus(
    corpus: str, split: str, *, lanes: int, segment_length: int, seed: int
) -> tuple[TokenDataset, LaneSchedule]:
    """A corpus by folder or URL, and the endless schedule of training."""
    dataset = open_mixture({corpus: 1.0})[split == "valid"]
    return dataset, lane_schedule(dataset, seed=seed, lanes=lanes, segment_length=segment_length)


def open_run(run_dir: Path, split: str) -> tuple[TokenDataset, LaneSchedule]:
    """What a run reads, with its settings; the validation split as one process evaluates it uncut."""
    places = Places.of_run(run_dir)
    data = RunConfig.load(run_dir / "config.json", places=places).data
    train, valid = open_data(data, places)
    if split == "valid":
        lanes = min(data.lanes, len(valid.lengths))
        return valid, LaneSchedule(valid.lengths, seed=0, lanes=lanes, segment_length=data.segment_length, epochs=1)
    return train, training_schedule(data, train)


def show(
    dataset: TokenDataset, schedule: LaneSchedule, *, lane: int, segments: range, tokens: bool = False
) -> Iterator[str]:
    """The lines to print: for each segment where it comes from, then its text, or with `tokens` a line per position.

    segments   numbers, counted from the first segment that the lane reads

    Raises UserError where there is no such lane.
    """
    if not 0 <= lane < schedule.lanes:
        raise UserError(f"--lane: found {lane}, expected 0 to {schedule.lanes - 1}")
    reader = WindowReader(dataset, schedule, lanes=range(lane, lane + 1))
    tokenizer = open_tokenizer(dataset.tokenizer(), "the tokenizer")
    before = reader.segment(segments.start - 1) if segments.start else None
    for tick in segments:
        segment = reader.segment(tick)
        epoch = int(schedule.at(tick).epoch[lane])
        yield f"segment {tick}, lane {lane}: {_place(dataset, segment, epoch)}"
        if tokens:
            yield from _table(segment, tokenizer)
        elif int(segment.length):
            yield _text(dataset, segment, _is_predicted(segment, before), tokenizer)
        before = segment


def _place(dataset: TokenDataset, segment: Segment, epoch: int) -> str:
    number, offset, length = int(segment.document), int(segment.offset), int(segment.length)
    if not length:
        return "nothing, the lane has no more documents"
    shard, byte = dataset.place(number)
    if isinstance(dataset, Stream):
        what, where = f"part {number}", f"begins in {shard}"
    else:
        what, where = f"document {number}", f"{shard} at byte {byte + offset * dataset.token_dtype.itemsize}"
    facts = [what, f"tokens {offset} to {offset + length - 1} of {dataset.lengths[number]}", f"epoch {epoch}"]
    if segment.reset:
        facts.append("reset")
    masked = int((segment.labels[0, :length] == IGNORE).sum())
    if masked:
        facts.append(f"{masked} labels masked")
    if length < segment.tokens.shape[1]:
        facts.append(f"{segment.tokens.shape[1] - length} positions of padding")
    return ", ".join([*facts, where])


def _is_predicted(segment: Segment, before: Segment | None) -> list[bool]:
    """For each token of the segment: its prediction counts in the loss. The label is at the token before it."""
    counts = (segment.labels[0, : int(segment.length)] != IGNORE).tolist()
    if segment.reset or before is None:
        return counts[:1] + counts[:-1]
    return [bool(before.labels[0, -1] != IGNORE), *counts[:-1]]


def _text(dataset: TokenDataset, segment: Segment, predicted: list[bool], tokenizer: Tokenizer) -> str:
    length, eos_id = int(segment.length), dataset.vocabulary.eos_id
    items = list(zip(segment.tokens[0, :length].tolist(), predicted, strict=True))
    if _ends_document(dataset, segment) and segment.labels[0, length - 1] in (eos_id, IGNORE):
        items.append((eos_id, bool(segment.labels[0, length - 1] != IGNORE)))
    stream, text, counted = TextStream(tokenizer), "", True
    for token, counts in items:
        if counts != counted or token == eos_id:
            text += stream.finish()
        if counts != counted:
            text += CLOSE if counts else OPEN
        text += EOS if token == eos_id else stream.push(token)
        counted = counts
    return text + stream.finish() + ("" if counted else CLOSE)


def _ends_document(dataset: TokenDataset, segment: Segment) -> bool:
    return int(segment.offset) + int(segment.length) == dataset.lengths[int(segment.document)]


def _table(segment: Segment, tokenizer: Tokenizer) -> Iterator[str]:
    """For each position the token that is read there and the label that is to be predicted."""
    for position in range(segment.tokens.shape[1]):
        if position >= int(segment.length):
            yield f"{position:6}  padding"
            continue
        token, label = int(segment.tokens[0, position]), int(segment.labels[0, position])
        target = "masked" if label == IGNORE else f"{label:6} {tokenizer.piece(label)!r}"
        yield f"{position:6}  {token:6} {tokenizer.piece(token)!r:20} -> {target}"
