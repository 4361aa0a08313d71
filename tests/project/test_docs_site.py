"""The documentation site builds without a warning and without the network, and its pages say what the code does."""

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

import lightning
import pytest
import yaml

import clip_m2df
from clip_m2df import CLIPM2DF, EpisodeDataModule
from clip_m2df.cli import main
from clip_m2df.commands.configs import shipped_configs
from clip_m2df.evaluation.metrics import NAMES
from clip_m2df.nn.baselines import HEADS, head_class
from clip_m2df.training import wandb_run
from clip_m2df.training.checkpoints import RunCheckpoint
from clip_m2df.training.dashboard import Dashboard

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CONFIGURATION = (DOCS / "configuration.md").read_text(encoding="utf-8")
METHOD = (DOCS / "method.md").read_text(encoding="utf-8")
FIGURE = DOCS / "figures" / "method.svg"
# A `Note:` that says how something departs from the paper or from others' code.
DEPARTURE = re.compile(r"publi(shed|c)|the paper")


class Page(HTMLParser):
    """What a page fetches to be shown, and its anchors."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.add(values.get("id", ""))
        if tag == "link":
            self.fetched.append(values["href"])
        elif tag != "a":
            self.fetched.extend(values[name] for name in ("src", "srcset", "href", "data") if values.get(name))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("project")
    shutil.copytree(DOCS, project / "docs")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (project / "mkdocs.yml").write_text(settings.replace("[src]", f"[{ROOT / 'src'}]"), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(project / "mkdocs.yml")]
    # No name is looked up where there is a proxy, and nobody listens at this one.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    built = subprocess.run(command, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr  # a warning ends a strict build, too
    return project / "build" / "site"


# ------------------------------------------------------------------------------------------------------------ the site


def test_every_page_is_in_the_navigation(site: Path) -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [page for entry in settings["nav"] for page in entry.values()]
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))
    assert all((site / page).with_suffix(".html").is_file() for page in listed)


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = sorted(site.glob("*.html"))
    assert len(pages) > 10
    for file in pages:
        assert 'class="mermaid"' not in file.read_text(encoding="utf-8")  # the theme would fetch what draws it
        for address in Page(file).fetched:
            parts = urlsplit(address)
            if parts.scheme == "data":
                continue
            assert not parts.scheme, f"{file.name}: {address}"
            assert not parts.netloc, f"{file.name}: {address}"
            # 404.html is served at any address, so that its own start at the site's.
            assert (site / parts.path.lstrip("/")).exists(), f"{file.name}: {address}"
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert styles
    for style in styles:
        assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", style)


def test_equations_are_mathml(site: Path) -> None:
    page = (site / "method.html").read_text(encoding="utf-8")
    displayed = re.findall(r"^\$\$.+\$\$$", METHOD, re.MULTILINE)
    assert len(displayed) > 10
    assert page.count('display="block"') == len(displayed)
    assert page.count("<math") == page.count("</math>") > 2 * len(displayed)
    # Nothing of LaTeX is left: neither an equation that was passed over nor a command that was not known.
    for equation in re.findall(r"<math.*?</math>", page, re.DOTALL):
        ElementTree.fromstring(equation)
        assert "\\" not in equation
    assert "arithmatex" not in page
    assert not re.search(r"\\[(\[]", page)


def test_public_names_have_entries_and_roles_are_links(site: Path) -> None:
    page = Page(site / "api.html")
    for name in set(clip_m2df.__all__) - {"__version__"}:
        assert f"clip_m2df.{name}" in page.anchors
    text = (site / "api.html").read_text(encoding="utf-8")
    assert not re.search(r":(class|func|meth|mod|attr):", text)
    # The first is named by its own module in a docstring, and has its entry as a public name.
    assert re.search(r'<a [^>]*href="#clip_m2df\.M2DFHead"[^>]*><code>M2DFHead</code></a>', text)
    assert re.search(r'<a [^>]*href="#clip_m2df\.nn\.prompts\.ensemble"[^>]*><code>ensemble</code></a>', text)


# ------------------------------------------------------------------------------------------------- configuration.md


def rows(text: str) -> dict[str, list[str]]:
    """The cells of tables, after the first, by the first."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    return {row[0].strip("`"): row[1:] for row in cells}


def section(heading: str) -> str:
    return re.split(r"\n#{2,4} ", CONFIGURATION.partition(f"# {heading}\n")[2])[0]


def test_the_page_is_what_the_script_writes() -> None:
    script = importlib.import_module("scripts.configuration_reference")
    assert script.reference() == CONFIGURATION, "run python scripts/configuration_reference.py"


SECTIONS = [("The model: `model`", CLIPM2DF, "model."), ("Episodes and videos: `data`", EpisodeDataModule, "data.")]


@pytest.mark.parametrize(
    ("heading", "cls", "prefix"),
    [*SECTIONS, *((f"`{head}`: `model.head_options`", head_class(head), "") for head in HEADS)],
)
def test_every_option_is_there_with_its_default(heading: str, cls: type, prefix: str) -> None:
    told = rows(section(heading))
    own = {prefix + name: parameter for name, parameter in inspect.signature(cls).parameters.items()}
    assert own.keys() - {"dim", "selection"} == told.keys() - {"option"}
    for name in own.keys() & told.keys():
        kind, default, text = told[name]
        assert kind.startswith("`")
        assert len(text) > 5
        assert text != "the same."
        assert not re.search(r":class:|``", text)
        value = own[name].default
        if value is inspect.Parameter.empty:
            assert default == "to be given"
        else:
            assert yaml.safe_load(default.strip("`")) == (list(value) if isinstance(value, tuple) else value)


