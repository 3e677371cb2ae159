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
from memformer_dist.places import PLACES, STARTS, Places, recorded
from memformer_dist.tokenizer import file_name_of
from memformer_dist.world import World

PACKAGES = ("torch", "deepspeed", "webdataset", "sentencepiece", "tensorboard", "numpy", "pydantic", "safetensors")
log = logging.getLogger(__name__)


def record(run_dir: Path, config: RunConfig, tokenizer: Path, world_size: int, step: int) -> None:
    """Write config.json and the tokenizer; append command, versions, git commit, time and places to starts.jsonl."""
    write_text(run_dir / "config.json", config.to_json())
    raw = tokenizer.read_bytes()
    write_bytes(run_dir / file_name_of(raw), raw)
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [recorded(word) for word in (sys.executable, *sys.argv)],
        "step": step,
        "world_size": world_size,
        "git": _commit(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        PLACES: Places.of_run(run_dir).seen(config.paths),
    }
    path = run_dir / STARTS
    lines = [line for line, _ in read_json_lines(path)]
    write_bytes(path, b"".join([*lines, json.dumps(entry).encode() + b"\n"]))


def _commit() -> str | None:
    """The commit of the checkout that this file lies in; None if it lies in none or the machine has no git."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True)
    except FileNotFoundError:
        return None
    return found.stdout.decode(errors="replace").strip() or None


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
