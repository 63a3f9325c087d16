"""One forward pass that records the parts of the residual stream at the readout position.

Routing is taken as the model used it: the ids and weights that reach the experts, never re-derived
from router logits. Hooks sit on the experts modules (whose call transformers' experts interface
fixes for every backend) and on the inputs of the output projections, so nothing is patched and the
captured forward pass gives the same bits as a plain one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from moescope.facts import steps
from moescope.models import (
    Anatomy,
    AnatomyError,
    Layer,
    Path,
    attention_output,
    expert_activations,
    experts_arguments,
    ffn_output,
)
from moescope.samples import blocks
from moescope.stats import ranks

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
NOT_STORED = ("resid_post", "expert_choices")

Store = Callable[[int, Mapping[str, Tensor]], None]
"""(row of the first prompt, tensors of a batch): where a batch's parts go."""


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    parts: Anatomy,
    tokens: pd.DataFrame,
    batch_size: int,
    store: Store,
    answer: str = "first_token",
    shard: int = 0,
    shards: int = 1,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Run all prompts of a shard, record their parts at the readout position, and hand them to `store` in batches.

    `tokens` comes from facts.tokenise; of it the shard has samples.share. Prompts of equal length and one of
    samples.blocks share a batch, so there is no padding and no mask. The first batch is verified (see `verify`); a
    shard without prompts verifies the first one, and stores no row. `answer` says what the target is:

    - `first_token`: the accepted first token that the model likes best;
    - `all_tokens`: all tokens of the first accepted object, each read with the earlier ones in the prompt
      (teacher-forced); log-probabilities are summed, the rank is the worst of theirs;
    - `argmax`: the model's own most likely token.

    Stored are tensors on the CPU with one row for each prompt (and, with all_tokens, answer token), model dtype
    unless said otherwise; per layer l:

    - `l.resid_pre` [n d_model], before attention; `l.resid_mid` [n d_model], before the FFN;
    - `l.head_in` [n heads head_dim], input of the output projection; or `l.attention_out` [n d_model] where the
      attention block is one component;
    - MoE: `l.router_logits` [n experts], `l.expert_ids` int16 [n k] and `l.expert_weights` [n k] as used,
      `l.expert_acts` [n k d_expert], `l.expert_load` and `l.subject_load` int16 [n experts] (positions of the prompt,
      and of its subject, that chose each expert), `l.router_margin` float32 [n 2] (see `margins`; at the readout
      position, and the smallest of all), `l.shared.i.acts` [n d_shared], `l.shared.i.gate` [n];
    - dense FFN: `l.acts` [n d_ffn]; an FFN that is one component: `l.whole.i.out` [n d_model];
    - `l.attention_scale`, `l.experts_scale`, `l.dense_scale`, `l.shared.i.scale`, `l.whole.i.scale` float32 [n]:
      the product of the scales of the post-norms that this part passes, where there are any;

    and `resid_final` [n d_model], `norm_scale` float32 [n], `prompt_id` int32 [n], `step` int16 [n].

    Returns the shard's `tokens` with target_id (int32, the first answer token), target_ids (list of all), log_prob
    (float32, nats) and rank (int32) in the clean run; and the largest relative error of each verified equation.
    """
    own = blocks(tokens, batch_size)[shard::shards]
    stored, taken = (None, own) if own else (0, [np.arange(1)])
    pieces = [rows(tokens.iloc[block], answer) for block in taken]
    errors: dict[str, float] = {}
    scores: list[tuple[Tensor, ...]] = []
    done = 0
    for answers, batch in ((a, b) for a in pieces for b in batches(a["length"].to_numpy(), batch_size)):
        ids = token_tensor(answers, batch, input_device(model))
        found, logits = record(model, parts, ids)
        if not errors:
            errors = verify(model, parts, ids, found, logits)
            logging.info("verified on %d prompts: %s", len(batch), errors)
        spans = torch.tensor(answers[["subject_start", "subject_end"]].to_numpy()[batch], device=ids.device)
        found |= _subject_loads(parts, found, spans)
        kept = {name: tensor.cpu() for name, tensor in found.items() if not name.endswith(NOT_STORED)}
        for name in ("prompt_id", "step"):
            kept[name] = torch.tensor(answers[name].to_numpy()[batch])
        store(done, {name: tensor[:stored] for name, tensor in kept.items()})
        done += len(batch)
        scores.append(_clean_scores(logits, [answers["accepted_ids"][row] for row in batch]))
    target, log_prob, rank = (torch.cat(column).cpu().numpy() for column in zip(*scores, strict=True))
    columns = {"target": target.astype("int32"), "log_prob": log_prob, "rank": rank}
    scored = pd.concat(pieces)[["prompt_id", "step"]].assign(**columns)
    return _per_prompt(tokens.iloc[np.concatenate(taken)], scored)[:stored], errors


def in_memory(
    model: PreTrainedModel, parts: Anatomy, tokens: pd.DataFrame, batch_size: int, answer: str = "first_token"
) -> tuple[dict[str, Tensor], pd.DataFrame, dict[str, float]]:
    """`capture` for small runs, as in a notebook: its tensors, sorted by prompt and answer token, and its results."""
    pieces: dict[str, list[Tensor]] = {}

    def store(row: int, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            pieces.setdefault(name, []).append(tensor)

    table, errors = capture(model, parts, tokens, batch_size, store, answer)
    tensors = {name: torch.cat(parts) for name, parts in pieces.items()}
    order = torch.from_numpy(np.lexsort([tensors["step"].numpy(), tensors["prompt_id"].numpy()]))
    return {name: tensor[order] for name, tensor in tensors.items()}, table, errors


def rows(tokens: pd.DataFrame, answer: str) -> pd.DataFrame:
    """What runs forward, a block in this order: one row for each prompt (or answer token), with the targets it accepts.

    Columns: prompt_id, step, token_ids, length, subject_start, subject_end, accepted_ids (empty: whatever the model
    likes best). `answer` as in `capture`.
    """
    if answer == "all_tokens":
        found = steps(tokens.assign(target_ids=tokens["answer_ids"].str[0]))
        found = found.assign(accepted_ids=[[target] for target in found["target_id"]])
    else:
        accepted = [[]] * len(tokens) if answer == "argmax" else tokens["accepted_ids"]
        found = tokens[["prompt_id", "token_ids", "length"]].assign(step=np.int16(0), accepted_ids=accepted)
    spans = tokens.set_index("prompt_id").reindex(columns=["subject_start", "subject_end"], fill_value=-1)
    found = found.join(spans, on="prompt_id")
    return found.sort_values(["length", "prompt_id", "step"], kind="stable").reset_index(drop=True)


def batches(lengths: Int[np.ndarray, " n"], batch_size: int) -> Iterator[Int[np.ndarray, " b"]]:
    """Row numbers in batches of equal token count, at most `batch_size` each."""
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its token ids: in memory, if its embedding lies on disk."""
    weight = cast(Tensor, cast(nn.Module, model.get_input_embeddings()).weight)
    return torch.device("cpu") if weight.is_meta else weight.device


