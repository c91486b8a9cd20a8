"""Sampling follows its seed alone, leaves no trace in the network, and draws what it would draw without a cache."""

import contextlib
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dist_train.errors import LossError, UserError
from dist_train.model.generation import Sampling, generate, generate_batch, stream
from dist_train.model.gpt import GPT, build
from dist_train.model.past import Past
from dist_train.sections import ModelSettings


def test_sampling_follows_its_seed_and_leaves_network_and_generators_as_they_were() -> None:
    settings = ModelSettings(n_layer=1, n_head=1, n_embd=8, block_size=6, dropout=0.5)
    network = build(settings, 11, seed=0, device=torch.device("cpu")).train()
    state = torch.get_rng_state()

    def sample(seed: int) -> list[int]:
        return generate(network, [1, 2], 20, Sampling(1.1), generator=torch.Generator().manual_seed(seed))

    first = sample(0)
    assert first == sample(0)
    assert first != sample(1)
    assert first[:2] == [1, 2]
    assert len(first) == 22
    assert all(0 <= token < 11 for token in first)
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cold_temperature_takes_the_likeliest_token() -> None:
    settings = ModelSettings(n_layer=1, n_head=1, n_embd=8, block_size=6, dropout=0.0)
    network = build(settings, 11, seed=0, device=torch.device("cpu"))
    sampled = generate(network, [3], 1, Sampling(1e-3), generator=torch.Generator().manual_seed(0))
    assert sampled[1] == network(torch.tensor([[3]]), 1).argmax().item()


def test_prompts_in_a_batch_are_continued_each_as_if_alone_from_what_the_context_holds() -> None:
    settings = ModelSettings(n_layer=2, n_head=1, n_embd=8, block_size=6, dropout=0.5, initialization="model5")
    network = build(settings, 11, seed=0, device=torch.device("cpu"))
    prompts = torch.arange(24).reshape(3, 8) % 11  # longer than the context

    def coldly(prompts: torch.Tensor) -> torch.Tensor:
        return generate_batch(network, prompts, 5, Sampling(1e-3), generator=torch.Generator().manual_seed(0))

    together = coldly(prompts)
    assert together.shape == (3, 13)
    assert torch.equal(together[:, :8], prompts)
    assert torch.equal(together, torch.cat([coldly(prompt[None]) for prompt in prompts]))
    assert torch.equal(together[:, 2:], coldly(prompts[:, 2:]))


def test_equal_prompts_get_different_continuations() -> None:
    settings = ModelSettings(n_layer=1, n_head=1, n_embd=8, block_size=6, dropout=0.0)
    network = build(settings, 11, seed=0, device=torch.device("cpu"))
    sampled = generate_batch(
        network, torch.ones(4, 2, dtype=torch.int64), 20, Sampling(1.0), torch.Generator().manual_seed(0)
    )
    assert len({tuple(row) for row in sampled.tolist()}) == 4


def test_a_network_that_has_diverged_is_not_sampled_from() -> None:
    settings = ModelSettings(n_layer=1, n_head=1, n_embd=8, block_size=6, dropout=0.0)
    network = build(settings, 11, seed=0, device=torch.device("cpu"))
    torch.nn.init.constant_(network.token_embedding.weight, float("nan"))
    with pytest.raises(LossError, match=r"diverged; lower optim\.learning_rate"):
        generate_batch(network, torch.ones(2, 2, dtype=torch.int64), 1, Sampling(1.0), torch.Generator().manual_seed(0))


# ---- the cache -------------------------------------------------------------------------------------------------------

N_VOCAB, BLOCK_SIZE = 31, 16
PROMPTS = {
    "one": [[3, 1, 4]],
    "of a single token": [[7]],
    "several": [[3, 1, 4], [1, 5, 9], [2, 6, 5]],
    "of different lengths": [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8], [9, 7, 9, 3, 2, 3, 8]],
    "as long as the context": [list(range(BLOCK_SIZE)), [8] * 3],
    "longer than the context": [list(range(BLOCK_SIZE + 5)), list(range(9)), [4]],
}


