"""Every cell against the contract of cells/base.py. A new cell takes one line in CELLS."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memformer_dist.cells.armt import ArmtConfig
from memformer_dist.cells.base import RecurrentCell
from memformer_dist.cells.check import hide_parameters
from memformer_dist.cells.gated_delta import GatedDeltaConfig
from memformer_dist.cells.hadamard import HadamardConfig
from memformer_dist.cells.hmt import HmtConfig
from memformer_dist.cells.lamemo import LaMemoConfig
from memformer_dist.cells.memformer import MemformerConfig
from memformer_dist.cells.mom import MoMConfig
from memformer_dist.cells.plain import PlainConfig
from memformer_dist.cells.rmt import RmtConfig
from memformer_dist.cells.titans import TitansConfig
from memformer_dist.cells.transformer_xl import TransformerXLConfig
from memformer_dist.mrbp.executor import TorchExecutor
from memformer_dist.mrbp.replay import Replayed, in_order, memory_replay
from memformer_dist.segment import IGNORE, Segment, Tensors, differentiable, select_rows
from tests.helpers.recomputation import LargestLogits, kept_bytes, recompute
from tests.helpers.toy import (
    SIZE,
    VOCABULARY,
    OscillatorCell,
    PenalisedCell,
    ToyCell,
    full_bptt,
    gradients,
    labels_in,
    random_window,
    relative_error,
)

LANES, BOS, DROPOUT = 3, 1, 0.3
TOLERANCE = 1e-10
# So large that every path of the gradient counts.
SMALL = {"width": 8, "heads": 2, "feed_forward": 12, "init_std": 0.3}
MEMFORMER = SMALL | {"slots": 3, "decoder_layers": 2, "bmn_init_norm": 0.3}


def configured(config) -> Callable[[float], RecurrentCell]:
    """A cell of the configuration with another dropout."""

    def build(dropout: float) -> RecurrentCell:
        changed = config.model_copy(update={"dropout": dropout})
        return changed.build(vocab_size=VOCABULARY, bos_id=BOS, segment_length=SIZE)

    return build


CELLS: dict[str, Callable[[float], RecurrentCell]] = {
    "toy": lambda dropout: ToyCell(dropout=dropout),
    "auxiliary loss": lambda dropout: PenalisedCell(dropout=dropout),
    "complex state": lambda dropout: OscillatorCell(dropout=dropout),
    "memformer": configured(MemformerConfig(**MEMFORMER, encoder_layers=1)),
    "memformer, decoder layout": configured(MemformerConfig(**MEMFORMER, layout="decoder", encoder_layers=0)),
    "memformer, noisy memory": configured(MemformerConfig(**MEMFORMER, encoder_layers=1, memory_noise=0.5)),
    "plain": configured(PlainConfig(**SMALL, layers=2)),
    "rmt": configured(RmtConfig(**SMALL, layers=2, slots=2)),
    "rmt, noisy memory": configured(RmtConfig(**SMALL, layers=2, slots=2, memory_noise=0.5)),
    "hmt": configured(HmtConfig(**SMALL, layers=2, slots=2, sensory_tokens=4)),
    "hmt, noisy memory": configured(HmtConfig(**SMALL, layers=2, slots=2, sensory_tokens=4, memory_noise=0.5)),
    "armt": configured(ArmtConfig(**SMALL, layers=2, write_tokens=2, memory_width=3)),
    "transformer_xl": configured(TransformerXLConfig(**SMALL, layers=2, memory_length=4)),
    "lamemo": configured(LaMemoConfig(**SMALL, layers=3, memory_length=8)),
    "gated_delta": configured(GatedDeltaConfig(**SMALL, layers=2, chunk=4)),
    "mom": configured(MoMConfig(**SMALL, layers=2, memories=3, balance=0.3, chunk=4)),
    "hadamard": configured(HadamardConfig(**SMALL, layers=2, calibrations=5)),
    "titans": configured(TitansConfig(**SMALL, layers=2, persistent=2, chunk=4)),
    "titans, lmm of depth 2": configured(
        TitansConfig(**SMALL, layout="lmm", layers=2, memory_depth=2, expansion=2, chunk=4)
    ),
}
every_cell = pytest.mark.parametrize("name", CELLS)


def new_cell(name: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> RecurrentCell:
    """In training mode with dropout, else in evaluation mode; norms and biases are drawn as well."""
    torch.manual_seed(5)
    cell = CELLS[name](dropout)
    cell = cell.double() if dtype == torch.float64 else cell
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return cell.train(dropout > 0)


@torch.no_grad()
def mid_document(cell: RecurrentCell, seed: int = 0, lanes: int = LANES) -> Tensors:
    """A state behind two whole segments, read without dropout."""
    training, state = cell.training, cell.empty_state(lanes)
    cell.eval()
    for t in range(2):
        _, state = cell("advance", whole_segment(lanes, seed=10 * seed + t, reset=t == 0), state)
    cell.train(training)
    return state


def whole_segment(lanes: int = LANES, *, seed: int = 0, reset: bool = False, reset_memory: bool = False) -> Segment:
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(4, VOCABULARY, (2, lanes, SIZE), generator=generator)
    flags = [torch.full((lanes,), flag) for flag in (reset, reset_memory)]
    numbers = torch.zeros(lanes, dtype=torch.int64)
    return Segment(tokens, labels, torch.full((lanes,), SIZE), *flags, numbers, numbers)


@torch.no_grad()
def run(cell: RecurrentCell, window: list[Segment], state: Tensors) -> tuple[Tensor, Tensors]:
    """-> nll [N, B, S], the state behind the window."""
    nlls = []
    for segment in window:
        features, state = cell("advance", segment, state)
        nlls.append(cell("readout", segment, features))
    return torch.stack(nlls), state


def equal(one: Tensors, other: Tensors) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# ---- the gradient --------------------------------------------------------------------------------------------------------


def replayed(cell: RecurrentCell, window: list[Segment], method=memory_replay, **options) -> tuple[dict, Replayed]:
    cell.zero_grad()
    options |= {"loss_scale": 1 / labels_in(window)}
    if method is memory_replay:
        result = memory_replay(cell, window, mid_document(cell), executor=TorchExecutor(cell, 3), **options)
    else:
        result = in_order(TorchExecutor(cell, 3), window, mid_document(cell), **options)
    return gradients(cell), result


def reference(cell: RecurrentCell, window: list[Segment], seed: int = 3, **options) -> tuple[dict, Tensors]:
    cell.zero_grad()
    options |= {"loss_scale": 1 / labels_in(window)}
    state, _ = full_bptt(TorchExecutor(cell, seed), window, mid_document(cell), **options)
    return gradients(cell), state


@every_cell
@pytest.mark.parametrize("group, parts", [(1, 1), (2, 1), (6, 1), (1, 3), (2, 4)])
def test_gradient_equals_full_bptt(name, group, parts):
    """With dropout, resets, padding and a start in mid-document; `group` and `parts` of the readout."""
    cell = new_cell(name, dropout=DROPOUT)
    window = random_window(6, LANES, SIZE, seed=1)
    assert sum(bool(segment.reset.any()) for segment in window[1:]) >= 2
    batching = {"readout_group": group, "readout_parts": parts}
    found, result = replayed(cell, window, **batching)
    expected, state = reference(cell, window, **batching)
    assert relative_error(found, expected) <= TOLERANCE
    assert equal(result.state, state) and result.drift == 0
    other_masks, _ = reference(cell, window, seed=4, **batching)
    assert relative_error(found, other_masks) > 1e3 * TOLERANCE


@every_cell
@pytest.mark.parametrize("group", [1, 2])
def test_in_order_no_gradient_reaches_the_segment_before(name, group):
    """K = 0: the gradient of full BPTT with states cut between segments; another one, if the cell's state carries any."""
    cell = new_cell(name, dropout=DROPOUT)
    window = random_window(6, LANES, SIZE, seed=2)
    found, result = replayed(cell, window, in_order, readout_group=group)
    expected, state = reference(cell, window, readout_group=group, detach_memory=True)
    assert relative_error(found, expected) <= TOLERANCE
    assert equal(result.state, state)
    assert (result.state_gradient_squares == 0).all()
    whole, _ = reference(cell, window, readout_group=group)
    assert (relative_error(found, whole) > 1e3 * TOLERANCE) == cell.carries_gradient


