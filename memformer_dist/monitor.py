"""Rank 0's records of a run: TensorBoard and metrics.jsonl. metrics.py says what is in them.

TensorBoard gets every scalar twice: RUN/tensorboard/steps has it by step, RUN/tensorboard/tokens by trained tokens,
which is how runs of different batch sizes are compared. Names of the latter begin with `tokens/`: TensorBoard draws
equal names into one chart, where thousands of steps would be a point beside billions of tokens. metrics.jsonl has one
object per record, with "step", "tokens" and "time"; null is a value that was not finite.

A curve is a list in metrics.jsonl and a histogram in TensorBoard, one per record, whose buckets count nothing but draw:
bucket x = 1, 2, ... reaches from x - 1/2 to x + 1/2 and is as high as the value there. In memory/grad_norm_by_boundary
x is the number of segments before the window's end; the list starts with the boundary after the window's first segment.

Records that a run wrote after the checkpoint from which it resumes are dropped: it is about to write them again.

A record that cannot be written, on a full disk for example, does not end the run: the log says so once. metrics.jsonl
gets what it lacks when it can be written again; TensorBoard goes on in a new file, without the records in between.
"""

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from memformer_dist.files import read_json_lines, write_bytes
from memformer_dist.logs import why
from memformer_dist.progress import Position

WAITING_RECORDS = 10_000  # of about a kilobyte
RETRY_S = 60.0  # between two files that TensorBoard's records may begin where they cannot be written
log = logging.getLogger(__name__)

Curves = dict[str, list[float]]


class Monitor:
    """Writes the records of a run on rank 0; on other ranks every call does nothing."""

    def __init__(self, run_dir: Path, position: Position, *, is_main: bool):
        self.is_main = is_main
        if not is_main:
            return
        # A purge takes all curves of a folder back to one x, hence a folder for each axis. It is needed at step 0 as
        # well: a run killed before its first checkpoint starts from the beginning.
        folder = run_dir / "tensorboard"
        self.by_step = Curve(folder / "steps", purge_from=position.step + 1)
        self.by_tokens = Curve(folder / "tokens", purge_from=position.tokens + 1)
        self.records = RecordFile(_continue(run_dir / "metrics.jsonl", position))

    def log(self, position: Position, scalars: dict[str, float], curves: Curves | None = None) -> None:
        """Write one record.

        Args:
            curves: values, not negative, at x = n, n - 1, ... 1: the last of a list is drawn at x = 1. A curve with a
            value
                that is not finite goes to metrics.jsonl alone.
        """
        if not self.is_main:
            return
        record: dict[str, Any] = {
            "step": position.step,
            "tokens": position.tokens,
            "time": round(time.time(), 3),
        }
        record |= {name: _finite(value) for name, value in scalars.items()}
        record |= {name: [_finite(value) for value in values] for name, values in (curves or {}).items()}
        self.records.append(json.dumps(record, allow_nan=False))
        histograms = {
            name: _histogram(values[::-1]) for name, values in (curves or {}).items() if all(map(math.isfinite, values))
        }
        self.by_step.add(position.step, scalars, histograms)
        self.by_tokens.add(position.tokens, scalars, histograms, prefix="tokens/")

    def close(self) -> None:
        """Write out what is left. May be called again."""
        if self.is_main:
            for part in (self.by_step, self.by_tokens, self.records):
                part.close()


class Loss:
    """What could not be recorded, said in the log once until it is recorded again."""

    def __init__(self, path: Path, meanwhile: str):
        self.path, self.meanwhile, self.failing = path, meanwhile, False

    def report(self, error: OSError | UnicodeError) -> None:
        if not self.failing:
            self.failing = True
            log.warning("%s cannot be written (%s); training goes on, %s", self.path, why(error), self.meanwhile)

    def over(self) -> None:
        if self.failing:
            self.failing = False
            log.warning("%s can be written again", self.path)


