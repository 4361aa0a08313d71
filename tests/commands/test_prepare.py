import csv
import os
import random
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from clip_m2df.classifier.clips import list_examples, videos_in
from clip_m2df.cli import main
from clip_m2df.commands.prepare import prepare
from clip_m2df.datasets.benchmarks import BENCHMARKS
from clip_m2df.datasets.manifest import Manifest
from clip_m2df.datasets.tree import describe, scan
from clip_m2df.errors import UserError
from tests.clips import render, save_image

CLASSES = {
    "train": ["draw sword", "hurling (sport)", "air drumming", "busking", "yoga"],
    "val": ["hug", "kick", "kick ball", "run", "sit"],
    "test": ["eat", "zap", "golf", "pour", "talk"],
}
COUNTS = {"train": 10, "val": 6, "test": 6}
LISTED = ("kinetics100", "ssv2", "ssv2_small")  # their splits are not built in
NFC, NFD = (unicodedata.normalize(form, "Übung_für_Ängstliche") for form in ("NFC", "NFD"))


def touch(root: Path, names: Iterable[str]) -> Path:
    for path in (root / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def film(path: Path, codec: str, pix_fmt: str = "yuv420p") -> None:
    """A video in the format that its extension says."""
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        for number in range(5):
            picture = np.full((48, 64, 3), 40 * number, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))


def listed() -> dict[str, list[str]]:
    """The smallest lists that can supply 5-way 5-shot episodes: class/class_k, with numbers over all classes."""
    return {s: [f"{c}/{c}_{k}" for c in labels for k in range(COUNTS[s])] for s, labels in CLASSES.items()}


