"""Which tokens belong to sample number g, and which samples belong to rank r: pure functions of numbers.

A window is T+1 tokens: T inputs, and targets one further. Where sample g lies depends on (seed, g) alone, so resuming
needs only the step, and changing the number of ranks changes neither the data nor its order.
Everything is vectorised over sample numbers and keeps no state: memory does not grow with corpus or run.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 6


def mix(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Hash uint64 `numbers` [B] under a random-looking `seed` to uniform uint64 [B].

    splitmix64 (Steele, Lea and Flood 2014) as a counter-based generator: its n-th output without the ones before it.
    """
    with np.errstate(over="ignore"):
        x = np.uint64(seed) + (numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, seed: np.ndarray) -> np.ndarray:
    """Map each of `index` [B] in 0 … n-1 to its place in a permutation of 0 … n-1 that `seed` [B] chooses.

    A Feistel network permutes the next even power of two, and what falls outside n walks on until it is inside
    (Black and Rogaway 2002): O(1) memory, and fewer than four walks on average.
    """
    half_bits = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    result = index.astype(np.uint64)
    walking = np.ones(len(result), dtype=bool)
    while walking.any():
        left, right = result[walking] >> half_bits, result[walking] & mask
        for turn in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(right ^ seed[walking], turn << 40) & mask)
        result[walking] = (left << half_bits) | right
        walking = result >= np.uint64(n)
    return result.astype(np.int64)


@dataclass(frozen=True)
class Windows:
    """Where the windows of a corpus of `n_tokens` lie."""

    n_tokens: int
    block_size: int
    sampling: Literal["random", "shuffle"]
    stride: int
    seed: int

    @property
    def n_starts(self) -> int:
        """Offsets at which a window of block_size + 1 tokens can start."""
        return self.n_tokens - self.block_size

    @property
    def phases(self) -> int:
        """Offsets of an epoch's first window; every epoch takes another."""
        return min(self.stride, self.n_starts)

    @property
    def per_epoch(self) -> int:
        """Windows per epoch of `shuffle`, the same whatever the phase."""
        return (self.n_starts - self.phases) // self.stride + 1

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """Return the offset of each sample's first token, int64 [B], for global sample numbers [B]."""
        if self.sampling == "random":
            return (mix(samples, self.seed) % np.uint64(self.n_starts)).astype(np.int64)
        epochs, index = np.divmod(samples, self.per_epoch)
        order = permute(index, self.per_epoch, mix(epochs, self.seed ^ 0x5EED))
        return order * self.stride + self._phase(epochs)

    def _phase(self, epochs: np.ndarray) -> np.ndarray:
        return (mix(epochs, self.seed) % np.uint64(self.phases)).astype(np.int64)

    def target_coverage(self, n_samples: int, last_k: int) -> float:
        """Return which fraction of the corpus's tokens has been a supervised target after the first `n_samples`.

        With final-token loss (`last_k` 1) and a stride of T an epoch covers only 1/T. `random`: the expectation.
        `shuffle`: counted by position modulo stride, which is exact but for the corpus's two ends.
        """
        if self.sampling == "random":
            return 1.0 - (1.0 - min(1.0, last_k / self.n_starts)) ** n_samples
        epochs, rest = divmod(n_samples, self.per_epoch)
        covered = np.zeros(self.stride)
        positions = np.arange(self.block_size - last_k, self.block_size)
        # Once every phase has been met nothing changes; a run of that many epochs is cut short.
        for epoch in range(min(epochs + 1, 64 * self.phases)):
            share = 1.0 if epoch < epochs else rest / self.per_epoch
            residues, windows = np.unique(
                (positions + self._phase(np.array([epoch]))) % self.stride, return_counts=True
            )
            covered[residues] = 1.0 - (1.0 - covered[residues]) * (1.0 - share) ** windows
        return float(covered.mean())


def evenly_spaced(n_tokens: int, block_size: int, count: int) -> np.ndarray:
    """Return at most `count` window starts spread evenly over a corpus, int64 [n]: evaluation's fixed set."""
    return np.unique(np.linspace(0, n_tokens - block_size - 1, count).astype(np.int64))


def samples_of(step: int, global_batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Return the global numbers of the samples that `rank` works on in `step`, int64 [global_batch_size / world_size].

    Step s consists of samples s·G … s·G+G-1 on any number of ranks.
    """
    share = global_batch_size // world_size
    return np.arange(share, dtype=np.int64) + step * global_batch_size + rank * share
