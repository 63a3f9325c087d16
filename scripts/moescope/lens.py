"""The readout and the log-probability increase (LPI) of any vector in the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moescope.models import MAX_LOGITS, Anatomy, Norm, weights_of

IN_CACHE = 2**19
"""Numbers that a processor's cache holds: fresh memory for more would cost more than the arithmetic."""
REFERENCE_EPS = 1e-6


@dataclass(frozen=True)
class Readout:
    """The readout of residual states: W_U with the final norm's gain and the logit scale folded in.

    `weight` is float32 [vocab d_model]; `bias` float32 [vocab] or None. With the norm scale fixed it is linear, but
    for a model that caps its logits (`softcap` c, 0 for none: c tanh(logits / c)). With `norm` the scale is recomputed
    from every state that is read, and the given one is not used.
    """

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None
    softcap: float = 0.0
    norm: Norm | None = None

    @staticmethod
    def of(parts: Anatomy, norm: str = "fixed") -> Readout:
        """`norm` as in norm_scale."""
        final, unembedding = parts.final_norm, parts.unembedding
        with weights_of(unembedding):
            plain = cast(Tensor, unembedding.weight).detach().float()
            bias = plain @ final.bias.float()
            if getattr(unembedding, "bias", None) is not None:
                bias = bias + cast(Tensor, unembedding.bias).detach().float()
            weight, bias = plain * (final.gain.float() * parts.logit_scale), bias * parts.logit_scale
        weight = weight - weight.mean(-1, keepdim=True) if final.centred else weight
        recomputed = final if norm == "recomputed" else None
        return Readout(weight, bias if bias.any() else None, parts.softcap, recomputed)

    @property
    def is_linear(self) -> bool:
        """Whether logits are an affine map of states: only then the LPI is concave, and bounds hold."""
        return not self.softcap and self.norm is None

    def logits(self, states: Float[Tensor, "*n d_model"], scale: Float[Tensor, "*n"]) -> Float[Tensor, "*n vocab"]:
        """Logits before any capping."""
        scale = scale if self.norm is None else self.norm.scale(states)
        logits = (states.to(self.weight.dtype) * scale.unsqueeze(-1)) @ self.weight.T
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
    """log p(w | x) in nats (method.md, section 2)."""
    pieces = zip(*(t.split(rows_at_once(readout)) for t in (states, scale, target)), strict=True)
    return torch.cat([readout.log_probs(x, s).gather(-1, w.unsqueeze(-1)).squeeze(-1) for x, s, w in pieces])


def lpi(
    readout: Readout,
    residual: Float[Tensor, "n d_model"],
    contributions: Float[Tensor, "n units d_model"],
    scale: Float[Tensor, " n"],
    target: Int[Tensor, " n"],
    log_p: Float[Tensor, "n vocab"] | None = None,
) -> Float[Tensor, "n units"]:
    """LPI(v | r) = log p(w | r + v) - log p(w | r), exact, in nats (KA section 3; method.md, section 2).

    Each contribution v is added alone to the residual state r of its prompt. `lpi_of` says how it is evaluated.
    """
    n, units = contributions.shape[:2]
    row = torch.arange(n).repeat_interleave(units)
    return lpi_of(readout, residual, row, contributions.flatten(0, 1), scale, target, log_p).view(n, units)


@torch.no_grad()
def lpi_of(
    readout: Readout,
    residual: Float[Tensor, "n d_model"],
    row: Int[Tensor, " r"],
    vectors: Float[Tensor, "r d_model"],
    scale: Float[Tensor, " n"],
    target: Int[Tensor, " n"],
    log_p: Float[Tensor, "n vocab"] | None = None,
) -> Float[Tensor, " r"]:
    """LPI of vectors, each added alone to the residual state of prompt `row`; `row` does not fall.

    `log_p` are the log-probabilities at the residual states, if they are known.

    Evaluated as a_w - log1p(sum_i p_i expm1(a_i)) with a the change of the logits, or by logsumexp where some |a_i| is
    above 1: small effects keep their digits, which the difference of two log-softmaxes does not give.
    """
    out, step = scale.new_empty(len(row)), rows_at_once(readout)
    buffer = readout.weight.new_empty(min(step, len(row)), len(readout.weight))
    for start in range(0, len(row), step):
        at = slice(start, start + step)
        used, index = row[at].unique_consecutive(return_inverse=True)
        known = None if log_p is None else log_p[used]
        out[at] = _lpi(
            readout, residual[used], index, vectors[at].to(buffer.dtype), scale[used], target[used], known, buffer
        )
    return out


def norm_scale(parts: Anatomy, final: Float[Tensor, "n d_model"], norm: str = "fixed") -> Float[Tensor, " n"]:
    """The scale s of method.md, section 2: that of the real final residual state, for every state of its prompt.

    `fixed` uses the model's own epsilon; `reference` uses 1e-6 whatever the model says, as the published notebook
    of Gated-LPI does; with `recomputed` a Readout takes the scale of each state that it reads instead (the usual
    logit lens), and only what is not read out, or bounded, has this one.
    """
    return replace(parts.final_norm, eps=REFERENCE_EPS if norm == "reference" else parts.final_norm.eps).scale(final)


def rows_at_once(readout: Readout) -> int:
    """How many rows of logits are held at once."""
    return max(1, MAX_LOGITS // len(readout.weight))


def _lpi(
    readout: Readout,
    r: Tensor,
    index: Tensor,
    v: Tensor,
    s: Tensor,
    w: Tensor,
    log_p: Tensor | None,
    buffer: Tensor,
) -> Float[Tensor, " r"]:
    """LPIs of vectors v at the states r[index]; `buffer` has room for as many rows of logits."""
    log_p = readout.log_probs(r, s) if log_p is None else log_p
    p = log_p.exp()
    if readout.is_linear:
        a = torch.mm(v * s[index].unsqueeze(1), readout.weight.T, out=buffer[: len(v)])
    else:
        a = readout.cap(readout.logits(r[index].to(v.dtype) + v, s[index])) - readout.cap(readout.logits(r, s))[index]
    found = a.gather(1, w[index].unsqueeze(1)).squeeze(1)
    step = max(1, IN_CACHE // a.shape[1])
    for start in range(0, len(v), step):
        rows = slice(start, start + step)
        part, at = a[rows], index[rows]
        large = (part.amax(1) > 1) | (part.amin(1) < -1)
        wide = (part[large] + log_p[at[large]]).logsumexp(1)
        normaliser = torch.linalg.vecdot(part.expm1_(), p[at]).log1p()
        normaliser[large] = wide
        found[rows] -= normaliser
    return found
