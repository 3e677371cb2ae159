"""Activations that the backward computes again instead of keeping them: gradient checkpointing (Chen et al., arXiv 1604.06174),
and losses in chunks, as in the Blockwise Parallel Transformer (Liu and Abbeel, arXiv 2305.19370).

    hidden = recomputed(layer, hidden, mask)           of a layer its arguments are kept and nothing else
    nll = losses_in_chunks(head, hidden, labels, 512)  logits exist of 512 positions at a time

Torch's non-reentrant checkpoints, which do what is needed here: the graph stays one whole, so that it can be seen in advance
which parameters a backward will touch (zero/reduction.py); random draws and autocast are repeated. Within memory replay what
is recomputed in `advance` is computed for the third time: in the rollout, in the replay, in the replay's backward.

torch.nn.functional.linear_cross_entropy would need the head's weight outside of its module, which ZeRO-3 takes away, and
knows no autocast.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memformer_dist.cells.base import token_losses


def recomputed(function: Callable[..., Any], *arguments: Any, when: bool = True) -> Any:
    """function(*arguments), whose backward runs it again. A plain call without gradients, and where `when` is false.

    It is run to its end: where the backward has what it needs, torch would leave it by an exception, and what ZeRO-3 does
    behind each module would not be done.
    """
    if not (when and torch.is_grad_enabled()):
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, early_stop=False)


def losses_in_chunks(head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """token_losses(head(hidden), labels), `chunk` positions of hidden [B, S, D] and labels [B, S] at a time -> nll [B, S]."""

    def losses(hidden: Tensor, labels: Tensor) -> Tensor:
        return token_losses(head(hidden[None]), labels[None])[0]

    chunks = zip(hidden.flatten(0, 1).split(chunk), labels.flatten().split(chunk), strict=True)
    return torch.cat([recomputed(losses, *rows) for rows in chunks]).view_as(labels)
