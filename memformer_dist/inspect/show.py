"""What a lane reads, in words: see your data as training sees it.

    python -m memformer_dist.inspect.show corpora/books --lane 3 --tick 100 --ticks 5
    python -m memformer_dist.inspect.show corpora/books --lane 0 --tick 0 --lanes 64 --segment-length 512 --tokens
    python -m memformer_dist.inspect.show --run-dir runs/small --lane 3 --tick 100 --split valid

For every tick a line that says which tokens of which document the lane reads and where they lie, and the text. ⟦These
brackets⟧ enclose what does not count in the loss, ⟨EOS⟩ is the end of a document, which is predicted like a token. A
document's first token is predicted by nothing and shown like the one behind it. With --tokens a line for every position:
the token that is read there, and the label that is to be predicted.

The segments come from the reader and the schedule of training; with --run-dir all settings are those of the run, and the
validation split is laid out as one process evaluates it.
"""

import argparse
from pathlib import Path
from typing import Iterator

from sentencepiece import SentencePieceProcessor

from memformer_dist.config import RunConfig
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.open_data import lane_schedule, open_data, open_mixture, training_schedule
from memformer_dist.data.stream import Stream
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import UserError, run_program
from memformer_dist.generate import TextStream
from memformer_dist.segment import IGNORE, Segment

OPEN, CLOSE, EOS = "⟦", "⟧", "⟨EOS⟩"


def of_a_corpus(corpus: str, split: str, *, lanes: int, segment_length: int, seed: int) -> tuple:
    """Documents and schedule, endless as in training."""
    documents = open_mixture({corpus: 1.0})[split == "valid"]
    return documents, lane_schedule(documents, seed=seed, lanes=lanes, segment_length=segment_length)


def of_a_run(run_dir: Path, split: str) -> tuple:
    data = RunConfig.load(run_dir / "config.json").data
    train, valid = open_data(data)
    if split == "valid":
        lanes = min(data.lanes, len(valid.lengths))
        return valid, LaneSchedule(valid.lengths, seed=0, lanes=lanes, segment_length=data.segment_length, epochs=1)
    return train, training_schedule(data, train)


def show(documents, schedule: LaneSchedule, *, lane: int, ticks: range, tokens: bool = False) -> Iterator[str]:
    """The lines. Raises UserError where there is no such lane."""
    if not 0 <= lane < schedule.lanes:
        raise UserError(f"--lane: found {lane}, expected 0 to {schedule.lanes - 1}")
    reader = WindowReader(documents, schedule, lanes=range(lane, lane + 1))
    tokenizer = SentencePieceProcessor(model_proto=documents.tokenizer().read_bytes())
    before = reader.segment(ticks.start - 1) if ticks.start else None
    for tick in ticks:
        segment = reader.segment(tick)
        epoch = int(schedule.at(tick).epoch[lane])
        yield f"tick {tick}, lane {lane}: {_place(documents, segment, epoch)}"
        if tokens:
            yield from _table(documents, segment, tokenizer)
        elif int(segment.length):
            yield _text(documents, segment, _predicted(segment, before), tokenizer)
        before = segment


def _place(documents, segment: Segment, epoch: int) -> str:
    number, offset, length = int(segment.document), int(segment.offset), int(segment.length)
    if not length:
        return "nothing, it has run dry"
    shard, byte = documents.place(number)
    if isinstance(documents, Stream):
        what, where = f"part {number}", f"begins in {shard}"
    else:
        what, where = f"document {number}", f"{shard} at byte {byte + offset * documents.token_dtype.itemsize}"
    said = [what, f"tokens {offset} to {offset + length - 1} of {documents.lengths[number]}", f"epoch {epoch}"]
    if segment.reset:
        said.append("reset")
    masked = int((segment.labels[0, :length] == IGNORE).sum())
    if masked:
        said.append(f"{masked} labels masked")
    if length < segment.tokens.shape[1]:
        said.append(f"{segment.tokens.shape[1] - length} positions of padding")
    return ", ".join([*said, where])


