"""Labelling folders of clips from a handful of examples: how right, how fast, and against the benchmark's episodes.

A head is trained on each family of ``motion_shapes``. Classes, examples and clips are drawn from its test split by
seed; intervals are 95 % ones over the draws, by Student's t.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.timing import Case
from clip_m2df import FewShotClassifier, Manifest
from clip_m2df.classifier.segments import Segment
from clip_m2df.commands.configs import find_config
from clip_m2df.commands.trainer import run
from clip_m2df.motion_shapes import FAMILIES, Action, render, render_long

DRAWS = 20
# The 97.5 % quantile of Student's t for as many draws.
STUDENT_T = 2.093
N_WAY, N_SHOT, CLIPS = 4, 3, 40
# What is wanted: seconds a draw, and the mean intersection over union of the family ``scene``.
MOST_SECONDS, LEAST_IOU = 60.0, 0.6


class Draw(NamedTuple):
    """What a person brings.

    Attributes:
        support: paths of the examples by class.
        clips: paths of the clips, as many of each class.
        labels: their classes.
        strangers: as many clips of other classes.
    """

    support: dict[str, list[str]]
    clips: list[str]
    labels: list[str]
    strangers: list[str]


def cases(n_episodes: int = 10_000) -> Iterator[Case]:
    """For each family: labels, labels where clips of other classes are among them, and segments of long videos."""
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--config", str(find_config(f"{family}_5way1shot.yaml")), f"--trainer.default_root_dir={folder}"]
            options += ["--trainer.devices=1", "--trainer.enable_progress_bar=false"]
            run(["fit", *options])
            checkpoint = Path(folder) / "checkpoints" / "last.ckpt"
            sizes = [f"--data.n_way={N_WAY}", f"--data.n_shot={N_SHOT}", f"--data.test_episodes={n_episodes}"]
            tested = run(["test", *options, "--ckpt_path", str(checkpoint), *sizes])
            episodes = 100 * float(tested.trainer.callback_metrics["test/accuracy"])
            classifier = FewShotClassifier.from_checkpoint(checkpoint)
            videos = _test_videos(family)
            yield label_clips(family, classifier, videos, episodes)
            for n_shot in (1, 3, 5):
                yield reject_strangers(family, classifier, videos, n_shot)
            yield find_actions(family, classifier, videos, Path(folder))


def label_clips(
    family: str, classifier: FewShotClassifier, videos: Mapping[str, Sequence[str]], episodes: float
) -> Case:
    """Percent of the clips that get their label, beside ``episodes``, that of the benchmark's episodes."""
    right, took = [], []
    for seed in range(DRAWS):
        drawn = draw(videos, seed, N_SHOT)
        started = time.perf_counter()
        labels = classifier.fit(drawn.support).predict(drawn.clips)
        took.append(time.perf_counter() - started)
        right.append(100 * float(np.mean(labels == np.array(drawn.labels))))
    interval = STUDENT_T * statistics.stdev(right) / math.sqrt(DRAWS)
    mean = statistics.mean(right)
    return {
        "case": f"{family}, labels",
        "accuracy": round(mean, 1),
        "interval": round(interval, 1),
        "episodes": round(episodes, 1),
        "seconds_at_most": round(max(took), 1),
        "within_bar": abs(mean - episodes) <= interval and max(took) <= MOST_SECONDS,
    }


