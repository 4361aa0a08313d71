"""The study behind docs/results.md.

Usage: python -m study run [--quick] [--workers N]
       python -m study render [--quick]
       python -m study coverage [--quick] [--workers N]

``run`` runs what is not done yet, and renders the page; ``render`` renders it from the results that there are. With
``--quick``, in minutes: a small study of the same shape, kept apart under runs/study_quick. A line of results is of its
settings, not of the code: after a change of the method, remove those that it concerns.

``coverage`` measures on each family how often sets of labels hold the truth, over 1,000 draws of classes and clips;
with ``--quick`` over 50. ``render`` then shows it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from clip_m2df.errors import UserError
from clip_m2df.files import read_bytes
from clip_m2df.motion_shapes import FAMILIES
from study.coverage import run_coverage
from study.page import render
from study.results import read_coverage, read_results
from study.schedule import current, run_study
from study.settings import Settings

ROOT = Path(__file__).parents[1]
FINDINGS = Path(__file__).with_name("findings.md")


def main(arguments: list[str]) -> int:
    """Run a command line; 2 where a person has to mend something, 130 where somebody stopped it."""
    parser = argparse.ArgumentParser(
        prog="python -m study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=("run", "render", "coverage"))
    parser.add_argument("--quick", action="store_true", help="the small study, without what was found")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    quick = ROOT / "runs/study_quick"
    results, docs = (quick / "results.jsonl", quick) if options.quick else (ROOT / "study/results.jsonl", ROOT / "docs")
    try:
        settings = Settings.read(ROOT / f"configs/study/{'quick' if options.quick else 'full'}.yaml")
        findings = "" if options.quick else read_bytes(FINDINGS, "text of the findings").decode()
        if options.command != "render":
            # Spawned: torch's threads don't survive a fork.
            pool = ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn"))
            try:
                if options.command == "coverage":
                    sets, draws = results.with_name("coverage.jsonl"), 50 if options.quick else 1000
                    run_coverage(tuple(FAMILIES), settings, sets, ROOT / "runs/study", draws, pool)
                    return 0
                run_study(settings, results, ROOT / "runs/study", pool)
            except BaseException:
                for worker in multiprocessing.active_children():
                    worker.kill()  # a Trainer only takes note of the signal that terminates
                raise
            finally:
                pool.shutdown(cancel_futures=True)
        sets = results.with_name("coverage.jsonl")
        render(current(settings, read_results(results)), findings, docs, read_coverage(sets) if sets.exists() else [])
    except UserError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study: stopped; the same command goes on with the runs that are not done", file=sys.stderr)
        return 130
    print(f"the page is {docs / 'results.md'}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
