"""Episodes whose videos are read and encoded once each: tables for evaluation, and for training from features."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple, cast

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from clip_m2df.datasets.feature_tables import FeatureTable
from clip_m2df.datasets.manifest import Video
from clip_m2df.episode import (
    Clips,
    IndexedEpisode,
    TableEpisodes,
    VideoTable,
    episode_generator,
    select_episodes,
)
from clip_m2df.episodes.dataset import EpisodeDataset
from clip_m2df.episodes.loader import ReadingNow, UnusableVideos, VideoLoader
from clip_m2df.episodes.plan import EpisodePlan
from clip_m2df.files import fingerprint_text, relative_path
from clip_m2df.video.reader import VideoError


@dataclass(eq=False)
class EpisodeTable(Dataset[int], VideoTable):
    """Episodes by number, and videos that are read once each, for however many episodes.

    Attributes:
        dataset: tells the videos of each episode, and how a video is read.
        unusable: keeps count of unusable videos.
        block: episodes of a batch.
        progress: whether to show a progress bar.
        root: the manifest's folder.
        store: a folder for features.
        num_workers: processes that decode.
        stuck_after: see :class:`clip_m2df.episodes.loader.VideoLoader`.
        known: the features of its videos; then no video is read.
        reading: how frames are read, in words.
        frames: of a video.
        videos: what the indices of episodes mean.
        each: how often each comes in them, one after the other.
    """

    dataset: EpisodeDataset
    unusable: UnusableVideos
    _: KW_ONLY
    block: int = 1
    progress: bool = False
    root: str | None = None
    store: str | None = None
    num_workers: int = 0
    stuck_after: float = 300.0
    known: FeatureTable | None = None
    each: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        self.reading = repr(self.dataset.reader)
        self.frames = self.dataset.reader.frames
        self.videos: list[Video] = []

    def replace(self, unusable: Mapping[str, str]) -> None:
        """Have other videos instead of those that can't be read.

        Args:
            unusable: the reasons by path, of those that were found since the last time.

        Raises:
            UserError: there are more of them than may be.
        """
        self.unusable.add(unusable)

    def __getitem__(self, number: int) -> int:
        """The number itself, for :meth:`batch`: its videos are looked up when they have been read."""
        return number

    def batch(self, numbers: Sequence[int]) -> TableEpisodes:
        """A batch of episodes."""
        return TableEpisodes(self, torch.tensor(numbers))

    def identity(self, index: int) -> str:
        """The video's path from the root, and what changes with its file; that of its cached frames if it is gone."""
        path = self.videos[index].path
        return f"{relative_path(path, self.root)} {fingerprint_text(path) or 'not there'}"

    def uniforms(self, index: int) -> Tensor | None:
        """What the frames, the crop and the flip of a clip are drawn by; None where nothing is drawn."""
        return self._draw(index, 1)[0, : self.dataset.reader.frames] if self.dataset.reader.draws else None

    def _draw(self, index: int, count: int) -> Tensor:
        """Some draws for a video, which depend on the seed and the video's path alone: ``(count, frames + 3)``."""
        path = relative_path(self.videos[index].path, self.root)
        number = zlib.crc32(path.encode(errors="surrogateescape"))
        rng = episode_generator(self.dataset.seed, self.dataset.split.name, number, "stored augmentation")
        return torch.from_numpy(rng.random((count, self.dataset.reader.frames + 3)))

    def read(self, index: int) -> Tensor:
        """The frames of one video, read in this process: uint8 ``(frames, 3, size, size)``.

        Raises:
            VideoError: it can't be read; of a feature table none can.
        """
        if self.known is not None:  # whose paths are names that anybody may have given
            raise VideoError(f"there are no frames of {self.videos[index].path}, of which a feature table has features")
        return self.dataset.reader.read(self.videos[index].path, self.uniforms(index))[0]

    def features(self) -> Tensor | None:
        """See :class:`clip_m2df.episode.VideoTable`."""
        if self.known is None:
            return None
        return self.known.of([(video.path, index % self.each) for index, video in enumerate(self.videos)])

    def clips(self, chunks: Sequence[Sequence[int]]) -> Iterator[Clips]:
        """Read videos.

        Args:
            chunks: the indices of videos that come together.

        Yields:
            A batch of clips for each chunk, in order.
        """
        workers = min(self.num_workers, len(chunks))
        note = ReadingNow(workers)
        loader: Iterable[Clips] = VideoLoader(
            _VideoDataset(self, note),
            note=note,
            receive=self._receive,
            stuck_after=self.stuck_after,
            num_workers=workers,
            batch_sampler=chunks,
            collate_fn=list,
        )
        return iter(track(loader, "Reading videos", total=len(chunks), transient=True, disable=not self.progress))

    def _receive(self, items: Sequence[_Read]) -> Clips:
        read = [item for item in items if item.clip is not None]
        frames = self.dataset.reader.frames
        self.unusable.say_short({item.path: item.length for item in read if item.length < frames})
        return Clips(
            torch.tensor([item.video for item in read], dtype=torch.long),
            torch.stack([item.clip for item in read if item.clip is not None]) if read else None,
            {item.path: item.reason for item in items if item.clip is None},
        )

    def _rows(
        self, numbers: Sequence[int], plans: Sequence[EpisodePlan], replaced: Sequence[int], videos: Tensor
    ) -> IndexedEpisode:
        """Episodes by the indices of their ``videos (episodes, n)``, in the order of :attr:`EpisodePlan.videos`."""
        n_support, n_known = sum(map(len, plans[0].support)), videos.shape[1] - len(plans[0].unknown)
        labels = [self.dataset.labels(number, plan) for number, plan in zip(numbers, plans, strict=True)]
        rows = {
            "numbers": torch.tensor(numbers),
            "support": videos[:, :n_support].unflatten(1, (len(plans[0].classes), -1)),
            "query": videos[:, n_support:n_known],
            **({"unknown": videos[:, n_known:]} if plans[0].unknown else {}),
            **{name: torch.stack([row[name] for row in labels]) for name in labels[0]},
            "class_names": list(self.dataset.split.class_texts),
            "replaced": torch.tensor(replaced),
        }
        return cast(IndexedEpisode, rows)


