"""The gradient of memory replay against full back-propagation through time, in float64."""

import weakref

import pytest
import torch

from memformer_dist.mrbp.executor import TorchExecutor
from memformer_dist.mrbp.replay import memory_replay
from memformer_dist.mrbp.states import DeviceStates, HostStates, SparseStates, most_states
from tests.helpers.memformer import memformer
from tests.helpers.toy import (
    ToyCell,
    ToyState,
    full_bptt,
    gradients,
    labels_in,
    random_window,
    relative_error,
)

LANES, LENGTH, VOCABULARY = 3, 6, 11
TOLERANCE = 1e-10


def cell_named(name: str):
    torch.manual_seed(5)
    return (ToyCell(dropout=0.3) if name == "toy" else memformer(name)).double().train()


def starting_state(cell):
    """A state in mid-document, so that the first segment reads something."""
    torch.manual_seed(6)
    state = cell.empty_state(LANES)
    filled = {"memory": torch.nn.functional.normalize(torch.randn_like(state.memory), dim=-1)}
    if "context" in state._fields:
        filled |= {
            "context": torch.randint(4, VOCABULARY, state.context.shape),
            "context_length": torch.tensor([6, 4, 6]),
        }
    return state._replace(**filled)


def replayed(cell, window, *, readout_group, seed=0):
    cell.zero_grad()
    losses = [None] * len(window)

    def observe(t, segment, nll):
        losses[t] = nll.sum()

    result = memory_replay(
        cell,
        window,
        starting_state(cell),
        loss_scale=1 / labels_in(window),
        executor=TorchExecutor(cell, seed),
        readout_group=readout_group,
        observe=observe,
    )
    return gradients(cell), sum(losses) / labels_in(window), result


def reference(cell, window, *, readout_group, seed=0, detach_memory=False):
    cell.zero_grad()
    state, loss = full_bptt(
        TorchExecutor(cell, seed),
        window,
        starting_state(cell),
        loss_scale=1 / labels_in(window),
        readout_group=readout_group,
        detach_memory=detach_memory,
    )
    return gradients(cell), loss, state


@pytest.mark.parametrize("cell_name", ["toy", "encoder_decoder", "decoder"])
@pytest.mark.parametrize("readout_group", [1, 2, 100])
@pytest.mark.parametrize("segments", range(1, 9))
def test_gradient_equals_full_bptt(cell_name, readout_group, segments):
    cell = cell_named(cell_name)
    window = random_window(segments, LANES, LENGTH, seed=segments)
    assert segments == 1 or any(segment.reset.any() for segment in window[1:]) or segments < 3
    found, loss, result = replayed(cell, window, readout_group=readout_group)
    expected, reference_loss, state = reference(cell, window, readout_group=readout_group)
    assert relative_error(found, expected) <= TOLERANCE
    assert abs(loss - reference_loss) <= 1e-12 * abs(reference_loss)
    assert all(torch.equal(x, y) for x, y in zip(result.state, state, strict=True))
    assert result.drift == 0


