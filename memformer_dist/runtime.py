"""A run's folder and its end: who has it locked, and who asks the run to stop.

A run is asked to stop by a signal to any rank (signals.STOPPING), by a file named `stop` in its folder, or by the end of
the SLURM job that it is part of. A signal is only noted when it arrives; the training loop asks all ranks once per step, so
that they stop at the same one.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from memformer_dist import signals
from memformer_dist.errors import UserError
from memformer_dist.files import try_lock
from memformer_dist.launcher import end_of_job
from memformer_dist.world import World

log = logging.getLogger(__name__)


class StopRequest:
    """Who asked this run to stop: a signal to this process, the file `stop` in the run's folder, or the end of its job.

    Rank 0 alone looks for the file, and at the clock. A file that is older than this process was meant for an earlier run,
    and is removed.

    Args:
        before_job_ends_s: how long before the end of its SLURM job the run is to stop.
    """

    def __init__(self, run_dir: Path, world: World, before_job_ends_s: float = 0.0):
        self.world = world
        self.file = run_dir / "stop" if world.is_main else None
        self.before_job_ends_s = before_job_ends_s
        self.job_ends = end_of_job() if world.is_main else None
        signals.note_stop_requests()
        with suppress(FileNotFoundError):
            if self.file is not None and self.file.stat().st_mtime < signals.listening_since():
                log.warning("%s was there before this start, which it does not stop; removed", self.file)
                self.clear()

    def _reason(self) -> str | None:
        if (received := signals.received()) is not None:
            return received
        if self.file is not None and self.file.exists():
            return f"the file {self.file}"
        if self.job_ends is not None and self._left() < self.before_job_ends_s:
            self.job_ends = end_of_job()  # the limit may have been raised meanwhile
            if self.job_ends is not None and self._left() < self.before_job_ends_s:
                return f"the end of its job in {max(0.0, self._left()):.0f} s"
        return None

    def _left(self) -> float:
        """Seconds until the job ends."""
        assert self.job_ends is not None
        return self.job_ends - time.time()

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
