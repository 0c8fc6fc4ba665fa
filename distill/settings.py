"""What every section of a config has in common."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of every section: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
