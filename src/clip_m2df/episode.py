"""The episode: what passes from a data module to the model, and the legend of its axes.

=============  =========================================================================================
axis           meaning
=============  =========================================================================================
``…``          any leading axes; in a batch one, ``episodes`` (B)
``n_way``      classes of an episode (N)
``n_shot``     labelled *support* videos a class (K)
``n_queries``  query videos of an episode, of all its classes together (M); ``n_query`` is their number a class
``n_unknown``  *unknown queries* of an episode: query videos of classes that it does not have
``frames``     frames a video (T)
``dim``        width of CLIP's embeddings (D)
``n_classes``  classes of the split that the episode comes from (C)
=============  =========================================================================================

A batch's type says what it carries: :class:`Episode` frames, :class:`FeatureEpisode` features of frames, and
:class:`TableEpisodes` the numbers of episodes in a table whose videos are encoded once, before they are played.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypedDict, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch

# How the videos of an episode are drawn; what each means is said in :mod:`clip_m2df.episodes.plan`.
Dealing = Literal["random", "grouped"]

# How frames are chosen and resized; what each means is said in :mod:`clip_m2df.video.transforms`.
Sampling = Literal["segments", "random_segments", "window", "linspace"]
ResizeMode = Literal["short_side", "short_side_bicubic", "squash"]

# What is drawn for an episode, each from a stream of its own, so that none shifts another.
STREAMS = {
    "videos": 0,
    "augmentation": 1,
    "prompts": 2,
    "stand-ins": 3,
    "stored augmentation": 4,
    "outliers": 5,
    "colours": 6,
    "unknown": 7,
}
# A seed deals different episodes at each stage.
STAGES = {"train": 0, "val": 1, "test": 2}


class Extras(TypedDict, total=False):
    """What a batch of episodes may have, and may lack.

    Attributes:
        draws: float32 ``(episodes, n_queries)``, uniforms in [0, 1) by which PPS samples (:func:`episode_draws`); a
            head that samples needs them, as ``m2df`` does in training.
        replaced: int64 ``(episodes)``, how many videos were unusable and had others put in their places; for the log.
        same: of frames, int64 ``(episodes, n_way · n_shot + n_queries)``, for each clip of the batch, the support
            before the query in each episode, the index of the first that has the same frames: those need encoding once.
        twins: of evaluations, bool ``(episodes, n_queries)``, whether a support video of the episode is of the query's
            group, cut from the same as it; there where some video of the split has a group.
        unknown: the unknown queries, of the batch's own kind: uint8 frames ``(episodes, n_unknown, frames, 3, height,
            width)``, floating features ``(episodes, n_unknown, frames, dim)``, or int64 indices
            ``(episodes, n_unknown)``. Nothing that is computed of the others depends on them.
        unknown_classes: int64 ``(episodes, n_unknown)``, their classes as indices in ``class_names``.
        unknown_draws: float32 ``(episodes, n_unknown)``, as ``draws``, which they go on from.
    """

    draws: torch.Tensor
    replaced: torch.Tensor
    same: torch.Tensor
    twins: torch.Tensor
    unknown: torch.Tensor
    unknown_classes: torch.Tensor
    unknown_draws: torch.Tensor


class Labels(Extras):
    """What a batch of episodes has beside its videos.

    Attributes:
        query_labels: int64 ``(episodes, n_queries)``, each query's class as an index in the episode, 0 … n_way − 1.
        class_indices: int64 ``(episodes, n_way)``, the episode's classes as indices in ``class_names``.
        class_names: what the prompts say, one text a class of the split, in the order of its class table.
    """

    query_labels: torch.Tensor
    class_indices: torch.Tensor
    class_names: list[str]


class Episode(Labels):
    """A batch of episodes as frames; all that ``CLIPM2DF`` needs of a data module, but for the :class:`Extras`.

    Videos come as bytes and are scaled and normalised on the device. ``torch.utils.data.default_collate`` doesn't fit
    (``class_names`` belongs to the batch): :func:`clip_m2df.episodes.dataset.collate_episodes` stacks single episodes.

    Attributes:
        support: uint8 frames ``(episodes, n_way, n_shot, frames, 3, height, width)``.
        query: uint8 frames ``(episodes, n_queries, frames, 3, height, width)``, in any order.
    """

    support: torch.Tensor
    query: torch.Tensor


class FeatureEpisode(Labels):
    """A batch of episodes as features of frames; ``CLIPM2DF`` takes it too, where its tower is not to be asked.

    Attributes:
        support: floating ``(episodes, n_way, n_shot, frames, dim)``.
        query: floating ``(episodes, n_queries, frames, dim)``.
    """

    support: torch.Tensor
    query: torch.Tensor


class IndexedEpisode(Labels):
    """A batch of episodes whose videos are indices in a table.

    Attributes:
        numbers: int64 ``(episodes)``, of the episodes, rising.
        support: int64 ``(episodes, n_way, n_shot)``.
        query: int64 ``(episodes, n_queries)``.
    """

    numbers: torch.Tensor
    support: torch.Tensor
    query: torch.Tensor


class TableEpisodes:
    """A batch of episodes by their numbers in a table of videos.

    No tuple and no dataclass: Lightning would copy the table with each batch.

    Attributes:
        table: what the episodes are made of.
        numbers: int64 ``(episodes)``.
    """

    def __init__(self, table: VideoTable, numbers: torch.Tensor) -> None:
        self.table, self.numbers = table, numbers

    def to(self, device: torch.device) -> TableEpisodes:
        """The same with the numbers on a device."""
        return TableEpisodes(self.table, self.numbers.to(device))


Rows = TypeVar("Rows", Episode, FeatureEpisode, IndexedEpisode)
T = TypeVar("T")


def select_episodes(episodes: Rows, rows: torch.Tensor) -> Rows:
    """Some rows of a batch of episodes, or of a table of them."""
    chosen = episodes.copy()
    for key in set(episodes) - {"class_names"}:
        chosen[key] = episodes[key][rows]  # type: ignore[literal-required]
    return chosen


class Clips(NamedTuple):
    """Videos that were read together.

    Attributes:
        indices: int64 ``(videos)``, those that could be read.
        frames: uint8 ``(videos, frames, 3, height, width)``; None if there are none.
        unusable: why the others could not be read, by path.
    """

    indices: torch.Tensor
    frames: torch.Tensor | None
    unusable: dict[str, str]


class VideoTable(Protocol):
    """Videos that are read once each, for however many episodes, and the episodes that are made of them.

    Attributes:
        videos: what the indices of episodes mean.
        reading: how frames are read, in words.
        frames: of a video.
        store: a folder for features, or None.
        block: how many episodes make a batch.
    """

    videos: Sequence[Any]
    reading: str
    frames: int
    store: str | None
    block: int

    def __len__(self) -> int:
        """How many episodes there are; 0 for an endless stream."""

    def episodes(self, numbers: Sequence[int]) -> IndexedEpisode:
        """Episodes by their numbers."""

    def named(self, numbers: Sequence[int]) -> list[int]:
        """The indices of the videos that episodes name, in order."""

    def identity(self, index: int) -> str:
        """What tells a video, and the state that its file is in."""

    def read(self, index: int) -> torch.Tensor:
        """The frames of one video, uint8 ``(frames, 3, height, width)``.

        Raises:
            UserError: it can't be read.
        """

    def features(self) -> torch.Tensor | None:
        """The features ``(videos, frames, dim)`` where they were computed elsewhere, and there is no video to read."""

    def clips(self, chunks: Sequence[Sequence[int]]) -> Iterator[Clips]:
        """The clips of videos given by their indices, as they come together, read by the table's workers."""

    def replace(self, unusable: Mapping[str, str]) -> None:
        """Put others in the places of videos that can't be read; these may be new in ``videos``."""


