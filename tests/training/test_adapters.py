"""LoRA in the visual tower: at the start the plain tower, in training nothing else of it moves, and it comes back."""

import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import soak
from clip_m2df import CLIPM2DF, CLIPBackbone, FewShotClassifier
from clip_m2df.cli import main
from clip_m2df.errors import UserError
from clip_m2df.export import export_model
from clip_m2df.training.checkpoints import BEST, FOLDER, LAST, read_checkpoint
from tests.classifier.conftest import predict_args
from tests.clip.test_adapters import ALL, shaken
from tests.conftest import fails, options, quiet_trainer
from tests.training.test_evaluation_from_bank import data
from tests.training.test_interruption import RUN, kill, step_of
from tests.training.test_many_devices import train

HEAD = {"hidden_dim": 32, "num_heads": 4}
ADAPTERS = (
    "--model.freeze_backbone=false",
    "--model.adapters={r: 2, target: [q, v, fc1], dropout: 0.1}",
    "--model.backbone_lr=0.01",
)


def tiny(**more: Any) -> CLIPM2DF:
    torch.manual_seed(0)
    return CLIPM2DF(backbone="tiny", **more)


def images(model: CLIPM2DF, number: int = 3) -> Tensor:
    size = model.model.backbone.image_size
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


def features(model: CLIPM2DF) -> Tensor:
    with torch.no_grad():
        return model.model.backbone.encode_frames(images(model))


def of_adapters(state: dict[str, Tensor]) -> set[str]:
    return {name for name in state if "lora_" in name}


def test_a_model_starts_as_the_plain_one_to_the_bit() -> None:
    plain, adapted = tiny(), tiny(adapters={"r": 3, "target": ALL, "dropout": 0.3})
    assert torch.equal(features(plain.eval()), features(adapted.eval()))
    own = dict(adapted.model.head.named_parameters())
    assert all(torch.equal(weight, own[name]) for name, weight in plain.model.head.named_parameters())


@pytest.mark.parametrize("layers", ["all", [1]])
def test_what_adapters_add_is_the_papers(layers: Any) -> None:
    """W x + alpha / r · B A x, here by a plain tower with that W."""
    model = shaken(tiny(adapters={"r": 3, "alpha": 5, "target": ALL, "layers": layers}))
    state = model.state_dict()
    weights = {}
    for name, weight in state.items():
        if ".lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = weight
        elif ".lora_A." in name:
            assert layers == "all" or ".layers.1." in name
            up = state[name.replace("lora_A", "lora_B")]
            whole = name.replace("lora_A.default.", "base_layer.")
            weights[name.replace("lora_A.default.", "")] = state[whole] + 5 / 3 * up @ weight
    plain = tiny()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    torch.testing.assert_close(features(model), features(plain.eval()), atol=1e-5, rtol=0)
    assert (features(model) - features(tiny().eval())).abs().max() > 1e-3


