"""Images in the style of Pathfinder: are two dots joined by a dashed path, or do they lie on two different ones?

Paths keep so far from each other that the next dash of a path is always nearer than any other path, which makes the
answer well defined: from one dot, jumping over gaps only, one reaches the other or not.
"""

import math
from collections.abc import Iterator

import numpy as np

DASH, GAP = 3, 1  # pixels with and without ink along a path
DOT_RADIUS = 1
DOT, INK = 255, 128
# Two pixels of one path follow each other at a distance of at most this; different paths are further apart.
REACH = GAP + 1
SEPARATION = REACH + 2 * DOT_RADIUS + 1
FULL_SIZES = {"train": 160_000, "validation": 20_000, "test": 20_000}
MIN_SIZE = 24


def generate_pathfinder(number: int, seed: int, size: int = 32) -> Iterator[tuple[np.ndarray, int]]:
    """`number` images (size, size) uint8 with label 1 where the dots are joined, the same for the same seed.

    Raises:
        ValueError: `size` leaves no room for two paths.
    """
    if size < MIN_SIZE:
        raise ValueError(f"--image_size {size} must be at least {MIN_SIZE}, to have room for two paths.")
    rng = np.random.default_rng(seed)
    for _ in range(number):
        label = int(rng.integers(2))
        yield _draw_image(rng, size, label), label


def _draw_image(rng: np.random.Generator, size: int, label: int) -> np.ndarray:
    paths: list[np.ndarray] = []
    while len(paths) < 2:  # the two paths that matter
        paths, blocked = [], np.zeros((size, size), dtype=bool)
        for _ in range(2 + int(rng.integers(size // 16 + 1))):
            path = _find_path(rng, blocked)
            if path is None:  # no room for another distractor
                break
            paths.append(path)
            _block(blocked, path)
    image = np.zeros((size, size), dtype=np.uint8)
    for path in paths:
        for step, (row, column) in enumerate(path):
            if step % (DASH + GAP) < DASH or step == len(path) - 1:
                image[row, column] = INK
    ends = (paths[0][0], paths[0][-1]) if label else (paths[0][0], paths[1][-1])
    for row, column in ends:
        image[row - DOT_RADIUS : row + DOT_RADIUS + 1, column - DOT_RADIUS : column + DOT_RADIUS + 1] = DOT
    return image


def _find_path(rng: np.random.Generator, blocked: np.ndarray) -> np.ndarray | None:
    tries = (_draw_path(rng, blocked) for _ in range(60))
    return next((path for path in tries if path is not None), None)


def _draw_path(rng: np.random.Generator, blocked: np.ndarray) -> np.ndarray | None:
    """Pixels (steps, 2) of a smooth curve through free space whose ends lie apart, or None if it ran into something."""
    size = len(blocked)
    steps = int(rng.integers(size * 3 // 8, size * 5 // 8))
    free = np.argwhere(~blocked[DOT_RADIUS:-DOT_RADIUS, DOT_RADIUS:-DOT_RADIUS]) + DOT_RADIUS
    if not len(free):
        return None
    place = rng.choice(free).astype(float)
    heading, turn = rng.uniform(0, 2 * math.pi), 0.0
    pixels: list[tuple[int, int]] = []
    while len(pixels) < steps:
        row, column = (int(value + 0.5) for value in place)
        if not all(DOT_RADIUS <= value < size - DOT_RADIUS for value in (row, column)) or blocked[row, column]:
            return None
        if not pixels or pixels[-1] != (row, column):
            pixels.append((row, column))
        turn = 0.7 * turn + rng.normal(scale=0.12)
        heading += turn
        place += (math.sin(heading), math.cos(heading))
    path = np.array(pixels)
    # dots that touch would be joined whatever the paths do
    is_long = np.abs(path[0] - path[-1]).max() > SEPARATION
    return path if is_long else None


def _block(blocked: np.ndarray, path: np.ndarray) -> None:
    """Close the surroundings of a path to the other paths."""
    for row, column in path:
        top, left = max(row - SEPARATION, 0), max(column - SEPARATION, 0)
        blocked[top : row + SEPARATION + 1, left : column + SEPARATION + 1] = True
