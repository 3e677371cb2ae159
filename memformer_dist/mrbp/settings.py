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
        description="N, segments a window: the horizon of back-propagation and the tokens of a step; an integer, or a"
        " schedule by step or by a metric (curriculum.py)"
    )
    readout_group: Annotated[
        Annotated[PositiveInt, Tag("<number>")] | Annotated[Literal["auto"], Tag("<auto>")],
        Discriminator(
            _number_or_auto, custom_error_type="readout_group", custom_error_message='expected an integer or "auto"'
        ),
    ] = Field(
        1,
        description="C, segments whose readout runs as one batch; activations of C are alive. More than 1 fills a GPU"
        " that has few lanes, and under ZeRO-3 gathers the readout's parameters N/C times; auto: as many as the free"
        " memory of the device holds, measured before the first step and kept for the run",
    )
    readout_parts: PositiveInt = Field(
        1,
        description="parts that a segment's readout is worked through in, lanes after lanes, where activations do not fit"
        " (readout_group 1)",
    )
    lanes_per_group: PositiveInt | None = Field(
        None, description="lanes of a rank worked on at once; null: all of them"
    )
    replay: bool = Field(
        True,
        description="false: no gradient flows from a segment to the one before; segments are run in order, without replay:"
        " the control of every claim that a memory helps",
    )
    state_store: Store = Field(
        "device",
        description="where a window's N states wait for the replay; host: pinned memory of the host, for windows whose"
        " states (mrbp/state_bytes) do not fit beside the activations",
    )
    reduce: Reduce = Field(
        "window",
        description="window: one reduction a step, each rank holds one whole gradient; segment: at every backward,"
        " about N times the bytes, gradients stay sharded (needs ZeRO 2 or 3): where a whole gradient does not fit",
    )
    keep_gathered: Keep = Field(
        "all",
        description="ZeRO-3: all: advance's parameters are gathered once a window, the readout's once a group, the"
        " fewest bytes on the wire; readout: only the latter, where both do not fit; none: every module at every use",
    )
