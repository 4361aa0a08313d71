"""Models that are made once, and a few videos."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_m2df.motion_shapes import render
from clip_m2df.motion_shapes.rendering import write_video
from clip_m2df.video.transforms import ClipReader
from tests import clips

if TYPE_CHECKING:  # a worker process that imports a test's reader need not wait for the rest
    from clip_m2df import CLIPM2DF, FewShotClassifier
    from clip_m2df.classifier.support import SupportClass

SMALL = {"hidden_dim": 32, "num_heads": 4}
# Options of the heads that are trained.
HEAD_OPTIONS: dict[str, dict[str, Any]] = {
    "m2df": SMALL,
    "clip_fsar": SMALL,
    "trx": {"width": 24},
    "ts_fsar": {"width": 8, "frames": 6},
}

# Names that a table may trip over; "[red]" is markup to what prints the summary.
LABELS = ('a, "b"', "läuft – 走る", "x [red]y")

Make: TypeAlias = "Callable[..., FewShotClassifier]"


def make_model(head: str = "m2df", head_options: dict[str, Any] | None = None, **options: Any) -> CLIPM2DF:
    """A model with the small tower and a head with random weights, always the same."""
    from clip_m2df import CLIPM2DF

    all_options = HEAD_OPTIONS.get(head, {}) | (head_options or {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPM2DF(backbone="tiny", head=head, head_options=all_options, **options).eval()


@cache
def plain_model(head: str) -> CLIPM2DF:
    """The same without further options, made once; nobody may change it."""
    return make_model(head)


@pytest.fixture
def make() -> Make:
    """A new classifier with a head, on a model that is made once."""
    from clip_m2df import FewShotClassifier

    return lambda head="m2df", **options: FewShotClassifier(plain_model(head), **options)


def make_class(model: CLIPM2DF, label: str, features: Tensor, names: Sequence[str] = ()) -> SupportClass:
    """A class of examples ``(n, frames, dim)``, in memory unless they have names."""
    from clip_m2df.classifier.support import SupportClass

    small = torch.zeros((*features.shape[:2], 3, 4, 4), dtype=torch.uint8)
    return SupportClass.of(model, label, label, names or [""] * len(features), features, small)


def noise(seed: int, frames: int = 8, height: int = 40, width: int = 40) -> NDArray[np.uint8]:
    """A clip in memory, blocks of noise that change from frame to frame: ``(frames, height, width, 3)``."""
    blocks = np.random.default_rng(seed).integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8)
    return blocks.repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)[:, :height, :width]


def as_features(classifier: FewShotClassifier, videos: Sequence[Any]) -> Tensor:
    """The features ``(n, frames, dim)`` of clips, as the classifier itself computes them."""
    from clip_m2df.classifier.clips import Encoded

    found = {index: clip for batch in classifier.encoder.encode(videos) for index, clip in batch}
    kept = [found[index] for index in range(len(videos))]
    assert all(isinstance(clip, Encoded) for clip in kept)
    return torch.stack([clip.features for clip in kept if isinstance(clip, Encoded)])


def write_table(
    path: Path,
    features: Tensor,
    labels: Sequence[str],
    classes: Mapping[str, Tensor] | None = None,
    paths: Sequence[str] = (),
) -> Path:
    """A feature table; rows without a path are called ``0.mp4`` and so on, in the folder of their label."""
    from clip_m2df.datasets.feature_tables import write_feature_table

    names = paths or [f"{label}/{n}.mp4" for n, label in enumerate(labels)]
    rows = [{"path": name, "label": label, "split": "test"} for name, label in zip(names, labels, strict=True)]
    write_feature_table(path, rows, features, classes)
    return path


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a class, each with three videos of 48 x 32 pixels; ``walk`` in folders of its own within."""
    root = tmp_path_factory.mktemp("videos")
    for c, label in enumerate(("eat", "jump_up", "walk")):
        for v in range(3):
            folder = root / label / (f"part{v}" if label == "walk" else "")
            folder.mkdir(parents=True, exist_ok=True)
            clips.render(folder / f"{v}.mp4", n_frames=9 + 3 * c + v, size=(48, 32))
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of twelve numbered images."""
    folder = tmp_path_factory.mktemp("images") / "clip"
    folder.mkdir()
    for number in range(12):
        clips.save_image(folder / f"{number + 1}.png", 7 * number, size=(48, 32))
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Five videos of each test class of ``motion_shapes``' scenes, by class."""
    folder, quiet = tmp_path_factory.mktemp("scenes") / "scene", {"workers": 1, "progress": False}
    manifest = render(folder, family="scene", videos_per_class={"test": 5}, **quiet)  # type: ignore[arg-type]
    found = defaultdict(list)
    for row in read_csv(manifest):
        found[row["label"]].append(str(manifest.parent / row["path"]))
    return dict(found)


