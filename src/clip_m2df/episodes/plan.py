"""Which videos make up episode i, and which rank plays it.

Episodes are *addressable*: episode i is a pure function of (seed, stage, i), whatever the number of workers, ranks and
restarts. Numbers are dealt to ranks by :class:`EpisodeSampler`; everything random in an episode is drawn from its own
number, but for what its videos look like in training: that is drawn from the number of its optimiser step, in which a
video needs reading and encoding once, however many episodes have it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import DistributedSampler

from clip_m2df.datasets.manifest import Split, Video
from clip_m2df.episode import episode_generator
from clip_m2df.errors import UserError, require, some
from clip_m2df.motion_shapes.rendering import outlier_path


class EpisodePlan(NamedTuple):
    """The videos of an episode.

    Attributes:
        classes: indices in the split's class table, ``n_way`` of them.
        support: a row of ``n_shot`` videos a class.
        query: a row of query videos a class; ``n_query`` of them where they are drawn.
    """

    classes: tuple[int, ...]
    support: tuple[tuple[Video, ...], ...]
    query: tuple[tuple[Video, ...], ...]

    @property
    def videos(self) -> list[Video]:
        """All of them, the support before the query."""
        return [video for rows in (self.support, self.query) for row in rows for video in row]

    @property
    def query_labels(self) -> list[int]:
        """Of each query, the index of its class in the episode."""
        return [label for label, row in enumerate(self.query) for _ in row]

    def replaced(self, replace: Callable[[int, Video], Video]) -> EpisodePlan:
        """The same with each video replaced by what a function makes of the index of its class and the video."""
        support, query = (
            tuple(tuple(replace(c, video) for video in row) for c, row in zip(self.classes, rows, strict=True))
            for rows in (self.support, self.query)
        )
        return EpisodePlan(self.classes, support, query)


@dataclass(frozen=True)
class EpisodeShape:
    """How many classes and videos an episode has.

    Attributes:
        n_way: classes.
        n_shot: support videos a class.
        n_query: query videos a class.
    """

    n_way: int
    n_shot: int
    n_query: int

    def check(self, split: Split) -> None:
        """Check that a split can supply such episodes.

        Raises:
            UserError: If the shape makes no sense, or the split has too few classes or videos for it.
        """
        require(least=2, n_way=self.n_way)  # an episode tells classes apart
        require(least=1, n_shot=self.n_shot, n_query=self.n_query)
        n_classes = len(split.class_names)
        if n_classes < self.n_way:
            classes = f"{n_classes} class{'' if n_classes == 1 else 'es'}"
            raise UserError(
                f"the {split.name} split has {classes}, too few for n_way {self.n_way}: lower n_way, or add classes to"
                " the manifest"
            )
        needed = self.n_shot + self.n_query
        counts = {name: len(videos) for name, videos in zip(split.class_names, split.videos, strict=True)}
        if short := [f"{name!r} has {count}" for name, count in counts.items() if count < needed]:
            raise UserError(
                f"{len(short)} of the {n_classes} classes of the {split.name} split have fewer videos than the {needed}"
                f" that n_shot {self.n_shot} and n_query {self.n_query} take: {some(short)}; lower n_shot or n_query,"
                " add videos of these classes to the manifest, or remove the classes"
            )


def plan_episode(split: Split, shape: EpisodeShape, *, seed: int, episode: int) -> EpisodePlan:
    """Draw the classes and videos of one episode, all distinct.

    Args:
        split: where from; its name is the stage.
        shape: how many.
        seed: the run's seed.
        episode: the episode's number, from 0.
    """
    rng = episode_generator(seed, split.name, episode, "videos")
    classes = tuple(int(c) for c in rng.choice(len(split.class_names), shape.n_way, replace=False))
    needed = shape.n_shot + shape.n_query
    drawn = [[split.videos[c][v] for v in rng.choice(len(split.videos[c]), needed, replace=False)] for c in classes]
    return EpisodePlan(
        classes, tuple(tuple(row[: shape.n_shot]) for row in drawn), tuple(tuple(row[shape.n_shot :]) for row in drawn)
    )


def with_outliers(plan: EpisodePlan, share: float, rng: np.random.Generator) -> EpisodePlan:
    """Put outlying versions of videos of ``motion_shapes`` in the places of some support videos.

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


class EpisodeSampler(DistributedSampler[int]):
    """Deals episode numbers to ranks, none twice.

    A ``DistributedSampler``, so that a Trainer leaves it alone.

    Args:
        count: how many episodes in all: the same ones each time, on any number of ranks. None: an endless stream.
        block: how many consecutive ones go to a rank together.
        first: tells, at the start of each pass, the number at which an endless stream goes on.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        count: int | None,
        *,
        block: int = 1,
        first: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(range(count or world_size), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.count = count
        self.block = block
        self.first = first

    def __iter__(self) -> Iterator[int]:
        """The numbers of this rank, in order."""
        numbers = range(self.count) if self.count is not None else itertools.count(self.first())
        blocks = itertools.groupby(enumerate(numbers), lambda item: item[0] // self.block % self.num_replicas)
        return (number for rank, items in blocks if rank == self.rank for _, number in items)

    def __len__(self) -> int:
        """How many numbers this rank gets.

        Raises:
            TypeError: the stream is endless; what torch and Lightning take as "no length".
        """
        if self.count is None:
            raise TypeError("an endless stream of episodes has no length")
        return sum(1 for _ in self)
