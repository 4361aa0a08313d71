"""The knobs of the embedded benchmark: the videos that they render, and the episodes that a test plays of them."""

import csv
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from clip_m2df import CLIPM2DF
from clip_m2df.cli import main
from clip_m2df.datasets.manifest import Video
from clip_m2df.episodes.datamodule import EpisodeDataModule
from clip_m2df.episodes.plan import EpisodePlan
from clip_m2df.errors import UserError
from clip_m2df.motion_shapes import FAMILIES, NO_KNOBS, Knobs, render, render_clip, rendering
from clip_m2df.motion_shapes.rendering import outlier_path
from clip_m2df.motion_shapes.scenes import OUTLIERS
from tests.motion_shapes.scenes import generator, of_split, videos

SMALL: dict[str, Any] = {"n_way": 5, "frames": 2, "resize": 32, "size": 32, "num_workers": 0, "test_episodes": 40}
OF_TEST = {"train": 0, "val": 0, "test": 1}


@pytest.fixture(autouse=True, scope="module")
def few_videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three videos of each test class, rendered by this process into a cache of the module's own."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_M2DF_CACHE", str(cache))
        patch.setattr(os, "cpu_count", lambda: 1)
        for family in FAMILIES:
            patch.setitem(rendering.VIDEOS_PER_CLASS, family, {"train": 1, "val": 1, "test": 3})
        yield cache


def make(family: str = "order", **options: Any) -> EpisodeDataModule:
    return EpisodeDataModule(f"motion_shapes_{family}", **(SMALL | options))


def drawn(monkeypatch: pytest.MonkeyPatch, folder: Path, family: str, **options: Any) -> dict[str, Any]:
    """The frames of a rendering by path, as they are before they are encoded."""
    frames: dict[str, Any] = {}

    def note(path: Path, video: Any) -> None:
        frames[f"{path.parts[-3]}/{path.parts[-2]}/{path.name}"] = video

    monkeypatch.setattr(rendering, "write_video", note)
    render(folder, family=family, workers=1, progress=False, **options)
    return frames


def test_knobs_render_the_test_split_alone_in_folders_of_their_own(few_videos: Path) -> None:
    usual = render(family="order", videos_per_class=OF_TEST, workers=1, progress=False)
    settings = [Knobs(overlap=0.5), Knobs(overlap=0.7), Knobs(noise=0.5), Knobs(outliers=0.1), Knobs(0.5, 0.1, 0.5)]
    counts = {"train": 1, "val": 1, "test": 1}
    found = [render(family="order", knobs=k, videos_per_class=counts, workers=1, progress=False) for k in settings]
    assert len({usual, *found}) == 1 + len(settings)
    for manifest, knobs in zip(found, settings, strict=True):
        assert manifest.parent.parent == few_videos
        with manifest.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["label"] for row in rows] == [c.label for c in of_split("order", "test")]
        paths = {row["path"] for row in rows}
        outliers = {outlier_path(path) for path in paths} if knobs.outliers else set()
        assert set(videos(manifest.parent)) == paths | outliers
        assert len(outliers) == (12 if knobs.outliers else 0)
    # What isn't turned changes nothing; how many outliers come is a matter of episodes, not of videos.
    assert videos(usual.parent).items() <= videos(found[3].parent).items()
    assert not set(videos(usual.parent).values()) & set(videos(found[0].parent).values())
    more = render(family="order", knobs=Knobs(outliers=0.4), videos_per_class=counts, workers=1, progress=False)
    assert more == found[3]


def test_twins_come_beside_the_usual_videos(few_videos: Path) -> None:
    def cuts(knobs: Knobs, n: int = 2) -> tuple[dict[str, bytes], dict[str, str]]:
        manifest = render(family="order", knobs=knobs, videos_per_class={"test": n}, workers=1, progress=False)
        with manifest.open(newline="") as file:
            groups = {row["path"]: row.get("group", "") for row in csv.DictReader(file)}
        return {path: (manifest.parent / path).read_bytes() for path in groups}, groups

    (usual, none), (twins, groups), (half, groups_of_half) = (cuts(Knobs(twins=t)) for t in (0, 1, 0.5))
    assert set(none.values()) == {""}
    assert usual.items() <= half.items() <= twins.items()  # a smaller share's are among those of a larger one
    assert len(set(twins.values())) == len(twins) == rendering.CUTS * len(usual)
    assert sorted(set(Counter(groups.values()).values())) == [rendering.CUTS]
    assert sorted(set(Counter(groups_of_half.values()).values())) == [1, rendering.CUTS]
    assert {groups[path] for path in usual} == set(groups.values())
    assert all(os.path.dirname(path) in f"test/{group}" for path, group in groups.items())
    # With other knobs too.
    with_outliers, of_both = cuts(Knobs(outliers=0.5, twins=1), 1)
    assert with_outliers.items() <= twins.items()
    assert Counter(of_both.values()) == dict.fromkeys(of_both.values(), rendering.CUTS)


