"""Dashboard: what a training shows beside its numbers, on W&B, TensorBoard or in a folder."""

from __future__ import annotations

import itertools
import subprocess
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from clip_m2df.__about__ import __version__
from clip_m2df.episode import TableEpisodes, VideoTable, of_all_ranks
from clip_m2df.errors import UserError, require
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
from clip_m2df.training import wandb_run
from clip_m2df.training.module import CLIPM2DF

# Pixels of a frame's side, at most: what pictures show is smaller still.
SIDE = 48
# Videos whose small frames are kept from one evaluation to the next.
MOST_KEPT = 200


class EvidenceCollector:
    """Collects what is shown of an evaluation beside its numbers: reliabilities of views, and its hardest episodes.

    Args:
        episodes: how many of the hardest.
    """

    def __init__(self, episodes: int) -> None:
        self.episodes = episodes
        self._frames: dict[str, Tensor] = {}
        self.start()

    def start(self) -> None:
        """Start anew."""
        self._seen = 0
        self._class_names: list[str] = []
        self._hardest: list[_Candidate] = []
        self._columns: dict[str, list[Tensor]] = {}
        if len(self._frames) > MOST_KEPT:
            self._frames.clear()

    def add(self, trainer: lightning.Trainer, batch: Any, played: Played) -> None:
        """Keep the reliabilities of a batch, and its episodes that are among the hardest so far."""
        labels = played.episode["query_labels"]
        logits = played.output.logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        losses = losses.nan_to_num(torch.inf, posinf=torch.inf).cpu().double()  # inf: of a training that diverged
        for name, column in reliability_columns(played.output).items():
            self._columns.setdefault(name, []).append(column)
        hardest, rows = losses.mean(1).topk(min(self.episodes, len(labels)))
        for loss, row in zip(hardest.tolist(), rows.tolist(), strict=True):
            if len(self._hardest) < self.episodes or loss > self._hardest[-1].shown.loss:
                # Without a number of its own, an episode has that of its turn: ranks take turns.
                turn = (self._seen + row) * trainer.world_size + trainer.global_rank
                number = int(batch.numbers[row]) if isinstance(batch, TableEpisodes) else turn
                self._hardest.append(_Candidate.of(row, number, losses, batch, played))
                self._hardest = sorted(self._hardest, key=_Candidate.order)[: self.episodes]
        self._class_names = list(played.episode["class_names"])
        self._seen += len(labels)

    def gather(self, trainer: lightning.Trainer, model: CLIPM2DF) -> ValidationEvidence | None:
        """What all ranks have collected; to be called on all of them. None where nothing was played."""
        # First which episodes, then what is shown of those alone: frames are much to send.
        of_ranks = of_all_ranks([candidate.order() for candidate in self._hardest], trainer.world_size)
        orders = sorted(itertools.chain(*of_ranks))
        winners = [candidate for candidate in self._hardest if candidate.order() in orders[: self.episodes]]
        shown = [(c.order(), self._show(c, trainer, model, with_evidence=c.order() == orders[0])) for c in winners]
        columns = {name: torch.cat(parts) for name, parts in self._columns.items()}
        found = of_all_ranks((shown, columns), trainer.world_size)
        class_names = self._class_names
        self.start()
        if not orders or model.evaluated is None:
            return None
        return ValidationEvidence(
            class_names=class_names,
            confusion=model.evaluated.confusion.cpu(),
            hardest=[episode for _, episode in sorted(itertools.chain(*(s for s, _ in found)), key=lambda s: s[0])],
            reliabilities=Reliabilities.of({n: torch.cat([c[n] for _, c in found if n in c]) for n in columns}),
            open_set=model.evaluated.open_set,
        )

    def _show(
        self, candidate: _Candidate, trainer: lightning.Trainer, model: CLIPM2DF, *, with_evidence: bool
    ) -> HardEpisode:
        hard, episode = candidate.shown, candidate.episode
        if candidate.table is not None:
            videos = candidate.table.episodes([hard.number])
            support, query = videos["support"][0, :, 0], videos["query"][0]
            hard = hard._replace(support=self._read(candidate.table, support), query=self._read(candidate.table, query))
        if not (with_evidence and candidate.has_views):
            return hard
        head, prompts, q = model.model.head, candidate.prompts, hard.hardest
        pair = [hard.labels[q], hard.rivals[q]]
        draws = episode["draws"][q : q + 1] if "draws" in episode else None
        with trainer.precision_plugin.val_step_context(), torch.no_grad():
            prototypes = head.prototypes(episode["support"][pair], prompts[pair])
            evidence: QueryEvidence = query_evidence(head, prototypes, pair, episode["query"][q], prompts, draws)
        return hard._replace(evidence=evidence)

    def _read(self, table: VideoTable, indices: Tensor) -> Tensor | None:
        """Small frames of videos; None if one can't be read."""
        names = {index: table.identity(index) for index in indices.tolist()}
        try:
            for index, name in names.items():
                if name not in self._frames:  # hard episodes have videos in common, and so have evaluations
                    self._frames[name] = _small(table.read(index))
        except (UserError, OSError):  # a damaged cache too
            return None
        return torch.stack([self._frames[name] for name in names.values()])


