"""The gradient of memory replay against full back-propagation through time, in float64."""

import pytest
import torch

from memformer_dist.cells.memformer import Memformer, MemformerConfig
from memformer_dist.mrbp import memory_replay
from tests.toy import ToyCell, full_bptt, gradients, labels_in, random_window, relative_error, seeded_call

LANES, LENGTH, VOCABULARY = 3, 6, 11
TOLERANCE = 1e-10


def memformer(layout: str) -> Memformer:
    config = MemformerConfig(
        layout=layout,
        width=8,
        heads=2,
        feed_forward=12,
        slots=3,
        encoder_layers=1 if layout == "encoder_decoder" else 0,
        decoder_layers=2,
        dropout=0.2,
        bmn_init_norm=0.3,
        init_std=0.3,  # so large that every path of the gradient counts
    )
    return Memformer(config, vocab_size=VOCABULARY, bos_id=1, segment_length=LENGTH)


def cell_named(name: str):
    torch.manual_seed(5)
    return (ToyCell(dropout=0.3) if name == "toy" else memformer(name)).double().train()


def starting_state(cell):
    """A state in mid-document, so that the first segment reads something."""
    torch.manual_seed(6)
    state = cell.empty_state(LANES)
    filled = {"memory": torch.nn.functional.normalize(torch.randn_like(state.memory), dim=-1)}
    if "context" in state._fields:
        filled |= {
            "context": torch.randint(4, VOCABULARY, state.context.shape),
            "context_length": torch.tensor([6, 4, 6]),
        }
    return state._replace(**filled)


def replayed(cell, window, *, readout_group, seed=0):
    cell.zero_grad()
    losses = [None] * len(window)

    def observe(t, segment, nll):
        losses[t] = nll.sum()

    result = memory_replay(
        seeded_call(cell, seed),
        torch.Tensor.backward,
        window,
        starting_state(cell),
        loss_scale=1 / labels_in(window),
        readout_group=readout_group,
        observe=observe,
    )
    return gradients(cell), sum(losses) / labels_in(window), result


def reference(cell, window, *, readout_group, seed=0, detach_memory=False):
    cell.zero_grad()
    state, loss = full_bptt(
        seeded_call(cell, seed),
        window,
        starting_state(cell),
        loss_scale=1 / labels_in(window),
        readout_group=readout_group,
        detach_memory=detach_memory,
    )
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in cell.named_parameters()}
    return grads, loss, state


@pytest.mark.parametrize("cell_name", ["toy", "encoder_decoder", "decoder"])
@pytest.mark.parametrize("readout_group", [1, 2, 100])
@pytest.mark.parametrize("segments", range(1, 9))
def test_gradient_equals_full_bptt(cell_name, readout_group, segments):
    cell = cell_named(cell_name)
    window = random_window(segments, LANES, LENGTH, seed=segments)
    assert segments == 1 or any(segment.reset.any() for segment in window[1:]) or segments < 3
    found, loss, result = replayed(cell, window, readout_group=readout_group)
    expected, reference_loss, state = reference(cell, window, readout_group=readout_group)
    assert relative_error(found, expected) <= TOLERANCE
    assert abs(loss - reference_loss) <= 1e-12 * abs(reference_loss)
    assert all(torch.equal(x, y) for x, y in zip(result.state, state))
    assert result.drift == 0


@pytest.mark.parametrize("cell_name", ["toy", "encoder_decoder", "decoder"])
def test_negative_controls_fail_the_comparison(cell_name):
    """Memories detached between segments; dropout masks of another seed: either must be seen."""
    cell = cell_named(cell_name)
    window = random_window(6, LANES, LENGTH, seed=3)
    found, _, _ = replayed(cell, window, readout_group=2)
    detached, _, _ = reference(cell, window, readout_group=2, detach_memory=True)
    other_masks, _, _ = reference(cell, window, readout_group=2, seed=1)
    assert relative_error(found, detached) > 1e3 * TOLERANCE
    assert relative_error(found, other_masks) > 1e3 * TOLERANCE


def test_unseeded_replay_drifts():
    """When the replay does not draw the rollout's dropout masks, the drift says so."""
    cell = cell_named("encoder_decoder")
    window = random_window(4, LANES, LENGTH, seed=3)

    def call(part, t, segment, tensors):
        return cell(part, segment, tensors)

    result = memory_replay(call, torch.Tensor.backward, window, starting_state(cell), loss_scale=1.0)
    assert result.drift > 1e-3


@pytest.mark.parametrize("cell_name", ["toy", "encoder_decoder", "decoder"])
@pytest.mark.parametrize("segments", [1, 4])
def test_every_parameter_has_a_gradient_in_every_window(cell_name, segments):
    """ZeRO-3 keeps the old gradient of a parameter that gets none: the writer's, in a window of one segment."""
    cell = cell_named(cell_name)
    window = random_window(segments, LANES, LENGTH, seed=2)
    cell.zero_grad()
    memory_replay(seeded_call(cell), torch.Tensor.backward, window, starting_state(cell), loss_scale=1.0)
    assert [name for name, parameter in cell.named_parameters() if parameter.grad is None] == []


def test_masked_labels_do_not_count():
    """Labels that are IGNORE have no part in loss and gradient; a window without labels has a gradient of zero."""
    cell = cell_named("encoder_decoder")
    window = random_window(3, LANES, LENGTH, seed=4)
    silent = [segment._replace(labels=torch.full_like(segment.labels, -100)) for segment in window]
    cell.zero_grad()
    memory_replay(seeded_call(cell), torch.Tensor.backward, silent, starting_state(cell), loss_scale=1.0)
    assert all((gradient == 0).all() for gradient in gradients(cell).values())


def test_segments_are_asked_for_in_order_and_one_at_a_time():
    cell = cell_named("toy")
    window = random_window(5, LANES, LENGTH, seed=4)
    asked = []

    class OnDemand:
        def __len__(self):
            return len(window)

        def __getitem__(self, t):
            asked.append(t)
            return window[t]

    memory_replay(
        seeded_call(cell), torch.Tensor.backward, OnDemand(), starting_state(cell), loss_scale=1.0, readout_group=2
    )
    assert asked == [0, 1, 2, 3, 4, 3, 2, 1, 0]
