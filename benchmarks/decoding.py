"""Times reading evaluation's 8 frames with each installed decoder: ``auto``'s bar is 1.2 times the fastest exact one.

Run as ``python benchmarks/decoding.py``; ends with status 1 over the bar.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from torch.nn.functional import interpolate

from clip_m2df.data.transforms import segment_indices
from clip_m2df.data.video import Decoder, read_frames
from clip_m2df.errors import UserError

MOST_RATIO = 1.2
N_ROUNDS = 15
DECODERS: tuple[Decoder, ...] = ("auto", "decord", "torchcodec")
TOLERANCE = 3.0  # mean difference of a pixel, of 255: decoders round the conversion to RGB in their own ways


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
KINDS = (
    Kind("HMDB-like MPEG-4 avi", ".avi", "mpeg4", (320, 240), 3, 30, {"bf": "0", "g": "250", "qscale": "4"}),
    Kind("UCF-like MPEG-4 avi", ".avi", "mpeg4", (320, 240), 7, 25, {"bf": "0", "g": "250", "qscale": "4"}),
    Kind("SSv2-like VP9 webm", ".webm", "libvpx-vp9", (427, 240), 4, 12, {"cpu-used": "4", "crf": "30", "b": "0"}),
    Kind("Kinetics-like H.264 mp4", ".mp4", "libx264", (340, 256), 10, 25, {**H264, "g": "250", "sc_threshold": "0"}),
    Kind("H.264 mp4, GOP 12", ".mp4", "libx264", (340, 256), 10, 25, {**H264, "g": "12"}),
    Kind("MPEG-4 ASP mp4, GOP 12", ".mp4", "mpeg4", (340, 256), 10, 25, {"bf": "2", "g": "12", "qscale": "4"}),
)


def picture(number: int, size: tuple[int, int], noise: Tensor) -> NDArray[np.uint8]:
    """Return a picture, (height, width, 3), of smooth noise whose scales move in different directions."""
    width, height = size
    total = torch.full((3, height, width), 128.0)
    for cells, strength, direction in ((6, 60, 1), (24, 30, -2), (80, 12, 3)):
        layer = interpolate(noise[None, :, :cells, :cells], (height, width), mode="bicubic")[0]
        total += strength * layer.roll((direction * number, 2 * direction * number), (1, 2))
    return np.ascontiguousarray(total.clamp(0, 255).byte().permute(1, 2, 0).numpy())


def render(folder: Path, kind: Kind) -> Path:
    """Render a clip of a kind into a folder."""
    path = folder / f"{KINDS.index(kind)}{kind.suffix}"
    noise = torch.randn(3, 80, 80, generator=torch.Generator().manual_seed(0))
    with av.open(str(path), "w") as container:
        options = {name: value for name, value in kind.options.items() if name != "qscale"}
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


def choose(n_frames: int) -> list[int]:
    """Evaluation's frames."""
    return segment_indices(n_frames, 8)


def read_from_the_start(path: Path) -> Tensor:
    """Read the frames as they come when every frame is decoded: the truth."""
    frames = read_frames(str(path), range)
    return frames[choose(len(frames))]


def time_decoders(path: Path) -> tuple[dict[Decoder, float], dict[Decoder, bool]]:
    """Return each decoder's median milliseconds, and whether it is exact; the decoders alternate."""
    truth = read_from_the_start(path)
    seconds: dict[Decoder, list[float]] = {decoder: [] for decoder in DECODERS}
    is_exact: dict[Decoder, bool] = {}
    for _ in range(N_ROUNDS):
        for decoder in [*seconds]:
            started = time.perf_counter()
            try:
                clip = read_frames(str(path), choose, decoder=decoder)
            except UserError:  # it is not installed
                del seconds[decoder]
                continue
            seconds[decoder].append(time.perf_counter() - started)
            difference = (clip.float() - truth.float()).abs().mean((1, 2, 3)).max().item()
            is_exact[decoder] = difference <= (0 if decoder == "auto" else TOLERANCE)
    return {decoder: 1000 * statistics.median(times) for decoder, times in seconds.items()}, is_exact


def main() -> int:
    """Measure, print, and compare with the bar."""
    torch.set_num_threads(1)
    table = Table(Column("median ms", no_wrap=True), *DECODERS, f"ratio (bar {MOST_RATIO})")
    is_over = False
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            medians, is_exact = time_decoders(render(Path(folder), kind))
            ratio = medians["auto"] / min(median for decoder, median in medians.items() if is_exact[decoder])
            is_over |= ratio > MOST_RATIO or not is_exact["auto"]
            cells = [
                f"{medians[decoder]:.1f}{'' if is_exact[decoder] else ' (wrong)'}" if decoder in medians else "-"
                for decoder in DECODERS
            ]
            table.add_row(kind.name, *cells, f"{ratio:.2f}")
    Console().print(table)
    return int(is_over)


if __name__ == "__main__":
    sys.exit(main())
