"""Times ``clip-m2df prepare`` on 100,000 files: the bar is 20 s and 1 GiB on 2 cores.

Run as ``python benchmarks/prepare.py``; ends with status 1 over the bar.
"""

import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

N_FILES = 100_000
N_CLASSES = {"train": 64, "val": 12, "test": 24}
MOST_SECONDS, MOST_MIB = 20.0, 1024.0
EXTENSIONS = (".mp4", ".webm", ".avi", ".MP4", ".mkv.mp4")
# What names of real videos are made of.
FIRST = "-abcXYZ0189(['éü"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_- ()[]!'&,.éüß"


def make_tree(root: Path, lists: Path, rng: random.Random) -> None:
    """Make a tree of empty files, and lists that name each with other spaces and without extension.

    Args:
        root: The tree's folder.
        lists: The lists' folder.
        rng: Source of the names.
    """
    lists.mkdir(parents=True)
    videos_in_class = N_FILES // sum(N_CLASSES.values())
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


def main() -> int:
    """Measure, print, and compare with the bar."""
    with tempfile.TemporaryDirectory() as folder:
        root, lists, output = (Path(folder) / name for name in ("videos", "lists", "manifest.csv"))
        make_tree(root, lists, random.Random(0))
        options = ["--root", str(root), "--lists", str(lists), "--output", str(output)]
        started = time.perf_counter()
        command = [sys.executable, "-m", "clip_m2df", "prepare", "folder", *options]
        status = subprocess.run(command, check=False).returncode
        seconds = time.perf_counter() - started
        if status or len(output.read_text(encoding="utf-8").splitlines()) != 1 + N_FILES:
            print(f"prepare ended with status {status}, or did not find every file")
            return 1
    # Kibibytes on Linux.
    mebibytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{N_FILES} files: {seconds:.1f} s (bar {MOST_SECONDS:.0f}), {mebibytes:.0f} MiB (bar {MOST_MIB:.0f})")
    return int(seconds > MOST_SECONDS or mebibytes > MOST_MIB)


if __name__ == "__main__":
    sys.exit(main())
