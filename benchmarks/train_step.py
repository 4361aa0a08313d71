"""A training step, forward, backward and Adam, at the shapes of ViT-B/16 and RN50 with random weights; and its data.

On CUDA: bf16, 5-way with 5 queries a class, 8 frames of 224 pixels; 1 shot, and 5 shots with gradient checkpointing.
On a CPU a small one in float32, to see that it works. The plain version is float32, each video by itself in the tower.

``floor`` is the arithmetic of a step, three times that of a forward pass, at the measured speed of a large matrix
product of the same type, and ``share_of_peak`` that over the step's time. The last case compares the seconds that a
step waits for its batch when clips come from a frame cache with those when they are decoded.
"""

import contextlib
import gc
import itertools
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from benchmarks.ceilings import count_flops, matmul_speed
from benchmarks.clips import KINETICS, render
from benchmarks.timing import Case, report, seconds
from clip_m2df import CLIPM2DF, EpisodeDataModule
from clip_m2df.commands.cache import cache_frames
from clip_m2df.episode import Episode, IndexedEpisode

BAR_SHARE, BAR_WAITING, BAR_GIB = 0.45, 0.05, 20.0
# A tower's configuration but for the size of its images.
VIT_B16 = {
    "kind": "vit",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "patch_size": 16,
}
RN50 = {"kind": "resnet", "layers": [3, 4, 6, 3], "width": 64, "dim": 1024}
TOWERS = {"ViT-B/16": VIT_B16, "RN50": RN50}
E = TypeVar("E", Episode, IndexedEpisode)


@dataclass(frozen=True)
class Setting:
    """What a step is made of."""

    device: str
    dtype: torch.dtype
    size: int
    frames: int
    n_query: int
    n_shot: int = 1
    checkpointing: bool = False
    repeat: int = 20


ON_CUDA = Setting("cuda", torch.bfloat16, size=224, frames=8, n_query=5)
ON_CPU = Setting("cpu", torch.float32, size=32, frames=2, n_query=1, repeat=3)


def cases() -> Iterator[Case]:
    """A case a tower and a number of shots, and one of the data."""
    for measure in tasks():
        yield measure()


def tasks() -> list[Callable[[], Case]]:
    """What measures each case, so that one can fail by itself."""
    small = not torch.cuda.is_available()
    settings = [ON_CPU] if small else [ON_CUDA, replace(ON_CUDA, n_shot=5, checkpointing=True)]
    steps = [partial(time_step, tower, setting) for setting in settings for tower in TOWERS]
    return [*steps, partial(time_data, settings[0])]