def test_knobs_at_zero_are_the_usual_videos(few_videos: Path) -> None:
    zero = render(family="scene", knobs=Knobs(0, 0, 0), videos_per_class=OF_TEST, workers=1, progress=False)
    assert zero == render(family="scene", videos_per_class=OF_TEST, workers=1, progress=False)
    assert Knobs(0, 0, 0) == NO_KNOBS
    whole = render(family="scene", knobs=Knobs(overlap=1), videos_per_class=OF_TEST, workers=1, progress=False)
    assert whole == render(family="scene", knobs=Knobs(1.0), videos_per_class=OF_TEST, workers=1, progress=False)


@pytest.mark.parametrize("family", ["scene", "order"])
def test_each_test_video_has_an_outlying_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str) -> None:
    frames = drawn(monkeypatch, tmp_path / "v", family, knobs=Knobs(outliers=0.5), videos_per_class={"test": 4})
    test = of_split(family, "test")
    assert len(frames) == 2 * 4 * len(test)
    place = list(FAMILIES).index(family)
    of_class = {c: FAMILIES[family].index(c) for c in test}
    for c, number in ((c, number) for c in test for number in range(4)):
        usual, outlier = (frames[f"{folder}/{c.slug}/{number:02d}.mp4"] for folder in ("test", "outliers"))
        kind = OUTLIERS[number % 3]
        if kind == "occluded":
            plain = (outlier == outlier[0, 32, 32]).all(axis=(0, 3))
            assert plain.sum() >= 51 * 51
            assert np.array_equal(outlier[:, ~plain], usual[:, ~plain])
        elif kind == "static":
            assert (outlier == outlier[0]).all()
            assert (usual == outlier[0]).all(axis=(1, 2, 3)).any()
        else:
            rng = generator(0, of_class[c], number, place)
            others = [other for other in test if other != c]
            shown = others[rng.integers(len(others))]
            assert np.array_equal(outlier, render_clip(shown, rng))
    kinds = [OUTLIERS[number % 3] for number in range(4)]
    assert set(kinds) == {"occluded", "off_class", "static"}


def test_overlap_and_noise_are_those_of_all_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counts = {"test": 3}
    usual = drawn(monkeypatch, tmp_path / "a", "order", videos_per_class=counts)
    noisy = drawn(monkeypatch, tmp_path / "b", "order", knobs=Knobs(0.0, 0.2, 0.5), videos_per_class=counts)
    assert usual.keys() < noisy.keys()
    static = [video for path, video in noisy.items() if path.startswith("outliers/") and path.endswith("02.mp4")]
    assert len(static) == 12
    for video in static:
        assert np.abs(np.diff(video.astype(float), axis=0)).mean() > 50  # each frame has its own grain
    for path, video in usual.items():
        assert video.shape == noisy[path].shape
        assert np.abs(noisy[path].astype(float) - video).mean() > 50


def names(rows: Sequence[Sequence[Video]]) -> list[list[tuple[str, ...]]]:
    """Folder, class and file of each video."""
    return [[Path(video.path).parts[-3:] for video in row] for row in rows]


def plans(**options: Any) -> list[EpisodePlan]:
    return make(**options).test_plans()[1]


def outlying(found: list[EpisodePlan]) -> dict[tuple[int, int, int], Video]:
    """The videos of supports that are outliers, by episode, class and shot."""
    return {
        (number, c, shot): video
        for number, plan in enumerate(found)
        for c, row in enumerate(plan.support)
        for shot, video in enumerate(row)
        if Path(video.path).parts[-3] == "outliers"
    }


@pytest.mark.slow
def test_outliers_replace_their_share_of_the_support_and_nothing_else() -> None:
    options: dict[str, Any] = {"n_shot": 2, "test_episodes": 300}
    usual = plans(**options)
    few, more, all_of_them = (plans(**options, knobs={"outliers": share}) for share in (0.1, 0.2, 1.0))
    count = 300 * 5 * 2
    for found, share in ((few, 0.1), (more, 0.2)):
        deviation = (share * (1 - share) / count) ** 0.5
        assert len(outlying(found)) / count == pytest.approx(share, abs=3 * deviation)
    assert outlying(few).items() <= outlying(more).items() <= outlying(all_of_them).items()
    assert len(outlying(all_of_them)) == count
    for plan, other in zip(usual, more, strict=True):
        assert plan.classes == other.classes
        assert names(plan.query) == names(other.query)
        for video, version in zip(sum(plan.support, ()), sum(other.support, ()), strict=True):
            assert Path(version.path).parts[-2:] == Path(video.path).parts[-2:]
            assert (version.label, version.split) == (video.label, "test")
            assert Path(version.path).is_file()
    of_another_seed = plans(**options, knobs={"outliers": 0.2}, eval_seed=1)
    assert outlying(of_another_seed).keys() != outlying(more).keys()


