"""Use the installed package as its users do: train the demo for a few steps, and label clips, in a new folder.

``make check-wheel`` runs it with the Python of an environment into which only the wheel was installed.
"""

import csv
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import clip_m2df
from clip_m2df.datasets.manifest import read_class_texts
from clip_m2df.motion_shapes import render

N_WAY, N_SHOT, CLIPS = 4, 3, 2
LEAST_RIGHT = 0.5  # chance is a quarter


def main() -> int:
    """Run both commands; an error of either ends it."""
    if Path(clip_m2df.__file__).is_relative_to(Path(__file__).resolve().parents[1] / "src"):
        print("this is the source tree's package, not an installed wheel's", file=sys.stderr)
        return 1
    read_class_texts("texts/published/hmdb51.csv", ["draw_sword"], "HMDB51")  # which come with the package
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [str(Path(sys.executable).with_name("clip-m2df"))]
        fit = ["fit", "--config", "demo_5way1shot.yaml", "--trainer.max_steps", "4", "--data.val_episodes", "8"]
        subprocess.run([*command, *fit], cwd=folder, check=True)
        lay_out(render().parent / "test", folder)
        checkpoint = "runs/demo_5way1shot/checkpoints/last.ckpt"
        predict = ["predict", "--ckpt_path", checkpoint, "--support", "support", "--videos", "clips"]
        subprocess.run([*command, *predict, "--output", "predictions.csv"], cwd=folder, check=True)
        with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    right = sum(Path(row["path"]).name.startswith(f"{row['label']}-") for row in rows)
    print(f"{right} of {len(rows)} clips are labelled right")
    return int(len(rows) != N_WAY * CLIPS or right < LEAST_RIGHT * len(rows))


def lay_out(videos: Path, folder: Path) -> None:
    """Copy examples to ``support``, a folder a class, and other clips to ``clips``, whose names tell their class."""
    (folder / "clips").mkdir()
    # Classes that differ in colour or shape: a head that was hardly trained tells them apart.
    appearances = {"_".join(path.name.split("_")[:3]): path for path in sorted(videos.iterdir())}
    for of_class in list(appearances.values())[:N_WAY]:
        examples = folder / "support" / of_class.name
        examples.mkdir(parents=True)
        files = sorted(of_class.iterdir())
        for file in files[:N_SHOT]:
            shutil.copy(file, examples)
        for file in files[N_SHOT : N_SHOT + CLIPS]:
            shutil.copy(file, folder / "clips" / f"{of_class.name}-{file.name}")


if __name__ == "__main__":
    sys.exit(main())
