"""Evaluation from a bank, through the Trainer: the numbers of the direct path, for one pass over the videos."""

import itertools
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from clip_m2df import CLIPM2DF, EpisodeDataModule, UserError
from clip_m2df.evaluation.bank import FeatureStore, encode_videos
from clip_m2df.evaluation.metrics import OPEN_SET
from clip_m2df.evaluation.open_set import auroc, fpr_at_recall, oscr
from clip_m2df.files import beside, locked
from clip_m2df.nn.baselines import HEADS
from clip_m2df.nn.head import HeadOutput
from clip_m2df.nn.m2df import M2DFHead
from tests import clips
from tests.conftest import quiet_trainer as trainer
from tests.training.test_module import make

OWN_OPTIONS: dict[str, dict[str, Any]] = {"ts_fsar": {"frames": 2}}
SMALL: dict[str, Any] = {"n_way": 3, "n_query": 2, "frames": 2, "resize": 32, "size": 32, "num_workers": 0}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest with 6 videos in each of 5 classes, all of them val and test in turn."""
    folder = tmp_path_factory.mktemp("many")
    lines = ["path,label,split"]
    for split, c, v in itertools.product(("train", "val", "test"), range(5), range(6)):
        name = f"{split}{c}_{v}.mp4"
        clips.render(folder / name, n_frames=4 + 3 * c + v, size=(48, 32))
        lines.append(f"{name},{split} {c},{split}")
    (folder / "m.csv").write_text("\n".join(lines))
    return folder / "m.csv"


def with_empty(many: Path, folder: Path, *names: str) -> Path:
    """The manifest of copies of the videos, of which some are empty."""
    for video in many.parent.glob("*.mp4"):
        (folder / video.name).write_bytes(b"" if video.name in names else video.read_bytes())
    return Path(shutil.copy(many, folder))


def data(manifest: Path, **options: Any) -> EpisodeDataModule:
    return EpisodeDataModule(str(manifest), **(SMALL | options))


def encoded(model: CLIPM2DF) -> list[int]:
    """Notes how many frames go through the tower, call by call, but for the black ones that fill a block."""
    calls: list[int] = []

    def note(_: Any, inputs: tuple[Tensor], __: Any) -> None:
        pixels = inputs[0].flatten(2)
        calls.append(int((pixels != pixels[..., :1]).any(-1).any(-1).nonzero().max()) + 1)

    model.model.backbone.visual.register_forward_hook(note)
    return calls


class Contrary(M2DFHead):
    """A head of a user's own, which changes what one step makes."""

    def match(self, *inputs: Any) -> HeadOutput:
        output = super().match(*inputs)
        return output._replace(logits=-output.logits)


@pytest.mark.parametrize(
    ("options", "n_shot"),
    [
        ({}, 2),
        ({"class_weight": 1.0, "text_fusion": 0.4, "selection": "expectation"}, 2),
        ({"selection": "sample"}, 2),
        ({"selection": "each"}, 2),
        ({"head": f"{__name__}.Contrary"}, 1),
        *(
            ({"head": name, "class_weight": 1.0, "text_fusion": 0.4, "head_options": OWN_OPTIONS.get(name)}, 5)
            for name in HEADS
            if name != "m2df"
        ),
    ],
)
def test_the_numbers_are_those_of_the_direct_path(
    many: Path, tiny_clip_dir: Path, tmp_path: Path, options: dict[str, Any], n_shot: int
) -> None:
    model = make(tiny_clip_dir, **options)
    calls, n = encoded(model), 20 if "head" in options else 150
    results, confusions = [], []
    for evaluation in ("direct", "bank"):
        calls.clear()
        source = data(many, test_episodes=n, evaluation=evaluation, n_shot=n_shot)
        results += trainer(tmp_path).test(model, source, verbose=False)
        assert model.evaluated is not None
        confusions.append(model.evaluated.confusion)
        # Two frames of each of the 30 videos, or of those in each episode.
        assert sum(calls) == 2 * (30 if evaluation == "bank" else n * 3 * (n_shot + 1))
    direct, bank = results
    assert bank.keys() == direct.keys()
    for name, value in direct.items():
        assert bank[name] == (pytest.approx(value, abs=1e-4) if "loss" in name else value), name
    assert confusions[1].equal(confusions[0])
    assert "head" in options or 0.2 < bank["test/accuracy"] < 1


