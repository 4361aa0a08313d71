import io
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_m2df.errors import UserError
from clip_m2df.weight_files import program_classes, read_weights
from tests.conftest import GOLDEN
from tests.project.damage import members_of, zipped

ARCHIVE = GOLDEN / "openai_archive.pt"


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():  # TorchScript is no longer developed, and says so
        warnings.simplefilter("ignore")
        yield


class Part(nn.Module):
    """A module whose attributes are those that are weights, and many that are none."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        whole = torch.arange(24).to(dtype)
        self.weight = nn.Parameter(whole.reshape(4, 6).clone(), requires_grad=dtype.is_floating_point)
        self.register_buffer("transposed", whole.reshape(4, 6).T)
        self.register_buffer("offset", whole[5:17].reshape(3, 4)[:, 1:3])
        self.register_buffer("steps", whole[1::7])
        self.register_buffer("one_for_many", whole[3:4].expand(2, 5))
        self.register_buffer("scalar", whole[7].clone())
        self.register_buffer("nothing", torch.empty(0, 3, dtype=dtype))
        self.register_buffer("unsaved", torch.ones(2, dtype=dtype), persistent=False)
        self.register_buffer("absent", None)
        self.attribute = torch.full((3,), 5.0)
        self.number, self.large, self.fraction, self.word, self.no = 3, 2**40, 0.5, "word", None
        self.device, self.phase, self.flags, self.sizes = torch.device("cpu"), 1j, [True], [1, 2]
        self.table, self.tensors, self.numbers = {"a": torch.ones(1)}, [torch.ones(1)], {1: 2.0}

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attribute.sum() + self.number + self.large + self.fraction + self.sizes[0] + self.numbers[1]
        return x.to(self.device) + self.table["a"] + self.tensors[0] if self.flags[0] and self.word == "word" else x


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = Part()
        self.parts = nn.ModuleList([first, Part(torch.float16), Part(torch.bfloat16), Part(torch.int64)])
        self.more = nn.Sequential(Part(torch.complex64), Part(torch.float64), Part(torch.uint8), Part(torch.bool))
        self.again = first  # a module by two names
        self.tied = self.more[1].weight  # a parameter by two names
        self.several = nn.ParameterList([torch.ones(2), torch.zeros(1)])
        self.view = nn.Parameter(first.weight.data[1:3])  # a storage of two tensors

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        y: Tensor = self.again(self.more(x))
        return y


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_an_archive_has_the_state_dict_that_torch_finds_in_it(how: str, tmp_path: Path) -> None:
    model, file = Whole(), tmp_path / "w.pt"
    (torch.jit.script(model) if how == "scripted" else torch.jit.trace(model, torch.ones(1))).save(str(file))
    weights, expected = read_weights(file), torch.jit.load(str(file)).state_dict()
    assert list(weights) == list(expected)
    assert {"parts.3.one_for_many", "again.nothing", "several.1", "more.0.unsaved"} <= weights.keys()
    assert not [name for name in weights if "attribute" in name or "absent" in name]
    for name, weight in weights.items():
        right = expected[name]
        assert (weight.dtype, weight.shape) == (right.dtype, right.shape), name
        assert weight.stride() == right.stride(), name
        assert torch.equal(weight, right), name
    own = model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in own.items())
    assert weights["view"].untyped_storage().data_ptr() == weights["again.weight"].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
)
def test_numbers_are_read_in_the_order_of_bytes_that_they_have(dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.jit.script(Part(dtype)).save(str(file))
    expected = read_weights(file)
    members = members_of(file.read_bytes())
    root = next(name for name in members if name.endswith("/byteorder")).removesuffix("byteorder")
    assert members[f"{root}byteorder"] == b"little"
    old = {name: content for name, content in members.items() if not name.endswith("/byteorder")}  # it had none
    members[f"{root}byteorder"] = b"big"
    for name, content in members.items():
        if name.startswith(f"{root}data/"):
            parts = [content[k : k + dtype.itemsize] for k in range(0, len(content), dtype.itemsize)]
            members[name] = b"".join(part[::-1] for part in parts)
    for other in (old, members):
        file.write_bytes(zipped(other))
        weights = read_weights(file)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_complex_numbers_are_swapped_by_their_parts(tmp_path: Path) -> None:
    class Phases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("phases", torch.tensor([1 + 2j, 3 - 4j]))

        def forward(self, x: Tensor) -> Tensor:
            return x

    torch.jit.trace(Phases(), torch.ones(1)).save(str(tmp_path / "w.pt"))
    members = members_of((tmp_path / "w.pt").read_bytes())
    (name,) = (name for name in members if "/data/" in name)
    parts = [members[name][k : k + 4][::-1] for k in range(0, len(members[name]), 4)]
    members |= {name: b"".join(parts), "w/byteorder": b"big"}
    (tmp_path / "w.pt").write_bytes(zipped(members))
    assert read_weights(tmp_path / "w.pt")["phases"].tolist() == [1 + 2j, 3 - 4j]


def test_the_class_of_an_archive_is_told(tmp_path: Path) -> None:
    assert program_classes(ARCHIVE)[0] == "__torch__.clip.model.CLIP"
    assert "__torch__.clip.model.QuickGELU" in program_classes(ARCHIVE)
    for k in range(2):  # TorchScript tells two of one name apart
        torch.jit.trace(Part(), torch.ones(1)).save(str(tmp_path / f"part{k}.pt"))
        assert program_classes(tmp_path / f"part{k}.pt")[0] == f"__torch__.{__name__}.Part"
    assert b"___torch_mangle_" in members_of((tmp_path / "part1.pt").read_bytes())["part1/data.pkl"]
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "w.pt")
    (tmp_path / "cut.pt").write_bytes(ARCHIVE.read_bytes()[:-100])
    for name in ("w.safetensors", "w.pt", "cut.pt", "nothing.pt", "."):
        assert program_classes(tmp_path / name) == []


def test_an_archive_without_weights_has_none(tmp_path: Path) -> None:
    torch.jit.script(nn.ReLU()).save(str(tmp_path / "w.pt"))
    assert read_weights(tmp_path / "w.pt") == {}


class Packed(nn.Module):
    """A module that puts its weights into its archive, and takes them out again, by methods of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight

    @torch.jit.export
    def __getstate__(self) -> Tensor:
        return self.weight

    @torch.jit.export
    def __setstate__(self, state: Tensor) -> None:
        self.weight = state


