import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import pytest
from av.bitstream import BitStreamFilterContext
from torch import Tensor

from clip_m2df.errors import UserError
from clip_m2df.video import Decoder, seeking
from clip_m2df.video.reader import VideoError, decoder_doubt, read_frames
from clip_m2df.video.seeking import PacketTable, read_packets
from clip_m2df.video.transforms import segment_indices
from tests.clips import (
    HEIGHT,
    WIDTH,
    alter_decoding,
    cut_start,
    lose_packet,
    note_times,
    numbers,
    render,
    rotate,
    truncate,
)

N_FRAMES = 150
B_FRAMES = {"bf": "3", "g": "12", "sc_threshold": "0"}
UNEVEN = [2 * k + (k % 3 == 0) + 10 * (k > 70) for k in range(N_FRAMES)]
HEVC = "keyint=12:min-keyint=12:scenecut=0:bframes=3:log-level=none"
OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=2:scenecut=0"}
VP = {"cpu-used": "8", "g": "12", "lag-in-frames": "10", "auto-alt-ref": "1"}

SEEKABLE: dict[str, dict[str, Any]] = {
    "h264.mp4": {"options": {"bf": "0", "g": "12"}},
    "h264_b_frames.mp4": {"options": B_FRAMES},
    "h264_fragmented.mp4": {"options": B_FRAMES, "container_options": {"movflags": "frag_keyframe"}},
    "h264_shifted.mp4": {"options": B_FRAMES, "times": [30 + 2 * k for k in range(N_FRAMES)]},
    "h264_uneven.mp4": {"options": B_FRAMES, "times": UNEVEN},
    "h264_with_sound.mp4": {"options": B_FRAMES, "audio": 90},
    "h264.mkv": {"options": {"bf": "0", "g": "12"}},
    "h264_b_frames.mkv": {"options": B_FRAMES},
    "h264_uneven.mkv": {"options": B_FRAMES, "times": UNEVEN},
    "h264_interlaced.mp4": {"options": {"x264-params": "tff=1:keyint=12:bframes=2"}},
    "h264_repeated_headers.mkv": {"options": {"x264-params": "keyint=12:slices=4:repeat-headers=1"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": f"open-gop=0:{HEVC}"}},
    "hevc.mkv": {"codec": "libx265", "options": {"x265-params": f"open-gop=0:{HEVC}"}},
    "mpeg4_b_frames.mp4": {"codec": "mpeg4", "options": B_FRAMES},
    "mpeg4_b_frames.mkv": {"codec": "mpeg4", "options": B_FRAMES},
    "mjpeg.mp4": {"codec": "mjpeg", "options": {"strict": "unofficial"}},
    "vp8.webm": {"codec": "libvpx", "options": VP},
    "vp9.webm": {"codec": "libvpx-vp9", "options": VP},
    "vp9.mp4": {"codec": "libvpx-vp9", "options": VP},
    "vp9_uneven.webm": {"codec": "libvpx-vp9", "options": VP, "times": UNEVEN},
}
SEQUENTIAL: dict[str, dict[str, Any]] = {
    "h264_open_gop.mp4": {"options": OPEN_GOP},
    "h264_open_gop.mkv": {"options": OPEN_GOP},
    "h264_intra_refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=12"}},
    "h264_long_gop.mp4": {"options": {"g": "250", "sc_threshold": "0"}},
    "h264.avi": {"options": B_FRAMES},
    "h264.ts": {"options": B_FRAMES},
    "hevc_open_gop.mp4": {"codec": "libx265", "options": {"x265-params": f"open-gop=1:{HEVC}"}},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "options": B_FRAMES},
    "av1.webm": {"codec": "libsvtav1", "options": {"preset": "11"}},
}
CHOICES = [
    segment_indices(N_FRAMES, 8),
    [N_FRAMES - 1],
    [0],
    *(random.Random(seed).choices(range(N_FRAMES), k=8) for seed in range(6)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, how in (SEEKABLE | SEQUENTIAL).items():
        render(folder / name, N_FRAMES, **how)
    return folder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Times of the frames that are decoded, as they are."""
    return note_times(monkeypatch)


def read(path: Path, wanted: list[int]) -> Tensor:
    return read_frames(str(path), lambda _: wanted)[0]


@contextmanager
def no_seeking() -> Iterator[None]:
    """Read from the start only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PacketTable, "runs", lambda *_: [])
        yield


def read_sequentially(path: Path, wanted: list[int]) -> Tensor:
    with no_seeking():
        return read(path, wanted)


def evaluated(path: Path) -> Tensor | None:
    """Evaluation's frames, or None if the video is refused."""
    try:
        return read_frames(str(path), lambda n_frames: segment_indices(n_frames, 8))[0]
    except VideoError:
        return None


def table(path: Path) -> PacketTable:
    with av.open(str(path)) as container:
        return read_packets(container, container.streams.video[0])


# Frames are the right ones


@pytest.mark.parametrize("name", SEEKABLE | SEQUENTIAL)
def test_frames_are_those_of_reading_from_the_start(folder: Path, name: str) -> None:
    for wanted in CHOICES:
        clip = read(folder / name, wanted)
        assert numbers(clip) == wanted
        assert clip.equal(read_sequentially(folder / name, wanted))


@pytest.mark.parametrize("name", SEEKABLE)
def test_short_groups_of_pictures_are_sought(folder: Path, name: str, decoded: list[int | None]) -> None:
    assert len(table(folder / name).starts) >= N_FRAMES // 12
    read(folder / name, [N_FRAMES - 1])
    assert len(decoded) <= 1 + 12 + 2  # the first, the last group, and B-frames shown before it
    decoded.clear()
    read(folder / name, segment_indices(N_FRAMES, 8))
    assert len(decoded) < 0.8 * N_FRAMES


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_others_are_read_from_the_start(folder: Path, name: str, decoded: list[int | None]) -> None:
    wanted = segment_indices(N_FRAMES, 8)
    read(folder / name, wanted)
    assert len(decoded) == 1 + wanted[-1]


def test_most_frames_are_read_from_the_start(folder: Path, decoded: list[int | None]) -> None:
    clip, n_frames = read_frames(str(folder / "h264.mp4"), range)
    assert n_frames == N_FRAMES
    assert numbers(clip) == list(range(N_FRAMES))
    assert len(decoded) == N_FRAMES
    assert decoded == sorted(set(decoded), key=decoded.index)


def test_a_file_with_an_edit_list_is_read_from_the_start(tmp_path: Path, decoded: list[int | None]) -> None:
    path = cut_start(render(tmp_path / "cut.mp4", N_FRAMES, options=B_FRAMES), 17)
    assert table(path).starts == []
    assert numbers(read(path, [0, 100])) == [17, 117]
    assert len(decoded) == 101


@pytest.mark.parametrize("what", ["another frame", "no frame", "no seek"])
def test_what_is_not_as_expected_is_read_from_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[int | None], what: str
) -> None:
    def disturbed(frames: Iterable[Any]) -> Iterator[Any]:
        for frame in frames:
            if frame.pts > 0 and len(decoded) < 5:
                if what == "no frame":
                    continue
                frame.pts += 1
            yield frame

    def seek(*_: object, **__: object) -> None:
        raise av.error.InvalidDataError(0, "Input/output error")

    if what == "no seek":
        alter_decoding(monkeypatch, list, seek=seek)
    else:
        alter_decoding(monkeypatch, disturbed)
    assert numbers(read(folder / "h264.mp4", [50, 120])) == [50, 120]
    assert 121 <= len(decoded) <= 126


