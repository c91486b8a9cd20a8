"""How a batch is divided, and what one process and its copies of a network promise."""

import platform
import subprocess
import sys

import pytest
import torch
import torch.distributed
from torch import nn

from dist_train.errors import UserError
from dist_train.model.dropout import Dropout, attend
from dist_train.model.gpt import GPT, build
from dist_train.runtime.parallel import Replica
from dist_train.runtime.precision import choose_precision
from dist_train.runtime.process import Process, group_of_one, start_process
from dist_train.runtime.shares import micro_batch_size
from dist_train.sections import ModelSettings, RuntimeSettings, TrainSettings
from dist_train.training.loss import LastKLoss

ALONE = Process(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("total", "micro", "world_size", "expected"),
    [(64, None, 1, 64), (64, None, 4, 16), (64, 8, 2, 8), (64, 100, 2, 32), (6, 3, 2, 3), (512, 16, 8, 16)],
)
def test_micro_batch_by_table(total: int, micro: int | None, world_size: int, expected: int) -> None:
    assert micro_batch_size(TrainSettings(global_batch_size=total, micro_batch_size=micro), world_size) == expected


@pytest.mark.parametrize(
    ("total", "micro", "world_size", "nearest"),
    [(64, None, 3, "63 or 66"), (2, None, 3, "use 3"), (64, 5, 1, "4 or 8"), (64, 24, 2, "16 or 32")],
)
def test_what_cannot_be_divided_is_refused_with_the_nearest_that_can(
    total: int, micro: int | None, world_size: int, nearest: str
) -> None:
    with pytest.raises(UserError, match=nearest):
        micro_batch_size(TrainSettings(global_batch_size=total, micro_batch_size=micro), world_size)


def test_one_process_is_the_identity() -> None:
    with start_process(RuntimeSettings(device="cpu")) as process:
        assert (process.rank, process.world_size, process.is_main) == (0, 1, True)
        numbers = torch.tensor([1.0, 2.0])
        assert torch.equal(process.sum(numbers.clone()), numbers)
        assert torch.equal(process.patient_sum(numbers.clone()), numbers)
        assert process.on_main(lambda: 7) == 7
        assert process.highest(3) == 3
        assert process.gather("a") == ["a"]
        assert process.disagreement({"settings": "a"}) is None


def test_dropout_is_seeded_by_the_process() -> None:
    process = Process(0, 1, torch.device("cpu"))
    draws = []
    for seed in (5, 5, 6):
        process.seed_dropout(seed)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_an_update_clips_measures_before_clipping_and_clears() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    replica = Replica(layer, layer, Process(0, 1, torch.device("cpu")), RuntimeSettings(device="cpu", precision="fp32"))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, fused=True)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert replica.update(optimizer, grad_clip=0.5).item() == pytest.approx(5.0)
    torch.testing.assert_close(before - layer.weight.detach(), torch.tensor([[0.3, 0.4]]), rtol=1e-4, atol=1e-6)
    assert layer.weight.grad is None


def test_the_norm_of_a_large_gradient_is_that_of_float64() -> None:
    """torch's own sum of so many float32 squares is 0.25 % short on a CPU."""
    layer = nn.Linear(2**23, 3, bias=False)
    gradient = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
    layer.weight.grad = gradient.clone()
    found = Replica(layer, layer, ALONE, RuntimeSettings(precision="fp32")).update(
        torch.optim.SGD(layer.parameters(), lr=0.0, fused=True), grad_clip=None
    )
    assert found.item() == pytest.approx(gradient.double().square().sum().sqrt().item(), rel=1e-5)


def small_replica(process: Process, **settings: object) -> Replica:
    """Return a network of three blocks with its loss."""
    model = ModelSettings(n_layer=3, n_head=1, n_embd=8, block_size=6, dropout=0.0)
    return replica_of(build(model, 11, seed=0, device=process.device), process, **settings)


def replica_of(network: GPT, process: Process, **settings: object) -> Replica:
    return Replica(network, LastKLoss(network), process, RuntimeSettings.model_validate({"device": "cpu", **settings}))


TOKENS = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(1))


