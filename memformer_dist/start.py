"""How a run was started: recorded in its folder, and the first lines of its log. Rank 0 alone."""

import json
import logging
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from memformer_dist.checkpoint import Checkpoint
from memformer_dist.config import RunConfig
from memformer_dist.data.dataset import TokenDataset
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.open_data import first_epoch
from memformer_dist.files import read_json_lines, write_bytes, write_text
from memformer_dist.world import World, ranks_on_hosts

PACKAGES = ("torch", "deepspeed", "webdataset", "sentencepiece", "tensorboard", "numpy", "pydantic", "safetensors")
log = logging.getLogger(__name__)


def record(run_dir: Path, config: RunConfig, tokenizer: Path, world: World, step: int) -> None:
    """Write config.json and tokenizer.model; append what started the run where, with which versions, to starts.jsonl."""
    write_text(run_dir / "config.json", config.to_json())
    write_bytes(run_dir / "tokenizer.model", tokenizer.read_bytes())
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [sys.executable, *sys.argv],
        "step": step,
        "world_size": world.size,
        "launcher": world.launch.by,
        "hosts": list(dict.fromkeys(world.hosts)),
        "job": world.launch.job,
        "git": _commit(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    path = run_dir / "starts.jsonl"
    lines = [line for line, _ in read_json_lines(path)]
    write_bytes(path, b"".join([*lines, json.dumps(entry).encode() + b"\n"]))


def _commit() -> str | None:
    """The commit of the checkout that this file lies in; None if it lies in none or the machine has no git."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def introduce(
    config: RunConfig, world: World, corpus: TokenDataset, schedule: LaneSchedule, window: int, parameters: int
) -> None:
    """Log the sizes of model, corpus and step; `window` is that of the next step, in segments."""
    data, epoch = config.data, first_epoch(corpus, schedule)
    log.info(
        f"{parameters:,} parameters, vocabulary {corpus.vocabulary.size}; an epoch is {epoch.documents:,} documents,"
        f" {epoch.tokens:,} tokens, {epoch.padding:.1%} of the positions are padding; {world.size} ranks on"
        f" {world.device.type}, ZeRO {config.zero_stage}, {config.training.precision}; a step is {data.lanes} lanes x"
        f" {window} segments x {data.segment_length} tokens"
        + ("" if isinstance(config.mrbp.window, int) else f"; mrbp.window: {config.mrbp.window}")
    )
    if not world.launch.is_alone:
        job = f", job {world.launch.job}" if world.launch.job else ""
        log.info(f"started by {world.launch.by}{job}: {ranks_on_hosts(range(world.size), world.hosts)}")
    # Of interest where an epoch is short; of millions of documents it would take as long as dealing them again.
    copies = schedule.concurrent_copies() if epoch.documents < 100 * data.lanes else 1
    if copies > 1:
        log.warning(
            f"data.lanes={data.lanes} is large for this corpus: up to {copies} lanes will read the same document at the"
            " same time. Use fewer lanes or more text."
        )


def introduce_resumed(resumed: Checkpoint | None, changes: dict[str, tuple[Any, Any]], window: int) -> None:
    """Log where the run resumes and which fields have changed; `window` is that of the next step, in segments."""
    if resumed is not None:
        position = resumed.contents.position
        log.info(f"resumed from {resumed.path} at step {position.step}, {position.tokens:,} tokens")
    for name, (then, now) in changes.items():
        log.info(f"changed since: {name} was {then!r}, is {now!r}")
    if "mrbp.window" in changes:
        log.info(f"windows of {window} segments from here")
