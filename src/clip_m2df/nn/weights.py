"""Weights by their names: read from files, and checked against a module before they go into it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_m2df.archive import check_archive
from clip_m2df.errors import UserError, some


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


def check_weights(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are not exactly those of a module.

    Args:
        module: where they are to go.
        state: the weights.
        what: what they should be, for the message.

    Raises:
        UserError: names the first few that are missing, unknown or of another shape.
    """
    expected = module.state_dict()
    if missing := [key for key in expected if key not in state]:
        raise UserError(f"not {what}: missing {some(missing)}")
    if unknown := [key for key in state if key not in expected]:
        raise UserError(f"not {what}: unknown {some(unknown)}")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise UserError(f"not {what}: {key} is {tuple(value.shape)}, expected {tuple(expected[key].shape)}")
