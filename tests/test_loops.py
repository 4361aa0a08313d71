"""What the package relies on in Lightning's loops, checked by runs of the installed Lightning."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from clip_m2df import loops
from tests.conftest import quiet_trainer

BATCHES = 2  # of an optimiser step


class Endless(IterableDataset[Tensor]):
    """Ones without end."""

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.ones(1)


class Line(lightning.LightningModule):
    """Learns one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch).square().sum()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/seen", 1.0)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(lightning.LightningDataModule):
    """An endless stream to train on, eight batches to validate on, six to test on; a run counted in steps."""

    def __init__(self, validate_every: int = 2) -> None:
        super().__init__()
        self.validate_every = validate_every

    def setup(self, stage: str) -> None:
        if stage == "fit":
            assert self.trainer is not None
            loops.count_in_steps(self.trainer, BATCHES, BATCHES, self.validate_every)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Endless(), 1)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(8, 1), 1)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(6, 1), 1)  # type: ignore[arg-type]


class Watch(lightning.Callback):
    """Notes what a run does, and what the functions say of it meanwhile."""

    def __init__(self) -> None:
        self.trained: list[int] = []  # batches
        self.steps = 0
        self.ends: list[tuple[bool, bool]] = []  # whether a batch ends a step, as is said and as it was
        self.logged: list[int] = []  # steps
        self.expected: list[int] = []  # steps to be validated
        self.validated: list[int] = []
        self.batches: list[int] = []  # of the evaluation under way, as they are played
        self.said = 0  # how many there would be
        self.ended_with_step: bool | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append(batch_idx)
        self.ends.append((loops.ends_step(trainer, batch_idx), trainer.global_step > self.steps))
        if trainer.global_step > self.steps and loops.ends_interval(trainer, trainer.global_step):
            self.expected.append(trainer.global_step)
        self.steps = trainer.global_step
        if loops.logs_step(trainer, batch_idx):
            self.logged.append(trainer.global_step)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert bool(loops.episodes_played(trainer, 1, 100)) is bool(trainer.fast_dev_run)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.ended_with_step = loops.ended_with_step(trainer)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.said, self.batches = len(loops.episodes_played(trainer, 1, 100)), []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.batches.append(args[2])

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.said == len(self.batches)
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.on_validation_epoch_start(trainer, pl_module)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.on_validation_batch_end(trainer, pl_module, *args)


