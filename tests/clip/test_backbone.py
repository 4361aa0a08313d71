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
from clip_m2df.clip.families.clip import MEAN as CLIP_MEAN
from clip_m2df.clip.families.clip import STD as CLIP_STD
from clip_m2df.clip.families.resnet import ModifiedResNet
from clip_m2df.clip.formats import (
    RN50_FILE,
    RN50_REPOSITORY,
    STANDARD_TOKENIZER,
    is_openais,
    openai_configs,
    openai_name,
    openai_state,
    told_options,
)
from clip_m2df.errors import UserError
from tests.clip.towers import drawn_inputs, drawn_weights, save_folder
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
    with pytest.raises(UserError, match=r"has no tokenizer: neither tokenizer\.json.* backbone_options, tokenizer"):
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
        gzip.compress(b"", mtime=0),
        gzip.compress(b"#version: 0.2\n" + b"i n\n" * 60_000, mtime=0),
        gzip.compress(bytes(1 << 26), mtime=0),  # a hundredth of what it unpacks to
        gzip.compress(b"\n" * (1 << 26), mtime=0),
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
    told = r"{} known to be OpenAI's, and don't tell the width of their heads and their activation: put the model's"
    in_memory, of_file = told.format("have the shapes of no model"), told.format("are not")
    with pytest.raises(UserError, match=in_memory):
        CLIPBackbone.from_openai(state)
    with pytest.raises(UserError, match=of_file):
        CLIPBackbone.load(str(file))
    for missing, incomplete in (("activation", {"head_width": head_width}), ("head_width", {"activation": activation})):
        only = f" known to be OpenAI's, and don't tell .* give of backbone_options {missing} "
        with pytest.raises(UserError, match=f"no model{only}"):
            CLIPBackbone.from_openai(state, **incomplete)
        with pytest.raises(UserError, match=f"are not{only}"):
            CLIPBackbone.load(str(file), **incomplete)

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
        ({"vision_cfg": vision | {"head_width": 7}}, r"heads of 7 channels: the width .* of .*clip\.saf"),
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
    with pytest.raises(UserError, match="the shapes of no model known to be OpenAI's"):
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


@pytest.mark.parametrize("name", ["clip_resnet", "clip_vit"])
def test_weights_with_other_axes_are_refused(name: str) -> None:
    state = read_golden(name)[1]
    keys = [key for key in state if not re.search(r"resblocks\.1|layer[234]|\.bn|ln_|\.bias|num_batches|logit", key)]
    assert len(keys) > 12
    for key in [*keys, "transformer.resblocks.0.attn.in_proj_bias"]:
        for weight in (torch.tensor(1.0), torch.ones(0, 0), torch.ones(2, 2, 2, 2, 2)):
            with pytest.raises(UserError):
                CLIPBackbone.from_openai(state | {key: weight}, **OPENAI)
    square = "transformer.resblocks.0.attn.in_proj_weight"  # as large as what it would be split into
    with pytest.raises(UserError, match=f"{square} is .* where "):
        CLIPBackbone.from_openai(state | {square: torch.ones(64, 64)}, **OPENAI)


def test_numbers_of_layers_are_no_larger_than_the_files(state: State) -> None:
    with pytest.raises(UserError, match=r"resblocks\.9{12}\.mlp\.c_fc\.weight is unexpected"):
        CLIPBackbone.from_openai(
            state | {f"visual.transformer.resblocks.{'9' * 12}.mlp.c_fc.weight": torch.ones(1)}, **OPENAI
        )


