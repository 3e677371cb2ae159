"""Engine: a cell under DeepSpeed, which accumulates windows, reduces the gradient once and takes a step.

Everything in this folder rests on what DeepSpeed 0.19.8 was measured to do under many backward passes per optimiser step
(tests/test_engine.py holds the right ways, and wrong ones that look right):

- Many backwards, one reduction: reduction.py. What ZeRO-3 gathers, and how often: gathering.py.
- bf16 is autocast over fp32 parameters with no module declared safe for lower precision, or bf16 parameters with the
  reduction after every backward: the other settings that look right accumulate or reduce in bf16, silently.
- `scale_wrt_gas=False` always; DeepSpeed averages over ranks, so the loss is multiplied by the world size.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.mrbp.executor import Executor
from memformer_dist.mrbp.replay import Replayed, in_order, memory_replay
from memformer_dist.mrbp.settings import MrbpConfig
from memformer_dist.mrbp.states import DeviceStates, HostStates, most_states
from memformer_dist.segment import Tensors
from memformer_dist.world import World
from memformer_dist.zero.executor import ZeroExecutor
from memformer_dist.zero.gathering import Gathering
from memformer_dist.zero.moments import Moments
from memformer_dist.zero.reduction import Reduction

# Of torch, at every collective that DeepSpeed 0.19.8 makes by its old name.
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*", category=FutureWarning)


class Accumulated(NamedTuple):
    states: list[Any]  # of this rank's lane groups after the window, detached
    drift: Tensor  # largest difference between a state recomputed and rolled out, on this rank
    relative_drift: Tensor  # [N, leaves], see mrbp.drift.Drift; of the lane group that has the largest
    rollout_s: float
    state_gradient_squares: Tensor  # [N], see mrbp.replay.Replayed; of this rank's lanes


class StepResult(NamedTuple):
    gradient_norm: float  # global, before clipping; inf or nan when the step was skipped
    applied: bool


class Engine:
    """A cell whose parameters, gradients and optimiser state DeepSpeed manages.

    Args:
        cell: on the CPU or the world's device, the same weights on every rank.
        optimizer: over the cell's parameters; torch's.
        mrbp: how windows are replayed and gradients reduced; `window` and `readout_group` are the caller's to apply.
        settings: the section `deepspeed` of the configuration.
        precision: "fp32"; "bf16", autocast over fp32 parameters; or "bf16_parameters", whose fp32 originals and moments lie
            with the optimiser (reduce "segment" alone, because bf16 parameters have bf16 gradients until they are reduced).
        gradient_clipping: largest norm of the global gradient; 0 does not clip.
        seed: of the dropout masks.
    """

    def __init__(
        self,
        cell: RecurrentCell,
        optimizer: torch.optim.Optimizer,
        world: World,
        mrbp: MrbpConfig,
        *,
        settings: dict[str, Any],
        precision: str = "fp32",
        gradient_clipping: float = 0.0,
        seed: int = 0,
    ):
        self.world, self.mrbp, self.seed = world, mrbp, seed
        # torch's collectives serve; the shared-memory op for CPUs would be compiled at the first start and never used.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        ours: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": gradient_clipping,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "managed_gradient_accumulation": mrbp.reduce == "window",
        }
        weights: dict[str, Tensor] = {}
        if precision == "bf16":
            ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        elif precision == "bf16_parameters":
            ours["bf16"] = {"enabled": True}
            ours["data_types"] = {"grad_accum_dtype": "fp32"}
            ours["communication_data_type"] = "fp32"  # or every reduction is rounded to bf16
            weights = {name: parameter.detach().cpu().clone() for name, parameter in cell.named_parameters()}
        # DeepSpeed's buckets of 500 million numbers are allocated whole, however small the model. Where no full gradient is
        # to be anywhere, the bucket must not be one.
        numbers = sum(parameter.numel() for parameter in cell.parameters() if parameter.requires_grad)
        bucket = numbers if mrbp.reduce == "window" else max(1, numbers // 8)
        zero = {"overlap_comm": False, "reduce_bucket_size": min(500_000_000, bucket)}
        zero |= settings.get("zero_optimization", {})
        if precision == "bf16_parameters" and zero.get("stage") == 2:
            # ZeRO-2 divides by the number of ranks before it scatters, in bf16: 3 ranks would make 0.33529 of 0.33464.
            zero["reduce_scatter"] = False
        cell.to(world.device)
        self.deepspeed, *_ = deepspeed.initialize(
            model=cell,
            optimizer=optimizer,
            config=settings | {"zero_optimization": zero} | ours,
            dist_init_required=False,
        )
        self.zero_stage: int = self.deepspeed.zero_optimization_stage()
        self.module: RecurrentCell = self.deepspeed.module
        trained = {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        frozen = {name: weight for name, weight in weights.items() if name not in trained}
        self._moments = Moments(self.deepspeed, world, frozen)
        for name in weights.keys() & trained.keys():  # DeepSpeed has made its fp32 weights of rounded ones
            self._moments.set_whole(trained[name], weights[name].to(world.device))
        self.reduction = Reduction(self.deepspeed, mrbp.reduce)
        self.states = DeviceStates() if mrbp.state_store == "device" else HostStates(world.device)
        self.gathering = None
        if self.zero_stage == 3:
            self.gathering = Gathering(self.module, self.deepspeed.optimizer.parameter_offload, mrbp.keep_gathered)

    def __call__(self, part: str, *arguments):
        """The cell's forward as it is used without gradients (evaluation): the same parts in the same order on every rank."""
        return self.deepspeed(part, *arguments)

    def accumulate(
        self,
        windows: Sequence[Any],
        states: Sequence[Any],
        *,
        valid_tokens: int,
        readout_group: int = 1,
        observe: Callable[[int, Any, Tensor], None] = lambda t, segment, nll: None,
    ) -> Accumulated:
        """The gradient of the mean loss over one window of every lane, reduced once.

        Args:
            windows: this rank's lanes in groups, each a Window on the device (same ticks, equal numbers of lanes on every rank).
            states: where each group starts.
            valid_tokens: labels in the window over the lanes of ALL ranks.
            readout_group, observe: see mrbp.replay.memory_replay; dropout differs between parts.
        """
        # The average over ranks of (world size / valid tokens) * local sum is the global mean, however lanes lie on ranks.
        loss_scale = self.world.size / max(1, valid_tokens)
        results = []
        with self.reduction.of_a_step(), nullcontext() if self.gathering is None else self.gathering.window():
            for group, (window, state) in enumerate(zip(windows, states, strict=True)):
                executor = ZeroExecutor(self, start=window.start, group=group, is_last=group == len(windows) - 1)
                results.append(self._replay(executor, window, state, loss_scale, readout_group, observe))
        return Accumulated(
            [result.state for result in results],
            torch.stack([result.drift for result in results]).max(),
            torch.stack([result.relative_drift for result in results]).amax(0),
            sum(result.rollout_s for result in results),
            torch.stack([result.state_gradient_squares for result in results]).sum(0),
        )

    @torch.no_grad()
    def advance(self, windows: Sequence[Any], states: Sequence[Any]) -> Accumulated:
        """What `accumulate` makes of a window without labels: states alone, and no gradient."""
        ends, began = [], time.perf_counter()
        for group, (window, state) in enumerate(zip(windows, states, strict=True)):
            executor = ZeroExecutor(self, start=window.start, group=group, is_last=False)
            for t in range(len(window)):
                state = executor.rollout(t, window[t], state)
            ends.append(state)
        zeros = torch.zeros(1 + len(windows[0]), device=self.world.device)
        no_drift = zeros.new_zeros(len(windows[0]), len(states[0]))
        return Accumulated(ends, zeros[0], no_drift, time.perf_counter() - began, zeros[1:])

    def _replay(
        self,
        executor: Executor,
        window: Sequence[Any],
        state: Tensors,
        loss_scale: float,
        readout_group: int,
        observe: Callable[[int, Any, Tensor], None],
    ) -> Replayed:
        batching: dict[str, Any] = {"readout_group": readout_group, "readout_parts": self.mrbp.readout_parts}
        if not self.mrbp.replay:
            return in_order(executor, window, state, loss_scale=loss_scale, observe=observe, **batching)
        return memory_replay(
            self.module,
            window,
            state,
            loss_scale=loss_scale,
            executor=executor,
            states=self.states,
            state_stride=self.mrbp.state_stride,
            observe=observe,
            **batching,
        )

    def step(self, learning_rate: float) -> StepResult:
        """Clip and apply the accumulated gradient, or drop it where its norm is not finite: on every rank alike."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.zero_stage > 0:  # decides by the global norm itself
            self.deepspeed.step()
            return StepResult(float(self.deepspeed.get_global_grad_norm()), self.deepspeed.was_step_applied())
        norm = torch.nn.utils.get_total_norm(p.grad for p in self.module.parameters() if p.grad is not None)
        if not torch.isfinite(norm):
            self.deepspeed.zero_grad()
            return StepResult(float(norm), False)
        self.deepspeed.step()
        return StepResult(float(norm), True)

    def tensors(self) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """(name, fp32 weight, Adam's moments) of every parameter, whole, one at a time. A collective call."""
        return self._moments.tensors()

    def load_moments(self, steps: int, moment: Callable[[str, str], Tensor | None]) -> None:
        """Set Adam's state: `steps` taken, moment(name, key) the whole tensor of a parameter; None where it was frozen.

        Weights are loaded before.
        """
        self._moments.load(steps, moment)

    def first_step_bytes(self, state: Tensors, window: int) -> int:
        """What training will hold on this rank's device besides activations, and an engine before its first step does not.

        Of an engine that has taken steps, moments are counted again: a choice made by this is then on the safe side.
        """
        # Under ZeRO-3 a parameter's own size is that of what is gathered, mostly nothing.
        sizes = [
            (getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad) for p in self.module.parameters()
        ]
        numbers = sum(count for count, _, trained in sizes if trained)
        sharers = 1 if self.zero_stage == 0 else self.world.size
        moments = 2 * 4 * numbers // sharers
        if self.mrbp.reduce == "window":
            gradient = sum(count * size for count, size, trained in sizes if trained)
        else:  # a bucket on its way at a time, and this rank's share, which ZeRO-3 holds from the start
            bucket = self.deepspeed.zero_reduce_bucket_size()
            gradient = 4 * (bucket + (numbers // sharers if self.zero_stage == 2 else 0))
        keeps = self.gathering is not None and self.gathering.keep != "none"
        gathered = sum(count * size for count, size, _ in sizes) if keeps else 0
        stride = self.mrbp.state_stride
        if self.mrbp.state_store == "device" or self.world.device.type == "cpu":
            states = most_states(window, stride)
        else:
            states = stride if stride > 1 else 0  # the block at hand
        return moments + gradient + gathered + states * sum(x.nbytes for x in state)
