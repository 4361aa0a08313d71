"""Files of named tensors, written as safetensors and read without running anything that is in them.

safetensors is imported where it is used, because it takes long.
"""

import hashlib
import os
import pickletools
import re
import sys
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_m2df.errors import UserError
from clip_m2df.files import check_regular

# How a zip file starts.
_ZIP = b"PK\3\4"


def read_weights(file: Path, inside: str = "") -> dict[str, Tensor]:
    """Read a file of named tensors, without running anything that is in it.

    Args:
        file: ``.safetensors``, what ``torch.save`` wrote, or a TorchScript archive, of which the weights are read and
            the program is not.
        inside: The key of a training checkpoint under which its weights lie, where it has that key.

    Raises:
        UserError: The file doesn't exist, is damaged, or holds something else.
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

    if _is_program(file):
        try:
            with zipfile.ZipFile(file) as archive:
                return _Program(archive).weights()
        except Exception as error:  # as below
            raise UserError(
                f"{file}, a TorchScript archive, is damaged, or holds more than modules and tensors ({error}): fetch "
                "it again, or give its state_dict(), saved where you trust it"
            ) from error
    try:
        check_archive(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        # torch's own advice is to load it in a way that runs what is in it.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition(" was not an allowed global")[0]
        reason = reason.strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{file} is damaged, or holds more than tensors ({reason}): fetch it again") from error
    if isinstance(state, dict):
        if "pytorch-lightning_version" in state:
            raise UserError(f"{file} is a training's checkpoint, no CLIP's weights: predict takes it as --ckpt_path")
        if inside != "model_state_dict" and isinstance(state.get("model_state_dict"), dict):
            raise UserError(
                f"{file} is a checkpoint of a training, such as CLIP-M²DF's published code saves: test and predict take"
                " it as --ckpt_path, with CLIP's own weights as the backbone"
            )
        state = state.get(inside, state)
    if not isinstance(state, dict) or not all(isinstance(weight, Tensor) for weight in state.values()):
        raise UserError(f"{file} isn't a plain table of tensors, name by name: save the model's state_dict() alone")
    return state


# Zip files


def digest_of(weights: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of a text and of weights by their names, in hexadecimal."""
    digest = hashlib.sha256(text.encode())
    for name, weight in weights.items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(bytes_of(weight))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """The numbers of a tensor, row by row, as they lie in memory."""
    content: bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return content


