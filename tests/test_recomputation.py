"""Layers computed again and losses in chunks: the same numbers, and less of them kept."""

import pytest
import torch
from torch import nn

from memformer_dist.cells.base import token_losses
from memformer_dist.cells.memformer import MemformerConfig
from memformer_dist.cells.recomputation import losses_in_chunks, recomputed
from memformer_dist.mrbp.executor import TorchExecutor
from memformer_dist.mrbp.replay import memory_replay
from memformer_dist.segment import IGNORE
from tests.helpers.recomputation import LargestLogits, PeakBytes, kept_bytes, recompute
from tests.helpers.toy import gradients, labels_in, random_window, relative_error

LANES, SIZE, WIDTH, VOCABULARY = 3, 7, 6, 50


def head_and_text(dtype=torch.float64) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, dtype=dtype)
    hidden = torch.randn(LANES, SIZE, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCABULARY, (LANES, SIZE))
    labels[0, 3:] = labels[2] = IGNORE
    return head, hidden, labels


@pytest.mark.parametrize("chunk", [1, 4, 7, 20, 21, 1000])
def test_losses_in_chunks_are_those_of_all_logits(chunk):
    """Chunks that divide the positions and that do not, some without a label; the gradients of head and hidden states."""
    head, hidden, labels = head_and_text()
    weights = torch.randn(LANES, SIZE, dtype=torch.float64)
    found = []
    for losses in (token_losses(head(hidden), labels), losses_in_chunks(head, hidden, labels, chunk)):
        of_all = torch.autograd.grad((losses * weights).sum(), [hidden, *head.parameters()])
        found.append((losses, *of_all))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    assert (found[1][0] == 0).sum() == (labels == IGNORE).sum()


@pytest.mark.parametrize("chunk", [WIDTH + 1, 10])
def test_logits_of_a_chunk_at_a_time(chunk):
    """Forward and backward, with gradients and without (the weights' gradient is as large as WIDTH positions); at once,
    the control, all of them exist."""
    head, hidden, labels = head_and_text()
    with LargestLogits(VOCABULARY) as seen:
        losses_in_chunks(head, hidden, labels, chunk).sum().backward()
    assert seen.rows == chunk
    with LargestLogits(VOCABULARY) as seen, torch.no_grad():
        losses_in_chunks(head, hidden, labels, chunk)
    assert seen.rows == chunk
    with LargestLogits(VOCABULARY) as seen:
        token_losses(head(hidden), labels).sum().backward()
    assert seen.rows == LANES * SIZE


def test_chunks_keep_the_precision_of_autocast():
    """Recomputed in bf16 too, where the backward runs outside of it."""
    head, hidden, labels = head_and_text(torch.float32)
    found = []
    for chunk in (None, 4):
        with torch.autocast("cpu", torch.bfloat16):
            losses = token_losses(head(hidden), labels) if chunk is None else losses_in_chunks(head, hidden, labels, 4)
        assert losses.dtype == torch.float32
        found.append((losses, *torch.autograd.grad(losses.sum(), [hidden])))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    exact = token_losses(head(hidden), labels)
    assert not torch.equal(exact, found[0][0])


