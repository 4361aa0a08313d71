"""``clip-m2df prepare`` on 100,000 files, with 20 s and 1 GiB on 2 cores as its bars.

The plain version is the least there is to do: walk the tree and read the lists.
"""

import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.timing import Case, report, seconds

N_CLASSES = {"train": 64, "val": 12, "test": 24}
MOST_SECONDS, MOST_MIB = 20.0, 1024.0
EXTENSIONS = (".mp4", ".webm", ".avi", ".MP4", ".mkv.mp4")
# What names of real videos are made of.
FIRST = "-abcXYZ0189(['éü"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_- ()[]!'&,.éüß"


def cases(n_files: int = 100_000) -> Iterator[Case]:
    """One case; ``mebibytes`` is the most that the command took."""
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
    yield report(f"{n_files} files", ours, plain, found=found, mebibytes=mebibytes, within_bar=within)


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
