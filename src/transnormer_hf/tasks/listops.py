"""ListOps sequences with the limits of the Long-Range Arena: nested MIN, MAX, MED and SM of single digits.

`[MAX 2 9 [MIN 4 7 ] 0 ]` is 9. MED is the median, rounded down; SM is the sum modulo 10. A sequence is drawn anew until
its length fits, so within the limits it is as likely as the grammar makes it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
CLOSE = "]"
TOKENS = (*OPERATORS, CLOSE, *map(str, range(10)))
# Share of the arguments that are themselves lists, down to the largest depth.
LIST_SHARE = 0.25
FULL_SIZES = {"train": 96_000, "validation": 2_000, "test": 2_000}


@dataclass(frozen=True)
class ListOpsLimits:
    """What a sequence may be; the defaults are those of the Long-Range Arena's release.

    Attributes:
        max_depth: Lists inside each other.
        max_args: Arguments of an operator, from 2.
        min_length, max_length: Tokens of a sequence.
    """

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500
    max_length: int = 2000

    def __post_init__(self) -> None:
        if self.max_depth < 1 or self.max_args < 2:
            raise ValueError(
                f"--max_depth {self.max_depth} must be at least 1 and --max_args {self.max_args} at least 2."
            )
        longest = tree_size(self.max_depth, self.max_args)
        if not 4 <= self.min_length <= self.max_length or self.min_length > longest:
            raise ValueError(
                f"--min_length {self.min_length} and --max_length {self.max_length} must lie between 4 and {longest},"
                f" the most tokens of --max_depth {self.max_depth} and --max_args {self.max_args}, in this order."
            )


def tree_size(depth: int, args: int) -> int:
    """Tokens of the largest sequence: every argument is a list down to the last level."""
    size = 1
    for _ in range(depth):
        size = 2 + args * size
    return size


def generate_listops(number: int, seed: int, limits: ListOpsLimits | None = None) -> Iterator[tuple[list[str], int]]:
    """`number` different sequences with their values, the same for the same seed.

    Raises:
        ValueError: there seem to be fewer within the limits.
    """
    limits, rng = limits or ListOpsLimits(), random.Random(seed)
    seen: set[str] = set()
    repeats = 0
    while len(seen) < number:
        sequence = _draw(rng, limits)
        if sequence is None:
            continue
        text = " ".join(sequence[0])
        if text in seen:
            repeats += 1
            if repeats > 100 * number:
                raise ValueError(f"Found only {len(seen)} of {number} sequences within {limits}: widen the limits.")
            continue
        seen.add(text)
        yield sequence


def _draw(rng: random.Random, limits: ListOpsLimits) -> tuple[list[str], int] | None:
    """One sequence and its value, or None where it is too short or becomes too long."""
    tokens: list[str] = []
    value = _draw_list(rng, limits, 1, tokens)
    return (tokens, value) if value is not None and limits.min_length <= len(tokens) <= limits.max_length else None


def _draw_list(rng: random.Random, limits: ListOpsLimits, depth: int, tokens: list[str]) -> int | None:
    operator = rng.choice(OPERATORS)
    tokens.append(operator)
    values = []
    for _ in range(rng.randint(2, limits.max_args)):
        if depth < limits.max_depth and rng.random() < LIST_SHARE:
            value = _draw_list(rng, limits, depth + 1, tokens)
        else:
            value = rng.randrange(10)
            tokens.append(str(value))
        if value is None or len(tokens) >= limits.max_length:
            return None
        values.append(value)
    tokens.append(CLOSE)
    return apply_operator(operator, values)


def apply_operator(operator: str, values: list[int]) -> int:
    """The value of one list of digits."""
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[MED":
        return int(median(values))
    return sum(values) % 10
