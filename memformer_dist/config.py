"""RunConfig: the one typed configuration of a run, read from one JSON file and `--set section.field=value`.

Unknown keys are rejected and all problems are reported in one error, because a job that waited a night in a queue should
not die of the second typo. Each section is a model of its own; what relates two sections is checked in `_relations`.
"""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Iterable, Literal

from pydantic import BaseModel, Discriminator, Field, PositiveFloat, PositiveInt, Tag, ValidationError
from typing_extensions import Self

from memformer_dist.cells.memformer import MemformerConfig
from memformer_dist.curriculum import SHAPES, WindowByMetric
from memformer_dist.data.cache import CACHE_FOLDER, CACHE_GIB
from memformer_dist.data.corpus import is_url
from memformer_dist.data.open_data import Mode
from memformer_dist.errors import UserError
from memformer_dist.mrbp.settings import MrbpConfig
from memformer_dist.optimizer import OptimizerConfig
from memformer_dist.section import Section


def _folder_or_weights(value: Any) -> str | None:
    return "<folder>" if isinstance(value, str) else "<weights>" if isinstance(value, dict) and value else None


class DataConfig(Section):
    corpus: Annotated[
        Annotated[str, Tag("<folder>")] | Annotated[dict[str, PositiveFloat], Tag("<weights>")],
        Discriminator(
            _folder_or_weights,
            custom_error_type="corpus",
            custom_error_message="expected a folder, a URL, or an object of weights by folder or URL",
        ),
    ] = Field(
        description="folder or URL of a corpus written by tokenizer/shard.py; or several with their weights, how often the"
        " documents of each are dealt in an epoch: 2 is twice, 0.5 every second time"
    )
    mode: Mode = Field(
        "documents",
        description="documents: lanes read whole documents in a shuffled order, each from an empty memory; stream: all"
        " documents are joined by EOS and cut evenly among the lanes, as papers on WikiText-103 do",
    )
    min_tokens: PositiveInt = Field(1, description="shorter documents are left out of training")
    shuffle_shards: PositiveInt | None = Field(
        None,
        description="shuffle within groups of so many shards, in a random order of the shards; for remote corpora that the"
        " cache does not hold; null: through the whole epoch",
    )
    lanes: PositiveInt = Field(
        description="G, documents read side by side by all ranks together; the world size divides it"
    )
    segment_length: PositiveInt = Field(description="S, tokens a segment")
    seed: int = Field(0, ge=0, description="order of the documents")
    prefetch: int = Field(2, ge=0, description="segments prepared ahead of need")
    cache: str = Field(CACHE_FOLDER, description="where the shards of a remote corpus are kept on this machine")
    cache_gib: PositiveFloat = Field(CACHE_GIB, description="GiB that those of one split may take there")

    @property
    def schedule(self) -> dict[str, Any]:
        """What lane_schedule is told besides the documents."""
        return self.model_dump(include={"seed", "lanes", "segment_length", "min_tokens", "shuffle_shards"})

    @property
    def corpora(self) -> dict[str, float]:
        """Weights by folder or URL."""
        return {self.corpus: 1.0} if isinstance(self.corpus, str) else self.corpus


TAGS = {
    *SHAPES,
    "<auto>",
    "<folder>",
    "<weights>",
}  # of the members of unions, in pydantic's account of where an error lies


class TrainingConfig(Section):
    tokens: PositiveInt = Field(description="labels to train on, over all lanes and epochs: when the run ends")
    seed: int = Field(0, ge=0, description="initial weights and dropout")
    precision: Literal["fp32", "bf16", "bf16_parameters"] = Field(
        "fp32",
        description="bf16: autocast over fp32 parameters, fp32 gradients; bf16_parameters: bf16 parameters over sharded"
        " fp32 master weights and gradients, where fp32 parameters do not fit (needs mrbp.reduce segment)",
    )
    init_from: str | None = Field(None, description="run directory or checkpoint: its weights alone start a fresh run")
    evaluate_every_tokens: PositiveInt | None = Field(None, description="null: only at the end")
    evaluate_segments: PositiveInt | None = Field(
        None, description="segments a lane in evaluations on the way; null: all"
    )
    skipped_steps_limit: PositiveInt = Field(
        10, description="steps in a row with a non-finite gradient that end the run"
    )


class CheckpointConfig(Section):
    every_tokens: PositiveInt | None = Field(None, description="null: only at the end and when stopped")
    keep: int = Field(2, ge=2, description="newest checkpoints kept; two, so that a damaged one is survived")
    anchor_every_tokens: PositiveInt | None = Field(
        None, description="the first one after each multiple is never removed"
    )


class MonitorConfig(Section):
    log_every_steps: PositiveInt = 10
    device_peak_tflops: PositiveFloat | None = Field(None, description="for perf/mfu; null: known for some GPUs")


