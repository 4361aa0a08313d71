"""Lightning's own callbacks in a run counted in optimiser steps: each works, or is refused by its name at start-up."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.tuner.tuning import Tuner

from benchmarks import soak
from clip_m2df import loops
from clip_m2df.cli import main
from clip_m2df.commands.trainer import run as run_command
from clip_m2df.evaluation.metrics import NAMES, OPEN_SET, TWINS
from clip_m2df.training.callbacks import RunProgressBar
from clip_m2df.training.checkpoints import FOLDER, LAST, PREVIOUS, read_checkpoint
from tests.conftest import fails, options, quiet_trainer
from tests.training.test_evaluation_from_bank import data
from tests.training.test_interruption import RUN, kill, step_of
from tests.training.test_module import make

OURS = "lightning.pytorch.callbacks."


def callback(name: str, **arguments: Any) -> list[str]:
    given = [f"--trainer.callbacks.{key}={value}" for key, value in arguments.items()]
    return [f"--trainer.callbacks+={OURS}{name}", *given]


REFUSED: dict[str, tuple[list[str], str]] = {
    "finetuning": (callback("BackboneFinetuning"), "give model.freeze_backbone"),
    "batch size": (callback("BatchSizeFinder"), "data.batch_size"),
    "accumulation": (callback("GradientAccumulationScheduler", scheduling="{0: 2}"), "give data.episodes_per_step"),
    "no accumulation": (callback("GradientAccumulationScheduler", scheduling="{0: 1, 1: 4}"), "data.episodes_per_step"),
    "rate": (callback("LearningRateFinder"), "give model.lr"),
    "pruning": (callback("ModelPruning", pruning_fn="l1_unstructured"), "torch.nn.utils.prune"),
    "spikes": (callback("SpikeDetection"), "a loss that is not finite ends a run"),
    "swa": (callback("StochasticWeightAveraging", swa_lrs="1e-2", swa_epoch_start=1), "take lightning"),
    "swa by default": (callback("StochasticWeightAveraging", swa_lrs="1e-2"), "EMAWeightAveraging"),
    "averages of epochs": (callback("EMAWeightAveraging", update_starting_at_epoch=0), "update_starting_at_step"),
    "stopping by epochs": (
        callback("EarlyStopping", monitor="val/accuracy", check_on_train_epoch_end="true"),
        "leave out check_on_train_epoch_end",
    ),
    "rates by epochs": (callback("LearningRateMonitor", logging_interval="epoch"), "logging_interval step"),
    "saving by epochs": (callback("ModelCheckpoint", every_n_epochs=2), "give every_n_train_steps"),
    "saving by time": (callback("ModelCheckpoint", train_time_interval="0:01:00"), "give every_n_train_steps"),
    "timer by epochs": (callback("Timer", interval="epoch"), "give interval step"),
    "unknown": (callback("EarlyStopping", monitor="val/acc"), "there is no metric 'val/acc'"),
    "of no stage": (callback("EarlyStopping", monitor="accuracy"), "there is no metric 'accuracy'"),
    "of a test": (callback("ModelCheckpoint", monitor="test/accuracy"), "val/… have accuracy, interval"),
    "without its metric": (callback("EarlyStopping"), "EarlyStopping: the following arguments are required: monitor"),
    "without its rates": (callback("StochasticWeightAveraging"), "arguments are required: swa_lrs"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("sanity", [0, 1])
def test_a_callback_that_would_not_do_its_work_is_refused_at_start_up(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path, case: str, sanity: int, capsys: pytest.CaptureFixture[str]
) -> None:
    given, remedy = REFUSED[case]
    own = [option for option in RUN if "sanity" not in option]
    more = [*own, f"--trainer.num_sanity_val_steps={sanity}", *given]
    said = fails(["fit", *options(manifest, tiny_clip_dir, tmp_path, *more)], capsys)
    assert given[0].removeprefix(f"--trainer.callbacks+={OURS}") in said
    assert remedy in said
    assert not (tmp_path / FOLDER).exists()


def test_every_callback_of_lightning_is_refused_or_tried() -> None:
    refused = {name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), tuple(loops.UNSUITED))}
    tried = {given[0].removeprefix(f"--trainer.callbacks+={OURS}") for given in WORKS.values()}
    # Those that others derive from, that only predict, and what needs a package that the tests do without.
    others = {"Callback", "Checkpoint", "ProgressBar", "BasePredictionWriter", "LambdaCallback", "ThroughputMonitor"}
    assert set(callbacks.__all__) == refused | tried | others | {"DeviceStatsMonitor"}


def test_a_metric_that_a_checkpoint_is_to_go_by_is_known_at_start_up(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fit", *options(manifest, tiny_clip_dir, tmp_path, *RUN)]
    assert "checkpoint.monitor: there is no metric 'val/acc'" in fails(
        [*arguments, "--checkpoint.monitor=val/acc"], capsys
    )
    # One of a loss that is off: seen at the first validation.
    said = fails([*arguments, *callback("EarlyStopping", monitor="val/loss/class")], capsys)
    assert "val/loss/class" in said


WORKS: dict[str, list[str]] = {
    "stopping": callback("EarlyStopping", monitor="val/loss/total", patience=9),
    "stopping by a training's loss": callback("EarlyStopping", monitor="train/loss/total", patience=9),
    "rates": callback("LearningRateMonitor"),
    "checkpoints": callback("ModelCheckpoint", every_n_train_steps=1, save_top_k=-1, filename="{step}"),
    "best": callback("ModelCheckpoint", monitor="val/loss/total", save_last="true"),
    "at an exception": callback("OnExceptionCheckpoint", dirpath="exception"),
    "timer": callback("Timer", duration="00:01:00:00"),
    "rich": [*callback("RichProgressBar"), "--trainer.enable_progress_bar=true"],
    "tqdm": [*callback("TQDMProgressBar"), "--trainer.enable_progress_bar=true"],
    "summary": callback("ModelSummary", max_depth=2),
    "rich summary": callback("RichModelSummary", max_depth=2),
    "averages": callback("WeightAveraging"),
    "moving averages": callback("EMAWeightAveraging", decay=0.9, update_every_n_steps=2),
}


@pytest.fixture(scope="module")
def alone(manifest: Path, tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert main(["fit", *options(manifest, tiny_clip_dir, folder, *RUN, "--trainer.log_every_n_steps=1")]) == 0
    return folder


@pytest.mark.parametrize("case", WORKS)
def test_a_callback_that_works_changes_no_step(
    alone: Path, manifest: Path, tiny_clip_dir: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    more = [*RUN, "--trainer.log_every_n_steps=1", *WORKS[case]]
    arguments = ["fit", *options(manifest, tiny_clip_dir, tmp_path, *more)]
    assert main([*arguments, "--trainer.max_steps=3"]) == 0
    assert main([*arguments, "--ckpt_path=last"]) == 0
    saved, expected = (read_checkpoint(folder / FOLDER / LAST) for folder in (tmp_path, alone))
    plain = saved.get("current_model_state", saved["state_dict"])
    assert all(torch.equal(weight, plain[name]) for name, weight in expected["state_dict"].items())
    assert saved["global_step"] == 6
    assert f"the best checkpoint is {tmp_path / FOLDER / 'best.ckpt'}, with val/accuracy" in capsys.readouterr().out
    if "checkpoints" in case:
        own = tmp_path.rglob("step=*.ckpt")
        assert {read_checkpoint(path)["global_step"] for path in own} == set(range(1, 7))


@pytest.mark.slow
@pytest.mark.parametrize("name", [LAST, PREVIOUS])
@pytest.mark.parametrize("kind", ["EMAWeightAveraging", "WeightAveraging"])
@pytest.mark.parametrize("ended", ["by itself", "by a signal", "with its last step"])
def test_a_run_that_averages_goes_on_as_if_left_alone(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path, name: str, kind: str, ended: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    averages = callback(kind, **({"decay": 0.9} if kind.startswith("EMA") else {}))
    arguments = options(manifest, tiny_clip_dir, tmp_path / "run", *RUN, "--model.lr=1e-3")
    whole = [o.replace(str(tmp_path / "run"), str(tmp_path / "alone")) for o in arguments]
    assert main(["fit", *whole, *averages]) == 0
    stop = {"by itself": ["--trainer.max_steps=4"], "by a signal": kill(9), "with its last step": kill(11)}[ended]
    assert main(["fit", *arguments, *averages, *stop]) == (0 if ended == "by itself" else 143)
    path = tmp_path / "run" / FOLDER / name
    assert "the run averages its weights" in fails(["fit", *arguments, f"--ckpt_path={path}"], capsys)
    assert main(["fit", *arguments, *averages, f"--ckpt_path={path}"]) == 0
    assert soak.differences(tmp_path / "alone", tmp_path / "run") == []
    saved = [read_checkpoint(tmp_path / folder / FOLDER / LAST) for folder in ("alone", "run")]
    for state in ("current_model_state", "averaging_state"):
        assert all(torch.equal(value, saved[1][state][key]) for key, value in saved[0][state].items())
    # The averages are what was validated, and are no copy of the weights.
    assert any(not torch.equal(v, saved[0]["state_dict"][k]) for k, v in saved[0]["current_model_state"].items())
    best = read_checkpoint(tmp_path / "run" / FOLDER / "best.ckpt")
    assert main(["test", *arguments, f"--ckpt_path={tmp_path / 'run' / FOLDER / LAST}"]) == 0
    assert best["state_dict"].keys() == saved[0]["state_dict"].keys()


def test_a_run_that_stops_early_stops_after_a_validation(manifest: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    more = callback("EarlyStopping", monitor="val/accuracy", patience=1, min_delta=2)
    assert main(["fit", *options(manifest, tiny_clip_dir, tmp_path, *RUN, *more)]) == 0
    assert step_of(tmp_path) == 4


def test_the_tuner_finds_a_rate_that_the_training_then_has(manifest: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    model, source = make(tiny_clip_dir, freeze_backbone=True), data(manifest, episodes_per_step=2, val_episodes=4)
    rates = callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, *_: seen.append(trainer.optimizers[0].param_groups[0]["lr"])
    )
    seen: list[float] = []
    trainer = quiet_trainer(tmp_path, max_steps=3, limit_val_batches=0, callbacks=[rates], enable_checkpointing=False)
    found = Tuner(trainer).lr_find(model, source, num_training=40, min_lr=1e-5, max_lr=1e-1)
    assert found is not None
    seen.clear()
    trainer.fit(model, source)
    assert set(seen) == {found.suggestion()} == {model.lr}


def test_the_progress_bar_counts_optimiser_steps(manifest: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    arguments = [f"--config={Path(__file__).parents[2] / 'configs' / 'demo_5way1shot.yaml'}"]
    arguments += [
        o
        for o in options(manifest, tiny_clip_dir, tmp_path, *RUN)[1:]
        if not o.startswith("--trainer.enable_progress_bar")
    ]
    for more in (["--trainer.max_steps=4"], ["--ckpt_path=last"]):
        bar = run_command(["fit", *arguments, *more]).trainer.progress_bar_callback
        assert isinstance(bar, RunProgressBar)
        steps = 4 if "max_steps" in more[0] else 6
        assert (bar.train_progress_bar.completed, bar.train_progress_bar.total) == (steps, steps)


def test_what_is_logged_has_the_names_that_are_told(manifest: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    arguments = [f"--config={Path(__file__).parents[2] / 'configs' / 'demo_5way1shot.yaml'}"]
    arguments += [*options(manifest, tiny_clip_dir, tmp_path, *RUN)[1:], "--trainer.log_every_n_steps=1"]
    logged = run_command(["fit", *arguments, "--model.class_weight=1"]).trainer.callback_metrics
    # The manifest has no groups, and no episode unknown queries.
    names = set(NAMES) - {*TWINS, *OPEN_SET}
    assert set(logged) == {f"{stage}/{name}" for stage in ("train", "val") for name in names}
