"""What crosses the network in a window, counted inside torch.distributed on two ranks, and what ZeRO-3 keeps gathered."""

import pytest
import torch

from benchmarks.collectives import Collectives
from tests.helpers.engines import Rows, engine_run, largest_difference, make_engine, new_cell, reference_run, weights_of
from tests.helpers.ranks import run_ranks
from tests.helpers.toy import labels_in, random_window

LANES = 4


ADVANCE = ("embedding", "mix", "write", "initial")  # of the toy cell; its readout uses embedding and head


def new_engine(world, stage, name="toy", overlap_comm=False, bucket=10**6, **options):

    cell = new_cell(name)
    zero = {"stage": stage, "overlap_comm": overlap_comm, "reduce_bucket_size": bucket}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # or all parameters of so small a cell would be kept for good
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    return make_engine(cell, optimizer, world, settings={"zero_optimization": zero}, **options)


def collectives_of_a_window(world, engine, segments, groups, readout_group) -> Collectives:
    """Of the second step: the first shows the engine which part uses what."""
    share = LANES // world.size // groups
    first = world.rank * share * groups
    for step in range(2):
        window = random_window(segments, LANES, 6, seed=step)
        rows = [slice(first + group * share, first + (group + 1) * share) for group in range(groups)]
        with Collectives() as seen:
            engine.accumulate(
                [Rows(window, part, start=0) for part in rows],
                [engine.module.empty_state(share) for _ in range(groups)],
                valid_tokens=labels_in(window),
                readout_group=readout_group,
            )
        engine.step(0.1)
    return seen


