"""The settings one by one, for whoever shows or compares them. Imports no torch."""

import json
from collections.abc import Iterator

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
    section, _, key = dotted.partition(".")
    return is_adjustable(Settings.model_fields[section].annotation.model_fields[key])  # type: ignore[union-attr]
