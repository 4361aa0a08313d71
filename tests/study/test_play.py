"""Real runs of a small study, from rendering to the page."""

import csv
import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from clip_m2df.cli import main
from clip_m2df.motion_shapes import rendering
from study.page import render
from study.play import configuration, play, render_videos
from study.results import Record, read_results
from study.schedule import run_study
from study.settings import FurtherTest, Part, Row, Run, Settings
from tests.study.test_schedule import ROWS, Inline

SHORT = {
    "trainer.max_steps": 2,
    "data.validate_every": 1,
    "data.val_episodes": 10,
    "data.test_episodes": 20,
    "data.train_augmentations": 1,
    "data.batch_size": 2,
    "data.episodes_per_step": 2,
}
MAIN = Part(
    ("scene",),
    (1, 5),
    (1e-3,),
    SHORT,
    ROWS,
    {"outliers": (1.0,)},
    ("CLIP-M²DF", "OTAM"),
)
TOWER = Part(
    ("scene",),
    (1,),
    (1e-3,),
    SHORT | {"model.freeze_backbone": False, "data.train_augmentations": 0},
    {row: ROWS[row] for row in ("CLIP-M²DF", "OTAM")},
)
LORA = Row({"model.adapters": {"r": 4}}, tower_rate=0.5)
ADAPTERS = dataclasses.replace(TOWER, rows={"LoRA": LORA})
SETTINGS = Settings((0, 1), 0, {"main": MAIN, "tower": TOWER, "adapters": ADAPTERS})
RUN = Run("main", "measure", "scene", "CLIP-M²DF", 1, 1e-3)


@pytest.fixture(scope="module", autouse=True)
def few_videos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_M2DF_CACHE", str(tmp_path_factory.mktemp("videos")))
        patch.setitem(rendering.VIDEOS_PER_CLASS, "scene", {"train": 4, "val": 2, "test": 6})
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, few_videos: None) -> tuple[Path, list[Record]]:
    """A folder with the results of the whole study and what its runs share, and the records."""
    folder = tmp_path_factory.mktemp("study")
    threads = torch.get_num_threads()
    try:
        run_study(SETTINGS, folder / "results.jsonl", folder, Inline())
    finally:
        torch.set_num_threads(threads)
    return folder, read_results(folder / "results.jsonl")


def accuracy(record: Record, test: str = "clean") -> float:
    outcome = record.tests[test]
    return sum(map(int, outcome.correct)) / len(outcome.correct) / outcome.n_queries


@pytest.mark.slow
def test_every_row_is_measured_on_the_same_number_of_episodes(study: tuple[Path, list[Record]]) -> None:
    _, records = study
    assert len(records) == len({(r.part, r.purpose, r.row, r.n_shot, r.seed) for r in records}) == 20
    for record in records:
        # Validated is with one shot, on the way.
        validated = record.lr and record.n_shot == 1 and not record.weights_of
        assert [point.episodes for point in record.curve] == ([2, 4] if validated else [])
        for test, outcome in record.tests.items():
            assert (len(outcome.correct), outcome.n_queries) == (20, 5), test
        if record.purpose == "measure":
            with_knobs = record.part == "main" and record.row != "sampled"
            assert set(record.tests) == ({"clean", "outliers=1.0"} if with_knobs else {"clean"})
        if record.row in ("CLIP-M²DF", "sampled") and record.tests:
            assert record.tests["clean"].view_agreement is not None
    # Support videos that are all outliers leave little to go by, to what looks at nothing else.
    otam = next(r for r in records if r.row == "OTAM" and r.n_shot == 5 and r.part == "main")
    assert accuracy(otam, "outliers=1.0") < accuracy(otam) - 0.1
    # A trained tower is another one for each seed, the frozen one's OTAM has nothing to differ in.
    assert len([r for r in records if r.row == "OTAM" and r.part == "tower" and r.purpose == "measure"]) == 2


