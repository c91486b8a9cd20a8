"""The sections of the settings: every setting once, with its meaning, unit, bounds and default.

A field's docstring is its help: `--help` and the README's table come from here, by `config_help.py`.
Imports no other room and no torch, so that `--help` answers at once.
"""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from dist_train.setting_types import Adjustable, Count, FilePath, Section, StepWindow, fit_file_system


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Return the seed (63 bits) of one generator, named by its purpose and e.g. step and rank.

    Derived seeds need no generator state in checkpoints, and drawing for one purpose never moves another.
    """
    key = json.dumps([seed, purpose, *numbers]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


class RunSettings(Section):
    out_dir: Adjustable[FilePath]
    """Run folder: settings, metrics, checkpoints, samples, plots. By default `runs/` and the config's name."""
    seed: int = Field(default=1337, ge=0, lt=2**64)
    """All randomness of a run is derived from this number: weights, windows, dropout, samples."""

    def derive_seed(self, purpose: str, *numbers: int) -> int:
        """Return the seed of one of the run's generators, as the function of this name does."""
        return derive_seed(self.seed, purpose, *numbers)


class DataSettings(Section):
    source: Literal["python-docs", "python-web", "files", "fineweb", "fineweb-edu", "shards"] = "python-docs"
    """Where documents come from: `python-docs` (Python's language reference: one style, a "book"), `python-web`
    (READMEs and docstrings of what is installed: many styles, a "web"), `files` (`data.path`), `fineweb` and
    `fineweb-edu` (the Hugging Face hub), `shards` (ready-made ones at `data.path`: no tokenization)."""
    path: Annotated[Adjustable[str | None], AfterValidator(fit_file_system)] = None
    """For `files`: a file, folder or glob of `.txt`, `.jsonl` (also `.gz`, `.zst`) or `.parquet`. For `shards`: a
    folder, or a dataset repository on the hub such as `hub:kjj0/fineweb10B-gpt2`."""
    text_column: str = "text"
    """For `.jsonl`, `.parquet` and the hub: the column that holds the text."""
    subset: str = "sample-10BT"
    """For `fineweb` and `fineweb-edu`: `sample-10BT`, `sample-100BT`, `sample-350BT` or a crawl, `CC-MAIN-…`."""
    revision: str | None = None
    """For the hub: the commit, tag or branch to read. null: the newest; the manifest says which commit that was."""
    max_documents: Count | None = None
    """Read only this many documents, the first ones of the source."""
    max_tokens: Count | None = None
    """Read only this many tokens, the first ones of the source; of ready-made shards, as many as hold them."""
    on_bad_document: Adjustable[Literal["skip", "stop"]] = "skip"
    """What to do with a document that cannot be read (a broken line, no text, not UTF-8): count and name it and go
    on, or stop there."""
    workers: Adjustable[Annotated[int, Field(ge=1, le=1024)] | None] = None
    """Processes that read and tokenize; the shards are the same for any number. null: one for each CPU."""
    dir: Adjustable[FilePath]
    """Folder of the token shards and their `manifest.json`; prepared if missing. Folders of shards that llm.c,
    modded-nanogpt or nanoGPT wrote (`*train*.bin`, `*val*.bin`) load as they are. By default `data/` and the names
    of source and tokenizer."""
    shard_format: Literal["llm.c", "headerless"] = "llm.c"
    """`headerless` reads nanoGPT's bare uint16 `.bin` files; everything else has llm.c's header."""
    shard_tokens: Count = 100_000_000
    """Tokens per shard file that `prepare` writes."""
    tokenizer: Annotated[str, AfterValidator(fit_file_system)] = "gpt2"
    """A tiktoken name, `bytes` (256 bytes and end-of-text; needs no download) or the path of a `.tiktoken` file."""
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share held out for evaluation: of the documents, or the end of the text where the source is a single one."""
    sampling: Literal["random", "shuffle"] = "random"
    """`random`: windows at uniform offsets. `shuffle`: every window of `data.stride` once per epoch,
    in random order."""
    stride: Count | None = None
    """For `shuffle`: tokens from one window's start to the next. By default `model.block_size`."""


