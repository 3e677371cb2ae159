"""The section `mrbp` of a configuration: the BPTT window, and how time is traded against memory in its replay."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveInt, Tag

from memformer_dist.curriculum import WindowPlan
from memformer_dist.section import Section

Store = Literal["device", "host"]
Reduce = Literal["window", "segment"]
Keep = Literal["none", "readout", "all"]

# mrbp.drift_limit null, by training.precision. The rounding of all operations of an advance together is below 1e-5 and 2e-2.
DRIFT_LIMITS = {"fp32": 1e-3, "bf16": 5e-2, "bf16_parameters": 5e-2}


def _number_or_auto(value: Any) -> str | None:
    return "<number>" if isinstance(value, (int, float)) else "<auto>" if value == "auto" else None


class MrbpConfig(Section):
    window: WindowPlan = Field(
        description="N, segments per BPTT window: how far gradients reach, and how much text of every lane one step"
        " trains on; an integer, or a schedule by step or by a metric"
    )
    readout_group: Annotated[
        Annotated[PositiveInt, Tag("<number>")] | Annotated[Literal["auto"], Tag("<auto>")],
        Discriminator(
            _number_or_auto, custom_error_type="readout_group", custom_error_message='expected an integer or "auto"'
        ),
    ] = Field(
        1,
        description="C, segments whose readout (decoder, head, loss) runs as one batch; needs the activations of C"
        " segments. More than 1 fills a GPU that has few lanes, and under ZeRO-3 gathers the readout's parameters N/C"
        " times instead of N; auto: as many as the free memory allows, measured before the first step and then kept",
    )
    readout_parts: PositiveInt = Field(
        1,
        description="split the readout of a segment into this many parts along the lanes, if its activations do not"
        " fit; needs readout_group 1",
    )
    lanes_per_group: PositiveInt | None = Field(
        None,
        description="lanes of a rank that are worked on at once (the micro-batch; gradients are accumulated over the"
        " groups); divides the lanes of a rank; null: all of them",
    )
    replay: bool = Field(
        True,
        description="false: no gradient flows from a segment to the one before, and segments run in order without"
        " replay: the control for every claim that learning through the memory helps",
    )
    state_store: Store = Field(
        "device",
        description="where the N states of a window are kept until the replay; host: in pinned memory of the host, for"
        " windows whose states (metric mrbp/state_bytes) do not fit beside the activations",
    )
    state_stride: PositiveInt = Field(
        1,
        description="store every state_stride-th of the N states, and roll out the segments between them again: at most"
        " one more advance per segment, for N / state_stride + state_stride states instead of N; for states that are too"
        " large to be kept N times",
    )
    reduce: Reduce = Field(
        "window",
        description="when gradients are reduced over the ranks. window: once per step, while each rank holds a whole"
        " gradient; segment: at every backward, which sends about N times the bytes but keeps gradients sharded, for"
        " models whose gradient does not fit (needs ZeRO 2 or 3)",
    )
    keep_gathered: Keep = Field(
        "all",
        description="which parameters stay gathered under ZeRO-3. all: those of advance for a window, those of the"
        " readout for a readout group, which sends the fewest bytes; readout: the latter alone, if both do not fit; none:"
        " every module is gathered for every use",
    )
    drift_limit: NonNegativeFloat | None = Field(
        None,
        description="the run stops where a state of the replay differs from the rollout's by more than this share of its"
        " size (the norms of both): the cell breaks a rule, and gradients are wrong; null: 0.001 with training.precision"
        " fp32, 0.05 with bf16, beyond what kernels that are not deterministic add. 0: not by a bit; a large number: never",
    )
