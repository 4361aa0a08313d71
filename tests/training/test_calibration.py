"""The end of fit: sets of labels are calibrated on val, and checkpoints keep the calibration."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_m2df import CLIPM2DF, EpisodeDataModule
from clip_m2df.cli import main
from clip_m2df.datasets.feature_tables import read_feature_table, write_feature_table
from clip_m2df.evaluation.conformal import calibrate
from clip_m2df.nn.baselines import NearestPrototypeHead
from clip_m2df.nn.head import Embedded, HeadOutput
from clip_m2df.nn.prompts import SelectedPrompts
from clip_m2df.training.checkpoints import read_checkpoint
from tests.conftest import fails, quiet_trainer
from tests.training.test_from_feature_tables import DIM, FRAMES, LABELS, SHAPE, embeddings, features, rows_of

# The source of each video of a class, by its number.
PAIRED = str.maketrans("012345", "aabbcc")


class Learning(NearestPrototypeHead):
    """Has something to train; asks the process to end in the middle of a calibration, if it is armed."""

    trained = True
    armed = False

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.weights = torch.nn.Parameter(torch.ones(dim))

    def embed(self, videos: Tensor, prompt: Tensor | None) -> Embedded:
        return Embedded(frames=videos * self.weights)

    def match(self, query: Embedded, prototypes: Embedded, selected: SelectedPrompts) -> HeadOutput:
        if type(self).armed and prototypes["frames"].shape[-3] == 2:  # the run's own episodes have three classes
            os.kill(os.getpid(), signal.SIGTERM)
        return super().match(query, prototypes, selected)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return features(tmp_path_factory.mktemp("table") / "own.safetensors", embeddings())


def run(command: str, table: Path, folder: Path, *more: str, steps: int = 4) -> list[str]:
    head = f"{__name__}.Learning"
    options = [f"--data.manifest={table}", f"--model.head={head}", "--model.lr=0.1", "--data.num_workers=0"]
    options += [f"--data.{name}={value}" for name, value in SHAPE.items()]
    options += [f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu"]
    options += ["--trainer.enable_progress_bar=false", "--dashboard.figures=false"]
    return [command, *options, *([f"--trainer.max_steps={steps}"] if command == "fit" else []), *more]


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    return read_checkpoint(folder / "checkpoints" / f"{name}.ckpt")


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        # Some are called by files, in the folder of the run.
        assert [os.path.basename(str(key)) for key in found] == [os.path.basename(str(key)) for key in expected]
        for a, b in zip(found.values(), expected.values(), strict=True):
            assert_same(a, b)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, Tensor):
        assert found.equal(expected)
    elif not (isinstance(expected, str) and os.sep in expected):  # of the run's folder
        assert found == expected


def test_fit_calibrates_best_and_last_with_their_own_weights(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run("fit", table, tmp_path)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "calibrated on val for 2 to 4 classes with 1, 3, 5 examples; val has too few videos of a class for 10" in said
    )
    assert "with a promise for rates from 0.2 on" in said
    val = [(row, label) for row, label in enumerate(LABELS) if label.startswith("val")]
    content = read_feature_table(table)
    rows = [(video.path, video.label) for video in content.manifest.videos if video.split == "val"]
    of_val = content.of([(path, 0) for path, _ in rows])
    videos = [[i for i, (_, own) in enumerate(rows) if own == label] for _, label in val]
    prompts = torch.stack([embeddings()[label] for _, label in val])
    for name in ("best", "last"):
        model = CLIPM2DF.load_from_checkpoint(
            tmp_path / "checkpoints" / f"{name}.ckpt", head=f"{__name__}.Learning"
        ).eval()
        assert model.calibration is not None
        assert model.calibration.goes_by == {"selection": "argmax", "text_fusion": 0.0, "frames": FRAMES}
        expected = calibrate(model.model.head, of_val, prompts, videos, n_shots=[1, 3, 5])
        assert expected is not None
        assert model.calibration.settings.equal(expected.settings)
        torch.testing.assert_close(model.calibration.thresholds, expected.thresholds)
        # With 4 classes of val an error rate of 1/5 is the least that there can be a promise for.
        assert model.calibration.at(3, 1, 0.2).known < torch.inf
        assert model.calibration.at(3, 1, 0.19).known == torch.inf


def test_a_run_that_is_ended_in_its_calibration_has_its_checkpoints_as_they_were_and_goes_on(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    assert main(run("fit", table, whole)) == 0
    monkeypatch.setattr(Learning, "armed", True)
    assert main(run("fit", table, ended)) == 128 + signal.SIGTERM
    assert "validate --calibrate calibrates it" in capsys.readouterr().err
    monkeypatch.setattr(Learning, "armed", False)
    for name in ("best", "last"):
        left_alone = checkpoint(whole, name)
        assert left_alone.pop("calibration")["settings"].shape == (9, 3)
        assert_same(checkpoint(ended, name), left_alone)
    assert not list((ended / "checkpoints").glob("*.part"))
    assert main(run("validate", table, ended, "--ckpt_path=best", "--calibrate=[1,3,5,10]")) == 0
    assert_same(checkpoint(ended, "best"), checkpoint(whole, "best"))
    assert main(run("fit", table, ended, "--ckpt_path=last", steps=6)) == 0
    assert checkpoint(ended, "last")["global_step"] == 6
    assert "calibration" in checkpoint(ended, "last")


def test_of_clips_of_one_source_a_calibration_takes_one(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six videos a class, two of each source."""
    grouped = tmp_path / "grouped.safetensors"
    rows = [row | {"group": row["path"].rpartition("/")[2][0].translate(PAIRED)} for row in rows_of(6)]
    content = read_feature_table(table)
    numbers = content.of([(video.path, 0) for video in content.manifest.videos])
    write_feature_table(grouped, rows, numbers, embeddings())
    assert main(run("fit", grouped, tmp_path / "run")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "for 2 to 4 classes with 1 example; val has too few videos of a class for 3, 5, 10" in said


def test_validate_calibrates_for_other_numbers_of_examples(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run("fit", table, tmp_path)) == 0
    before = checkpoint(tmp_path, "best")
    assert main(run("validate", table, tmp_path, "--ckpt_path=best", "--calibrate=[2,4]")) == 0
    after = checkpoint(tmp_path, "best")
    assert sorted({*after["calibration"]["settings"][:, 1].tolist()}) == [2, 4]
    assert_same({**after, "calibration": None}, {**before, "calibration": None})
    assert "calibrate" in fails(run("validate", table, tmp_path, "--ckpt_path=best", "--calibrate=[0]"), capsys)
    assert "numbers of examples" in fails(
        run("validate", table, tmp_path, "--ckpt_path=best", "--calibrate=[]"), capsys
    )
    assert_same(checkpoint(tmp_path, "best"), after)
    said = fails(run("validate", table, tmp_path, "--ckpt_path=best", "--calibrate=[9]"), capsys)
    assert "can't be calibrated for 9 examples: no two classes of val have 10 videos" in said
    assert_same(checkpoint(tmp_path, "best"), after)
    # A number that is given twice counts once, and leaves a checkpoint that can be read.
    assert main(run("validate", table, tmp_path, "--ckpt_path=best", "--calibrate=[2,4,2]")) == 0
    assert_same(checkpoint(tmp_path, "best"), after)
    assert main(run("validate", table, tmp_path, "--ckpt_path=best")) == 0


def test_fit_calibrates_for_the_numbers_of_its_own_callback_and_for_none_not_at_all(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "--trainer.callbacks+=clip_m2df.training.callbacks.Calibrator"
    assert main(run("fit", table, tmp_path / "none", own, "--trainer.callbacks.n_shots=[]")) == 0
    assert "calibrated" not in capsys.readouterr().out
    assert main(run("fit", table, tmp_path / "other", own, "--trainer.callbacks.n_shots=[2]")) == 0
    for name in ("best", "last"):
        other = checkpoint(tmp_path / "other", name)
        assert {*other["calibration"]["settings"][:, 1].tolist()} == {2}
        assert "calibration" not in checkpoint(tmp_path / "none", name)
    refused = run("fit", table, tmp_path / "refused", own, "--trainer.callbacks.n_shots=[0]")
    assert "n_shots" in fails(refused, capsys)


def test_a_training_that_goes_on_leaves_the_calibration_of_former_weights_behind(table: Path, tmp_path: Path) -> None:
    assert main(run("fit", table, tmp_path)) == 0
    model = CLIPM2DF.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt", head=f"{__name__}.Learning")
    assert model.calibration is not None
    fresh = CLIPM2DF("features", {"dim": DIM}, head=f"{__name__}.Learning", lr=0.1)
    data = EpisodeDataModule(str(table), **SHAPE)
    fit = quiet_trainer(tmp_path / "more", max_steps=6)
    fit.fit(fresh, data, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert fit.global_step == 6
    assert fresh.calibration is None


def test_a_damaged_calibration_is_refused(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run("fit", table, tmp_path)) == 0
    content = checkpoint(tmp_path, "best")
    content["calibration"]["thresholds"] = content["calibration"]["thresholds"][:2]
    torch.save(content, tmp_path / "other.ckpt")
    said = fails(run("test", table, tmp_path, f"--ckpt_path={tmp_path / 'other.ckpt'}"), capsys)
    assert "the calibration is damaged" in said