def write_weights(draft: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors to a file that is there, which whoever may read it now can read then too.

    Raises:
        SafetensorError: It can't be written.
    """
    from safetensors.torch import save_file

    mode = draft.stat().st_mode
    save_file(weights, draft, metadata)
    draft.chmod(mode)  # safetensors lets nobody but the writer read


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
                _members(archive)
                damaged = archive.testzip()
        except ValueError:
            raise
        except Exception as error:  # what zipfile makes of damage has no common class
            raise ValueError(f"it is no whole zip file: {error}") from error
    if damaged is not None:
        raise ValueError(f"{damaged} in it is damaged")


def _size(archive: zipfile.ZipFile) -> int:
    """The bytes of the file on the disk."""
    assert archive.fp is not None
    return archive.fp.seek(0, os.SEEK_END)


def _members(archive: zipfile.ZipFile, compressible: str | None = None) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive, by name.

    Args:
        archive: The archive.
        compressible: Members whose names begin so may be compressed, in the one way that torch does.

    Raises:
        ValueError: One is compressed, they overlap or are larger than the file, or two have one name.
    """
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    for member in members:
        stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
        deflated = member.compress_type == zipfile.ZIP_DEFLATED
        if not stored and not (deflated and compressible is not None and member.filename.startswith(compressible)):
            raise ValueError("it is compressed")
    if sum(member.compress_size for member in members) > _size(archive):
        raise ValueError("its members are larger than the whole")
    names = [member.orig_filename for member in members]
    if len({*names}) < len(names) or any("\0" in name for name in names):
        raise ValueError("its members' names are no names, or two are the same")
    ends = [member.header_offset + 30 + len(member.orig_filename) + member.compress_size for member in members]
    if any(end > following.header_offset for end, following in zip(ends, members[1:], strict=False)):
        raise ValueError("its members overlap")
    return {member.filename: member for member in members}


# TorchScript archives: OpenAI's own files. What is in one, by names below one folder: data.pkl, a pickle of the modules
# with their attributes; data/N, the numbers of tensors; code/…, the program, a text for each file of classes.


def program_classes(file: Path) -> list[str]:
    """The classes of the objects in a TorchScript archive, such as ``__torch__.clip.model.CLIP``, the model's first.

    Returns:
        The names without what TorchScript puts in to tell classes of one name apart; none for any other file, and for a
        damaged one, of which reading the weights tells.
    """
    try:
        if file.is_file() and _is_program(file):
            with zipfile.ZipFile(file) as archive:
                return [re.sub(r"\.___torch_mangle_\d+", "", kind) for kind in _Program(archive).kinds()]
    except Exception:
        return []
    return []


def _is_program(file: Path) -> bool:
    try:
        with open(file, "rb") as opened:
            if opened.read(len(_ZIP)) != _ZIP:
                return False
            with zipfile.ZipFile(opened) as archive:
                return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # no zip file, or a damaged one, which reading it tells
        return False


# The most bytes that are read of the pickle and of the program's texts, and the most letters that the dotted names of
# all attributes may have: a byte of a pickle may take 72 of memory, one of a compressed text may stand for a thousand,
# and a module that is shared stands for as many as paths lead to it. RN50x64's layers have 0.15 MB and 0.8 MB.
_MOST_PICKLE, _MOST_TEXT, _MOST_NAMES = 1 << 21, 1 << 24, 1 << 24

_DTYPES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        **{"Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64},
        **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
        **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
    }.items()
}
_TENSOR = "torch._utils _rebuild_tensor_v2"
# Calls that make attributes other than tensors. Nothing needs those: the arguments stand for them.
_WRAPPERS = {
    *("collections OrderedDict", "builtins complex", "torch device", "torch.jit._pickle restore_type_tag"),
    *(f"torch.jit._pickle build_{kind}list" for kind in ("int", "double", "bool", "tensor")),
}


class _Global(str):
    """What a pickle says is to be called or made; nothing is imported."""

    __slots__ = ()


class _Storage(NamedTuple):
    values: Tensor


class _Object:
    """What stands for an object of one of the program's classes: its class's name and its attributes.

    Attributes:
        kind: Name of the class, with a dot between all its parts.
        state: The attributes; something else where a program of its own would have to unpack them.
    """

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: object = None