def gradients(replica: Replica, last_k: int) -> list[torch.Tensor]:
    """Return the gradients of the mean loss over the last k targets of four sequences."""
    replica.backward(replica.loss(TOKENS[:, :-1], TOKENS[:, 1:], last_k), count=4 * last_k)
    found = [parameter.grad.clone() for parameter in replica.network.parameters() if parameter.grad is not None]
    replica.network.zero_grad()
    return found


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_network_runs_in_the_precision_asked_for(precision: str, dtype: torch.dtype) -> None:
    replica = small_replica(ALONE, precision=precision)
    seen: list[torch.dtype] = []
    for module in replica.network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with replica.inference():
        assert replica.network(TOKENS[:, :-1], 1).dtype == dtype
    loss = replica.loss(TOKENS[:, :-1], TOKENS[:, 1:], 6)
    assert set(seen) == {dtype}
    assert loss.dtype == torch.float32
    assert loss.requires_grad


def test_only_the_last_micro_batch_reduces_gradients() -> None:
    with group_of_one(ALONE) as process:
        replica = small_replica(process)
        reduces = []
        for is_last in (False, True):
            with replica.accumulating(is_last):
                reduces.append(getattr(replica._module, "require_backward_grad_sync"))  # noqa: B009 - a module has none
        assert reduces == [False, True]


def test_a_group_of_one_changes_no_gradient() -> None:
    expected = gradients(small_replica(ALONE, precision="fp32"), last_k=2)
    with group_of_one(ALONE) as process:
        torch.testing.assert_close(gradients(small_replica(process, precision="fp32"), last_k=2), expected)


def test_gradients_may_be_reduced_in_bf16() -> None:
    expected = gradients(small_replica(ALONE, precision="fp32"), last_k=2)
    with group_of_one(ALONE) as process:
        found = gradients(small_replica(process, precision="fp32", gradient_reduction="bf16"), last_k=2)
    assert all(gradient.dtype == torch.float32 for gradient in found)
    for gradient, exact in zip(found, expected, strict=True):
        assert torch.equal(gradient, exact.bfloat16().float())


def test_compiled_blocks_have_the_same_gradients_and_few_graphs() -> None:
    plain, compiled = (small_replica(ALONE, precision="fp32", compile=is_compiled) for is_compiled in (False, True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for last_k in (1, 2, 3, 4, 6, 1, 5):
        torch.testing.assert_close(gradients(compiled, last_k), gradients(plain, last_k))
    # One for all positions, which two blocks share, one for the first k, and one that takes any other.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("last_k", [3, 40])
def test_what_is_compiled_drops_as_many_as_it_was_told(last_k: int) -> None:
    torch.manual_seed(1)
    query, key = torch.zeros(64, 4, last_k, 8), torch.zeros(64, 4, 40, 8)
    # Uniform attention to the first eight positions, whose values show which of them were dropped.
    value = torch.eye(40, 8).expand(64, 4, 40, 8)
    shown = torch.compile(attend, dynamic=False)(query, key, value, 0.3)[:, :, -1]
    assert (shown == 0).double().mean().item() == pytest.approx(0.3, abs=0.05)
    dropped = torch.compile(Dropout(0.3).train(), dynamic=False)(torch.ones(64, 64))
    assert (dropped == 0).double().mean().item() == pytest.approx(0.3, abs=0.05)
    assert dropped.max().item() == pytest.approx(1 / 0.7)


def test_evaluating_compiles_nothing() -> None:
    replica = small_replica(ALONE, compile=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with replica.inference():
        assert not replica.network(TOKENS[:, :5], 2).requires_grad
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


PAGE_FAULTS = """
import resource, sys, torch
from dist_train.sections import RuntimeSettings
from dist_train.runtime.process import start_process

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

with start_process(RuntimeSettings(device="cpu"), keeps_freed_memory=sys.argv[1] == "kept"):
    for round in range(9):
        if round == 3:
            before = page_faults()
        blocks = [torch.ones(10 * 2**20) for _ in range(3)]
        del blocks
print(page_faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives large blocks back at once")
def test_memory_that_is_freed_is_not_cleared_again_and_again() -> None:
    by_default, kept = (
        int(subprocess.run([sys.executable, "-c", PAGE_FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("default", "kept")
    )
    assert kept < by_default / 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="no cuda here"), start_process(RuntimeSettings(device="cuda")):
        pass


def test_precision_is_what_was_asked_for() -> None:
    cpu = torch.device("cpu")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert choose_precision(RuntimeSettings.model_validate({"precision": name}), cpu) == dtype
    assert choose_precision(RuntimeSettings(), cpu) in (torch.bfloat16, torch.float32)
