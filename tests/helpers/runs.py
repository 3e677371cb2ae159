"""Whole training runs on the ranks of a test, and what they leave on disk."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from memformer_dist import logs
from memformer_dist.config import RunConfig
from memformer_dist.data.open_data import open_data
from memformer_dist.runtime import lock_run_dir

SEGMENT_LENGTH = 16  # tokens
STEP_TOKENS = 8 * 3 * SEGMENT_LENGTH  # lanes x segments x tokens, padding included

# The section `model` of every cell but Memformer: tiny, with dropout.
TINY = {"width": 16, "heads": 2, "feed_forward": 32, "layers": 2, "dropout": 0.2}
MODELS = {
    "plain": TINY,
    "rmt": TINY | {"slots": 3, "init_std": 0.25},
    "armt": TINY | {"write_tokens": 3, "memory_width": 8, "init_std": 0.25},
    "hmt": TINY | {"slots": 4, "sensory_tokens": 5, "init_std": 0.25},
    "transformer_xl": TINY | {"memory_length": 8, "init_std": 0.25},
    "lamemo": TINY | {"layers": 2, "memory_length": 8, "init_std": 0.25},
    "gated_delta": TINY | {"chunk": 8, "init_std": 0.25},
    "mom": TINY | {"memories": 3, "chunk": 8, "init_std": 0.25},
    "hadamard": TINY | {"calibrations": 8, "init_std": 0.25},
    "titans": TINY | {"memory_depth": 2, "expansion": 2, "chunk": 8, "init_std": 0.25},
}


def settings(corpus: Path, *, stage=0, dropout=0.0, tokens=20 * STEP_TOKENS, **sections) -> dict:
    """A configuration of STEP_TOKENS per step; `sections` override fields, for instance mrbp={"window": 5}."""
    raw = {
        "model": {
            "width": 16,
            "heads": 2,
            "feed_forward": 32,
            "slots": 4,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "dropout": dropout,
        },
        "data": {"corpus": str(corpus), "lanes": 8, "segment_length": 16},
        "mrbp": {"window": 3},
        "optimizer": {"learning_rate": 3e-3, "warmup_tokens": 2 * STEP_TOKENS},
        "training": {"tokens": tokens},
        "monitor": {"log_every_steps": 1},
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }
    for name, fields in sections.items():
        raw[name] |= fields
    return raw


def run_rank(world, raw: dict, run_dir: Path, stop_after: int | None = None) -> None:
    """A run on this rank without its final evaluation, asked to stop after a given step."""
    from memformer_dist.train import Trainer

    config = RunConfig.check(raw, world.size)
    run_dir.mkdir(parents=True, exist_ok=True)
    corpora = open_data(config.data)
    logs.start(world.rank, run_dir / logs.FILE)
    with lock_run_dir(run_dir, world):
        trainer = Trainer(config, run_dir, corpora, world)
        agreed = trainer.stop.agreed
        trainer.stop.agreed = lambda: "the test" if trainer.position.step == stop_after else agreed()
        reason = trainer.fit()
        assert (reason is not None) == (stop_after is not None)
        trainer.close()


def interrupted_rank(world, cases) -> None:
    """Each case is (raw, folder): a run of its own, and the same run stopped half-way and resumed."""
    for raw, folder in cases:
        run_rank(world, raw, folder / "whole")
        run_rank(world, raw, folder / "parts", stop_after=4)
        assert int(last_checkpoint(folder / "parts").name.removeprefix("step-")) == 4
        run_rank(world, raw, folder / "parts")


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl, which must be JSON in the strict sense: without NaN and Infinity."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def records(run_dir: Path, *names: str, having: str = "loss/train") -> list[tuple]:
    """(step, tokens, *names) of the lines that have the metric `having`."""
    lines = [line for line in metrics(run_dir) if having in line]
    return [tuple(line.get(name) for name in ("step", "tokens", *names)) for line in lines]


def steps_logged(run_dir: Path) -> int:
    """Of a run that may not have begun."""
    return len(records(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def starts(run_dir: Path) -> list[dict]:
    """The lines of starts.jsonl; none where there is no such file yet."""
    path = run_dir / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_same_run(found: Path, expected: Path) -> None:
    """Equal losses at equal steps, and equal weights, moments and lane states at the end, to the last bit."""
    assert records(found, "loss/train") == records(expected, "loss/train") and len(records(found)) > 1
    for prefix in ("weights", "moments", "lanes"):
        one, other = (tensors(last_checkpoint(run), prefix) for run in (found, expected))
        assert one.keys() == other.keys() and one
        assert all(torch.equal(one[name], other[name]) for name in one)


def last_checkpoint(run_dir: Path) -> Path:
    """The folder of the latest step."""
    return max((run_dir / "checkpoints").glob("step-*"))


def tensors(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """All tensors of the "weights", "moments" or "lanes" of a checkpoint."""
    found = {}
    for path in sorted(checkpoint.glob(f"{prefix}-*.safetensors")):
        found |= {f"{path.name if prefix == 'lanes' else ''}{name}": x for name, x in load_file(path).items()}
    return found