def bytes_of(name: str, *prefixes: str, ranks: int = 1) -> int:
    """Of the fp32 parameters whose names begin so; each padded to equal parts for `ranks`, as at ZeRO-3."""
    sizes = [p.numel() for n, p in new_cell(name).named_parameters() if n.startswith(prefixes)]
    return 4 * sum(-(-size // ranks) * ranks for size in sizes)


# ---- the gradient --------------------------------------------------------------------------------------------------------


def one_reduction_rank(world):
    """One reduction a step and the bytes of plain data parallel, which a window of one segment in one group is."""
    for stage in (0, 1, 2, 3):
        total = bytes_of("toy", "", ranks=2 if stage == 3 else 1)
        engine = new_engine(world, stage)
        for segments, groups in ((2, 1), (8, 1), (8, 2), (32, 1)):
            seen = collectives_of_a_window(world, engine, segments, groups, readout_group=4)
            case = f"ZeRO {stage}, {segments} segments, {groups} groups: {seen.record}"
            kind = "reduce_scatter" if stage == 3 else "all_reduce"
            assert seen.calls(kind) == 1 and seen.bytes(kind, torch.float32) == total, case
            gathers = seen.calls("all_gather")
            assert seen.calls() == 1 + gathers and (stage == 3 or gathers == 0), case


@pytest.mark.slow
def test_one_reduction_a_step_whatever_the_window():
    run_ranks(2, one_reduction_rank)


def overlapped_rank(world):
    """With overlap_comm the readout's gradients set out before the last backward; the bytes stay the same."""
    for stage in (1, 2, 3):
        engine = new_engine(world, stage, overlap_comm=True)
        before_backward = []
        backward = engine.deepspeed.backward

        def watched(*arguments, **options):
            before_backward.append(engine.reduction.engine.inside_no_sync_ctxt)
            return backward(*arguments, **options)

        engine.deepspeed.backward = watched
        seen = collectives_of_a_window(world, engine, 8, 2, readout_group=4)
        kind = "reduce_scatter" if stage == 3 else "all_reduce"
        assert seen.bytes(kind) == bytes_of("toy", "", ranks=2 if stage == 3 else 1), f"ZeRO {stage}"
        # Two steps of two lane groups, each with two readouts and eight advances: all but the last add up locally.
        assert before_backward == 2 * ([True] * 19 + [False]), f"ZeRO {stage}"


@pytest.mark.slow
def test_the_overlapped_reduction_has_the_same_bytes():
    run_ranks(2, overlapped_rank)


def sharded_rank(world):
    """reduce="segment": each of the window's backwards reduces what it has touched, and nothing twice."""
    embedding, head = (bytes_of("toy", module, ranks=2) for module in ("embedding", "head"))
    write, advance = (bytes_of("toy", *modules, ranks=2) for modules in (["write"], ADVANCE))
    engine = new_engine(world, 3, reduce="segment")
    seen = collectives_of_a_window(world, engine, 8, 1, readout_group=4)
    assert seen.bytes("reduce_scatter") == 8 * advance - write + 2 * (embedding + head)
    assert seen.calls("reduce_scatter") == 8 + 2


def test_the_reduction_of_every_backward():
    run_ranks(2, sharded_rank)


def many_reductions_rank(world):
    import contextlib

    engine = new_engine(world, 2)
    engine.reduction.of_a_step = contextlib.nullcontext
    seen = collectives_of_a_window(world, engine, 8, 1, 1)
    assert seen.bytes("all_reduce") > 3 * bytes_of("toy", "")


@pytest.mark.slow
def test_the_count_sees_a_reduction_per_backward():
    """The control: DeepSpeed's way without the block."""
    run_ranks(2, many_reductions_rank)


# ---- the parameters, at ZeRO-3 -------------------------------------------------------------------------------------------


def gathers_rank(world):
    embedding, head, write = (bytes_of("toy", module, ranks=2) for module in ("embedding", "head", "write"))
    advance = bytes_of("toy", *ADVANCE, ranks=2)
    for keep in ("none", "readout", "all"):
        engine = new_engine(world, 3, keep_gathered=keep)
        longest = [(32, 1, 8)] if keep == "all" else []
        for segments, groups, readout_group in [(2, 1, 1), (8, 1, 4), (8, 2, 2), *longest]:
            seen = collectives_of_a_window(world, engine, segments, groups, readout_group)
            readouts = groups * segments // readout_group
            if keep == "all":  # the embedding with the advance's
                expected, calls = advance + readouts * head, 1 + readouts
            else:
                # Rollout, forward, backward; the writer of the window's last segment has none.
                of_advances = groups * ((3 * segments - 1) * advance - write)
                expected = of_advances + readouts * (embedding + head) * (1 if keep == "readout" else 2)
                calls = groups * ((3 * segments - 1) * 4 - 1) + readouts * (1 if keep == "readout" else 4)
            found = seen.bytes("all_gather"), seen.calls("all_gather")
            assert found == (expected, calls), f"{keep}, N {segments}, C {readout_group}, {groups} groups: {found}"
            assert seen.calls("broadcast") == 0, "DeepSpeed compares its records of steps again"
            assert all(p.ds_status.name == "NOT_AVAILABLE" for p in engine.module.parameters()), "kept after the window"


@pytest.mark.slow
def test_gathers_at_zero_3():
    """N / C of the readout's parameters and one of the advance's where everything is kept; more where less is."""
    run_ranks(2, gathers_rank)


AROUND = ("embedding.", "normalise.", "memory_norm.", "encoder.", "writer.")


def memformer_gathers_rank(world):
    engine = new_engine(world, 3, "encoder_decoder", readout_parts=2)
    seen = collectives_of_a_window(world, engine, 6, 1, 3)
    decoder, rest = (bytes_of("encoder_decoder", *names, ranks=2) for names in (["decoder."], AROUND))
    assert seen.bytes("all_gather") == rest + 2 * decoder
    assert seen.calls("all_gather") == 1 + 2


@pytest.mark.slow
def test_memformers_decoder_is_gathered_once_a_group():
    run_ranks(2, memformer_gathers_rank)


def kept_sgd_rank(world):
    _, _, expected = reference_run("encoder_decoder", "sgd", 0.2, steps=3)

    for keep, threshold in (("none", 0), ("readout", 50), ("all", 0)):  # 50: small parameters stay for good
        cell = new_cell("encoder_decoder")
        settings = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold}}
        optimizer = torch.optim.SGD(cell.parameters(), lr=0.2)
        store = "host" if keep == "readout" else "device"
        engine = make_engine(cell, optimizer, world, settings=settings, keep_gathered=keep, state_store=store)
        how = dict(stage=3, groups=2, readout_group=2, engine=engine, between=use)
        engine_run(world, "encoder_decoder", "sgd", 0.2, 3, **how)
        difference = largest_difference(weights_of(engine), expected)
        assert difference <= 1e-6, f"{keep}, threshold {threshold}: {difference}"


def use(engine):
    """What happens between windows: the cell is evaluated."""
    engine.module.eval()
    with torch.no_grad():
        segment = random_window(1, 2, 6, seed=1)[0]
        features, _ = engine("advance", segment, engine.module.empty_state(2))
        engine("readout", segment, features)
    engine.module.train()


@pytest.mark.slow
def test_kept_parameters_are_never_stale():
    """Three SGD steps at ZeRO-3 equal full BPTT whatever is kept and wherever states lie, with evaluations in between."""
    run_ranks(2, kept_sgd_rank)
