"""Each block of code in README.md and docs is run, page by page from top to bottom, or says why it isn't."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml

from clip_m2df.cli import main
from clip_m2df.commands.configs import find_config
from clip_m2df.datasets.manifest import Manifest
from clip_m2df.motion_shapes import rendering
from tests import clips
from tests.classifier.conftest import make_model
from tests.commands.test_configs import Parsed
from tests.conftest import save_checkpoint
from tests.datasets.test_data_sets import DATA_SETS, VIDEOS, Films
from tests.nn.test_m2df import published_head
from tests.training.test_published import make_published

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md"))]
MARK = re.compile(r"(?:#!.*\n)?# not run by the tests: needs \w.*\n")  # a script's first line says what runs it
# Python that another test runs.
ELSEWHERE = {"docs/export.md": "tests/test_export.py"}
# Commands of a block, each parsed in a third of a second, beyond which it is a slow test.
MANY = 20

# What is said otherwise here than on a page, so that it takes seconds, and no network.
REPLACED = {
    r"openai/clip-vit-base-patch16|\brn50\b": "tiny",
    r"max_steps=1250, precision": 'accelerator="cpu", enable_progress_bar=False, max_steps=1, precision',
    r'(?<="my\.csv", n_way=5, n_shot=1)': (
        ", n_query=1, frames=2, size=40, resize=40, episodes_per_step=1, val_episodes=2, num_workers=0"
    ),
    r'"train": 100, "test": 10\b': '"train": 1, "test": 1',
    r"--inputs 20000\b": "--inputs 2",
    r"\$resume\b": "--ckpt_path last",
}
# What commands are given besides, which wins over what they say. All that fit a command are.
FIT, TEST = r"^clip-m2df fit --config", r"^clip-m2df (test|episodes) --config"
APPENDED = {
    rf"{FIT}|{TEST}": "--data.num_workers 0 --trainer.accelerator cpu --trainer.enable_progress_bar false",
    FIT: "--trainer.max_steps 1 --data.episodes_per_step 1 --data.batch_size 1 --data.n_query 1 --data.val_episodes 2",
    TEST: "--data.test_episodes 3",
    rf"({FIT}|{TEST}) (hmdb51|ssv2)_": "--model.backbone tiny --model.head_options.hidden_dim 32 --data.frames 2",
    rf"({FIT}|{TEST}) (hmdb51|ssv2)_|{FIT}.* --data.manifest my.csv": "--data.resize 40 --data.size 40",
    rf"{FIT} (scene|order)_": "--data.train_augmentations 1",
    rf"{FIT}.* --ckpt_path last": "--trainer.max_steps 2",
    rf"{FIT}.*recipes/gpu24gb": "--trainer.precision 32-true",  # a CPU is slow at half precision
    r"^clip-m2df (check|cache) ": "--workers 1",
    r"^clip-m2df cache ": "--short_side 40 --frames 6",
    r"^clip-m2df predict ": "--workers 0",
    r"^clip-m2df encode ": "--workers 0 --frames 2 --resize 40",
    r"^clip-m2df demo$": "--episodes 4",
    r"^python -m tests\.project\.fuzz ": "--workers 1",
}
# In the place of the shipped config of that name, for the command that takes no options of it.
DEMO = {"trainer": {"max_steps": 1}, "data": {"n_query": 1, "val_episodes": 2, "num_workers": 0}}
VIDEOS_PER_CLASS = {"train": 2, "val": 2, "test": 2}  # of motion_shapes
# How commands end, if not well: of the data sets most classes are not there.
STATUS = {r"^clip-m2df prepare (?!folder)": 1}
# What a page takes for granted, done before its first block.
_HMDB51 = "clip-m2df prepare hmdb51 --root HMDB51 --output manifests/hmdb51.csv"
_SSV2 = (
    "clip-m2df prepare ssv2 --root SSV2 --lists splits/ssv2_OTAM --output manifests/ssv2.csv"
    " --annotations something-something-v2-train.json something-something-v2-validation.json"
)
BEFORE = {
    "docs/faq.md": [_HMDB51, "clip-m2df fit --config hmdb51_5way1shot.yaml --data.root HMDB51", _SSV2],
    "docs/long_runs.md": [_SSV2, "clip-m2df fit --config ssv2_5way1shot.yaml --data.root SSV2"],
    "docs/report.md": ["clip-m2df fit --config demo_5way1shot.yaml"],
}
# What it leaves besides the files that its commands are told to write.
WRITTEN = re.compile(r"--(?:output|report|bundle) (\S+)")
AFTER = {
    "README.md": ["runs/demo_5way1shot/config.yaml", "runs/demo_5way1shot/checkpoints/last.ckpt"],
    "docs/training.md": ["runs/wandb", "runs/mine/checkpoints/best.ckpt", "mine/model.safetensors"],
    "docs/data_sets.md": [
        *("manifests/hmdb51_sound.csv", "manifests/hmdb51.check.csv"),
        *(f"runs/hmdb51_5way1shot/test_{table}.csv" for table in ("classes", "confusion")),
    ],
    "docs/guarantees.md": ["jars_classifier/calibration.safetensors"],
    "docs/features.md": ["runs/mine/test_metrics.csv", "bread_classifier/support.safetensors"],
    "docs/index.md": ["runs/demo/checkpoints/best.ckpt", "runs/hmdb51_5way1shot/test_classes.csv"],
    "docs/motion_shapes.md": ["videos/manifest.csv"],
    "docs/own_videos.md": ["why.png", "jars_classifier/support.safetensors"],
}


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        page: the file that it is in.
        line: of its first line in there, counted from 1.
        language: what the fence says.
        text: what is between the fences.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def marked(self) -> bool:
        return bool(MARK.match(self.text))

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start(2)) + 1, match[1], match[2])
        for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)^```$", text, re.MULTILINE)
    ]
    # None is overlooked for being indented, or fenced otherwise.
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(found), page
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def replaced(text: str) -> str:
    for pattern, value in REPLACED.items():
        text = re.sub(pattern, value, text)
    return text


def commands_of(text: str) -> list[str]:
    """The commands of a shell block, a line each, without comments."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line) for line in lines) if line]


