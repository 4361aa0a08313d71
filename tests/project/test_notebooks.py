import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from clip_m2df import CLIPM2DF
from tests.conftest import save_checkpoint

FOLDER = Path(__file__).parents[2] / "notebooks"
EPISODE, OWN_VIDEOS, RESULTS = "01_an_episode", "02_your_own_videos", "03_results"


class Screen(NamedTuple):
    """What a notebook has shown."""

    figures: list[Figure]
    pictures: list[Image.Image]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    """A place for what is shown. Torch's generator is left as it was."""
    found = Screen([], [])

    def show() -> None:
        for figure in map(plt.figure, plt.get_fignums()):
            figure.canvas.draw()  # whatever can't be drawn fails here
            found.figures.append(figure)
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    before = plt.get_backend()
    plt.switch_backend("agg")
    with torch.random.fork_rng():
        yield found
    plt.close("all")
    plt.switch_backend(before)


def read(name: str) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return notebook


def is_knobs(cell: dict[str, Any]) -> bool:
    return "parameters" in cell["metadata"].get("tags", [])


def run(name: str, screen: Screen, **knobs: Any) -> dict[str, Any]:
    """Run a notebook from top to bottom with other values of knobs that it has; the names that it leaves."""
    scope: dict[str, Any] = {"display": screen.pictures.append}  # a builtin of notebooks
    for number, cell in enumerate(cell for cell in read(name)["cells"] if cell["cell_type"] == "code"):
        exec(compile("".join(cell["source"]), f"{name}, code cell {number}", "exec"), scope)  # the project's own code
        assert plt.get_fignums() == []  # each cell shows its figures
        if is_knobs(cell):
            assert set(knobs) <= set(scope)
            scope |= knobs
    return scope


def checkpoint(folder: Path, **head_options: Any) -> str:
    """A checkpoint of the method with a head that was not trained, which costs nothing."""
    torch.manual_seed(0)
    return str(save_checkpoint(CLIPM2DF(backbone="tiny", head_options=head_options), folder / "model.ckpt"))


def test_all_notebooks_are_run_here() -> None:
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == {EPISODE, OWN_VIDEOS, RESULTS}


@pytest.mark.parametrize("name", [EPISODE, OWN_VIDEOS])
def test_notebooks_carry_no_outputs_and_have_their_knobs_in_one_cell(name: str) -> None:
    notebook = read(name)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert [is_knobs(cell) for cell in cells] == [True] + [False] * (len(cells) - 1)
    knobs: dict[str, Any] = {}
    exec("".join(cells[0]["source"]), knobs)  # before anything is imported
    assert knobs["CHECKPOINT"] == ""  # nothing is asked of whoever runs it


def images(figure: Figure) -> list[NDArray[np.float64]]:
    """The numbers behind the images of a figure, one a pair of axes."""
    return [np.asarray(image.get_array()) for ax in figure.axes for image in ax.images]


def test_an_episode_goes_box_by_box(screen: Screen, capsys: pytest.CaptureFixture[str]) -> None:
    scope = run(EPISODE, screen, VIDEOS_PER_CLASS=3, EPISODE=2)
    classes, labels = scope["classes"], scope["labels"]
    with torch.no_grad():
        whole = scope["head"](scope["support"], scope["query"], scope["prompts"])
    right = int((whole.logits.argmax(-1) == labels).sum())
    assert right >= 3  # of five queries; chance is one

    clips, prompts, views, matching, distances = screen.figures
    assert [image.shape for image in images(clips)] == [(scope["size"], 8 * scope["size"], 3)] * 15
    titles = [ax.get_title() for ax in clips.axes]
    assert titles == [f"{role}: {name}" for name in classes for role in ("support", "support", "query")]

    # A prompt's four closest frames are framed, and their mean cosine is its score.
    (cosines,) = images(prompts)
    framed = np.zeros((5, 8), bool)
    for patch in prompts.axes[0].patches:
        x, y = patch.get_window_extent().transformed(prompts.axes[0].transData.inverted()).get_points().mean(0)
        framed[round(y), round(x)] = True
    assert framed.sum(1).tolist() == [4] * 5
    assert (np.where(framed, cosines, np.inf).min(1) >= np.where(framed, -np.inf, cosines).max(1)).all()
    scores = scope["scores"][0].numpy()
    np.testing.assert_allclose(np.where(framed, cosines, 0).sum(1) / 4, scores, rtol=1e-4)
    powers = np.exp(200 * (scores - scores.max()))
    np.testing.assert_allclose(scope["probabilities"][0].numpy(), powers / powers.sum(), rtol=1e-3, atol=1e-6)

    # The local view sees two frames on either side. What the global one adds is the same at all steps.
    local, global_ = images(views)
    far = np.abs(np.subtract.outer(range(8), range(8))) > 2
    assert (local[far] == 0).all()
    assert (local[~far] > 0).all()
    for frame in range(8):
        elsewhere = np.delete(global_[:, frame], frame)
        np.testing.assert_allclose(elsewhere, elsewhere[0], rtol=1e-3)
        assert 0 < elsewhere[0] < global_[frame, frame]

    # Matched both ways, each frame of either video is aligned with some of the other.
    alignments = images(matching)[1::2]
    assert len(alignments) == 4
    for alignment in alignments:
        assert min(alignment.sum(0).min(), alignment.sum(1).min()) > 0.999

    of_views, fused = images(distances)[:2], images(distances)[2]
    np.testing.assert_allclose(fused, -whole.logits.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sum(of_views), fused, rtol=1e-4, atol=1e-5)

    said = capsys.readouterr().out
    assert f"{right} of 5 queries right" in said
    assert said.count("global teaches local") == int(whole.distillation.global_to_local.sum()) > 0
    assert f"the term is {whole.distillation_loss:.4f}" in said