def token_tensor(tokens: pd.DataFrame, rows: Int[np.ndarray, " b"], device: torch.device) -> Int[Tensor, "b length"]:
    """The token ids of prompts of equal length."""
    return torch.tensor(np.stack(tokens["token_ids"].to_numpy()[rows]), dtype=torch.long, device=device)


def record(
    model: PreTrainedModel, parts: Anatomy, ids: Int[Tensor, "b length"], every_position: bool = False
) -> tuple[dict[str, Tensor], Float[Tensor, "b vocab"]]:
    """One forward pass: the parts named in `capture` but subject_load, those in NOT_STORED, and the readout logits.

    With `every_position` the parts have b * length rows (position fastest) in place of b, as if each position were
    the readout position of a prompt of its own; a row's expert_load and router_margin are those of its position alone.
    """
    found: dict[str, Tensor] = {}
    n = ids.numel() if every_position else len(ids)
    with ExitStack() as hooks:
        choices = hooks.enter_context(_Choices())
        for layer in parts.layers:
            hooks.enter_context(_tap_layer(layer, n, found, choices))
        hooks.enter_context(on_input(parts.final_norm.module, lambda x: found.update(resid_final=_last(x, n))))
        logits = readout_logits(model, ids)
    found["norm_scale"] = parts.final_norm.scale(found["resid_final"])
    for layer in parts.layers:
        at = f"{layer.index}."
        if layer.experts is not None:
            hidden, chosen = found.pop(f"{at}expert_in"), found[f"{at}expert_ids"]
            found[f"{at}expert_acts"] = expert_activations(layer.experts.module, hidden, chosen.long())
        for i in range(len(layer.shared)):
            acts = found[f"{at}shared.{i}.acts"]
            logit = found.pop(f"{at}shared.{i}.gate_logit", None)
            gate = acts.new_ones(len(acts)) if logit is None else logit.sigmoid().squeeze(-1)
            found[f"{at}shared.{i}.gate"] = gate
        for name, path in paths(layer):
            if path.norms:
                found[at + name] = reduce(torch.mul, (n.scale(found[f"{at}norm.{id(n)}"]) for n in path.norms))
        if layer.middle is None:
            here = of_layer(found, layer)
            middle = here["resid_pre"] + attention_output(layer, here)
            found[f"{at}resid_mid"] = middle.to(here["resid_pre"].dtype)
    return {name: tensor for name, tensor in found.items() if ".norm." not in name}, logits