def test_a_change_of_size_is_scaled_to_the_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = render(tmp_path / "large.webm", 60, "libvpx-vp9", options=VP, size=(192, 128))
    with av.open(str(tmp_path / "both.webm"), "w") as both, av.open(str(folder / "vp9.webm")) as first:
        stream = both.add_stream_from_template(first.streams.video[0])
        with av.open(str(large)) as second:
            for shift, source in ((0, first), (20_000, second)):
                for packet in source.demux(video=0):
                    if packet.pts is not None and packet.size:
                        packet.stream, packet.pts, packet.dts = stream, packet.pts + shift, packet.pts + shift
                        both.mux(packet)
    decoded = note_times(monkeypatch)
    clip = read(tmp_path / "both.webm", [N_FRAMES + 50])
    assert clip.shape[2:] == (HEIGHT, WIDTH)
    assert numbers(clip) == [50]
    assert len(decoded) < 20
    assert clip.equal(read_sequentially(tmp_path / "both.webm", [N_FRAMES + 50]))


# Decoders that seek by keyframes


READ_BY_DECORD = {
    *("h264.mp4", "h264_b_frames.mp4", "h264_fragmented.mp4", "h264_shifted.mp4", "h264_uneven.mp4"),
    *("h264_with_sound.mp4", "h264.mkv", "h264_b_frames.mkv", "h264_uneven.mkv", "h264_interlaced.mp4"),
    *("h264_repeated_headers.mkv", "h264_long_gop.mp4", "hevc.mp4", "hevc.mkv", "mjpeg.mp4"),
    *("vp8.webm", "vp9.webm", "vp9.mp4", "vp9_uneven.webm"),
}


