"""What is counted over episodes, as torchmetrics metrics.

What is counted is kept in integers, so that sums over ranks are exact: any number of ranks gives the same accuracy, bit
for bit. No state is written in place: what a validation under inference mode left could not be outside of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric

from clip_m2df.episode import Labels
from clip_m2df.evaluation.open_set import MEASURES, SCORES, OpenSet, OpenSetCurve
from clip_m2df.nn.head import HeadOutput

# Two-sided 95 % of a normal distribution, as the field reports it.
Z_95 = 1.96


class EpisodeAccuracy(Metric):
    """Mean accuracy over episodes with its 95 % interval, ``1.96 σ / √n`` over the per-episode accuracies.

    σ is the population's, as in the published evaluations. All episodes have the same number of queries.
    """

    full_state_update = False
    correct: Tensor
    correct_squared: Tensor
    episodes: Tensor
    n_queries: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("correct", "correct_squared", "episodes"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        # The largest, since a rank without episodes has seen none.
        self.add_state("n_queries", torch.zeros((), dtype=torch.long), dist_reduce_fx="max")

    def update(self, correct: Tensor) -> None:
        """Count episodes.

        Args:
            correct: bool ``(episodes, n_queries)``, which queries were classified rightly.

        Raises:
            ValueError: episodes of another number of queries than before.
        """
        n_queries = correct.shape[-1]
        if self.n_queries not in (0, n_queries):
            raise ValueError(f"episodes of {n_queries} queries after episodes of {int(self.n_queries)}")
        counts = correct.long().sum(-1)
        self.correct = self.correct + counts.sum()
        self.correct_squared = self.correct_squared + counts.square().sum()
        self.episodes = self.episodes + counts.numel()
        self.n_queries = torch.full_like(self.n_queries, n_queries)

    def compute(self) -> dict[str, Tensor]:
        """Float64 ``accuracy`` and ``interval`` (the half-width), both shares of 1; not a number without episodes."""
        n, q = int(self.episodes), int(self.n_queries)
        if n == 0:
            return {name: torch.tensor(math.nan, dtype=torch.float64) for name in ("accuracy", "interval")}
        # Exact integers until the last division: n Σc² − (Σc)² is n² times the variance of the counts.
        scatter = n * int(self.correct_squared) - int(self.correct) ** 2
        interval = Z_95 * math.sqrt(scatter) / n / q / math.sqrt(n)
        values = {"accuracy": int(self.correct) / (n * q), "interval": interval}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


class Confusion(Metric):
    """Queries by their own class and by the one that was predicted.

    torchmetrics' own wants to know the number of classes beforehand.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros((0, 0), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, classes: Tensor, predicted: Tensor, n_classes: int) -> None:
        """Count queries.

        Args:
            classes: int64, any shape, the class of each.
            predicted: the same, the class that was predicted.
            n_classes: how many there are.
        """
        counts = (classes * n_classes + predicted).flatten().bincount(minlength=n_classes**2).view(n_classes, n_classes)
        self.counts = self.counts + counts if self.counts.numel() else counts

    def compute(self) -> Tensor:
        """int64 ``(n_classes, n_classes)``."""
        return self.counts


class ClassResult(NamedTuple):
    """How the queries of a class were classified.

    Attributes:
        name: of the class.
        counts: of queries, by the class that was predicted.
        queries: of the class.
        correct: of them, those that were recognised.
        taken_for: the class that the others were most often taken for, or "".
        taken: how often.
    """

    name: str
    counts: list[int]
    queries: int
    correct: int
    taken_for: str
    taken: int

    @property
    def accuracy(self) -> float:
        """A share of 1; 0 without queries."""
        return self.correct / max(self.queries, 1)


def class_results(class_names: Sequence[str], confusion: Tensor) -> list[ClassResult]:
    """Read a confusion matrix class by class.

    Args:
        class_names: in its order.
        confusion: int64 ``(n_classes, n_classes)``, queries by their own class and by the predicted one.
    """
    results = []
    for c, (name, counts) in enumerate(zip(class_names, confusion.tolist(), strict=True)):
        wrong = [*counts[:c], 0, *counts[c + 1 :]]
        taken = max(wrong)
        taken_for = class_names[wrong.index(taken)] if taken else ""
        results.append(ClassResult(name, counts, sum(counts), counts[c], taken_for, taken))
    return results


class Mean(Metric):
    """Mean of a number over episodes, of at most 1e10 in sum.

    Note: counted in 2⁻²⁸ths, so that the order in which episodes come, and the number of ranks, changes no bit.
    """

    full_state_update = False
    scale = 2.0**28
    total: Tensor
    episodes: Tensor
    undefined: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "episodes", "undefined"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, mean: Tensor, episodes: int) -> None:
        """Count the mean of some episodes.

        Args:
            mean: a scalar.
            episodes: how many it is of.
        """
        value = mean.detach().double() * episodes
        defined = value.abs() < 1e10  # false of what is not a number, too
        self.total = self.total + (torch.where(defined, value, 0.0) * self.scale).round().long()
        self.undefined = self.undefined + ~defined
        self.episodes = self.episodes + episodes

    def compute(self) -> Tensor:
        """Float64; not a number without episodes, or where one had none."""
        mean = self.total.double() / self.scale / self.episodes
        return torch.where(self.undefined > 0, math.nan, mean)


