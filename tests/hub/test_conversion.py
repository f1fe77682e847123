"""What the converter refuses, and that it leaves nothing half-written. That it converts rightly is test_golden.py's."""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_golden import Golden
from transformers import AutoModelForMaskedLM, AutoTokenizer

from transnormer_hf.hub.conversion import ConversionError, convert_checkpoint, read_state_dict

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("mlm_t2")


def save(path: Path, state_dict: dict, **more) -> Path:
    torch.save({"model": state_dict, **more}, path)
    return path


def test_tied_copies_version_marks_and_options_are_accepted(golden, tmp_path):
    embedding = golden.weights["encoder.sentence_encoder.embed_tokens.weight"]
    extra = {"encoder.lm_head.weight": embedding.clone(), "encoder.sentence_encoder.version": torch.tensor([3.0])}
    checkpoint = save(tmp_path / "model.pt", golden.weights | extra, args=argparse.Namespace(arch="x"), epoch=3)
    convert_checkpoint(checkpoint, tmp_path / "out", golden.config())
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.decoder.weight, embedding)


def without(name: str):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


LAYER = "encoder.sentence_encoder.layers.0"


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (without(f"{LAYER}.glu.l2.weight"), {}, "missing: model.layers.0.feed_forward.up_proj.weight (85, 32)"),
        (
            lambda weights: weights | {f"{LAYER}.extra.weight": torch.ones(2)},
            {},
            f"left over: {LAYER}.extra.weight (2,)",
        ),
        (
            lambda weights: weights | {f"{LAYER}.glu.l2.bias": torch.ones(3)},
            {},
            f"wrong shape: {LAYER}.glu.l2.bias is (3,), the model has (85,)",
        ),
        (lambda weights: weights | {"encoder.lm_head.weight": torch.ones(61, 32)}, {}, "not tied to embed_tokens"),
        (lambda weights: weights, {"num_hidden_layers": 3, "layer_types": None}, "missing: model.layers.2."),
        (lambda weights: weights, {"lrpe": False}, "left over: encoder.sentence_encoder.layers.0.self_attn.urpe.theta"),
        (lambda weights: weights, {"vocab_size": 60}, "embed_tokens.weight is (61, 32), the model has (60, 32)"),
        (lambda weights: weights, {"is_causal": True}, "holds an encoder (bidirectional)"),
        (lambda weights: {"a": 1}, {}, "with a tensor per name"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_a_list(golden, tmp_path, change, overrides, message):
    checkpoint = save(tmp_path / "model.pt", change(golden.weights))
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(checkpoint, tmp_path / "out", golden.config(**overrides))
    assert message in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"model": Evil()}, tmp_path / "model.pt")
    with pytest.raises(ConversionError, match="cannot be read"):
        read_state_dict(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


def test_an_existing_folder_is_left_alone(golden, tmp_path):
    checkpoint = save(tmp_path / "model.pt", golden.weights)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="output_dir"):
        convert_checkpoint(checkpoint, tmp_path / "out", golden.config())
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_failure_while_writing_leaves_nothing_behind(golden, tmp_path, monkeypatch):
    conversion = importlib.import_module("transnormer_hf.hub.conversion")
    checkpoint = save(tmp_path / "model.pt", golden.weights)

    def fail(self, folder):
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(conversion.TransNormerForMaskedLM, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_checkpoint(checkpoint, tmp_path / "out", golden.config())
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_a_missing_file_is_named(golden, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint='.*nowhere.pt' is not a file"):
        convert_checkpoint(tmp_path / "nowhere.pt", tmp_path / "out", golden.config())


def test_the_script_converts_and_saves_the_tokenizer(golden, tmp_path):
    from test_remote_code import word_tokenizer

    checkpoint = save(tmp_path / "model.pt", golden.weights)
    golden.config().save_pretrained(tmp_path / "config")
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, ROOT / "scripts" / "convert_fairseq_checkpoint.py", "--checkpoint", checkpoint]
    options = ["--config", tmp_path / "config", "--tokenizer", tmp_path / "tokenizer", "--hidden_act", "silu"]
    result = subprocess.run(
        [*map(str, command), "--output_dir", str(tmp_path / "out"), *map(str, options)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "parameters written to" in result.stdout
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.config.hidden_act == "silu"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 11

    again = subprocess.run(
        [*map(str, command), "--output_dir", str(tmp_path / "out"), *map(str, options)], capture_output=True, text=True
    )
    assert again.returncode == 1
    assert "error: output_dir=" in again.stderr
