"""A fitted classifier in a folder: the model as on the hub, and its examples beside it.

``classifier.json`` has the classes and how clips are read, ``support.safetensors`` the features of the examples and
small frames of them; the checksum of the one is in the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from clip_m2df.classifier.support import SupportClass
from clip_m2df.errors import UserError
from clip_m2df.files import read_bytes, whole_file

TABLE, SUPPORT = "classifier.json", "support.safetensors"
FORMAT = "clip-m2df classifier 1"


class SavedClass(NamedTuple):
    """A class as it is saved; see :class:`SupportClass`."""

    label: str
    text: str
    examples: list[str]
    features: Tensor
    thumbnails: Tensor


def check_folder(folder: Path) -> None:
    """Refuse to save among files that are no classifier's.

    Raises:
        UserError: the folder holds something else.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / TABLE).exists()):
        raise UserError(f"{folder} holds something other than a classifier: name an empty or a new folder")


def write_support(folder: Path, classes: Sequence[SupportClass], *, frames: int, resize: int) -> None:
    """Write the classes of a classifier.

    Args:
        folder: where.
        classes: at least one.
        frames: of a clip.
        resize: short side of the frames in pixels before the crop.
    """
    tensors = {
        "features": torch.cat([c.features.cpu() for c in classes]).contiguous(),
        "thumbnails": torch.cat([c.thumbnails.cpu() for c in classes]).contiguous(),
    }
    content = save_tensors(tensors)
    with whole_file(folder / SUPPORT) as draft:
        draft.write_bytes(content)
    table = {
        "format": FORMAT,
        "frames": frames,
        "resize": resize,
        "classes": [{"label": c.label, "text": c.text, "examples": c.examples} for c in classes],
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    with whole_file(folder / TABLE) as draft:
        draft.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_support(folder: Path) -> tuple[list[SavedClass], int, int]:
    """Read the classes of a classifier, and ``frames`` and ``resize``.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / TABLE
    if not path.is_file():
        raise UserError(f"{folder} holds no classifier: give a folder that FewShotClassifier.save wrote")
    content = read_bytes(folder / SUPPORT, "classifier's support")
    try:
        table = json.loads(read_bytes(path, "classifier's table"))
        if table["format"] != FORMAT:
            raise ValueError(f"its format is {table['format']!r}, not {FORMAT!r}")
        if hashlib.sha256(content).hexdigest() != table["sha256"]:
            raise ValueError(f"{SUPPORT} has another checksum")
        return _classes(table, load_tensors(content)), int(table["frames"]), int(table["resize"])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError, RecursionError) as error:
        raise UserError(f"the classifier in {folder} is damaged ({error}): fit and save it again") from error


def _classes(table: dict[str, Any], tensors: dict[str, Tensor]) -> list[SavedClass]:
    rows = [(str(row["label"]), str(row["text"]), [str(name) for name in row["examples"]]) for row in table["classes"]]
    counts = [len(names) for _, _, names in rows]
    if not counts or 0 in counts or len({label for label, _, _ in rows}) < len(rows):
        raise ValueError("its classes have no examples, or one is there twice")
    features, thumbnails = (tensors[name].split(counts) for name in ("features", "thumbnails"))
    return [SavedClass(*row, f, t) for row, f, t in zip(rows, features, thumbnails, strict=True)]
