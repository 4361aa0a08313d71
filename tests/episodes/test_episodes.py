import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from clip_m2df.datasets.manifest import Manifest, Split, Video
from clip_m2df.episode import Episode, episode_draws
from clip_m2df.episodes.dataset import EpisodeDataset, collate_episodes
from clip_m2df.episodes.plan import EpisodePlan, EpisodeSampler, EpisodeShape, plan_episode
from clip_m2df.errors import UserError
from clip_m2df.video.reader import read_frames
from clip_m2df.video.transforms import ClipReader
from tests import clips

READER = ClipReader(frames=4, resize=24, size=16)


@pytest.fixture
def train(manifest: Path) -> Split:
    return Manifest.read(manifest).split("train")


def dataset(split: Split, *, seed: int = 0, augment: bool = True, reader: ClipReader = READER) -> EpisodeDataset:
    return EpisodeDataset(split, EpisodeShape(3, 1, 2), reader, seed=seed, augment=augment)


def test_an_episodes_videos_are_distinct_and_of_their_class(train: Split) -> None:
    for number in range(50):
        plan = plan_episode(train, EpisodeShape(3, 1, 2), seed=0, episode=number)
        assert len(set(plan.classes)) == 3
        videos = [video for row in (*plan.support, *plan.query) for video in row]
        assert len({video.path for video in videos}) == 9
        for c, support, query in zip(plan.classes, plan.support, plan.query, strict=True):
            assert {video.label for video in (*support, *query)} == {train.class_names[c]}


def test_every_class_and_video_comes_up_about_as_often_as_any_other(train: Split) -> None:
    plans = [plan_episode(train, EpisodeShape(3, 1, 2), seed=0, episode=i) for i in range(2000)]
    classes = torch.tensor([plan.classes for plan in plans]).flatten().bincount(minlength=4)
    assert classes.min() > 0.9 * classes.max()
    support = [video.path for plan in plans for row in plan.support for video in row]
    counts = torch.tensor([support.count(path) for path in set(support)])
    assert len(counts) == 16
    assert counts.min() > 0.7 * counts.max()


def test_an_episode_is_a_function_of_seed_and_number(train: Split) -> None:
    first, again, other = dataset(train)[7], dataset(train)[7], dataset(train, seed=1)[7]
    assert all(torch.equal(first[key], again[key]) for key in ("support", "query", "draws", "class_indices"))
    assert not torch.equal(first["draws"], other["draws"])
    assert not torch.equal(first["query"], other["query"])
    assert not torch.equal(first["draws"], dataset(train)[8]["draws"])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(train: Split, num_workers: int) -> None:
    episodes = dataset(train)
    loader = DataLoader(episodes, 2, sampler=EpisodeSampler(5), num_workers=num_workers, collate_fn=collate_episodes)
    for start, batch in zip((0, 2, 4), loader, strict=True):
        expected = collate_episodes([episodes[i] for i in range(start, min(start + 2, 5))])
        assert torch.equal(batch["support"], expected["support"])
        assert torch.equal(batch["query"], expected["query"])
        assert torch.equal(batch["draws"], expected["draws"])


def own_episode(number: int, keys: Iterable[str], *, leading: bool) -> dict[str, Any]:
    """An episode as somebody else makes one."""
    values: dict[str, Any] = {
        "support": torch.full((2, 1, 3, 3, 8, 8), number, dtype=torch.uint8),
        "query": torch.full((4, 3, 3, 8, 8), number, dtype=torch.uint8),
        "query_labels": torch.tensor([0, 0, 1, 1]),
        "class_indices": torch.tensor([number, number + 1]),
        "draws": torch.full((4,), number / 10),
        "replaced": torch.tensor(number),
        "same": torch.arange(6),
    }
    tensors = {key: values[key].unsqueeze(0) if leading else values[key] for key in keys if key != "class_names"}
    return tensors | {"class_names": ["a", "b", "c", "d"]}


