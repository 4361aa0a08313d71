"""Features that a run computes ahead: of the views that it trains from, and of the videos that an evaluation plays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from clip_m2df.episode import EpisodeTable, VideoTable, select_episodes
from clip_m2df.errors import UserError
from clip_m2df.evaluation.bank import EpisodeBank
from clip_m2df.evaluation.features import encode_videos
from clip_m2df.nn.m2df import M2DF

if TYPE_CHECKING:
    import lightning


# Of each batch, in the sanity check before a training: it is to be quick.
SANITY_EPISODES = 2


class _Encoded(NamedTuple):
    """Features, and what they are of."""

    table: EpisodeTable
    numbers: Tensor
    state: object
    features: Tensor

    def of(self, table: EpisodeTable, numbers: Tensor, state: object) -> bool:
        return self.table is table and self.numbers.equal(numbers) and self.state == state


class RunFeatures:
    """What a run has encoded ahead, if its loaders' datasets are tables of videos.

    Attributes:
        views: features ``(videos, frames, dim)`` of the views of the training videos, where it trains from them.
        bank: what the evaluation that is under way is played from.
    """

    def __init__(self) -> None:
        self.views: Tensor | None = None
        self.bank: EpisodeBank | None = None
        self._encoded: _Encoded | None = None

    @torch.no_grad()
    def encode_views(self, model: M2DF, trainer: lightning.Trainer) -> None:
        """Encode the views of the training videos, if its episodes come from a table.

        Args:
            model: whose tower has to be frozen.
            trainer: at the start of a training.

        Raises:
            UserError: the tower is not frozen.
        """
        loader: Any = trainer.train_dataloader
        table = getattr(loader, "dataset", None)
        self.views = None  # of a training that was broken off
        if not isinstance(table, VideoTable):
            return
        if not model.freeze_backbone:
            raise UserError(
                "data.train_augmentations trains from features, which a tower that learns would leave behind: set"
                " model.freeze_backbone, or data.train_augmentations to 0"
            )
        # A trial run is to be quick; all videos otherwise.
        trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        batches = int(trainer.num_training_batches) * trainer.world_size if trial else 0
        self.views = _encode(model, trainer, table, range(batches * loader.batch_size))

    @torch.no_grad()
    def open_bank(
        self, model: M2DF, trainer: lightning.Trainer, loader: Any, batches: Sequence[int | float], *, memory: float
    ) -> None:
        """Encode the videos that an evaluation names, if its episodes come from a table.

        While the tower is frozen, its features stay what they are, and are used again.

        Args:
            model: in eval mode.
            trainer: at the start of the evaluation.
            loader: of the evaluation.
            batches: how many it plays of each loader.
            memory: GiB for fused sequences.
        """
        table = getattr(loader, "dataset", None)
        self.bank = None
        if not isinstance(table, EpisodeTable):
            return
        most = torch.tensor(int(batches[0]), device=model.device)
        if trainer.world_size > 1:  # ranks may have a batch more or less, and have to encode the same videos
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        numbers = table.episodes["numbers"][: int(most) * loader.batch_size * trainer.world_size]
        if trainer.sanity_checking:
            numbers = numbers[numbers % loader.batch_size < SANITY_EPISODES]
        state = _tower_state(model, trainer)
        if not model.freeze_backbone or self._encoded is None or not self._encoded.of(table, numbers, state):
            self._encoded = _Encoded(table, numbers, state, _encode(model, trainer, table, numbers.tolist()))
        with trainer.precision_plugin.forward_context():
            features = self._encoded.features
            chosen = select_episodes(table.episodes, numbers)
            episodes = trainer.lightning_module.transfer_batch_to_device(chosen, model.device, 0)
            prompts = model.encode_prompts(chosen["class_names"])
            self.bank = EpisodeBank(model.head, features, prompts, episodes, memory=memory * 2**30)


def _tower_state(model: M2DF, trainer: lightning.Trainer) -> object:
    """What features belong to: the tower's weights, where they are, and the precision."""
    weights = model.backbone.visual.state_dict(keep_vars=True).values()
    return str(trainer.precision), model.device, [(w.data_ptr(), w._version) for w in weights]


def _encode(model: M2DF, trainer: lightning.Trainer, table: VideoTable, numbers: Sequence[int]) -> Tensor:
    # Those of a tower that learns are of use to nobody later.
    keep = model.freeze_backbone or trainer.state.fn != "fit"
    with trainer.precision_plugin.forward_context():
        return encode_videos(
            model,
            table,
            numbers,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            precision=str(trainer.precision),
            keep=keep,
        )
