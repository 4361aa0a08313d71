import itertools
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch

from clip_m2df.errors import UserError
from clip_m2df.video.reader import VideoError, as_clip, read_frames, sample_pictures
from clip_m2df.video.timing import Timed, count_samples, timed
from tests.clips import (
    HEIGHT,
    WIDTH,
    count_conversions,
    fail_conversions,
    lose_packet,
    note_times,
    numbers,
    render,
    save_image,
    save_images,
)
from tests.video.conftest import N_FRAMES

SAMPLED = [
    *("h264_b_frames.mp4", "h264_shifted.mp4", "h264_uneven.mp4", "h264_fragmented.mp4", "h264_with_sound.mp4"),
    *("h264.ts", "h264.mkv", "h264.avi", "mpeg4_b_frames.avi"),
    *("vp9_alt_ref.webm", "vp9_shifted.webm", "vp9_uneven.webm"),
]
RATES = (0.5, 0.8, 2.5, 6, 7, 12, 24, 29.97)


def sampled(path: Path, rate: float, *, fps: float | None = None) -> list[int]:
    """The numbers of the frames at regular times, as their pictures tell."""
    return [number for frame in sample_pictures(str(path), rate, fps=fps) for number in numbers(as_clip(frame[None]))]


def spans(path: Path) -> list[tuple[Fraction, Fraction]]:
    """Start and end of each frame in seconds after the first, as FFmpeg tells; in AVI, 12 a second."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        unit = stream.time_base
        assert unit is not None
        frames: list[Any] = list(container.decode(stream))
    if path.suffix == ".avi":
        return [(Fraction(k, 12), Fraction(k + 1, 12)) for k in range(len(frames))]
    first = frames[0].pts
    return [((f.pts - first) * unit, (f.pts + f.duration - first) * unit) for f in frames]


def by_definition(times: list[tuple[Fraction, Fraction]], rate: float) -> list[int]:
    """The places of the frames at regular times: each the last that has begun, until the last one ends."""
    chosen: list[int] = []
    for k in itertools.count():
        time = (k + Fraction(1, 2)) / Fraction(str(rate))
        if time >= times[-1][1]:
            return chosen
        chosen.append([place for place, (start, _) in enumerate(times) if start <= time][-1])
    raise AssertionError


# Frames are the right ones


@pytest.mark.parametrize("name", SAMPLED)
def test_frames_are_those_of_the_definition(folder: Path, name: str) -> None:
    path = folder / name
    clip, times = read_frames(str(path), range)[0], spans(path)
    assert len(clip) == len(times) == N_FRAMES
    for rate in RATES:
        expected = by_definition(times, rate)
        found = list(map(torch.from_numpy, sample_pictures(str(path), rate)))
        assert all(frame.dtype == torch.uint8 and frame.permute(2, 0, 1).shape == clip.shape[1:] for frame in found)
        sampled_clip = torch.stack(found).permute(0, 3, 1, 2)
        assert numbers(sampled_clip) == expected
        assert sampled_clip.equal(clip[expected])


@pytest.mark.parametrize("name", ["h264_b_frames.mp4", "h264_shifted.mp4", "h264.ts", "mpeg4_b_frames.avi"])
def test_plain_numbers(folder: Path, name: str) -> None:
    path = folder / name
    assert sampled(path, 12) == list(range(40))
    assert sampled(path, 6) == list(range(1, 40, 2))
    assert sampled(path, 24) == [k // 2 for k in range(80)]
    assert sampled(path, 0.5) == [12, 36]
    assert sampled(path, 0.15) == []  # 3.333 s until the video ends, at 3.333 s
    assert sampled(path, 0.16) == [37]


def test_uneven_frames_stay_as_long_as_they_are_shown(tmp_path: Path) -> None:
    times = [0, 1, 2, 14, 15, 38, 39]  # in 24ths of a second
    path = render(tmp_path / "clip.webm", len(times), "libvpx-vp9", options={"cpu-used": "8"}, times=times)
    shown = sampled(path, 24)
    # The codec's rate gives the last one 2 of them.
    assert shown == [0, 1, *[2] * 12, 3, *[4] * 23, 5, 6, 6]
    assert sampled(path, 4) == [2, 2, 4, 4, 4, 4, 6]


def test_rates_are_what_they_are_in_writing(tmp_path: Path) -> None:
    # 0.8 as a float is above four fifths, so that the first time would lie just before frame 15.
    path = render(tmp_path / "clip.avi", N_FRAMES, "mpeg4")
    assert sampled(path, 0.8, fps=24) == [15]
    assert sampled(path, 30000 / 1001 / 2, fps=30000 / 1001) == list(range(1, N_FRAMES, 2))
    assert sampled(path, 1e-7, fps=1e-6) == [5, 15, 25, 35]


def test_a_rate_that_is_given_overrides_the_times(folder: Path) -> None:
    for name in ("h264_uneven.mp4", "vp9_uneven.webm", "h264.avi"):
        assert sampled(folder / name, 5, fps=10) == list(range(1, N_FRAMES, 2))
        assert sampled(folder / name, 10, fps=5) == [k // 2 for k in range(2 * N_FRAMES)]


def test_a_video_of_one_frame(tmp_path: Path) -> None:
    path = render(tmp_path / "one.mp4", 1)
    assert sampled(path, 6) == []  # its middle would be at 1/12 s, when it ends
    assert sampled(path, 7) == [0]
    assert sampled(path, 36) == [0, 0, 0]


# One pass, and no more work than needed


def test_only_frames_that_are_given_are_converted_each_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = count_conversions(monkeypatch)
    assert len(sampled(folder / "h264.mkv", 24)) == 2 * N_FRAMES
    assert len(converted) == N_FRAMES
    converted.clear()
    assert sampled(folder / "h264.mkv", 0.5) == [12, 36]
    assert len(converted) == 2


def test_frames_are_decoded_when_they_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = note_times(monkeypatch)
    found = sample_pictures(str(folder / "h264_b_frames.mp4"), 6)
    assert decoded == []
    for k in range(N_FRAMES // 2 - 1):
        assert numbers(as_clip(next(found)[None])) == [2 * k + 1]
        assert len(decoded) == 2 * k + 3  # it takes the next one to know that a frame ends
    assert len(list(found)) == 1
    assert len(decoded) == N_FRAMES


def test_each_frame_has_memory_of_its_own(folder: Path) -> None:
    found = sample_pictures(str(folder / "h264_b_frames.mp4"), 24)
    first = next(found)
    kept = first.copy()
    first[:] = 0
    assert (next(found) == kept).all()


# Frames without a time


def frame(pts: int | None, duration: int = 0) -> SimpleNamespace:
    return SimpleNamespace(pts=pts, duration=duration)


def starts(frames: list[SimpleNamespace], rate: int | None = 4, name: str = "mpegts") -> list[tuple[float, float]]:
    """Start and end of frames whose times are in tenths of a second."""
    container: Any = SimpleNamespace(format=SimpleNamespace(name=name))
    stream: Any = SimpleNamespace(average_rate=rate and Fraction(rate), time_base=Fraction(1, 10))
    some: list[Any] = list(frames)
    return [(float(start), float(end)) for _, start, end in timed(some, container, stream, "a.ts")]


def test_frames_without_a_time_follow_at_the_average_rate() -> None:
    assert starts([frame(None)] * 3) == [(0, 0.25), (0.25, 0.5), (0.5, 0.75)]
    assert starts([frame(9), frame(5), frame(7)], name="avi") == [(0, 0.25), (0.25, 0.5), (0.5, 0.75)]
    some = [frame(70, 3), frame(73, 3), frame(None), frame(None), frame(90, 3)]
    assert starts(some) == [(0, 0.3), (0.3, 0.6), (0.6, 0.85), (0.85, 1.1), (2.0, 2.3)]
    assert starts([frame(None), frame(100, 1), frame(103)]) == [(0, 0.25), (0.25, 0.35), (0.55, 0.8)]


def test_times_that_start_anew_go_on() -> None:
    assert starts([frame(5, 2), frame(7, 2), frame(3, 4), frame(8, 2)]) == [
        (0, 0.2),
        (0.2, 0.4),
        (0.4, 0.8),
        (0.9, 1.1),
    ]


def test_a_stream_without_times_has_the_rate_that_ffmpeg_takes_it_to_have(tmp_path: Path) -> None:
    path = render(tmp_path / "clip.h264", N_FRAMES)
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
    assert rate is not None
    assert sampled(path, float(rate) / 2) == list(range(1, N_FRAMES, 2))


def test_neither_times_nor_a_rate() -> None:
    with pytest.raises(UserError, match=r"the video a\.ts does not tell when its frames are shown: give fps") as caught:
        starts([frame(None)], rate=None)
    assert not isinstance(caught.value, VideoError)
    assert starts([frame(3), frame(4)], rate=None) == [(0, 0), (0.1, 0.1)]


@pytest.mark.parametrize("frames", [[frame(0), frame(36_020)], [frame(0), frame(1, 36_020)]])
def test_a_frame_that_lasts_for_hours_has_damaged_times(frames: list[SimpleNamespace]) -> None:
    with pytest.raises(UserError, match=r"a\.ts shows a frame for 1 hours, so its times are damaged: give fps"):
        starts(frames)
    assert starts([frame(0), frame(36_000)])[1][0] == 3600


def test_of_frames_at_the_same_time_the_last_is_shown() -> None:
    def at(*times: int) -> list[Timed[str]]:
        return [Timed(name, Fraction(t, 2), Fraction(t + 1, 2)) for name, t in zip("abcd", times, strict=False)]

    assert list(count_samples([], Fraction(1))) == []
    assert list(count_samples(at(0, 1, 1, 4), Fraction(1))) == [("a", 0), ("b", 0), ("c", 2), ("d", 0)]
    assert list(count_samples(at(0, 1, 1, 4), Fraction(2))) == [("a", 1), ("b", 0), ("c", 3), ("d", 1)]


# Broken files


def test_a_frame_that_is_lost_leaves_the_one_before_it_on(tmp_path: Path) -> None:
    path = render(tmp_path / "clip.webm", N_FRAMES, "libvpx-vp9", options={"cpu-used": "8", "g": "5"})
    lose_packet(path, 19)
    assert numbers(read_frames(str(path), lambda _: range(18, 22))[0])[1] != 19
    assert sampled(path, 12) == [*range(19), 18, *range(20, N_FRAMES)]


def test_whatever_else_fails_is_the_fault_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_conversions(monkeypatch, RuntimeError("unknown rotation"))
    with pytest.raises(VideoError, match=r"h264\.mkv: reading it fails: RuntimeError: unknown rotation"):
        sampled(folder / "h264.mkv", 1)


@pytest.mark.parametrize("value", [0, -1.5, float("nan"), float("inf")])
def test_rates_that_make_no_sense(folder: Path, value: float) -> None:
    for name, rate, fps in (("rate", value, None), ("rate", value, 3.0), ("fps", 3.0, value)):
        with pytest.raises(UserError, match=f"{name} is {value}; it must be above 0"):
            sample_pictures(str(folder / "h264.mkv"), rate, fps=fps)


# Folders of images


def test_images_are_shown_at_the_rate_that_is_given(tmp_path: Path) -> None:
    for number in range(12):
        save_image(tmp_path / f"img_{number}.png", number, size=(WIDTH, HEIGHT) if number < 6 else (50, 80))
    assert sampled(tmp_path, 5, fps=10) == [1, 3, 5, 7, 9, 11]
    assert sampled(tmp_path, 10, fps=5) == [k // 2 for k in range(24)]
    assert sampled(tmp_path, 3, fps=10) == [1, 5, 8, 11]  # at 1/6, 3/6, 5/6 and 7/6 s
    found = as_clip(np.stack(list(sample_pictures(str(tmp_path), 5, fps=10))))
    assert found.equal(read_frames(str(tmp_path), lambda _: range(1, 12, 2))[0])


def test_only_images_that_are_shown_are_read(tmp_path: Path) -> None:
    save_images(tmp_path, 8)
    (tmp_path / "4.png").write_bytes(b"no image")
    assert sampled(tmp_path, 5, fps=10) == [1, 3, 5, 7]
    found = sample_pictures(str(tmp_path), 10, fps=10)
    assert numbers(as_clip(np.stack([next(found) for _ in range(4)]))) == [0, 1, 2, 3]
    with pytest.raises(VideoError, match=r"4\.png"):
        next(found)


def test_images_have_no_times(tmp_path: Path) -> None:
    save_image(tmp_path / "1.png", 1)
    with pytest.raises(UserError, match="is a folder of images, which have no times: give fps") as caught:
        sample_pictures(str(tmp_path), 1)
    assert str(tmp_path) in str(caught.value)
    assert not isinstance(caught.value, VideoError)
