"""One measurement of benchmarks/mrbp.py, in a process of its own: one method on one window.

    python -m benchmarks.mrbp_worker '{"layout": {...}, "method": "plain", ...}'    a Measurement; prints a line of JSON

Timed are whole windows, forward and backward, from a given starting state to gradients added to those that are there;
no optimiser. What a user of the method would write is what runs: BPTT and checkpointing draw dropout from torch's
running random state, which checkpointing saves and restores; memory replay seeds every call, as the engine does.

Memory is the peak of one window over what was there before it (parameters and their gradients). On a GPU the allocator
tells. On a CPU it is the kernel's high-water mark of resident memory, and that is what is alive only if freed memory
goes back to the system at once. By its defaults glibc keeps freed blocks of up to 32 MiB in its heap, as many as
fragmentation likes: 150 MiB too much for one of 480. So the process is started under RETURN_FREED_MEMORY, where a block
of 16 KiB and more is a mapping of its own; then the mark is within 3 % of the sum of live tensors. That costs page
faults, which is why times are taken in other processes, under the defaults.
"""

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from memformer_dist.cells.memformer import Memformer, MemformerConfig
from memformer_dist.mrbp.executor import TorchExecutor
from memformer_dist.mrbp.replay import as_leaves, inner_product, memory_replay
from memformer_dist.mrbp.states import HostStates
from memformer_dist.segment import Segment, concatenate

SEED = 1
PARTS = 2  # of a readout, half of the lanes each
BOS = 2
RETURN_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "16384",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
}


@dataclass(frozen=True)
class Layout:
    """A model and the windows it is trained on."""

    name: str
    model: dict[str, Any]  # fields of MemformerConfig
    vocabulary: int
    lanes: int
    length: int  # S
    segments: int  # N
    group: int  # C of the methods that batch the readout


@dataclass(frozen=True)
class Measurement:
    layout: Layout
    method: str  # of METHODS
    device: str
    steps: int  # timed windows; 0: none
    memory: bool
    host_states: bool = False  # memory replay's states in host memory
    state_stride: int = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Measurement":
        fields = json.loads(text)
        return cls(**fields | {"layout": Layout(**fields["layout"])})


class RandomWindow:
    """A window of random tokens that makes each segment when it is asked for, the same every time."""

    start = 0  # the engine seeds dropout by it

    def __init__(self, layout: Layout, segments: int, device: torch.device):
        self.layout, self.segments, self.device = layout, segments, device

    def __len__(self) -> int:
        return self.segments

    def __getitem__(self, t: int) -> Segment:
        lanes, length = self.layout.lanes, self.layout.length
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + t)
        tokens = torch.randint(4, self.layout.vocabulary, (lanes, length + 1), generator=generator)
        whole, none = torch.full((lanes,), length), torch.zeros(lanes, dtype=torch.bool)
        segment = Segment(
            tokens[:, :-1], tokens[:, 1:], whole, none | (t == 0), none, torch.zeros_like(whole), whole * t
        )
        return segment.to(self.device)


# ---------------------------------------------------------------------------------------------------------- the methods


def bptt(cell: Memformer, window: RandomWindow, state: NamedTuple, loss_scale: float, group: int = 1) -> None:
    """Full back-propagation through time: one graph, one backward; the readout of `group` segments as one batch."""
    losses, waiting = [], []
    for t in range(len(window)):
        segment = window[t]
        features, state = cell("advance", segment, state)
        waiting.append((segment, features))
        if len(waiting) == group or t == len(window) - 1:
            segments, made = zip(*waiting, strict=True)
            features = (
                features._make(torch.cat(column) for column in zip(*made, strict=True)) if group > 1 else features
            )
            losses.append(cell("readout", concatenate(segments), features).sum())
            waiting = []
    (torch.stack(losses).sum() * loss_scale).backward()


def bptt_with_checkpoints(cell: Memformer, window: RandomWindow, state: NamedTuple, loss_scale: float) -> None:
    """The same with torch's gradient checkpointing: only the states between segments are kept, each one runs twice."""

    def run(segment: Segment, state: NamedTuple) -> tuple[Tensor, NamedTuple]:
        features, state = cell("advance", segment, state)
        return cell("readout", segment, features).sum(), state

    losses = []
    for t in range(len(window)):
        loss, state = checkpoint(run, window[t], state, use_reentrant=False, preserve_rng_state=True)
        losses.append(loss)
    (torch.stack(losses).sum() * loss_scale).backward()


def replay(
    cell: Memformer,
    window: RandomWindow,
    state: NamedTuple,
    loss_scale: float,
    group: int = 1,
    parts: int = 1,
    states: HostStates | None = None,
    stride: int = 1,
) -> None:
    memory_replay(
        cell,
        window,
        state,
        loss_scale=loss_scale,
        executor=TorchExecutor(cell, SEED),
        readout_group=group,
        readout_parts=parts,
        states=states,
        state_stride=stride,
    )


def alive_segments(layout: Layout, method: str) -> int:
    """Segments whose activations are alive at once, 2 at least; a window of as many touches all the memory there is."""
    return {"bptt": layout.segments, "bptt_grouped": layout.segments, "grouped": layout.group}.get(method, 2)


