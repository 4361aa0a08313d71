"""All that is counted of one stage: training, validation or test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from clip_m2df.episode import Episode, IndexedEpisode
from clip_m2df.evaluation.metrics import Confusion, EpisodeAccuracy, Mean, Share, Sum
from clip_m2df.nn.head import HeadOutput

SHARES = ("pps_accuracy", "local_accuracy", "global_accuracy", "view_agreement", "local_to_global", "global_to_local")
LOSSES = ("total", "match", "distill", "class")


class StageMetrics(nn.ModuleDict):
    """The metrics of a stage, by the names under which they are logged (``loss_x`` as ``loss/x``)."""

    def __init__(self) -> None:
        metrics: dict[str, nn.Module] = {
            "accuracy": EpisodeAccuracy(),
            "replaced_videos": Sum(),
            "confusion": Confusion(),
        }
        metrics |= {name: Share() for name in SHARES} | {f"loss_{name}": Mean() for name in LOSSES}
        super().__init__(metrics)

    def count(
        self, output: HeadOutput, predicted: Tensor, batch: Episode | IndexedEpisode, losses: Mapping[str, Tensor]
    ) -> None:
        """Count a batch of episodes.

        Args:
            output: what the head said.
            predicted: int64 ``(episodes, n_queries)``, classes as places in the episode.
            batch: the episodes.
            losses: by name, means over the episodes.
        """
        metrics, labels = cast(dict[str, Any], dict(self.items())), batch["query_labels"]
        metrics["accuracy"].update(predicted == labels)
        metrics["pps_accuracy"].update(output.prompt_indices == labels)
        # By the class table of the split.
        own, taken_for = (batch["class_indices"].gather(1, places) for places in (labels, predicted))
        metrics["confusion"].update(own, taken_for, len(batch["class_names"]))
        if len(output.distances) == 2:
            local, global_ = (d.argmin(-1) for d in output.distances.values())
            metrics["local_accuracy"].update(local == labels)
            metrics["global_accuracy"].update(global_ == labels)
            metrics["view_agreement"].update(local == global_)
            metrics["local_to_global"].update(output.distillation.local_to_global)
            metrics["global_to_local"].update(output.distillation.global_to_local)
        if "replaced" in batch:
            metrics["replaced_videos"].update(batch["replaced"])
        for name, value in losses.items():
            metrics[f"loss_{name}"].update(value, len(labels))

    def take(self) -> tuple[dict[str, Tensor], Tensor]:
        """What has been counted since the last time, summed over all ranks; it starts anew.

        Returns:
            The numbers by the name under which they are logged, and the confusion matrix, int64
            ``(n_classes, n_classes)``.
        """
        numbers: dict[str, Tensor] = {}
        confusion = torch.zeros((0, 0), dtype=torch.long)
        for name, metric in cast(dict[str, Any], dict(self.items())).items():
            if metric.update_called:
                value = metric.compute()
                if name == "confusion":
                    confusion = value
                else:
                    numbers |= value if isinstance(value, dict) else {name.replace("loss_", "loss/"): value}
            metric.reset()
        return numbers, confusion
