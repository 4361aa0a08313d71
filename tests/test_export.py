"""Exported programs give the model's numbers, in onnxruntime and after ``torch.export.load``; others are not kept."""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clip_m2df import CLIPM2DF, CLIPBackbone, UserError, export
from clip_m2df.clip.families.resnet import ModifiedResNet
from clip_m2df.export import FORMATS, Program, export_model, head_program, tower_program, write_program
from clip_m2df.files import locked_folder
from clip_m2df.nn.baselines import HEADS, head_class
from clip_m2df.nn.class_text import fuse_text
from tests.conftest import files_up_to, read_golden

PAGE = (Path(__file__).resolve().parents[1] / "docs/export.md").read_text(encoding="utf-8")
SMALL = {"hidden_dim": 32, "num_heads": 4}
N_WAY, N_QUERIES = 3, 4
HEAD_INPUTS = ("support", "query", "prompts")
# Of exports that are not to take long.
SHAPES: dict[str, Any] = {"n_way": 2, "n_shot": 1, "n_queries": 1, "frames": 2, "batch": 2}


def make(backbone: str | Path, head: str = "m2df", **options: Any) -> CLIPM2DF:
    torch.manual_seed(0)
    sizes: dict[str, Any] = SMALL if head in ("m2df", "clip_fsar") else {"width": 16} if head == "trx" else {}
    return CLIPM2DF(str(backbone), head=head, head_options=sizes | options.pop("head_options", {}), **options).eval()


def opened(path: Path, *names: str) -> Callable[..., dict[str, Tensor]]:
    """A written program whose inputs have these names."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    session = onnxruntime.InferenceSession(path)
    assert [i.name for i in session.get_inputs()] == list(names)
    outputs = [o.name for o in session.get_outputs()]

    def run(**inputs: Tensor) -> dict[str, Tensor]:
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}

    return run


def features(model: CLIPM2DF, n_shot: int, frames: int, seed: int, n_queries: int = N_QUERIES) -> dict[str, Tensor]:
    """An episode for a head; of seed 0, one of zeros."""
    generator = torch.Generator().manual_seed(1000 + seed)
    dim = model.model.backbone.dim
    shapes = {"support": (N_WAY, n_shot, frames, dim), "query": (n_queries, frames, dim), "prompts": (N_WAY, dim)}
    return {name: min(seed, 1) * 3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@torch.no_grad()
def expected_of_head(model: CLIPM2DF, episode: dict[str, Tensor]) -> dict[str, Tensor]:
    output = model.model.head(**episode)
    scores = fuse_text(model.model.head, model.text_fusion, output.logits, episode["query"], episode["prompts"])
    return {"logits": scores, "prompt_probabilities": output.prompt_probabilities}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def check_head(model: CLIPM2DF, folder: Path, n_shot: int, frames: int, formats: tuple[str, ...] = FORMATS) -> None:
    """Export a head, and compare what was written with the model on episodes of its own."""
    program = head_program(model, n_way=N_WAY, n_shot=n_shot, n_queries=N_QUERIES, frames=frames)
    differences = write_program(program, folder / "head", formats)
    assert list(differences) == [f"head.{name}" for name in formats]
    for file, difference in differences.items():
        assert difference <= 1e-4
        run = opened(folder / file, *HEAD_INPUTS)
        for seed in range(4):
            episode = features(model, n_shot, frames, seed)
            assert_same(run(**episode), expected_of_head(model, episode))


@torch.no_grad()
def check_tower(model: CLIPM2DF, folder: Path, batch: int, seed: int, formats: tuple[str, ...] = FORMATS) -> Tensor:
    """Compare a tower that was written with the model's, on frames that are black for seed 0: the features."""
    size, generator = model.model.backbone.image_size, torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8) * min(seed, 1)
    features: Tensor = model.model.encode_frames(frames)
    for name in formats:
        assert_same(opened(folder / f"tower.{name}", "frames")(frames=frames), {"features": features})
    return features


# The page: the whole model, as a user exports it


class Page(NamedTuple):
    """What running the page left.

    Attributes:
        folder: where it ran.
        scope: its names.
    """

    folder: Path
    scope: dict[str, Any]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """All Python of docs/export.md, run from top to bottom in a folder of its own."""
    folder = tmp_path_factory.mktemp("page")
    scope: dict[str, Any] = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.chdir(folder)
        torch.manual_seed(0)
        for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
            exec(compile(block, "docs/export.md", "exec"), scope)
        yield Page(folder, scope)


