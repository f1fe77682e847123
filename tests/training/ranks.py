"""Runs a function on several processes of this machine, which form a gloo process group."""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

TIMEOUT = 240  # seconds; a rank needs a few

# Imported once, by the server from which all processes are forked. It has no threads, which a fork would lose.
PRELOADED = [
    "transnormer_hf.training.fine_tuning",
    "transnormer_hf.training.sequence_parallel",
    "torch._dynamo",  # of every optimizer
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
]


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    env: Mapping[str, str] | None = None,
    killed: bool = False,
) -> list[Any]:
    """What `function(*args)` returns on each of `world_size` ranks; it must be a function of a module.

    killed: the ranks are to be killed by SIGKILL; those that wait for a dead one are ended, and nothing is returned.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run_rank, args=(function, rank, world_size, folder, dict(env or {}), args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            codes = _wait_for(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
        errors = "\n".join(path.read_text() for path in sorted(Path(folder).glob("error_*")))
        if killed:
            assert -9 in codes, f"no rank was killed: exit codes {codes}\n{errors}"
            return []
        assert codes == [0] * world_size, f"exit codes {codes}\n{errors}"
        return [torch.load(Path(folder) / f"result_{rank}", weights_only=False) for rank in range(world_size)]


def _wait_for(processes: Sequence[Any]) -> list[int | None]:
    """Exit codes, as soon as all have ended, one has failed, or the time is over; None: still running."""
    end = time.monotonic() + TIMEOUT
    running = list(processes)
    while running and time.monotonic() < end:
        wait([process.sentinel for process in running], timeout=max(end - time.monotonic(), 0))
        running = [process for process in running if process.exitcode is None]
        if any(process.exitcode for process in processes):
            time.sleep(0.2)  # the others may be about to fail for the same reason, and to say why
            break
    return [process.exitcode for process in processes]


def _run_rank(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, env: dict[str, str], args: tuple[Any, ...]
) -> None:
    import traceback

    import torch.distributed as dist

    os.environ.update(env)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), CUDA_VISIBLE_DEVICES="")
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", socket.if_nameindex()[0][1])  # the loopback
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # processes meet in a file, so that no port has to be free
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    try:
        torch.save(function(*args), Path(folder) / f"result_{rank}")
        dist.barrier()
    except BaseException:
        (Path(folder) / f"error_{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        sys.stdout.flush()
        os._exit(1)  # at once: the other ranks may wait for this one
    dist.destroy_process_group()
