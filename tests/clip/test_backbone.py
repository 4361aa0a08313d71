import gzip
import importlib.metadata
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_m2df import CLIPM2DF
from clip_m2df.clip.backbone import TINY_CLIP, CLIPBackbone
from clip_m2df.clip.formats import (
    CLIP_MEAN,
    CLIP_STD,
    RN50_FILE,
    RN50_REPOSITORY,
    STANDARD_TOKENIZER,
    openai_configs,
    openai_name,
)
from clip_m2df.errors import UserError
from tests.conftest import GOLDEN, read_golden, save_tokenizer

State = dict[str, Tensor]
# What shapes don't tell of the small towers of these tests, and what says it beside a file of them.
OPENAI: dict[str, Any] = {"head_width": 64, "activation": "quick_gelu"}
OPEN_CLIP = {"model_cfg": {"quick_gelu": True, "vision_cfg": {"head_width": 64}, "text_cfg": {"heads": 1}}}


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
    backbone = CLIPBackbone.from_openai(state, **OPENAI)
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
    texts = ["a photo of a cat", "juggling", "shaking hands, then" + " a very long tail" * 9]

    tokens = backbone.tokenize(texts)
    inputs = reference_tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
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
    backbone = CLIPBackbone.from_openai(read_golden("clip_resnet")[1], **OPENAI)
    images = torch.randint(0, 256, (2, 4, 3, 5, 7), dtype=torch.uint8)

    normalised = backbone.normalise(images)

    for channel in range(3):
        expected = (images[:, :, channel].double() / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
        torch.testing.assert_close(normalised[:, :, channel], expected.float())
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(backbone.normalise(images.double() / 255), normalised)


def test_leading_axes_equal_a_loop(state: State) -> None:
    backbone = CLIPBackbone.from_openai(state, **OPENAI)
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
    plain, checkpointed = CLIPBackbone.from_openai(state, **OPENAI), CLIPBackbone.from_openai(state, **OPENAI)
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
    backbone = CLIPBackbone.from_openai(read_golden("clip_resnet")[1], **OPENAI)
    backbone.freeze_batch_norm = False
    with pytest.raises(UserError, match="set freeze_batch_norm, or leave gradient_checkpointing out"):
        backbone.enable_gradient_checkpointing()


def test_images_of_another_kind_are_refused(state: State) -> None:
    backbone = CLIPBackbone.from_openai(state, **OPENAI)
    with pytest.raises(UserError, match=r"takes images of \(3, 32, 32\), not \(3, 48, 32\)"):
        backbone.encode_frames(torch.zeros(2, 3, 48, 32))
    with pytest.raises(UserError, match="call normalise first"):
        backbone.encode_frames(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


# Batch norm


def batch_norms(backbone: CLIPBackbone) -> list[nn.BatchNorm2d]:
    return [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]


def test_batch_norm_moves_only_with_its_switch_off() -> None:
    golden, state = read_golden("clip_resnet")
    backbone = CLIPBackbone.from_openai(state, **OPENAI)
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

    tokens = backbone.tokenize(["cab", "x" * 100])

    assert tokens.dtype == torch.long
    assert tokens.shape == (2, 77)
    start, c_a, b = tokens[0, :3].tolist()
    assert start == end - 1
    assert tokens[0, 3:].tolist() == [end] * 74
    assert c_a == end - 2  # the merge
    assert b not in (start, end)
    assert tokens[1, -1] == end
    assert end not in tokens[1, :-1]
    assert backbone.tokenize([]).shape == (0, 77)


def test_padding_is_never_read(tiny_clip_dir: Path) -> None:
    backbone = CLIPBackbone.from_pretrained(str(tiny_clip_dir))
    tokens = backbone.tokenize(["a photo"])
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode_text(tokens), backbone.encode_text(tokens[:, :9]))
    with pytest.raises(UserError, match="at most 77 tokens a text, not 154"):
        backbone.encode_text(tokens.repeat(1, 2))


def test_the_standard_tokenizer_is_fetched_when_a_text_comes(
    state: State, hub: Callable[[str, Path], None], golden_tokenizer: Path
) -> None:
    backbone = CLIPBackbone.from_openai(state, **OPENAI)
    assert backbone.description()["tokenizer"] is None
    missing = (
        r"no tokenizer, and that of 'openai/clip-vit-base-patch32' is not on this machine .*: put .* beside the file"
    )
    with pytest.raises(UserError, match=missing) as error:
        backbone.tokenize(["a cat"])
    assert "bpe_simple_vocab_16e6.txt.gz" in str(error.value)
    assert "--model.backbone_options.tokenizer" in str(error.value)

    hub(STANDARD_TOKENIZER, golden_tokenizer)
    assert isinstance(backbone.description()["tokenizer"], str)
    assert backbone.tokenize(["a cat"])[0, -1] == 119


def test_a_tokenizer_can_be_given_or_lie_beside_the_weights(
    state: State, golden_tokenizer: Path, tmp_path: Path
) -> None:
    given = CLIPBackbone.from_openai(state, tokenizer=str(golden_tokenizer), **OPENAI)
    folder = Path(shutil.copytree(golden_tokenizer, tmp_path / "beside"))
    save_file(state, folder / "clip.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
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
        CLIPBackbone.from_openai(state, tokenizer=str(tiny_clip_dir), **OPENAI)

    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"makes \[513, 514\] of an empty text, where 7 has to be the last"):
        CLIPBackbone.from_pretrained(str(copied))

    with pytest.raises(UserError, match=r"has no tokenizer: neither tokenizer\.json"):
        CLIPBackbone.from_openai(state, tokenizer=str(tmp_path), **OPENAI)
    for missing in ("nowhere", "x" * 5000, "a\0b"):
        with pytest.raises(UserError, match=r"tokenizer .*: no such file or folder"):
            CLIPBackbone.from_openai(state, tokenizer=missing, **OPENAI)


def test_the_tokenizer_of_two_tokens_is_refused(copied: Path) -> None:
    from transformers import CLIPTokenizer

    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer: neither tokenizer\.json"):
        CLIPBackbone.from_pretrained(str(copied))

    CLIPTokenizer.from_pretrained(copied).save_pretrained(copied)  # made without a word
    with pytest.raises(UserError, match="has 2 tokens and the text tower 515"):
        CLIPBackbone.from_pretrained(str(copied))


def test_a_tokenizers_configuration_leads_nowhere(copied: Path, tmp_path: Path) -> None:
    expected = CLIPBackbone.load(str(copied)).tokenize(["a cat, café"])
    other = json.loads((copied / "tokenizer.json").read_text())
    other["normalizer"], other["pre_tokenizer"] = {"type": "Prepend", "prepend": "c"}, None
    (tmp_path / "elsewhere").mkdir()
    outside = tmp_path / "elsewhere" / "tokenizer.4.0.0.json"
    outside.write_text(json.dumps(other))
    for settings in (
        {"fast_tokenizer_files": ["tokenizer.json", "../elsewhere/tokenizer.4.0.0.json"]},
        {"fast_tokenizer_files": [str(outside)]},
        *({name: str(outside)} for name in ("tokenizer_file", "vocab_file", "merges_file", "added_tokens_file")),
        {"tokenizer_file": "../elsewhere/tokenizer.4.0.0.json", "name_or_path": "../elsewhere"},
        {"auto_map": {"AutoTokenizer": ["code.Evil", None]}, "tokenizer_class": "Evil"},
        {"added_tokens_decoder": {"3": {"content": "zzz"}}},
    ):
        (copied / "tokenizer_config.json").write_text(json.dumps(settings))
        assert torch.equal(CLIPBackbone.load(str(copied)).tokenize(["a cat, café"]), expected)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"])
def test_no_link_leads_out_of_a_tokenizers_folder(name: str, copied: Path, tmp_path: Path) -> None:
    model = json.loads((copied / "tokenizer.json").read_text())["model"]
    (copied / "vocab.json").write_text(json.dumps(model["vocab"]))
    (copied / "merges.txt").write_text("#version: 0.2\nc a\n")
    if name not in ("tokenizer.json", "tokenizer_config.json"):
        (copied / "tokenizer.json").unlink()
    expected = CLIPBackbone.load(str(copied)).tokenize(["a cat"])
    moved = (copied / name).rename(tmp_path / "moved")
    (copied / name).symlink_to(moved)
    with pytest.raises(UserError, match=f"{name} is a link to .*moved: copy the file into the folder"):
        CLIPBackbone.load(str(copied))
    moved.rename(copied / "moved")
    (copied / name).unlink()
    (copied / name).symlink_to("moved")  # within the folder
    assert torch.equal(CLIPBackbone.load(str(copied)).tokenize(["a cat"]), expected)
    # The hub's cache is made of links.
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    home = Path(shutil.copytree(copied, cache / "snapshots" / "0", symlinks=True))
    (home / name).unlink()
    (home / "moved").rename(cache / "blobs" / "1")
    (home / name).symlink_to("../../blobs/1")
    assert torch.equal(CLIPBackbone.load(str(home)).tokenize(["a cat"]), expected)


EXPLODING = {"type": "Split", "pattern": {"Regex": "(a+)+(a+)+(a+)+(a+)+$"}, "behavior": "Isolated", "invert": False}


LONGER = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
ENDS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "z", "type_id": 0}}] * 100_000}


