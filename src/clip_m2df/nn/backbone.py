"""CLIP's two towers: transformers' for ViT and text, our own for OpenAI's modified ResNet.

transformers and the hub's client are imported where they are used, because they take seconds and a ResNet without text
needs neither.
"""

import contextlib
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from clip_m2df.archive import check_archive
from clip_m2df.errors import UserError, some
from clip_m2df.nn.resnet import Bottleneck, ModifiedResNet

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What CLIP was trained with; a folder in transformers' format may say otherwise.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

TINY_CLIP = Path(__file__).parent.parent / "assets" / "tiny_clip"
RN50_REPOSITORY, RN50_FILE = "timm/resnet50_clip.openai", "open_clip_model.safetensors"
# All of OpenAI's releases share one vocabulary of 49,408 tokens; this is the smallest repository that has it.
STANDARD_TOKENIZER = "openai/clip-vit-base-patch32"

_WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")


class CLIPBackbone(nn.Module):
    """CLIP's towers with all that goes with them: tokenizer, image size, mean and std.

    Made by ``load``, ``from_pretrained``, ``from_openai`` or ``from_description``. Images and texts become projected
    embeddings of one width; neither is L2-normalised.

    Args:
        visual_config: ``{"kind": "resnet", "layers", "width", "dim", "image_size"}``, or ``{"kind": "vit", ...}`` with
            the values of transformers' ``CLIPVisionConfig``.
        text_config: The values of transformers' ``CLIPTextConfig``; None leaves the text tower out.
        tokenizer: The text of a ``tokenizer.json`` that pads and truncates; None if there is none yet.
        mean: What ``normalise`` subtracts, a number a channel.
        std: What it divides by.
        source: Where the weights came from, for messages and the record.
        freeze_batch_norm: Keep batch norm in evaluation mode whatever ``train()`` says. Change the attribute and call
            ``train()`` to let it move.

    Attributes:
        visual: Normalised images ``(n, 3, image_size, image_size)`` to embeddings ``(n, dim)``.
        text: Tokens ``(n, length)`` to embeddings ``(n, dim)``, or None.
        dim: Width of the embeddings.
        image_size: Height and width of the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        visual_config: Mapping[str, Any],
        text_config: Mapping[str, Any] | None = None,
        *,
        tokenizer: str | None = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        source: str = "",
        freeze_batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.visual_config = dict(visual_config)
        self.text_config = None if text_config is None else dict(text_config)
        self.visual = _visual_tower(self.visual_config)
        self.text = None if self.text_config is None else _text_tower(self.text_config)
        self.dim = int(self.visual_config["dim" if self.visual_config["kind"] == "resnet" else "projection_dim"])
        self.image_size = int(self.visual_config["image_size"])
        self.source = source
        self.freeze_batch_norm = freeze_batch_norm

        self._tokenizer = None if tokenizer is None else _tokenizer_from_json(tokenizer)
        self._tokenizer_repository: str | None = None  # where to fetch it from once a text has to be read

        # Not in the state dict: they belong to the description, and weights from elsewhere don't have them.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.train()

    # Making one

    @classmethod
    def load(cls, name: str, *, freeze_batch_norm: bool = True) -> Self:
        """Load the backbone that the option ``backbone`` names.

        Args:
            name: ``tiny`` (the one in this package, for tests and demonstrations), ``rn50`` (OpenAI's ResNet-50, from
                the hub), a folder in transformers' format, a file of weights in OpenAI's layout (``.safetensors``,
                ``.pt``, ``.bin``), or the hub's name of a ViT in transformers' format, such as
                ``openai/clip-vit-base-patch16``.
            freeze_batch_norm: Keep batch norm in evaluation mode whatever ``train()`` says.

        Raises:
            UserError: There is no such thing, it can't be fetched, or it isn't CLIP.
        """
        if name == "tiny":
            backbone = cls.from_pretrained(str(TINY_CLIP))
        elif name == "rn50":
            backbone = cls.from_openai(str(_from_hub(RN50_REPOSITORY, [[RN50_FILE]]) / RN50_FILE))
        elif Path(name).expanduser().is_file():
            backbone = cls.from_openai(name)
        else:
            backbone = cls.from_pretrained(name)
        backbone.source = name
        backbone.freeze_batch_norm = freeze_batch_norm
        backbone.train()
        return backbone

    @classmethod
    def from_pretrained(cls, name_or_dir: str) -> Self:
        """Load a ViT CLIP in transformers' format.

        Args:
            name_or_dir: A folder with ``config.json``, weights and a tokenizer, or a model's name on the hub. Mean and
                std are those of its ``preprocessor_config.json``; without one, CLIP's.

        Raises:
            UserError: The folder doesn't exist, the model can't be fetched, isn't CLIP, or is damaged.
        """
        folder = Path(name_or_dir).expanduser()
        if not folder.is_dir():
            if _looks_like_a_path(name_or_dir):
                raise UserError(f"backbone {name_or_dir!r}: no such file or folder")
            folder = _from_hub(name_or_dir, _MODEL_FILES)
        config, state = _read_transformers_folder(folder, name_or_dir)
        mean, std = _read_preprocessing(folder)

        backbone = cls._build(
            {
                "visual_config": {"kind": "vit", **config["vision_config"]},
                "text_config": config["text_config"],
                "mean": mean,
                "std": std,
                "source": name_or_dir,
            }
        )
        names = {key: _transformers_name(key) for key in backbone.state_dict()}
        # What else such a file may hold, its logit scale and older versions' position numbers, isn't needed.
        _load(backbone, names, state, name_or_dir, strict=False)
        backbone._use(_read_tokenizer(folder), name_or_dir)
        return backbone

    @classmethod
    def from_openai(
        cls,
        state_dict_or_file: Mapping[str, Tensor] | str,
        *,
        tokenizer: str | None = None,
        freeze_batch_norm: bool = True,
    ) -> Self:
        """Load weights in OpenAI's own layout, with a ViT or a modified ResNet; the shapes tell the architecture.

        Args:
            state_dict_or_file: The weights, of any floating type, or a ``.safetensors``, ``.pt`` or ``.bin`` file of
                them. Those of the text tower may be absent; ``text`` is then None.
            tokenizer: A folder with the tokenizer; by default the one that the file is in, if it has any, and else
                CLIP's standard one, which is fetched from the hub when a text has to be read.
            freeze_batch_norm: Keep batch norm in evaluation mode whatever ``train()`` says.

        Raises:
            UserError: The file doesn't exist, can't be read, is a TorchScript archive, or has another layout; or the
                tokenizer isn't the text tower's.
        """
        if isinstance(state_dict_or_file, str):
            file = Path(state_dict_or_file).expanduser()
            source, state = state_dict_or_file, read_weights(file)
            if tokenizer is None and _has_tokenizer(file.parent):
                tokenizer = str(file.parent)
        else:
            source, state = "a state dict", dict(state_dict_or_file)
        for constant in ("input_resolution", "context_length", "vocab_size", "logit_scale"):
            state.pop(constant, None)

        try:
            visual_config = _openai_visual_config(state)
            text_config = None
            if any(not key.startswith("visual.") for key in state):
                text_config = _openai_text_config(state)
        except KeyError as error:
            raise UserError(
                f"{source} isn't CLIP in OpenAI's layout: {error.args[0]} is missing; "
                f"it has {some(sorted(state))}. Weights in transformers' format are given by their folder."
            ) from error

        backbone = cls(visual_config, text_config, source=source, freeze_batch_norm=freeze_batch_norm)
        _load(backbone, _openai_names(backbone), state, source)
        if tokenizer is None:
            backbone._tokenizer_repository = STANDARD_TOKENIZER
        elif backbone.text is not None:
            backbone._use(_read_tokenizer(Path(tokenizer).expanduser()), tokenizer)
        return backbone

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        """Build what ``description`` described, from nothing but it; the weights come with a state dict.

        Raises:
            UserError: It is not what ``description`` makes; or its values make no towers.
        """
        source = description.get("source")
        for name, fields in (("visual_config", _VISUAL_FIELDS), ("text_config", _TEXT_FIELDS)):
            # transformers' configurations take many more, down to the address of code to fetch and run.
            config = description.get(name)
            if isinstance(config, Mapping) and (unknown := [field for field in config if field not in fields]):
                raise UserError(f"the {name} of {source!r} has {some(map(repr, unknown))}, which no backbone saves")
        return cls._build(description)

    @classmethod
    def _build(cls, description: Mapping[str, Any]) -> Self:
        try:
            return cls(**description)
        except UserError:
            raise
        except Exception as error:  # that values make no tower, torch and transformers say in many ways
            raise UserError(f"the towers of {description.get('source')!r} can't be built: {error}") from error

    def description(self) -> dict[str, Any]:
        """All but the weights, in plain types that a weights-only ``torch.load`` reads.

        A standard tokenizer that no text has needed yet is included if it is on this machine; otherwise it is None,
        and a backbone built from the description can't read texts.
        """
        if self._tokenizer is None and self.text is not None:
            with contextlib.suppress(UserError):
                self._fetch_tokenizer(offline=True)
        return {
            "visual_config": dict(self.visual_config),
            "text_config": None if self.text_config is None else dict(self.text_config),
            "tokenizer": None if self._tokenizer is None else self._tokenizer.to_str(),
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "source": self.source,
            "freeze_batch_norm": self.freeze_batch_norm,
        }

    def train(self, mode: bool = True) -> Self:
        """Set the mode as any module does, but for batch norm, which ``freeze_batch_norm`` keeps in evaluation mode."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Compute the visual tower's activations anew in the backward pass: less memory, more time, the same gradients.

        Raises:
            UserError: Batch norm moves, which would count each batch twice.
        """
        kind: type[nn.Module] = Bottleneck
        if self.visual_config["kind"] == "vit":
            from transformers.models.clip.modeling_clip import CLIPEncoderLayer

            kind = CLIPEncoderLayer
        elif not self.freeze_batch_norm:
            raise UserError(
                "gradient checkpointing passes each batch twice through a batch norm that moves: set "
                "freeze_batch_norm, or leave gradient_checkpointing out"
            )
        for block in self.visual.modules():
            if isinstance(block, kind):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    # Images

    def normalise(self, images: Tensor) -> Tensor:
        """Bring images to what the visual tower was trained on.

        Args:
            images: ``(..., 3, height, width)``, uint8, or floating in [0, 1].

        Returns:
            The same shape in float32, with the mean subtracted and divided by the std, channel by channel.
        """
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        return (images.float() / scale - self.mean) / self.std

    def encode_frames(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: ``(..., 3, image_size, image_size)``, normalised.

        Returns:
            Embeddings ``(..., dim)``, not L2-normalised.

        Raises:
            UserError: The images have another size, or haven't been normalised.
        """
        *leading, channels, height, width = images.shape
        size = self.image_size
        if (channels, height, width) != (3, size, size):
            raise UserError(
                f"backbone {self.source!r} takes images of (3, {size}, {size}), not ({channels}, {height}, {width}): "
                f"set the size of the frames to {size}"
            )
        if not images.is_floating_point():
            raise UserError(f"encode_frames takes normalised images, not {images.dtype}: call normalise first")
        weights = next(self.visual.parameters())
        images = images.reshape(-1, 3, size, size).to(weights.dtype)
        if self.visual_config["kind"] == "resnet":
            images = images.contiguous(memory_format=torch.channels_last)
        embeddings: Tensor = self.visual(images)
        return embeddings.reshape(*leading, self.dim)

    # Texts

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into tokens.

        Returns:
            ``(n, length)``, long, where length is the text tower's; shorter texts are padded with the end of text, and
            longer ones are cut so that it stays.

        Raises:
            UserError: There is no text tower, or its tokenizer can't be had or isn't its own.
        """
        length = self._text_values()["max_position_embeddings"]
        tokenizer = self._fetch_tokenizer() if self._tokenizer is None else self._tokenizer
        tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        return torch.tensor(tokens, dtype=torch.long).reshape(len(texts), length)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed the tokens ``(n, length)`` of n texts: ``(n, dim)``, not L2-normalised.

        Raises:
            UserError: There is no text tower, or it reads fewer tokens.
        """
        longest = self._text_values()["max_position_embeddings"]
        if tokens.shape[-1] > longest:
            raise UserError(f"backbone {self.source!r} reads at most {longest} tokens a text, not {tokens.shape[-1]}")
        assert self.text is not None
        embeddings: Tensor = self.text(tokens)
        return embeddings

    def _text_values(self) -> dict[str, Any]:
        if self.text_config is None:
            raise UserError(f"the weights of backbone {self.source!r} have no text tower: take some that have both")
        return self.text_config

    def _fetch_tokenizer(self, *, offline: bool = False) -> "Tokenizer":
        if self._tokenizer_repository is None:
            raise UserError(
                f"backbone {self.source!r} was saved without its tokenizer: load it from its own weights where "
                f"{STANDARD_TOKENIZER} is on the machine or can be fetched"
            )
        folder = _from_hub(self._tokenizer_repository, [["tokenizer.json"]], offline=offline)
        return self._use(_read_tokenizer(folder), self._tokenizer_repository)

    def _use(self, tokenizer: "Tokenizer", source: str) -> "Tokenizer":
        """Check that the tokenizer is this text tower's, and let it pad and truncate to the tower's length."""
        config = self._text_values()
        # Also what a two-token tokenizer saved to a folder is caught by.
        size, expected = tokenizer.get_vocab_size(), config["vocab_size"]
        if size != expected:
            raise UserError(
                f"the tokenizer of {source} has {size} tokens and the text tower {expected}: give the one that it was "
                "trained with"
            )
        # A tower whose end of text is 2 takes the largest id of a text, for OpenAI's configurations say 2 wrongly.
        end = config["eos_token_id"] if config["eos_token_id"] != 2 else expected - 1
        ids = tokenizer.encode("").ids
        if ids[-1:] != [end]:
            raise UserError(f"the tokenizer of {source} makes {ids} of an empty text, where {end} has to be the last")

        tokenizer.enable_truncation(config["max_position_embeddings"])
        # What follows the end of text is never read: attention is causal, and the first end of text is the one pooled.
        tokenizer.enable_padding(
            length=config["max_position_embeddings"], pad_id=end, pad_token=tokenizer.id_to_token(end)
        )
        self._tokenizer = tokenizer
        return tokenizer


