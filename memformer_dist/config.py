"""RunConfig: the one typed configuration of a run, read from one JSON file and `--set section.field=value`.

    config = RunConfig.load(Path("configs/base.json"), ["mrbp.window=64"], world_size=8)

Unknown keys are rejected and all problems are reported in one error, because a job that waited a night in a queue
should not fail on a second typo. Most sections are defined next to the code that they configure. What relates two
sections is checked here, one function per subject. docs/configuration.md lists all fields.
"""

import difflib
import json
import logging
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import Self

from memformer_dist import suggest
from memformer_dist.cells import DEFAULT_CELL, ModelConfig
from memformer_dist.cells.base import CellConfig
from memformer_dist.config_relations import relations
from memformer_dist.curriculum import plan_model
from memformer_dist.data.open_data import IN_A_CORPUS, DataConfig
from memformer_dist.errors import UserError, first_problem, sentences
from memformer_dist.launcher import detected
from memformer_dist.mrbp.settings import DRIFT_LIMITS, MrbpConfig
from memformer_dist.optimizer import OptimizerConfig
from memformer_dist.places import Places, is_unicode, is_url
from memformer_dist.section import Section
from memformer_dist.tasks import task_model
from memformer_dist.training_settings import CheckpointConfig, MonitorConfig, TrainingConfig
from memformer_dist.upgrade import outdated_fields, upgrade
from memformer_dist.zero.settings import PASSED_THROUGH, deepspeed_problems, zero_stage

log = logging.getLogger(__name__)


# What a resumed run may change: prefixes of field names. The corpus may move; checkpoint.py compares its fingerprint.
MAY_CHANGE = (
    "model.checkpoint_layers",
    "model.loss_chunk",
    "mrbp.",
    "optimizer.",
    "checkpoint.",
    "monitor.",
    "deepspeed",
    "data.corpus",
    "data.prefetch",
    "data.cache",
    "training.tokens",
    "training.freeze",
    "training.evaluate_every_tokens",
    "training.evaluate_segments",
    "training.final_evaluate_segments",
    "training.evaluate_warmup_segments",
    "training.early_stopping_patience",
    "training.skipped_steps_limit",
)


