"""Weights and inputs of the towers whose embeddings are in golden/towers.npz: drawn anew, so that they need no file.

And small tokenizers and models in the layouts of the public ones.
"""

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

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
    vocab_size = save_bytes(folder)
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


def save_bytes(folder: Path) -> int:
    """Save a tokenizer of CLIP's kind that knows bytes alone; its size."""
    return save_tokenizer(folder, ByteLevel.alphabet())


# Small tokenizers by their names: what saves one, and what the text tower's configuration says beside the size.
TOKENIZERS: dict[str, tuple[Callable[[Path], int], dict[str, Any]]] = {
    "gemma": (save_gemma, {"kind": "siglip", "max_position_embeddings": 64}),
    "siglip": (save_siglip, {"kind": "siglip", "max_position_embeddings": 64}),
    "xlm": (save_xlm, {"kind": "metaclip_2", "max_position_embeddings": 77, "eos_token_id": 2}),
}


def save_folder(kind: str, folder: Path, *, image_size: int = 32, own_size: int = 32) -> nn.Module:
    """Save a small model of random weights as its public repositories are.

    Args:
        kind: One of ``test_families.FOLDERS``.
        folder: Where to.
        image_size: Of the images that its preprocessing makes.
        own_size: Of the images that its configuration has, with patches of 8 pixels.

    Returns:
        The model, in evaluation mode.
    """
    import transformers

    folder.mkdir(parents=True)
    tower: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    images: dict[str, Any] = {**tower, "intermediate_size": 48, "image_size": own_size, "patch_size": 8}
    square = {"height": image_size, "width": image_size}
    processor: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    if kind.startswith("dino"):
        del images["intermediate_size"]
        if kind.startswith("dinov2"):
            config: Any = transformers.Dinov2Config(**images, use_swiglu_ffn=kind == "dinov2_swiglu")
            processor |= {"image_processor_type": "BitImageProcessor", "resample": 3, "crop_size": square}
            processor |= {"size": {"shortest_edge": image_size * 8 // 7}}
        else:
            more: dict[str, Any] = {"intermediate_size": 48, "num_register_tokens": 3}
            more |= {"use_gated_mlp": "gated" in kind, "key_bias": "gated" in kind}
            config = transformers.DINOv3ViTConfig(**images, **more)
            processor |= {"image_processor_type": "DINOv3ViTImageProcessor", "resample": 2, "size": square}
    else:
        save = {"clip": save_bytes, "metaclip_2": save_xlm, "siglip": save_siglip, "siglip_2": save_gemma}[kind]
        texts = {**tower, "intermediate_size": 40, "vocab_size": save(folder), "max_position_embeddings": 64}
        if kind.startswith("siglip"):
            config = transformers.SiglipConfig(text_config=texts, vision_config=images)
            processor |= {"image_processor_type": "SiglipImageProcessor", "size": square, "do_center_crop": None}
            processor |= {"resample": 2 if kind == "siglip_2" else 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        else:
            texts["eos_token_id"] = 2 if kind == "metaclip_2" else texts["vocab_size"] - 1
            name = {"clip": "CLIP", "metaclip_2": "MetaClip2"}[kind]
            whole = getattr(transformers, f"{name}Config")
            config = whole(text_config=texts, vision_config=images, projection_dim=24)
            processor |= {"image_processor_type": "CLIPImageProcessor", "crop_size": square, "resample": 3}
            processor |= {"size": {"shortest_edge": image_size}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model: nn.Module = transformers.AutoModel.from_config(config).eval()  # type: ignore[no-untyped-call]
        for parameter in model.parameters():  # so that each of them matters
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)  # type: ignore[operator]
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model
