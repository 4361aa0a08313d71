"""docs/motion_shapes.md says of the families and the knobs what is so, and its sheets show it."""

import importlib
import re
from collections import Counter
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from clip_m2df.commands.configs import find_config
from clip_m2df.motion_shapes import FAMILIES, appearances_of
from clip_m2df.motion_shapes.classes import SPLITS
from clip_m2df.motion_shapes.rendering import VIDEOS_PER_CLASS
from clip_m2df.video.transforms import ClipReader

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/motion_shapes.md").read_text(encoding="utf-8")
script = importlib.import_module("scripts.motion_shapes_sheets")


def section(heading: str) -> str:
    return PAGE.partition(f"\n## {heading}")[2].partition("\n## ")[0]


def cells(text: str) -> list[list[str]]:
    """The rows of the tables in a text, without their heads."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_lists_the_classes_of_each_family(family: str) -> None:
    text = section(f"`{family}`")
    found = re.findall(r"^- \*\*(\w+)\*\*, (\d+): (.*?)(?=\n-|\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    assert [split for split, _, _ in found] == list(SPLITS)
    for split, count, listed in found:
        labels = " ".join(listed.split()).split(" · ")
        assert labels == [c.label for c in FAMILIES[family] if c.split == split]
        assert int(count) == len(labels)
    words = " ".join(text.split())
    train, val, test = VIDEOS_PER_CLASS[family].values()
    if train == val == test:
        assert f"{train} videos of each class" in words
    else:
        assert f"{train} videos of each class of train, {val} of val, {test} of test" in words


def test_the_page_counts_videos_and_appearances() -> None:
    counted = {row[0]: row[1] for row in cells(section("How to use it"))}
    for family, members in FAMILIES.items():
        assert counted[f"`{family}`"] == str(sum(VIDEOS_PER_CLASS[family][c.split] for c in members))
    train, val, test = (len(appearances_of(split)) for split in SPLITS)
    assert f"{train} for training, {val} for val, {test} for test" in PAGE


def guessing(alike: list[int], n_way: int = 5) -> float:
    """Share of the queries of ``n_way`` classes that are right if those of a group are guessed among.

    Args:
        alike: the sizes of the groups.
        n_way: classes of an episode.
    """
    others, right = sum(alike) - 1, 0.0
    for size in alike:
        for rivals in range(min(size, n_way)):
            chance = comb(size - 1, rivals) * comb(others - size + 1, n_way - 1 - rivals) / comb(others, n_way - 1)
            right += size * chance / (rivals + 1)
    return right / sum(alike)


def test_the_yardsticks_are_what_guessing_gives() -> None:
    stated = {row[0].strip("`"): row[3] for row in cells(PAGE) if len(row) == 4}
    for family, members in FAMILIES.items():
        test = [c for c in members if c.split == "test"]
        groups = Counter(frozenset((c.motion, c.twin.motion)) if family == "order" else c.appearance for c in test)
        assert stated[family] == f"{100 * guessing(list(groups.values())):.1f} %"


def test_the_page_explains_the_levels_of_the_study() -> None:
    study = yaml.safe_load((find_config("demo_5way1shot.yaml").parent / "study/full.yaml").read_text(encoding="utf-8"))
    knobs = study["parts"]["main"]["knobs"]
    levels = [(f"`{knob}`", str(level)) for knob in knobs for level in knobs[knob]]
    rows = [row for row in cells(section("Knobs")) if row[0].startswith("`")]
    assert [(row[0], row[1]) for row in rows] == levels
    for name, level, said in rows:
        if name == "`noise`":
            assert f"{int(255 * float(level) + 0.5)} of 255" in said
        if name == "`outliers`":
            assert f"{1 - (1 - float(level)) ** 5:.0%}".replace("%", " %") in said


def test_sheets_show_the_frames_of_the_videos(tmp_path: Path) -> None:
    rows = script.knob_rows(tmp_path, {"overlap": [1.0], "noise": [0.5]})
    outliers = [f"outlier: {kind}" for kind in ("occluded", "off class", "static")]
    assert [row.said for row in rows] == ["as usual", "overlap 1.0", "noise 0.5", *outliers]
    picture = script.sheet(rows, 2, ["one", "two"])
    assert picture.tobytes() == script.sheet(rows, 2, ["one", "two"]).tobytes()
    pixels = np.asarray(picture.convert("RGB")).astype(float)
    side, step = script.SIDE, script.SIDE + script.BETWEEN

    def frame(row: int, column: int, number: int) -> Any:
        y = pixels.shape[0] - script.MARGIN - side - (len(rows) - 1 - row) * (side + script.GAP)
        x = pixels.shape[1] - script.MARGIN - side - (1 - number) * step
        x -= (1 - column) * (step + side + script.MARGIN)
        return pixels[y : y + side, x : x + side]

    for row, column, number in np.ndindex(len(rows), 2, 2):
        clip, _ = ClipReader(2, resize=side, size=side).read(str(rows[row].videos[column]))
        expected = clip[number].permute(1, 2, 0).numpy()
        assert np.abs(frame(row, column, number) - expected).mean() < 12  # but for the palette
    for column in range(2):
        assert np.abs(frame(5, column, 0) - frame(5, column, 1)).mean() < 4  # it stands still
        assert np.abs(frame(2, column, 0) - frame(0, column, 0)).mean() > 20  # it is noisy


@pytest.mark.parametrize("name", ["scene", "order", "mixed", "knobs"])
def test_the_pages_sheets_are_small_and_of_the_right_size(name: str) -> None:
    path = ROOT / f"docs/figures/motion_shapes_{name}.png"
    assert f"](figures/{path.name})" in PAGE
    assert path.stat().st_size < 200_000
    n_rows = 12 if name != "knobs" else 1 + 3 + 3 + 3
    with Image.open(path) as picture:
        heads = script.TEXT + script.MARGIN if name == "knobs" else 0
        assert picture.height == heads + 2 * script.MARGIN + n_rows * (script.SIDE + script.GAP) - script.GAP
