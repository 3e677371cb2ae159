"""Options of programs: what is out of its range is found where the command line is read, all of it in one message.

    parser = Options(__doc__, check=lambda options: not_writable("--json", options.json))
    parser.add_argument("--lanes", type=integer(least=1))
    options = parser.parse_args(arguments)      # UserError: --lanes: found 0, expected at least 1

A type is a function from the text to the value. It raises ValueError with the rest of the sentence, "found 0, expected ...".
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from memformer_dist.errors import UserError
from memformer_dist.files import expect_writable
from memformer_dist.places import path_option, path_or_url_option, text_option

Value = TypeVar("Value")

LARGEST = 2**63 - 1  # what libraries take
WRONG = object()  # the value of an option that is out of its range


class Options(argparse.ArgumentParser):
    """A parser whose help is the program's docstring.

    Args:
        check: what else is wrong with the options, of which some may be WRONG.
    """

    def __init__(
        self,
        description: str | None = None,
        *,
        check: Callable[[argparse.Namespace], Iterable[str]] = lambda options: (),
        **more: Any,
    ):
        self._problems: list[str] = []
        self._check = check
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def add_argument(self, *names: str, **more: Any) -> argparse.Action:
        if "type" in more:
            name = names[0] if names[0].startswith("-") else str(more.get("metavar", names[0]))
            more["type"] = self.collecting(name, more["type"])
        return super().add_argument(*names, **more)

    def add_input(self) -> None:
        """The options of the programs that read documents: --input, --exclude, --text-field."""
        self.add_argument(
            "--input", type=nonempty_path_or_url, nargs="+", required=True, help="folders, globs, files and URLs"
        )
        self.add_argument(
            "--exclude",
            type=nonempty_text,
            nargs="+",
            default=[],
            metavar="PATTERN",
            help="names of files and folders to skip within folders",
        )
        self.add_argument(
            "--text-field",
            type=nonempty_text,
            metavar="NAME",
            help="field or column that holds the text (default: text, parts or messages)",
        )

    def add_overrides(self) -> None:
        """--set SECTION.FIELD=VALUE, any number of times."""
        self.add_argument(
            "--set",
            type=text_option,
            action="append",
            default=[],
            metavar="SECTION.FIELD=VALUE",
            help="override a field of the configuration",
        )

    def parse_known_args(self, *arguments: Any, **more: Any) -> Any:
        """Raises UserError with all that is wrong with values; argparse itself ends the program where words are missing."""
        self._problems.clear()
        found = super().parse_known_args(*arguments, **more)
        if problems := [*self._problems, *self._check(found[0])]:
            raise UserError("\n".join(problems))
        return found

    def _print_message(self, message: str, file: Any = None) -> None:
        """Raises OSError where it cannot be written; some releases of argparse swallow that, others do not."""
        if message:
            (file or sys.stderr).write(message)

    def collecting(self, name: str, convert: Callable[[str], Value]) -> Callable[[str], Value | object]:
        """A type that notes what is wrong instead of raising it; `add_argument` makes one, that of a group does not."""

        def collect(text: str) -> Value | object:
            try:
                return convert(text)
            except ValueError as error:
                self._problems.append(f"{name}: {error}")
                return WRONG

        return collect


# ---- types -----------------------------------------------------------------------------------------------------------


def integer(*, least: int = 0, most: int = LARGEST) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"found {text!r}, expected an integer") from None
        if not least <= value <= most:
            raise ValueError(f"found {value}, expected at {f'least {least}' if value < least else f'most {most}'}")
        return value

    return convert


def number(
    *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """Of finite numbers."""
    limits = (
        (above, lambda value: value > above, f"more than {above:g}"),
        (least, lambda value: value >= least, f"at least {least:g}"),
        (most, lambda value: value <= most, f"at most {most:g}"),
        (below, lambda value: value < below, f"less than {below:g}"),
    )

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"found {text!r}, expected a number")
        for limit, keeps, words in limits:
            if math.isfinite(limit) and not keeps(value):
                raise ValueError(f"found {text}, expected {words}")
        return value

    return convert


def nonempty_text(words: str) -> str:
    """Any text but an empty one."""
    return text_option(_expect_some(words, "some text"))


def nonempty_path(words: str) -> Path:
    return path_option(_expect_some(words, "a path"))


def nonempty_path_or_url(words: str) -> str:
    return path_or_url_option(_expect_some(words, "a path or a URL"))


def file_to_read(words: str) -> Path:
    found = nonempty_path(words)
    if found.is_dir():
        raise ValueError(f"found the folder {found}, expected a file")
    if not found.exists():
        raise ValueError(f"found no file {found}")
    return found


def _expect_some(words: str, what: str) -> str:
    if not words.strip():
        raise ValueError(f"found {words!r}, expected {what}")
    return words


# ---- checks ----------------------------------------------------------------------------------------------------------


def not_writable(option: str, file: object) -> Iterator[str]:
    """What is wrong with the place of a file, if one is given, that is written after the work; its folder must be there."""
    if not isinstance(file, Path):
        return
    if not file.parent.is_dir():
        yield f"{option}: found no folder {file.parent}"
        return
    try:
        expect_writable(file, option)
    except UserError as error:
        yield str(error)