class Dashboard(lightning.Callback):
    """Gives the trainer's loggers pictures of each validation, and what a training depends on beside its options.

    W&B gets images and tables, TensorBoard images; with other loggers, or none, the pictures are PNG files in
    ``<run folder>/figures/step-000123``. The W&B run is closed at the end, and also where an exception ends the
    training, so that its log is whole.

    Args:
        figures: whether to draw pictures.
        episodes: how many of a validation's hardest episodes they show.
        upload_best: give the best checkpoint to W&B at the end, as an artifact.

    Raises:
        UserError: ``episodes`` below 1; in ``setup``, ``upload_best`` without a W&B logger.
    """

    def __init__(self, figures: bool = True, episodes: int = 4, upload_best: bool = False) -> None:
        require(least=1, **{"dashboard.episodes": episodes})
        self.figures = figures
        self.episodes = episodes
        self.upload_best = upload_best
        self._collector = EvidenceCollector(episodes)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse to upload to nowhere."""
        on_wandb = any(isinstance(logger, WandbLogger) for logger in trainer.loggers)  # on any rank
        if stage == "fit" and self.upload_best and not _is_trial(trainer) and not on_wandb:
            raise UserError(
                "dashboard.upload_best gives the best checkpoint to W&B, but the trainer has no WandbLogger: layer"
                " --config recipes/wandb_offline.yaml, or leave it out"
            )

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Tell the loggers what the training depends on beside its options, and keep the id of the W&B run."""
        if not trainer.is_global_zero or _is_trial(trainer):
            return
        digest = getattr(getattr(trainer.datamodule, "manifest", None), "digest", None)  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            logger.log_hyperparams({"version": __version__, "git_revision": git_revision(), "manifest_digest": digest})
        for wandb_logger in _wandb_loggers(trainer)[:1]:
            wandb_run.save_run_id(wandb_logger, Path(trainer.default_root_dir))

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

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start anew."""
        self._collector.start()

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Collect what the pictures show."""
        if self._draws(trainer) and isinstance(outputs, Played):
            self._collector.add(trainer, batch, outputs)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw, and give the pictures to the loggers."""
        if not self._draws(trainer) or not isinstance(pl_module, CLIPM2DF):
            return
        evidence = self._collector.gather(trainer, pl_module)
        if trainer.is_global_zero and evidence is not None:
            try:
                self._give(trainer, evidence)
            except Exception as error:  # a full disk, say: the training itself is worth more
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(f"the pictures of a validation can't be given: {reason}", stacklevel=2)

    def _draws(self, trainer: lightning.Trainer) -> bool:
        return self.figures and trainer.state.fn == "fit" and not trainer.sanity_checking and not _is_trial(trainer)

    def _give(self, trainer: lightning.Trainer, evidence: ValidationEvidence) -> None:
        pictures = validation_pictures(evidence)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                wandb_run.log_validation(logger, evidence, pictures, trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                for name, picture in pictures.items():
                    array = np.asarray(picture)
                    logger.experiment.add_image(f"val/{name}", array, trainer.global_step, dataformats="HWC")
        if not any(isinstance(logger, WandbLogger | TensorBoardLogger) for logger in trainer.loggers):
            folder = Path(trainer.default_root_dir) / "figures" / f"step-{trainer.global_step:06d}"
            for name, picture in pictures.items():
                with whole_file(folder / f"{name}.png", "picture") as draft:
                    picture.save(draft, "PNG", compress_level=1)  # three times as fast


class _Candidate(NamedTuple):
    """An episode that may be among the hardest.

    Attributes:
        shown: what is shown of it; frames of a table's videos, and evidence, only if it is among the hardest.
        episode: its row of the batch, as features, without the batch's axis.
        prompts: ``(n_way, dim)``.
        has_views: whether the head has any.
        table: of its videos; None for a batch of frames.
    """

    shown: HardEpisode
    episode: dict[str, Any]
    prompts: Tensor
    has_views: bool
    table: VideoTable | None

    def order(self) -> tuple[float, int]:
        """Where it stands among others: the hardest first."""
        return -self.shown.loss, self.shown.number

    @classmethod
    def of(cls, row: int, number: int, losses: Tensor, batch: Any, played: Played) -> _Candidate:
        """Copy what is needed of a row, so that the batch itself can go."""
        episode: dict[str, Any] = {
            key: value[row].clone() if isinstance(value, Tensor) else value for key, value in played.episode.items()
        }
        labels, scores = episode["query_labels"], played.scores[row].float()
        shown = HardEpisode(
            number=number,
            class_names=[episode["class_names"][c] for c in episode["class_indices"].tolist()],
            labels=labels.tolist(),
            predicted=scores.argmax(-1).tolist(),
            rivals=scores.scatter(-1, labels.unsqueeze(-1), -torch.inf).argmax(-1).tolist(),
            losses=losses[row].tolist(),
        )
        table = batch.table if isinstance(batch, TableEpisodes) else None
        if table is None and batch["support"].dtype == torch.uint8:
            support, query = _small(batch["support"][row, :, 0]).cpu(), _small(batch["query"][row]).cpu()
            shown = shown._replace(support=support, query=query)
        return cls(shown, episode, played.prompts[row].clone(), bool(played.output.views), table)


def _small(clips: Tensor) -> Tensor:
    """uint8 frames ``(…, 3, height, width)``, made small."""
    if max(clips.shape[-2:]) <= SIDE:
        return clips.clone()
    small = F.interpolate(clips.flatten(0, -4).float(), (SIDE, SIDE), mode="area")
    return small.round().to(torch.uint8).view(*clips.shape[:-2], SIDE, SIDE)


def _wandb_loggers(trainer: lightning.Trainer) -> list[WandbLogger]:
    """Those of the process that logs."""
    return [x for x in trainer.loggers if isinstance(x, WandbLogger)] if trainer.is_global_zero else []


def _is_trial(trainer: lightning.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def git_revision() -> str | None:
    """The commit that is checked out in the working directory, if one is."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
