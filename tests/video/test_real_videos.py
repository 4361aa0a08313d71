"""Videos of HMDB51, UCF101, Kinetics-400 and others, where CLIP_M2DF_REAL_VIDEOS names a folder of them."""

import os
import re
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clip_m2df.cli import main
from clip_m2df.errors import UserError
from clip_m2df.video.frame_cache import FrameCache, decode_jpegs, encode_jpeg
from clip_m2df.video.reader import VideoError, decoder_doubt, probe, read_frames, sample_pictures
from clip_m2df.video.transforms import resize_clip, segment_indices
from tests.classifier.conftest import make_model, read_csv

FOLDER = Path(os.environ.get("CLIP_M2DF_REAL_VIDEOS", Path(__file__).parents[3] / "shared" / "real_videos"))
VIDEOS = sorted(path for path in FOLDER.rglob("*") if path.suffix in (".avi", ".mkv", ".mov", ".mp4", ".webm"))

pytestmark = pytest.mark.skipif(not VIDEOS, reason="CLIP_M2DF_REAL_VIDEOS names no folder with videos")

each = pytest.mark.parametrize("path", VIDEOS, ids=lambda path: str(path.relative_to(FOLDER)))


def ffmpeg(path: Path, *options: str) -> tuple[bytes, str]:
    """What FFmpeg's own command makes of the video that it chooses of a file, each frame once, and what it says."""
    command = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    arguments = ["-hide_banner", "-nostdin", "-i", str(path), "-an", "-fps_mode", "passthrough", *options, "-"]
    done = subprocess.run([command, *arguments], capture_output=True, check=True)
    return done.stdout, done.stderr.decode(errors="replace")


@cache
def count(path: Path) -> int:
    """How many frames FFmpeg decodes, as ``ffprobe -count_frames`` tells."""
    lines = ffmpeg(path, "-f", "framecrc")[0].splitlines()
    return sum(not line.startswith(b"#") for line in lines)


def frames_of(path: Path, numbers: list[int]) -> NDArray[np.uint8]:
    """Numbered frames, sorted, as FFmpeg shows them: (frames, height, width, 3)."""
    chosen = "+".join(f"eq(n,{number})" for number in numbers)
    # As PyAV converts them: by the flags of FFmpeg's library, not of its command.
    pixels, said = ffmpeg(
        path, "-vf", f"select='{chosen}',scale=flags=bilinear,format=rgb24", "-f", "rawvideo", "-pix_fmt", "rgb24"
    )
    width, height = re.findall(r"Video: rawvideo.*? ([1-9]\d*)x(\d+)[, ]", said)[-1]
    return np.frombuffer(pixels, np.uint8).reshape(-1, int(height), int(width), 3)


@each
def test_counts_are_those_of_decoding(path: Path) -> None:
    assert probe(str(path)).frames == count(path)


@each
@pytest.mark.parametrize("frames", [8, 24])
def test_frames_are_ffmpegs(path: Path, frames: int) -> None:
    # Evaluation's, and those that training may draw.
    drawn = torch.rand(frames, generator=torch.Generator().manual_seed(frames))
    choices = [segment_indices(count(path), frames, offsets) for offsets in (None, drawn)]
    numbers = sorted({*choices[0], *choices[1]})
    shown = frames_of(path, numbers)
    for wanted in choices:
        clip = read_frames(str(path), lambda _, wanted=wanted: wanted)[0].permute(0, 2, 3, 1).numpy()  # type: ignore[misc]
        expected = shown[[numbers.index(number) for number in wanted]]
        assert clip.shape == expected.shape
        # Nearly all are equal. Versions of FFmpeg differ in how they convert 10 bits, and colours at odd sizes, and in
        # what they put in the place of a frame that is damaged.
        is_odd = clip.shape[1] % 2 or clip.shape[2] % 2
        assert np.abs(clip.astype(int) - expected).mean((1, 2, 3)).max() < (4 if is_odd else 1)


