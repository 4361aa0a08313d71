"""The checkpoints of a run: written whole or not at all, the best and the last two kept; saved when it is stopped."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from clip_m2df.archive import check_archive
from clip_m2df.errors import Stopped, UserError
from clip_m2df.files import whole_file

FOLDER = "checkpoints"
BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
# Ctrl-C; what ends a process in order; what batch systems send some time before the end.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


def read_checkpoint(path: str | os.PathLike[str], *, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Args:
        path: the file.
        map_location: where its tensors go, as ``torch.load`` takes it.
        mmap: read the tensors when they are used, if ever.

    Raises:
        UserError: there is no such file, or it is damaged or no checkpoint.
    """
    if not os.path.isfile(path):
        raise UserError(f"checkpoint {path}: no such file; give the path of a .ckpt file that fit wrote")
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load raises whatever the bytes happen to provoke
        raise UserError(f"{path} is damaged or no checkpoint; give a .ckpt file that fit wrote") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is no checkpoint of a model; give a .ckpt file that fit wrote")
    return checkpoint


def find_last(folder: Path) -> Path:
    """The last checkpoint of a run, or the one before if that is damaged, which is said.

    Args:
        folder: the run's.

    Raises:
        UserError: there is neither.
    """
    damaged = []
    for name in (LAST, PREVIOUS):
        path = folder / FOLDER / name
        if not path.exists():
            continue
        try:
            step = read_checkpoint(path).get("global_step")
        except UserError:
            damaged.append(str(path))
            continue
        if name != LAST:
            why = f"{damaged[0]} is damaged" if damaged else f"there is no {folder / FOLDER / LAST}"
            warnings.warn(f"{why}: going on with {path}, of step {step}", stacklevel=2)
        return path
    if damaged:
        raise UserError(f"{' and '.join(damaged)}: damaged; give --ckpt_path best, or start anew in another folder")
    raise UserError(f"there is no {folder / FOLDER / LAST}: the run has saved nothing yet; start without --ckpt_path")


class RunCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and keeps the one before the last; reads without executing anything."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint in its file's place at one blow.

        Raises:
            UserError: it can't be written; what was there still is.
        """
        path = Path(path)
        try:
            with whole_file(path) as draft:
                with draft.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                if path.name == LAST and path.exists():
                    path.replace(path.with_name(PREVIOUS))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), error)
            raise UserError(
                f"cannot write the checkpoint {path}: {getattr(reason, 'strerror', None) or reason}; what was saved"
                " before is still there: make room, and go on with --ckpt_path last"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """See :func:`read_checkpoint`."""
        return read_checkpoint(path, map_location=map_location or "cpu")


class RunCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint on val and the last two, under stable names in ``<run folder>/checkpoints``.

    The last one is saved before each validation and every so many steps, always after a whole optimiser step: with it a
    run that was killed goes on as if nothing had happened. A validation that was cut short is made up for then.

    SIGINT (Ctrl-C), SIGTERM and SIGUSR1 save at the next optimiser step and end the run; a second one ends it at once.

    Args:
        monitor: the metric that tells which is best.
        mode: whether the best is the largest (``max``) or the smallest (``min``).
        every: optimiser steps between two savings of the last one; by default those between validations.
    """

    def __init__(self, monitor: str = "val/accuracy", mode: str = "max", every: int | None = None) -> None:
        if every is not None and every < 1:
            raise UserError(f"checkpoint.every is {every}; it must be at least 1")
        super().__init__(filename="best", monitor=monitor, mode=mode, save_top_k=1, enable_version_counter=False)
        self.every = every
        self._validated = 0  # the step of the last validation that came to its end
        self._saved = 0  # the step of the last checkpoint
        self._signal: signal.Signals | None = None  # came to this rank
        self._ending = False  # all ranks know of it

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Find the folder: that of the run, not that of a logger, which is another each time."""
        self.dirpath = os.path.join(trainer.default_root_dir, FOLDER)
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            for draft in Path(self.dirpath).glob("*.ckpt.*.part"):  # of a run that was killed while it wrote
                draft.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know, the step of the last validation included."""
        return super().state_dict() | {"validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best so far, also where the run's folder has been moved."""
        state = dict(state_dict)
        self._validated = state.pop("validated", 0)

        def here(path: str) -> str:
            return os.path.join(str(self.dirpath), os.path.basename(path)) if path else ""

        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = here(state[key])
        state["best_k_models"] = {here(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict(state | {"dirpath": self.dirpath})

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Listen to signals, and make up for a validation that was cut short."""
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:  # Lightning puts back what was there before
                signal.signal(number, self._handler(trainer))
        self._saved = trainer.global_step
        batches = trainer.global_step * trainer.accumulate_grad_batches
        if self._validated != trainer.global_step and self._validates(trainer, batches):
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.restarting = False
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the last checkpoint where that is due, or the run is to end."""
        if trainer.fast_dev_run or (batch_idx + 1) % trainer.accumulate_grad_batches:  # type: ignore[attr-defined]
            return
        # A signal may have come to some ranks only, and all have to end with the same step.
        self._ending = trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)
        due = self.every is not None and trainer.global_step % self.every == 0
        if self._ending or due or self._validates(trainer, batch_idx + 1):
            self._save_last(trainer)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End the run if it is to end: by now the step before has been logged."""
        self._end(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End the run if it is to end: the validation will be made up for."""
        self._end(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the best checkpoint, if this is it."""
        super().on_validation_end(trainer, pl_module)
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the last step, with what its validation found."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_last(trainer)

    def _save_last(self, trainer: lightning.Trainer) -> None:
        self.last_model_path = os.path.join(str(self.dirpath), LAST)
        trainer.save_checkpoint(self.last_model_path, weights_only=False)
        self._saved = trainer.global_step

    def _validates(self, trainer: lightning.Trainer, batches: int) -> bool:
        """Whether a validation follows so many batches."""
        interval = trainer.val_check_batch
        return bool(batches and interval and trainer.enable_validation and batches % interval == 0)

    def _handler(self, trainer: lightning.Trainer) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            again, self._signal = self._signal is not None, signal.Signals(number)
            # The step before a validation is saved already.
            if again or trainer.validating:
                raise self._stopped(trainer)
            rank_zero_info(f"{self._signal.name}: the run ends after this optimiser step; once more ends it at once")

        return handle

    def _end(self, trainer: lightning.Trainer) -> None:
        if self._ending:
            raise self._stopped(trainer)

    def _stopped(self, trainer: lightning.Trainer) -> Stopped:
        return Stopped(self._signal or signal.SIGTERM, self._saved, trainer.global_rank)