def test_only_adapters_of_the_tower_are_trained(manifest: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    assert main(["fit", *options(manifest, tiny_clip_dir, tmp_path, *ADAPTERS)]) == 0
    state = read_checkpoint(tmp_path / FOLDER / LAST)["state_dict"]
    plain = CLIPM2DF(str(tiny_clip_dir)).state_dict()
    for name, weight in state.items():
        if "backbone" in name and ".lora_" not in name:
            assert torch.equal(weight, plain[name.replace(".base_layer.", ".")]), name
    assert all(state[name].any() for name in of_adapters(state))
    assert main(["test", *options(manifest, tiny_clip_dir, tmp_path, *ADAPTERS, "--ckpt_path=best")]) == 0


# Saving


@pytest.fixture(scope="module")
def trained(tiny_clip_dir: Path) -> CLIPM2DF:
    torch.manual_seed(0)
    adapters = {"r": 2, "alpha": 6, "target": ["q", "fc2"], "dropout": 0.5}
    model = CLIPM2DF(str(tiny_clip_dir), adapters=adapters, head_options=HEAD)
    return shaken(model)


@pytest.mark.parametrize("adapters", ["kept", "merged", "apart"])
def test_a_saved_model_has_the_same_features(
    adapters: Any, trained: CLIPM2DF, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    before = {name: weight.clone() for name, weight in trained.state_dict().items()}
    trained.save_pretrained(tmp_path, adapters=adapters)
    assert all(torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())
    model = CLIPM2DF.from_pretrained(tmp_path, clip=tiny_clip_dir if adapters == "apart" else None)
    tolerance = 1e-5 if adapters == "merged" else 0
    torch.testing.assert_close(features(model), features(trained), atol=tolerance, rtol=0)
    assert bool(of_adapters(model.state_dict())) == (adapters != "merged")
    assert all(torch.equal(w, model.model.head.state_dict()[n]) for n, w in trained.model.head.state_dict().items())
    assert torch.equal(model.encode_prompts(["a cat", "a dog"]), trained.encode_prompts(["a cat", "a dog"]))
    if adapters == "merged":
        assert model.hparams["adapters"] is None
        assert model.state_dict().keys() == CLIPM2DF(str(tiny_clip_dir), head_options=HEAD).state_dict().keys()
        assert all(weight.requires_grad for weight in model.model.backbone.visual.parameters())


def test_a_tower_that_cannot_have_the_size_is_told_apart_from_the_adapters_own(
    trained: CLIPM2DF, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    from transformers import Dinov2Config, Dinov2Model

    trained.save_pretrained(tmp_path / "apart", adapters="apart")
    other = tmp_path / "other"
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56}
    Dinov2Model(Dinov2Config(**sizes, patch_size=14)).save_pretrained(other)
    message = f"adapters of {tiny_clip_dir.name!r}; {other} can't be loaded for them: image_size is"
    with pytest.raises(UserError, match=re.escape(message)):
        CLIPM2DF.from_pretrained(tmp_path / "apart", clip=other)


def test_a_loaded_tower_will_do_for_adapters_apart(trained: CLIPM2DF, tiny_clip_dir: Path, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path, adapters="apart")
    assert not any("backbone" in name for name in load_file(tmp_path / "model.safetensors"))
    tower = CLIPBackbone.load(tiny_clip_dir)
    model = CLIPM2DF.from_pretrained(tmp_path, clip=tower)
    assert torch.equal(features(model), features(trained))
    assert tower.adapters is None
    with torch.no_grad():
        next(tower.visual.parameters())[0] += 1e-3
    with pytest.raises(UserError, match=r"of another tower than .*: give the one that its training"):
        CLIPM2DF.from_pretrained(tmp_path, clip=tower)
    # A tower by a path is not known by its name elsewhere.
    with pytest.raises(UserError, match=r"apart from their tower, '.*', which can't be loaded.*: give it as clip="):
        CLIPM2DF.from_pretrained(tmp_path)


def test_peft_reads_adapters_that_are_apart(trained: CLIPM2DF, tiny_clip_dir: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import CLIPModel

    trained.save_pretrained(tmp_path, adapters="apart")
    adapted = PeftModel.from_pretrained(CLIPModel.from_pretrained(tiny_clip_dir), tmp_path).eval()
    with torch.no_grad():
        found = adapted.get_image_features(pixel_values=images(trained)).pooler_output
    torch.testing.assert_close(found, features(trained), atol=1e-6, rtol=0)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "model.safetensors"])
def test_files_of_different_models_are_noticed(
    file: str, trained: CLIPM2DF, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path, adapters="apart")
    weights = load_file(tmp_path / file)
    save_file({name: weight + 1 for name, weight in weights.items()}, tmp_path / file)
    with pytest.raises(UserError, match=f"{file} is damaged, or was not saved with the config.json beside it"):
        CLIPM2DF.from_pretrained(tmp_path, clip=tiny_clip_dir)


def test_adapters_that_are_no_file_are_not_waited_for(trained: CLIPM2DF, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "apart", adapters="apart")
    file = tmp_path / "apart" / "adapter_model.safetensors"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is not a regular file"):
        CLIPM2DF.from_pretrained(tmp_path / "apart")


def test_another_model_takes_the_place_of_one_apart(trained: CLIPM2DF, tmp_path: Path) -> None:
    for adapters in ("apart", "kept"):
        trained.save_pretrained(tmp_path, adapters=adapters)
    assert not list(tmp_path.glob("adapter_*"))
    assert torch.equal(features(CLIPM2DF.from_pretrained(tmp_path)), features(trained))


@pytest.mark.parametrize("batch", [1, 3])
def test_an_export_has_the_adapters(batch: int, trained: CLIPM2DF, tmp_path: Path) -> None:
    export_model(trained, tmp_path / "export", n_way=2, n_shot=1, n_queries=1, frames=2, batch=batch)
    program = torch.export.load(tmp_path / "export" / "tower.pt2")
    frames = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(
            program.module()(frames=frames)["features"], trained.model.encode_frames(frames), atol=1e-5, rtol=0
        )
    assert not any("lora" in name for name in program.state_dict)


# Training

# Six optimiser steps of two batches each, validated after every second.
STEPS = (*ADAPTERS, *RUN)


@pytest.fixture(scope="module")
def alone(manifest: Path, tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    assert main(["fit", *options(manifest, tiny_clip_dir, folder, *STEPS)]) == 0
    return folder


@pytest.mark.parametrize("batch", [3, 6])
def test_a_run_that_was_ended_goes_on_bit_for_bit(
    batch: int, alone: Path, manifest: Path, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    run = ["fit", *options(manifest, tiny_clip_dir, tmp_path, *STEPS)]
    assert main([*run, *kill(batch)]) != 0
    assert 0 < step_of(tmp_path) < 6
    assert main([*run, "--ckpt_path=last"]) == 0
    assert soak.differences(alone, tmp_path) == []


def test_a_run_that_was_killed_five_times_ends_as_if_left_alone(
    alone: Path, manifest: Path, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    run = ["fit", *options(manifest, tiny_clip_dir, tmp_path, *STEPS, "--checkpoint.every=1")]
    for batch in (3, 4, 7, 8, 11):  # of twelve, two a step
        go_on = ["--ckpt_path=last"] if (tmp_path / FOLDER / LAST).exists() else []
        life = multiprocessing.get_context("fork").Process(
            target=main, args=([*run, *go_on, *kill(batch, signal.SIGKILL)],)
        )
        life.start()
        life.join(300)
        assert life.exitcode == -signal.SIGKILL
        assert step_of(tmp_path) == batch // 2
    assert main([*run, "--ckpt_path=last"]) == 0
    assert soak.differences(alone, tmp_path) == []


@pytest.mark.parametrize(
    "change", [f"--model.adapters{change}" for change in (".r=4", ".alpha=1", ".dropout=0", ".layers=[0]", "=null")]
)
def test_a_run_goes_on_with_its_own_adapters_alone(
    change: str, alone: Path, manifest: Path, tiny_clip_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(["fit", *options(manifest, tiny_clip_dir, alone, *STEPS, change, "--ckpt_path=last")], capsys)
    assert "model.adapters is" in said
    assert "a checkpoint keeps the options that it was trained with" in said


def test_a_model_without_adapters_gets_none_afterwards(
    fitted: Path, manifest: Path, tiny_clip_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--ckpt_path=best", "--model.adapters={r: 2}")
    assert "model.adapters is {'r': 2" in fails(["test", *options(manifest, tiny_clip_dir, fitted, *more)], capsys)


def test_adapters_of_a_frozen_tower_are_refused(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(["fit", *options(manifest, tiny_clip_dir, tmp_path, "--model.adapters={r: 2}")], capsys)
    assert "freeze_backbone trains the head alone, and adapters train the tower too" in said


def test_gradient_checkpointing_changes_no_bit(
    alone: Path, manifest: Path, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    more = (*STEPS, "--model.gradient_checkpointing=true")
    assert main(["fit", *options(manifest, tiny_clip_dir, tmp_path, *more)]) == 0
    assert soak.differences(alone, tmp_path) == []


def test_a_training_in_mixed_precision_moves_adapters_in_float32(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    more = (*STEPS, "--trainer.max_steps=2", "--trainer.precision=bf16-mixed")
    assert main(["fit", *options(manifest, tiny_clip_dir, tmp_path, *more)]) == 0
    state = read_checkpoint(tmp_path / FOLDER / LAST)["state_dict"]
    assert {weight.dtype for name, weight in state.items() if "backbone" in name} == {torch.float32}
    assert all(state[name].any() for name in of_adapters(state))


@pytest.mark.parametrize(("precision", "rtol", "atol"), [("64-true", 1e-9, 1e-13), ("32-true", 1e-4, 1e-6)])
def test_two_processes_train_adapters_as_one(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path, precision: str, rtol: float, atol: float
) -> None:
    adapters = {"adapters": {"r": 2, "target": ALL}, "freeze_backbone": False}
    ((_, expected),) = train(manifest, tiny_clip_dir, tmp_path, 1, precision, **adapters)
    ranks = train(manifest, tiny_clip_dir, tmp_path, 2, precision, **adapters)
    assert {".lora_" in name for name in expected if "backbone" in name} == {True}
    for _, gradients in ranks:
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=rtol, atol=atol, msg=name)


def test_features_of_a_tower_that_learns_are_not_trained_from(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(manifest, tiny_clip_dir, tmp_path, *ADAPTERS, "--data.train_augmentations=1")
    said = fails(["fit", *given], capsys)
    assert "trains from features, which a tower that learns would leave behind" in said


def test_stored_features_are_those_of_the_same_adapters(alone: Path, manifest: Path, tmp_path: Path) -> None:
    """The scale of what adapters add is not among the weights."""
    model = CLIPM2DF.load_from_checkpoint(alone / FOLDER / BEST)
    for alpha in (4, 40, 4):
        adapters = model.hparams["adapters"] | {"alpha": alpha}
        model = CLIPM2DF.load_from_checkpoint(alone / FOLDER / BEST, adapters=adapters)
        quiet_trainer(tmp_path).test(model, data(manifest, store=str(tmp_path / "store")), verbose=False)
    assert len(list((tmp_path / "store").glob("features-*.safetensors"))) == 2


def test_a_classifier_and_predict_take_adapters_apart(
    trained: CLIPM2DF, tiny_clip_dir: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained.reading = {"frames": 2, "resize": 32, "resize_mode": "short_side", "sampling": "segments"}
    folder, kept = tmp_path / "apart", tmp_path / "kept"
    trained.save_pretrained(folder, adapters="apart")
    trained.save_pretrained(kept)
    support = tmp_path / "support"
    for c in range(2):
        (support / f"class {c}").mkdir(parents=True)
        shutil.copy(manifest.parent / f"test{c}_0.mp4", support / f"class {c}")
    tables: list[str] = []
    for model in (["--ckpt_path", str(folder), "--backbone", str(tiny_clip_dir)], ["--ckpt_path", str(kept)]):
        output = tmp_path / f"{len(tables)}.csv"
        args = predict_args(support, [manifest.parent], output, *model)
        assert main(args) == 0
        tables.append(output.read_text())
    assert tables[0] == tables[1]
    classifier = FewShotClassifier.from_checkpoint(folder, clip=tiny_clip_dir)
    assert torch.equal(features(classifier.model), features(trained))
    said = fails([*args, f"--backbone={tiny_clip_dir}"], capsys)
    assert "give either --ckpt_path, a trained model, or --backbone" in said
    with pytest.raises(UserError, match="has its towers itself: leave out CLIP's weights"):
        CLIPM2DF.from_pretrained(kept, clip=tiny_clip_dir)
