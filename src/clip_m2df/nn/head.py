"""What every head is: frame features and prompt embeddings in, a :class:`HeadOutput` out, by way of the same steps.

A head writes what it keeps of a video (``embed``), what a class is from its own shots (``prototype``) and how queries
are compared with classes (``match``). Training, banks, classifiers, explanations and exports call these steps, in the
order that :class:`Scoring` gives them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_m2df.errors import require
from clip_m2df.nn.distillation import Distillation, ViewOutput
from clip_m2df.nn.matching import cosine, full_precision
from clip_m2df.nn.prompts import (
    SelectedPrompts,
    Selection,
    closest_frames,
    prompt_probabilities,
    prompt_scores,
    select_prompts,
)

QueryPrompt = Literal["class", "mixture", "each", "none"]


class Embedded(dict[str, Tensor]):
    """What a head keeps of some videos or classes: tensors by name, all with the same leading axes."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Embedded:
        """The same with each tensor put through a function."""
        return Embedded({name: function(tensor) for name, tensor in self.items()})

    @classmethod
    def cat(cls, parts: Sequence[Embedded]) -> Embedded:
        """Join along the first axis."""
        return cls({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    @classmethod
    def stack(cls, parts: Sequence[Embedded]) -> Embedded:
        """Join along a new first axis.

        Prototypes whose size depends on the number of shots are padded to the largest, with zeros; a head that makes
        such prototypes keeps a bool tensor beside them, which is False where there is padding.
        """
        return cls({name: _stack([part[name] for part in parts]) for name in parts[0]})


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [n for size, most in zip(tensor.shape, largest, strict=True) for n in (most - size, 0)][::-1]
        padded.append(F.pad(tensor, missing) if any(missing) else tensor)
    return torch.stack(padded)


class HeadOutput(NamedTuple):
    """What a head makes of the queries.

    Attributes:
        logits: ``(…, n_queries, n_way)``; of a head that measures distances, minus the (fused) distance.
        views: what each view in use (``local``, ``global``) makes of them; empty for a head without views.
        prompt_probabilities: PPS's distribution π ``(…, n_queries, n_way)``.
        prompt_indices: int64 ``(…, n_queries)``, whose prompt each query got (``expectation`` and ``each``: the
            likeliest).
        distillation: the term's value ``(…)`` and the queries ``(…, n_queries)`` distilled each way.
    """

    logits: Tensor
    views: Mapping[str, ViewOutput]
    prompt_probabilities: Tensor
    prompt_indices: Tensor
    distillation: Distillation

    @classmethod
    def of(
        cls,
        logits: Tensor,
        selected: SelectedPrompts,
        views: Mapping[str, ViewOutput] | None = None,
        distillation: Distillation | None = None,
    ) -> HeadOutput:
        """From the logits and the prompts that were selected; without ``distillation`` nothing is distilled."""
        distillation = Distillation.none(logits) if distillation is None else distillation
        return cls(logits, views or {}, selected.probabilities, selected.indices, distillation)

    @property
    def distillation_loss(self) -> Tensor:
        """The distillation term ``(…)``, one an episode."""
        return self.distillation.loss


class Scoring(ABC):
    """The steps by which the queries of an episode are scored, and their order, which is written here alone.

    Any leading axes ``…``: B episodes at once. To a :class:`Head` a video is its frame features ``(…, frames, dim)``
    and a prompt its embedding ``(…, dim)``; to a bank both are row numbers
    (:class:`clip_m2df.evaluation.bank.EpisodeBank`).
    """

    @property
    @abstractmethod
    def query_prompt(self) -> QueryPrompt:
        """What a query is embedded with: the prompt of one class, a mixture of several, or none.

        Or with that of each class of the episode in turn (``each``), to be compared with that class alone. A bank keeps
        queries embedded with one class's prompt, with each or with none from one episode to the next.
        """

    @abstractmethod
    def select_prompts(self, query: Tensor, prompts: Tensor, draws: Tensor | None = None) -> SelectedPrompts:
        """Give each query a prompt.

        Args:
            query: ``(…, n_queries, frames, dim)``.
            prompts: ``(…, n_way, dim)``, those of the episode's classes.
            draws: ``(…, n_queries)``, uniforms in [0, 1) for a head that samples.
        """

    @abstractmethod
    def embed(self, videos: Tensor, prompt: Tensor | None) -> Embedded:
        """What is kept of each video by itself.

        Args:
            videos: ``(…, frames, dim)``.
            prompt: ``(…, dim)``: a support video's is that of its class, a query's the one that was selected. None for
                queries where ``query_prompt`` is ``none``. Where it is ``each``, queries come as
                ``(…, n_queries, 1, frames, dim)`` with prompts ``(…, n_queries, n_way, dim)``; what is kept has the
                leading axes of the prompts.
        """

    @abstractmethod
    def prototype(self, embedded: Embedded, prompts: Tensor) -> Embedded:
        """What each class is, from its own shots.

        Args:
            embedded: of the support, ``(…, n_shot, …)``. Classes may have different numbers of shots: then each comes
                by itself, and their prototypes are joined by :meth:`Embedded.stack`.
            prompts: ``(…, dim)``, those of the classes.
        """

    @abstractmethod
    def match(self, query: Embedded, prototypes: Embedded, selected: SelectedPrompts) -> HeadOutput:
        """Compare queries ``(…, n_queries, …)`` with prototypes ``(…, n_way, …)``.

        Args:
            query: the queries, embedded; where ``query_prompt`` is ``each``, ``(…, n_queries, n_way, …)``.
            prototypes: of the classes.
            selected: the queries' prompts, for :meth:`HeadOutput.of`.
        """

    def prototypes(self, support: Tensor, prompts: Tensor) -> Embedded:
        """The prototypes ``(…, n_way, …)`` of ``support (…, n_way, n_shot, frames, dim)`` with ``prompts (…, dim)``."""
        return self.prototype(self.embed(support, _of_shots(prompts, support)), prompts)

    def embed_queries(
        self, query: Tensor, prompts: Tensor, draws: Tensor | None = None
    ) -> tuple[Embedded, SelectedPrompts]:
        """Select prompts for queries, and embed the queries with them; see :meth:`score`."""
        selected = self.select_prompts(query, prompts, draws)
        if self.query_prompt == "each":
            query = query.unsqueeze(prompts.ndim - 1)  # after the axis of the queries, in the place of the classes
        return self.embed(query, None if self.query_prompt == "none" else selected.embeddings), selected

    def score(self, query: Tensor, prompts: Tensor, prototypes: Embedded, draws: Tensor | None = None) -> HeadOutput:
        """Score queries against prototypes.

        Args:
            query: ``(…, n_queries, frames, dim)``.
            prompts: ``(…, n_way, dim)``.
            prototypes: ``(…, n_way, …)``.
            draws: ``(…, n_queries)``, uniforms in [0, 1) for a head that samples.
        """
        embedded, selected = self.embed_queries(query, prompts, draws)
        return self.match(embedded, prototypes, selected)

    def score_episode(self, support: Tensor, query: Tensor, prompts: Tensor, draws: Tensor | None = None) -> HeadOutput:
        """Score queries against their support: :meth:`prototypes` and :meth:`score`, with all videos embedded at once.

        Args:
            support: ``(…, n_way, n_shot, frames, dim)``.
            query: ``(…, n_queries, frames, dim)``.
            prompts: ``(…, n_way, dim)``.
            draws: ``(…, n_queries)``, uniforms in [0, 1) for a head that samples.
        """
        classes = prompts.ndim - 2  # the axis of the classes, and of the queries
        video = query.shape[classes + 1 :]
        if self.query_prompt != "class" or support.shape[classes + 2 :] != video:
            return self.score(query, prompts, self.prototypes(support, prompts), draws)
        # One pass over the weights: for small episodes, reading them from memory takes as long as the arithmetic.
        selected = self.select_prompts(query, prompts, draws)
        of_support, shape = _of_shots(prompts, support), support.shape[classes : classes + 2]
        embedded = self.embed(
            torch.cat((support.flatten(classes, classes + 1), query), classes),
            torch.cat((of_support.flatten(classes, classes + 1), selected.embeddings), classes),
        )
        shots = embedded.map(lambda t: t.narrow(classes, 0, shape.numel()).unflatten(classes, shape))
        queries = embedded.map(lambda t: t.narrow(classes, shape.numel(), query.shape[classes]))
        return self.match(queries, self.prototype(shots, prompts), selected)


def _of_shots(prompts: Tensor, support: Tensor) -> Tensor:
    """The prompt of each support video: ``(…, n_way, dim)`` to ``(…, n_way, n_shot, dim)``."""
    return prompts.unsqueeze(-2).expand(*prompts.shape[:-1], support.shape[prompts.ndim - 1], -1)


class Head(nn.Module, Scoring):
    """Scores the queries of episodes on frame features and prompt embeddings. Any leading axes: B episodes at once.

    A head of one's own derives from it and writes ``embed``, ``prototype`` and ``match``. Where it embeds a query with
    a prompt, it says so in ``query_prompt``.

    Args:
        dim: width of the features.
        top_k: frames that count in a prompt's score.
        temperature: of PPS's softmax.

    Attributes:
        trained: whether it has anything to train; one that has not is measured without a checkpoint.
        uses_prompts: whether scores depend on the prompts, so that two classes with one prompt are refused.
        task_specific: whether the logit of a class depends on the other classes of the episode too.
        differentiable: whether gradients go through it; one that fits another package's model in each episode is for
            evaluations alone, and is not exported.
        selection: how PPS picks at evaluation.
        train_selection: how it picks in training.

    Raises:
        UserError: an option out of its range, with what it may be.
    """

    trained: ClassVar[bool] = True
    uses_prompts: ClassVar[bool] = True
    task_specific: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    selection: Selection = "argmax"
    train_selection: Selection = "argmax"

    def __init__(self, *, dim: int, top_k: int = 4, temperature: float = 200.0) -> None:
        super().__init__()
        require(least=1, top_k=top_k)
        require(above=0, temperature=temperature)
        self.dim = dim
        self.top_k = top_k
        self.temperature = temperature
        # Scale of the class logits, learnt where their loss is used.
        self.scale = nn.Parameter(torch.ones(1))

    @property
    def without_prompts(self) -> str:
        """What to change so that it does without prompts, which a tower without text has not; "" where it does."""
        return "take a head that needs none, such as otam, bi_mhm or nearest_prototype" if self.uses_prompts else ""

    def forward(self, support: Tensor, query: Tensor, prompts: Tensor, draws: Tensor | None = None) -> HeadOutput:
        """Score the queries of an episode.

        Args:
            support: ``(…, n_way, n_shot, frames, dim)``, frame features.
            query: ``(…, n_queries, frames, dim)``.
            prompts: ``(…, n_way, dim)``, the prompt embeddings of the episode's classes.
            draws: ``(…, n_queries)``, uniforms in [0, 1) for a head that samples.

        Raises:
            UserError: the head samples and there are no draws.
        """
        return self.score_episode(support, query, prompts, draws)

    @property
    def query_prompt(self) -> QueryPrompt:
        """A query is embedded without a prompt, unless a head says otherwise."""
        return "none"

    def select_prompts(self, query: Tensor, prompts: Tensor, draws: Tensor | None = None) -> SelectedPrompts:
        """PPS, see :meth:`Scoring.select_prompts`.

        Raises:
            UserError: PPS samples and there are no draws.
        """
        probabilities = prompt_probabilities(prompt_scores(query, prompts, self.top_k), self.temperature)
        selection = self.train_selection if self.training else self.selection
        return select_prompts(probabilities, prompts, selection, draws)

    def check_frames(self, frames: int) -> None:
        """Refuse videos of a number of frames that the head can't take; a head takes any, unless it says otherwise.

        Raises:
            UserError: says what to change.
        """

    def align(self, query: Embedded, prototypes: Embedded) -> dict[str, Tensor]:
        """By view, which frames of queries and prototypes are aligned: ``(…, n_queries, n_way, frames, frames)``.

        For explanations; empty for a head without views.
        """
        return {}

    def least_distance(self, frames: int, view: str = "") -> float:
        """Minus the highest logit that there can be, that of videos whose frames are all the same picture.

        What people are shown as a distance counts from here: OTAM's soft minimum, for one, is below 0 for what is
        alike. 0 unless a head says otherwise; where its logits have no bound, distances may be negative.

        Args:
            frames: of a video.
            view: the view whose own distance is meant, of a head with views; the fused one by default.
        """
        return 0.0

    def frame_scores(self, query: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """How much each frame looks like each prompt, and which frames count in PPS.

        Args:
            query: features ``(frames, dim)``.
            prompts: ``(n_way, dim)``.

        Returns:
            Cosines and a bool, both ``(n_way, frames)``.
        """
        scores = cosine(prompts, query)
        counting = closest_frames(query, prompts, self.top_k)[1]
        return scores, torch.zeros_like(scores, dtype=torch.bool).scatter(-1, counting, True)

    def class_logits(self, videos: Tensor, prompts: Tensor, prompt_table: Tensor) -> Tensor:
        """How the raw features of videos compare with the prompts of all classes of a split (METHOD, section 7).

        A video stands by the mean of its ``top_k`` frames closest to a prompt.

        Args:
            videos: ``(…, n, frames, dim)``.
            prompts: ``(…, n, dim)``, the prompt of each.
            prompt_table: ``(n_classes, dim)``, or with the same leading axes.

        Returns:
            ``(…, n, n_classes)``.
        """
        closest = closest_frames(videos, prompts.unsqueeze(-2), self.top_k)[1].squeeze(-2)
        return self.scaled_cosine(torch.take_along_dim(videos, closest.unsqueeze(-1), dim=-2), prompt_table)

    @full_precision
    def scaled_cosine(self, frames: Tensor, prompt_table: Tensor) -> Tensor:
        """The scale times the cosine of the mean of ``frames (…, n, frames, dim)`` with each prompt."""
        return self.scale * cosine(frames.mean(-2), prompt_table)
