"""Files from strangers: nothing in them is run, and they lead to no file that a person didn't name."""

import hashlib
import io
import itertools
import json
import math
import os
import pickle
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZIP_LZMA, ZipFile

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import save_file

from clip_m2df import CLIPM2DF
from clip_m2df.cli import main
from clip_m2df.clip.backbone import TINY_CLIP, CLIPBackbone
from clip_m2df.commands.check import read_findings
from clip_m2df.commands.configs import resolve_configs
from clip_m2df.datasets.manifest import Manifest
from clip_m2df.datasets.split_lists import read_annotations, read_lists
from clip_m2df.episodes.datamodule import EpisodeDataModule
from clip_m2df.episodes.files import read_episodes_file
from clip_m2df.episodes.plan import EpisodeShape
from clip_m2df.errors import UserError
from clip_m2df.evaluation.bank import FEATURES_FORMAT, FeatureStore
from clip_m2df.evaluation.bundle import read_bundle
from clip_m2df.files import Fingerprint, fingerprint
from clip_m2df.training.checkpoints import RunCheckpoint, read_checkpoint
from clip_m2df.video import frame_cache
from clip_m2df.video.frame_cache import CachedVideo, FrameCache, Settings, write_shard
from clip_m2df.video.reader import read_frames
from clip_m2df.weight_files import program_classes, read_weights
from tests.conftest import fails, options, save_checkpoint
from tests.project.damage import members_of, zipped


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A folder that appears when a malicious file is obeyed; it must not."""
    path = tmp_path / "obeyed"
    yield path
    assert not path.exists()


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def pickled(marker: Path, form: str) -> bytes:
    """A malicious pickle that has what is looked for beside it, in one of the forms in circulation."""
    content = {"state_dict": {"x": torch.ones(2)}, "hyper_parameters": {"head": "m2df"}, "x": Malicious(marker)}
    file = io.BytesIO()
    if form == "pickle":
        pickle.dump(content, file)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    return file.getvalue()


FORMS = ["pickle", "torch's older format", "zip"]


@pytest.mark.parametrize("form", FORMS)
def test_the_malicious_files_work(tmp_path: Path, form: str) -> None:
    data = io.BytesIO(pickled(tmp_path / "obeyed", form))
    pickle.load(data) if form == "pickle" else torch.load(data, weights_only=False)
    assert (tmp_path / "obeyed").exists()


# Pickles


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_a_checkpoint_is_not_obeyed_by_a_command(
    command: str, form: str, marker: Path, manifest: Path, tiny_clip_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = marker.with_name("c.ckpt")
    path.write_bytes(pickled(marker, form))
    assert main([command, *options(manifest, tiny_clip_dir, path.parent / "run"), f"--ckpt_path={path}"]) == 2
    assert f"{path} is damaged or no checkpoint" in capsys.readouterr().err


def _pickled_weights(path: Path) -> CLIPBackbone:
    folder = path.with_name("clip")
    shutil.copytree(TINY_CLIP, folder)
    (folder / "model.safetensors").unlink()
    path.rename(folder / "pytorch_model.bin")
    return CLIPBackbone.load(str(folder))


READERS: dict[str, Callable[[Path], object]] = {
    "load_from_checkpoint": CLIPM2DF.load_from_checkpoint,
    "weights.pt": lambda path: CLIPBackbone.load(str(path.rename(path.with_suffix(".pt")))),
    "weights.bin": lambda path: CLIPBackbone.load(str(path.rename(path.with_suffix(".bin")))),
    "weights.safetensors": lambda path: CLIPBackbone.load(str(path.rename(path.with_suffix(".safetensors")))),
    "pytorch_model.bin": _pickled_weights,
    "published": lambda path: CLIPM2DF.from_published(path, clip="tiny"),
    "bundle": read_bundle,
    "manifest": Manifest.read,
    "class texts": lambda path: Manifest.read(_some_manifest(path)).with_texts(path),
    "split list": lambda path: read_lists(path.rename(path.with_name("train.txt")), "folder"),
    "annotations": lambda path: read_annotations([path], "ssv2"),
    "episodes file": lambda path: read_episodes_file(
        path, Manifest.read(_some_manifest(path)).split("train"), None, EpisodeShape(2, 1, 1)
    ),
    "frame cache": lambda path: FrameCache.open(
        path.rename(path.with_name("frames-00000.safetensors")).parent, path.parent
    ),
    "video": lambda path: read_frames(str(path.rename(path.with_suffix(".mp4"))), range),
}


def _some_manifest(path: Path) -> Path:
    path.with_name("a.mp4").touch()
    path.with_name("m.csv").write_text("path,label,split\na.mp4,run,train\n")
    return path.with_name("m.csv")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_obeys_a_pickle(reader: str, form: str, marker: Path) -> None:
    path = marker.with_name("file")
    path.write_bytes(pickled(marker, form))
    with pytest.raises(UserError) as caught:
        READERS[reader](path)
    assert str(marker.parent) in str(caught.value)  # it names the file


@pytest.mark.parametrize("form", FORMS)
def test_what_can_be_made_anew_is_made_anew(form: str, marker: Path) -> None:
    store = FeatureStore(marker.parent, torch.nn.Linear(2, 2), "")
    store.path.write_bytes(pickled(marker, form))
    with pytest.warns(UserWarning, match="can't be used .*: they are made anew"):
        assert store.read() == {}
    assert read_findings(store.path) == {}


# TorchScript archives, which are programs


class Writing(torch.nn.Module):
    """Writes a file when TorchScript loads it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.weight, self.path = torch.ones(2), path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight

    @torch.jit.export
    def __getstate__(self) -> str:
        return self.path

    @torch.jit.export
    def __setstate__(self, path: str) -> None:
        torch.save(torch.ones(2), path)
        self.weight, self.path, self.training = torch.ones(2), path, False


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_is_not_run(marker: Path) -> None:
    torch.jit.script(Writing(str(marker))).save(str(marker.with_name("clip.pt")))
    torch.jit.load(str(marker.with_name("clip.pt")))
    marker.unlink()  # so it works
    for read in (CLIPBackbone.load, CLIPM2DF.from_published, lambda file: read_weights(Path(file))):
        with pytest.raises(
            UserError, match=r"clip\.pt, a TorchScript archive, is damaged, or holds more than modules and tensors"
        ):
            read(str(marker.with_name("clip.pt")))
    assert program_classes(marker.with_name("clip.pt"))[0].endswith("Writing")
    with pytest.raises(UserError, match="is damaged or no checkpoint"):
        CLIPM2DF.load_from_checkpoint(marker.with_name("clip.pt"))


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _value(value: object) -> bytes:
    """What makes a value, a tuple's with what makes its parts; bytes stand for themselves."""
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_value, value)) + b"t"
    if isinstance(value, bytes):
        return value
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 2)
    pickler.fast = True  # without a memo
    pickler.dump(value)
    return file.getvalue()[2:-1]


