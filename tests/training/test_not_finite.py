"""Trainings, checkpoints and scores that are no finite numbers: refused, and nothing good is written over."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors.torch import load_file, save_file

from clip_m2df import CLIPM2DF, CLIPBackbone, M2DFHead, UserError
from clip_m2df.cli import main
from clip_m2df.files import sha256_of
from clip_m2df.nn.baselines import HEADS
from clip_m2df.nn.weights import check_finite
from clip_m2df.training.checkpoints import BEST, FOLDER, LAST, PREVIOUS, read_checkpoint
from tests.conftest import fails, options, quiet_trainer
from tests.nn.test_m2df import published_head
from tests.training.test_evaluation_from_bank import data
from tests.training.test_interruption import RUN, step_of
from tests.training.test_many_devices import run_two  # noqa: F401 - a fixture
from tests.training.test_module import make, make_episodes

BAD = (math.nan, math.inf, -math.inf)


class Break(lightning.Callback):
    """Writes a value into one weight of the head.

    Args:
        batch: before which batch of the training.
        value: the value, which YAML may not take for a number.
        rank: on which rank.
    """

    def __init__(self, batch: int, value: str, rank: int = 0) -> None:
        self.batch, self.value, self.rank = batch, float(value), rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            next(pl_module.model.head.views.parameters()).data.view(-1)[0] = self.value


class BreakBeforeSaving(Break):
    """The same after a batch: the loss of the step was sound."""

    def on_train_batch_start(self, *_: Any) -> None:
        pass

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


class Score(lightning.Callback):
    """Logs a score of its own, NaN at the first validation, and lower at each after it."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        score = math.nan if trainer.global_step <= 2 else -float(trainer.global_step)
        pl_module.log("score", score, rank_zero_only=False, sync_dist=False)


def callback(kind: type[lightning.Callback], **arguments: Any) -> list[str]:
    name = f"--trainer.callbacks+={__name__}.{kind.__name__}"
    return [name, *(f"--trainer.callbacks.{key}={value}" for key, value in arguments.items())]


def kept(folder: Path) -> dict[str, int]:
    """The steps of a run's checkpoints, all of whose weights are finite."""
    steps = {}
    for path in (folder / FOLDER).glob("*.ckpt"):
        checkpoint = read_checkpoint(path)
        assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values()), path
        steps[path.name] = int(checkpoint["global_step"])
    return steps


