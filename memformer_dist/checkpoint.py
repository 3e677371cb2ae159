"""Crash-safe, verified, portable checkpoints: safetensors and JSON, the same files at any world size and ZeRO stage.

    RUN/checkpoints/step-00000200/
        checkpoint.json                position, vocabulary and resolved configuration
        weights-00000.safetensors      fp32 parameters and persistent buffers by name; further files beyond 2 GiB
        moments-00000.safetensors      "exp_avg.NAME" and "exp_avg_sq.NAME": Adam's moments, whole tensors
        lanes-00000-00008.safetensors  the cell's state of global lanes 0 ... 7, written by the rank that had them
        manifest.json                  bytes and sha256 of every file above, written last

A checkpoint is written (saving.py) under another name and renamed when every byte is on the disk, so a folder step-...
is complete; its manifest shows whether it is still what was written. A damaged checkpoint is skipped with a warning, and
the one before it is used. Each also says which checkpoint is the best so far, by the held-out loss of the evaluations
during training. Nothing is unpickled. DeepSpeed's own checkpoints are not used: they unpickle, tie the run to its world
size and are not written atomically.
"""

import json
import logging
from collections.abc import Collection, Iterable, KeysView
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from safetensors import safe_open
from torch import Tensor, nn

from memformer_dist.cells.base import RecurrentCell, persistent_buffers
from memformer_dist.config import RunConfig
from memformer_dist.curriculum import Progress
from memformer_dist.data.dataset import TokenDataset
from memformer_dist.errors import UserError, first_problem
from memformer_dist.files import REMOVED, make_way, named_in_utf8, sha256_of
from memformer_dist.progress import HeldOut, Interval, Position
from memformer_dist.segment import Tensors
from memformer_dist.tokenizer import FILES, Tokenizer, find_tokenizer, open_tokenizer
from memformer_dist.upgrade import upgrade
from memformer_dist.vocabulary import Vocabulary
from memformer_dist.world import World

NEWEST, BEST = "newest", "best"  # which checkpoint of a run is meant, where it is not one by its name
WHICH = (  # the help of --checkpoint
    f"which of the run's checkpoints: {NEWEST} (the default), {BEST} (by the held-out loss of the evaluations during"
    " training), or the name or path of one"
)
log = logging.getLogger(__name__)


class ReadoutGroup(BaseModel, extra="forbid", frozen=True):
    """The choice of mrbp.readout_group "auto". Kept, because the dropout masks of a readout depend on its batch."""

    segments: int
    lanes: int  # of the lane group that was measured


class Contents(BaseModel, extra="forbid"):
    """What checkpoint.json holds."""

    version: Literal[2] = 2
    position: Position
    interval: Interval = Interval()
    held_out: HeldOut = HeldOut()
    curriculum: Progress | None = None  # of the window; None in checkpoints older than curricula
    readout_group: ReadoutGroup | None = None  # None unless mrbp.readout_group is "auto"
    corpus: str  # fingerprint of the training corpus
    anchor: bool  # never removed
    vocabulary: Vocabulary
    config: RunConfig

    @property
    def best_name(self) -> str | None:
        """The name of the best checkpoint so far; None where no evaluation has been made yet."""
        return None if self.held_out.best is None else name_of(self.held_out.best.step)


def name_of(step: int) -> str:
    """What the checkpoint of a step is called."""
    return f"step-{step:08d}"


class FileRecord(BaseModel, extra="forbid"):
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        return cls(bytes=path.stat().st_size, sha256=sha256_of(path))


FILE_RECORDS = TypeAdapter(dict[str, FileRecord])  # what manifest.json holds, by file name


class Damaged(Exception):
    """A checkpoint is not what was written."""


