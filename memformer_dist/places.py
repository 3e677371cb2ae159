"""Paths and texts as users write them, and where a run has last seen what its configuration names.

    parser.add_argument("--output", type=path_option)        # ~ is the home folder; $NAME stays as it is
    places = Places.of_run(run_dir)
    places.find("corpora/books", "train/corpus.json")        # "corpora/books", or "/home/me/project/corpora/books"

A configuration keeps paths as they were written, relative ones perhaps. Every start of a run records what they meant in
starts.jsonl, so that the run can be resumed, evaluated and shown from another folder, or by another user. A path counts
as it is seen from the working folder; if nothing is there, the recorded one does.
"""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from memformer_dist.files import read_json_lines

STARTS, PLACES = "starts.jsonl", "places"  # a run's file with a line for each start, and the field in these lines
log = logging.getLogger(__name__)


def path_option(text: str) -> Path:
    """A path on a command line."""
    return Path(os.path.expanduser(text))


def path_or_url_option(text: str) -> str:
    """A path, glob or URL on a command line."""
    return text if is_url(text) else os.path.expanduser(text)


def text_option(text: str) -> str:
    """Text on a command line: UTF-8, whatever the locale; what is not, as the locale has it, perhaps with surrogates."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8; one with surrogates, as names of files may have them, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def configured(path: str) -> str:
    """A path in a configuration, as file functions take it: they need not be UTF-8, JSON is. URLs stay as they are."""
    return path if is_url(path) else os.path.expanduser(os.fsdecode(path.encode("utf-8", "surrogateescape")))


def recorded(path: str) -> str:
    """A path or a word of a command line as records keep it, the same in every locale: surrogates are what is not UTF-8."""
    return path if is_url(path) else os.fsencode(path).decode("utf-8", "surrogateescape")


class Places:
    """What the paths of a run's configuration meant at its latest start: absolute paths by what was written."""

    def __init__(self, recorded: Mapping[str, str] | None = None):
        self.recorded = dict(recorded or {})

    @classmethod
    def of_run(cls, run_dir: Path) -> "Places":
        """None for a run that has not started yet, was started by an earlier version, or cannot be read."""
        starts: list[dict[str, Any]] = []
        with suppress(OSError):  # whoever needs the folder reports it
            starts = [entry for _, entry in read_json_lines(run_dir / STARTS)]
        found: dict = next((entry[PLACES] for entry in reversed(starts) if isinstance(entry.get(PLACES), dict)), {})
        return cls({str(written): str(place) for written, place in found.items()})

    def find(self, path: str, inside: str = "") -> str:
        """Where `path` is: as it is written if it is there, else as it was recorded if it is there, else as it is written.

        Args:
            inside: the file or folder in it by which it is known to be there.
        """
        here = configured(path)
        before = self.recorded.get(path)
        if is_url(path) or before is None or os.path.exists(os.path.join(here, inside)):
            return here
        there = configured(before)
        return there if os.path.exists(os.path.join(there, inside)) else here

    def found(self, field: str, path: str, inside: str = "") -> str:
        """`find`; rank 0 says so where it is not as it is written. `field`: what messages call it."""
        place = self.find(path, inside)
        if place != configured(path) and os.environ.get("RANK", "0") == "0":
            log.warning("%s: found no %s from here; %s, where the run has seen it, is used", field, path, place)
        return place

    def seen(self, paths: Mapping[str, str]) -> dict[str, str]:
        """What is to be recorded at a start: where the `paths`, each with what is inside, are now."""
        local = {path: self.find(path, inside) for path, inside in paths.items() if not is_url(path)}
        return {path: recorded(os.path.abspath(place)) for path, place in local.items()}
