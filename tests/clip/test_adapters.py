"""LoRA's adapters in the towers of every family, and adapters that peft saved beside a model's weights."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel

from clip_m2df.clip.adapters import add_adapters, check_adapters, merge_adapters
from clip_m2df.clip.backbone import CLIPBackbone
from clip_m2df.clip.families import family_of
from clip_m2df.errors import UserError
from tests.clip.towers import save_open_clip

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
CLIP_SIZES = SIZES | {"intermediate_size": 48}
# Small towers: their kind, their configuration, and how many linear layers a block has.
TOWERS: dict[str, tuple[str, dict[str, Any], int]] = {
    **{kind: (kind, {"vision_config": CLIP_SIZES}, 6) for kind in ("vit", "metaclip_2", "siglip")},
    "dinov2": ("dinov2", SIZES, 6),
    "dinov2 with a gate": ("dinov2", SIZES | {"use_swiglu_ffn": True}, 7),
    "dinov3_vit": ("dinov3_vit", CLIP_SIZES, 6),
    "dinov3_vit with a gate": ("dinov3_vit", CLIP_SIZES | {"use_gated_mlp": True}, 7),
}
ALL = ["q", "k", "v", "o", "fc1", "fc2"]
Module = TypeVar("Module", bound=nn.Module)


def small(name: str) -> CLIPBackbone:
    """A visual tower of a family with random weights; frozen, on which the last bits of torch's attention depend."""
    kind, values, _ = TOWERS[name]
    torch.manual_seed(0)
    visual = family_of(kind).configs(values)[0]
    return CLIPBackbone.from_description({"visual_config": visual, "source": name}).eval().requires_grad_(False)


