"""RunConfig: the one typed configuration of a run, read from one JSON file and `--set section.field=value`.

Unknown keys are rejected and all problems are reported in one error, because a job that waited a night in a queue should
not die of the second typo. Each section is a model of its own, beside the code that it configures where that is possible; what
relates two sections is checked here, one function per subject.
"""

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from typing_extensions import Self

from memformer_dist import suggest
from memformer_dist.cells import ModelConfig
from memformer_dist.curriculum import SHAPES, WindowByMetric
from memformer_dist.data.open_data import DataConfig, is_url
from memformer_dist.errors import UserError, sentences
from memformer_dist.mrbp.settings import MrbpConfig
from memformer_dist.optimizer import OptimizerConfig
from memformer_dist.section import Section
from memformer_dist.upgrade import upgrade
from memformer_dist.zero.settings import NO_FP16, PASSED_THROUGH, deepspeed_problems, zero_stage


class TrainingConfig(Section):
    tokens: PositiveInt = Field(description="labels to train on, over all lanes and epochs: when the run ends")
    seed: int = Field(0, ge=0, description="seed of the initial weights and of dropout")
    precision: Literal["fp32", "bf16", "bf16_parameters"] = Field(
        "fp32",
        description="bf16: autocast over fp32 parameters, fp32 gradients; bf16_parameters: bf16 parameters over sharded"
        " fp32 master weights and gradients, where fp32 parameters do not fit (needs mrbp.reduce segment)",
    )
    init_from: str | None = Field(
        None, description="run directory or checkpoint whose weights alone start a fresh run; null: random weights"
    )
    evaluate_every_tokens: PositiveInt | None = Field(
        None, description="tokens between evaluations during training; null: evaluate only at the end"
    )
    evaluate_segments: PositiveInt | None = Field(
        None, description="segments per lane in evaluations during training; null: all of the validation split"
    )
    skipped_steps_limit: PositiveInt = Field(
        10, description="steps in a row with a non-finite gradient after which the run ends with an error"
    )


class CheckpointConfig(Section):
    every_tokens: PositiveInt | None = Field(
        None, description="tokens between checkpoints; null: only at the end and when the run is stopped"
    )
    keep: int = Field(2, ge=2, description="newest checkpoints kept; at least two, so that a damaged one is survived")
    anchor_every_tokens: PositiveInt | None = Field(
        None, description="the first checkpoint after each multiple of these tokens is never removed; null: none"
    )


class MonitorConfig(Section):
    log_every_steps: PositiveInt = Field(10, description="steps per record of metrics.jsonl and TensorBoard")
    device_peak_tflops: PositiveFloat | None = Field(
        None, description="peak TFLOP/s of a device, for perf/mfu; null: known for some GPUs"
    )


# What a resumed run may change: prefixes of field names. The corpus may move; its fingerprint is compared elsewhere.
MAY_CHANGE = (
    "mrbp.",
    "optimizer.",
    "checkpoint.",
    "monitor.",
    "deepspeed",
    "data.corpus",
    "data.prefetch",
    "data.cache",
    "training.tokens",
    "training.evaluate_every_tokens",
    "training.evaluate_segments",
    "training.skipped_steps_limit",
)


