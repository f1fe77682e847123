"""The rows of a report: what was checked or measured, and how it came out."""

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

OK, FAIL, SKIPPED, MEASURED = "OK", "FAIL", "skipped", "measured"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# After one of these every call to the device fails: the process must end, and the next part begins in a new one.
FATAL = ("illegal memory access", "misaligned address", "device-side assert", "launch failure", "illegal instruction")


class Recorder:
    """Takes the rows of one part and hands each on at once, so that a part that is cut off leaves what it had.

    tiny: everything at the smallest size, for a CPU. deadline: of `time.monotonic()`, when the part should end.
    """

    def __init__(self, part: str, send: Callable[[dict[str, Any]], None], tiny: bool = False, deadline: float = 1e18):
        self.part, self.send, self.tiny, self.deadline = part, send, tiny, deadline
        self.device = torch.device("cpu" if tiny else "cuda")

    def add(self, name: str, status: str, **fields: Any) -> None:
        self.send({"part": self.part, "name": name, "status": status, **fields})

    def judge(self, name: str, error: float, limit: float, **fields: Any) -> None:
        """A row that is OK if the error does not exceed the limit; an error that is not a number does."""
        self.add(name, OK if error <= limit else FAIL, error=float(f"{error:.2e}"), limit=limit, **fields)

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """What raises inside becomes a row. What leaves the device unusable is raised on."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.add(name, SKIPPED, reason=f"out of memory: {str(error)[:200]}")
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self.add(name, FAIL, reason=explain(error))
            if any(words in str(error) for words in FATAL):
                raise
        finally:
            self.free()

    def free(self) -> None:
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # the device may be unusable
                torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


def explain(error: BaseException | None) -> str:
    """An error and what caused it, in one line each."""
    lines = []
    while error is not None:
        lines.append(f"{type(error).__name__}: {str(error).strip()[-400:]}")
        error = error.__cause__
    return "\n".join(lines)


def worst_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest of `token_errors`: sees a wrong factor as well as a single wrong token."""
    return token_errors(found, truth).max().item() if truth.numel() else 0.0


def token_errors(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The 2-norm of the error of each token (row), over that of its truth, or over the root mean square of all if that
    is larger. A tensor of one dimension is one row."""
    norms = truth.double().norm(dim=-1)
    typical = norms.square().mean().sqrt().clamp(min=1e-30)
    return (found.double() - truth.double()).norm(dim=-1) / torch.maximum(norms, typical)
