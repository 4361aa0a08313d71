"""Which videos make up episode i, and the frames that stand for them.

Episodes are *addressable*: episode i is a pure function of (seed, stage, i), whatever the number of workers, ranks and
restarts. Numbers are dealt to ranks by :class:`EpisodeSampler`; everything random in an episode is drawn from its own
number, but for what its videos look like in training: that is drawn from the number of its optimiser step, in which a
video needs reading and encoding once, however many episodes have it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clip_m2df.datasets.manifest import Split, Video
from clip_m2df.episode import Episode, episode_draws, episode_generator
from clip_m2df.episodes.plan import EpisodePlan, EpisodeShape, plan_episode
from clip_m2df.errors import UserError, some
from clip_m2df.video.reader import VideoError
from clip_m2df.video.transforms import ClipReader


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


class EpisodeDataset(Dataset[ReadEpisode]):
    """Episodes by number.

    Args:
        split: where the videos come from.
        shape: how many classes and videos.
        reader: how a video is read.
        seed: the run's seed.
        augment: random frames, crops and flips (training), or the middle frames and centre crop.
        replace: put another video of the class in the place of one that can't be read, or raise its ``VideoError``.
        plans: the videos of each episode, where they are not to be drawn.
        step: episodes of an optimiser step, in which a video always looks the same.

    Attributes:
        reading: called with the path of each video before it is read, and with an empty one after it.
    """

    def __init__(
        self,
        split: Split,
        shape: EpisodeShape,
        reader: ClipReader,
        *,
        seed: int,
        augment: bool,
        replace: bool = False,
        plans: Sequence[EpisodePlan] | None = None,
        step: int = 1,
    ) -> None:
        if plans is None:
            shape.check(split)
        self.split = split
        self.shape = shape
        self.reader = reader
        self.seed = seed
        self.augment = augment
        self.replace = replace
        self.plans = plans
        self.step = step
        self._place = {video.path: place for place, video in enumerate(itertools.chain(*split.videos))}
        self.reading: Callable[[str], object] = str

    def plan(self, episode: int) -> EpisodePlan:
        """The videos of episode number ``episode``."""
        if self.plans is not None:
            return self.plans[episode]
        return plan_episode(self.split, self.shape, seed=self.seed, episode=episode)

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
        plan = self.plan(episode)
        n_support = sum(map(len, plan.support))
        labels = [label for label, row in enumerate(plan.query) for _ in row]
        clips, keys, unusable, short = self._read(plan, episode, seen)
        return ReadEpisode(
            support=clips[:n_support].unflatten(0, (1, len(plan.classes), -1)),
            query=clips[n_support:].unsqueeze(0),
            query_labels=torch.tensor([labels]),
            class_indices=torch.tensor([plan.classes]),
            class_names=list(self.split.class_texts),
            draws=episode_draws(self.seed, self.split.name, episode, len(labels)).unsqueeze(0),
            replaced=torch.tensor([len(unusable)]),
            unusable=unusable,
            short=short,
            clips=keys,
        )

    def _read(
        self, plan: EpisodePlan, episode: int, seen: dict[tuple[int, str], tuple[Tensor, int] | VideoError]
    ) -> tuple[Tensor, list[tuple[int, str]], dict[str, str], dict[str, int]]:
        """The clips of the support and of the query, one after another, and what there is to say about them."""
        roles = (plan.support, plan.query)
        planned = [(c, video) for rows in roles for c, row in zip(plan.classes, rows, strict=True) for video in row]
        taken = {video.path for _, video in planned}
        clips, keys, unusable, short = [], [], {}, {}
        for c, video in planned:
            for candidate in itertools.chain([video], self._stand_ins(episode, c, taken)):
                taken.add(candidate.path)
                key = (episode // self.step if self.augment else 0, candidate.path)
                if key not in seen:
                    seen[key] = self._clip(*key)
                found = seen[key]
                if isinstance(found, VideoError):
                    if not self.replace:
                        raise found
                    unusable[candidate.path] = str(found)
                    continue
                clip, length = found
                clips.append(clip)
                keys.append(key)
                if length < self.reader.frames:
                    short[candidate.path] = length
                break
            else:
                raise self._too_few(video, unusable)
        return torch.stack(clips), keys, unusable, short

    def _clip(self, step: int, path: str) -> tuple[Tensor, int] | VideoError:
        """A video as it looks in an optimiser step, and its number of frames; or why it can't be read."""
        uniforms = None
        if self.augment:
            rng = episode_generator(self.seed, self.split.name, step, "augmentation", self._place[path])
            uniforms = torch.from_numpy(rng.random(self.reader.frames + 3))
        self.reading(path)
        try:
            return self.reader.read(path, uniforms)
        except VideoError as error:
            return error
        finally:
            self.reading("")

    def replan(self, episode: int, plan: EpisodePlan, unusable: Collection[str]) -> tuple[EpisodePlan, int]:
        """Put stand-ins in the places of videos that are known to be unusable: those that reading would choose.

        Args:
            episode: its number.
            plan: its videos as drawn.
            unusable: paths.

        Returns:
            The plan with the stand-ins, and how many unusable videos were passed over.

        Raises:
            UserError: all videos of a class that could replace one are unusable too.
        """
        taken = {video.path for rows in (plan.support, plan.query) for row in rows for video in row}
        passed_over = {path for path in taken if path in unusable}

        def replace(c: int, video: Video) -> Video:
            for candidate in itertools.chain([video], self._stand_ins(episode, c, taken)):
                taken.add(candidate.path)
                if candidate.path not in unusable:
                    return candidate
                passed_over.add(candidate.path)
            raise self._too_few(video, passed_over)

        support, query = (
            tuple(tuple(replace(c, video) for video in row) for c, row in zip(plan.classes, rows, strict=True))
            for rows in (plan.support, plan.query)
        )
        return EpisodePlan(plan.classes, support, query), len(passed_over)

    def _too_few(self, video: Video, unusable: Collection[str]) -> UserError:
        return UserError(
            f"the class {video.label!r} of the {self.split.name} split has too few usable videos for an episode:"
            f" {some(unusable)} can't be read; replace them or remove the class from the manifest"
        )

    def _stand_ins(self, episode: int, c: int, taken: set[str]) -> Iterator[Video]:
        """The other videos of a class, in an order that is the episode's own."""
        videos = self.split.videos[c]
        rng = episode_generator(self.seed, self.split.name, episode, "stand-ins")
        return (videos[v] for v in rng.permutation(len(videos)) if videos[v].path not in taken)


def collate_episodes(episodes: Sequence[ReadEpisode]) -> ReadEpisode:
    """Join episodes of one split and shape along their leading axis."""
    joined = episodes[0].copy()
    for key in ("support", "query", "query_labels", "class_indices", "draws", "replaced"):
        joined[key] = torch.cat([episode[key] for episode in episodes])
    keys = [key for episode in episodes for key in episode["clips"]]
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    joined["same"] = torch.tensor([first[key] for key in keys]).view(len(episodes), -1)
    joined["clips"] = keys
    for episode in episodes:
        joined["unusable"] = joined["unusable"] | episode["unusable"]
        joined["short"] = joined["short"] | episode["short"]
    return joined
