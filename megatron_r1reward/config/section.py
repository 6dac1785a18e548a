"""What all sections of the run file share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Frozen; unknown keys are refused, and so are infinities and NaN: no key means something by them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