class ModelSettings(Section):
    n_layer: int = Field(default=12, ge=1, le=10_000)
    """Transformer blocks."""
    n_head: int = Field(default=12, ge=1, le=2**20)
    """Attention heads per block."""
    n_embd: int = Field(default=768, ge=1, le=2**20)
    """Width of the residual stream; a multiple of `n_head`."""
    block_size: int = Field(default=256, ge=1, le=2**24)
    """Context length T: tokens per sequence."""
    vocab_multiple: int = Field(default=1, ge=1, le=2**20)
    """Pad the embedding's rows to a multiple of this (128 suits GPUs); padded ids are never predicted."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability of dropping, while training only: embeddings, attention weights, and each branch's output."""
    bias: bool = True
    """Biases in linear layers and LayerNorms."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """The MLP's activation: exact GELU, or GPT-2's tanh approximation."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon inside the LayerNorms."""
    logit_scale: PositiveFloat | Literal["rsqrt_n_embd"] = 1.0
    """Factor on the logits; `rsqrt_n_embd` divides them by the square root of `n_embd`."""
    initialization: Literal["model5", "gpt2"] = "gpt2"
    """`model5`: linear N(0, 0.02), embeddings Xavier normal. `gpt2`: all N(0, 0.02), residual projections smaller
    by the square root of 2 `n_layer`."""
    init_from: Annotated[str | None, AfterValidator(fit_file_system)] = None
    """Weights to start from in place of that: `gpt2`, `gpt2-medium`, `gpt2-large` or `gpt2-xl` from the hub, a folder
    in Hugging Face's GPT-2 format, or one of a run or checkpoint. The settings above have to fit them."""
    freeze: tuple[Literal["embeddings"] | NonNegativeInt, ...] = ()
    """What does not learn: `embeddings` (the head too, which is tied to them) and blocks by number, as in
    `[embeddings, 0, 1]`. Gradients that nothing learns from are not computed."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelSettings":
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        return self

    @model_validator(mode="after")
    def _freeze_what_is_there(self) -> "ModelSettings":
        if missing := [block for block in self.freeze if block != "embeddings" and block >= self.n_layer]:
            raise ValueError(f"freeze: there is no block {missing[0]}; the last is n_layer − 1 = {self.n_layer - 1}")
        return self


class Stage(Section):
    """One entry of `loss.curriculum`."""

    from_step: NonNegativeInt
    """How many updates come before it."""
    last_k: Count | Literal["all"]
    """How many last positions the loss sees from then on."""


Stages = Annotated[tuple[Stage, ...], Field(min_length=1, max_length=1000)]


class LossSettings(Section):
    last_k: Count | Literal["all"] = 1
    """How many last positions of each sequence the loss sees: 1 is final-token training, `all` all-token training."""
    curriculum: Stages | Literal["shrink", "grow"] | None = None
    """In place of `last_k`, one that changes: `[{from_step: 0, last_k: all}, {from_step: 800, last_k: 1}]`, or a smooth
    law over the whole run, `shrink` (all to 1) or `grow` (1 to all). null: `last_k` throughout."""

    @model_validator(mode="after")
    def _stages_ascend(self) -> "LossSettings":
        if isinstance(self.curriculum, tuple):
            steps = [stage.from_step for stage in self.curriculum]
            if steps[0] != 0 or sorted(set(steps)) != steps:
                raise ValueError(f"curriculum: from_step has to begin at 0 and to rise (got {steps})")
        return self


class OptimSettings(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon`: Muon for the blocks' matrices, with updates as large as AdamW's, and AdamW for all else."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Evaluate, sample and export an exponential moving average of the weights that looks back over 1 / (1 − this)
    updates, over fewer at first. null: the weights themselves."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of a `cosine` or `wsd` schedule."""
    warmup_iters: NonNegativeInt = 0
    """Iterations over which the learning rate rises linearly to its peak."""
    lr_schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """What follows the warm-up: `constant`, half a `cosine`, or `wsd` (warm-up, stable, decay): constant and then down
    on a straight line; until then it does not depend on `train.max_iters`."""
    decay_iters: Count | None = None
    """For `wsd`: iterations of the decay. null: a fifth of all."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    decay: Literal["all", "matrices"] = "all"
    """Which parameters decay: `all`, or `matrices` alone (no biases, no LayerNorms)."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    eps: PositiveFloat = 1e-8
    """Added to the update's denominator."""
    grad_clip: PositiveFloat | None = None
    """Scale the gradient down to this norm where it is longer; null: no clipping."""


