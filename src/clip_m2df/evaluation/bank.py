"""Episodes played from features: with frozen weights, what depends on a video and a prompt alone is computed once.

However many episodes a video is in, as support (with its own class's prompt) or as a query (with the prompt that was
selected), the head embeds each such pair once; what is left for an episode is the prototypes and the matching.

What is computed together never depends on the number of ranks, so neither does a bit of the results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clip_m2df.episode import IndexedEpisode, select_episodes
from clip_m2df.nn.head import Embedded, Head, HeadOutput, QueryPrompt, Scoring
from clip_m2df.nn.prompts import SelectedPrompts

# How many go through at once.
PAIRS, EPISODES = 64, 256


class EpisodeBank:
    """All that is needed to play episodes, with what they share computed once.

    Args:
        head: in eval mode.
        features: ``(videos, frames, dim)``.
        prompt_table: ``(n_classes, dim)``.
        episodes: all that will be played, their numbers rising, on the device of the features.
        memory: bytes for embedded videos. Where they don't fit, each batch of episodes embeds its own.

    Attributes:
        indices: int64 ``(episodes, n_queries)``, the classes whose prompts were selected for the queries.
        probabilities: ``(episodes, n_queries, n_way)``, PPS's.
        pairs: int64, of a video and a class, in the order of their first use, as ``video · (n_classes + 1) + class``;
            ``n_classes`` stands for no prompt.
    """

    def __init__(
        self, head: Head, features: Tensor, prompt_table: Tensor, episodes: IndexedEpisode, *, memory: float = 4e9
    ) -> None:
        self.head = head
        self.features = features
        self.prompt_table = prompt_table
        self.episodes = episodes
        self.indices, self.probabilities = self._select_prompts()
        self.pairs, self._sorted, self._rank = self._list_pairs()
        self._memory = memory
        self._fits: bool | None = None  # not known before something is embedded
        self._kept = Embedded()
        self._done = [False] * -(-len(self.pairs) // PAIRS)

    def play(self, numbers: Tensor) -> HeadOutput:
        """Score the queries of episodes.

        Args:
            numbers: int64 ``(episodes)``, of episodes that the bank has.
        """
        rows = torch.searchsorted(self.episodes["numbers"], numbers)
        batch = select_episodes(self.episodes, rows)
        classes = batch["class_indices"].unsqueeze(-1)
        steps = _FromBank(self, rows)
        return steps.score(batch["query"], classes, steps.prototypes(batch["support"], classes), batch["draws"])

    def embed(self, videos: Tensor, classes: Tensor) -> Embedded:
        """Videos embedded with the prompts of classes, ``n_classes`` for none; both int64, of one shape."""
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

    def _list_pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs in the order of their first use; the same sorted, and where each of these stands in the former."""
        classes = self.episodes["class_indices"]
        support = self._pair(self.episodes["support"], classes.unsqueeze(-1)).flatten(1)
        query = self.episodes["query"]
        if self.head.query_prompt == "class":
            support = torch.cat((support, self._pair(query, classes.gather(1, self.indices))), 1)
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
        indices = bank.indices[self.rows]
        chosen = torch.take_along_dim(prompts, indices.unsqueeze(-1), dim=-2)
        return SelectedPrompts(chosen, indices, bank.probabilities[self.rows])

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
