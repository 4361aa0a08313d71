"""What twins do to random and to grouped episodes of motion_shapes: the table of docs/motion_shapes.md.

    python scripts/measure_twins.py FAMILY N_SHOT FOLDER [--model.head otam … | --ckpt_path FILE]

The benchmark without twins has the same recordings, of each one cut: in turn each of the five, so that each clip of the
benchmark with twins is in one of its five parts. Each number is of 10,000 episodes.
"""

import csv
import sys
from pathlib import Path

from clip_m2df.cli import main
from clip_m2df.datasets.manifest import Manifest
from clip_m2df.motion_shapes import CUTS, Knobs, render

EPISODES, QUERIES = 10_000, 5


def test(
    family: str, n_shot: str, manifest: Path, out: Path, dealt: str, count: int, seed: int, *more: str
) -> tuple[float, float]:
    """The accuracy in percent, and half the width of its interval."""
    options = {
        "config": f"{family}_5way{n_shot}shot.yaml",
        "data.manifest": str(manifest),
        "data.episodes": dealt,
        "data.test_episodes": count,
        "data.n_query_eval": QUERIES,
        "data.eval_seed": seed,
        "data.store": out.parent / "store",
        "trainer.default_root_dir": out,
        "trainer.enable_progress_bar": "false",
    }
    if main(["test", *(f"--{name}={value}" for name, value in options.items()), *more]):
        raise SystemExit(1)
    with (out / "test_metrics.csv").open(newline="") as file:
        metrics = {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}
    return 100 * metrics["test/accuracy"], 100 * metrics["test/interval"]


def run(family: str, n_shot: str, folder: Path, *more: str) -> None:
    """Play all, and print a line of each."""
    every = render(family=family, knobs=Knobs(twins=1))
    found = {}
    for dealt in ("random", "grouped"):
        out = folder / f"{family}_{n_shot}_{dealt}"
        found[dealt] = test(family, n_shot, every, out, dealt, EPISODES, 0, *more)
    whole, parts = Manifest.read(every), []
    for part in range(CUTS):
        # The cuts of a recording follow one another.
        chosen = [video for n, video in enumerate(whole.videos) if n % CUTS == (n // CUTS + part) % CUTS]
        own = every.with_name(f"without_twins_{part}.csv")
        Manifest(chosen, root=every.parent).write(own)
        out = folder / f"{family}_{n_shot}_without_{part}"
        parts.append(test(family, n_shot, own, out, "random", EPISODES // CUTS, 1 + part, *more))
    free = sum(a for a, _ in parts) / CUTS, sum(i * i for _, i in parts) ** 0.5 / CUTS
    print(f"{family}, {n_shot} shots: without twins {free[0]:.1f} ± {free[1]:.1f}")
    for dealt, (accuracy, interval) in found.items():
        more_by = f"{accuracy - free[0]:+.1f} ± {(interval**2 + free[1] ** 2) ** 0.5:.1f}"
        print(f"  {dealt} episodes {accuracy:.1f} ± {interval:.1f}, {more_by} points")


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