# The towers


class _Tower(nn.Module):
    """A tower of transformers' as a plain function from a tensor to its embeddings."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        embeddings: Tensor = getattr(self.model(x), self.output)
        return embeddings


def _visual_tower(config: Mapping[str, Any]) -> nn.Module:
    values = {key: value for key, value in config.items() if key != "kind"}
    if config["kind"] == "resnet":
        # What convolutions like best on a GPU in half precision; the values are the same.
        return ModifiedResNet(**values).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return _Tower(CLIPVisionModelWithProjection(CLIPVisionConfig(**values)), "image_embeds")


def _text_tower(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    # These two play no part in the tower, but their defaults are refused for a small vocabulary.
    values = CLIPTextConfig(**config, bos_token_id=None, pad_token_id=None)
    return _Tower(CLIPTextModelWithProjection(values), "text_embeds")


def _load(
    backbone: CLIPBackbone, names: Mapping[str, str], state: Mapping[str, Tensor], source: str, *, strict: bool = True
) -> None:
    """Load ``state``, whose keys are the values of ``names``, under the backbone's own, its keys."""
    expected = set(names.values())
    problems = []
    # Files older than this counter have no use for it either.
    if missing := [key for key in expected - state.keys() if not key.endswith("num_batches_tracked")]:
        problems.append(f"missing: {some(sorted(missing))}")
    if strict and (unexpected := state.keys() - expected):
        problems.append(f"unexpected: {some(sorted(unexpected))}")
    if problems:
        raise UserError(f"the weights of {source} aren't those of one CLIP; {'; '.join(problems)}")

    own = backbone.state_dict()
    for key, name in names.items():
        if name not in state:
            continue
        weight = _part(key, name, state[name])
        if weight.shape != own[key].shape:
            raise UserError(
                f"the weights of {source} aren't those of one CLIP; "
                f"{name} is {tuple(weight.shape)} where {tuple(own[key].shape)} belongs"
            )
        own[key].copy_(weight)  # the very memory of the parameters; float16 becomes float32 here


