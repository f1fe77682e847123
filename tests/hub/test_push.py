"""The way to the Hub and back, against a real HTTP server on loopback (hub_server.py)."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import save_file
from test_remote_code import SHIPPED, tiny_config, word_tokenizer
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import push_to_hub as script
from transnormer_hf import TransNormerForCausalLM, TransNormerForSequenceClassification, __version__
from transnormer_hf.hub import push as hub
from transnormer_hf.hub.push import HubError, load_metric_table, plan_upload, push_model, push_to_hub
from transnormer_hf.hub.staging import replace_code, shipped_code
from transnormer_hf.model.configuration_transnormer import AUTO_MAP

REPO = "user/film"
TEXT = "the film is good"
TAG = f"v{__version__}"
CARD = """---
language: en
model-index:
- name: out
  results:
  - task:
      type: text-classification
    dataset:
      type: nyu-mll/glue
      name: GLUE SST-2
      config: sst2
      split: validation
    metrics:
    - type: accuracy
      name: Accuracy
      value: 0.8139
---

# out

```python
classifier = pipeline("text-classification", model="out", revision="COMMIT", trust_remote_code=True)
```
"""


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory) -> Path:
    """What a run of the Trainer leaves: a model with its code and tokenizer, a card, results, and much else."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    torch.manual_seed(0)
    model = TransNormerForSequenceClassification(tiny_config(id2label={0: "bad", 1: "good"}))
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "all_results.json").write_text('{"eval_accuracy": 0.8139}')
    torch.save(
        TrainingArguments(output_dir=str(folder), hub_token=WRITE_TOKEN, learning_rate=3e-4, use_cpu=True),
        folder / "training_args.bin",
    )
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"state")
    (folder / "runs").mkdir()
    for name in ("optimizer.pt", "trainer_state.json", "train.log", "SST-2.tsv"):
        (folder / name).write_text("left behind")
    return folder


@pytest.fixture
def model_dir(saved_model, tmp_path) -> Path:
    return Path(shutil.copytree(saved_model, tmp_path / "out"))


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub that this process talks to, with a token that may write. Waiting takes no time."""
    from transformers.utils import hub as transformers_hub

    with HubServer() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield running


@pytest.fixture
def unchecked(monkeypatch):
    """Without the clean process, which takes seconds and which two tests go through."""
    monkeypatch.setattr(hub, "check_remote_code", lambda folder: {})


# ---- There and back ----


def load_in_a_fresh_process(server: HubServer, revision: str, home: Path, **environment: str) -> dict:
    """Nothing but HF_ENDPOINT: no package, no cache, no token."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRITON"))}
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("hub_probe.py"), REPO, revision, TEXT],
        check=False,
        capture_output=True,
        text=True,
        env={**known, "HF_ENDPOINT": server.url, "HF_HOME": str(home), **environment},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_what_is_pushed_loads_and_answers_the_same_in_a_fresh_process(server, model_dir, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in model_dir.iterdir() if path.is_file()}
    script.main(["--model_dir", str(model_dir), "--repo_id", REPO])
    printed = "".join(capsys.readouterr())
    repository = server.repositories[REPO]
    commit = repository.branches["main"]
    assert f"/{REPO}/commit/{commit}" in printed
    assert repository.tags == {TAG: commit}
    assert len(repository.commits) == 2  # that of the creation and one

    model = AutoModelForSequenceClassification.from_pretrained(model_dir)
    with torch.no_grad():
        inputs = word_tokenizer()(TEXT, return_tensors="pt", return_token_type_ids=False)
        logits = model.eval()(**inputs).logits
    # whatever happens to the branch afterwards, the pinned commit stays what was read
    changed = {"path_or_fileobj": b"raise RuntimeError('other code')", "path_in_repo": "modeling_transnormer.py"}
    HfApi(endpoint=server.url).upload_file(**changed, repo_id=REPO)
    loaded = load_in_a_fresh_process(server, commit, tmp_path / "home")
    assert loaded["imported"] == []
    assert loaded["module"].startswith("transformers_modules")
    torch.testing.assert_close(torch.tensor(loaded["logits"]), logits, rtol=0, atol=1e-6)
    (answer,) = loaded["pipeline"]
    probabilities = logits.softmax(-1)[0]
    assert answer["label"] == ["bad", "good"][int(probabilities.argmax())]
    assert answer["score"] == pytest.approx(probabilities.max().item(), abs=1e-6)

    # the token is nowhere: not printed, not in the repository, not in what was there before
    published = b"".join(server.files(REPO, commit).values())
    assert WRITE_TOKEN not in printed
    assert WRITE_TOKEN.encode() not in published
    assert {path.name: path.read_bytes() for path in model_dir.iterdir() if path.is_file()} == before


