"""Training and testing from features that somebody computed elsewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import soak
from clip_m2df import CLIPM2DF, EpisodeDataModule, UserError
from clip_m2df.cli import main
from clip_m2df.datasets.feature_tables import write_feature_table
from tests import clips
from tests.conftest import fails
from tests.conftest import quiet_trainer as trainer

FRAMES, DIM, LABELS = 3, 16, tuple(f"{split} {c}" for split in ("train", "val", "test") for c in range(4))
HEAD: dict[str, Any] = {"hidden_dim": 32, "num_heads": 4}
SHAPE: dict[str, Any] = {"n_way": 3, "n_query": 2, "frames": FRAMES, "episodes_per_step": 2, "validate_every": 2}
SHAPE |= {"val_episodes": 5, "test_episodes": 30}


def embeddings(seed: int = 0) -> dict[str, Tensor]:
    return dict(zip(LABELS, torch.randn(len(LABELS), DIM, generator=torch.Generator().manual_seed(seed)), strict=True))


def rows_of(n: int, paths: str = "{}/{}.mp4") -> list[dict[str, str]]:
    """The rows of n videos of each class."""
    return [{"path": paths.format(c, i), "label": c, "split": c.split()[0]} for c in LABELS for i in range(n)]


def features(table: Path, classes: dict[str, Tensor] | None, *, noise: float = 1.0, paths: str = "{}/{}.mp4") -> Path:
    """A table of videos that lie around the embedding of their class."""
    generator = torch.Generator().manual_seed(1)
    rows = rows_of(6, paths)
    centres = torch.stack([embeddings()[row["label"]] for row in rows]).unsqueeze(1)
    numbers = centres + noise * torch.randn(len(rows), FRAMES, DIM, generator=generator)
    write_feature_table(table, rows, numbers, classes)
    return table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return features(tmp_path_factory.mktemp("table") / "own.safetensors", embeddings())


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without class embeddings."""
    return features(tmp_path_factory.mktemp("bare") / "own.parquet", None)


def model(dim: int = DIM, **options: Any) -> CLIPM2DF:
    torch.manual_seed(0)
    return CLIPM2DF("features", {"dim": dim}, **({} if "head" in options else {"head_options": HEAD}) | options)


def fit(table: Path, folder: Path, own: CLIPM2DF | None = None, **options: Any) -> CLIPM2DF:
    own = model(lr=1e-3) if own is None else own
    trainer(folder, **{"max_steps": 4, **options}).fit(own, EpisodeDataModule(str(table), **SHAPE))
    return own


def measured(table: Path, folder: Path, own: CLIPM2DF, **options: Any) -> dict[str, float]:
    data = EpisodeDataModule(str(table), **SHAPE)
    return dict(trainer(folder, **options).test(own, data, verbose=False)[0])


def test_class_embeddings_are_in_the_place_of_prompts(table: Path, tmp_path: Path) -> None:
    own = model()
    assert measured(table, tmp_path, own)["test/pps_accuracy"] == 1
    others = features(tmp_path / "others.parquet", embeddings(seed=3))
    assert measured(others, tmp_path, own)["test/pps_accuracy"] < 0.8