@every_cell
def test_segments_without_labels_have_no_gradient(name):
    """A loss beside that of the labels is the cell's own affair."""
    cell = new_cell(name, dropout=DROPOUT)
    silent = [x._replace(labels=torch.full_like(x.labels, IGNORE)) for x in random_window(3, LANES, SIZE, seed=3)]
    memory_replay(cell, silent, mid_document(cell), loss_scale=1.0)
    zero = all((gradient == 0).all() for gradient in gradients(cell).values())
    assert zero == (name not in ("auxiliary loss", "mom"))


def test_an_auxiliary_loss_has_its_gradient_and_leaves_the_losses_alone():
    """Against the same loss added by hand to one graph of the window."""
    cell = new_cell("auxiliary loss")
    window, scale = random_window(4, LANES, SIZE, seed=1), 0.01
    seen = {}
    cell.zero_grad()
    memory_replay(
        cell,
        window,
        mid_document(cell),
        loss_scale=scale,
        executor=TorchExecutor(cell, 0),
        observe=lambda t, segment, nll: seen.update({t: nll}),
    )
    found = gradients(cell)
    cell.zero_grad()
    state, loss = mid_document(cell), 0.0
    for t, segment in enumerate(window):
        features, state = cell("advance", segment, state)
        nll = ToyCell.readout(cell, segment, features)
        assert torch.equal(seen[t], nll.detach())
        loss = loss + scale * (nll.sum() + features.penalty.sum())
    loss.backward()
    assert relative_error(found, gradients(cell)) <= TOLERANCE


