"""Bounds of the LPI, and the search for the strongest neurons by them (method.md, section 2.1).

With the norm scale fixed, log p(w | r + v) is concave in v, and the change of all logits is linear in it. The change of
the likely tokens' logits and the mean change of all others, a few dozen inner products for each neuron, bound its LPI
from both sides. Neurons are evaluated exactly in descending order of the upper bound (the negative side: ascending
order of the lower one); when the K-th best exact value is at least the next bound, the K best are known and the rest
need no look. The bounds also certify what is said of all neurons together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moescope.lens import Readout
from moescope.models import MAX_LOGITS
from moescope.neurons import Block

GUARD = 1e-6
"""Nats by which rounding in float32 may break a bound; an LPI below it is not ranked."""
LIKELY, PRODUCTS = (16, 64), 2**17
"""Tokens whose logits a bound follows one by one, at least and at most, and inner products for each prompt between."""
STEP, EXTRA = 4, 128
"""Neurons that are evaluated beyond K at first, twice as many at each further step, and at most."""
TOLERANCE, FEW = 0.01, 16
"""Bounds are close if those of all LPIs together differ by this share of the positive; FEW evaluations may help."""
SHARE = 0.01
"""The neurons whose share of the positive LPI is reported (Gated-LPI: the top 1%)."""
TINY = 1e-30
FIGURES = ("positive", "share", "entropy", "gini")

Evaluate = Callable[[Int[Tensor, "groups k"]], Float[Tensor, "groups k"]]
"""The summed LPI, over each group of rows, of neurons by number; 0 for number -1."""


@dataclass(frozen=True)
class Vocabulary:
    """What bounds need to know of W_U: its mean row, the Gram matrix of its centred rows, and the longest of these.

    Rows are centred because a change of all logits alike changes no probability.
    """

    mean: Float[Tensor, " d_model"]
    gram: Float[Tensor, "d_model d_model"]
    longest: float

    @staticmethod
    def of(readout: Readout) -> Vocabulary:
        mean = readout.weight.mean(0)
        gram, longest = mean.new_zeros(len(mean), len(mean)), 0.0
        for rows in readout.weight.split(max(1, MAX_LOGITS // len(mean))):
            centred = rows - mean
            gram += centred.T @ centred
            longest = max(longest, float(centred.norm(dim=1).max()))
        return Vocabulary(mean, gram, longest)

    def energy(self, columns: Float[Tensor, "m d_model"]) -> Float[Tensor, " m"]:
        """v'Gv of columns v (G: `gram`), rounded up: where G is far larger in some other direction, it cancels."""
        rounding = torch.finfo(columns.dtype).eps * self.gram.trace() * columns.square().sum(1)
        return ((columns @ self.gram) * columns).sum(1).clamp_min(0) + rounding


