"""A training step with a frozen tower, with LoRA's adapters in it, and of a whole one: parameters, memory, seconds.

ViT-B/16 with random weights, under autocast to bfloat16, on frames of 224 pixels; by default an episode is 5-way 1-shot
with a query a class and 2 frames a video, so that 20 frames go through the tower. ``gib`` is the peak of the memory of
a process that takes two steps of Adam, all that it has imported included; on CUDA, of the GPU's memory. ``plain`` are
the seconds of the first case, a whole tower.
"""

import multiprocessing
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.timing import Case, report
from benchmarks.train_step import RandomCLIP, Setting, Step, random_batch, time_steps

ADAPTERS = {"r": 16, "alpha": 32, "target": ["q", "v"]}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": {"gradient_checkpointing": True},
    "LoRA": {"adapters": ADAPTERS},
    "LoRA, checkpointing": {"adapters": ADAPTERS, "gradient_checkpointing": True},
    "frozen": {"freeze_backbone": True},
}


def cases(
    size: int = 224, tower: str = "ViT-B/16", *, n_shot: int = 1, n_query: int = 1, frames: int = 2
) -> Iterator[Case]:
    """A case a way to train; on CUDA one whose memory does not suffice says so.

    Args:
        size: of the frames, in pixels.
        tower: see :data:`benchmarks.train_step.TOWERS`.
        n_shot: examples of a class.
        n_query: queries of a class.
        frames: of a video.
    """
    on_cuda = torch.cuda.is_available()
    device, repeat = ("cuda", 5) if on_cuda else ("cpu", 1)
    setting = Setting(device, torch.bfloat16, size, frames, n_query, n_shot, repeat=repeat)
    plain = 0.0
    for name, options in CASES.items():
        try:
            trained, gib, seconds = (take_steps if on_cuda else take_steps_apart)(options, setting, tower)
        except torch.OutOfMemoryError:
            yield {"case": name, "gib": "more than the GPU has"}
            continue
        plain = plain or seconds
        yield report(name, seconds, plain, trained=trained, gib=gib)


def take_steps_apart(options: dict[str, Any], setting: Setting, tower: str) -> tuple[int, float, float]:
    """What :func:`take_steps` finds in a process of its own, whose peak of memory it is."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=context, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
    ) as pool:
        return pool.submit(take_steps, options, setting, tower).result()


def take_steps(options: dict[str, Any], setting: Setting, tower: str) -> tuple[int, float, float]:
    """Parameters of the tower that are trained, GiB, seconds of a step."""
    step = Step(RandomCLIP(tower, setting, **options), setting.device, setting.dtype)
    trained = sum(w.numel() for w in step.model.model.backbone.visual.parameters() if w.requires_grad)
    seconds, gib = time_steps(step, random_batch(setting), setting.repeat)
    if setting.device == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
        gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return trained, gib, seconds
