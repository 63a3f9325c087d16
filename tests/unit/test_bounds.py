"""Bounds, and the search by them: never violated, never wrong about what is largest."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moescope import bounds, lens, neurons

SEEDS = st.integers(0, 10**6)
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13}


def block_of(vectors, activations):
    """A block with one unit, whose columns are `vectors` [m d], in one layer."""
    n, m = activations.shape
    unit = neurons.Unit(m, lambda: vectors)
    return neurons.Block(0, (0, m), torch.zeros(n, 1, dtype=torch.long), activations, {0: unit})


def lpi_in_float64(weight, state, scale, target, vectors):
    """The definition of method.md, section 2: [n m]."""

    def log_p(x):
        return (z := x @ weight.T) - np.logaddexp.reduce(z, axis=-1, keepdims=True)

    before = log_p(state * scale[:, None])
    after = log_p((state[:, None] + vectors) * scale[:, None, None])
    return np.stack([after[i, :, w] - before[i, w] for i, w in enumerate(target)])


def intervals_of(weight, state, scale, target, columns, activations, dtype=torch.float32):
    weight, state, s, columns, activations = (
        torch.tensor(x, dtype=dtype) for x in (weight, state, scale, columns, activations)
    )
    readout, block, w = lens.Readout(weight, None), block_of(columns, activations), torch.tensor(target)
    log_p = readout.log_probs(state, s)
    vocabulary = bounds.Vocabulary.of(readout)
    c = block.columns(0)
    energy, length = vocabulary.energy(c), c.norm(dim=1)
    shape = activations.shape
    found = bounds.intervals(readout, vocabulary, log_p, block, energy.expand(shape), length.expand(shape), s, w)
    return [bound.double().numpy() for bound in found]


@settings(max_examples=150, deadline=None)
@given(
    seed=SEEDS,
    peak=st.floats(0.001, 40),
    size=st.floats(1e-4, 30),
    vocabulary=st.sampled_from([2, 40, 64, 65, 66, 300, 2000]),
    common=st.floats(0, 20),
)
@example(seed=0, peak=40.0, size=30.0, vocabulary=300, common=0.0)
@example(seed=1, peak=0.001, size=1e-4, vocabulary=2000, common=20.0)
def test_every_lpi_lies_between_its_bounds(seed, peak, size, vocabulary, common):
    """For peaked and flat predictions, tiny and huge vectors, more or fewer tokens than are followed one by one."""
    rng = np.random.default_rng(seed)
    d, n, m = 8, 3, 25
    weight = rng.normal(size=(vocabulary, d)) + common * rng.normal(size=d)
    state, scale = rng.normal(size=(n, d)) * peak, rng.uniform(0.1, 1, n)
    columns, activations = rng.normal(size=(m, d)) * size, rng.normal(size=(n, m))
    target = rng.integers(0, vocabulary, n)
    vectors = activations[:, :, None] * columns
    exact = lpi_in_float64(weight, state, scale, target, vectors)
    found = {x: intervals_of(weight, state, scale, target, columns, activations, x) for x in ROUNDING}
    changes = np.abs(vectors @ weight.T).max()
    size = (1 + changes) * (1 + np.abs(state @ weight.T).max())
    logits = (state * scale[:, None]) @ weight.T
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    tangent = np.einsum("nmd,nd->nm", vectors, scale[:, None] * (weight[target] - p @ weight))
    for dtype, (lower, upper) in found.items():
        rounding = ROUNDING[dtype] * size
        assert (exact <= upper + rounding).all()
        assert (exact >= lower - rounding).all()
        # Never looser than the tangent of method.md, 2.1.
        assert (upper <= tangent + rounding).all()


def test_small_vectors_are_bounded_closely():
    """The gap is of second order: vectors of a hundredth the size have gaps of a ten-thousandth."""
    rng = np.random.default_rng(0)
    weight, state = rng.normal(size=(3000, 32)), rng.normal(size=(4, 32)) * 0.5
    columns, acts = rng.normal(size=(50, 32)) * 0.002, rng.normal(size=(4, 50))
    arguments = (weight, state, np.ones(4), np.arange(4), columns)
    wide, narrow = (np.subtract(*reversed(intervals_of(*arguments, acts * x))).max() for x in (1, 0.01))
    assert 0 < narrow < 2e-4 * wide
    exact = lpi_in_float64(*arguments[:4], acts[:, :, None] * columns)
    assert wide < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("peak", [60, 150])
def test_bounds_are_finite_where_unlikely_tokens_change_beyond_float32(peak):
    """Exp overflows for tokens whose own probability is next to nothing, or underflows; likely ones hardly change."""
    rng = np.random.default_rng(0)
    weight = np.zeros((3000, 2))
    weight[: bounds.LIKELY[1], 0] = 1
    weight[bounds.LIKELY[1] :, 1] = rng.normal(size=3000 - bounds.LIKELY[1])
    columns = np.outer(rng.normal(size=40) * 30, [0, 1])
    arguments = (weight, np.array([[peak, 0.0]]), np.ones(1), np.array([3]), columns)
    lower, upper = intervals_of(*arguments, np.ones((1, 40)))
    exact = lpi_in_float64(*arguments[:4], columns[None])
    assert np.isfinite([lower, upper]).all()
    assert (exact <= upper + 1e-4).all()
    assert (exact >= lower - 1e-4).all()


@settings(max_examples=200, deadline=None)
@given(
    seed=SEEDS,
    total=st.integers(1, 60),
    k=st.integers(1, 20),
    slack=st.floats(0, 3),
    digits=st.integers(0, 6),
    sign=st.sampled_from([1, -1]),
)
def test_the_search_finds_the_k_largest_whatever_the_bounds(seed, total, k, slack, digits, sign):
    """Also with ties (few digits), known values (no slack) and no positive value at all."""
    rng = np.random.default_rng(seed)
    values = torch.tensor(rng.normal(size=(5, total)).round(digits)) - rng.integers(0, 2)
    upper = values + slack * torch.rand(5, total) * (torch.rand(5, total) < 0.8)
    lower = values - slack * torch.rand(5, total) * (upper > values)
    looked = torch.zeros(5, total, dtype=torch.bool)

    def evaluate(numbers):
        group, column = (numbers >= 0).nonzero(as_tuple=True)
        looked[group, numbers[group, column]] = True
        out = torch.zeros(numbers.shape, dtype=values.dtype)
        out[group, column] = values[group, numbers[group, column]]
        return out

    numbers, found, _, certain = bounds.search(lower, upper, k, evaluate, torch.ones(5, dtype=torch.long), sign)
    values = sign * values
    assert certain.all()
    assert not looked[lower == upper].any()
    for group in range(5):
        own = numbers[group] >= 0
        order = np.lexsort([numbers[group][own], -found[group][own]])[:k]
        chosen = [int(x) for x in numbers[group][own][order] if values[group, x] > bounds.GUARD]
        every = np.lexsort([np.arange(total), -values[group]])
        assert chosen == [int(x) for x in every if values[group, x] > bounds.GUARD][:k]


def test_few_neurons_are_looked_at_and_loose_bounds_are_admitted():
    values = torch.linspace(1, 0.01, 5000).expand(2, -1).clone()
    looked = []

    def evaluate(numbers):
        looked.append((numbers >= 0).sum(1))
        return torch.where(numbers < 0, 0.0, values.gather(1, numbers.clamp_min(0)))

    rows = torch.ones(2, dtype=torch.long)
    upper = values + torch.tensor([[1e-5], [2.0]])
    upper[1] = 2.0
    *_, certain = bounds.search(values - 1, upper, 50, evaluate, rows)
    assert certain.tolist() == [True, False]
    assert sum(looked).tolist() == [50 + bounds.STEP, 50 + bounds.EXTRA]


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, n=st.integers(1, 400), slack=st.floats(0, 0.5), size=st.sampled_from([1e-3, 1.0, 5.0]))
def test_figures_of_any_values_within_the_bounds_lie_within_theirs(seed, n, slack, size):
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(n) < 0.5, 1, -1) * rng.exponential(size=n) ** 3 * size
    values[0] = abs(values[0]) + size
    width = slack * np.abs(values) * rng.random((2, n))
    lower, upper = (torch.tensor(np.append(x, np.zeros(7))) for x in (values - width[0], values + width[1]))
    found = bounds.figures_of(lower, upper, n)
    x = np.sort(np.maximum(values, 0))[::-1]
    share = x / x.sum()
    gini = np.abs(x[:, None] - x[None]).sum() / (2 * n * n * x.mean())
    exact = {
        "positive": x.sum(),
        "share": x[: math.ceil(n / 100)].sum() / x.sum(),
        "entropy": -(share[share > 0] * np.log(share[share > 0])).sum(),
        "gini": gini,
    }
    for name, value in exact.items():
        low, high = found[name]
        assert low - 1e-6 * (1 + abs(value)) <= value <= high + 1e-6 * (1 + abs(value)), name
        if not slack:
            assert high - low < 1e-6, name


def test_figures_without_a_positive_lpi_say_nothing():
    found = bounds.figures_of(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0]), 2)
    assert found["positive"] == (0, 0)
    assert all(np.isnan(found[name]).all() for name in ("share", "entropy", "gini"))


def test_tightening_stops_when_the_bounds_are_close_enough():
    torch.manual_seed(0)
    values = torch.rand(3, 2000)
    width = torch.zeros(3, 2000)
    width[:, : bounds.FEW] = 0.5
    width[1] = 1e-6
    width[2] = 0.5
    lower, upper = values - width, values + width
    asked = []

    def evaluate(numbers):
        asked.append(numbers >= 0)
        return torch.where(numbers < 0, 0.0, values.gather(1, numbers.clamp_min(0)))

    bounds.tighten(lower, upper, evaluate)
    counts = asked[0].sum(1).tolist()
    assert counts[1] == 0
    assert 0.8 * bounds.FEW - 10 < counts[0] < bounds.FEW
    # Where the few would not be enough, none is evaluated.
    assert counts[2] == 0
    assert ((upper - lower)[2] > 0.9).all()
    assert (lower <= values).all()
    assert (upper >= values).all()
    left = (upper - lower).sum(1)
    assert (left <= bounds.TOLERANCE * (values + width).sum(1))[:2].all()


def test_the_vocabulary_is_what_it_says():
    torch.manual_seed(0)
    readout = lens.Readout(torch.randn(100, 6) + 3, None)
    found = bounds.Vocabulary.of(readout)
    centred = readout.weight - readout.weight.mean(0)
    torch.testing.assert_close(found.gram, centred.T @ centred, rtol=1e-4, atol=1e-3)
    assert found.longest == pytest.approx(float(centred.norm(dim=1).max()))
    columns = torch.randn(9, 6)
    torch.testing.assert_close(found.energy(columns), (columns @ centred.T).square().sum(1), rtol=1e-4, atol=1e-3)


def test_energy_is_never_too_small_beside_a_direction_that_the_vocabulary_differs_in_most():
    rng = np.random.default_rng(0)
    weight, columns, strong = rng.normal(size=(2000, 64)) * 0.01, rng.normal(size=(200, 64)), rng.normal(size=64)
    columns -= np.outer(columns @ strong, strong) / (strong @ strong)
    weight += np.outer(rng.normal(size=2000) * 100, strong)
    weight, columns = (torch.tensor(x).float() for x in (weight, columns))
    centred = weight.double() - weight.double().mean(0)
    exact = (columns.double() @ centred.T).square().sum(1)
    assert (bounds.Vocabulary.of(lens.Readout(weight, None)).energy(columns) >= exact).all()
