"""The processes that train one model together: which of them this is, and what they tell one another.

torchrun starts them, on one machine or on several. A process that is alone is a world of one, in which all that is
told has been told already.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vitrail.errors import BadInput, of_many

Found = TypeVar("Found")

PATIENCE = timedelta(days=2)  # that processes wait for what one of them does alone: decoding a large data set


@dataclass(frozen=True)
class World:
    """One of `size` processes, the one of number `rank`. The `first` is the one that prints, downloads and writes."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether it is this process that speaks for all."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """Of `count` rows, a multiple of the processes, those of this process."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def share(self, count: int) -> Int[np.ndarray, " each"]:
        """Of `count` things, those of this process, all processes having as many: behind the last thing, the last
        ones' are filled up with it. Put together by `joined`, the first `count` are all of them, each once."""
        each = -(-count // self.size)
        return np.arange(self.rank * each, (self.rank + 1) * each).clip(max=count - 1)

    def total(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The sum of what the processes have, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether some process has it. They are compared on the processors: no device waits."""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return tuple(map(bool, raised.tolist()))

    def joined(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The rows of all processes, each of which has as many, one process's behind the other's."""
        if self.size == 1:
            return rows
        mine = torch.from_numpy(np.ascontiguousarray(rows))
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return torch.cat(parts).numpy()

    def told(self, text: str) -> str:
        """What the first process says."""
        said = [text]
        if self.size > 1:
            dist.broadcast_object_list(said, src=0)
        return said[0]

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean of what the processes have into each tensor, in place. All are of one dtype, on one device."""
        if self.size > 1 and tensors:
            means = self.total(torch.cat([tensor.flatten() for tensor in tensors])) / self.size
            for tensor, mean in zip(tensors, means.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def after_first_here(self, work: Callable[[], Found]) -> Found:
        """`work`, by one process of each machine, and then by the others, which find there what it left."""
        if self.size == 1:
            return work()
        waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
        before = work() if int(os.environ["LOCAL_RANK"]) == 0 else None
        dist.barrier(group=waiting)
        return work() if before is None else before


ALONE = World()


def job() -> str | None:
    """A name of the job that this process is started for, the same when torchrun starts it again; None without
    torchrun. It is torchrun's --rdzv-id, where one was given."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()}-{os.getppid()}" if name == "none" else name


def meeting_place() -> Any:
    """Where the processes find one another. What they left there before torchrun started them again is not looked at:
    without --rdzv-backend=c10d, torchrun (2.13) keeps it, and they would call on those that are gone."""
    kept = os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"  # by torchrun, not by the first process
    stores: Any = dist  # type checkers do not see them there
    store = stores.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=os.environ["RANK"] == "0" and not kept,
        multi_tenant=not kept,
    )  # fmt: skip
    return stores.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """The block runs in company of the other processes that torchrun started; alone, if it started none.

    Raises:
        BadInput: there are fewer GPUs than processes.
    """
    if not of_many():
        yield ALONE
        return
    world, here = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        there, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
        if wanted > there:
            raise BadInput(
                f"{wanted} processes want a GPU each, and {socket.gethostname()} has {there}; start as many with "
                f"--nproc-per-node={there}."
            )
        torch.cuda.set_device(here)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=meeting_place(), rank=world.rank,
        world_size=world.size,
    )  # fmt: skip
    yield world
    dist.destroy_process_group()  # where something failed, the others may wait: torchrun ends them


def abandoned(error: Exception) -> bool:
    """Whether what failed is only that another process is gone."""
    return dist.is_initialized() and (
        isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    )
