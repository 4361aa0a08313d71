import contextlib
import csv
import io
import os
import random
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
import torch

from clip_m2df import motion_shapes
from clip_m2df.cli import main
from clip_m2df.commands import check
from clip_m2df.commands.check import COLUMNS, Finding, check_videos, examine, find_groups, looks_of, read_findings
from clip_m2df.datasets.manifest import Manifest, Video
from clip_m2df.errors import UserError
from clip_m2df.files import locked
from clip_m2df.motion_shapes import Knobs
from clip_m2df.video import reader as video
from clip_m2df.video.isolation import Unreadable
from clip_m2df.video.reader import VideoError, read_frames
from clip_m2df.video.transforms import segment_indices
from tests.classifier.conftest import read_csv
from tests.clips import Damaged, damage, lose_packet, render, rotate, save_image, save_images

SMALL = (48, 32)
UNEVEN = [2 * k + 10 * (k > 8) for k in range(16)]


def save_manifest(folder: Path, *rows: str) -> Path:
    path = folder / "manifest.csv"
    path.write_text("\n".join(["path,label,split,text,source", *rows, ""]), encoding="utf-8")
    return path


def read_table(path: Path) -> dict[str, dict[str, str]]:
    return {row["path"]: row for row in read_csv(path)}


def run(manifest: Path, **options: Any) -> int:
    return check_videos(**{"manifest": manifest, "workers": 1, **options})