class RunConfig(Section):
    model: ModelConfig = Field(description="the cell and its size; `cell` names it")
    data: DataConfig = Field(description="what is read, and how it is laid out in lanes")
    mrbp: MrbpConfig = Field(description="memory replay back-propagation")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW and its learning rate")
    training: TrainingConfig = Field(description="how long, in which precision, and evaluations during training")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="when checkpoints are written and removed")
    monitor: MonitorConfig = Field(MonitorConfig(), description="what is logged")
    deepspeed: dict[str, Any] = Field({}, description="handed to DeepSpeed, e.g. zero_optimization")

    @property
    def zero_stage(self) -> int:
        return zero_stage(self.deepspeed)

    def lanes_per_group(self, world_size: int) -> int:
        return self.mrbp.lanes_per_group or self.data.lanes // world_size

    @classmethod
    def load(cls, path: Path, overrides: Iterable[str] = (), world_size: int = 1) -> Self:
        """Read, override and check. Raises UserError with every problem found."""
        try:
            raw = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"--config: cannot read {path}: {error.strerror}") from None
        except ValueError as error:  # not UTF-8, or not JSON
            raise UserError(f"{path}: not JSON: {error}") from None
        if not isinstance(raw, dict):
            raise UserError(f"{path}: found {type(raw).__name__}, expected an object with the sections of a run")
        problems = _override(raw, overrides)
        return cls.check(raw, world_size, source=str(path), problems=problems)

    @classmethod
    def check(
        cls,
        raw: dict[str, Any],
        world_size: int = 1,
        *,
        source: str = "configuration",
        problems: Iterable[str] = (),
    ) -> Self:
        """The configuration that `raw` is, of this version or an earlier one. Raises UserError with every problem found.

        Args:
            raw: the sections as read from JSON.
            source: where they are from, for the message.
            problems: what was found wrong before.
        """
        raw, problems = upgrade(raw), list(problems)
        known = known_fields(raw.get("model"))
        problems += [
            f"{name}: unknown section{suggest.nearest(name, '', known)}"
            for name in raw.keys() - cls.model_fields.keys()
        ]
        sections: dict[str, Any] = {}
        for name in cls.model_fields:
            if name == "deepspeed":
                sections[name] = raw.get(name, {})
                problems += deepspeed_problems(sections[name], lambda key: suggest.nearest(key, "deepspeed", known))
            else:
                sections[name], found = _section(name, raw, known)
                problems += found
        problems += _relations(sections, world_size)
        problems += _missing_shards(raw.get("data"))
        if problems:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise UserError(f"{source}: {count}\n" + "\n".join(f"  {problem}" for problem in problems))
        return cls(**sections)

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    def changes_since(self, saved: Self) -> dict[str, tuple[Any, Any]]:
        """Fields whose value differs from `saved`, as {name: (saved, now)}.

        Raises UserError naming those that a resumed run may not change.
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


# ---- one section ---------------------------------------------------------------------------------------------------------


def cell_configs() -> dict[str, type[BaseModel]]:
    """The kinds of the section `model`, by the name of the cell."""
    members = get_args(get_args(ModelConfig)[0])
    return {member.model_fields["cell"].default: member for member in members}


def known_fields(model: Any = None) -> dict[str, Collection[str]]:
    """The names of the fields of every section; of `model` those of the cell that the raw section names, else of the first."""
    cells = cell_configs()
    cell = str(model.get("cell")) if isinstance(model, dict) else ""
    known: dict[str, Any] = {"model": cells.get(cell, next(iter(cells.values()))).model_fields}
    for name, field in RunConfig.model_fields.items():
        if name not in ("model", "deepspeed"):
            known[name] = field.annotation.model_fields  # type: ignore[union-attr]  # every other section is a model
    return {name: known.get(name, PASSED_THROUGH) for name in RunConfig.model_fields}


def _section(name: str, raw: dict[str, Any], known: dict[str, Any]) -> tuple[Any, list[str]]:
    """The section, None where it has problems -> and these."""
    field, found = RunConfig.model_fields[name], raw.get(name, {})
    annotation: Any = field.annotation
    if name == "model":
        cells = cell_configs()
        cell = found.get("cell", "memformer") if isinstance(found, dict) else "memformer"
        if cell not in cells:
            return None, [f"model.cell: found {cell!r}{suggest.nearest(str(cell), 'cells', {'cells': cells})}"]
        annotation = cells[cell]

    def unknown(path: str) -> str:
        if path.startswith("mrbp.window."):
            shape = next(x for x in SHAPES.values() if x and x.model_fields.keys() & raw["mrbp"]["window"].keys())
            return suggest.nearest(path.rpartition(".")[2], "window", {"window": shape.model_fields})
        return suggest.nearest(path.partition(".")[2], name, known)

    def missing(path: str) -> str:
        fields = annotation.model_fields
        for shape in (x for x in SHAPES.values() if x and path.startswith("mrbp.window.")):
            fields = fields | shape.model_fields
        field = fields.get(path.rpartition(".")[2])
        return f"; {(field and field.description) or 'required'}"

    try:
        section = TypeAdapter(annotation).validate_python(found)
    except ValidationError as error:
        if name == "training" and isinstance(found, dict) and found.get("precision") == "fp16":
            return None, [
                f"training.precision: found 'fp16', expected 'fp32' or 'bf16'; {NO_FP16}"
                if ": found 'fp16'" in x
                else x
                for x in sentences(error, name, unknown=unknown, missing=missing)
            ]
        return None, sentences(error, name, unknown=unknown, missing=missing)
    if name not in raw and field.is_required():  # and all of its fields have defaults
        return section, [f"{name}: missing section"]
    return section, []


def _override(raw: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Apply `a.b=value` (JSON, or else a string) in place; return what could not be."""
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        *parents, last = path.split(".")
        if not equals or not path or not (parents or last in RunConfig.model_fields):
            meant = suggest.elsewhere(last, "", known_fields(raw.get("model"))) if path else None
            problems.append(
                f"--set {override}: expected section.field=value{f', did you mean {meant}?' if meant else ''}"
            )
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                problems.append(f"--set {override}: {parent} is not a section")
                break
        else:
            node[last] = value
    return problems


