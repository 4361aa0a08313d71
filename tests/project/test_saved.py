"""Files that version 0.1.0 saved load, and give the numbers that it gave; ``tests/saved/make.py`` tells of each."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clip_m2df import CLIPM2DF, EpisodeDataModule, FewShotClassifier
from clip_m2df.cli import main

SAVED = Path(__file__).parents[1] / "saved"
EXPECTED: dict[str, Any] = json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))
with np.load(SAVED / "expected.npz") as file:
    ARRAYS = {name: torch.from_numpy(file[name]) for name in file.files}
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


def assert_same(found: Tensor, name: str) -> None:
    torch.testing.assert_close(found, ARRAYS[name], rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")


def load(name: str) -> CLIPM2DF:
    path = SAVED / name
    return CLIPM2DF.from_pretrained(path) if path.is_dir() else CLIPM2DF.load_from_checkpoint(f"{path}.ckpt").eval()


def logits_of(model: CLIPM2DF) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval().model.head(*(ARRAYS[name] for name in ("support", "query", "prompts"))).logits
    return logits


def measured(folder: Path) -> dict[str, Any]:
    """What a test measured, in the form of ``expected.json``."""
    (file,) = folder.rglob("metrics.csv")
    (row,) = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    confusion = list(csv.reader((folder / "test_confusion.csv").read_text(encoding="utf-8").splitlines()))
    metrics = {name: float(value) for name, value in row.items() if name.startswith("test/")}
    return {"metrics": metrics, "confusion": [list(map(int, row[1:])) for row in confusion[1:]]}


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
    with torch.no_grad():
        output = model.model.head(*(ARRAYS[key] for key in ("support", "query", "prompts")))
        assert_same(output.logits, f"{name}/logits")
        assert_same(output.prompt_probabilities, f"{name}/prompt_probabilities")
        assert_same(model.model.encode_frames(ARRAYS["frames"]), f"{name}/features")
    assert_same(model.encode_prompts(EXPECTED["class_names"]), f"{name}/prompt_table")


def test_a_saved_classifier_predicts_the_same(saved: Path) -> None:
    expected = EXPECTED["classifier"]
    classifier = FewShotClassifier.load("classifier", device="cpu")
    assert classifier.classes_.tolist() == expected["classes"]
    assert classifier.threshold_ == pytest.approx(expected["threshold"], rel=1e-5)
    reader = classifier.encoder.reader
    assert (reader.frames, reader.resize) == (expected["frames"], expected["resize"])
    assert classifier.model.text_fusion == expected["text_fusion"]
    assert classifier.model.model.head.selection == expected["selection"]
    proba = classifier.predict_proba(expected["queries"])
    np.testing.assert_allclose(proba, ARRAYS["classifier/predict_proba"], rtol=1e-4, atol=1e-5)
    assert classifier.predict(expected["queries"]).tolist() == expected["labels"]
    assert classifier.predict(expected["queries"], reject=True).tolist() == expected["labels_with_reject"]


def test_a_saved_run_is_tested_and_goes_on(saved: Path) -> None:
    assert_measures("test")
    Path("run/checkpoints").mkdir()
    shutil.copy("m2df.ckpt", "run/checkpoints/last.ckpt")
    assert main(["fit", "--config=run/config.yaml", "--ckpt_path=last", "--trainer.max_steps=3"]) == 0
    assert_same(logits_of(CLIPM2DF.load_from_checkpoint("run/checkpoints/last.ckpt")), "further/logits")


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
    data = EpisodeDataModule("videos/test.csv", cache="cache", n_way=2, frames=4, resize=36, size=32)
    data.setup("test")
    tested = [name for name in EXPECTED["mtime_ns"] if name.startswith("test")]
    frames = [data.reader.read(f"videos/{name}")[0] for name in tested[::3]]
    assert torch.equal(torch.stack(frames), ARRAYS["cache/frames"])


def test_a_saved_table_of_checked_videos_is_used(saved: Path) -> None:
    spoil("")
    before = Path("check.csv").read_text(encoding="utf-8")
    check = ["check", "--manifest=videos/manifest.csv", "--frames=4", "--workers=1", "--output=check.csv"]
    assert main(check) == 0
    assert Path("check.csv").read_text(encoding="utf-8") == before