class Workers:
    """Stands in for ``isolated_map``: works in this process, and remembers the names of what it worked on."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.fails_at: Callable[[str], None] = lambda name: None

    def __call__(
        self, function: Callable[[Any], Finding], tasks: Iterable[Any], **_: object
    ) -> Iterator[tuple[Any, Finding | Unreadable]]:
        for task in tasks:
            name = os.path.basename(task[0])
            self.fails_at(name)
            self.done.append(name)
            yield task, Unreadable("the decoder crashed (SIGSEGV)") if name == "crash.mp4" else function(task)

    def forget(self) -> list[str]:
        done, self.done = self.done, []
        return done


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    workers = Workers()
    monkeypatch.setattr(check, "isolated_map", workers)
    return workers


# Files that are damaged in every way


def decodable(path: Path) -> int:
    """The frames of a file that decode, counted in the plainest way."""
    count = 0
    # What there is until the file cannot be read on; IndexError: it has no video.
    with contextlib.suppress(av.FFmpegError, IndexError), av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        with contextlib.suppress(av.FFmpegError):
            for packet in container.demux(stream):
                with contextlib.suppress(av.FFmpegError):
                    count += len(packet.decode())
        with contextlib.suppress(av.FFmpegError):
            count += len(stream.decode(None))
    return count


class Checked(NamedTuple):
    """300 files, the table that the command makes of them, and what it prints."""

    files: list[Damaged]
    table: dict[str, dict[str, str]]
    printed: str


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    folder = tmp_path_factory.mktemp("damaged")
    files = damage(folder)
    manifest = save_manifest(folder, *(f"{file.path.name},{file.how},train,," for file in files))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["check", "--manifest", str(manifest), "--workers", "2", "--fix", str(folder / "fixed.csv")])
    assert status == 1
    return Checked(files, read_table(folder / "manifest.check.csv"), printed.getvalue())


def test_300_damaged_files_get_the_right_status(damaged: Checked) -> None:
    files, table, _ = damaged
    assert len(files) == 300
    assert list(table) == [file.path.name for file in files]
    wrong = []
    seen: Counter[tuple[str, str]] = Counter()
    for file in files:
        row = table[file.path.name]
        n_frames = decodable(file.path)
        reasons = {reason for reason in row["reason"].split("; ") if not reason.startswith("the same frames as")}
        right = (row["status"] == "unusable") == (n_frames == 0)
        if n_frames and file.how in ("whole", "renamed"):
            right = right and not reasons - {""}
        elif n_frames and file.how == "truncated":
            early = f"ends early: {n_frames} of {file.n_frames} frames"
            lost = file.n_frames - n_frames
            right = right and (lost == 1 or (early in reasons) == (lost > 1))
        elif n_frames and file.how == "foreign":  # an image is a video of one frame
            right = row["status"] == "warning" and "shorter than 8 frames: it has 1" in reasons
        if not right:
            wrong.append((file, n_frames, row))
        seen[file.how, "unusable" if row["status"] == "unusable" else "usable"] += 1
    assert not wrong
    assert seen.pop(("whole", "usable")) == 4
    assert seen.pop(("renamed", "usable")) == 12
    assert seen.pop(("empty", "unusable")) == 4
    assert {(how, kind) for how in ("truncated", "flipped", "foreign") for kind in ("usable", "unusable")} == set(seen)
    assert min(seen.values()) >= 10


def test_the_status_is_that_of_a_run(damaged: Checked) -> None:
    files, table, _ = damaged
    for file in files:
        row = table[file.path.name]
        if row["status"] == "unusable":
            with pytest.raises(VideoError) as caught:
                read_frames(str(file.path), lambda n_frames: segment_indices(n_frames, 8))
            assert caught.value.reason == row["reason"]
        else:
            clip, _ = read_frames(str(file.path), lambda n_frames: segment_indices(n_frames, 8))
            assert clip.shape == (8, 3, int(row["height"]), int(row["width"]))


def test_files_with_the_same_frames_are_told_in_the_order_of_the_manifest(damaged: Checked) -> None:
    files, table, _ = damaged
    for file in files:
        reason = table[file.path.name]["reason"]
        if file.how == "renamed":
            first = "h264.mp4" if "h264" in file.path.name else file.path.name.split("_")[0]
            assert reason.startswith(f"the same frames as {first}")
    assert table["h264_faststart.mp4"]["reason"] == "the same frames as h264.mp4"
    assert (table["h264.mp4"]["status"], table["h264.mp4"]["reason"]) == ("ok", "")


def test_the_summary_and_the_manifest_without_the_unusable(damaged: Checked) -> None:
    files, table, printed = damaged
    folder = files[0].path.parent
    unusable = [name for name, row in table.items() if row["status"] == "unusable"]
    counts = [str(sum(row["status"] == status for row in table.values())) for status in ("ok", "warning", "unusable")]
    (line,) = [line for line in printed.splitlines() if "train" in line]
    assert [cell for cell in line.split() if cell.isdigit()] == counts
    assert f"  {unusable[19]}: " in printed
    assert f"  {unusable[20]}: " not in printed
    assert f"and {len(unusable) - 20} more\n" in printed
    assert f"leaves out {len(unusable)} of 300 videos" in printed
    assert "classes that are then short of videos for 5-way 5-shot episodes: 'empty' has 0 of 10" in printed
    kept = [os.path.basename(video.path) for video in Manifest.read(folder / "fixed.csv").videos]
    assert kept == [name for name in table if name not in unusable]
    assert not list(folder.glob("*.part"))


# What is told of a video


@pytest.mark.parametrize(
    ("facts", "warnings"),
    [
        ({"frames": 8, "promised": 8}, []),
        ({"frames": 7, "promised": 7}, ["shorter than 8 frames: it has 7"]),
        ({"frames": 60, "promised": 120}, ["ends early: 60 of 120 frames"]),
        ({"frames": 60, "promised": 120, "variable_rate": 1}, ["ends early: 60 of 120 frames"]),
        ({"frames": 39, "promised": 40}, []),
        ({"frames": 38, "promised": 40}, ["ends early: 38 of 40 frames"]),
        ({"frames": 294, "promised": 300}, []),
        ({"frames": 293, "promised": 300}, ["ends early: 293 of 300 frames"]),
        ({"frames": 40, "promised": 40, "variable_rate": 1, "rotation": 90}, ["variable frame rate", "rotated by 90°"]),
        ({"frames": 40}, []),
        ({"frames": 40, "rotation": 90, "notes": "mirrored; x"}, ["rotated by 90°", "mirrored; x"]),
    ],
)
def test_warnings(facts: dict[str, Any], warnings: list[str]) -> None:
    assert Finding(sampled=8, **facts).warnings() == warnings


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("clip.mp4", {"options": {"g": "50", "bf": "0"}}),
        ("clip.mkv", {"options": {"g": "5"}}),
        ("clip.avi", {"codec": "mpeg4", "options": {"g": "5"}}),
        ("clip.webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "g": "5"}}),
    ],
)
@pytest.mark.parametrize("lost", [[20], [30, 31], [49]])
def test_frames_are_counted_by_decoding(tmp_path: Path, name: str, how: dict[str, Any], lost: list[int]) -> None:
    path = render(tmp_path / name, 50, size=SMALL, **how)
    for number in lost:
        lose_packet(path, number)
    n_frames = decodable(path)
    finding = examine((str(path), 8, "1:2"))
    assert (finding.failure, finding.frames, finding.promised) == ("", n_frames, 50)
    asked: list[int] = []
    read_frames(str(path), lambda n: asked.append(n) or segment_indices(n, 8))  # type: ignore[func-returns-value]
    expected = []
    if n_frames < 49:
        expected = [f"ends early: {n_frames} of 50 frames"]
    elif n_frames < asked[-1]:
        expected = ["49 of 50 announced frames decode: an evaluation's are at most 1 off"]
    assert finding.warnings() == expected


def test_a_packet_without_a_picture_is_no_frame(tmp_path: Path) -> None:
    whole, path = render(tmp_path / "whole.avi", 30, "mpeg4", options={"bf": "2"}, size=SMALL), tmp_path / "hmdb.avi"
    with av.open(str(whole)) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate([*source.demux(video=0)][:-1]):
            packet.stream, packet.pts, packet.dts = stream, number, number
            container.mux(packet)
        # As encoders end a video of packed B-frames: a picture that is not coded.
        last = av.Packet(bytes([0, 0, 1, 0xB6, 0x51, 0x9F, 0xFF]))
        last.stream, last.pts, last.dts = stream, 30, 30
        container.mux(last)
    finding = examine((str(path), 8, "1:2"))
    assert (finding.frames, finding.promised) == (decodable(path), 31) == (30, 31)
    assert finding.warnings() == ["30 of 31 announced frames decode: an evaluation's are at most 1 off"]


def test_a_file_of_which_one_frame_is_shown(tmp_path: Path) -> None:
    path = render(tmp_path / "clip.mov", 12, size=SMALL)
    data = bytearray(path.read_bytes())
    struct.pack_into(">I", data, data.index(b"mdhd") + 16, 0)  # the time scale
    path.write_bytes(data)
    assert read_frames(str(path), range)[1] == decodable(path) == 1  # as FFmpeg has it
    finding = examine((str(path), 8, "1:2"))
    assert finding.frames == 1
    assert "shows 1 of the 12 frames that it stores: its edit list may be damaged" in finding.warnings()


def test_every_image_of_a_folder_is_decoded(tmp_path: Path) -> None:
    save_images(tmp_path, 50, size=SMALL)
    assert examine((str(tmp_path), 8, "1:2")).warnings() == []
    (tmp_path / "1.png").write_bytes(b"no image")  # none of those that an evaluation takes
    (tmp_path / "10.png").write_bytes(b"")
    finding = examine((str(tmp_path), 8, "1:2"))
    assert (finding.failure, finding.frames) == ("", 48)
    (warning,) = finding.warnings()
    assert warning.startswith("2 of 50 images can't be had, the first being 1.png: it is not a video that FFmpeg knows")


def test_images_that_are_no_frames_are_named(tmp_path: Path) -> None:
    save_images(tmp_path, 9, size=SMALL)
    for number in range(3):
        save_image(tmp_path / f"{number}_mask.png", number, size=SMALL)
    finding = examine((str(tmp_path), 8, "1:2"))
    assert finding.frames == 9
    assert finding.warnings() == ["3 images beside its frames are left out, such as 0_mask.png"]


def test_what_is_shown_in_another_way_than_it_is_stored(tmp_path: Path) -> None:
    rotate(render(tmp_path / "mirrored.mp4", 9, size=SMALL), (-1, 0, 0, 1))
    rotate(render(tmp_path / "askew.mp4", 9, size=SMALL), (0.8, 0.6, -0.6, 0.8))
    render(tmp_path / "wide.mp4", 9, options={"x264-params": "sar=4/3"}, size=SMALL)
    found = {name: examine((str(tmp_path / f"{name}.mp4"), 8, "1:2")) for name in ("mirrored", "askew", "wide")}
    assert {name: finding.warnings() for name, finding in found.items()} == {
        "mirrored": ["mirrored"],
        "askew": ["rotated by 37°", "its rotation is not a multiple of 90°, and is not applied"],
        "wide": ["its pixels are 1.333 times as wide as high, and are read as squares"],
    }


def test_videos_of_which_a_decoder_gives_other_frames(tmp_path: Path, workers: Workers) -> None:
    b_frames: dict[str, Any] = {"options": {"bf": "2", "g": "5", "sc_threshold": "0"}}
    render(tmp_path / "sound.mp4", 20, size=SMALL, **b_frames)
    render(tmp_path / "b_frames.avi", 20, "mpeg4", size=SMALL, **b_frames)
    manifest = save_manifest(tmp_path, "sound.mp4,run,train,,", "b_frames.avi,run,train,,")
    assert run(manifest) == 0
    assert run(manifest, decoder="decord") == 1
    assert workers.forget() == ["sound.mp4", "b_frames.avi"] * 2
    rows = read_table(manifest.with_suffix(".check.csv"))
    assert [row["status"] for row in rows.values()] == ["ok", "unusable"]
    assert rows["b_frames.avi"]["reason"] == (
        "decord may give other frames (its frames are not shown in the order in which they are stored)"
    )
    # The next check is by auto again; only what decord read as well is known.
    assert run(manifest) == 0
    assert workers.forget() == ["b_frames.avi"]


def test_what_is_noted_of_a_video_is_kept(tmp_path: Path, workers: Workers) -> None:
    names = ["mirrored.mp4", "the same; as.mp4", "wide.mp4"]
    rotate(render(tmp_path / names[0], 5, size=SMALL), (0, 1, 1, 0))
    (tmp_path / names[1]).write_bytes((tmp_path / names[0]).read_bytes())
    render(tmp_path / names[2], 9, options={"x264-params": "sar=2/1"}, size=SMALL)
    (tmp_path / "again.mp4").write_bytes((tmp_path / names[1]).read_bytes())
    manifest = save_manifest(tmp_path, *(f"{name},run,train,," for name in [*names, "again.mp4"]))
    run(manifest)
    table = manifest.with_suffix(".check.csv")
    whole = table.read_text()
    assert read_table(table)["again.mp4"]["reason"] == (
        "shorter than 8 frames: it has 5; rotated by 270°; mirrored; the same frames as mirrored.mp4"
    )
    workers.forget()
    for _ in range(2):
        run(manifest)
        assert workers.forget() == []
        assert table.read_text() == whole


def test_every_kind_of_video(tmp_path: Path, workers: Workers, capsys: pytest.CaptureFixture[str]) -> None:
    render(tmp_path / "good.mp4", 20, size=SMALL)
    render(tmp_path / "again [x].mkv", 20, options={"qp": "20"}, size=SMALL)
    (tmp_path / "twin.mp4").write_bytes((tmp_path / "good.mp4").read_bytes())
    render(tmp_path / "short.avi", 5, "mpeg4", size=SMALL)
    rotate(render(tmp_path / "turned.mp4", 16, size=SMALL), (0, 1, -1, 0))
    render(tmp_path / "uneven.mp4", 16, times=UNEVEN, size=SMALL)
    (tmp_path / "crash.mp4").write_bytes(b"as if")
    (tmp_path / "images").mkdir()
    for number in range(8):
        save_image(tmp_path / "images" / f"{number}.png", number)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/1.png").write_bytes(b"no image")
    expected = {
        "good.mp4": ("ok", ""),
        "again [x].mkv": ("ok", ""),
        "twin.mp4": ("warning", "the same frames as good.mp4, of the class 'g, x' in val"),
        "short.avi": ("warning", "shorter than 8 frames: it has 5"),
        "turned.mp4": ("warning", "rotated by 90°"),
        "uneven.mp4": ("warning", "variable frame rate"),
        "crash.mp4": ("unusable", "the decoder crashed (SIGSEGV)"),
        "images": ("ok", ""),
        "broken": ("unusable", "1.png: it is not a video that FFmpeg knows (Invalid data found when processing input)"),
        "none.webm": ("unusable", "there is no such file"),
    }
    rows = (f'{name},"{name[0]}, x",{"test" if k > 6 else "val"},,' for k, name in enumerate(expected))
    assert run(save_manifest(tmp_path, *rows)) == 1
    table = read_table(tmp_path / "manifest.check.csv")
    assert [(name, (row["status"], row["reason"])) for name, row in table.items()] == list(expected.items())
    columns = ("label", "split", "frames", "promised", "width", "height", "fps", "rotation", "variable_rate", "sampled")
    assert [table["turned.mp4"][c] for c in columns] == ["t, x", "val", "16", "16", "32", "48", "12.0", "90", "0", "8"]
    assert [table["images"][c] for c in columns] == ["i, x", "test", "8", "", "96", "64", "", "", "", "8"]
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if "│ val" in line)
    assert [cell for cell in line.split() if cell.isdigit()] == ["2", "4", "1"]
    assert "unusable:\n  crash.mp4: the decoder crashed (SIGSEGV)\n  broken: 1.png: " in printed
    assert " more\n" not in printed
    assert f"the table of all videos is {tmp_path / 'manifest.check.csv'}" in printed


def test_whatever_a_file_does_to_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room for 65535 x 65535")

    monkeypatch.setattr(video, "examine_video", fail)
    finding = examine((str(tmp_path / "a.mp4"), 8, "1:2"))
    assert finding.failure == "reading it fails: MemoryError: no room for 65535 x 65535"


def test_a_worker_needs_no_torch(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", 9, size=SMALL)
    code = (
        "import sys; from clip_m2df.commands.check import examine\n"
        "finding = examine((sys.argv[1], 8, '1:2')); print(finding.frames, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["9", "False"]


@pytest.mark.parametrize("damaged", [False, True])
def test_decoding_once_finds_what_reading_and_probing_do(tmp_path: Path, damaged: bool) -> None:
    for number, group in enumerate((4, 12, 60)):  # of few groups of pictures, frames are had without seeking
        path = render(tmp_path / f"{number}.mp4", 40, size=SMALL, options={"bf": "2", "g": str(group)})
        if damaged:
            lose_packet(path, 20)
        for frames in (1, 8, 60):

            def choose(n: int, frames: int = frames) -> list[int]:
                return segment_indices(n, frames)

            pictures, n_frames, facts = video.examine_video(str(path), choose)
            clip, right = read_frames(str(path), choose)
            assert np.array_equal(pictures, clip.permute(0, 2, 3, 1).numpy())
            assert (n_frames, facts) == (right, video.probe(str(path)))


# What videos were cut from


@pytest.mark.parametrize("size", [(64, 64), (40, 64), (240, 340), (17, 17), (16, 18), (5, 9), (33, 256)])
def test_looks_compare_the_places_of_an_antialiased_picture(size: tuple[int, int]) -> None:
    """As torch scales it; places that are nearly equal there may go either way."""
    height, width = size
    clip = np.random.default_rng(0).integers(0, 256, (8, 3, height, width), dtype=np.uint8)
    grey = torch.from_numpy(clip).float().mean(1, keepdim=True)
    small = torch.nn.functional.interpolate(grey, (17, 17), mode="bilinear", antialias=True).squeeze(1).numpy()
    here, right, below = small[:, :-1, :-1], small[:, :-1, 1:], small[:, 1:, :-1]
    apart = np.stack([right - here, below - here], axis=1).reshape(len(small), -1)
    looks = np.unpackbits(looks_of(clip), axis=1)
    clear = abs(apart) > 1e-3
    assert clear.mean() > 0.5
    assert np.array_equal(looks[clear], (apart > 0)[clear])
    assert not np.unpackbits(looks_of(np.full((2, 3, height, width), 77, np.uint8))).any()


def test_cuts_of_one_recording_are_found_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of motion_shapes, whose manifest says what each video was cut from."""
    twins = motion_shapes.render(
        tmp_path / "v", family="order", knobs=Knobs(twins=1), videos_per_class={"test": 1}, workers=1, progress=False
    )
    told = {os.path.relpath(v.path, twins.parent): v.group for v in Manifest.read(twins).videos}
    lines = twins.read_text().splitlines()
    manifest = twins.with_name("m.csv")
    manifest.write_text("\n".join(line.rpartition(",")[0] for line in lines))  # without the groups
    fix = twins.with_name("fixed.csv")
    assert run(manifest, fix=fix) == 0
    found = {os.path.relpath(v.path, twins.parent): v.group for v in Manifest.read(fix).videos}
    assert {path: row["group"] for path, row in read_table(manifest.with_suffix(".check.csv")).items()} == found
    assert sum(map(bool, found.values())) >= 0.9 * len(told) == 0.9 * 60
    for path, group in found.items():
        assert not group or told[group] == told[path]  # a group is named by its first video
    said = " ".join(capsys.readouterr().out.split())
    assert f"{sum(map(bool, found.values()))} videos without a group look as if" in said
    assert run(twins) == 0  # whose groups are known
    assert "without a group" not in capsys.readouterr().out