@pytest.mark.slow
def test_the_page_runs_every_python_block(page: Page) -> None:
    assert PAGE.count("```python") == 4
    assert {"model", "labels", "OwnModel", "plain"} <= page.scope.keys()
    # Its loops train.
    assert page.scope["trainer"].global_step == 4
    assert page.scope["losses"][-1] < page.scope["losses"][0]
    assert page.scope["predicted"].shape == (6,)


@pytest.mark.slow
def test_programs_on_disk_give_the_models_numbers(page: Page) -> None:
    model: CLIPM2DF = page.scope["model"].eval()
    folder = page.folder / "exported"
    heads = [opened(folder / f"head.{name}", *HEAD_INPUTS) for name in FORMATS]
    for seed in range(3):
        check_tower(model, folder, 8, seed)
        episode = features(model, 1, 8, seed, n_queries=2)
        for head in heads:
            assert_same(head(**episode), expected_of_head(model, episode))


@pytest.mark.slow
def test_what_lies_beside_the_programs(page: Page) -> None:
    folder, model = page.folder / "exported", page.scope["model"]
    programs = ["head.onnx", "head.pt2", "tower.onnx", "tower.pt2"]
    assert sorted(file.name for file in folder.iterdir()) == [
        "export.json",
        *programs[:2],
        "prompts.safetensors",
        *programs[2:],
    ]
    about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    assert about["class_names"] == ["run", "jump", "open a jar", "wave"]
    assert about["templates"] == ["a photo of {}"]
    assert about["programs"] == {
        "tower": {"inputs": {"frames": [8, 3, 40, 40]}, "outputs": {"features": [8, 64]}},
        "head": {
            "inputs": {"support": [3, 1, 8, 64], "query": [2, 8, 64], "prompts": [3, 64]},
            "outputs": {"logits": [2, 3], "prompt_probabilities": [2, 3]},
        },
    }
    assert about["differences"] == page.scope["differences"]
    assert sorted(about["differences"]) == programs
    assert all(0 <= difference <= 1e-4 for difference in about["differences"].values())
    table = load_file(folder / "prompts.safetensors")["prompts"]
    assert torch.equal(table, model.encode_prompts(about["class_names"]))
    for name in programs[::2]:
        saved = onnx.load(folder / name)
        assert [(entry.domain, entry.version) for entry in saved.opset_import] == [("", export.OPSET)]


@pytest.mark.slow
def test_the_page_labels_clips_as_the_model_does(page: Page) -> None:
    model, scope = page.scope["model"].eval(), page.scope
    with torch.no_grad():
        features = model.model.encode_frames(torch.from_numpy(scope["clips"]))
        prompts = model.encode_prompts(["jump", "wave", "run"])
        output = model.model.head(features[:3, None], features[3:], prompts)
    torch.testing.assert_close(torch.from_numpy(scope["logits"]), output.logits, rtol=1e-4, atol=1e-4)
    names = [["jump", "wave", "run"][place] for place in output.logits.argmax(-1)]
    assert len(names) == 2
    assert PAGE.index("labels = [classes") < PAGE.index("labels = torch.arange")  # the later block has the name now
    assert [scope["classes"][place] for place in scope["logits"].argmax(-1)] == names


# Towers and heads


@pytest.mark.slow
def test_a_resnet_tower(tmp_path: Path) -> None:
    model = make("tiny", "nearest_prototype")
    state = read_golden("clip_resnet")[1]
    model.model.backbone = CLIPBackbone.from_openai(state, head_width=64, activation="quick_gelu").train()
    assert isinstance(model.model.backbone.visual, ModifiedResNet)
    write_program(tower_program(model, batch=2), tmp_path / "tower", FORMATS)
    assert check_tower(model, tmp_path, 2, seed=7).abs().max() > 1e-2


