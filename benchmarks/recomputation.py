"""Checkpointed layers, losses in chunks and states made again: what each of them takes and what it costs.

    python benchmarks/recomputation.py            about 5 minutes on 2 quiet cores
    python benchmarks/recomputation.py --quick    smaller sizes, under a minute on them
    options: --json PATH, --device cuda, --repeats N

Memory replay of the real cell, with dropout, in fp32 on one thread; every measurement is a fresh process, with memory and
times taken as benchmarks/mrbp_worker.py says. MiB are the peak of a window over parameters and gradients, seconds those
of the processor (on a GPU of the clock), the least of the repeats.

One layout has a decoder of many layers and a large vocabulary; the other, states that are large beside a segment.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script has only its own folder there

from benchmarks.mrbp import MIB, machine, run_worker  # noqa: E402
from benchmarks.mrbp_worker import Layout, Measurement  # noqa: E402

SMALL = dict(layout="encoder_decoder", encoder_layers=1, decoder_layers=3, width=64, heads=4, feed_forward=128, slots=8)
LAYERS = SMALL | dict(encoder_layers=2, decoder_layers=8, width=256, feed_forward=1024, slots=32)
STATES = SMALL | dict(encoder_layers=1, decoder_layers=1, slots=2048)


def layouts(quick: bool) -> list[tuple[Layout, list[dict[str, Any]]]]:
    """Each with what is switched on: fields of the model, and `state_stride`."""
    layers = Layout("2+8 layers", LAYERS, 16_000, lanes=4, length=128, segments=4, group=1)
    states = Layout("2,048 slots", STATES, 256, lanes=4, length=32, segments=64, group=1)
    if quick:
        layers = replace(layers, model=SMALL, vocabulary=2_000, lanes=2)
        states = replace(states, model=STATES | {"slots": 128}, segments=16)
    chunk = {"loss_chunk": layers.lanes * layers.length // 8}
    again = {"checkpoint_layers": True}
    strides = [{"state_stride": stride} for stride in (1, 8)]
    return [(layers, [{}, again, chunk, again | chunk]), (states, strides)]


def measure(layout: Layout, fields: dict[str, Any], device: str, repeats: int) -> dict[str, Any]:
    model = layout.model | {name: value for name, value in fields.items() if name != "state_stride"}
    of = replace(layout, model=model)
    stride = fields.get("state_stride", 1)
    memory = run_worker(Measurement(of, "plain", device, steps=0, memory=True, state_stride=stride))
    times = [
        run_worker(Measurement(of, "plain", device, steps=2, memory=False, state_stride=stride)) for _ in range(repeats)
    ]
    key = "processor_s" if device == "cpu" else "seconds"
    return {
        "layout": layout.name,
        "on": fields,
        "peak_bytes": memory["peak_bytes"],
        "state_bytes": memory["state_bytes"],
        "seconds": min(second for process in times for second in process[key]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, one repeat")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each time (default 3)")
    arguments = parser.parse_args()
    repeats = 1 if arguments.quick else arguments.repeats
    rows = []
    print("\n| | MiB | s per window |\n|---|---|---|")
    for layout, cases in layouts(arguments.quick):
        for fields in cases:
            row = measure(layout, fields, arguments.device, repeats)
            rows.append(row)
            on = ", ".join(f"{name} {json.dumps(value)}" for name, value in fields.items()) or "neither"
            print(f"| {layout.name}: {on} | {row['peak_bytes'] / MIB:.1f} | {row['seconds']:.2f} |", flush=True)
    if arguments.json:
        found = machine(arguments.device) | {"quick": arguments.quick, "repeats": repeats, "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
