"""Crash-safe, verified, portable checkpoints: safetensors and JSON, the same files at any world size and ZeRO stage.

    RUN/checkpoints/step-00000200/
        checkpoint.json                position, vocabulary and resolved configuration
        weights-00000.safetensors      parameter name -> fp32 tensor; further files when these grow over 2 GiB
        moments-00000.safetensors      "exp_avg.NAME" and "exp_avg_sq.NAME": Adam's moments, whole tensors
        lanes-00000-00008.safetensors  the cell's state of global lanes 0 ... 7, written by the rank that had them
        manifest.json                  bytes and sha256 of every file above, written last

A checkpoint is written under another name and renamed when every byte is on the disk, so a folder step-... is complete;
its manifest shows whether it is still what was written. A damaged checkpoint is skipped with a warning, and the one
before it is used. Nothing is unpickled. DeepSpeed's own checkpoints are not used: they unpickle, tie the run to its
world size and are not written atomically.
"""

import json
import logging
from collections.abc import Iterable, Iterator, KeysView
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from pydantic import BaseModel, TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.config import RunConfig
from memformer_dist.curriculum import Progress
from memformer_dist.data.dataset import TokenDataset
from memformer_dist.errors import UserError, first_problem
from memformer_dist.files import REMOVED, flush, make_way, named_in_utf8, remove_folder, sha256_of, usual_mode
from memformer_dist.mrbp.executor import reseed
from memformer_dist.places import configured
from memformer_dist.progress import Interval, Position
from memformer_dist.segment import Tensors
from memformer_dist.tokenizer import FILES, Tokenizer, find_tokenizer, open_tokenizer
from memformer_dist.upgrade import upgrade
from memformer_dist.vocabulary import Vocabulary
from memformer_dist.world import World

FILE_BYTES = 2 << 30  # of weights in a file, and twice that of moments: rank 0 never holds the whole model
log = logging.getLogger(__name__)


class HasTensors(Protocol):
    """What `save` needs of an engine."""

    def tensors(self) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """(name, fp32 weight, Adam's moments) of every parameter, whole, one at a time. A collective call."""


class ReadoutGroup(BaseModel, extra="forbid", frozen=True):
    """The choice of mrbp.readout_group "auto". Kept, because the dropout masks of a readout depend on its batch."""

    segments: int
    lanes: int  # of the lane group that was measured


class Contents(BaseModel, extra="forbid"):
    """What checkpoint.json holds."""

    version: Literal[2] = 2
    position: Position
    interval: Interval = Interval()
    curriculum: Progress | None = None  # of the window; None in checkpoints older than curricula
    readout_group: ReadoutGroup | None = None  # None unless mrbp.readout_group is "auto"
    corpus: str  # fingerprint of the training corpus
    anchor: bool  # never removed
    vocabulary: Vocabulary
    config: RunConfig


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

    def verify(self) -> None:
        """Read every byte. Raises Damaged, naming the first file that is not what was written."""
        for name, expected in self.records.items():
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

    def load_weights(self, cell: nn.Module) -> None:
        """Copy the weights into a cell. Raises UserError if names or shapes are not the cell's."""
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


def save(run_dir: Path, engine: HasTensors, world: World, *, contents: Contents, lanes: range, state: Tensors) -> Path:
    """Write a checkpoint and remove old ones; returns its folder. A collective call.

    Args:
        lanes, state: this rank's global lanes, and their states in that order.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step-{contents.position.step:08d}"
    partial = folder / f"partial-{contents.position.step:08d}"
    if world.is_main:
        make_way(partial)
        partial.mkdir(parents=True)
    dist.barrier()
    _write_tensors(
        {field: tensor.cpu().contiguous() for field, tensor in state._asdict().items()},
        partial / f"lanes-{lanes.start:05d}-{lanes.stop:05d}.safetensors",
    )
    _save_tensors(partial, engine, world)
    dist.barrier()
    if world.is_main:
        # Not by files.write_text: the whole folder is flushed and renamed at once.
        (partial / "checkpoint.json").write_bytes(contents.model_dump_json(indent=2).encode())
        records = {path.name: FileRecord.of(path) for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_bytes(FILE_RECORDS.dump_json(records, indent=2))
        for path in (*partial.iterdir(), partial):
            flush(path)
        make_way(final)  # of a run that was killed after the rename, and has come here again
        partial.rename(final)
        flush(folder)
        _remove_old(folder, contents.config.checkpoint.keep)
    dist.barrier()
    return final


def _save_tensors(folder: Path, engine: HasTensors, world: World) -> None:
    """Write weights and moments in files of bounded size. Every rank takes part in gathering them, rank 0 writes."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    held = count = 0

    def write() -> None:
        nonlocal held, count
        _write_tensors(weights, folder / f"weights-{count:05d}.safetensors")
        _write_tensors(moments, folder / f"moments-{count:05d}.safetensors")
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


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    with usual_mode(path), named_in_utf8(path) as name:
        save_file(tensors, name)


