"""Check a corpus: every file, every byte.

    report = verify(Path("corpora/books"), threads=8)
    print(report.problems)

Compares corpus.json, the index, the size and sha256 of every shard, the tokenizer and what preparation recorded
(sharding.json), and reports files that do not belong there. Where the sha256 of a shard is wrong, it compares the
documents with their crc32, and what lies between them with what a tar has there, to say what is damaged and where.
"""

import json
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError
from tqdm import tqdm

from memformer_dist.data.format import BLOCK, INDEX, MANIFEST, Index, Manifest, Shard, blocks, read_split, wrong_size
from memformer_dist.errors import UserError
from memformer_dist.files import sha256_of
from memformer_dist.prepare.workspace import IGNORED, QUARANTINE, RECORD
from memformer_dist.tokenizer import FILES

IN_A_CORPUS = {"train", "valid", RECORD, QUARANTINE, IGNORED}  # and the tokenizer
IN_A_SPLIT = {MANIFEST, INDEX, "schedules"}  # and the shards


class CorpusReport(NamedTuple):
    """What is in a corpus, and what is wrong with it, a sentence for each problem."""

    problems: list[str]
    shards: int
    documents: int
    tokens: int
    bytes: int


def verify(corpus: Path, *, threads: int = 1, quiet: bool = True) -> CorpusReport:
    """Check a corpus, or one split of it. Raises UserError where there is none.

    threads   shards that are read at the same time
    quiet     show no progress, which is otherwise shown on a terminal
    """
    splits = [split for split in (corpus / "train", corpus / "valid") if split.is_dir()]
    if splits:
        problems = _problems_of_record(corpus)
    elif (corpus / MANIFEST).exists():
        splits, problems = [corpus], []
    else:
        raise UserError(
            f"{corpus}: found no corpus.json and neither train/ nor valid/, expected a corpus or a split of one"
        )
    shards: list[Shard] = []
    tokenizers: set[str] = set()
    for split in splits:
        manifest, of_split = _verify_split(split, threads, quiet)
        problems += of_split
        if manifest is not None:
            shards += manifest.shards
            tokenizers.add(manifest.tokenizer)
    if splits != [corpus]:
        problems = _strays(corpus, IN_A_CORPUS | (tokenizers or set(FILES))) + problems
    return CorpusReport(
        problems,
        len(shards),
        sum(shard.documents for shard in shards),
        sum(shard.tokens for shard in shards),
        sum(shard.bytes for shard in shards),
    )


def _verify_split(split: Path, threads: int, quiet: bool) -> tuple[Manifest | None, list[str]]:
    """What corpus.json says, and the problems of the split."""
    manifest, index, problems = _contents(split)
    if manifest is None:
        return None, problems
    problems += _strays(split, IN_A_SPLIT | {shard.name for shard in manifest.shards})
    problems += _problems_of_tokenizer(split.parent / manifest.tokenizer, split, manifest)
    total = sum(shard.bytes for shard in manifest.shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc=str(split), disable=quiet or None) as progress:
        problems += _problems_of_shards(split, manifest, index, threads, progress.update)
    return manifest, problems


# -------------------------------------------------------------------------------------------- everything but the shards


def _contents(split: Path) -> tuple[Manifest | None, Index | None, list[str]]:
    """corpus.json and the index, as far as they can be trusted, and what is wrong with them."""
    try:
        manifest, _, index = read_split(split)
    except UserError as error:
        try:  # where only the index is damaged, the manifest has the hashes of the shards
            return Manifest.model_validate_json((split / MANIFEST).read_bytes()), None, [str(error)]
        except (OSError, ValidationError):
            return None, None, [str(error)]
    problems = []
    for field, said, of_index, of_shards in (
        ("documents", manifest.documents, len(index.length), sum(shard.documents for shard in manifest.shards)),
        (
            "tokens",
            manifest.tokens,
            int(index.length.sum(dtype=np.int64)),
            sum(shard.tokens for shard in manifest.shards),
        ),
    ):
        if not said == of_index == of_shards:
            problems.append(
                f"{split / MANIFEST}: {field}: {said}, but the index has {of_index} and the shards {of_shards}"
            )
    if manifest.has_mask != (index.mask_crc32 is not None):
        has = "has no masks" if manifest.has_mask else "has masks"
        problems.append(f"{split / MANIFEST}: has_mask is {str(manifest.has_mask).lower()}, but the index {has}")
    return manifest, None if problems else index, problems


def _problems_of_record(corpus: Path) -> list[str]:
    """Compare the splits, their corpus.json and the number of unreadable documents with sharding.json, if it exists."""
    fingerprints: dict[str, str | None] = {"train": None, "valid": None}
    problems = []
    try:
        report = json.loads((corpus / RECORD).read_bytes())["report"]
        fingerprints = {name: split.get("fingerprint") for name, split in report["splits"].items()}
        listed = (corpus / QUARANTINE).read_bytes().count(b"\n")
        if listed != report["unreadable"]:
            problems.append(f"{corpus / QUARANTINE}: {listed} lines, {RECORD} says {report['unreadable']}")
    except FileNotFoundError as error:
        if error.filename != str(corpus / RECORD):  # a SplitWriter writes none
            problems.append(f"{error.filename}: not found")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problems.append(f"{corpus / RECORD}: is not what preparation wrote: {type(error).__name__}: {error}")
    for name, fingerprint in fingerprints.items():
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


