"""Recurrent Memory Transformer: what is special to it. tests/test_equations.py compares it with the paper."""

import pytest
import torch

from memformer_dist.cells.rmt import RmtConfig
from tests.helpers.memformer import BOS, SIZE, VOCABULARY, make_segment


def test_a_memory_is_of_the_size_that_the_layers_write():
    """As initialised: memories keep the norm sqrt(D) from the first on, and the text decides what they are.

    With the small weights of other models it does not, the control: memories of two texts are all but the same.
    """
    shares = {}
    for std in (64**-0.5, 0.02):
        torch.manual_seed(0)
        config = RmtConfig(width=64, heads=4, feed_forward=128, layers=2, slots=4, dropout=0.0, init_std=std)
        cell = config.build(vocab_size=VOCABULARY, bos_id=BOS, segment_length=SIZE)
        memories = []
        for text in range(2):
            state = cell.empty_state(8)
            for t in range(3):
                segment = make_segment([SIZE] * 8, reset=[t == 0] * 8, seed=10 * text + t)
                with torch.no_grad():
                    _, state = cell("advance", segment, state)
                norms = state.memory.norm(dim=-1)
                assert norms == pytest.approx(torch.full_like(norms, 8.0), rel=1e-2)
            memories.append(state.memory)
        shares[std] = float((memories[0] - memories[1]).norm() / memories[0].norm())
    assert shares[64**-0.5] > 0.2 and shares[0.02] < 0.02, shares


@torch.no_grad()
def test_tokens_are_read_once_in_generation():
    """`extend` computes the tokens that it is given alone, `close` the write tokens: the cache is no recomputation."""
    config = RmtConfig(width=8, heads=2, feed_forward=12, layers=2, slots=3)
    cell = config.build(vocab_size=VOCABULARY, bos_id=BOS, segment_length=SIZE).eval()
    rows = []
    cell.layers.layers[0].feed_forward.register_forward_hook(
        lambda module, inputs, output: rows.append(output.shape[1])
    )
    cache = cell.open(cell.empty_state(2), torch.ones(2, dtype=torch.bool))
    for count in (2, 1):
        _, cache = cell.extend(torch.ones(2, count, dtype=torch.int64), cache)
    cell.close(cache)
    assert rows == [3, 2, 1, 3]
