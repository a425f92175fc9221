"""Pairs of clips as samples of a training."""

from collections.abc import Sequence

import numpy as np

from ttmray.config import fingerprint
from ttmray.errors import UserError
from ttmray.training.clips import Clips
from ttmray.training.data import DataConfig, Mixture, Samples, open_mixture
from ttmray.training.pairs import read_pairs


class PairMixture(Mixture):
    """Pairs as an endless, reproducible sequence. A sample is a pair, read as two rows that share their draws; of B
    pairs come first all winners, then all losers.

    Args:
        pool: clips that the pairs are of.
        winners, losers: (n,) rows of the pool.
        seed: of the order and the draws.
    """

    def __init__(self, pool: Clips, winners: np.ndarray, losers: np.ndarray, seed: int) -> None:
        super().__init__([pool], [1.0], seed)
        self._winners, self._losers = winners, losers

    def __len__(self) -> int:
        return len(self._winners)

    def _permuted(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self))

    def read(
        self, clips: np.ndarray, numbers: Sequence[int], streams: Sequence[tuple[int, int]], pin: bool = False
    ) -> Samples:
        """Winners and losers of the pairs `clips`; see `Mixture.read`."""
        rows = np.concatenate([self._winners[clips], self._losers[clips]])
        return super().read(rows, [*numbers, *numbers], [*streams, *streams], pin)

    def scores(self) -> np.ndarray:
        """(2, n) float32: rewards of all winners, and of all losers."""
        return self.sources[0].score[np.stack([self._winners, self._losers])]

    def fingerprint(self) -> str:
        """Hex SHA-256 of the pool and the pairs."""
        pairs = [self._winners.tolist(), self._losers.tolist()]
        return fingerprint({"pool": super().fingerprint(), "pairs": pairs})


def open_pairs(path: str, data: DataConfig) -> PairMixture:
    """The pairs of a file, read from the pool `data.sources`.

    Raises:
        UserError: another pool, or one that lacks a clip.
    """
    pool = open_mixture(data).sources[0]
    table = read_pairs(path, pool.corpus)
    row_of = {key: row for row, key in enumerate(pool.keys.to_pylist())}
    absent = [key for side in ("winner", "loser") for key in table[side].to_pylist() if key not in row_of]
    if absent:
        source = data.sources[0]
        raise UserError(
            f"{path}: {len(absent)} clips are not among those of {source.corpus}, e.g. {absent[0]}.",
            "Set split: all and keys: null for the pool in data.sources.",
        )
    winners, losers = (np.array([row_of[key] for key in table[side].to_pylist()]) for side in ("winner", "loser"))
    return PairMixture(pool, winners, losers, data.seed)
