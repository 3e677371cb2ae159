"""Train on one corpus after another, in several ways, and measure what is forgotten of those before.

    python launch/continual.py --config configs/quickstart.json --corpora corpora/books corpora/code corpora/mail
    torchrun --nproc-per-node 2 launch/continual.py ...                       # every run on two ranks
    python launch/continual.py ... --methods full expansion --layers 2 --json forgetting.json

    full         all parameters go on learning, on the new corpus alone
    replay       the same, with documents of the corpora before among the new ones, at as many tokens in all
    expansion    --layers more layers for each new corpus, which learn alone; all else stays as the first corpus left it
                 (MEMO, arXiv 2205.13218). Texts of a corpus are read by the layers of that corpus
    both         expansion with replay

Every run is an ordinary one of the configuration, with training.tokens of its own and a fresh optimiser, in
RUNS/METHOD/NUMBER; the first corpus is trained on once, in RUNS/first. What is finished is not done again, so that the same
command resumes. The table shows the perplexity per token on the validation split of every corpus after each of them, and
forgetting, the mean rise since a corpus was the newest one. A corpus that is still to come is read by the layers of the
newest.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memformer_dist import logs, orphans, signals
from memformer_dist.commands.options import Options, integer, nonempty_path, nonempty_path_or_url, not_writable, number
from memformer_dist.commands.train import find_config
from memformer_dist.errors import STOPPED, Stopped, run_program
from memformer_dist.files import expect_writable, read_json, write_text

if TYPE_CHECKING:
    from memformer_dist.config import RunConfig
    from memformer_dist.world import World

METHODS = ("full", "replay", "expansion", "both")
EXPANDING, REPLAYING = ("expansion", "both"), ("replay", "both")
FOUND = "perplexity.json"  # in a run's folder, what it makes of each corpus


class Stage(NamedTuple):
    """A run: the corpus `number` of those given, after the ones before it."""

    method: str
    number: int
    folder: Path
    config: "RunConfig"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises UserError."""
    parser = Options(__doc__, check=_problems)
    add = parser.add_argument
    add(
        "--config",
        type=nonempty_path_or_url,
        required=True,
        help="a JSON file, or the name of a configuration in configs/; its data.corpus is not used",
    )
    add("--corpora", type=nonempty_path_or_url, nargs="+", required=True, help="folders or URLs, in their order")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--layers", type=integer(least=1), default=1, help="that a corpus adds where a method expands (default: 1)")
    add(
        "--replay-share",
        type=number(above=0, below=1),
        default=0.5,
        help="share of the tokens that is of the corpora before, where a method replays (default: 0.5)",
    )
    parser.add_overrides()
    add("--runs", type=nonempty_path, default=Path("runs/continual"), help="folder for the runs")
    add("--json", type=nonempty_path, metavar="PATH", help="write the figures there as well")
    add("--local_rank", help=argparse.SUPPRESS)  # of DeepSpeed's launcher
    return parser.parse_args(arguments)


def _problems(options: argparse.Namespace) -> Iterator[str]:
    yield from not_writable("--json", options.json)
    corpora = options.corpora if isinstance(options.corpora, list) else []
    if len(corpora) < 2 or len(set(corpora)) < len(corpora):
        yield f"--corpora: found {', '.join(map(str, corpora))}, expected two or more different ones"


def main(arguments: list[str] | None = None) -> None:
    """Raises UserError, and Stopped if it was stopped before the end."""
    options = parse(arguments)
    from memformer_dist.launcher import detected
    from memformer_dist.world import World

    world = World.start()
    stages = world.on_all_or_raise(lambda: list(planned(options, detected().size)))
    found: dict[Path, list[float]] = {}
    for stage in stages:
        world.on_all_or_raise(partial(expect_writable, stage.folder / logs.FILE, "--runs"))
    for stage in stages:
        logs.start(world.rank, stage.folder / logs.FILE)
        found[stage.folder] = train_and_measure(stage, options.corpora, world)
        logs.stop()
    if world.is_main:
        result = {
            method: matrix(method, [found[stage.folder] for stage in stages if stage.method in ("", method)])
            for method in options.methods
        }
        print("\n\n".join(table(method, rows) for method, rows in result.items()))
        if options.json is not None:
            facts = {
                "corpora": [str(corpus) for corpus in options.corpora],
                "layers": options.layers,
                "replay_share": options.replay_share,
                "config": json.loads(stages[0].config.to_json()),
                "methods": {
                    method: {"perplexity": rows, "forgetting": forgetting(rows)} for method, rows in result.items()
                },
            }
            write_text(options.json, json.dumps(facts, indent=2) + "\n")


def run() -> None:
    signals.note_stop_requests()
    orphans.stop_with_launcher()
    run_program(main)


# ---- the runs --------------------------------------------------------------------------------------------------------


