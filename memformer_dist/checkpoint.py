"""Crash-safe, verified, portable checkpoints: safetensors and JSON, the same files at any world size and ZeRO stage.

    RUN/checkpoints/step-00000200/
        checkpoint.json                position, vocabulary and resolved configuration
        weights-00000.safetensors      parameter name -> fp32 tensor; further files when these grow over 2 GiB
        moments-00000.safetensors      "exp_avg.NAME" and "exp_avg_sq.NAME": Adam's moments, whole tensors
        lanes-00000-00008.safetensors  the cell's state of global lanes 0 ... 7, written by the rank that had them
        manifest.json                  bytes and sha256 of every file above, written last

A checkpoint is written under another name and renamed when every byte is on the disk, so one that has its name is whole; the
manifest tells whether it still is. One that fails verification is passed over aloud for the one before. Nothing is unpickled.
DeepSpeed's own checkpoints unpickle, tie the run to its world size and are not written atomically: they are not used.
"""

import hashlib
import os
import shutil
import sys
from functools import cached_property
from pathlib import Path
from typing import Iterable, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import BaseModel, TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from memformer_dist.cells.memformer import Memformer
from memformer_dist.config import RunConfig
from memformer_dist.curriculum import Progress
from memformer_dist.data.dataset import TokenDataset
from memformer_dist.errors import UserError
from memformer_dist.progress import Interval, Position
from memformer_dist.vocabulary import Vocabulary
from memformer_dist.world import World

VERSION = 1
FILE_BYTES = 2 << 30  # of weights in a file, and twice that of moments: rank 0 never holds the whole model


class ReadoutGroup(BaseModel, extra="forbid", frozen=True):
    """What mrbp.readout_group "auto" has chosen. Kept, because the dropout masks of a readout depend on its batch."""

    segments: int
    lanes: int  # of a lane group, for which it was measured


class Contents(BaseModel, extra="forbid"):
    """checkpoint.json."""

    version: Literal[1]
    position: Position
    interval: Interval = Interval()
    curriculum: Progress | None = None  # of the window; None before there were curricula
    readout_group: ReadoutGroup | None = None  # where it is chosen by the program
    corpus: str  # fingerprint of the training corpus
    anchor: bool  # never removed
    vocabulary: Vocabulary
    config: RunConfig


class FileRecord(BaseModel, extra="forbid"):
    bytes: int
    sha256: str


MANIFEST_FILE = TypeAdapter(dict[str, FileRecord])  # manifest.json, by file name


class Damaged(Exception):
    """A checkpoint that is not what was written."""


