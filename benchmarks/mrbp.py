"""Memory replay against full BPTT and gradient checkpointing: speed, memory, bytes between ranks.

    python benchmarks/mrbp.py                     about 12 minutes on 2 quiet cores, less than 12 GB
    python benchmarks/mrbp.py --quick             smaller sizes, under a minute on them, no thresholds
    python benchmarks/mrbp.py --long              also a window of a million tokens: 6 minutes more
    options: --json PATH, --device cuda, --repeats N

    BPTT                       one graph over the window, one backward
    BPTT, readout of C         the same, the readout of C segments as one batch, as MRBP grouped has it
    checkpoint per segment     torch.utils.checkpoint around advance and readout of every segment
    MRBP plain                 memory_replay, readout_group 1
    MRBP, readout in 2 parts   memory_replay, readout_parts 2: half of the lanes after the other
    MRBP grouped               memory_replay, readout_group C

All of them run the real cell, with dropout, in fp32 without TF32, on the same random tokens, in plain torch on one
thread. Every measurement is a fresh process (mrbp_worker.py says how time and memory are taken), methods take turns,
and figures are medians over the repeats. First of all it is checked that the methods have one gradient. Bytes and
gathers are those of two gloo ranks under DeepSpeed (mrbp_traffic.py).

Speeds are compared by processor time on a CPU, by the clock on a GPU. The bound on the speed is what the matrix products
allow: replay computes every `advance` but the last once more, checkpointing computes everything once more. Replay may
still be faster than its bound, because it touches less memory.
"""

import json
import os
import platform
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script has only its own folder there

from benchmarks.figures import print_figures  # noqa: E402
from benchmarks.mrbp_worker import (  # noqa: E402
    RETURN_FREED_MEMORY,
    Layout,
    Measurement,
    count_flops,
    gradient_errors,
)
from benchmarks.two_ranks import on_two_ranks  # noqa: E402
from memformer_dist import programs  # noqa: E402
from memformer_dist.commands.options import Options, integer, nonempty_path, not_writable  # noqa: E402
from memformer_dist.errors import run_program  # noqa: E402

NAMES = {
    "bptt": "BPTT",
    "bptt_grouped": "BPTT, readout of {group}",
    "checkpoint": "checkpoint per segment",
    "plain": "MRBP plain",
    "parts": "MRBP, readout in 2 parts",
    "grouped": "MRBP grouped, C = {group}",
}
MUST_SHOW = {  # of the issue, on a CPU
    "speed_vs_bptt_4_16": (">=", 0.92),
    "speed_vs_checkpoint_4_16": (">=", 1.25),
    "grouped_speed_vs_bptt_few": (">=", 1.30),
    "memory_vs_bptt_4_16": ("<=", 0.10),
    "memory_flat_64_over_2": ("<=", 1.05),
    "gradient_bytes_ratio": ("<=", 1.00),
}
SIMPLE_BOUND = 60 / 64  # 4+16 layers: forward and backward of 20 are 60, the rollout of 4 encoder layers 4 more
PAPER_TABLE_3 = (  # arXiv 2010.06891v2, Table 3: decoder of 12 layers, horizon 4, on a GPU
    "the paper (Table 3 of arXiv 2010.06891v2, horizon 4): BPTT x1.00 and 16,177 MB, gradient checkpointing\n"
    "x0.48 and 9,885 MB, MRBP x0.90 and 7,229 MB; at horizon 16 MRBP takes 62 MB more"
)
GRADIENT_TOLERANCE = 1e-10  # float64
MIB = 2**20
WINDOWS = (2, 8, 32, 64)  # segments
MILLION = 2048  # segments of 512 tokens


