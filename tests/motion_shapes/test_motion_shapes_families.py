"""The families of motion_shapes, and what the knobs take away: classes, scenes and painted frames."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clip_m2df import CLIPM2DF
from clip_m2df.errors import UserError
from clip_m2df.motion_shapes import COLOURS, FAMILIES, appearances_of, render_clip
from clip_m2df.motion_shapes.classes import BACKWARDS, SHAPES, MotionClass
from clip_m2df.motion_shapes.rendering import VIDEOS_PER_CLASS
from clip_m2df.motion_shapes.scenes import COMMON_COLOUR, FPS, Scene, draw_scene, paint
from clip_m2df.nn.baselines import build_head
from tests.motion_shapes.scenes import centres, generator, masks, of_split

ORDER = FAMILIES["order"]
HELD_OUT = {*appearances_of("val"), *appearances_of("test")}


def of_events(motion: str, split: str = "test") -> MotionClass:
    return MotionClass(split, "", "", motion)


@pytest.mark.parametrize(
    ("family", "classes", "videos"),
    [
        ("demo", (24, 10, 23), (20, 12, 16)),
        ("scene", (32, 8, 12), (30,) * 3),
        ("order", (56, 8, 12), (30,) * 3),
        ("mixed", (40, 12, 12), (30,) * 3),
    ],
)
def test_each_family_has_its_classes(family: str, classes: tuple[int, ...], videos: tuple[int, ...]) -> None:
    assert tuple(len(of_split(family, split)) for split in ("train", "val", "test")) == classes
    assert tuple(VIDEOS_PER_CLASS[family].values()) == videos
    members = FAMILIES[family]
    assert len({c.label for c in members}) == len({c.slug for c in members}) == len(members)
    assert [c.split for c in members] == sorted((c.split for c in members), key=["train", "val", "test"].index)


def test_held_out_appearances_are_in_no_training_class() -> None:
    for family in ("demo", "scene", "mixed"):
        for split in ("train", "val", "test"):
            assert {c.appearance for c in of_split(family, split)} <= set(appearances_of(split))
    all_of_them = [appearance for split in ("train", "val", "test") for appearance in appearances_of(split)]
    assert sorted(all_of_them) == sorted(itertools.product(COLOURS, SHAPES))


class Plain(np.random.Generator):
    """Draws no normal deviates, so that a colour is that of its name but for the brightness."""

    def normal(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> Any:
        return np.full(np.broadcast_shapes(np.shape(scale), () if size is None else np.atleast_1d(size)), loc)


def appearance(scene: Scene) -> tuple[str, str]:
    """The name of the scene's colour, and its shape."""
    cosines = {name: scene.colour @ np.array(rgb) / np.linalg.norm(rgb) for name, rgb in COLOURS.items()}
    colour = max(cosines, key=lambda name: cosines[name])
    assert cosines[colour] == pytest.approx(np.linalg.norm(scene.colour), rel=1e-5)
    return colour, scene.shape


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_things_of_order_have_appearances_of_their_split_and_all_of_them(split: str) -> None:
    members, drawn = of_split("order", split), set()
    for number in range(600):
        drawn.add(appearance(draw_scene(members[number % len(members)], Plain(np.random.PCG64(number)))))
    assert drawn == set(appearances_of(split))
    assert drawn.isdisjoint(HELD_OUT) == (split == "train")


def test_pairs_of_scene_share_an_appearance() -> None:
    for split, pairs in (("train", 8), ("val", 2), ("test", 4)):
        count = Counter(c.appearance for c in of_split("scene", split))
        assert sorted(count.values(), reverse=True) == [2] * pairs + [1] * (len(count) - pairs)
    shared = {c.label for c in of_split("scene", "test") if c.appearance in appearances_of("test")[:1]}
    assert shared == {"a red star moving to the left", "a red star moving to the right"}


def test_appearances_of_mixed_have_motions_and_their_opposites() -> None:
    for split, appearances, motions in (("train", 5, 8), ("val", 3, 4), ("test", 3, 4)):
        of_each: dict[tuple[str, str], set[str]] = {}
        for c in of_split("mixed", split):
            of_each.setdefault(c.appearance, set()).add(c.motion)
        assert [len(each) for each in of_each.values()] == [motions] * appearances
        assert all({BACKWARDS[motion] for motion in each} == each for each in of_each.values())
        assert len({frozenset(each) for each in of_each.values()}) == (1 if split == "train" else appearances)


