"""A run starts from GPT-2's weights, Hugging Face's or its own, and they do there what they did before."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dist_train.config import Settings
from dist_train.errors import UserError
from dist_train.model.gpt import GPT, build
from dist_train.model.pretrained import load, require_fit
from dist_train.sections import ModelSettings
from dist_train.training.initial_weights import _COMMITS, open_weights
from dist_train.training.trainer import train
from tests.conftest import finish, losses, metrics, run_command, start_together, train_together
from tests.data.hub_server import Hub, Repository, environment

Tiny = Callable[..., Settings]
Arguments = Callable[..., list[str]]

CPU = torch.device("cpu")
BYTES = 257
# The four of GPT-2 at a sixteenth of their width, with their own numbers of layers and heads.
LAYOUTS = {"gpt2": (12, 12, 48), "gpt2-medium": (24, 16, 64), "gpt2-large": (36, 20, 80), "gpt2-xl": (48, 25, 100)}
LIKE_TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 24, "vocab_size": BYTES}
FITS = {"model.activation": "gelu_tanh"}
"""With these, a tiny run's settings fit `LIKE_TINY`."""


def theirs(seed: int = 0, **config: Any) -> Any:
    """Return transformers' network with numbers everywhere, also where it begins with zeros and ones."""
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**LIKE_TINY, **config})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of theirs that a tiny run can start from, as transformers writes it."""
    path = tmp_path_factory.mktemp("theirs") / "model"
    theirs().save_pretrained(path)
    return path


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a copy of the folder, with changes to its config and tensors; None leaves a tensor out."""

    def make(config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> Path:
        copy = tmp_path / "changed"
        copy.mkdir()
        values = json.loads((folder / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**values, **(config or {})}))
        kept = {**load_file(folder / "model.safetensors"), **{k.replace("__", "."): v for k, v in tensors.items()}}
        save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, copy / "model.safetensors")
        return copy

    return make


def started(init_from: Path | str, settings: ModelSettings, n_vocab: int = BYTES) -> GPT:
    network = build(settings, n_vocab, seed=1, device=CPU).eval()
    weights = open_weights(str(init_from))
    require_fit(weights, settings, n_vocab)
    load(network, weights)
    return network


def tokens(n_vocab: int, T: int = 16) -> torch.Tensor:
    return torch.randint(n_vocab, (2, T), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_same_logits(network: GPT, model: torch.nn.Module) -> None:
    tokens_BT = tokens(network.n_vocab)
    torch.testing.assert_close(network(tokens_BT, 16), model(tokens_BT).logits, rtol=0, atol=1e-4)


# ---- what fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    n_layer, n_head, n_embd = LAYOUTS[name]
    layout = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    model = theirs(**layout, vocab_size=300)
    for parameter in model.transformer.h.parameters():
        torch.nn.init.normal_(parameter, std=0.04)  # the sum of 48 blocks stays where float32 has its digits
    model.save_pretrained(tmp_path / "model")
    settings = ModelSettings(**layout, block_size=16, activation="gelu_tanh", vocab_multiple=128)  # type: ignore[arg-type]
    assert_same_logits(started(tmp_path / "model", settings, n_vocab=300), model)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_each_activation_is_its_own(activation: str, tmp_path: Path, tiny: Tiny) -> None:
    model = theirs(activation_function=activation)
    model.save_pretrained(tmp_path / "model")
    ours = "gelu" if activation == "gelu" else "gelu_tanh"
    assert_same_logits(started(tmp_path / "model", tiny({"model.activation": ours}).model), model)


def test_a_factor_on_the_logits_is_made_up_for(folder: Path, tiny: Tiny) -> None:
    assert_same_logits(started(folder, tiny({**FITS, "model.logit_scale": "rsqrt_n_embd"}).model), theirs())


def test_as_the_hub_has_it_without_prefix_with_masks_and_with_a_tied_head(
    folder: Path, tmp_path: Path, tiny: Tiny
) -> None:
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 24, 24).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert_same_logits(started(tmp_path, tiny(FITS).model), theirs())


