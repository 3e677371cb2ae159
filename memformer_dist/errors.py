"""A user's mistakes: their exceptions, the sentences about them, and how a program reports them and ends.

Every program ends through `run_program`: exit code 0 when it is done, 2 with one message for the user's mistakes, 1
with a traceback for ours. Without torch, because the worker processes of preparation import this module.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

LONGEST_SHOWN = 120  # characters of a value in a message


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


def sentences(
    error: ValidationError,
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


def first_problem(error: ValidationError) -> str:
    """The first sentence alone, for files that a program wrote: there the first problem says enough."""
    return sentences(error)[0]


def run_program(program: Callable[[], None], error_log: Path | None = None) -> None:
    """Run a program's main function and end the process with its exit code.

    What went wrong also goes to `error_log`, because torchrun turns every exit code into 1 and drowns what was printed.
    Of several ranks only rank 0 reports a user's mistake: all have the same message (World.on_all_or_raise). Ends by
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
        if rank == "0" or "WORLD_SIZE" not in os.environ or isinstance(error, LaunchError):
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
