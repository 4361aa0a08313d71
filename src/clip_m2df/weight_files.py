"""Files of named tensors, read without running anything that is in them.

safetensors is imported where it is used, because it takes long.
"""

import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from clip_m2df.errors import UserError
from clip_m2df.files import check_regular

# How a zip file starts.
_ZIP = b"PK\3\4"


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
        if "pytorch-lightning_version" in state:
            raise UserError(f"{file} is a training's checkpoint, no CLIP's weights: predict takes it as --ckpt_path")
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


def check_archive(path: str | os.PathLike[str]) -> None:
    """Hold all of an archive against its checksums: damage in a tensor is a wrong number otherwise.

    A file that is no zip file, such as those of torch before 1.6, has none, and is left to ``torch.load``.

    Args:
        path: The file; it is read once, from one end to the other.

    Raises:
        ValueError: If it is damaged, or not as ``torch.save`` writes it: nothing in it is compressed or overlaps, so it
            takes no more memory than disk.
        OSError: If it cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                    raise ValueError("it is compressed")
                if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
                    raise ValueError("its members are larger than the whole")
                damaged = archive.testzip()
        except ValueError:
            raise
        except Exception as error:  # what zipfile makes of damage has no common class
            raise ValueError(f"it is no whole zip file: {error}") from error
    if damaged is not None:
        raise ValueError(f"{damaged} in it is damaged")
