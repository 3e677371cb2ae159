"""What cells built of cells/layers.py have in common: the embedding, the head, and the loss, whole or in chunks."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from memformer_dist.cells.base import Features, RecurrentCell, State
from memformer_dist.cells.layers import Linear, TokenEmbedding
from memformer_dist.cells.layers_config import BlocksConfig
from memformer_dist.cells.recomputation import losses_in_chunks
from memformer_dist.segment import Segment


class LayersCell(RecurrentCell[State, Features]):
    """A cell whose head is one matrix, the embedding's or its own. It defines `hidden` instead of `logits`."""

    config: Any  # of BlocksConfig, each cell its own kind

    def __init__(self, config: BlocksConfig, *, vocab_size: int, segment_length: int):
        super().__init__()
        self.config, self.vocab_size, self.segment_length = config, vocab_size, segment_length
        self.embedding = TokenEmbedding(vocab_size, config.width, std=config.init_std)
        self.head = None if config.tie_embeddings else Linear(config.width, vocab_size, std=config.init_std)
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] -> [B, S, D], what the first layer reads."""
        return self.dropout(self.embedding(tokens))

    def hidden(self, segment: Segment, features: Features) -> Tensor:
        """[B, S, D], what the head reads."""
        raise NotImplementedError

    def logits(self, segment: Segment, features: Features) -> Tensor:
        return self.to_logits(self.hidden(segment, features))

    def readout(self, segment: Segment, features: Features) -> Tensor:
        if self.config.loss_chunk is None:
            return super().readout(segment, features)
        hidden = self.hidden(segment, features)
        return losses_in_chunks(self.to_logits, hidden, segment.labels, self.config.loss_chunk)

    def to_logits(self, hidden: Tensor) -> Tensor:
        return self.embedding(hidden, as_head=True) if self.head is None else self.head(hidden)

    def zeros(self, lanes: int, *shape: int, device: torch.device | None, dtype: torch.dtype | None = None) -> Tensor:
        """A leaf [lanes, *shape] of an empty state: in float32 or finer unless `dtype` says otherwise, on `device` or where
        the parameters are."""
        like = next(self.parameters())
        dtype = dtype or torch.promote_types(like.dtype, torch.float32)
        return torch.zeros(lanes, *shape, dtype=dtype, device=device or like.device)

    def counts(self, lanes: int, *shape: int, device: torch.device | None) -> Tensor:
        """The same of whole numbers: counters, tokens."""
        return self.zeros(lanes, *shape, device=device, dtype=torch.int64)


class RewrittenCell(LayersCell[State, Features]):
    """A cell of RewrittenConfig."""

    @property
    def is_disturbed(self) -> bool:
        """Whether there is noise on the memory: memory_noise, in training."""
        return self.training and self.config.memory_noise > 0

    def disturbed(self, memory: Tensor) -> Tensor:
        """The memory [B, M, D] with noise on every vector, of up to memory_noise times its norm."""
        if not self.is_disturbed:
            return memory
        sizes = torch.linalg.vector_norm(memory.detach(), dim=-1, keepdim=True) / math.sqrt(memory.shape[-1])
        # Drawn per lane, so that a memory with little noise, as it is after training, is trained on too.
        shares = self.config.memory_noise * torch.rand_like(memory[:, :1, :1])
        return memory + shares * sizes * torch.randn_like(memory)
