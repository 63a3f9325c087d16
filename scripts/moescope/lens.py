"""The readout and the log-probability increase (LPI) of any vector in the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moescope.models import Anatomy

MAX_LOGITS = 2**25


@dataclass(frozen=True)
class Readout:
    """The linear readout of residual states at a fixed norm scale: W_U with the final norm's gain folded in.

    `weight` is float32 [vocab d_model]; `bias` float32 [vocab] or None.
    """

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None

    @staticmethod
    def of(parts: Anatomy) -> Readout:
        bias = parts.unembedding.bias
        weight = parts.unembedding.weight.detach().float() * parts.gain.float()
        return Readout(weight, None if bias is None else bias.detach().float())

    def log_probs(self, states: Float[Tensor, "n d_model"], scale: Float[Tensor, " n"]) -> Float[Tensor, "n vocab"]:
        """Log-probabilities of the whole vocabulary, p(. | x) of method.md, section 2."""
        logits = (states.float() * scale.unsqueeze(-1)) @ self.weight.T
        return (logits if self.bias is None else logits + self.bias).log_softmax(-1)


def log_prob(
    readout: Readout, states: Float[Tensor, "n d_model"], scale: Float[Tensor, " n"], target: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """log p(w | x) in nats with the norm scale held fixed (method.md, section 2)."""
    pieces = zip(*(t.split(_rows(readout)) for t in (states, scale, target)), strict=True)
    return torch.cat([readout.log_probs(x, s).gather(-1, w.unsqueeze(-1)).squeeze(-1) for x, s, w in pieces])


def lpi(
    readout: Readout,
    residual: Float[Tensor, "n d_model"],
    contributions: Float[Tensor, "n units d_model"],
    scale: Float[Tensor, " n"],
    target: Int[Tensor, " n"],
) -> Float[Tensor, "n units"]:
    """LPI(v | r) = log p(w | r + v) - log p(w | r), exact, in nats (KA section 3; method.md, section 2).

    Each contribution v is added alone to the residual state r of its prompt; the norm scale is fixed.
    Evaluated as a_w - log(sum_i p_i exp(a_i)) with a = s W_U (g v): small effects keep their digits,
    which the difference of two log-softmaxes does not give.
    """
    units = contributions.shape[1]
    step = max(1, _rows(readout) // max(units, 1))
    pieces = zip(*(t.split(step) for t in (residual, contributions, scale, target)), strict=True)
    return torch.cat([_lpi(readout, r, v, s, w) for r, v, s, w in pieces])


def _lpi(readout: Readout, r: Tensor, v: Tensor, s: Tensor, w: Tensor) -> Float[Tensor, "n units"]:
    log_p = readout.log_probs(r, s).unsqueeze(1)
    a = (v.float() * s[:, None, None]) @ readout.weight.T
    small = a.abs().amax(-1) < 1
    normaliser = torch.where(
        small,
        (log_p.exp() * a.clamp(-1, 1).expm1()).sum(-1).log1p(),
        (log_p + a).logsumexp(-1),
    )
    return a.gather(-1, w[:, None, None].expand(-1, v.shape[1], 1)).squeeze(-1) - normaliser


def _rows(readout: Readout) -> int:
    """How many rows of logits are held at once: about 128 MiB of float32."""
    return max(1, MAX_LOGITS // len(readout.weight))
