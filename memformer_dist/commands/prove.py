"""Does a cell remember? Train small models on tasks that nothing but a memory can solve, and measure how far they reach.

    python launch/prove.py --task needle --cell memformer --segments 32 --seeds 3 --json needle.json
    python launch/prove.py --task needle --cell memformer --control no_replay           # no gradient between segments
    python launch/prove.py --all --json proof.json                                      # every task, cell and control
    python launch/prove.py --quick                                                      # under a minute on a quiet core
    memformer-prove --task copy                                                         # installed

A task is a configuration in configs/ (needle.json, copy.json, ...), which launch/train.py --config takes as well; another
cell takes the place of its model. Every run has a folder of its own in --runs: the same command resumes what was stopped
and trains nothing twice. Then the model reads held-out documents, as long as those that it was trained on and longer ones.
docs/proof.md explains the tasks and the table.

One process on one core; processor time is given beside the clock's, which counts whatever else the machine does. Stopped
by Ctrl-C or SIGTERM, a run is saved, and the exit code is 75.
"""

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memformer_dist import logs, signals
from memformer_dist.commands.options import Options, integer, nonempty_path, not_writable
from memformer_dist.errors import STOPPED, Stopped, UserError, run_program
from memformer_dist.files import expect_writable, read_json, write_text

if TYPE_CHECKING:
    from memformer_dist.config import RunConfig
    from memformer_dist.world import World

# Segments of the documents that are measured, where they are longer than those of training.
REACH = {"needle": (32, 128, 1024), "copy": ()}
SMALL = {"width": 64, "heads": 4, "feed_forward": 128, "dropout": 0.0, "init_std": 0.1}
# What takes the place of the configuration's model, of about as many parameters.
CELLS: dict[str, dict[str, Any]] = {
    "memformer": {},
    "rmt": {"model": {"cell": "rmt", "layers": 2, "slots": 4}},
    "armt": {"model": {"cell": "armt", "layers": 1, "feed_forward": 256, "write_tokens": 4, "memory_width": 16}},
    "hmt": {"model": {"cell": "hmt", "layers": 2, "slots": 32, "sensory_tokens": 4}},
    "gated_delta": {"model": {"cell": "gated_delta", "layers": 2, "chunk": 16}},
    "mom": {"model": {"cell": "mom", "layers": 1, "chunk": 16}},
    "hadamard": {"model": {"cell": "hadamard", "layers": 1}},
    "titans": {"model": {"cell": "titans", "layers": 2, "chunk": 16}},
    "transformer_xl": {"model": {"cell": "transformer_xl", "layers": 2, "memory_length": 32}},
    "lamemo": {"model": {"cell": "lamemo", "layers": 2, "memory_length": 32}},
    "plain": {"model": {"cell": "plain", "layers": 2}},
}
CONTROLS: dict[str, dict[str, Any]] = {"none": {}, "no_replay": {"mrbp": {"replay": False}}}
QUICK = {
    "needle": (
        "data.task.held_out_segments=4",
        "data.task.held_out_documents=32",
        "training.tokens=6400",
    )
}