def reject_strangers(
    family: str, classifier: FewShotClassifier, videos: Mapping[str, Sequence[str]], n_shot: int
) -> Case:
    """How a threshold does.

    Percent of the clips that get their label without and with it, and of strangers that get none; and of pairs of a
    clip and a stranger, in how many the stranger is the farther and the less probable one.
    """
    columns: list[tuple[float, ...]] = []
    for seed in range(DRAWS):
        drawn = draw(videos, seed, n_shot)
        classifier.fit(drawn.support)
        threshold = classifier.threshold_
        known = [said for _, said in sorted(classifier.classify(drawn.clips))]
        strange = [said for _, said in sorted(classifier.classify(drawn.strangers))]
        right = np.array([said.label for said in known]) == np.array(drawn.labels)
        distances, farther = (np.array([said.distance for said in clips]) for clips in (known, strange))
        likely, less = (np.array([said.probability for said in clips]) for clips in (known, strange))
        means = (right, right & (distances <= threshold), farther > threshold)
        pairs = (farther[:, None] > distances, less[:, None] < likely)
        columns.append(tuple(float(np.mean(values)) for values in (*means, *pairs)))
    names = ("accuracy", "with_rejection", "strangers_rejected", "farther", "less_probable")
    found = (round(100 * statistics.mean(column), 1) for column in zip(*columns, strict=True))
    return {"case": f"{family}, none of these, {n_shot} shot", **dict(zip(names, found, strict=True))}


def find_actions(family: str, classifier: FewShotClassifier, videos: Mapping[str, Sequence[str]], folder: Path) -> Case:
    """How well segments agree with what videos of 30 s show, five classes each of 3 to 8 s."""
    classes = {c.label: c for c in FAMILIES[family] if c.split == "test"}
    overlaps, moments, took, cut = [], [], [], []
    for seed in range(DRAWS):
        drawn = draw(videos, seed, N_SHOT, n_way=5)
        path = folder / f"{seed}.mp4"
        actions = render_long(path, [classes[label] for label in drawn.support], seed=seed)
        classifier.fit(drawn.support)
        started = time.perf_counter()
        found = classifier.segments(path)
        took.append(time.perf_counter() - started)
        overlaps += [best_overlap(action, found) for action in actions]
        moments.append(share_of_time(actions, found))
        cut.append(len(found) / len(actions))
    interval = 1.96 * statistics.stdev(overlaps) / math.sqrt(len(overlaps))
    mean = statistics.mean(overlaps)
    return {
        "case": f"{family}, segments",
        "iou": round(mean, 3),
        "interval": round(interval, 3),
        "time_right": round(statistics.mean(moments), 3),
        "found_per_action": round(statistics.mean(cut), 2),
        "seconds_at_most": round(max(took), 1),
        **({"within_bar": mean >= LEAST_IOU} if family == "scene" else {}),
    }


def draw(videos: Mapping[str, Sequence[str]], seed: int, n_shot: int, *, n_way: int = N_WAY) -> Draw:
    """Draw classes, examples, clips and strangers."""
    rng = np.random.default_rng(seed)
    names = sorted(videos)
    chosen = [names[i] for i in rng.choice(len(names), n_way, replace=False)]
    support, clips, labels = {}, [], []
    for label in chosen:
        order = rng.permutation(len(videos[label]))
        support[label] = [videos[label][i] for i in order[:n_shot]]
        of_class = [videos[label][i] for i in order[n_shot : n_shot + CLIPS // n_way]]
        clips += of_class
        labels += [label] * len(of_class)
    others = [video for label in names if label not in chosen for video in videos[label]]
    strangers = [others[i] for i in rng.choice(len(others), CLIPS, replace=False)]
    return Draw(support, clips, labels, strangers)


def best_overlap(action: Action, found: Sequence[Segment]) -> float:
    """Intersection over union of an action with the segment of its label that it has most in common with."""
    best = 0.0
    for segment in found:
        if segment.label == action.label:
            common = max(0.0, min(action.end, segment.end) - max(action.start, segment.start))
            best = max(best, common / (action.end - action.start + segment.end - segment.start - common))
    return best


def share_of_time(actions: Sequence[Action], found: Sequence[Segment]) -> float:
    """The share of a video during which the label is right."""
    right = 0.0
    for action in actions:
        for segment in found:
            if segment.label == action.label:
                right += max(0.0, min(action.end, segment.end) - max(action.start, segment.start))
    return right / actions[-1].end


def _test_videos(family: str) -> dict[str, list[str]]:
    split: Any = Manifest.read(render(family=family)).split("test")
    return {name: [video.path for video in row] for name, row in zip(split.class_names, split.videos, strict=True)}