def readout_logits(model: PreTrainedModel, ids: Int[Tensor, "b length"]) -> Float[Tensor, "b vocab"]:
    """Logits at the readout position, the last one."""
    return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def verify(
    model: PreTrainedModel,
    parts: Anatomy,
    ids: Int[Tensor, "b length"],
    found: Mapping[str, Tensor],
    logits: Float[Tensor, "b vocab"],
) -> dict[str, float]:
    """Check that the recorded parts add up; the largest relative error of each equation over the layers.

    An error is relative to the largest entry of what is compared; a few rounding errors of the residual stream that
    it is added to are allowed for, entry by entry, since some models have a few very large ones. Raises AnatomyError
    with the equation, the layer and the size of the error.
    """
    if not torch.equal(readout_logits(model, ids), logits):
        raise AnatomyError("the forward pass changes when it is recorded; refused, since nothing below would hold")
    # Of the weights: some models keep their residual stream in float32 whatever they are cast to.
    dtype = cast(Tensor, parts.unembedding.weight).dtype
    limit, rounding = TOLERANCE[dtype], 4 * torch.finfo(dtype).eps
    errors: dict[str, float] = {}

    def check(equation: str, where: str, parts_sum: Tensor, whole: Tensor, added_to: Tensor | None = None) -> None:
        parts_sum, whole = parts_sum.float(), whole.to(parts_sum.device).float()
        size: float | Tensor = float(whole.abs().max().clamp_min(1e-30))
        if added_to is not None:
            size = size + rounding / limit * added_to.to(parts_sum.device).abs()
        error = float(((parts_sum - whole).abs() / size).max())
        if not error <= limit:
            raise AnatomyError(f"{where}: {equation} does not hold: relative error {error:.2e}, allowed {limit:.0e}")
        errors[equation] = max(error, errors.get(equation, 0.0))

    for layer in parts.layers:
        here, where = of_layer(found, layer), f"layer {layer.index}"
        before, middle, after = (here[name].float() for name in ("resid_pre", "resid_mid", "resid_post"))
        if layer.middle is not None:
            attention = attention_output(layer, here)
            check(
                "sum of heads = what attention adds to the residual stream", where, attention, middle - before, middle
            )
        equation = "sum of experts (or neurons) = what the FFN adds to the residual stream"
        check(equation, where, ffn_output(layer, here), after - middle, after)
        following = found.get(f"{layer.index + 1}.resid_pre", found["resid_final"])
        check("a layer's output = the next one's input", where, here["resid_post"], following)
    final = parts.final_norm
    state = found["resid_final"].float()
    centred = state - state.mean(-1, keepdim=True) if final.centred else state
    scaled = centred * found["norm_scale"].unsqueeze(-1) * final.gain.float() + final.bias.float()
    raw = parts.unembedding(scaled.to(dtype)).float() * parts.logit_scale
    capped = parts.softcap * torch.tanh(raw / parts.softcap) if parts.softcap else raw
    check("unembedding of the scaled final state = logits", "readout", capped, logits)
    return errors