# ---- what relates sections -----------------------------------------------------------------------------------------------


def _relations(sections: dict[str, Any], world_size: int) -> Iterator[str]:
    """Problems that take two fields, or a field and the number of ranks, to see; a section with problems of its own is None."""
    data, mrbp, training = (sections.get(name) for name in ("data", "mrbp", "training"))
    stage = zero_stage(sections["deepspeed"])
    if data is not None:
        yield from _lanes_and_ranks(data, mrbp, world_size)
        yield from _stream(data)
    if mrbp is not None:
        yield from _readout(data, mrbp, world_size)
    if mrbp is not None and training is not None:
        yield from _window(mrbp, training)
        yield from _sharded_gradients(mrbp, training, stage)


def _lanes_and_ranks(data: DataConfig, mrbp: MrbpConfig | None, world_size: int) -> Iterator[str]:
    share, rest = divmod(data.lanes, world_size)
    if rest:
        multiple = max(world_size, round(data.lanes / world_size) * world_size)
        yield f"data.lanes: found {data.lanes}, expected a multiple of the {world_size} ranks, {multiple} for example"
    elif mrbp is not None and mrbp.lanes_per_group and share % mrbp.lanes_per_group:
        yield (
            f"mrbp.lanes_per_group: found {mrbp.lanes_per_group}, expected a divisor of the {share} lanes of a rank"
            f" (data.lanes {data.lanes} on {world_size} ranks)"
        )


def _stream(data: DataConfig) -> Iterator[str]:
    if data.mode != "stream":
        return
    for field, value, expected in (
        ("corpus", {name: weight for name, weight in data.corpora.items() if weight != 1}, "weights of 1"),
        ("min_tokens", data.min_tokens if data.min_tokens > 1 else None, "1"),
        ("shuffle_shards", data.shuffle_shards, "null"),
    ):
        if value:
            yield (
                f"data.{field}: found {value} with data.mode 'stream', which joins all documents in their order; expected"
                f" {expected}, or mode 'documents'"
            )


def _readout(data: DataConfig | None, mrbp: MrbpConfig, world_size: int) -> Iterator[str]:
    if mrbp.readout_parts > 1 and mrbp.readout_group != 1:
        yield (
            f"mrbp.readout_parts: found {mrbp.readout_parts} with mrbp.readout_group {mrbp.readout_group!r}: one divides a"
            " readout, the other joins several; expected one of them to be 1"
        )
    if data is None:
        return
    lanes = mrbp.lanes_per_group or data.lanes // world_size
    if mrbp.readout_parts > max(1, lanes):
        yield (
            f"mrbp.readout_parts: found {mrbp.readout_parts}, expected at most the {lanes} lanes that are worked on at once"
        )


def _window(mrbp: MrbpConfig, training: TrainingConfig) -> Iterator[str]:
    window = mrbp.window
    if isinstance(window, WindowByMetric) and window.metric != "loss/train" and not training.evaluate_every_tokens:
        yield (
            f"mrbp.window.metric: found {window.metric!r}, which is measured during training only where"
            " training.evaluate_every_tokens is set"
        )


def _sharded_gradients(mrbp: MrbpConfig, training: TrainingConfig, stage: Any) -> Iterator[str]:
    if mrbp.reduce == "segment" and stage in (0, 1):
        yield (
            f"mrbp.reduce: found 'segment' with deepspeed.zero_optimization.stage {stage}, which does not shard"
            " gradients; expected 'window', or stage 2 or 3"
        )
    if training.precision == "bf16_parameters" and (mrbp.reduce != "segment" or stage in (0, 1)):
        yield (
            "training.precision: found 'bf16_parameters', whose fp32 gradients are sharded; expected with it"
            " mrbp.reduce 'segment' and deepspeed.zero_optimization.stage 2 or 3"
        )


def _missing_shards(data: Any) -> Iterator[str]:
    found = data.get("corpus") if isinstance(data, dict) else None
    corpora = [found] if isinstance(found, str) else found if isinstance(found, dict) else []  # else reported already
    for split in (Path(corpus) / split for corpus in corpora if not is_url(corpus) for split in ("train", "valid")):
        if not (split / "corpus.json").exists():
            yield f"data.corpus: no token shards in {split}; tokenizer/shard.py writes them"
