"""Memory replay back-propagation (MRBP): exact BPTT over N segments at the activation memory of one.

    rollout    state_0 -> advance -> state_1 -> ... -> state_{N-1}         without gradient; only the states are kept
    replay     for t = N-1 ... 0: recompute segment t from state_t with gradient, back-propagate its loss together with
               the gradient that arrived at its output state, hand the gradient of state_t on to segment t-1

This is Algorithm 1 of Wu et al. (arXiv 2010.06891v2), with three differences. The last segment is never rolled out: its
replay gives its output state. Its output state gets a zero gradient rather than none, so that every parameter of the
writer has a gradient in every window (ZeRO-3 needs that, and it costs one writer's backward). And since every input state
is known before the replay starts, `readout`, which no later segment waits for, runs over `readout_group` segments as one
batch, with the features as the leaf where the two halves of the graph meet.

Plain torch: this module knows no model and no DeepSpeed. It is given two callables,
    call(part, t, *arguments)   run the cell's "advance" or "readout"; `t` lets the caller set the random state, which must be
                                the same in rollout and replay (dropout); the readout of a group is called with its first t
    backward(scalar)            accumulate gradients; DeepSpeed's engine.backward, or torch's
"""

import time
from typing import Callable, NamedTuple, Sequence, TypeVar

import torch
from torch import Tensor

from memformer_dist.segment import Segment, concatenate

Tensors = TypeVar("Tensors", bound=NamedTuple)  # a cell's state or features: a NamedTuple of lane-first tensors


class Replayed(NamedTuple):
    state: NamedTuple  # detached state after the window's last segment: where the next window starts
    rollout_s: float  # seconds
    drift: Tensor  # largest |recomputed - stored| over all states: 0 when replay repeats the rollout bit by bit


def as_leaves(tensors: Tensors) -> Tensors:
    """The same values cut out of the graph; floating-point tensors will collect a gradient."""
    return tensors._make(x.detach().requires_grad_(x.is_floating_point()) for x in tensors)


def inner_product(tensors: Tensors, gradients: Tensors) -> Tensor:
    """A scalar whose gradient with respect to the floating-point `tensors` is `gradients`."""
    return sum((x * g).sum() for x, g in zip(tensors, gradients) if x.is_floating_point())


def gradients_of(leaves: Tensors) -> Tensors:
    """What the leaves have collected; zero where nothing arrived (a loss that is masked out altogether)."""
    return leaves._make(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)


def _wait_for(state: NamedTuple) -> None:
    """Until the device has come here; twice a window, so that the rollout's time can be told."""
    if state[0].is_cuda:
        torch.cuda.synchronize(state[0].device)


def memory_replay(
    call: Callable,
    backward: Callable[[Tensor], None],
    segments: Sequence[Segment],
    state: NamedTuple,
    *,
    loss_scale: float,
    readout_group: int = 1,
    observe: Callable[[int, Segment, Tensor], None] = lambda t, segment, nll: None,
) -> Replayed:
    """Accumulate the gradient of `loss_scale * sum(nll)` over a window into the parameters.

    Args:
        segments: the window; item t is asked for once in the rollout and once in the replay, in the order
            0 ... N-2, N-1 ... 0, and may be made on demand.
        state: where the window starts; no gradient flows out of it.
        loss_scale: usually 1 / (tokens with a label in the window), over all lanes of all ranks.
        readout_group: segments whose readout runs as one batch. The activations of that many segments are alive at once.
        observe: called as observe(t, segment, nll [L, S]) for every segment, last to first, with nll detached.
    """
    last = len(segments) - 1
    states = [state]
    _wait_for(state)
    began = time.perf_counter()
    with torch.no_grad():
        for t in range(last):
            _, state = call("advance", t, segments[t], state)
            states.append(state)

    _wait_for(state)
    rollout_s = time.perf_counter() - began

    gradient = final = following = None  # dL/d(output state of t); the window's last state; the stored state of t + 1
    drifts = []
    for stop in range(last + 1, 0, -readout_group):
        group = range(max(0, stop - readout_group), stop)
        advances = []  # of this group, last to first: (segment, leaves of the input state, features, output state)
        for t in reversed(group):
            segment, inputs = segments[t], as_leaves(states.pop())
            features, output = call("advance", t, segment, inputs)
            advances.append((segment, inputs, features, output))
            if t == last:
                final = output._make(x.detach() for x in output)
                gradient = output._make(torch.zeros_like(x) for x in output)
            else:
                drifts += [(x - y).detach().abs().max() for x, y in zip(output, following) if x.is_floating_point()]
            following = inputs

        made = [features for _, _, features, _ in reversed(advances)]
        leaves = as_leaves(made[0]._make(torch.cat(column) for column in zip(*made)))
        del made
        nll = call("readout", group.start, concatenate([segment for segment, *_ in reversed(advances)]), leaves)
        backward(nll.sum() * loss_scale)

        lanes = nll.shape[0] // len(group)
        for position, t in reversed(list(enumerate(group))):
            segment, inputs, features, output = advances.pop(0)
            rows = slice(position * lanes, (position + 1) * lanes)
            observe(t, segment, nll[rows].detach())
            feature_gradient = leaves._make(x[rows] for x in gradients_of(leaves))
            backward(inner_product(features, feature_gradient) + inner_product(output, gradient))
            gradient = gradients_of(inputs)
            del features, output  # this segment's graph, before the next is built
    drift = torch.stack(drifts).max() if drifts else torch.zeros(())
    return Replayed(final, rollout_s, drift)
