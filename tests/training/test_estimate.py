"""What a dry run says a run takes is what it takes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_train.bench.memory import added_bytes
from dist_train.config import Settings
from dist_train.config_file import load_settings
from dist_train.errors import UserError
from dist_train.model.cost import kept_bytes
from dist_train.model.gpt import build, outline, recompute_blocks
from dist_train.sections import ModelSettings
from dist_train.training.estimate import estimate
from dist_train.training.trainer import train
from tests.conftest import ROOT, metrics, run_command


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("last_k", [1, 64, 128])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_blocks_keep_what_was_estimated(precision: torch.dtype, last_k: int, recomputes: bool) -> None:
    """Without dropout, whose masks are wider on a CPU."""

    def added(n_layer: int) -> tuple[int, int]:
        settings = ModelSettings(n_layer=n_layer, n_head=2, n_embd=128, block_size=128, dropout=0.0)
        network = build(settings, 61, seed=0, device=torch.device("cpu")).train()
        if recomputes:
            recompute_blocks(network)
        tokens = torch.zeros(32, 128, dtype=torch.int64)

        def forward() -> None:
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                network.hidden(tokens, last_k)

        measured = added_bytes(forward, torch.device("cpu"))
        assert measured is not None
        return measured, kept_bytes(settings, 32, last_k, precision.itemsize, recomputes)

    few, more = added(2), added(6)
    assert more[1] - few[1] == pytest.approx(more[0] - few[0], rel=0.2 if precision == torch.bfloat16 else 0.05)


def test_a_run_takes_the_flops_and_the_disk_that_it_was_said_to(tiny: Callable[..., Settings]) -> None:
    settings = tiny({"loss.curriculum": "shrink", "model.n_embd": 256, "model.n_layer": 6, "train.max_iters": 5})
    said = estimate(settings, processes=1)
    run = train(settings).root
    last = metrics(run, "train")[-1]
    assert f"; {last['flops'] / 1e9:.3g} GFLOP" in said["run"]
    assert f"{last['tokens']:.3g} tokens, of which the loss sees {last['supervised_tokens']:.3g} ;" in said["run"]
    saved_bytes = sum(path.stat().st_size for path in (run / "checkpoints" / "step-000005").iterdir())
    assert said["disk"].startswith(f"{saved_bytes / 1e9:,.1f} GB")


def test_gpt2s_largest_layout_has_its_parameters_and_fits_where_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(ROOT / "configs/gpt2_xl.yaml", ["--data.tokenizer=bytes", "--model.vocab_multiple=1"])
    assert outline(settings.model, 50257).n_parameters() == 1_557_611_200
    memory = [float(estimate(settings, processes=n)["memory"].split()[1]) for n in (1, 8, 64)]
    assert memory[0] > 24 > memory[1] > memory[2]


@pytest.mark.parametrize(
    ("option", "said"),
    [("--gpu=H1000", "use one of"), ("--mfu=40", "between 0 and 1"), ("--processes=0", "1 or more")],
)
def test_what_cannot_be_is_said_in_one_line(option: str, said: str, tmp_path: Path) -> None:
    config = tmp_path / "bytes.yaml"
    config.write_text("data: {tokenizer: bytes}")
    ended = run_command("train", str(config), "--dry-run", option)
    assert ended.returncode == UserError.exit_status
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_dry_run_trains_nothing_and_its_options_go_with_it(tmp_path: Path) -> None:
    config = tmp_path / "bytes.yaml"
    config.write_text(f"{{run: {{out_dir: {tmp_path}/run}}, data: {{tokenizer: bytes}}}}")
    ended = run_command("train", str(config), "--dry-run", "--processes=8", "--gpu=H200")
    assert ended.returncode == 0, ended.stderr
    assert "8 × H200" in ended.stdout
    assert not (tmp_path / "run").exists()
    assert "goes with --dry-run" in run_command("train", str(config), "--processes=8").stderr
