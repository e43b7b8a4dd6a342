"""Plots are PNG files, written atomically."""

from jaxtune import picture
from jaxtune.picture import draw_loss, draw_runs

EVAL, TRAIN = {"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.0}


def test_the_picture_is_drawn_whole_and_again(tmp_path):
    draw_loss([], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
    draw_loss([{"step": 0, "eval_loss": 3.0}], tmp_path / "loss.png")
    first = (tmp_path / "loss.png").read_bytes()
    draw_loss([{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": None}], tmp_path / "loss.png")
    second = (tmp_path / "loss.png").read_bytes()
    assert first[:8] == second[:8] == b"\x89PNG\r\n\x1a\n" and first != second
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_the_steps_of_one_point_are_whole_numbers(tmp_path, monkeypatch):
    figure, axes = picture._figure()
    monkeypatch.setattr(picture, "_figure", lambda: (figure, axes))
    draw_loss([{"step": 4, "loss": 2.0}], tmp_path / "loss.png")
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [4]


def test_the_legend_covers_no_line_and_tells_a_best_that_is_not_the_last(tmp_path, monkeypatch):
    for evals, best in (([2.0, 1.0, 3.0], "eval  3.000  (best 1.000 at step 1)"), ([1.0, 2.0, 1.0], "eval  1.000")):
        figure, axes = picture._figure()
        monkeypatch.setattr(picture, "_figure", lambda made=(figure, axes): made)
        draw_loss([{"step": step, "loss": step + 1.0, "eval_loss": value} for step, value in enumerate(evals)], tmp_path / "loss.png")
        monkeypatch.undo()
        legend = axes.get_legend()
        assert legend.get_texts()[1].get_text() == best
        assert legend.get_window_extent().x0 < 480, "a loss that rises to the right has its legend at the left"


def test_runs_in_one_picture(tmp_path):
    """A run without numbers has no line, and without any there is no plot."""
    path = tmp_path / "runs.png"
    draw_runs({"a": [], "b": [{"step": 1, "loss": None}]}, path)
    assert not path.exists()
    pictures = []
    for runs in ({"a": [EVAL, TRAIN]}, {"a": [EVAL, TRAIN], "b": [TRAIN | {"loss": 9.0}, EVAL], "c": []}):
        draw_runs(runs, path)
        pictures.append(path.read_bytes())
    assert all(picture[:8] == b"\x89PNG\r\n\x1a\n" for picture in pictures) and pictures[0] != pictures[1]