def test_a_file_in_transformers_layout_says_so(tiny_clip_dir: Path) -> None:
    with pytest.raises(UserError, match=r"visual\.conv1\.weight is missing.*are given by their folder"):
        CLIPBackbone.load(str(tiny_clip_dir / "model.safetensors"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_archive_of_openais_class_gives_the_features_of_its_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    golden, _ = read_golden("openai_archive")
    file = GOLDEN / "openai_archive.pt"  # traced in half precision
    if dtype == torch.float32:
        model = torch.jit.load(str(file)).float()
        file = tmp_path / "full.pt"
        model.save(str(file))
    backbone = CLIPBackbone.load(str(file))
    with torch.no_grad():
        images, texts = backbone.encode_frames(golden["image"]), backbone.encode_text(golden["tokens"])
    torch.testing.assert_close(images, golden["image_features"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(texts, golden["text_features"], rtol=1e-5, atol=1e-5)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


def test_an_archive_of_openais_class_is_openais_whatever_lies_beside_it(tmp_path: Path) -> None:
    golden, _ = read_golden("openai_archive")
    file = Path(shutil.copy(GOLDEN / "openai_archive.pt", tmp_path / "epoch_3.pt"))
    (tmp_path / "open_clip_config.json").write_text('{"vision_cfg": {"head_width": 32}, "text_cfg": {"heads": 4}}')
    backbone = CLIPBackbone.load(str(file), mean=[0, 0, 0], **OPENAI)
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.encode_text(golden["tokens"]), golden["text_features"], rtol=1e-5, atol=1e-5
        )
    assert backbone.interpolation == "bicubic"
    for wrong in ({"activation": "gelu"}, {"head_width": 32}):
        with pytest.raises(UserError, match=r"epoch_3\.pt is OpenAI's, (quick_gelu|64): leave it out"):
            CLIPBackbone.load(str(file), **wrong)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_archive_of_another_class_is_as_any_other_file(tmp_path: Path) -> None:
    class CLIP(nn.Module):  # of this module, not of clip.model
        def __init__(self) -> None:
            super().__init__()
            for key, weight in TOWERS["quick_gelu"]["facts"]["shapes"].items():
                *path, last = key.split(".")
                module: nn.Module = self
                for part in path:
                    if not hasattr(module, part):
                        module.add_module(part, nn.Module())
                    module = module.get_submodule(part)
                module.register_parameter(last, nn.Parameter(torch.ones(weight)))

        def forward(self, x: Tensor) -> Tensor:
            return x

    torch.jit.trace(CLIP(), torch.ones(1)).save(str(tmp_path / "clip.pt"))
    with pytest.raises(UserError, match=r"clip\.pt are not known to be OpenAI's"):
        CLIPBackbone.load(str(tmp_path / "clip.pt"))
    assert CLIPBackbone.load(str(tmp_path / "clip.pt"), **OPENAI).visual_config["num_attention_heads"] == 2


@pytest.mark.parametrize(
    ("program", "openais"),
    [
        ("__torch__.clip.model.CLIP", True),
        ("__torch__.models.clip.model.CLIP", True),
        ("__torch__.multimodal.model.multimodal_transformer.Multimodal", True),  # the published archives
        ("__torch__.open_clip.model.CLIP", False),
        ("__torch__.clip.model.VisionTransformer", False),
        ("__torch__.clip.modelXCLIP", False),
        ("", False),
    ],
)
def test_openais_archives_are_known_by_their_class(program: str, openais: bool) -> None:
    assert is_openais([program, "torch._utils._rebuild_tensor_v2"]) is openais
    assert not is_openais([])


def test_openais_code_is_known_under_any_name(tmp_path: Path) -> None:
    """Whoever traces it may have imported its file as another module; OpenCLIP's early code has the same names."""
    golden, _ = read_golden("openai_archive")
    for module, openais in (("some_reference", True), ("ours.models.vlm", True), ("open_clip.model", False)):
        with zipfile.ZipFile(GOLDEN / "openai_archive.pt") as old, zipfile.ZipFile(tmp_path / "w.pt", "w") as new:
            for name in old.namelist():
                content, code = old.read(name), f"code/__torch__/{module.replace('.', '/')}"
                if name.endswith("/data.pkl"):
                    content = content.replace(b"__torch__.clip.model", f"__torch__.{module}".encode())
                new.writestr(name.replace("code/__torch__/clip/model", code), content)
        options = {} if openais else OPENAI
        if not openais:
            with pytest.raises(UserError, match="are not known to be OpenAI's"):
                CLIPBackbone.load(tmp_path / "w.pt")
        with torch.no_grad():
            texts = CLIPBackbone.load(tmp_path / "w.pt", **options).encode_text(golden["tokens"])
        torch.testing.assert_close(texts, golden["text_features"], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["clip_resnet", "clip_vit"])
def test_a_traced_model_is_read_as_its_state_dict(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    class CLIP(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    golden, state = read_golden(name)
    model = CLIP()
    state = {key: weight.to(dtype) if weight.is_floating_point() else weight for key, weight in state.items()}
    for key, weight in state.items():
        *path, last = key.split(".")
        module: nn.Module = model
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, CLIP())
            module = module.get_submodule(part)
        if weight.is_floating_point() and "running" not in last:
            module.register_parameter(last, nn.Parameter(weight))
        else:
            module.register_buffer(last, weight)
    torch.jit.trace(model, torch.ones(1)).save(str(tmp_path / "clip.pt"))
    backbone = CLIPBackbone.from_openai(str(tmp_path / "clip.pt"), **OPENAI)
    expected = CLIPBackbone.from_openai(state, **OPENAI)
    with torch.no_grad():
        assert torch.equal(backbone.encode_frames(golden["image"]), expected.encode_frames(golden["image"]))
        assert torch.equal(backbone.encode_text(golden["tokens"]), expected.encode_text(golden["tokens"]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_archive_of_another_model_says_what_it_has(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "RN50.pt"))
    with pytest.raises(UserError, match=r"RN50\.pt isn't CLIP in OpenAI's layout: .*; it has bias, weight"):
        CLIPBackbone.load(str(tmp_path / "RN50.pt"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_frozen_archive_says_where_its_weights_are(tmp_path: Path) -> None:
    torch.jit.freeze(torch.jit.trace(nn.Linear(2, 2).eval(), torch.ones(1, 2))).save(str(tmp_path / "RN50.pt"))
    with pytest.raises(UserError, match=r"RN50\.pt has no weights: those of a frozen .* give the .* state_dict"):
        CLIPBackbone.load(str(tmp_path / "RN50.pt"))


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

    for nested in ({"weights": state}, {"state_dict": {"model": state}}, {"state_dict": 3}):
        torch.save(nested, tmp_path / "nested.pt")
        with pytest.raises(UserError, match=r"nested\.pt isn't a plain table of tensors"):
            CLIPBackbone.load(str(tmp_path / "nested.pt"))


# Golden towers of OpenAI's and OpenCLIP's code


def read_towers() -> dict[str, dict[str, Any]]:
    """What scripts/golden_towers.py wrote: by names of models ``facts``, ``image`` and ``text``."""
    towers: dict[str, dict[str, Any]] = {}
    with np.load(GOLDEN / "towers.npz") as file:
        for key in file.files:
            name, kind = key.split("/")
            value = json.loads(file[key].tobytes()) if kind == "facts" else torch.from_numpy(file[key])
            towers.setdefault(name, {})[kind] = value
    return towers


TOWERS = read_towers()


def options_of_config(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "activation": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "head_width": config["vision_cfg"].get("head_width", 64),
    }


@pytest.mark.parametrize("way", ["memory", "options", "training", "beside", "folder"])
@pytest.mark.parametrize("name", TOWERS)
def test_towers_give_the_embeddings_of_openais_and_openclips_code(name: str, way: str, tmp_path: Path) -> None:
    facts = TOWERS[name]["facts"]
    config, state = facts["config"], drawn_weights(facts["shapes"], facts["seed"])
    vision, text = config["vision_cfg"], config["text_cfg"]
    images, tokens = drawn_inputs(vision["image_size"], text["context_length"], text["vocab_size"], facts["seed"])
    options, stored = options_of_config(config), state | {"logit_scale": torch.tensor(4.6)}
    texts = way in ("beside", "folder") or text["width"] // text["heads"] == 64
    if not texts:  # nothing but a configuration tells such heads of a text tower
        stored = {key: weight for key, weight in state.items() if key.startswith("visual.")}
    if way == "memory":
        backbone = CLIPBackbone.from_openai(openai_state(stored, "it"), **options)
    elif way == "options":
        save_file(stored, tmp_path / "clip.safetensors")
        backbone = CLIPBackbone.load(str(tmp_path / "clip.safetensors"), **options)
    elif way == "training":
        wrapped = {f"module._orig_mod.{key}": weight for key, weight in stored.items()}
        optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))]).state_dict()
        training = {"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": optimizer}
        torch.save(training, tmp_path / "epoch_3.pt")
        backbone = CLIPBackbone.load(str(tmp_path / "epoch_3.pt"), **options)
    elif way == "beside":
        torch.save(stored, tmp_path / "clip.pt")
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        backbone = CLIPBackbone.load(str(tmp_path / "clip.pt"))
    else:
        save_file(stored, tmp_path / "open_clip_model.safetensors")
        torch.save({}, tmp_path / "open_clip_pytorch_model.bin")
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        backbone = CLIPBackbone.load(str(tmp_path))

    with torch.no_grad():
        # The patches of a tower are all that it sees: what is left of images of 36 pixels at patches of 8 is not.
        size = backbone.image_size
        embeddings = backbone.encode_frames(images[..., :size, :size])
        torch.testing.assert_close(embeddings, TOWERS[name]["image"], rtol=1e-5, atol=1e-5)
        if texts:
            torch.testing.assert_close(backbone.encode_text(tokens), TOWERS[name]["text"], rtol=1e-5, atol=1e-5)
        if way in ("beside", "folder"):
            assert size == vision["image_size"]
            again = CLIPBackbone.from_description(backbone.description())
            again.load_state_dict(backbone.state_dict())
            assert torch.equal(again.encode_frames(images), embeddings)
            assert torch.equal(again.encode_text(tokens), backbone.encode_text(tokens))
    known = told_options(backbone.description())
    resnet_alone = backbone.visual_config["kind"] == "resnet" and not texts
    assert known["head_width"] == options["head_width"]
    assert known["activation"] == (None if resnet_alone else options["activation"])


@pytest.mark.parametrize("name", TOWERS)
def test_other_heads_and_another_activation_give_other_embeddings(name: str, tmp_path: Path) -> None:
    facts = TOWERS[name]["facts"]
    config = facts["config"]
    state = drawn_weights(facts["shapes"], facts["seed"])
    save_file(state, tmp_path / "open_clip_model.safetensors")
    text, side = config["text_cfg"], config["vision_cfg"]["image_size"]
    images, tokens = drawn_inputs(side, text["context_length"], text["vocab_size"], facts["seed"])
    resnet = isinstance(config["vision_cfg"]["layers"], list)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"quick_gelu": not config.get("quick_gelu")}, "text" if resnet else "image"),
        ({"quick_gelu": not config.get("quick_gelu")}, "text"),
        ({"vision_cfg": config["vision_cfg"] | {"head_width": 16}}, "image"),
        ({"text_cfg": text | {"heads": text["heads"] * 4}}, "text"),
    ]
    for change, tower in changes:
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config | change))
        backbone = CLIPBackbone.load(str(tmp_path))
        with torch.no_grad():
            found = backbone.encode_frames(images) if tower == "image" else backbone.encode_text(tokens)
        assert (found - TOWERS[name][tower]).abs().max() > 0.01


