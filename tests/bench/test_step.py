"""The benchmark: what it races computes the same loss, and what it writes down was measured."""

import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_train.bench.contender import Apart, Way
from dist_train.bench.dropout import attention_drop_rate
from dist_train.bench.memory import added_bytes, resident_bytes
from dist_train.bench.plain import VARIANTS, variant_flops
from dist_train.bench.step import bench
from dist_train.config import Settings
from dist_train.config_file import load_settings
from dist_train.data.manifest import open_tokens
from dist_train.errors import UserError
from dist_train.model.dropout import attend
from dist_train.model.gpt import GPT, Attention, build
from dist_train.runtime.process import start_process
from dist_train.sections import ModelSettings
from dist_train.training.assembly import build_learner, windows_of
from dist_train.training.optimizer import build_optimizer
from dist_train.training.trainer import update
from tests.conftest import ROOT

Tiny = Callable[..., Settings]

CPU = torch.device("cpu")
T, N_VOCAB = 12, 20
MODEL = ModelSettings(n_layer=3, n_head=2, n_embd=16, block_size=T, vocab_multiple=32, dropout=0.0)


def network(settings: ModelSettings = MODEL) -> GPT:
    return build(settings, N_VOCAB, seed=1, device=CPU)


def loss_and_gradients(name: str, last_k: int) -> tuple[Tensor, list[Tensor]]:
    module = VARIANTS[name](network())
    tokens = torch.randint(N_VOCAB, (3, T + 1), generator=torch.Generator().manual_seed(2))
    loss = module(tokens[:, :-1], tokens[:, 1:], last_k)
    loss.backward()
    return loss.detach(), [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("last_k", [1, 3, T])
@pytest.mark.parametrize("name", ["plain", "head_sliced"])
def test_the_variants_have_the_same_loss_and_gradients(name: str, last_k: int) -> None:
    loss, gradients = loss_and_gradients("trainer", last_k)
    other_loss, other_gradients = loss_and_gradients(name, last_k)
    torch.testing.assert_close(other_loss, loss)
    assert len(gradients) == len(list(network().parameters()))
    torch.testing.assert_close(other_gradients, gradients)


def test_the_variants_make_the_same_updates_by_the_trainers_own_step(tiny: Tiny) -> None:
    settings = tiny({"model.dropout": 0.0, "loss.last_k": 3, "train.micro_batch_size": 4})
    weights = []
    with start_process(settings.runtime) as process:
        for change in VARIANTS.values():
            module = build(settings.model, 257, 1, process.device)
            data = open_tokens(settings.data)
            learner = build_learner(settings, process, data, windows_of(settings, data), module, change(module))
            for step in range(3):
                update(learner, step)
            learner.batches.close()
            weights.append([parameter.detach() for parameter in module.parameters()])
    # Adam divides by the gradient's size: where that is rounding noise, so is the update.
    torch.testing.assert_close(weights[1], weights[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weights[2], weights[0], atol=1e-4, rtol=1e-4)


def test_flops_count_what_each_variant_computes() -> None:
    def head(positions: int) -> int:
        return 3 * 4 * 2 * 16 * 32 * positions  # the padded rows are multiplied like all others

    counts = variant_flops(network(), sequences=4, last_k=1)
    assert counts["trainer"] < counts["head_sliced"] < counts["plain"]
    assert counts["plain"] - counts["head_sliced"] == head(T) - head(1)
    assert len(set(variant_flops(network(), sequences=4, last_k=T).values())) == 1


@pytest.mark.parametrize("last_k", [1, 5, 48])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_attention_drop_rate_is_counted(dropout: float, last_k: int) -> None:
    torch.manual_seed(1)
    settings = ModelSettings(n_head=4, n_embd=128, block_size=48, dropout=dropout)
    assert attention_drop_rate(settings, last_k, CPU) == pytest.approx(dropout, abs=0.02 if dropout else 0)


def test_an_attention_that_drops_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "attend", lambda _, query, key, value, dropout: attend(query, key, value, 0.0))
    assert attention_drop_rate(MODEL.model_copy(update={"dropout": 0.25}), T, CPU) == 0


def test_memory_is_the_steps_own() -> None:
    megabyte = 2**20

    def step() -> None:
        first = torch.zeros(megabyte, dtype=torch.uint8)
        second = torch.zeros(2 * megabyte, dtype=torch.uint8)
        del first, second
        torch.zeros(megabyte, dtype=torch.uint8)

    held = torch.zeros(64 * megabyte, dtype=torch.uint8)
    assert added_bytes(step, CPU) == 3 * megabyte
    del held


def test_what_stays_between_steps_is_weights_and_two_moments(tiny: Tiny) -> None:
    module = network()
    optimizer = build_optimizer(module, tiny().optim)
    weights = resident_bytes(module, optimizer)
    assert weights == 4 * module.n_parameters()
    module(torch.zeros(1, T, dtype=torch.int64), 1).sum().backward()
    optimizer.step()
    n_tensors = len(list(module.parameters()))
    assert resident_bytes(module, optimizer) == 3 * weights + 4 * n_tensors  # and a count of steps each


def test_bench_writes_what_the_interface_promises(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny({"model.dropout": 0.2, "model.vocab_multiple": 4096})
    path = bench(settings, budget_seconds=0.1)
    results = json.loads(path.read_text())
    assert path == settings.run.out_dir / "bench.json"
    assert results["config"]["model"]["n_layer"] == 2
    assert (results["device"], results["torch"], results["precision"]) == ("cpu", torch.__version__, "float32")
    assert list(results["variants"]) == ["trainer", "plain", "head_sliced", "no_dropout", "data_parallel"]
    for variant in results["variants"].values():
        assert statistics.median(variant["block_seconds"]) == variant["step_seconds"] > 0
        assert math.isclose(variant["tokens_per_second"], 8 * 16 / variant["step_seconds"])
        assert math.isclose(variant["supervised_tokens_per_second"], 8 / variant["step_seconds"])
        assert variant["mfu"] is None  # nobody knows a CPU's peak
    blocks = {name: variant["block_seconds"] for name, variant in results["variants"].items()}
    assert results["ratios"] == {
        f"{name}_over_trainer": statistics.median(a / b for a, b in zip(theirs, blocks["trainer"], strict=True))
        for name, theirs in blocks.items()
        if name != "trainer"
    }
    flops = {name: variant["flops_per_step"] for name, variant in results["variants"].items()}
    assert flops["trainer"] == flops["no_dropout"] == flops["data_parallel"] < flops["head_sliced"] < flops["plain"]
    memory = {name: results["variants"][name]["peak_memory_bytes"] for name in VARIANTS}
    assert memory["trainer"] <= memory["head_sliced"] < memory["plain"]
    assert results["attention_drop_rate"] == pytest.approx(0.2, abs=0.02)
    assert 0 <= results["loader_wait_fraction"] <= 1
    assert results["logging_fraction"] > 0
    assert "plain" in capsys.readouterr().out


def test_a_batch_that_cannot_be_divided_is_refused_before_anything_is_done(tiny: Tiny) -> None:
    settings = tiny({"train.micro_batch_size": 3})
    with pytest.raises(UserError, match="micro_batch_size"):
        bench(settings)
    assert not settings.run.out_dir.exists()


def test_a_mistake_in_a_process_apart_is_the_users_and_leaves_no_process(tiny: Tiny, tmp_path: Path) -> None:
    before = multiprocessing.active_children()
    with pytest.raises(UserError):
        Apart(Way("plain", tiny({"data.dir": tmp_path / "nothing"})))
    assert multiprocessing.active_children() == before


@pytest.mark.skipif(not Path("/proc").exists(), reason="there is no /proc")
def test_a_bench_that_is_killed_leaves_no_process(tiny_arguments: Callable[..., list[str]]) -> None:
    command = [sys.executable, "-m", "dist_train", "bench", *tiny_arguments()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    children: list[str] = []
    while not children and time.monotonic() < deadline and process.poll() is None:
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        found = [pid for task in tasks for pid in task.read_text().split()]
        children = [pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        time.sleep(0.05)
    assert children
    process.kill()
    process.wait()
    while (left := [pid for pid in children if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def _runs(pid: str) -> bool:
    """Say whether a process is there, and not merely waiting for its parent to hear of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


RACE = """
import sys
from pathlib import Path
from dist_train.config_file import load_settings
from dist_train.bench.step import bench
bench(load_settings(Path(sys.argv[1]), sys.argv[2:]), budget_seconds=0.1)
"""


def test_two_processes_race_with_one(tiny_arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    # Each times its own rounds, but all have to make the same number of steps, or they would wait for ever.
    script = tmp_path / "race.py"
    script.write_text(RACE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*launcher, *tiny_arguments()], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "run" / "bench.json").read_text())
    assert results["world_size"] == 2
    two, one = results["variants"]["trainer"], results["variants"]["one_process"]
    assert two["flops_per_step"] == 2 * one["flops_per_step"]
    assert math.isclose(one["tokens_per_second"], 4 * 16 / one["step_seconds"])  # half of the batch


def test_the_ready_made_benchmark_is_of_model5() -> None:
    ours, recipe = (load_settings(ROOT / f"configs/{name}.yaml") for name in ("bench", "model5"))
    assert ours.model == recipe.model.model_copy(update={"vocab_multiple": 50257})
    assert (ours.last_k, ours.optim) == (recipe.last_k, recipe.optim)
