"""``clip-m2df predict``, through the command itself."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from clip_m2df import CLIPM2DF, FewShotClassifier
from clip_m2df.cli import main
from clip_m2df.commands.predict import UntrainedHead, open_part
from clip_m2df.datasets.feature_tables import read_feature_table, write_feature_table
from clip_m2df.datasets.manifest import readable
from clip_m2df.motion_shapes.rendering import write_video
from clip_m2df.nn.baselines import HEADS, head_class
from tests.classifier.conftest import (
    LABELS,
    Labelled,
    as_features,
    make_model,
    predict_args,
    read_csv,
    read_lines,
    reference,
    videos_of,
    write_table,
)
from tests.conftest import fails, quiet_trainer

# Tables


@pytest.mark.parametrize("head", [None, "nearest_prototype"])
def test_the_tables_say_what_the_classifier_says(
    head: str | None, support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [] if head is None else ["--head", head]
    table, lines = tmp_path / "deep" / "labels.csv", tmp_path / "labels.jsonl"
    assert main(predict_args(support, [folder], table, *more)) == 0
    printed = capsys.readouterr()
    assert main(predict_args(support, [folder], lines, *more)) == 0
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
    assert "the visual tower computed in 32-true on cpu" in printed.out
    assert "labelling" in printed.err


def test_rows_come_in_the_order_of_the_arguments_and_a_file_has_one(
    support: Path, folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    videos = ["4.mp4", str(images), "inner", str(folder / "4.mp4"), ".", "inner/../0.mp4"]
    assert main(predict_args(support, videos, tmp_path / "labels.csv")) == 0
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
    assert main(predict_args(support, videos, tmp_path / "labels.csv")) == 1
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


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_name_that_is_no_text(support: Path, folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "clips"
    own.mkdir()
    name = os.fsdecode(os.fsencode(own) + b"/\xff.mp4")
    shutil.copy(folder / "0.mp4", name)
    assert main(predict_args(support, [own, folder / "0.mp4"], tmp_path / "labels.csv")) == 0
    assert main(predict_args(support, [name], tmp_path / "labels.jsonl")) == 0
    rows = read_csv(tmp_path / "labels.csv")
    assert rows[0].pop("path") == f"{own}/\\udcff.mp4"
    assert rows[0] == {key: cell for key, cell in rows[1].items() if key != "path"}
    assert read_lines(tmp_path / "labels.jsonl")[0]["path"] == f"{own}/\\udcff.mp4"


@pytest.mark.parametrize("more", [[], ["--segments"]], ids=["videos", "segments"])
def test_a_folder_without_videos_has_a_row(
    more: list[str], support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    (empty / "inner").mkdir(parents=True)
    (empty / "inner" / "notes.txt").touch()
    for videos, output in (([empty, folder], tmp_path / "labels.csv"), ([empty], tmp_path / "labels.jsonl")):
        assert main(predict_args(support, videos, output, *more)) == 1
        said = capsys.readouterr().out
        assert f"1 of {7 if folder in videos else 1} videos can't be read:\n" in said
        assert f"  {empty}: the folder has no videos\n" in said
    first, *others = read_csv(tmp_path / "labels.csv")
    assert (first.pop("path"), first.pop("error")) == (str(empty), "the folder has no videos")
    assert set(first.values()) == {""}
    assert {row["path"] for row in others} == set(videos_of(folder))
    assert all(row["label"] and not row["error"] for row in others)
    (line,) = read_lines(tmp_path / "labels.jsonl")
    assert (line.pop("path"), line.pop("error")) == (str(empty), "the folder has no videos")
    assert list(line) == list(first)
    assert set(line.values()) == {None}


def test_none_of_these(support: Path, folder: Path, tmp_path: Path) -> None:
    black = tmp_path / "black.mp4"
    write_video(black, np.zeros((12, 32, 48, 3), np.uint8))
    videos = [str(black), *videos_of(folder)]
    assert main(predict_args(support, videos, tmp_path / "labels.csv", "--reject")) == 0
    assert main(predict_args(support, videos, tmp_path / "labels.jsonl", "--reject")) == 0
    expected = dict(reference(support).classify(videos, reject=True))
    assert expected[0].label == "none of these"
    assert {p.label for p in expected.values()} & set(LABELS)
    rows, lines = read_csv(tmp_path / "labels.csv"), read_lines(tmp_path / "labels.jsonl")
    assert [row["label"] for row in rows] == [expected[k].label for k in range(7)]
    assert (rows[0]["probability"], lines[0]["probability"]) == ("", None)
    assert rows[0][f"p_{LABELS[0]}"] == f"{expected[0].probabilities[LABELS[0]]:.6f}"


def test_the_table_has_the_distances_that_reject(support: Path, folder: Path, tmp_path: Path) -> None:
    run = predict_args(support, [folder], tmp_path / "labels.jsonl", "--reject")
    with pytest.warns(UserWarning, match="nearly the same"):
        assert main(run) == 0
    told = reference(support)
    with pytest.warns(UserWarning, match="nearly the same"):
        threshold = told.threshold_
    assert threshold is not None
    rows = read_lines(tmp_path / "labels.jsonl")
    assert list(rows[0])[:4] == ["path", "label", "probability", "distance"]
    expected = dict(told.classify(videos_of(folder)))
    for place, row in enumerate(rows):
        assert row["distance"] == pytest.approx(expected[place].distance, abs=1e-5)
        assert row["distance"] > 0
        assert (row["label"] == "none of these") == (row["probability"] is None) == (row["distance"] > threshold)
    distances = sorted(row["distance"] for row in rows)
    own = str((distances[2] + distances[3]) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it is not learnt from the examples
        assert main([*run, "--threshold", own, "--report", str(tmp_path / "r.html")]) == 0
    rows = read_lines(tmp_path / "labels.jsonl")
    assert [row["label"] == "none of these" for row in rows] == [row["distance"] > float(own) for row in rows]
    assert f"beyond a distance of {float(own):.2f}" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert main([*run, "--segments", "--threshold", "1e-9"]) == 0
    assert read_lines(tmp_path / "labels.jsonl") == []


def test_examples_that_cannot_be_read_are_named(
    support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "support"
    shutil.copytree(support, own)
    (own / LABELS[0] / "2.mp4").touch()
    assert main(predict_args(own, [folder], tmp_path / "labels.csv")) == 0
    said = capsys.readouterr().err
    assert f"clip-m2df: warning: examples of the class {LABELS[0]!r} that can't be read are left out: " in said
    assert "UserWarning" not in said
    assert main(predict_args(support, [folder], tmp_path / "others.csv")) == 0
    assert (tmp_path / "labels.csv").read_bytes() == (tmp_path / "others.csv").read_bytes()


def test_without_a_table_it_is_printed(
    support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    run = predict_args(support, ["no\x1bne.mp4", folder / "0.mp4", folder / "inner"], Path("-"))
    run = [word for word in run if word not in ("--output", "-")]
    assert main([*run, "--reject", "--threshold", "1e6"]) == 1
    printed = capsys.readouterr().out
    said = dict(reference(support).classify([folder / "0.mp4", folder / "inner" / "é, deep.mp4"]))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    assert lines[:3] == [
        ["no\\x1bne.mp4", "(there is no such file)", "", ""],
        *([p.video, p.label, f"{p.probability:.3f}", f"{p.distance:.2f}"] for p in (said[0], said[1])),
    ]
    assert "\x1b" not in printed
    assert "predictions are in" not in printed
    assert main([*run, "--segments", "--window", "0.5"]) == 1
    assert "start" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main([*run, "--report", "report.html"]) == 1
    printed = capsys.readouterr().out
    assert "probability" not in printed
    assert "the report is report.html" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("length", [240, *range(245, 256)])
def test_a_name_as_long_as_a_file_may_have(length: int, support: Path, folder: Path, tmp_path: Path) -> None:
    """That of the table, whose part has a longer one, of the page, and in letters of two bytes."""
    for letter, suffix in (("x", ".csv"), ("é", ".jsonl")):
        stem = letter * ((length - len(suffix)) // len(letter.encode()))
        name = stem + "x" * (length - len(os.fsencode(stem + suffix))) + suffix
        assert len(os.fsencode(name)) == length
        page = "r" * (length - 5) + ".html"
        run = predict_args(support, [folder / "0.mp4"], tmp_path / name, "--report", str(tmp_path / page))
        assert main(run) == 0
        assert {path.name for path in tmp_path.iterdir()} == {name, page}
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["x" * 252 + ".csv", "y\0.csv", "é" * 126 + ".csv"])
def test_a_name_that_no_file_can_have_is_refused_before_the_work(
    name: str, support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = folder / "0.mp4"
    run = predict_args(tmp_path / "no_support", [broken], tmp_path / name)  # which would be told first, after that
    assert "no_support" not in fails(run, capsys)
    page = str(tmp_path / name.replace(".csv", ".html"))
    run = predict_args(tmp_path / "no_support", [broken], tmp_path / "labels.csv", "--report", page)
    assert "no_support" not in fails(run, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [[], ["--reject"], ["--segments"], ["--report", "r.html"]], ids=lambda m: "".join(m))
@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_a_model_that_is_no_number_labels_nothing(
    value: float,
    more: list[str],
    support: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model()
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(checkpoint)
    checkpoint["state_dict"] = {name: torch.full_like(w, value) for name, w in checkpoint["state_dict"].items()}
    torch.save(checkpoint | {"pytorch-lightning_version": "2.6.6"}, "spoilt.ckpt")
    run = predict_args(support, [folder], Path("labels.csv"), "--ckpt_path", "spoilt.ckpt", *more)
    said = fails(run, capsys)
    assert re.search(r"spoilt.ckpt.*not finite", said)
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt.ckpt"]


# Segments


def test_segments(
    support: Path,
    folder: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = tmp_path / "long.mp4"
    parts = [np.full((24, 32, 48, 3), 40, np.uint8) for _ in range(2)]
    parts[0][..., 0] = parts[1][..., 2] = 200
    write_video(long, np.concatenate(parts))
    videos = [str(long), str(tmp_path / "none.mp4"), str(folder / "0.mp4"), str(images)]
    own = ["--segments", "--window", "1", "--stride", "0.5", "--smoothing", "0"]
    classifier = reference(support)
    assert main(predict_args(support, videos, tmp_path / "s.csv", *own)) == 1
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

    assert main(predict_args(support, [images], tmp_path / "s.jsonl", *own, "--fps", "12")) == 0
    (s,) = classifier.segments(str(images), window=1, stride=0.5, smoothing=0, fps=12)
    (line,) = read_lines(tmp_path / "s.jsonl")
    assert (line["start"], line["end"], line["label"]) == (round(s.start, 3), round(s.end, 3), s.label)

    # Not one moment of the classes: no row, but a word of it.
    monkeypatch.setattr(FewShotClassifier, "threshold_", -1e9)
    capsys.readouterr()
    assert main(predict_args(support, [long], tmp_path / "s.csv", "--segments", "--reject")) == 0
    assert read_csv(tmp_path / "s.csv") == []
    assert f"no row: {long}" in capsys.readouterr().out


# Models


@pytest.mark.slow
def test_models_and_classifiers(support: Path, folder: Path, tmp_path: Path) -> None:
    model = make_model(text_fusion=0.3)
    model.save_pretrained(tmp_path / "model")
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    classifier = FewShotClassifier.from_checkpoint(tmp_path / "model", frames=4).fit(support)
    classifier.save(tmp_path / "classifier")
    videos = videos_of(folder)
    for name, frames in (("model", None), ("model.ckpt", None), ("classifier", 4)):
        output = tmp_path / f"{name}.csv"
        examples = None if name == "classifier" else support
        assert main(predict_args(examples, videos, output, "--ckpt_path", str(tmp_path / name))) == 0
        expected = FewShotClassifier.from_checkpoint(tmp_path / "model", frames=frames).fit(support)
        said = dict(expected.classify(videos))
        found = [[row[f"p_{label}"] for label in LABELS] for row in read_csv(output)]
        assert found == [[f"{said[k].probabilities[label]:.6f}" for label in LABELS] for k in range(6)]
    assert (tmp_path / "model.csv").read_bytes() == (tmp_path / "model.ckpt.csv").read_bytes()
    assert (tmp_path / "model.csv").read_bytes() != (tmp_path / "classifier.csv").read_bytes()


def test_the_heads_that_need_no_training() -> None:
    assert {name for name in HEADS if not getattr(head_class(name), "trained", True)} == set(get_args(UntrainedHead))


@pytest.mark.parametrize(
    ("more", "options", "sizes"),
    [
        (["--frames", "3"], {}, {"frames": 3}),
        (["--resize", "48", "--device", "cpu"], {}, {"resize": 48}),
        (["--template", "a photo of {}.", "{} in a film"], {"template": ["a photo of {}.", "{} in a film"]}, {}),
        (
            ["--head", "otam", "--head_options", "smoothing=0.1", "single_direction=true"],
            {"head_options": {"smoothing": 0.1, "single_direction": True}},
            {},
        ),
        (
            ["--backbone_options", "mean=[0, 0, 0]", "std=[1, 1, 1]"],
            {"backbone_options": {"mean": [0, 0, 0], "std": [1, 1, 1]}},
            {},
        ),
        (["--precision", "bf16-mixed"], {}, {"precision": "bf16-mixed"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_are_those_of_the_class(
    more: list[str], options: dict[str, Any], sizes: dict[str, Any], support: Path, folder: Path, tmp_path: Path
) -> None:
    head = options.pop("head", "otam") if "--template" not in more else "zero_shot"
    more = [*more, "--head", head] if "--template" in more else more
    assert main(predict_args(support, [folder], tmp_path / "labels.csv", *more)) == 0
    model = CLIPM2DF(backbone="tiny", head=head, freeze_backbone=True, **options)
    expected = dict(FewShotClassifier(model, **sizes).fit(support).classify(videos_of(folder)))
    rows = [[float(row[f"p_{label}"]) for label in LABELS] for row in read_csv(tmp_path / "labels.csv")]
    assert rows == [pytest.approx(list(expected[k].probabilities.values()), abs=2e-6) for k in range(6)]
    plain = dict(reference(support, head).classify(videos_of(folder)))
    assert rows != [pytest.approx(list(plain[k].probabilities.values()), abs=2e-6) for k in range(6)]


def test_texts_of_classes(support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {LABELS[0].upper(): "a red thing", LABELS[2]: "=a blue thing"}
    lines = ["label,text", *(f'"{label.replace(chr(34), chr(34) * 2)}",{text}' for label, text in texts.items())]
    (tmp_path / "texts.csv").write_text("\n".join([*lines, "another class,of another benchmark"]), encoding="utf-8")
    run = predict_args(support, [folder], tmp_path / "labels.csv", "--head", "zero_shot")
    assert main([*run, "--texts", str(tmp_path / "texts.csv")]) == 0
    model = CLIPM2DF(backbone="tiny", head="zero_shot", freeze_backbone=True)
    expected = dict(
        FewShotClassifier(model)
        .fit(support, {LABELS[0]: "a red thing", LABELS[2]: texts[LABELS[2]]})
        .classify(videos_of(folder))
    )
    rows = [[float(row[f"p_{label}"]) for label in LABELS] for row in read_csv(tmp_path / "labels.csv")]
    assert rows == [pytest.approx(list(expected[k].probabilities.values()), abs=2e-6) for k in range(6)]
    for content, said in (
        ("label,text\nnobody,x\n", "names no class of the support"),
        (f"label,text\n{LABELS[1]},x\n{LABELS[1]},y\n", "a second text"),
        ("class,text\na,b\n", "label"),
    ):
        (tmp_path / "bad.csv").write_text(content, encoding="utf-8")
        assert said in fails([*run, "--texts", str(tmp_path / "bad.csv")], capsys)


# Options


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "labels.txt"], "--output is labels.txt: give it a name that ends in .csv or .jsonl"),
        (["--stride", "1"], "--stride is of --segments: give that too, or leave it out"),
        (["--segments", "--window", "0"], "window is 0.0"),
        (["--segments", "--fps", "0"], "fps is 0.0"),
        (["--head", "m2df"], "invalid choice: 'm2df'"),
        (["--head", "otm"], "did you mean otam?"),
        (["--head", "nearest-prototype"], "did you mean nearest_prototype?"),
        (["--thresold", "3"], "did you mean --threshold?"),
        (["--threshold", "3"], "--threshold is of --reject: give that too, or leave it out"),
        (["--threshold", "nan", "--reject"], "threshold is nan"),
        (["--head_options", "smoothing"], "--head_options has 'smoothing': give NAME=VALUE"),
        (["--head_options", "smothing=1"], "has no option 'smothing'; did you mean 'smoothing'?"),
        (["--head_options", "smoothing=-1"], "smoothing is -1"),
        (["--head_options", "a=1", "--ckpt_path", "x.ckpt"], "--head_options goes with --backbone"),
        (["--head_options", "smoothing=" + "[" * 10_000], "smoothing is '[[["),
        (["--backbone_options", "activation"], "--backbone_options has 'activation': give NAME=VALUE"),
        (["--backbone_options", "activtion=gelu"], "backbone_options has no 'activtion'; there are activation, head_"),
        (["--backbone_options", "activation=gelu"], "activation is 'gelu', but the config.json of"),
        (["--backbone_options", "a=1", "--ckpt_path", "x.ckpt"], "--backbone_options goes with --backbone"),
        (["--frames", "0"], "frames is 0"),
        (["--frames", "100000000"], "frames is 100000000"),
        (["--resize", "8"], "resize 8"),
        (["--device", "abacus"], "device 'abacus' can't be used"),
        (["--device", "meta"], "device 'meta' can't be used"),
        (["--segments", "--window", "1e-9"], "window is 1e-09; it must be at least"),
        (["--segments", "--fps", "1e-9"], "fps is 1e-09; it must be at least"),
        (["--template", "no braces"], "{}"),
        (["--texts", "none.csv"], "there is no list of class texts none.csv"),
        (["--ckpt_path", "best"], "'best' is what fit and test call a checkpoint of their own run"),
        (["--ckpt_path", "last.ckpt"], "'last.ckpt' is what fit and test call a checkpoint of their own run"),
        (["--ckpt_path", "ViT-B/16"], "give it as --backbone, or backbone=, 'openai/clip-vit-base-patch16'"),
        (["--backbone", "best.ckpt"], "'best.ckpt': no such file or folder"),
        (["--backbone", " "], "' ': no such file or folder"),
        (["--backbone", "ViT-B/16"], "there is no backbone 'ViT-B/16': give 'openai/clip-vit-base-patch16'"),
        (["--head", "otam", "--ckpt_path", "x.ckpt"], "--head goes with --backbone"),
        (["--ckpt_path", "x.ckpt"], "there is no checkpoint x.ckpt"),
        (["--ckpt_path", "x.ckpt", "--backbone", "tiny"], "either --ckpt_path, a trained model, or --backbone"),
        (["--ckpt_path", "x.ckpt", "--backbone", "tiny"], "x.ckpt is no file"),
        (["--backbone", "nowhere.pt"], "nowhere.pt"),
        (["--support", "nowhere"], "nowhere is no folder"),
        (["--workers", "-1"], "workers is -1"),
        (["--timeout", "0"], "timeout"),
        (["--output", "folder.csv"], "cannot write the predictions folder.csv: it is a folder"),
        (["--output", "d.csv"], "cannot write the predictions d.csv: d.csv.part is a link or not a regular file"),
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
    for name in ("folder.csv", "d.csv.part"):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.iterdir())
    assert message in fails(predict_args(support, [folder], Path("labels.csv"), *more), capsys)
    assert sorted(tmp_path.iterdir()) == before


def test_what_goes_with_which_model(
    support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained = predict_args(None, [folder], tmp_path / "labels.csv")
    assert "tiny knows no classes: give --support" in fails(untrained, capsys)
    untrained.remove("--backbone")
    untrained.remove("tiny")
    assert "give either --ckpt_path, a trained model, or --backbone" in fails(untrained, capsys)
    one = tmp_path / "one"
    shutil.copytree(support / LABELS[0], one / "only")
    (one / "only" / "1.mp4").unlink()
    for more in (["--reject"], ["--reject", "--segments"]):
        said = fails(predict_args(one, [folder], tmp_path / "labels.csv", *more), capsys)
        assert "--reject can't tell by one example of one class" in said
    reference(support).save(tmp_path / "classifier")
    arguments = predict_args(support, [folder], tmp_path / "l.csv", "--ckpt_path", str(tmp_path / "classifier"))
    assert "is a saved classifier, which has its classes: leave --support out" in fails(arguments, capsys)
    saved = predict_args(None, [folder], tmp_path / "l.csv", "--ckpt_path", str(tmp_path / "classifier"))
    for more in (["--frames", "4"], ["--resize", "64"], ["--template", "{}"], ["--texts", "t.csv"]):
        assert f"is a saved classifier, which has its classes: leave {more[0]} out" in fails([*saved, *more], capsys)
    runs = tmp_path / "runs" / "checkpoints"
    runs.mkdir(parents=True)
    for name in ("last.ckpt", "best.ckpt"):
        (runs / name).touch()
        for given in (runs, runs.parent):
            arguments = predict_args(support, [folder], tmp_path / "l.csv", "--ckpt_path", str(given))
            said = fails(arguments, capsys)
            assert f"is the folder of a run and not a model: give its checkpoint, {runs / name}" in said


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(FewShotClassifier, "fit", never)
    (tmp_path / "a_file").touch()
    said = fails(predict_args(support, [folder], tmp_path / "a_file" / "labels.csv"), capsys)
    assert re.search("cannot write the predictions .*: .*; name a file in a folder that can be written", said)


# Feature tables


@pytest.fixture(scope="module")
def tables(support: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Feature tables of the support and of the videos, each computed at once as the command would."""
    place, videos = tmp_path_factory.mktemp("tables"), videos_of(folder)
    classifier = FewShotClassifier(CLIPM2DF(backbone="tiny", head="otam", freeze_backbone=True))
    examples = {label: sorted(map(str, (support / label).iterdir())) for label in sorted(LABELS)}
    paths = [path for own in examples.values() for path in own]
    labels = [label for label, own in examples.items() for _ in own]
    write_table(place / "support.safetensors", as_features(classifier, paths), labels, paths=paths)
    write_table(place / "clips.parquet", as_features(classifier, videos), ["?"] * len(videos), paths=videos)
    return place / "support.safetensors", place / "clips.parquet"


