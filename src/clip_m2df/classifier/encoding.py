"""From clips to the features that a model has of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_m2df.classifier.clips import Clip, Unreadable, name_of, read_clips
from clip_m2df.data.episodes import ClipReader
from clip_m2df.errors import UserError
from clip_m2df.module import CLIPM2DF

# Clips that are encoded together.
CLIPS = 16
# Side of the small frames that are kept of a clip, in pixels.
THUMBNAIL = 64


class Encoded(NamedTuple):
    """A clip as the head sees it.

    Attributes:
        features: ``(frames, dim)``.
        thumbnail: uint8 ``(frames, 3, height, width)``, small frames.
    """

    features: Tensor
    thumbnail: Tensor


class ClipEncoder:
    """Reads clips and puts them through a model's tower.

    Args:
        model: in eval mode.
        frames: see :class:`clip_m2df.FewShotClassifier`.
        resize: the same.
        workers: the same.
        timeout: the same.

    Raises:
        UserError: an option out of its range.
    """

    def __init__(
        self, model: CLIPM2DF, *, frames: int | None, resize: int | None, workers: int, timeout: float
    ) -> None:
        size = model.model.backbone.image_size
        known = model.reading or {"frames": 8, "resize": size}
        frames = known["frames"] if frames is None else frames
        resize = known["resize"] if resize is None else resize
        if not isinstance(frames, int) or not isinstance(resize, int) or frames < 1 or resize < size:
            raise UserError(
                f"frames is {frames} and resize {resize}: set them to whole numbers, frames to 1 or more, and resize to"
                f" {size}, the side that the tower takes, or more"
            )
        if workers < 0 or not timeout > 0:
            raise UserError(f"workers is {workers} and timeout {timeout}: set them to 0 or more, and to more than 0")
        self.model = model
        self.reader = ClipReader(frames=frames, resize=resize, size=size)
        self.workers = workers
        self.timeout = timeout

    def encode(self, clips: Sequence[Clip]) -> Iterator[list[tuple[int, Encoded | Unreadable]]]:
        """The place of each clip with what it looks like to the model, or why it can't be read; some at once."""
        held: list[tuple[int, Tensor]] = []
        for place, found in read_clips(clips, self.reader, workers=self.workers, timeout=self.timeout):
            if isinstance(found, Unreadable):
                yield [(place, found)]
                continue
            held.append((place, found))
            if len(held) == CLIPS:
                yield self._together(held)
                held = []
        if held:
            yield self._together(held)

    def encode_one(self, clip: Clip) -> Encoded:
        """The same of one clip.

        Raises:
            UserError: it can't be read.
        """
        (((_, found),),) = self.encode([clip])
        if isinstance(found, Unreadable):
            raise UserError(f"the clip {name_of(clip) or 'in memory'} can't be read: {found}")
        return found

    @torch.no_grad()
    def frames(self, frames: Tensor) -> Tensor:
        """Features of uint8 frames ``(…, 3, size, size)``: ``(…, dim)``, on the model's device."""
        return self.model.model.encode_frames(frames.to(self.model.device))

    def _together(self, clips: Sequence[tuple[int, Tensor]]) -> list[tuple[int, Encoded | Unreadable]]:
        features = self.frames(torch.stack([frames for _, frames in clips]))
        return [(place, Encoded(f, _small(frames))) for (place, frames), f in zip(clips, features, strict=True)]


def _small(frames: Tensor) -> Tensor:
    """Frames ``(n, 3, size, size)`` of at most ``THUMBNAIL`` pixels a side."""
    if frames.shape[-1] <= THUMBNAIL:
        return frames
    return F.interpolate(frames, size=(THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True)


def placed(model: CLIPM2DF, device: str | None) -> CLIPM2DF:
    """Put a model where it is to run: by default on CUDA where there is any.

    Raises:
        UserError: there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} can't be used: {str(error).splitlines()[0]}") from error