@pytest.mark.parametrize(
    "part",
    [
        {"pre_tokenizer": EXPLODING},
        {"normalizer": {**EXPLODING, "type": "Replace", "content": ""}},
        {"normalizer": {"type": "Sequence", "normalizers": [LONGER] * 6}},  # an "a" would take 10^18 bytes
        {"post_processor": {**ENDS, "pair": [], "special_tokens": {"z": {"id": "z", "ids": [5], "tokens": ["z"]}}}},
        {"normalizer": None, "pre_tokenizer": None, "decoder": 3},
    ],
)
def test_patterns_and_templates_that_explode_are_not_run(part: dict[str, Any], copied: Path) -> None:
    text = "a" * 40 + "b"
    backbone = CLIPBackbone.load(str(copied))
    expected = backbone.tokenize([text])
    description = backbone.description()
    saved = json.dumps(json.loads(description["tokenizer"]) | part)
    again = CLIPBackbone.from_description(description | {"tokenizer": saved})
    assert torch.equal(again.tokenize([text]), expected)
    assert again.description() == description
    (copied / "tokenizer.json").write_text(saved)
    assert torch.equal(CLIPBackbone.load(str(copied)).tokenize([text]), expected)


@pytest.mark.parametrize(
    "damage",
    [
        {"model": None},
        {"model": []},
        {"model": {"vocab": [], "merges": []}},
        {"model": {"vocab": {"a": "b"}, "merges": []}},
        {"model": {"vocab": {"a": -1}, "merges": []}},
        {"model": {"vocab": {"a": 1 << 40}, "merges": []}},
        {"model": {"vocab": {"a": 0.5}, "merges": []}},
        {"model": {"vocab": {"a": 0}, "merges": [["a", "b", "c"]]}},
        {"model": {"vocab": {"a": 0}, "merges": [1]}},
        {"model": {"vocab": {"a": 0}, "merges": [["x", "y"]]}},
        {"model": {"vocab": {"a": 0}, "merges": {"a": 1}}},
        {"added_tokens": [{}]},
        {"added_tokens": [{"id": "x", "content": "a"}]},
        {"added_tokens": [{"id": 7, "content": "new"}]},
        {"added_tokens": [{"id": 7, "content": 3}]},
        {"added_tokens": {"a": 1}},
        {"added_tokens": 3},
    ],
)
def test_forged_tokenizers_are_refused(damage: dict[str, Any], copied: Path) -> None:
    description = CLIPBackbone.load(str(copied)).description()
    saved = json.dumps(json.loads(description["tokenizer"]) | damage)
    with pytest.raises(UserError, match=r"the tokenizer of .* (can't be read|has)"):
        CLIPBackbone.from_description(description | {"tokenizer": saved})
    content = json.loads((copied / "tokenizer.json").read_text())
    (copied / "tokenizer.json").write_text(json.dumps(content | damage))
    with pytest.raises(UserError, match=r"the tokenizer (in|of) .* (can't be read|has)"):
        CLIPBackbone.load(str(copied))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "\udcff", "null", "3", "NaN", '{"bos_token": 3}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_files_that_are_no_tables_are_refused(name: str, text: str, copied: Path) -> None:
    (copied / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"the tokenizer in .* can't be read|is not UTF-8"):
        CLIPBackbone.load(str(copied))


