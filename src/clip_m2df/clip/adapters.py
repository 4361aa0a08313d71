"""LoRA's adapters in a visual tower (Hu et al., arXiv 2106.09685), by peft's layers.

peft is imported where it is used, because it takes seconds and is an extra.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clip_m2df.clip.adapter_files import NAME
from clip_m2df.clip.backbone import CLIPBackbone
from clip_m2df.errors import UserError, require, some


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
        from peft.tuners.lora import LoraLayer
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
        inject_adapter_in_model(config, backbone.visual, adapter_name=NAME)
    for layer in (module for module in backbone.visual.modules() if isinstance(module, LoraLayer)):
        # As in the paper, A is drawn and B is zero; in float32 whatever the tower is held in, as an optimiser needs it.
        down, up = layer.lora_A.float().get_parameter(f"{NAME}.weight"), layer.lora_B.float()
        drawn = nn.init.kaiming_uniform_(torch.empty(down.shape), a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            down.copy_(drawn)
            up.get_parameter(f"{NAME}.weight").zero_()
    backbone.adapters = adapters


def _adapted(backbone: CLIPBackbone, adapters: Mapping[str, Any]) -> list[str]:
    """The names of the linear layers in the visual tower that get adapters."""
    family, source = backbone.family, backbone.source
    if backbone.adapters is not None:
        raise UserError(f"backbone {source!r} has adapters already: merge them first")
    if not family.projections:
        raise UserError(
            f"adapters go into a transformer's linear layers, and the visual tower of {source!r}, {family.name}, takes"
            " none: leave them out, or take another backbone"
        )
    if unknown := [name for name in adapters["target"] if name not in family.projections]:
        raise UserError(
            f"adapters.target has {some(unknown)}, and the tower's blocks have {', '.join(family.projections)}"
        )
    names = {module: name for name, module in backbone.visual.named_modules()}
    blocks = family.blocks(backbone.visual)
    layers = range(len(blocks)) if adapters["layers"] == "all" else adapters["layers"]
    if beyond := [str(layer) for layer in layers if layer >= len(blocks)]:
        raise UserError(
            f"adapters.layers has {some(beyond)}, but the tower has {len(blocks)} blocks, from 0 to {len(blocks) - 1}"
        )
    wanted = {
        f"{names[blocks[layer]]}.{name}"
        for layer in layers
        for t in adapters["target"]
        for name in family.projections[t]
    }
    return [name for name in names.values() if name in wanted]


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
