"""Loss of a trained model on held-out documents, with the memory carried and with it taken away.

    python launch/evaluate.py --run-dir runs/small
    python launch/evaluate.py --run-dir runs/small --checkpoint best              # or one by its name
    python launch/evaluate.py --run-dir runs/small --corpus corpora/other --split train --max-segments 100 --json
    it.json
    python launch/evaluate.py --run-dir runs/small --lanes 32 --warmup-segments 16    # long documents cut over the lanes
    torchrun --nproc-per-node 2 launch/evaluate.py --run-dir runs/small           # the same figures, in less time
    memformer-evaluate --run-dir runs/small                                       # installed

The rows of the table are explained in memformer_dist/evaluate.py. Plain torch in the precision of the weights, fp32: a
run trained in bf16 scores a little differently here than in its own log. The number of lanes changes the speed and what
"shuffled" reads; with --max-segments it also changes which documents are read, and with --warmup-segments where they
are cut.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from memformer_dist import agreement, logs, orphans
from memformer_dist.checkpoint import NEWEST, WHICH, Checkpoint, open_one
from memformer_dist.commands.options import Options, integer, nonempty_path, nonempty_path_or_url, not_writable
from memformer_dist.data.dataset import TokenDataset
from memformer_dist.data.open_data import as_read, corpora_from_here, open_data, open_mixture
from memformer_dist.errors import UserError, run_program
from memformer_dist.evaluate import MODES, evaluate, plan, summary
from memformer_dist.files import write_text
from memformer_dist.metrics import AGES, Losses, gap
from memformer_dist.places import Places, recorded
from memformer_dist.token_texts import token_texts
from memformer_dist.world import World

NAMES = {
    "carried": "memory carried",
    "no_memory": "memory reset",
    "no_state": "everything reset",
    "shuffled": "memory shuffled",
}

MISSING = "n/a"
CHOICES = ("split", "lanes", "max_segments", "warmup_segments")  # which ranks must share


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises UserError."""
    parser = Options(__doc__, check=lambda options: not_writable("--json", options.json))
    add = parser.add_argument
    add("--run-dir", type=nonempty_path, required=True, help="a run, or one of its checkpoints")
    add("--checkpoint", type=nonempty_path_or_url, default=NEWEST, help=WHICH)
    add("--corpus", type=nonempty_path_or_url, help="folder or URL of a corpus (default: the run's)")
    add("--split", choices=["valid", "train"], default="valid")
    add(
        "--lanes",
        type=integer(least=1, most=2**20),
        help="documents read side by side by all ranks together (default: the run's)",
    )
    add("--max-segments", type=integer(least=1), help="stop after this many segments of every lane (default: all)")
    add(
        "--warmup-segments",
        type=number_of_segments,
        metavar="N",
        help="cut long documents over the lanes, and read so many segments before each piece without counting them;"
        " none: never cut (default: the run's)",
    )
    add("--words", action="store_true", help="count words as well, and show the perplexity per word")
    add("--json", type=nonempty_path, metavar="PATH", help="write the figures there as well")
    add("--local_rank", help=argparse.SUPPRESS)  # of DeepSpeed's launcher
    return parser.parse_args(arguments)


def number_of_segments(words: str) -> str:
    if words != "none" and not (words.isascii() and words.isdigit()):
        raise ValueError(f"found {words}, expected a number of segments, or none")
    return words


def main(arguments: list[str] | None = None) -> None:
    """Raises UserError."""
    options = parse(arguments)
    world = World.start()
    logs.start(world.rank)
    saved = open_on_all(options.run_dir, options.checkpoint, world)
    data = saved.contents.config.data
    lanes = options.lanes or data.lanes
    options.warmup_segments = warmup_segments(options, saved)
    dataset = world.on_all_or_raise(lambda: open_documents(saved, options.corpus, options.split, lanes))
    require_agreement(options, saved, dataset, world)
    cell = saved.cell(world.device)
    reads = plan(
        dataset,
        world.size,
        lanes=lanes,
        segment_length=data.segment_length,
        warmup_segments=options.warmup_segments,
    )
    losses = evaluate(
        cell,
        cell,
        reads,
        world,
        segments=options.max_segments,
        texts=None if data.task else token_texts(dataset.tokenizer()),
        show=lambda ticks: logs.tracked(ticks, "evaluate", "segments per lane", enabled=world.is_main),
    )
    assert losses is not None  # nobody stops it
    if world.is_main:
        report(options, saved, dataset, losses)


def run() -> None:
    orphans.stop_with_launcher()
    run_program(main)


def open_on_all(path: Path, which: str, world: World) -> Checkpoint:
    """The checkpoint that rank 0 finds, on every rank: a run that is being trained may write a newer one meanwhile.

    A collective call. Raises UserError if a rank does not have it.
    """
    first = world.on_all_or_raise(lambda: open_one(path, which) if world.is_main else None)
    found = world.broadcast_first(os.path.relpath(first.path, path) if first else None)
    return world.on_all_or_raise(lambda: first or open_one(path / str(found)))


def warmup_segments(options: argparse.Namespace, saved: Checkpoint) -> int | None:
    """What is asked for, or else the run's. Raises UserError if --max-segments would leave nothing to count."""
    if options.warmup_segments is None:
        warmup = saved.contents.config.training.evaluate_warmup_segments
    else:
        warmup = None if options.warmup_segments == "none" else int(options.warmup_segments)
    if warmup is not None and options.max_segments is not None and options.max_segments <= warmup:
        raise UserError(
            f"--max-segments: found {options.max_segments}, expected more than --warmup-segments ({warmup}), whose losses"
            " are not counted"
        )
    return warmup


