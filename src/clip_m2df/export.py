"""Tower and head as programs of fixed shapes, for ONNX runtimes and ``torch.export``; each is compared with the model.

What is exported is copies in evaluation mode: the model itself stays as it is, where it is.
"""

import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import accumulate
from keyword import iskeyword
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple, cast, get_args

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.export import ExportedProgram

from clip_m2df.__about__ import __version__
from clip_m2df.clip.adapters import merge_adapters
from clip_m2df.clip.backbone import CLIPBackbone
from clip_m2df.errors import UserError
from clip_m2df.files import locked_folder, write_text
from clip_m2df.nn.class_text import fuse_text
from clip_m2df.nn.head import Head
from clip_m2df.nn.m2df import Towers
from clip_m2df.training.module import CLIPM2DF

Format = Literal["onnx", "pt2"]
FORMATS: tuple[str, ...] = get_args(Format)
EXPORT_FORMAT, TABLE, PROMPTS = "clip-m2df export 1", "export.json", "prompts.safetensors"

# The first ONNX operator set with GELU; onnxruntime has it since 1.17.
OPSET = 20
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# A model of one file has to stay below 2 GiB, its graph included.
MOST_IN_ONE_FILE = 2**31 - 2**24

# How far a program may be off, absolutely, or beyond 1 relatively; METHOD's for its golden numbers.
TOLERANCE = 1e-4


def export_model(
    model: CLIPM2DF,
    folder: str | os.PathLike[str],
    *,
    n_way: int,
    n_shot: int,
    n_queries: int,
    frames: int,
    batch: int = 8,
    class_names: Sequence[str] = (),
    formats: Sequence[Format] = ("onnx", "pt2"),
) -> dict[str, float]:
    """Write the visual tower, if there is one, and the head as programs, and the prompt table of some classes.

    ``tower`` takes uint8 ``frames (batch, 3, size, size)`` and gives ``features (batch, dim)``; mean and std are in it.
    ``head`` takes ``support (n_way, n_shot, frames, dim)``, ``query (n_queries, frames, dim)`` and
    ``prompts (n_way, dim)``, and gives ``logits`` and ``prompt_probabilities``, both ``(n_queries, n_way)``. The logits
    are the scores by which the model predicts, its ``text_fusion`` included. ``export.json`` has all shapes.

    Args:
        model: what to export.
        folder: a new or an empty one.
        n_way: classes that the head compares a query with.
        n_shot: examples of each.
        n_queries: videos that it scores at once.
        frames: of a video.
        batch: frames that the tower takes at once.
        class_names: what the rows of ``prompts (n_classes, dim)`` in ``prompts.safetensors`` say; by default, no file.
        formats: ``onnx``, ``pt2`` (for ``torch.export.load``), or both.

    Returns:
        By file, the largest difference of its program from the model: absolute, or beyond 1 relative.

    Raises:
        UserError: a shape that is no positive number; a head that samples, or fits a model in each episode; a folder
            that holds something already or can't be written; packages that are missing; or a program that can't be
            made, or differs from the model.
    """
    shapes = {"n_way": n_way, "n_shot": n_shot, "n_queries": n_queries, "frames": frames, "batch": batch}
    for name, value in shapes.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{name} is {value!r}; an export has fixed shapes, give a whole number of at least 1")
    if isinstance(class_names, str):
        raise UserError(f"class_names is {class_names!r}; give a list of names")
    if isinstance(formats, str) or not formats or set(formats) - set(FORMATS):
        raise UserError(f"formats is {formats!r}; give a list of {' and '.join(FORMATS)}, or of one of them")
    if "onnx" in formats and (missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]):
        raise UserError(
            f"an export to ONNX needs {', '.join(missing)}: pip install clip-m2df[export], or give formats=['pt2']"
        )
    folder = Path(folder)
    if os.path.isfile(folder):
        raise UserError(f"{folder} holds something already: name an empty or a new folder for the export")
    with locked_folder(folder, "export"):
        if any(path.name != ".lock" for path in folder.iterdir()):
            raise UserError(f"{folder} holds something already: name an empty or a new folder for the export")
        return _write(model, folder, shapes, class_names, formats)


