"""LoRA in the visual tower: at the start the plain tower, in training nothing else of it moves, and it comes back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_m2df import CLIPM2DF, CLIPBackbone
from clip_m2df.cli import main
from clip_m2df.errors import UserError
from clip_m2df.export import export_model
from clip_m2df.training.checkpoints import FOLDER, LAST, read_checkpoint
from tests.conftest import options

HEAD = {"hidden_dim": 32, "num_heads": 4}
ALL = ["q", "k", "v", "o", "fc1", "fc2"]
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


def shaken(model: CLIPM2DF) -> CLIPM2DF:
    """The same in evaluation mode, as if its adapters had been trained."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05, generator=generator)
    return model.eval()


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
    clip = {"clip": tiny_clip_dir} if adapters == "apart" else {}
    model = CLIPM2DF.from_pretrained(tmp_path, **clip)
    tolerance = 1e-5 if adapters == "merged" else 0
    torch.testing.assert_close(features(model), features(trained), atol=tolerance, rtol=0)
    assert bool(of_adapters(model.state_dict())) == (adapters != "merged")
    assert all(torch.equal(w, model.model.head.state_dict()[n]) for n, w in trained.model.head.state_dict().items())
    assert torch.equal(model.encode_prompts(["a cat", "a dog"]), trained.encode_prompts(["a cat", "a dog"]))
    if adapters == "merged":
        assert model.hparams["adapters"] is None
        assert model.state_dict().keys() == CLIPM2DF(str(tiny_clip_dir), head_options=HEAD).state_dict().keys()
        assert all(weight.requires_grad for weight in model.model.backbone.visual.parameters())


def test_a_loaded_tower_will_do_for_adapters_apart(trained: CLIPM2DF, tiny_clip_dir: Path, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path, adapters="apart")
    assert (tmp_path / "model.safetensors").stat().st_size < sum(
        weight.nbytes for weight in trained.model.backbone.parameters()
    )
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


def test_another_model_takes_the_place_of_one_apart(trained: CLIPM2DF, tmp_path: Path) -> None:
    for adapters in ("apart", "kept"):
        trained.save_pretrained(tmp_path, adapters=adapters)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("adapter_*"))
    assert torch.equal(features(CLIPM2DF.from_pretrained(tmp_path)), features(trained))


@pytest.mark.parametrize("batch", [1, 3])
def test_an_export_has_the_adapters(batch: int, trained: CLIPM2DF, tmp_path: Path) -> None:
    sizes = {"n_way": 2, "n_shot": 1, "n_queries": 1, "frames": 2, "batch": batch}
    export_model(trained, tmp_path / "export", **sizes)
    program = torch.export.load(tmp_path / "export" / "tower.pt2")
    frames = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(
            program.module()(frames=frames)["features"], trained.model.encode_frames(frames), atol=1e-5, rtol=0
        )
    assert not any("lora" in name for name in program.state_dict)
