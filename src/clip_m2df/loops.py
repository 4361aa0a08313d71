"""Runs counted in whole optimiser steps, and every touch of Lightning's own loops that this takes.

What a function relies on is in its docstring, and checked against the installed Lightning in ``tests/test_loops.py``.
Reading what the Trainer documents, such as ``global_step`` and ``should_stop``, is no touch of a loop.
"""

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import callbacks

from clip_m2df.errors import UserError

# Lightning's callbacks that do not do their work in a run counted in optimiser steps: why not, and what does instead.
UNSUITED: dict[type[lightning.Callback], str] = {
    callbacks.BaseFinetuning: "unfreezes by epochs, and training is a single one; give model.freeze_backbone, or"
    " model.backbone_lr and model.warmup_steps",
    callbacks.BatchSizeFinder: "would change data.batch_size, of which data.episodes_per_step is a multiple; try"
    " values of data.batch_size with trainer.fast_dev_run true",
    callbacks.GradientAccumulationScheduler: "would change the episodes of a step; give data.episodes_per_step",
    callbacks.LearningRateFinder: "sets a rate that the model's own schedule overwrites after one step; find it by"
    " lightning.pytorch.tuner.Tuner.lr_find in Python, or by a sweep, and give model.lr",
    callbacks.ModelPruning: "prunes by epochs, and training is a single one; prune the trained model by"
    " torch.nn.utils.prune",
    callbacks.SpikeDetection: "lists batches to be left out, which a stream of episodes has not; a loss that is not"
    " finite ends a run in any case",
    callbacks.StochasticWeightAveraging: "averages by epochs, and training is a single one; take"
    " lightning.pytorch.callbacks.EMAWeightAveraging or WeightAveraging",
}


def batches_of_step(episodes_per_step: int, batch_size: int, world_size: int) -> int:
    """Batches of an optimiser step on each device.

    Raises:
        UserError: the episodes of a step don't divide over batches and devices.
    """
    batches, rest = divmod(episodes_per_step, batch_size * world_size)
    if rest or not batches:
        raise UserError(
            f"episodes_per_step {episodes_per_step} does not divide into batches of {batch_size} on"
            f" {world_size} device(s); give a multiple of {batch_size * world_size}, or another batch_size"
        )
    return batches


def check_goes_on(saved: Mapping[str, Any], own: Mapping[str, Any], *, most: int) -> None:
    """Refuse to go on with a run that counts otherwise (it would repeat episodes, or cut a step), or is over.

    Args:
        saved: how the run counted, how far it is, and what its episodes depend on.
        own: how it is to be counted now, and what its episodes would depend on.
        most: optimiser steps of the whole run, or a number below 0 for no end.

    Raises:
        UserError: says what to set.
    """
    episodes, batches, steps = (saved[key] for key in ("episodes_per_step", "batches_per_step", "steps"))
    if steps > most > 0:
        raise no_steps_left(steps, most)
    if saved.get("seed", own["seed"]) != own["seed"]:
        raise UserError(f"the run's episodes are those of seed {saved['seed']}: set data.seed to that")
    if not saved.get("whole_step", True):
        raise UserError(
            "the checkpoint was saved in the middle of an optimiser step, from where a run can't go on: give"
            " --ckpt_path last, or another that was saved after a whole step"
        )
    if (episodes, batches) != (own["episodes_per_step"], own["batches_per_step"]):
        raise UserError(
            f"the run made its steps of {episodes} episodes in {batches} batches on each device: set"
            f" data.episodes_per_step to {episodes}, and data.batch_size times the devices to {episodes // batches}"
        )
    check_same(saved.get("episodes", {}), own["episodes"])