def save_lists(folder: Path, lists: dict[str, list[str]]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, lines in lists.items():
        (folder / f"{split}list01.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def all_listed() -> list[str]:
    return [line for lines in listed().values() for line in lines]


class Run:
    """One run of ``clip-m2df prepare`` on ``tmp_path/videos``, and what it left."""

    def __init__(self, tmp_path: Path, dataset: str, *options: str | Path, lists: dict[str, list[str]] | None = None):
        self.root, self.output, self.report = tmp_path / "videos", tmp_path / "out" / "m.csv", tmp_path / "report.csv"
        if lists is not None:
            options = ("--lists", save_lists(tmp_path / "lists", lists), *options)
        fixed = ["--root", self.root, "--output", self.output, "--report", self.report]
        self.status = main(["prepare", dataset, *map(str, [*fixed, *options])])

    @property
    def manifest(self) -> Manifest:
        return Manifest.read(self.output, self.root)

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """The split, label and path from the root of each video in the manifest, which is there for certain."""
        return [(v.split, v.label, os.path.relpath(v.path, self.root)) for v in self.manifest.videos]

    @property
    def paths(self) -> list[str]:
        return [path for _, _, path in self.rows]

    @property
    def problems(self) -> list[list[str]]:
        with self.report.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["split", "label", "entry", "problem", "candidates"]
        return rows


# What videos were cut from


@pytest.mark.parametrize(
    ("dataset", "groups"),
    [
        (
            "ucf101",
            {
                "Archery/v_Archery_g01_c01.avi": "Archery_g01",
                "Archery/v_Archery_g01_c02.avi": "Archery_g01",
                "Archery/v_Archery_g02_c01.avi": "Archery_g02",
                "Archery/v_Archery_g1_c10.mp4.mkv": "Archery_g1",
                "Biking/v_Biking_g01_c01.avi": "Biking_g01",
                "Biking/v_Biking_g01_c07/1.jpg": "Biking_g01",
                "Biking/Biking_g01_c03.avi": "",
                "Biking/v_Biking_g01.avi": "",
            },
        ),
        (
            "hmdb51",
            {
                "kick/TrumanShow_kick_f_nm_np1_fr_med_26.avi": "TrumanShow_kick",
                "kick/TrumanShow_kick_l_cm_np2_ba_bad_0.avi": "TrumanShow_kick",
                "kick/Truman_Show_kick_u_cm_np0_ri_goo_1.avi": "Truman_Show_kick",
                "kick/a_u_nm_np1_fr_bad_1_h_cm_np1_le_goo_12.avi": "a_u_nm_np1_fr_bad_1",
                "run/TrumanShow_run_f_nm_np1_fr_med_26.avi": "TrumanShow_run",
                "run/#20_(a)_run_f_cm_np12_ba_med_0/1.png": "#20_(a)_run",
                "run/TrumanShow_run_f_nm_np1_fr_med.avi": "",
                "run/TrumanShow_run_x_nm_np1_fr_med_26.avi": "",
            },
        ),
        (
            "kinetics100",
            {
                "yoga/-kYzxMKp514_000086_000096.mp4": "-kYzxMKp514",
                "yoga/-kYzxMKp514_000096_000106.mp4": "-kYzxMKp514",
                "yoga/abcdefghijk.mkv": "abcdefghijk",
                "hug/ABcdefghijk_1_2.mp4": "ABcdefghijk",
                "hug/___________.mp4": "___________",
                "hug/abcdefghijkl.mp4": "",
            },
        ),
        ("ssv2", {"hug/1234.webm": "", "hug/v_hug_g01_c01.webm": ""}),
    ],
)
def test_names_tell_what_videos_were_cut_from(
    tmp_path: Path, dataset: str, groups: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path / "videos", groups)
    if dataset in LISTED:
        stems = {str(Path(name).with_suffix("")) for name in groups}
        lists = {"train": sorted(stems), "val": ["sit/of none"], "test": ["eat/of none"]}
        Run(tmp_path, dataset, lists=lists)
    else:
        Run(tmp_path, dataset)
    with (tmp_path / "out" / "m.csv").open(newline="") as file:
        rows = {row["path"]: row.get("group") for row in csv.DictReader(file)}
    wanted = {
        str(Path(name).parent) if Path(name).suffix in (".jpg", ".png") else name: g for name, g in groups.items()
    }
    assert rows == (wanted if any(groups.values()) else dict.fromkeys(wanted))
    said = " ".join(capsys.readouterr().out.split())
    distinct = {group for group in groups.values() if group}
    assert (f": {len(distinct)} groups of {sum(map(bool, groups.values()))} videos, the largest of 2" in said) == bool(
        distinct
    )
    missing = sum(not group for group in groups.values())
    assert (f"{missing} videos have no group" in said) == bool(distinct)


@pytest.mark.parametrize(
    ("pattern", "group"),
    [
        (r"/tape\d+", "/tape7"),
        (r"tape(\d+)_", "7"),
        (r"^train/([^/]+)/tape(\d+)(x)?", "wave 7"),
        (r"clip \d+$", "clip 12"),  # no extension
    ],
)
def test_groups_of_ones_own(tmp_path: Path, pattern: str, group: str, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "videos", ["train/wave/tape7_clip 12.mp4", "train/wave/other.mp4"])
    run = Run(tmp_path, "folder", "--group", pattern)
    assert {Path(video.path).stem: video.group for video in run.manifest.videos} == {
        "tape7_clip 12": group,
        "other": "",
    }
    out = capsys.readouterr().out
    assert "1 groups of 1 videos" in out
    assert "1 videos have no group" in out
    assert "train/wave/other.mp4" in out


@pytest.mark.parametrize("pattern", ["(", "[a", "nowhere", r"^$", "x" * 3 + "{9999999999999999999999}"])
def test_groups_that_cannot_be_found_are_refused(
    tmp_path: Path, pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path / "videos", ["train/wave/tape7.mp4"])
    run = Run(tmp_path, "folder", "--group", pattern)
    assert run.status == 2
    assert not run.output.exists()
    assert f"--group {pattern!r}" in capsys.readouterr().err


# Listed videos


def test_every_listed_video_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "videos", [f"{line}.mp4" for line in all_listed()])
    run = Run(tmp_path, "kinetics100", lists=listed())
    assert run.status == 0
    assert run.problems == []
    assert len(run.rows) == 5 * (10 + 6 + 6)
    order = {"train": 0, "val": 1, "test": 2}
    assert run.rows == sorted(run.rows, key=lambda row: (order[row[0]], row[1], row[2]))
    assert {(split, label) for split, label, _ in run.rows} == {(s, c) for s, labels in CLASSES.items() for c in labels}
    texts = {video.label: video.text for video in run.manifest.videos}
    assert texts["hurling (sport)"] == "hurling sport"
    out = capsys.readouterr().out
    cells = [line.strip("│ ").split() for line in out.splitlines()]
    assert ["train", "│", "5", "│", "50", "│", "50", "│", "0", "│", "0", "│", "0"] in cells
    assert ["val", "│", "5", "│", "30", "│", "30", "│", "0", "│", "0", "│", "0"] in cells
    # What to do next; the videos lie outside the manifest's folder.
    assert f"  clip-m2df check --manifest {run.output} --root {run.root}\n" in out
    fit = f"clip-m2df fit --config kinetics100_5way1shot.yaml --data.manifest {run.output} --data.root {run.root}\n"
    assert fit in out
    assert Run(tmp_path, "kinetics100", "--output", tmp_path / "m.csv", lists=listed()).status == 0
    assert f"  clip-m2df check --manifest {tmp_path / 'm.csv'}\n" in capsys.readouterr().out
    assert "the published split has 64 / 12 / 24 classes and 6400 / 1200 / 2400 videos" in out


def test_missing_videos_and_short_classes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = ["yoga/yoga_3", "hug/hug_0", "zap/zap_5", *(f"golf/golf_{k}" for k in range(6))]
    touch(tmp_path / "videos", [f"{line}.mp4" for line in all_listed() if line not in gone])
    run = Run(tmp_path, "kinetics100", lists=listed())
    assert run.status == 1
    assert len(run.rows) == 110 - len(gone)
    assert sorted(row[2:] for row in run.problems) == [[name, "missing", ""] for name in sorted(gone)]
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines()]
    for row in (["train", "yoga", "9", "10"], ["val", "hug", "5", "6"], ["test", "golf", "0", "6"]):
        assert row in cells
    assert "report.csv names every missing and every ambiguous video" in out


