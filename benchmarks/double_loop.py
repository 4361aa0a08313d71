"""OTAM cell by cell, as the published implementations have it: what the others are measured against."""

import torch
from torch import Tensor

from clip_m2df.nn.m2df import M2DFHead


def otam(costs: Tensor, *, smoothing: float = 0.5, single_direction: bool = False) -> Tensor:
    """OTAM of ``costs (…, rows, columns)``, one direction after the other: ``(…)``."""
    distance = _one_way(costs, smoothing)
    return distance if single_direction else distance + _one_way(costs.transpose(-1, -2), smoothing)


def _one_way(costs: Tensor, smoothing: float) -> Tensor:
    rows, columns = costs.shape[-2:]
    zero = costs.new_zeros(costs.shape[:-2])
    above: list[Tensor] = []
    for i in range(rows):
        row = [zero]
        for j in range(1, columns + 2):
            cost = costs[..., i, j - 1] if j <= columns else zero
            if i == 0:
                row.append(cost + row[-1])
                continue
            cells = [above[j - 1], row[-1]]
            if j in (1, columns + 1):
                cells.append(above[j])
            total = sum((torch.exp(-cell / smoothing) for cell in cells), start=zero)
            row.append(cost - smoothing * torch.log(total))
        above = row
    return above[-1]


class DoubleLoopHead(M2DFHead):
    """The head, matching cell by cell."""

    def distance(self, costs: Tensor) -> Tensor:
        """See :meth:`M2DFHead.distance`."""
        return otam(costs, smoothing=self.smoothing)
