"""Labelling clips on one machine: a plain script, reading beside the tower, and workers.

The plain script decodes with PyAV up to the last wanted frame, converts and resizes the wanted frames alone, and
compares what transformers' tower makes of them, a clip at a time, with prototypes by cosines. Both have the same random
weights of the size of ViT-B/16, and the same precision; ``off`` is how far their probabilities lie apart. In bf16
``to_float32`` is our time over that of the plain script in float32.

Stand-ins that sleep tell how far reading and encoding overlap: ``ours`` is the pipeline's time from its first clip to
its last, ``plain`` that of the slower of the two alone.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from benchmarks.clips import KINETICS, Kind, render
from benchmarks.decode import read_plainly
from benchmarks.timing import Case, compare, report, seconds
from benchmarks.train_step import ON_CPU, RandomCLIP
from clip_m2df import CLIPM2DF, FewShotClassifier
from clip_m2df.classifier.clips import PRECISIONS, ClipEncoder
from clip_m2df.clip.families.clip import MEAN, STD
from clip_m2df.nn.baselines import NearestPrototypeHead
from clip_m2df.video.transforms import ClipReader, segment_indices

KINDS = (KINETICS, replace(KINETICS, name="720p H.264, GOP 250", size=(1280, 720)))
SHORT = replace(KINETICS, name="short", size=(64, 48), seconds=1, rate=12)
BAR, MOST_TO_FLOAT32, BAR_OVERLAP, MOST_OFF = 1.0, 0.55, 1 / 1.1, 0.02
FRAMES, N_WAY = 8, 5


def cases(
    tower: str = "ViT-B/16",
    kinds: Sequence[Kind] = KINDS,
    *,
    n_clips: int = 4,
    n_short: int = 200,
    n_overlap: int = 64,
    size: int = 224,
    repeat: int = 3,
    sleep: float = 0.05,
    device: str = "cpu",
    workers: int = 0,
) -> Iterator[Case]:
    """Two cases a kind of clip, float32 and bf16; one a way of reading with stand-ins; and short clips by workers.

    Args:
        tower: its name in :mod:`benchmarks.train_step`.
        kinds: of clips.
        n_clips: of each kind.
        n_short: short clips.
        n_overlap: clips of the stand-ins, more than are scored together.
        size: side of the tower's images.
        repeat: how often each is timed.
        sleep: seconds that the stand-in reads a clip.
        device: of both towers.
        workers: of our classifier where it is timed against the plain script.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting = replace(ON_CPU, size=size, device=device)
        model = RandomCLIP(tower, setting, head="nearest_prototype", freeze_backbone=True).to(device)
        prototypes = torch.randn(N_WAY, FRAMES, model.model.backbone.dim, generator=torch.Generator().manual_seed(1))
        plain = Plain(model, prototypes)
        for kind in kinds:
            clips = copies(render(folder / kind.name, kind), n_clips)
            yield time_labels(kind, model, plain, clips, "32-true", repeat, workers)
            if torch.cuda.is_bf16_supported() if device == "cuda" else has_bf16():
                yield time_labels(kind, model, plain, clips, "bf16-mixed", repeat, workers)
        for readers in (0, 2):
            yield time_overlap(readers, sleep, n_overlap)
        yield time_workers(copies(render(folder / "short", SHORT), n_short), repeat)


def has_bf16() -> bool:
    """Whether the CPU has instructions for bf16, as far as Linux tells."""
    facts = Path("/proc/cpuinfo")
    flags = facts.read_text(encoding="utf-8").split() if facts.exists() else []
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))


def copies(clip: Path, count: int) -> list[str]:
    """As many files of the same content."""
    paths = [clip.with_name(f"{clip.stem} {number}{clip.suffix}") for number in range(count)]
    return [str(shutil.copy(clip, path)) for path in paths]


