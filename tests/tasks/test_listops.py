"""ListOps: labels that an evaluator written in another way agrees with, and the limits of the benchmark."""

import random

import pytest

from transnormer_hf.tasks import listops
from transnormer_hf.tasks.listops import ListOpsLimits, apply_operator, generate_listops


def evaluate(tokens: list[str]) -> int:
    """The value of a sequence by a stack machine: push all, and at each bracket take back to the operator."""
    stack: list[str] = []
    for token in tokens:
        if token != "]":
            stack.append(token)
            continue
        digits = []
        while stack[-1].isdigit():
            digits.append(int(stack.pop()))
        digits.sort()
        middle = len(digits) // 2
        by_name = {
            "[MIN": digits[0],
            "[MAX": digits[-1],
            "[SM": int(str(sum(digits))[-1]),
            "[MED": digits[middle] if len(digits) % 2 else (digits[middle - 1] + digits[middle]) // 2,
        }
        stack.append(str(by_name[stack.pop()]))
    (value,) = stack
    return int(value)


def depth(tokens: list[str]) -> int:
    deepest = level = 0
    for token in tokens:
        level += token.startswith("[") - (token == "]")
        deepest = max(deepest, level)
    return deepest


@pytest.mark.parametrize(
    "limits",
    [
        ListOpsLimits(),
        ListOpsLimits(min_length=10, max_length=512),
        ListOpsLimits(max_depth=2, max_args=3, min_length=4, max_length=12),
    ],
    ids=["release", "short", "tiny"],
)
def test_labels_are_right_and_limits_are_kept(limits):
    sequences = list(generate_listops(60, seed=1, limits=limits))
    assert len({" ".join(tokens) for tokens, _ in sequences}) == 60
    for tokens, value in sequences:
        assert value == evaluate(tokens)
        assert limits.min_length <= len(tokens) <= limits.max_length
        assert depth(tokens) <= limits.max_depth
        assert set(tokens) <= set(listops.TOKENS)
        assert max_arguments(tokens) <= limits.max_args


def max_arguments(tokens: list[str]) -> int:
    most, open_lists = 0, [0]
    for token in tokens:
        if token == "]":
            most = max(most, open_lists.pop())
        else:
            open_lists[-1] += 1
            if token.startswith("["):
                open_lists.append(0)
    return most


def test_all_operators_digits_and_answers_occur():
    sequences = list(generate_listops(300, seed=2, limits=ListOpsLimits(min_length=20, max_length=200)))
    assert {token for tokens, _ in sequences for token in tokens} == set(listops.TOKENS)
    assert {value for _, value in sequences} == set(range(10))
    assert max(depth(tokens) for tokens, _ in sequences) > 3


@pytest.mark.parametrize(
    ("operator", "values", "expected"),
    [("[MIN", [4, 2, 9], 2), ("[MAX", [4, 2, 9], 9), ("[MED", [4, 2, 9], 4), ("[MED", [4, 7], 5), ("[SM", [9, 4], 3)],
)
def test_operators_have_the_values_of_the_definition(operator, values, expected):
    random.Random(0).shuffle(values)
    assert apply_operator(operator, values) == expected


def test_the_same_seed_gives_the_same_sequences():
    limits = ListOpsLimits(min_length=10, max_length=100)
    first, again, other = (list(generate_listops(20, seed, limits)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_depth": 0}, r"--max_depth 0 must be at least 1"),
        ({"max_args": 1}, r"--max_args 1 at least 2"),
        ({"min_length": 300, "max_length": 200}, r"--min_length 300 and --max_length 200 must lie between 4 and"),
        (
            {"max_depth": 1, "max_args": 3, "min_length": 9},
            r"must lie between 4 and 5, the most tokens of --max_depth 1",
        ),
    ],
)
def test_impossible_limits_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ListOpsLimits(**changes)


def test_more_sequences_than_there_are_end_in_an_error():
    limits = ListOpsLimits(max_depth=1, max_args=2, min_length=4, max_length=4)  # 4 operators x 100 pairs of digits
    assert len(list(generate_listops(400, 0, limits))) == 400
    with pytest.raises(ValueError, match=r"Found only 400 of 401 sequences within"):
        list(generate_listops(401, 0, limits))
