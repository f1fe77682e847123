"""The plot of training curves: every run is drawn, and nothing else is taken for one."""

import json

import pytest

import plot_training


def write_run(folder, losses):
    folder.mkdir()
    history = [{"step": 5 * n, "loss": loss, "train_minutes": n / 2} for n, loss in enumerate(losses, 1)]
    history.append({"step": 5 * len(losses), "eval_loss": losses[-1], "train_minutes": len(losses) / 2})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (folder / "train_results.json").write_text(json.dumps({"train_tokens": 4000}))
    (folder / "eval_results.json").write_text(json.dumps({"eval_loss": losses[-1]}))
    return folder


def test_runs_are_drawn_over_time_and_tokens(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    first, second = write_run(tmp_path / "a", [5.0, 4.0, 3.0]), write_run(tmp_path / "b", [6.0, 5.5])
    plot_training.main(["--runs", f"T1={first}", f"T2={second}", "--output", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    by_minute, by_token = figures[-1].axes
    assert [text.get_text() for text in by_minute.get_legend().get_texts()] == [
        "T1, validation 3.000",
        "T2, validation 5.500",
    ]
    assert by_minute.lines[0].get_xdata().tolist() == [0.5, 1.0, 1.5]
    assert by_token.lines[0].get_xdata()[-1] == pytest.approx(4000)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    plot_training.main(["--runs", f"T1={first}", "--over", "tokens", "--output", str(tmp_path / "curves.png")])
    (only,) = figures[-1].axes
    assert only.lines[0].get_xdata()[-1] == pytest.approx(4000)


def test_smoothing_keeps_a_constant_and_lags_behind_a_step():
    assert plot_training.smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert plot_training.smooth([0.0, 1.0], share=0.5) == pytest.approx([0.0, 2 / 3])


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        ("folder", ValueError, r"--runs folder must have the form NAME=FOLDER"),
        ("A=folder", FileNotFoundError, r"--runs folder: no trainer_state\.json, so this is not the folder"),
    ],
)
def test_what_is_no_run_is_refused(run, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        plot_training.main(["--runs", run, "--output", "curves.png"])
