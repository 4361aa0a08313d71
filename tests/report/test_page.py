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
from jinja2 import UndefinedError
from PIL import Image

from clip_m2df.errors import UserError
from clip_m2df.evaluation.evidence import Alignment, PromptScore
from clip_m2df.report.page import check_page, frame_pictures, percent, shade, strip_picture, templates, write_page
from tests.report.conftest import Node, read


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


def part(name: str, *arguments: object, tmp_path: Path) -> Node:
    """What a macro of the pages' parts makes."""
    path = tmp_path / "part.html"
    path.write_text(getattr(templates().get_template("parts.html.j2").module, name)(*arguments), encoding="utf-8")
    return read(path)


def test_the_table_of_prompts(tmp_path: Path) -> None:
    first = PromptScore("a", 0.75, [0.1, 0.5], [False, True], chosen=False)
    second = PromptScore("b", 0.25, [0.3, 0.2], [True, False], chosen=True)
    page = part("prompt_table", [first, second], tmp_path=tmp_path)
    (table,) = page.all("table")
    assert table.rows() == [["a", "75.0 %", "0.10", "0.50"], ["b (chosen)", "25.0 %", "0.30", "0.20"]]
    cells = [cell.attributes["class"] for row in list(table.all("tr"))[1:] for cell in row.all("td")]
    assert cells == ["number", "s0", "s10 counted", "number", "s5 counted", "s2"]
    same = part("prompt_table", [PromptScore("a", 1.0, [0.4, 0.4], [True, True], chosen=False)], tmp_path=tmp_path)
    assert len(list(same.all("td", class_="s0"))) == 2


def test_the_maps_of_an_alignment_share_a_scale(tmp_path: Path) -> None:
    maps = {"local": torch.tensor([[2.0, 0.0], [0.5, 1.0]]), "global": torch.tensor([[1.0, 0.0], [0.001, 1.0]])}
    found = Alignment("its class", "a <cat>", maps, {"local": 0.123, "global": 4.0}, None)
    local, global_ = part("alignment_figures", found, None, "id", tmp_path=tmp_path).all("svg")
    assert local.attributes["aria-label"] == "Alignment with a <cat>, local view, distance 0.12"
    assert global_.attributes["aria-label"].endswith("global view, distance 4.00")

    def cells(picture: Node) -> list[tuple[str, ...]]:
        names = ("x", "y", "fill-opacity")
        return [tuple(r.attributes[n] for n in names) for r in picture.all("rect") if "fill-opacity" in r.attributes]

    assert cells(local) == [("1", "1", "1.00"), ("1", "2", "0.25"), ("2", "2", "0.50")]
    assert cells(global_) == [("1", "1", "0.50"), ("2", "2", "0.50")]


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
    with pytest.raises(UndefinedError, match="is undefined"):
        write_page(page, "predictions.html.j2", {"title": "without the rest"})
    assert page.read_text() == "before"
    assert list(tmp_path.iterdir()) == [page]


def test_a_page_may_do_nothing_but_what_is_in_it(path: Path) -> None:
    page = read(path)
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


def test_a_page_can_be_read_aloud(path: Path) -> None:
    page = read(path)
    (html,) = page.all("html")
    assert html.attributes["lang"] == "en"
    assert [len(list(page.all(tag))) for tag in ("h1", "main", "title")] == [1, 1, len(list(page.all("title")))]
    assert all(image.attributes["alt"] for image in page.all("img"))
    for picture in page.all("svg"):
        said = picture.attributes
        assert said.get("aria-hidden") == "true" or (said["role"] == "img" and said["aria-label"])
    nodes = [node for tag in ("article", "image", "table", "main") for node in page.all(tag)]
    ids = [node.attributes["id"] for node in nodes if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    links = [a.attributes["href"] for a in page.all("a")] + [u.attributes["href"] for u in page.all("use")]
    assert {link.removeprefix("#") for link in links} <= set(ids)
