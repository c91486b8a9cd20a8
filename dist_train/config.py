"""All settings of a run, and what they have to be to fit together. The sections are in `sections.py`."""

from typing import Any

import yaml
from pydantic import model_validator

from dist_train.sections import (
    CheckpointSettings,
    DataSettings,
    EvalSettings,
    LogSettings,
    LossSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    RuntimeSettings,
    SampleSettings,
    TrainSettings,
)
from dist_train.setting_types import Section


class Settings(Section):
    """All settings of a run."""

    run: RunSettings
    data: DataSettings
    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()
    sample: SampleSettings = SampleSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _fit_together(self) -> "Settings":
        mistakes = []
        stages = self.loss.curriculum if isinstance(self.loss.curriculum, tuple) else ()
        for key, last_k in (("last_k", self.loss.last_k), *(("curriculum", stage.last_k) for stage in stages)):
            if last_k != "all" and last_k > self.model.block_size:
                mistakes.append(
                    f"loss.{key}={last_k} is more than model.block_size={self.model.block_size}; "
                    f"use `all` for every position"
                )
        mistakes += [
            f"loss.curriculum: from_step={stage.from_step} never comes in train.max_iters={self.train.max_iters}"
            for stage in stages
            if stage.from_step >= self.train.max_iters
        ]
        if (self.data.source in ("files", "shards")) != (self.data.path is not None):
            mistakes.append("data.path goes with data.source: files or shards; set both or neither")
        if self.data.source == "shards" and self.data.max_documents is not None:
            mistakes.append("data.max_documents does not bound data.source: shards; use data.max_tokens")
        if self.data.source == "shards" and self.data.shard_format != "llm.c":
            mistakes.append("data.source: shards takes llm.c's format; point data.dir at headerless shards themselves")
        if self.optim.lr_schedule != "constant" and self.optim.warmup_iters >= self.train.max_iters:
            mistakes.append(
                f"optim.warmup_iters={self.optim.warmup_iters} leaves nothing of "
                f"train.max_iters={self.train.max_iters}; lower it"
            )
        if self.optim.decay_iters is not None and self.optim.lr_schedule != "wsd":
            mistakes.append("optim.decay_iters goes with optim.lr_schedule: wsd")
        if self.optim.name == "muon" and self.runtime.parallel == "fsdp":
            mistakes.append("optim.name: muon needs whole matrices, and runtime.parallel: fsdp cuts them; use ddp")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    @property
    def last_k(self) -> int:
        """Supervised positions per sequence, 1 … block_size, where no curriculum changes them."""
        return self.model.block_size if self.loss.last_k == "all" else self.loss.last_k

    def by_key(self) -> dict[str, Any]:
        """Return `{section.key: value}` of every setting, with values as JSON has them."""
        sections = self.model_dump(mode="json")
        return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}

    def to_yaml(self) -> str:
        """Return the settings as YAML that loads to the same settings."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