def test_a_state_written_in_place_is_refused():
    """What the rollout stores would be another state than the one that the replay needs."""

    class Careless(ToyCell):
        def advance(self, segment, state):
            state.seen.add_(1)
            return super().advance(segment, state)

    cell = Careless()
    with pytest.raises(ValueError, match=r"in place to its input state \(seen\)"):
        memory_replay(cell, random_window(3, LANES, SIZE, seed=0), cell.empty_state(LANES), loss_scale=1.0)


@pytest.mark.parametrize("name", [name for name, build in CELLS.items() if hasattr(build(0.0), "config")])
def test_layers_computed_again_and_losses_in_chunks(name):
    """model.checkpoint_layers and loss_chunk: the same gradient, less kept for it, and never all of the logits."""
    window, chunk = random_window(4, LANES, SIZE, seed=2), 10
    expected, _ = replayed(new_cell(name, dropout=DROPOUT), window, readout_group=2)
    cell = recompute(new_cell(name, dropout=DROPOUT), checkpoint_layers=True, loss_chunk=chunk)
    with LargestLogits(VOCABULARY) as logits:
        found, result = replayed(cell, window, readout_group=2)
    assert relative_error(found, expected) <= TOLERANCE and result.drift == 0
    assert logits.rows == chunk < LANES * SIZE

    def run() -> None:
        features, _ = cell("advance", window[0], mid_document(cell))
        cell("readout", window[0], features)

    recomputed = kept_bytes(cell, run)
    recompute(cell, checkpoint_layers=False, loss_chunk=None)
    assert recomputed < 0.6 * kept_bytes(cell, run)
    with LargestLogits(VOCABULARY) as logits:
        run()
    assert logits.rows == LANES * SIZE


# ---- what a cell may see -------------------------------------------------------------------------------------------------


@every_cell
def test_no_token_sees_a_later_one(name):
    """Tokens from a position on are others: logits before it stay, and some from it on change."""
    cell = new_cell(name)
    segment, state = whole_segment(seed=1), mid_document(cell)

    def logits(segment: Segment) -> Tensor:
        with torch.no_grad():
            features, _ = cell("advance", segment, state)
            return cell.logits(segment, features)

    expected = logits(segment)
    for position in range(SIZE):
        tokens = segment.tokens.clone()
        tokens[:, position:] = 4 + (tokens[:, position:] - 3) % (VOCABULARY - 4)
        found = logits(segment._replace(tokens=tokens))
        torch.testing.assert_close(found[:, :position], expected[:, :position], rtol=1e-12, atol=1e-12)
        assert (found[:, position] - expected[:, position]).abs().max() > 1e-4


@every_cell
def test_lanes_do_not_see_one_another(name):
    """Text and state of the first lane are others: nothing changes on the second and third."""
    cell = new_cell(name)
    window, state = random_window(4, LANES, SIZE, seed=5), mid_document(cell)
    others = [
        segment._replace(tokens=torch.cat([segment.tokens[:1].flip(1), segment.tokens[1:]])) for segment in window
    ]
    strange = mid_document(cell, seed=1)
    changed = state._make(torch.cat([x[:1], y[1:]]) for x, y in zip(strange, state, strict=True))
    (before, behind), (after, behind_others) = run(cell, window, state), run(cell, others, changed)
    assert torch.equal(before[:, 1:], after[:, 1:]) and not torch.equal(before[:, 0], after[:, 0])
    rest = slice(1, None)
    assert equal(select_rows(behind, rest), select_rows(behind_others, rest))


