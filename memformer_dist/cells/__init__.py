"""The cells there are. `model.cell` in a configuration names one of them; docs/adding_a_cell.md says how to add another."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from memformer_dist.cells.armt import ArmtConfig
from memformer_dist.cells.gated_delta import GatedDeltaConfig
from memformer_dist.cells.hadamard import HadamardConfig
from memformer_dist.cells.hmt import HmtConfig
from memformer_dist.cells.lamemo import LaMemoConfig
from memformer_dist.cells.memformer import MemformerConfig
from memformer_dist.cells.mom import MoMConfig
from memformer_dist.cells.plain import PlainConfig
from memformer_dist.cells.rmt import RmtConfig
from memformer_dist.cells.titans import TitansConfig
from memformer_dist.cells.transformer_xl import TransformerXLConfig

DEFAULT_CELL = "memformer"  # configurations of before there was a second


def _named_cell(section: Any) -> Any:
    return section.get("cell", DEFAULT_CELL) if isinstance(section, dict) else getattr(section, "cell", None)


ModelConfig = Annotated[
    Annotated[MemformerConfig, Tag("memformer")]
    | Annotated[PlainConfig, Tag("plain")]
    | Annotated[RmtConfig, Tag("rmt")]
    | Annotated[ArmtConfig, Tag("armt")]
    | Annotated[HmtConfig, Tag("hmt")]
    | Annotated[TransformerXLConfig, Tag("transformer_xl")]
    | Annotated[LaMemoConfig, Tag("lamemo")]
    | Annotated[GatedDeltaConfig, Tag("gated_delta")]
    | Annotated[MoMConfig, Tag("mom")]
    | Annotated[TitansConfig, Tag("titans")]
    | Annotated[HadamardConfig, Tag("hadamard")],
    Discriminator(_named_cell),
]
