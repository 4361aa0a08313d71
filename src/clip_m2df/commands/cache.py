"""``clip-m2df cache``: keeps the frames of a manifest's videos, decoded and resized, as a frame cache."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import TYPE_CHECKING

from clip_m2df.datasets.manifest import Manifest
from clip_m2df.episode import ResizeMode
from clip_m2df.errors import UserError, require, say, some_lines
from clip_m2df.files import fingerprint, locked_folder, relative_path
from clip_m2df.video.isolation import Unreadable, isolated_map

if TYPE_CHECKING:
    from clip_m2df.video.frame_cache import CachedVideo, FrameCache

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
    short_side: int = 256,
    frames: int = 24,
    resize_mode: ResizeMode = "short_side",
    workers: int | None = None,
    timeout: float = 60.0,
) -> None:
    """Keep the frames of a manifest's videos, decoded and resized.

    Videos whose frames are there and current are left alone, so that a run that was ended goes on where it was.

    Args:
        manifest: A CSV with the columns path, label and split.
        root: A folder outside the manifest's own in which its videos may lie too.
        output: Folder of the cache, for --data.cache.
        short_side: Of the kept frames, in pixels; smaller videos keep their size.
        frames: Frames to keep of each video, at most; an odd multiple of T keeps evaluation's own. Of a sampling other
            than segments only videos of which all frames are kept come from the cache.
        resize_mode: How frames are resized; that of --data.resize_mode. With squash smaller videos are resized too.
        workers: Processes that decode; as many as there are cores by default.
        timeout: Seconds after which a video is given up.

    Raises:
        UserError: An option is out of range, the manifest is at fault, the folder holds a cache with other settings or
            a damaged one, not one video can be read, a shard cannot be written, or another process writes the cache.
    """
    from rich.progress import track

    from clip_m2df.video.frame_cache import FrameCache, Settings, list_shards, read_headers, write_shard

    require(least=1, short_side=short_side, frames=frames, workers=workers)
    require(above=0, timeout=timeout)
    if os.path.exists(output) and not os.path.isdir(output):
        raise UserError(f"the output {output} is no folder: name the cache's folder, which is made if need be")
    videos = [video.path for video in Manifest.read(manifest, root, check_files=False).videos]
    folder = os.path.dirname(os.path.abspath(manifest))
    settings = Settings(short_side, frames, QUALITY, resize_mode)
    unread: dict[str, str] = {}
    keep = partial(keep_frames, short_side=short_side, frames=frames, resize_mode=resize_mode)

    def readable(missing: Sequence[str]) -> Iterator[tuple[CachedVideo, list[bytes]]]:
        results = isolated_map(keep, missing, workers=workers, timeout=timeout)
        for path, result in track(results, "Caching frames", total=len(missing), disable=not missing):
            if isinstance(result, Unreadable):
                unread[path] = result
            else:
                yield result

    with locked_folder(output, "cache"):
        found, kept = read_headers(output, folder)
        if found not in (None, settings):
            raise UserError(f"the cache {output} has {found}, not {settings}: give another --output, or delete it")
        for draft in output.glob("frames-*.part"):
            draft.unlink()
        cache = FrameCache(settings, kept)
        kept_videos = readable([path for path in videos if not cache.has(path)])
        while of_shard := list(itertools.islice(kept_videos, SHARD_VIDEOS)):
            write_shard(output, folder, settings, of_shard)
    if not list_shards(output):
        path, reason = next(iter(unread.items()))
        remedy = "" if os.path.lexists(path) else "; name the folder that its paths start at with --root"
        raise UserError(f"not one video of the manifest {manifest} could be read, for example {path}: {reason}{remedy}")
    _print_summary(videos, unread, output, folder)


def keep_frames(
    path: str, *, short_side: int, frames: int, resize_mode: ResizeMode = "short_side"
) -> tuple[CachedVideo, list[bytes]] | Unreadable:
    """Read, resize and compress the frames of a video; or tell why that can't be done."""
    from clip_m2df.video.frame_cache import CachedVideo, encode_jpeg
    from clip_m2df.video.reader import VideoError, as_video_error, read_frames
    from clip_m2df.video.transforms import resize_clip, segment_indices

    try:
        with as_video_error(path):
            # First, so that a video that changes meanwhile is known to have changed.
            key = fingerprint(path)
            clip, n_frames = read_frames(path, lambda n: segment_indices(n, min(n, frames)))
            if resize_mode == "squash" or min(clip.shape[-2:]) > short_side:
                clip = resize_clip(clip, short_side, resize_mode)
            return CachedVideo(path, key, n_frames, *clip.shape[-2:]), [encode_jpeg(frame, QUALITY) for frame in clip]
    except VideoError as error:
        return Unreadable(error.reason_for(path))


def _print_summary(videos: Sequence[str], unread: dict[str, str], output: Path, root: str) -> None:
    """Print what is in a cache, what isn't, and what it is good for."""
    from rich.filesize import decimal

    from clip_m2df.video.frame_cache import FrameCache, list_shards

    if unread:
        lines = [f"{relative_path(path, root)}: {reason}" for path, reason in unread.items()]
        say(f"videos that could not be read, and are not in the cache: {len(lines)}{some_lines(lines, MOST_NAMES)}")
    cache = FrameCache.open(output, root)
    kept = [path for path in videos if cache.has(path)]
    shards = list_shards(output)
    cached = sum(shard.stat().st_size for shard in shards)
    say(f"videos in the cache: {len(kept)} of the manifest's {len(videos)}; shards: {len(shards)}")
    say(f"size: {decimal(cache.video_bytes)} of videos, {decimal(cached)} of frames")
    if timed := [path for path in kept if os.path.exists(path)]:
        _print_speed(cache, timed[:: -(-len(timed) // TIMED_VIDEOS)])


def _print_speed(cache: FrameCache, paths: Sequence[str]) -> None:
    """Print how long it takes to read videos for evaluation, from themselves and from the cache."""
    from clip_m2df.video.transforms import ClipReader

    n, size = min(cache.frames, EVALUATION_FRAMES), cache.short_side
    from_videos = ClipReader(n, size, size, resize_mode=cache.resize_mode)
    readers = [from_videos, replace(from_videos, cache=cache)]
    # The first is read once more before, as codecs are loaded then.
    seconds = [[timeit(partial(r.read, path), number=1) for r in readers] for path in [paths[0], *paths]][1:]
    from_video, from_cache = map(statistics.median, zip(*seconds, strict=True))
    ratio = statistics.median(video / cached for video, cached in seconds)
    say(
        f"reading {n} frames: {1000 * from_video:.1f} ms from a video, {1000 * from_cache:.1f} ms from the cache,"
        f" {ratio:.1f} times as fast (medians of {len(paths)} videos)"
    )