def layouts(device: str, quick: bool) -> dict[str, Layout]:
    """The sizes: on a CPU for 2 cores and 12 minutes, on a GPU so that it has something to do."""
    split = dict(layout="encoder_decoder", encoder_layers=4, decoder_layers=16, slots=32)
    decoder = dict(
        layout="decoder", encoder_layers=0, decoder_layers=12, width=512, heads=8, feed_forward=2048, slots=32
    )
    middle = split | dict(width=256, heads=8, feed_forward=1024)
    small = split | dict(width=128, heads=4, feed_forward=512)
    large = split | dict(width=512, heads=8, feed_forward=2048)
    tiny = dict(width=64, heads=4, feed_forward=128)
    if quick:
        few_layers = tiny | dict(encoder_layers=1, decoder_layers=4)
        sizes = [
            Layout("4+16", middle | tiny, 256, lanes=2, length=16, segments=4, group=4),
            Layout("few", small | few_layers, 256, lanes=1, length=32, segments=4, group=4),
            Layout(
                "table3, horizon 4", decoder | tiny | dict(decoder_layers=4), 256, 2, length=32, segments=4, group=4
            ),
            Layout("windows", middle | few_layers, 256, lanes=1, length=32, segments=8, group=8),
        ]
    elif device == "cpu":
        sizes = [
            Layout("4+16", middle, 1024, lanes=4, length=128, segments=8, group=8),
            Layout("few", small, 1024, lanes=1, length=32, segments=16, group=8),
            Layout("table3, horizon 4", decoder, 1024, lanes=1, length=64, segments=4, group=4),
            Layout("table3, horizon 16", decoder, 1024, lanes=1, length=64, segments=16, group=8),
            Layout("windows", middle, 1024, lanes=1, length=128, segments=8, group=8),
        ]
    else:
        sizes = [
            Layout("4+16", large, 32000, lanes=8, length=512, segments=8, group=8),
            Layout("few", large, 32000, lanes=1, length=64, segments=16, group=8),
            Layout("table3, horizon 4", decoder, 32000, lanes=16, length=512, segments=4, group=4),
            Layout("table3, horizon 16", decoder, 32000, lanes=4, length=512, segments=16, group=8),
            Layout("windows", large, 32000, lanes=8, length=512, segments=8, group=8),
        ]
    return {layout.name: layout for layout in sizes}


LONG = Layout(  # 1 + 1 layers; what a segment keeps is many times a stored state
    "long",
    dict(layout="encoder_decoder", encoder_layers=1, decoder_layers=1, width=64, heads=4, feed_forward=256, slots=16),
    256,
    lanes=1,
    length=512,
    segments=64,
    group=1,
)
METHODS_OF = {  # as they take turns; the readout of a decoder layout is its head alone, not worth grouping
    "4+16": ("bptt", "checkpoint", "plain", "parts", "grouped"),
    "few": ("bptt", "bptt_grouped", "checkpoint", "plain", "grouped"),
    "table3, horizon 4": ("bptt", "checkpoint", "plain"),
    "table3, horizon 16": ("bptt", "checkpoint", "plain"),
}
STEPS = {"4+16": 1, "few": 6, "table3, horizon 4": 2, "table3, horizon 16": 1}  # timed windows of a process


# ---------------------------------------------------------------------------------------------------------- processes


def run_worker(measurement: Measurement) -> dict[str, Any]:
    """Raises CalledProcessError where the worker fails; its messages go to our standard error."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (RETURN_FREED_MEMORY if measurement.memory else {})
    command = [sys.executable, "-m", "benchmarks.mrbp_worker", measurement.to_json()]
    done = programs.run(command, cwd=ROOT, env=environment, stdout=PIPE, text=True, check=True)
    print(".", end="", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_in_pairs(measurements: list[Measurement]) -> list[dict[str, Any]]:
    """Two at a time on a CPU, where a neighbour changes times but not memory."""
    with ThreadPoolExecutor(2 if measurements[0].device == "cpu" else 1) as pool:
        return list(pool.map(run_worker, measurements))


# -------------------------------------------------------------------------------------------------------------- rows


def compare(sizes: dict[str, Layout], device: str, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """One row for each layout and method: medians of its times, its memory, its bound.

    Quick: times are taken in the processes that tell the memory, two at a time, and are rough.
    """
    pairs = [
        (sizes[name], method)
        for name, methods in METHODS_OF.items()
        if name in sizes
        for method in methods
        # Quick: once, where a figure is of it. The first checkpoint of a process imports torch._dynamo, 8 s.
        if not (quick and method == "checkpoint" and name != "4+16")
    ]
    once = [Measurement(layout, method, device, steps=int(quick), memory=True) for layout, method in pairs]
    memories = run_in_pairs(once)
    counted = {name: count_flops(layout) for name, layout in sizes.items() if name in METHODS_OF}
    rows = []
    for (layout, method), memory in zip(pairs, memories, strict=True):
        flops = counted[layout.name]
        rows.append(
            {
                "layout": layout.name,
                "method": method,
                "name": NAMES[method].format(group=layout.group),
                "segments": layout.segments,
                "lanes": layout.lanes,
                "length": layout.length,
                "readout_group": layout.group if method.endswith("grouped") else 1,
                "peak_bytes": memory["peak_bytes"],
                "state_bytes": memory["state_bytes"],
                "flops": flops.of_window(method, layout.segments),
                "bound": flops.of_window("bptt", layout.segments) / flops.of_window(method, layout.segments),
                "repeats": [memory] if quick else [],
            }
        )
    for name in METHODS_OF if not quick else ():
        of_layout = [row for row in rows if row["layout"] == name]
        for _ in range(repeats):
            for row in of_layout:
                row["repeats"].append(
                    run_worker(Measurement(sizes[name], row["method"], device, steps=STEPS[name], memory=False))
                )
    for row in rows:
        for key in ("seconds", "processor_s"):
            row[key] = statistics.median(statistics.median(repeat[key]) for repeat in row["repeats"])
        row["tokens_s"] = row["segments"] * row["lanes"] * row["length"] / row["seconds"]
        peer = next(other for other in rows if (other["layout"], other["method"]) == (row["layout"], "bptt"))
        clock = "processor_s" if device == "cpu" else "seconds"  # one thread: what else the machine does is left out
        row["speed_vs_bptt"] = peer[clock] / row[clock]
        row["memory_vs_bptt"] = row["peak_bytes"] / peer["peak_bytes"]
    return rows


def windows(layout: Layout, device: str, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Memory of MRBP plain for windows of several lengths."""
    made = [replace(layout, segments=segments) for segments in lengths]
    results = run_in_pairs([Measurement(one, "plain", device, steps=0, memory=True) for one in reversed(made)])[::-1]
    kept = ("peak_bytes", "state_bytes", "resident_bytes")
    return [
        {"layout": "windows", "method": "plain", "segments": one.segments, "lanes": one.lanes, "length": one.length}
        | {key: result[key] for key in kept}
        for one, result in zip(made, results, strict=True)
    ]


