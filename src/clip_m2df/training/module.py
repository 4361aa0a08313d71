"""CLIPM2DF: the LightningModule around :class:`clip_m2df.nn.m2df.M2DF`; steps, metrics, optimiser, schedule."""

import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias, cast, get_args

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from clip_m2df.clip.adapter_files import Kept, adapted_state, peft_files, tower_checksum
from clip_m2df.clip.adapters import add_adapters, check_adapters, merge_adapters
from clip_m2df.clip.backbone import CLIPBackbone, check_options
from clip_m2df.clip.formats import OPENAI, public_source
from clip_m2df.clip.tokenizer import has_tokenizer
from clip_m2df.datasets.feature_tables import FeatureTable
from clip_m2df.datasets.manifest import Manifest
from clip_m2df.episode import Episode, FeatureEpisode, ResizeMode, TableEpisodes, VideoTable
from clip_m2df.errors import UserError, require, some
from clip_m2df.evaluation import conformal
from clip_m2df.evaluation.bank import EpisodeBank, encode_videos
from clip_m2df.evaluation.conformal import Calibration
from clip_m2df.evaluation.evidence import Played
from clip_m2df.evaluation.metrics import NAMES, Evaluated, StageMetrics
from clip_m2df.hub import find_model, is_reading, push_model, read_model, write_model
from clip_m2df.loops import check_same, ends_step, episodes_played, logs_step
from clip_m2df.nn.baselines import build_head, head_class, options_of
from clip_m2df.nn.class_text import Reduction, class_text_loss, fuse_text
from clip_m2df.nn.head import HeadOutput
from clip_m2df.nn.m2df import M2DF
from clip_m2df.nn.prompts import DEFAULT_TEMPLATE, SELECTIONS, Selection
from clip_m2df.nn.weights import (
    check_finite,
    check_weights,
    not_finite,
    published_head,
    published_state,
    published_tower,
)
from clip_m2df.training.build import options_by_name, saved_options
from clip_m2df.training.checkpoints import RunCheckpoint, read_checkpoint
from clip_m2df.weight_files import read_weights

# Options that a person may change from run to run. They stay out of the checkpoint, so that what is asked for wins.
# backbone_options do too, since the towers' description has their effect.
RUN_OPTIONS = ("selection", "text_fusion", "gradient_checkpointing", "bank_memory", "compile", "backbone_options")


# Before the names of the towers' weights.
BACKBONE = "model.backbone."

# Of each batch, in the sanity check before a training: it is to be quick.
SANITY_EPISODES = 2

# Optimiser steps in a row that a gradient scaler (16-mixed) may skip because of their loss, before the training ends.
MOST_SKIPPED = 20

# Where callbacks come from that log no metric which others could monitor.
LOG_NO_MORE = ("lightning.pytorch.callbacks.", "clip_m2df.")

Batch: TypeAlias = Episode | FeatureEpisode | TableEpisodes
# CLIP's weights, as the option ``backbone`` names them, or loaded.
Clip: TypeAlias = str | os.PathLike[str] | CLIPBackbone


class EncodedTable(NamedTuple):
    """The features of a table's videos, and what they depend on.

    Attributes:
        table: of the videos.
        numbers: the episodes whose videos are encoded; none: all videos.
        tower: its weights, and its precision.
        features: ``(videos, frames, dim)``.
    """

    table: VideoTable
    numbers: Sequence[int]
    tower: object
    features: Tensor


