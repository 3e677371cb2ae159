"""check_cell: silent on every cell that keeps the rules, and each broken rule is named."""

import pytest
import torch
from torch import nn

from memformer_dist.cells.armt import ArmtConfig
from memformer_dist.cells.check import check_cell
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
from memformer_dist.segment import IGNORE
from tests.helpers.toy import SIZE, VOCABULARY, OscillatorCell, PenalisedCell, ToyCell, ToyState

SMALL = {"width": 8, "heads": 2, "feed_forward": 12, "init_std": 0.3, "dropout": 0.3}
MEMFORMER = SMALL | {"slots": 3, "decoder_layers": 1}


def build(config):
    return config.build(vocab_size=VOCABULARY, bos_id=1, segment_length=SIZE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ToyCell(dropout=0.3),
        lambda: PenalisedCell(dropout=0.3),
        lambda: OscillatorCell(dropout=0.3),
        lambda: build(MemformerConfig(**MEMFORMER, encoder_layers=1)),
        lambda: build(MemformerConfig(**MEMFORMER, layout="decoder", encoder_layers=0)),
        lambda: build(PlainConfig(**SMALL, layers=2)),
        lambda: build(RmtConfig(**SMALL, layers=2, slots=2)),
        lambda: build(HmtConfig(**SMALL, layers=2, slots=2, sensory_tokens=4)),
        lambda: build(ArmtConfig(**SMALL, layers=2, write_tokens=2, memory_width=3)),
        lambda: build(TransformerXLConfig(**SMALL, layers=2, memory_length=4)),
        lambda: build(LaMemoConfig(**SMALL, layers=2, memory_length=8)),
        lambda: build(GatedDeltaConfig(**SMALL, layers=2, chunk=4)),
        lambda: build(MoMConfig(**SMALL, layers=2, memories=3, chunk=4)),
        lambda: build(TitansConfig(**SMALL, layers=2, memory_depth=2, chunk=4)),
        lambda: build(HadamardConfig(**SMALL, layers=2)),
        lambda: build(TitansConfig(**SMALL, layers=2, layout="lmm", chunk=4)),
    ],
)
def test_good_cells_pass(make):
    torch.manual_seed(0)
    cell = make()
    weights = {name: parameter.clone() for name, parameter in cell.named_parameters()}
    before = torch.random.get_rng_state()
    assert check_cell(cell) == []
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random state"
    assert all(torch.equal(parameter, weights[name]) for name, parameter in cell.named_parameters())
    assert cell.training and {parameter.dtype for parameter in cell.parameters()} == {torch.float32}


class OwnGenerator(ToyCell):
    """Draws from a generator that nobody seeds."""

    def __init__(self):
        super().__init__()
        self.generator = [torch.Generator().manual_seed(1)]

    def advance(self, segment, state):
        features, state = super().advance(segment, state)
        noise = torch.rand(state.memory.shape, dtype=state.memory.dtype, generator=self.generator[0])
        return features, state._replace(memory=state.memory + (0.1 * noise if self.training else 0))

    def __deepcopy__(self, memo):
        copied = OwnGenerator()
        copied.load_state_dict(self.state_dict())
        return copied


class Remembers(ToyCell):
    """Hands something on by an attribute, detached: no drift, a wrong gradient."""

    last = None

    def advance(self, segment, state):
        features, state = super().advance(segment, state)
        if torch.is_grad_enabled() and segment.labels.any() and self.training:
            carried = 0 if self.last is None else 1.0
            self.last = True
            features = features._replace(mixed=features.mixed * (1 + carried))
        return features, state


class SeesTheFuture(ToyCell):
    def logits(self, segment, features):
        return super().logits(segment, features) + self.embedding(segment.tokens).mean((1, 2))[:, None, None]


class SeesTheSecondToken(ToyCell):
    """As a memory would that looks one token too far ahead."""

    def logits(self, segment, features):
        return super().logits(segment, features) + self.embedding(segment.tokens[:, 1]).mean(1)[:, None, None]


class MixesLanes(ToyCell):
    def advance(self, segment, state):
        features, state = super().advance(segment, state)
        return features, state._replace(memory=state.memory + state.memory.mean(0))


class ReadsPadding(ToyCell):
    def advance(self, segment, state):
        features, state = super().advance(segment, state)
        return features, state._replace(memory=state.memory + self.embedding(segment.tokens).mean(1).to(self.dtype))


class KeepsTheOldDocument(ToyCell):
    def advance(self, segment, state):
        features, after = super().advance(segment, state)
        return features, after._replace(memory=after.memory + 0.1 * state.memory)


class KeepsItsMemory(ToyCell):
    def advance(self, segment, state):
        return super().advance(segment._replace(reset_memory=torch.zeros_like(segment.reset)), state)


class WritesInPlace(ToyCell):
    def advance(self, segment, state):
        state.seen.add_(1)
        return super().advance(segment, state)


class WritesToTheText(ToyCell):
    def advance(self, segment, state):
        segment.tokens.clamp_(max=5)
        return super().advance(segment, state)


