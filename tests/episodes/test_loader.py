import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_m2df.datasets.manifest import Manifest, Split
from clip_m2df.episodes.dataset import EpisodeDataset, collate_episodes
from clip_m2df.episodes.features import EvaluationTable
from clip_m2df.episodes.loader import ReadingNow, UnusableVideos, VideoLoader
from clip_m2df.episodes.plan import EpisodeSampler, EpisodeShape, plan_episode
from clip_m2df.errors import UserError
from clip_m2df.video.reader import VideoError
from clip_m2df.video.transforms import ClipReader

SHAPE = EpisodeShape(3, 1, 1)


@dataclasses.dataclass(frozen=True)
class Reader(ClipReader):
    """Makes clips of one colour, which tells the video; what is named in it is broken, and so on."""

    broken: Sequence[str] = ()
    deadly: Sequence[str] = ()
    endless: Sequence[str] = ()
    faulty: Sequence[str] = ()

    def read(self, path: str, uniforms: Tensor | None = None) -> tuple[Tensor, int]:
        name = os.path.basename(path)
        if name in self.broken:
            raise VideoError(f"cannot read the video {path}: it is empty")
        if name in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if name in self.endless:
            threading.Event().wait()
        if name in self.faulty:
            raise RuntimeError("a bug")
        return torch.full((2, 3, 4, 4), colour(name), dtype=torch.uint8), 1 if name == "c0_v0" else 9


def colour(name: str) -> int:
    return 10 * int(name[1]) + int(name[4])


def names(clips: Tensor) -> list[str]:
    return [f"c{value // 10}_v{value % 10}" for value in clips[..., 0, 0, 0, 0].flatten().tolist()]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost workers are not waited for as long as torch does."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)


@pytest.fixture
def split(tmp_path: Path) -> Split:
    rows = ["path,label,split", *(f"c{c}_v{v},class {c},train" for c, v in itertools.product(range(4), range(5)))]
    (tmp_path / "m.csv").write_text("\n".join(rows))
    return Manifest.read(tmp_path / "m.csv", check_files=False).split("train")


def load(split: Split, reader: Reader, *, limit: float = 1.0, workers: int = 0, count: int = 40, **options: Any) -> Any:
    note, unusable = ReadingNow(workers), UnusableVideos(split, limit)
    dataset = EpisodeDataset(split, SHAPE, reader, seed=0, augment=True, replace=limit > 0, note=note)
    options = {"stuck_after": 60.0, "batch_size": 2, "collate_fn": collate_episodes, **options}
    sampler = EpisodeSampler(count)
    loader = VideoLoader(dataset, note=note, receive=unusable.receive, sampler=sampler, num_workers=workers, **options)
    return loader, unusable


