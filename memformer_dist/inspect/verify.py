"""Check a corpus: every file, every byte.

    python -m memformer_dist.inspect.verify corpora/books
    python -m memformer_dist.inspect.verify corpora/books/train     # one split

Compares corpus.json, the index, the size and sha256 of every shard, the tokenizer and what preparation has recorded
(sharding.json), and names files that do not belong there. Where a shard's sha256 is wrong it goes through the documents
by their crc32, and through what lies between them, to say what is damaged and where. Lists all problems and ends with exit code 2; 0 where there are none.
"""

import argparse
import json
import os
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from pydantic import ValidationError
from tqdm import tqdm

from memformer_dist.data.format import (
    BLOCK,
    INDEX,
    MANIFEST,
    Index,
    Manifest,
    Shard,
    blocks,
    read_split,
    wrong_size,
)
from memformer_dist.errors import UserError, run_program
from memformer_dist.files import sha256_of

TOKENIZER, RECORD, QUARANTINE = "tokenizer.model", "sharding.json", "quarantine.jsonl"
OF_A_CORPUS = {TOKENIZER, "train", "valid", RECORD, QUARANTINE}
OF_A_SPLIT = {MANIFEST, INDEX, "schedules"}  # and the shards


class Found(NamedTuple):
    """What is in a corpus, and what is wrong with it, a sentence each."""

    problems: list[str]
    shards: int
    documents: int
    tokens: int
    bytes: int


def verify(corpus: Path, *, threads: int = 1, quiet: bool = True) -> Found:
    """Check a corpus, or one split of it. Raises UserError where there is none."""
    splits = [split for split in (corpus / "train", corpus / "valid") if split.is_dir()]
    if not splits and not (corpus / MANIFEST).exists():
        raise UserError(
            f"{corpus}: found no corpus.json and neither train/ nor valid/, expected a corpus or a split of one"
        )
    root, problems = (corpus, _strays(corpus, OF_A_CORPUS)) if splits else (corpus.parent, [])
    if splits:
        problems += _record(corpus)
    manifests = []
    for split in splits or [corpus]:
        manifest, index, wrong = _contents(split)
        problems += wrong
        if manifest is None:
            continue
        manifests.append(manifest)
        problems += _strays(split, OF_A_SPLIT | {shard.name for shard in manifest.shards})
        problems += _tokenizer(root / TOKENIZER, split, manifest)
        total = sum(shard.bytes for shard in manifest.shards)
        with tqdm(total=total, unit="B", unit_scale=True, desc=str(split), disable=quiet) as bar:
            problems += _shards(split, manifest, index, threads, bar.update)
    shards = [shard for manifest in manifests for shard in manifest.shards]
    documents, tokens = (sum(getattr(shard, what) for shard in shards) for what in ("documents", "tokens"))
    return Found(problems, len(shards), documents, tokens, sum(shard.bytes for shard in shards))


def _contents(split: Path) -> tuple[Manifest | None, Index | None, list[str]]:
    """Where the index is damaged, the manifest alone, which has the hashes of the shards."""
    try:
        manifest, _, index = read_split(split)
    except UserError as error:
        try:
            manifest, index = Manifest.model_validate_json((split / MANIFEST).read_bytes()), None
        except (OSError, ValidationError):
            manifest = index = None
        return manifest, index, [str(error)]
    sums = {
        "documents": (len(index.length), sum(shard.documents for shard in manifest.shards)),
        "tokens": (int(index.length.sum(dtype=np.int64)), sum(shard.tokens for shard in manifest.shards)),
    }
    problems = [
        f"{split / MANIFEST}: {what}: {getattr(manifest, what)}, but the index has {of_index} and the shards {of_shards}"
        for what, (of_index, of_shards) in sums.items()
        if not getattr(manifest, what) == of_index == of_shards
    ]
    if manifest.has_mask != (index.mask_crc32 is not None):
        problems.append(f"{split / MANIFEST}: has_mask is {manifest.has_mask}, but the index says otherwise")
    return manifest, None if problems else index, problems


def _record(corpus: Path) -> list[str]:
    """Which splits there are, what their corpus.json were, and how many documents were left out. SplitWriter records nothing."""
    made = {"train": None, "valid": None}
    problems = []
    try:
        report = json.loads((corpus / RECORD).read_bytes())["report"]
        made = {name: figures.get("fingerprint") for name, figures in report["splits"].items()}
        listed = (corpus / QUARANTINE).read_bytes().count(b"\n")
        if listed != report["unreadable"]:
            problems.append(f"{corpus / QUARANTINE}: {listed} lines, {RECORD} says {report['unreadable']}")
    except FileNotFoundError as error:
        if error.filename != str(corpus / RECORD):
            problems.append(f"{error.filename}: not found")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problems.append(f"{corpus / RECORD}: is not what preparation wrote: {type(error).__name__}: {error}")
    for name, fingerprint in made.items():
        manifest = corpus / name / MANIFEST
        if not manifest.parent.is_dir():
            problems.append(f"{manifest.parent}: not found")
        elif fingerprint and manifest.exists() and (found := sha256_of(manifest)) != fingerprint:
            problems.append(f"{manifest}: sha256 is {found}, {RECORD} says {fingerprint}")
    return problems


def _strays(folder: Path, known: set[str]) -> list[str]:
    return [
        f"{path}: does not belong to the corpus"
        for path in sorted(folder.iterdir())
        if path.name not in known and not path.name.startswith(".")
    ]


