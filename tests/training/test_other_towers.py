"""Every command with other towers than the tests' usual one: of other families, sizes and types, and without text."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from clip_m2df import CLIPM2DF, CLIPBackbone, EpisodeDataModule, FewShotClassifier
from clip_m2df.cli import main
from clip_m2df.commands.configs import resolve_configs
from clip_m2df.commands.trainer import run
from clip_m2df.errors import UserError
from clip_m2df.export import export_model
from clip_m2df.training.checkpoints import read_checkpoint
from tests.classifier.conftest import predict_args
from tests.clip.towers import save_folder, save_open_clip
from tests.conftest import fails, options, quiet_trainer
from tests.test_export import opened

TOWERS = ("siglip_2", "open_clip", "dinov2", "visual_only")
# What of CLIP-M²DF needs no prompts.
WITHOUT_TEXT = ["--model.head_options.pps=false", "--model.head_options.reliability=[visual]"]
UNTRAINED = ["--model.head=otam", "--model.freeze_backbone=true"]


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The small towers by their names, as ``model.backbone`` takes them."""
    folder = tmp_path_factory.mktemp("towers")
    save_folder("siglip_2", folder / "siglip_2")
    save_folder("dinov2", folder / "dinov2", own_size=56)
    files = {name: save_open_clip(folder / name, text=name == "open_clip") for name in ("open_clip", "visual_only")}
    return {name: str(files.get(name, folder / name)) for name in TOWERS}


def own_size(manifest: Path, tower: str, folder: Path, *more: str) -> list[str]:
    """The options of a run that leave the size of frames to the tower; of another head none of the usual one's."""
    given = options(manifest, Path(tower), folder, "--data.resize=null", "--data.size=null")
    if any(option.startswith("--model.head=") for option in more):
        given = [*(option for option in given if "head_options" not in option), "--model.head_options=null"]
    return resolve_configs([*given, "--model.freeze_backbone=false", *more])


