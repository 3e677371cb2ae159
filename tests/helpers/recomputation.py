"""How much of a call is kept for the backward, the most that is alive at a time, and the largest logits that exist."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.mrbp.readout_size import saved_storages


def recompute(cell: RecurrentCell, **fields: Any) -> RecurrentCell:
    """Change `checkpoint_layers` and `loss_chunk` of a cell that is there, wherever its modules look them up."""
    for module in cell.modules():
        if hasattr(module, "config"):
            module.config = module.config.model_copy(update=fields)
    return cell


def kept_bytes(module: nn.Module, run: Callable[[], object]) -> int:
    """Of the graphs that `run` builds, without parameters."""
    with saved_storages(list(module.parameters())) as sizes:
        run()
    return sum(sizes.values())


class Watching(TorchDispatchMode):
    """Sees every tensor that is made inside, in forwards and backwards."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return result

    def see(self, tensor: Tensor) -> None:
        raise NotImplementedError


class PeakBytes(Watching):
    """The most bytes of storages made inside that were alive at a time."""

    def __init__(self):
        super().__init__()
        self.seen: dict[StorageWeakRef, int] = {}
        self.total = self.most = 0  # of those seen, some of which may be gone

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference, size = StorageWeakRef(storage), storage.nbytes()
        self.total += size - self.seen.get(reference, 0)
        self.seen[reference] = size
        if self.total > self.most:
            self.seen = {reference: size for reference, size in self.seen.items() if not reference.expired()}
            self.total = sum(self.seen.values())
            self.most = max(self.most, self.total)


class LargestLogits(Watching):
    """Rows of the largest tensor [..., vocabulary] that is made inside, weights of that shape apart."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def see(self, tensor: Tensor) -> None:
        if tensor.dim() and tensor.shape[-1] == self.vocabulary:
            self.rows = max(self.rows, tensor.numel() // self.vocabulary)