def _stored(key: object = "0", count: object = 4, kind: str = "torch.FloatStorage", what: object = "storage") -> bytes:
    return _value((what, _global(kind), key, "cpu", count)) + b"Q"


def _tensor(stored: bytes = _stored(), offset: object = 0, size: object = (4,), stride: object = (1,)) -> bytes:
    args = _value((stored, offset, size, stride, False, _global("collections.OrderedDict") + b")R"))
    return _global("torch._utils._rebuild_tensor_v2") + args + b"R"


def _called(name: str, *args: object) -> bytes:
    return _global(name) + _value(args) + b"R"


def _made(kind: str = "__torch__.M", state: bytes = b"") -> bytes:
    """An object, with the pairs of its attributes."""
    return _global(kind) + b")\x81}(" + state + b"ub"


def _model(attribute: object = b"", **others: object) -> bytes:
    """The pickle of a module with a weight w and other attributes, of which one has no matter which name."""
    others = {"w": _tensor()} | ({"x": attribute} if attribute != b"" else {}) | others
    return b"\x80\x02" + _made(state=b"".join(_value(name) + _value(value) for name, value in others.items())) + b"."


LISTS = b'(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n  w : Tensor\n'
RIGHT_MEMBERS: dict[str, bytes] = {
    "data.pkl": _model(),
    "data/0": np.arange(4, dtype="<f4").tobytes(),
    "constants.pkl": b"\x80\x02).",
    "code/__torch__.py": b"class M" + LISTS + b"\nclass N" + LISTS,
    "code/__torch__/os.py": b"class system" + LISTS,
    "version": b"3\n",
}


def _archive(path: Path, **changed: bytes | None) -> Path:
    members = {name: changed.get(name, content) for name, content in RIGHT_MEMBERS.items()} | changed
    path.write_bytes(zipped({f"a/{name}": content for name, content in members.items() if content is not None}))
    return path