def sharp_network(**changes: object) -> GPT:
    """Return a network whose logits differ enough that a wrong one is drawn differently."""
    settings = ModelSettings.model_validate(
        {"n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": BLOCK_SIZE, "dropout": 0.5, **changes}
    )
    network = build(settings, N_VOCAB, seed=0, device=torch.device("cpu"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    return network


@torch.no_grad()
def without_cache(
    network: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, generator: torch.Generator
) -> list[list[int]]:
    """Return what is drawn when each text runs through the network alone and whole, for every token."""
    texts = [list(prompt) for prompt in prompts]
    network.eval()
    for _ in range(max_new_tokens):
        logits_BV = torch.cat([network(torch.tensor([text[-BLOCK_SIZE:]]), 1)[:, 0].float() for text in texts])
        for text, token in zip(texts, sampling.draw(logits_BV, generator).tolist(), strict=True):
            text.append(token)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0), Sampling(0.7, top_k=9, top_p=0.9)], ids=str)
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_the_cache_changes_no_token_up_to_the_context_and_beyond(prompts: list[list[int]], sampling: Sampling) -> None:
    network = sharp_network()
    drawn_NB = list(stream(network, prompts, 2 * BLOCK_SIZE, sampling, torch.Generator().manual_seed(5)))
    expected = without_cache(network, prompts, 2 * BLOCK_SIZE, sampling, torch.Generator().manual_seed(5))
    assert torch.stack(drawn_NB, dim=1).tolist() == expected
    assert len({tuple(text) for text in expected}) == len(prompts)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("first", [1, 5, BLOCK_SIZE - 1])
def test_logits_with_a_past_are_those_of_the_whole_text(first: int, bias: bool) -> None:
    network = sharp_network(bias=bias).eval()
    tokens_BT = torch.randint(N_VOCAB, (3, BLOCK_SIZE), generator=torch.Generator().manual_seed(0))
    whole_BTV = network(tokens_BT, BLOCK_SIZE)
    past = Past(torch.zeros(3, dtype=torch.int64), BLOCK_SIZE)
    parts = [network(tokens_BT[:, :first], 1, past)]
    parts += [network(tokens_BT[:, end - 1 : end], 1, past) for end in range(first + 1, BLOCK_SIZE + 1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BTV[:, first - 1 :], rtol=0, atol=1e-5)


def test_each_of_several_lengths_has_the_logits_it_has_alone() -> None:
    network = sharp_network().eval()
    texts = [torch.arange(length)[None] * 7 % N_VOCAB for length in (BLOCK_SIZE, 1, 9)]
    padded_BT = torch.cat([torch.nn.functional.pad(text, (BLOCK_SIZE - text.size(1), 0)) for text in texts])
    past = Past(torch.tensor([BLOCK_SIZE - text.size(1) for text in texts]), BLOCK_SIZE)
    network(padded_BT[:, :-2], 1, past)
    together_BSV = network(padded_BT[:, -2:], 1, past)
    alone_BSV = torch.cat([network(text, 1) for text in texts])
    torch.testing.assert_close(together_BSV, alone_BSV, rtol=0, atol=1e-5)


@pytest.mark.parametrize("last_k", [1, BLOCK_SIZE])
def test_the_cache_holds_whatever_the_loss_saw(last_k: int) -> None:
    network = sharp_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    tokens_BT = torch.randint(N_VOCAB, (4, BLOCK_SIZE + 1), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        logits_BSV = network(tokens_BT[:, :-1], last_k)
        torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), tokens_BT[:, -last_k:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    prompts = PROMPTS["of different lengths"]
    drawn_NB = list(stream(network, prompts, 20, Sampling(0), torch.Generator()))
    assert torch.stack(drawn_NB, dim=1).tolist() == without_cache(network, prompts, 20, Sampling(0), torch.Generator())


def test_a_token_costs_one_position_until_the_context_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    network, seen = sharp_network(), []
    hidden = network.hidden

    def watched(tokens_BT: Tensor, last_k: int, past: Past | None = None) -> Tensor:
        seen.append(tokens_BT.size(1))
        return hidden(tokens_BT, last_k, past)

    monkeypatch.setattr(network, "hidden", watched)
    generate(network, [1, 2, 3], BLOCK_SIZE, Sampling(0), torch.Generator())
    assert seen == [3] + [1] * (BLOCK_SIZE - 3) + [BLOCK_SIZE] * 2


def test_bf16_is_sampled_from_too() -> None:
    network = sharp_network()
    with torch.autocast("cpu", torch.bfloat16):
        drawn_NB = list(stream(network, PROMPTS["of different lengths"], 20, Sampling(1.0), torch.Generator()))
    assert torch.stack(drawn_NB).shape == (20, 4)


# ---- how a token is chosen -------------------------------------------------------------------------------------------


def reachable(logits: list[float], sampling: Sampling) -> set[int]:
    """Return which tokens may be drawn, by the plain definition of what the options mean."""
    tokens = sorted((token for token in range(len(logits)) if token not in sampling.never), key=lambda t: -logits[t])
    tokens = tokens[: sampling.top_k]
    weights = [math.exp(logits[token] / sampling.temperature) for token in tokens]
    kept, reached = set(), 0.0
    for token, weight in zip(tokens, weights, strict=True):
        if sampling.top_p is not None and reached >= sampling.top_p * sum(weights):
            break
        kept.add(token)
        reached += weight
    return kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 99])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.6, 1.0])
