"""Several processes on this machine that work together through `torch.distributed`, without a network port."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from regard.checks import positive


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any, seconds: float = 300) -> list[Any]:
    """Call `function(*args)` in `ranks` processes that form a gloo group; what each returns, by rank.

    They find each other through a file in a temporary folder, and use one thread each. Where there is a fork server
    (not on Windows), modules are imported once and not once for each process. As always with `multiprocessing`, a script
    that calls this does so under `if __name__ == "__main__":`.

    Args:
        function: of a module, so that another process can import it. Results are
            tensors, numbers, strings, and lists, tuples and dictionaries of them.
        seconds: after which a rank that waits for another gives up.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the error of the first rank that had one; the others are ended.
    """
    positive("ranks", ranks)
    method = "spawn" if sys.platform == "win32" else "forkserver"
    if method == "forkserver":
        multiprocessing.get_context(method).set_forkserver_preload([function.__module__, "regard.ops.distributed"])
    with tempfile.TemporaryDirectory() as folder:
        processes.start_processes(_rank, (ranks, folder, seconds, function, args), ranks, start_method=method)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, folder: str, seconds: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))
    try:
        torch.save(function(*args), Path(folder) / f"{rank}.pt")
        dist.barrier()  # nobody leaves while others still talk to it
    finally:
        dist.destroy_process_group()
