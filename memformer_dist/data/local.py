"""LocalShards: the shards of a split in a folder on this machine."""

from pathlib import Path

import numpy as np

from memformer_dist.data.format import Manifest, wrong_size
from memformer_dist.errors import CorpusError, UserError


class LocalShards:
    """The shards of a split that lies in `folder`. All of them are there; nothing is fetched."""

    is_remote = False
    advice = ""

    def __init__(self, folder: Path, manifest: Manifest):
        """Raises UserError naming a shard that is missing or is not of the size that was written."""
        self.folder, self._shards = folder, manifest.shards
        self._tokenizer = folder.parent / manifest.tokenizer
        for shard in manifest.shards:
            if problem := wrong_size(folder, shard):
                raise UserError(problem)

    def map(self, number: int) -> np.ndarray:
        """The bytes of a shard, uint8. Raises CorpusError if its file was removed or cut after opening."""
        if problem := wrong_size(self.folder, self._shards[number]):
            raise CorpusError(f"{problem}; it was whole when the corpus was opened")
        # A plain array: slicing np.memmap, a subclass, takes several times as long.
        return np.memmap(self.folder / self._shards[number].name, np.uint8, "r").view(np.ndarray)

    def name(self, number: int) -> str:
        """What messages call the shard."""
        return str(self.folder / self._shards[number].name)

    def prefetch(self, numbers: list[int]) -> set[int]:
        """The shards whose maps may stay open: all."""
        return set(range(len(self._shards)))

    def tokenizer(self) -> Path:
        """The tokenizer of the corpus."""
        return self._tokenizer
