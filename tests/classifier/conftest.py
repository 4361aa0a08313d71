"""Models that are made once, and a few videos."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clip_m2df.data.motion_shapes import render
from tests.data import clips

if TYPE_CHECKING:  # a worker process that imports a test's reader need not wait for the rest
    from clip_m2df import CLIPM2DF, FewShotClassifier

SMALL = {"hidden_dim": 32, "heads": 4}
# Options of the heads that are trained.
HEAD_OPTIONS: dict[str, dict[str, Any]] = {"m2df": SMALL, "clip_fsar": SMALL}

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


def noise(seed: int, frames: int = 8, height: int = 40, width: int = 40) -> NDArray[np.uint8]:
    """A clip in memory, blocks of noise that change from frame to frame: ``(frames, height, width, 3)``."""
    blocks = np.random.default_rng(seed).integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8)
    return blocks.repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)[:, :height, :width]


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
    manifest = render(
        tmp_path_factory.mktemp("scenes") / "scene",
        family="scene",
        videos_per_class={"test": 5},
        workers=1,
        progress=False,
    )
    found = defaultdict(list)
    with manifest.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found[row["label"]].append(str(manifest.parent / row["path"]))
    return dict(found)
