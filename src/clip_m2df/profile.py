"""Where the time of a training goes: waiting for data, the tower, the head, the backward pass, the optimiser."""

from __future__ import annotations

import time
from typing import Any

import lightning
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

PARTS = ("waiting for data", "encoding", "head", "backward", "optimiser")
# What the first batches cost, from loading kernels to filling caches, belongs to no step.
WARM_UP = 3


class StepProfile(lightning.Callback):
    """Measures a training and prints the table at its end.

    The device is waited for at each boundary, which costs a little: the sum is somewhat more than without. Operations
    are counted in one batch, and compared with what the device does in a large matrix product of the same type.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.batches = 0
        self.operations = 0.0
        self._since = 0.0
        self._total_since = 0.0
        self._until = 0.0
        self._paused = 0.0
        self._seen = 0
        self._counter: Any = None
        self._module_end: Any = None
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Watch the tower and the head."""
        for part, module in (("encoding", pl_module.model.backbone.visual), ("head", pl_module.model.head)):
            self._watch(part, module, pl_module)
        # The module counts and logs after the callbacks: that is no waiting for data.
        self._module_end = pl_module.on_train_batch_end

        def then_wait(*args: Any) -> None:
            self._module_end(*args)
            self._since = _now(pl_module)

        pl_module.on_train_batch_end = then_wait
        self._since = _now(pl_module)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The data came."""
        self._take("waiting for data", pl_module)
        if self._seen == WARM_UP:
            self.seconds = dict.fromkeys(PARTS, 0.0)
            self._total_since, self.batches = self._since, 0
        if self._seen == WARM_UP - 1:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_before_backward(self, trainer: lightning.Trainer, pl_module: Any, loss: Tensor) -> None:
        """The loss is there."""
        self._since = _now(pl_module)

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """The gradients are there."""
        self._take("backward", pl_module)

    def on_before_optimizer_step(self, trainer: lightning.Trainer, pl_module: Any, optimizer: Any) -> None:
        """The step begins."""
        self._since = _now(pl_module)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """A validation is no part of the steps."""
        self._paused = _now(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Go on as if it had taken no time."""
        pause = _now(pl_module) - self._paused
        self._since += pause
        self._total_since += pause
        self._until += pause

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is over."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._take("optimiser", pl_module)
        self._since = _now(pl_module)
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.operations, self._counter = float(self._counter.get_total_flops()), None
        self._seen += 1
        self.batches += 1
        self._until = self._since

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Print what was measured."""
        for hook in self._hooks:
            hook.remove()
        pl_module.on_train_batch_end = self._module_end
        if trainer.is_global_zero:
            enough = self._seen > WARM_UP
            Console().print(self.table(pl_module) if enough else f"no profile: it takes more than {WARM_UP} batches")

    def table(self, pl_module: Any) -> Table:
        """Seconds of each part over all measured batches, and the share of the device's peak."""
        total = self._until - self._total_since
        table = Table(f"profile of {self.batches} batches", "seconds", "share")
        rest = max(total - sum(self.seconds.values()), 0.0)
        for part, seconds in [*self.seconds.items(), ("the rest", rest)]:
            table.add_row(part, f"{seconds:.2f}", f"{seconds / total:.1%}")
        table.add_row("all", f"{total:.2f}", "")
        if self.operations:
            weights = next(pl_module.model.parameters()).dtype
            dtype = torch.get_autocast_dtype(pl_module.device.type) if _is_mixed(pl_module) else weights
            achieved = self.operations * self.batches / total
            peak = measure_peak(pl_module.device, dtype)
            table.add_row(f"{achieved / 1e12:.3g} TFLOP/s of {peak / 1e12:.3g}", "", f"{achieved / peak:.1%}")
        return table

    def _watch(self, part: str, module: nn.Module, pl_module: Any) -> None:
        started = 0.0

        def before(*_: Any) -> None:
            nonlocal started
            started = _now(pl_module)

        def after(*_: Any) -> None:
            if pl_module.training:
                self.seconds[part] += _now(pl_module) - started

        self._hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _take(self, part: str, pl_module: Any) -> None:
        now = _now(pl_module)
        self.seconds[part] += now - self._since
        self._since = now


def measure_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations a second of a large matrix product, the best of a few."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        a @ a
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _is_mixed(pl_module: Any) -> bool:
    return "mixed" in str(pl_module.trainer.precision)


def _now(pl_module: Any) -> float:
    _wait(pl_module.device)
    return time.perf_counter()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