class Checkpoint:
    """A checkpoint on the disk; `verify` before trusting what it holds. Both raise Damaged."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.manifest = MANIFEST_FILE.validate_json((path / "manifest.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise Damaged(f"{path / 'manifest.json'}: {str(error).splitlines()[0]}")

    def verify(self) -> None:
        for name, expected in self.manifest.items():
            try:
                found = _digest(self.path / name)
            except OSError as error:
                raise Damaged(f"{self.path / name}: {error.strerror}")
            if found != expected:
                raise Damaged(f"{self.path / name}: found {found}, the manifest says {expected}")

    @cached_property
    def contents(self) -> Contents:
        """Raises UserError where a whole checkpoint is not one that this program can read."""
        path = self.path / "checkpoint.json"
        try:
            return Contents.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{path}: was written by another version of this program; {field}: {first['msg']}")

    def changes(self, config: RunConfig, corpus: TokenDataset) -> dict:
        """Fields of the configuration that differ from the checkpoint's, as {name: (saved, now)}.

        Raises UserError where a run that goes on from here may not change them, or has another corpus or tokenizer.
        """
        there, here = self.contents.vocabulary.tokenizer_sha256, corpus.vocabulary.tokenizer_sha256
        if there != here:
            raise UserError(
                f"data.corpus: {config.data.corpus} was made with another tokenizer than this run's (sha256 {here[:12]}, the"
                f" run has {there[:12]}); prepare it with the run's tokenizer.model, or start a fresh run in another --run-dir"
            )
        if self.contents.corpus != corpus.fingerprint:
            weights = "" if isinstance(config.data.corpus, str) else " with these weights"
            raise UserError(
                f"data.corpus: {config.data.corpus}{weights} is not the corpus that this run was trained on (fingerprint"
                f" {corpus.fingerprint[:12]}, the run has {self.contents.corpus[:12]}); bring that one back, or start a"
                " fresh run in another --run-dir"
            )
        return config.changes_since(self.contents.config)

    def files(self, prefix: str) -> list[Path]:
        return [self.path / name for name in sorted(self.manifest) if name.startswith(prefix)]

    def load_weights(self, cell: nn.Module) -> None:
        """Copy the weights into a cell. UserError when names or shapes are not the cell's."""
        weights = TensorFiles(self.files("weights-"))
        parameters = dict(cell.named_parameters())
        if missing := parameters.keys() ^ weights.keys():
            raise UserError(
                f"{self.path}: its parameters are not this model's: {', '.join(sorted(missing)[:5])} on one side only"
            )
        for name, parameter in parameters.items():
            value = weights[name]
            if value.shape != parameter.shape:
                raise UserError(
                    f"{self.path}: {name} has shape {tuple(value.shape)}, this model's has {tuple(parameter.shape)}"
                )
            parameter.data.copy_(value)

    def cell(self, device: torch.device) -> Memformer:
        """The trained cell, in evaluation mode."""
        cell = build_cell(self.contents.config, self.contents.vocabulary)
        self.load_weights(cell)
        return cell.to(device).eval()

    @cached_property
    def _moments(self) -> "TensorFiles":
        return TensorFiles(self.files("moments-"))

    def moment(self, name: str, key: str) -> Tensor:
        return self._moments[f"{key}.{name}"]

    def load_lanes(self, lanes: range, empty: NamedTuple) -> NamedTuple:
        """The state of the given global lanes, shaped and placed as `empty` is."""
        pieces = []
        for path in self.files("lanes-"):
            first, stop = (int(part) for part in path.stem.split("-")[1:])
            begin, end = max(first, lanes.start), min(stop, lanes.stop)
            if begin < end:
                with safe_open(path, "pt") as file:
                    pieces.append([file.get_slice(field)[begin - first : end - first] for field in empty._fields])
        return empty._make(torch.cat(column).to(like) for column, like in zip(zip(*pieces), empty))


class TensorFiles:
    """Several safetensors files as one mapping; a tensor is read when asked for."""

    def __init__(self, paths: Iterable[Path]):
        self.file_of = {}
        for path in paths:
            file = safe_open(path, "pt")
            self.file_of |= dict.fromkeys(file.keys(), file)

    def keys(self):
        return self.file_of.keys()

    def __getitem__(self, name: str) -> Tensor:
        return self.file_of[name].get_tensor(name)


def save(
    run_dir: Path,
    engine,
    world: World,
    *,
    contents: Contents,
    lanes: range,
    state: NamedTuple,
) -> Path:
    """Write a checkpoint; a collective call. `state` holds this rank's `lanes`, in order."""
    folder = run_dir / "checkpoints"
    final = folder / f"step-{contents.position.step:08d}"
    partial = folder / f"partial-{contents.position.step:08d}"
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    save_file(
        {field: tensor.cpu().contiguous() for field, tensor in state._asdict().items()},
        partial / f"lanes-{lanes.start:05d}-{lanes.stop:05d}.safetensors",
    )
    _save_tensors(partial, engine, world)
    dist.barrier()
    if world.is_main:
        (partial / "checkpoint.json").write_text(contents.model_dump_json(indent=2))
        manifest = {path.name: _digest(path) for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_bytes(MANIFEST_FILE.dump_json(manifest, indent=2))
        for path in (*partial.iterdir(), partial):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)  # of a save whose end its run did not live to see
        partial.rename(final)
        _flush(folder)
        _remove_old(folder, contents.config.checkpoint.keep)
    dist.barrier()
    return final


