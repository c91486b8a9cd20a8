"""How a batch is divided, and what one process and its copies of a network promise."""

import pytest
import torch

from dist_train.config import RuntimeSettings, TrainSettings
from dist_train.errors import UserError
from dist_train.runtime.parallel import choose_precision, micro_batch_size
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="there is no cuda here"), start_process(RuntimeSettings(device="cuda")):
        pass


def test_precision_is_what_was_asked_for() -> None:
    cpu = torch.device("cpu")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert choose_precision(RuntimeSettings.model_validate({"precision": name}), cpu) == dtype
    assert choose_precision(RuntimeSettings(), cpu) in (torch.bfloat16, torch.float32)
