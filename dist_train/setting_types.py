"""What a setting may be: types and bounds that several share, and the section that holds them."""

import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

T = TypeVar("T")

_MAY_CHANGE = "may change when a run is continued"
Adjustable = Annotated[T, _MAY_CHANGE]
"""A setting that may change when a run is continued: it goes on with the same run. Any other makes it another run."""


def is_adjustable(field: FieldInfo) -> bool:
    """Tell whether a section's field is `Adjustable`."""
    return _MAY_CHANGE in field.metadata


Count = Annotated[int, Field(ge=1, le=2**48)]
"""Products of two larger ones no longer fit where they are counted."""


def _in_order(steps: tuple[int, int]) -> tuple[int, int]:
    if steps[0] >= steps[1]:
        raise ValueError("the first number has to be the smaller one, as in [10, 13]")
    return steps


_Step = Annotated[int, Field(ge=0, le=2**48)]
StepWindow = Annotated[tuple[_Step, _Step], AfterValidator(_in_order)]
"""`[from, to]`, of finished updates: the updates from+1 … to lie between."""


def fit_file_system(value: Any) -> Any:
    """Refuse a path that no file system takes: its error would come late, and name no setting."""
    if value is not None and max(map(len, os.fsencode(value).split(b"/"))) > 255:
        raise ValueError("a name in a path has at most 255 bytes; shorten it")
    return value


FilePath = Annotated[Path, AfterValidator(fit_file_system)]


class Section(BaseModel):
    """One section of the settings: strict types, no unknown keys, nothing changes after loading."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
