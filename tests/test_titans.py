"""Titans in chunks, its inner gradients in closed form, against the recurrence token by token with autograd's inner gradients."""

import pytest
import torch
import torch.nn.functional as F

from memformer_dist.cells.titans import Gates, TitansConfig, memorise
from tests.helpers.recurrences import assert_follows, build, convolved, differences, turned

CONFIG = TitansConfig(
    width=8, heads=2, feed_forward=12, layers=2, dropout=0.0, init_std=0.3, expansion=2, persistent=3, chunk=4
)


# ---- the memory ----------------------------------------------------------------------------------------------------------


def mlp(x, weights):
    for w in weights[:-1]:
        x = F.gelu(x @ w)
    return x @ weights[-1]


def token_by_token(queries, keys, values, alpha, eta, theta, weights, momenta, chunk, *, mistake=None):
    """Equations 12 to 15 in a head of a lane: queries, keys, values [S, K], gates [S], matrices and their momenta."""
    reads = []
    for t, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        if t % chunk == 0 or mistake == "gradient at the token's own weights":
            frozen = weights
        loss = (mlp(k, frozen) - v).square().sum()
        slopes = torch.autograd.grad(loss, frozen, create_graph=True)
        carried = [0.0 * s if mistake == "no momentum" else eta[t] * s for s in momenta]
        momenta = [s - theta[t] * slope for s, slope in zip(carried, slopes, strict=True)]
        kept = 1.0 if mistake == "no forgetting" else 1 - alpha[t]
        before, weights = weights, [kept * w + s for w, s in zip(weights, momenta, strict=True)]
        reads.append(mlp(q, before if mistake == "read before the write" else weights))
    return torch.stack(reads), weights, momenta


def random_inputs(size: int, depth: int, seed: int = 0):
    """Two lanes, two heads of size 3: queries, keys, values, the three gates before their nonlinearities, matrices, momenta."""
    torch.manual_seed(seed)
    tokens = [torch.randn(2, size, 2, 3, dtype=torch.float64) for _ in range(3)]
    tokens[1] = F.normalize(tokens[1], dim=-1)
    gates = [torch.randn(2, size, 2, dtype=torch.float64) for _ in range(3)]
    shapes = [(3, 3)] if depth == 1 else [(3, 5), *[(5, 5)] * (depth - 2), (5, 3)]
    matrices = [torch.randn(2, 2, *shape, dtype=torch.float64) * scale for scale in (0.7, 0.1) for shape in shapes]
    return [x.detach().requires_grad_() for x in [*tokens, *gates, *matrices]]


def compared(size: int, chunk: int, depth: int, length: int | None = None, **options) -> list[float]:
    """Largest differences: of the reads, of the state behind them, and of the gradients of all inputs.

    `length`: how many of the tokens are real. The cell is given the rest as padding, the recurrence is not given it.
    """
    length = size if length is None else length
    inputs = random_inputs(size, depth)
    queries, keys, values, forget, keep, learn, *matrices = inputs
    weights, momenta = matrices[:depth], matrices[depth:]
    real = (torch.arange(size) < length).double()[None, :, None].expand(2, -1, 2)
    gates = Gates(F.logsigmoid(-forget) * real, F.logsigmoid(keep) * real, learn.sigmoid() / 8 * real, real)
    read, *after = memorise(queries, keys, values, gates, weights, momenta, chunk)
    found = [read[:, :length], *after[0], *after[1]]
    rows = []
    for b in range(2):
        for h in range(2):
            columns = (
                x[b, :length, h] for x in (queries, keys, values, forget.sigmoid(), keep.sigmoid(), learn.sigmoid() / 8)
            )
            own = ([x[b, h] for x in tensors] for tensors in (weights, momenta))
            one, *states = token_by_token(*columns, *own, chunk, **options)
            rows.append([one, *states[0], *states[1]])
    expected = [torch.stack(column).unflatten(0, (2, 2)) for column in zip(*rows, strict=True)]
    expected[0] = expected[0].transpose(1, 2)
    mixing = [torch.randn_like(x) for x in expected]
    gradients = [
        torch.autograd.grad(
            sum((x * m).sum() for x, m in zip(made, mixing, strict=True)), inputs, materialize_grads=True
        )
        for made in (found, expected)
    ]
    pairs = [*zip(found, expected, strict=True), *zip(*gradients, strict=True)]
    return [float((x - y).detach().abs().max()) for x, y in pairs]


@pytest.mark.parametrize(
    "size, chunk, depth", [(1, 4, 1), (10, 4, 1), (10, 4, 2), (9, 4, 3), (5, 1, 2), (6, 64, 2), (12, 4, 2)]
)
def test_chunks_equal_the_recurrence(size, chunk, depth):
    assert max(compared(size, chunk, depth)) <= 1e-12


@pytest.mark.parametrize("length", [0, 1, 4, 7])
def test_padding_trains_nothing(length):
    """Momentum alone would move the weights at every padded token."""
    if length == 0:
        inputs = random_inputs(8, 2)
        nothing = torch.zeros(2, 8, 2, dtype=torch.float64)
        _, weights, momenta = memorise(*inputs[:3], Gates(*[nothing] * 4), inputs[6:8], inputs[8:], 4)
        assert all(torch.equal(x, y) for x, y in zip([*weights, *momenta], inputs[6:], strict=True))
    else:
        assert max(compared(10, 4, 2, length)) <= 1e-12


