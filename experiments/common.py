"""Shared by the other files: errors that name an option, files written whole or not at all, processes."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class UsageError(Exception):
    """What an option asks for cannot be done; the message says why."""

    option = ""


class OutError(UsageError):
    """A file cannot be written."""

    option = "--out"


@contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator:
    """Open a file for writing that takes its name only once it is complete.

    Raises:
        OutError: the file cannot be written, as on a full disk; an earlier one stays as it is.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OutError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def speaks() -> bool:
    """Whether this process prints: the first of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def notice(text: str) -> None:
    """Print a line on standard error."""
    if speaks():
        print(text, file=sys.stderr)


@dataclass
class Place:
    """Where this process runs: its device, and its rank among the processes of the run."""

    device: torch.device
    rank: int = 0
    processes: int = 1

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all processes, in place."""
        if self.processes > 1:
            dist.all_reduce(values)
        return values

    def first(self, work: Callable[[], Any]) -> Any:
        """Do something in the first process alone, while the others wait.

        Returns:
            What it returned; in the other processes None.

        Raises:
            UsageError: in every process what the first one met, so that none waits for another.
        """
        result = error = None
        if self.rank == 0:
            try:
                result = work()
            except UsageError as raised:
                error = raised
        if self.processes > 1:
            box = [error]
            dist.broadcast_object_list(box, 0)
            error = box[0]
        if error:
            raise error
        return result


@contextmanager
def join_processes(device: str) -> Iterator[Place]:
    """Join the processes that torchrun started, or run alone."""
    cuda = device != "cpu" and torch.cuda.is_available()
    if "RANK" not in os.environ:
        yield Place(torch.device("cuda" if cuda else "cpu"))
        return
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Place(place, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
