import itertools
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_m2df.errors import UserError
from study.page import filled, render
from study.results import (
    REFERENCE,
    Cell,
    Coverage,
    Outcome,
    Point,
    Record,
    accuracy,
    difference,
    read_coverage,
    read_results,
)
from study.schedule import current, to_do
from study.settings import Settings
from tests.study.test_results import COVERAGE, choice, measurement

ROOT = Path(__file__).parents[2]
TESTS = ("clean", "noise=0.05", "noise=0.1", "outliers=0.4")


def outcomes(rng: np.random.Generator, share: float, tests: tuple[str, ...], **shares: Any) -> dict[str, Outcome]:
    return {test: Outcome("".join(map(str, rng.binomial(5, share, 60))), 5, **shares) for test in tests}


def rendered_page(records: list[Record], folder: Path, findings: str = "") -> str:
    """The front page that is rendered into a folder, and the tables after it."""
    render(records, findings, folder)
    return pages(folder)


def pages(folder: Path) -> str:
    return "".join((folder / name).read_text(encoding="utf-8") for name in ("results.md", "results_tables.md"))


def study() -> list[Record]:
    """Two families, one and five shots, two seeds; a tower part of one cell."""
    rng = np.random.default_rng(0)
    records = []
    for family in ("scene", "order"):
        for n_shot in (1, 5):
            where: dict[str, Any] = {"family": family, "n_shot": n_shot}
            for row, share in ((REFERENCE, 0.7), ("without PPS", 0.4)):
                records += [choice(row, lr, v, **where) for lr, v in ((0.01, 0.5), (0.001, 0.625))]
                for seed in (0, 1):
                    curve = tuple(Point(e, share - 0.1 + 0.01 * seed + e / 10000) for e in (160, 320, 480))
                    of_views = {"pps_accuracy": 0.5 + seed / 4, "view_agreement": 0.75, "local_accuracy": 0.25}
                    tests = outcomes(rng, share, TESTS, **of_views if row == REFERENCE else {})
                    records.append(measurement(row, seed, tests=tests, curve=curve, seconds=1800, **where))
            tests = outcomes(rng, 0.3, TESTS[:2])
            command = f"clip-m2df test --model.head otam --data.n_shot {n_shot}"
            records.append(measurement("OTAM", lr=None, tests=tests, seconds=0, command=command, **where))
    for row in (REFERENCE, "OTAM"):
        records.append(measurement(row, part="tower", tests=outcomes(rng, 0.5, ("clean",)), seconds=1800))
    return records


def further() -> list[Record]:
    """The part with further heads: unknown queries of two seeds and of a head without training, and twins."""
    records = []
    for seed, (on_val, auroc) in enumerate(((0.75, 0.5), (0.625, 0.75))):
        metrics = {"val/auroc/distance": 0.5, "val/auroc/margin": on_val, "auroc/distance": 0.875}
        metrics |= {"auroc/margin": auroc, "oscr/margin": 0.25, "fpr95/margin": 0.9375}
        opened = Outcome("2222", 5, metrics=metrics, options="--data.unknown_queries 5")
        tests = {"open set": opened}
        told = "--data.knobs.twins 0.5"
        shares = {"twin_share": 0.25, "accuracy_twins": 0.875, "accuracy_without_twins": 0.75}
        tests["twins, random"] = Outcome("4444", 5, metrics=shares, options=told)
        shares = {"twin_share": 0.0, "accuracy_without_twins": 0.5}
        tests["twins, grouped"] = Outcome("2222", 5, metrics=shares, options=f"{told} --data.episodes grouped")
        records.append(measurement(REFERENCE, seed, part="heads", tests=tests))
        each = measurement("each, at test", seed, part="heads", weights_of=REFERENCE, tests={"open set": opened})
        records.append(each)
    metrics = {f"{kind}/distance": 0.5 for kind in ("val/auroc", "auroc", "oscr", "fpr95")} | {"val/auroc/margin": 0.25}
    opened = Outcome("1111", 5, metrics=metrics, options="--data.unknown_queries 5")
    command = "clip-m2df test --model.head linear_probe --model.head_options '{}' --data.n_shot 1"
    records.append(measurement("probe", lr=None, part="heads", command=command, tests={"open set": opened}))
    return records


