"""CLIP's weights in the two formats that are in use: transformers' folders, and files in OpenAI's layout.

Both are read without running anything in them, and come from this machine or from the hub. transformers, safetensors
and the hub's client are imported where they are used, because they take seconds.
"""

import itertools
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_m2df.errors import UserError, some
from clip_m2df.files import check_archive, check_regular

# What CLIP was trained with; a folder in transformers' format may say otherwise.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What of transformers' configurations makes a tower.
_TOWER_FIELDS = (
    *("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "layer_norm_eps", "attention_dropout"),
)
_VISION_FIELDS = (*_TOWER_FIELDS, "image_size", "patch_size", "num_channels")
TEXT_FIELDS = (*_TOWER_FIELDS, "vocab_size", "max_position_embeddings", "eos_token_id")
# Those of a visual tower of either kind.
VISUAL_FIELDS = ("kind", "layers", "width", "dim", *_VISION_FIELDS)

RN50_REPOSITORY, RN50_FILE = "timm/resnet50_clip.openai", "open_clip_model.safetensors"
# All of OpenAI's releases share one vocabulary of 49,408 tokens; this is the smallest repository that has it.
STANDARD_TOKENIZER = "openai/clip-vit-base-patch32"
# What is fetched of a model; the second where it has no safetensors.
MODEL_FILES = [
    ["config.json", "tokenizer*.json", "model*.safetensors"],
    ["config.json", "tokenizer*.json", "pytorch_model*.bin"],
]
_OPTIONAL_FILES = ["preprocessor_config.json", "processor_config.json", "vocab.json", "merges.txt"]


# Files of weights


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

    check_regular(file, "file of weights")
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


def load_weights(
    backbone: nn.Module, state: Mapping[str, Tensor], name_of: Callable[[str], str], source: str, *, strict: bool = True
) -> None:
    """Load weights that have other names than the backbone's own.

    Args:
        backbone: Where the weights go, whatever the floating type that they come in.
        state: The weights.
        name_of: From the backbone's own name of a weight to its name in ``state``.
        source: Where the weights come from, for messages.
        strict: Refuse weights that the backbone doesn't have.

    Raises:
        UserError: Names those that are missing, unexpected, or of another shape.
    """
    own = backbone.state_dict()
    names = {key: name_of(key) for key in own}
    problems = dict.fromkeys(sorted(state.keys() - {*names.values()}) if strict else (), "unexpected")
    for key, name in names.items():
        if name in state:
            weight = _openai_part(key, name, state[name])
            if weight.shape == own[key].shape:
                own[key].copy_(weight)  # the very memory of the parameters; float16 becomes float32 here
            else:
                problems[name] = f"{tuple(weight.shape)} where {tuple(own[key].shape)} belongs"
        elif not name.endswith("num_batches_tracked"):  # files older than this counter have no use for it either
            problems[name] = "missing"
    if problems:
        named = some(f"{name} is {problem}" for name, problem in problems.items())
        raise UserError(f"the weights of {source} aren't those of one CLIP: {named}")


# Transformers' format


def transformers_name(key: str) -> str:
    """What transformers' files call one of the backbone's weights."""
    return key.removeprefix("visual.model.").removeprefix("text.model.")


def read_folder(folder: Path, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The towers' description, without tokenizer, and the weights of a folder in transformers' format.

    Raises:
        UserError: It holds another model, no weights, or is damaged.
    """
    from transformers import CLIPConfig

    for name in ("config.json", "processor_config.json", "preprocessor_config.json"):
        check_regular(folder / name, "model's description")
    if not (folder / "config.json").is_file():
        raise UserError(f"{source} isn't a model in transformers' format: there is no config.json in it")
    values = _read_json(folder / "config.json")
    if values.get("model_type") != "clip":
        raise UserError(f"{source} is a model of type {values.get('model_type')!r}: the backbone has to be a 'clip'")
    try:  # through transformers, which fills in what a configuration leaves to defaults
        config = CLIPConfig.from_dict(values)
    except Exception as error:  # its validation errors have no common class
        raise UserError(f"the config.json of {source} can't be used: {error}") from error
    vision = {field: getattr(config.vision_config, field) for field in _VISION_FIELDS}
    text = {field: getattr(config.text_config, field) for field in TEXT_FIELDS}
    for tower in (vision, text):
        tower["projection_dim"] = config.projection_dim  # a tower's own is what it would have alone, and often wrong

    preprocessing: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            preprocessing = _read_json(folder / name)
            preprocessing = preprocessing.get("image_processor", preprocessing)
    try:
        mean, std = list(preprocessing.get("image_mean", CLIP_MEAN)), list(preprocessing.get("image_std", CLIP_STD))
    except (AttributeError, TypeError) as error:
        raise UserError(f"the preprocessing in {folder} can't be used: {error}; mend or remove that file") from error

    description = {"visual_config": {"kind": "vit", **vision}, "text_config": text, "mean": mean, "std": std}
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return description, {key: weight for file in files for key, weight in read_weights(file).items()}
    raise UserError(f"{source} has no weights: neither model.safetensors nor pytorch_model.bin is in the folder")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: a table of names and values is expected")
    return values


# OpenAI's layout

# From transformers' names to OpenAI's, one substitution after the other.
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


def openai_name(key: str) -> str:
    """What OpenAI's files call one of the backbone's weights; those of the modified ResNet have their names already."""
    name = transformers_name(key)
    for pattern, replacement in _OPENAI_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _openai_part(key: str, name: str, weight: Tensor) -> Tensor:
    """What the backbone keeps under ``key`` of the weight called ``name``."""
    if "attn.in_proj_" in name:  # OpenAI's layout stacks the maps to queries, keys and values
        return weight.chunk(3)["qkv".index(key.split("_proj.")[0][-1])]
    if name in ("visual.proj", "text_projection"):  # and multiplies by its projections from the right
        return weight.T
    return weight


def openai_configs(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Read the architecture of the visual and of the text tower, if there is one, off the shapes of the weights.

    Raises:
        KeyError: Names a weight that isn't there.
        UserError: The width of a tower is none of CLIP's.
    """
    visual: dict[str, Any]
    if "visual.attnpool.positional_embedding" in state:
        visual = {
            "kind": "resnet",
            "layers": [_count(state, f"visual.layer{stage}") for stage in (1, 2, 3, 4)],
            "width": state["visual.layer1.0.conv1.weight"].shape[0],
            "dim": state["visual.attnpool.c_proj.weight"].shape[0],
            "image_size": _side(state["visual.attnpool.positional_embedding"]) * 32,
        }
    else:
        patch_size = state["visual.conv1.weight"].shape[-1]
        visual = {
            "kind": "vit",
            **_transformer_config(state, "visual.transformer"),
            "projection_dim": state["visual.proj"].shape[1],
            "image_size": _side(state["visual.positional_embedding"]) * patch_size,
            "patch_size": patch_size,
        }
    if all(key.startswith("visual.") for key in state):
        return visual, None
    return visual, {
        **_transformer_config(state, "transformer"),
        "projection_dim": state["text_projection"].shape[1],
        "vocab_size": state["token_embedding.weight"].shape[0],
        "max_position_embeddings": state["positional_embedding"].shape[0],
        "eos_token_id": 2,  # transformers' sign for: the end of text is the largest id of each text
    }


def _transformer_config(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
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


# Names, and the hub


def looks_like_a_path(name: str) -> bool:
    """Whether what names no file or folder was meant to, and can be no model of the hub."""
    suffixes = (".safetensors", ".pt", ".pth", ".bin")
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name or name.lower().endswith(suffixes)


def public_source(source: str) -> str:
    """What others may know of where a tower came from: of a path the last part, without a person's folders."""
    return re.split(r"[\\/]", source.rstrip("\\/"))[-1] if looks_like_a_path(source) else source


def fetch(repository: str, choices: Sequence[Sequence[str]], *, offline: bool = False) -> Path:
    """The folder of a repository's files, from this machine's cache or else from the hub.

    Args:
        repository: The hub's name of it.
        choices: The sets of file patterns that will do, the best first; each pattern has to match a file.
        offline: Look in the cache only.

    Raises:
        UserError: There is no such model, or it can't be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    reason: Exception | None = None
    for cached, patterns in itertools.product((True,) if offline else (True, False), choices):
        try:
            # Also for a single file: hf_hub_download takes 23 s to find out that there is no network.
            wanted = [*patterns, *_OPTIONAL_FILES]
            folder = Path(snapshot_download(repository, allow_patterns=wanted, local_files_only=cached))
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