@pytest.mark.parametrize("more", [[], ["--reject"], ["--head", "nearest_prototype"]])
def test_a_feature_table_says_what_its_videos_say(
    more: list[str], tables: tuple[Path, Path], support: Path, folder: Path, tmp_path: Path
) -> None:
    examples, clips = tables
    assert main(predict_args(support, [folder], tmp_path / "videos.csv", *more)) == 0
    assert main(predict_args(examples, [clips], tmp_path / "tables.csv", *more)) == 0
    assert main(predict_args(examples, [folder], tmp_path / "mixed.csv", *more)) == 0
    expected = (tmp_path / "videos.csv").read_bytes()
    assert (tmp_path / "tables.csv").read_bytes() == (tmp_path / "mixed.csv").read_bytes() == expected


def test_a_run_over_feature_tables_goes_on_where_it_was(
    tables: tuple[Path, Path], tmp_path: Path, labelled: Labelled, capsys: pytest.CaptureFixture[str]
) -> None:
    support, clips = (Path(shutil.copy(table, tmp_path)) for table in tables)
    run = predict_args(support, [clips], tmp_path / "labels.csv")
    assert main(run) == 0
    whole = (tmp_path / "labels.csv").read_bytes()
    names = labelled.forget()
    labelled.most = 4
    assert main(run) == 130
    labelled.most = -1
    labelled.forget()
    assert main(run) == 0
    assert labelled.forget() == names[4:]
    assert (tmp_path / "labels.csv").read_bytes() == whole
    # Other features, and other embeddings of the classes, are another run.
    labelled.most = 4
    assert main(run) == 130
    labelled.most = -1
    labelled.forget()
    kept = read_feature_table(support)
    rows = [{"path": v.path, "label": v.label, "split": v.split} for v in kept.manifest.videos]
    own = {label: torch.ones(kept.dim) for label in LABELS}
    write_feature_table(support, rows, kept.features, own)
    capsys.readouterr()
    assert main(run) == 0
    assert "another model, support or options: starting anew" in " ".join(capsys.readouterr().out.split())
    assert labelled.forget() == names


