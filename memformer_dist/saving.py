"""Write checkpoints so that each is complete or absent, and remove those that are no longer needed.

    saving.save(run_dir, engine, world, contents=contents, lanes=lanes, state=state)      # on all ranks

Kept are the newest `checkpoint.keep`; beside them anchors and, with `checkpoint.keep_best`, the best checkpoint: the one
whose held-out loss was the lowest of the evaluations so far. checkpoint.py says what lies in a checkpoint's folder.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from memformer_dist.checkpoint import FILE_RECORDS, Checkpoint, Contents, Damaged, FileRecord, name_of
from memformer_dist.errors import UserError
from memformer_dist.files import REMOVED, flush, make_way, named_in_utf8, remove_folder, set_aside, usual_mode
from memformer_dist.segment import Tensors
from memformer_dist.training_settings import CheckpointConfig
from memformer_dist.world import World

FILE_BYTES = 2 << 30  # of weights in a file, and twice that of moments: rank 0 never holds the whole model
log = logging.getLogger(__name__)


class HasTensors(Protocol):
    """What `save` needs of an engine."""

    def tensors(self) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """(name, fp32 weight, Adam's moments) of every parameter, whole, one at a time. A collective call."""


def save(run_dir: Path, engine: HasTensors, world: World, *, contents: Contents, lanes: range, state: Tensors) -> Path:
    """Write a checkpoint and remove old ones; returns its folder. A collective call.

    Args:
        lanes, state: this rank's global lanes, and their states in that order.

    Raises UserError, on all ranks, if one cannot write: the checkpoints before stay.
    """
    folder = run_dir / "checkpoints"
    final = folder / name_of(contents.position.step)
    partial = folder / f"partial-{contents.position.step:08d}"

    def begin() -> None:
        make_way(partial)
        partial.mkdir(parents=True)

    def finish() -> None:
        # Not by files.write_text: the whole folder is flushed and renamed at once.
        (partial / "checkpoint.json").write_bytes(contents.model_dump_json(indent=2).encode())
        records = {path.name: FileRecord.of(path) for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_bytes(FILE_RECORDS.dump_json(records, indent=2))
        for path in (*partial.iterdir(), partial):
            flush(path)
        if final.exists():  # of the same step, before its evaluation. checkpoint.py mends what is killed just here
            set_aside(final)
        partial.rename(final)
        flush(folder)
        _remove_old(folder, contents.config.checkpoint)

    own_lanes = {field: tensor.cpu().contiguous() for field, tensor in state._asdict().items()}
    own_file = partial / f"lanes-{lanes.start:05d}-{lanes.stop:05d}.safetensors"
    _on_all(world, partial, begin if world.is_main else None)
    _on_all(world, partial, lambda: _write_tensors(own_lanes, own_file))
    failure = _save_tensors(partial, engine, world)

    def report() -> None:
        if failure is not None:
            raise failure

    _on_all(world, partial, report)
    _on_all(world, partial, finish if world.is_main else None)
    return final


def _on_all(world: World, partial: Path, function: Callable[[], None] | None) -> None:
    """Run a part of a save. If it fails on one rank, all of them raise UserError, and the disk has its room again."""

    def run() -> None:
        try:
            if function is not None:
                function()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{partial}: the checkpoint cannot be saved: {_why(error)}") from None

    try:
        world.on_all_or_raise(run)
    except UserError:
        if world.is_main:
            with suppress(OSError):
                remove_folder(partial)
        raise


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).rpartition("I/O error: ")[2].partition(" (os error ")[0]  # of safetensors


def _save_tensors(folder: Path, engine: HasTensors, world: World) -> Exception | None:
    """Write weights and moments in files of bounded size. Every rank takes part in gathering them, rank 0 writes.

    Returns why it cannot: the others must not wait for it meanwhile.
    """
    failure: Exception | None = None
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    held = count = 0

    def write() -> None:
        nonlocal held, count, failure
        try:
            _write_tensors(weights, folder / f"weights-{count:05d}.safetensors")
            _write_tensors(moments, folder / f"moments-{count:05d}.safetensors")
        except (OSError, SafetensorError) as error:
            failure = error
        weights.clear()
        moments.clear()
        held, count = 0, count + 1

    for name, weight, both in engine.tensors():
        if not world.is_main or failure is not None:
            continue
        weights[name] = weight.detach().cpu().contiguous()
        moments |= {f"{key}.{name}": moment.cpu().contiguous() for key, moment in both.items()}
        held += weight.nbytes
        if held >= FILE_BYTES:
            write()
    if weights:
        write()
    return failure


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    with usual_mode(path), named_in_utf8(path) as name:
        save_file(tensors, name)


# ---- which are kept --------------------------------------------------------------------------------------------------


def _remove_old(folder: Path, config: CheckpointConfig) -> None:
    """Remove what is no longer needed; what cannot be removed now is tried again at the next save."""
    checkpoints = sorted(folder.glob("step-[0-9]*"), reverse=True)
    newest, older = checkpoints[: config.keep], checkpoints[config.keep :]
    # The best one is that which the newest names; should this turn out damaged, that which the one before names.
    best = {_best_of(path) for path in newest} if older and config.keep_best else set()
    for path in older:
        if path.name not in best and UNKNOWN not in best and not _is_anchor(path):
            remove_folder(path)
    for path in (*folder.glob("partial-*"), *folder.glob(f"{REMOVED}*")):  # of saves that were interrupted
        remove_folder(path)


UNKNOWN = "a file system does not answer at the moment"


def _best_of(path: Path) -> str | None:
    """The name of the best checkpoint, as a checkpoint has it. UNKNOWN where it cannot be read at the moment."""
    try:
        contents = _contents(path)
    except OSError as error:
        log.warning("%s cannot be read (%s); no checkpoint is removed for the time being", path, error.strerror)
        return UNKNOWN
    return None if contents is None else contents.best_name


def _is_anchor(path: Path) -> bool:
    """Whether an old checkpoint is an anchor, or may be one: it cannot be read at the moment."""
    try:
        contents = _contents(path)
    except OSError as error:
        log.warning("%s: is kept for the time being, since it cannot be read: %s", path, error.strerror)
        return True
    return contents is not None and contents.anchor


def _contents(path: Path) -> Contents | None:
    """What a checkpoint holds, None where nothing can resume from it. Raises OSError where a file cannot be read."""
    try:
        for name in ("manifest.json", "checkpoint.json"):
            (path / name).read_bytes()
        return Checkpoint(path).contents
    except (FileNotFoundError, Damaged, UserError):  # a file is missing where a removal was interrupted
        return None
