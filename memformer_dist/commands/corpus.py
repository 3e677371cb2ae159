"""Look into a corpus: verify every byte of it, or show what a lane of training reads.

    python launch/corpus.py verify corpora/books
    python launch/corpus.py verify corpora/books/train                                # one split
    python launch/corpus.py show corpora/books --lane 3 --segment 100 --segments 5
    python launch/corpus.py show corpora/books --lanes 64 --segment-length 512 --tokens
    python launch/corpus.py show --run-dir runs/small --lane 3 --segment 100 --split valid

verify compares every file with its recorded size and hash, lists all problems, by document and byte where a shard is
damaged, and ends with exit code 2 where it found some.

show prints for every segment which tokens of which document the lane reads and where they lie, and the text. ⟦These
brackets⟧ enclose what does not count in the loss; ⟨EOS⟩ is the end of a document, which is predicted like a token. With
--tokens it prints a line per position: the token that is read there, and the label that is to be predicted. With
--run-dir all settings are those of the run, and the validation split is laid out as one process evaluates it.
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

from memformer_dist.commands.options import Options, integer, nonempty_path, nonempty_path_or_url
from memformer_dist.errors import UserError, run_program
from memformer_dist.inspect.verify import verify
from memformer_dist.places import is_url

DEFAULTS = {"lanes": 16, "segment_length": 64, "seed": 0}  # of --lanes and so on; a run has its own
RANGES = {"lanes": integer(least=1, most=2**20), "segment_length": integer(least=1, most=2**20), "seed": integer()}


def main(arguments: list[str] | None = None) -> None:
    parser = Options(__doc__)
    commands = parser.add_subparsers(required=True, metavar="verify | show")
    _add_verify(commands.add_parser("verify", help="check every file and every byte"))
    _add_show(commands.add_parser("show", help="print what a lane reads", check=_what_is_shown))
    options = parser.parse_args(arguments)
    options.command(options)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=verify_command)
    parser.add_argument(
        "corpus",
        type=nonempty_path_or_url,
        metavar="CORPUS",
        help="folder written by tokenizer/shard.py, or a split in it",
    )
    parser.add_argument(
        "--threads",
        type=integer(least=1, most=1024),
        default=min(8, len(os.sched_getaffinity(0))),
        help="shards read at the same time (default: one per core, at most 8)",
    )


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=show_command)
    parser.add_argument(
        "corpus", type=nonempty_path_or_url, metavar="CORPUS", nargs="?", help="folder or URL of a corpus"
    )
    parser.add_argument("--run-dir", type=nonempty_path, help="show what this run reads, instead of a corpus")
    parser.add_argument("--split", choices=["train", "valid"], default="train")
    parser.add_argument("--lane", type=integer(), default=0, help="counted from 0 (default: 0)")
    parser.add_argument(
        "--segment", type=integer(), default=0, help="the first one to show, counted from 0 (default: 0)"
    )
    parser.add_argument("--segments", type=integer(least=1), default=1, help="how many to show (default: 1)")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=RANGES[name], help=f"data.{name} (default: {default})")
    parser.add_argument("--tokens", action="store_true", help="print a line per position")


def verify_command(options: argparse.Namespace) -> None:
    if is_url(options.corpus):
        raise UserError(
            f"{options.corpus}: found a URL, expected a folder; shards from a URL are verified when fetched"
        )
    began = time.perf_counter()
    report = verify(Path(options.corpus), threads=options.threads, quiet=False)
    seconds = time.perf_counter() - began
    if report.problems:
        count = f"{len(report.problems)} problem" + "s" * (len(report.problems) > 1)
        raise UserError(f"{options.corpus}: {count}\n" + "\n".join(f"  {problem}" for problem in report.problems))
    print(
        f"{options.corpus}: whole; {report.shards} shards, {report.documents:,} documents, {report.tokens:,} tokens,"
        f" {report.bytes / 1e6:,.1f} MB in {seconds:.1f} s ({report.bytes / 1e6 / seconds:,.0f} MB/s)"
    )


def show_command(options: argparse.Namespace) -> None:
    from memformer_dist.inspect.show import open_corpus, open_run, show  # imports torch, which verify does without

    if options.run_dir is not None:
        dataset, schedule = open_run(options.run_dir, options.split)
    else:
        dataset, schedule = open_corpus(options.corpus, options.split, **(DEFAULTS | _given(options)))
    segments = range(options.segment, options.segment + options.segments)
    for line in show(dataset, schedule, lane=options.lane, segments=segments, tokens=options.tokens):
        print(line)


def _what_is_shown(options: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the choice between a corpus and a run."""
    if options.corpus is None and options.run_dir is None:
        yield "expected CORPUS or --run-dir"
    if options.corpus is not None and options.run_dir is not None:
        yield "found CORPUS and --run-dir, expected one of them"
    if options.run_dir is not None:
        for name in _given(options):
            yield f"--{name.replace('_', '-')}: found with --run-dir, which sets it"


def _given(options: argparse.Namespace) -> dict[str, int]:
    """The options among DEFAULTS that were given."""
    return {name: getattr(options, name) for name in DEFAULTS if getattr(options, name) is not None}


def run() -> None:
    run_program(main)
