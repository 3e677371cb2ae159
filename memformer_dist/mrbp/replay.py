"""Memory replay back-propagation (MRBP): exact BPTT over N segments at the activation memory of one.

    rollout    state_0 -> advance -> state_1 -> ... -> state_{N-1}         without gradient; only the states are kept
    replay     for t = N-1 ... 0: recompute segment t from state_t with gradient, back-propagate its loss together with
               the gradient that arrived at its output state, hand the gradient of state_t on to segment t-1

This is Algorithm 1 of Wu et al. (arXiv 2010.06891); docs/mrbp.md goes through its lines. What differs most: since every
input state is known before the replay starts, `readout`, which no later segment waits for, runs over `readout_group`
segments as one batch, with the features as the leaf where the two halves of the graph meet. A parameter that a window
does not use, such as the writer's in a window of one segment, gets no gradient.

Plain torch: this module knows no model and no DeepSpeed. It is given two callables,
    call(part, t, *arguments)   run the cell's "advance" or "readout"; `t` lets the caller set the random state, which must
                                be the same in rollout and replay (dropout); a group's readout gets its first t
    backward(scalar)            accumulate gradients; DeepSpeed's engine.backward, or torch's
"""

import time
from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from memformer_dist.mrbp.states import DeviceStates, HostStates
from memformer_dist.segment import Segment, Tensors, concatenate, select_rows


class Replayed(NamedTuple):
    state: NamedTuple  # detached state after the window's last segment: where the next window starts
    rollout_s: float  # seconds
    drift: Tensor  # largest |recomputed - stored| over all states: 0 when replay repeats the rollout bit by bit
    state_gradient_squares: Tensor  # [N], item t: squared norm of dL/d(state entering segment t), all lanes and leaves


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


def _norm_square(gradients: NamedTuple) -> Tensor:
    """Squared norm of all the floating-point leaves together."""
    return sum(torch.linalg.vector_norm(x).square() for x in gradients if x.is_floating_point())


def _largest_difference(tensors: NamedTuple, others: NamedTuple) -> Tensor:
    pairs = [(x, y) for x, y in zip(tensors, others) if x.is_floating_point()]
    return torch.stack([(x.detach() - y.detach()).abs().max() for x, y in pairs]).max()


def memory_replay(
    call: Callable,
    backward: Callable[[Tensor], None],
    segments: Sequence[Segment],
    state: NamedTuple,
    *,
    loss_scale: float,
    readout_group: int = 1,
    readout_parts: int = 1,
    states: DeviceStates | HostStates | None = None,
    observe: Callable[[int, Segment, Tensor], None] = lambda t, segment, nll: None,
) -> Replayed:
    """Accumulate the gradient of L = `loss_scale` * sum of nll over a window into the parameters.

    With F_t and M_{t+1} what `advance` makes of segment t and the state M_t, f_t = dL/dF_t and g_t = dL/dM_t, g_N = 0:

        g_t = f_t dF_t/dM_t + g_{t+1} dM_{t+1}/dM_t
        dL/dtheta = sum over t of  dL/dtheta through the readout + f_t dF_t/dtheta + g_{t+1} dM_{t+1}/dtheta

    Args:
        call: call(part, t, segment, tensors) runs the cell's part on segment t of the window.
        backward: accumulates the gradient of a scalar; `torch.Tensor.backward` where nothing else is wanted.
        segments: the window, N segments of L lanes (NamedTuples of lane-first tensors); item t is asked for once in the
            rollout and once in the replay, in the order 0 ... N-2, N-1 ... 0, and may be made on demand.
        state: where the window starts, lanes first; no gradient flows out of it.
        loss_scale: usually 1 / (tokens with a label in the window), over all lanes of all ranks.
        readout_group: C, segments whose readout runs as one batch of C L lanes. The activations of that many segments are
            alive at once.
        readout_parts: parts that the lanes of a readout batch are worked through in, one after the other: each keeps its
            share of the readout's activations alone, which are most of a segment's where `advance` is small. At most C L.
        states: where the stored states lie, empty; on the device unless given.
        observe: called as observe(t, segment, nll [L, S]) for every segment, last to first, with nll detached.

    The comments name the lines of Algorithm 1 as docs/mrbp.md numbers them. There "nabla M" is the gradient of a memory,
    and the replay buffer is `states`. Raises what `call`, `backward` and `segments` raise; `states` is then to be thrown away.
    """
    states = DeviceStates() if states is None else states
    last = len(segments) - 1
    _wait_for(state)
    began = time.perf_counter()
    states.push(state)
    with torch.no_grad():  # lines 3-6: the rollout fills the replay buffer
        for t in range(last):
            _, state = call("advance", t, segments[t], state)
            states.push(state)
    _wait_for(state)
    rollout_s = time.perf_counter() - began

    gradient = None  # dL/d(output state of segment t); none behind the window's last
    final = following = None  # the window's last state; the stored state that segment t was rolled out to
    drift = torch.zeros((), device=state[0].device)
    floating = next(x for x in state if x.is_floating_point())
    squares = torch.zeros(last + 1, dtype=floating.dtype, device=floating.device)  # of the input states' gradients
    for stop in range(last + 1, 0, -readout_group):  # line 8
        group = range(max(0, stop - readout_group), stop)
        advances = []  # of this group, last to first: (segment, leaves of the input state, features, output state)
        for t in reversed(group):  # line 9: recompute from the replay buffer, with a graph
            segment, inputs = segments[t], as_leaves(states.pop())
            features, output = call("advance", t, segment, inputs)
            advances.append((segment, inputs, features, output))
            if t == last:
                final = output._make(x.detach() for x in output)
            else:
                drift = torch.maximum(drift, _largest_difference(output, following))
            following = inputs

        made = [features for _, _, features, _ in reversed(advances)]
        leaves = as_leaves(made[0]._make(torch.cat(column) for column in zip(*made)))
        del made
        batch = concatenate([segment for segment, *_ in reversed(advances)])  # [C L] rows
        nlls = []
        bounds = [len(leaves[0]) * number // readout_parts for number in range(readout_parts + 1)]
        for part in map(slice, bounds, bounds[1:]):
            nll = call("readout", group.start, select_rows(batch, part), select_rows(leaves, part))
            backward(nll.sum() * loss_scale)  # lines 10-11
            nlls.append(nll.detach())
        nll = torch.cat(nlls)

        lanes = nll.shape[0] // len(group)
        for position, t in reversed(list(enumerate(group))):
            segment, inputs, features, output = advances.pop(0)
            rows = slice(position * lanes, (position + 1) * lanes)
            observe(t, segment, nll[rows])
            surrogate = inner_product(features, select_rows(gradients_of(leaves), rows))
            if gradient is not None:
                surrogate = surrogate + inner_product(output, gradient)
            backward(surrogate)  # lines 11-12, in one walk through the graph
            gradient = gradients_of(inputs)  # nabla M_t, for the segment before
            squares[t] = _norm_square(gradient)
            del features, output, surrogate  # this segment's graph, before the next is built
    return Replayed(final, rollout_s, drift, squares)