def test_dropout_is_repeated():
    """By the global generator; the control, a generator of one's own, is not."""

    def run(draw) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.linspace(1, 2, 100, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(3)
        outputs = recomputed(lambda x: (x * draw(x)).square(), inputs)
        torch.manual_seed(4)
        return outputs, torch.autograd.grad(outputs.sum(), inputs)[0] * inputs / 2

    outputs, by_gradient = run(lambda x: torch.rand(x.shape, dtype=x.dtype))
    torch.testing.assert_close(outputs, by_gradient, rtol=1e-12, atol=0)
    generator = torch.Generator().manual_seed(0)
    outputs, by_gradient = run(lambda x: torch.rand(x.shape, dtype=x.dtype, generator=generator))
    assert (outputs - by_gradient).abs().max() > 0.1


def test_nothing_is_recomputed_without_gradients():
    calls = []
    with torch.no_grad():
        recomputed(calls.append, 1)
    recomputed(calls.append, 2, when=False)
    assert calls == [1, 2]


def memformer(vocabulary: int = VOCABULARY) -> nn.Module:
    torch.manual_seed(5)
    config = MemformerConfig(
        width=16, heads=2, feed_forward=64, slots=3, encoder_layers=3, decoder_layers=4, dropout=0.3
    )
    return config.build(vocab_size=vocabulary, bos_id=1, segment_length=SIZE).double().train()


def test_memory_replay_with_both_is_the_same_bit_by_bit():
    """Losses, states, and the gradients of checkpointed layers; those of a head in chunks to the order of additions."""
    window, found = random_window(5, LANES, SIZE, seed=1, vocabulary=VOCABULARY), []
    for fields in ({}, {"checkpoint_layers": True}, {"checkpoint_layers": True, "loss_chunk": 8}):
        cell = recompute(memformer(), **fields)
        losses = {}
        result = memory_replay(
            cell,
            window,
            cell.empty_state(LANES),
            loss_scale=1 / labels_in(window),
            executor=TorchExecutor(cell, 2),
            readout_group=2,
            observe=lambda t, segment, nll, losses=losses: losses.update({t: nll}),
        )
        assert result.drift == 0
        found.append((losses, result.state, gradients(cell)))
    (losses, state, gradient), layers, both = found
    for other in (layers, both):
        assert all(torch.equal(x, y) for x, y in zip(other[1], state, strict=True))
    assert all(torch.equal(layers[0][t], losses[t]) for t in losses)
    assert all(torch.equal(layers[2][name], gradient[name]) for name in gradient)
    assert max(float((both[0][t] - losses[t]).abs().max()) for t in losses) <= 1e-14
    assert relative_error(both[2], gradient) <= 1e-14


def test_less_is_kept():
    """Of layers their inputs, of the head nothing that grows with the vocabulary."""
    window = random_window(1, LANES, SIZE, seed=1, vocabulary=VOCABULARY)

    def kept(part: str, **fields) -> int:
        cell = recompute(memformer(), **fields)
        features, _ = cell("advance", window[0], cell.empty_state(LANES))
        arguments = cell.empty_state(LANES) if part == "advance" else features
        return kept_bytes(cell, lambda: cell(part, window[0], arguments))

    for part in ("advance", "readout"):
        assert kept(part, checkpoint_layers=True) < 0.5 * kept(part)
    logits = LANES * SIZE * VOCABULARY * 8
    assert kept("readout") - kept("readout", loss_chunk=4) > 0.9 * logits
    assert kept("readout", checkpoint_layers=True, loss_chunk=4) < 0.2 * kept("readout")


def peak(vocabulary: int, **fields) -> int:
    """Of a window under memory replay, gradients of the weights apart."""
    torch.manual_seed(5)
    config = MemformerConfig(width=16, heads=2, feed_forward=64, slots=3, encoder_layers=1, decoder_layers=4)
    cell = config.model_copy(update=fields).build(vocab_size=vocabulary, bos_id=1, segment_length=48)
    for parameter in cell.parameters():
        parameter.grad = torch.zeros_like(parameter)
    window, state = random_window(2, LANES, 48, seed=1), cell.empty_state(LANES)
    with PeakBytes() as seen:
        memory_replay(cell, window, state, loss_scale=1.0, executor=TorchExecutor(cell, 2))
    return seen.most


def test_the_peak_falls():
    """What is alive at a time, with all that a backward makes: of many layers, and of a large vocabulary."""
    assert peak(11, checkpoint_layers=True) < 0.6 * peak(11)
    logits = 4 * LANES * 48 * 500
    whole, chunks = peak(500), peak(500, loss_chunk=12)
    assert whole - chunks > 1.5 * logits
    assert peak(500, loss_chunk=12, checkpoint_layers=True) < 0.6 * chunks
