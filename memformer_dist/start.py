"""How a run was started: recorded in its folder, and the first lines of its log. Rank 0 alone."""

import json
import logging
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from memformer_dist.advice import Sizes, Source, advice
from memformer_dist.cells.check import parameter_problems
from memformer_dist.checkpoint import Checkpoint, Damaged, build_cell
from memformer_dist.config import RunConfig
from memformer_dist.curriculum import WindowByMetric
from memformer_dist.data.dataset import TokenDataset
from memformer_dist.data.labels import expect_labels
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.open_data import Epoch, first_epoch
from memformer_dist.data.pieces import Pieces
from memformer_dist.data.task_documents import TaskReader
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import UserError, shortened
from memformer_dist.evaluate import MODES, Plan
from memformer_dist.files import read_json_lines, write_bytes, write_text
from memformer_dist.host_memory import free_bytes
from memformer_dist.optimizer import decay_start, learning_rate
from memformer_dist.places import PLACES, STARTS, Places, recorded
from memformer_dist.tokenizer import file_name_of
from memformer_dist.vocabulary import Vocabulary
from memformer_dist.world import World, ranks_on_hosts

CONFIG = "config.json"  # in a run's folder
# Fields that the learning rate of a step depends on.
OF_THE_SCHEDULE = (
    "training.tokens",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.decay_share",
    "optimizer.final_learning_rate_ratio",
    "optimizer.warmup_tokens",
)
PACKAGES = ("torch", "deepspeed", "webdataset", "sentencepiece", "tensorboard", "numpy", "pydantic", "safetensors")
log = logging.getLogger(__name__)


def record(
    run_dir: Path, config: RunConfig, tokenizer: Path | None, world: World, step: int, initial: Checkpoint | None = None
) -> None:
    """Write config.json and the tokenizer; append what started the run, where and with which versions to starts.jsonl.

    Args:
        tokenizer: None on a task.
        initial: the checkpoint of another run, by training.init_from, whose weights this run starts with.
    """
    write_text(run_dir / CONFIG, config.to_json())
    if tokenizer is not None:
        raw = tokenizer.read_bytes()
        write_bytes(run_dir / file_name_of(raw), raw)
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [recorded(word) for word in (sys.executable, *sys.argv)],
        "step": step,
        "world_size": world.size,
        "launcher": world.launch.by,
        "hosts": list(dict.fromkeys(world.hosts)),
        "job": world.launch.job,
        "init_from": initial and {"checkpoint": recorded(str(initial.path)), **_where(initial)},
        "git": commit(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        PLACES: Places.of_run(run_dir).seen(config.paths),
    }
    path = run_dir / STARTS
    lines = [line for line, _ in read_json_lines(path)]
    write_bytes(path, b"".join([*lines, json.dumps(entry).encode() + b"\n"]))


def _where(saved: Checkpoint) -> dict[str, int]:
    return saved.contents.position.model_dump(include={"step", "tokens"})