class RunConfig(Section):
    model: ModelConfig = Field(
        description="the model: `cell` names its architecture, the other fields are that cell's own"
    )
    data: DataConfig = Field(description="the corpus, and how lanes read it")
    mrbp: MrbpConfig = Field(
        description="memory replay back-propagation: the BPTT window, and the trade of time against memory"
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW and its learning rate")
    training: TrainingConfig = Field(description="length of the run, precision, evaluations during training")
    checkpoint: CheckpointConfig = Field(
        CheckpointConfig(), description="when checkpoints are written, and which are kept"
    )
    monitor: MonitorConfig = Field(MonitorConfig(), description="what is logged")
    deepspeed: dict[str, Any] = Field(
        {},
        description="passed on to DeepSpeed, for example zero_optimization; what other sections set may not be set here",
    )

    @property
    def zero_stage(self) -> int:
        return zero_stage(self.deepspeed)

    @property
    def drift_limit(self) -> float:
        """mrbp.drift_limit, the default resolved."""
        limit = self.mrbp.drift_limit
        return DRIFT_LIMITS[self.training.precision] if limit is None else limit

    @property
    def paths(self) -> dict[str, str]:
        """The paths and URLs that it names, and what is inside each by which it is known to be there (places.py)."""
        initial = {self.training.init_from: ""} if self.training.init_from else {}
        return dict.fromkeys(self.data.corpora, IN_A_CORPUS) | initial

    def lanes_per_group(self, world_size: int) -> int:
        return self.mrbp.lanes_per_group or self.data.lanes // world_size

    @classmethod
    def load(cls, path: Path, overrides: Iterable[str] = (), world_size: int = 1, places: Places | None = None) -> Self:
        """Read a file, apply `--set` overrides, and check. Raises UserError with every problem found.

        A field of an earlier version is taken under its old name, with one warning.

        Args:
            overrides: "section.field=value", the value in JSON or else a string; a later one replaces an earlier one.
            places: of the run, where its configuration may name what is not seen from the working folder.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--config: cannot read {path}: {error.strerror}") from None
        except ValueError as error:  # not UTF-8, or not JSON
            raise UserError(f"{path}: not JSON: {error}") from None
        if not isinstance(raw, dict):
            raise UserError(f"{path}: found {type(raw).__name__}, expected an object with the sections of a run")
        return cls.with_overrides(raw, overrides, world_size, source=str(path), places=places)

    @classmethod
    def with_overrides(
        cls,
        raw: dict[str, Any],
        overrides: Iterable[str],
        world_size: int = 1,
        *,
        source: str = "configuration",
        places: Places | None = None,
    ) -> Self:
        """As `load`, of sections that have been read already; `source` begins the message."""
        outdated, problems = outdated_fields(raw), []
        raw = upgrade(raw)
        for override in overrides:
            problems += _override(raw, override)
            outdated |= outdated_fields(raw)
            raw = upgrade(raw)
        if detected().rank == 0:
            for old, new in outdated.items():
                log.warning("%s is now called %s; the old name still works", old, new)
        return cls.check(raw, world_size, source=source, problems=problems, places=places)

    @classmethod
    def check(
        cls,
        raw: dict[str, Any],
        world_size: int = 1,
        *,
        source: str = "configuration",
        problems: Iterable[str] = (),
        places: Places | None = None,
    ) -> Self:
        """Validate a configuration of this or an earlier version. Raises UserError with every problem found.

        Args:
            raw: the sections, as read from JSON.
            source: where they were read from; the message begins with it.
            problems: what has already been found wrong; reported first.
            places: as for `load`.
        """
        raw, problems = upgrade(raw), list(problems)
        known = known_fields(raw.get("model"))
        problems += [f"{name}: unknown section{suggest.nearest(name, '', known)}" for name in raw if name not in known]
        sections: dict[str, Any] = {"deepspeed": raw.get("deepspeed", {})}
        for name in (name for name in known if name != "deepspeed"):
            sections[name], found = _section(name, raw, known)
            problems += found
        problems += deepspeed_problems(
            sections["deepspeed"], lambda key, keys: suggest.nearest(key, "deepspeed", known | {"deepspeed": keys})
        )
        problems += relations(sections, world_size)
        problems += _not_unicode("", raw)
        problems += _missing_shards(raw.get("data"), places or Places())
        if problems:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise UserError(f"{source}: {count}\n" + "\n".join(f"  {problem}" for problem in problems))
        return cls(**sections)

    @classmethod
    def recorded(cls, path: Path) -> Self:
        """The configuration that an earlier start has written into its run's folder. Raises UserError.

        What relates it to the number of ranks, or to the corpus, was checked then.
        """
        try:
            return cls.model_validate(upgrade(json.loads(path.read_bytes())))
        except ValidationError as error:
            raise UserError(f"{path}: {first_problem(error)}") from None

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    def changes_since(self, saved: Self) -> dict[str, tuple[Any, Any]]:
        """Return the fields whose value differs from `saved`, as {name: (saved, now)}.

        Raises UserError, naming all of them, if a resumed run may not change some.
        """
        then, now = _flat(saved.model_dump()), _flat(self.model_dump())
        changes = {name: (then.get(name), now.get(name)) for name in {**then, **now} if then.get(name) != now.get(name)}
        refused = [name for name in changes if not name.startswith(MAY_CHANGE)]
        if refused:
            lines = [f"  {name}: found {changes[name][1]!r}, the run has {changes[name][0]!r}" for name in refused]
            raise UserError(
                "a resumed run cannot change these fields:\n"
                + "\n".join(lines)
                + "\nset them back, or start a fresh run in another --run-dir (training.init_from takes over the weights)"
            )
        return changes


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    flat = {"deepspeed": sections.pop("deepspeed")}
    for section, fields in sections.items():
        flat |= {f"{section}.{name}": value for name, value in fields.items()}
    return flat


# ---- one section ---------------------------------------------------------------------------------------------------


def cell_configs() -> dict[str, type[CellConfig]]:
    """Return the kinds of the section `model`, by the name of the cell."""
    members = (get_args(tagged)[0] for tagged in get_args(get_args(ModelConfig)[0]))
    return {member.model_fields["cell"].default: member for member in members}


def known_fields(model: Any = None) -> dict[str, Collection[str]]:
    """Return the names of every section's fields. Those of `model` are the cell's that the raw section `model` names."""
    cells = cell_configs()
    fields: dict[str, Collection[str]] = {}
    for name, field in RunConfig.model_fields.items():
        if name == "model":
            fields[name] = cells.get(_named_cell(model), cells[DEFAULT_CELL]).model_fields
        elif name == "deepspeed":
            fields[name] = PASSED_THROUGH
        else:
            fields[name] = _section_type(field).model_fields
    return fields


def _named_cell(model: Any) -> str:
    return str(model.get("cell", DEFAULT_CELL)) if isinstance(model, dict) else DEFAULT_CELL


def _section_type(field: FieldInfo) -> type[Section]:
    assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    return field.annotation


def _section(name: str, raw: dict[str, Any], known: dict[str, Collection[str]]) -> tuple[Section | None, list[str]]:
    """Return the validated section, None if there are problems that prevent it, and the problems."""
    field, found = RunConfig.model_fields[name], raw.get(name, {})
    if name == "model":
        cells, cell = cell_configs(), _named_cell(found)
        if cell not in cells:
            close = difflib.get_close_matches(cell, cells, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            return None, [f"model.cell: found {found['cell']!r}, expected one of {', '.join(cells)}{meant}"]
        section_type: type[Section] = cells[cell]
    else:
        section_type = _section_type(field)

    def fields_at(path: str) -> dict[str, FieldInfo]:
        """The fields of the object that a field belongs to: the section, a schedule of windows within it, or a task."""
        meant: type[BaseModel] | None = None
        if path.startswith("mrbp.window."):
            meant = plan_model(found["window"])
        elif path.startswith("data.task."):
            meant = task_model(found["task"])
        return section_type.model_fields if meant is None else meant.model_fields

    def unknown(path: str) -> str:
        if path.startswith(("mrbp.window.", "data.task.")):
            _, inner, key = path.split(".", 2)
            return suggest.nearest(key, inner, {inner: fields_at(path)})
        key = path.removeprefix(f"{name}.")
        if name == "model" and (others := [other for other in cells if key in cells[other].model_fields]):
            return f", a field of other cells ({', '.join(others)}), not of {cell}"
        return suggest.nearest(key, name, known)

    def missing(path: str) -> str:
        field = fields_at(path).get(path.rpartition(".")[2])
        return f"; {field.description if field and field.description else 'required'}"

    try:
        section = section_type.model_validate(found)
    except ValidationError as error:
        return None, sentences(error, name, unknown=unknown, missing=missing)
    if name not in raw and field.is_required():  # and all of its own fields have defaults
        return section, [f"{name}: missing section"]
    return section, []


def _override(raw: dict[str, Any], override: str) -> list[str]:
    """Apply `a.b=value` in place; return what is wrong with it."""
    path, equals, text = override.partition("=")
    *parents, last = path.split(".")
    if not equals or not path or not (parents or last in RunConfig.model_fields):
        meant = suggest.elsewhere(last, "", known_fields(raw.get("model"))) if path else None
        return [f"--set {override}: expected section.field=value{f', did you mean {meant}?' if meant else ''}"]
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            return [f"--set {override}: {parent} is not a section"]
    node[last] = value
    return []


# ---- texts and places --------------------------------------------------------------------------------------------


def _not_unicode(name: str, value: Any) -> Iterator[str]:
    """Texts that are not Unicode, such as names of files that are not UTF-8: no JSON file can hold them."""
    if isinstance(value, str) and not is_unicode(value):
        yield f"{name}: found {value!r}, which is not UTF-8, expected text; a link may give a folder another name"
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _not_unicode(f"{name}.{key}" if name else key, inner if is_unicode(key) else key)


def _missing_shards(data: Any, places: Places) -> Iterator[str]:
    found = data.get("corpus") if isinstance(data, dict) else None
    corpora = [found] if isinstance(found, str) else found if isinstance(found, dict) else []  # else reported already
    for corpus in (places.find(corpus, IN_A_CORPUS) for corpus in corpora if not is_url(corpus) and is_unicode(corpus)):
        for split in (Path(corpus) / split for split in ("train", "valid")):
            if not (split / "corpus.json").exists():
                yield f"data.corpus: no token shards in {split}; tokenizer/shard.py writes them"
