"""bf16 against fp32: the gradient of 64 segments, what stays in fp32 on the way, and bf16 parameters through DeepSpeed.

Two things bound how well a bf16 gradient can agree with the fp32 one. Arithmetic: sums, states and state gradients must be in
fp32. And the model: a memory that moves far when its weights move by a rounding has another gradient there, whatever the
arithmetic. The first is tested on memories that forget, the second is told from it below.
"""

import copy
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from memformer_dist.cells.memformer import BiasedMemoryNormalisation, Memformer, MemformerConfig
from memformer_dist.config import OptimizerConfig
from memformer_dist.mrbp import memory_replay
from memformer_dist.runtime import reseed
from memformer_dist.segment import Segment
from tests import test_engine
from tests.ranks import run_ranks
from tests.test_engine import LANES as GLOBAL_LANES
from tests.test_engine import Rows, engine_run, largest_difference, make_optimizer, weights_of
from tests.toy import labels_in

SEGMENTS, LANES, LENGTH, VOCABULARY = 64, 2, 16, 64
LAYOUTS = ("encoder_decoder", "decoder")


# ---- the gradient of a window in plain torch -----------------------------------------------------------------------------


def new_memformer(layout: str, *, forgetting: float, seed: int = 0) -> Memformer:
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
        bmn_init_norm=forgetting,
    )
    return Memformer(config, vocab_size=VOCABULARY, bos_id=1, segment_length=LENGTH).train()


def text(seed: int) -> list[Segment]:
    """A window of documents in which each lane's few phrases come back, so that there is something to remember."""
    generator = torch.Generator().manual_seed(seed)
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
    gradient: dict[str, torch.Tensor]  # fp32, by parameter
    drift: torch.Tensor
    states: list[torch.Tensor]  # memories that segments started from in the replay
    state_gradients: list[torch.Tensor]


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


def differentiate(cell: Memformer, precision: str, *, rollout: str | None = None, cut: bool = False) -> Window:
    """The gradient of a window, summed in fp32 over its backwards; `rollout` in another precision, or the gradient of the
    states cut: the controls."""
    cell, segments = copy.deepcopy(cell), text(0)
    sums = {name: torch.zeros_like(parameter) for name, parameter in cell.named_parameters()}
    if precision == "bf16_parameters":
        cell.bfloat16()
    states, state_gradients = [], []

    def call(part, t, segment, tensors):
        reseed(torch.device("cpu"), t, part == "readout")
        if part == "advance" and torch.is_grad_enabled():
            memory = Cut.apply(tensors.memory) if cut else tensors.memory * 1
            states.append(memory.detach())
            memory.register_hook(state_gradients.append)
            tensors = tensors._replace(memory=memory)
        used = precision if rollout is None or torch.is_grad_enabled() else rollout
        with torch.autocast("cpu", torch.bfloat16, enabled=used == "bf16"):
            return cell(part, segment, tensors)

    def backward(scalar):
        scalar.backward()
        for name, parameter in cell.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad
                parameter.grad = None

    replayed = memory_replay(
        call, backward, segments, cell.empty_state(LANES), loss_scale=1 / labels_in(segments), readout_group=4
    )
    return Window(sums, replayed.drift, states, state_gradients)