def require_agreement(options: argparse.Namespace, saved: Checkpoint, dataset: TokenDataset, world: World) -> None:
    """Raises LaunchError, on all ranks, if they would not evaluate the same. A collective call."""
    chosen = {f"--{name.replace('_', '-')}": str(getattr(options, name)) for name in CHOICES}
    facts = agreement.manifest("--run-dir", saved.path) | chosen
    agreement.require(world, facts | agreement.documents("--corpus", dataset) | agreement.software())


def open_documents(saved: Checkpoint, corpus: str | None, split: str, lanes: int) -> TokenDataset:
    """The documents of `corpus`, or of the run's. Raises UserError if they were made with another tokenizer."""
    data = saved.contents.config.data
    if data.task is not None:
        if corpus is not None:
            raise UserError(
                f"--corpus: found {corpus}, expected none: the run was trained on the task {data.task.name}"
            )
        return open_data(data)[split == "valid"]
    corpora = {corpus: 1.0} if corpus else corpora_from_here(data, Places.of_run(saved.run_dir))
    splits = open_mixture(corpora, cache=data.cache, cache_gib=data.cache_gib)
    dataset = as_read(splits[split == "valid"], data.mode, lanes)
    found, expected = (x.tokenizer_sha256 for x in (dataset.vocabulary, saved.contents.vocabulary))
    if found != expected:
        raise UserError(
            f"--corpus: {dataset.path} was made with another tokenizer than the run: found sha256 {found[:16]},"
            f" expected {expected[:16]}"
        )
    return dataset


def report(options: argparse.Namespace, saved: Checkpoint, dataset: TokenDataset, losses: dict[str, Losses]) -> None:
    """Print the table, and write --json."""
    position = saved.contents.position
    print(
        f"{saved.path}, {position.tokens:,} tokens; {dataset.path}: {len(dataset.lengths):,} documents,"
        f" {dataset.total_tokens:,} tokens\n\n{table(losses, words=options.words)}"
    )
    if options.json is not None:
        facts = {
            "checkpoint": recorded(str(saved.path)),
            "step": position.step,
            "tokens": position.tokens,
            "corpus": recorded(str(dataset.path)),
            "max_segments": options.max_segments,
            "warmup_segments": options.warmup_segments,
        }
        words = of_words(losses) if options.words else {}
        write_text(options.json, json.dumps(facts | summary(losses) | words, indent=2) + "\n")


def of_words(losses: dict[str, Losses]) -> dict:
    carried = losses["carried"]
    per_word = {f"eval_perplexity_per_word_{mode}": losses[mode].perplexity_per_word for mode in MODES[1:]}
    return {
        "eval_perplexity_per_word": carried.perplexity_per_word,
        **per_word,
        "eval_words": None if carried.perplexity_per_word is None else int(carried.text.words),
    }


class Column(NamedTuple):
    heading: str
    width: int
    digits: int
    figure: Callable[[Losses], float | None]


LOSS = (
    Column("loss", 9, 4, lambda losses: losses.loss),
    Column("perplexity", 12, 2, lambda losses: losses.perplexity),
    Column("bits/byte", 11, 4, lambda losses: losses.bits_per_byte),
)
PER_WORD = Column("per word", 12, 2, lambda losses: losses.perplexity_per_word)


def table(losses: dict[str, Losses], *, words: bool = False) -> str:
    columns = (*LOSS, PER_WORD) if words else LOSS
    lines = [f"{'':18}" + "".join(f"{column.heading:>{column.width}}" for column in columns) + f"{'gap':>9}"]
    for mode, found in losses.items():
        above = gap(losses, mode)
        figures = (None if above is None else column.figure(found) for column in columns)
        cells = [_cell(column, figure) for column, figure in zip(columns, figures, strict=True)]
        last = MISSING if above is None else "" if mode == "carried" else f"{above:+.4f}"
        lines.append(f"{NAMES[mode]:18}" + "".join(cells) + f"{last:>9}")
    ages = [age for age in AGES if age in losses["carried"].by_age]
    lines += ["", f"{'by segment age':18}" + "".join(f"{age:>9}" for age in ages)]
    for mode, found in losses.items():
        by_age = (f"{found.by_age[age]:.4f}" if age in found.by_age else MISSING for age in ages)
        lines.append(f"{NAMES[mode]:18}" + "".join(f"{loss:>9}" for loss in by_age))
    carried, shuffled = losses["carried"], losses["shuffled"]
    if carried.bits_per_byte is not None:
        text = f"{carried.labels:,.0f} labels stand for {carried.text.bytes:,.0f} bytes of text"
        lines += ["", text + (f", {carried.text.words:,.0f} words" if words else "")]
    if carried.is_missing:
        lines += ["", f"{MISSING}: no label of these documents counts in the loss"]
    elif shuffled.is_missing:
        lines += ["", f"{MISSING}: no two documents were read side by side"]
    elif shuffled.carried is not None:
        where = "where two or more documents are read side by side"
        lines += ["", f"Memory shuffled is measured {where}; memory carried has {shuffled.carried:.4f} there."]
    return "\n".join(line.rstrip() for line in lines)


def _cell(column: Column, figure: float | None) -> str:
    return f"{MISSING if figure is None else f'{figure:.{column.digits}f}':>{column.width}}"


if __name__ == "__main__":
    run()