@pytest.mark.parametrize("split", ["val", "test"])
@torch.no_grad()
def test_prompts_are_right_on_half_of_the_queries_of_mixed(split: str) -> None:
    members, n_clips = of_split("mixed", split), 4
    clips = [render_clip(c, generator(k, number)) for k, c in enumerate(members) for number in range(n_clips)]
    frames = torch.stack([torch.from_numpy(clip[np.linspace(0, len(clip) - 1, 8).astype(int)]) for clip in clips])
    pixels = F.interpolate(frames.flatten(0, 1).permute(0, 3, 1, 2).float(), size=40, mode="bilinear", antialias=True)
    model = CLIPM2DF("tiny").eval()
    features = model.model.encode_frames(pixels.round().to(torch.uint8)).unflatten(0, (len(members), n_clips, 8))
    prompts = model.encode_prompts([c.label for c in members])
    right: dict[str, list[float]] = {"PPS": [], "zero-shot": []}
    alike: list[bool] = []
    zero_shot = build_head("zero_shot", {"dim": prompts.shape[-1]}).eval()
    for seed in range(200):
        classes = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))[:5]
        query, labels = features[classes, 1:].flatten(0, 1), torch.arange(5).repeat_interleave(n_clips - 1)
        chosen = zero_shot.select_prompts(query, prompts[classes]).indices
        likeliest = zero_shot(features[classes, :1], query, prompts[classes]).logits.argmax(-1)
        for name, found in (("PPS", chosen), ("zero-shot", likeliest)):
            right[name].append(float((found == labels).float().mean()))
        pairs = zip(classes[chosen].tolist(), classes[labels].tolist(), strict=True)
        alike += [members[a].appearance == members[b].appearance for a, b in pairs]
    for shares in right.values():
        assert 0.45 < sum(shares) / len(shares) < 0.65
    assert sum(alike) > 0.9 * len(alike)  # a wrong prompt is of the right appearance


def test_each_class_of_order_has_a_twin_in_its_split() -> None:
    for c in ORDER:
        assert c.twin in ORDER
        assert c.twin != c
        assert c.twin.twin == c
    assert of_events("moving up then growing").twin.motion == "shrinking then moving down"


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_twins_have_the_same_frames_in_the_other_order(split: str) -> None:
    for number, c in enumerate(of_split("order", split)):
        frames, of_twin = (render_clip(one, generator(number)) for one in (c, c.twin))
        assert np.array_equal(frames, of_twin[::-1])
        assert not np.array_equal(frames, of_twin)
        assert 2 <= len(frames) / FPS <= 4


@pytest.mark.parametrize("motion", ["turning clockwise", "moving apart", "shrinking", "vanishing"])
def test_any_scene_can_be_played_backwards(motion: str) -> None:
    scene = draw_scene(MotionClass("test", "red", "star", motion), generator(0))
    assert np.array_equal(paint(scene.backwards()), paint(scene)[::-1])
    assert not np.array_equal(paint(scene.backwards()), paint(scene))


def shown(scene: Scene, part: slice) -> str:
    """The event that a part of a scene shows, as its arrays say."""
    x, y, radius, opacity = scene.x[:, part], scene.y[:, part], scene.radius[part], scene.opacity[part]

    def rises(values: Any, least: float) -> bool:
        assert abs(values[-1] - values[0]) > least
        assert (np.sign(np.diff(values)) * np.sign(values[-1] - values[0]) >= 0).all()
        return bool(values[-1] > values[0])

    def still(*arrays: Any) -> bool:
        return all(np.ptp(array, axis=-1).max() == 0 for array in arrays)

    if len(x) == 2:
        apart = np.hypot(x[1] - x[0], y[1] - y[0])
        assert still(radius, opacity)
        return "moving apart" if rises(apart, 0.2) else "approaching each other"
    if not still(opacity):
        assert still(x, y, radius)
        return "appearing" if rises(opacity, 0.9) else "vanishing"
    if not still(radius):
        assert still(x, y)
        return "growing" if rises(np.log(radius), 0.5) else "shrinking"
    if still(y):
        return "moving to the right" if rises(x[0], 0.24) else "moving to the left"
    if still(x):
        return "moving down" if rises(y[0], 0.24) else "moving up"
    # From each step to the next one turns right, for y points down, or left.
    steps = np.stack((np.diff(x[0]), np.diff(y[0])))
    turns = steps[0, :-1] * steps[1, 1:] - steps[1, :-1] * steps[0, 1:]
    return "circling clockwise" if rises(np.cumsum([0.0, *turns]), 0) else "circling anticlockwise"


