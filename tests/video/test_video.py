import itertools
import math
import os
import pickle
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torch import Tensor

from clip_m2df.errors import UserError
from clip_m2df.video import reader as video
from clip_m2df.video.images import order_images
from clip_m2df.video.reader import Choose, Decoder, VideoError, as_clip, probe, read_frames, sample_pictures
from clip_m2df.video.timing import VideoFacts
from clip_m2df.video.transforms import segment_indices
from tests.clips import (
    HEIGHT,
    OFF,
    ON,
    WIDTH,
    StandIn,
    alter_decoding,
    count_conversions,
    cut_start,
    fail_conversions,
    numbers,
    picture,
    render,
    render_sound,
    rotate,
    save_image,
    save_images,
    truncate,
)
from tests.video.conftest import ALT_REF, B_FRAMES, CLIPS, N_FRAMES, SHIFTED


class Chooser:
    """Remembers the numbers of frames that it was asked about."""

    def __init__(self, choose: Callable[[int], Sequence[int]] = range) -> None:
        self.choose = choose
        self.asked: list[int] = []

    def __call__(self, n_frames: int) -> Sequence[int]:
        self.asked.append(n_frames)
        return self.choose(n_frames)


def sparse_and_random(n_frames: int) -> list[list[int]]:
    """Choices of frames: the last, evaluation's, and eight at random, three times."""
    rng = random.Random(0)
    return [[n_frames - 1], segment_indices(n_frames, 8), *(rng.choices(range(n_frames), k=8) for _ in range(3))]


def read(path: Path | str, choose: Choose = range, **options: Any) -> Tensor:
    """The frames, without their number."""
    return read_frames(str(path), choose, **options)[0]


def refusal(path: Path, decoder: Decoder = "auto") -> str:
    """The message with which a video is refused: by either way to read it, unless the decoder is another."""
    with pytest.raises(VideoError) as caught:
        read_frames(str(path), range, decoder=decoder)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    if decoder in ("auto", "pyav"):
        with pytest.raises(VideoError) as caught:
            list(sample_pictures(str(path), 5, fps=5))
        assert str(caught.value) == message
    return message


def sampled(path: Path | str, rate: float) -> Tensor:
    """The frames at regular times, as one clip."""
    return as_clip(np.stack(list(sample_pictures(str(path), rate))))


# Frames are the right ones


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("name", CLIPS)
def test_every_frame_is_the_one_with_its_number(folder: Path, name: str, decoder: Decoder) -> None:
    choose = Chooser()
    clip, n_frames = read_frames(str(folder / name), choose, decoder=decoder)
    assert n_frames == N_FRAMES
    assert clip.dtype == torch.uint8
    width, height = CLIPS[name].get("size", (WIDTH, HEIGHT))
    assert clip.shape == (N_FRAMES, 3, height, width)
    assert numbers(clip) == list(range(N_FRAMES))
    assert choose.asked == [N_FRAMES]


@pytest.mark.parametrize("name", CLIPS)
def test_sparse_and_random_frames_are_the_right_ones(folder: Path, name: str) -> None:
    for wanted in sparse_and_random(N_FRAMES):
        assert numbers(read(folder / name, lambda _, wanted=wanted: wanted)) == wanted  # type: ignore[misc]


@pytest.mark.parametrize("name", ["h264_b_frames.mp4", "vp9_alt_ref.webm"])
def test_decord_on_what_it_can_read(folder: Path, name: str) -> None:
    pytest.importorskip("decord")
    wanted = [31, 4, 4, 17]
    assert numbers(read(folder / name, lambda _: wanted, decoder="decord")) == wanted


@pytest.mark.parametrize("name", ["h264_b_frames.mp4", "vp9_alt_ref.webm"])
def test_pixels_are_the_rendered_colours(folder: Path, name: str) -> None:
    clip = read(str(folder / name), lambda _: [21])
    expected = torch.from_numpy(picture(21)).permute(2, 0, 1)
    assert {tuple(colour) for colour in expected.flatten(1).T.tolist()} == {ON, OFF}
    assert (clip[0].float() - expected.float()).abs().mean() < 12  # of 255: the codec's loss


def test_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert numbers(read("h264.avi", lambda _: [5])) == [5]
    assert numbers(sampled("h264.avi", 0.5)) == [12, 36]


