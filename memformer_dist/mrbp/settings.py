"""The section `mrbp` of a configuration: how a window is replayed, and what it may take."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag

from memformer_dist.curriculum import WindowPlan
from memformer_dist.section import Section

Store = Literal["device", "host"]
Reduce = Literal["window", "segment"]
Keep = Literal["none", "readout", "all"]


def _number_or_auto(value: Any) -> str | None:
    return "<number>" if isinstance(value, (int, float)) else "<auto>" if value == "auto" else None


class MrbpConfig(Section):
    window: WindowPlan = Field(
        description="N, segments per BPTT window, which is also what one step trains on; an integer, or a plan by step or by"
        " a metric"
    )
    readout_group: Annotated[
        Annotated[PositiveInt, Tag("<number>")] | Annotated[Literal["auto"], Tag("<auto>")],
        Discriminator(
            _number_or_auto, custom_error_type="readout_group", custom_error_message='expected an integer or "auto"'
        ),
    ] = Field(
        1,
        description="C, segments whose readout runs as one batch, at the price of C segments' activations. More than 1 fills"
        " a GPU that has few lanes, and under ZeRO-3 gathers the readout's parameters N/C times per window; auto: as many as"
        " fit into the device's free memory, measured before the first step and kept for the run",
    )
    readout_parts: PositiveInt = Field(
        1,
        description="parts into which the lanes of a readout are cut, one after the other, if its activations do not fit"
        " (with readout_group 1)",
    )
    lanes_per_group: PositiveInt | None = Field(
        None, description="lanes of a rank that are worked on at once; a divisor of the rank's lanes; null: all of them"
    )
    replay: bool = Field(
        True,
        description="false: no gradient flows from a segment to the one before; segments run in order, without replay: the"
        " control of every claim that a memory helps",
    )
    state_store: Store = Field(
        "device",
        description="where a window's N states wait for the replay; host: pinned memory of the host, for windows whose"
        " states (mrbp/state_bytes) do not fit beside the activations",
    )
    reduce: Reduce = Field(
        "window",
        description="window: one reduction per step, every rank holds one whole gradient; segment: a reduction at every"
        " backward, about N times the bytes, and gradients stay sharded (needs ZeRO 2 or 3): if a whole gradient does not fit",
    )
    keep_gathered: Keep = Field(
        "all",
        description="what ZeRO-3 keeps gathered; all: advance's parameters for the window and the readout's for a readout"
        " group, the fewest bytes between ranks; readout: only the latter, if both do not fit; none: each module gathers"
        " for itself at every use",
    )
