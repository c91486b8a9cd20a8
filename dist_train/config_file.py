"""Settings from a YAML file and the command line: strict reading, and every mistake named at once."""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dist_train.config import Settings
from dist_train.errors import UserError
from dist_train.sections import DataSettings
from dist_train.yaml_file import parse_yaml, read_mapping, text_problem


def load_settings(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file of settings, then `--section.key=value` overrides in their order.

    Raises `UserError` that names every mistake of file and overrides in one line.
    """
    values, mistakes = read_mapping(path)
    for override in overrides:
        mistakes += _apply_override(values, override)
    _fill_in_folders(values, path.stem)
    try:
        # Through JSON, because pydantic's strict mode then takes lists for tuples and text for paths, and nothing else.
        settings = Settings.model_validate_json(json.dumps(values))
    except ValidationError as error:
        mistakes += [_describe(mistake) for mistake in error.errors()]
    if mistakes:
        raise UserError(f"{path}: {'; '.join(mistakes)}")
    return settings


def _apply_override(values: dict, override: str) -> list[str]:
    """Set one `--section.key=value` in `values`; return what is wrong with it, if anything."""
    match = re.fullmatch(r"--([a-z_]+)\.([a-z_0-9]+)=(.*)", override, re.DOTALL)
    if not match:
        return [f"cannot read {_shown(override)}; write --section.key=value, e.g. --train.max_iters=100"]
    section, key, text = match.groups()
    if problem := text_problem(text):
        return [f"{section}.{key}: {_shown(text)} {problem}"]
    if not isinstance(values.setdefault(section, {}), dict):
        return [f"{section}: is a section, write its keys below it"]
    try:
        value, mistakes = parse_yaml(text)
    except yaml.YAMLError:
        value, mistakes = text, []
    # A prompt or a path may look like a number or a list: text stays text where the setting is one.
    if _is_text(section, key) and not isinstance(value, str) and text != "null":
        value, mistakes = text, []
    values[section][key] = value
    return [f"{section}.{key}: {mistake}" for mistake in mistakes]


def _is_text(section: str, key: str) -> bool:
    field = _field(section, key)
    return field is not None and field.annotation in (str, str | None, Path)


def _field(section: str, key: str) -> FieldInfo | None:
    model = Settings.model_fields.get(section)
    return None if model is None else model.annotation.model_fields.get(key)  # type: ignore[union-attr]


def _fill_in_folders(values: dict, config_name: str) -> None:
    """Set the two folders that depend on other settings, where the user did not."""
    run, data = values.setdefault("run", {}), values.setdefault("data", {})
    if isinstance(run, dict):
        run.setdefault("out_dir", f"runs/{config_name}")
    if isinstance(data, dict):
        # What decides the tokens is in the name, so that configs do not meet in one folder by accident.
        source = data.get("source", DataSettings.model_fields["source"].default)
        tokenizer = data.get("tokenizer", DataSettings.model_fields["tokenizer"].default)
        keys = ["subset", "revision"] if str(source).startswith("fineweb") else []
        chosen = [data.get(key) for key in [*keys, "max_documents", "max_tokens"]]
        parts = [source, Path(str(data.get("path") or "")).stem, *chosen, Path(str(tokenizer)).stem]
        names = [re.sub(r"[^\w.-]+", "_", str(part or "")).strip("_") for part in parts]
        data.setdefault("dir", "data/" + "-".join(filter(None, names)))


def _describe(mistake: Any) -> str:
    """Say in a few words what is wrong with which key, and how to mend it. Takes one of pydantic's error records."""
    # Alternatives of a union are part of pydantic's location; the user knows section and key.
    section, key, *_ = [str(part) for part in mistake["loc"]] + ["", ""]
    where = f"{section:.80}.{key:.80}".strip(".")
    if mistake["type"] == "extra_forbidden":
        model = Settings.model_fields.get(section) if key else None
        known = list((model.annotation if model else Settings).model_fields)  # type: ignore[union-attr]
        nearest = difflib.get_close_matches(key or section, known, n=1, cutoff=0.5)
        return f"{where}: unknown key; " + (
            f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
        )
    message = mistake["msg"].removeprefix("Value error, ")
    value = "" if isinstance(mistake["input"], dict) else f" (got {_shown(mistake['input'])})"
    return f"{where}: {message}{value}".removeprefix(": ")


def _shown(value: Any) -> str:
    """Return a value as an error quotes it: its beginning says which one it was."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text:.80}…"