def _peak() -> int:
    """The most bytes of memory that this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (10 if sys.platform == "linux" else 0)


def _refused(path: Path) -> str:
    """The message of a refusal that takes little memory."""
    before = _peak()
    with pytest.raises(UserError) as caught:
        read_weights(path)
    assert _peak() - before < 500 << 20
    assert str(path) in str(caught.value)
    assert {*program_classes(path)[:1]} <= {"__torch__.M", "__torch__.os.system"}
    return str(caught.value)


def _shared(name: str, *names: str) -> bytes:
    """A module in a module, 60 deep, each by several names."""
    module = _made()
    for _ in range(60):
        others = b"".join(_value(other) + b"h\x00" for other in names)
        module = _made(state=_value(name) + module + b"q\x00" + others)
    return module


NESTED = 300_000
TEXT = "touch obeyed"
FORGED_PICKLES: dict[str, bytes] = {
    **{
        f"a call of {name}": _model(_called(name, *args))
        for name, *args in (
            *(("os.system", TEXT), ("posix.system", TEXT), ("nt.system", TEXT), ("subprocess.Popen", TEXT)),
            *(
                ("os.mkdir", "obeyed"),
                ("builtins.exec", "import os"),
                ("builtins.eval", "1"),
                ("__builtin__.eval", "1"),
            ),
            *(("builtins.getattr", "a", "b"), ("builtins.open", "obeyed", "w"), ("pathlib.Path.touch", "obeyed")),
            *(("torch.load", "a"), ("torch.jit.load", "a"), ("torch.hub.load", "a", "b"), ("torch.save", 1, "obeyed")),
            *(
                ("torch.jit._serialization.load", "a"),
                ("torch.storage._load_from_bytes", b"U\1."),
                ("pickle.loads", "a"),
            ),
            *(("torch._utils._rebuild_qtensor", 1), ("torch._utils._rebuild_sparse_tensor", 1), ("torch.package.x", 1)),
            *(("numpy.core.multiarray._reconstruct", 1), ("collections.defaultdict", 1), ("copyreg._reconstructor", 1)),
            *(("torch.nn.modules.linear.Linear", 2, 2), ("clip_m2df.weight_files.read_weights", "a"), ("x.y", 1)),
            *(("__torch__.os.system", TEXT), ("__torch__.M", "a"), ("__torch__.torch.os.system", TEXT)),
            *(("torch.FloatStorage", 1 << 40), ("__torch__.builtins.exec", "import os"), ("__torch__os.system", TEXT)),
        )
    },
    "a call of a string": _model(_value("os system") + _value((TEXT,)) + b"R"),
    "a call of a tensor": _model(_tensor() + b")R"),
    "a call with no tuple": _model(_global("builtins.complex") + b"]R"),
    "a call of an attribute": _model(_called("collections.OrderedDict.fromkeys", "a")),
    "EXT1": _model(b"\x82\x01"),
    "EXT2": _model(b"\x83\x01\x00"),
    "EXT4": _model(b"\x84\x01\x00\x00\x00"),
    "STACK_GLOBAL": _model(_value("os") + _value("system") + b"\x93" + _value((TEXT,)) + b"R"),
    "INST": _model(b"(" + _value(TEXT) + b"ios\nsystem\n"),
    "OBJ": _model(b"(" + _global("os.system") + _value(TEXT) + b"o"),
    "OBJ of a class in the archive": _model(b"(" + _global("__torch__.M") + b"o"),
    "NEWOBJ of another class": _model(_global("collections.OrderedDict") + b")\x81"),
    "NEWOBJ with arguments": _model(_global("__torch__.M") + _value((TEXT,)) + b"\x81"),
    "NEWOBJ_EX": _model(_global("__torch__.M") + b")}\x92"),
    "PERSID": _model(b"P../../secret\n"),
    "NEXT_BUFFER": _model(b"\x97"),
    "BUILD of a class": _model(_global("__torch__.M") + b"}" + _value("__setstate__") + _value(1) + b"sb"),
    "BUILD of a tensor": _model(_tensor() + b"}b"),
    "BUILD of a list": _model(b"]}b"),
    "BUILD with a pair": _model(_global("__torch__.M") + b")\x81" + _value((None, {"__class__": 1})) + b"b"),
    "BUILD with a list": _model(_global("__torch__.M") + b")\x81]b"),
    "a class of no text": _model(_made("__torch__.other.M")),
    "a class that the text lacks": _model(_made("__torch__.X")),
    "a class that leads out": _model(_made("__torch__.../../etc.M")),
    "a name with a dot": _model(**{"x.w": _tensor()}),
    "a name of nothing": _model(**{"": _tensor()}),
    "no module": b"\x80\x02" + _tensor() + b".",
    "a table": b"\x80\x02}" + _value("w") + _tensor() + b"s.",
    "two objects": b"\x80\x02" + _made() + _made() + b".",
    "nothing": b"\x80\x02.",
    "no end": _model()[:-1],
    "an empty file": b"",
    "an endless string": _model(b"X\xff\xff\xff\xff"),
    "BINBYTES8": _model(b"\x8e" + (1 << 62).to_bytes(8, "little")),
    "BYTEARRAY8": _model(b"\x96" + (1 << 40).to_bytes(8, "little")),
    "FRAME": _model(b"\x95" + (1 << 62).to_bytes(8, "little")),
    "LONG4": _model(b"\x8b\xff\xff\xff\x7f"),
    "INT of many digits": _model(b"I" + b"9" * 100_000 + b"\n"),
    "DUP": _model(b"N2"),
    "a memo that is not there": _model(b"h\xf0"),
    "a mark that is not there": _model(b"ttt"),
    "more than it holds": b"\x80\x02" + b"}" * (3 << 20) + b".",
    "many tables": b"\x80\x02" + b"}" * (1 << 20) + b".",
    "modules in modules": b"\x80\x02"
    + (_global("__torch__.M") + b")\x81}" + _value("x")) * 50_000
    + b"N"
    + b"sb" * 50_000
    + b".",
    "modules shared": b"\x80\x02" + _shared("x", "y", "z") + b".",
    "names that grow": b"\x80\x02" + _shared("x" * 20_000) + b".",
    "a module in itself": b"\x80\x02" + _global("__torch__.M") + b")\x81q\x00}" + _value("x") + b"h\x00sb.",
    **{
        f"a storage {key!r}": _model(_tensor(_stored(key)))
        for key in (
            *(
                "../0",
                "../../a/data/0",
                "/etc/passwd",
                "0/../0",
                "data.pkl",
                "0\0",
                "0\n",
                " 0",
                "-1",
                "",
                "1",
                "\u0663",
            ),
            *("../constants.pkl", "0" * 10_000, 0, None, b"(t", b"}", _tensor()),
        )
    },
    "a storage of another kind": _model(_tensor(_stored(what="file"))),
    "a storage of no numbers": _model(_tensor(_stored(kind="torch.UntypedStorage"))),
    "a storage of strings": _model(_tensor(_value(("storage", "torch FloatStorage", "0", "cpu", 4)) + b"Q")),
    "a storage that is none": _model(_tensor(_value(1) + b"Q")),
    "a storage that is a tensor": _model(_tensor(_tensor())),
    "a storage in a tuple": _model(_tensor(_value((_stored(),)))),
    **{
        f"a storage of {count!r:.30} numbers": _model(_tensor(_stored(count=count)))
        for count in (5, 1 << 40, 1 << 62, 1 << 64, 1 << 2000, -1, -(1 << 63), 4.0, True, None, "4", b")")
    },
    **{
        f"{what} of {value!r:.30}": _model(_tensor(**{what: value}))  # type: ignore[arg-type]
        for what, value in (
            *(("size", (n,)) for n in (5, 1 << 40, 1 << 62, 1 << 63, 1 << 64, 1 << 2000, -1, -4, 1.5, True, None, "4")),
            *(("size", n) for n in ((), (2, 2), (1,) * 65, 4, None, b"]", b"}")),
            *(("stride", (n,)) for n in (2, 1 << 40, 1 << 62, 1 << 64, -1, -(1 << 63), 0.5, True, None, "1")),
            *(("stride", n) for n in ((), (1, 1), 1, None, b"]")),
            *(("offset", n) for n in (1, 1 << 40, 1 << 63, 1 << 64, -1, 0.5, True, None, (0,))),
        )
    },
    "one number for exabytes": _model(_tensor(size=(1 << 60,), stride=(0,))),
    "one number for gigabytes": _model(_tensor(size=(1 << 15, 1 << 15), stride=(0, 0))),
    "one number in all shapes": _model(_tensor(size=(1 << 62,) * 64, stride=(0,) * 64)),
    "no numbers of a size that is none": _model(_tensor(size=(0, 1 << 62, 1 << 62), stride=(1, 1, 1))),
    "a tensor with more": _model(
        _global("torch._utils._rebuild_tensor_v2")
        + _value((_stored(), 0, (4,), (1,), False, b")", {"conj": True, "neg": True}))
        + b"R"
    ),
    "a tensor with less": _model(_global("torch._utils._rebuild_tensor_v2") + _value((_stored(), 0)) + b"R"),
}


def test_the_whole_archive_is_read_but_not_its_constants(marker: Path) -> None:
    for constants in (RIGHT_MEMBERS["constants.pkl"], pickle.dumps(Malicious(marker))):
        weights = read_weights(_archive(marker.with_name("a.pt"), **{"constants.pkl": constants}))
        assert {name: weight.tolist() for name, weight in weights.items()} == {"w": [0, 1, 2, 3]}


@pytest.mark.skipif(sys.platform == "win32", reason="its processes don't tell their memory")
@pytest.mark.parametrize("forged", FORGED_PICKLES)
def test_a_pickle_in_an_archive_is_not_obeyed(forged: str, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(marker.parent)
    said = _refused(_archive(marker.with_name("a.pt"), **{"data.pkl": FORGED_PICKLES[forged]}))
    assert "is damaged, or holds more than modules and tensors" in said
    assert len(said) < 500 + len(str(marker))
    assert [entry.name for entry in marker.parent.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    "attribute",
    [
        # What no weight is, whatever it says.
        {"__class__": _made("__torch__.os.system"), "__reduce__": _value("os.system"), "__setstate__": _value(1)},
        {"a/b": _value(1), "/etc/passwd": _value(1), "x\0y": _value(1), "\u202e": _value(1)},
        # Instructions that take another reader's memory, or end its process.
        {"x": b"Nr\xff\xff\xff\xff"},
        {"x": b"}" + b")" + b"\x85" * NESTED + b"Ns"},
        {"x": b")" + b"\x85" * NESTED},
        {"x": b"]q\x00h\x00a"},
        {"x": b"}(" + b"".join(_value(k * ((1 << 61) - 1)) + b"N" for k in range(20_000)) + b"u"},
    ],
    ids=["names", "paths", "memo", "key", "nested", "circle", "collisions"],
)
def test_what_stands_beside_weights_does_nothing(attribute: dict[str, bytes], marker: Path) -> None:
    path = _archive(marker.with_name("a.pt"), **{"data.pkl": _model(**attribute)})
    before = _peak() if sys.platform != "win32" else 0
    assert read_weights(path)["w"].tolist() == [0, 1, 2, 3]
    assert sys.platform == "win32" or _peak() - before < 500 << 20


def _twice(path: Path) -> None:
    with ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a/data/0", bytes(16))


def _overlapping(path: Path) -> None:
    with ZipFile(path, "a") as archive:
        archive.writestr("a/data/2", bytes(100_000))
        archive.writestr("a/data/1", bytes(16))
        archive.getinfo("a/data/1").header_offset = archive.getinfo("a/data/2").header_offset
        archive.getinfo("a/data/2").compress_size = archive.getinfo("a/data/2").file_size = 16


def _compressed(name: str, compression: int = ZIP_DEFLATED) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        members = members_of(path.read_bytes())
        with ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content, compression if member == f"a/{name}" else None)

    return change


def _altered(was: bytes, becomes: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes().replace(was, becomes))


FORGED_MEMBERS: dict[str, dict[str, bytes | None] | Callable[[Path], object]] = {
    "two of one name": _twice,
    "two in one place": _overlapping,
    "a compressed pickle": _compressed("data.pkl"),
    "compressed numbers": _compressed("data/0"),
    "a compressed list of constants": _compressed("constants.pkl"),
    "a program in bzip2": _compressed("code/__torch__.py", ZIP_BZIP2),
    "a program in LZMA": _compressed("code/__torch__.py", ZIP_LZMA),
    "another name within": _altered(b"a/data/0PK", b"a/data/1PK"),
    "NUL in a name": _altered(b"a/version", b"a/\0ersion"),
    "no numbers": {"data/0": None},
    "fewer numbers": {"data/0": bytes(15)},
    "no pickle": {"data.pkl": None},
    "two models": lambda path: path.write_bytes(zipped(members_of(path.read_bytes()) | {"b/data.pkl": _model()})),
    "no program": {"code/__torch__.py": None},
    "an empty program": {"code/__torch__.py": b""},
    "a program of no text": {"code/__torch__.py": b"\xff\xfe"},
    "a program without the class": {"code/__torch__.py": b"class Other" + LISTS},
    "an order of bytes that is none": {"byteorder": b"middle"},
    "a long order of bytes": {"byteorder": b"little" * 1000},
}


@pytest.mark.skipif(sys.platform == "win32", reason="its processes don't tell their memory")
@pytest.mark.parametrize("forged", FORGED_MEMBERS)
def test_members_of_an_archive_are_as_torch_writes_them(forged: str, marker: Path) -> None:
    change = FORGED_MEMBERS[forged]
    path = _archive(marker.with_name("a.pt"), **(change if isinstance(change, dict) else {}))
    if not isinstance(change, dict):
        whole = path.read_bytes()
        change(path)
        assert path.read_bytes() != whole
    _refused(path)


@pytest.mark.skipif(sys.platform == "win32", reason="its processes don't tell their memory")
def test_the_text_of_a_program_does_not_grow_without_end(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    members = {f"a/{name}": content for name, content in RIGHT_MEMBERS.items()}
    lines = b"class A(Module):\n  __parameters__ = [" + b'"a", ' * (3 << 19) + b"]\n"
    texts = {f"a/code/__torch__/{k}.py": lines + b"class M" + LISTS for k in range(3)}
    inner = b"".join(_value(f"m{k}") + _made(f"__torch__.{k}.M") for k in range(3))
    members["a/data.pkl"] = b"\x80\x02" + _made(state=inner) + b"."
    with ZipFile(path, "w") as archive:
        for name, content in (members | texts).items():
            archive.writestr(name, content, ZIP_DEFLATED if "/code/" in name else None)
    assert path.stat().st_size < 200_000
    assert "code/__torch__/" in _refused(path)


# Configs


@pytest.mark.parametrize(
    "place", ["{}", "data: {}", "data:\n  manifest: {}", "trainer:\n  callbacks: [{}]", "model: {{lr: {}}}"]
)
def test_a_config_makes_no_objects_of_python(
    place: str, marker: Path, manifest: Path, tiny_clip_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = marker.with_name("c.yaml")
    run = options(manifest, tiny_clip_dir, marker.parent / "run")
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"):
        text = place.format(f"{tag} [{json.dumps(str(marker))}]")
        config.write_text(text)
        assert main(["fit", *run, f"--config={config}"]) == 2
        said = capsys.readouterr().err
        assert "could not determine a constructor for the tag" in said
        assert str(config) in said
        # An option's value is read as YAML too.
        assert main(["fit", *run, f"--model.milestones={tag} [{json.dumps(str(marker))}]"]) == 2


def test_a_config_of_aliases_does_not_grow_without_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["model:", "  head_options:", "    a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"    a{k}: &a{k} [{', '.join(9 * [f'*a{k - 1}'])}]" for k in range(1, 10)]
    merges = ["model:", "  a0: &a0 {x: 1}"]
    merges += [f"  a{k}: &a{k} {{<<: [{', '.join(9 * [f'*a{k - 1}'])}]}}" for k in range(1, 10)]
    texts = ["\n".join(lines), "\n".join(merges), "model: &m {head_options: *m}", "model: &m {<<: *m}"]
    for text in (*texts, "model: {head_options: {x: " + "[" * 3000):
        (tmp_path / "c.yaml").write_text(text)
        assert main(["fit", f"--config={tmp_path / 'c.yaml'}", "--model.backbone=tiny"]) == 2
        assert f"config {tmp_path / 'c.yaml'} can't be read: " in capsys.readouterr().err


SECRET = "root: [x\n  password = hunter2"


@pytest.mark.parametrize(
    "content", [SECRET, "hunter2", "root: hunter2", "- hunter2", "a: &hunter2 1\nb: *hunter3", "@"]
)
@pytest.mark.parametrize(
    "place",
    [
        *("config: FILE", "config: [FILE]", "model: FILE", "data: FILE", "trainer: FILE", "checkpoint: FILE"),
        *("dashboard: FILE", "trainer: {logger: FILE}", "trainer: {callbacks: FILE}", "trainer: {callbacks: [FILE]}"),
        *("trainer: {plugins: FILE}", "model: {head_options: FILE}", "data: {knobs: FILE}", "fit: {config: FILE}"),
        *("--config=FILE", "--data=FILE", "--model=FILE", "--trainer=FILE", "--checkpoint=FILE", "--dashboard=FILE"),
        *(
            "--trainer.logger=FILE",
            "--trainer.callbacks=FILE",
            "--trainer.callbacks+=FILE",
            "--model.head_options=FILE",
        ),
        *("--data.knobs=FILE", "--model.milestones=FILE", "--trainer.logger=[FILE]", "--dat=FILE"),
    ],
)
def test_no_option_reads_another_file(
    place: str, content: str, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.yaml").write_text(content)
    arg = place.replace("FILE", str(tmp_path / "other.yaml"))
    if not place.startswith("--"):
        (tmp_path / "c.yaml").write_text(arg)
        arg = f"--config={tmp_path / 'c.yaml'}"
    said = fails(["fit", "--model.backbone=tiny", f"--data.manifest={manifest}", arg], capsys)
    assert "hunter" not in said
    assert "password" not in said


@pytest.mark.parametrize("how", ["config: other.yaml", "config: c.yaml", "data: other.yaml"])
def test_a_config_within_a_config_is_refused_with_what_to_write(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["model:", "  head_options:", "    a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"    a{k}: &a{k} [{', '.join(9 * [f'*a{k - 1}'])}]" for k in range(1, 10)]
    (tmp_path / "other.yaml").write_text("\n".join(lines))
    (tmp_path / "c.yaml").write_text(how)
    assert "by a --config of its own" in fails(["fit", "--config=c.yaml", "--model.backbone=tiny"], capsys)


# What is no file


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device"])
@pytest.mark.parametrize(
    "place", ["config", "checkpoint", "weights", "features", "shard", "manifest", "model", "episodes"]
)
def test_what_is_no_regular_file_is_not_opened(
    kind: str, place: str, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"shard": "frames-00000.safetensors", "model": "config.json", "weights": "w.safetensors"}
    store = FeatureStore(tmp_path, torch.nn.Linear(2, 2), "")
    path = store.path if place == "features" else tmp_path / names.get(place, "file")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as listening:
            monkeypatch.chdir(tmp_path)  # its name may not be long
            listening.bind(path.name)
    readers: dict[str, Callable[[], object]] = {
        "config": lambda: resolve_configs([f"--config={path}"]),
        "checkpoint": lambda: CLIPM2DF.load_from_checkpoint(path),
        "weights": lambda: read_weights(path),
        "features": store.read,
        "shard": lambda: FrameCache.open(tmp_path, tmp_path),
        "manifest": lambda: Manifest.read(path),
        "model": lambda: CLIPBackbone.load(str(tmp_path)),
        "episodes": lambda: read_episodes_file(
            path, Manifest.read(manifest).split("test"), None, EpisodeShape(2, 1, 1)
        ),
    }
    with pytest.raises(UserError, match="is a folder" if kind == "folder" else "is not a regular file"):
        readers[place]()


# What features may be


@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(2, 3, 4, 1),
        torch.zeros(2, 3, 5),
        torch.zeros(2, 4, 4),
        torch.zeros(2, 12),
        torch.zeros(2),
        torch.zeros(()),
        torch.zeros(1, 3, 4),
        torch.zeros(2, 3, 4, dtype=torch.bfloat16),
        torch.zeros(2, 3, 4, dtype=torch.float64),
        torch.zeros(2, 3, 4, dtype=torch.int64),
        torch.zeros(2, 3, 4, dtype=torch.bool),
        torch.zeros(2, 3, 4, dtype=torch.complex64),
        torch.full((2, 3, 4), math.nan),
        torch.full((2, 3, 4), math.inf),
        torch.ones(2, 3, 4).index_fill(1, torch.tensor(1), 0),
    ],
    ids=lambda t: f"{t.dtype} {tuple(t.shape)} {t.flatten()[0].item()}",
)
def test_features_that_the_tower_does_not_make_are_made_anew(features: torch.Tensor, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, torch.nn.Linear(2, 2), "frames 3", shape=(3, 4))
    videos = json.dumps(["a.mp4 1", "b.mp4 1"])

    def write(content: torch.Tensor) -> None:
        raw = content.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        metadata = {"format": FEATURES_FORMAT, "key": store.key, "videos": videos}
        save_file(
            {"features": content}, store.path, metadata | {"sha256": hashlib.sha256(videos.encode() + raw).hexdigest()}
        )

    write(torch.ones(2, 3, 4))
    assert set(store.read()) == {"a.mp4 1", "b.mp4 1"}
    write(features)
    with pytest.warns(UserWarning, match="can't be used .*: they are made anew"):
        assert store.read() == {}


# What a run may go on from


DELETED = object()
STEP = (
    "loops",
    "fit_loop",
    "epoch_loop.automatic_optimization.optim_progress",
    "optimizer",
    "step",
    "total",
    "completed",
)
WEIGHT, GROUP = ("optimizer_states", 0, "state", 0), ("optimizer_states", 0, "param_groups", 0)
STATE = [
    *(
        ("global_step",),
        ("epoch",),
        ("loops",),
        ("loops", "fit_loop"),
        STEP,
        ("callbacks",),
        ("callbacks", "RunCheckpoint"),
    ),
    *(("callbacks", "RunCheckpoint", name) for name in ("best_model_score", "best_model_path", "validated")),
    *(("optimizer_states",), ("optimizer_states", 0), ("optimizer_states", 0, "state"), WEIGHT, (*WEIGHT, "exp_avg")),
    *((*WEIGHT, "exp_avg_sq"), (*WEIGHT, "step"), ("optimizer_states", 0, "param_groups"), (*GROUP, "lr")),
    *((*GROUP, "betas"), (*GROUP, "params"), (*GROUP, "amsgrad"), (*GROUP, "fused")),
    *(("lr_schedulers",), ("lr_schedulers", 0), ("lr_schedulers", 0, "last_epoch"), ("lr_schedulers", 0, "base_lrs")),
    *(("EpisodeDataModule",), ("EpisodeDataModule", "steps"), ("EpisodeDataModule", "batches_per_step")),
]
# What is no forgery: other callbacks, and numbers that are in their range.
RIGHT: dict[tuple[str | int, ...], list[object]] = {
    ("epoch",): [10**6],
    ("callbacks",): [{"x": 1}],
    ("callbacks", "RunCheckpoint", "best_model_path"): ["a"],
    (*GROUP, "lr"): [10**6, 2.5],
}
FORGED = ["a", -5, math.nan, [], {"x": 1}, DELETED, torch.tensor(math.nan), torch.zeros(3), 10**6, 2.5]


@pytest.mark.slow
@pytest.mark.parametrize("at", STATE, ids=str)
def test_a_forged_training_state_ends_in_a_message_and_changes_nothing(
    at: tuple[str | int, ...],
    fitted: Path,
    manifest: Path,
    tiny_clip_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    args = ["fit", *options(manifest, tiny_clip_dir, tmp_path, "--ckpt_path=last", "--trainer.max_steps=3")]
    for value in FORGED:
        content = read_checkpoint(fitted / "checkpoints" / "last.ckpt")
        if any(type(value) is type(right) and value == right for right in RIGHT.get(at, [])):
            continue
        place: Any = content
        *parents, last = at
        for key in parents:
            place = place[
                next((k for k in place if str(k).startswith(f"{key}{{")), key) if isinstance(place, dict) else key
            ]
        last = next((k for k in place if str(k).startswith(f"{last}{{")), last) if isinstance(place, dict) else last
        if value is DELETED:
            if at in (("callbacks", "RunCheckpoint"), ("optimizer_states", 0)):
                continue  # of a run without one; a list of none is another case
            del place[last]
        else:
            place[last] = value
        torch.save(content, path)
        before = path.read_bytes()
        said = fails(args, capsys)
        assert str(path) in said or "optimiser steps already" in said, (at, value)
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    "head", ["torch.nn.Softmax", "torch.nn.Module", "os.system", "clip_m2df.nn.head.Head", "sys.path"]
)
def test_a_head_that_a_file_names_is_a_head(checkpoint: tuple[Path, dict[str, Any]], head: str) -> None:
    path, content = checkpoint
    for options_of_head in ({}, None, {"dim": 1}):
        content["hyper_parameters"] |= {"head": head, "head_options": options_of_head}
        torch.save(content, path)
        with pytest.raises(UserError, match=rf"head.*{head}"):
            CLIPM2DF.load_from_checkpoint(path)


# What a checkpoint may say


@pytest.fixture
def checkpoint(tiny_clip_dir: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A whole checkpoint, and its content, to be changed and saved again."""
    model = CLIPM2DF(backbone=str(tiny_clip_dir), head_options={"hidden_dim": 32, "num_heads": 4})
    path = save_checkpoint(model, tmp_path / "c.ckpt")
    return path, torch.load(path, weights_only=True)