def test_the_repository_holds_all_of_the_model_and_nothing_else(server, model_dir, unchecked):
    push_to_hub(model_dir, REPO)
    files = server.files(REPO)
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    expected = {"config.json", "model.safetensors", "README.md", "all_results.json", "training_args.json", *SHIPPED}
    assert set(files) == expected | tokenizer | {".gitattributes"}
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    arguments = json.loads(files["training_args.json"])
    assert arguments["learning_rate"] == 3e-4
    assert not {"hub_token", "output_dir"} & set(arguments)
    assert str(model_dir) not in files["training_args.json"].decode()


def test_the_card_gets_what_loading_needs_and_keeps_what_it_says(server, model_dir, unchecked):
    push_to_hub(model_dir, REPO)
    card = ModelCard(server.files(REPO)["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-classification"
    assert {"custom_code", "transnormer_hf"} <= set(card.data.tags)
    assert card.data.language == "en"
    assert f'model="{REPO}", revision="COMMIT"' in card.text


@pytest.mark.parametrize("source", ["the repository", "the folder"])
def test_results_are_read_back(server, model_dir, unchecked, source):
    push_to_hub(model_dir, REPO)
    (row,) = load_metric_table(REPO, revision=TAG) if source == "the repository" else load_metric_table(model_dir)
    assert row == {
        "task": "text-classification",
        "dataset": "nyu-mll/glue",
        "config": "sst2",
        "split": "validation",
        "metric": "accuracy",
        "name": "Accuracy",
        "value": 0.8139,
        "args": None,
    }


def test_a_model_without_figures_has_an_empty_table(server, model_dir, unchecked):
    (model_dir / "README.md").unlink()
    push_to_hub(model_dir, REPO)
    assert load_metric_table(REPO) == []


def test_a_private_repository_is_one(server, model_dir, unchecked):
    push_to_hub(model_dir, REPO, private=True)
    assert server.repositories[REPO].is_private
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        HfApi(endpoint=server.url, token=False).model_info(REPO)


def test_private_is_not_forgotten_where_the_repository_is_public(server, model_dir, unchecked):
    HfApi(endpoint=server.url).create_repo(REPO)
    with pytest.raises(ValueError, match="exists and is public"):
        push_to_hub(model_dir, REPO, private=True)
    assert set(server.files(REPO)) == {".gitattributes"}


def test_a_branch_is_pushed_to_and_main_stays(server, model_dir, unchecked):
    done = push_to_hub(model_dir, REPO, revision="try")
    assert set(server.files(REPO)) == {".gitattributes"}
    assert "model.safetensors" in server.files(REPO, "try")
    assert done.commit.oid == server.repositories[REPO].branches["try"]


def test_a_pull_request_changes_nothing_until_it_is_merged(server, model_dir, unchecked):
    done = push_to_hub(model_dir, REPO, create_pr=True)
    assert done.pull_request.endswith("/discussions/1")
    assert done.tag is None
    assert set(server.files(REPO)) == {".gitattributes"}
    assert "model.safetensors" in server.files(REPO, "refs/pr/1")
    assert server.repositories[REPO].tags == {}


def test_every_version_gets_a_tag_of_its_own(server, model_dir, unchecked):
    first = push_to_hub(model_dir, REPO)
    again = push_to_hub(model_dir, REPO)  # nothing has changed: neither commit nor tag
    assert (again.commit.oid, again.tag) == (first.commit.oid, first.tag)
    (model_dir / "all_results.json").write_text("{}")
    second = push_to_hub(model_dir, REPO)
    assert [first.tag, second.tag] == [TAG, f"{TAG}-1"]
    assert server.repositories[REPO].tags == {TAG: first.commit.oid, f"{TAG}-1": second.commit.oid}


def test_weights_that_were_replaced_go_with_the_same_commit(server, model_dir, unchecked):
    """`from_pretrained` would prefer an old model.safetensors to new shards."""
    push_to_hub(model_dir, REPO)
    model = AutoModelForSequenceClassification.from_pretrained(model_dir)
    (model_dir / "model.safetensors").unlink()
    model.save_pretrained(model_dir, max_shard_size="10KB")
    shards = {path.name for path in model_dir.glob("model-*.safetensors")}
    assert len(shards) > 1
    push_to_hub(model_dir, REPO)
    weights = {name for name in server.files(REPO) if name.startswith("model") and not name.endswith(".py")}
    assert weights == shards | {"model.safetensors.index.json"}
    assert len(server.repositories[REPO].commits) == 3


def test_xet_out_of_reach_falls_back_to_lfs(server, model_dir, unchecked, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    push_to_hub(model_dir, REPO)
    assert server.files(REPO)["model.safetensors"] == (model_dir / "model.safetensors").read_bytes()
    if huggingface_hub.__version__.startswith("2."):
        assert server.count("GET", "/xet-write-token/") >= 1
    assert constants.HF_HUB_DISABLE_XET is False


# ---- Code of an older layout ----


def test_replacing_code_brings_a_folder_to_this_layout(model_dir, tmp_path):
    """What differs is written, what is gone from the package removed; links are replaced, not written through."""
    (model_dir / "old_transnormer.py").write_text("old")
    (model_dir / "modeling_transnormer.py").unlink()
    original = tmp_path / "original.py"
    original.write_text("mine")
    (model_dir / "configuration_transnormer.py").unlink()
    (model_dir / "configuration_transnormer.py").symlink_to(original)
    written, removed = replace_code(model_dir)
    assert written == ["configuration_transnormer.py", "modeling_transnormer.py"]
    assert removed == ["old_transnormer.py"]
    assert original.read_text() == "mine"
    assert [path.name for path in shipped_code()] == SHIPPED
    assert {path.name: path.read_bytes() for path in model_dir.glob("*_transnormer.py")} == {
        path.name: path.read_bytes() for path in shipped_code()
    }
    assert replace_code(model_dir) == ([], [])


# ---- Models and the Trainer push by themselves ----


def assert_complete(files: dict[str, bytes]) -> None:
    assert {"config.json", "model.safetensors", "README.md", *SHIPPED} <= set(files)
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    card = ModelCard(files["README.md"].decode())
    assert "custom_code" in card.data.tags
    assert card.data.library_name == "transformers"


def test_the_push_of_transformers_gives_a_repository_that_loads(server):
    TransNormerForCausalLM(tiny_config()).push_to_hub(REPO)
    assert_complete(server.files(REPO))


def test_a_model_pushes_a_complete_repository(server, unchecked):
    model = TransNormerForCausalLM(tiny_config())
    commit = push_model(model, "film", private=True, commit_message="A first try", tags="films")
    assert_complete(server.files(REPO))
    repository = server.repositories[REPO]
    assert repository.is_private
    assert repository.commits[commit.oid].message == "A first try"
    card = server.files(REPO)["README.md"].decode()
    assert "films" in ModelCard(card).data.tags
    assert f'"{REPO}",\n    revision="COMMIT"' in card
    assert "This model has not been evaluated." in card

    tuned = server.files(REPO)["README.md"].decode().replace("has not been evaluated", "was read by many")
    HfApi(endpoint=server.url).upload_file(path_or_fileobj=tuned.encode(), path_in_repo="README.md", repo_id=REPO)
    push_model(model, REPO)
    assert "was read by many" in server.files(REPO)["README.md"].decode()


def test_the_trainer_pushes_a_complete_repository(server, tmp_path):
    rows = [{"input_ids": [2, 5, 6, 3], "labels": 0}] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "film"),
        push_to_hub=True,
        max_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = TransNormerForSequenceClassification(tiny_config())
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=word_tokenizer())
    trainer.train()
    trainer.push_to_hub()
    assert_complete(server.files(REPO))
    assert "tokenizer.json" in server.files(REPO)


# ---- Folders of sentence-transformers ----


@pytest.fixture
def sentence_dir(model_dir) -> Path:
    """The folder as sentence-transformers 6 writes it, with a projection after the pooling."""
    paths = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    listed = [{"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
              for index, (path, kind) in enumerate(paths.items())]  # fmt: skip
    (model_dir / "modules.json").write_text(json.dumps(listed))
    for name in ("config_sentence_transformers.json", "sentence_bert_config.json"):
        (model_dir / name).write_text("{}")
    for path in list(paths)[1:]:
        (model_dir / path).mkdir()
        (model_dir / path / "config.json").write_text(json.dumps({"of": path}))
    save_file({"linear.weight": torch.eye(2)}, model_dir / "2_Dense" / "model.safetensors", {"format": "pt"})
    text = (model_dir / "README.md").read_text()
    (model_dir / "README.md").write_text(f'{text}\nSentenceTransformer("sentence_transformers_model_id")\n')
    return model_dir


def test_a_sentence_transformer_is_pushed_with_its_modules(server, sentence_dir, unchecked):
    push_to_hub(sentence_dir, REPO)
    files = server.files(REPO)
    modules = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "3_Normalize/config.json"}
    assert modules | {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"} <= set(files)
    for name in modules:
        assert files[name] == (sentence_dir / name).read_bytes()
    assert f'SentenceTransformer("{REPO}", trust_remote_code=True)' in files["README.md"].decode()
    assert "checkpoint-4/model.safetensors" not in files
    plan = plan_upload(sentence_dir, REPO)
    assert modules <= set(plan.files)
    assert not {"1_Pooling/", "2_Dense/"} & set(plan.left_out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "2_Dense" / "pytorch_model.bin").touch(), "2_Dense/pytorch_model.bin belongs to"),
        (lambda folder: (folder / "1_Pooling").rename(folder / "pooling"), "modules.json names '1_Pooling'"),
        (lambda folder: edit("modules.json", '"1_Pooling"', '"/1_Pooling"')(folder), "names '/1_Pooling'"),
        (lambda folder: (folder / "model_head.pkl").touch(), "SetFit's own push_to_hub"),
    ],
)
def test_a_module_that_cannot_be_published_is_refused_by_name(server, sentence_dir, change, message):
    change(sentence_dir)
    with pytest.raises(ValueError, match=message):
        push_to_hub(sentence_dir, REPO)
    assert server.requests == []


