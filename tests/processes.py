"""Processes of a torch.distributed test, and those that share a file."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


@contextlib.contextmanager
def alone(path: Path):
    """One process at a time may make the file; who waited finds it made."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def one_process():
    """A process group of this process alone.

    What uses it must be gone before it ends, as with the frame of a function. DistributedDataParallel, where
    it is the last to let go of the group, waits for gloo's threads without releasing the interpreter, for
    which they may wait (https://github.com/pytorch/pytorch/issues/56297).
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()


def _rank(rank, function, args):
    function(rank, *args)
    # An interpreter that ends while gloo's threads still hold tensors aborts now and then, with all work done
    # (https://github.com/pytorch/pytorch/pull/179291). What fails above raises, and never comes here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def spawn(function, args: tuple, ranks: int) -> None:
    """Runs ``function(rank, *args)`` in a process for each rank; raises what one of them raised.

    They are forked from a process that has imported torch, once for all.
    """
    multiprocessing.set_forkserver_preload(["torch.distributed.tensor", "zipfls_cuda"])
    torch.multiprocessing.start_processes(_rank, (function, args), ranks, start_method="forkserver")
