"""Long videos of ``motion_shapes``: one action after another, and when each takes place."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_m2df.errors import UserError, require
from clip_m2df.motion_shapes.classes import MotionClass
from clip_m2df.motion_shapes.rendering import write_video
from clip_m2df.motion_shapes.scenes import FPS, draw_scene, paint

_ROUNDING = 1e-6  # frames: seconds that mean a whole number of frames may be a little more or less as floats


class Action(NamedTuple):
    """What a long video shows from when to when.

    Attributes:
        start: seconds from the video's beginning.
        end: seconds, where the next action starts.
        label: of the class.
    """

    start: float
    end: float
    label: str


def draw_actions(
    classes: Sequence[MotionClass],
    rng: np.random.Generator,
    *,
    seconds: float = 30.0,
    lengths: tuple[float, float] = (3.0, 8.0),
) -> list[tuple[MotionClass, float, float]]:
    """Draw which actions follow one another, and how long each takes.

    Args:
        classes: what is drawn from. None follows itself, unless it is the only one.
        rng: the only source of chance.
        seconds: length of the whole, a whole number of frames.
        lengths: the shortest and the longest that an action takes, in seconds. Each is drawn evenly among the lengths
            in whole frames that leave a rest of such lengths.

    Returns:
        Class, start and end in seconds of each action; the first starts at 0, each of the others where the one before
        it ends, and the last ends at ``seconds``.

    Raises:
        UserError: there is no class, or no lengths within the limits make up the whole.
    """
    if not classes:
        raise UserError("a long video needs at least one class of actions; there is none to draw from")
    said = f"a video of {seconds:g} s made of actions of {lengths[0]:g} to {lengths[1]:g} s"
    if not (0 < lengths[0] <= lengths[1] < math.inf and 0 < seconds < math.inf):
        raise UserError(f"{said} can't be: all must be above 0, and the shortest no longer than the longest")
    total = round(seconds * FPS)
    if abs(seconds * FPS - total) > _ROUNDING:
        raise UserError(f"{said} can't be: it must be a whole number of frames, {FPS} a second")
    shortest = max(math.ceil(lengths[0] * FPS - _ROUNDING), 1)
    longest = math.floor(lengths[1] * FPS + _ROUNDING)
    if not _fits(total, shortest, longest):
        raise UserError(f"{said} can't be: no such lengths make it up; let it or the longest be longer")
    actions: list[tuple[MotionClass, float, float]] = []
    start = 0
    while start < total:
        others = [c for c in classes if not actions or c != actions[-1][0]] or classes
        chosen = others[int(rng.integers(len(others)))]
        fitting = [n for n in range(shortest, longest + 1) if _fits(total - start - n, shortest, longest)]
        end = start + fitting[int(rng.integers(len(fitting)))]
        actions.append((chosen, start / FPS, end / FPS))
        start = end
    return actions


def render_long(
    path: Path,
    classes: Sequence[MotionClass],
    *,
    seed: int,
    seconds: float = 30.0,
    lengths: tuple[float, float] = (3.0, 8.0),
) -> list[Action]:
    """Render a video of several actions, each a scene of its own.

    Args:
        path: the MP4 file to write.
        classes: see :func:`draw_actions`, as the two below.
        seed: the same one gives the same bytes.
        seconds: length of the video.
        lengths: the shortest and the longest that an action takes, in seconds.

    Returns:
        The actions, in their order.

    Raises:
        UserError: the seed is negative, or as :func:`draw_actions`.
    """
    require(least=0, seed=seed)
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = draw_actions(classes, rng, seconds=seconds, lengths=lengths)
    parts = [paint(draw_scene(c, rng, frames=round((end - start) * FPS))) for c, start, end in drawn]
    write_video(path, np.concatenate(parts))
    return [Action(start, end, c.label) for c, start, end in drawn]


def _fits(frames: int, shortest: int, longest: int) -> bool:
    """Tell whether some lengths within the limits, or none at all, make up a number of frames."""
    # Between the limits may lie no whole frame.
    return frames >= 0 and longest >= shortest and math.ceil(frames / longest) * shortest <= frames