def test_a_secret_in_a_module_is_refused(server, sentence_dir):
    (sentence_dir / "1_Pooling" / "config.json").write_text(json.dumps({"token": "hf_" + "a1" * 17}))
    with pytest.raises(ValueError, match=r"1_Pooling/config.json, line 1, contains .* a Hugging Face token"):
        push_to_hub(sentence_dir, REPO)
    assert server.requests == []


# ---- What is refused, before anything is sent ----


def test_a_dry_run_lists_every_file_and_sends_nothing(server, model_dir, unchecked, capsys):
    script.main(["--model_dir", str(model_dir), "--repo_id", REPO, "--dry_run"])
    printed = capsys.readouterr().out
    assert server.requests == []
    sizes = {name: int(size.replace(",", "")) for size, name in re.findall(r"^ *([\d,]+)  ([\w.-]+)$", printed, re.M)}
    assert sizes["model.safetensors"] == (model_dir / "model.safetensors").stat().st_size
    assert {"config.json", "README.md", "training_args.json", *SHIPPED} <= set(sizes)
    left_out = dict(re.findall(r"left out  (\S+) \((.*)\)$", printed, re.M))
    assert left_out["checkpoint-4/"] == "a checkpoint of the training"
    assert left_out["optimizer.pt"] == "the optimizer's state"
    assert left_out["runs/"] == left_out["train.log"] == left_out["trainer_state.json"] == "a log"
    assert left_out["SST-2.tsv"] == "not a file of a model"
    assert "training_args.bin" in left_out
    metadata = json.loads(printed.partition("Metadata of the card:\n")[2].partition("Loads by")[0])
    assert metadata["pipeline_tag"] == "text-classification"
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.8139


