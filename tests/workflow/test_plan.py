"""The plan as it is asked for, before anything has run."""

import small

HUB = {"hub": "nobody/nothing", "kind": "dense"}


def test_the_plan_has_the_jobs_of_a_dry_run_and_is_made_anew_each_time(tmp_path):
    folder = small.make(tmp_path / "run")
    jobs = small.planned(folder)
    lines = [line.split() for line in small.snakemake(folder, "plan").splitlines()]
    stages = {(line[0], line[1]): int(line[2]) for line in lines if len(line) > 2 and line[2].isdigit()}
    assert stages["small-moe", "activations"] == jobs["capture"] / 2 + jobs["gather_prompts"] / 2 + 1
    assert stages["small-moe", "routing"] == jobs["analyse_routing"] + jobs["attribute_routers"]
    assert stages["all", "figures"] == sum(n for rule, n in jobs.items() if rule.startswith("plot_"))
    [total] = [line for line in lines if line[:1] == ["sum"]]
    assert int(total[1]) == sum(jobs.values())
    assert {path.name for path in (folder / "results").rglob("*") if path.is_file()} == {"plan.log", ".lock"}

    small.configure(folder, small.SMALL | {"models": small.SMALL["models"] | {"far": HUB}})
    again = small.snakemake(folder, "plan", "--forceall", "--quiet", "all")
    assert "far: unknown, since config.json of nobody/nothing is not fetched yet" in again
    assert any(line.split()[:1] == ["known"] for line in again.splitlines())