def newest(run_dir: Path, world: World) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None in a run that has none. A collective call: rank 0 verifies.

    Raises UserError if there are checkpoints and all of them are damaged: a fresh start would throw the run away.
    """
    folder = run_dir / "checkpoints"
    name = world.broadcast_first(world.on_all_or_raise(lambda: _newest_name(folder) if world.is_main else None))
    return None if name is None else Checkpoint(folder / name)


def _newest_name(folder: Path) -> str | None:
    """The name of the newest undamaged checkpoint. Damaged ones that are newer are moved aside."""
    candidates = sorted(folder.glob("step-[0-9]*"), reverse=True)
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


def open_one(path: Path) -> Checkpoint:
    """A checkpoint given by its own folder, or by its run's, then the newest undamaged one. Not collective.

    Raises UserError if there is none.
    """
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
    """The checkpoint of training.init_from. Raises UserError if its tokenizer is another one. Not collective."""
    initial = open_one(path)
    found, expected = initial.contents.vocabulary.tokenizer_sha256, vocabulary.tokenizer_sha256
    if found != expected:
        raise UserError(
            f"training.init_from: {initial.path} was trained with another tokenizer than the corpus's: found sha256"
            f" {found[:16]}, expected {expected[:16]}"
        )
    return initial


def initial_cell(config: RunConfig, vocabulary: Vocabulary, resumed: Checkpoint | None) -> RecurrentCell:
    """The cell with which a run starts: with the weights of a checkpoint or of training.init_from, or with random ones.

    Not collective; the same weights on every rank.
    """
    reseed(torch.device("cpu"), config.training.seed)  # weights are drawn on the CPU
    cell = build_cell(config, vocabulary)
    if resumed is not None:
        resumed.load_weights(cell)
    elif config.training.init_from:
        open_initial(Path(configured(config.training.init_from)), vocabulary).load_weights(cell)
    return cell


def build_cell(config: RunConfig, vocabulary: Vocabulary) -> RecurrentCell:
    """A cell with random weights, as the section `model` describes it."""
    return config.model.build(
        vocab_size=vocabulary.size, bos_id=vocabulary.bos_id, segment_length=config.data.segment_length
    )


def _is_kept(path: Path) -> bool:
    """Whether an old checkpoint is an anchor, or may be one: a file system may not answer at the moment."""
    try:
        for name in ("manifest.json", "checkpoint.json"):
            (path / name).read_bytes()
        return Checkpoint(path).contents.anchor
    except FileNotFoundError:  # a removal was interrupted
        return False
    except OSError as error:
        log.warning("%s: is kept for the time being, since it cannot be read: %s", path, error.strerror)
        return True
    except (Damaged, UserError):  # nothing could resume from it
        return False


def _remove_old(folder: Path, keep: int) -> None:
    """Remove what is no longer needed; what cannot be removed now is tried again at the next save."""
    for path in sorted(folder.glob("step-[0-9]*"), reverse=True)[keep:]:
        if not _is_kept(path):
            remove_folder(path)
    for path in (*folder.glob("partial-*"), *folder.glob(f"{REMOVED}*")):  # of saves that were interrupted
        remove_folder(path)
