import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_m2df.cli import main
from clip_m2df.commands import cache as module
from clip_m2df.commands.cache import cache_frames
from clip_m2df.errors import UserError
from clip_m2df.files import fingerprint, locked_folder
from clip_m2df.video import reader
from clip_m2df.video.frame_cache import DamagedCacheError, FrameCache, decode_jpegs, encode_jpeg
from clip_m2df.video.isolation import Unreadable
from clip_m2df.video.reader import Choose, read_frames
from clip_m2df.video.transforms import resize_and_crop, resize_clip, segment_indices
from tests.clips import numbers, render, save_images

SHORT_SIDE, FRAMES, T = 48, 24, 8
N_FRAMES = {"long.mp4": 101, "short.mp4": 9, "exact.mp4": 24, "few.mp4": 3, "vp9.webm": 61, "small.mp4": 50}
FOLDER = "images"  # of 30


def middle(n_frames: int) -> list[int]:
    """What evaluation chooses."""
    return segment_indices(n_frames, T)


def in_process(function: Callable[[str], Any], items: Iterable[str], **_: object) -> Iterator[tuple[str, Any]]:
    """``isolated_map`` without the processes."""
    return ((item, function(item)) for item in items)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(module, "isolated_map", in_process)
    yield
    torch.set_num_threads(threads)


def write_manifest(folder: Path, names: Sequence[str]) -> Path:
    rows = ["path,label,split", *(f"{name},run,train" for name in names)]
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "manifest.csv"


def make(manifest: Path, **options: Any) -> FrameCache:
    """Make or complete the cache beside a manifest, and open it."""
    settings = {"short_side": SHORT_SIDE, "frames": FRAMES, "workers": 1, "timeout": 60.0, **options}
    cache_frames(manifest=manifest, output=manifest.parent / "cache", **settings)
    return FrameCache.open(manifest.parent / "cache", manifest.parent)


