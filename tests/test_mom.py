"""Mixture-of-Memories in chunks, over all tokens, against each memory reading its own tokens alone, one after the other."""

import pytest
import torch
import torch.nn.functional as F

from memformer_dist.cells.mom import MoMConfig
from memformer_dist.mrbp.executor import TorchExecutor
from memformer_dist.mrbp.replay import memory_replay
from memformer_dist.segment import IGNORE
from tests.helpers.recurrences import (
    LENGTHS,
    assert_follows,
    build,
    convolved,
    delta_recurrence,
    differences,
    ragged_window,
)
from tests.helpers.toy import VOCABULARY, gradients, relative_error

CONFIG = MoMConfig(
    width=8, heads=2, feed_forward=12, layers=2, memories=3, active=2, dropout=0.0, init_std=0.3, balance=0.2, chunk=4
)


def routed(mixer, mixed):
    """[T, D] -> for each token, the weights of the memories that are open to it, by their number."""
    active, chances = mixer.router.active, F.linear(mixed, mixer.router.weight).softmax(1)
    found = []
    for row in chances:
        largest = sorted(range(len(row)), key=lambda number: -row[number].item())[:active]
        found.append({number: row[number] / sum(row[other] for other in largest) for number in largest})
    return found, chances


def read_document(cell, *, mistake=None):
    """-> the reference of tests/helpers/recurrences.py: the whole model, one token after the other."""
    heads, size, shared = cell.config.heads, cell.config.head_size, cell.config.memories
    projections = cell.config.memories + 1

    def reference(segments):
        hidden = cell.embedding(torch.cat(segments))
        for mixer, block in zip(cell.mixers, cell.blocks, strict=True):
            mixed = convolved(mixer.norm(hidden), mixer.convolution.weight)
            weights, _ = routed(mixer, mixed)
            unit = lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-3)  # noqa: E731
            queries = unit(F.silu(mixer.query(mixed)).view(-1, heads, size))
            keys, values = F.silu(mixer.key_value(mixed)).view(-1, 2, projections, heads, size).unbind(1)
            rate, beta = mixer.gates.projection(mixed).chunk(2, 1)
            log_decay = (-mixer.gates.log_rate.exp() * F.softplus(rate + mixer.gates.bias)).view(-1, projections, heads)
            beta = beta.sigmoid().view(-1, projections, heads)
            read = torch.zeros(len(hidden), heads, size, dtype=hidden.dtype)
            for memory in range(projections):
                own = [t for t, open_to in enumerate(weights) if memory == shared or memory in open_to]
                if mistake == "every memory is written by all":
                    own = list(range(len(hidden)))
                if not own or (memory == shared and mistake == "nothing is shared"):
                    continue
                for head in range(heads):
                    found, _ = delta_recurrence(
                        queries[own, head],
                        unit(keys[own, memory, head]),
                        values[own, memory, head],
                        log_decay[own, memory, head],
                        beta[own, memory, head],
                        torch.zeros(size, size, dtype=hidden.dtype),
                    )
                    for t, row in zip(own, found, strict=True):
                        weight = 1.0 if memory == shared else weights[t].get(memory, 0.0)
                        chosen = torch.zeros_like(read)
                        chosen[t, head] = 1.0
                        read = read + chosen * weight * row
            scale = (read.square().mean(2, keepdim=True) + 1e-5).rsqrt()
            gated = (read * scale * block.mix.read_norm.weight).flatten(1) * F.silu(block.mix.gate(block.norm(hidden)))
            hidden = hidden + block.mix.output(gated)
            hidden = hidden + block.feed_forward(block.feed_forward_norm(hidden))
        return F.linear(cell.norm(hidden), cell.embedding.weight)

    return reference


def test_segments_equal_memories_that_read_their_own_tokens_alone():
    assert_follows(build(CONFIG), read_document)


