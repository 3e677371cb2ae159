"""Adam's moments and the fp32 weights of an engine, whole tensors in and out, at every ZeRO stage."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from memformer_dist.cells.base import persistent_buffers
from memformer_dist.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's two, under torch's names


class Moments:
    """Reads and sets them in the optimiser of `deepspeed`, an engine of DeepSpeed's. All calls are collective.

    Frozen parameters (`requires_grad` False) are unknown to the optimiser and have no moments. `frozen` holds those of their
    fp32 weights that the module itself has rounded, by name.
    """

    def __init__(self, deepspeed: Any, world: World, frozen: dict[str, Tensor]):
        self._deepspeed, self._world, self._frozen = deepspeed, world, frozen
        self._module: nn.Module = deepspeed.module
        self._stage: int = deepspeed.zero_optimization_stage()

    def tensors(self) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """(name, fp32 weight, its moments by MOMENTS) of every parameter, whole, one at a time; frozen ones have no moments.

        Persistent buffers follow, as they are.
        """
        if any("exp_avg" not in self._optimizer().state.get(tensor, {}) for tensor in self._optimised_tensors()):
            self._create(0)  # no step has been applied yet
        self._link()
        for name, parameter in self._module.named_parameters():
            moments: dict[str, Tensor]
            if not parameter.requires_grad:
                weight, moments = self._frozen_weight(name, parameter), {}
            elif self._stage > 0:
                weight = safe_get_full_fp32_param(parameter)
                moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            else:
                weight, state = parameter.detach(), self._optimizer().state[parameter]
                moments = {key: state[key] for key in MOMENTS}
            yield name, weight, moments
        for name, buffer in persistent_buffers(self._module).items():
            yield name, buffer, {}

    def load(self, steps: int, moment: Callable[[str, str], Tensor | None]) -> None:
        """Set Adam's state: `steps` taken, moment(name, key) the whole tensor of a parameter; None leaves it at zero."""
        self._create(steps)
        self._link()
        for name, parameter in self._module.named_parameters():
            for key in MOMENTS if parameter.requires_grad else ():
                value = moment(name, key)
                if value is None:
                    continue
                if self._stage == 0:
                    self._optimizer().state[parameter][key].copy_(value)
                else:
                    self.set_whole(parameter, value.to(self._world.device), key)

    def set_whole(self, parameter: Any, value: Tensor, key: str | None = None) -> None:
        """Set a parameter's fp32 weight, or its moment `key`, from the whole tensor. ZeRO 1-3."""
        if self._stage < 3:
            if key is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
            return
        # The setters of whole tensors forget that the last partition is padded.
        size, rank, ranks = parameter.ds_tensor.numel(), self._world.rank, self._world.size
        own = nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))[rank * size : (rank + 1) * size]
        if key is None:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, key)

    def _frozen_weight(self, name: str, parameter: nn.Parameter) -> Tensor:
        if name in self._frozen:
            return self._frozen[name]
        if self._stage < 3:
            return parameter.detach()
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _optimizer(self) -> torch.optim.Optimizer:
        """torch's own."""
        return self._deepspeed.optimizer if self._stage == 0 else self._deepspeed.optimizer.optimizer

    def _create(self, steps: int) -> None:
        for tensor in self._optimised_tensors():
            self._optimizer().state[tensor] = {
                "step": torch.tensor(float(steps), device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }

    def _link(self) -> None:
        """At ZeRO 1-2, let each parameter know its piece of the flat moments.

        DeepSpeed does this once, when the first of the parameter groups has taken its first step and the others have no
        moments yet, and so leaves the others without.
        """
        if self._stage in (1, 2):
            self._deepspeed.optimizer._hp_optimizer_states_linked = False
            self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def _optimised_tensors(self) -> list[Tensor]:
        """What the torch optimiser sees: parameters at stage 0, flat partitions of this rank above."""
        if self._stage == 0:
            return [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        if self._stage == 3:
            return self._deepspeed.optimizer.fp32_partitioned_groups_flat
        return self._deepspeed.optimizer.single_partition_of_fp32_groups