def test_weights_that_only_a_program_can_unpack_are_refused(tmp_path: Path) -> None:
    torch.jit.script(Packed()).save(str(tmp_path / "w.pt"))
    with pytest.raises(UserError, match=r"w\.pt.*Packed packs its weights by a program of its own"):
        read_weights(tmp_path / "w.pt")


def test_damage_in_what_is_read_of_an_archive_is_told(tmp_path: Path) -> None:
    whole, file = ARCHIVE.read_bytes(), tmp_path / "w.pt"
    with ZipFile(io.BytesIO(whole)) as archive:
        members = archive.infolist()
    for member in members:
        if "/data/" in member.filename or member.filename.endswith(("data.pkl", "model.py", "/byteorder")):
            damaged = bytearray(whole)
            start = (
                member.header_offset + 30 + sum(whole[member.header_offset + k] << 8 * (k % 2) for k in range(26, 30))
            )
            damaged[start + member.compress_size // 2] ^= 8
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=r"w\.pt(, a TorchScript archive,)? is damaged"):
                read_weights(file)
    for cut in (10, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"w\.pt(, a TorchScript archive,)? is damaged"):
            read_weights(file)


def test_nobody_is_advised_to_run_what_is_in_a_file(tmp_path: Path) -> None:
    for content in (b"", b"<!doctype html>", pickle.dumps(os.getcwd), pickle.dumps({"x": Path("x")}, 2)):
        (tmp_path / "w.pt").write_bytes(content)
        with pytest.raises(
            UserError, match=r"w\.pt is damaged, or holds more than tensors \(\w.*\): fetch it"
        ) as error:
            read_weights(tmp_path / "w.pt")
        assert "weights_only" not in str(error.value)
        assert "safe_globals" not in str(error.value)