def test_top_k_and_top_p_draw_from_what_their_definition_leaves_in_its_proportions(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    sampling = Sampling(temperature, top_k, top_p, never=(2, 5))
    logits = [0.3, -1.0, 9.0, 1.7, 0.9, 8.0, -0.2, 1.2]
    rows = 20_000
    drawn_B = sampling.draw(torch.tensor([logits]).expand(rows, -1), torch.Generator().manual_seed(0))
    expected = reachable(logits, sampling)
    total = sum(math.exp(logits[token] / temperature) for token in expected)
    for token in range(len(logits)):
        probability = math.exp(logits[token] / temperature) / total if token in expected else 0.0
        assert (drawn_B == token).float().mean().item() == pytest.approx(probability, abs=0.02 if probability else 0)


def test_options_that_leave_every_token_in_draw_the_same_ones() -> None:
    logits_BV = torch.randn(50, N_VOCAB, generator=torch.Generator().manual_seed(0))
    plain, all_in = (
        sampling.draw(logits_BV, torch.Generator().manual_seed(1))
        for sampling in (Sampling(1.0), Sampling(1.0, 99, 1.0))
    )
    assert torch.equal(plain, all_in)


def test_temperature_0_takes_the_likeliest_token_that_may_be_drawn() -> None:
    logits_BV = torch.tensor([[0.0, 3.0, 2.0], [5.0, 1.0, 1.0]])
    assert Sampling(0).draw(logits_BV, torch.Generator()).tolist() == [1, 0]
    assert Sampling(0, never=(1,)).draw(logits_BV, torch.Generator()).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 1e-9}, "temperature=1e-09"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, float], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Sampling(**options)  # type: ignore[arg-type]


def test_the_former_mode_is_back_after_an_error_and_where_nobody_reads_on() -> None:
    network = sharp_network().train()
    with pytest.raises(UserError, match="no tokens"):
        generate(network, [], 1, Sampling(1.0), torch.Generator())
    assert network.training
    with contextlib.closing(stream(network, [[1]], 9, Sampling(1.0), torch.Generator())) as drawn:
        next(drawn)
        assert not network.training
    assert network.training
    torch.nn.init.constant_(network.final_norm.weight, float("nan"))
    with pytest.raises(LossError):
        generate(network, [1], 1, Sampling(1.0), torch.Generator())
    assert network.training
    network.eval()
    with pytest.raises(LossError):
        generate(network, [1], 1, Sampling(1.0), torch.Generator())
    assert not network.training
