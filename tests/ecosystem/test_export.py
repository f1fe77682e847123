"""Every head in onnxruntime: the file that scripts/export_onnx.py writes gives the model's outputs at any size."""

import pytest
import torch
import transformers

import export_onnx
from transnormer_hf import TransNormerConfig

pytestmark = pytest.mark.ecosystem

DIAG, NORM = "chunked_attention", "linear_attention"


def save(folder, task, **fields):
    defaults = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "block_size": 64}
    defaults |= {"position_embedding": "sinusoidal", "initializer_range": 0.2, "num_labels": 3}
    auto_class = getattr(transformers, export_onnx.TASKS[task])
    auto_class.from_config(TransNormerConfig(**defaults | fields)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("feature-extraction", {"variant": "t1"}),
        ("feature-extraction", {"layer_types": ["hybrid", "full_attention"]}),
        ("fill-mask", {"variant": "t2", "position_embedding": "learned", "max_position_embeddings": 700}),
        ("text-classification", {"pooling": "mean", "norm_type": "rms"}),
        ("token-classification", {"variant": "t1", "type_vocab_size": 2}),
        ("question-answering", {}),
        ("multiple-choice", {"pooling": "last"}),
        ("text-generation", {"variant": "t1"}),
    ],
)
def test_the_file_of_each_head_equals_the_model_at_every_size(task, fields, tmp_path, capsys):
    """The script compares, with padding on either side, and ends with an error above 1e-4."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    save(tmp_path / "model", task, **fields)
    export_onnx.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "model.onnx")])
    assert f"model.onnx: {task}, largest difference" in capsys.readouterr().out


def test_a_file_of_other_weights_is_found_out(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    save(tmp_path, "text-classification")
    write = export_onnx.export

    def write_and_change(model, task, path):
        write(model, task, path)
        with torch.no_grad():
            model.classifier.out_proj.bias.add_(0.1)

    monkeypatch.setattr(export_onnx, "export", write_and_change)
    with pytest.raises(SystemExit, match="the file is not the model"):
        export_onnx.main(["--model", str(tmp_path), "--output", str(tmp_path / "model.onnx")])