@pytest.mark.parametrize(
    ("entry", "file"),
    [
        ("draw sword/a b", "draw_sword/a_b.avi"),
        ("draw_sword/a_b", "deep/er/Draw Sword/x/A B.AVI"),
        ("draw sword/(Rad)Schlag_die_Bank!_x", "draw sword/(Rad)Schlag_die_Bank!_x.mkv.mp4"),
        ('draw sword/-it\'s "q" [1], {2} & 50% #3', 'flat/-it\'s "q" [1], {2} & 50% #3.webm'),
        ("draw sword/" + NFC, f"{NFD}.mp4"),
        ("draw sword/" + NFD, f"{NFC.upper()}.mp4"),
        ("draw sword/x.avi", "draw sword/x.mp4"),
        ("draw sword/v1.2", "v1.2.mp4"),
        ("draw sword/x", "by split/train/x.MPEG"),
        ("videos/draw sword/x.avi", "x.avi"),
    ],
)
def test_names_match_whatever_the_folder_case_and_extension(tmp_path: Path, entry: str, file: str) -> None:
    lists = listed()
    lists["train"].append(entry)
    touch(tmp_path / "videos", [file, *(f"{line}.mp4" for line in all_listed())])
    run = Run(tmp_path, "folder", lists=lists)
    assert run.problems == []
    assert ("train", "draw sword", file) in run.rows


def test_folders_of_frames_are_videos(tmp_path: Path) -> None:
    root = touch(tmp_path / "videos", [f"{line}/{k}.JPG" for line in all_listed() for k in (1, 2)])
    touch(root, ["yoga/cover.png", "hug/hug_0/frames.txt", "hug/hug_1/.hidden.mp4", ".cache/hug/hug_0.mp4"])
    run = Run(tmp_path, "kinetics100", lists=listed())
    assert run.status == 0
    assert ("val", "hug", "hug/hug_0") in run.rows


def test_of_several_files_the_one_in_the_class_folder_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "videos", [f"{line}.mp4" for line in all_listed()])
    touch(tmp_path / "videos", ["other/yoga_1.mp4", "eat/yoga_2.mp4", "eat/Yoga/yoga_3/x.jpg"])
    touch(tmp_path / "videos", ["yoga/yoga_4.webm", "copies/yoga/YOGA 5.mp4"])  # of the second pair one is spelled so
    run = Run(tmp_path, "kinetics100", lists=listed())
    assert run.status == 1
    assert run.problems == [
        ["train", "yoga", "yoga/yoga_3", "ambiguous", "eat/Yoga/yoga_3 | yoga/yoga_3.mp4"],
        ["train", "yoga", "yoga/yoga_4", "ambiguous", "yoga/yoga_4.mp4 | yoga/yoga_4.webm"],
    ]
    assert {path for path in run.paths if "yoga" in path} == {f"yoga/yoga_{k}.mp4" for k in (0, 1, 2, 5, 6, 7, 8, 9)}
    assert "2 ambiguous: several files fit, and none is used" in capsys.readouterr().out


def test_one_name_in_two_classes_is_told_by_the_class_folder(tmp_path: Path) -> None:
    lists = {s: [f"{c}/{k}" for c in labels for k in range(COUNTS[s] + 1)] for s, labels in CLASSES.items()}
    touch(tmp_path / "videos", [f"{line}.mp4" for lines in lists.values() for line in lines if line != "yoga/3"])
    run = Run(tmp_path, "folder", lists=lists)
    assert run.status == 0
    # The files of other classes that have its name don't stand in for it.
    (problem,) = run.problems
    assert problem[:4] == ["train", "yoga", "yoga/3", "missing"]
    assert problem[4] == "air drumming/3.mp4 | busking/3.mp4 | draw sword/3.mp4"
    assert all(path.startswith(f"{label}/") for _, label, path in run.rows)


