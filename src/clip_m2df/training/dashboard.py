"""Dashboard: what a training shows beside its numbers, on W&B, TensorBoard or in a folder."""

from __future__ import annotations

import itertools
import os
import subprocess
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from clip_m2df.__about__ import __version__
from clip_m2df.episodes.features import EvaluationTable
from clip_m2df.errors import UserError
from clip_m2df.evaluation.evidence import (
    HardEpisode,
    Played,
    QueryEvidence,
    Reliabilities,
    ValidationEvidence,
    query_evidence,
    reliability_columns,
)
from clip_m2df.evaluation.figures import validation_pictures
from clip_m2df.files import whole_file
from clip_m2df.nn.m2df import has_stages
from clip_m2df.training import wandb_run

T = TypeVar("T")


# Pixels of a frame's side, at most: what pictures show is smaller still.
THUMBNAIL = 48


# Videos whose small frames are kept from one validation to the next.
MOST_KEPT = 200


class Dashboard(lightning.Callback):
    """Gives the trainer's loggers the whole configuration of a training, and pictures of each validation.

    W&B gets images and tables, TensorBoard images; with other loggers, or none, the pictures are PNG files in
    ``<run folder>/figures/step-000123``. The W&B run is closed at the end, and also where an exception ends the
    training, so that its log is whole.

    Args:
        figures: whether to draw pictures.
        episodes: how many of a validation's hardest episodes they show.
        upload_best: give the best checkpoint to W&B at the end, as an artifact.

    Attributes:
        config: what the run was configured with, in nested plain types.

    Raises:
        UserError: ``episodes`` below 1; in ``setup``, ``upload_best`` without a W&B logger.
    """

    def __init__(self, figures: bool = True, episodes: int = 4, upload_best: bool = False) -> None:
        if episodes < 1:
            raise UserError(f"dashboard.episodes is {episodes}; give at least 1, or set dashboard.figures to false")
        self.figures = figures
        self.episodes = episodes
        self.upload_best = upload_best
        self.config: Mapping[str, Any] = {}
        self._seen = 0
        self._class_names: list[str] = []
        self._hardest: list[_Candidate] = []
        self._columns: dict[str, list[Tensor]] = {}
        self._frames: dict[str, Tensor] = {}

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse to upload to nowhere."""
        on_wandb = any(isinstance(logger, WandbLogger) for logger in trainer.loggers)  # on any rank
        if stage == "fit" and self.upload_best and not _is_trial(trainer) and not on_wandb:
            raise UserError(
                "dashboard.upload_best gives the best checkpoint to W&B, but the trainer has no WandbLogger: layer"
                " --config recipes/wandb_offline.yaml, or leave it out"
            )

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Tell the loggers what is run, and keep the id of the W&B run."""
        if not trainer.is_global_zero or _is_trial(trainer):
            return
        manifest = getattr(trainer.datamodule, "manifest", None)  # type: ignore[attr-defined]
        record = {
            **self.config,
            "version": __version__,
            "git_revision": _git_revision(),
            "manifest_digest": None if manifest is None else manifest.digest,
        }
        for logger in trainer.loggers:
            logger.log_hyperparams(record)
        for wandb_logger in _wandb_loggers(trainer)[:1]:
            wandb_run.note_run(wandb_logger, Path(trainer.default_root_dir))

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Upload the best checkpoint, if wanted."""
        if not (self.upload_best and trainer.is_global_zero) or _is_trial(trainer):
            return
        best = next((path for c in trainer.checkpoint_callbacks if (path := getattr(c, "best_model_path", ""))), None)
        if best is None:
            warnings.warn("there is no best checkpoint to upload: no validation was made", stacklevel=2)
            return
        for logger in _wandb_loggers(trainer):
            wandb_run.upload(logger, best)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Close the W&B run: what it had not written yet would be lost with the process."""
        wandb_run.close_runs(_wandb_loggers(trainer), exit_code=1)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Close the W&B run of a training."""
        if stage == "fit":
            loggers = _wandb_loggers(trainer)
            for logger in loggers:
                logger.finalize("success")  # with its own uploads, for which Lightning's turn comes too late
            wandb_run.close_runs(loggers, exit_code=0)

    # ------------------------------------------------------------------------------------ at a validation

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start anew."""
        self._forget()

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the reliabilities of the batch, and its episodes that are among the hardest so far."""
        if not self._draws(trainer) or not isinstance(outputs, Played):
            return
        labels = batch["query_labels"]
        logits = outputs.output.logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        losses = losses.nan_to_num(torch.inf, posinf=torch.inf)  # of a training that came apart
        for name, column in reliability_columns(outputs.output).items():
            self._columns.setdefault(name, []).append(column)
        hardest, rows = losses.mean(1).topk(min(self.episodes, len(labels)))
        for loss, row in zip(hardest.tolist(), rows.tolist(), strict=True):
            if len(self._hardest) < self.episodes or loss > self._hardest[-1].loss:
                # Without a number of its own, an episode has that of its turn: ranks take turns.
                turn = (self._seen + row) * trainer.world_size + trainer.global_rank
                number = int(batch["numbers"][row]) if "numbers" in batch else turn
                self._hardest.append(_Candidate.take(row, loss, number, losses, batch, outputs))
                self._hardest = sorted(self._hardest, key=_Candidate.order)[: self.episodes]
        self._class_names = list(batch["class_names"])
        self._seen += len(labels)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw, and give the pictures to the loggers."""
        if not self._draws(trainer):
            return
        # First which episodes, then what is shown of those alone: frames are much to send.
        orders = sorted(itertools.chain(*_of_ranks(trainer, [candidate.order() for candidate in self._hardest])))
        winners = [candidate for candidate in self._hardest if candidate.order() in orders[: self.episodes]]
        shown = [(c.order(), self._show(c, trainer, pl_module, with_evidence=c.order() == orders[0])) for c in winners]
        columns = {name: torch.cat(parts) for name, parts in self._columns.items()}
        found = _of_ranks(trainer, (shown, columns))
        if trainer.is_global_zero and orders:
            evidence = ValidationEvidence(
                class_names=self._class_names,
                confusion=cast(Tensor, pl_module.confusion).cpu(),
                hardest=[episode for _, episode in sorted(itertools.chain(*(s for s, _ in found)), key=lambda s: s[0])],
                reliabilities=Reliabilities.of({n: torch.cat([c[n] for _, c in found if n in c]) for n in columns}),
            )
            try:
                self._give(trainer, evidence)
            except Exception as error:  # a full disk, say: the training itself is worth more
                said = f"the pictures of a validation can't be given: {type(error).__name__}: {error}"
                warnings.warn(said, stacklevel=2)
        self._forget()

    def _forget(self) -> None:
        self._seen = 0
        self._hardest, self._columns = [], {}
        if len(self._frames) > MOST_KEPT:
            self._frames.clear()

    def _draws(self, trainer: lightning.Trainer) -> bool:
        return self.figures and trainer.state.fn == "fit" and not trainer.sanity_checking and not _is_trial(trainer)

    def _show(
        self, candidate: _Candidate, trainer: lightning.Trainer, pl_module: Any, *, with_evidence: bool
    ) -> HardEpisode:
        support: Tensor | None = candidate.support
        query: Tensor | None = candidate.query
        if candidate.support.dtype != torch.uint8:  # places in a table of videos
            support, query = self._read(trainer, candidate.support), self._read(trainer, candidate.query)
        scores = candidate.scores.cpu()
        rivals = scores.scatter(-1, candidate.labels.unsqueeze(-1), -torch.inf).argmax(-1)
        episode = HardEpisode(
            number=candidate.number,
            class_names=candidate.class_names,
            labels=candidate.labels.tolist(),
            predicted=scores.argmax(-1).tolist(),
            rivals=rivals.tolist(),
            losses=candidate.losses.tolist(),
            support=support,
            query=query,
        )
        head = pl_module.model.head
        if not with_evidence or not has_stages(head):
            return episode
        q = episode.hardest
        support_features, prompts = candidate.features[0], candidate.prompts
        pair = torch.tensor([episode.labels[q], episode.rivals[q]], device=prompts.device)
        support_prompts = prompts[pair].unsqueeze(-2).expand(*support_features[pair].shape[:-2], -1)
        with trainer.precision_plugin.val_step_context():
            evidence: QueryEvidence = query_evidence(
                head,
                head.prototype(head.fuse(support_features[pair], support_prompts)),
                candidate.features[1][q],
                prompts,
                None if candidate.draws is None else candidate.draws[q : q + 1],
            )
        return episode._replace(evidence=evidence)

    def _read(self, trainer: lightning.Trainer, places: Tensor) -> Tensor | None:
        """Small frames of videos; None if one can't be read, or is not known."""
        table = getattr(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders, "dataset", None)
        if not isinstance(table, EvaluationTable):
            return None
        paths = [table.videos[place].path for place in places.tolist()]
        try:
            for path in paths:
                if path not in self._frames:  # hard episodes have videos in common, and so have validations
                    self._frames[path] = _thumbnails(table.dataset.reader.read(path)[0])
        except (UserError, OSError):  # a damaged cache too
            return None
        return torch.stack([self._frames[path] for path in paths])

    def _give(self, trainer: lightning.Trainer, evidence: ValidationEvidence) -> None:
        pictures = validation_pictures(evidence)
        shown = False
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                wandb_run.log_validation(logger, evidence, pictures, trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                for name, picture in pictures.items():
                    array = np.asarray(picture)
                    logger.experiment.add_image(f"val/{name}", array, trainer.global_step, dataformats="HWC")
            else:
                continue
            shown = True
        if not shown:
            folder = Path(trainer.default_root_dir) / "figures" / f"step-{trainer.global_step:06d}"
            for name, picture in pictures.items():
                with whole_file(folder / f"{name}.png") as draft:
                    picture.save(draft, "PNG", compress_level=1)  # three times as fast


class _Candidate(NamedTuple):
    """An episode that may be among the hardest: its row of a batch."""

    loss: float
    number: int
    class_names: list[str]
    labels: Tensor
    losses: Tensor
    scores: Tensor
    support: Tensor
    query: Tensor
    features: tuple[Tensor, Tensor]
    prompts: Tensor
    draws: Tensor | None

    def order(self) -> tuple[float, int]:
        """Its place among others: the hardest first."""
        return -self.loss, self.number

    @classmethod
    def take(cls, row: int, loss: float, number: int, losses: Tensor, batch: Any, played: Played) -> _Candidate:
        """Copy what is needed of a row, so that the batch itself can go."""
        # The first shot alone, and frames small.
        support, query = batch["support"][row, :, 0], batch["query"][row]
        if support.dtype == torch.uint8:
            support, query = _thumbnails(support), _thumbnails(query)
        return cls(
            loss=loss,
            number=number,
            class_names=[batch["class_names"][c] for c in batch["class_indices"][row].tolist()],
            labels=batch["query_labels"][row].cpu(),
            losses=losses[row].cpu(),
            scores=played.scores[row].float(),
            support=support.cpu(),
            query=query.cpu(),
            features=(played.support[row].clone(), played.query[row].clone()),
            prompts=played.prompts[row].clone(),
            draws=batch["draws"][row].clone() if "draws" in batch else None,
        )


def _thumbnails(clips: Tensor) -> Tensor:
    """uint8 frames ``(…, 3, height, width)``, made small."""
    height, width = clips.shape[-2:]
    if max(height, width) <= THUMBNAIL:
        return clips.clone()
    small = F.interpolate(clips.flatten(0, -4).float(), (THUMBNAIL, THUMBNAIL), mode="area")
    return small.round().to(torch.uint8).view(*clips.shape[:-2], THUMBNAIL, THUMBNAIL)


def _of_ranks(trainer: lightning.Trainer, mine: T) -> list[T]:
    """What each rank has, in the order of ranks."""
    if trainer.world_size == 1:
        return [mine]
    found = [mine] * trainer.world_size
    torch.distributed.all_gather_object(found, mine)
    return found


def _wandb_loggers(trainer: lightning.Trainer) -> list[WandbLogger]:
    """Those of the process that logs."""
    return [x for x in trainer.loggers if isinstance(x, WandbLogger)] if trainer.is_global_zero else []


def _is_trial(trainer: lightning.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _git_revision() -> str | None:
    """The commit that is checked out here, if one is."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True, cwd=os.getcwd())
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None
