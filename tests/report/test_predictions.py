"""The page of ``clip-m2df predict`` says what its table says, and why."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from clip_m2df import FewShotClassifier
from clip_m2df.cli import main
from clip_m2df.report import predictions as module
from clip_m2df.report.page import percent
from clip_m2df.video.transforms import ClipReader
from tests.classifier.conftest import paint, predict_args, read_csv
from tests.conftest import fails
from tests.report.conftest import HOSTILE, LABELS, Node, predict, read


def video_table(page: Node) -> list[list[str]]:
    (table,) = page.all("table", id="videos")
    return table.rows()


def cards(page: Node) -> dict[str, Node]:
    """The card of each video by its name."""
    return {next(card.all("h3")).text: card for card in page.all("article")}


def test_the_page_says_what_the_table_says(predictions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, page = read_csv(predictions.with_suffix(".csv")), read(predictions)
    shown = video_table(page)
    assert [name for name, *_ in shown] == [Path(row["path"]).name for row in rows]
    for row, (_, label, probability) in zip(rows, shown, strict=True):
        if row["error"]:
            assert label == "can’t be read"
        else:
            assert (label, probability) == (row["label"], percent(float(row["probability"])))
    assert len({label for _, label, _ in shown}) > 2  # one label would show little
    for row, card in zip(rows, page.all("article"), strict=True):
        said = [line.text for line in card.all("p", class_="bad")]
        assert said == ([f"It can’t be read: {row['error']}"] if row["error"] else [])
        (bars, *_) = [*card.all("table", class_="bars"), None]
        if bars is not None:
            lines = [[c.text.strip() for c in tr.children if isinstance(c, Node)] for tr in bars.all("tr")]
            share = {line[0]: line[-1] for line in lines}
            assert share == {label: percent(float(row[f"p_{label}"])) for label in LABELS}
            widths = [float(r.attributes["width"]) for r in bars.all("rect", class_="part")]
            assert widths == sorted(widths, reverse=True)
            assert sum(widths) == pytest.approx(100, abs=0.02)
    tiles = [tile.text for tile in next(page.all("ul", class_="tiles")).all("strong")]
    assert tiles == ["6", "1", str(len({row["label"] for row in rows} - {""}))]


def test_names_are_shown_as_they_are(predictions: Path) -> None:
    page = read(predictions)
    assert HOSTILE in cards(page)
    assert HOSTILE in {name for name, *_ in video_table(page)}
    assert {option.text for option in page.all("option")} == {"all", "can’t be read"} | {
        row["label"] for row in read_csv(predictions.with_suffix(".csv")) if row["label"]
    }
    assert not [image for image in page.all("img") if "onerror" in image.attributes]
    assert len(list(page.all("script"))) == 1


def test_the_reasons_are_those_of_explain(saved: Path, clips_folder: Path, predictions: Path) -> None:
    """Of the frames as they were seen at first: resizing them once more would change what is said."""
    classifier = FewShotClassifier.load(saved)
    page, seen = cards(read(predictions)), set()
    for k in range(5):
        found = classifier.explain(clips_folder / f"{k}.mp4")
        (why,) = page[f"{k}.mp4"].all("details")
        assert f"Distance {found.distance:.2f}, closest class {found.compared[0]}." in " ".join(why.text.split())
        assert f"PPS chose the prompt of {found.prompt} " in why.text
        votes = why.all("table", class_="list")
        for (view, vote), said in zip(found.views.items(), next(votes).rows(), strict=True):
            confidences = [f"{value:.3f}" for value in (vote.visual_confidence, vote.text_confidence)]
            assert said == [view, vote.label, f"{vote.distances[vote.label]:.2f}", *confidences]
        (prompts,) = why.all("table", class_="cells")
        by_name = {name.removesuffix(" (chosen)"): cells for name, *cells in prompts.rows()}
        for label, row in zip(found.prompt_probabilities, found.frame_scores.tolist(), strict=True):
            assert by_name[label] == [percent(found.prompt_probabilities[label]), *(f"{value:.2f}" for value in row)]
        assert len(list(prompts.all("td", class_="counted"))) == int(found.counted.sum())
        for (view, maps), picture in zip(found.alignments.items(), why.all("svg", class_="map"), strict=True):
            assert picture.attributes["aria-label"].startswith(f"Alignment with {found.compared[0]}, {view} view")
            opacities = [float(r.attributes.get("fill-opacity", 0)) for r in picture.all("rect")]
            darkest = max(float(a[0].max()) for a in found.alignments.values())
            assert sum(opacities) == pytest.approx(float(maps[0].sum()) / darkest, abs=0.1)
        seen.add(f"{found.distance:.2f}")
    assert len(seen) > 1


def test_of_many_videos_the_least_certain_are_explained(
    saved: Path, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_EXPLAINED", 2)
    assert predict(saved, clips_folder, tmp_path / "report.html") == 1
    page = read(tmp_path / "report.html")
    rows = [row for row in read_csv(tmp_path / "report.csv") if not row["error"]]
    least = {Path(row["path"]).name for row in sorted(rows, key=lambda row: float(row["probability"]))[:2]}
    explained = {name for name, card in cards(page).items() if list(card.all("details"))}
    assert explained == least == {name for name, card in cards(page).items() if list(card.all("img"))}
    assert len(cards(page)) == 7
    (note,) = page.all("p", class_="note")
    assert "The 2 videos" in note.text
    assert "other 4" in note.text


def test_segments_are_on_a_line(segments: Path) -> None:
    rows, page = read_csv(segments.with_suffix(".csv")), read(segments)
    assert len({row["label"] for row in rows if row["path"].endswith("/4.mp4")}) > 1
    for name, card in cards(page).items():
        own = [row for row in rows if Path(row["path"]).name == name]
        if name == "broken.mp4":
            assert own[0]["error"] in card.text
            continue
        (line,) = card.all("svg", class_="timeline")
        end = max(float(row["end"]) for row in own)
        drawn = [r.attributes for r in line.all("rect") if r.attributes.get("class") != "ground"]
        for row, rect in zip(own, drawn, strict=True):
            assert float(rect["x"]) == pytest.approx(100 * float(row["start"]) / end, abs=1e-3)
            width = 100 * (float(row["end"]) - float(row["start"])) / end
            assert float(rect["width"]) == pytest.approx(width, abs=1e-3)
        assert next(card.all("table", class_="segments")).rows() == [
            [row["label"], f"{row['start']} s", f"{row['end']} s", percent(float(row["probability"]))] for row in own
        ]
        colours = {row["label"]: rect["class"] for row, rect in zip(own, drawn, strict=True)}
        assert len(set(colours.values())) == len(colours)


def test_none_of_these(saved: Path, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FewShotClassifier, "threshold_", -1e9)
    assert predict(saved, clips_folder, tmp_path / "a.html", "--reject") == 1
    page = read(tmp_path / "a.html")
    assert {(label, share) for _, label, share in video_table(page)} >= {("none of these", "-")}
    assert "beyond the threshold" in cards(page)["0.mp4"].text
    assert predict(saved, clips_folder, tmp_path / "b.html", "--reject", "--segments", "--window", "0.3") == 1
    assert "None of the classes from beginning to end" in cards(read(tmp_path / "b.html"))["0.mp4"].text


@pytest.mark.parametrize("head", ["otam", "zero_shot"])
def test_a_head_without_views(head: str, examples: Path, clips_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    args = predict_args(examples, [clips_folder], tmp_path / "t.csv", "--head", head, "--report", str(page))
    assert main(args) == 1
    card = cards(read(page))["0.mp4"]
    assert not list(card.all("svg", class_="map"))
    assert "No single prompt was chosen" in card.text


@pytest.mark.slow
def test_twenty_videos_make_a_small_page(saved: Path, tmp_path: Path) -> None:
    for k in range(20):
        paint(tmp_path / "videos" / f"{k}.mp4", k % 3, 200 + k)
    assert predict(saved, tmp_path / "videos", tmp_path / "report.html") == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("data:image/jpeg") >= 20 * 4
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_a_report_that_fails_loses_nothing(
    saved: Path, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    arguments = predict_args(None, [clips_folder], tmp_path / "report.csv", "--ckpt_path", str(saved))
    assert "name that ends in .html" in fails([*arguments, "--report", "report.pdf"], capsys)
    assert not (tmp_path / "report.csv").exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_page", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert predict(saved, clips_folder, page) == 130
    assert len(read_csv(tmp_path / "report.csv")) == 7
    capsys.readouterr()
    assert predict(saved, clips_folder, page) == 1
    assert "6 of 7 videos were labelled before" in capsys.readouterr().out
    assert len(cards(read(page))) == 7


def test_a_video_that_is_gone_by_then_has_its_numbers(
    saved: Path, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(clips_folder, tmp_path / "videos")
    own = module.write_predictions

    def write(*args: object, **options: object) -> None:
        (tmp_path / "videos" / "0.mp4").unlink()
        own(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_predictions", write)
    assert predict(saved, tmp_path / "videos", tmp_path / "report.html") == 1
    page = cards(read(tmp_path / "report.html"))
    assert list(page["0.mp4"].all("table", class_="bars"))
    assert not list(page["0.mp4"].all("img"))
    assert list(page["1.mp4"].all("img"))


def test_videos_are_read_once_more_and_in_one_go(
    saved: Path, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    own = ClipReader.read

    def note(self: ClipReader, path: str, *rest: object, **options: object) -> object:
        reads.append(Path(path).name)
        return own(self, path, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ClipReader, "read", note)
    assert predict(saved, clips_folder, tmp_path / "report.html") == 1
    assert sorted(reads) == sorted([*2 * [*(f"{k}.mp4" for k in range(5)), HOSTILE], "broken.mp4"])
