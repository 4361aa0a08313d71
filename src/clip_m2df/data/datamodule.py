"""EpisodeDataModule: N-way K-shot episodes from the videos of a manifest."""

from __future__ import annotations

import importlib.util
from typing import get_args

import lightning
import torch
from torch.utils.data import DataLoader

from clip_m2df.data import motion_shapes
from clip_m2df.data.episodes import ClipReader, EpisodeDataset, EpisodeSampler, EpisodeShape, collate_episodes
from clip_m2df.data.manifest import Manifest
from clip_m2df.data.video import Decoder
from clip_m2df.episode import Episode
from clip_m2df.errors import UserError

EMBEDDED = "motion_shapes"


class EpisodeDataModule(lightning.LightningDataModule):
    """Deals episodes to a Trainer: an endless stream for training, the same ones each time at evaluation.

    Runs are counted in whole optimiser steps: it sets the Trainer's gradient accumulation, and when to validate, from
    ``episodes_per_step``, ``batch_size`` and the number of devices.

    Args:
        manifest: a CSV with the columns path, label, split and, if wanted, text (what the prompt says); paths relative
            to the CSV's folder, of videos or of folders of numbered images. Or ``motion_shapes``, the embedded
            benchmark, rendered when first used.
        n_way: classes of an episode.
        n_shot: support videos a class.
        n_query: query videos a class in training.
        n_query_eval: query videos a class in validation and test.
        val_episodes: episodes of a validation.
        test_episodes: episodes of a test.
        seed: of the training episodes.
        eval_seed: of the validation and test episodes.
        frames: frames a video.
        resize: short side of the frames in pixels before the crop.
        size: side of the square crop in pixels, what the visual tower takes.
        flip: mirror half of the training clips. Leave it off where classes have a left and a right.
        decoder: which library decodes; ``auto`` takes the fastest that gives the right frames.
        batch_size: episodes that go through the model at once, on each device.
        episodes_per_step: episodes of an optimiser step, whatever the number of devices.
        validate_every: optimiser steps between validations; a shorter run is validated at its end.
        num_workers: processes that decode, for each device.

    Raises:
        UserError: an option out of its range, or ``episodes_per_step`` that does not divide; in ``setup``, a manifest
            that can't supply such episodes.
    """

    def __init__(
        self,
        manifest: str,
        n_way: int = 5,
        n_shot: int = 1,
        n_query: int = 5,
        n_query_eval: int = 1,
        val_episodes: int = 1000,
        test_episodes: int = 10000,
        seed: int = 0,
        eval_seed: int = 0,
        frames: int = 8,
        resize: int = 256,
        size: int = 224,
        flip: bool = False,
        decoder: Decoder = "auto",
        batch_size: int = 1,
        episodes_per_step: int = 16,
        validate_every: int = 100,
        num_workers: int = 2,
    ) -> None:
        super().__init__()
        at_least_one = {
            "n_shot": n_shot,
            "n_query": n_query,
            "n_query_eval": n_query_eval,
            "val_episodes": val_episodes,
            "test_episodes": test_episodes,
            "frames": frames,
            "size": size,
            "batch_size": batch_size,
            "episodes_per_step": episodes_per_step,
            "validate_every": validate_every,
        }
        for option, value in at_least_one.items():
            if value < 1:
                raise UserError(f"{option} is {value}; it must be at least 1")
        for option, value in {"seed": seed, "eval_seed": eval_seed, "num_workers": num_workers}.items():
            if value < 0:
                raise UserError(f"{option} is {value}; it must not be negative")
        if n_way < 2:
            raise UserError(f"n_way is {n_way}: there is nothing to tell apart; give at least 2")
        if resize < size:
            raise UserError(f"resize {resize} is smaller than size {size}, the crop; give at least {size}")
        if decoder not in get_args(Decoder):
            raise UserError(f"decoder is {decoder!r}; it can be {', '.join(get_args(Decoder))}")
        if decoder in ("decord", "torchcodec") and importlib.util.find_spec(decoder) is None:
            raise UserError(f"decoder {decoder} is not installed; install it, or take auto")
        self.manifest_path = manifest
        self.train_shape = EpisodeShape(n_way, n_shot, n_query)
        self.eval_shape = EpisodeShape(n_way, n_shot, n_query_eval)
        self.val_episodes = val_episodes
        self.test_episodes = test_episodes
        self.seed = seed
        self.eval_seed = eval_seed
        self.reader = ClipReader(frames, resize, size, flip, decoder)
        self.batch_size = batch_size
        self.episodes_per_step = episodes_per_step
        self.validate_every = validate_every
        self.num_workers = num_workers
        self.manifest: Manifest | None = None
        self._datasets: dict[str, EpisodeDataset] = {}
        self.accumulation(world_size=1)

    @property
    def rank(self) -> int:
        """This process among ``world_size``."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        """Number of processes, a device each."""
        return self.trainer.world_size if self.trainer else 1

    def accumulation(self, world_size: int) -> int:
        """Batches of an optimiser step on each device.

        Raises:
            UserError: the episodes of a step don't divide over batches and devices.
        """
        batches, rest = divmod(self.episodes_per_step, self.batch_size * world_size)
        if rest or not batches:
            raise UserError(
                f"episodes_per_step {self.episodes_per_step} does not divide into batches of {self.batch_size} on"
                f" {world_size} device(s); give a multiple of {self.batch_size * world_size}, or another batch_size"
            )
        return batches

    def prepare_data(self) -> None:
        """Render the embedded benchmark if it is asked for and not there yet."""
        if self.manifest_path == EMBEDDED:
            motion_shapes.render()

    def setup(self, stage: str) -> None:
        """Read and check the manifest; for ``fit`` also count the Trainer's run in whole optimiser steps.

        Args:
            stage: ``fit``, ``validate`` or ``test``.
        """
        if self.manifest is None:
            path = motion_shapes.render() if self.manifest_path == EMBEDDED else self.manifest_path
            self.manifest = Manifest.read(path)
        for option in ("val_episodes", "test_episodes"):
            if getattr(self, option) < self.world_size:
                raise UserError(
                    f"{option} is {getattr(self, option)} on {self.world_size} devices; give at least one a device"
                )
        if stage == "fit":
            self._add_dataset("train", self.train_shape, self.seed)
            self._count_in_steps()
        if stage == "test":
            self._add_dataset("test", self.eval_shape, self.eval_seed)
        elif stage == "validate" or not self.trainer or self.trainer.limit_val_batches:
            self._add_dataset("val", self.eval_shape, self.eval_seed)

    def state_dict(self) -> dict[str, int]:
        """How a run counts, and how far it is, for its checkpoints."""
        return {
            "episodes_per_step": self.episodes_per_step,
            "batches_per_step": self.accumulation(self.world_size),
            "steps": self.trainer.global_step if self.trainer else 0,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Refuse to go on with a run that counts otherwise (it would repeat episodes, or cut a step), or is over.

        Raises:
            UserError: says what to set.
        """
        if not self.trainer or self.trainer.state.fn != "fit":
            return
        episodes, batches, steps = (state_dict[key] for key in ("episodes_per_step", "batches_per_step", "steps"))
        if steps >= self.trainer.max_steps:
            raise UserError(
                f"the checkpoint has made {steps} optimiser steps already; to go on, give more than that with"
                f" trainer.max_steps, which is {self.trainer.max_steps}"
            )
        if (episodes, batches) != (self.episodes_per_step, self.accumulation(self.world_size)):
            raise UserError(
                f"the run made its steps of {episodes} episodes in {batches} batches on each device: set"
                f" data.episodes_per_step to {episodes}, and data.batch_size times the devices to {episodes // batches}"
            )

    def train_dataloader(self) -> DataLoader[Episode]:
        """The endless stream of training episodes, from where the run stands."""
        return self._loader("train", None)

    def val_dataloader(self) -> DataLoader[Episode] | list[DataLoader[Episode]]:
        """The validation episodes; none if the Trainer wants none."""
        return self._loader("val", self.val_episodes) if "val" in self._datasets else []

    def test_dataloader(self) -> DataLoader[Episode]:
        """The test episodes."""
        return self._loader("test", self.test_episodes)

    def _add_dataset(self, name: str, shape: EpisodeShape, seed: int) -> None:
        if name not in self._datasets:
            assert self.manifest is not None
            split = self.manifest.split(name)
            self._datasets[name] = EpisodeDataset(split, shape, self.reader, seed=seed, augment=name == "train")

    def _loader(self, name: str, count: int | None) -> DataLoader[Episode]:
        return DataLoader(
            self._datasets[name],
            batch_size=self.batch_size,
            sampler=EpisodeSampler(count, first=self._first_episode, rank=self.rank, world_size=self.world_size),
            num_workers=self.num_workers,
            collate_fn=collate_episodes,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=name == "val" and self.num_workers > 0,
        )

    def _first_episode(self) -> int:
        """How many training episodes the optimiser has had: a resumed run goes on there, with no loader state."""
        return self.trainer.global_step * self.episodes_per_step if self.trainer else 0

    def _count_in_steps(self) -> None:
        if self.trainer is None:
            return
        batches = self.accumulation(self.world_size)
        if self.trainer.accumulate_grad_batches not in (1, batches):
            raise UserError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}, but follows from"
                f" data.episodes_per_step, {self.episodes_per_step}; leave it out"
            )
        self.trainer.accumulate_grad_batches = batches
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.trainer.max_steps < 0:
            raise UserError("training episodes never end: give with trainer.max_steps the optimiser steps to train")
        # In batches, and not by epoch: an endless stream has none.
        interval = min(self.validate_every, self.trainer.max_steps) * batches
        if self.trainer.val_check_interval not in (1.0, interval):
            raise UserError(
                f"trainer.val_check_interval is {self.trainer.val_check_interval}, in batches; say with"
                " data.validate_every how many optimiser steps lie between validations"
            )
        self.trainer.val_check_interval = interval
        self.trainer.check_val_every_n_epoch = None
        limit = self.trainer.limit_train_batches
        if isinstance(limit, int) and limit % batches:
            raise UserError(
                f"trainer.limit_train_batches {limit} cuts an optimiser step of {batches} batches; give a multiple"
            )