def test_one_file_for_two_entries(tmp_path: Path) -> None:
    lists = listed()
    lists["train"] += ["yoga/both", "busking/both", "yoga/Same", "yoga/same"]
    touch(tmp_path / "videos", ["both.mp4", "same.mp4", *(f"{line}.mp4" for line in all_listed())])
    run = Run(tmp_path, "folder", lists=lists)
    assert run.status == 0
    assert run.problems == [
        ["train", "busking", "busking/both", "ambiguous", "both.mp4"],
        ["train", "yoga", "yoga/Same", "missing", "same.mp4"],
        ["train", "yoga", "yoga/both", "ambiguous", "both.mp4"],
    ]
    assert ("train", "yoga", "same.mp4") in run.rows


# Kinetics


@pytest.mark.parametrize(
    ("entry", "files", "wanted"),
    [
        ("yoga/-kYzxMKp514_000086_000096", ["yoga/-kYzxMKp514.mp4"], 0),
        ("yoga/-kYzxMKp514", ["yoga/-kYzxMKp514_000086_000096.mp4"], 0),
        ("yoga/6Z267m0nKuo.mkv.mp4", ["x/6Z267m0nKuo_000001_000011.mkv"], 0),
        ("yoga/-kYzxMKp514_000086_000096", ["-kYzxMKp514.mp4", "-kYzxMKp514_000086_000096.mp4"], 1),
        ("yoga/-kYzxMKp514_000086_000096", ["-kYzxMKp514_000001_000011.mp4", "-kYzxMKp514_000086_000096.webm"], 1),
        ("yoga/-kYzxMKp514_000086_000096", ["-kyzxmkp514_000086_000096.mp4"], 0),
        ("yoga/-kYzxMKp514_000086_000096", ["-kyzxmkp514.mp4", "-kYzxMKp514.mp4"], 1),
        ("yoga/-kYzxMKp514", ["-kYzxMKp514_000086_000096.mp4", "yoga/-kYzxMKp514_000001_000011.mp4"], 1),
        ("yoga/-kYzxMKp514", ["-kYzxMKp514x.mp4"], None),
        ("yoga/-kYzxMKp514", ["a/-kYzxMKp514_000086_000096.mp4", "b/-kYzxMKp514_000001_000011.mp4"], None),
        ("yoga/yoga_kinetics_1", ["yoga_kinetics_2.mp4"], None),
    ],
)
def test_kinetics_videos_go_by_their_ids(tmp_path: Path, entry: str, files: list[str], wanted: int | None) -> None:
    lists = listed()
    lists["train"].append(entry)
    touch(tmp_path / "videos", [*files, *(f"{line}.mp4" for line in all_listed())])
    run = Run(tmp_path, "kinetics100", lists=lists)
    used = [path for path in run.paths if path in files]
    assert used == ([] if wanted is None else [files[wanted]])
    assert [row[2] for row in run.problems] == ([entry] if wanted is None else [])


def test_ids_that_differ_in_case_are_different_videos(tmp_path: Path) -> None:
    lists = listed()
    lists["train"] += ["yoga/abcdefghijk_000001_000011", "yoga/ABCDEFGHIJK_000001_000011"]
    touch(tmp_path / "videos", ["abcdefghijk.mp4", *(f"{line}.mp4" for line in all_listed())])
    run = Run(tmp_path, "kinetics100", lists=lists)
    assert [row[2:] for row in run.problems] == [["yoga/ABCDEFGHIJK_000001_000011", "missing", "abcdefghijk.mp4"]]


# Class splits


@pytest.mark.parametrize("dataset", ["hmdb51", "ucf101"])
def test_built_in_splits_give_what_lists_give(tmp_path: Path, dataset: str) -> None:
    split = BENCHMARKS[dataset].class_split
    lists = {s: [f"{label}/v_{label}_{k}" for label in split[s] for k in range(COUNTS[s])] for s in split}
    lines = [line for lines in lists.values() for line in lines]
    touch(tmp_path / "videos", [f"a/{line}.avi".replace("HandstandP", "HandStandP") for line in lines])
    run = Run(tmp_path, dataset)
    assert run.status == 0
    built_in = run.output.read_bytes()
    assert len(run.rows) == len(lines)
    assert {label for _, label, _ in run.rows} == {label for labels in split.values() for label in labels}
    assert Run(tmp_path, dataset, lists=lists).status == 0
    assert run.output.read_bytes() == built_in


