"""Write tests/golden/towers.npz, what OpenAI's and OpenCLIP's own code make of small random weights.

Usage: python scripts/golden_towers.py OPENAI OPENCLIP

Two folders: one with OpenAI's ``clip/model.py``, as the wheel of clip-anytorch 2.6.0 has it, and one with
``open_clip``, as that of open_clip_torch 3.3.0 has it, which imports torchvision and ftfy. The weights are drawn by
tests/clip/towers.py and stay out of the file; it has their names and shapes, OpenCLIP's configuration of each model,
and the embeddings.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.clip.towers import drawn_inputs, drawn_weights  # noqa: E402

VIT = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None}
TEXT = {"context_length": 77, "vocab_size": 90, "width": 128, "heads": 2, "layers": 2}
# Models in the words of OpenCLIP's configurations: first those of OpenAI's code, then those of OpenCLIP's.
OPENAI: dict[str, dict[str, Any]] = {
    "openai_vit": {"quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "openai_resnet": {"quick_gelu": True, "vision_cfg": RESNET, "text_cfg": {**TEXT, "context_length": 20}},
}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "gelu": {"vision_cfg": VIT, "text_cfg": TEXT},
    "quick_gelu": {"quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "heads_of_80": {  # as in ViT-H/14
        "vision_cfg": {**VIT, "width": 160, "head_width": 80},
        "text_cfg": {**TEXT, "width": 96, "heads": 6, "context_length": 16},
    },
    "heads_of_88": {  # as in ViT-g/14
        "vision_cfg": {**VIT, "width": 176, "head_width": 88, "mlp_ratio": 4.3637},
        "text_cfg": {**TEXT, "width": 96, "heads": 1, "mlp_ratio": 2.5, "context_length": 32},
    },
    "heads_of_104": {  # as in ViT-bigG/14
        "quick_gelu": True,
        "vision_cfg": {**VIT, "width": 208, "head_width": 104, "mlp_ratio": 4.9231},
        "text_cfg": {**TEXT, "width": 80, "heads": 4, "layers": 3, "context_length": 9},
    },
    "heads_of_32": {"vision_cfg": {**VIT, "head_width": 32}, "text_cfg": {**TEXT, "heads": 8}},
    "custom_text": {"custom_text": True, "vision_cfg": {**VIT, "image_size": 36}, "text_cfg": TEXT},
    "resnet_gelu": {"vision_cfg": RESNET, "text_cfg": {**TEXT, "width": 96, "heads": 3, "context_length": 20}},
    "resnet_heads_of_32": {"quick_gelu": True, "vision_cfg": {**RESNET, "head_width": 32}, "text_cfg": TEXT},
}


def openai_model(code: Any, config: dict[str, Any]) -> Any:
    """The model of OpenAI's class that a configuration describes."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    return code.CLIP(
        config["embed_dim"],
        *(vision[name] for name in ("image_size", "layers", "width", "patch_size")),
        *(text[name] for name in ("context_length", "vocab_size", "width", "heads", "layers")),
    )


def main(openai: str, open_clip: str) -> None:
    """Build each model, give it its weights and inputs, and write the file."""
    specification = importlib.util.spec_from_file_location("openai_model", Path(openai, "clip", "model.py"))
    assert specification is not None
    assert specification.loader is not None
    code = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(code)
    sys.path.insert(0, open_clip)
    from open_clip.model import CLIP, CustomTextCLIP  # type: ignore[import-not-found]

    arrays = {}
    for seed, (name, parts) in enumerate({**OPENAI, **OPEN_CLIP}.items()):
        config = {"embed_dim": 48, **parts}
        if name in OPENAI:
            model = openai_model(code, config)
        else:
            kind = CustomTextCLIP if config.get("custom_text") else CLIP
            model = kind(**{field: value for field, value in config.items() if field != "custom_text"})
        # Counters and what is no weight of the towers stay as they are.
        own = {key: weight for key, weight in model.state_dict().items() if weight.ndim and weight.is_floating_point()}
        shapes = {key: list(weight.shape) for key, weight in own.items()}
        model.load_state_dict(drawn_weights(shapes, seed), strict=False)
        text = config["text_cfg"]
        images, tokens = drawn_inputs(
            config["vision_cfg"]["image_size"], text["context_length"], text["vocab_size"], seed
        )
        with torch.no_grad():
            arrays[f"{name}/image"] = model.eval().encode_image(images).numpy()
            arrays[f"{name}/text"] = model.encode_text(tokens).numpy()
        facts = {"seed": seed, "config": config, "shapes": shapes}
        arrays[f"{name}/facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    np.savez_compressed(ROOT / "tests" / "golden" / "towers.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
