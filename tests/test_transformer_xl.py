"""Transformer-XL against loops over positions, against one long attention, and its key cache against recomputation."""

import itertools

import pytest
import torch

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.cells.transformer_xl import TransformerXL, TransformerXLConfig
from memformer_dist.config import RunConfig
from memformer_dist.errors import UserError
from memformer_dist.generate import Generation
from tests.helpers.caches import cell_logits, cut, transformer_xl_logits

VOCABULARY, SIZE = 11, 4
TOLERANCE = 1e-10


def new_cell(memory_length: int, segment_length: int = SIZE, kind=TransformerXL) -> TransformerXL:
    """In float64, with weights so large that every term counts."""
    torch.manual_seed(3)
    config = TransformerXLConfig(
        width=8, heads=2, feed_forward=12, layers=2, memory_length=memory_length, init_std=0.4, dropout=0.0
    )
    cell = kind(config, vocab_size=VOCABULARY, segment_length=segment_length).double().eval()
    for parameter in cell.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return cell


# Short rows in mid-document, a row without tokens between others, a whole document.
CUTS = [(4, 4, 4, 4, 3), (4, 1, 4, 2, 4), (2, 3, 0, 4, 4)]


@pytest.mark.parametrize("memory_length", [2, 4, 7, 32])
def test_logits_equal_loops_over_positions(memory_length):
    """A memory shorter than the segment, as long, longer, and longer than the document; rows of unequal length side by side."""
    cell = new_cell(memory_length)
    documents = [cut(seed, lengths, VOCABULARY) for seed, lengths in enumerate(CUTS)]
    for found, document in zip(cell_logits(cell, documents), documents, strict=True):
        expected = transformer_xl_logits(cell, document)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("flaw", ["content bias", "distance bias", "distance", "memory"])
def test_what_is_wrong_in_the_loops_is_seen(flaw):
    """The control: a bias left out, distances off by one, a memory too short by one."""
    cell, document = new_cell(5), cut(0, CUTS[0], VOCABULARY)
    (found,) = cell_logits(cell, [document])
    wrong = transformer_xl_logits(cell, document, flaw)
    assert (found - wrong)[2 * SIZE :].abs().max() > 1e-3


def test_a_memory_that_reaches_back_makes_one_long_attention():
    """Wherever the document is cut; a memory that is shorter by one position than it would have to be does not."""
    tokens = [token for row in cut(0, (4, 4, 4, 4), VOCABULARY) for token in row]
    (whole,) = cell_logits(new_cell(1, segment_length=16), [[tokens]])
    for lengths in [(4, 4, 4, 4), (4, 2, 4, 4, 2), (1, 4, 4, 3, 4)]:
        bounds = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
        document = [tokens[start:stop] for start, stop in itertools.pairwise(bounds)]
        enough = sum(lengths[:-1])
        (found,) = cell_logits(new_cell(enough), [document])
        torch.testing.assert_close(found, whole, rtol=TOLERANCE, atol=TOLERANCE)
        (short,) = cell_logits(new_cell(enough - 1), [document])
        assert (short - whole).abs().max() > 1e-4


class Recomputing(TransformerXL):
    """Generates as cells do that have no cache of their own."""

    open, extend, close = RecurrentCell.open, RecurrentCell.extend, RecurrentCell.close


@pytest.mark.parametrize("memory_length", [3, 9])
def test_the_key_cache_equals_recomputation(memory_length):
    """Documents of unequal length, fed in pieces: they reach the ends of segments at different times."""
    cells = [new_cell(memory_length, kind=kind) for kind in (TransformerXL, Recomputing)]
    generations = [Generation(cell, eos_id=2, documents=3) for cell in cells]
    generator = torch.Generator().manual_seed(1)
    for lengths in [(1, 6, 3), (2, 0, 5), (4, 1, 1), (0, 9, 2)]:
        tokens = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
        for generation in generations:
            generation.feed(tokens)
        found, expected = (generation.logits for generation in generations)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # kept in float32
    assert (found - found.roll(1, 0)).abs().max() > 1e-3


def test_positions_are_the_cells_own(tmp_path):
    """The field of the other cells is refused with what this one has; an odd width as well."""
    raw = {
        "model": {"cell": "transformer_xl", "width": 9, "heads": 3, "positions": "rotary"},
        "data": {"corpus": str(tmp_path), "lanes": 2, "segment_length": 4},
        "mrbp": {"window": 2},
        "training": {"tokens": 10},
    }
    with pytest.raises(UserError, match=r"model.positions: found 'rotary'; input should be 'relative'"):
        RunConfig.check(raw)
    del raw["model"]["positions"]
    with pytest.raises(UserError, match=r"width: found 9, expected an even number"):
        RunConfig.check(raw)
