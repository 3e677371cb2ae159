"""Loss of a trained model on held-out documents, with the memory carried and with it taken away.

    python launch/evaluate.py --run-dir runs/small
    python launch/evaluate.py --run-dir runs/small --corpus corpora/other --split train --max-segments 100 --json it.json
    torchrun --nproc-per-node 2 launch/evaluate.py --run-dir runs/small           # the same figures, in less time

memformer_dist/evaluate.py says what the rows of the table are. Plain torch in the precision of the weights, fp32: a run
trained in bf16 scores a little differently here than in its own log. The number of lanes changes the speed and what
"shuffled" reads; with --max-segments, which segments of every lane, it also changes which documents are read.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from memformer_dist.checkpoint import Checkpoint, open_one
from memformer_dist.data.open_data import as_read, open_mixture
from memformer_dist.errors import UserError, run_program
from memformer_dist.evaluate import AGES, Losses, evaluate, summary
from memformer_dist.world import World

NAMES = {
    "carried": "memory carried",
    "no_memory": "memory reset",
    "no_state": "everything reset",
    "shuffled": "memory shuffled",
}


def open_documents(saved: Checkpoint, corpus: str | None, split: str, lanes: int):
    """Those of `corpus`, or of the run. Raises UserError where they were made with another tokenizer than the run's."""
    data = saved.contents.config.data
    splits = open_mixture({corpus: 1.0} if corpus else data.corpora, cache=data.cache, cache_gib=data.cache_gib)
    corpus = as_read(splits[split == "valid"], data.mode, lanes)
    expected = saved.contents.vocabulary.tokenizer_sha256
    found = corpus.vocabulary.tokenizer_sha256
    if found != expected:
        raise UserError(
            f"--corpus: {corpus.path} was made with another tokenizer than the run: found sha256"
            f" {found[:16]}, expected {expected[:16]}"
        )
    return corpus


def table(losses: dict[str, Losses]) -> str:
    carried = losses["carried"].loss
    lines = [f"{'':18}{'loss':>9}{'perplexity':>12}{'gap':>9}"]
    for mode, found in losses.items():
        gap = "" if mode == "carried" else f"{found.loss - carried:+9.4f}"
        lines.append(f"{NAMES[mode]:18}{found.loss:9.4f}{found.perplexity:12.2f}{gap:>9}")
    ages = [age for age in AGES if age in losses["carried"].by_age]
    lines += ["", f"{'by segment age':18}" + "".join(f"{age:>9}" for age in ages)]
    for mode, found in losses.items():
        lines.append(f"{NAMES[mode]:18}" + "".join(f"{found.by_age[age]:9.4f}" for age in ages))
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="the run whose newest checkpoint is evaluated")
    parser.add_argument("--corpus", help="folder or URL of a corpus (default: what the run was trained on)")
    parser.add_argument("--split", choices=["valid", "train"], default="valid")
    parser.add_argument(
        "--lanes", type=int, help="documents read side by side by all ranks together (default: the run's)"
    )
    parser.add_argument("--max-segments", type=int, help="stop after this many segments of every lane (default: all)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there as well")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by DeepSpeed's launcher
    options = parser.parse_args()

    def program() -> None:
        for option in ("lanes", "max_segments"):
            found = getattr(options, option)
            if found is not None and found < 1:
                raise UserError(f"--{option.replace('_', '-')}: found {found}, expected at least 1")
        if options.json is not None and not options.json.parent.is_dir():
            raise UserError(f"--json: found no folder {options.json.parent}")
        world = World.start()
        saved = world.on_all_or_raise(lambda: open_one(options.run_dir))
        config, position = saved.contents.config, saved.contents.position
        lanes = options.lanes or config.data.lanes
        corpus = world.on_all_or_raise(lambda: open_documents(saved, options.corpus, options.split, lanes))
        cell = saved.cell(world.device)
        losses = evaluate(
            cell,
            cell.empty_state,
            corpus,
            world,
            lanes=lanes,
            segment_length=config.data.segment_length,
            ticks=options.max_segments,
            show=lambda ticks: tqdm(ticks, desc="evaluate", unit=" segments", disable=not world.is_main),
        )
        if not world.is_main:
            return
        print(
            f"{saved.path}, {position.tokens:,} tokens; {corpus.path}: {len(corpus.lengths):,} documents,"
            f" {corpus.total_tokens:,} tokens\n\n{table(losses)}"
        )
        if options.json is not None:
            facts = {
                "checkpoint": str(saved.path),
                "step": position.step,
                "tokens": position.tokens,
                "corpus": str(corpus.path),
                "max_segments": options.max_segments,
            }
            options.json.write_text(json.dumps(facts | summary(losses), indent=2) + "\n")

    run_program(program)


if __name__ == "__main__":
    main()
