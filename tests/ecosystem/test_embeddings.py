"""sentence-transformers and SetFit with a TransNormer: long documents, training, and a push with every module."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_push import REPO, server  # noqa: F401  (a Hub on this machine)
from test_remote_code import WORDS, tiny_config, word_tokenizer
from transformers import BertConfig, BertModel

from transnormer_hf import TransNormerModel
from transnormer_hf.hub import push_to_hub

sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.base.modules import Dense, Normalize, Transformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling  # noqa: E402

pytestmark = [pytest.mark.ecosystem, pytest.mark.cell("sentence-transformers")]
LENGTH = 4096


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a TransNormer without positions and a BERT with 512 of them."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = {
        "TransNormer": TransNormerModel(tiny_config(position_embedding="none")),
        "BERT": BertModel(BertConfig(**sizes, intermediate_size=32)),
    }
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 10**30  # as of a tokenizer that says nothing
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def documents(number):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, len(WORDS), (number, LENGTH - 2), generator=generator)  # two tokens go around them
    return [" ".join(WORDS[index] for index in row) for row in words]


def test_a_long_document_is_read_to_its_end_where_bert_stops_at_512(models, record_property):
    lengths = {}
    for name in ("TransNormer", "BERT"):
        model = SentenceTransformer(str(models / name))
        lengths[name] = model.tokenize(documents(1))["input_ids"].shape[1]
    assert lengths == {"TransNormer": LENGTH, "BERT": 512}
    record_property("measured", f"tokens read of {LENGTH}: {lengths['TransNormer']}, BERT {lengths['BERT']}")
    model = SentenceTransformer(str(models / "TransNormer"))
    (text,) = documents(1)
    ids = torch.tensor([word_tokenizer()(text, truncation=False)["input_ids"]])
    with torch.no_grad():
        states = TransNormerModel.from_pretrained(models / "TransNormer").eval()(ids).last_hidden_state  # (1, seq, 16)
    np.testing.assert_allclose(model.encode(text), states[0].mean(0).numpy(), atol=1e-5)


def test_a_trained_folder_is_pushed_whole_and_embeds_the_same_by_remote_code(server, models, tmp_path, record_property):  # noqa: F811
    torch.manual_seed(0)
    transformer = Transformer(str(models / "TransNormer"))
    model = SentenceTransformer(modules=[transformer, Pooling(16), Dense(16, 8), Normalize()])
    model.save(str(tmp_path / "saved"))
    push_to_hub(tmp_path / "saved", REPO)
    for name, content in server.files(REPO).items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    texts = ["the film is good", *documents(1)]
    pulled = SentenceTransformer(str(tmp_path / "pulled"), trust_remote_code=True)
    assert [type(module).__name__ for module in pulled] == ["Transformer", "Pooling", "Dense", "Normalize"]
    difference = np.abs(pulled.encode(texts) - model.encode(texts)).max()
    assert difference < 1e-6
    record_property("measured", f"largest difference {difference:.0e}")


@pytest.mark.parametrize("name", ["TransNormer", "BERT"])
def test_the_script_trains_matryoshka_embeddings_of_pairs(models, tmp_path, name, record_property):
    """Texts about "good" against texts about "bad": after training, each is nearest to its like, also in 4 numbers."""
    import train_embeddings

    pairs = [(f"the film is {a}", f"what film is {b}", float(a == b)) for a in ("good", "bad") for b in ("good", "bad")]
    rows = [dict(zip(("sentence1", "sentence2", "score"), pair, strict=True)) for pair in pairs * 4]
    (tmp_path / "pairs.json").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(models / name, tmp_path / "model")
    options = {
        "model_name_or_path": tmp_path / "model", "train_file": tmp_path / "pairs.json",
        "validation_file": tmp_path / "pairs.json", "score_column": "score", "max_seq_length": 64, "max_steps": 30,
        "per_device_train_batch_size": 8, "learning_rate": 1e-2, "output_dir": tmp_path / "out", "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 0,
    }  # fmt: skip
    command = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    metrics = train_embeddings.main([*command, "--matryoshka_dims", "16", "4"])
    found = {width: metrics[f"eval_{width}_spearman_cosine"] for width in ("16", "4")}
    assert min(found.values()) > 0.85, found  # 0.89 is the most that these four values allow
    model = SentenceTransformer(str(tmp_path / "out"))
    assert model.max_seq_length == 64
    record_property("measured", f"{name}: Spearman {found['16']:.2f}, in 4 numbers {found['4']:.2f}")


@pytest.mark.parametrize(("name", "length"), [("TransNormer", LENGTH), ("BERT", 512)])
def test_training_on_long_documents_reaches_what_stands_at_their_end(models, tmp_path, name, length, record_property):
    """Pairs of a word and a document that says it in its last quarter only, behind BERT's 512 positions."""
    import train_embeddings

    def pairs(number, seed):
        generator = torch.Generator().manual_seed(seed)
        fillers = torch.randint(5, 8, (number, LENGTH - 2), generator=generator)  # the, film, is
        for row, word in zip(fillers, ["good", "bad"] * (number // 2), strict=True):
            words = [WORDS[index] for index in row]
            words[-LENGTH // 4 :: 2] = [word] * (LENGTH // 8)
            yield {"sentence1": word, "sentence2": " ".join(words)}

    (tmp_path / "pairs.json").write_text("\n".join(map(json.dumps, pairs(16, seed=0))))
    shutil.copytree(models / name, tmp_path / "model")
    options = {
        "model_name_or_path": tmp_path / "model", "train_file": tmp_path / "pairs.json", "max_seq_length": length,
        "max_steps": 16, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "output_dir": tmp_path / "out",
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 0,
        "batch_sampler": "no_duplicates",
    }  # fmt: skip
    train_embeddings.main([part for key, value in options.items() for part in (f"--{key}", str(value))])
    model, held_out = SentenceTransformer(str(tmp_path / "out")), list(pairs(16, seed=1))
    good, bad = model.encode(["good", "bad"], normalize_embeddings=True)
    found = model.encode([pair["sentence2"] for pair in held_out], normalize_embeddings=True) @ (good - bad)
    right = sum((score > 0) == (pair["sentence1"] == "good") for score, pair in zip(found, held_out, strict=True))
    assert right == 16 if name == "TransNormer" else right < 16
    record_property("measured", f"{name}: {right} of 16 documents")


def test_more_tokens_than_learned_positions_are_refused(tmp_path):
    import train_embeddings

    TransNormerModel(tiny_config(max_position_embeddings=64)).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    options = ["--model_name_or_path", str(tmp_path / "model"), "--train_file", "none.json", "--max_seq_length", "65"]
    with pytest.raises(ValueError, match="--max_seq_length 65 is more than the 64 tokens"):
        train_embeddings.main([*options, "--output_dir", str(tmp_path / "out"), "--use_cpu"])
