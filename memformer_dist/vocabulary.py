"""What token ids mean: the facts of a tokenizer that a corpus, a checkpoint and a cell must agree on."""

import numpy as np
from pydantic import BaseModel


class Vocabulary(BaseModel, extra="forbid", frozen=True):
    size: int  # tokens
    bos_id: int
    eos_id: int
    tokenizer_sha256: str  # of its file

    @property
    def token_dtype(self) -> np.dtype:
        """In which shards hold token ids: the smaller of two types that all of them fit in."""
        return np.dtype(np.uint16 if self.size <= 2**16 else np.uint32)