def read(cache: FrameCache, path: Path, choose: Callable[[int], Sequence[int]] = range) -> Tensor:
    found = cache.read_frames(str(path), choose)
    assert found is not None
    return found[0]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of videos, one of them broken, and their cache, which was made by a worker process."""
    folder = tmp_path_factory.mktemp("videos")
    for name, n_frames in N_FRAMES.items():
        codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
        render(folder / name, n_frames, codec, size=(48, 32) if name == "small.mp4" else (96, 64))
    save_images(folder / FOLDER, 30)
    (folder / "broken.mp4").write_text("no video")
    manifest = write_manifest(folder, [*N_FRAMES, FOLDER, "broken.mp4", "missing.mp4"])
    settings = ["--short_side", str(SHORT_SIDE), "--frames", str(FRAMES), "--workers", "1"]
    assert main(["cache", "--manifest", str(manifest), "--output", str(folder / "cache"), *settings]) == 0
    return folder


@pytest.fixture
def cache(videos: Path) -> FrameCache:
    return FrameCache.open(videos / "cache", videos)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos that are quick to read, without a cache."""
    folder = tmp_path_factory.mktemp("tiny")
    for k in range(5):
        render(folder / f"{k}.mp4", 10 + k, size=(48, 32))
    write_manifest(folder, [f"{k}.mp4" for k in range(5)])
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The manifest of a copy of the tiny videos, which a test may change."""
    shutil.copytree(tiny, tmp_path / "copy")
    return tmp_path / "copy" / "manifest.csv"


# Which frames


@pytest.mark.parametrize("frames", [T, 3 * T, 5 * T])
def test_of_an_odd_multiple_evaluation_takes_the_very_frames_that_it_takes_of_the_video(frames: int) -> None:
    for n_frames in range(1, 700):
        kept = segment_indices(n_frames, min(n_frames, frames))
        assert [kept[k] for k in middle(len(kept))] == middle(n_frames)


@pytest.mark.parametrize("name", [*N_FRAMES, FOLDER])
def test_the_pictures_are_those_of_the_video(videos: Path, cache: FrameCache, name: str) -> None:
    path = videos / name
    n_frames = N_FRAMES.get(name, 30)
    kept = list(range(n_frames)) if n_frames <= FRAMES else segment_indices(n_frames, FRAMES)
    assert numbers(read(cache, path)) == kept
    assert numbers(read(cache, path, middle)) == numbers(read_frames(str(path), middle)[0]) == middle(n_frames)
    ends = [-1, 0, len(kept) // 2, 0]
    assert numbers(read(cache, path, lambda n: [k % n for k in ends])) == [kept[k] for k in ends]


def test_random_segments(videos: Path, cache: FrameCache) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(30):
        offsets = torch.rand(T, generator=generator)
        chosen = numbers(read(cache, videos / "long.mp4", partial(segment_indices, frames=T, offsets=offsets)))
        kept = segment_indices(101, FRAMES)
        assert chosen == [kept[k] for k in segment_indices(FRAMES, T, offsets)]
        # Each of them lies in the segment of the video itself.
        assert all(k * 101 / T - 1 < number < (k + 1) * 101 / T for k, number in enumerate(chosen))
        seen |= set(chosen)
    assert len(seen) == FRAMES


@pytest.mark.parametrize("wanted", [[], [-1], [FRAMES]])
def test_frames_that_are_not_there(videos: Path, cache: FrameCache, wanted: list[int]) -> None:
    with pytest.raises(ValueError, match="not frame numbers from 0 to 23"):
        cache.read_frames(str(videos / "long.mp4"), lambda _: wanted)


# Their size and their colours


def test_the_short_side_is_that_of_the_cache_and_nothing_is_enlarged(videos: Path, cache: FrameCache) -> None:
    assert (cache.short_side, cache.frames) == (SHORT_SIDE, FRAMES)
    assert read(cache, videos / "long.mp4", middle).shape == (T, 3, 48, 72)
    assert read(cache, videos / "small.mp4", middle).shape == (T, 3, 32, 48)


def test_pixels_are_close_to_those_of_the_resized_video(videos: Path, cache: FrameCache) -> None:
    for name in ("long.mp4", "vp9.webm", FOLDER):
        kept = read(cache, videos / name, middle)
        assert kept.dtype == torch.uint8
        expected = resize_clip(read_frames(str(videos / name), middle)[0], SHORT_SIDE)
        difference = kept.float() - expected.float()
        assert difference.abs().mean() < 1.5
        assert difference.mean((0, 2, 3)).abs().max() < 0.5
        # To resize them once more to the same size changes nothing.
        cropped = resize_and_crop(kept, resize=SHORT_SIDE, size=SHORT_SIDE)
        assert cropped.equal(kept[..., 12:60])


@pytest.mark.parametrize("shape", [(64, 80), (33, 47), (17, 200), (1, 1)])
def test_jpegs_keep_colours(shape: tuple[int, int]) -> None:
    height, width = shape
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    ramps = torch.stack([x + 0 * y, y + 0 * x, (1 - x) * (1 - y)])
    frame = (255 * ramps).round().byte()
    flat = [torch.tensor(rgb)[:, None, None].expand(3, height, width) for rgb in [(255, 0, 0), (0, 0, 255), (9, 9, 9)]]
    frames = torch.stack([frame, 255 - frame, *(colour.byte() for colour in flat)])
    decoded = decode_jpegs([encode_jpeg(picture, module.QUALITY) for picture in frames])
    assert decoded.shape == frames.shape
    difference = decoded.float() - frames.float()
    assert difference.abs().mean((1, 2, 3)).max() < 2
    assert difference.mean((2, 3)).abs().max() < 1.1


def test_jpegs_keep_detail() -> None:
    rng = np.random.default_rng(0)
    height, width = 128, 160
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    # 1/f in brightness, as of natural pictures, and smoother in colour.
    noise = [
        np.fft.ifft2(np.exp(2j * np.pi * rng.random((height, width))) / frequency**power).real for power in (1.2, 2, 2)
    ]
    grey, red, blue = (plane / plane.std() for plane in noise)
    picture = 128 + 45 * np.stack([0.9 * grey + 0.4 * red, grey, 0.9 * grey + 0.4 * blue])
    frame = torch.from_numpy(picture.clip(0, 255).round().astype(np.uint8))
    difference = decode_jpegs([encode_jpeg(frame, module.QUALITY)])[0].double() - frame
    assert 10 * torch.log10(255**2 / difference.square().mean()) > 40
    assert difference.mean((1, 2)).abs().max() < 0.5


def test_jpegs_that_do_not_decode() -> None:
    grey = [encode_jpeg(torch.full((3, 16, width), 99, dtype=torch.uint8), 95) for width in (16, 24)]
    for images in ([grey[0], grey[0][:9]], [b"no picture"], grey):
        with pytest.raises(ValueError, match=r"a JPEG does not decode|same shape"):
            decode_jpegs(images)


# The format


def test_a_shard_can_be_read_as_it_is_documented(videos: Path) -> None:
    shard = videos / "cache" / "frames-00000.safetensors"
    with safe_open(shard, framework="numpy") as file:
        metadata = file.metadata()
    rows = {row["path"]: (number, row) for number, row in enumerate(json.loads(metadata.pop("videos")))}
    assert metadata == {"format": "clip-m2df frames 1", "short_side": "48", "frames": "24", "quality": "95"}
    assert set(rows) == {*N_FRAMES, FOLDER}
    number, row = rows["short.mp4"]
    state = (videos / "short.mp4").stat()
    key = {"files": 1, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    assert row == {"path": "short.mp4", **key, "n_frames": 9, "height": 48, "width": 72}
    assert rows[FOLDER][1]["files"] == 30
    tensors = load_file(shard)
    ends = tensors[f"{number}.ends"].tolist()
    assert ends[-1] == len(tensors[f"{number}"])
    for k, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        with av.open(io.BytesIO(tensors[f"{number}"][start:end].tobytes()), "r") as image:
            picture = next(image.decode(video=0)).to_ndarray(format="rgb24")
        assert numbers(torch.from_numpy(picture).permute(2, 0, 1)[None]) == [k]


# What was made of which video


def test_what_is_printed(videos: Path, capsys: pytest.CaptureFixture[str], no_processes: None) -> None:
    make(videos / "manifest.csv")
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("Caching")]
    shards = list((videos / "cache").iterdir())
    size = sum(fingerprint(str(videos / name)).size for name in [*N_FRAMES, FOLDER])
    assert len(shards) == 1
    assert lines[0] == "videos that could not be read, and are not in the cache: 2"
    assert lines[1].startswith("  broken.mp4: it is not a video that FFmpeg knows")
    assert lines[2] == "  missing.mp4: there is no such file"
    assert lines[3] == "videos in the cache: 7 of the manifest's 9; shards: 1"
    assert lines[4] == f"size: {size / 1000:.1f} kB of videos, {shards[0].stat().st_size / 1000:.1f} kB of frames"
    assert lines[5].startswith("reading 8 frames: ")
    assert lines[5].endswith(" times as fast (medians of 7 videos)")
    assert len(lines) == 6


def test_a_video_that_is_not_in_the_cache(videos: Path, cache: FrameCache) -> None:
    for name in ("broken.mp4", "missing.mp4", "other.mp4"):
        assert not cache.has(str(videos / name))
        assert cache.read_frames(str(videos / name), range) is None


def test_a_decoder_that_crashes_costs_its_video(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_processes: None
) -> None:
    def crashing(function: Callable[[str], Any], items: Iterable[str], **options: Any) -> Iterator[tuple[str, Any]]:
        assert options == {"workers": 3, "timeout": 7.0}
        for path, result in in_process(function, items):
            yield path, Unreadable("the decoder crashed (SIGSEGV)") if path.endswith("2.mp4") else result

    monkeypatch.setattr(module, "isolated_map", crashing)
    cache = make(copy, workers=3, timeout=7.0)
    assert [cache.has(str(copy.parent / f"{k}.mp4")) for k in range(5)] == [True, True, False, True, True]
    assert "  2.mp4: the decoder crashed (SIGSEGV)\n" in capsys.readouterr().out


def test_whatever_a_file_does_to_a_decoder_costs_its_video(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_processes: None
) -> None:
    def failing(path: str, choose: Choose, **_: object) -> tuple[Tensor, int]:
        if path.endswith("3.mp4"):
            raise MemoryError("too large")
        return read_frames(path, choose)

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_frames", failing)
        cache = make(copy)
    assert [cache.has(str(copy.parent / f"{k}.mp4")) for k in range(5)] == [True, True, True, False, True]
    assert "  3.mp4: reading it fails: MemoryError: too large\n" in capsys.readouterr().out


def test_a_broken_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_processes: None) -> None:
    for folder in ("whole", "broken"):
        save_images(tmp_path / folder, 3, (48, 32))
    (tmp_path / "broken" / "1.png").write_bytes(b"")
    make(write_manifest(tmp_path, ["whole", "broken"]))
    assert "  broken: 1.png: it is not a video that FFmpeg knows" in capsys.readouterr().out


def test_a_changed_video_is_read_anew_and_its_old_frames_never(copy: Path, no_processes: None) -> None:
    path = copy.parent / "1.mp4"
    assert numbers(read(make(copy), path)) == list(range(11))
    render(path, 20, size=(48, 32), options={"crf": "20"})
    cache = FrameCache.open(copy.parent / "cache", copy.parent)
    assert not cache.has(str(path))
    assert cache.read_frames(str(path), range) is None
    assert cache.has(str(copy.parent / "0.mp4"))
    cache = make(copy)
    assert numbers(read(cache, path)) == list(range(20))
    assert len(list((copy.parent / "cache").iterdir())) == 2
    # The same size, and another time alone.
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert not FrameCache.open(copy.parent / "cache", copy.parent).has(str(path))


def test_a_changed_folder_of_images(tmp_path: Path, no_processes: None) -> None:
    save_images(tmp_path / "images", 4, (48, 32))
    manifest = write_manifest(tmp_path, ["images"])
    assert numbers(read(make(manifest), tmp_path / "images")) == [0, 1, 2, 3]
    (tmp_path / "images" / "3.png").unlink()
    assert not FrameCache.open(tmp_path / "cache", tmp_path).has(str(tmp_path / "images"))
    assert numbers(read(make(manifest), tmp_path / "images")) == [0, 1, 2]


def test_a_cache_travels_without_its_videos(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = FrameCache.open(copied, tmp_path)
    assert numbers(read(cache, tmp_path / "long.mp4", middle)) == middle(101)
    make(write_manifest(tmp_path, ["long.mp4", "vp9.webm"]))  # nothing to do, and no process is started
    printed = capsys.readouterr().out
    assert "videos in the cache: 2 of the manifest's 2; shards: 1" in printed
    assert "as fast" not in printed


def test_videos_elsewhere_have_absolute_paths(tiny: Path, tmp_path: Path, no_processes: None) -> None:
    cache = make(write_manifest(tmp_path, [str(tiny / "0.mp4")]), root=tiny)
    assert numbers(read(cache, tiny / "0.mp4")) == list(range(10))


# Runs that were ended, other settings, full disks


def test_a_killed_run_is_taken_up(copy: Path, monkeypatch: pytest.MonkeyPatch, no_processes: None) -> None:
    asked: list[str] = []

    def noted(function: Callable[[str], Any], items: Iterable[str], **_: object) -> Iterator[tuple[str, Any]]:
        for pair in in_process(function, items):
            if len(asked) == most:
                raise KeyboardInterrupt
            asked.append(Path(pair[0]).name)
            yield pair

    most = 3
    monkeypatch.setattr(module, "SHARD_VIDEOS", 2)
    monkeypatch.setattr(module, "isolated_map", noted)
    with pytest.raises(KeyboardInterrupt):
        make(copy)
    folder = copy.parent / "cache"
    assert [shard.name for shard in folder.iterdir()] == ["frames-00000.safetensors"]
    first = (folder / "frames-00000.safetensors").read_bytes()
    (folder / "frames-00001.safetensors.123.part").write_bytes(first[:1000])
    asked, most = [], 9
    cache = make(copy)
    assert asked == ["2.mp4", "3.mp4", "4.mp4"]
    assert sorted(shard.name for shard in folder.iterdir()) == [f"frames-0000{k}.safetensors" for k in range(3)]
    assert (folder / "frames-00000.safetensors").read_bytes() == first
    for k in range(5):
        assert numbers(read(cache, copy.parent / f"{k}.mp4")) == list(range(10 + k))
    make(copy)
    assert len(asked) == 3


def test_other_settings_are_refused(videos: Path) -> None:
    for options in ({"short_side": 32}, {"frames": 8}):
        with pytest.raises(
            UserError, match=r"short_side 48, frames 24 .*, not short_side .*: give another --output, or"
        ):
            make(videos / "manifest.csv", **options)


def test_a_full_disk(copy: Path, monkeypatch: pytest.MonkeyPatch, no_processes: None) -> None:
    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"cannot write the cache's shard .*: No space left"):
            make(copy)
    assert list((copy.parent / "cache").iterdir()) == []
    assert make(copy).has(str(copy.parent / "0.mp4"))


@pytest.mark.parametrize(
    ("option", "value"), [("short_side", 0), ("frames", 0), ("workers", 0), ("timeout", 0.0), ("timeout", float("nan"))]
)
def test_options_out_of_range(tiny: Path, option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{option} is {value}; it must be a"):
        make(tiny / "manifest.csv", **{option: value})


def test_the_output_is_a_file(tiny: Path) -> None:
    manifest = tiny / "manifest.csv"
    with pytest.raises(UserError, match=r"the output .*manifest\.csv is no folder: name the cache's folder"):
        cache_frames(manifest=manifest, output=manifest)


def test_one_process_writes_a_cache(copy: Path) -> None:
    with (
        locked_folder(copy.parent / "cache", "cache"),
        pytest.raises(UserError, match=r"another process writes the cache .*cache: wait for its end, or name another"),
    ):
        make(copy)
    before = sorted(path.name for path in (copy.parent / "cache").glob("frames-*"))
    make(copy)  # the lock is free again, and leaves nothing
    assert (copy.parent / "cache" / ".lock").exists() is False
    assert sorted(path.name for path in (copy.parent / "cache").glob("frames-*")) >= before


def test_the_lock_of_a_cache_follows_no_link(copy: Path) -> None:
    (copy.parent / "precious.txt").write_text("precious")
    (copy.parent / "new").mkdir()
    (copy.parent / "new" / ".lock").symlink_to(copy.parent / "precious.txt")
    with pytest.raises(UserError, match=r"cannot write the cache .*\.lock is a link or not a regular file; delete it"):
        cache_frames(manifest=copy, output=copy.parent / "new")
    assert (copy.parent / "precious.txt").read_text() == "precious"


def test_not_one_video(tmp_path: Path, no_processes: None) -> None:
    with pytest.raises(
        UserError, match=r"not one video of the manifest .* for example .*none\.mp4: there is no such file"
    ):
        make(write_manifest(tmp_path, ["none.mp4"]))


# Damage


@pytest.fixture
def copied(videos: Path, tmp_path: Path) -> Path:
    """The folder of a copy of the videos' cache, which a test may change."""
    return shutil.copytree(videos / "cache", tmp_path / "cache")


