"""A frame cache in the place of videos: whether it has what a run reads, and what to say where it has not."""

from __future__ import annotations

import dataclasses
import os
import warnings

from clip_m2df.data.episodes import ClipReader
from clip_m2df.data.frame_cache import FrameCache
from clip_m2df.data.manifest import Manifest
from clip_m2df.errors import UserError


def read_from_cache(folder: str, manifest: Manifest, reader: ClipReader, name: str, *, check_files: bool) -> ClipReader:
    """Let a reader take its frames from a cache, where they are those of the videos.

    Args:
        folder: the cache.
        manifest: of the videos.
        reader: what is read of each.
        name: of the manifest, for messages.
        check_files: refuse videos that are neither in the cache nor there themselves.

    Raises:
        UserError: the cache has frames that are too few or too small, or those of other videos.
    """
    cache = FrameCache.open(folder, manifest.root)
    if reader.resize > cache.short_side:
        raise UserError(
            f"resize is {reader.resize}, but the cache {folder} holds frames of {cache.short_side}"
            f" pixels: give --data.resize {cache.short_side} or less, or make a cache of larger ones"
        )
    if reader.frames > cache.frames:
        raise UserError(
            f"frames is {reader.frames}, but the cache {folder} holds {cache.frames} of each video:"
            f" give --data.frames {cache.frames} or less, or make a cache of more"
        )
    if check_files:
        manifest.check_files(lambda video: cache.has(video) or os.path.exists(video))
    others = sum(not cache.has(video.path) for video in manifest.videos)
    if others == len(manifest.videos):
        raise UserError(
            f"the cache {folder} has none of the {others} videos of {name}, or all have changed since: name"
            " another, or make it anew; names in it start at the folder of the manifest that it was made of"
        )
    if (cache.frames / reader.frames) % 2 != 1:
        warnings.warn(
            f"the cache {folder} keeps {cache.frames} frames of a video, no odd multiple of frames,"
            f" {reader.frames}: evaluation takes others than from the videos themselves",
            stacklevel=3,
        )
    if others:
        warnings.warn(
            f"{others} of the {len(manifest.videos)} videos are not in the cache {folder}, or have changed"
            " since: they are read themselves; clip-m2df cache adds them",
            stacklevel=3,
        )
    return dataclasses.replace(reader, cache=cache)
