"""Makes what has a calibration in this folder: ``calibrated.ckpt``, ``calibrated/`` and ``calibrated.npz``.

They are of the first version that had calibrations, made by ``PYTHONPATH=src:. python tests/saved/make_calibrated.py``.
Later versions are tested to load the first two and to give the sets in the third. Don't make them anew: should a
calibration be kept in another form one day, files of that version come beside these.

- ``calibrated.ckpt``: a checkpoint of a model for features, of width 8, whose head was not trained, with a calibration
  for 2 to 6 classes and 1 and 2 examples; its classes are too few for error rates below 1/13
- ``calibrated/``: a folder of ``FewShotClassifier.save`` of that model, with a calibration on classes of its own
- ``calibrated.npz``: ``support (3, 2, 4, 8)``, examples of the classifier's classes, and ``queries (24, 4, 8)``; by the
  ``errors``, ``checkpoint/sets`` and ``folder/sets (errors, 24, 4)``, whether a set has each class and, last, "none of
  these"; and of the checkpoint's calibration ``settings`` and ``thresholds``
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_m2df import CLIPM2DF, FewShotClassifier
from tests.conftest import save_checkpoint

HERE = Path(__file__).resolve().parent
ERRORS = (0.08, 0.1, 0.2, 0.35, 0.6)
LABELS = ("first", "second", "third")


def clips(rng: np.random.Generator, n_classes: int, n: int) -> Tensor:
    """Features of clips ``(n_classes, n, 4, 8)``, those of a class around a direction of its own."""
    directions = rng.standard_normal((n_classes, 1, 1, 8))
    return torch.from_numpy(directions + 0.8 * rng.standard_normal((n_classes, n, 4, 8))).float()


def sets_of(classifier: FewShotClassifier, queries: Tensor) -> NDArray[np.bool_]:
    """Whether the set of each query has each label, for each error rate."""
    labels = [*LABELS, "none of these"]
    found = [classifier.predict_sets(list(queries), error=error) for error in ERRORS]
    return np.array([[[label in one for label in labels] for one in sets] for sets in found])


def main(folder: Path) -> None:
    """Make all in a folder."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    options = {"hidden_dim": 16, "num_heads": 2, "pps": False, "reliability": []}
    model = CLIPM2DF("features", {"dim": 8}, head_options=options)
    model.reading = {"frames": 4, "resize": 36}
    of_val = clips(rng, 12, 5)
    videos = [range(5 * c, 5 * c + 5) for c in range(12)]
    model.calibration = model.calibrate(of_val.flatten(0, 1), torch.zeros(12, 8), videos, [1, 2], range(2, 7))
    assert model.calibration is not None
    save_checkpoint(model, folder / "calibrated.ckpt")

    own, further = clips(rng, 6, 6), clips(rng, 14, 6)
    support, queries = own[:3, :2], own[:, 2:].flatten(0, 1)
    classifier = FewShotClassifier.from_checkpoint(folder / "calibrated.ckpt", device="cpu")
    classifier.fit(dict(zip(LABELS, map(list, support), strict=True)))
    found = {"checkpoint/sets": sets_of(classifier, queries)}
    classifier.calibrate({f"further {c}": list(row) for c, row in enumerate(further)}).save(folder / "calibrated")
    found["folder/sets"] = sets_of(classifier, queries)
    kept = {name: getattr(model.calibration, name).numpy() for name in ("settings", "thresholds")}
    inputs = {"support": support.numpy(), "queries": queries.numpy(), "errors": np.array(ERRORS)}
    arrays: dict[str, Any] = inputs | found | kept
    np.savez_compressed(folder / "calibrated.npz", **arrays)


if __name__ == "__main__":
    main(HERE if len(sys.argv) < 2 else Path(sys.argv[1]))
