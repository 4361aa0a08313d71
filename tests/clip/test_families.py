"""Towers of all families from folders of transformers', against transformers itself."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_m2df.clip import families
from clip_m2df.clip.backbone import CLIPBackbone
from clip_m2df.clip.formats import told_options
from clip_m2df.errors import UserError
from tests.clip.towers import save_folder, save_open_clip
from tests.conftest import GOLDEN

# The families in folders of transformers', by the name of the tests: SigLIP's two tokenizers are of two generations.
FOLDERS = ("clip", "metaclip_2", "siglip", "siglip_2", "dinov2", "dinov2_swiglu", "dinov3_vit", "dinov3_vit_gated")
TEXTS = ["a photo of a person", "the quick brown fox, jumping over the lazy dog", ""]
TWO_TOWERS = [kind for kind in FOLDERS if not kind.startswith("dino")]


def embeddings(model: Any, images: Tensor, **options: Any) -> Tensor:
    """What transformers itself makes of normalised images."""
    with torch.no_grad():
        output = model.get_image_features(images, **options) if hasattr(model, "get_image_features") else model(images)
        found: Tensor = output.pooler_output
    return found


def assert_equal_to(backbone: CLIPBackbone, model: Any, **options: Any) -> None:
    """Both towers give transformers' embeddings, which differ from image to image and from text to text."""
    torch.manual_seed(1)
    images = torch.randn(3, 3, backbone.image_size, backbone.image_size)
    expected = embeddings(model, images, **options)
    assert expected.std(dim=0).mean() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode_frames(images), expected, atol=1e-5, rtol=0)
        if backbone.text is not None:
            tokens = backbone.tokenize(TEXTS)
            expected = model.get_text_features(tokens).pooler_output
            assert expected.std(dim=0).mean() > 0.01
            torch.testing.assert_close(backbone.encode_text(tokens), expected, atol=1e-5, rtol=0)


def of_transformers(folder: Path) -> nn.Module:
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("way", ["whole", "shards", "half", "description"])
def test_embeddings_are_those_of_transformers(kind: str, way: str, tmp_path: Path) -> None:
    model: Any = save_folder(kind, tmp_path / "tower")
    if way == "shards":
        (tmp_path / "tower" / "model.safetensors").unlink()
        model.save_pretrained(tmp_path / "tower", max_shard_size="20KB")
        assert len([*(tmp_path / "tower").glob("model-*-of-*.safetensors")]) > 2
    if way == "half":
        model.half().save_pretrained(tmp_path / "tower")
    backbone = CLIPBackbone.load(str(tmp_path / "tower")).eval()
    if way == "description":
        description = json.loads(json.dumps(backbone.description()))
        again = CLIPBackbone.from_description(description)
        again.load_state_dict(backbone.state_dict())
        backbone = again.eval()
        assert backbone.description() == description
    assert {weight.dtype for weight in backbone.parameters()} == {torch.float32}
    assert_equal_to(backbone, of_transformers(tmp_path / "tower"))


def test_a_config_is_read_without_warnings_of_token_numbers(tmp_path: Path) -> None:
    import transformers

    save_folder("siglip_2", tmp_path / "tower")
    # In a process of its own, for transformers says each warning once.
    read = "import sys; from clip_m2df import CLIPBackbone; CLIPBackbone.load(sys.argv[1])"
    command = [sys.executable, "-c", read, str(tmp_path / "tower")]
    assert "token_id" not in subprocess.run(command, capture_output=True, text=True, check=True).stderr
    before = transformers.logging.get_verbosity()
    CLIPBackbone.load(str(tmp_path / "tower"))
    assert transformers.logging.get_verbosity() == before


