"""The table and the figure of masking, of a run small enough to be worked out by hand."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

from moescope import drawing, masking_plots, masking_tables
from moescope.summaries import Bootstrap

BOOTSTRAP = Bootstrap(bootstrap_draws=200, confidence=0.9, seed=0)
PROMPTS = pd.DataFrame(
    {
        "prompt_id": [3, 5, 8, 9],
        "task": ["geography", "geography", "entity", "entity"],
        "subject": ["France", "Japan", "Sony", "Honda"],
    }
)
CLEAN_RANK, CLEAN = np.array([1, 2, 4, 20]), np.array([-1.0, -2.0, -3.0, -4.0])


def scored(task, draw, rank, log_prob, level="neurons", size=8):
    columns = {"prompt_id": PROMPTS["prompt_id"], "level": level, "task": task, "size": size, "draw": draw}
    return pd.DataFrame({**columns, "masked": size - (draw >= 0), "rank": rank, "log_prob": np.float32(log_prob)})


def masked():
    """Own keys cost 2 nats and double the rank, others' 0.5; of two draws one costs nothing, the other 1 (geography's
    2.5). Of entity's keys there is a second size without a draw, that the prompts of one half alone were measured with.
    """
    own = {task: (PROMPTS["task"] == task).to_numpy() for task in ("geography", "entity")}
    frames = [scored("", -1, CLEAN_RANK, CLEAN, "clean", 0).assign(masked=0)]
    for task, mine in own.items():
        frames.append(scored(task, -1, CLEAN_RANK * (1 + mine), CLEAN - 0.5 - 1.5 * mine))
        frames.append(scored(task, 0, CLEAN_RANK, CLEAN))
        frames.append(scored(task, 1, CLEAN_RANK * 4, CLEAN - (2.5 if task == "geography" else 1)))
    frames.append(scored("entity", -1, CLEAN_RANK, CLEAN - 1, "experts", 5).iloc[[1, 3]])
    return pd.concat(frames).sample(frac=1, random_state=0)


RUN = {"prompts": PROMPTS, "masking": masked()}
RUNS = {("facts", "moe"): RUN}
EMPTY = {("facts", "dense"): {"prompts": PROMPTS, "masking": masked().query("level == 'clean'")}}


@pytest.fixture(scope="module")
def table():
    return masking_tables.masking(RUNS, BOOTSTRAP)


def row(table, **keys):
    found = table.loc[np.logical_and.reduce([table[key] == value for key, value in keys.items()])]
    assert len(found) == 1
    return found.iloc[0]


def holds(found, name, value):
    assert found[name] == pytest.approx(value)
    assert found[f"{name}_low"] - 1e-9 <= found[name] <= found[f"{name}_high"] + 1e-9


def test_pairs_of_tasks_by_hand(table):
    found = row(table, level="neurons", task="geography", measured="geography", metric="log_prob")
    assert (found["clean"], found["estimate"], found["own"]) == (-1.5, -3.5, True)
    assert (found["masked"], found["masked_random"], found["size"], found["draws"]) == (8, 7, 8, 2)
    holds(found, "change", -2)
    holds(found, "change_random", -1.25)
    assert found["change_random_low"] == pytest.approx(np.quantile([0, -2.5], 0.05))
    assert found["change_random_high"] == pytest.approx(np.quantile([0, -2.5], 0.95))
    # The worse of the two draws is at most as good as the keys.
    assert found["draws_as_low"] == 0.5
    holds(found, "specific", -0.75)
    assert (found["prompts"], found["subjects"]) == (2, 2)
    found = row(table, level="neurons", task="geography", measured="entity", metric="log_prob")
    assert (found["clean"], found["own"], found["draws_as_low"]) == (-3.5, False, 0.5)
    holds(found, "change", -0.5)
    holds(found, "specific", 0.75)
    found = row(table, level="neurons", task="entity", measured="entity", metric="mrr")
    assert found["clean"] == pytest.approx((1 / 4 + 1 / 20) / 2)
    holds(found, "change", -found["clean"] / 2)
    holds(found, "change_random", -found["clean"] * 3 / 8)
    found = row(table, level="neurons", task="entity", measured="entity", metric="hit_at_10")
    assert (found["clean"], found["estimate"], found["change_random"]) == (0.5, 0.5, -0.25)


def test_all_prompts_with_their_own_and_with_other_keys(table):
    found = row(table, level="neurons", task="all", own=True, metric="log_prob")
    assert (found["measured"], found["prompts"], found["subjects"], found["masked"]) == ("all", 4, 4, 8)
    holds(found, "change", -2)
    # Draw 1 costs 2.5 nats of the first two prompts and 1 of the others.
    holds(found, "change_random", -1.75 / 2)
    holds(found, "specific", -2 + 1.75 / 2)
    found = row(table, level="neurons", task="all", own=False, metric="log_prob")
    holds(found, "change", -0.5)
    assert found["draws_as_low"] == 0.5


def test_intervals_are_those_of_paired_differences(table):
    """Every prompt loses the same: the change is certain, however different the prompts are."""
    found = row(table, level="neurons", task="all", own=True, metric="log_prob")
    assert found["change_low"] == pytest.approx(-2)
    assert found["change_high"] == pytest.approx(-2)
    assert found["low"] < found["estimate"] - 0.1
    # Each prompt loses 0.75 or 1.5 nats more than the mean of the draws.
    assert -1.5 - 1e-9 <= found["specific_low"] < found["specific"] - 0.1
    assert found["specific"] + 0.1 < found["specific_high"] <= -0.75 + 1e-9


def test_prompts_that_were_not_measured_do_not_count_and_without_draws_nothing_is_said_of_them(table):
    found = row(table, level="experts", task="entity", measured="geography", metric="log_prob")
    assert (found["clean"], found["change"], found["prompts"], found["draws"]) == (-2, -1, 1, 0)
    for name in ("change_random", "change_random_low", "draws_as_low", "specific", "specific_high", "masked_random"):
        assert np.isnan(found[name])


def test_a_draw_that_only_some_prompts_have_is_left_out():
    lacking = RUN["masking"].query("not (draw == 1 and prompt_id == 5)")
    table = masking_tables.masking({("facts", "moe"): {**RUN, "masking": lacking}}, BOOTSTRAP)
    found = row(table, level="neurons", task="geography", measured="geography", metric="log_prob")
    assert (found["draws"], found["prompts"], found["change_random"]) == (1, 2, 0)
    assert row(table, level="neurons", task="geography", measured="entity", metric="log_prob")["draws"] == 2


def test_without_sets_the_table_is_empty_and_has_its_columns(table):
    empty = masking_tables.masking(EMPTY, BOOTSTRAP)
    assert empty.empty
    assert list(empty) == list(masking_tables.masking({}, BOOTSTRAP)) == list(table)
    assert not table.duplicated(["model", "level", "task", "measured", "own", "size", "metric"]).any()


def test_figure_shows_keys_beside_random_and_leaves_a_model_without_rows_bare(table, tmp_path):
    with matplotlib.rc_context(drawing.STYLE):
        figure = masking_plots.masking({"masking": table}, ["moe", "dense"], "a note")
        figure.savefig(tmp_path / "masking.svg")
    moe, dense = figure.axes
    assert [label.get_text() for label in moe.get_yticklabels()] == ["5 experts", "8 neurons"]
    shown = {bars.get_label(): bars[0].get_xdata() for bars in moe.containers}
    assert shown["own task: keys"] == pytest.approx([-1, -2])
    assert shown["own task: random"] == pytest.approx([np.nan, -1.75 / 2], nan_ok=True)
    assert shown["other tasks: keys"] == pytest.approx([-1, -0.5])
    assert all(len(bars[0].get_xdata()) == 0 for bars in dense.containers)
    bare = masking_plots.masking({"masking": table.iloc[:0]}, ["moe"], "a note")
    assert all(len(bars[0].get_xdata()) == 0 for bars in bare.axes[0].containers)
