"""What a run would take, from the configuration and the models' own alone: jobs, tokens, disk, GPU memory.

The jobs are those of a dry run. Sizes follow from shapes: the cache and the weights to a few bytes, tables from their
rows and what a row takes when it is compressed. A model's parts are found in a miniature of it, as they are when it is
described, and measured in a model of full size without weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from moescope import anatomy, artifacts, capture, checkpoints, miniature, toy
from moescope.config import fact_files
from moescope.facts import FactsError, load_relations, prompt_table, select, tokenise
from moescope.models import AnatomyError, Layer, weight_of
from moescope.tracing import roles

HEADS = ("num_attention_heads", "n_head", "n_heads")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
STAGES = (
    *("datasets", "models", "activations", "attribution", "routing", "interventions", "utilization", "training"),
    *("tables", "figures"),
)
STATES = ("checkpoint", "checkpoints")
SUMS = ("tokens", "disk")
UNKNOWN = float("nan")
SPREAD = 0.65
"""Positions of a prompt that would use as many experts if each chose anew: neighbours choose alike."""
KEY_BYTES = 1.6
"""Bytes of a key neuron's id in a compressed set of them."""
BYTES: dict[str, tuple[float, float]] = {
    "prompts": (12300, 48),
    "shard": (13900, 48),
    "shard_dropped": (8030, 0),
    "dropped": (6400, 0),
    "unknown": (11000, 0),
    "layers": (3950, 7.1),
    "heads": (3930, 3.7),
    "experts": (4370, 7.6),
    "margins": (3970, 6.4),
    "neurons": (5780, 11.9),
    "attention_neurons": (5770, 11.3),
    "relation_neurons": (7010, 16),
    "concentration": (7690, 26),
    "neuron_sums": (4970, 7.4),
    "queries": (5600, 6.3),
    "value_layers": (4230, 4.0),
    "readings": (7400, 7.3),
    "blocking": (5190, 3.6),
    "blocked_experts": (5730, 18),
    "keep_only": (4630, 3.4),
    "expert_map": (5150, 3.9),
    "head_map": (4630, 3.5),
    "head_router": (7040, 12.2),
    "blocked_heads": (5240, 12.5),
    "gate_gradients": (4810, 4.0),
    "gate_paths": (4770, 8),
    "tracing": (6510, 4.5),
    "tracing_runs": (5310, 16),
    "masking": (5990, 4.2),
    "masked_units": (5950, 3),
    "loads": (4620, 1.4),
    "gates": (5240, 9.8),
    "router_attribution": (4940, 3.8),
    "associations": (8330, 29),
    "expert_tokens": (4350, 0.9),
    "units": (4270, 4),
}
"""Of each table, the bytes without a row and those of a row: measured on the toy models of the main job."""
KINDS = (*BYTES, "head_blocking", "key_neurons", *STATES)
EXPLAINED = (
    "Jobs: those that are still to be run (all of them with --forceall).",
    "Tokens: those that run forward; of interventions at most so many, of runs that start in the middle the new ones.",
    "Disk: weights and activation cache to 2%, tables of single models estimated; not in it are tables and figures of",
    "all models, logs and the report. Weights of the hub go into its own cache.",
    "GPU: the weights, and an estimate of what a pass that records takes beside them; on all GPUs of a job together.",
)


@dataclass(frozen=True)
class Job:
    """A job of a dry run: what it writes, its wildcards, and whether it may ask for a GPU."""

    outputs: tuple[str, ...]
    wildcards: Mapping[str, str]
    forward: bool

    @property
    def model(self) -> str:
        """Its model, empty for a job of all."""
        return self.wildcards.get("model", "")

    @property
    def stage(self) -> str:
        """The folder that it writes to, of its model if it has one; `others` if that is no stage."""
        folder, *rest = [*self.outputs[0].split("/")[1:-1], "others"]
        if self.model and folder != "models":
            return rest[1] if len(rest) > 2 else "activations"
        return "datasets" if "dataset" in self.wildcards and folder != "figures" else folder


