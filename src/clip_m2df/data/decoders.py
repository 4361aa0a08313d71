"""The decoders that are a person's own choice: they seek, fast, on some containers to other frames than asked."""

from collections.abc import Callable

import torch
from torch import Tensor

from clip_m2df.data.video_errors import unreadable
from clip_m2df.errors import UserError


def read_decord(path: str, choose: Callable[[int], list[int]]) -> Tensor:
    """Read chosen frames with decord; as :func:`clip_m2df.data.video.read_frames`."""
    try:
        import decord
    except (ImportError, OSError) as error:
        raise _not_installed("decord") from error
    broken = (RuntimeError, AssertionError, IndexError, decord.DECORDError, decord.DECORDLimitReachedError)
    try:
        # More threads fail on some VP9 files. The reader lives as short as can be: it hangs after a fork.
        reader = decord.VideoReader(path, num_threads=1)
    except broken as error:
        raise unreadable(path, "decord cannot open it") from error
    wanted = choose(len(reader))
    numbers = sorted(set(wanted))
    try:
        pictures = reader.get_batch(numbers).asnumpy()
    except broken as error:
        raise unreadable(path, "decord cannot decode the wanted frames") from error
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)[[numbers.index(number) for number in wanted]]


def read_torchcodec(path: str, choose: Callable[[int], list[int]]) -> Tensor:
    """Read chosen frames with torchcodec; as :func:`clip_m2df.data.video.read_frames`."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # the last two where FFmpeg's libraries are not found
        raise _not_installed("torchcodec") from error
    try:
        video = VideoDecoder(path, seek_mode="exact", num_ffmpeg_threads=1)
    except (RuntimeError, ValueError) as error:
        raise unreadable(path, "torchcodec cannot open it") from error
    wanted = choose(len(video))
    numbers = sorted(set(wanted))
    try:
        frames: Tensor = video.get_frames_at(indices=numbers).data
    except (RuntimeError, ValueError, IndexError) as error:
        raise unreadable(path, "torchcodec cannot decode the wanted frames") from error
    return frames[[numbers.index(number) for number in wanted]]


def _not_installed(package: str) -> UserError:
    return UserError(
        f"decoder {package!r} needs the package {package}, which cannot be imported: install it, or use 'auto'"
    )