def test_there_is_no_cache(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"there is no frame cache in .*: name its folder, or make one with"):
            FrameCache.open(folder, tmp_path)


def test_a_shard_of_other_settings_or_another_version(copied: Path) -> None:
    first, second = (copied / f"frames-0000{k}.safetensors" for k in range(2))
    with safe_open(first, framework="numpy") as file:
        metadata = file.metadata()
    videos = metadata["videos"]
    for changed, reason in (
        ({"short_side": "47"}, "has other settings than those before it: delete the"),
        ({"format": "clip-m2df frames 2"}, "is damaged, or of another version: delete the shard"),
        ({"videos": videos.replace('"n_frames": 9', '"n_frames": 8')}, "is damaged"),
    ):
        save_file(load_file(first), second, {**metadata, **changed})
        with pytest.raises(UserError, match=rf"frames-00001\.safetensors {reason}"):
            FrameCache.open(copied, copied.parent)
    save_file(load_file(first), second, {**metadata, "videos": videos.replace('"height": 48', '"height": 47')})
    with pytest.raises(DamagedCacheError, match=r"frames of .*long\.mp4 .*frames-00001\.safetensors are damaged"):
        read(FrameCache.open(copied, copied.parent), copied.parent / "long.mp4")


def test_a_shard_that_is_gone(copied: Path) -> None:
    cache = FrameCache.open(copied, copied.parent)
    (copied / "frames-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot open the cache's shard .*: delete the shard and run"):
        cache.read_frames(str(copied.parent / "long.mp4"), range)


