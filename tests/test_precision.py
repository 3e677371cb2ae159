"""bf16 against fp32: the gradient of 64 segments, what stays in fp32 on the way, and bf16 parameters through DeepSpeed.

Two things part a bf16 gradient from the fp32 one: the arithmetic, which is ours, and how far the memory moves when it is pushed
by a rounding, which is the model's. Most memories as they are initialised move little; one that does not is looked at too.
"""

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from memformer_dist.cells.memformer import Memformer, MemformerConfig
from memformer_dist.mrbp.executor import TorchExecutor, reseed
from memformer_dist.mrbp.replay import memory_replay
from memformer_dist.optimizer import OptimizerConfig
from memformer_dist.segment import Segment
from tests.helpers import engines
from tests.helpers.engines import WORLD, Rows, engine_run, largest_difference, make_engine, make_optimizer, weights_of
from tests.helpers.ranks import run_ranks
from tests.helpers.toy import labels_in

SEGMENTS, LANES, LENGTH, VOCABULARY = 64, 2, 16, 64
LAYOUTS = ("encoder_decoder", "decoder")


# ---- the gradient of a window in plain torch -----------------------------------------------------------------------------


def new_memformer(layout: str, seed: int) -> Memformer:
    torch.manual_seed(seed)
    config = MemformerConfig(
        layout=layout,
        width=64,
        encoder_layers=2 if layout == "encoder_decoder" else 0,
        decoder_layers=3,
        heads=4,
        feed_forward=128,
        slots=8,
        dropout=0.1,
    )
    return Memformer(config, vocab_size=VOCABULARY, bos_id=1, segment_length=LENGTH).train()