def _problems_of_tokenizer(file: Path, split: Path, manifest: Manifest) -> list[str]:
    if not file.exists():
        return [f"{file}: not found; the tokenizer that {split} was made with is needed"]
    found = sha256_of(file)
    if found == manifest.tokenizer_sha256:
        return []
    return [f"{file}: sha256 is {found}, but {split} was made with {manifest.tokenizer_sha256}"]


# -------------------------------------------------------------------------------------------------------------- shards


def _problems_of_shards(
    split: Path, manifest: Manifest, index: Index | None, threads: int, progress: Callable[[int], object]
) -> list[str]:
    """`progress` is called with the bytes of each piece that was read."""
    ends = np.cumsum([shard.documents for shard in manifest.shards]).tolist()

    def check(number: int) -> list[str]:
        shard = manifest.shards[number]
        file = split / shard.name
        problem = wrong_size(split, shard)
        if problem is None:
            found = sha256_of(file, progress)
            if found == shard.sha256:
                return []
            problem = f"{file}: sha256 is {found}, {MANIFEST} says {shard.sha256}"
        if index is None or not file.exists():
            return [problem]
        return [problem, *_damage(file, shard, _rows(index, ends[number] - shard.documents, ends[number]), manifest)]

    with ThreadPoolExecutor(threads) as pool:
        return [problem for problems in pool.map(check, range(len(ends))) for problem in problems]


class ShardRows(NamedTuple):
    """The rows of one shard in the index of its split."""

    first: int  # document
    columns: Index


def _rows(index: Index, start: int, stop: int) -> ShardRows:
    mask_crc32 = None if index.mask_crc32 is None else index.mask_crc32[start:stop]
    return ShardRows(
        start, Index(index.length[start:stop], index.block[start:stop], index.crc32[start:stop], mask_crc32)
    )


class Member(NamedTuple):
    """A member that the tar should have."""

    what: str  # tokens or mask
    document: int
    start: int  # of its payload
    size: int  # of its payload
    crc32: int


def _members(rows: ShardRows, manifest: Manifest) -> list[Member]:
    """In the order of the tar."""
    itemsize, members = np.dtype(manifest.token_dtype).itemsize, []
    first, index = rows.first, rows.columns
    for row in range(len(index.length)):
        length, start = int(index.length[row]), int(index.block[row]) * BLOCK
        members.append(Member("tokens", first + row, start, length * itemsize, int(index.crc32[row])))
        if index.mask_crc32 is not None:
            start += int(blocks(length * itemsize) + 1) * BLOCK
            members.append(Member("mask", first + row, start, length, int(index.mask_crc32[row])))
    return members


def _damage(file: Path, shard: Shard, rows: ShardRows, manifest: Manifest) -> list[str]:
    """What is wrong with a shard that is known to be damaged, by document and byte offset."""
    raw = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
    members = _members(rows, manifest)
    inside: list[str] = []
    headers: list[str] = []
    outside: list[str] = []
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
        if problem := _problem_of_header(bytes(raw[member.start - BLOCK : member.start]), member.size):
            headers.append(f"{file}: damage outside of documents: tar header at byte {member.start - BLOCK}: {problem}")
        if (found := zlib.crc32(payload.data)) != member.crc32:
            damaged.add(member.document)
            inside.append(
                f"{file}: the {member.what} of document {member.document} at byte {member.start} are damaged: crc32 is"
                f" {found:08x}, the index says {member.crc32:08x}"
            )
        end = (member.start // BLOCK + int(blocks(member.size))) * BLOCK
        outside += _problem_of_padding(file, raw, member.start + member.size, end)
    else:
        outside += _problem_of_padding(file, raw, end, len(raw))
    if 2 * len(damaged) > shard.documents and (headers or shard.documents > 1):
        return [
            (
                f"{file}: is another shard, or none: {len(damaged)} of its {shard.documents} documents are not those of the"
                " index"
            )
        ]
    if len(raw) > shard.bytes:
        outside = [f"{file}: continues after its end at byte {shard.bytes}"]
    return inside + headers + outside


def _problem_of_header(raw: bytes, size: int) -> str | None:
    try:
        found = tarfile.TarInfo.frombuf(raw, "utf-8", "surrogateescape").size
    except tarfile.HeaderError as error:
        return str(error)
    return None if found == size else f"a member of {found} bytes, the index says {size}"


def _problem_of_padding(file: Path, raw: np.ndarray, start: int, stop: int) -> list[str]:
    """Between payloads and behind the last one a tar has zeros."""
    wrong = np.flatnonzero(raw[start:stop])
    return [f"{file}: damage outside of documents: padding at byte {start + int(wrong[0])}"] if len(wrong) else []