def episode_generator(seed: int, stage: str, episode: int, stream: str, part: int = 0) -> np.random.Generator:
    """The generator of one kind of draw for one episode.

    A pure function of its arguments, so that an episode is the same whatever the number of workers and ranks.

    Args:
        seed: the run's seed.
        stage: ``train``, ``val`` or ``test``.
        episode: the episode's number, from 0.
        stream: what is drawn, a key of ``STREAMS``.
        part: which of several such draws.
    """
    import numpy as np

    return np.random.default_rng([seed, STAGES[stage], episode, STREAMS[stream], *([part] if part else [])])


def episode_draws(seed: int, stage: str, episode: int, n_queries: int) -> torch.Tensor:
    """The uniforms by which the probability prompt selector samples, a function of (seed, episode, query) alone.

    Returns:
        float32 ``(n_queries)`` in [0, 1).
    """
    import numpy as np
    import torch

    return torch.from_numpy(episode_generator(seed, stage, episode, "prompts").random(n_queries, dtype=np.float32))


def of_all_ranks(mine: T, world_size: int) -> list[T]:
    """What each rank has, in the order of ranks; to be called on all of them, with what can be pickled."""
    if world_size == 1:
        return [mine]
    import torch

    found = [mine] * world_size
    torch.distributed.all_gather_object(found, mine)
    return found
