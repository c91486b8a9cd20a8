"""Which tokens belong to sample number g, and which samples belong to rank r: pure functions of numbers.

A window is T+1 tokens: T inputs, and targets one further. Where sample g lies depends on (seed, g) alone, so resuming
needs only the step, and changing the number of ranks changes neither the data nor its order.
Everything is vectorised over sample numbers and keeps no state: memory does not grow with corpus or run.
"""

import math
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

    The generalised Feistel network of Black and Rogaway (2002): index is a row and a column of the smallest near-square
    grid that holds n, each in turn is shifted by a hash of the other, and what falls outside n walks on until it is
    inside. O(1) memory; under one in √n walks, so that all of a batch are done in about two passes.
    """
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    n_rows, n_columns = np.uint64(rows), np.uint64(columns)
    result = index.astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        (row, column), key = np.divmod(result[walking], n_columns), seed[walking]
        for turn in range(0, _FEISTEL_ROUNDS, 2):
            row = (row + mix(column ^ key, turn << 40) % n_rows) % n_rows
            column = (column + mix(row ^ key, (turn + 1) << 40) % n_columns) % n_columns
        result[walking] = row * n_columns + column
        walking = walking[result[walking] >= np.uint64(n)]
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
        """Offsets that an epoch's first window can have; as many epochs take each of them once, in random order."""
        return min(self.stride, self.n_starts)

    @property
    def per_epoch(self) -> int:
        """Windows per epoch of `shuffle`, the same whatever the phase: up to stride-1 starts at the end are left."""
        return (self.n_starts - self.phases) // self.stride + 1

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """Return the offset of each sample's first token, int64 [B], for global sample numbers [B]."""
        if self.sampling == "random":
            return (mix(samples, self.seed) % np.uint64(self.n_starts)).astype(np.int64)
        epochs, index = np.divmod(samples, self.per_epoch)
        order = permute(index, self.per_epoch, mix(epochs, self.seed ^ 0x5EED))
        return order * self.stride + self._phase(epochs)

    def _phase(self, epochs: np.ndarray) -> np.ndarray:
        """Return the offset of the first window in each of `epochs` [B]."""
        cycles, index = np.divmod(epochs, self.phases)
        return permute(index, self.phases, mix(cycles, self.seed))

    def target_coverage(self, n_samples: int, last_k: int) -> float:
        """Return which fraction of the corpus's tokens has been a supervised target after the first `n_samples`.

        With final-token loss (`last_k` 1) and a stride of T an epoch covers only 1/T. `random`: the expectation.
        `shuffle`: counted by position modulo stride, which is exact but for the corpus's two ends.
        """
        if self.sampling == "random":
            return 1.0 - (1.0 - min(1.0, last_k / self.n_starts)) ** n_samples
        epochs, rest = divmod(n_samples, self.per_epoch)
        covered = np.zeros(min(self.stride, self.n_tokens))
        positions = np.arange(self.block_size - last_k, self.block_size)
        # After `phases` epochs every phase has been met, and nothing changes any more.
        for epoch in range(min(epochs + 1, self.phases)):
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