def test_a_pickle_of_unknown_classes_is_neither_run_nor_sent(model_dir, unchecked):
    torch.save({"path": Path("x")}, model_dir / "training_args.bin")
    plan = plan_upload(model_dir, REPO)
    assert "pathlib" in plan.left_out["training_args.bin"]
    assert "training_args.json" not in plan.files


@pytest.mark.parametrize("name", [".env", "sub/.env.local", "server.pem", "id_rsa", ".netrc"])
def test_files_of_secrets_are_refused(server, model_dir, name):
    (model_dir / name).parent.mkdir(exist_ok=True)
    (model_dir / name).write_text("x")
    with pytest.raises(ValueError, match=re.escape(name)):
        push_to_hub(model_dir, REPO)
    assert server.requests == []


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("README.md", "hf_" + "Ab1" * 12),
        ("all_results.json", "ghp_" + "Ab1" * 12),
        ("configuration_transnormer.py", "AKIA" + "ABCDEFGH12345678"),
        ("tokenizer_config.json", "sk-" + "Ab1_" * 11),
        ("README.md", "-----BEGIN RSA " + "PRIVATE KEY-----"),
        ("README.md", "my-own-token-of-no-known-form"),
    ],
)
def test_secrets_in_texts_are_refused_and_not_repeated(server, model_dir, monkeypatch, name, secret):
    monkeypatch.setenv("HF_TOKEN", "my-own-token-of-no-known-form")
    with (model_dir / name).open("a") as file:
        file.write(f"\n# {secret}\n")
    with pytest.raises(ValueError, match=rf"{name}, line \d+, contains what looks like") as raised:
        push_to_hub(model_dir, REPO)
    assert secret not in str(raised.value)
    assert server.requests == []


