"""From text to a trained memory transformer on one machine: tokenizer, corpus, training, evaluation, a sample.

    bash launch/quickstart.sh                   # makes the environment, then trains on Python's standard library
    bash launch/quickstart.sh my_texts/         # ... on a folder of text

Each step is a command of its own and is printed before it runs; use these commands for your own data. Everything lies
in runs/quickstart, or for a folder NAME in runs/quickstart-NAME-HASH, with a hash of its path.

Ctrl-C, and the signals that stop a training (docs/running.md), are handed on to the step at work: training saves a
checkpoint first. The exit code is then the step's, 75 of a training that was stopped, and the same command resumes.
"""

import hashlib
import json
import math
import os
import shlex
import socket
import sys
import sysconfig
from pathlib import Path

from memformer_dist import programs, signals
from memformer_dist.commands.options import Options, nonempty_path
from memformer_dist.errors import STOPPED, Stopped, UserError, run_program
from memformer_dist.files import read_json

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "quickstart.json"
CPU_RANKS = 2
MAX_EPOCHS = 40  # of a folder so small that the configuration's tokens would be more
RESUMES = "\nstopped before its end; the same command resumes"
PROMPT_TOKENS, SAMPLE_TOKENS = 48, 80


def run(*command: str | Path, advice: str = "", ranks: bool = False, **environment: str) -> None:
    """Run one step as a user would; a step that fails or was stopped ends the quickstart with its exit code.

    Args:
        advice: printed where the step fails because of a mistake of the user's (exit code 2).
        ranks: the step is a launcher, and signals are for the ranks that it starts.
    """
    shown = " ".join(shlex.quote(os.path.relpath(part) if isinstance(part, Path) else part) for part in command)
    print(f"\n$ {shown}", flush=True)
    code = programs.run(command, ranks=ranks, env=os.environ | environment).returncode
    if code == STOPPED:
        raise Stopped(RESUMES)
    if code == 2 and advice:
        print(advice, file=sys.stderr)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def start_over(folder: Path) -> str:
    """Advice for when the results of an earlier run do not fit any more."""
    return (
        f"\n{os.path.relpath(folder)} was made by an earlier run. If the texts, the configuration or the number of GPUs"
        f" have changed since, start over:  rm -r {shlex.quote(os.path.relpath(folder))}"
    )


def prepare(inputs: list[str], folder: Path) -> Path:
    """Train the tokenizer and make the corpus, unless an earlier run has made them -> the corpus."""
    model, corpus = folder / "spm.model", folder / "corpus"
    if not model.exists():
        run(
            *(sys.executable, ROOT / "tokenizer/train.py", "--input", *inputs, "--output", model),
            *("--vocab-size", "2048", "--cap-vocabulary", "--sample-characters", "3000000"),
        )
    run(
        *(sys.executable, ROOT / "tokenizer/shard.py", "--input", *inputs, "--tokenizer", model, "--output", corpus),
        *("--valid-fraction", "0.01"),
        advice=start_over(folder) if corpus.exists() else "",
    )
    return corpus


