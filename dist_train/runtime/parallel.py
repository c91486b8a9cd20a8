"""From a plain module to a compiled, mixed-precision, data-parallel one. The only file that names these techniques."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from dist_train.config import RuntimeSettings, TrainSettings
from dist_train.errors import UserError
from dist_train.runtime.process import Process


def choose_precision(settings: RuntimeSettings, device: torch.device) -> torch.dtype:
    """Return the type that matrix products run in; `auto` asks the hardware."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if settings.precision != "auto":
        return named[settings.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        # Not torch.amp.is_autocast_available: a CPU without the instructions emulates bf16, several times slower.
        return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32
    return torch.float32


def _cpu_multiplies_bf16() -> bool:
    # Private names, which other versions of torch may lack: then bf16 is simply not chosen by itself.
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(check() for check in checks if check)


# Squares that are added up at once. torch 2.13 adds a float32 tensor's squares up in a few float32 sums on a CPU, which
# loses 0.5 % of those of GPT-2's embedding; what the noise is told from may be smaller than that.
_SQUARES_AT_ONCE = 2**17


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    parts = [part for gradient in gradients for part in gradient.flatten().split(_SQUARES_AT_ONCE)]
    return torch.nn.utils.get_total_norm(parts)


class _PartNorm:
    """The squared norm of the gradient of a part of an update, as it comes."""

    def __init__(self) -> None:
        self.square: Tensor | None = None

    def add(self, gradients: Iterable[Tensor]) -> None:
        square = _norm(gradients).square()
        self.square = square if self.square is None else self.square + square


class Replica:
    """This process's copy of a network, kept equal to the others' copies by adding up gradients."""

    def __init__(self, network: nn.Module, objective: nn.Module, process: Process, settings: RuntimeSettings) -> None:
        """Make `objective`, a module around `network` that returns its loss, ready to be run and differentiated."""
        self.network = network
        """The plain module, for evaluation, saving and sampling; the same weights."""
        self.device_type = process.device.type
        self.precision = choose_precision(settings, process.device)
        self.world_size = process.world_size
        # float16 loses small gradients, so they are scaled up for the backward pass; otherwise this does nothing.
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=self.precision == torch.float16)
        self._is_broken = torch.zeros((), device=process.device)
        self._part_norm = _PartNorm()
        self._is_compiled = settings.compile
        if self._is_compiled:
            _compile_what_repeats(objective)
        self._module = objective
        if process.is_grouped:
            # Alone in a group, a process's share is the whole.
            part_norm = self._part_norm if process.world_size > 1 else None
            self._module = averaging = _data_parallel(objective, process.device, settings, part_norm)
            # Behind the module, or its reducer would be the last to refer to the group. To drop that waits for gloo's
            # threads, and they for the interpreter's lock, to forget the last reduction; only when Python's reference
            # is dropped the lock is let go meanwhile (torch 2.13, https://github.com/pytorch/pytorch/issues/56297).
            self._process_group = averaging.process_group

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, self.precision, enabled=self.precision != torch.float32)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Run the plain network within: in the chosen precision, without gradients, and not compiled.

        Evaluation and sampling come in other shapes, of which each would be compiled for a few uses.
        """
        eager = torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext()
        with torch.no_grad(), self._autocast(), eager:
            yield

    def loss(self, *batch: Tensor | int) -> Tensor:
        """Return what the objective makes of `batch`: a sum over its supervised positions."""
        with self._autocast():
            return self._module(*batch)

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """Reduce gradients over the processes in the last micro-batch of an update only."""
        module = self._module
        with module.no_sync() if isinstance(module, DistributedDataParallel) and not is_last else nullcontext():
            yield
        # Where no other process has a part of the batch, the first micro-batch is the one that is measured.
        if self.world_size == 1 and not is_last and self._part_norm.square is None:
            self._part_norm.add(self._gradients())

    @record_function("backward")
    def backward(self, loss_sum: Tensor, count: int) -> None:
        """Add to the gradients of the mean loss, given this process's part of the sum and the count over all processes.

        What the processes add is then added up: nothing has to be divided again.
        """
        self.scaler.scale(loss_sum / count).backward()

    def take_part_square_norm(self) -> Tensor | None:
        """Return the squared norm of the gradient of a part of this update, a scalar, and forget it.

        The part has `measured_part` sequences, this process's own; it is weighted as in the whole gradient, of which it
        is a summand. None where the part is all of it. To be called before `update`, which changes float16's scale.
        """
        square, self._part_norm.square = self._part_norm.square, None
        return None if square is None else square / self.scaler.scale(torch.ones_like(square)).square()

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]

    @record_function("update")
    def update(self, optimizer: torch.optim.Optimizer, grad_clip: float | None) -> Tensor:
        """Clip, update the weights, clear the gradients; return the gradient's norm before clipping as a scalar.

        A gradient that is no number updates nothing, nor does any after it: the weights stay as they were until
        somebody looks at the norm, which here would mean to wait for the device. float16's scaler tries again instead.
        """
        self.scaler.unscale_(optimizer)
        norm = _norm(self._gradients())
        if grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), grad_clip, norm)
        if not self.scaler.is_enabled():
            self._is_broken += ~torch.isfinite(norm)
            # As the scaler says it to a fused optimizer: where this is not 0, the device leaves the update out.
            optimizer.found_inf = self._is_broken.clamp(max=1)  # type: ignore[attr-defined]
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm


def _data_parallel(
    objective: nn.Module, device: torch.device, settings: RuntimeSettings, part_norm: _PartNorm | None
) -> DistributedDataParallel:
    module = DistributedDataParallel(
        objective, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
    # Without a hook DDP divides by the number of processes, and shows nobody what each of them adds.
    module.register_comm_hook(part_norm, _add_up_in_bf16 if settings.gradient_reduction == "bf16" else _add_up)
    return module


def _add_up(part_norm: _PartNorm | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Add up a bucket of gradients over the processes, after adding this one's to its `part_norm`."""
    gradients = bucket.buffer()
    if part_norm:
        part_norm.add([gradients])
    return _sum_over_processes(gradients).then(lambda done: done.value()[0])


