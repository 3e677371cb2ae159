"""CORPUS.partial, the folder in which a corpus is made: what lies there, who may work there, how it becomes the corpus.

encoded/5d0f...      a partition's tokens (.tokens and .mask, until they are in shards), their columns (.safetensors),
                     the documents that could not be read (.quarantine) and a summary (.json, written last). The name is
                     a hash of the files, their cuts and the tokenizer, so that a run with other settings finds it too
sharding.json        the recipe of the shards: inputs with sizes and times, settings. Another recipe starts them over
shards/000042.json   the record of a partition's shards, written last; 000042-train.safetensors: the index of one
corpus/              becomes CORPUS at the end
replaced/            the old corpus, for a moment, with --overwrite
moving               there while the corpus moves into an --output that stays where it is
removed-NAME-0       what could not be removed, because a process of a network file system still had it open

CORPUS.partial.lock, beside it, is held by the process that works there.

A link is followed. Where CORPUS is a folder that cannot be renamed (a mount point, or in a folder that may not be
written to), it stays as it is: CORPUS.partial is CORPUS/.partial, and what is in it moves to CORPUS at the end.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memformer_dist.errors import UserError
from memformer_dist.files import (
    NO_SPACE,
    PARTIAL,
    flush,
    held,
    is_mount_point,
    make_way,
    read_json,
    remove_folder,
    write_bytes,
    write_text,
)
from memformer_dist.places import recorded
from memformer_dist.prepare.documents import File, suffix_of
from memformer_dist.prepare.kinds import Kind
from memformer_dist.prepare.partitions import Partition
from memformer_dist.tokenizer import Tokenizer

RECORD, QUARANTINE, IGNORED = "sharding.json", "quarantine.jsonl", "ignored.jsonl"
RECIPE_VERSION = 2
INSIDE = ".partial"  # CORPUS.partial, if it is inside
NO_CORPUS = (INSIDE, f"{INSIDE}.lock", "lost+found")  # what may be in a folder that counts as empty

ListedFile = tuple[str | int | None, ...]  # absolute path, bytes, mark of the last change; kind, if `listed` says so


@dataclass(frozen=True)
class Recipe:
    """What the shards depend on. With the report of the corpus it is CORPUS/sharding.json."""

    version: int
    tokenizer_sha256: str
    inputs: list[ListedFile]
    valid_inputs: list[ListedFile]
    valid_fraction: float
    seed: int
    partition_mib: float
    text_field: str | None = None
    bos_and_eos: list[int] | None = None  # their ids, where a SentencePiece model does not name them itself

    @property
    def fields(self) -> dict[str, Any]:
        """As sharding.json has them. An option that came later is there where it is used, so older records compare."""
        later = ("text_field", "bos_and_eos")
        return {name: value for name, value in vars(self).items() if name not in later or value is not None}

    def differences(self, record: dict[str, Any]) -> list[str]:
        """The fields in which a sharding.json, parsed, is another recipe."""
        record, own = upgrade(record), json.loads(json.dumps(self.fields))
        return [name for name in vars(self) if record.get(name) != own.get(name)]


def upgrade(record: dict[str, Any]) -> dict[str, Any]:
    """A sharding.json in today's words. Partitions were once called units."""
    return {"partition_mib" if name == "unit_mib" else name: value for name, value in record.items()}


def listed(file: File) -> ListedFile:
    """With its kind where version 0.1 took the file for another: for text, whatever it was."""
    usual = (recorded(file.path), file.size, file.changed)
    before = {".jsonl": Kind.JSON_LINES, ".parquet": Kind.PARQUET}.get(suffix_of(file.name), Kind.TEXT)
    return usual if file.kind in (before, Kind.BINARY, None) else (*usual, file.kind.value)


