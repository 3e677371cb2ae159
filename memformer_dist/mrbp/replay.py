"""Memory replay back-propagation (MRBP): exact BPTT over N segments at the activation memory of one.

    rollout    state_0 -> advance -> state_1 -> ... -> state_{N-1}         without gradient; only the states are kept
    replay     for t = N-1 ... 0: recompute segment t from state_t with gradient, back-propagate its loss together with
               the gradient that arrived at its output state, hand the gradient of state_t on to segment t-1

This is Algorithm 1 of Wu et al. (arXiv 2010.06891); docs/mrbp.md goes through its lines. What differs most: since every
input state is known before the replay starts, `readout`, which no later segment waits for, runs over `readout_group`
segments as one batch, with the features as the leaf where the two halves of the graph meet. A parameter that a window
does not use, such as the writer's in a window of one segment, gets no gradient.

Cells whose state carries no gradient (caches, no memory) have nothing to replay: `in_order` runs their segments first to
last, once. With any other cell it is truncated back-propagation, the control of every claim that a memory helps.

Plain torch: this module knows no model and no DeepSpeed. The `Executor` (executor.py) says how one call of the cell is made.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memformer_dist.mrbp.drift import Drift
from memformer_dist.mrbp.executor import Cell, Executor, TorchExecutor
from memformer_dist.mrbp.states import DeviceStates, HostStates, SparseStates
from memformer_dist.segment import Some, Tensors, concatenate, differentiable, select_rows

Gradients = list[Tensor | None]  # one per leaf; None where nothing arrived
Observe = Callable[[int, Tensors, Tensor], None]


class Replayed(NamedTuple):
    state: Tensors  # detached state after the window's last segment: where the next window starts
    rollout_s: float  # seconds
    drift: Tensor  # largest |recomputed - stored| over all states: 0 when replay repeats the rollout bit by bit
    relative_drift: Tensor  # [N, leaves], see mrbp.drift.Drift: far above rounding, the cell breaks a rule (check_cell)
    state_gradient_squares: Tensor  # [N], item t: squared norm of dL/d(state entering segment t), all lanes and leaves


class _Advanced(NamedTuple):
    """A segment after its advance with gradient."""

    t: int
    segment: Tensors
    inputs: Tensors  # leaves of the input state
    features: Tensors
    output: Tensors  # the next state


def memory_replay(
    cell: Cell,
    window: Sequence[Tensors],
    state: Tensors,
    *,
    loss_scale: float,
    executor: Executor | None = None,
    readout_group: int = 1,
    readout_parts: int = 1,
    states: DeviceStates | HostStates | None = None,
    state_stride: int = 1,
    observe: Observe = lambda t, segment, nll: None,
) -> Replayed:
    """Accumulate the gradient of L = `loss_scale` * sum of nll over a window into the parameters.

    With F_t and z_{t+1} what `advance` makes of segment t and the state z_t, f_t = dL/dF_t and g_t = dL/dz_t, g_N = 0:

        g_t = f_t dF_t/dz_t + g_{t+1} dz_{t+1}/dz_t
        dL/dtheta = sum over t of  dL/dtheta through the readout + f_t dF_t/dtheta + g_{t+1} dz_{t+1}/dtheta

    Args:
        cell: see cells/base.py; one whose `carries_gradient` is False is run `in_order`.
        window: N segments of B lanes (NamedTuples of lane-first tensors) on the cell's device; item t is asked for once in
            the rollout and once in the replay, in the order 0 ... N-2, N-1 ... 0, and may be made on demand. With a
            `state_stride`, those whose output is made again are asked for once more.
        state: where the window starts, lanes first; no gradient flows out of it.
        loss_scale: usually 1 / (tokens with a label in the window), over all lanes of all ranks.
        executor: how the cell is called; TorchExecutor(cell) unless given.
        readout_group: C, segments whose readout runs as one batch of C B lanes. The activations of that many segments are
            alive at once.
        readout_parts: parts that the lanes of a readout batch are worked through in, one after the other: each keeps its
            share of the readout's activations alone, which are most of a segment's where `advance` is small. At most C B.
        states: where the stored states lie, empty; on the device unless given.
        state_stride: store every `state_stride`-th state alone, and roll out the segments between two of them a second time:
            N / state_stride + state_stride states are alive at a time instead of N.
        observe: called as observe(t, segment, nll [B, S]) for every segment, last to first, with nll detached.

    The comments name the lines of Algorithm 1 as docs/mrbp.md numbers them. There "nabla M" is the gradient of a state,
    and the replay buffer is `states`. Raises what the cell and `window` raise, and ValueError where `advance` writes in place
    to the state that it is given; `states` is then to be thrown away.
    """
    executor = TorchExecutor(cell) if executor is None else executor
    if not cell.carries_gradient:
        return in_order(
            executor,
            window,
            state,
            loss_scale=loss_scale,
            readout_group=readout_group,
            readout_parts=readout_parts,
            observe=observe,
        )

    @torch.no_grad()
    def next_state(t: int, state: Tensors) -> Tensors:
        segment = window[t]
        versions = _versions(state, segment)
        output = executor.rollout(t, segment, state)
        _expect_unchanged(state, segment, versions)
        return _detached(output)

    store = DeviceStates() if states is None else states
    buffer = store if state_stride == 1 else SparseStates(store, state_stride, next_state)
    last = len(window) - 1
    began = _wait_for(state)
    buffer.push(state)
    for t in range(last):  # lines 3-6: the rollout fills the replay buffer
        state = next_state(t, state)
        buffer.push(state)
    rollout_s = _wait_for(state) - began

    gradient: Gradients = [None] * len(state)  # dL/d(output state of segment t); none behind the window's last
    final = following = state  # the window's last state; the stored state that segment t was rolled out to
    drift = Drift(last + 1, state)
    squares = torch.zeros(last + 1, dtype=_real_dtype(state), device=state[0].device)  # of the input states' gradients
    for stop in range(last + 1, 0, -readout_group):  # line 8
        group = range(max(0, stop - readout_group), stop)
        advanced: list[_Advanced] = []  # of this group, last to first
        for t in reversed(group):  # line 9: recompute from the replay buffer, with a graph
            inputs, segment = as_leaves(buffer.pop()), window[t]
            versions = _versions(inputs, segment)
            features, output = executor.advance(t, segment, inputs)
            _expect_unchanged(inputs, segment, versions)
            advanced.append(_Advanced(t, segment, inputs, features, output))
            if t == last:
                final = _detached(output)
            else:
                drift.compare(t, output, following)
            following = inputs
        # The window's last backward is that of the earliest advance that a gradient flows through, or of the readout.
        passing = [a.t for a in advanced if _any_flows(a.features) or (a.t < last and _any_flows(a.output))]
        ending = None if group.start else min(passing, default=-1)
        arrived = _read_out(executor, advanced[::-1], loss_scale, readout_parts, observe, last=ending == -1)
        while advanced:
            t, _, inputs, features, output = advanced.pop(0)
            surrogate = inner_product((features, arrived.pop()), (output, gradient))
            if surrogate is not None:
                executor.backward(surrogate, last=t == ending)  # lines 11-12, in one walk through the graph
            gradient = [x.grad for x in inputs]  # nabla M_t, for the segment before
            squares[t] = _norm_square(gradient)
            del features, output, surrogate  # this segment's graph, before the next is built
    return Replayed(final, rollout_s, drift.largest, drift.relative, squares)


def in_order(
    executor: Executor,
    window: Sequence[Tensors],
    state: Tensors,
    *,
    loss_scale: float,
    readout_group: int = 1,
    readout_parts: int = 1,
    observe: Observe = lambda t, segment, nll: None,
) -> Replayed:
    """`memory_replay` without a gradient from any segment to the one before: first to last, every segment once.

    Arguments as there, but `observe` sees the segments of a readout group last to first, the groups first to last.
    """
    last = len(window) - 1
    for start in range(0, last + 1, readout_group):
        advanced: list[_Advanced] = []
        for t in range(start, min(start + readout_group, last + 1)):
            segment, inputs = window[t], _detached(state)
            versions = _versions(inputs, segment)
            features, output = executor.advance(t, segment, inputs)
            _expect_unchanged(inputs, segment, versions)
            advanced.append(_Advanced(t, segment, inputs, features, output))
            state = _detached(output)
        passing = [a.t for a in advanced if _any_flows(a.features)]
        ending = None if advanced[-1].t < last else min(passing, default=-1)
        arrived = _read_out(executor, advanced, loss_scale, readout_parts, observe, last=ending == -1)
        while advanced:
            t, _, _, features, _ = advanced.pop()
            surrogate = inner_product((features, arrived.pop()))
            if surrogate is not None:
                executor.backward(surrogate, last=t == ending)
            del features, surrogate
    nothing = Drift(last + 1, state)
    squares = torch.zeros(last + 1, dtype=_real_dtype(state), device=state[0].device)
    return Replayed(state, 0.0, nothing.largest, nothing.relative, squares)


def _read_out(
    executor: Executor,
    advanced: Sequence[_Advanced],
    loss_scale: float,
    parts: int,
    observe: Observe,
    *,
    last: bool,
) -> list[Gradients]:
    """The readout of consecutive segments as one batch, forward and backward -> the gradients of the features of each.

    `last`: its last backward is the window's.
    """
    leaves = as_leaves(concatenate([a.features for a in advanced]))
    batch = concatenate([a.segment for a in advanced])  # [C B] rows
    nlls = []
    bounds = [len(leaves[0]) * number // parts for number in range(parts + 1)]
    with executor.readout_scope():
        for part, rows in enumerate(map(slice, bounds, bounds[1:])):
            nll = executor.readout(advanced[0].t, part, select_rows(batch, rows), select_rows(leaves, rows))
            executor.backward(nll.sum() * loss_scale, last=last and part == parts - 1)  # lines 10-11
            nlls.append(nll.detach())
    nll = torch.cat(nlls)
    lanes = nll.shape[0] // len(advanced)
    arrived: list[Gradients] = []
    for position in range(len(advanced)):
        rows = slice(position * lanes, (position + 1) * lanes)
        arrived.append([None if leaf.grad is None else leaf.grad[rows] for leaf in leaves])
    for position, of in reversed(list(enumerate(advanced))):
        observe(of.t, of.segment, nll[position * lanes : (position + 1) * lanes])
    return arrived


def as_leaves(tensors: Some) -> Some:
    """The same values cut out of the graph; floating-point and complex tensors will collect a gradient."""
    return tensors._make(x.detach().requires_grad_(differentiable(x)) for x in tensors)


def inner_product(*pairs: tuple[Tensors, Gradients]) -> Tensor | None:
    """A scalar whose gradient with respect to tensors is what each is paired with; None where nothing flows.

    A leaf that nothing reads gets no gradient instead of zeros: 0 times an infinite derivative would be nan.
    """
    totals = []
    for tensors, gradients in pairs:
        terms = [
            (x * g.conj()).real.sum() if x.is_complex() else (x * g).sum()
            for x, g in zip(tensors, gradients)
            if g is not None and x.requires_grad
        ]
        if terms:
            totals.append(sum(terms))
    return sum(totals) if totals else None


def _versions(state: Tensors, segment: Tensors) -> list[int]:
    return [x._version for x in (*state, *segment)]


def _expect_unchanged(state: Tensors, segment: Tensors, versions: list[int]) -> None:
    """Raises ValueError where one was written to since: the state is stored for the replay, the segment is read again."""
    for what, tensors, then in (("state", state, versions), ("segment", segment, versions[len(state) :])):
        changed = [name for name, x, version in zip(tensors._fields, tensors, then) if x._version != version]
        if changed:
            raise ValueError(
                f"advance has written in place to its input {what} ({', '.join(changed)}); it must make new tensors"
            )


def _detached(tensors: Some) -> Some:
    return tensors._make(x.detach() for x in tensors)


def _any_flows(tensors: Tensors) -> bool:
    return any(x.requires_grad for x in tensors)


def _wait_for(state: Tensors) -> float:
    """The time when the device has come here; asked twice per window, so that the rollout's time is known."""
    if state[0].is_cuda:
        torch.cuda.synchronize(state[0].device)
    return time.perf_counter()


def _real_dtype(state: Tensors) -> torch.dtype:
    """In which norms of the state's gradients are given: that of its first leaf that carries one."""
    return next((x.real.dtype if x.is_complex() else x.dtype for x in state if differentiable(x)), torch.float32)


def _norm_square(gradients: Gradients) -> Tensor | float:
    """Squared norm of all of them together."""
    return sum(torch.linalg.vector_norm(x).square() for x in gradients if x is not None)
