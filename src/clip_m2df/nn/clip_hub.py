"""CLIP's files from the hub, or from this machine's cache of it; its client is imported where it is used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from clip_m2df.errors import UserError

RN50_REPOSITORY, RN50_FILE = "timm/resnet50_clip.openai", "open_clip_model.safetensors"
# All of OpenAI's releases share one vocabulary of 49,408 tokens; this is the smallest repository that has it.
STANDARD_TOKENIZER = "openai/clip-vit-base-patch32"

_WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")

# What is fetched of a model; the second where it has no safetensors.
MODEL_FILES = [
    ["config.json", "tokenizer*.json", "model*.safetensors"],
    ["config.json", "tokenizer*.json", "pytorch_model*.bin"],
]
_OPTIONAL_FILES = ["preprocessor_config.json", "processor_config.json", "vocab.json", "merges.txt"]


def looks_like_a_path(name: str) -> bool:
    """Whether what names no file or folder was meant to, and can be no model of the hub."""
    return (
        name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name or name.lower().endswith(_WEIGHT_FILES)
    )


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