def followed_tokens(m: int) -> int:
    """How many tokens' logits are followed for each of m neurons."""
    return max(LIKELY[0], min(LIKELY[1], PRODUCTS // m))


def intervals(
    readout: Readout,
    vocabulary: Vocabulary,
    log_p: Float[Tensor, "n vocab"],
    block: Block,
    energy: Float[Tensor, "n m"],
    length: Float[Tensor, "n m"],
    scale: Float[Tensor, " n"],
    target: Int[Tensor, " n"],
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
    """(lower, upper) bounds of the LPI of every neuron of a block, at a linear readout.

    `log_p` are the next token's log-probabilities at the state that the block adds to (overwritten); `energy` and
    `length` are vocabulary.energy and |v| of every neuron's column. With a the change of the logits,
    LPI = a_w - log sum_i p_i exp(a_i). w and the most likely tokens enter as they are; the mean of exp(a) over
    all others is at least exp(mean a) (Jensen), and at most that times Bennett's bound for a variable with the largest
    deviation and the variance that `energy`, `length` and the largest of their probabilities allow.
    """
    followed = min(followed_tokens(block.activations.shape[1]), log_p.shape[1])
    likely = log_p.scatter(1, target.unsqueeze(1), 1.0).topk(followed, dim=1).indices
    log_likely = log_p.gather(1, likely)
    log_p.scatter_(1, likely, -torch.inf)
    # Of all others: their probability, and their distribution among themselves. There may be none.
    log_rest = log_p.logsumexp(1, keepdim=True).clamp_min(-1 / TINY)
    others = log_p.sub_(log_rest).exp_()
    largest, mean = others.amax(1, keepdim=True), others @ readout.weight
    vectors = torch.cat([readout.weight[likely], mean.unsqueeze(1)], 1) - vocabulary.mean
    a = block.products(vectors * scale[:, None, None])
    own, middle = a[:, 0].clone(), a[:, -1].clone()

    size = (block.activations * scale.unsqueeze(1)).abs()
    energy = energy * size.square()
    deviation = (torch.minimum(energy.sqrt(), length * size * vocabulary.longest) - middle).clamp_min(TINY)
    variance = energy * largest
    square = deviation.square()
    factor = square * torch.expm1(-variance / deviation) + variance * torch.expm1(deviation)
    # Where that overflows, the largest deviation itself is the bound.
    raised = middle + torch.fmin((factor / (square + variance)).clamp_min(0).log1p(), deviation)

    # Beyond 80, exp comes near the largest float32.
    row, place = ((a.amax(1) > 1) | (a.amin(1) < -1) | (raised > 80)).nonzero(as_tuple=True)
    wide = log_likely[row] + a[row, :-1, place]
    sums = torch.einsum("nkm,nk->nm", a.expm1_()[:, :-1], log_likely.exp())
    bounds = []
    for change in (raised, middle):
        normaliser = (sums + log_rest.exp() * torch.expm1(change)).log1p()
        tail = log_rest[row] + change[row, place].unsqueeze(1)
        normaliser[row, place] = torch.cat([wide, tail], 1).logsumexp(1)
        bounds.append(own - normaliser)
    return bounds[0], bounds[1]


def search(
    lower: Float[Tensor, "groups total"],
    upper: Float[Tensor, "groups total"],
    k: int,
    evaluate: Evaluate,
    rows: Int[Tensor, " groups"],
    sign: int = 1,
    bounded: bool = True,
) -> tuple[Int[Tensor, "groups c"], Float[Tensor, "groups c"], Float[Tensor, "groups c"], Bool[Tensor, " groups"]]:
    """The neurons that may be among the k with the largest positive value of each group, all of them evaluated.

    A neuron's value is `sign` times its LPI, summed over the `rows` rows of a group. The LPI lies between `lower` and
    `upper` and is known where they are equal, unless not `bounded`: then they only say what to look at first. Returns
    for c neurons their numbers (-1 for none), values and upper bounds of the values, and whether these hold all of the
    k, ties included: bounds so loose that more than k + EXTRA neurons would have to be looked at leave that open.
    """
    total, limit = upper.shape[1], GUARD * rows.unsqueeze(1)
    pool = min(k + EXTRA, total)
    outer, inner = (upper, lower) if sign > 0 else (lower, upper)
    best, indices = outer.topk(pool, dim=1, largest=sign > 0)
    known = (inner.gather(1, indices) == best) & bounded
    best = sign * best
    numbers = torch.where(best > limit, indices, -1)
    values = torch.zeros_like(best)
    open_ = torch.ones(len(upper), dtype=torch.bool)
    last, step = 0, STEP
    while open_.any() and last < pool:
        first, last = last, min(last + step + (0 if last else k), pool)
        step *= 2
        asked, at = torch.where(open_.unsqueeze(1), numbers[:, first:last], -1), slice(first, last)
        found = sign * evaluate(torch.where(known[:, at], -1, asked))
        values[:, at] = torch.where(asked < 0, 0, torch.where(known[:, at], best[:, at], found))
        worst = values.topk(min(k, pool), dim=1).values[:, -1].clamp_min(0)
        # Whatever lies outside of the pool is bounded by the last in it.
        following = best[:, min(last, pool - 1)]
        open_ &= (following > limit[:, 0]) & (worst < following + limit[:, 0] + GUARD * worst) & (last < total)
        numbers[:, last:] = torch.where(open_.unsqueeze(1), numbers[:, last:], -1)
    return numbers, values, best, ~open_


def tighten(lower: Float[Tensor, "groups total"], upper: Float[Tensor, "groups total"], evaluate: Evaluate) -> None:
    """Evaluate the neurons with the widest bounds where FEW are enough to bring all close together (TOLERANCE)."""
    width = upper - lower
    widest = width.topk(min(FEW, width.shape[1]), dim=1)
    left = width.sum(1, keepdim=True) - widest.values.cumsum(1) + widest.values
    allowed = TOLERANCE * upper.clamp_min(0).sum(1, keepdim=True)
    wanted = (left > allowed) & (left[:, -1:] - widest.values[:, -1:] <= allowed)
    numbers = torch.where(wanted & (widest.values > 0), widest.indices, -1)
    settle(lower, upper, numbers, evaluate(numbers))


def figures_of(
    lower: Float[Tensor, " total"], upper: Float[Tensor, " total"], n: int
) -> dict[str, tuple[float, float]]:
    """(lowest, highest) possible value of each of FIGURES for n neurons whose LPIs lie between these bounds.

    Neurons beyond the n have bounds of 0. Share, entropy and Gini coefficient are NaN without a positive LPI.
    """
    positive = upper > 0
    low, high = lower[positive].clamp_min(0).double(), upper[positive].double()
    least, most = low.sort(descending=True).values, high.sort(descending=True).values
    sum_low, sum_high = float(low.sum()), float(high.sum())
    if sum_low <= 0:
        nothing = (np.nan, np.nan)
        return {"positive": (sum_low, sum_high), "share": nothing, "entropy": nothing, "gini": nothing}
    first = max(1, math.ceil(SHARE * n))
    top_low, top_high = float(least[:first].sum()), float(most[:first].sum())
    share = top_low / (top_low + sum_high - top_high), top_high / (top_high + sum_low - top_low)

    p = torch.stack([low / (low + (sum_high - high)), high / (high + (sum_low - low))])
    h = -torch.xlogy(p, p)
    peaked = (p[0] < 1 / math.e) & (p[1] > 1 / math.e)
    entropy = float(h.amin(0).sum()), float(torch.where(peaked, 1 / math.e, h.amax(0)).sum())

    # Of x in falling order: sum_j (n + 1 - 2j) x_j / (n sum x).
    weight = n + 1 - 2 * torch.arange(1, len(low) + 1)
    above = torch.where(weight > 0, most, least), torch.where(weight > 0, least, most)
    spread = [float((weight * x).sum()) / n for x in above]
    gini = max(spread[1] / sum_high, 0.0), min(spread[0] / sum_low, 1.0)
    return {"positive": (sum_low, sum_high), "share": share, "entropy": entropy, "gini": gini}


def settle(lower: Tensor, upper: Tensor, numbers: Tensor, values: Tensor) -> None:
    """Put in values that are known; number -1 for none."""
    group, column = (numbers >= 0).nonzero(as_tuple=True)
    for bound in (lower, upper):
        bound[group, numbers[group, column]] = values[group, column]
