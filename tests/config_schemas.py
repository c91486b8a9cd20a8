"""JSON schemas of settings and grids, by which editors complete and check the files in configs: `make schema`."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dist_train.config import Settings
from dist_train.study.grid import GridFile

FOLDER = Path(__file__).parents[1] / "configs"


def schema_of(model: type[BaseModel]) -> str:
    """Return the schema of a file, as text."""
    schema = model.model_json_schema()
    if model is Settings:
        # What is derived from other settings is there before the file is checked.
        for section in (schema, schema["$defs"]["RunSettings"], schema["$defs"]["DataSettings"]):
            del section["required"]
    return json.dumps(_without_titles(schema), indent=2, ensure_ascii=False) + "\n"


def _without_titles(part: Any) -> Any:
    """Leave out pydantic's titles, which repeat the keys; a setting may itself be called so."""
    if isinstance(part, list):
        return [_without_titles(each) for each in part]
    if not isinstance(part, dict):
        return part
    return {
        key: _without_titles(value) for key, value in part.items() if not (key == "title" and isinstance(value, str))
    }


SCHEMAS: dict[Path, type[BaseModel]] = {
    FOLDER / "settings.schema.json": Settings,
    FOLDER / "grid.schema.json": GridFile,
}


if __name__ == "__main__":
    for path, model in SCHEMAS.items():
        path.write_text(schema_of(model), encoding="utf-8")
