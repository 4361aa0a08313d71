"""Files of earlier versions load, and give the numbers that they gave.

Those of version 0.1.0 are told of in ``tests/saved/make.py``, those with a calibration in ``make_calibrated.py``.
"""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clip_m2df import CLIPM2DF, FewShotClassifier
from clip_m2df.cli import main
from clip_m2df.nn.views import Dropout
from tests.saved.make import cached_frames, described, measured, numbers_of
from tests.saved.make_calibrated import LABELS, sets_of

SAVED = Path(__file__).parents[1] / "saved"
EXPECTED: dict[str, Any] = json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))
ARRAYS: dict[str, NDArray[Any]] = dict(np.load(SAVED / "expected.npz"))
RENAMED = {"heads": "num_heads"}


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files in the working directory, the videos as old as they were."""
    folder = shutil.copytree(SAVED, tmp_path / "saved")
    for name, time in EXPECTED["mtime_ns"].items():
        os.utime(folder / "videos" / name, ns=(time, time))
    monkeypatch.chdir(folder)
    return folder


def spoil(split: str) -> None:
    """Make the videos unreadable behind the back of those who know them by their size and time."""
    for path in Path("videos").glob(f"{split}*.mp4"):
        time = path.stat().st_mtime_ns
        path.write_bytes(bytes(path.stat().st_size))
        os.utime(path, ns=(time, time))


def assert_same(found: NDArray[Any], name: str) -> None:
    assert (found.shape, found.dtype) == (ARRAYS[name].shape, ARRAYS[name].dtype)
    np.testing.assert_allclose(found, ARRAYS[name], rtol=1e-5, atol=1e-6, err_msg=name)


def load(name: str) -> CLIPM2DF:
    path = SAVED / name
    return CLIPM2DF.from_pretrained(path) if path.is_dir() else CLIPM2DF.load_from_checkpoint(f"{path}.ckpt")


def assert_measures(expected: str, *options: str) -> None:
    """Test the checkpoint of the run with its own config and more options."""
    command = ["test", "--config=run/config.yaml", "--ckpt_path=m2df.ckpt", "--trainer.default_root_dir=measured"]
    assert main([*command, *options]) == 0
    found = measured(Path("measured"))
    assert found["confusion"] == EXPECTED[expected]["confusion"]
    assert found["metrics"] == pytest.approx(EXPECTED[expected]["metrics"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["m2df", "clip_fsar", "pretrained", "classifier"])
def test_a_saved_model_gives_the_same_numbers(name: str) -> None:
    model = load(name)
    head_options = {RENAMED.get(key, key): value for key, value in EXPECTED["head_options"][name].items()}
    assert model.hparams["head_options"] == head_options
    assert model.reading == EXPECTED["reading"][name]
    for key, found in numbers_of(name, model, ARRAYS).items():
        assert_same(found, key)


def test_a_saved_classifier_predicts_the_same(saved: Path) -> None:
    expected = EXPECTED["classifier"]
    classifier = FewShotClassifier.load("classifier", device="cpu")
    # 0.1.0 counted distances from another point: what two of the same picture have was below 0.
    least = classifier.model.model.head.least_distance(expected["frames"])
    assert described(classifier, expected["queries"]) == {
        **expected,
        "threshold": pytest.approx(expected["threshold"] - least, abs=1e-5 * abs(expected["threshold"])),
    }
    proba = classifier.predict_proba(expected["queries"])
    np.testing.assert_allclose(proba, ARRAYS["classifier/predict_proba"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["checkpoint", "folder"])
def test_a_saved_calibration_gives_the_same_sets(name: str) -> None:
    expected = dict(np.load(SAVED / "calibrated.npz"))
    support, queries = (torch.from_numpy(expected[key]) for key in ("support", "queries"))
    if name == "folder":
        classifier = FewShotClassifier.load(SAVED / "calibrated", device="cpu")
    else:
        classifier = FewShotClassifier.from_checkpoint(SAVED / "calibrated.ckpt", device="cpu")
        assert classifier.calibration is not None
        np.testing.assert_array_equal(classifier.calibration.settings, expected["settings"])
        np.testing.assert_array_equal(classifier.calibration.thresholds, expected["thresholds"])
        classifier.fit(dict(zip(LABELS, map(list, support), strict=True)))
    np.testing.assert_array_equal(sets_of(classifier, queries), expected[f"{name}/sets"])


def test_a_saved_run_is_tested_and_goes_on(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_measures("test")
    monkeypatch.setattr(Dropout, "forward", lambda self, x: x)  # its draws are not those of 0.1.0
    Path("run/checkpoints").mkdir()
    shutil.copy("m2df.ckpt", "run/checkpoints/last.ckpt")
    assert main(["fit", "--config=run/config.yaml", "--ckpt_path=last", "--trainer.max_steps=3"]) == 0
    model = CLIPM2DF.load_from_checkpoint("run/checkpoints/last.ckpt")
    assert_same(numbers_of("further", model, ARRAYS)["further/logits"], "further/logits")


@pytest.mark.parametrize("option", ["resize_mode=squash", "sampling=random_segments"])
def test_a_saved_run_goes_on_with_videos_read_as_they_were(
    saved: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of its version, which knew one way to read them."""
    Path("run/checkpoints").mkdir()
    shutil.copy("m2df.ckpt", "run/checkpoints/last.ckpt")
    more = ["--ckpt_path=last", "--trainer.max_steps=3", f"--data.{option}"]
    assert main(["fit", "--config=run/config.yaml", *more]) == 2
    was = "short_side" if "resize" in option else "segments"
    name, _, value = option.partition("=")
    assert f"data.{name} is '{value}', but '{was}' in the run that is to go on" in capsys.readouterr().err


def test_without_a_bank_a_saved_run_measures_the_same(saved: Path) -> None:
    assert_measures("test_direct", "--data.evaluation=direct")


def test_saved_features_are_used(saved: Path) -> None:
    spoil("test")
    before = {path.name: path.read_bytes() for path in Path("store").iterdir()}
    assert_measures("test", "--data.store=store")
    assert {path.name: path.read_bytes() for path in Path("store").iterdir()} == before


def test_a_saved_cache_and_saved_episodes_are_used(saved: Path) -> None:
    spoil("test")
    cached = ("--data.manifest=videos/test.csv", "--data.cache=cache")
    assert_measures("test_of_episodes", *cached, "--data.episodes_file=episodes.jsonl")
    tested = [name for name in EXPECTED["mtime_ns"] if name.startswith("test")]
    np.testing.assert_array_equal(cached_frames(tested), ARRAYS["cache/frames"])


def test_a_saved_table_of_checked_videos_is_used(saved: Path) -> None:
    spoil("")

    def rows() -> list[dict[str, str]]:
        return list(csv.DictReader(Path("check.csv").read_text(encoding="utf-8").splitlines()))

    before = rows()
    check = ["check", "--manifest=videos/manifest.csv", "--frames=4", "--workers=1", "--output=check.csv"]
    assert main(check) == 0
    # Columns that came later are empty.
    assert rows() == [{**row, "group": "", "looks": ""} for row in before]
