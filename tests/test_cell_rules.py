"""Memformer against the rules of cells/base.py for ZeRO-3 and speed: where parameters are read, and that nothing waits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.memformer import LAYOUTS, SIZE, TICKS, make, run_cell


def take_parameters_away(cell: nn.Module) -> None:
    """As ZeRO-3 does: outside the forward of the module that owns it, a parameter is empty."""
    for module in cell.modules():
        owned = {name: parameter.detach().clone() for name, parameter in module.named_parameters(recurse=False)}

        def bring(module, inputs, owned=owned):
            for name, value in owned.items():
                getattr(module, name).data = value

        def take(module, inputs=None, output=None, owned=owned):
            for name, value in owned.items():
                getattr(module, name).data = value.new_empty(0)

        if owned:
            module.register_forward_pre_hook(bring)
            module.register_forward_hook(take)
            take(module)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_parameters_are_read_in_the_forward_of_their_owner_alone(layout, tie_embeddings):
    cell = make(layout, tie_embeddings=tie_embeddings, write_projection=True)
    with torch.no_grad():
        expected = run_cell(cell, TICKS)
        take_parameters_away(cell)
        assert all(torch.equal(a, b) for a, b in zip(run_cell(cell, TICKS), expected))
        cell("diagnose", TICKS[0], cell.empty_state(3))
        with pytest.raises(RuntimeError):  # the control: a parameter read from outside
            F.linear(torch.zeros(1, 8, dtype=torch.float64), cell.embedding.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_waits_for_the_device(layout):
    """On the device `meta` there are no values to wait for: `.item()` and the like raise."""
    cell = make(layout).to("meta")
    segment = TICKS[0].to("meta")
    features, state = cell("advance", segment, cell.empty_state(3))
    assert cell("readout", segment, features).shape == (3, SIZE)
    with pytest.raises((RuntimeError, NotImplementedError)):
        state.memory.sum().item()
