"""Scenes of motion_shapes, and where their shapes are in the picture."""

import dataclasses
from typing import Any

import numpy as np

from clip_m2df.motion_shapes import FAMILIES
from clip_m2df.motion_shapes.classes import MotionClass
from clip_m2df.motion_shapes.scenes import Scene, paint


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