class Checkpoint:
    """A checkpoint on disk. Call `verify` before trusting what it holds.

    Raises Damaged if there is no readable manifest.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.records = FILE_RECORDS.validate_json((path / "manifest.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise Damaged(f"{path / 'manifest.json'}: {str(error).splitlines()[0]}") from None

    def verify(self, prefix: str = "") -> None:
        """Read every byte of the files whose names begin with `prefix`.

        Raises Damaged, naming the first file that is not what was written.
        """
        for name, expected in self.records.items():
            if not name.startswith(prefix):
                continue
            try:
                found = FileRecord.of(self.path / name)
            except OSError as error:
                raise Damaged(f"{self.path / name}: {error.strerror}") from None
            if found != expected:
                raise Damaged(f"{self.path / name}: found {found}, the manifest says {expected}")

    @cached_property
    def contents(self) -> Contents:
        """Raises UserError if a checkpoint, though undamaged, is not one that this version can read."""
        path = self.path / "checkpoint.json"
        try:
            return Contents.model_validate(upgrade(json.loads(path.read_bytes())))
        except ValidationError as error:
            found = first_problem(error)
        except ValueError as error:
            found = f"not JSON: {error}"
        raise UserError(f"{path}: was written by another version of this program: {found}")

    def changes(self, config: RunConfig, corpus: TokenDataset) -> dict[str, tuple]:
        """Fields of the configuration that differ from the checkpoint's, as {name: (saved, now)}.

        Raises UserError if a resumed run may not change them, or if the corpus or the tokenizer is another one.
        """
        there, here = self.contents.vocabulary.tokenizer_sha256, corpus.vocabulary.tokenizer_sha256
        if there != here:
            raise UserError(
                f"data.corpus: {config.data.corpus} was made with another tokenizer than this run's (sha256"
                f" {here[:12]}, the run has {there[:12]}); prepare it with the run's tokenizer, or start a fresh"
                " run in another --run-dir"
            )
        if self.contents.corpus != corpus.fingerprint:
            weights = "" if isinstance(config.data.corpus, str) else " with these weights"
            raise UserError(
                f"data.corpus: {config.data.corpus}{weights} is not the corpus that this run was trained on"
                f" (fingerprint {corpus.fingerprint[:12]}, the run has {self.contents.corpus[:12]}); restore the other"
                " one, or start a fresh run in another --run-dir"
            )
        return config.changes_since(self.contents.config)

    def files(self, prefix: str) -> list[Path]:
        return [self.path / name for name in sorted(self.records) if name.startswith(prefix)]

    def load_weights(self, cell: nn.Module, *, new: Collection[str] = ()) -> None:
        """Copy weights and persistent buffers into a cell, but for the parameters `new`, which the checkpoint lacks.

        Raises UserError if names or shapes are not the cell's.
        """
        weights = TensorFiles(self.files("weights-"))
        own: dict[str, Tensor] = {name: tensor for name, tensor in cell.named_parameters() if name not in new}
        buffers = persistent_buffers(cell)
        missing = own.keys() - weights.keys() | weights.keys() - own.keys() - buffers.keys()
        if missing:
            raise UserError(
                f"{self.path}: its parameters are not this model's: {', '.join(sorted(missing)[:5])} on one side only"
            )
        own |= {name: buffer for name, buffer in buffers.items() if name in weights.file_of}  # new in version 0.2.0
        for name, tensor in own.items():
            value = weights[name]
            if value.shape != tensor.shape:
                raise UserError(
                    f"{self.path}: {name} has shape {tuple(value.shape)}, this model's has {tuple(tensor.shape)}"
                )
            tensor.data.copy_(value)

    def cell(self, device: torch.device) -> RecurrentCell:
        """The trained cell, in evaluation mode."""
        cell = build_cell(self.contents.config, self.contents.vocabulary)
        self.load_weights(cell)
        return cell.to(device).eval()

    @property
    def run_dir(self) -> Path:
        """The folder of the run that has written it."""
        return self.path.resolve().parent.parent

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the checkpoint's run. Raises UserError if it is missing or another one."""
        if self.contents.config.data.task is not None:
            raise UserError("--run-dir: found a run on a task, which has no text to generate; expected one on a corpus")
        expected = self.contents.vocabulary.tokenizer_sha256
        path = find_tokenizer(self.run_dir, expected)
        if path is None:
            raise UserError(
                f"--run-dir: found no {' or '.join(FILES)} in {self.run_dir}, expected the run's tokenizer in the folder"
                " that holds its checkpoints/"
            )
        found = sha256_of(path)
        if found != expected:
            raise UserError(
                f"--run-dir: {path} is not the tokenizer that the model was trained with: found sha256 {found[:16]},"
                f" expected {expected[:16]}"
            )
        return open_tokenizer(path, "--run-dir")

    @cached_property  # of names: nothing stays open
    def _moments(self) -> "TensorFiles":
        return TensorFiles(self.files("moments-"))

    def moment(self, name: str, key: str) -> Tensor | None:
        """None of a parameter that was frozen."""
        found = f"{key}.{name}"
        return self._moments[found] if found in self._moments.file_of else None

    @property
    def weight_names(self) -> KeysView[str]:
        """Of the parameters and persistent buffers."""
        return TensorFiles(self.files("weights-")).keys()

    @property
    def trained(self) -> set[str]:
        """The names of the parameters that were not frozen."""
        return {name.partition(".")[2] for name in self._moments.file_of}

    def load_lanes(self, lanes: range, empty: Tensors) -> Tensors:
        """The state of the given global lanes, in the types and on the device of `empty`."""
        pieces = []
        for path in self.files("lanes-"):
            first, stop = (int(part) for part in path.stem.split("-")[1:])
            begin, end = max(first, lanes.start), min(stop, lanes.stop)
            if begin < end:
                with named_in_utf8(path) as name, safe_open(name, "pt") as file:
                    pieces.append([file.get_slice(field)[begin - first : end - first] for field in empty._fields])
        return empty._make(
            torch.cat(column).to(like) for column, like in zip(zip(*pieces, strict=True), empty, strict=True)
        )


