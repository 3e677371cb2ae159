"""Distributed training of segment-recurrent memory transformers by exact memory replay back-propagation.

    from memformer_dist import RecurrentCell, RunConfig, Segment, check_cell, memory_replay

Each name is imported when it is first used, so that `import memformer_dist` takes no time and loads no torch.
"""

from importlib import import_module

TYPE_CHECKING = False  # as typing has it; importing that takes longer than all the rest before signals are heard

if TYPE_CHECKING:
    from memformer_dist.cells.base import RecurrentCell
    from memformer_dist.cells.check import check_cell
    from memformer_dist.config import RunConfig
    from memformer_dist.mrbp.replay import memory_replay
    from memformer_dist.segment import Segment

__version__ = "0.2.0"
__all__ = ["RecurrentCell", "RunConfig", "Segment", "__version__", "check_cell", "memory_replay"]

_MODULES = {
    "RecurrentCell": "memformer_dist.cells.base",
    "RunConfig": "memformer_dist.config",
    "Segment": "memformer_dist.segment",
    "check_cell": "memformer_dist.cells.check",
    "memory_replay": "memformer_dist.mrbp.replay",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _MODULES.keys())
