"""A visual and a text tower with all that goes with them, and the ways to make them.

transformers and the hub's client are imported where they are used, because they take seconds and a ResNet without text
needs neither.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from clip_m2df.clip import formats
from clip_m2df.clip.adapter_files import CONFIG as ADAPTER
from clip_m2df.clip.adapter_files import apply_adapter, read_adapter
from clip_m2df.clip.families import MOST_SIDE, family_of
from clip_m2df.clip.families.clip import MEAN as CLIP_MEAN
from clip_m2df.clip.families.clip import STD as CLIP_STD
from clip_m2df.clip.families.features import ClassEmbeddings
from clip_m2df.clip.formats import STANDARD_TOKENIZER
from clip_m2df.clip.tokenizer import VOCABULARY, encoded, has_tokenizer, read_tokenizer, saved_tokenizer
from clip_m2df.errors import UserError, some
from clip_m2df.weight_files import program_classes, read_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TINY_CLIP = Path(__file__).parent.parent / "assets" / "tiny_clip"
# What helps where there is no tokenizer.
_REMEDY = (
    f"put CLIP's vocabulary, {VOCABULARY} as it comes with OpenAI's and OpenCLIP's code, beside the file of weights, "
    "or name it by --model.backbone_options.tokenizer FILE (predict: --backbone_options tokenizer=FILE; in Python: "
    "tokenizer=)"
)

# The keys of ``backbone_options``.
BACKBONE_OPTIONS = ("activation", "head_width", "tokenizer", "mean", "std", "image_size", "dtype", "dim")
# What weights can be held in, by torch's names.
DTYPES = ("float32", "bfloat16", "float16")
HALF = (torch.bfloat16, torch.float16)


class CLIPBackbone(nn.Module):
    """Towers of CLIP, or of another family, with all that goes with them: tokenizer, image size, mean and std.

    Made by ``load``, ``from_pretrained``, ``from_openai`` or ``from_description``. Images and texts become projected
    embeddings of one width; neither is L2-normalised.

    Args:
        visual_config: ``{"kind": K, ...}``, with the family's kind and the fields of its visual tower, see
            :mod:`clip_m2df.clip.families`.
        text_config: The same of the text tower, of kind ``vit`` where it doesn't say; None leaves the tower out.
        tokenizer: The text of a ``tokenizer.json`` that pads and truncates; None if there is none yet.
        mean: What ``normalise`` subtracts, a number a channel.
        std: What it divides by.
        interpolation: How images were resized for the tower in its training: ``bilinear`` or ``bicubic``.
        dtype: What the towers' weights are held in, and images and texts computed in, under autocast too: ``float32``,
            ``bfloat16`` or ``float16``. Mean and std stay in float32.
        source: Where the weights came from, for messages and the record.
        freeze_batch_norm: Keep batch norm in evaluation mode whatever ``train()`` says. Change the attribute and call
            ``train()`` to let it move.

    Attributes:
        family: Of the visual tower.
        visual: Normalised images ``(n, 3, image_size, image_size)`` to embeddings ``(n, dim)``.
        text: Tokens ``(n, length)`` to embeddings ``(n, dim)``, or None.
        dim: Width of the embeddings.
        image_size: Height and width of the images.
        adapters: Those of the visual tower, see :func:`clip_m2df.clip.adapters.add_adapters`; None without.
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
        interpolation: str = "bilinear",
        dtype: str = "float32",
        source: str = "",
        freeze_batch_norm: bool = True,
    ) -> None:
        super().__init__()
        if interpolation not in ("bilinear", "bicubic"):
            raise UserError(f"interpolation is {interpolation!r:.100}: give bilinear or bicubic")
        self.interpolation = interpolation
        self.visual_config = dict(visual_config)
        self.text_config = None if text_config is None else dict(text_config)
        self.family = family_of(self.visual_config["kind"])
        self.visual = self.family.visual_tower(self.visual_config)
        self.dim = int(self.visual_config[self.family.visual.dim])
        self.text: nn.Module | None = None
        if self.text_config is not None:
            family = family_of(self.text_config.get("kind", "vit"))
            self.text = family.text_tower(self.text_config)
            if (dim := self.text_config[family.text.dim]) != self.dim:  # type: ignore[union-attr]
                raise UserError(f"the embeddings of texts have {dim} channels, and those of images {self.dim}")
        self.image_size = int(self.visual_config["image_size"])
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r:.80}; it must be one of {', '.join(DTYPES)}")
        self.dtype = dtype
        for tower in filter(None, (self.visual, self.text) if dtype != "float32" else ()):
            tower.to(getattr(torch, dtype))
        self.source = source
        self.freeze_batch_norm = freeze_batch_norm
        self.adapters: dict[str, Any] | None = None

        self._tokenizer: Tokenizer | None = None
        if tokenizer is not None and self.text_config is not None:
            self._tokenizer = saved_tokenizer(tokenizer, self.text_config, repr(source))
        self._tokenizer_repository: str | None = None  # where to fetch it from once a text has to be read

        if not formats.three_numbers(mean) or not formats.three_numbers(std, positive=True):
            raise UserError(f"image_mean is {mean!r:.100} and image_std {std!r:.100}: {formats.THREE_NUMBERS}")
        # Not in the state dict: they belong to the description, and weights from elsewhere don't have them.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.train()

    # Making one

    @classmethod
    def load(cls, name: str | os.PathLike[str], *, freeze_batch_norm: bool = True, **options: Any) -> Self:
        """Load the backbone that the option ``backbone`` names.

        Args:
            name: ``tiny`` (the one in this package, for tests and demonstrations), ``rn50`` (OpenAI's ResNet-50, from
                the hub), ``features`` (no tower, for features that are there already), a folder in transformers' or
                OpenCLIP's format, a file of weights in OpenAI's layout (``.safetensors``, ``.pt``, ``.bin``), or the
                hub's name of such a folder, as ``openai/clip-vit-base-patch16``.
            freeze_batch_norm: Keep batch norm in evaluation mode whatever ``train()`` says.
            **options: What the weights don't tell, or tell otherwise: ``activation`` and ``head_width`` of weights in
                OpenAI's layout, see :meth:`from_openai`; ``tokenizer``, where it lies; ``mean`` and ``std``, three
                numbers each for pixels between 0 and 1; ``image_size`` and ``dtype``, see :meth:`from_pretrained`;
                ``dim``, of ``features`` alone: their width. None is as good as not given.

        Raises:
            UserError: There is no such thing, it can't be fetched, or it is of no family; an option that there is not,
                that has another value, or that this format has no use for.
        """
        given, name = check_options(options), os.fspath(name)
        if name == "features":
            return cls._of_features(given)
        if "dim" in given:
            raise UserError(f"backbone_options.dim is of the backbone features, and {name!r} has its own: leave it out")
        if name == "rn50":
            _check_known(given, formats.OPENAI, "rn50 is OpenAI's")
            folder = formats.fetch(formats.RN50_REPOSITORY, [[formats.RN50_FILE]])
            backbone = cls.from_openai(str(folder / formats.RN50_FILE), **given | formats.OPENAI)
        elif Path(name).expanduser().is_file():
            if name.lower().endswith(".parquet"):
                raise UserError(f"{name} {formats.FEATURES_ARE_NO_WEIGHTS}")
            backbone = cls.from_openai(name, **given)
        else:
            known = re.sub("^(hf-hub:|hf://)", "", name)  # as OpenCLIP and the hub's client name it
            known = formats.known_backbone(name) if known == name else known
            if name.endswith((".ckpt", *formats.WEIGHT_SUFFIXES)) or not name.strip():
                same = f"; the same model is there under the name {known!r}" if known else ""
                raise UserError(f"{name!r}: no such file or folder; relative names start at {Path.cwd()}{same}")
            if known not in ("", name) and not Path(name).expanduser().exists():
                raise UserError(f"there is no backbone {name!r}: give {known!r}, which is the same model")
            if re.fullmatch(r"rn\d+(x\d+)?", name.lower()):
                raise UserError(
                    f"of OpenAI's ResNets rn50 alone is fetched by its name: give the file of {name}'s weights"
                )
            backbone = cls.from_pretrained(str(TINY_CLIP) if name == "tiny" else name, **given)
        if "tokenizer" in given and backbone.text is None:
            raise UserError(f"backbone_options.tokenizer: the weights of {name!r} have no text tower; leave it out")
        backbone.source = name
        backbone.freeze_batch_norm = freeze_batch_norm
        return backbone.train()

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        head_width: int | None = None,
        activation: Literal["quick_gelu", "gelu"] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_size: int | None = None,
        dtype: str = "float32",
    ) -> Self:
        """Load towers of any family in transformers' format, or a CLIP in OpenCLIP's.

        A folder that has both is read as transformers'.

        Args:
            name_or_dir: A folder with ``config.json``, weights and a tokenizer; one with ``open_clip_config.json`` and
                ``open_clip_model.safetensors`` or ``open_clip_pytorch_model.bin``; or a model's name on the hub.
            tokenizer: Where it lies; by default in the folder.
            head_width: Of OpenCLIP's, see :meth:`from_openai`; folders in transformers' format have their own.
            activation: The same.
            mean: What is subtracted from pixels between 0 and 1, a number a channel. By default what the folder's
                ``preprocessor_config.json`` or ``open_clip_config.json`` says, as for interpolation; without it, those
                of its family.
            std: What they are divided by, likewise.
            image_size: Height and width of the images in the place of the tower's own, a multiple of its patches'.
                Position embeddings are interpolated, as transformers' ``interpolate_pos_encoding`` does it.
            dtype: What the weights are held in, whatever the file has: ``float32``, ``bfloat16`` or ``float16``.

        Raises:
            UserError: The folder doesn't exist, the model can't be fetched, is of no family, or is damaged.
        """
        name_or_dir, tokenizer = os.fspath(name_or_dir), None if tokenizer is None else os.fspath(tokenizer)
        folder = Path(name_or_dir).expanduser()
        if not folder.is_dir():
            if formats.looks_like_a_path(name_or_dir):
                raise UserError(f"backbone {name_or_dir!r}: no such file or folder")
            folder = formats.fetch(name_or_dir, formats.MODEL_FILES)
        of_openai: dict[str, Any] = {"head_width": head_width, "activation": activation}
        if file := formats.open_clip_weights(folder):
            if (folder / ADAPTER).exists():
                raise UserError(
                    f"{name_or_dir} has an adapter, and it is applied to weights in transformers' format alone: merge"
                    f" it into the model, or move {ADAPTER} elsewhere"
                )
            of_openai |= {"tokenizer": tokenizer, "mean": mean, "std": std, "image_size": image_size, "dtype": dtype}
            backbone = cls.from_openai(str(file), **of_openai)
            backbone.source = name_or_dir
            return backbone
        _check_known(of_openai, {}, f"the config.json of {name_or_dir} says what it is")
        adapter = read_adapter(folder, name_or_dir)
        description, state = formats.read_folder(folder, name_or_dir)
        description |= _given(mean=mean, std=std)
        own = description["visual_config"]
        description["visual_config"] = _sized(own, description.pop("image_size"), image_size, name_or_dir)
        description |= {"dtype": dtype, "source": name_or_dir}
        with torch.device("meta"):  # a wrong config.json may describe towers larger than any memory
            cls._with_weights(description, own, state, adapter)
        backbone = cls._with_weights(description, own, state, adapter)
        if backbone.text is not None:
            backbone._read_tokenizer(
                folder if tokenizer is None else Path(tokenizer).expanduser(), tokenizer or name_or_dir
            )
        return backbone

    @classmethod
    def _with_weights(
        cls,
        description: Mapping[str, Any],
        own: Mapping[str, Any],
        state: Mapping[str, Tensor],
        adapter: tuple[dict[str, Any], dict[str, Tensor]] | None,
    ) -> Self:
        """Build what is described, and load the weights of a folder in transformers' format.

        Args:
            description: The description.
            own: The configuration of the visual tower in the folder, which may be of another size.
            state: The weights.
            adapter: The folder's adapter, which is added to them.

        Raises:
            UserError: They are of other towers.
        """
        backbone = cls.from_description(description)
        family, source = backbone.family, backbone.source
        names = {*map(family.file_name, backbone.state_dict())}
        weights = family.renamed(state, names)
        if adapter is not None:
            weights = apply_adapter(adapter, weights, family, names, source)
        formats.check_towers(backbone, weights, family.file_name, source)
        formats.load_weights(
            backbone,
            weights,
            family.file_name,
            backbone._resized(lambda _, weight: weight, own),
            source,
            model=family.name,
            remedy=f": {formats.ONE_MODEL}",
            unused=family.unused(names),
        )
        return backbone

    @classmethod
    def from_openai(
        cls,
        state_dict_or_file: Mapping[str, Tensor] | str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        head_width: int | None = None,
        activation: Literal["quick_gelu", "gelu"] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_size: int | None = None,
        dtype: str = "float32",
        freeze_batch_norm: bool = True,
    ) -> Self:
        """Load weights in OpenAI's own layout, with a ViT or a modified ResNet; the shapes tell the architecture.

        They don't tell the width of attention heads and the activation. These are, the first that there is: what is
        given here; OpenAI's for a TorchScript archive of OpenAI's; what ``open_clip_config.json`` beside the file says;
        OpenAI's for a file that has the name and the shapes of one of OpenAI's public models, and for weights in memory
        with such shapes.

        Args:
            state_dict_or_file: The weights, of any floating type, or a ``.safetensors``, ``.pt`` or ``.bin`` file of
                them, which may be a training's of OpenCLIP. Those of the text tower may be absent; ``text`` is then
                None.
            tokenizer: A folder with the tokenizer, or CLIP's vocabulary ``bpe_simple_vocab_16e6.txt.gz`` itself; by
                default what lies beside the file, if anything does, and else CLIP's standard one, which is fetched from
                the hub when a text has to be read.
            head_width: Channels of each attention head of the visual tower; those of the text tower have 64, unless the
                configuration says otherwise.
            activation: Between the layers of transformers.
            mean: What is subtracted from pixels between 0 and 1, a number a channel; by default what the configuration
                says, or CLIP's.
            std: What they are divided by, likewise.
            image_size: See :meth:`from_pretrained`.
            dtype: The same.
            freeze_batch_norm: Keep batch norm in evaluation mode whatever ``train()`` says.

        Raises:
            UserError: The file doesn't exist, can't be read, has another layout, or its heads and activation are not
                known, or known to be others than are given; or the tokenizer isn't the text tower's.
        """
        given = _given(head_width=head_width, activation=activation)
        told: dict[str, Any] = {}
        if isinstance(state_dict_or_file, str | os.PathLike):
            source = os.fspath(state_dict_or_file)
            file = Path(source).expanduser()
            state = formats.openai_state(read_weights(file, inside="state_dict"), source)
            if tokenizer is None and has_tokenizer(file.parent):
                tokenizer = str(file.parent)
            if not state:
                raise UserError(
                    f"{source} has no weights: those of a frozen TorchScript archive are in its program, which is not"
                    " read; give the model's own state_dict()"
                )
            classes = program_classes(file)
            if formats.is_openais(classes):
                _check_known(given, formats.OPENAI, f"{source} is OpenAI's")
                told = dict(formats.OPENAI)
            elif (config := file.with_name(formats.OPEN_CLIP_CONFIG)).is_file():
                told = formats.read_open_clip_config(config)
            told["stem"] = "" if classes else file.stem
        else:
            source, state = "a state dict", dict(state_dict_or_file)
        for constant in formats.OPENAI_CONSTANTS:
            state.pop(constant, None)
        images = {"interpolation": "bicubic"}  # OpenAI's, and OpenCLIP's unless it says otherwise
        images |= {name: told.pop(name) for name in ("mean", "std", "interpolation") if name in told}
        visual_config, text_config = formats.openai_configs(state, source, **told | given)
        images |= _given(mean=mean, std=std)
        facts = {"source": source, "freeze_batch_norm": freeze_batch_norm, "dtype": dtype, **images}
        own, visual_config = visual_config, _sized(visual_config, visual_config["image_size"], image_size, source)
        backbone = cls.from_description({"visual_config": visual_config, "text_config": text_config, **facts})
        part = backbone._resized(formats.openai_part, own)
        formats.load_weights(backbone, state, formats.openai_name, part, source)
        if tokenizer is None:
            backbone._tokenizer_repository = STANDARD_TOKENIZER
        elif backbone.text is not None:
            backbone._read_tokenizer(Path(tokenizer).expanduser(), os.fspath(tokenizer))
        return backbone

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        """Build what ``description`` describes, from nothing else; the weights come with a state dict.

        Raises:
            UserError: It is not what ``description`` makes; or its values make no towers.
        """
        source = description.get("source", "")
        if not isinstance(source, str):
            raise UserError(f"a backbone has the source {source!r:.80}, where every backbone saves a name")
        # transformers' configurations take many more fields, down to the address of code to fetch and run.
        for name in ("visual_config", "text_config"):
            config = description.get(name)
            if config is None and name == "text_config":
                continue
            if not isinstance(config, Mapping):  # a list of pairs would make a dict all the same
                raise UserError(
                    f"the backbone {source!r} has no {name} that is a table of values, as every backbone saves"
                )
            try:
                family = family_of(config.get("kind", "vit" if name == "text_config" else None))
            except UserError as error:
                raise UserError(f"the {name} of {source!r}: {error}") from error
            tower = family.visual if name == "visual_config" else family.text
            fields = ("kind",) if tower is None else ("kind", *tower.fields)
            if unknown := [field for field in config if field not in fields]:
                raise UserError(f"the {name} of {source!r} has {some(map(repr, unknown))}, which no backbone saves")
        try:
            return cls(**description)
        except Exception as error:  # that values make no tower, torch and transformers say in many ways
            why = " ".join(str(error).split())  # of several lines
            raise UserError(f"the towers of {source!r} can't be built: {why}") from error

    @classmethod
    def _of_features(cls, options: Mapping[str, Any]) -> Self:
        """No towers, for features of a width."""
        if options.keys() != {"dim"}:
            raise UserError(
                "the backbone features has no weights, and the one option dim, the width of the features: give"
                " backbone_options.dim, or on the command line a feature table as data.manifest"
            )
        return cls({"kind": "features", "dim": options["dim"], "image_size": 0}, source="features")

    def keep_classes(self, embeddings: Mapping[str, Tensor]) -> None:
        """Have class embeddings in the place of a text tower, of a backbone that has no towers.

        Args:
            embeddings: ``(dim)`` by label.
        """
        self.text_config = {"kind": "features", "dim": self.dim, "labels": list(embeddings)}
        self.text_config["max_position_embeddings"] = 1
        self.text = ClassEmbeddings(list(embeddings), self.dim)
        self.text.embeddings.copy_(torch.stack(list(embeddings.values())))
        self.text.to(self.mean.device)

    def load_openai(self, state: Mapping[str, Tensor]) -> None:
        """Take weights in OpenAI's layout in the place of one's own, of towers built as OpenAI builds them.

        Args:
            state: The visual tower's, ``visual.*``, of any floating type; those of the text tower may be absent, and
                one's own stay then.

        Raises:
            UserError: They are of other towers; names what differs.
        """
        state = {name: weight for name, weight in state.items() if name not in formats.OPENAI_CONSTANTS}
        visual, text = formats.openai_configs(state, "the file", **formats.OPENAI)
        for tower, config, found in (("visual", self.visual_config, visual), ("text", self.text_config, text)):
            own = config or {}
            if values := [(name, value) for name, value in (found or {}).items() if value != own.get(name)]:
                other = some(f"{name} {value}, not {own.get(name)}" for name, value in values)
                raise UserError(
                    f"its {tower} tower is another than that of {self.source}, with {other}: give the CLIP that its"
                    " training began with"
                )
        visual_only = all(name.startswith("visual.") for name in state)
        mine = nn.ModuleDict({"visual": self.visual}) if visual_only else self
        formats.load_weights(mine, state, formats.openai_name, formats.openai_part, "the file")

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
            "interpolation": self.interpolation,
            "dtype": self.dtype,
            "source": self.source,
            "freeze_batch_norm": self.freeze_batch_norm,
        }

    def _resized(
        self, part: Callable[[str, Tensor], Tensor], own: Mapping[str, Any]
    ) -> Callable[[str, Tensor], Tensor]:
        """The function ``part`` of :func:`formats.load_weights`, followed by a change of the visual tower's size.

        Args:
            part: What belongs under a name of the backbone's, of a weight in a file.
            own: The configuration of the file's visual tower.
        """

        def resized(key: str, weight: Tensor) -> Tensor:
            weight, name = part(key, weight), key.removeprefix("visual.")
            return weight if name == key else self.family.resized_weight(name, weight, own, self.visual_config)

        return resized

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        mean, std = self.mean, self.std
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.mean.dtype in HALF:  # as a Trainer's bf16-true asks of all of a model
            self.mean, self.std = mean.to(self.mean.device), std.to(self.std.device)
        return self

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
        norms = any(isinstance(module, _BatchNorm) for module in self.visual.modules())
        if norms and not self.freeze_batch_norm:
            raise UserError(
                "gradient checkpointing passes each batch twice through a batch norm that moves: set "
                "freeze_batch_norm, or leave gradient_checkpointing out"
            )
        for block in self.family.blocks(self.visual):
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
            UserError: The images have another size, or haven't been normalised; or there is no tower.
        """
        if not self.image_size:
            raise UserError(
                "the model was made for features and has no tower that takes frames: give a feature table, as clip-m2df"
                " encode writes it with the tower of its training"
            )
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
        if weights.dtype in HALF:  # under autocast of the other half precision torch refuses them
            with torch.autocast(images.device.type, enabled=False):
                embeddings: Tensor = self.visual(images)
        else:
            embeddings = self.visual(images)
        return embeddings.reshape(*leading, self.dim)

    # Texts

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into tokens.

        Returns:
            ``(n, length)``, long, where length is the text tower's; shorter texts are padded as in its training (CLIP's
            with the end of text), and longer ones are cut so that the end of text stays.

        Raises:
            UserError: There is no text tower, or its tokenizer can't be had or isn't its own.
        """
        length = self._text_values()["max_position_embeddings"]
        if isinstance(self.text, ClassEmbeddings):
            return self.text.tokens(texts, repr(self.source))
        tokenizer = self._fetch_tokenizer() if self._tokenizer is None else self._tokenizer
        tokens = encoded(tokenizer, texts, repr(self.source))
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

    def _fetch_tokenizer(self, *, offline: bool = False) -> Tokenizer:
        if self._tokenizer_repository is None:
            raise UserError(
                f"backbone {self.source!r} was saved without its tokenizer, and can't read texts: make it from its own "
                f"weights again; {_REMEDY}"
            )
        try:
            folder = formats.fetch(self._tokenizer_repository, [["tokenizer.json"]], offline=offline)
        except UserError as error:
            raise UserError(
                f"backbone {self.source!r} has its weights, but no tokenizer, and that of "
                f"{self._tokenizer_repository!r} is not on this machine and can't be fetched: {_REMEDY}"
            ) from error
        return self._read_tokenizer(folder, self._tokenizer_repository)

    def _read_tokenizer(self, folder: Path, source: str) -> Tokenizer:
        self._tokenizer = read_tokenizer(folder, self._text_values(), source)
        return self._tokenizer


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The ``backbone_options`` that are given, without those that are None.

    Raises:
        UserError: An option does not exist; or a tokenizer, mean or std can't be one.
    """
    if not isinstance(options, Mapping):
        raise UserError(f"backbone_options is {options!r:.80}; it must be a table of options and their values")
    if unknown := [option for option in options if option not in BACKBONE_OPTIONS]:
        raise UserError(f"backbone_options has no {unknown[0]!r}; there are {', '.join(BACKBONE_OPTIONS)}")
    given = _given(**options)
    if isinstance(given.get("tokenizer"), os.PathLike):
        given["tokenizer"] = os.fspath(given["tokenizer"])
    for option in ("mean", "std"):
        if option in given and not formats.three_numbers(given[option], positive=option == "std"):
            above = ", above 0" if option == "std" else ""
            raise UserError(
                f"backbone_options.{option} is {given[option]!r:.80}; it must be three finite numbers{above}"
            )
    size = given.get("image_size", 1)
    if type(size) is not int or not 1 <= size <= MOST_SIDE:
        raise UserError(
            f"backbone_options.image_size is {size!r:.80}; it must be a whole number of pixels, at most {MOST_SIDE}"
        )
    if type(given.get("dim", 1)) is not int or given.get("dim", 1) < 1:
        raise UserError(f"backbone_options.dim is {given['dim']!r:.80}; it must be a whole number, at least 1")
    if given.get("dtype", "float32") not in DTYPES:
        raise UserError(f"backbone_options.dtype is {given['dtype']!r:.80}; it must be one of {', '.join(DTYPES)}")
    if not isinstance(given.get("tokenizer", ""), str):
        raise UserError(f"backbone_options.tokenizer is {given['tokenizer']!r:.80}; it must be a file or a folder")
    return given


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _check_known(options: Mapping[str, Any], known: Mapping[str, Any], why: str) -> None:
    """Refuse an activation or a head width that contradicts the weights."""
    for name in ("activation", "head_width"):
        if options.get(name) not in (None, known.get(name)):
            own = f", {known[name]}" if known else ""
            raise UserError(f"{name} is {options[name]!r:.80}, but {why}{own}: leave it out of backbone_options")


def _sized(own: Mapping[str, Any], size: int, asked: int | None, source: str) -> dict[str, Any]:
    """The visual configuration for images of a size.

    Args:
        own: The configuration.
        size: What images the tower is used with.
        asked: What somebody asks for instead, if anybody does.
        source: Where the weights come from, for messages.

    Raises:
        UserError: What is asked for is no multiple of a patch's side.
    """
    family = family_of(own["kind"])
    if asked in (None, size):
        try:
            return family.resized(own, size)
        except UserError as error:
            raise UserError(f"the configuration of {source} can't be used: {error}; fetch it again") from error
    patch = next(n for n in range(1, MOST_SIDE + 1) if family.grid({**own, "image_size": n}))
    if asked % patch:
        near = {max(asked // patch, 1) * patch, (asked // patch + 1) * patch}
        raise UserError(
            f"image_size is {asked}, no multiple of the {patch} pixels of {source}'s patches: give"
            f" {' or '.join(map(str, sorted(near)))}"
        )
    warnings.warn(
        f"{source} was made for images of {size} pixels: its positions are interpolated to those of {asked}, as"
        f" data.size or backbone_options.image_size asks; null for them and data.resize leaves it {size}",
        stacklevel=4,
    )
    return family.resized(own, asked)
