"""Pages as the commands write them, and how a test reads one."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer import Trainer

from clip_m2df.cli import main
from clip_m2df.commands.configs import resolve_configs
from clip_m2df.commands.trainer import run
from clip_m2df.motion_shapes.rendering import write_video
from tests.classifier.conftest import make_model, paint, paint_classes, predict_args
from tests.conftest import options

# Names that a page may trip over.
LABELS = ('<script>alert("1")<', "läuft – 走る", "a & b 'c' &lt;")
HOSTILE = "<img src=x onerror=alert(1)>.mp4"
HOSTILE_CLASS = '<b onclick="x">test & 1'

_VOID = {"meta", "link", "img", "input", "rect", "image", "use"}


class Node(NamedTuple):
    """An element of a page; its text is that of all within."""

    tag: str
    attributes: dict[str, str]
    children: list[Node | str]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str, **wanted: str) -> Iterator[Node]:
        """Elements within, by their tag and attributes (``class_`` for one of its classes)."""
        for child in self.children:
            if isinstance(child, Node):
                if child.tag == tag and all(_has(child, name, value) for name, value in wanted.items()):
                    yield child
                yield from child.all(tag, **wanted)

    def rows(self) -> list[list[str]]:
        """The cells of a table's body, as they are read."""
        (body,) = self.all("tbody")
        return [[c.text.strip() for c in row.children if isinstance(c, Node)] for row in body.all("tr")]


def _has(node: Node, name: str, value: str) -> bool:
    found = node.attributes.get(name.rstrip("_").replace("_", "-"), "")
    return value in found.split() if name == "class_" else value == found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("page", {}, [])]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attributes}, [])
        self.open[-1].children.append(node)
        if tag not in _VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, {name: value or "" for name, value in attributes}, []))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            # What is not closed in its turn is a fault of the page. Timelines have titles in rectangles.
            while self.open[-1].tag != tag:
                raise AssertionError(f"{tag} is closed in {self.open[-1].tag}")
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(page: Path) -> Node:
    """The elements of a page."""
    reader = _Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    reader.close()
    assert len(reader.open) == 1
    return reader.open[0]


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a class, each with two videos; nobody may change them."""
    return paint_classes(tmp_path_factory.mktemp("examples"), LABELS)


@pytest.fixture(scope="session")
def saved(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with the method's own head; it resizes before it crops."""
    from clip_m2df import FewShotClassifier

    folder = tmp_path_factory.mktemp("saved") / "classifier"
    FewShotClassifier(make_model("m2df"), frames=4, resize=56).fit(examples).save(folder)
    return folder


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos with hostile names among them, and one that is broken."""
    root = tmp_path_factory.mktemp("clips")
    for k in range(4):
        paint(root / f"{k}.mp4", k % 3, 100 + k, frames=30)
    rng = np.random.default_rng(104)  # one class after the other
    changing = rng.integers(0, 90, (90, 32, 48, 3), dtype=np.uint8)
    for hue in range(3):
        changing[30 * hue : 30 * hue + 30, ..., hue] += 90
    write_video(root / "4.mp4", changing)
    paint(root / HOSTILE, 2, 105, frames=30)
    (root / "broken.mp4").write_text("404")
    return root


def predict(saved: Path, videos: Path, page: Path, *more: str) -> int:
    """Label videos; the table lies beside the page."""
    own = ["--ckpt_path", str(saved), "--report", str(page)]
    return main(predict_args(None, [videos], page.with_suffix(".csv"), *own, *more))


@pytest.fixture(scope="session")
def predictions(saved: Path, clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of ``clip-m2df predict``."""
    page = tmp_path_factory.mktemp("predictions") / "report.html"
    assert predict(saved, clips_folder, page) == 1
    return page


@pytest.fixture(scope="session")
def segments(saved: Path, clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with ``--segments``."""
    page = tmp_path_factory.mktemp("segments") / "report.html"
    assert predict(saved, clips_folder, page, "--segments", "--window", "0.3") == 1
    return page


class Measured(NamedTuple):
    """A test that has been run."""

    page: Path
    trainer: Trainer
    confusion: torch.Tensor


def run_test(manifest: Path, tiny_clip_dir: Path, folder: Path, *more: str) -> Measured:
    """Run ``clip-m2df test`` on a run folder, with a page."""
    page = folder / "report.html"
    cli = run(["test", *resolve_configs(options(manifest, tiny_clip_dir, folder, f"--report={page}", *more))])
    return Measured(page, cli.trainer, cli.model.evaluated.confusion)


@pytest.fixture(scope="session")
def hostile_manifest(manifest: Path) -> Path:
    """The manifest with a class of test whose name a page may trip over."""
    path = manifest.parent / "hostile.csv"
    quoted = '"' + HOSTILE_CLASS.replace('"', '""') + '"'
    path.write_text(manifest.read_text(encoding="utf-8").replace("test class 1", quoted), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tested(
    hostile_manifest: Path, tiny_clip_dir: Path, fitted: Path, tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    """The page of ``clip-m2df test`` after a short training."""
    folder = tmp_path_factory.mktemp("tested") / "run"
    return run_test(hostile_manifest, tiny_clip_dir, folder, f"--ckpt_path={fitted / 'checkpoints' / 'best.ckpt'}")


@pytest.fixture(params=["predictions", "segments", "tested"])
def path(request: pytest.FixtureRequest) -> Path:
    """Each of the pages."""
    found: Path | Measured = request.getfixturevalue(request.param)
    return found.page if isinstance(found, Measured) else found
