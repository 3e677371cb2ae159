"""The only file that imports DeepSpeed: build its engine, accumulate windows, reduce once, step.

Everything here rests on what DeepSpeed 0.19.8 was measured to do under many backward passes per optimiser step
(tests/test_engine.py holds the right ways, and wrong ones that look right):

- Many backwards, one reduction: reduction.py. What ZeRO-3 gathers, and how often: zero3.py.
- bf16 is autocast over fp32 parameters with no module declared safe for lower precision, or bf16 parameters with the
  reduction after every backward: the other settings that look right accumulate or reduce in bf16, silently.
- `scale_wrt_gas=False` always; DeepSpeed averages over ranks, so the loss is multiplied by the world size.
"""

import contextlib
import warnings
from typing import Callable, Iterator, NamedTuple

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.mrbp.executor import reseed
from memformer_dist.mrbp.replay import memory_replay
from memformer_dist.mrbp.states import DeviceStates, HostStates, Store
from memformer_dist.segment import Segment
from memformer_dist.world import World
from memformer_dist.zero.gathering import Gathering, Keep
from memformer_dist.zero.reduction import Reduce, Reduction

# Of torch, at every collective that DeepSpeed 0.19.8 makes by its old name.
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*", category=FutureWarning)

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's two, under torch's names


class Accumulated(NamedTuple):
    states: list[NamedTuple]  # of this rank's lane groups after the window, detached
    drift: Tensor  # largest difference between a state recomputed and rolled out, on this rank
    rollout_s: float
    state_gradient_squares: Tensor  # [N], see mrbp.Replayed; of this rank's lanes


class StepResult(NamedTuple):
    gradient_norm: float  # global, before clipping; inf or nan when the step was skipped
    applied: bool


