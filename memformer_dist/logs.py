"""What a long-running program says: log lines with time and rank, and how far it has come.

    logs.start(rank, run_dir / "log.txt")           # once per process; every module then logs as usual:
    log = logging.getLogger(__name__)
    log.info("resumed at step %d", step)            # 14:03:07 rank 0  resumed at step 1200

Log lines go to standard error and, with the date, to the file, where those of all ranks and all starts follow one
another. Rank 0 reports everything, the other ranks only warnings and errors. In a program that does not call `start`,
the standard library prints warnings and errors to standard error.

Messages never end a program. Where one cannot be written, because its reader has gone or the disk is full, the others
say so once; `survive_lost_output` does the same for all that any library prints.

    progress = ProgressReport("train", total=1_000_000, unit="tokens")
    progress.update(250_000, "step 120, loss 3.2104")
    progress.close()

On a terminal this is a bar, and log lines appear above it. Elsewhere it is a log line about every 30 seconds and at the
end.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from memformer_dist.errors import UNWRITABLE, Output

PACKAGE = "memformer_dist"
FILE = "log.txt"  # in a run's folder
EVERY_S = 30.0  # between two lines of progress
FOREVER_S = 100 * 365 * 86400.0  # what takes longer is not meant to end; timedelta holds some more

Item = TypeVar("Item")
log = logging.getLogger(__name__)
_handlers: list[logging.Handler] = []  # that `start` has installed


class ConsoleHandler(logging.Handler):
    """Writes to standard error, above a progress bar where one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except OSError:  # nobody reads it any more; survive_lost_output says so where that matters
            pass
        except Exception:
            self.handleError(record)


class LogFile(logging.FileHandler):
    """Appends to a file. Where that fails, standard error says so once, until it works again."""

    def __init__(self, path: Path):
        super().__init__(path, delay=True, encoding="utf-8", errors=UNWRITABLE)
        self._failing = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.stream is None:
                Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
                self.stream = self._open()
            self.stream.write(self.format(record) + self.terminator)
            self.stream.flush()
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._failing = True
                log.warning("%s cannot be written (%s); messages go to standard error", self.baseFilename, why(error))
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def survive_lost_output() -> None:
    """From here on nothing that is printed in this process can end it. The log says once what is lost."""

    def on_loss(name: str) -> Callable[[OSError], None]:
        return lambda error: log.warning("%s cannot be written any more (%s); training goes on", name, why(error))

    sys.stdout = Output.around(sys.stdout, on_loss("standard output"))
    sys.stderr = Output.around(sys.stderr, on_loss("standard error"))


def why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def start(rank: int, file: Path | None = None) -> None:
    """Set up logging for this process. A second call replaces what the first has set up.

    Args:
        file: log lines are appended to it; its folder is created.
    """
    stop()
    console: logging.Handler = ConsoleHandler()
    handlers = [(console, "%H:%M:%S")]
    if file is not None:
        handlers.append((LogFile(file), "%Y-%m-%d %H:%M:%S"))
    for handler, time_format in handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank}  %(message)s", time_format))
        logging.getLogger().addHandler(handler)
        _handlers.append(handler)
    logging.getLogger(PACKAGE).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it has a handler of its own


def stop() -> None:
    """Undo `start`: close the file and leave logging to the standard library's defaults."""
    while _handlers:
        handler = _handlers.pop()
        logging.getLogger().removeHandler(handler)
        handler.close()
    logging.getLogger(PACKAGE).setLevel(logging.NOTSET)


class ProgressReport:
    """How far a task has come.

    Args:
        total, done: of `unit`, at the end and now.
        enabled: report nothing if false; meant for ranks other than 0.
        terminal: whether standard error can show a bar; found out by default.
        every_s: seconds between two lines where it cannot.
        delay_s: seconds in which nothing is reported; a task that ends within them is not reported at all.
        clock: seconds that have passed, since any moment.
    """

    def __init__(
        self,
        name: str,
        *,
        total: int,
        unit: str,
        done: int = 0,
        enabled: bool = True,
        terminal: bool | None = None,
        every_s: float = EVERY_S,
        delay_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.enabled, self.every_s, self.delay_s, self.clock = enabled, every_s, delay_s, clock
        self.status = ""
        self._first, self._began = done, clock()
        self._reported, self._reported_at = done, -float("inf")  # so that the first update is reported
        self._bar: tqdm | None = None
        if enabled and (sys.stderr.isatty() if terminal is None else terminal):
            self._bar = tqdm(
                desc=name,
                total=total,
                initial=done,
                unit=f" {unit}",
                unit_scale=total >= 100_000,
                smoothing=0.1,
                delay=delay_s,
                leave=None,  # unless it is a part of another task that is shown
            )

    def update(self, done: int, status: str = "") -> None:
        """`done` so far, and what else there is to say, for example the loss."""
        self.done, self.status = done, status
        if self._bar is not None:
            self._bar.set_postfix_str(status, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._is_late() and self.clock() - self._reported_at >= self.every_s:
            self._report()

    def close(self) -> None:
        """Report where the task has ended. May be called again."""
        if self._bar is not None:
            self._bar.close()
        elif self._is_late() and self._reported != self.done:
            self._report()

    def _is_late(self) -> bool:
        return self.clock() - self._began >= self.delay_s

    def _report(self) -> None:
        self._reported, self._reported_at = self.done, self.clock()
        if not self.enabled:
            return
        parts = [f"{self.done:,} of {self.total:,} {self.unit} ({min(1, self.done / self.total):.0%})"]
        if self.status:
            parts.append(self.status)
        if self._first < self.done < self.total:
            seconds = (self.total - self.done) * (self.clock() - self._began) / (self.done - self._first)
            if seconds < FOREVER_S:
                parts.append(f"{timedelta(seconds=round(seconds))} left")
        log.info("%s: %s", self.name, ", ".join(parts))


def tracked(
    items: Sequence[Item], name: str, unit: str, *, enabled: bool = True, delay_s: float = 0.0
) -> Iterator[Item]:
    """The items, with a ProgressReport of how many have been worked through."""
    progress = ProgressReport(name, total=len(items), unit=unit, enabled=enabled, delay_s=delay_s)
    try:
        for done, item in enumerate(items, start=1):
            yield item
            progress.update(done)
    finally:
        progress.close()
