"""A user's mistakes: their exceptions, the sentences about them, and how a program reports them and ends.

Every program ends through `run_program`: exit code 0 when it is done, 2 with one message for the user's mistakes, 1
with a traceback for ours, 75 for a run that was stopped, 130 on Ctrl-C, 141 when nobody reads its output any more.
Without torch, because the worker processes of preparation import this module.
"""

import errno
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:  # it takes a tenth of a second, and programs import this module before they hear signals
    from pydantic import ValidationError

STOPPED = 75  # exit code of a run that was stopped before its end: start the same command again (os.EX_TEMPFAIL)
READER_GONE = 141  # exit code of a program whose output nobody reads any more, as that of one that dies of SIGPIPE
NOBODY_READS = (errno.EPIPE, errno.EIO)  # OSError.errno of a pipe without a reader, of a terminal that was closed
LONGEST_SHOWN = 120  # characters of a value in a message
NAMES_SHOWN = 5
UNWRITABLE = "backslashreplace"  # what becomes of characters that an encoding lacks, and of names that are no text


class UserError(ValueError):
    """A mistake of the user's. The message names the field or file, what was found and what was expected."""


class LaunchError(UserError):
    """What the ranks were started with does not fit together: the launcher's variables, or one rank and another.

    Every rank reports it: they may be on machines of their own, and may not have met one another yet.
    """


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


def shortened(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    left = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {left} more" if left > 0 else "")


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


class Output:
    """Standard output or standard error, which may lose its reader or the room on its disk at any time.

    `on_loss` is called when something cannot be written for the first time, and may raise. What cannot be written after
    that is dropped. Any text can be written, whatever the locale: see `_take_any_text`.
    """

    def __init__(self, stream: TextIO, on_loss: Callable[[OSError], None]):
        self._stream, self._on_loss, self._lost = stream, on_loss, False

    @classmethod
    def around(cls, stream: TextIO | None, on_loss: Callable[[OSError], None]) -> Any:
        """Takes the place of `stream`, which is None where its descriptor was closed when the program started."""
        _take_any_text(stream)
        return cls(open(os.devnull, "w") if stream is None else stream, on_loss)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Callable[[], object]) -> None:
        try:
            function()
        except OSError as error:
            if not self._lost:
                self._lost = True
                self._on_loss(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _take_any_text(stream: TextIO | None) -> None:
    """From here on any text can be written, also by libraries that hold the stream.

    What goes into a pipe or a file is UTF-8. A terminal, and whoever sets PYTHONIOENCODING, gets its own encoding;
    characters that this lacks are written as escapes such as \\u6f22.
    """
    if isinstance(stream, io.TextIOWrapper):
        own = stream.isatty() or "PYTHONIOENCODING" in os.environ
        stream.reconfigure(encoding=stream.encoding if own else "utf-8", errors=UNWRITABLE)


def run_program(program: Callable[[], None], error_log: Path | None = None, *, interrupted: str = "stopped") -> None:
    """Run a program's main function and end the process with its exit code.

    What went wrong also goes to `error_log`, because torchrun turns every exit code into 1 and drowns what was printed.
    Of several ranks only rank 0 reports a user's mistake: all have the same message (World.on_all_or_raise). Ends by
    os._exit once there is a process group: gloo's threads abort at random while the interpreter shuts down.

    Args:
        interrupted: the line that is printed on Ctrl-C (KeyboardInterrupt).
    """
    code, lost = 0, []

    def lose(error: OSError) -> None:
        lost.append(error)
        raise error

    sys.stdout, sys.stderr = Output.around(sys.stdout, lose), Output.around(sys.stderr, lose)
    try:
        program()
        sys.stdout.flush()
    except Stopped as stopped:
        code = stopped.exit_code
        if str(stopped):
            _print_last(str(stopped))
    except SystemExit as end:  # of argparse: after --help, or after a message about the command line
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            _print_last(end.code)
    except KeyboardInterrupt:
        code = 130
        _print_last(interrupted)
    except Exception as error:
        code, message = _failed(error, lost)
        if message:
            _print_last(message)
            _append(error_log, message)
    _leave(code)


def _failed(error: Exception, lost: list[OSError]) -> tuple[int, str]:
    """The exit code, and what is to be said; called while the error is handled.

    Args:
        lost: why standard output or standard error could not be written.
    """
    if lost and lost[0] in (error, error.__context__):
        if lost[0].errno in NOBODY_READS:
            return READER_GONE, ""
        return 2, f"error: standard output cannot be written: {lost[0].strerror}"
    if isinstance(error, UserError):
        reports = os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ or isinstance(error, LaunchError)
        return 2, f"error: {error}" if reports else ""
    return 1, traceback.format_exc().rstrip("\n")


def _append(error_log: Path | None, text: str) -> None:
    if error_log is None:
        return
    with suppress(OSError):  # the disk may be full
        error_log.parent.mkdir(parents=True, exist_ok=True)
        with error_log.open("a", encoding="utf-8", errors=UNWRITABLE) as log:  # in the format of logs.py
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {os.environ.get('RANK', '0')}  {text}\n")


def _print_last(text: str) -> None:
    with suppress(OSError, ValueError):  # nobody may be reading any more
        print(text, file=sys.stderr, flush=True)


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    distributed: Any = sys.modules.get("torch.distributed")  # whoever has imported it may have joined a process group
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    if code in (0, STOPPED):
        with suppress(Exception):  # another rank has died meanwhile; this one is done
            distributed.barrier()
    os._exit(code)
