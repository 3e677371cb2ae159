"""What the sections of a configuration have in common."""

from pydantic import BaseModel


class Section(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A section of the configuration: unknown keys are errors, values cannot be changed, numbers are finite (as in JSON)."""