def test_an_episode_takes_a_checkpoint(screen: Screen, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"direction": "mutual", "reliability": ["text", "visual"], "view_weights": [0.5, 2.0], "hidden_dim": 64}
    file = checkpoint(tmp_path, **options)
    knobs = {"N_WAY": 4, "N_SHOT": 1, "N_QUERY": 2, "EPISODE": 3, "QUERY": 5, "VIDEOS_PER_CLASS": 3}
    scope = run(EPISODE, screen, CHECKPOINT=file, **knobs)
    local, global_, fused = images(screen.figures[-1])
    assert fused.shape == (8, 4)
    np.testing.assert_allclose(0.5 * local + 2 * global_, fused, rtol=1e-4, atol=1e-5)
    distillation = scope["output"].distillation
    said = capsys.readouterr().out
    assert said.count("local teaches") == int(distillation.local_to_global.sum())
    assert said.count("global teaches") == int(distillation.global_to_local.sum())
    assert f"query 5: {scope['classes'][scope['labels'][5]]}" in screen.figures[1].axes[0].get_title()


@pytest.mark.parametrize("trained", [False, True], ids=["nothing trained", "checkpoint"])
def test_your_own_videos_are_named(
    trained: bool, screen: Screen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkpoint(tmp_path, hidden_dim=64) if trained else ""
    scope = run(OWN_VIDEOS, screen, CHECKPOINT=file, CLIPS=2, SECONDS=15.0)
    classes = list(scope["KNOWN"])
    examples, bars, distances, times = screen.figures
    assert [image.shape for image in images(examples)] == [(64, 8 * 64, 3)] * 4
    assert scope["accuracy"] >= 0.625  # five of the eight clips, of four classes

    # Each bar is a row of probabilities; how wide a part is, matplotlib computes from where it starts and ends.
    widths = np.array([[bar.get_width() for bar in group] for group in bars.axes[0].containers])
    ends = np.cumsum(scope["probabilities"], 1, dtype=np.float64)
    np.testing.assert_allclose(widths.T, np.diff(ends, prepend=0), rtol=1e-6)
    np.testing.assert_allclose(widths.sum(0), 1, rtol=1e-5)
    assert [classes[c] for c in widths.argmax(0)] == list(scope["predicted"])

    (picture,) = screen.pictures
    assert picture.width > 500
    explanation = scope["explanation"]
    assert bool(explanation.views) == trained
    assert explanation.probabilities[explanation.label] == pytest.approx(widths.max(0).min(), rel=1e-3)

    assert scope["before"] in classes
    assert (scope["after"] == scope["LATER"]).mean() > 0.5
    assert list(scope["classifier"].classes_) == classes

    points = [line.get_xdata() for line in distances.axes[0].lines]
    known, strange, threshold = (np.asarray(values, dtype=float) for values in points)
    assert len(known) == 8
    assert len(strange) == 2 * 5
    assert threshold.tolist() == [scope["classifier"].threshold_] * 2
    assert scope["kept"] == (known <= threshold[0]).mean()
    assert scope["rejected"] == (strange > threshold[0]).mean()
    assert min(scope["kept"], scope["rejected"]) > 0.7

    # Both rows of the long video tell of all its time, in the right order.
    found: list[tuple[float, float]] = []
    true: list[tuple[float, float]] = []
    for bar in times.axes[0].patches:
        assert isinstance(bar, Rectangle)
        (found if bar.get_y() < 0 else true).append((bar.get_x(), bar.get_x() + bar.get_width()))
    for parts in (found, true):
        assert [parts[0][0], parts[-1][1]] == pytest.approx([0, 15])
        assert [end for _, end in parts[:-1]] == pytest.approx([start for start, _ in parts[1:]])
    assert [start for start, _ in true] == pytest.approx([action.start for action in scope["actions"]])
    assert scope["agreement"] > 0.4  # chance is a quarter

    said = capsys.readouterr().out
    assert f"{scope['accuracy']:.0%} of 8 right" in said
    assert "support.safetensors" in said
    assert not scope["folder"].exists()


def test_the_results_of_the_study(
    screen: Screen, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    scope = run(RESULTS, screen, KNOB="noise")
    page = (FOLDER.parent / "docs/results_tables.md").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert set(scope["families"]) == {"scene", "order"}
    for family in ("scene", "order"):
        for row, found in zip(scope["ROWS"], scope["accuracies"][family], strict=True):
            cell = f"{100 * found.mean:.1f} ± {100 * found.interval:.1f}"
            assert any(row in line and cell in line for line in page.splitlines()), (row, cell)
            assert cell in said
        assert scope["differences"][family][0].mean == 0
        assert len(scope["curves"][family, "CLIP-M²DF"]) == 1 + len(scope["knobs"](scope["records"])["noise"])
        mean = pytest.approx(100 * scope["accuracies"][family][0].mean)
        assert scope["curves"][family, "CLIP-M²DF"][0] == mean
        assert np.mean(scope["by_seed"][family, "CLIP-M²DF"]) == mean
        assert len(scope["by_seed"][family, "OTAM"]) == 1
    assert len(screen.figures) == 3
    drawn = screen.figures[0].axes[0].lines[0].get_xdata()
    assert np.allclose(np.asarray(drawn), [100 * found.mean for found in scope["differences"]["scene"]])
    assert "established" in said
