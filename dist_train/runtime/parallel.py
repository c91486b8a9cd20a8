"""From a plain module to a compiled, mixed-precision, data-parallel one.

This file alone names these techniques, and `sharding.py` the one of keeping parts.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from dist_train.runtime.average import Average
from dist_train.runtime.precision import choose_precision
from dist_train.runtime.process import Process
from dist_train.sections import RuntimeSettings

# Squares that are added up at once. torch 2.13 adds a float32 tensor's squares up in a few float32 sums on a CPU, which
# loses 0.5 % of those of GPT-2's embedding; what the noise is told from may be smaller than that.
_SQUARES_AT_ONCE = 2**17


def norm_of(gradients: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients together, a float32 scalar."""
    parts = [part for gradient in gradients for part in gradient.flatten().split(_SQUARES_AT_ONCE)]
    return torch.nn.utils.get_total_norm(parts)


class _PartNorm:
    """The squared norm of the gradient of a part of an update, as it comes."""

    def __init__(self) -> None:
        self.square: Tensor | None = None

    def add(self, gradients: Iterable[Tensor]) -> None:
        square = norm_of(gradients).square()
        self.square = square if self.square is None else self.square + square


class Replica:
    """This process's copy of a network, kept equal to the others' copies by adding up gradients."""

    is_copy = True
    """Whether every process has all of the weights."""

    def __init__(
        self,
        network: nn.Module,
        objective: nn.Module,
        process: Process,
        settings: RuntimeSettings,
        ema_decay: float | None = None,
    ) -> None:
        """Make `objective`, a module around `network` that returns its loss, ready to be run and differentiated."""
        self.network = network
        """What learns, not compiled and not wrapped."""
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
        self._module = self._distribute(objective, process, settings)
        self.average = Average(network, ema_decay)
        """Of the weights, updated by whoever updates them."""

    def _distribute(self, objective: nn.Module, process: Process, settings: RuntimeSettings) -> nn.Module:
        if not process.is_grouped:
            return objective
        # Alone in a group, a process's share is the whole.
        part_norm = self._part_norm if process.world_size > 1 else None
        averaging = _data_parallel(objective, process.device, settings, part_norm)
        # Behind the module, or its reducer would be the last to refer to the group. To drop that waits for gloo's
        # threads, and they for the interpreter's lock, to forget the last reduction; only when Python's reference is
        # dropped the lock is let go meanwhile (torch 2.13, https://github.com/pytorch/pytorch/issues/56297).
        self._module, self._process_group = averaging, averaging.process_group
        return averaging

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

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """Yield the network with the weights that are evaluated, in eval mode, within `inference`; on all processes.

        It changes nothing of what learns.
        """
        was_training = self.network.training
        self.network.eval()
        try:
            with self.inference(), self.average.in_place():
                yield self.network
        finally:
            self.network.train(was_training)

    def weights(self) -> dict[str, Tensor]:
        """Return what is evaluated and saved, by name: the average where there is one, else the network's own."""
        return {**self.network.state_dict(), **self.average.tensors}

    def gather(self, part: Tensor) -> Tensor:
        """Return the whole of a tensor, of which each process has a part; on all processes together. Here all of it."""
        return part

    def cut(self, whole: Tensor, like: Tensor) -> Tensor:
        """Return this process's part of a tensor that it has all of, where `like` is one's. Here all of it."""
        return whole

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
        # Where no process has gradients of its own, those of the first micro-batch are the ones that are measured.
        if (self.world_size == 1 or not self.is_copy) and not is_last and self._part_norm.square is None:
            self._part_norm.square = self._norm(self._gradients()).square()

    @record_function("backward")
    def backward(self, loss_sum: Tensor, count: int) -> None:
        """Add to the gradients of the mean loss, given this process's part of the sum and the count over all processes.

        What the processes add is then added up: nothing has to be divided again.
        """
        self.scaler.scale(loss_sum / count).backward()

    def take_part_square_norm(self) -> Tensor | None:
        """Return the squared norm of the gradient of a part of this update, a scalar, and forget it.

        The part has `measured_part` sequences; it is weighted as in the whole gradient, of which it is a summand. None
        where the part is all of it. To be called before `update`, which changes float16's scale.
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
        norm = self._norm(self._gradients())
        if grad_clip is not None:
            self._clip(grad_clip, norm)
        if not self.scaler.is_enabled():
            self._is_broken += ~torch.isfinite(norm)
            # As the scaler says it to a fused optimizer: where this is not 0, the device leaves the update out.
            optimizer.found_inf = self._is_broken.clamp(max=1)  # type: ignore[attr-defined]
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return norm_of(gradients)

    def _clip(self, at_most: float, norm: Tensor) -> None:
        torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), at_most, norm)


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