def margins(scores: Float[Tensor, "*n experts"], k: int) -> Float[Tensor, "*n"]:
    """How clear the choice of experts is: (last chosen - first rejected score) / the larger size of the two.

    `scores` are those that the router's top-k really saw (with bias, after group limits). Below the relative
    precision of a dtype (2^-8 for bfloat16) rounding of the scores alone can change the choice; rounding of what the
    router reads can turn clearer ones, and so can a near tie between groups of experts, which is not seen. A rejected
    score of -inf gives inf.
    """
    top = scores.float().topk(min(k + 1, scores.shape[-1]), dim=-1).values
    if top.shape[-1] <= k:
        return torch.full(scores.shape[:-1], torch.inf, device=scores.device)
    last, first = top[..., k - 1], top[..., k]
    size = torch.maximum(last.abs(), first.abs()).clamp_min(1e-30)
    return torch.where(first.isinf(), torch.inf, (last - first) / size)


def _per_prompt(tokens: pd.DataFrame, scored: pd.DataFrame) -> pd.DataFrame:
    """Scores of rows joined to their prompts: log-probabilities summed, the worst rank."""
    of_prompt = scored.sort_values(["prompt_id", "step"]).groupby("prompt_id")
    columns = pd.DataFrame(
        {
            "target_id": of_prompt["target"].first().astype("int32"),
            "target_ids": of_prompt["target"].agg(list),
            "log_prob": of_prompt["log_prob"].sum().astype("float32"),
            "rank": of_prompt["rank"].max().astype("int32"),
        }
    )
    return tokens.join(columns, on="prompt_id").sort_values("prompt_id", ignore_index=True)


def of_layer(found: Mapping[str, Tensor], layer: Layer) -> dict[str, Tensor]:
    """The tensors of a layer, by their names without it."""
    at = f"{layer.index}."
    return {name.removeprefix(at): tensor for name, tensor in found.items() if name.startswith(at)}


def paths(layer: Layer) -> Iterator[tuple[str, Path]]:
    """Each part of a layer: the name of its post-norms' scale, and its path."""
    if layer.attention is not None:
        yield "attention_scale", layer.attention.path
    if layer.experts is not None:
        yield "experts_scale", layer.experts.path
    if layer.dense is not None:
        yield "dense_scale", layer.dense.path
    yield from ((f"shared.{i}.scale", shared.path) for i, shared in enumerate(layer.shared))
    yield from ((f"whole.{i}.scale", path) for i, (_, path) in enumerate(layer.whole_ffn))


def _clean_scores(
    logits: Float[Tensor, "b vocab"], accepted: Sequence[Sequence[int]]
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"], Int[Tensor, " b"]]:
    """Target, log-probability and rank of each prompt: of the accepted tokens (or all) the preferred one."""
    log_probs = logits.float().log_softmax(-1)
    pairs = zip(log_probs, accepted, strict=True)
    targets = [ids[int(row[list(ids)].argmax())] if len(ids) else int(row.argmax()) for row, ids in pairs]
    target = torch.tensor(targets, device=logits.device)
    return target, log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1), ranks(logits.float(), target)


def _subject_loads(
    parts: Anatomy, found: Mapping[str, Tensor], spans: Int[Tensor, "b 2"]
) -> dict[str, Int[Tensor, "b experts"]]:
    """`l.subject_load` of each MoE layer; `spans` are subject_start and subject_end."""
    loads = {}
    for layer in parts.layers:
        if layer.experts is not None:
            chosen = found[f"{layer.index}.expert_choices"]
            start, end = spans.to(chosen.device).T.unsqueeze(-1)
            position = torch.arange(chosen.shape[1], device=chosen.device)
            inside = ((position >= start) & (position < end)).to(torch.int16).unsqueeze(-1)
            loads[f"{layer.index}.subject_load"] = _load(chosen, layer.n_experts, inside)
    return loads


def _load(
    chosen: Int[Tensor, "b length k"], n_experts: int, counted: Int[Tensor, "b length 1"]
) -> Int[Tensor, "b experts"]:
    """How many of the counted positions chose each expert, int16."""
    load = torch.zeros(len(chosen), n_experts, dtype=torch.int16, device=chosen.device)
    return load.scatter_add_(1, chosen.flatten(1).long(), counted.expand_as(chosen).flatten(1))


