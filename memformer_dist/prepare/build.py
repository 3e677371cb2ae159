"""From inputs to a corpus, partition by partition, on many workers: encode, write, merge.

tokenizer/shard.py is the command line; partitions.py holds what the workers do.

The inputs are cut into partitions before anything is read (documents.cut_partitions). Workers `encode_partition`, which reads every byte
of the inputs once; then it is known which documents can be used, and those for validation are chosen; then `write_partition`
makes of each partition at most one shard for either split, which bears the partition's number. So no shard depends on what another
worker does, and the corpus is the same bytes for any number of workers.

Until the corpus is whole, everything lies in CORPUS.partial:

    encoded/5d0f...      a partition's tokens (.tokens, .mask, until they are in shards), their columns (.safetensors), what
                         could not be read (.quarantine) and what was found (.json, last). The name is a hash of the files,
                         their cuts and the tokenizer: other settings find it again
    sharding.json        the recipe of the shards: inputs, sizes, times, settings; with another one they are made anew
    shards/000042.json   the shards of a partition and their figures, written last; 000042-train.safetensors: an index
    corpus/              what is renamed to CORPUS at the end
    replaced/            the old corpus, in the moment of --overwrite
    lock                 held by the process that works here

An interrupted run goes on with the partitions that are not finished.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
from safetensors.numpy import load as load_safetensors
from tqdm import tqdm

from memformer_dist.data.format import (
    MANIFEST,
    Index,
    Shard,
    WrittenShard,
    read_split,
    write_manifest,
    wrong_size,
)
from memformer_dist.errors import UserError
from memformer_dist.files import sha256_of
from memformer_dist.prepare.documents import Partition, cut_partitions, discover
from memformer_dist.prepare.encode import (
    Encoded,
    EncodeTask,
    WriteTask,
    already_encoded,
    cannot_write,
    encode_partition,
    finished_record,
    index_path,
    load_tokenizer,
    stem_of,
    store,
    usable_documents,
    write_partition,
)
from memformer_dist.prepare.pool import Pool, open_pool
from memformer_dist.vocabulary import Vocabulary

RECORD = "sharding.json"
PADDING_AT = (128, 512)  # segment lengths for which the report gives the share of padding


def shard(
    output: Path,
    tokenizer: Path,
    inputs: Sequence[str],
    valid_inputs: Sequence[str] = (),
    *,
    exclude: Sequence[str] = (),
    valid_fraction: float = 0.05,
    seed: int = 0,
    partition_mib: float = 64,
    workers: int = 1,
    strict: bool = False,
    overwrite: bool = False,
) -> dict | None:
    """Write the corpus, or find it already there; returns the report (under MPI in rank 0, None in the others).

    The result does not depend on `workers`, nor on MPI. Raises UserError for what a user can put right; the partitions that are
    finished by then stay in CORPUS.partial.
    """
    with open_pool(workers) as pool:
        if pool is None:
            return None
        if not 0 <= valid_fraction < 1:
            raise UserError(f"--valid-fraction {valid_fraction}: expected at least 0 and less than 1")
        if not 0 < partition_mib < math.inf:
            raise UserError(f"--partition-mib {partition_mib}: expected more than 0")
        if seed < 0:
            raise UserError(f"--seed {seed}: expected 0 or more")
        output = Path(os.path.abspath(output))
        model, raw_model = load_tokenizer(tokenizer)
        sources, ignored = list_sources(inputs, valid_inputs, exclude, max(1, int(partition_mib * 2**20)))
        recipe = {
            "version": 2,
            "tokenizer_sha256": hashlib.sha256(raw_model).hexdigest(),
            "inputs": _listing(sources, held_out=False),
            "valid_inputs": _listing(sources, held_out=True),
            "valid_fraction": valid_fraction,
            "seed": seed,
            "partition_mib": partition_mib,
        }
        partial = output.with_name(output.name + ".partial")
        if (partial / "replaced").exists():
            restore(partial, output)
        if (output / RECORD).exists():
            if not overwrite:
                report = find_existing(output, recipe, strict)
                if partial.exists() and not (partial / "corpus").exists():  # interrupted when all was done
                    shutil.rmtree(partial)
                return report
        elif output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise UserError(f"--output: {output} is there and is no corpus; it is not overwritten")

        vocabulary = Vocabulary(
            size=model.vocab_size(),
            bos_id=model.bos_id(),
            eos_id=model.eos_id(),
            tokenizer_sha256=recipe["tokenizer_sha256"],
        )
        tasks = [
            EncodeTask(
                number,
                partial,
                stem_of(partial, source.partition, vocabulary.tokenizer_sha256),
                source.partition,
                vocabulary,
            )
            for number, source in enumerate(sources)
        ]
        with _locked(partial):
            begin(partial, recipe, {task.stem.name for task in tasks}, raw_model)
            encoded = work(pool, "tokenising", encode_partition, tasks, sources, already_encoded)
            unread = sum(partition.unreadable for partition in encoded)
            first = [_place(line) for line in islice(quarantine(tasks, encoded), 5)]
            for place in first:
                print(f"cannot read {place}", file=sys.stderr)
            if strict and unread:
                raise UserError(
                    f"--strict: {unread} documents cannot be read, no corpus is made. {'; '.join(first)}. What could be read"
                    f" is tokenised in {partial}: without --strict, or when these are mended, the command goes on there"
                )
            usable = [usable_documents(task.stem) for task in tasks]
            valid = held_out_documents(sources, usable, unread, valid_fraction, seed)
            has_mask = any(partition.masked for partition in encoded)
            write_tasks = [
                WriteTask(task.number, partial, task.stem, held_out, vocabulary, has_mask)
                for task, held_out in zip(tasks, valid)
            ]
            records = work(pool, "writing", write_partition, write_tasks, sources, finished_record)
            splits = merge(partial, vocabulary, has_mask, records)
            documents = sum(partition.documents for partition in encoded)
            report = {
                "splits": splits,
                "empty": documents - unread - sum(split["documents"] for split in splits.values()),
                "unreadable": unread,
                "ignored": ignored,
            }
            finish(partial, output, recipe | {"report": report}, quarantine(tasks, encoded))
        return report


def find_existing(output: Path, recipe: dict, strict: bool) -> dict:
    """The report of the corpus at `output`. Raises UserError if it was made by another recipe or is damaged."""
    try:
        record = json.loads((output / RECORD).read_text())
        unread = record["report"]["unreadable"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{output / RECORD}: is damaged; --overwrite makes the corpus anew") from None
    if differing := _differing(record, recipe):
        raise UserError(f"--output: {output} is there, with other {', '.join(differing)}; --overwrite replaces it")
    if strict and unread:
        raise UserError(
            f"--strict: {unread} documents could not be read when it was made, see {output}/quarantine.jsonl"
        )
    for split in record["report"]["splits"]:
        for part in read_split(output / split).manifest.shards:
            if problem := wrong_size(output / split, part):
                raise UserError(problem)
    print(f"{output} is there already, made of the same files with the same settings")
    return record["report"]


# ------------------------------------------------------------------------------------------------- what is to be read


class Source(NamedTuple):
    partition: Partition
    held_out: bool  # from --valid-input


def list_sources(
    inputs: Sequence[str], valid_inputs: Sequence[str], exclude: Sequence[str], partition_bytes: int
) -> tuple[list[Source], int]:
    """The partitions in the order of the corpus, and the number of files that were passed over for their suffix."""
    files, ignored = discover(inputs, exclude)
    valid_files, valid_ignored = discover(valid_inputs, exclude)
    if both := {file.path for file in files} & {file.path for file in valid_files}:
        raise UserError(f"--valid-input: {min(both)} is among the files of --input too")
    groups = (files, False), (valid_files, True)
    sources = [
        Source(partition, held_out)
        for group, held_out in groups
        for partition in cut_partitions(group, partition_bytes)
    ]
    return sources, ignored + valid_ignored


def _listing(sources: Sequence[Source], held_out: bool) -> list[list]:
    """[absolute path, size, time of the last change] of each file."""
    pieces = [piece for source in sources if source.held_out == held_out for piece in source.partition.pieces]
    files = dict.fromkeys(piece.file for piece in pieces)
    return [[file.path, file.size, file.changed] for file in files]


# --------------------------------------------------------------------------------------------------- encode and write


def work(
    pool: Pool, what: str, function: Callable, tasks: Sequence, sources: Sequence[Source], earlier: Callable
) -> list:
    """The results of all tasks, one for each source; those that an `earlier` run has finished are not done again."""
    results = [earlier(task) for task in tasks]
    missing = [task for task, result in zip(tasks, results) if result is None]
    if len(missing) < len(tasks):
        print(
            f"{what}: {len(tasks) - len(missing)} of {len(tasks)} partitions were finished by an earlier run",
            file=sys.stderr,
        )
    total, left = (sum(sources[task.number].partition.bytes for task in some) for some in (tasks, missing))
    with tqdm(desc=what, total=total, initial=total - left, unit="B", unit_scale=True, disable=None) as progress:
        for number, result in pool.run(function, missing):
            results[number] = result
            progress.update(sources[number].partition.bytes)
    return results


def quarantine(tasks: Sequence[EncodeTask], encoded: Sequence[Encoded]) -> Iterator[dict]:
    """The lines of quarantine.jsonl. Positions in a part of a file become positions in the file."""
    before: dict[str, int] = {}  # lines of a .jsonl in the partitions up to here
    for task, partition in zip(tasks, encoded):
        piece = task.partition.pieces[-1]
        offset = before.get(piece.file.name, 0)
        if piece.stop is not None:
            before[piece.file.name] = offset + partition.lines
        if partition.unreadable:
            with open(task.stem.with_suffix(".quarantine"), "rb") as file:
                for file_name, position, reason in map(json.loads, file):
                    yield {"file": file_name, "position": position + offset, "reason": reason}


def _place(line: dict) -> str:
    position = f", line {line['position']}" if line["position"] else ""
    return f"{line['file']}{position}: {line['reason']}"


def held_out_documents(
    sources: Sequence[Source], usable: Sequence[np.ndarray], unread: int, fraction: float, seed: int
) -> list[np.ndarray]:
    """Of each partition the numbers of the validation documents, int64 [n].

    usable   bool [documents] of each partition
    Raises UserError where a split would be empty that was asked for.
    """
    ends = np.cumsum([0] + [len(partition) for partition in usable])
    held_out = np.concatenate([np.full(len(partition), source.held_out) for source, partition in zip(sources, usable)])
    usable = np.concatenate(usable)
    told = f"{len(usable) - usable.sum() - unread} are empty, {unread} unreadable"
    given = any(source.held_out for source in sources)
    for option, chosen in ("--input", ~held_out), ("--valid-input", held_out):
        if (option == "--input" or given) and not np.any(usable & chosen):
            raise UserError(f"{option}: no usable document; {told}")
    valid = held_out if given else choose_validation(usable, fraction, seed)
    if fraction > 0 and not np.any(valid):
        raise UserError(
            f"--input: found one usable document ({told}) and"
            " documents are held out whole, so none can be; give others with --valid-input, or a second document"
            " (one book in two files will do); --valid-fraction 0 writes no validation split, which training needs"
        )
    return [np.flatnonzero(valid[start:stop]) for start, stop in zip(ends, ends[1:])]


def choose_validation(usable: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [documents]: a seeded choice among the usable ones; of two or more, at least one for either split."""
    candidates = np.flatnonzero(usable)
    number = 0
    if fraction > 0 and len(candidates) > 1:
        number = min(max(round(fraction * len(candidates)), 1), len(candidates) - 1)
    chosen = np.zeros(len(usable), bool)
    chosen[np.random.Generator(np.random.PCG64(seed)).permutation(candidates)[:number]] = True
    return chosen


