"""How gradients are added up over processes and micro-batches, and what is told of a part of them on the way."""

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.model.gpt import GPT, build
from dist_train.runtime.parallel import Replica
from dist_train.runtime.process import Process, group_of_one
from dist_train.sections import ModelSettings
from dist_train.training.loss import LastKLoss
from tests.runtime.test_parallel import ALONE, TOKENS, replica_of, small_replica
from tests.runtime.test_process import run_processes


def accumulate(replica: Replica, micro_batches: Sequence[torch.Tensor]) -> None:
    """Add up gradients of the mean loss over the last 2 targets of four sequences, which all processes have together.

    The `micro_batches` are this process's.
    """
    for number, tokens in enumerate(micro_batches, start=1):
        with replica.accumulating(is_last=number == len(micro_batches)):
            replica.backward(replica.loss(tokens[:, :-1], tokens[:, 1:], 2), count=4 * 2)


def square_norm(network: nn.Module) -> float:
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return sum(gradient.double().square().sum().item() for gradient in gradients)


def part_square_norm(replica: Replica) -> float:
    part = replica.take_part_square_norm()
    assert part is not None
    return part.item()


def test_of_one_process_the_first_micro_batch_is_the_measured_part() -> None:
    replica, plain = small_replica(ALONE, precision="fp32"), small_replica(ALONE, precision="fp32")
    accumulate(replica, [TOKENS[:2], TOKENS[2:3], TOKENS[3:]])
    accumulate(plain, [TOKENS[:2]])
    assert part_square_norm(replica) == pytest.approx(square_norm(plain.network), rel=1e-5)
    assert replica.take_part_square_norm() is None


@pytest.mark.parametrize("is_grouped", [False, True])
def test_a_batch_taken_at_once_has_no_part_to_measure(is_grouped: bool) -> None:
    with group_of_one(ALONE) if is_grouped else nullcontext(ALONE) as process:
        replica = small_replica(process, precision="fp32")
        accumulate(replica, [TOKENS])
        assert replica.take_part_square_norm() is None


def test_the_part_is_measured_without_float16s_scale() -> None:
    norms = []
    for precision in ("fp16", "fp32"):
        replica = small_replica(ALONE, precision=precision)
        accumulate(replica, [TOKENS[:2], TOKENS[2:]])
        norms.append(part_square_norm(replica))
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_two_processes_end_in_the_weights_of_torchs_own_averaging_and_know_their_shares() -> None:
    work = """
from tests.runtime import test_reduction
seen["weights"] = test_reduction.weights_beside_torchs_own(process)
seen["shares"] = test_reduction.shares_told_and_true(process)
"""
    first, second = run_processes(2, work)
    assert len({*first["weights"], *second["weights"]}) == 1
    told, told_in_bf16, true = zip(first["shares"], second["shares"], strict=True)
    assert told == told_in_bf16 == pytest.approx(true, rel=5e-5)
    assert true[0] != pytest.approx(true[1], rel=0.01)


def network_of_several_buckets() -> GPT:
    """Return one whose gradients DDP reduces in several parts, of which the first has one MiB."""
    return build(ModelSettings(n_layer=3, n_head=1, n_embd=160, block_size=6, dropout=0.0), 11, 0, ALONE.device)


def weights_beside_torchs_own(process: Process) -> list[str]:
    """Return hashes of the weights after 12 updates of two processes: by `Replica`, and by DDP without a hook."""
    networks = [network_of_several_buckets() for _ in range(2)]
    ours, plain = (replica_of(*each, precision="fp32") for each in zip(networks, (process, ALONE), strict=True))
    averaged = DistributedDataParallel(LastKLoss(networks[1]), gradient_as_bucket_view=True)
    optimizers = [torch.optim.AdamW(network.parameters(), fused=True) for network in networks]
    tokens = TOKENS.chunk(2)[process.rank]
    for _ in range(12):
        accumulate(ours, [tokens])
        (averaged(tokens[:, :-1], tokens[:, 1:], 2) * (process.world_size / (4 * 2))).backward()
        for replica, optimizer in zip((ours, plain), optimizers, strict=True):
            replica.update(optimizer, grad_clip=1.0)
    return [sha256(network) for network in networks]


def sha256(network: nn.Module) -> str:
    weights = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()


def shares_told_and_true(process: Process) -> list[float]:
    """Return the squared norm of this process's share of a gradient: told with sums in fp32 and bf16, and as it is."""
    tokens = TOKENS.chunk(2)[process.rank]
    told = []
    for reduction in ("fp32", "bf16"):
        replica = replica_of(network_of_several_buckets(), process, gradient_reduction=reduction, precision="fp32")
        accumulate(replica, [tokens[:1], tokens[1:]])
        told.append(part_square_norm(replica))
    alone = replica_of(network_of_several_buckets(), ALONE, precision="fp32")
    accumulate(alone, [tokens])
    return [*told, square_norm(alone.network)]


GROUPS = """
import sys
from tests.runtime import test_reduction

def reduce_and_drop():
    with test_reduction.group_of_one(test_reduction.ALONE) as process:
        replica = test_reduction.small_replica(process, precision="fp32", gradient_reduction=sys.argv[1])
        test_reduction.accumulate(replica, [test_reduction.TOKENS])

for _ in range(1000):
    reduce_and_drop()
"""


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["fp32", "bf16"])
def test_a_group_can_be_dropped_right_after_its_last_reduction(reduction: str) -> None:
    """Where DDP's reducer drops it, some of a thousand deadlock: gloo's threads need the interpreter's lock."""
    subprocess.run([sys.executable, "-c", GROUPS, reduction], check=True, timeout=300)
