"""Which videos make up episode i, and which rank plays it.

Episodes are *addressable*: episode i is a pure function of (seed, stage, i), whatever the number of workers, ranks and
restarts. Numbers are dealt to ranks by :class:`EpisodeSampler`; everything random in an episode is drawn from its own
number, but for what its videos look like in training: that is drawn from the number of its optimiser step, in which a
video needs reading and encoding once, however many episodes have it.

An episode is dealt in one of two ways. ``random``: classes and videos are drawn, each as often as any other.
``grouped``: no query is of the group of a support video of the episode, cut from the same as it. The episode is then
the random one of its number, but for support videos of a group that the support of their class has already, and for
queries with a twin: in their places come others of their class, each as often as any other. Where there are too few
others, groups come twice in a support, and if need be the support is drawn anew so that enough queries are left.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import DistributedSampler

from clip_m2df.datasets.manifest import Split, Video
from clip_m2df.episode import episode_generator
from clip_m2df.errors import UserError, require, some
from clip_m2df.motion_shapes.rendering import outlier_path

# Where classes share groups, and those that were drawn make no grouped episode: how often the support is drawn anew
# before the classes are, and how often these.
TRIES = 20


def source(video: Video) -> str:
    """What a video was cut from: its group, or the video itself where that is not known."""
    return video.group or f"\0{video.path}"


class EpisodePlan(NamedTuple):
    """The videos of an episode.

    Attributes:
        classes: indices in the split's class table, ``n_way`` of them.
        support: a row of ``n_shot`` videos a class.
        query: a row of query videos a class; ``n_query`` of them where they are drawn.
        unknown: query videos of other classes, those of a class one after the other.
    """

    classes: tuple[int, ...]
    support: tuple[tuple[Video, ...], ...]
    query: tuple[tuple[Video, ...], ...]
    unknown: tuple[Video, ...] = ()

    @property
    def videos(self) -> list[Video]:
        """All of them, the support before the query, and the unknown ones last."""
        return [*itertools.chain(*self.support, *self.query), *self.unknown]

    @property
    def query_labels(self) -> list[int]:
        """Of each query, the index of its class in the episode."""
        return [label for label, row in enumerate(self.query) for _ in row]

    @property
    def sources(self) -> set[str]:
        """What the support was cut from."""
        return {source(video) for row in self.support for video in row}

    @property
    def twins(self) -> list[bool]:
        """Of each query, whether a support video, of whatever class, is of its group."""
        sources = self.sources
        return [source(video) in sources for row in self.query for video in row]


@dataclass(frozen=True)
class EpisodeShape:
    """How many classes and videos an episode has, and how they are dealt.

    Attributes:
        n_way: classes.
        n_shot: support videos a class.
        n_query: query videos a class.
        n_unknown: query videos of other classes, in all.
        grouped: whether no query, known or unknown, may share a group with the support.
    """

    n_way: int
    n_shot: int
    n_query: int
    n_unknown: int = 0
    grouped: bool = False

    def check(self, split: Split) -> None:
        """Check that a split can supply such episodes.

        Raises:
            UserError: If the shape makes no sense, or the split has too few classes, videos or groups for it.
        """
        require(least=2, n_way=self.n_way)  # an episode tells classes apart
        require(least=1, n_shot=self.n_shot, n_query=self.n_query)
        require(least=0, n_unknown=self.n_unknown)
        n_classes = len(split.class_names)
        classes = f"{n_classes} class{'' if n_classes == 1 else 'es'}"
        if n_classes < self.n_way:
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
        outside = sum(sorted(counts.values())[: n_classes - self.n_way])
        if outside < self.n_unknown:
            raise UserError(
                f"the {split.name} split has {classes}; outside an episode of n_way {self.n_way} there may be only"
                f" {outside} videos, too few for unknown_queries {self.n_unknown}: lower unknown_queries or n_way, or"
                " add classes to the manifest"
            )
        fixed = [
            f"{name!r} has {len(own)} group{'' if len(own) == 1 else 's'}"
            for name, videos in zip(split.class_names, split.videos, strict=True)
            if self.grouped and not self.can_part(own := Counter(map(source, videos)), ())
        ]
        if fixed:
            raise UserError(
                f"{len(fixed)} of the {n_classes} classes of the {split.name} split have too few groups for grouped"
                f" episodes, in which support and queries, n_shot {self.n_shot} and n_query {self.n_query}, are of"
                f" different groups: {some(fixed)}; lower n_shot or n_query, add videos of other groups, remove the"
                " classes, or give --data.episodes random"
            )

    def can_part(self, sizes: Mapping[str, int], support: Collection[str]) -> bool:
        """Whether a class has support and queries of different sources, some of which are the support's already.

        Args:
            sizes: how many videos of the class are of each source.
            support: sources that are the support's.
        """
        of_support = sum(size for name, size in sizes.items() if name in support)
        room = sum(sizes.values()) - self.n_query - of_support
        if room < 0 or of_support >= self.n_shot:
            return room >= 0
        reachable = 1  # bit n: some of the other sources have n videos together
        for name, size in sizes.items():
            if name not in support:
                reachable |= reachable << size
        return any(reachable >> n & 1 for n in range(self.n_shot - of_support, room + 1))


def plan_episode(split: Split, shape: EpisodeShape, *, seed: int, episode: int) -> EpisodePlan:
    """Draw the classes and videos of one episode, all distinct.

    The unknown queries come from a generator of their own: with or without them, the others are the same.

    Args:
        split: where from; its name is the stage.
        shape: how many, and in which way.
        seed: the run's seed.
        episode: the episode's number, from 0.

    Raises:
        UserError: a grouped episode can't be had, since classes share their groups.
    """
    rng = episode_generator(seed, split.name, episode, "videos")
    classes = tuple(int(c) for c in rng.choice(len(split.class_names), shape.n_way, replace=False))
    needed = shape.n_shot + shape.n_query
    drawn = [[split.videos[c][v] for v in rng.choice(len(split.videos[c]), needed, replace=False)] for c in classes]
    plan = EpisodePlan(
        classes, tuple(tuple(row[: shape.n_shot]) for row in drawn), tuple(tuple(row[shape.n_shot :]) for row in drawn)
    )
    if shape.grouped:
        plan = _spread(plan, split, rng)
        if any(plan.twins):
            plan = _with_other_queries(plan, split, rng) or _parted(split, shape, classes, rng)
    if shape.n_unknown:
        rng = episode_generator(seed, split.name, episode, "unknown")
        plan = plan._replace(unknown=_unknown(plan, split, shape, rng))
    return plan


def _spread(plan: EpisodePlan, split: Split, rng: np.random.Generator) -> EpisodePlan:
    """The same with a support of different groups, as far as a class has others than those of its queries.

    So ``n_shot`` videos show as much as they do where each is a group of its own.
    """
    rows = []
    for c, row, queries in zip(plan.classes, plan.support, plan.query, strict=True):
        first = {source(video): video for video in reversed(row)}
        if len(first) < len(row):
            kept, taken = set(first.values()), {*first, *map(source, queries)}
            free = [v for v in split.videos[c] if source(v) not in taken]
            new = iter({source(free[v]): free[v] for v in rng.permutation(len(free))}.values())
            row = tuple(video if video in kept else next(new, video) for video in row)
        rows.append(row)
    return plan._replace(support=tuple(rows))


def _with_other_queries(plan: EpisodePlan, split: Split, rng: np.random.Generator) -> EpisodePlan | None:
    """The same with other queries in the places of twins; None if there are too few."""
    sources, rows = plan.sources, []
    for c, row in zip(plan.classes, plan.query, strict=True):
        kept = [video for video in row if source(video) not in sources]
        if missing := len(row) - len(kept):
            paths = {video.path for video in kept}
            free = [v for v in split.videos[c] if source(v) not in sources and v.path not in paths]
            if len(free) < missing:
                return None
            kept += [free[v] for v in rng.choice(len(free), missing, replace=False)]
        rows.append(tuple(kept))
    return plan._replace(query=tuple(rows))


def _parted(split: Split, shape: EpisodeShape, classes: tuple[int, ...], rng: np.random.Generator) -> EpisodePlan:
    """An episode without twins whose support is drawn so that enough queries are left.

    Raises:
        UserError: none was found.
    """
    for _ in range(TRIES):
        sizes = [Counter(map(source, split.videos[c])) for c in classes]
        for _ in range(TRIES):
            if (support := _parted_support(split, shape, classes, sizes, rng)) is not None:
                plan = EpisodePlan(classes, support, ((),) * len(classes))
                sources = plan.sources
                free = [[v for v in split.videos[c] if source(v) not in sources] for c in classes]
                drawn = [[row[v] for v in rng.choice(len(row), shape.n_query, replace=False)] for row in free]
                return plan._replace(query=tuple(map(tuple, drawn)))
        # Each class has groups enough, and these do not, since they share them.
        names = [f"{split.class_names[c]!r} has {len(own)} groups" for c, own in zip(classes, sizes, strict=True)]
        classes = tuple(int(c) for c in rng.choice(len(split.class_names), shape.n_way, replace=False))
    raise UserError(
        f"no grouped episode was found in the {split.name} split: its classes share so many of their groups that"
        f" support and queries can't be of different ones, such as in {some(names)}; lower n_way, n_shot or n_query,"
        " add videos of other groups, or give --data.episodes random"
    )


def _parted_support(
    split: Split,
    shape: EpisodeShape,
    classes: Sequence[int],
    sizes: Sequence[Mapping[str, int]],
    rng: np.random.Generator,
) -> tuple[tuple[Video, ...], ...] | None:
    """A support that leaves each class its queries; None if the draw led to none."""
    sources: set[str] = set()
    rows: list[list[Video]] = [[] for _ in classes]
    for label in rng.permutation(len(classes)):
        videos, row = split.videos[classes[label]], rows[label]
        for v in rng.permutation(len(videos)):
            if len(row) == shape.n_shot:
                break
            name = source(videos[v])
            if name not in sources:
                more = sources | {name}
                if not all(shape.can_part(own, more) for own in sizes if name in own):
                    continue
                sources = more
            row.append(videos[v])
        if len(row) < shape.n_shot:
            return None
    return tuple(map(tuple, rows))


def _unknown(plan: EpisodePlan, split: Split, shape: EpisodeShape, rng: np.random.Generator) -> tuple[Video, ...]:
    """Videos of classes that an episode does not have, of as many classes as there are.

    Raises:
        UserError: there are too few that share no group with the support of a grouped episode.
    """
    sources = plan.sources if shape.grouped else ()
    rows: list[list[Video]] = []
    for c in rng.permutation(len(split.class_names)):
        if c not in plan.classes and len(rows) < shape.n_unknown:
            free = [video for video in split.videos[c] if source(video) not in sources]
            rows += [[free[v] for v in rng.permutation(len(free))]] if free else []
    counts = [0] * len(rows)
    for _ in range(shape.n_unknown):  # one of each class in turn
        room = [k for k, row in enumerate(rows) if counts[k] < len(row)]
        if not room:
            raise UserError(
                f"an episode of the {split.name} split has only {sum(counts)} unknown queries that share no group with"
                f" its support: lower unknown_queries, {shape.n_unknown}, or n_shot, add videos of other groups, or"
                " give --data.episodes random"
            )
        counts[min(room, key=counts.__getitem__)] += 1
    return tuple(video for row, count in zip(rows, counts, strict=True) for video in row[:count])


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
