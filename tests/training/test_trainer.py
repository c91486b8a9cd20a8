"""What a run promises: the same weights however it is cut, however many processes it has, whatever is looked at."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_train.config import Settings
from dist_train.errors import LossError, UserError
from dist_train.model.gpt import build
from dist_train.runtime.parallel import Replica
from dist_train.runtime.process import Process
from dist_train.training import trainer
from dist_train.training.trainer import train
from tests.conftest import assert_same_weights, losses, metrics, train_together, weights

Tiny = Callable[..., Settings]
Arguments = Callable[..., list[str]]


@pytest.mark.parametrize("stop", range(1, 12))
def test_resumed_equals_uninterrupted_bit_for_bit(stop: int, tiny: Tiny, tmp_path: Path) -> None:
    whole, cut = {"run.out_dir": tmp_path / "whole"}, {"run.out_dir": tmp_path / "cut"}
    train(tiny(whole))
    train(tiny({**cut, "train.max_iters": stop}))
    train(tiny(cut))
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    totals = [[line["supervised_tokens"] for line in metrics(tmp_path / name, "train")] for name in ("whole", "cut")]
    assert totals[0] == totals[1]


EVERYTHING = {
    "optim.name": "muon",
    "optim.ema_decay": 0.9,
    "model.freeze": "[embeddings]",
    "runtime.recompute_blocks": True,
}


def test_resumed_with_every_kind_of_state_equals_uninterrupted(tiny: Tiny, tmp_path: Path) -> None:
    whole, cut = ({**EVERYTHING, "run.out_dir": tmp_path / name} for name in ("whole", "cut"))
    train(tiny(whole))
    train(tiny({**cut, "train.max_iters": 5}))
    train(tiny(cut))
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert metrics(tmp_path / "whole", "eval")[-1]["loss"] == metrics(tmp_path / "cut", "eval")[-1]["loss"]


def test_recomputing_blocks_changes_no_bit_of_a_run(tiny: Tiny, tmp_path: Path) -> None:
    kept, recomputed = (
        train(tiny({"runtime.recompute_blocks": recomputes, "run.out_dir": tmp_path / str(recomputes)})).root
        for recomputes in (False, True)
    )
    assert_same_weights(kept, recomputed)
    assert metrics(kept, "train")[-1]["flops"] < metrics(recomputed, "train")[-1]["flops"]


def test_what_is_frozen_stays_as_it_was_and_has_no_state(tiny: Tiny, tmp_path: Path) -> None:
    settings = tiny({"model.freeze": "[embeddings, 1]", "optim.weight_decay": 0.5})
    before = build(settings.model, 257, settings.run.derive_seed("weights"), torch.device("cpu")).state_dict()
    after = weights(train(settings).root)
    frozen = {name for name in before if name.startswith(("token_", "position_", "blocks.1."))}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    assert {name.partition(".")[2] for name in after.keys() - before.keys()} == before.keys() - frozen


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_resumed_on_another_number_of_processes_it_goes_on_like_the_uninterrupted(
    first: int, then: int, tiny_arguments: Arguments, tiny: Tiny, tmp_path: Path
) -> None:
    still = {"model.dropout": 0.0, "loss.last_k": 4, "eval.interval": 50, "train.max_iters": 100}
    whole = train(tiny({**still, "run.out_dir": tmp_path / "whole"})).root
    for processes, last in ((first, 50), (then, 100)):
        train_together(tiny_arguments({**still, "train.max_iters": last}), processes)
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-5)
    assert len(losses(whole)) == 100


def test_a_run_killed_between_checkpoints_goes_on_as_if_never_stopped(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny({"run.out_dir": tmp_path / "whole"}))
    real, calls = trainer._accumulate_gradients, []

    def killed(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "_accumulate_gradients", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tiny({"run.out_dir": tmp_path / "cut"}))
    assert json.loads((tmp_path / "cut/run_status.json").read_text())["status"] == "failed"
    with (tmp_path / "cut/metrics.jsonl").open("ab") as torn:
        torn.write(b'{"kind": "train", "step": 6, "lo\xff')
    monkeypatch.undo()
    train(tiny({"run.out_dir": tmp_path / "cut"}))
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert [e["step"] for e in metrics(tmp_path / "cut", "eval")] == [0, 4, 8, 12]
    assert (tmp_path / "cut/samples/step-000012.txt").exists()


def test_evaluation_and_logging_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    dropout = {"model.dropout": 0.3, "run.out_dir": tmp_path / "often"}
    train(tiny({**dropout, "eval.interval": 1, "log.interval": 1, "checkpoint.interval": 1}))
    never = {"eval.interval": 99, "log.interval": 99, "checkpoint.interval": 99, "eval.batches": 5}
    train(tiny({**dropout, **never, "run.out_dir": tmp_path / "never"}))
    assert losses(tmp_path / "often") == losses(tmp_path / "never")
    assert_same_weights(tmp_path / "often", tmp_path / "never")


def test_dropout_follows_the_seed_and_does_something(tiny: Tiny, tmp_path: Path) -> None:
    runs = [{"model.dropout": 0.3}, {"model.dropout": 0.3}, {"model.dropout": 0.0}]
    for number, changes in enumerate(runs):
        train(tiny({**changes, "train.max_iters": 3, "run.out_dir": tmp_path / str(number)}))
    first, again, without = (losses(tmp_path / str(number)) for number in range(3))
    assert first == again
    assert first != without


def test_all_of_the_last_k_is_all_token_training(tiny: Tiny, tmp_path: Path) -> None:
    for k in ("16", "all"):
        train(tiny({"loss.last_k": k, "run.out_dir": tmp_path / k}))
    assert losses(tmp_path / "16") == losses(tmp_path / "all")
    last = metrics(tmp_path / "all", "eval")[-1]
    assert last["loss"] == last["all_token_loss"]
    assert metrics(tmp_path / "all", "train")[-1]["supervised_tokens"] == 12 * 8 * 16


def test_accumulating_equals_one_batch(tiny: Tiny, tmp_path: Path) -> None:
    base = {"model.dropout": 0.0, "loss.last_k": 3}
    train(tiny({**base, "run.out_dir": tmp_path / "one"}))
    train(tiny({**base, "train.micro_batch_size": 2, "run.out_dir": tmp_path / "four"}))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "four"), abs=1e-5)


@pytest.mark.parametrize("ranks", ["rank0", "all"])
def test_two_processes_train_and_evaluate_like_one(
    ranks: str, tiny: Tiny, tiny_arguments: Arguments, tmp_path: Path
) -> None:
    base = {"model.dropout": 0.0, "loss.last_k": 2, "eval.ranks": ranks, "train.micro_batch_size": 2}
    train(tiny({**base, "run.out_dir": tmp_path / "one"}))
    train_together(tiny_arguments({**base, "run.out_dir": tmp_path / "two"}))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    for line, same in zip(metrics(tmp_path / "one", "eval"), metrics(tmp_path / "two", "eval"), strict=True):
        assert line["final_token_loss"] == pytest.approx(same["final_token_loss"], abs=1e-5)
        assert line["all_token_loss"] == pytest.approx(same["all_token_loss"], abs=1e-5)
    assert [line["tokens"] for line in metrics(tmp_path / "one", "train")] == [
        line["tokens"] for line in metrics(tmp_path / "two", "train")
    ]


def test_two_processes_may_add_up_their_gradients_in_bf16(
    tiny: Tiny, tiny_arguments: Arguments, tmp_path: Path
) -> None:
    base = {"model.dropout": 0.0, "loss.last_k": 2, "train.max_iters": 4, "eval.batches": 1}
    train(tiny({**base, "run.out_dir": tmp_path / "one"}))
    train_together(tiny_arguments({**base, "runtime.gradient_reduction": "bf16", "run.out_dir": tmp_path / "two"}))
    norms, others = ([line["grad_norm"] for line in metrics(tmp_path / run, "train")] for run in ("one", "two"))
    assert norms[:2] != others[:2]
    assert norms[:2] == pytest.approx(others[:2], rel=0.01)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=0.01)


def test_a_run_folder_explains_itself(tiny: Tiny, tmp_path: Path) -> None:
    settings = tiny()
    folder = train(settings)
    names = {path.name for path in folder.root.iterdir() if not path.name.startswith(".")}
    assert names == {
        *("config.yaml", "environment.json", "run_status.json", "metrics.jsonl"),
        *("tensorboard", "checkpoints", "samples", "plots"),
    }
    status = json.loads(folder.status.read_text())
    assert (status["status"], status["exit_status"], status["last_step"]) == ("done", 0, 12)
    assert json.loads(folder.environment.read_text())["packages"]["torch"] == torch.__version__
    checkpoints = sorted(path.name for path in folder.checkpoints.iterdir())
    assert checkpoints == ["step-000008", "step-000012"]  # the newest two
    files = {path.name for path in (folder.checkpoints / "step-000012").iterdir()}
    assert files == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert folder.samples.joinpath("step-000012.txt").read_text().startswith(settings.sample.prompt)

    trained, evaluated = metrics(folder.root, "train"), metrics(folder.root, "eval")
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert [line["step"] for line in evaluated] == [0, 4, 8, 12]
    assert set(trained[0]) >= {
        *("kind", "step", "loss", "lr", "grad_norm", "last_k", "tokens", "supervised_tokens"),
        *("step_seconds", "tokens_per_second", "mfu", "peak_memory_bytes"),
    }
    assert set(evaluated[0]) >= {"kind", "step", "split", "loss", "final_token_loss", "all_token_loss", "seconds"}
    assert trained[-1]["tokens"] == 12 * 8 * 16
    assert trained[-1]["supervised_tokens"] == 12 * 8
    assert trained[-1]["mfu"] is None
    assert evaluated[0]["loss"] == evaluated[0]["final_token_loss"] == pytest.approx(math.log(257), rel=0.05)


def test_tensorboard_has_the_names_that_the_interface_promises(tiny: Tiny) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(tiny())
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    promised = {
        *("train/loss", "train/lr", "train/grad_norm", "val/loss", "val/final_token_loss", "val/all_token_loss"),
        *("perf/tokens_per_second", "perf/supervised_tokens_per_second", "perf/peak_memory_gib"),
    }
    assert promised <= set(events.Tags()["scalars"])
    shown = [event.value for event in events.Scalars("train/loss")]
    assert shown == pytest.approx(losses(folder.root), rel=1e-6)


def test_it_learns(tiny: Tiny, tmp_path: Path) -> None:
    """300 updates of a tiny network on one loss per sequence: from 5.5 nats, of 257 equal ids, to below 3.1."""
    changes = {
        **{"train.max_iters": 300, "train.global_batch_size": 64, "optim.learning_rate": 5e-3},
        **{"eval.interval": 300, "checkpoint.interval": 300, "optim.warmup_iters": 20},
    }
    folder = train(tiny(changes))
    before, after = metrics(folder.root, "eval")
    assert before["final_token_loss"] == pytest.approx(math.log(257), abs=0.2)
    assert after["final_token_loss"] < 3.1


def test_a_network_whose_first_loss_is_far_off_says_so(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny({"model.logit_scale": 300.0, "train.max_iters": 1, "optim.learning_rate": 1e-9}))
    assert "where an untrained network should have about ln 257" in capsys.readouterr().out


@pytest.mark.parametrize("interval", [1, 100])
def test_a_run_that_diverges_stops_with_status_3_and_saves_nothing_broken(
    interval: int, tiny: Tiny, tmp_path: Path
) -> None:
    exploding = {"optim.learning_rate": 1e30, "optim.grad_clip": "null", "eval.interval": 100}
    with pytest.raises(LossError, match=r"lower optim\.learning_rate"):
        train(tiny({**exploding, "checkpoint.interval": interval}))
    status = json.loads((tmp_path / "run/run_status.json").read_text())
    assert (status["status"], status["exit_status"]) == ("failed", 3)
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_a_gradient_that_is_no_number_stops_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Replica.update
    monkeypatch.setattr(Replica, "update", lambda *arguments: real(*arguments) * math.nan)
    with pytest.raises(LossError, match=r"the gradient is nan of step 1 \(samples 0 … 7 on rank 0\)"):
        train(tiny())


def test_float16_skips_what_overflows_marks_it_and_resumes_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    """A logit scale of 200 makes the first scaled gradients overflow, until the scaler has halved its factor enough."""
    half = {"runtime.precision": "fp16", "model.logit_scale": 200.0, "checkpoint.interval": 6}
    train(tiny({**half, "run.out_dir": tmp_path / "whole"}))
    train(tiny({**half, "run.out_dir": tmp_path / "cut", "train.max_iters": 6}))
    train(tiny({**half, "run.out_dir": tmp_path / "cut"}))
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    lines = metrics(tmp_path / "whole", "train")
    assert lines[0]["skipped"]
    assert lines[0]["grad_norm"] is None
    assert not lines[-1]["skipped"]


def test_float16_measures_the_gradient_that_float32_has(tiny: Tiny, tmp_path: Path) -> None:
    norms = []
    for precision in ("fp16", "fp32"):
        train(tiny({"runtime.precision": precision, "run.out_dir": tmp_path / precision, "model.dropout": 0.0}))
        norms.append([line["grad_norm"] for line in metrics(tmp_path / precision, "train")])
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_the_schedule_reaches_the_optimizer(tiny: Tiny, tmp_path: Path) -> None:
    """Adam's first update moves every weight by the learning rate: a thousandth of it at the start of the warm-up."""
    changes = {"train.max_iters": 1, "optim.weight_decay": 0.0, "optim.warmup_iters": 1000}
    settings = tiny({**changes, "run.out_dir": tmp_path / "warm"})
    train(settings)
    start = build(settings.model, 257, settings.run.derive_seed("weights"), torch.device("cpu")).state_dict()
    name = "blocks.0.mlp.expand.weight"
    moved = (weights(tmp_path / "warm", step=1)[name] - start[name]).abs().max().item()
    assert moved == pytest.approx(1e-6, rel=0.05)