class CLIPM2DF(lightning.LightningModule):
    """CLIP-M²DF for a Lightning Trainer (Guo et al., arXiv 2401.08345).

    Takes batches of :class:`clip_m2df.episode.Episode` or :class:`clip_m2df.episode.FeatureEpisode`, from
    :class:`clip_m2df.EpisodeDataModule` or any other data module. Its checkpoints are enough: towers' configuration,
    tokenizer and preprocessing are in them. So are the folders of ``save_pretrained``, which ``push_to_hub`` puts on
    the hub and ``from_pretrained`` loads.

    Args:
        backbone: the towers: a name on the hub or a folder, of any family in transformers' format or of OpenCLIP's; a
            file in OpenAI's layout; ``rn50`` for the public ResNet-50; ``tiny`` for the small CLIP that comes with the
            package; ``features`` for no tower at all, where features come from a table.
        backbone_options: what the weights don't tell, or tell otherwise: ``activation`` (``gelu`` or ``quick_gelu``)
            and ``head_width`` of weights in OpenAI's layout; ``tokenizer``, a file or a folder; ``mean`` and ``std``,
            three numbers each for pixels between 0 and 1; ``image_size``, to which position embeddings are
            interpolated; ``dtype``, what the weights are held in: ``float32``, ``bfloat16`` or ``float16``;
            ``dim``, the width of ``features``.
        head: what scores the queries: ``m2df``; for comparison ``clip_fsar``, ``otam``, ``bi_mhm``,
            ``nearest_prototype``, ``zero_shot``, ``linear_probe`` (for evaluations alone), ``tip_adapter``, ``trx`` or
            ``ts_fsar``; or the class path of another head.
        head_options: options of the head's class; for ``m2df`` those of :class:`clip_m2df.nn.m2df.M2DFHead`.
        template: the prompt, with ``{}`` where the class goes, or a list of such: an ensemble, the mean of their
            normalised embeddings.
        freeze_backbone: train the head alone.
        adapters: train LoRA's adapters in the visual tower in the place of its own weights: a table of ``r`` (16 by
            default), ``alpha`` (twice ``r``), ``target`` (``[q, v]``, of ``q``, ``k``, ``v``, ``o``, ``fc1``, ``fc2``),
            ``layers`` (``all``, or the blocks' numbers from 0) and ``dropout`` (0). Needs peft.
        gradient_checkpointing: compute the tower's activations anew in the backward pass, to save memory.
        bank_memory: GiB that an evaluation may take for fused sequences; with less than all take, some are fused again.
        compile: compile tower and head with ``torch.compile`` for training: the first steps take long, the others less.
        freeze_batch_norm: keep the batch norm of a ResNet tower at its running statistics, in training too.
            Note: the published code does so until its first evaluation only, and changes its model half-way.
            Where it moves, it sees the support of an episode and then its queries, whatever the batch, as in CLIP-FSAR.
        lr: peak learning rate of Adam, for the head.
        backbone_lr: the same for the visual tower, or its adapters; ``lr`` by default.
        weight_decay: Adam's; it is added to the gradient, not decoupled.
        no_decay: parts of names: a parameter whose name has one of them gets no weight decay. ``.bn`` and ``.norm.``
            are CLIP-FSAR's choice: a ResNet's batch norm but for its shortcuts', and the head's layer norm, but not
            a ViT's.
        warmup_steps: optimiser steps over which the learning rate rises linearly.
        warmup_start: the share of the peak at which it starts.
        warmup_offset: optimiser steps by which the warm-up is ahead. CLIP-FSAR's is so by 0.75: it sets the rate anew
            for each of the 4 batches that a step accumulates, and takes the step at that of the last.
        milestones: optimiser steps after which it is multiplied by ``gamma``.
        gamma: see ``milestones``.
        match_weight: λ of the classification loss.
        distill_weight: λ of the distillation term.
        class_weight: λ of the class-text loss over all classes of the split; off at 0, as published.
        loss_reduction: the classification loss is the ``sum`` over the queries of an episode, as published, and the
            class-text loss that over its support and query videos; or each is the ``mean``, as in CLIP-FSAR.
        selection: how PPS picks at evaluation: ``argmax``, ``sample`` or ``expectation``; or ``each``, by which a query
            is fused with the prompt of the very class that it is compared with. By default ``sample`` for a published
            checkpoint and for models saved from one, ``argmax`` for all others.
        text_fusion: β of ``p = p_text^β · p_visual^(1−β)`` at evaluation, the text's probabilities from the class
            logits of the episode's classes; 0 leaves the text out.

    Attributes:
        default_selection: what ``selection`` is where nobody asks for another.
        evaluated: what the last validation or test counted, for callbacks.
        test_name: the name under which a test is logged: that of its stage, where one follows another a name each.
        calibration: by which labels make sets that hold the truth with a promised rate; None before a calibration.

    Raises:
        UserError: an option out of its range, weights that can't be had, a head that does not exist.
    """

    def __init__(
        self,
        backbone: str | dict[str, Any] = "openai/clip-vit-base-patch16",
        backbone_options: dict[str, Any] | None = None,
        head: str = "m2df",
        head_options: dict[str, Any] | None = None,
        template: list[str] | str = DEFAULT_TEMPLATE,
        freeze_backbone: bool = False,
        adapters: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        bank_memory: float = 4.0,
        compile: bool = False,
        freeze_batch_norm: bool = True,
        lr: float = 1e-6,
        backbone_lr: float | None = None,
        weight_decay: float = 0.0,
        no_decay: list[str] | None = None,
        warmup_steps: float = 0,
        warmup_start: float = 0.1,
        warmup_offset: float = 0.0,
        milestones: list[int] | None = None,
        gamma: float = 0.1,
        match_weight: float = 1.0,
        distill_weight: float = 1.0,
        class_weight: float = 0.0,
        loss_reduction: Reduction = "sum",
        selection: Selection | None = None,
        text_fusion: float = 0.0,
    ) -> None:
        given = locals().items()
        options = {name: value for name, value in given if name not in ("self", "__class__", *RUN_OPTIONS)}
        super().__init__()
        require(above=0, lr=lr, backbone_lr=backbone_lr)
        require(least=0, weight_decay=weight_decay, bank_memory=bank_memory)
        require(least=0, warmup_steps=warmup_steps, warmup_offset=warmup_offset)
        require(least=0, most=1, text_fusion=text_fusion)
        require(above=0, most=1, warmup_start=warmup_start)
        if loss_reduction not in (choices := get_args(Reduction)):
            raise UserError(f"loss_reduction: there is no {loss_reduction!r}; there are {', '.join(choices)}")
        parts = [] if no_decay is None else no_decay
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) and part for part in parts):
            raise UserError(f"no_decay is {no_decay!r:.80}; it must be a list of parts of names, such as ['.bn']")
        if adapters is not None:
            options["adapters"] = adapters = check_adapters(adapters)
            if freeze_backbone:
                raise UserError(
                    "freeze_backbone trains the head alone, and adapters train the tower too: set it to false, or leave"
                    " adapters out"
                )
        # What is asked of the head is checked before a tower is loaded, which takes longer.
        own = dict(head_options or {})
        if "selection" in own:
            raise UserError(
                "head_options: selection is an option of the model itself, --model.selection; move it there"
            )
        if "dim" in own:
            raise UserError("head_options: dim follows from the backbone; leave it out")
        self.default_selection: Selection = "argmax"
        self._by_default = selection is None and "selection" in options_of(head_class(head))
        if "selection" in options_of(head_class(head)):
            own["selection"] = selection or self.default_selection
        # Towers draw weights that are then loaded over: the head's own would depend on how many they drew.
        with torch.random.fork_rng(devices=[]):
            if isinstance(backbone, str | os.PathLike):
                tower = CLIPBackbone.load(backbone, **check_options(backbone_options or {}))
            elif backbone_options:
                raise UserError(
                    "backbone_options are of weights that are loaded; a checkpoint has its towers: leave them out"
                )
            else:
                tower = CLIPBackbone.from_description(backbone)
        tower.freeze_batch_norm = freeze_batch_norm
        if adapters is not None:
            add_adapters(tower, adapters)
        if gradient_checkpointing:
            tower.enable_gradient_checkpointing()
        if not tower.image_size:  # labels stand for prompts, and there is nothing to train
            template, freeze_backbone = "{}", True
        self.model = M2DF(tower, build_head(head, {"dim": tower.dim, **own}), template, freeze_backbone)
        for name, value in (("class_weight", class_weight), ("text_fusion", text_fusion)):
            if value:
                self.model.distinct_prompts = True
                changes = (self.model.without_prompts, f"set model.{name} to 0")
                self.model.without_prompts = ", and ".join(filter(None, changes))
        if compile:  # in place, so that the weights keep their names
            tower.visual.compile()
            self.model.head.compile()
        if not class_weight:
            # Without its loss the scale has no gradient, which DDP would wait for.
            self.model.head.scale.requires_grad_(False)

        self.lr = lr
        self.backbone_lr = lr if backbone_lr is None else backbone_lr
        self.weight_decay = weight_decay
        self.no_decay = tuple(parts)
        self.warmup_steps = warmup_steps
        self.warmup_start = warmup_start
        self.warmup_offset = warmup_offset
        self.milestones = sorted(milestones or [])
        self.gamma = gamma
        self.match_weight = match_weight
        self.distill_weight = distill_weight
        self.class_weight = class_weight
        self.loss_reduction: Reduction = loss_reduction
        self.text_fusion = text_fusion
        self.bank_memory = bank_memory
        # The tower's name; its description, of megabytes, goes into checkpoints only, not into logs.
        self.save_hyperparameters(options | {"backbone": self.model.backbone.source})
        # Where the model came from, for messages: its file or folder, or the tower's.
        self.source = self.model.backbone.source
        # How the videos of its training were read, where that is known: frames, resize, resize_mode and sampling.
        self.reading: dict[str, Any] | None = None
        self.evaluated: Evaluated | None = None
        self.test_name = "test"
        self.calibration: Calibration | None = None
        self._draws_seed: int | None = None
        # Whether a batch of the optimiser step under way had a loss that is not finite; steps in a row that had.
        self._broken: Tensor | bool = False
        self._skipped = 0
        # Of tables of videos: what has been encoded at each stage, and what the evaluation under way is played from.
        self._encoded: dict[str, EncodedTable] = {}
        self._bank: EpisodeBank | None = None
        # ModuleDict refuses the name "train", a method of its own.
        self.metrics = nn.ModuleDict({f"{stage}_metrics": StageMetrics() for stage in ("train", "val", "test")})

    # ---------------------------------------------------------------------------------------------- use

    @property
    def resize_mode(self) -> ResizeMode:
        """How frames are resized as images were in the training of the tower."""
        bicubic = cast(CLIPBackbone, self.model.backbone).interpolation == "bicubic"
        return "short_side_bicubic" if bicubic else "short_side"

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the frames that the tower takes; 0 without a tower, for features alone."""
        return self.model.backbone.image_size

    @property
    def bank(self) -> EpisodeBank | None:
        """What the evaluation under way is played from; None between evaluations, and where frames are played."""
        return self._bank

    def setup(self, stage: str) -> None:
        """Take over what a feature table has; refuse, before videos are read, what does not fit together.

        Raises:
            UserError: features of another width or number of frames than the model's; a tower without text under a
                head that needs prompts; another number of frames than the head takes; or a training of a head that
                passes on no gradient.
        """
        if stage == "fit" and not self.model.head.differentiable:
            raise UserError(
                f"the head {self.hparams['head']} fits a model in each episode, and nothing can be trained through it:"
                " measure it by clip-m2df test, or train with another head"
            )
        data = getattr(self._trainer, "datamodule", None)
        self.check_data(data, self.reading)
        table = getattr(data, "table", None)
        if isinstance(table, FeatureTable):
            backbone = cast(CLIPBackbone, self.model.backbone)
            if table.class_embeddings and not self.image_size and backbone.text is None:
                backbone.keep_classes(table.class_embeddings)  # which goes into its checkpoints
            else:
                self.model.take_class_embeddings(table.class_embeddings)
        self.model.check_has_prompts()

    def check_data(self, data: object, reading: Mapping[str, Any] | None) -> None:
        """Refuse data with another number of frames than the head takes, or with features that are not the model's.

        Args:
            data: a data module, which has read its manifest; of other people's nothing is known.
            reading: how the videos of the model's training were read, see :attr:`reading`.

        Raises:
            UserError: says which, and what to give.
        """
        frames = getattr(getattr(data, "reader", None), "frames", None)
        if isinstance(frames, int):  # other people's readers may be anything
            self.model.head.check_frames(frames)
        table = getattr(data, "table", None)
        if not isinstance(table, FeatureTable):
            return
        backbone = cast(CLIPBackbone, self.model.backbone)
        if table.dim != backbone.dim:
            raise UserError(
                f"the features in {table.source} have {table.dim} numbers a frame, and those of the model"
                f" ({self.source}) {backbone.dim}: give a table of its own tower's features, or for another width"
                " model.backbone features"
            )
        frames = table.frames if reading is None else reading["frames"]
        if table.frames != frames:
            raise UserError(
                f"the features in {table.source} are of {table.frames} frames, and the model ({self.source}) was"
                f" trained on {frames}: give a table of as many"
            )

    def forward(self, episode: Episode | FeatureEpisode) -> HeadOutput:
        """Score the queries of a batch of episodes."""
        features = self._features(episode, "test")
        prompts = self.encode_prompts(episode["class_names"])[episode["class_indices"]]
        output: HeadOutput = self.model.head(features["support"], features["query"], prompts, episode.get("draws"))
        return output

    def encode_prompts(self, class_names: Sequence[str]) -> Tensor:
        """The prompt table ``(n_classes, dim)`` of any class names, new ones too.

        Raises:
            UserError: two classes have one prompt, and their scores depend on it.
        """
        manifest = getattr(getattr(self._trainer, "datamodule", None), "manifest", None)
        splits = manifest.splits.values() if isinstance(manifest, Manifest) else ()
        labels = (split.class_names for split in splits if split.class_texts == tuple(class_names))
        return self.model.encode_prompts(class_names, next(labels, None))

    def calibrate(
        self,
        features: Tensor,
        prompt_table: Tensor,
        videos: Sequence[Sequence[int]],
        n_shots: Sequence[int],
        n_ways: Sequence[int] | None = None,
    ) -> Calibration | None:
        """A calibration on classes of which the model knows nothing; the model keeps none of itself.

        Args:
            features: of frames, ``(videos, frames, dim)``.
            prompt_table: ``(n_classes, dim)``.
            videos: of each class, by their indices in the features.
            n_shots: numbers of examples.
            n_ways: numbers of classes; all that there are by default.

        Returns:
            None where the classes have too few videos for any of the numbers.

        Raises:
            UserError: the model's scores are not finite.
        """
        head, was_training, selection = self.model.head, self.training, self.model.head.selection
        self.eval()
        if selection == "sample":  # by which nobody predicts
            head.selection = "argmax"
        try:
            return conformal.calibrate(
                head,
                features,
                prompt_table,
                videos,
                n_shots=n_shots,
                n_ways=n_ways,
                text_fusion=self.text_fusion,
                memory=self.bank_memory * 2**30,
                goes_by=self.goes_by(features.shape[1]),
            )
        finally:
            head.selection = selection
            self.train(was_training)

    def goes_by(self, frames: int) -> dict[str, Any]:
        """What predictions depend on beside the weights, for a calibration to know."""
        return {"selection": self.model.head.selection, "text_fusion": float(self.text_fusion), "frames": frames}

    # ------------------------------------------------------------------------------------------- steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch, a mean over its episodes."""
        if isinstance(batch, TableEpisodes):
            # Reading videos draws too: the first step of a run that goes on would not be that of one left alone.
            batch = self._features(batch, "train")
        with self._own_draws(batch_idx):
            loss = self._step(batch, "train")[0]
        self._broken = self._broken | ~loss.detach().isfinite()  # read at the end of the step: a GPU need not wait
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Played:  # type: ignore[override]
        """Count a batch of validation episodes; what was played is for callbacks."""
        return self._step(batch, "val")[1]

    def test_step(self, batch: Batch, batch_idx: int) -> Played:  # type: ignore[override]
        """Count a batch of test episodes; what was played is for callbacks."""
        return self._step(batch, "test")[1]

    @contextmanager
    def _own_draws(self, batch_idx: int) -> Iterator[None]:
        """Draw dropout from (seed, optimiser step, batch, rank): a resumed run draws what it would have drawn."""
        trainer = self._trainer
        index = batch_idx % trainer.accumulate_grad_batches if trainer else batch_idx
        # That of seed_everything or of whoever set torch's; of a resumed run, that of its start.
        self._draws_seed = torch.initial_seed() if self._draws_seed is None else self._draws_seed
        source = np.random.SeedSequence([self._draws_seed, self.global_step, index, self.global_rank])
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(source.generate_state(1)[0]))
            yield

    def _step(self, batch: Batch, stage: str) -> tuple[Tensor, Played]:
        if isinstance(batch, TableEpisodes) and stage == "val" and self.trainer.sanity_checking:
            batch = TableEpisodes(batch.table, batch.numbers[:SANITY_EPISODES])
        episode = self._features(batch, stage)
        support, query, labels = episode["support"], episode["query"], episode["query_labels"]
        classes = episode["class_indices"]
        table = self.encode_prompts(episode["class_names"])
        prompts = table[classes]
        if isinstance(batch, TableEpisodes) and self._bank is not None:
            output = self._bank.play(batch.numbers)
        else:
            output = self.model.head(support, query, prompts, episode.get("draws"))

        # L = λ_match Σ_q CE + λ_distill L_distill + λ_class Σ CE, sums (or means) within an episode, a mean over all
        match = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction=self.loss_reduction)
        if self.loss_reduction == "sum":
            match = match / len(labels)
        distill = output.distillation_loss.mean()
        losses = {"match": match, "distill": distill}
        loss = self.match_weight * match + self.distill_weight * distill
        if self.class_weight:
            videos = support, query, prompts, table, classes, labels
            losses["class"] = class_text_loss(self.model.head, *videos, reduction=self.loss_reduction)
            loss = loss + self.class_weight * losses["class"]
        losses["total"] = loss

        share = 0.0 if stage == "train" else self.text_fusion
        scores = fuse_text(self.model.head, share, output.logits, query, prompts)
        metrics = self._metrics_of(stage)
        metrics.count(output, scores.argmax(-1), episode, losses, prompts=self.model.has_prompts)
        unknown = None
        if stage != "train" and "unknown" in episode:
            unknown = self._score_unknown(batch, episode, prompts)
            metrics.count_unknown(scores, labels, unknown)
        return loss, Played(episode, prompts, output, scores, unknown)

    def _score_unknown(self, batch: Batch, episode: FeatureEpisode, prompts: Tensor) -> Tensor:
        """What the unknown queries of a batch are classified by; they are played by themselves, after the others."""
        unknown = episode["unknown"]
        if isinstance(batch, TableEpisodes) and self._bank is not None and self._bank.of_unknown is not None:
            output = self._bank.of_unknown.play(batch.numbers)
        else:
            output = self.model.head(episode["support"], unknown, prompts, episode.get("unknown_draws"))
        return fuse_text(self.model.head, self.text_fusion, output.logits, unknown, prompts)

    # ---------------------------------------------------------------------------------------- features

    def _features(self, batch: Batch, stage: str) -> FeatureEpisode:
        """A batch as features, whatever it carries."""
        if isinstance(batch, TableEpisodes):
            features = self._encode(batch.table, stage)
            rows = batch.table.episodes(batch.numbers.tolist())
            rows = self.transfer_batch_to_device(rows, self.device, 0)
            of_videos = {key: features[rows[key]] for key in ("support", "query", "unknown") if key in rows}
            return cast(FeatureEpisode, {**rows, **of_videos})
        if batch["support"].is_floating_point():
            return batch
        support, query = self.model.encode_episode(batch)
        encoded = {**batch, "support": support, "query": query}
        if "unknown" in batch:
            encoded["unknown"] = self.model.encode_frames(batch["unknown"])
        return cast(FeatureEpisode, encoded)

    def _encode(self, table: VideoTable, stage: str) -> Tensor:
        """The features of a table's videos; encoded at the first batch of a training, or of an evaluation's epoch.

        Raises:
            UserError: a training goes by features of a tower that is not frozen.
        """
        known = self._encoded.get(stage)
        if known is not None and known.table is table and (stage == "train" or self._bank is not None):
            return known.features
        if stage == "train" and not self.model.freeze_backbone:
            what = "data.train_augmentations" if table.features() is None else "a feature table"
            raise UserError(
                f"{what} trains from features, which a tower that learns would leave behind: set model.freeze_backbone,"
                " or train from videos with data.train_augmentations 0"
            )
        numbers: Sequence[int] = episodes_played(self.trainer, table.block, len(table))
        if self.trainer.sanity_checking:
            numbers = [number for number in numbers if number % table.block < SANITY_EPISODES]
        weights = self.model.backbone.visual.state_dict(keep_vars=True).values()
        tower = (str(self.trainer.precision), self.device, [(w.data_ptr(), w._version) for w in weights])
        if known is None or not self.model.freeze_backbone or known[:3] != (table, numbers, tower):
            known = EncodedTable(table, numbers, tower, self._encode_videos(table, numbers))
            self._encoded[stage] = known
        if stage != "train":
            episodes = table.episodes(numbers)
            prompts = self.encode_prompts(episodes["class_names"])
            episodes = self.transfer_batch_to_device(episodes, self.device, 0)
            memory = self.bank_memory * 2**30
            self._bank = EpisodeBank(self.model.head, known.features, prompts, episodes, memory=memory)
        return known.features

    @torch.no_grad()
    def _encode_videos(self, table: VideoTable, numbers: Sequence[int]) -> Tensor:
        return encode_videos(
            self.model,
            table,
            numbers,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            precision=str(self.trainer.precision),
            # Features of a tower that learns are of use to nobody later.
            keep=self.model.freeze_backbone or self.trainer.state.fn != "fit",
        )

    def on_fit_start(self) -> None:
        """Remember how videos are read: whoever uses the model later has to read theirs in the same way.

        Raises:
            UserError: a callback waits for a metric that nobody logs.
        """
        self._check_monitors()
        reader = getattr(getattr(self.trainer, "datamodule", None), "reader", None)
        names = ("frames", "resize", "resize_mode", "sampling")
        for some_names in (names[:2], names):  # other people's readers may be anything
            if is_reading(known := {name: getattr(reader, name, None) for name in some_names}):
                self.reading = known
        self._encoded.pop("train", None)  # of a training that was interrupted
        self._broken, self._skipped = False, 0

    def _check_monitors(self) -> None:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if type(self) is not CLIPM2DF or not all(type(c).__module__.startswith(LOG_NO_MORE) for c in callbacks):
            return  # other people's code may log more
        for callback in callbacks:
            monitor = getattr(callback, "monitor", None)
            if not isinstance(monitor, str) or not getattr(callback, "strict", True):
                continue
            stage, _, name = monitor.partition("/")
            if not (stage in ("train", "val") and name in NAMES) and not monitor.startswith("lr-"):
                who = "checkpoint.monitor" if isinstance(callback, RunCheckpoint) else type(callback).__name__
                raise UserError(f"{who}: there is no metric {monitor!r}; train/… and val/… have {', '.join(NAMES)}")

    def on_train_end(self) -> None:
        """Let the features go."""
        self._encoded.pop("train", None)

    def on_validation_epoch_start(self) -> None:
        """Let the weights of this epoch play."""
        self._bank = None

    def on_test_epoch_start(self) -> None:
        """The same."""
        self._bank = None

    # ----------------------------------------------------------------------------------------- metrics

    def _metrics_of(self, stage: str) -> StageMetrics:
        return cast(StageMetrics, self.metrics[f"{stage}_metrics"])

    def _log_metrics(self, stage: str) -> None:
        """Log what has been counted since the last time, and start anew."""
        found = self._metrics_of(stage).take()
        if stage != "train" and not (loss := found.numbers["loss/total"]).isfinite():  # the same on all ranks
            if self.trainer.state.fn == "fit":
                raise self._diverged("the loss of the validation is")
            check_finite(loss, f"the {stage} episodes")
        for name, number in found.numbers.items():
            # Already the sum over all ranks.
            self.log(
                f"{self.test_name if stage == 'test' else stage}/{name}",
                number.float(),
                prog_bar=name in ("accuracy", "interval", "loss/total"),
                rank_zero_only=False,
                sync_dist=False,
            )
        if stage != "train":
            self.evaluated = found
            self._bank = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log over whole optimiser steps, as often as the Trainer logs.

        Raises:
            UserError: the loss of the step is not finite.
        """
        if ends_step(self.trainer, batch_idx):
            self._check_loss()
        if logs_step(self.trainer, batch_idx):
            self._log_metrics("train")

    def on_validation_epoch_end(self) -> None:
        """Log what the validation counted."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log what the test counted."""
        self._log_metrics("test")

    def _check_loss(self) -> None:
        """End a training whose loss is not finite, on all ranks after the same step."""
        broken = torch.as_tensor(self._broken, dtype=torch.long, device=self.device)
        self._skipped = self._skipped + 1 if int(self.trainer.strategy.reduce(broken, reduce_op="max")) else 0
        self._broken = False
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # skips such a step, and the weights stay
        if self._skipped > (0 if scaler is None else MOST_SKIPPED):
            raise self._diverged("the loss is")

    def _diverged(self, what: str) -> UserError:
        """The error of a training that is not finite."""
        precision = str(self._trainer.precision) if self._trainer else ""
        other = f", or trainer.precision bf16-mixed in the place of {precision}" if precision.startswith("16") else ""
        return UserError(
            f"optimiser step {self.global_step}: {what} not finite (NaN or infinite); what was saved before is kept."
            f" Start anew in another folder, with a lower model.lr or more model.warmup_steps{other}; or mend the data"
        )

    # --------------------------------------------------------------------------------------- optimiser

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, a learning rate each for head and tower; linear warm-up, then steps; counted in optimiser steps.

        Raises:
            UserError: nothing is trained.
        """
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        self._check_rounding()
        bare = {name for name in trained if any(part in name for part in self.no_decay)}
        if self.no_decay and not bare:
            warnings.warn(f"no_decay: no parameter's name has {' or '.join(self.no_decay)}", stacklevel=2)
        groups: list[dict[str, Any]] = []
        for part, module, lr in (("head", "head", self.lr), ("backbone", "backbone.visual", self.backbone_lr)):
            own = [name for name in trained if name.startswith(f"model.{module}.")]
            groups.append({"params": [trained[n] for n in own if n not in bare], "lr": lr, "name": part})
            exempt = [trained[n] for n in own if n in bare]
            groups.append({"params": exempt, "lr": lr, "name": f"{part}_no_decay", "weight_decay": 0.0})
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise UserError(
                "nothing to train: the tower is frozen and the head has no parameters; measure it as it is, by"
                " clip-m2df test without --ckpt_path"
            )
        fused = self.device.type == "cuda" or None
        optimizer = torch.optim.Adam(groups, weight_decay=self.weight_decay, fused=fused)
        scheduler = LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _check_rounding(self) -> None:
        """Refuse to train a tower in float16, in which Adam divides by 0, and tell what bfloat16 loses."""
        held = self.model.backbone.dtype
        weights = [p for p in self.model.backbone.visual.parameters() if p.requires_grad]
        if held == "float32" or not any(weight.dtype == getattr(torch, held) for weight in weights):
            return
        remedy = (
            "leave it out, with trainer.precision bf16-mixed for speed, or train model.adapters, which are in float32,"
            " or the head alone (model.freeze_backbone)"
        )
        if held == "float16":
            raise UserError(f"model.backbone_options.dtype is float16, in which Adam can't train a tower: {remedy}")
        warnings.warn(
            f"model.backbone_options.dtype is {held}, in which updates below 1/256 of a weight are lost: {remedy}",
            stacklevel=3,
        )

    def _lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at an optimiser step."""
        if (ahead := step + self.warmup_offset) < self.warmup_steps:
            return self.warmup_start + (1 - self.warmup_start) * ahead / self.warmup_steps
        return float(self.gamma ** sum(step >= milestone for milestone in self.milestones))

    # ------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the towers' description in the place of their name: a checkpoint needs no network and no files.

        Raises:
            UserError: the weights, or averages of them, are not finite: nothing good is to be written over by them.
        """
        for weights in (checkpoint["state_dict"], checkpoint.get("current_model_state", {})):
            broken = not_finite(weights)
            if broken and self._trainer is not None and self._trainer.training:
                raise self._diverged(f"the weights ({some(broken, 1)}) are")
            if broken:
                raise UserError(
                    f"the model's weights are not finite (NaN or infinite), {some(broken)}: a training had failed; save"
                    " another"
                )
        description = self.model.backbone.description()
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {**self.hparams, "backbone": description}
        checkpoint["draws_seed"] = self._draws_seed
        checkpoint["reading"] = self.reading
        checkpoint["selection"] = self.default_selection
        if self.calibration is not None:
            checkpoint["calibration"] = self.calibration.state()
        if self._trainer is not None:
            checkpoint["goes_by"] = self._goes_by()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that are not this model's.

        Raises:
            UserError: names the first weights that are missing, unknown, of another shape or not finite.
        """
        path = self._trainer.ckpt_path if self._trainer else None  # others name it themselves
        for weights in (checkpoint["state_dict"], checkpoint.get("current_model_state")):
            if weights is not None:
                check_weights(self, weights, "a checkpoint of this model" + (f" ({path})" if path else ""))
        reading = checkpoint.get("reading")
        if not is_reading(reading):
            of_file = f" {path}" if path else ""
            raise UserError(
                f"the checkpoint{of_file} is damaged, its reading is {reading!r:.80}, not a number of frames and one of"
                " pixels; give another"
            )
        self.reading = reading
        self._select_by_default(checkpoint.get("selection", "argmax"))
        calibration = checkpoint.get("calibration")
        self.calibration = None if calibration is None else Calibration.from_state(calibration)
        if self._trainer is not None and self._trainer.state.fn == "fit":  # a run that goes on
            self.calibration = None  # of weights that are left behind
            self._draws_seed = checkpoint.get("draws_seed")
            known = inspect.signature(CLIPM2DF).parameters  # a class derived from it may save more
            saved = {n: v for n, v in checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY].items() if n in known}
            saved = saved_options("the checkpoint", saved, CLIPM2DF, head=self.hparams["head"])
            # Where an earlier version lacked an option, its training was as with today's default.
            saved = {n: parameter.default for n, parameter in known.items() if n not in RUN_OPTIONS} | saved
            own = options_by_name(self.hparams) | self._goes_by()
            check_same(options_by_name(saved) | checkpoint.get("goes_by", {}), own)
            averages = any(isinstance(c, WeightAveraging) for c in self._trainer.callbacks)  # type: ignore[attr-defined]
            if "current_model_state" in checkpoint and not averages:
                raise UserError(
                    "the run averages its weights: give the callback again by which it did, such as trainer.callbacks"
                    " EMAWeightAveraging, or the run's own config.yaml"
                )

    def _select_by_default(self, selection: Selection) -> None:
        """Set how PPS picks at evaluation where nobody has asked for it."""
        if not (isinstance(selection, str) and selection in SELECTIONS):
            raise UserError(f"the checkpoint is damaged, its selection is {selection!r:.80}; give another")
        self.default_selection = selection
        if self._by_default:
            self.model.head.selection = selection

    def _goes_by(self) -> dict[str, Any]:
        """What a training and the choice of its best depend on beside the options that a checkpoint keeps."""
        algorithm = self.trainer.gradient_clip_algorithm
        kept = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, RunCheckpoint)]
        return {
            **{f"checkpoint.{name}": getattr(c, name) for c in kept for name in ("monitor", "mode")},
            "trainer.gradient_clip_val": self.trainer.gradient_clip_val,
            "trainer.gradient_clip_algorithm": None if algorithm is None else str(algorithm.value),
            "model.selection": self.model.head.selection,
            "model.text_fusion": self.text_fusion,
        }

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Any, map_location: Any = None, *, clip: Clip | None = None, **options: Any
    ) -> Self:
        """Load a model with its options, tower, tokenizer and preprocessing; needs no network.

        Args:
            checkpoint_path: the file; it may be a published one, see :meth:`from_published`.
            map_location: where the model goes, as ``torch.load`` takes it; by default where it was saved from, or the
                CPU on a machine without CUDA.
            clip: with a published checkpoint alone, see :meth:`from_published`.
            **options: of the model; they win over the checkpoint's.

        Raises:
            UserError: there is no such file, it is damaged or no checkpoint of this model, it takes a head that is
                other people's code and was not asked for by ``head=``, or an option that the model doesn't have.
        """
        if map_location is None and not torch.cuda.is_available():
            map_location = "cpu"
        checkpoint = read_checkpoint(checkpoint_path, map_location=map_location)
        if (state := published_state(checkpoint)) is not None:
            model = cls._from_published(checkpoint_path, state, clip, options)
            return model.to(next(iter(state.values())).device)
        if clip is not None:
            raise UserError(
                f"{checkpoint_path} is no published checkpoint, and has its towers itself: leave out CLIP's weights"
            )
        return cls._restore(checkpoint_path, checkpoint, options)

    @classmethod
    def from_published(cls, file: str | os.PathLike[str], *, clip: Clip | None = None, **options: Any) -> Self:
        """Load a checkpoint of CLIP-M²DF's published code, in evaluation mode.

        The model works as the published one: frames in [0, 1] without CLIP's mean and std, prompts that are drawn
        at evaluation too, clips of 8 frames. It stays so when it is saved and loaded again.

        Args:
            file: the checkpoint, as the published training saved it, with or without DataParallel, optimiser and
                schedule.
            clip: the CLIP that its training began with, as the option ``backbone`` names it, or loaded; the model has
                its text tower and its tokenizer. It may be left out if both towers are in the file; then the tokenizer
                is that beside the file, or CLIP's standard one.
            **options: of the model, such as ``head_options``, of which the file keeps none but the sizes.

        Raises:
            UserError: there is no such file, it is damaged, or of another model; or ``clip`` is missing, or is another
                one than the training began with.
        """
        state = published_state(read_weights(Path(file).expanduser(), inside="model_state_dict"))
        return cls._from_published(file, state or {}, clip, options)

    @classmethod
    def _from_published(
        cls, file: str | os.PathLike[str], state: dict[str, Tensor], clip: Clip | None, options: dict[str, Any]
    ) -> Self:
        """The model of published weights that have been read from a file."""
        cls._check_options(options)
        if (head := options.get("head") or "m2df") != "m2df":
            raise UserError(f"{file} is a checkpoint of CLIP-M²DF, whose head is m2df and not {head}: leave head out")
        if "backbone" in options:
            raise UserError(f"{file} is a published checkpoint: give CLIP's weights as clip, not as backbone")
        if options.get("adapters") is not None:
            raise UserError(f"{file} is a published checkpoint, whose tower has no adapters: leave adapters out")
        if not isinstance(clip, str | os.PathLike | CLIPBackbone | None):
            raise UserError(
                f"clip is of the type {type(clip).__name__}: give the file, folder or name of CLIP's weights, or a"
                " CLIPBackbone made of them"
            )
        of_clip = check_options(options.get("backbone_options") or {})
        for name, own in (("mean", 0.0), ("std", 1.0)):
            given = of_clip.pop(name, None)
            if given is not None and given not in ([own] * 3, (own,) * 3):
                raise UserError(
                    f"backbone_options.{name} is {given!r:.80}, but {file} was trained on frames in [0, 1], without"
                    " CLIP's mean and std: leave it out"
                )
        if of_clip and (clip is None or isinstance(clip, CLIPBackbone)):
            raise UserError("backbone_options are of weights that are loaded by a name: give clip as one")
        try:
            shapes, towers = published_head(state)[1], published_tower(state)
            if clip is None and all(name.startswith("visual.") for name in towers):
                raise UserError(
                    "it has the visual tower alone, and the prompts need the text tower: give as clip the CLIP that its"
                    " training began with, such as the file ViT-B-16.pt or openai/clip-vit-base-patch16 (on the command"
                    " line --model.backbone, for predict --backbone)"
                )
            if clip is None:
                beside = str(Path(file).parent) if has_tokenizer(Path(file).parent) else None
                clip = CLIPBackbone.from_openai(towers, tokenizer=beside, **OPENAI)
            tower = clip if isinstance(clip, CLIPBackbone) else CLIPBackbone.load(os.fspath(clip), **of_clip)
            tower.tokenize([""])  # fetches the tokenizer: without it there are no prompts, and so no scores
            head_options = {"depth": shapes["depth"], "hidden_dim": shapes["hidden_dim"]}
            head_options |= options.get("head_options") or {}
            towers_known = {"backbone": tower.description(), "backbone_options": None}
            model = cls(**options | towers_known | {"head_options": head_options})
            cast(CLIPBackbone, model.model.backbone).load_state_dict(tower.state_dict())
            model.model.load_published(state)
        except Exception as error:  # whatever shapes and values of other types lead to
            raise _unusable(file, error) from error
        # As its videos were read; there a crop of 224 pixels is of a short side of 256, and one of 84 of 96.
        size = round(tower.image_size * 8 / 7)
        model.reading = {"frames": 8, "resize": size, "resize_mode": "short_side", "sampling": "linspace"}
        model._select_by_default("sample")
        model.source = os.fspath(file)
        return model.eval()

    @classmethod
    def _check_options(cls, given: Mapping[str, Any]) -> None:
        known = inspect.signature(cls).parameters
        if unknown := [option for option in given if option not in known]:
            raise UserError(f"{cls.__name__} has no option {unknown[0]!r}; its options are {', '.join(sorted(known))}")

    @classmethod
    def _restore(cls, source: str | os.PathLike[str], checkpoint: dict[str, Any], given: dict[str, Any]) -> Self:
        """The model in a checkpoint that has been read from a file; options that are given win over its own."""
        cls._check_options(given)
        options = saved_options(source, checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY), cls, head=given.get("head"))
        try:
            model = cls(**(options | given))
            model.on_load_checkpoint(checkpoint)
            model.load_state_dict(checkpoint["state_dict"])
        except Exception as error:  # whatever values of other types lead to
            raise _unusable(source, error) from error
        model.source = os.fspath(source)
        return model.to(next(iter(checkpoint["state_dict"].values())).device)

    # ---------------------------------------------------------------------------------- folders and hub

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        measured: Mapping[str, str] | None = None,
        adapters: Kept = "kept",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str | None:
        """Save the model as a folder; a card that is there already is kept, as somebody may have written in it.

        Args:
            save_directory: the folder; made if need be.
            measured: figures for the card's table, by what was measured:
                ``{"motion_shapes test, 5-way 1-shot": "83.2 ± 0.8"}``.
            adapters: ``kept``, so that the folder needs nothing else, and a training can go on; ``merged`` into the
                tower's weights, a model without adapters that has the same scores; or ``apart`` from the towers, which
                are not in the folder: head and adapters alone, of a few megabytes.
            push_to_hub: push it too.
            repo_id: its name on the hub; that of the folder by default.
            model_card_kwargs: options of :func:`clip_m2df.hub.model_card`.
            **options: of :meth:`push_to_hub`.

        Returns:
            The address of the commit, if it was pushed too.

        Raises:
            UserError: the folder can't be written, an option can't be saved as JSON, or there is a card already that
                what was measured can't go into.
        """
        card = {"measured": measured, **(model_card_kwargs or {})}
        write_model(save_directory, self._saved(adapters), **card)
        if not push_to_hub:
            return None
        name = repo_id or Path(save_directory).name
        return self.push_to_hub(name, adapters=adapters, model_card_kwargs=card, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        measured: Mapping[str, str] | None = None,
        adapters: Kept = "kept",
        private: bool | None = None,
        token: str | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """Save the model on the hub; its card says how to use it from there.

        Args:
            repo_id: its name there, ``user/name``; made if need be.
            measured: see :meth:`save_pretrained`.
            adapters: the same.
            private: whether others may see it, if it is made.
            token: what the hub knows you by; that of ``hf auth login`` by default.
            model_card_kwargs: options of :func:`clip_m2df.hub.model_card`.
            **options: ``branch``, and those of ``huggingface_hub.HfApi.upload_folder``, such as ``commit_message``.

        Returns:
            The address of the commit.

        Raises:
            UserError: there is no network, or the hub refuses to make it; or the model can't be saved. What goes wrong
                with the upload itself comes from huggingface_hub as it is.
        """
        card = {"measured": measured, **(model_card_kwargs or {})}
        return push_model(repo_id, self._saved(adapters), card, private=private, token=token, **options)

    def _saved(self, adapters: Kept) -> dict[str, Any]:
        """A checkpoint of the model alone, without a run, for :func:`clip_m2df.hub.write_model`."""
        if adapters not in (choices := get_args(Kept)):
            raise UserError(f"adapters: there is no {adapters!r:.80}; there are {', '.join(choices)}")
        checkpoint: dict[str, Any] = {"state_dict": self.state_dict()}
        self.on_save_checkpoint(checkpoint)
        if adapters == "kept" or self.hparams["adapters"] is None:
            if adapters == "apart":
                raise UserError("the model has no adapters to be saved apart from its tower: give adapters='kept'")
            return checkpoint
        if adapters == "merged":
            merged = self._restore(self.source, checkpoint, {"head": self.hparams["head"]})
            merge_adapters(cast(CLIPBackbone, merged.model.backbone))
            merged.hparams["adapters"] = None
            return merged._saved("kept")
        state = checkpoint["state_dict"]
        towers = {name.removeprefix(BACKBONE): w for name, w in state.items() if name.startswith(BACKBONE)}
        checkpoint["state_dict"] = {name: w for name, w in state.items() if not name.startswith(BACKBONE)}
        checkpoint["tower"] = tower_checksum(towers)
        backbone = cast(CLIPBackbone, self.model.backbone)
        source = public_source(backbone.source)
        checkpoint["adapter"] = peft_files(towers, self.hparams["adapters"], backbone.family, source)
        return checkpoint

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        clip: Clip | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,
    ) -> Self:
        """Load a model that :meth:`save_pretrained` or :meth:`push_to_hub` saved, in evaluation mode.

        A folder needs no network. What comes from the hub is the latest, or else what this machine has of it.

        Args:
            pretrained_model_name_or_path: the folder, or the model's name on the hub, ``user/name``.
            clip: with a model whose adapters are apart alone: the CLIP that its training began with, as the option
                ``backbone`` names it, or loaded; by default by the name by which it was loaded then.
            force_download: fetch from the hub what is on this machine already.
            token: what the hub knows you by, for private models; that of ``hf auth login`` by default.
            cache_dir: where files of the hub are kept; huggingface_hub's own folder by default.
            local_files_only: do without the network.
            revision: a branch, tag or commit of the model on the hub; the latest by default.
            **model_kwargs: options of the model, which win over the saved ones.

        Raises:
            UserError: there is no such model, it can't be fetched, it is damaged, or it takes a head that is other
                people's code and was not asked for by ``head=``; an option that the model doesn't have; or ``clip`` is
                another than its adapters are of.
        """
        folder = find_model(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        checkpoint = read_model(folder)
        if "adapter" in checkpoint:
            _add_tower(folder, checkpoint, clip, model_kwargs.pop("backbone_options", None))
        elif clip is not None:
            raise UserError(f"{folder} has its towers itself: leave out CLIP's weights")
        return cls._restore(folder, checkpoint, model_kwargs).eval()


def _add_tower(folder: Path, checkpoint: dict[str, Any], clip: Clip | None, options: Mapping[str, Any] | None) -> None:
    """Put the weights of the towers, and of their adapters, into a checkpoint that was saved without.

    Raises:
        UserError: they are not there, or others than the adapters are of.
    """
    known, adapter = checkpoint.pop("tower"), checkpoint.pop("adapter")
    try:
        description, dtype = checkpoint["hyper_parameters"]["backbone"], getattr(torch, known["dtype"])
        name, size = description["source"], description["visual_config"]["image_size"]
    except (AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{folder} is damaged: its config.json does not say of which tower its adapters are") from error
    if isinstance(clip, CLIPBackbone):
        tower = clip
    else:
        own = {"image_size": size, "dtype": description.get("dtype")} | dict(options or {})
        try:
            tower = CLIPBackbone.load(name if clip is None else clip, **check_options(own))
        except UserError as error:
            if clip is not None:
                raise UserError(
                    f"{folder} has adapters of {name!r}; {clip} can't be loaded for them: {error}"
                ) from error
            raise UserError(
                f"{folder} has adapters apart from their tower, {name!r}, which can't be loaded by that name: give it"
                f" as clip=, on the command line as --backbone ({error})"
            ) from error
    state = {n: w.to(dtype) if w.is_floating_point() else w for n, w in tower.state_dict().items()}
    if tower.adapters is not None or tower_checksum(state) != known:
        raise UserError(
            f"the adapters in {folder} are of another tower than {tower.source!r}: give the one that its training"
            f" began with, {name!r}, its weights to the bit"
        )
    checkpoint["state_dict"] |= {
        f"{BACKBONE}{name}": w for name, w in adapted_state(adapter, state, tower.family).items()
    }


def _unusable(file: str | os.PathLike[str], error: Exception) -> UserError:
    reason = str(error) if isinstance(error, UserError) else f"{str(error).partition(chr(10))[0]:.300}"
    return UserError(f"no model can be made of {file}: {reason}")
