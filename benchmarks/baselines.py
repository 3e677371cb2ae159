"""Every cell on real text, beside a Transformer without memory: at equal time on one core, and at equal tokens.

    python benchmarks/baselines.py --texts books/train --valid books/valid --seconds 1800 --json baselines.json
    python benchmarks/baselines.py --quick                  under a minute: two cells, seconds of training
    options: --cells NAMES, --learning-rates RATES, --seeds N, --tuning NAME, --jobs N, --runs FOLDER, --picture PATH

A cell's model is that of its file in configs/: all have about as many parameters. Every run is one of launch/train.py on
one core, and a time is the processor's in training steps.

1.  Speed: two short runs, of which the difference counts.
2.  Equal time: as many tokens as the cell reads in --seconds, with each of the learning rates. The best is the one with
    the lowest loss on ONE of the training texts, on which no run has trained (--tuning).
3.  The other seeds, at that rate.
4.  Equal tokens: as many as the slowest cell has read, at the same rate, with every seed.
5.  launch/evaluate.py reads the validation texts with the runs of steps 2 to 4, once, when all is chosen.

What is finished in --runs is not done again: an interrupted study goes on. Results are in docs/worth.md.
"""

import argparse
import json
import os
import statistics
import sys
import sysconfig
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script has only its own folder there

from benchmarks.mrbp import MIB, machine  # noqa: E402
from memformer_dist import programs, signals  # noqa: E402
from memformer_dist.checkpoint import open_one  # noqa: E402
from memformer_dist.errors import UserError, run_program  # noqa: E402
from memformer_dist.start import commit  # noqa: E402

# Configuration, and what is changed in its model.
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "transformer_xl": ("transformer_xl", {}),
    "lamemo": ("lamemo", {}),
    "memformer": ("quickstart", {}),
    "memformer, silent start": ("quickstart", {"silent_start": True}),
    "rmt": ("rmt", {}),
    "armt": ("armt", {}),
    "hmt": ("hmt", {}),
    "gated_delta": ("gated_delta", {}),
    "mom": ("mom", {}),
    "hadamard": ("hadamard", {}),
    "titans": ("titans", {}),
}
VOCABULARY, LANES, LENGTH, WINDOW = 2048, 16, 64, 8
STEP = LANES * LENGTH * WINDOW
SPEED_STEPS = (4, 12)
AGED = ("16-31", "32-63", "64+")  # segments since the document's start
MODES = {"": "carried", "_no_memory": "reset", "_shuffled": "exchanged", "_no_state": "everything reset"}


# A program of the repository, which writes at its end how many KiB it had in memory at most.
WITH_PEAK = """
import os, resource, runpy, sys
peak, *sys.argv = sys.argv[1:]
def leave(code, leave=os._exit):
    with open(peak, "w") as file:
        file.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    leave(code)
os._exit = leave
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
    code = 0
except SystemExit as ended:
    code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
sys.stdout.flush()
leave(code)
"""


class Case(NamedTuple):
    cell: str
    learning_rate: float
    seed: int
    tokens: int

    @property
    def name(self) -> str:
        return (
            f"{self.cell.replace(', ', '-').replace(' ', '-')}-lr{self.learning_rate:g}-seed{self.seed}-{self.tokens}"
        )


