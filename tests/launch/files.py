"""The files in launch/, read."""

from typing import Any

import yaml

from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def documents(name: str) -> list[dict[str, Any]]:
    """Return the documents of one of the YAML files."""
    return list(yaml.safe_load_all((LAUNCH / name).read_text(encoding="utf-8")))


def skypilot() -> dict[str, Any]:
    """Return SkyPilot's task."""
    (task,) = documents("skypilot.yaml")
    return task
