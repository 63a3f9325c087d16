"""What re-runs after an edit, and what does not."""

import os

import pytest

import small

TABLES = {
    f"summarise_{name}"
    for name in (
        *("attribution", "neurons", "heads", "interventions", "steering", "routing"),
        *("utilization", "key_scores", "masking", "training"),
    )
}


def drawn(*rules):
    """Rules that make tables, and those that draw them."""
    return {*rules, *(rule.replace("summarise", "plot") for rule in rules)}


PLOTS = drawn(*TABLES) - TABLES
OF_NEURONS = {"attribute_neurons", "attribute_queries", "read_units"}
OF_ROUTING = {"analyse_routing", "attribute_routers"}
OF_EXPERTS = {"block_experts", "keep_only", "map_experts", "trace_gates"}
OF_HEADS = {"sweep_heads", "block_heads", "trace_causes"}
OF_KEYS = {"find_key_neurons", "mask_keys"}
OF_TRAINING = {"measure_checkpoint", "gather_checkpoints"}
AFTER_NEURONS = OF_NEURONS | drawn("summarise_neurons")
AFTER_UNITS = {"attribute", "attribute_routers", "block_experts", "block_heads", "read_units"} | drawn(
    *TABLES - {"summarise_routing", "summarise_utilization", "summarise_masking", "summarise_training"}
)
AFTER_ATTRIBUTION = AFTER_UNITS | AFTER_NEURONS
AFTER_KEYS = {*OF_KEYS, *OF_TRAINING} | drawn(
    "summarise_utilization", "summarise_key_scores", "summarise_masking", "summarise_training"
)
OF_PROMPTS = OF_NEURONS | OF_ROUTING | OF_EXPERTS | OF_HEADS | OF_KEYS | OF_TRAINING
AFTER_FILTER = {"filter_known", "attribute", *OF_PROMPTS, *TABLES, *PLOTS}
AFTER_MODELS = {"capture", "gather_prompts", *AFTER_FILTER}
BEFORE_FILTER = {"write_dataset", "train_toy", "capture", "gather_prompts"}
EVERYTHING = {"write_dataset", "train_toy", *AFTER_MODELS}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def rerun(folder):
    """Rules that would run again, but for the record of the run, which does whenever any other does."""
    jobs = set(small.planned(folder))
    assert ("write_provenance" in jobs) == bool(jobs)
    return jobs - {"write_provenance"}


def test_a_second_run_does_nothing(copy_of_finished):
    before = {path: path.stat().st_mtime_ns for path in (copy_of_finished / "results").rglob("*") if path.is_file()}
    assert "Nothing to be done" in small.snakemake(copy_of_finished)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("module", "rules"),
    [
        ("plots", PLOTS),
        ("tables", TABLES | PLOTS),
        ("lens", AFTER_ATTRIBUTION | AFTER_KEYS | {"sweep_heads", "trace_gates"}),
        ("attribution", AFTER_UNITS),
        ("rankings", AFTER_NEURONS),
        ("bounds", AFTER_NEURONS | OF_TRAINING | drawn("summarise_training")),
        ("queries", {"attribute_queries", *drawn("summarise_neurons")}),
        ("reading", {"read_units", *drawn("summarise_neurons")}),
        (
            "intervene",
            {*OF_EXPERTS, *OF_HEADS, "mask_keys"}
            | drawn("summarise_interventions", "summarise_heads", "summarise_steering", "summarise_masking"),
        ),
        ("expert_map", {"map_experts", *drawn("summarise_interventions")}),
        ("steering", {"sweep_heads", "block_heads", "trace_gates", *drawn("summarise_heads", "summarise_steering")}),
        ("tracing", {"trace_causes", *drawn("summarise_heads")}),
        ("routing", {"analyse_routing", *drawn("summarise_routing")}),
        ("router_attribution", {"attribute_routers", *drawn("summarise_steering")}),
        ("utilization", AFTER_KEYS),
        ("masking", {"mask_keys", *drawn("summarise_masking")}),
        ("training", OF_TRAINING | drawn("summarise_training")),
        ("capture", AFTER_MODELS),
        ("toy", {"train_toy", *AFTER_MODELS}),
        ("artifacts", EVERYTHING),
        ("config", set()),
    ],
)
def test_an_edit_of_a_module_reruns_what_reaches_it(copy_of_finished, module, rules):
    path = copy_of_finished / f"scripts/moescope/{module}.py"
    path.write_text(path.read_text() + "# a comment\n")
    assert rerun(copy_of_finished) == rules


def test_an_edit_of_a_script_reruns_its_rule(copy_of_finished):
    edit(copy_of_finished / "scripts/keep_only.py", "Snakemake script", "A Snakemake script")
    assert rerun(copy_of_finished) == {"keep_only", *drawn("summarise_interventions")}


