"""A run's directory and its end: who has it locked, and who asks the run to stop.

A run is asked to stop by SIGTERM, SIGINT or SIGUSR1 to any rank, or by a file named `stop` in its directory. The request is
only noted here; the training loop shares it among the ranks once per step, so that all of them stop at the same one.
"""

import signal
from pathlib import Path
from typing import IO

from memformer_dist.errors import UserError
from memformer_dist.files import try_lock
from memformer_dist.world import World


class StopRequest:
    """Whether somebody asked this run to stop: by a signal to this process, or by the file `stop` in the run's directory.

    Rank 0 alone looks for the file. `clear` removes it, so that the same command can go on.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, run_dir: Path, world: World):
        self.file = run_dir / "stop" if world.is_main else None
        self.received: str | None = None
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name

    def reason(self) -> str | None:
        if self.received is None and self.file is not None and self.file.exists():
            return f"the file {self.file}"
        return self.received

    def clear(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def lock_run_dir(run_dir: Path, world: World) -> IO | None:
    """Lock a run's directory until the returned file is closed, by the end of the process at the latest. A collective call.

    Raises UserError where another process has it: two runs in one directory would destroy each other's checkpoints.
    """
    file, taken = None, None
    if world.is_main:
        file = (run_dir / "lock").open("w")
        if not try_lock(file):
            taken = f"--run-dir: another process is training in {run_dir}; wait for it, or stop it"
    if message := world.broadcast_first(taken):
        raise UserError(message)
    return file
