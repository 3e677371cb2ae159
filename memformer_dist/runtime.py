"""A run's folder and its end: who has it locked, and who asks the run to stop.

A run is asked to stop by a signal to any rank (signals.STOPPING), or by a file named `stop` in its folder. A signal is
only noted when it arrives; the training loop asks all ranks once per step, so that they stop at the same one.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from memformer_dist import signals
from memformer_dist.errors import UserError
from memformer_dist.files import try_lock
from memformer_dist.world import World

log = logging.getLogger(__name__)


class StopRequest:
    """Who asked this run to stop: a signal to this process, or the file `stop` in the run's folder.

    Rank 0 alone looks for the file. One that is older than this process was meant for an earlier run, and is removed.
    """

    def __init__(self, run_dir: Path, world: World):
        self.world = world
        self.file = run_dir / "stop" if world.is_main else None
        signals.note_stop_requests()
        with suppress(FileNotFoundError):
            if self.file is not None and self.file.stat().st_mtime < signals.listening_since():
                log.warning("%s was there before this start, which it does not stop; removed", self.file)
                self.clear()

    def _reason(self) -> str | None:
        received = signals.received()
        if received is None and self.file is not None and self.file.exists():
            return f"the file {self.file}"
        return received

    def agreed(self) -> str | None:
        """Who asked any rank to stop, or None: the same answer on all of them. A collective call."""
        return self.world.broadcast_first(self._reason())

    def clear(self) -> None:
        """Remove the file, so that the same command can resume."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


@contextmanager
def lock_run_dir(run_dir: Path, world: World) -> Iterator[None]:
    """Hold the lock of a run's folder. A collective call.

    Raises UserError if another process has it: two runs in one folder would destroy each other's checkpoints.
    """
    with (run_dir / "lock").open("w") if world.is_main else nullcontext() as file:
        free = file is None or try_lock(file)
        taken = None if free else f"--run-dir: another process is training in {run_dir}; wait for it, or stop it"
        if message := world.broadcast_first(taken):
            raise UserError(message)
        yield
