"""A fitted classifier in a folder: the model as on the hub, and its examples beside it.

``classifier.json`` has the classes and how clips are read; ``support.safetensors`` the features of the examples, small
frames of those that had frames, and the embeddings of prompts that came with a class. The checksum of the one is in the
other.
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
from clip_m2df.evaluation.conformal import Calibration
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
    text: str | None
    examples: list[str]
    features: Tensor
    thumbnails: list[Tensor | None]
    prompt: Tensor | None


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


def write_classifier(
    folder: Path,
    model: CLIPM2DF,
    classes: Sequence[SupportClass],
    reading: Reading,
    calibration: Calibration | None = None,
) -> None:
    """Write the examples, the model and, last, the classes of a classifier.

    Args:
        folder: where; see :func:`check_folder`.
        model: which goes by the examples.
        classes: at least one.
        reading: how the classifier goes about a clip.
        calibration: the classifier's own, in the place of the model's.

    Raises:
        UserError: a file can't be written, or another process is about to.
    """
    with locked(folder / LOCK, "classifier", folder):
        of_model, model.calibration = model.calibration, calibration
        try:
            _write(folder, model, classes, reading)
        finally:
            model.calibration = of_model


def _write(folder: Path, model: CLIPM2DF, classes: Sequence[SupportClass], reading: Reading) -> None:
    tensors = {"features": torch.cat([c.features.cpu() for c in classes]).contiguous()}
    if thumbnails := [small.cpu() for c in classes for small in c.thumbnails if small is not None]:
        tensors["thumbnails"] = torch.stack(thumbnails)
    if prompts := [c.prompt.cpu() for c in classes if c.text is None]:
        tensors["prompts"] = torch.stack(prompts)
    content = save_tensors(tensors)
    # All but the table is written before the first takes its place: at a full disk the classifier that was there stays.
    with whole_file(folder / TABLE, "classifier") as table_draft, whole_file(folder / SUPPORT, "examples") as draft:
        draft.write_bytes(content)
        model.save_pretrained(folder)
        table = {
            "format": CLASSIFIER_FORMAT,
            **reading._asdict(),
            "classes": [_row(c) for c in classes],
            "sha256": hashlib.sha256(content).hexdigest(),
            "model": sha256_of(folder / CONFIG),
        }
        # In ASCII: a file's name may have bytes that are no UTF-8.
        table_draft.write_bytes(f"{json.dumps(table, indent=2)}\n".encode())


def _row(saved: SupportClass) -> dict[str, Any]:
    """What the table says of a class; that examples have no frames only where some have none."""
    row: dict[str, Any] = {"label": saved.label, "text": saved.text}
    row["examples"] = [os.path.abspath(e) if e else "" for e in saved.examples]
    if without := [i for i, small in enumerate(saved.thumbnails) if small is None]:
        row["without_frames"] = without
    return row


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
        check_names(label, label if text is None else text)
    features, without = tensors["features"], [row.get("without_frames", []) for row in table["classes"]]
    if not features.is_floating_point() or not features.isfinite().all() or not features.any(-1).all():
        raise ValueError("its features are not finite numbers, or those of a frame are zero")
    thumbnails = tensors.get("thumbnails", torch.zeros((0, 1, 3, 1, 1), dtype=torch.uint8))
    if thumbnails.dtype != torch.uint8 or thumbnails.ndim != 5 or thumbnails.shape[2] != 3 or 0 in thumbnails.shape[1:]:
        raise ValueError(f"its small frames are {thumbnails.dtype} {tuple(thumbnails.shape)}")
    seen = [[i not in missing for i in range(n)] for n, missing in zip(counts, without, strict=True)]
    prompts = tensors.get("prompts", torch.zeros(0))
    if not prompts.is_floating_point() or len(prompts) != sum(text is None for _, text, _ in rows):
        raise ValueError("its prompts are not those of the classes without a text")
    if len(thumbnails) != sum(map(sum, seen)):
        raise ValueError("its small frames are not those of its examples")
    small, prompt = iter(thumbnails), iter(prompts.float())
    found = []
    for row, own, has_frames in zip(rows, features.split(counts), seen, strict=True):
        pictures = [next(small) if there else None for there in has_frames]
        found.append(SavedClass(*row, own.float(), pictures, next(prompt) if row[1] is None else None))
    return found
