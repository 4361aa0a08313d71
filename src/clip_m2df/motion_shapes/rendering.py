"""Videos of ``motion_shapes`` as files, kept in a cache."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from clip_m2df.errors import UserError
from clip_m2df.files import write_table
from clip_m2df.motion_shapes.classes import COLOURS, FAMILIES, SPLITS
from clip_m2df.motion_shapes.scenes import FPS, JITTER, OUTLIERS, SECONDS, SIZE, render_clip

RENDERER_VERSION = 1  # raise it whenever a pixel changes: it is part of the cache's key

CUTS = 5  # of a recording with twins; of one of UCF101's there are 5.3 on average

VIDEOS_PER_CLASS: dict[str, Mapping[str, int]] = {
    "demo": {"train": 20, "val": 12, "test": 16},
    "scene": dict.fromkeys(SPLITS, 30),
    "order": dict.fromkeys(SPLITS, 30),
    "mixed": dict.fromkeys(SPLITS, 30),
}


@dataclass(frozen=True)
class Knobs:
    """Shares from 0, as usual, to 1.

    Attributes:
        overlap: of what makes a class its own, how much is taken away in all videos: the share of the way to a grey
            circle in ``demo``, ``scene`` and ``mixed``, to a video in which nothing happens in ``order``.
        outliers: of the support videos, how many are occluded, of another class, or static.
        noise: deviation of the grain on each pixel of all videos, as a share of the range from black to white.
        twins: of the recordings, how many are cut into ``CUTS`` videos and not one: the usual one, and others in which
            the same thing does the same again in the same place. The manifest says in ``group`` what a video
            was cut from.

    Raises:
        UserError: a knob beyond its range.
    """

    overlap: float = 0.0
    outliers: float = 0.0
    noise: float = 0.0
    twins: float = 0.0

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


@dataclass(frozen=True)
class _Job:
    """A video to render: its file, the number of its class, of its recording in the class, and of its cut in that."""

    path: Path
    index: int
    number: int
    cut: int = 0
    is_outlier: bool = False


def _render_one(job: _Job, *, family: str, knobs: Knobs, seed: int) -> None:
    """Render a video, with a seed sequence of its own, so that it depends on no other but the first cut of its own."""
    members, outlier = FAMILIES[family], ""
    rng = _generator(job, family, seed)
    shown, recorded = members[job.index], None
    if job.cut:
        recorded, rng = rng, _generator(job, family, seed, job.cut)
    if job.is_outlier:
        outlier = OUTLIERS[job.number % len(OUTLIERS)]
        if outlier == "off_class":
            others = [c for c in members if c.split == shown.split and c != shown]
            shown, recorded = others[rng.integers(len(others))], None
    frames = render_clip(shown, rng, overlap=knobs.overlap, noise=knobs.noise, outlier=outlier, recorded=recorded)
    write_video(job.path, frames)


def _generator(job: _Job, family: str, seed: int, *more: int) -> np.random.Generator:
    """The source of chance of a recording, or of one more thing about it."""
    family_seed = [] if family == "demo" else [list(FAMILIES).index(family)]
    sequence = np.random.SeedSequence([seed, job.index, job.number, *family_seed], spawn_key=more)
    return np.random.Generator(np.random.PCG64(sequence))


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

    The folder is made whole: everything is rendered beside it and moved in one step, so that an interrupted run leaves
    nothing that looks finished, and any number of processes may ask for it at once.

    Args:
        root: the folder to make. By default one in the cache, ``$CLIP_M2DF_CACHE`` or ``~/.cache/clip-m2df``, whose
            name holds a digest of all that the videos depend on.
        family: ``demo``, ``scene``, ``order`` or ``mixed``.
        knobs: how much harder than usual the videos of the test split are; with any, only that split is rendered.
            Where there are outliers, each video gets an outlying version, for the support of episodes.
        videos_per_class: how many videos a class has, by split; by default 20, 12 and 16 in ``demo`` and 30 elsewhere.
            Twins come in addition.
        seed: another seed gives other videos of the same classes.
        workers: how many processes render, by default as many as there are cores; 1 uses this process alone. The
            videos do not depend on it.
        progress: whether to show a progress bar.

    Returns:
        The path of ``manifest.csv`` with columns ``path`` (relative to its folder), ``label``, ``split`` and, where
        there are twins, ``group``.

    Raises:
        UserError: there is no such family, the counts or the seed make no sense, or ``root`` holds something else.
    """
    if family not in FAMILIES:
        raise UserError(f"motion_shapes has no family {family!r}; choose from {', '.join(FAMILIES)}")
    counts = _count(family, knobs, videos_per_class, seed)
    key = _key(family, knobs, counts, seed)
    own = os.environ.get("CLIP_M2DF_CACHE")
    cache = Path(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "clip-m2df")).expanduser()
    target = cache / f"motion_shapes_{family}-{key}" if root is None else Path(root)
    if _finished(target, key):
        return target / "manifest.csv"
    if root is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} holds something other than these videos; name an empty or a new folder")

    with _replacing(target, key) as folder:
        rows, jobs = [("path", "label", "split", *(["group"] if knobs.twins else []))], []
        for index, c in enumerate(FAMILIES[family]):
            for number in range(counts[c.split]):
                recording = _Job(folder, index, number)
                # Of a smaller share among those of a larger one.
                has_twins = _generator(recording, family, seed, 0).random() < knobs.twins
                for cut in range(CUTS if has_twins else 1):
                    path = f"{c.split}/{c.slug}/{number:02d}{f'_{cut}' if cut else ''}.mp4"
                    rows.append((path, c.label, c.split, *([f"{c.slug}/{number:02d}"] if knobs.twins else [])))
                    job = dataclasses.replace(recording, path=folder / path, cut=cut)
                    jobs.append(job)
                    if knobs.outliers:
                        outlying = folder / outlier_path(path)
                        jobs.append(dataclasses.replace(job, path=outlying, is_outlier=True))
        for parent in {job.path.parent for job in jobs}:
            parent.mkdir(parents=True)
        work = partial(_render_one, family=family, knobs=knobs, seed=seed)
        _render_all(work, jobs, workers or os.cpu_count() or 1, progress)
        (folder / "render.json").write_text(json.dumps({"key": key, "seed": seed, "videos_per_class": counts}) + "\n")
        write_table(folder / "manifest.csv", "manifest", rows)
    return target / "manifest.csv"


