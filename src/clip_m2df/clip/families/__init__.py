"""Families of towers: what there is to know of an architecture, one file each.

A family's file stands in this folder under the name of transformers' ``model_type`` and has a ``FAMILY``; nothing lists
it. transformers is imported where a tower is built, because it takes seconds.
"""

from __future__ import annotations

import importlib
import logging
import math
import pkgutil
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from clip_m2df.errors import UserError

# What descriptions call a family whose file has another name.
_FILES = {"vit": "clip"}
# Side of an image in pixels beyond which memory does not suffice.
MOST_SIDE = 4096
# Layers of a tower beyond which a description is a forgery: the largest towers have 40 to 50.
MOST_LAYERS = 1000


@dataclass(frozen=True)
class Tower:
    """One tower of a family, by transformers' classes.

    Attributes:
        fields: The values of its configuration that make it. A description has these, and no others are taken from a
            file.
        dim: The one of them that is the width of its embeddings.
        model: transformers' class of the tower; "" of one that ``Family.visual_tower`` builds otherwise.
        output: What the class calls the embeddings among its outputs.
        inside: What the names of its weights begin with in a folder, beyond those that the class itself gives them.
        fixed: Values of further fields, which are the same for every tower.
        unused: The names of its weights that embeddings need not, such as the mask of its own training. They are left
            out: trained on several devices, weights without a gradient are an error.
    """

    fields: tuple[str, ...]
    dim: str
    model: str = ""
    output: str = "pooler_output"
    inside: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def build(self, config: Mapping[str, Any]) -> Embedder:
        """The tower that a description's values make, with weights drawn at random.

        Raises:
            UserError: See :func:`check_values`.
        """
        import transformers

        values = {key: value for key, value in config.items() if key != "kind"}
        check_values(values)
        of_model = getattr(transformers, self.model)
        model = of_model(of_model.config_class(**values, **self.fixed))
        for name in self.unused:
            module, _, weight = name.rpartition(".")
            setattr(model.get_submodule(module), weight, None)
        # Earlier versions of some classes only wrap a module, under the very name that stands in files.
        return Embedder(getattr(model, self.inside.removesuffix("."), model) if self.inside else model, self.output)


def check_values(config: Mapping[str, Any]) -> None:
    """Check a tower's values, from a folder or a description, before they make anything.

    Raises:
        UserError: A value is of another type, not finite or out of its range; or there are more layers than any tower
            has.
    """
    for name, value in config.items():
        if name.endswith(("_size", "_dim", "_ratio", "_layers", "_heads", "_channels", "_embeddings")):
            wanted = "a whole number above 0"
            right = type(value) is int and value > 0
        elif name.endswith(("dropout", "dropout_prob", "drop_path_rate")):
            wanted = "a number, at least 0 and below 1"
            right = type(value) in (int, float) and 0 <= value < 1
        elif name.endswith(("_eps", "rope_theta")):
            wanted = "a number above 0"
            right = type(value) in (int, float) and 0 < value < math.inf
        else:
            wanted = "a finite number, a word, or true or false"
            right = isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
        if not right:
            raise UserError(f"{name} is {value!r:.80}; it must be {wanted}")
    if (layers := config.get("num_hidden_layers", 0)) > MOST_LAYERS:
        raise UserError(f"num_hidden_layers is {layers}; it must be at most {MOST_LAYERS}")
    if (side := config.get("image_size", 1)) > MOST_SIDE:
        raise UserError(f"image_size is {side}; it must be at most {MOST_SIDE}")