@pytest.mark.parametrize("leading", [True, False])
@pytest.mark.parametrize("more", [(), ("draws",), ("draws", "replaced", "same")])
def test_episodes_of_ones_own_are_joined(more: tuple[str, ...], leading: bool) -> None:
    assert Episode.__required_keys__ == {"support", "query", "query_labels", "class_indices", "class_names"}
    assert Episode.__optional_keys__ == {
        "draws",
        "replaced",
        "same",
        "twins",
        "unknown",
        "unknown_classes",
        "unknown_draws",
    }
    keys = [*Episode.__required_keys__, *more]
    batch: Any = collate_episodes([own_episode(k, keys, leading=leading) for k in (1, 2)])  # type: ignore[type-var]
    assert batch.keys() == set(keys) - {"same"}
    assert batch["support"].shape == (2, 2, 1, 3, 3, 8, 8)
    assert batch["query"].shape == (2, 4, 3, 3, 8, 8)
    assert batch["query"].flatten(1)[:, 0].tolist() == [1, 2]
    assert batch["class_indices"].tolist() == [[1, 2], [2, 3]]
    assert batch["class_names"] == ["a", "b", "c", "d"]
    if "replaced" in more:
        assert batch["replaced"].tolist() == [1, 2]


@pytest.mark.parametrize("key", ["support", "query", "query_labels", "class_indices", "class_names", "draws"])
def test_an_episode_that_lacks_a_key(key: str) -> None:
    keys = ["support", "query", "query_labels", "class_indices", "class_names", "draws"]
    first, second = (own_episode(k, keys, leading=False) for k in (1, 2))
    del second[key]
    for episodes in [[first, second], [second, second]][: 1 if key == "draws" else 2]:
        with pytest.raises(UserError, match=f"an episode has no '{key}': give each the keys of clip_m2df.Episode"):
            collate_episodes(episodes)  # type: ignore[type-var]


def test_the_batch_is_what_its_legend_says(train: Split) -> None:
    episodes = dataset(train)
    batch = collate_episodes([episodes[0], episodes[1]])
    assert batch["support"].shape == (2, 3, 1, 4, 3, 16, 16)
    assert batch["query"].shape == (2, 6, 4, 3, 16, 16)
    assert batch["support"].dtype == batch["query"].dtype == torch.uint8
    assert batch["query_labels"].tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    assert batch["class_names"] == [f"train class {c}" for c in range(4)]
    plans = [plan_episode(train, EpisodeShape(3, 1, 2), seed=0, episode=i) for i in (0, 1)]
    assert batch["class_indices"].tolist() == [list(plan.classes) for plan in plans]
    still = dataset(train, augment=False)[0]
    for query, video in zip(still["query"][0], (video for row in plans[0].query for video in row), strict=True):
        assert torch.equal(query, READER.read(video.path)[0])


def test_draws_are_a_function_of_the_query_too() -> None:
    # More queries leave those of the first ones as they were.
    assert torch.equal(episode_draws(0, "train", 3, 10)[:4], episode_draws(0, "train", 3, 4))
    assert not torch.equal(episode_draws(0, "train", 3, 4), episode_draws(0, "val", 3, 4))
    draws = torch.cat([episode_draws(0, "train", i, 25) for i in range(400)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert draws.histc(10, 0, 1).min() > 800


def test_augmentation_moves_frames_and_crop_together_and_flips_only_if_asked(manifest: Path) -> None:
    path = str(manifest.parent / "train3_3.mp4")
    reader = ClipReader(frames=4, resize=32, size=32)
    uniforms = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.1])
    left, length = reader.read(path, uniforms)
    assert length == 15
    first_of_each_segment, _ = reader.read(path, uniforms)
    assert torch.equal(left, first_of_each_segment)
    right, _ = reader.read(path, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 0.1]))
    assert not torch.equal(left, right)
    assert torch.equal(left[..., 16:], right[..., :16])  # 48 pixels wide: two crops of 32, 16 pixels apart
    mirrored, _ = ClipReader(frames=4, resize=32, size=32, flip=True).read(path, uniforms)
    assert torch.equal(mirrored, left.flip(-1))
    unmirrored, _ = ClipReader(frames=4, resize=32, size=32, flip=True).read(
        path, uniforms + torch.tensor([0.0] * 6 + [0.5])
    )
    assert torch.equal(unmirrored, left)