class TwinAccuracy(Metric):
    """The share of queries with a twin in the support, and the accuracy of the queries with one and without.

    A twin is cut from the same video, or one of the same group; where the accuracies differ, a head may go by that.
    """

    full_state_update = False
    queries: Tensor
    correct: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("queries", "correct"):  # of the queries without a twin, and with one
            self.add_state(name, torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, correct: Tensor, twins: Tensor) -> None:
        """Count queries.

        Args:
            correct: bool, any shape, which queries were classified rightly.
            twins: bool, the same, which have a twin.
        """
        kinds = torch.stack((~twins, twins))
        self.queries = self.queries + kinds.flatten(1).sum(1)
        self.correct = self.correct + (kinds & correct).flatten(1).sum(1)

    def compute(self) -> dict[str, Tensor]:
        """Float64 ``twin_share`` and the accuracies, shares of 1; an accuracy of no query is left out."""
        (without, with_twin), correct = self.queries.tolist(), self.correct.tolist()
        values = {"twin_share": with_twin / (without + with_twin) if without + with_twin else math.nan}
        if with_twin:
            values["accuracy_twins"] = correct[1] / with_twin
        if without:
            values["accuracy_without_twins"] = correct[0] / without
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


SHARES = ("pps_accuracy", "local_accuracy", "global_accuracy", "view_agreement", "local_to_global", "global_to_local")
LOSSES = ("total", "match", "distill", "class")
TWINS = ("twin_share", "accuracy_twins", "accuracy_without_twins")
OPEN_SET = tuple(f"{measure}/{score}" for measure in MEASURES for score in SCORES)
# All that a stage can log, after its own name and a slash; heads without views, towers without text, losses that are
# off, videos without groups and episodes without unknown queries leave some out.
NAMES = ("accuracy", "interval", "replaced_videos", *TWINS, *SHARES, *(f"loss/{name}" for name in LOSSES), *OPEN_SET)


class Evaluated(NamedTuple):
    """What a stage counted.

    Attributes:
        numbers: by the names under which they are logged, without the stage.
        confusion: int64 ``(n_classes, n_classes)``, queries by their own and by the predicted class.
        open_set: by score, where there were unknown queries.
    """

    numbers: dict[str, Tensor]
    confusion: Tensor
    open_set: Mapping[str, OpenSetCurve]


class StageMetrics(nn.ModuleDict):
    """The metrics of a stage, by the names under which they are logged (``loss_x`` as ``loss/x``)."""

    def __init__(self) -> None:
        super().__init__(
            {
                "accuracy": EpisodeAccuracy(),
                "confusion": Confusion(),
                "twins": TwinAccuracy(),
                # torchmetrics' own count in float32: exactly, as long as there are less than 16 million queries.
                "replaced_videos": SumMetric(nan_strategy="disable"),
                **{name: MeanMetric(nan_strategy="disable") for name in SHARES},
                **{f"loss_{name}": Mean() for name in LOSSES},
                "open_set": OpenSet(),
            }
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Half precision, as a Trainer's "bf16-true" sets it for all of a model, can't count.
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)  # type: ignore[no-any-return, no-untyped-call]

    def count(
        self,
        output: HeadOutput,
        predicted: Tensor,
        batch: Labels,
        losses: Mapping[str, Tensor],
        *,
        prompts: bool = True,
    ) -> None:
        """Count a batch of episodes.

        Args:
            output: the head's.
            predicted: int64 ``(episodes, n_queries)``, classes as indices in the episode.
            batch: the episodes.
            losses: by name, means over the episodes.
            prompts: whether there were any; without them there is no PPS.
        """
        metrics, labels = cast(dict[str, Any], dict(self.items())), batch["query_labels"]
        metrics["accuracy"].update(predicted == labels)
        if "twins" in batch:
            metrics["twins"].update(predicted == labels, batch["twins"])
        if prompts:
            metrics["pps_accuracy"].update(output.prompt_indices == labels)
        # By the class table of the split.
        own, taken_for = (batch["class_indices"].gather(1, indices) for indices in (labels, predicted))
        metrics["confusion"].update(own, taken_for, len(batch["class_names"]))
        if len(output.views) == 2:
            local, global_ = (view.distances.argmin(-1) for view in output.views.values())
            metrics["local_accuracy"].update(local == labels)
            metrics["global_accuracy"].update(global_ == labels)
            metrics["view_agreement"].update(local == global_)
            metrics["local_to_global"].update(output.distillation.local_to_global)
            metrics["global_to_local"].update(output.distillation.global_to_local)
        if "replaced" in batch:
            metrics["replaced_videos"].update(batch["replaced"])
        for name, value in losses.items():
            metrics[f"loss_{name}"].update(value, len(labels))

    def count_unknown(self, scores: Tensor, labels: Tensor, unknown: Tensor) -> None:
        """Count how a batch of episodes tells its unknown queries from the others.

        Args:
            scores: ``(episodes, n_queries, n_way)``, by which the queries' classes are predicted.
            labels: int64 ``(episodes, n_queries)``, the queries' classes.
            unknown: ``(episodes, n_unknown, n_way)``, the same of the unknown queries.
        """
        cast(OpenSet, self["open_set"]).update(scores, scores.argmax(-1) == labels, unknown)

    def take(self) -> Evaluated:
        """What has been counted since the last time, summed over all ranks; it starts anew."""
        found = Evaluated({}, torch.zeros((0, 0), dtype=torch.long), {})
        for name, metric in cast(dict[str, Any], dict(self.items())).items():
            if metric.update_called:
                value = metric.compute()
                if name == "confusion":
                    found = found._replace(confusion=value)
                else:
                    found.numbers.update(value if isinstance(value, dict) else {name.replace("loss_", "loss/"): value})
                if name == "open_set":
                    found = found._replace(open_set=metric.curves)
            with torch.inference_mode(False):  # what inference mode makes can't be written outside of it
                metric.reset()
        return found
