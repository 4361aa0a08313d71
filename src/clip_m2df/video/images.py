"""How pictures are meant to be seen: which way round, and in which order those of a folder."""

import io
import itertools
import math
import os
import re
import struct
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from PIL import ExifTags, Image

# What a file of a few kB can ask for: pixels that take gigabytes and minutes. A frame of 8K video has 33 million.
MOST_PIXELS = 64_000_000

# What often lies beside the frames of a video and is made from them, by a word of its name.
_COMPANIONS = re.compile(r"(?<![a-z])(alpha|depth|flow|masks?|matte|seg|segmentation|thumbs?|thumbnail)(?![a-z])")

_INTEGER = r"\d+"
_DECIMAL = r"(?<![\d.,])(?<!\.mp)\d+[.,]\d+(?![.,]?\d)"  # not a part of 1.2.3 or clip.mp4.5
_SCIENTIFIC = r"(?<![\d.,])\d+(?:[.,]\d+)?[eE][+-]?\d{1,3}(?![.,]?\d)"
_SIGN = re.compile(r"(?:(?<=[_\s=(])|^)-(?=\d)")
_FRACTIONAL = re.compile(f"{_SCIENTIFIC}|{_DECIMAL}")
_NUMBER = re.compile(f"{_SCIENTIFIC}|{_DECIMAL}|{_INTEGER}")
_SECONDS = re.compile(rf"(?:{_NUMBER.pattern}) ?(?:s|secs?|seconds?|(ms))(?![a-z])", re.IGNORECASE)