def test_damaged_frames_are_named(copied: Path) -> None:
    shard = copied / "frames-00000.safetensors"
    data = bytearray(shard.read_bytes())
    for k in range(len(data) // 2, len(data)):  # the header comes first
        data[k] ^= 1
    shard.write_bytes(data)
    cache = FrameCache.open(copied, copied.parent)
    refused = {}
    for path in (copied.parent / name for name in [*N_FRAMES, FOLDER]):
        try:
            read(cache, path)
        except DamagedCacheError as error:
            refused[path] = str(error)
    assert 1 <= len(refused) < len(N_FRAMES) + 1
    for path, message in refused.items():
        assert f"the frames of {path} in the cache's shard {shard} are damaged: delete the shard" in message


# In worker processes


class Middles(Dataset[Tensor]):
    def __init__(self, cache: FrameCache, paths: Sequence[str]) -> None:
        self.cache = cache
        self.paths = paths

    def __getitem__(self, k: int) -> Tensor:
        return read(self.cache, Path(self.paths[k]), middle)

    def __len__(self) -> int:
        return len(self.paths)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_worker_processes_read_the_same(videos: Path, cache: FrameCache, how: str) -> None:
    dataset = Middles(cache, [str(videos / name) for name in ("long.mp4", "vp9.webm", FOLDER)])
    here = [dataset[k] for k in range(3)]  # so that files are open when workers start
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=how)
    for expected, got in zip(here, loader, strict=True):
        assert got.equal(expected)