@pytest.mark.parametrize("image_size", [16, 40, 48, 56])
@pytest.mark.parametrize("kind", [*FOLDERS, "open_clip"])
def test_images_of_another_size(kind: str, image_size: int, tmp_path: Path) -> None:
    folder = tmp_path / "transformers"
    if kind == "open_clip":
        save_open_clip(tmp_path / kind, as_transformers=folder)
    else:
        save_folder(kind, folder)
    with pytest.warns(UserWarning, match=f"of 32 pixels: its positions are interpolated to those of {image_size}"):
        backbone = CLIPBackbone.load(tmp_path / kind if kind == "open_clip" else folder, image_size=image_size).eval()
    assert backbone.image_size == image_size == told_options(backbone.description())["image_size"]
    options = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}
    assert_equal_to(backbone, of_transformers(folder), **options)
    again = CLIPBackbone.from_description(backbone.description()).eval()
    again.load_state_dict(backbone.state_dict())
    assert_equal_to(again, of_transformers(folder), **options)


@pytest.mark.parametrize("kind", FOLDERS)
def test_two_equal_sides_are_one_size(kind: str, tmp_path: Path) -> None:
    model = save_folder(kind, tmp_path / "tower")
    table = ["vision_config"] if kind in TWO_TOWERS else []
    changed_config(tmp_path / "tower", {"image_size": [32, 32], "patch_size": [8, 8]}, *table)
    assert_equal_to(CLIPBackbone.load(str(tmp_path / "tower")).eval(), model)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit"])
def test_the_preprocessing_says_the_size_where_the_tower_takes_any(kind: str, half: bool, tmp_path: Path) -> None:
    # As DINOv2's releases, whose positions are those of 518 pixels and whose images have 224.
    model: Any = save_folder(kind, tmp_path / "tower", image_size=32, own_size=56)
    if half:
        model.half().save_pretrained(tmp_path / "tower")
    backbone = CLIPBackbone.load(str(tmp_path / "tower")).eval()
    assert backbone.image_size == backbone.visual_config["image_size"] == 32
    assert_equal_to(backbone, of_transformers(tmp_path / "tower"))


@pytest.mark.parametrize("kind", [kind for kind in FOLDERS if not kind.startswith("dinov3")])
@pytest.mark.parametrize("changed", [{}, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.7, 0.5], "resample": 2}])
def test_images_become_what_transformers_processor_makes_of_them(
    kind: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    save_folder(kind, tmp_path / "tower")
    file = tmp_path / "tower" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    processors: dict[str, Any] = {"siglip": SiglipImageProcessorPil, "dinov2": BitImageProcessorPil}
    processor = processors.get(kind.split("_")[0], CLIPImageProcessorPil).from_pretrained(tmp_path / "tower")
    backbone = CLIPBackbone.load(str(tmp_path / "tower"))
    assert backbone.interpolation == {2: "bilinear", 3: "bicubic"}[processor.resample]
    size = processor.size if kind.startswith("siglip") else processor.crop_size
    assert (size["height"], size["width"]) == (backbone.image_size, backbone.image_size)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)  # a frame that has been resized and cropped
    theirs = processor(image.numpy(), return_tensors="pt", do_resize=False)["pixel_values"][0]
    torch.testing.assert_close(backbone.normalise(image), theirs, atol=1e-5, rtol=0)


