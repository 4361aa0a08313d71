"""The embedded benchmark: short videos of coloured shapes that move, rendered here.

A class is a colour, a shape and a motion, and its label is a sentence: "a red star moving to the left". Many classes
share their appearance (colour and shape) with others of their split and differ in the motion alone, so that one frame
does not tell them apart. No appearance of the val or test classes occurs in a train class, nor in what the tiny CLIP
of ``clip_m2df/assets/tiny_clip`` was trained on.
"""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from clip_m2df.errors import UserError

Floats: TypeAlias = NDArray[np.floating[Any]]

RENDERER_VERSION = 1  # raise it whenever a pixel changes: it is part of the cache's key
SIZE = 64  # pixels, height and width
FPS = 12
SECONDS = (2.0, 4.0)  # the shortest and the longest video
JITTER = 3  # pixels that the camera strays from the middle

COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (225, 40, 45),
        "green": (50, 170, 60),
        "blue": (45, 80, 220),
        "yellow": (240, 215, 50),
        "white": (245, 245, 245),
        "purple": (145, 60, 180),
        "orange": (245, 135, 35),
        "cyan": (60, 205, 220),
    }
)
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "crescent")
OF_TWO_SHAPES = ("approaching each other", "moving apart")
MOTIONS = (
    "moving to the left",
    "moving to the right",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "appearing",
    "vanishing",
    "bouncing",
    "turning clockwise",
    "turning anticlockwise",
    *OF_TWO_SHAPES,
)
SPLITS = ("train", "val", "test")
VIDEOS_PER_CLASS: Mapping[str, int] = MappingProxyType({"train": 20, "val": 12, "test": 16})


@dataclass(frozen=True)
class MotionClass:
    """One class of the benchmark.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        colour: one of ``COLOURS``.
        shape: one of ``SHAPES``.
        motion: one of ``MOTIONS``.
    """

    split: str
    colour: str
    shape: str
    motion: str

    def __post_init__(self) -> None:
        for name, known in (("colour", tuple(COLOURS)), ("shape", SHAPES), ("motion", MOTIONS)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"motion_shapes knows no {name} {getattr(self, name)!r}; choose from {', '.join(known)}"
                )

    @property
    def appearance(self) -> tuple[str, str]:
        """Colour and shape: all that a single frame shows."""
        return self.colour, self.shape

    @property
    def label(self) -> str:
        """The class as a sentence, such as "a red star moving to the left"."""
        return f"{noun_phrase(self.colour, self.shape, two=self.motion in OF_TWO_SHAPES)} {self.motion}"

    @property
    def slug(self) -> str:
        """The label as the name of a folder."""
        return self.label.replace(" ", "_")


def noun_phrase(colour: str, shape: str, *, size: str = "", two: bool = False) -> str:
    """Name what is in the picture: "a red star", "an orange ring", "two small red crosses"."""
    words = f"{size} {colour} {shape}".strip()
    if two:
        return f"two {words}{'es' if shape == 'cross' else 's'}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _classes() -> Iterator[MotionClass]:
    left, right, up, down = "moving to the left", "moving to the right", "moving up", "moving down"
    eight = (left, right, up, down, "growing", "shrinking", "appearing", "vanishing")
    table: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {
        "train": {
            ("red", "circle"): (left, right, up, down, "growing", "shrinking"),
            ("yellow", "ring"): (up, down, "growing", "shrinking", "appearing", "vanishing"),
            ("blue", "square"): (left, right, "appearing", "vanishing"),
            ("white", "star"): OF_TWO_SHAPES,
            ("green", "crescent"): ("turning clockwise", "turning anticlockwise"),
            ("cyan", "cross"): ("bouncing",),
            ("orange", "square"): ("bouncing",),
            ("purple", "triangle"): (left,),
            ("green", "circle"): ("approaching each other",),
        },
        "val": {
            ("orange", "star"): (left, right, "appearing", "vanishing"),
            ("cyan", "circle"): (up, down),
            ("red", "ring"): ("growing",),
            ("white", "cross"): ("bouncing",),
            ("yellow", "square"): ("vanishing",),
            ("blue", "triangle"): ("turning anticlockwise",),
        },
        "test": {
            ("red", "star"): eight,
            ("green", "square"): eight,
            ("blue", "ring"): OF_TWO_SHAPES,
            ("orange", "circle"): (right,),
            ("yellow", "cross"): ("bouncing",),
            ("purple", "crescent"): ("turning clockwise",),
            ("cyan", "triangle"): ("shrinking",),
            ("white", "circle"): (down,),
        },
    }
    for split, appearances in table.items():
        for (colour, shape), motions in appearances.items():
            for motion in motions:
                yield MotionClass(split, colour, shape, motion)


CLASSES: tuple[MotionClass, ...] = tuple(_classes())


