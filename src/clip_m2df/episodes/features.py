"""Episodes whose videos are read once each: tables for evaluation, and for training from features."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from clip_m2df.datasets.manifest import Video
from clip_m2df.episode import Clips, IndexedEpisode, episode_draws, episode_generator, select_episodes
from clip_m2df.episodes.dataset import EpisodeDataset
from clip_m2df.episodes.loader import UnusableVideos, VideoLoader
from clip_m2df.episodes.plan import EpisodePlan
from clip_m2df.files import fingerprint, relative_path
from clip_m2df.video.reader import VideoError


class _VideoTable:
    """Videos that are read once each.

    Args:
        dataset: tells the videos of each episode, and how a video is read.
        unusable: keeps count of unusable videos.
        num_workers: processes that decode.
        stuck_after: see :class:`clip_m2df.episodes.loader.VideoLoader`.
        progress: whether to show a progress bar.
        root: the manifest's folder.
        store: a folder for features.

    Attributes:
        videos: what the places of episodes mean.
        reading: how frames are read, in words.
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        unusable: UnusableVideos,
        *,
        num_workers: int,
        stuck_after: float,
        progress: bool,
        root: str | None = None,
        store: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.unusable = unusable
        self.num_workers = num_workers
        self.stuck_after = stuck_after
        self.progress = progress
        self.root = root
        self.store = store
        self.reading = repr(dataset.reader)
        self.videos: list[Video] = []

    def identity(self, place: int) -> str:
        """The video's path from the root, and what changes with its file; that of its cached frames if it is gone."""
        path = self.videos[place].path
        try:
            state = ":".join(map(str, fingerprint(path)))
        except OSError:
            state = "not there"
        return f"{relative_path(path, self.root)} {state}"

    def uniforms(self, place: int) -> Tensor | None:
        """What the frames, the crop and the flip of a clip are drawn by; None for the middle ones."""
        return None

    def clips(self, chunks: Sequence[Sequence[int]]) -> Iterator[Clips]:
        """Read videos.

        Args:
            chunks: the places of videos that come together.

        Yields:
            A batch of clips for each chunk, in order.
        """
        loader: Iterable[Clips] = VideoLoader(
            _Reader(self),
            receive=self._receive,
            stuck_after=self.stuck_after,
            num_workers=min(self.num_workers, len(chunks)),
            batch_sampler=chunks,
            collate_fn=list,
        )
        return iter(track(loader, "Reading videos", total=len(chunks), transient=True, disable=not self.progress))

    def _receive(self, items: Sequence[_Read]) -> Clips:
        read = [item for item in items if item.clip is not None]
        frames = self.dataset.reader.frames
        self.unusable.say_short({item.path: item.length for item in read if item.length < frames})
        return Clips(
            torch.tensor([item.place for item in read], dtype=torch.long),
            torch.stack([item.clip for item in read if item.clip is not None]) if read else None,
            {item.path: item.reason for item in items if item.clip is None},
        )


class EvaluationTable(_VideoTable, Dataset[int]):
    """The episodes of an evaluation by number, and the videos that they name.

    Args:
        dataset: see :class:`_VideoTable`.
        count: how many episodes.
        unusable: see :class:`_VideoTable`.
        **options: the same.

    Attributes:
        episodes: all of them; videos are places in ``videos``.
        videos: those that the episodes name, in the manifest's order, then stand-ins as they were needed.
    """

    def __init__(self, dataset: EpisodeDataset, count: int, unusable: UnusableVideos, **options: Any) -> None:
        super().__init__(dataset, unusable, **options)
        self._drawn = self._plans = [dataset.plan(number) for number in range(count)]
        self._replaced = [0] * count
        named = {video.path: video for plan in self._plans for video in _videos(plan)}
        own = [video for row in dataset.split.videos for video in row if video.path in named]
        # An episode may name others than the split's.
        self.videos = list({video.path: video for video in [*own, *named.values()]}.values())
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


