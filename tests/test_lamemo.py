"""LaMemo against loops over positions and a softmax over both sides; that it looks ahead to the first token and no further."""

import pytest
import torch

from memformer_dist.cells import lamemo
from memformer_dist.cells.check import check_cell
from memformer_dist.cells.lamemo import LaMemo, LaMemoConfig
from memformer_dist.cells.transformer_xl import Sight
from tests.helpers.caches import Loops, cell_logits, cut, lamemo_logits

VOCABULARY, SIZE = 11, 4
TOLERANCE = 1e-10


def new_cell(memory_length: int, layers: int = 3) -> LaMemo:
    """In float64, with weights so large that every term counts."""
    torch.manual_seed(3)
    config = LaMemoConfig(
        width=8, heads=2, feed_forward=12, layers=layers, memory_length=memory_length, init_std=0.4, dropout=0.0
    )
    cell = LaMemo(config, vocab_size=VOCABULARY, segment_length=SIZE).double().eval()
    for parameter in cell.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return cell


# Short rows in mid-document, of one token too; a row without tokens.
CUTS = [(4, 4, 4, 4), (4, 1, 4, 2), (2, 1, 1, 4), (3, 0, 4, 4)]


@pytest.mark.parametrize("memory_length", [2, 4, 7, 32])
def test_logits_equal_loops_over_positions(memory_length):
    """A memory shorter than the segment, as long, longer, and longer than the document; rows of unequal length side by side."""
    cell = new_cell(memory_length)
    documents = [cut(seed, lengths, VOCABULARY) for seed, lengths in enumerate(CUTS)]
    for found, document in zip(cell_logits(cell, documents), documents, strict=True):
        torch.testing.assert_close(found, lamemo_logits(cell, document), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("flaw", ["content bias", "distance bias", "distance", "memory", "no look-ahead", "seen twice"])
def test_what_is_wrong_in_the_loops_is_seen(flaw):
    cell, document = new_cell(7), cut(0, CUTS[0], VOCABULARY)
    (found,) = cell_logits(cell, [document])
    assert (found - lamemo_logits(cell, document, flaw))[2 * SIZE :].abs().max() > 1e-4


def test_interpolated_step_by_step_equals_one_softmax_over_both_sides():
    """In the first layer, whose inputs stay as they are: of every position, over all up to the last segment's first token."""
    cell = new_cell(32, layers=2)
    document = cut(0, (4, 1, 3, 4, 2), VOCABULARY)
    state = after(cell, document)
    embedded = [cell.embedding.weight[token] for row in document for token in row]
    first, layer, loops = len(embedded) - len(document[-1]), cell.layers[0], Loops(cell)
    for i, query in enumerate(embedded):
        left, right = range(i + 1), range(i + 1, first + 1)
        sums = [
            loops.sums(layer, query, [embedded[j] for j in keys], [abs(i - j) for j in keys], bias)
            for keys, bias in ((left, layer.attention.distance_bias), (right, layer.ahead_bias))
        ]
        totals = [a + c for (a, _), (c, _) in zip(*sums, strict=True)]
        mixed = torch.cat([(b + d) / total for (_, b), (_, d), total in zip(*sums, totals, strict=True)])
        row = 32 - len(embedded) + i
        torch.testing.assert_close(state.mixed[0, 0, row], mixed, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(state.log_mass[0, 0, row], torch.stack(totals).log(), rtol=TOLERANCE, atol=TOLERANCE)
        if right:
            one_sided = torch.cat([b / a for a, b in sums[0]])
            assert (one_sided - mixed).abs().max() > 1e-4


@torch.no_grad()
def after(cell: LaMemo, document):
    states = []

    class Watched(LaMemo):
        def advance(self, segment, state):
            features, state = super().advance(segment, state)
            states.append(state)
            return features, state

    watched = Watched(cell.config, vocab_size=VOCABULARY, segment_length=SIZE).double().eval()
    watched.load_state_dict(cell.state_dict())
    cell_logits(watched, [document])
    return states[-1]


def test_looking_further_ahead_leaks(monkeypatch):
    """The control of causality: a memory that looks at the segment's second token tells the first about it."""
    cell = new_cell(5).float()
    assert check_cell(cell) == []
    right_of = lamemo.right_of

    def further(memory_length, latest, length):
        sight = right_of(memory_length, latest, length)
        columns = torch.arange(memory_length + 2)
        distance = columns - torch.arange(memory_length)[:, None]
        seen = torch.cat([sight.seen, torch.ones_like(sight.seen[..., :1])], dim=2)
        return Sight(distance[None], seen)

    monkeypatch.setattr(lamemo, "right_of", further)
    assert any("a token sees later ones" in problem for problem in check_cell(cell))
