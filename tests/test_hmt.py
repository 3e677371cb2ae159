"""Hierarchical Memory Transformer: what is special to it. tests/test_equations.py compares it with the paper."""

import torch

from memformer_dist.cells.hmt import HmtConfig
from tests.helpers.memformer import BOS, SIZE, VOCABULARY, make_segment


@torch.no_grad()
def test_an_embedding_is_kept_for_as_many_segments_as_there_are_slots():
    """Row t mod N is of segment t, untouched until its turn comes again."""
    config = HmtConfig(width=8, heads=2, feed_forward=12, layers=2, slots=3, sensory_tokens=4, dropout=0.0)
    cell = config.build(vocab_size=VOCABULARY, bos_id=BOS, segment_length=SIZE)
    state, memories = cell.empty_state(1), []
    for t in range(7):
        _, state = cell("advance", make_segment([SIZE], reset=[t == 0], seed=t), state)
        memories.append(state.memory[0])
    for t in range(1, 7):
        changed = [row for row in range(3) if not torch.equal(memories[t][row], memories[t - 1][row])]
        assert changed == [t % 3]
    assert int(state.written) == 7
