"""The reference of the configuration, made of the fields' descriptions.

    python -m memformer_dist.reference > docs/configuration.md

A test compares the file with what this prints.
"""

import sys
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from memformer_dist.config import MAY_CHANGE, RunConfig, cell_configs
from memformer_dist.curriculum import WindowByMetric, WindowByStep
from memformer_dist.zero.settings import PASSED_THROUGH, SET_BY_US

INTRODUCTION = """# Configuration

One JSON file of sections describes a run; `--set section.field=value` overrides any field. This page is made of the fields'
descriptions by `python -m memformer_dist.reference > docs/configuration.md`. A field without a default must be set. Fields
marked with * may change when a run is resumed; any other change needs a fresh run."""


def reference() -> Iterator[str]:
    """The lines of docs/configuration.md."""
    yield from INTRODUCTION.splitlines()
    for name, field in RunConfig.model_fields.items():
        yield from ("", f"## {name}", "", f"{_capital(_sentence(field.description))}.", "")
        if name == "model":
            for cell, config in cell_configs().items():
                yield from (f"### {cell}", "", f'`model.cell` "{cell}": see memformer_dist/cells/{cell}.py.', "")
                yield from (*_table(config, name), "")
        elif name == "deepspeed":
            yield from _deepspeed()
        else:
            annotation: Any = field.annotation
            yield from _table(annotation, name)
            if name == "mrbp":
                yield from ("", "`window` by step:", "", *_table(WindowByStep, f"{name}.window"))
                yield from ("", "`window` by a metric:", "", *_table(WindowByMetric, f"{name}.window"))


def _table(model: type[BaseModel], section: str) -> Iterator[str]:
    yield from ("| field | values | default | meaning |", "|---|---|---|---|")
    for name, field in model.model_fields.items():
        mark = " *" if f"{section}.{name}".startswith(MAY_CHANGE) else ""
        cells = (f"`{name}`{mark}", _values(field), _default(field), _sentence(field.description))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _values(field: FieldInfo) -> str:
    """What a field takes, in words."""
    bounds: dict[str, Any] = {}
    for item in field.metadata:
        bounds |= {sign: value for sign in ("gt", "ge", "lt", "le") if (value := getattr(item, sign, None)) is not None}
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = ", ".join(f"{signs[sign]} {value}" for sign, value in bounds.items())
    return " ".join(filter(None, [_type(field.annotation), limits]))


def _type(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is Literal:
        return ", ".join(f'`"{value}"`' for value in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "object"
    origin = get_origin(annotation)
    if origin in (dict, tuple, list):
        return {dict: "object", tuple: "list", list: "list"}[origin]
    if hasattr(annotation, "__metadata__"):  # Annotated: a tag of a union, or bounds
        inner = get_args(annotation)[0]
        limits = [f"> {m.gt}" for m in annotation.__metadata__ if getattr(m, "gt", None) is not None]
        return " ".join([_type(inner), *limits])
    if get_args(annotation):
        return " or ".join(_type(member) for member in get_args(annotation))
    return {int: "integer", float: "number", str: "text", bool: "true, false", Any: "any"}.get(
        annotation, str(annotation)
    )


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return ""
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[default] if default is None or isinstance(default, bool) else default}`"


def _sentence(description: str | None) -> str:
    assert description, "every field has a description"
    return description


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _deepspeed() -> Iterator[str]:
    yield "Handed on as they are: " + ", ".join(f"`{key}`" for key in PASSED_THROUGH) + "."
    yield from ("", "Not allowed in this section:", "", "| key | instead, or why |", "|---|---|")
    for key, reason in SET_BY_US.items():
        yield f"| `{key}` | {reason} |"


if __name__ == "__main__":
    sys.stdout.write("\n".join(reference()) + "\n")
