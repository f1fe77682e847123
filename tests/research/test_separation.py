"""scripts/separation.py: the measurement agrees with the closed form, and a model that can attend learns to."""

import json

import pytest

import separation


def test_measurement_is_the_closed_form(tmp_path):
    report = separation.main(["--lengths", "100", "1000", "100000", "--output_dir", str(tmp_path)])
    assert len(report["planted"]) == 3 * 2
    for row in report["planted"]:
        for kind in ("marked", "unmarked"):
            assert row[kind]["measured"] == pytest.approx(row[kind]["closed_form"], rel=1e-9)
        assert row["separates"] == (row["attention"] == "softmax")
    by_hand = {(row["n"], row["attention"]): row["marked"]["measured"] for row in report["planted"]}
    assert by_hand[100, "softmax"] == pytest.approx(100**1.2 / (100**1.2 + 99))
    assert by_hand[100, "linear"] == pytest.approx(1.3 / (1.3 + 99 * 0.1))
    assert json.loads((tmp_path / "separation.json").read_text()) == report
    assert "| 100 | softmax | 0.7" in (tmp_path / "separation.md").read_text()


def test_few_tokens_are_separated_by_linear_attention_as_well():
    rows = separation.planted_rows([10])
    assert [row["separates"] for row in rows] == [True, True]


@pytest.mark.parametrize("name", ["t1", "t2", "softmax", "lln_diag", "flash", "transformer_ls", "linformer"])
def test_every_model_trains(name, monkeypatch):
    monkeypatch.setattr(separation, "draw_texts", lambda count, n, g, draw=separation.draw_texts: draw(8, n, g))
    row = separation.train_row(name, 12, steps=10, seed=0)
    assert row["model"] == name
    assert row["explained"] < 1


def test_an_interrupted_training_keeps_its_rows_and_goes_on(tmp_path, monkeypatch):
    trained = []

    def train_row(name, n, steps, seed):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((name, seed))
        return {"model": name, "n": n, "steps": steps, "seed": seed, "explained": 0.5 + seed / 10}

    monkeypatch.setattr(separation, "train_row", train_row)
    arguments = ["--lengths", "10", "--train", "--train_lengths", "64", "--models", "t1", "--output_dir", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        separation.main([*arguments, "--seeds", "0", "1", "2"])
    assert "| t1 | 64 | 1000 | 0.550 | 0: 0.500, 1: 0.600 |" in (tmp_path / "separation.md").read_text()
    trained.clear()
    separation.main([*arguments, "--seeds", "0", "1", "2"])
    assert trained == [("t1", 2)]
    assert "| t1 | 64 | 1000 | 0.600 | 0: 0.500, 1: 0.600, 2: 0.700 |" in (tmp_path / "separation.md").read_text()


@pytest.mark.slow
def test_softmax_learns_to_find_the_token():
    assert separation.train_row("softmax", 16, steps=1000, seed=0)["explained"] > 0.5


def test_bad_arguments_are_named(capsys):
    for arguments, expected in (
        (["--models", "mamba"], "no such model; choose from t1, t2"),
        (["--lengths", "1"], "--lengths 1: a text has at least 2 tokens"),
        (["--steps", "3"], "--steps 3: must be at least 10"),
    ):
        with pytest.raises(SystemExit):
            separation.main(arguments)
        assert expected in capsys.readouterr().err