class _Program:
    """A TorchScript archive, of which nothing is run.

    Args:
        archive: The open file.

    Raises:
        ValueError: Its members are not as torch writes them; the methods raise it, and much else, where it is damaged
            or holds what no archive of torch's does.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        roots = [name.removesuffix("data.pkl") for name in archive.namelist() if re.fullmatch("[^/]+/data.pkl", name)]
        if len(roots) != 1:
            raise ValueError("it has no data.pkl, or more than one")
        self._archive, self._root = archive, roots[0]
        self._members = _members(archive, compressible=f"{self._root}code/")
        self._storages: dict[tuple[str, torch.dtype], _Storage] = {}
        self._classes: dict[str, dict[str, tuple[set[str], set[str] | None] | None]] = {}
        self._text_left = _MOST_TEXT
        byteorder = self._read("byteorder", 16) if f"{self._root}byteorder" in self._members else b"little"
        if byteorder not in (b"little", b"big"):
            raise ValueError("its byteorder is neither little nor big")
        self._swapped = byteorder.decode() != sys.byteorder

    def _read(self, name: str, most: int) -> bytes:
        """All of a member, held against its checksum, and no more than it says that it has."""
        member = self._members.get(self._root + name)
        if member is None:
            raise ValueError(f"it lacks {name!r:.100}")
        if member.file_size > most:
            raise ValueError(f"{name} in it has {member.file_size} bytes, more than {most}")
        with self._archive.open(member) as opened:
            return opened.read(member.file_size)

    # The pickle

    def kinds(self) -> list[str]:
        """The classes of what the archive holds, in the order of its pickle, which names the model's first."""
        instructions = pickletools.genops(self._read("data.pkl", _MOST_PICKLE))
        kinds = [str(arg).replace(" ", ".") for opcode, arg, _ in instructions if opcode.name == "GLOBAL"]
        return kinds if kinds and kinds[0].startswith("__torch__.") else []

    def model(self) -> _Object:
        """The object that the archive holds."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        arg: Any
        marks: list[int] = []

        def since_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        # Those of the second protocol, which torch writes, that make numbers, strings and containers; what they call is
        # made here.
        for opcode, arg, _ in pickletools.genops(self._read("data.pkl", _MOST_PICKLE)):
            match opcode.name:
                case "PROTO" | "STOP":
                    pass
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                    stack.append(arg)
                case "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "MARK":
                    marks.append(len(stack))
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "EMPTY_LIST":
                    stack.append([])
                case "APPEND" | "APPENDS":
                    items = since_mark() if opcode.name == "APPENDS" else [stack.pop()]
                    _only(stack[-1], list).extend(items)
                case "EMPTY_DICT":
                    stack.append({})
                case "SETITEM" | "SETITEMS":
                    items = since_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                    # Attributes have names; keys of other types may be made so that they collide, or end the process.
                    pairs = zip(items[::2], items[1::2], strict=True)
                    _only(stack[-1], dict).update((key, value) for key, value in pairs if type(key) is str)
                case "GLOBAL":
                    if not (arg in _DTYPES or arg == _TENSOR or arg in _WRAPPERS or re.match(r"__torch__[. ]", arg)):
                        raise ValueError(f"it asks for {arg.replace(' ', '.')!r:.100}")
                    stack.append(_Global(arg))
                case "BINPERSID":
                    stack.append(self._storage(*_only(stack.pop(), tuple)))
                case "REDUCE":
                    args, function = _only(stack.pop(), tuple), _only(stack.pop(), _Global)
                    if function != _TENSOR and function not in _WRAPPERS:
                        raise ValueError(f"it calls {function.replace(' ', '.')!r:.100}")
                    stack.append(self._tensor(*args) if function == _TENSOR else args)
                case "NEWOBJ":
                    args, kind = _only(stack.pop(), tuple), _only(stack.pop(), _Global)
                    if args or not kind.startswith("__torch__"):
                        raise ValueError(f"it makes an object of {kind.replace(' ', '.')!r:.100}")
                    stack.append(_Object(kind.replace(" ", ".")))
                case "BUILD":
                    state = stack.pop()
                    _only(stack[-1], _Object).state = state
                case other:
                    raise ValueError(f"its pickle has the instruction {other}")
        if len(stack) != 1:
            raise ValueError("its pickle doesn't make one object")
        model: _Object = _only(stack[0], _Object)
        return model

    def _storage(self, storage: object, kind: object, key: object, device: object, count: object) -> _Storage:
        """The numbers of one or more tensors."""
        dtype = _DTYPES[_only(kind, _Global)]
        if storage != "storage" or type(key) is not str or not re.fullmatch("[0-9]+", key, re.ASCII):
            raise ValueError("a tensor of it is stored in another way")
        if (key, dtype) not in self._storages:
            # Of no numbers there may be no member.
            raw = self._read(f"data/{key}", _size(self._archive)) if _count(count) else b""
            unit = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
            values = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
            if self._swapped:
                values = values.view(-1, unit).flip(1).flatten()
            self._storages[key, dtype] = _Storage(values.view(dtype))
        if self._storages[key, dtype].values.numel() != _count(count):
            raise ValueError(f"data/{key:.100} in it has other than the {count!r:.30} numbers that it should have")
        return self._storages[key, dtype]

    def _tensor(self, storage: object, offset: object, size: object, stride: object, *more: object) -> Tensor:
        """A tensor, which may share its storage with others; more is whether it has a gradient, and its hooks."""
        values: Tensor = _only(storage, _Storage).values
        start, sizes, strides = _count(offset), [*map(_count, _only(size, tuple))], [*map(_count, _only(stride, tuple))]
        if len(sizes) != len(strides) or len(sizes) > 64 or any(more[2:]):
            raise ValueError("a tensor of it is stored in another way")
        if prod(sizes) * values.itemsize > _size(self._archive):  # one number for many is allowed, but not for too many
            raise ValueError("a tensor of it has more numbers than there are in the file")
        last = start + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) if prod(sizes) else start - 1
        if last >= values.numel():
            raise ValueError("a tensor of it has more numbers than there are in its storage")
        return values.as_strided(sizes, strides, start) if prod(sizes) else values.new_empty(sizes)

    # The modules

    def weights(self) -> dict[str, Tensor]:
        """The parameters and buffers by their dotted names, in the order of a module's own ``state_dict()``."""
        weights: dict[str, Tensor] = {}
        pending = [("", self.model())]
        letters = 0
        while pending:
            prefix, module = pending.pop()
            attributes = module.state
            if not isinstance(attributes, dict):
                raise ValueError(f"its {module.kind} packs its weights by a program of its own")
            letters += (len(prefix) + 1) * (len(attributes) + 1) + sum(map(len, attributes))
            if letters > _MOST_NAMES:
                raise ValueError("its modules are too many, or too deep")
            if any("." in name or not name for name in attributes):
                raise ValueError("an attribute in it has a name that is none")
            if (lists := self._lists(module.kind)) is None:
                continue
            parameters, buffers = lists
            first = [name for name in attributes if name in parameters]
            others = [name for name in attributes if name not in parameters and (buffers is None or name in buffers)]
            for name in first + others:
                if isinstance(value := attributes[name], Tensor):
                    weights[prefix + name] = value
            inner = [(f"{prefix}{name}.", value) for name, value in attributes.items() if type(value) is _Object]
            pending += reversed(inner)
        return weights

    def _lists(self, kind: str) -> tuple[set[str], set[str] | None] | None:
        """The names of a class's parameters and buffers, which stand in the text of the program.

        Returns:
            Those of the buffers are None in older texts, which don't tell them from other attributes. None if the class
            is no module.
        """
        module, _, name = kind.rpartition(".")
        if module not in self._classes:
            text = self._read(f"code/{module.replace('.', '/')}.py", self._text_left).decode()
            self._text_left -= len(text)
            listed = r"\[([^\n]*)\]\n"
            lists = rf"(?:  __parameters__ = {listed})?(?:  __buffers__ = {listed})?"
            self._classes[module] = {}
            for found in re.finditer(rf"^class (\w+)(?:\((\w+)\))?:\n{lists}", text, re.MULTILINE):
                parameters, buffers = ({*re.findall('"(.*?)"', names or "")} for names in found.groups()[2:])
                told = (parameters, None if found[4] is None else buffers)
                self._classes[module][found[1]] = told if found[2] == "Module" else None
        if name not in self._classes[module]:
            raise ValueError(f"its program has no class {kind}")
        return self._classes[module][name]


def _only(value: object, kind: type) -> Any:
    """The value, which has to be of this very type."""
    if type(value) is not kind:
        raise ValueError(f"its pickle has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _count(value: object) -> int:
    """The value, which has to be a whole number from 0 on."""
    if type(value) is not int or value < 0:
        raise ValueError("a size, stride or offset in it is no number of things")
    return value