@dataclass(frozen=True)
class LayerShape:
    """Of a layer: heads, routed experts, those of a token, shared experts, whether its FFN is dense.

    `width` is neurons of a routed expert, `rest` all others; `row` and `tensors` are bytes and tensors of the cache.
    """

    heads: int
    experts: int
    k: int
    shared: int
    dense: int
    width: int
    rest: int
    row: int
    tensors: int

    def units(self, positions: float = 1) -> float:
        """FFN units that are used at some of so many positions, if experts are chosen evenly."""
        chosen = self.experts * (1 - (1 - self.k / self.experts) ** positions) if self.experts else 0
        return chosen + self.shared + self.dense


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: widths, and the bytes of its weights as they are loaded and as they are stored."""

    layers: tuple[LayerShape, ...]
    hidden: int
    vocabulary: int
    itemsize: int
    loaded: int
    stored: int

    @property
    def neurons(self) -> int:
        """FFN neurons of all layers."""
        return sum(layer.experts * layer.width + layer.rest for layer in self.layers)

    @property
    def tensors(self) -> int:
        """Tensors of the cache."""
        return sum(layer.tensors for layer in self.layers) + 4

    @property
    def row(self) -> int:
        """Bytes of a row of the cache."""
        return sum(layer.row for layer in self.layers) + self.hidden * self.itemsize + 10

    def gpu(self, batch: int, length: float) -> float:
        """Bytes of a forward pass that records a batch of prompts; all but the weights is a rough estimate."""
        widest = max(3 * (layer.k * layer.width + layer.rest) + layer.k * self.hidden for layer in self.layers)
        token = self.itemsize * (8 * self.hidden + widest + 4 * self.hidden * len(self.layers))
        return self.loaded + batch * (self.row + 12 * self.vocabulary + length * token) + 2**29


@dataclass(frozen=True)
class Prompts:
    """Of a data set: prompts and their tokens, tokens of answers, rows of the cache and the tokens that make them.

    `roles` is the positions, or groups of them, of a prompt that are restored one by one in tracing; a mean.
    """

    n: int
    tokens: float
    answers: float
    rows: float
    row_tokens: float
    relations: int
    tasks: int
    roles: float


@dataclass(frozen=True)
class File:
    """Bytes of a file without its rows, bytes of its rows (of all shards together), tokens that run forward for it."""

    empty: float = 0
    rest: float = 0
    tokens: float = 0


@dataclass
class Line:
    """What the jobs of a model and stage take: tokens that run forward, bytes on disk and of GPU memory."""

    jobs: int = 0
    tokens: float = 0
    disk: float = 0
    gpu: float = 0


def jobs_of(dry_run: str) -> list[Job]:
    """The jobs that a dry run lists and that write something."""
    found = []
    for block in re.split(r"^(?:local)?rule \w+:\n", dry_run, flags=re.MULTILINE)[1:]:
        fields = dict(re.findall(r"^ +(output|wildcards|resources): (.*)$", block, re.MULTILINE))
        if "output" in fields:
            wildcards = dict(pair.split("=", 1) for pair in fields.get("wildcards", "").split(", ") if pair)
            outputs = tuple(fields["output"].split(", "))
            found.append(Job(outputs, wildcards, "gpu=" in fields.get("resources", "")))
    return found


def shape_of(config: PreTrainedConfig, dtype: str = "auto") -> Shape:
    """The sizes of a model. Raises AnatomyError where its parts cannot be foreseen."""
    text: Any = config.get_text_config()
    own: Any = config.dtype or torch.float32
    kind = own if dtype == "auto" else getattr(torch, dtype)
    try:
        with torch.device("meta"):
            model = checkpoints.auto_class(config).from_config(config, dtype=kind)
        small = miniature.build(config)
        parts = anatomy.find(small)
        # Some parts are float32 whatever the weights are.
        found, _ = capture.record(small.to(kind), parts, torch.arange(4, 16).reshape(2, 6))
    except AnatomyError:
        raise
    except checkpoints.FAILURES as error:
        raise AnatomyError(f"no miniature of {config.model_type} could be built ({type(error).__name__})") from error
    unembedding = cast(nn.Linear, model.get_output_embeddings())
    stack = next(name for name, module in small.named_modules() if module is parts.layers[0].block).rpartition(".")[0]
    alike = {_names(layer.block): layer for layer in parts.layers}
    layers = []
    for block in cast(nn.Module, model.get_submodule(stack)).children():
        layer = alike.get(_names(block))
        if layer is None:
            raise AnatomyError(f"a layer of {config.model_type} is like none of its miniature")
        here = capture.of_layer(found, layer)
        layers.append(_layer_shape(block, layer, here, text, unembedding.in_features))
    weights = dict(model.named_parameters())
    numbers = sum(weight.numel() for weight in weights.values())
    # Stored are three tensors of each routed expert, loaded are two of all together.
    header = 110 * (len(weights) + sum(3 * layer.experts - 2 for layer in layers if layer.experts))
    return Shape(
        layers=tuple(layers),
        hidden=unembedding.in_features,
        vocabulary=unembedding.out_features,
        itemsize=kind.itemsize,
        loaded=numbers * kind.itemsize,
        stored=numbers * own.itemsize + header,
    )


def _names(block: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in block.named_modules())


def _layer_shape(block: nn.Module, layer: Layer, found: Mapping[str, Tensor], config: Any, hidden: int) -> LayerShape:
    """The sizes of `block`, which is like `layer` of the miniature, where the tensors `found` are recorded."""
    names = {id(module): name for name, module in layer.block.named_modules()}

    def inputs(module: nn.Module) -> int:
        return weight_of(block.get_submodule(names[id(module)])).shape[1]

    def field(keys: Sequence[str]) -> int:
        return next((getattr(config, key) for key in keys if isinstance(getattr(config, key, None), int)), 1)

    experts = k = width = 0
    if layer.experts is not None:
        down = cast(Tensor, block.get_submodule(names[id(layer.experts.module)]).down_proj)
        experts, k, width = len(down), field(EXPERTS_PER_TOKEN), down[0].numel() // hidden
    shared = [inputs(part.down) for part in layer.shared]
    dense = inputs(layer.dense.down) if layer.dense is not None else 0
    widths = {
        **dict.fromkeys(("resid_pre", "resid_mid", "attention_out"), hidden),
        **dict.fromkeys(("router_logits", "expert_load", "subject_load"), experts),
        **dict.fromkeys(("expert_ids", "expert_weights"), k),
        **{f"shared.{i}.acts": size for i, size in enumerate(shared)},
        **{f"whole.{i}.out": hidden for i in range(len(layer.whole_ffn))},
        "expert_acts": k * width,
        "router_margin": 2,
        "acts": dense,
    }
    if layer.attention is not None and layer.attention.out_proj is not None:
        widths["head_in"] = inputs(layer.attention.out_proj)
    stored = {name: x.element_size() for name, x in found.items() if not name.endswith(capture.NOT_STORED)}
    stored |= {"subject_load": stored["expert_load"]} if experts else {}
    return LayerShape(
        heads=field(HEADS) if layer.n_heads else 0,
        experts=experts,
        k=k,
        shared=len(shared),
        dense=int(dense > 0),
        width=width,
        rest=dense + sum(shared),
        row=sum(widths.get(name, 1) * size for name, size in stored.items()),
        tensors=len(stored),
    )


def prompts_of(dataset: pd.DataFrame, tokenizer: Any, answer: str) -> Prompts:
    """The counts of a table of prompts. Raises FactsError if none of them can be used."""
    table, _ = tokenise(tokenizer, dataset)
    lengths, answers = table["length"].astype(float), table["object_tokens"].astype(float)
    spans = table[["subject_start", "subject_end", "length"]]
    steps = answers if answer == "all_tokens" else answers * 0 + 1
    return Prompts(
        n=len(table),
        tokens=lengths.sum(),
        answers=answers.sum(),
        rows=steps.sum(),
        row_tokens=(steps * lengths + steps * (steps - 1) / 2).sum(),
        relations=table["relation"].nunique(),
        tasks=table["task"].nunique(),
        roles=sum(len(roles(*span)) - 1 for span in spans[spans["subject_start"] >= 0].itertuples(index=False))
        / len(table),
    )


def table_rows(shape: Shape, prompts: Prompts, config: Mapping[str, Any], states: int = 0) -> dict[str, float]:
    """Rows of each table of a data set and model, `states` of training being measured; most of them to the row."""
    layers, n, length = shape.layers, prompts.n, prompts.tokens / prompts.n
    moe = [layer for layer in layers if layer.experts]
    heads, used = sum(layer.heads for layer in layers), sum(layer.units() for layer in layers)
    routed = sum(layer.k + layer.shared for layer in moe)
    anywhere = sum(layer.units(SPREAD * length) for layer in layers)
    below = [sum(other.heads for other in layers[: i + 1]) for i, layer in enumerate(layers) if layer.experts]
    written = [sum(o.units() for o in layers[:i]) + 1 for i, layer in enumerate(layers) if layer.experts]
    kept = config["neurons"]["top"] + config["neurons"]["bottom"]
    values, readings = config["queries"], config["readings"]
    blocking, masking, tracing = config["blocking"], config["masking"], config["tracing"]
    head_sizes = [size for size in config["head_blocking"]["top"] if 3 * size <= heads]
    head_sets = len(head_sizes) * (1 + config["head_blocking"]["random_draws"])
    gradients, traced = (
        min(n, config[key][of]) for key, of in (("gate_gradients", "prompts"), ("tracing", "n_prompts"))
    )
    levels = sum(3 + layer.shared + 1.2 * layer.k for layer in layers)
    coalitions = 4 * len(tracing["coalitions"]) * bool(moe)
    masks = len(masking["shares"]) + len(masking["experts"]) * bool(moe)
    masked = sum(max(1, round(share * shape.neurons)) for share in masking["shares"])
    masked += sum(masking["experts"]) * bool(moe)
    units = [heads, kept, kept, sum(layer.experts + layer.shared for layer in moe)]
    return {
        **dict.fromkeys(("prompts", "shard", "key_neurons", "checkpoint"), n),
        "checkpoints": n * states,
        "layers": n * len(layers),
        "heads": n * heads,
        "experts": n * routed,
        "margins": n * len(moe),
        "neurons": n * kept,
        "attention_neurons": n * kept,
        "relation_neurons": prompts.relations * 2 * kept,
        "concentration": n * 2,
        "neuron_sums": n * (used + heads),
        "queries": n * (2 + 2 * values["neurons"] + heads + anywhere),
        "value_layers": n * min(2 * len(layers), 3.8 + 0.62 * len(layers), 2 * values["values"]),
        "readings": prompts.relations * 2 * readings["tokens"] * sum(min(readings["units"], count) for count in units),
        "blocking": n * len(blocking["how"]) * len(blocking["top"]) * (1 + blocking["random_draws"]),
        "blocked_experts": prompts.relations * 2 * max(blocking["top"]),
        "keep_only": n * (2 + len(config["keep_only"]["top"])) * (2 if any(layer.shared for layer in moe) else 1),
        "expert_map": n * sum(routed if at == "readout" else anywhere for at in config["expert_map"]["positions"]),
        "head_map": n * heads,
        "head_router": n * sum(below),
        "head_blocking": n * (1 + head_sets * (2 if moe else 1)),
        "blocked_heads": prompts.relations * 2 * max(head_sizes, default=0),
        "gate_gradients": gradients * sum(below),
        "gate_paths": gradients * len(moe),
        "tracing": traced * tracing["draws"] * (prompts.roles * levels + coalitions),
        "tracing_runs": traced * tracing["draws"],
        "masking": n * (1 + prompts.tasks * masks * (1 + masking["random_draws"])),
        "masked_units": prompts.tasks * 2 * (1 + masking["random_draws"]) * masked,
        "loads": n * sum(layer.units(SPREAD * length) - layer.shared for layer in moe),
        "gates": n * len(moe),
        "router_attribution": n * (sum(below) + sum(written)),
        "associations": 2 * sum(count * layer.experts for count, layer in zip(below, moe, strict=True)),
        "expert_tokens": n * sum(layer.units(prompts.answers / n) for layer in layers),
        "units": sum(layer.experts + layer.shared + layer.dense for layer in layers),
    }


def dataset_files(shape: Shape, prompts: Prompts, config: Mapping[str, Any], states: int = 0) -> dict[str, File]:
    """The files of a data set and model, by kind; `states` of training are measured.

    Of runs that start in the middle, the tokens that are computed anew are counted.
    """
    rows, n, length = table_rows(shape, prompts, config, states), prompts.n, prompts.tokens / prompts.n
    with_answers = length + prompts.answers / n - 1
    keys = KEY_BYTES * max(1, config["utilization"]["share"] * shape.neurons) * prompts.answers / n
    chosen = 0.75 * sum(layer.k for layer in shape.layers)
    gradients, in_full = config["gate_gradients"], config["expert_map"]["positions"] != ["readout"]
    moe = any(layer.experts for layer in shape.layers)
    each = BYTES | {"key_neurons": (4100, 1 + keys)} | dict.fromkeys(STATES, (5900, 9 + keys + chosen))
    each["head_blocking"] = (6550, 10 if moe else 3.9)
    tokens = {
        **{kind: rows[kind] * length for kind in ("blocking", "keep_only", "head_blocking")},
        "queries": prompts.tokens,
        "head_map": prompts.tokens + rows["head_map"],
        "expert_map": prompts.tokens + rows["expert_map"] * (length if in_full else 1),
        "gate_gradients": moe * min(n, gradients["prompts"]) * (length + gradients["steps"] + 3),
        "tracing": (rows["tracing"] + 2 * rows["tracing_runs"]) * length,
        "masking": rows["masking"] * with_answers,
        "key_neurons": n * with_answers,
        "checkpoint": 2 * n * with_answers,
    }
    found = {kind: File(empty, rows.get(kind, 0) * row, tokens.get(kind, 0)) for kind, (empty, row) in each.items()}
    header = artifacts.MAX_HEADER + 90 * shape.tensors
    return found | {
        "cache": File(header, prompts.rows * shape.row, prompts.row_tokens),
        "index": File(1700 + 90 * shape.tensors * config["shards"]),
    }


def toy_files(shape: Shape, tokenizer: Any, learned: pd.DataFrame, states: int, epochs: int) -> dict[str, File]:
    """The files of a toy model, by kind; the tokens are those of training on the prompts `learned` and of its check.

    `learned` is from facts.tokenise; `states` of training are kept beside the last.
    """
    held_out, training = (learned[learned["held_out"] == of] for of in (True, False))
    checks = 2 + 2 * any(layer.shared for layer in shape.layers)
    tokens = epochs * training["length"].sum() + checks * held_out["length"].sum()
    tokens += training.loc[training["template_id"] == 0, "length"].sum()
    vocabulary = len(tokenizer.backend_tokenizer.to_str(pretty=True).encode())
    return {
        "weights": File(shape.stored, 0, float(tokens)),
        "tokenizer": File(vocabulary),
        "states": File(states * (shape.stored + vocabulary + 2200)),
        "text": File(1000),
    }


def estimate(
    jobs: Sequence[Job], config: Mapping[str, Any], trusted: Collection[str] = ()
) -> tuple[dict[tuple[str, str], Line], list[str]]:
    """What the jobs of a resolved configuration take, by model (empty: of all) and stage; and sentences about that.

    Numbers are NaN where something is not known: a sentence says what. Models `trusted` may run code of their own.
    """
    lines: dict[tuple[str, str], Line] = defaultdict(Line)
    tables = {name: _table(name, of, config, jobs) for name, of in config["datasets"].items()}
    notes = [
        f"{name}: unknown until the data set is read; run `snakemake results/{name}/dataset.parquet` first"
        for name, table in tables.items()
        if table is None
    ]
    notes += [f"{name}: unknown, since its samples are counted when they are read" for name in config["texts"]]
    toys = None
    if any("toy" in config["models"][job.model] for job in jobs if job.model):
        table = cast(pd.DataFrame, tables[config["toy_training"]["dataset"]])
        tokenizer = toy.train_tokenizer(table)
        toys = tokenizer, tokenise(tokenizer, table)[0]
    for name, model in config["models"].items():
        mine = [job for job in jobs if job.model == name]
        if not mine:
            continue
        files, gpu = dict[str, dict[str, File]](), UNKNOWN
        try:
            files, gpu = _model_files(name, model, tables, config, toys, name in trusted)
        except (AnatomyError, checkpoints.CheckpointError, toy.ToyError, FactsError) as error:
            notes.append(f"{name}: unknown, since {error}")
        for job in mine:
            line, known = lines[name, job.stage], files.get(job.wildcards.get("dataset", ""))
            share = 1 / config["shards"] if "shard" in job.wildcards else 1
            line.jobs += 1
            for path in job.outputs:
                kind = _kind(path)
                if known is not None and kind not in known:
                    notes.append(f"{path}: not estimated")
                file = known.get(kind, File()) if known is not None else File(UNKNOWN, 0, UNKNOWN)
                line.disk += file.empty + share * file.rest
                line.tokens += share * file.tokens if job.forward or job.stage == "models" else 0
            if job.forward and model["device"] != "cpu":
                line.gpu = gpu
    for job in jobs:
        if not job.model:
            lines["", job.stage].jobs += 1
    models, stages = [*config["models"], ""], [*STAGES, *(stage for _, stage in lines)]
    order = sorted(lines, key=lambda key: (models.index(key[0]), stages.index(key[1])))
    return {key: lines[key] for key in order}, notes


def report(lines: Mapping[tuple[str, str], Line], notes: Sequence[str]) -> str:
    """The plan as text; a question mark is something that is not known."""
    if not lines:
        return "Nothing is left to be done."
    width = max(5, *(len(model) for model, _ in lines)) + 2
    rows = [f"{'model':{width}}{'stage':15}{'jobs':>6}{'tokens':>15}{'disk, GB':>12}{'GPU, GB':>10}"]
    for (model, stage), line in lines.items():
        cells = f"{_whole(line.tokens):>15}{_gigabytes(line.disk):>12}{_gigabytes(line.gpu):>10}" if model else ""
        rows.append(f"{model or 'all':{width}}{stage:15}{line.jobs:>6}{cells}")
    known = [line for line in lines.values() if not isnan(line.tokens + line.disk)]
    total = Line(sum(line.jobs for line in lines.values()), *(sum(getattr(x, of) for x in known) for of in SUMS))
    cells = f"{_whole(total.tokens):>15}{_gigabytes(total.disk):>12}"
    rows.append(f"{'known' if len(known) < len(lines) else 'sum':{width}}{'':15}{total.jobs:>6}{cells}")
    return "\n".join([*rows, "", *EXPLAINED, *notes])


def _model_files(
    name: str,
    model: Mapping[str, Any],
    tables: Mapping[str, pd.DataFrame | None],
    config: Mapping[str, Any],
    toys: tuple[Any, pd.DataFrame] | None,
    trusted: bool,
) -> tuple[dict[str, dict[str, File]], float]:
    """The files of a model, by data set (empty: its own) and kind, and bytes of GPU memory.

    `toys` are the tokenizer of all toys and what they learn, in its tokens. Raises CheckpointError, ToyError,
    AnatomyError and FactsError.
    """
    gpu, states = list[float](), len(model["checkpoints"])
    if "toy" in model and toys is not None:
        tokenizer, learned = toys
        sizes = {key: value for key, value in model["toy"].items() if key not in ("seed", "load_balancing")}
        shape = shape_of(toy.config_of(toy.Shape(**sizes), len(tokenizer)), model["dtype"])
        files = {"": toy_files(shape, tokenizer, learned, states, config["toy_training"]["epochs"])}
    else:
        settings, tokenizer = _settings(name, model, trusted)
        shape = shape_of(settings, model["dtype"])
        files = {"": {"text": File(1000 + shape.stored * ("hub" in model))}}
    for dataset, table in tables.items():
        if table is not None:
            of = config["datasets"][dataset]
            prompts = prompts_of(select(table, of["templates"]), tokenizer, of["answer"])
            files[dataset] = dataset_files(shape, prompts, config, states + ("toy" in model))
            gpu.append(shape.gpu(config["batch_size"], prompts.tokens / prompts.n))
    return files, max(gpu, default=UNKNOWN)


def _whole(x: float) -> str:
    return "?" if isnan(x) else f"{x:,.0f}"


def _gigabytes(x: float) -> str:
    return "?" if isnan(x) else f"{x / 1e9:,.4f}" if x else "-"


def _kind(path: str) -> str:
    """What a file of a model holds, by its path: a shard's folder or number may stand before or behind its name."""
    _, top, *rest = path.split("/")
    name = rest[-1]
    if top == "models":
        kinds = {"model.safetensors": "weights", "tokenizer.json": "tokenizer", "checkpoints": "states"}
        return kinds.get(name, "text")
    if name.endswith(".safetensors"):
        return "cache"
    if "activations" in rest:
        return "index" if name == "index.json" else "shard_dropped" if name.endswith(".dropped.parquet") else "shard"
    if rest[1] == "training":
        return "checkpoints" if name == "checkpoints.parquet" else "checkpoint"
    words = re.split(r"[/.]", "/".join(rest[1:]))
    return next((word for word in reversed(words) if word in KINDS), "prompts" if "captured" in words else name)


