"""A cell that works through segments and chunks, against the same equations written token by token.

The reference is a function of the tokens of one document, without lanes or padding: so segments that are short in
mid-document, lanes that run dry and documents that start in mid-window are all compared with the same plain loop.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memformer_dist.cells.base import CellConfig, RecurrentCell
from memformer_dist.segment import IGNORE, Segment
from tests.helpers.toy import VOCABULARY

SIZE = 6  # tokens per segment: with chunks of 4, an incomplete last one
# Tokens of each lane in each segment, and where documents start.
LENGTHS = [[6, 6, 6], [6, 2, 6], [4, 6, 0], [1, 6, 5]]
RESETS = [[1, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]

# The tokens of a document, int64 [n] of each segment -> logits [T, vocabulary]
Reference = Callable[[list[Tensor]], Tensor]


def build(config: CellConfig, seed: int = 5) -> RecurrentCell:
    """In float64 and evaluation mode; norms, biases and starts are drawn as well."""
    torch.manual_seed(seed)
    cell = config.build(vocab_size=VOCABULARY, bos_id=1, segment_length=SIZE).double().eval()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return cell


def ragged_window() -> list[Segment]:
    generator = torch.Generator().manual_seed(3)
    window = []
    for lengths, resets in zip(LENGTHS, RESETS, strict=True):
        length, reset = torch.tensor(lengths), torch.tensor(resets, dtype=torch.bool)
        tokens = torch.randint(4, VOCABULARY, (len(length), SIZE), generator=generator)
        no, zeros = torch.zeros_like(reset), torch.zeros_like(length)
        window.append(Segment(tokens, torch.full_like(tokens, IGNORE), length, reset, no, zeros, zeros))
    return window


def documents(window: list[Segment], values: list[Tensor]) -> list[list[Tensor]]:
    """What stands at the tokens of each document, [n, ...] of each segment, taken from one tensor [B, S, ...] per segment."""
    found: list[list[Tensor]] = []
    for lane in range(len(window[0].length)):
        for segment, value in zip(window, values, strict=True):
            if segment.reset[lane]:
                found.append([])
            if segment.length[lane] > 0:
                found[-1].append(value[lane, : segment.length[lane]])
    return found


def by_segments(cell: RecurrentCell, window: list[Segment]) -> list[Tensor]:
    """Logits of each document, read as training reads it."""
    state, logits = cell.empty_state(len(window[0].length)), []
    for segment in window:
        features, state = cell("advance", segment, state)
        logits.append(cell.logits(segment, features))
    return [torch.cat(parts) for parts in documents(window, logits)]


def differences(
    cell: RecurrentCell, reference: Reference, parameters: list[nn.Parameter] | None = None
) -> tuple[float, float]:
    """Between the cell and the reference: the largest of the logits, and of the gradient, in parts of its norm.

    The gradient is that of all parameters, all of which must matter, or of `parameters`.
    """
    parameters = parameters or list(cell.parameters())
    window = ragged_window()
    tokens = documents(window, [segment.tokens for segment in window])
    assert [[len(part) for part in document] for document in tokens] == [[6, 6, 4, 1], [6, 2], [6, 6], [6, 6], [5]]
    found, expected = by_segments(cell, window), [reference(document) for document in tokens]
    weights = [torch.randn_like(x) for x in expected]
    gradients = [
        torch.autograd.grad(
            sum((x * weight).sum() for x, weight in zip(logits, weights, strict=True)),
            parameters,
            materialize_grads=True,
        )
        for logits in (found, expected)
    ]
    norm = torch.stack([x.norm() for x in gradients[1]]).norm()
    assert all(x.abs().max() > 1e-4 * norm for x in gradients[0]), "a parameter that hardly matters proves nothing"
    return (
        max(float((x - y).detach().abs().max()) for x, y in zip(found, expected, strict=True)),
        max(float((x - y).abs().max() / norm) for x, y in zip(*gradients, strict=True)),
    )


def assert_follows(
    cell: RecurrentCell,
    read_document: Callable[[RecurrentCell], Reference],
    parameters: list[nn.Parameter] | None = None,
) -> None:
    assert max(differences(cell, read_document(cell), parameters)) <= 1e-12


# ---- pieces of references ------------------------------------------------------------------------------------------------


def convolved(inputs: Tensor, weight: Tensor) -> Tensor:
    """inputs [T, D], weight [size, D] -> [T, D]: position i from the tokens up to it, zeros before the first."""
    size = len(weight)
    return torch.stack(
        [
            sum(weight[size - 1 - back] * inputs[i - back] for back in range(min(i + 1, size)))
            for i in range(len(inputs))
        ]
    )


def turned(x: Tensor) -> Tensor:
    """Rotary positions 0, 1, ... of [n, K], by sines and cosines."""
    angles = torch.arange(len(x))[:, None] * 10000.0 ** -(torch.arange(0, x.shape[1], 2, dtype=x.dtype) / x.shape[1])
    a, b = x[:, 0::2], x[:, 1::2]
    return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], 2).flatten(1)


def delta_recurrence(queries, keys, values, log_decay, beta, memory, *, mistake=None):
    """Equation 10 of Gated DeltaNet in a head of a lane: queries, keys, values [S, K], log_decay, beta [S], memory [K, K]."""
    reads, one = [], torch.eye(keys.shape[1], dtype=keys.dtype)
    for q, k, v, g, b in zip(queries, keys, values, log_decay, beta, strict=True):
        forgotten = one if mistake == "nothing is replaced" else one - b * torch.outer(k, k)
        kept = forgotten @ memory if mistake == "no decay" else g.exp() * (forgotten @ memory)
        before, memory = memory, kept + b * torch.outer(k, v)
        reads.append(q @ (before if mistake == "read before the write" else memory) / len(q) ** 0.5)
    return torch.stack(reads), memory