def test_events_happen_one_after_another_as_the_label_says() -> None:
    for number, c in enumerate(ORDER):
        scene = draw_scene(c, generator(1, number))
        middle = len(scene.radius) / 2
        # The frame in the middle, if there is one, is at the end of one half and the start of the other.
        parts = [slice(None)] if len(c.events) == 1 else [slice(int(middle + 0.5)), slice(int(middle), None)]
        assert tuple(shown(scene, part) for part in parts) == c.events


def scenes_of(motion: str, *seeds: int) -> list[Scene]:
    """Scenes of a motion of the one family and of the event of the other."""
    classes = MotionClass("test", "white", "square", motion), of_events(motion, "train")
    return [draw_scene(c, generator(seed)) for c in classes for seed in seeds]


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moving to the left", 0, -1), ("moving to the right", 0, 1), ("moving up", 1, -1), ("moving down", 1, 1)],
)
def test_painted_things_move_that_way(motion: str, axis: int, sign: int) -> None:
    for scene in scenes_of(motion, 0, 1, 2):
        found = centres(masks(scene))
        assert sign * (found[axis, -1] - found[axis, 0]) > 8
        assert abs(found[1 - axis, -1] - found[1 - axis, 0]) < 8  # no more than the camera's jitter


@pytest.mark.parametrize(("motion", "sign"), [("circling clockwise", 1), ("circling anticlockwise", -1)])
def test_painted_things_circle_that_way(motion: str, sign: int) -> None:
    for seed in range(5):
        column, row = centres(masks(draw_scene(of_events(motion), generator(seed))))
        area = np.sum((column[:-1] - column.mean()) * np.diff(row) - (row[:-1] - row.mean()) * np.diff(column)) / 2
        assert sign * area > 60  # square pixels, to the right of what goes clockwise


@pytest.mark.parametrize(("motion", "sign"), [("growing", 1), ("shrinking", -1), ("appearing", 1), ("vanishing", -1)])
def test_painted_things_come_and_go(motion: str, sign: int) -> None:
    for scene in scenes_of(motion, 0, 1, 2):
        area = masks(scene).sum(axis=(1, 2))
        assert sign * np.log((area[-1] + 1) / (area[0] + 1)) > 1


@pytest.mark.parametrize(("motion", "sign"), [("moving apart", 1), ("approaching each other", -1)])
def test_two_painted_things_part_and_approach(motion: str, sign: int) -> None:
    for scene in scenes_of(motion, 0, 1, 2):
        mask = masks(scene)
        spread = [np.std(np.flatnonzero(frame) % mask.shape[2]) for frame in mask]
        assert sign * (spread[-1] - spread[0]) > 3


@pytest.mark.parametrize(
    ("family", "first", "last"),
    [("demo", 103.18, 101.98), ("scene", 100.73, 100.62), ("order", 111.90, 111.79), ("mixed", 100.41, 100.31)],
)
def test_what_is_drawn_stays_what_it_was(family: str, first: float, last: float) -> None:
    """Whoever changes a pixel raises RENDERER_VERSION, and then these numbers."""
    videos = [render_clip(FAMILIES[family][number], generator(number), noise=0.1) for number in range(10)]
    for place, expected in ((0, first), (-1, last)):
        assert np.mean([video[place] for video in videos]) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("motion", ["moving up", "growing", "bouncing", "approaching each other"])
def test_overlap_of_one_leaves_grey_circles_of_all_shapes(motion: str) -> None:
    circle = draw_scene(MotionClass("train", "red", "circle", motion), generator(0), overlap=1.0)
    assert circle.colour == pytest.approx(COMMON_COLOUR)
    for colour, shape in zip(itertools.cycle(COLOURS), SHAPES, strict=False):
        scene = draw_scene(MotionClass("test", colour, shape, motion), generator(0), overlap=1.0)
        assert np.abs(paint(scene).astype(int) - paint(circle)).max() <= 1
        usual = draw_scene(MotionClass("test", colour, shape, motion), generator(0))
        assert np.abs(paint(usual).astype(int) - paint(circle)).max() > 30