class EvaluationTable(EpisodeTable):
    """The episodes of an evaluation.

    Args:
        dataset: see :class:`EpisodeTable`.
        count: how many episodes.
        unusable: see :class:`EpisodeTable`.
        **options: the same.

    Attributes:
        videos: those that the episodes name, in the manifest's order, then stand-ins as they were needed.
    """

    def __init__(self, dataset: EpisodeDataset, count: int, unusable: UnusableVideos, **options: Any) -> None:
        super().__init__(dataset, unusable, **options)
        self._drawn = [dataset.plan(number) for number in range(count)]
        named = {video.path: video for plan in self._drawn for video in plan.videos}
        own = [video for row in dataset.split.videos for video in row if video.path in named]
        # An episode may name others than the split's.
        self._index([*own, *named.values()], self._drawn, [0] * count)

    def __len__(self) -> int:
        """See :class:`EpisodeTable`."""
        return len(self._drawn)

    def episodes(self, numbers: Sequence[int]) -> IndexedEpisode:
        """See :class:`EpisodeTable`."""
        return select_episodes(self._all, torch.tensor(numbers, dtype=torch.long))

    def identity(self, index: int) -> str:
        """See :class:`EpisodeTable`; with whose draws its frames are chosen, if they are drawn."""
        drawn = f" drawn of seed {self.dataset.seed} of {self.dataset.split.name}" if self.dataset.reader.draws else ""
        return super().identity(index) + drawn

    def named(self, numbers: Sequence[int]) -> list[int]:
        """See :class:`EpisodeTable`."""
        rows = self.episodes(numbers)
        named = [rows[role].flatten() for role in ("support", "query", "unknown") if role in rows]
        indices: list[int] = torch.cat(named).unique().tolist()
        return indices

    def replace(self, unusable: Mapping[str, str]) -> None:
        """See :class:`EpisodeTable`; the stand-ins are those that :class:`EpisodeDataset` chooses."""
        super().replace(unusable)
        known = self.unusable.reasons
        replanned = [
            self.dataset.replan(number, plan, lambda path: path not in known) for number, plan in enumerate(self._drawn)
        ]
        plans = [plan for plan, _ in replanned]
        named = [video for plan in plans for video in plan.videos]
        self._index([*self.videos, *named], plans, [len(passed_over) for _, passed_over in replanned])

    def _index(self, videos: Iterable[Video], plans: Sequence[EpisodePlan], replaced: Sequence[int]) -> None:
        self.videos = list({video.path: video for video in videos}.values())
        index = {video.path: i for i, video in enumerate(self.videos)}
        indices = torch.tensor([[index[video.path] for video in plan.videos] for plan in plans])
        self._all = self._rows(range(len(plans)), plans, replaced, indices)


