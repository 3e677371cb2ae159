"""What a user can put right, and how a program says so. No torch in here: the workers of preparation start without it.

Every program ends through `run_program`: exit code 0 when it is done, 2 with one message for the user's mistakes, 1
with a traceback for ours.
"""

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Iterable

from pydantic import ValidationError


class UserError(ValueError):
    """A mistake of the user's. The message names the field or file, what was found and what was expected."""


class CorpusError(UserError):
    """A corpus, or text for one, is damaged or out of reach. The message names the shard, and document and byte offset where it is damaged."""


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's findings as "field: what is wrong, found VALUE"."""
    problem = error.errors()[0]
    field = field_name(problem["loc"])
    found = (
        "" if problem["type"] == "missing" or isinstance(problem["input"], dict) else f", found {problem['input']!r}"
    )
    return ": ".join(filter(None, [field, message(problem)])) + found


def field_name(location: Iterable[Any]) -> str:
    """pydantic's location of a problem as a user writes it: ("training", "tokens") -> training.tokens."""
    return ".".join(map(str, location))


def message(problem: Any) -> str:
    """What pydantic says of one problem, as the middle of a sentence; a validator of ours in its own words."""
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return problem["msg"][0].lower() + problem["msg"][1:]


def run_program(program: Callable[[], None], error_log: Path | None = None) -> None:
    """Run a program's main function and end the process with its exit code.

    What went wrong also goes to `error_log`, because torchrun turns every exit code into 1 and drowns what was printed.
    Of several ranks only rank 0 reports a user's mistake: all have the same message (World.broadcast_first). Ends by
    os._exit once there is a process group: gloo's threads abort at random while the interpreter shuts down.
    """
    code, rank = 0, os.environ.get("RANK", "0")

    def report(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        if error_log is not None:
            error_log.parent.mkdir(parents=True, exist_ok=True)
            with error_log.open("a", encoding="utf-8") as log:  # in the format of logs.py
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank}  {text}\n")

    try:
        program()
    except UserError as error:
        code = 2
        if rank == "0":
            report(f"error: {error}")
    except KeyboardInterrupt:
        code = 130
        print("stopped; the same command resumes", file=sys.stderr, flush=True)
    except Exception:
        code = 1
        report(traceback.format_exc().rstrip("\n"))
    distributed: Any = sys.modules.get("torch.distributed")  # whoever has imported it may have joined a process group
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    if code == 0:
        distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