def test_noise_and_overlap_play_the_usual_episodes() -> None:
    usual, harder = plans(), plans(knobs={"noise": 0.3, "overlap": 0.5})
    for plan, other in zip(usual, harder, strict=True):
        assert plan.classes == other.classes
        assert names(plan.support) == names(other.support)
        assert names(plan.query) == names(other.query)
    assert usual[0].query[0][0].path != harder[0].query[0][0].path


@pytest.mark.slow
def test_the_bank_and_the_direct_path_agree_on_outliers(tiny_clip_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CLIPM2DF(backbone=str(tiny_clip_dir), head_options={"hidden_dim": 32, "num_heads": 4})
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet)
    ways: dict[str, dict[str, Any]] = {
        "bank": {"evaluation": "bank"},
        "direct": {"evaluation": "direct"},
        "usual": {"evaluation": "bank", "knobs": None},
    }
    results = {}
    for name, options in ways.items():
        source = make(n_shot=2, **({"knobs": {"outliers": 0.5}} | options))
        (results[name],) = trainer.test(model, source, verbose=False)
    assert results["bank"] == pytest.approx(results["direct"], abs=1e-4)
    assert results["bank"]["test/accuracy"] == results["direct"]["test/accuracy"]
    assert results["usual"]["test/loss/total"] != pytest.approx(results["bank"]["test/loss/total"], abs=1e-3)


@pytest.mark.parametrize("sampling", ["segments", "random_segments"])
def test_the_number_of_workers_does_not_matter(sampling: str) -> None:
    found = []
    options: dict[str, Any] = {"evaluation": "direct", "knobs": {"outliers": 0.5}, "sampling": sampling}
    for num_workers in (0, 1):
        data = make(**options, num_workers=num_workers, test_episodes=4)
        data.setup("test")
        found.append(list(data.test_dataloader()))
    for alone, other in zip(*found, strict=True):
        assert all(torch.equal(alone[key], other[key]) for key in ("support", "query", "class_indices", "draws"))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"noise": 1.5}, r"the knob noise is 1\.5, a share; it must be between 0 and 1"),
        ({"overlap": -0.1}, r"the knob overlap is -0\.1, a share"),
        ({"outliers": float("nan")}, "the knob outliers is nan, a share"),
        ({"noise": "loud"}, "the knob noise is 'loud', a share"),
        ({"nois": 0.5}, "knobs: there is no 'nois'; there are overlap, outliers, noise, twins"),
    ],
)
def test_knobs_out_of_range_are_refused_by_name(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(knobs=knobs)


def test_knobs_are_for_tests_of_the_embedded_benchmark(manifest: Path) -> None:
    knobs = {"noise": 0.5}
    with pytest.raises(UserError, match=r"knobs are those of the embedded benchmark \(motion_shapes, .*not of .*csv"):
        EpisodeDataModule(str(manifest), knobs=knobs)
    with pytest.raises(UserError, match="knobs and episodes_file both say what a test plays; leave out one"):
        make(knobs=knobs, episodes_file="episodes.jsonl")
    for stage, changed in itertools.product(("fit", "validate"), (knobs, {"twins": 0.5})):
        with pytest.raises(UserError, match=r"data\.knobs changes the episodes of tests alone; leave it out for"):
            make(knobs=changed).setup(stage)
    with pytest.raises(UserError, match=r"only its tests with --data\.knobs\.twins have groups"):
        make(episodes="grouped").setup("test")
    with pytest.raises(UserError, match="motion_shapes has no family 'orders'; choose from demo, scene, order"):
        render(family="orders")
    with pytest.raises(UserError, match="some split needs videos"):
        render(knobs=Knobs(noise=0.5), videos_per_class={"train": 1})


def test_an_episodes_file_has_no_knobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["episodes", f"--output={tmp_path / 'e.jsonl'}", "--config=order_5way1shot.yaml", "--data.test_episodes=3"]
    assert main([*args, "--data.knobs.outliers", "0.2"]) == 2
    assert "can't hold what data.knobs changes; leave data.knobs out" in capsys.readouterr().err
    assert not (tmp_path / "e.jsonl").exists()
    assert main([*args, "--data.knobs.outliers", "0"]) == 0
    assert len((tmp_path / "e.jsonl").read_text().splitlines()) == 3
