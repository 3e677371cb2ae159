"""`mrbp.readout_group: "auto"`: how many segments' readouts to run as one batch, from what one takes and what is free.

Until its readout goes backward, a group of C segments keeps C graphs of `advance` and one graph of `readout` over C times the
lanes. That is where the memory of a window peaks:

    peak = what is held in any case + group + C x segment

`footprint` finds both terms by running one segment with gradient and adding up what autograd would save for the backward: what
each advance saves, and what the readout saves for each further segment; the tensors on the cut between the two halves and
their gradients; and the largest tensor twice (usually the logits: the loss's backward makes the gradient of its output, then
that of its input). Nothing is kept and nothing goes backward, so that measuring takes less memory than training on one
segment. Parameters are held in any case, but their bf16 copies count: those of `advance` once per segment, because each has
a graph of its own, those of `readout` once per group.

On a CPU the peak grows by 0.93 to 1.01 of this sum per segment if freed memory is returned at once, and by up to 1.2, with
small tensors 1.34, under malloc's default, which keeps some of it (docs/mrbp.md). Hence SAFETY.

Not everything is allocated before the first step. What can be computed is subtracted from the free memory (`reserved`). For
the rest, half of the remainder is left alone (SHARE): fragmentation, workspaces of kernels, buckets of the collectives,
modules that ZeRO-3 gathers, prefetched segments, the larger batch of evaluation.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from memformer_dist.host_memory import free_bytes
from memformer_dist.mrbp.replay import as_leaves
from memformer_dist.segment import Segment, Tensors, concatenate, differentiable
from memformer_dist.world import World

SAFETY = 1.25  # bytes of the allocator for each byte of tensors
SHARE = 0.5  # of the free memory that a group may fill


class Choice(NamedTuple):
    """What was chosen, and from which figures; the same on every rank."""

    readout_group: int  # segments
    segment_bytes: int  # that each further segment of a group adds to the peak, times SAFETY
    free_bytes: int  # on the rank that has the least, after `reserved`


class Footprint(NamedTuple):
    segment: int  # bytes that each segment of a group adds to the peak
    group: int  # bytes of a group of any size: the bf16 copies of the readout's parameters


def choose_readout_group(
    forward: Callable[..., Any],
    module: nn.Module,
    segment: Segment,
    state: Tensors,
    world: World,
    *,
    window: int,
    reserved: int = 0,
) -> Choice:
    """Run one segment with gradient and see how many of its kind fit. A collective call; leaves no trace in the module.

    Args:
        forward: runs a part of the cell; `module` itself, or the engine that holds it.
        segment, state: of a lane group of the size used in training, on the device; their values do not matter.
        window: segments of the longest window to come.
        reserved: bytes that training will hold besides activations and that are not allocated yet.
    """
    measured = footprint(forward, module, segment, state)
    free = free_bytes(world.device) - reserved - measured.group
    segment_bytes = math.ceil(SAFETY * measured.segment)
    # The smallest number over the ranks, from a sum: each fills in its own place.
    everyone = world.all_reduce_sum([free if rank == world.rank else 0 for rank in range(world.size)])
    free = max(0, int(min(everyone)))
    return Choice(even_group(window, int(SHARE * free) // segment_bytes), segment_bytes, free)


def even_group(window: int, room: int) -> int:
    """The smallest group that works a window through in no more groups than `room` segments at a time would."""
    groups = math.ceil(window / max(1, room))
    return math.ceil(window / groups)


def footprint(forward: Callable[..., Any], module: nn.Module, segment: Segment, state: Tensors) -> Footprint:
    """What a segment takes in training, on `segment`'s device. A collective call under ZeRO-3: three forwards."""
    device = segment.tokens.device
    parameters, training = list(module.parameters()), module.training
    module.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        with saved_storages(parameters) as advance:
            features, output = forward("advance", segment, as_leaves(state))
        keep(advance, [*features, *output])  # memory replay holds them until the segment's backward
        readouts = []
        for segments in (1, 2):
            leaves = as_leaves(features._make(torch.cat([x.detach()] * segments) for x in features))
            with saved_storages(parameters) as readout:
                nll = forward("readout", concatenate([segment] * segments), leaves)
            keep(readout, [*leaves, nll])
            readouts.append(readout)
    module.train(training)
    one, two = (sum(readout.values()) for readout in readouts)
    gradients = sum(x.nbytes for x in features if differentiable(x))
    # Of what grows with the lanes; the largest tensor of twice the lanes is two of a segment's.
    transients = max(Counter(readouts[1].values()) - Counter(readouts[0].values()), default=0)
    return Footprint(segment=sum(advance.values()) + two - one + gradients + transients, group=max(0, 2 * one - two))


@contextlib.contextmanager
def saved_storages(parameters: Sequence[Tensor]) -> Iterator[dict[StorageWeakRef, int]]:
    """Bytes of each storage, those of `parameters` apart, that graphs built inside would keep for the backward.

    The graphs keep nothing and cannot go backward. Storages are identified by weak references, because the memory of a freed
    one is reused by the next. Parameters are looked up at each use: under ZeRO-3 they have storage only while their module
    runs.
    """
    sizes: dict[StorageWeakRef, int] = {}

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if not any(parameter.untyped_storage()._cdata == storage._cdata for parameter in parameters):
            keep(sizes, [tensor])

    def unpack(_) -> Tensor:
        raise AssertionError("this graph was built to be measured, not to go backward")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield sizes


def keep(sizes: dict[StorageWeakRef, int], tensors: Iterable[Tensor]) -> None:
    """Count the storages of `tensors` among `sizes`, each once."""
    for storage in (tensor.untyped_storage() for tensor in tensors):
        sizes[StorageWeakRef(storage)] = storage.nbytes()