def train(corpus: Path, folder: Path) -> dict:
    """Train on every GPU of this machine, or on two CPU ranks -> the figures of summary.json."""
    import torch  # takes seconds, which the first step need not wait for

    ranks, environment = torch.cuda.device_count(), {}
    if ranks == 0:
        ranks = CPU_RANKS
        environment = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    config = json.loads(CONFIG.read_bytes())
    lanes, tokens = lanes_for(ranks, config), budget(corpus, config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run(
        *("deepspeed", "--num_gpus", str(ranks), "--master_port", str(port)),
        *(ROOT / "launch/train.py", "--config", CONFIG, "--run-dir", folder),
        *("--set", f"data.corpus={corpus}", "--set", f"data.lanes={lanes}"),
        *("--set", f"training.tokens={tokens}"),
        advice=start_over(folder) if (folder / "checkpoints").exists() else "",
        ranks=True,
        **environment,
    )
    summary = finished(folder, tokens)
    if summary is None:
        raise Stopped(RESUMES)
    return summary


def finished(folder: Path, tokens: int) -> dict | None:
    """The summary of a run that has trained on so many tokens, None where it has trained on fewer."""
    path = folder / "summary.json"
    summary = read_json(path)
    return summary if summary and summary["tokens"] >= tokens else None


def lanes_for(ranks: int, config: dict) -> int:
    """The configuration's lanes, or the next number that the ranks divide."""
    return math.ceil(config["data"]["lanes"] / ranks) * ranks


def budget(corpus: Path, config: dict) -> int:
    """Tokens to train on: the configuration's; fewer where documents leave segments half empty or are few."""
    from memformer_dist.data.open_data import open_corpora  # signals are heard before: it takes a second

    lengths = open_corpora(corpus)[0].lengths
    segment_length = config["data"]["segment_length"]
    filled = lengths.sum() / (-(-lengths // segment_length) * segment_length).sum()
    return max(1, int(min(config["training"]["tokens"] * filled, MAX_EPOCHS * lengths.sum())))


def sample(corpus: Path, folder: Path) -> None:
    """Let the model continue the beginning of a held-out document."""
    from memformer_dist.data.open_data import open_corpora
    from memformer_dist.tokenizer import open_tokenizer

    valid = open_corpora(corpus)[1]
    document = int(valid.lengths.argmax())
    beginning = valid.tokens(document, 0, min(PROMPT_TOKENS, int(valid.lengths[document]) // 2 + 1)).tolist()
    prompt_file = folder / "prompt.txt"
    prompt_file.write_bytes(open_tokenizer(valid.tokenizer()).decode(beginning).encode())
    print("\nThe beginning of a held-out document, and how the model continues it:")
    run(
        *(sys.executable, ROOT / "launch/generate.py", "--run-dir", folder, "--prompt-file", prompt_file),
        *("--tokens", str(SAMPLE_TOKENS)),
    )


def table(summary: dict, folder: Path) -> str:
    """Held-out losses, speed, and where the run lies."""
    rows = [
        ("memory carried", "eval_loss"),
        ("memory reset at every segment", "eval_loss_no_memory"),
        ("everything reset at every segment", "eval_loss_no_state"),
    ]
    lines = [f"{'held-out documents':36}{'loss':>8}{'perplexity':>12}{'gap':>9}"]
    for name, key in rows:
        gap = "" if key == "eval_loss" else f"{summary[key] - summary['eval_loss']:+9.4f}"
        lines.append(f"{name:36}{summary[key]:8.4f}{math.exp(min(summary[key], 700)):12.2f}{gap}")
    lines += [
        (
            f"{summary['tokens']:,} tokens in {summary['wall_s']:.0f} s, {summary['tokens_per_s']:,.0f} tokens/s"
            f" on {summary['world_size']} ranks"
        ),
        f"the run: {os.path.relpath(folder)}   its figures: {os.path.relpath(folder / 'summary.json')}",
        (
            f"its curves: {os.path.relpath(ROOT / '.venv/bin/tensorboard')}"
            f" --logdir {os.path.relpath(folder / 'tensorboard')}"
        ),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = Options(__doc__)
    parser.add_argument(
        "path",
        nargs="?",
        type=nonempty_path,
        help="a folder of text (default: the source code of Python's standard library)",
    )
    parser.add_argument(
        "--runs", type=nonempty_path, default=ROOT / "runs", help="where the run's folder is made (default: runs/)"
    )
    options = parser.parse_args(arguments)
    if options.path is None:
        folder = options.runs / "quickstart"
        inputs = [sysconfig.get_path("stdlib"), "--exclude", "site-packages", "dist-packages", "__pycache__"]
    else:
        path = options.path.resolve()
        folder = options.runs / f"quickstart-{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"
        inputs = [str(path)]
        if not options.path.exists():
            raise UserError(f"found nothing at {options.path}, expected a folder of text")
    folder.mkdir(parents=True, exist_ok=True)
    corpus = prepare(inputs, folder)
    summary = train(corpus, folder)
    sample(corpus, folder)
    print("\n" + table(summary, folder))


if __name__ == "__main__":
    with programs.handing_on(signals.STOPPING, RESUMES):
        run_program(main)