def _write(
    model: CLIPM2DF, folder: Path, shapes: dict[str, int], class_names: Sequence[str], formats: Sequence[Format]
) -> dict[str, float]:
    prompts = model.encode_prompts(class_names).cpu().contiguous() if class_names else None
    batch = shapes.pop("batch")
    programs = {"tower": tower_program(model, batch=batch)} if model.image_size else {}
    programs["head"] = head_program(model, **shapes)
    differences: dict[str, float] = {}
    try:
        with TemporaryDirectory(dir=folder) as draft:
            for name, program in programs.items():
                differences |= write_program(program, Path(draft) / name, formats)
            if prompts is not None:
                (Path(draft) / PROMPTS).write_bytes(save_tensors({"prompts": prompts}))
            for file in sorted(Path(draft).iterdir()):
                file.replace(folder / file.name)
        table = {
            "format": EXPORT_FORMAT,
            "version": __version__,
            "reading": model.reading,
            "templates": model.model.templates,
            "class_names": list(class_names),
            "programs": {name: {"inputs": p.shapes, "outputs": p.output_shapes()} for name, p in programs.items()},
            "differences": differences,
        }
        write_text(folder / TABLE, "export", json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot export to {folder}: {error.strerror or error}; make room, or give another") from error
    return differences


class Program(NamedTuple):
    """A module to be exported, and the shapes that it is exported for.

    Attributes:
        module: from named tensors to a dictionary of them; in float32 on the CPU.
        shapes: of its inputs, by name, in the order of the module's.
        dtype: of its inputs.
    """

    module: nn.Module
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype = torch.float32

    def inputs(self, seed: int) -> dict[str, Tensor]:
        """Random inputs; of seed 0, zeros."""
        generator = torch.Generator().manual_seed(seed)
        inputs = {name: torch.zeros(shape, dtype=self.dtype) for name, shape in self.shapes.items()}
        for tensor in inputs.values() if seed else ():
            tensor.normal_(generator=generator) if tensor.is_floating_point() else tensor.random_(generator=generator)
        return inputs

    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its outputs, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.module(**self.inputs(0)).items()}


class TowerModule(nn.Module):
    """From bytes to features.

    Args:
        backbone: with a visual tower.
    """

    def __init__(self, backbone: Towers) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """Map uint8 ``frames (batch, 3, size, size)`` to ``features (batch, dim)``."""
        return {"features": self.backbone.encode_frames(self.backbone.normalise(frames))}


class HeadModule(nn.Module):
    """What a user wants of a head.

    Args:
        head: any.
        text_fusion: see :class:`clip_m2df.CLIPM2DF`.
    """

    def __init__(self, head: Head, text_fusion: float) -> None:
        super().__init__()
        self.head = head
        self.text_fusion = text_fusion

    def forward(self, support: Tensor, query: Tensor, prompts: Tensor) -> dict[str, Tensor]:
        """See :meth:`clip_m2df.nn.head.Head.forward`; ``logits`` are the scores by which the model predicts."""
        output = self.head(support, query, prompts)
        logits = fuse_text(self.head, self.text_fusion, output.logits, query, prompts)
        return {"logits": logits, "prompt_probabilities": output.prompt_probabilities}


def tower_program(model: CLIPM2DF, *, batch: int) -> Program:
    """The visual tower for ``batch`` frames at once, without the text tower."""
    backbone = model.model.backbone
    # Whatever deepcopy finds in its memo it takes for copied.
    module = TowerModule(copy.deepcopy(backbone, {id(backbone.text): None})).float()
    if backbone.adapters is not None:
        merge_adapters(cast(CLIPBackbone, module.backbone))
    shape = (batch, 3, backbone.image_size, backbone.image_size)
    return Program(_settled(module), {"frames": shape}, torch.uint8)


def head_program(model: CLIPM2DF, *, n_way: int, n_shot: int, n_queries: int, frames: int) -> Program:
    """The head for episodes of one shape.

    Raises:
        UserError: it samples, or fits a model in each episode.
    """
    head, dim = model.model.head, model.model.backbone.dim
    if not head.differentiable:
        raise UserError(
            f"the head {model.hparams['head']} fits a model in each episode, which no exported program can do: export"
            " one that does not, such as nearest_prototype"
        )
    if getattr(head, "selection", "argmax") == "sample":
        raise UserError(
            "selection 'sample' draws prompts, so that an export would not repeat; load the model with"
            " selection='argmax', 'expectation' or 'each'"
        )
    shapes = {"support": (n_way, n_shot, frames, dim), "query": (n_queries, frames, dim), "prompts": (n_way, dim)}
    return Program(_settled(HeadModule(copy.deepcopy(head), model.text_fusion)), shapes)


