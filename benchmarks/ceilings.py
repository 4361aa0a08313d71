"""What a device can do at most, and what a piece of work asks of it."""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import seconds


def count_flops(function: Callable[[], object]) -> int:
    """Operations of matrix products and convolutions in a call, attention taken apart to count on any device."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def matmul_speed(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product: the device's ceiling, as measured."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        a @ b

    multiply()
    return float(2 * n**3 / min(seconds(multiply) for _ in range(10)))