def test_a_checkpoint_does_not_name_what_is_imported(
    checkpoint: tuple[Path, dict[str, Any]],
    marker: Path,
    manifest: Path,
    tiny_clip_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, content = checkpoint
    CLIPM2DF.load_from_checkpoint(path)
    code = f"import os\nos.mkdir({str(marker)!r})\nfrom clip_m2df.nn.m2df import M2DFHead as Head\n"
    marker.with_name("module_of_a_stranger.py").write_text(code)
    monkeypatch.syspath_prepend(str(marker.parent))
    head = "module_of_a_stranger.Head"
    content["hyper_parameters"]["head"] = head
    torch.save(content, path)
    with pytest.raises(UserError, match=f"takes the head '{head}', code that is not this package's"):
        CLIPM2DF.load_from_checkpoint(path)
    args = ["test", *options(manifest, tiny_clip_dir, path.parent / "run"), f"--ckpt_path={path}"]
    assert main(args) == 2
    assert f"--model.head {head} or head='{head}'" in capsys.readouterr().err
    assert not marker.exists()
    # Whoever names it gets it.
    CLIPM2DF.load_from_checkpoint(path, head=head)
    assert sys.modules.pop("module_of_a_stranger")
    marker.rmdir()


@pytest.mark.parametrize(
    "reading",
    [5, "x", [8, 32], {}, {"frames": 8}, torch.tensor(8.0)]
    + [{"frames": f, "resize": r} for f, r in ((0, 32), (-1, 32), ("8", 32), (True, 32), (8, None), (8, 32.5))]
    + [{"frames": 8, "resize": 32, "resize_mode": m, "sampling": s} for m, s in (("x", "window"), ("squash", {}))],
)
def test_a_checkpoint_says_how_videos_are_read_in_numbers(
    reading: object, checkpoint: tuple[Path, dict[str, Any]], manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, content = checkpoint
    torch.save(content | {"reading": reading}, path)
    support = path.parent / "support" / "one"
    support.mkdir(parents=True)
    shutil.copy(manifest.parent / "test0_0.mp4", support)
    said = fails(["predict", f"--ckpt_path={path}", f"--support={support.parent}", f"--videos={support}"], capsys)
    assert str(path) in said
    assert "not a number of frames and one of pixels; give another" in said


TOWERS = ("visual_config", "text_config")
OF_TOWERS = ("attn_implementation", "_attn_implementation", "auto_map", "torch_dtype")


@pytest.mark.parametrize(
    ("tower", "option"),
    [*(("", option) for option in ("_instantiator", "_class_path", "anything")), *itertools.product(TOWERS, OF_TOWERS)],
)
def test_a_checkpoint_has_no_other_options(checkpoint: tuple[Path, dict[str, Any]], tower: str, option: str) -> None:
    path, content = checkpoint
    told = content["hyper_parameters"]
    (told["backbone"][tower] if tower else told)[option] = "lightning.pytorch.cli.instantiate_module"
    torch.save(content, path)
    refusal = rf"the {tower} of .* has '{option}', which no backbone" if tower else rf"has the option '{option}', which"
    with pytest.raises(UserError, match=refusal):
        CLIPM2DF.load_from_checkpoint(path)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_described_by_a_list_of_pairs_is_refused(checkpoint: tuple[Path, dict[str, Any]], tower: str) -> None:
    path, content = checkpoint
    config = content["hyper_parameters"]["backbone"][tower]
    content["hyper_parameters"]["backbone"][tower] = [[k, v] for k, v in config.items()] + [["auto_map", "some/code"]]
    torch.save(content, path)
    with pytest.raises(UserError, match=rf"the backbone .* has no {tower} that is a table of values"):
        CLIPM2DF.load_from_checkpoint(path)


def test_damage_in_a_tensor_does_not_go_unnoticed(checkpoint: tuple[Path, dict[str, Any]]) -> None:
    path, content = checkpoint
    weights = {name: weight for name, weight in content["state_dict"].items() if weight.numel() > 100}
    torch.save({"x": next(iter(weights.values()))}, path.with_name("w.pt"))
    for file, read in ((path, CLIPM2DF.load_from_checkpoint), (path.with_name("w.pt"), CLIPBackbone.load)):
        whole = file.read_bytes()
        place = whole.index(next(iter(weights.values())).numpy().tobytes())
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place + 50 * bit] ^= 1 << bit
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"{file.name} is damaged"):
                read(str(file))