def test_segments_and_the_report_of_feature_tables(
    tables: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    support, clips = tables
    page, table = tmp_path / "page.html", tmp_path / "labels.csv"
    assert main(predict_args(support, [clips], table, "--report", str(page))) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<details>") == len(read_csv(table))
    assert "data:image/jpeg" not in text
    classifier = FewShotClassifier(CLIPM2DF(backbone="tiny", head="otam", freeze_backbone=True)).fit(support)
    features = read_feature_table(clips).features
    sliding = ["--segments", "--window", "1.5", "--report", str(page)]
    assert main(predict_args(support, [clips], table, *sliding, "--fps", "4")) == 0
    rows = read_csv(table)
    for video, own in zip(videos_of_rows(rows), features, strict=True):
        found = classifier.segments(own, window=1.5, fps=4.0)
        said = [(float(row["start"]), float(row["end"]), row["label"]) for row in rows if row["path"] == video]
        assert said == [(round(s.start, 3), round(s.end, 3), s.label) for s in found]
    assert main(predict_args(support, [clips], table, "--segments")) == 1
    assert {row["error"] for row in read_csv(table)} == {
        "features have no times: give fps, how many of them make a second"
    }


def videos_of_rows(rows: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(row["path"] for row in rows))


def test_feature_tables_of_no_use(
    tables: tuple[Path, Path], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    support, clips = tables
    wide = write_table(tmp_path / "wide.safetensors", torch.ones(2, 8, 32), ["a", "b"])
    message = "wide.safetensors are 8 frames of width 32, and tiny takes 8 of width 64"
    for args in ((wide, [clips]), (support, [wide]), (support, [wide], "--segments", "--fps", "4")):
        assert message in fails(predict_args(args[0], list(args[1]), tmp_path / "x.csv", *args[2:]), capsys)
    copied = shutil.copy(clips, tmp_path / "again.parquet")
    for videos in ([clips, copied], [clips, folder], [folder, clips]):
        assert "is there twice, in " in fails(predict_args(support, videos, tmp_path / "x.csv"), capsys)
    assert "there is no feature table" in fails(predict_args(support, ["no.parquet"], tmp_path / "x.csv"), capsys)
    assert main(predict_args(support, [clips, clips], tmp_path / "x.csv")) == 0


@pytest.mark.parametrize("more", [[], ["--reject", "--head", "bi_mhm"]])
def test_features_need_no_tower(
    more: list[str],
    tables: tuple[Path, Path],
    support: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    of_videos, (support, clips) = support, tables
    assert main(predict_args(support, [clips], tmp_path / "tower.csv", *more)) == 0
    alone = ["--backbone", "features", *more]
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert main(predict_args(support, [clips], tmp_path / "alone.csv", *alone, "--report", str(page))) == 0
    assert f"the model takes features of 64 numbers a frame, as {support} has" in " ".join(
        capsys.readouterr().out.split()
    )
    assert (tmp_path / "alone.csv").read_bytes() == (tmp_path / "tower.csv").read_bytes()
    assert page.read_text(encoding="utf-8").count("<details>") == len(read_csv(tmp_path / "alone.csv"))
    shutil.copy(folder / "0.mp4", tmp_path)
    for videos in ([folder], [clips, tmp_path / "0.mp4"]):
        for sliding in ([], ["--segments", "--fps", "4"]):
            arguments = predict_args(support, videos, tmp_path / "x.csv", *alone[:2], *sliding)
            assert "features has no tower, and can't see" in fails(arguments, capsys)
    classifier = FewShotClassifier(CLIPM2DF("features", {"dim": 64}, head="otam")).fit(support)
    classifier.save(tmp_path / "saved")
    assert main(predict_args(None, [clips], tmp_path / "saved.csv", "--ckpt_path", str(tmp_path / "saved"))) == 0
    assert read_csv(tmp_path / "saved.csv")[0]["label"] in LABELS
    message = fails(predict_args(of_videos, [clips], tmp_path / "x.csv", *alone[:2]), capsys)
    assert f"--backbone features is no tower, and {of_videos} has videos: give --support a feature table" in message
    narrow = ["--backbone", "features", "--backbone_options", "dim=32"]
    message = fails(predict_args(support, [clips], tmp_path / "x.csv", *narrow), capsys)
    assert "support.safetensors are 8 frames of width 64, and features takes 8 of width 32" in message


def test_what_encode_writes_says_what_the_videos_say(
    support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for the last digits, which depend on what is encoded together."""
    examples = [(str(path), label) for label in LABELS for path in sorted((support / label).iterdir())]
    for name, videos in (("support", examples), ("clips", [(path, "not known") for path in videos_of(folder)])):
        with (tmp_path / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            rows = ((path, label, "test", readable(label)) for path, label in videos)
            csv.writer(file).writerows([("path", "label", "split", "text"), *rows])
        reading = ["--resize", "40", "--workers", "0", "--root", "/", "--output", str(tmp_path / f"{name}.safetensors")]
        assert main(["encode", "--manifest", str(tmp_path / f"{name}.csv"), "--backbone", "tiny", *reading]) == 0
    tables = tmp_path / "support.safetensors", [tmp_path / "clips.safetensors"]
    for head in ("otam", "zero_shot"):  # that goes by the class embeddings which encode writes
        assert main(predict_args(support, [folder], tmp_path / "videos.csv", "--head", head)) == 0
        for backbone in ("tiny", "features"):
            more = ["--backbone", backbone, "--head", head]
            assert main(predict_args(*tables, tmp_path / "tables.csv", *more)) == 0
            for row, expected in zip(read_csv(tmp_path / "tables.csv"), read_csv(tmp_path / "videos.csv"), strict=True):
                assert row["path"].endswith(expected["path"])  # its name from the root
                assert row["label"] == expected["label"]
                shares = [float(row[f"p_{label}"]) for label in LABELS]
                assert shares == pytest.approx([float(expected[f"p_{label}"]) for label in LABELS], abs=2e-5)


# Sets of labels


def with_calibration(tmp_path: Path, frames: int = 8) -> tuple[Path, list[str]]:
    """A saved classifier of two classes, calibrated on five further ones, and feature tables of clips to label."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(9, 16, generator=generator)

    def clips(c: int, n: int) -> torch.Tensor:
        return centres[c] + 1.5 * torch.randn(n, frames, 16, generator=generator)

    classifier = FewShotClassifier(CLIPM2DF("features", {"dim": 16}, head="otam"))
    classifier.fit({label: list(clips(c, 2)) for c, label in enumerate(LABELS[:2])})
    classifier.calibrate({f"further {c}": list(clips(c, 8)) for c in range(2, 7)})
    classifier.save(tmp_path / "classifier")
    rows = torch.cat([clips(c, 4) for c in (0, 1, 7, 8)])
    table = write_table(tmp_path / "clips.safetensors", rows, [f"{c}" for c in range(4) for _ in range(4)])
    return tmp_path / "classifier", [str(table)]


def test_the_tables_and_the_page_say_the_sets_of_the_classifier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, videos = with_calibration(tmp_path)
    args = ["predict", "--ckpt_path", str(saved), "--videos", *videos, "--error", "0.3"]
    table, lines, page = (tmp_path / name for name in ("labels.csv", "labels.jsonl", "page.html"))
    assert main([*args, "--output", str(table), "--report", str(page)]) == 0
    assert main([*args, "--output", str(lines)]) == 0
    capsys.readouterr()
    assert main(args) == 0
    printed = capsys.readouterr().out
    classifier = FewShotClassifier.load(saved)
    expected = [list(labels) for labels in classifier.predict_sets(videos, error=0.3)]
    assert len({*map(len, expected)}) > 1
    rows = read_csv(table)
    assert list(rows[0])[:4] == ["path", "label", "probability", "set"]
    assert [json.loads(row["set"]) for row in rows] == expected
    assert [row["set"] for row in read_lines(lines)] == expected
    assert "set" in printed
    assert "none of these" in printed
    text = page.read_text(encoding="utf-8")
    assert text.count("<p>Set: ") == len(rows)
    assert "each holds the truth in 70 % of the cases or more, if these classes are such as the 5" in text


def test_rows_of_an_interrupted_run_whose_sets_no_run_writes_are_passed_over(tmp_path: Path) -> None:
    columns = ["label", "probability", "set", "p_a", "p_b", "error"]
    row = {"label": "a", "probability": 0.7, "set": ["a", "none of these"], "p_a": 0.7, "p_b": 0.3, "error": None}
    sets: dict[str, Any] = {"whole": row["set"], "empty": [], "all": ["b", "a", "none of these"]}
    odd: list[Any] = [None, "a", ["c"], ["a", "a"], [1], {"a": 1}, ["a", None]]
    sets |= {f"odd {i}": value for i, value in enumerate(odd)}
    with open_part(tmp_path / "labels.csv") as part:
        part.take_over("digest", {}, columns)
        for name, value in sets.items():
            part.add(name, "mark", [row | {"set": value}])
    with open_part(tmp_path / "labels.csv") as part:
        found = part.take_over("digest", dict.fromkeys(sets, "mark"), columns)
    assert found == {name: [row | {"set": sets[name]}] for name in ("whole", "empty", "all")}


def test_what_sets_need_is_said(
    support: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = predict_args(support, [folder], tmp_path / "labels.csv")
    assert "has no calibration" in fails([*run, "--error", "0.1"], capsys)
    assert "--error" in fails([*run, "--error", "0.1", "--segments"], capsys)
    for error in ("0", "1", "nan", "-1"):
        assert "error" in fails([*run, "--error", error], capsys)
    assert not (tmp_path / "labels.csv").exists()
    saved, videos = with_calibration(tmp_path)
    args = ["predict", "--ckpt_path", str(saved), "--videos", *videos, "--output", str(tmp_path / "labels.csv")]
    assert main([*args, "--error", "0.1"]) == 0
    assert "the 5 classes of the calibration are too few for an error rate of 0.1" in capsys.readouterr().err.replace(
        "\n", " "
    )
    every = {*LABELS[:2], "none of these"}
    assert all(set(json.loads(row["set"])) == every for row in read_csv(tmp_path / "labels.csv"))
