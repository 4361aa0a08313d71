"""Scenes of ``motion_shapes`` as frames."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from clip_m2df.data.motion_shapes.classes import MotionClass
from clip_m2df.data.motion_shapes.scenes import JITTER, SIZE, Floats, Scene, draw_scene

OCCLUDED = 0.8  # side of the square that hides an occluded video, as a share of the picture's


def _signed_distance(shape: str, x: Floats, y: Floats) -> Floats:
    """Distance from the outline of a shape of about radius 1 at the origin, negative inside; y points down."""
    match shape:
        case "circle":
            return np.hypot(x, y) - 0.9
        case "ring":
            return np.abs(np.hypot(x, y) - 0.75) - 0.22
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.8
        case "triangle":
            return np.maximum(y, 0.866 * np.abs(x) - 0.5 * y) - 0.55
        case "cross":
            long, short = np.maximum(np.abs(x), np.abs(y)) - 0.95, np.minimum(np.abs(x), np.abs(y)) - 0.3
            return np.asarray(np.maximum(long, short))
        case "crescent":
            return np.asarray(np.maximum(np.hypot(x, y) - 0.95, 0.7 - np.hypot(x - 0.45, y)))
        case _:  # star: fold the plane into half a ray of the five, then the edge from the tip to the notch
            fold = np.pi / 5
            r, theta = np.hypot(x, y), np.abs((np.arctan2(x, -y) + fold) % (2 * fold) - fold)
            edge_x, edge_y = 1.05 - 0.45 * np.cos(fold), -0.45 * np.sin(fold)
            away = (r * np.cos(theta) - 1.05) * -edge_y + r * np.sin(theta) * edge_x
            return np.asarray(away / np.hypot(edge_x, edge_y))


def paint(scene: Scene, frames: slice | NDArray[np.int64] = slice(None)) -> NDArray[np.uint8]:
    """Paint a scene, or some frames of it.

    Args:
        scene: what ``draw_scene`` drew.
        frames: which frames, all by default.

    Returns:
        (frames, SIZE, SIZE, 3), RGB.
    """
    camera, radius, opacity = scene.camera[frames], scene.radius[frames], scene.opacity[frames]
    windows = sliding_window_view(scene.texture, (SIZE, SIZE), axis=(0, 1))
    picture = windows[camera[:, 0], camera[:, 1]]  # (frames, 3, SIZE, SIZE)

    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    pixels = radius[:, None, None] * SIZE
    cos, sin = (f(scene.angle[frames])[:, None, None] / pixels for f in (np.cos, np.sin))
    cover: Floats = np.zeros((len(radius), SIZE, SIZE), np.float32)
    for x, y in zip(scene.x[:, frames], scene.y[:, frames], strict=True):
        dx = grid[None, None, :] - (x * SIZE - camera[:, 1] + JITTER)[:, None, None]
        dy = grid[None, :, None] - (y * SIZE - camera[:, 0] + JITTER)[:, None, None]
        distance = _signed_distance(scene.shape, (cos * dx + sin * dy), (cos * dy - sin * dx))
        if scene.roundness:
            round_distance = _signed_distance("circle", dx / pixels, dy / pixels)
            distance = distance + scene.roundness * (round_distance - distance)
        cover = np.maximum(cover, np.clip(0.5 - distance * pixels, 0, 1))
    cover = (cover * opacity[:, None, None])[:, None]
    picture = picture + cover * (scene.colour[:, None, None] - picture)
    return np.ascontiguousarray((picture + 0.5).astype(np.uint8).transpose(0, 2, 3, 1))


OUTLIERS = ("occluded", "off_class", "static")


def render_clip(
    motion_class: MotionClass,
    rng: np.random.Generator,
    *,
    overlap: float = 0.0,
    noise: float = 0.0,
    outlier: str = "",
) -> NDArray[np.uint8]:
    """Render one video of a class.

    Args:
        motion_class: what to show.
        rng: the only source of chance. The scene is the same whatever the noise.
        overlap: see :func:`clip_m2df.data.motion_shapes.scenes.draw_scene`.
        noise: deviation of the grain on each pixel, as a share of the range from black to white.
        outlier: ``occluded`` by a plain square for all of the video, ``static`` at one of its frames, or nothing.

    Returns:
        (frames, height, width, 3), RGB, 12 frames a second for 2 to 4 s.
    """
    frames = paint(draw_scene(motion_class, rng, overlap))
    if outlier == "static":
        frames = np.repeat(frames[rng.integers(len(frames))][None], len(frames), axis=0)
    elif outlier == "occluded":
        side = round(OCCLUDED * SIZE)
        row, column = rng.integers(SIZE - side + 1, size=2)
        frames[:, row : row + side, column : column + side] = rng.integers(256, size=3)
    if noise:
        grainy = frames + rng.normal(0, 255 * noise, frames.shape)
        frames = np.clip(np.rint(grainy), 0, 255).astype(np.uint8)
    return frames
