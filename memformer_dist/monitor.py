"""Rank 0's records of a run: metrics.jsonl and TensorBoard. metrics.py says what is in them.

metrics.jsonl has one object per record, with "step", "tokens" and "time"; null is a value that was not finite, a list a
curve. RUN/tensorboard has the same for TensorBoard (tensorboard_events.py). In memory/grad_norm_by_boundary, the only
curve, x is the number of segments before the window's end; the list starts with the boundary after the window's first
segment.

Records that a run wrote after the checkpoint from which it resumes are dropped: it is about to write them again. Where
there is nothing for TensorBoard in the folder, or what version 0.1 wrote, it is made anew from metrics.jsonl.

A record that cannot be written, on a full disk for example, does not end the run: the log says so once. What is missing
is written when it can be.
"""

import json
import logging
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

from memformer_dist.files import read_json_lines, remove_folder, write_bytes
from memformer_dist.logs import why
from memformer_dist.progress import Position
from memformer_dist.tensorboard_events import Encoder, Values, drop_later, event_files, new_file

WAITING_RECORDS = 10_000  # of a few kilobytes
OF_VERSION_0_1 = ("steps", "tokens")  # folders, each with one of the two axes
FACTS = ("step", "tokens", "time")  # of every record
log = logging.getLogger(__name__)

Curves = dict[str, list[float]]


class Monitor:
    """Writes the records of a run on rank 0; on other ranks every call does nothing.

    Args:
        configuration: JSON, shown in TensorBoard.
    """

    def __init__(self, run_dir: Path, position: Position, *, is_main: bool, configuration: str = ""):
        self.is_main = is_main
        if not is_main:
            return
        kept = _drop_later(run_dir / "metrics.jsonl", position)
        folder, now = run_dir / "tensorboard", time.time()
        leftover = [path for path in (folder / name for name in OF_VERSION_0_1) if path.exists() and kept]
        try:
            for path in event_files(folder) if leftover else ():  # made of the leftover by a start that was killed
                path.unlink()
            drop_later(folder, position)
        except OSError as error:
            log.warning("%s cannot be written (%s); it may show points that were recorded twice", folder, why(error))
        is_new = not event_files(folder)
        self.encoder = Encoder()
        self.records = RecordFile(run_dir / "metrics.jsonl")
        self.events = RecordFile(new_file(folder, now), self.encoder.head(position, now, configuration))
        for record in kept if is_new else ():
            self._add_events(record)
        for path in leftover if not self.events.is_failing else ():
            remove_folder(path)

    def log(self, position: Position, scalars: dict[str, float], curves: Curves | None = None) -> None:
        """Write one record.

        Args:
            curves: values, not negative, at x = n, n - 1, ... 1: the last of a list is drawn at x = 1. A curve with a
                value that is not finite goes to metrics.jsonl alone.
        """
        if not self.is_main:
            return
        now = round(time.time(), 3)
        record: dict[str, Any] = {"step": position.step, "tokens": position.tokens, "time": now}
        record |= {name: _finite(value) for name, value in scalars.items()}
        record |= {name: [_finite(value) for value in values] for name, values in (curves or {}).items()}
        self.records.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.events.append(self.encoder.record(position, now, {**scalars, **(curves or {})}))

    def _add_events(self, record: dict[str, Any]) -> None:
        """Those of a record of metrics.jsonl."""
        values: Values = {name: value for name, value in record.items() if name not in FACTS}
        position = Position(step=record["step"], tokens=record["tokens"])
        self.events.append(self.encoder.record(position, record.get("time", 0.0), values))

    def close(self) -> None:
        """Write out what is left. May be called again."""
        if self.is_main:
            self.records.close()
            self.events.close()


class RecordFile:
    """Appends records to a file; those that do not fit wait in memory, the oldest of too many are lost.

    Args:
        head: what the file begins with; written at once.
    """

    def __init__(self, path: Path, head: bytes = b""):
        self.is_failing = False
        self._path, self._head = path, head
        self._waiting: deque[bytes] = deque(maxlen=WAITING_RECORDS)
        self._torn_from: int | None = None  # where half a record begins that could not be taken back
        if head:
            self.append(b"")

    def append(self, record: bytes) -> None:
        self._waiting.append(record)
        self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Opened again for every record, so that it is made again where it was removed, or its disk has come back.
            with self._path.open("ab", buffering=0) as file:
                if self._torn_from is not None:
                    file.truncate(min(file.tell(), self._torn_from))
                    self._torn_from = None
                end = file.seek(0, 2)
                content = b"".join([b"" if end else self._head, *self._waiting])
                try:
                    while content:
                        content = content[file.write(content) :]
                except OSError:
                    self._torn_from = end
                    file.truncate(end)  # no half record in front of the next one
                    self._torn_from = None
                    raise
        except OSError as error:
            if not self.is_failing:
                self.is_failing = True
                log.warning(
                    "%s cannot be written (%s); training goes on, and its records wait in memory, %s at most",
                    self._path,
                    why(error),
                    f"{WAITING_RECORDS:,}",
                )
        else:
            self._waiting.clear()
            if self.is_failing:
                self.is_failing = False
                log.warning("%s can be written again", self._path)

    def close(self) -> None:
        """Try once more."""
        self._write()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _drop_later(path: Path, position: Position) -> list[dict[str, Any]]:
    """Drop the records after `position`, which a resumed run will write again; returns the others."""

    def is_kept(record: dict[str, Any]) -> bool:
        # An evaluation at the checkpoint's step may have come after the checkpoint.
        reached = position.evaluated if "eval/loss" in record else position.tokens
        return record.get("step", math.inf) <= position.step and record.get("tokens", math.inf) <= reached

    if not path.exists():
        return []
    kept = [(line, record) for line, record in read_json_lines(path) if is_kept(record)]
    write_bytes(path, b"".join(line for line, _ in kept))
    return [record for _, record in kept]