class Engine:
    """A cell whose parameters, gradients and optimiser state DeepSpeed manages.

    Args:
        cell: on the CPU or the process's device, the same weights on every rank.
        optimizer: over the cell's parameters; torch's.
        settings: the section `deepspeed` of the configuration.
        precision: "fp32"; "bf16", autocast over fp32 parameters; or "bf16_parameters", whose fp32 originals and moments lie
            with the optimiser (reduce="segment" alone, because bf16 parameters have bf16 gradients until they are reduced).
        gradient_clipping: largest norm of the global gradient; 0 does not clip.
        seed: of the dropout masks.
        reduce: "window", the gradient once, or "segment" (ZeRO 2 and 3), every backward's.
        state_store: where a window's states are kept between rollout and replay.
        keep_gathered: what ZeRO-3 does not gather anew for every use.
    """

    def __init__(
        self,
        cell: RecurrentCell,
        optimizer: torch.optim.Optimizer,
        world: World,
        *,
        settings: dict,
        precision: str = "fp32",
        gradient_clipping: float = 0.0,
        seed: int = 0,
        reduce: Reduce = "window",
        state_store: Store = "device",
        keep_gathered: Keep = "all",
    ):
        self.world, self.seed = world, seed
        # torch's collectives serve; the shared-memory op for CPUs would be compiled at the first start and never used.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        ours = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": gradient_clipping,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "managed_gradient_accumulation": reduce == "window",
        }
        weights: dict[nn.Parameter, Tensor] = {}
        if precision == "bf16":
            ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        elif precision == "bf16_parameters":
            ours["bf16"] = {"enabled": True}
            ours["data_types"] = {"grad_accum_dtype": "fp32"}
            ours["communication_data_type"] = "fp32"  # or every reduction is rounded to bf16
            weights = {parameter: parameter.detach().clone() for parameter in cell.parameters()}
        # DeepSpeed's buckets of 500 million numbers are allocated whole, however small the model. Where no full gradient is
        # to be anywhere, the bucket must not be one.
        numbers = sum(parameter.numel() for parameter in cell.parameters())
        bucket = numbers if reduce == "window" else max(1, numbers // 8)
        zero = {"overlap_comm": False, "reduce_bucket_size": min(500_000_000, bucket)}
        zero |= settings.get("zero_optimization", {})
        cell.to(world.device)
        self.engine, *_ = deepspeed.initialize(
            model=cell,
            optimizer=optimizer,
            config=settings | {"zero_optimization": zero} | ours,
            dist_init_required=False,
        )
        self.zero_stage = self.engine.zero_optimization_stage()
        self.module: RecurrentCell = self.engine.module
        for parameter, weight in weights.items():  # DeepSpeed has made its fp32 weights of rounded ones
            self._set_whole(parameter, weight.to(world.device))
        self.reduction = Reduction(self.engine, reduce)
        self.states = DeviceStates() if state_store == "device" else HostStates(world.device)
        self.gathering = None
        if self.zero_stage == 3:
            self.gathering = Gathering(self.module, self.engine.optimizer.parameter_offload, keep_gathered)

    def __call__(self, part: str, *arguments):
        """The cell's forward as it is used without gradients (evaluation): the same parts in the same order on every rank."""
        return self.engine(part, *arguments)

    def accumulate(
        self,
        windows: list,
        states: list[NamedTuple],
        *,
        valid_tokens: int,
        readout_group: int = 1,
        readout_parts: int = 1,
        observe: Callable = lambda t, segment, nll: None,
    ) -> Accumulated:
        """The gradient of the mean loss over one window of every lane, reduced once.

        Args:
            windows: this rank's lanes in groups, each a Window (same ticks, equal numbers of lanes on every rank).
            states: where each group starts.
            valid_tokens: labels in the window over the lanes of ALL ranks.
            readout_group, readout_parts, observe: see mrbp.memory_replay; dropout differs between parts.
        """
        # The average over ranks of (world size / valid tokens) * local sum is the global mean, however lanes lie on ranks.
        loss_scale = self.world.size / max(1, valid_tokens)
        results = []
        with self.reduction.of_a_step(), self._gathered():
            for group, (window, state) in enumerate(zip(windows, states, strict=True)):
                is_last = group == len(windows) - 1
                replay = _Replay(self, window.start, group, is_last=is_last, readout_parts=readout_parts)
                results.append(
                    memory_replay(
                        replay.call,
                        replay.backward,
                        window,
                        state,
                        loss_scale=loss_scale,
                        readout_group=readout_group,
                        readout_parts=readout_parts,
                        states=self.states,
                        observe=observe,
                    )
                )
        return Accumulated(
            [result.state for result in results],
            torch.stack([result.drift for result in results]).max(),
            sum(result.rollout_s for result in results),
            torch.stack([result.state_gradient_squares for result in results]).sum(0),
        )

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        if self.gathering is not None:
            self.gathering.begin_window()
        yield
        if self.gathering is not None:
            self.gathering.end_window()

    def step(self, learning_rate: float) -> StepResult:
        """Clip and apply the accumulated gradient, or drop it where its norm is not finite: on every rank alike."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.zero_stage > 0:  # decides by the global norm itself
            self.engine.step()
            return StepResult(float(self.engine.get_global_grad_norm()), self.engine.was_step_applied())
        norm = torch.nn.utils.get_total_norm(p.grad for p in self.module.parameters() if p.grad is not None)
        if not torch.isfinite(norm):
            self.engine.zero_grad()
            return StepResult(float(norm), False)
        self.engine.step()
        return StepResult(float(norm), True)

    def tensors(self) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """(name, fp32 weight, Adam moments) of every parameter, whole, one at a time. A collective call on all ranks."""
        if any("exp_avg" not in self._optimizer().state.get(tensor, {}) for tensor in self._optimised_tensors()):
            self._create_moments(0)  # not a step has been applied yet
        self._link_moments()
        for name, parameter in self.module.named_parameters():
            if self.zero_stage > 0:
                weight = safe_get_full_fp32_param(parameter)
                moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            else:
                weight, state = parameter.detach(), self._optimizer().state[parameter]
                moments = {key: state[key] for key in MOMENTS}
            yield name, weight, moments

    def load_moments(self, steps: int, moment: Callable[[str, str], Tensor]) -> None:
        """Set Adam's state: `steps` taken, moment(name, key) the whole tensor of a parameter. Weights are loaded before."""
        self._create_moments(steps)
        self._link_moments()
        for name, parameter in self.module.named_parameters():
            for key in MOMENTS:
                value = moment(name, key).to(self.world.device)
                if self.zero_stage == 0:
                    self._optimizer().state[parameter][key].copy_(value)
                else:
                    self._set_whole(parameter, value, key)

    def _set_whole(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Set an fp32 weight, or the moment `key` of it, from the whole tensor. ZeRO 1-3."""
        if self.zero_stage < 3:
            if key is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
            return
        # The setters of whole tensors forget that the last partition is padded.
        size, rank, world = parameter.ds_tensor.numel(), self.world.rank, self.world.size
        own = nn.functional.pad(value.flatten(), (0, size * world - value.numel()))[rank * size : (rank + 1) * size]
        if key is None:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, key)

    def _optimizer(self) -> torch.optim.Optimizer:
        """torch's own."""
        return self.engine.optimizer if self.zero_stage == 0 else self.engine.optimizer.optimizer

    def _create_moments(self, steps: int) -> None:
        for tensor in self._optimised_tensors():
            self._optimizer().state[tensor] = {
                "step": torch.tensor(float(steps), device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }

    def _link_moments(self) -> None:
        """At ZeRO 1-2, let each parameter know its piece of the flat moments.

        DeepSpeed does this once, when the first of the parameter groups has taken its first step and the others have no
        moments yet, and so leaves the others without.
        """
        if self.zero_stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _optimised_tensors(self) -> list[Tensor]:
        """What the torch optimiser sees: parameters at stage 0, flat partitions of this rank above."""
        if self.zero_stage == 0:
            return list(self.module.parameters())
        if self.zero_stage == 3:
            return self.engine.optimizer.fp32_partitioned_groups_flat
        return self.engine.optimizer.single_partition_of_fp32_groups


class _Replay:
    """The two callables that memory replay works a lane group of a window through with; `is_last` of the step's groups."""

    def __init__(self, engine: Engine, start: int, group: int, *, is_last: bool, readout_parts: int):
        self.engine, self.start, self.group, self.is_last = engine, start, group, is_last
        self.readout_parts = readout_parts
        self.readouts = 0  # parts of the present readout that were begun
        self.replayed = 0  # segments that were advanced with gradient and not yet gone backward through
        self.part, self.t = "advance", 0  # of the last call

    def call(self, part: str, t: int, segment: Segment, tensors: NamedTuple):
        """A part of the cell on the window's segment t, with the random state that belongs to it."""
        world, gathering = self.engine.world, self.engine.gathering
        if part == "readout":
            self.readouts += 1
            if gathering is not None and self.readouts == 1:
                gathering.begin_readout()
        elif torch.is_grad_enabled():
            self.replayed += 1
            if gathering is not None:
                gathering.begin_advance()
        self.part, self.t = part, t
        reseed(world.device, self.engine.seed, self.start + t, world.rank, self.group, self.readouts)
        return self.engine(part, segment.to(world.device), tensors)

    def backward(self, scalar: Tensor) -> None:
        """Of a group's readout, then of each of its advances, last to first."""
        of_readout, self.part = self.part == "readout", "advance"
        self.replayed -= not of_readout
        is_last = self.is_last and self.t == self.replayed == 0 and not of_readout
        self.engine.reduction.backward(scalar, is_last=is_last)
        if of_readout and self.readouts == self.readout_parts:
            self.readouts = 0
            if self.engine.gathering is not None:
                self.engine.gathering.end_readout()
