"""A network of which each process keeps a part: FSDP2, for networks that are larger than a GPU."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from dist_train.runtime.parallel import Replica, norm_of
from dist_train.runtime.process import Process
from dist_train.sections import RuntimeSettings


class ShardedReplica(Replica):
    """This process's part of a network, whose blocks are gathered one after the other when they are run.

    Gradients are added up and cut after each micro-batch: to keep them whole until the last one would take the memory
    that is to be saved. Evaluation gathers the weights, and them alone, on every process.
    """

    is_copy = False

    def _distribute(self, objective: nn.Module, process: Process, settings: RuntimeSettings) -> nn.Module:
        self._device, self._mesh = process.device, init_device_mesh(process.device.type, (process.world_size,))
        self._whole = copy.deepcopy(self.network).to("meta").eval()
        reduced = torch.bfloat16 if settings.gradient_reduction == "bf16" else torch.float32
        sent = torch.bfloat16 if self.precision == torch.bfloat16 else None
        # Embeddings and the residual stream stay float32, as under autocast alone; blocks are sent in half the bytes.
        within, root = (
            MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
            for dtype in (sent, None)
        )
        for part in objective.modules():
            for block in part if isinstance(part, nn.ModuleList) else ():
                fully_shard(block, mesh=self._mesh, mp_policy=within, reshard_after_forward=True)
        fully_shard(objective, mesh=self._mesh, mp_policy=root)
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                # By default it divides by the number of processes; and gloo cannot divide.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return objective

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        gathered = {name: self.gather(part) for name, part in self.weights().items()}
        self._whole.load_state_dict(gathered, assign=True)
        try:
            with self.inference():
                yield self._whole
        finally:
            self._whole.to("meta")

    def gather(self, part: Tensor) -> Tensor:
        return part.full_tensor() if isinstance(part, DTensor) else part

    def cut(self, whole: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return whole
        # Every process has read the same, so that nobody has to send it.
        return distribute_tensor(whole.to(self._device), self._mesh, like.placements, src_data_rank=None)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        square = norm_of(_local(gradient) for gradient in gradients).square()
        dist.all_reduce(square)
        return square.sqrt()

    def _clip(self, at_most: float, norm: Tensor) -> None:
        super()._clip(at_most, DTensor.from_local(norm, self._mesh, [Replicate()]))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
