"""What the kernels are meant to reach, and what the rows of a report say about it."""

from typing import Any, TypeAlias

from benchmark_ops import FLOOR

REACHED, MISSED, UNKNOWN = "reached", "missed", "not measured"
LARGEST = "B1_T8192_H96_D128"
# (what, whether of the backward pass, times the floor at most) at the largest shape
FLOORS = (
    ("norm_attention, bidirectional", False, 1.6),
    ("norm_attention, causal", False, 2.0),
    ("norm_attention, bidirectional", True, 2.5),
    ("norm_attention, causal", True, 2.5),
)
Times: TypeAlias = dict[tuple[str, str, str, str], dict[str, Any]]  # by what, shape, contender, direction
AHEAD_OF_SDPA, AHEAD_OF_LLAMA = 2048, 4096  # tokens


def reached(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals, each with what was measured: {"goal", "value", "limit", "status", "words"}."""
    times = {(row["of"], row["shape"], row["contender"], row["direction"]): row for row in rows if "times_floor" in row}
    return [
        *(floor_goal(times, *floor) for floor in FLOORS),
        sdpa_goal(times, "norm_attention, causal"),
        sdpa_goal(times, "norm_attention, bidirectional"),
        llama_goal(rows),
    ]


def goal(text: str, value: float | None, limit: float, words: str) -> dict[str, Any]:
    status = UNKNOWN if value is None else REACHED if value <= limit else MISSED
    return {"goal": text, "value": value, "limit": limit, "status": status, "words": words}


def floor_goal(times: Times, what: str, backward: bool, limit: float) -> dict[str, Any]:
    """Time over that of a copy of the bytes that must move; of the backward pass, the difference of two times."""
    text = f"{what}, {'backward' if backward else 'forward'} at {LARGEST}, at most {limit:g} x the floor"
    forward, both = (times.get((what, LARGEST, "ours", direction)) for direction in FLOOR)
    if forward is None or (backward and both is None):
        return goal(text, None, limit, "no times")
    value = forward["times_floor"]
    if backward and both is not None:
        floors = {direction: units * forward["times_floor"] for direction, units in FLOOR.items()}
        in_units = both["times_floor"] * FLOOR["forward+backward"] - floors["forward"]  # times of a copy of U
        value = in_units / (FLOOR["forward+backward"] - FLOOR["forward"])
    return goal(text, round(value, 3), limit, f"{value:.2f}")


def sdpa_goal(times: Times, what: str) -> dict[str, Any]:
    """The largest ratio of forward + backward to SDPA's, over all shapes from 2,048 tokens."""
    text = f"{what}, forward and backward, ahead of SDPA (flash) from {AHEAD_OF_SDPA:,} tokens at every shape"
    ratios = {}
    for (of, shape, contender, direction), row in times.items():
        peer = times.get((of, shape, "SDPA flash", direction))
        if (of, contender) == (what, "ours") and peer is not None and row["seq_len"] >= AHEAD_OF_SDPA:
            ratios[f"{shape} {direction}"] = row["median_seconds"] / peer["median_seconds"]
    return worst_ratio(text, ratios)


def llama_goal(rows: list[dict[str, Any]]) -> dict[str, Any]:
    text = f"training step of a model of 125 M parameters ahead of Llama's from {AHEAD_OF_LLAMA:,} tokens"
    seconds = {
        (row["model"], row["length"]): row["median_seconds"]
        for row in rows
        if row.get("task") == "training" and "median_seconds" in row and row["length"] >= AHEAD_OF_LLAMA
    }
    ratios = {
        f"{length:,} tokens": taken / seconds["llama", length]
        for (model, length), taken in seconds.items()
        if model == "transnormer-t2" and ("llama", length) in seconds
    }
    return worst_ratio(text, ratios)


def worst_ratio(text: str, ratios: dict[str, float]) -> dict[str, Any]:
    if not ratios:
        return goal(text, None, 1.0, "no times")
    worst = max(ratios, key=ratios.__getitem__)
    return goal(text, round(ratios[worst], 3), 1.0, f"at worst {ratios[worst]:.2f} x its time, {worst}")
