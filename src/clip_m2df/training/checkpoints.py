"""The checkpoints of a run: written whole or not at all, the best and the last two kept; saved when it is stopped."""

import errno
import math
import os
import signal
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from clip_m2df import loops
from clip_m2df.errors import Stopped, UserError, require
from clip_m2df.files import check_regular, whole_file
from clip_m2df.hub import is_reading
from clip_m2df.weight_files import check_archive

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
    check_regular(path, "checkpoint")
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
        if path.is_file():
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


def steps_made(checkpoint: Mapping[str, Any]) -> int:
    """How many optimiser steps a checkpoint says that it has made; 0 where that is not a number."""
    steps = checkpoint.get("global_step")
    return steps if type(steps) is int and steps > 0 else 0


def check_training_state(
    path: str | os.PathLike[str],
    checkpoint: Mapping[str, Any],
    trainer: lightning.Trainer,
    model: lightning.LightningModule,
    data: lightning.LightningDataModule,
) -> None:
    """Refuse a training state that the run's own could not have become, before anything of it is taken over.

    Args:
        path: of the checkpoint, for the message.
        checkpoint: what it holds.
        trainer: that will go on; it has not started.
        model: whose optimiser it is.
        data: whose state it is.

    Raises:
        UserError: names what is missing, of another type or size, out of its range, or contradicts the rest.
    """
    if missing := [key for key in ("loops", "callbacks", "optimizer_states", "lr_schedulers") if key not in checkpoint]:
        raise UserError(
            f"{path} has no {missing[0]}, so that no training can go on from it: give --ckpt_path last of a run, or"
            " start anew without it"
        )
    try:
        _check_progress(checkpoint, trainer, data)
        _check_callbacks(checkpoint, trainer)
        # Other strategies keep an optimiser in ways of their own.
        if isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            _check_optimizer(checkpoint, model)
    except ValueError as error:
        raise UserError(
            f"the training can't go on from {path}: {error}; give another checkpoint, or start anew in another folder"
        ) from error


def _check_progress(
    checkpoint: Mapping[str, Any], trainer: lightning.Trainer, data: lightning.LightningDataModule
) -> None:
    name = type(data).__qualname__
    own = {"pytorch-lightning_version": "", "epoch": 0, "global_step": 0, "loops": loops.progress_of(trainer)}
    kept = {name: dict.fromkeys(("episodes_per_step", "batches_per_step", "steps"), 0)}
    _check_like(checkpoint, own | kept)
    of_data = checkpoint[name]
    _check_like(of_data, {key: value for key, value in data.state_dict().items() if key in of_data}, name)
    steps, batches = loops.steps_of(checkpoint["loops"])
    if not checkpoint["global_step"] == of_data["steps"] == steps:
        raise ValueError(
            f"global_step is {checkpoint['global_step']}, but it has made {steps} steps, or {of_data['steps']}"
        )
    # The data module itself refuses what was saved within a step.
    if batches != steps * of_data["batches_per_step"] and of_data.get("whole_step", True):
        raise ValueError(f"it has taken {batches} batches, but made {steps} steps of {of_data['batches_per_step']}")
    seed = checkpoint.get("draws_seed")
    if not (seed is None or (type(seed) is int and 0 <= seed < 2**64)):
        raise ValueError(f"draws_seed is {seed!r}")
    table = checkpoint.get("MixedPrecision") or {}
    if not isinstance(table, dict) or not all(map(_is_number, table.values())):
        raise ValueError("MixedPrecision is not a table of numbers")
    if not is_reading(checkpoint.get("reading")):
        raise ValueError("reading is not a number of frames and one of pixels")


def _check_callbacks(checkpoint: Mapping[str, Any], trainer: lightning.Trainer) -> None:
    states = checkpoint["callbacks"]
    if not isinstance(states, dict):
        raise ValueError("callbacks is not a table")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key not in states:
            continue
        state, name = states[callback.state_key], type(callback).__name__
        # What is an empty table before a training is filled by it.
        if own := {option: value for option, value in callback.state_dict().items() if value != {}}:
            _check_like(state, own, name, exact=isinstance(callback, RunCheckpoint))
        if isinstance(callback, RunCheckpoint):
            score = state["best_model_score"]
            is_number = isinstance(score, Tensor) and score.numel() == 1 and not score.isnan().any()
            if not is_number and (score is not None or state["best_model_path"]):
                raise ValueError(f"{name}.best_model_score is not a number")
            if state["validated"] > checkpoint["global_step"]:
                raise ValueError(f"{name}.validated is {state['validated']}, a step that is yet to come")


