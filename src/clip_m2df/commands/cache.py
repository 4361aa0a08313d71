"""``clip-m2df cache``: keeps the frames of a manifest's videos, decoded and resized, as a frame cache."""

from __future__ import annotations

import json
import os
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.filesize import decimal
from rich.progress import track
from safetensors.numpy import save
from torch import Tensor

from clip_m2df.datasets.manifest import Manifest, relative_path
from clip_m2df.errors import UserError
from clip_m2df.files import fingerprint, whole_file
from clip_m2df.video.frame_cache import FORMAT, Entry, FrameCache, Settings, encode_jpeg, list_shards, read_headers
from clip_m2df.video.isolation import isolated_map
from clip_m2df.video.reader import Choose, VideoError, read_frames
from clip_m2df.video.transforms import resize_short_side, segment_indices

QUALITY = 95


SHARD_VIDEOS = 64


# For the measurement of speed.
EVALUATION_FRAMES, TIMED_VIDEOS = 8, 16


# Of unreadable videos that are named.
MOST_NAMES = 20


def cache_frames(
    *,
    manifest: Path,
    root: Path | None = None,
    output: Path,
    short_side: int,
    frames: int,
    workers: int,
    timeout: float,
) -> None:
    """Keep frames of a manifest's videos, and print what became of it.

    Videos whose frames are there and current are left alone, so that a run that was ended goes on where it was.

    Args:
        manifest: The CSV.
        root: A folder outside the manifest's own in which its videos may lie too.
        output: The cache's folder.
        short_side: Of the kept frames, in pixels; smaller videos keep their size.
        frames: How many to keep of each video, at most.
        workers: Processes.
        timeout: Seconds after which a video is given up.

    Raises:
        UserError: An option is out of range, the manifest is at fault, the folder holds a cache with other settings or
            a damaged one, or not one video can be read.
        OSError: A shard cannot be written.
    """
    for option, value in {"short_side": short_side, "frames": frames, "workers": workers}.items():
        if value < 1:
            raise UserError(f"{option} is {value}; it must be at least 1")
    if not timeout > 0:
        raise UserError(f"timeout is {timeout:g}; it must be more than 0 seconds")
    if output.exists() and not output.is_dir():
        raise UserError(f"the output {output} is no folder: name the cache's folder, which is made if need be")
    videos = [video.path for video in Manifest.read(manifest, root, check_files=False).videos]
    folder = os.path.dirname(os.path.abspath(manifest))
    settings = Settings(short_side, frames, QUALITY)
    found, entries = read_headers(output, folder)
    if found is not None and found != settings:
        raise UserError(
            f"the cache {output} has {_describe(found)}, not {_describe(settings)}: give another --output, or delete it"
        )
    output.mkdir(parents=True, exist_ok=True)
    for draft in output.glob("frames-*.part"):
        draft.unlink()
    cache = FrameCache(settings, entries)
    unread = _add([path for path in videos if not cache.has(path)], output, folder, settings, workers, timeout)
    if not list_shards(output):
        path, reason = next(iter(unread.items()))
        raise UserError(f"not one video of the manifest {manifest} could be read, for example {path}: {reason}")
    _report(videos, unread, output, folder)


def _describe(settings: Settings) -> str:
    return "short_side {}, frames {} and quality {}".format(*settings)


def _add(
    videos: Sequence[str], output: Path, root: str, settings: Settings, workers: int, timeout: float
) -> dict[str, str]:
    """Write shards with the frames of videos; return those that can't be read, with the reasons."""
    unread = {}
    waiting: list[tuple[Entry, list[bytes]]] = []
    keep = partial(_keep, short_side=settings.short_side, frames=settings.frames)
    results = isolated_map(keep, videos, workers=workers, timeout=timeout) if videos else iter(())
    for path, result in track(results, "Caching frames", total=len(videos), disable=not videos):
        if isinstance(result, str):
            unread[path] = result
            continue
        waiting.append(result)
        if len(waiting) == SHARD_VIDEOS:
            _write_shard(waiting, output, root, settings)
            waiting = []
    if waiting:
        _write_shard(waiting, output, root, settings)
    return unread


