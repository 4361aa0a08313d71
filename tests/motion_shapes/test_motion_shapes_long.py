"""Long videos of motion_shapes: which actions, how long each, and the frames."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from clip_m2df.errors import UserError
from clip_m2df.motion_shapes import FAMILIES, Action, render_long
from clip_m2df.motion_shapes.classes import MotionClass
from clip_m2df.motion_shapes.long_videos import draw_actions
from clip_m2df.motion_shapes.scenes import FPS, SIZE, draw_scene, paint
from tests.motion_shapes.scenes import decoded, generator, of_split

TEST = of_split("demo", "test")


def frame_counts(actions: list[tuple[MotionClass, float, float]]) -> list[int]:
    counts = [(end - start) * FPS for _, start, end in actions]
    assert counts == pytest.approx([round(count) for count in counts])
    return [round(count) for count in counts]


def can_be_tiled(total: int, shortest: int, longest: int) -> bool:
    """Whether lengths within the limits make up a total, by trying all of them."""
    reached = {0}
    for frames in range(1, total + 1):
        if any(frames - n in reached for n in range(shortest, longest + 1)):
            reached.add(frames)
    return total in reached


# Which actions, and how long


@pytest.mark.parametrize(
    ("seconds", "lengths"),
    [(30.0, (3.0, 8.0)), (9.0, (3.0, 8.0)), (10.0, (3.0, 3.5)), (7.75, (0.5, 2.25)), (3, (3, 3))],
)
def test_actions_lie_within_the_limits_and_make_up_the_whole(seconds: float, lengths: tuple[float, float]) -> None:
    for seed in range(40):
        actions = draw_actions(TEST, generator(seed), seconds=seconds, lengths=lengths)
        counts = frame_counts(actions)
        assert min(counts) >= lengths[0] * FPS
        assert max(counts) <= lengths[1] * FPS
        assert actions[0][1] == 0
        assert actions[-1][2] == seconds
        for (one, _, end), (other, start, _) in itertools.pairwise(actions):
            assert end == start
            assert one != other
        assert {c for c, _, _ in actions} <= set(TEST)


def test_limits_between_frames_are_kept() -> None:
    for seed in range(20):
        counts = frame_counts(draw_actions(TEST, generator(seed), seconds=30, lengths=(3.01, 3.99)))
        assert min(counts) >= 37
        assert max(counts) <= 47


def test_every_length_and_every_class_comes_up() -> None:
    many = [draw_actions(TEST, generator(seed)) for seed in range(300)]
    first = Counter(frame_counts(actions)[0] for actions in many)
    assert set(first) <= set(range(36, 97))
    assert len(first) > 55
    halves = sum(n for frames, n in first.items() if frames <= 66) / 300
    assert abs(halves - 31 / 61) < 0.1
    shown = Counter(c for actions in many for c, _, _ in actions)
    assert set(shown) == set(TEST)
    assert max(shown.values()) < 2 * min(shown.values())


def test_the_only_class_follows_itself() -> None:
    actions = draw_actions(TEST[:1], generator(0))
    assert len(actions) >= 4
    assert {c for c, _, _ in actions} == {TEST[0]}
    pair = [c for c, _, _ in draw_actions(TEST[:2], generator(0), lengths=(3, 3))]
    assert pair in ([TEST[0], TEST[1]] * 5, [TEST[1], TEST[0]] * 5)


def test_what_cannot_be_made_up_is_refused_and_nothing_else() -> None:
    refused = 0
    for total, shortest, longest in itertools.product(range(1, 40), (3, 5, 7), (5, 6, 7)):
        if longest < shortest:
            continue
        seconds, lengths = total / FPS, (shortest / FPS, longest / FPS)
        if can_be_tiled(total, shortest, longest):
            assert sum(frame_counts(draw_actions(TEST, generator(0), seconds=seconds, lengths=lengths))) == total
        else:
            refused += 1
            with pytest.raises(UserError, match="no such lengths make it up"):
                draw_actions(TEST, generator(0), seconds=seconds, lengths=lengths)
    assert refused > 30


@pytest.mark.parametrize(
    ("seconds", "lengths", "message"),
    [
        (2.0, (3.0, 8.0), r"a video of 2 s made of actions of 3 to 8 s can't be: no such lengths"),
        (11.0, (3.0, 3.5), "no such lengths"),
        (30.0, (3.01, 3.05), "no such lengths"),  # between them there is no whole frame
        (30.05, (3.0, 8.0), "a whole number of frames, 12 a second"),
        (30.0, (8.0, 3.0), "the shortest no longer than the longest"),
        (30.0, (0.0, 3.0), "must be above 0"),
        (-1.0, (3.0, 8.0), "must be above 0"),
        (float("inf"), (3.0, 8.0), "must be above 0"),
        (float("nan"), (3.0, 8.0), "must be above 0"),
        (30.0, (3.0, float("inf")), "must be above 0"),
    ],
)
def test_lengths_that_make_no_sense(tmp_path: Path, seconds: float, lengths: tuple[float, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render_long(tmp_path / "long.mp4", TEST, seed=0, seconds=seconds, lengths=lengths)
    assert not any(tmp_path.iterdir())


def test_no_class_and_a_negative_seed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one class"):
        render_long(tmp_path / "long.mp4", [], seed=0)
    with pytest.raises(UserError, match="seed is -1; it must be at least 0"):
        render_long(tmp_path / "long.mp4", TEST, seed=-1)


# The frames


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scene_is_as_long_as_it_is_asked_to_be(family: str) -> None:
    for number, c in enumerate(FAMILIES[family][::4]):
        assert paint(draw_scene(c, generator(number), frames=5 + number)).shape == (5 + number, SIZE, SIZE, 3)
        usual = len(draw_scene(c, generator(number)).radius)
        # The length is the first that is drawn, and changes nothing else.
        rng = generator(number)
        rng.integers(2 * FPS, 4 * FPS + 1)
        again = paint(draw_scene(c, rng, frames=usual))
        assert np.array_equal(again, paint(draw_scene(c, generator(number))))


def test_the_video_shows_the_actions_when_they_are_said_to_be(tmp_path: Path) -> None:
    actions = render_long(tmp_path / "long.mp4", TEST, seed=3)
    frames = decoded(tmp_path / "long.mp4")
    assert frames.shape == (30 * FPS, SIZE, SIZE, 3)

    rng = generator(3)
    drawn = draw_actions(TEST, rng)
    assert actions == [(start, end, c.label) for c, start, end in drawn]
    scenes = [draw_scene(c, rng, frames=count) for (c, _, _), count in zip(drawn, frame_counts(drawn), strict=True)]
    for action, scene in zip(actions, scenes, strict=True):
        shown = frames[round(action.start * FPS) : round(action.end * FPS)].astype(float)
        assert np.abs(shown - paint(scene)).mean() < 8
        # Each of its frames is of this scene and of no other.
        for other in scenes:
            if other is not scene:
                assert np.abs(shown - paint(other)[:1]).mean(axis=(1, 2, 3)).min() > 12


def test_the_shape_has_the_colour_of_its_class(tmp_path: Path) -> None:
    classes = [MotionClass("test", "red", "circle", "growing"), MotionClass("test", "blue", "circle", "growing")]
    actions = render_long(tmp_path / "long.mp4", classes, seed=0, seconds=12, lengths=(2, 3))
    frames = decoded(tmp_path / "long.mp4")
    rng = generator(0)
    for c, start, end in draw_actions(classes, rng, seconds=12, lengths=(2, 3)):
        scene = draw_scene(c, rng, frames=round((end - start) * FPS))
        last = frames[round(end * FPS) - 1]
        row, column = round(float(scene.y[0, -1]) * SIZE), round(float(scene.x[0, -1]) * SIZE)
        red, _, blue = (int(value) for value in last[row, column])
        assert (red > blue) == ("red" in c.label)
    assert [a.label for a in actions[:2]] in ([c.label for c in classes], [c.label for c in classes[::-1]])


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    def rendered(name: str, seed: int) -> tuple[bytes, list[Action]]:
        actions = render_long(tmp_path / name, TEST, seed=seed, seconds=8, lengths=(2, 4))
        return (tmp_path / name).read_bytes(), actions

    first = rendered("a.mp4", 5)
    assert rendered("b.mp4", 5) == first
    other = rendered("c.mp4", 6)
    assert other[0] != first[0]
    assert other[1] != first[1]
