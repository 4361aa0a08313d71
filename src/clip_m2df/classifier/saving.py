"""A fitted classifier in a folder: the model as on the hub, and its examples beside it.

``classifier.json`` has the classes and how clips are read, ``support.safetensors`` the features of the examples and
small frames of them; the checksum of the one is in the other.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from clip_m2df.classifier.support import SupportClass, check_names
from clip_m2df.errors import UserError, some
from clip_m2df.files import locked, read_bytes, sha256_of, whole_file
from clip_m2df.hub import CONFIG
from clip_m2df.training.module import CLIPM2DF

TABLE, SUPPORT = "classifier.json", "support.safetensors"
# Held while a classifier is written; the model's own, which is written within, is another.
LOCK = ".classifier.lock"
CLASSIFIER_FORMAT = "clip-m2df classifier 1"
# Frames and pixels beyond which a table is damaged.
MOST = 100_000


class SavedClass(NamedTuple):
    """A class as it is saved; see :class:`SupportClass`."""

    label: str
    text: str
    examples: list[str]
    features: Tensor
    thumbnails: Tensor


class Reading(NamedTuple):
    """How a classifier goes about a clip.

    Attributes:
        frames: of a clip.
        resize: short side of the frames in pixels before the crop.
        options: of the model, those that are no part of what was trained.
        threshold: the distance beyond which a clip is none of the classes, if it was set.
    """

    frames: int
    resize: int
    options: dict[str, Any]
    threshold: float | None = None


def check_folder(folder: Path) -> None:
    """Refuse to save among files that are no classifier's.

    Raises:
        UserError: the folder holds something else.
    """
    names = {path.name for path in folder.iterdir()} if os.path.isdir(folder) else set()
    ours = names & {TABLE, SUPPORT, LOCK}  # the latter two after an interrupted save, or during another
    if os.path.isfile(folder) or (names and not ours):
        raise UserError(f"{folder} holds something other than a classifier: name an empty or a new folder")


def write_classifier(folder: Path, model: CLIPM2DF, classes: Sequence[SupportClass], reading: Reading) -> None:
    """Write the examples, the model and, last, the classes of a classifier.

    Args:
        folder: where; see :func:`check_folder`.
        model: which goes by the examples.
        classes: at least one.
        reading: how the classifier goes about a clip.

    Raises:
        UserError: a file can't be written, or another process is about to.
    """
    with locked(folder / LOCK, "classifier", folder):
        _write(folder, model, classes, reading)


def _write(folder: Path, model: CLIPM2DF, classes: Sequence[SupportClass], reading: Reading) -> None:
    tensors = {
        "features": torch.cat([c.features.cpu() for c in classes]).contiguous(),
        "thumbnails": torch.cat([c.thumbnails.cpu() for c in classes]).contiguous(),
    }
    content = save_tensors(tensors)
    # All but the table is written before the first takes its place: at a full disk the classifier that was there stays.
    with whole_file(folder / TABLE, "classifier") as table_draft, whole_file(folder / SUPPORT, "examples") as draft:
        draft.write_bytes(content)
        model.save_pretrained(folder)
        table = {
            "format": CLASSIFIER_FORMAT,
            **reading._asdict(),
            "classes": [
                {"label": c.label, "text": c.text, "examples": [os.path.abspath(e) if e else "" for e in c.examples]}
                for c in classes
            ],
            "sha256": hashlib.sha256(content).hexdigest(),
            "model": sha256_of(folder / CONFIG),
        }
        # In ASCII: a file's name may have bytes that are no UTF-8.
        table_draft.write_bytes(f"{json.dumps(table, indent=2)}\n".encode())


def read_support(folder: Path) -> tuple[list[SavedClass], Reading]:
    """Read the classes of a classifier, and how it goes about a clip.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / TABLE
    if not path.is_file():
        raise UserError(f"{folder} holds no classifier: give a folder that FewShotClassifier.save wrote")
    content = read_bytes(folder / SUPPORT, "classifier's support")
    try:
        table = json.loads(read_bytes(path, "classifier's table"))
        if table["format"] != CLASSIFIER_FORMAT:
            raise ValueError(f"its format is {table['format']!r}, not {CLASSIFIER_FORMAT!r}")
        if hashlib.sha256(content).hexdigest() != table["sha256"]:
            raise ValueError(f"{SUPPORT} has another checksum")
        # Which has the checksum of the weights.
        if hashlib.sha256(read_bytes(folder / CONFIG, "model's description")).hexdigest() != table["model"]:
            raise ValueError(f"{CONFIG} is of another model than {TABLE}")
        reading = Reading(table["frames"], table["resize"], dict(table["options"]), table.get("threshold"))
        if not all(type(number) is int and 1 <= number <= MOST for number in reading[:2]):
            raise ValueError(f"it takes {reading.frames} frames of {reading.resize} pixels")
        # No others: the head is not for a table to choose.
        if not reading.options.keys() <= {"text_fusion", "selection"}:
            raise ValueError(f"its options are {some(map(repr, reading.options))}")
        if reading.threshold is not None and not (
            type(reading.threshold) in (int, float) and abs(reading.threshold) < math.inf
        ):
            raise ValueError(f"its threshold is {reading.threshold!r:.40}")
        return _classes(table, load_tensors(content)), reading
    except UserError as error:
        raise UserError(f"the classifier in {folder} is damaged: {error}") from error
    except Exception as error:  # whatever damage leads to has no common class
        raise UserError(f"the classifier in {folder} is damaged ({error}): fit and save it again") from error


def _classes(table: dict[str, Any], tensors: dict[str, Tensor]) -> list[SavedClass]:
    rows = [(row["label"], row["text"], list(row["examples"])) for row in table["classes"]]
    if not all(isinstance(name, str) and "\0" not in name for _, _, names in rows for name in names):
        raise ValueError("an example is not the name of a file")
    counts = [len(names) for _, _, names in rows]
    if not counts or 0 in counts or len({label for label, _, _ in rows}) < len(rows):
        raise ValueError("its classes have no examples, or one is there twice")
    for label, text, _ in rows:
        check_names(label, text)
    features, thumbnails = tensors["features"], tensors["thumbnails"]
    if not features.is_floating_point() or not features.isfinite().all() or not features.any(-1).all():
        raise ValueError("its features are not finite numbers, or those of a frame are zero")
    if thumbnails.dtype != torch.uint8 or thumbnails.ndim != 5 or thumbnails.shape[2] != 3 or 0 in thumbnails.shape:
        raise ValueError(f"its small frames are {thumbnails.dtype} {tuple(thumbnails.shape)}")
    parts = zip(rows, features.split(counts), thumbnails.split(counts), strict=True)
    return [SavedClass(*row, own.float(), small) for row, own, small in parts]