def planned(options: argparse.Namespace, world_size: int) -> Iterator[Stage]:
    """All runs, in the order in which they are made: mistakes come before any work. Raises UserError."""
    from memformer_dist.config import RunConfig

    path = find_config(options.config)
    raw = RunConfig.load(path, [f"data.corpus={json.dumps(str(options.corpora[0]))}", *options.set], world_size)
    first = Stage("", 0, options.runs / "first", raw)
    yield first
    base = json.loads(raw.to_json())
    for method in options.methods:
        before = first
        for place in range(1, len(options.corpora)):
            changed = json.loads(json.dumps(base))
            changed["data"]["corpus"] = mixed(
                options.corpora[: place + 1], options.replay_share if method in REPLAYING else 0
            )
            changed["training"]["init_from"] = str(before.folder)
            if method in EXPANDING:
                field = layers_field(base["model"])
                changed["model"][field] += options.layers
                changed["training"] |= {"init_from": str(first.folder), "expand": True, "freeze": parts(raw)}
            config = RunConfig.check(changed, world_size, source=f"--methods {method}")
            before = Stage(method, place, options.runs / method / str(place), config)
            yield before


def mixed(corpora: Sequence[Any], replayed: float) -> Any:
    """data.corpus: the last of the corpora, and a share of the others, equal among them."""
    *old, new = map(str, corpora)
    return {new: 1 - replayed} | dict.fromkeys(old, replayed / len(old)) if replayed else new


def layers_field(model: dict[str, Any]) -> str:
    """Which field says how many layers a model has at its end."""
    return "decoder_layers" if "decoder_layers" in model else "layers"


def parts(config: "RunConfig") -> list[str]:
    """The beginnings of the names of all parameters, whole layers where there are layers."""
    cell = config.model.build(vocab_size=8, bos_id=0, segment_length=config.data.segment_length)
    found = []
    for name, _ in cell.named_parameters():
        words = name.split(".")
        numbers = [place for place, word in enumerate(words) if word.isdigit()]
        found.append(".".join(words[: numbers[0] + 1] if numbers else words))
    return list(dict.fromkeys(found))


def train_and_measure(stage: Stage, corpora: Sequence[Any], world: "World") -> list[float]:
    """Perplexities on all corpora, of what is trained and measured where it is not there yet. A collective call."""
    from memformer_dist.checkpoint import open_one
    from memformer_dist.data.open_data import as_read, open_data, open_mixture
    from memformer_dist.evaluate import evaluate, plan
    from memformer_dist.places import Places
    from memformer_dist.train import train

    config, data = stage.config, stage.config.data
    if train(config, stage.folder, open_data(data, Places.of_run(stage.folder)), world) is None:
        raise Stopped(exit_code=STOPPED)
    wanted = {"corpora": [str(corpus) for corpus in corpora], "config": json.loads(config.to_json())}
    kept = (read_json(stage.folder / FOUND) or {}) if world.is_main else {}
    known = json.dumps(kept["perplexity"]) if kept.items() >= wanted.items() else None
    if known := world.broadcast_first(known):
        return json.loads(known)
    cell, found = open_one(stage.folder).cell(world.device), []
    for corpus in corpora:
        _, valid = open_mixture({str(corpus): 1.0}, cache=data.cache, cache_gib=data.cache_gib)
        dataset = as_read(valid, data.mode, data.lanes)
        reads = plan(
            dataset,
            world.size,
            lanes=data.lanes,
            segment_length=data.segment_length,
            warmup_segments=config.training.evaluate_warmup_segments,
        )
        losses = evaluate(cell, cell, reads, world, segments=config.training.final_evaluate_segments)
        assert losses is not None  # nobody stops it
        found.append(math.exp(losses["carried"].loss))
    if world.is_main:
        write_text(stage.folder / FOUND, json.dumps(wanted | {"perplexity": found}, indent=2) + "\n")
    return found


# ---- what is shown ---------------------------------------------------------------------------------------------------


def matrix(method: str, found: list[list[float]]) -> list[list[float]]:
    """[i][j], perplexity on corpus j after corpus i. Where a method expands, j <= i is read by the layers of j."""
    if method not in EXPANDING:
        return found
    return [[found[min(i, j)][j] for j in range(len(row))] for i, row in enumerate(found)]


def forgetting(rows: list[list[float]]) -> float:
    """How much the perplexity has risen at the end since a corpus was the newest one: the mean over all but the last."""
    return sum(rows[-1][j] - rows[j][j] for j in range(len(rows) - 1)) / (len(rows) - 1)


def table(method: str, rows: list[list[float]]) -> str:
    heads = [f"corpus {place}" for place in range(len(rows))]
    lines = [f"{method}: perplexity per token by corpus; forgetting {forgetting(rows):+.2f}", ""]
    lines += [f"| trained up to | {' | '.join(heads)} |", "|---" * (len(rows) + 1) + "|"]
    lines += [f"| corpus {i} | {' | '.join(f'{value:.2f}' for value in row)} |" for i, row in enumerate(rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    run()
