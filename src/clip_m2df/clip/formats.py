"""Towers' weights in the two formats that are in use: transformers' folders, and CLIP's files in OpenAI's layout.

Both are read without running anything in them, and come from this machine or from the hub. transformers, safetensors
and the hub's client are imported where they are used, because they take seconds.
"""

import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clip_m2df.clip.families import Family, check_values, families, family_of
from clip_m2df.clip.families.clip import MEAN as CLIP_MEAN
from clip_m2df.clip.families.clip import STD as CLIP_STD
from clip_m2df.errors import UserError, some
from clip_m2df.files import check_regular
from clip_m2df.weight_files import read_weights

THREE_NUMBERS = "they have to be three finite numbers each, and std above 0"

RN50_REPOSITORY, RN50_FILE = "timm/resnet50_clip.openai", "open_clip_model.safetensors"
# All of OpenAI's releases share one vocabulary of 49,408 tokens; this is the smallest repository that has it.
STANDARD_TOKENIZER = "openai/clip-vit-base-patch32"
# The weights of a folder in transformers' format, the best first: one file, or shards, which may have an index beside.
_WEIGHTS = (("model.safetensors", "model-*-of-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*-of-*.bin"))
# What names of files with weights end in.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# What OpenAI's files have beside the towers' weights, and OpenCLIP's.
OPENAI_CONSTANTS = ("input_resolution", "context_length", "vocab_size", "logit_scale", "logit_bias", "attn_mask")
# What lies beside weights in OpenAI's layout where they are not OpenAI's.
OPEN_CLIP_CONFIG = "open_clip_config.json"
# The weights in a folder of OpenCLIP's, the best first.
_OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# What is fetched of a model; a family without texts has no tokenizer.
_TOKENIZER = "tokenizer*.json"
MODEL_FILES = [["config.json", _TOKENIZER, files] for of_format in _WEIGHTS for files in of_format]
MODEL_FILES += [[OPEN_CLIP_CONFIG, _TOKENIZER, name] for name in _OPEN_CLIP_WEIGHTS]
_OPTIONAL_FILES = [
    *("preprocessor_config.json", "processor_config.json", "vocab.json", "merges.txt"),
    *("adapter_config.json", "adapter_model.safetensors", *(f"{name}.index.json" for name, _ in _WEIGHTS)),
]
# The class of OpenAI's models in TorchScript: in the published archives, and in those that the public code makes, which
# others ship under folders of their own.
_OPENAI_PROGRAM = r"__torch__\.(multimodal\.model\.multimodal_transformer\.Multimodal|(\w+\.)*clip\.model\.CLIP)"
# What OpenAI's own models have and shapes don't tell.
OPENAI: dict[str, Any] = {"activation": "quick_gelu", "head_width": 64}
# Those models by the names of their files: layers, width and patch size of the visual tower, the width of embeddings,
# height and width of images, and the width of the text tower.
_OPENAI_MODELS = {
    "ViT-B-32": (12, 768, 32, 512, 224, 512),
    "ViT-B-16": (12, 768, 16, 512, 224, 512),
    "ViT-L-14": (24, 1024, 14, 768, 224, 768),
    "ViT-L-14-336px": (24, 1024, 14, 768, 336, 768),
    "RN50": ([3, 4, 6, 3], 64, None, 1024, 224, 512),
    "RN101": ([3, 4, 23, 3], 64, None, 512, 224, 512),
    "RN50x4": ([4, 6, 10, 6], 80, None, 640, 288, 640),
    "RN50x16": ([6, 8, 18, 8], 96, None, 768, 384, 768),
    "RN50x64": ([3, 15, 36, 10], 128, None, 1024, 448, 1024),
}
# The fields of open_clip's configurations that are obeyed here, held against the weights, or of no account for
# embeddings. All others change the network or its images: they have to be off, or to be what OpenAI's layout has.
_OPEN_CLIP_FIELDS = {
    "model_cfg": (
        *("embed_dim", "vision_cfg", "text_cfg", "preprocess_cfg", "quick_gelu", "custom_text"),
        *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
    ),
    "vision_cfg": (
        *("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "patch_dropout"),
        *("final_ln_after_pool", "attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained", "timm_pool"),
        *("timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    ),
    "text_cfg": (
        *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id"),
        *("final_ln_after_pool", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    ),
    "preprocess_cfg": ("size", "mean", "std", "interpolation", "fill_color"),
}
_OPEN_CLIP_VALUES = {
    "model_cfg": {},
    "vision_cfg": {"pool_type": "tok", "pos_embed_type": "learnable", "block_type": "default"},
    "text_cfg": {"pool_type": "argmax", "proj_type": "linear", "block_type": "default"},
    "preprocess_cfg": {"mode": "RGB", "resize_mode": "shortest"},
}


def three_numbers(values: Any, *, positive: bool = False) -> bool:
    """Whether these can be the mean or, if positive, the std of images: a finite number a channel."""
    try:
        return len(values) == 3 and all(math.isfinite(value) for value in values) and (not positive or min(values) > 0)
    except (TypeError, OverflowError):
        return False


def load_weights(
    backbone: nn.Module,
    state: Mapping[str, Tensor],
    name_of: Callable[[str], str],
    part: Callable[[str, Tensor], Tensor],
    source: str,
    *,
    model: str = "CLIP",
    remedy: str = "",
    unused: Callable[[str], bool] = lambda name: False,
) -> None:
    """Load weights that have other names than the backbone's own.

    Args:
        backbone: Where the weights go, whatever the floating type that they come in. If it is on the device ``meta``,
            their names and shapes are checked alone.
        state: The weights.
        name_of: From the backbone's own name of a weight to its name in ``state``.
        part: From the backbone's own name, and the weight in ``state``, to what the backbone keeps of that weight.
        source: Where the weights come from, for messages.
        model: What they should be of, for messages.
        remedy: What helps if they are not, for messages.
        unused: Which of the names that are left over are no error.

    Raises:
        UserError: Names those that are missing, unexpected, of another shape, or not finite.
    """
    own = backbone.state_dict()
    names = {key: name_of(key) for key in own}
    problems = {name: "unexpected" for name in sorted(state.keys() - {*names.values()}) if not unused(name)}
    for key, name in names.items():
        if name in state:
            weight = part(key, state[name])
            if own[key].is_floating_point() and not weight.is_floating_point():
                problems[name] = f"of the type {weight.dtype}, which is no floating one"
            elif weight.shape == own[key].shape:
                own[key].copy_(weight)  # the very memory of the parameters; float16 becomes float32 here
                if not own[key].is_meta and not own[key].isfinite().all():
                    problems[name] = "not finite (NaN or infinite)"
            else:
                problems[name] = f"{tuple(weight.shape)} where {tuple(own[key].shape)} belongs"
        elif not name.endswith("num_batches_tracked"):  # files older than this counter have no use for it either
            problems[name] = "missing"
    if problems:
        named = some(f"{name} is {problem}" for name, problem in problems.items())
        raise UserError(f"the weights of {source} aren't those of one {model}: {named}{remedy}")


# Transformers' format

# What peft and its like call the weights that they add, and those that they wrap.
_ADAPTER = re.compile(
    r"(^|\.)(lora|dora|vera|lokr|hada|ia3|oft|boft|hra|fourierft|adapters?|base_layer|original_module|modules_to_save)"
    r"([._]|$)"
)
# The files of such weights but for peft's own, which are applied; lora stands in their names as a word.
_ADAPTER_FILE = re.compile(
    r"adapter_(?!config\.json$|model\.safetensors$)|(?i:(.*[^a-z])?lora([^a-z].*)?\.(safetensors|bin|pt)$)"
)
FEATURES_ARE_NO_WEIGHTS = (
    "is a feature table, and has no weights: give it as data.manifest (predict: --support, --videos), and as backbone"
    " features"
)
ONE_MODEL = "fetch config.json and weights of one whole model"
MERGE_IT = "merge it into the model and save that (peft's merge_and_unload)"
_NOT_APPLIED = f"which is not applied here: {MERGE_IT}"
# The steps of transformers' preprocessing of images, of which each is done unless a file or the family says otherwise;
# what other preprocessings have; and Pillow's numbers of the two ways to resize that are known here.
_STEPS = ("resize", "center_crop", "rescale", "normalize", "convert_rgb")
_OTHER_STEPS = {"offset", "rescale_offset", "pad_size", "size_divisor", "crop_pct", "use_square_size"}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


def read_folder(folder: Path, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The towers' description, without tokenizer, and the weights of a folder in transformers' format.

    Raises:
        UserError: It holds another model, no weights, or is damaged.
    """
    for name in ("config.json", "processor_config.json", "preprocessor_config.json"):
        check_regular(folder / name, "model's description")
    adapters = (file.name for file in folder.iterdir() if _ADAPTER_FILE.match(file.name))
    if adapter := min(adapters, default=""):
        raise UserError(f"{source} has an adapter, {adapter}, {_NOT_APPLIED}, or move it elsewhere")
    if not (folder / "config.json").is_file():
        files = sorted(file.name for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
        hint = f"; give the file of weights in it, {some(files)}" if files else ""
        if not (folder / OPEN_CLIP_CONFIG).is_file():
            hint = f", nor OpenCLIP's {OPEN_CLIP_CONFIG}{hint}"
        raise UserError(f"{source} isn't a model in transformers' format: there is no config.json in it{hint}")
    values = read_json(folder / "config.json")
    family = _family(values.get("model_type"), source)
    state = _read_folder_weights(folder, source)
    for table in (values, values.get("vision_config"), values.get("text_config")):
        layers = table.get("num_hidden_layers") if isinstance(table, dict) else None
        if isinstance(layers, int) and layers > len(state):  # transformers makes a list of so many
            raise UserError(f"{source} has {len(state)} weights, but its config.json {layers} layers: {ONE_MODEL}")
    try:
        visual, text = family.configs(values)
        for tower in filter(None, (visual, text)):
            check_values(tower)
    except Exception as error:  # transformers' validation errors have no common class
        why = " ".join(str(error).split())  # of several lines
        raise UserError(f"the config.json of {source} can't be used: {why}; fetch it again") from error
    description = {"visual_config": visual, "text_config": text}
    description |= _read_preprocessing(folder, family, visual["image_size"])
    return description, state


def check_towers(backbone: nn.Module, state: Mapping[str, Tensor], name_of: Callable[[str], str], source: str) -> None:
    """Refuse the weights of one tower alone.

    Raises:
        UserError: The state has none of the names of one of the two towers.
    """
    towers = {name_of(key): key.split(".")[0] for key in backbone.state_dict()}
    found = {tower for name, tower in towers.items() if name in state}
    if found and (missing := {*towers.values()} - found):
        raise UserError(
            f"{source} has the weights of one tower alone, and none of the {missing.pop()} tower that its config.json"
            f" describes: {ONE_MODEL}"
        )


def _known_families() -> list[Family]:
    """The families that have folders."""
    return [family for family in map(family_of, families()) if family.config]


def _described(folder: Path) -> Family | None:
    """The family of a folder's ``config.json``, if it has one."""
    if not (folder / "config.json").is_file():
        return None
    kind = read_json(folder / "config.json").get("model_type")
    return next((family for family in _known_families() if family.model_type == kind), None)


def _family(model_type: object, source: str) -> Family:
    """The family of a folder's ``model_type``.

    Raises:
        UserError: It is of none, or of a relative that is not taken.
    """
    known = _known_families()
    for family in known:
        if model_type == family.model_type:
            return family
        if (relative := family.relatives.get(str(model_type))) is not None:
            raise UserError(f"{source} is {relative}")
        if model_type in (f"{family.model_type}_vision_model", f"{family.model_type}_text_model"):
            tower = "visual" if "vision" in str(model_type) else "text"
            raise UserError(f"{source} is the {tower} tower of a {family.name} alone: give a folder of the whole model")
    types = some([family.model_type for family in known], len(known))
    raise UserError(f"{source} is a model of type {model_type!r:.80}: the backbone has to be one of {types}")


def _read_preprocessing(folder: Path, family: Family, image_size: int) -> dict[str, Any]:
    """Mean, std, interpolation and size of the images of a folder in transformers' format: its family's by default.

    Args:
        folder: The folder.
        family: Its family.
        image_size: Of the visual tower, by the configuration.

    Raises:
        UserError: It is damaged, or asks for what isn't done to videos here.
    """
    file, nested, values = folder / "preprocessor_config.json", folder / "processor_config.json", {}
    if file.is_file():
        values = read_json(file)
    if nested.is_file():
        processors = read_json(nested)
        if "image_processor" in processors or "video_processor" in processors:  # which transformers prefers
            file, values = nested, processors

    def unusable(why: object) -> UserError:
        return UserError(f"the preprocessing in {file} can't be used: {why}; mend or remove that file")

    if "video_processor" in values:
        raise unusable("it has a video_processor, which isn't applied here")
    values = values.get("image_processor", values)
    if not isinstance(values, dict):
        raise unusable("its image_processor is no table")
    values = {name: value for name, value in values.items() if value is not None or name.startswith("image_")}
    kind, own = values.get("image_processor_type", values.get("feature_extractor_type")), family.processor
    former = own.replace("ImageProcessor", "FeatureExtractor")
    if kind not in (None, own, f"{own}Fast", f"{own}Pil", former):
        raise unusable(f"{kind!r:.100} is no processor of {family.name}'s")
    do = {name: values.get(f"do_{name}", name != "center_crop" or family.crops) for name in _STEPS}
    if wrong := [name for name in _STEPS if type(do[name]) is not bool]:
        raise unusable(f"do_{wrong[0]} is {do[wrong[0]]!r:.100}, which is neither true nor false")
    needed = ("resize", "center_crop") if family.crops else ("resize",)
    if left_out := [f"do_{name}" for name in needed if not do[name]]:
        raise unusable(f"{some(left_out)} is false, but frames are always resized and cropped to the tower's size")
    other = {name for name in values if name.startswith("do_")} - {f"do_{name}" for name in _STEPS} | _OTHER_STEPS
    if done := [name for name in values if name in other and values[name]]:
        raise unusable(f"it has {some(done)}, which isn't done here")
    image_size = _read_sides(values, family, image_size, unusable)
    resample = values.get("resample", family.resample)
    if type(resample) is not int or resample not in _INTERPOLATIONS:
        raise unusable(
            f"its resample is {resample!r:.100}, but frames are resized by 2 (bilinear) or 3 (bicubic) alone"
        )
    try:
        mean, std = list(values.get("image_mean", family.mean)), list(values.get("image_std", family.std))
        if not do["normalize"]:
            mean, std = [0.0] * 3, [1.0] * 3
        if not three_numbers(mean) or not three_numbers(std, positive=True):
            raise unusable(f"image_mean is {mean!r:.100} and image_std {std!r:.100}: {THREE_NUMBERS}")
        # Of what pixels between 0 and 1 become before: nothing, unless the configuration says otherwise.
        scale = 255 * values.get("rescale_factor", 1 / 255) if do["rescale"] else 255.0
        if not scale > 0:
            raise unusable(f"its rescale_factor is {values['rescale_factor']!r:.100}, and no number above 0")
        mean, std = [value / scale for value in mean], [value / scale for value in std]
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        raise unusable(error) from error
    return {"mean": mean, "std": std, "interpolation": _INTERPOLATIONS[resample], "image_size": image_size}


def _read_sides(
    values: Mapping[str, Any], family: Family, image_size: int, unusable: Callable[[object], UserError]
) -> int:
    """Height and width of the images that a preprocessing makes.

    Raises:
        UserError: The visual tower takes no such images.
    """
    told: dict[str, Any] = {}
    for name in ("size", "crop_size"):
        sides = values.get(name)
        if type(sides) is int:
            both = name == "crop_size" or values.get("default_to_square") is True
            sides = {"height": sides, "width": sides} if both else {"shortest_edge": sides}
        elif isinstance(sides, dict):
            sides = {side: length for side, length in sides.items() if length is not None}
        told[name] = sides
    last = "crop_size" if family.crops else "size"  # the step that decides on the images' size
    if family.any_size and isinstance(told[last], dict) and type(told[last].get("height")) is int:
        image_size = max(told[last]["height"], 1)
    square = {"height": image_size, "width": image_size}
    for name, right in (("size", {"shortest_edge": image_size} if family.crops else square), ("crop_size", square)):
        own = told[name]
        if family.any_size and family.crops and name == "size" and isinstance(own, dict) and {*own} == {*right}:
            edge = own["shortest_edge"]
            if type(edge) is int and edge >= image_size:
                continue  # of which the middle is cut out, as data.resize and data.size have it
        if own not in (None, right):
            raise unusable(f"its {name} is {values[name]!r:.100}, where the tower has {json.dumps(right)}")
    return image_size


def _read_folder_weights(folder: Path, source: str) -> dict[str, Tensor]:
    """The weights of a folder in transformers' format: those that transformers' own names say, and no stray ones."""
    state: dict[str, Tensor] = {}
    for name, pattern in _WEIGHTS:
        index = folder / f"{name}.index.json"
        shards: set[str] = set()
        files: Any = None
        if (folder / name).is_file():
            shards = {name}
        elif index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise UserError(f"{index} is damaged: it has no weight_map from weights to files; fetch it again")
            shards = {*files.values()}
            if outside := [file for file in shards if Path(file).name != file or not file]:
                raise UserError(f"{index} leads out of its folder, to {outside[0] or 'no name'}: fetch it again")
        else:
            for file in sorted(folder.glob(pattern)):
                if match := re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(\..*)", file.name):
                    start, _, of, end = match.groups()
                    shards |= {f"{start}{n:05}-of-{of}{end}" for n in range(1, int(of) + 1)}
        if missing := sorted(file for file in shards if not os.path.isfile(folder / file)):
            raise UserError(f"{source} lacks {some(missing)} of its weights: fetch the model again")
        for shard in sorted(shards):
            part = read_weights(folder / shard)
            listed = part.keys() if files is None else {key for key in files if files[key] == shard}
            if wrong := sorted((part.keys() ^ listed) | (part.keys() & state.keys())):
                others = "the others" if files is None else index.name
                raise UserError(
                    f"{source} has shards of more than one model: {shard} and {others} don't agree on {some(wrong)}: "
                    "fetch the model again"
                )
            state |= part
        if shards:
            break
    else:
        there = sorted(file.name for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
        hint = f"; rename the one to be taken, of {some(there)}" if there else ""
        raise UserError(
            f"{source} has no weights: neither model.safetensors nor pytorch_model.bin is in the folder{hint}"
        )
    if adapted := [key for key in state if _ADAPTER.search(key)]:
        raise UserError(f"{source} has the weights of an adapter, {some(adapted)}, {_NOT_APPLIED}")
    return state


def read_json(file: Path) -> dict[str, Any]:
    """A table of JSON.

    Raises:
        UserError: It is damaged, or something else.
    """
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
    name = key.removeprefix("visual.model.").removeprefix("text.model.")
    for pattern, replacement in _OPENAI_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def openai_part(key: str, weight: Tensor) -> Tensor:
    """What the backbone keeps under ``key`` of the weight that has its name in OpenAI's layout."""
    name = openai_name(key)
    if "attn.in_proj_" in name:  # OpenAI's layout stacks the maps to queries, keys and values
        parts = weight.chunk(3) if weight.ndim else ()
        return parts["qkv".index(key.split("_proj.")[0][-1])] if len(parts) == 3 else weight.new_empty(0)
    if name in ("visual.proj", "text_projection"):  # and multiplies by its projections from the right
        return weight.T if weight.ndim == 2 else weight
    return weight


def told_options(description: Mapping[str, Any]) -> dict[str, Any]:
    """The ``backbone_options`` that a backbone's description amounts to, without the tokenizer.

    None of them where the description is damaged; building it is an error then.
    """
    try:
        vision, text = description["visual_config"], description["text_config"] or {}
        heads, activation = vision.get("head_width", OPENAI["head_width"]), text.get("hidden_act")
        if "num_attention_heads" in vision:
            heads, activation = vision["hidden_size"] // vision["num_attention_heads"], vision["hidden_act"]
        own = {"image_size": vision["image_size"], "dtype": description.get("dtype", "float32")}
        own |= {"mean": description["mean"], "std": description["std"]}
        return {"activation": activation, "head_width": heads, **own}
    except (ArithmeticError, AttributeError, LookupError, TypeError):
        return {}


def is_openais(classes: Sequence[str]) -> bool:
    """Whether a TorchScript archive is one of OpenAI's models, by the classes in it.

    Who traces OpenAI's code may have imported its one file under any name. OpenCLIP's classes, of which some have the
    same names, lie in several files.
    """
    model = classes[0] if classes else ""
    module = model.removesuffix(".CLIP")
    same_file = {f"{module}.{name}" for name in ("Transformer", "ResidualAttentionBlock", "LayerNorm", "QuickGELU")}
    towers = {f"{module}.VisionTransformer", f"{module}.ModifiedResNet"}
    copied = (
        module != model and "open_clip" not in module and same_file <= {*classes} and not towers.isdisjoint(classes)
    )
    return copied or re.fullmatch(_OPENAI_PROGRAM, model) is not None


def openai_state(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights by their names in OpenAI's layout, without what trainings and OpenCLIP put before them.

    Raises:
        UserError: A weight has no name, or two have one name then.
    """
    # Of DistributedDataParallel and torch.compile; and of a model whose text tower is a module of its own.
    before = re.compile(
        r"^(?:(?:module|_orig_mod)\.)*(?:text\.(?=transformer\.|token_|positional_|ln_final\.|text_proj))?"
    )
    if wrong := [name for name in state if not isinstance(name, str)]:
        raise UserError(f"{source} isn't a table of weights by their names: one is {wrong[0]!r:.80}")
    named = {before.sub("", name): weight for name, weight in state.items()}
    if len(named) < len(state):
        raise UserError(f"{source} has several models' weights, with and without module. before their names: save one")
    return named


def open_clip_weights(folder: Path) -> Path | None:
    """The file of weights in a folder of OpenCLIP's; None for any other, and for one that is transformers' as well.

    Repositories often hold one model in both formats. transformers' is taken then, as it always was.
    """
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        return None
    described = _described(folder) is not None
    if described and any(any(folder.glob(pattern)) for of_format in _WEIGHTS for pattern in of_format):
        return None
    return next((folder / name for name in _OPEN_CLIP_WEIGHTS if (folder / name).is_file()), None)


def read_open_clip_config(file: Path) -> dict[str, Any]:
    """What the configuration of a model of open_clip's says of it and of its images.

    Returns:
        ``mean``, ``std`` and ``interpolation`` of the images; the rest goes to :func:`openai_configs`.

    Raises:
        UserError: It is damaged, or of a model or of images that OpenAI's layout doesn't have.
    """
    values = read_json(file)
    model = values.get("model_cfg", values)
    vision, text = (model.get(name) if isinstance(model, dict) else None for name in ("vision_cfg", "text_cfg"))
    images = values.get("preprocess_cfg") or {}
    if not isinstance(vision, dict) or not isinstance(text, dict) or not isinstance(images, dict):
        raise UserError(f"{file} is damaged: it has no model_cfg with vision_cfg and text_cfg; fetch it again")
    stated = {"model_cfg": model, "vision_cfg": vision, "text_cfg": text, "preprocess_cfg": images}
    for name, table in stated.items():
        for field, value in table.items():
            if field in _OPEN_CLIP_FIELDS[name] or value in (None, False, {}, _OPEN_CLIP_VALUES[name].get(field)):
                continue
            if field == "resize_mode":
                raise UserError(
                    f"{file} has the resize_mode {value!r:.80}; frames are resized by their short side and cropped: to"
                    " take the weights all the same, write shortest there"
                )
            raise UserError(
                f"{file} describes a model of another kind: its {name} has {field}, unknown here ({value!r:.80})"
            )
    heads = {"head_width": vision.get("head_width", 64), "text_heads": text.get("heads", 8)}
    if wrong := [name for name, value in heads.items() if type(value) is not int or value < 1]:
        raise UserError(f"{file} is damaged: {wrong[0]} is {heads[wrong[0]]!r:.80}; fetch it again")
    quick = model.get("quick_gelu") or False
    interpolation = images.get("interpolation") or "bicubic"
    for name, value, known in (
        ("quick_gelu", quick, (True, False)),
        ("interpolation", interpolation, ("bicubic", "bilinear", "random")),
    ):
        if value not in known:
            raise UserError(f"{file}: {name} is {value!r:.80}; it has to be one of {some(map(str, known))}")
    mean, std = images.get("mean") or CLIP_MEAN, images.get("std") or CLIP_STD
    if not three_numbers(mean) or not three_numbers(std, positive=True):
        raise UserError(f"{file}: mean is {mean!r:.80} and std {std!r:.80}: {THREE_NUMBERS}")
    return {
        **heads,
        "activation": "quick_gelu" if quick else "gelu",
        "stated": stated,
        "mean": mean,
        "std": std,
        "interpolation": "bilinear" if interpolation == "bilinear" else "bicubic",  # random is of trainings
    }


def openai_configs(
    state: Mapping[str, Tensor],
    source: str,
    *,
    stem: str | None = None,
    head_width: int | None = None,
    text_heads: int | None = None,
    activation: str | None = None,
    stated: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Read the architecture of the visual and of the text tower, if there is one, off the shapes of the weights.

    Args:
        state: The weights.
        source: Where they come from, for messages.
        stem: The file's name without its ending, "" where it is a program of other people's; None of weights in memory,
            which are taken for OpenAI's by their shapes alone.
        head_width: Channels of each attention head of the visual tower. Shapes don't tell it; OpenAI's have 64.
        text_heads: Attention heads of the text tower; by default they have 64 channels each.
        activation: Between the layers of transformers: ``quick_gelu``, as OpenAI has it, or ``gelu``.
        stated: The tables of a configuration; it may be another model's.

    Raises:
        UserError: The weights are of another layout, or the configuration is another model's; the width of a tower is
            no multiple of its heads; or heads and activation are not known.
    """
    try:
        shapes = _shapes(state)
    except (IndexError, ValueError) as error:  # of a weight with other axes
        raise UserError(f"{source} isn't CLIP in OpenAI's layout: its weights have other shapes ({error})") from error
    except KeyError as error:
        if "token_embedding.weight" in state and not any(name.startswith("visual.") for name in state):
            raise UserError(f"{source} has the text tower alone: give a file that has the visual tower too") from error
        if state.keys() == {"features"}:
            raise UserError(f"{source} {FEATURES_ARE_NO_WEIGHTS}") from error
        raise UserError(
            f"{source} isn't CLIP in OpenAI's layout: {error.args[0]} is missing; "
            f"it has {some(sorted(state))}. Weights in transformers' format are given by their folder."
        ) from error
    vision, text = shapes["vision_cfg"], shapes["text_cfg"]
    resnet = vision["patch_size"] is None
    unit = vision["patch_size"] or 32
    image_size, stated = vision["image_size"], stated or {}
    for table, fields in shapes.items():
        for field, own in fields.items():
            said = stated.get(table, {}).get(field)
            if isinstance(said, list) and field.endswith("_size") and len(said) == 2 and said[0] == said[1]:
                said = said[0]
            if field == "mlp_ratio":  # the width between the layers is rounded down
                same = isinstance(said, int | float) and 0 <= fields["width"] * said - own < 1
                own /= fields["width"] or 1
            elif field == "image_size" and type(said) is int:  # a remainder without a patch is never read
                same = said // unit == own // unit
                image_size = said
            else:
                same = said == own
            if said is not None and not same:
                name = f"{table}.{field}".removeprefix("model_cfg.")
                raise UserError(
                    f"the {OPEN_CLIP_CONFIG} beside {source} is another model's: its {name} is {said!r:.80}, and the"
                    f" weights have {own}"
                )
    if (size := stated.get("preprocess_cfg", {}).get("size")) not in (None, image_size, [image_size, image_size]):
        raise UserError(
            f"the {OPEN_CLIP_CONFIG} beside {source} makes images of {size!r:.80} pixels, where the tower takes"
            f" {image_size}"
        )
    if (head_width is None or activation is None) and (model := _openai_model(shapes, stem)):
        head_width, activation = head_width or OPENAI["head_width"], activation or OPENAI["activation"]
        if stem is not None:
            warnings.warn(
                f"{source} is taken for OpenAI's {model}, whose name and shapes it has: {activation}, and heads of"
                f" {head_width} channels; if it is another model's, give backbone_options",
                stacklevel=2,
            )
    if head_width is None or (activation is None and not (resnet and not text)):
        missing, choices = [], []
        if head_width is None:
            missing.append("the width of their heads")
            choices.append("head_width (64; ViT-H/14 80, g/14 88, bigG/14 104)")
        if activation is None:
            missing.append("their activation")
            choices.append(
                "activation (quick_gelu of OpenAI's, MetaCLIP's and DFN's models, gelu of LAION-2B's and DataComp's)"
            )
        raise UserError(
            f"the weights of {source} {'have the shapes of no model' if stem is None else 'are not'} known to be"
            f" OpenAI's, and don't tell {' and '.join(missing)}: put the model's {OPEN_CLIP_CONFIG} beside the file, or"
            f" give of backbone_options {' and '.join(choices)}; a file of OpenAI's own is known by its name, such as"
            " ViT-B-16.pt, and its shapes"
        )
    if activation not in ("gelu", "quick_gelu", None):
        raise UserError(f"activation is {activation!r:.80}; it must be gelu or quick_gelu")
    heads = _heads(vision["width"] * (32 if resnet else 1), head_width, f"the visual tower of {source}")
    if resnet:
        visual: dict[str, Any] = {
            "kind": "resnet",
            **{name: vision[name] for name in ("layers", "width")},
            "dim": shapes["model_cfg"]["embed_dim"],
            "image_size": image_size,
            **({} if head_width == OPENAI["head_width"] else {"head_width": head_width}),
        }
    else:
        visual = {
            "kind": "vit",
            **_transformer_config(vision, heads, activation, shapes["model_cfg"]["embed_dim"]),
            "image_size": image_size,
            "patch_size": unit,
        }
    if not text:
        return visual, None
    if text_heads is None:
        text_heads = _heads(text["width"], OPENAI["head_width"], f"the text tower of {source}")
    elif text["width"] % text_heads:
        raise UserError(
            f"{source}: the width {text['width']} of the text tower isn't a multiple of its {text_heads} heads"
        )
    return visual, {
        **_transformer_config(text, text_heads, activation, shapes["model_cfg"]["embed_dim"]),
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["context_length"],
        "eos_token_id": 2,  # transformers' sign for: the end of text is the largest id of each text
    }


def _shapes(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What the shapes of weights tell, in the words of open_clip's configurations, but for ``mlp_ratio``: that width.

    Raises:
        KeyError: Names a weight that isn't there.
    """
    if "visual.attnpool.positional_embedding" in state:
        dim = state["visual.attnpool.c_proj.weight"].shape[0]
        vision = {
            "layers": [_count(state, f"visual.layer{stage}") for stage in (1, 2, 3, 4)],
            "width": state["visual.layer1.0.conv1.weight"].shape[0],
            "patch_size": None,
            "image_size": _side(state["visual.attnpool.positional_embedding"]) * 32,
        }
    else:
        patch_size = state["visual.conv1.weight"].shape[-1]
        dim = state["visual.proj"].shape[1]
        vision = {
            **_transformer_shapes(state, "visual.transformer"),
            "patch_size": patch_size,
            "image_size": _side(state["visual.positional_embedding"]) * patch_size,
        }
    text: dict[str, Any] = {}
    if not all(key.startswith("visual.") for key in state):
        text = {
            **_transformer_shapes(state, "transformer"),
            "vocab_size": state["token_embedding.weight"].shape[0],
            "context_length": state["positional_embedding"].shape[0],
        }
        dim = state["text_projection"].shape[1]
    return {"model_cfg": {"embed_dim": dim}, "vision_cfg": vision, "text_cfg": text}


def _transformer_shapes(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    intermediate, width = state[f"{prefix}.resblocks.0.mlp.c_fc.weight"].shape
    return {"layers": _count(state, f"{prefix}.resblocks"), "width": width, "mlp_ratio": intermediate}


def _transformer_config(shapes: Mapping[str, Any], heads: int, activation: str | None, dim: int) -> dict[str, Any]:
    return {
        "hidden_size": shapes["width"],
        "intermediate_size": shapes["mlp_ratio"],
        "num_hidden_layers": shapes["layers"],
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": dim,
    }


def _heads(width: int, head_width: int, tower: str) -> int:
    if type(head_width) is not int or head_width < 1:
        raise UserError(f"head_width is {head_width!r:.80}; it must be a whole number above 0, such as 64")
    if width % head_width:
        raise UserError(f"heads of {head_width} channels: the width {width} of {tower} isn't a multiple of that")
    return width // head_width


def _openai_model(shapes: Mapping[str, Mapping[str, Any]], stem: str | None) -> str:
    """The name of the model of OpenAI's whose weights these are, as far as can be told, or ""."""
    vision, text = shapes["vision_cfg"], shapes["text_cfg"]
    own = (*(vision[name] for name in ("layers", "width", "patch_size")), shapes["model_cfg"]["embed_dim"])
    texts = tuple(text.get(name) for name in ("width", "layers", "context_length", "vocab_size"))
    for name, (*visual, image_size, text_width) in _OPENAI_MODELS.items():
        if own != tuple(visual):
            continue
        whole = vision["image_size"] == image_size and (not text or texts == (text_width, 12, 77, 49408))
        if stem is None or (whole and stem.lower() == name.lower()):
            return name
    return "ResNet" if stem is None and vision["patch_size"] is None and not text else ""


def _count(state: Iterable[str], prefix: str) -> int:
    """How many numbered modules there are under a prefix, at least one; whether they are the first, loading tells."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return max(len({match[1] for key in state if (match := pattern.match(key))}), 1)


def _side(positions: Tensor) -> int:
    """Height and width of the grid that ``(1 + height * width, ...)`` positions stand for."""
    return math.isqrt(positions.shape[0] - 1)


# Names, and the hub


def looks_like_a_path(name: str) -> bool:
    """Whether what names no file or folder was meant to, and can be no model of the hub."""
    name = name.lower()
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name or name.endswith(WEIGHT_SUFFIXES)


# What people call CLIP's models, without what is not a letter or digit, and what the option ``backbone`` takes.
_KNOWN_BACKBONES = {
    "vitb16": "openai/clip-vit-base-patch16",
    "vitb32": "openai/clip-vit-base-patch32",
    "vitl14": "openai/clip-vit-large-patch14",
    "vitl14336": "openai/clip-vit-large-patch14-336",
    "rn50": "rn50",
    "tiny": "tiny",
}


def known_backbone(name: str) -> str:
    """What the option ``backbone`` takes for one of OpenAI's models as others call it, such as ``ViT-B/16``; or ""."""
    letters = re.sub(r"\.pt$|openai|clip|quickgelu|patch|224|[^a-z0-9]|px$", "", name.lower())
    letters = letters.replace("base", "b").replace("large", "l").replace("resnet", "rn")
    return _KNOWN_BACKBONES.get(letters, "")


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
        described = _described(folder)
        needed = [pattern for pattern in patterns if pattern != _TOKENIZER or described is None or described.text]
        if all(any(folder.glob(pattern)) for pattern in needed):
            return folder
    raise UserError(
        f"the weights or the tokenizer of {repository!r} are not on this machine and can't be fetched: connect once, "
        f"or download {', '.join(choices[0])} from https://huggingface.co/{repository} and give the folder, or give a "
        "file of weights that you have, such as OpenAI's ViT-B-16.pt or RN50.pt"
    ) from reason
