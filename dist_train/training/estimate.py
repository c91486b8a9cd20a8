"""What a run is going to take, told from its settings alone: work, memory, time. Nothing is computed."""

import math
from collections import Counter
from collections.abc import Collection

import torch
from torch import nn

from dist_train.config import Settings
from dist_train.data.tokenizer import load_tokenizer
from dist_train.errors import UserError
from dist_train.model.cost import kept_bytes, step_flops
from dist_train.model.gpt import GPT, outline
from dist_train.runtime.device import PEAK_FLOPS, known_gpu
from dist_train.runtime.shares import micro_batch_size
from dist_train.training.curriculum import last_k_at
from dist_train.training.loss import logits_bytes
from dist_train.training.optimizer import build_optimizer, state_like


def estimate(settings: Settings, processes: int, gpu: str | None = None, mfu: float = 0.4) -> dict[str, str]:
    """Return in words what a run on so many GPUs is going to take, if it uses the share `mfu` of their peak.

    Raises `UserError` for a GPU whose peak is not known, and for a batch that cannot be divided.
    """
    if processes < 1:
        raise UserError(f"--processes={processes} are none; use 1 or more")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu={mfu:g} is no share of a peak; use one between 0 and 1, as 0.4")
    gpu = gpu or (known_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None) or "H100"
    if gpu not in PEAK_FLOPS:
        raise UserError(f"--gpu={gpu} is not known; use one of {', '.join(PEAK_FLOPS)}")
    network = outline(settings.model, load_tokenizer(settings.data.tokenizer).n_vocab)
    steps = Counter(last_k_at(step, settings) for step in range(settings.train.max_iters))
    batch_size, rows = settings.train.global_batch_size, network.token_embedding.num_embeddings
    recomputes = settings.runtime.recompute_blocks
    flops = {last_k: step_flops(settings.model, rows, batch_size, last_k, recomputes) for last_k in steps}
    total_flops = sum(count * flops[last_k] for last_k, count in steps.items())
    sequences, T = settings.train.max_iters * batch_size, settings.model.block_size
    supervised = sum(count * last_k for last_k, count in steps.items()) * batch_size
    memory = _memory(settings, network, processes, max(steps))
    saved_bytes = _bytes(network, learning_only=False) + _state_bytes(settings, network)
    where = "one process" if processes == 1 else f"each of {processes} processes ({settings.runtime.parallel})"
    seconds = total_flops / (processes * PEAK_FLOPS[gpu] * mfu)
    said = {
        "network": f"{_parameters(network)}; {settings.model.n_layer} blocks, {settings.model.n_embd} wide",
        "update": f"{_up_to(flops.values())}FLOP: {batch_size:,} sequences of {T:,} tokens, "
        f"{micro_batch_size(settings.train, processes)} at once on each process",
        "run": f"{settings.train.max_iters:,} updates, {_short(sequences * T).rstrip()} tokens, of which the loss sees "
        f"{_short(supervised)}; {_short(total_flops)}FLOP",
        "memory": f"about {_gib(sum(memory.values()))} on {where}: "
        + ", ".join(f"{name} {_gib(n_bytes)}" for name, n_bytes in memory.items()),
        "disk": f"{saved_bytes / 1e9:,.1f} GB a checkpoint, {settings.checkpoint.keep + 1} at once",
        "time": f"{_duration(seconds)} on {processes} × {gpu} at {mfu:.0%} of {PEAK_FLOPS[gpu] / 1e12:,.0f} TFLOP/s",
    }
    if settings.runtime.precision == "fp32":
        said["time"] = "not known for fp32; with 16 bits " + said["time"]
    return said


def _memory(settings: Settings, network: GPT, processes: int, last_k: int) -> dict[str, float]:
    """Return the bytes that one process holds at the height of an update, by what they are for."""
    is_cut = settings.runtime.parallel == "fsdp" and processes > 1
    width_bytes = 4 if settings.runtime.precision == "fp32" else 2
    share = processes if is_cut else 1
    learning = _bytes(network, learning_only=True)
    # Linear layers read 16-bit copies, which live as long as an update's forward and backward; of what is cut there
    # are those of two blocks at a time, the one at work and the next, with their gradients, and the rest as a whole.
    copies = _bytes(network, learning_only=False) * width_bytes / 4 if width_bytes < 4 else 0
    block = _bytes(network.blocks[0], learning_only=False)
    whole = _bytes(network, learning_only=False) - settings.model.n_layer * block
    gathered = 4 * block * width_bytes / 4 + 2 * whole if is_cut else copies
    sequences = micro_batch_size(settings.train, processes)
    kept = kept_bytes(settings.model, sequences, last_k, width_bytes, settings.runtime.recompute_blocks)
    return {
        "weights": _bytes(network, learning_only=False) / share,
        "gradients": learning / share,
        "optimizer": _state_bytes(settings, network) / share,
        "copies" if not is_cut else "gathered": gathered,
        "activations": kept,
        "logits": logits_bytes(network, sequences * last_k, width_bytes),
    }


def _bytes(module: nn.Module, learning_only: bool) -> int:
    return sum(each.nbytes for each in module.parameters() if each.requires_grad or not learning_only)


def _state_bytes(settings: Settings, network: GPT) -> int:
    """Return the bytes of the optimizer's state, and of the weights' average where there is one."""
    optimizer = build_optimizer(network, settings.optim)
    average = 0 if settings.optim.ema_decay is None else _bytes(network, learning_only=True)
    return average + sum(tensor.nbytes for tensor in state_like(network, optimizer).values())


def _parameters(network: GPT) -> str:
    learning = sum(each.numel() for each in network.parameters() if each.requires_grad)
    part = "" if learning == network.n_parameters() else f", of which {learning / 1e6:,.1f} M learn"
    return f"{network.n_parameters() / 1e6:,.1f} M parameters{part}"


def _up_to(numbers: Collection[int]) -> str:
    low, high = min(numbers), max(numbers)
    return _short(low) if low == high else f"{_short(low)}to {_short(high)}"


def _short(number: float) -> str:
    """Return three digits of a number and the unit's prefix."""
    exponent = min(6, int(math.log10(max(1, number)) / 3))
    return f"{number / 1000**exponent:.3g} {' kMGTPE'[exponent].strip()}"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"


def _duration(seconds: float) -> str:
    days, hours, minutes = int(seconds // 86_400), int(seconds // 3600 % 24), int(seconds // 60 % 60)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds % 60)} s"
