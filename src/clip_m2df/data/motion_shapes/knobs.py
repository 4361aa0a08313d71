"""How much harder than usual the test episodes of ``motion_shapes`` are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from clip_m2df.errors import UserError

if TYPE_CHECKING:
    from clip_m2df.data.episodes import EpisodePlan


@dataclass(frozen=True)
class Knobs:
    """Shares from 0, as usual, to 1.

    Attributes:
        overlap: of what makes a class its own, how much is taken away in all videos: the share of the way to a grey
            circle in ``demo`` and ``scene``, to a video in which nothing happens in ``order``.
        outliers: of the support videos, how many are occluded, of another class, or static.
        noise: deviation of the grain on each pixel of all videos, as a share of the range from black to white.

    Raises:
        UserError: a knob beyond its range.
    """

    overlap: float = 0.0
    outliers: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(f"the knob {name} is {value!r}, a share; it must be between 0 and 1")


NO_KNOBS = Knobs()


def outlier_path(path: str) -> str:
    """Where the outlying version of a test video lies: another folder in the place of ``test``."""
    video = PurePath(path)
    return str(video.parents[2] / "outliers" / video.parent.name / video.name)


def with_outliers(plan: EpisodePlan, share: float, rng: np.random.Generator) -> EpisodePlan:
    """Put outlying versions in the places of some support videos.

    Args:
        plan: an episode.
        share: how many, on average; those of a smaller share are among those of a larger one.
        rng: the only source of chance.
    """
    support = tuple(
        tuple(
            dataclasses.replace(video, path=outlier_path(video.path)) if draw < share else video
            for video, draw in zip(row, rng.random(len(row)), strict=True)
        )
        for row in plan.support
    )
    return plan._replace(support=support)