class Study:
    """The corpora and the runs of a folder."""

    def __init__(self, folder: Path, jobs: int):
        self.folder, self.jobs = folder, jobs
        self.training, self.valid = folder / "training", folder / "valid"

    def prepare(self, texts: Sequence[Path], tuning: Path, valid: Sequence[Path]) -> None:
        """The corpus to train on, whose validation split is the tuning text, and that of the validation texts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        training, model = [text for text in texts if text != tuning], self.folder / "tokenizer.model"
        if not model.exists():
            self.run("tokenizer/train.py", "--input", *training, "--output", model, "--vocab-size", VOCABULARY)
        shard = ("tokenizer/shard.py", "--workers", self.jobs, "--tokenizer", model)
        self.run(*shard, "--input", *training, "--valid-input", tuning, "--output", self.training)
        self.run(*shard, "--input", training[0], "--valid-input", *valid, "--output", self.valid)

    def run(self, *command: object) -> int:
        """A program of the repository, on one thread -> its peak of resident memory in bytes."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        log, peak = self.folder / "log.txt", self.folder / f"peak-{threading.get_ident()}"
        arguments = [sys.executable, "-c", WITH_PEAK, str(peak.resolve()), *map(str, command)]
        with log.open("ab") as output:
            done = programs.run(arguments, cwd=ROOT, env=environment, stdout=output, stderr=output)
        if done.returncode:
            raise UserError(f"{command[0]} ended with {done.returncode}, see the end of {log}")
        return int(peak.read_text()) * 1024

    def train(self, case: Case) -> dict[str, Any]:
        """What the run cost and came to; it is made unless it is there."""
        run_dir = self.folder / "runs" / case.name
        cost = run_dir / "cost.json"
        if not cost.exists():
            config = self.folder / "runs" / f"{case.name}.json"
            config.parent.mkdir(exist_ok=True)
            config.write_text(json.dumps(self.config(case), indent=2) + "\n")
            peak = self.run("launch/train.py", "--config", config.resolve(), "--run-dir", run_dir.resolve())
            checkpoint = open_one(run_dir)
            state = checkpoint.cell("cpu").empty_state(1)
            found = {
                "processor_s": checkpoint.contents.position.processor_s,
                "steps": checkpoint.contents.position.step,
                "state_bytes": sum(leaf.nbytes for leaf in state),
                "peak_bytes": peak,
            }
            cost.write_text(json.dumps(found | {"commit": commit()}))
        return json.loads(cost.read_text()) | json.loads((run_dir / "summary.json").read_text())

    def config(self, case: Case) -> dict[str, Any]:
        file, changed = CELLS[case.cell]
        model = json.loads((ROOT / "configs" / f"{file}.json").read_text())["model"]
        return {
            "model": model | changed,
            "data": {"corpus": str(self.training.resolve()), "lanes": LANES, "segment_length": LENGTH},
            "mrbp": {"window": WINDOW, "readout_group": 2},
            "optimizer": {
                "learning_rate": case.learning_rate,
                "warmup_tokens": max(STEP, case.tokens // 20),
                "weight_decay": 0.01,
            },
            "training": {"tokens": case.tokens, "seed": case.seed},
        }

    def evaluate(self, case: Case) -> dict[str, Any]:
        """The figures of the validation texts."""
        run_dir = self.folder / "runs" / case.name
        found = run_dir / "valid.json"
        if not found.exists():
            self.run("launch/evaluate.py", "--run-dir", run_dir, "--corpus", self.valid, "--json", found.resolve())
        return json.loads(found.read_text())

    def all(self, function: Any, cases: Iterable[Case], title: str) -> dict[Case, dict[str, Any]]:
        """The function of every case, --jobs at a time."""
        cases = list(dict.fromkeys(cases))
        found = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            for case, result in zip(cases, pool.map(function, cases), strict=True):
                found[case] = result
                print(f"{title}: {len(found)} of {len(cases)}, {case.name}", file=sys.stderr, flush=True)
        return found


def study(options: argparse.Namespace) -> dict[str, Any]:
    """The result, as --json has it."""
    work = Study(options.runs, options.jobs)
    work.prepare(options.texts, options.tuning, options.valid)
    rates, cells, seeds = options.learning_rates, options.cells, range(options.seeds)
    seconds_per_token = {}
    for cell in cells:
        if options.quick:
            break
        short, long = (work.train(Case(cell, rates[0], 0, steps * STEP)) for steps in SPEED_STEPS)  # one at a time
        seconds_per_token[cell] = (
            (long["processor_s"] - short["processor_s"]) / (SPEED_STEPS[1] - SPEED_STEPS[0]) / STEP
        )
    steps = {cell: max(2, int(options.seconds / seconds_per_token[cell] / STEP)) for cell in seconds_per_token}
    tokens = {cell: steps.get(cell, 2) * STEP for cell in cells}

    swept = work.all(work.train, (Case(cell, rate, 0, tokens[cell]) for cell in cells for rate in rates), "rates")
    best = {}
    for cell in cells:
        tried = {case.learning_rate: found["eval_loss"] for case, found in swept.items() if case.cell == cell}
        best[cell] = min(tried, key=lambda rate: (tried[rate] is None, tried[rate] or 0.0))  # None: it has diverged
    equal_time = [Case(cell, best[cell], seed, tokens[cell]) for cell in cells for seed in seeds]
    equal_tokens = [Case(cell, best[cell], seed, min(tokens.values())) for cell in cells for seed in seeds]
    if options.skip_equal_tokens:
        equal_tokens = []
    costs = work.all(work.train, [*equal_time, *equal_tokens], "seeds")
    figures = work.all(work.evaluate, [*equal_time, *equal_tokens], "evaluations")
    return {
        "commit": commit(),
        "machine": machine("cpu"),
        "seconds": options.seconds,
        "texts": [text.name for text in options.texts],
        "tuning": options.tuning.name,
        "valid": [text.name for text in options.valid],
        "sweep": [case._asdict() | {"eval_loss": found["eval_loss"]} for case, found in swept.items()],
        "equal_time": [case._asdict() | costs[case] | {"valid": figures[case]} for case in equal_time],
        "equal_tokens": [case._asdict() | costs[case] | {"valid": figures[case]} for case in equal_tokens],
    }


# ---- what is shown ---------------------------------------------------------------------------------------------------


def table(result: dict[str, Any], part: str) -> str:
    """In Markdown: means over the seeds, of loss and bits per byte with the spread as well."""
    heads = "cell, M parameters, learning rate, M tokens, tokens/s, state KiB, peak MiB, nats per token, bits per byte, reset"
    heads += ", exchanged, everything reset, from segment 16 on"
    lines = [f"| {heads.replace(', ', ' | ')} |", "|---" + "|---:" * heads.count(",") + "|"]
    rivals = [one for one in result[part] if one["cell"] == "plain"]
    for cell in dict.fromkeys(one["cell"] for one in result[part]):
        runs = [one for one in result[part] if one["cell"] == cell]
        first, loss = runs[0], [one["valid"]["eval_loss"] for one in runs]
        taken = [_mean(one["valid"][f"eval_loss{mode}"] for one in runs) for mode in list(MODES)[1:]]
        columns = [
            cell,
            f"{first['parameters'] / 1e6:.2f}",
            f"{first['learning_rate']:g}",
            f"{first['tokens'] / 1e6:.2f}",
            f"{first['tokens'] / _mean(one['processor_s'] for one in runs):,.0f}",
            f"{first['state_bytes'] / 1024:,.1f}",
            f"{max(one['peak_bytes'] for one in runs) / MIB:,.0f}",
            f"{_mean(loss):.3f} ({min(loss):.3f} to {max(loss):.3f})",
            f"{_mean(one['valid']['eval_bits_per_byte'] for one in runs):.3f}",
            *("n/a" if gap is None else f"{gap - _mean(loss):+.3f}" for gap in taken),
            f"{aged(runs):.3f} ({aged(runs) - aged(rivals):+.3f})" if rivals else f"{aged(runs):.3f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def aged(runs: Sequence[dict[str, Any]]) -> float:
    """The mean loss by age, from segment 16 of a document on, over ages and seeds; in books nearly all is there."""
    losses = [one["valid"]["eval_loss_by_segment_age"]["carried"].get(age) for one in runs for age in AGED]
    return _mean(loss for loss in losses if loss is not None)


def _mean(figures: Iterable[float | None]) -> Any:
    figures = list(figures)
    return None if None in figures or not figures else statistics.fmean(figures)  # type: ignore[arg-type]


def draw(result: dict[str, Any], path: Path) -> None:
    """Loss of every cell against that of `plain`, at equal time and at equal tokens, by seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [part for part in ("equal_time", "equal_tokens") if result[part]]
    figure, axes = pyplot.subplots(1, len(parts), figsize=(6 * len(parts), 4.5), sharey=True, squeeze=False)
    for ax, part in zip(axes[0], parts, strict=True):
        cells = list(dict.fromkeys(one["cell"] for one in result[part]))
        rival = _mean(one["valid"]["eval_loss"] for one in result[part] if one["cell"] == "plain")
        for row, cell in enumerate(cells):
            losses = [one["valid"]["eval_loss"] for one in result[part] if one["cell"] == cell]
            ax.plot(losses, [row] * len(losses), "o", color="tab:blue" if cell != "plain" else "black")
        if rival is not None:
            ax.axvline(rival, color="black", linewidth=0.8, linestyle="--")
        ax.set_yticks(range(len(cells)), cells)
        ax.invert_yaxis()
        ax.grid(axis="x", alpha=0.3)
        ax.set_title(
            f"{part.replace('_', ' ')}" + (f": {result['seconds']:g} s of one core" if part == parts[0] else "")
        )
        ax.set_xlabel("held-out nats per token, a point per seed; dashed: no memory")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--texts", type=Path, help="folder of text files to train on (default: Python's standard library)")
    add("--valid", type=Path, help="folder of the validation texts (default: the last of --texts)")
    add("--tuning", metavar="NAME", help="the file of --texts on which learning rates are chosen (default: the first)")
    add("--seconds", type=float, default=300.0, help="processor time of a run (default: 300)")
    add("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="NAME", help="default: all")
    add("--learning-rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], metavar="RATE")
    add("--seeds", type=int, default=2, help="runs at the best learning rate (default: 2)")
    add("--skip-equal-tokens", action="store_true", help="without step 4")
    add("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    add("--runs", type=Path, default=Path("runs/baselines"), help="folder for corpora and runs")
    add("--json", type=Path, metavar="PATH", help="write the result there as well")
    add("--picture", type=Path, metavar="PATH", help="draw it as well, as PNG")
    add("--quick", action="store_true", help="plain and Memformer, one rate, one seed, two steps")
    options = parser.parse_args()
    if options.quick:
        options.cells, options.learning_rates, options.seeds = ["plain", "memformer"], [2e-3], 1
        options.skip_equal_tokens, options.jobs, options.runs = True, 2, options.runs.with_name("baselines-quick")
    folder = options.texts or Path(sysconfig.get_path("stdlib"))
    texts = sorted(file for file in folder.iterdir() if file.suffix == (".txt" if options.texts else ".py"))
    if options.quick:
        texts = texts[:40]
    options.valid = sorted(options.valid.glob("*.txt")) if options.valid else [texts.pop()]
    tuning = [text for text in texts if options.tuning in (None, text.name)][:1]
    if len(texts) < 2 or not tuning or not options.valid:
        parser.error(
            f"{folder}: found {len(texts)} texts, expected several, of which --tuning is one, and others to validate"
        )
    options.texts, options.tuning = texts, tuning[0]
    return options


def main() -> None:
    options = parse()
    result = study(options)
    for part in ("equal_time", "equal_tokens"):
        if result[part]:
            print(f"\n{part.replace('_', ' ')}\n\n{table(result, part)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.picture:
        draw(result, options.picture)


if __name__ == "__main__":
    with programs.handing_on(signals.STOPPING):
        run_program(main)
