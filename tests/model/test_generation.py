"""Sampling follows its seed alone and leaves no trace in the network."""

import torch

from dist_train.config import ModelSettings
from dist_train.model.generation import generate
from dist_train.model.gpt import build


def test_sampling_follows_its_seed_and_leaves_network_and_generators_as_they_were() -> None:
    settings = ModelSettings(n_layer=1, n_head=1, n_embd=8, block_size=6, dropout=0.5)
    network = build(settings, 11, seed=0, device=torch.device("cpu")).train()
    state = torch.get_rng_state()

    def sample(seed: int) -> list[int]:
        return generate(network, [1, 2], 20, temperature=1.1, generator=torch.Generator().manual_seed(seed))

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
    sampled = generate(network, [3], 1, temperature=1e-4, generator=torch.Generator().manual_seed(0))
    assert sampled[1] == network(torch.tensor([[3]]), 1).argmax().item()