def _predicted(segment: Segment, before: Segment | None) -> list[bool]:
    """Whether the label counts that each token of the segment is: it stands at the token before it."""
    counts = (segment.labels[0, : int(segment.length)] != IGNORE).tolist()
    if segment.reset or before is None:
        return counts[:1] + counts[:-1]
    return [bool(before.labels[0, -1] != IGNORE)] + counts[:-1]


def _text(documents, segment: Segment, predicted: list[bool], tokenizer: SentencePieceProcessor) -> str:
    length = int(segment.length)
    items = list(zip(segment.tokens[0, :length].tolist(), predicted))
    if _ends(documents, segment) and segment.labels[0, length - 1] in (documents.vocabulary.eos_id, IGNORE):
        items.append((documents.vocabulary.eos_id, bool(segment.labels[0, length - 1] != IGNORE)))
    stream, text, counted = TextStream(tokenizer), "", True
    for token, counts in items:
        if counts != counted or token == documents.vocabulary.eos_id:
            text += stream.finish()
        if counts != counted:
            text += CLOSE if counts else OPEN
        text += EOS if token == documents.vocabulary.eos_id else stream.push(token)
        counted = counts
    return text + stream.finish() + ("" if counted else CLOSE)


def _ends(documents, segment: Segment) -> bool:
    return int(segment.offset) + int(segment.length) == documents.lengths[int(segment.document)]


def _table(documents, segment: Segment, tokenizer: SentencePieceProcessor) -> Iterator[str]:
    for position in range(segment.tokens.shape[1]):
        if position >= int(segment.length):
            yield f"{position:6}  padding"
            continue
        token, label = int(segment.tokens[0, position]), int(segment.labels[0, position])
        said = "masked" if label == IGNORE else f"{label:6} {tokenizer.id_to_piece(label)!r}"
        yield f"{position:6}  {token:6} {tokenizer.id_to_piece(token)!r:20} -> {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", metavar="CORPUS", nargs="?", help="folder or URL of a corpus")
    parser.add_argument("--run-dir", type=Path, help="instead: what this run reads")
    parser.add_argument("--split", choices=["train", "valid"], default="train")
    parser.add_argument("--lane", type=int, default=0, help="from 0")
    parser.add_argument("--tick", type=int, default=0, help="the first one, from 0")
    parser.add_argument("--ticks", type=int, default=1, help="how many")
    parser.add_argument("--lanes", type=int, help="data.lanes (default: 16)")
    parser.add_argument("--segment-length", type=int, help="data.segment_length (default: 64)")
    parser.add_argument("--seed", type=int, help="data.seed (default: 0)")
    parser.add_argument("--tokens", action="store_true", help="a line for every position")
    options = parser.parse_args()

    def program() -> None:
        settings = {"lanes": (16, 1), "segment_length": (64, 1), "seed": (0, 0)}  # defaults, and what they are at least
        if (options.corpus is None) == (options.run_dir is None):
            raise UserError(
                "found CORPUS and --run-dir, expected one" if options.corpus else "expected CORPUS or --run-dir"
            )
        for name, least in {"tick": 0, "ticks": 1, **{name: least for name, (_, least) in settings.items()}}.items():
            found = getattr(options, name)
            if found is not None and found < least:
                raise UserError(f"--{name.replace('_', '-')}: found {found}, expected at least {least}")
        given = {name: getattr(options, name) for name in settings if getattr(options, name) is not None}
        if options.run_dir is not None:
            if given:
                raise UserError(f"--{next(iter(given)).replace('_', '-')}: found with --run-dir, whose own it is")
            documents, schedule = of_a_run(options.run_dir, options.split)
        else:
            defaults = {name: default for name, (default, _) in settings.items()}
            documents, schedule = of_a_corpus(options.corpus, options.split, **(defaults | given))
        ticks = range(options.tick, options.tick + options.ticks)
        for line in show(documents, schedule, lane=options.lane, ticks=ticks, tokens=options.tokens):
            print(line)

    run_program(program)


if __name__ == "__main__":
    main()