def test_overlap_takes_an_appearance_away_step_by_step() -> None:
    levels = (0.0, 0.3, 0.5, 0.7, 1.0)
    for number, c in enumerate(of_split("scene", "test")):
        scenes = [draw_scene(c, generator(number), overlap) for overlap in levels]
        away = [np.linalg.norm(scene.colour - COMMON_COLOUR) for scene in scenes]
        assert away == sorted(away, reverse=True)
        assert away[2] == pytest.approx(away[0] / 2, rel=1e-4)
        round_one = masks(dataclasses.replace(scenes[-1], colour=scenes[0].colour))
        off = [np.abs(masks(dataclasses.replace(s, colour=scenes[0].colour)) - round_one).sum() for s in scenes]
        assert off == sorted(off, reverse=True)
        # The motion is left alone.
        assert all(np.array_equal(scene.y, scenes[0].y) for scene in scenes)


def change(scene: Scene) -> float:
    """How much happens: the ranges of all that changes in time but the camera."""
    parts = (scene.x, scene.y, np.log(scene.radius), scene.angle, scene.opacity)
    return float(sum(np.ptp(part, axis=-1).max() for part in parts))


def test_overlap_takes_what_happens_away_step_by_step() -> None:
    for number, c in enumerate(ORDER):
        scenes = [draw_scene(c, generator(number), overlap) for overlap in (0.0, 0.3, 0.5, 0.7, 1.0)]
        changes = [change(scene) for scene in scenes]
        assert changes[0] > 0.1
        assert (np.diff(changes) < 0).all()
        assert changes[-1] < 1e-6
        # What happens to has its usual looks.
        assert all(np.array_equal(scene.colour, scenes[0].colour) for scene in scenes)
        assert not scenes[-1].roundness


def test_overlap_of_one_leaves_the_camera_to_move() -> None:
    scene = draw_scene(of_events("moving up then moving to the right"), generator(3), overlap=1.0)
    frames = paint(scene)
    assert len({tuple(place) for place in scene.camera.tolist()}) > 1
    fixed = paint(dataclasses.replace(scene, camera=np.full_like(scene.camera, 3)))
    assert np.array_equal(fixed, np.repeat(fixed[:1], len(fixed), axis=0))
    assert not np.array_equal(frames, fixed)


@pytest.mark.parametrize("family", ["scene", "order"])
def test_noise_has_its_deviation_and_leaves_the_scene(family: str) -> None:
    (c, *_) = of_split(family, "test")
    usual, noisy = (render_clip(c, generator(0), noise=noise).astype(float) for noise in (0.0, 0.1))
    grain = (noisy - usual)[(usual > 110) & (usual < 145)]  # as far from black and white as to keep it whole
    assert len(grain) > 5000
    assert grain.std() == pytest.approx(25.5, rel=0.03)
    assert abs(grain.mean()) < 1
    strong = render_clip(c, generator(0), noise=0.9).astype(float)
    assert strong.shape == usual.shape
    assert np.abs(strong - usual).mean() > 3 * np.abs(noisy - usual).mean()


def test_outliers_are_hidden_or_still() -> None:
    (c, *_) = of_split("order", "test")
    for seed in range(5):
        usual = render_clip(c, generator(seed))
        still = render_clip(c, generator(seed), outlier="static")
        assert still.shape == usual.shape
        assert np.array_equal(still, np.repeat(still[:1], len(still), axis=0))
        assert (usual == still[0]).all(axis=(1, 2, 3)).any()
        hidden = render_clip(c, generator(seed), outlier="occluded")
        plain = (hidden == hidden[0, 32, 32]).all(axis=(0, 3))
        # A square of the same colour in all frames; the rest is as usual.
        assert 0.62 <= plain.mean() <= 0.66
        assert np.array_equal(hidden[:, ~plain], usual[:, ~plain])


def test_events_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError, match="motion_shapes knows no motion 'flying'; choose from moving to the left, "):
        of_events("moving up then flying")
    with pytest.raises(UserError, match="knows no motion 'bouncing'"):
        of_events("bouncing")  # which is the same backwards