def completed(command: str) -> str:
    more = [options for pattern, options in APPENDED.items() if re.search(pattern, command)]
    return " ".join([replaced(command), *more])


# ------------------------------------------------------------------------------------------------ what there is to run


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all pages have their videos of motion_shapes."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages' readers have: videos, a manifest of them, data sets, checkpoints."""
    folder = tmp_path_factory.mktemp("material")
    films = Films(tmp_path_factory.mktemp("films"))
    for name in ("open_jar/0.mp4", "open_jar/1.mp4", "pour_water/0.webm", "pour_water/1.mp4"):
        films.put(folder / "support" / name)
    for number in range(9):
        films.put(folder / "further" / f"class {number // 3}" / f"{number}.mp4")
    # The last of them, and the two after it, are those of README's manifest.
    for name in ("video", "clip", "a", "b", "c", "jars/0", "jars/1", "clips/0001"):
        films.put(folder / f"{name}.mp4")
    films.put(folder / "clips/0002.webm")
    films.put(folder / "frames/0003")
    clips.render(folder / "long.mp4", n_frames=60, size=(48, 32))
    put_own_videos(folder, films)
    put_data_sets(folder, films, tmp_path_factory.mktemp("trees"))
    save_checkpoint(make_model(), folder / "best.ckpt")
    published = make_published(folder, "vit")
    published.file.rename(folder / "checkpoint.pyth")
    published.clip.rename(folder / "ViT-B-16.pt")
    return folder


def put_own_videos(folder: Path, films: Films) -> None:
    rows = ["path,label,split"]
    for split, n_videos in VIDEOS.items():
        for number in range(5):
            label = f"{split} {number}"
            for video in range(n_videos):
                films.put(folder / "my_videos" / split / label / f"{video}.mp4")
                rows.append(f"my_videos/{split}/{label}/{video}.mp4,{label},{split}")
    (folder / "my.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def put_data_sets(folder: Path, films: Films, trees: Path) -> None:
    """Small trees of the five data sets where the pages have them; what is broken in them is mended."""
    ssv2 = "20bn-something-something-v2"
    places = {"hmdb51": "HMDB51", "ucf101": "UCF-101", "kinetics100": "k400", "ssv2": ssv2, "ssv2_small": f"{ssv2}/s"}
    for name, data_set in DATA_SETS.items():
        (trees / name).mkdir()
        tree = data_set.build(trees / name, films)
        for path in sorted(tree.root.rglob("*.*")):
            if any(broken in path.name for broken in tree.broken):
                path.unlink()
                films.put(path)
        shutil.move(tree.root, folder / places[name])
        for form, lists in tree.lists.items():
            shutil.move(lists, folder / "splits" / f"{name.removesuffix('100').removesuffix('_small')}_{form}")
        for file in tree.annotations if name == "ssv2" else []:
            shutil.move(file, folder / file.name)
    shutil.copytree(folder / ssv2, folder / "SSV2")


def names() -> dict[str, Any]:
    """What Python on the pages takes for granted."""
    generator = torch.Generator().manual_seed(0)
    return {
        "__name__": "__main__",
        "support": torch.randn(3, 2, 8, 512, generator=generator),
        "query": torch.randn(4, 8, 512, generator=generator),
        "prompts": torch.randn(3, 512, generator=generator),
        "draws": torch.rand(4, generator=generator),
        "state_dict": published_head(dim=32),
        "frames": np.stack([clips.picture(number, 48, 32) for number in range(12)]),
    }


@pytest.fixture
def place(
    material: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline_wandb: None
) -> Iterator[Path]:
    """A reader's folder, and nobody's account."""
    folder = tmp_path / "reader"
    shutil.copytree(material, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CLIP_M2DF_CACHE", str(cache))
    for family in rendering.VIDEOS_PER_CLASS:
        monkeypatch.setitem(rendering.VIDEOS_PER_CLASS, family, VIDEOS_PER_CLASS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with torch.random.fork_rng():
        yield folder


# -------------------------------------------------------------------------------------------------------- running them


def run_command(command: str, where: str) -> None:
    said = completed(command)
    program, *args = shlex.split(said)
    expected = next((status for pattern, status in STATUS.items() if re.search(pattern, command)), 0)
    if program == "clip-m2df":
        try:
            status: object = main(args)
        except SystemExit as ended:  # of --help
            status = ended.code
    elif program == "python":
        flag, module, *args = args
        assert flag == "-m", where
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [module, *args])
            status = importlib.import_module(module).main()
    else:
        pytest.fail(f"{where}: the tests can't run {command!r}; mark the block `# not run by the tests: needs …`")
    assert status == expected, f"{where}: {said}"


def run_block(block: Block, scope: dict[str, Any]) -> None:
    if block.language == "sh":
        for command in commands_of(block.text):
            run_command(command, block.name)
    elif block.language == "python":
        exec(compile(replaced(block.text), block.name, "exec"), scope)
    elif block.language == "csv":
        Path("block.csv").write_text(block.text, encoding="utf-8")
        manifest = Manifest.read(Path("block.csv"))
        assert len(manifest.videos) == block.text.count("\n") - 1
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        assert isinstance(yaml.safe_load(block.text), dict)
    else:
        assert block.language == "", f"{block.name}: the tests don't know what to do with {block.language}"


def to_run(page: str) -> list[Block]:
    own = [block for block in BLOCKS if block.page == page and not block.marked]
    return [block for block in own if block.language != "python" or page not in ELSEWHERE]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)])