def test_an_archive_takes_no_more_memory_than_disk(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1_000_000)}, tmp_path / "w.pt")
    with ZipFile(tmp_path / "w.pt") as whole, ZipFile(tmp_path / "z.pt", "w", ZIP_DEFLATED) as deflated:
        for name in whole.namelist():
            deflated.writestr(name, whole.read(name))
    assert (tmp_path / "z.pt").stat().st_size < 10_000
    with ZipFile(tmp_path / "many.pt", "w") as many:
        many.writestr("many/data/0", bytes(1000))
        many.filelist *= 100  # of one content
    shutil.copy(tmp_path / "w.pt", tmp_path / "twice.pt")
    with ZipFile(tmp_path / "twice.pt", "a") as twice, pytest.warns(UserWarning, match="Duplicate name"):
        twice.writestr("w/data/0", b"\1" * 4_000_000)  # which of both is read would be a matter of the reader
    for name, why in (
        ("z.pt", "it is compressed"),
        ("many.pt", "its members are larger than the whole"),
        ("twice.pt", "its members' names are no names, or two are the same"),
    ):
        with pytest.raises(UserError, match=rf"{name} is damaged.*\({why}\)"):
            CLIPBackbone.load(str(tmp_path / name))


@pytest.mark.parametrize("videos", ["[" * 5000, "[[]]", "{}", "3", '[{"path": 1}]'])
def test_lists_in_tensor_files_that_are_none(videos: str, tmp_path: Path) -> None:
    metadata = {"format": frame_cache.CACHE_FORMAT, "short_side": "1", "frames": "1", "quality": "1", "videos": videos}
    (tmp_path / "frames-00000.safetensors").write_bytes(save({"0": np.zeros(1)}, metadata))
    if videos != "{}":  # which is a list of none
        with pytest.raises(UserError, match="is damaged, or of another version"):
            FrameCache.open(tmp_path, tmp_path)
    store = FeatureStore(tmp_path, torch.nn.Linear(2, 2), "")
    features = np.zeros((1, 2, 2), np.float32)
    sha256 = hashlib.sha256(videos.encode() + features.tobytes()).hexdigest()
    metadata = {"format": FEATURES_FORMAT, "key": store.key, "videos": videos, "sha256": sha256}
    store.path.write_bytes(save({"features": features}, metadata))
    with pytest.warns(UserWarning, match="can't be used .*: they are made anew"):
        assert store.read() == {}


