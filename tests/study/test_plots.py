"""Pictures of runs: drawn from the folders alone, with labels that can be read."""

import json
import struct
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from dist_train.errors import UserError
from dist_train.study import plots
from dist_train.study.measures import smooth
from dist_train.study.plots import plot_comparison, plot_loss


def write_run(folder: Path, level: float, n_updates: int = 40) -> Path:
    """Write the metrics of a run whose held-out losses fall to `level`."""
    lines: list[dict[str, object]] = []
    for step in range(n_updates + 1):
        loss = level + 2 * float(np.exp(-step / 10))
        if step % 10 == 0:
            lines.append({"kind": "eval", "step": step, "final_token_loss": loss, "all_token_loss": loss + 0.5})
        lines.append({"kind": "train", "step": step, "loss": loss, "last_k": 1})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_plot_loss_writes_into_the_run_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2.0)
    picture = plot_loss(run)
    assert picture == run / "plots" / "loss.png"
    assert min(png_size(picture)) > 400


def test_an_untrained_run_can_be_drawn_and_no_run_is_a_mistake(tmp_path: Path) -> None:
    assert plot_loss(write_run(tmp_path / "run", 2.0, n_updates=0)).exists()
    with pytest.raises(UserError, match="is no run folder"):
        plot_loss(tmp_path)


@pytest.mark.parametrize("n_objectives", [1, 3, 9])
def test_a_comparison_draws_a_line_for_each_setting_and_none_for_seeds(
    tmp_path: Path, n_objectives: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {
            "settings": {"loss.last_k": k, "run.seed": seed},
            "folder": str(write_run(tmp_path / f"{k}-{seed}", level=2 + k / 10 + seed / 50)),
        }
        for k in range(1, n_objectives + 1)
        for seed in (1, 2)
    ]
    figures: list[Figure] = []
    save = plots._save

    def keep_and_save(figure: Figure, target: Path) -> Path:
        figures.append(figure)
        return save(figure, target)

    monkeypatch.setattr(plots, "_save", keep_and_save)
    assert min(png_size(plot_comparison(rows, tmp_path / "compare.png"))) > 400
    for axes, above in zip(figures[0].axes, (0.0, 0.5), strict=True):
        lines = axes.get_lines()
        assert [line.get_label() for line in lines] == [f"last_k={k}" for k in range(1, n_objectives + 1)]
        # The mean of both seeds, without the untrained network that is the same for all.
        assert np.asarray(lines[0].get_xdata()).tolist() == [10, 20, 30, 40]
        assert np.asarray(lines[0].get_ydata())[-1] == pytest.approx(2.1 + 0.03 + above + 2 * np.exp(-4))
        band = axes.collections[0].get_datalim(axes.transData).intervaly
        assert band == pytest.approx([2.12 + above + 2 * np.exp(-4), 2.14 + above + 2 * np.exp(-1)])
        assert (axes.get_legend() is None) == (n_objectives <= 6)
        assert axes.get_xlabel() == "updates"


def test_labels_of_lines_that_end_together_are_moved_apart() -> None:
    figure, axes = plt.subplots()
    for number in range(4):
        axes.plot([0, 1], [number, 5.0], label=str(number))
    plots._label_ends(axes)
    heights = sorted(text.xy[1] for text in axes.texts if isinstance(text, Annotation))
    plt.close(figure)
    assert len(heights) == 4
    assert min(np.diff(heights)) > 0.04 * 5


def test_smoothing_keeps_lines_and_averages_noise() -> None:
    np.testing.assert_allclose(smooth(np.full(7, 3.0), 5), 3.0)
    np.testing.assert_allclose(smooth(np.arange(9.0), 3)[1:-1], np.arange(1.0, 8.0))
    assert smooth(np.array([1.0]), 5) == [1.0]