def planned(split: Split, episode: int) -> tuple[list[str], list[str]]:
    plan = plan_episode(split, SHAPE, seed=0, episode=episode)
    support, query = ([os.path.basename(v.path) for row in rows for v in row] for rows in (plan.support, plan.query))
    return support, query


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_unusable_video_is_replaced_by_another_of_its_class_and_said_once(split: Split, workers: int) -> None:
    broken = ["c1_v2", "c3_v0"]
    loader, unusable = load(split, Reader(broken=broken), workers=workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = list(loader)
    said = [str(warning.message) for warning in caught]
    assert sorted(os.path.basename(path) for path in unusable.reasons) == broken
    for name in broken:
        assert sum(f"/{name}: it is empty; another video of its class takes its place" in text for text in said) == 1
    assert sum("c0_v0 has 1 frames, fewer than wanted" in text for text in said) == 1
    replaced = 0
    for number in range(40):
        batch, index = batches[number // 2], number % 2
        assert {"unusable", "short"}.isdisjoint(batch)
        support, query = planned(split, number)
        got = names(batch["support"][index]) + names(batch["query"][index])
        assert len(set(got)) == len(got)
        for name, instead in zip(support + query, got, strict=True):
            assert instead not in broken
            assert instead == name if name not in broken else instead[:2] == name[:2]
        assert batch["replaced"][index] == sum(name in broken for name in support + query)
        replaced += int(batch["replaced"][index])
    assert replaced > 20


def test_stand_ins_are_a_function_of_seed_and_episode(split: Split) -> None:
    first, second = (list(load(split, Reader(broken=["c1_v2", "c1_v3"]))[0]) for _ in range(2))
    assert all(torch.equal(a["query"], b["query"]) for a, b in zip(first, second, strict=True))
    chosen = set()
    for number in range(40):
        support, query = planned(split, number)
        got = names(first[number // 2]["support"][number % 2]) + names(first[number // 2]["query"][number % 2])
        chosen |= {instead for name, instead in zip(support + query, got, strict=True) if name != instead}
    assert chosen == {"c1_v0", "c1_v1", "c1_v4"}  # not always the same one


def test_too_many_unusable_videos_end_the_run_with_their_names(split: Split) -> None:
    loader, unusable = load(split, Reader(broken=["c1_v2", "c3_v0", "c3_v1"]), limit=0.1)
    with pytest.warns(UserWarning, match="takes its place"), pytest.raises(UserError) as caught:
        list(loader)
    said = str(caught.value)
    assert "3 of the 20 videos of the train split are unusable, more than the share 0.1 that data.max_unusable" in said
    assert all(f"/{name}" in said for name in ("c1_v2", "c3_v0", "c3_v1"))
    assert len(unusable.reasons) == 3


def test_a_class_without_usable_videos_ends_the_run(split: Split) -> None:
    loader, _ = load(split, Reader(broken=[f"c2_v{v}" for v in range(4)]))
    with pytest.raises(UserError, match=r"'class 2' of the train split has too few usable videos.*c2_v"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_without_a_share_the_first_unusable_video_ends_the_run(split: Split, workers: int) -> None:
    loader, _ = load(split, Reader(broken=["c1_v2"]), limit=0.0, workers=workers)
    with pytest.raises(VideoError, match="c1_v2: it is empty"):
        list(loader)


def test_a_worker_that_is_killed_ends_the_run_with_the_videos_name(split: Split) -> None:
    loader, _ = load(split, Reader(deadly=["c1_v2"]), workers=2)
    with pytest.raises(UserError, match=r"a worker was killed; it was reading the video .*/c1_v2: clip-m2df check"):
        list(loader)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_worker_that_is_killed_between_batches_ends_the_run_with_a_videos_name(
    split: Split, after: int, persistent: bool
) -> None:
    loader, _ = load(split, Reader(), workers=2, persistent_workers=persistent)
    if persistent:
        list(loader)
    batches = iter(loader)
    with pytest.raises(UserError, match=r"a worker was killed; .* video.*: clip-m2df check .*lower data.num_workers"):  # noqa: PT012
        for number, _ in enumerate(batches):
            if number == after:
                os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
                # Wherever this process is by then: in a step of the training, say.
                signal.sigtimedwait([], 10)
                torch.ones(300, 300) @ torch.ones(300, 300)


def test_a_worker_that_is_stuck_ends_the_run_with_the_videos_name(split: Split) -> None:
    loader, _ = load(split, Reader(endless=["c1_v2"]), workers=2, stuck_after=0.5)
    with pytest.raises(
        UserError, match=r"a worker hangs: nothing came for 0.5 s; it was reading the video .*/c1_v2: clip-m2df check"
    ):
        list(loader)


def test_other_errors_of_a_worker_stay_what_they_are(split: Split) -> None:
    loader, _ = load(split, Reader(faulty=["c1_v2"]), workers=1)
    with pytest.raises(RuntimeError, match="a bug"):
        list(loader)


def table(split: Split, reader: Reader, *, limit: float = 1.0, workers: int = 0, count: int = 40) -> EvaluationTable:
    dataset = EpisodeDataset(split, SHAPE, reader, seed=0, augment=False, replace=limit > 0)
    return EvaluationTable(
        dataset, count, UnusableVideos(split, limit), num_workers=workers, stuck_after=60.0, progress=False
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_table_reads_each_video_of_its_episodes_once(split: Split, workers: int) -> None:
    episodes = table(split, Reader(), workers=workers, count=3)
    expected = {name for number in range(3) for names_ in planned(split, number) for name in names_}
    assert [os.path.basename(video.path) for video in episodes.videos] == sorted(expected)
    assert episodes.named(range(3)) == list(range(len(expected)))
    first = episodes.named([0])
    support, query = planned(split, 0)
    assert sorted(os.path.basename(episodes.videos[index].path) for index in first) == sorted(support + query)
    with pytest.warns(UserWarning, match="c0_v0 has 1 frames") if "c0_v0" in expected else warnings.catch_warnings():
        read = list(episodes.clips([[0, 2], [1], [3, 4]]))
    assert [clips.indices.tolist() for clips in read] == [[0, 2], [1], [3, 4]]
    for clips in read:
        assert clips.frames is not None
        assert clips.frames.shape[1:] == (2, 3, 4, 4)
        assert names(clips.frames) == [os.path.basename(episodes.videos[p].path) for p in clips.indices]
        assert clips.unusable == {}


@pytest.mark.parametrize("broken", [["c1_v2"], ["c1_v2", "c3_v0", "c3_v1", "c0_v4"]])
def test_a_table_puts_the_same_stand_ins_as_reading_episode_by_episode(split: Split, broken: list[str]) -> None:
    reader = Reader(broken=broken)
    episodes = table(split, reader)
    indices = list(range(len(episodes.videos)))
    (clips,) = episodes.clips([indices])
    assert clips.indices.tolist() == [p for p in indices if colour_of(episodes, p) not in map(colour, broken)]
    with pytest.warns(UserWarning, match="takes its place"):
        episodes.replace(clips.unusable)
    with pytest.warns(UserWarning, match="takes its place"):
        batches = list(load(split, reader, batch_size=1)[0])
    for number, batch in enumerate(batches):
        row = episodes.episodes([number])
        for role in ("support", "query"):
            videos = [episodes.videos[index] for index in row[role].flatten().tolist()]
            assert [os.path.basename(v.path) for v in videos] == names(batch[role])
        assert row["replaced"].equal(batch["replaced"])
        assert row["draws"].equal(batch["draws"])
        assert row["query_labels"].equal(batch["query_labels"])


def colour_of(episodes: EvaluationTable, index: int) -> int:
    return colour(os.path.basename(episodes.videos[index].path))


def test_a_table_that_may_not_replace_videos_says_which_are_unusable(split: Split) -> None:
    episodes = table(split, Reader(broken=["c1_v2", "c3_v0"]), limit=0.0)
    (clips,) = episodes.clips([list(range(len(episodes.videos)))])
    with pytest.raises(UserError, match=r"2 of the 20 videos of the train split .*c1_v2.*c3_v0.*it is empty"):
        episodes.replace(clips.unusable)
