import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_m2df.clip.backbone import TINY_CLIP, CLIPBackbone
from clip_m2df.clip.formats import CLIP_MEAN, CLIP_STD, RN50_FILE, RN50_REPOSITORY, STANDARD_TOKENIZER
from clip_m2df.errors import UserError
from tests.conftest import read_golden, save_tokenizer

State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    return read_golden("clip_vit")[1]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """No network and an empty cache; the function puts a folder into the cache under a repository's name."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def put(repository: str, folder: Path) -> None:
        root = cache / f"models--{repository.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, root / "snapshots" / ("0" * 40))

    return put


@pytest.fixture(scope="session")
def golden_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of the golden text towers' 120 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    assert save_tokenizer(folder, letters, [f"word{i}" for i in range(65)]) == 120
    return folder


@pytest.fixture
def copied(tiny_clip_dir: Path, tmp_path: Path) -> Path:
    """The tiny CLIP's folder, to be spoiled."""
    return Path(shutil.copytree(tiny_clip_dir, tmp_path / "clip"))


# Numbers


@pytest.mark.parametrize("name", ["clip_resnet", "clip_vit"])
def test_golden(name: str) -> None:
    golden, state = read_golden(name)
    backbone = CLIPBackbone.from_openai(state)
    seen: list[bool] = []
    if name == "clip_resnet":
        backbone.visual.get_submodule("layer4").register_forward_hook(
            lambda _, __, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
        )

    with torch.no_grad():
        image_features = backbone.encode_frames(golden["image"])
        text_features = backbone.encode_text(golden["tokens"])

    assert (backbone.dim, backbone.image_size) == (32, golden["image"].shape[-1])
    torch.testing.assert_close(image_features, golden["image_features"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(text_features, golden["text_features"], rtol=1e-4, atol=1e-4)
    assert seen == [True] * (name == "clip_resnet")


def test_from_pretrained_agrees_with_transformers(tiny_clip_dir: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    reference = CLIPModel.from_pretrained(tiny_clip_dir)
    reference_tokenizer = CLIPTokenizer.from_pretrained(tiny_clip_dir)
    backbone = CLIPBackbone.load(str(tiny_clip_dir))
    images = torch.randn(3, 3, 32, 32)
    texts = ["a photo of a cat", "juggling", "shaking hands, then a very long tail indeed"]

    tokens = backbone.tokenize(texts)
    inputs = reference_tokenizer(texts, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.encode_frames(images), reference.get_image_features(images).pooler_output, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            backbone.encode_text(tokens), reference.get_text_features(**inputs).pooler_output, rtol=1e-4, atol=1e-5
        )
    assert torch.equal(tokens, inputs["input_ids"])
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


def test_attention_is_sdpa(tiny_clip_dir: Path) -> None:
    backbone = CLIPBackbone.from_pretrained(str(tiny_clip_dir))
    configs: list[Any] = [m.config for m in backbone.modules() if hasattr(m, "config")]
    assert {config._attn_implementation for config in configs} == {"sdpa"}


def test_normalise() -> None:
    backbone = CLIPBackbone.from_openai(read_golden("clip_resnet")[1])
    images = torch.randint(0, 256, (2, 4, 3, 5, 7), dtype=torch.uint8)

    normalised = backbone.normalise(images)

    for channel in range(3):
        expected = (images[:, :, channel].double() / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
        torch.testing.assert_close(normalised[:, :, channel], expected.float())
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(backbone.normalise(images.double() / 255), normalised)


def test_leading_axes_equal_a_loop(state: State) -> None:
    backbone = CLIPBackbone.from_openai(state)
    images = torch.randn(2, 3, 3, 32, 32)

    with torch.no_grad():
        together = backbone.encode_frames(images)
        one_by_one = torch.stack([torch.stack([backbone.encode_frames(image) for image in row]) for row in images])

    assert together.shape == (2, 3, 32)
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-5)
    assert backbone.encode_frames(images[0, 0]).shape == (32,)


@pytest.mark.parametrize("name", ["clip_resnet", "clip_vit"])
def test_gradient_checkpointing_computes_twice_and_changes_no_gradient(name: str) -> None:
    golden, state = read_golden(name)
    plain, checkpointed = CLIPBackbone.from_openai(state), CLIPBackbone.from_openai(state)
    checkpointed.enable_gradient_checkpointing()
    calls: list[int] = []
    gradients = []
    for backbone in (plain.train(), checkpointed.train()):
        part = {"clip_resnet": "layer1.0.conv1", "clip_vit": "model.vision_model.encoder.layers.0.layer_norm1"}[name]
        backbone.visual.get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
        loss = backbone.encode_frames(golden["image"]).square().sum()
        gradients.append(torch.autograd.grad(loss, list(backbone.visual.parameters())))
        calls.append(0)
    assert calls == [1, 0, 1, 1, 0]
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():  # evaluation has no backward pass
        checkpointed.encode_frames(golden["image"])
    assert calls == [1, 0, 1, 1, 0, 1]


def test_gradient_checkpointing_would_count_a_moving_batch_norm_twice() -> None:
    backbone = CLIPBackbone.from_openai(read_golden("clip_resnet")[1])
    backbone.freeze_batch_norm = False
    with pytest.raises(UserError, match="set freeze_batch_norm, or leave gradient_checkpointing out"):
        backbone.enable_gradient_checkpointing()


def test_images_of_another_kind_are_refused(state: State) -> None:
    backbone = CLIPBackbone.from_openai(state)
    with pytest.raises(UserError, match=r"takes images of \(3, 32, 32\), not \(3, 48, 32\)"):
        backbone.encode_frames(torch.zeros(2, 3, 48, 32))
    with pytest.raises(UserError, match="call normalise first"):
        backbone.encode_frames(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


# Batch norm


def batch_norms(backbone: CLIPBackbone) -> list[nn.BatchNorm2d]:
    return [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]


def test_batch_norm_moves_only_with_its_switch_off() -> None:
    golden, state = read_golden("clip_resnet")
    backbone = CLIPBackbone.from_openai(state)
    before = batch_norms(backbone)[0].running_mean
    assert before is not None
    before = before.clone()

    assert backbone.training
    nn.Sequential(backbone).eval().train()  # as a trainer does, from outside
    frozen = backbone.encode_frames(golden["image"])
    assert not any(norm.training for norm in batch_norms(backbone))
    assert torch.equal(before, state["visual.bn1.running_mean"])
    torch.testing.assert_close(frozen, golden["image_features"], rtol=1e-4, atol=1e-4)

    backbone.freeze_batch_norm = False
    backbone.train()
    backbone.encode_frames(golden["image"])
    after = batch_norms(backbone)[0].running_mean
    assert after is not None
    assert all(norm.training for norm in batch_norms(backbone))
    assert not torch.allclose(after, before)
    assert not any(norm.training for norm in batch_norms(backbone.eval()))


# Tokens


def test_tokens_are_padded_and_cut_at_the_end_of_text(tiny_clip_dir: Path) -> None:
    backbone = CLIPBackbone.from_pretrained(str(tiny_clip_dir))
    assert backbone.text_config is not None
    end = backbone.text_config["eos_token_id"]

    tokens = backbone.tokenize(["cab", "x" * 40])

    assert tokens.dtype == torch.long
    assert tokens.shape == (2, 32)
    start, c_a, b = tokens[0, :3].tolist()
    assert start == end - 1
    assert tokens[0, 3:].tolist() == [end] * 29
    assert c_a == end - 2  # the merge
    assert b not in (start, end)
    assert tokens[1, -1] == end
    assert end not in tokens[1, :-1]
    assert backbone.tokenize([]).shape == (0, 32)


def test_padding_is_never_read(tiny_clip_dir: Path) -> None:
    backbone = CLIPBackbone.from_pretrained(str(tiny_clip_dir))
    tokens = backbone.tokenize(["a photo"])
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode_text(tokens), backbone.encode_text(tokens[:, :9]))
    with pytest.raises(UserError, match="at most 32 tokens a text, not 64"):
        backbone.encode_text(tokens.repeat(1, 2))


def test_the_standard_tokenizer_is_fetched_when_a_text_comes(
    state: State, hub: Callable[[str, Path], None], golden_tokenizer: Path
) -> None:
    backbone = CLIPBackbone.from_openai(state)
    assert backbone.description()["tokenizer"] is None
    with pytest.raises(UserError, match=r"the tokenizer of 'openai/clip-vit-base-patch32' are not on this machine"):
        backbone.tokenize(["a cat"])

    hub(STANDARD_TOKENIZER, golden_tokenizer)
    assert isinstance(backbone.description()["tokenizer"], str)
    assert backbone.tokenize(["a cat"])[0, -1] == 119


def test_a_tokenizer_can_be_given_or_lie_beside_the_weights(
    state: State, golden_tokenizer: Path, tmp_path: Path
) -> None:
    given = CLIPBackbone.from_openai(state, tokenizer=str(golden_tokenizer))
    folder = Path(shutil.copytree(golden_tokenizer, tmp_path / "beside"))
    save_file(state, folder / "clip.safetensors")
    beside = CLIPBackbone.load(str(folder / "clip.safetensors"))
    assert torch.equal(given.tokenize(["a cat"]), beside.tokenize(["a cat"]))


def test_a_tokenizer_of_vocabulary_and_merges(copied: Path) -> None:
    whole = CLIPBackbone.from_pretrained(str(copied))
    model = json.loads((copied / "tokenizer.json").read_text())["model"]
    (copied / "tokenizer.json").unlink()
    (copied / "vocab.json").write_text(json.dumps(model["vocab"]))
    (copied / "merges.txt").write_text("#version: 0.2\nc a\n")
    parts = CLIPBackbone.from_pretrained(str(copied))
    assert torch.equal(whole.tokenize(["a cat, café"]), parts.tokenize(["a cat, café"]))


def test_a_wrong_tokenizer_is_refused(state: State, tiny_clip_dir: Path, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 515 tokens and the text tower 120"):
        CLIPBackbone.from_openai(state, tokenizer=str(tiny_clip_dir))

    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"makes \[513, 514\] of an empty text, where 7 has to be the last"):
        CLIPBackbone.from_pretrained(str(copied))

    with pytest.raises(UserError, match=r"has no tokenizer: neither tokenizer\.json"):
        CLIPBackbone.from_openai(state, tokenizer=str(tmp_path))


def test_the_tokenizer_of_two_tokens_is_refused(copied: Path) -> None:
    from transformers import CLIPTokenizer

    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer: neither tokenizer\.json"):
        CLIPBackbone.from_pretrained(str(copied))

    CLIPTokenizer.from_pretrained(copied).save_pretrained(copied)  # made without a word
    with pytest.raises(UserError, match="has 2 tokens and the text tower 515"):
        CLIPBackbone.from_pretrained(str(copied))


# OpenAI's files


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_in_openais_layout(suffix: str, dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    file = tmp_path / f"clip{suffix}"
    stored = {key: weight.to(dtype) for key, weight in state.items()}
    for constant in ("input_resolution", "context_length", "vocab_size"):
        stored[constant] = torch.tensor(1)
    if suffix == ".safetensors":
        save_file(stored, file)
    else:
        torch.save(stored, file)
    images = torch.randn(2, 3, 32, 32)

    backbone = CLIPBackbone.load(str(file))

    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    expected = CLIPBackbone.from_openai({key: weight.to(dtype).float() for key, weight in state.items()})
    with torch.no_grad():
        assert torch.equal(backbone.encode_frames(images), expected.encode_frames(images))
    assert backbone.source == str(file)


@pytest.mark.parametrize("name", ["clip_resnet", "clip_vit"])
def test_the_text_tower_may_be_absent(name: str, golden_tokenizer: Path) -> None:
    golden, state = read_golden(name)
    visual = {key: weight for key, weight in state.items() if key.startswith("visual.")}
    backbone = CLIPBackbone.from_openai(visual, tokenizer=str(golden_tokenizer))

    assert backbone.text is None
    with torch.no_grad():
        features = backbone.encode_frames(golden["image"])
        again = CLIPBackbone.from_description(backbone.description())
        again.load_state_dict(backbone.state_dict())
        assert torch.equal(again.encode_frames(golden["image"]), features)
    torch.testing.assert_close(features, golden["image_features"], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="no text tower"):
        backbone.tokenize(["a cat"])
    with pytest.raises(UserError, match="no text tower"):
        backbone.encode_text(golden["tokens"])


def test_batch_norm_counters_may_be_absent() -> None:
    golden, state = read_golden("clip_resnet")
    for key in list(state):
        if key.endswith("num_batches_tracked"):
            del state[key]
    with torch.no_grad():
        features = CLIPBackbone.from_openai(state).encode_frames(golden["image"])
    torch.testing.assert_close(features, golden["image_features"], rtol=1e-4, atol=1e-4)


def test_other_layouts_are_refused(state: State) -> None:
    cases: list[tuple[Callable[[State], Any], str]] = [
        (lambda s: s.pop("visual.ln_pre.bias"), r"visual\.ln_pre\.bias is missing"),
        (
            lambda s: s.pop("transformer.resblocks.0.attn.in_proj_bias"),
            r"CLIP: transformer\.resblocks\.0\.attn\.in_proj_bias is missing$",
        ),
        (lambda s: s.pop("token_embedding.weight"), "token_embedding.weight is missing"),
        (lambda s: s.update({f"extra.{i}": torch.ones(1) for i in range(6)}), r"extra\.0 is unexpected, .* and 1 more"),
        (lambda s: s.update({"ln_final.bias": torch.ones(3)}), r"ln_final.bias is \(3,\) where \(64,\) belongs"),
        (
            lambda s: s.update({"visual.transformer.resblocks.0.mlp.c_fc.weight": torch.ones(8, 60)}),
            "isn't a multiple of",
        ),
        (lambda s: s.clear(), "visual.conv1.weight is missing"),
    ]
    for change, message in cases:
        changed = dict(state)
        change(changed)
        with pytest.raises(UserError, match=message):
            CLIPBackbone.from_openai(changed)


def test_a_file_in_transformers_layout_says_so(tiny_clip_dir: Path) -> None:
    with pytest.raises(UserError, match=r"visual\.conv1\.weight is missing.*are given by their folder"):
        CLIPBackbone.load(str(tiny_clip_dir / "model.safetensors"))


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_says_how_to_convert_it(tmp_path: Path) -> None:
    file = tmp_path / "RN50.pt"
    torch.jit.save(torch.jit.script(Doubling()), str(file))
    with pytest.raises(UserError, match="TorchScript archive") as caught:
        CLIPBackbone.load(str(file))
    assert "torch.jit.load('RN50.pt', map_location='cpu').state_dict()" in str(caught.value)
    assert "'RN50.safetensors'" in str(caught.value)


def test_damaged_files_are_named(state: State, tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(state, whole)
    for suffix in (".safetensors", ".pt"):
        file = tmp_path / f"cut{suffix}"
        file.write_bytes(whole.read_bytes()[:1000])
        with pytest.raises(UserError, match=rf"cut\{suffix} is damaged"):
            CLIPBackbone.load(str(file))

    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(UserError, match=r"other\.pt is damaged"):
        CLIPBackbone.load(str(tmp_path / "other.pt"))

    torch.save({"state_dict": state}, tmp_path / "nested.pt")
    with pytest.raises(UserError, match=r"nested\.pt isn't a plain table of tensors"):
        CLIPBackbone.load(str(tmp_path / "nested.pt"))


# Names and folders


@pytest.mark.parametrize("name", ["./clip", "/a/b", "a/b/c", "weights.pt", "..\\clip", "~/clip-of-nobody"])
def test_what_does_not_exist_is_named(name: str) -> None:
    for load in (CLIPBackbone.load, CLIPBackbone.from_openai):
        with pytest.raises(UserError, match="no such file or folder"):
            load(name)


@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch16", "rn50"])
def test_without_network_or_cache(name: str, hub: Callable[[str, Path], None]) -> None:
    with pytest.raises(UserError, match=r"are not on this machine and can't be fetched: connect once, or download"):
        CLIPBackbone.load(name)
    with pytest.raises(UserError, match="check the name"):
        CLIPBackbone.load("not a name")


def test_a_model_in_the_cache_needs_no_network(
    hub: Callable[[str, Path], None], tiny_clip_dir: Path, tmp_path: Path
) -> None:
    hub("somebody/clip", tiny_clip_dir)
    assert CLIPBackbone.load("somebody/clip").tokenize(["a cat"]).shape == (1, 32)

    (tmp_path / "rn50").mkdir()
    save_file(read_golden("clip_resnet")[1], tmp_path / "rn50" / RN50_FILE)
    hub(RN50_REPOSITORY, tmp_path / "rn50")
    assert CLIPBackbone.load("rn50").source == "rn50"

    # The tokenizer alone is no model.
    shutil.copytree(tiny_clip_dir, tmp_path / "part", ignore=shutil.ignore_patterns("*.safetensors"))
    hub("somebody/part", tmp_path / "part")
    with pytest.raises(UserError, match="not on this machine"):
        CLIPBackbone.load("somebody/part")


def test_the_network_is_asked_after_the_cache(tiny_clip_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(repository: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append(local_files_only)
        if local_files_only:
            raise FileNotFoundError
        return str(tiny_clip_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    CLIPBackbone.load("somebody/clip")
    assert asked == [True, True, False]


def test_tiny_names_the_packaged_folder() -> None:
    assert TINY_CLIP.parent.parent.name == "clip_m2df"
    backbone = CLIPBackbone.load("tiny")
    assert backbone.source == "tiny"
    expected = CLIPBackbone.from_pretrained(str(TINY_CLIP)).state_dict()
    assert all(torch.equal(weight, expected[key]) for key, weight in backbone.state_dict().items())


def test_folders_that_are_no_clip_are_refused(copied: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            CLIPBackbone.load(str(copied))

    weights = load_file(copied / "model.safetensors")
    save_file({key: weight for key, weight in weights.items() if "fc1" not in key}, copied / "model.safetensors")
    refused(r"CLIP: vision_model\.encoder\.layers\.0\.mlp\.fc1\.\w+ is missing, .* and 3 more")
    (copied / "model.safetensors").write_bytes(b"{}")
    refused(r"model\.safetensors is damaged")
    (copied / "model.safetensors").unlink()
    refused("has no weights")
    (copied / "config.json").unlink()
    refused(r"isn't a model in transformers' format: there is no config\.json")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{"model_type": "bert"}', "of type 'bert'"),
        ("config.json", '{"model_type": "clip", "vision_config": "wide"}', "can't be used"),
        ("config.json", "{", r"config\.json is damaged"),
        ("config.json", "[]", r"config\.json is damaged: a table"),
        ("config.json", "[" * 100_000, r"config\.json is damaged"),
        ("preprocessor_config.json", '{"image_mean": 3}', "the preprocessing in .* can't be used"),
        ("preprocessor_config.json", '{"image_mean": [1, 2]}', "the towers of .* can't be built"),
        ("preprocessor_config.json", '{"image_std": ["a", "b", "c"]}', "the towers of .* can't be built"),
        ("processor_config.json", '{"image_processor": []}', "the preprocessing in .* can't be used"),
        ("tokenizer.json", "{}", "the tokenizer in .* can't be read"),
        ("tokenizer.json", "{", "the tokenizer in .* can't be read"),
    ],
)
def test_damaged_descriptions_are_named(copied: Path, name: str, text: str, message: str) -> None:
    (copied / name).write_text(text)
    with pytest.raises(UserError, match=message):
        CLIPBackbone.load(str(copied))


def test_towers_that_cannot_be(tiny_clip_dir: Path) -> None:
    description = CLIPBackbone.load(str(tiny_clip_dir)).description()
    changes: list[dict[str, Any]] = [
        {tower: description[tower] | {field: value}}
        for tower, field, value in (
            ("visual_config", "hidden_size", "wide"),
            ("visual_config", "num_attention_heads", 7),
            ("visual_config", "kind", "resnet"),
            ("text_config", "hidden_act", "os.system"),
            ("text_config", "vocab_size", -1),
        )
    ]
    for change in (*changes, {"tokenizer": "{}"}):
        with pytest.raises(UserError, match=r"the towers of .* can't be built"):
            CLIPBackbone.from_description(description | change)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_and_shards_in_a_folder(copied: Path, sharded: bool) -> None:
    weights = load_file(copied / "model.safetensors")
    expected = CLIPBackbone.load(str(copied)).state_dict()
    (copied / "model.safetensors").unlink()
    if sharded:
        weights["text_model.embeddings.position_ids"] = torch.arange(32)[None]  # as older versions stored
        half = len(weights) // 2
        torch.save(dict(list(weights.items())[:half]), copied / "pytorch_model-00001-of-00002.bin")
        torch.save(dict(list(weights.items())[half:]), copied / "pytorch_model-00002-of-00002.bin")
    else:
        torch.save(weights, copied / "pytorch_model.bin", _use_new_zipfile_serialization=False)

    state = CLIPBackbone.load(str(copied)).state_dict()

    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_may_have_its_own_mean_and_std(nested: bool, copied: Path) -> None:
    values: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 0.5]}
    if nested:
        (copied / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    else:
        (copied / "preprocessor_config.json").write_text(json.dumps(values))
    backbone = CLIPBackbone.from_pretrained(str(copied))
    expected = torch.tensor([2.0, 1.0, 1.0]).view(3, 1, 1).expand(3, 2, 2)
    torch.testing.assert_close(backbone.normalise(torch.ones(3, 2, 2)), expected)
    again = CLIPBackbone.from_description(backbone.description())
    assert torch.equal(again.normalise(torch.ones(3, 2, 2)), backbone.normalise(torch.ones(3, 2, 2)))


# The description


@pytest.mark.parametrize("kind", ["transformers", "clip_vit", "clip_resnet"])
def test_a_description_and_a_state_dict_make_the_same_backbone(
    kind: str, copied: Path, golden_tokenizer: Path, tmp_path: Path, hub: Callable[[str, Path], None]
) -> None:
    if kind == "transformers":
        backbone = CLIPBackbone.from_pretrained(str(copied))
    else:
        state = read_golden(kind)[1]
        tokenizer = shutil.copytree(golden_tokenizer, copied, dirs_exist_ok=True)
        backbone = CLIPBackbone.from_openai(state, tokenizer=str(tokenizer), freeze_batch_norm=False)
    torch.save({"description": backbone.description(), "weights": backbone.state_dict()}, tmp_path / "checkpoint")

    shutil.rmtree(copied)  # neither files nor a network are needed
    checkpoint = torch.load(tmp_path / "checkpoint", weights_only=True)
    again = CLIPBackbone.from_description(checkpoint["description"])
    again.load_state_dict(checkpoint["weights"])

    images = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    tokens = backbone.tokenize(["a photo of a cat", "x" * 50])
    assert torch.equal(again.tokenize(["a photo of a cat", "x" * 50]), tokens)
    with torch.no_grad():
        assert torch.equal(again.eval().encode_frames(images), backbone.eval().encode_frames(images))
        assert torch.equal(again.encode_text(tokens), backbone.encode_text(tokens))
    assert again.description() == backbone.description()
    assert json.loads(json.dumps(backbone.description())) == backbone.description()
    assert again.freeze_batch_norm == backbone.freeze_batch_norm


def test_a_description_without_tokenizer_says_so(state: State, hub: Callable[[str, Path], None]) -> None:
    again = CLIPBackbone.from_description(CLIPBackbone.from_openai(state).description())
    with pytest.raises(UserError, match="was saved without its tokenizer"):
        again.tokenize(["a cat"])
