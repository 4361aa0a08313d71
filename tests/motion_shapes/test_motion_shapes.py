import csv
import dataclasses
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_m2df.errors import UserError
from clip_m2df.motion_shapes import (
    CLASSES,
    COLOURS,
    appearances_of,
    render,
    render_clip,
    rendering,
    shared_appearance_classes,
)
from clip_m2df.motion_shapes.classes import MOTIONS, OF_TWO_SHAPES, SHAPES, MotionClass
from clip_m2df.motion_shapes.scenes import FPS, JITTER, draw_scene, paint
from tests.motion_shapes.scenes import centres, decoded, generator, masks, of_split, videos

ONE_EACH = {"train": 0, "val": 1, "test": 0}


def test_training_has_every_colour_shape_and_motion_but_no_held_out_appearance() -> None:
    seen = appearances_of("train")
    assert {c.appearance for c in CLASSES if c.split != "train"}.isdisjoint(seen)
    assert {colour for colour, _ in seen} == set(COLOURS)
    assert {shape for _, shape in seen} == set(SHAPES)
    assert {c.motion for c in CLASSES} == {c.motion for c in of_split("demo", "train")} == set(MOTIONS)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_shared_appearance_classes(split: str) -> None:
    members, shared = of_split("demo", split), shared_appearance_classes(split)
    count = Counter(c.appearance for c in members)
    assert set(shared) == {c.label for c in members if count[c.appearance] > 1}
    assert len(members) / 3 <= len(shared)
    if split == "test":
        assert 8 <= len(shared) < len(members)


def test_labels_are_sentences() -> None:
    assert MotionClass("test", "red", "star", "moving to the left").label == "a red star moving to the left"
    assert MotionClass("test", "orange", "ring", "growing").label == "an orange ring growing"
    assert MotionClass("test", "cyan", "cross", "moving apart").label == "two cyan crosses moving apart"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="no shape 'cube'"):
        MotionClass("test", "red", "cube", "growing")
    with pytest.raises(UserError, match="no split 'training'"):
        shared_appearance_classes("training")


def test_turning_changes_the_angle_and_bouncing_comes_back() -> None:
    for motion, sign in (("turning clockwise", 1), ("turning anticlockwise", -1)):
        scene = draw_scene(MotionClass("test", "red", "crescent", motion), generator(0))
        assert sign * (scene.angle[-1] - scene.angle[0]) > np.pi * 0.9
    row = centres(masks(draw_scene(MotionClass("test", "white", "square", "bouncing"), generator(1))))[1]
    assert (np.diff(row) > 0.5).any()
    assert (np.diff(row) < -0.5).any()


def test_clockwise_is_clockwise_on_the_screen() -> None:
    scene = draw_scene(MotionClass("test", "white", "triangle", "growing"), generator(0))
    frames = len(scene.angle)
    still: dict[str, Any] = {"x": np.full((1, frames), 0.5, np.float32), "y": np.full((1, frames), 0.5, np.float32)}
    still |= {"radius": np.full(frames, 0.3, np.float32), "camera": np.full((frames, 2), JITTER)}
    turned = dataclasses.replace(scene, **still, angle=np.full(frames, np.pi / 2, np.float32))
    mask = masks(turned)[0] > 0
    columns = np.flatnonzero(mask.any(0))
    # A quarter of a turn clockwise brings the tip from the top to the right, where the shape is then thinnest.
    assert mask[:, columns[-2]].sum() < mask[:, columns[1]].sum() / 2


def test_background_does_not_depend_on_the_class() -> None:
    some = [draw_scene(c, generator(3)).texture for c in CLASSES if c.motion in ("growing", *OF_TWO_SHAPES)]
    assert all(np.array_equal(texture, some[0]) for texture in some)
    assert not np.array_equal(some[0], draw_scene(CLASSES[0], generator(4)).texture)


def test_frames_can_be_painted_one_at_a_time() -> None:
    scene = draw_scene(CLASSES[0], generator(0))
    assert np.array_equal(paint(scene)[[2, 5]], paint(scene, np.array([2, 5])))
    assert np.array_equal(paint(scene), render_clip(CLASSES[0], generator(0)))


