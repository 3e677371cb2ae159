"""Where memory replay keeps the states of a window between the rollout and the replay: a stack of NamedTuples of tensors.

    DeviceStates()        on the device they were made on: nothing is copied
    HostStates(device)    in pinned host memory, so that the window's length is bounded by the host's memory alone

From a GPU, states are copied out on a stream of their own, behind the rollout, and back one state ahead of the replay, so
that the kernels of neither wait for a copy. The pinned buffers come from torch's caching allocator, which hands those of one
window to the next. Without a GPU it is the same code without streams.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor


class DeviceStates:
    """The states as they are."""

    def __init__(self) -> None:
        self._stack: list[NamedTuple] = []

    def push(self, state: NamedTuple) -> None:
        self._stack.append(state)

    def pop(self) -> NamedTuple:
        """The newest state that is left."""
        return self._stack.pop()


class HostStates:
    """Copies in host memory of states that live on `device`."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stack: list[NamedTuple] = []
        self._next: NamedTuple | None = None  # the newest state, on its way back to the device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def push(self, state: NamedTuple) -> None:
        assert self._next is None, "the window's states are being taken back"
        with self._copying():
            self._stack.append(state._make(map(self._to_host, state)))

    def pop(self) -> NamedTuple:
        """The newest state that is left, on the device; the one below it sets out."""
        state = self._next or self._fetch()
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for tensor in state:
                tensor.record_stream(
                    current
                )  # its memory is the copying stream's, which may not have it back too early
        self._next = self._fetch() if self._stack else None
        return state

    def _fetch(self) -> NamedTuple:
        with self._copying():
            host = self._stack.pop()
            return host._make(tensor.to(self.device, non_blocking=True) for tensor in host)

    def _to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=self._stream is not None)
        if self._stream is not None:
            tensor.record_stream(self._stream)
        return host.copy_(tensor, non_blocking=True)

    def _copying(self):
        """Within, copies follow all that has been asked of the device so far, and hold up nothing that comes later."""
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)
