"""``python -m benchmarks NAME [--json FILE] [--table FILE]``."""

import argparse
import importlib
import json
import sys
from pathlib import Path

from benchmarks.timing import line, table

NAMES = (
    "adapters",
    "dashboard",
    "decode",
    "evaluation",
    "evaluation_head",
    "gpu",
    "head",
    "matching",
    "own_videos",
    "predict",
    "prepare",
    "soak",
    "startup",
    "train_step",
)


def main() -> int:
    """Run a benchmark: a line a case, and all of them as JSON and as a table in Markdown if wanted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", type=Path, help="where to write the cases")
    parser.add_argument("--table", type=Path, help="where to write them as a table in Markdown")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--kills", type=int, help="of soak: how often each run is killed")
    options = parser.parse_args()
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    more = {} if options.kills is None else {"kills": options.kills}
    cases = []
    for case in importlib.import_module(f"benchmarks.{options.name}").cases(**more):
        cases.append(case)
        print(line(case), flush=True)
        # After each case: a run that is ended leaves what it has.
        if options.json is not None:
            options.json.write_text(json.dumps(cases, indent=2) + "\n", encoding="utf-8")
        if options.table is not None:
            options.table.write_text(table(cases), encoding="utf-8")
    return int(any(case.get("within_bar") is False for case in cases))


if __name__ == "__main__":
    sys.exit(main())