def embedded(backbone: CLIPBackbone) -> Tensor:
    with torch.no_grad():
        return backbone.encode_frames(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def shaken(module: Module) -> Module:
    """The same in evaluation mode, as if its adapters had been trained."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05, generator=generator)
    return module.eval()


@pytest.mark.parametrize("name", TOWERS)
def test_adapters_go_into_the_blocks_of_every_family(name: str) -> None:
    backbone = small(name)
    plain, keys = embedded(backbone), backbone.state_dict().keys()
    layers = {name: module for name, module in backbone.visual.named_modules() if isinstance(module, nn.Linear)}
    add_adapters(backbone, {"r": 2, "target": ALL, "layers": [0, 2]})
    assert torch.equal(embedded(backbone.eval()), plain)
    adapted = {n.partition(".lora_A")[0] for n, _ in backbone.visual.named_parameters() if ".lora_A" in n}
    # All linear layers of the first and the last block, none of the one between, and none outside of blocks.
    assert adapted == {name for name in layers if ".0." in name or ".2." in name}
    assert len(adapted) == 2 * TOWERS[name][2]
    assert {".lora_" in n for n, w in backbone.visual.named_parameters() if w.requires_grad} == {True}
    backbone.train()
    backbone.encode_frames(torch.randn(1, 3, 32, 32)).sum().backward()
    trained = [weight.grad for weight in backbone.visual.parameters() if weight.requires_grad]
    assert all(gradient is not None for gradient in trained)
    found = embedded(shaken(backbone))
    assert (found - plain).abs().max() > 1e-3
    merge_adapters(backbone)
    torch.testing.assert_close(embedded(backbone), found, atol=1e-5, rtol=0)
    assert backbone.state_dict().keys() == keys
    assert backbone.adapters is None


def test_a_few_projections_alone() -> None:
    backbone = small("dinov2")
    add_adapters(backbone, {"r": 2})
    adapted = {n for n, _ in backbone.visual.named_parameters() if ".lora_A" in n}
    assert len(adapted) == 6
    assert all(".q_proj." in name or ".v_proj." in name for name in adapted)


def test_first_weights_depend_on_the_generator_alone_and_leave_it() -> None:
    states = []
    for name, layers in (("vit", 0), ("vit", 0), ("vit", 1)):
        backbone = small(name)
        torch.manual_seed(7)
        torch.rand(layers)
        add_adapters(backbone, {"r": 2})
        states.append(({n: w for n, w in backbone.state_dict().items() if ".lora_A" in n}, torch.rand(1)))
    torch.manual_seed(7)
    assert states[0][1] == states[1][1] == torch.rand(1)
    assert all(torch.equal(weight, states[1][0][name]) for name, weight in states[0][0].items())
    assert not any(torch.equal(weight, states[2][0][name]) for name, weight in states[0][0].items())
    # Uniform up to the inverse root of the width, as in the authors' code.
    drawn = torch.cat([weight.flatten() for weight in states[0][0].values()])
    assert drawn.abs().max() <= 32**-0.5
    assert drawn.std() == pytest.approx((32 * 3) ** -0.5, rel=0.15)


def test_dropout_is_before_adapters_in_training_alone() -> None:
    backbone = small("vit")
    add_adapters(backbone, {"r": 2, "target": ["q"], "layers": [0], "dropout": 0.25})
    layers: list[Any] = [module for module in shaken(backbone).modules() if hasattr(module, "lora_A")]
    (layer,) = layers
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(1)).expand(20_000, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        plain, added = layer.base_layer(x), layer(x) - layer.base_layer(x)
        drawn = layer.train()(x) - plain
    assert torch.equal(added[0], added[1])
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn.mean(0), added[0], atol=0.01, rtol=0)  # on average nothing is lost
    # The variance of what is added: each input is left out in a quarter of the draws.
    products = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight * x[0]
    torch.testing.assert_close(drawn.var(0), (products**2).sum(1) * 0.25 / 0.75, rtol=0.1, atol=0)


def test_a_tower_in_half_precision_has_adapters_in_float32() -> None:
    backbone = small("vit").to(torch.bfloat16)
    plain = embedded(backbone)
    add_adapters(backbone, {"r": 2, "target": ALL})
    assert embedded(backbone).dtype == torch.bfloat16
    assert torch.equal(embedded(backbone), plain)
    kinds = {(".lora_" in name, weight.dtype) for name, weight in backbone.visual.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (["q"], "adapters is .*it must be a table"),
        ({"rank": 4}, "adapters has no 'rank'; there are r, alpha, target, layers, dropout"),
        ({"r": 0}, "adapters.r is 0; it must be a whole number of at least 1"),
        ({"r": 2.0}, "adapters.r is 2.0; it must be a whole number"),
        ({"r": True}, "adapters.r is True; it must be a whole number"),
        ({"alpha": 0}, "adapters.alpha is 0; it must be above 0"),
        ({"alpha": float("nan")}, "adapters.alpha is nan"),
        ({"alpha": "2"}, "adapters.alpha is '2'; it must be a number"),
        ({"dropout": 1}, "adapters.dropout is 1; it must be at least 0 and below 1"),
        ({"target": "q"}, "adapters.target is 'q'; it must be a list of layers"),
        ({"target": []}, "adapters.target is .*; it must be a list of layers"),
        ({"target": ["q", "q"]}, "each once"),
        ({"target": ["q", "w"]}, "adapters.target has w, and the tower's blocks have q, k, v, o, fc1, fc2"),
        ({"layers": 3}, "adapters.layers is 3; it must be all, or a list"),
        ({"layers": []}, "adapters.layers is .*; it must be all"),
        ({"layers": [-1]}, "adapters.layers is .*; it must be all"),
        ({"layers": [True]}, "adapters.layers is .*; it must be all"),
        ({"layers": [1, 3]}, "adapters.layers has 3, but the tower has 3 blocks, from 0 to 2"),
    ],
)
def test_values_that_adapters_cannot_have(adapters: Any, message: str) -> None:
    backbone = small("vit")
    with pytest.raises(UserError, match=message):
        add_adapters(backbone, adapters)
    assert backbone.adapters is None
    assert not any(".lora_" in name for name in backbone.state_dict())


def test_what_is_not_said_of_adapters_has_its_default() -> None:
    expected = {"r": 16, "alpha": 32, "target": ["q", "v"], "layers": "all", "dropout": 0.0}
    assert check_adapters({}) == expected
    assert check_adapters({"r": 4, "layers": (1, 0)}) == expected | {"r": 4, "alpha": 8, "layers": [0, 1]}


def test_a_resnet_says_no() -> None:
    config = {"kind": "resnet", "layers": [1, 1, 1, 1], "width": 4, "dim": 8, "image_size": 32}
    backbone = CLIPBackbone.from_description({"visual_config": config, "source": "RN50.pt"})
    with pytest.raises(UserError, match=r"the visual tower of 'RN50.pt', .*ResNet.*, takes none: leave them out"):
        add_adapters(backbone, {})


def test_without_peft_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = small("vit")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"adapters need peft: pip install clip-m2df\[lora\], or leave them out"):
        add_adapters(backbone, {})


# Adapters that peft saved, beside the weights of a folder


@pytest.fixture
def copied(tiny_clip_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_clip_dir, tmp_path / "clip"))


def save_adapter(folder: Path, **config: Any) -> Any:
    """Put an adapter of both towers beside a model's weights, as peft saves it; the model with it."""
    model = CLIPModel.from_pretrained(folder)
    torch.manual_seed(0)
    values: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "fc1"], "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(**(values | config)))
    adapted.save_pretrained(str(folder))
    return adapted.eval()


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"rank_pattern": {"fc1": 2}}, {"target_modules": ["visual_projection"]}]
)
def test_an_adapter_beside_the_weights_is_applied(config: dict[str, Any], copied: Path) -> None:
    plain = embedded(CLIPBackbone.load(copied))
    model = save_adapter(copied, **config)
    backbone = CLIPBackbone.load(copied)
    tokens = backbone.tokenize(["cat", "a dog"])
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        found = model.get_image_features(pixel_values=images).pooler_output
        texts = model.get_text_features(input_ids=tokens).pooler_output
        torch.testing.assert_close(embedded(backbone), found, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(backbone.encode_text(tokens), texts, atol=1e-5, rtol=1e-5)
    assert (embedded(backbone) - plain).abs().max() > 1e-3
    assert backbone.adapters is None


def test_a_lone_part_of_an_adapter_is_named(copied: Path, tmp_path: Path) -> None:
    save_adapter(copied)
    for file, other in (("adapter_config.json",) * 2, ("adapter_model.safetensors",) * 2):
        (copied / file).rename(tmp_path / "away")
        with pytest.raises(UserError, match=f"has an adapter, but no {other}: fetch it again"):
            CLIPBackbone.load(copied)
        (tmp_path / "away").rename(copied / file)
    for path in copied.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    with pytest.raises(UserError, match=r"has an adapter alone, of .* by its own words: put the files of that model"):
        CLIPBackbone.load(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "with use_dora True, which is not applied here: merge it"),
        ({"bias": "all"}, "with bias 'all', which is not applied here"),
        ({"alpha_pattern": {"q_proj": 4}}, "with alpha_pattern .* which is not applied here"),
        ({"init_lora_weights": "pissa"}, "with init_lora_weights 'pissa', which is not applied here"),
        ({"modules_to_save": ["classifier"]}, "with modules_to_save .* which is not applied here"),
        ({"of_tomorrow": 1}, "with of_tomorrow 1, which is not applied here"),
        ({"peft_type": "IA3"}, "has an adapter of type 'IA3', and LORA alone is applied here"),
        *(({"lora_alpha": v}, "lora_alpha is .*; it must be a number") for v in ("a", None, True, 0, 10**400)),
        *(({"r": value}, "r is .*; it must be a whole number above 0") for value in ("a", None, 0, -1, 2.5)),
        ({"r": 4}, "q_proj is of rank 3 where adapter_config.json has r 4"),
        ({"rank_pattern": [3]}, "rank_pattern a table"),
        ({"use_rslora": "false"}, "use_rslora is true or false"),
    ],
)
def test_an_adapter_that_asks_for_more_is_refused(change: dict[str, Any], message: str, copied: Path) -> None:
    save_adapter(copied)
    file = copied / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        CLIPBackbone.load(copied)


