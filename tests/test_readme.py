"""What README.md and docs/mrbp.md show: the example of memory replay without DeepSpeed, and the decay of a memory's gradient."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from memformer_dist.cells.memformer import Memformer, MemformerConfig
from memformer_dist.mrbp.replay import memory_replay
from memformer_dist.segment import IGNORE
from tests.helpers import ROOT
from tests.helpers.scripts import run_script
from tests.helpers.toy import full_bptt, gradients, labels_in, random_window, relative_error, seeded_call

README = ROOT / "README.md"


def example() -> str:
    """The one block of Python in the README that calls memory_replay."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if "memory_replay(" in block)
    return found


def definitions() -> dict:
    """What the example defines before it begins to do something."""
    body = ast.parse(example()).body
    begins = next(number for number, statement in enumerate(body) if isinstance(statement, ast.Expr))
    names: dict = {"__name__": "example"}
    exec(compile(ast.Module(body[:begins], []), "README.md", "exec"), names)
    return names


def test_the_example_learns_what_it_says(tmp_path: Path):
    program = tmp_path / "example.py"
    program.write_text(example() + "import sys\nassert 'deepspeed' not in sys.modules\n")
    done = run_script(program)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^step +\d+ +loss in the last segment (\S+)$", done.stdout, re.MULTILINE)
    losses = [float(loss) for loss in found]
    assert losses[0] == pytest.approx(math.log(8), abs=0.2)
    assert losses[-1] < 0.05


@pytest.mark.parametrize("readout_group", [1, 3, 100])
def test_gradient_of_the_example_cell_equals_full_bptt(readout_group):
    """In float64, with dropout and resets; detached states and other masks are the negative controls."""
    names = definitions()
    own_segment, state_of, features_of = (names[name] for name in ("Segment", "State", "Features"))

    class Dropping(names["GRUCell"]):
        dropout = nn.Dropout(0.3)

        def advance(self, segment, state):
            features, state = super().advance(segment, state)
            return features_of(self.dropout(features.outputs)), state_of(self.dropout(state.hidden))

        def readout(self, segment, features):
            return super().readout(segment, features_of(self.dropout(features.outputs)))

    torch.manual_seed(3)
    cell, lanes = Dropping().double(), 4
    nn.init.normal_(cell.initial)
    state = state_of(torch.randn(lanes, names["WIDTH"], dtype=torch.float64))
    window = random_window(7, lanes, 5, seed=2, vocabulary=names["SYMBOLS"])
    assert any(segment.reset.any() for segment in window[1:])
    window = [own_segment(segment.tokens, segment.labels, segment.reset) for segment in window]
    settings = {"loss_scale": 1 / labels_in(window), "readout_group": readout_group}

    def gradient_of(method, *arguments, seed=0, **more):
        cell.zero_grad()
        method(seeded_call(cell, seed), *arguments, window, state, **settings, **more)
        return gradients(cell)

    replayed = gradient_of(memory_replay, torch.Tensor.backward)
    assert relative_error(replayed, gradient_of(full_bptt)) <= 1e-10
    assert relative_error(replayed, gradient_of(full_bptt, detach_memory=True)) > 1e-4
    assert relative_error(replayed, gradient_of(full_bptt, seed=1)) > 1e-4


# ---- docs/mrbp.md --------------------------------------------------------------------------------------------------------


def shares_passed_on(bmn_init_norm: float, *, alone: bool) -> torch.Tensor:
    """What each boundary but the last passes on of the norm of the state's gradient, for a loss on the last segment.

    A slot is `alone` where no token is real: a segment of length 0.
    """
    torch.manual_seed(0)
    config = MemformerConfig(
        layout="decoder",
        width=16,
        heads=2,
        feed_forward=32,
        slots=4,
        encoder_layers=0,
        decoder_layers=2,
        dropout=0.0,
        bmn_init_norm=bmn_init_norm,
    )
    segments, lanes, length = 8, 2, 6
    cell = Memformer(config, vocab_size=11, bos_id=1, segment_length=length).double()
    window = [
        segment._replace(
            length=torch.full((lanes,), 0 if alone else length),
            reset=torch.full((lanes,), t == 0),
            labels=segment.tokens if t == segments - 1 else torch.full_like(segment.labels, IGNORE),
        )
        for t, segment in enumerate(random_window(segments, lanes, length, seed=1))
    ]
    replayed = memory_replay(
        lambda part, t, *arguments: cell(part, *arguments),
        torch.Tensor.backward,
        window,
        cell.empty_state(lanes),
        loss_scale=1.0,
    )
    norms = replayed.state_gradient_squares[1:].sqrt()  # the first is that of a state which the reset replaces
    return norms[:-1] / norms[1:]


def test_the_table_of_decays():
    """A slot that keeps to itself passes on 1 / (1 + |v|) of the gradient; one that reads tokens does not."""
    rows = re.findall(
        r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", (ROOT / "docs/mrbp.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 4
    for norm, formula, measured, horizon in (map(float, row) for row in rows):
        found = shares_passed_on(norm, alone=True)
        assert torch.allclose(found, torch.tensor(measured).double(), atol=1e-4), norm
        assert formula == pytest.approx(1 / (1 + norm), abs=1e-4)
        assert horizon == round(math.log(0.05) / (2 * math.log(formula)))
        assert (shares_passed_on(norm, alone=False) - formula).abs().max() > 0.01, norm