def commit() -> str | None:
    """The commit of the checkout that this file lies in; None if it lies in none or the machine has no git."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True)
    except FileNotFoundError:
        return None
    return found.stdout.decode(errors="replace").strip() or None


def introduce(config: RunConfig, world: World, reader: WindowReader | TaskReader, window: int, parameters: int) -> None:
    """Log the sizes of model, corpus and step; `window` is that of the next step, in segments."""
    data, corpus = config.data, reader.dataset
    documents = f"{corpus.path}, new documents in every step"
    if isinstance(reader, WindowReader):
        epoch = first_epoch(corpus, reader.schedule)
        documents = (
            f"an epoch is {epoch.documents:,} documents, {epoch.tokens:,} tokens, {epoch.padding:.1%} of the positions are"
            " padding"
        )
    log.info(
        f"{parameters:,} parameters, vocabulary {corpus.vocabulary.size}; {documents}; {world.size} ranks on"
        f" {world.device.type}, ZeRO {config.zero_stage}, {config.training.precision}; a step is {data.lanes} lanes x"
        f" {window} segments x {data.segment_length} tokens"
        + ("" if isinstance(config.mrbp.window, int) else f"; mrbp.window: {config.mrbp.window}")
    )
    if not world.launch.is_alone:
        job = f", job {world.launch.job}" if world.launch.job else ""
        log.info(f"started by {world.launch.by}{job}: {ranks_on_hosts(range(world.size), world.hosts)}")
    if isinstance(reader, WindowReader):
        _warn_of_copies(config, epoch, reader.schedule)


def _warn_of_copies(config: RunConfig, epoch: Epoch, schedule: LaneSchedule) -> None:
    data = config.data
    # Of interest where an epoch is short; of millions of documents it would take as long as dealing them again.
    copies = schedule.concurrent_copies() if epoch.documents < 100 * data.lanes else 1
    if copies > 1:
        log.warning(
            f"data.lanes={data.lanes} is large for this corpus: up to {copies} lanes will read the same document at the"
            " same time. Use fewer lanes or more text."
        )


def introduce_evaluations(config: RunConfig, plan: Plan) -> None:
    """Log how much the evaluations read. advise() warns where it is much beside the training."""
    training = config.training
    limit, every = training.final_evaluate_segments, training.evaluate_every_tokens
    said = (
        f"the evaluation at the end reads {plan.segments(limit):,} segments per lane, {plan.tokens(limit):,} tokens, in"
        f" {len(MODES)} ways"
    )
    if every is not None and (number := (training.tokens - 1) // every):
        said += f"; the {number:,} on the way read {plan.segments(training.evaluate_segments):,} segments per lane each"
    log.info(said)


def expect_trainable(config: RunConfig, vocabulary: Vocabulary) -> None:
    """Raises UserError if weights break rule 8 of cells, or do not fit into memory: every rank draws them all on the CPU."""
    try:
        with torch.device("meta"):
            cell = build_cell(config, vocabulary)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise UserError(f"model: its sizes are too large: {str(error).splitlines()[0]}") from None
    if problems := list(parameter_problems(cell)):
        raise UserError("\n".join(f"model: {problem}" for problem in problems))
    numbers = sum(parameter.numel() for parameter in cell.parameters())
    needed = sum(parameter.nbytes for parameter in cell.parameters())
    free = free_bytes(torch.device("cpu"))
    if needed > free:
        raise UserError(
            f"model: found {numbers:,} parameters, which take {needed / 2**30:,.1f} GiB on each rank when they are drawn;"
            f" {free / 2**30:,.1f} GiB of this machine are free for each"
        )


class Labels(NamedTuple):
    share: float  # of the tokens of an epoch, those whose label counts in the loss
    facts: list[str]  # about documents without any


def find_labels(config: RunConfig, corpora: tuple[TokenDataset, TokenDataset]) -> Labels:
    """What loss masks leave of the training split and of the validation split.

    Raises UserError if they leave nothing of the training split, which would be read for ever, or nothing of a validation
    split whose figures the run depends on.
    """
    train, valid = corpora
    names = list(config.data.corpora)
    share, facts = expect_labels(train, train.sources(config.data.min_tokens), names)
    try:
        _, of_valid = expect_labels(valid, valid.sources(), names)
        facts += [f"{fact} (validation split)" for fact in of_valid]
    except UserError as error:
        window = config.mrbp.window
        depends = [
            *(["training.early_stopping_patience"] if config.training.early_stopping_patience is not None else []),
            *(["mrbp.window.metric"] if isinstance(window, WindowByMetric) and window.metric != "loss/train" else []),
        ]
        if depends:
            raise UserError(f"{', '.join(depends)}: found without a figure of the validation split\n{error}") from None
        facts.append(
            "data.corpus: no label of the validation split counts in the loss: evaluations will have no figures"
        )
    return Labels(share, facts)


def advise(
    config: RunConfig,
    train: TokenDataset,
    schedule: LaneSchedule,
    labels: Labels,
    evaluation: Plan,
    *,
    replays: bool,
) -> None:
    """Log which settings will not do what they say. `replays`: see advice.Sizes."""
    data = config.data
    sources, epoch = train.sources(data.min_tokens), first_epoch(train, schedule)
    sizes = Sizes(
        tokens=epoch.tokens,
        labels=labels.share,
        padding=epoch.padding,
        longest=max(int(train.lengths[source.documents].max()) for source in sources),
        sources=[
            Source(name, float(source.weight), len(source.documents))
            for name, source in zip(data.corpora, sources, strict=False)  # a stream is one source
        ],
        shards=None if train.shard_ends is None else len(train.shard_ends),
        evaluation_segments=evaluation.segments(),
        evaluation_tokens=evaluation.tokens(),
        is_cut=isinstance(evaluation.dataset, Pieces),
        is_remote=train.is_remote,
        replays=replays,
    )
    for sentence in (*labels.facts, *advice(config, sizes)):
        log.warning(sentence)


def introduce_fresh(run_dir: Path, initial: Checkpoint | None) -> None:
    """Log that an earlier start has left no checkpoint, and from which one of another run the weights are."""
    if (run_dir / CONFIG).exists():
        log.info(f"{run_dir}: an earlier start has left no checkpoint, so the run starts from the beginning")
    if initial is not None:
        position = initial.contents.position
        log.info(
            f"training.init_from: the weights are those of {initial.path}, at step {position.step},"
            f" {position.tokens:,} tokens; moments, learning rate, states and documents begin anew"
        )


def introduce_resumed(
    resumed: Checkpoint | None, config: RunConfig, changes: dict[str, tuple[Any, Any]], window: int, cell: nn.Module
) -> None:
    """Log where the run resumes, what has changed and what that does; `window` is that of the next step."""
    if resumed is None:
        return
    position = resumed.contents.position
    log.info(f"resumed from {resumed.path} at step {position.step}, {position.tokens:,} tokens")
    for name, (then, now) in changes.items():
        log.info(f"changed since: {name} was {then!r}, is {now!r}")
    if "mrbp.window" in changes:
        log.info(f"windows of {window} segments from here")
    if fields := [name for name in OF_THE_SCHEDULE if name in changes]:
        _introduce_learning_rate(resumed, config, ", ".join(fields))
    frozen = {name for name, parameter in cell.named_parameters() if not parameter.requires_grad}
    trained = {name for name, _ in cell.named_parameters()} - frozen
    if thawed := sorted(trained - resumed.trained):
        log.warning(f"trained from here on, frozen until now, Adam's moments start at zero: {shortened(thawed)}")
    if dropped := sorted(frozen & resumed.trained):
        log.warning(f"frozen from here on, Adam's moments are dropped: {shortened(dropped)}")


def _introduce_learning_rate(resumed: Checkpoint, config: RunConfig, fields: str) -> None:
    """Log what changed `fields` do to the learning rate."""
    saved, tokens = resumed.contents.config, resumed.contents.position.tokens
    if tokens >= config.training.tokens:
        log.info(f"training.tokens: {tokens:,} are trained on already, so the run ends here")
        return
    then, now = (learning_rate(x.optimizer, tokens, x.training.tokens) for x in (saved, config))
    if now == then:
        log.info(f"{fields}: the learning rate stays {now:.4g} at this step")
    else:
        log.log(
            logging.WARNING if now > then else logging.INFO,
            f"{fields}: the learning rate goes from {then:.4g} to {now:.4g} at this step",
        )
    decay = decay_start(saved.optimizer, saved.training.tokens)
    if now > then and saved.optimizer.schedule == config.optimizer.schedule == "warmup_stable_decay" and tokens > decay:
        before = _last_before(resumed.path.parent, decay)
        log.warning(
            "this checkpoint lies in the decay"
            + ("" if before is None else f"; {before} does not: to resume from there, move the later ones elsewhere")
        )


def _last_before(checkpoints: Path, tokens: int) -> Path | None:
    """The newest checkpoint that has been trained on at most so many tokens."""
    for path in sorted(checkpoints.glob("step-[0-9]*"), reverse=True):
        with suppress(Damaged, UserError):
            if Checkpoint(path).contents.position.tokens <= tokens:
                return path
    return None
