"""The cell with which a run starts: expanded by layers that add nothing yet, and frozen in part."""

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from memformer_dist.cells import ModelConfig
from memformer_dist.checkpoint import Checkpoint
from memformer_dist.config import RunConfig
from memformer_dist.errors import UserError
from memformer_dist.initial import expand, freeze
from tests.helpers.memformer import SIZE, TICKS, VOCABULARY
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import MODELS, STEP_TOKENS, last_checkpoint, run_rank, settings, tensors

ALL = MODELS | {
    "memformer": {"width": 16, "heads": 2, "feed_forward": 32, "slots": 3, "encoder_layers": 1, "decoder_layers": 2}
}


def larger(model: dict, by: int = 2) -> dict:
    field = "decoder_layers" if "decoder_layers" in model else "layers"
    return model | {field: model[field] + by}


def build(cell: str, model: dict, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = TypeAdapter(ModelConfig).validate_python({"cell": cell} | model)
    return config.build(vocab_size=VOCABULARY, bos_id=1, segment_length=SIZE).double().eval()


class Saved:
    """In place of a Checkpoint: the weights of a cell."""

    path = "CHECKPOINT"

    def __init__(self, cell: nn.Module):
        self.weights = dict(cell.named_parameters())
        self.weight_names = self.weights.keys()

    def load_weights(self, cell, *, new=()):
        with torch.no_grad():
            for name, parameter in cell.named_parameters():
                if name not in new:
                    parameter.copy_(self.weights[name])


def losses(cell: nn.Module) -> torch.Tensor:
    """[ticks, B, S], over documents that begin and end, memory resets and short segments."""
    state, found = cell.empty_state(len(TICKS[0].length)), []
    for segment in TICKS:
        features, state = cell("advance", segment, state)
        found.append(cell("readout", segment, features))
    return torch.stack(found)


@pytest.mark.parametrize("name", ALL)
def test_an_expanded_model_is_the_same_function_and_learns_to_be_another(name):
    small, large = build(name, ALL[name]), build(name, larger(ALL[name]), seed=1)
    expected = losses(small)
    assert not torch.equal(losses(large), expected), "the control: with weights of its own it is another function"
    expand(large, Saved(small))
    assert torch.equal(losses(large), expected)

    losses(large).sum().backward()
    fresh = [parameter for key, parameter in large.named_parameters() if key not in Saved(small).weight_names]
    with torch.no_grad():
        for parameter in fresh:
            parameter -= 0.1 * (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    assert (losses(large) - expected).abs().max() > 1e-4


@pytest.mark.parametrize(
    "there, here, message",
    [
        ({}, {}, "found nothing in this model that CHECKPOINT lacks, expected further layers"),
        ({}, {"layers": 3, "tie_embeddings": False}, "found head.weight in this model that CHECKPOINT lacks"),
        ({"final_norm": False}, {}, "found layers.norm.weight, layers.norm.bias in this model"),
    ],
)
def test_nothing_but_layers_may_be_new(there, here, message):
    small, large = (build("plain", MODELS["plain"] | fields) for fields in (there, here))
    with pytest.raises(UserError, match=f"^training.expand: {message}"):
        expand(large, Saved(small))


def frozen(cell: nn.Module) -> set[str]:
    return {name for name, parameter in cell.named_parameters() if not parameter.requires_grad}


def test_names_are_frozen_dot_by_dot():
    cell = build("plain", MODELS["plain"] | {"layers": 11})
    freeze(cell, [])
    assert not frozen(cell)
    freeze(cell, ["embedding", "layers.layers.1", "layers.layers.2.self_attention."])
    begins = ("embedding.", "layers.layers.1.", "layers.layers.2.self_attention.")
    assert frozen(cell) == {name for name, _ in cell.named_parameters() if name.startswith(begins)}


@pytest.mark.parametrize(
    "prefixes, message",
    [
        (["embed", "layers", "decoder"], "found embed, decoder, with which .*; expected embedding, layers, or more"),
        (["embedding", "layers"], "found embedding, layers, which leaves no parameter to train"),
    ],
)
def test_what_cannot_be_frozen(prefixes, message):
    with pytest.raises(UserError, match=f"^training.freeze: {message}"):
        freeze(build("plain", MODELS["plain"]), prefixes)


def test_an_expansion_needs_something_to_expand(corpus_dir):
    with pytest.raises(UserError, match="training.expand: found true, expected training.init_from with it"):
        RunConfig.check(settings(corpus_dir, training={"expand": True}))


def expansion_rank(world, base: dict, cases) -> None:
    for raw, folder in cases:
        run_rank(world, base | {"deepspeed": raw["deepspeed"]}, folder / "base")
        run_rank(world, raw, folder / "whole")
        run_rank(world, raw, folder / "parts", stop_after=2)
        run_rank(world, raw, folder / "parts")


@pytest.mark.slow
def test_what_is_frozen_stays_to_the_bit(corpus_dir, tmp_path):
    """Expanded runs of several steps with dropout and weight decay on two ranks, one of them stopped and resumed."""
    base = settings(corpus_dir, tokens=2 * STEP_TOKENS, dropout=0.2)
    base["model"] |= {"cell": "memformer"}
    cases = []
    for stage in (1, 3):
        folder = tmp_path / f"stage-{stage}"
        raw = settings(corpus_dir, stage=stage, tokens=4 * STEP_TOKENS, dropout=0.2)
        raw["model"] = larger(raw["model"] | {"cell": "memformer"}, by=1)
        raw["training"] |= {"init_from": str(folder / "base"), "expand": True}
        raw["training"]["freeze"] = ["embedding", "encoder", "writer", "normalise", "decoder.layers.0"]
        cases.append((raw, folder))
    run_ranks(2, expansion_rank, base, cases)
    for raw, folder in cases:
        there, here = (tensors(last_checkpoint(folder / name), "weights") for name in ("base", "whole"))
        new = here.keys() - there.keys()
        assert new and all(name.startswith("decoder.layers.") for name in new)
        for name, tensor in there.items():
            is_frozen = name.startswith(tuple(f"{prefix}." for prefix in raw["training"]["freeze"]))
            assert torch.equal(tensor, here[name]) == is_frozen, name
        assert any(here[name].any() for name in new if name.endswith("output.weight")), "the new layer has learned"
        for prefix in ("weights", "moments", "lanes"):
            whole, parts = (tensors(last_checkpoint(folder / name), prefix) for name in ("whole", "parts"))
            assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
        assert Checkpoint(last_checkpoint(folder / "whole")).trained == {
            name for name in here if not name.startswith(tuple(f"{prefix}." for prefix in raw["training"]["freeze"]))
        }