class _Choices(TorchFunctionMode):
    """Remembers what each torch.topk of the running forward pass chose from, until the experts are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, Tensor.topk):
            self.seen.append((args[0], result[1]))
        return result

    def scores_of(self, ids: Int[Tensor, "tokens k"]) -> Float[Tensor, "tokens experts"] | None:
        """What these experts were chosen from; None if no top-k chose them."""
        found = None
        wanted = ids.sort(-1).values
        for scores, chosen in reversed(self.seen):
            flat = chosen.flatten(0, -2)
            if flat.shape == wanted.shape and torch.equal(flat.sort(-1).values.to(wanted.dtype), wanted):
                found = scores.flatten(0, -2)
                break
        self.seen.clear()
        return found


@contextmanager
def _tap_layer(layer: Layer, batch: int, found: dict[str, Tensor], choices: _Choices) -> Iterator[None]:
    at = f"{layer.index}."

    def last(name: str, x: Tensor) -> None:
        found[at + name] = _last(x, batch)

    def experts_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, chosen, weights = experts_arguments(module, args, kwargs)
        last("expert_in", hidden)
        last("expert_weights", weights)
        scores = choices.scores_of(chosen.flatten(0, -2))
        if scores is not None:
            margin = margins(scores, chosen.shape[-1]).reshape(batch, -1)
            found[f"{at}router_margin"] = torch.stack([margin[:, -1], margin.min(1).values], 1)
        chosen = chosen.reshape(batch, -1, chosen.shape[-1]).to(torch.int16)
        found[f"{at}expert_ids"], found[f"{at}expert_choices"] = chosen[:, -1].clone(), chosen
        found[f"{at}expert_load"] = _load(chosen, layer.n_experts, torch.ones_like(chosen[..., :1]))

    def heads(x: Tensor) -> None:
        found[f"{at}head_in"] = _last(x, batch).unflatten(-1, (layer.n_heads, -1))

    inputs: list[tuple[nn.Module, Callable[[Tensor], None]]] = [(layer.block, partial(last, "resid_pre"))]
    outputs = [(layer.block, partial(last, "resid_post"))]
    if layer.middle is not None:
        inputs.append((layer.middle, partial(last, "resid_mid")))
    if layer.attention is not None:
        if layer.attention.out_proj is not None:
            inputs.append((layer.attention.out_proj, heads))
        else:
            outputs.append((layer.attention.module, partial(last, "attention_out")))
    if layer.dense is not None:
        inputs.append((layer.dense.down, partial(last, "acts")))
    for i, shared in enumerate(layer.shared):
        inputs.append((shared.down, partial(last, f"shared.{i}.acts")))
        if shared.gate is not None:
            outputs.append((shared.gate, partial(last, f"shared.{i}.gate_logit")))
    for i, (module, _) in enumerate(layer.whole_ffn):
        outputs.append((module, partial(last, f"whole.{i}.out")))
    norms = {id(norm): norm for _, path in paths(layer) for norm in path.norms}
    inputs += [(norm.module, partial(last, f"norm.{key}")) for key, norm in norms.items()]
    with ExitStack() as hooks:
        if layer.experts is not None:
            handle = layer.experts.module.register_forward_pre_hook(experts_input, with_kwargs=True)
            hooks.callback(handle.remove)
            if layer.experts.router is not None:
                logits = partial(_last_of_width, layer.n_experts, partial(last, "router_logits"))
                hooks.callback(layer.experts.router.register_forward_hook(logits).remove)
        for module, see in inputs:
            hooks.enter_context(on_input(module, see))
        for module, see in outputs:
            hooks.enter_context(on_output(module, see))
        yield


def _last(x: Float[Tensor, "*tokens width"], n: int) -> Float[Tensor, "n width"]:
    """The last position of each of n rows, whether or not batch and position are flattened into one dimension."""
    # A copy: a view would keep all positions in memory, and change with what the model does in place.
    return x.reshape(n, -1, x.shape[-1])[:, -1].clone()


def _last_of_width(width: int, see: Callable[[Tensor], None], module: nn.Module, args: Any, output: Any) -> None:
    outputs = output if isinstance(output, tuple) else (output,)
    see(next(x for x in outputs if isinstance(x, Tensor) and x.shape[-1] == width and x.is_floating_point()))


@contextmanager
def on_input(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show the first tensor of numbers that each call of `module` gets to `see`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def on_output(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show the output of each call of `module`, or the first of several, to `see`."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        see(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
