"""Gated DeltaNet in chunks and segments, against equation 10 of the paper token by token."""

import pytest
import torch
import torch.nn.functional as F

from memformer_dist.cells.gated_delta import GatedDeltaConfig, gated_delta_rule
from tests.helpers.recurrences import assert_follows, build, convolved, delta_recurrence, differences

CONFIG = GatedDeltaConfig(width=8, heads=2, feed_forward=12, layers=2, dropout=0.0, init_std=0.3, chunk=4)


# ---- the rule ------------------------------------------------------------------------------------------------------------


def random_inputs(size: int, seed: int = 0):
    """Two lanes, two heads of size 3, a memory in mid-document."""
    torch.manual_seed(seed)
    queries, keys, values = torch.randn(3, 2, size, 2, 3, dtype=torch.float64).unbind(0)
    log_decay, beta = torch.rand(2, 2, size, 2, dtype=torch.float64).unbind(0)
    memory = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    inputs = [queries, F.normalize(keys, dim=-1), values, -2 * log_decay, beta, memory]
    return [x.detach().requires_grad_() for x in inputs]


def compared(size: int, chunk: int, **options) -> list[float]:
    """Largest differences: of the reads, of the memory behind them, and of the gradients of all six inputs."""
    inputs = random_inputs(size)
    found = gated_delta_rule(*inputs, chunk)
    rows = [
        [delta_recurrence(*(x[b, :, h] for x in inputs[:5]), inputs[5][b, h], **options) for h in range(2)]
        for b in range(2)
    ]
    expected = [
        torch.stack([torch.stack([read for read, _ in row], 1) for row in rows]),
        torch.stack([torch.stack([memory for _, memory in row]) for row in rows]),
    ]
    weights = [torch.randn_like(x) for x in expected]
    gradients = [
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(pair, weights, strict=True)), inputs, materialize_grads=True
        )
        for pair in (found, expected)
    ]
    pairs = [*zip(found, expected, strict=True), *zip(*gradients, strict=True)]
    return [float((x - y).detach().abs().max()) for x, y in pairs]


@pytest.mark.parametrize("size, chunk", [(1, 4), (4, 4), (5, 64), (10, 4), (12, 4), (12, 1), (33, 16)])
def test_chunks_equal_the_recurrence(size, chunk):
    assert max(compared(size, chunk)) <= 1e-12


@pytest.mark.parametrize("mistake", ["nothing is replaced", "no decay", "read before the write"])
def test_another_recurrence_is_told_apart(mistake):
    read, _, *gradients = compared(10, 4, mistake=mistake)
    assert min(read, max(gradients)) > 1e-2


def test_a_decay_to_nothing_overflows_nowhere():
    """exp of running sums that differ by thousands, in float32."""
    inputs = [x.detach().float() for x in random_inputs(32)]
    inputs[3] = torch.full_like(inputs[3], -200.0).requires_grad_()
    read, memory = gated_delta_rule(*inputs, 32)
    (read.sum() + memory.sum()).backward()
    assert all(torch.isfinite(x).all() for x in (read, memory, inputs[3].grad))


# ---- the cell ------------------------------------------------------------------------------------------------------------


def read_document(cell, *, mistake=None):
    """-> the reference of tests/helpers/recurrences.py: the whole model, one token after the other."""
    heads, size = cell.config.heads, cell.config.head_size

    def reference(segments):
        hidden = cell.embedding(torch.cat(segments))
        for mixer, block in zip(cell.mixers, cell.blocks, strict=True):
            normed = mixer.norm(hidden)
            projected = F.silu(convolved(mixer.inputs.projection(normed), mixer.inputs.convolution.weight))
            rate, beta = mixer.gates.projection(normed).chunk(2, 1)
            log_decay = -mixer.gates.log_rate.exp() * F.softplus(rate + mixer.gates.bias)
            reads = []
            for head in range(heads):
                first = head * size
                q, k, v = (
                    projected[:, start + first : start + first + size] for start in (0, heads * size, 2 * heads * size)
                )
                q, k = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-3) for x in (q, k))
                memory = torch.zeros(size, size, dtype=q.dtype)
                read, _ = delta_recurrence(
                    q, k, v, log_decay[:, head], beta[:, head].sigmoid(), memory, mistake=mistake
                )
                scale = (read.square().mean(1, keepdim=True) + 1e-5).rsqrt()
                reads.append(read * scale * block.mix.read_norm.weight)
            gated = torch.cat(reads, 1) * F.silu(block.mix.gate(block.norm(hidden)))
            hidden = hidden + block.mix.output(gated)
            hidden = hidden + block.feed_forward(block.feed_forward_norm(hidden))
        return F.linear(cell.norm(hidden), cell.embedding.weight)

    return reference


def test_segments_equal_one_long_document_token_by_token():
    cell = build(CONFIG)
    assert_follows(cell, read_document)
    assert min(differences(cell, read_document(cell, mistake="no decay"))) > 1e-3


def test_the_convolution_sees_the_segment_before():
    """The control of the comparison: without its tail, the tokens after a border are others."""
    cell = build(CONFIG)
    for mixer in cell.mixers:
        forward = mixer.inputs.convolution.forward
        mixer.inputs.convolution.forward = lambda x, tail, length, forward=forward: forward(
            x, torch.zeros_like(tail), length
        )
    assert min(differences(cell, read_document(cell))) > 1e-3
