"""Stable Hadamard Memory against its equations, one token and one entry of the memory at a time."""

import pytest
import torch
import torch.nn.functional as F

from memformer_dist.cells.hadamard import HadamardConfig
from tests.helpers.recurrences import assert_follows, build, differences, ragged_window, turned

CONFIG = HadamardConfig(width=8, heads=2, feed_forward=12, layers=2, dropout=0.0, init_std=0.3, calibrations=3)


def read_document(cell, *, mistake=None):
    """-> the reference of tests/helpers/recurrences.py, in evaluation mode: segment t has row t of the table."""
    heads, size = cell.config.heads, cell.config.head_size

    def attended(attention, inputs):
        queries, keys, values = attention.query_key_value(inputs).view(-1, 3, heads, size).unbind(1)
        rows = []
        for t in range(len(inputs)):
            for head in range(heads):
                scores = turned(keys[: t + 1, head]) @ turned(queries[: t + 1, head])[-1] / size**0.5
                rows.append(scores.softmax(0) @ values[: t + 1, head])
        return attention.output(torch.stack(rows).view(-1, heads * size))

    def calibrated(mixer, mean, number, head):
        """C [K, K] of one head: 1 + tanh(theta_i v_c(x*)_j)."""
        row = 0 if mistake == "always the first row" else number % cell.config.calibrations
        theta = mixer.calibration.table[row].view(heads, size)[head]
        along = mixer.calibration.projection(mean).view(heads, size)[head]
        return torch.stack([torch.stack([1 + torch.tanh(a * b) for b in along]) for a in theta])

    def layer(mixer, hidden, memories, number):
        """One segment [n, D] -> hidden, what each token reads [n, H, K], memories."""
        hidden = hidden + attended(mixer.attention, mixer.attention_norm(hidden))
        normed = mixer.norm(hidden)
        queries, keys, values = mixer.query_key_value(normed).view(-1, 3, heads, size).unbind(1)
        rates = mixer.rate(normed).sigmoid()
        share = lambda x: x.relu() / (1e-5 + x.relu().sum())  # noqa: E731
        reads, after = [], []
        for head, memory in enumerate(memories):
            calibration = calibrated(mixer, normed.mean(0), number, head)
            kept = memory if mistake == "no calibration" else memory * calibration
            for k, v, rate in zip(keys[:, head], values[:, head], rates[:, head], strict=True):
                kept = kept + (1.0 if mistake == "all tokens weigh alike" else rate) * torch.outer(v, share(k))
            source = kept if mistake == "read after the write" else memory
            reads.append(torch.stack([source @ share(q) for q in queries[:, head]]))
            after.append(kept)
        return hidden, torch.stack(reads, 1), after

    def read_out(block, hidden, read):
        scale = (read.square().mean(2, keepdim=True) + 1e-5).rsqrt()
        gated = (read * scale * block.mix.read_norm.weight).flatten(1) * F.silu(block.mix.gate(block.norm(hidden)))
        hidden = hidden + block.mix.output(gated)
        return hidden + block.feed_forward(block.feed_forward_norm(hidden))

    def reference(segments):
        nothing = torch.zeros(size, size, dtype=torch.float64)
        memories = [[nothing] * heads for _ in cell.mixers]
        logits = []
        for number, tokens in enumerate(segments):
            hidden = cell.embedding(tokens)
            for at, (mixer, block) in enumerate(zip(cell.mixers, cell.blocks, strict=True)):
                hidden, read, memories[at] = layer(mixer, hidden, memories[at], number)
                hidden = read_out(block, hidden, read)
            logits.append(F.linear(cell.norm(hidden), cell.embedding.weight))
        return torch.cat(logits)

    return reference


def test_segments_equal_the_equations():
    assert_follows(build(CONFIG), read_document)


@pytest.mark.parametrize(
    "mistake", ["no calibration", "always the first row", "all tokens weigh alike", "read after the write"]
)
def test_another_memory_is_told_apart(mistake):
    cell = build(CONFIG)
    assert min(differences(cell, read_document(cell, mistake=mistake))) > 1e-4


@torch.no_grad()
def test_rows_are_drawn_in_training_for_each_lane_and_segment():
    """The authors' program always takes the first row."""
    cell = build(CONFIG.model_copy(update={"layers": 1, "calibrations": 128})).train()
    drawn = []
    cell.mixers[0].calibration.register_forward_hook(lambda module, given, made: drawn.append(made))
    same = torch.ones(64, 8, dtype=torch.float64)  # the same mean for every lane: what differs is the row
    turn = torch.zeros(64, dtype=torch.int64)
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        cell.mixers[0].calibration(same, turn)
    assert len(drawn[0].unique(dim=0)) > 32 and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0], drawn[1])
    cell.eval()
    cell.mixers[0].calibration(same, turn)
    assert len(drawn[3].unique(dim=0)) == 1


@torch.no_grad()
def test_a_lane_that_has_run_dry_keeps_its_memory():
    """And a calibration of nothing is none: the mean of no tokens would still be multiplied in."""
    cell = build(CONFIG)
    window = ragged_window()
    state = cell.empty_state(3)
    for segment in window[:2]:
        _, state = cell("advance", segment, state)
    assert state.memory.abs().max() > 0
    _, after = cell("advance", window[2], state)  # its last lane is empty
    assert torch.equal(after.memory[2], state.memory[2]) and not torch.equal(after.memory[0], state.memory[0])