class RecordFile:
    """Appends lines to a file; those that do not fit wait in memory, the oldest of too many are lost."""

    def __init__(self, path: Path):
        self._path = path
        self._waiting: deque[str] = deque(maxlen=WAITING_RECORDS)
        self._loss = Loss(path, f"and its records wait in memory, {WAITING_RECORDS:,} at most")

    def append(self, line: str) -> None:
        self._waiting.append(line)
        self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        content = "".join(f"{line}\n" for line in self._waiting).encode()
        try:
            # Opened again for every record, so that it is made again where it was removed, or its disk has come back.
            with self._path.open("ab", buffering=0) as file:
                length = file.tell()
                try:
                    while content:
                        content = content[file.write(content) :]
                except OSError:
                    with suppress(OSError):
                        file.truncate(length)  # no half record in front of the next one
                    raise
        except OSError as error:
            self._loss.report(error)
        else:
            self._waiting.clear()
            self._loss.over()

    def close(self) -> None:
        """Try once more."""
        self._write()


class Curve:
    """A folder of TensorBoard's, which reads all files in it as one."""

    def __init__(self, folder: Path, purge_from: int):
        self._folder = folder
        self._loss = Loss(folder, "and what is not in TensorBoard is in metrics.jsonl")
        self._writer: SummaryWriter | None = None
        self._purge_from: int | None = purge_from
        self._retry_at = -math.inf
        self._try(lambda writer: None)

    def add(
        self, x: int, scalars: dict[str, float], histograms: dict[str, dict[str, Any]], *, prefix: str = ""
    ) -> None:
        """The values at x."""

        def write(writer: SummaryWriter) -> None:
            for name, value in scalars.items():
                writer.add_scalar(prefix + name, value, x)
            for name, histogram in histograms.items():
                writer.add_histogram_raw(prefix + name, **histogram, global_step=x)
            if self._loss.failing:
                writer.flush()  # whether it works now is known only then

        self._try(write)

    def _try(self, write: Callable[[SummaryWriter], None]) -> None:
        if self._writer is None and time.monotonic() < self._retry_at:
            return
        try:
            if self._writer is None:
                # A new file takes nothing back once the first one has said from where on.
                _silence_writer_threads()
                self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_from)
                if self._purge_from is not None:
                    self._writer.flush()
                    self._purge_from = None
            write(self._writer)
        except (OSError, UnicodeError) as error:  # TensorBoard writes to no folder whose name is not UTF-8
            self._loss.report(error)
            self._drop()
        else:
            self._loss.over()

    def _drop(self) -> None:
        """Its thread has ended with the first error; the next record begins another file."""
        writer, self._writer = self._writer, None
        self._retry_at = time.monotonic() + RETRY_S
        if writer is not None:
            with suppress(OSError):
                writer.close()

    def close(self) -> None:
        """Write out what is left."""
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._loss.report(error)
            self._writer = None


def _silence_writer_threads() -> None:
    """Let a thread that writes for TensorBoard end without a traceback: the next record meets its error, and reports it."""
    before = threading.excepthook
    if getattr(before, "is_silent", False):
        return

    def hook(arguments: Any) -> None:
        if not (isinstance(arguments.exc_value, OSError) and "tensorboard" in type(arguments.thread).__module__):
            before(arguments)

    hook.is_silent = True  # type: ignore[attr-defined]  # a mark, so that it is set once
    threading.excepthook = hook


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _histogram(values: list[float]) -> dict[str, Any]:
    """A histogram as TensorBoard stores it, whose bucket around x = 1, 2, ... holds `values` in turn.

    TensorBoard drops empty buckets at both ends and takes min and max for the outer edges of what remains. Its
    percentiles divide by num, hence the total.
    """
    drawn = [x for x, value in enumerate(values, start=1) if value] or [1]
    return {
        "min": drawn[0] - 0.5,
        "max": drawn[-1] + 0.5,
        "num": sum(values),
        "sum": sum(x * value for x, value in enumerate(values, start=1)),
        "sum_squares": sum(x * x * value for x, value in enumerate(values, start=1)),
        "bucket_limits": [x + 0.5 for x in range(1, len(values) + 1)],
        "bucket_counts": values,
    }


def _continue(path: Path, position: Position) -> Path:
    """Drop the records after `position`, which a resumed run will write again."""

    def is_kept(record: dict[str, Any]) -> bool:
        # An evaluation at the checkpoint's step may have come after the checkpoint.
        reached = position.evaluated if "eval/loss" in record else position.tokens
        return record.get("step", math.inf) <= position.step and record.get("tokens", math.inf) <= reached

    if path.exists():
        write_bytes(path, b"".join(line for line, record in read_json_lines(path) if is_kept(record)))
    return path
