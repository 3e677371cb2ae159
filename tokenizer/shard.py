"""Turn text into a corpus: token shards with a train and a validation split.

    python tokenizer/shard.py --input my_texts/ --tokenizer tokenizer_8k.model --output corpora/my_texts
    mpirun -n 64 python tokenizer/shard.py --input 'crawl/*.jsonl.zst' --tokenizer tokenizer_8k.model --output corpora/crawl

Inputs are folders, globs, files and URLs (http, s3, ...) of text, source code, JSON lines or Parquet, also in .gz and
.zst; memformer_dist/prepare/documents.py says how they are read. They are cut up front into partitions of about --partition-mib; every
partition makes a shard, and --workers processes, or the ranks of an MPI job of which the first only hands out work, go through
the partitions side by side: the same bytes for any number of them. Inputs are read once; their tokens wait in CORPUS.partial
until it is known which documents are usable. The validation documents are a seeded choice of these, or those of
--valid-input; training needs some, so a single document is an error unless --valid-fraction 0 asks for no validation.

Documents that cannot be read are listed in quarantine.jsonl; with --strict they are an error, and no corpus is made.
The corpus appears under its name when it is whole; until then it is CORPUS.partial, where the same command goes on after
an interruption, and one with other settings finds the partitions again that are the same. A corpus that is there already is
kept if it was made of the same files with the same settings (sharding.json), and is an error otherwise.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from memformer_dist.errors import UserError
from memformer_dist.prepare.build import PADDING_AT, shard


def describe(report: dict) -> str:
    titles = ["", "documents", "tokens", "characters/token", *(f"padding at {length}" for length in PADDING_AT)]
    rows = [titles]
    for split, figures in report["splits"].items():
        ratio = figures["characters"] / figures["tokens"]
        padding = [f"{share:.1%}" for share in figures["padding"].values()]
        rows.append([split, f"{figures['documents']:,}", f"{figures['tokens']:,}", f"{ratio:.2f}", *padding])
    table = "\n".join("  ".join(f"{cell:>{len(title) or 5}}" for cell, title in zip(row, titles)) for row in rows)
    return (
        f"{table}\nleft out: {report['empty']:,} empty documents, {report['unreadable']:,} unreadable "
        f"(quarantine.jsonl), {report['ignored']:,} files in folders that are not text by their suffix"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="CORPUS", help="the folder to make")
    add("--tokenizer", type=Path, required=True, metavar="MODEL", help="a SentencePiece model, see tokenizer/train.py")
    add("--input", nargs="+", required=True, help="folders, globs, files and URLs")
    add(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="names of files and folders to pass over in folders"
    )
    add("--valid-input", nargs="+", default=[], help="the validation documents, instead of a share of the input")
    add("--valid-fraction", type=float, default=0.05, help="share of the documents for validation (0.05)")
    add("--seed", type=int, default=0, help="of the choice of the validation documents")
    add(
        "--partition-mib",
        type=float,
        default=64,
        metavar="MIB",
        help="size of the partitions of input, one shard each (64)",
    )
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (all cores); not under mpirun")
    add("--strict", action="store_true", help="documents that cannot be read are an error")
    add("--overwrite", action="store_true", help="replace a corpus made of other files or with other settings")
    options = vars(parser.parse_args())

    begin = time.perf_counter()
    report = shard(inputs=options.pop("input"), valid_inputs=options.pop("valid_input"), **options)
    if report is not None:
        print(f"{options['output']}, {time.perf_counter() - begin:.1f} s\n{describe(report)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
