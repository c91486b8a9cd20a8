"""The settings one by one, for whoever shows or compares them. Imports no torch."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from dist_train.config import Settings
from dist_train.setting_types import is_adjustable


def describe_settings() -> Iterator[tuple[str, str, str]]:
    """Yield `(section.key, default, meaning)` of every setting, in order: what `--help` and the README show."""
    for section, outer in Settings.model_fields.items():
        for key, field in outer.annotation.model_fields.items():  # type: ignore[union-attr]
            default = "derived" if field.is_required() else json.dumps(field.default)
            yield f"{section}.{key}", default, " ".join((field.description or "").split())


def may_change(dotted: str) -> bool:
    """Tell whether the setting `section.key` may change when a run is continued."""
    return is_adjustable(_field(dotted))


def default_of(dotted: str) -> Any:
    """Return the default of the setting `section.key` as a JSON value; None also for one that has none."""
    field = _field(dotted)
    return None if field.is_required() else json.loads(json.dumps(field.default))


def _field(dotted: str) -> FieldInfo:
    section, _, key = dotted.partition(".")
    fields: dict[str, FieldInfo] = Settings.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
    return fields[key]
