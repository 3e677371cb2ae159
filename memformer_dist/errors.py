"""A user's mistakes: their exceptions, the sentences about them, and how a program reports them and ends.

Every program ends through `run_program`: exit code 0 when it is done, 2 with one message for the user's mistakes, 1
with a traceback for ours, 75 for a run that was stopped, 130 on Ctrl-C, 141 when nobody reads its output any more.
Without torch, because the worker processes of preparation import this module.
"""

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it takes a tenth of a second, and programs import this module before they hear signals
    from pydantic import ValidationError

STOPPED = 75  # exit code of a run that was stopped before its end: start the same command again (os.EX_TEMPFAIL)
READER_GONE = 141  # exit code of a program whose output nobody reads any more, as that of one that dies of SIGPIPE
NOBODY_READS = (errno.EPIPE, errno.EIO)  # OSError.errno of a pipe without a reader, of a terminal that was closed
LONGEST_SHOWN = 120  # characters of a value in a message


class UserError(ValueError):
    """A mistake of the user's. The message names the field or file, what was found and what was expected."""


class CorpusError(UserError):
    """A corpus, or text for one, is damaged or out of reach.

    The message names the shard, and document and byte offset where it is damaged.
    """


class Problems(ValueError):
    """What one validator of a pydantic model has found, several problems at once.

    Args:
        problems: one sentence each, beginning with the name of its field: "width: found 10, expected ...".
    """

    def __init__(self, problems: Sequence[str]):
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def sentences(
    error: "ValidationError",
    prefix: str = "",
    *,
    unknown: Callable[[str], str] = lambda field: "",
    missing: Callable[[str], str] = lambda field: "",
) -> list[str]:
    """A pydantic error in our words, one sentence per problem: the field, what was found, what was expected.

    Args:
        prefix: the name of what was validated, put in front of the fields' names; "" for none.
        unknown, missing: from the full name of a field that is unknown or missing to the end of the sentence about it.
    """
    return [sentence for problem in error.errors() for sentence in _sentences(problem, prefix, unknown, missing)]


def _sentences(
    problem: Any, prefix: str, unknown: Callable[[str], str], missing: Callable[[str], str]
) -> Iterator[str]:
    # pydantic's location also has the tags of unions, which we write in angle brackets; the file does not have them.
    location = [str(part) for part in problem["loc"] if part != "[key]" and not str(part).startswith("<")]
    field = ".".join(filter(None, [prefix, *location]))
    start = f"{field}: " if field else ""
    if problem["type"] == "extra_forbidden":
        yield f"{start}unknown key{unknown(field)}"
    elif problem["type"] == "missing":
        yield f"{start}missing{missing(field)}"
    elif problem["type"] == "value_error":  # raised by one of our validators, in its own words
        found = problem["ctx"]["error"]
        if isinstance(found, Problems):
            yield from (f"{field}.{sentence}" if field else sentence for sentence in found.problems)
        else:
            yield f"{start}{found}"
    else:
        yield f"{start}found {_shown(problem['input'])}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _shown(value: Any) -> str:
    """The value as Python writes it, cut off if it is long: it may be a whole document."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} ..."


def first_problem(error: "ValidationError") -> str:
    """The first sentence alone, for files that a program wrote: there the first problem says enough."""
    return sentences(error)[0]


class Stopped(Exception):
    """A program was asked to stop before its end, and has saved what there was to save.

    Args:
        message: one line for standard error; "" if it has been said.
    """

    def __init__(self, message: str = "", exit_code: int = STOPPED):
        super().__init__(message)
        self.exit_code = exit_code


def run_program(program: Callable[[], None], error_log: Path | None = None, *, interrupted: str = "stopped") -> None:
    """Run a program's main function and end the process with its exit code.

    What went wrong also goes to `error_log`, because torchrun turns every exit code into 1 and drowns what was printed.
    Of several ranks only rank 0 reports a user's mistake: all have the same message (World.broadcast_first). Ends by
    os._exit once there is a process group: gloo's threads abort at random while the interpreter shuts down.

    Args:
        interrupted: the line that is printed on Ctrl-C (KeyboardInterrupt).
    """
    code, rank = 0, os.environ.get("RANK", "0")

    def report(text: str) -> None:
        with suppress(OSError, ValueError):  # nobody may be reading any more
            print(text, file=sys.stderr, flush=True)
        if error_log is not None:
            with suppress(OSError):  # the disk may be full
                error_log.parent.mkdir(parents=True, exist_ok=True)
                with error_log.open("a", encoding="utf-8") as log:  # in the format of logs.py
                    log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank}  {text}\n")

    try:
        program()
        if sys.stdout is not None:
            sys.stdout.flush()
    except Stopped as stopped:
        code = stopped.exit_code
        if str(stopped):
            _print_last_line(str(stopped))
    except KeyboardInterrupt:
        code = 130
        _print_last_line(interrupted)
    except Exception as error:
        lost = _lost_output() if isinstance(error, OSError) or isinstance(error.__context__, OSError) else None
        if lost is not None and lost.errno in NOBODY_READS:
            code = READER_GONE
        elif lost is not None:
            code = 2
            report(f"error: standard output cannot be written: {lost.strerror}")
        elif isinstance(error, UserError):
            code = 2
            if rank == "0":
                report(f"error: {error}")
        else:
            code = 1
            report(traceback.format_exc().rstrip("\n"))
    _leave(code)


def _print_last_line(text: str) -> None:
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _lost_output() -> OSError | None:
    """Why standard output or standard error cannot be written: what has not arrived is still waiting in its buffer."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            return error
    return None


def _leave(code: int) -> None:
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):  # Python would report it once more when it shuts down
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    distributed: Any = sys.modules.get("torch.distributed")  # whoever has imported it may have joined a process group
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    if code in (0, STOPPED):
        with suppress(Exception):  # another rank has died meanwhile; this one is done
            distributed.barrier()
    os._exit(code)