# Done to every tower


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_goes_all_the_way(
    name: str, towers: dict[str, str], manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = WITHOUT_TEXT if name in ("dinov2", "visual_only") else []
    args = own_size(manifest, towers[name], tmp_path / "run", *head, "--model.lr=1e-3")
    assert main(["fit", *args]) == 0
    page = tmp_path / "test.html"
    assert main(["test", *args, "--ckpt_path=best", f"--report={page}"]) == 0
    assert page.stat().st_size > 0
    assert re.search(r"test/accuracy *┃ *[\d.]+ ± [\d.]+ %", capsys.readouterr().out)
    (metrics,) = (tmp_path / "run").rglob("metrics.csv")
    logged = metrics.read_text().splitlines()[0].split(",")
    assert "val/view_agreement" in logged
    assert ("val/pps_accuracy" in logged) == (not head)

    # Trained, head and tower, and the same from file to folder and back.
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    model = CLIPM2DF.load_from_checkpoint(best).eval()
    assert model.reading is not None
    assert (model.reading["frames"], model.reading["resize"]) == (2, 37)
    start, trained = CLIPBackbone.load(towers[name]).visual.state_dict(), model.model.backbone.visual.state_dict()
    assert not any(torch.equal(trained[key], weight) for key, weight in start.items() if key.endswith("q_proj.weight"))
    model.save_pretrained(tmp_path / "saved")
    card, kind = (tmp_path / "saved" / "README.md").read_text(), {"siglip_2": "SigLIP", "dinov2": "DINOv2"}
    assert f": {kind.get(name, 'ViT')}, 32 x 32 pixels, embeddings of 32 |" in card
    assert ("| prompt | none, as there is no text tower |" in card) == bool(head)
    again = CLIPM2DF.from_pretrained(tmp_path / "saved")
    frames = torch.randint(0, 256, (3, 2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        features = model.model.encode_frames(frames)
        assert torch.equal(again.model.encode_frames(frames), features)
        assert torch.equal(again.encode_prompts(["a dog", "Cat"]), model.encode_prompts(["a dog", "Cat"]))

    # predict says what the classifier says.
    support = tmp_path / "support"
    for c in range(3):
        (support / f"class {c}").mkdir(parents=True)
        for v in range(2):
            (support / f"class {c}" / f"{v}.mp4").symlink_to(manifest.parent / f"test{c}_{v}.mp4")
    videos = [str(manifest.parent / f"test{c}_2.mp4") for c in range(3)]
    table = tmp_path / "labels.csv"
    page = tmp_path / "labels.html"
    model_of = ["--ckpt_path", str(tmp_path / "saved"), "--report", str(page)]
    assert main(predict_args(support, videos, table, *model_of)) == 0
    assert ("Prompt selection" in page.read_text()) == (not head)
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    classifier = FewShotClassifier.from_checkpoint(best).fit(support)
    assert [row[1] for row in rows] == list(classifier.predict(videos))
    found = np.array([[float(cell) for cell in row[3:6]] for row in rows])
    np.testing.assert_allclose(found, classifier.predict_proba(videos), atol=2e-6)
    assert bool(classifier.explain(videos[0]).prompt_probabilities) == (not head)
    assert classifier.explain(videos[0]).figure().width > 0

    # Exported, it gives the same features and scores.
    shapes: dict[str, Any] = {"n_way": 3, "n_shot": 2, "n_queries": 2, "frames": 2, "batch": 4}
    export_model(model, tmp_path / "exported", class_names=["a", "b", "c"], **shapes)
    for suffix in ("onnx", "pt2"):
        program = opened(tmp_path / "exported" / f"tower.{suffix}", "frames")
        torch.testing.assert_close(program(frames=frames[:2].flatten(0, 1))["features"], features[:2].flatten(0, 1))
        assert (tmp_path / "exported" / f"head.{suffix}").stat().st_size > 0


@pytest.mark.parametrize("name", TOWERS)
def test_an_untrained_tower_is_measured_and_predicts(
    name: str, towers: dict[str, str], manifest: Path, tmp_path: Path
) -> None:
    args = own_size(manifest, towers[name], tmp_path / "run", *UNTRAINED)
    done = run(["test", *args])
    with torch.no_grad():  # the same episodes, each encoded by itself
        direct = run(["test", *args, "--data.evaluation=direct"])
    assert float(done.model.evaluated.numbers["accuracy"]) == float(direct.model.evaluated.numbers["accuracy"])
    assert ("pps_accuracy" in done.model.evaluated.numbers) == (name in ("siglip_2", "open_clip"))
    support, table = tmp_path / "support" / "a", tmp_path / "labels.csv"
    support.mkdir(parents=True)
    (support / "0.mp4").symlink_to(manifest.parent / "test0_0.mp4")
    args = predict_args(support.parent, [manifest.parent / "test0_1.mp4"], table, "--backbone", towers[name])
    assert main(args) == 0
    assert ",a,1.000000," in table.read_text()
    held = ["--backbone_options", "image_size=40", "dtype=bfloat16", "--precision", "16-mixed"]
    with pytest.warns(UserWarning, match="interpolated to those of 40"):
        assert main([*args, *held]) == 0


# Sizes


def test_the_tower_says_how_large_frames_are(towers: dict[str, str], manifest: Path, tmp_path: Path) -> None:
    args = own_size(manifest, towers["visual_only"], tmp_path, *UNTRAINED)
    reader = run(["test", *args]).datamodule.reader
    assert (reader.size, reader.resize) == (32, 37)
    with pytest.warns(UserWarning, match="images of 32 pixels: its positions are interpolated to those of 48"):
        larger = run(["test", *args, "--data.size=48"])
    assert (larger.datamodule.reader.size, larger.datamodule.reader.resize) == (48, 55)
    assert larger.model.image_size == 48
    with pytest.warns(UserWarning, match="interpolated"):
        asked = run(["test", *args, "--model.backbone_options.image_size=48"])
    assert (asked.datamodule.reader.size, asked.datamodule.reader.resize) == (48, 55)
    assert asked.model.evaluated.numbers == larger.model.evaluated.numbers


def test_two_sizes_contradict_each_other(
    towers: dict[str, str], manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = own_size(manifest, towers["visual_only"], tmp_path, *UNTRAINED)
    said = fails(["test", *args, "--data.size=48", "--model.backbone_options.image_size=40"], capsys)
    assert "data.size is 48, and model.backbone_options.image_size 40" in said
    assert "resize 31 is smaller than the tower's size 32" in fails(["test", *args, "--data.resize=31"], capsys)


def test_224_pixels_of_256_where_there_is_no_tower(manifest: Path) -> None:
    data = EpisodeDataModule(str(manifest), n_way=3, n_query=2)
    data.setup("fit")
    assert (data.reader.size, data.reader.resize) == (224, 256)
    assert EpisodeDataModule(str(manifest), size=336).reader.resize == 384
    with pytest.raises(UserError, match="resize 200 is smaller than size 224"):
        EpisodeDataModule(str(manifest), resize=200, size=224)


@pytest.mark.slow
def test_a_run_keeps_the_size_that_was_asked_for(towers: dict[str, str], manifest: Path, tmp_path: Path) -> None:
    args = own_size(manifest, towers["siglip_2"], tmp_path / "run")
    with pytest.warns(UserWarning, match="interpolated"):
        assert main(["fit", *args, "--data.size=48"]) == 0
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert checkpoint["hyper_parameters"]["backbone"]["visual_config"]["image_size"] == 48
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*interpolated")
        assert main(["fit", *args, "--ckpt_path=last", "--trainer.max_steps=3"]) == 0
        measured = run(["test", *args, "--ckpt_path=best"])
    assert (measured.datamodule.reader.size, measured.datamodule.reader.resize) == (48, 55)


# Types


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_frozen_tower_of_any_type_serves_under_any_precision(
    dtype: str, precision: str, towers: dict[str, str], manifest: Path, tmp_path: Path
) -> None:
    args = own_size(manifest, towers["siglip_2"], tmp_path / "run", "--model.freeze_backbone=true")
    args += [f"--model.backbone_options.dtype={dtype}", f"--data.store={tmp_path / 'store'}"]
    args += [f"--trainer.precision={precision}"]
    assert main(["fit", *args]) == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the features in")  # which can be used again
        first = run(["test", *args, "--ckpt_path=best"])
        again = run(["test", *args, "--ckpt_path=best"])
    assert first.model.evaluated.numbers == again.model.evaluated.numbers
    model = CLIPM2DF.load_from_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    backbone = cast(CLIPBackbone, model.model.backbone)
    assert {weight.dtype for weight in backbone.parameters()} == {getattr(torch, dtype)}
    assert {weight.dtype for weight in model.model.head.parameters()} == {torch.float32}
    # The weights are those of the file, as far as both types hold them; the images' mean is not rounded.
    start = CLIPBackbone.load(towers["siglip_2"], dtype=dtype)
    wider = precision == "bf16-true" and dtype != "bfloat16"
    for key, weight in start.visual.state_dict().items():
        expected = weight.to(torch.bfloat16).to(weight.dtype) if wider else weight
        assert torch.equal(model.model.backbone.visual.state_dict()[key], expected)
    assert torch.equal(model.model.backbone.mean, start.mean)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_a_tower_predicts_nearly_the_same(dtype: str, towers: dict[str, str], manifest: Path) -> None:
    support = {f"class {c}": [str(manifest.parent / f"test{c}_{v}.mp4") for v in range(2)] for c in range(3)}
    videos = [str(manifest.parent / f"test{c}_2.mp4") for c in range(3)]

    def probabilities(precision: str = "32-true", **held: Any) -> np.ndarray[Any, Any]:
        model = CLIPM2DF(towers["siglip_2"], held, head="nearest_prototype", freeze_backbone=True)
        return FewShotClassifier(model, frames=4, precision=precision).fit(support).predict_proba(videos)

    whole = probabilities()
    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        np.testing.assert_allclose(probabilities(precision, dtype=dtype), whole, atol=0.02)
    assert not np.array_equal(probabilities(dtype=dtype), whole)


def test_a_model_in_half_precision_is_used_after_its_training(
    towers: dict[str, str], manifest: Path, tmp_path: Path
) -> None:
    head = {"hidden_dim": 32, "num_heads": 4}
    model = CLIPM2DF(towers["siglip_2"], head_options=head)
    shape: dict[str, Any] = {"n_way": 3, "n_query": 2, "frames": 2, "episodes_per_step": 2, "val_episodes": 2}
    data = EpisodeDataModule(str(manifest), num_workers=0, **shape)
    quiet_trainer(tmp_path, precision="bf16-true", max_steps=1).fit(model, data)
    assert next(model.model.head.parameters()).dtype == torch.bfloat16
    support = {f"class {c}": [str(manifest.parent / f"test{c}_0.mp4")] for c in range(3)}
    found = FewShotClassifier(model).fit(support).predict_proba(str(manifest.parent / "test1_1.mp4"))
    assert found.sum() == pytest.approx(1, abs=1e-3)


def test_a_tower_in_float16_is_not_trained(
    towers: dict[str, str], manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = own_size(manifest, towers["open_clip"], tmp_path)
    said = fails(["fit", *args, "--model.backbone_options.dtype=float16"], capsys)
    assert "model.backbone_options.dtype is float16, in which Adam can't train a tower" in said
    with pytest.warns(UserWarning, match="dtype is bfloat16, in which updates below 1/256 of a weight are lost"):
        assert main(["fit", *args, "--model.backbone_options.dtype=bfloat16"]) == 0


# Without text


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        ([], "set model.head_options.pps to false and model.head_options.reliability to [visual] or []"),
        (WITHOUT_TEXT[:1], "set model.head_options.pps to false and model.head_options.reliability to [visual] or []"),
        (WITHOUT_TEXT[1:], "set model.head_options.pps to false and model.head_options.reliability to [visual] or []"),
        (["--model.head=clip_fsar"], "take a head that needs none, such as otam"),
        (["--model.head=zero_shot"], "take a head that needs none, such as otam"),
        (["--model.head=otam", "--model.class_weight=0.1"], "set model.class_weight to 0"),
        (["--model.head=otam", "--model.text_fusion=0.5"], "set model.text_fusion to 0"),
        (["--model.head=clip_fsar", "--model.class_weight=1"], "nearest_prototype, and set model.class_weight to 0"),
    ],
)
def test_what_needs_prompts_says_so(
    asked: list[str],
    remedy: str,
    towers: dict[str, str],
    manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = fails(["fit", *own_size(manifest, towers["dinov2"], tmp_path, *asked)], capsys)
    assert "have no text tower, and so there are no prompts" in said
    assert remedy in said
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("head", "head_options"),
    [
        ("otam", {}),
        ("bi_mhm", {}),
        ("nearest_prototype", {}),
        ("m2df", {"pps": False, "reliability": []}),
        ("m2df", {"pps": False, "reliability": ["visual"]}),
        ("m2df", {"pps": False, "views": ["global"]}),
        ("m2df", {"pps": False, "views": ["local"]}),
    ],
)
def test_heads_that_need_no_prompts_take_any_for_none(
    head: str, head_options: dict[str, Any], towers: dict[str, str]
) -> None:
    sizes = {"hidden_dim": 32, "num_heads": 4} if head == "m2df" else {}
    torch.manual_seed(0)
    model = CLIPM2DF(towers["dinov2"], head=head, head_options=head_options | sizes).eval()
    names = ["b", "a", "c"]
    assert not model.encode_prompts(names).any()
    episode: Any = {"class_names": names, "class_indices": torch.tensor([[2, 0]])}
    episode["support"] = torch.randint(0, 256, (1, 2, 1, 4, 3, 32, 32), dtype=torch.uint8)
    episode["query"] = torch.randint(0, 256, (1, 3, 4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits = model(episode).logits
        # What classes are called, and in which order they come, is of no account.
        swapped = episode | {"support": episode["support"].flip(1), "class_names": ["x", "y", "z"]}
        torch.testing.assert_close(model(swapped).logits.flip(-1), logits)
    assert logits.unique().numel() == logits.numel()


def test_a_classifier_says_what_a_tower_lacks_before_it_reads(towers: dict[str, str], tmp_path: Path) -> None:
    model = CLIPM2DF(towers["visual_only"], head="zero_shot", freeze_backbone=True)
    with pytest.raises(UserError, match="have no text tower, and so there are no prompts"):
        FewShotClassifier(model).fit({"a": [str(tmp_path / "is not there.mp4")]})