class TrainingTable(EpisodeTable):
    """Training episodes, from a few augmentations of each video that are read before the training.

    Args:
        dataset: see :class:`EpisodeTable`.
        augmentations: how many a video has; 0: each video once, as an evaluation sees it.
        unusable: see :class:`EpisodeTable`.
        **options: the same.

    Attributes:
        videos: that of each index: the augmentations of a video follow one another.
    """

    def __init__(self, dataset: EpisodeDataset, augmentations: int, unusable: UnusableVideos, **options: Any) -> None:
        super().__init__(dataset, unusable, **options)
        self.augmentations = augmentations
        self.each = each = max(augmentations, 1)
        self.videos = [video for row in dataset.split.videos for video in row for _ in range(each)]
        self._first = {video.path: each * i for i, video in enumerate(self.videos[::each])}

    def __len__(self) -> int:
        """See :class:`EpisodeTable`."""
        return 0

    def episodes(self, numbers: Sequence[int]) -> IndexedEpisode:
        """See :class:`EpisodeTable`; which augmentation of a video comes is the episode's own draw."""
        seed, stage, known = self.dataset.seed, self.dataset.split.name, self.unusable.reasons
        replanned = [self.dataset.replan(i, self.dataset.plan(i), lambda path: path not in known) for i in numbers]
        videos = []
        for number, (plan, _) in zip(numbers, replanned, strict=True):
            rng = episode_generator(seed, stage, number, "augmentation")
            videos.append([self._first[v.path] + int(rng.integers(self.each)) for v in plan.videos])
        plans, replaced = [plan for plan, _ in replanned], [len(passed_over) for _, passed_over in replanned]
        return self._rows(numbers, plans, replaced, torch.tensor(videos))

    def named(self, numbers: Sequence[int]) -> list[int]:
        """All augmentations of the videos that episodes name; of all usable videos if none is given."""
        paths = {video.path for number in numbers for video in self.dataset.plan(number).videos}
        return [
            index
            for index, video in enumerate(self.videos)
            if video.path not in self.unusable.reasons and (not numbers or video.path in paths)
        ]

    def identity(self, index: int) -> str:
        """The video and the augmentation, which files of features call a view."""
        return f"{super().identity(index)} view {index % self.each} of seed {self.dataset.seed}"

    def uniforms(self, index: int) -> Tensor | None:
        """An augmentation's own."""
        if not self.augmentations:
            return super().uniforms(index)
        return self._draw(index, self.augmentations)[index % self.augmentations]


class _Read(NamedTuple):
    """What came of reading a video."""

    video: int
    path: str
    clip: Tensor | None = None
    length: int = 0
    reason: str = ""


@dataclass(eq=False)
class _VideoDataset(Dataset[_Read]):
    """The clips of a table's videos by index."""

    table: EpisodeTable
    note: Callable[[str], object]

    def __getitem__(self, index: int) -> _Read:
        path = self.table.videos[index].path
        self.note(path)
        try:
            return _Read(index, path, *self.table.dataset.reader.read(path, self.table.uniforms(index)))
        except VideoError as error:
            return _Read(index, path, reason=str(error))
        finally:
            self.note("")
