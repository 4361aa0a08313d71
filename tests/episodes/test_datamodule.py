import dataclasses
import itertools
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from clip_m2df.commands import cache
from clip_m2df.datasets.manifest import Manifest
from clip_m2df.episodes.datamodule import EpisodeDataModule
from clip_m2df.episodes.files import write_episodes_file
from clip_m2df.episodes.plan import plan_episode
from clip_m2df.errors import UserError
from clip_m2df.video.reader import read_frames
from tests import clips

SMALL: dict[str, Any] = {
    "n_way": 3,
    "n_query": 2,
    "frames": 2,
    "resize": 16,
    "size": 16,
    "num_workers": 0,
    "evaluation": "direct",
}


def make(manifest: Path, **options: Any) -> EpisodeDataModule:
    return EpisodeDataModule(str(manifest), **(SMALL | options))


def test_loaders_give_the_episodes_of_their_split(manifest: Path) -> None:
    data = make(manifest, val_episodes=5, test_episodes=3, batch_size=2, episodes_per_step=4)
    for stage in ("fit", "validate", "test"):
        data.setup(stage)
    val: list[Any] = list(data.val_dataloader())
    assert [len(batch["query"]) for batch in val] == [2, 2, 1]
    assert val[0]["class_names"] == [f"val class {c}" for c in range(3)]
    assert val[0]["query"].shape[1] == 3  # one query a class at evaluation
    test = list(data.test_dataloader())
    assert test[0]["class_names"] == [f"the text of {c}" for c in range(3)]
    train = list(itertools.islice(data.train_dataloader(), 4))
    assert train[0]["query"].shape[1] == 6
    again: list[Any] = list(data.val_dataloader())
    assert torch.equal(val[1]["query"], again[1]["query"])


