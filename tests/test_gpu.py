"""What runs promise on a GPU as on a CPU: one process, the type it computes in there, and its own kernels.

`DIST_TRAIN_TEST_DEVICE=cpu` shows that the tests themselves hold, where there is no GPU.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_train.bench.dropout import attention_drop_rate
from dist_train.bench.plain import VARIANTS
from dist_train.config import Settings
from dist_train.model.generation import Sampling, generate
from dist_train.model.gpt import build
from dist_train.sections import ModelSettings
from dist_train.training.trainer import train
from tests.conftest import assert_same_weights, finish, losses, metrics, run_torchrun, start_together

DEVICE = os.environ.get("DIST_TRAIN_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "")
pytestmark = pytest.mark.skipif(not DEVICE, reason="there is no GPU here")

Run = Callable[..., Path]
MODEL = ModelSettings(n_layer=3, n_head=4, n_embd=256, block_size=64, vocab_multiple=128, dropout=0.0)
LIKE_A_GPUS = {
    **{"model.n_embd": 64, "model.block_size": 32, "model.vocab_multiple": 128, "train.micro_batch_size": 4},
    **{"optim.learning_rate": 3e-3, "runtime.device": DEVICE, "runtime.precision": "bf16"},
}


@pytest.fixture
def run(tiny: Callable[..., Settings], tmp_path: Path) -> Run:
    """Train a tiny run of a name and return its folder: `run("whole", {"train.max_iters": 6})`."""

    def trained(name: str, changes: dict[str, Any] | None = None) -> Path:
        return train(tiny({**LIKE_A_GPUS, "run.out_dir": tmp_path / name, **(changes or {})})).root

    return trained


def assert_same_run(one: Path, other: Path) -> None:
    assert_same_weights(one, other)
    assert losses(one) == losses(other)


# ---- the same as elsewhere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_float32_does(precision: str, run: Run) -> None:
    still = {"model.dropout": 0.0, "loss.last_k": "all", "train.max_iters": 40, "optim.learning_rate": 1e-3}
    half, full = (run(name, {**still, "runtime.precision": name}) for name in (precision, "fp32"))
    assert losses(half) == pytest.approx(losses(full), rel=0.02)
    assert losses(full)[-1] < losses(full)[0] - 1


def test_float32_is_that_of_a_cpu(run: Run) -> None:
    still = {"model.dropout": 0.0, "loss.last_k": 4, "runtime.precision": "fp32"}
    here, there = run("here", still), run("there", {**still, "runtime.device": "cpu"})
    assert losses(here) == pytest.approx(losses(there), abs=1e-3)
    for one, other in zip(metrics(here, "eval"), metrics(there, "eval"), strict=True):
        assert one["all_token_loss"] == pytest.approx(other["all_token_loss"], abs=1e-3)


def test_compiled_blocks_learn_what_eager_ones_do(run: Run) -> None:
    still = {"model.dropout": 0.0, "loss.curriculum": "shrink", "train.max_iters": 24}
    compiled, eager = (run(str(value), {**still, "runtime.compile": value}) for value in (True, False))
    assert losses(compiled) == pytest.approx(losses(eager), rel=0.01)


@pytest.mark.parametrize("last_k", [1, 5, 64])
@pytest.mark.parametrize("name", ["plain", "head_sliced"])
def test_gradients_of_the_last_k_are_those_of_the_plain_way(name: str, last_k: int) -> None:
    def result(name: str) -> tuple[Tensor, list[Tensor]]:
        network = build(MODEL, 257, seed=1, device=torch.device(DEVICE))
        tokens = torch.randint(257, (4, 65), generator=torch.Generator().manual_seed(2)).to(DEVICE)
        loss = VARIANTS[name](network)(tokens[:, :-1], tokens[:, 1:], last_k)
        loss.backward()
        return loss.detach(), [p.grad for p in network.parameters() if p.grad is not None]

    (loss, gradients), (other_loss, others) = result("trainer"), result(name)
    torch.testing.assert_close(loss, other_loss, rtol=1e-4, atol=1e-4)
    assert len(gradients) == len(others)
    for gradient, other in zip(gradients, others, strict=True):
        assert (gradient - other).norm() <= 1e-3 * other.norm()


# ---- what is random, and what is not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_drops_as_often_as_asked_for(dtype: torch.dtype, dropout: float) -> None:
    settings = ModelSettings(n_head=12, n_embd=768, block_size=256, dropout=dropout)
    torch.manual_seed(1)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        rate = attention_drop_rate(settings, 16, torch.device(DEVICE))
    # 32 sequences of 12 heads, 16 queries, and the 64 keys that a head of 64 has places for.
    error = math.sqrt(dropout * (1 - dropout) / (32 * 12 * 16 * 64))
    assert abs(rate - dropout) <= 3 * error


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resumed_equals_uninterrupted_bit_for_bit_where_that_is_asked_for(precision: str, run: Run) -> None:
    exact = {"runtime.deterministic": True, "runtime.precision": precision, "optim.ema_decay": 0.9}
    whole = run("whole", exact)
    run("cut", {**exact, "train.max_iters": 5})
    assert_same_run(whole, run("cut", exact))


def test_evaluating_and_saving_change_nothing(run: Run) -> None:
    exact = {"runtime.deterministic": True, "model.dropout": 0.3}
    often = run("often", {**exact, "eval.interval": 1, "log.interval": 1, "checkpoint.interval": 1})
    assert_same_run(often, run("seldom", {**exact, "eval.interval": 99, "checkpoint.interval": 99}))


def test_recomputed_blocks_drop_what_was_dropped(run: Run) -> None:
    exact = {"runtime.deterministic": True, "model.dropout": 0.3}
    assert_same_run(*(run(str(value), {**exact, "runtime.recompute_blocks": value}) for value in (True, False)))


def test_muon_learns(run: Run) -> None:
    seen = losses(run("muon", {"optim.name": "muon", "loss.last_k": "all", "train.max_iters": 40}))
    assert seen[-1] < seen[0] - 1


# ---- processes, memory, text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_group_of_one_learns_what_a_process_alone_does(
    parallel: str, run: Run, tiny_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    still = {**LIKE_A_GPUS, "model.dropout": 0.0, "runtime.precision": "fp32", "runtime.parallel": parallel}
    result = run_torchrun(1, "train", *tiny_arguments({**still, "run.out_dir": tmp_path / "group"}))
    assert result.returncode == 0, result.stderr
    alone = run("alone", {**still, "runtime.parallel": "ddp"})
    assert losses(tmp_path / "group") == pytest.approx(losses(alone), abs=1e-4)


@pytest.mark.skipif(DEVICE != "cuda", reason="what is left of a CPU's memory nobody knows")
def test_too_little_memory_is_said_with_what_helps_and_what_filled_it(
    tiny_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    large = {"train.global_batch_size": 1 << 23, "eval.batches": 1, "log.memory_history": True}
    program = (
        "import sys, torch; torch.cuda.set_per_process_memory_fraction(0.05); "
        "from dist_train.__main__ import main; sys.exit(main())"
    )
    arguments = tiny_arguments({**large, "runtime.device": "cuda", "loss.last_k": "all"})
    statuses, (errors,) = finish(start_together([arguments], program=["-c", program]))
    assert statuses == [2], errors
    assert errors.startswith("error: out of memory")
    assert "--train.micro_batch_size=" in errors
    assert errors.count("\n") == 1
    assert (tmp_path / "run/out_of_memory-0.pickle").stat().st_size


def test_the_cache_of_keys_and_values_changes_no_token() -> None:
    network = build(MODEL, 257, seed=3, device=torch.device(DEVICE)).eval()
    with torch.no_grad():
        found = generate(network, [1, 2, 3], 40, Sampling(0.0), torch.Generator().manual_seed(1))
        tokens = [1, 2, 3]
        for _ in range(40):
            logits = network(torch.tensor([tokens[-64:]], device=DEVICE), 1)
            tokens.append(int(logits[0, -1, :257].argmax()))
    assert list(found) == tokens