class TensorFiles:
    """Several safetensors files as one mapping. A tensor is read from disk each time it is looked up.

    No file stays open or mapped: while one is, its folder cannot be removed on NFS.
    """

    def __init__(self, paths: Iterable[Path]):
        self.file_of: dict[str, Path] = {}
        for path in paths:
            with named_in_utf8(path) as name, safe_open(name, "pt") as file:
                self.file_of |= dict.fromkeys(file.keys(), path)

    def keys(self) -> KeysView[str]:
        return self.file_of.keys()

    def __getitem__(self, name: str) -> Tensor:
        with named_in_utf8(self.file_of[name]) as path, safe_open(path, "pt") as file:
            return file.get_tensor(name).clone()  # what it returns is a view of the mapped file


def newest(run_dir: Path, world: World) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None in a run that has none. A collective call: rank 0 verifies.

    Raises UserError if there are checkpoints and all of them are damaged: a fresh start would throw the run away.
    """
    folder = run_dir / "checkpoints"
    name = world.broadcast_first(world.on_all_or_raise(lambda: _newest_name(folder) if world.is_main else None))
    return None if name is None else Checkpoint(folder / name)


def _newest_name(folder: Path) -> str | None:
    """The name of the newest undamaged checkpoint. Damaged ones that are newer are moved aside."""
    _complete_saves(folder)
    candidates = _by_age(folder)
    for path in candidates:
        try:
            Checkpoint(path).verify()
            return path.name
        except Damaged as damage:
            aside = path.with_name(f"damaged-{path.name}")
            make_way(aside)  # the same step was damaged once before
            path.rename(aside)
            log.warning("skipping damaged checkpoint: %s (moved to %s)", damage, aside)
    if candidates or any(folder.glob("damaged-*")):
        raise UserError(
            f"{folder}: every checkpoint is damaged; restore one, or start a fresh run in another --run-dir"
        )
    return None


def _complete_saves(folder: Path) -> None:
    """Put the checkpoint in place whose save was killed while it replaced an earlier one of the same step.

    That one had been set aside, and the new one, which is whole, had not got its name yet.
    """
    for partial in folder.glob("partial-*"):
        final = partial.with_name(partial.name.replace("partial-", "step-"))
        if not final.exists() and any(folder.glob(f"{REMOVED}{final.name}-*")):
            with suppress(Damaged):
                Checkpoint(partial).verify()
                partial.rename(final)


def _by_age(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted(folder.glob("step-[0-9]*"), reverse=True)


def open_one(path: Path, which: str = NEWEST) -> Checkpoint:
    """An undamaged checkpoint of a run. Not collective.

    Args:
        path: the run's folder; or that of a checkpoint, which then is the one.
        which: "newest"; "best", by the held-out loss of the evaluations during training; the name of one of the run's
            checkpoints; or the path of one.

    Raises UserError if there is none.
    """
    if (path / "checkpoint.json").exists():
        if which != NEWEST:
            raise UserError(f"--checkpoint: found {which}, but {path} is a checkpoint itself; expected a run's folder")
        return _first_undamaged([path], path)
    folder = path / "checkpoints"
    there = _by_age(folder)
    if which == NEWEST or not there:
        return _first_undamaged(there, path)
    if which == BEST:
        return _best(folder, there)
    named = folder / which if (folder / which).is_dir() else Path(which)
    if not (named / "checkpoint.json").exists():
        raise UserError(
            f"--checkpoint: found no {which} in {folder}; expected {NEWEST}, {BEST}, or one of"
            f" {', '.join(sorted(candidate.name for candidate in there))}"
        )
    return _first_undamaged([named], named)


def _first_undamaged(candidates: Iterable[Path], where: Path, prefix: str = "") -> Checkpoint:
    damages = []
    for candidate in candidates:
        try:
            checkpoint = Checkpoint(candidate)
            checkpoint.verify(prefix)
            return checkpoint
        except Damaged as damage:
            damages.append(f"\n  {damage}")
    raise UserError(
        f"{where}: no checkpoint found, expected a run's or a checkpoint's folder"
        if not damages
        else f"{where}: damaged{''.join(damages)}"
    )


def _best(folder: Path, there: list[Path]) -> Checkpoint:
    """The checkpoint that the newest one names as the best so far."""
    best = _first_undamaged(there, folder, "checkpoint.json").contents.held_out.best
    if best is None:
        raise UserError(
            f"--checkpoint: found no evaluation in {folder} by which one would be the {BEST};"
            " training.evaluate_every_tokens sets when a run is evaluated"
        )
    path = folder / name_of(best.step)
    if not path.exists():
        raise UserError(
            f"--checkpoint: found no {path}, which is the {BEST} with a held-out loss of {best.loss:.4f}; it is kept"
            " where checkpoint.keep_best is true"
        )
    return _first_undamaged([path], path)


def best_of(run_dir: Path, held_out: HeldOut) -> dict[str, Any] | None:
    """The best evaluation of a run and its checkpoint, for the summary; said in the log."""
    best = held_out.best
    if best is None:
        return None
    name = f"checkpoints/{name_of(best.step)}"
    is_kept = (run_dir / name).is_dir()
    if is_kept:
        log.info(f"the best checkpoint is {name}, with a held-out loss of {best.loss:.4f}: --checkpoint best")
    return best.model_dump() | {"checkpoint": name if is_kept else None}


def build_cell(config: RunConfig, vocabulary: Vocabulary) -> RecurrentCell:
    """A cell with random weights, as the section `model` describes it."""
    return config.model.build(
        vocab_size=vocabulary.size, bos_id=vocabulary.bos_id, segment_length=config.data.segment_length
    )