@dataclass(frozen=True)
class Workspace:
    """The folder of a corpus that is to be at `output`."""

    output: Path
    stays: bool = False  # `output` is there and keeps its place

    @classmethod
    def of(cls, output: Path) -> "Workspace":
        """For an --output as it was given."""
        path = Path(os.path.realpath(output) if output.is_symlink() else os.path.abspath(output))
        return cls(path, path.is_dir() and (is_mount_point(path) or not os.access(path.parent, os.W_OK)))

    @property
    def folder(self) -> Path:
        return self.output / INSIDE if self.stays else self.output.with_name(self.output.name + ".partial")

    @property
    def lock(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.lock")  # not in the folder: see `locked`

    def tokenizer(self, file_name: str) -> Path:
        return self._corpus / file_name

    def split(self, name: str) -> Path:
        return self._corpus / name

    def shard(self, number: int, split: str) -> Path:
        return self._corpus / split / f"shard-{number:06d}.tar"

    def shard_record(self, number: int) -> Path:
        return self.folder / "shards" / f"{number:06d}.json"

    def shard_index(self, number: int, split: str) -> Path:
        return self.folder / "shards" / f"{number:06d}-{split}.safetensors"

    def stem(self, partition: Partition, tokenizer_sha256: str, text_field: str | None = None) -> Path:
        """The files of an encoded partition without their suffix: the same files, cuts and tokenizer, the same name."""
        pieces = [(*listed(file), *place) for file, *place in partition.pieces]
        made_of = [tokenizer_sha256, pieces, *([] if text_field is None else [text_field])]
        name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
        return self.folder / "encoded" / name

    @property
    def _corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def _replaced(self) -> Path:
        return self.folder / "replaced"

    @property
    def _moving(self) -> Path:
        return self.folder / "moving"

    @property
    def _recipe(self) -> Path:
        return self.folder / RECORD

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Raises UserError while another process works there, or where the folder cannot be written."""
        with writing(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            # Not in the folder: on NFS no folder can be removed that holds an open file.
            with held(self.lock) as is_ours:
                if not is_ours:
                    raise UserError(f"{self.folder}: another process is working on this corpus")
                self.folder.mkdir(exist_ok=True)
                yield

    def restore(self) -> None:
        """Give the old corpus its name back, where a run with --overwrite was killed before the new one took it."""
        if self.stays and self._moving.exists():
            with self.locked():
                self._move_in()
        elif self._replaced.exists():
            with self.locked():
                if self.stays and not (self.output / RECORD).exists():
                    _move_entries(self._replaced, self.output)
                elif not self.output.exists():
                    self._replaced.rename(self.output)

    def remove_leftover(self) -> None:
        """Remove what is left of a run that was killed when the corpus had its name already; where that cannot be, not."""
        if self.folder.exists() and not self._corpus.exists():
            with suppress(UserError), self.locked():
                remove_folder(self.folder)

    def begin(self, recipe: Recipe, tokenizer: Tokenizer, encoded: Iterable[str]) -> None:
        """Keep what an interrupted run finished of the same recipe, and the `encoded` partitions of these names."""
        keep = set(encoded)
        record = read_json(self._recipe)
        differences = ["recipe"] if record is None else recipe.differences(record)
        if differences:
            if self._recipe.exists():
                print(f"{self.folder}: has other {', '.join(differences)}; its shards are made again", file=sys.stderr)
            self._recipe.unlink(missing_ok=True)  # first: without it no shard here counts
            make_way(self.folder / "shards")
            make_way(self._corpus)
        for name in "encoded", "shards", "corpus/train", "corpus/valid":
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        unfinished = [*self.folder.rglob(f"*{PARTIAL}")]
        others = [path for path in (self.folder / "encoded").iterdir() if path.stem not in keep]
        for path in *unfinished, *others:
            with suppress(OSError):  # in use on another node: no name here is used again before it is whole
                path.unlink(missing_ok=True)
        write_bytes(self.tokenizer(tokenizer.file_name), tokenizer.raw)
        if differences:
            write_text(self._recipe, json.dumps(recipe.fields, indent=1))

    def finish(
        self,
        recipe: Recipe,
        report: dict[str, Any],
        quarantine: Iterable[dict[str, Any]],
        ignored: Iterable[dict[str, Any]] = (),
    ) -> None:
        """The corpus takes its name; CORPUS.partial goes if it can, and with it the corpus that is replaced."""
        with open(self._corpus / QUARANTINE, "w") as file:  # JSON is ASCII here
            file.writelines(_line(entry) for entry in quarantine)
        if lines := [_line(entry) for entry in ignored]:
            (self._corpus / IGNORED).write_text("".join(lines))
        (self._corpus / RECORD).write_text(json.dumps(recipe.fields | {"report": report}, indent=1) + "\n")
        for path in self._corpus.rglob("*"):
            if path.suffix != ".tar":  # shards are on the disk already
                flush(path)
        if self.output.exists():
            make_way(self._replaced)
            if self.stays:
                self._replaced.mkdir()
                _move_entries(self.output, self._replaced)
            else:
                self.output.rename(self._replaced)
        if self.stays:
            write_text(self._moving, "")  # from here on the new corpus counts
            self._move_in()
        else:
            self._corpus.rename(self.output)
            remove_folder(self.folder)

    def _move_in(self) -> None:
        if self._corpus.exists():
            _move_entries(self._corpus, self.output)
            flush(self.output)
            self._corpus.rmdir()
        remove_folder(self.folder)

    def discard(self) -> None:
        remove_folder(self.folder)


def _line(entry: dict[str, Any]) -> str:
    """Of quarantine.jsonl and ignored.jsonl."""
    return json.dumps(entry | {"file": recorded(entry["file"])}) + "\n"


def is_empty(folder: Path) -> bool:
    """Whether there is nothing in a folder but what file systems and unfinished preparations put there."""
    return all(path.name in NO_CORPUS for path in folder.iterdir())


def _move_entries(source: Path, target: Path) -> None:
    """What is in a folder of a corpus into another. The record goes last where it comes and first where it leaves."""
    names = sorted(path.name for path in source.iterdir() if path.name not in NO_CORPUS)
    leaves = target.is_relative_to(source)
    for name in sorted(names, key=lambda name: (name == RECORD) != leaves):
        (source / name).rename(target / name)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a UserError naming the file it names, or else `path`."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> UserError:
    advice = "; what is finished is kept: with more space, the same command resumes" if error.errno in NO_SPACE else ""
    return UserError(f"cannot write {error.filename or path}: {error.strerror}{advice}")
