"""What happens when in a long video: windows that slide over it, and the segments that they agree on."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_m2df.classifier.clips import Clip, ClipEncoder, as_frames, check_frames, has_features
from clip_m2df.classifier.support import ClassScorer
from clip_m2df.errors import UserError, require
from clip_m2df.video.isolation import Unreadable, isolated_stream, read_ahead
from clip_m2df.video.reader import as_clip, sample_pictures, unreadable
from clip_m2df.video.timing import count_samples, evenly_timed, exact_rate

# Frames that are resized and encoded together.
CHUNK = 16
# Frames a second that windows are made of at most, and that a video may have at least.
FASTEST, SLOWEST = 1000, 1 / 3600


class Segment(NamedTuple):
    """A stretch of a video with one label.

    Attributes:
        start: seconds from the video's beginning.
        end: the same.
        label: the class.
        probability: its mean over the segment.
        probabilities: the same of every class.
    """

    start: float
    end: float
    label: str
    probability: float
    probabilities: dict[str, float]


class Windows(NamedTuple):
    """How windows slide over a video: frames are shown at regular times, and windows share them.

    Attributes:
        frames: of a window, as many as of a clip.
        rate: frames a second.
        step: frames from one window to the next.
        smoothing: frames over which scores are averaged.
    """

    frames: int
    rate: float
    step: int
    smoothing: int

    @classmethod
    def of(cls, frames: int, window: float, stride: float | None, smoothing: float | None) -> Windows:
        """From seconds.

        Args:
            frames: of a window.
            window: its length.
            stride: from one window to the next, to the nearest multiple of the time between two frames; a quarter of
                the window by default.
            smoothing: over which scores are averaged; half the window by default.

        Raises:
            UserError: a length that makes no sense, or windows with gaps between them.
        """
        stride = window / 4 if stride is None else stride
        smoothing = window / 2 if smoothing is None else smoothing
        require(above=0, below=math.inf, window=window)
        require(least=frames / FASTEST, window=window)
        require(above=0, most=window, stride=stride)
        require(least=0, below=math.inf, smoothing=smoothing)
        rate = frames / window
        return cls(frames, rate, max(1, round(stride * rate)), max(1, round(smoothing * rate)))

    def starts(self, n_frames: int) -> list[int]:
        """The first frame of each window over a video of at least ``frames`` frames; the last ends with the video."""
        last = n_frames - self.frames
        return sorted({*range(0, last + 1, self.step), last})


@torch.no_grad()
def find_segments(
    encoder: ClipEncoder,
    scorer: ClassScorer,
    names: Sequence[str],
    video: Clip,
    windows: Windows,
    *,
    fps: float | None,
    threshold: float | None,
) -> list[Segment]:
    """Find what happens when in a video; see :meth:`clip_m2df.FewShotClassifier.segments`.

    Args:
        encoder: of the frames.
        scorer: of the windows.
        names: of its classes.
        video: a path, frames, or features of frames.
        windows: how they slide.
        fps: frames a second, where there are no times.
        threshold: the distance beyond which a moment is none of the classes.
    """
    encoder.check([video], any_length=True)
    if has_features(video):
        known = encoder.features_of(video, any_length=True)
        features = known[_numbers_at("features", len(known), windows.rate, fps)]
    else:
        encoded = []
        with closing(
            read_ahead(map(encoder.reader.crop, _frames_at(video, windows.rate, fps, encoder)), CHUNK)
        ) as cropped:
            while chunk := list(itertools.islice(cropped, CHUNK)):
                encoded.append(encoder.frames(torch.cat(chunk)))
        features = torch.cat(encoded) if encoded else torch.empty(0)
    if (n_frames := len(features)) < windows.frames:  # it is a clip, whose own frames repeat
        windows = windows._replace(rate=windows.rate * windows.frames / max(n_frames, 1))
        features = (
            known[encoder.reader.choose(len(known))] if has_features(video) else encoder.encode_one(video).features
        )
    starts = windows.starts(len(features))
    log_probabilities, distances = scorer.label(torch.stack([features[s : s + windows.frames] for s in starts]))
    values = torch.cat((log_probabilities, distances.amin(-1, keepdim=True)), -1).cpu()
    smoothed = smooth(values, starts, windows, len(features))
    scores, distance = smoothed[:, :-1], smoothed[:, -1]
    choices = scores.argmax(-1)
    if threshold is not None:
        choices[distance > threshold] = -1
    return join(choices.tolist(), scores.softmax(-1), names, windows.rate)


def _frames_at(video: Clip, rate: float, fps: float | None, encoder: ClipEncoder) -> Iterator[Tensor]:
    """The frames of a video at regular times, one by one: uint8 ``(1, 3, height, width)``.

    A file is read in a process of its own if the encoder has workers.

    Raises:
        UserError: the video can't be read, or frames without times come without ``fps``.
    """
    if not isinstance(video, str | os.PathLike):
        frames = check_frames(video)
        yield from (as_frames(frames, [number]) for number in _numbers_at("frames in memory", len(frames), rate, fps))
        return
    if fps is not None:
        exact_rate("fps", fps)
        require(least=SLOWEST, fps=fps)
    read = partial(sample_pictures, os.fspath(video), rate, fps=fps)
    for picture in isolated_stream(read, timeout=encoder.timeout) if encoder.workers else read():
        if isinstance(picture, Unreadable):
            raise unreadable(os.fspath(video), picture)
        yield as_clip(picture[None])


def _numbers_at(what: str, n_frames: int, rate: float, fps: float | None) -> list[int]:
    """Which frames of a video without times of its own are shown at regular times.

    Raises:
        UserError: there is no ``fps``.
    """
    if fps is None:
        raise UserError(f"{what} have no times: give fps, how many of them make a second")
    exact_rate("fps", fps)
    require(least=SLOWEST, fps=fps)
    shown = count_samples(evenly_timed(range(n_frames), exact_rate("fps", fps)), exact_rate("rate", rate))
    return [number for number, count in shown for _ in range(count)]


def smooth(values: Tensor, starts: Sequence[int], windows: Windows, n_frames: int) -> Tensor:
    """From values of windows ``(windows, n)`` to values of frames ``(frames, n)``.

    A frame has the mean of the windows that it is in, then of its neighbours within ``smoothing``; at both ends of the
    video of as many as there are.
    """
    total = values.new_zeros((n_frames, values.shape[1]))
    count = values.new_zeros((n_frames, 1))
    for start, value in zip(starts, values, strict=True):
        total[start : start + windows.frames] += value
        count[start : start + windows.frames] += 1
    means = total / count
    width = 2 * (min(windows.smoothing, 2 * n_frames) // 2) + 1
    padded = F.pad(torch.cat((means, torch.ones_like(count)), -1).T, (width // 2, width // 2))
    summed = F.avg_pool1d(padded, width, stride=1)
    return (summed[:-1] / summed[-1:]).T


def join(choices: Sequence[int], probabilities: Tensor, names: Sequence[str], rate: float) -> list[Segment]:
    """Segments from what was chosen for each frame; where that is no class, there is no segment.

    Args:
        choices: of each frame an index in ``names``, or -1.
        probabilities: ``(frames, n_way)``.
        names: of the classes.
        rate: frames a second.
    """
    found = []
    end = 0
    for chosen, run in itertools.groupby(choices):
        start, end = end, end + len(list(run))
        if chosen >= 0:
            means = probabilities[start:end].mean(0).tolist()
            by_name = dict(zip(names, means, strict=True))
            found.append(Segment(start / rate, end / rate, names[chosen], means[chosen], by_name))
    return found
