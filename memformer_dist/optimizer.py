"""AdamW: its section of the configuration, its parameter groups, and its learning rate."""

import math

import torch
from pydantic import Field, PositiveFloat
from torch import nn

from memformer_dist.section import Section


class OptimizerConfig(Section):
    """The section `optimizer`: AdamW, with a linear warm-up and a cosine down to training.tokens."""

    learning_rate: PositiveFloat = Field(3e-4, description="peak learning rate, reached at the end of the warm-up")
    final_learning_rate_ratio: float = Field(
        0.1, ge=0, le=1, description="learning rate at training.tokens, as a fraction of the peak"
    )
    warmup_tokens: int = Field(0, ge=0, description="labels trained on while the learning rate rises from 0")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay rates of the two moments")
    epsilon: PositiveFloat = Field(1e-8, description="added to AdamW's denominator")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay, of the weights of linear layers alone")
    gradient_clipping: float = Field(
        1.0, ge=0, description="largest norm of the gradient over all parameters and ranks; 0: no clipping"
    )


def adamw(cell: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on linear layers' weights alone: not on norms, embeddings, or a cell's own vectors.

    A weight that a linear layer shares with an embedding is an embedding's. Frozen parameters are left out.
    """
    linear = {id(module.weight) for module in cell.modules() if isinstance(module, nn.Linear)}
    linear -= {id(module.weight) for module in cell.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    trained = [parameter for parameter in cell.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in linear], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) not in linear], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # ZeRO takes no empty group
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


def learning_rate(config: OptimizerConfig, tokens: int, total_tokens: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine down to the final ratio.

    Args:
        tokens: labels trained on, those of this step included.
        total_tokens: training.tokens, where the cosine ends.
    """
    if tokens < config.warmup_tokens:
        return config.learning_rate * tokens / config.warmup_tokens
    progress = min(1.0, (tokens - config.warmup_tokens) / max(1, total_tokens - config.warmup_tokens))
    ratio = config.final_learning_rate_ratio
    return config.learning_rate * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
