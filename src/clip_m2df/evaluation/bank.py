"""Episodes played from features: with frozen weights, what depends on a video and a prompt alone is computed once.

Each video is read and encoded once, and its features can be kept on disk. However many episodes a video is in, as
support (with its own class's prompt) or as a query (with the prompt that was selected), the head embeds each such pair
once; what is left for an episode is the prototypes and the matching.

What is computed together never depends on the number of ranks, so neither does a bit of the results.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_m2df.episode import IndexedEpisode, VideoTable, of_all_ranks, select_episodes
from clip_m2df.errors import UserError
from clip_m2df.files import beside, check_regular, locked, whole_file
from clip_m2df.nn.head import Embedded, Head, HeadOutput, QueryPrompt, Scoring
from clip_m2df.nn.m2df import M2DF
from clip_m2df.nn.prompts import SelectedPrompts
from clip_m2df.weight_files import bytes_of, digest_of

# How many go through at once: videos that are read and encoded, pairs that are embedded, episodes.
VIDEOS, PAIRS, EPISODES = 16, 64, 256


class EpisodeBank:
    """All that is needed to play episodes, with what they share computed once.

    Args:
        head: in eval mode.
        features: ``(videos, frames, dim)``.
        prompt_table: ``(n_classes, dim)``.
        episodes: all that will be played, their numbers rising, on the device of the features.
        memory: bytes for embedded videos. Where they don't fit, each batch of episodes embeds its own. Unknown queries
            may take as much again.
        pairs: int64 ``(n, 2)``, videos and classes, all that episodes may need to which the bank will :meth:`turn_to`;
            by default those of its episodes.

    Attributes:
        indices: int64 ``(episodes, n_queries)``, the classes whose prompts were selected for the queries.
        probabilities: ``(episodes, n_queries, n_way)``, PPS's.
        pairs: int64, of a video and a class, in the order of their first use, as ``video · (n_classes + 1) + class``;
            ``n_classes`` stands for no prompt.
        of_unknown: the same with the episodes' unknown queries in the place of their queries; None where there are
            none. It is a bank of its own, so that no bit of the others depends on them.
    """

    def __init__(
        self,
        head: Head,
        features: Tensor,
        prompt_table: Tensor,
        episodes: IndexedEpisode,
        *,
        memory: float = 4e9,
        pairs: Tensor | None = None,
    ) -> None:
        self.head = head
        self.features = features
        self.prompt_table = prompt_table
        self.episodes = episodes
        self.indices, self.probabilities = self._select_prompts()
        self.pairs, self._sorted, self._rank = self._list_pairs(pairs)
        self._memory = memory
        self._fits: bool | None = None  # not known before something is embedded
        self._kept = Embedded()
        self._done = [False] * -(-len(self.pairs) // PAIRS)
        self.of_unknown: EpisodeBank | None = None
        if "unknown" in episodes:
            rest = {key: value for key, value in episodes.items() if not key.startswith("unknown")}
            unknown = {**rest, "query": episodes["unknown"], "draws": episodes["unknown_draws"]}
            self.of_unknown = EpisodeBank(head, features, prompt_table, cast(IndexedEpisode, unknown), memory=memory)

    def turn_to(self, episodes: IndexedEpisode) -> None:
        """Play other episodes of the same videos, of any shape; what has been embedded is kept.

        Args:
            episodes: whose pairs are among those that the bank was given.
        """
        self.episodes = episodes
        self.indices, self.probabilities = self._select_prompts()

    def play(self, numbers: Tensor) -> HeadOutput:
        """Score the queries of episodes.

        Args:
            numbers: int64 ``(episodes)``, of episodes that the bank has.
        """
        rows = torch.searchsorted(self.episodes["numbers"], numbers)
        batch = select_episodes(self.episodes, rows)
        classes = batch["class_indices"].unsqueeze(-1)
        return _FromBank(self, rows).score_episode(batch["support"], batch["query"], classes, batch["draws"])

    def embed(self, videos: Tensor, classes: Tensor) -> Embedded:
        """Videos embedded with the prompts of classes, ``n_classes`` for none; both int64, of shapes that broadcast."""
        pairs = self._rank[torch.searchsorted(self._sorted, self._pair(videos, classes))]
        if self._fits is None:
            first = self._embed(self.pairs[:PAIRS])
            self._fits = len(self.pairs) * sum(t[0].numel() * t.element_size() for t in first.values()) <= self._memory
            if self._fits:
                self._kept = first.map(lambda tensor: tensor.new_empty((len(self.pairs), *tensor.shape[1:])))
        if not self._fits:
            wanted, indices = pairs.unique(return_inverse=True)
            embedded = Embedded.cat([self._embed(self.pairs[chunk]) for chunk in wanted.split(PAIRS)])
            return embedded.map(lambda tensor: tensor[indices])
        for chunk in (pairs // PAIRS).unique().tolist():
            if not self._done[chunk]:
                of_chunk = slice(chunk * PAIRS, (chunk + 1) * PAIRS)
                for name, tensor in self._embed(self.pairs[of_chunk]).items():
                    self._kept[name][of_chunk] = tensor
                self._done[chunk] = True
        return self._kept.map(lambda tensor: tensor[pairs])

    def _select_prompts(self) -> tuple[Tensor, Tensor]:
        """The prompts of all queries: the classes' indices, and PPS's probabilities."""
        columns = (self.episodes["query"], self.episodes["class_indices"], self.episodes["draws"])
        parts = [
            self.head.select_prompts(self.features[query], self.prompt_table[classes], draws)
            for query, classes, draws in zip(*(column.split(EPISODES) for column in columns), strict=True)
        ]
        return torch.cat([part.indices for part in parts]), torch.cat([part.probabilities for part in parts])

    def _list_pairs(self, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs in the order of their first use; the same sorted, and where each of these stands in the former."""
        if given is not None:
            keys = self._pair(*given.unbind(-1)).unique()
            return keys, keys, torch.arange(len(keys), device=keys.device)
        classes = self.episodes["class_indices"]
        support = self._pair(self.episodes["support"], classes.unsqueeze(-1)).flatten(1)
        query = self.episodes["query"]
        if self.head.query_prompt == "class":
            support = torch.cat((support, self._pair(query, classes.gather(1, self.indices))), 1)
        elif self.head.query_prompt == "each":
            support = torch.cat((support, self._pair(query.unsqueeze(-1), classes.unsqueeze(-2)).flatten(1)), 1)
        elif self.head.query_prompt == "none":
            support = torch.cat((support, self._pair(query, torch.full_like(query, len(self.prompt_table)))), 1)
        keys, indices = support.flatten().unique(return_inverse=True)
        order = torch.arange(len(indices), device=indices.device)
        by_use = torch.full_like(keys, len(indices)).scatter_reduce(0, indices, order, "amin").argsort()
        rank = torch.empty_like(by_use).scatter_(0, by_use, torch.arange(len(by_use), device=by_use.device))
        return keys[by_use], keys, rank

    def _pair(self, videos: Tensor, classes: Tensor) -> Tensor:
        return videos * (len(self.prompt_table) + 1) + classes

    def _embed(self, pairs: Tensor) -> Embedded:
        """Embed videos with prompts, and those without one by themselves."""
        n_classes = len(self.prompt_table)
        videos, classes = self.features[pairs // (n_classes + 1)], pairs % (n_classes + 1)
        alone = classes == n_classes
        if not alone.any():
            return self.head.embed(videos, self.prompt_table[classes])
        of_alone = self.head.embed(videos[alone], None)
        if alone.all():
            return of_alone
        others = self.head.embed(videos[~alone], self.prompt_table[classes[~alone]])
        order = torch.cat((alone.nonzero(), (~alone).nonzero())).flatten().argsort()
        return Embedded.cat([of_alone, others]).map(lambda tensor: tensor[order])


class _FromBank(Scoring):
    """A head's steps on the row numbers of a bank: videos ``(…)``, and classes ``(…, 1)`` in the place of prompts.

    Args:
        bank: whose.
        rows: int64 ``(episodes)``, of the episodes that are played.
    """

    def __init__(self, bank: EpisodeBank, rows: Tensor) -> None:
        self.bank = bank
        self.rows = rows

    @property
    def query_prompt(self) -> QueryPrompt:
        return self.bank.head.query_prompt

    def select_prompts(self, query: Tensor, prompts: Tensor, draws: Tensor | None = None) -> SelectedPrompts:
        bank = self.bank
        if self.query_prompt == "mixture":
            return bank.head.select_prompts(bank.features[query], bank.prompt_table[prompts.squeeze(-1)], draws)
        indices, probabilities = bank.indices[self.rows], bank.probabilities[self.rows]
        if self.query_prompt == "each":
            return SelectedPrompts(prompts.unsqueeze(-3).expand(*probabilities.shape, -1), indices, probabilities)
        chosen = torch.take_along_dim(prompts, indices.unsqueeze(-1), dim=-2)
        return SelectedPrompts(chosen, indices, probabilities)

    def embed(self, videos: Tensor, prompt: Tensor | None) -> Embedded:
        if prompt is None:
            return self.bank.embed(videos, torch.full_like(videos, len(self.bank.prompt_table)))
        if prompt.is_floating_point():  # a mixture, which is the episode's own
            return self.bank.head.embed(self.bank.features[videos], prompt)
        return self.bank.embed(videos, prompt.squeeze(-1))

    def prototype(self, embedded: Embedded, prompts: Tensor) -> Embedded:
        return self.bank.head.prototype(embedded, self.bank.prompt_table[prompts.squeeze(-1)])

    def match(self, query: Embedded, prototypes: Embedded, selected: SelectedPrompts) -> HeadOutput:
        return self.bank.head.match(query, prototypes, selected)


def encode_videos(
    model: M2DF,
    table: VideoTable,
    numbers: Sequence[int],
    *,
    rank: int = 0,
    world_size: int = 1,
    precision: str = "",
    keep: bool = True,
) -> Tensor:
    """Features of the videos that episodes name, each read and encoded once, by one of the ranks.

    As many frames go through the tower together whatever the number of ranks and of videos, and so a video has the same
    features to the bit. Videos that can't be read are replaced, or end it, as the table has it. If the table has a
    folder for features, those that are there are taken, and the others are put there. Features that the table has
    itself are taken as they are.

    Args:
        model: in eval mode.
        table: of the videos.
        numbers: the episodes that count.
        rank: of this process.
        world_size: number of processes.
        precision: the trainer's, which tells features on disk apart.
        keep: whether to use the table's folder for features.

    Returns:
        ``(videos, frames, dim)`` in the order of the table's videos, on the model's device; zero where no episode
        names the video.

    Raises:
        UserError: another process adds features to the same file; or videos are unusable that may not be replaced.
    """
    if (features := table.features()) is not None:
        # Under autocast as the tower gave them; else as wide as the weights that they go through.
        return features.to(model.device, None if "mixed" in precision else model.head.scale.dtype)
    store = _open_store(model, table, precision) if table.store and keep else None
    with ExitStack() as until_written:
        kept, refusal = _kept_features(store, table, numbers, until_written) if store and rank == 0 else ({}, None)
        if store and world_size > 1:  # one word for all: each has to miss the same, or to end
            kept, refusal = of_all_ranks((kept, refusal), world_size)[0]
        if refusal is not None:
            raise UserError(refusal)
        return _encode_missing(model, table, numbers, kept, store, rank, world_size)


def _kept_features(
    store: FeatureStore, table: VideoTable, numbers: Sequence[int], until_written: ExitStack
) -> tuple[dict[str, Tensor], str | None]:
    """The features that are there, or why there are none; where some are missing, those to come are this process's."""
    try:
        kept = store.read()
        if any(table.identity(index) not in kept for index in table.named(numbers)):
            until_written.enter_context(locked(beside(store.path, ".lock"), "features", store.path))
            kept = store.read()  # what another one wrote meanwhile
    except UserError as error:
        if not isinstance(error.__cause__, OSError):  # a folder that can't be written keeps nothing, which is said then
            return {}, str(error)
    return kept, None


def _encode_missing(
    model: M2DF,
    table: VideoTable,
    numbers: Sequence[int],
    kept: Mapping[str, Tensor],
    store: FeatureStore | None,
    rank: int,
    world_size: int,
) -> Tensor:
    encoded: dict[int, Tensor] = {}
    fresh: dict[str, Tensor] = {}
    while indices := [index for index in table.named(numbers) if index not in encoded]:
        encoded |= {index: kept[name] for index in indices if (name := table.identity(index)) in kept}
        mine, unusable = _encode(model, table, [i for i in indices if i not in encoded], rank, world_size)
        encoded |= mine
        fresh |= {table.identity(index): feature for index, feature in mine.items()}
        if unusable:
            table.replace(unusable)
    if not encoded:
        raise UserError("not one of the videos can be read: check that they are there, and what they are")
    if store and fresh and rank == 0:
        dtype = next(iter(fresh.values())).dtype
        store.write({name: feature for name, feature in kept.items() if feature.dtype == dtype} | fresh)
    some = next(iter(encoded.values()))
    features = torch.zeros((len(table.videos), *some.shape), dtype=some.dtype, device=model.device)
    for index, feature in encoded.items():
        features[index] = feature.to(model.device)
    return features


def _open_store(model: M2DF, table: VideoTable, precision: str) -> FeatureStore:
    tower = model.backbone
    # Of adapters, since the scale of what they add is not in the weights.
    config = tower.visual_config | ({} if tower.adapters is None else {"adapters": tower.adapters})
    preprocessing = [config, tower.mean.flatten().tolist(), tower.std.flatten().tolist()]
    how = json.dumps([table.reading, precision, preprocessing], sort_keys=True, default=str)
    return FeatureStore(str(table.store), tower.visual, how, shape=(table.frames, tower.dim))


def _encode(
    model: M2DF, table: VideoTable, indices: Sequence[int], rank: int, world_size: int
) -> tuple[dict[int, Tensor], dict[str, str]]:
    """Features by index, and why other videos can't be read, by path; of all ranks, each of which does its share."""
    mine: dict[int, Tensor] = {}
    unusable: dict[str, str] = {}
    chunks = [indices[k : k + VIDEOS] for k in range(rank * VIDEOS, len(indices), world_size * VIDEOS)]
    for clips in table.clips(chunks):
        unusable |= clips.unusable
        if clips.frames is not None:
            # A short block is filled up: the last bits of features depend on how many frames are encoded together.
            count = len(clips.frames)
            frames = torch.cat((clips.frames, clips.frames.new_zeros(VIDEOS - count, *clips.frames.shape[1:])))
            features = model.encode_frames(frames.to(model.device))[:count]
            mine |= dict(zip(clips.indices.tolist(), features, strict=True))
    if world_size > 1:
        # Copies: a row of a tensor would be sent with the whole of it.
        on_cpu = {index: feature.cpu().clone() for index, feature in mine.items()}
        for features_of_rank, reasons in of_all_ranks((on_cpu, unusable), world_size):
            mine |= features_of_rank
            unusable |= reasons
    return mine, unusable


FEATURES_FORMAT = "clip-m2df features 1"


class FeatureStore:
    """The features that one tower made of videos.

    Args:
        folder: where files are; made when first written.
        tower: its weights tell it.
        how: how frames are read and computed, in words.
        shape: ``(frames, dim)`` of a video's features; by default any.
    """

    def __init__(self, folder: str | Path, tower: nn.Module, how: str, *, shape: tuple[int, int] | None = None) -> None:
        self.key = digest_of(tower.state_dict(), how)
        self.shape = shape
        self.path = Path(folder) / f"features-{self.key[:16]}.safetensors"
        # Under autocast features are half as wide as weights, and of a tower held in half precision twice as wide; the
        # key tells both.
        self.dtypes = {torch.float16, torch.bfloat16} if "mixed" in how else set()
        self.dtypes |= {torch.float32, *(weight.dtype for weight in tower.parameters())}

    def read(self) -> dict[str, Tensor]:
        """Features ``(frames, dim)`` by what tells their video; nothing where there are none that can be trusted.

        Raises:
            UserError: what is there is not a regular file.
        """
        check_regular(self.path, "file of features")
        if not os.path.exists(self.path):
            return {}
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata()
                if (metadata["format"], metadata["key"]) != (FEATURES_FORMAT, self.key):
                    raise ValueError("another format or tower")
                features = file.get_tensor("features")
            if _checksum(metadata["videos"], features) != metadata["sha256"]:
                raise ValueError("another checksum")
            videos = json.loads(metadata["videos"])
            self._check(videos, features)
            return dict(zip(videos, map(Tensor.clone, features), strict=True))
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
            warnings.warn(f"the features in {self.path} can't be used ({error}): they are made anew", stacklevel=2)
            return {}

    def _check(self, videos: object, features: Tensor) -> None:
        """Refuse, by a ``ValueError``, what this tower does not make: a checksum can be right for any content."""
        if not isinstance(videos, list) or not all(isinstance(video, str) for video in videos):
            raise ValueError("no list of videos")
        if features.ndim != 3 or (self.shape and tuple(features.shape[1:]) != self.shape):
            wanted = "three axes" if self.shape is None else f"(videos, {self.shape[0]}, {self.shape[1]})"
            raise ValueError(f"of shape {tuple(features.shape)} where {wanted} belongs")
        if features.dtype not in self.dtypes:
            raise ValueError(f"of type {features.dtype}")
        if not len(features) == len(videos) == len(set(videos)):
            raise ValueError(f"of {len(features)} videos where {len(set(videos))} are named")
        if not features.isfinite().all() or not features.any(-1).all():
            raise ValueError("with values that are not finite, or a frame of zeros")

    def write(self, features: Mapping[str, Tensor]) -> None:
        """Put features there, by what tells their video, in the place of all that were."""
        rows = torch.stack([feature.cpu() for feature in features.values()])
        videos = json.dumps(list(features))
        metadata = {"format": FEATURES_FORMAT, "key": self.key, "videos": videos, "sha256": _checksum(videos, rows)}
        try:
            with whole_file(self.path, "features") as draft:
                save_file({"features": rows}, draft, metadata)
        except (UserError, SafetensorError) as error:  # the evaluation itself is worth more
            warnings.warn(f"the features can't be kept in {self.path}: {error}", stacklevel=2)


def _checksum(videos: str, features: Tensor) -> str:
    return hashlib.sha256(videos.encode() + bytes_of(features)).hexdigest()