@pytest.mark.parametrize(
    "mistake", ["gradient at the token's own weights", "no momentum", "no forgetting", "read before the write"]
)
def test_another_recurrence_is_told_apart(mistake):
    read, *rest = compared(10, 4, 2, mistake=mistake)
    assert read > 1e-3 and max(rest) > 1e-2


# ---- the cell ------------------------------------------------------------------------------------------------------------


def read_document(cell, *, mistake=None):
    """-> the reference of tests/helpers/recurrences.py: the whole model, one token after the other."""
    config = cell.config
    heads, size, shapes = config.heads, config.head_size, config.shapes

    def normalised(x, norm):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight

    def attended(attention, inputs):
        """[n, D] -> [n, H, K]: each token over the persistent vectors, then itself and those before it in its segment."""
        queries, keys, values = attention.query_key_value(inputs).view(-1, 3, heads, size).unbind(1)
        rows = []
        for t in range(len(inputs)):
            for head in range(heads):
                own = torch.cat([attention.persistent[0, :, head], turned(keys[: t + 1, head])])
                seen = torch.cat([attention.persistent[1, :, head], values[: t + 1, head]])
                scores = own @ turned(queries[: t + 1, head])[-1] / size**0.5
                rows.append(scores.softmax(0) @ seen)
        return torch.stack(rows).view(-1, heads, size)

    def reference(segments):
        lengths = [len(segment) for segment in segments]
        hidden = cell.embedding(torch.cat(segments))
        for number, (mixer, block) in enumerate(zip(cell.mixers, cell.blocks, strict=True)):
            normed = mixer.norm(hidden)
            projected = F.silu(convolved(mixer.inputs.projection(normed), mixer.inputs.convolution.weight))
            queries, keys, values = projected.view(-1, 3, heads, size).unbind(1)
            forget, keep, learn = mixer.gates(normed).view(-1, 3, heads).unbind(1)
            reads = []
            for head in range(heads):
                q, k = (x[:, head] / x[:, head].norm(dim=1, keepdim=True).clamp(min=1e-3) for x in (queries, keys))
                flat = cell.starts[number].weights[head].split([a * b for a, b in shapes])
                weights = [part.view(shape) for part, shape in zip(flat, shapes, strict=True)]
                momenta, read = [torch.zeros_like(w) for w in weights], []
                gates = (
                    (forget[:, head] - 6).sigmoid(),
                    keep[:, head].sigmoid(),
                    learn[:, head].sigmoid() / (4 * config.chunk),
                )
                columns = [x.split(lengths) for x in (q, k, values[:, head], *gates)]
                for segment in zip(*columns, strict=True):  # chunks begin with each segment
                    one, weights, momenta = token_by_token(*segment, weights, momenta, config.chunk, mistake=mistake)
                    read.append(one)
                reads.append(torch.cat(read))
            read, inputs, mix = torch.stack(reads, 1), block.norm(hidden), block.mix
            if config.layout == "mag":
                mixed = torch.cat([attended(mix, part) for part in inputs.split(lengths)])
                gated = normalised(mixed, mix.norm) * F.silu(normalised(read, mix.read_norm))
            else:
                gated = normalised(read, mix.read_norm) * F.silu(mix.gate(inputs)).view(-1, heads, size)
            hidden = hidden + mix.output(gated.flatten(1))
            hidden = hidden + block.feed_forward(block.feed_forward_norm(hidden))
        return F.linear(cell.norm(hidden), cell.embedding.weight)

    return reference


@pytest.mark.parametrize("layout, depth", [("mag", 1), ("mag", 2), ("lmm", 1), ("lmm", 2)])
def test_segments_equal_one_long_document_token_by_token(layout, depth):
    assert_follows(build(CONFIG.model_copy(update={"layout": layout, "memory_depth": depth})), read_document)


@pytest.mark.parametrize("mistake", ["gradient at the token's own weights", "no momentum"])
def test_another_memory_is_told_apart(mistake):
    cell = build(CONFIG)
    assert min(differences(cell, read_document(cell, mistake=mistake))) > 1e-6


def test_long_documents_stay_finite():
    """The step ceiling 1 / (4 c): with the largest steps and momentum that the gates allow, nothing grows without bound."""
    torch.manual_seed(0)
    keys, values = F.normalize(torch.randn(1, 512, 1, 8), dim=-1), torch.randn(1, 512, 1, 8)
    ones = torch.ones(1, 512, 1)
    gates = Gates(-1e-3 * ones, -0.7 * ones, ones / (4 * 32), ones)
    weights, momenta = [torch.randn(1, 1, 8, 8)], [torch.zeros(1, 1, 8, 8)]
    read, weights, _ = memorise(keys, keys, values, gates, weights, momenta, 32)
    assert read.abs().max() < 10 and weights[0].norm() < 20