def test_a_saved_tokenizer_pads_no_further_than_its_tower(copied: Path) -> None:
    backbone = CLIPBackbone.load(str(copied))
    description = backbone.description()
    saved = json.loads(description["tokenizer"])
    saved["padding"]["strategy"] = {"Fixed": 1 << 40}
    saved["truncation"]["max_length"] = 1 << 40
    again = CLIPBackbone.from_description(description | {"tokenizer": json.dumps(saved)})
    assert torch.equal(again.tokenize(["a cat" * 50]), backbone.tokenize(["a cat" * 50]))


# CLIP's own vocabulary, and how its texts are cleaned


@pytest.fixture(scope="session")
def vocabulary() -> Path:
    """CLIP's vocabulary as OpenAI's code comes with it; that code is not imported, for it needs torchvision."""
    try:
        files = importlib.metadata.distribution("clip-anytorch")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("clip-anytorch, which has CLIP's vocabulary, is not installed: pip install --no-deps clip-anytorch")
    return Path(str(files.locate_file("clip/bpe_simple_vocab_16e6.txt.gz")))


@pytest.fixture(scope="session")
def small_clip() -> State:
    """Weights in OpenAI's layout of a tiny ViT whose text tower has CLIP's 49,408 tokens."""
    torch.manual_seed(0)
    state = dict(read_golden("clip_vit")[1])
    width = state["ln_final.weight"].shape[0]
    return state | {"token_embedding.weight": torch.randn(49408, width), "positional_embedding": torch.randn(77, width)}