class Case(NamedTuple):
    """What is trained once and measured."""

    task: str
    cell: str
    control: str
    segments: int  # the longest documents of training
    seed: int

    @property
    def folder(self) -> Path:
        control = "" if self.control == "none" else f"-{self.control}"
        return Path(f"{self.task}-{self.segments}") / f"{self.cell}{control}" / f"seed-{self.seed}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises UserError."""
    parser = Options(__doc__, check=lambda options: not_writable("--json", options.json))
    add = parser.add_argument
    add("--task", choices=REACH, default="needle")
    add("--cell", choices=CELLS, default="memformer")
    add("--control", choices=CONTROLS, default="none", help="no_replay: no gradient from a segment to the one before")
    add("--all", action="store_true", help="every task with every cell and control")
    add("--quick", action="store_true", help="a needle over 4 segments, the cell and its controls")
    add("--segments", type=integer(least=1), help="longest documents of training (default: the configuration's)")
    add("--seeds", type=integer(least=1), default=1, help="runs of each, with seeds 0, 1, ...")
    add("--lengths", type=integer(least=1), nargs="+", help="segments of the documents that are measured")
    add("--documents", type=integer(least=1), default=256, help="documents of each length")
    parser.add_overrides()
    add("--runs", type=nonempty_path, default=Path("runs/proof"), help="folder for the runs")
    add("--json", type=nonempty_path, metavar="PATH", help="write the results there as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Raises UserError, and Stopped if it was stopped before the end."""
    options = parse(arguments)
    cases = list(chosen(options))
    import torch

    from memformer_dist.launcher import detected
    from memformer_dist.world import World

    if not detected().is_alone:
        raise UserError(f"WORLD_SIZE: found {detected().size} processes, expected one")

    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for case in cases:
        expect_writable(options.runs / case.folder / logs.FILE, "--runs")
    configurations = [configured(case, options) for case in cases]  # all mistakes come before any work
    world = World.start()
    results: list[dict[str, Any]] = []
    for case, config in zip(cases, configurations):
        results.append(prove(case, config, options, world))
        if options.json is not None:
            write_text(options.json, json.dumps(results, indent=2) + "\n")
    print(table(results))


def run() -> None:
    signals.note_stop_requests()
    run_program(main)


def chosen(options: argparse.Namespace) -> Iterator[Case]:
    """What the command line asks for, in the order in which it is trained."""
    tasks = list(REACH) if options.all else [options.task]
    cells = list(CELLS) if options.all else [options.cell]
    if options.quick:
        kinds = [(options.cell, "none"), (options.cell, "no_replay"), ("plain", "none")]
    elif options.all:
        kinds = [(cell, "none") for cell in cells] + [("memformer", "no_replay")]
    else:
        kinds = [(options.cell, options.control)]
    for task, (cell, control), seed in itertools.product(tasks, kinds, range(options.seeds)):
        segments = options.segments or (4 if options.quick else trained_segments(task))
        yield Case(task, cell, control, segments, seed)


def trained_segments(task: str) -> int:
    window = json.loads(configuration_file(task).read_text())["mrbp"]["window"]
    return window["last"] if isinstance(window, dict) else window


def configuration_file(task: str) -> Path:
    from memformer_dist.commands.train import configs_folder

    return configs_folder() / f"{task}.json"


def configured(case: Case, options: argparse.Namespace) -> "RunConfig":
    """The configuration of a run: the task's, with the cell's model and the control. Raises UserError."""
    from memformer_dist.config import RunConfig

    raw = json.loads(configuration_file(case.task).read_text())
    for section, fields in (*CELLS[case.cell].items(), *CONTROLS[case.control].items()):
        raw[section] = SMALL | fields if section == "model" else raw[section] | fields
    if isinstance(raw["mrbp"]["window"], dict):
        raw["mrbp"]["window"]["last"] = case.segments
    else:
        raw["mrbp"]["window"] = case.segments
    raw["data"]["seed"] = raw["training"]["seed"] = case.seed
    overrides = [*(QUICK[case.task] if options.quick else ()), *options.set]
    return RunConfig.with_overrides(raw, overrides, source=f"--task {case.task} --cell {case.cell}")


def prove(case: Case, config: "RunConfig", options: argparse.Namespace, world: "World") -> dict[str, Any]:
    """Train what is not trained yet, measure what is not measured yet. Raises Stopped."""
    from memformer_dist.checkpoint import open_one
    from memformer_dist.data.open_data import open_data
    from memformer_dist.proof import measure
    from memformer_dist.start import commit
    from memformer_dist.train import train

    assert config.data.task is not None
    folder = options.runs / case.folder
    logs.start(world.rank, folder / logs.FILE)
    summary = train(config, folder, open_data(config.data), world)
    if summary is None:
        raise Stopped(exit_code=STOPPED)
    checkpoint = open_one(folder)
    position, curriculum = checkpoint.contents.position, checkpoint.contents.curriculum
    kept = read_json(folder / "proof.json") or {}
    if kept.get("config") != json.loads(config.to_json()) or kept.get("documents") != options.documents:
        kept = {}
    result = case._asdict() | {
        "parameters": summary["parameters"],
        "steps": position.step,
        "trained_segments": curriculum.window if curriculum else None,
        "processor_s": position.processor_s,
        "wall_s": summary["wall_s"],
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "documents": options.documents,
    }
    result |= {name: kept[name] for name in ("commit", "date", "machine") if name in kept}
    measured = kept.get("measured", [])
    cell = checkpoint.cell(world.device)
    lengths = options.lengths or ([case.segments] if options.quick else None)
    for segments, memory in wanted(case, lengths):
        if any((found["segments"], found["memory"]) == (segments, memory) for found in measured):
            continue
        found = measure(
            cell,
            config.data.task,
            segments,
            documents=options.documents,
            memory=memory,
            stop=lambda: bool(signals.received()),
        )
        if found is None:
            raise Stopped(exit_code=STOPPED)
        measured.append(found._asdict())
        whole = result | {"measured": measured, "config": json.loads(config.to_json())}
        write_text(folder / "proof.json", json.dumps(whole, indent=2) + "\n")
    return result | {"measured": measured, "config": json.loads(config.to_json())}


def wanted(case: Case, lengths: Sequence[int] | None) -> Iterator[tuple[int, Any]]:
    """Segments and mode of every measurement."""
    lengths = lengths or [case.segments, *(length for length in REACH[case.task] if length > case.segments)]
    yield from ((segments, "carried") for segments in lengths)
    yield lengths[0], "reset"


def machine() -> dict[str, Any]:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown, a table per task: accuracies of the worst and the best seed."""
    return "\n\n".join(
        "\n".join(_table(list(group)))
        for _, group in itertools.groupby(results, lambda result: (result["task"], result["segments"]))
    )


def _table(results: list[dict[str, Any]]) -> Iterator[str]:
    lengths = sorted(
        {(found["memory"] != "carried", found["segments"]) for one in results for found in one["measured"]}
    )
    heads = [f"{segments}{', memory reset' if reset else ''}" for reset, segments in lengths]
    yield f"{results[0]['task']}, trained on at most {results[0]['segments']} segments: accuracy by segments"
    yield ""
    yield f"| cell | parameters | seeds | processor time | {' | '.join(heads)} |"
    yield "|---|---|---|---|" + "---|" * len(heads)
    for (cell, control), group in itertools.groupby(results, lambda one: (one["cell"], one["control"])):
        runs = list(group)
        name = cell if control == "none" else f"{cell}, {control.replace('_', ' ')}"
        seconds = max(one["processor_s"] for one in runs)
        cells = [
            _range(found["accuracy"] for one in runs for found in one["measured"] if _kind(found) == kind)
            for kind in lengths
        ]
        yield f"| {name} | {runs[0]['parameters']:,} | {len(runs)} | {seconds:.0f} s | {' | '.join(cells)} |"


def _kind(found: dict[str, Any]) -> tuple[bool, int]:
    return found["memory"] != "carried", found["segments"]


def _range(accuracies: Iterator[float]) -> str:
    found = sorted(accuracies)
    if not found:
        return ""
    low, high = f"{found[0]:.3f}", f"{found[-1]:.3f}"
    return low if low == high else f"{low} - {high}"


if __name__ == "__main__":
    run()
