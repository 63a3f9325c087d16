"""Toy models: six real architecture classes at toy size, trained on the facts within half a minute each.

A pair (MoE, dense) shares data, recipe, seed and the FFN parameters that are active per token. The
recipe puts the facts into the FFN blocks, where the project looks for them, and `train` checks that
it did. Words as in method.md, section 1; ranks as in section 3.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from moescope.artifacts import sentences_of_the_disk, write_json
from moescope.facts import did_you_mean, tokenise

MOE = ("qwen2_moe", "olmoe", "mixtral")
DENSE = ("qwen2", "llama", "mistral")
END = "<|endoftext|>"
# With every FFN block removed, a model that still ranks the targets this well keeps its facts elsewhere.
MAX_MRR_WITHOUT_FFN = {**dict.fromkeys(MOE, 0.25), **dict.fromkeys(DENSE, 0.5)}


class ToyError(ValueError):
    """A toy model that cannot be made, or that would be about nothing: one sentence with the mend."""


@dataclass(frozen=True)
class Shape:
    """Size of a toy model. Widths are neurons; an MoE layer's active width is k x expert + shared width."""

    architecture: str
    layers: int
    ffn_width: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    shared_width: int = 0
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 1

    @property
    def active_width(self) -> int:
        """FFN neurons that one token uses in one layer."""
        return self.ffn_width + self.experts_per_token * self.expert_width + self.shared_width


@dataclass(frozen=True)
class Recipe:
    """Constants of training, the same for MoE and dense.

    The initialisation is what moves the facts into the FFNs: the library's own (std 0.02 everywhere)
    leaves a tiny model's facts in embeddings and attention. Large embeddings hardly turn at the same
    learning rate, so that the answer has to be computed; FFNs start near nothing and learn fastest.
    """

    vocabulary: int = 2000  # entries: frequent words are one token, rare ones several
    epochs: int = 4
    batch: int = 64  # prompts of equal length
    learning_rate: float = 2.5e-3
    ffn_rate: float = 3.0  # x learning_rate: FFNs that learn faster than the rest get the facts
    embedding_rate: float = 1.5  # x learning_rate
    beta1: float = 0.9  # decay per step of Adam's mean gradient
    beta2: float = 0.98  # and of its mean square
    weight_decay: float = 0.0
    clip: float = 1.0  # norm of the gradient
    warm_up: float = 0.05  # share of the steps
    decay: float = 0.3  # share of the steps, linear to 0; flat before that
    load_balancing: float = 0.01  # weight of the load-balancing loss
    embedding_std: float = 2.0
    unembedding_std: float = 0.35
    down_scale: float = 0.1  # x fan-in initialisation


