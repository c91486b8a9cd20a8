"""Ten iterations of configs/model5.yaml against the recipe written plainly: full logits, sliced afterwards."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.config_file import load_settings
from dist_train.data.manifest import open_tokens
from dist_train.data.windows import Windows
from dist_train.model.gpt import build
from dist_train.training.trainer import train
from tests.conftest import ROOT, SHARED, losses, metrics


class PlainGPT(nn.Module):
    """Model 5 as one would write it down: nothing shared with dist_train.model but the names of the weights."""

    def __init__(self, weights: dict[str, Tensor], n_layer: int, n_head: int) -> None:
        super().__init__()
        self.n_layer, self.n_head = n_layer, n_head
        self.weights = nn.ParameterDict({name.replace(".", "/"): w.clone() for name, w in weights.items()})

    def get(self, name: str) -> Tensor:
        return self.weights[name.replace(".", "/")]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.get(f"{name}.weight").T + self.get(f"{name}.bias")

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
        return scaled * self.get(f"{name}.weight") + self.get(f"{name}.bias")

    def attention(self, x: Tensor, name: str) -> Tensor:
        B, T, D = x.shape
        heads = self.linear(x, f"{name}.query_key_value").view(B, T, 3, self.n_head, D // self.n_head)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / (D // self.n_head) ** 0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        mixed = scores.softmax(-1) @ value
        return self.linear(mixed.transpose(1, 2).reshape(B, T, D), f"{name}.project")

    def forward(self, tokens: Tensor) -> Tensor:
        embedding = self.get("token_embedding.weight")
        x = embedding[tokens] + self.get("position_embedding.weight")
        for i in range(self.n_layer):
            x = x + self.attention(self.norm(x, f"blocks.{i}.attention_norm"), f"blocks.{i}.attention")
            inner = self.linear(self.norm(x, f"blocks.{i}.mlp_norm"), f"blocks.{i}.mlp.expand")
            inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
            x = x + self.linear(inner, f"blocks.{i}.mlp.project")
        return self.norm(x, "final_norm") @ embedding.T / x.size(-1) ** 0.5


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED.name}/ with real FineWeb is not beside the project")
@pytest.mark.parametrize(
    ("n_layer", "n_embd", "last_k"),
    [
        pytest.param(2, 96, 1, id="smaller"),
        pytest.param(2, 96, 256, id="smaller-all-tokens"),
        pytest.param(12, 768, 1, id="whole", marks=pytest.mark.slow),
    ],
)
def test_ten_iterations_are_those_of_the_plain_recipe(
    n_layer: int, n_embd: int, last_k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "tiktoken"
    cache.mkdir()
    for file in (SHARED / "tiktoken-cache").iterdir():  # a copy, because tiktoken deletes files it takes for damaged
        (cache / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    settings = load_settings(
        ROOT / "configs/model5.yaml",
        [
            "--data.source=files",
            f"--data.path={SHARED}/fineweb/sample",
            "--data.max_documents=100",
            f"--data.dir={tmp_path}/data",
            f"--run.out_dir={tmp_path}/run",
            f"--model.n_layer={n_layer}",
            f"--model.n_embd={n_embd}",
            "--model.dropout=0",
            f"--loss.last_k={last_k}",
            "--train.global_batch_size=2",
            "--train.max_iters=10",
            "--eval.batches=1",
            "--sample.max_new_tokens=1",
            "--runtime.device=cpu",
            "--runtime.precision=fp32",
        ],
    )
    train(settings)

    start = build(settings.model, 50257, settings.run.derive_seed("weights"), torch.device("cpu"))
    plain = PlainGPT(dict(start.named_parameters()), n_layer, n_head=12)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    stream = open_tokens(settings.data).train
    windows = Windows(len(stream), 256, "random", stride=256, seed=settings.run.derive_seed("windows"))
    expected = []
    for step in range(10):
        starts = windows.starts(torch.arange(2 * step, 2 * step + 2).numpy())
        batch = torch.from_numpy(stream.windows(starts, 257))
        logits = plain(batch[:, :-1])[:, -last_k:]
        log_probabilities = F.log_softmax(logits, dim=-1)
        loss = -log_probabilities.gather(-1, batch[:, -last_k:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert len(set(losses(tmp_path / "run"))) == 10
    # The untrained network is a die of 50257 sides, of ln 50257 nats.
    assert metrics(tmp_path / "run", "eval")[0]["loss"] == pytest.approx(10.825, abs=0.01)