# What the section `deepspeed` may not name, and where it is said instead.
SET_BY_US = {
    "train_batch_size": "data.lanes",
    "train_micro_batch_size_per_gpu": "data.lanes and mrbp.lanes_per_group",
    "gradient_accumulation_steps": "mrbp.window and mrbp.lanes_per_group",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
    "bf16": "training.precision",
    "bfloat16": "training.precision",
    "fp16": "training.precision (fp16 itself is refused: loss scaling would multiply the memory's gradient at every segment)",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "data_types": "training.precision",
    "communication_data_type": "training.precision",
    "managed_gradient_accumulation": "mrbp.reduce",
    "gradient_predivide_factor": "nothing: the loss is normalised over all ranks",
    "prescale_gradients": "nothing: the loss is normalised over all ranks",
    "sparse_gradients": "nothing: it does not work under ZeRO",
    "zero_allow_untested_optimizer": "the engine",
    "zero_force_ds_cpu_optimizer": "the engine",
}
# What it may name. DeepSpeed itself passes over a misspelt key in silence.
PASSED_THROUGH = (
    "zero_optimization",
    "aio",
    "comms_logger",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
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
    model: MemformerConfig
    data: DataConfig
    mrbp: MrbpConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    deepspeed: dict[str, Any] = Field({}, description="handed to DeepSpeed, e.g. zero_optimization")

    @property
    def zero_stage(self) -> int:
        return _zero_stage(self.deepspeed)

    def lanes_per_group(self, world_size: int) -> int:
        return self.mrbp.lanes_per_group or self.data.lanes // world_size

    @classmethod
    def load(cls, path: Path, overrides: Iterable[str] = (), world_size: int = 1) -> Self:
        """Read, override and check. Raises UserError with every problem found."""
        try:
            raw = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"--config: cannot read {path}: {error.strerror}")
        except ValueError as error:  # not UTF-8, or not JSON
            raise UserError(f"{path}: not JSON: {error}")
        if not isinstance(raw, dict):
            raise UserError(f"{path}: found {type(raw).__name__}, expected an object with the sections of a run")
        problems = _override(raw, overrides)
        return cls.check(raw, world_size, source=str(path), problems=problems)

    @classmethod
    def check(
        cls, raw: dict, world_size: int = 1, *, source: str = "configuration", problems: Iterable[str] = ()
    ) -> Self:
        problems = list(problems)
        sections: dict[str, Any] = {}
        for name in raw.keys() - cls.model_fields.keys():
            problems.append(f"{name}: unknown section{_nearest(name, cls.model_fields)}")
        for name, field in cls.model_fields.items():
            if name == "deepspeed":
                sections[name] = raw.get(name, {})
                problems += _deepspeed_problems(sections[name])
                continue
            try:
                sections[name] = field.annotation.model_validate(raw.get(name, {}))
                if name not in raw and field.is_required():  # and all of its fields have defaults
                    problems.append(f"{name}: missing section")
            except ValidationError as error:
                problems += [_sentence(name, field.annotation, item) for item in error.errors()]
        problems += _relations(sections, world_size) + _missing_shards(raw)
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
            raise UserError(
                "this run cannot be resumed with another\n"
                + "\n".join(
                    f"  {name}: found {changes[name][1]!r}, the run has {changes[name][0]!r}" for name in refused
                )
                + "\nset them back, or start a fresh run in another --run-dir (training.init_from takes over the weights)"
            )
        return changes


def _flat(sections: dict) -> dict[str, Any]:
    flat = {"deepspeed": sections.pop("deepspeed")}
    for section, fields in sections.items():
        flat |= {f"{section}.{name}": value for name, value in fields.items()}
    return flat


def _override(raw: dict, overrides: Iterable[str]) -> list[str]:
    """Apply `a.b=value` (JSON, or else a string) in place; return what could not be."""
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            problems.append(f"--set {override}: expected section.field=value")
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        *parents, last = path.split(".")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                problems.append(f"--set {override}: {parent} is not a section")
                break
        else:
            node[last] = value
    return problems


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]}?" if close else f", expected one of {', '.join(known)}"


def _sentence(section: str, model: type[BaseModel], error: dict) -> str:
    """One problem found by pydantic, in words: the field, what was found, what was expected."""
    known, location = model.model_fields, [section]
    for part in error["loc"]:
        if part in TAGS:  # of the shape that a value was taken for
            known = SHAPES[part].model_fields if SHAPES.get(part) else known
        elif part != "[key]":
            location.append(str(part))
    field, name = ".".join(location), location[-1]
    if error["type"] == "extra_forbidden":
        return f"{field}: unknown key{_nearest(name, known)}"
    if error["type"] == "missing":
        return f"{field}: missing; {(known[name].description if name in known else None) or 'required'}"
    if field == "training.precision" and error["input"] == "fp16":
        return f"{field}: found 'fp16', expected 'fp32' or 'bf16'; {SET_BY_US['fp16'].partition('(')[2].rstrip(')')}"
    if error["type"] == "value_error":  # a validator of ours: the message says what was found
        return f"{field}: {error['ctx']['error']}"
    return f"{field}: found {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}"


