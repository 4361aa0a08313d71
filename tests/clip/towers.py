"""Weights and inputs of the towers whose embeddings are in golden/towers.npz: drawn anew, so that they need no file.

And small tokenizers and models in the layouts of the public ones.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from clip_m2df.clip.formats import openai_name
from tests.conftest import GOLDEN, save_tokenizer

TEXTS = ("a photo of a person", "the quick brown fox jumps over the lazy dog", "straße, Ελλάς, café: 12345!", "日本語")


def drawn_weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Weights as large as trained ones, so that activations and heads matter; numpy keeps this generator's numbers."""
    generator = np.random.RandomState(seed)
    state = {}
    for name in sorted(shapes):
        values = generator.standard_normal(shapes[name])
        if name.endswith("running_var"):
            values = np.exp(0.2 * values)
        elif len(shapes[name]) < 2:  # of norms the scales, and all biases
            values = 0.1 * values + name.endswith("weight")
        else:
            rows = name in ("visual.proj", "text_projection", "text.text_projection")
            inputs = shapes[name][0] if rows else np.prod(shapes[name][1:])
            values *= (1.0 if len(shapes[name]) == 4 else 1.5) / np.sqrt(inputs) if "embedding" not in name else 0.5
        state[name] = torch.tensor(values, dtype=torch.float32)
    return state


def drawn_inputs(image_size: int, context_length: int, vocab_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two normalised images, and the tokens of three texts, whose end is the largest and which zeros follow."""
    generator = np.random.RandomState(seed)
    images = generator.standard_normal((2, 3, image_size, image_size))
    tokens = np.zeros((3, context_length), dtype=np.int64)
    for row, length in zip(tokens, (3, context_length // 2, context_length), strict=True):
        row[:length] = [vocab_size - 2, *generator.randint(1, vocab_size - 2, length - 2), vocab_size - 1]
    return torch.tensor(images, dtype=torch.float32), torch.tensor(tokens)


def save_open_clip(folder: Path, *, text: bool = True, as_transformers: Path | None = None) -> Path:
    """A small CLIP as OpenCLIP saves it, its configuration and tokenizer beside it.

    Args:
        folder: Where to.
        text: Whether to save the text tower too.
        as_transformers: Where to save the same model in transformers' format.

    Returns:
        The file of weights: images of 32 pixels, 77 tokens, embeddings of 32.
    """
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True)
    vocab_size = save_tokenizer(folder, ByteLevel.alphabet())
    tower: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "hidden_act": "gelu"}
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, "num_attention_heads": 1, "vocab_size": vocab_size, "eos_token_id": vocab_size - 1},
            vision_config={**tower, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
            projection_dim=32,
        )
    )
    if as_transformers is not None:
        model.save_pretrained(as_transformers)
    state: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        named, parts = openai_name(name), [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if not text and not named.startswith("visual."):
            continue
        if "q_proj" in name:
            state[named] = torch.cat([model.state_dict()[part] for part in parts])
        elif "k_proj" not in name and "v_proj" not in name:
            state[named] = weight.T.contiguous() if named in ("visual.proj", "text_projection") else weight
    save_file(state, folder / "open_clip_model.safetensors")
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
    told = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {"heads": 1, "vocab_size": vocab_size}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": told}), encoding="utf-8")
    return folder / "open_clip_model.safetensors"


def save_gemma(folder: Path, texts: Iterable[str] = TEXTS) -> int:
    """Save a tokenizer of merges as the repositories of SigLIP 2 have it; its size."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import GemmaTokenizer

    trained = Tokenizer(models.BPE())
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=len(tokens) + 200, special_tokens=tokens, show_progress=False)
    trained.train_from_iterator((text.replace(" ", "\u2581") for text in texts), trainer)
    model = json.loads(trained.to_str())["model"]
    # As transformers' script that converts SigLIP 2 has its options.
    options: Any = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right", "do_lower_case": True}
    merges: Any = [tuple(merge) for merge in model["merges"]]
    GemmaTokenizer(vocab=model["vocab"], merges=merges, **options).save_pretrained(folder)
    return len(model["vocab"])


def save_siglip(folder: Path) -> int:
    """Save the tokenizer of words with scores that SentencePiece trained for golden/siglip_tokens.npz; its size."""
    with np.load(GOLDEN / "siglip_tokens.npz") as golden:
        text = golden["tokenizer"].tobytes()
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(text)
    special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "SiglipTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return len(json.loads(text)["model"]["vocab"])


def save_xlm(folder: Path) -> int:
    """Save a tokenizer of the same words as the repositories of MetaCLIP 2 have XLM-V's; its size."""
    from transformers import XLMRobertaTokenizer

    save_siglip(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = [(word, 0.0) for word in ("<s>", "<pad>", "</s>", "<unk>")]
    vocab += [(word, score) for word, score in content["model"]["vocab"][3:]] + [("<mask>", 0.0)]
    charsmap: Any = base64.b64decode(content["normalizer"]["precompiled_charsmap"])
    XLMRobertaTokenizer(vocab=vocab, _spm_precompiled_charsmap=charsmap).save_pretrained(folder)
    return len(vocab)


def save_siglip2(folder: Path) -> Path:
    """A small SigLIP 2 of a fixed resolution as its repositories have it: images of 32 pixels, 64 tokens."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    folder.mkdir(parents=True)
    tower: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 4}
    text = {"vocab_size": save_gemma(folder), "max_position_embeddings": 64, "projection_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiglipModel(
            SiglipConfig(text_config=tower | text, vision_config={**tower, "image_size": 32, "patch_size": 8})
        )
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_dinov2(folder: Path) -> Path:
    """A small DINOv2 as its repositories have it: positions for 56 pixels, images of 32 by its preprocessing."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dinov2Model(config).save_pretrained(folder)
    sides: dict[str, Any] = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessor(**sides).save_pretrained(folder)
    return folder