@pytest.mark.parametrize("name", sorted((SEEKABLE | SEQUENTIAL).keys() - {"av1.webm"}))
def test_decord_gives_the_right_frames_or_the_file_is_refused(folder: Path, name: str) -> None:
    pytest.importorskip("decord")
    path = str(folder / name)
    doubt = decoder_doubt(path, "decord")
    assert (doubt == "") == (name in READ_BY_DECORD)
    for wanted in CHOICES[3:] if not doubt else CHOICES[:1]:
        if not doubt:
            assert numbers(read_frames(path, lambda _, wanted=wanted: wanted, decoder="decord")[0]) == wanted  # type: ignore[misc]
            continue
        with pytest.raises(UserError, match=r"decord may give other frames .*--data\.decoder auto") as caught:
            read_frames(path, range, decoder="decord")
        assert path in str(caught.value)
        assert not isinstance(caught.value, VideoError)  # it is sound


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
def test_what_a_decoder_that_seeks_does_not_show_as_players_do(tmp_path: Path, decoder: Decoder) -> None:
    path = render(tmp_path / "clip.mp4", 12)
    assert decoder_doubt(str(path), decoder) == ""
    rotate(path, (-1, 0, 0, 1))
    assert "turned or mirrored" in decoder_doubt(str(path), decoder)
    rotate(path, (0.6, 0.8, -0.8, 0.6))
    assert "turned or mirrored" in decoder_doubt(str(path), decoder)
    for name in ("h264.avi", "h264.ts"):
        assert decoder_doubt(str(render(tmp_path / name, 12, options=B_FRAMES)), decoder) != ""
    exact: tuple[Decoder, ...] = ("auto", "pyav")
    for how in exact:
        assert decoder_doubt(str(path), how) == ""


