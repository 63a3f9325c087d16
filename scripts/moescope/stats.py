"""Ranks and their summaries, bootstrap intervals, change points. NumPy only: no model, no file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

if TYPE_CHECKING:
    from torch import Tensor


def ranks(logits: Float[Tensor, "*rows vocab"], targets: Int[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
    """Rank of each target in the whole vocabulary, 1 = best; ties count against the model (method.md, section 3)."""
    return (logits >= logits.gather(-1, targets.unsqueeze(-1))).sum(-1)


def hits(rank: Int[np.ndarray, "*n"], k: int = 10) -> Float[np.ndarray, "*n"]:
    """1 where the rank is at most k, else 0; its mean is HIT@k."""
    return (np.asarray(rank) <= k).astype(float)


def reciprocal(rank: Int[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """1 / rank; its mean is the MRR."""
    return 1.0 / np.asarray(rank)


def cluster_bootstrap(
    values: Float[np.ndarray, "n m"], clusters: Int[np.ndarray, " n"], draws: int, seed: int
) -> Float[np.ndarray, "draws m"]:
    """Column means of `values` over resampled clusters (subjects), one row a draw.

    Whole clusters are drawn with replacement, as many as there are, so that prompts about one subject
    stay together (method.md, section 3). A statistic of means takes these rows as its own draws.
    """
    _, index = np.unique(clusters, return_inverse=True)
    n_clusters = index.max() + 1
    sums = np.zeros((n_clusters, values.shape[1]))
    np.add.at(sums, index, values)
    sizes = np.bincount(index)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=draws)
    return (counts @ sums) / (counts @ sizes)[:, None]


def interval(draws: Float[np.ndarray, "draws *m"], confidence: float) -> Float[np.ndarray, "2 *m"]:
    """Percentile interval of bootstrap draws: its lower and upper end."""
    tail = (1 - confidence) / 2
    return np.quantile(draws, [tail, 1 - tail], axis=0)


def two_change_points(values: Float[np.ndarray, " n"]) -> tuple[int, int]:
    """The borders (i, j), 0 < i < j < n, of the best piecewise-constant fit with three pieces.

    Least squares over values[:i], values[i:j], values[j:]; a piecewise-constant gain is a
    piecewise-linear cumulative gain (method.md, section 7). Raises ValueError for fewer than three values.
    """
    n = len(values)
    if n < 3:
        raise ValueError(f"three stages need at least 3 layers; this model has {n}")

    def cost(start: int, stop: int) -> float:
        piece = values[start:stop]
        return float(((piece - piece.mean()) ** 2).sum())

    pairs = [(i, j) for i in range(1, n - 1) for j in range(i + 1, n)]
    return min(pairs, key=lambda pair: cost(0, pair[0]) + cost(*pair) + cost(pair[1], n))
