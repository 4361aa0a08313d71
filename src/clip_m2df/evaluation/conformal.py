"""Sets of labels that hold the truth with a promised rate: conformal prediction for few-shot episodes.

Calibrated on *other classes* (Fisch et al., Few-shot Conformal Prediction with Auxiliary Tasks, ICML 2021). What is
taken for exchangeable are classes and not clips: the clips of one class are alike, and many of them say little of the
next class. So each of k classes has the weight 1/(k + 1), spread evenly over its queries, as has the class that is yet
to come (two-layer models: Dunn, Wasserman and Ramdas, Distribution-Free Prediction Sets for Two-Layer Hierarchical
Models, 2022; Lee, Barber and Willett, Distribution-Free Inference with Hierarchical Data, 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from clip_m2df.episode import IndexedEpisode
from clip_m2df.errors import UserError
from clip_m2df.evaluation.bank import EpisodeBank
from clip_m2df.evaluation.open_set import SCORES, aurocs_of, best_score
from clip_m2df.nn.class_text import fuse_text
from clip_m2df.nn.head import Head
from clip_m2df.nn.weights import check_finite


def class_threshold(scores: Tensor, classes: Tensor, errors: Sequence[float]) -> Tensor:
    """The smallest score up to which a query of one more class lies with the promised rate, for each error rate.

    Args:
        scores: of queries of known truth ``(n)``, higher where the truth fits worse.
        classes: int64 ``(n)``, which class each query is of; any numbers.
        errors: above 0 and below 1.

    Returns:
        Float64 ``(errors)``; infinite where k classes are too few, which is where 1/(k + 1) is above the error rate.
    """
    _, rows, counts = classes.unique(return_inverse=True, return_counts=True)
    ordered, order = scores.double().sort()
    # In units of 1/(k + 1), which one class and the one to come have each.
    reached = counts.double().reciprocal()[rows][order].cumsum(0)
    wanted = (1 - torch.tensor(errors, dtype=torch.float64)) * (len(counts) + 1)
    # Sums of floats are a little off what they stand for.
    indices = torch.searchsorted(reached, wanted - 1e-9)
    return torch.cat((ordered, ordered.new_tensor([math.inf])))[indices]


class Dealt(NamedTuple):
    """Episodes whose queries are of their own classes and of others.

    Attributes:
        episodes: their ``query_labels`` are -1 where the episode does not have the query's class.
        classes: int64 ``(episodes, n_queries)``, the class of each query.
    """

    episodes: IndexedEpisode
    classes: Tensor

    @property
    def known(self) -> Tensor:
        """Bool ``(episodes, n_queries)``, whether the episode has the query's class."""
        return self.episodes["query_labels"] >= 0


