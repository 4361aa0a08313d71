"""The page of ``clip-m2df test``: how well a model did, on which classes, and where it went wrong."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning
import yaml

from clip_m2df.errors import say
from clip_m2df.evaluation.evidence import Played, ValidationEvidence
from clip_m2df.evaluation.metrics import class_results
from clip_m2df.evaluation.open_set import MEASURES
from clip_m2df.report.page import check_page, write_page
from clip_m2df.training.dashboard import EvidenceCollector
from clip_m2df.training.module import CLIPM2DF

# Of the hardest, that are shown.
MOST_EPISODES = 4


def evaluation_content(
    config: Mapping[str, Any], numbers: Mapping[str, float], found: ValidationEvidence, chosen: str = ""
) -> dict[str, object]:
    """What the template ``evaluation.html.j2`` asks for.

    Args:
        config: what the test was configured with, in nested plain types.
        numbers: what was measured, by its name without ``test/``.
        found: of the test's classes, whose names are those of the manifest, and of its hardest episodes.
        chosen: the score by which val tells unknown queries, where the model keeps it.
    """
    queries = int(found.confusion.sum())
    return {
        "title": "Test report",
        "config": config,
        "yaml": yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
        "numbers": numbers,
        "n_queries": queries,
        # All have as many queries.
        "n_episodes": queries // len(found.hardest[0].labels) if found.hardest else None,
        "chosen": chosen,
        "open_set": [
            (score, [numbers[f"{measure}/{score}"] for measure in MEASURES], curve.points.tolist())
            for score, curve in found.open_set.items()
        ],
        "classes": class_results(found.class_names, found.confusion),
        "episodes": found.hardest,
    }


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
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keep the episodes that are among the hardest so far."""
        if isinstance(outputs, Played):
            self._collector.add(trainer, batch, outputs)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Gather what all ranks have, and write the page."""
        model = cast(CLIPM2DF, pl_module)
        found = self._collector.gather(trainer, model)
        if not trainer.is_global_zero or found is None or model.evaluated is None:
            return
        numbers = {name: float(value) for name, value in model.evaluated.numbers.items() if not math.isnan(value)}
        # By their labels, as in the tables.
        class_names = trainer.datamodule.manifest.split("test").class_names  # type: ignore[attr-defined]
        chosen = model.calibration.score if model.calibration is not None and model.calibration.aurocs else ""
        content = evaluation_content(self.config, numbers, found._replace(class_names=class_names), chosen)
        write_page(self.path, "evaluation.html.j2", content)
        say(f"the report is {self.path}")