def text() -> list[Segment]:
    """A window of documents in which each lane's few phrases come back, so that there is something to remember."""
    generator = torch.Generator().manual_seed(0)
    lanes = []
    for _ in range(LANES):
        phrases = [torch.randint(4, VOCABULARY, (5 + number,), generator=generator) for number in range(6)]
        order = torch.randint(0, 6, (SEGMENTS * LENGTH // 5 + 1,), generator=generator)
        lanes.append(torch.cat([phrases[number] for number in order])[: SEGMENTS * LENGTH + 1])
    tokens = torch.stack(lanes)  # [LANES, SEGMENTS * LENGTH + 1]
    window = []
    for t in range(SEGMENTS):
        rows, offset = slice(t * LENGTH, (t + 1) * LENGTH), torch.full((LANES,), t * LENGTH)
        labels, none = tokens[:, 1:][:, rows], torch.zeros(LANES, dtype=torch.bool)
        length = torch.full((LANES,), LENGTH)
        window.append(Segment(tokens[:, rows], labels, length, none if t else ~none, none, offset * 0, offset))
    return window


class Window(NamedTuple):
    gradient: dict[str, Tensor]  # by parameter, added up in fp32 over the backwards
    drift: Tensor
    states: list[Tensor]  # that segments started from in the replay, last to first
    state_gradients: list[Tensor]
    normalised: list[Tensor]  # what went into the memory's norm, and what came out


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


def differentiate(cell: Memformer, precision: str, *, rollout: str | None = None, cut: bool = False) -> Window:
    """Of the mean loss of a window; the rollout in another precision, or no gradient through the states: for comparison."""
    cell, segments = copy.deepcopy(cell), text()
    sums = {name: torch.zeros_like(parameter) for name, parameter in cell.named_parameters()}
    if precision == "bf16_parameters":
        cell.bfloat16()
    states, state_gradients, normalised = [], [], []
    cell.normalise.register_forward_hook(lambda module, inputs, output: normalised.extend((inputs[0], output.detach())))

    class Noting(TorchExecutor):
        def call(self, part, segment, tensors, *coordinates):
            if part == "advance" and torch.is_grad_enabled():
                memory = Cut.apply(tensors.memory) if cut else tensors.memory.clone()
                states.append(memory.detach())
                memory.register_hook(state_gradients.append)
                tensors = tensors._replace(memory=memory)
            used = precision if rollout is None or torch.is_grad_enabled() else rollout
            t, phase = coordinates
            reseed(torch.device("cpu"), t, phase > 0)  # draws at which these figures are what the comments say
            with torch.autocast("cpu", torch.bfloat16, enabled=used == "bf16"):
                return cell(part, segment, tensors)

        def backward(self, scalar, *, last):
            scalar.backward()
            for name, parameter in cell.named_parameters():
                if parameter.grad is not None:
                    sums[name] += parameter.grad
                    parameter.grad = None

    settings = {"loss_scale": 1 / labels_in(segments), "readout_group": 4}
    replayed = memory_replay(cell, segments, cell.empty_state(LANES), executor=Noting(cell, 0), **settings)
    return Window(sums, replayed.drift, states, state_gradients, normalised)


def cosines(found: Window, expected: Window) -> dict[str, float]:
    """Of every tensor that carries at least a thousandth of the gradient's norm."""
    total = torch.stack([tensor.norm() for tensor in expected.gradient.values()]).norm()
    return {
        name: float(F.cosine_similarity(found.gradient[name].flatten(), tensor.flatten(), dim=0))
        for name, tensor in expected.gradient.items()
        if tensor.norm() >= 1e-3 * total
    }


def of_bf16(tensor: Tensor) -> float:
    """Share of the numbers that bf16 holds exactly: all, where an operation in bf16 made them."""
    return float((tensor == tensor.bfloat16()).float().mean())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_gradients_of_64_segments_point_where_those_of_fp32_do(layout):
    """Cosine >= 0.999 for every tensor that matters, with dropout; the replay repeats the rollout bit by bit; and states,
    their gradients and their norms are fp32 numbers."""
    cell = new_memformer(layout, seed=0)
    expected = differentiate(cell, "fp32")
    for precision in ("bf16", "bf16_parameters"):
        found = differentiate(cell, precision)
        cosine = cosines(found, expected)
        assert min(cosine.values()) >= 0.999, f"{precision}: {min(cosine, key=cosine.get)}"
        assert {"writer.value.weight", "normalise.bias", "memory_norm.weight"} < cosine.keys() and len(cosine) > 30
        assert min(cosine.values()) < 0.99999, "nothing was in bf16"
        assert found.drift == 0, precision

        # The last segment writes nothing that the window reads: its state's gradient may come out of one bf16 operation.
        made = {"state": found.states, "gradient": found.state_gradients[1:], "norm": found.normalised}
        for name, tensors in made.items():
            tensors = [tensor for tensor in tensors if tensor.any()]  # but what m(0) is made from, and dL/dm before it
            assert len(tensors) >= SEGMENTS - 2 and {tensor.dtype for tensor in tensors} == {torch.float32}
            assert max(map(of_bf16, tensors)) < 0.1, f"{precision}, {name}"
    without = cosines(differentiate(cell, "fp32", cut=True), expected)
    assert sum(value < 0.999 for value in without.values()) > 20, "the gradient through the states does not matter"


@pytest.mark.slow
def test_what_is_left_is_where_the_memory_went():
    """A memory can be chaotic: moved far by a rounding, it has the gradient of a neighbour, in any arithmetic.

    This one has it in fp32 as well when its weights are rounded to bf16, as they are in every bf16 product. Where the
    states are those of fp32, back-propagation in bf16 is as precise as in a memory that is not chaotic.
    """
    cell = new_memformer("encoder_decoder", seed=13)
    expected = differentiate(cell, "fp32")
    rounded = copy.deepcopy(cell)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    inevitable = min(cosines(differentiate(rounded, "fp32"), expected).values())
    found = min(cosines(differentiate(cell, "bf16"), expected).values())
    assert found < 0.999 and inevitable < 0.999 and 1 - found < 2 * (1 - inevitable)
    assert min(cosines(differentiate(cell, "bf16", rollout="fp32"), expected).values()) >= 0.999


def test_dropout_masks_do_not_depend_on_the_precision():
    """On the CPU; otherwise gradients of two precisions could only be compared without dropout."""
    masks, attended = [], []
    for dtype in (torch.float32, torch.bfloat16):
        reseed(torch.device("cpu"), 1)
        masks.append(F.dropout(torch.ones(3, 17, 64, dtype=dtype), 0.1) != 0)
        query, value = torch.zeros(2, 4, 17, 16, dtype=dtype), torch.eye(17, dtype=dtype).expand(2, 4, 17, 17)
        attended.append(F.scaled_dot_product_attention(query, query, value, dropout_p=0.1) != 0)
    for one, other in (masks, attended):
        assert torch.equal(one, other) and 0.05 < (~one).float().mean() < 0.15


# ---- bf16 parameters through DeepSpeed -----------------------------------------------------------------------------------


def new_engine(world, name, kind, learning_rate, stage, precision, reduce="segment", clipping=0.0, cell=None):
    """DeepSpeed remembers for the life of the process that one engine used autocast, and reduces the gradients of every later
    engine in the dtype of its parameters. A run has one engine; these tests have many."""
    import deepspeed.runtime.torch_autocast

    deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    if cell is None:
        cell = engines.Scale() if name == "scale" else engines.new_cell(name)
    return make_engine(
        cell,
        make_optimizer(kind, cell, learning_rate),
        world,
        settings={"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}},
        precision=precision,
        reduce=reduce,
        gradient_clipping=clipping,
    )


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def hook_as_zero3_does(cell: nn.Module) -> None:
    """ZeRO-3 passes what goes into and comes out of every module through a function, so that autograd adds up the gradients
    of the residual stream in another order. In bf16 that shows."""

    def same(tensors):
        return tree_map(lambda x: Same.apply(x) if torch.is_tensor(x) and x.requires_grad else x, tensors)

    for module in cell.modules():
        module.register_forward_pre_hook(lambda module, inputs: same(inputs))
        module.register_forward_hook(lambda module, inputs, outputs: same(outputs))


def reference_run(name, learning_rate, steps, clipping, *, as_zero3):
    """AdamW in plain torch and one process, with bf16 parameters and fp32 originals; the gradients of all backwards are added
    up in fp32, for each rank. -> (norms, originals)"""
    cell = engines.new_cell(name)
    if as_zero3:
        hook_as_zero3_does(cell)
    originals = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in cell.named_parameters()}
    decayed = {f"{name}.weight" for name, module in cell.named_modules() if isinstance(module, nn.Linear)}
    groups = [
        {"params": [p for name, p in originals.items() if name in decayed], "weight_decay": 0.1},
        {"params": [p for name, p in originals.items() if name not in decayed], "weight_decay": 0.0},
    ]
    config = OptimizerConfig()
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=config.betas, eps=config.epsilon, fused=True)
    cell.bfloat16()
    share = engines.LANES // WORLD
    states, norms = [cell.empty_state(share) for _ in range(WORLD)], []
    for window in engines.windows(steps):
        sums = [{name: torch.zeros_like(p) for name, p in originals.items()} for _ in range(WORLD)]
        for rank in range(WORLD):

            class InFloat32(TorchExecutor):
                def backward(self, scalar, *, last):
                    scalar.backward()
                    for name, parameter in cell.named_parameters():
                        if parameter.grad is not None:
                            sums[rank][name] += parameter.grad.float() / WORLD
                            parameter.grad = None

            rows = Rows(window, slice(rank * share, (rank + 1) * share), start=0)
            settings = {"loss_scale": WORLD / labels_in(window), "executor": InFloat32(cell)}
            replayed = memory_replay(cell, rows, states[rank], **settings)
            states[rank] = replayed.state
        for name, original in originals.items():
            original.grad = sums[0][name] + sums[1][name]
        norms.append(float(nn.utils.clip_grad_norm_(originals.values(), clipping)))
        optimizer.step()
        with torch.no_grad():
            for name, parameter in cell.named_parameters():
                parameter.copy_(originals[name])
    return norms, originals


def bf16_parameters_rank(world, name):
    initial = {name: parameter.detach() for name, parameter in engines.new_cell(name).named_parameters()}
    run = {"world": world, "name": name, "kind": "adamw", "learning_rate": 3e-3}
    for stage in (2, 3):
        made = run | {"stage": stage, "precision": "bf16_parameters", "clipping": 0.5}
        engine = new_engine(**made)
        # DeepSpeed makes its fp32 weights from parameters that it has rounded.
        assert largest_difference(weights_of(engine), initial) == 0, f"ZeRO {stage}"
        assert {parameter.dtype for parameter in engine.module.parameters()} == {torch.bfloat16}

        # After the engine was built, because ZeRO-3 replaces torch's linear for the whole process.
        norms, expected = reference_run(name, 3e-3, 2, 0.5, as_zero3=stage == 3)
        assert max(norms) > 0.5, "clipping never happened"
        assert largest_difference(initial, expected) > 5e-3
        _, found_norms, _ = engine_run(**run, steps=2, stage=stage, engine=engine)
        assert found_norms == pytest.approx(norms, rel=1e-6), f"ZeRO {stage}"
        assert largest_difference(weights_of(engine), expected) <= 1e-6, f"ZeRO {stage}"

        saved = {name: (weight.clone(), tree_map(torch.clone, both)) for name, weight, both in engine.tensors()}
        cell = engines.new_cell(name)
        for parameter_name, parameter in cell.named_parameters():
            parameter.data.copy_(saved[parameter_name][0])
        resumed = new_engine(**made, cell=cell)
        resumed.load_moments(2, lambda name, key: saved[name][1][key])
        engine_run(**run, steps=1, stage=stage, engine=engine)
        engine_run(**run, steps=1, stage=stage, engine=resumed)
        assert largest_difference(weights_of(resumed), weights_of(engine)) == 0, f"ZeRO {stage}"


@pytest.mark.slow
def test_bf16_parameters_equal_plain_torch():
    """AdamW with clipping on two ranks: the norm of every gradient and the fp32 weights; and these, not what bf16 leaves of
    them, are what a checkpoint hands on."""
    run_ranks(WORLD, bf16_parameters_rank, "encoder_decoder")


def crumbs(world):
    """One contribution of 1 on rank 0, 131 of 2^-9 beside it or on rank 1. The big one is replayed first."""
    both = engines.ones_and_crumbs()
    return Rows(both if world.rank == 0 else both[:1] * len(both), slice(0, 1), start=0)


EVERYTHING = (1 + 131 / 512) / 2  # the average over the ranks


def accumulated_gradient(world, stage, precision) -> float:
    """What a step of SGD at learning rate 1 takes off the weight."""
    engine = new_engine(world, "scale", "sgd", 1.0, stage, precision)
    engine.accumulate([crumbs(world)], [engine.module.empty_state(1)], valid_tokens=world.size)
    result = engine.step(1.0)
    found = 1.0 - float(weights_of(engine)["weight.weight"])
    assert result.gradient_norm == pytest.approx(found, rel=1e-6)
    return found


def sharded_accumulation_rank(world):
    import deepspeed

    for stage in (2, 3):
        for precision in ("fp32", "bf16", "bf16_parameters"):
            found = accumulated_gradient(world, stage, precision)
            assert found == EVERYTHING, f"ZeRO {stage}, {precision}: {found}"

    initialize = deepspeed.initialize

    def without_communication_data_type(*, config, **arguments):
        del config["communication_data_type"]
        return initialize(config=config, **arguments)

    deepspeed.initialize = without_communication_data_type
    found = accumulated_gradient(world, 3, "bf16_parameters")
    assert found == EVERYTHING - 2**-10, "DeepSpeed has changed: it reduces bf16 gradients in fp32"


@pytest.mark.slow
def test_sharded_gradients_accumulate_and_reduce_in_fp32():
    """And without communication_data_type what one rank adds to the other's is lost."""
    run_ranks(WORLD, sharded_accumulation_rank)


def dropped_window_rank(world):
    ways = [(1, "bf16", "window"), (3, "bf16", "window"), (2, "bf16", "segment"), (3, "fp32", "segment")]
    ways += [(stage, "bf16_parameters", "segment") for stage in (2, 3)]
    for stage, precision, reduce in ways:
        ends = []
        for skip in ((), (1,)):
            arguments = world, "encoder_decoder", "adamw", 3e-3
            engine = new_engine(*arguments, stage, precision, reduce, clipping=1.0)
            losses, _, _ = engine_run(*arguments, 2, stage=stage, engine=engine, skip=skip)
            ends.append((losses, weights_of(engine)))
        (clean, weights), (skipping, others) = ends
        assert skipping == clean and largest_difference(others, weights) == 0, f"ZeRO {stage}, {precision}, {reduce}"


@pytest.mark.slow
def test_a_window_that_is_not_finite_leaves_no_trace_in_any_precision():
    run_ranks(WORLD, dropped_window_rank)
