"""Where memory replay keeps the states of a window between the rollout and the replay: a stack of NamedTuples of tensors.

    DeviceStates()                        on the device they were made on: nothing is copied
    HostStates(device)                    in pinned host memory, so that the window's length is bounded by the host's memory
                                          alone
    SparseStates(store, stride, advance)  every stride-th of them, in one of these two; the others are made again

From a GPU, states are copied out on a stream of their own, behind the rollout, and back one state ahead of the replay, so
that the kernels of neither wait for a copy. The pinned buffers come from torch's caching allocator, which hands those of
one window to the next. Without a GPU it is the same code without streams.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from memformer_dist.segment import Tensors


class DeviceStates:
    """The states as they are."""

    def __init__(self) -> None:
        self._stack: list[Tensors] = []

    def push(self, state: Tensors) -> None:
        self._stack.append(state)

    def pop(self) -> Tensors:
        """The newest state that is left."""
        return self._stack.pop()


class HostStates:
    """Copies in host memory of states that live on `device`, of one window at a time.

    They lie in blocks of BLOCK states per leaf: a million tokens are thousands of states, and keeping account of as many
    tensors would take more memory than some states do.
    """

    BLOCK = 16

    def __init__(self, device: torch.device):
        self.device = device
        self._blocks: list[Tensors] = []  # of tensors [BLOCK, lanes, ...]
        self._held = 0  # states in the blocks
        self._next: Tensors | None = None  # the newest state, on its way back to the device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def push(self, state: Tensors) -> None:
        assert self._next is None, "the window's states are being taken back"
        place = self._held % self.BLOCK
        if place == 0:
            self._blocks.append(state._make(map(self._block_like, state)))
        self._held += 1
        with self._copying():
            for name, tensor, block in zip(state._fields, state, self._blocks[-1]):
                if (tensor.shape, tensor.dtype) != (block.shape[1:], block.dtype):  # the copy would broadcast or round
                    raise ValueError(
                        f"state.{name}: found {tensor.dtype} {list(tensor.shape)}, the window's first state has"
                        f" {block.dtype} {list(block.shape[1:])}"
                    )
                block[place].copy_(tensor, non_blocking=True)
                if self._stream is not None:
                    tensor.record_stream(self._stream)

    def pop(self) -> Tensors:
        """The newest state that is left, on the device; the copy of the one below it starts. IndexError if none is left."""
        state = self._next or self._fetch()
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for tensor in state:  # its memory is the copying stream's, which may not have it back too early
                tensor.record_stream(current)
        self._next = self._fetch() if self._held else None
        return state

    def _fetch(self) -> Tensors:
        blocks = self._blocks[-1]
        self._held -= 1
        place = self._held % self.BLOCK
        if place == 0:
            self._blocks.pop()
        with self._copying():
            return blocks._make(block[place].to(self.device, non_blocking=True) for block in blocks)

    def _block_like(self, tensor: Tensor) -> Tensor:
        shape = (self.BLOCK, *tensor.shape)
        return torch.empty(shape, dtype=tensor.dtype, pin_memory=self._stream is not None)

    def _copying(self):
        """Within, copies follow all that has been asked of the device so far, and hold up nothing that comes later."""
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)


class SparseStates:
    """Every `stride`-th state, in `store`. The states between two of them are made from the first when they are asked for.

    So N / stride + stride states are held instead of N, for at most one more call of `advance` per segment. The states of
    the block at hand, the first of them too, lie on the device.

    Args:
        store: empty.
        advance: called as advance(t, state t), makes state t + 1; the first state pushed is number 0.
    """

    def __init__(self, store: DeviceStates | HostStates, stride: int, advance: Callable[[int, Tensors], Tensors]):
        self._store, self._stride, self._advance = store, stride, advance
        self._stored = 0
        self._block: list[Tensors] = []  # the newest states, at most `stride`; none of them is in the store

    def push(self, state: Tensors) -> None:
        if len(self._block) == self._stride:
            self._store.push(self._block[0])
            self._stored += 1
            self._block.clear()
        self._block.append(state)

    def pop(self) -> Tensors:
        """The newest state that is left. IndexError if none is."""
        if not self._block:
            self._block.append(self._store.pop())
            self._stored -= 1
            first = self._stored * self._stride
            for t in range(first, first + self._stride - 1):
                self._block.append(self._advance(t, self._block[-1]))
        return self._block.pop()


def most_states(segments: int, stride: int) -> int:
    """How many states of a window are held at a time, at most."""
    return min(segments, segments // stride + stride - 1)
