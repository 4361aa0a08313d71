"""TS-FSAR's matching: a case by hand, a slow loop, the published code's numbers, and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_m2df import UserError
from clip_m2df.nn.matching import cosine
from clip_m2df.nn.ts_fsar import TSFSARHead, channel_distances
from tests.conftest import read_golden
from tests.nn import references


def make_head(**options: Any) -> TSFSARHead:
    torch.manual_seed(0)
    return TSFSARHead(**{"dim": 6, "width": 4, "frames": 3} | options).eval()


def videos(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(seed))


def slow_distances(channels: list[float], alpha: float) -> list[float]:
    """The upper triangle of the centred distances, one at a time."""
    n = len(channels)
    d = [[((a - b) ** 2 / 2 + 1e-5) ** alpha for b in channels] for a in channels]
    rows = [sum(row) / n for row in d]
    return [d[i][j] - rows[i] - rows[j] + sum(rows) / n for i in range(n) for j in range(i, n)]


@torch.no_grad()
def slow_logits(head: TSFSARHead, support: list[Tensor], query: Tensor) -> Tensor:
    """A query, a class and a pair of frames at a time; each class with its own shots."""

    def reduced(video: Tensor) -> list[list[float]]:
        rows = head.reduce.weight.tolist()
        return [[sum(w * x for w, x in zip(row, frame, strict=True)) for row in rows] for frame in video.tolist()]

    def mean(vectors: list[list[float]]) -> list[float]:
        return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]

    task = mean([mean([mean(reduced(shot)) for shot in shots]) for shots in support])
    logits = torch.zeros(len(query), len(support))
    for q, video in enumerate(query):
        of_task = [a + b for a, b in zip(task, mean(reduced(video)), strict=True)]
        flat = [sum(w * x for w, x in zip(row, of_task, strict=True)) for row in head.generator.weight.tolist()]
        own = [slow_distances(frame, head.alpha) for frame in reduced(video)]
        for c, shots in enumerate(support):
            of_shots = [[slow_distances(frame, head.alpha) for frame in reduced(shot)] for shot in shots]
            prototype = [mean([shot[t] for shot in of_shots]) for t in range(head.frames)]
            logits[q, c] = sum(
                flat[t * head.frames + s] * references.cosine(own[t], prototype[s])
                for t in range(head.frames)
                for s in range(head.frames)
            )
    return logits


@pytest.mark.parametrize("options", [{}, {"alpha": 1.0}, {"width": 9}])
@pytest.mark.parametrize("n_shot", [1, 3])
def test_it_equals_the_loop(n_shot: int, options: dict[str, Any]) -> None:
    head = make_head(**options)
    support, query = videos(3, n_shot, 3), videos(4, 3, seed=1)
    expected = slow_logits(head, list(support), query)
    torch.testing.assert_close(head(support, query, torch.zeros(3, 6)).logits, expected, atol=1e-5, rtol=1e-4)
    assert expected.std(-1).min() > 1e-2


def test_classes_with_other_numbers_of_shots_equal_the_loop() -> None:
    head, shots = make_head(), [videos(n, 3, seed=n) for n in (1, 3, 2)]
    query = videos(4, 3, seed=9)
    logits = references.logits_of_classes(head, shots, query, torch.zeros(3, 6))
    torch.testing.assert_close(logits, slow_logits(head, shots, query), atol=1e-5, rtol=1e-4)


def test_one_frame_by_hand() -> None:
    # Of two channels 2 apart the distance is d = 2^α, to itself 0, but for what is added to both; centred, the triangle
    # is (−d, d, −d) / 2, whatever the channels. A frame whose channels are the same has zeros, and the cosine 0.
    head = TSFSARHead(dim=2, width=2, frames=1, alpha=0.5).eval()
    with torch.no_grad():
        head.reduce.weight.copy_(torch.eye(2))
        head.generator.weight.copy_(torch.tensor([[1.0, 10.0]]))
    support = torch.tensor([[[[1.0, -1.0]]], [[[5.0, 5.0]]]])  # the task's mean is (3, 2)
    query = torch.tensor([[[0.0, 2.0]], [[1.0, 1.0]]])
    d = math.sqrt(2 + 1e-5) - math.sqrt(1e-5)
    correlation = 0.75 * d**2 / (0.75 * d**2 + 0.01)
    logits = head(support, query, torch.zeros(2, 2)).logits
    torch.testing.assert_close(logits, torch.tensor([[(3 + 10 * (2 + 2)) * correlation, 0.0], [0.0, 0.0]]))


def test_distance_correlation_sees_what_is_not_linear() -> None:
    x = torch.linspace(-1, 1, 101)
    of_x, of_minus, of_square = (channel_distances(y, 0.5) for y in (x, 3 - x, x**2))
    assert cosine(x[None], (x**2)[None]).abs().item() < 1e-6
    assert cosine(of_x[None], of_square[None]).item() > 0.2
    assert cosine(of_x[None], of_minus[None]).item() > 0.999


def test_it_equals_the_published_code() -> None:
    golden, _ = read_golden("ts_fsar")
    head = TSFSARHead(dim=12, width=12, frames=5).eval()
    head.load_state_dict({"scale": head.scale, "reduce.weight": torch.eye(12), "generator.weight": golden["generator"]})
    logits = head(golden["support"], golden["query"], torch.zeros(4, 12)).logits
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=1e-4)


def test_another_number_of_frames_is_refused() -> None:
    with pytest.raises(UserError, match=r"weighs 3 frames, and videos have 4: .*head_options\.frames"):
        make_head()(videos(3, 1, 4), videos(1, 4), torch.zeros(3, 6))