def _part(key: str, name: str, weight: Tensor) -> Tensor:
    """What the backbone keeps under ``key`` of the weight called ``name``."""
    if "attn.in_proj_" in name:  # OpenAI's layout stacks the maps to queries, keys and values
        return weight.chunk(3)["qkv".index(key.split("_proj.")[0][-1])]
    if name in ("visual.proj", "text_projection"):  # and multiplies by its projections from the right
        return weight.T
    return weight


# Transformers' format


def _transformers_name(key: str) -> str:
    """What transformers' files call one of the backbone's weights."""
    return key.removeprefix("visual.model.").removeprefix("text.model.")


def _read_transformers_folder(folder: Path, source: str) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The towers' configurations and the weights of a folder in transformers' format."""
    from transformers import CLIPConfig

    values = _read_json(folder / "config.json", f"{source} isn't a model in transformers' format")
    if values.get("model_type") != "clip":
        raise UserError(f"{source} is a model of type {values.get('model_type')!r}: the backbone has to be a 'clip'")
    try:  # through transformers, which fills in what a configuration leaves to defaults
        config = CLIPConfig.from_dict(values)
    except Exception as error:  # its validation errors have no common class
        raise UserError(f"the config.json of {source} can't be used: {error}") from error
    towers = {
        "vision_config": {field: getattr(config.vision_config, field) for field in _VISION_FIELDS},
        "text_config": {field: getattr(config.text_config, field) for field in _TEXT_FIELDS},
    }
    for tower in towers.values():
        tower["projection_dim"] = config.projection_dim  # a tower's own is what it would have alone, and often wrong

    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return towers, {key: weight for file in files for key, weight in read_weights(file).items()}
    raise UserError(f"{source} has no weights: neither model.safetensors nor pytorch_model.bin is in the folder")


_TOWER_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
_VISION_FIELDS = (*_TOWER_FIELDS, "image_size", "patch_size", "num_channels")
_VISUAL_FIELDS = ("kind", "layers", "width", "dim", "image_size", *_VISION_FIELDS)
_TEXT_FIELDS = (*_TOWER_FIELDS, "vocab_size", "max_position_embeddings", "eos_token_id")


def _read_preprocessing(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and std of a folder in transformers' format; CLIP's where it has none."""
    values: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            values = _read_json(folder / name, "")
            values = values.get("image_processor", values)
    try:
        return list(values.get("image_mean", CLIP_MEAN)), list(values.get("image_std", CLIP_STD))
    except (AttributeError, TypeError) as error:
        raise UserError(f"the preprocessing in {folder} can't be used: {error}; mend or remove that file") from error


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def _read_tokenizer(folder: Path) -> "Tokenizer":
    """The tokenizer of a folder, bare: it does all that is needed, and one string rebuilds it."""
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

    # Asked for one that isn't there, transformers makes one of two tokens without a word.
    if not _has_tokenizer(folder):
        raise UserError(f"{folder} has no tokenizer: neither tokenizer.json, nor vocab.json and merges.txt")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # whatever a damaged file leads to
        raise UserError(f"the tokenizer in {folder} can't be read: {error}") from error


