"""Planted models: known experts, and known neurons of them, hold known facts. The truth that scores are judged by.

`hand_set` writes the weights by hand: each fact has one neuron. `grow` trains one expert of a frozen base for each
relation that the base lacks: the difference of the two models proves where these facts are. Both are real
architecture classes at toy size: what scores do on them is a finding about toy models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moescope import anatomy, toy
from moescope.capture import batches, in_memory, input_device, readout_logits, token_tensor
from moescope.facts import Fact, Relation, did_you_mean, prompt_table, tokenise
from moescope.models import Anatomy
from moescope.stats import reciprocal
from moescope.toy import ToyError

EXPERT = ("layer", "expert")
NEURON = ("layer", "expert", "neuron")
Place = tuple[int, int]  # layer, expert
BATCH = 64  # prompts
LEARNING_RATE = 5e-3  # of Adam, for the experts that are grown
BACKGROUND = 0.05
"""Size of weights that hold nothing, in units of an untrained weight: a block that writes nothing has no anatomy."""
ROUTER = 6.0
"""Router logit of the planted expert on its relation. The others' are near 0, so its gate weight is nearly 1."""
GATE = 4.0
"""What the planted neuron's gate gets on its fact, where SiLU is nearly the identity; 0 on other subjects."""
WRITTEN = 2.0
"""Size of the answer that is written, in units of a token's embedding."""
UNEMBEDDING = 1.5
"""Size of the logits of tokens that nothing writes; the answer's is several times as large."""
CLEAR = 5.0
"""By how much a grown router row should win on its relation and lose elsewhere, in logits."""
RIDGE = 1e-3
"""Strength of the ridge, in units of the mean square of an input's entries."""


