"""Write tests/golden/trx.npz: the logits of TRX's published code on random features, with random weights.

    python scripts/golden_trx.py TRX

TRX is the folder of the published code (github.com/tobyperrett/trx). Replaced are only the GPU and torchvision, which
plays no part. The file has ``support (n_way, n_shot, frames, dim)``, ``query (n_queries, frames, dim)``, the weights of
pairs and of triples by their published names (``state/2.*`` and ``state/3.*``), and their logits ``pairs`` and
``triples (n_queries, n_way)``.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
WAY, SHOT, QUERIES, FRAMES, DIM, WIDTH = 4, 2, 3, 6, 10, 12


def main() -> None:
    """Run both transformers in evaluation mode, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", type=Path, help="the folder of the published code")
    sys.path.insert(0, str(parser.parse_args().published))
    sys.modules |= {"torchvision": mock.MagicMock(), "torchvision.models": mock.MagicMock()}
    from model import TemporalCrossTransformer  # type: ignore[import-not-found]

    torch.manual_seed(0)
    support, query = torch.randn(WAY, SHOT, FRAMES, DIM), torch.randn(QUERIES, FRAMES, DIM)
    found = {"support": support, "query": query}
    args = SimpleNamespace(
        seq_len=FRAMES, trans_linear_in_dim=DIM, trans_linear_out_dim=WIDTH, trans_dropout=0.1, way=WAY
    )
    labels = torch.arange(WAY).repeat_interleave(SHOT).float()
    with torch.no_grad(), mock.patch.object(torch.Tensor, "cuda", lambda self: self):
        for size, name in ((2, "pairs"), (3, "triples")):
            transformer = TemporalCrossTransformer(args, size).eval()
            for weight in transformer.parameters():  # the norm's too, which begin as 1 and 0
                weight.copy_(torch.randn_like(weight) / 2)
            found[name] = transformer(support.flatten(0, 1), labels, query)["logits"]
            found |= {f"state/{size}.{key}": weight for key, weight in transformer.named_parameters()}
    np.savez_compressed(GOLDEN / "trx.npz", **{key: value.detach().numpy() for key, value in found.items()})


if __name__ == "__main__":
    main()