def test_queries_alone_change_their_colours(train: Split) -> None:
    shape = EpisodeShape(3, 1, 2)
    # The second episode has the videos of the first, each support as a query.
    plan = plan_episode(train, shape, seed=0, episode=0)
    query = tuple((a[0], b[1]) for a, b in zip(plan.support, plan.query, strict=True))
    turned = EpisodePlan(plan.classes, tuple(row[:1] for row in plan.query), query)
    options: dict[str, Any] = {"seed": 0, "augment": True, "step": 2, "plans": [plan, turned]}
    plain, jittered, again = (
        EpisodeDataset(train, shape, READER, **options, jitter_queries=jitter).__getitems__([0, 1])
        for jitter in (False, True, True)
    )
    for before, after, same in zip(plain, jittered, again, strict=True):
        assert torch.equal(before["support"], after["support"])
        assert torch.equal(after["query"], same["query"])
        assert not any(torch.equal(a, b) for a, b in zip(before["query"][0], after["query"][0], strict=True))
    batch = collate_episodes(jittered)
    clips = torch.cat((batch["support"].flatten(1, 2), batch["query"]), 1).flatten(0, 1)
    assert torch.equal(clips, clips[batch["same"].flatten()])
    # The three second queries are those of the first episode too.
    assert len(batch["same"].unique()) == 18 - 3
    assert torch.equal(jittered[0]["query"][0, 1::2], jittered[1]["query"][0, 1::2])
    still = EpisodeDataset(train, shape, READER, seed=0, augment=False, jitter_queries=True)[0]
    assert torch.equal(still["query"], dataset(train, augment=False)[0]["query"])