def test_groups_that_are_known_are_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    looks = [rng.integers(0, 256, (8, 64), dtype=np.uint8) for _ in range(3)]
    titles = rng.integers(0, 256, (2, 64), dtype=np.uint8)
    for look in looks:
        look[:2] = titles  # two frames that all have
    near = looks[0].copy()
    near[:, 0] ^= 255
    cases = {"a": ("g", looks[0]), "b": ("", near), "c": ("", looks[1]), "d": ("", looks[1][::-1]), "e": ("", looks[2])}
    videos = [Video(f"/v/{name}", "c", "test", "c", {"group": group}) for name, (group, _) in cases.items()]
    hexes = {f"/v/{name}": " ".join(one.tobytes().hex() for one in look) for name, (_, look) in cases.items()}
    assert find_groups(videos, hexes, "/v") == {"/v/b": "g", "/v/c": "c", "/v/d": "c"}
    assert find_groups(videos, hexes | {"/v/b": ""}, "/v") == {"/v/c": "c", "/v/d": "c"}
    others = [
        Video(v.path, "c" if n % 2 else "d", "val" if n % 2 else "test", "", v.extra) for n, v in enumerate(videos)
    ]
    assert find_groups(others, hexes, "/v") == {}


# Going on


@pytest.fixture
def six(tmp_path: Path) -> Path:
    """A manifest of six videos, the last two of which have the same frames."""
    names = [f"{k}.mp4" for k in range(6)]
    for k, name in enumerate(names):
        render(tmp_path / name, 9 + min(k, 4), size=SMALL)
    return save_manifest(tmp_path, *(f"{name},run,train,," for name in names))