# Where files may lie


@pytest.mark.parametrize("path", ["x/..", "x/.", "/", "../../notes.txt", "checkpoints/mine.ckpt", "s3://bucket/x"])
def test_a_checkpoint_names_no_file_that_a_run_removes(path: str, tmp_path: Path) -> None:
    callback = RunCheckpoint()
    callback.dirpath = str(tmp_path / "checkpoints")
    state = callback.state_dict() | {"best_k_models": {path: torch.tensor(0.1), "x/best.ckpt": torch.tensor(0.2)}}
    state |= dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), path)
    callback.load_state_dict(state)
    named = {callback.best_model_path, callback.kth_best_model_path, callback.last_model_path, *callback.best_k_models}
    assert named <= {"", str(tmp_path / "checkpoints" / "best.ckpt")}


@pytest.mark.slow
def test_each_command_wants_to_be_told_of_another_folder(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, astray = manifest.parent, tmp_path / "m.csv"
    header, *lines = manifest.read_text().splitlines()
    astray.write_text("\n".join([header, *(f"{folder}/{line}" for line in lines)]))
    data = [f"--manifest={astray}", "--workers=1"]
    run = options(astray, tiny_clip_dir, tmp_path / "run")
    commands = [
        (["check", *data], "--root"),
        (["cache", *data, f"--output={tmp_path / 'cache'}"], "--root"),
        (["episodes", *run, f"--output={tmp_path / 'e.jsonl'}", "--data.test_episodes=3"], "--data.root"),
        (["fit", *run, "--trainer.fast_dev_run=true"], "--data.root"),
    ]
    for args, option in commands:
        assert main(args) == 2
        said = capsys.readouterr().err
        assert f"lie outside {astray.parent}, the first is {folder}/train0_0.mp4: " in said
        assert f"--data.root {folder} (clip-m2df check and cache: --root)" in said
        assert main([*args, f"{option}={folder}"]) == 0


def test_episodes_name_videos_of_the_manifest_alone(manifest: Path, tmp_path: Path) -> None:
    split = Manifest.read(manifest).split("test")
    shutil.copy(split.videos[0][0].path, tmp_path / "elsewhere.mp4")
    for path in (str(tmp_path / "elsewhere.mp4"), os.path.relpath(tmp_path / "elsewhere.mp4", manifest.parent)):
        role = {label: [path] for label in split.class_names[:2]}
        (tmp_path / "e.jsonl").write_text(json.dumps({"support": role, "query": role}))
        with pytest.raises(UserError, match="the split has no video"):
            read_episodes_file(tmp_path / "e.jsonl", split, str(manifest.parent), EpisodeShape(2, 1, 1))


def test_a_cache_leads_to_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, folder = _some_manifest(tmp_path / "file"), tmp_path / "cache"
    folder.mkdir()
    paths = [str(tmp_path / "a.mp4"), "/etc/passwd", str(tmp_path.parent / "b.mp4")]
    videos = [CachedVideo(path, fingerprint(paths[0]), 2, 24, 24, "", number) for number, path in enumerate(paths)]
    write_shard(folder, str(tmp_path), Settings(24, 2, 95), [(video, [b"x", b"y"]) for video in videos])
    assert b"/etc/passwd" in next(folder.iterdir()).read_bytes()

    asked: list[str] = []

    def look_at(path: str) -> Fingerprint:
        asked.append(path)
        return fingerprint(path)

    monkeypatch.setattr(frame_cache, "fingerprint", look_at)
    data = EpisodeDataModule(str(manifest), cache=str(folder), frames=2, resize=24, size=24)
    with pytest.raises(UserError, match="too few for n_way"):  # by then the cache has been opened
        data.setup("fit")
    assert set(asked) == {str(tmp_path / "a.mp4")}
