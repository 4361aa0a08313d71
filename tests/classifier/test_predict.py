"""``clip-m2df predict``, through the command itself."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor

from clip_m2df import CLIPM2DF, FewShotClassifier
from clip_m2df.classifier import encoding
from clip_m2df.cli import UNTRAINED_HEADS, main
from clip_m2df.data.episodes import ClipReader
from clip_m2df.data.motion_shapes.rendering import write_video
from clip_m2df.nn.heads import HEADS, head_class
from tests.data import clips

# Names that a table may trip over; "[red]" is markup to what prints the summary.
LABELS = ('a, "b"', "läuft – 走る", "x [red]y")


def paint(path: Path, hue: int, seed: int, frames: int = 12) -> Path:
    """A video of 48 x 32 pixels in which a block moves over noise, both tinted."""
    rng = np.random.default_rng(seed)
    shown = rng.integers(0, 90, (frames, 32, 48, 3), dtype=np.uint8)
    shown[..., hue] += 90
    for number, frame in enumerate(shown):
        frame[8:24, (2 * number) % 40 : (2 * number) % 40 + 8, (hue + 1) % 3] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, shown)
    return path


@pytest.fixture(scope="module")
def support(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of two examples."""
    root = tmp_path_factory.mktemp("support")
    for hue, label in enumerate(LABELS):
        for k in range(2):
            paint(root / label / f"{k}.mp4", hue, 10 * hue + k)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos, one of them in a folder of its own; nobody may change them."""
    root = tmp_path_factory.mktemp("clips")
    for k in range(5):
        paint(root / f"{k}.mp4", k % 3, 100 + k)
    paint(root / "inner" / "é, deep.mp4", 2, 105)
    return root


def args(support: Path, videos: Sequence[object], output: Path, *more: str) -> list[str]:
    """Of a run without training, which reads files in this process."""
    model = [] if {"--ckpt_path", "--backbone"} & set(more) else ["--backbone", "tiny"]
    workers = [] if "--workers" in more else ["--workers", "0"]
    shown = [str(video) for video in videos]
    return ["predict", *model, "--support", str(support), "--videos", *shown, "--output", str(output), *workers, *more]


def reference(support: Path, head: str = "otam") -> FewShotClassifier:
    return FewShotClassifier(CLIPM2DF(backbone="tiny", head=head, freeze_backbone=True)).fit(support)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def videos_of(folder: Path) -> list[str]:
    return [*(str(folder / f"{k}.mp4") for k in range(5)), str(folder / "inner" / "é, deep.mp4")]


def fails(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with status 2."""
    capsys.readouterr()
    try:
        status: object = main(arguments)
    except SystemExit as ended:  # argparse's own
        status = ended.code
    assert status == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.fixture
def labelled(monkeypatch: pytest.MonkeyPatch) -> Labelled:
    """Watches over ``classify``."""
    watched = Labelled()
    own = FewShotClassifier.classify

    def classify(self: FewShotClassifier, paths: Sequence[Any], **options: Any) -> Iterator[Any]:
        for k, (place, prediction) in enumerate(own(self, paths, **options)):
            if k == watched.most:
                raise KeyboardInterrupt
            watched.names.append(os.path.basename(paths[place]))
            yield place, prediction

    monkeypatch.setattr(FewShotClassifier, "classify", classify)
    return watched


