"""LoRA's adapters in a visual tower (Hu et al., arXiv 2106.09685), by peft's layers.

peft is imported where it is used, because it takes seconds and is an extra.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from clip_m2df.clip.backbone import CLIPBackbone
from clip_m2df.errors import UserError, require, some

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

# How a model with adapters is saved: with its tower, added to its tower's weights, or without its tower.
Kept = Literal["kept", "merged", "apart"]
# Peft's own files of an adapter.
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What peft calls the one adapter of a layer.
_NAME = "default"


def check_adapters(adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The option ``adapters`` with all its values, in plain types.

    Args:
        adapters: ``r``, the rank (16 by default); ``alpha``, which over ``r`` is the scale of what an adapter adds
            (twice ``r``); ``target``, the linear layers of a block, of ``q``, ``k``, ``v``, ``o``, ``fc1`` and ``fc2``
            (``[q, v]``); ``layers``, the numbers of the blocks from 0, or ``all``; ``dropout`` before an adapter (0).

    Raises:
        UserError: It is no such table; names the value.
    """
    if not isinstance(adapters, Mapping):
        raise UserError(f"adapters is {adapters!r:.80}; it must be a table, such as {{r: 16, alpha: 32}}")
    r = adapters.get("r", 16)
    if type(r) is not int or r < 1:
        raise UserError(f"adapters.r is {r!r:.80}; it must be a whole number of at least 1")
    values: dict[str, Any] = {"r": r, "alpha": 2 * r, "target": ["q", "v"], "layers": "all", "dropout": 0.0}
    if unknown := [option for option in adapters if option not in values]:
        raise UserError(f"adapters has no {unknown[0]!r:.80}; there are {', '.join(values)}")
    values |= adapters
    alpha, dropout, target, layers = (values[name] for name in ("alpha", "dropout", "target", "layers"))
    require(above=0, below=math.inf, **{"adapters.alpha": alpha})
    require(least=0, below=1, **{"adapters.dropout": dropout})
    if not _is_list_of(target, str):
        raise UserError(f"adapters.target is {target!r:.80}; it must be a list of layers, each once, such as [q, v]")
    if layers != "all" and not (_is_list_of(layers, int) and min(layers) >= 0):
        raise UserError(
            f"adapters.layers is {layers!r:.80}; it must be all, or a list of the blocks' numbers from 0, each once"
        )
    return values | {"target": list(target), "layers": layers if layers == "all" else sorted(layers)}


def _is_list_of(values: object, kind: type) -> bool:
    return (
        isinstance(values, list | tuple)
        and all(type(value) is kind for value in values)
        and 0 < len(values) == len(set(values))
    )