def _tokenizer_from_json(text: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    return Tokenizer.from_str(text)


# OpenAI's layout


def _openai_visual_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the visual tower's architecture off the shapes; KeyError names a weight that isn't there."""
    if "visual.attnpool.positional_embedding" in state:
        return {
            "kind": "resnet",
            "layers": [_count(state, f"visual.layer{stage}") for stage in (1, 2, 3, 4)],
            "width": state["visual.layer1.0.conv1.weight"].shape[0],
            "dim": state["visual.attnpool.c_proj.weight"].shape[0],
            "image_size": _side(state["visual.attnpool.positional_embedding"]) * 32,
        }
    patch_size = state["visual.conv1.weight"].shape[-1]
    return {
        "kind": "vit",
        **_openai_transformer_config(state, "visual.transformer"),
        "projection_dim": state["visual.proj"].shape[1],
        "image_size": _side(state["visual.positional_embedding"]) * patch_size,
        "patch_size": patch_size,
    }


def _openai_text_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        **_openai_transformer_config(state, "transformer"),
        "projection_dim": state["text_projection"].shape[1],
        "vocab_size": state["token_embedding.weight"].shape[0],
        "max_position_embeddings": state["positional_embedding"].shape[0],
        "eos_token_id": 2,  # transformers' sign for: the end of text is the largest id of each text
    }


def _openai_transformer_config(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    intermediate, width = state[f"{prefix}.resblocks.0.mlp.c_fc.weight"].shape
    if width % 64:
        raise UserError(f"CLIP's heads have 64 channels, which the width {width} of {prefix} isn't a multiple of")
    return {
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": _count(state, f"{prefix}.resblocks"),
        "num_attention_heads": width // 64,
        "hidden_act": "quick_gelu",
    }


def _count(state: Iterable[str], prefix: str) -> int:
    """How many numbered modules there are under a prefix."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(match[1]) for key in state if (match := pattern.match(key))), default=0)


def _side(positions: Tensor) -> int:
    """Height and width of the grid that ``(1 + height * width, ...)`` positions stand for."""
    return math.isqrt(positions.shape[0] - 1)


def _openai_names(backbone: CLIPBackbone) -> dict[str, str]:
    """OpenAI's name of each of the backbone's weights."""
    names = {}
    for key in backbone.state_dict():
        if isinstance(backbone.visual, ModifiedResNet) and key.startswith("visual."):
            names[key] = key
            continue
        name = _transformers_name(key)
        for pattern, replacement in _OPENAI_NAMES:
            name = re.sub(pattern, replacement, name)
        names[key] = name
    return names


_OPENAI_NAMES = (
    (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"),
    (r"^text_model\.encoder\.layers", "transformer.resblocks"),
    (r"self_attn\.[qkv]_proj\.", "attn.in_proj_"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual.conv1"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm", "visual.ln_pre"),
    (r"^vision_model\.post_layernorm", "visual.ln_post"),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_projection\.weight$", "text_projection"),
)


# Files and the hub


def read_weights(file: Path, inside: str = "") -> dict[str, Tensor]:
    """Read a file of named tensors, without running anything that is in it.

    Args:
        file: ``.safetensors``, or what ``torch.save`` wrote.
        inside: The key of a training checkpoint under which its weights lie, where it has that key.

    Raises:
        UserError: The file doesn't exist, is damaged, is a program, or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise UserError(f"{file}: no such file or folder")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged, or no safetensors file ({error}): fetch it again") from error

    if _is_torchscript(file):
        raise UserError(
            f"{file} is a TorchScript archive, a program that isn't run here. Convert it where you trust it:\n"
            "  import torch, safetensors.torch\n"
            f"  state = torch.jit.load({file.name!r}, map_location='cpu').state_dict()\n"
            f"  safetensors.torch.save_file({{k: v.contiguous() for k, v in state.items()}}, "
            f"{file.with_suffix('.safetensors').name!r})"
        )
    try:
        check_archive(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{file} is damaged, or holds more than tensors ({error}): fetch it again") from error
    if isinstance(state, dict):
        state = state.get(inside, state)
    if not isinstance(state, dict) or not all(isinstance(weight, Tensor) for weight in state.values()):
        raise UserError(f"{file} isn't a plain table of tensors, name by name: save the model's state_dict() alone")
    return state


def _is_torchscript(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # no zip file, or a damaged one, which reading it tells
        return False


def _read_json(file: Path, otherwise: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{otherwise}: there is no {file.name} in it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: a table of names and values is expected")
    return values


def _looks_like_a_path(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name or name.lower().endswith(_WEIGHT_FILES)
    )


# What is fetched of a model; the second where it has no safetensors.
_MODEL_FILES = [
    ["config.json", "tokenizer*.json", "model*.safetensors"],
    ["config.json", "tokenizer*.json", "pytorch_model*.bin"],
]
_OPTIONAL_FILES = ["preprocessor_config.json", "processor_config.json", "vocab.json", "merges.txt"]


def _from_hub(repository: str, choices: Sequence[Sequence[str]], *, offline: bool = False) -> Path:
    """The folder of a repository's files, from this machine's cache or else from the hub.

    Args:
        repository: The hub's name of it.
        choices: The sets of file patterns that will do, the best first; each pattern has to match a file.
        offline: Look in the cache only.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    reason: Exception | None = None
    for cached in (True,) if offline else (True, False):
        for patterns in choices:
            try:
                # Also for a single file: hf_hub_download takes 23 s to find out that there is no network.
                folder = Path(
                    snapshot_download(repository, allow_patterns=[*patterns, *_OPTIONAL_FILES], local_files_only=cached)
                )
            except (HFValidationError, RepositoryNotFoundError) as error:
                raise UserError(
                    f"{repository!r} is neither a file or folder here nor a public model of the hub: check the name"
                ) from error
            except Exception as error:  # the network's faults have no common class
                reason = error
                continue
            if all(any(folder.glob(pattern)) for pattern in patterns):
                return folder
    raise UserError(
        f"the weights or the tokenizer of {repository!r} are not on this machine and can't be fetched: connect once, "
        f"or download {', '.join(choices[0])} from https://huggingface.co/{repository} and give the folder "
        "(OpenAI's layout: the file, with the tokenizer beside it)"
    ) from reason
