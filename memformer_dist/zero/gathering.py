"""Keeps ZeRO-3's parameters gathered between uses that lie close together.

ZeRO-3 gathers the parameters of a module for its forward, lets go of them, and gathers them again for its backward. A
window of N segments with readout in groups of C would gather those of `advance` 3 N - 1 times and those of `readout`
2 N / C times. What is kept instead:

    "none"      nothing: every module gathers for itself, the least memory
    "readout"   the readout's, from a group's forward through its backward: N / C gathers a window, in one call each
    "all"       those too, and the advance's from the window's first call to its last: 1 gather a window, in one call;
                the readout's are then on their way while the group's segments are advanced

Without gathering here, one call would also cost DeepSpeed 0.19.8 two to six broadcasts of its bookkeeping, each of which waits
for the device: it takes a forward and a backward for a step, records the order of the modules, compares it on all ranks and
throws it away when the next step (here: another part of the cell) differs. That recording is switched off.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from memformer_dist.mrbp.settings import Keep

# A name among the modules that a parameter is in use by: while there is one, DeepSpeed does not let go of the parameter.
HELD = "held for the window"


class Gathering:
    """What of `module` is kept while a window is worked through; outside of `window` nothing is."""

    def __init__(self, module: nn.Module, parameter_offload, keep: Keep):
        parameter_offload.fwd_pre_hook.remove()  # the recording of steps
        coordinator = parameter_offload.get_param_coordinator()
        # Whoever needs a parameter that is on its way waits for it by what this dict holds.
        self._in_flight = coordinator._PartitionedParameterCoordinator__inflight_param_registry
        self.keep = keep
        self.parameters: list[Any] = list(module.parameters())  # with DeepSpeed's attributes
        # Known after the first group: what is kept for the window, and what the readout alone uses.
        self._lasting: list[Any] = []
        self._readout: list[Any] = []

    @contextmanager
    def window(self) -> Iterator[None]:
        """Around all that a window needs."""
        self._begin_window()
        yield
        self._release(self.parameters)

    @contextmanager
    def readout(self) -> Iterator[None]:
        """Around a readout's forward and backward."""
        self._begin_readout()
        yield
        self._end_readout()

    def _begin_window(self) -> None:
        # Small parameters are kept anyhow, as DeepSpeed means to (stage3_param_persistence_threshold).
        self._hold(p for p in self.parameters if self.keep == "all" or p.ds_persist)
        self._send_for(self._lasting)

    def begin_advance(self) -> None:
        """Before a segment of a group is advanced with gradient: the readout's parameters set out."""
        if self.keep == "all":
            self._send_for(self._readout)

    def _begin_readout(self) -> None:
        if self.keep != "none":
            readout = {id(p) for p in self._readout}
            self._lasting = [p for p in self.parameters if _is_gathered(p) and id(p) not in readout]
            self._send_for(self._readout)
            self._hold(self.parameters)

    def _end_readout(self) -> None:
        if self.keep != "none":
            lasting = {id(p) for p in self._lasting}
            others = [p for p in self.parameters if id(p) not in lasting]
            self._readout = [p for p in others if _is_gathered(p)]
            self._release(others)

    def _send_for(self, parameters: list[Any]) -> None:
        absent = [p for p in parameters if p.ds_status.name == "NOT_AVAILABLE"]
        if absent:
            self._in_flight |= dict.fromkeys(absent, absent[0].all_gather_coalesced(absent))

    @staticmethod
    def _hold(parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(HELD)

    def _release(self, parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            if parameter in self._in_flight:  # sent for and not used
                self._in_flight.pop(parameter).wait()
            parameter.ds_active_sub_modules.discard(HELD)
            if _is_gathered(parameter) and not parameter.ds_active_sub_modules:
                parameter.partition()


def _is_gathered(parameter: Any) -> bool:
    return parameter.ds_status.name == "AVAILABLE"
