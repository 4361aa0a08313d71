"""Trace a small CLIP of OpenAI's own class, as OpenAI's released files are: ``tests/golden/openai_archive.{pt,npz}``.

Usage: python scripts/golden_archive.py FOLDER [--out FOLDER]

FOLDER is that of the unpacked package clip-anytorch, whose ``clip/model.py`` needs torch alone. The archive has random
weights in half precision; beside it are inputs, and what the model makes of them in full precision. Left out of it are
the places of the traced code, which are folders of whoever runs this.
"""

import argparse
import importlib.util
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch

OUT = Path(__file__).resolve().parents[1] / "tests/golden"
IMAGE, PATCH, CONTEXT, VOCABULARY = 16, 8, 6, 30
WIDTH = 64  # one head, as wide as all of OpenAI's


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("clip.model", options.folder / "clip" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    clip = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(clip)

    torch.manual_seed(0)
    model = clip.CLIP(16, IMAGE, 1, WIDTH, PATCH, CONTEXT, VOCABULARY, WIDTH, WIDTH // 64, 1).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # as large as trained ones, so that the activation matters
            torch.nn.init.normal_(parameter, std=2 / parameter[0].numel() ** 0.5)
    clip.convert_weights(model)
    for name, value in (("input_resolution", IMAGE), ("context_length", CONTEXT), ("vocab_size", VOCABULARY)):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))  # as they are in the released files
    image = torch.randn(2, 3, IMAGE, IMAGE)
    tokens = torch.randint(1, VOCABULARY - 1, (2, CONTEXT))
    tokens[0, 3], tokens[1, 5] = VOCABULARY - 1, VOCABULARY - 1  # the end of text
    with warnings.catch_warnings(), torch.no_grad(), TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        inputs = {"forward": (image, tokens), "encode_image": (image,), "encode_text": (tokens,)}
        traced = Path(folder, "openai_archive.pt")
        torch.jit.trace_module(model, inputs, check_trace=False).save(str(traced))
        with ZipFile(traced) as whole, ZipFile(options.out / traced.name, "w") as kept:
            for name in whole.namelist():
                if not name.endswith(".debug_pkl"):
                    kept.writestr(ZipInfo(name), whole.read(name))
        model = model.float()
        features = {"image_features": model.encode_image(image), "text_features": model.encode_text(tokens)}
    arrays = {name: value.numpy() for name, value in ({"image": image, "tokens": tokens} | features).items()}
    np.savez(options.out / "openai_archive.npz", **arrays)


if __name__ == "__main__":
    main()