class TrainingTable(_VideoTable, Dataset[IndexedEpisode]):
    """Training episodes by number, from a few augmented views of each video that are read before the training.

    Args:
        dataset: see :class:`_VideoTable`.
        views: how many views a video has.
        unusable: see :class:`_VideoTable`.
        **options: the same.

    Attributes:
        videos: that of each place: the views of a video follow one another.
    """

    def __init__(self, dataset: EpisodeDataset, views: int, unusable: UnusableVideos, **options: Any) -> None:
        super().__init__(dataset, unusable, **options)
        self.views = views
        self.videos = [video for row in dataset.split.videos for video in row for _ in range(views)]
        self._first = {video.path: views * place for place, video in enumerate(self.videos[::views])}

    def __getitem__(self, number: int) -> IndexedEpisode:
        """Episode number ``number``, with one leading axis of size 1; which view of a video comes is its own draw."""
        plan, replaced = self.dataset.plan(number), 0
        if self.unusable.reasons:
            plan, replaced = self.dataset.replan(number, plan, self.unusable.reasons)
        stage, labels = self.dataset.split.name, [label for label, row in enumerate(plan.query) for _ in row]
        rng = episode_generator(self.dataset.seed, stage, number, "augmentation")
        places = [self._first[video.path] + int(rng.integers(self.views)) for video in _videos(plan)]
        n_support = len(places) - len(labels)
        return IndexedEpisode(
            numbers=torch.tensor([number]),
            support=torch.tensor(places[:n_support]).view(1, len(plan.classes), -1),
            query=torch.tensor([places[n_support:]]),
            query_labels=torch.tensor([labels]),
            class_indices=torch.tensor([plan.classes]),
            class_names=list(self.dataset.split.class_texts),
            draws=episode_draws(self.dataset.seed, stage, number, len(labels)).unsqueeze(0),
            replaced=torch.tensor([replaced]),
        )

    def collate(self, episodes: Sequence[IndexedEpisode]) -> IndexedEpisode:
        """Join episodes along their leading axis."""
        joined = episodes[0].copy()
        for key in set(joined) - {"class_names"}:
            joined[key] = torch.cat([episode[key] for episode in episodes])  # type: ignore[literal-required]
        return joined

    def named(self, numbers: Sequence[int]) -> list[int]:
        """The places of all views of the videos that episodes name; of all usable videos if none is given."""
        paths = {video.path for number in numbers for video in _videos(self.dataset.plan(number))}
        return [
            place
            for place, video in enumerate(self.videos)
            if video.path not in self.unusable.reasons and (not numbers or video.path in paths)
        ]

    def identity(self, place: int) -> str:
        """The video and the view."""
        return f"{super().identity(place)} view {place % self.views} of seed {self.dataset.seed}"

    def uniforms(self, place: int) -> Tensor:
        """A view's own, which depend on the seed, the video's path and the view's number alone."""
        path = relative_path(self.videos[place].path, self.root)
        number = zlib.crc32(path.encode(errors="surrogateescape"))
        rng = episode_generator(self.dataset.seed, self.dataset.split.name, number, "views")
        return torch.from_numpy(rng.random((self.views, self.dataset.reader.frames + 3)))[place % self.views]

    def replace(self, unusable: Mapping[str, str]) -> None:
        """Leave unusable videos out of the episodes.

        Args:
            unusable: the reasons by path.

        Raises:
            UserError: there are more of them than may be.
        """
        self.unusable.add(unusable)


class _Read(NamedTuple):
    """What came of reading a video."""

    place: int
    path: str
    clip: Tensor | None = None
    length: int = 0
    reason: str = ""


class _Reader(Dataset[_Read]):
    """The clips of a table's videos by place."""

    def __init__(self, table: _VideoTable) -> None:
        self.paths = [video.path for video in table.videos]
        self.reader = table.dataset.reader
        self.uniforms = table.uniforms
        self.reading: Callable[[str], object] = str

    def __getitem__(self, place: int) -> _Read:
        path = self.paths[place]
        self.reading(path)
        try:
            return _Read(place, path, *self.reader.read(path, self.uniforms(place)))
        except VideoError as error:
            return _Read(place, path, reason=str(error))
        finally:
            self.reading("")


def _videos(plan: EpisodePlan) -> Iterator[Video]:
    return (video for rows in (plan.support, plan.query) for row in rows for video in row)