class BatchNormalised(ToyCell):
    """In evaluation mode lanes do not meet, and the running statistics stay as they are."""

    def __init__(self):
        super().__init__()
        self.normalise = nn.BatchNorm1d(self.width)

    def advance(self, segment, state):
        features, state = super().advance(segment, state)
        return features, state._replace(memory=self.normalise(state.memory))


class CountsForwards(ToyCell):
    """A counter that changes nothing yet."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def readout(self, segment, features):
        self.calls += 1
        return super().readout(segment, features)


class LooksAheadInTraining(ToyCell):
    def logits(self, segment, features):
        ahead = self.embedding(segment.tokens).mean((1, 2))[:, None, None] if self.training else 0
        return super().logits(segment, features) + ahead


class ComplexWeight(ToyCell):
    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.ones(self.width, dtype=torch.complex64))


class Lazy(ToyCell):
    def __init__(self):
        super().__init__()
        self.later = nn.LazyLinear(self.width)


def with_embedding(embedding):
    cell = ToyCell()
    cell.embedding = embedding
    return cell


class RandomInEvaluation(ToyCell):
    def logits(self, segment, features):
        return super().logits(segment, features) + 0.1 * torch.rand(1)


class ReadsAnothersWeight(ToyCell):
    def logits(self, segment, features):
        return super().logits(segment, features) + self.mix.weight.sum()


class HalfState(ToyCell):
    def empty_state(self, lanes, device=None):
        return super().empty_state(lanes, device)._replace(memory=torch.zeros(lanes, self.width))

    def advance(self, segment, state):
        features, state = super().advance(segment, state._replace(memory=state.memory.double()))
        return features, state._replace(memory=state.memory.float())


class WrongExtend(ToyCell):
    def extend(self, tokens, cache):
        logits, cache = super().extend(tokens, cache)
        return logits + 0.1, cache


class LossWhereNoneIsAsked(ToyCell):
    def readout(self, segment, features):
        labels = segment.labels.masked_fill(segment.labels == IGNORE, 0)
        return nn.functional.cross_entropy(self.logits(segment, features).transpose(1, 2), labels, reduction="none")


class UnknownLeaf(ToyCell):
    memory_leaves = ("memories",)


class LanesLast(ToyCell):
    def empty_state(self, lanes, device=None):
        return ToyState(torch.zeros(self.width, 5), torch.zeros(lanes, dtype=torch.long))

    def advance(self, segment, state):
        return super().advance(segment, ToyCell.empty_state(self, len(segment.reset)))[0], state


@pytest.mark.parametrize(
    "cell, expected",
    [
        (OwnGenerator, "rule 5: the replay does not repeat the rollout"),
        (Remembers, "rule 1: the gradient of the replay differs"),
        (SeesTheFuture, "logits: a token sees later ones"),
        (SeesTheSecondToken, "logits: a token sees later ones: changing tokens from position 1 on"),
        (MixesLanes, "rule 1: lanes see one another"),
        (ReadsPadding, "rule 4: what stands in the padding"),
        (KeepsTheOldDocument, "rule 2: a new document starts, and the state before it"),
        (KeepsItsMemory, "rule 3: reset_memory leaves something of memory"),
        (
            WritesInPlace,
            "gradient: could not be checked: ValueError: advance has written in place to its input state (seen)",
        ),
        (
            WritesToTheText,
            "gradient: could not be checked: ValueError: advance has written in place to its input segment (tokens)",
        ),
        (BatchNormalised, "rule 1: lanes see one another in training mode"),
        (BatchNormalised, "rule 1: a forward updates the buffer normalise.running_mean"),
        (CountsForwards, "rule 1: a forward updates the buffer calls"),
        (LooksAheadInTraining, "logits: a token sees later ones in training mode"),
        (ComplexWeight, "rule 8: turn is torch.complex64, expected two real ones"),
        (Lazy, "rule 8: later.weight has no size yet"),
        (lambda: ToyCell().half(), "rule 8: embedding.weight is torch.float16, expected torch.float32"),
        (lambda: with_embedding(nn.Embedding(VOCABULARY, 7, sparse=True)), "rule 8: embedding makes sparse gradients"),
        (lambda: with_embedding(nn.Embedding(0, 7)), "rule 8: embedding.weight has no elements"),
        (RandomInEvaluation, "rule 5: two evaluations of the same text differ"),
        (ReadsAnothersWeight, "rule 6: a parameter is read outside the forward"),
        (HalfState, "rule 1: memory is torch.float32 in a float64 model"),
        (WrongExtend, "extend: its logits differ"),
        (LossWhereNoneIsAsked, "readout: nll is not 0 where the label is IGNORE"),
        (UnknownLeaf, "rule 3: memory_leaves names memories"),
        (LanesLast, "rule 1: memory has 7 rows for 3 lanes"),
    ],
)
def test_a_broken_rule_is_named(cell, expected):
    torch.manual_seed(0)
    problems = check_cell(cell())
    assert any(problem.startswith(expected) for problem in problems), problems
