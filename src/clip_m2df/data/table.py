"""All episodes of an evaluation as one table, whose videos are read once each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from clip_m2df.data.episodes import ClipReader, EpisodeDataset, EpisodePlan
from clip_m2df.data.loader import UnusableVideos, VideoLoader
from clip_m2df.data.manifest import Video, relative_path
from clip_m2df.data.video import VideoError
from clip_m2df.episode import Clips, IndexedEpisode, episode_draws, select_episodes
from clip_m2df.files import fingerprint


class EvaluationTable(Dataset[int]):
    """The episodes of an evaluation by number, and the videos that they name.

    Args:
        dataset: tells the videos of each episode, and how a video is read.
        count: how many episodes.
        unusable: keeps count of unusable videos.
        num_workers: processes that decode.
        stuck_after: see :class:`clip_m2df.data.loader.VideoLoader`.
        progress: whether to show a progress bar.
        root: the manifest's folder.
        store: a folder for features.

    Attributes:
        reading: how frames are read, in words.
        episodes: all of them; videos are places in ``videos``.
        videos: those that the episodes name, in the manifest's order, then stand-ins as they were needed.
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        count: int,
        unusable: UnusableVideos,
        *,
        num_workers: int,
        stuck_after: float,
        progress: bool,
        root: str | None = None,
        store: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.root = root
        self.store = store
        self.reading = repr(dataset.reader)
        self.unusable = unusable
        self.num_workers = num_workers
        self.stuck_after = stuck_after
        self.progress = progress
        self._drawn = self._plans = [dataset.plan(number) for number in range(count)]
        self._replaced = [0] * count
        named = {video.path for plan in self._plans for video in _videos(plan)}
        self.videos = [video for row in dataset.split.videos for video in row if video.path in named]
        self._index()

    def __getitem__(self, number: int) -> int:
        """The number itself, for :meth:`batch` to look up."""
        return number

    def __len__(self) -> int:
        """How many episodes there are."""
        return len(self._plans)

    def batch(self, numbers: Sequence[int]) -> IndexedEpisode:
        """Some of the episodes."""
        return select_episodes(self.episodes, torch.tensor(numbers))

    def named(self, numbers: Sequence[int]) -> list[int]:
        """The places of the videos that episodes name, in order."""
        rows = select_episodes(self.episodes, torch.tensor(numbers, dtype=torch.long))
        places: list[int] = torch.cat((rows["support"].flatten(), rows["query"].flatten())).unique().tolist()
        return places

    def identity(self, place: int) -> str:
        """The video's path from the root, and what changes with its file; that of its cached frames if it is gone."""
        path = self.videos[place].path
        try:
            state = ":".join(map(str, fingerprint(path)))
        except OSError:
            state = "not there"
        return f"{relative_path(path, self.root)} {state}"

    def clips(self, chunks: Sequence[Sequence[int]]) -> Iterator[Clips]:
        """Read videos as evaluation does.

        Args:
            chunks: the places of videos that come together.

        Yields:
            A batch of clips for each chunk, in order.
        """
        loader: Iterable[Clips] = VideoLoader(
            _Reader([video.path for video in self.videos], self.dataset.reader),
            receive=self._receive,
            stuck_after=self.stuck_after,
            num_workers=min(self.num_workers, len(chunks)),
            batch_sampler=chunks,
            collate_fn=list,
        )
        return iter(track(loader, "Reading videos", total=len(chunks), transient=True, disable=not self.progress))

    def replace(self, unusable: Mapping[str, str]) -> None:
        """Put stand-ins in the places of unusable videos, as :class:`EpisodeDataset` does.

        Args:
            unusable: the reasons by path, of those that were found since the last time.

        Raises:
            UserError: there are more of them than may be.
        """
        self.unusable.add(unusable)
        known = self.unusable.reasons
        replanned = [
            self.dataset.replan(number, plan, known)
            if any(video.path in known for video in _videos(plan))
            else (plan, 0)
            for number, plan in enumerate(self._drawn)
        ]
        self._plans, self._replaced = [plan for plan, _ in replanned], [count for _, count in replanned]
        self.videos = list(
            {video.path: video for video in [*self.videos, *itertools.chain(*map(_videos, self._plans))]}.values()
        )
        self._index()

    def _index(self) -> None:
        """Put the places of videos into ``episodes``."""
        place = {video.path: place for place, video in enumerate(self.videos)}
        split = self.dataset.split
        labels = [[label for label, row in enumerate(plan.query) for _ in row] for plan in self._plans]
        self.episodes = IndexedEpisode(
            numbers=torch.arange(len(self)),
            support=torch.tensor([[[place[v.path] for v in row] for row in plan.support] for plan in self._plans]),
            query=torch.tensor([[place[v.path] for row in plan.query for v in row] for plan in self._plans]),
            query_labels=torch.tensor(labels),
            class_indices=torch.tensor([plan.classes for plan in self._plans]),
            class_names=list(split.class_texts),
            draws=torch.stack(
                [episode_draws(self.dataset.seed, split.name, i, len(row)) for i, row in enumerate(labels)]
            ),
            replaced=torch.tensor(self._replaced),
        )

    def _receive(self, items: Sequence[_Read]) -> Clips:
        read = [item for item in items if item.clip is not None]
        frames = self.dataset.reader.frames
        self.unusable.say_short({item.path: item.length for item in read if item.length < frames})
        return Clips(
            torch.tensor([item.place for item in read], dtype=torch.long),
            torch.stack([item.clip for item in read if item.clip is not None]) if read else None,
            {item.path: item.reason for item in items if item.clip is None},
        )


class _Read(NamedTuple):
    """What came of reading a video."""

    place: int
    path: str
    clip: Tensor | None = None
    length: int = 0
    reason: str = ""


class _Reader(Dataset[_Read]):
    """Videos by place."""

    def __init__(self, paths: Sequence[str], reader: ClipReader) -> None:
        self.paths = paths
        self.reader = reader
        self.reading: Callable[[str], object] = str

    def __getitem__(self, place: int) -> _Read:
        path = self.paths[place]
        self.reading(path)
        try:
            return _Read(place, path, *self.reader.read(path))
        except VideoError as error:
            return _Read(place, path, reason=str(error))
        finally:
            self.reading("")


def _videos(plan: EpisodePlan) -> Iterator[Video]:
    return (video for rows in (plan.support, plan.query) for row in rows for video in row)
