"""Runs through the DeepSpeed engine on WORLD ranks, and the same runs in plain torch and one process.

deepspeed is imported by the functions that need it: they run on ranks, and the test process itself stays without it.
"""

import math

import torch
from torch import Tensor

from memformer_dist.cells.armt import ArmtConfig
from memformer_dist.cells.base import RecurrentCell
from memformer_dist.cells.gated_delta import GatedDeltaConfig
from memformer_dist.cells.hadamard import HadamardConfig
from memformer_dist.cells.hmt import HmtConfig
from memformer_dist.cells.lamemo import LaMemoConfig
from memformer_dist.cells.mom import MoMConfig
from memformer_dist.cells.plain import PlainConfig
from memformer_dist.cells.rmt import RmtConfig
from memformer_dist.cells.titans import TitansConfig
from memformer_dist.cells.transformer_xl import TransformerXLConfig
from memformer_dist.mrbp.executor import TorchExecutor
from memformer_dist.mrbp.settings import MrbpConfig
from memformer_dist.optimizer import OptimizerConfig, adamw
from memformer_dist.segment import Segment, select_rows
from tests.helpers.memformer import memformer
from tests.helpers.toy import VOCABULARY, PenalisedCell, ToyCell, ToyFeatures, full_bptt, labels_in, random_window

WORLD, LANES, LENGTH, SEGMENTS = 2, 4, 6, 4
STAGES = (0, 1, 2, 3)
SMALL = {"width": 8, "heads": 2, "feed_forward": 12, "layers": 2, "init_std": 0.3}
CONFIGS = {
    "plain": PlainConfig(**SMALL),
    "rmt": RmtConfig(**SMALL, slots=2),
    "armt": ArmtConfig(**SMALL, write_tokens=2, memory_width=16),
    "hmt": HmtConfig(**SMALL, slots=2, sensory_tokens=4),
    "transformer_xl": TransformerXLConfig(**SMALL, memory_length=4),
    "lamemo": LaMemoConfig(**SMALL, memory_length=8),
    "gated_delta": GatedDeltaConfig(**SMALL, chunk=4),
    "mom": MoMConfig(**SMALL, memories=3, balance=0.1, chunk=4),
    "hadamard": HadamardConfig(**SMALL, calibrations=1),  # of which a draw is the same on any number of ranks
    "titans": TitansConfig(**SMALL, memory_depth=2, expansion=2, chunk=4),
}


def new_cell(name: str) -> RecurrentCell:
    """A toy cell, one of CONFIGS or a Memformer of that layout, always with the same weights, without dropout."""
    torch.manual_seed(5)
    if name in ("toy", "auxiliary loss"):
        cell: RecurrentCell = ToyCell() if name == "toy" else PenalisedCell()
    elif name in CONFIGS:
        cell = CONFIGS[name].build(vocab_size=VOCABULARY, bos_id=1, segment_length=LENGTH)
    else:
        cell = memformer(name)
    for module in cell.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return cell


def windows(steps: int) -> list[list[Segment]]:
    """One window of SEGMENTS segments of all LANES per step. The first resets every lane: an empty state means nothing."""
    made = [random_window(SEGMENTS, LANES, LENGTH, seed=step) for step in range(steps)]
    made[0][0] = made[0][0]._replace(reset=torch.ones(LANES, dtype=torch.bool))
    return made


class Rows:
    """Some lanes of a window, with the `start` that the engine seeds dropout by."""

    def __init__(self, window, rows, start):
        self.window, self.rows, self.start = window, rows, start

    def __len__(self):
        return len(self.window)

    def __getitem__(self, t):
        return select_rows(self.window[t], self.rows)


def make_optimizer(kind: str, cell: RecurrentCell, learning_rate: float) -> torch.optim.Optimizer:
    """`kind` is "sgd" or "adamw"."""
    if kind == "sgd":
        return torch.optim.SGD(cell.parameters(), lr=learning_rate)
    return adamw(cell, OptimizerConfig(learning_rate=learning_rate, weight_decay=0.1))


def make_engine(cell, optimizer, world, *, settings, precision="fp32", gradient_clipping=0.0, seed=0, **mrbp):
    """An Engine; its section `mrbp` by fields. Imported here because deepspeed wants to know the device first."""
    from memformer_dist.zero.engine import Engine

    return Engine(
        cell,
        optimizer,
        world,
        MrbpConfig(window=1, **mrbp),
        settings=settings,
        precision=precision,
        gradient_clipping=gradient_clipping,
        seed=seed,
    )


