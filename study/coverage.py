"""Whether sets of labels hold the truth as often as promised: calibration and test classes drawn anew, many times."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_m2df.episodes.datamodule import EpisodeDataModule
from clip_m2df.evaluation.bank import encode_videos
from clip_m2df.evaluation.conformal import Dealt, Player, class_threshold, deal_classes, make_episodes
from clip_m2df.evaluation.metrics import Z_95
from clip_m2df.evaluation.open_set import SCORES, aurocs_of, best_score
from clip_m2df.files import write_text
from clip_m2df.motion_shapes import render
from study.page import coverage_table
from study.play import trained, versions
from study.results import INTERVALS, REFERENCE, read_coverage
from study.settings import Run, Settings

N_WAY, N_SHOTS, ERRORS = 5, (1, 3, 5), (0.05, 0.1, 0.2)
# Classes of a calibration with which no rate of these is too small: 1/20 is 0.05.
LEAST = 19
N_QUERY, N_KNOWN = 4, 8
COMMAND = "python -m study coverage"


def measure(family: str, settings: Settings, store: Path, draws: int) -> list[dict[str, Any]]:
    """Train on a family, and measure sets on its val and test classes together.

    In each draw a few classes are those of the test, at most twice as many as an episode has, as long as at least
    ``LEAST`` are left for the calibration. Where fewer than an episode's are left for the test, the other classes of a
    test episode are some of the calibration's.

    Args:
        family: of the embedded benchmark.
        settings: the study's.
        store: a folder for weights and features.
        draws: how many.

    Returns:
        A record for each number of shots and error rate.
    """
    seed = settings.seeds[0]
    model, config = trained(Run("main", "measure", family, REFERENCE, seed, 1e-3), settings, store)[:2]
    tables = EpisodeDataModule(**config["data"]).video_tables()
    features: list[Tensor] = []
    prompts: list[Tensor] = []
    videos: list[list[int]] = []
    with torch.no_grad():
        for name in ("val", "test"):
            table, first = tables[name], sum(len(of_split) for of_split in features)
            features.append(encode_videos(model.eval().model, table, []))
            prompts.append(model.encode_prompts(table.dataset.split.class_texts))
            ends = [first, *(first + n for n in itertools.accumulate(map(len, table.dataset.split.videos)))]
            videos += [list(range(*pair)) for pair in itertools.pairwise(ends)]
        player = Player(model.model.head, torch.cat(features), torch.cat(prompts), videos)
    records = []
    for n_shot in N_SHOTS:
        rows = played(player, videos, n_shot, draws, np.random.default_rng([seed, n_shot]))
        records += [
            {"family": family, "n_way": N_WAY, "n_shot": n_shot, "error": error, "draws": draws, "seed": seed}
            | summary([row[error] for row in rows])
            | {"command": COMMAND, "versions": versions()}
            for error in ERRORS
        ]
    return records


def played(
    player: Player, videos: Sequence[Sequence[int]], n_shot: int, draws: int, rng: np.random.Generator
) -> list[dict[float, dict[str, float]]]:
    """Of each draw, by the error rate, what the sets of its test classes hold; shares of queries.

    Args:
        player: of the features.
        videos: of each class, by their indices.
        n_shot: examples of a class.
        draws: how many.
        rng: the only source of chance.
    """
    n_test = max(1, min(2 * N_WAY, len(videos) - LEAST))
    of_episodes: list[tuple[Sequence[int], Sequence[int]]] = []
    tested, ends = [], []
    for _ in range(draws):
        order = rng.permutation(len(videos)).tolist()
        test, known = order[:n_test], order[n_test:]
        of_episodes += deal_classes(known, N_WAY, n_query=N_QUERY, n_known=N_KNOWN, rng=rng)
        first = len(of_episodes)
        # Of the test's classes first some are the episode's and the others unknown, and then the other way round.
        for own, others in ((test[:N_WAY], test[N_WAY:]), (test[N_WAY:], test[:N_WAY])):
            fill = rng.permutation(known).tolist()
            of_episodes.append(([*own, *fill[: N_WAY - len(own)]], [*others, *fill[N_WAY : 2 * N_WAY - len(others)]]))
        ends.append((first, len(of_episodes)))
        tested.append(torch.tensor(test))
    dealt = make_episodes(videos, of_episodes, n_shot, N_QUERY, rng)
    logits, misfits = player.play(dealt.episodes)
    logits, found, first = logits.double(), [], 0
    for classes, (start, end) in zip(tested, ends, strict=True):
        found.append(_sets(dealt, logits, misfits, slice(first, start), slice(start, end), classes))
        first = end
    return found


def _sets(
    dealt: Dealt, logits: Tensor, misfits: Tensor, of_calibration: slice, of_test: slice, test: Tensor
) -> dict[float, dict[str, float]]:
    known, classes, labels = dealt.known[of_calibration], dealt.classes[of_calibration], dealt.episodes["query_labels"]
    own = misfits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    score = SCORES[best_score(aurocs_of(logits[of_calibration][known], logits[of_calibration][~known]))]
    thresholds = class_threshold(own[of_calibration][known], classes[known], ERRORS)
    none = class_threshold(score(logits[of_calibration][~known]), classes[~known], ERRORS)
    among = torch.isin(dealt.classes[of_test], test)
    known, unknown = among & dealt.known[of_test], among & ~dealt.known[of_test]
    scores = score(logits[of_test])
    found = {}
    for error, threshold, of_none in zip(ERRORS, thresholds, none, strict=True):
        sizes, has_none = (misfits[of_test][known] <= threshold).sum(-1), scores[known] <= of_none
        shares = {
            "coverage": own[of_test][known] <= threshold,
            "unknown_coverage": scores[unknown] <= of_none,
            "set_size": sizes + has_none,
            "full_share": sizes + has_none == N_WAY + 1,
            "empty_share": sizes + has_none == 0,
            "false_rejection": has_none & (sizes == 0),
        }
        found[error] = {name: float(values.double().mean()) for name, values in shares.items()}
    return found


def summary(draws: Sequence[dict[str, float]]) -> dict[str, float]:
    """The means over draws, and of what is promised the half-width of the 95 % interval."""
    columns = {name: np.array([draw[name] for draw in draws]) for name in draws[0]}
    found = {}
    for name, values in columns.items():
        found[name] = round(float(values.mean()), 5)
        if name in INTERVALS:
            found[INTERVALS[name]] = round(float(Z_95 * values.std() / np.sqrt(len(values))), 5)
    return found


def run_coverage(
    families: Sequence[str], settings: Settings, results: Path, store: Path, draws: int, pool: Executor
) -> None:
    """Measure families, write the records in the place of all that there were, and print them.

    Args:
        families: of the embedded benchmark.
        settings: the study's.
        results: the file of records.
        store: see :func:`measure`.
        draws: the same.
        pool: where it runs.
    """
    for family in families:
        render(family=family)
    found = list(pool.map(partial(measure, settings=settings, store=store, draws=draws), families))
    records = [record for of_family in found for record in of_family]
    write_text(results, "coverage", "".join(json.dumps(record) + "\n" for record in records))
    print(coverage_table(read_coverage(results))[-1])
