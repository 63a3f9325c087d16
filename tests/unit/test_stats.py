import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moescope import stats


def test_ranks_count_ties_against_the_model():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert stats.ranks(logits, torch.tensor([1, 2])).tolist() == [2, 4]
    assert stats.ranks(logits, torch.tensor([2, 0])).tolist() == [3, 4]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.data())
def test_rank_is_the_worst_place_in_any_sorted_order(logits, data):
    target = data.draw(st.integers(0, len(logits) - 1))
    by_sorting = sum(value > logits[target] for value in logits) + logits.count(logits[target])
    rank = stats.ranks(torch.tensor(logits, dtype=torch.float32), torch.tensor(target))
    assert rank.item() == by_sorting


def test_bootstrap_draws_whole_clusters():
    values = np.array([[0.0], [0.0], [1.0], [1.0], [1.0]])
    draws = stats.cluster_bootstrap(values, np.array([7, 7, 9, 9, 9]), draws=500, seed=0)
    # Two clusters: only both, only the first or only the second can be drawn.
    assert {round(float(x), 6) for x in draws.ravel()} == {0.0, 0.6, 1.0}


def test_bootstrap_agrees_with_resampling_one_by_one():
    rng = np.random.default_rng(1)
    clusters = rng.integers(0, 12, 60)
    values = rng.normal(size=(60, 2)) + clusters[:, None]
    fast = stats.cluster_bootstrap(values, clusters, draws=4000, seed=3)
    names = np.unique(clusters)
    slow = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(clusters == c) for c in rng.choice(names, len(names))])
        slow.append(values[rows].mean(0))
    assert np.allclose(fast.mean(0), np.mean(slow, 0), atol=0.1)
    assert np.allclose(fast.std(0), np.std(slow, 0), rtol=0.06)


def test_interval_of_known_draws():
    low, high = stats.interval(np.arange(101.0), 0.9)
    assert (low, high) == pytest.approx((5, 95))


@pytest.mark.parametrize(("i", "j", "n"), [(1, 2, 3), (2, 5, 9), (4, 6, 8)])
def test_change_points_are_found_where_they_were_put(i, j, n):
    values = np.concatenate([np.full(i, 0.1), np.full(j - i, 2.0), np.full(n - j, 1.0)])
    assert stats.two_change_points(values + 0.01 * np.sin(np.arange(n))) == (i, j)


def test_three_stages_need_three_layers():
    with pytest.raises(ValueError, match="at least 3 layers"):
        stats.two_change_points(np.ones(2))
