"""OTAM, both directions, forward and backward, 25 queries by 5 prototypes: the column scan against the double loop."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import double_loop
from benchmarks.timing import Case, compare
from clip_m2df.nn.matching import otam

BARS = {8: 8.0, 32: 30.0}


def cases() -> Iterator[Case]:
    """T = 8, 16 and 32 frames."""
    for frames in (8, 16, 32):
        costs = torch.rand(25, 5, frames, frames, generator=torch.Generator().manual_seed(0)).requires_grad_()
        ours, plain = otam(costs), double_loop.otam(costs)
        gradients = [torch.autograd.grad(distance.sum(), costs)[0] for distance in (ours, plain)]
        off = max(
            float((ours - plain).abs().max() / plain.abs().max()), float((gradients[0] - gradients[1]).abs().max())
        )

        def run(function: Callable[[Tensor], Tensor], costs: Tensor = costs) -> Callable[[], object]:
            return lambda: torch.autograd.grad(function(costs).sum(), costs)

        case = compare(f"both directions, T = {frames}", run(otam), run(double_loop.otam), off=off)
        yield case | {"within_bar": case["ratio"] >= BARS.get(frames, 0.0) and off < 1e-5}
