"""What happens when in a long video."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_m2df import FewShotClassifier, UserError
from clip_m2df.classifier.segments import Windows, join, smooth
from clip_m2df.motion_shapes import FAMILIES, render_long
from tests import clips
from tests.classifier.conftest import make_model, noise, plain_model

RED, BLUE, GREEN = (220, 30, 20), (20, 40, 230), (20, 200, 40)


def coloured(colour: tuple[int, int, int], frames: int, seed: int) -> NDArray[np.uint8]:
    """Frames of one colour, with some noise."""
    grain = np.random.default_rng(seed).integers(-15, 16, (frames, 40, 40, 3))
    return (np.array(colour) + grain).clip(0, 255).astype(np.uint8)


@pytest.fixture
def classifier() -> FewShotClassifier:
    """Knows red from blue."""
    found = FewShotClassifier(plain_model("otam"))
    return found.fit({"red": [coloured(RED, 8, k) for k in (1, 2)], "blue": [coloured(BLUE, 8, k) for k in (3, 4)]})


# Windows


def test_windows_in_frames() -> None:
    assert Windows.of(8, 2.0, None, None) == Windows(frames=8, rate=4.0, step=2, smoothing=4)
    assert Windows.of(8, 1.0, 0.3, 0.5) == Windows(frames=8, rate=8.0, step=2, smoothing=4)
    assert Windows.of(8, 2.0, 2.0, 0.0) == Windows(frames=8, rate=4.0, step=8, smoothing=1)
    assert Windows.of(8, 2.0, 0.001, 10) == Windows(frames=8, rate=4.0, step=1, smoothing=40)
    assert Windows.of(1, 3.0, None, None).step == 1


@pytest.mark.parametrize(
    ("window", "stride", "smoothing", "message"),
    [
        (0.0, None, None, "window is 0.0; it must be above 0"),
        (math.nan, None, None, "window is nan"),
        (1e-9, None, None, "window is 1e-09; it must be at least"),
        (math.inf, None, None, "window is inf"),
        (2.0, 0.0, None, "stride is 0.0; it must be above 0 and at most 2"),
        (2.0, 2.1, None, "stride is 2.1; .* at most 2"),
        (2.0, math.nan, None, "stride is nan"),
        (2.0, None, -0.1, "smoothing is -0.1; it must be at least 0"),
        (2.0, None, math.inf, "smoothing is inf"),
    ],
)
def test_lengths_that_make_no_sense(window: float, stride: float | None, smoothing: float | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Windows.of(8, window, stride, smoothing)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8])
def test_windows_cover_the_video_to_its_end(step: int) -> None:
    windows = Windows(frames=8, rate=4.0, step=step, smoothing=1)
    for n_frames in range(8, 40):
        starts = windows.starts(n_frames)
        assert starts[0] == 0
        assert starts[-1] == n_frames - 8
        assert starts[:-1] == [k * step for k in range(len(starts) - 1)]
        assert 0 <= starts[-1] - starts[-2] <= step if len(starts) > 1 else n_frames == 8
        assert {frame for start in starts for frame in range(start, start + 8)} == set(range(n_frames))


# Scores of frames


def smooth_by_loops(values: Tensor, starts: list[int], windows: Windows, n_frames: int) -> Tensor:
    means = []
    for frame in range(n_frames):
        covering = [v for start, v in zip(starts, values, strict=True) if start <= frame < start + windows.frames]
        means.append(sum(covering, torch.zeros(values.shape[1])) / len(covering))
    smoothed = []
    for frame in range(n_frames):
        near = [means[k] for k in range(n_frames) if abs(k - frame) <= windows.smoothing // 2]
        smoothed.append(sum(near, torch.zeros(values.shape[1])) / len(near))
    return torch.stack(smoothed)


@pytest.mark.parametrize("smoothing", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize(("n_frames", "step"), [(5, 1), (12, 2), (13, 5), (30, 3)])
def test_smoothing_against_two_loops(n_frames: int, step: int, smoothing: int) -> None:
    windows = Windows(frames=5, rate=1.0, step=step, smoothing=smoothing)
    starts = windows.starts(n_frames)
    values = torch.randn((len(starts), 3), generator=torch.Generator().manual_seed(0))
    expected = smooth_by_loops(values, starts, windows, n_frames)
    torch.testing.assert_close(smooth(values, starts, windows, n_frames), expected, atol=1e-5, rtol=1e-5)


def test_neighbours_of_one_label_are_joined() -> None:
    probabilities = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.5, 0.5], [0.9, 0.1], [0.7, 0.3]])
    found = join([0, 0, 1, -1, 0, 0], probabilities, ["a", "b"], 4.0)
    assert [(s.start, s.end, s.label) for s in found] == [(0.0, 0.5, "a"), (0.5, 0.75, "b"), (1.0, 1.5, "a")]
    assert [s.probability for s in found] == pytest.approx([0.7, 0.9, 0.8])
    assert found[0].probabilities == pytest.approx({"a": 0.7, "b": 0.3})
    assert join([-1, -1], probabilities[:2], ["a", "b"], 4.0) == []
    (only,) = join([1], probabilities[2:3], ["a", "b"], 2.0)
    assert (only.start, only.end, only.label) == (0.0, 0.5, "b")
    # A gap doesn't join what is on either side of it.
    assert len(join([0, -1, 0], probabilities[:3], ["a", "b"], 1.0)) == 2


# Videos


@pytest.mark.parametrize("head", ["otam", "m2df"])
@pytest.mark.parametrize("stride", [None, 0.75])
def test_segments_against_clips_scored_one_by_one(head: str, stride: float | None) -> None:
    """Every window through the classifier as a clip of its own, then two loops."""
    classifier = FewShotClassifier(plain_model(head))
    classifier.fit({"a": [noise(0), noise(1)], "b": [noise(2), noise(3)], "c": noise(4)})
    video = np.concatenate([noise(seed, 5) for seed in (0, 7, 2, 8, 4)] + [noise(9, 4)])
    windows = Windows.of(8, 2.0, stride, None)
    starts = windows.starts(29)
    of_windows = [video[start : start + 8] for start in starts]
    logs = torch.from_numpy(np.log(np.concatenate([classifier.predict_proba(clip) for clip in of_windows]))).float()
    distances = torch.tensor([[classifier.explain(clip).distance] for clip in of_windows])
    scores = smooth_by_loops(logs, starts, windows, 29)
    distance = smooth_by_loops(distances, starts, windows, 29)[:, 0]
    threshold = classifier.threshold_
    assert threshold is not None
    for reject in (False, True):
        choices = [
            -1 if reject and d > threshold else int(row.argmax()) for row, d in zip(scores, distance, strict=True)
        ]
        expected = join(choices, scores.softmax(-1), ["a", "b", "c"], 4.0)
        found = classifier.segments(video, stride=stride, reject=reject, fps=4)
        assert [s[:3] for s in found] == [s[:3] for s in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)
            assert one.probability == one.probabilities[one.label]


def test_a_change_is_found_within_a_step(classifier: FewShotClassifier) -> None:
    for seconds in (3.0, 4.0, 6.5):
        frames = round(seconds * 12)
        video = np.concatenate((coloured(RED, frames, 5), coloured(BLUE, 120 - frames, 6)))
        found = classifier.segments(video, fps=12)
        assert [s.label for s in found] == ["red", "blue"]
        assert found[0].start == 0
        assert found[0].end == found[1].start == pytest.approx(seconds, abs=0.5)
        assert found[1].end == pytest.approx(10)


def test_a_change_in_a_rendered_video_is_found_within_a_step(scenes: dict[str, list[str]], tmp_path: Path) -> None:
    shown = [c for c in FAMILIES["scene"] if c.split == "test"][6:10:2]
    actions = render_long(tmp_path / "long.mp4", shown, seed=0, seconds=8, lengths=(4, 4))
    classifier = FewShotClassifier(plain_model("otam")).fit({c.label: scenes[c.label][:3] for c in shown})
    found = classifier.segments(tmp_path / "long.mp4")
    assert [s.label for s in found] == [a.label for a in actions]
    assert found[0].end == found[1].start == pytest.approx(actions[0].end, abs=0.5)
    assert (found[0].start, found[1].end) == (0.0, 8.0)


@pytest.mark.parametrize("stride", [2.0, 0.25])
def test_each_frame_is_encoded_once(monkeypatch: pytest.MonkeyPatch, stride: float) -> None:
    model = make_model("otam")
    classifier = FewShotClassifier(model).fit({"a": noise(0), "b": noise(1)})
    encode = model.model.encode_frames
    counts = []

    def counting(frames: Tensor) -> Tensor:
        counts.append(frames.shape[:-3].numel())
        return encode(frames)

    monkeypatch.setattr(model.model, "encode_frames", counting)
    classifier.segments(noise(2, 120), fps=12, stride=stride)  # ten seconds, of which four frames a second are shown
    assert sum(counts) == 40


def test_a_video_no_longer_than_a_window_is_a_clip(classifier: FewShotClassifier) -> None:
    for frames in (1, 3, 7, 8):
        video = coloured(BLUE, frames, 5)
        (only,) = classifier.segments(video, fps=4)
        assert (only.start, only.label) == (0.0, "blue")
        assert only.end == pytest.approx(frames / 4)
        assert list(only.probabilities.values()) == pytest.approx(classifier.predict_proba(video)[0].tolist(), abs=1e-5)
    (only,) = classifier.segments(coloured(RED, 1, 5), fps=100)  # too short for a single frame at regular times
    assert only.label == "red"
    assert 0 < only.end <= 0.25


def test_frames_without_times_need_a_rate(classifier: FewShotClassifier, images: Path) -> None:
    with pytest.raises(UserError, match="frames in memory have no times: give fps, how many of them make a second"):
        classifier.segments(noise(0, 40))
    with pytest.raises(UserError, match="is a folder of images, which have no times: give fps"):
        classifier.segments(images)
    with pytest.raises(UserError, match=r"fps is 0\.0"):
        classifier.segments(noise(0, 40), fps=0.0)
    with pytest.raises(UserError, match="fps is 1e-09; it must be at least"):  # pictures that would last for years
        classifier.segments(noise(0, 40), fps=1e-9)
    pictures = np.stack([clips.picture(7 * number, 48, 32) for number in range(12)])
    for fps in (2, 5):  # longer and shorter than a window
        found, expected = classifier.segments(images, fps=fps), classifier.segments(pictures, fps=fps)
        assert [s[:3] for s in found] == [s[:3] for s in expected]
        assert [s.probability for s in found] == pytest.approx([s.probability for s in expected])
        assert found[-1].end == pytest.approx(12 / fps, abs=0.125)


def test_a_files_own_times_and_those_of_a_person(classifier: FewShotClassifier, tmp_path: Path) -> None:
    path = clips.render(tmp_path / "a.mp4", n_frames=36, size=(48, 32))  # 12 a second
    assert classifier.segments(path)[-1].end == 3.0
    assert classifier.segments(path, fps=6)[-1].end == 6.0


def test_what_is_none_of_the_classes_leaves_a_gap(classifier: FewShotClassifier) -> None:
    video = np.concatenate((coloured(RED, 32, 5), noise(0, 40), coloured(BLUE, 32, 6)))
    plain = classifier.segments(video, fps=4)
    assert plain[0].start == 0
    assert plain[-1].end == 26.0
    assert all(one.end == other.start for one, other in itertools.pairwise(plain))
    first, last = classifier.segments(video, fps=4, reject=True)
    assert (first.start, first.label, last.end, last.label) == (0.0, "red", 26.0, "blue")
    # Noise from 8 to 18 seconds
    assert first.end == pytest.approx(8, abs=1.5)
    assert last.start == pytest.approx(18, abs=1.5)
    assert classifier.segments(noise(0, 40), fps=4, reject=True) == []


def test_what_is_no_video(classifier: FewShotClassifier, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("404: not found\n" * 50)
    of_several: Any = [noise(0)]
    for video, message in (
        (tmp_path / "none.mp4", "cannot read the video .*none.mp4"),
        (tmp_path / "text.mp4", "cannot read the video .*text.mp4"),
        (of_several, "a value of type list is no clip"),
        (noise(0)[0], r"an array of shape \(40, 40, 3\) is no clip"),
    ):
        with pytest.raises(UserError, match=message):
            classifier.segments(video, fps=4)


# In a process of its own


@pytest.fixture
def isolating() -> FewShotClassifier:
    """Reads files in processes of their own, which may take a second for a frame."""
    classifier = FewShotClassifier(make_model("otam"), workers=1, timeout=1)
    return classifier.fit({"red": coloured(RED, 8, 1), "blue": coloured(BLUE, 8, 2)})


def test_a_process_of_its_own_finds_the_same(
    isolating: FewShotClassifier, scenes: dict[str, list[str]], images: Path, tmp_path: Path
) -> None:
    here = FewShotClassifier(isolating.model).fit({"red": coloured(RED, 8, 1), "blue": coloured(BLUE, 8, 2)})
    long = clips.render(tmp_path / "long.mp4", n_frames=200, size=(60, 40))
    scene = next(iter(scenes.values()))[0]
    asked: list[tuple[Any, dict[str, Any]]] = [(long, {}), (scene, {"window": 0.5}), (images, {"fps": 3.0})]
    for path, options in asked:
        assert isolating.segments(path, **options) == here.segments(path, **options)
    with pytest.raises(UserError) as there:
        isolating.segments(tmp_path / "none.mp4")
    with pytest.raises(UserError, match="there is no such file") as expected:
        here.segments(tmp_path / "none.mp4")
    assert str(there.value) == str(expected.value)
    with pytest.raises(UserError, match="which have no times: give fps"):
        isolating.segments(images)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_decoder_that_crashes_costs_its_video(
    isolating: FewShotClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clips.render(tmp_path / "long.mp4", n_frames=240, size=(48, 32))
    encode = isolating.model.model.encode_frames

    def encode_and_kill(frames: Tensor) -> Tensor:
        for process in multiprocessing.active_children():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        return encode(frames)

    with monkeypatch.context() as patched:
        patched.setattr(isolating.model.model, "encode_frames", encode_and_kill)
        with pytest.raises(UserError, match=r"cannot read the video .*long.mp4: the decoder crashed \(SIGKILL\)"):
            isolating.segments(path, window=0.25)
    assert isolating.segments(path)[-1].end == 20.0


@pytest.mark.skipif(sys.platform != "linux", reason="no leases there")
def test_a_decoder_that_hangs_costs_its_video(isolating: FewShotClassifier, tmp_path: Path) -> None:
    import fcntl

    path = clips.render(tmp_path / "long.mp4", n_frames=24, size=(48, 32))
    # Who opens the file waits until the lease is given back.
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    with open(path, "r+b") as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        with pytest.raises(UserError, match=r"long.mp4: the decoder hangs: not done after 1 s"):
            isolating.segments(path)
    assert isolating.segments(path)[-1].end == 2.0
    assert not multiprocessing.active_children()
