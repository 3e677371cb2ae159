"""AdamW: its section of the configuration, its parameter groups, and its learning rate.

Two schedules, both after a linear warm-up. The cosine (arXiv 1608.03983) depends on training.tokens everywhere: a run that is
extended jumps back up. Warm-up, stable, decay (WSD; arXiv 2404.06395, and 2405.18392 with the decay 1 - sqrt) is constant until
the decay, whatever training.tokens: extended from a checkpoint before it, a run is the one that had these tokens from the start.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import nn

from memformer_dist.errors import UserError
from memformer_dist.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """The section `optimizer`: AdamW, and the schedule of its learning rate."""

    learning_rate: PositiveFloat = Field(3e-4, description="peak learning rate, reached at the end of the warm-up")
    schedule: Literal["cosine", "warmup_stable_decay"] = Field(
        "cosine",
        description="how the learning rate falls after the warm-up. cosine: all the way to training.tokens;"
        " warmup_stable_decay: not before the last decay_share of training.tokens, so that a run can be extended",
    )
    decay_share: float = Field(
        0.2,
        gt=0,
        le=1,
        description="share of training.tokens over which warmup_stable_decay lowers the learning rate, at the end",
    )
    final_learning_rate_ratio: float = Field(
        0.1, ge=0, le=1, description="learning rate at training.tokens, as a fraction of the peak"
    )
    warmup_tokens: int = Field(0, ge=0, description="labels trained on while the learning rate rises from 0")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's decay rates of the two moments, >= 0, < 1")
    # Smaller ones are 0 in float32, and 0 / 0 would make weights whose gradient is 0 nan.
    epsilon: float = Field(1e-8, ge=1e-30, description="added to AdamW's denominator")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay, of the weights of linear layers alone")
    gradient_clipping: float = Field(
        1.0, ge=0, description="largest norm of the gradient over all parameters and ranks; 0: no clipping"
    )


def adamw(cell: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on linear layers' weights alone: not on norms, embeddings, or a cell's own vectors.

    A weight that a linear layer shares with an embedding is an embedding's. Frozen parameters are left out. Raises UserError
    where no others are left.
    """
    linear = {id(module.weight) for module in cell.modules() if isinstance(module, nn.Linear)}
    linear -= {id(module.weight) for module in cell.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    trained = [parameter for parameter in cell.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError("model: found no parameter that is trained (requires_grad), expected some")
    groups = [
        {"params": [p for p in trained if id(p) in linear], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) not in linear], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # ZeRO takes no empty group
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


def learning_rate(config: OptimizerConfig, tokens: int, total_tokens: int) -> float:
    """Return the learning rate of a step: linear warm-up, then the schedule down to the final ratio.

    Args:
        tokens: labels trained on, those of this step included.
        total_tokens: training.tokens, where the schedule ends.
    """
    if tokens < config.warmup_tokens:
        return config.learning_rate * tokens / config.warmup_tokens
    start, ratio = decay_start(config, total_tokens), config.final_learning_rate_ratio
    progress = min(1.0, (tokens - start) / max(1, total_tokens - start))
    if config.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    elif progress <= 0:
        return config.learning_rate
    else:
        left = 1 - math.sqrt(progress)
    return config.learning_rate * (ratio + (1 - ratio) * left)


def decay_begins(config: OptimizerConfig, before: int, after: int, total_tokens: int) -> bool:
    """Return whether the step that leads from `before` to `after` tokens is the first that warmup_stable_decay slows."""
    start = decay_start(config, total_tokens)
    return config.schedule == "warmup_stable_decay" and 0 < before <= start < after


def decay_start(config: OptimizerConfig, total_tokens: int) -> int:
    """Return how many tokens are trained on before the learning rate begins to fall."""
    if config.schedule == "cosine":
        return config.warmup_tokens
    return max(config.warmup_tokens, total_tokens - math.ceil(config.decay_share * total_tokens))