@pytest.mark.slow
def test_unknown_queries_and_twins_are_tested_beside_the_clean_test(tmp_path: Path) -> None:
    twins = {"data.knobs.twins": 1.0}
    further = {
        "open set": FurtherTest({"data.unknown_queries": 3}),
        "twins, random": FurtherTest(twins),
        "twins, grouped": FurtherTest({**twins, "data.episodes": "grouped"}),
    }
    rows = {"OTAM": ROWS["OTAM"]}
    part = Part(("scene",), (1,), (1e-3,), SHORT, rows, further=further)
    settings = Settings((0, 1), 0, {"heads": part})
    render_videos(settings)
    (record,) = play(Run("heads", "measure", "scene", "OTAM", 0, None), settings, tmp_path)
    assert set(record.tests) == {"clean", *further}
    # Unknown queries change nothing of the others.
    opened = record.tests["open set"]
    assert opened.correct == record.tests["clean"].correct
    assert opened.options == "--data.unknown_queries 3"
    scores = {"distance", "probability", "margin", "energy"}
    assert {name.removeprefix("val/auroc/") for name in opened.metrics if name.startswith("val/")} == scores
    for measure in ("auroc", "oscr", "fpr95"):
        assert {name for name in opened.metrics if name.startswith(measure)} == {f"{measure}/{s}" for s in scores}
    assert all(opened.metrics[f"oscr/{score}"] <= accuracy(record, "open set") + 1e-5 for score in scores)
    assert record.tests["twins, random"].metrics["twin_share"] > 0.1
    assert record.tests["twins, grouped"].metrics["twin_share"] == 0


@pytest.mark.slow
def test_the_digits_are_the_accuracy_that_the_test_command_reports(
    study: tuple[Path, list[Record]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, records = study
    reported: list[float] = []
    test = Trainer.test

    def watched(*args: Any, **kwargs: Any) -> Any:
        metrics = test(*args, **kwargs)
        reported.append(metrics[0]["test/accuracy"])
        return metrics

    monkeypatch.setattr(Trainer, "test", watched)
    again = play(RUN, SETTINGS, folder)
    counted = [accuracy(record, test) for record in again for test in record.tests]
    assert counted == pytest.approx(reported, abs=1e-6)
    assert len(set(counted)) > 1
    # From the weights that the first time left behind; what comes of them is the same.
    before = {(r.row, r.n_shot): r for r in records if (r.part, r.purpose, r.seed) == ("main", "measure", 1)}
    for record in again:
        kept = before[record.row, record.n_shot]
        assert dataclasses.replace(record, seconds=0) == dataclasses.replace(kept, seconds=0)


@pytest.mark.slow
def test_the_pages_commands_give_the_accuracy_on_it(
    study: tuple[Path, list[Record]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [record for record in study[1] if record.part == "adapters"]
    render(records, "", tmp_path)
    lines = (tmp_path / "results_tables.md").read_text(encoding="utf-8").splitlines()
    fit, test = (shlex.split(line)[1:] for line in lines if line.startswith("clip-m2df "))
    assert "--model.adapters" in fit
    monkeypatch.chdir(tmp_path)
    for command in (fit, test):
        assert main([*command, "--trainer.accelerator", "cpu", "--data.num_workers", "0"]) == 0
    numbers = csv.reader((tmp_path / "runs/study/1/test_metrics.csv").read_text(encoding="utf-8").splitlines())
    (of_seed_0,) = (record for record in records if (record.purpose, record.seed) == ("measure", 0))
    assert float(dict(numbers)["test/accuracy"]) == pytest.approx(accuracy(of_seed_0), abs=1e-6)


@pytest.mark.slow
def test_a_run_repeats_without_what_others_left(study: tuple[Path, list[Record]], tmp_path: Path) -> None:
    _, records = study
    fresh = play(RUN, SETTINGS, tmp_path)
    kept = [r for r in records if (r.part, r.purpose, r.seed) == ("main", "measure", 1)]
    assert [r.tests for r in fresh] == [r.tests for r in kept if r.row != "OTAM"]
    assert [r.curve for r in fresh] == [r.curve for r in kept if r.row != "OTAM"]


def test_features_are_kept_where_heads_train_on_them_alone(tmp_path: Path) -> None:
    assert configuration(RUN, SETTINGS, tmp_path)["data"]["store"].startswith(str(tmp_path))
    tower = dataclasses.replace(RUN, part="tower")
    assert "store" not in configuration(tower, SETTINGS, tmp_path)["data"]
    # A frozen tower's head trains from frames too, where others that it is compared with have to.
    frozen = dataclasses.replace(TOWER, options={**TOWER.options, "model.freeze_backbone": True})
    from_frames = dataclasses.replace(SETTINGS, parts={"adapters": frozen})
    config = configuration(dataclasses.replace(RUN, part="adapters"), from_frames, tmp_path)
    assert config["model"]["freeze_backbone"]
    assert "store" not in config["data"]
