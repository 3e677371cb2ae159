"""AdamW: its section of the configuration, which weights it decays, and its learning rate."""

import math

import torch
from pydantic import Field, PositiveFloat
from torch import nn

from memformer_dist.section import Section


class OptimizerConfig(Section):
    """AdamW; the learning rate rises linearly over warmup_tokens and falls along a cosine until training.tokens."""

    learning_rate: PositiveFloat = Field(3e-4, description="peak, reached after the warm-up")
    final_learning_rate_ratio: float = Field(
        0.1, ge=0, le=1, description="share of the peak that the cosine has fallen to at training.tokens"
    )
    warmup_tokens: int = Field(0, ge=0, description="tokens over which the rate rises linearly from 0")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of AdamW's two moments")
    epsilon: PositiveFloat = Field(1e-8, description="added to the root of AdamW's second moment")
    weight_decay: float = Field(0.1, ge=0, description="on the weights of linear layers alone")
    gradient_clipping: float = Field(1.0, ge=0, description="largest norm of the global gradient; 0 does not clip")


def adamw(cell: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW that decays the weights of linear layers alone: norms, embeddings and the memory's forgetting vectors are not."""
    linear = {id(module.weight) for module in cell.modules() if isinstance(module, nn.Linear)}
    groups = [
        {"params": [p for p in cell.parameters() if id(p) in linear], "weight_decay": config.weight_decay},
        {"params": [p for p in cell.parameters() if id(p) not in linear], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


def learning_rate(config: OptimizerConfig, tokens: int, total_tokens: int) -> float:
    """Linear warm-up, then a cosine down to the final ratio, as a function of consumed tokens (this step's included)."""
    if tokens < config.warmup_tokens:
        return config.learning_rate * tokens / config.warmup_tokens
    progress = min(1.0, (tokens - config.warmup_tokens) / max(1, total_tokens - config.warmup_tokens))
    ratio = config.final_learning_rate_ratio
    return config.learning_rate * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
