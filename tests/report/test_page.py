"""What all pages have in common."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_m2df.errors import UserError
from clip_m2df.report.page import (
    alignment_cells,
    check_page,
    frame_pictures,
    percent,
    prompt_rows,
    shade,
    strip_picture,
    write_page,
)
from tests.report.conftest import Measured, Node, read


def opened(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_numbers_in_words() -> None:
    assert [percent(x) for x in (0.12345, 1.0, 0.0, None, math.nan)] == ["12.3 %", "100.0 %", "0.0 %", "-", "-"]
    assert [shade(x) for x in (-1.0, 0.0, 0.26, 0.5, 1.0, 7.0, math.nan)] == [0, 0, 3, 5, 10, 10, 0]


def test_pictures_are_the_frames() -> None:
    clip = torch.zeros(12, 3, 20, 20, dtype=torch.uint8)
    clip += torch.arange(0, 240, 20, dtype=torch.uint8).view(12, 1, 1, 1)
    frames = [opened(uri) for uri in frame_pictures(clip)]
    assert [round(float(np.asarray(frame).mean()), -1) for frame in frames] == [0, 40, 60, 100, 120, 160, 180, 220]
    assert frames[0].size == (112, 112)
    across, down = opened(strip_picture(clip)), opened(strip_picture(clip, upright=True))
    assert (across.size, down.size) == ((480, 40), (40, 480))
    assert abs(int(np.asarray(across)[20, 60, 0]) - 20) < 4
    assert abs(int(np.asarray(down)[460, 20, 0]) - 220) < 4


def test_the_table_of_prompts() -> None:
    scores = torch.tensor([[0.1, 0.5], [0.3, 0.2]])
    counted = torch.tensor([[False, True], [True, False]])
    first, second = prompt_rows(["a", "b"], [0.75, 0.25], scores, counted, chosen="b")
    assert (first["name"], first["probability"], first["chosen"], second["chosen"]) == ("a", "75.0 %", False, True)
    assert first["cells"] == [
        {"text": "0.10", "shade": 0, "counted": False},
        {"text": "0.50", "shade": 10, "counted": True},
    ]
    same = prompt_rows(["a"], [1.0], torch.full((1, 2), 0.4), torch.ones(1, 2, dtype=torch.bool), chosen=None)
    assert [cell["shade"] for cell in same[0]["cells"]] == [0, 0]  # type: ignore[attr-defined]


def test_the_maps_of_an_alignment_share_a_scale() -> None:
    maps = alignment_cells(
        {"local": torch.tensor([[2.0, 0.0], [0.5, 1.0]]), "global": torch.tensor([[1.0, 0.0], [0.001, 1.0]])},
        {"local": 0.123, "global": 4.0},
    )
    assert [m["distance"] for m in maps] == ["0.12", "4.00"]
    assert maps[0]["cells"] == [(0, 0, "1.00"), (0, 1, "0.25"), (1, 1, "0.50")]  # column, row
    assert maps[1]["cells"] == [(0, 0, "0.50"), (1, 1, "0.50")]


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    for name, said in (
        ("report.pdf", r"--report is .*report.pdf: give it a name that ends in .html"),
        ("folder.html", r"the report .*folder.html: it is a folder"),
        ("file/report.html", r"cannot write the report .*: .*; name a file in a folder that can be written"),
    ):
        with pytest.raises(UserError, match=said):
            check_page(tmp_path / name)
    check_page(tmp_path / "new" / "report.html")
    assert list((tmp_path / "new").iterdir()) == []


def test_an_error_leaves_the_page_that_was_there(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("before")
    with pytest.raises(Exception, match="n_labelled"):
        write_page(page, "predictions.html.j2", {"title": "without the rest"})
    assert page.read_text() == "before"
    assert list(tmp_path.iterdir()) == [page]


@pytest.fixture(params=["predictions", "segments", "tested"])
def page(request: pytest.FixtureRequest) -> Node:
    found: Path | Measured = request.getfixturevalue(request.param)
    return read(found.page if isinstance(found, Measured) else found)


def test_a_page_may_do_nothing_but_what_is_in_it(page: Node) -> None:
    (policy,) = (m.attributes["content"] for m in page.all("meta", http_equiv="Content-Security-Policy"))
    rules = dict(rule.split(maxsplit=1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (own,) = page.all(tag)
        digest = base64.b64encode(hashlib.sha256(own.text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    pictures = [*(i.attributes["src"] for i in page.all("img")), *(i.attributes["href"] for i in page.all("image"))]
    assert pictures
    assert {uri.partition(",")[0] for uri in pictures} == {"data:image/jpeg;base64"}


def test_a_page_can_be_read_aloud(page: Node) -> None:
    (html,) = page.all("html")
    assert html.attributes["lang"] == "en"
    assert [len(list(page.all(tag))) for tag in ("h1", "main", "title")] == [1, 1, len(list(page.all("title")))]
    assert all(image.attributes["alt"] for image in page.all("img"))
    for picture in page.all("svg"):
        said = picture.attributes
        assert said.get("aria-hidden") == "true" or (said["role"] == "img" and said["aria-label"])
    ids = [
        node.attributes["id"]
        for tag in ("article", "image", "table", "main")
        for node in page.all(tag)
        if "id" in node.attributes
    ]
    assert len(ids) == len(set(ids))
    links = [a.attributes["href"] for a in page.all("a")] + [u.attributes["href"] for u in page.all("use")]
    assert {link.removeprefix("#") for link in links} <= set(ids)
