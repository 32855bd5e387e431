"""What every pydantic model here is like."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Refuses keys that it does not know, and numbers that are not finite; never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