def test_a_check_that_was_killed_goes_on_where_it_was(six: Path, workers: Workers) -> None:
    assert run(six) == 0
    table = six.with_suffix(".check.csv")
    whole = table.read_bytes()
    assert read_table(table)["5.mp4"]["reason"] == "the same frames as 4.mp4"
    table.unlink()
    assert workers.forget() == [f"{k}.mp4" for k in range(6)]

    part = Path(f"{table}.part")

    def interrupt(name: str) -> None:
        if name == "3.mp4":
            assert list(read_table(part)) == ["0.mp4", "1.mp4", "2.mp4"]  # even if it were killed now
            raise KeyboardInterrupt

    workers.fails_at = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(six)
    assert workers.forget() == ["0.mp4", "1.mp4", "2.mp4"]
    assert not table.exists()
    assert list(read_table(part)) == ["0.mp4", "1.mp4", "2.mp4"]

    part.write_bytes(part.read_bytes()[:-9])  # killed while it wrote
    workers.fails_at = lambda name: None
    assert run(six) == 0
    assert workers.forget() == ["2.mp4", "3.mp4", "4.mp4", "5.mp4"]
    assert table.read_bytes() == whole
    assert not part.exists()


def test_only_what_has_changed_is_checked_again(six: Path, workers: Workers) -> None:
    run(six)
    table = six.with_suffix(".check.csv")
    whole = table.read_bytes()
    workers.forget()
    run(six)
    assert workers.forget() == []
    assert table.read_bytes() == whole

    six.with_name("4.mp4").write_bytes(b"no video any more")
    assert run(six) == 1
    assert workers.forget() == ["4.mp4"]
    rows = read_table(table)
    assert [row["status"] for row in rows.values()] == ["ok", "ok", "ok", "ok", "unusable", "ok"]

    run(six, frames=9)
    assert workers.forget() == [f"{k}.mp4" for k in range(6)]
    assert {row["sampled"] for row in read_table(table).values()} == {"9"}


