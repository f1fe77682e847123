"""Generated data of the small tables: what a label says is true of the rows."""

import numpy as np
import pytest

from transnormer_hf.research.reproduction_tasks import (
    generate_retrieval,
    generate_small_pathfinder,
    retrieval_words,
    shrink_image,
)
from transnormer_hf.tasks.pathfinder import DOT, generate_pathfinder

TEXTS = ("text1", "text2")


def subject_of(text):
    """The subject most of whose words stand in a text."""
    subjects, _ = retrieval_words()
    return int(np.argmax([sum(word in own for word in text.split()[:-1]) for own in subjects]))


def test_pairs_are_of_one_subject_where_the_label_says_so():
    rows = list(generate_retrieval(400, seed=3, length=256, subject_share=0.6))
    assert {len(row[name]) for row in rows for name in TEXTS} == {256}
    assert 0.4 < np.mean([row["label"] for row in rows]) < 0.6
    same = [len({subject_of(row[name]) for name in TEXTS}) == 1 for row in rows]
    assert same == [row["label"] == 1 for row in rows]


def test_a_share_of_the_words_is_of_the_subject():
    subjects, _ = retrieval_words()
    words = [
        (word, subject_of(row[name]))
        for row in generate_retrieval(100, seed=0, length=256, subject_share=0.6)
        for name in TEXTS
        for word in row[name].split()[:-1]
    ]
    # the last word of a text is cut; short words of the others are sometimes the subject's as well
    assert np.mean([word in subjects[subject] for word, subject in words]) == pytest.approx(0.6, abs=0.03)


def test_pairs_share_their_words_over_seeds_and_not_their_texts():
    train, again, other = (list(generate_retrieval(60, seed, 256)) for seed in (0, 0, 1))
    assert train == again
    assert not {row["text1"] for row in train} & {row["text1"] for row in other}
    subjects, common = retrieval_words()
    known = {*common, *(word for own in subjects for word in own)}
    assert {word for row in other for name in TEXTS for word in row[name].split()[:-1]} <= known


def test_a_small_picture_is_the_mean_of_squares():
    pixels = np.arange(16, dtype=np.int16)  # rows 0..3, 4..7, 8..11, 12..15
    assert shrink_image(pixels, 4) == list(range(16))
    assert shrink_image(pixels * 2, 2) == [5, 9, 21, 25]  # 2 · (0 + 1 + 4 + 5) / 4 and so on
    with pytest.raises(ValueError, match=r"side=3: a picture of 16 pixels has no 3 x 3 equal squares"):
        shrink_image(pixels, 3)


def test_a_small_path_keeps_its_dots_its_ink_and_its_label():
    large = list(generate_pathfinder(20, seed=5, size=32))
    for (image, label), row in zip(large, generate_small_pathfinder(20, seed=5, size=32, side=16), strict=True):
        small = np.array(row["pixels"]).reshape(16, 16)
        assert row["label"] == label
        for place in np.argwhere(image):
            assert small[tuple(place // 2)] >= image[tuple(place)]
        assert (small > 0).sum() <= (image > 0).sum()
        assert (small == DOT).sum() >= 2 * 4  # two dots of 3 x 3 pixels, which touch 2 x 2 or 3 x 3 squares
