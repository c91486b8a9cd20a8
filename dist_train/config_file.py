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

from dist_train.config import DataSettings, Settings
from dist_train.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML with 1.2's plain scalars: PyYAML alone takes `3e-4` for text, `no` for False, and a key given twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as PyYAML has it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return a mapping's keys and values. Raises `ConstructorError` for keys that are no text or come twice."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_INT = re.compile(r"[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file. Raises `UserError` if it cannot be read or is not a mapping."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the settings file {path}: {error}; the ready-made ones are in configs/") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}; mend that line") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no sections; write e.g. `train: {{max_iters: 100}}`")
    return values


def load_settings(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file of settings, then `--section.key=value` overrides in their order.

    Raises `UserError` that names every mistake of file and overrides in one line.
    """
    values = read_yaml(path)
    mistakes = [mistake for override in overrides if (mistake := _apply_override(values, override))]
    _fill_in_folders(values, path.stem)
    try:
        # Through JSON, because pydantic's strict mode then takes lists for tuples and text for paths, and nothing else.
        settings = Settings.model_validate_json(json.dumps(values))
    except ValidationError as error:
        mistakes += [_describe(mistake) for mistake in error.errors()]
    if mistakes:
        raise UserError(f"{path}: {'; '.join(mistakes)}")
    return settings


def _apply_override(values: dict, override: str) -> str | None:
    """Set one `--section.key=value` in `values`; return what is wrong with it, if anything."""
    match = re.fullmatch(r"--([a-z_]+)\.([a-z_0-9]+)=(.*)", override, re.DOTALL)
    if not match:
        return f"cannot read {override!r}; write --section.key=value, e.g. --train.max_iters=100"
    section, key, text = match.groups()
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text
    if not isinstance(values.setdefault(section, {}), dict):
        return f"{section}: is a section, write its keys below it"
    # A prompt or a path may look like a number or a list: text stays text where the setting is one.
    values[section][key] = text if not isinstance(value, str) and _is_text(section, key) and text != "null" else value
    return None


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
    where = f"{section}.{key}".strip(".")
    if mistake["type"] == "extra_forbidden":
        model = Settings.model_fields.get(section) if key else None
        known = list((model.annotation if model else Settings).model_fields)  # type: ignore[union-attr]
        nearest = difflib.get_close_matches(key or section, known, n=1, cutoff=0.5)
        return f"{where}: unknown key; " + (
            f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
        )
    message = mistake["msg"].removeprefix("Value error, ")
    value = "" if isinstance(mistake["input"], dict) else f" (got {mistake['input']!r})"
    return f"{where}: {message}{value}".removeprefix(": ")
