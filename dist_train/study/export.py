"""A run's weights, tokenizer and origin as a folder that Hugging Face's libraries load without custom code."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from safetensors import SafetensorError

from dist_train.data.hf_tokenizer import tokenizer_config, tokenizer_json
from dist_train.data.tokenizer import end_of_text
from dist_train.errors import StorageError, UserError
from dist_train.model.pretrained import their_config, their_tensors
from dist_train.storage import sync
from dist_train.training.hf_folder import CONFIG, WEIGHTS
from dist_train.training.saved import Saved, open_saved


def export(run: Path, folder: Path) -> int:
    """Write the newest checkpoint of a run, or the one whose folder `run` is; return after how many updates it is.

    `folder` is there as a whole or not at all. Raises `UserError` if it holds something, or if there is no checkpoint;
    `StorageError` if it cannot be written.
    """
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise UserError(f"{folder} is there and not empty; choose another folder, or remove it")
    saved = open_saved(run)
    contents = _texts(saved)
    aside = folder.absolute().with_name(f".{folder.absolute().name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, content in contents.items():
            (aside / name).write_text(content, encoding="utf-8")
        tensors = their_tensors(saved.tensors, saved.settings.model, saved.encoding.n_vocab)
        safetensors.torch.save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(aside / CONFIG, aside / WEIGHTS)  # safetensors lets nobody else read it
        for path in (*aside.iterdir(), aside):
            sync(path)
        os.replace(aside, folder)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(aside)
        raise StorageError(f"cannot write {folder}: {error}; free space, or choose another folder") from error
    return saved.checkpoint.state.step


def _texts(saved: Saved) -> dict[str, str]:
    """Return every file but the weights."""
    model, end = saved.settings.model, end_of_text(saved.encoding)
    values: dict[str, Any] = {
        CONFIG: their_config(model, saved.encoding.n_vocab, end),
        "generation_config.json": {
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
            "max_length": model.block_size,  # of which transformers knows nothing by itself, and fails beyond
        },
        "tokenizer.json": tokenizer_json(saved.encoding),
        "tokenizer_config.json": tokenizer_config(model.block_size),
    }
    texts = {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in values.items()}
    return {**texts, "README.md": _card(saved)}


def _card(saved: Saved) -> str:
    """Return the model card: what the network is and was trained on, and what to know before it is used."""
    settings, state = saved.settings, saved.checkpoint.state
    shown = settings.model_dump(mode="json")
    del shown["run"]["out_dir"], shown["data"]["dir"]  # places on the machine where it was trained
    return _CARD.format(
        step=state.step,
        tokens=state.tokens,
        supervised=state.supervised_tokens,
        source=settings.data.source,
        T=settings.model.block_size,
        seen=_seen(saved),
        sha256=saved.checkpoint.weights_sha256,
        data=state.data_fingerprint,
        settings=yaml.safe_dump(shown, sort_keys=False),
    )


def _seen(saved: Saved) -> str:
    loss = saved.settings.loss
    if loss.curriculum is not None:
        return "a number of last positions that changed with the step (`loss.curriculum` below)"
    if saved.settings.last_k == saved.settings.model.block_size:
        return "every position"
    positions = "final position" if saved.settings.last_k == 1 else f"last {saved.settings.last_k} positions"
    return f"the {positions} alone: shorter contexts it was not trained to continue"


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
A language model of GPT-2's layout, trained with dist_train.

- Trained for {step} updates on {tokens:,} tokens of `{source}`, in windows of {T}, of which the loss saw {seen}.
  Supervised were {supervised:,} tokens.
- Weights: sha256 `{sha256}` of the checkpoint's `model.safetensors` that this was made from; data: `{data}`.
- `<|endoftext|>` stood before each document in training, so a text that starts one is best given it first. Spelled
  within a text, it was plain text there, and is the special token here.
- A text ends at {T} tokens, its beginning included: there are no more positions. `generate` of dist_train goes on from
  the last ones.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder")
model = AutoModelForCausalLM.from_pretrained("this folder")
inputs = tokenizer("<|endoftext|>Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, do_sample=True)[0]))
```

All settings of the run:

```yaml
{settings}```
"""
