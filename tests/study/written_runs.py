"""Run folders with curves that are known, written by hand, and a report on them, to draw without training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

T = 8
"""Positions of a window."""
SEQUENCES = 4
"""Of an update."""


def write_run(
    folder: Path, level: float, n_updates: int = 40, last_k: int = 1, noise_scale: float | None = None
) -> Path:
    """Write the metrics of a run whose final-token loss falls to `level`, and that of all tokens to 0.5 above."""
    lines: list[dict[str, object]] = []
    for step in range(n_updates + 1):
        loss = level + 2 * float(np.exp(-step / 10))
        if step:
            spent = {"tokens": step * SEQUENCES * T, "supervised_tokens": step * SEQUENCES * last_k}
            cost = {"flops": step * (1000 + last_k), "step_seconds": 0.5, "noise_scale": noise_scale}
            noisy = loss + 0.1 * (-1) ** step
            lines.append({"kind": "train", "step": step, "loss": noisy, "last_k": last_k, **spent, **cost})
        if step % 10 == 0:
            losses = {"loss": loss, "final_token_loss": loss, "all_token_loss": loss + 0.5}
            by_position = (loss + np.linspace(1, 0, T)).tolist()
            lines.append({"kind": "eval", "step": step, **losses, "loss_by_position": by_position})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_suite(run: Path, suite: str, result: Mapping[str, Any]) -> None:
    """Write what a suite found of a run, as `evaluate` does."""
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / f"{suite}.json").write_text(json.dumps({"suite": suite, **result}))


def estimate(value: float) -> dict[str, float]:
    """Return a number with an interval around it."""
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def write_report(folder: Path, objectives: Mapping[str, int], n_seeds: int = 2) -> dict[str, Any]:
    """Write runs of `objectives`, each given by its last k, and return a report on them as `report.json` has it."""
    cells = [
        {
            "settings": {"loss.last_k": last_k, "run.seed": seed},
            "folder": str(write_run(folder / f"{last_k}-{seed}", 2 + last_k / 10 + seed / 50, last_k=last_k)),
            "objective": name,
            "measures": {
                "train_loss_noise": 0.3 / last_k**0.5,
                "step_seconds": 0.5,
                "tokens": 40 * SEQUENCES * T,
                "supervised_tokens": 40 * SEQUENCES * last_k,
                "final_token_loss": 2.0,
                "all_token_loss": None,
            },
        }
        for name, last_k in objectives.items()
        for seed in range(n_seeds)
    ]
    made = {"date": "2026-11-23", "device": "cpu", "torch": "2.13", "cpu": None, "runs": len(cells)}
    return {
        "title": "written",
        "claims": [],
        "cells": cells,
        "equal": [],
        "needed": [],
        "trade_off": {"where": "", "columns": list(objectives), "rows": []},
        "made": {**made, "training_seconds": 90.0},
    }
