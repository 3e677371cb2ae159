"""check_cell: which of the rules in base.py a cell breaks. For whoever writes one.

    for problem in check_cell(MyCell(...)):
        print(problem)       # rule 4: what stands in the padding changes losses by 3.1e-03

Each check runs a copy of the cell in float64 on random text, a few segments of a few lanes, and compares two runs that a rule
says are equal. A cell that passes has the gradient of full back-propagation through time under memory replay.
"""

import copy
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.mrbp.executor import TorchExecutor, reseed
from memformer_dist.mrbp.replay import memory_replay
from memformer_dist.segment import IGNORE, Segment, concatenate, differentiable, select_rows

LANES, SEGMENTS = 3, 4
TOLERANCE = 1e-9  # of differences that only the order of additions makes, in float64


def check_cell(cell: RecurrentCell[Any, Any], *, seed: int = 0) -> list[str]:
    """What is wrong with a cell, a sentence per broken rule; empty if it keeps them all.

    Args:
        cell: with `vocab_size` and `segment_length` set, on the CPU; it is left as it is. Dropout and other random draws
            are checked as the cell has them in training mode.
        seed: of the text that it is tried on.
    """
    if problems := [f"rule 8: {problem}" for problem in parameter_problems(cell)]:
        return problems
    with torch.random.fork_rng([]):
        text = _Text(cell, seed)
        try:
            state = text.mid_document()
        except Exception as error:
            return [f"advance cannot be run in float64: {type(error).__name__}: {error}"]
        problems = [*_state(text, state)]
        if problems:  # what follows needs states that can be compared
            return problems
        checks = (
            _gradient,
            _evaluation,
            _causality,
            _lanes,
            _buffers,
            _padding,
            _reset,
            _memory_leaves,
            _generation,
            _parameters,
        )
        for check in checks:
            try:
                problems += check(text)
            except Exception as error:
                problems.append(f"{check.__name__.strip('_')}: could not be checked: {type(error).__name__}: {error}")
    return problems