@pytest.mark.parametrize("cell_name", ["toy", "encoder_decoder", "decoder"])
@pytest.mark.parametrize("readout_group, readout_parts", [(1, 2), (1, 3), (2, 4)])
def test_gradient_of_a_readout_in_parts_equals_full_bptt(cell_name, readout_group, readout_parts):
    """The lanes of a readout one after the other, in parts of unequal size: the same gradient, every row observed once."""
    cell = cell_named(cell_name)
    window = random_window(5, LANES, LENGTH, seed=8)
    settings = {"loss_scale": 1 / labels_in(window), "readout_group": readout_group, "readout_parts": readout_parts}
    rows = {}
    memory_replay(
        cell,
        window,
        starting_state(cell),
        executor=TorchExecutor(cell, 0),
        observe=lambda t, segment, nll: rows.update({t: nll}),
        **settings,
    )
    found = gradients(cell)
    cell.zero_grad()
    _, loss = full_bptt(TorchExecutor(cell, 0), window, starting_state(cell), **settings)
    assert relative_error(found, gradients(cell)) <= TOLERANCE
    assert [nll.shape for nll in rows.values()] == 5 * [(LANES, LENGTH)]
    torch.testing.assert_close(sum(nll.sum() for nll in rows.values()) / labels_in(window), loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("cell_name", ["toy", "encoder_decoder", "decoder"])
def test_negative_controls_fail_the_comparison(cell_name):
    """Memories detached between segments; dropout masks of another seed: either must be seen."""
    cell = cell_named(cell_name)
    window = random_window(6, LANES, LENGTH, seed=3)
    found, _, _ = replayed(cell, window, readout_group=2)
    detached, _, _ = reference(cell, window, readout_group=2, detach_memory=True)
    other_masks, _, _ = reference(cell, window, readout_group=2, seed=1)
    assert relative_error(found, detached) > 1e3 * TOLERANCE
    assert relative_error(found, other_masks) > 1e3 * TOLERANCE


def test_unseeded_replay_drifts():
    """When the replay does not draw the rollout's dropout masks, the drift says so."""
    cell = cell_named("encoder_decoder")
    window = random_window(4, LANES, LENGTH, seed=3)

    class Unseeded(TorchExecutor):
        def call(self, part, segment, tensors, *coordinates):
            return self.cell(part, segment, tensors)

    result = memory_replay(cell, window, starting_state(cell), loss_scale=1.0, executor=Unseeded(cell))
    assert result.drift > 1e-3


def test_masked_labels_do_not_count():
    """Labels that are IGNORE have no part in loss and gradient; a window without labels has a gradient of zero."""
    cell = cell_named("encoder_decoder")
    window = random_window(3, LANES, LENGTH, seed=4)
    silent = [segment._replace(labels=torch.full_like(segment.labels, -100)) for segment in window]
    cell.zero_grad()
    memory_replay(cell, silent, starting_state(cell), loss_scale=1.0)
    assert all((gradient == 0).all() for gradient in gradients(cell).values())


def test_segments_are_asked_for_in_order_and_one_at_a_time():
    cell = cell_named("toy")
    window = random_window(5, LANES, LENGTH, seed=4)
    asked = []

    class OnDemand:
        def __len__(self):
            return len(window)

        def __getitem__(self, t):
            asked.append(t)
            return window[t]

    memory_replay(cell, OnDemand(), starting_state(cell), loss_scale=1.0, readout_group=2)
    assert asked == [0, 1, 2, 3, 4, 3, 2, 1, 0]


# ---- gradients of the states ---------------------------------------------------------------------------------------------


def state_gradient_norms(cell, window, *, only_next=False):
    """Squared norms of dL/d(state entering segment t) by one graph; `only_next` counts the loss of segment t alone."""
    executor, state, scale = TorchExecutor(cell, 0), starting_state(cell), 1 / labels_in(window)
    states, losses = [], []
    for t, segment in enumerate(window):
        state = state._make(x.detach().requires_grad_(x.is_floating_point()) for x in state) if t == 0 else state
        states.append(state)
        features, state = executor.advance(t, segment, state)
        losses.append(executor.readout(t, 0, segment, features).sum() * scale)
    squares = []
    for t, state in enumerate(states):
        loss = losses[t] if only_next else sum(losses[t:])
        floating = [x for x in state if x.is_floating_point()]
        squares.append(sum(g.square().sum() for g in torch.autograd.grad(loss, floating, retain_graph=True)))
    return torch.stack(squares)


@pytest.mark.parametrize("cell_name", ["toy", "encoder_decoder", "decoder"])
def test_norms_of_state_gradients(cell_name):
    """At every boundary, against one graph of the whole window; what only the next segment hands back is something else."""
    cell = cell_named(cell_name)
    window = random_window(6, LANES, LENGTH, seed=9)
    _, _, result = replayed(cell, window, readout_group=1)
    expected = state_gradient_norms(cell, window)
    torch.testing.assert_close(result.state_gradient_squares, expected, rtol=1e-10, atol=0)
    assert result.state_gradient_squares.shape == (6,)
    wrong = state_gradient_norms(cell, window, only_next=True)
    assert ((wrong - expected).abs() > 1e-3 * expected).sum() >= 3  # not where every lane starts a document next


# ---- long windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell_name", ["toy", "encoder_decoder", "decoder"])
@pytest.mark.parametrize("readout_group", [1, 5])
def test_a_long_window_with_states_on_the_host_equals_full_bptt(cell_name, readout_group):
    """The window of a million tokens scaled down to 64 segments: exact to the end, and the stack is empty afterwards."""
    cell = cell_named(cell_name)
    window = random_window(64, 2, 3, seed=1)
    cell.segment_length = 3
    state = cell.empty_state(2)
    store = HostStates(torch.device("cpu"))
    cell.zero_grad()
    for _ in range(2):  # a store serves window after window
        cell.zero_grad()
        settings = {"executor": TorchExecutor(cell, 0), "readout_group": readout_group, "states": store}
        result = memory_replay(cell, window, state, loss_scale=1.0, **settings)
    found = gradients(cell)
    cell.zero_grad()
    final, _ = full_bptt(TorchExecutor(cell, 0), window, state, loss_scale=1.0, readout_group=readout_group)
    assert relative_error(found, gradients(cell)) <= TOLERANCE
    assert all(torch.equal(x, y) for x, y in zip(result.state, final, strict=True))
    with pytest.raises(IndexError):
        store.pop()


@pytest.mark.parametrize("cell_name", ["toy", "encoder_decoder", "decoder"])
@pytest.mark.parametrize(
    "stride, readout_group, store", [(2, 1, "device"), (3, 4, "host"), (4, 3, "device"), (99, 2, "host")]
)
def test_states_made_again_give_the_same_gradient(cell_name, stride, readout_group, store):
    """Full BPTT's, and bit by bit that of states stored one and all; dropout, resets, windows that no stride divides."""
    cell = cell_named(cell_name)
    window = random_window(11, LANES, LENGTH, seed=3)
    settings = {"loss_scale": 1 / labels_in(window), "executor": TorchExecutor(cell, 0), "readout_group": readout_group}
    found = []
    for state_stride in (stride, 1):
        cell.zero_grad()
        states = DeviceStates() if store == "device" else HostStates(torch.device("cpu"))
        result = memory_replay(cell, window, starting_state(cell), states=states, state_stride=state_stride, **settings)
        found.append((gradients(cell), result))
        with pytest.raises(IndexError):
            states.pop()
    (sparse, result), (dense, of_all) = found
    assert all(torch.equal(sparse[name], dense[name]) for name in dense)
    assert all(torch.equal(x, y) for x, y in zip(result.state, of_all.state, strict=True))
    assert torch.equal(result.state_gradient_squares, of_all.state_gradient_squares) and result.drift == 0
    expected, _, _ = reference(cell, window, readout_group=readout_group)
    assert relative_error(sparse, expected) <= TOLERANCE


@pytest.mark.parametrize("segments", [1, 2, 5, 12, 13, 64])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8, 100])
def test_how_many_states_are_held_and_made_again(segments, stride):
    """At most N / stride + stride - 1 at a time, for fewer than one call more per segment."""
    store, calls, most = DeviceStates(), [], 0

    def advance(t, state):
        calls.append(t)
        return state + 1

    states = SparseStates(store, stride, advance)

    def held() -> int:
        return len(store._stack) + len(states._block)

    for t in range(segments):
        states.push(t)
        most = max(most, held())
    for t in reversed(range(segments)):
        assert states.pop() == t
        most = max(most, held() + 1)  # the one that is being replayed
    assert held() == 0 and most == most_states(segments, stride)
    assert len(calls) == len(set(calls)) == (segments - 1) // stride * (stride - 1)
    if segments == 64 and stride == 8:
        assert most == 15 and len(calls) == 49