# --------------------------------------------------------------------------------------------------- CORPUS.partial


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Raises UserError while another process works there, or where the folder cannot be written."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = open(partial / "lock", "w")
    except OSError as error:
        raise cannot_write(partial, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{partial}: another process is at work on this corpus") from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        except OSError as error:
            raise cannot_write(partial, error) from None


def restore(partial: Path, output: Path) -> None:
    """Give a corpus its name back whose replacement was killed before it took it."""
    with _locked(partial):
        if not output.exists():
            (partial / "replaced").rename(output)


def begin(partial: Path, recipe: dict, partitions: set[str], model: bytes) -> None:
    """Make CORPUS.partial ready: what an interrupted run has finished of these `partitions` and this recipe stays, all else goes."""
    record = partial / RECORD
    differing = _differing(json.loads(record.read_text()), recipe) if record.exists() else ["recipe"]
    if differing:
        if record.exists():
            print(f"{partial} has other {', '.join(differing)}: its shards are made anew", file=sys.stderr)
        record.unlink(missing_ok=True)  # first: without it no shard there counts
        for name in "shards", "corpus":
            shutil.rmtree(partial / name, ignore_errors=True)
    for name in "encoded", "shards", "corpus/train", "corpus/valid":
        (partial / name).mkdir(parents=True, exist_ok=True)
    for path in [
        *partial.rglob("*.partial"),
        *(path for path in (partial / "encoded").iterdir() if path.stem not in partitions),
    ]:
        path.unlink(missing_ok=True)
    store(partial / "corpus" / "tokenizer.model", model)
    if differing:
        store(record, json.dumps(recipe, indent=1).encode())


def merge(partial: Path, vocabulary: Vocabulary, has_mask: bool, records: Sequence[dict]) -> dict[str, dict]:
    """Index and corpus.json of the splits; returns their figures. Raises UserError where a split has nothing to learn."""
    figures = {}
    for split in "train", "valid":
        partitions = {number: record[split] for number, record in enumerate(records) if split in record}
        if not partitions:
            (partial / "corpus" / split).rmdir()
            continue
        if not sum(partition["labels"] for partition in partitions.values()):
            shutil.rmtree(partial)
            raise UserError(
                f"{split}: found no label that counts in the loss, expected some: its documents have only parts with"
                ' "loss": false'
            )
        written = []
        for number, partition in partitions.items():
            raw = index_path(partial, number, split).read_bytes()
            written.append(WrittenShard(Shard(**partition["shard"]), Index(**load_safetensors(raw))))
        write_manifest(partial / "corpus" / split, vocabulary, written, has_mask=has_mask)
        fingerprint = sha256_of(partial / "corpus" / split / MANIFEST)
        lengths = np.concatenate([part.index.length for part in written]).astype(np.int64)
        figures[split] = {
            "fingerprint": fingerprint,
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "characters": sum(partition["characters"] for partition in partitions.values()),
            "padding": {
                str(length): 1 - lengths.sum() / (-(-lengths // length) * length).sum() for length in PADDING_AT
            },
        }
    return figures


def finish(partial: Path, output: Path, record: dict, unreadable: Iterable[dict]) -> None:
    """The corpus takes its name, and CORPUS.partial goes, with the corpus that it replaces."""
    corpus, replaced = partial / "corpus", partial / "replaced"
    with open(corpus / "quarantine.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in unreadable)
    store(corpus / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    for path in corpus.rglob("*"):
        if path.is_file() and path.suffix != ".tar":  # these are on the disk already
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        output.rename(replaced)
    corpus.rename(output)
    shutil.rmtree(partial)


def _differing(record: dict, recipe: dict) -> list[str]:
    recipe = json.loads(json.dumps(recipe))
    return [name for name in recipe if record.get(name) != recipe[name]]
