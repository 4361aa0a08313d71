"""What may be given as a clip, and which frames are read of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from clip_m2df import UserError
from clip_m2df.classifier import clips as module
from clip_m2df.classifier.clips import (
    as_frames,
    check_frames,
    list_clips,
    list_examples,
    name_of,
    read_clip,
    read_clips,
    videos_in,
)
from clip_m2df.video.isolation import Unreadable
from clip_m2df.video.transforms import ClipReader, read_isolated, resize_and_crop
from tests import clips
from tests.classifier.conftest import DeadlyReader, Make, noise

READER = ClipReader(frames=4, resize=24, size=16)


def relative(root: Path, found: list[Any]) -> list[str]:
    return [os.path.relpath(path, root) for path in found]


# What is meant


def test_a_folder_is_its_videos_in_the_order_of_their_paths(videos: Path) -> None:
    found, alone = list_clips(videos)
    assert not alone
    assert relative(videos, found) == [
        *("eat/0.mp4", "eat/1.mp4", "eat/2.mp4", "jump_up/0.mp4", "jump_up/1.mp4", "jump_up/2.mp4"),
        *("walk/part0/0.mp4", "walk/part1/1.mp4", "walk/part2/2.mp4"),
    ]
    assert list_clips(str(videos)) == (found, False)
    assert videos_in(str(videos)) == found


def test_a_folder_of_images_is_a_clip_and_a_folder_of_such_folders_is_several(images: Path) -> None:
    assert list_clips(images) == ([str(images)], True)
    assert list_clips(images.parent) == ([str(images)], False)


def test_hidden_names_and_other_files_are_passed_over(tmp_path: Path, videos: Path) -> None:
    for name in ("b.mp4", ".c.mp4", "notes.txt", "a.AVI", ".hidden/d.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(videos / "eat" / "0.mp4", tmp_path / name)
    assert relative(tmp_path, videos_in(tmp_path)) == ["a.AVI", "b.mp4"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_that_a_manifest_could_not_hold_are_clips_too(tmp_path: Path) -> None:
    names = ["a.mp4", "b\nc.mp4", "caf\udce9.mp4"]
    for name in names:
        (tmp_path / name).touch()
    assert relative(tmp_path, videos_in(tmp_path)) == names


def test_paths_and_arrays_are_one_clip_or_several() -> None:
    for one in ("not there.mp4", Path("a.mp4"), noise(0)):
        (listed, alone) = list_clips(one)
        assert (listed[0] is one, alone) == (True, True)
    listed, alone = list_clips(np.stack((noise(0), noise(1), noise(2))))
    assert not alone
    assert all(np.array_equal(np.asarray(clip), noise(seed)) for seed, clip in enumerate(listed))
    listed, alone = list_clips(torch.from_numpy(np.stack((noise(0), noise(1)))))
    assert (len(listed), alone) == (2, False)


def test_a_list_may_mix_whatever_is_a_clip_or_several(videos: Path, images: Path) -> None:
    first = noise(0)
    listed, alone = list_clips([videos / "eat", "a.mp4", first, images, np.stack((noise(1), noise(2)))])
    assert not alone
    assert relative(videos, listed[:3]) == ["eat/0.mp4", "eat/1.mp4", "eat/2.mp4"]
    assert listed[3] == "a.mp4"
    assert listed[4] is first
    assert listed[5] == str(images)
    assert len(listed) == 8
    for paths in (["a.mp4", "b.mp4"], ["a.mp4"], []):
        assert list_clips(iter(paths)) == (paths, False)


@pytest.mark.parametrize(
    ("clip", "kind"), [(3, "int"), (None, "NoneType"), ({"a": "b.mp4"}, "dict"), ([1.5], "float"), (b"a.mp4", "int")]
)
def test_what_is_no_clip(clip: Any, kind: str) -> None:
    with pytest.raises(UserError, match=rf"a value of type {kind} is no clip: give a path, an array .*, or a list"):
        list_clips(clip)


def test_a_folder_without_videos(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))} holds no videos: name a folder with some"):
        list_clips(tmp_path)


# The examples of classes


def test_examples_by_class_from_a_dict_keep_their_order(videos: Path, images: Path) -> None:
    one = noise(0)
    found = list_examples({"b": videos / "eat", "a": [one, "x.mp4"], "c": one, "d": "y.mp4", "e": images})
    assert list(found) == ["b", "a", "c", "d", "e"]
    assert relative(videos, found["b"]) == ["eat/0.mp4", "eat/1.mp4", "eat/2.mp4"]
    assert found["a"][0] is found["c"][0] is one
    assert (found["a"][1], found["d"], found["e"]) == ("x.mp4", ["y.mp4"], [str(images)])


def test_examples_from_a_folder_are_sorted_by_class(videos: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(videos, tmp_path, dirs_exist_ok=True)
    for name in ("a clip of images", "Dance/clip1", "Dance/clip2", ".hidden"):
        shutil.copytree(images, tmp_path / name)
    (tmp_path / "notes.txt").touch()
    found = list_examples(tmp_path)
    assert list(found) == ["Dance", "a clip of images", "eat", "jump_up", "walk"]
    assert relative(tmp_path, found["Dance"]) == ["Dance/clip1", "Dance/clip2"]
    assert relative(tmp_path, found["a clip of images"]) == ["a clip of images"]
    assert relative(tmp_path, found["walk"]) == ["walk/part0/0.mp4", "walk/part1/1.mp4", "walk/part2/2.mp4"]


def test_examples_that_are_not_there(tmp_path: Path, videos: Path) -> None:
    with pytest.raises(UserError, match="the support has no classes: give a few examples of each"):
        list_examples({})
    with pytest.raises(UserError, match=r"0.mp4 is no folder: give one that has a folder of examples for each class"):
        list_examples(videos / "eat" / "0.mp4")
    with pytest.raises(UserError, match=r"has no folders: put the examples of each class into a folder of its name"):
        list_examples(videos / "eat")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"run holds no videos"):
        list_examples(tmp_path)


# Frames


def test_a_videos_frames_are_those_of_an_episode(videos: Path) -> None:
    path = videos / "eat" / "2.mp4"
    expected, length = READER.read(str(path))
    assert length == 11
    assert read_clip(path, READER).equal(read_clip(str(path), READER))
    assert read_clip(path, READER).equal(expected)


def test_an_arrays_frames_are_those_of_a_video_of_the_same_pictures(images: Path) -> None:
    pictures = np.stack([clips.picture(7 * number, 48, 32) for number in range(12)])
    from_file = read_clip(images, READER)
    backwards = np.ascontiguousarray(pictures[::-1])[::-1]
    for clip in (pictures, torch.from_numpy(pictures), backwards, np.asfortranarray(pictures)):
        found = read_clip(clip, READER)
        assert (found.shape, found.dtype) == ((4, 3, 16, 16), torch.uint8)
        assert found.equal(from_file)
    pictures.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_clip(pictures, READER).equal(from_file)
    # One from the middle of each of four segments of three
    chosen = torch.from_numpy(np.stack([pictures[k] for k in (1, 4, 7, 10)])).permute(0, 3, 1, 2)
    assert from_file.equal(resize_and_crop(chosen, resize=24, size=16))


def test_a_short_array_repeats_its_frames() -> None:
    clip = noise(0, frames=2)
    found = read_clip(clip, READER)
    assert found[0].equal(found[1])
    assert found[2].equal(found[3])
    assert not found[1].equal(found[2])


def test_reading_leaves_an_array_as_it_is() -> None:
    clip = noise(0)
    frames = as_frames(clip, range(len(clip)))
    assert frames.permute(0, 2, 3, 1).numpy().tolist() == clip.tolist()
    frames.zero_()
    assert np.array_equal(clip, noise(0))


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros((4, 8, 8), np.uint8), r"an array of shape \(4, 8, 8\) is no clip"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"an array of shape \(4, 3, 8, 8\) .* colours as RGB"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"an array of shape \(0, 8, 8, 3\) is no clip"),
        (np.zeros((2, 8, 0, 3), np.uint8), r"an array of shape \(2, 8, 0, 3\) is no clip"),
        (np.zeros((4, 8, 8, 3), np.float32), "an array of float32 is no clip: give uint8, colours from 0 to 255"),
        (torch.zeros(4, 8, 8, 3), r"an array of torch.float32 is no clip: give uint8"),
        (7, r"a value of type int is no clip: give a path, or an array"),
    ],
)
def test_arrays_that_are_no_clip(clip: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_frames(clip)


# Many at once


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, videos: Path, images: Path) -> Path:
    """Clips that can't be read, each in its own way, and one whose name can't."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("404: not found\n" * 50)
    whole = (videos / "eat" / "0.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 8])
    shutil.copytree(images, folder / "images")
    (folder / "images" / "5.png").write_bytes(b"no picture")
    if sys.platform == "linux":  # whose names have any bytes
        shutil.copy(videos / "eat" / "1.mp4", folder / "caf\udce9.mp4")
    return folder


def test_every_clip_comes_with_its_frames_or_the_reason(videos: Path, broken: Path) -> None:
    listed: list[Any] = [videos / "eat" / "0.mp4", broken / "empty.mp4", noise(0), broken / "none.mp4"]
    listed += [noise(0)[..., :2], broken / "images"]
    found = dict(read_clips(listed, READER))
    for place in (0, 2):
        frames = found.pop(place)
        assert isinstance(frames, Tensor)
        assert frames.equal(read_clip(listed[place], READER))
    assert all(isinstance(reason, Unreadable) for reason in found.values())
    reasons = {1: "it is empty", 3: "there is no such file", 4: "an array of shape (8, 40, 40, 2)", 5: "5.png: "}
    assert found.keys() == reasons.keys()
    assert all(str(found[place]).startswith(reason) for place, reason in reasons.items())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
@pytest.mark.parametrize("worth", [500, 1], ids=["workers decode", "workers resize too"])
def test_workers_read_the_same_and_a_crash_costs_a_clip(
    worth: int, videos: Path, images: Path, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WORTH_TORCH", worth)
    listed: list[Any] = [noise(0), *videos_in(videos)[::4], noise(0, 0), images]
    listed += [*sorted(broken.iterdir()), broken / "none.mp4"]
    here = dict(read_clips(listed, READER))
    reader = DeadlyReader(frames=4, resize=24, size=16)
    there = dict(read_clips([*listed, "crash.mp4"], reader, workers=1))
    assert there.pop(len(listed)) == Unreadable("the decoder crashed (SIGKILL)")
    assert sorted(there) == list(range(len(listed)))
    assert sum(isinstance(found, Unreadable) for found in here.values()) >= 5
    for place, found in here.items():
        other = there[place]
        if isinstance(found, Unreadable):
            assert (str(other), type(other)) == (str(found), Unreadable)
        else:
            assert isinstance(other, Tensor)
            assert other.equal(found)


def test_a_process_that_only_decodes_does_without_torch(videos: Path) -> None:
    script = (
        "import sys\nfrom clip_m2df.video.transforms import ClipReader, read_isolated\n"
        f"pictures, _ = read_isolated(ClipReader(), (0, {str(videos / 'eat' / '0.mp4')!r}), crop=False)\n"
        "assert pictures.shape == (8, 32, 48, 3), pictures\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_strip_is_resized_where_its_memory_costs_nothing_else(tmp_path: Path) -> None:
    for number in range(4):
        clips.save_image(tmp_path / f"{number}.png", 50 * number, size=(90, 16))
    read = read_isolated(READER, (0, str(tmp_path)), crop=False)
    assert not isinstance(read, Unreadable)
    pictures, is_cropped = read
    assert is_cropped
    assert torch.from_numpy(pictures).equal(read_clip(tmp_path, READER))


# Through the tower


class Meeting(ClipReader):
    """Tells which clips it has read."""

    read_so_far: ClassVar[list[threading.Event]] = []

    def read(self, path: str, uniforms: Tensor | None = None) -> tuple[Tensor, int]:
        found = super().read(path, uniforms)
        self.read_so_far[int(Path(path).stem)].set()
        return found


def test_reading_goes_on_while_the_tower_is_at_work(tmp_path: Path, videos: Path, make: Make) -> None:
    count = 5
    clips = [shutil.copy(videos / "eat" / "0.mp4", tmp_path / f"{number}.mp4") for number in range(count)]
    Meeting.read_so_far[:] = [threading.Event() for _ in clips]
    encoder = make("otam").encoder
    encoder.reader = Meeting(frames=8, resize=encoder.reader.resize, size=encoder.reader.size)
    met: list[bool] = []

    def wait(*_: object) -> None:  # in the tower, for the clip after the one that is in it
        met.append(Meeting.read_so_far[min(len(met) + 1, count - 1)].wait(60))

    handle = encoder.model.model.backbone.visual.register_forward_pre_hook(wait)
    try:
        found = {index for batch in encoder.encode(clips) for index, _ in batch}
    finally:
        handle.remove()
    assert met == [True] * count
    assert found == set(range(count))


@pytest.mark.parametrize("frames", [1, 3, 8, 20])
def test_images_go_through_the_tower_a_few_at_once_with_the_same_features(frames: int, make: Make) -> None:
    encoder = make("otam", frames=frames).encoder
    model, seen = encoder.model.model, []
    clips = [noise(seed, 24) for seed in range(19)]
    expected = torch.stack([model.encode_frames(read_clip(clip, encoder.reader)) for clip in clips])
    handle = model.backbone.visual.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        found = {index: clip for batch in encoder.encode(clips) for index, clip in batch}
        alone = encoder.encode_one(clips[4]).features
    finally:
        handle.remove()
    assert max(seen) <= module.IMAGES_ON_CPU
    assert sum(seen) == 20 * frames
    features = torch.stack([getattr(found[index], "features", torch.empty(0)) for index in range(len(clips))])
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    if frames == 8:  # a clip is a block of its own, whatever comes with it
        assert features[4].equal(alone)


@pytest.mark.parametrize(
    ("device", "has_bf16", "precision"),
    [("cpu", True, "32-true"), ("mps", True, "32-true"), ("cuda", True, "bf16-mixed"), ("cuda:1", False, "16-mixed")],
)
def test_the_precision_is_what_the_device_does_well(
    device: str, has_bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert module.default_precision(torch.device(device)) == precision


def test_names() -> None:
    assert name_of("x/a.mp4") == "x/a.mp4"
    assert name_of(Path("x") / "a.mp4") == os.path.join("x", "a.mp4")
    assert name_of(noise(0)) == name_of(torch.from_numpy(noise(0))) == ""
