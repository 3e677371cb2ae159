"""The cell that comes out of a checkpoint is the one that went in, buffers included, and nothing of it is code."""

import ast
import re

import pytest
import torch

from memformer_dist import checkpoint, saving
from memformer_dist.checkpoint import Checkpoint
from memformer_dist.errors import UserError
from tests.helpers import ROOT
from tests.helpers.checkpoints import (
    LANES,
    MODEL,
    SEGMENT_LENGTH,
    contents,
    lane_state,
    save,
)
from tests.helpers.engines import make_engine, make_optimizer
from tests.helpers.files import flip
from tests.helpers.ranks import run_ranks
from tests.helpers.toy import ToyCell, random_window

# ---- the cell --------------------------------------------------------------------------------------------------------


def memformer(model: dict = MODEL):
    torch.manual_seed(3)
    about = contents(1, model=model)
    return checkpoint.build_cell(about.config, about.vocabulary)


def losses(cell) -> torch.Tensor:
    state, rows = cell.empty_state(2), []
    for segment in random_window(3, 2, SEGMENT_LENGTH, seed=0):
        features, state = cell("advance", segment, state)
        rows.append(cell("readout", segment, features))
    return torch.cat(rows).detach()


def test_the_cell_that_is_loaded_is_the_one_that_was_saved(tmp_path, world):
    cell = memformer()
    path = save(tmp_path, world, 1, cell=cell)
    for place in (tmp_path, path):
        saved = checkpoint.open_one(place)
        loaded = saved.cell(torch.device("cpu"))
        assert not loaded.training and saved.contents.config == contents(1).config
        assert torch.equal(losses(loaded), losses(cell.eval()))
    with torch.no_grad():
        cell.embedding.weight[5, 0] += 0.01
    assert not torch.equal(losses(loaded), losses(cell))
    flip(path / "weights-00000.safetensors")
    for place in (tmp_path, path):
        with pytest.raises(UserError, match="damaged\n  .*weights-00000.safetensors: found"):
            checkpoint.open_one(place)


@pytest.mark.parametrize(
    "model, message",
    [
        ({"slots": 5}, r"normalise.bias has shape \(3, 8\), this model's has \(5, 8\)"),
        ({"tie_embeddings": False}, "head.weight on one side only"),
        ({"memory_norm": False}, "memory_norm.bias, memory_norm.weight on one side only"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, world, model, message):
    path = save(tmp_path, world, 1, cell=memformer())
    checkpoint.open_one(tmp_path).load_weights(memformer())
    with pytest.raises(UserError, match=f"{path}: .*{message}"):
        checkpoint.open_one(tmp_path).load_weights(memformer(MODEL | model))


# ---- no pickle -------------------------------------------------------------------------------------------------------


def unpicklers(source: str) -> set[str]:
    """What in a module could run the code that a file holds."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword):
            found.add(str(node.arg))
    forbidden = (
        r"c?pickle|dill|cloudpickle|joblib|shelve|marshal|torch\.(load|save)|\w+\.(load|save)_checkpoint|allow_pickle"
    )
    return {name for name in found if re.fullmatch(forbidden, name)}


def test_nothing_is_pickled(tmp_path, world):
    files = list(save(tmp_path, world, 1).iterdir())
    assert {path.suffix for path in files} == {".json", ".safetensors"} and len(files) == 5
    sources = [path for folder in ("memformer_dist", "launch", "tokenizer") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 15
    for path in sources:
        assert not unpicklers(path.read_text()), path
    for line in ("import pickle", "from torch import load", "torch.save(x, y)", "np.load(x, allow_pickle=True)"):
        assert unpicklers(line), line


# ---- buffers ---------------------------------------------------------------------------------------------------------


class RandomFeatures(ToyCell):
    """With a random projection that is no parameter, and with what can be computed again."""

    def __init__(self):
        super().__init__()
        self.register_buffer("projection", torch.randn(3, 3))
        self.register_buffer("counts", torch.randint(99, (2,)))
        self.register_buffer("table", torch.randn(2), persistent=False)


def buffers_rank(world, folder) -> None:
    for stage in range(4):
        torch.manual_seed(stage)
        cell = RandomFeatures()
        settings = {"zero_optimization": {"stage": stage}}
        engine = make_engine(cell, make_optimizer("adamw", cell, 1e-2), world, settings=settings)
        expected = {name: buffer.clone() for name, buffer in cell.named_buffers()}
        run_dir, lanes = folder / str(stage), world.lanes_of_rank(LANES)
        path = saving.save(run_dir, engine, world, contents=contents(1), lanes=lanes, state=lane_state(lanes, 1))
        fresh, saved = RandomFeatures(), Checkpoint(path)
        other = {name: buffer.clone() for name, buffer in fresh.named_buffers()}
        saved.load_weights(fresh)
        for name, buffer in fresh.named_buffers():
            assert torch.equal(buffer, (other if name == "table" else expected)[name]), (stage, name)
            assert buffer.dtype == expected[name].dtype
        assert saved.trained == {name for name, _ in fresh.named_parameters()}
        with pytest.raises(UserError, match="its parameters are not this model's: counts, projection on one side"):
            saved.load_weights(ToyCell())


@pytest.mark.slow
def test_persistent_buffers_are_part_of_a_checkpoint(tmp_path, world):
    """A random projection was drawn anew by evaluation and generation, and the model was another one."""
    run_ranks(2, buffers_rank, tmp_path)
    cell = RandomFeatures()
    before = cell.projection.clone()
    save(tmp_path / "old", world, 1, cell=ToyCell())
    Checkpoint(tmp_path / "old/checkpoints/step-00000001").load_weights(cell)
    assert torch.equal(cell.projection, before), "a checkpoint of an earlier version has none"
