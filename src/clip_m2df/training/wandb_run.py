"""What Weights & Biases gets of a training, and which of its runs the training is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from clip_m2df.evaluation.evidence import HardEpisode, ValidationEvidence
from clip_m2df.evaluation.figures import strip
from clip_m2df.evaluation.metrics import class_results
from clip_m2df.files import write_text
from clip_m2df.training.checkpoints import read_checkpoint

if TYPE_CHECKING:
    from PIL.Image import Image

# In the run folder: the id of its W&B run.
ID_FILE = "wandb_id"
# Pixels of a frame's side in the table of episodes.
SIDE = 48


def save_run_id(logger: WandbLogger, folder: Path) -> None:
    """Write the id of a W&B run into its run folder."""
    write_text(folder / ID_FILE, "id of the W&B run", f"{logger.experiment.id}\n")


def resume_run(loggers: Any, folder: Path) -> None:
    """Let a training that is resumed log to the W&B run of its first start, unless the configuration names one.

    Args:
        loggers: the trainer's option, one or a list. The loggers are changed, not the configuration, which others may
            start from.
        folder: of the run.
    """
    file = folder / ID_FILE
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, WandbLogger) and not logger._wandb_init.get("id") and file.is_file():
            logger._wandb_init["id"] = logger._id = file.read_text(encoding="utf-8", errors="replace").strip() or None


def close_runs(loggers: Iterable[WandbLogger], exit_code: int) -> None:
    """Close runs, so that all that was logged is written; a test by the same trainer goes on with them."""
    for logger in loggers:
        run = logger._experiment  # asked for by its public name, one would be started
        if run is not None:
            run.finish(exit_code=exit_code)
            logger._wandb_init["id"], logger._experiment = run.id, None


def upload(logger: WandbLogger, checkpoint: str) -> None:
    """Give a run its best checkpoint, as an artifact ``best-<run>``."""
    import wandb

    step = read_checkpoint(checkpoint, mmap=True)["global_step"]
    artifact = wandb.Artifact(f"best-{logger.experiment.id}", "model", metadata={"step": step})
    artifact.add_file(checkpoint, name="best.ckpt")
    logger.experiment.log_artifact(artifact, aliases=["best"])


def log_validation(logger: WandbLogger, evidence: ValidationEvidence, pictures: Mapping[str, Image], step: int) -> None:
    """Log a validation: images, and tables and histograms where W&B draws itself.

    Args:
        logger: whose run.
        evidence: of the validation.
        pictures: by name.
        step: optimiser steps so far.
    """
    import wandb

    log: dict[str, Any] = {}
    for name, picture in pictures.items():
        # Those that are all video frames are quicker and smaller as JPEG.
        log[f"val/{name}"] = wandb.Image(picture, file_type="jpg" if name.startswith("hardest_episode") else "png")
    for kind, by_view in evidence.reliabilities.confidences.items():
        for view, column in by_view.items():
            log[f"val/{kind}_confidence/{view}"] = wandb.Histogram(column.tolist())
    results = class_results(evidence.class_names, evidence.confusion) if evidence.confusion.numel() else []
    rows = [[result.name, result.accuracy, result.queries] for result in results if result.queries]
    log["val/class_accuracies"] = wandb.Table(columns=["class", "accuracy", "queries"], data=rows)
    log["val/hardest_episodes"] = _episode_table(evidence.hardest)
    logger.experiment.log(log | {"trainer/global_step": step})


def _episode_table(hardest: Sequence[HardEpisode]) -> Any:
    """A row a query, with the frames of it, and of the first shots of its class and of the one it was taken for."""
    import wandb

    @cache  # videos of the support are in several rows
    def image(clip: Tensor | None) -> Any:
        return None if clip is None else wandb.Image(strip(clip, SIDE), file_type="jpg")

    columns: list[str | int] = ["rank", "episode", "cross-entropy", "class", "predicted"]
    columns += ["query", "support of class", "support of predicted"]
    rows = [
        [rank, episode.number, query.loss, *query.class_names, *map(image, query.clips)]
        for rank, episode in enumerate(hardest, 1)
        for query in episode.queries()
    ]
    return wandb.Table(columns=columns, data=rows)