METHODS = ("bptt", "bptt_grouped", "checkpoint", "plain", "parts", "grouped")


def method_of(measurement: Measurement) -> Callable[[Memformer, RandomWindow, NamedTuple, float], None]:
    group, stride = measurement.layout.group, measurement.state_stride
    states = HostStates(torch.device(measurement.device)) if measurement.host_states else None
    return {
        "bptt": bptt,
        "bptt_grouped": lambda *arguments: bptt(*arguments, group=group),
        "checkpoint": bptt_with_checkpoints,
        "plain": lambda *arguments: replay(*arguments, states=states, stride=stride),
        "parts": lambda *arguments: replay(*arguments, parts=PARTS, states=states),
        "grouped": lambda *arguments: replay(*arguments, group=group, states=states),
    }[measurement.method]


def new_cell(layout: Layout, device: torch.device) -> Memformer:
    torch.manual_seed(SEED)
    config = MemformerConfig(**layout.model)
    cell = Memformer(config, vocab_size=layout.vocabulary, bos_id=BOS, segment_length=layout.length).to(device)
    for parameter in cell.parameters():
        parameter.grad = torch.zeros_like(parameter)  # there from the start, so that the peak is the activations'
    return cell


# ------------------------------------------------------------------------------------------------------- measurements


def measure(measurement: Measurement) -> dict[str, Any]:
    """-> seconds and processor_s of every timed window; where memory is asked for, peak_bytes over the baseline,
    resident_bytes at the peak, state_bytes of all the window's states, and memory_step_s."""
    layout, device = measurement.layout, torch.device(measurement.device)
    cell, run = new_cell(layout, device), method_of(measurement)

    def step(segments: int) -> None:
        window = RandomWindow(layout, segments, device)
        run(cell, window, cell.empty_state(layout.lanes), 1 / (layout.lanes * layout.length * segments))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def clear() -> None:
        for parameter in cell.parameters():
            parameter.grad.zero_()

    torch.manual_seed(SEED)
    step(alive_segments(layout, measurement.method))
    result: dict[str, Any] = {"seconds": [], "processor_s": []}
    for _ in range(measurement.steps):
        clear()
        began, processor_began = time.perf_counter(), time.process_time()
        step(layout.segments)
        result["seconds"].append(time.perf_counter() - began)
        result["processor_s"].append(time.process_time() - processor_began)
    if measurement.memory:
        clear()
        began = time.perf_counter()
        result["peak_bytes"], result["resident_bytes"] = peak(lambda: step(layout.segments), device)
        result["memory_step_s"] = time.perf_counter() - began
        result["state_bytes"] = sum(leaf.nbytes for leaf in cell.empty_state(layout.lanes)) * layout.segments
    return result


def peak(step: Callable[[], None], device: torch.device) -> tuple[int, int]:
    """Run it: (bytes at the peak over those before, bytes at the peak)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        highest = torch.cuda.max_memory_allocated(device)
        return highest - before, highest
    assert os.environ.get("MALLOC_MMAP_THRESHOLD_"), "start this process under RETURN_FREED_MEMORY"
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    step()
    highest = resident("VmHWM")
    return highest - before, highest


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class SegmentFlops(NamedTuple):
    """Matrix products of one segment, as torch's counter sees them."""

    advance: int  # forward
    readout: int  # forward
    backward: int  # of both

    def of_window(self, method: str, segments: int) -> int:
        window = segments * sum(self)
        if method == "checkpoint":
            return window + segments * (self.advance + self.readout)
        return window if method.startswith("bptt") else window + (segments - 1) * self.advance


def count_flops(layout: Layout) -> SegmentFlops:
    """Counted on one lane of the real cell, and scaled up."""
    device = torch.device("cpu")
    one_lane = replace(layout, lanes=1)
    cell, segment = new_cell(one_lane, device), RandomWindow(one_lane, 2, device)[1]
    state = as_leaves(cell.empty_state(1))
    counts = []
    with FlopCounterMode(display=False) as counter:
        features, state = cell("advance", segment, state)
        counts.append(counter.get_total_flops())
        nll = cell("readout", segment, features)
        counts.append(counter.get_total_flops())
        (nll.sum() + inner_product((state, [torch.ones_like(x) for x in state]))).backward()
        counts.append(counter.get_total_flops())
    forward, both, whole = (count * layout.lanes for count in counts)
    return SegmentFlops(forward, both - forward, whole - both)


def gradient_errors(layout: Layout) -> dict[str, float]:
    """Largest difference of each method's gradient from BPTT's over its norm, in float64 without dropout."""
    device = torch.device("cpu")
    exact = replace(layout, model=layout.model | {"dropout": 0.0})
    gradients = {}
    for method in METHODS:
        cell = new_cell(exact, device).double()
        run = method_of(Measurement(exact, method, "cpu", 0, False))
        run(cell, RandomWindow(exact, exact.segments, device), cell.empty_state(exact.lanes), 1.0)
        gradients[method] = nn.utils.parameters_to_vector(parameter.grad for parameter in cell.parameters())
    expected = gradients.pop("bptt")
    return {method: float((found - expected).abs().max() / expected.norm()) for method, found in gradients.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(json.dumps(measure(Measurement.from_json(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