class Plain:
    """The plain script.

    Args:
        model: whose weights transformers' tower gets.
        prototypes: of the classes, ``(n_way, frames, dim)``.
    """

    def __init__(self, model: CLIPM2DF, prototypes: Tensor) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        own = model.model.backbone
        config = {name: value for name, value in own.visual_config.items() if name != "kind"}
        self.model: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        self.model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
        self.model.load_state_dict({n.removeprefix("model."): w for n, w in own.visual.state_dict().items()})
        self.model.to(model.device)  # type: ignore[arg-type]
        self.size, self.prototypes = model.image_size, prototypes.to(model.device)
        self.mean, self.std = (torch.tensor(channels, device=model.device).view(3, 1, 1) for channels in (MEAN, STD))

    def label(self, clips: Sequence[str], precision: str) -> Tensor:
        """Probabilities of the classes ``(clips, n_way)``."""
        return torch.stack([self.label_one(clip, precision) for clip in clips])

    @torch.no_grad()
    def label_one(self, clip: str, precision: str) -> Tensor:
        """The same of one clip."""
        with av.open(clip) as container:
            n_frames = container.streams.video[0].frames
        frames = read_plainly(clip, segment_indices(n_frames, FRAMES)).to(self.mean.device)
        height, width = frames.shape[-2:]
        short = min(height, width)
        size = self.size * height // short, self.size * width // short
        frames = interpolate(frames, size, mode="bilinear", antialias=True)
        top, left = round((size[0] - self.size) / 2), round((size[1] - self.size) / 2)
        frames = frames[..., top : top + self.size, left : left + self.size]
        half = PRECISIONS[precision]
        with torch.autocast(self.mean.device.type, half, enabled=half is not None):
            features = self.model((frames / 255 - self.mean) / self.std).image_embeds
        cosines = cosine_similarity(features.float().mean(0), self.prototypes.mean(1), dim=-1)
        return (NearestPrototypeHead.logit_scale * cosines).softmax(-1)


def time_labels(
    kind: Kind, model: CLIPM2DF, plain: Plain, clips: Sequence[str], precision: str, repeat: int, workers: int
) -> Case:
    """Time labels, by our classifier and by the plain script."""
    classifier = FewShotClassifier(model, frames=FRAMES, precision=precision, workers=workers)
    classifier.fit({f"class {number}": [features] for number, features in enumerate(plain.prototypes.cpu())})
    off = np.abs(classifier.predict_proba(clips) - plain.label(clips, precision).cpu().numpy()).max()
    times: list[tuple[float, float, float]] = []
    for _ in range(repeat):  # in turn: a machine's speed wanders
        ours = seconds(lambda: classifier.predict(clips))
        of_plain = seconds(lambda: plain.label(clips, precision))
        full = of_plain if precision == "32-true" else seconds(lambda: plain.label(clips, "32-true"))
        times.append((ours, of_plain, full))
    ratio = statistics.median(plain / ours for ours, plain, _ in times)
    to_float32 = statistics.median(ours / full for ours, _, full in times)
    ours, of_plain = (statistics.median(column) for column in list(zip(*times, strict=True))[:2])
    more = {"ratio": ratio, "to_float32": to_float32, "off": float(off)}
    within = off <= MOST_OFF and (precision == "32-true" or to_float32 <= MOST_TO_FLOAT32)
    name = f"{len(clips)} clips, {kind.name}, {precision}"
    return report(name, ours, of_plain, bar=BAR, within_bar=bool(within), **more)


@dataclass(frozen=True)
class SlowReader(ClipReader):
    """Stands in for a decoder.

    Attributes:
        sleep: seconds a clip.
    """

    sleep: float = 0.0

    def decode(self, path: str, offsets: Tensor | None = None) -> tuple[NDArray[np.uint8], int]:
        """Black frames."""
        time.sleep(self.sleep)
        return np.zeros((self.frames, self.size, self.size, 3), np.uint8), self.frames


class SlowEncoder(ClipEncoder):
    """Stands in for a tower: ``sleep`` seconds a clip."""

    sleep = 0.0

    def frames(self, frames: Tensor) -> Tensor:
        """Features of ones."""
        time.sleep(self.sleep * len(frames))
        return torch.ones(*frames.shape[:2], 64)


def time_overlap(workers: int, sleep: float, n_clips: int) -> Case:
    """Time the pipeline of two stand-ins of the same speed."""
    each = sleep / max(workers, 1)
    encoder = SlowEncoder(CLIPM2DF("tiny", head="nearest_prototype"), frames=FRAMES, resize=None, workers=workers)
    encoder.reader = SlowReader(frames=FRAMES, resize=encoder.reader.size, size=encoder.reader.size, sleep=sleep)
    encoder.sleep = each
    ends = [(time.perf_counter(), len(batch)) for batch in encoder.encode([f"{n}.mp4" for n in range(n_clips)])]
    n_after = sum(count for _, count in ends[1:])
    name = f"reading and encoding, {workers} workers"
    return report(name, ends[-1][0] - ends[0][0], each * n_after, bar=BAR_OVERLAP)


def time_workers(clips: Sequence[str], repeat: int) -> Case:
    """Time short clips with two workers, from their start to their end, and without any."""
    model = CLIPM2DF("tiny", head="nearest_prototype", freeze_backbone=True)
    ours, plain = (
        FewShotClassifier(model, workers=workers).fit({"a": clips[:1], "b": clips[1:2]}) for workers in (2, 0)
    )
    name = f"{len(clips)} short clips, 2 workers against none"
    return compare(name, lambda: ours.predict(clips), lambda: plain.predict(clips), repeat=repeat, calls=1)