def _tokenizer(file: Path, split: Path, manifest: Manifest) -> list[str]:
    if not file.exists():
        return [f"{file}: not found; the tokenizer that {split} was made with is needed"]
    found = sha256_of(file)
    if found == manifest.tokenizer_sha256:
        return []
    return [f"{file}: sha256 is {found}, but {split} was made with {manifest.tokenizer_sha256}"]


def _shards(
    split: Path, manifest: Manifest, index: Index | None, threads: int, progress: Callable[[int], object]
) -> list[str]:
    ends = np.cumsum([shard.documents for shard in manifest.shards]).tolist()

    def check(number: int) -> list[str]:
        shard = manifest.shards[number]
        if not (split / shard.name).exists():
            return [wrong_size(split, shard)]
        size = wrong_size(split, shard)
        if size is None and (found := sha256_of(split / shard.name, progress)) == shard.sha256:
            return []
        told = size or f"{split / shard.name}: sha256 is {found}, {MANIFEST} says {shard.sha256}"
        if index is None:
            return [told]
        rows = slice(ends[number] - shard.documents, ends[number])
        columns = Index(*(None if column is None else column[rows] for column in index))
        return [told, *_damage(split / shard.name, shard, columns, manifest, rows.start)]

    with ThreadPoolExecutor(threads) as pool:
        return [problem for problems in pool.map(check, range(len(ends))) for problem in problems]


class Member(NamedTuple):
    """A member of the tar that documents `first` (in the split) up to one more should have there."""

    what: str
    document: int
    start: int  # of its payload
    size: int  # of its payload
    crc32: int


def _members(index: Index, manifest: Manifest, first: int) -> list[Member]:
    """In the order of the tar; `index` is that of the shard."""
    item, members = np.dtype(manifest.token_dtype).itemsize, []
    for row in range(len(index.length)):
        length, start = int(index.length[row]), int(index.block[row]) * BLOCK
        members.append(Member("tokens", first + row, start, length * item, int(index.crc32[row])))
        if index.mask_crc32 is not None:
            start += (blocks(length * item) + 1) * BLOCK
            members.append(Member("mask", first + row, start, length, int(index.mask_crc32[row])))
    return members


def _damage(file: Path, shard: Shard, index: Index, manifest: Manifest, first: int) -> list[str]:
    """What is wrong with a shard of which something is, by document and byte offset."""
    raw = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
    members = _members(index, manifest, first)
    inside, headers, outside = [], [], []
    damaged, end = set(), 0
    for member in members:
        payload = raw[member.start : member.start + member.size]
        if len(payload) < member.size:
            last = members[-1].document
            inside.append(
                f"{file}: ends in or before the {member.what} of document {member.document} at byte {member.start}"
                + (f"; documents {member.document} to {last} are not whole" if last > member.document else "")
            )
            break
        if problem := _header(bytes(raw[member.start - BLOCK : member.start]), member.size):
            headers.append(f"{file}: damage outside of documents: tar header at byte {member.start - BLOCK}: {problem}")
        if (found := zlib.crc32(payload)) != member.crc32:
            damaged.add(member.document)
            inside.append(
                f"{file}: the {member.what} of document {member.document} at byte {member.start} are damaged: crc32 is"
                f" {found:08x}, the index says {member.crc32:08x}"
            )
        end = (member.start // BLOCK + blocks(member.size)) * BLOCK
        outside += _not_empty(file, raw, member.start + member.size, end)
    else:
        outside += _not_empty(file, raw, end, len(raw))
    if 2 * len(damaged) > shard.documents and (headers or shard.documents > 1):
        return [
            f"{file}: is another shard, or none: {len(damaged)} of its {shard.documents} documents are not those of the index"
        ]
    if len(raw) > shard.bytes:
        outside = [f"{file}: goes on behind its end at byte {shard.bytes}"]
    return inside + headers + outside


def _header(raw: bytes, size: int) -> str | None:
    try:
        found = tarfile.TarInfo.frombuf(raw, "utf-8", "surrogateescape").size
    except tarfile.HeaderError as error:
        return str(error)
    return None if found == size else f"a member of {found} bytes, the index says {size}"


def _not_empty(file: Path, raw: np.ndarray, start: int, stop: int) -> list[str]:
    """Between payloads and behind the last one a tar has zeros."""
    wrong = np.flatnonzero(raw[start:stop])
    return [f"{file}: damage outside of documents: padding at byte {start + int(wrong[0])}"] if len(wrong) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", metavar="CORPUS", help="folder written by tokenizer/shard.py, or a split in it")
    parser.add_argument("--threads", type=int, default=min(8, len(os.sched_getaffinity(0))), help="files read at once")
    options = parser.parse_args()

    def program() -> None:
        if "://" in options.corpus:
            raise UserError(
                f"{options.corpus}: found a URL, expected a folder; shards from a URL are verified as they come"
            )
        began = time.perf_counter()
        found = verify(Path(options.corpus), threads=max(1, options.threads), quiet=False)
        seconds = time.perf_counter() - began
        if found.problems:
            count = f"{len(found.problems)} problem" + "s" * (len(found.problems) > 1)
            raise UserError(f"{options.corpus}: {count}\n" + "\n".join(f"  {problem}" for problem in found.problems))
        print(
            f"{options.corpus}: whole; {found.shards} shards, {found.documents:,} documents, {found.tokens:,} tokens,"
            f" {found.bytes / 1e6:,.1f} MB in {seconds:.1f} s ({found.bytes / 1e6 / seconds:,.0f} MB/s)"
        )

    run_program(program)


if __name__ == "__main__":
    main()