def deal_classes(
    classes: Sequence[int], n_way: int, *, n_query: int, n_known: int, rng: np.random.Generator
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """The classes of episodes, and the others of which they have unknown queries, as many or as many as there are.

    All classes come about equally often. Where fewer are left over than an episode has, each is among them at least
    once.

    Args:
        classes: those that there are.
        n_way: classes of an episode.
        n_query: queries of a class in an episode.
        n_known: queries of each class that there are to be, at least, in episodes that have the class.
        rng: the only source of chance.
    """
    names, dealt = np.array(classes), np.zeros((2, len(classes)), dtype=int)
    episodes = []
    # A class that is never left over says nothing of unknown clips.
    few = n_way < len(names) < 2 * n_way
    while dealt[0].min() < n_known or (few and dealt[1].min() == 0):
        # Those that came least often, in an order of chance.
        order = np.lexsort((rng.random(len(names)), dealt[0]))
        own, others = order[:n_way], order[n_way:]
        others = others[np.lexsort((rng.random(len(others)), dealt[1][others]))][:n_way]
        dealt[0][own] += n_query
        dealt[1][others] += n_query
        episodes.append((names[own].tolist(), names[others].tolist()))
    return episodes


def make_episodes(
    videos: Sequence[Sequence[int]],
    of_episodes: Iterable[tuple[Sequence[int], Sequence[int]]],
    n_shot: int,
    n_query: int,
    rng: np.random.Generator,
) -> Dealt:
    """Episodes of given classes, with queries of these and of others.

    Args:
        videos: of each class, by their indices; at least ``n_shot + n_query`` of a class.
        of_episodes: the classes of each episode, and the others; as many in each episode.
        n_shot: support videos a class.
        n_query: queries of a class.
        rng: the only source of chance.
    """
    support, query, indices, labels, of_queries = [], [], [], [], []
    for classes, others in of_episodes:
        drawn = [rng.choice(videos[c], n_shot + n_query, replace=False) for c in classes]
        support.append([row[:n_shot] for row in drawn])
        query.append(
            np.stack([row[n_shot:] for row in drawn] + [rng.choice(videos[c], n_query, replace=False) for c in others])
        )
        indices.append(classes)
        labels.append([*range(len(classes)), *(-1 for _ in others)])
        of_queries.append([*classes, *others])
    rows = {"query_labels": labels, "classes": of_queries}
    found = {name: torch.tensor(np.array(row)).long().repeat_interleave(n_query, -1) for name, row in rows.items()}
    episodes = IndexedEpisode(
        numbers=torch.arange(len(indices)),
        support=torch.from_numpy(np.array(support)),
        query=torch.from_numpy(np.array(query)).flatten(1),
        query_labels=found["query_labels"],
        class_indices=torch.from_numpy(np.array(indices)).long(),
        class_names=[],
        draws=torch.from_numpy(rng.random(found["classes"].shape, dtype=np.float32)),
    )
    return Dealt(episodes, found["classes"])


class Player:
    """Plays episodes of any shape from one bank.

    Args:
        head: in eval mode.
        features: ``(videos, frames, dim)``.
        prompt_table: ``(n_classes, dim)``.
        videos: of each class, by their indices.
        text_fusion: the text's share in the predictions.
        memory: of the bank, in bytes.
    """

    def __init__(
        self,
        head: Head,
        features: Tensor,
        prompt_table: Tensor,
        videos: Sequence[Sequence[int]],
        *,
        text_fusion: float = 0.0,
        memory: float = 4e9,
    ) -> None:
        self.head, self.features, self.prompt_table = head, features, prompt_table
        self.text_fusion, self.memory = text_fusion, memory
        # A query may get the prompt of any class, unless it gets none.
        n_classes, alone = len(videos), head.query_prompt == "none"
        pairs = [
            (v, p) for c, row in enumerate(videos) for v in row for p in ([c, n_classes] if alone else range(n_classes))
        ]
        self._pairs = torch.tensor(pairs, device=features.device)
        self._bank: EpisodeBank | None = None

    @torch.no_grad()
    def play(self, episodes: IndexedEpisode) -> tuple[Tensor, Tensor]:
        """Play.

        Args:
            episodes: by the rows of features and prompts.

        Returns:
            The head's logits, and the nonconformity of each class; both ``(episodes, n_queries, n_way)``, on the CPU.
        """
        device = self.features.device
        moved = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in episodes.items()}
        rows = IndexedEpisode(**moved)  # type: ignore[typeddict-item]
        if self._bank is None:
            own = self.head, self.features, self.prompt_table
            self._bank = EpisodeBank(*own, rows, memory=self.memory, pairs=self._pairs)
        else:
            self._bank.turn_to(rows)
        found = []
        for numbers in rows["numbers"].split(max(1, TOGETHER // rows["query"].shape[1])):
            logits, query = self._bank.play(numbers).logits, self.features[rows["query"][numbers]]
            prompts = self.prompt_table[rows["class_indices"][numbers]]
            scores = fuse_text(self.head, self.text_fusion, logits, query, prompts)
            check_finite(scores, "the calibration")
            found.append((logits.cpu(), nonconformity(scores).cpu()))
        logits, misfits = (torch.cat(column) for column in zip(*found, strict=True))
        return logits, misfits


def nonconformity(scores: Tensor) -> Tensor:
    """How badly each class fits a query, from the scores by which classes are predicted: 1 minus the probability.

    Of what was tried (the distance to the class, by how much the best class is ahead, the sum of the probabilities down
    to the class) it gives the smallest sets on the embedded benchmark. It depends on the other classes of the episode,
    which are another draw in each: so the promise is exact for classes that are drawn independently of each other up to
    what the classes of a calibration share by being in one another's episodes, which is measured alone.

    Args:
        scores: ``(…, n_way)``, logits or logarithms of probabilities.

    Returns:
        Float64 of the same shape.
    """
    # Not 1 - p, of which most would be rounded to 0.
    return -scores.double().log_softmax(-1)


# A calibration keeps thresholds for error rates of so many steps a unit; others are rounded down to one of these.
STEPS = 200
# Queries of a class in its calibration, for each number of ways and shots, and in an episode.
N_KNOWN, N_QUERY = 32, 4
# Queries that are played at once.
TOGETHER = 1024
# Clips of a class that are looked at.
MOST_CLIPS = 24
N_SHOTS = (1, 3, 5, 10)


def least_error(n_classes: int) -> float:
    """The least error rate that there can be a promise for: the first step that is not below 1/(k + 1).

    Args:
        n_classes: k, of the calibration.
    """
    return -(-STEPS // (n_classes + 1)) / STEPS


class Thresholds(NamedTuple):
    """The nonconformity up to which a label is in the set.

    Attributes:
        known: of each class.
        unknown: of "none of these", whose nonconformity is the score by which clips of known classes are told.
    """

    known: float
    unknown: float


@dataclass(frozen=True)
class Calibration:
    """Thresholds for sets that hold the truth with a promised rate, from the classes of a calibration.

    Attributes:
        score: of :data:`clip_m2df.evaluation.open_set.SCORES`, the one that tells unknown clips best.
        aurocs: of each score, the mean over numbers of ways and shots; empty where there were too few classes.
        settings: int64 ``(n, 3)``, ways, shots and how many classes the calibration had for them.
        thresholds: float64 ``(n, 2, STEPS - 1)``, for each step of the error rate those of :class:`Thresholds`.
        goes_by: what the scores depend on beside the weights, by the names of the model's options.
    """

    score: str
    aurocs: Mapping[str, float]
    settings: Tensor
    thresholds: Tensor
    goes_by: Mapping[str, Any]

    def at(self, n_way: int, n_shot: int, error: float) -> Thresholds:
        """The thresholds of an error rate.

        Args:
            n_way: number of classes.
            n_shot: examples of a class.
            error: above 0 and below 1; it is rounded down to a step.

        Raises:
            UserError: there are none for so many classes and examples.
        """
        rows = ((self.settings[:, 0] == n_way) & (self.settings[:, 1] == n_shot)).nonzero().flatten()
        if not len(rows):
            raise UserError(f"the calibration is not of {n_way} classes with {n_shot} examples, but of {self}")
        step = math.floor(error * STEPS + 1e-9)
        if step < 1:
            return Thresholds(math.inf, math.inf)
        known, unknown = self.thresholds[rows[0], :, step - 1].tolist()
        return Thresholds(known, unknown)

    def n_classes(self, n_way: int, n_shot: int) -> int:
        """How many classes the calibration had for so many classes and examples; 0 without any."""
        rows = (self.settings[:, 0] == n_way) & (self.settings[:, 1] == n_shot)
        return int(self.settings[rows, 2].sum())

    @property
    def n_shots(self) -> list[int]:
        """The numbers of examples of a class that there are thresholds for."""
        return sorted(set(self.settings[:, 1].tolist()))

    def __str__(self) -> str:
        by_ways: dict[str, list[int]] = {}
        for n_shot in self.n_shots:
            ways = self.settings[self.settings[:, 1] == n_shot, 0].tolist()
            by_ways.setdefault(f"{min(ways)} to {max(ways)}" if len(ways) > 1 else f"{ways[0]}", []).append(n_shot)
        return "; ".join(
            f"{ways} classes with {', '.join(map(str, shots))} example{'' if shots == [1] else 's'}"
            for ways, shots in by_ways.items()
        )

    def state(self) -> dict[str, Any]:
        """In plain types and tensors, for checkpoints."""
        return {**vars(self), "aurocs": dict(self.aurocs), "goes_by": dict(self.goes_by)}

    @classmethod
    def from_state(cls, state: object) -> Self:
        """What :meth:`state` gave.

        Raises:
            UserError: it is something else.
        """
        names = ("score", "aurocs", "settings", "thresholds", "goes_by")
        try:
            if not isinstance(state, Mapping) or sorted(state) != sorted(names):
                raise ValueError("has not its parts")
            score, aurocs, settings, thresholds, goes_by = (state[name] for name in names)
            if score not in SCORES or not (isinstance(aurocs, Mapping) and isinstance(goes_by, Mapping)):
                raise ValueError(f"has the score {score!r:.40}")
            if aurocs and aurocs.keys() != SCORES.keys():
                raise ValueError("has areas of other scores")
            if not all(type(share) is float and 0 <= share <= 1 for share in aurocs.values()):
                raise ValueError("has areas that are no shares")
            if not all(type(value) in (str, int, float) for value in goes_by.values()):
                raise ValueError("has values of options that are none")
            if not all(isinstance(t, Tensor) and t.layout == torch.strided for t in (settings, thresholds)):
                raise ValueError("has no tables")
            if settings.dtype != torch.int64 or settings.ndim != 2 or settings.shape[1] != 3 or not len(settings):
                raise ValueError("has no numbers of classes and examples")
            if (settings[:, 0] < 2).any() or (settings[:, 1] < 1).any() or (settings[:, 2] < settings[:, 0]).any():
                raise ValueError("has numbers of classes and examples that there can't be")
            if len(settings[:, :2].unique(dim=0)) < len(settings):
                raise ValueError("has the same numbers of classes and examples twice")
            if thresholds.dtype != torch.float64 or thresholds.shape != (len(settings), 2, STEPS - 1):
                raise ValueError("has no thresholds")
            if thresholds.isnan().any() or (thresholds.diff() > 0).any():
                raise ValueError("has thresholds that rise with the error rate")
            return cls(score, dict(aurocs), settings.cpu(), thresholds.cpu(), dict(goes_by))
        except (ValueError, TypeError, RuntimeError) as error:
            why = error if type(error) is ValueError else "has parts of other types"
            raise UserError(f"the calibration is damaged: it {why}; calibrate again") from error


@torch.no_grad()
def calibrate(
    head: Head,
    features: Tensor,
    prompt_table: Tensor,
    videos: Sequence[Sequence[int]],
    *,
    n_shots: Sequence[int],
    n_ways: Sequence[int] | None = None,
    text_fusion: float = 0.0,
    memory: float = 4e9,
    goes_by: Mapping[str, Any] | None = None,
) -> Calibration | None:
    """Calibrate on classes: their clips are dealt into episodes, as queries of known and of unknown classes.

    Args:
        head: in eval mode.
        features: ``(videos, frames, dim)``.
        prompt_table: ``(n_classes, dim)``.
        videos: of each class, by their indices in the features.
        n_shots: numbers of examples; a class with fewer videos than one more is left out there.
        n_ways: numbers of classes; all from 2 to the number of classes by default.
        text_fusion: the text's share in the predictions.
        memory: of a bank, in bytes.
        goes_by: see :class:`Calibration`.

    Returns:
        None where no two classes have enough videos for any of the numbers.
    """
    player = Player(head, features, prompt_table, videos, text_fusion=text_fusion, memory=memory)
    errors = [step / STEPS for step in range(1, STEPS)]
    settings, known, unknown, aurocs = [], [], [], []
    for n_shot in dict.fromkeys(n_shots):
        classes = [c for c, of_class in enumerate(videos) if len(of_class) > n_shot]
        for n_way in range(2, len(classes) + 1) if n_ways is None else [n for n in n_ways if n <= len(classes)]:
            # Numbers of the settings and not of an order: what is asked for beside it changes nothing.
            rng = np.random.default_rng([n_way, n_shot])
            n_query = min(N_QUERY, min(len(videos[c]) for c in classes) - n_shot)
            of_episodes = deal_classes(classes, n_way, n_query=n_query, n_known=N_KNOWN, rng=rng)
            dealt = make_episodes(videos, of_episodes, n_shot, n_query, rng)
            logits, misfits = player.play(dealt.episodes)
            own = misfits.gather(-1, dealt.episodes["query_labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
            settings.append((n_way, n_shot, len(classes)))
            known.append(class_threshold(own[dealt.known], dealt.classes[dealt.known], errors))
            unknown.append((logits[~dealt.known].double(), dealt.classes[~dealt.known]))
            if not dealt.known.all():
                aurocs.append(aurocs_of(logits[dealt.known], logits[~dealt.known]))
    if not settings:
        return None
    means = {name: sum(a[name] for a in aurocs) / len(aurocs) for name in SCORES} if aurocs else {}
    score = best_score(means) if means else next(iter(SCORES))
    of_unknown = [class_threshold(SCORES[score](logits), of, errors) for logits, of in unknown]
    thresholds = torch.stack((torch.stack(known), torch.stack(of_unknown)), 1)
    return Calibration(score, means, torch.tensor(settings), thresholds, dict(goes_by or {}))
