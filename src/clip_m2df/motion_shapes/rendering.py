"""Videos of ``motion_shapes`` as files, kept in a cache."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_m2df.errors import UserError
from clip_m2df.motion_shapes.classes import COLOURS, FAMILIES, SPLITS
from clip_m2df.motion_shapes.scenes import FPS, JITTER, OUTLIERS, SECONDS, SIZE, render_clip

NAME = "motion_shapes"


RENDERER_VERSION = 1  # raise it whenever a pixel changes: it is part of the cache's key


_THIRTY: Mapping[str, int] = MappingProxyType(dict.fromkeys(SPLITS, 30))


VIDEOS_PER_CLASS: dict[str, Mapping[str, int]] = {
    "demo": MappingProxyType({"train": 20, "val": 12, "test": 16}),
    "scene": _THIRTY,
    "order": _THIRTY,
}


@dataclass(frozen=True)
class Knobs:
    """Shares from 0, as usual, to 1.

    Attributes:
        overlap: of what makes a class its own, how much is taken away in all videos: the share of the way to a grey
            circle in ``demo`` and ``scene``, to a video in which nothing happens in ``order``.
        outliers: of the support videos, how many are occluded, of another class, or static.
        noise: deviation of the grain on each pixel of all videos, as a share of the range from black to white.

    Raises:
        UserError: a knob beyond its range.
    """

    overlap: float = 0.0
    outliers: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(f"the knob {name} is {value!r}, a share; it must be between 0 and 1")


NO_KNOBS = Knobs()


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


class _Job(NamedTuple):
    """A video to render."""

    path: str
    family: str
    class_number: int
    number: int
    seed: int
    overlap: float
    noise: float
    outlier: bool


def _render_one(job: _Job) -> None:
    """Render a video; the seed sequence makes it independent of all others, but for those of other knobs."""
    members = FAMILIES[job.family]
    place = [job.seed, job.class_number, job.number]
    if job.family != "demo":
        place.append(list(FAMILIES).index(job.family))
    rng = np.random.Generator(np.random.PCG64(place))
    shown, outlier = members[job.class_number], ""
    if job.outlier:
        outlier = OUTLIERS[job.number % len(OUTLIERS)]
        if outlier == "off_class":
            others = [c for c in members if c.split == shown.split and c != shown]
            shown = others[rng.integers(len(others))]
    frames = render_clip(shown, rng, overlap=job.overlap, noise=job.noise, outlier=outlier)
    write_video(Path(job.path), frames)


def render(
    root: Path | None = None,
    *,
    family: str = "demo",
    knobs: Knobs = NO_KNOBS,
    videos_per_class: Mapping[str, int] | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Render a family of the benchmark, unless it is there already.

    The folder comes into being whole: everything is rendered beside it and moved in one step, so that a broken-off
    run leaves nothing that looks finished, and any number of processes may ask for it at once.

    Args:
        root: the folder to make. By default one in the cache, ``$CLIP_M2DF_CACHE`` or ``~/.cache/clip-m2df``, whose
            name holds a digest of all that the videos depend on.
        family: ``demo``, ``scene`` or ``order``.
        knobs: how much harder than usual the videos of the test split are; with any, only that split is rendered.
            Where there are outliers, each video gets an outlying version, for the support of episodes.
        videos_per_class: how many videos a class has, by split; by default 20, 12 and 16 in ``demo`` and 30 elsewhere.
        seed: another seed gives other videos of the same classes.
        workers: how many processes render, by default as many as there are cores; 1 uses this process alone. The
            videos do not depend on it.
        progress: whether to show a progress bar.

    Returns:
        The path of ``manifest.csv`` with columns ``path`` (relative to its folder), ``label`` and ``split``.

    Raises:
        UserError: there is no such family, the counts or the seed make no sense, or ``root`` holds something else.
    """
    if family not in FAMILIES:
        raise UserError(f"motion_shapes has no family {family!r}; choose from {', '.join(FAMILIES)}")
    counts = _count(family, knobs, videos_per_class, seed)
    key = _key(family, knobs, counts, seed)
    target = _cache_folder() / f"{NAME}_{family}-{key}" if root is None else Path(root)
    if _finished(target, key):
        return target / "manifest.csv"
    if root is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} holds something other than these videos; name an empty or a new folder")

    rows = [
        (f"{c.split}/{c.slug}/{number:02d}.mp4", c.label, c.split, index, number)
        for index, c in enumerate(FAMILIES[family])
        for number in range(counts[c.split])
    ]
    with _taking_the_place_of(target, key) as folder:
        jobs = [
            _Job(str(folder / path), family, index, number, seed, knobs.overlap, knobs.noise, outlier)
            for row, _, _, index, number in rows
            for path, outlier in [(row, False), (outlier_path(row), True)][: 1 + (knobs.outliers > 0)]
        ]
        for parent in {Path(job.path).parent for job in jobs}:
            parent.mkdir(parents=True)
        _render_all(jobs, workers or os.cpu_count() or 1, progress)
        (folder / "render.json").write_text(json.dumps({"key": key, "seed": seed, "videos_per_class": counts}) + "\n")
        _write_manifest(folder / "manifest.csv", [row[:3] for row in rows])
    return target / "manifest.csv"


def _count(family: str, knobs: Knobs, videos_per_class: Mapping[str, int] | None, seed: int) -> dict[str, int]:
    """How many videos a class has, by split."""
    if videos_per_class is None:
        videos_per_class = VIDEOS_PER_CLASS[family]
    counts = {split: int(videos_per_class.get(split, 0)) for split in SPLITS}
    if unknown := set(videos_per_class) - set(SPLITS):
        raise UserError(f"videos_per_class names {sorted(unknown)}; the splits are {', '.join(SPLITS)}")
    if knobs != NO_KNOBS:
        counts = {split: counts[split] if split == "test" else 0 for split in SPLITS}
    if min(counts.values()) < 0 or not any(counts.values()) or seed < 0:
        raise UserError(f"videos_per_class ({counts}) and seed ({seed}) can't be negative, and some split needs videos")
    return counts


def _write_manifest(file: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Write path, label and split of each video."""
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(("path", "label", "split"))
        writer.writerows(rows)


def _key(family: str, knobs: Knobs, counts: Mapping[str, int], seed: int) -> str:
    table = [(c.split, c.colour, c.shape, c.motion) for c in FAMILIES[family]]
    harder = [float(knobs.overlap), float(knobs.noise), knobs.outliers > 0]  # 0 and 0.0 are one setting
    everything = [RENDERER_VERSION, SIZE, FPS, SECONDS, JITTER, dict(COLOURS), family, table, harder, counts, seed]
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


def _render_all(jobs: list[_Job], workers: int, progress: bool) -> None:
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


if TYPE_CHECKING:
    from clip_m2df.episodes.plan import EpisodePlan


def outlier_path(path: str) -> str:
    """Where the outlying version of a test video lies: another folder in the place of ``test``."""
    video = PurePath(path)
    return str(video.parents[2] / "outliers" / video.parent.name / video.name)


def with_outliers(plan: EpisodePlan, share: float, rng: np.random.Generator) -> EpisodePlan:
    """Put outlying versions in the places of some support videos.

    Args:
        plan: an episode.
        share: how many, on average; those of a smaller share are among those of a larger one.
        rng: the only source of chance.
    """
    support = tuple(
        tuple(
            dataclasses.replace(video, path=outlier_path(video.path)) if draw < share else video
            for video, draw in zip(row, rng.random(len(row)), strict=True)
        )
        for row in plan.support
    )
    return plan._replace(support=support)
