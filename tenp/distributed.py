# SPDX-License-Identifier: Apache-2.0
"""Calibration in several processes that gives the bits of one process.

Floating-point sums depend on their order, so an all-reduce, which adds in an order of its own, would
not. Here every process runs a stretch of the batches, the first process the first stretch. The
first adds its batches to the sums as it goes; the others keep what each of their batches adds,
wait for the sums so far, add their own batch by batch, and hand the sums on. So every sum is added
up in the order of batches, whatever the number of processes. Only sums travel, once a layer or
once an expert, and while one process adds the others compute; the last one tells all the result.
Sums travel through the CPU by gloo, wherever the model computes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tenp.errors import InvalidArgument
from tenp.statistics import ALL_STATISTICS, LayerStatistics


class Group:
    """The processes of a run.

    Attributes:
        rank: Of this process, 0 to `size - 1`.
        size: Number of processes.
        local_rank: Rank on this machine, which is also the number of its GPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @classmethod
    def from_environment(cls) -> Group:
        """Join the group that `torchrun` started this process for; alone if there is none."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return cls(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))

    def stretch(self, tokens: Sequence[int]) -> range:
        """Return which batches this process runs.

        Args:
            tokens: Of every batch of the run.

        Raises:
            InvalidArgument: There are fewer batches than processes.
        """
        if len(tokens) < self.size:
            raise InvalidArgument(
                f"there must be a batch for each of the {self.size} processes, got {len(tokens)}; "
                "start fewer processes, or make batches smaller with --batch-tokens"
            )
        total, seen, begins = sum(tokens), 0, [0]
        for number, count in enumerate(tokens):
            remaining = len(tokens) - number
            wanted = self.size - len(begins)  # stretches that have not begun
            is_due = seen * self.size >= total * len(begins)
            if wanted and (is_due or remaining == wanted) and number > begins[-1]:
                begins.append(number)
            seen += count
        begins.append(len(tokens))
        return range(begins[self.rank], begins[self.rank + 1])

    def add_in_order(
        self, sums: LayerStatistics, contributions: Sequence[tuple[int, LayerStatistics]]
    ) -> None:
        """Add what the batches of this process add to what those of the processes before did.

        Afterwards the sums are complete in the last process only.

        Args:
            sums: `[D, ...]` each; those of the first process hold its batches already.
            contributions: Domain and sums without a domain axis, in the order of batches, on any device.
        """
        if self.size == 1:
            return
        summed = {
            name: tensor for name, tensor in sums.items() if ALL_STATISTICS[name].merge != "weights"
        }
        if self.rank > 0:
            received = _packed(summed)
            dist.recv(received, self.rank - 1)
            _unpack(received, summed)
            for domain, contribution in contributions:
                for name, tensor in contribution.items():
                    mine = summed[name][domain]
                    tensor = tensor.to(mine.device)
                    if ALL_STATISTICS[name].merge == "sum":
                        mine += tensor
                    else:
                        torch.maximum(mine, tensor, out=mine)
        if self.rank < self.size - 1:
            dist.send(_packed(summed), self.rank + 1)

    def tell_all(self, sums: LayerStatistics) -> None:
        """Give every process the sums of the last one."""
        if self.size == 1:
            return
        packed = _packed(sums)
        dist.broadcast(packed, self.size - 1)
        _unpack(packed, sums)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


def _packed(tensors: LayerStatistics) -> Tensor:
    """All bytes of the tensors, one after another, on the CPU: one message instead of one each."""
    return torch.cat(
        [
            tensor.cpu().contiguous().view(-1).view(torch.uint8)
            for _, tensor in sorted(tensors.items())
        ]
    )


def _unpack(packed: Tensor, tensors: LayerStatistics) -> None:
    begin = 0
    for _, tensor in sorted(tensors.items()):
        size = tensor.numel() * tensor.element_size()
        # Cloned, because a slice of bytes need not begin where a float64 may.
        piece = packed[begin : begin + size].clone().view(tensor.dtype)
        tensor.copy_(piece.view(tensor.shape))
        begin += size