def train_tokenizer(prompts: pd.DataFrame, vocabulary: int = Recipe.vocabulary) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocabulary` entries, trained on every prompt with each of its objects.

    No token is put in front of a text. A text's first word is tokenised like any other, so a subject
    has the same tokens wherever it stands. The same prompts give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    rows = zip(prompts["prompt"], prompts["objects"], strict=True)
    texts = [f"{prompt} {answer}" for prompt, objects in rows for answer in objects]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def config_of(shape: Shape, vocabulary: int) -> PreTrainedConfig:
    """The transformers configuration of a shape. Raises ToyError if the shape has no such model."""
    _check(shape)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.ffn_width or shape.expert_width,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if shape.architecture == "qwen2_moe":
        settings |= {"num_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token}
        settings |= {"moe_intermediate_size": shape.expert_width}
        settings |= {"shared_expert_intermediate_size": shape.shared_width}
    elif shape.architecture == "olmoe":
        settings |= {"num_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token}
    elif shape.architecture == "mixtral":
        settings |= {"num_local_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token}
    elif shape.architecture == "mistral":
        settings |= {"sliding_window": None}
    return AutoConfig.for_model(shape.architecture, **settings)


def build(shape: Shape, vocabulary: int, seed: int, recipe: Recipe = Recipe()) -> PreTrainedModel:
    """An untrained model in float32, its weights drawn from `seed` alone. Raises ToyError (see config_of)."""
    config = config_of(shape, vocabulary)
    # The library draws its own initial weights from the global generator, which must not be moved.
    with torch.random.fork_rng(devices=[]):
        implementation = {"experts_implementation": "grouped_mm"} if shape.architecture in MOE else {}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **implementation)
    generator = torch.Generator().manual_seed(seed)
    renormalised = shape.architecture == "mixtral" or getattr(config, "norm_topk_prob", True)
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or not weight.numel():
            continue
        std = weight.shape[-1] ** -0.5
        if name == "model.embed_tokens.weight":
            std = recipe.embedding_std
        elif name == "lm_head.weight":
            std = recipe.unembedding_std
        elif "down_proj" in name:
            std *= recipe.down_scale
            # The gates of a token's experts then sum to about k / E instead of 1.
            std *= 1 if renormalised or weight.ndim < 3 else shape.experts / shape.experts_per_token
        with torch.no_grad():
            weight.normal_(0, std, generator=generator)
    return model


def train(
    shape: Shape,
    prompts: pd.DataFrame,
    folder: Path,
    seed: int = 0,
    recipe: Recipe = Recipe(),
    name: str = "",
    checkpoints: Mapping[str, int] = {},
) -> dict[str, Any]:
    """Train a toy model and its tokenizer, check it, write the checkpoint into `folder` and return the report.

    `prompts` is facts.prompt_table: rows with held_out are evaluated, the others trained on. One thread
    is used: the same seed then gives the same bits. `checkpoints` names numbers of optimizer steps (0: untrained)
    after which the model is kept too; they are written into folder/checkpoints/<name> and change no bit of it.

    Raises ToyError if the shape has no model, if a checkpoint lies beyond the last step, if a layer has an
    expert that no prompt uses (unless the load is balanced less than the recipe's default says, where that is a
    finding), or if the facts are not in the FFNs; nothing is written then.
    """
    start = time.process_time()
    with _one_thread():
        tokenizer = train_tokenizer(prompts, recipe.vocabulary)
        tokens, dropped = tokenise(tokenizer, prompts)
        training, held_out = tokens[~tokens["held_out"]], tokens[tokens["held_out"]]
        pieces = tokens["object_tokens"].groupby(tokens["objects"].str[0]).max()
        model = build(shape, len(tokenizer), seed, recipe)
        losses, steps, states = _fit(model, training, seed, recipe, checkpoints)
        report = {
            "model": name or shape.architecture,
            "shape": asdict(shape),
            "active_ffn_width": shape.active_width,
            "seed": seed,
            "recipe": asdict(recipe),
            "prompts": {"training": len(training), "held_out": len(held_out), "dropped": len(dropped)},
            "vocabulary": len(tokenizer),
            "objects": {"all": len(pieces), "several_tokens": int((pieces > 1).sum())},
            "steps": steps,
            "loss_per_epoch": losses,
            **evaluate(model, training, held_out),
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
        }
        report["cpu_seconds"] = time.process_time() - start
    _check_trained(report)
    for checkpoint, state in states.items():
        _write(model, tokenizer, folder / "checkpoints" / checkpoint, state)
    _write(model, tokenizer, folder, report=report)
    return report


def evaluate(model: PreTrainedModel, training: pd.DataFrame, held_out: pd.DataFrame) -> dict[str, Any]:
    """HIT@10 and MRR on tokenised prompts, whole and with FFN parts removed; load of the experts.

    `load` has one entry a layer: the largest and the smallest expert's share of all routings, divided by
    the mean share.
    """
    layers = [layer.mlp for layer in model.model.layers]
    routed = [mlp.experts for mlp in layers if hasattr(mlp, "experts")]
    shared = [mlp.shared_expert for mlp in layers if getattr(model.config, "shared_expert_intermediate_size", 0)]
    with count_routings(routed) as counts:
        found = ranks(model, held_out)
    reciprocal = 1 / found
    without: dict[str, float | None] = {}
    for part, modules in {"ffn": layers, "routed": routed, "shared": shared}.items():
        if part == "routed" and not shared:
            without[part] = without["ffn"] if routed else None
            continue
        with removed(modules):
            without[part] = (1 / ranks(model, held_out)).mean().item() if modules else None
    return {
        "hit10": (found <= 10).double().mean().item(),
        "mrr": reciprocal.mean().item(),
        "mrr_training_template": (1 / ranks(model, training[training["template_id"] == 0])).mean().item(),
        "mrr_by_relation": pd.Series(reciprocal.numpy()).groupby(held_out["relation"].to_numpy()).mean().to_dict(),
        "mrr_without": without,
        "load": [{"max": (c.max() / c.mean()).item(), "min": (c.min() / c.mean()).item()} for c in counts],
    }


@torch.no_grad()
def ranks(model: PreTrainedModel, tokens: pd.DataFrame) -> Float[Tensor, " prompts"]:
    """Rank of the target at the readout position (1 = best; ties count against the model; float64).

    A prompt with several accepted objects gets the best of their ranks.
    """
    result = torch.zeros(len(tokens), dtype=torch.float64)
    most = tokens["accepted_ids"].str.len().max()
    for _, rows in tokens.reset_index(drop=True).groupby("length"):
        # Repeating an accepted token makes the lists equally long and leaves their best rank as it is.
        accepted = torch.tensor([(ids * most)[:most] for ids in rows["accepted_ids"]])
        logits = model(torch.tensor(rows["token_ids"].tolist()), logits_to_keep=1).logits[:, -1]
        best = logits.gather(1, accepted).max(dim=1, keepdim=True).values
        result[rows.index.tolist()] = (logits >= best).sum(dim=1).double()
    return result


@contextmanager
def removed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context, these modules give zeros."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(lambda *args: torch.zeros_like(args[-1])).remove)
        yield


@contextmanager
def count_routings(modules: Sequence[nn.Module]) -> Iterator[list[Float[Tensor, " experts"]]]:
    """Count, per module of routed experts, how often each expert is used within the context."""
    counts = [torch.zeros(len(cast(Tensor, module.down_proj)), dtype=torch.float64) for module in modules]

    def counter(count: Float[Tensor, " experts"]) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            count.add_(torch.bincount(args[1].flatten(), minlength=len(count)))

        return add

    with ExitStack() as stack:
        for module, count in zip(modules, counts, strict=True):
            stack.callback(module.register_forward_pre_hook(counter(count)).remove)
        yield counts


def load_balancing(logits: Float[Tensor, "layer token expert"], k: int) -> Float[Tensor, ""]:
    """The load-balancing loss of the Switch Transformer (arXiv 2101.03961, eq. 4-6), mean over layers.

    1 when balanced. The library's own pools the layers first, which lets one layer's dead experts
    hide behind another layer's busy ones.
    """
    probabilities = logits.softmax(-1)
    experts = logits.shape[-1]
    used = torch.zeros_like(logits).scatter_(-1, logits.topk(k, dim=-1).indices, 1.0)
    return experts / k * (used.mean(1) * probabilities.mean(1)).sum(-1).mean()


def _fit(
    model: PreTrainedModel, training: pd.DataFrame, seed: int, recipe: Recipe, checkpoints: Mapping[str, int]
) -> tuple[list[float], int, dict[str, dict[str, Tensor]]]:
    """Train on the first token of the first object only, in batches of equal length.

    Gives the loss of each epoch, the number of steps, and the weights at each checkpoint.
    """
    groups: dict[str, list[nn.Parameter]] = {"ffn": [], "embedding": [], "rest": []}
    for name, weight in model.named_parameters():
        groups["ffn" if ".mlp." in name else "embedding" if "embed_tokens" in name else "rest"].append(weight)
    rates = {"ffn": recipe.ffn_rate, "embedding": recipe.embedding_rate, "rest": 1.0}
    optimizer = torch.optim.AdamW(
        [{"params": groups[g], "lr": recipe.learning_rate * rates[g]} for g in groups],
        betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    buckets = [
        (torch.tensor(rows["token_ids"].tolist()), torch.tensor(rows["accepted_ids"].str[0].tolist()))
        for _, rows in training.groupby("length")
    ]
    generator = torch.Generator().manual_seed(seed)
    epochs = [_batches([len(ids) for ids, _ in buckets], recipe.batch, generator) for _ in range(recipe.epochs)]
    total, k = sum(map(len, epochs)), getattr(model.config, "num_experts_per_tok", 0)
    for name, step in checkpoints.items():
        if not 0 <= step <= total:
            raise ToyError(
                f"checkpoint '{name}': step {step}, but training has {total} steps; give a step from 0 to {total}"
            )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (recipe.warm_up * total), (total - step) / (recipe.decay * total), 1)
    )
    losses, step, states = [], 0, dict[str, dict[str, Tensor]]()

    def keep() -> None:
        for name in [name for name, at in checkpoints.items() if at == step]:
            states[name] = {key: weight.clone() for key, weight in model.state_dict().items()}

    model.train()
    keep()
    for epoch in epochs:
        sum_of_losses, seen = 0.0, 0
        for bucket, rows in epoch:
            ids, targets = buckets[bucket][0][rows], buckets[bucket][1][rows]
            output = model.model(ids, use_cache=False, **({"output_router_logits": True} if k else {}))
            answer = F.cross_entropy(model.lm_head(output.last_hidden_state[:, -1]), targets)
            loss = answer
            if k:
                loss = loss + recipe.load_balancing * load_balancing(torch.stack(output.router_logits), k)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            step += 1
            keep()
            sum_of_losses += answer.item() * len(rows)
            seen += len(rows)
        losses.append(sum_of_losses / seen)
    model.eval()
    return losses, total, states


def _batches(sizes: Sequence[int], batch: int, generator: torch.Generator) -> list[tuple[int, Int[Tensor, " prompts"]]]:
    """One epoch in random order: (bucket, rows of it), at most `batch` rows each."""
    parts = [
        (bucket, rows)
        for bucket, size in enumerate(sizes)
        for rows in torch.randperm(size, generator=generator).split(batch)
    ]
    return [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(shape: Shape) -> None:
    name = shape.architecture
    if name not in MOE + DENSE:
        raise ToyError(f"architecture: '{name}' is not a toy architecture{did_you_mean(name, MOE + DENSE)}")
    widths = {"ffn_width", "experts", "experts_per_token", "expert_width", "shared_width"}
    needed = {"experts", "experts_per_token", "expert_width"} if name in MOE else {"ffn_width"}
    # A shared expert without neurons is none: such models differ from those with one in nothing else.
    optional = {"shared_width"} if name == "qwen2_moe" else set()
    for key, value in asdict(shape).items():
        if key in widths - needed - optional and value:
            raise ToyError(f"{name}: {key} is {value}, but {name} has none; take it out")
        least = 0 if key in widths - needed else 1
        if key != "architecture" and value < least:
            raise ToyError(f"{name}: {key} is {value}; give a number of at least {least}")
        if key in ("hidden", "expert_width") and value % 4:
            raise ToyError(f"{name}: {key} is {value}; the grouped experts need a multiple of 4")
    if shape.experts_per_token > shape.experts:
        raise ToyError(
            f"{name}: experts_per_token is {shape.experts_per_token}; give at most experts ({shape.experts})"
        )
    if shape.hidden % (2 * shape.heads) or shape.heads % shape.kv_heads:
        raise ToyError(
            f"{name}: hidden {shape.hidden}, heads {shape.heads}, kv_heads {shape.kv_heads} do not divide;"
            " make hidden a multiple of 2 x heads, and heads one of kv_heads"
        )


def _check_trained(report: Mapping[str, Any]) -> None:
    name, value = report["model"], report["mrr_without"]["ffn"]
    bound = MAX_MRR_WITHOUT_FFN[report["shape"]["architecture"]]
    if not value < bound:
        raise ToyError(
            f"toy model '{name}': with all FFN blocks removed its MRR is {value:.3f}, which must be below {bound}:"
            " the facts are not in the FFNs; raise ffn_rate or embedding_std in the recipe, or add layers or facts"
        )
    dead = [layer for layer, load in enumerate(report["load"]) if not load["min"]]
    if dead and report["recipe"]["load_balancing"] >= Recipe.load_balancing:
        raise ToyError(
            f"toy model '{name}': layers {dead} have an expert that no held-out prompt uses;"
            " raise load_balancing in the recipe or give the shape fewer experts"
        )


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    state: dict[str, Tensor] | None = None,
    report: Mapping[str, Any] | None = None,
) -> None:
    """Write the model (with the weights `state`, if given) beside `folder`, then move the files in one by one."""
    transformers.utils.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    with (
        sentences_of_the_disk(folder),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part") as beside,
    ):
        model.save_pretrained(beside, state_dict=state)
        tokenizer.save_pretrained(beside)
        if report is not None:
            write_json(report, Path(beside) / "training.json")
        for file in Path(beside).iterdir():
            file.replace(folder / file.name)