def most_states_alive(cell, segments: int, stride: int) -> int:
    """Counted in a replay, whenever `advance` is called."""
    alive, most = weakref.WeakValueDictionary(), 0

    class Counting(TorchExecutor):
        def call(self, part, segment, tensors, *coordinates):
            nonlocal most
            if part == "advance" and not torch.is_grad_enabled():
                alive[id(tensors.memory)] = tensors.memory
                most = max(most, len(alive))
            return super().call(part, segment, tensors, *coordinates)

    window = random_window(segments, LANES, LENGTH, seed=1)
    executor = Counting(cell, 0)
    memory_replay(cell, window, starting_state(cell), loss_scale=1.0, executor=executor, state_stride=stride)
    return most


def test_few_states_are_alive():
    cell = cell_named("toy")
    assert most_states_alive(cell, 36, 1) == 35  # the last is never advanced without gradient
    assert most_states_alive(cell, 36, 6) <= most_states(36, 6) == 11
    assert most_states_alive(cell, 36, 4) <= most_states(36, 4) == 12


@pytest.mark.parametrize("wrong", [range(8), range(8, 12)])
def test_drift_is_measured_where_states_are_made_again(wrong):
    """A call that differs: in the rollout, or when a state is made again. Either time the gradient is another one's."""
    cell = cell_named("toy")
    calls = []

    class Unsteady(TorchExecutor):
        def rollout(self, t, segment, state):
            state = super().rollout(t, segment, state)
            calls.append(t)
            return state._replace(memory=state.memory + 0.01 * (len(calls) - 1 in wrong))

    window = random_window(9, LANES, LENGTH, seed=3)
    settings = {"loss_scale": 1.0, "state_stride": 3}
    result = memory_replay(cell, window, starting_state(cell), executor=Unsteady(cell, 0), **settings)
    assert calls == [*range(8), 3, 4, 0, 1] and result.drift > 1e-3
    assert memory_replay(cell, window, starting_state(cell), executor=TorchExecutor(cell, 0), **settings).drift == 0