def test_names_that_ffmpeg_could_take_for_something_else(tmp_path: Path) -> None:
    for name in ("-y.mp4", "concat:a|b.mp4", "frame_%03d.mp4", "it's «naïve» #1 (sport)!.mp4"):
        path = render(tmp_path / "clip.mp4", 4).rename(tmp_path / name)
        assert numbers(read(path, range)) == [0, 1, 2, 3]


def test_short_video(tmp_path: Path) -> None:
    path = render(tmp_path / "one.mp4", 1)
    assert numbers(read(path, lambda n: [0] * (7 + n))) == [0] * 8


def test_frames_that_an_edit_list_cuts_away_are_not_counted(tmp_path: Path) -> None:
    path = cut_start(render(tmp_path / "cut.mp4", N_FRAMES, options={"bf": "2", "g": "12"}), 17)
    choose = Chooser()
    assert numbers(read(path, choose)) == list(range(17, N_FRAMES))
    assert choose.asked == [N_FRAMES - 17]
    for wanted in sparse_and_random(N_FRAMES - 17):
        assert numbers(read(path, lambda _, wanted=wanted: wanted)) == [17 + k for k in wanted]  # type: ignore[misc]
    assert probe(str(path)) == VideoFacts(N_FRAMES - 17, N_FRAMES - 17, 12.0, 0, False, left_out=17)
    assert numbers(sampled(path, 6)) == list(range(18, N_FRAMES, 2))