def test_a_tower_that_was_trained_with_checkpointing_has_no_text_tower(tiny_clip_dir: Path, tmp_path: Path) -> None:
    model = make(tiny_clip_dir, "nearest_prototype", gradient_checkpointing=True).train()
    program = tower_program(model, batch=2)
    assert write_program(program, tmp_path / "tower", ["pt2"])["tower.pt2"] <= 1e-4
    assert not any("text" in name for name in torch.export.load(tmp_path / "tower.pt2").state_dict)
    # The model is as it was.
    assert model.training
    assert model.model.backbone.text is not None
    assert all(p.requires_grad for p in model.model.backbone.visual.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("frames", [4, 8])
@pytest.mark.parametrize("n_shot", [1, 3])
@pytest.mark.parametrize("head", [name for name in HEADS if head_class(name).differentiable])
def test_heads_of_all_shapes(head: str, n_shot: int, frames: int, tiny_clip_dir: Path, tmp_path: Path) -> None:
    own = {"frames": frames} if head == "ts_fsar" else {}
    check_head(make(tiny_clip_dir, head, head_options=own), tmp_path, n_shot, frames)


@pytest.mark.slow
def test_options_of_the_head_and_a_share_of_the_text(tiny_clip_dir: Path, tmp_path: Path) -> None:
    # A temperature at which the expectation is no single prompt.
    options = {"views": ["global"], "temperature": 5.0}
    model = make(tiny_clip_dir, head_options=options, selection="expectation", text_fusion=0.3)
    check_head(model, tmp_path, n_shot=2, frames=2, formats=("onnx",))
    episode = features(model, 2, 2, seed=1)
    as_exported = expected_of_head(model, episode)["logits"]
    model.text_fusion = 0.0
    assert (as_exported - expected_of_head(model, episode)["logits"]).abs().max() > 0.1


@pytest.mark.slow
def test_a_query_with_the_prompt_of_each_class(tiny_clip_dir: Path, tmp_path: Path) -> None:
    model = make(tiny_clip_dir, selection="each")
    check_head(model, tmp_path, n_shot=2, frames=4)
    episode = features(model, 2, 4, seed=1)
    as_exported = expected_of_head(model, episode)["logits"]
    model.model.head.selection = "argmax"
    assert (as_exported - expected_of_head(model, episode)["logits"]).abs().max() > 1e-3


def test_strong_costs_do_not_underflow(tiny_clip_dir: Path, tmp_path: Path) -> None:
    # exp of a column's scores, some −200 each, is 0 in float32.
    check_head(make(tiny_clip_dir, "otam", head_options={"smoothing": 0.005}), tmp_path, 1, 2, formats=("onnx",))


def test_what_onnx_lacks_is_written_stably() -> None:
    x, y = torch.tensor([0.0, -500.0, 300.0]), torch.tensor([0.0, -501.0, -300.0])
    torch.testing.assert_close(export.logaddexp(x, y), torch.logaddexp(x, y))
    columns = 200 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    for dim in (0, 1):
        torch.testing.assert_close(export.logcumsumexp(columns, dim), columns.logcumsumexp(dim))


def test_weights_beyond_a_files_size_lie_beside_it(
    tiny_clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MOST_IN_ONE_FILE", 0)
    model = make(tiny_clip_dir, "nearest_prototype")
    write_program(tower_program(model, batch=2), tmp_path / "tower", ["onnx"])
    assert (tmp_path / "tower.onnx.data").stat().st_size > (tmp_path / "tower.onnx").stat().st_size
    check_tower(model, tmp_path, 2, seed=1, formats=("onnx",))


# What is refused


@pytest.fixture(scope="module")
def plain_model(tiny_clip_dir: Path) -> CLIPM2DF:
    return make(tiny_clip_dir, "nearest_prototype")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: 2.0}, f"{name} is 2.0; an export has fixed shapes") for name in SHAPES),
        *(({"n_way": value}, f"n_way is {value!r}; an export has fixed shapes") for value in (0, -1, True, "2")),
        *(({"formats": value}, "give a list of onnx and pt2, or of one of them") for value in ([], ["onxx"], "onnx")),
        ({"class_names": "run"}, "class_names is 'run'; give a list"),
    ],
)
def test_options_out_of_range_are_refused_by_name(
    options: dict[str, Any], message: str, plain_model: CLIPM2DF, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export_model(plain_model, tmp_path / "e", **(SHAPES | options))
    assert not (tmp_path / "e").exists()


def test_a_head_that_samples_is_refused(tiny_clip_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="selection 'sample' draws prompts"):
        export_model(make(tiny_clip_dir, selection="sample"), tmp_path / "e", **SHAPES)


def test_a_head_that_no_program_can_hold_is_refused(tiny_clip_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"linear_probe fits a model in each episode.*such as nearest_prototype"):
        export_model(make(tiny_clip_dir, "linear_probe"), tmp_path / "e", **SHAPES)
    with pytest.raises(UserError, match=r"weighs 8 frames, and videos have 2: set model\.head_options\.frames"):
        export_model(make(tiny_clip_dir, "ts_fsar"), tmp_path / "e", **SHAPES)
    assert not [file for file in (tmp_path / "e").iterdir() if file.name != ".lock"]


def test_missing_packages_are_named(plain_model: CLIPM2DF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(
        UserError, match=r"needs onnxscript: pip install clip-m2df\[export\], or give formats=\['pt2'\]"
    ):
        export_model(plain_model, tmp_path / "e", **SHAPES)
    assert list(export_model(plain_model, tmp_path / "e", **SHAPES, formats=["pt2"])) == ["tower.pt2", "head.pt2"]


@pytest.mark.parametrize("size", [10, 20_000])
@pytest.mark.parametrize("format_", FORMATS)
def test_a_full_disk_ends_an_export_with_a_line(
    format_: export.Format, size: int, plain_model: CLIPM2DF, tmp_path: Path
) -> None:
    with files_up_to(size), pytest.raises(UserError, match=f"cannot export to {tmp_path}: File too large; make room"):
        export_model(plain_model, tmp_path, formats=[format_], **SHAPES)
    assert not list(tmp_path.iterdir())


def test_one_export_has_a_folder(plain_model: CLIPM2DF, tmp_path: Path) -> None:
    with locked_folder(tmp_path / "e", "export"), pytest.raises(UserError, match="another process writes the export"):
        export_model(plain_model, tmp_path / "e", **SHAPES)
    assert not list((tmp_path / "e").iterdir())


def test_a_folder_in_use_is_left_alone(plain_model: CLIPM2DF, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="holds something already: name an empty or a new folder"):
            export_model(plain_model, folder, **SHAPES)
    with pytest.raises(UserError, match=r"cannot write the export .*notes\.txt/e: Not a directory"):
        export_model(plain_model, tmp_path / "notes.txt" / "e", **SHAPES)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


class Drifting(torch.nn.Module):
    """Doubles its input, but as a program not quite: some numbers of some inputs are off."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": 2 * x * (1 + self.error) if torch.compiler.is_exporting() else 2 * x}


@pytest.mark.parametrize(("error", "refused"), [(2e-4, True), (float("nan"), True), (5e-5, False)])
def test_a_program_that_differs_is_refused(error: float, refused: bool, tmp_path: Path) -> None:
    program = Program(Drifting(error), {"x": (50,)})
    if not refused:
        assert write_program(program, tmp_path / "head", ["pt2"])["head.pt2"] == pytest.approx(error, rel=0.05)
        return
    with pytest.raises(UserError, match=r"head.pt2 is not kept: its y are off the model's by (0.0002|nan), more"):
        write_program(program, tmp_path / "head", ["pt2"])


def test_nothing_is_kept_with_a_damaged_file(
    plain_model: CLIPM2DF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, written = torch.export.save, []

    def cut(exported: Any, file: io.BytesIO) -> None:
        save(exported, file)
        written.append(file)
        if len(written) == 2:  # the head, which is the last
            file.truncate(1000)

    monkeypatch.setattr(torch.export, "save", cut)
    with pytest.raises(UserError, match="the head can't be exported: "):
        export_model(plain_model, tmp_path / "e", **SHAPES, formats=["pt2"])
    assert list((tmp_path / "e").iterdir()) == []


class Looking(torch.nn.Module):
    """Does one thing or another, as its numbers are."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x if x.sum() > 0 else -x}


def test_a_module_that_looks_at_its_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the head can't be exported: "):
        write_program(Program(Looking(), {"x": (3,)}), tmp_path / "head", ["pt2"])


@pytest.mark.parametrize("head", ["otam", pytest.param("m2df", marks=pytest.mark.slow)])
def test_a_model_without_a_tower_is_exported_as_its_head(head: str, tmp_path: Path) -> None:
    model = make_of_features(head)
    found = export_model(model, tmp_path / "out", **SHAPES, class_names=["b", "a"], formats=["pt2"])
    assert list(found) == ["head.pt2"]
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {
        *("head.pt2", "prompts.safetensors", "export.json", ".lock")
    }
    about = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))
    assert list(about["programs"]) == ["head"]
    assert about["programs"]["head"]["inputs"]["query"] == [1, 2, 24]
    prompts = load_file(tmp_path / "out" / "prompts.safetensors")["prompts"]
    assert prompts.equal(torch.stack([torch.full((24,), 2.0), torch.full((24,), 1.0)]))
    check_head(model, tmp_path, 2, 5, ("pt2",))


def make_of_features(head: str) -> CLIPM2DF:
    """A model of features 24 wide that knows two classes."""
    torch.manual_seed(0)
    sizes = SMALL if head == "m2df" else {}
    model = CLIPM2DF("features", {"dim": 24}, head=head, head_options=sizes).eval()
    cast(CLIPBackbone, model.model.backbone).keep_classes({"a": torch.ones(24), "b": torch.full((24,), 2.0)})
    return model