class _Text:
    """The cell to be checked, and random text for it."""

    def __init__(self, cell: RecurrentCell[Any, Any], seed: int):
        self.cell = copy.deepcopy(cell).double()
        self.generator = torch.Generator().manual_seed(seed)
        self.size = self.cell.segment_length

    def segment(self, *, reset: bool = False, reset_memory: bool = False, length: Tensor | None = None) -> Segment:
        lanes = torch.zeros(LANES, dtype=torch.int64)
        length = torch.full_like(lanes, self.size) if length is None else length
        tokens, labels = torch.randint(self.cell.vocab_size, (2, LANES, self.size), generator=self.generator)
        padding = torch.arange(self.size) >= length[:, None]
        tokens, labels = tokens.masked_fill(padding, 0), labels.masked_fill(padding, IGNORE)
        starts, forgets = torch.full((LANES,), reset), torch.full((LANES,), reset_memory)
        return Segment(tokens, labels, length, starts, forgets, lanes, lanes)

    def window(self) -> list[Segment]:
        """Segments of which one is short, and a document that starts after it."""
        short = torch.tensor([self.size, max(1, self.size // 2), self.size])
        window = [self.segment(), self.segment(length=short), *(self.segment() for _ in range(SEGMENTS - 2))]
        window[2] = window[2]._replace(reset=torch.tensor([False, True, False]))
        return window

    @torch.no_grad()
    def mid_document(self) -> Any:
        """A state behind two whole segments, read in evaluation mode."""
        self.cell.eval()
        state = self.cell.empty_state(LANES)
        for reset in (True, False):
            _, state = self.cell("advance", self.segment(reset=reset), state)
        return state

    @torch.no_grad()
    def losses(self, window: list[Segment], state: Any, *, training: bool = False) -> tuple[Tensor, Any]:
        """-> nll [N, B, S], the state behind the window. In training mode with the same random draws each time."""
        self.cell.train(training)
        nlls = []
        for t, segment in enumerate(window):
            if training:
                reseed(torch.device("cpu"), t)
            features, state = self.cell("advance", segment, state)
            nlls.append(self.cell("readout", segment, features))
        return torch.stack(nlls), state


def parameter_problems(cell: nn.Module) -> Iterator[str]:
    """What is wrong with the parameters of a cell, as they are before it is trained (rule 8)."""
    for name, parameter in cell.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            yield f"{name} has no size yet, as in a lazy module; expected one that is built with its sizes"
        elif parameter.is_complex():
            yield f"{name} is {parameter.dtype}, expected two real ones of which the forward makes it (torch.complex)"
        elif parameter.dtype != torch.float32:
            yield f"{name} is {parameter.dtype}, expected torch.float32; training.precision is about lower ones"
        elif not parameter.numel():
            yield f"{name} has no elements, expected some, or no parameter"
    for name, module in cell.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            yield f"{name} makes sparse gradients, which ZeRO does not take; expected sparse=False"


def _state(text: _Text, state: Any) -> Iterator[str]:
    empty = text.cell.empty_state(LANES)
    if not (isinstance(empty, tuple) and hasattr(empty, "_fields") and len(empty)):
        yield "rule 1: a state is a NamedTuple of at least one tensor"
        return
    for name, one, other in zip(state._fields, empty, state):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            yield (
                f"rule 1: {name} is {one.dtype} {list(one.shape)} in empty_state, {other.dtype} {list(other.shape)} after"
                " advance"
            )
        elif len(one) != LANES:
            yield f"rule 1: {name} has {len(one)} rows for {LANES} lanes; the first dimension is the lane"
        elif differentiable(one) and one.dtype not in (torch.float64, torch.complex128):
            yield f"rule 1: {name} is {one.dtype} in a float64 model; states follow the model's precision, at least float32"
    if any(x.requires_grad for x in empty):
        yield "rule 1: empty_state reads a parameter"
    if unknown := set(text.cell.memory_leaves) - set(state._fields):
        yield f"rule 3: memory_leaves names {', '.join(sorted(unknown))}, which the state does not have"


def _gradient(text: _Text) -> Iterator[str]:
    """Replay against one graph of the window, in training mode, with the same random draws."""
    cell, state, window = text.cell, text.mid_document(), text.window()
    scale = 1 / sum(int((segment.labels != IGNORE).sum()) for segment in window)
    cell.train()
    found, drift = _differentiated(
        cell, lambda: memory_replay(cell, window, state, loss_scale=scale, executor=TorchExecutor(cell, 1)).drift
    )
    expected, _ = _differentiated(cell, lambda: _full_bptt(cell, window, state, scale))
    if drift > 0:
        yield (
            f"rule 5: the replay does not repeat the rollout, states differ by {drift:.1e}: something random that is not"
            " torch's global generator, or an attribute or buffer that a call changes"
        )
    norm = torch.stack([x.norm() for x in expected]).norm().clamp(min=1e-300)
    error = max(float((x - y).abs().max() / norm) for x, y in zip(found, expected))
    if error > TOLERANCE and drift == 0:
        yield (
            f"rule 1: the gradient of the replay differs from that of full back-propagation by {error:.1e} of its norm:"
            " something besides the state goes from one segment to the next"
        )


def _differentiated(cell: nn.Module, run: Callable[[], Any]) -> tuple[list[Tensor], float]:
    cell.zero_grad()
    result = run()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in cell.parameters()]
    cell.zero_grad()
    return gradients, float(result)


def _full_bptt(cell: RecurrentCell[Any, Any], window: list[Segment], state: Any, scale: float) -> float:
    executor, features, loss = TorchExecutor(cell, 1), [], torch.zeros((), dtype=torch.float64)
    for t, segment in enumerate(window):
        made, state = executor.advance(t, segment, state)
        features.append(made)
        if not cell.carries_gradient:
            state = state._make(x.detach() for x in state)
    for t, segment in enumerate(window):
        loss = loss + executor.readout(t, 0, segment, features[t]).sum() * scale
    loss.backward()
    return 0.0


def _evaluation(text: _Text) -> Iterator[str]:
    window, state = text.window(), text.mid_document()
    found = []
    for seed in (1, 2):
        reseed(torch.device("cpu"), seed)
        found.append(text.losses(window, state)[0])
    if not torch.equal(*found):
        yield "rule 5: two evaluations of the same text differ; in evaluation mode nothing is random"


def _causality(text: _Text) -> Iterator[str]:
    state, segment = text.mid_document(), text.segment()

    @torch.no_grad()
    def logits(tokens: Tensor, training: bool) -> Tensor:
        text.cell.train(training)
        reseed(torch.device("cpu"), 0)
        changed = segment._replace(tokens=tokens)
        features, _ = text.cell("advance", changed, state)
        return text.cell.logits(changed, features)

    for training, position in product((False, True), sorted({1, text.size // 2, text.size - 1} - {0, text.size})):
        other = segment.tokens.clone()
        other[:, position:] = (other[:, position:] + 1) % text.cell.vocab_size
        found, expected = (logits(tokens, training)[:, :position] for tokens in (other, segment.tokens))
        if (leak := _difference(found, expected)) > TOLERANCE:
            yield (
                f"logits: a token sees later ones{_mode(training)}: changing tokens from position {position} on moves logits"
                f" before it by {leak:.1e}"
            )
            return


def _lanes(text: _Text) -> Iterator[str]:
    window, states = text.window(), [text.mid_document() for _ in range(2)]
    others = [
        segment._replace(tokens=torch.cat([segment.tokens[:1].flip(1), segment.tokens[1:]])) for segment in window
    ]
    mixed = concatenate([select_rows(states[1], slice(0, 1)), select_rows(states[0], slice(1, None))])
    for training in (False, True):
        one = text.losses(window, states[0], training=training)[0]
        other = text.losses(others, mixed, training=training)[0]
        if (leak := _difference(one[:, 1:], other[:, 1:])) > TOLERANCE:
            yield (
                f"rule 1: lanes see one another{_mode(training)}: other text on lane 0 moves losses of the others by"
                f" {leak:.1e}"
            )
            return


def _buffers(text: _Text) -> Iterator[str]:
    """Such as running statistics, which training itself need not read."""
    state = text.mid_document()
    before = {name: buffer.clone() for name, buffer in text.cell.named_buffers()}
    text.losses(text.window(), state, training=True)
    for name, buffer in text.cell.named_buffers():
        if not torch.equal(buffer, before[name]):
            yield f"rule 1: a forward updates the buffer {name}; nothing but the state goes from one call to the next"


def _padding(text: _Text) -> Iterator[str]:
    state = text.mid_document()
    lengths = torch.tensor([text.size, max(1, text.size // 2), 0])
    window = [text.segment(length=lengths), text.segment(length=torch.tensor([text.size, text.size, 0]))]
    rubbish = []
    for segment in window:
        padding = torch.arange(text.size) >= segment.length[:, None]
        rubbish.append(segment._replace(tokens=torch.where(padding, text.cell.vocab_size - 1, segment.tokens)))
    (one, after), (other, _) = text.losses(window, state), text.losses(rubbish, state)
    if (leak := _difference(one, other)) > TOLERANCE:
        yield f"rule 4: what stands in the padding changes losses by {leak:.1e}"
    if not all(torch.isfinite(x).all() for x in [one, *after] if differentiable(x)):
        yield "rule 4: a lane of length 0 leads to values that are not finite"
    if one[torch.stack([segment.labels for segment in window]) == IGNORE].any():
        yield "readout: nll is not 0 where the label is IGNORE"


def _reset(text: _Text) -> Iterator[str]:
    window = [text.segment(reset=True), text.segment()]
    one, other = (text.losses(window, text.mid_document())[0] for _ in range(2))
    if (leak := _difference(one, other)) > TOLERANCE:
        yield f"rule 2: a new document starts, and the state before it still changes losses by {leak:.1e}"


def _memory_leaves(text: _Text) -> Iterator[str]:
    state, strange = text.mid_document(), text.mid_document()
    exchanged = state._replace(**{leaf: getattr(strange, leaf) for leaf in text.cell.memory_leaves})
    window = [text.segment(reset_memory=True), text.segment()]
    if (leak := _difference(text.losses(window, state)[0], text.losses(window, exchanged)[0])) > TOLERANCE:
        yield f"rule 3: reset_memory leaves something of {', '.join(text.cell.memory_leaves)}: losses change by {leak:.1e}"


@torch.no_grad()
def _generation(text: _Text) -> Iterator[str]:
    cell, state, segment = text.cell.eval(), text.mid_document(), text.segment()
    features, after = cell("advance", segment, state)
    expected = cell.logits(segment, features)
    cache, pieces = cell.open(state, segment.reset), []
    for start in range(0, text.size, 2):
        logits, cache = cell.extend(segment.tokens[:, start : start + 2], cache)
        pieces.append(logits)
    if (gap := _difference(torch.cat(pieces, 1), expected)) > 1e-6:
        yield f"extend: its logits differ from those of advance and logits by {gap:.1e}"
    closed = cell.close(cache)
    gap = max((_difference(x, y) for x, y in zip(closed, after) if differentiable(x) and x.numel()), default=0.0)
    if gap > 1e-6:
        yield f"close: its state differs from that of advance by {gap:.1e}"


def _parameters(text: _Text) -> Iterator[str]:
    """ZeRO-3's rule: outside the forward of the module that owns it, a parameter is empty."""
    state, window, cell = text.mid_document(), text.window(), text.cell
    expected, _ = text.losses(window, state)
    text.cell = copy.deepcopy(cell)
    hide_parameters(text.cell)
    try:
        found, _ = text.losses(window, state)
        problem = (
            "" if torch.equal(found, expected) else f"losses move by {_difference(found, expected):.1e} without it"
        )
    except (RuntimeError, IndexError) as error:
        problem = str(error).splitlines()[0]
    text.cell = cell
    if problem:
        yield f"rule 6: a parameter is read outside the forward of its own module: {problem}"


def hide_parameters(cell: nn.Module) -> None:
    """Empty every parameter outside the forward of the module that owns it, as ZeRO-3 does."""
    for module in cell.modules():
        owned = {name: parameter.detach().clone() for name, parameter in module.named_parameters(recurse=False)}

        def show(module: nn.Module, inputs: Any, owned: dict[str, Tensor] = owned) -> None:
            for name, value in owned.items():
                getattr(module, name).data = value

        def hide(module: nn.Module, inputs: Any = None, output: Any = None, owned: dict[str, Tensor] = owned) -> None:
            for name, value in owned.items():
                getattr(module, name).data = value.new_empty(0)

        if owned:
            module.register_forward_pre_hook(show)
            module.register_forward_hook(hide)
            hide(module)


def _mode(training: bool) -> str:
    return " in training mode" if training else ""


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max()) if one.numel() else 0.0
