"""Eight frames of a video for evaluation, on one thread: each decoder, and the frame cache.

The plain version decodes with PyAV from the first frame to the last wanted one. ``to_fastest`` is the time of ``auto``
over that of the fastest decoder that gives the right frames.
"""

import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from benchmarks.clips import KINDS, Kind, render
from benchmarks.timing import Case, compare, report, seconds
from clip_m2df.commands.cache import cache_frames
from clip_m2df.errors import UserError
from clip_m2df.video.frame_cache import FrameCache
from clip_m2df.video.reader import Decoder, read_frames
from clip_m2df.video.transforms import segment_indices

MOST_TO_FASTEST = 1.2
N_ROUNDS = 15
OTHERS: tuple[Decoder, ...] = ("decord", "torchcodec")
TOLERANCE = 3.0  # mean difference of a pixel, of 255: decoders round the conversion to RGB in their own ways


def cases() -> Iterator[Case]:
    """Two cases a kind of clip: the decoders, and the cache."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, kind in enumerate(KINDS):
            path = str(render(folder / str(number), kind))
            yield time_decoders(kind, path)
            yield time_cache(kind, path, folder / f"cache{number}")


def choose(n_frames: int) -> list[int]:
    """Evaluation's frames."""
    return segment_indices(n_frames, 8)


def read_by(decoder: Decoder, path: str) -> Tensor:
    """Evaluation's frames as a decoder reads them."""
    return read_frames(path, choose, decoder=decoder)[0]


def time_decoders(kind: Kind, path: str) -> Case:
    """Time the decoders in turn; those that are wrong are left out, those that are not installed too."""
    n_frames = kind.seconds * kind.rate
    truth = read_plainly(path, choose(n_frames))
    readers: dict[str, Callable[[], Tensor]] = {"plain": partial(read_plainly, path, choose(n_frames))}
    for decoder in ("auto", *OTHERS):
        readers[decoder] = partial(read_by, decoder, path)
    more: dict[str, Any] = {}
    for decoder in OTHERS:
        try:
            difference = (readers[decoder]().float() - truth.float()).abs().mean((1, 2, 3)).max()
        except UserError:  # not installed, or its frames would be others
            del readers[decoder]
            continue
        if difference > TOLERANCE:
            more[decoder] = "wrong"
            del readers[decoder]
    exact = readers["auto"]().equal(truth)
    rounds = [{name: seconds(read) for name, read in readers.items()} for _ in range(N_ROUNDS)]
    medians = {name: statistics.median(times[name] for times in rounds) for name in readers}
    ours, plain = medians.pop("auto"), medians.pop("plain")
    # In each round of its own: a machine's speed wanders.
    to_fastest = max(
        1.0,
        *(statistics.median(times["auto"] / times[name] for times in rounds) for name in medians.keys() | {"plain"}),
    )
    within = exact and to_fastest <= MOST_TO_FASTEST
    return report(kind.name, ours, plain, **medians, **more, to_fastest=to_fastest, within_bar=within)


def time_cache(kind: Kind, path: str, cache: Path) -> Case:
    """Time reading the frames from a cache of the one video."""
    manifest = cache.with_suffix(".csv")
    manifest.write_text(f"path,label,split\n{path},a class,train\n", encoding="utf-8")
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        cache_frames(manifest=manifest, output=cache, short_side=256, frames=24, workers=1, timeout=60)
    kept = FrameCache.open(cache, manifest.parent)
    numbers = choose(kind.seconds * kind.rate)
    return compare(
        f"{kind.name}, cache", lambda: kept.read_frames(path, choose), lambda: read_plainly(path, numbers), calls=3
    )


def read_plainly(path: str, numbers: list[int]) -> Tensor:
    """Decode everything up to the last of the numbered frames, and convert those."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        pictures = []
        for number, frame in enumerate(container.decode(stream)):
            if number in numbers:
                pictures.append(frame.reformat(format="rgb24", threads=1).to_ndarray())
            if number == numbers[-1]:
                break
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
