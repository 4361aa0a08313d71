"""LoRA in the visual tower: at the start the plain tower, in training nothing else of it moves, and it comes back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clip_m2df import CLIPM2DF
from clip_m2df.cli import main
from clip_m2df.training.checkpoints import FOLDER, LAST, read_checkpoint
from tests.conftest import options

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
