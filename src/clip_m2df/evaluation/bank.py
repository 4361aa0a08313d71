"""Episodes played from features: with frozen weights, what depends on a video alone is computed once.

A video's prompt scores belong to the video, and its fused sequence to the video and a prompt. However many episodes it
is in, as support (with its own class's prompt) or as a query (with the prompt that PPS chose), each of these pairs is
fused once; what is left for an episode is PPS's choice, the prototypes and the matching.

What is computed together never depends on the number of ranks, so neither does a bit of the results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from clip_m2df.episode import IndexedEpisode
from clip_m2df.nn.head import Head, HeadOutput
from clip_m2df.nn.m2df import M2DFHead, has_stages
from clip_m2df.nn.views import FusedSequence

# How many go through at once.
VIDEOS, PAIRS, EPISODES = 256, 64, 256


class EpisodeBank:
    """All that is needed to play episodes, with what they share computed once.

    Args:
        head: in eval mode. One whose ``forward`` is not that of :class:`M2DFHead` is called whole on the features.
        features: ``(videos, frames, dim)``.
        prompt_table: ``(n_classes, dim)``.
        episodes: all that will be played, their numbers rising, on the device of the features.
        memory: bytes for fused sequences. Where they don't fit, each batch of episodes fuses its own.
    """

    def __init__(
        self, head: Head, features: Tensor, prompt_table: Tensor, episodes: IndexedEpisode, *, memory: float = 4e9
    ) -> None:
        self.head = cast(M2DFHead, head)  # whose stages are called where it has them
        self.features = features
        self.prompt_table = prompt_table
        self.episodes = episodes
        self.staged = has_stages(head)
        self._fused: dict[str, FusedSequence] = {}
        if self.staged:
            self._choose_prompts()
            self._list_pairs(memory)

    def play(self, numbers: Tensor) -> HeadOutput:
        """Score the queries of episodes.

        Args:
            numbers: int64 ``(episodes)``, of episodes that the bank has.
        """
        numbers = torch.searchsorted(self.episodes["numbers"], numbers)
        support, query = self.episodes["support"][numbers], self.episodes["query"][numbers]
        classes, draws = self.episodes["class_indices"][numbers], self.episodes["draws"][numbers]
        if not self.staged:
            output: HeadOutput = self.head(
                self.features[support], self.features[query], self.prompt_table[classes], draws
            )
            return output
        if self._of_episode:
            selected = self.head.select(self.probabilities[numbers], self.prompt_table[classes], draws)
            fused_query = self.head.fuse(self.features[query], selected.embeddings)
            fused_support = self._fetch(self.support_pairs[numbers])
        else:
            shape = support.shape[1] * support.shape[2]
            pairs = torch.cat((self.support_pairs[numbers].flatten(1), self.query_pairs[numbers]), 1)
            fused = self._fetch(pairs)
            fused_support = {
                view: FusedSequence(*(part[:, :shape].unflatten(1, support.shape[1:]) for part in parts))
                for view, parts in fused.items()
            }
            fused_query = {view: FusedSequence(*(part[:, shape:] for part in parts)) for view, parts in fused.items()}
        evidence = self.head.match(fused_query, self.head.prototype(fused_support))
        return self.head.conclude(evidence, self.probabilities[numbers], self.chosen[numbers])

    @property
    def _of_episode(self) -> bool:
        """Whether a query's prompt is the episode's own, and no class's."""
        return self.head.pps and self.head.selection == "expectation"

    def _choose_prompts(self) -> None:
        """PPS for all episodes, from one table of scores: ``probabilities``, and the classes ``chosen``."""
        scores = torch.cat([self.head.prompt_scores(f, self.prompt_table) for f in self.features.split(VIDEOS)])
        probabilities, chosen = [], []
        columns = (self.episodes["query"], self.episodes["class_indices"], self.episodes["draws"])
        for query, classes, draws in zip(*(column.split(EPISODES) for column in columns), strict=True):
            of_queries = torch.take_along_dim(scores[query], classes.unsqueeze(1), dim=-1)
            probabilities.append(self.head.prompt_probabilities(of_queries))
            chosen.append(self.head.select(probabilities[-1], self.prompt_table[classes], draws).indices)
        self.probabilities, self.chosen = torch.cat(probabilities), torch.cat(chosen)

    def _list_pairs(self, memory: float) -> None:
        """Number the pairs of a video and a prompt, in the order of their first use."""
        n_classes = len(self.prompt_table)
        classes = self.episodes["class_indices"]
        # Without PPS a query's prompt is zero, which counts as one more class.
        chosen = classes.gather(1, self.chosen) if self.head.pps else torch.full_like(self.chosen, n_classes)
        support = self.episodes["support"] * (n_classes + 1) + classes.unsqueeze(-1)
        query = self.episodes["query"] * (n_classes + 1) + chosen
        used = support.flatten(1) if self._of_episode else torch.cat((support.flatten(1), query), 1)
        keys, places = used.flatten().unique(return_inverse=True)
        order = torch.arange(len(places), device=places.device)
        first = torch.full_like(keys, len(places)).scatter_reduce(0, places, order, "amin")
        by_use = first.argsort()
        numbers = torch.empty_like(by_use).scatter_(0, by_use, torch.arange(len(by_use), device=by_use.device))
        pairs = numbers[places].view_as(used)
        self.pairs = keys[by_use]
        self.support_pairs = pairs[:, : support[0].numel()].view_as(support)
        self.query_pairs = pairs[:, support[0].numel() :]
        frames, dim = self.features.shape[1:]
        self._fits = len(self.pairs) * len(self.head.views) * (frames + 1) * dim * 4 <= memory
        self._done = [False] * -(-len(self.pairs) // PAIRS)

    def _fetch(self, pairs: Tensor) -> dict[str, FusedSequence]:
        """The fused sequences of pairs, whatever the shape of their numbers."""
        if not self._fits:
            wanted, places = pairs.unique(return_inverse=True)
            return _take(_join([self._fuse(chunk) for chunk in wanted.split(PAIRS)]), places)
        for chunk in (pairs // PAIRS).unique().tolist():
            if not self._done[chunk]:
                numbers = torch.arange(chunk * PAIRS, min((chunk + 1) * PAIRS, len(self.pairs)), device=pairs.device)
                self._keep(numbers, self._fuse(numbers))
                self._done[chunk] = True
        return _take(self._fused, pairs)

    def _keep(self, numbers: Tensor, fused: Mapping[str, FusedSequence]) -> None:
        for view, parts in fused.items():
            if view not in self._fused:
                self._fused[view] = FusedSequence(*(p.new_empty((len(self.pairs), *p.shape[1:])) for p in parts))
            for kept, part in zip(self._fused[view], parts, strict=True):
                kept[numbers] = part

    def _fuse(self, numbers: Tensor) -> dict[str, FusedSequence]:
        n_classes = len(self.prompt_table)
        videos, classes = self.pairs[numbers] // (n_classes + 1), self.pairs[numbers] % (n_classes + 1)
        prompts = torch.cat((self.prompt_table, torch.zeros_like(self.prompt_table[:1])))[classes]
        return self.head.fuse(self.features[videos], prompts)


def _take(fused: Mapping[str, FusedSequence], places: Tensor) -> dict[str, FusedSequence]:
    return {view: FusedSequence(*(part[places] for part in parts)) for view, parts in fused.items()}


def _join(chunks: list[dict[str, FusedSequence]]) -> dict[str, FusedSequence]:
    return {view: FusedSequence(*map(torch.cat, zip(*(c[view] for c in chunks), strict=True))) for view in chunks[0]}
