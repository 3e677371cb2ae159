"""Rank 0's records of a run: TensorBoard and metrics.jsonl. metrics.py says what is in them.

TensorBoard gets every scalar twice: RUN/tensorboard/steps has it by step, RUN/tensorboard/tokens by trained tokens,
which is how runs of different batch sizes are compared. Names of the latter begin with `tokens/`: TensorBoard draws
equal names into one chart, where thousands of steps would be a point beside billions of tokens. metrics.jsonl has one
object per record, with "step", "tokens" and "time"; null is a value that was not finite.

A curve is a list in metrics.jsonl and a histogram in TensorBoard, one per record, whose buckets count nothing but draw:
bucket x = 1, 2, ... reaches from x - 1/2 to x + 1/2 and is as high as the value there. In memory/grad_norm_by_boundary
x is the number of segments before the window's end; the list starts with the boundary after the window's first segment.

Records that a run wrote after the checkpoint from which it resumes are dropped: it is about to write them again.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from memformer_dist.files import read_json_lines, write_bytes
from memformer_dist.progress import Position

Curves = dict[str, list[float]]


class Monitor:
    """Writes the records of a run on rank 0; on other ranks every call does nothing."""

    def __init__(self, run_dir: Path, position: Position, *, is_main: bool):
        self.is_main = is_main
        if not is_main:
            return
        # A purge takes all curves of a folder back to one x, hence a folder for each axis. It is needed at step 0 as
        # well: a run killed before its first checkpoint starts from the beginning.
        folder = run_dir / "tensorboard"
        self.by_step = SummaryWriter(str(folder / "steps"), purge_step=position.step + 1)
        self.by_tokens = SummaryWriter(str(folder / "tokens"), purge_step=position.tokens + 1)
        self.records = _continue(run_dir / "metrics.jsonl", position).open("a")

    def log(self, position: Position, scalars: dict[str, float], curves: Curves | None = None) -> None:
        """Write one record.

        Args:
            curves: values, not negative, at x = n, n - 1, ... 1: the last of a list is drawn at x = 1. A curve with a
            value
                that is not finite goes to metrics.jsonl alone.
        """
        if not self.is_main:
            return
        record: dict[str, Any] = {
            "step": position.step,
            "tokens": position.tokens,
            "time": round(time.time(), 3),
        }
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

    def close(self) -> None:
        """Write out what is left. May be called again."""
        if self.is_main:
            for part in (self.by_step, self.by_tokens, self.records):
                part.close()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _histogram(values: list[float]) -> dict[str, Any]:
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

    def is_kept(record: dict[str, Any]) -> bool:
        # An evaluation at the checkpoint's step may have come after the checkpoint.
        reached = position.evaluated if "eval/loss" in record else position.tokens
        return record.get("step", math.inf) <= position.step and record.get("tokens", math.inf) <= reached

    if path.exists():
        write_bytes(path, b"".join(line for line, record in read_json_lines(path) if is_kept(record)))
    return path
