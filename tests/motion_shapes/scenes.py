"""Scenes of motion_shapes, where their shapes are in the picture, and the videos of them."""

import dataclasses
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from clip_m2df.motion_shapes import FAMILIES
from clip_m2df.motion_shapes.classes import MotionClass
from clip_m2df.motion_shapes.scenes import FPS, Scene, paint


def generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(seed)))


def of_split(family: str, split: str) -> list[MotionClass]:
    return [c for c in FAMILIES[family] if c.split == split]


def masks(scene: Scene) -> Any:
    """Where the shapes are in the picture, (frames, height, width) of 0 or 1."""
    hidden = dataclasses.replace(scene, opacity=np.zeros_like(scene.opacity))
    return (np.abs(paint(scene).astype(float) - paint(hidden)).sum(-1) > 30).astype(float)


def centres(mask: Any) -> Any:
    """Mean column and row of the shape in each frame, (2, frames)."""
    places, mass = np.arange(mask.shape[1]), mask.sum(axis=(1, 2))
    return np.stack([mask.sum(axis) @ places / mass for axis in (1, 2)])


def videos(root: Path) -> dict[str, bytes]:
    """The files of all videos under a folder, by path from there."""
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*.mp4"))}


def decoded(path: Path) -> NDArray[np.uint8]:
    """The frames of an H.264 video, (frames, height, width, 3)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == FPS
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
