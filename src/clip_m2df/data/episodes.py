"""Which videos make up episode i, and the frames that stand for them.

Episodes are *addressable*: episode i is a pure function of (seed, stage, i), whatever the number of workers, ranks and
restarts. Numbers are dealt to ranks by :class:`EpisodeSampler`; everything random in an episode is drawn from its own
number.
"""

from __future__ import annotations

import itertools
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from clip_m2df.data.manifest import Split, Video
from clip_m2df.data.transforms import resize_and_crop, segment_indices
from clip_m2df.data.video import Decoder, read_frames
from clip_m2df.episode import Episode, episode_draws, episode_generator


class EpisodePlan(NamedTuple):
    """The videos of an episode.

    Attributes:
        classes: places in the split's class table, ``n_way`` of them.
        support: a row of ``n_shot`` videos a class.
        query: a row of ``n_query`` videos a class.
    """

    classes: tuple[int, ...]
    support: tuple[tuple[Video, ...], ...]
    query: tuple[tuple[Video, ...], ...]


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
        """Raise ``UserError`` where ``split`` can't supply such episodes."""
        split.check_episodes(n_way=self.n_way, n_shot=self.n_shot, n_query=self.n_query)


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
    drawn = []
    for c in classes:
        videos = split.videos[c]
        drawn.append(tuple(videos[v] for v in rng.choice(len(videos), shape.n_shot + shape.n_query, replace=False)))
    return EpisodePlan(
        classes, tuple(row[: shape.n_shot] for row in drawn), tuple(row[shape.n_shot :] for row in drawn)
    )


@dataclass(frozen=True)
class ClipReader:
    """Turns a video into the frames that the model sees.

    Attributes:
        frames: frames a video (T), one from each of as many equal segments.
        resize: short side in pixels before the crop.
        size: side of the square crop in pixels.
        flip: mirror half of the training clips. Off where classes have a left and a right.
        decoder: see :func:`clip_m2df.data.video.read_frames`.
    """

    frames: int = 8
    resize: int = 256
    size: int = 224
    flip: bool = False
    decoder: Decoder = "auto"

    def read(self, path: str, uniforms: Tensor | None = None) -> tuple[Tensor, int]:
        """Decode, resize and crop.

        Args:
            path: the video, or a folder of numbered images.
            uniforms: ``(frames + 3)`` in [0, 1) for training: the frame in each segment, the place of the crop, whether
                to flip. Without them the middle frames and the centre crop.

        Returns:
            uint8 ``(frames, 3, size, size)``, and how many frames the video has.
        """
        length = 0
        offsets = None if uniforms is None else uniforms[: self.frames]

        def choose(n_frames: int) -> list[int]:
            nonlocal length
            length = n_frames
            return segment_indices(n_frames, self.frames, offsets)

        clip = read_frames(path, choose, decoder=self.decoder)
        position, flip = (0.5, 0.5), False
        if uniforms is not None:
            y, x, mirrored = uniforms[self.frames :].tolist()
            position, flip = (y, x), self.flip and mirrored < 0.5
        return resize_and_crop(clip, resize=self.resize, size=self.size, position=position, flip=flip), length


class EpisodeDataset(Dataset[Episode]):
    """Episodes by number.

    Args:
        split: where the videos come from.
        shape: how many classes and videos.
        reader: how a video is read.
        seed: the run's seed.
        augment: random frames, crops and flips (training), or the middle frames and centre crop.
    """

    def __init__(self, split: Split, shape: EpisodeShape, reader: ClipReader, *, seed: int, augment: bool) -> None:
        shape.check(split)
        self.split = split
        self.shape = shape
        self.reader = reader
        self.seed = seed
        self.augment = augment
        # Shared with the workers, so that it is said once.
        self._said_short = multiprocessing.get_context("spawn").Value("b", False)

    def __getitem__(self, episode: int) -> Episode:
        """Episode number ``episode``, with one leading axis of size 1 (see :class:`clip_m2df.episode.Episode`)."""
        plan = plan_episode(self.split, self.shape, seed=self.seed, episode=episode)
        support = [video for row in plan.support for video in row]
        query = [video for row in plan.query for video in row]
        uniforms = None
        if self.augment:
            rng = episode_generator(self.seed, self.split.name, episode, "augmentation")
            uniforms = torch.from_numpy(rng.random((len(support) + len(query), self.reader.frames + 3)))
        clips = torch.stack(
            [self._read(video, None if uniforms is None else uniforms[i]) for i, video in enumerate(support + query)]
        )
        labels = torch.arange(self.shape.n_way).repeat_interleave(self.shape.n_query)
        return Episode(
            support=clips[: len(support)].unflatten(0, (1, self.shape.n_way, self.shape.n_shot)),
            query=clips[len(support) :].unsqueeze(0),
            query_labels=labels.unsqueeze(0),
            class_indices=torch.tensor([plan.classes]),
            class_names=list(self.split.class_texts),
            draws=episode_draws(self.seed, self.split.name, episode, len(query)).unsqueeze(0),
        )

    def _read(self, video: Video, uniforms: Tensor | None) -> Tensor:
        clip, length = self.reader.read(video.path, uniforms)
        if length < self.reader.frames:
            with self._said_short.get_lock():
                said, self._said_short.value = self._said_short.value, True
            if not said:
                warnings.warn(
                    f"{video.path} has {length} frames, fewer than the {self.reader.frames} wanted: they are repeated"
                    " evenly. The same happens to any other short video, and is not said again.",
                    stacklevel=1,
                )
        return clip


def collate_episodes(episodes: Sequence[Episode]) -> Episode:
    """Join episodes of one split and shape along their leading axis."""
    joined = episodes[0].copy()
    for key in set(joined) - {"class_names"}:
        joined[key] = torch.cat([episode[key] for episode in episodes])  # type: ignore[literal-required]
    return joined


class EpisodeSampler(DistributedSampler[int]):
    """Deals episode numbers to ranks, none twice.

    A ``DistributedSampler``, so that a Trainer leaves it alone.

    Args:
        count: how many episodes in all: the same ones each time, on any number of ranks. None: an endless stream.
        first: tells, at the start of each pass, the number at which an endless stream goes on.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self, count: int | None, *, first: Callable[[], int] = lambda: 0, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(range(count or world_size), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.count = count
        self.first = first

    def __iter__(self) -> Iterator[int]:
        """The numbers of this rank, in order."""
        if self.count is None:
            return itertools.count(self.first() + self.rank, self.num_replicas)
        return iter(range(self.rank, self.count, self.num_replicas))

    def __len__(self) -> int:
        """How many numbers this rank gets.

        Raises:
            TypeError: the stream is endless; what torch and Lightning take as "no length".
        """
        if self.count is None:
            raise TypeError("an endless stream of episodes has no length")
        return len(range(self.rank, self.count, self.num_replicas))