FINDINGS = "PPS: {difference: without PPS | scene | 1}.\n"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    render(study(), FINDINGS, folder)
    return folder


@pytest.fixture
def text(rendered: Path) -> str:
    return pages(rendered)


def tables(text: str, after: str) -> list[dict[str, dict[str, str]]]:
    """The tables from a line on to the next heading, each as its rows by their first cell, by the column's name."""
    lines = text.splitlines()
    found: list[dict[str, dict[str, str]]] = []
    header: list[str] = []
    for line in lines[lines.index(after) + 1 :]:
        if line.startswith("#"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            header = []
        elif not header:
            header = cells
            found.append({})
        elif set(cells[0]) != {"-"}:
            found[-1][cells[0]] = dict(zip(header, cells, strict=True))
    return found


def number(text: str) -> float:
    return float(text.strip("*").replace("−", "-"))


@pytest.mark.parametrize("n_shot", [1, 5])
@pytest.mark.parametrize("family", ["scene", "order"])
def test_the_main_table_has_each_cells_numbers(text: str, family: str, n_shot: int) -> None:
    (table,) = tables(text.split("## Harder")[0], f"### `{family}`")
    name = "1 shot" if n_shot == 1 else "5 shots"
    assert list(table) == [REFERENCE, "without PPS", "OTAM"]
    for row, line in table.items():
        cell = Cell("main", family, n_shot, row)
        expected, apart = accuracy(study(), cell), difference(study(), cell)
        mean, interval = line[name].split(" ± ")
        assert float(mean) == pytest.approx(100 * expected.mean, abs=0.051)
        assert float(interval) == pytest.approx(100 * expected.interval, abs=0.051)
        if row == REFERENCE:
            assert line[f"Δ, {name}"] == ""
        else:
            mean, interval = line[f"Δ, {name}"].split(" ± ")
            assert number(mean) == pytest.approx(100 * apart.mean, abs=0.051)
            assert number(interval) == pytest.approx(100 * apart.interval, abs=0.051)
            assert line[f"Δ, {name}"].startswith("**−") is apart.established
        if row == "OTAM":
            assert line[f"range, {name}"] == "one run"
        else:
            seeds = [float(text) for text in line[f"range, {name}"].split(" to ")]
            assert seeds == pytest.approx([100 * expected.lowest, 100 * expected.highest], abs=0.051)


def test_a_cell_to_the_letter(tmp_path: Path) -> None:
    # Of 5 queries 1, 1, 0, 2 more: a mean of 1 and a deviation of √½ fifths, 1.96 √½ / √4 of these.
    records = [measurement(REFERENCE, 0, "2222"), measurement("more", 0, "3324"), measurement("same", 0, "2222")]
    records.append(measurement("less", 0, "1213"))
    (table,) = tables(rendered_page(records, tmp_path), "### `scene`")
    assert table[REFERENCE]["1 shot"] == "40.0 ± 0.0"
    assert table["more"]["1 shot"] == "60.0 ± 13.9"
    assert table["more"]["Δ, 1 shot"] == "**+20.0 ± 13.9**"
    assert table["same"]["Δ, 1 shot"] == "+0.0 ± 0.0"
    assert table["less"]["Δ, 1 shot"] == "−5.0 ± 16.3"


def test_the_adapters_part_is_compared_with_lora(tmp_path: Path) -> None:
    where: dict[str, Any] = {"part": "adapters"}
    records = [
        measurement(row, seed, text, **where) for seed in (0, 1) for row, text in (("frozen", "1213"), ("LoRA", "2222"))
    ]
    records += [measurement(REFERENCE, seed, "3333") for seed in (0, 1)]
    text = rendered_page(records, tmp_path, "{adapters_difference: frozen | scene | 1}")
    (table,) = tables(text.split("## Accuracy, adapters compared")[1], "### `scene`")
    assert {row: cells["Δ, 1 shot"] for row, cells in table.items()} == {"frozen": "−5.0 ± 16.3", "LoRA": ""}
    assert "−5.0 ± 16.3" in text.split("## How it was done")[0]
    assert f"the difference from {REFERENCE} (adapters compared: from LoRA), episode by episode" in text


def test_knob_tables_have_clean_and_each_level_with_differences_below(text: str) -> None:
    noise = tables(text, "### Noise")
    assert len(noise) == 4  # two families, 1 and 5 shots
    table = noise[1]
    assert list(table) == [REFERENCE, "without PPS", "OTAM"]
    assert list(table["OTAM"]) == ["method", "from", "clean", "0.05", "0.1"]
    cell = Cell("main", "scene", 5, "without PPS")
    above, below = table["without PPS"]["0.1"].split("<br>")
    assert above.split()[0] == f"{100 * accuracy(study(), cell, 'noise=0.1').mean:.1f}"
    expected = 100 * difference(study(), cell, test="noise=0.1").mean
    assert number(below.split()[0]) == pytest.approx(expected, abs=0.051)
    assert "<br>" not in table[REFERENCE]["0.1"]
    # OTAM was not tested there, and not at all with outliers.
    assert table["OTAM"]["0.1"] == "–"
    assert all("OTAM" not in table for table in tables(text, "### Outliers"))


def test_views_rates_and_the_tower_have_their_tables(text: str) -> None:
    clean, harder = tables(text, "## Views and prompts")
    assert clean["`scene`"] == {
        "family": "`scene`",
        "shots": "5",  # the last of this family
        "method": REFERENCE,
        "from": "m2df; seeds 0, 1",
        "PPS": "62.5",
        "local view": "25.0",
        "global view": "–",
        "views agree": "75.0",
        "accuracy": clean["`scene`"]["accuracy"],
    }
    assert harder["`order`"]["test"] == "outliers=0.4"
    rate = tables(text, "## Learning rates")[0]
    assert rate[REFERENCE] == {"method": REFERENCE, "0.001": "**62.5**", "0.01": "50.0"}
    assert "OTAM" not in rate
    (tower,) = tables(text.split("## Accuracy, tower")[1], "### `scene`")
    cell = Cell("tower", "scene", 1, "OTAM")
    assert tower["OTAM"]["1 shot"].split()[0] == f"{100 * accuracy(study(), cell).mean:.1f}"


def test_the_open_set_has_the_score_that_val_chose(tmp_path: Path) -> None:
    (table,) = tables(rendered_page(further(), tmp_path), "### Open set: `scene`, 1 shot")
    assert table[REFERENCE] == {
        "method": REFERENCE,
        "from": "m2df; seeds 0, 1",
        "accuracy": "40.0 ± 0.0",
        "score": "margin",  # the distance would be better on test
        "AUROC on val, lead": "68.8, 18.8",
        "AUROC": "62.5 (50.0 to 75.0)",
        "OSCR": "25.0",
        "FPR95": "93.8",
        "AUROC, distance": "87.5",
        "AUROC, margin": "62.5 (50.0 to 75.0)",
    }
    assert table["each, at test"]["from"] == f"m2df; seeds 0, 1; weights of {REFERENCE}"
    assert table["probe"]["from"] == "linear_probe; not trained"
    assert [table["probe"][name] for name in ("score", "AUROC", "AUROC, margin")] == ["distance", "50.0", "–"]


def test_each_row_of_the_twins_says_its_episodes(tmp_path: Path) -> None:
    text = rendered_page(further(), tmp_path)
    lines = [line for line in text.split("## Twins")[1].splitlines() if line.startswith("| `scene`")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[4:-1] for row in rows] == [
        ["twins, random", "80.0 ± 0.0", "**+40.0 ± 0.0**", "25.0", "87.5", "75.0"],
        ["twins, grouped", "40.0 ± 0.0", "", "0.0", "–", "50.0"],
    ]
    assert rows[1][-1] == "`--data.knobs.twins 0.5 --data.episodes grouped`"
    assert {row[3] for row in rows} == {"m2df; seeds 0, 1"}


def test_a_row_says_how_it_was_trained_otherwise(tmp_path: Path) -> None:
    command = "clip-m2df fit --model.head clip_fsar --data.train_n_shot 5 --seed_everything 1"
    text = rendered_page([measurement(REFERENCE, 1), measurement("more shots", 1, command=command)], tmp_path)
    (table,) = tables(text, "### `scene`")
    assert table[REFERENCE]["from"] == "m2df; seed 1"
    assert table["more shots"]["from"] == "clip_fsar; seed 1; trained with 5 shots"


def test_sets_have_their_rates_beside_what_was_promised(tmp_path: Path) -> None:
    lines = [Coverage(**COVERAGE | {"family": family}) for family in ("scene", "order")]
    template = "{coverage: order | 1 | 0.1}; {unknown_coverage: scene | 1 | 0.1}; {set_size: scene | 1 | 0.1}"
    render([measurement(REFERENCE)], template + "; {false_rejection: scene | 1 | 0.1}", tmp_path, lines)
    text = pages(tmp_path)
    (table,) = tables(text, "## Sets with a promised rate")
    assert list(table) == ["`scene`", "`order`"]
    assert [*table["`order`"].values()][1:] == (
        ["5", "1", "90.0", "91.0 ± 1.0", "92.0 ± 2.0", "1.25", "25.0", "12.5", "8.0 ± 0.5", "10.0"]
    )
    assert "91.0 ± 1.0; 92.0 ± 2.0; 1.2; 8.0 ± 0.5" in text.split("# Tables")[0]
    for field in ("{coverage: demo | 1 | 0.1}", "{set_size: scene | 1 | 0.05}", "{coverage: scene | 1}"):
        with pytest.raises(UserError, match="which was not measured"):
            filled(field, [], lines)


def test_findings_may_name_further_tests() -> None:
    template = (
        f"{{heads_auroc: {REFERENCE} | scene | 1}} {{heads_oscr: {REFERENCE} | scene | 1}} "
        f"{{heads_fpr95: {REFERENCE} | scene | 1}}; {{heads_overstated: {REFERENCE} | scene | 1}}; "
        "{heads_difference: probe | scene | 1 | open set}"
    )
    assert filled(template, further()) == "62.5 25.0 93.8; +40.0 ± 0.0; −20.0 ± 0.0"


def test_how_it_was_done_is_told_from_the_records(text: str) -> None:
    (parts,) = tables(text, "## How it was done")
    assert parts["frozen tower"] == {
        "": "frozen tower",
        "test episodes": "60 of 5 queries",
        "training episodes": "48, 480",
        "seeds": "0, 1",
        "rates tried": "0.001, 0.01",
        "runs": "18",
        # 16 measurements of half an hour, and choices of 1.5 s.
        "hours": "8.0",
    }
    assert parts["tower trained too"]["hours"] == "1.0"
    assert "`make study`" in text
    assert "# OTAM, frozen tower: scene, 1 shot, seed 0\nclip-m2df test --model.head otam --data.n_shot 1\n" in text
    assert "Run with torch 2.6." in text


def test_another_rows_weights_are_told_and_their_run_counts_once(tmp_path: Path) -> None:
    records = [measurement(REFERENCE, seconds=3600)]
    records.append(measurement("sampled", seconds=3600, weights_of=REFERENCE))
    text = rendered_page(records, tmp_path)
    assert "Tested with another row's weights: sampled with those of CLIP-M²DF." in text
    (parts,) = tables(text, "## How it was done")
    assert (parts["frozen tower"]["runs"], parts["frozen tower"]["hours"]) == ("1", "2.0")


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes(rendered: Path, tmp_path: Path) -> None:
    render(study(), FINDINGS, tmp_path)
    files = sorted(path.relative_to(rendered) for path in rendered.rglob("*") if path.is_file())
    assert [str(path) for path in files] == [
        *(f"figures/results_{name}.png" for name in ("curves", "noise", "outliers", "views")),
        "results.md",
        "results_tables.md",
    ]
    for path in files:
        assert (tmp_path / path).read_bytes() == (rendered / path).read_bytes()


def test_figures_are_shown_and_small_and_tell_nothing_of_their_making(rendered: Path, text: str) -> None:
    for path in (rendered / "figures").iterdir():
        assert text.count(f"](figures/{path.name})") == 1
        assert path.stat().st_size < 60_000
        with Image.open(path) as picture:
            assert picture.info == {}
            assert len(picture.convert("RGB").getcolors(10_000) or []) > 10


def test_other_results_are_drawn_otherwise(rendered: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tests, curve = outcomes(rng, 0.2, TESTS, view_agreement=0.1), (Point(160, 0.1), Point(320, 0.9))
    render([measurement(REFERENCE, tests=tests, curve=curve)], "", tmp_path)
    for path in (rendered / "figures").iterdir():
        assert (tmp_path / "figures" / path.name).read_bytes() != path.read_bytes()


def test_findings_are_filled_in() -> None:
    records = [
        measurement(REFERENCE, seed, "2222", tests={"noise=0.2": Outcome("1111", 5, 0.5, 0.75)}) for seed in (0, 1)
    ]
    records += [measurement("more", 0, "3324", lr=None)]
    records += [measurement(row, 0, text, part="tower") for row, text in ((REFERENCE, "5555"), ("more", "4444"))]
    records += [measurement(row, 0, text, part="adapters") for row, text in (("LoRA", "3333"), ("full", "4444"))]
    template = (
        "{accuracy: more | scene | 1}; {accuracy: CLIP-M²DF | scene | 1 | noise=0.2}; {difference: more|scene|1}; "
        "{pps_accuracy: CLIP-M²DF | scene | 1 | noise=0.2} {view_agreement: CLIP-M²DF | scene | 1 | noise=0.2}; "
        "{tower_accuracy: more | scene | 1}; {tower_difference: more | scene | 1}; "
        "{adapters_accuracy: LoRA | scene | 1}; {adapters_difference: full | scene | 1}"
    )
    expected = "60.0 ± 13.9; 20.0 ± 0.0; +20.0 ± 13.9; 50.0 75.0; 80.0 ± 0.0; −20.0 ± 0.0; 60.0 ± 0.0; +20.0 ± 0.0"
    assert filled(template, records) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{precision: CLIP-M²DF | scene | 1}", "unknown field {precision: CLIP-M²DF"),
        ("{adapter_accuracy: LoRA | scene | 1}", "after tower_, adapters_, heads_"),
        ("{accuracy}", "{accuracy} can't be read: write it like"),
        ("{accuracy: CLIP-M²DF | scene}", "can't be read: write it like"),
        ("{accuracy: CLIP-M²DF | scene | one}", "can't be read: write it like"),
        ("{accuracy: CLIP-MDF | scene | 1}", "{accuracy: CLIP-MDF | scene | 1}: nothing was measured of 'CLIP-MDF'"),
        ("{accuracy: OTAM | scenes | 1}", "nothing was measured of 'OTAM' on scenes"),
        ("{accuracy: OTAM | scene | 2}", "nothing was measured of 'OTAM' on scene, 2 shots"),
        ("{difference: OTAM | scene | 1 | noise=0.3}", "no test 'noise=0.3'"),
        ("{pps_accuracy: OTAM | scene | 1}", "no pps_accuracy"),
        ("{tower_accuracy: without PPS | scene | 1}", "tower trained too"),
        ("{adapters_accuracy: LoRA | scene | 1}", "adapters compared"),
        ("{accuracy: OTAM | scene | 1", "a brace without its other: …'{accuracy: OTAM"),
    ],
)
def test_a_field_that_has_no_value_is_refused_and_nothing_written(template: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        render(study(), template, tmp_path)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_study_that_was_interrupted_is_shown_as_far_as_it_went(tmp_path: Path) -> None:
    # The last cell of all, and one seed of the method in another, are missing; so is the tower's method.
    late = (Cell("main", "order", 5, "without PPS"), Cell("tower", "scene", 1, REFERENCE))
    missing = {(Cell("main", "scene", 5, REFERENCE), 1), *itertools.product(late, (0, 1))}
    records = [record for record in study() if (record.cell, record.seed) not in missing]
    text = rendered_page(records, tmp_path, "So far.")
    (scene,), (order,) = (tables(text, f"### `{family}`") for family in ("scene", "order"))
    assert [order["without PPS"][name] for name in ("5 shots", "Δ, 5 shots", "range, 5 shots")] == ["–"] * 3
    assert scene[REFERENCE]["5 shots"] == scene["without PPS"]["Δ, 5 shots"] == "–"
    assert "–" not in scene["without PPS"]["5 shots"]
    assert "–" not in scene["without PPS"]["Δ, 1 shot"]
    (tower,) = tables(text.split("## Accuracy, tower")[1], "### `scene`")
    assert tower["OTAM"]["Δ, 1 shot"] == "–"
    with pytest.raises(UserError, match="was not measured with seed 1"):
        filled("{accuracy: CLIP-M²DF | scene | 5}", records)


@pytest.mark.parametrize("records", [[], [choice(REFERENCE, 0.1, 0.5)], [measurement("OTAM", lr=None)]])
def test_hardly_any_results_render_too(records: list[Record], tmp_path: Path) -> None:
    assert "Nothing yet." in rendered_page(records, tmp_path, "Nothing yet.")


def test_runs_that_do_not_go_together_are_no_dash(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="on 3 episodes"):
        render([measurement(REFERENCE, 0, "1234"), measurement("other", 0, "123")], "", tmp_path)
    assert not (tmp_path / "results.md").exists()
    assert not (tmp_path / "results_tables.md").exists()


def test_a_table_keeps_bars_within_their_cells(tmp_path: Path) -> None:
    assert r"| x\|y " in rendered_page([measurement(REFERENCE), measurement("x|y")], tmp_path)


@pytest.mark.slow
def test_the_study_is_whole_and_its_page_is_what_the_results_say(tmp_path: Path) -> None:
    settings = Settings.read(ROOT / "configs/study/full.yaml")
    records = read_results(ROOT / "study/results.jsonl")
    assert to_do(settings, records) == []
    assert len(settings.seeds) >= 3
    records = current(settings, records)
    for record in records:
        assert record.command.startswith("clip-m2df ")
        assert record.versions
        assert all(len(outcome.correct) >= 2000 for outcome in record.tests.values())
    findings = (ROOT / "study/findings.md").read_text(encoding="utf-8")
    render(records, findings, tmp_path, read_coverage(ROOT / "study/coverage.jsonl"))
    for name in ("results.md", "results_tables.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / "docs" / name).read_text(encoding="utf-8")
    drawn = {file.name for file in (tmp_path / "figures").iterdir()}
    assert drawn == {file.name for file in (ROOT / "docs/figures").glob("results_*.png")}


def test_the_front_page_can_be_read_in_two_minutes() -> None:
    """At most 400 words, all marks of tables and lists among them."""
    front = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert 100 < len(front.split()) <= 400
    assert "(results_tables.md)" in front


def test_the_commands_can_be_run_one_after_another() -> None:
    """No training meets the run folder of another, and each test finds the one that it is of."""
    lines = (ROOT / "docs/results_tables.md").read_text(encoding="utf-8").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("clip-m2df ")]
    trained: dict[str, str] = {}
    for _, verb, *options in commands:
        values = dict(zip(options[::2], options[1::2], strict=True))
        folder = values.get("--trainer.default_root_dir", "")
        if verb == "fit":
            assert folder not in trained
            trained[folder] = values["--seed_everything"]
        elif "--ckpt_path" in values:
            assert values["--config"] == f"{folder}/config.yaml"
            assert trained[folder] == values["--seed_everything"]
        else:
            assert not folder
    assert len(trained) > 10
    assert "" not in trained