def test_images_become_what_dinov3s_processor_makes_of_them(tmp_path: Path) -> None:
    with np.load(GOLDEN / "dinov3_pixels.npz") as golden:  # it needs torchvision
        image, pixels, resample = (torch.from_numpy(golden[name]) for name in ("image", "pixels", "resample"))
    save_folder("dinov3_vit", tmp_path / "tower")
    for written in ({}, {"size": {"height": 224, "width": 224}, "resample": int(resample)}):
        (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(written))
        backbone = CLIPBackbone.load(str(tmp_path / "tower"))
        assert backbone.interpolation == {2: "bilinear", 3: "bicubic"}[int(resample)]
        torch.testing.assert_close(backbone.normalise(image), pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", FOLDERS)
def test_without_preprocessing_a_family_has_its_own(kind: str, tmp_path: Path) -> None:
    save_folder(kind, tmp_path / "tower")
    (tmp_path / "tower" / "preprocessor_config.json").unlink()
    backbone = CLIPBackbone.load(str(tmp_path / "tower"))
    mean = {"clip": 0.48145466, "metaclip": 0.48145466, "siglip": 0.5}.get(kind.split("_")[0], 0.485)
    assert backbone.mean.flatten()[0] == torch.tensor(mean)
    assert backbone.interpolation == ("bilinear" if kind.startswith("dinov3") else "bicubic")


@pytest.mark.parametrize(
    ("kind", "values", "taken"),
    [
        ("siglip", {"size": {"height": 32, "width": 32}, "do_center_crop": False, "crop_size": None}, True),
        ("siglip", {"size": 32, "default_to_square": True}, True),
        ("siglip", {"image_processor_type": "SiglipImageProcessorFast", "data_format": "channels_first"}, True),
        ("siglip", {"size": 32}, False),  # the short side, and nothing would be cut off
        ("siglip", {"size": {"shortest_edge": 32}}, False),
        ("siglip", {"size": {"height": 48, "width": 48}}, False),
        ("siglip", {"size": {"height": 32, "width": 48}}, False),
        ("siglip", {"do_resize": False}, False),
        ("siglip", {"image_processor_type": "CLIPImageProcessor"}, False),
        ("siglip", {"image_processor_type": "os.system"}, False),
        ("metaclip_2", {"size": {"shortest_edge": 40}}, False),
        ("dinov2", {"size": {"shortest_edge": 256}}, True),
        ("dinov2", {"size": {"shortest_edge": 16}}, False),
        ("dinov2", {"size": 40, "default_to_square": True}, False),
        ("dinov2", {"crop_size": {"height": 32, "width": 48}}, False),
        ("dinov2", {"crop_size": {"height": "32", "width": 32}}, False),
        ("dinov2", {"crop_size": {"height": 4, "width": 4}}, False),  # less than a patch
        ("dinov2", {"crop_size": {"height": -4, "width": -4}}, False),
        ("dinov2", {"crop_size": {"height": 10**9, "width": 10**9}, "size": {"shortest_edge": 10**9}}, False),
        ("dinov2", {"do_center_crop": False}, False),
        ("dinov3_vit", {"size": {"height": 64, "width": 64}}, True),
        ("dinov3_vit", {"size": {"height": 64, "width": 32}}, False),
        ("dinov3_vit", {"resample": 0}, False),
    ],
    ids=str,
)
def test_a_preprocessing_is_obeyed_or_refused(kind: str, values: dict[str, Any], taken: bool, tmp_path: Path) -> None:
    save_folder(kind, tmp_path / "tower")
    file = tmp_path / "tower" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    if not taken:
        with pytest.raises(
            UserError, match=r"can't be used: .*; mend or remove that file|less than one patch|at most 4096"
        ):
            CLIPBackbone.load(str(tmp_path / "tower"))
        return
    side = values.get("size")
    expected = side["height"] if kind == "dinov3_vit" and isinstance(side, dict) else 32
    assert CLIPBackbone.load(str(tmp_path / "tower")).image_size == expected


# What is done with the towers


@pytest.mark.parametrize("kind", FOLDERS)
def test_blocks_projections_and_gradients(kind: str, tmp_path: Path) -> None:
    save_folder(kind, tmp_path / "tower")
    backbone = CLIPBackbone.load(str(tmp_path / "tower")).eval()
    blocks = backbone.family.blocks(backbone.visual)
    assert len(blocks) == 2
    models: list[Any] = [tower.model for tower in (backbone.visual, backbone.text) if tower is not None]
    assert {model.config._attn_implementation for model in models} == {"sdpa"}
    for block in blocks:
        layers = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        named = {name: layers.intersection(of) for name, of in backbone.family.projections.items()}
        assert {*named} == {"q", "k", "v", "o", "fc1", "fc2"}
        assert all(named.values())
        assert set().union(*named.values()) == layers

    images = torch.randn(2, 3, 32, 32)

    def gradients() -> dict[str, Tensor]:
        backbone.zero_grad()
        backbone.encode_frames(images).square().sum().backward()
        return {name: weight.grad.clone() for name, weight in backbone.visual.named_parameters()}  # type: ignore[union-attr]

    plain = gradients()  # of each weight: DistributedDataParallel allows no others
    backbone.enable_gradient_checkpointing()
    again = gradients()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_training_step_makes_no_draws(kind: str, tmp_path: Path) -> None:
    # Else a resumed training would differ: its draws come from its own seeds. DINOv3 draws positions by default.
    save_folder(kind, tmp_path / "tower")
    backbone = CLIPBackbone.load(str(tmp_path / "tower"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone.train().encode_frames(images), backbone.eval().encode_frames(images))


# Bad input


def changed_config(folder: Path, change: dict[str, Any], *tables: str) -> None:
    values = json.loads((folder / "config.json").read_text())
    table = values
    for name in tables:
        table = table[name]
    table |= change
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_configuration_that_contradicts_the_weights_is_refused(kind: str, tmp_path: Path) -> None:
    save_folder(kind, tmp_path / "tower")
    good = (tmp_path / "tower" / "config.json").read_text()
    tables = ["vision_config", "text_config"] if kind in TWO_TOWERS else [""]
    for table in tables:
        values = json.loads(good)[table] if table else json.loads(good)
        for field, value in (
            *(("hidden_size", 64), ("hidden_size", 1 << 20), ("num_hidden_layers", 1), ("num_hidden_layers", 3)),
            *(("num_hidden_layers", 1 << 40), ("intermediate_size", 1 << 24), ("patch_size", 16), ("vocab_size", 7)),
            *(("num_channels", 1), ("max_position_embeddings", 8), ("mlp_ratio", 1 << 20), ("num_register_tokens", 1)),
        ):
            if field not in values:
                continue
            changed_config(tmp_path / "tower", {field: value}, *filter(None, [table]))
            with pytest.raises(
                UserError, match=r"fetch config\.json and weights of one whole model|can't be (used|built)"
            ):
                CLIPBackbone.load(str(tmp_path / "tower"))
            (tmp_path / "tower" / "config.json").write_text(good)
    CLIPBackbone.load(str(tmp_path / "tower"))


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("vision_config", {"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number above 0"),
        ("vision_config", {"num_attention_heads": 7}, "can't be"),
        ("vision_config", {"attention_dropout": 3.0}, "attention_dropout is 3.0; it must be .* below 1"),
        ("text_config", {"attention_dropout": -1.0}, "attention_dropout is -1.0; it must be .* at least 0"),
        ("vision_config", {"layer_norm_eps": -1.0}, "layer_norm_eps is -1.0; it must be a number above 0"),
        ("vision_config", {"patch_size": 1 << 30}, "image_size is 32, less than one patch"),
        ("vision_config", {"image_size": 1 << 30}, "image_size is 1073741824; it must be at most 4096"),
        ("vision_config", {"attention_dropout": float("nan")}, "attention_dropout is nan; it must be a number"),
        ("vision_config", {"image_size": [32, 48]}, r"image_size is \[32, 48\]"),
        ("vision_config", {"patch_size": -8}, "patch_size is -8"),
        ("vision_config", {"num_hidden_layers": 2.5}, "can't be used"),
        ("vision_config", {"hidden_act": "os.system"}, "can't be built"),
        ("vision_config", {"hidden_act": ["gelu"]}, "can't be used"),
        ("text_config", {"vocab_size": None}, "can't be used"),
        ("text_config", {"projection_size": 16}, "the embeddings of texts have 16 channels, and those of images 32"),
        (
            "",
            {"model_type": ["siglip"]},
            r"of type \['siglip'\]: the backbone has to be one of clip, dinov2, dinov3_vit",
        ),
        ("", {"model_type": "vit"}, "of type 'vit'"),
        ("", {"model_type": "resnet"}, "of type 'resnet'"),
        ("", {"model_type": "siglip2"}, r"for images of any shape \(NaFlex\).* give one of a fixed resolution"),
        ("", {"model_type": "siglip_vision_model"}, "the visual tower of a SigLIP alone: give a folder of the whole"),
        ("", {"model_type": "clip_text_model"}, "the text tower of a CLIP alone"),
        ("", {"model_type": None}, "of type None"),
    ],
    ids=str,
)
def test_configurations_are_checked(table: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_folder("siglip", tmp_path / "tower")
    changed_config(tmp_path / "tower", change, *filter(None, [table]))
    with pytest.raises(UserError, match=message) as error:
        CLIPBackbone.load(str(tmp_path / "tower"))
    assert str(tmp_path / "tower") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("heads", [3, 16, 32])
def test_heads_that_do_not_fit_the_width_are_refused(heads: int, tmp_path: Path) -> None:
    save_folder("dinov3_vit", tmp_path / "tower")
    changed_config(tmp_path / "tower", {"num_attention_heads": heads})
    with pytest.raises(UserError, match=f"{heads} heads: the width 32 has to be a multiple of 4 channels for each"):
        CLIPBackbone.load(str(tmp_path / "tower"))


def fields_of(table: dict[str, Any], *before: str) -> Iterator[tuple[str, ...]]:
    for name, value in table.items():
        yield (*before, name)
        if isinstance(value, dict):
            yield from fields_of(value, *before, name)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("kind", ["metaclip_2", "siglip_2", "dinov2", "dinov3_vit"])
def test_any_value_of_any_field_is_taken_or_refused_in_words(kind: str, file: str, tmp_path: Path) -> None:
    save_folder(kind, tmp_path / "tower")
    good = json.loads((tmp_path / "tower" / file).read_text())
    taken = 0
    for *tables, field in fields_of(good):
        for value in (None, -1, 0, True, 2.5, float("nan"), float("inf"), "x", [], [1, 2], {"a": 1}, 1 << 40, 10**30):
            changed = copy.deepcopy(good)
            table = changed
            for name in tables:
                table = table[name]
            table[field] = value
            (tmp_path / "tower" / file).write_text(json.dumps(changed))
            try:
                backbone = CLIPBackbone.load(str(tmp_path / "tower")).eval()
            except UserError:
                continue
            with torch.no_grad():
                backbone.encode_frames(torch.randn(1, 3, backbone.image_size, backbone.image_size))
                if backbone.text is not None:
                    backbone.encode_text(backbone.tokenize(["a cat"]))
            json.dumps(backbone.description(), allow_nan=False)
            taken += 1
    assert taken > 2


@pytest.mark.parametrize("kind", FOLDERS)
def test_nothing_that_a_configuration_names_is_imported(kind: str, tmp_path: Path) -> None:
    save_folder(kind, tmp_path / "tower")
    (tmp_path / "tower" / "modeling_evil.py").write_text("raise SystemExit('it ran')")
    evil = {"auto_map": {"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}, "trust_remote_code": 1}
    changed_config(tmp_path / "tower", evil | {"architectures": ["os.system"], "_attn_implementation": "a/kernel:f"})
    assert_equal_to(CLIPBackbone.load(str(tmp_path / "tower")).eval(), save_folder(kind, tmp_path / "again"))


@pytest.mark.parametrize("tower", ["visual", "text"])
@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_one_tower_alone_is_refused(kind: str, tower: str, tmp_path: Path) -> None:
    save_folder(kind, tmp_path / "tower")
    file = tmp_path / "tower" / "model.safetensors"
    prefixes = ("vision_", "visual_") if tower == "visual" else ("text_",)
    save_file({name: weight for name, weight in load_file(file).items() if not name.startswith(prefixes)}, file)
    with pytest.raises(UserError, match=f"one tower alone, and none of the {tower} tower that its config"):
        CLIPBackbone.load(str(tmp_path / "tower"))


def test_a_file_of_the_text_tower_alone_is_refused() -> None:
    with pytest.raises(UserError, match="has the text tower alone: give a file that has the visual tower too"):
        CLIPBackbone.from_openai({"token_embedding.weight": torch.ones(4, 4), "ln_final.bias": torch.ones(4)})


@pytest.mark.parametrize("kind", FOLDERS)
def test_missing_shards_and_weights_are_named(kind: str, tmp_path: Path) -> None:
    model: Any = save_folder(kind, tmp_path / "tower")
    whole = tmp_path / "tower" / "model.safetensors"
    weights = load_file(whole)
    for name in sorted(weights):
        if "mask_token" in name or name.startswith("logit_"):
            continue
        if "fc" in name or "weights_" in name or "query" in name or "embed" in name:
            save_file({other: weight for other, weight in weights.items() if other != name}, whole)
            with pytest.raises(UserError, match=r"is missing"):
                CLIPBackbone.load(str(tmp_path / "tower"))
    whole.unlink()
    model.save_pretrained(tmp_path / "tower", max_shard_size="20KB")
    shard = sorted((tmp_path / "tower").glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks {re.escape(shard.name)} of its weights"):
        CLIPBackbone.load(str(tmp_path / "tower"))
    index = tmp_path / "tower" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for name, said in (("", "leads out of its folder"), ("../x", "leads out"), ("x" * 300, "lacks .*x of its weights")):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | {"more": name}}))
        with pytest.raises(UserError, match=said):
            CLIPBackbone.load(str(tmp_path / "tower"))


@pytest.mark.parametrize(
    ("tower", "change", "message"),
    [
        ("visual_config", {"kind": "siglip2"}, "there is no family of towers 'siglip2'; there are clip, dinov2"),
        ("visual_config", {"kind": "os"}, "no family of towers 'os'"),
        ("visual_config", {"kind": "__init__"}, "no family of towers '__init__'"),
        ("visual_config", {"kind": "../tokenizer"}, "no family of towers"),
        ("visual_config", {"kind": "clip.families.clip"}, "no family of towers"),
        ("visual_config", {"kind": ["siglip"]}, "no family of towers"),
        ("visual_config", {"kind": None}, "no family of towers None"),
        (
            "visual_config",
            {"num_hidden_layers": 1 << 40},
            "num_hidden_layers is 1099511627776",
        ),
        ("text_config", {"num_hidden_layers": 1 << 40}, "num_hidden_layers is 1099511627776"),
        ("text_config", {"num_attention_heads": -1}, "num_attention_heads is -1; it must be a whole number above 0"),
        ("visual_config", {"attention_dropout": 1.5}, "attention_dropout is 1.5; it must be .* below 1"),
        ("visual_config", {"image_size": 1 << 40}, "image_size is 1099511627776; it must be at most 4096"),
        ("text_config", {"kind": "dinov2"}, "which no backbone saves"),
        ("visual_config", {"auto_map": {"AutoModel": "x"}}, "has 'auto_map', which no backbone saves"),
        ("visual_config", {"attn_implementation": "a/kernel:f"}, "has 'attn_implementation', which no backbone saves"),
        ("text_config", {"torch_dtype": "float16"}, "has 'torch_dtype', which no backbone saves"),
    ],
    ids=str,
)
def test_descriptions_name_no_code_and_no_unknown_field(
    tower: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_folder("siglip", tmp_path / "tower")
    description = CLIPBackbone.load(str(tmp_path / "tower")).description()
    description[tower] = description[tower] | change
    with pytest.raises(UserError, match=message):
        CLIPBackbone.from_description(description)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": 5}, "the source 5"),
        ({"visual_config": {"kind": "features", "dim": 4, "image_size": 32}}, "image_size is 32; of features it is 0"),
        (
            {"text_config": {"kind": "features", "dim": 4, "labels": ["a"], "max_position_embeddings": 1 << 40}},
            "max_position_embeddings is 1099511627776",
        ),
    ],
    ids=str,
)
def test_descriptions_of_features_are_checked(change: dict[str, Any], message: str) -> None:
    description = CLIPBackbone.load("features", dim=4).description()
    CLIPBackbone.from_description(description)
    with pytest.raises(UserError, match=message):
        CLIPBackbone.from_description(description | change)


# A new family


def test_a_new_family_is_one_file_as_contributing_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's two blocks: a family's file, put among the package's, and its test."""
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    family, test = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:2]
    name = re.search(r"`src/clip_m2df/clip/families/(\w+)\.py`", page)
    assert name is not None
    assert name[1] not in families.families()
    folder = tmp_path / "families"
    folder.mkdir()
    (folder / f"{name[1]}.py").write_text(family)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder)])
    assert name[1] in families.families()
    names: dict[str, Any] = {}
    exec(compile(test, "CONTRIBUTING.md", "exec"), names)
    tests: list[Callable[[Path], None]] = [value for key, value in names.items() if key.startswith("test_")]
    assert tests
    for run in tests:
        run(tmp_path)