def remove(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def edit(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("config.json"), "has no config.json"),
        (remove("model.safetensors"), "lacks model.safetensors"),
        (lambda folder: (folder / "model.safetensors.index.json").touch(), "holds the weights twice"),
        (remove("modeling_transnormer.py"), "lacks modeling_transnormer.py"),
        (edit("config.json", "modeling_transnormer.TransNormerModel", "elsewhere.Model"), "lacks auto_map in config"),
        (edit("config.json", '"transnormer_hf"', '"bert"'), "publish it with its own push_to_hub"),
        (edit("README.md", "language: en", "language: [en"), "metadata are not valid"),
        (edit("README.md", "language: en", "base_model: /data/base"), "'/data/base' is not a name on the Hub"),
        (edit("README.md", "language: en", "tags: one"), "tags must be a list"),
        (edit("README.md", "value: 0.8139", "value: high"), "'high' of accuracy in model-index is not a number"),
        (edit("README.md", "    dataset:", "    dates:"), "metadata are not valid"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_an_incomplete_folder_is_refused(server, model_dir, change, message):
    change(model_dir)
    with pytest.raises(ValueError, match=message):
        push_to_hub(model_dir, REPO)
    assert server.requests == []


def test_an_adapter_is_told_what_to_do(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"merge_and_unload\(\)"):
        push_to_hub(tmp_path, REPO)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo_id": "film"}, "must be of the form user/name"),
        ({"revision": "try", "create_pr": True}, "leave revision='try' out"),
        ({"revision": "a" * 40}, "must be the name of a branch"),
        ({"model_dir": "nowhere"}, "'nowhere' is not a folder"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(model_dir, arguments, message):
    with pytest.raises(ValueError, match=message):
        push_to_hub(**{"model_dir": model_dir, "repo_id": REPO, **arguments})


@pytest.mark.slow
def test_a_folder_that_does_not_load_by_remote_code_is_refused(server, model_dir):
    edit("cache_transnormer.py", "import torch", "import transnormer_hf, torch")(model_dir)
    with pytest.raises(ValueError, match=r"does not load by remote code .*transnormer_hf"):
        push_to_hub(model_dir, REPO)
    assert server.requests == []


@pytest.mark.slow
def test_weights_that_do_not_fit_are_refused(server, model_dir):
    edit("config.json", '"hidden_size": 16', '"hidden_size": 32')(model_dir)
    with pytest.raises(ValueError, match="does not load by remote code"):
        push_to_hub(model_dir, REPO)
    assert server.requests == []


# ---- Faults: each is survived, or told clearly, and the old revision stays whole ----

TREE, COMMIT, TAGGING = "/api/models/.*", "/commit/", "/tag/"
SURVIVED = {
    "creation answered 503": lambda server: server.fail("POST", "/repos/create", status=503, times=2),
    "creation answered 500 twice": lambda server: server.fail("POST", "/repos/create", status=500, times=2),
    "creation cut": lambda server: server.cut("POST", "/repos/create"),
    "creation done, answer lost": lambda server: server.lose_answer("POST", "/repos/create"),
    "card's check answered 502": lambda server: server.fail("POST", "/validate-yaml", status=502),
    "preupload answered 503": lambda server: server.fail("POST", "/preupload/", status=503, times=2),
    "preupload cut": lambda server: server.cut("POST", "/preupload/"),
    "LFS batch answered 500": lambda server: server.fail("POST", "/objects/batch", status=500),
    "LFS upload answered 500": lambda server: server.fail("PUT", "/lfs/", status=500, times=3),
    "LFS upload cut half-way": lambda server: server.cut("PUT", "/lfs/", times=2),
    "LFS upload done, answer lost": lambda server: server.lose_answer("PUT", "/lfs/"),
    "commit answered 429 with Retry-After": lambda server: server.fail("POST", COMMIT, status=429, Retry_After="7"),
    "commit answered 500": lambda server: server.fail("POST", COMMIT, status=500),
    "commit answered 503": lambda server: server.fail("POST", COMMIT, status=503, times=3),
    "commit answered 409": lambda server: server.fail("POST", COMMIT, status=409),
    "commit answered 412": lambda server: server.fail("POST", COMMIT, status=412),
    "commit cut half-way": lambda server: server.cut("POST", COMMIT),
    "commit done, answer lost": lambda server: server.lose_answer("POST", COMMIT),
    "list of tags cut": lambda server: server.cut("GET", "/refs"),
    "tag answered 503": lambda server: server.fail("POST", TAGGING, status=503),
    "tag cut": lambda server: server.cut("POST", TAGGING),
    "tag set, answer lost": lambda server: server.lose_answer("POST", TAGGING),
}
FOREVER = 1000
TOLD = {
    "writing refused, 401": (
        lambda server: server.fail("POST", "/(repos|models)/", status=401, times=FOREVER),
        "does not know this token",
    ),
    "writing refused, 403": (
        lambda server: server.fail("POST", "/(repos|models)/", status=403, times=FOREVER),
        "may not write to user/film",
    ),
    "no answer but 500": (
        lambda server: server.fail("POST", "/repos/create", status=500, times=FOREVER),
        "the Hub fails (status 500)",
    ),
    "preupload refused, 403": (
        lambda server: server.fail("POST", "/preupload/", status=403, times=FOREVER),
        "may not write to user/film",
    ),
    "LFS upload always cut": (lambda server: server.cut("PUT", "/lfs/", times=FOREVER), "the connection to http"),
    "LFS upload always 503": (
        lambda server: server.fail("PUT", "/lfs/", status=503, times=FOREVER),
        "the Hub fails (status 503)",
    ),
    "LFS upload refused, 403": (lambda server: server.fail("PUT", "/lfs/", status=403, times=FOREVER), "may not write"),
    "commit always 429": (
        lambda server: server.fail("POST", COMMIT, status=429, times=FOREVER),
        "asks for fewer requests",
    ),
    "commit always 409": (lambda server: server.fail("POST", COMMIT, status=409, times=FOREVER), "at the same time"),
    "commit always 412": (lambda server: server.fail("POST", COMMIT, status=412, times=FOREVER), "at the same time"),
    "commit always cut": (lambda server: server.cut("POST", COMMIT, times=FOREVER), "the connection to http"),
    "a page in the place of an answer": (
        lambda server: server.fail("POST", "/validate-yaml", status=403, times=FOREVER),
        "something between here and the Hub",
    ),
    "commit refused, 413": (
        lambda server: server.fail("POST", COMMIT, status=413, times=FOREVER),
        "refused (status 413)",
    ),
}


@pytest.mark.parametrize("fault", SURVIVED)
def test_a_passing_fault_is_survived(server, model_dir, unchecked, fault):
    SURVIVED[fault](server)
    done = push_to_hub(model_dir, REPO)
    assert all(fault.times == 0 for fault in server.faults)  # it did happen
    repository = server.repositories[REPO]
    assert len(repository.commits) == 2  # nothing was committed twice
    assert repository.branches["main"] == done.commit.oid
    assert repository.tags == {TAG: done.commit.oid}
    assert server.files(REPO)["model.safetensors"] == (model_dir / "model.safetensors").read_bytes()


@pytest.mark.parametrize("fault", TOLD)
def test_a_lasting_fault_is_told_and_the_old_revision_stays_whole(server, model_dir, unchecked, fault):
    push_to_hub(model_dir, REPO)
    old, head = server.files(REPO), server.repositories[REPO].branches["main"]
    torch.manual_seed(1)
    TransNormerForSequenceClassification(tiny_config(id2label={0: "bad", 1: "good"})).save_pretrained(model_dir)
    break_it, message = TOLD[fault]
    break_it(server)
    with pytest.raises(HubError) as raised:
        push_to_hub(model_dir, REPO)
    assert message in str(raised.value)
    assert WRITE_TOKEN not in str(raised.value)
    assert server.repositories[REPO].branches["main"] == head
    assert server.files(REPO) == old

    server.faults.clear()  # the same call carries on
    done = push_to_hub(model_dir, REPO)
    assert server.files(REPO)["model.safetensors"] == (model_dir / "model.safetensors").read_bytes()
    assert server.repositories[REPO].tags[done.tag] == done.commit.oid


def test_what_has_arrived_is_not_sent_again(server, model_dir, unchecked):
    server.fail("POST", COMMIT, status=403, times=FOREVER)
    with pytest.raises(HubError):
        push_to_hub(model_dir, REPO)
    sent = server.uploaded_bytes
    server.faults.clear()
    push_to_hub(model_dir, REPO)
    assert server.uploaded_bytes == sent == (model_dir / "model.safetensors").stat().st_size


def test_a_missing_tag_is_told_and_set_by_the_next_call(server, model_dir, unchecked):
    server.fail("POST", TAGGING, status=500, times=FOREVER)
    with pytest.raises(HubError, match="is complete, only its tag is missing"):
        push_to_hub(model_dir, REPO)
    server.faults.clear()
    done = push_to_hub(model_dir, REPO)
    assert server.repositories[REPO].tags == {TAG: done.commit.oid}
    assert len(server.repositories[REPO].commits) == 2


def test_a_commit_of_somebody_else_in_between_is_kept(server, model_dir, unchecked, monkeypatch):
    push_to_hub(model_dir, REPO)
    (model_dir / "all_results.json").write_text("{}")
    create_commit, others = HfApi.create_commit, []

    def meanwhile(self, *args, **kwargs):
        if not others:
            others.append(True)
            message = {"commit_message": "meanwhile"}
            create_commit(self, REPO, [huggingface_hub.CommitOperationAdd("NOTES.md", b"n")], **message)
        return create_commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", meanwhile)
    push_to_hub(model_dir, REPO)
    files = server.files(REPO)
    assert (files["NOTES.md"], files["all_results.json"]) == (b"n", b"{}")


def test_a_pull_request_is_not_opened_twice(server, model_dir, unchecked):
    server.lose_answer("POST", COMMIT)
    with pytest.raises(HubError, match="the connection to http"):
        push_to_hub(model_dir, REPO, create_pr=True)
    assert list(server.repositories[REPO].pull_requests) == ["refs/pr/1"]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "log in with `hf auth login`"),
        ("hf_unknown", "does not know this token"),
        (READ_TOKEN, "may not write to user/film"),
    ],
    ids=["none", "unknown", "one that may only read"],
)
def test_a_token_that_will_not_do_is_told_at_once(server, model_dir, monkeypatch, unchecked, token, message):
    monkeypatch.setattr(hub, "get_token", lambda: token)
    with pytest.raises(HubError, match=message) as raised:
        push_to_hub(model_dir, REPO)
    assert token is None or token not in str(raised.value)
    assert server.repositories == {}