def add_adapters(backbone: CLIPBackbone, adapters: Mapping[str, Any]) -> None:
    """Put adapters into the visual tower, whose own weights are frozen; at first they add nothing.

    Their first weights depend on the state of torch's generator alone, which is left as it is.

    Args:
        backbone: With weights of its own, and no adapters.
        adapters: See :func:`check_adapters`.

    Raises:
        UserError: A value that the option can't have; a tower that takes none, or lacks a layer; peft is not installed.
    """
    adapters = check_adapters(adapters)
    names = _adapted(backbone, adapters)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("adapters need peft: pip install clip-m2df[lora], or leave them out") from error
    config = LoraConfig(
        r=adapters["r"],
        lora_alpha=adapters["alpha"],
        lora_dropout=adapters["dropout"],
        target_modules=names,
    )
    with torch.random.fork_rng(devices=[]):
        # A seed drawn, so that the head, which starts from the same state, does not draw the same numbers.
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        inject_adapter_in_model(config, backbone.visual, adapter_name=_NAME)
    for layer in adapted_layers(backbone):
        # As in the paper, A is drawn and B is zero; in float32 whatever the tower is held in, as an optimiser needs it.
        down, up = layer.lora_A.float().get_parameter(f"{_NAME}.weight"), layer.lora_B.float()
        drawn = nn.init.kaiming_uniform_(torch.empty(down.shape), a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            down.copy_(drawn)
            up.get_parameter(f"{_NAME}.weight").zero_()
    backbone.adapters = adapters


def adapted_layers(backbone: CLIPBackbone) -> "Iterator[LoraLayer]":
    """The layers of peft in the visual tower, in the order of the forward pass."""
    from peft.tuners.lora import LoraLayer

    return (module for module in backbone.visual.modules() if isinstance(module, LoraLayer))


def _adapted(backbone: CLIPBackbone, adapters: Mapping[str, Any]) -> list[str]:
    """The names of the linear layers in the visual tower that get adapters."""
    if backbone.adapters is not None:
        raise UserError(f"backbone {backbone.source!r} has adapters already: merge them first")
    if backbone.visual_config["kind"] != "vit":
        raise UserError(
            f"adapters go into a transformer's linear layers, and the visual tower of {backbone.source!r} is a ResNet:"
            " leave them out, or take a ViT"
        )
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    projections = {name: f"self_attn.{name}_proj" for name in "qkv"} | {"o": "self_attn.out_proj"}
    projections |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    if unknown := [name for name in adapters["target"] if name not in projections]:
        raise UserError(f"adapters.target has {some(unknown)}, and the tower's blocks have {', '.join(projections)}")
    blocks = [name for name, module in backbone.visual.named_modules() if isinstance(module, CLIPEncoderLayer)]
    layers = range(len(blocks)) if adapters["layers"] == "all" else adapters["layers"]
    if beyond := [str(layer) for layer in layers if layer >= len(blocks)]:
        raise UserError(
            f"adapters.layers has {some(beyond)}, but the tower has {len(blocks)} blocks, from 0 to {len(blocks) - 1}"
        )
    return [f"{blocks[layer]}.{projections[name]}" for layer in layers for name in adapters["target"]]


def merge_adapters(backbone: CLIPBackbone) -> None:
    """Add what the adapters add to the visual tower's own weights, in place: it is a plain tower then, and trained."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(backbone.visual.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(backbone.visual.get_submodule(parent), child, layer.get_base_layer())
    backbone.visual.requires_grad_(True)
    backbone.adapters = None


# Adapters in files of their own


def is_of_adapter(name: str) -> bool:
    """Whether a weight is an adapter's, by its name in a state dict."""
    return ".lora_" in name


def tower_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a backbone's own weights, in hexadecimal, whatever adapters it has."""
    own = {name.replace(".base_layer.", "."): weight for name, weight in state.items() if not is_of_adapter(name)}
    digest = hashlib.sha256()
    for name, weight in sorted(own.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def peft_files(state: Mapping[str, Tensor], adapters: Mapping[str, Any], source: str) -> tuple[str, dict[str, Tensor]]:
    """What peft's two files have of the adapters in a backbone's state dict.

    Args:
        state: The backbone's; it has adapters.
        adapters: See :func:`check_adapters`.
        source: The name of the tower.

    Returns:
        The text of the configuration, and the weights by peft's names.
    """
    named = {name: weight for name, weight in state.items() if is_of_adapter(name)}
    layers = dict.fromkeys(name.partition(".lora_")[0].removeprefix(_TOWER) for name in named)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": source,
        "r": adapters["r"],
        "lora_alpha": adapters["alpha"],
        "lora_dropout": adapters["dropout"],
        "target_modules": list(layers),
        "bias": "none",
        "inference_mode": True,
    }
    return json.dumps(config, indent=2) + "\n", {_peft_name(name): weight for name, weight in named.items()}


def own_state(weights: Mapping[str, Tensor], tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a backbone with adapters.

    Args:
        weights: Of the adapters, by peft's names.
        tower: The state dict of the same backbone without adapters.
    """
    state = {}
    for name, weight in weights.items():
        layer, _, part = name.removeprefix(_PEFT).rpartition(".lora_")
        state[f"{_TOWER}{layer}.lora_{part.replace('.', f'.{_NAME}.')}"] = weight
    adapted = {name.partition(".lora_")[0] for name in state}
    for name, weight in tower.items():
        layer, _, part = name.rpartition(".")
        state[f"{layer}.base_layer.{part}" if layer in adapted else name] = weight
    return state


# Before the names of a transformers tower: in a backbone's state dict, and in peft's files.
_TOWER, _PEFT = "visual.model.", "base_model.model."


def _peft_name(name: str) -> str:
    return f"{_PEFT}{name.removeprefix(_TOWER).replace(f'.{_NAME}.', '.')}"
