"""The page of ``clip-m2df test``: how well a model did, on which classes, and where it went wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import lightning
import yaml
from torch import Tensor

from clip_m2df.evaluation.evidence import HardEpisode, Played, QueryEvidence
from clip_m2df.files import plain
from clip_m2df.report.page import alignment_cells, check_page, percent, prompt_rows, shade, strip_picture, write_page
from clip_m2df.training.dashboard import EvidenceCollector
from clip_m2df.training.module import CLIPM2DF

# Of the hardest, that are shown.
MOST_EPISODES = 4
# Queries that are shown of an episode: those of the highest losses.
MOST_QUERIES = 10
MEASURES = {
    "pps_accuracy": "prompts chosen rightly by PPS",
    "local_accuracy": "accuracy of the local view alone",
    "global_accuracy": "accuracy of the global view alone",
    "view_agreement": "queries on which the views agree",
}

_Content: TypeAlias = "dict[str, Any]"


class EvaluationPage(lightning.Callback):
    """Writes the page of a test.

    Args:
        path: the page.
        config: what the test was configured with, in nested plain types.

    Raises:
        UserError: the page could not be written; the same at the end of the test.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        check_page(path)
        self.path = path
        self.config = config
        self._collector = EvidenceCollector(MOST_EPISODES)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start anew."""
        self._collector.start()

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the episodes that are among the hardest so far."""
        if isinstance(outputs, Played):
            self._collector.add(trainer, batch, outputs)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Gather what all ranks have, and write the page."""
        evidence = self._collector.gather(trainer, cast(CLIPM2DF, pl_module))
        if not trainer.is_global_zero or evidence is None:
            return
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        class_names = trainer.datamodule.manifest.split("test").class_names  # type: ignore[attr-defined]
        content = self._content(numbers, class_names, evidence.confusion, evidence.hardest)
        write_page(self.path, "evaluation.html.j2", content)
        print(f"the report is {plain(str(self.path))}")

    def _content(
        self, numbers: dict[str, float], class_names: Sequence[str], confusion: Tensor, hardest: Sequence[HardEpisode]
    ) -> _Content:
        queries = int(confusion.sum())
        episodes = queries // len(hardest[0].labels) if hardest else None  # all have as many
        data, model = self.config["data"], self.config["model"]
        return {
            "title": "Test report",
            "accuracy": percent(numbers.get("test/accuracy")),
            "interval": percent(numbers.get("test/interval")),
            "n_way": data["n_way"],
            "n_shot": data["n_shot"],
            "facts": {
                "checkpoint": str(self.config["ckpt_path"] or "none: nothing is trained"),
                "head": str(model["head"]),
                "backbone": str(model["backbone"]),
                "manifest": str(data["manifest"]),
                "episodes": "-" if episodes is None else f"{episodes:,}",
                "queries": f"{queries:,}",
                "classes": str(len(class_names)),
                "replaced videos": f"{numbers.get('test/replaced_videos', 0):.0f}",
            },
            "measures": [
                (text, value)
                for name, text in MEASURES.items()
                if not math.isnan(value := numbers.get(f"test/{name}", math.nan))
            ],
            "teaching": {
                name: percent(numbers.get(f"test/{name}"))
                for name in ("local_to_global", "global_to_local")
                if f"test/{name}" in numbers
            },
            "classes": _classes(class_names, confusion),
            "class_names": list(class_names),
            "confusion": _shaded(confusion),
            "episodes": [_episode(rank, episode) for rank, episode in enumerate(hardest, 1)],
            "config": yaml.safe_dump(dict(self.config), sort_keys=False, allow_unicode=True),
        }


def _classes(class_names: Sequence[str], confusion: Tensor) -> list[_Content]:
    """A row a class."""
    rows = []
    for c, name in enumerate(class_names):
        queries, correct = int(confusion[c].sum()), int(confusion[c, c])
        wrong = confusion[c].clone()
        wrong[c] = 0
        rows.append(
            {
                "name": name,
                "queries": queries,
                "correct": correct,
                "accuracy": correct / queries if queries else None,
                "taken_for": class_names[int(wrong.argmax())] if wrong.any() else "",
                "taken_share": percent(float(wrong.max()) / queries) if wrong.any() else "",
            }
        )
    return rows


def _shaded(confusion: Tensor) -> list[list[tuple[int, int]]]:
    """The counts, each with the shade of its share in the row."""
    totals = confusion.sum(1).tolist()
    return [
        [(count, shade(count / total if total else 0.0)) for count in row]
        for row, total in zip(confusion.tolist(), totals, strict=True)
    ]


def _episode(rank: int, episode: HardEpisode) -> _Content:
    names = episode.class_names
    order = sorted(range(len(episode.labels)), key=lambda q: -episode.losses[q])[:MOST_QUERIES]
    return {
        "rank": rank,
        "number": episode.number,
        "loss": f"{episode.loss:.2f}",
        "n_right": sum(own == taken for own, taken in zip(episode.labels, episode.predicted, strict=True)),
        "n_queries": len(episode.labels),
        "queries": [
            {
                "loss": f"{episode.losses[q]:.2f}",
                "right": episode.labels[q] == episode.predicted[q],
                "own": names[episode.labels[q]],
                "taken": names[episode.predicted[q]],
                "query": _strip(episode.query, q),
                "own_strip": _strip(episode.support, episode.labels[q]),
                "taken_strip": _strip(episode.support, episode.predicted[q]),
            }
            for q in order
        ],
        "evidence": None if episode.evidence is None else _evidence(rank, episode, episode.evidence),
    }


def _strip(clips: Tensor | None, place: int) -> str | None:
    return None if clips is None else strip_picture(clips[place], most=8)


def _evidence(rank: int, episode: HardEpisode, evidence: QueryEvidence) -> _Content:
    """Of the query of the highest loss: how it was aligned, and what PPS saw in it."""
    q, names = episode.hardest, episode.class_names
    pair = {"its own class": episode.labels[q], "the likeliest other": episode.rivals[q]}
    alignments = [
        {
            "role": role,
            "class_name": names[c],
            "id": f"episode-{rank}-{place}",
            "clip": None if episode.query is None else strip_picture(episode.query[q], upright=True),
            "example": None if episode.support is None else strip_picture(episode.support[c]),
            "maps": alignment_cells(
                {view: maps[place] for view, maps in evidence.alignments.items()},
                {view: of_view[place] for view, of_view in evidence.distances.items()},
            ),
        }
        for place, (role, c) in enumerate(pair.items())
    ]
    chosen = None if evidence.chosen in (None, -1) else names[evidence.chosen]
    return {
        "alignments": alignments,
        "chosen": chosen,
        "prompts": prompt_rows(
            names, evidence.probabilities.tolist(), evidence.frame_scores, evidence.counted, chosen=chosen
        )
        if evidence.chosen is not None
        else [],
    }
