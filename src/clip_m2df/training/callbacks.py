"""What a run of the command line shows and leaves in its folder: progress, configuration, tables of an evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import yaml
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from rich.table import Table
from torch import Tensor

from clip_m2df.errors import console, say
from clip_m2df.evaluation.metrics import class_results
from clip_m2df.files import for_spreadsheet, write_table, write_text
from clip_m2df.loops import logs_step


class RunProgressBar(RichProgressBar):
    """Counts to the end of the run; Lightning's own takes optimiser steps for batches where there are no epochs."""

    @property
    def total_train_batches(self) -> int | float:
        """Batches of the run, those before a resume included."""
        steps = self.trainer.max_steps
        batches = steps * self.trainer.accumulate_grad_batches if steps > 0 else float("inf")
        return min(self.trainer.num_training_batches, batches)

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"


class RunConfig(SaveConfigCallback):
    """Writes the configuration of a run into its folder, not beside a logger's files."""

    def save_config(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write ``<run folder>/config.yaml`` for ``fit``, and give the loggers the whole configuration."""
        if stage != "fit":
            return
        folder = Path(trainer.default_root_dir)
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(self.parser.dump(self.config, skip_unset=False)))
        config = self.config.clone()
        config.ckpt_path = None  # the run's, not that of whoever starts from its configuration
        write_text(folder / "config.yaml", "config", self.parser.dump(config, skip_unset=False))


class RunReport(lightning.Callback):
    """Writes what an evaluation says of the classes into the run's folder, and prints the hardest ones.

    In training it lets all ranks know of the videos that one of them found unusable, as often as the Trainer logs.
    """

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let ranks know of each other's unusable videos."""
        if logs_step(trainer, batch_idx):
            trainer.datamodule.share_unusable()  # type: ignore[attr-defined]

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write ``test_classes.csv`` and ``test_confusion.csv``."""
        self._write("test", trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write ``val_classes.csv`` and ``val_confusion.csv`` where that is all there is to do."""
        if trainer.state.fn == "validate":
            self._write("val", trainer, pl_module)

    def _write(self, split: str, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        evaluated, data = getattr(pl_module, "evaluated", None), trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero and evaluated is not None and evaluated.confusion.numel():
            confusion = evaluated.confusion.cpu()
            class_names = data.manifest.split(split).class_names
            files = write_report(Path(trainer.default_root_dir), split, class_names, confusion)
            console().print(hardest_classes(class_names, confusion))
            say(f"all classes are in {' and '.join(map(str, files))}")


def write_report(folder: Path, stage: str, class_names: Sequence[str], confusion: Tensor) -> list[Path]:
    """Write ``<stage>_classes.csv`` and ``<stage>_confusion.csv``.

    Args:
        folder: where to.
        stage: ``val`` or ``test``.
        class_names: of the split, in its order.
        confusion: int64 ``(n_classes, n_classes)``, queries by their own class and by that which was predicted.

    Returns:
        The files.
    """
    results = class_results(class_names, confusion)
    accuracies = [
        [for_spreadsheet(r.name), r.queries, r.correct, f"{r.accuracy:.4f}" if r.queries else ""] for r in results
    ]
    tables: dict[Path, list[list[Any]]] = {
        folder / f"{stage}_classes.csv": [["class", "queries", "correct", "accuracy"], *accuracies],
        folder / f"{stage}_confusion.csv": [
            ["class", *map(for_spreadsheet, class_names)],
            *([for_spreadsheet(r.name), *r.counts] for r in results),
        ],
    }
    for path, content in tables.items():
        write_table(path, "table", content)
    return list(tables)


def hardest_classes(class_names: Sequence[str], confusion: Tensor, most: int = 5) -> Table:
    """A table of the classes that are recognised least often, and what each is most often taken for."""
    table = Table("hardest classes", "accuracy", "most often taken for")
    results = [result for result in class_results(class_names, confusion) if result.queries]
    for result in sorted(results, key=lambda result: result.accuracy)[:most]:
        other = f"{result.taken_for} ({result.taken / result.queries:.1%})" if result.taken else ""
        table.add_row(result.name, f"{result.accuracy:.1%}", other)
    return table