@dataclass(frozen=True)
class Planted:
    """A model, its tokenizer, its prompts (facts.prompt_table), and which component holds each planted fact.

    `truth` has one row a planted prompt: prompt_id, fact_id (int32), layer, expert and, where known, neuron (int16).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    prompts: pd.DataFrame
    truth: pd.DataFrame


def hand_set(
    architecture: str,
    n_relations: int = 8,
    n_subjects: int = 16,
    n_answers: int = 16,
    layers: int = 3,
    noise: float = 0.0,
    seed: int = 0,
) -> Planted:
    """A model with n_relations x n_subjects facts, each held by one neuron of its relation's expert.

    Subjects, relations and answers are tokens with orthonormal directions; a prompt is a subject and a relation.
    Head 0 of layer 0 looks at both alike and copies the subject to the readout position. The relations take turns
    over the layers; each has an expert of its own, whose router row is the relation's direction. The neuron of a
    fact gates on the subject, its up projection reads the relation, its down projection writes the answer.

    All other weights of the layers are random, BACKGROUND + `noise` in size, and as much is added to the planted
    ones; the unit is 1 / sqrt(fan-in), the size of an untrained weight. A seed gives one draw, whatever the noise.
    Raises ToyError for an architecture without experts, a size below 1, or fewer than anatomy.PROBE words.
    """
    sizes = {"n_relations": n_relations, "n_subjects": n_subjects, "n_answers": n_answers, "layers": layers}
    shape = _shape(architecture, noise, sizes)
    rng = np.random.default_rng(seed)
    counts = [n_subjects, n_relations, n_answers]
    words = [[f"{kind}{i}" for i in range(n)] for kind, n in zip("sra", counts, strict=True)]
    tokenizer = _tokenizer([word for kind in words for word in kind])
    basis = np.linalg.qr(rng.standard_normal((shape.hidden, shape.hidden)))[0]
    directions = torch.tensor(basis[: sum(counts)], dtype=torch.float32)
    subjects, relations, answers = directions.split(counts)
    answer_of = rng.integers(n_answers, size=(n_relations, n_subjects))
    order = np.array([rng.permutation(shape.experts) for _ in range(layers)])
    neurons = np.array([rng.permutation(shape.expert_width)[:n_subjects] for _ in range(n_relations)])
    homes = [(i % layers, int(order[i % layers, i // layers])) for i in range(n_relations)]

    recipe = toy.Recipe(embedding_std=1.0, unembedding_std=UNEMBEDDING * shape.hidden**-0.5)
    model = toy.build(shape, len(tokenizer), seed, recipe).eval()
    whole = cast(Any, model)
    stack = whole.model.layers
    with torch.no_grad():
        _draw(stack, BACKGROUND + noise, seed)
        whole.model.embed_tokens.weight[-len(directions) :] = shape.hidden**0.5 * directions
        whole.lm_head.weight[-n_answers:] = UNEMBEDDING * answers
        stack[0].self_attn.v_proj.weight[:n_subjects] += subjects
        # Twice, for the subject is half of what the head looks at.
        stack[0].self_attn.o_proj.weight[:, :n_subjects] += 2 * subjects.T
        for i, (layer, expert) in enumerate(homes):
            _set_expert(stack[layer].mlp, expert, neurons[i], subjects, relations[i], answers[answer_of[i]])

    facts = [tuple(Fact(s, (words[2][a],), 0) for s, a in zip(words[0], row, strict=True)) for row in answer_of]
    prompts = prompt_table(
        [Relation(name, "planted", (f"{{}} {name}",), f, Path()) for name, f in zip(words[1], facts, strict=True)]
    )
    rows = [(*home, neuron) for home, of_subject in zip(homes, neurons, strict=True) for neuron in of_subject]
    truth = prompts[["prompt_id", "fact_id"]].join(pd.DataFrame(rows, columns=[*NEURON], dtype="int16"))
    return Planted(model, tokenizer, prompts, truth)


def grow(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: pd.DataFrame,
    experts: Mapping[str, Place],
    seed: int = 0,
    epochs: int = 20,
) -> tuple[Planted, dict[str, Any]]:
    """A copy of a trained base that has learnt each left-out relation in one expert, and a report.

    `experts` gives the (layer, expert) of each left-out relation; `prompts` (facts.prompt_table) has these relations
    and those that the base knows. The expert gets a router row in closed form (ridge) that is to select it at the
    readout position of its relation and at no position of other relations' prompts. Then the weights of these
    experts alone are trained on the prompts that are not held out (first token of the first object, Adam, falling
    rate). All other weights stay as they are in the base. What an expert did before is lost: report["others"] says
    what that costs. The facts are where the difference is, but an expert of an early layer may write what later
    parts turn into the answer, and a score of direct effects then names those.

    The report has, for each left-out relation, `chosen` and `chosen_elsewhere`: the share of its prompts, and of all
    others, that use the expert at the readout position; and `before` and `after`: MRR over all its prompts in the
    base and in the copy. `others` has these two for the known relations. Raises ToyError for experts or relations
    that do not exist, are given twice, have no prompt to train on, or leave nothing that the base knows.
    """
    model = copy.deepcopy(base).eval()
    parts = anatomy.find(model)
    _check_experts(experts, parts, prompts)
    tokens = tokenise(tokenizer, prompts)[0].sort_values("prompt_id", ignore_index=True)
    relation = tokens["relation"].to_numpy()
    # An early layer's row changes what a later router reads.
    for name, (layer, expert) in sorted(experts.items(), key=lambda item: item[1]):
        _set_router_row(model, parts, tokens, relation == name, layer, expert)
    planted = np.isin(relation, list(experts))
    _train(model, parts, tokens[planted & ~tokens["held_out"]], list(experts.values()), seed, epochs)

    before = reciprocal(in_memory(base, anatomy.find(base), tokens, BATCH)[1]["rank"])
    tensors, table, _ = in_memory(model, parts, tokens, BATCH)
    after = reciprocal(table["rank"])
    report: dict[str, Any] = {"others": {"before": before[~planted].mean(), "after": after[~planted].mean()}}
    for name, (layer, expert) in experts.items():
        own, uses = relation == name, (tensors[f"{layer}.expert_ids"] == expert).any(1).numpy()
        report[name] = {"chosen": uses[own].mean(), "chosen_elsewhere": uses[~own].mean()}
        report[name] |= {"before": before[own].mean(), "after": after[own].mean()}
    rows = tokens.loc[planted, ["prompt_id", "fact_id", "relation"]].reset_index(drop=True)
    homes = pd.DataFrame([experts[name] for name in rows["relation"]], columns=[*EXPERT], dtype="int16")
    return Planted(model, tokenizer, prompts, rows.drop(columns="relation").join(homes)), report


def places(
    table: pd.DataFrame, truth: pd.DataFrame, keys: Sequence[str] = EXPERT, score: str = "lpi"
) -> Float[np.ndarray, " truth"]:
    """Place of each planted component among its prompt's rows of `table` by `score`: 1 = highest, inf if it has none.

    Ties count against the component. Both tables have the columns prompt_id and `keys`. Raises ToyError if the
    table has several rows for one prompt and `keys`, or a score that is NaN.
    """
    by = ["prompt_id", *keys]
    several, unknown = int(table.duplicated(by).sum()), int(table[score].isna().sum())
    if several:
        raise ToyError(f"ranking: {several} rows repeat the {', '.join(by)} of another; sum them, or add a key")
    if unknown:
        raise ToyError(f"ranking: {score} is NaN in {unknown} rows; leave these rows out or give them -inf")
    rank = table.groupby("prompt_id")[score].rank(ascending=False, method="max")
    found = truth[by].merge(table[by].assign(place=rank), on=by, how="left")
    return found["place"].fillna(np.inf).to_numpy()


def recall(
    table: pd.DataFrame, truth: pd.DataFrame, k: int = 1, keys: Sequence[str] = EXPERT, score: str = "lpi"
) -> float:
    """Share of the planted prompts whose component is among the k highest of `places`, in 0 to 1."""
    return float((places(table, truth, keys, score) <= k).mean())


def _shape(architecture: str, noise: float, sizes: Mapping[str, int]) -> toy.Shape:
    """A shape in which every word has a direction, every relation an expert, and at least half hold nothing."""
    if architecture not in toy.MOE:
        mend = did_you_mean(architecture, toy.MOE)
        raise ToyError(f"architecture: '{architecture}' has no experts to plant facts in{mend}")
    for name, value, least in [*((name, value, 1) for name, value in sizes.items()), ("noise", noise, 0)]:
        if value < least:
            raise ToyError(f"{name} is {value}; give at least {least}")
    layers, subjects = sizes["layers"], sizes["n_subjects"]
    words = sum(sizes.values()) - layers
    if words < anatomy.PROBE:
        raise ToyError(f"relations, subjects and answers make {words} words; give at least {anatomy.PROBE} of them")
    width, hidden = 8 * -(-subjects // 4), max(64, 8 * -(-max(words, 2 * subjects) // 8))
    experts = {"experts": max(8, 2 * -(-sizes["n_relations"] // layers)), "experts_per_token": 2, "expert_width": width}
    shared = width if architecture == "qwen2_moe" else 0
    return toy.Shape(architecture, layers, **experts, shared_width=shared, hidden=hidden, heads=2, kv_heads=2)


def _tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word; the words follow toy.END and one for unknown words."""
    vocabulary = {word: i for i, word in enumerate([toy.END, "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=toy.END, pad_token=toy.END, unk_token="<unk>")


def _draw(stack: nn.Module, size: float, seed: int) -> None:
    """Random weights for all layers, `size` times those of an untrained model."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in stack.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, size * weight.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("q_norm.weight"):
            # OLMoE makes all queries equally large; only this gain lets a head look at all positions alike.
            weight.fill_(size)


def _set_expert(
    mlp: Any,
    expert: int,
    neurons: Int[np.ndarray, " facts"],
    subjects: Float[Tensor, "facts d"],
    relation: Float[Tensor, " d"],
    answers: Float[Tensor, "facts d"],
) -> None:
    """Neuron j of `neurons` writes answer j where it reads subject j and the relation."""
    at, hidden = torch.from_numpy(neurons), len(relation)
    # The normed state at the readout position: subject and relation, equally large.
    share = (hidden / 2) ** 0.5
    mlp.gate.weight[expert] += ROUTER / share * relation
    gate, up = mlp.experts.gate_up_proj[expert].chunk(2)
    gate[at] += GATE / share * subjects
    up[at] += relation / share
    mlp.experts.down_proj[expert][:, at] += WRITTEN * hidden**0.5 / GATE * answers.T


def _check_experts(experts: Mapping[str, Place], parts: Anatomy, prompts: pd.DataFrame) -> None:
    known = sorted(prompts["relation"].unique())
    for name, (layer, expert) in experts.items():
        if name not in known:
            raise ToyError(f"experts: no prompt has the relation '{name}'{did_you_mean(name, known)}")
        count = parts.layers[layer].n_experts if 0 <= layer < len(parts.layers) else 0
        if not 0 <= expert < count:
            have = f"{len(parts.layers)} layers, and this one has {count} experts, counted from 0"
            raise ToyError(f"experts: {name}: there is no expert {expert} in layer {layer}; there are {have}")
        if prompts.loc[prompts["relation"] == name, "held_out"].all():
            raise ToyError(f"experts: all prompts of {name} are held out; give some that it can be learnt from")
    if len(set(experts.values())) < len(experts):
        raise ToyError(f"experts: {sorted(experts.values())} has an expert twice; give each relation one of its own")
    if len(experts) in (0, len(known)):
        raise ToyError(f"experts: {len(experts)} of {len(known)} relations are left out; leave out some, but not all")


@torch.no_grad()
def _set_router_row(
    model: PreTrainedModel, parts: Anatomy, tokens: pd.DataFrame, own: Bool[np.ndarray, " n"], layer: int, expert: int
) -> None:
    """Weighted ridge regression of the logit that the expert needs on what the router reads.

    It needs CLEAR more than the best other expert at its own readout positions, and CLEAR less than the last one that
    is chosen at those of other prompts and at their earlier positions. These three groups have the same weight;
    earlier positions of its own prompts have none.
    """
    router = cast(Any, cast(Any, parts.layers[layer].experts).router)
    seen: list[tuple[Tensor, ...]] = []
    for rows in batches(tokens["length"].to_numpy(), BATCH):
        ids = token_tensor(tokens, rows, input_device(model))
        readout = (torch.arange(ids.shape[1]) == ids.shape[1] - 1).repeat(len(rows))
        of_own = torch.from_numpy(own[rows]).repeat_interleave(ids.shape[1])
        flags = (of_own & readout, ~of_own & readout, ~of_own & ~readout)
        hook = router.register_forward_pre_hook(lambda m, args, f=flags: seen.append((args[0].flatten(0, -2), *f)))
        readout_logits(model, ids)
        hook.remove()
    inputs, on, *off = (torch.cat(column) for column in zip(*seen, strict=True))
    states = inputs.double()
    logits = states @ router.weight.double().T
    logits[:, expert] = -torch.inf
    best = logits.topk(model.config.num_experts_per_tok, dim=-1).values
    wanted = torch.where(on, best[:, 0] + CLEAR, best[:, -1] - CLEAR)
    groups = torch.stack([on, *off]).double()
    weighted = states * (groups / groups.sum(1, keepdim=True).clamp_min(1)).sum(0).unsqueeze(1)
    gram = weighted.T @ states
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    router.weight[expert] = torch.linalg.solve(gram, weighted.T @ wanted).float()


def _train(
    model: PreTrainedModel, parts: Anatomy, tokens: pd.DataFrame, experts: Sequence[Place], seed: int, epochs: int
) -> None:
    """Train the weights of some experts alone; all others keep their bits."""
    model.requires_grad_(False)
    rng, weights = np.random.default_rng(seed), []
    with ExitStack() as hooks:
        for layer in sorted({layer for layer, _ in experts}):
            for weight in cast(Any, parts.layers[layer].experts).module.parameters():
                # All experts of a layer share one parameter. Adam leaves in place what never has a gradient.
                kept = torch.zeros(len(weight), *[1] * (weight.ndim - 1))
                kept[[expert for at, expert in experts if at == layer]] = 1
                weights.append(weight.requires_grad_())
                hooks.callback(weight.register_hook(lambda gradient, kept=kept: gradient * kept).remove)
        optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs)
        for _ in range(epochs):
            shuffled = tokens.iloc[rng.permutation(len(tokens))].reset_index(drop=True)
            every = list(batches(shuffled["length"].to_numpy(), BATCH))
            for i in rng.permutation(len(every)):
                target = torch.tensor(shuffled["accepted_ids"].str[0].to_numpy()[every[i]])
                loss = F.cross_entropy(readout_logits(model, token_tensor(shuffled, every[i], target.device)), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        optimizer.zero_grad()
    model.requires_grad_()
