"""Pathfinder-style images: an independent flood fill finds the same answers."""

import numpy as np
import pytest

from transnormer_hf.tasks.pathfinder import DOT, DOT_RADIUS, INK, REACH, generate_pathfinder


def reachable(image: np.ndarray, start: tuple[int, int], reach: int) -> set[tuple[int, int]]:
    """All lit pixels that a walk over lit pixels finds whose steps are at most `reach` long in each direction."""
    lit = {(int(row), int(column)) for row, column in np.argwhere(image > 0)}
    found, waiting = {start}, [start]
    steps = range(-reach, reach + 1)
    while waiting:
        row, column = waiting.pop()
        for place in ((row + down, column + right) for down in steps for right in steps):
            if place in lit and place not in found:
                found.add(place)
                waiting.append(place)
    return found


def dots(image: np.ndarray) -> list[set[tuple[int, int]]]:
    """The pixels of each dot."""
    only_dots = np.where(image == DOT, image, 0)
    places = {(int(row), int(column)) for row, column in np.argwhere(only_dots)}
    found = []
    while places:
        dot = reachable(only_dots, next(iter(places)), reach=1)
        found.append(dot)
        places -= dot
    return found


@pytest.mark.parametrize("size", [24, 32, 64])
def test_labels_are_what_a_flood_fill_finds(size):
    labels = []
    for image, label in generate_pathfinder(40, seed=size, size=size):
        assert image.shape == (size, size)
        assert set(np.unique(image)) == {0, INK, DOT}
        first, second = dots(image)
        assert len(first) == len(second) == (2 * DOT_RADIUS + 1) ** 2
        assert (reachable(image, min(first), REACH) >= second) == bool(label)
        labels.append(label)
    assert 10 <= sum(labels) <= 30


def test_the_gaps_of_a_path_must_be_jumped():
    joined = [image for image, label in generate_pathfinder(40, seed=1) if label]
    for image in joined:
        first, second = dots(image)
        assert not reachable(image, min(first), reach=1) >= second


def test_the_same_seed_gives_the_same_images():
    first, again, other = (np.stack([image for image, _ in generate_pathfinder(5, seed)]) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_an_image_without_room_is_refused():
    with pytest.raises(ValueError, match=r"--image_size 16 must be at least 24"):
        next(generate_pathfinder(1, 0, size=16))