def _check_optimizer(checkpoint: Mapping[str, Any], model: lightning.LightningModule) -> None:
    made: Any = model.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    steps, groups = checkpoint["global_step"], optimizer.state_dict()["param_groups"]
    of_schedule = {"base_lrs": scheduler.base_lrs, "last_epoch": 0}
    own = {"optimizer_states": [{"param_groups": groups, "state": {}}], "lr_schedulers": [of_schedule]}
    _check_like(checkpoint, own)
    found, schedule = checkpoint["optimizer_states"][0], checkpoint["lr_schedulers"][0]
    for group, like in zip(found["param_groups"], groups, strict=True):
        for key, value in like.items():
            # Switches that are None are the machine's to decide, the others this model's.
            right = isinstance(group[key], bool | None) if value is None else group[key] == value
            if (value is None or isinstance(value, bool) or key == "params") and not right:
                raise ValueError(f"optimizer_states.{key} is not that of this model")
        if max(group["betas"]) >= 1:
            raise ValueError(f"optimizer_states.betas is {group['betas']}")
    known = {key: value for key, value in scheduler.state_dict().items() if key in schedule}
    _check_like(schedule, known, "lr_schedulers")
    if schedule["last_epoch"] != steps:
        raise ValueError(f"lr_schedulers.last_epoch is {schedule['last_epoch']}, but {steps} steps are made")
    weights = dict(enumerate(weight for group in optimizer.param_groups for weight in group["params"]))
    state = found["state"]
    if not state.keys() <= weights.keys():
        raise ValueError("optimizer_states.state is not a table of its weights")
    if steps and len(state) < len(weights) and "MixedPrecision" not in checkpoint:  # whose scaler may skip steps
        raise ValueError(f"optimizer_states has {len(state)} of {len(weights)} weights")
    for index, of_weight in state.items():
        name, weight = f"optimizer_states.state[{index}]", weights[index]
        _check_like(of_weight, {"step": torch.tensor(0.0), "exp_avg": weight, "exp_avg_sq": weight}, name)
        if not 0 <= of_weight["step"] <= steps:
            raise ValueError(f"{name}.step is {float(of_weight['step'])}, but {steps} steps are made")
        mean, square = of_weight["exp_avg"], of_weight["exp_avg_sq"]
        if not (mean.isfinite().all() and square.isfinite().all() and (square >= 0).all()):
            raise ValueError(f"{name} has values that are not finite, or below 0")


def _check_like(found: Any, own: object, name: str = "", *, exact: bool = True) -> None:
    """Refuse a state that was read and is unlike one's own, in its types or its sizes.

    Args:
        found: what was read.
        own: what it should be like; an empty table is like any.
        name: its name, for the message.
        exact: numbers are finite and not below 0, and counts are whole; other people's may be any.

    Raises:
        ValueError: names what differs.
    """
    right = True
    if isinstance(own, dict):
        right = isinstance(found, dict)
        for key, value in own.items() if isinstance(found, dict) else ():
            inner = f"{name}.{key}" if name else str(key)
            if key not in found:
                raise ValueError(f"{inner} is missing")
            _check_like(found[key], value, inner, exact=exact)
    elif isinstance(own, list | tuple):
        right = isinstance(found, list | tuple) and len(found) == len(own)
        for index, (a, b) in enumerate(zip(found, own, strict=True)) if right else ():
            _check_like(a, b, f"{name}[{index}]", exact=exact)
    elif isinstance(own, Tensor):
        right = isinstance(found, Tensor) and found.shape == own.shape
        right = right and found.is_floating_point() == own.is_floating_point()
    elif isinstance(own, bool | str):
        right = type(found) is type(own)
    elif isinstance(own, int | float) and exact:
        right = _is_number(found) and isinstance(found, type(own) | int)
    elif isinstance(own, int | float):
        right = isinstance(found, int | float) and not isinstance(found, bool)
    if not right:
        raise ValueError(f"{name} is {' '.join(repr(found).split()):.40}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


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
                    _save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                # A damaged one must not take the place of a good one.
                if path.name == LAST and path in self._whole and path.exists():
                    path.replace(path.with_name(PREVIOUS))
        except UserError as error:
            saved = any(path.with_name(name).exists() for name in (LAST, PREVIOUS))
            raise UserError(f"{error}{', and --ckpt_path last goes on from it' if saved else ''}") from error
        self._whole.add(path)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Give what has been read already, once, or read it: see :func:`read_checkpoint`."""
        path = Path(path)
        checkpoint = self._read.pop(path, None)
        if checkpoint is None:
            checkpoint = read_checkpoint(path, map_location=map_location or "cpu")
        self._whole.add(path)
        return checkpoint


def _save(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:  # as which torch reports a full disk
        reasons = (error.__cause__, error.__context__)
        raise next((e for e in reasons if isinstance(e, OSError)), OSError(errno.EIO, str(error))) from error


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
        # Otherwise Lightning would end before it starts.
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
