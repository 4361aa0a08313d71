"""The page of ``clip-m2df test`` says what the test has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from clip_m2df.cli import main
from clip_m2df.errors import UserError
from clip_m2df.evaluation.open_set import MEASURES, SCORES
from clip_m2df.report.page import percent
from tests.classifier.conftest import read_csv
from tests.conftest import options
from tests.report.conftest import HOSTILE_CLASS, Measured, Node, read, run_test

CLASSES = [HOSTILE_CLASS, "test class 0", "test class 2"]  # in the manifest's order, by name


def facts(page: Node) -> dict[str, str]:
    (listed,) = page.all("dl", class_="facts")
    return {next(pair.all("dt")).text: next(pair.all("dd")).text for pair in listed.all("div")}


def measures(page: Node) -> dict[str, str]:
    rows = (row for table in page.all("table", class_="bars") for row in table.all("tr"))
    return {next(row.all("th")).text: next(row.all("td", class_="number")).text for row in rows}


def test_the_numbers_are_the_tests(tested: Measured) -> None:
    page, numbers = read(tested.page), {n: float(v) for n, v in tested.trainer.callback_metrics.items()}
    tiles = [tile.text for tile in next(page.all("ul", class_="tiles")).all("strong")]
    assert tiles == [percent(numbers["test/accuracy"]), f"± {percent(numbers['test/interval'])}", "3-way 1-shot"]
    assert measures(page) == {
        "prompts chosen rightly by PPS": percent(numbers["test/pps_accuracy"]),
        "accuracy of the local view alone": percent(numbers["test/local_accuracy"]),
        "accuracy of the global view alone": percent(numbers["test/global_accuracy"]),
        "queries on which the views agree": percent(numbers["test/view_agreement"]),
    }
    queries = int(tested.confusion.sum())
    assert facts(page).items() >= {"episodes": "6", "queries": str(queries), "classes": "3", "head": "m2df"}.items()
    assert facts(page)["checkpoint"].endswith("best.ckpt")


def test_the_classes_are_those_of_the_tables(tested: Measured) -> None:
    page = read(tested.page)
    rows = read_csv(tested.page.parent / "test_classes.csv")
    (classes,) = page.all("table", id="classes")
    shown = [[name, share, queries, right] for name, share, _, queries, right, _ in classes.rows()]
    assert shown == [[r["class"], percent(float(r["accuracy"])), r["queries"], r["correct"]] for r in rows]
    assert [row[0] for row in shown] == CLASSES
    (confusion,) = page.all("table", id="confusion")
    counts = [[int(cell or 0) for cell in cells] for _, *cells in confusion.rows()]
    assert counts == tested.confusion.tolist()
    for own, row in enumerate(next(confusion.all("tbody")).all("tr")):
        for c, cell in enumerate(row.all("td")):
            (shade,) = (int(name[1:]) for name in cell.attributes["class"].split() if name[0] == "s")
            assert shade == pytest.approx(10 * counts[own][c] / sum(counts[own]), abs=0.51)
    for c, (*_, taken_for) in enumerate(classes.rows()):
        wrong = [0 if other == c else count for other, count in enumerate(counts[c])]
        assert taken_for.startswith(CLASSES[wrong.index(max(wrong))] if any(wrong) else "")
        assert bool(taken_for) == any(wrong)


def test_the_configuration_is_whole(tested: Measured) -> None:
    (shown,) = read(tested.page).all("pre")
    config = yaml.safe_load(shown.text)
    assert config["data"]["test_episodes"] == 6
    assert config["model"]["head_options"]["hidden_dim"] == 32
    assert config["ckpt_path"].endswith("best.ckpt")


def test_unknown_queries_have_a_table_and_curves(
    fitted: Path,
    hostile_manifest: Path,
    tiny_clip_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [f"--ckpt_path={fitted / 'checkpoints' / 'best.ckpt'}", "--data.n_way=2", "--data.unknown_queries=2"]
    tested = run_test(hostile_manifest, tiny_clip_dir, tmp_path, *more)
    page, numbers = read(tested.page), {n: float(v) for n, v in tested.trainer.callback_metrics.items()}
    (table,) = page.all("table", id="open-set")
    for score, _, *shown in table.rows():
        assert shown == [percent(numbers[f"test/{measure}/{score.split()[0]}"]) for measure in MEASURES]
    model: Any = tested.trainer.model
    chosen = model.calibration.score  # which the training has kept
    assert [row[0] for row in table.rows()] == [f"{s} (chosen by val)" if s == chosen else s for s in SCORES]
    said = capsys.readouterr().out
    assert f"{chosen} (chosen by val)" in said
    assert f"val chooses the score {chosen} to tell unknown queries by: AUROC " in said
    accepted, right = (svg for svg in page.all("svg", class_="curves") if svg.attributes.get("role") == "img")
    for svg, end in ((accepted, 1.0), (right, numbers["test/accuracy"])):
        lines = {line.attributes["class"]: line.attributes["points"].split() for line in svg.all("polyline")}
        assert lines.keys() == SCORES.keys()
        for points in lines.values():
            heights = [100 - float(point.split(",")[1]) for point in points]
            assert heights == sorted(heights)
            assert heights[-1] == pytest.approx(100 * end, abs=0.06)
            assert [float(point.split(",")[0]) for point in points] == list(range(101))
    rows = {row["metric"]: row["value"] for row in read_csv(tmp_path / "test_metrics.csv")}
    assert {f"test/{measure}/{score}" for measure in MEASURES for score in SCORES} < rows.keys()


def test_without_unknown_queries_there_is_no_table_of_them(tested: Measured) -> None:
    assert not list(read(tested.page).all("table", id="open-set"))


@pytest.mark.parametrize("evaluation", ["bank", "direct"])
def test_the_hardest_episodes_have_their_frames(
    evaluation: str, fitted: Path, hostile_manifest: Path, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    more = [f"--ckpt_path={fitted / 'checkpoints' / 'best.ckpt'}", f"--data.evaluation={evaluation}"]
    page = read(run_test(hostile_manifest, tiny_clip_dir, tmp_path, *more).page)
    episodes = [d for d in page.all("details") if "cross-entropy" in next(d.all("summary")).text]
    assert len(episodes) == 4
    losses = [float(next(e.all("summary")).text.split("cross-entropy ")[1].split(",")[0]) for e in episodes]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
    for episode in episodes:
        queries = [q for q in episode.all("div") if "query" in q.attributes.get("class", "").split()]
        right = [q for q in queries if "right" in q.attributes["class"].split()]
        assert len(queries) == 3
        assert f"{len(right)} of 3 right" in next(episode.all("summary")).text
        for query in queries:
            assert len(list(query.all("img"))) == (2 if query in right else 3)
            captions = [figure.text for figure in query.all("figcaption")]
            assert captions[1] in {f"its own class: the text of {c}" for c in range(3)}
    assert len(list(episodes[0].all("svg", class_="map"))) == 2 * 2  # two classes, two views
    assert not list(episodes[1].all("svg", class_="map"))


def test_a_head_without_anything_to_train(hostile_manifest: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "report.html"
    args = options(hostile_manifest, tiny_clip_dir, tmp_path / "run", "--model.head=otam", f"--report={page}")
    plain = [a for a in args if "head_options" not in a]
    assert main(["test", *plain, "--model.freeze_backbone=true", "--model.head_options=null"]) == 0
    assert facts(read(page))["checkpoint"] == "none: nothing is trained"
    assert not list(read(page).all("svg", class_="map"))


@pytest.mark.parametrize("evaluation", ["bank", "direct"])
def test_queries_with_a_twin_are_shown_apart(
    evaluation: str,
    fitted: Path,
    hostile_manifest: Path,
    tiny_clip_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    header, *rows = hostile_manifest.read_text(encoding="utf-8").splitlines()
    pairs = [f"{row},{row.split('_')[0]} {n % 3 // 2}" for n, row in enumerate(rows)]
    grouped = tmp_path / "groups.csv"
    grouped.write_text("\n".join([f"{header},group", *pairs]), encoding="utf-8")
    more = [f"--ckpt_path={fitted / 'checkpoints' / 'best.ckpt'}", f"--data.root={hostile_manifest.parent}"]
    more += [f"--data.evaluation={evaluation}", "--data.test_episodes=40"]
    accuracy = {}
    for episodes in ("random", "grouped"):
        tested = run_test(grouped, tiny_clip_dir, tmp_path / episodes, *more, f"--data.episodes={episodes}")
        numbers = {name.removeprefix("test/"): float(v) for name, v in tested.trainer.callback_metrics.items()}
        page = read(tested.page)
        (section,) = (s for s in page.all("section") if next(s.all("h2")).text == "Twins")
        assert f"Of the queries, {percent(numbers['twin_share'])} have a twin" in section.text
        assert measures(page)["accuracy of the others"] == percent(numbers["accuracy_without_twins"])
        shown = measures(page).get("accuracy of the queries with a twin")
        written = {row["metric"]: float(row["value"]) for row in read_csv(tested.page.parent / "test_metrics.csv")}
        assert written["test/twin_share"] == pytest.approx(numbers["twin_share"])
        assert facts(page)["episodes"] == "40" + (", grouped" if episodes == "grouped" else "")
        said = capsys.readouterr().out
        assert ("40 grouped episodes, 3-way 1-shot" in said) == (episodes == "grouped")
        assert f"{100 * numbers['twin_share']:.1f} %" in said.split("test/twin_share")[1].splitlines()[0]
        accuracy[episodes] = numbers
        assert (shown is None) == (episodes == "grouped")
    # Two of a class's three videos are of one group: a third of the pairs of support and query.
    share = accuracy["random"]["twin_share"]
    assert share == pytest.approx(1 / 3, abs=0.12)
    parts = share * accuracy["random"]["accuracy_twins"] + (1 - share) * accuracy["random"]["accuracy_without_twins"]
    assert parts == pytest.approx(accuracy["random"]["accuracy"], abs=1e-6)
    assert accuracy["grouped"]["twin_share"] == 0
    assert accuracy["grouped"]["accuracy"] == accuracy["grouped"]["accuracy_without_twins"]


def test_a_page_that_cannot_be_written_is_refused_before_the_test(
    manifest: Path, tiny_clip_dir: Path, fitted: Path
) -> None:
    with pytest.raises(UserError, match=r"--report is .*report.pdf: give it a name that ends in .html"):
        run_test(manifest, tiny_clip_dir, fitted, "--ckpt_path=best", "--report=report.pdf")


def test_a_training_has_no_report(manifest: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    assert main(["fit", *options(manifest, tiny_clip_dir, tmp_path / "run", "--report=a.html")]) == 2
