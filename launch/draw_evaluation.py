"""Draw what the memory is worth: held-out loss along a run, and by segment age at its end.

    pip install -e ".[plot]" -c constraints.txt
    python launch/draw_evaluation.py --run-dir runs/books_cpu --output docs/books_cpu.png

Left: the evaluations on the way, from metrics.jsonl. Right: from summary.json, how much the loss on all held-out
documents rises when something is taken away, by the number of segments since the document's start.
"""

from math import nan
from pathlib import Path

from memformer_dist.commands.options import Options, nonempty_path
from memformer_dist.errors import UserError, run_program
from memformer_dist.files import expect_writable, read_json, read_json_lines

CURVES = {
    "eval/loss": ("memory carried", "tab:blue"),
    "eval/loss_no_memory": ("memory reset", "tab:orange"),
    "eval/loss_shuffled": ("memory of another lane", "tab:green"),
    "eval/loss_no_state": ("everything reset", "tab:red"),
}
MODES = {
    "no_memory": CURVES["eval/loss_no_memory"],
    "shuffled": CURVES["eval/loss_shuffled"],
    "no_state": CURVES["eval/loss_no_state"],
}


def read(run_dir: Path) -> tuple[list[dict], dict]:
    """The records of evaluations, and the summary. Raises UserError if the run is not finished."""
    records = [record for _, record in read_json_lines(run_dir / "metrics.jsonl")]
    summary = read_json(run_dir / "summary.json")
    if not records or summary is None:
        missing = run_dir / ("metrics.jsonl" if summary is not None else "summary.json")
        raise UserError(f"--run-dir: found no {missing}, expected a finished run")
    evaluations = [record for record in records if "eval/loss" in record]
    if not evaluations:
        raise UserError(
            f"--run-dir: found no evaluation in {run_dir / 'metrics.jsonl'} (training.evaluate_every_tokens)"
        )
    return evaluations, summary


def draw(run_dir: Path, output: Path) -> None:
    """Raises UserError."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'memformer_dist[plot]'") from None

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records, summary = read(run_dir)
    expect_writable(output, "--output")
    figure, (along, by_age) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for name, (label, colour) in CURVES.items():
        along.plot(
            [r["tokens"] / 1e6 for r in records], [r.get(name, nan) for r in records], color=colour, label=label, lw=1.5
        )
    along.set(
        xlabel="million tokens", ylabel="held-out loss, nats per token", title="while training (some held-out segments)"
    )
    if records:  # a memory model without its state may be far out at first
        along.set_ylim(top=records[0]["eval/loss"] + 0.3)
    along.legend()

    losses = summary["eval_loss_by_segment_age"]
    ages = list(losses["carried"])
    for mode, (label, colour) in MODES.items():
        above = [nan if losses[mode][age] is None else losses[mode][age] - losses["carried"][age] for age in ages]
        by_age.plot(ages, above, "o-", color=colour, label=label)
    by_age.axhline(0, color="tab:blue", label="memory carried")
    by_age.set(
        xlabel="segments since the document's start",
        ylabel="loss above memory carried",
        title="at the end (all held-out text)",
    )
    by_age.legend()
    for axes in (along, by_age):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    try:
        figure.savefig(output, dpi=110)
    except ValueError as error:  # an ending that is none of a picture
        raise UserError(f"--output: {error}") from None


def picture(words: str) -> Path:
    if nonempty_path(words).suffix not in (".png", ".svg"):
        raise ValueError(f"found {words}, expected a .png or .svg file")
    return nonempty_path(words)


def main() -> None:
    parser = Options(__doc__)
    parser.add_argument("--run-dir", type=nonempty_path, required=True, help="a finished run")
    parser.add_argument("--output", type=picture, required=True, help="a .png or .svg file")

    def program() -> None:
        options = parser.parse_args()
        draw(options.run_dir, options.output)

    run_program(program)


if __name__ == "__main__":
    main()
