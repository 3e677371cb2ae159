"""Associative Recurrent Memory Transformer: what is special to it. tests/test_equations.py compares it with the paper."""

import torch

from memformer_dist.cells.armt import ArmtConfig, AssociativeMemory


@torch.no_grad()
def test_a_value_replaces_what_its_key_held():
    torch.manual_seed(0)
    memory = AssociativeMemory(ArmtConfig(width=8, heads=2, memory_width=3, init_std=0.5)).double()
    memory.query.weight.copy_(memory.key.weight)
    row = torch.randn(1, 1, 8, dtype=torch.float64)
    memory.strength.weight.copy_(1e3 * row[0])  # b = 1
    state = torch.zeros(1, 18, 8, dtype=torch.float64), torch.zeros(1, 18, dtype=torch.float64)
    assert not memory.read(row, *state).any()
    written = memory.write(row, *state)
    again = memory.write(row, *written)
    for state in written, again:
        torch.testing.assert_close(memory.read(row, *state), memory.value(row), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again[1], written[1], rtol=1e-12, atol=1e-12)
    memory.value.weight.mul_(-3)
    torch.testing.assert_close(memory.read(row, *memory.write(row, *again)), memory.value(row), rtol=1e-4, atol=1e-5)
