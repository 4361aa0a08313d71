"""Which frames of a video are seen, and which part of them: the same for every frame of a clip.

torch is imported when pixels are first resized, see :mod:`clip_m2df.video.reader`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import NDArray

from clip_m2df.episode import ResizeMode, Sampling
from clip_m2df.errors import UserError
from clip_m2df.video.frame_cache import DamagedCacheError, FrameCache
from clip_m2df.video.isolation import Unreadable
from clip_m2df.video.reader import Decoder, VideoError, as_clip, read_pictures

if TYPE_CHECKING:
    from torch import Tensor


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


def random_segment_indices(n_frames: int, frames: int, offsets: Tensor | None = None) -> list[int]:
    """Choose one frame from each of equal segments of whole frames, as CLIP-FSAR does on HMDB51, UCF101 and SSv2.

    The rule of ``_interval_based_sampling`` in its datasets/base/base_dataset.py with a ``SAMPLING_RATE`` above 40, in
    training and at test: segments of ``n_frames // frames`` frames, so that up to ``frames - 1`` frames at the end are
    never seen. It fails on a video with fewer than ``frames`` frames; here :func:`segment_indices` repeats them.

    Args:
        n_frames: Frames that the video has.
        frames: Frames that are wanted.
        offsets: Where in its segment each frame lies, from [0, 1), shape ``(frames,)``; the middle by default, for
            clips that are not part of an evaluation.

    Returns:
        The frame numbers, in order, each from 0 to ``n_frames - 1``.
    """
    length = n_frames // frames
    if length == 0:
        return segment_indices(n_frames, frames, offsets)
    within = [0.5] * frames if offsets is None else offsets.tolist()
    # Rounding can carry the end of a segment to the next.
    return [k * length + min(int(u * length), length - 1) for k, u in zip(range(frames), within, strict=True)]


# CLIP-FSAR's SAMPLING_RATE on Kinetics, in frames.
WINDOW_RATE = 35


def window_indices(n_frames: int, frames: int, offsets: Tensor | None = None) -> list[int]:
    """Choose evenly spaced frames of a video less its last 35, as CLIP-FSAR does on Kinetics.

    The rule of ``_interval_based_sampling`` in its datasets/base/base_dataset.py with a ``SAMPLING_RATE`` of 35 and a
    ``TARGET_FPS`` of 12, for videos of less than 23.3 seconds (8 · 35 / 12), as all of Kinetics are: the window is as
    many whole times ``frames`` as the video has, and starts up to ``n_frames % frames + 1`` frames late: at random in
    training, half as late at test. (Longer videos have there a window of 23.3 seconds, which needs their frame rate;
    here the window is the whole video.) Frames before the first count as the first: a video of less than 35 frames
    runs backwards.

    Args:
        n_frames: Frames that the video has.
        frames: Frames that are wanted, at least 2.
        offsets: The first says how late the window starts, from [0, 1); half as late as may be by default.

    Returns:
        The frame numbers, each from 0 to ``n_frames - 1``.
    """
    import torch

    length = n_frames // frames * frames
    latest = n_frames - length + 1
    start = latest * (0.5 if offsets is None else offsets[0].item())
    # In float32 and cut off, as there.
    return torch.linspace(start, start + length - WINDOW_RATE, frames).clamp(0, n_frames - 1).long().tolist()


def linspace_indices(n_frames: int, frames: int, offsets: Tensor | None = None) -> list[int]:
    """Choose evenly spaced frames from the beginning of a video to its end, as CLIP-M²DF's own code does.

    The rule of ``get_seq`` in its video_reader.py: at test from frame 1 to the last but one, in training from one of
    the first 6 frames to one of the last 6. Of videos that are hardly longer than ``frames`` all frames are evenly
    spaced. Videos with fewer than ``frames`` frames are not in its data set; here they repeat their frames evenly.

    Args:
        n_frames: Frames that the video has.
        frames: Frames that are wanted, at least 2.
        offsets: The first two, from [0, 1), choose the first and the last frame, as in training.

    Returns:
        The frame numbers, in order, each from 0 to ``n_frames - 1``.
    """
    first, last = 1, n_frames - 2
    if offsets is not None:
        jitter = max(int(min(5, (n_frames - frames) / 2)), 0)
        early, late = (min(int(u * (jitter + 1)), jitter) for u in offsets[:2].tolist())
        first, last = early, n_frames - 1 - jitter + late
    if last - first < frames:
        first, last = 0, n_frames - 1
    return [int(number) for number in np.linspace(first, last, frames)]


# By the names of the option. Each takes the number of frames, that of wanted frames, and uniforms or None.
SAMPLINGS: dict[Sampling, Callable[[int, int, Tensor | None], list[int]]] = {
    "segments": segment_indices,
    "random_segments": random_segment_indices,
    "window": window_indices,
    "linspace": linspace_indices,
}


def resize_clip(clip: Tensor, resize: int, mode: ResizeMode = "short_side") -> Tensor:
    """Resize a clip.

    ``short_side`` is bilinear and ``short_side_bicubic`` bicubic, both antialiased and with the aspect kept, as PIL and
    torchvision resize. ``squash`` makes every frame a square, bilinear and not antialiased: the rule of
    ``KineticsResizedCropFewshot`` in CLIP-FSAR's datasets/utils/transformations.py. Its pixels are floats there, and
    are rounded here.

    Args:
        clip: uint8 pixels, shape ``(frames, 3, height, width)``.
        resize: Length of the short side after resizing, in pixels; of both sides for ``squash``.
        mode: How.

    Returns:
        uint8 pixels; the clip itself where it has that size.
    """
    import torch
    import torch.nn.functional as F

    height, width = clip.shape[-2:]
    short = min(height, width)
    if mode == "squash":
        if height == width == resize:
            return clip
        # A frame at a time: that is twice as fast, with the floats of one in the processor's cache.
        squashed = (F.interpolate(frame.float(), size=(resize, resize), mode="bilinear") for frame in clip.split(1))
        return torch.cat([frame.round_().to(torch.uint8) for frame in squashed])
    if short == resize:
        return clip
    # On uint8, as torchvision's Resize does, and three times faster than on floats.
    size = resize * height // short, resize * width // short
    kind = "bicubic" if mode == "short_side_bicubic" else "bilinear"
    return F.interpolate(clip, size=size, mode=kind, antialias=True)


def resize_and_crop(
    clip: Tensor,
    *,
    resize: int,
    size: int,
    position: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    mode: ResizeMode = "short_side",
) -> Tensor:
    """Resize a clip, then cut the same square out of every frame.

    Args:
        clip: uint8 pixels, shape ``(frames, 3, height, width)``.
        resize: Length of the short side after resizing, in pixels.
        size: Side of the square, in pixels.
        position: Where the square lies, down and across, from 0 (top, left) to 1 (bottom, right); 0.5 is the centre.
        flip: Whether to mirror the square, left to right.
        mode: How the clip is resized, see :func:`resize_clip`.

    Returns:
        uint8 pixels, shape ``(frames, 3, size, size)``, contiguous.

    Raises:
        UserError: If the square is larger than the short side, or has no pixels.
    """
    if not 1 <= size <= resize:
        raise UserError(f"the crop's size is {size} and the short side's resize {resize}: set 1 <= size <= resize")
    if not all(0.0 <= share <= 1.0 for share in position):
        raise ValueError(f"the crop's position {position} is not within [0, 1]")
    clip = resize_clip(clip, resize, mode)
    height, width = clip.shape[-2:]
    # Cut off for squash as in CLIP-FSAR, whose crops never touch the lower and the right border.
    whole = int if mode == "squash" else round
    top, left = whole(position[0] * (height - size)), whole(position[1] * (width - size))
    clip = clip[..., top : top + size, left : left + size]
    if flip:
        clip = clip.flip(-1)
    # A view would carry the whole resized clip from a worker to the trainer.
    return clip.contiguous()


# Uniforms that jitter_colours takes.
JITTER_DRAWS = 8


def jitter_colours(clip: Tensor, uniforms: Tensor) -> Tensor:
    """Change the colours of a clip at random, all frames alike.

    The rule of ``ColorJitter`` in CLIP-FSAR's datasets/utils/transformations.py under the values of its
    configs/pool/base.yaml: three clips in ten turn grey; then brightness, contrast and saturation are multiplied by 0.5
    to 1.5 and the hue is turned by up to a quarter of its circle, in a random order.

    Args:
        clip: uint8 pixels, shape ``(frames, 3, height, width)``.
        uniforms: In [0, 1), shape ``(8)``: brightness, contrast, saturation, hue, three for the order, grey.

    Returns:
        uint8 pixels.
    """
    import torch

    *amounts, u, v, w, grey = uniforms.tolist()
    brightness, contrast, saturation = (0.5 + amount for amount in amounts[:3])
    steps: list[Callable[[Tensor], Tensor]] = [
        lambda x: _blend(x, torch.zeros(()), brightness),
        lambda x: _blend(x, _grey(x).mean((-2, -1), keepdim=True), contrast),
        lambda x: _blend(x, _grey(x), saturation),
        lambda x: _turn_hue(x, 0.5 * amounts[3] - 0.25),
    ]
    # As random.shuffle does.
    for last, draw in ((3, u), (2, v), (1, w)):
        other = int(draw * (last + 1))
        steps[last], steps[other] = steps[other], steps[last]
    pixels = clip.float() / 255
    if grey < 0.3:
        pixels = _grey(pixels).expand_as(pixels)
    for step in steps:
        pixels = step(pixels)
    return (255 * pixels).round_().to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    import torch

    return (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(-3, keepdim=True)


def _blend(pixels: Tensor, other: Tensor, share: float) -> Tensor:
    return (share * pixels + (1 - share) * other).clamp(0, 1)


def _turn_hue(pixels: Tensor, turn: float) -> Tensor:
    """Turn the hue of HSV by a share of its circle; value and chroma stay."""
    import torch

    red, green, blue = pixels.unbind(-3)
    value, chroma = pixels.amax(-3), pixels.amax(-3) - pixels.amin(-3)
    divisor = chroma.where(chroma > 0, 1.0)
    of_green = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixths = torch.where(value == red, (green - blue) / divisor, of_green) + 6 * turn
    channels = []
    for offset in (5, 3, 1):  # red, green, blue
        k = (offset + sixths) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, -3)


@dataclass(frozen=True)
class ClipReader:
    """Turns a video into the frames that the model sees.

    Attributes:
        frames: frames a video (T).
        resize: short side in pixels before the crop.
        size: side of the square crop in pixels.
        flip: mirror half of the training clips. Off where classes have a left and a right.
        decoder: see :func:`clip_m2df.video.reader.read_frames`.
        cache: where the frames of videos are kept, if anywhere.
        resize_mode: see :func:`resize_clip`.
        sampling: which frames: ``segments`` (:func:`segment_indices`), ``random_segments``
            (:func:`random_segment_indices`), ``window`` (:func:`window_indices`) or ``linspace``
            (:func:`linspace_indices`).

    Raises:
        UserError: an option that does not exist, or does not go with another.
    """

    frames: int = 8
    resize: int = 256
    size: int = 224
    flip: bool = False
    decoder: Decoder = "auto"
    cache: FrameCache | None = None
    resize_mode: ResizeMode = "short_side"
    sampling: Sampling = "segments"

    def __post_init__(self) -> None:
        for option, value, choices in (
            ("resize_mode", self.resize_mode, get_args(ResizeMode)),
            ("sampling", self.sampling, get_args(Sampling)),
        ):
            if value not in choices:
                raise UserError(f"{option}: there is no {value!r}; there are {', '.join(choices)}")
        if self.frames < 2 and self.sampling in ("window", "linspace"):
            raise UserError(f"frames is {self.frames}, but sampling {self.sampling} spaces at least 2: give more")
        if self.cache is not None and self.cache.resize_mode != self.resize_mode:
            raise UserError(
                f"resize_mode is {self.resize_mode}, but the frames in the cache were resized by"
                f" {self.cache.resize_mode}: give --data.resize_mode {self.cache.resize_mode}, or make another cache by"
                f" clip-m2df cache --resize_mode {self.resize_mode}"
            )

    def __repr__(self) -> str:
        """What decides the frames, for stored features; options that earlier versions lacked only if they differ."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}.items()
        later = {"resize_mode": "short_side", "sampling": "segments"}.items()
        own = (f"{name}={value!r}" for name, value in told if (name, value) not in later)
        return f"{type(self).__qualname__}({', '.join(own)})"

    @property
    def draws(self) -> bool:
        """Whether frames are drawn at evaluation too."""
        return self.sampling == "random_segments"

    def is_cached(self, path: str) -> bool:
        """Whether a video's frames come from the cache."""
        return self.cache is not None and self.cache.has(path, every_frame=self.sampling != "segments")

    def choose(self, n_frames: int, offsets: Tensor | None = None) -> list[int]:
        """The numbers of the frames that are seen of a video with so many; see :func:`segment_indices`."""
        return SAMPLINGS[self.sampling](n_frames, self.frames, offsets)

    def crop(self, clip: Tensor, position: tuple[float, float] = (0.5, 0.5), *, flip: bool = False) -> Tensor:
        """What is seen of frames, see :func:`resize_and_crop`."""
        return resize_and_crop(
            clip, resize=self.resize, size=self.size, position=position, flip=flip, mode=self.resize_mode
        )

    def decode(self, path: str, offsets: Tensor | None = None) -> tuple[NDArray[np.uint8], int]:
        """Decode the frames of a video that are seen, without torch but for those of ``window``.

        Args:
            path: the video, or a folder of numbered images.
            offsets: where in its segment each frame lies, see :func:`segment_indices`.

        Returns:
            uint8 ``(frames, height, width, 3)``, and how many frames there were to choose from.

        Raises:
            VideoError: The video cannot be read.
        """
        return read_pictures(path, partial(self.choose, offsets=offsets), decoder=self.decoder)

    def read(self, path: str, uniforms: Tensor | None = None) -> tuple[Tensor, int]:
        """Decode, resize and crop.

        Args:
            path: the video, or a folder of numbered images.
            uniforms: in [0, 1): ``(frames + 3)`` for training, which frames, where the crop lies, whether to flip;
                ``(frames)`` for an evaluation that draws its frames and has the centre crop. Without them the frames
                of an evaluation that draws nothing, and the centre crop.

        Returns:
            uint8 ``(frames, 3, size, size)``, and how many frames there were to choose from.

        Raises:
            VideoError: The video cannot be read.
            DamagedCacheError: Its frames in the cache are damaged, and the video itself is not there.
        """
        position, flip, offsets = (0.5, 0.5), False, None
        if uniforms is not None:
            offsets, rest = uniforms[: self.frames], uniforms[self.frames :]
            if len(rest):
                y, x, mirrored = rest.tolist()
                position, flip = (y, x), self.flip and mirrored < 0.5
        found = None
        try:
            if self.cache and self.is_cached(path):
                found = self.cache.read_frames(path, partial(self.choose, offsets=offsets))
        except DamagedCacheError as error:
            if not os.path.exists(path):
                raise
            warnings.warn(f"{error}; meanwhile the videos themselves are read", stacklevel=2)
        if found is None:
            pictures, n_frames = self.decode(path, offsets)
            found = as_clip(pictures), n_frames
        return self.crop(found[0], position, flip=flip), found[1]


# How many times longer than the short side the other may be for frames to be resized beside others.
MOST_ASPECT = 4


def read_isolated(
    reader: ClipReader, video: tuple[int, str], *, crop: bool
) -> tuple[NDArray[np.uint8], bool] | Unreadable:
    """Read a video in a worker process.

    Args:
        reader: how.
        video: its number, for whoever asks, and its path.
        crop: resize and crop too, which takes torch: a process that only decodes starts without it. Frames that are
            narrow strips are resized here anyway: that takes memory in the measure of their length.

    Returns:
        uint8 ``(frames, 3, size, size)`` and True, or ``(frames, height, width, 3)`` and False; or why there is
        nothing.
    """
    _, path = video
    try:
        if not crop:
            pictures, _ = reader.decode(path)
            height, width = pictures.shape[1:3]
            if max(height, width) <= MOST_ASPECT * min(height, width):
                return pictures, False
        return reader.read(path)[0].numpy(), True
    except VideoError as error:
        return Unreadable(error.reason_for(path))
    except UserError as error:
        return Unreadable(error)