# clip-m2df predict


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


def paint_classes(root: Path, labels: Sequence[str]) -> Path:
    """A folder for each of three classes, with two videos each."""
    for hue, label in enumerate(labels):
        for k in range(2):
            paint(root / label / f"{k}.mp4", hue, 10 * hue + k)
    return root


@pytest.fixture(scope="session")
def support(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a class, each with two videos; nobody may change them."""
    return paint_classes(tmp_path_factory.mktemp("support"), LABELS)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos, one of them in a folder of its own; nobody may change them."""
    root = tmp_path_factory.mktemp("clips")
    for k in range(5):
        paint(root / f"{k}.mp4", k % 3, 100 + k)
    paint(root / "inner" / "é, deep.mp4", 2, 105)
    return root


def predict_args(support: Path | None, videos: Sequence[object], output: Path, *more: str) -> list[str]:
    """Of ``clip-m2df predict`` without training, which reads files in this process."""
    examples = [] if support is None else ["--support", str(support)]
    model = [] if {"--ckpt_path", "--backbone"} & set(more) else ["--backbone", "tiny"]
    workers = [] if "--workers" in more else ["--workers", "0"]
    shown = [str(video) for video in videos]
    return ["predict", *model, *examples, "--videos", *shown, "--output", str(output), *workers, *more]


def reference(support: Path, head: str = "otam") -> FewShotClassifier:
    """What the command makes for itself."""
    from clip_m2df import CLIPM2DF, FewShotClassifier

    return FewShotClassifier(CLIPM2DF(backbone="tiny", head=head, freeze_backbone=True)).fit(support)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def videos_of(folder: Path) -> list[str]:
    return [*(str(folder / f"{k}.mp4") for k in range(5)), str(folder / "inner" / "é, deep.mp4")]


@dataclass(frozen=True)
class DeadlyReader(ClipReader):
    """As a decoder that crashes on some files does, or as one at work when its run is stopped."""

    def decode(self, path: str, offsets: Tensor | None = None) -> tuple[NDArray[np.uint8], int]:
        if "crash" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        if "stop" in path:
            os.kill(os.getppid(), signal.SIGTERM)
            signal.pause()
        return super().decode(path, offsets)


class Labelled:
    """Names of the videos that were labelled, and after how many of a run a person loses patience."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.most = -1

    def lose_patience(self) -> None:
        raise KeyboardInterrupt

    def forget(self) -> list[str]:
        names, self.names = self.names, []
        return names


@pytest.fixture
def labelled(monkeypatch: pytest.MonkeyPatch) -> Labelled:
    """Watches over ``classify``."""
    from clip_m2df import FewShotClassifier
    from clip_m2df.classifier.clips import name_of

    watched = Labelled()
    own = FewShotClassifier.classify

    def classify(self: FewShotClassifier, paths: Sequence[Any], **options: Any) -> Iterator[Any]:
        for k, (place, prediction) in enumerate(own(self, paths, **options)):
            if k == watched.most:
                watched.lose_patience()
            watched.names.append(os.path.basename(name_of(paths[place])))
            yield place, prediction

    monkeypatch.setattr(FewShotClassifier, "classify", classify)
    return watched