def million(device: str) -> list[dict[str, Any]]:
    """Exact back-propagation through a million tokens, states in host memory, against a window of 64 segments."""
    made = [replace(LONG, segments=segments) for segments in (LONG.segments, MILLION)]
    rows = []
    for one in made:
        result = run_worker(Measurement(one, "plain", device, steps=0, memory=True, host_states=True))
        tokens = one.segments * one.lanes * one.length
        row = {"layout": "long", "method": "plain", "segments": one.segments, "tokens": tokens}
        row |= {key: result[key] for key in ("peak_bytes", "resident_bytes", "state_bytes", "memory_step_s")}
        stored = result["state_bytes"] if device == "cpu" else 0  # elsewhere the peak is the device's
        rows.append(row | {"peak_without_states": result["peak_bytes"] - stored, "seconds": result["memory_step_s"]})
    return rows


# ------------------------------------------------------------------------------------------------------------ results


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that the thresholds are about, by the keys of --json.

    Those of 4+16 are of one method, the readout in 2 parts: plain keeps one of 8 segments, an eighth of BPTT at best.
    """
    of = {(row["layout"], row["method"]): row for row in rows if "speed_vs_bptt" in row}
    replayed, checkpointed = of["4+16", "parts"], of["4+16", "checkpoint"]
    flat = [row["peak_bytes"] for row in rows if row["layout"] == "windows"]
    sent = [row for row in rows if row["layout"] == "traffic"]
    result = {
        "speed_vs_bptt_4_16": replayed["speed_vs_bptt"],
        "speed_vs_flop_bound_4_16": replayed["speed_vs_bptt"] / SIMPLE_BOUND,
        "speed_vs_checkpoint_4_16": replayed["speed_vs_bptt"] / checkpointed["speed_vs_bptt"],
        "grouped_speed_vs_bptt_few": of["few", "grouped"]["speed_vs_bptt"],
        "memory_vs_bptt_4_16": replayed["memory_vs_bptt"],
        "memory_flat_64_over_2": flat[-1] / flat[0],
        "gradient_bytes_ratio": max(row["gradient_bytes_ratio"] for row in sent),
        "gathers_per_window_zero3": next(row for row in sent if row["zero_stage"] == 3)["readout_gathers_a_window"],
    }
    if long := [row for row in rows if row["layout"] == "long"]:
        short, whole = long
        result["memory_million_over_64"] = whole["peak_without_states"] / short["peak_without_states"]
        result["million_tokens_s"] = whole["tokens"] / whole["seconds"]
    return result


def print_tables(rows: list[dict[str, Any]], sizes: dict[str, Layout]) -> None:
    for name in METHODS_OF:
        if name in sizes:
            print_comparison(sizes[name], [row for row in rows if row["layout"] == name])
    print(f"\nMRBP plain by the window's length\n{'segments':<10}{'MiB over baseline':>19}{'of it states':>17}")
    for row in rows:
        if row["layout"] == "windows":
            print(f"{row['segments']:<10}{row['peak_bytes'] / MIB:>19.1f}{row['state_bytes'] / MIB:>17.1f}")

    print("\nbetween 2 ranks, a window of 8 segments in 2 lane groups a rank, readout groups of 4 (N/C = 2)")
    print("ZeRO  kept gathered  bytes reduced/plain data parallel  gathers a window: readout's  advance's   calls")
    for row in rows:
        if row["layout"] == "traffic":
            kept, calls = row.get("keep_gathered", "-"), (f"{kind} {count}" for kind, count in row["calls"].items())
            gathers = (row.get(f"{part}_gathers_a_window", 0) for part in ("readout", "advance"))
            print("{:<6}{:<15}{:>33.3f}".format(row["zero_stage"], kept, row["gradient_bytes_ratio"]), end="")
            print("{:>29.1f}{:>11.1f}   {}".format(*gathers, ", ".join(calls)))

    if long := [row for row in rows if row["layout"] == "long"]:
        print("\none window of exact back-propagation, states in host memory")
        print("segments     tokens         s  tokens/s  MiB over baseline  of it states   without")
        for row in long:
            speed = row["seconds"], row["tokens"] / row["seconds"]
            memory = (row[key] / MIB for key in ("peak_bytes", "state_bytes", "peak_without_states"))
            print("{segments:<8}{tokens:>11}".format(**row), end="")
            print("{:>10.0f}{:>10.0f}{:>19.1f}{:>14.1f}{:>10.1f}".format(*speed, *memory))


def print_comparison(layout: Layout, rows: list[dict[str, Any]]) -> None:
    model = layout.model
    layers = f"{model['encoder_layers']} + {model['decoder_layers']} layers"
    print(f"\n{layout.name}: {layers}, d {model['width']}, {model['heads']} heads, ", end="")
    print(f"feed-forward {model['feed_forward']}, {model['slots']} slots; ", end="")
    print(f"{layout.segments} segments x {layout.length} tokens x {layout.lanes} lanes")
    head = ("method", "s/window", "tokens/s", "MiB over baseline", "memory/BPTT", "speed/BPTT", "bound")
    print("{:<24}{:>10}{:>10}{:>19}{:>13}{:>12}{:>8}".format(*head))
    for row in rows:
        memory, speed = (row["peak_bytes"] / MIB, row["memory_vs_bptt"]), (row["speed_vs_bptt"], row["bound"])
        print("{:<24}{:>10.3f}{:>10.0f}".format(row["name"], row["seconds"], row["tokens_s"]), end="")
        print("{:>19.0f}{:>13.3f}{:>12.2f}{:>8.3f}".format(*memory, *speed))
    if layout.name == "4+16":
        print(f"bound counted in matrix products; simply by layers, 60/64 = {SIMPLE_BOUND:.4f}")
    if layout.name == "table3, horizon 4":
        print(f"bound simply by layers 3/4;\n{PAPER_TABLE_3}")


def machine(device: str) -> dict[str, Any]:
    processors = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": processors[0].partition(":")[2].strip() if processors else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def benchmark(device: str, quick: bool, repeats: int, long: bool) -> tuple[dict[str, Any], dict[str, Layout]]:
    sizes = layouts(device, quick)
    errors = gradient_errors(CHECKED)
    wrong = {method: error for method, error in errors.items() if not error <= GRADIENT_TOLERANCE}
    assert not wrong, f"gradients differ from BPTT's, so that nothing here would mean anything: {wrong}"
    print("largest difference from BPTT's gradient, float64:", errors, file=sys.stderr)
    rows = compare(sizes, device, repeats, quick)
    rows += windows(sizes["windows"], device, (WINDOWS[0], WINDOWS[-1]) if quick else WINDOWS)
    sent = on_two_ranks("-m", "benchmarks.mrbp_traffic", *(["--quick"] if quick else []))
    rows += [{"layout": "traffic"} | row for row in sent]
    if long:
        rows += million(device)
    print(file=sys.stderr)
    found = machine(device) | {"device": device, "quick": quick, "repeats": repeats, "gradient_errors": errors}
    return summary(rows) | found | {"rows": rows}, sizes


CHECKED = Layout(
    "gradients",
    dict(layout="encoder_decoder", encoder_layers=1, decoder_layers=2, width=16, heads=2, feed_forward=32, slots=4),
    64,
    lanes=2,
    length=8,
    segments=5,
    group=2,
)


def main() -> None:
    parser = Options(__doc__, check=lambda options: not_writable("--json", options.json))
    parser.add_argument("--quick", action="store_true", help="smaller sizes, one repeat, no thresholds")
    parser.add_argument("--json", type=nonempty_path, metavar="PATH", help="write all figures there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--repeats", type=integer(least=1), default=3, help="processes for each time, taking turns (default 3)"
    )
    parser.add_argument("--long", action="store_true", help="also a window of 1,048,576 tokens")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result, sizes = benchmark(arguments.device, arguments.quick, arguments.repeats, arguments.long)
    print_tables(result["rows"], sizes)
    print()
    compare = not arguments.quick and arguments.device == "cpu"
    print_figures(summary(result["rows"]), MUST_SHOW, compare=compare)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with programs.handing_on():
        run_program(main)