@every_cell
def test_padding_changes_nothing(name):
    """Other tokens where a segment is padding, and on a lane that has run dry: the same losses in this and later segments."""
    cell = new_cell(name)
    lengths = [[6, 3, 0], [6, 6, 0], [2, 6, 0]]
    window, rubbish = [], []
    for t, length in enumerate(lengths):
        padding = torch.arange(SIZE) >= torch.tensor(length)[:, None]
        segment = whole_segment(seed=t)._replace(length=torch.tensor(length))
        labels = segment.labels.masked_fill(padding, IGNORE)
        window.append(segment._replace(tokens=segment.tokens.masked_fill(padding, 0), labels=labels))
        rubbish.append(segment._replace(labels=labels))
    (found, state), (expected, _) = run(cell, rubbish, mid_document(cell)), run(cell, window, mid_document(cell))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.isfinite(expected).all() and expected[:, :2].any()
    assert all(torch.isfinite(x).all() for x in state if differentiable(x))
    shorter = [segment._replace(length=(segment.length - 1).clamp(min=1)) for segment in window]
    assert not torch.equal(run(cell, shorter, mid_document(cell))[0], expected) or not cell.memory_leaves


@every_cell
def test_a_reset_leaves_nothing_of_the_state(name):
    cell = new_cell(name)
    window = [whole_segment(seed=1, reset=True), whole_segment(seed=2)]
    one, other = (run(cell, window, mid_document(cell, seed)) for seed in (1, 2))
    assert torch.equal(one[0], other[0]) and equal(one[1], other[1])
    going_on = [segment._replace(reset=torch.zeros_like(segment.reset)) for segment in window]
    one, other = (run(cell, going_on, mid_document(cell, seed))[0] for seed in (1, 2))
    assert torch.equal(one, other) != bool(cell.memory_leaves)


@every_cell
def test_memory_leaves_are_what_reset_memory_resets(name):
    """With the flag it does not matter what they held, and the rest of the state does; without it they matter."""
    cell = new_cell(name)
    state, strange = mid_document(cell), mid_document(cell, seed=1)
    assert set(cell.memory_leaves) <= set(state._fields)
    exchanged = state._replace(**{leaf: getattr(strange, leaf) for leaf in cell.memory_leaves})
    flagged = [whole_segment(seed=1, reset_memory=True), whole_segment(seed=2)]
    one, other = run(cell, flagged, state), run(cell, flagged, exchanged)
    assert torch.equal(one[0], other[0]) and equal(one[1], other[1])
    plain = [segment._replace(reset_memory=torch.zeros_like(segment.reset)) for segment in flagged]
    assert torch.equal(run(cell, plain, state)[0], run(cell, plain, exchanged)[0]) == (not cell.memory_leaves)
    if not cell.memory_leaves:
        assert torch.equal(run(cell, plain, state)[0], one[0])


# ---- states and precision ------------------------------------------------------------------------------------------------


@every_cell
def test_empty_states_have_the_shape_of_states(name):
    cell = new_cell(name, dtype=torch.float32)
    state, empty = mid_document(cell), cell.empty_state(LANES)
    described = [[(x.shape, x.dtype, x.device) for x in tensors] for tensors in (state, empty)]
    assert described[0] == described[1] and type(state) is type(empty)
    assert all(len(x) == LANES for x in empty) and not any(x.requires_grad for x in empty)


@every_cell
def test_states_and_losses_are_float32_under_autocast(name):
    """And the replay repeats the rollout's dropout masks there. The gradient is off by what rounding the weights to bf16
    costs in float32 alone, within a factor; other dropout masks, the control, are further off."""
    cell = new_cell(name, dropout=DROPOUT, dtype=torch.float32)
    window = random_window(5, LANES, SIZE, seed=7)
    expected, _ = replayed(cell, window)
    dtypes = set()
    with torch.autocast("cpu", torch.bfloat16):
        found, result = replayed(cell, window, observe=lambda t, segment, nll: dtypes.add(nll.dtype))
    assert result.drift == 0
    dtypes |= {x.real.dtype for x in result.state if differentiable(x)}
    assert dtypes == {torch.float32}
    other_masks, _ = reference(cell, window, seed=4)
    for parameter in cell.parameters():
        parameter.data = parameter.data.bfloat16().float()
    rounded, _ = replayed(cell, window)
    assert angle(found, expected) < 5 * angle(rounded, expected) < angle(other_masks, expected)