@each
def test_decord_gives_the_same_frames_or_the_file_is_refused(path: Path) -> None:
    pytest.importorskip("decord")
    wanted = segment_indices(count(path), 8)
    if decoder_doubt(str(path), "decord"):
        with pytest.raises(UserError, match=r"decord may give other frames .*--data\.decoder auto"):
            read_frames(str(path), lambda _: wanted, decoder="decord")
        return
    try:
        clip = read_frames(str(path), lambda _: wanted, decoder="decord")[0]
    except VideoError:  # of a kind that decord does not know
        assert path.name in ("av1_video.mkv", "corrupted.mp4")
        return
    difference = (clip.float() - read_frames(str(path), lambda _: wanted)[0].float()).abs().mean((1, 2, 3))
    assert difference.max() < 4  # it converts to RGB in its own way


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real") / "manifest.csv"
    rows = [f"{video},{video.parent.name},train" for video in VIDEOS]
    path.write_text("\n".join(["path,label,split", *rows, ""]))
    return path


@pytest.mark.slow
def test_all_are_checked(manifest: Path) -> None:
    assert main(["check", "--manifest", str(manifest), "--root", str(FOLDER), "--workers", "1"]) == 0
    rows = read_csv(manifest.with_suffix(".check.csv"))
    assert [int(row["frames"]) for row in rows] == [count(path) for path in VIDEOS]
    for row in rows:
        # Where more are announced than there are, it says so.
        assert (int(row["promised"]) > int(row["frames"])) == ("announced frames decode" in row["reason"])
        assert (row["status"] == "ok") == (row["reason"] == "")


@pytest.mark.slow
def test_all_are_cached(manifest: Path) -> None:
    folder = manifest.with_name("cache")
    main(["cache", "--manifest", str(manifest), "--root", str(FOLDER), "--output", str(folder), "--workers", "1"])
    kept = FrameCache.open(folder, manifest.parent)
    for path in VIDEOS:
        found = kept.read_frames(str(path), range)
        assert found is not None
        frames = read_frames(str(path), lambda n, kept=found[1]: segment_indices(n, kept))[0]  # type: ignore[misc]
        if min(frames.shape[2:]) > 256:
            frames = resize_clip(frames, 256)
        assert found[0].equal(decode_jpegs(encode_jpeg(frame, 95) for frame in frames))


@pytest.mark.slow
def test_all_are_labelled() -> None:
    from clip_m2df import FewShotClassifier

    classifier = FewShotClassifier(make_model("otam"))
    classifier.fit({"first": [str(VIDEOS[0])], "last": [str(VIDEOS[-1])]})
    labels = classifier.predict([str(path) for path in VIDEOS])
    assert set(labels) == {"first", "last"}
    assert (labels[0], labels[-1]) == ("first", "last")


@each
def test_regular_times_are_within_the_video(path: Path) -> None:
    facts = probe(str(path))
    assert facts.fps is not None
    n_sampled = sum(1 for _ in sample_pictures(str(path), facts.fps))
    assert abs(n_sampled - facts.frames) <= max(2, 0.35 * facts.frames)  # some rates vary


@each
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7])
def test_what_is_cut_off_is_shorter_or_refused_in_words(path: Path, share: float, tmp_path: Path) -> None:
    data = path.read_bytes()
    cut = tmp_path / path.name
    cut.write_bytes(data[: int(share * len(data))])
    if probed := decodes(cut):
        clip, n_frames = read_frames(str(cut), lambda n: segment_indices(n, 8))
        assert len(clip) == 8
        assert probed <= n_frames <= count(path) + 1
    else:
        with pytest.raises(VideoError, match=r"^cannot read the video .*: .+; make it readable, remove it .*"):
            read_frames(str(cut), range)


def decodes(path: Path) -> int:
    try:
        return probe(str(path)).frames
    except VideoError:
        return 0
