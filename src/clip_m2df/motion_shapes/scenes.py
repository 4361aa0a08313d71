"""What happens in a video of ``motion_shapes``, before it is painted."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from clip_m2df.motion_shapes import classes as names
from clip_m2df.motion_shapes.classes import COLOURS, MotionClass, appearances_of

Floats: TypeAlias = NDArray[np.floating[Any]]

SIZE = 64  # pixels, height and width
FPS = 12
SECONDS = (2.0, 4.0)  # the shortest and the longest video
JITTER = 3  # pixels that the camera strays from the middle
COMMON_COLOUR = 140.0  # the grey that classes have in common where they overlap
OCCLUDED = 0.8  # side of the square that hides an occluded video, as a share of the picture's
OUTLIERS = ("occluded", "off_class", "static")


@dataclass(frozen=True)
class Scene:
    """One video before it is painted. Lengths are fractions of the picture's width, angles radians.

    Attributes:
        shape: one of ``SHAPES``.
        colour: (3,), 0 to 255.
        texture: (SIZE + 2 JITTER, SIZE + 2 JITTER, 3), the background, 0 to 255.
        camera: (frames, 2), the row and column of the texture that the picture starts at.
        x: (shapes, frames), centres, from the left.
        y: (shapes, frames), centres, from the top.
        radius: (frames,).
        angle: (frames,), clockwise.
        opacity: (frames,), 0 to 1.
        roundness: share of the way from the shape to a circle.
    """

    shape: str
    colour: Floats
    texture: Floats
    camera: NDArray[np.int64]
    x: Floats
    y: Floats
    radius: Floats
    angle: Floats
    opacity: Floats
    roundness: float = 0.0

    def backwards(self) -> Scene:
        """The same, played backwards."""
        moving = {name: getattr(self, name)[..., ::-1] for name in ("x", "y", "radius", "angle", "opacity")}
        return dataclasses.replace(self, camera=self.camera[::-1], **moving)


def draw_scene(
    motion_class: MotionClass, rng: np.random.Generator, overlap: float = 0.0, *, frames: int | None = None
) -> Scene:
    """Draw all that varies among the videos of a class: background, camera, position, size, speed, phase, tint.

    Args:
        motion_class: what to show; of classes of events, colour and shape are drawn among those of its split.
        rng: the only source of chance. Twins get the same scene from the same one, in either direction of time.
        overlap: how much of what makes a class its own is taken away: the share of the way to a grey circle where the
            class has an appearance, and where it has events, to a video in which nothing happens.
        frames: how long it is; by default that is drawn too, from 2 to 4 s.

    Returns:
        The scene.
    """
    frames = _draw_length(rng) if frames is None else frames
    time = np.linspace(0, 1, frames)
    appears, own = motion_class.appearance, 1 - overlap
    backwards = False
    if motion_class.colour:
        motion = _move(motion_class.motion, time, rng)
    else:
        backwards = motion_class.twin.motion < motion_class.motion
        choices = appearances_of(motion_class.split)
        appears = choices[int(rng.integers(len(choices)))]
        events = motion_class.twin.events if backwards else motion_class.events
        motion, own = _happen(events, time, rng, own), 1.0

    tint = np.array(COLOURS[appears[0]]) * rng.uniform(0.7, 1.0) + rng.normal(0, 14, 3)
    camera = _draw_camera(rng, frames)
    single = np.float32  # precise enough for pixels, and twice as fast
    scene = Scene(
        shape=appears[1],
        colour=np.clip(tint + (1 - own) * (COMMON_COLOUR - tint), 0, 255).astype(single),
        texture=_texture(rng).astype(single),
        camera=camera,
        roundness=1 - own,
        **{name: values.astype(single) for name, values in motion.items()},
    )
    return scene.backwards() if backwards else scene


def draw_cut(
    motion_class: MotionClass, recorded: np.random.Generator, rng: np.random.Generator, overlap: float = 0.0
) -> Scene:
    """Draw one more cut of a recording, whose first cut ``draw_scene`` draws.

    The same thing does the same again, in the same place before the same background, slower or faster; and the camera
    strays in another way. The cuts of a recording are as hard as one another.

    Args:
        motion_class: what to show.
        recorded: the source of chance that the first cut is drawn from.
        rng: the only source of chance for what differs.
        overlap: see :func:`draw_scene`.

    Returns:
        The scene.
    """
    again = copy.deepcopy(recorded)
    first = draw_scene(motion_class, recorded, overlap)
    _draw_length(again)  # that of the first cut, in whose place this one has its own
    frames = _draw_length(rng)
    scene = draw_scene(motion_class, again, overlap, frames=frames)
    return dataclasses.replace(scene, texture=first.texture, camera=_draw_camera(rng, frames))


def _draw_length(rng: np.random.Generator) -> int:
    """The frames of a video."""
    first, last = (round(seconds * FPS) for seconds in SECONDS)
    return int(rng.integers(first, last + 1))


def _draw_camera(rng: np.random.Generator, frames: int) -> NDArray[np.int64]:
    """Where the camera strays, (frames, 2)."""
    strays = np.cumsum(rng.normal(0, 0.7, (frames, 2)), axis=0)
    return (JITTER + np.clip(np.rint(strays - strays.mean(axis=0)), -JITTER, JITTER)).astype(np.int64)


# Along the axes of the picture, clockwise, and towards more; the other motions go the other way.
_FORWARD = {names.RIGHT, names.DOWN, names.GROWING, names.APPEARING, names.PARTING, names.TURNING, names.CIRCLING}


def _move(motion: str, time: Floats, rng: np.random.Generator) -> dict[str, Floats]:
    """Fields of a scene in which one of ``MOTIONS`` takes the whole video; ``time`` goes from 0 to 1."""
    start, end, ease = rng.uniform(0, 0.2), rng.uniform(0.8, 1), rng.uniform(0.75, 1.33)
    u = np.clip((time - start) / (end - start), 0, 1) ** ease  # how much of the motion is done
    still = np.ones(len(time))
    sign = 1 if motion in _FORWARD else -1

    x, y = rng.uniform(0.28, 0.72, 2)[:, None, None] * np.ones((1, len(time)))
    radius = rng.uniform(0.13, 0.25) * still
    angle = rng.uniform(-0.35, 0.35) * still
    opacity = still
    travel = rng.uniform(0.2, 0.4)
    middle = 0.5 + rng.uniform(-1, 1) * (0.36 - travel / 2)
    growth = rng.uniform(1.7, 2.5)
    moment, fade = rng.uniform(0.35, 0.65), rng.uniform(0.1, 0.3)
    turns, phase = rng.uniform(0.5, 1.0), rng.uniform()
    match motion:
        case names.LEFT | names.RIGHT:
            x = middle + sign * travel * (u - 0.5)[None]
        case names.UP | names.DOWN:
            y = middle + sign * travel * (u - 0.5)[None]
        case names.GROWING | names.SHRINKING:
            radius = radius * growth ** (sign * (u - 0.5))
        case names.APPEARING | names.VANISHING:
            opacity = np.clip(sign * (time - moment) / fade + 0.5, 0, 1)
        case names.BOUNCING:
            y = 0.75 - travel * np.abs(np.sin(np.pi * (4 * turns * time + phase)))[None]
        case names.TURNING | names.TURNING_BACK:
            angle = 2 * np.pi * (phase + sign * turns * u)
        case names.APPROACHING | names.PARTING:
            radius = 0.7 * radius
            apart = u if sign > 0 else 1 - u
            reach = (0.15 + (0.05 + travel / 4) * apart) * np.array([[-1.0], [1.0]])
            heading = 0.8 * (phase - 0.5)
            x, y = 0.5 + reach * np.cos(heading), 0.5 + reach * np.sin(heading)
    return {"x": x, "y": y, "radius": radius, "angle": angle, "opacity": opacity}


def _happen(events: tuple[str, ...], time: Floats, rng: np.random.Generator, own: float) -> dict[str, Floats]:
    """The same for events of ``BACKWARDS`` one after another, ``own`` of each."""
    x, y = (rng.uniform(0.4, 0.6) * np.ones((1, len(time))) for _ in range(2))
    radius = rng.uniform(0.1, 0.17) * np.ones(len(time))
    angle = rng.uniform(-0.35, 0.35) * np.ones(len(time))
    opacity = np.ones(len(time))
    for number, event in enumerate(events):
        start, end = (number + rng.uniform(0, 0.2)) / len(events), (number + rng.uniform(0.8, 1)) / len(events)
        u = np.clip((time - start) / (end - start), 0, 1)
        travel, growth = own * rng.uniform(0.25, 0.4), rng.uniform(1.8, 2.6) ** own
        turns, phase, reach = rng.uniform(0.7, 1.0), rng.uniform(), own * rng.uniform(0.12, 0.18)
        sign = 1 if event in _FORWARD else -1
        match event:
            case names.LEFT | names.RIGHT:
                x = x + sign * travel * (u - 0.5)
            case names.UP | names.DOWN:
                y = y + sign * travel * (u - 0.5)
            case names.GROWING | names.SHRINKING:
                radius = radius * growth ** (sign * (u - 0.5))
            case names.CIRCLING | names.CIRCLING_BACK:
                turned = 2 * np.pi * (phase + sign * turns * u)  # y points down: growing angles go clockwise
                x, y = x + reach * np.cos(turned), y + reach * np.sin(turned)
            case names.APPEARING | names.VANISHING:
                opacity = 1 - own * (1 - u if event == names.APPEARING else u)
            case names.APPROACHING | names.PARTING:
                radius = 0.7 * radius
                apart = 0.15 + travel / 2 * (sign * (u - 0.5) + 0.5)
                x = 0.5 + apart * np.cos(0.8 * (phase - 0.5)) * np.array([[-1.0], [1.0]])
                y = 0.5 + apart * np.sin(0.8 * (phase - 0.5)) * np.array([[-1.0], [1.0]])
    return {"x": x, "y": y, "radius": radius, "angle": angle, "opacity": opacity}


def _texture(rng: np.random.Generator, waves: int = 6) -> Floats:
    """A background of its own for each video: coloured plane waves and grain on a plain colour, (side, side, 3)."""
    side = SIZE + 2 * JITTER
    frequency = rng.uniform(0.5, 10, (waves, 1, 1)) * 2 * np.pi / side
    heading, phase = rng.uniform(0, 2 * np.pi, (2, waves, 1, 1))
    row, column = np.mgrid[:side, :side]
    wave = np.cos(frequency * (column * np.cos(heading) + row * np.sin(heading)) + phase)
    grey = rng.uniform(50, 170) + rng.normal(0, 15, 3)
    texture = grey + np.einsum("wrc,wk->rck", wave, rng.normal(0, 16, (waves, 3)))
    return np.asarray(np.clip(texture + rng.normal(0, 8, (side, side, 1)), 0, 255))


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


def render_clip(
    motion_class: MotionClass,
    rng: np.random.Generator,
    *,
    overlap: float = 0.0,
    noise: float = 0.0,
    outlier: str = "",
    recorded: np.random.Generator | None = None,
) -> NDArray[np.uint8]:
    """Render one video of a class.

    Args:
        motion_class: what to show.
        rng: the only source of chance. The scene is the same whatever the noise.
        overlap: see :func:`clip_m2df.motion_shapes.scenes.draw_scene`.
        noise: deviation of the grain on each pixel, as a share of the range from black to white.
        outlier: ``occluded`` by a plain square for all of the video, ``static`` at one of its frames, or nothing.
        recorded: the source of chance of the recording that it is one more cut of (:func:`draw_cut`).

    Returns:
        (frames, height, width, 3), RGB, 12 frames a second for 2 to 4 s.
    """
    drawn = (
        draw_scene(motion_class, rng, overlap) if recorded is None else draw_cut(motion_class, recorded, rng, overlap)
    )
    frames = paint(drawn)
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