def shared_appearance_classes(split: str = "test") -> tuple[str, ...]:
    """Labels of the classes that share colour and shape with another of ``split``, in the order of ``CLASSES``."""
    if split not in SPLITS:
        raise UserError(f"motion_shapes has no split {split!r}; choose from {', '.join(SPLITS)}")
    members = [c for c in CLASSES if c.split == split]
    count = Counter(c.appearance for c in members)
    return tuple(c.label for c in members if count[c.appearance] > 1)


def clip_appearances() -> tuple[tuple[str, str], ...]:
    """Colours and shapes that the tiny CLIP may be trained on: those of no val and no test class."""
    held_out = {c.appearance for c in CLASSES if c.split != "train"}
    return tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in held_out)


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


def draw_scene(motion_class: MotionClass, rng: np.random.Generator) -> Scene:
    """Draw all that varies among the videos of a class: background, camera, place, size, speed, phase, tint.

    Args:
        motion_class: what to show; its split does not matter.
        rng: the only source of chance.

    Returns:
        The scene, of 2 to 4 s.
    """
    first, last = (round(seconds * FPS) for seconds in SECONDS)
    frames = int(rng.integers(first, last + 1))
    time = np.linspace(0, 1, frames)
    start, end, ease = rng.uniform(0, 0.2), rng.uniform(0.8, 1), rng.uniform(0.75, 1.33)
    u = np.clip((time - start) / (end - start), 0, 1) ** ease  # how much of the motion is done
    still = np.ones(frames)

    x, y = rng.uniform(0.28, 0.72, 2)[:, None, None] * np.ones((1, frames))
    radius = rng.uniform(0.13, 0.25) * still
    angle = rng.uniform(-0.35, 0.35) * still
    opacity = still
    travel = rng.uniform(0.2, 0.4)
    middle = 0.5 + rng.uniform(-1, 1) * (0.36 - travel / 2)
    growth = rng.uniform(1.7, 2.5)
    moment, fade = rng.uniform(0.35, 0.65), rng.uniform(0.1, 0.3)
    turns, phase = rng.uniform(0.5, 1.0), rng.uniform()
    match motion_class.motion:
        case "moving to the left":
            x = middle - travel * (u - 0.5)[None]
        case "moving to the right":
            x = middle + travel * (u - 0.5)[None]
        case "moving up":
            y = middle - travel * (u - 0.5)[None]
        case "moving down":
            y = middle + travel * (u - 0.5)[None]
        case "growing":
            radius = radius * growth ** (u - 0.5)
        case "shrinking":
            radius = radius * growth ** (0.5 - u)
        case "appearing":
            opacity = np.clip((time - moment) / fade + 0.5, 0, 1)
        case "vanishing":
            opacity = np.clip((moment - time) / fade + 0.5, 0, 1)
        case "bouncing":
            y = 0.75 - travel * np.abs(np.sin(np.pi * (4 * turns * time + phase)))[None]
        case "turning clockwise":
            angle = 2 * np.pi * (phase + turns * u)
        case "turning anticlockwise":
            angle = 2 * np.pi * (phase - turns * u)
        case "approaching each other" | "moving apart" as motion:
            radius = 0.7 * radius
            apart = u if motion == "moving apart" else 1 - u
            reach = (0.15 + (0.05 + travel / 4) * apart) * np.array([[-1.0], [1.0]])
            heading = 0.8 * (phase - 0.5)
            x, y = 0.5 + reach * np.cos(heading), 0.5 + reach * np.sin(heading)

    tint = np.array(COLOURS[motion_class.colour]) * rng.uniform(0.7, 1.0) + rng.normal(0, 14, 3)
    strays = np.cumsum(rng.normal(0, 0.7, (frames, 2)), axis=0)
    camera = JITTER + np.clip(np.rint(strays - strays.mean(axis=0)), -JITTER, JITTER)
    single = np.float32  # precise enough for pixels, and twice as fast
    return Scene(
        shape=motion_class.shape,
        colour=np.clip(tint, 0, 255).astype(single),
        texture=_texture(rng).astype(single),
        camera=camera.astype(np.int64),
        x=x.astype(single),
        y=y.astype(single),
        radius=radius.astype(single),
        angle=angle.astype(single),
        opacity=opacity.astype(single),
    )


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
        cover = np.maximum(cover, np.clip(0.5 - distance * pixels, 0, 1))
    cover = (cover * opacity[:, None, None])[:, None]
    picture = picture + cover * (scene.colour[:, None, None] - picture)
    return np.ascontiguousarray((picture + 0.5).astype(np.uint8).transpose(0, 2, 3, 1))


