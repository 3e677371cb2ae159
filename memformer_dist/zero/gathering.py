"""Keeps ZeRO-3's parameters gathered between uses that lie close together.

ZeRO-3 gathers the parameters of a module for its forward, releases them, and gathers them again for its backward. A window of
N segments with readout groups of C would gather those of `advance` 3 N - 1 times and those of `readout` 2 N / C times. Instead:

    "none"      nothing is kept: every module gathers for itself, which takes the least memory
    "readout"   the readout's are kept from a group's forward through its backward: N / C gathers per window, one call each
    "all"       those too, and the advance's from the window's first call to its last: 1 gather per window, in one call;
                the readout's are then on their way while the group's segments are advanced

DeepSpeed 0.19.8 takes one forward and one backward for a step, records the order of modules, compares it on all ranks and
discards it when the next step (here: another part of the cell) differs. That would cost two to six broadcasts per call, each
of which waits for the device, so the recording is switched off.

Without the recording it also releases the parameters of a module that is computed again inside a backward
(cells/recomputation.py) before that backward has used them.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from memformer_dist.mrbp.settings import Keep

# Stands among the modules that use a parameter: DeepSpeed releases a parameter only when no module uses it.
HELD = "held for the window"


class Gathering:
    """Keeps parameters of `module` gathered, inside the context `window` alone."""

    def __init__(self, module: nn.Module, parameter_offload, keep: Keep):
        parameter_offload.fwd_pre_hook.remove()  # which records the order of modules
        coordinator = parameter_offload.get_param_coordinator()
        # DeepSpeed waits for a parameter that is on its way by the handle in this dict.
        self._in_flight = coordinator._PartitionedParameterCoordinator__inflight_param_registry
        _keep_during_recomputation(coordinator)
        self.keep = keep
        self.parameters: list[Any] = list(module.parameters())  # with DeepSpeed's attributes
        # Both known after the first group: what is kept for the window, and what only the readout uses.
        self._lasting: list[Any] = []
        self._readout: list[Any] = []

    @contextmanager
    def window(self) -> Iterator[None]:
        """The context of all calls and backwards of a window."""
        self._begin_window()
        yield
        self._release(self.parameters)

    @contextmanager
    def readout(self) -> Iterator[None]:
        """The context of a readout's forward and backward, all parts of it."""
        self._begin_readout()
        yield
        self._end_readout()

    def _begin_window(self) -> None:
        # Small parameters are kept in any case (DeepSpeed's stage3_param_persistence_threshold).
        self._hold(p for p in self.parameters if self.keep == "all" or p.ds_persist)
        self._start_gathering(self._lasting)

    def begin_advance(self) -> None:
        """To be called before a segment is advanced with gradient: starts to gather the readout's parameters."""
        if self.keep == "all":
            self._start_gathering(self._readout)

    def _begin_readout(self) -> None:
        if self.keep != "none":
            readout = {id(p) for p in self._readout}
            self._lasting = [p for p in self.parameters if _is_gathered(p) and id(p) not in readout]
            self._start_gathering(self._readout)
            self._hold(self.parameters)

    def _end_readout(self) -> None:
        if self.keep != "none":
            lasting = {id(p) for p in self._lasting}
            others = [p for p in self.parameters if id(p) not in lasting]
            self._readout = [p for p in others if _is_gathered(p)]
            self._release(others)

    def _start_gathering(self, parameters: list[Any]) -> None:
        absent = [p for p in parameters if p.ds_status.name == "NOT_AVAILABLE"]
        if absent:
            self._in_flight |= dict.fromkeys(absent, absent[0].all_gather_coalesced(absent))

    @staticmethod
    def _hold(parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(HELD)

    def _release(self, parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            if parameter in self._in_flight:  # gathered and not used
                self._in_flight.pop(parameter).wait()
            parameter.ds_active_sub_modules.discard(HELD)
            if _is_gathered(parameter) and not parameter.ds_active_sub_modules:
                parameter.partition()


def _is_gathered(parameter: Any) -> bool:
    return parameter.ds_status.name == "AVAILABLE"


def _keep_during_recomputation(coordinator) -> None:
    """A module's forward inside a backward releases nothing: its backward, which follows, does."""
    release = coordinator.release_sub_module

    def release_outside_of_backwards(module: nn.Module, forward: bool = False) -> None:
        if not forward or torch._C._current_graph_task_id() == -1:
            release(module, forward=forward)

    coordinator.release_sub_module = release_outside_of_backwards
