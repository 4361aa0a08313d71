"""The embedded benchmark: short videos of coloured shapes that move, rendered here.

Three families of classes. In ``demo`` a class is a colour, a shape and a motion, and its label is a sentence: "a red
star moving to the left"; many classes share their appearance (colour and shape) with others of their split and differ
in the motion alone, so that one frame does not tell them apart. ``scene`` is made in the same way, but nearly all of a
class is its appearance. In ``order`` a class is what happens, "something moving up then growing", whatever it happens
to; each class has a twin, the same events played backwards.

No appearance of the val or test videos occurs in a training video, nor in what the tiny CLIP of
``clip_m2df/assets/tiny_clip`` was trained on.
"""

from clip_m2df.motion_shapes.classes import (
    CLASSES,
    COLOURS,
    FAMILIES,
    MOTIONS,
    OF_TWO_SHAPES,
    SHAPES,
    MotionClass,
    appearances_of,
    noun_phrase,
    shared_appearance_classes,
)
from clip_m2df.motion_shapes.long_videos import Action, render_long
from clip_m2df.motion_shapes.rendering import NO_KNOBS, Knobs, render
from clip_m2df.motion_shapes.scenes import FPS, SIZE, draw_scene, paint, render_clip

__all__ = [
    "CLASSES",
    "COLOURS",
    "FAMILIES",
    "FPS",
    "MOTIONS",
    "NO_KNOBS",
    "OF_TWO_SHAPES",
    "SHAPES",
    "SIZE",
    "Action",
    "Knobs",
    "MotionClass",
    "appearances_of",
    "draw_scene",
    "noun_phrase",
    "paint",
    "render",
    "render_clip",
    "render_long",
    "shared_appearance_classes",
]