class Alive:
    """Counts the bytes that graphs keep: use as the hooks of torch.autograd.graph.saved_tensors_hooks."""

    def __init__(self):
        self.bytes = self.most = 0

    def pack(self, tensor):
        return Kept(tensor, self)


class Kept:
    """A tensor that a graph keeps, for as long as it does."""

    def __init__(self, tensor, alive):
        self.tensor, self.alive = tensor.detach(), alive  # an output kept by its own graph would be a cycle
        alive.bytes += tensor.nbytes
        alive.most = max(alive.most, alive.bytes)

    def __del__(self):
        self.alive.bytes -= self.tensor.nbytes


def most_alive(cell, segments: int, method, **options) -> tuple[int, int]:
    """Bytes that graphs hold at most, and the largest number of segments that exist at a time."""
    alive = Alive()
    made = weakref.WeakSet()
    most_segments = 0

    class OnDemand:
        def __len__(self):
            return segments

        def __getitem__(self, t):
            nonlocal most_segments
            if t >= segments:
                raise IndexError(t)
            segment = random_window(1, LANES, LENGTH, seed=t)[0]
            made.add(segment.tokens)
            most_segments = max(most_segments, len(made))
            return segment

    with torch.autograd.graph.saved_tensors_hooks(alive.pack, lambda kept: kept.tensor):
        if method is memory_replay:
            options |= {"states": HostStates(torch.device("cpu"))}
            memory_replay(cell, OnDemand(), starting_state(cell), loss_scale=1.0, **options)
        else:
            method(TorchExecutor(cell, 0), OnDemand(), starting_state(cell), loss_scale=1.0, **options)
    assert alive.bytes == 0
    return alive.most, most_segments