@dataclass(frozen=True, kw_only=True)
class Family:
    """The towers of one architecture; subclasses override what is special.

    What is here suits any model in transformers that has one or two towers of attention blocks.

    Attributes:
        kind: What descriptions call the family's towers; also the name of its file and transformers' ``model_type``.
        name: What people call them, for messages.
        visual: Its visual tower.
        text: Its text tower; None if there is none.
        config: transformers' class of a folder's ``config.json``; "" if the family has no folders.
        shared: The fields that both towers take from the configuration of the whole model.
        relatives: What other models are by their ``model_type``, and why these can't be taken.
        projections: LoRA's short names ``q k v o fc1 fc2`` to the names of linear layers in a block of the visual
            tower. Of several names a block has one or more. Empty if a family takes no adapters.
        positions: The name of the position embeddings among the weights of the visual tower, of the shape
            ``(..., prefix + height * width, width)``; "" if it computes its positions from the images' size.
        prefix: How many of these come first and belong to no patch.
        any_size: Whether images may have another size than the ``config.json`` says, as their preprocessing has it.
        processor: transformers' class of the preprocessing of images, without ``Fast`` or ``Pil`` at its end. What it
            does where a file doesn't say:
        mean: What it subtracts from pixels between 0 and 1, a number a channel.
        std: What it divides by.
        resample: Pillow's number of how it resizes: 2 is bilinear, 3 bicubic.
        crops: Whether it resizes the short side and cuts out the middle, and does not bring both sides to one length.
        renames: Patterns in the names of weights in files, and what stands there in the names of transformers' classes.
    """

    kind: str
    name: str
    visual: Tower
    text: Tower | None = None
    config: str = ""
    shared: tuple[str, ...] = ()
    relatives: Mapping[str, str] = field(default_factory=dict)
    projections: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    positions: str = ""
    prefix: int = 0
    any_size: bool = False
    processor: str = ""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: int = 3
    crops: bool = False
    renames: tuple[tuple[str, str], ...] = ()

    @property
    def model_type(self) -> str:
        """What a folder's ``config.json`` calls the family."""
        return _FILES.get(self.kind, self.kind)

    # The towers

    def visual_tower(self, config: Mapping[str, Any]) -> nn.Module:
        """Normalised images ``(n, 3, image_size, image_size)`` to embeddings ``(n, dim)``, of random weights."""
        return self.visual.build(config)

    def text_tower(self, config: Mapping[str, Any]) -> nn.Module:
        """Tokens ``(n, length)`` to embeddings ``(n, dim)``, of random weights."""
        if self.text is None:
            raise UserError(f"{self.name} has no text tower")
        return self.text.build(config)

    def blocks(self, tower: nn.Module) -> list[nn.Module]:
        """The blocks of a tower, in their order: what gradient checkpointing computes anew, and adapters go into."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer)]

    def grid(self, config: Mapping[str, Any]) -> int:
        """How many patches an image's side has."""
        return int(config["image_size"]) // int(config["patch_size"])

    def resized(self, config: Mapping[str, Any], image_size: int) -> dict[str, Any]:
        """The description of the same visual tower for images of another size.

        Raises:
            UserError: The size has not one patch, or is beyond ``MOST_SIDE``.
        """
        resized = {**config, "image_size": image_size}
        if self.grid(resized) < 1:
            raise UserError(f"image_size is {image_size}, less than one patch of {self.name}'s visual tower")
        if image_size > MOST_SIDE:
            raise UserError(f"image_size is {image_size}; it must be at most {MOST_SIDE}")
        return resized

    def resized_weight(self, key: str, weight: Tensor, own: Mapping[str, Any], config: Mapping[str, Any]) -> Tensor:
        """A weight of the visual tower for images of another size: position embeddings are interpolated.

        As ``interpolate_pos_encoding`` of transformers does it: bicubic, in float32.

        Args:
            key: The weight's name in the visual tower.
            weight: The weight in the tower's own size; one of another shape comes back as it is.
            own: The visual tower's configuration, in its own size.
            config: The same in the size that is wanted.
        """
        side, grid, shape = self.grid(own), self.grid(config), weight.shape
        if key != self.positions or side == grid or shape[-2:-1] != (self.prefix + side * side,):
            return weight
        first, patches = weight.float().reshape(-1, shape[-1]).split([self.prefix, side * side])
        patches = rearrange(patches, "(h w) d -> 1 d h w", h=side)
        patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
        patches = rearrange(patches, "1 d h w -> (h w) d")
        return torch.cat([first, patches]).view(*shape[:-2], -1, shape[-1])

    # A folder's files

    def configs(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The visual and the text tower's configuration out of a ``config.json``'s values.

        transformers fills in what a file leaves to defaults.

        Raises:
            Exception: transformers can't make a configuration of it; its validation errors have no common class.
        """
        import transformers

        # It warns of token numbers that play no part here, even of those in its own defaults for SigLIP.
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity(logging.ERROR)
        try:
            config = getattr(transformers, self.config).from_dict(dict(values))
        finally:
            transformers.logging.set_verbosity(verbosity)
        if self.text is None:
            return {"kind": self.kind, **self._picked(self.visual, config, config)}, None
        return (
            {"kind": self.kind, **self._picked(self.visual, config, config.vision_config)},
            {"kind": self.kind, **self._picked(self.text, config, config.text_config)},
        )

    def _picked(self, tower: Tower, whole: Any, part: Any) -> dict[str, Any]:
        picked = {name: getattr(whole if name in self.shared else part, name) for name in tower.fields}
        for name, value in picked.items():
            if isinstance(value, list | tuple) and len({*value}) == 1 and name.endswith("_size"):
                picked[name] = value[0]  # of images or patches: height and width
        return picked

    def file_name(self, key: str) -> str:
        """What a folder's files call one of the backbone's weights."""
        side, _, name = key.partition(".model.")
        tower = {"visual": self.visual, "text": self.text}.get(side)
        return key if tower is None else tower.inside + name

    def renamed(self, state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
        """A folder's weights by the names that transformers' classes have today.

        Args:
            state: The weights by their names in the files.
            own: The names that are expected. Weights that have one of them keep it.
        """
        renamed = {}
        for name, weight in state.items():
            new = name
            for pattern, replacement in () if name in own else self.renames:
                new = re.sub(pattern, replacement, new)
            renamed[new] = weight
        return renamed

    def unused(self, names: Iterable[str]) -> Callable[[str], bool]:
        """Tell what of a folder's weights is no error although the towers don't have it.

        This is what lies outside of the towers, what embeddings need not, and positions' numbers, which older versions
        stored.

        Args:
            names: Those that a folder's files have for all of the backbone's weights.
        """
        first = {name.split(".")[0] for name in names}
        unused = {tower.inside + name for tower in (self.visual, self.text) if tower for name in tower.unused}
        return lambda name: name.split(".")[0] not in first or name in unused or name.endswith("position_ids")


class Embedder(nn.Module):
    """A tower of transformers' as a plain function from a tensor to its embeddings."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        """Embed images or tokens."""
        embeddings: Tensor = getattr(self.model(x), self.output)
        return embeddings


def families() -> list[str]:
    """The names of the families' files."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def family_of(kind: object) -> Family:
    """The family that a description's ``kind`` or a folder's ``model_type`` names.

    Raises:
        UserError: There is none.
    """
    name = _FILES.get(kind, kind) if isinstance(kind, str) else ""
    if name not in families():
        raise UserError(f"there is no family of towers {kind!r:.80}; there are {', '.join(families())}")
    family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return family