@pytest.fixture
def open_clip_folder(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A folder of OpenCLIP's with a small model, and its configuration."""
    facts = TOWERS["heads_of_80"]["facts"]
    folder = tmp_path / "open_clip"
    folder.mkdir()
    save_file(drawn_weights(facts["shapes"], facts["seed"]), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": facts["config"]}))
    return folder, facts["config"]


OTHER_MODEL = "is another model's"
OF_ANOTHER_KIND = "describes a model of another kind: its {} has {}, unknown here"


@pytest.mark.parametrize(
    ("table", "field", "value", "message"),
    [
        *(("vision_cfg", *case, OTHER_MODEL) for case in (("layers", 3), ("layers", [2, 2]), ("width", 96))),
        *(
            ("vision_cfg", *case, OTHER_MODEL)
            for case in (("patch_size", [8, 4]), ("mlp_ratio", 2.0), ("mlp_ratio", "x"))
        ),
        *(("vision_cfg", "image_size", size, OTHER_MODEL) for size in (40, 31, [32, 40], "x", -32)),
        *(("text_cfg", *case, OTHER_MODEL) for case in (("context_length", 77), ("vocab_size", 49408), ("layers", 1))),
        *(("text_cfg", *case, OTHER_MODEL) for case in (("width", 512), ("mlp_ratio", 5))),
        *(("text_cfg", "heads", n, rf"isn't a multiple of its {n} heads") for n in (5, 33, 95)),
        ("text_cfg", "heads", 0, "text_heads is 0"),
        ("model_cfg", "embed_dim", 64, OTHER_MODEL),
        ("model_cfg", "quick_gelu", "no", "quick_gelu is 'no'"),
        *(
            (table, field, value, OF_ANOTHER_KIND.format(table, field))
            for table, field, value in (
                ("model_cfg", "multimodal_cfg", {"width": 512}),
                ("vision_cfg", "pool_type", "avg"),
                ("vision_cfg", "pool_type", "none"),
                ("vision_cfg", "attentional_pool", True),
                ("vision_cfg", "no_ln_pre", True),
                ("vision_cfg", "ls_init_value", 1e-4),
                ("vision_cfg", "pos_embed_type", "sin_cos_2d"),
                ("vision_cfg", "output_tokens", True),
                ("vision_cfg", "act_kwargs", {"approximate": "tanh"}),
                ("vision_cfg", "norm_kwargs", {"eps": 1e-6}),
                ("vision_cfg", "block_type", "custom"),
                ("vision_cfg", "qk_norm", True),
                ("vision_cfg", "timm_model_name", "vit_base_patch16_siglip_224"),
                ("text_cfg", "pool_type", "last"),
                ("text_cfg", "pool_type", "tok"),
                ("text_cfg", "no_causal_mask", True),
                ("text_cfg", "proj_bias", True),
                ("text_cfg", "proj_type", "none"),
                ("text_cfg", "embed_cls", True),
                ("text_cfg", "hf_model_name", "xlm-roberta-base"),
                ("text_cfg", "hf_tokenizer_name", "bert-base-uncased"),
                ("text_cfg", "tokenizer_kwargs", {"clean": "canonicalize"}),
                ("preprocess_cfg", "color_space", "BGR"),
                ("preprocess_cfg", "mode", "L"),
            )
        ),
        ("preprocess_cfg", "size", 64, r"makes images of 64 pixels, where the tower takes 32"),
        ("preprocess_cfg", "size", [32, 64], r"makes images of \[32, 64\] pixels"),
        ("preprocess_cfg", "resize_mode", "squash", "the resize_mode 'squash'; .* write shortest there"),
        ("preprocess_cfg", "resize_mode", "longest", "the resize_mode 'longest'"),
        ("preprocess_cfg", "interpolation", "nearest", "interpolation is 'nearest'"),
        ("preprocess_cfg", "std", [0, 1, 1], r"open_clip_config\.json: mean is .* and std \[0, 1, 1\]: they have"),
        ("preprocess_cfg", "mean", [float("nan")] * 3, r"open_clip_config\.json: mean is \[nan"),
        # What says what is there anyway, and what changes no embedding.
        ("vision_cfg", "image_size", [32, 32], ""),
        ("vision_cfg", "patch_dropout", 0.5, ""),
        ("vision_cfg", "final_ln_after_pool", True, ""),
        ("vision_cfg", "timm_pool", "avg", ""),
        ("text_cfg", "hf_proj_type", "mlp", ""),
        ("text_cfg", "eos_id", 2, ""),
        ("text_cfg", "no_causal_mask", False, ""),
        ("model_cfg", "init_logit_bias", -10, ""),
        ("preprocess_cfg", "size", [32, 32], ""),
        ("preprocess_cfg", "resize_mode", "shortest", ""),
        ("preprocess_cfg", "mean", None, ""),
    ],
)
def test_each_field_of_openclips_configuration_is_obeyed_or_refused(
    table: str, field: str, value: Any, message: str, open_clip_folder: tuple[Path, dict[str, Any]]
) -> None:
    folder, config = open_clip_folder
    model: dict[str, Any] = json.loads(json.dumps(config))
    preprocessing: dict[str, Any] = {}
    (model if table == "model_cfg" else preprocessing if table == "preprocess_cfg" else model[table])[field] = value
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocessing}))
    if message:
        with pytest.raises(UserError, match=message):
            CLIPBackbone.load(str(folder))
        return
    images, _ = drawn_inputs(32, 16, 90, TOWERS["heads_of_80"]["facts"]["seed"])
    with torch.no_grad():
        embeddings = CLIPBackbone.load(str(folder)).encode_frames(images)
    torch.testing.assert_close(embeddings, TOWERS["heads_of_80"]["image"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "interpolation"),
    [({}, "bicubic"), (None, "bicubic"), ("bicubic", "bicubic"), ("bilinear", "bilinear"), ("random", "bicubic")],
)
def test_openclips_images_are_as_its_configuration_says(
    said: Any, interpolation: str, open_clip_folder: tuple[Path, dict[str, Any]]
) -> None:
    folder, config = open_clip_folder
    images = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.5]} | ({} if said == {} else {"interpolation": said})
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": images}))
    backbone = CLIPBackbone.load(str(folder))
    assert backbone.interpolation == interpolation
    assert backbone.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert backbone.std.flatten().tolist() == pytest.approx([0.2, 0.3, 0.5])