def make_trainer(folder: Path, *callbacks: lightning.Callback, **options: Any) -> lightning.Trainer:
    own = {"max_steps": 6, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    return quiet_trainer(folder, callbacks=[*callbacks], **(own | options))


@pytest.mark.parametrize(("validate_every", "validated"), [(2, [2, 4, 6]), (4, [4]), (9, [6])])
def test_a_run_is_counted_in_whole_steps(tmp_path: Path, validate_every: int, validated: list[int]) -> None:
    watch = Watch()
    make_trainer(tmp_path, watch, log_every_n_steps=3).fit(Line(), datamodule=Data(validate_every))
    assert watch.trained == list(range(6 * BATCHES))
    assert watch.ends == [(False, False), (True, True)] * 6
    assert watch.logged == [3, 6]
    assert watch.expected == watch.validated == validated
    assert watch.ended_with_step is True


class StopAt(lightning.Callback):
    """Asks to stop after a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = batch_idx == self.batch


@pytest.mark.parametrize(("batch", "whole"), [(4, False), (5, True)])
def test_how_a_training_ended_is_known_at_its_end(tmp_path: Path, batch: int, whole: bool) -> None:
    watch = Watch()
    make_trainer(tmp_path, watch, StopAt(batch), limit_val_batches=0).fit(Line(), datamodule=Data())
    assert watch.trained[-1] == batch
    assert watch.ended_with_step is whole


class GoesOn(lightning.Callback):
    """Validates before the first batch, and moves the end of a run by one step until then."""

    def __init__(self, move: bool) -> None:
        self.move = move
        self.started = False

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        if self.move:
            loops.move_end(trainer, 1)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = True
        loops.validate_now(trainer)
        assert trainer.training
        if self.move:
            loops.move_end(trainer, -1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[int], Path]:
    """The checkpoint after some steps, from before the validation that belongs to the last."""

    def make(step: int) -> Path:
        class Save(lightning.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                if trainer.global_step == step and loops.ends_step(trainer, args[-1]):
                    trainer.save_checkpoint(tmp_path / "saved.ckpt")

        make_trainer(tmp_path, Save(), max_steps=step).fit(Line(), datamodule=Data())
        return tmp_path / "saved.ckpt"

    return make


def test_a_validation_can_be_run_before_a_training_goes_on(tmp_path: Path, checkpoint: Callable[[int], Path]) -> None:
    watch, goes_on = Watch(), GoesOn(move=False)
    trainer = make_trainer(tmp_path, watch, goes_on)
    trainer.fit(Line(), datamodule=Data(), ckpt_path=checkpoint(2))
    assert goes_on.started
    assert watch.validated == [2, 4, 6]
    assert watch.batches == list(range(8))
    assert trainer.callback_metrics["val/seen"] == 1
    # Batches are counted on from those before.
    assert watch.trained == list(range(2 * BATCHES, 6 * BATCHES))


@pytest.mark.parametrize("move", [False, True])
def test_a_run_at_its_end_begins_again_where_the_end_is_moved(
    tmp_path: Path, checkpoint: Callable[[int], Path], move: bool
) -> None:
    watch, goes_on = Watch(), GoesOn(move)
    trainer = make_trainer(tmp_path, watch, goes_on)
    trainer.fit(Line(), datamodule=Data(), ckpt_path=checkpoint(6))
    assert goes_on.started is move
    assert watch.validated == ([6] if move else [])
    assert watch.trained == []
    assert (trainer.global_step, trainer.max_steps) == (6, 6)
    assert watch.ended_with_step is (True if move else None)


@pytest.mark.parametrize(
    ("limit", "batches", "at_most"), [(3, 3, 3), (0.5, 4, sys.maxsize), (1.0, 8, sys.maxsize), (20, 8, 20)], ids=str
)
def test_what_an_evaluation_plays_is_known_before(tmp_path: Path, limit: float, batches: int, at_most: int) -> None:
    watch = Watch()
    trainer = make_trainer(tmp_path, watch, limit_val_batches=limit)
    trainer.validate(Line(), datamodule=Data(), verbose=False)
    assert (watch.said, watch.batches) == (batches, list(range(batches)))
    assert loops.batches_limit(trainer, "val") == at_most


def test_tests_sanity_checks_and_trial_runs_are_told_apart(tmp_path: Path) -> None:
    watch = Watch()
    trainer = make_trainer(tmp_path, watch, limit_test_batches=2)
    trainer.test(Line(), datamodule=Data(), verbose=False)
    assert (watch.said, watch.batches) == (2, [0, 1])
    assert loops.batches_limit(trainer, "test") == 2

    class Sanity(Watch):
        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            assert (self.said, self.batches) == (3, [0, 1, 2])

    trainer = make_trainer(tmp_path, Sanity(), num_sanity_val_steps=3, limit_val_batches=5)
    trainer.fit(Line(), datamodule=Data())

    class Trial(Watch):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert loops.episodes_played(trainer, 3, 100) == range(2 * 3)

    trial = Trial()
    make_trainer(tmp_path, trial, fast_dev_run=2).fit(Line(), datamodule=Data())
    assert (trial.trained, trial.batches) == ([0, 1], [0, 1])


def test_how_far_a_training_is_can_be_read_from_its_checkpoint(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=4)
    trainer.fit(Line(), Data())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
    assert loops.steps_of(checkpoint["loops"]) == (4, 4 * BATCHES)
    fresh = loops.progress_of(quiet_trainer(tmp_path))["fit_loop"]
    assert fresh.keys() == checkpoint["loops"]["fit_loop"].keys()


@pytest.mark.parametrize("stopped", [2, 4])  # by another, and at its own end
def test_a_training_that_goes_on_numbers_what_it_logs_as_one_left_alone(tmp_path: Path, stopped: int) -> None:
    class Numbers(lightning.Callback):
        logged: list[int] = []  # noqa: RUF012 - of all runs

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            loops.number_steps(trainer)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if loops.ends_step(trainer, batch_idx):
                self.logged.append(trainer.fit_loop.epoch_loop._batches_that_stepped)
                if trainer.global_step == stopped == 2:
                    trainer.save_checkpoint(tmp_path / "c.ckpt")

    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[Numbers()])
    trainer.fit(Line(), Data())
    if stopped == 4:
        trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert Numbers.logged == [0, 1, 2, 3]
    quiet_trainer(tmp_path, max_steps=6, callbacks=[Numbers()]).fit(Line(), Data(), ckpt_path=tmp_path / "c.ckpt")
    assert Numbers.logged[4:] == list(range(stopped, 6))


def test_an_error_of_what_a_checkpoint_holds_is_told_from_others(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(Line(), Data())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    content = torch.load(tmp_path / "c.ckpt", weights_only=True)
    torch.save(content | {"optimizer_states": 3}, tmp_path / "c.ckpt")
    with pytest.raises(TypeError) as caught:
        quiet_trainer(tmp_path, max_steps=4).fit(Line(), Data(), ckpt_path=tmp_path / "c.ckpt")
    assert loops.raised_while_restoring(caught.value)
    with pytest.raises(ZeroDivisionError) as other:
        print(1 / 0)
    assert not loops.raised_while_restoring(other.value)


def test_a_trainer_is_between_steps_when_a_batch_ends_one(tmp_path: Path) -> None:
    class Between(Watch):
        def __init__(self) -> None:
            super().__init__()
            self.between: list[bool] = []

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            self.between.append(loops.between_steps(trainer))

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            self.between.append(loops.between_steps(trainer))

    watch = Between()
    make_trainer(tmp_path, watch, max_steps=2).fit(Line(), datamodule=Data())
    # Before and after each batch.
    expected = [at % BATCHES == 0 for batch in range(2 * BATCHES) for at in (batch, batch + 1)]
    assert watch.between == expected
