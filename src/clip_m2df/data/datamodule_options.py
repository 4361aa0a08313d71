"""What the options of :class:`clip_m2df.data.datamodule.EpisodeDataModule` may be."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterable
from typing import Literal, get_args

from clip_m2df.data import motion_shapes
from clip_m2df.data.video import Decoder
from clip_m2df.errors import UserError

# The embedded benchmark's families by the names under which they stand for a manifest.
EMBEDDED = {"motion_shapes": "demo", "motion_shapes_scene": "scene", "motion_shapes_order": "order"}
KNOBS = tuple(field.name for field in dataclasses.fields(motion_shapes.Knobs))

Evaluation = Literal["bank", "direct"]


def check_at_least_one(**options: int) -> None:
    """Refuse numbers of things of which there have to be some.

    Raises:
        UserError: names the first.
    """
    for option, value in options.items():
        if value < 1:
            raise UserError(f"{option} is {value}; it must be at least 1")


def check_not_negative(**options: int) -> None:
    """Refuse numbers below 0.

    Raises:
        UserError: names the first.
    """
    for option, value in options.items():
        if value < 0:
            raise UserError(f"{option} is {value}; it must not be negative")


def check_one_a_device(world_size: int, **options: int) -> None:
    """Refuse numbers of episodes that leave a device without any.

    Raises:
        UserError: names the first.
    """
    for option, value in options.items():
        if value < world_size:
            raise UserError(f"{option} is {value} on {world_size} devices; give at least one a device")


def check_sizes(n_way: int, resize: int, size: int) -> None:
    """Refuse episodes of one class, and crops larger than the frames.

    Raises:
        UserError: says what to give.
    """
    if n_way < 2:
        raise UserError(f"n_way is {n_way}: there is nothing to tell apart; give at least 2")
    if resize < size:
        raise UserError(f"resize {resize} is smaller than size {size}, the crop; give at least {size}")


def check_patience(stuck_after: float, max_unusable: float | None) -> None:
    """Refuse limits that nothing could keep to, or everything.

    Raises:
        UserError: says between what they have to be.
    """
    if not stuck_after > 0:
        raise UserError(f"stuck_after is {stuck_after}; it must be positive")
    if max_unusable is not None and not 0 <= max_unusable <= 1:
        raise UserError(f"max_unusable is {max_unusable}, a share; it must be between 0 and 1")


def check_ways(store: str | None, evaluation: str, decoder: str) -> None:
    """Refuse a store that is no folder, and ways to evaluate and to decode that don't exist or aren't installed.

    Raises:
        UserError: says which there are.
    """
    if store is not None and os.path.exists(store) and not os.path.isdir(store):
        raise UserError(f"store {store} is no folder; name one, which is made if need be")
    if evaluation not in get_args(Evaluation):
        raise UserError(f"evaluation is {evaluation!r}; it can be {', '.join(get_args(Evaluation))}")
    if decoder not in get_args(Decoder):
        raise UserError(f"decoder is {decoder!r}; it can be {', '.join(get_args(Decoder))}")
    if decoder in ("decord", "torchcodec") and importlib.util.find_spec(decoder) is None:
        raise UserError(f"decoder {decoder} is not installed; install it, or take auto")


def check_knobs(knobs: Iterable[str] | None, manifest: str, episodes_file: str | None) -> None:
    """Refuse knobs that don't exist, or that there is nothing to turn by.

    Raises:
        UserError: says which there are, or what to leave out.
    """
    if unknown := [name for name in knobs or {} if name not in KNOBS]:
        raise UserError(f"knobs: there is no {unknown[0]!r}; there are {', '.join(KNOBS)}")
    if knobs and manifest not in EMBEDDED:
        raise UserError(f"knobs are those of the embedded benchmark ({', '.join(EMBEDDED)}), not of {manifest}")
    if knobs and episodes_file is not None:
        raise UserError("knobs and episodes_file both say what a test plays; leave out one of them")
