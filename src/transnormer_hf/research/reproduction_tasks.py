"""Data of the small Table 6 that neither the Hub nor a file has: pairs of texts, and smaller pictures."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

from ..tasks.pathfinder import generate_pathfinder

SUBJECTS, SUBJECT_WORDS, COMMON_WORDS = 6, 10, 120
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)


def generate_retrieval(number: int, seed: int, length: int, subject_share: float = 0.4) -> Iterator[dict[str, Any]]:
    """Pairs of texts of `length` bytes, with label 1 where both are about one subject.

    A stand-in for the Arena's Retrieval, whose papers (ACL Anthology Network) cannot be had here: none of this is its
    data. A text is invented words of two to five letters. `subject_share` of them are drawn from the ten words of its
    subject, the others from words that all texts share; the vocabulary is the same for every seed.
    """
    subjects, common = retrieval_words()
    rng = np.random.default_rng((seed, 1))

    def text(subject: int) -> str:
        words: list[str] = []
        while sum(map(len, words)) + len(words) <= length:
            pool = subjects[subject] if rng.random() < subject_share else common
            words.append(pool[rng.integers(len(pool))])
        return " ".join(words)[:length]

    for _ in range(number):
        label = int(rng.integers(2))
        first = int(rng.integers(SUBJECTS))
        second = first if label else (first + 1 + int(rng.integers(SUBJECTS - 1))) % SUBJECTS
        yield {"text1": text(first), "text2": text(second), "label": label}


@cache
def retrieval_words() -> tuple[list[list[str]], list[str]]:
    """The words of each subject, and those that all texts share."""
    rng = np.random.default_rng(0)
    words = [
        rng.choice(LETTERS, rng.integers(2, 6)).tobytes().decode()
        for _ in range(SUBJECTS * SUBJECT_WORDS + COMMON_WORDS)
    ]
    own = [words[first : first + SUBJECT_WORDS] for first in range(0, SUBJECTS * SUBJECT_WORDS, SUBJECT_WORDS)]
    return own, words[SUBJECTS * SUBJECT_WORDS :]


def generate_small_pathfinder(number: int, seed: int, size: int, side: int) -> Iterator[dict[str, Any]]:
    """Pathfinder images drawn at `size` rows and columns and shrunk to `side`, each pixel the brightest of its square,
    so that dots and dashes stay whole.

    Ends of one path lie nearer to each other than those of two: the distance of the dots alone tells 72 % of the
    labels (1,500 images, either size of 24 and 32). Only what is above that has followed a path.
    """
    for image, label in generate_pathfinder(number, seed, size):
        yield {"pixels": shrink_image(image.reshape(-1), side, np.max), "label": label}


def shrink_image(pixels: np.ndarray, side: int, of_square: Callable[..., np.ndarray] = np.mean) -> list[int]:
    """Grey values of a square picture, row by row, as those of `side` rows and columns, one for each of its squares.

    Raises:
        ValueError: the picture cannot be cut into so many equal squares.
    """
    full = math.isqrt(len(pixels))
    if full**2 != len(pixels) or full % side:
        raise ValueError(f"side={side}: a picture of {len(pixels)} pixels has no {side} x {side} equal squares.")
    squares = pixels.reshape(side, full // side, side, full // side)
    return of_square(squares, axis=(1, 3)).round().astype(int).reshape(-1).tolist()