class Orientation(NamedTuple):
    """How a stored picture is meant to be seen.

    Attributes:
        mirrored: Whether it is mirrored left to right, before it is turned.
        degrees: By how much it is turned clockwise. What is not a multiple of 90 is not applied.
    """

    mirrored: bool = False
    degrees: int = 0

    @property
    def is_upright(self) -> bool:
        """Whether the width that is seen is the stored one."""
        return self.degrees not in (90, 270)

    def apply(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Mirror and turn the pixels of a picture, shape ``(height, width, 3)``."""
        picture = picture[:, ::-1] if self.mirrored else picture
        return picture if self.degrees % 90 else np.rot90(picture, -self.degrees // 90)


# By the values of the tag; others, and 1, are upright.
_EXIF = {
    2: Orientation(mirrored=True),
    3: Orientation(degrees=180),
    4: Orientation(mirrored=True, degrees=180),
    5: Orientation(mirrored=True, degrees=270),
    6: Orientation(degrees=90),
    7: Orientation(mirrored=True, degrees=90),
    8: Orientation(degrees=270),
}


class UnclearOrderError(ValueError):
    """The names of a folder's images don't tell which of them are the frames, or in which order."""


def order_images(names: Sequence[str]) -> list[str]:
    """Order the images of a folder by the numbers in their names, or by their letters where none has a number.

    Names that differ in more than their numbers, such as ``0.png`` and ``0_mask.png``, are of several kinds. Where
    kinds share numbers only one can be the video: that which its name does not call a mask, depth, flow or thumbnail.

    Raises:
        UnclearOrderError: If several kinds are left, two names have the same number, or a number can be read in
            several ways that give different orders.
    """
    parts = {name: re.split(r"(\d+)", _stem(name)) for name in names}
    templates = {"0".join(between[::2]).lower() for between in parts.values()}
    if len(templates) == 1 and not re.search(r"0[.,e]|-0", min(templates)):  # as nearly all are, and quick
        readings: list[dict[str, list[Any]]] = [{name: [*map(int, parts[name][1::2])] for name in names}]
    else:
        readings = _read_numbers(_choose_kind(names))
    # By the numbers in them, then by their letters.
    ordered, *others = [sorted(numbers, key=lambda name: (numbers[name], name)) for numbers in readings]
    for other in others:
        for first, second in zip(ordered, other, strict=True):
            if first != second:
                raise UnclearOrderError(
                    f"its images {first} and {second} have numbers that may be decimal or not, which gives two orders:"
                    " number them with integers"
                )
    for first, second in itertools.pairwise(ordered):
        numbers = readings[0][first]
        if numbers == readings[0][second] and (numbers or _stem(first) == _stem(second)):
            raise UnclearOrderError(f"its images {first} and {second} have the same number: leave one of them")
    return ordered


def _choose_kind(names: Sequence[str]) -> Sequence[str]:
    """Leave out what is made from the frames."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[_NUMBER.sub("0", _SIGN.sub("", _stem(name))).lower()].append(name)
    if len(kinds) == 1 or not any("0" in kind for kind in kinds):
        return names
    frames = [kind for kind in kinds if not _COMPANIONS.search(kind)] or list(kinds)
    numbers = [{tuple(_read(_stem(name), _NUMBER)) for name in kinds[kind]} for kind in frames]
    if len(set().union(*numbers)) < sum(map(len, numbers)) or len({kind.count("0") for kind in frames}) > 1:
        first, second = sorted(min(kinds[kind]) for kind in frames)[:2]
        raise UnclearOrderError(
            f"it has images of several kinds, such as {first} and {second}: leave only those of the video"
        )
    return [name for kind in frames for name in kinds[kind]]  # of several kinds, the numbers order them all the same


def _read_numbers(names: Sequence[str]) -> list[dict[str, list[Any]]]:
    """Read the numbers in names in each way in which they may be meant."""
    stems = {name: _stem(name) for name in names}
    if all(map(_SIGN.search, stems.values())):  # what every name has is not a sign
        stems = {name: _SIGN.sub("_", stem) for name, stem in stems.items()}
    forms = [re.compile(_INTEGER)]
    times = {name: _SECONDS.search(stem) for name, stem in stems.items()}
    if all(times.values()):
        forms = [_NUMBER]
        in_ms, others = ([name for name, time in times.items() if time and bool(time[1]) is ms] for ms in (True, False))
        if in_ms and others:
            raise UnclearOrderError(
                f"its images {in_ms[0]} and {others[0]} have times in ms and in s: number them with integers"
            )
    elif any(map(_FRACTIONAL.search, stems.values())):
        forms.append(_NUMBER)
    return [{name: _read(stem, form) for name, stem in stems.items()} for form in forms]


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _read(stem: str, form: re.Pattern[str]) -> list[int | Fraction]:
    """Read the numbers of a name."""
    found: list[int | Fraction] = []
    for match in form.finditer(stem):
        number = int(match[0]) if match[0].isdecimal() else Fraction(match[0].replace(",", "."))
        found.append(-number if _SIGN.match(stem, match.start() - 1) else number)
    return found


def matrix_orientation(frame: VideoFrame) -> Orientation:
    """Tell how a frame is meant to be seen by its display matrix, as FFmpeg's own display does it."""
    try:
        data: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know the type of what else there is, such as the tags of a picture
        return frame.opaque if isinstance(frame.opaque, Orientation) else Orientation(degrees=-frame.rotation % 360)
    if data is None:
        return Orientation()
    # x' = a x + c y, y' = b x + d y
    a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
    across, down = math.hypot(a, c), math.hypot(b, d)
    if not across or not down:  # it would leave no picture
        return Orientation()
    degrees = round(math.degrees(math.atan2(b / down, a / across))) % 360
    if degrees % 90:
        return Orientation(degrees=degrees)
    mirrored = {0: d < 0, 90: c > 0, 180: a < 0 <= d, 270: c < 0}[degrees]
    # A picture that is mirrored top to bottom is one that is mirrored left to right, upside down.
    return Orientation(mirrored, (degrees + 180) % 360 if mirrored else degrees)


# What is in an image with tags; the text of XMP itself may be compressed.
_TAGS = (b"Exif", b"eXIf", b"EXIF", b"exif", b"tiff:Orientation", b"XML:com.adobe.xmp", b"II*\0", b"MM\0*")


def exif_orientation(data: bytes) -> Orientation:
    """Tell how an image is meant to be seen by its tags, as Pillow does."""
    # Most have no such tag; looking for one in a PNG decodes it.
    if any(mark in data for mark in _TAGS):
        # Whatever Pillow finds in damaged tags, the picture itself may be sound.
        with suppress(Exception), warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            return _EXIF.get(image.getexif().get(ExifTags.Base.Orientation, 1), Orientation())
    return Orientation()


def excessive_size(image: str | io.BytesIO) -> str:
    """Return what the header of an image says of its size if it has more than MOST_PIXELS, for a message."""
    # Pillow itself refuses still larger ones, and names their pixels.
    with suppress(Exception), warnings.catch_warnings(action="ignore"):
        try:
            with Image.open(image) as opened:
                if opened.width * opened.height > MOST_PIXELS:
                    return f"{opened.width} x {opened.height} pixels"
        except Image.DecompressionBombError as error:
            return f"{int(re.findall('[0-9]+', str(error))[0]):,} pixels"
    return ""
