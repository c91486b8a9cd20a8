"""The network: last-k is exact, dropout follows the module's state, shapes and initialisation are GPT-2's."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dist_train.bench.memory import added_bytes
from dist_train.errors import UserError
from dist_train.model.cost import step_flops
from dist_train.model.gpt import GPT, MLP, Block, build, recompute_blocks
from dist_train.sections import ModelSettings

T, V = 24, 61


def network(**changes: object) -> GPT:
    values = {"n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": T, "dropout": 0.0, **changes}
    return build(ModelSettings.model_validate(values), V, seed=0, device=torch.device("cpu"))


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(V, (3, T), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(gpt: GPT, logits_BSV: Tensor, last_k: int) -> tuple[Tensor, dict[str, Tensor]]:
    gpt.zero_grad()
    loss = nn.functional.cross_entropy(logits_BSV.flatten(0, 1), tokens(1)[:, -last_k:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in gpt.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("last_k", [1, 2, 16, T - 1, T])
def test_last_k_equals_slicing_full_logits_in_value_and_every_gradient(last_k: int, bias: bool) -> None:
    gpt = network(bias=bias)
    logits = gpt(tokens(), last_k)
    full = gpt(tokens(), T)[:, T - last_k :]
    assert logits.shape == (3, last_k, V)
    torch.testing.assert_close(logits, full, rtol=1e-5, atol=1e-6)
    loss, gradients = loss_and_gradients(gpt, logits, last_k)
    full_loss, full_gradients = loss_and_gradients(gpt, full, last_k)
    torch.testing.assert_close(loss, full_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == full_gradients.keys() == dict(gpt.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, full_gradients[name], rtol=1e-5, atol=1e-6, msg=name)


def test_an_activation_is_made_again_rather_than_kept() -> None:
    settings = ModelSettings(n_head=1, n_embd=32)
    mlps = [MLP(settings) for _ in range(4)]
    layers = nn.Sequential(*mlps)
    x = torch.randn(1024, 32, requires_grad=True)
    widened_bytes = 4 * 4 * x.numel()
    # Four before the activation, which must be kept, one after it, and four results, a quarter as wide.
    added = added_bytes(lambda: layers(x), torch.device("cpu"))
    assert added is not None
    assert added < 7 * widened_bytes

    layers(x).square().sum().backward()
    expected = x.detach().requires_grad_()
    y = expected
    for layer in mlps:
        y = layer.project(nn.functional.gelu(layer.expand(y)))
    y.square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected.grad, rtol=0, atol=0)


def test_no_position_sees_a_later_one() -> None:
    gpt = network()
    changed = tokens()
    changed[:, 10:] = (changed[:, 10:] + 1) % V
    before, after = gpt(tokens(), T), gpt(changed, T)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.isclose(before[:, 10:], after[:, 10:]).all(dim=-1).any()


# Every place that drops, as the modules whose output shows it.
DROPPED = ["embedding", "attention weights", "attention output", "mlp output"]


@pytest.mark.parametrize("last_k", [1, 5, T])
@pytest.mark.parametrize("place", DROPPED)
def test_dropout_acts_in_train_and_not_in_eval_in_every_place(place: str, last_k: int) -> None:
    gpt = network(dropout=0.5, n_layer=1)
    block: Any = gpt.blocks[0]
    x = torch.randn(2, T, 16)
    run = {
        "embedding": lambda: gpt.dropout(gpt.token_embedding(tokens())),
        "attention weights": lambda: block.attention(x, last_k),
        # With the other branch's output projection at zero, whatever varies comes from this one's dropout.
        "attention output": lambda: block(x, last_k),
        "mlp output": lambda: block(x, last_k),
    }[place]
    with torch.no_grad():
        if place == "attention output":
            block.mlp.project.weight.zero_()
            block.attention.dropout = 0.0
        elif place == "mlp output":
            block.attention.project.weight.zero_()
        gpt.train()
        assert not torch.equal(run(), run())
        gpt.eval()
        assert torch.equal(run(), run())


def test_attention_drops_as_many_weights_as_it_was_told() -> None:
    gpt = network(n_layer=1, n_head=1, n_embd=T, dropout=0.25).train()
    block: Any = gpt.blocks[0]
    attention = block.attention
    with torch.no_grad():
        # Equal scores, and the identity for values and output: what comes out is the dropped attention matrix itself.
        attention.query_key_value.weight.zero_()
        attention.query_key_value.weight[2 * T :] = torch.eye(T)
        attention.project.weight.copy_(torch.eye(T))
        weights = attention(torch.eye(T).expand(400, T, T), last_k=1)
    rate = (weights == 0).double().mean().item()
    assert abs(rate - 0.25) < 4 * math.sqrt(0.25 * 0.75 / weights.numel())
    assert weights.max().item() == pytest.approx(1 / T / 0.75)


def test_an_untrained_network_knows_nothing() -> None:
    for initialization, scale in (("gpt2", 1.0), ("model5", "rsqrt_n_embd")):
        gpt = network(initialization=initialization, logit_scale=scale)
        logits = gpt(tokens(), T)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens(1).flatten())
        assert loss.item() == pytest.approx(math.log(V), rel=0.05)


def test_initialisation_is_what_the_settings_say() -> None:
    settings = {"n_embd": 128, "n_layer": 2}
    recipe, gpt2 = (network(initialization=name, **settings) for name in ("model5", "gpt2"))
    for gpt, project_std in ((recipe, 0.02), (gpt2, 0.02 / math.sqrt(4))):
        block: Any = gpt.blocks[1]
        assert block.mlp.expand.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert block.mlp.project.weight.std().item() == pytest.approx(project_std, rel=0.03)
        assert not block.mlp.expand.bias.any()
    xavier = math.sqrt(2 / (V + 128))
    assert recipe.token_embedding.weight.std().item() == pytest.approx(xavier, rel=0.05)
    assert gpt2.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = network().state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = network().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_124m_layout_has_gpt2s_parameter_count() -> None:
    with torch.device("meta"):
        gpt = GPT(ModelSettings(block_size=1024), n_vocab=50257)
    assert gpt.n_parameters() == 124_439_808


def test_a_padded_vocabulary_changes_no_logit_and_predicts_no_padding() -> None:
    plain, padded = network(), network(vocab_multiple=64)
    padded.load_state_dict(
        {**plain.state_dict(), "token_embedding.weight": torch.cat([plain.token_embedding.weight, torch.ones(3, 16)])}
    )
    assert padded.token_embedding.weight.shape == (64, 16)
    torch.testing.assert_close(padded(tokens(), T), plain(tokens(), T))


def test_logits_are_divided_by_the_root_of_the_width() -> None:
    plain, scaled = network(), network(logit_scale="rsqrt_n_embd")
    torch.testing.assert_close(scaled(tokens(), T) * 4, plain(tokens(), T))


def test_mixing_devices_is_answered_in_words_that_name_both() -> None:
    with pytest.raises(UserError, match=r"model is on cpu but batch is on meta; move both"):
        network()(torch.zeros(1, T, dtype=torch.int64, device="meta"), 1)


@pytest.mark.parametrize(("length", "last_k"), [(T + 1, 1), (4, 5), (4, 0)])
def test_sizes_that_do_not_fit_are_refused(length: int, last_k: int) -> None:
    with pytest.raises(UserError, match="does not fit"):
        network()(torch.zeros(1, length, dtype=torch.int64), last_k)


def test_flops_of_model5_are_those_counted_by_hand() -> None:
    model5 = ModelSettings()
    # Forward and backward of 64 × 256 tokens: all logits, and keys and values alone in the last block for k = 1.
    assert step_flops(model5, 50257, 64, 256) / 1e12 == pytest.approx(12.38, abs=0.005)
    assert step_flops(model5, 50257, 64, 1) / 1e12 == pytest.approx(8.00, abs=0.005)


FROZEN: list[list[str | int]] = [["embeddings"], ["embeddings", 0], [1], [2], ["embeddings", 0, 1, 2]]


@pytest.mark.parametrize("frozen", FROZEN)
def test_what_is_frozen_gets_no_gradient_and_all_else_the_one_it_had(frozen: list[str | int]) -> None:
    whole, gpt = network(), network(freeze=tuple(frozen))
    _, gradients = loss_and_gradients(whole, whole(tokens(), 2), 2)
    _, fewer = loss_and_gradients(gpt, gpt(tokens(), 2), 2)
    prefixes = [
        prefix
        for part in frozen
        for prefix in ([f"blocks.{part}."] if isinstance(part, int) else ["token_", "position_"])
    ]
    assert fewer.keys() == {name for name in gradients if not name.startswith(tuple(prefixes))}
    for name, gradient in fewer.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("frozen", [[], *FROZEN])
def test_flops_are_those_that_torch_counts(frozen: list[str | int], recomputes: bool, dropout: float) -> None:
    gpt = network(freeze=tuple(frozen), block_size=8, dropout=dropout).train()
    for block in gpt.blocks:
        assert isinstance(block, Block)
        block.attention.attend = attend_to_what_is_seen
    if recomputes:
        recompute_blocks(gpt)
    with FlopCounterMode(display=False) as counter:
        gpt(tokens()[:, :8], 3).sum().backward()
    assert counter.get_total_flops() == step_flops(gpt.settings, V, 3, 3, recomputes)


def attend_to_what_is_seen(query_BHSE: Tensor, key_BHTE: Tensor, value_BHTE: Tensor, dropout: float) -> Tensor:
    """Attend position by position: torch counts the masked half of its own attention as well."""
    S, T = query_BHSE.size(2), key_BHTE.size(2)
    rows = []
    for number, query in enumerate(query_BHSE.split(1, dim=2)):
        seen = slice(0, T - S + number + 1)
        rows.append((query @ key_BHTE[:, :, seen].mT).softmax(dim=-1) @ value_BHTE[:, :, seen])
    return torch.cat(rows, dim=2)


@pytest.mark.parametrize("last_k", [1, 5, T])
def test_recomputed_blocks_learn_the_same_bit_for_bit(last_k: int) -> None:
    results = []
    for recomputes in (False, True):
        gpt = network(dropout=0.3).train()
        if recomputes:
            recompute_blocks(gpt)
        torch.manual_seed(7)
        results.append(loss_and_gradients(gpt, gpt(tokens(), last_k), last_k))
    (loss, gradients), (loss_again, gradients_again) = results
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def test_a_recomputed_block_keeps_little_more_than_its_input() -> None:
    def added(n_layer: int) -> int:
        gpt = network(n_layer=n_layer, n_embd=64, dropout=0.1, block_size=128).train()
        recompute_blocks(gpt)
        bytes_added = added_bytes(lambda: gpt.hidden(torch.zeros(16, 128, dtype=torch.int64), 128), torch.device("cpu"))
        assert bytes_added is not None
        return bytes_added

    input_bytes = 4 * 16 * 128 * 64
    assert added(6) - added(2) < 1.05 * 4 * input_bytes