def test_rendering_repeats_bit_for_bit_whatever_the_workers(tmp_path: Path) -> None:
    alone = render(tmp_path / "a", videos_per_class=ONE_EACH, workers=1, progress=False).parent
    together = render(tmp_path / "b", videos_per_class=ONE_EACH, workers=2, progress=False).parent
    assert len(videos(alone)) == 10
    assert videos(alone) == videos(together)
    assert (alone / "manifest.csv").read_bytes() == (together / "manifest.csv").read_bytes()
    more = render(tmp_path / "c", videos_per_class={"val": 2}, workers=1, progress=False).parent
    assert videos(alone).items() <= videos(more).items()
    other = render(tmp_path / "d", videos_per_class=ONE_EACH, seed=1, workers=1, progress=False).parent
    assert not set(videos(alone).values()) & set(videos(other).values())


def test_videos_and_manifest(tmp_path: Path) -> None:
    manifest = render(tmp_path / "a", videos_per_class=ONE_EACH, workers=1, progress=False)
    with manifest.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [c.label for c in of_split("demo", "val")]
    assert {row["split"] for row in rows} == {"val"}
    for number, row in enumerate(rows):
        assert Path(row["path"]).parts[0] == "val"
        frames = decoded(manifest.parent / row["path"])
        assert 2 <= len(frames) / FPS <= 4
        index = CLASSES.index(of_split("demo", "val")[number])
        drawn = render_clip(CLASSES[index], generator(0, index, 0))
        assert frames.shape == drawn.shape
        assert np.abs(frames.astype(float) - drawn).mean() < 12


def test_cache_is_used_and_its_key_tells_settings_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_M2DF_CACHE", str(tmp_path))
    first = render(videos_per_class=ONE_EACH, workers=1, progress=False)
    assert first.parent.parent == tmp_path
    stamp = first.stat().st_mtime_ns
    assert render(videos_per_class=ONE_EACH, workers=2, progress=False) == first
    assert first.stat().st_mtime_ns == stamp
    assert render(videos_per_class=ONE_EACH, seed=1, workers=1, progress=False) != first


def test_a_half_written_folder_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_M2DF_CACHE", str(tmp_path))
    write = rendering.write_video
    calls = 0

    def breaks_off(path: Path, frames: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        write(path, frames)

    with monkeypatch.context() as patch:
        patch.setattr(rendering, "write_video", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            render(videos_per_class=ONE_EACH, workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []

    whole = render(videos_per_class=ONE_EACH, workers=1, progress=False)
    expected = videos(whole.parent)
    whole.unlink()  # as if it had been broken off before the manifest
    (whole.parent / next(iter(expected))).write_bytes(b"half")
    again = render(videos_per_class=ONE_EACH, workers=1, progress=False)
    assert again == whole
    assert again.is_file()
    assert videos(again.parent) == expected


def test_a_slower_process_keeps_what_the_faster_one_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = rendering.write_video
    target = tmp_path / "videos"

    def overtaken(path: Path, frames: Any) -> None:
        write(path, frames)
        if not target.exists():
            monkeypatch.setattr(rendering, "write_video", write)
            render(target, videos_per_class=ONE_EACH, workers=1, progress=False)

    monkeypatch.setattr(rendering, "write_video", overtaken)
    manifest = render(target, videos_per_class=ONE_EACH, workers=1, progress=False)
    assert manifest.is_file()
    assert len(videos(target)) == 10
    assert list(tmp_path.iterdir()) == [target]


def test_render_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="empty or a new folder"):
        render(tmp_path, videos_per_class=ONE_EACH, workers=1, progress=False)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="the splits are"):
        render(tmp_path / "a", videos_per_class={"testing": 1})
    with pytest.raises(UserError, match="negative"):
        render(tmp_path / "a", videos_per_class={"test": -1})
    with pytest.raises(UserError, match="negative"):
        render(tmp_path / "a", videos_per_class=ONE_EACH, seed=-1)


def test_importing_the_renderer_is_light() -> None:
    code = "import sys, clip_m2df.motion_shapes; print([m for m in ('torch', 'av', 'rich') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