def cosines(found: Window, expected: Window) -> dict[str, float]:
    """Of every tensor that carries at least a thousandth of the gradient's norm."""
    total = torch.stack([tensor.norm() for tensor in expected.gradient.values()]).norm()
    return {
        name: float(F.cosine_similarity(found.gradient[name].flatten(), tensor.flatten(), dim=0))
        for name, tensor in expected.gradient.items()
        if tensor.norm() >= 1e-3 * total
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_gradients_of_64_segments_point_where_the_fp32_ones_do(layout):
    """Cosine >= 0.999 for every tensor that matters, with dropout; and the replay repeats the rollout bit by bit."""
    cell = new_memformer(layout, forgetting=1.0)
    expected = differentiate(cell, "fp32")
    for precision in ("bf16", "bf16_parameters"):
        found = differentiate(cell, precision)
        assert found.drift == 0, precision
        cosine = cosines(found, expected)
        assert {"writer.value.weight", "normalise.bias", "memory_norm.weight"} < cosine.keys() and len(cosine) > 30
        assert min(cosine.values()) >= 0.999, f"{precision}: {min(cosine, key=cosine.get)}"
        assert any((found.gradient[name] != expected.gradient[name]).any() for name in cosine), "nothing was in bf16"
    without_memory = cosines(differentiate(cell, "fp32", cut=True), expected)
    assert sum(value < 0.999 for value in without_memory.values()) > 20, "the gradient through the states does not matter"


def of_bf16(tensor: torch.Tensor) -> float:
    """Share of the numbers that bf16 holds exactly."""
    return float((tensor == tensor.bfloat16()).float().mean())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_and_their_gradients_and_norms_are_in_fp32(layout, monkeypatch):
    forward, seen = BiasedMemoryNormalisation.forward, []

    def watched(self, memory):
        seen.extend((memory.detach(), forward(self, memory).detach()))
        return forward(self, memory)

    monkeypatch.setattr(BiasedMemoryNormalisation, "forward", watched)
    for precision in ("bf16", "bf16_parameters"):
        seen.clear()
        found = differentiate(new_memformer(layout, forgetting=0.1), precision)
        made = {"state": found.states, "gradient": found.state_gradients, "norm": seen}
        for name, tensors in made.items():
            tensors = [tensor for tensor in tensors if tensor.any()]  # not before the document, nor what m(0) is made from
            assert len(tensors) >= SEGMENTS - 1 and all(tensor.dtype == torch.float32 for tensor in tensors), f"{precision}, {name}"
            # Numbers in fp32 that came out of a bf16 operation would be bf16 numbers.
            assert max(map(of_bf16, tensors)) < 0.1, f"{precision}, {name}"


def test_what_is_left_is_where_the_memory_went():
    """A memory that hardly forgets can be moved far by a rounding: then the gradient is a neighbour's, in any arithmetic.

    In this one, the same happens in fp32 with the weights rounded to bf16, which every bf16 product begins with; and where
    the states are those of fp32, back-propagation in bf16 is as precise as ever.
    """
    cell = new_memformer("decoder", forgetting=0.1, seed=0)
    expected = differentiate(cell, "fp32")
    found = min(cosines(differentiate(cell, "bf16"), expected).values())
    rounded = copy.deepcopy(cell)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    inevitable = min(cosines(differentiate(rounded, "fp32"), expected).values())
    assert inevitable < 0.999 and 1 - found < 4 * (1 - inevitable)
    assert min(cosines(differentiate(cell, "fp32", rollout="bf16"), expected).values()) < 0.999
    assert min(cosines(differentiate(cell, "bf16", rollout="fp32"), expected).values()) >= 0.999


def test_dropout_masks_do_not_depend_on_the_precision():
    """On the CPU: without it, gradients of two precisions could only be compared without dropout."""
    masks, attended = [], []
    for dtype in (torch.float32, torch.bfloat16):
        reseed(torch.device("cpu"), 1)
        masks.append(F.dropout(torch.ones(3, 17, 64, dtype=dtype), 0.1) != 0)
        query, value = torch.zeros(2, 4, 17, 16, dtype=dtype), torch.eye(17, dtype=dtype).expand(2, 4, 17, 17)
        attended.append(F.scaled_dot_product_attention(query, query, value, dropout_p=0.1) != 0)
    for one, other in (masks, attended):
        assert torch.equal(one, other) and 0.05 < (~one).float().mean() < 0.15


# ---- bf16 parameters through DeepSpeed -----------------------------------------------------------------------------------


def new_engine(process, name, kind, learning_rate, stage, precision, reduce, clipping=0.0):
    """DeepSpeed remembers for the life of the process that an engine used autocast, and reduces the gradients of every later
    engine in the dtype of its parameters. A run has one engine; these tests have many."""
    import deepspeed.runtime.torch_autocast

    from memformer_dist.engine import Engine

    deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    cell = test_engine.Scale() if name == "scale" else test_engine.new_cell(name)
    return Engine(
        cell,
        make_optimizer(kind, cell, learning_rate),
        process,
        settings={"zero_optimization": {"stage": stage}},
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
    """ZeRO-3 passes what goes into and comes out of every module through a function, so that autograd adds up the gradients of
    the residual stream in another order; in bf16 that shows."""

    def same(tensors):
        return tree_map(lambda x: Same.apply(x) if torch.is_tensor(x) and x.requires_grad else x, tensors)

    for module in cell.modules():
        module.register_forward_pre_hook(lambda module, inputs: same(inputs))
        module.register_forward_hook(lambda module, inputs, outputs: same(outputs))


def reference_run(name, learning_rate, steps, clipping, *, as_zero3):
    """Plain torch, one process: bf16 parameters, fp32 originals, every backward's gradient added up in fp32 for each rank.
    AdamW. -> (norms, originals)"""
    cell = test_engine.new_cell(name)
    if as_zero3:
        hook_as_zero3_does(cell)
    originals = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in cell.named_parameters()}
    decayed = {f"{name}.weight" for name, module in cell.named_modules() if isinstance(module, nn.Linear)}
    config = OptimizerConfig()
    groups = [
        {"params": [p for name, p in originals.items() if name in decayed], "weight_decay": 0.1},
        {"params": [p for name, p in originals.items() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=config.betas, eps=config.epsilon, fused=True)
    cell.bfloat16()
    world, share = test_engine.WORLD, GLOBAL_LANES // test_engine.WORLD
    states, norms = [cell.empty_state(share) for _ in range(world)], []
    for window in test_engine.windows(steps):
        sums = [{name: torch.zeros_like(p) for name, p in originals.items()} for _ in range(world)]
        for rank in range(world):

            def backward(scalar):
                scalar.backward()
                for name, parameter in cell.named_parameters():
                    if parameter.grad is not None:
                        sums[rank][name] += parameter.grad.float() / world
                        parameter.grad = None

            part = Rows(window, slice(rank * share, (rank + 1) * share), start=0)
            scale = world / labels_in(window)
            states[rank] = memory_replay(
                lambda part, t, segment, tensors: cell(part, segment, tensors),
                backward,
                part,
                states[rank],
                loss_scale=scale,
            ).state
        for name, original in originals.items():
            original.grad = sums[0][name] + sums[1][name]
        norms.append(float(nn.utils.clip_grad_norm_(originals.values(), clipping or math.inf)))
        optimizer.step()
        with torch.no_grad():
            for name, parameter in cell.named_parameters():
                parameter.copy_(originals[name])
    return norms, originals


def bf16_parameters_rank(process, name):
    initial = {name: parameter.detach() for name, parameter in test_engine.new_cell(name).named_parameters()}
    for stage in (2, 3):
        engine = new_engine(process, name, "adamw", 3e-3, stage, "bf16_parameters", "segment", clipping=0.5)
        # DeepSpeed makes its fp32 weights from parameters that it has rounded.
        assert largest_difference(weights_of(engine), initial) == 0, f"ZeRO {stage}"
        assert all(parameter.dtype == torch.bfloat16 for parameter in engine.module.parameters())
        # After the engine was built: ZeRO-3 also replaces torch's linear, in the reference as well.
        norms, expected = reference_run(name, 3e-3, 3, 0.5, as_zero3=stage == 3)
        assert max(norms) > 0.5, "clipping never happened"
        assert largest_difference(initial, expected) > 5e-3
        _, found_norms, _ = engine_run(process, name, "adamw", 3e-3, 3, stage=stage, engine=engine)
        assert found_norms == pytest.approx(norms, rel=1e-6), f"ZeRO {stage}"
        assert largest_difference(weights_of(engine), expected) <= 1e-6, f"ZeRO {stage}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_bf16_parameters_equal_plain_torch(name):
    """AdamW with clipping, on two ranks: the fp32 originals after three steps, and the norm of every gradient."""
    run_ranks(test_engine.WORLD, bf16_parameters_rank, name)


def modes(*stages):
    """(ZeRO stage, precision, reduce) of all that can be combined."""
    for stage in stages:
        yield from ((stage, precision, "window") for precision in ("fp32", "bf16"))
        if stage >= 2:
            yield from ((stage, precision, "segment") for precision in ("fp32", "bf16", "bf16_parameters"))


def accumulated_gradient(process, engine) -> float:
    window = Rows(test_engine.ones_and_crumbs(), slice(0, 1), start=0)
    engine.accumulate([window], [engine.module.empty_state(1)], valid_tokens=process.world_size)
    result = engine.step(1.0)
    found = 1.0 - float(weights_of(engine)["weight.weight"])
    assert result.gradient_norm == pytest.approx(found, rel=1e-6)
    return found


def accumulation_rank(process):
    import deepspeed.runtime.torch_autocast

    for stage, precision, reduce in modes(0, 1, 2, 3):
        found = accumulated_gradient(process, new_engine(process, "scale", "sgd", 1.0, stage, precision, reduce))
        assert found == 1.126953125, f"ZeRO {stage}, {precision}, {reduce}: {found}"
    engine = new_engine(process, "scale", "sgd", 1.0, 2, "bf16_parameters", "segment")
    engine.engine.optimizer.communication_data_type = torch.bfloat16
    deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    crumbs_lost = accumulated_gradient(process, engine)
    assert crumbs_lost == 1.126953125, "one crumb is a bf16 number"


def test_every_precision_and_reduction_adds_up_in_fp32():
    run_ranks(test_engine.WORLD, accumulation_rank)
