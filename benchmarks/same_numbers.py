"""Show that a change alters no number: prepare, train, evaluate and resume with two commits, and compare bit by bit.

    python benchmarks/same_numbers.py 1e99b32             against that commit of this repository; some minutes on 2 cores
    python benchmarks/same_numbers.py 1e99b32 --speed     also the processor time of a training step, in turns
    options: --json PATH, --quick (one case of each kind)

Both commits run in this Python environment, each from a checkout of its own in a temporary folder, on the same texts:

    corpora     every byte of train/ and valid/: text files, JSON lines with loss masks, several partitions
    training    2 ranks, dropout, evaluations on the way, ZeRO 0 to 3, fp32 and both ways of bf16: every number of
                metrics.jsonl but clocks, and every byte of weights, moments and lane states
    resumed     stopped after a step and started again by the same commit, and started by the old commit and resumed by the new
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script has only its own folder there

from memformer_dist import programs  # noqa: E402
from memformer_dist.errors import run_program  # noqa: E402

# Changed on purpose in 0.2.0: the memory of another document is never that of an idle lane (CHANGELOG.md).
CHANGED = ("eval/loss_shuffled", "final/loss_shuffled")
CLOCKS = ("time", "data/wait_s", "perf/", "mrbp/rollout_share", "device/")  # what two runs never have in common
MODEL = {
    "width": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "heads": 2,
    "feed_forward": 32,
    "slots": 4,
    "dropout": 0.1,
}
# Names of fields are those of the first commits: later ones read them as well.
CONFIG: dict[str, Any] = {
    "model": MODEL,
    "data": {"lanes": 4, "segment_length": 16},
    "mrbp": {"window": 3, "readout_group": 2, "lanes_per_group": 1},
    "optimizer": {"learning_rate": 0.01, "warmup_tokens": 200},
    "training": {"tokens": 1500, "evaluate_every_tokens": 400, "evaluate_ticks": 6},
    "checkpoint": {"every_tokens": 500},
    "monitor": {"log_every_steps": 1},
}
SPEED: dict[str, Any] = {
    "model": MODEL | {"width": 128, "feed_forward": 256, "encoder_layers": 2, "decoder_layers": 3, "slots": 16},
    "data": {"lanes": 8, "segment_length": 32},
    "mrbp": {"window": 4},
    "training": {"tokens": 1},
    "monitor": {"log_every_steps": 10},
}


def cases(quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings that differ from CONFIG)."""
    decoder = {"layout": "decoder", "encoder_layers": 0}
    for stage in (2,) if quick else (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            yield f"ZeRO {stage}, {precision}", {"training.precision": precision, "stage": stage}
    yield "ZeRO 2, overlapped reduction", {"stage": 2, "overlap_comm": True}
    if quick:
        return
    for stage in (2, 3):
        sharded = {"training.precision": "bf16_parameters", "mrbp.reduce": "segment", "stage": stage}
        yield f"ZeRO {stage}, bf16 parameters", sharded
    yield (
        "decoder layout, ZeRO 1, states on the host",
        {"model": MODEL | decoder, "stage": 1, "mrbp.state_store": "host"},
    )
    yield (
        "readout in parts, ZeRO 3",
        {"stage": 3, "mrbp.readout_group": 1, "mrbp.lanes_per_group": 2, "mrbp.readout_parts": 2},
    )
    yield "a curriculum, ZeRO 1", {"stage": 1, "mrbp.window": {"by_step": {"0": 1, "3": 4, "6": 2}}}
    yield "stream, ZeRO 0", {"stage": 0, "data.mode": "stream", "plain": True}


def write_texts(folder: Path) -> None:
    """Documents of very different lengths; some with parts that are masked out of the loss."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(1, 6))) for _ in range(150)]

    def text(count: int) -> str:
        return " ".join(generator.choices(words, k=count)) + ".\n"

    (folder / "plain").mkdir(parents=True)
    for number in range(30):
        (folder / "plain" / f"{number:02d}.txt").write_text(text(generator.choice((3, 40, 400))))
    (folder / "masked").mkdir()
    with (folder / "masked" / "parts.jsonl").open("w") as file:
        for _ in range(30):
            parts = [{"text": text(generator.randint(1, 60)), "loss": bool(number % 2)} for number in range(3)]
            file.write(json.dumps({"parts": parts}) + "\n")


class Checkout:
    """A commit in a folder of its own."""

    def __init__(self, commit: str | None, folder: Path):
        """`commit` None: the files as they lie in this checkout."""
        self.name, self.root = commit or "here", ROOT
        if commit is not None:
            self.root = folder / "checkout"
            self.root.mkdir(parents=True)
            archive = subprocess.run(["git", "-C", ROOT, "archive", commit], check=True, capture_output=True)
            subprocess.run(["tar", "-x", "-C", self.root], input=archive.stdout, check=True)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, *command: str | Path, ranks: int = 1, stops: bool = False) -> None:
        """`stops`: the exit code may say that the run was stopped."""
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = programs.run(
            [*launcher, *map(str, command)],
            cwd=self.root,
            env=os.environ | environment | {"GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode and not stops:
            raise RuntimeError(
                f"{self.name}: {' '.join(map(str, command))}\n{done.stderr[:1500]} ... {done.stderr[-1500:]}"
            )

    def prepare(self, texts: Path) -> None:
        model = self.folder / "spm"
        vocabulary = ("--vocab-size", "500", "--cap-vocabulary")
        self.run("tokenizer/train.py", "--input", texts, "--output", model, *vocabulary)
        for name in ("plain", "masked"):
            # The size of a partition has two names; so small a size makes several partitions.
            size = "--partition-mib" if (self.root / "memformer_dist/prepare").is_dir() else "--unit-mib"
            where = ("--input", texts / name, "--tokenizer", f"{model}.model", "--output", self.folder / name)
            self.run("tokenizer/shard.py", *where, size, "0.01", "--valid-fraction", "0.2", "--workers", "2")

    def train(
        self,
        run_dir: Path,
        settings: dict[str, Any],
        config: dict[str, Any] = CONFIG,
        ranks: int = 2,
        stops: bool = False,
    ) -> None:
        raw = json.loads(json.dumps(config))
        settings = dict(settings)
        zero = {"stage": settings.pop("stage", 1)}
        if settings.pop("overlap_comm", False):
            zero["overlap_comm"] = True
        raw["deepspeed"] = {"zero_optimization": zero}
        raw["data"]["corpus"] = (
            str(self.folder / "plain")
            if settings.pop("plain", False)
            else {
                str(self.folder / "plain"): 1,
                str(self.folder / "masked"): 0.5,
            }
        )
        for name, value in settings.items():
            section, _, field = name.partition(".")
            raw[section] = value if not field else raw[section] | {field: value}
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "settings.json"
        path.write_text(json.dumps(raw))
        self.run("launch/train.py", "--config", path, "--run-dir", run_dir, ranks=ranks, stops=stops)


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without clocks, up to the evaluation at the end: only later commits record what comes behind it."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    end = next((number for number, record in enumerate(records, start=1) if "final/loss" in record), None)
    return [
        {key: x for key, x in record.items() if not key.startswith((*CLOCKS, *CHANGED))} for record in records[:end]
    ]


def tensors(run_dir: Path) -> dict[str, bytes]:
    last = max((run_dir / "checkpoints").glob("step-*"))
    return {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


def splits(folder: Path) -> dict[str, bytes]:
    files = [path for name in ("train", "valid") for path in sorted((folder / name).iterdir()) if path.is_file()]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def differing(old: Path, new: Path) -> list[str]:
    """What is not the same in two runs."""
    before, after = numbers(old), numbers(new)
    found = [f"{len(before)} and {len(after)} records"] if len(before) != len(after) else []
    for x, y in zip(before, after, strict=True):
        found += [f"step {x['step']}: {key}: {x.get(key)} and {y.get(key)}" for key in x if x[key] != y.get(key)]
    weights, others = tensors(old), tensors(new)
    return found + [name for name in weights.keys() | others.keys() if weights.get(name) != others.get(name)]


def processor_seconds(checkout: Checkout, run_dir: Path, steps: int) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    lanes, length, window = SPEED["data"]["lanes"], SPEED["data"]["segment_length"], SPEED["mrbp"]["window"]
    checkout.train(run_dir, {"training.tokens": steps * lanes * length * window, "plain": True}, SPEED, ranks=1)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare the files of this checkout with")
    parser.add_argument("--quick", action="store_true", help="one case of each kind")
    parser.add_argument("--speed", action="store_true", help="also compare the processor time of a step")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there as well")
    options = parser.parse_args()
    report: dict[str, Any] = {"commit": options.commit, "differing": {}}

    def compare(name: str, found: list[str]) -> None:
        report["differing"][name] = found
        print(f"{name:50} {'the same' if not found else f'{len(found)} differ: ' + '; '.join(found[:3])}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_texts(folder / "texts")
        old, new = Checkout(options.commit, folder / "old"), Checkout(None, folder / "new")
        for checkout in (old, new):
            checkout.prepare(folder / "texts")
        for name in ("plain", "masked"):
            before, after = splits(old.folder / name), splits(new.folder / name)
            compare(f"corpus {name}", [x for x in before.keys() | after.keys() if before.get(x) != after.get(x)])
        for number, (name, settings) in enumerate(cases(options.quick)):
            runs = [checkout.folder / f"run-{number}" for checkout in (old, new)]
            for checkout, run in zip((old, new), runs, strict=True):
                checkout.train(run, settings)
            compare(name, differing(*runs))
        whole = old.folder / "run-0"
        settings = next(cases(options.quick))[1]
        for name, first, second in (("resumed", new, new), ("started by the old commit, resumed", old, new)):
            run = folder / name
            run.mkdir()
            (run / "stop").touch()
            os.utime(run / "stop", (time.time() + 3600,) * 2)  # one that is older than the run stops nothing
            first.train(run, settings, stops=True)
            if (run / "summary.json").exists():
                raise RuntimeError(f"{name}: was not stopped")
            moved = old.folder if first is old else new.folder
            second.folder, kept = moved, second.folder  # the corpus that the run was started with
            second.train(run, settings)
            second.folder = kept
            compare(name, differing(whole, run))
        if options.speed:
            seconds: dict[str, list[float]] = {"old": [], "new": []}
            for turn in range(2 if options.quick else 5):
                for name, checkout in (("old", old), ("new", new)):
                    short, long = (processor_seconds(checkout, folder / f"{name}-{turn}-{n}", n) for n in (5, 65))
                    seconds[name].append((long - short) / 60)
            report["processor_s_per_step"] = seconds
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            ratio = statistics.median(y / x for x, y in zip(seconds["old"], seconds["new"], strict=True))
            print(f"processor s per step: {medians['old']:.4f} and {medians['new']:.4f}; in turns {ratio:.3f} times")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if any(report["differing"].values()):
        sys.exit(1)


if __name__ == "__main__":
    with programs.handing_on():
        run_program(main)