@pytest.mark.parametrize("mistake", ["every memory is written by all", "nothing is shared"])
def test_another_mixture_is_told_apart(mistake):
    cell = build(CONFIG)
    assert min(differences(cell, read_document(cell, mistake=mistake))) > 1e-3


@pytest.mark.parametrize("active", [1, 3])
def test_one_memory_per_token_and_all_of_them(active):
    cell = build(CONFIG.model_copy(update={"active": active, "layers": 1}))
    parameters = dict(cell.named_parameters())
    if active == 1:  # then the weight is 1 whatever the router says: it has no gradient
        del parameters["mixers.0.router.weight"]
    assert_follows(cell, read_document, list(parameters.values()))


def penalised(cell, window, seen, *, balance):
    """The gradient of the window's losses and, by hand, `balance` times the load-balancing loss of each lane's tokens."""
    cell.zero_grad()
    state, total = cell.empty_state(len(window[0].length)), 0.0
    for segment in window:
        hooks, mixed = [], []
        for mixer in cell.mixers:
            hooks.append(mixer.convolution.register_forward_hook(lambda module, given, made: mixed.append(made[0])))
        features, state = cell("advance", segment, state)
        for hook in hooks:
            hook.remove()
        nll = F.cross_entropy(cell.logits(segment, features).transpose(1, 2), segment.labels, reduction="none")
        seen.append(nll.detach())
        total = total + nll.sum()
        for lane, length in enumerate(segment.length.tolist()):
            for mixer, inputs in zip(cell.mixers, mixed, strict=True):
                weights, chances = routed(mixer, inputs[lane, :length])
                for memory in range(cell.config.memories if length else 0):
                    load = sum(memory in row for row in weights) / (length * cell.config.active)
                    loss = cell.config.memories * load * chances[:, memory].mean()
                    total = total + balance * length * loss / cell.config.layers
    (total * 0.01).backward()
    return gradients(cell)


def test_the_load_balancing_loss_has_its_gradient_and_leaves_the_losses_alone():
    """By replay, against the loss computed by hand from the routes, per lane, segment and layer."""
    cell = build(CONFIG)
    window, generator = [], torch.Generator().manual_seed(4)
    for segment in ragged_window():
        labels = torch.randint(VOCABULARY, segment.tokens.shape, generator=generator)
        padding = torch.arange(labels.shape[1]) >= segment.length[:, None]
        window.append(segment._replace(labels=labels.masked_fill(padding, IGNORE)))
    found, losses = {}, []
    cell.zero_grad()
    memory_replay(
        cell,
        window,
        cell.empty_state(3),
        loss_scale=0.01,
        executor=TorchExecutor(cell, 0),
        observe=lambda t, segment, nll: found.update({t: nll}),
    )
    replayed = gradients(cell)
    assert relative_error(replayed, penalised(cell, window, losses, balance=cell.config.balance)) <= 1e-12
    assert all(torch.allclose(found[t], losses[t], rtol=1e-12, atol=1e-12) for t in range(len(LENGTHS)))
    assert relative_error(replayed, penalised(cell, window, [], balance=0.0)) > 1e-3


def test_an_even_load_has_the_smallest_load_balancing_loss():
    """1 where each memory is opened equally often, M / k where the same k are always opened."""
    cell = build(CONFIG)
    router, real = cell.mixers[0].router, torch.ones(1, 3, dtype=torch.bool)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, :3] = 50 * torch.eye(3, dtype=torch.float64)
        pairs = [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
        hidden = F.pad(torch.tensor([pairs], dtype=torch.float64), (0, 5))
        assert float(router(hidden, real)[2]) == pytest.approx(1.0)
        assert float(router(hidden[:, :1].expand(1, 3, 8), real)[2]) == pytest.approx(1.5)


def test_more_active_memories_than_there_are_is_a_mistake():
    with pytest.raises(ValueError, match="active: found 5, expected at most memories \\(4\\)"):
        MoMConfig(active=5)
