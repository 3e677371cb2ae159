"""The cell with which a run starts: its weights random, or those of another run, and some of them frozen perhaps.

    initial = find_initial(config, run_dir, vocabulary, world)      # training.init_from
    cell = starting_cell(config, vocabulary, resumed=None, initial=initial)

training.expand takes the weights of a model with fewer layers. The new layers add nothing at first: the projections with
which their branches end are zero, so that the larger model is the same function. With training.freeze on all else this
is MEMO's expansion (arXiv 2205.13218): what was known stays to the bit, and a new domain has layers of its own.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.cells.layers import BranchOutput
from memformer_dist.checkpoint import Checkpoint, build_cell, open_one
from memformer_dist.config import RunConfig
from memformer_dist.errors import UserError, shortened
from memformer_dist.mrbp.executor import reseed
from memformer_dist.places import Places
from memformer_dist.vocabulary import Vocabulary
from memformer_dist.world import World

log = logging.getLogger(__name__)


def find_initial(config: RunConfig, run_dir: Path, vocabulary: Vocabulary, world: World) -> Checkpoint | None:
    """The checkpoint of another run, by training.init_from, whose weights a fresh run starts with. A collective call."""
    path = config.training.init_from
    if path is None:
        return None
    place = Path(Places.of_run(run_dir).found("training.init_from", path))
    return world.on_all_or_raise(lambda: open_initial(place, vocabulary))


def open_initial(path: Path, vocabulary: Vocabulary) -> Checkpoint:
    """The checkpoint of training.init_from. Raises UserError if its tokenizer is another one. Not collective."""
    try:
        initial = open_one(path)
    except UserError as error:
        raise UserError(f"training.init_from: {error}") from None
    found, expected = initial.contents.vocabulary.tokenizer_sha256, vocabulary.tokenizer_sha256
    if found != expected:
        raise UserError(
            f"training.init_from: {initial.path} was trained with another tokenizer than the corpus's: found sha256"
            f" {found[:16]}, expected {expected[:16]}"
        )
    return initial


def starting_cell(
    config: RunConfig, vocabulary: Vocabulary, *, resumed: Checkpoint | None, initial: Checkpoint | None
) -> RecurrentCell:
    """A cell with the weights of `resumed`, or else of `initial`, or else random ones. Not collective; on all ranks the same.

    Raises UserError if the weights are not this model's, or if training.freeze does not fit it.
    """
    reseed(torch.device("cpu"), config.training.seed)  # weights are drawn on the CPU
    cell = build_cell(config, vocabulary)
    if resumed is not None:
        resumed.load_weights(cell)
    elif initial is not None and config.training.expand:
        expand(cell, initial)
    elif initial is not None:
        initial.load_weights(cell)
    freeze(cell, config.training.freeze)
    return cell


def expand(cell: nn.Module, initial: Checkpoint) -> None:
    """Give a cell the weights of one with fewer layers; what is new adds nothing.

    Raises UserError if anything but layers is new, or nothing is.
    """
    known = initial.weight_names
    new = [name for name, _ in cell.named_parameters() if name not in known]
    layers = [layer for layer in _layers(cell) if not any(_begins(name, layer) for name in known)]
    others = [name for name in new if not any(_begins(name, layer) for layer in layers)]
    if others or not new:
        raise UserError(
            f"training.expand: found {shortened(others) or 'nothing'} in this model that {initial.path} lacks,"
            " expected further layers and nothing else"
        )
    initial.load_weights(cell, new=new)
    for layer in layers:
        for module in cell.get_submodule(layer).modules():
            if isinstance(module, BranchOutput):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
    log.info(f"training.expand: {', '.join(layers)} are new, and add nothing yet")


def freeze(cell: nn.Module, prefixes: Sequence[str]) -> None:
    """Take the parameters whose names begin with one of these out of training. Raises UserError with all that is wrong."""
    parameters = dict(cell.named_parameters())
    begins = dict.fromkeys(name.partition(".")[0] for name in parameters)
    unknown = [prefix for prefix in prefixes if not any(_begins(name, prefix) for name in parameters)]
    if unknown:
        raise UserError(
            f"training.freeze: found {shortened(unknown)}, with which no parameter of this model begins; expected"
            f" {', '.join(begins)}, or more of a name, up to a dot"
        )
    frozen = [name for name in parameters if any(_begins(name, prefix) for prefix in prefixes)]
    if len(frozen) == len(parameters):
        raise UserError(f"training.freeze: found {shortened(prefixes)}, which leaves no parameter to train")
    for name in frozen:
        parameters[name].requires_grad_(False)
    if frozen:
        count, total = (sum(parameters[name].numel() for name in names) for names in (frozen, parameters))
        log.info(f"training.freeze: {count:,} of {total:,} parameters stay as they are")


def _layers(cell: nn.Module) -> list[str]:
    """The names of all members of lists of modules."""
    lists = ((name, modules) for name, modules in cell.named_modules() if isinstance(modules, nn.ModuleList))
    return [f"{name}.{number}" for name, modules in lists for number in range(len(modules))]


def _begins(name: str, prefix: str) -> bool:
    """Dot by dot: `layers.1` begins `layers.1.norm.weight`, and not `layers.10.norm.weight`."""
    return f"{name}.".startswith(f"{prefix.removesuffix('.')}.")
