"""Which frames of a video are seen, and which part of them: the same for every frame of a clip."""

import os
import warnings
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_m2df.errors import UserError
from clip_m2df.video.frame_cache import DamagedCacheError, FrameCache
from clip_m2df.video.reader import Decoder, read_frames


def segment_indices(n_frames: int, frames: int, offsets: Tensor | None = None) -> list[int]:
    """Choose one frame from each of equal segments of a video.

    The video is the real line from 0 to ``n_frames``, cut into ``frames`` equal segments. A video shorter than that
    repeats its frames evenly.

    Args:
        n_frames: Frames that the video has.
        frames: Frames that are wanted.
        offsets: Where in its segment each frame lies, from [0, 1), shape ``(frames,)``: uniforms choose at random, as
            in training; the middle by default, as in evaluation.

    Returns:
        The frame numbers, in order, each from 0 to ``n_frames - 1``.
    """
    if n_frames < 1 or frames < 1:
        raise ValueError(f"cannot choose {frames} of {n_frames} frames")
    within = [0.5] * frames if offsets is None else offsets.tolist()
    # Rounding can carry the end of the last segment to n_frames itself.
    return [min(int((k + u) * n_frames / frames), n_frames - 1) for k, u in zip(range(frames), within, strict=True)]


def resize_short_side(clip: Tensor, resize: int) -> Tensor:
    """Resize a clip by its short side; the aspect is kept.

    Args:
        clip: uint8 pixels, shape ``(frames, 3, height, width)``.
        resize: Length of the short side after resizing, in pixels.

    Returns:
        uint8 pixels; the clip itself where its short side has that length.
    """
    height, width = clip.shape[-2:]
    short = min(height, width)
    if short == resize:
        return clip
    # On uint8, as torchvision's Resize does, and three times faster than on floats.
    size = resize * height // short, resize * width // short
    return F.interpolate(clip, size=size, mode="bilinear", antialias=True)


def resize_and_crop(
    clip: Tensor, *, resize: int, size: int, position: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Tensor:
    """Resize a clip by its short side, then cut the same square out of every frame.

    Args:
        clip: uint8 pixels, shape ``(frames, 3, height, width)``.
        resize: Length of the short side after resizing, in pixels; the aspect is kept.
        size: Side of the square, in pixels.
        position: Where the square lies, down and across, from 0 (top, left) to 1 (bottom, right); 0.5 is the centre.
        flip: Whether to mirror the square, left to right.

    Returns:
        uint8 pixels, shape ``(frames, 3, size, size)``, contiguous.

    Raises:
        UserError: If the square is larger than the short side, or has no pixels.
    """
    if not 1 <= size <= resize:
        raise UserError(f"the crop's size is {size} and the short side's resize {resize}: set 1 <= size <= resize")
    if not all(0.0 <= share <= 1.0 for share in position):
        raise ValueError(f"the crop's position {position} is not within [0, 1]")
    clip = resize_short_side(clip, resize)
    height, width = clip.shape[-2:]
    top, left = round(position[0] * (height - size)), round(position[1] * (width - size))
    clip = clip[..., top : top + size, left : left + size]
    if flip:
        clip = clip.flip(-1)
    # A view would carry the whole resized clip from a worker to the trainer.
    return clip.contiguous(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class ClipReader:
    """Turns a video into the frames that the model sees.

    Attributes:
        frames: frames a video (T), one from each of as many equal segments.
        resize: short side in pixels before the crop.
        size: side of the square crop in pixels.
        flip: mirror half of the training clips. Off where classes have a left and a right.
        decoder: see :func:`clip_m2df.video.reader.read_frames`.
        cache: where the frames of videos are kept, if anywhere.
    """

    frames: int = 8
    resize: int = 256
    size: int = 224
    flip: bool = False
    decoder: Decoder = "auto"
    cache: FrameCache | None = None

    def read(self, path: str, uniforms: Tensor | None = None) -> tuple[Tensor, int]:
        """Decode, resize and crop.

        Args:
            path: the video, or a folder of numbered images.
            uniforms: ``(frames + 3)`` in [0, 1) for training: the frame in each segment, where the crop lies, whether
                to flip. Without them the middle frames and the centre crop.

        Returns:
            uint8 ``(frames, 3, size, size)``, and how many frames there were to choose from.

        Raises:
            VideoError: The video cannot be read.
            DamagedCacheError: Its frames in the cache are damaged, and the video itself is not there.
        """
        position, flip, offsets = (0.5, 0.5), False, None
        if uniforms is not None:
            offsets = uniforms[: self.frames]
            y, x, mirrored = uniforms[self.frames :].tolist()
            position, flip = (y, x), self.flip and mirrored < 0.5
        choose = partial(segment_indices, frames=self.frames, offsets=offsets)
        found = None
        try:
            found = self.cache.read_frames(path, choose) if self.cache else None
        except DamagedCacheError as error:
            if not os.path.exists(path):
                raise
            warnings.warn(f"{error}; meanwhile the videos themselves are read", stacklevel=2)
        clip, n_frames = found or read_frames(path, choose, decoder=self.decoder)
        return resize_and_crop(clip, resize=self.resize, size=self.size, position=position, flip=flip), n_frames