def test_a_reader_may_propose(server, model_dir, unchecked, monkeypatch):
    HfApi(endpoint=server.url).create_repo(REPO)
    monkeypatch.setattr(hub, "get_token", lambda: READ_TOKEN)
    assert push_to_hub(model_dir, REPO, create_pr=True).pull_request.endswith("/discussions/1")


@pytest.mark.slow
def test_loading_survives_a_download_that_is_cut(server, model_dir, unchecked, tmp_path):
    commit = push_to_hub(model_dir, REPO).commit.oid
    server.cut("GET", "/lfs/")
    loaded = load_in_a_fresh_process(server, commit, tmp_path / "home")
    assert all(fault.times == 0 for fault in server.faults)
    assert len(loaded["logits"][0]) == 2


@pytest.mark.slow
def test_a_private_repository_loads_with_its_owners_token(server, model_dir, unchecked, tmp_path):
    commit = push_to_hub(model_dir, REPO, private=True).commit.oid
    loaded = load_in_a_fresh_process(server, commit, tmp_path / "home", HF_TOKEN=WRITE_TOKEN)
    assert len(loaded["logits"][0]) == 2


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_a_push_leaves_the_old_revision(server, model_dir, unchecked, tmp_path):
    """The server hangs up on the weights for good while the client keeps trying; then the client is killed."""
    push_to_hub(model_dir, REPO)
    old = server.files(REPO)
    torch.manual_seed(1)
    TransNormerForSequenceClassification(tiny_config(id2label={0: "bad", 1: "good"})).save_pretrained(model_dir)
    server.cut("PUT", "/lfs/", times=FOREVER)
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": WRITE_TOKEN, "HF_HUB_OFFLINE": "0"}
    environment["HF_HUB_DISABLE_XET"] = "1"
    command = [sys.executable, script.__file__, "--model_dir", str(model_dir), "--repo_id", REPO]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(900):
            if server.count("PUT", "/lfs/") >= 3:  # one of the first push, two that were cut
                break
            assert process.poll() is None
            threading.Event().wait(0.2)  # sleeping takes no time here
        assert server.count("PUT", "/lfs/") >= 3
    finally:
        process.kill()
        process.wait()
    assert server.files(REPO) == old
    server.faults.clear()
    push_to_hub(model_dir, REPO)
    assert server.files(REPO) != old
