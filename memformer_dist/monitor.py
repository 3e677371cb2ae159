"""What a run tells: TensorBoard, metrics.jsonl and a progress bar, from rank 0.

TensorBoard gets every scalar twice: RUN_DIR/tensorboard/steps has it by step, RUN_DIR/tensorboard/tokens by trained
tokens, which is what runs of different batch sizes are compared by. Names of the latter begin with `tokens/`:
TensorBoard draws equal names into one chart, where thousands of steps would be a point beside billions of tokens.
metrics.jsonl has one object a record, with "step", "tokens" and "time"; null is a value that was not finite.

A curve is a list in metrics.jsonl and a histogram in TensorBoard, one a record, whose buckets count nothing but draw:
bucket x = 1, 2, ... reaches from x - 1/2 to x + 1/2 and is as high as the value there. In memory/grad_norm_by_boundary
x is the number of segments before the window's end; the list has the boundaries from the window's start on.

What a run wrote after the checkpoint that it resumes from is dropped, as it is about to be written again.
"""

import json
import math
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from memformer_dist.progress import Position
from memformer_dist.segment import IGNORE, Segment
from memformer_dist.world import World

PACKAGES = ("torch", "deepspeed", "webdataset", "sentencepiece", "tensorboard", "numpy", "pydantic", "safetensors")
# Dense bf16 tensor-core peaks of the makers' data sheets, in TFLOP/s, for perf/mfu.
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}


class Monitor:
    """Rank 0's reporting; on other ranks every call does nothing."""

    def __init__(self, run_dir: Path, position: Position, total_tokens: int, *, is_main: bool):
        self.bar = None
        if not is_main:
            return
        # A purge takes all curves of a folder back to one x, hence a folder for each axis. Also at step 0: a run
        # killed before its first checkpoint starts again.
        folder = run_dir / "tensorboard"
        self.by_step = SummaryWriter(str(folder / "steps"), purge_step=position.step + 1)
        self.by_tokens = SummaryWriter(str(folder / "tokens"), purge_step=position.tokens + 1)
        self.records = _continue(run_dir / "metrics.jsonl", position).open("a")
        self.bar = tqdm(
            total=total_tokens, initial=position.tokens, unit="tok", unit_scale=True, smoothing=0.1, desc="train"
        )

    def log(self, position: Position, scalars: dict[str, float], curves: dict[str, list[float]] | None = None) -> None:
        """One record.

        Args:
            curves: values, not negative, at x = n, n - 1, ... 1: the last of a list is drawn at x = 1. TensorBoard gets
                none that has a value that is not finite.
        """
        if self.bar is None:
            return
        record = {"step": position.step, "tokens": position.tokens, "time": round(time.time(), 3)}
        for name, value in scalars.items():
            self.by_step.add_scalar(name, value, position.step)
            self.by_tokens.add_scalar(f"tokens/{name}", value, position.tokens)
            record[name] = _finite(value)
        for name, values in (curves or {}).items():
            if all(map(math.isfinite, values)):
                histogram = _histogram(values[::-1])
                self.by_step.add_histogram_raw(name, **histogram, global_step=position.step)
                self.by_tokens.add_histogram_raw(f"tokens/{name}", **histogram, global_step=position.tokens)
            record[name] = [_finite(value) for value in values]
        self.records.write(json.dumps(record, allow_nan=False) + "\n")
        self.records.flush()

    def advance(self, position: Position, loss: float, tokens_per_s: float) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"step {position.step}, loss {loss:.4f}, {tokens_per_s:,.0f} tok/s", refresh=False)
            self.bar.update(position.tokens - self.bar.n)

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)

    def close(self) -> None:
        """Write out what is left. May be called again."""
        if self.bar is not None:
            for part in (self.bar, self.by_step, self.by_tokens, self.records):
                part.close()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _histogram(values: list[float]) -> dict:
    """A histogram as TensorBoard stores it, whose bucket around x = 1, 2, ... holds `values` in turn.

    TensorBoard drops empty buckets at both ends and takes min and max for the outer edges of what remains. Its
    percentiles divide by num, hence the total.
    """
    drawn = [x for x, value in enumerate(values, start=1) if value] or [1]
    return {
        "min": drawn[0] - 0.5,
        "max": drawn[-1] + 0.5,
        "num": sum(values),
        "sum": sum(x * value for x, value in enumerate(values, start=1)),
        "sum_squares": sum(x * x * value for x, value in enumerate(values, start=1)),
        "bucket_limits": [x + 0.5 for x in range(1, len(values) + 1)],
        "bucket_counts": values,
    }


def _continue(path: Path, position: Position) -> Path:
    """Drop the records after `position`, which a resumed run will write again."""

    def is_kept(line: str) -> bool:
        if not line.endswith("\n"):  # the run was killed while it wrote
            return False
        record = json.loads(line)
        # An evaluation at the checkpoint's step may have come after the checkpoint.
        reached = position.evaluated if "eval/loss" in record else position.tokens
        return record["step"] <= position.step and record["tokens"] <= reached

    if path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text("".join(filter(is_kept, path.read_text().splitlines(keepends=True))))
        partial.rename(path)
    return path


def boundary_norms(state_gradient_squares: Tensor, world: World) -> list[float]:
    """Norms over the lanes of all ranks of dL/d(state at a boundary), L the mean loss of the window. A collective call.

    The N - 1 boundaries from the window's start on: the last item knows of the last segment's loss alone. Read from
    there, the norms grow until losses further on no longer reach back: that is the gradient's real horizon.

    Args:
        state_gradient_squares: [N], of this rank; of a loss that is L times the world size (Engine.accumulate).
    """
    squares = world.all_reduce_sum(state_gradient_squares[1:].tolist())
    return [math.sqrt(square) / world.size for square in squares]


def _commit() -> str | None:
    """Of the checkout that this file lies in; None where it lies in none or the machine has no git."""
    here = Path(__file__).resolve().parent
    try:
        told = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return told.stdout.strip() or None


def record_start(run_dir: Path, world_size: int, step: int) -> None:
    """Append how the run was started to starts.jsonl: command, package versions, git commit, time."""
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [sys.executable, *sys.argv],
        "step": step,
        "world_size": world_size,
        "git": _commit(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    with (run_dir / "starts.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def peak_flops(device: torch.device, configured_tflops: float | None) -> float | None:
    """The device's peak in FLOP/s, or None where nobody has said."""
    if configured_tflops:
        return configured_tflops * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def training_flops_per_token(build_cell, segment_length: int) -> float:
    """FLOPs of forward and backward a token, counted by torch on one lane of one segment without computing anything.

    The replay's second advance is not counted: perf/mfu tells what the model needed, not what the method spent.
    """
    with torch.device("meta"):
        cell = build_cell()
        tokens = torch.zeros(1, segment_length, dtype=torch.long)
        lane, flag = torch.full((1,), segment_length), torch.zeros(1, dtype=torch.bool)
        segment = Segment(tokens, torch.full_like(tokens, IGNORE), lane, flag, flag, lane, lane)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            features, _ = cell("advance", segment, cell.empty_state(1, device=torch.device("meta")))
            cell("readout", segment, features)
    return 3 * counter.get_total_flops() / segment_length