MATRICES = {  # a, b, c, d: x' = a x + c y, y' = b x + d y; what they do to a picture, clockwise
    "upright": ((1, 0, 0, 1), False, 0),
    "90": ((0, 1, -1, 0), False, 90),
    "180": ((-1, 0, 0, -1), False, 180),
    "270": ((0, -1, 1, 0), False, 270),
    "left to right": ((-1, 0, 0, 1), True, 0),
    "top to bottom": ((1, 0, 0, -1), True, 180),
    "transposed": ((0, 1, 1, 0), True, 270),
    "transposed the other way": ((0, -1, -1, 0), True, 90),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video in which decoding may start at every sixth frame."""
    return render(tmp_path_factory.mktemp("stored") / "stored.mp4", 48, options={"g": "6", "bf": "2"})


@pytest.mark.parametrize(("matrix", "mirrored", "degrees"), MATRICES.values(), ids=MATRICES)
def test_rotation_and_mirroring_are_applied(
    stored: Path, tmp_path: Path, matrix: tuple[int, int, int, int], mirrored: bool, degrees: int
) -> None:
    def turn(clip: Tensor) -> Tensor:
        return (clip.flip(3) if mirrored else clip).rot90(-degrees // 90, (2, 3))

    path = tmp_path / "turned.mp4"
    path.write_bytes(stored.read_bytes())
    rotate(path, matrix)
    assert read(path).equal(turn(read(stored)))
    for wanted in sparse_and_random(48):  # by seeking, too
        assert read(path, lambda _, wanted=wanted: wanted).equal(turn(read(stored)[wanted]))  # type: ignore[misc]
    facts = probe(str(path))
    assert (facts.rotation, facts.mirrored) == (degrees, mirrored)
    assert sampled(path, 6).equal(read(path)[1::2])
    # Pixel by pixel: (x, y) moves to (a x + c y, b x + d y).
    a, b, c, d = matrix
    source, target = read(stored, lambda _: [21])[0], read(path, lambda _: [21])[0]
    x, y = torch.meshgrid(torch.arange(WIDTH), torch.arange(HEIGHT), indexing="ij")
    across, down = a * x + c * y, b * x + d * y
    assert target[:, down - down.min(), across - across.min()].equal(source[:, y, x])


@pytest.mark.parametrize("degrees", [10, 45, 60, 135, 200, 315])
def test_other_angles_are_told_and_not_applied(stored: Path, tmp_path: Path, degrees: int) -> None:
    path = tmp_path / "turned.mp4"
    path.write_bytes(stored.read_bytes())
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotate(path, (cosine, sine, -sine, cosine))
    assert read(path).equal(read(stored))
    assert (probe(str(path)).rotation, probe(str(path)).mirrored) == (degrees, False)


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (0, 1, 0, -1), (0, 0, 0, -1), (0, -1, 0, 1), (-1, 0, 0, 0)])
def test_a_matrix_that_leaves_no_picture_is_ignored(
    stored: Path, tmp_path: Path, matrix: tuple[int, int, int, int]
) -> None:
    path = tmp_path / "turned.mp4"
    path.write_bytes(stored.read_bytes())
    rotate(path, matrix)
    assert read(path).equal(read(stored))


@pytest.mark.parametrize("sar", ["2/1", "1/2", "4/3", "1/1"])
def test_the_shape_of_pixels_is_told(tmp_path: Path, sar: str) -> None:
    for name in ("clip.mp4", "clip.mkv", "clip.ts"):
        path = render(tmp_path / name, 12, options={"x264-params": f"sar={sar}"})
        assert read(path).shape[2:] == (HEIGHT, WIDTH)
        assert probe(str(path)).pixel_aspect == pytest.approx(float(Fraction(sar)))


# Which stream is the video


def render_streams(path: Path, *streams: tuple[str, int, tuple[int, int], str]) -> Path:
    """Render a file of several video streams: the codec of each, how many frames it has, their size, its flag."""
    with av.open(str(path), "w") as container:
        added: list[av.VideoStream] = []
        for codec, _, size, flag in streams:
            stream = container.add_stream(codec, rate=12)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = av.stream.Disposition[flag] if flag else av.stream.Disposition(0)
            added.append(stream)
        for stream, (_, n_frames, size, _) in zip(added, streams, strict=True):
            for number in range(n_frames):
                frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
                container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
            container.mux(stream.encode(None))
    return path


MAIN, SMALL, LARGE = (WIDTH, HEIGHT), (32, 32), (2 * WIDTH, 2 * HEIGHT)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize(
    "streams",
    [
        [("libx264", 2, SMALL, ""), ("libx264", 24, MAIN, "default")],
        [("mjpeg", 1, SMALL, ""), ("libx264", 24, MAIN, "default")],
        [("mjpeg", 1, LARGE, ""), ("libx264", 24, MAIN, "default")],
        [("libx264", 24, LARGE, ""), ("libx264", 24, MAIN, "default")],
        [("libx264", 24, SMALL, "default"), ("libx264", 24, MAIN, "default")],
        [("mjpeg", 1, LARGE, "default"), ("libx264", 24, MAIN, "default")],
        [("libx264", 24, MAIN, "default"), ("mjpeg", 1, LARGE, "")],
        [("libx264", 24, MAIN, "default"), ("libx264", 24, SMALL, "default")],
    ],
    ids=lambda streams: " then ".join(f"{codec} {n} {size[0]} {flag}" for codec, n, size, flag in streams),
)
def test_previews_and_covers_are_not_the_video(
    tmp_path: Path, suffix: str, streams: list[tuple[str, int, tuple[int, int], str]]
) -> None:
    path = render_streams(tmp_path / f"clip{suffix}", *streams)
    clip = read(path)
    assert clip.shape == (24, 3, HEIGHT, WIDTH)
    assert numbers(clip) == list(range(24))
    assert numbers(read(path, lambda _: [20, 3])) == [20, 3]
    assert numbers(sampled(path, 12)) == list(range(24))
    assert probe(str(path)).frames == 24


def test_the_choice_of_stream_is_ffmpegs(tmp_path: Path) -> None:
    path = render_streams(
        tmp_path / "clip.mp4", ("libx264", 30, SMALL, ""), ("libx264", 24, MAIN, "default"), ("libx264", 9, LARGE, "")
    )
    with av.open(str(path)) as container:
        best = container.streams.best("video")
        assert isinstance(best, av.VideoStream)
        assert (best.width, best.height) == (WIDTH, HEIGHT)
    assert numbers(read(path)) == list(range(24))


def test_a_change_of_size_is_scaled_to_the_first(tmp_path: Path) -> None:
    small = render(tmp_path / "small.ts", 10)
    large = render(tmp_path / "large.ts", 10, size=(2 * WIDTH, 3 * HEIGHT))
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    clip = read(str(both), range)
    assert clip.shape[2:] == (HEIGHT, WIDTH)
    assert numbers(clip)[-8:] == list(range(2, 10))
    assert sampled(both, 12).equal(clip)


def test_a_cover_picture_is_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = render(tmp_path / "clip.mp4", 4)
    streams = [SimpleNamespace(disposition=av.stream.Disposition.attached_pic)]
    alter_decoding(monkeypatch, list, streams=SimpleNamespace(video=streams))
    assert "no video stream" in refusal(path)
    streams.append(SimpleNamespace(disposition=av.stream.Disposition.default, codec_context=None))
    assert "no decoder for its codec" in refusal(path)


def test_only_wanted_frames_are_converted_each_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = count_conversions(monkeypatch)
    assert numbers(read(folder / "h264.mkv", lambda _: [9, 3, 9, 9])) == [9, 3, 9, 9]
    assert len(converted) == 2


@pytest.mark.parametrize("wanted", [[], [-1], [N_FRAMES]])
def test_a_choice_out_of_range_is_a_bug_and_no_fault_of_the_video(folder: Path, wanted: list[int]) -> None:
    for name in ("h264.mkv", "vp8_alt_ref.webm"):
        with pytest.raises(ValueError, match="returned") as caught:
            read_frames(str(folder / name), lambda _: wanted)
        assert not isinstance(caught.value, UserError)


# What a file tells of itself


@pytest.mark.parametrize("name", CLIPS)
def test_whole_files_promise_the_frames_that_they_have(folder: Path, name: str) -> None:
    facts = probe(str(folder / name))
    assert (facts.frames, facts.promised, facts.rotation) == (N_FRAMES, N_FRAMES, 0)
    assert facts.variable_rate == ("uneven" in name)
    if not facts.variable_rate:
        assert facts.fps == 12


def test_sound_that_goes_on_after_the_pictures_promises_no_frames(tmp_path: Path) -> None:
    facts = probe(str(render(tmp_path / "clip.mkv", 12, audio=30)))  # 1 s, with sound of 4 s
    assert facts.frames == 12
    assert facts.promised <= 13


# Broken files


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("clip.mp4", {"options": B_FRAMES, "container_options": {"movflags": "faststart"}}),
        ("clip.mkv", {"options": B_FRAMES}),
        ("sound.mkv", {"options": B_FRAMES, "audio": 1}),
        ("clip.ts", {"options": B_FRAMES}),
        ("clip.avi", {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}}),
        ("clip.webm", {"codec": "libvpx-vp9", "options": ALT_REF}),
        ("shifted.webm", {"codec": "libvpx-vp9", "times": SHIFTED}),
    ],
)
def test_a_video_that_is_truncated_is_a_shorter_one(tmp_path: Path, name: str, how: dict[str, Any]) -> None:
    path = truncate(render(tmp_path / name, 100, **how))
    choose = Chooser()
    found = numbers(read(path, choose))
    assert 20 < len(found) < 95
    # What the last frames refer to may be lost, so they can be damaged or missing.
    assert found[:-3] == list(range(len(found) - 3))
    assert choose.asked[-1] == len(found)
    assert choose.asked == sorted(set(choose.asked), reverse=True)
    assert read(path, lambda n: [0, n - 1]).equal(read(path)[[0, -1]])
    regular = numbers(sampled(path, 4))
    assert 6 < len(regular) < 33
    assert regular[:-1] == [3 * k + 1 for k in range(len(regular) - 1)]

    facts = probe(str(path))
    assert 20 < facts.frames < 95
    # It promises the frames that it had; but for MP4 and AVI, that is told from the duration and the rate.
    if path.suffix != ".ts":
        assert abs(facts.promised - 100) <= (0 if path.suffix in (".mp4", ".avi") else 2)


@pytest.mark.parametrize("flush_fails", [False, True])
def test_a_file_that_cannot_be_read_on_ends_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush_fails: bool
) -> None:
    path = render(tmp_path / "clip.avi", codec="mpeg4", options={"bf": "2", "g": "100", "sc_threshold": "1000000000"})
    opened = av.open

    def failing(*args: Any, **options: Any) -> StandIn:
        container: Any = opened(*args, **options)
        stream = container.streams.video[0]

        def demux(_: object) -> Iterator[Any]:
            yield from itertools.islice(container.demux(stream), 19)
            raise av.error.InvalidDataError(0, "Input/output error")

        def decode(packet: None) -> list[Any]:
            if flush_fails:
                raise av.error.InvalidDataError(0, "Input/output error")
            return list(stream.decode(packet))

        streams = SimpleNamespace(video=[StandIn(stream, decode=decode)])
        return StandIn(container, demux=demux, streams=streams)

    monkeypatch.setattr(av, "open", failing)
    # 19 packets: one frame by itself, then threes; of each the last shown is stored first, and the decoder holds it.
    assert numbers(read(path, range)) == list(range(18 if flush_fails else 19))


@pytest.mark.parametrize("decoder", ["auto", "pyav", "decord"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.mp4", b"this is no video\n" * 40),
        ("text.txt", b"this is no video\n" * 40),
        ("text.webm", b"\x1aE\xdf\xa3 webm, it says, but it is not\n" * 40),
        ("zeros.avi", bytes(5000)),
    ],
)
def test_a_video_that_is_not_a_video(tmp_path: Path, name: str, content: bytes, decoder: Decoder) -> None:
    if decoder == "decord":
        pytest.importorskip("decord")
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(path, decoder)
    assert ("text, sound or a playlist" if name.endswith(".txt") else "not a video that FFmpeg knows") in message
    assert "remove it from the manifest or replace it" in message


@pytest.mark.parametrize("decoder", ["auto", "decord"])
@pytest.mark.parametrize("suffix", [".m3u8", ".mp4", ".jpg", ""])
@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {}\n",
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>{}</BaseURL></MPD>",
    ],
)
def test_a_playlist_leads_to_no_other_file(tmp_path: Path, playlist: str, suffix: str, decoder: Decoder) -> None:
    elsewhere = render(tmp_path / "elsewhere.ts", 4)
    (tmp_path / "data").mkdir()
    for target in (str(elsewhere), "../elsewhere.ts", "near.ts"):
        (tmp_path / "data" / "near.ts").write_bytes(elsewhere.read_bytes())
        path = tmp_path / "data" / f"video{suffix}"
        path.write_text(playlist.format(target))
        assert re.search("text, sound or a playlist|not a video that FFmpeg knows", refusal(path, decoder))
        path.unlink()
        # Nor does an image of a folder of images.
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / "1.jpg").write_text(playlist.format(target))
        refusal(tmp_path / "images", decoder)


def test_a_link_that_a_person_made_is_followed(tmp_path: Path) -> None:
    save_images(tmp_path, 3)
    (tmp_path / "frames").mkdir()
    for k in (2, 0):
        (tmp_path / "frames" / f"{k}.png").symlink_to(tmp_path / f"{k}.png")
    assert numbers(read(tmp_path / "frames", range)) == [0, 2]


def test_a_video_that_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "empty.mp4"
    path.touch()
    assert "it is empty; make it readable, remove it from the manifest or replace it" in refusal(path)


def test_a_video_without_its_header(tmp_path: Path) -> None:
    path = render(tmp_path / "clip.mp4")  # whose header comes last
    path.write_bytes(path.read_bytes()[:-1500])
    assert "not a video that FFmpeg knows" in refusal(path)


def test_a_video_of_which_not_one_frame_decodes(tmp_path: Path) -> None:
    path = render(tmp_path / "clip.mp4", container_options={"movflags": "faststart"})
    data = path.read_bytes()
    start = data.index(b"mdat") + 4
    path.write_bytes(data[:start] + b"\xff" * (len(data) - start))
    assert "not one frame of it decodes" in refusal(path)
    path.write_bytes(data[:start])
    assert "not one frame of it decodes" in refusal(path)


def test_decord_on_frames_that_do_not_decode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decord = pytest.importorskip("decord")

    def fail(*_: object) -> None:
        raise decord.DECORDError("no frame")

    monkeypatch.setattr(decord.VideoReader, "get_batch", fail)
    assert "decord cannot read it (DECORDError)" in refusal(folder / "vp9_alt_ref.webm", "decord")
    assert numbers(read(folder / "vp9_alt_ref.webm", range)) == list(range(N_FRAMES))


def test_a_frame_that_cannot_be_converted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_conversions(monkeypatch, av.error.PatchWelcomeError(0, "Not yet implemented"))
    assert "cannot be converted to RGB (Not yet implemented)" in refusal(folder / "h264.mkv")


def test_sound_without_pictures(tmp_path: Path) -> None:
    assert "it has no video stream" in refusal(render_sound(tmp_path / "sound.m4a"))


def test_a_missing_video(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "missing.mp4")
    assert "name" in refusal(tmp_path / ("x" * 300))  # File name too long
    assert "null" in refusal(tmp_path / "a\0b")


def test_a_video_without_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(video, "open", deny, raising=False)  # a superuser may read everything
    assert "Permission denied; make it readable" in refusal(folder / "h264.mkv")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    assert "neither a regular file nor a folder of images" in refusal(tmp_path / "fifo.mp4")


def test_the_error_survives_the_way_from_a_worker() -> None:
    path = os.path.abspath("a.mp4")
    error = VideoError("cannot read the video a.mp4: it is empty", path=path, reason="it is empty")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.path, copy.reason) == (str(error), path, "it is empty")
    assert VideoError("lost").reason == "lost"
    assert copy.reason_for("a.mp4") == copy.reason
    of_image = VideoError("…", path="/frames/3.png", reason="it is empty")
    assert of_image.reason_for("/frames") == "3.png: it is empty"


# Folders of images


def test_images_are_ordered_by_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1, 33):
        save_image(tmp_path / f"img_{number}.jpg", number)
    save_image(tmp_path / "img_%d4.PNG", 4)
    save_image(tmp_path / "img_0005.bmp", 5)
    save_image(tmp_path / "img_006.webp", 6)
    save_image(tmp_path / "img_0007.jpeg", 7)
    save_image(tmp_path / "._img_3.jpg", 3)
    (tmp_path / "img_8.txt").write_text("no image")
    (tmp_path / "img_9.jpg").mkdir()
    choose = Chooser()
    assert numbers(read(tmp_path, choose)) == [1, 2, 4, 5, 6, 7, 10, 33]
    assert choose.asked == [8]
    assert numbers(read(tmp_path, lambda _: [6, 0, 6])) == [10, 1, 10]


@pytest.mark.parametrize(
    "ordered",
    [
        ["img_00001.jpg", "img_00002.jpg", "img_00010.jpg"],
        ["frame000001.png", "frame000002.png", "frame1000000.png"],
        ["000001.jpg", "000002.jpg"],
        ["1.png", "2.jpg", "03.PNG", "10.bmp"],
        ["v2_001.png", "v2_002.png", "v2_010.png"],
        ["1_9.png", "1_10.png", "2_1.png"],
        ["clip.v1.2.1.png", "clip.v1.2.9.png", "clip.v1.10.1.png"],
        ["t_0.50s.png", "t_1.25s.png", "t_1.3s.png", "t_2.00s.png", "t_10.1s.png"],
        ["t_0.5s.png", "t_1s.png", "t_1.25s.png", "t_1.3s.png", "t_2s.png"],
        ["1e-05 sec.png", "0.5 sec.png", "1.25 sec.png", "1.3 sec.png", "10 sec.png"],
        ["0.001.png", "0.002.png", "0.010.png", "1.000.png"],
        ["t_-2.png", "t_-1.png", "t_0.png", "t_1.png"],
        ["img_-1.png", "img_-2.png", "img_-10.png"],
        ["frame-1.png", "frame-2.png", "frame-10.png"],
        ["2024-01-05.png", "2024-01-06.png", "2024-02-01.png"],
        ["Img_1.png", "img_2.png", "IMG_3.png"],
        ["a_1.png", "b_2.png", "a_3.png"],
        ["a.png", "b.png", "c.png"],
        ["٠.png", "١.png", "٢.png"],
        ["s01e02_001.png", "s01e02_002.png"],
        ["clip.mp4.2.png", "clip.mp4.10.png", "clip.mp4.11.png"],
        ["t_40ms.png", "t_80ms.png", "t_120ms.png"],
        ["only.png"],
    ],
    ids=lambda ordered: ordered[1 % len(ordered)],
)
def test_images_are_in_the_order_of_their_numbers(ordered: list[str]) -> None:
    for seed in range(5):
        assert order_images(random.Random(seed).sample(ordered, len(ordered))) == ordered


@pytest.mark.parametrize(
    ("frame", "others"),
    [
        ("frame_{}.png", ["frame_{}_mask.png"]),
        ("{}.jpg", ["{}_Mask.jpg", "mask_{}.png"]),
        ("img_{:05}.jpg", ["flow_x_{:05}.jpg", "flow_y_{:05}.jpg"]),
        ("{:04}.png", ["{:04}.depth.png"]),
        ("{:04}-color.png", ["{:04}-depth.png", "thumb.jpg"]),
    ],
)
def test_what_lies_beside_the_frames_is_told_apart(tmp_path: Path, frame: str, others: list[str]) -> None:
    for number in range(12):
        save_image(tmp_path / frame.format(number), number)
        for other in others:
            save_image(tmp_path / other.format(number), 255)
    save_image(tmp_path / "thumb_99.png", 255)  # which has a number of its own
    assert numbers(read(tmp_path)) == list(range(12))
    assert len(list(sample_pictures(str(tmp_path), 12, fps=12))) == 12


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["1.png", "01.png"], "01.png and 1.png have the same number: leave one of them"),
        (["1.png", "1.jpg", "2.png", "2.jpg"], "1.jpg and 1.png have the same number"),
        (["1.png", "1.PNG"], "1.PNG and 1.png have the same number"),
        (["t_1.3s.png", "t_1.30s.png"], "have the same number"),
        (["a.png", "a.jpg"], "have the same number"),
        (["t_1.25.png", "t_1.3.png"], "t_1.3.png and t_1.25.png have numbers that may be decimal or not"),
        (["t_1,25.png", "t_1,3.png"], "may be decimal or not"),
        (["img_1.2.png", "img_1.9.png", "img_1.10.png"], "may be decimal or not"),
        (["t_1e-3.png", "t_5e-4.png", "t_1e-2.png"], "may be decimal or not"),
        (
            ["left_1.png", "right_1.png", "left_2.png", "right_2.png"],
            "several kinds, such as left_1.png and right_1.png",
        ),
        (["flow_x_1.png", "flow_y_1.png"], "several kinds"),
        (["1.png", "2.png", "cover.png"], "several kinds, such as 1.png and cover.png: leave only those of the video"),
        (["1.png", "2.png", "1 (2).png"], "several kinds"),
        (["v1.2.png", "v1.2.3.png"], "several kinds"),
        (["t_500ms.png", "t_1s.png", "t_1500ms.png"], "have times in ms and in s: number them with integers"),
        (["frame_09.png", "frame_0a.png", "frame_0b.png"], "several kinds"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_images_whose_order_is_not_clear(tmp_path: Path, names: list[str], reason: str) -> None:
    for number, name in enumerate(names):
        save_image(tmp_path / name, number)
    assert reason in refusal(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_tags_of_images_say_how_they_are_seen(tmp_path: Path, form: str, orientation: int) -> None:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[form]
    for number in (21, 75):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.{suffix}", form, exif=tags, quality=95, **options)
    expected = []
    for number in (21, 75):
        with Image.open(tmp_path / f"{number}.{suffix}") as image:
            expected.append(np.asarray(ImageOps.exif_transpose(image).convert("RGB")))
    clip = read(tmp_path).permute(0, 2, 3, 1).numpy()
    assert clip.shape == np.stack(expected).shape
    # The middle of each block, as JPEG and WebP blur its edges.
    middles = np.s_[:, 12::24, 16::32] if orientation > 4 else np.s_[:, 16::32, 12::24]
    assert np.abs(clip[middles].astype(int) - np.stack(expected)[middles]).max() < 12
    assert as_clip(np.stack(list(sample_pictures(str(tmp_path), 5, fps=5)))).equal(read(tmp_path))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tags_of_a_video_of_pictures_say_how_it_is_seen(tmp_path: Path, orientation: int) -> None:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    (tmp_path / "images").mkdir()
    Image.fromarray(picture(21)).save(tmp_path / "images" / "1.jpg", exif=tags)
    data = (tmp_path / "images" / "1.jpg").read_bytes()
    (tmp_path / "clip.mjpeg").write_bytes(4 * data)
    assert read(tmp_path / "clip.mjpeg").equal(read(tmp_path / "images").repeat(4, 1, 1, 1))
    facts = probe(str(tmp_path / "clip.mjpeg"))
    assert (facts.frames, facts.mirrored) == (4, orientation in (2, 4, 5, 7))


def test_other_tags_of_images(tmp_path: Path) -> None:
    for compressed in (False, True):  # Pillow reads these, too
        info = PngImagePlugin.PngInfo()
        xmp = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
        info.add_itxt("XML:com.adobe.xmp", xmp, zip=compressed)
        Image.fromarray(picture(21)).save(tmp_path / "1.png", pnginfo=info)
        assert read(tmp_path).shape[2:] == (WIDTH, HEIGHT)
    (tmp_path / "1.png").unlink()
    sideways = Image.Exif()
    sideways[ExifTags.Base.Orientation] = 6
    Image.fromarray(picture(21)).save(tmp_path / "1.jpg", "TIFF", exif=sideways)
    assert read(tmp_path).shape[2:] == (WIDTH, HEIGHT)
    Image.fromarray(picture(21)).save(tmp_path / "1.jpg")
    upright = read(tmp_path)
    for tags in (b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12", b"Exif\0\0nonsense", b"Exif", b""):
        Image.fromarray(picture(21)).save(tmp_path / "1.jpg", exif=tags)
        assert read(tmp_path).equal(upright)
    for value in (0, 9, 65535):
        tags_of = Image.Exif()
        tags_of[ExifTags.Base.Orientation] = value
        Image.fromarray(picture(21)).save(tmp_path / "1.jpg", exif=tags_of)
        assert read(tmp_path).equal(upright)


@pytest.mark.parametrize("name", ["1.png", "1.jpg", "1.webp", "1.bmp"])
@pytest.mark.parametrize("side", [8200, 16000])
def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path: Path, name: str, side: int) -> None:
    size = (side, min(side, 8200 if name in ("1.webp", "1.bmp") else side))  # which take longer to write
    (tmp_path / "frames").mkdir()
    Image.new("1" if name in ("1.png", "1.bmp") else "L", size).save(tmp_path / "frames" / name)
    for path in (tmp_path / "frames", *([tmp_path / "frames" / name] if name == "1.png" else [])):
        message = refusal(path)
        assert re.search(rf"it has ({size[0]} x {size[1]}|{size[0] * size[1]:,}) pixels", message)
        assert "at most 64 million are decoded: scale it down" in message


@pytest.mark.parametrize(
    ("name", "codec"), [("clip.mp4", "libx264"), ("clip.ts", "libx264"), ("clip.webm", "libvpx"), ("clip.avi", "mjpeg")]
)
def test_a_video_of_too_many_pixels_is_not_decoded(tmp_path: Path, name: str, codec: str) -> None:
    path, side = tmp_path / name, 8192
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=12, options={"preset": "ultrafast"} if codec == "libx264" else {})
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = side
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        container.mux(stream.encode(av.VideoFrame(side, side, stream.pix_fmt)))
        container.mux(stream.encode(None))
    reason = "of more than 64 million pixels none is tried" if codec == "mjpeg" else "it has 8192 x 8192 pixels"
    assert reason in refusal(path)


def test_images_of_other_sizes_are_scaled_to_the_first(tmp_path: Path) -> None:
    save_image(tmp_path / "1.png", 1)
    save_image(tmp_path / "2.png", 2, size=(50, 80))
    clip = read(str(tmp_path), lambda _: [1, 0])
    assert clip.shape == (2, 3, HEIGHT, WIDTH)
    assert numbers(clip) == [2, 1]


def test_a_folder_without_images(tmp_path: Path) -> None:
    assert "the folder has no images" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_an_image_that_does_not_decode(tmp_path: Path, content: bytes) -> None:
    save_image(tmp_path / "1.png", 1)
    (tmp_path / "2.png").write_bytes(content)
    with pytest.raises(VideoError, match="remove it from the manifest or replace it") as caught:
        read_frames(str(tmp_path), range)
    assert str(tmp_path / "2.png") in str(caught.value)
    assert numbers(read(tmp_path, lambda _: [0])) == [1]


# Decoders that are not there


def test_an_unknown_decoder(folder: Path) -> None:
    with pytest.raises(UserError, match="no decoder 'opencv': choose from auto, decord, pyav, torchcodec"):
        read_frames(str(folder / "h264.mkv"), range, decoder="opencv")  # type: ignore[arg-type]


@pytest.mark.parametrize("package", ["decord", "torchcodec"])
def test_a_decoder_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch, package: Decoder) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.decoders", None)
    path = str(folder / "vp9_alt_ref.webm")
    with pytest.raises(UserError, match=f"needs the package {package}, which cannot be imported: install it") as caught:
        read_frames(path, range, decoder=package)
    assert not isinstance(caught.value, VideoError)
    assert numbers(read(path, lambda _: [5])) == [5]


def test_auto_needs_no_decoder_that_seeks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    for name in CLIPS:
        assert numbers(read(folder / name, lambda _: [5])) == [5]


def test_torchcodec_is_asked_for_exact_frames_once_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class VideoDecoder:
        """Stands in for torchcodec's."""

        def __init__(self, source: str, *, seek_mode: str, num_ffmpeg_threads: int) -> None:
            assert (seek_mode, num_ffmpeg_threads) == ("exact", 1)
            if "mp4" in source:
                raise ValueError("no video stream")

        def __len__(self) -> int:
            return N_FRAMES

        def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
            assert indices == sorted(set(indices))
            if 39 in indices:
                raise RuntimeError("end of file")
            return SimpleNamespace(data=torch.from_numpy(np.stack([picture(k) for k in indices])).permute(0, 3, 1, 2))

    module = ModuleType("torchcodec.decoders")
    module.VideoDecoder = VideoDecoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    path = folder / "h264.mkv"
    assert numbers(read(path, lambda _: [9, 3, 9], decoder="torchcodec")) == [9, 3, 9]
    assert "torchcodec cannot read it (RuntimeError)" in refusal(path, "torchcodec")
    assert "torchcodec cannot read it (ValueError)" in refusal(folder / "h264_b_frames.mp4", "torchcodec")