# Six optimiser steps of two batches each, validated after every second: in the fourth step, before the validation of
# the fourth, and with the last; the value, where it is no NaN, makes the loss one.
@pytest.mark.parametrize("value", [*BAD, 1e38])
@pytest.mark.parametrize(
    ("kind", "batch", "step"),
    [(Break, 6, 4), (Break, 7, 4), (BreakBeforeSaving, 7, 4), (BreakBeforeSaving, 11, 6)],
)
def test_a_training_that_is_not_finite_ends_with_its_step_and_keeps_what_was_saved(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path, kind: type[Break], batch: int, step: int, value: float,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    more = ["--checkpoint.every=1", *callback(kind, batch=batch, value=value)]
    said = fails(["fit", *options(manifest, tiny_clip_dir, tmp_path, *RUN, *more)], capsys)
    assert f"optimiser step {step}: the " in said
    assert "not finite (NaN or infinite); what was saved before is kept" in said
    assert "a lower model.lr" in said
    steps = kept(tmp_path)
    # 1e38 is a number itself, and saved as one where the loss does not tell.
    last = step if kind is BreakBeforeSaving and value == 1e38 else step - 1
    assert steps == {BEST: steps[BEST], LAST: last, PREVIOUS: last - 1}
    assert steps[BEST] <= last


@pytest.mark.parametrize("lr", ["1e10", "1e30"])
def test_a_rate_that_is_too_high_ends_a_training_before_it_is_validated(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path, lr: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(["fit", *options(manifest, tiny_clip_dir, tmp_path, *RUN, f"--model.lr={lr}")], capsys)
    assert "not finite" in said
    assert not kept(tmp_path)


def test_half_precision_that_turns_weights_into_nan_is_named(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--model.lr=1e-3", "--trainer.precision=16-true"]
    said = fails(["fit", *options(manifest, tiny_clip_dir, tmp_path, *RUN, *more)], capsys)
    assert "trainer.precision bf16-mixed in the place of 16-true" in said
    assert not kept(tmp_path)


@pytest.mark.parametrize("limit", [0, 1.0])
def test_without_a_checkpoint_callback_a_training_ends_too(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path, limit: float
) -> None:
    trainer = quiet_trainer(
        tmp_path, max_steps=4, limit_val_batches=limit, callbacks=[Break(2, "nan")], enable_checkpointing=False
    )
    with pytest.raises(UserError, match="optimiser step 3: the loss is not finite"):
        trainer.fit(make(tiny_clip_dir), data(manifest, episodes_per_step=1, batch_size=1, val_episodes=4))


def test_a_model_that_is_not_finite_is_not_saved_as_a_folder(tiny_clip_dir: Path, tmp_path: Path) -> None:
    model = make(tiny_clip_dir)
    model.model.head.scale.data.fill_(math.nan)
    with pytest.raises(UserError, match=r"the model's weights are not finite .*: a training"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_steps_that_a_gradient_scaler_skips_end_no_training_but_very_many_do(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    source = data(manifest, episodes_per_step=1, batch_size=1, val_episodes=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    run: dict[str, Any] = {"limit_val_batches": 0, "enable_checkpointing": False, "accelerator": "cpu"}
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = quiet_trainer(tmp_path, max_steps=6, plugins=[plugin], **run)
    model = make(tiny_clip_dir)
    before = {name: weight.clone() for name, weight in model.model.head.state_dict().items()}
    trainer.fit(model, source)
    assert scaler.get_scale() <= 2.0**122  # halved by the steps that were skipped
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.head.state_dict().items())

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1.0))
    trainer = quiet_trainer(tmp_path, max_steps=60, plugins=[plugin], callbacks=[Break(3, "1e38")], **run)
    with pytest.raises(UserError, match="optimiser step 24: the loss is not finite"):
        trainer.fit(make(tiny_clip_dir), source)


def test_a_score_that_is_not_a_number_is_never_the_best(manifest: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    more = ["--checkpoint.monitor=score", *callback(Score)]
    assert main(["fit", *options(manifest, tiny_clip_dir, tmp_path, *RUN, *more)]) == 0
    assert step_of(tmp_path, BEST) == 4


# What is loaded


def filled(source: Path, target: Path, value: float, name: str = "") -> Path:
    """A checkpoint with a value in all weights, or in one element of one of them."""
    checkpoint = read_checkpoint(source)
    for key, weight in checkpoint["state_dict"].items():
        if weight.is_floating_point() and not name:
            weight.fill_(value)
        elif key == name:
            weight.view(-1)[-1] = value
    torch.save(checkpoint, target)
    return target


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["", "model.head.views.global.context.blocks.0.conv1.bias"])
def test_weights_that_are_not_finite_are_not_loaded(
    manifest: Path, tiny_clip_dir: Path, fitted: Path, tmp_path: Path, value: float, name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bad = filled(fitted / FOLDER / BEST, tmp_path / "bad.ckpt", value, name)
    with pytest.raises(UserError, match=r"the weights model\..* are not finite \(NaN or infinite\)"):
        CLIPM2DF.load_from_checkpoint(bad)
    for command in ("fit", "validate", "test"):
        said = fails([command, *options(manifest, tiny_clip_dir, tmp_path / "run", f"--ckpt_path={bad}")], capsys)
        assert "not finite" in said
        assert str(bad) in said


@pytest.mark.parametrize("value", BAD)
def test_weights_of_other_sources_that_are_not_finite_are_not_loaded(
    tiny_clip_dir: Path, tmp_path: Path, value: float
) -> None:
    # A folder of save_pretrained, whose checksum is right.
    folder = tmp_path / "model"
    make(tiny_clip_dir).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["model.head.scale"].fill_(value)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = sha256_of(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the weights model.head.scale of .* are not finite"):
        CLIPM2DF.from_pretrained(folder)
    # A backbone; a value that float32 can't hold is none.
    shutil.copytree(tiny_clip_dir, tmp_path / "clip")
    state = load_file(tmp_path / "clip" / "model.safetensors")
    name = "vision_model.post_layernorm.weight"
    state[name] = state[name].double()
    state[name][0] = value if value != -math.inf else -1e300
    save_file(state, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} is not finite"):
        CLIPBackbone.load(str(tmp_path / "clip"))


def test_a_published_head_that_is_not_finite_is_not_loaded() -> None:
    state = published_head(dim=32)
    state["tcn.network.0.conv1.weight_v"].view(-1)[0] = math.nan
    with pytest.raises(UserError, match=r"views\.global\.context\.blocks\.0\.conv1\S* of .* are not finite"):
        M2DFHead.from_published(state)


# Weights that are numbers, and too large, or that give none by normalising.
@pytest.mark.parametrize("evaluation", ["bank", "direct"])
@pytest.mark.parametrize("value", [1e38, -1e38, 1e20, 0.0])
def test_scores_that_are_not_finite_are_no_result(
    manifest: Path, tiny_clip_dir: Path, fitted: Path, tmp_path: Path, value: float, evaluation: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bad = filled(fitted / FOLDER / BEST, tmp_path / "bad.ckpt", value)
    more = [f"--ckpt_path={bad}", f"--data.evaluation={evaluation}", f"--report={tmp_path / 'report.html'}"]
    said = fails(["test", *options(manifest, tiny_clip_dir, tmp_path / "run", *more)], capsys)
    assert "the scores of the test episodes are not finite" in said
    assert not (tmp_path / "report.html").exists()
    assert not list(tmp_path.glob("run/test_*.csv"))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("value", [1e38, -1e38, 1e10])
def test_every_head_tells_weights_that_are_too_large_by_its_scores(
    tiny_clip_dir: Path, head: str, value: float
) -> None:
    model = make(tiny_clip_dir, head=head).eval()
    for weight in model.parameters():
        weight.data.fill_(value)
    with torch.no_grad(), pytest.raises(UserError, match="the scores of a clip are not finite"):
        check_finite(model(make_episodes(2)).logits, "a clip")


@pytest.mark.parametrize("value", [0.0, -3e38, 1e-45])
def test_finite_scores_pass(value: float) -> None:
    check_finite(torch.full((2, 3), value), "a clip")


# Several devices


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_end_where_one_is_not_finite(
    run_two: Callable[..., str],  # noqa: F811
    tmp_path: Path,
    rank: int,
) -> None:
    breaks = callback(Break, batch=4, value=math.nan, rank=rank)
    said = run_two(2, [[], []], "--data.episodes_per_step=4", "--data.validate_every=2", *breaks)
    assert said.count("optimiser step 3: the loss is not finite") >= 1
    assert kept(tmp_path / "run")[LAST] == 2
