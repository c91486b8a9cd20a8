"""An exported run is the same network to the library that everybody has, and to a run that starts from it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from dist_train.config import Settings
from dist_train.model.gpt import GPT, build
from dist_train.model.pretrained import load, require_fit
from dist_train.study.export import export
from dist_train.training.initial_weights import open_weights
from dist_train.training.saved import open_saved
from dist_train.training.trainer import train
from tests.conftest import SHARED, run_command

Tiny = Callable[..., Settings]

SHORT = {"train.max_iters": 4, "optim.learning_rate": 0.01}
VARIANTS: dict[str, dict[str, Any]] = {
    "tanh": {"model.activation": "gelu_tanh"},
    "exact GELU, padded vocabulary": {"model.activation": "gelu", "model.vocab_multiple": 128},
    "no biases": {"model.bias": False},
    "scaled logits, another epsilon": {"model.logit_scale": "rsqrt_n_embd", "model.norm_eps": 1e-3},
}


@pytest.fixture
def trained(tiny: Tiny, tmp_path: Path) -> Path:
    return train(tiny(SHORT)).root


def started(folder: Path, settings: Settings) -> GPT:
    """Return the network that a run of `settings` starts with."""
    network = build(settings.model, 257, seed=9, device=torch.device("cpu")).eval()
    weights = open_weights(str(folder))
    require_fit(weights, settings.model, 257)
    load(network, weights)
    return network


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_the_way_back(variant: str, tiny: Tiny, tmp_path: Path) -> None:
    settings = tiny({**SHORT, **VARIANTS[variant]})
    run = train(settings).root
    assert export(run, tmp_path / "out") == 4
    ours = started(run, settings)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(257, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens, 16), rtol=0, atol=1e-4)
    back = started(tmp_path / "out", settings)
    saved = open_saved(run).tensors
    for name, tensor in back.state_dict().items():
        n = 257 if name == "token_embedding.weight" else None
        if name.startswith("final_norm") and settings.model.logit_scale != 1:
            torch.testing.assert_close(tensor, saved[name])
        else:
            assert torch.equal(tensor[:n], saved[name][:n]), name


AutoModel: Any = transformers.AutoModelForCausalLM  # whose types leave out what it returns on request


def test_transformers_loads_and_generates_without_custom_code(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "out")
    model, loading = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert not any(loading.values()), loading
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("The é", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [list("The é".encode())]
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert str(tokenizer.decode(generated[0])).startswith("The é")
    assert (tokenizer.eos_token_id, model.generation_config.eos_token_id) == (256, 256)
    assert load_file(tmp_path / "out/model.safetensors")["transformer.wte.weight"].shape == (257, 32)


def test_the_cards_example_runs_as_printed(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(train(tiny({**SHORT, "model.block_size": 24})).root, tmp_path / "out")
    (example,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    capsys.readouterr()
    torch.manual_seed(1)
    exec(example.replace("this folder", str(tmp_path / "out")), {})
    assert capsys.readouterr().out.startswith("<|endoftext|>Once upon a time")


def test_the_tokenizer_of_gpt2(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared/data")
    # A copy, because tiktoken deletes a file whose hash is wrong.
    vocabulary = shutil.copytree(SHARED / "tiktoken-cache", tmp_path / "tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabulary))
    run = train(tiny({"data.tokenizer": "gpt2", "data.dir": tmp_path / "gpt2", "train.max_iters": 1})).root
    export(run, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "It isn't the    same\n\n\tthing—是 🙂 1234567"
    assert tokenizer(text)["input_ids"] == open_saved(run).encoding.encode_ordinary(text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 50257


def test_the_card_says_where_it_comes_from_and_not_where_it_lay(trained: Path, tmp_path: Path) -> None:
    export(trained / "checkpoints/step-000004", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    manifest = json.loads((trained / "checkpoints/step-000004/manifest.json").read_text())
    for said in (
        manifest["sha256"]["model.safetensors"],
        "4 updates on 512 tokens",
        "the final position alone",
        "n_layer: 2",
    ):
        assert said in card
    assert str(tmp_path) not in card


def test_the_command_writes_a_folder_once(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    first = run_command("export", str(trained), str(out))
    assert first.returncode == 0, first.stderr
    assert "after 4 updates" in first.stdout
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "who may read one file may read all"
    second = run_command("export", str(trained), str(out))
    assert (second.returncode, second.stderr) == (
        2,
        f"error: {out} is there and not empty; choose another folder, or remove it\n",
    )


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["nowhere", "out"], 2, "nowhere is no folder of a run"),
        (["RUN"], 2, "DIR"),
        (["RUN", "out", "--model.bias=false"], 2, "a run keeps its own settings"),
        (["RUN", "RUN/config.yaml/out"], 4, "cannot write"),
        (["DAMAGED", "out"], 2, "is damaged"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], status: int, expected: str, trained: Path, tmp_path: Path) -> None:
    damaged = trained / "checkpoints/step-000004"
    if arguments[0] == "DAMAGED":
        (damaged / "model.safetensors").write_bytes(b"")
    places = [a.replace("RUN", str(trained)).replace("DAMAGED", str(damaged)) for a in arguments]
    result = run_command("export", *places)
    assert result.returncode == status
    assert len(result.stderr.splitlines()) == 1
    assert expected in result.stderr
    assert not Path("out").exists()