def test_a_folder_in_both_formats_is_read_as_transformers(
    copied: Path, open_clip_folder: tuple[Path, dict[str, Any]]
) -> None:
    expected = CLIPBackbone.load(str(copied)).visual_config
    folder, _ = open_clip_folder
    for file in folder.iterdir():
        shutil.copy(file, copied)
    assert CLIPBackbone.load(str(copied)).visual_config == expected
    # Without transformers' weights, or with a description of another library's, it is OpenCLIP's.
    (copied / "model.safetensors").rename(copied / "weights.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    backbone = CLIPBackbone.load(str(copied))
    assert (backbone.visual_config["num_attention_heads"], backbone.source) == (2, str(copied))
    (copied / "weights.safetensors").rename(copied / "model.safetensors")
    (copied / "config.json").write_text('{"architecture": "vit_base_patch16_clip_224"}')
    assert CLIPBackbone.load(str(copied)).visual_config == backbone.visual_config


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_openclips_models_in_the_cache_need_no_network(
    name: str,
    hub: Callable[[str, Path], None],
    open_clip_folder: tuple[Path, dict[str, Any]],
    tmp_path: Path,
) -> None:
    folder, config = open_clip_folder
    weights = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    save_file(weights, folder / name) if name.endswith("safetensors") else torch.save(weights, folder / name)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    assert save_tokenizer(folder, letters, [f"word{i}" for i in range(35)]) == 90
    hub("somebody/clip", folder)
    backbone = CLIPBackbone.load("somebody/clip")
    assert backbone.tokenize(["a cat"]).shape == (1, config["text_cfg"]["context_length"])
    for prefix in ("hf-hub:", "hf://"):
        with pytest.raises(UserError, match="give 'somebody/clip', which is the same model"):
            CLIPBackbone.load(f"{prefix}somebody/clip")


def meta_state(layers: Any, width: int, patch: int | None, dim: int, side: int, text_width: int) -> State:
    """Weights as large as those of a model of OpenAI's, without memory; those that tell its shapes."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    state = {
        "text_projection": empty(text_width, dim),
        "token_embedding.weight": empty(49408, text_width),
        "positional_embedding": empty(77, text_width),
        **{f"transformer.resblocks.{n}.mlp.c_fc.weight": empty(4 * text_width, text_width) for n in range(12)},
    }
    if patch is None:
        stages = [f"visual.layer{s + 1}.{n}.conv1.weight" for s, count in enumerate(layers) for n in range(count)]
        return state | {
            "visual.attnpool.positional_embedding": empty((side // 32) ** 2 + 1, 32 * width),
            "visual.attnpool.c_proj.weight": empty(dim, 32 * width),
            **{name: empty(width) for name in stages},
        }
    blocks = [f"visual.transformer.resblocks.{n}.mlp.c_fc.weight" for n in range(layers)]
    return state | {
        "visual.conv1.weight": empty(width, 3, patch, patch),
        "visual.proj": empty(width, dim),
        "visual.positional_embedding": empty((side // patch) ** 2 + 1, width),
        **{name: empty(4 * width, width) for name in blocks},
    }


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("ViT-B-32", (12, 768, 32, 512, 224, 512)),
        ("ViT-B-16", (12, 768, 16, 512, 224, 512)),
        ("ViT-L-14", (24, 1024, 14, 768, 224, 768)),
        ("ViT-L-14-336px", (24, 1024, 14, 768, 336, 768)),
        ("RN50", ([3, 4, 6, 3], 64, None, 1024, 224, 512)),
        ("RN101", ([3, 4, 23, 3], 64, None, 512, 224, 512)),
        ("RN50x4", ([4, 6, 10, 6], 80, None, 640, 288, 640)),
        ("RN50x16", ([6, 8, 18, 8], 96, None, 768, 384, 768)),
        ("RN50x64", ([3, 15, 36, 10], 128, None, 1024, 448, 1024)),
    ],
)
def test_openais_own_files_are_known_by_their_name_and_their_shapes(name: str, shapes: Any) -> None:
    state = meta_state(*shapes)
    visual_only = {key: weight for key, weight in state.items() if key.startswith("visual.")}
    for weights in (state, visual_only):
        for file in (f"{name}.pt", f"{name}.safetensors", f"{name.lower()}.bin"):
            with pytest.warns(UserWarning, match=f"it is taken for OpenAI's {name}, whose name and shapes it has"):
                visual, text = openai_configs(weights, "it", stem=Path("folder", file).stem)
            assert visual["image_size"] == shapes[4]
            assert "head_width" not in visual
            if text is not None:
                assert (text["num_attention_heads"], text["hidden_act"]) == (shapes[5] // 64, "quick_gelu")
            if shapes[2] is not None:
                assert (visual["num_attention_heads"], visual["hidden_act"]) == (shapes[1] // 64, "quick_gelu")
    layers, width, patch, dim, side, text_width = shapes
    others = [
        (f"{name}-laion2b.pt", state),
        ("", state),  # an archive of another class
        ("open_clip_pytorch_model.bin", state),
        ("ViT-B-32.pt" if name != "ViT-B-32" else "ViT-B-16.pt", state),
        (f"{name}.pt", meta_state(layers, width, patch, dim + 64, side, text_width)),
        (f"{name}.pt", meta_state(layers, width, patch, dim, side + (patch or 32), text_width)),
        (f"{name}.pt", meta_state(layers, width, patch, dim, side, text_width + 64)),
        (f"{name}.pt", state | {"positional_embedding": torch.empty(64, text_width, device="meta")}),
    ]
    for file, weights in others:
        with pytest.raises(UserError, match="are not known to be OpenAI's"):
            openai_configs(weights, "it", stem=Path(file).stem)


def test_a_file_of_openais_is_said_to_be_taken_for_it(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = ModifiedResNet(layers=(3, 4, 6, 3), width=64, dim=1024, image_size=224).state_dict()
    one = torch.tensor(1.0)  # in the file each weight is this number, seen in the weight's shape
    torch.save({f"visual.{key}": one.expand(weight.shape) for key, weight in shapes.items()}, tmp_path / "RN50.pt")
    with pytest.warns(UserWarning, match=r"RN50\.pt is taken for OpenAI's RN50, whose name and shapes it has"):
        CLIPBackbone.load(str(tmp_path / "RN50.pt"))
    (tmp_path / "RN50.pt").rename(tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"clip\.pt are not known to be OpenAI's"):
        CLIPBackbone.load(str(tmp_path / "clip.pt"))


def test_weights_of_two_models_in_one_file_are_refused(state: State, tmp_path: Path) -> None:
    torch.save({"state_dict": state | {f"module.{key}": weight for key, weight in state.items()}}, tmp_path / "two.pt")
    with pytest.raises(UserError, match=r"two\.pt has several models' weights"):
        CLIPBackbone.load(str(tmp_path / "two.pt"), **OPENAI)


# What is said of weights


def test_backbone_options_win_over_what_lies_beside_the_weights(
    open_clip_folder: tuple[Path, dict[str, Any]], golden_tokenizer: Path
) -> None:
    folder, _ = open_clip_folder
    told = CLIPBackbone.load(str(folder), activation="quick_gelu", head_width=40, mean=[0, 0, 0], std=(1, 0.5, 1))
    assert (told.visual_config["hidden_act"], told.visual_config["num_attention_heads"]) == ("quick_gelu", 4)
    assert told.text_config is not None
    assert (told.text_config["hidden_act"], told.text_config["num_attention_heads"]) == ("quick_gelu", 6)
    assert told.mean.flatten().tolist() == [0, 0, 0]
    assert told.std.flatten().tolist() == [1, 0.5, 1]
    plain = CLIPBackbone.load(str(folder), activation=None, mean=None)
    assert (plain.visual_config["hidden_act"], plain.visual_config["num_attention_heads"]) == ("gelu", 2)
    torch.testing.assert_close(plain.mean.flatten(), torch.tensor(CLIP_MEAN))
    with pytest.raises(UserError, match="has 120 tokens and the text tower 90"):
        CLIPBackbone.load(str(folder), tokenizer=str(golden_tokenizer))


def test_tokenizer_mean_and_std_of_a_folder_in_transformers_format(copied: Path, tmp_path: Path) -> None:
    expected = CLIPBackbone.load(str(copied)).tokenize(["a cat"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).rename(elsewhere / name)
    backbone = CLIPBackbone.load(str(copied), tokenizer=str(elsewhere), mean=[0, 0, 0], std=[1, 1, 1])
    assert torch.equal(backbone.tokenize(["a cat"]), expected)
    images = torch.rand(3, 4, 4)
    assert torch.equal(backbone.normalise(images), images)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tiny", {"activations": "gelu"}, "no 'activations'; there are activation, head_width, tokenizer, mean, std"),
        ("tiny", {"activation": "gelu"}, r"activation is 'gelu', but the config\.json of .* leave it out"),
        ("tiny", {"head_width": 16}, r"head_width is 16, but the config\.json of"),
        ("rn50", {"activation": "gelu"}, "activation is 'gelu', but rn50 is OpenAI's, quick_gelu: leave it out"),
        ("rn50", {"head_width": 80}, "head_width is 80, but rn50 is OpenAI's, 64"),
        ("FILE", {"activation": "relu", "head_width": 64}, "activation is 'relu'; it must be gelu or quick_gelu"),
        ("FILE", {"activation": 3, "head_width": 64}, "activation is 3; it must be"),
        ("FILE", {"activation": "gelu", "head_width": True}, "head_width is True; it must be a whole number"),
        ("FILE", {"activation": "gelu", "head_width": "64"}, "head_width is '64'; it must be a whole number"),
        ("FILE", {"activation": "gelu", "head_width": 0}, "head_width is 0; it must be a whole number"),
        ("FILE", {"activation": "gelu", "head_width": 48}, "heads of 48 channels: the width 64"),
        *(
            ("FILE", {option: value}, rf"backbone_options\.{option} is .*; it must be three finite numbers")
            for option in ("mean", "std")
            for value in (0.5, "abc", [0.5, 0.5], ["a", "b", "c"], [0.5] * 4, [1, 1, float("inf")], {"r": 1})
        ),
        ("FILE", {"std": [1, 0, 1]}, "three finite numbers, above 0"),
        ("FILE", {"tokenizer": 3}, "tokenizer is 3; it must be a file or a folder"),
        *(
            ("tiny", {"image_size": value}, r"backbone_options\.image_size is .*; it must be a whole number of pixels")
            for value in (0, -8, 40.0, "40", True, 5000, [40, 40])
        ),
        ("tiny", {"image_size": 44}, "image_size is 44, no multiple of the 8 pixels of .* patches: give 40 or 48"),
        ("FILE", {**OPENAI, "image_size": 7}, "image_size is 7, no multiple of the 8 pixels of .* patches: give 8"),
        *(
            ("tiny", {"dtype": value}, r"backbone_options\.dtype is .*; it must be one of float32, bfloat16, float16")
            for value in ("half", "float64", 16, ["float16"])
        ),
        ("VISUAL", {**OPENAI, "tokenizer": "x"}, r"backbone_options\.tokenizer: the weights of .* have no text tower"),
    ],
)
def test_backbone_options_that_cannot_be_are_refused(
    name: str, options: dict[str, Any], message: str, state: State, tmp_path: Path
) -> None:
    if name.isupper():
        visual = {key: weight for key, weight in state.items() if key.startswith("visual.")}
        name = str(tmp_path / "clip.safetensors")
        save_file(visual if "tokenizer" in options and len(options) > 1 else state, name)
    with pytest.raises(UserError, match=message):
        CLIPBackbone.load(name, **options)
    with pytest.raises(UserError, match=message):
        CLIPM2DF(backbone=name, backbone_options=options)


@pytest.mark.parametrize("options", [[("mean", [0, 0, 0])], "gelu", {1: 2}])
def test_backbone_options_are_a_table(options: Any) -> None:
    with pytest.raises(UserError, match=r"backbone_options (is .* a table of options|has no 1; there are)"):
        CLIPM2DF(backbone="tiny", backbone_options=options)


# Sizes and types


def test_the_positions_of_a_resnet_are_interpolated() -> None:
    golden, state = read_golden("clip_resnet")
    own, name = golden["image"].shape[-1] // 32, "attnpool.positional_embedding"
    with pytest.warns(UserWarning, match="interpolated"):
        larger = CLIPBackbone.from_openai(state, image_size=96, **OPENAI)
    positions = state[f"visual.{name}"].double()
    patches, grid = positions[1:].view(own, own, -1), 3

    def weight(x: float) -> float:  # Keys' cubic, of -3/4
        x = abs(x)
        return 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    def at(i: int) -> list[tuple[int, float]]:
        centre = (i + 0.5) * own / grid - 0.5
        near = range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3)
        return [(min(max(k, 0), own - 1), weight(centre - k)) for k in near]

    expected = torch.stack(
        [positions[0]]
        + [
            torch.stack([patches[k, m] * a * b for k, a in at(i) for m, b in at(j)]).sum(0)
            for i in range(grid)
            for j in range(grid)
        ]
    )
    torch.testing.assert_close(larger.visual.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert larger.encode_frames(torch.randn(1, 3, 96, 96)).shape == (1, 32)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_held_in_what_is_asked_for(dtype: str, stored: torch.dtype, copied: Path) -> None:
    weights = {name: weight.to(stored) for name, weight in load_file(copied / "model.safetensors").items()}
    save_file(weights, copied / "model.safetensors")
    backbone = CLIPBackbone.load(copied, dtype=dtype)
    for key, weight in backbone.state_dict().items():
        assert torch.equal(weight, weights[backbone.family.file_name(key)].to(getattr(torch, dtype)))
    plain = CLIPBackbone.load(copied).eval()
    assert {weight.dtype for weight in plain.parameters()} == {torch.float32}
    images, tokens = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), plain.tokenize(["a cat"])
    again = CLIPBackbone.from_description(backbone.description()).eval()
    again.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        found = again.encode_frames(again.normalise(images))
        assert found.dtype == again.encode_text(tokens).dtype == getattr(torch, dtype)
        torch.testing.assert_close(found.float(), plain.encode_frames(plain.normalise(images)), rtol=0.05, atol=0.05)
        for other in (torch.bfloat16, torch.float16):  # autocast of neither makes another type of it
            with torch.autocast("cpu", other, enabled=dtype != "float32"):
                assert torch.equal(again.encode_frames(again.normalise(images)), found)
    assert again.description() == backbone.description()


def test_mean_and_std_are_not_rounded(copied: Path) -> None:
    plain = CLIPBackbone.load(copied)
    for dtype in (torch.bfloat16, torch.float16):
        half = CLIPBackbone.load(copied).to(dtype)
        assert next(half.visual.parameters()).dtype == dtype
        assert half.description() == plain.description()


# Names and folders


def test_paths_are_as_good_as_their_names(state: State, copied: Path, golden_tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "clip.pt"
    torch.save(state, file)
    for backbone in (
        CLIPBackbone.load(file, tokenizer=golden_tokenizer, **OPENAI),
        CLIPBackbone.from_openai(file, tokenizer=golden_tokenizer, **OPENAI),
    ):
        assert backbone.source == str(file)
        assert torch.equal(
            backbone.state_dict()["visual.model.vision_model.embeddings.class_embedding"],
            state["visual.class_embedding"],
        )
        assert backbone.tokenize(["a"]).shape[0] == 1
    folder: Any = copied
    assert CLIPM2DF(folder).model.backbone.source == str(copied)
    for backbone in (
        CLIPBackbone.load(copied),
        CLIPBackbone.from_pretrained(copied, tokenizer=copied),
    ):
        assert backbone.source == str(copied)


@pytest.mark.parametrize("name", ["./clip", "/a/b", "a/b/c", "weights.pt", "..\\clip", "~/clip-of-nobody"])
def test_what_does_not_exist_is_named(name: str) -> None:
    for load in (CLIPBackbone.load, CLIPBackbone.from_openai):
        with pytest.raises(UserError, match="no such file or folder"):
            load(name)


def test_a_file_of_openais_that_is_not_here_is_no_hub_name() -> None:
    message = r"'ViT-B-16\.pt': no such file or folder; .* start at .*'openai/clip-vit-base-patch16'"
    with pytest.raises(UserError, match=message):
        CLIPBackbone.load("ViT-B-16.pt")
    with pytest.raises(UserError, match=message):
        CLIPM2DF(backbone="ViT-B-16.pt")


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


def test_an_encoder_of_images_in_the_cache_needs_no_tokenizer(
    hub: Callable[[str, Path], None], copied: Path, tmp_path: Path
) -> None:
    save_folder("dinov2", tmp_path / "dinov2")
    hub("somebody/small-dinov2", tmp_path / "dinov2")
    assert CLIPBackbone.load("somebody/small-dinov2").text is None
    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer_config.json").unlink(missing_ok=True)
    hub("somebody/small-clip", copied)
    with pytest.raises(UserError, match=r"weights or the tokenizer of 'somebody/small-clip' are not on this machine"):
        CLIPBackbone.load("somebody/small-clip")


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
    assert asked == [True] * 7 + [False]


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
    refused(r"isn't a model in transformers' format: there is no config\.json in it, nor OpenCLIP's open_clip_config")
    (copied / "ViT-B-16.pt").write_bytes(b"")
    refused(r"give the file of weights in it, ViT-B-16\.pt")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{"model_type": "bert"}', "of type 'bert'"),
        ("config.json", '{"model_type": "clip", "vision_config": "wide"}', "can't be used"),
        ("config.json", "{", r"config\.json is damaged"),
        ("config.json", "[]", r"config\.json is damaged: a table"),
        ("config.json", "[" * 100_000, r"config\.json is damaged"),
        ("preprocessor_config.json", '{"image_mean": 3}', "the preprocessing in .* can't be used"),
        ("preprocessor_config.json", '{"image_mean": [1, 2]}', r"_config\.json can't be used: image_mean is \[1, 2\]"),
        ("preprocessor_config.json", '{"image_mean": [NaN, 0, 0]}', r"_config\.json can't be used: image_mean is"),
        ("preprocessor_config.json", '{"rescale_factor": -1}', "rescale_factor is -1, and no number above 0"),
        ("preprocessor_config.json", '{"image_std": ["a", "b", "c"]}', "the preprocessing in .* can't be used"),
        ("preprocessor_config.json", '{"image_std": [0, 0, 0]}', r"can't be used: .* image_std \[0, 0"),
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
        resnet = change.get("visual_config", {}).get("kind") == "resnet"  # which has none of the other's fields
        with pytest.raises(UserError, match="which no backbone saves" if resnet else "the towers of .* can't be built"):
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


SIDE, SQUARE = {"shortest_edge": 32}, {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("values", "taken"),
    [
        # As transformers makes of it what is done to a video's frames here.
        ({}, True),
        ({"size": 32, "crop_size": 32}, True),
        ({"size": SIDE, "crop_size": SQUARE}, True),
        ({"size": SIDE | {"longest_edge": None}, "crop_size": None, "do_resize": None}, True),
        ({"do_convert_rgb": False, "do_pad": False, "offset": None, "return_tensors": None}, True),
        ({"resample": 2}, True),
        ({"resample": 3}, True),
        ({"image_processor_type": "CLIPImageProcessorFast", "processor_class": "CLIPProcessor"}, True),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "_valid_processor_keys": ["images"]}, True),
        # Something else.
        ({"size": SQUARE}, False),
        ({"size": 32, "default_to_square": True}, False),
        ({"size": 36}, False),
        ({"size": {"shortest_edge": 36}}, False),
        ({"size": {"shortest_edge": 32, "longest_edge": 40}}, False),
        ({"size": {"height": 32, "width": 48}}, False),
        ({"size": "32"}, False),
        ({"size": []}, False),
        ({"crop_size": 24}, False),
        ({"crop_size": {"height": 32, "width": 24}}, False),
        ({"crop_size": {"height": 32}}, False),
        ({"do_resize": False}, False),
        ({"do_center_crop": False}, False),
        ({"do_normalize": "false"}, False),
        ({"do_rescale": 0}, False),
        ({"do_convert_rgb": "no"}, False),
        ({"do_pad": True, "pad_size": SQUARE}, False),
        ({"do_flip_channel_order": True}, False),
        ({"offset": True}, False),
        ({"crop_pct": 0.9}, False),
        *(({"resample": value}, False) for value in (0, 1, 4, 5, True, 3.0, "bicubic", [3])),
        *(({"image_processor_type": value}, False) for value in ("ViTImageProcessor", "os.system", 3, ["x"])),
    ],
    ids=str,
)
def test_a_preprocessing_is_obeyed_or_refused(values: dict[str, Any], taken: bool, copied: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    for name, content in (
        ("preprocessor_config.json", values),
        ("preprocessor_config.json", {"image_processor": values}),
        ("processor_config.json", {"image_processor": values, "processor_class": "CLIPProcessor"}),
    ):
        (copied / "preprocessor_config.json").write_text("{}")
        (copied / name).write_text(json.dumps(content))
        if not taken:
            with pytest.raises(UserError, match=rf"the preprocessing in .*{name} can't be used: .*; mend or remove"):
                CLIPBackbone.from_pretrained(str(copied))
            continue
        backbone = CLIPBackbone.from_pretrained(str(copied))
        assert backbone.interpolation == {2: "bilinear", 3: "bicubic"}[values.get("resample", 3)]
        image = torch.randint(0, 256, (3, 50, 90), dtype=torch.uint8).numpy()
        resample = 2 if backbone.interpolation == "bilinear" else 3
        right = CLIPImageProcessorPil(size=SIDE, crop_size=SQUARE, resample=resample)
        theirs = CLIPImageProcessorPil(**{"size": 32, "crop_size": 32, **{k: v for k, v in values.items() if v}})
        as_told, as_done = (processor(image, return_tensors="pt")["pixel_values"] for processor in (theirs, right))
        assert torch.equal(as_told, as_done)


def test_the_preprocessing_is_that_which_transformers_takes(copied: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    flat, nested = copied / "preprocessor_config.json", copied / "processor_config.json"
    for own, of_processor in (({"resample": 2}, {}), ({"resample": 2}, {"image_processor": {"resample": 3}})):
        flat.write_text(json.dumps(own))
        nested.write_text(json.dumps({"processor_class": "CLIPProcessor", "image_mean": 7} | of_processor))
        expected = CLIPImageProcessorPil.from_pretrained(copied).resample
        assert CLIPBackbone.load(str(copied)).interpolation == {2: "bilinear", 3: "bicubic"}[expected]
    nested.write_text(json.dumps({"video_processor": {"size": 32}}))
    with pytest.raises(UserError, match=r"processor_config\.json can't be used: it has a video_processor"):
        CLIPBackbone.load(str(copied))
    flat.unlink()
    nested.unlink()
    assert CLIPBackbone.load(str(copied)).interpolation == "bicubic"  # as CLIP's mean and std


def test_the_interpolation_is_kept_in_a_description(tiny_clip_dir: Path) -> None:
    description = CLIPBackbone.load(str(tiny_clip_dir)).description()
    for interpolation in ("bilinear", "bicubic"):
        again = CLIPBackbone.from_description(description | {"interpolation": interpolation})
        assert again.description() == description | {"interpolation": interpolation}
    del description["interpolation"]  # as earlier versions saved
    assert CLIPBackbone.from_description(description).interpolation == "bilinear"
    for wrong in ("lanczos", 3, None, ["bicubic"]):
        with pytest.raises(UserError, match=r"interpolation is .*: give bilinear or bicubic"):
            CLIPBackbone.from_description(description | {"interpolation": wrong})
    assert CLIPBackbone.load("tiny").interpolation == "bilinear"


def save(weights: State, file: Path) -> None:
    save_file(weights, file) if file.suffix == ".safetensors" else torch.save(weights, file)


@pytest.mark.parametrize("name", ["model_epoch1", "model_ema", "model.old", "model-best", "weights"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_stray_weights_are_no_models(name: str, suffix: str, copied: Path) -> None:
    expected = CLIPBackbone.load(str(copied)).state_dict()
    weights = {key: torch.zeros_like(weight) for key, weight in load_file(copied / "model.safetensors").items()}
    stray = copied / f"{'pytorch_' * (suffix == '.bin')}{name}{suffix}"
    save(weights, stray)
    state = CLIPBackbone.load(str(copied)).state_dict()
    assert all(torch.equal(state[key], weight) for key, weight in expected.items())
    (copied / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"has no weights: .*; rename the one to be taken, of {stray.name}"):
        CLIPBackbone.load(str(copied))


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_whole_or_refused(index: bool, suffix: str, copied: Path) -> None:
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


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_of_two_models_are_not_mixed(suffix: str, copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    files = [f"{stem}-0000{n}-of-00002{suffix}" for n in (1, 2)]
    halves = [dict(list(weights.items())[n::2]) for n in (0, 1)]
    first, second = (next(iter(half)) for half in halves)
    index = copied / f"{stem}{suffix}.index.json"
    listed = {key: file for half, file in zip(halves, files, strict=True) for key in half}
    twice = {first: torch.zeros_like(weights[first])}
    for part, named, message in (
        (halves[1] | twice, listed, rf"don't agree on {first}: fetch"),  # a weight in both
        (halves[1] | twice, None, rf"{files[1]} and the others don't agree on {first}: fetch"),
        (halves[1] | {"x": torch.ones(1)}, listed, rf"{files[1]} and {index.name} don't agree on x: fetch"),
        (halves[1], listed | {"x": files[1]}, rf"{files[1]} and {index.name} don't agree on x: fetch"),
        (halves[1], listed | {first: files[1]}, rf"don't agree on {first}: fetch"),
        (halves[1], {key: file for key, file in listed.items() if key != second}, rf"don't agree on {second}: fetch"),
    ):
        save(halves[0], copied / files[0])
        save(part, copied / files[1])
        index.unlink(missing_ok=True)
        if named is not None:
            index.write_text(json.dumps({"weight_map": named}))
        with pytest.raises(UserError, match=message):
            CLIPBackbone.load(str(copied))


@pytest.mark.parametrize(
    "name",
    ["adapter_model.bin", "pytorch_lora_weights.safetensors", "adapter_other.safetensors"],
)
def test_an_adapter_beside_the_weights_is_named(name: str, copied: Path) -> None:
    (copied / name).write_text("{}")
    with pytest.raises(UserError, match=f"has an adapter, {name}, which is not applied here: merge it"):
        CLIPBackbone.load(str(copied))
    (copied / "config.json").unlink()  # as peft saves it
    with pytest.raises(UserError, match=f"has an adapter, {name}, which is not applied here: merge it"):
        CLIPBackbone.load(str(copied))


def test_a_file_with_lora_within_a_word_is_no_adapter(copied: Path) -> None:
    for name in ("exploration.safetensors", "florals.bin", "lora.txt"):
        (copied / name).write_text("{}")
    assert CLIPBackbone.load(str(copied)).text is not None
    for name in ("LoRA.safetensors", "my-lora2.pt", "lora_r8.bin"):
        (copied / name).write_text("{}")
        with pytest.raises(UserError, match=f"has an adapter, {name}"):
            CLIPBackbone.load(str(copied))
        (copied / name).unlink()


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
        (
            {f"{query}.lora_A.weight": torch.ones(2, 64)},
            rf"has the weights of an adapter, {query}\.lora_A\.weight, which is not applied",
        ),
        ({f"{query}.weight": torch.full((64, 64), torch.nan)}, rf"{query}\.weight is not finite"),
        ({"text_projection.extra": torch.ones(1)}, r"text_projection\.extra is unexpected"),
    ):
        save_file(weights | more, copied / "model.safetensors")
        with pytest.raises(UserError, match=message):
            CLIPBackbone.load(str(copied))
    for name in (
        *(
            "base_model.model.vision_model.layer.lora_A.default.weight",
            "vision_model.lora_embedding_B",
            "x.lora_magnitude",
        ),
        *(f"{query}.base_layer.weight", f"{query}.ia3_l", "x.hada_w1_a", "x.lokr_w2", "x.oft_R", "adapter.down.weight"),
        *("classifier.modules_to_save.weight", "x.original_module.weight", "visual_projection.lora_B.weight"),
    ):
        save_file(weights | {name: torch.ones(2)}, copied / "model.safetensors")
        with pytest.raises(UserError, match=f"has the weights of an adapter, {re.escape(name)}, which is not applied"):
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
            ["ViT-B/16", "ViT-B-16", "vit_b_16", "vitb16", "clip-vit-base-patch16"],
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
