"""Drift: how far the states that a replay recomputes are from those of the rollout, which it should repeat.

A cell that keeps the rules repeats it bit by bit, or up to rounding where kernels are not deterministic. Where it does not, the
gradient is not that of what was computed, and nothing else shows it: the loss falls all the same. Hence `mrbp.drift_limit`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memformer_dist.segment import Tensors

ADVICE = (
    "A cell may draw from torch's global generators alone, and may keep nothing but its state from one call to the next"
    " (rules 1 and 5 in memformer_dist/cells/base.py): no numpy or random, no generator of its own, no attribute, no buffer"
    " that a call updates. memformer_dist.check_cell(cell) names the rule that it breaks"
)


class Drift:
    """Compares the states of a window of N segments, L leaves each, one after the other. Waits for nothing.

    Args:
        state: one of them.
    """

    def __init__(self, segments: int, state: Tensors):
        double = any(x.dtype in (torch.float64, torch.complex128) for x in state)
        self._dtype = torch.float64 if double else torch.float32
        # [largest difference | norm of the difference | norm, N, L]
        self._figures = torch.zeros(3, segments, len(state), dtype=self._dtype, device=state[0].device)

    def compare(self, t: int, recomputed: Tensors, stored: Tensors) -> None:
        """The states behind segment `t`: all leaves count, also those that carry no gradient.

        Numbers that are finite in neither are no difference; such a step is skipped in any case.
        """
        for leaf, (found, expected) in enumerate(zip(recomputed, stored)):
            if found.numel():
                difference, size = _compared(found.detach(), expected.detach(), self._dtype)
                for number, (x, order) in enumerate(((difference, torch.inf), (difference, 2), (size, 2))):
                    self._figures[number, t, leaf] = torch.linalg.vector_norm(x, order, dtype=self._dtype)

    @property
    def largest(self) -> Tensor:
        """The largest absolute difference over all states, a scalar."""
        return self._figures[0].max()

    @property
    def relative(self) -> Tensor:
        """[N, L]: the norm of the difference behind each segment over the largest norm of that leaf in the window."""
        _, differences, sizes = self._figures
        return torch.where(differences == 0, 0.0, differences / sizes.amax(0))


def _compared(found: Tensor, expected: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """found - expected, and expected, in real floating-point numbers."""
    if found.is_complex():
        found, expected = torch.view_as_real(found), torch.view_as_real(expected)
    if not found.is_floating_point():  # subtracted first: a float does not tell large integers apart
        return (found.long() - expected.long()).to(dtype), expected.to(dtype)
    found, expected = (x.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf) for x in (found, expected))
    return (found - expected).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), expected


def exceeds(relative: float, limit: float) -> bool:
    """Also where it is not a number."""
    return not relative <= limit


def drift_problem(relative: Tensor, leaves: Sequence[str], limit: float) -> str | None:
    """What is wrong with the largest entry of Drift.relative, and the advice; None if nothing is."""
    if not exceeds(float(relative.max()), limit):
        return None
    t, leaf = divmod(int(relative.nan_to_num(nan=torch.inf).argmax()), len(leaves))
    return (
        f"mrbp.drift_limit: the replay does not repeat the rollout: {leaves[leaf]} behind segment {t} of the window differs by"
        f" {float(relative[t, leaf]):.2g} of its size, expected at most {limit:g}: the gradient is not that of the loss. {ADVICE}"
    )