def test_several_files_with_an_index(tmp_path: Path, tiny: Tiny) -> None:
    model = theirs()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert_same_logits(started(tmp_path / "model", tiny(FITS).model), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(dtype: torch.dtype, tmp_path: Path, tiny: Tiny) -> None:
    model = theirs().to(dtype)
    model.save_pretrained(tmp_path / "model")
    assert_same_logits(started(tmp_path / "model", tiny(FITS).model), model.float())


# ---- what does not ---------------------------------------------------------------------------------------------------


def test_every_setting_to_change_is_named_at_once(folder: Path) -> None:
    settings = ModelSettings(n_layer=3, n_head=1, n_embd=48, norm_eps=1e-6, bias=False, block_size=32)
    with pytest.raises(UserError) as caught:
        started(folder, settings, n_vocab=50257)
    for change in (
        *("model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.activation=gelu_tanh", "model.norm_eps=1e-05"),
        *("model.bias=true", "model.block_size=24 (or less)", "data.tokenizer=one (of 257 tokens, not 50257)"),
    ):
        assert change in str(caught.value)


@pytest.mark.parametrize(
    ("config", "tensors", "expected"),
    [
        ({}, {"transformer__h.0.ln_1.weight": None}, "'h.0.ln_1.weight' is missing"),
        ({}, {"transformer__h.2.ln_1.weight": torch.ones(32)}, "'h.2.ln_1.weight' is unexpected"),
        ({}, {"transformer__ln_f.bias": torch.ones(31)}, r"'ln_f.bias' is F32 \[31\], not F32, F16, BF16 \[32\]"),
        ({}, {"transformer__ln_f.bias": torch.ones(32, dtype=torch.int32)}, r"'ln_f.bias' is I32 \[32\]"),
        ({}, {"lm_head__weight": torch.ones(BYTES, 32)}, "lm_head.weight is not wte.weight"),
        ({}, {"transformer__ln_f.bias": torch.full((32,), torch.nan)}, "final_norm.bias of .* is not finite"),
        ({"model_type": "llama"}, {}, "model_type: Input should be 'gpt2'"),
        ({"activation_function": "relu"}, {}, "activation_function: .*'relu'"),
        ({"n_layer": "2"}, {}, "n_layer: .*'2'"),
        ({"n_head": 3}, {}, "n_embd=32 is not a multiple of n_head=3"),
        ({"n_inner": 64}, {}, "n_inner: 64 is not four times n_embd"),
        ({"scale_attn_by_inverse_layer_idx": True}, {}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_is_no_network_of_ours_is_refused(
    config: dict[str, Any], tensors: dict[str, Any], expected: str, changed: Callable[..., Path], tiny: Tiny
) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        started(changed(config, **tensors), tiny(FITS).model)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.json", b"{", "Expecting"),
        ("model.safetensors", b"\x80\x02}q\x00." * 9, "cannot start from"),
        ("model.safetensors.index.json", b'{"weight_map": {"wte.weight": "../../secret.safetensors"}}', "not the name"),
        ("model.safetensors.index.json", b'{"weight_map": ["wte.weight"]}', "no weight_map"),
        ("model.safetensors.index.json", b'{"weight_map": {"wte.weight": "gone.safetensors"}}', "No such file"),
    ],
)
def test_a_damaged_file_is_one_line(
    file: str, content: bytes, expected: str, changed: Callable[..., Path], tiny: Tiny
) -> None:
    folder = changed()
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        started(folder, tiny(FITS).model)


def test_pickles_links_and_pipes_are_not_read(folder: Path, tmp_path: Path, tiny: Tiny) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = tmp_path / "model.safetensors"
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"only the pickled pytorch_model\.bin"):
        started(tmp_path, tiny(FITS).model)
    weights.symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match="symbolic link"):
        started(tmp_path, tiny(FITS).model)
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(UserError, match="no regular file"):
        started(tmp_path, tiny(FITS).model)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_starts_from_them_and_does_not_read_them_again(folder: Path, tmp_path: Path, tiny: Tiny) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    start = {**FITS, "model.init_from": copy}
    train(tiny({**start, "run.out_dir": tmp_path / "whole"}))
    train(tiny({**start, "train.max_iters": 8}))
    shutil.rmtree(copy)
    train(tiny(start))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    train(tiny({**FITS, "run.out_dir": tmp_path / "chance"}))
    assert losses(tmp_path / "run") != losses(tmp_path / "chance")


def test_two_processes_start_from_the_same(folder: Path, tiny: Tiny, tiny_arguments: Arguments, tmp_path: Path) -> None:
    base = {**FITS, "model.init_from": folder, "model.dropout": 0.0, "train.max_iters": 4}
    train(tiny({**base, "run.out_dir": tmp_path / "one"}))
    train_together(tiny_arguments(base))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_processes_with_other_weights_behind_one_name_do_not_start(
    folder: Path, tiny_arguments: Arguments, tmp_path: Path
) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        theirs(seed=rank).save_pretrained(tmp_path / str(rank) / "weights")
    arguments = tiny_arguments({**FITS, "model.init_from": "weights"})
    statuses, errors = finish(start_together([arguments] * 2, folders=[tmp_path / "0", tmp_path / "1"]))
    assert statuses == [2, 2]
    assert "rank 1 has weights to start from" in errors[0]


@pytest.mark.parametrize("what", [".", "checkpoints/step-000008"])
def test_a_run_starts_from_another_run_or_checkpoint(what: str, tiny: Tiny, tmp_path: Path) -> None:
    first = train(tiny({"run.out_dir": tmp_path / "first", "model.logit_scale": 0.5}))
    changes = {"model.init_from": first.root / what, "model.logit_scale": 0.5, "train.max_iters": 1}
    second = train(tiny({**changes, "model.vocab_multiple": 128}))
    step = 8 if "step" in what else 12
    former = {line["step"]: line["final_token_loss"] for line in metrics(first.root, "eval")}
    assert metrics(second.root, "eval")[0]["final_token_loss"] == pytest.approx(former[step], abs=1e-6)
    wrong = tiny({**changes, "model.n_layer": 1, "model.bias": False, "run.out_dir": tmp_path / "wrong"})
    with pytest.raises(UserError, match=r"set model\.n_layer=2, model\.bias=true$"):
        train(wrong)


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    repositories = {
        "openai-community/gpt2": Repository({_COMMITS["gpt2"]: files}, {}),
        "openai-community/gpt2-xl": Repository(
            {_COMMITS["gpt2-xl"]: {"config.json": files["config.json"], "pytorch_model.bin": b""}}, {}
        ),
    }
    with Hub(repositories) as server:
        yield server


def test_weights_come_from_the_hub_once(hub: Hub, tiny_arguments: Arguments, tmp_path: Path) -> None:
    base = {**FITS, "model.init_from": "gpt2", "train.max_iters": 1}
    variables = environment(hub.url, tmp_path / "home")
    train_together(tiny_arguments(base), environment=variables)
    assert len(hub.reads("model.safetensors")) == 1
    nowhere = environment("http://127.0.0.1:9", tmp_path / "home")
    again = run_command("train", *tiny_arguments({**base, "run.out_dir": tmp_path / "again"}), environment=nowhere)
    assert again.returncode == 0, again.stderr


def test_no_hub_is_one_line_and_soon(tiny_arguments: Arguments, tmp_path: Path) -> None:
    variables = environment("http://127.0.0.1:9", tmp_path / "home")
    result = run_command("train", *tiny_arguments({"model.init_from": "gpt2"}), environment=variables)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, "none for each of the client's tries, which take half a minute"
    assert "connect to the internet once" in result.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", "does not fit the settings; set model.activation=gelu_tanh"),
        ("gpt2-xl", "a pickled pytorch_model.bin is not read"),
        ("gpt2-large", "cannot get config.json and model.safetensors of openai-community/gpt2-large"),
        ("gpt3", "there is nothing to start from at gpt3"),
    ],
)
def test_what_cannot_be_had_is_one_line_and_status_2(
    name: str, expected: str, hub: Hub, tiny_arguments: Arguments, tmp_path: Path
) -> None:
    variables = environment(hub.url, tmp_path / "home")
    result = run_command("train", *tiny_arguments({"model.init_from": name}), environment=variables)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert expected in result.stderr