def _zero_stage(deepspeed: Any) -> Any:
    """Of the section as it stands in the file; None where it is not of its shape."""
    zero = deepspeed.get("zero_optimization", {}) if isinstance(deepspeed, dict) else None
    return zero.get("stage", 0) if isinstance(zero, dict) else None


def _deepspeed_problems(section: Any) -> list[str]:
    if not isinstance(section, dict):
        return [f"deepspeed: found {section!r}, expected an object"]
    problems = [f"deepspeed.{key}: is not set here but by {SET_BY_US[key]}" for key in section if key in SET_BY_US]
    problems += [
        f"deepspeed.{key}: unknown key{_nearest(key, PASSED_THROUGH)}"
        for key in section
        if key not in (*SET_BY_US, *PASSED_THROUGH)
    ]
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict):
        problems.append(f"deepspeed.zero_optimization: found {zero!r}, expected an object with a stage")
    elif (stage := zero.get("stage", 0)) not in (0, 1, 2, 3):
        problems.append(f"deepspeed.zero_optimization.stage: found {stage!r}, expected 0, 1, 2 or 3")
    return problems


def _relations(sections: dict[str, Any], world_size: int) -> list[str]:
    """Problems that take two sections, or a section and the world, to see; sections with problems of their own are absent."""
    data, mrbp, training = (sections.get(name) for name in ("data", "mrbp", "training"))
    problems = []
    if data is not None:
        share, rest = divmod(data.lanes, world_size)
        if rest:
            nearest = max(world_size, round(data.lanes / world_size) * world_size)
            problems.append(
                f"data.lanes: found {data.lanes}, which the world size of {world_size} ranks does not divide; {nearest}"
                " would do"
            )
        elif mrbp is not None and mrbp.lanes_per_group and share % mrbp.lanes_per_group:
            problems.append(
                f"mrbp.lanes_per_group: found {mrbp.lanes_per_group}, which does not divide the {share} lanes of a rank"
                f" (data.lanes {data.lanes} on {world_size} ranks)"
            )
        if data.mode == "stream":
            problems += [
                f"data.{field}: found {value} with data.mode 'stream', which joins all documents in their order;"
                f" expected {expected}, or mode 'documents'"
                for field, value, expected in (
                    ("corpus", {name: weight for name, weight in data.corpora.items() if weight != 1}, "weights of 1"),
                    ("min_tokens", data.min_tokens if data.min_tokens > 1 else None, "1"),
                    ("shuffle_shards", data.shuffle_shards, "null"),
                )
                if value
            ]
    if mrbp is not None and mrbp.readout_parts > 1 and mrbp.readout_group != 1:
        problems.append(
            f"mrbp.readout_parts: found {mrbp.readout_parts} with mrbp.readout_group {mrbp.readout_group!r}, which is for"
            " the opposite; expected one of them to be 1"
        )
    if mrbp is not None and data is not None and mrbp.readout_parts > max(1, lanes := mrbp.lanes_per_group or share):
        problems.append(
            f"mrbp.readout_parts: found {mrbp.readout_parts}, expected no more than the {lanes} lanes that are worked on at once"
        )
    if mrbp is None or training is None:
        return problems
    window = mrbp.window
    if isinstance(window, WindowByMetric) and window.metric != "loss/train" and not training.evaluate_every_tokens:
        problems.append(
            f"mrbp.window.metric: found {window.metric!r}, which is measured on the way only where"
            " training.evaluate_every_tokens is set"
        )
    stage = _zero_stage(sections["deepspeed"])
    if mrbp.reduce == "segment" and stage in (0, 1):
        problems.append(
            f"mrbp.reduce: found 'segment' with deepspeed.zero_optimization.stage {stage}, which does not shard"
            " gradients; expected 'window', or stage 2 or 3"
        )
    if training.precision == "bf16_parameters" and (mrbp.reduce != "segment" or stage in (0, 1)):
        problems.append(
            "training.precision: found 'bf16_parameters', whose fp32 gradients are sharded; expected with it"
            " mrbp.reduce 'segment' and deepspeed.zero_optimization.stage 2 or 3"
        )
    return problems


def _missing_shards(raw: dict) -> list[str]:
    data = raw.get("data")
    found = data.get("corpus") if isinstance(data, dict) else None
    corpora = [found] if isinstance(found, str) else found if isinstance(found, dict) else []  # else: already told
    splits = [Path(corpus) / split for corpus in corpora if not is_url(corpus) for split in ("train", "valid")]
    return [
        f"data.corpus: no token shards in {split}; tokenizer/shard.py writes them"
        for split in splits
        if not (split / "corpus.json").exists()
    ]
