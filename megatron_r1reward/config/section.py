"""What all sections of the run file share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

PositiveInt = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Frozen; unknown keys are refused, and so are infinities and NaN, and true where a number is meant: no key means
    something by them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_1(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        inside = value if isinstance(value, list | tuple) else [value]
        if "bool" not in str(cls.model_fields[info.field_name].annotation) and any(isinstance(x, bool) for x in inside):
            raise ValueError("true and false are for switches, and this is none: give its value")
        return value