def test_training_and_evaluation_have_seeds_of_their_own(manifest: Path) -> None:
    drawn = {}
    for seed, eval_seed in ((0, 0), (1, 0), (0, 1)):
        data = make(manifest, seed=seed, eval_seed=eval_seed)
        data.setup("fit")
        loaders: tuple[Any, ...] = (data.train_dataloader(), data.val_dataloader())
        drawn[seed, eval_seed] = [next(iter(loader))["draws"] for loader in loaders]
    assert not torch.equal(drawn[0, 0][0], drawn[1, 0][0])
    assert torch.equal(drawn[0, 0][1], drawn[1, 0][1])
    assert torch.equal(drawn[0, 0][0], drawn[0, 1][0])
    assert not torch.equal(drawn[0, 0][1], drawn[0, 1][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_way": 1}, "n_way is 1; .* 2"),
        ({"n_shot": 0}, "n_shot is 0; it must be at least 1"),
        ({"n_query_eval": 0}, "n_query_eval is 0"),
        ({"frames": 0}, "frames is 0"),
        ({"validate_every": 0}, "validate_every is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"train_n_shot": 0}, "train_n_shot is 0"),
        ({"stuck_after": 0.0}, r"stuck_after is 0\.0"),
        ({"max_unusable": 1.5}, r"max_unusable is 1\.5"),
        ({"resize": 15}, "resize 15 is smaller than size 16"),
        ({"unknown_queries": -1}, "unknown_queries is -1; it must be at least 0"),
        ({"episodes": "apart"}, "episodes: there is no 'apart'; there are random, grouped"),
        ({"resize_mode": "stretch"}, "resize_mode: there is no 'stretch'; there are short_side, short_side_bicubic"),
        ({"sampling": "middle"}, "sampling: there is no 'middle'; there are segments, random_segments, window"),
        ({"sampling": "window", "frames": 1}, "frames is 1, but sampling window spaces at least 2: give more"),
        ({"jitter_queries": True, "train_augmentations": 2}, "leave out one of them"),
        ({"store": "features", "evaluation": "direct"}, "leave out store, or give --data.evaluation bank"),
        ({"batch_size": 32}, "episodes_per_step 16 does not divide into batches of 32"),
    ],
)
def test_options_out_of_range_are_refused_by_name(manifest: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(manifest, **options)


def test_episodes_of_a_step_divide_over_devices_or_are_refused(manifest: Path) -> None:
    data = make(manifest, batch_size=2)
    assert [data.accumulation(world_size) for world_size in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(UserError, match=r"batches of 2 on 3 device\(s\); give a multiple of 6"):
        data.accumulation(3)


def test_a_manifest_that_cannot_supply_episodes_is_refused_at_start_up(manifest: Path) -> None:
    with pytest.raises(UserError, match="val split has 3 classes, too few for n_way 4"):
        make(manifest, n_way=4).setup("fit")


class Nothing(lightning.LightningModule):
    """Counts batches; learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []
        self.validated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["draws"])
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append(self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: EpisodeDataModule, folder: Path, ckpt_path: str | None = None, **options: Any) -> Nothing:
    model = Nothing()
    trainer = lightning.Trainer(
        **({"max_steps": 4} | options),
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        num_sanity_val_steps=0,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    if ckpt_path is None and trainer.max_steps == 2:
        trainer.save_checkpoint(folder / "two.ckpt")
    return model


def test_runs_are_counted_in_whole_steps(manifest: Path, tmp_path: Path) -> None:
    data = make(manifest, batch_size=2, episodes_per_step=6, validate_every=2, val_episodes=1)
    model = fit(data, tmp_path)
    assert len(model.seen) == 4 * 3
    assert model.validated == [2, 4]
    # Endless: no number comes twice.
    assert len(torch.cat(model.seen).unique(dim=0)) == 24


def test_a_resumed_run_goes_on_with_the_episodes_that_it_would_have_had(manifest: Path, tmp_path: Path) -> None:
    def data() -> EpisodeDataModule:
        return make(manifest, batch_size=2, episodes_per_step=4, validate_every=1, val_episodes=1)

    whole = fit(data(), tmp_path)
    fit(data(), tmp_path, max_steps=2)
    resumed = fit(data(), tmp_path, str(tmp_path / "two.ckpt"))
    assert torch.equal(torch.cat(resumed.seen), torch.cat(whole.seen)[8:])


def test_a_trainer_that_would_cut_steps_is_refused(manifest: Path, tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"max_steps": -1, "max_epochs": 1}, r"give with trainer\.max_steps"),
        ({"accumulate_grad_batches": 3}, r"accumulate_grad_batches is 3, but follows from data\.episodes_per_step, 4"),
        ({"val_check_interval": 3}, r"trainer\.val_check_interval is 3, in batches; say with data\.validate_every"),
        ({"limit_train_batches": 3}, r"trainer\.limit_train_batches 3 cuts an optimiser step of 2 batches"),
    )
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            fit(make(manifest, batch_size=2, episodes_per_step=4), tmp_path, **options)


def test_epochs_cut_by_a_limit_deal_fresh_episodes(manifest: Path, tmp_path: Path) -> None:
    model = fit(make(manifest, batch_size=2, episodes_per_step=4, val_episodes=1), tmp_path, limit_train_batches=4)
    assert len(model.seen) == 8
    assert len(torch.cat(model.seen).unique(dim=0)) == 16


def test_without_validation_the_val_split_may_be_missing(manifest: Path, tmp_path: Path) -> None:
    rows = [line for line in manifest.read_text().splitlines() if ",val," not in line]
    shorter = manifest.parent / "no_val.csv"
    shorter.write_text("\n".join(rows))
    data = make(shorter, batch_size=2, episodes_per_step=4)
    assert len(fit(data, tmp_path, limit_val_batches=0).seen) == 8
    with pytest.raises(UserError, match="val"):
        fit(make(shorter), tmp_path)


def test_a_short_run_is_validated_at_its_end(manifest: Path, tmp_path: Path) -> None:
    assert fit(make(manifest, batch_size=2, episodes_per_step=4, val_episodes=1), tmp_path).validated == [4]


@pytest.mark.parametrize("changed", [{"batch_size": 4}, {"episodes_per_step": 8}])
def test_a_run_that_would_count_otherwise_does_not_go_on(
    manifest: Path, tmp_path: Path, changed: dict[str, int]
) -> None:
    counts = {"batch_size": 2, "episodes_per_step": 4, "val_episodes": 1}
    fit(make(manifest, **counts), tmp_path, max_steps=2)
    with pytest.raises(UserError, match=r"data\.episodes_per_step to 4, and data\.batch_size times the devices to 2"):
        fit(make(manifest, **(counts | changed)), tmp_path, str(tmp_path / "two.ckpt"))


def test_each_device_needs_an_episode(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpisodeDataModule, "world_size", 4)
    with pytest.raises(UserError, match="val_episodes is 3 on 4 devices; give at least one a device"):
        make(manifest, val_episodes=3).setup("validate")


def broken_copy(manifest: Path, folder: Path, *names: str) -> Path:
    """The tests' videos, some of them empty."""
    for video in manifest.parent.glob("*.mp4"):
        (folder / video.name).write_bytes(b"" if video.name in names else video.read_bytes())
    (folder / "manifest.csv").write_text(manifest.read_text())
    return folder / "manifest.csv"


def test_an_evaluation_does_not_start_with_an_unusable_video(manifest: Path, tmp_path: Path) -> None:
    broken = broken_copy(manifest, tmp_path, "val0_0.mp4", "val2_1.mp4", "train0_0.mp4")
    with pytest.raises(UserError) as caught:
        make(broken, val_episodes=20).setup("validate")
    said = str(caught.value)
    assert "2 of the 9 videos of the val split are unusable, more than the share 0 that data.max_unusable" in said
    assert "val0_0.mp4" in said
    assert "val2_1.mp4" in said
    assert "it is empty" in said
    assert "clip-m2df check --fix writes a manifest without such videos" in said
    # Test has none, and videos that no episode names are nobody's business.
    make(broken, test_episodes=20).setup("test")
    data = make(broken, val_episodes=20, n_way=2)
    data.trainer = lightning.Trainer(limit_val_batches=1, logger=False, accelerator="cpu")
    val = Manifest.read(broken).split("val")
    plan = plan_episode(val, data.eval_shape, seed=0, episode=0)
    named = {Path(video.path).name for rows in (plan.support, plan.query) for row in rows for video in row}
    assert not named & {"val0_0.mp4", "val2_1.mp4"}
    data.setup("validate")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_evaluation_with_a_share_of_unusable_videos(manifest: Path, tmp_path: Path, num_workers: int) -> None:
    broken = broken_copy(manifest, tmp_path, "val0_0.mp4")
    data = make(broken, val_episodes=20, max_unusable=0.2, num_workers=num_workers)
    with pytest.warns(UserWarning, match=r"val0_0\.mp4: it is empty; .*; another video of its class takes its place"):
        data.setup("validate")
    replaced = sum(int(batch["replaced"].sum()) for batch in list(data.val_dataloader()))
    assert replaced > 0
    for fewer in (0.1, 0.0):
        with pytest.raises(UserError, match=r"1 of the 9 videos of the val split are unusable, more than the share 0"):
            make(broken, val_episodes=20, max_unusable=fewer).setup("validate")


@pytest.mark.parametrize(("split", "stage"), [("train", "fit"), ("val", "fit"), ("val", "validate"), ("test", "test")])
def test_videos_that_a_chosen_decoder_may_read_wrongly_are_refused_at_the_start(
    manifest: Path, tmp_path: Path, split: str, stage: str
) -> None:
    pytest.importorskip("decord")
    copy = broken_copy(manifest, tmp_path)
    clips.render(tmp_path / "b_frames.avi", 12, options={"bf": "3", "g": "12", "sc_threshold": "0"}).replace(
        tmp_path / f"{split}0_0.mp4"
    )
    make(copy).setup(stage)
    message = f"of 1 videos of the {split} split decord may give other frames .*{split}0_0.mp4; take the decoder auto"
    with pytest.raises(UserError, match=message):
        make(copy, decoder="decord").setup(stage)


def test_training_may_find_one_video_in_twenty_unusable(manifest: Path, tmp_path: Path) -> None:
    broken = broken_copy(manifest, tmp_path, "train0_0.mp4")
    data = make(broken)  # one of 16 is more than that
    data.setup("fit")
    with pytest.raises(UserError, match=r"1 of the 16 videos of the train split .* more than the share 0\.05"):
        list(itertools.islice(data.train_dataloader(), 40))
    data = make(broken, max_unusable=0.5)
    data.setup("fit")
    with pytest.warns(UserWarning, match="takes its place"):
        assert len(list(itertools.islice(data.train_dataloader(), 40))) == 40


def test_training_episodes_may_have_other_shots(manifest: Path) -> None:
    data = make(manifest, n_shot=2, train_n_shot=1, val_episodes=2)
    data.setup("fit")
    loaders: tuple[Any, ...] = (data.train_dataloader(), data.val_dataloader())
    assert [next(iter(loader))["support"].shape[1:3] for loader in loaders] == [(3, 1), (3, 2)]


def test_test_episodes_from_a_file_are_played_in_its_order(manifest: Path, tmp_path: Path) -> None:
    drawn = make(manifest, test_episodes=6)
    split, plans = drawn.test_plans()
    write_episodes_file(tmp_path / "e.jsonl", plans[::-1], split, str(manifest.parent))
    data = make(manifest, test_episodes=6, episodes_file=str(tmp_path / "e.jsonl"))
    assert data.test_plans()[1] == plans[::-1]
    for one in (drawn, data):
        one.setup("test")
    expected, got = list(drawn.test_dataloader()), list(data.test_dataloader())
    assert all(torch.equal(a["query"], b["query"]) for a, b in zip(expected, got[::-1], strict=True))
    more = make(manifest, test_episodes=9, episodes_file=str(tmp_path / "e.jsonl"))
    with pytest.warns(UserWarning, match=r"e\.jsonl has 6 episodes, fewer than test_episodes"):
        more.setup("test")
    assert len(list(more.test_dataloader())) == 6
    with pytest.raises(UserError, match=r"line 1 of the episodes file .*: it has 3 classes, but n_way is 2"):
        make(manifest, n_way=2, episodes_file=str(tmp_path / "e.jsonl")).setup("test")


def with_groups(manifest: Path, folder: Path) -> Path:
    """The manifest with pairs of videos that are cut from one."""
    with manifest.open(encoding="utf-8") as lines:
        header, *rows = (line.rstrip("\n") for line in lines)
    groups = [row.split(",")[0].split("_")[0] + f" {n % 3 // 2}" for n, row in enumerate(rows)]
    text = "\n".join([f"{header},group", *(f"{row},{group}" for row, group in zip(rows, groups, strict=True))])
    (folder / "groups.csv").write_text(text, encoding="utf-8")
    return folder / "groups.csv"


def test_twins_are_told_where_there_are_groups(manifest: Path, tmp_path: Path) -> None:
    grouped = with_groups(manifest, tmp_path)
    split = Manifest.read(grouped, manifest.parent).split("test")
    for episodes in ("random", "grouped"):
        options: dict[str, Any] = {"test_episodes": 12, "val_episodes": 4, "root": str(manifest.parent)}
        data = make(grouped, episodes=episodes, n_query=1, **options)
        data.setup("test")
        batches: list[Any] = list(data.test_dataloader())
        shape = data.eval_shape
        plans = [plan_episode(split, shape, seed=0, episode=number) for number in range(12)]
        for plan, batch in zip(plans, batches, strict=True):
            groups = {video.group for row in plan.support for video in row}
            assert batch["twins"].tolist() == [[row[0].group in groups for row in plan.query]]
        assert any(batch["twins"].any() for batch in batches) == (episodes == "random")
        data.setup("fit")
        assert "twins" not in next(iter(data.train_dataloader()))
        table = data._tables["test"].episodes(range(12))
        assert torch.equal(table["twins"], torch.cat([batch["twins"] for batch in batches]))
    without = make(manifest, test_episodes=2)
    without.setup("test")
    assert "twins" not in next(iter(without.test_dataloader()))
    with pytest.raises(
        UserError, match=r"no video of .* has a group: let clip-m2df prepare write the manifest, or check"
    ):
        make(manifest, episodes="grouped").setup("test")


def test_a_run_goes_on_with_episodes_dealt_as_before(manifest: Path, tmp_path: Path) -> None:
    grouped = with_groups(manifest, tmp_path)
    regrouped = tmp_path / "regrouped.csv"
    regrouped.write_text(grouped.read_text(encoding="utf-8").replace("train1 1", "train1 2"), encoding="utf-8")
    usual: dict[str, Any] = {"n_way": 2, "episodes_per_step": 2, "val_episodes": 2, "root": str(manifest.parent)}
    apart = {"episodes": "grouped", "unknown_queries": 1}
    random_run, grouped_run = tmp_path / "random" / "two.ckpt", tmp_path / "grouped" / "two.ckpt"
    for options, run in (({}, random_run), (apart, grouped_run)):
        fit(make(grouped, **usual, **options), run.parent, max_steps=2)
        fit(make(grouped, **usual, **options), run.parent, str(run))
    for changed, run, message in (
        ({"episodes": "grouped"}, random_run, "data.episodes is 'grouped', but 'random' in the run"),
        ({"unknown_queries": 1}, random_run, "data.unknown_queries is 1, but 0"),
        (apart | {"episodes": "random"}, grouped_run, "data.episodes is 'random', but 'grouped' in the run"),
        (apart | {"unknown_queries": 0}, grouped_run, "data.unknown_queries is 0, but 1"),
    ):
        with pytest.raises(UserError, match=message):
            fit(make(grouped, **usual, **changed), run.parent, str(run))
    # Groups count where they decide the episodes.
    fit(make(regrouped, **usual), random_run.parent, str(random_run))
    fit(make(manifest, **usual), random_run.parent, str(random_run))
    with pytest.raises(UserError, match=r"the train split of data\.manifest is"):
        fit(make(regrouped, **usual, **apart), grouped_run.parent, str(grouped_run))


def test_unknown_queries_are_in_evaluations_alone(manifest: Path) -> None:
    def made(**options: Any) -> EpisodeDataModule:
        data = make(manifest, n_way=2, val_episodes=6, test_episodes=6, **options)
        for stage in ("fit", "test"):
            data.setup(stage)
        return data

    plain, more = made(), made(unknown_queries=2)
    first: tuple[Any, Any] = (next(iter(plain.train_dataloader())), next(iter(more.train_dataloader())))
    assert first[0].keys() == first[1].keys()
    assert torch.equal(first[0]["query"], first[1]["query"])
    for stage in ("val", "test"):
        loaders = [getattr(data, f"{stage}_dataloader")() for data in (plain, more)]
        for without, batch in zip(*loaders, strict=True):
            assert batch.keys() - without.keys() == {"unknown", "unknown_classes", "unknown_draws"}
            assert all(torch.equal(batch[k], v) for k, v in without.items() if isinstance(v, torch.Tensor))
        table = more._tables[stage].episodes(range(6))
        direct: list[Any] = list(getattr(more, f"{stage}_dataloader")())
        for key in ("unknown_classes", "unknown_draws", "draws", "query_labels"):
            assert torch.equal(table[key], torch.cat([batch[key] for batch in direct]))
        videos = more._tables[stage].videos
        for indices, batch in zip(table["unknown"].tolist(), direct, strict=True):
            for index, clip in zip(indices, batch["unknown"][0], strict=True):
                assert torch.equal(clip, more.reader.read(videos[index].path)[0])
            assert set(indices) <= set(more._tables[stage].named(range(6)))
    with pytest.raises(
        UserError, match="the val split has 3 classes; outside an episode of n_way 3 there may be only 0"
    ):
        make(manifest, unknown_queries=1).setup("fit")


def test_class_texts_are_overridden_by_a_file(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("label,text\nval class 1,something else\n")
    data = make(manifest, class_texts=str(tmp_path / "texts.csv"), val_episodes=1)
    data.setup("validate")
    batches: list[Any] = list(data.val_dataloader())
    assert batches[0]["class_names"] == ["val class 0", "something else", "val class 2"]
    given = [str(tmp_path / "texts.csv"), "texts/published/hmdb51.csv"]
    data = make(manifest, class_texts=given, val_episodes=1)
    data.setup("validate")
    assert [batch["class_names"] for batch in list(data.val_dataloader())] == [batches[0]["class_names"]]


@pytest.fixture
def cached(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the manifest and its videos, with a cache beside it."""
    monkeypatch.setattr(cache, "isolated_map", lambda f, items, **_: ((item, f(item)) for item in items))
    copied = broken_copy(manifest, tmp_path)
    cache.cache_frames(manifest=copied, output=tmp_path / "cache", short_side=24, frames=6, workers=1, timeout=60.0)
    return copied


def test_frames_come_from_a_cache_which_may_travel_without_its_videos(
    cached: Path, manifest: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"

    def val(**options: Any) -> torch.Tensor:
        data = make(cached, val_episodes=3, **options)
        data.setup("validate")
        batches: list[Any] = list(data.val_dataloader())
        return torch.cat([batch["query"] for batch in batches])

    direct, of_cache = val(), val(cache=str(folder))
    # Six is an odd multiple of two, so these are the same frames; but for what JPEG and resizing twice make of them.
    assert (direct.int() - of_cache.int()).abs().float().mean() < 4
    for video in tmp_path.glob("*.mp4"):
        video.unlink()
    assert torch.equal(val(cache=str(folder)), of_cache)
    with pytest.raises(UserError, match=r"videos in the manifest .* are not there"):
        val()
    data = make(cached, cache=str(folder))
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["query"].shape == (1, 6, 2, 3, 16, 16)
    with pytest.raises(UserError, match=r"resize is 32, but the cache .* of 24 pixels: give --data.resize 24 or less"):
        val(cache=str(folder), resize=32)
    with pytest.raises(UserError, match=r"frames is 8, but the cache .* holds 6 of each video"):
        val(cache=str(folder), frames=8)
    # A video that isn't in the cache is read itself, and has to be there.
    (tmp_path / "val0_0.mp4").write_bytes((manifest.parent / "val0_1.mp4").read_bytes())
    with pytest.warns(UserWarning, match=r"1 of the \d+ videos are not in the cache .*, or have changed since"):
        assert not torch.equal(val(cache=str(folder)), of_cache)
    cached.write_text(cached.read_text() + "new.mp4,val class 0,val,\n")
    with pytest.raises(UserError, match=r"1 of the \d+ videos .*'new.mp4'"):
        val(cache=str(folder))


def test_frames_by_their_numbers_come_from_a_cache_that_keeps_them_all(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The videos have 12 frames or more, of which the cache keeps 6."""
    val: dict[str, Any] = {"val_episodes": 2, "sampling": "linspace"}
    with pytest.raises(UserError, match=r"has not one video of .* with all of its frames, of which sampling linspace"):
        make(cached, cache=str(tmp_path / "cache"), **val).setup("validate")
    lengths = {path.name: read_frames(str(path), range)[1] for path in tmp_path.glob("*.mp4")}
    most = sorted(lengths.values())[len(lengths) // 2]
    assert min(lengths.values()) > 6
    assert most < max(lengths.values())
    cache.cache_frames(manifest=cached, output=tmp_path / "half", short_side=24, frames=most, workers=1, timeout=60.0)
    data = make(cached, cache=str(tmp_path / "half"), **val)
    others = sum(length > most for length in lengths.values())
    with pytest.warns(
        UserWarning, match=rf"{others} of the .* videos are not in the cache .* with all of their frames.*--frames"
    ):
        data.setup("validate")
    for name, length in lengths.items():
        clip, found = data.reader.read(str(tmp_path / name))
        expected, _ = dataclasses.replace(data.reader, cache=None).read(str(tmp_path / name))
        assert found == length
        # The same frames, whoever keeps them; those of other numbers are farther off.
        assert (clip.int() - expected.int()).abs().float().mean() < 4
        assert torch.equal(clip, expected) == (length > most)


def test_a_cache_serves_the_way_of_resizing_that_it_was_made_for(cached: Path, tmp_path: Path) -> None:
    folder = tmp_path / "squashed"
    options: dict[str, Any] = {"short_side": 16, "frames": 6, "workers": 1, "timeout": 60.0}
    cache.cache_frames(manifest=cached, output=folder, resize_mode="squash", **options)
    with pytest.raises(
        UserError, match=r"resize_mode is short_side, but the frames in the cache were resized by squash"
    ):
        make(cached, cache=str(folder)).setup("validate")
    with pytest.raises(UserError, match=r"resize_mode is squash, but the frames in the cache were .* by short_side"):
        make(cached, cache=str(tmp_path / "cache"), resize_mode="squash").setup("validate")
    with pytest.raises(UserError, match=r"resize is 12, but the cache .* squashed to 16 pixels: give --data.resize 16"):
        make(cached, cache=str(folder), resize_mode="squash", resize=12, size=12).setup("validate")
    with pytest.raises(UserError, match=r"6, quality 95 and resize_mode squash, not short_side 16, .*: give"):
        cache.cache_frames(manifest=cached, output=folder, **options)
    data = make(cached, cache=str(folder), resize_mode="squash")
    data.setup("validate")
    path = str(tmp_path / "val0_0.mp4")
    expected, _ = dataclasses.replace(data.reader, cache=None).read(path)
    kept, _ = data.reader.read(path)
    of_the_aspect, _ = dataclasses.replace(data.reader, cache=None, resize_mode="short_side").read(path)
    assert (kept.int() - expected.int()).abs().float().mean() < 4
    assert (kept.int() - of_the_aspect.int()).abs().float().mean() > 8


def test_a_bank_draws_the_frames_of_a_video_once(manifest: Path, tmp_path: Path) -> None:
    def table(**options: Any) -> Any:
        data = make(manifest, evaluation="bank", sampling="random_segments", frames=4, test_episodes=20, **options)
        data.setup("test")
        batches: list[Any] = list(data.test_dataloader())
        return batches[0].table

    first, again, other = table(), table(), table(eval_seed=1)
    differ, seen = 0, set()
    for index, video in enumerate(first.videos):
        clip = first.read(index)
        assert torch.equal(clip, again.read(index))
        assert again.identity(index) == first.identity(index)
        theirs = next(k for k, of_other in enumerate(other.videos) if of_other.path == video.path)
        # Features that are kept for one seed aren't taken for another.
        assert first.identity(index) != other.identity(theirs)
        differ += not torch.equal(clip, other.read(theirs))
        every = first.dataset.reader.crop(read_frames(video.path, range)[0])
        seen.add(tuple(int((every == frame).flatten(1).all(1).nonzero()[0]) for frame in clip))
    assert differ > len(first.videos) / 2
    assert len(seen) > 3
    # Of others nothing is drawn, and what was kept by earlier versions is known.
    data = make(manifest, evaluation="bank", test_episodes=20)
    data.setup("test")
    plain: Any = next(iter(data.test_dataloader()))
    assert plain.table.uniforms(0) is None
    assert "seed" not in plain.table.identity(0)


class Tower(lightning.LightningModule):
    """A module that says how images were resized for its tower."""

    def __init__(self, resize_mode: str) -> None:
        super().__init__()
        self.resize_mode = resize_mode

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.query = batch["query"]


def test_frames_are_resized_as_images_were_for_the_tower(manifest: Path) -> None:
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)

    def query(data: EpisodeDataModule, module: lightning.LightningModule) -> torch.Tensor:
        trainer.validate(module, data, verbose=False)
        return module.query  # type: ignore[return-value]

    data = make(manifest, val_episodes=1, resize=20)
    bilinear, bicubic = query(data, Tower("short_side")), query(data, Tower("short_side_bicubic"))
    assert not torch.equal(bilinear, bicubic)
    assert data.state_dict()["episodes"].get("data.resize_mode") is None  # no training
    for mode, expected in (("short_side", bilinear), ("short_side_bicubic", bicubic)):
        assert torch.equal(query(make(manifest, val_episodes=1, resize=20, resize_mode=mode), Tower("x")), expected)
    assert torch.equal(query(data, Tower("short_side")), bilinear)


def test_a_cache_of_other_videos_is_refused(cached: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = broken_copy(cached, tmp_path / "elsewhere")
    for video in (tmp_path / "elsewhere").glob("*.mp4"):
        video.touch()
    with pytest.raises(UserError, match=r"has none of the \d+ videos of .*, or all have changed since: name another"):
        make(other, cache=str(tmp_path / "cache")).setup("fit")


def test_a_cache_that_cannot_have_evaluations_frames_says_so(cached: Path, tmp_path: Path) -> None:
    data = make(cached, cache=str(tmp_path / "cache"), frames=3, val_episodes=1)
    with pytest.warns(UserWarning, match="keeps 6 frames of a video, no odd multiple of frames, 3"):
        data.setup("validate")


def test_a_damaged_cache_is_no_fault_of_its_videos(cached: Path, tmp_path: Path) -> None:
    (shard,) = (tmp_path / "cache").iterdir()
    content = bytearray(shard.read_bytes())
    half = len(content) // 2  # past the header
    content[half:] = bytes(len(content) - half)
    shard.write_bytes(content)
    data = make(cached, cache=str(tmp_path / "cache"), val_episodes=4)
    with pytest.warns(UserWarning, match=r"are damaged: delete the shard .*; meanwhile the videos themselves are read"):
        data.setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = list(itertools.islice(data.train_dataloader(), 10))
    assert all(int(batch["replaced"]) == 0 for batch in batches)
    for video in tmp_path.glob("*.mp4"):
        video.unlink()
    data = make(cached, cache=str(tmp_path / "cache"), val_episodes=4)
    with pytest.raises(UserError, match="delete the shard and run") as caught:
        data.setup("fit")
    assert "unusable" not in str(caught.value)


def test_a_second_start_checks_what_the_first_did_not(manifest: Path, tmp_path: Path) -> None:
    data = make(broken_copy(manifest, tmp_path, "val2_1.mp4"), n_way=2, val_episodes=20)
    val = Manifest.read(data.manifest_path).split("val")
    plan = plan_episode(val, data.eval_shape, seed=0, episode=0)
    assert "val2_1.mp4" not in {Path(v.path).name for rows in (plan.support, plan.query) for row in rows for v in row}
    data.trainer = lightning.Trainer(fast_dev_run=True, logger=False, accelerator="cpu")
    data.setup("fit")
    data.trainer = lightning.Trainer(max_steps=1, logger=False, accelerator="cpu")
    with pytest.raises(UserError, match=r"1 of the 9 videos of the val split are unusable"):
        data.setup("fit")


def test_a_loader_without_end_cannot_be_overfitted(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="overfit_batches takes a loader that ends"):
        fit(make(manifest), tmp_path, overfit_batches=2)