def test_every_step_and_process_drops_by_a_seed_of_its_own(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(Process, "seed_dropout", lambda process, seed: used.append(seed))
    settings = tiny()
    train(settings)
    assert used == [settings.run.derive_seed("dropout", step, 0) for step in range(12)]


def test_another_run_in_the_same_folder_is_refused_by_naming_what_differs(tiny: Tiny) -> None:
    train(tiny())
    with pytest.raises(UserError, match=r"loss\.last_k was 1, is 2; optim\.learning_rate was 0\.001, is 0\.5"):
        train(tiny({"loss.last_k": 2, "optim.learning_rate": 0.5}))
    with pytest.raises(UserError, match=r"checkpoint\.resume is never"):
        train(tiny({"checkpoint.resume": "never"}))


def test_other_data_of_the_same_size_is_refused(tiny: Tiny, data_dir: Path, tmp_path: Path) -> None:
    shards = tmp_path / "foreign"
    shards.mkdir()
    for path in data_dir.glob("*.bin"):
        (shards / path.name).write_bytes(path.read_bytes())
    train(tiny({"data.dir": shards}))
    content = bytearray((shards / "train_000000.bin").read_bytes())
    content[2000] ^= 1
    (shards / "train_000000.bin").write_bytes(content)
    with pytest.raises(UserError, match="other data"):
        train(tiny({"data.dir": shards, "train.max_iters": 20}))


@pytest.mark.parametrize("split", ["train", "val"])
def test_too_little_text_for_one_window_is_named(split: str, tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a" * (10 if split == "train" else 100))
    changes = {"data.source": "files", "data.path": text, "data.dir": tmp_path / "short"}
    with pytest.raises(UserError, match="fewer than one window"):
        train(tiny(changes))
