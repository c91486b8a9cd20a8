"""How a batch is divided, and what one process and its copies of a network promise."""

from pathlib import Path

import pytest
import torch
import torch.distributed

from dist_train.config import ModelSettings, RuntimeSettings, TrainSettings
from dist_train.errors import UserError
from dist_train.model.gpt import build
from dist_train.runtime.parallel import Replica, choose_precision, micro_batch_size
from dist_train.runtime.process import Process, start_process


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
        process.agree({"settings": "a"})


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
    replica = Replica(layer, Process(0, 1, torch.device("cpu")), RuntimeSettings(device="cpu", precision="fp32"))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert replica.update(optimizer, grad_clip=0.5).item() == pytest.approx(5.0)
    torch.testing.assert_close(before - layer.weight.detach(), torch.tensor([[0.3, 0.4]]), rtol=1e-4, atol=1e-6)
    assert layer.weight.grad is None


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_forward_runs_in_the_precision_asked_for(precision: str, dtype: torch.dtype) -> None:
    settings = RuntimeSettings.model_validate({"device": "cpu", "precision": precision})
    model = ModelSettings(n_layer=1, n_head=1, n_embd=8, block_size=4)
    network = build(model, 11, seed=0, device=torch.device("cpu"))
    replica = Replica(network, Process(0, 1, torch.device("cpu")), settings)
    assert replica.forward(torch.zeros(1, 4, dtype=torch.int64), 1).dtype == dtype


def test_only_the_last_micro_batch_reduces_gradients(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        # As of two processes, so that it is wrapped; the group of one reduces with itself.
        replica = Replica(torch.nn.Linear(2, 1), Process(0, 2, torch.device("cpu")), RuntimeSettings(device="cpu"))
        reduces = []
        for is_last in (False, True):
            with replica.accumulating(is_last):
                reduces.append(getattr(replica._module, "require_backward_grad_sync"))  # noqa: B009 - a module has none
        assert reduces == [False, True]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="no cuda here"), start_process(RuntimeSettings(device="cuda")):
        pass


def test_precision_is_what_was_asked_for() -> None:
    cpu = torch.device("cpu")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert choose_precision(RuntimeSettings.model_validate({"precision": name}), cpu) == dtype
    assert choose_precision(RuntimeSettings(), cpu) in (torch.bfloat16, torch.float32)
