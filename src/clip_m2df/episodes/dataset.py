"""Episodes by number as the frames of their videos, read in worker processes."""

import itertools
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import KW_ONLY, dataclass
from pathlib import PurePath
from typing import Any, TypeVar, cast
from zlib import crc32

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clip_m2df.datasets.manifest import Split, Video
from clip_m2df.episode import Episode, episode_draws, episode_generator
from clip_m2df.episodes.plan import EpisodePlan, EpisodeShape, plan_episode, source
from clip_m2df.errors import UserError, some
from clip_m2df.video.reader import VideoError
from clip_m2df.video.transforms import JITTER_DRAWS, ClipReader, jitter_colours


class ReadEpisode(Episode):
    """An episode with what was remarked on its videos, which is for the main process.

    Attributes:
        unusable: videos that can't be read, each with the reason; stand-ins took their places.
        short: videos with fewer frames than wanted, and their number.
        clips: what tells each clip, of the support and then of the query: the same for the same frames.
    """

    unusable: dict[str, str]
    short: dict[str, int]
    clips: list[tuple[int, str]]


_REMARKS = ("unusable", "short", "clips")

Batch = TypeVar("Batch", Episode, ReadEpisode)


@dataclass(eq=False)
class EpisodeDataset(Dataset[ReadEpisode]):
    """Episodes by number.

    Attributes:
        split: where the videos come from.
        shape: how many classes and videos.
        reader: how a video is read.
        seed: the run's seed.
        augment: random frames, crops and flips (training), or the frames of an evaluation and the centre crop.
        replace: put another video of the class in the place of one that can't be read, or raise its ``VideoError``.
        plans: the videos of each episode, where they are not to be drawn.
        step: episodes of an optimiser step, in which a video always looks the same.
        jitter_queries: with ``augment``, mirror half of the queries and change their colours.
        note: called with the path of each video before it is read, and with an empty one after it.
    """

    split: Split
    shape: EpisodeShape
    reader: ClipReader
    _: KW_ONLY
    seed: int
    augment: bool
    replace: bool = False
    plans: Sequence[EpisodePlan] | None = None
    step: int = 1
    jitter_queries: bool = False
    note: Callable[[str], object] = str

    def __post_init__(self) -> None:
        if self.plans is None:
            self.shape.check(self.split)
        videos = list(itertools.chain(*self.split.videos))
        self._index = {video.path: index for index, video in enumerate(videos)}
        self._classes = {label: c for c, label in enumerate(self.split.class_names)}
        self._knows_twins = not self.augment and any(video.group for video in videos)

    def plan(self, episode: int) -> EpisodePlan:
        """The videos of episode number ``episode``."""
        if self.plans is not None:
            return self.plans[episode]
        return plan_episode(self.split, self.shape, seed=self.seed, episode=episode)

    def replan(
        self, episode: int, plan: EpisodePlan, is_usable: Callable[[str], bool]
    ) -> tuple[EpisodePlan, list[str]]:
        """Put stand-ins in the places of videos that are not usable, in an order that is the episode's own.

        Args:
            episode: its number.
            plan: its videos as drawn.
            is_usable: tells it of a path.

        Returns:
            The plan with the stand-ins, and the videos that were passed over.

        Raises:
            UserError: no video of a class that could replace one is usable either.
        """
        taken = {video.path for video in plan.videos}
        passed_over: dict[str, None] = {}

        def candidates(video: Video) -> Iterator[Video]:
            yield video
            videos = self.split.videos[self._classes[video.label]]
            rng = episode_generator(self.seed, self.split.name, episode, "stand-ins")
            yield from (videos[v] for v in rng.permutation(len(videos)) if videos[v].path not in taken)

        def usable(video: Video, barred: Set[str]) -> Video:
            for candidate in candidates(video):
                if source(candidate) in barred:
                    continue
                taken.add(candidate.path)
                if is_usable(candidate.path):
                    return candidate
                passed_over[candidate.path] = None
            apart = " of other groups" if barred else ""
            raise UserError(
                f"the class {video.label!r} of the {self.split.name} split has too few usable videos{apart} for an"
                f" episode: {some(passed_over)} can't be read; replace them or remove the class from the manifest"
            )

        # Stand-ins in a grouped episode are no twins either. The support's don't depend on the unknown queries, which
        # come last: without these, all else is the same.
        grouped = self.shape.grouped
        barred = {source(video) for row in plan.query for video in row} if grouped else set()
        plan = plan._replace(support=tuple(tuple(usable(video, barred) for video in row) for row in plan.support))
        barred = plan.sources if grouped else set()
        plan = plan._replace(query=tuple(tuple(usable(video, barred) for video in row) for row in plan.query))
        plan = plan._replace(unknown=tuple(usable(video, barred) for video in plan.unknown))
        return plan, list(passed_over)

    def labels(self, episode: int, plan: EpisodePlan) -> dict[str, Tensor]:
        """What an episode has beside its videos, as in :class:`clip_m2df.episode.Labels`, without the leading axis."""
        n_queries = sum(map(len, plan.query))
        draws = episode_draws(self.seed, self.split.name, episode, n_queries + len(plan.unknown))
        found = {
            "query_labels": torch.tensor(plan.query_labels),
            "class_indices": torch.tensor(plan.classes),
            "draws": draws[:n_queries],
        }
        if self._knows_twins:
            found["twins"] = torch.tensor(plan.twins)
        if plan.unknown:
            found["unknown_classes"] = torch.tensor([self._classes[video.label] for video in plan.unknown])
            found["unknown_draws"] = draws[n_queries:]
        return found

    def __getitem__(self, episode: int) -> ReadEpisode:
        """Episode number ``episode``, with one leading axis of size 1 (see :class:`clip_m2df.episode.Episode`).

        Raises:
            VideoError: a video can't be read, and is not to be replaced.
            UserError: all videos of a class that could replace one can't be read either.
        """
        return self.__getitems__([episode])[0]

    def __getitems__(self, episodes: Sequence[int]) -> list[ReadEpisode]:
        """Several episodes; a clip that they share is read once."""
        seen: dict[tuple[int, str], tuple[Tensor, int] | VideoError] = {}
        return [self._episode(episode, seen) for episode in episodes]

    def _episode(self, episode: int, seen: dict[tuple[int, str], tuple[Tensor, int] | VideoError]) -> ReadEpisode:
        step = episode // self.step if self.augment else episode if self.reader.draws else 0

        def is_usable(path: str) -> bool:
            if (step, path) not in seen:
                seen[step, path] = self._clip(step, path)
            found = seen[step, path]
            if isinstance(found, VideoError) and not self.replace:
                raise found
            return not isinstance(found, VideoError)

        plan, unusable = self.replan(episode, self.plan(episode), is_usable)
        keys = [(step, video.path) for video in plan.videos]
        read = [found for key in keys if not isinstance(found := seen[key], VideoError)]
        short = {path: length for (_, path), (_, length) in zip(keys, read, strict=True) if length < self.reader.frames}
        n_support, n_known = sum(map(len, plan.support)), len(keys) - len(plan.unknown)
        shown = [clip for clip, _ in read]
        if self.augment and self.jitter_queries:
            shown[n_support:] = [self._jittered(*key, clip) for key, clip in zip(keys, shown, strict=True)][n_support:]
            keys[n_support:] = [(step, f"{path} as a query") for _, path in keys[n_support:]]
        clips = torch.stack(shown)
        read_episode = {
            "support": clips[:n_support].unflatten(0, (1, len(plan.classes), -1)),
            "query": clips[n_support:n_known].unsqueeze(0),
            **({"unknown": clips[n_known:].unsqueeze(0)} if plan.unknown else {}),
            **{name: values.unsqueeze(0) for name, values in self.labels(episode, plan).items()},
            "class_names": list(self.split.class_texts),
            "replaced": torch.tensor([len(unusable)]),
            "unusable": {path: str(seen[step, path]) for path in unusable},
            "short": short,
            "clips": keys[:n_known],
        }
        return cast(ReadEpisode, read_episode)

    def _clip(self, step: int, path: str) -> tuple[Tensor, int] | VideoError:
        """A video as it looks in an optimiser step, and its number of frames; or why it can't be read.

        At an evaluation that draws frames, as it looks in the episode of that number.
        """
        uniforms = None
        if self.augment or self.reader.draws:
            uniforms = self._draw(step, path, "augmentation", self.reader.frames + (3 if self.augment else 0))
        self.note(path)
        try:
            return self.reader.read(path, uniforms)
        except VideoError as error:
            return error
        finally:
            self.note("")

    def _jittered(self, step: int, path: str, clip: Tensor) -> Tensor:
        """A clip as it looks as a query, see ``jitter_queries``."""
        mirrored, *colours = self._draw(step, path, "colours", 1 + JITTER_DRAWS)
        return jitter_colours(clip.flip(-1) if mirrored < 0.5 else clip, torch.stack(colours))

    def _draw(self, step: int, path: str, stream: str, count: int) -> Tensor:
        """Uniforms for a video in an optimiser step, or in an episode of an evaluation."""
        # Knobs put videos into test episodes that are not of the split.
        other = crc32("/".join(PurePath(path).parts[-2:]).encode(errors="surrogateescape"))
        rng = episode_generator(self.seed, self.split.name, step, stream, self._index.get(path, other))
        return torch.from_numpy(rng.random(count))