@pytest.mark.parametrize("head", ["otam", "bi_mhm", "nearest_prototype"])
def test_heads_without_prompts_need_no_class_embeddings(
    bare: Path, tmp_path: Path, head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line, which makes the model fit the table."""
    run = [f"--data.manifest={bare}", "--data.n_way=3", "--data.test_episodes=30", "--data.num_workers=0"]
    run += [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    run.append("--trainer.enable_progress_bar=false")
    assert main(["test", *run, f"--model.head={head}"]) == 0
    said = capsys.readouterr().out
    assert f"features of {FRAMES} frames, {DIM} numbers each" in said
    accuracy = re.search(r"([\d.]+) ± ", said)
    assert accuracy is not None
    assert float(accuracy[1]) == pytest.approx(
        100 * measured(bare, tmp_path, model(head=head))["test/accuracy"], abs=0.051
    )
    assert float(accuracy[1]) > 60
    said = fails(["fit", *run, "--trainer.max_steps=1"], capsys)
    assert "feature table with class embeddings" in said
    assert "data.frames 3" in fails(["test", *run, f"--model.head={head}", "--data.frames=4"], capsys)


def test_a_model_keeps_the_classes_of_its_training(table: Path, tmp_path: Path) -> None:
    own = fit(table, tmp_path / "a", enable_checkpointing=True)
    (checkpoint,) = (tmp_path / "a").rglob("*.ckpt")
    own.save_pretrained(tmp_path / "saved")
    expected = measured(table, tmp_path, own)
    labels = [LABELS[5], LABELS[0]]
    for loaded in (CLIPM2DF.load_from_checkpoint(checkpoint), CLIPM2DF.from_pretrained(tmp_path / "saved")):
        prompts = torch.stack([embeddings()[label] for label in labels])
        assert loaded.encode_prompts(labels).equal(prompts)
        with pytest.raises(UserError, match="no embedding of the class 'somersault', but of train 0"):
            loaded.encode_prompts(["somersault"])
        with pytest.raises(UserError, match="no tower that takes frames"):
            loaded.model.encode_frames(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        assert measured(table, tmp_path, loaded) == expected
    # Another table's own embeddings count.
    other = features(tmp_path / "other.parquet", embeddings(seed=5))
    for loaded in (own, CLIPM2DF.load_from_checkpoint(checkpoint)):
        assert measured(other, tmp_path, loaded)["test/pps_accuracy"] < 0.8
        assert loaded.encode_prompts(labels).equal(torch.stack([embeddings(seed=5)[label] for label in labels]))
        loaded.save_pretrained(tmp_path / "again")
        again = CLIPM2DF.from_pretrained(tmp_path / "again")
        assert again.encode_prompts(labels).equal(prompts)


def test_a_tower_takes_features_of_its_own(tiny_clip_dir: Path, tmp_path: Path) -> None:
    rows = rows_of(4)
    write_feature_table(tmp_path / "t.safetensors", rows, torch.randn(len(rows), FRAMES, 32))
    own = CLIPM2DF(str(tiny_clip_dir), head_options=HEAD, freeze_backbone=True)
    fit(tmp_path / "t.safetensors", tmp_path, own)
    plain = CLIPM2DF(str(tiny_clip_dir), head_options=HEAD).encode_prompts(LABELS[:4])
    assert own.encode_prompts(LABELS[:4]).equal(plain)  # those of its text tower
    classes = dict(zip(LABELS, torch.randn(len(LABELS), 32), strict=True))
    write_feature_table(tmp_path / "t.safetensors", rows, torch.randn(len(rows), FRAMES, 32), classes)
    measured(tmp_path / "t.safetensors", tmp_path, own)
    assert own.encode_prompts(LABELS[:4]).equal(torch.stack([classes[label] for label in LABELS[:4]]))
    with pytest.raises(UserError, match=r"a feature table trains from features.*set model.freeze_backbone"):
        fit(tmp_path / "t.safetensors", tmp_path, CLIPM2DF(str(tiny_clip_dir), head_options=HEAD))


def test_features_that_do_not_fit_are_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"own.safetensors have {DIM} numbers a frame, and those of the model .* 8"):
        fit(table, tmp_path, model(dim=8))
    own = fit(table, tmp_path)
    rows = rows_of(4)
    write_feature_table(tmp_path / "more.parquet", rows, torch.randn(len(rows), 5, DIM))
    with pytest.raises(UserError, match=r"more.parquet are of 5 frames, and the model .* was trained on 3"):
        trainer(tmp_path).test(own, EpisodeDataModule(str(tmp_path / "more.parquet"), **SHAPE | {"frames": 5}))
    with pytest.raises(UserError, match=r"frames is 3, but 5 in the feature table .*: give --data.frames 5"):
        fit(tmp_path / "more.parquet", tmp_path)
    with pytest.raises(UserError, match=r"train_augmentations is 2, but 0 in the feature table"):
        EpisodeDataModule(str(table), train_augmentations=2, **SHAPE).setup("fit")
    (tmp_path / "texts.csv").write_text("label,text\ntest 0,zero\n")
    with pytest.raises(UserError, match=r"class_texts .* class embeddings .*: leave one of them out"):
        EpisodeDataModule(str(table), class_texts=str(tmp_path / "texts.csv"), **SHAPE).setup("fit")
    of_videos = {"root": "/data", "cache": "caches", "jitter_queries": True, "evaluation": "direct"}
    for option, value in of_videos.items():
        with pytest.raises(UserError, match=f"{option} is of videos, and the feature table"):
            EpisodeDataModule(str(table), **SHAPE | {option: value})
    widths: list[tuple[dict[str, Any], str]] = [
        ({}, r"backbone_options.dim"),
        ({"dim": 0}, "dim is 0"),
        ({"dim": 4, "image_size": 32}, "the one option dim"),
    ]
    for options, said in widths:
        with pytest.raises(UserError, match=said):
            CLIPM2DF("features", options)
    with pytest.raises(UserError, match="dim is of the backbone features"):
        CLIPM2DF("tiny", {"dim": 4})


def test_a_model_of_features_has_no_use_for_videos(table: Path, manifest: Path, tmp_path: Path) -> None:
    for data in (EpisodeDataModule(str(manifest), **SHAPE), EpisodeDataModule(str(manifest), size=32, **SHAPE)):
        with pytest.raises(UserError, match=r"no tower that takes videos: give a feature table as data\.manifest"):
            trainer(tmp_path).test(model(), data, verbose=False)
    for file in (table, features(tmp_path / "own.parquet", None)):
        with pytest.raises(UserError, match=rf"{file.name} is a feature table.* give it as data\.manifest"):
            CLIPM2DF(str(file))


def test_no_file_is_opened_by_a_name_in_a_table(tmp_path: Path) -> None:
    """A table can come from anybody, and a report shows frames."""
    private = tmp_path / "private"
    private.mkdir()
    table = features(tmp_path / "t.safetensors", embeddings(), paths=str(private / "{} {}.mp4"))
    for label in LABELS:
        for i in range(6):
            clips.render(private / f"{label} {i}.mp4", n_frames=4, size=(32, 32))
    run = [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu", "--data.n_way=3"]
    run += [f"--data.manifest={table}", "--data.test_episodes=5", "--trainer.enable_progress_bar=false"]
    assert main(["test", *run, "--model.head=otam", f"--report={tmp_path / 'page.html'}"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "test 0" in page
    assert "data:image/jpeg" not in page
    assert "data:image/png" not in page


def test_two_processes_say_what_one_says(table: Path, tmp_path: Path) -> None:
    own = fit(table, tmp_path)
    alone = measured(table, tmp_path, own)
    assert measured(table, tmp_path, own, devices=2, strategy="ddp_fork", use_distributed_sampler=False) == alone


@pytest.mark.slow
def test_a_run_goes_on_as_if_nothing_had_happened(table: Path, tmp_path: Path) -> None:
    common = ["--config=demo_5way1shot.yaml", f"--data.manifest={table}", "--model.backbone=features"]
    common += ["--data.n_way=3", "--data.n_query=2", "--data.batch_size=2", "--data.episodes_per_step=4"]
    common += [f"--data.frames={FRAMES}", "--data.validate_every=2", "--data.val_episodes=6", "--data.num_workers=0"]
    common += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model.lr=0.001"]
    common += ["--model.head_options.hidden_dim=32", "--model.head_options.num_heads=4"]
    for name, steps in (("whole", [6]), ("parts", [2, 4, 6])):
        for index, last in enumerate(steps):
            again = ["--ckpt_path=last"] if index else []
            run = [f"--trainer.default_root_dir={tmp_path / name}", f"--trainer.max_steps={last}", *again]
            assert main(["fit", *common, *run]) == 0
    assert soak.differences(tmp_path / "whole", tmp_path / "parts") == []