def _settled(module: nn.Module) -> nn.Module:
    """A module for use alone, whatever its training had of devices, precision and gradient checkpointing."""
    for part in module.modules():
        vars(part).pop("forward", None)  # checkpointing's; below it is the class's own
    module = module.eval().requires_grad_(False)
    return module.to(device="cpu", dtype=torch.float32, memory_format=torch.contiguous_format)  # type: ignore[call-overload, no-any-return]


def write_program(program: Program, stem: Path, formats: Sequence[str]) -> dict[str, float]:
    """Write a program in each format, and compare what was written with the module.

    Args:
        program: what to export.
        stem: the path without its suffix.
        formats: of ``FORMATS``.

    Returns:
        The largest difference of each file, by its name.

    Raises:
        UserError: it can't be exported, or differs from the module.
    """
    differences = {}
    try:
        with _quiet():
            exported = _trace(program)
            for name in formats:
                path = stem.with_suffix(f".{name}")
                if name == "onnx":
                    _save_onnx(exported, program, path)
                else:
                    content = io.BytesIO()  # given a file, torch ends the process where the disk is full
                    torch.export.save(exported, content)
                    path.write_bytes(content.getbuffer())
                differences[path.name] = _check(program, path)
    except (OSError, UserError):
        raise
    except Exception as error:  # what torch can't export, it says in many ways
        raise UserError(f"the {stem.name} can't be exported: {error}") from error
    return differences


def _trace(program: Program) -> ExportedProgram:
    module = copy.deepcopy(program.module)
    for part in list(module.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.ModuleDict) and any(map(iskeyword, child)):
                setattr(part, name, _Renamed(child))
    exported = torch.export.export(module, (), kwargs=program.inputs(1))
    # Beside the two, this removes the regions without autocast, which a saved program can't hold.
    decomposed: ExportedProgram = exported.run_decompositions(
        {torch.ops.aten.logaddexp.default: logaddexp, torch.ops.aten.logcumsumexp.default: logcumsumexp}
    )
    return decomposed


class _Renamed(nn.Module):
    """The items of a ``ModuleDict`` under other names: generated code trips over a view called ``global``."""

    def __init__(self, modules: nn.ModuleDict) -> None:
        super().__init__()
        self.names = tuple(modules)
        self.parts = nn.ModuleList(modules.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        return zip(self.names, self.parts, strict=True)


def logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """``log(exp(x) + exp(y))`` of operators that ONNX has.

    The exporter's own takes exp and log, which underflow with long videos, strong costs or a small smoothing.
    """
    return torch.maximum(x, y) + torch.log1p(torch.exp(-(x - y).abs()))


def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """The same for ``torch.logcumsumexp``."""
    return torch.stack(list(accumulate(x.unbind(dim), logaddexp)), dim)


def _save_onnx(exported: ExportedProgram, program: Program, path: Path) -> None:
    inputs = program.inputs(0)
    converted = torch.onnx.export(
        exported,
        (),
        kwargs=inputs,
        input_names=list(inputs),
        output_names=list(program.module(**inputs)),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert converted is not None  # as it was not given a file
    weights = [*program.module.parameters(), *program.module.buffers()]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    converted.save(path, external_data=size > MOST_IN_ONE_FILE)


def _open(path: Path) -> Callable[..., dict[str, Tensor]]:
    """A written program, to be called as the module is."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(**inputs: Tensor) -> dict[str, Tensor]:
        outputs = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

    return run


def _check(program: Program, path: Path) -> float:
    """The largest difference of a written program from the module, on zeros and on random inputs.

    Raises:
        UserError: it is above ``TOLERANCE``, or no number.
    """
    run, largest = _open(path), 0.0
    for seed in range(4):
        inputs = program.inputs(seed)
        found = run(**inputs)
        for key, expected in program.module(**inputs).items():
            difference = ((found[key] - expected).abs() / expected.abs().clamp(min=1)).max().item()
            if not difference <= TOLERANCE:
                raise UserError(
                    f"{path.name} is not kept: its {key} are off the model's by {difference:.2g}, more than"
                    f" {TOLERANCE:g}; try other versions of torch, onnxscript or onnxruntime, and tell us"
                )
            largest = max(largest, difference)
    return largest


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch's exporters say of torch's future, and of packages that nothing here needs."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
