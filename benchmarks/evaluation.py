"""The whole test on ``motion_shapes`` through a Trainer, from the bank against the direct path, a sample of it.

From the bank everything is timed: planning, decoding, encoding, playing, the metrics. Of the direct path it is the time
from the end of its first episode to the end of its last, without its check of the videos beforehand.
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import lightning
import torch

from benchmarks.timing import Case, report, seconds
from clip_m2df import CLIPM2DF, EpisodeDataModule

BAR = 50.0


class Ends(lightning.Callback):
    """Notes when each batch of a test ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """A batch has ended."""
        self.times.append(time.perf_counter())


def cases(n_episodes: int = 10_000, *, sample: int = 40) -> Iterator[Case]:
    """5-way 1-shot and 5-shot, with the tiny CLIP."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPM2DF(backbone="tiny", head_options={"hidden_dim": 256})
    frames: list[int] = []
    model.model.backbone.visual.register_forward_hook(lambda _, inputs, __: frames.append(len(inputs[0])))
    for n_shot in (1, 5):
        data = make_data(n_shot, n_episodes, "bank")
        data.prepare_data()  # rendering is no part of it
        frames.clear()
        ours = seconds(lambda data=data: test(model, data))  # type: ignore[misc]
        encoded = sum(frames)

        _, plans = data.test_plans()
        named = len({video for plan in plans for rows in (plan.support, plan.query) for row in rows for video in row})
        plain = test(model, make_data(n_shot, sample, "direct")) * n_episodes
        yield report(
            f"5-way {n_shot}-shot, {n_episodes} episodes",
            ours,
            plain,
            videos=named,
            encoder_calls=encoded / data.reader.frames,
            bar=BAR,
            within_bar=encoded == named * data.reader.frames,
        )


def make_data(n_shot: int, n_episodes: int, evaluation: Any) -> EpisodeDataModule:
    """The embedded benchmark's test."""
    return EpisodeDataModule(
        "motion_shapes", n_shot=n_shot, resize=40, size=40, test_episodes=n_episodes, evaluation=evaluation
    )


def test(model: CLIPM2DF, data: EpisodeDataModule) -> float:
    """Test the model; seconds a batch, from the end of the first."""
    ends = Ends()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="auto",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[ends],
        )
        trainer.test(model, data, verbose=False)
    return (ends.times[-1] - ends.times[0]) / (len(ends.times) - 1)