def test_every_block_of_a_page_runs(page: str, place: Path) -> None:
    blocks = to_run(page)
    if any("clip-m2df demo" in block.text for block in blocks):
        config = yaml.safe_load(find_config("demo_5way1shot.yaml").read_text(encoding="utf-8"))
        for section, options in DEMO.items():
            config[section] |= options
        Path("demo_5way1shot.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for command in BEFORE.get(page, []):
        run_command(command, f"before {page}")
    scope = names()
    for block in blocks:
        run_block(block, scope)
    written = [name for block in blocks if block.language == "sh" for name in WRITTEN.findall(block.text)]
    assert [file for file in (*AFTER.get(page, []), *written) if not (place / file).exists()] == []


# ------------------------------------------------------------------------------------------------- what is not run


def as_case(block: Block) -> Any:
    return pytest.param(block, id=block.name, marks=[pytest.mark.slow] * (len(commands_of(block.text)) > MANY))


@pytest.mark.parametrize("block", [as_case(block) for block in BLOCKS if block.marked])
def test_marked_blocks_are_commands_that_there_are(block: Block) -> None:
    assert block.language == "sh"
    assert subprocess.run(["bash", "-n"], input=block.text, text=True).returncode == 0
    runs: dict[str, str] = {}  # the config that each training of the block writes, and the one that it was started with
    for command in dict.fromkeys(commands_of(replaced(block.text))):
        # Another program may start it.
        if ours := re.search(r"(?:^|\s|\$\(which )clip-m2df\)? (.*)", command):
            name, *args = shlex.split(ours[1])
            given = [runs.get(arg, arg) if flag == "--config" else arg for flag, arg in pairwise([name, *args])]
            configs = [str(find_config(arg)) if flag == "--config" else arg for flag, arg in pairwise([name, *given])]
            parsed = Parsed([name, *configs]).config[name]
            if name == "fit" and "--config" in given:
                runs[f"{parsed.trainer.default_root_dir}/config.yaml"] = given[given.index("--config") + 1]
        elif command.startswith("make "):
            assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_marks_are_first_in_their_blocks() -> None:
    for block in BLOCKS:
        assert block.text.count("not run by the tests") == block.marked, block.name


def test_everything_said_otherwise_is_said_somewhere() -> None:
    for page, test in ELSEWHERE.items():
        assert any(block.page == page and block.language == "python" for block in BLOCKS)
        assert f'"{page}"' in (ROOT / test).read_text(encoding="utf-8")
    for page in (*BEFORE, *AFTER):
        assert to_run(page), page
    for pattern in REPLACED:
        assert any(re.search(pattern, block.text) for block in BLOCKS if block.language in ("sh", "python")), pattern
    commands = [c for block in BLOCKS if block.language == "sh" and not block.marked for c in commands_of(block.text)]
    for pattern in (*APPENDED, *STATUS):
        assert any(re.search(pattern, command) for command in commands), pattern
    assert "clip-m2df demo" in commands
