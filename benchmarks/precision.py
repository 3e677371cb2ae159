"""fp32 parameters under autocast with one reduction a step, against bf16 parameters with sharded fp32 accumulation.

    python benchmarks/precision.py                  some minutes on 2 cores
    python benchmarks/precision.py --quick          under a minute: ZeRO 2, windows of 2 and 8
    options: --json PATH, --repeats N

Each way of training is a fresh pair of gloo ranks with one thread each. Rows: seconds a window (median, the optimiser's
step included), resident memory of a rank over what it had before the engine was built, at its peak, and the bytes that a
step reduces and gathers (collectives.py; payloads, not what a ring sends of them). On CPUs bf16 is emulated where they have
no instructions for it: the bytes are those of a GPU, the seconds are not. docs/precision.md says which to use when.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script has only its own folder there

from benchmarks.collectives import Collectives  # noqa: E402
from benchmarks.mrbp_worker import BOS, Layout, RandomWindow  # noqa: E402
from benchmarks.two_ranks import on_two_ranks  # noqa: E402
from memformer_dist import programs  # noqa: E402
from memformer_dist.commands.options import Options, integer, nonempty_path, not_writable  # noqa: E402
from memformer_dist.errors import run_program  # noqa: E402

WAYS = (
    ("fp32", "window"),
    ("bf16", "window"),
    ("fp32", "segment"),
    ("bf16", "segment"),
    ("bf16_parameters", "segment"),
)
LAYOUT = Layout(
    "precision",
    dict(width=256, heads=4, feed_forward=1024, encoder_layers=1, decoder_layers=2, slots=16),
    vocabulary=4096,
    lanes=1,
    length=8,
    segments=32,
    group=1,
)
MIB = 2**20


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def one_way(precision: str, reduce: str, stage: int, windows: list[int], repeats: int) -> list[dict[str, Any]]:
    """On one of the ranks: a row for every length of the window."""
    from memformer_dist.cells.memformer import Memformer, MemformerConfig
    from memformer_dist.mrbp.settings import MrbpConfig
    from memformer_dist.optimizer import OptimizerConfig, adamw
    from memformer_dist.world import World
    from memformer_dist.zero.engine import Engine

    world = World.start()
    torch.manual_seed(0)
    before = resident("VmRSS")
    model = MemformerConfig(**LAYOUT.model)
    cell = Memformer(model, vocab_size=LAYOUT.vocabulary, bos_id=BOS, segment_length=LAYOUT.length)
    parameters = sum(parameter.numel() for parameter in cell.parameters())
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    engine = Engine(
        cell,
        adamw(cell, OptimizerConfig()),
        world,
        MrbpConfig(window=1, reduce=reduce),
        settings={"zero_optimization": zero},
        precision=precision,
    )
    rows = []
    for segments in windows:

        def step() -> None:
            tokens = segments * LAYOUT.lanes * LAYOUT.length * world.size
            engine.accumulate(
                [RandomWindow(LAYOUT, segments, world.device)],
                [engine.module.empty_state(LAYOUT.lanes)],
                valid_tokens=tokens,
            )
            engine.step(1e-4)

        step()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        peak = resident("VmHWM") - before
        with Collectives() as seen:
            step()
        rows.append(
            {
                "precision": precision,
                "reduce": reduce,
                "zero_stage": stage,
                "segments": segments,
                "parameters": parameters,
                "seconds": statistics.median(seconds),
                "peak_bytes": peak,
                "reduced_bytes": sum(seen.bytes(kind) for kind in ("all_reduce", "reduce_scatter", "reduce")),
                "gathered_bytes": seen.bytes("all_gather"),
                "calls": seen.calls(),
            }
        )
    return rows if world.is_main else []


def main() -> None:
    parser = Options(__doc__, check=lambda options: not_writable("--json", options.json))
    parser.add_argument("--quick", action="store_true", help="ZeRO 2 alone, one repeat, the two ways of bf16")
    parser.add_argument("--repeats", type=integer(least=1), default=3, help="timed windows of each row (default 3)")
    parser.add_argument("--json", type=nonempty_path, metavar="PATH", help="write all figures there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        torch.set_num_threads(1)
        if rows := one_way(*json.loads(arguments.worker)):
            print("\n" + json.dumps(rows), flush=True)
        os._exit(0)  # gloo's threads abort at random while the interpreter shuts down
    with programs.handing_on():
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Print a row for each way, and write --json."""
    rows = []
    print("ZeRO  precision        reduce    N   s/window  peak MiB  reduced/parameters  gathered/parameters  calls")
    for stage in (2,) if arguments.quick else (1, 2, 3):
        for precision, reduce in WAYS:
            if (reduce == "segment" and stage == 1) or (arguments.quick and (precision, reduce) not in WAYS[1::3]):
                continue
            windows, repeats = ([2, 8], 1) if arguments.quick else ([2, 8, 32], arguments.repeats)
            found = on_two_ranks(__file__, "--worker", json.dumps([precision, reduce, stage, windows, repeats]))
            for row in found:
                fp32 = 4 * row["parameters"]
                print(
                    f"{stage:<6}{precision:<17}{reduce:<9}{row['segments']:>2}{row['seconds']:>11.2f}"
                    f"{row['peak_bytes'] / MIB:>10.0f}{row['reduced_bytes'] / fp32:>20.2f}"
                    f"{row['gathered_bytes'] / fp32:>21.2f}{row['calls']:>7}",
                    flush=True,
                )
            rows += found
    print("bytes as multiples of those of the fp32 parameters")
    if arguments.json:
        result = {"torch": torch.__version__, "ranks": 2, "quick": arguments.quick, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main)
