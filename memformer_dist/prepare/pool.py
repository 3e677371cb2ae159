"""A function called for many tasks in parallel: in processes of this machine, or in the ranks of an MPI job.

    with open_pool(workers=8) as pool:
        if pool is not None:  # None in every rank but 0: it has worked until rank 0 was done
            for result in pool.run(function, tasks):
                ...

Under `mpirun -n 64 python ...` rank 0 hands out the tasks and the other 63 ranks work, whatever `workers` is.
Function, task and result travel between processes: the function must be one of a module, the results small.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar, cast

from memformer_dist.errors import UserError
from memformer_dist.launcher import MPI_LAUNCHERS, SRUN, detect

Task = TypeVar("Task")
Result = TypeVar("Result")


class Pool:
    def __init__(self, workers: int, executor: Executor | None = None):
        self._workers, self._executor = workers, executor

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """The results as they are finished, in any order. Raises what `function` raises, UserError if a worker died."""
        if self._executor is None and min(self._workers, len(tasks)) <= 1:
            yield from map(function, tasks)
            return
        if self._executor is None:
            self._executor = _processes(self._workers)
        waiting: set[Future[Result]] = set()
        try:
            for task in tasks:
                waiting.add(self._executor.submit(function, task))
                if len(waiting) > 2 * self._workers:  # enough to keep them busy; each holds its task in memory
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            raise UserError(
                "a worker process died unexpectedly (perhaps killed because memory ran out: fewer --workers need less);"
                " what is finished is kept, and the same command resumes"
            ) from None

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


@contextmanager
def open_pool(workers: int) -> Iterator[Pool | None]:
    """After an error processes are terminated at once, while MPI ranks finish their current task."""
    if _under_mpi():
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor

        with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
            if executor is None:
                yield None
                return
            # What it returns is an MPIPoolExecutor, whatever its annotation says.
            pool = Pool(MPI.COMM_WORLD.Get_size() - 1, cast(Executor, executor))
            try:
                yield pool
            finally:
                pool.close()
        return
    others = set(multiprocessing.active_children())
    pool = Pool(workers)
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.close()


def _under_mpi() -> bool:
    """Whether mpirun or srun has started this process as one of several ranks.

    Raises UserError where MPI knows nothing of the others: each process would prepare the whole corpus by itself.
    """
    launch = detect(os.environ)
    if launch.is_alone or launch.by not in (SRUN, *MPI_LAUNCHERS):
        return False
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_size() == launch.size:
        return True
    raise UserError(
        f"{launch.by} has started {launch.size} processes, but MPI sees {MPI.COMM_WORLD.Get_size()}: use the mpirun that belongs"
        f" to mpi4py's library ({MPI.Get_library_version().splitlines()[0].strip(chr(0))}), or srun --mpi=pmi2"
    )


def _processes(number: int) -> ProcessPoolExecutor:
    # Not fork: threads of this process (of fsspec, of torch in tests) may hold locks. The server forks workers after it
    # has imported what they need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memformer_dist.prepare.build"])
    return ProcessPoolExecutor(number, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    """Let Ctrl-C end a worker silently, and end it when the process that it works for has ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