def test_an_adapter_of_another_model_is_refused(copied: Path) -> None:
    save_adapter(copied)
    file = copied / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("q_proj.lora_A.weight"))
    layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
    for change, message in (
        (
            {name: torch.zeros(3, 65)},
            rf"of another model, .*: {layer} is of \(64, 3\) by \(3, 65\) where the model has",
        ),
        ({name: torch.zeros(2, 64)}, "where the model has"),
        ({name: torch.zeros(3)}, "where the model has"),
        (
            {name.replace("layers.0", "layers.9"): weights[name].clone()},
            r"layers.9.self_attn.q_proj.lora_B.weight is missing",
        ),
        ({f"{layer}.lora_magnitude_vector": torch.zeros(64)}, "lora_magnitude_vector is"),
        ({name: torch.full((3, 64), torch.nan)}, r"of another model, .*lora_A.weight is not finite"),
        ({name: torch.ones((3, 64), dtype=torch.int32)}, r"lora_A.weight is .* of no floating type"),
        ({n: w[:2].clone() if "_A" in n else w[:, :2].clone() for n, w in weights.items() if layer in n}, "of rank 2"),
        ({n: w[:0].clone() if "_A" in n else w[:, :0].clone() for n, w in weights.items() if layer in n}, "of rank 0"),
    ):
        save_file(weights | change, file)
        with pytest.raises(UserError, match=message):
            CLIPBackbone.load(copied)
    save_file({}, file)
    with pytest.raises(UserError, match="it is empty"):
        CLIPBackbone.load(copied)
    file.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        CLIPBackbone.load(copied)


def test_an_adapter_beside_weights_of_open_clip_is_refused(copied: Path, tmp_path: Path) -> None:
    save_adapter(copied)
    save_open_clip(tmp_path / "open_clip")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (copied / name).rename(tmp_path / "open_clip" / name)
    with pytest.raises(UserError, match=r"open_clip has an adapter, .* in transformers' format alone: merge it"):
        CLIPBackbone.load(tmp_path / "open_clip")