def _count(family: str, knobs: Knobs, videos_per_class: Mapping[str, int] | None, seed: int) -> dict[str, int]:
    """How many videos a class has, by split."""
    if videos_per_class is None:
        videos_per_class = VIDEOS_PER_CLASS[family]
    rendered = SPLITS if knobs == NO_KNOBS else ("test",)
    counts = {split: int(videos_per_class.get(split, 0)) if split in rendered else 0 for split in SPLITS}
    if unknown := set(videos_per_class) - set(SPLITS):
        raise UserError(f"videos_per_class names {sorted(unknown)}; the splits are {', '.join(SPLITS)}")
    if min(counts.values()) < 0 or not any(counts.values()) or seed < 0:
        raise UserError(f"videos_per_class ({counts}) and seed ({seed}) can't be negative, and some split needs videos")
    return counts


def _key(family: str, knobs: Knobs, counts: Mapping[str, int], seed: int) -> str:
    table = [(c.split, c.colour, c.shape, c.motion) for c in FAMILIES[family]]
    harder = [float(knobs.overlap), float(knobs.noise), knobs.outliers > 0]  # 0 and 0.0 are one setting
    harder += [float(knobs.twins)] if knobs.twins else []
    everything = [RENDERER_VERSION, SIZE, FPS, SECONDS, JITTER, dict(COLOURS), family, table, harder, counts, seed]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:12]


def _finished(folder: Path, key: str) -> bool:
    """Whether the folder holds the whole of just this rendering."""
    try:
        described = (folder / "manifest.csv").is_file() and (folder / "render.json").is_file()
        return described and json.loads((folder / "render.json").read_text())["key"] == key
    except (OSError, ValueError, KeyError):
        return False


@contextmanager
def _replacing(target: Path, key: str) -> Iterator[Path]:
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


def _render_all(work: Callable[[_Job], None], jobs: list[_Job], workers: int, progress: bool) -> None:
    from rich.progress import track

    workers = min(workers, len(jobs))
    # Processes are spawned, not forked: the caller may have threads of torch's running.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) if workers > 1 else nullcontext() as pool:
        done = pool.map(work, jobs, chunksize=8) if pool else map(work, jobs)
        try:
            for _ in track(done, "rendering motion_shapes", total=len(jobs), disable=not progress):
                pass
        except BrokenProcessPool as error:
            raise UserError(
                "a process that rendered motion_shapes ended early; a script that calls render() needs its code under "
                "`if __name__ == '__main__':`, or workers=1, which renders without further processes"
            ) from error


def outlier_path(path: str) -> str:
    """Where the outlying version of a test video lies: another folder in the place of ``test``."""
    video = PurePath(path)
    return str(video.parents[2] / "outliers" / video.parent.name / video.name)
