"""What is said of clips."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clip_m2df.classifier.clips import Clip, Unreadable, name_of
from clip_m2df.classifier.encoding import ClipEncoder, Encoded
from clip_m2df.classifier.support import NONE_OF_THESE, Scorer


class Prediction(NamedTuple):
    """What is said of a clip.

    Attributes:
        video: its path, or "" for frames in memory.
        label: its class, ``none of these``, or None where it can't be read.
        probability: of that class; NaN where there is none.
        probabilities: of every class; empty where the clip can't be read.
        distance: to the closest class; NaN where the clip can't be read.
        error: why it can't be read, or "".
    """

    video: str
    label: str | None
    probability: float
    probabilities: dict[str, float]
    distance: float
    error: str = ""


def label_clips(
    encoder: ClipEncoder, scorer: Scorer, names: Sequence[str], clips: Sequence[Clip], *, threshold: float | None
) -> Iterator[tuple[int, Prediction]]:
    """Label many clips.

    Args:
        encoder: of the clips.
        scorer: against the classes.
        names: of the classes.
        clips: what to label.
        threshold: the distance beyond which a clip is none of the classes; None rejects nothing.

    Yields:
        The place of each clip and what is said of it, as they are ready.
    """
    for batch in encoder.encode(clips):
        readable = [(place, found.features) for place, found in batch if isinstance(found, Encoded)]
        if readable:
            paths = [name_of(clips[place]) for place, _ in readable]
            said = label_features(scorer, names, paths, torch.stack([f for _, f in readable]), threshold)
            yield from zip([place for place, _ in readable], said, strict=True)
        for place, found in batch:
            if isinstance(found, Unreadable):
                yield place, Prediction(name_of(clips[place]), None, math.nan, {}, math.nan, str(found))


@torch.no_grad()
def label_features(
    scorer: Scorer, names: Sequence[str], paths: Sequence[str], features: Tensor, threshold: float | None
) -> list[Prediction]:
    """Label clips by their features ``(n, frames, dim)``; see :func:`label_clips`."""
    log_probabilities, distances = scorer.label(features)
    said = []
    for path, row, distance in zip(paths, log_probabilities.exp().tolist(), distances.amin(-1).tolist(), strict=True):
        probabilities = dict(zip(names, row, strict=True))
        label = max(probabilities, key=probabilities.__getitem__)
        if threshold is not None and distance > threshold:
            said.append(Prediction(path, NONE_OF_THESE, math.nan, probabilities, distance))
        else:
            said.append(Prediction(path, label, probabilities[label], probabilities, distance))
    return said
