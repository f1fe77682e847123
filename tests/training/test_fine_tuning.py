"""What surrounds the Trainer: arguments, the time limit, runs and results on disk."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from transformers import BertConfig, TrainerControl, TrainerState

from transnormer_hf.training import fine_tuning as training

# ---- Results on disk ----


def test_results_are_added_to_those_on_disk(tmp_path):
    training.update_results(tmp_path, {"train_loss": 1.0, "eval_loss": 2.0})
    assert training.update_results(tmp_path, {"eval_loss": 3.0}) == {"train_loss": 1.0, "eval_loss": 3.0}
    assert [path.name for path in tmp_path.iterdir()] == ["all_results.json"]


def test_an_unreadable_results_file_is_kept_aside(tmp_path):
    (tmp_path / "all_results.json").write_text("{half")
    assert training.update_results(tmp_path, {"seed": 1}) == {"seed": 1}
    assert (tmp_path / "all_results.json.unreadable").read_text() == "{half"


# ---- Arguments ----


def test_overrides_are_read_as_json_and_may_hold_commas():
    config = BertConfig()
    text = 'hidden_size=128,hidden_dropout_prob=0.2,hidden_act=relu,id2label={"0": "no", "1": "yes"},is_decoder=False'
    assert training.parse_config_overrides(text, config) == {
        "hidden_size": 128,
        "hidden_dropout_prob": 0.2,
        "hidden_act": "relu",
        "id2label": {"0": "no", "1": "yes"},
        "is_decoder": False,
    }


@dataclass
class Arguments:
    preset: str | None = None
    total_steps: int = field(default=3, metadata={"help": "Updates."})
    is_quiet: bool = True


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--preset", "a"], {"preset": "a"}),
        (["--preset=a"], {"preset": "a"}),
        (["--pre", "b", "--preset", "a"], {"preset": "a"}),
        (["--total_steps", "3"], {"total_steps": 3}),
        (["--total-steps=3"], {"total_steps": 3}),
        (["--no_is_quiet"], {"is_quiet": False}),
        ([], {}),
    ],
)
def test_what_a_command_line_gives_is_known_however_it_is_spelt(argv, expected):
    assert training.given_arguments([Arguments], argv) == expected
    assert training.parse_dataclasses([Arguments], argv, {"total_steps": 5}) == (
        Arguments(**{"total_steps": 5, **expected}),
    )


def test_what_a_json_file_gives_is_known(tmp_path):
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"preset": "a"}))
    assert training.given_arguments([Arguments], [str(file)]) == {"preset": "a"}
    assert training.parse_dataclasses([Arguments], [str(file)], {"total_steps": 5}) == (Arguments("a", 5),)


def test_help_shows_the_defaults_that_hold(capsys):
    with pytest.raises(SystemExit):
        training.parse_dataclasses([Arguments], ["--help"], {"total_steps": 5})
    assert "Updates. (default: 5)" in capsys.readouterr().out


# ---- The time limit ----


def test_training_stops_at_the_limit_and_counts_the_time_before_a_resume(monkeypatch):
    now = iter([0.0, 30.0, 100.0, 129.0, 200.0, 202.0])  # begin and end of each step, in seconds
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock, control = training.TrainingClock(max_minutes=2.0), TrainerControl()
    state = TrainerState(log_history=[{"loss": 1.0, "train_minutes": 1.0}, {"eval_loss": 1.0}])
    clock.on_train_begin(None, state, control)
    stops = []
    for _ in range(3):
        clock.on_step_begin(None, state, control)
        clock.on_step_end(None, state, control)
        stops.append(control.should_training_stop)
    assert stops == [False, False, True]  # after 60 + 30, + 29 and + 2 seconds
    clock.on_log(None, state, control)
    assert state.log_history[-1]["train_minutes"] == pytest.approx(121 / 60)
