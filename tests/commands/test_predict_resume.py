"""``clip-m2df predict`` where it is interrupted, and where it goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from clip_m2df import FewShotClassifier
from clip_m2df.classifier import clips as encoding
from clip_m2df.cli import main
from clip_m2df.commands import predict
from clip_m2df.commands.predict import open_part
from clip_m2df.video.transforms import ClipReader
from tests.classifier.conftest import (
    LABELS,
    DeadlyReader,
    Labelled,
    paint,
    predict_args,
    read_csv,
    reference,
    videos_of,
)
from tests.conftest import fails

# Going on


def test_a_run_that_was_interrupted_goes_on_where_it_was(
    support: Path, folder: Path, tmp_path: Path, labelled: Labelled, capsys: pytest.CaptureFixture[str]
) -> None:
    table, part = tmp_path / "labels.csv", tmp_path / "labels.csv.part"
    names = [os.path.basename(path) for path in videos_of(folder)]
    run = predict_args(support, [folder, "none.mp4"], table)
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
    run = predict_args(support, [folder], table, "--segments")
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


def interrupt(run: Sequence[str], labelled: Labelled) -> None:
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
    run = predict_args(support, [own], tmp_path / "labels.csv")
    interrupt(run, labelled)
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
    interrupt(predict_args(own, [folder], tmp_path / "labels.csv"), labelled)
    run = predict_args(own, [folder], tmp_path / "labels.csv", *(more if more[0].startswith("--") else []))
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
    interrupt(predict_args(support, [folder], tmp_path / "labels.csv"), labelled)
    monkeypatch.chdir(folder.parent)
    names = [f"{folder.name}/4.mp4", f"{folder.name}/2.mp4"]
    here = Path(os.path.relpath(support))
    assert main(predict_args(here, names, tmp_path / "labels.csv", "--head", "otam", "--timeout", "5")) == 0
    assert labelled.forget() == ["4.mp4"]
    assert [row["path"] for row in read_csv(tmp_path / "labels.csv")] == names


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\0", b"[]\n7\n", b'{"format": "other"}\n', b"path,label\n"])
def test_a_part_that_is_none(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "labels.csv.part"
    file.write_bytes(content)
    with open_part(tmp_path / "labels.csv") as part:
        assert part.take_over("digest", {}, []) == {}
    assert ("starting anew" in capsys.readouterr().out) == bool(content)
    assert json.loads(file.read_text())["digest"] == "digest"


def forge(row: dict[str, Any], **values: Any) -> list[dict[str, Any]]:
    return [row | values]


P0, P1 = f"p_{LABELS[0]}", f"p_{LABELS[1]}"
# From the row of a video to what is in its place: all that a line may hold, and no run writes.
FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "null": lambda _: None,
    "number": lambda _: 5,
    "text": lambda _: "rows",
    "nothing": lambda _: [],
    "row of null": lambda _: [None],
    "row of five": lambda _: [5],
    "row of a list": lambda row: [list(row.values())],
    "not in a list": lambda row: row,
    "twice": lambda row: [row, row],
    "label as a list": lambda row: forge(row, label=["x"]),
    "label null": lambda row: forge(row, label=None),
    "no class": lambda row: forge(row, label="nonsense"),
    "another class": lambda row: forge(row, label=min(LABELS, key=lambda name: row[f"p_{name}"])),
    "rejected, unasked": lambda row: forge(row, label="none of these", probability=None),
    "a formula": lambda row: forge(row, probability="=1+1"),
    "another probability": lambda row: forge(row, probability=row["probability"] / 2),
    "no probability": lambda row: forge(row, probability=None),
    "7.5": lambda row: forge(row, **{P0: 7.5}),
    "below 0": lambda row: forge(row, **{P0: -0.5}),
    "NaN": lambda row: forge(row, **{P0: float("nan")}),
    "all NaN": lambda row: forge(row, **dict.fromkeys((P0, P1, f"p_{LABELS[2]}", "probability"), float("nan"))),
    "infinite": lambda row: forge(row, **{P0: float("inf")}),
    "huge": lambda row: forge(row, **{P0: 10**400}),
    "true": lambda row: forge(row, **{P0: True}),
    "text for a number": lambda row: forge(row, **{P0: "0.1"}),
    "a number as a list": lambda row: forge(row, **{P0: [0.1]}),
    "more than 1 together": lambda row: forge(row, **{P0: 1.0, P1: 1.0}),
    "column missing": lambda row: [{name: value for name, value in row.items() if name != P0}],
    "column more": lambda row: forge(row, more=1),
    "other order": lambda row: [dict(reversed(row.items()))],
    "an error": lambda row: forge(row, error="it is empty"),
    "a false error": lambda row: forge(row, error=""),
}


@pytest.mark.parametrize("kind", [*FORGERIES, "nested", "torn", "again"])
def test_a_row_that_no_run_writes_is_not_taken_over(
    kind: str, support: Path, folder: Path, tmp_path: Path, labelled: Labelled, capsys: pytest.CaptureFixture[str]
) -> None:
    table, part = tmp_path / "labels.csv", tmp_path / "labels.csv.part"
    run = predict_args(support, [folder / "0.mp4", folder / "1.mp4"], table)
    labelled.most = 1
    assert main(run) == 130
    header, line = part.read_text().splitlines()
    (row,) = json.loads(line)["rows"]
    if kind == "nested":
        forged = "[" * 200_000
    elif kind == "torn":
        forged = line[: len(line) // 2]
    elif kind == "again":
        forged = f"{line}\n{line}"
    else:
        forged = json.dumps(json.loads(line) | {"rows": FORGERIES[kind](row)})
    part.write_text(f"{header}\n{forged}\n")
    labelled.most = -1
    labelled.forget()
    capsys.readouterr()
    assert main(run) == 0
    assert labelled.forget() == ["0.mp4", "1.mp4"]
    assert "were labelled before" not in capsys.readouterr().out
    said = reference(support).predict([folder / "0.mp4", folder / "1.mp4"])
    assert [found["label"] for found in read_csv(table)] == list(said)


SEGMENTS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "backwards": lambda rows: [rows[0] | {"start": rows[0]["end"], "end": rows[0]["start"]}, *rows[1:]],
    "before the beginning": lambda rows: [rows[0] | {"start": -1.0}, *rows[1:]],
    "no time": lambda rows: [rows[0] | {"end": rows[0]["start"]}, *rows[1:]],
    "over one another": lambda rows: [*rows, rows[0]],
    "for ever": lambda rows: [*rows[:-1], rows[-1] | {"end": float("inf")}],
    "too long": lambda rows: [*rows[:-1], rows[-1] | {"end": 1e300}],
    "huge": lambda rows: [*rows[:-1], rows[-1] | {"end": 10**400}],
    "text": lambda rows: [rows[0] | {"start": "0"}, *rows[1:]],
    "null": lambda rows: [rows[0] | {"start": None}, *rows[1:]],
    "none of these": lambda rows: [rows[0] | {"label": "none of these", "probability": None}, *rows[1:]],
}


@pytest.mark.parametrize("kind", ["", *SEGMENTS])
def test_segments_that_no_run_writes_are_not_taken_over(
    kind: str, support: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, part = tmp_path / "s.csv", tmp_path / "s.csv.part"
    run = predict_args(support, [folder / "0.mp4"], table, "--segments", "--window", "0.3")
    with monkeypatch.context() as patched:
        patched.setattr(predict, "write_table", interrupted)
        assert main(run) == 130
    header, line = part.read_text().splitlines()
    content = json.loads(line)
    if kind:
        content["rows"] = SEGMENTS[kind](content["rows"])
    part.write_text(f"{header}\n{json.dumps(content)}\n")
    asked: list[str] = []
    own = FewShotClassifier.segments

    def segments(self: FewShotClassifier, video: Any, **options: Any) -> Any:
        asked.append(video)
        return own(self, video, **options)

    monkeypatch.setattr(FewShotClassifier, "segments", segments)
    assert main(run) == 0
    assert bool(asked) == bool(kind)
    assert all(float(row["start"]) < float(row["end"]) for row in read_csv(table))


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_is_rejected_is_taken_over(support: Path, folder: Path, tmp_path: Path, labelled: Labelled) -> None:
    table, part = tmp_path / "labels.csv", tmp_path / "labels.csv.part"
    run = predict_args(support, [folder / "0.mp4", folder / "1.mp4"], table, "--reject", "--threshold", "1e-3")
    labelled.most = 1
    assert main(run) == 130
    header, line = part.read_text().splitlines()
    (row,) = json.loads(line)["rows"]
    assert (row["label"], row["probability"]) == ("none of these", None)
    labelled.most = -1
    labelled.forget()
    assert main(run) == 0
    assert labelled.forget() == ["1.mp4"]
    for values in ({"distance": None}, {"distance": "far"}, {"distance": float("nan")}, {"probability": 0.5}):
        part.write_text(f"{header}\n{json.dumps(json.loads(line) | {'rows': forge(row, **values)})}\n")
        assert main(run) == 0
        assert labelled.forget() == ["0.mp4", "1.mp4"], values


class Impatient(ClipReader):
    """Is interrupted at a file of a certain name."""

    def read(self, path: str, uniforms: Tensor | None = None) -> tuple[Tensor, int]:
        if path.endswith("4.mp4"):
            raise KeyboardInterrupt
        return super().read(path, uniforms)


def test_what_the_model_has_seen_is_kept_while_the_next_is_read(
    support: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "ClipReader", Impatient)
    monkeypatch.setattr(encoding, "TOGETHER", 2)
    assert main(predict_args(support, [folder], tmp_path / "labels.csv")) == 130
    _, *lines = [json.loads(line) for line in (tmp_path / "labels.csv.part").read_text().splitlines()]
    assert [line["video"] for line in lines] == videos_of(folder)[:4]


@pytest.mark.skipif(sys.platform == "win32", reason="an open file can't be removed there")
def test_a_part_that_is_removed_meanwhile(
    support: Path, folder: Path, tmp_path: Path, labelled: Labelled, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "labels.csv"
    monkeypatch.setattr(labelled, "lose_patience", (tmp_path / "labels.csv.part").unlink)
    labelled.most = 3
    assert main(predict_args(support, [folder], table)) == 0
    assert [row["path"] for row in read_csv(table)] == videos_of(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv"]


def test_only_one_run_at_a_time(
    support: Path, folder: Path, tmp_path: Path, labelled: Labelled, capsys: pytest.CaptureFixture[str]
) -> None:
    table, part = tmp_path / "labels.csv", tmp_path / "labels.csv.part"
    run = predict_args(support, [folder], table)
    interrupt(run, labelled)
    before = part.read_bytes()
    with open_part(table):
        said = fails(run, capsys)
        assert f"another process writes the predictions {table}: " in said
        assert part.read_bytes() == before
        assert main(predict_args(support, [folder / "0.mp4"], tmp_path / "other.csv")) == 0
    labelled.forget()
    assert main(run) == 0
    assert len(labelled.forget()) == 2
    assert not part.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_run_that_was_killed_leaves_no_lock(tmp_path: Path) -> None:
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom clip_m2df.commands.predict import open_part\n"
        f"with open_part(Path({str(tmp_path / 'labels.csv')!r})) as part:\n"
        "    part.take_over('digest', {}, [])\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv.part"]
    with open_part(tmp_path / "labels.csv") as part:
        assert part.take_over("digest", {}, []) == {}
        part.clear()
    assert list(tmp_path.iterdir()) == []


# SIGTERM


@pytest.fixture
def former() -> Iterator[Any]:
    """The handler of SIGTERM before a run, which is not to be reached."""

    def handle(*_: object) -> None:
        raise AssertionError("nobody heard SIGTERM")

    before = signal.signal(signal.SIGTERM, handle)
    yield handle
    signal.signal(signal.SIGTERM, before)


def test_sigterm_ends_a_run_that_goes_on(
    former: Any,
    support: Path,
    folder: Path,
    tmp_path: Path,
    labelled: Labelled,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = predict_args(support, [folder], tmp_path / "labels.csv")
    with monkeypatch.context() as patched:
        patched.setattr(labelled, "lose_patience", lambda: signal.raise_signal(signal.SIGTERM))
        labelled.most = 4
        assert main(run) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith("clip-m2df: stopped by SIGTERM; the same command goes on where it was\n")
    assert signal.getsignal(signal.SIGTERM) is former
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv.part"]
    labelled.forget()
    labelled.most = -1
    assert main(run) == 0
    assert len(labelled.forget()) == 2
    assert signal.getsignal(signal.SIGTERM) is former


def test_a_run_in_another_thread_leaves_signals_alone(former: Any, support: Path, folder: Path, tmp_path: Path) -> None:
    ended: list[int] = []
    run = predict_args(support, [folder / "0.mp4"], tmp_path / "labels.csv")
    thread = threading.Thread(target=lambda: ended.append(main(run)))
    thread.start()
    thread.join()
    assert ended == [0]
    assert signal.getsignal(signal.SIGTERM) is former


# Workers


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_file_on_which_a_worker_dies_costs_its_row(
    support: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference(support).save(tmp_path / "classifier")
    monkeypatch.setattr(encoding, "ClipReader", DeadlyReader)
    videos = [str(folder / "0.mp4"), "crash.mp4", str(folder / "1.mp4")]
    more = ["--ckpt_path", str(tmp_path / "classifier"), "--workers", "1"]
    assert main(predict_args(None, videos, tmp_path / "labels.csv", *more)) == 1
    rows = read_csv(tmp_path / "labels.csv")
    assert [row["path"] for row in rows] == videos
    assert [row["error"] for row in rows] == ["", "the decoder crashed (SIGKILL)", ""]
    assert [rows[k]["label"] for k in (0, 2)] == list(reference(support).predict([videos[0], videos[2]]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_sigterm_ends_the_workers(
    former: Any, support: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference(support).save(tmp_path / "classifier")
    monkeypatch.setattr(encoding, "ClipReader", DeadlyReader)
    videos = ["stop.mp4", str(folder / "0.mp4")]
    more = ["--ckpt_path", str(tmp_path / "classifier"), "--workers", "1"]
    assert main(predict_args(None, videos, tmp_path / "labels.csv", *more)) == 128 + signal.SIGTERM
    assert multiprocessing.active_children() == []
    assert {path.name for path in tmp_path.iterdir()} == {"classifier", "labels.csv.part"}
