"""Renders the clips that the benchmarks read: the codecs of the data sets, with pictures about as hard to code."""

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate


@dataclass(frozen=True)
class Kind:
    """How one kind of clip is rendered."""

    name: str
    suffix: str
    codec: str
    size: tuple[int, int]
    seconds: int
    rate: int
    options: dict[str, str] = field(default_factory=dict)


H264 = {"crf": "23", "preset": "medium"}
KINETICS = Kind("Kinetics-like H.264, GOP 250", ".mp4", "libx264", (340, 256), 10, 25, {**H264, "g": "250"})
KINDS = (
    KINETICS,
    Kind("H.264, GOP 12", ".mp4", "libx264", (340, 256), 10, 25, {**H264, "g": "12"}),
    Kind("SSv2-like VP9", ".webm", "libvpx-vp9", (427, 240), 4, 12, {"cpu-used": "4", "crf": "30", "b": "0"}),
    Kind("HMDB-like MPEG-4 ASP", ".avi", "mpeg4", (320, 240), 3, 30, {"bf": "0", "g": "250", "qscale": "4"}),
    Kind("UCF-like MPEG-4 ASP", ".avi", "mpeg4", (320, 240), 7, 25, {"bf": "0", "g": "250", "qscale": "4"}),
    Kind("MPEG-4 ASP, GOP 12", ".mp4", "mpeg4", (340, 256), 10, 25, {"bf": "2", "g": "12", "qscale": "4"}),
)


def render(path: Path, kind: Kind) -> Path:
    """Render a clip of a kind; the path has its suffix put on."""
    path = path.with_suffix(kind.suffix)
    noise = torch.randn(3, 80, 80, generator=torch.Generator().manual_seed(0))
    with av.open(str(path), "w") as container:
        options = {name: value for name, value in kind.options.items() if name != "qscale"}
        if kind.codec == "libx264":
            options["sc_threshold"] = "0"
        stream = container.add_stream(kind.codec, rate=kind.rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = kind.size
        stream.pix_fmt = "yuv420p"
        if "qscale" in kind.options:
            stream.codec_context.qmin = stream.codec_context.qmax = int(kind.options["qscale"])
        for number in range(kind.seconds * kind.rate):
            frame = av.VideoFrame.from_ndarray(picture(number, kind.size, noise), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, kind.rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def picture(number: int, size: tuple[int, int], noise: Tensor) -> NDArray[np.uint8]:
    """A picture, (height, width, 3), of smooth noise whose scales move in different directions."""
    width, height = size
    total = torch.full((3, height, width), 128.0)
    for cells, strength, direction in ((6, 60, 1), (24, 30, -2), (80, 12, 3)):
        layer = interpolate(noise[None, :, :cells, :cells], (height, width), mode="bicubic")[0]
        total += strength * layer.roll((direction * number, 2 * direction * number), (1, 2))
    return np.ascontiguousarray(total.clamp(0, 255).byte().permute(1, 2, 0).numpy())