def angle(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Between two gradients, in radians."""
    one, other = (torch.cat([x.flatten().double() for x in tensors.values()]) for tensors in (found, expected))
    return float(torch.arccos(F.cosine_similarity(one, other, dim=0).clamp(max=1)))


@every_cell
def test_evaluation_mode_is_deterministic(name):
    cell = new_cell(name, dropout=DROPOUT).eval()
    window = random_window(3, LANES, SIZE, seed=1)
    torch.manual_seed(1)
    one = run(cell, window, mid_document(cell))
    torch.manual_seed(2)
    other = run(cell, window, mid_document(cell))
    assert torch.equal(one[0], other[0]) and equal(one[1], other[1])


@every_cell
def test_diagnostics_are_finite_scalars(name):
    cell = new_cell(name)
    found = cell("diagnose", whole_segment(), mid_document(cell))
    assert all(value.shape == () and torch.isfinite(value) for value in found.values())
    assert not name.startswith("memformer") or found


# ---- generation ----------------------------------------------------------------------------------------------------------


@every_cell
@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(1, SIZE - 1), unique=True), length=st.integers(1, SIZE), reset=st.booleans())
def test_extend_in_any_pieces_equals_advance_and_readout(name, cuts, length, reset):
    """A whole segment, then a short one: the logits behind the losses, and the state that the next segment reads."""
    cell = new_cell(name)
    state, generated = mid_document(cell), mid_document(cell)
    for t, size in enumerate((SIZE, length, SIZE)):
        segment = whole_segment(seed=t, reset=reset and t == 0)
        padding = torch.arange(SIZE) >= size
        segment = segment._replace(
            tokens=segment.tokens.masked_fill(padding, 0),
            labels=segment.labels.masked_fill(padding, IGNORE),
            length=torch.full((LANES,), size),
        )
        with torch.no_grad():
            features, state = cell("advance", segment, state)
            expected = cell("readout", segment, features)
        cache, pieces = cell.open(generated, segment.reset), []
        bounds = sorted({0, size, *(cut for cut in cuts if cut < size)})
        for start, stop in itertools.pairwise(bounds):
            logits, cache = cell.extend(segment.tokens[:, start:stop], cache)
            pieces.append(logits)
        generated = cell.close(cache)
        found = F.cross_entropy(
            torch.cat(pieces, 1).flatten(0, 1), segment.labels[:, :size].flatten(), reduction="none"
        )
        torch.testing.assert_close(found.view(LANES, size), expected[:, :size], rtol=1e-10, atol=1e-10)
        for x, y in zip(generated, state, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@every_cell
@torch.no_grad()
def test_generation_under_autocast(name):
    """States stay float32 and predictions what they are, within bf16's precision, which they have no more than."""
    cell = new_cell(name, dtype=torch.float32)
    segment, state = whole_segment(), mid_document(cell)

    def generated() -> tuple[Tensor, Tensors]:
        cache, pieces = cell.open(state, segment.reset), []
        for tokens in segment.tokens.split((2, SIZE - 2), dim=1):
            logits, cache = cell.extend(tokens, cache)
            pieces.append(logits.float().log_softmax(-1))
        return torch.cat(pieces, dim=1), cell.close(cache)

    expected, _ = generated()
    with torch.autocast("cpu", torch.bfloat16):
        found, after = generated()
    assert {x.real.dtype for x in after if differentiable(x)} <= {torch.float32}
    assert 1e-5 < (found - expected).abs().mean() < 0.1


# ---- ZeRO-3 and speed ----------------------------------------------------------------------------------------------------


@every_cell
def test_parameters_are_read_in_the_forward_of_their_owner_alone(name):
    cell = new_cell(name)
    window, state = random_window(3, LANES, SIZE, seed=1), mid_document(cell)
    expected, _ = run(cell, window, state)
    hide_parameters(cell)
    assert equal(cell.empty_state(LANES, device=torch.device("cpu")), CELLS[name](0.0).double().empty_state(LANES))
    assert torch.equal(run(cell, window, state)[0], expected)
    cell("diagnose", window[0], state)
    with pytest.raises(RuntimeError):  # the control: a parameter read from outside
        F.linear(torch.zeros(1, cell.embedding.weight.shape[-1] or 8, dtype=torch.float64), cell.embedding.weight)


@every_cell
def test_nothing_waits_for_the_device(name):
    """On the device `meta` there are no values to wait for: `.item()` and the like raise."""
    cell = new_cell(name).to("meta")
    segment = whole_segment().to(torch.device("meta"))
    features, state = cell("advance", segment, cell.empty_state(LANES))
    assert cell("readout", segment, features).shape == (LANES, SIZE)
    assert all(x.device.type == "meta" for x in state)
    with pytest.raises((RuntimeError, NotImplementedError)):
        state[0].sum().item()