def test_an_evaluation_that_draws_frames_draws_them_by_seed_episode_and_video(train: Split) -> None:
    reader = replace(READER, sampling="random_segments")
    plan = plan_episode(train, EpisodeShape(3, 1, 2), seed=0, episode=0)

    def first_clips(seed: int = 0) -> list[torch.Tensor]:
        """The first clip of 20 episodes of the same videos."""
        shape = EpisodeShape(3, 1, 2)
        same = EpisodeDataset(train, shape, reader, seed=seed, augment=False, plans=[plan] * 20)
        return [same[number]["support"][0, 0, 0] for number in range(20)]

    found = first_clips()
    assert all(torch.equal(*pair) for pair in zip(found, first_clips(), strict=True))
    assert not all(torch.equal(found[0], clip) for clip in found)
    assert not all(torch.equal(*pair) for pair in zip(found, first_clips(seed=1), strict=True))
    # The crop is that of the centre, and each frame is of its own segment.
    every = reader.crop(read_frames(plan.support[0][0].path, range)[0])
    chosen = [[int((every == f).flatten(1).all(1).nonzero()[0]) for f in clip] for clip in found]
    assert all([k // (len(every) // 4) for k in clip] == [0, 1, 2, 3] for clip in chosen)
    assert {k for clip in chosen for k in clip} == set(range(len(every) // 4 * 4))
    # Together or alone, by any worker.
    episodes = dataset(train, augment=False, reader=reader)
    together = episodes.__getitems__([3, 7, 11])
    alone = [dataset(train, augment=False, reader=reader)[number] for number in (3, 7, 11)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(together, alone, strict=True) for k in ("support", "query"))
    joined = collate_episodes(together)
    clips = torch.cat((joined["support"].flatten(1, 2), joined["query"]), 1).flatten(0, 1)
    assert torch.equal(clips, clips[joined["same"].flatten()])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_deals_each_episode_once_whatever_the_ranks(world_size: int) -> None:
    dealt = [list(EpisodeSampler(10, rank=r, world_size=world_size)) for r in range(world_size)]
    assert sorted(itertools.chain(*dealt)) == list(range(10))
    for rank, numbers in enumerate(dealt):
        assert len(EpisodeSampler(10, rank=rank, world_size=world_size)) == len(numbers)


def test_training_deals_disjoint_endless_numbers_and_goes_on_where_the_run_stands() -> None:
    done = 0
    samplers = [EpisodeSampler(None, first=lambda: done, rank=r, world_size=2) for r in range(2)]
    dealt = [list(itertools.islice(sampler, 100)) for sampler in samplers]
    assert sorted(itertools.chain(*dealt)) == list(range(200))
    done = 200
    assert list(itertools.islice(samplers[1], 2)) == [201, 203]
    with pytest.raises(TypeError, match="no length"):
        len(samplers[0])


def test_a_short_video_is_repeated_evenly(tmp_path: Path) -> None:
    lines = ["path,label,split"]
    for c, v in itertools.product(range(3), range(3)):
        clips.render(tmp_path / f"{c}_{v}.mp4", n_frames=2, size=(48, 32))
        lines.append(f"{c}_{v}.mp4,class {c},train")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    episode = dataset(Manifest.read(tmp_path / "m.csv").split("train"), augment=False)[0]
    assert len(episode["short"]) == 9
    assert set(episode["short"].values()) == {2}
    assert torch.equal(episode["support"][..., 0, :, :, :], episode["support"][..., 1, :, :, :])
    assert torch.equal(episode["support"][..., 2, :, :, :], episode["support"][..., 3, :, :, :])
    assert not torch.equal(episode["support"][..., 1, :, :, :], episode["support"][..., 2, :, :, :])


@pytest.mark.parametrize(
    ("shape", "counts", "message"),
    [
        ((1, 1, 1), (3, 2), "n_way is 1; it must be at least 2"),
        ((2, 0, 1), (3, 2), "n_shot is 0; it must be at least 1"),
        ((2, 1, -1), (3, 2), "n_query is -1; it must be at least 1"),
        ((5, 1, 1), (3, 3, 3), "the val split has 3 classes, too few for n_way 5: lower n_way, or add"),
        ((2, 3, 1), (9, 3, 2), "2 of the 3 classes of the val split have fewer .* the 4 that n_shot 3 and n_query 1"),
        ((2, 3, 1), (9, 3, 2), "'class 1' has 3, 'class 2' has 2; lower n_shot or n_query, add videos"),
        ((2, 1, 1), (1,) * 7, "'class 4' has 1 and 2 more; lower n_shot"),
    ],
)
def test_a_split_that_cannot_supply_episodes_is_refused(
    shape: tuple[int, int, int], counts: tuple[int, ...], message: str
) -> None:
    def split(*counts: int) -> Split:
        videos = [(f"class {c}", f"/v/{c}/{k}.mp4") for c, count in enumerate(counts) for k in range(count)]
        return Manifest(Video(path, label, "val", label) for label, path in videos).split("val")

    with pytest.raises(UserError, match=message):
        EpisodeDataset(split(*counts), EpisodeShape(*shape), READER, seed=0, augment=True)
    EpisodeShape(n_way=2, n_shot=1, n_query=1).check(split(3, 2))


class Counting(ClipReader):
    """Notes what it reads."""

    def read(self, path: str, uniforms: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        READ.append(path)
        return super().read(path, uniforms)


READ: list[str] = []


def test_in_a_step_a_video_looks_the_same_and_is_read_once(train: Split) -> None:
    reader = Counting(frames=4, resize=24, size=16)
    episodes = EpisodeDataset(train, EpisodeShape(3, 1, 2), reader, seed=0, augment=True, step=4)
    READ.clear()
    steps = [collate_episodes(episodes.__getitems__(range(start, start + 4))) for start in (0, 4)]
    looks: list[dict[str, torch.Tensor]] = []
    for number, batch in enumerate(steps):
        clips = torch.cat((batch["support"].flatten(1, 2), batch["query"]), 1).flatten(0, 1)
        same = batch["same"].flatten()
        assert clips.equal(clips[same])
        assert same.le(torch.arange(36)).all()
        paths = [path for _, path in batch["clips"]]
        assert len(same.unique()) == len(set(paths)) < 36
        looks.append({path: clips[k] for k, path in enumerate(paths)})
        # One by one they are what they are together.
        alone = collate_episodes([episodes[4 * number + k] for k in range(4)])
        assert alone["support"].equal(batch["support"])
        assert alone["query"].equal(batch["query"])
    assert len(READ) == sum(len(look) for look in looks) + 2 * 36
    again = looks[0].keys() & looks[1].keys()
    assert sum(not looks[0][path].equal(looks[1][path]) for path in again) > len(again) / 2


# Grouped episodes, and unknown queries


def grouped_split(*classes: Sequence[str], name: str = "test") -> Split:
    """A split whose classes have videos of these groups, one after the other; "" is no group."""
    rows = [
        Video(f"/v/{c}/{v}.mp4", f"class {c}", name, f"class {c}", {"group": group})
        for c, groups in enumerate(classes)
        for v, group in enumerate(groups)
    ]
    return Manifest(rows).split(name)


def sources(videos: Iterable[Video]) -> set[str]:
    return {video.group or video.path for video in videos}


def can_be_dealt(split: Split, shape: EpisodeShape, classes: Iterable[int]) -> bool:
    """Whether any way to part what the classes were cut from leaves each its support and its queries."""
    videos = [split.videos[c] for c in classes]
    names = sorted(sources(itertools.chain(*videos)))
    for mine in itertools.product((False, True), repeat=len(names)):
        support = {name for name, is_mine in zip(names, mine, strict=True) if is_mine}
        counts = [(sum((v.group or v.path) in support for v in row), len(row)) for row in videos]
        if all(count >= shape.n_shot and of - count >= shape.n_query for count, of in counts):
            return True
    return False


@pytest.mark.parametrize("shared", [False, True])
def test_a_grouped_episode_is_dealt_wherever_there_is_one_and_has_no_twin(shared: bool) -> None:
    rng = random.Random(0)
    dealt = refused = 0
    for seed in range(250):
        n_classes, n_groups = rng.randint(2, 4), rng.randint(1, 4)
        shape = EpisodeShape(rng.randint(2, n_classes), rng.randint(1, 3), rng.randint(1, 3), grouped=True)
        split = grouped_split(
            *(
                [
                    f"{'' if shared else c}g{g}" if (g := rng.randint(0, n_groups)) else ""
                    for _ in range(rng.randint(shape.n_shot + shape.n_query, 7))
                ]
                for c in range(n_classes)
            )
        )
        alone = [can_be_dealt(split, shape, [c]) for c in range(n_classes)]
        some = itertools.combinations(range(n_classes), shape.n_way)
        together = any(can_be_dealt(split, shape, classes) for classes in some) if shared else all(alone)
        try:
            shape.check(split)
            assert all(alone)
            plans = [plan_episode(split, shape, seed=seed, episode=number) for number in range(3)]
        except UserError:
            assert not (all(alone) and together)
            refused += 1
            continue
        assert together
        dealt += 1
        for plan in plans:
            assert not any(plan.twins)
            assert sources(itertools.chain(*plan.support)).isdisjoint(sources(itertools.chain(*plan.query)))
            assert len({video.path for video in plan.videos}) == shape.n_way * (shape.n_shot + shape.n_query)
            assert {len(row) for row in plan.support} == {shape.n_shot}
            for c, row in zip(plan.classes, zip(plan.support, plan.query, strict=True), strict=True):
                assert {video.label for video in itertools.chain(*row)} == {split.class_names[c]}
    assert min(dealt, refused) > 20


def test_a_grouped_episode_is_the_random_one_but_for_its_twins() -> None:
    split = grouped_split(*([f"{c}{g}" for g in range(8) for _ in range(4)] for c in range(5)))
    spread = changed = 0
    for number in range(300):
        random_plan, plan = (
            plan_episode(split, EpisodeShape(5, 2, 2, grouped=grouped), seed=0, episode=number)
            for grouped in (False, True)
        )
        assert plan.classes == random_plan.classes
        rows = zip(random_plan.support, plan.support, random_plan.query, plan.query, strict=True)
        for random_support, support, random_query, query in rows:
            # Two of one group become two of two, neither of them a query's; the first stays.
            assert len(sources(support)) == 2
            assert support[0] == random_support[0]
            assert (support == random_support) == (len(sources(random_support)) == 2)
            assert not (sources(support) & sources(random_query)) - sources(random_support)
            kept = [video for video in random_query if video.group not in sources(support)]
            assert set(kept) <= set(query)
            spread += support != random_support
            changed += 2 - len(kept)
    # Of 31 others of its class, 3 are of the same group; and of 30, 6 or 2 are twins of two support videos.
    assert spread / 1500 == pytest.approx(3 / 31, abs=0.02)
    assert changed / 3000 == pytest.approx(6 / 30 * 28 / 31 + 2 / 30 * 3 / 31, abs=0.02)


def test_a_support_has_as_many_groups_as_there_are_beside_those_of_the_queries() -> None:
    split = grouped_split(["a"] * 4 + ["b"] * 2 + ["c"], ["d"] * 4 + ["e"] * 4)
    found = set()
    for number in range(200):
        plan = plan_episode(split, EpisodeShape(2, 3, 1, grouped=True), seed=0, episode=number)
        for row, queries in zip(plan.support, plan.query, strict=True):
            assert sources(row).isdisjoint(sources(queries))
            found.add((row[0].label, len(sources(row))))
    # Never three groups: one is the query's.
    assert found == {("class 0", 2), ("class 0", 1), ("class 1", 1)}


def test_queries_of_grouped_episodes_are_drawn_evenly_from_those_that_may_come() -> None:
    groups = ["a"] * 6 + ["b"] * 3 + ["c"] * 3
    split = grouped_split(groups, groups)
    shape = EpisodeShape(2, 1, 2, grouped=True)
    counts: dict[tuple[str, str], int] = {}
    for number in range(6000):
        plan = plan_episode(split, shape, seed=0, episode=number)
        if {video.group for row in plan.support for video in row} == {"b"}:
            for video in plan.query[0]:
                counts[video.label, video.path] = counts.get((video.label, video.path), 0) + 1
    of_class = [count for (label, _), count in counts.items() if label == "class 0"]
    assert len(of_class) == 9
    assert min(of_class) > 0.7 * max(of_class)


def test_classes_may_share_all_their_groups() -> None:
    persons = [f"person {p}" for p in range(20)]
    split = grouped_split(*([persons] * 8))
    shape = EpisodeShape(5, 5, 15, 3, grouped=True)
    shape.check(split)
    for number in range(20):
        plan = plan_episode(split, shape, seed=0, episode=number)
        assert len(plan.sources) == 5  # or else a class had no 15 queries left
        assert not any(plan.twins)
        assert sources(plan.unknown).isdisjoint(plan.sources)
    pairs = [f"person {p // 2}" for p in range(20)]  # no nine videos are those of whole groups
    with pytest.raises(UserError, match=r"8 of the 8 classes of the test split have too few groups .* has 10 groups"):
        EpisodeShape(5, 9, 11, grouped=True).check(grouped_split(*([pairs] * 8)))


def test_classes_that_leave_each_other_no_groups_are_not_dealt_together() -> None:
    shape = EpisodeShape(3, 1, 1, grouped=True)
    ring = [["a", "b"], ["b", "c"], ["c", "a"]]
    split = grouped_split(*ring, ["d", "e"])
    for number in range(50):
        plan = plan_episode(split, shape, seed=0, episode=number)
        assert 3 in plan.classes
        assert not any(plan.twins)
    alone = grouped_split(*ring)
    shape.check(alone)
    with pytest.raises(UserError, match=r"no grouped episode was found in the test split: .*'class 0' has 2 groups"):
        plan_episode(alone, shape, seed=0, episode=0)


@pytest.mark.parametrize(
    ("n_shot", "n_query", "message"),
    [
        (1, 1, "1 of the 3 classes of the test split have too few groups .*: 'class 1' has 1 group; lower"),
        # The groups "e" and "f" make a support of two, and four videos are left.
        (
            2,
            4,
            "2 of the 3 .* n_query 4, are of different groups: 'class 0' has 2 groups, 'class 1' has 1 group; lower",
        ),
        (3, 3, "2 of the 3 .*: 'class 1' has 1 group, 'class 2' has 3 groups; lower n_shot or n_query"),
    ],
)
def test_a_class_whose_groups_are_too_few_is_named(n_shot: int, n_query: int, message: str) -> None:
    split = grouped_split(["a"] * 3 + ["b"] * 3, ["c"] * 6, ["d"] * 4 + ["e"] + ["f"])
    EpisodeShape(2, n_shot, n_query).check(split)
    with pytest.raises(UserError, match=message):
        EpisodeShape(2, n_shot, n_query, grouped=True).check(split)


def test_unknown_queries_are_of_other_classes_and_change_nothing_else() -> None:
    split = grouped_split(*([f"{c % 3}{g // 2}" for g in range(8)] for c in range(7)))
    for grouped, n_unknown, number in itertools.product((False, True), (1, 4, 9), range(60)):
        shape = EpisodeShape(3, 2, 1, grouped=grouped)
        plan = plan_episode(split, replace(shape, n_unknown=n_unknown), seed=0, episode=number)
        assert plan._replace(unknown=()) == plan_episode(split, shape, seed=0, episode=number)
        assert plan == plan_episode(split, replace(shape, n_unknown=n_unknown), seed=0, episode=number)
        assert len({video.path for video in plan.unknown}) == n_unknown
        labels = [video.label for video in plan.unknown]
        assert not set(labels) & {split.class_names[c] for c in plan.classes}
        counts = [len(list(row)) for _, row in itertools.groupby(labels)]
        if not grouped:
            assert len(counts) == len(set(labels)) == min(n_unknown, 4)
            assert max(counts) - min(counts) <= 1
        else:
            assert sources(plan.unknown).isdisjoint(plan.sources)


def test_every_other_class_and_video_is_unknown_about_as_often() -> None:
    split = grouped_split(*([""] * 4 for _ in range(6)))
    plans = [plan_episode(split, EpisodeShape(3, 1, 1, 2), seed=0, episode=number) for number in range(4000)]
    counts = Counter(video.path for plan in plans for video in plan.unknown)
    assert len(counts) == 24
    assert min(counts.values()) > 0.8 * max(counts.values())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 1, 1, 1), "outside an episode of n_way 4 there may be only 0 videos, too few for unknown_queries 1"),
        ((3, 1, 1, 3), "the test split has 4 classes; outside .* only 2 videos, too few for unknown_queries 3: lower"),
        ((3, 1, 1, -1), "n_unknown is -1; it must be at least 0"),
    ],
)
def test_unknown_queries_that_a_split_cannot_supply_are_refused(shape: tuple[int, int, int, int], message: str) -> None:
    split = grouped_split([""] * 3, [""] * 2, [""] * 3, [""] * 3)
    EpisodeShape(3, 1, 1, 2).check(split)
    with pytest.raises(UserError, match=message):
        EpisodeShape(*shape).check(split)


def test_an_episode_whose_support_leaves_no_unknown_query_is_named() -> None:
    split = grouped_split(["a", "b", "c"], ["a", "b", "c"], ["a", "b"])
    shape = EpisodeShape(2, 1, 1, 1, grouped=True)
    shape.check(split)
    with pytest.raises(UserError, match="has only 0 unknown queries that share no group with its support: lower"):
        [plan_episode(split, shape, seed=0, episode=number) for number in range(100)]


def test_stand_ins_in_grouped_episodes_are_no_twins() -> None:
    split = grouped_split(*([f"{c}{g // 3}" for g in range(12)] for c in range(5)))
    rng = random.Random(0)
    paths = sorted(video.path for row in split.videos for video in row)
    replaced = 0
    for number in range(200):
        broken = set(rng.sample(paths, 8))
        found = []
        for n_unknown in (0, 3):
            shape = EpisodeShape(3, 2, 2, n_unknown, grouped=True)
            episodes = EpisodeDataset(split, shape, READER, seed=0, augment=False, replace=True)
            plan, passed_over = episodes.replan(
                number, episodes.plan(number), set(paths).difference(broken).__contains__
            )
            assert not any(plan.twins)
            assert not {video.path for video in plan.videos} & broken
            assert len({video.path for video in plan.videos}) == 12 + n_unknown
            assert sources(plan.unknown).isdisjoint(plan.sources)
            assert [[video.label for video in row] for row in plan.support] == [
                [split.class_names[c]] * 2 for c in plan.classes
            ]
            found.append(plan)
            replaced += len(passed_over)
        assert found[0] == found[1]._replace(unknown=())
    assert replaced > 200
    # A support of one group, whose other videos alone may stand in; and none may where they are broken too.
    few = grouped_split(["a", "a", "b", "b"], ["c", "c", "d", "d"])
    episodes = EpisodeDataset(few, EpisodeShape(2, 1, 2, grouped=True), READER, seed=0, augment=False, replace=True)
    support = episodes.plan(0).support[0][0]
    (twin,) = (video for video in itertools.chain(*few.videos) if video.group == support.group and video != support)
    plan, _ = episodes.replan(0, episodes.plan(0), lambda path: path != support.path)
    assert plan.support[0] == (twin,)
    with pytest.raises(
        UserError, match=f"'{support.label}' of the test split has too few usable videos of other groups"
    ):
        episodes.replan(0, episodes.plan(0), lambda path: path not in (support.path, twin.path))


def test_unknown_queries_come_after_the_others_and_go_on_with_their_draws(train: Split) -> None:
    plain = EpisodeDataset(train, EpisodeShape(3, 1, 2), READER, seed=0, augment=False)
    more = EpisodeDataset(train, EpisodeShape(3, 1, 2, 3), READER, seed=0, augment=False)
    for number in range(3):
        without: dict[str, Any] = dict(plain[number])
        episode: dict[str, Any] = dict(more[number])
        plan = more.plan(number)
        assert episode.keys() - without.keys() == {"unknown", "unknown_classes", "unknown_draws"}
        for key, value in without.items():
            assert torch.equal(episode[key], value) if isinstance(value, torch.Tensor) else episode[key] == value
        assert torch.equal(episode["unknown"][0], torch.stack([READER.read(video.path)[0] for video in plan.unknown]))
        labels = [train.class_names[c] for c in episode["unknown_classes"][0]]
        assert labels == [video.label for video in plan.unknown]
        draws = torch.cat((episode["draws"], episode["unknown_draws"]), 1)
        assert torch.equal(draws[0], episode_draws(0, "train", number, 9))
    batch: dict[str, Any] = dict(collate_episodes([more[0], more[1]]))
    assert batch["unknown"].shape == (2, 3, 4, 3, 16, 16)
    assert batch["same"].shape == (2, 9)
