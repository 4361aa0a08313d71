"""A run counted in whole optimiser steps: what follows from them for a Trainer, and for a run that goes on."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import lightning
import torch

from clip_m2df.errors import UserError


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


def check_goes_on(saved: Mapping[str, int], own: Mapping[str, int], *, most: int) -> None:
    """Refuse to go on with a run that counts otherwise (it would repeat episodes, or cut a step), or is over.

    Args:
        saved: how the run counted, and how far it is.
        own: how it is to be counted now.
        most: optimiser steps of the whole run, or a number below 0 for no end.

    Raises:
        UserError: says what to set.
    """
    episodes, batches, steps = (saved[key] for key in ("episodes_per_step", "batches_per_step", "steps"))
    if steps > most > 0:
        raise UserError(
            f"the checkpoint has made {steps} optimiser steps already; to go on, give more than that with"
            f" trainer.max_steps, which is {most}"
        )
    if saved.get("seed", own["seed"]) != own["seed"]:
        raise UserError(f"the run's episodes are those of seed {saved['seed']}: set data.seed to that")
    if (episodes, batches) != (own["episodes_per_step"], own["batches_per_step"]):
        raise UserError(
            f"the run made its steps of {episodes} episodes in {batches} batches on each device: set"
            f" data.episodes_per_step to {episodes}, and data.batch_size times the devices to {episodes // batches}"
        )


def count_in_steps(trainer: lightning.Trainer, episodes_per_step: int, batches: int, validate_every: int) -> None:
    """Let a Trainer accumulate the batches of a step, and validate after whole steps.

    Args:
        trainer: its options are changed.
        episodes_per_step: episodes of an optimiser step.
        batches: batches of it on each device.
        validate_every: optimiser steps between validations.

    Raises:
        UserError: the Trainer was given an option that contradicts, or that an endless stream has no use for.
    """
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


def batches_limit(trainer: lightning.Trainer, stage: str) -> int:
    """How many batches of ``val`` or ``test`` a Trainer plays at most on each device, by its own options."""
    limit = getattr(trainer, f"limit_{stage}_batches")
    return limit if isinstance(limit, int) else sys.maxsize


def episodes_played(trainer: lightning.Trainer, block: int, count: int) -> range:
    """The numbers of the episodes that all devices together play in what is under way; empty for all that there are.

    To be called on all devices: in an evaluation one may have a batch more than another.

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
