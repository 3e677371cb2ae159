"""Small Memformers, and segments for them: what the rules of the cell, generation and the engine are tested on."""

import torch
import torch.nn.functional as F

from memformer_dist.cells.memformer import DecoderState, Memformer, MemformerConfig, MemformerState
from memformer_dist.segment import IGNORE, Segment

VOCABULARY, BOS, SIZE = 11, 1, 5  # SIZE: tokens of a segment
SMALL = {"width": 8, "decoder_layers": 2, "heads": 2, "feed_forward": 12, "slots": 3, "dropout": 0.0}
LAYOUTS = {"encoder_decoder": {"encoder_layers": 2}, "decoder": {"layout": "decoder", "encoder_layers": 0}}


def make(layout: str = "encoder_decoder", dtype=torch.float64, **fields) -> Memformer:
    """A small cell with weights large enough that every term matters, norms and biases included."""
    torch.manual_seed(0)
    config = MemformerConfig(**{**SMALL, **LAYOUTS[layout], **fields})
    cell = Memformer(config, vocab_size=VOCABULARY, bos_id=BOS, segment_length=SIZE).to(dtype)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return cell


def make_segment(length, reset=None, reset_memory=None, seed=0) -> Segment:
    """Random text; padded rows hold what the reader writes there, token 0 and label IGNORE."""
    lanes = len(length)
    generator = torch.Generator().manual_seed(seed)
    length = torch.tensor(length)
    padding = torch.arange(SIZE) >= length[:, None]
    tokens, labels = (torch.randint(VOCABULARY, (lanes, SIZE), generator=generator) for _ in range(2))
    flags = [torch.tensor(flag or [False] * lanes) for flag in (reset, reset_memory)]
    numbers = torch.zeros(lanes, dtype=torch.int64)
    tokens, labels = tokens.masked_fill(padding, 0), labels.masked_fill(padding, IGNORE)
    return Segment(tokens, labels, length, *flags, numbers, numbers)


def random_state(cell: Memformer, lanes: int):
    """A state in mid-document: a memory of unit slots and, where the layout has one, a whole segment of context."""
    state = cell.empty_state(lanes)
    memory = F.normalize(torch.randn(state.memory.shape, dtype=state.memory.dtype), dim=-1)
    if isinstance(state, DecoderState):
        return DecoderState(memory)
    return MemformerState(memory, torch.randint(VOCABULARY, (lanes, SIZE)), torch.full((lanes,), SIZE))


# Five ticks of three lanes: short segments (one of them in mid-document, so that its padding is read as context),
# documents that begin in the middle, a memory that is reset, a lane that runs dry.
TICKS = [
    make_segment([5, 3, 5], reset=[True, True, True], seed=1),
    make_segment([5, 5, 5], reset=[False, True, False], seed=2),
    make_segment([2, 5, 5], reset_memory=[False, False, True], seed=3),
    make_segment([5, 5, 0], reset=[False, True, False], seed=4),
    make_segment([5, 5, 0], seed=5),
]


def run_cell(cell: Memformer, ticks: list[Segment]) -> list[torch.Tensor]:
    """nll [ticks, B, S] and the memories after each tick [ticks, B, M, D]."""
    state, trace = cell.empty_state(len(ticks[0].length)), []
    for segment in ticks:
        features, state = cell("advance", segment, state)
        trace.append((cell("readout", segment, features), state.memory))
    return [torch.stack(column) for column in zip(*trace, strict=True)]


def memformer(layout: str) -> Memformer:
    """A cell with dropout, in float32 and as it is initialised, for segments of 6 tokens."""
    config = MemformerConfig(
        layout=layout,
        width=8,
        heads=2,
        feed_forward=12,
        slots=3,
        encoder_layers=1 if layout == "encoder_decoder" else 0,
        decoder_layers=2,
        dropout=0.2,
        bmn_init_norm=0.3,
        init_std=0.3,  # so large that every path of the gradient counts
    )
    return Memformer(config, vocab_size=VOCABULARY, bos_id=1, segment_length=6)
