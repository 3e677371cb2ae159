"""ScheduleStore: a lane schedule's epochs on disk, so that a resumed run need not deal those before it.

    <folder>/<key>-000003.safetensors    an epoch, as it was dealt
    <folder>/<key>-starts.safetensors    which lanes were free, and when, at the start of each epoch

The key is a hash of all that the schedule depends on. Several processes may share a folder. Each file holds a crc32;
what is missing or damaged is dealt again, so nothing but time is lost.
"""

import os
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

ABANDONED_S = 3600.0  # a file that has not been finished for so long never will be


class ScheduleStore:
    def __init__(self, folder: Path, key: str):
        self._folder, self.key = folder, key

    def load(self, name: str, columns: Sequence[str]) -> dict[str, np.ndarray] | None:
        """The arrays of a file, by column; None where it is missing or damaged."""
        try:
            with safe_open(self._file(name), "numpy") as file:
                found = {column: file.get_tensor(column) for column in columns}
                whole = file.metadata()["crc32"] == _crc32(found)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return found if whole else None

    def save(self, name: str, columns: Mapping[str, np.ndarray]) -> None:
        """Write a file. Does nothing where the folder cannot be written to."""
        file = self._file(name)
        # Not files.written: processes that write the same file must not share the name of the unfinished one, and the
        # crc32 makes it needless to wait until the file is on the disk.
        partial = file.with_name(f"{file.name}.{os.uname().nodename}-{os.getpid()}")
        try:
            file.parent.mkdir(exist_ok=True)
            partial.write_bytes(save(dict(columns), metadata={"crc32": _crc32(columns)}))  # save_file sets mode 0600
            partial.rename(file)
        except (OSError, SafetensorError):
            with suppress(OSError):
                partial.unlink()

    def remove_epochs_before(self, epoch: int) -> None:
        """Remove the files of earlier epochs, and what killed processes left unfinished."""
        with suppress(OSError):
            for file in self._folder.glob(f"{self.key}-[0-9]*.safetensors"):
                if int(file.stem.rpartition("-")[2]) < epoch:
                    file.unlink(missing_ok=True)
            for partial in self._folder.glob(f"{self.key}-*.safetensors.*"):
                if partial.stat().st_mtime < time.time() - ABANDONED_S:
                    partial.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._folder / f"{self.key}-{name}.safetensors"


def _crc32(columns: Mapping[str, np.ndarray]) -> str:
    value = 0
    for column in columns.values():
        value = zlib.crc32(np.ascontiguousarray(column).data, value)
    return f"{value:08x}"