def test_2000_prompts_have_the_tokens_of_the_reference(vocabulary: Path, small_clip: State) -> None:
    with np.load(GOLDEN / "tokens.npz") as golden:
        prompts = json.loads(golden["prompts"].tobytes().decode(errors="surrogatepass"))
        expected = torch.from_numpy(golden["tokens"]).long()
    assert len(prompts) == len(set(prompts)) == 2000
    backbone = CLIPBackbone.from_openai(small_clip, tokenizer=str(vocabulary), **OPENAI)
    # The reference pads with 0, after the end of text, which is the largest number.
    padded = expected.masked_fill(expected.flip(1).cumsum(1).flip(1) == 0, 49407)
    assert torch.equal(backbone.tokenize(prompts), padded)


def test_clips_vocabulary_in_all_its_places(
    vocabulary: Path, small_clip: State, hub: Callable[[str, Path], None], tmp_path: Path
) -> None:
    text = ["a photo of a cat", "<|endoftext|>", "caf&eacute; " * 50]
    given = CLIPBackbone.from_openai(small_clip, tokenizer=str(vocabulary), **OPENAI)
    tokens = given.tokenize(text)
    assert tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]

    plain = tmp_path / "words.txt"
    plain.write_bytes(gzip.decompress(vocabulary.read_bytes()))
    beside, unpacked = tmp_path / "beside", tmp_path / "unpacked"
    for folder in (beside, unpacked):
        folder.mkdir()
        save_file(small_clip, folder / "clip.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    shutil.copy(vocabulary, beside)
    shutil.copy(plain, unpacked / "bpe_simple_vocab_16e6.txt")
    for backbone in (
        CLIPBackbone.from_openai(small_clip, tokenizer=str(plain), **OPENAI),
        CLIPBackbone.from_openai(small_clip, tokenizer=str(beside), **OPENAI),
        CLIPBackbone.load(str(beside / "clip.safetensors")),
        CLIPBackbone.load(str(unpacked / "clip.safetensors")),
        CLIPBackbone.from_description(given.description()),
    ):
        assert torch.equal(backbone.tokenize(text), tokens)
    with pytest.raises(UserError, match="has 49408 tokens and the text tower 120"):
        CLIPBackbone.from_openai(read_golden("clip_vit")[1], tokenizer=str(vocabulary), **OPENAI)

    damaged = plain.read_bytes().replace(b"\nhead phones</w>\n", b"\nhead phonez</w>\n")
    packed = bytearray(vocabulary.read_bytes())
    packed[len(packed) // 2] ^= 1
    for content in (damaged, bytes(packed), bytes(packed[: len(packed) // 2]), plain.read_bytes()[:400_000]):
        plain.write_bytes(content)
        with pytest.raises(UserError, match=r"the vocabulary .*words\.txt (can't be read|is damaged)"):
            CLIPBackbone.from_openai(small_clip, tokenizer=str(plain), **OPENAI)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        gzip.compress(b""),
        gzip.compress(b"#version: 0.2\n" + b"i n\n" * 60_000),
        gzip.compress(bytes(1 << 26)),  # a hundredth of what it unpacks to
        gzip.compress(b"\n" * (1 << 26)),
        b"\x1f\x8b",
        b"\x1f\x8b\x08" + b"\xff" * 100,
        b"#version: 0.2\n\xc4\xa0 t\n\xc4\xa0 a\n" + b"h e\n" * 50_000,
        b"\xff\xfe" * 100_000,
        b"{}",
    ],
)
def test_what_is_not_clips_vocabulary_is_refused(content: bytes, state: State, tmp_path: Path) -> None:
    file = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    file.write_bytes(content)
    for given in (file, tmp_path):
        with pytest.raises(UserError, match=r"the vocabulary .*bpe_simple.* (can't be read|is damaged, or not CLIP's)"):
            CLIPBackbone.from_openai(state, tokenizer=str(given), **OPENAI)


@pytest.mark.parametrize(
    ("text", "as_if"),
    [
        ("a caf&eacute; &amp;amp; a bar", "a café & a bar"),
        ("schÃ¶n", "schön"),
        ("it\u2019s \u201cgood\u201d", 'it\'s "good"'),
        ("DRAW\u3000\tSword\n", "draw sword"),
        ("ﬁre", "fire"),
        ("ΟΔΟΣ", "οδος"),
        ("a\0b\x07\x1b[31mc", "abc"),
        ("\ud83d\ude00 \ud800", "😀 \ufffd"),
        ("", " \u00a0 "),
    ],
)
def test_texts_are_cleaned_for_every_tower(text: str, as_if: str, copied: Path) -> None:
    backbone = CLIPBackbone.load(str(copied))
    assert torch.equal(*(tokens for tokens in backbone.tokenize([text, as_if])))


def test_an_end_of_text_within_a_text(copied: Path) -> None:
    backbone = CLIPBackbone.load(str(copied))
    end = backbone.tokenize([""])[0, 1]
    ends = (backbone.tokenize(["a <|endoftext|> b", "a <|ENDOFTEXT|> b", "a !<|endoftext|> b"]) == end).int().argmax(1)
    assert ends.tolist()[:2] == [2, 2]
    assert ends[2] > 15  # punctuation and letters: 18 of them


def test_a_folders_own_tokens_are_found_anywhere_and_its_padding_nowhere(copied: Path) -> None:
    file = copied / "tokenizer.json"
    content = json.loads(file.read_text())
    plain = CLIPBackbone.load(str(copied)).tokenize(["a cat! <Cat>!"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    number = content["model"]["vocab"]["!"]
    (copied / "tokenizer_config.json").write_text(json.dumps({"pad_token": "!"}))
    file.write_text(json.dumps(content | {"added_tokens": [{"id": number, "content": "!", **flags}]}))
    assert torch.equal(CLIPBackbone.load(str(copied)).tokenize(["a cat! <Cat>!"]), plain)

    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["vocab_size"] += 1
    (copied / "config.json").write_text(json.dumps(config))
    weights = load_file(copied / "model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    weights[name] = torch.cat([weights[name], weights[name][:1]])
    save_file(weights, copied / "model.safetensors")
    file.write_text(json.dumps(content | {"added_tokens": [{"id": 515, "content": "<Cat>", **flags}]}))
    tokens = CLIPBackbone.load(str(copied)).tokenize(["a <Cat> !<Cat>!", "a <cat> ! <cat> !"])
    assert (tokens == 515).sum(1).tolist() == [2, 2]


# OpenAI's files


def in_openai_layout(model: nn.Module) -> State:
    """The weights of a visual tower of transformers', by OpenAI's names."""
    stacked: dict[str, list[Tensor]] = {}
    state = model.state_dict()
    for key in sorted(state, key=lambda key: [f".{n}_proj" in key for n in "vkq"]):
        name = openai_name(key)
        stacked.setdefault(name, []).append(state[key].T if name == "visual.proj" else state[key])
    return {name: torch.cat(parts).contiguous() for name, parts in stacked.items()}


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize(("width", "head_width"), [(128, 64), (160, 80), (176, 88), (208, 104), (128, 32)])
def test_heads_and_activation_are_told_or_refused(width: int, head_width: int, activation: Any, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes: Any = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "projection_dim": 48}
    heads: Any = {"num_attention_heads": width // head_width, "hidden_act": activation}
    torch.manual_seed(0)
    model: nn.Module = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, **heads, image_size=32, patch_size=8))
    model.eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # as large as trained ones, so that an activation matters
            nn.init.normal_(parameter, std=2 / parameter[0].numel() ** 0.5)
    images, state, file = torch.randn(2, 3, 32, 32), in_openai_layout(model), tmp_path / "clip.safetensors"
    save_file(state, file)
    told = "have the shapes of none of OpenAI's models, and don't tell their heads' width and activation"
    with pytest.raises(UserError, match=told):
        CLIPBackbone.from_openai(state)
    with pytest.raises(UserError, match=told):
        CLIPBackbone.load(str(file))
    for incomplete in ({"head_width": head_width}, {"activation": activation}):
        with pytest.raises(UserError, match=told):
            CLIPBackbone.from_openai(state, **incomplete)

    vision = {"width": width, "layers": 2, "head_width": head_width, "patch_size": 8, "image_size": 32}
    cfg = {"embed_dim": 48, "quick_gelu": activation == "quick_gelu", "vision_cfg": vision, "text_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": cfg, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5]}})
    )
    given, configured = (
        CLIPBackbone.from_openai(state, head_width=head_width, activation=activation),
        CLIPBackbone.load(str(file)),
    )
    with torch.no_grad():
        expected = model(images).image_embeds
        for backbone in (given, configured, CLIPBackbone.from_description(configured.description())):
            if backbone is not given and backbone is not configured:
                backbone.load_state_dict(configured.state_dict())
            torch.testing.assert_close(backbone.encode_frames(images), expected, rtol=1e-4, atol=1e-4)
    assert configured.std.flatten().tolist() == [0.25, 0.5, 0.5]

    for change, message in (
        ({"vision_cfg": vision | {"layers": 3}}, "is another model's"),
        ({"embed_dim": 512}, "is another model's"),
        ({"vision_cfg": vision | {"patch_size": 16}}, "is another model's"),
        ({"vision_cfg": vision | {"head_width": 0}}, "head_width is 0"),
        ({"vision_cfg": vision | {"head_width": "x"}}, "head_width is 'x'"),
        ({"vision_cfg": vision | {"head_width": True}}, "head_width is True"),
        ({"vision_cfg": vision | {"head_width": 7}}, "heads of 7 channels: the width"),
        ({"vision_cfg": vision | {"timm_model_name": "vit"}}, "its vision_cfg has timm_model_name, unknown here"),
        ({"text_cfg": {"hf_model_name": "roberta"}}, "its text_cfg has hf_model_name, unknown here"),
        ({"vision_cfg": None}, "has no model_cfg with vision_cfg"),
    ):
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg | change}))
        with pytest.raises(UserError, match=message):
            CLIPBackbone.load(str(file))
    for name in ("mean", "std"):
        for value in (0.5, "abc", [0.5, 0.5], ["a", "b", "c"], [0.5] * 4, [1, 1, 1e999], {"r": 1}, [[1], 2, 3]):
            told_of = {"model_cfg": cfg, "preprocess_cfg": {name: value}}
            (tmp_path / "open_clip_config.json").write_text(json.dumps(told_of))
            with pytest.raises(UserError, match="have to be three finite numbers each"):
                CLIPBackbone.load(str(file))


