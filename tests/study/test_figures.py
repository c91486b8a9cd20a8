"""The report's figures: those that runs have data for, in both schemes, an objective in one colour everywhere."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas
from PIL import Image

from dist_train.errors import UserError
from dist_train.study.charts import Draft, series, style
from dist_train.study.cost_figures import noise
from dist_train.study.curves import groups_of, main_places
from dist_train.study.figures import figures
from dist_train.study.loss_figures import equal, losses, positions
from dist_train.study.suite_figures import attention, corpora, gap, text
from dist_train.study.text_measures import MEASURES
from tests.study.written_runs import T, estimate, write_report, write_run, write_suite

OBJECTIVES = {"final token": 1, "all tokens": T}


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    return write_report(tmp_path / "runs", OBJECTIVES)


def drawn(draft: Draft | None, panel: int = 0, dark: bool = False) -> Canvas:
    """Return a panel as it is drawn in a scheme."""
    assert draft is not None
    with style(dark):
        canvas = plt.figure(figsize=draft.panels[panel].inches)
        draft.panels[panel].draw(canvas)
        plt.close(canvas)
    return canvas


# ---- which -----------------------------------------------------------------------------------------------------------


def test_what_there_is_data_for_is_drawn_in_both_schemes_at_one_size(report: dict[str, Any], tmp_path: Path) -> None:
    found = figures(report, tmp_path / "figures")
    assert list(found) == ["losses", "equal", "positions", "noise", "cost"]
    for figure in found.values():
        assert figure.title
        assert figure.caption.endswith(".")
        for panel, file in zip(figure.panels, figure.files, strict=True):
            assert panel.alt
            assert tmp_path / file == panel.light
            with Image.open(panel.light) as light, Image.open(panel.dark) as dark:
                assert light.size == dark.size
                papers = [np.asarray(image.convert("L"))[0, 0] for image in (light, dark)]
            assert papers[0] > 200 > 60 > papers[1]


def test_a_report_without_runs_has_no_figures(report: dict[str, Any], tmp_path: Path) -> None:
    assert figures({**report, "cells": []}, tmp_path / "figures") == {}


@pytest.mark.parametrize("content", ["{torn", "[1]", "{}"])
def test_damaged_results_are_no_data(report: dict[str, Any], content: str) -> None:
    for cell in report["cells"]:
        run = Path(cell["folder"])
        (run / "evaluation").mkdir()
        for name in ("evaluation/text.json", "evaluation/held-out.json", "inspection.json", "config.yaml"):
            (run / name).write_text(content)
    groups = groups_of(report["cells"])
    assert [draft(groups) for draft in (gap, corpora, text, attention)] == [None] * 4


def test_a_run_that_is_gone_is_a_mistake_that_names_it(report: dict[str, Any], tmp_path: Path) -> None:
    (Path(report["cells"][1]["folder"]) / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="1-1 is no run folder"):
        figures(report, tmp_path / "figures")


# ---- what ------------------------------------------------------------------------------------------------------------


def test_an_objective_has_one_color_in_all_figures_and_both_schemes_theirs(report: dict[str, Any]) -> None:
    groups = groups_of(report["cells"])
    for dark in (False, True):
        with style(dark):
            expected = [to_rgb(series(number)["color"]) for number in range(2)]
        for draft in (equal(groups), positions(groups), noise(groups)):
            with style(dark):
                lines = drawn(draft, dark=dark).axes[0].get_lines()
                found = [to_rgb(line.get_color()) for line in lines]
            assert found[:2] == expected
    with style():
        trained = [drawn(losses(groups), panel).axes[0].get_lines()[0].get_color() for panel in range(2)]
        assert [to_rgb(color) for color in trained] == [to_rgb(series(number)["color"]) for number in range(2)]


def test_losses_are_drawn_over_each_budget_as_mean_and_range_over_seeds(report: dict[str, Any]) -> None:
    draft = equal(groups_of(report["cells"]))
    spent = {"updates": [10, 20, 30, 40], "supervised tokens": [40, 80, 120, 160], "seconds": [5, 10, 15, 20]}
    spent["FLOPs"] = [10010, 20020, 30030, 40040]
    assert len(draft.panels) == 4
    for panel in range(4):
        above, below = drawn(draft, panel).axes
        line = above.get_lines()[0]
        # Without the untrained network, which has spent nothing: a logarithm has no place for it.
        assert np.asarray(line.get_xdata()).tolist() == spent[below.get_xlabel()]
        mean = 2.1 + 0.01 + 0.5 + 2 * np.exp(-np.array([1, 2, 3, 4]))
        np.testing.assert_allclose(np.asarray(line.get_ydata()), mean)
        band = above.collections[0].get_datalim(above.transData).intervaly
        assert band == pytest.approx([mean[-1] - 0.01, mean[0] + 0.01])
    assert draft.title == "All-token loss after the last update: 2.65 nats for “final token”, 3.35 for “all tokens”"


def test_the_noise_of_each_update_is_visible_behind_its_mean(report: dict[str, Any]) -> None:
    draft = losses(groups_of(report["cells"]))
    raw, mean, held_out = drawn(draft).axes[0].get_lines()
    assert len(np.asarray(raw.get_ydata())) == 40
    jumps = [np.abs(np.diff(np.asarray(line.get_ydata())[20:])).mean() for line in (raw, mean)]
    assert jumps[0] > 4 * jumps[1]
    assert raw.get_alpha() == 0.35
    assert np.asarray(held_out.get_xdata()).tolist() == [10, 20, 30, 40]


def test_positions_are_counted_from_one_to_the_last(report: dict[str, Any]) -> None:
    draft = positions(groups_of(report["cells"]))
    assert draft is not None
    line = drawn(draft).axes[0].get_lines()[0]
    assert np.asarray(line.get_xdata()).tolist() == list(range(1, T + 1))
    assert draft.title == "After “final token” the last position is 0.50 nats better than the mean of all"


def test_the_exponent_of_noise_over_tokens_is_fitted_to_all_runs(report: dict[str, Any]) -> None:
    draft = noise(groups_of(report["cells"]))
    assert draft is not None
    assert draft.title.startswith("Noise goes with supervised tokens per update to the power −0.50;")
    assert len(draft.panels) == 1


def test_the_noise_scale_is_drawn_where_it_is_known(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2.0, noise_scale=12.5)
    measures = {"supervised_tokens": 160, "train_loss_noise": 0.1}
    cell = {"settings": {"run.seed": 1}, "folder": str(run), "objective": "final token", "measures": measures}
    draft = noise(groups_of([cell]))
    assert draft is not None
    assert np.asarray(drawn(draft, 1).axes[0].get_lines()[0].get_ydata()).tolist() == [12.5] * 40


def test_the_noise_of_a_curriculum_is_not_drawn_against_a_number_of_tokens_that_changed(report: dict[str, Any]) -> None:
    for cell in report["cells"][:2]:
        metrics = Path(cell["folder"]) / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        for line in lines:
            if line["kind"] == "train":
                line["last_k"] = 1 if line["step"] < 20 else T
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups = groups_of(report["cells"])
    assert noise(groups[:1]) is None
    draft = noise(groups)
    assert [text.get_text() for text in drawn(draft).axes[0].texts] == ["all tokens"]


def test_the_gap_is_drawn_for_every_setting_on_one_scale(report: dict[str, Any]) -> None:
    for number, cell in enumerate(report["cells"]):
        cell["settings"]["model.dropout"] = 0.1 * (number % 2)
        write_suite(Path(cell["folder"]), "held-out", {"gap": {"all_token_loss": estimate(0.1 * number)}})
    draft = gap(groups_of(report["cells"]))
    assert draft is not None
    panels = [drawn(draft, panel).axes[0] for panel in range(2)]
    assert [axes.get_title() for axes in panels] == ["dropout 0.0", "dropout 0.1"]
    assert panels[0].get_xlim() == panels[1].get_xlim()
    assert draft.title == "Held-out text is 0.00 to 0.30 nats harder than training text"


def test_generated_text_is_drawn_beside_the_human_interval(report: dict[str, Any]) -> None:
    for cell in report["cells"]:
        measures = {"spaces_per_character": estimate(0.1), "distinct_3": None}
        human = {"spaces_per_character": estimate(0.5), "distinct_3": estimate(0.9)}
        write_suite(Path(cell["folder"]), "text", {"model": measures, "human": human, "samples": []})
    draft = text(groups_of(report["cells"]))
    assert draft is not None
    assert [panel.name for panel in draft.panels] == ["text-spaces_per_character"]  # the others are not measured
    axes = drawn(draft).axes[0]
    assert axes.get_title() == MEASURES["spaces_per_character"].label
    (band,) = axes.patches
    assert band.get_extents().transformed(axes.transData.inverted()).intervalx == pytest.approx([0.4, 0.6])
    assert [label.get_text() for label in axes.get_yticklabels()] == list(OBJECTIVES)


# ---- which runs stand beside each other ------------------------------------------------------------------------------


def test_curves_are_shown_where_most_objectives_are_and_for_each_corpus() -> None:
    varied = [
        ("all tokens", {"corpus": "book", "objective": "all", "model.dropout": 0.0}),
        ("final token", {"corpus": "book", "objective": "final", "model.dropout": 0.1}),
        ("all tokens", {"corpus": "book", "objective": "all", "model.dropout": 0.1}),
        ("all tokens", {"corpus": "web", "objective": "all", "model.dropout": 0.1}),
    ]
    groups = groups_of([{"objective": name, "settings": settings} for name, settings in varied])
    places = main_places(groups)
    assert list(places) == ["corpus book, dropout 0.1", "corpus web, dropout 0.1"]
    assert [group.objective for group in places["corpus book, dropout 0.1"]] == ["final token", "all tokens"]
    assert groups[-1].corpus == "web"


def test_runs_that_differ_in_their_seed_are_one_group() -> None:
    cells = [{"objective": name, "settings": {"run.seed": seed}} for seed in (1, 2) for name in OBJECTIVES]
    found = [(group.objective, len(group.cells), group.where) for group in groups_of(cells)]
    assert found == [("final token", 2, ""), ("all tokens", 2, "")]


def test_a_run_that_is_still_training_is_compared_as_far_as_it_is(report: dict[str, Any]) -> None:
    metrics = Path(report["cells"][0]["folder"]) / "metrics.jsonl"
    lines = [line for line in metrics.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= 25]
    metrics.write_text("".join(lines))
    group = groups_of(report["cells"])[0]
    assert group.held_out("final_token_loss").shape == (2, 2)
    assert group.spent["updates"].tolist() == [10, 20]
