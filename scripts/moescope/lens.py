"""The readout and the log-probability increase (LPI) of any vector in the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moescope.models import Anatomy, weights_of

MAX_LOGITS = 2**25
REFERENCE_EPS = 1e-6


@dataclass(frozen=True)
class Readout:
    """The readout of residual states at a fixed norm scale: W_U with the final norm and the logit scale folded in.

    `weight` is float32 [vocab d_model]; `bias` float32 [vocab] or None. Linear, but for a model that caps its logits
    (`softcap` c, 0 for none: c tanh(logits / c)), where LPIs stay exact and only bounds would not hold.
    """

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None
    softcap: float = 0.0

    @staticmethod
    def of(parts: Anatomy) -> Readout:
        norm, unembedding = parts.final_norm, parts.unembedding
        with weights_of(unembedding):
            plain = cast(Tensor, unembedding.weight).detach().float() * parts.logit_scale
            bias = plain @ norm.bias.float()
            if getattr(unembedding, "bias", None) is not None:
                bias = bias + cast(Tensor, unembedding.bias).detach().float() * parts.logit_scale
        weight = plain * norm.gain.float()
        weight = weight - weight.mean(-1, keepdim=True) if norm.centred else weight
        return Readout(weight, bias if bias.any() else None, parts.softcap)

    def logits(self, states: Float[Tensor, "*n d_model"], scale: Float[Tensor, "*n"]) -> Float[Tensor, "*n vocab"]:
        """Logits before any capping."""
        logits = (states.float() * scale.unsqueeze(-1)) @ self.weight.T
        return logits if self.bias is None else logits + self.bias

    def cap(self, logits: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n vocab"]:
        """Logits as the model gives them."""
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def log_probs(self, states: Float[Tensor, "n d_model"], scale: Float[Tensor, " n"]) -> Float[Tensor, "n vocab"]:
        """Log-probabilities of the whole vocabulary, p(. | x) of method.md, section 2."""
        return self.cap(self.logits(states, scale)).log_softmax(-1)


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
    Evaluated as a_w - log(sum_i p_i exp(a_i)) with a = s W_U (g v), the change of the logits: small effects keep
    their digits, which the difference of two log-softmaxes does not give.
    """
    units = contributions.shape[1]
    step = max(1, _rows(readout) // max(units, 1))
    pieces = zip(*(t.split(step) for t in (residual, contributions, scale, target)), strict=True)
    return torch.cat([_lpi(readout, r, v, s, w) for r, v, s, w in pieces])


def norm_scale(parts: Anatomy, final: Float[Tensor, "n d_model"], norm: str = "fixed") -> Float[Tensor, " n"]:
    """The scale s of method.md, section 2: that of the real final residual state, for every state of its prompt.

    `fixed` uses the model's own epsilon; `reference` uses 1e-6 whatever the model says, as the published notebook
    of Gated-LPI does.
    """
    return replace(parts.final_norm, eps=REFERENCE_EPS if norm == "reference" else parts.final_norm.eps).scale(final)


def _lpi(readout: Readout, r: Tensor, v: Tensor, s: Tensor, w: Tensor) -> Float[Tensor, "n units"]:
    logits = readout.logits(r, s)
    log_p = readout.cap(logits).log_softmax(-1).unsqueeze(1)
    a = (v.float() * s[:, None, None]) @ readout.weight.T
    if readout.softcap:
        a = readout.cap(logits.unsqueeze(1) + a) - readout.cap(logits).unsqueeze(1)
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