@pytest.mark.parametrize("cell_name", ["encoder_decoder", "decoder"])
def test_activations_and_segments_alive_do_not_grow_with_the_window(cell_name):
    """Of one segment, or of C; full BPTT, the control, holds those of the whole window."""
    cell = cell_named(cell_name)
    small, few = most_alive(cell, 4, memory_replay)
    assert most_alive(cell, 48, memory_replay) == (small, few) and few <= 3
    grouped, _ = most_alive(cell, 8, memory_replay, readout_group=4)
    assert most_alive(cell, 48, memory_replay, readout_group=4)[0] == grouped < 4.5 * small
    if cell_name == "encoder_decoder":  # where the readout is most of a segment
        assert most_alive(cell, 4, memory_replay, readout_parts=3)[0] < 0.75 * small
    whole, _ = most_alive(cell, 8, full_bptt)
    assert whole > 6 * small


def test_host_states_are_copies_in_the_order_of_a_stack():
    store = HostStates(torch.device("cpu"))
    pushed = [ToyState(torch.randn(2, 3), torch.tensor([t, t])) for t in range(4)]
    for state in pushed:
        store.push(state)
    expected = [state.memory.clone() for state in pushed]
    for state in pushed:
        state.memory.zero_()
    for memory, state in zip(expected[::-1], pushed[::-1], strict=True):
        found = store.pop()
        assert torch.equal(found.memory, memory) and torch.equal(found.seen, state.seen)


@pytest.mark.parametrize(
    "other", [ToyState(torch.zeros(1, 3), torch.zeros(2)), ToyState(torch.zeros(2, 3).double(), torch.zeros(2))]
)
def test_host_states_refuse_a_leaf_of_another_shape_or_type(other):
    """A plain copy would broadcast the one and round the other, in silence."""
    store = HostStates(torch.device("cpu"))
    store.push(ToyState(torch.zeros(2, 3), torch.zeros(2)))
    with pytest.raises(ValueError, match=r"state.memory: found torch.float(32|64) .* first state has torch.float32"):
        store.push(other)


@pytest.mark.parametrize("segments", [4, 12])
def test_a_cell_that_differentiates_inside_keeps_no_graph_of_the_rollout(segments):
    """Test-time training enables gradients inside advance: the stored states must not hold the rollout's graphs."""

    class Inner(ToyCell):
        def advance(self, segment, state):
            with torch.enable_grad():
                return super().advance(segment, state)

    class Stored(DeviceStates):
        def push(self, state):
            assert not any(x.requires_grad for x in state)
            super().push(state)

    cell, window = Inner().double().train(), random_window(segments, LANES, LENGTH, seed=1)
    executor = TorchExecutor(cell, 0)
    settings = {"loss_scale": 1.0, "executor": executor}
    memory_replay(cell, window, starting_state(cell), states=Stored(), **settings)
    found = gradients(cell)
    cell.zero_grad()
    full_bptt(executor, window, starting_state(cell), loss_scale=1.0)
    assert relative_error(found, gradients(cell)) <= TOLERANCE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: copies on a stream of their own")
def test_host_states_on_a_gpu_equal_device_states():
    """Several windows with states large enough for copies to be under way while kernels run."""
    device = torch.device("cuda", 0)
    cell = ToyCell(width=2048, dropout=0.3).to(device)
    gradient = {}
    for store in (DeviceStates(), HostStates(device)):
        cell.zero_grad()
        for seed in range(3):
            window = [segment.to(device) for segment in random_window(24, 64, LENGTH, seed=seed)]
            start = cell.empty_state(64, device=device)
            memory_replay(
                cell, window, start, loss_scale=1e-3, executor=TorchExecutor(cell, seed), states=store, readout_group=3
            )
        gradient[type(store)] = gradients(cell)
    assert relative_error(gradient[HostStates], gradient[DeviceStates]) <= 1e-6