def render_clip(motion_class: MotionClass, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Render one video of a class.

    Args:
        motion_class: what to show.
        rng: the only source of chance.

    Returns:
        (frames, height, width, 3), RGB, 12 frames a second for 2 to 4 s.
    """
    return paint(draw_scene(motion_class, rng))


def write_video(path: Path, frames: NDArray[np.uint8]) -> None:
    """Write frames (frames, height, width, 3) as H.264 in MP4: the same bytes for the same frames."""
    import av

    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        options = {"preset": "veryfast", "crf": "18", "bf": "0", "g": str(FPS), "threads": "1"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _render_one(job: tuple[str, int, int, int]) -> None:
    """Render video ``number`` of class ``index``; the seed sequence makes it independent of all other videos."""
    path, seed, index, number = job
    rng = np.random.Generator(np.random.PCG64([seed, index, number]))
    write_video(Path(path), render_clip(CLASSES[index], rng))


def render(
    root: Path | None = None,
    *,
    videos_per_class: Mapping[str, int] = VIDEOS_PER_CLASS,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Render the benchmark, unless it is there already.

    The folder comes into being whole: everything is rendered beside it and moved in one step, so that a broken-off
    run leaves nothing that looks finished, and any number of processes may ask for it at once.

    Args:
        root: the folder to make. By default one in the cache, ``$CLIP_M2DF_CACHE`` or ``~/.cache/clip-m2df``, whose
            name holds a digest of all that the videos depend on.
        videos_per_class: how many videos a class has, by split.
        seed: another seed gives other videos of the same classes.
        workers: how many processes render, by default as many as there are cores; 1 uses this process alone. The
            videos do not depend on it.
        progress: whether to show a progress bar.

    Returns:
        The path of ``manifest.csv`` with columns ``path`` (relative to its folder), ``label`` and ``split``.

    Raises:
        UserError: if the counts or the seed make no sense, or ``root`` holds something else.
    """
    counts = {split: int(videos_per_class.get(split, 0)) for split in SPLITS}
    if unknown := set(videos_per_class) - set(SPLITS):
        raise UserError(f"videos_per_class names {sorted(unknown)}; the splits are {', '.join(SPLITS)}")
    if min(counts.values()) < 0 or not any(counts.values()) or seed < 0:
        raise UserError(f"videos_per_class ({counts}) and seed ({seed}) can't be negative, and some split needs videos")
    key = _key(counts, seed)
    target = _cache_folder() / f"motion_shapes-{key}" if root is None else Path(root)
    if _finished(target, key):
        return target / "manifest.csv"
    if root is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} holds something other than these videos; name an empty or a new folder")

    rows = [
        (f"{c.split}/{c.slug}/{number:02d}.mp4", c.label, c.split, index, number)
        for index, c in enumerate(CLASSES)
        for number in range(counts[c.split])
    ]
    with _taking_the_place_of(target, key) as folder:
        for parent in {(folder / row[0]).parent for row in rows}:
            parent.mkdir(parents=True)
        jobs = [(str(folder / path), seed, index, number) for path, _, _, index, number in rows]
        _render_all(jobs, workers or os.cpu_count() or 1, progress)
        (folder / "render.json").write_text(json.dumps({"key": key, "seed": seed, "videos_per_class": counts}) + "\n")
        with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("path", "label", "split"))
            writer.writerows(row[:3] for row in rows)
    return target / "manifest.csv"


def _key(counts: Mapping[str, int], seed: int) -> str:
    table = [(c.split, c.colour, c.shape, c.motion) for c in CLASSES]
    everything = [RENDERER_VERSION, SIZE, FPS, SECONDS, JITTER, dict(COLOURS), table, counts, seed]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:12]


def _cache_folder() -> Path:
    if own := os.environ.get("CLIP_M2DF_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clip-m2df"


def _finished(folder: Path, key: str) -> bool:
    """Whether the folder holds the whole of just this rendering."""
    try:
        return (folder / "manifest.csv").is_file() and json.loads((folder / "render.json").read_text())["key"] == key
    except (OSError, ValueError, KeyError):
        return False


@contextmanager
def _taking_the_place_of(target: Path, key: str) -> Iterator[Path]:
    """A new folder beside ``target`` that becomes ``target`` at the end, or nothing at all."""
    folder = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    folder.mkdir(parents=True)
    try:
        yield folder
        if target.exists() and not _finished(target, key):
            # Empty, or in the cache and left over from something that was not ``render``.
            os.replace(target, folder / "replaced")
            shutil.rmtree(folder / "replaced")
        try:
            os.replace(folder, target)
        except OSError:
            if not _finished(target, key):  # otherwise another process was first, with the same videos
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _render_all(jobs: list[tuple[str, int, int, int]], workers: int, progress: bool) -> None:
    from rich.progress import track

    def shown(done: Iterator[None]) -> None:
        for _ in track(done, "rendering motion_shapes", total=len(jobs), disable=not progress):
            pass

    workers = min(workers, len(jobs))
    if workers <= 1:
        shown(map(_render_one, jobs))
        return
    # Processes are spawned, not forked: the caller may have threads of torch's running.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            shown(pool.map(_render_one, jobs, chunksize=8))
    except BrokenProcessPool as error:
        raise UserError(
            "a process that rendered motion_shapes ended early; a script that calls render() needs its code under "
            "`if __name__ == '__main__':`, or workers=1, which renders without further processes"
        ) from error