def check_same(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under options that would change its episodes or losses, or which step is its best.

    Args:
        saved: values by the names of their options, as the run had them; earlier versions saved fewer.
        own: the values now.

    Raises:
        UserError: names the first option that differs, and both values.
    """
    for name, value in own.items():
        if name in saved and saved[name] != value:
            raise UserError(
                f"{name} is {value!r}, but {saved[name]!r} in the run that is to go on, whose episodes, losses or"
                f" scores it would change: give {saved[name]!r}, or start anew in another folder without --ckpt_path"
            )


def no_steps_left(steps: int, most: int) -> UserError:
    """The error of a run that has nothing left to train."""
    return UserError(
        f"the checkpoint has made {steps} optimiser steps already; to go on, give more than that with"
        f" trainer.max_steps, which is {most}"
    )


def count_in_steps(trainer: lightning.Trainer, episodes_per_step: int, batches: int, validate_every: int) -> None:
    """Let a Trainer accumulate the batches of a step, and validate after whole steps.

    Relies on: the fit loop reads ``accumulate_grad_batches``, ``val_check_interval`` and ``check_val_every_n_epoch``
    after ``LightningDataModule.setup``; the last as None makes it count batches over all epochs.

    Args:
        trainer: its options are changed.
        episodes_per_step: episodes of an optimiser step.
        batches: batches of it on each device.
        validate_every: optimiser steps between validations.

    Raises:
        UserError: the Trainer was given an option that contradicts, or that an endless stream has no use for.
    """
    check_callbacks(trainer, batches)
    if trainer.accumulate_grad_batches not in (1, batches):
        raise UserError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, but follows from"
            f" data.episodes_per_step, {episodes_per_step}; leave it out"
        )
    trainer.accumulate_grad_batches = batches
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise UserError("trainer.overfit_batches takes a loader that ends: leave it out, and give a small manifest")
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if trainer.max_steps < 0:
        raise UserError("training episodes never end: give with trainer.max_steps the optimiser steps to train")
    # In batches, and not by epoch: an endless stream has none.
    interval = min(validate_every, trainer.max_steps) * batches
    if trainer.val_check_interval not in (1.0, interval):
        raise UserError(
            f"trainer.val_check_interval is {trainer.val_check_interval}, in batches; say with"
            " data.validate_every how many optimiser steps lie between validations"
        )
    trainer.val_check_interval = interval
    trainer.check_val_every_n_epoch = None
    limit = trainer.limit_train_batches
    if isinstance(limit, int) and limit % batches:
        raise UserError(
            f"trainer.limit_train_batches {limit} cuts an optimiser step of {batches} batches; give a multiple"
        )


def check_callbacks(trainer: lightning.Trainer, batches: int) -> None:
    """Refuse callbacks of Lightning's that do not do their work in a run counted in optimiser steps.

    Relies on: the options that count epochs or seconds are kept as ``_check_on_train_epoch_end``, ``_every_n_epochs``,
    ``_train_time_interval`` and ``_interval``; ``Tuner.lr_find``, which makes the optimiser anew afterwards, marks its
    callback ``_early_exit``.

    Args:
        trainer: whose callbacks.
        batches: batches of an optimiser step on each device.

    Raises:
        UserError: names the callback, and what to do instead.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        why = next((why for kind, why in UNSUITED.items() if isinstance(callback, kind)), None)
        if isinstance(callback, callbacks.LearningRateFinder) and callback._early_exit:
            why = None
        elif isinstance(callback, callbacks.EarlyStopping) and callback._check_on_train_epoch_end:
            why = "is to look at the end of an epoch, and training is a single one; leave out check_on_train_epoch_end"
        elif isinstance(callback, callbacks.LearningRateMonitor) and callback.logging_interval == "epoch":
            why = "is to log by epochs, and training is a single one; give logging_interval step"
        elif isinstance(callback, callbacks.ModelCheckpoint) and callback._every_n_epochs > 1:
            why = "is to save by epochs, and training is a single one; give every_n_train_steps"
        elif isinstance(callback, callbacks.ModelCheckpoint) and callback._train_time_interval and batches > 1:
            why = "would save in the middle of an optimiser step, by train_time_interval; give every_n_train_steps"
        elif isinstance(callback, callbacks.Timer) and callback._interval == "epoch":
            why = "is to look at the end of an epoch, and training is a single one; give interval step"
        elif isinstance(callback, callbacks.WeightAveraging) and callback.should_update(epoch_idx=0):
            why = "is to average by epochs, and training is a single one; give update_starting_at_step"
        if why is not None:
            raise UserError(f"trainer.callbacks: {type(callback).__name__} {why}")


def ends_step(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Whether a training batch is the last of an optimiser step.

    Relies on: an endless stream is one epoch, so that ``batch_idx`` counts from the start of the run or, after a
    checkpoint of a whole step, goes on from there.
    """
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def between_steps(trainer: lightning.Trainer) -> bool:
    """Whether what a Trainer would save now is the state after a whole optimiser step.

    Relies on: ``batch_progress.current.processed`` counts the batches that are done, that of ``on_train_batch_end``
    included.
    """
    done: int = vars(trainer.fit_loop.epoch_loop.batch_progress.current)["processed"]
    return done % trainer.accumulate_grad_batches == 0


def logs_step(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Whether a training batch is the last of an optimiser step after which the Trainer logs.

    Relies on: ``global_step`` has been increased when the hooks ``on_train_batch_end`` are called.
    """
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(ends_step(trainer, batch_idx) and every and trainer.global_step % every == 0)


def ends_interval(trainer: lightning.Trainer, step: int) -> bool:
    """Whether a validation follows an optimiser step, if any validations are wanted.

    Relies on: the epoch loop validates after each ``val_check_interval`` batches, see :func:`count_in_steps`.
    """
    return step > 0 and step * trainer.accumulate_grad_batches % trainer.val_check_interval == 0


def ended_with_step(trainer: lightning.Trainer) -> bool:
    """Whether a training that is at its end stopped after a whole optimiser step.

    Relies on: ``epoch_loop.batch_idx`` is the last batch that was trained on when ``on_train_end`` is called.
    """
    return ends_step(trainer, trainer.fit_loop.epoch_loop.batch_idx)


def validate_now(trainer: lightning.Trainer) -> None:
    """Run a validation at the start of a training that goes on.

    Relies on: at ``on_train_start`` the epoch loop's ``val_loop`` can be run as between two batches, with the Trainer's
    state set to validating; it would skip batches if it were ``restarting``.
    """
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.restarting = False
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def progress_of(trainer: lightning.Trainer) -> dict[str, Any]:
    """How far a training is, as a checkpoint keeps it under ``loops``; of a new trainer, what that looks like.

    Relies on: ``fit_loop.state_dict`` is what ``fit_loop.load_state_dict`` takes, plain numbers and tables of them.
    """
    return {"fit_loop": trainer.fit_loop.state_dict()}


def steps_of(progress: Mapping[str, Any]) -> tuple[int, int]:
    """The optimiser steps and the batches of a training that a checkpoint keeps under ``loops``.

    Relies on: the names by which the fit loop keeps its optimiser's steps, which are ``global_step``, and its batches.
    """
    loop = progress["fit_loop"]
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    return steps, loop["epoch_loop.batch_progress"]["current"]["ready"]


def number_steps(trainer: lightning.Trainer) -> None:
    """Have a training that goes on number what it logs as one that was left alone; to be called at ``on_train_start``.

    Relies on: the epoch loop's ``_batches_that_stepped`` is the step of what is logged, and is raised by one after
    ``on_train_start`` where the loop goes on after a whole step; a training that came to its end had raised it already.
    """
    if trainer.global_step:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step - 1


def raised_while_restoring(error: BaseException) -> bool:
    """Whether an error comes from what a checkpoint holds: it was raised while a Trainer took that over.

    Relies on: all of that is called from Lightning's ``checkpoint_connector``.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).stem == "checkpoint_connector" and "restore" in frame.name for frame in frames)


def move_end(trainer: lightning.Trainer, steps: int) -> None:
    """Move the end of a training by some optimiser steps.

    A training that goes on from its last step would end before ``on_train_start``; one step more lets it begin, and one
    less there ends it before a batch is trained on.

    Relies on: the loops compare ``global_step`` with ``epoch_loop.max_steps``, first after ``on_load_checkpoint``, then
    after ``on_train_start``; and the epoch loop does not train where ``val_loop`` has been run.
    """
    trainer.fit_loop.epoch_loop.max_steps += steps


def batches_limit(trainer: lightning.Trainer, stage: str) -> int:
    """How many batches of ``val`` or ``test`` a Trainer plays at most on each device, by its own options.

    Relies on: ``limit_val_batches`` and ``limit_test_batches`` are counts where they are integers, otherwise shares.
    """
    limit = getattr(trainer, f"limit_{stage}_batches")
    return limit if isinstance(limit, int) else sys.maxsize


def episodes_played(trainer: lightning.Trainer, block: int, count: int) -> range:
    """The numbers of the episodes that all devices together play in what is under way; empty for all that there are.

    To be called on all devices: in an evaluation one may have a batch more than another.

    Relies on: ``num_training_batches`` is known when ``on_train_start`` is called; ``num_val_batches``,
    ``num_sanity_val_batches`` and ``num_test_batches`` have a number for each loader when ``on_validation_epoch_start``
    or ``on_test_epoch_start`` is.

    Args:
        trainer: in a training, a validation, a sanity check or a test.
        block: episodes of a batch.
        count: episodes of the whole evaluation.
    """
    if trainer.training:
        trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        return range(int(trainer.num_training_batches) * block * trainer.world_size if trial else 0)
    batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    most = torch.tensor(int((trainer.num_sanity_val_batches if trainer.sanity_checking else batches)[0]))
    most = trainer.strategy.reduce(most.to(trainer.strategy.root_device), reduce_op="max")
    return range(min(int(most) * block * trainer.world_size, count))