def test_every_option_of_fit_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    options = set(re.findall(r"^  (?:-\w[^-]*, )?--([\w.]+)", capsys.readouterr().out, re.MULTILINE))
    groups = {option.partition(".")[0] for option in options if "." in option}
    wanted = {o for o in options if not o.startswith("trainer") and not o.endswith(".help")} - groups - {"help"}
    assert len(wanted) > 50
    assert wanted <= set(rows(CONFIGURATION))


def test_shipped_configs_and_recipes_are_there() -> None:
    told = rows(CONFIGURATION)
    for name, path in shipped_configs().items():
        headline = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        if name.startswith("recipes/"):
            assert f"`{name}`: {headline}" in CONFIGURATION
        else:
            assert told[name] == [headline]
    gpu = rows(section("Recipes").partition("`recipes/gpu24gb.yaml`")[2].partition("`recipes/")[0])
    assert gpu["trainer.precision"] == ["`bf16-mixed`"]
    assert gpu["data.n_query"] == ["`2`"]


def texts() -> dict[str, str]:
    """Pages, configs and notebooks, by their names."""
    files = [ROOT / "README.md", *DOCS.glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    files += (ROOT / "notebooks").glob("*.ipynb")
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}


def test_metrics_have_the_names_under_which_they_are_logged() -> None:
    logged = {f"{stage}/{name}" for stage in ("train", "val", "test") for name in NAMES}
    logged |= set(re.findall(r'"(val/\w+)"', inspect.getsource(wandb_run)))  # tables
    # A page's own loop logs what it likes; what goes on is the name of a file.
    named = re.compile(r'(?<![\w./*-])(?<!self\.log\(")((?:train|val|test)/[a-z_]+(?:/[a-z_]+)?)(?![\w./*-])')
    found = {(name, metric) for name, text in texts().items() for metric in named.findall(text)}
    assert len(found) >= 5
    assert not {(name, metric) for name, metric in found if metric not in logged}


def test_options_that_are_named_exist() -> None:
    kinds = {"model": CLIPM2DF, "data": EpisodeDataModule, "checkpoint": RunCheckpoint, "dashboard": Dashboard}
    kinds["trainer"] = lightning.Trainer
    known = {f"{group}.{option}" for group, kind in kinds.items() for option in inspect.signature(kind).parameters}
    known |= {
        f"model.head_options.{option}" for head in HEADS for option in inspect.signature(head_class(head)).parameters
    }
    # What other kinds of objects take is their own.
    named = re.compile(rf"(?:--|`)((?:model\.head_options|{'|'.join(kinds)})\.[a-z_]+)(?![\w(*])")
    found = {(name, option) for name, text in texts().items() for option in named.findall(text)}
    assert len(found) > 100
    assert not {(name, option) for name, option in found if option not in known}


# ---------------------------------------------------------------------------------------------------------- method.md


def test_every_departure_is_in_the_list() -> None:
    source = ROOT / "src" / "clip_m2df"
    noted: Counter[str] = Counter()
    for file in source.rglob("*.py"):
        for note in re.findall(r"\bNote: (.*\n?.*)", file.read_text(encoding="utf-8")):
            noted[file.relative_to(source).as_posix()] += bool(DEPARTURE.search(note))
    assert noted.total() >= 9
    listed = METHOD.partition("\n## Where it departs")[2].partition("\n## ")[0]
    for name in re.findall(r"`([\w/]+\.py)`", listed):
        assert (source / name).is_file()
    told = Counter(re.findall(r"`([\w/]+\.py)`", listed))
    assert not {name: count for name, count in noted.items() if count > told[name]}


def test_the_code_has_the_names_that_the_page_gives() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    names = {name for span in re.findall(r"`([A-Za-z_][\w.]*)`", METHOD) for name in span.split(".")}
    files = {"py", "configs", "tests", "api", "md"}
    unknown = {name for name in names - files if not re.search(rf"\b{name}\b", code)}
    assert len(names) > 50
    assert not unknown


def test_the_figure_stands_alone_and_shows_every_box() -> None:
    drawing = ElementTree.parse(FIGURE).getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert not [key for element in drawing.iter() for key in element.attrib if key.endswith(("href", "src"))]
    text = FIGURE.read_text(encoding="utf-8")
    assert not re.search(r"@import|@font-face|url\((?!#)|<script", text)
    shown = " ".join("".join(element.itertext()) for element in drawing.iter("{http://www.w3.org/2000/svg}text"))
    boxes = ("visual tower", "text tower", "PPS", "LTCE", "GTCE", "MMFE", "OTAM dl", "OTAM dg", "distillation")
    for box in (*boxes, "fusion"):
        assert box in shown
    # Each colour of the light drawing has one in the dark.
    light, dark = text.partition("@media (prefers-color-scheme: dark)")[::2]
    coloured = re.compile(r"^\s+(\.?\w+) \{[^}]*(?:fill|stroke): ?#", re.MULTILINE)
    style = dark.partition("</style>")[0]
    assert set(coloured.findall(light)) == set(coloured.findall(style))