def test_touched_files_and_a_new_module_rerun_nothing(copy_of_finished):
    for path in (copy_of_finished / "scripts").rglob("*.py"):
        os.utime(path)
    (copy_of_finished / "scripts/moescope/new.py").write_text("# not imported by anything\n")
    assert small.planned(copy_of_finished) == {}


def test_an_edited_fact_reruns_what_depends_on_it(copy_of_finished):
    edit(copy_of_finished / "config/facts/animal_young.yaml", "cow: calf", "cow: [calf, heifer]")
    assert rerun(copy_of_finished) == EVERYTHING
    edit(copy_of_finished / "config/facts/animal_young.yaml", "cow: [calf, heifer]", "cow: calf")
    edit(copy_of_finished / "config/facts/company_hq.yaml", "Sony: Tokyo", "Sony: Minato")
    # The content is what it was, and company_hq is not in this data set.
    assert small.planned(copy_of_finished) == {}


@pytest.mark.parametrize(
    ("section", "change", "rules"),
    [
        ("blocking", {"random_draws": 4}, {"block_experts", *drawn("summarise_interventions")}),
        ("keep_only", {"top": [1, 2]}, {"keep_only", *drawn("summarise_interventions")}),
        ("expert_map", {"positions": ["readout", "all"]}, {"map_experts", *drawn("summarise_interventions")}),
        ("head_sweep", {"lpi": False}, {"sweep_heads", *drawn("summarise_heads", "summarise_steering")}),
        ("head_blocking", {"top": [2]}, {"block_heads", *drawn("summarise_heads")}),
        ("gate_gradients", {"steps": 5}, {"trace_gates", *drawn("summarise_steering")}),
        ("associations", {"permutations": 9}, {"attribute_routers", *drawn("summarise_steering")}),
        ("tracing", {"noise": 2}, {"trace_causes", *drawn("summarise_heads")}),
        ("utilization", {"score": "normed"}, AFTER_KEYS),
        ("utilization", {"expert_share": 0.5}, drawn("summarise_utilization", "summarise_training")),
        ("masking", {"random_draws": 3}, {"mask_keys", *drawn("summarise_masking")}),
        ("neurons", {"top": 7}, AFTER_NEURONS),
        ("queries", {"values": 7}, {"attribute_queries", *drawn("summarise_neurons")}),
        ("readings", {"tokens": 7}, {"read_units", *drawn("summarise_neurons")}),
        ("statistics", {"confidence": 0.9}, TABLES | PLOTS),
        ("lens", {"norm": "reference"}, AFTER_ATTRIBUTION),
        ("datasets", {"facts": small.SMALL["datasets"]["facts"] | {"known": 10}}, AFTER_FILTER),
        ("datasets", {"facts": small.SMALL["datasets"]["facts"] | {"answer": "argmax"}}, AFTER_MODELS),
        ("toy_training", {"epochs": 4}, {"train_toy", *AFTER_MODELS}),
        ("toy_training", {"epochs": 3, "dataset": "facts"}, set()),
    ],
)
def test_a_setting_reruns_what_it_reaches(copy_of_finished, section, change, rules):
    small.configure(copy_of_finished, small.SMALL | {section: small.SMALL.get(section, {}) | change})
    assert rerun(copy_of_finished) == rules


def test_jobs_on_a_gpu_ask_for_one(tmp_path):
    models = {name: model | {"device": "cuda"} for name, model in small.SMALL["models"].items()}
    folder = small.make(tmp_path / "run", small.SMALL | {"models": models})
    jobs = small.snakemake(folder, "--dry-run").split("\nrule ")
    asking = {job.split(":")[0] for job in jobs if "gpu=1" in job}
    assert asking == {"capture", "attribute_queries", "measure_checkpoint", *OF_EXPERTS, *OF_HEADS, *OF_KEYS}


@pytest.mark.parametrize(
    ("target", "rules"),
    [
        ("models", {"write_dataset", "train_toy"}),
        ("activations", {"write_dataset", "train_toy", "capture", "gather_prompts", "filter_known"}),
        ("attribution", EVERYTHING - PLOTS - TABLES - OF_PROMPTS | OF_NEURONS),
        ("routing", EVERYTHING - PLOTS - TABLES - OF_PROMPTS | OF_ROUTING),
        ("interventions", EVERYTHING - PLOTS - TABLES - OF_PROMPTS | OF_EXPERTS | OF_HEADS),
        ("utilization", {*BEFORE_FILTER, "filter_known", *OF_KEYS}),
        ("training", {*BEFORE_FILTER, "filter_known", *OF_TRAINING}),
        ("tables", EVERYTHING - PLOTS),
    ],
)
def test_stage_targets(tmp_path, target, rules):
    folder = small.make(tmp_path / "run")
    assert set(small.planned(folder, target)) == rules