def test_videos_outside_class_folders_and_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = BENCHMARKS["hmdb51"].class_split
    touch(tmp_path / "videos", [f"{c}/{c}_{k}.avi" for s in split for c in split[s] for k in range(COUNTS[s] + 1)])
    touch(tmp_path / "videos", ["stray.avi", "more/stray.avi", "copies/Kick Ball/kick ball 0.mp4", "kick/run/new.avi"])
    run = Run(tmp_path, "hmdb51")
    assert run.status == 0
    copies = "copies/Kick Ball/kick ball 0.mp4 | kick_ball/kick_ball_0.avi"
    assert run.problems == [["test", "kick_ball", "kick_ball/kick ball 0", "ambiguous", copies]]
    assert ("test", "run", "kick/run/new.avi") in run.rows
    out = capsys.readouterr().out
    assert "passed over 2 that lie in no folder of a class: 'stray.avi', 'more/stray.avi'" in out


def test_a_tree_of_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tops = {"train": "train", "val": "Validation", "test": "test"}
    names = [f"{tops[s]}/{c}/{k % 2}/{k}.mp4" for s, labels in CLASSES.items() for c in labels for k in range(10)]
    touch(tmp_path / "videos", [*names, "stray.mp4", "test/stray.mp4", "annotations/read.me"])
    run = Run(tmp_path, "folder")
    assert run.status == 0
    assert sorted(run.paths) == sorted(names)
    assert ("val", "kick ball", "Validation/kick ball/0/0.mp4") in run.rows
    assert "passed over 2 that lie in no folder of a class: " in capsys.readouterr().out


def test_a_tree_of_classes_with_lists_of_classes(tmp_path: Path) -> None:
    names = [f"some/{c.replace(' ', '_')}/{k}.mp4" for labels in CLASSES.values() for c in labels for k in range(10)]
    touch(tmp_path / "videos", [*names, "some/unlisted/1.mp4"])
    run = Run(tmp_path, "folder", lists=CLASSES)
    assert run.status == 0
    assert sorted(run.paths) == sorted(names)


def test_splits_that_supply_no_episodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = touch(tmp_path / "videos", [f"{s}/{c}/{k}.mp4" for s in COUNTS for c in CLASSES[s] for k in range(10)])
    shutil.rmtree(root / "val")
    assert Run(tmp_path, "folder").status == 0
    assert "there is no val split: training cannot choose its best checkpoint by one" in capsys.readouterr().out
    shutil.rmtree(root / "test")
    shutil.rmtree(root / "train" / "yoga")
    assert Run(tmp_path, "folder").status == 1
    out = capsys.readouterr().out
    assert "the train split has 4 classes, but 5-way episodes take 5" in out
    assert "there is no test split" in out


# Lists that others make of all videos


def test_kinetics_own_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = touch(
        tmp_path / "videos", ["open door/-abcdefghij_000001_000011.mp4", "wave/_bcdefghij-.mkv", "x/other.mp4"]
    )
    lists = touch(tmp_path / "lists", ["train.csv", "test.csv"])
    header = "label,youtube_id,time_start,time_end,split\n"
    (lists / "train.csv").write_text(f"{header}open door,-abcdefghij,1,11,train\nwave,#NAME?,3,13,train\n")
    (lists / "test.csv").write_text(f'{header}"wave",_bcdefghij-,1,11,test\nwave,cccdefghij-,1,11,test\n')
    for dataset in ("kinetics100", "folder"):
        run = Run(tmp_path, dataset, "--lists", lists)
        assert run.status == 1
        assert run.rows == [
            ("train", "open door", "open door/-abcdefghij_000001_000011.mp4"),
            ("test", "wave", "wave/_bcdefghij-.mkv"),
        ]
        assert run.problems == [["test", "wave", "wave,cccdefghij-,1,11,test", "missing", ""]]
        out = capsys.readouterr().out
        assert (
            "passed over 1 lines without the id of a video, which a spreadsheet may have destroyed: 'wave,#NAME?" in out
        )
    assert root.is_dir()


