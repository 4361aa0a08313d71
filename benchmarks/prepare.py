"""``clip-m2df prepare`` on 100,000 files, with 20 s and 1 GiB on 2 cores as its bars; then what reads its manifests.

The plain version of ``prepare`` is the least there is to do: walk the tree and read the lists. That of reading a
manifest of a million rows is ``csv.DictReader``, with 2.5 times its time and 500 MB as bars. That of ``clip-m2df
check`` with 2 workers, on the 968 videos of the embedded benchmark, is PyAV decoding all of them in 2 processes, with
1.5 times its time as the bar.
"""

import csv
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av

from benchmarks.timing import Case, compare, report, seconds
from clip_m2df.datasets.manifest import Manifest
from clip_m2df.motion_shapes import render

N_CLASSES = {"train": 64, "val": 12, "test": 24}
MOST_SECONDS, MOST_MIB = 20.0, 1024.0
EXTENSIONS = (".mp4", ".webm", ".avi", ".MP4", ".mkv.mp4")
# What names of real videos are made of.
FIRST = "-abcXYZ0189(['éü"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_- ()[]!'&,.éüß"


def cases(n_files: int = 100_000, n_rows: int = 1_000_000, n_videos: int | None = None) -> Iterator[Case]:
    """A case each; ``mebibytes`` is the most that the command, or the reading of the manifest, took.

    Args:
        n_files: Of ``prepare``.
        n_rows: Of the manifest.
        n_videos: Of ``check``, the first of the benchmark; all by default.
    """
    yield of_prepare(n_files)
    yield of_manifest(n_rows)
    yield of_check(n_videos)


def of_prepare(n_files: int) -> Case:
    """The case of ``clip-m2df prepare``."""
    with tempfile.TemporaryDirectory() as folder:
        root, lists, output = (Path(folder) / name for name in ("videos", "lists", "manifest.csv"))
        make_tree(root, lists, n_files, random.Random(0))
        options = ["--root", str(root), "--lists", str(lists), "--output", str(output)]
        command = [sys.executable, "-m", "clip_m2df", "prepare", "folder", *options]
        ours = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        found = len(output.read_text(encoding="utf-8").splitlines()) - 1
        plain = seconds(lambda: look(root, lists))
    mebibytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # kibibytes on Linux
    within = ours <= MOST_SECONDS and mebibytes <= MOST_MIB and found == n_files
    return report(f"{n_files} files", ours, plain, found=found, mebibytes=mebibytes, within_bar=within)


def of_manifest(n_rows: int) -> Case:
    """The case of reading a manifest without looking at its files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "manifest.csv")
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["path", "label", "split", "text"])
            for row in range(n_rows):
                c = row * 100 // n_rows
                label = f"Pretending to put [something], number {c}, behind [something]"
                split = "train" if c < 64 else "val" if c < 76 else "test"
                table.writerow([f"videos/{c:03}/{row:07}.webm", label, split, label.lower()])

        def plain() -> None:
            with path.open(encoding="utf-8", newline="") as file:
                for _ in csv.DictReader(file):
                    pass

        code = (
            "import resource, sys; from clip_m2df.datasets.manifest import Manifest\n"
            "kept = Manifest.read(sys.argv[1], check_files=False)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
        )
        command = [sys.executable, "-c", code, str(path)]
        mebibytes = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        within = mebibytes <= 500e6 / 2**20
        return compare(
            f"{n_rows} rows",
            lambda: Manifest.read(path, check_files=False),
            plain,
            repeat=5,
            calls=1,
            bar=1 / 2.5,
            mebibytes=mebibytes,
            within_bar=within,
        )


def of_check(n_videos: int | None) -> Case:
    """The case of ``clip-m2df check``."""
    manifest = Manifest.read(render())
    videos = manifest.videos[:n_videos]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "manifest.csv")
        Manifest(videos).write(path)
        options = ["--manifest", str(path), "--root", str(manifest.root), "--workers", "2"]
        command = [sys.executable, "-m", "clip_m2df", "check", *options]

        def ours() -> None:
            path.with_suffix(".check.csv").unlink(missing_ok=True)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def plain() -> None:
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                pool.map(decode, [video.path for video in videos], chunksize=8)

        return compare(f"check {len(videos)} videos", ours, plain, repeat=3, calls=1, bar=1 / 1.5)


def decode(path: str) -> int:
    """Decode a video to its end; how many frames it has."""
    with av.open(path) as container:
        container.streams.video[0].thread_count = 1
        return sum(1 for _ in container.decode(video=0))


def look(root: Path, lists: Path) -> int:
    """Walk the tree and read the lists; how many files and lines there are."""
    files = sum(len(names) for _, _, names in os.walk(root))
    return files + sum(len(path.read_text(encoding="utf-8").splitlines()) for path in lists.iterdir())


def make_tree(root: Path, lists: Path, n_files: int, rng: random.Random) -> None:
    """Make a tree of empty files, and lists that name each with other spaces and without extension.

    Args:
        root: The tree's folder.
        lists: The lists' folder.
        n_files: How many, a multiple of 100.
        rng: Source of the names.
    """
    lists.mkdir(parents=True)
    videos_in_class = n_files // sum(N_CLASSES.values())
    for split, n_classes in N_CLASSES.items():
        lines = []
        for c in range(n_classes):
            label = f"Doing something (number {c}) in {split}, but not all"
            folder = root / f"{split}_256" / label.replace(" ", "_")
            folder.mkdir(parents=True)
            for v in range(videos_in_class):
                # The last letters are the video's own, and no extension.
                name = f"{rng.choice(FIRST)}{''.join(rng.choices(LETTERS, k=rng.randint(5, 60)))}_v{c}_{v}"
                lines.append(f"{label}/{name}")
                spelled = name.replace(" ", "_") if rng.random() < 0.5 else name
                (folder / (spelled + rng.choice(EXTENSIONS))).touch()
        (lists / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
