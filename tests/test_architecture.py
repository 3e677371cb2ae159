"""The package's imports go one way, and test modules share nothing but tests/helpers. Read from the sources, not run."""

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers import ROOT

PACKAGE = "memformer_dist"


def rooms() -> list[list[str]]:
    """The lines under "The order of imports" in docs/architecture.md: modules, or a folder and what it is.

    A module may import from earlier lines; within a line and within a folder modules import one another as needed, but
    never in a circle. Imports inside functions count, because a lazy import must not hide a circle; what only a type
    checker imports may close one.
    """
    text = (ROOT / "docs/architecture.md").read_text().partition("\n## The order of imports\n")[2].partition("\n## ")[0]
    lines = [line.split() for line in text.splitlines() if line.startswith("    ")]
    return [[words[0].rstrip("/")] if words[0].endswith("/") else words for words in lines]


ROOMS = rooms()
LINE_OF = {room: number for number, line in enumerate(ROOMS) for room in line}

# Imported by the worker processes of preparation and by every program before it knows its mistake: without torch.
WITHOUT_TORCH = ["errors", "files", "vocabulary", "section", "prepare.documents", "prepare.encode", "prepare.build"]


class Import(NamedTuple):
    module: str  # in full: memformer_dist.data.corpus, numpy
    line: int
    lazy: bool = False  # inside a function
    for_types: bool = False  # under `if TYPE_CHECKING`: never run


def sources(package: str = PACKAGE) -> dict[str, Path]:
    """The file of every module of a package, and of the package itself."""
    found = {}
    for path in sorted((ROOT / package.replace(".", "/")).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, modules: dict[str, Path]) -> Iterator[Import]:
    """What a module imports; `from package import name` is of package.name where that is a module."""
    lazy, for_types = set(), set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lazy |= set(ast.walk(node))
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for_types |= set(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else str(node.module) for name in full]
        else:
            continue
        yield from (Import(name, node.lineno, node in lazy, node in for_types) for name in names)


MODULES = sources()
IMPORTS = {name: list(imports(path.read_text(), MODULES)) for name, path in MODULES.items()}


def room(module: str) -> str | None:
    """errors, data, ...; None for the package itself, whose lazy exports are its front door, and for other packages."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] or None if first == PACKAGE else None


def wrong_way(imported: dict[str, list[Import]]) -> list[str]:
    """Imports of a later line."""
    return [
        f"{module}:{entry.line} imports {entry.module}"
        for module, entries in imported.items()
        for entry in entries
        if room(module) and room(entry.module) and LINE_OF[room(entry.module)] > LINE_OF[room(module)]
    ]


def circle(imported: dict[str, list[Import]]) -> list[str]:
    """Modules of which each imports the next, and the last the first; none if there is no circle."""
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for entry in imported[path[-1]]:
            if entry.for_types:
                continue
            if entry.module in path:
                return [*path[path.index(entry.module) :], entry.module]
            known = entry.module in imported and entry.module not in done and room(entry.module)
            if known and (found := search([*path, entry.module])):
                return found
        done.add(path[-1])
        return []

    return next((found for module in imported if room(module) and (found := search([module]))), [])


def way_to(package: str, start: str) -> list[str]:
    """By which modules importing `start` imports `package`; none if it does not."""
    came_from, waiting = {start: ""}, [start]
    while waiting:
        module = waiting.pop()
        # Importing data.corpus imports the package's and data's __init__ as well.
        parts = module.split(".")
        parents = [".".join(parts[:length]) for length in range(1, len(parts))]
        for name in (
            *parents,
            *(entry.module for entry in IMPORTS.get(module, []) if not (entry.lazy or entry.for_types)),
        ):
            if name.partition(".")[0] == package:
                way = [name]
                while module:
                    way.append(module)
                    module = came_from[module]
                return way[::-1]
            if name in MODULES and name not in came_from:
                came_from[name] = module
                waiting.append(name)
    return []


def test_every_module_has_its_room():
    assert sorted({room(module) for module in MODULES} - LINE_OF.keys() - {None}) == []
    assert LINE_OF.keys() - {room(module) for module in MODULES} == set(), "rooms that no longer exist"


def test_imports_go_down_the_rooms():
    assert wrong_way(IMPORTS) == []


def test_no_module_imports_itself_by_way_of_others():
    assert circle(IMPORTS) == []


def test_only_zero_imports_deepspeed():
    found = {module for module, entries in IMPORTS.items() if any(e.module.startswith("deepspeed") for e in entries)}
    assert {module for module in found if room(module) != "zero"} == set()
    assert f"{PACKAGE}.zero.settings" not in found, "a configuration is checked before deepspeed may be imported"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_imported_without_torch(module):
    assert way_to("torch", f"{PACKAGE}.{module}") == []


def test_what_is_wrong_is_found():
    """The controls."""
    wrong = "from memformer_dist.train import train\ndef f():\n    import memformer_dist.data.corpus"
    entries = list(imports(wrong, MODULES))
    assert entries == [Import(f"{PACKAGE}.train", 1), Import(f"{PACKAGE}.data.corpus", 3, lazy=True)]
    assert wrong_way({f"{PACKAGE}.mrbp.replay": entries}) == [
        f"{PACKAGE}.mrbp.replay:1 imports {PACKAGE}.train",
        f"{PACKAGE}.mrbp.replay:3 imports {PACKAGE}.data.corpus",
    ]
    ring = [f"{PACKAGE}.{name}" for name in ("files", "world", "errors", "files")]
    assert circle({one: [Import(other, 1, lazy=True)] for one, other in pairwise(ring)}) == ring
    assert way_to("torch", f"{PACKAGE}.train")[0] == f"{PACKAGE}.train"


# ---- the tests -------------------------------------------------------------------------------------------------------

TESTS = sources("tests")


def test_test_modules_share_helpers_alone():
    """None imports another, or conftest.py, whose fixtures come by their names."""
    found = {
        f"{module} imports {entry.module}"
        for module, path in TESTS.items()
        for entry in imports(path.read_text(), TESTS)
        if entry.module.startswith("tests.") and not entry.module.startswith("tests.helpers")
    }
    assert found == set()


def test_no_function_is_written_twice():
    """In two test modules, to the letter; what two need goes into tests/helpers."""
    places: dict[str, list[str]] = {}
    for module, path in TESTS.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                body = ast.unparse(ast.Module(node.body, []))
                if body.count("\n"):  # one line may well be the same
                    places.setdefault(body, []).append(f"{module}.{node.name}")
    assert [names for names in places.values() if len(names) > 1] == []


def test_the_inner_tier_touches_every_module():
    """tests/run.sh --quick runs something of every module, but of those whose subject as a whole is `full`."""
    left_out = []
    for module, path in TESTS.items():
        tests = [
            " ".join(map(ast.unparse, node.decorator_list))
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
        slow, full = ([mark in markers for markers in tests] for mark in ("pytest.mark.slow", "pytest.mark.full"))
        if any(slow) and all(map(max, slow, full)):
            left_out.append(module)
    assert left_out == []