class RandomCLIP(CLIPM2DF):
    """The model with random weights and prompts, without a text tower."""

    def __init__(self, tower: str, setting: Setting, **options: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(
                {"visual_config": {**TOWERS[tower], "image_size": setting.size}},
                **{"gradient_checkpointing": setting.checkpointing, **options},
            )
            self.prompts = torch.randn(5, self.model.backbone.dim).to(setting.device)

    def encode_prompts(self, class_names: Sequence[str]) -> Tensor:
        """The prompts of the five classes."""
        return self.prompts


class OneByOne(RandomCLIP):
    """The same with one video at a time through the tower."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Step on the features of a batch."""
        support, query = self._one_by_one(batch["support"]), self._one_by_one(batch["query"])
        return super().training_step(batch | {"support": support, "query": query}, batch_idx)

    def _one_by_one(self, videos: Tensor) -> Tensor:
        features: Tensor = torch.stack([self.model.encode_frames(video) for video in videos.flatten(0, -5)])
        return features.reshape(*videos.shape[:-3], -1)


class Step:
    """A training step that is repeated on batches."""

    def __init__(self, model: CLIPM2DF, device: str, dtype: torch.dtype) -> None:
        self.model = model.to(device).train()
        self.device = device
        self.autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
        self.optimizer = cast(dict[str, Any], model.configure_optimizers())["optimizer"]

    def __call__(self, batch: Episode) -> None:
        """Forward, backward, Adam."""
        self.forward(to_device(batch, self.device)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self, batch: Episode) -> Tensor:
        """The loss."""
        with self.autocast:
            return self.model.training_step(batch, 0)


def time_step(tower: str, setting: Setting) -> Case:
    """Time steps on one batch."""
    batch = to_device(random_batch(setting), setting.device)
    # One after the other, so that a peak of memory is of one alone.
    step = Step(RandomCLIP(tower, setting), setting.device, setting.dtype)
    flops = 3 * count_flops(partial(step.forward, batch))
    ours, memory = time_steps(step, batch, setting.repeat)
    del step
    plain, _ = time_steps(Step(OneByOne(tower, setting), setting.device, torch.float32), batch, setting.repeat)
    frames = sum(batch[role][..., 0, 0, 0].numel() for role in ("support", "query"))
    floor = flops / matmul_speed(setting.device, setting.dtype)
    share = floor / ours
    more: dict[str, Any] = {}
    if setting.device == "cuda":
        more["gib"] = memory
        if setting.checkpointing:
            more["within_bar"] = memory <= BAR_GIB
        elif tower == "ViT-B/16":
            more["within_bar"] = share >= BAR_SHARE
    return report(
        f"{tower}, 5-way {setting.n_shot}-shot",
        ours,
        plain,
        floor=floor,
        frames_per_s=frames / ours,
        episodes_per_s=1 / ours,
        share_of_peak=share,
        tflop=flops / 1e12,
        **more,
    )


def time_steps(step: Step, batch: Episode, repeat: int) -> tuple[float, float]:
    """Median seconds of a step, and the peak of a GPU's memory in GiB."""
    step(batch)
    if step.device == "cuda":
        gc.collect()  # what is left of earlier models is no part of the peak
        torch.cuda.reset_peak_memory_stats()
    median = statistics.median(seconds(lambda: step(batch)) for _ in range(repeat))
    return median, torch.cuda.max_memory_allocated() / 2**30 if step.device == "cuda" else 0.0


def random_batch(setting: Setting) -> Episode:
    """An episode of noise."""
    rng = torch.Generator().manual_seed(0)
    shape = (setting.frames, 3, setting.size, setting.size)
    queries = 5 * setting.n_query
    return Episode(
        support=torch.randint(256, (1, 5, setting.n_shot, *shape), generator=rng, dtype=torch.uint8),
        query=torch.randint(256, (1, queries, *shape), generator=rng, dtype=torch.uint8),
        query_labels=torch.arange(5).repeat_interleave(setting.n_query).unsqueeze(0),
        class_indices=torch.arange(5).unsqueeze(0),
        class_names=[str(c) for c in range(5)],
        draws=torch.rand(1, queries, generator=rng),
    )


def time_data(setting: Setting) -> Case:
    """Seconds that a step at ViT-B/16's shape waits for its batch, from a frame cache and from H.264."""
    step = Step(RandomCLIP("ViT-B/16", setting), setting.device, setting.dtype)
    step(random_batch(setting))
    workers = len(os.sched_getaffinity(0)) // 2
    prefetched = 2 * workers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = many_videos(folder, setting.n_shot + setting.n_query)
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            # An odd multiple of the frames, as evaluation wants it.
            options: dict[str, Any] = {"short_side": 256, "frames": 3 * setting.frames, "workers": workers}
            cache_frames(manifest=manifest, output=folder / "cache", timeout=60, **options)
        waits = {}
        for cache in (str(folder / "cache"), None):
            data = EpisodeDataModule(
                str(manifest),
                cache=cache,
                n_query=setting.n_query,
                frames=setting.frames,
                resize=setting.size * 256 // 224,
                size=setting.size,
                num_workers=workers,
                episodes_per_step=1,
            )
            data.setup("fit")
            batches = iter(data.train_dataloader())
            waits[cache] = [wait_and_step(step, batches) for _ in range(prefetched + setting.repeat)][prefetched:]
            del batches
    from_cache, from_videos = (statistics.mean(wait for wait, _ in times) for times in waits.values())
    per_step = statistics.mean(time for _, time in next(iter(waits.values())))
    share = from_cache / (from_cache + per_step)
    more = {"within_bar": share <= BAR_WAITING} if setting.device == "cuda" else {}
    return report("waiting for data, ViT-B/16", from_cache, from_videos, step=per_step, share_waiting=share, **more)


def wait_and_step(step: Step, batches: Iterator[Episode]) -> tuple[float, float]:
    """Seconds until a batch is there, and until the step with it is done."""
    batch: list[Episode] = []
    return seconds(lambda: batch.append(next(batches))), seconds(lambda: step(batch[0]))


def many_videos(folder: Path, n_videos: int) -> Path:
    """A manifest of five classes for training and five for validation, a 10 s H.264 clip in all places."""
    clip = render(folder / "clip", KINETICS)
    lines = ["path,label,split"]
    for split, c, v in itertools.product(("train", "val"), range(5), range(n_videos)):
        name = f"{split}{c}_{v}.mp4"
        shutil.copy(clip, folder / name)
        lines.append(f"{name},{split} {c},{split}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "manifest.csv"


def to_device(batch: E, device: str) -> E:
    """A batch on a device."""
    moved = {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }
    return cast(E, moved)
