"""The checkpoints of a run: written whole or not at all, the best and the last two kept; saved when it is stopped."""

import os
import signal
import threading
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from clip_m2df import loops
from clip_m2df.errors import Stopped, UserError, require
from clip_m2df.files import check_archive, whole_file

FOLDER = "checkpoints"
BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"

# Ctrl-C; what ends a process in order; what batch systems send some time before the end.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


def read_checkpoint(path: str | os.PathLike[str], *, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Verify a checkpoint by its checksums, and read it without executing anything in it.

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


def read_last(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Read the last checkpoint of a run; where it is damaged or missing, the one before it, with a warning.

    Args:
        folder: the run's.

    Returns:
        The file, and what it holds.

    Raises:
        UserError: there is neither.
    """
    last, damaged = folder / FOLDER / LAST, []
    for path in (last, last.with_name(PREVIOUS)):
        if path.exists():
            try:
                checkpoint = read_checkpoint(path)
            except UserError:
                damaged.append(str(path))
                continue
            if path != last:
                why = f"{last} is damaged" if damaged else f"there is no {last}"
                warnings.warn(f"{why}: going on with {path}, of step {checkpoint.get('global_step')}", stacklevel=2)
            return path, checkpoint
    if damaged:
        raise UserError(f"{' and '.join(damaged)}: damaged; give --ckpt_path best, or start anew in another folder")
    raise UserError(f"there is no {last}: fit has saved nothing there yet, and starts without --ckpt_path")


class RunCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and keeps the one before the last; reads without executing anything.

    Args:
        path: a checkpoint that has been read already.
        checkpoint: what it holds; it is kept until it is loaded.
    """

    def __init__(self, path: str | os.PathLike[str] = "", checkpoint: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._read = {} if checkpoint is None else {Path(path): checkpoint}
        self._whole: set[Path] = set()  # files known to be so

    def __getstate__(self) -> dict[str, Any]:
        """Processes that are spawned read for themselves: they would all train on the same memory."""
        return self.__dict__ | {"_read": {}}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replace a checkpoint's file atomically.

        Raises:
            UserError: It can't be written; what was there still is.
        """
        path = Path(path)
        try:
            with whole_file(path, "checkpoint") as draft:
                with draft.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                # A damaged one must not take the place of a good one.
                if path.name == LAST and path in self._whole and path.exists():
                    path.replace(path.with_name(PREVIOUS))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), error)
            raise UserError(
                f"cannot write the checkpoint {path}: {getattr(reason, 'strerror', None) or reason}; what was saved"
                " before is still there: make room, and go on with --ckpt_path last"
            ) from error
        self._whole.add(path)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Give what has been read already, once, or read it: see :func:`read_checkpoint`."""
        path = Path(path)
        checkpoint = self._read.pop(path, None)
        if checkpoint is None:
            checkpoint = read_checkpoint(path, map_location=map_location or "cpu")
        self._whole.add(path)
        return checkpoint


class RunCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint on val and the last two, under stable names in ``<run folder>/checkpoints``.

    The last one is saved before each validation and every so many steps, always after a whole optimiser step: with it a
    run that was killed goes on as if nothing had happened. A validation that was interrupted is made up for then.

    SIGINT (Ctrl-C), SIGTERM and SIGUSR1 save at the next optimiser step and end the run; a second one ends it at once.

    Args:
        monitor: the metric that tells which is best.
        mode: whether the best is the largest (``max``) or the smallest (``min``).
        every: optimiser steps between two savings of the last one; by default those between validations.
    """

    def __init__(self, monitor: str = "val/accuracy", mode: str = "max", every: int | None = None) -> None:
        require(least=1, **{"checkpoint.every": every})
        super().__init__(filename="best", monitor=monitor, mode=mode, save_top_k=1, enable_version_counter=False)
        self.every = every
        self._validated = 0  # the step of the last validation that came to its end
        self._saved = "nothing has been saved"  # what is said of a run that is stopped
        self._signal = 0  # came to this rank
        self._ending = 0  # the signal that all ranks know of
        self._stop_asked = False  # in the middle of a step
        self._training = False
        self._one_more = False  # the end is moved: the last step is made, its validation isn't

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Find the folder: that of the run, not that of a logger, which is another each time."""
        self.dirpath = os.path.join(trainer.default_root_dir, FOLDER)
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            for draft in Path(self.dirpath).glob("*.ckpt.*.part"):  # of a run that was killed while it wrote
                draft.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------- going on

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know, the step of the last validation included."""
        return super().state_dict() | {"validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best so far, also where the run's folder has been moved."""
        best = os.path.join(str(self.dirpath), BEST)
        if state_dict["best_model_path"] and os.path.exists(best):  # otherwise the best here is yet to come
            self.best_model_path = self.kth_best_model_path = best
            self.best_model_score = self.kth_value = state_dict["best_model_score"]
            self.best_k_models = {best: state_dict["best_model_score"]}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See whether a validation is still to be made, the last one too.

        Raises:
            UserError: The run has come to its end.
        """
        self._validated = checkpoint["callbacks"].get(self.state_key, {}).get("validated", 0)
        if trainer.state.fn != "fit" or checkpoint["global_step"] != trainer.max_steps:
            return
        if not self._wants_validation(trainer, trainer.max_steps):
            raise loops.no_steps_left(trainer.max_steps, trainer.max_steps)
        # Otherwise Lightning would end before it begins.
        self._one_more = True
        loops.move_end(trainer, 1)

    def on_sanity_check_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Listen to signals."""
        self._listen(trainer)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Listen to signals, and make up for a validation that was interrupted."""
        super().on_train_start(trainer, pl_module)
        self._listen(trainer)
        if self._wants_validation(trainer, trainer.global_step):
            loops.validate_now(trainer)
        if self._one_more:  # nothing is trained, and no epoch ends
            loops.move_end(trainer, -1)
            self._save_last(trainer)
        self._training = True

    # --------------------------------------------------------------------------------------------- saving

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the last checkpoint where that is due, or the run is to end."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # A run that is to stop (max_time, say) stops after a whole step.
        self._stop_asked = self._stop_asked or trainer.should_stop
        trainer.should_stop = self._stop_asked and loops.ends_step(trainer, batch_idx)
        if not loops.ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        self._ending = self._agree(trainer)
        if self._ending or loops.ends_interval(trainer, step) or (self.every is not None and step % self.every == 0):
            self._save_last(trainer)
            self._ending = self._agree(trainer)  # writing takes a while

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End the run if it is to end: by now the step before has been logged."""
        self._end(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End the run if it is to end: the validation will be made up for."""
        self._end(trainer)

    def check_monitor_top_k(self, trainer: lightning.Trainer, current: Tensor | None = None) -> bool:
        """Whether this is the best so far; what is not finite on any rank never is."""
        finite = current is None or bool(current.isfinite())
        return bool(trainer.strategy.reduce_boolean_decision(finite) and super().check_monitor_top_k(trainer, current))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the best checkpoint, if this is it."""
        super().on_validation_end(trainer, pl_module)
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the last step, with what its validation found; later, averages may take the place of the weights."""
        super().on_train_epoch_end(trainer, pl_module)
        if loops.ended_with_step(trainer) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_last(trainer)

    def _save_last(self, trainer: lightning.Trainer) -> None:
        self.last_model_path = os.path.join(str(self.dirpath), LAST)
        trainer.save_checkpoint(self.last_model_path, weights_only=False)
        self._saved = f"optimiser step {trainer.global_step} is saved, --ckpt_path last goes on"

    def _wants_validation(self, trainer: lightning.Trainer, step: int) -> bool:
        """Whether the validation that belongs to a step has not been made."""
        due = trainer.limit_val_batches and self._validated != step
        return bool(due and loops.ends_interval(trainer, step))

    # -------------------------------------------------------------------------------------------- signals

    def _listen(self, trainer: lightning.Trainer) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            again, self._signal = bool(self._signal), number
            # Before a validation the step is saved; before the training there is none to save.
            if again or trainer.validating or not self._training:
                raise Stopped(number, self._saved)
            name = signal.Signals(number).name
            rank_zero_info(f"{name}: the run ends after this optimiser step; once more ends it at once")

        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:  # Lightning puts back what was there before
                signal.signal(number, handle)

    def _agree(self, trainer: lightning.Trainer) -> int:
        """The signal that came to any rank, or 0: all have to end after the same step."""
        number = torch.tensor(self._signal, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op="max"))

    def _end(self, trainer: lightning.Trainer) -> None:
        if self._ending:
            raise Stopped(self._ending, self._saved, silent=not trainer.is_global_zero)