def test_paths_with_numbers_take_their_classes_from_the_tree(tmp_path: Path) -> None:
    touch(tmp_path / "videos", ["open door/a b.mp4", "open door/c/1.jpg", "wave/d.avi"])
    lists = touch(tmp_path / "lists", ["train.txt", "test.txt"])
    (lists / "train.txt").write_text("a b.mp4 0\n")
    (lists / "test.txt").write_text("d.avi 12 40 1\n")
    wanted = [("train", "open door", "open door/a b.mp4"), ("test", "wave", "wave/d.avi")]
    assert Run(tmp_path, "folder", "--lists", lists).rows == wanted
    (lists / "train.txt").write_text("open door/a b.mp4 0\n")
    assert Run(tmp_path, "folder", "--lists", lists).rows == wanted
    (tmp_path / "index.txt").write_text("opening\nwaving\n")
    run = Run(tmp_path, "folder", "--lists", lists, "--annotations", tmp_path / "index.txt")
    assert run.rows == [("train", "opening", "open door/a b.mp4"), ("test", "waving", "wave/d.avi")]


# The manifest


@pytest.mark.parametrize("output", ["out/m.csv", "m.csv", "videos/m.csv"])
def test_manifests_hold_no_absolute_path_and_move(tmp_path: Path, output: str) -> None:
    touch(tmp_path / "a" / "videos", [f"{s}/{c}/{k}.mp4" for s in COUNTS for c in CLASSES[s] for k in range(COUNTS[s])])
    root = tmp_path / "a" / "videos"
    assert main(["prepare", "folder", "--root", str(root), "--output", str(tmp_path / "a" / output)]) == 0
    before = Manifest.read(tmp_path / "a" / output, root)
    assert str(tmp_path) not in (tmp_path / "a" / output).read_text()
    (tmp_path / "a").rename(tmp_path / "b")
    after = Manifest.read(tmp_path / "b" / output, tmp_path / "b" / "videos")
    assert [os.path.relpath(video.path, tmp_path / "b") for video in after.videos] == [
        os.path.relpath(video.path, tmp_path / "a") for video in before.videos
    ]


def test_links_to_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = touch(tmp_path / "videos", [f"{s}/{c}/{k}.mp4" for s in COUNTS for c in CLASSES[s] for k in range(10)])
    (root / "train/yoga/again.mp4").symlink_to(root / "train/yoga/1.mp4")
    os.link(root / "train/yoga/2.mp4", root / "train/yoga/hard.mp4")
    (root / "test/eat/leak.mp4").symlink_to(root / "train/yoga/3.mp4")
    os.link(root / "test/eat/1.mp4", root / "val/hug/leak.mp4")
    run = Run(tmp_path, "folder")
    assert len(run.rows) == 148
    assert [row[:4] for row in run.problems] == [
        ["train", "yoga", "train/yoga/3.mp4", "ambiguous"],
        ["val", "hug", "val/hug/leak.mp4", "ambiguous"],
        ["test", "eat", "test/eat/1.mp4", "ambiguous"],
        ["test", "eat", "test/eat/leak.mp4", "ambiguous"],
    ]
    out = capsys.readouterr().out
    links = "'train/yoga/again.mp4', 'train/yoga/hard.mp4'"
    assert f"passed over 2 that are links to others that are taken: {links}" in out


# The tree


def put_every_kind(folder: Path) -> Path:
    """Videos under names that hide it, and what is no video."""
    clip = render(folder / "clip.mp4", 8, size=(48, 32))
    for name in ("no_extension", "strange.xyz", "UPPER.MP4", "half.mp4.part", "half.mkv.crdownload", ".hidden.mp4"):
        (folder / name).write_bytes(clip.read_bytes())
    for name, codec, options in (
        ("anim.gif", "gif", {"pix_fmt": "rgb8"}),
        ("t0.ogg", "libvpx", {}),
        ("t1.mxf", "mpeg2video", {}),
        ("t2.m2v", "mpeg2video", {}),
        ("t3.y4m", "rawvideo", {}),
        ("t4.h264", "libx264", {}),
    ):
        film(folder / name, codec, **options)
    (folder / "notes").write_text("Once upon a time.\n" * 50)
    (folder / "list").write_text("#EXTM3U\nclip.mp4\n")
    (folder / "noise").write_bytes(random.Random(0).randbytes(10_000))
    (folder / "picture").write_bytes(save_image(folder / "single.png", 1).read_bytes())
    for name in ("notes.txt", "a.json", "b.JSON", "c.csv", "Thumbs.db", ".DS_Store", "videos.zip", "more.tar.gz"):
        (folder / name).write_bytes(clip.read_bytes())  # none is opened
    (folder / "broken.mp4").symlink_to(folder / "none.mp4")
    os.mkfifo(folder / "pipe.mp4")
    return folder


