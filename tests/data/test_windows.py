"""Where samples lie and whose they are: pure functions of numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.data.windows import Windows, evenly_spaced, mix, permute, samples_of

T = 16


def random_windows(n_tokens: int = 10_000, seed: int = 1) -> Windows:
    return Windows(n_tokens, T, "random", T, seed)


def shuffled(n_tokens: int = 10_000, stride: int = T, seed: int = 1) -> Windows:
    return Windows(n_tokens, T, "shuffle", stride, seed)


def chi_square(values: np.ndarray, below: int, bins: int) -> float:
    counts = np.bincount(values * bins // below, minlength=bins)
    expected = len(values) / bins
    return float(((counts - expected) ** 2 / expected).sum())


# ---- both ways of sampling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [random_windows(), shuffled(), shuffled(stride=5)])
def test_a_start_depends_on_seed_and_number_alone(windows: Windows) -> None:
    numbers = np.arange(3000)
    at_once = windows.starts(numbers)
    assert windows.starts(numbers[::-1])[::-1].tolist() == at_once.tolist()
    assert np.concatenate([windows.starts(part) for part in np.split(numbers, [1, 2, 65, 1024])]).tolist() == (
        at_once.tolist()
    )
    other = Windows(windows.n_tokens, T, windows.sampling, windows.stride, windows.seed + 1)
    assert (other.starts(numbers) != at_once).mean() > 0.9


@given(
    n_tokens=st.integers(T + 1, 300),
    stride=st.integers(1, 400),
    sampling=st.sampled_from(["random", "shuffle"]),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_window_lies_in_the_corpus(n_tokens: int, stride: int, sampling: str, seed: int) -> None:
    windows = Windows(n_tokens, T, sampling, stride, seed)  # type: ignore[arg-type]
    starts = windows.starts(np.arange(500))
    assert starts.dtype == np.int64
    assert starts.min() >= 0
    assert starts.max() + T + 1 <= n_tokens


@pytest.mark.parametrize("sampling", ["random", "shuffle"])
def test_first_and_last_window_are_reached(sampling: str) -> None:
    windows = Windows(T + 4, T, sampling, 2, 1)  # type: ignore[arg-type]
    assert set(windows.starts(np.arange(200)).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("sampling", ["random", "shuffle"])
def test_numbers_of_very_long_runs_and_corpora_do_not_overflow(sampling: str) -> None:
    windows = Windows(15 * 10**12, 1024, sampling, 1024, 2**63 - 1)  # type: ignore[arg-type]
    starts = windows.starts(np.arange(64) + 10**13)
    assert starts.min() >= 0
    assert starts.max() < windows.n_starts
    assert chi_square(starts, windows.n_starts, 4) < 16.3  # 99.9 % of 3 degrees of freedom


# ---- random ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [1000, 12_345, 10**11])
def test_random_starts_are_uniform(n_tokens: int) -> None:
    windows = random_windows(n_tokens)
    starts = windows.starts(np.arange(20_000))
    assert chi_square(starts, windows.n_starts, 20) < 43.8  # 99.9 % of 19 degrees of freedom
    pairs = starts[::2] * 4 // windows.n_starts * 4 + starts[1::2] * 4 // windows.n_starts
    assert chi_square(pairs, 16, 16) < 37.7  # neighbours know nothing of each other; 15 degrees of freedom


def test_mix_hashes_every_number_to_another() -> None:
    assert len(np.unique(mix(np.arange(100_000), 7))) == 100_000


# ---- shuffle ---------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n: int, seed: int) -> None:
    places = permute(np.arange(n), n, np.full(n, seed, dtype=np.uint64))
    assert np.array_equal(np.sort(places), np.arange(n))


def test_permute_puts_each_index_anywhere() -> None:
    seeds = mix(np.arange(20_000), 3)
    for n, index in ((10, 0), (10, 9), (1000, 500), (1009, 1008)):
        places = permute(np.full(20_000, index), n, seeds)
        assert chi_square(places, n, 10) < 27.9  # 99.9 % of 9 degrees of freedom


@given(n_tokens=st.integers(T + 1, 400), stride=st.integers(1, 60), epoch=st.integers(0, 50))
def test_an_epoch_has_every_window_of_its_phase_once(n_tokens: int, stride: int, epoch: int) -> None:
    windows = shuffled(n_tokens, stride)
    starts = np.sort(windows.starts(epoch * windows.per_epoch + np.arange(windows.per_epoch)))
    assert (np.diff(starts) == stride).all()
    assert starts[0] < stride


def test_the_next_epoch_has_another_order_and_another_phase() -> None:
    windows = shuffled()
    first, second = np.split(windows.starts(np.arange(2 * windows.per_epoch)), 2)
    assert first[0] % T != second[0] % T
    assert np.argsort(first).tolist() != np.argsort(second).tolist()
    assert not (np.diff(first) > 0).all()


def test_every_phase_has_its_turn_before_one_comes_again() -> None:
    windows = shuffled()
    firsts_of_epochs = windows.starts(np.arange(3 * T) * windows.per_epoch)
    cycles = (firsts_of_epochs % T).reshape(3, T)
    assert [sorted(cycle) for cycle in cycles.tolist()] == [list(range(T))] * 3
    assert cycles[0].tolist() != cycles[1].tolist()


# ---- how much of the corpus has been a target ------------------------------------------------------------------------


def counted_coverage(windows: Windows, n_samples: int, last_k: int) -> float:
    covered = np.zeros(windows.n_tokens, dtype=bool)
    for start in windows.starts(np.arange(n_samples)):
        covered[start + windows.block_size + 1 - last_k : start + windows.block_size + 1] = True
    return float(covered.mean())


@pytest.mark.parametrize("last_k", [1, 5, T])
@pytest.mark.parametrize("n_samples", [0, 100, 1000, 8000])
def test_coverage_of_random_windows_is_the_expectation(last_k: int, n_samples: int) -> None:
    counted = np.mean([counted_coverage(random_windows(seed=seed), n_samples, last_k) for seed in range(5)])
    assert random_windows().target_coverage(n_samples, last_k) == pytest.approx(counted, abs=0.01)


@pytest.mark.parametrize("stride", [T, 5, 40, 1])
@pytest.mark.parametrize("last_k", [1, 5, T])
@pytest.mark.parametrize("epochs", [1, 2, 7, 100])
def test_coverage_of_whole_epochs_is_exact_but_for_the_ends(stride: int, last_k: int, epochs: int) -> None:
    windows = shuffled(n_tokens=2000, stride=stride)
    n_samples = min(epochs, 2 * windows.phases) * windows.per_epoch
    counted = counted_coverage(windows, n_samples, last_k)
    assert windows.target_coverage(n_samples, last_k) == pytest.approx(counted, abs=2 * (T + stride) / 2000)


@pytest.mark.parametrize("last_k", [1, 5, T])
@pytest.mark.parametrize("epochs", [0.0, 0.3, 0.9, 2.5, 6.4])
@pytest.mark.parametrize("stride", [T, 5])
def test_coverage_within_an_epoch_is_the_expectation(stride: int, last_k: int, epochs: float) -> None:
    cases = [shuffled(n_tokens=5000, stride=stride, seed=seed) for seed in range(5)]
    n_samples = int(epochs * cases[0].per_epoch)
    counted = np.mean([counted_coverage(windows, n_samples, last_k) for windows in cases])
    expected = np.mean([windows.target_coverage(n_samples, last_k) for windows in cases])
    assert expected == pytest.approx(counted, abs=0.02)


def test_final_token_training_covers_one_tth_per_epoch_and_everything_in_t() -> None:
    windows = shuffled(n_tokens=100_000)
    assert windows.target_coverage(windows.per_epoch, last_k=1) == 1 / T
    assert windows.target_coverage(3 * windows.per_epoch, last_k=1) == 3 / T
    assert windows.target_coverage(T * windows.per_epoch, last_k=1) == 1
    assert windows.target_coverage(windows.per_epoch, last_k=T) == 1
    assert counted_coverage(windows, T * windows.per_epoch, last_k=1) > 1 - 2 * T / 100_000


@given(
    n_tokens=st.integers(T + 1, 200),
    stride=st.integers(1, 1000),
    sampling=st.sampled_from(["random", "shuffle"]),
    last_k=st.integers(1, T),
    n_samples=st.integers(0, 10**9),
)
def test_coverage_is_a_share(n_tokens: int, stride: int, sampling: str, last_k: int, n_samples: int) -> None:
    windows = Windows(n_tokens, T, sampling, stride, 1)  # type: ignore[arg-type]
    assert 0 <= windows.target_coverage(n_samples, last_k) <= windows.target_coverage(n_samples + 1000, last_k) <= 1


# ---- whose samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_steps_samples_and_none_twice(world_size: int) -> None:
    for step in (0, 1, 1233):
        shares = [samples_of(step, 64, rank, world_size) for rank in range(world_size)]
        assert [len(share) for share in shares] == [64 // world_size] * world_size
        assert np.concatenate(shares).tolist() == list(range(step * 64, step * 64 + 64))


# ---- evaluation's windows --------------------------------------------------------------------------------------------


@given(n_tokens=st.integers(T + 1, 10_000), count=st.integers(1, 300))
def test_evaluation_windows_are_spread_over_the_corpus(n_tokens: int, count: int) -> None:
    starts = evenly_spaced(n_tokens, T, count)
    assert starts.tolist() == evenly_spaced(n_tokens, T, count).tolist()
    assert len(starts) == min(count, n_tokens - T)
    assert starts[0] == 0
    assert starts[-1] == (n_tokens - T - 1 if count > 1 else 0)
    assert np.ptp(np.diff(starts)) <= 1 if len(starts) > 1 else True