def _table(
    name: str, dataset: Mapping[str, Any], config: Mapping[str, Any], jobs: Sequence[Job]
) -> pd.DataFrame | None:
    """All prompts of a data set: those of its fact files, or those read before; None if they are still to be read."""
    if dataset["format"] == "facts":
        return prompt_table(load_relations(fact_files(dataset), config["tasks"]))
    path = f"results/{name}/dataset.parquet"
    if any(path in job.outputs for job in jobs) or not Path(path).exists():
        return None
    return artifacts.read_table(path, "dataset")


def _settings(name: str, model: Mapping[str, Any], trusted: bool) -> tuple[PreTrainedConfig, Any]:
    """The configuration and the tokenizer of a model that is no toy, without its weights. Raises CheckpointError."""
    path = Path(f"results/models/{name}/model.json")
    if path.exists():
        return checkpoints.glimpse(artifacts.read_json(path), trusted)
    if "folder" in model:
        return checkpoints.glimpse({"source": "folder", "folder": model["folder"], "files": {}}, trusted)
    try:
        return checkpoints.glimpse(
            {"source": "hub", "hub": model["hub"], "commit": model["revision"], "files": {}}, trusted
        )
    except checkpoints.CheckpointError as error:
        if "no such folder" not in str(error):
            raise
        raise checkpoints.CheckpointError(
            f"config.json of {model['hub']} is not fetched yet; run `snakemake models` first, or fetch no more than"
            f" `hf download {model['hub']} config.json tokenizer.json tokenizer_config.json`"
        ) from error
