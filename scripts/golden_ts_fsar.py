"""Write tests/golden/ts_fsar.npz: the scores of TS-FSAR's matching, TS-DCM, by its published code, on random features.

    python scripts/golden_ts_fsar.py TS-FSAR

TS-FSAR is the folder of the published code (github.com/yaozhang0417/TS-FSAR). Its side network, which plays no part,
is replaced. The matching takes a class token and patches of each frame: here one patch, the class token itself. The
file has ``support (n_way, n_shot, frames, dim)``, ``query (n_queries, frames, dim)``, the weight ``generator`` and the
scores ``logits (n_queries, n_way)``, with one query a class.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
WAY, SHOT, FRAMES, DIM = 4, 3, 5, 12


def main() -> None:
    """Run the matching, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", type=Path, help="the folder of the published code")
    sys.path.insert(0, str(parser.parse_args().published))
    sys.modules |= {"trainers.model": mock.MagicMock(), "utils.logging": mock.MagicMock()}
    from trainers.ts_fsar import TS_DCM  # type: ignore[import-not-found]

    torch.manual_seed(0)
    support, query = torch.randn(WAY, SHOT, FRAMES, DIM), torch.randn(WAY, FRAMES, DIM)
    cfg = SimpleNamespace(TRAIN=SimpleNamespace(DC_ALPHA=0.4), DATA=SimpleNamespace(NUM_INPUT_FRAMES=FRAMES))
    matching = TS_DCM(cfg, DIM).eval()
    frames = torch.cat((support.reshape(-1, DIM), query.reshape(-1, DIM)))
    labels = torch.arange(WAY).repeat_interleave(SHOT)
    with torch.no_grad():
        logits = matching(torch.stack((frames, frames), 1), labels, WAY, SHOT, 1)[0]
    found = {"support": support, "query": query, "generator": matching.generator.weight, "logits": logits}
    np.savez_compressed(GOLDEN / "ts_fsar.npz", **{key: value.detach().numpy() for key, value in found.items()})


if __name__ == "__main__":
    main()
