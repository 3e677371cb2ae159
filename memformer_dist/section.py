"""What the sections of a configuration have in common."""

from typing import Annotated, Any

from annotated_types import Gt, Le
from pydantic import BaseModel, field_validator

# Of what lies in memory, or is dealt, for each of so many: lanes, segments, tokens of a segment.
Extent = Annotated[int, Gt(0), Le(2**20)]


class Section(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A section of the configuration: unknown keys are errors, values cannot be changed.

    Numbers are finite, as in JSON, and integers fit into 64 bits, as libraries expect.
    """

    @field_validator("*")
    @classmethod
    def _fits_into_64_bits(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"found {str(value)[:40]}, expected an integer that fits into 64 bits")
        return value