# With few episodes the ranks' own name other videos, and as many batches don't come to each.
@pytest.mark.parametrize(
    ("devices", "n_episodes"),
    [(2, 131), (2, 3), (3, 4), *(pytest.param(n, 1000, marks=pytest.mark.slow) for n in (2, 3))],
)
def test_any_number_of_ranks_gives_the_same_bits(
    many: Path, tiny_clip_dir: Path, tmp_path: Path, devices: int, n_episodes: int
) -> None:
    options: dict[str, Any] = {"test_episodes": n_episodes, "n_query_eval": 2, "store": str(tmp_path / "store")}
    (alone,) = trainer(tmp_path).test(make(tiny_clip_dir, class_weight=1.0), data(many, **options), verbose=False)
    together = trainer(tmp_path, devices=devices, strategy="ddp_fork", use_distributed_sampler=False)
    model = make(tiny_clip_dir, class_weight=1.0)
    for folder in ("store", "another"):  # features that are there, and that are not
        options["store"] = str(tmp_path / folder)
        (shared,) = together.test(model, data(many, **options), verbose=False)
        assert shared == alone


@pytest.mark.parametrize(
    "options",
    [{}, {"text_fusion": 0.4, "selection": "expectation"}, {"selection": "sample"}, *({"head": h} for h in HEADS)],
)
def test_unknown_queries_change_nothing_of_the_others_and_are_told_alike_either_way(
    many: Path, tiny_clip_dir: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = make(tiny_clip_dir, **options)
    found = {}
    for evaluation in ("direct", "bank"):
        for unknown in (0, 2):
            source = data(many, test_episodes=20, evaluation=evaluation, unknown_queries=unknown)
            trainer(tmp_path).test(model, source, verbose=False)
            assert model.evaluated is not None
            found[evaluation, unknown] = model.evaluated
    names = [f"test/{name}" for name in OPEN_SET]
    for evaluation in ("direct", "bank"):
        closed, opened = found[evaluation, 0], found[evaluation, 2]
        assert opened.confusion.equal(closed.confusion)
        of_unknown = {name: value for name, value in opened.numbers.items() if f"test/{name}" in names}
        assert opened.numbers == closed.numbers | of_unknown
        assert len(of_unknown) == len(names)
    for name in OPEN_SET:
        value = float(found["direct", 2].numbers[name])
        assert float(found["bank", 2].numbers[name]) == pytest.approx(value, abs=0.02), name
        if "oscr" in name:
            assert value <= float(found["direct", 2].numbers["accuracy"])


def test_unknown_queries_are_told_by_what_a_user_computes(many: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    model, source = make(tiny_clip_dir).eval(), data(many, test_episodes=30, n_shot=2, unknown_queries=3)
    trainer(tmp_path).test(model, source, verbose=False)
    assert model.evaluated is not None
    direct = data(many, test_episodes=30, n_shot=2, unknown_queries=3, evaluation="direct")
    direct.setup("test")
    known, right, unknown = [], [], []
    of_features: Any = []
    for batch in direct.test_dataloader():
        classes = [list(row) for row in batch["class_indices"].tolist()]
        assert not any(
            c in row for row, of_row in zip(classes, batch["unknown_classes"].tolist(), strict=True) for c in of_row
        )
        with torch.no_grad():
            known.append(model(batch).logits.amax(-1))
            right.append(model(batch).logits.argmax(-1) == batch["query_labels"])
            unknown.append(model(batch | {"query": batch["unknown"], "draws": batch["unknown_draws"]}).logits.amax(-1))
            videos = {role: model.model.encode_frames(batch[role]) for role in ("support", "query", "unknown")}
        of_features.append(batch | videos)
    k, r, u = (torch.cat(part).flatten() for part in (known, right, unknown))
    expected = {"auroc": auroc(k, u), "oscr": oscr(k, r, u), "fpr95": fpr_at_recall(k, u)}
    for name, value in expected.items():
        assert float(model.evaluated.numbers[f"{name}/distance"]) == pytest.approx(value, abs=1e-3), name
    # Other people's data modules may deal them, too.
    loader = torch.utils.data.DataLoader(of_features, batch_size=None)
    (numbers,) = trainer(tmp_path).test(model, loader, verbose=False)
    for name, value in expected.items():
        assert numbers[f"test/{name}/distance"] == pytest.approx(value, abs=1e-3), name


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as each of several processes has on two cores: on others the last bits of logits may differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_any_number_of_ranks_tells_unknown_queries_alike(many: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    results = []
    for devices, evaluation in ((1, "bank"), (2, "bank"), (3, "bank"), (1, "direct"), (2, "direct")):
        several = {} if devices == 1 else {"devices": devices, "strategy": "ddp_fork", "use_distributed_sampler": False}
        source = data(many, test_episodes=131, n_query_eval=2, unknown_queries=2, evaluation=evaluation)
        results.append(trainer(tmp_path, **several).test(make(tiny_clip_dir), source, verbose=False)[0])
    assert results[1] == results[0]
    assert results[2] == results[0]
    assert results[4] == results[3]
    assert {f"test/{name}" for name in OPEN_SET} < results[0].keys()


def test_a_video_has_the_same_features_whatever_is_encoded_with_it(many: Path, tiny_clip_dir: Path) -> None:
    model, source = make(tiny_clip_dir).eval(), data(many, test_episodes=40)
    # A tower's last bits depend on how many frames it gets at once, by machine and size; here they always do.
    model.model.backbone.visual.register_forward_hook(lambda _, inputs, output: output + 1e-3 * len(inputs[0]))
    source.setup("test")
    table: Any = source.test_dataloader().dataset
    with torch.no_grad():
        whole = encode_videos(model.model, table, range(40))
        for number in (0, 7, 39):
            named = table.named([number])
            assert 0 < len(named) < 16
            assert torch.equal(encode_videos(model.model, table, [number])[named], whole[named])


class Watch(lightning.Callback):
    """Notes how many frames were encoded, and how many episodes counted, at each validation's end."""

    def __init__(self, calls: list[int]) -> None:
        self.calls = calls
        self.seen: list[tuple[int, int]] = []

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append((sum(self.calls), int(pl_module.metrics["val_metrics"]["accuracy"].episodes)))
        self.calls.clear()


def test_sanity_checks_and_limits_encode_what_they_play(many: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    model = make(tiny_clip_dir)
    watch = Watch(encoded(model))
    # 200 episodes are played in batches of three; the sanity check plays two of each.
    source = data(many, val_episodes=200, episodes_per_step=1)
    options: dict[str, Any] = {"limit_val_batches": 2, "num_sanity_val_steps": 1, "callbacks": [watch]}
    trainer(tmp_path, max_steps=1, **options).fit(model, source)
    source.setup("validate")
    batches: Any = source.val_dataloader()
    table = batches.dataset
    sanity, validation = table.named([0, 1]), table.named(range(6))
    assert len(sanity) < len(validation) < 30
    training = 9
    assert watch.seen == [(2 * len(sanity), 2), (2 * (len(validation) + training), 6)]


class Hits(lightning.Callback):
    """Counts the queries that got their own class's prompt."""

    hits = 0

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.hits += int((outputs.output.prompt_indices == outputs.episode["query_labels"]).sum())


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_precision_of_all_weights_encodes_once_and_counts_exactly(
    precision: str, many: Path, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    model, hits = make(tiny_clip_dir), Hits()
    calls = encoded(model)
    # In batches of three episodes; bfloat16 counts to 256.
    run = trainer(tmp_path, precision=precision, callbacks=[hits])
    (found,) = run.test(model, data(many, test_episodes=210), verbose=False)
    assert sum(calls) == 2 * 30
    assert hits.hits > 0
    assert found["test/pps_accuracy"] == pytest.approx(hits.hits / (210 * 3), abs=1e-6)


def test_a_frozen_tower_encodes_its_validation_once(many: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    for frozen in (True, False):
        model = make(tiny_clip_dir, freeze_backbone=frozen)
        calls = encoded(model)
        options = {"val_episodes": 100, "validate_every": 1, "episodes_per_step": 1}
        trainer(tmp_path, max_steps=2, num_sanity_val_steps=0).fit(model, data(many, **options))
        training = 2 * 9 * 2  # of each step's nine clips
        assert sum(calls) - training == 2 * 30 * (1 if frozen else 2)


def test_other_weights_are_encoded_anew(many: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    model, source = make(tiny_clip_dir, freeze_backbone=True), data(many, test_episodes=20)
    run = trainer(tmp_path)
    (first,) = run.test(model, source, verbose=False)
    weights = {name: torch.randn_like(w) if "visual" in name else w for name, w in model.state_dict().items()}
    model.load_state_dict(weights)
    (second,) = run.test(model, source, verbose=False)
    assert first["test/loss/total"] != second["test/loss/total"]
    # The tower's alone, and another precision.
    tower = model.model.backbone.visual
    tower.load_state_dict({name: w + 0.01 * torch.randn_like(w) for name, w in tower.state_dict().items()})
    (third,) = run.test(model, source, verbose=False)
    assert third["test/loss/total"] != second["test/loss/total"]
    half = trainer(tmp_path, precision="bf16-mixed")
    (kept,), (fresh,) = (half.test(model, one, verbose=False) for one in (source, data(many, test_episodes=20)))
    assert kept == fresh


def test_features_on_disk_are_of_one_preprocessing_and_of_no_tower_that_learns(
    many: Path, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    model, options = make(tiny_clip_dir), {"test_episodes": 20, "store": str(tmp_path / "store")}
    (first,) = trainer(tmp_path).test(model, data(many, **options), verbose=False)
    model.model.backbone.mean += 0.3
    (second,) = trainer(tmp_path).test(model, data(many, **options), verbose=False)
    assert first["test/loss/total"] != second["test/loss/total"]
    assert len(list((tmp_path / "store").iterdir())) == 2
    options = {"val_episodes": 4, "validate_every": 1, "episodes_per_step": 1, "store": str(tmp_path / "fit")}
    trainer(tmp_path, max_steps=2).fit(model, data(many, **options))
    assert not (tmp_path / "fit").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"store .*file is no folder"):
        data(many, store=str(tmp_path / "file"))


def test_unusable_videos_end_it_or_are_replaced_as_by_the_direct_path(
    many: Path, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    model, manifest = make(tiny_clip_dir), with_empty(many, tmp_path, "test0_0.mp4", "test3_5.mp4")
    with pytest.raises(UserError, match=r"2 of the 30 videos of the test split are unusable.*test0_0\.mp4.*test3_5"):
        trainer(tmp_path).test(model, data(manifest, test_episodes=50), verbose=False)
    results = []
    for evaluation in ("direct", "bank"):
        source = data(manifest, test_episodes=50, evaluation=evaluation, max_unusable=0.1)
        with pytest.warns(UserWarning, match="takes its place"):
            results += trainer(tmp_path).test(model, source, verbose=False)
    assert results[0]["test/replaced_videos"] == results[1]["test/replaced_videos"] > 10
    assert results[0]["test/accuracy"] == results[1]["test/accuracy"]


@pytest.mark.slow
def test_features_on_disk_serve_another_shot_and_seed(many: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    copied = tmp_path / "videos"
    shutil.copytree(many.parent, copied)
    model, store = make(tiny_clip_dir), tmp_path / "store"
    calls = encoded(model)

    def test(**options: Any) -> tuple[float, int]:
        calls.clear()
        (result,) = trainer(tmp_path).test(model, data(copied / "m.csv", store=str(store), **options), verbose=False)
        return result["test/loss/total"], sum(calls)

    first, frames = test(test_episodes=100)
    assert frames == 2 * 30
    assert test(test_episodes=100) == (first, 0)
    again, frames = test(test_episodes=100, n_shot=3, eval_seed=5)
    assert (frames, again != first) == (0, True)
    (direct,) = trainer(tmp_path).test(
        model, data(copied / "m.csv", test_episodes=100, n_shot=3, eval_seed=5, evaluation="direct"), verbose=False
    )
    assert again == pytest.approx(direct["test/loss/total"], abs=1e-4)
    # A video that changed is encoded anew, and it alone; other frames and other weights are another file.
    clips.render(copied / "test2_3.mp4", n_frames=50, size=(48, 32))
    changed, frames = test(test_episodes=100)
    assert (frames, changed != first) == (2, True)
    assert test(test_episodes=100, frames=3)[1] == 3 * 30
    assert test(test_episodes=100) == (changed, 0)
    with torch.no_grad():
        next(model.model.backbone.visual.parameters()).add_(0.1)
    assert test(test_episodes=100)[1] == 2 * 30
    assert len(list(store.iterdir())) == 3


def test_one_process_adds_features_to_a_file_and_any_number_reads_it(
    many: Path, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    model, options = make(tiny_clip_dir), {"store": str(tmp_path / "store")}
    (first,) = trainer(tmp_path).test(model, data(many, test_episodes=5, **options), verbose=False)
    (file,) = (tmp_path / "store").iterdir()
    before = file.read_bytes()
    with locked(beside(file, ".lock"), "features", file):  # as another process does
        (again,) = trainer(tmp_path).test(model, data(many, test_episodes=5, **options), verbose=False)
        with pytest.raises(UserError, match=rf"another process writes the features {file}: wait for its end"):
            trainer(tmp_path).test(model, data(many, test_episodes=100, **options), verbose=False)
    assert again == first
    assert file.read_bytes() == before
    trainer(tmp_path).test(model, data(many, test_episodes=100, **options), verbose=False)
    assert len(file.read_bytes()) > len(before)
    assert list((tmp_path / "store").iterdir()) == [file]


def test_any_damage_to_features_on_disk_is_seen(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, torch.nn.Linear(2, 2), "frames 2")
    features = {f"{k}.mp4 1:2:3": torch.full((2, 4), k + 1.0) for k in range(5)}
    store.write(features)
    whole = store.path.read_bytes()
    rng = random.Random(0)
    outcomes = {"refused": 0, "read": 0}
    for _ in range(2000):
        content = bytearray(whole)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        else:
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        store.path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = store.read()
        outcomes["read" if read else "refused"] += 1
        assert all(value.equal(features[name]) for name, value in read.items())
    assert outcomes["refused"] > 1900  # all that matters is covered by the checksum


def test_a_head_trains_from_augmentations_of_the_videos(many: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    model = make(tiny_clip_dir, freeze_backbone=True, lr=1e-3)
    calls = encoded(model)
    options = {"episodes_per_step": 2, "batch_size": 2, "val_episodes": 20, "validate_every": 3}
    source = data(many, train_augmentations=3, flip=True, **options)
    before = {name: weight.clone() for name, weight in model.model.head.state_dict().items()}
    trainer(tmp_path, max_steps=6, num_sanity_val_steps=0).fit(model, source)
    val: Any = source.val_dataloader()
    assert sum(calls) == 2 * (30 * 3 + len(val.dataset.videos))  # 30 videos three times, and val's once
    assert any(not weight.equal(before[name]) for name, weight in model.model.head.state_dict().items())

    # Each augmentation is what its index says: a video with the frames, the crop and the flip of its own draws.
    train: Any = source.train_dataloader()
    table = train.dataset
    reader = source.reader
    for index in (0, 1, 2, 50):
        (read,) = table.clips([[index]])
        assert read.frames[0].equal(reader.read(table.videos[index].path, table.uniforms(index))[0])
    assert len({tuple(table.uniforms(index).tolist()) for index in range(90)}) == 90
    # Episodes name the videos that they would have had as frames, in one of their augmentations each.
    frames = data(many, **options)
    frames.setup("fit")
    dataset: Any = frames.train_dataloader().dataset
    seen = set()
    for number in range(50):
        episode, plan = table.episodes([number]), dataset.plan(number)
        for role, rows in (("support", plan.support), ("query", plan.query)):
            indices = episode[role].flatten().tolist()
            assert [table.videos[index].path for index in indices] == [video.path for row in rows for video in row]
            seen |= {index % 3 for index in indices}
        direct = dataset[number]
        assert all(episode[key].equal(direct[key]) for key in ("draws", "query_labels", "class_indices"))
    assert seen == {0, 1, 2}


def test_augmentations_need_a_frozen_tower_and_are_few_in_a_trial_run(
    many: Path, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"train_augmentations": 2, "episodes_per_step": 1, "val_episodes": 4}
    with pytest.raises(UserError, match=r"data.train_augmentations trains from features.*set model.freeze_backbone"):
        trainer(tmp_path, max_steps=1).fit(make(tiny_clip_dir), data(many, **options))
    model = make(tiny_clip_dir, freeze_backbone=True)
    calls = encoded(model)
    trainer(tmp_path, fast_dev_run=True, limit_val_batches=0).fit(model, data(many, **options))
    assert sum(calls) <= 2 * 2 * 9 + 2 * 6  # two augmentations of nine videos, and a validation episode


def test_unusable_videos_have_no_augmentations(many: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    model, manifest = make(tiny_clip_dir, freeze_backbone=True), with_empty(many, tmp_path, "train2_2.mp4")
    source = data(manifest, train_augmentations=2, episodes_per_step=4, max_unusable=0.1, val_episodes=4)
    with pytest.warns(UserWarning, match=r"train2_2\.mp4: it is empty; .*takes its place"):
        trainer(tmp_path, max_steps=10).fit(model, source)
    train: Any = source.train_dataloader()
    table = train.dataset
    episodes = table.episodes(range(40))
    named = {table.videos[index].path for index in episodes["query"].flatten().tolist()}
    assert str(tmp_path / "train2_2.mp4") not in named
    assert episodes["replaced"].sum() > 0