VIDEOS = sorted(
    [
        "clip.mp4",
        "no_extension",
        "strange.xyz",
        "UPPER.MP4",
        "anim.gif",
        "t0.ogg",
        "t1.mxf",
        "t2.m2v",
        "t3.y4m",
        "t4.h264",
    ]
)
LEFT_OUT = {
    "without an extension": ["list", "noise", "notes", "picture"],
    "partial downloads": ["half.mkv.crdownload", "half.mp4.part"],
    "hidden": [".DS_Store", ".hidden.mp4"],
    ".json": ["a.json", "b.JSON"],
    "archives": ["more.tar.gz", "videos.zip"],
    ".txt": ["notes.txt"],
    ".csv": ["c.csv"],
    ".db": ["Thumbs.db"],
    "broken links": ["broken.mp4"],
    "neither files nor folders": ["pipe.mp4"],
    "single images": ["single.png"],
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_what_a_folder_has_is_taken_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "videos" / "train" / "yoga").mkdir(parents=True)
    folder = put_every_kind(tmp_path / "videos" / "train" / "yoga")
    tree = scan(folder)
    assert [file.name for file in tree.files] == VIDEOS
    assert tree.left_out == LEFT_OUT
    run = Run(tmp_path, "folder")
    assert sorted(os.path.basename(path) for path in run.paths) == VIDEOS
    out = capsys.readouterr().out
    assert "not taken for videos: without an extension: 4 (train/yoga/list, train/yoga/noise and 2 more), " in out
    assert "archives: 2 (train/yoga/more.tar.gz, train/yoga/videos.zip)" in out
    assert "; unpack and complete those with videos" in out
    with pytest.warns(UserWarning, match="not taken for videos in ") as caught:
        assert sorted(os.path.basename(path) for path in videos_in(folder)) == VIDEOS
    assert str(caught[0].message) == f"not taken for videos in {folder}: {describe(LEFT_OUT)}"
    with pytest.warns(UserWarning, match="not taken for videos in ") as caught:
        (examples,) = list_examples(folder.parent).values()
    assert len(examples) == len(VIDEOS)
    assert "yoga/half.mp4.part" in str(caught[0].message)


def test_kinds_without_end_are_not_all_named() -> None:
    text = describe({f".{number:05}": [f"a.{number:05}"] for number in range(5000)})
    assert text.count(": 1 (") == 40
    assert text.endswith(", 4960 other kinds: 4960 (a.00040, a.00041 and 4958 more)")


def test_motion_jpeg_is_a_video_and_pictures_are_none(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "videos").mkdir()
    Image.new("RGB", (48, 32)).save(tmp_path / "frames" / "1.jpg")
    picture = (tmp_path / "frames" / "1.jpg").read_bytes()
    for name in ("clip.mjpeg", "clip.mjpg", "picture"):
        (tmp_path / "videos" / name).write_bytes((4 if name != "picture" else 1) * picture)
    assert [file.name for file in scan(tmp_path / "videos").files] == ["clip.mjpeg", "clip.mjpg"]


def test_a_folder_of_frames_stays_one_whatever_is_beside_them(tmp_path: Path) -> None:
    root = touch(tmp_path / "videos", ["frames/1.jpg", "frames/2.jpg", "frames/read.me", "frames/flow.flo"])
    render(root / "preview.mp4", 8, size=(48, 32)).rename(root / "frames" / "preview")
    tree = scan(root)
    assert [file.inner_path for file in tree.files] == ["frames"]
    assert sorted(name for names in tree.left_out.values() for name in names) == [
        *("frames/flow.flo", "frames/preview", "frames/read.me")
    ]


def test_unknown_files_without_end_are_not_all_opened(tmp_path: Path) -> None:
    root = touch(tmp_path / "videos", [f"{k}.feat" for k in range(150)])
    clip = render(tmp_path / "clip.mp4", 8, size=(48, 32))
    for name in ("000.feat", "~.feat", "~.dat"):
        (root / name).write_bytes(clip.read_bytes())
    assert [file.name for file in scan(root).files] == ["000.feat", "~.dat", "~.feat"]
    (root / "000.feat").unlink()
    assert [file.name for file in scan(root).files] == ["~.dat"]
    assert len(scan(root).left_out[".feat"]) == 151


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = touch(tmp_path / "videos", ["z/a.mp4", "b.mp4"])
    touch(tmp_path / "elsewhere", ["c.mp4", "d/1.jpg"])
    (root / "a_link").symlink_to(root / "z")
    (root / "z" / "up").symlink_to(root)
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "link.mp4").symlink_to(root / "b.mp4")
    (root / "broken.mp4").symlink_to(root / "none")
    (root / "itself.mp4").symlink_to(root / "itself.mp4")
    tree = scan(root)
    assert sorted(file.inner_path for file in tree.files) == ["b.mp4", "link.mp4", "out/c.mp4", "out/d", "z/a.mp4"]
    assert tree.unreadable == tree.unusable == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names are bytes on Linux only")