def _keep(path: str, *, short_side: int, frames: int) -> tuple[Entry, list[bytes]] | str:
    """Read, resize and compress the frames of a video; or why that can't be done."""
    torch.set_num_threads(1)  # the processes are the parallelism
    n_frames = 0

    def choose(n: int) -> list[int]:
        nonlocal n_frames
        n_frames = n
        return segment_indices(n, min(n, frames))

    try:
        # First, so that a video that changes meanwhile is known to have changed.
        key = fingerprint(path)
        clip = read_frames(path, choose)
        if min(clip.shape[-2:]) > short_side:
            clip = resize_short_side(clip, short_side)
        jpegs = [encode_jpeg(frame, QUALITY) for frame in clip]
    except VideoError as error:
        image = f"{os.path.basename(error.path)}: " if os.path.isdir(path) and error.path != path else ""
        return image + error.reason
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # whatever a file does to a decoder, the others are still to be read
        return f"reading it fails: {type(error).__name__}: {error}"
    return Entry(path, key, n_frames, *clip.shape[-2:]), jpegs


def _write_shard(videos: Sequence[tuple[Entry, Sequence[bytes]]], output: Path, root: str, settings: Settings) -> None:
    tensors = {}
    for number, (_, jpegs) in enumerate(videos):
        tensors[f"{number}"] = np.frombuffer(b"".join(jpegs), np.uint8)
        tensors[f"{number}.ends"] = np.cumsum([len(jpeg) for jpeg in jpegs], dtype=np.int64)
        tensors[f"{number}.crc32"] = np.array([zlib.crc32(jpeg) for jpeg in jpegs], np.int64)
    rows = [
        {
            "path": relative_path(entry.path, root),
            **entry.fingerprint._asdict(),
            "n_frames": entry.n_frames,
            "height": entry.height,
            "width": entry.width,
        }
        for entry, _ in videos
    ]
    metadata = {name: str(value) for name, value in settings._asdict().items()}
    shards = list_shards(output)
    number = int(shards[-1].stem.removeprefix("frames-")) + 1 if shards else 0
    with whole_file(output / f"frames-{number:05}.safetensors") as draft:
        draft.write_bytes(save(tensors, {"format": FORMAT, **metadata, "videos": json.dumps(rows)}))


def _report(videos: Sequence[str], unread: dict[str, str], output: Path, root: str) -> None:
    """Print what is in a cache, what isn't, and what it is good for."""
    if unread:
        print(f"videos that could not be read, and are not in the cache: {len(unread)}")
        for path, reason in list(unread.items())[:MOST_NAMES]:
            print(f"  {relative_path(path, root)}: {reason}")
        if len(unread) > MOST_NAMES:
            print(f"  and {len(unread) - MOST_NAMES} more")
    cache = FrameCache.open(output, root)
    kept = [path for path in videos if cache.has(path)]
    shards = list_shards(output)
    cached = sum(shard.stat().st_size for shard in shards)
    print(f"videos in the cache: {len(kept)} of the manifest's {len(videos)}; shards: {len(shards)}")
    print(f"size: {decimal(cache.video_bytes)} of videos, {decimal(cached)} of frames")
    timed = [path for path in kept if os.path.exists(path)]
    timed = timed[:: -(-len(timed) // TIMED_VIDEOS)] if timed else []
    if timed:
        from_video, from_cache, ratio = _time(cache, timed)
        print(
            f"reading {_timed_frames(cache)} frames: {1000 * from_video:.1f} ms from a video,"
            f" {1000 * from_cache:.1f} ms from the cache, {ratio:.1f} times as fast (medians of {len(timed)} videos)"
        )


def _timed_frames(cache: FrameCache) -> int:
    return min(cache.frames, EVALUATION_FRAMES)


def _time(cache: FrameCache, paths: Sequence[str]) -> tuple[float, float, float]:
    """Median seconds of reading a video's frames for evaluation from itself and from the cache, and median ratio."""

    def seconds(read: Callable[[str, Choose], Tensor | None], path: str) -> float:
        start = time.perf_counter()
        clip = read(path, lambda n_frames: segment_indices(n_frames, _timed_frames(cache)))
        if clip is not None:
            resize_short_side(clip, cache.short_side)
        return time.perf_counter() - start

    readers = (read_frames, cache.read_frames)
    for read in readers:  # the first time, codecs are loaded
        seconds(read, paths[0])
    times = [[seconds(read, path) for read in readers] for path in paths]
    from_video, from_cache = map(statistics.median, zip(*times, strict=True))
    return from_video, from_cache, statistics.median(video / cached for video, cached in times)
