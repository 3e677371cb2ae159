"""Memformer against the paper's equations, written out below one lane, one head and one slot at a time, in float64.

`Reference` knows nothing of the cell but the names of its parameters. Every rule it checks can be broken in it by
name (`mistake`), and the comparison must notice each of them.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from memformer_dist.cells.memformer import (
    BiasedMemoryNormalisation,
    Memformer,
    MemformerConfig,
    MemformerState,
)
from memformer_dist.segment import Segment, select_rows
from tests.helpers.loops import Loops, difference, gradients
from tests.helpers.memformer import (
    BOS,
    LAYOUTS,
    SIZE,
    SMALL,
    TICKS,
    VOCABULARY,
    make,
    make_segment,
    random_state,
    run_cell,
)


class Reference(Loops):
    """The model as printed, for one lane. `mistake` names the one rule to break."""

    def reading_layer(self, name, x, source, seen, source_seen):
        x = self.self_attention(name, x, list(range(len(x))), seen)
        return self.feed_forward(name, self.cross_attention(name, x, source, source_seen))

    def stack(self, name, layers, tokens, source, seen, source_seen):
        x = self.embedded(tokens)
        for number in range(layers):
            x = self.reading_layer(f"{name}.layers.{number}", x, source, seen, source_seen)
        return self.norm(f"{name}.norm", x)

    def bmn(self, mixed):
        if self.mistake == "no normalisation":
            return mixed
        biased = mixed if self.mistake == "no bias" else mixed + self.weights["normalise.bias"]
        return torch.stack([row / torch.sqrt((row**2).sum()) for row in biased])

    def initial(self):
        return torch.stack([v / torch.sqrt((v**2).sum()) for v in self.weights["normalise.bias"]])

    def write(self, memory, x, length):
        slots = len(memory)
        tau = 1.0 if self.mistake == "temperature ignored" else self.config.temperature
        # The mask of the k x (k + S) matrix: the diagonal of the slot block, and the valid tokens.
        mask = torch.cat([torch.eye(slots, dtype=torch.bool), (torch.arange(SIZE) < length).expand(slots, SIZE)], dim=1)
        if self.mistake == "slots see each other":
            mask[:, :slots] = True
        if self.mistake == "slots do not see themselves":
            mask[:, :slots] = length == 0
        if self.mistake == "padding is written":
            mask[:, slots:] = True
        q = self.linear("writer.query", memory)
        k = torch.cat([self.linear("writer.key", memory), self.linear("writer.key", x)])
        own = self.linear("writer.value", memory) if self.mistake == "self value projected" else memory
        v = torch.cat([own, self.linear("writer.value", x)])
        mixed = []
        for one_q, one_k, one_v in zip(self.heads(q), self.heads(k), self.heads(v), strict=True):
            scores = torch.exp(one_q @ one_k.T / (math.sqrt(self.head_size) * tau)) * mask
            if self.mistake == "two softmaxes":
                parts = scores.split([slots, SIZE], dim=1)
                scores = torch.cat([part / part.sum(-1, keepdim=True).clamp(min=1e-300) for part in parts], dim=1)
            weights = scores / scores.sum(-1, keepdim=True)
            mixed.append(weights @ one_v)
        mixed = torch.cat(mixed, dim=-1)
        return self.bmn(self.linear("writer.output", mixed) if self.config.write_projection else mixed)

    def read(self, memory):
        return memory if self.mistake == "memory not normed" else self.norm("memory_norm", memory)

    def tick(self, segment: Segment, lane: int, memory, context: list[int]):
        """-> (nll [S], next memory, next context)."""
        tokens = segment.tokens[lane].tolist()
        length, reset = int(segment.length[lane]), bool(segment.reset[lane])
        if reset or segment.reset_memory[lane]:
            memory = self.initial()
        if reset or (segment.reset_memory[lane] and self.mistake == "a reset memory drops the context"):
            context = [BOS]
        causal = lambda i, j: j <= i  # noqa: E731
        everywhere = lambda i, j: True  # noqa: E731
        if self.config.layout == "decoder":
            hidden = self.stack("decoder", self.config.decoder_layers, tokens, self.read(memory), causal, everywhere)
            written = self.write(memory, hidden, length)
        else:
            if self.mistake == "the segment itself is encoded" and not reset:
                context = tokens[:length]
            read = len(context)
            padded = context + [BOS if reset else 0] * (SIZE - read)
            seen = causal if self.mistake == "causal encoder" else everywhere
            # An empty lane may compute anything that is finite: here it sees its first padded position.
            shown = SIZE if self.mistake == "padding is encoded" else max(read, 1)
            valid = lambda i, j: seen(i, j) and j < shown  # noqa: E731
            encoded = self.stack("encoder", self.config.encoder_layers, padded, self.read(memory), valid, everywhere)
            source_length = SIZE if self.mistake == "padding is decoded" else max(read, 1)
            source = self.read(memory) if self.mistake == "decoder reads the memory" else encoded
            limit = len(source) if self.mistake == "decoder reads the memory" else source_length
            hidden = self.stack("decoder", self.config.decoder_layers, tokens, source, causal, lambda i, j: j < limit)
            written = self.write(memory, encoded, read)
            if reset and not self.config.write_first_segment:
                written = memory
        return self.losses(hidden, segment.labels[lane].tolist()), written, tokens[:length]

    def run(self, ticks: list[Segment]):
        """-> nll [ticks, L, S], memories [ticks, L, slots, d]."""
        lanes = []
        for lane in range(len(ticks[0].length)):
            memory, context, trace = None, [], []
            for segment in ticks:
                nll, memory, context = self.tick(segment, lane, memory, context)
                trace.append((nll, memory))
            lanes.append([torch.stack(column) for column in zip(*trace, strict=True)])
        return [torch.stack(column, dim=1) for column in zip(*lanes, strict=True)]


# ---------------------------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_follow_the_equations(layout):
    cell = make(layout)
    found, expected = run_cell(cell, TICKS), Reference(cell).run(TICKS)
    assert difference(found, expected) < 1e-11
    assert difference(gradients(cell, found), gradients(cell, expected)) < 1e-8  # of gradients up to some 1e3


@pytest.mark.parametrize(
    "fields",
    [
        {"positions": "none", "attention_bias": True, "final_norm": False},
        {"write_first_segment": False, "write_projection": True},
        {"memory_norm": False, "tie_embeddings": False, "temperature": 1.0, "heads": 1},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_alternatives_follow_the_equations(fields):
    cell = make(**fields)
    expected = Reference(cell).run(TICKS)
    assert difference(run_cell(cell, TICKS), expected) < 1e-11
    assert difference(run_cell(make(), TICKS), expected) > 1e-3, "the fields change nothing"


MISTAKES = {
    "temperature ignored",
    "self value projected",
    "slots see each other",
    "slots do not see themselves",
    "two softmaxes",
    "no normalisation",
    "no bias",
    "memory not normed",
    "no positions",
    "padding is written",
}
ENCODER_MISTAKES = {
    "causal encoder",
    "padding is encoded",
    "padding is decoded",
    "decoder reads the memory",
    "the segment itself is encoded",
    "a reset memory drops the context",
}


@pytest.mark.parametrize(
    "layout, mistake",
    [("encoder_decoder", mistake) for mistake in sorted(MISTAKES | ENCODER_MISTAKES)]
    + [("decoder", mistake) for mistake in sorted(MISTAKES)],
)
def test_the_comparison_notices(layout, mistake):
    cell = make(layout)
    with torch.no_grad():
        assert difference(run_cell(cell, TICKS), Reference(cell, mistake).run(TICKS)) > 1e-3


# ------------------------------------------------------------------------------------------- memory: bias and resets


@pytest.mark.parametrize("norm, factor", [(0.1, 0.91), (0.45, 0.69), (1.15, 0.47), (3.2, 0.24)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_slot_that_keeps_to_itself_decays_towards_its_bias(layout, norm, factor):
    """What is perpendicular to v shrinks by 1 / (1 + ||v||), as does its gradient. A dry lane has only itself."""
    cell = make(layout)
    with torch.no_grad():
        cell.normalise.bias.copy_(norm * F.normalize(cell.normalise.bias, dim=-1))
    initial = F.normalize(cell.normalise.bias, dim=-1).detach()
    aside = torch.randn_like(initial)
    aside = F.normalize(aside - (aside * initial).sum(-1, keepdim=True) * initial, dim=-1)
    amount = torch.tensor(1e-6, dtype=torch.float64, requires_grad=True)
    state = cell.empty_state(1)._replace(memory=F.normalize(initial + amount * aside, dim=-1)[None])
    _, after = cell.advance(make_segment([0]), state)
    left = (after.memory[0] * aside).sum(-1)
    assert torch.allclose(left / amount, torch.full_like(left, 1 / (1 + norm)), rtol=1e-6)
    (slope,) = torch.autograd.grad(left.sum() / len(left), amount)
    assert float(slope) == pytest.approx(1 / (1 + norm), rel=1e-6) == pytest.approx(factor, abs=0.006)


def test_initial_bias_has_the_norm_asked_for():
    module = BiasedMemoryNormalisation(slots=7, width=16, init_norm=0.45)
    assert torch.allclose(module.bias.norm(dim=-1), torch.tensor(0.45))
    assert not torch.allclose(module.bias[0], module.bias[1])
    assert torch.allclose(module(torch.zeros(1, 7, 16)), module.bias / 0.45)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flag", ["reset", "reset_memory"])
def test_a_reset_inside_advance_trains_the_initial_memory(layout, flag):
    cell = make(layout)
    for value in (True, False):
        segment = make_segment([5, 5], **{flag: [value, False]})
        features, _ = cell.advance(segment, random_state(cell, 2))
        cell.zero_grad()
        cell.readout(segment, features).sum().backward()  # no write in this loss: the bias can only enter as m(0)
        reached = cell.normalise.bias.grad is not None and bool(cell.normalise.bias.grad.abs().sum() > 0)
        assert reached == value


def test_reset_forgets_everything_and_forget_the_memory_alone():
    cell = make()
    one, other = random_state(cell, 2), random_state(cell, 2)

    def nll(state, **flags):
        segment = make_segment([5, 5], **flags)
        return cell.readout(segment, cell.advance(segment, state)[0])

    assert torch.equal(nll(one, reset=[True, True]), nll(other, reset=[True, True]))
    assert torch.equal(
        nll(one, reset_memory=[True, True]), nll(one._replace(memory=other.memory), reset_memory=[True, True])
    )
    assert not torch.allclose(nll(one, reset_memory=[True, True]), nll(other, reset_memory=[True, True]))
    assert not torch.allclose(nll(one), nll(one._replace(memory=other.memory)))


def test_the_context_of_a_first_segment_is_one_bos():
    cell = make()
    memory = cell.normalise(torch.zeros(1, 3, 8, dtype=torch.float64))
    by_hand = MemformerState(memory, torch.tensor([[BOS, 9, 8, 7, 6]]), torch.tensor([1]))
    features, state = cell.advance(make_segment([5]), by_hand)
    found, found_state = cell.advance(make_segment([5], reset=[True]), random_state(cell, 1))
    assert torch.equal(found.length, features.length) and torch.allclose(found.hidden[:, 0], features.hidden[:, 0])
    assert torch.allclose(found_state.memory, state.memory)
    assert not torch.allclose(found_state.memory, memory)  # the writer writes as always


# --------------------------------------------------------------------------------- what may influence what


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20, deadline=None)
@given(length=st.lists(st.integers(0, SIZE), min_size=2, max_size=2), seed=st.integers(0, 1000))
def test_padding_has_no_influence(layout, length, seed):
    cell = make(layout)
    clean = make_segment(length, reset=[True, True], seed=seed)
    padding = torch.arange(SIZE) >= clean.length[:, None]
    garbage = torch.randint(VOCABULARY, clean.tokens.shape, generator=torch.Generator().manual_seed(seed))
    dirty = clean._replace(tokens=torch.where(padding, garbage, clean.tokens))
    following = make_segment([5, 5], seed=seed + 1)
    with torch.no_grad():
        nll, memory = run_cell(cell, [clean, following])
        dirty_nll, dirty_memory = run_cell(cell, [dirty, following])
    assert nll.isfinite().all() and memory.isfinite().all()
    assert (nll[0][padding] == 0).all()
    assert torch.allclose(memory, dirty_memory, atol=1e-13)
    busy = clean.length > 0  # the text after a dry lane's segment is of no document: its loss means nothing
    assert torch.allclose(nll[:, busy], dirty_nll[:, busy], atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_that_is_not_padding_has_influence(layout):
    """The control of the test above: the same garbage in a row that is said to be full."""
    cell = make(layout)
    clean = make_segment([5, 5], reset=[True, True])
    dirty = clean._replace(tokens=torch.cat([clean.tokens[:, :3], (clean.tokens[:, 3:] + 1) % VOCABULARY], dim=1))
    with torch.no_grad():
        found, expected = (run_cell(cell, [segment, make_segment([5, 5])])[1][1] for segment in (dirty, clean))
    assert not torch.allclose(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prediction_depends_on_the_tokens_up_to_it(layout):
    cell = make(layout)
    state, segment = random_state(cell, 1), make_segment([5])
    for position in range(SIZE):
        tokens = segment.tokens.clone()
        tokens[0, position] = (tokens[0, position] + 1) % VOCABULARY
        changed = segment._replace(tokens=tokens)
        with torch.no_grad():
            nll, other = (cell.readout(one, cell.advance(one, state)[0])[0] for one in (segment, changed))
        assert torch.allclose(nll[:position], other[:position], atol=1e-13)
        assert ((nll[position:] - other[position:]).abs() > 1e-6).all()


def test_the_encoder_looks_both_ways():
    cell = make()
    state = random_state(cell, 1)
    last = torch.tensor([0] * (SIZE - 1) + [1])
    changed = state._replace(context=(state.context + last) % VOCABULARY)
    hidden, other = (cell.advance(make_segment([5]), one)[0].hidden for one in (state, changed))
    assert ((hidden - other).abs().amax(-1) > 1e-6).all()


def test_lanes_do_not_see_one_another():
    cell = make()
    segment, state = make_segment([5, 2, 4], reset=[True, False, False]), random_state(cell, 3)
    together = cell.readout(segment, cell.advance(segment, state)[0])
    for lane in range(3):
        one = slice(lane, lane + 1)
        alone = select_rows(segment, one)
        nll = cell.readout(alone, cell.advance(alone, state._make(x[one] for x in state))[0])
        assert torch.allclose(nll, together[one], atol=1e-12)


# ------------------------------------------------------------------------------------------ precision, randomness


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_keeps_states_and_losses_in_float32(layout):
    cell = make(layout, dtype=torch.float32)
    with torch.no_grad():
        nll, _ = run_cell(cell, TICKS)
        with torch.autocast("cpu", torch.bfloat16):
            low_nll, low_memory = run_cell(cell, TICKS)
    assert low_nll.dtype == low_memory.dtype == torch.float32
    assert float((low_memory.norm(dim=-1) - 1).abs().max()) < 1e-6, "the normalisation was done in bfloat16"
    assert 1e-4 < float((low_nll - nll).abs().mean()) < 0.1 * float(nll.mean()), "bfloat16 rounds, a little"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bfloat16_model_keeps_its_state_in_float32(layout):
    cell = make(layout, dtype=torch.bfloat16)
    with torch.no_grad():
        nll, memory = run_cell(cell, TICKS)
    assert nll.dtype == memory.dtype == cell.empty_state(1).memory.dtype == torch.float32
    assert float((memory.norm(dim=-1) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_repeats_with_the_seed_and_spares_the_writer(layout):
    cell = make(layout, dropout=0.3)
    segment, state = make_segment([5, 5]), random_state(cell, 2)

    def run(seed):
        torch.manual_seed(seed)
        features, after = cell.advance(segment, state)
        return features.hidden, after.memory, cell.readout(segment, features)

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(1), strict=True))
    assert not any(torch.allclose(a, b) for a, b in zip(run(1), run(2), strict=True))
    features, _ = cell.advance(segment, state)
    assert torch.equal(cell.writer(state.memory, *features), cell.writer(state.memory, *features))
    cell.eval()
    assert all(torch.equal(a, b) for a, b in zip(run(1), run(2), strict=True))


@pytest.mark.parametrize("dropped", ["embedding", "attention", "residual"])
def test_every_dropout_drops(dropped):
    """Each of the three places on its own makes the encoder random."""
    cell = make(dropout=0.3)
    cell.dropout.p *= dropped == "embedding"
    for layer in cell.encoder.layers:
        layer.self_attention.dropout *= dropped == "attention"
        layer.cross_attention.dropout *= dropped == "attention"
        layer.dropout.p *= dropped == "residual"
    segment, state = make_segment([5]), random_state(cell, 1)
    first, second = (cell.advance(segment, state)[0].hidden for _ in range(2))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_silent_start_hears_no_memory_and_learns_to(layout):
    """At first losses and writes are those of any other memory, and after a step of the output projections they are not."""
    torch.manual_seed(0)
    config = MemformerConfig(**SMALL, **LAYOUTS[layout], silent_start=True)
    cell = Memformer(config, vocab_size=VOCABULARY, bos_id=BOS, segment_length=SIZE)
    segment, states = make_segment([5, 5]), [random_state(cell, 2) for _ in range(2)]
    states[1] = states[1]._replace(**{name: x for name, x in states[0]._asdict().items() if name != "memory"})

    def losses():
        features = [cell.advance(segment, state)[0] for state in states]
        return [cell.readout(segment, one) for one in features]

    first, second = losses()
    assert torch.equal(first, second)
    first.sum().backward()
    outputs = [x for name, x in cell.named_parameters() if "cross_attention.output.weight" in name]
    assert all(not x.any() for x in outputs)
    # Behind the silent attention of the decoder, the encoder's has no gradient yet.
    assert sum(bool(x.grad.any()) for x in outputs if x.grad is not None) == len(cell.decoder.layers)
    for _ in range(2):
        with torch.no_grad():
            for x in outputs:
                x -= 0.1 * (torch.zeros_like(x) if x.grad is None else x.grad)
        cell.zero_grad()
        losses()[0].sum().backward()
    assert all(x.any() for x in outputs), "the encoder's follow those of the decoder"
    assert not torch.equal(*losses())


def test_noise_on_the_memory_has_its_norm_and_is_of_training_alone():
    cell = make(memory_noise=0.3)
    memory = F.normalize(torch.randn(500, *random_state(cell, 1).memory.shape[1:]), dim=-1)
    state, fresh = random_state(cell, 500)._replace(memory=memory), torch.zeros(500, dtype=torch.bool)
    noisy = cell._start(state, fresh).detach()
    assert float((noisy.norm(dim=-1) - 1).abs().max()) < 1e-6
    # What stands at right angles to a slot turns it: of the noise's D directions all but one.
    turned = (noisy * memory).sum(-1).clamp(max=1).arccos().tan().square().mean(1)  # [lanes], over the slots
    width = memory.shape[-1]
    assert float(turned.mean()) == pytest.approx(0.3**2 / 3 * (width - 1) / width, rel=0.15), (
        "a third: of a uniform norm"
    )
    assert float((turned < 0.1**2).float().mean()) == pytest.approx(0.4, abs=0.15), "some lanes have little of it"
    cell.eval()
    assert torch.equal(cell._start(state, fresh), memory)


# ------------------------------------------------------------------------------------------- diagnosis, initial weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diagnosis_of_an_even_attention(layout):
    cell = make(layout)
    segment, state = make_segment([5, 5]), random_state(cell, 2)
    biased = {name: float(value) for name, value in cell("diagnose", segment, state).items()}
    nn.init.zeros_(cell.writer.query.weight)
    even = {name: float(value) for name, value in cell("diagnose", segment, state).items()}
    assert even["slot_entropy"] == pytest.approx(math.log(1 + SIZE))
    assert even["self_share"] == pytest.approx(1 / (1 + SIZE))
    assert biased["slot_entropy"] < even["slot_entropy"] - 1e-3
    assert not cell.diagnose(segment, state)["slot_entropy"].requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diagnosis_of_how_far_a_slot_moves(layout):
    """From the memory that the segment read: m(0) where a document starts or the memory is forgotten."""
    cell = make(layout)
    segment = make_segment([5, 5, 5], reset=[False, True, False], reset_memory=[False, False, True])
    state = random_state(cell, 3)
    with torch.no_grad():
        _, after = cell.advance(segment, state)
    before = state.memory.clone()
    before[1:] = F.normalize(cell.normalise.bias.detach(), dim=-1)
    found = cell.diagnose(segment, state)["write_norm"]
    assert float(found) == pytest.approx(float((after.memory - before).norm(dim=-1).mean()))
    assert float(found) != pytest.approx(float((after.memory - state.memory).norm(dim=-1).mean()), rel=1e-3)


def test_initial_weights():
    config = MemformerConfig(width=64, encoder_layers=2, decoder_layers=8, heads=4, feed_forward=128, slots=4)
    cell = Memformer(config, vocab_size=500, bos_id=BOS, segment_length=SIZE)
    seen = set()
    for name, parameter in cell.state_dict().items():
        if name.endswith("bias") and "normalise" not in name:
            assert not parameter.any()
        elif ".output." in name or ".feed_forward.2." in name:
            layers = config.encoder_layers if name.startswith("encoder") else config.decoder_layers
            assert float(parameter.std()) == pytest.approx(0.02 / math.sqrt(2 * layers), rel=0.1)
            seen.add("residual")
        elif parameter.dim() == 2 and "normalise" not in name:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.1)
            seen.add("weight")
    assert seen == {"residual", "weight"}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"width": 10, "heads": 4}, "width: found 10, expected a multiple of heads"),
        ({"width": 6, "heads": 2}, "found 3, expected an even number"),
        ({"encoder_layers": 0}, "encoder_layers: found 0, expected at least 1"),
        ({"layout": "decoder", "encoder_layers": 4}, "encoder_layers: found 4, expected 0 in"),
        ({"layout": "decoder", "encoder_layers": 0, "write_first_segment": False}, "write_first_segment: found false"),
        ({"temperature": 0}, "greater than 0"),
        ({"dropout": 1}, "less than 1"),
        ({"sluts": 3}, "not permitted"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ValidationError, match=message):
        MemformerConfig(**fields)


def test_every_setting_says_what_it_is():
    assert all(field.description for field in MemformerConfig.model_fields.values())
