"""Which frames of a video are seen, and which part of them: the same for every frame of a clip."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_m2df.errors import UserError


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