def reference_run(name, kind, learning_rate, steps, clipping=0.0, detach_memory=False):
    """Plain torch, one process, full BPTT: losses, gradient norms and the parameters at the end."""
    cell = new_cell(name)
    optimizer = make_optimizer(kind, cell, learning_rate)
    state, losses, norms = cell.empty_state(LANES), [], []
    for window in windows(steps):
        optimizer.zero_grad()
        state, loss = full_bptt(
            TorchExecutor(cell, 0), window, state, loss_scale=1 / labels_in(window), detach_memory=detach_memory
        )
        norm = torch.nn.utils.clip_grad_norm_(cell.parameters(), clipping or float("inf"))
        optimizer.step()
        losses.append(float(loss))
        norms.append(float(norm))
    return losses, norms, dict(cell.named_parameters())


def engine_run(
    world,
    name,
    kind,
    learning_rate,
    steps,
    *,
    stage,
    groups=1,
    readout_group=1,
    readout_parts=1,
    clipping=0.0,
    engine=None,
    skip=(),
    between=lambda engine: None,
):
    """`reference_run` through the engine, with `groups` lane groups per rank.

    Steps in `skip` see a window whose loss is not finite; `between(engine)` is called after each.
    """
    if engine is None:
        cell = new_cell(name)
        settings = {"zero_optimization": {"stage": stage}}
        engine = make_engine(
            cell, make_optimizer(kind, cell, learning_rate), world, settings=settings, gradient_clipping=clipping
        )
    engine.mrbp = engine.mrbp.model_copy(update={"readout_parts": readout_parts})
    share = LANES // world.size // groups
    states = [engine.module.empty_state(share) for _ in range(groups)]
    losses, norms = [], []
    for step, window in enumerate(windows(steps)):
        total = 0.0

        def observe(t, segment, nll):
            nonlocal total
            total += float(nll.double().sum())

        first = world.rank * share * groups
        parts = [
            Rows(window, slice(first + g * share, first + (g + 1) * share), start=step * SEGMENTS)
            for g in range(groups)
        ]
        if step in skip:  # a memory that is not finite, on one rank alone: all of them must drop the step
            factor = float("nan") if world.rank == 1 else 1.0
            poisoned = [state._replace(memory=state.memory * factor) for state in states]
            started = [segment._replace(reset=torch.zeros_like(segment.reset)) for segment in window]
            read = [Rows(started, part.rows, part.start) for part in parts]
            engine.accumulate(read, poisoned, valid_tokens=labels_in(window), readout_group=readout_group)
            result = engine.step(learning_rate)
            assert not result.applied and not math.isfinite(result.gradient_norm)
        accumulated = engine.accumulate(
            parts,
            states,
            valid_tokens=labels_in(window),
            readout_group=readout_group,
            observe=observe,
        )
        states = accumulated.states
        result = engine.step(learning_rate)
        assert result.applied and accumulated.drift == 0
        losses.append(world.all_reduce_sum([total])[0] / labels_in(window))
        norms.append(result.gradient_norm)
        between(engine)
    return losses, norms, engine


def weights_of(engine) -> dict[str, Tensor]:
    """The fp32 weights by name, gathered from all ranks: every rank must call this."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_stage == 0:
        return {name: parameter.detach() for name, parameter in engine.module.named_parameters()}
    return {name: safe_get_full_fp32_param(parameter) for name, parameter in engine.module.named_parameters()}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all numbers of the tensors named in `expected`."""
    return max(float((found[name] - expected[name]).detach().abs().max()) for name in expected)


class Scale(ToyCell):
    """One weight w, loss w * x: the gradient is the sum of the x of all segments, here 1 and 65 times 2^-9.

    bf16 has 8 significant bits: 1 + 2^-9 is 1 there, so an accumulator in bf16 ends at 1.000; and the sum, 1.126953125,
    is 1.125 there, so a reduction in bf16 shows as well.
    """

    def __init__(self):
        super().__init__()
        del self.embedding, self.mix, self.write, self.initial, self.head
        self.weight = torch.nn.Linear(1, 1, bias=False)
        self.weight.weight.data.fill_(1.0)

    def advance(self, segment, state):
        return ToyFeatures(state.memory, state.seen), state._replace(seen=state.seen + 1)

    def readout(self, segment, features):
        value = torch.where(segment.tokens == 1, 1.0, 2.0**-9)[..., None]
        product = self.weight(value.to(self.weight.weight.dtype))
        self.computed_in = product.dtype
        return product.squeeze(-1).float()


def ones_and_crumbs() -> list[Segment]:
    """A window for `Scale`: 65 contributions of 2^-9, and a last one of 1, which is replayed first."""
    tick = random_window(1, 1, 1, seed=0)[0]
    crumb, one = (tick._replace(tokens=torch.full((1, 1), token)) for token in (2, 1))
    return [crumb] * 65 + [one]
