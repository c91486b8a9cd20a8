"""What a run says in numbers, computed from its folder alone, ready to be lined up beside others."""

from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config import Settings
from dist_train.data.description import describe_once
from dist_train.data.manifest import Manifest
from dist_train.study.evaluate import SUITES, estimates, read_suite
from dist_train.study.inspect import read_inspection
from dist_train.study.learning import LOSSES, Curve, read_metrics
from dist_train.study.trend import trend_of

Measures = dict[str, float | None]
"""By name; None where a run has nothing to measure it by."""

# Equal sizes compare where whole corpora do not: both measures grow with the amount of text.
CORPUS_BLOCK = "10000"


def measure(run: Path, settings: Settings, curve: Curve) -> Measures:
    """Return the measures of a run. Raises `UserError` if it has none yet."""
    step = int(curve.spent["updates"][-1])
    suites = _suites(run, step)
    return {
        **_held_out(curve, suites),
        **_training(read_metrics(run, "train"), is_steady=settings.loss.curriculum is None),
        **_corpus(settings),
        **suites,
        **_attention(run, step),
    }


def _held_out(curve: Curve, suites: Measures) -> Measures:
    """Return both losses, of the suite's windows where it was run: they are more than an evaluation's."""
    final, every = (suites.get(f"held-out.held_out.{loss}") or float(curve.losses[loss][-1]) for loss in LOSSES)
    return {"final_token_loss": final, "all_token_loss": every, "position_gap": every - final}


def _training(lines: list[dict[str, Any]], is_steady: bool) -> Measures:
    second_half, last = lines[len(lines) // 2 :], lines[-1]
    trend = trend_of(np.array([line["loss"] for line in lines]))
    return {
        "updates": last["step"],
        "tokens": last["tokens"],
        "supervised_tokens": last["supervised_tokens"],
        "flops": last["flops"],
        "training_seconds": sum(line["step_seconds"] for line in lines),
        # The median, because other programs on the machine make some updates slow.
        "step_seconds": float(np.median([line["step_seconds"] for line in lines])),
        "update_flops": last["flops"] / last["step"],
        "supervised_per_update": _mean_rise(second_half, "supervised_tokens"),
        "train_loss_level": trend.level,
        # With what the loss sees they change too.
        "train_loss_slope": trend.slope if is_steady else None,
        "train_loss_noise": trend.noise if is_steady else None,
        **_gradient(second_half if is_steady else []),
    }


def _mean_rise(lines: list[dict[str, Any]], key: str) -> float:
    return (lines[-1][key] - lines[0][key]) / max(1, len(lines) - 1) if len(lines) > 1 else float(lines[0][key])


def _gradient(lines: list[dict[str, Any]]) -> Measures:
    """Return the scatter of single sequences' gradients, and in how many sequences it is as large as their mean.

    Of means: the noise and the signal of a single update are both too uncertain to be divided.
    """
    known = [line for line in lines if line.get("gradient_signal") is not None]
    if not known:
        return {"gradient_noise": None, "noise_scale": None}
    noise, signal = (float(np.mean([line[key] for line in known])) for key in ("gradient_noise", "gradient_signal"))
    return {"gradient_noise": noise, "noise_scale": noise / signal if noise > 0 and signal > 0 else None}


def _corpus(settings: Settings) -> Measures:
    folder, manifest = settings.data.dir, Manifest.read(settings.data.dir)
    if manifest is None:  # shards of others
        return {}
    described = describe_once(folder, manifest)["train"]
    return {
        "corpus_entropy_bits": described["entropy_bits_within_block"][CORPUS_BLOCK],
        "corpus_types": described["types_per_block"][CORPUS_BLOCK],
    }


def _suites(run: Path, step: int) -> Measures:
    """Return e.g. `text.model.spaces_per_character` and `held-out.gap.final_token_loss` of the suites run at `step`."""
    suites = {name: read_suite(run, name) for name in SUITES}
    return {
        ".".join([name, *key.split(", ")]): estimate["value"]
        for name, result in suites.items()
        if result and result.get("step") == step
        for key, estimate in estimates(result)
    }


def _attention(run: Path, step: int) -> Measures:
    inspection = read_inspection(run)
    if inspection is None or inspection["step"] != step:
        return {}
    return {
        f"attention.layer {number}.{name}": layer[name]["value"]
        for number, layer in enumerate(inspection["layers"], start=1)
        for name in ("entropy_bits", "first_token_share", "mean_distance")
    }
