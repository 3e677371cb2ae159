"""Turn text into a corpus: token shards with a training and a validation split.

    python tokenizer/shard.py --input my_texts/ --tokenizer tokenizer_8k.model --output corpora/my_texts
    mpirun -n 64 python tokenizer/shard.py --input 'crawl/*.zst' --tokenizer tokenizer_8k.model --output corpora/crawl

Inputs are folders, globs, files and URLs (http, s3, ...) of text, source code, JSON lines, JSON, Parquet or Arrow, also
compressed (.gz, .zst). JSON and tables have a field text, or parts with a loss mask, or messages of a chat, or the
field that --text-field names; memformer_dist/prepare/records.py has the details. In folders, files that are not text
by their suffix are not read but listed (ignored.jsonl); a glob reads text whatever its suffix. The inputs are cut into
partitions of about --partition-mib, and every partition makes a shard. --workers processes work on the partitions in
parallel, or the ranks of an MPI job, whose first rank only hands out work; the corpus is the same bytes for any number
of them. The inputs are read once, and their tokens wait in CORPUS.partial until it is known which documents are usable.
The validation documents are a seeded choice of these, or those of --valid-input. Training needs some, so a single
document is an error unless --valid-fraction 0 asks for no validation split.

The tokenizer is a SentencePiece model or a tokenizer.json (of the package tokenizers: pip install
'memformer_dist[tokenizers]'). A sample of the inputs is read, encoded, decoded and compared first. A tokenizer that loses
some of it is an error that says what is lost, unless --lossy accepts that. --bos and --eos say which tokens these are
where the file does not.

Documents that cannot be read are listed in quarantine.jsonl; with --strict they are an error, and no corpus is made.
The corpus takes its name when it is whole. Until then it is CORPUS.partial, where the same command resumes after an
interruption, and a command with other settings reuses the partitions that are the same. An existing corpus is kept if
it was made of the same files with the same settings (sharding.json); otherwise it is an error, unless --overwrite is
given.
"""

import os
import time

from memformer_dist.commands.options import (
    Options,
    file_to_read,
    integer,
    nonempty_path,
    nonempty_path_or_url,
    nonempty_text,
    number,
)
from memformer_dist.errors import run_program
from memformer_dist.prepare.build import Report, shard
from memformer_dist.prepare.splits import PADDING_AT


def describe(report: Report) -> str:
    """A table of the splits, and a line on what was left out."""
    titles = ["", "documents", "tokens", "characters/token", *(f"padding at {length}" for length in PADDING_AT)]
    rows = [titles]
    for split, figures in report["splits"].items():
        ratio = figures["characters"] / figures["tokens"]
        padding = [f"{share:.1%}" for share in figures["padding"].values()]
        rows.append([split, f"{figures['documents']:,}", f"{figures['tokens']:,}", f"{ratio:.2f}", *padding])
    widths = [len(title) or len("train") for title in titles]
    table = "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    lost = f"; nothing could be read of {report['lost']:,} files" if report.get("lost") else ""
    return (
        f"{table}\nleft out: {report['empty']:,} empty documents, {report['unreadable']:,} unreadable "
        f"(quarantine.jsonl{lost}), {report['ignored']:,} files in folders that are not text"
        f"{' (ignored.jsonl)' if report['ignored'] else ''}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = Options(__doc__)
    add = parser.add_argument
    add("--output", type=nonempty_path, required=True, metavar="CORPUS", help="the folder to make")
    add(
        "--tokenizer",
        type=file_to_read,
        required=True,
        metavar="FILE",
        help="a SentencePiece model, see tokenizer/train.py, or a tokenizer.json",
    )
    add("--lossy", action="store_true", help="accept a tokenizer that loses some of the text")
    add(
        "--bos", type=nonempty_text, metavar="TOKEN", help="the token BOS as the vocabulary has it (default: found out)"
    )
    add(
        "--eos", type=nonempty_text, metavar="TOKEN", help="the token EOS as the vocabulary has it (default: found out)"
    )
    parser.add_input()
    add(
        "--valid-input",
        type=nonempty_path_or_url,
        nargs="+",
        default=[],
        help="the validation documents, instead of a share of the input",
    )
    add(
        "--valid-fraction",
        type=number(least=0, below=1),
        default=0.05,
        help="share of the documents for validation (default: 0.05)",
    )
    add("--seed", type=integer(), default=0, help="of the choice of the validation documents (default: 0)")
    add(
        "--partition-mib",
        type=number(above=0, most=2**20),
        default=64,
        metavar="MIB",
        help="input per partition and shard (default: 64)",
    )
    add(
        "--workers",
        type=integer(least=1, most=4096),
        default=len(os.sched_getaffinity(0)),
        help="processes (default: all cores); not under mpirun",
    )
    add("--strict", action="store_true", help="documents that cannot be read are an error")
    add("--overwrite", action="store_true", help="replace a corpus made of other files or with other settings")
    options = vars(parser.parse_args(arguments))

    began = time.perf_counter()
    report = shard(inputs=options.pop("input"), valid_inputs=options.pop("valid_input"), **options)
    if report is not None:
        print(f"{options['output']}, {time.perf_counter() - began:.1f} s\n{describe(report)}")


def run() -> None:
    run_program(main, interrupted="stopped; the same command resumes")