@pytest.mark.parametrize(
    ("width", "layers", "patch", "dim"), [(768, 12, 32, 512), (768, 12, 16, 512), (1024, 24, 14, 768)]
)
def test_openais_own_vits_are_known_by_their_shapes(width: int, layers: int, patch: int, dim: int) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    state = {
        "visual.conv1.weight": empty(width, 3, patch, patch),
        "visual.proj": empty(width, dim),
        "visual.positional_embedding": empty((224 // patch) ** 2 + 1, width),
        **{f"visual.transformer.resblocks.{n}.mlp.c_fc.weight": empty(4 * width, width) for n in range(layers)},
    }
    config, _ = openai_configs(state, "it")
    assert (config["num_attention_heads"], config["hidden_act"]) == (width // 64, "quick_gelu")
    assert (config["image_size"], config["num_hidden_layers"]) == (224, layers)
    with pytest.raises(UserError, match="of none of OpenAI's models"):
        openai_configs(state | {"visual.proj": empty(width, dim + 1)}, "it")


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
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))

    backbone = CLIPBackbone.load(str(file))

    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    expected = CLIPBackbone.from_openai({key: weight.to(dtype).float() for key, weight in state.items()}, **OPENAI)
    with torch.no_grad():
        assert torch.equal(backbone.encode_frames(images), expected.encode_frames(images))
    assert backbone.source == str(file)


@pytest.mark.parametrize("name", ["clip_resnet", "clip_vit"])
def test_the_text_tower_may_be_absent(name: str, golden_tokenizer: Path) -> None:
    golden, state = read_golden(name)
    visual = {key: weight for key, weight in state.items() if key.startswith("visual.")}
    backbone = CLIPBackbone.from_openai(visual, tokenizer=str(golden_tokenizer), **OPENAI)

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
        features = CLIPBackbone.from_openai(state, **OPENAI).encode_frames(golden["image"])
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
            CLIPBackbone.from_openai(changed, **OPENAI)


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
    assert CLIPBackbone.load("somebody/clip").tokenize(["a cat"]).shape == (1, 77)

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
    assert asked == [True, True, True, True, False]


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
        ("preprocessor_config.json", '{"image_std": ["a", "b", "c"]}', "the preprocessing in .* can't be used"),
        ("preprocessor_config.json", '{"image_std": [0, 0, 0]}', r"can't be built: .* image_std \[0\.0, 0"),
        ("preprocessor_config.json", '{"image_std": [1, -1, 1]}', "std above 0"),
        ("preprocessor_config.json", '{"image_mean": [NaN, 0, 0]}', "have to be three finite"),
        ("preprocessor_config.json", '{"image_mean": null}', "the preprocessing in .* can't be used"),
        ("preprocessor_config.json", '{"rescale_factor": 0}', "the preprocessing in .* can't be used"),
        ("preprocessor_config.json", '{"rescale_factor": "x"}', "the preprocessing in .* can't be used"),
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
        weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # as older versions stored
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


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [123.675, 116.28, 103.53], "image_std": [58.4, 57.1, 57.4]},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [0.5] * 3},
    ],
)
def test_pixels_become_what_transformers_makes_of_them(values: dict[str, Any], copied: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    (copied / "preprocessor_config.json").write_text(json.dumps(values))
    backbone = CLIPBackbone.from_pretrained(str(copied))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    processor = CLIPImageProcessorPil(**values, do_resize=False, do_center_crop=False)
    expected = processor(list(images.numpy()), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    torch.testing.assert_close(backbone.normalise(images), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["model_epoch1", "model_ema", "model.old", "model-best", "weights"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_stray_weights_are_no_models(name: str, suffix: str, copied: Path) -> None:
    expected = CLIPBackbone.load(str(copied)).state_dict()
    weights = {key: torch.zeros_like(weight) for key, weight in load_file(copied / "model.safetensors").items()}
    stray = copied / f"{'pytorch_' * (suffix == '.bin')}{name}{suffix}"
    save_file(weights, stray) if suffix == ".safetensors" else torch.save(weights, stray)
    state = CLIPBackbone.load(str(copied)).state_dict()
    assert all(torch.equal(state[key], weight) for key, weight in expected.items())
    (copied / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"has no weights: .*; rename the one to be taken, of {stray.name}"):
        CLIPBackbone.load(str(copied))


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_whole_or_refused(index: bool, suffix: str, copied: Path) -> None:
    def save(weights: State, file: Path) -> None:
        save_file(weights, file) if suffix == ".safetensors" else torch.save(weights, file)

    expected = CLIPBackbone.load(str(copied)).state_dict()
    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    files = [f"{stem}-0000{n}-of-00003{suffix}" for n in (1, 2, 3)]
    for n, file in enumerate(files):
        save(dict(list(weights.items())[n::3]), copied / file)
    save({key: torch.zeros_like(weight) for key, weight in weights.items()}, copied / f"{stem}_ema{suffix}")
    listed = {key: files[n % 3] for n, key in enumerate(weights)}
    if index:
        (copied / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": listed}))
    state = CLIPBackbone.load(str(copied)).state_dict()
    assert all(torch.equal(state[key], weight) for key, weight in expected.items())
    (copied / files[1]).unlink()
    with pytest.raises(UserError, match=f"lacks {files[1]} of its weights"):
        CLIPBackbone.load(str(copied))
    if index:
        for damaged, message in (
            ("{}", "no weight_map"),
            ('{"weight_map": ["a"]}', "no weight_map"),
            ('{"weight_map": {"a": 1}}', "no weight_map"),
            ('{"weight_map": {"a": "../x.safetensors"}}', r"leads out of its folder, to \.\./x"),
            ('{"weight_map": {"a": "/x.safetensors"}}', "leads out of its folder, to /x"),
            ("{", "is damaged"),
        ):
            (copied / f"{stem}{suffix}.index.json").write_text(damaged)
            with pytest.raises(UserError, match=message):
                CLIPBackbone.load(str(copied))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_is_named(name: str, copied: Path) -> None:
    (copied / name).write_text("{}")
    with pytest.raises(UserError, match=f"has an adapter, {name}, which is not applied here: merge it"):
        CLIPBackbone.load(str(copied))
    (copied / "config.json").unlink()  # as peft saves it
    with pytest.raises(UserError, match=f"has an adapter, {name}, which is not applied here: merge it"):
        CLIPBackbone.load(str(copied))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_weights_of_no_floating_type_are_refused(dtype: torch.dtype, copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    save_file({name: weight.to(dtype) for name, weight in weights.items()}, copied / "model.safetensors")
    with pytest.raises(UserError, match=f"is of the type {dtype}, which is no floating one"):
        CLIPBackbone.load(str(copied))


def test_weights_that_a_tower_does_not_have_and_that_are_not_finite_are_named(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    query = "vision_model.encoder.layers.0.self_attn.q_proj"
    for more, message in (
        ({f"{query}.lora_A.weight": torch.ones(2, 64)}, rf"{query}\.lora_A\.weight is unexpected"),
        ({f"{query}.weight": torch.full((64, 64), torch.nan)}, rf"{query}\.weight is not finite"),
        ({"text_projection.extra": torch.ones(1)}, r"text_projection\.extra is unexpected"),
    ):
        save_file(weights | more, copied / "model.safetensors")
        with pytest.raises(UserError, match=message):
            CLIPBackbone.load(str(copied))
    # What lies outside of the towers, and what older versions stored, is no matter.
    save_file(
        weights | {"classifier.weight": torch.ones(1), "logit_scale": torch.ones(1)}, copied / "model.safetensors"
    )
    CLIPBackbone.load(str(copied))


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
        backbone = CLIPBackbone.from_openai(state, tokenizer=str(tokenizer), freeze_batch_norm=False, **OPENAI)
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
    again = CLIPBackbone.from_description(CLIPBackbone.from_openai(state, **OPENAI).description())
    with pytest.raises(UserError, match=r"was saved without its tokenizer.* put .*bpe_simple_vocab_16e6\.txt\.gz"):
        again.tokenize(["a cat"])


@pytest.mark.parametrize(
    ("known", "names"),
    [
        (
            "openai/clip-vit-base-patch16",
            ["ViT-B/16", "ViT-B-16", "vit_b_16", "vitb16", "clip-vit-base-patch16", "ViT-B-16.pt"],
        ),
        ("openai/clip-vit-base-patch32", ["ViT-B/32", "vit-b-32", "OpenAI/CLIP-ViT-B-32", "ViT-B-32-quickgelu"]),
        ("openai/clip-vit-large-patch14", ["ViT-L/14", "ViT-L-14", "vit_large_patch14_clip_224"]),
        ("openai/clip-vit-large-patch14-336", ["ViT-L/14@336px", "ViT-L-14-336", "clip-vit-large-patch14-336"]),
        ("rn50", ["RN50", "ResNet50", "resnet-50"]),
        ("tiny", ["Tiny", "TINY"]),
    ],
)
def test_other_names_of_clip_are_told(known: str, names: list[str]) -> None:
    for name in names:
        with pytest.raises(UserError, match=f"there is no backbone '{re.escape(name)}': give '{known}'"):
            CLIPBackbone.load(name)
        with pytest.raises(UserError, match=f"give '{known}'"):
            CLIPM2DF(backbone=name)


@pytest.mark.parametrize("name", ["RN101", "rn50x4", "RN50x64"])
def test_other_resnets_are_given_as_files(name: str) -> None:
    with pytest.raises(UserError, match=f"rn50 alone is fetched by its name: give the file of {name}'s weights"):
        CLIPBackbone.load(name)