def collate_episodes(episodes: Sequence[Batch]) -> Batch:
    """Join episodes of one split and shape to a batch.

    Args:
        episodes: one dict each with the keys of :class:`clip_m2df.Episode`, optional ones in all or in none; tensors
            with a leading axis of size 1, as those of :class:`EpisodeDataset`, or without.

    Raises:
        UserError: a key is missing; names it.
    """
    rows: list[dict[str, Any]] = [dict(episode) for episode in episodes]
    known = [key for key in rows[0] if key not in ("same", *_REMARKS)]  # "same" counts clips within a batch
    missing = Episode.__required_keys__ - rows[0].keys()
    missing |= {key for key in known for row in rows if key not in row}
    if missing:
        raise UserError(f"an episode has no {min(missing)!r}: give each the keys of clip_m2df.Episode")
    join = torch.cat if rows[0]["query_labels"].ndim > 1 else torch.stack
    joined = {
        key: join([row[key] for row in rows]) if isinstance(rows[0][key], Tensor) else rows[0][key] for key in known
    }
    if "clips" in rows[0]:
        clips = [clip for row in rows for clip in row["clips"]]
        first = {clip: index for index, clip in reversed(list(enumerate(clips)))}
        joined["same"] = torch.tensor([first[clip] for clip in clips]).view(len(rows), -1)
        joined["clips"] = clips
        for what in ("unusable", "short"):
            joined[what] = {path: remark for row in rows for path, remark in row[what].items()}
    return cast(Batch, joined)