def test_names_that_a_manifest_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "videos", [f"{line}.mp4" for line in all_listed()])
    folder = os.fsencode(tmp_path / "videos")
    os.mkdir(folder + b"/\xfe")
    for name in (b"/\xff.mp4", b"/line\nbreak.mp4", b"/\xfe/x.mp4"):
        os.close(os.open(folder + name, os.O_CREAT))
    assert Run(tmp_path, "kinetics100", lists=listed()).status == 0
    out = capsys.readouterr().out
    assert "passed over 3 that have names that a manifest cannot hold: rename them: " in out
    assert r"\udcff.mp4'" in out
    assert r"line\nbreak.mp4'" in out


def test_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = touch(tmp_path / "videos", ["a/1.mp4", "b/1.mp4"])
    real = os.scandir

    def deny(path: str) -> object:
        if path.endswith("b"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", deny)  # a superuser may read everything
    tree = scan(root)
    assert [file.inner_path for file in tree.files] == ["a/1.mp4"]
    assert tree.unreadable == [str(root / "b")]


# Refusals


def refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path, dataset: str, *options: str | Path) -> str:
    """The line with which a run on ``tmp_path/videos`` ends, leaving no manifest."""
    run = Run(tmp_path, dataset, *options)
    assert run.status == 2
    assert not run.output.exists()
    message = capsys.readouterr().err
    assert message.startswith("clip-m2df: error: ")
    assert message.count("\n") == 1
    return message


def test_no_listed_video_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "videos", ["films/holiday.mp4"])
    lists = save_lists(tmp_path / "lists", listed())
    message = refusal(capsys, tmp_path, "kinetics100", "--lists", lists)
    assert f"none of the videos looked for is under {tmp_path / 'videos'}: looked for such as 'air drumming/" in message
    assert "found such as 'films/holiday.mp4'; name the folder with the data set's videos as --root" in message


def test_every_video_is_ambiguous(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "videos", ["kick/1.mp4", "kick/1.avi"])
    message = refusal(capsys, tmp_path, "hmdb51")
    assert "test,kick,kick/1,ambiguous,kick/1.avi | kick/1.mp4" in (tmp_path / "report.csv").read_text()
    assert "'kick/1' fits 'kick/1.avi', 'kick/1.mp4'; name a --root that holds each video once" in message


@pytest.mark.parametrize(
    ("dataset", "names", "reason"),
    [
        ("folder", ["a/read.me", "cover.jpg"], "there is no video under"),
        ("hmdb51", [], "--root names the folder with the videos"),
        ("hmdb51", ["x.mp4"], "looked for such as 'brush_hair/…'"),
        *((name, ["a.mp4"], f"{name} needs its split lists: name their folder with --lists") for name in LISTED),
        ("folder", ["run/1.mp4"], "the folder 'run' in "),
        ("folder", ["val/run/1.mp4", "validation/hug/1.mp4"], "are both the val split: make them one"),
        ("folder", ["val/Long jump/1.mp4", "test/long_jump/1.mp4"], "is in two splits, test and val in "),
        ("folder", ["train/1.mp4"], "none of the videos looked for is under "),
    ],
)
def test_trees_that_make_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str, names: list[str], reason: str
) -> None:
    touch(tmp_path / "videos", names)
    assert reason in refusal(capsys, tmp_path, dataset)


def test_outputs_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "videos", ["kick/1.mp4"])
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "m.csv"):
        message = refusal(capsys, tmp_path, "hmdb51", "--output", output)
        assert re.search(rf"cannot write the manifest {output}: .*; name a file", message)
    message = refusal(capsys, tmp_path, "hmdb51", "--output", tmp_path / "report.csv")
    assert "--output and --report are both" in message


@pytest.mark.parametrize(
    ("dataset", "annotations", "reason"),
    [
        ("hmdb", (), "there is no data set 'hmdb': choose from kinetics100, ssv2, ssv2_small, hmdb"),
        ("ucf101", [Path("a.json")], "--annotations names the classes of --lists, and there are none"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, dataset: Any, annotations: list[Path], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        prepare(dataset, root=tmp_path, annotations=annotations, output=tmp_path / "m.csv")


def test_a_run_that_is_refused_leaves_what_was_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "m.csv"
    output.write_text("as it was")
    assert main(["prepare", "hmdb51", "--root", str(touch(tmp_path / "v", ["x.mp4"])), "--output", str(output)]) == 2
    assert output.read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.csv", "v"]
    assert "none of the videos looked for is under" in capsys.readouterr().err
