"""OTAM of 25 queries with 5 prototypes, both directions, forward and backward: whole tensors against a double loop."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import double_loop
from benchmarks.timing import Case, compare, seconds
from clip_m2df.nn.matching import otam

BARS = {8: 15.0, 16: 35.0, 32: 90.0}
MOST_OFF = 1e-5


def cases(frames: Sequence[int] = (8, 16, 32), *, repeat: int = 9, device: str = "cpu") -> Iterator[Case]:
    """A case a number of frames; ``off`` is the larger difference, of distances (relative) and of gradients.

    ``floor`` is the time of a ``logaddexp`` of each cell, and of a product of each on the way back, a call each.
    """
    for n_frames in frames:
        drawn = torch.rand(25, 5, n_frames, n_frames, generator=torch.Generator().manual_seed(0))
        costs = drawn.to(device).requires_grad_()

        def run(function: Callable[[Tensor], Tensor], costs: Tensor = costs) -> tuple[Tensor, Tensor]:
            distances = function(costs)
            return distances.detach(), torch.autograd.grad(distances.sum(), costs)[0]

        (ours, our_gradient), (plain, gradient) = run(otam), run(double_loop.otam)
        off = max(((ours - plain).abs() / plain.abs().max()).max().item(), (our_gradient - gradient).abs().max().item())
        cells = torch.cat((costs, costs)).detach()
        floor = min(seconds(lambda cells=cells: (cells.logaddexp(cells), cells * cells)) for _ in range(20))  # type: ignore[misc]
        yield compare(
            f"both directions, T = {n_frames}",
            lambda run=run: run(otam),  # type: ignore[misc]
            lambda run=run: run(double_loop.otam),  # type: ignore[misc]
            repeat=repeat,
            off=off,
            floor=floor,
            bar=BARS.get(n_frames),
            within_bar=off <= MOST_OFF,
        )