class Labelled:
    """Names of the videos that were labelled, and after how many of a run a person loses patience."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.most = -1

    def forget(self) -> list[str]:
        names, self.names = self.names, []
        return names


# Tables


@pytest.mark.parametrize("head", [None, "nearest_prototype"])
def test_the_tables_say_what_the_classifier_says(
    head: str | None, support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [] if head is None else ["--head", head]
    table, lines = tmp_path / "deep" / "labels.csv", tmp_path / "labels.jsonl"
    assert main(args(support, [folder], table, *more)) == 0
    printed = capsys.readouterr()
    assert main(args(support, [folder], lines, *more)) == 0
    paths = videos_of(folder)
    expected = dict(reference(support, head or "otam").classify(paths))
    assert len({p.label for p in expected.values()}) == 3  # a table of one label would show little
    rows = read_csv(table)
    assert list(rows[0]) == ["path", "label", "probability", *(f"p_{label}" for label in LABELS), "error"]
    assert [row["path"] for row in rows] == paths
    for place, row in enumerate(rows):
        said = expected[place]
        assert row["label"] == said.label
        assert row["probability"] == f"{said.probability:.6f}"
        assert [row[f"p_{label}"] for label in LABELS] == [f"{said.probabilities[label]:.6f}" for label in LABELS]
        assert row["error"] == ""
    as_lines = read_lines(lines)
    assert [list(row) for row in as_lines] == [list(row) for row in rows]
    for line, row in zip(as_lines, rows, strict=True):
        numbers = {name: float(row[name]) for name in row if name.startswith("p_") or name == "probability"}
        assert line == {**row, **numbers, "error": None}
    assert b"\r" not in table.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "labels.jsonl"}
    assert "x [red]y " in printed.out
    assert f"the predictions are in {table}" in printed.out.replace("\n", "")
    assert "labelling" in printed.err


def test_rows_come_in_the_order_of_the_arguments_and_a_file_has_one(
    support: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(9):
        clips.save_image(images / f"{number}.png", 7 * number, size=(48, 32))
    videos = ["4.mp4", str(images), "inner", str(folder / "4.mp4"), ".", "inner/../0.mp4"]
    assert main(args(support, videos, tmp_path / "labels.csv")) == 0
    rows = read_csv(tmp_path / "labels.csv")
    inner = os.path.join("inner", "é, deep.mp4")
    assert [row["path"] for row in rows] == ["4.mp4", str(images), inner, *(f"./{k}.mp4" for k in range(4))]
    said = reference(support).predict_proba([images])[0]
    assert [float(rows[1][f"p_{label}"]) for label in LABELS] == pytest.approx(said, abs=2e-6)


def test_videos_that_cannot_be_read_have_rows(
    support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "empty.mp4").touch()
    (broken / "text.mp4").write_text("404\nnot found\n")
    (broken / "images").mkdir()
    (broken / "images" / "1.png").write_bytes(b"no picture")
    videos = [broken, broken / "none\n.mp4", folder / "0.mp4", *(f"missing{k}.mp4" for k in range(3))]
    assert main(args(support, videos, tmp_path / "labels.csv")) == 1
    printed = capsys.readouterr().out
    rows = read_csv(tmp_path / "labels.csv")
    errors = {os.path.basename(row["path"]): row["error"] for row in rows if row["error"]}
    known = {"empty.mp4": "it is empty", "none\n.mp4": "there is no such file", "missing2.mp4": "there is no such file"}
    assert errors.items() >= known.items()
    assert errors["text.mp4"].startswith("it is not a video that FFmpeg knows")
    assert errors["images"].startswith("1.png: it is not")
    assert len(errors) == 7
    for row in rows:
        assert [row["label"] == "", row["probability"] == ""] == [bool(row["error"])] * 2
        assert [row[f"p_{label}"] == "" for label in LABELS] == [bool(row["error"])] * 3
    assert "7 of 8 videos can't be read:\n" in printed
    assert f"  {broken / 'empty.mp4'}: it is empty\n" in printed
    assert printed.count("there is no such file") == 2
    assert "  and 2 more\n" in printed
    assert main(args(support, videos, tmp_path / "labels.jsonl")) == 1
    first = read_lines(tmp_path / "labels.jsonl")[0]
    assert (first.pop("path"), first.pop("error")) == (str(broken / "empty.mp4"), "it is empty")
    assert set(first.values()) == {None}


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_name_that_is_no_text(support: Path, folder: Path, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")
    shutil.copy(folder / "0.mp4", name)
    for output in (tmp_path / "labels.csv", tmp_path / "labels.jsonl"):
        assert main(args(support, [name, folder / "0.mp4"], output)) == 0
    rows = read_csv(tmp_path / "labels.csv")
    assert rows[0].pop("path") == f"{tmp_path}/\\udcff.mp4"
    assert rows[0] == {key: cell for key, cell in rows[1].items() if key != "path"}
    assert read_lines(tmp_path / "labels.jsonl")[0]["path"] == f"{tmp_path}/\\udcff.mp4"


def test_none_of_these(support: Path, folder: Path, tmp_path: Path) -> None:
    black = tmp_path / "black.mp4"
    write_video(black, np.zeros((12, 32, 48, 3), np.uint8))
    videos = [str(black), *videos_of(folder)]
    assert main(args(support, videos, tmp_path / "labels.csv", "--reject")) == 0
    assert main(args(support, videos, tmp_path / "labels.jsonl", "--reject")) == 0
    expected = dict(reference(support).classify(videos, reject=True))
    assert expected[0].label == "none of these"
    assert {p.label for p in expected.values()} & set(LABELS)
    rows, lines = read_csv(tmp_path / "labels.csv"), read_lines(tmp_path / "labels.jsonl")
    assert [row["label"] for row in rows] == [expected[k].label for k in range(7)]
    assert (rows[0]["probability"], lines[0]["probability"]) == ("", None)
    assert rows[0][f"p_{LABELS[0]}"] == f"{expected[0].probabilities[LABELS[0]]:.6f}"


def test_examples_that_cannot_be_read_are_named(
    support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "support"
    shutil.copytree(support, own)
    (own / LABELS[0] / "2.mp4").touch()
    assert main(args(own, [folder], tmp_path / "labels.csv")) == 0
    said = capsys.readouterr().err
    assert f"clip-m2df: warning: examples of the class {LABELS[0]!r} that can't be read are left out: " in said
    assert "UserWarning" not in said
    assert main(args(support, [folder], tmp_path / "others.csv")) == 0
    assert (tmp_path / "labels.csv").read_bytes() == (tmp_path / "others.csv").read_bytes()


# Segments


def test_segments(
    support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / "long.mp4"
    parts = [np.full((24, 32, 48, 3), 40, np.uint8) for _ in range(2)]
    parts[0][..., 0] = parts[1][..., 2] = 200
    write_video(long, np.concatenate(parts))
    images = tmp_path / "images"
    images.mkdir()
    for number in range(9):
        clips.save_image(images / f"{number}.png", 7 * number, size=(48, 32))
    videos = [str(long), str(tmp_path / "none.mp4"), str(folder / "0.mp4"), str(images)]
    own = ["--segments", "--window", "1", "--stride", "0.5", "--smoothing", "0"]
    classifier = reference(support)
    assert main(args(support, videos, tmp_path / "s.csv", *own)) == 1
    rows = read_csv(tmp_path / "s.csv")
    assert list(rows[0])[:6] == ["path", "start", "end", "label", "probability", f"p_{LABELS[0]}"]
    expected = [
        (path, f"{s.start:.3f}", f"{s.end:.3f}", s.label, f"{s.probability:.6f}")
        for path in (videos[0], videos[2])
        for s in classifier.segments(path, window=1, stride=0.5, smoothing=0)
    ]
    assert len(expected) > 2
    columns = ("path", "start", "end", "label", "probability")
    assert [tuple(row[name] for name in columns) for row in rows if not row["error"]] == expected
    broken = [row for row in rows if row["error"]]
    assert [row["path"] for row in broken] == [videos[1], videos[3]]
    assert [row["start"] + row["end"] + row["label"] + row["probability"] for row in broken] == ["", ""]
    assert broken[0]["error"] == "there is no such file"
    assert "give fps" in broken[1]["error"]

    assert main(args(support, [images], tmp_path / "s.jsonl", *own, "--fps", "9")) == 0
    (s,) = classifier.segments(str(images), window=1, stride=0.5, smoothing=0, fps=9)
    (line,) = read_lines(tmp_path / "s.jsonl")
    assert (line["start"], line["end"], line["label"]) == (round(s.start, 3), round(s.end, 3), s.label)

    # Not one moment of the classes: no row, but a word of it.
    monkeypatch.setattr(FewShotClassifier, "threshold_", -1e9)
    capsys.readouterr()
    assert main(args(support, [long], tmp_path / "s.csv", "--segments", "--reject")) == 0
    assert read_csv(tmp_path / "s.csv") == []
    assert f"no row: {long}" in capsys.readouterr().out


# Models


def test_models_and_classifiers(tiny_clip_dir: Path, support: Path, folder: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"hidden_dim": 32, "heads": 4}
        model = CLIPM2DF(backbone=str(tiny_clip_dir), head_options=options, text_fusion=0.3).eval()
    model.save_pretrained(tmp_path / "model")
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    classifier = FewShotClassifier.from_checkpoint(tmp_path / "model", frames=4).fit(support)
    classifier.save(tmp_path / "classifier")
    videos = videos_of(folder)
    for name, frames in (("model", None), ("model.ckpt", None), ("classifier", 4)):
        output = tmp_path / f"{name}.csv"
        arguments = args(support, videos, output, "--ckpt_path", str(tmp_path / name))
        if name == "classifier":
            del arguments[1:3]
            assert "--support" not in arguments
        assert main(arguments) == 0
        expected = FewShotClassifier.from_checkpoint(tmp_path / "model", frames=frames).fit(support)
        said = dict(expected.classify(videos))
        found = [[row[f"p_{label}"] for label in LABELS] for row in read_csv(output)]
        assert found == [[f"{said[k].probabilities[label]:.6f}" for label in LABELS] for k in range(6)]
    assert (tmp_path / "model.csv").read_bytes() == (tmp_path / "model.ckpt.csv").read_bytes()
    assert (tmp_path / "model.csv").read_bytes() != (tmp_path / "classifier.csv").read_bytes()


def test_the_heads_that_need_no_training() -> None:
    assert {name for name in HEADS if not getattr(head_class(name), "trained", True)} == set(UNTRAINED_HEADS)


# Going on


def test_a_run_that_was_broken_off_goes_on_where_it_was(
    support: Path, folder: Path, tmp_path: Path, labelled: Labelled, capsys: pytest.CaptureFixture[str]
) -> None:
    table, part = tmp_path / "labels.csv", tmp_path / "labels.csv.part"
    names = [os.path.basename(path) for path in videos_of(folder)]
    run = args(support, [folder, "none.mp4"], table)
    assert main(run) == 1
    assert labelled.forget() == ["none.mp4", *names]  # what can't be read is known first
    whole = table.read_bytes()
    table.write_text("an earlier table")

    labelled.most = 4
    assert main(run) == 130
    assert table.read_text() == "an earlier table"
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    assert lines[0]["format"] == "clip-m2df predictions 1"
    assert len(lines) == 5
    assert labelled.forget() == ["none.mp4", *names[:3]]

    part.write_bytes(part.read_bytes()[:-9])  # killed while it wrote
    labelled.most = 2
    capsys.readouterr()
    assert main(run) == 130
    assert "2 of 7 videos were labelled before" in capsys.readouterr().out
    assert labelled.forget() == ["none.mp4", names[2]]  # what can't be read may be readable by now

    labelled.most = -1
    assert main(run) == 1
    assert "3 of 7 videos were labelled before" in capsys.readouterr().out
    assert labelled.forget() == ["none.mp4", *names[3:]]
    assert table.read_bytes() == whole
    assert not part.exists()


def test_segments_go_on_too(
    support: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "s.jsonl"
    run = args(support, [folder], table, "--segments")
    assert main(run) == 0
    whole = table.read_bytes()
    asked: list[str] = []
    own = FewShotClassifier.segments

    def segments(self: FewShotClassifier, video: Any, **options: Any) -> Any:
        asked.append(video)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return own(self, video, **options)

    monkeypatch.setattr(FewShotClassifier, "segments", segments)
    assert main(run) == 130
    assert main(run) == 0
    paths = videos_of(folder)
    assert asked == [*paths[:3], *paths[2:]]
    assert table.read_bytes() == whole


def broken_off(run: Sequence[str], labelled: Labelled) -> None:
    """Run until four videos are labelled."""
    labelled.most = 4
    assert main(run) == 130
    labelled.most = -1
    labelled.forget()


def test_a_video_that_has_changed_is_labelled_again(
    support: Path, folder: Path, tmp_path: Path, labelled: Labelled
) -> None:
    own = tmp_path / "clips"
    shutil.copytree(folder, own)
    run = args(support, [own], tmp_path / "labels.csv")
    broken_off(run, labelled)
    paint(own / "1.mp4", 0, 7, frames=20)
    (own / "0.mp4").unlink()
    paint(own / "new.mp4", 0, 8)
    assert main(run) == 0
    assert labelled.forget() == ["1.mp4", "4.mp4", "é, deep.mp4", "new.mp4"]
    labels = (tmp_path / "labels.csv").read_bytes()
    assert main(run) == 0
    assert (tmp_path / "labels.csv").read_bytes() == labels


@pytest.mark.parametrize(
    "more",
    [["--reject"], ["--head", "bi_mhm"], ["--segments"], ["example"], ["tower"], ["left out"]],
    ids=lambda more: more[-1],
)
def test_another_question_starts_anew(
    more: list[str],
    tiny_clip_dir: Path,
    support: Path,
    folder: Path,
    tmp_path: Path,
    labelled: Labelled,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = tmp_path / "support"
    shutil.copytree(support, own)
    broken_off(args(own, [folder], tmp_path / "labels.csv"), labelled)
    run = args(own, [folder], tmp_path / "labels.csv", *(more if more[0].startswith("--") else []))
    if more == ["example"]:
        paint(own / LABELS[1] / "1.mp4", 1, 77)
    elif more == ["left out"]:
        (own / LABELS[1] / "0.mp4").unlink()
    elif more == ["tower"]:
        run[run.index("tiny")] = str(tiny_clip_dir)
    capsys.readouterr()
    assert main(run) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "is of a run with another model, support or options: starting anew" in said
    assert len(labelled.forget()) == (0 if more == ["--segments"] else 6)
    assert len({row["path"] for row in read_csv(tmp_path / "labels.csv")}) == 6


def test_what_makes_no_difference_goes_on(
    support: Path, folder: Path, tmp_path: Path, labelled: Labelled, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_off(args(support, [folder], tmp_path / "labels.csv"), labelled)
    monkeypatch.chdir(folder.parent)
    names = [f"{folder.name}/4.mp4", f"{folder.name}/2.mp4"]
    here = Path(os.path.relpath(support))
    assert main(args(here, names, tmp_path / "labels.csv", "--head", "otam", "--timeout", "5")) == 0
    assert labelled.forget() == ["4.mp4"]
    assert [row["path"] for row in read_csv(tmp_path / "labels.csv")] == names


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\0", b"[]\n7\n", b'{"format": "other"}\n', b"path,label\n"])
def test_a_part_that_is_none(
    content: bytes, support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.csv.part").write_bytes(content)
    assert main(args(support, [folder], tmp_path / "labels.csv")) == 0
    assert "starting anew" in capsys.readouterr().out
    assert len(read_csv(tmp_path / "labels.csv")) == 6
    assert not (tmp_path / "labels.csv.part").exists()


# Workers


@dataclass(frozen=True)
class DeadlyReader(ClipReader):
    """As a decoder that crashes on some files does."""

    def read(self, path: str, uniforms: Tensor | None = None) -> tuple[Tensor, int]:
        if "crash" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(path, uniforms)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_file_on_which_a_worker_dies_costs_its_row(
    support: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference(support).save(tmp_path / "classifier")
    monkeypatch.setattr(encoding, "ClipReader", DeadlyReader)
    videos = [str(folder / "0.mp4"), "crash.mp4", str(folder / "1.mp4")]
    arguments = args(support, videos, tmp_path / "labels.csv", "--ckpt_path", str(tmp_path / "classifier"))
    arguments[arguments.index("--workers") + 1] = "1"
    del arguments[1:3]
    assert main(arguments) == 1
    rows = read_csv(tmp_path / "labels.csv")
    assert [row["path"] for row in rows] == videos
    assert [row["error"] for row in rows] == ["", "the decoder crashed (SIGKILL)", ""]
    assert [rows[k]["label"] for k in (0, 2)] == list(reference(support).predict([videos[0], videos[2]]))


# Options


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "labels.txt"], "--output is labels.txt: give it a name that ends in .csv or .jsonl"),
        (["--stride", "1"], "--stride is of --segments: give that too, or leave it out"),
        (["--segments", "--window", "0"], "window is 0.0 seconds; it must be above 0"),
        (["--segments", "--stride", "3"], "stride is 3.0 seconds; it must be above 0, and at most the window of 2.0"),
        (["--segments", "--smoothing", "inf"], "--smoothing is inf: give a number that is not infinite"),
        (["--segments", "--fps", "0"], "fps is 0.0 a second; it must be a number above 0"),
        (["--head", "m2df"], "invalid choice: 'm2df'"),
        (["--head", "otam", "--ckpt_path", "x.ckpt"], "--head goes with --backbone"),
        (["--ckpt_path", "x.ckpt"], "there is no checkpoint x.ckpt"),
        (["--ckpt_path", "x.ckpt", "--backbone", "tiny"], "not allowed with argument --"),
        (["--backbone", "nowhere.pt"], "nowhere.pt"),
        (["--support", "nowhere"], "nowhere is no folder"),
        (["--workers", "-1"], "workers is -1"),
        (["--timeout", "0"], "timeout 0.0: set"),
        (["--videos", "empty"], "empty holds no videos"),
        (["--output", "a_file/labels.csv"], "name a file in a folder that can be written"),
        (["--output", "folder.csv"], "cannot write the predictions folder.csv: it is a folder"),
    ],
)
def test_errors(
    more: list[str],
    message: str,
    support: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "folder.csv"):
        (tmp_path / name).mkdir()
    (tmp_path / "a_file").touch()
    before = sorted(tmp_path.iterdir())
    assert message in fails(args(support, [folder], Path("labels.csv"), *more), capsys)
    assert sorted(tmp_path.iterdir()) == before


def test_what_goes_with_which_model(
    support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--videos", str(folder), "--output", str(tmp_path / "labels.csv"), "--workers", "0"]
    said = "one of the arguments --ckpt_path --backbone is required"
    assert said in fails(["predict", "--support", str(support), *rest], capsys)
    assert "tiny knows no classes: give --support" in fails(["predict", "--backbone", "tiny", *rest], capsys)
    one = tmp_path / "one"
    shutil.copytree(support / LABELS[0], one / "only")
    (one / "only" / "1.mp4").unlink()
    for more in (["--reject"], ["--reject", "--segments"]):
        said = fails(args(one, [folder], tmp_path / "labels.csv", *more), capsys)
        assert "--reject can't tell by one example of one class" in said
    reference(support).save(tmp_path / "classifier")
    said = fails(args(support, [folder], tmp_path / "l.csv", "--ckpt_path", str(tmp_path / "classifier")), capsys)
    assert "is a saved classifier, which has its classes: leave --support out" in said


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(FewShotClassifier, "fit", never)
    (tmp_path / "a_file").touch()
    said = fails(args(support, [folder], tmp_path / "a_file" / "labels.csv"), capsys)
    assert "cannot write the predictions" in said