@pytest.mark.parametrize("name", ["turned.mp4", "turned.mkv"])
@pytest.mark.parametrize("how", ["rotate=90", "rotate=180", "flip=horizontal"])
def test_a_turn_that_only_some_frames_tell_holds_for_all(tmp_path: Path, name: str, how: str) -> None:
    upright = render(tmp_path / f"upright{name[6:]}", 60, options={"bf": "0", "g": "12"})
    with av.open(str(upright)) as source, av.open(str(tmp_path / name), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        tell = BitStreamFilterContext(f"h264_metadata=display_orientation=insert:{how}", source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                for told in tell.filter(packet):
                    told.stream = stream
                    target.mux(told)
    clip = read_frames(str(upright), range)[0]
    ways = {  # FFmpeg's versions differ in which way this filter counts
        "rotate=90": [clip.rot90(1, (2, 3)), clip.rot90(3, (2, 3))],
        "rotate=180": [clip.rot90(2, (2, 3))],
        "flip=horizontal": [clip.flip(3)],
    }
    turned = read_frames(str(tmp_path / name), range)[0]
    assert any(turned.equal(way) for way in ways[how])
    for wanted in ([59], [50, 13]):  # by seeking
        assert read_frames(str(tmp_path / name), lambda _, wanted=wanted: wanted)[0].equal(turned[wanted])  # type: ignore[misc]
    assert "turned or mirrored" in decoder_doubt(str(tmp_path / name), "decord")


# Broken files


@pytest.mark.parametrize("name", ["h264_b_frames.mp4", "hevc.mp4", "mpeg4_b_frames.mp4", "h264.mkv", "vp9.webm"])
def test_damaged_files_end_as_if_read_from_the_start(folder: Path, tmp_path: Path, name: str) -> None:
    rng = random.Random(0)
    whole = (folder / name).read_bytes()
    n_equal = 0
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(data)
        clip = evaluated(tmp_path / name)
        with no_seeking():
            expected = evaluated(tmp_path / name)
        assert (clip is None) == (expected is None)
        n_equal += clip is None or expected is None or clip.equal(expected)
    assert n_equal > 30  # some lose a frame that seeking passes over


@pytest.mark.parametrize("name", ["h264_fragmented.mp4", "h264_b_frames.mkv", "vp9.webm"])
def test_truncated_files_are_shorter_ones(folder: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes((folder / name).read_bytes())
    truncate(path)
    n_frames = table(path).n_frames
    assert 80 < n_frames < 130
    for wanted in ([n_frames - 30], segment_indices(n_frames - 3, 8)):
        clip = read(path, wanted)
        assert numbers(clip) == wanted
        assert clip.equal(read_sequentially(path, wanted))


def test_a_frame_that_is_lost_keeps_its_number_where_it_is_not_decoded(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.webm"
    path.write_bytes((folder / "vp9.webm").read_bytes())
    lose_packet(path, 20)
    assert numbers(read(path, [130])) == [130]
    assert numbers(read_sequentially(path, [130])) == [131]


# What packets tell


def unit(kind: int) -> bytes:
    return bytes([0, 0, 0, 3, kind, 1, 2])


def test_a_start_brings_the_parameters_that_changed() -> None:
    is_start = seeking.nal_rule(bytes([1, 0, 0, 0, 0xFF]), 4, lambda byte: byte & 31, {1, 5}, {5}, {7, 8})
    assert is_start is not None
    own = unit(7) + unit(8)
    assert is_start(own + unit(5)) is True
    assert is_start(unit(1)) is False
    assert is_start(unit(6) + unit(5)) is True
    assert is_start(unit(5) + unit(1)) is False
    assert is_start(unit(8) + unit(1)) is False
    assert is_start(unit(5)) is False
    assert is_start(unit(8) + unit(5)) is False
    assert is_start(own + unit(5)) is True
    for doubtful in (unit(5)[:-1], unit(5) + b"x", unit(6), b"\0\0\1\x65"):
        assert is_start(doubtful) is None
    assert seeking.nal_rule(b"\0\0\0\1\x67", 4, lambda byte: byte & 31, {1, 5}, {5}, {7, 8}) is None


@pytest.mark.parametrize(
    ("rule", "data", "is_start"),
    [
        ("mpeg4", b"\0\0\1\xb3abc\0\0\1\xb6\x10" + bytes(20), True),
        ("mpeg4", b"\0\0\1\xb6\x50" + bytes(20), False),
        ("mpeg4", b"\0\0\1\xb6\x50", None),  # may repeat the frame before
        ("mpeg4", b"\0\0\1\xb6\x10" + bytes(20) + b"\0\0\1\xb6\x90", None),
        ("mpeg4", bytes(40), None),
        ("vp8", b"\x10", True),
        ("vp8", b"\x11", False),
        ("vp8", b"\x01", None),  # hidden
        ("vp9", b"\x82\x01", True),
        ("vp9", b"\x86\x01", False),
        ("vp9", b"\x88", False),  # shows one that was hidden
        ("vp9", b"\x84\x01", None),  # hidden
        ("vp9", b"\xb0\x01", None),  # profile 3
        ("vp9", b"\x84\x01\x86\x01\xc1\x02\x02\xc1", False),
        ("vp9", b"\x80\x01\x86\x01\xc1\x02\x02\xc1", True),
        ("vp9", b"\x86\x01\x86\x01\xc1\x02\x02\xc1", None),
        ("vp9", b"\x86\xc1\x20\x02\xc1", None),
    ],
)
def test_single_packets(rule: str, data: bytes, is_start: bool | None) -> None:
    assert getattr(seeking, f"is_{rule}_start")(data) is is_start