class TrainSettings(Section):
    max_iters: Adjustable[Count] = 1234
    """Updates of the weights."""
    global_batch_size: int = Field(default=64, ge=1, le=2**24)
    """Sequences per update, over all processes and micro-batches: independent of the number of GPUs."""
    micro_batch_size: Adjustable[Count | None] = None
    """At most this many sequences at once on one process; the rest is accumulated. null: all at once."""


class EvalSettings(Section):
    interval: Adjustable[Count] = 80
    """Evaluate every this many iterations, and before the first and after the last."""
    early: Adjustable[bool] = False
    """Evaluate also after 1, 2, 4, 8 … updates, where losses fall fastest: for curves on logarithmic axes."""
    batches: Adjustable[Count] = 8
    """Held-out windows per evaluation, in units of `train.global_batch_size`; the same windows every time."""
    ranks: Adjustable[Literal["rank0", "all"]] = "rank0"
    """Which processes evaluate; the result is the same."""


class SampleSettings(Section):
    prompt: Adjustable[str] = "I went on holiday to Liliput and"
    """Text that samples continue."""
    temperature: Adjustable[float] = Field(default=1.1, ge=1e-3)
    """Logits are divided by this before sampling: below 1 is safer, above 1 wilder."""
    max_new_tokens: Adjustable[int] = Field(default=100, ge=1, le=10**6)
    """Tokens to generate."""


class CheckpointSettings(Section):
    interval: Adjustable[Count] = 400
    """Save every this many iterations, and after the last."""
    keep: Adjustable[int] = Field(default=2, ge=2, le=10**6)
    """Newest checkpoints to keep: at least two, so that one is left where the newest is damaged."""
    resume: Adjustable[Literal["auto", "never"]] = "auto"
    """`auto` continues from the newest complete checkpoint in `run.out_dir`; `never` refuses a folder
    that has a run."""


class RuntimeSettings(Section):
    device: Adjustable[Literal["auto", "cuda", "mps", "cpu"]] = "auto"
    """`auto` takes the first of cuda, mps, cpu that is there."""
    precision: Adjustable[Literal["auto", "bf16", "fp16", "fp32"]] = "auto"
    """Autocast type; weights stay fp32. `auto`: bf16 where the hardware has it, fp16 on other GPUs, else fp32."""
    compile: Adjustable[bool] = False
    """Compile the network's blocks with `torch.compile`: slower to start; meant for GPUs, on a CPU it gains nothing."""
    recompute_blocks: Adjustable[bool] = False
    """Keep nothing of a block but its input, and compute the rest again in backward (activation checkpointing): far
    less memory, a third more work."""
    parallel: Adjustable[Literal["ddp", "fsdp"]] = "ddp"
    """What several processes share: the batch (`ddp`), or also weights, gradients and the optimizer's state, of which
    each then keeps a part (`fsdp`): for networks that are larger than a GPU."""
    gradient_reduction: Adjustable[Literal["fp32", "bf16"]] = "fp32"
    """Type in which processes add up their gradients: `bf16` sends half the bytes and rounds to three digits."""
    deterministic: Adjustable[bool] = False
    """Only algorithms that give the same bits every time, or an error where there is none."""
    timeout_seconds: Adjustable[float] = Field(default=120.0, ge=1, le=10**6)
    """How long a process waits for the others before the run fails. Evaluation and saving may take longer."""


class LogSettings(Section):
    interval: Adjustable[Count] = 10
    """Write metrics every this many iterations: one line per iteration all the same."""
    profile: Adjustable[StepWindow | None] = None
    """`[from, to]`: record updates from+1 … to with torch's profiler, a few of them, on the first process: a trace for
    Perfetto and TensorBoard in `profile/`, and a table of what took the time. null: none."""
    memory_history: Adjustable[bool] = False
    """On CUDA: note what allocates memory, at some cost; where it runs out, `out_of_memory-RANK.pickle` has it."""
    wandb: Adjustable[bool] = False
    """Show the run on Weights & Biases too (`pip install 'dist-train[wandb]'`), where and how `WANDB_MODE` … say."""
