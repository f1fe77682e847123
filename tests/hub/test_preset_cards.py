"""Model cards from a configuration alone: the presets' are up to date, and claim nothing that is not ours or cited."""

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from test_remote_code import tiny_config

import make_model_cards
from transnormer_hf import TransNormerForSequenceClassification
from transnormer_hf.hub.model_card import build_architecture_card, count_parameters

PRESETS = sorted(Path(make_model_cards.PRESETS).glob("*/config.json"))
SECTIONS = ["Results", "How to load", "Intended use and limits", "Training"]
of_each_preset = pytest.mark.parametrize("folder", [path.parent for path in PRESETS], ids=lambda path: path.name)


def test_the_presets_cards_are_up_to_date():
    make_model_cards.main(["--check"])


def test_a_card_out_of_date_is_told_and_not_touched(monkeypatch, tmp_path, capsys):
    folder = tmp_path / PRESETS[0].parent.name
    folder.mkdir()
    (folder / "config.json").write_text(PRESETS[0].read_text())
    (folder / "README.md").write_text("old")
    monkeypatch.setattr(make_model_cards, "PRESETS", tmp_path)
    with pytest.raises(SystemExit, match=r"make_model_cards\.py"):
        make_model_cards.main(["--check"])
    assert "out of date" in capsys.readouterr().out
    assert (folder / "README.md").read_text() == "old"
    make_model_cards.main([])
    assert (folder / "README.md").read_text() == (PRESETS[0].parent / "README.md").read_text()


@of_each_preset
def test_a_presets_card_follows_the_pattern(folder):
    text = (folder / "README.md").read_text()
    is_decoder = "wikitext103" in folder.name
    header, body = re.fullmatch(r"---\n(.*?)\n---\n\n(# .*)", text, re.DOTALL).groups()
    data = yaml.safe_load(header)
    assert set(data) == {"language", "library_name", "license", "model_name", "pipeline_tag", "tags"}
    assert data["pipeline_tag"] == ("text-generation" if is_decoder else "fill-mask")
    assert {"custom_code", "transnormer_hf"} <= set(data["tags"])
    assert re.findall(r"^## (.*)$", body, re.MULTILINE) == SECTIONS
    assert "A configuration, without weights" in body
    assert f"{'155.99' if is_decoder else '124.67'} M parameters (counted by this project" in body
    assert 'revision="COMMIT"' in body
    assert "a branch may change after you looked at it, a commit cannot" in body
    assert "Not trained." in body
    assert "| torch | >=" in body
    assert not re.search(r"\{\{|None|UNVERIFIED|RECALLED", body)


@of_each_preset
def test_a_presets_card_claims_no_result_as_its_own(folder):
    """What the paper reports is cited with its table; the Hub's machine-readable results have nothing of it."""
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.eval_results is None
    results = re.search(r"## Results\n(.*?)\n## ", text, re.DOTALL)[1]
    assert "**These are not figures of this repository.**" in results
    assert f"the paper's, from its Table {4 if 'wikitext103' in folder.name else 5}" in results


@of_each_preset
def test_a_presets_loading_code_does_what_it_says(folder, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    compile(code, "card", "exec")
    monkeypatch.chdir(make_model_cards.ROOT)
    names: dict = {}
    exec(code.partition("\nmodel =")[0], names)  # up to the configuration: the weights would be 0.6 GB
    assert names["config"].variant == folder.name.split("-")[1]


def test_a_saved_model_gets_a_card_from_its_configuration(tmp_path):
    config = tiny_config(id2label={0: "bad", 1: "good"})
    model = TransNormerForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    text = str(build_architecture_card(tmp_path, "user/film"))
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    assert "# film: TransNormer T2" in text
    assert "This model has not been evaluated." in text
    assert "Labels: bad, good." in text
    assert '"user/film",\n    revision="COMMIT"' in text
    assert not re.search(r"\{\{|None", text)
    assert str(tmp_path) not in text
    assert count_parameters(config, "AutoModelForSequenceClassification") == model.num_parameters()
