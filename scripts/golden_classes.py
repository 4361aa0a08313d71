"""Write tests/golden/published_classes.json: the classes of each data set as the published code bases name them.

    python scripts/golden_classes.py CLIP-FSAR CLIP-MDMF

The arguments are the folders of https://github.com/alibaba-mmai-research/CLIP-FSAR and
https://github.com/cofly2014/CLIP-MDMF. Both list the classes of training and test, in their configs, and none of
validation; a prompt is "a photo of " before the name.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "published_classes.json"
FOLDERS = {name: name for name in ("hmdb51", "kinetics100", "ssv2_small", "ucf101")} | {"ssv2": "ssv2_full"}


def main(code_bases: Sequence[str]) -> None:
    """Read the names, of which both code bases and all of a data set's configs have to have the same."""
    found = {}
    for dataset, folder in FOLDERS.items():
        names = set()
        for base in code_bases:
            configs = sorted(Path(base, "configs/projects/CLIPFSAR", folder).glob("*.yaml"))
            for config in [yaml.safe_load(path.read_text(encoding="utf-8")) for path in configs]:
                names.add(tuple(sorted(config["TRAIN"]["CLASS_NAME"] + config["TEST"]["CLASS_NAME"])))
        (found[dataset],) = names
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
