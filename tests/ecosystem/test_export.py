"""Every head in onnxruntime: the file that scripts/export_onnx.py writes gives the model's outputs at any size."""

import re

import pytest
import torch
import transformers

import export_onnx
from transnormer_hf import TransNormerConfig

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.ecosystem, pytest.mark.cell("ONNX")]

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
def test_the_file_of_each_head_equals_the_model_at_every_size(task, fields, tmp_path, capsys, record_property):
    """The script compares, with padding on either side, and ends with an error above 1e-4."""
    save(tmp_path / "model", task, **fields)
    export_onnx.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "model.onnx")])
    found = re.search(rf"model.onnx: {task}, largest difference from the model (\S+)", capsys.readouterr().out)
    sizes = ", ".join(f"{batch} × {length}" for batch, length in export_onnx.CHECKED_SIZES)
    record_property("measured", f"batch × length: {sizes}")
    record_property("largest difference, relative", float(found[1]))


def test_its_time_grows_less_with_the_length_than_that_of_bert(tmp_path, capsys, record_property):
    save(tmp_path / "model", "feature-extraction", hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
    lengths, ratios = (128, 512, 2048), []
    command = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "model.onnx")]
    export_onnx.main([*command, "--time", *map(str, lengths)])
    output = capsys.readouterr().out
    for length in lengths:
        (line,) = re.findall(rf"^{length} tokens: (.*)", output, re.MULTILINE)
        times = {name: float(milliseconds) for name, milliseconds in re.findall(r"([\w ]+?) (\S+) ms(?:, )?", line)}
        ratios.append(times["onnxruntime"] / times["BERT in onnxruntime"])
        of_torch = times["onnxruntime"] / times["PyTorch"]
        beside = f"{ratios[-1]:.2f} × BERT in onnxruntime, {of_torch:.2f} × PyTorch"
        record_property("measured", f"{length} tokens: {beside}")
    assert ratios[2] < ratios[0]


def test_a_file_of_other_weights_is_found_out(tmp_path, monkeypatch):
    save(tmp_path, "text-classification")
    write = export_onnx.export

    def write_and_change(model, task, path):
        write(model, task, path)
        with torch.no_grad():
            model.classifier.out_proj.bias.add_(0.1)

    monkeypatch.setattr(export_onnx, "export", write_and_change)
    with pytest.raises(SystemExit, match="the file is not the model"):
        export_onnx.main(["--model", str(tmp_path), "--output", str(tmp_path / "model.onnx")])