def test_videos_that_were_lost_are_tried_again(tmp_path: Path, workers: Workers) -> None:
    render(tmp_path / "crash.mp4", 9, size=SMALL)
    manifest = save_manifest(tmp_path, "crash.mp4,run,train,,", "none.mp4,run,train,,")
    for _ in range(2):
        assert run(manifest) == 1
        assert workers.forget() == ["crash.mp4", "none.mp4"]


@pytest.mark.parametrize(
    "content",
    [b"", b"path,label\na,b\n", bytes(range(256)), b"a\0b", b'"' + b"x" * 200_000, ",".join(COLUMNS).encode()],
)
def test_a_table_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    assert read_findings(tmp_path / "table.csv") == {}


def test_rows_that_are_damaged_are_left_out(six: Path, workers: Workers) -> None:
    run(six)
    table = six.with_suffix(".check.csv")
    whole = table.read_bytes()
    right = read_findings(table)
    assert len(right) == 6
    rng = random.Random(0)
    for _ in range(200):
        data = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.5 else whole)
        for _ in range(rng.randint(0, 3)):
            data[rng.randrange(max(1, len(data))) : rng.randrange(len(data) + 1)] = rng.randbytes(rng.randint(0, 2))
        table.write_bytes(data)
        assert len(read_findings(table)) <= 6
    for cut in range(0, len(whole), 7):
        table.write_bytes(whole[:cut])
        findings = read_findings(table)
        # A fingerprint that is cut short is not the file's.
        wrong = [name for name in findings if findings[name] != right.get(name)]
        assert all(findings[name].fingerprint != right[name].fingerprint for name in wrong)


