"""What memory replay sends between ranks through DeepSpeed: bytes of the gradient's reduction, gathers of ZeRO-3.

    torchrun --nproc-per-node 2 -m benchmarks.mrbp_traffic [--quick]      two gloo ranks; rank 0 prints a line of JSON

Plain data parallel is what one backward of full BPTT over two segments sends, through DeepSpeed alone: there is nothing
of ours in it but the model. Against it stands a step of the engine, 8 segments and 2 lane groups a rank. How often a
parameter is gathered is counted where DeepSpeed asks for it, and agrees with the bytes that the collectives moved.
"""

import json
import sys
from collections import Counter
from typing import Any

import torch

from benchmarks.collectives import Collectives
from benchmarks.mrbp_worker import BOS, Layout, RandomWindow
from memformer_dist.cells.memformer import Memformer, MemformerConfig
from memformer_dist.errors import run_program
from memformer_dist.mrbp.settings import MrbpConfig
from memformer_dist.world import World
from memformer_dist.zero.engine import Engine

SEGMENTS, LANE_GROUPS, READOUT_GROUP = 8, 2, 4
LAYOUT = Layout(
    "traffic",
    dict(width=32, heads=2, feed_forward=64, encoder_layers=1, decoder_layers=2, slots=4),
    vocabulary=64,
    lanes=2,
    length=16,
    segments=SEGMENTS,
    group=READOUT_GROUP,
)


def new_engine(world: World, stage: int, **settings: Any) -> Engine:
    torch.manual_seed(0)
    cell = Memformer(
        MemformerConfig(**LAYOUT.model), vocab_size=LAYOUT.vocabulary, bos_id=BOS, segment_length=LAYOUT.length
    )
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # ZeRO-3: every parameter is partitioned
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    mrbp = MrbpConfig(window=SEGMENTS, **settings)
    return Engine(cell, optimizer, world, mrbp, settings={"zero_optimization": zero})


def reduced(seen: Collectives) -> int:
    return sum(seen.bytes(kind) for kind in ("all_reduce", "reduce_scatter", "reduce"))


def plain_data_parallel(world: World, stage: int) -> int:
    """Bytes reduced for one optimiser step with one backward."""
    engine = new_engine(world, stage)
    window, state, loss = RandomWindow(LAYOUT, 2, world.device), engine.module.empty_state(LAYOUT.lanes), 0.0
    with Collectives() as seen:
        for t in range(len(window)):
            features, state = engine.deepspeed("advance", window[t], state)
            loss = loss + engine.deepspeed("readout", window[t], features).sum()
        engine.deepspeed.backward(loss)
    return reduced(seen)


def replayed(world: World, stage: int, **settings: Any) -> tuple[Collectives, dict[str, int]]:
    """What a window sends, and how often each parameter was gathered for it."""
    engine = new_engine(world, stage, **settings)
    gathers = count_gathers(engine) if stage == 3 else Counter()
    lanes = LAYOUT.lanes
    windows = [RandomWindow(LAYOUT, SEGMENTS, world.device)] * LANE_GROUPS
    states = [engine.module.empty_state(lanes)] * LANE_GROUPS
    tokens = SEGMENTS * LANE_GROUPS * lanes * LAYOUT.length * world.size
    for _ in range(2):  # the second window: whatever is set up once is set up by then
        gathers.clear()
        with Collectives() as seen:
            engine.accumulate(windows, states, valid_tokens=tokens, readout_group=READOUT_GROUP)
        engine.step(0.1)
    parameters = dict(engine.module.named_parameters())
    moved = sum(gathers[name] * 4 * padded(p, world.size) for name, p in parameters.items() if gathers[name])
    assert moved == seen.bytes("all_gather"), f"counted gathers of {moved} bytes, {seen.bytes('all_gather')} were moved"
    return seen, dict(gathers)


def count_gathers(engine: Engine) -> Counter:
    """A counter by parameter name, kept up to date."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    gathers: Counter = Counter()
    for parameter in engine.module.parameters():

        def counted(params: list, *arguments, gather=parameter.all_gather_coalesced, **keywords):
            gathers.update(names[id(p)] for p in params)
            return gather(params, *arguments, **keywords)

        parameter.all_gather_coalesced = counted
    return gathers


def padded(parameter: torch.nn.Parameter, world_size: int) -> int:
    return -(-parameter.ds_numel // world_size) * world_size


def most(gathers: dict[str, int], prefix: str) -> int:
    """Of the parameters of one module; those that both parts use (the embedding is the head as well) are in neither."""
    return max(count for name, count in gathers.items() if name.startswith(prefix))


def traffic(world: World, quick: bool = False) -> list[dict[str, Any]]:
    """One row for each ZeRO stage, at stage 3 for each `mrbp.keep_gathered`; quick: stages 2 and 3 with its default."""
    rows: list[dict[str, Any]] = []
    for stage in (2, 3) if quick else (1, 2, 3):
        plain = plain_data_parallel(world, stage)
        for keep in ("all",) if quick or stage < 3 else ("all", "readout", "none"):
            seen, gathers = replayed(world, stage, keep_gathered=keep)
            row = {
                "zero_stage": stage,
                "segments": SEGMENTS,
                "lane_groups": LANE_GROUPS,
                "readout_group": READOUT_GROUP,
                "gradient_bytes": reduced(seen),
                "plain_data_parallel_bytes": plain,
                "gradient_bytes_ratio": reduced(seen) / plain,
                "calls": {kind: seen.calls(kind) for kind in sorted({collective.kind for collective in seen.record})},
            }
            if stage == 3:
                row |= {
                    "keep_gathered": keep,
                    "readout_gathers_a_window": most(gathers, "decoder.") / LANE_GROUPS,
                    "advance_gathers_a_window": most(gathers, "encoder.layers.") / LANE_GROUPS,
                    "gathered_bytes": seen.bytes("all_gather"),
                }
            rows.append(row)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    world = World.start()
    rows = traffic(world, quick="--quick" in sys.argv)
    if world.is_main:
        print("\n" + json.dumps(rows), flush=True)


if __name__ == "__main__":
    run_program(main)
