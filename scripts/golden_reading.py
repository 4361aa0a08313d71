"""Write tests/golden/reading.npz: which frames CLIP-FSAR's and CLIP-M²DF's own code take of videos, and their pixels.

    python scripts/golden_reading.py CLIP-FSAR CLIP-MDMF

The arguments are the folders of https://github.com/alibaba-mmai-research/CLIP-FSAR and
https://github.com/cofly2014/CLIP-MDMF. Of their files only the functions and classes that choose, resize and crop are
run; what they import is not needed. In the place of ``random`` they get given uniforms, which are kept too.
"""

import ast
import numbers
import sys
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "reading.npz"
FRAMES, RESIZE, SIZE = 8, 256, 224
# Of videos of which the frames' numbers are kept; as frames a second go, one at which all are short for CLIP-FSAR.
LENGTHS, FPS = [*range(1, 61), 79, 80, 81, 123, 250, 299, 300], 30.0
# Frames, height and width of the videos of which pixels are kept: those at every 32nd row and column.
VIDEOS = [(40, 240, 427), (9, 426, 240), (80, 256, 256), (23, 120, 160), (300, 361, 643)]
SHOWN = slice(5, None, 32)


def frame(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """A frame of a video ``(height, width, 3)``, smooth at the upper left and busy elsewhere."""
    y, x, c = np.ogrid[:height, :width, :3]
    return np.asarray((3 * x * x + 5 * y * y + x * y * (number + 7) // 16 + 31 * number + 61 * c) % 256, np.uint8)


class Draws:
    """What stands for the module ``random``: it gives uniforms that are known.

    Args:
        uniforms: one a call.
    """

    def __init__(self, uniforms: Iterable[float]) -> None:
        self.left = list(uniforms)

    def random(self) -> float:
        """The next."""
        return self.left.pop(0)

    def uniform(self, least: float, most: float) -> float:
        """As Python defines it."""
        return least + (most - least) * self.random()

    def shuffle(self, items: list[Any]) -> None:
        """The same."""
        for last in range(len(items) - 1, 0, -1):
            other = int(self.random() * (last + 1))
            items[last], items[other] = items[other], items[last]

    def randint(self, least: int, most: int) -> int:
        """A whole number, both ends included."""
        if least > most:
            raise ValueError("no number is left")
        return least + int(self.random() * (most - least + 1))


def code_of(file: Path, names: Iterable[str], **known: Any) -> SimpleNamespace:
    """Run the definitions of some functions and classes of a file, and nothing else of it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    wanted: list[ast.stmt] = [
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in names
    ]
    exec(compile(ast.Module(wanted, []), str(file), "exec"), known)
    return SimpleNamespace(**{name: known[name] for name in names})


def clip_fsar_frames(folder: Path, rate: int, length: int, uniforms: Iterable[float], *, train: bool) -> list[int]:
    """The frames of a video by CLIP-FSAR; -1 each where its code fails."""
    file, data = folder / "datasets/base/base_dataset.py", SimpleNamespace(SAMPLING_RATE=rate, TARGET_FPS=12)
    code = code_of(file, ["_interval_based_sampling"], torch=torch, random=Draws(uniforms))
    own = SimpleNamespace(cfg=SimpleNamespace(DATA=data), split="train" if train else "test")
    try:
        chosen = code._interval_based_sampling(own, length, FPS, -1 if train else 0, 1, FRAMES, rate)
    except ValueError:
        return [-1] * FRAMES
    return list(map(int, chosen))


def m2df_frames(folder: Path, length: int, uniforms: Iterable[float], *, train: bool) -> list[int]:
    """The frames of a video by CLIP-M²DF's own code."""
    code = code_of(folder / "video_reader.py", ["get_seq"], np=np, random=Draws(uniforms))
    split = SimpleNamespace(get_rand_vid=lambda label, index: (list(range(length)), 0))
    own = SimpleNamespace(train=train, seq_len=FRAMES, args=SimpleNamespace(seq_len=FRAMES), transform=None)
    own.get_train_or_test_db, own.read_single_image = lambda: split, lambda number: number
    return list(map(int, code.get_seq(own, 0)[0]))


def clip_fsar_pixels(folder: Path, clip: NDArray[np.uint8], uniforms: Iterable[float]) -> NDArray[np.float32]:
    """A crop in grey levels ``(frames, 3, SIZE, SIZE)``; at random if there are uniforms, else of the centre."""
    draws = list(uniforms)
    names = ["KineticsResizedCropFewshot"]
    code = code_of(folder / "datasets/utils/transformations.py", names, torch=torch, random=Draws(draws))
    crop = code.KineticsResizedCropFewshot([RESIZE, RESIZE], SIZE, idx=-1 if draws else 0)
    # What torchvision's ToTensorVideo does.
    shown = crop(torch.from_numpy(clip).float().permute(3, 0, 1, 2) / 255.0)
    return np.asarray(255.0 * shown.permute(1, 0, 2, 3).numpy())


def colours(folder: Path, uniforms: NDArray[np.float64]) -> NDArray[np.float32]:
    """What CLIP-FSAR makes of the colours of two frames of 30 x 40 pixels, of which some: ``(frames, 3, 10, 10)``."""

    def in_turn(steps: Iterable[Any]) -> Any:
        return lambda clip: reduce(lambda shown, step: step(shown), steps, clip)

    names = ["_is_tensor_a_torch_image", "_blend", "rgb_to_grayscale", "_rgb2hsv", "_hsv2rgb", "ColorJitter"]
    names += [f"adjust_{what}" for what in ("brightness", "contrast", "saturation", "hue")]
    known = {"torch": torch, "numbers": numbers, "Compose": in_turn, "Lambda": lambda step: step}
    code = code_of(folder / "datasets/utils/transformations.py", names, random=Draws(uniforms.tolist()), **known)
    # The values of its configs/pool/base.yaml.
    jitter = code.ColorJitter(0.5, 0.5, 0.5, 0.25, 0.3, consistent=True, shuffle=True, gray_first=True)
    clip = torch.from_numpy(np.stack([frame(k, 30, 40) for k in range(2)])).float().permute(3, 0, 1, 2) / 255.0
    return np.asarray(255.0 * jitter(clip).permute(1, 0, 2, 3)[..., ::3, ::4].numpy())


def m2df_pixels(folder: Path, clip: NDArray[np.uint8], uniforms: Iterable[float]) -> NDArray[np.uint8]:
    """The same ``(frames, 3, SIZE, SIZE)``."""
    draws, own = list(uniforms), folder / "videotransforms"
    torchvision = SimpleNamespace()
    known: dict[str, Any] = {"PIL": PIL, "numbers": numbers, "np": np, "torchvision": torchvision}
    functions = code_of(own / "functional.py", ["crop_clip", "resize_clip", "get_resize_sizes"], **known)
    names = ["Compose", "Resize", "RandomHorizontalFlip", "RandomCrop", "CenterCrop"]
    code = code_of(own / "video_transforms.py", names, F=functions, random=Draws(draws), **known)
    steps = [code.RandomHorizontalFlip(), code.RandomCrop(SIZE)] if draws else [code.CenterCrop(SIZE)]
    images = code.Compose([code.Resize(RESIZE), *steps])([PIL.Image.fromarray(picture) for picture in clip])
    return np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)


def main(clip_fsar: Path, m2df: Path) -> None:
    """Write the file."""
    rng = np.random.default_rng(0)
    uniforms = rng.random((len(LENGTHS), FRAMES))
    lengths = list(zip(LENGTHS, uniforms.tolist(), strict=True))
    found: dict[str, Any] = {"lengths": LENGTHS, "uniforms": uniforms}
    for name, rate in (("random_segments", 50), ("window", 35)):
        for stage in ("train", "test"):
            train = stage == "train"
            rows = [clip_fsar_frames(clip_fsar, rate, n, own, train=train) for n, own in lengths]
            found[f"{name}/{stage}"] = np.array(rows, np.int16)
    for stage in ("train", "test"):
        rows = [m2df_frames(m2df, n, own, train=stage == "train") for n, own in lengths]
        found[f"linspace/{stage}"] = np.array(rows, np.int16)

    draws = rng.random((12, 8))
    found["colours/draws"], found["colours/pixels"] = draws, np.stack([colours(clip_fsar, row) for row in draws])

    found["videos"] = VIDEOS
    # Across and down for CLIP-FSAR; whether to flip, across and down for CLIP-M²DF.
    found["draws"] = draws = rng.random((len(VIDEOS), FRAMES + 3))
    found["draws"][:, FRAMES] = np.where(np.arange(len(VIDEOS)) % 2, 0.75, 0.25)
    for number, (length, height, width) in enumerate(VIDEOS):
        for stage in ("train", "test"):
            train = stage == "train"
            which, where = draws[number, :FRAMES], draws[number, FRAMES:] if train else draws[number, :0]
            for name, chosen, pixels in (
                ("squash", clip_fsar_frames(clip_fsar, 50, length, which, train=train), clip_fsar_pixels),
                ("short_side", m2df_frames(m2df, length, which, train=train), m2df_pixels),
            ):
                clip = np.stack([frame(k, height, width) for k in chosen])
                shown = pixels(clip_fsar if name == "squash" else m2df, clip, where[1:] if name == "squash" else where)
                found[f"{name}/{stage}/{number}/frames"] = np.array(chosen, np.int16)
                found[f"{name}/{stage}/{number}/pixels"] = shown[..., SHOWN, SHOWN]
                found[f"{name}/{stage}/{number}/mean"] = shown.mean((1, 2, 3), dtype=np.float64)
    np.savez_compressed(GOLDEN, **found)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