@pytest.mark.parametrize(
    "cells",
    [
        {"frames": "-3"},
        {"frames": "0"},
        {"frames": "9" * 400},
        {"frames": "nine"},
        {"frames": "\uff19"},
        {"frames": "1_0"},
        {"fps": "nan"},
        {"fps": "inf"},
        {"fps": "-1.0"},
        {"width": "1.5"},
        {"variable_rate": "2"},
        {"rotation": "=1+1"},
        {"sampled": "0"},
        {"status": "fine"},
        {"digest": "x" * 64},
        {"reason": "x" * 200_000},
        {"fingerprint": ""},
        {"label": '"'},
    ],
)
@pytest.mark.parametrize("name", ["manifest.check.csv", "manifest.check.csv.part"])
def test_rows_that_no_check_wrote_are_not_taken_over(
    six: Path, workers: Workers, cells: dict[str, str], name: str
) -> None:
    run(six)
    table = six.with_suffix(".check.csv")
    whole = table.read_bytes()
    rows = read_csv(table)
    rows[2] |= cells
    table.unlink()
    with open(six.with_name(name), "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    workers.forget()
    run(six)
    # What comes after a cell that is too long is lost.
    done = [] if "label" in cells else [f"{k}.mp4" for k in range(2, 6 if "reason" in cells else 3)]
    assert workers.forget() == done
    assert table.read_bytes() == whole
    assert not Path(f"{table}.part").exists()


@pytest.mark.parametrize(
    "content", [b"null\n5\n[]\n", b"[" * 200_000, b'"' + b"x" * 200_000, b"\0\xff\n", b"a,b\n1,2\n"]
)
def test_a_part_that_is_none(six: Path, workers: Workers, content: bytes) -> None:
    part = six.with_name("manifest.check.csv.part")
    part.write_bytes(content)
    assert run(six) == 0
    assert workers.forget() == [f"{k}.mp4" for k in range(6)]
    assert not part.exists()


# Others who write


def test_one_check_writes_a_table(six: Path, workers: Workers) -> None:
    table = six.with_suffix(".check.csv")
    with (
        locked(Path(f"{table}.part"), "table", table),
        pytest.raises(UserError, match=r"another process writes the table .*check\.csv: wait for its end, or name an"),
    ):
        run(six)
    assert workers.done == []
    assert not table.exists()
    assert run(six, output=six.with_name("other.csv")) == 0
    assert run(six) == 0


def test_links_are_not_followed(six: Path, workers: Workers) -> None:
    precious = six.with_name("precious.txt")
    precious.write_text("precious")
    table = six.with_suffix(".check.csv")
    part = Path(f"{table}.part")
    part.symlink_to(precious)
    with pytest.raises(UserError, match=r"cannot write the table .*part is a link or not a regular file; delete it"):
        run(six)
    part.unlink()
    fix = six.with_name("fixed.csv")
    for link in (table, fix):
        link.symlink_to(precious)
    assert run(six, fix=fix) == 0
    assert precious.read_text() == "precious"
    assert not table.is_symlink()
    assert not fix.is_symlink()


def test_one_file_under_two_names(six: Path, workers: Workers, capsys: pytest.CaptureFixture[str]) -> None:
    (six.parent / "link.mp4").symlink_to("1.mp4")
    os.link(six.parent / "2.mp4", six.parent / "hard.mp4")
    fix = six.with_name("fixed.csv")
    manifest = save_manifest(
        six.parent, *(f"{k}.mp4,run,train,," for k in range(6)), "link.mp4,hug,test,,", "hard.mp4,run,train,,"
    )
    assert run(manifest, fix=fix) == 1
    rows = read_table(manifest.with_suffix(".check.csv"))
    reasons = {name: (rows[name]["status"], rows[name]["reason"]) for name in ("link.mp4", "hard.mp4")}
    assert reasons == {
        "link.mp4": ("unusable", "the same file as 1.mp4, by a link"),
        "hard.mp4": ("unusable", "the same file as 2.mp4, by a link"),
    }
    assert [os.path.basename(video.path) for video in Manifest.read(fix).videos] == [f"{k}.mp4" for k in range(6)]
    assert workers.forget() == [f"{k}.mp4" for k in range(6)]
    assert run(manifest) == 1
    assert workers.forget() == []


def test_a_manifest_that_starts_elsewhere(six: Path, workers: Workers, capsys: pytest.CaptureFixture[str]) -> None:
    (six.parent / "lists").mkdir()
    moved = six.rename(six.parent / "lists" / "manifest.csv")
    fix = moved.with_name("fixed.csv")
    assert run(moved, root=six.parent, fix=fix) == 0
    table = moved.with_name("manifest.check.csv").read_bytes()
    assert run(moved) == 1
    assert f"not one video is there: paths start at {moved.parent}; name the folder where they do with --root" in (
        capsys.readouterr().out
    )
    assert moved.with_name("manifest.check.csv").read_bytes() == table  # what was found with --root is kept
    assert "0.mp4,run,train," in fix.read_text()
    assert len(Manifest.read(fix, six.parent).videos) == 6


# Options and files


def test_the_manifest_without_the_unusable_keeps_the_rest(
    tmp_path: Path, workers: Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    render(tmp_path / "a.mp4", 9, size=SMALL)
    manifest = save_manifest(
        tmp_path, "a.mp4,draw_sword,test,draw a sword,web", "b.mp4,draw_sword,test,,tv", "c.mp4,hug,val,,tv"
    )
    fix = tmp_path / "fixed" / "manifest.csv"
    assert run(manifest, fix=fix, output=tmp_path / "t.csv") == 1
    (video,) = Manifest.read(fix, tmp_path).videos
    assert video == Manifest.read(manifest, check_files=False).videos[0]
    printed = capsys.readouterr().out
    assert f"{fix} leaves out 2 of 3 videos" in printed
    assert "'draw_sword' has 1 of 6, 'hug' has 0 of 6" in printed

    (tmp_path / "a.mp4").unlink()
    fix.unlink()
    assert run(manifest, fix=fix) == 1
    assert f"{fix} is not written: not one video is usable" in capsys.readouterr().out
    assert not fix.exists()


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [("frames", 0, "at least 1"), ("workers", -1, "at least 1"), ("timeout", 0.0, "above 0")],
)
def test_options_out_of_range(option: str, value: float, remedy: str) -> None:
    with pytest.raises(UserError, match=f"{option} is {value}; it must be {remedy}"):
        run(Path("not read"), **{option: value})


def test_a_table_in_place_of_a_manifest(six: Path) -> None:
    for options in ({"output": six}, {"output": six.with_name("t.csv"), "fix": six.with_name("t.csv")}):
        with pytest.raises(UserError, match=r"would take the place of the manifest .*: give it another name"):
            run(six, **options)


def test_a_table_that_cannot_be_written(six: Path, workers: Workers) -> None:
    for output in (six / "table.csv", six.parent):
        with pytest.raises(UserError, match=r"cannot write the table .*; name a file"):
            run(six, output=output)
    assert workers.done == []