def _save_tensors(folder: Path, engine, world: World) -> None:
    """Weights and moments in files of bounded size; every rank takes part in the gathering, rank 0 writes."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    held = count = 0

    def write() -> None:
        nonlocal held, count
        save_file(weights, folder / f"weights-{count:05d}.safetensors")
        save_file(moments, folder / f"moments-{count:05d}.safetensors")
        weights.clear()
        moments.clear()
        held, count = 0, count + 1

    for name, weight, both in engine.tensors():
        if not world.is_main:
            continue
        weights[name] = weight.detach().cpu().contiguous()
        moments |= {f"{key}.{name}": moment.cpu().contiguous() for key, moment in both.items()}
        held += weight.nbytes
        if held >= FILE_BYTES:
            write()
    if weights:
        write()


def newest(run_dir: Path, world: World, say=lambda text: print(text, file=sys.stderr, flush=True)) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None in a run that has none. A collective call: rank 0 verifies.

    Raises UserError when there are checkpoints and none of them is good: a fresh start would throw the run away.
    """
    choice = torch.tensor([-1])  # step; -1: there is none; -2: none is good
    if world.is_main:
        candidates = sorted((run_dir / "checkpoints").glob("step-[0-9]*"), reverse=True)
        choice[0] = -2 if candidates or any((run_dir / "checkpoints").glob("damaged-*")) else -1
        for path in candidates:
            try:
                Checkpoint(path).verify()
            except Damaged as damage:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)  # this step was reached, and damaged, once before
                path.rename(aside)
                say(f"checkpoint passed over, it is damaged: {damage}; moved to {aside}")
                continue
            choice[0] = int(path.name.removeprefix("step-"))
            break
    choice = choice.to(world.device)
    dist.broadcast(choice, 0)
    step = int(choice)
    if step == -2:
        raise UserError(
            f"{run_dir / 'checkpoints'}: every checkpoint is damaged; restore one, or start a fresh run elsewhere"
        )
    return None if step == -1 else Checkpoint(run_dir / "checkpoints" / f"step-{step:08d}")


def open_one(path: Path) -> Checkpoint:
    """A checkpoint given by its own folder or by its run's (then the newest good one). Not collective."""
    candidates = (
        [path] if (path / "checkpoint.json").exists() else sorted(path.glob("checkpoints/step-[0-9]*"), reverse=True)
    )
    damages = []
    for candidate in candidates:
        try:
            checkpoint = Checkpoint(candidate)
            checkpoint.verify()
            return checkpoint
        except Damaged as damage:
            damages.append(f"\n  {damage}")
    raise UserError(
        f"{path}: no checkpoint found, expected a run's or a checkpoint's folder"
        if not damages
        else f"{path}: damaged{''.join(damages)}"
    )


def open_initial(path: Path, vocabulary: Vocabulary) -> Checkpoint:
    """training.init_from, opened; UserError where it was trained with another tokenizer. Not collective."""
    initial = open_one(path)
    found, expected = initial.contents.vocabulary.tokenizer_sha256, vocabulary.tokenizer_sha256
    if found != expected:
        raise UserError(
            f"training.init_from: {initial.path} was trained with another tokenizer than the corpus has: sha256"
            f" {found[:16]}, expected {expected[:16]}"
        )
    return initial


def build_cell(config: RunConfig, vocabulary: Vocabulary) -> Memformer:
    return Memformer(
        config.model, vocab_size=vocabulary.size, bos_id=vocabulary.bos_id, segment_length=config.data.segment_length
    )


def _digest(path: Path) -> FileRecord:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return FileRecord(bytes=file.tell(), sha256=digest.hexdigest())


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _remove_old(folder: Path, keep: int) -> None:
    for path in sorted(folder.glob("step-[0-9]*"), reverse=True)[keep:]:
        try:
            anchor = Checkpoint(path).contents.anchor
        except (Damaged, OSError, UserError):  # its removal was interrupted, or it could not be resumed from
            anchor = False
        if not anchor:
            shutil.rmtree(path)
    for path in folder.glob("partial-*"):  # of a save that was interrupted
        shutil.rmtree(path)