def _add_up_in_bf16(part_norm: _PartNorm | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Do the same with gradients that are bfloat16 on the way. torch's own hook refuses gloo."""
    gradients = bucket.buffer()
    if part_norm:
        part_norm.add([gradients])
    summed = _sum_over_processes(gradients.to(torch.bfloat16))
    return summed.then(lambda done: gradients.copy_(done.value()[0]))


def _sum_over_processes(numbers: Tensor) -> torch.futures.Future[list[Tensor]]:
    work = dist.all_reduce(numbers, async_op=True)
    assert work is not None
    return work.get_future()


def _compile_what_repeats(module: nn.Module) -> None:
    """Have every member of the lists in `module` compiled by itself, when it is run first.

    Members with the same code share one graph, so that twelve blocks compile as fast as one. What differs in an integer
    gets one graph for the second and all further values: a changing `last_k` compiles the last block twice and the
    others once, where the network as a whole would be compiled anew for each.
    """
    # Reduction overlaps with backward between the members as it is: DDP need not cut their graphs.
    torch._dynamo.config.optimize_ddp = False
    for part in module.modules():
        for member in part if isinstance(part, nn.ModuleList) else ():
            member.compile()


def micro_batch_size(settings: TrainSettings, world_size: int) -> int:
    """Return how many sequences one process takes at once.

    Raises `UserError` naming the nearest sizes where the batch cannot be divided.
    """
    total, at_most = settings.global_batch_size, settings.micro_batch_size
    share = total // world_size
    if total % world_size:
        nearest = [size for size in (share * world_size, (share + 1) * world_size) if size]
        raise UserError(
            f"train.global_batch_size={total} cannot be divided among {world_size} processes; "
            f"use {' or '.join(map(str, nearest))}"
        )
    size = min(at_most or share, share)
    if share % size:
        divisors = [divisor for divisor in range(1, share + 1) if share % divisor == 0]
        below = max(divisor for divisor in divisors if divisor < size)
        above = min(divisor for divisor in divisors if divisor > size)
        raise UserError(
            f"train.micro_batch_size={at_most} does not divide a process's {share} sequences; use {below} or {above}"
        )
    return size


def measured_part(settings: TrainSettings, world_size: int) -> int:
    """Return of how many sequences `Replica.take_part_square_norm` is: a process's share, or else a micro-batch."""
    return settings.global_batch_size // world_size if world_size > 1 else micro_batch_size(settings, world_size)
