"""A small head and its clips, and what stands on a figure."""

from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor

from clip_m2df.nn.m2df import M2DFHead

NAMES = ["a cat", "a car", "a tree"]


def head(**options: Any) -> M2DFHead:
    torch.manual_seed(0)
    return M2DFHead(dim=16, hidden_dim=32, num_heads=4, **options).eval()


def clips(*shape: int, seed: int = 0) -> Tensor:
    """Noise of 16 x 16 pixels, uint8 ``(*shape, 3, 16, 16)``."""
    return torch.randint(0, 256, (*shape, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class _Recorder(RendererAgg):
    """Notes each line of text that is drawn, and where."""

    def __init__(self, figure: Figure) -> None:
        super().__init__(figure.bbox.width, figure.bbox.height, figure.dpi)  # type: ignore[no-untyped-call]
        self.lines: list[tuple[str, Bbox]] = []

    def draw_text(
        self, gc: Any, x: float, y: float, s: str, prop: Any, angle: float, ismath: Any = False, mtext: Any = None
    ) -> None:
        assert not ismath, f"{s} is an equation"
        width, height, _ = self.get_text_width_height_descent(s, prop, ismath)  # type: ignore[no-untyped-call]
        size = (width, height) if angle == 0 else (height, width)
        left = x if angle == 0 else x - height
        self.lines.append((s, Bbox.from_bounds(left, y - size[1], *size)))


def texts(*figures: Figure) -> list[str]:
    """The lines on figures, none of which lies on another."""
    found = []
    for figure in figures:
        recorder = _Recorder(figure)
        figure.draw(recorder)
        low, high = np.array([(box.min, box.max) for _, box in recorder.lines]).transpose(1, 0, 2)
        common = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
        # What is above a letter and below it is room to spare.
        pairs = np.argwhere((common > 4).all(-1))
        assert [(recorder.lines[i][0], recorder.lines[j][0]) for i, j in pairs if i < j] == []
        found += [text for text, _ in recorder.lines]
    return found


def colours(picture: Image.Image) -> dict[str, int]:
    """How many pixels have each colour, by the colour in hexadecimal digits."""
    found = picture.getcolors(maxcolors=1 << 24)
    assert found is not None
    return {"#{:02x}{:02x}{:02x}".format(*colour): count for count, colour in found}  # type: ignore[misc]
