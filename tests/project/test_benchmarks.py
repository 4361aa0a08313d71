"""The benchmarks run, in small; what they measure is no matter of tests."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    adapters,
    dashboard,
    double_loop,
    evaluation_head,
    gpu,
    head,
    matching,
    own_videos,
    predict,
    prepare,
    train_step,
)
from benchmarks.__main__ import NAMES, main
from benchmarks.evaluation_head import draw_episodes
from benchmarks.timing import compare, line, report, table
from benchmarks.train_step import ON_CPU, RandomCLIP, random_batch
from clip_m2df.classifier.segments import Segment
from clip_m2df.motion_shapes import Action
from clip_m2df.training.dashboard import Dashboard
from tests.conftest import options
from tests.nn import references

SMALL = {"kind": "resnet", "layers": [1, 1, 1, 1], "width": 8, "dim": 16}
# Runs the command as on a machine that lacks these packages.
WITHOUT = """
import sys
for name in ("decord", "wandb", "jsonargparse"):
    sys.modules[name] = None
from benchmarks.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_a_benchmark(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{name}").cases)


@pytest.mark.parametrize("single_direction", [False, True])
def test_the_double_loop_is_right(single_direction: bool) -> None:
    costs = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = references.otam_of(costs, single_direction=single_direction)
    assert torch.allclose(double_loop.otam(costs, single_direction=single_direction), expected, atol=1e-12)


def test_matching_is_equal() -> None:
    (case,) = matching.cases([8], repeat=1)
    assert 0 < case["off"] < matching.MOST_OFF
    assert case["bar"] == 15.0


def test_an_episodes_head_is_equal_to_the_plain_one() -> None:
    one, batch = head.cases([16], shots=[2], repeat=1)
    for case in (one, batch):
        assert 0 < case["off"] < head.MOST_OFF
        assert case["share"] == pytest.approx(1 / case["ratio"])
        assert 0 < case["kept"] < case["plain_kept"]
        assert 0 < case["floor"] < case["plain"]
    assert batch["plain_kept"] == pytest.approx(head.BATCH * one["plain_kept"], rel=0.01)


def test_the_bank_is_equal() -> None:
    (case,) = evaluation_head.cases(30, dim=16, sample=3, repeat=1)
    assert case["off"] < evaluation_head.MOST_OFF
    # Each of the 5 x 30 queries and supports is embedded once at most.
    assert 0 < case["embedded"] <= 300


@pytest.mark.slow
def test_adapters_are_few_weights() -> None:
    found = {case["case"]: case for case in adapters.cases(32)}
    # q and v of 12 blocks, each 768 wide: two matrices of 16 x 768.
    assert found["LoRA"]["trained"] == 12 * 2 * 2 * 16 * 768
    assert found["frozen"]["trained"] == 0
    assert found["full"]["trained"] > 80e6
    assert found["frozen"]["gib"] < found["LoRA"]["gib"] < found["full"]["gib"]


@pytest.mark.slow
def test_the_dashboards_share_is_measured(manifest: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    hooks = vars(Dashboard).copy()
    in_hooks, whole, calls = dashboard.measure(options(manifest, tiny_clip_dir, tmp_path)[1:])
    assert 0 < in_hooks < whole
    assert calls > 5
    assert vars(Dashboard) == hooks


def test_drawn_episodes_have_videos_of_their_classes() -> None:
    episodes = draw_episodes(50, torch.Generator().manual_seed(0))
    both = torch.cat((episodes["support"], episodes["query"].unsqueeze(-1)), -1)
    assert (both // evaluation_head.N_VIDEOS == episodes["class_indices"].unsqueeze(-1)).all()
    assert (both[..., 0] != both[..., 1]).all()


def test_a_step_at_a_video_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_step.TOWERS, "small", SMALL)
    batch = random_batch(ON_CPU)
    losses = []
    for kind in (RandomCLIP, train_step.OneByOne):
        model = kind("small", ON_CPU).eval()
        losses.append(model.training_step(batch, 0).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
def test_labels_are_those_of_the_plain_script(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setitem(
        train_step.TOWERS, "small", {**train_step.VIT_B16, **small, "projection_dim": 32, "patch_size": 8}
    )
    sizes: dict[str, Any] = {"n_clips": 2, "n_short": 2, "n_overlap": 20, "size": 32}
    *labels, here, there, short = predict.cases("small", [predict.SHORT], repeat=1, sleep=0.001, **sizes)
    assert len(labels) == 1 + predict.has_bf16()
    assert all(case["off"] < predict.MOST_OFF for case in labels)
    assert here["plain"] == pytest.approx(4 * 0.001)
    assert there["plain"] == pytest.approx(4 * 0.0005)
    assert short["ours"] > 0


def test_own_videos_are_drawn_apart() -> None:
    videos = {f"class {c}": [f"{c}/{k}.mp4" for k in range(20)] for c in range(7)}
    drawn = own_videos.draw(videos, 3, 5)
    assert drawn == own_videos.draw(videos, 3, 5)
    assert drawn != own_videos.draw(videos, 4, 5)
    assert [len(row) for row in drawn.support.values()] == [5] * 4
    assert all(set(row) < set(videos[label]) for label, row in drawn.support.items())
    assert all(clip in videos[label] for clip, label in zip(drawn.clips, drawn.labels, strict=True))
    assert {label: drawn.labels.count(label) for label in drawn.support} == dict.fromkeys(drawn.support, 10)
    every = [*(path for row in drawn.support.values() for path in row), *drawn.clips, *drawn.strangers]
    assert len(set(every)) == len(every) == 20 + 40 + 40
    assert not {path.split("/")[0] for path in drawn.strangers} & {label.split()[1] for label in drawn.support}


def test_segments_are_held_against_actions() -> None:
    actions = [Action(0.0, 4.0, "run"), Action(4.0, 10.0, "eat")]
    parts = [(0.0, 1.0, "run"), (1.0, 5.0, "run"), (6.0, 10.0, "eat")]
    found = [Segment(start, end, label, 1.0, {}) for start, end, label in parts]
    assert own_videos.best_overlap(actions[0], found) == pytest.approx(3 / 5)
    assert own_videos.best_overlap(actions[1], found) == pytest.approx(4 / 6)
    assert own_videos.best_overlap(Action(0.0, 1.0, "sit"), found) == 0
    assert own_videos.share_of_time(actions, found) == pytest.approx((1 + 3 + 4) / 10)


def test_a_case_tells_medians_and_whether_the_bar_is_met() -> None:
    calls: list[str] = []
    case = compare("both", lambda: calls.append("ours"), lambda: calls.append("plain"), repeat=2, calls=3, off=0.5)
    assert calls == ["ours", "plain", *(["ours"] * 3 + ["plain"]) * 2]
    assert case.keys() == {"case", "ours", "plain", "ratio", "off"}
    assert report("slow", 2.0, 5.0, bar=3.0)["within_bar"] is False
    assert report("fast", 2.0, 6.0, bar=3.0)["within_bar"] is True
    assert report("fast and wrong", 2.0, 6.0, bar=3.0, within_bar=False)["within_bar"] is False
    printed = line(report("one", 0.002, 0.006, off=0.5))
    assert " ".join(printed.split()) == "one ours 2.00 ms plain 6.00 ms ratio 3 off 0.5"


def test_a_table_has_a_row_a_case() -> None:
    cases = [
        {"case": "a | b"},
        report("one", 0.002, 6.0, bar=4.0, floor=0.0015, gib=1.23456),
        {"case": "two", "error": "first\nsecond", "within_bar": False},
    ]
    assert table(cases).splitlines() == [
        "| case | ours | floor | plain | ratio | within_bar | further |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| a / b |  |  |  |  |  |  |",
        "| one | 2 ms | 1.5 ms | 6 s | 3e+03 | True | gib 1.23, bar 4 |",
        "| two |  |  |  |  | False | error first second |",
    ]


def test_a_part_that_fails_on_a_gpu_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Iterator[dict[str, Any]]:
        yield report("one", 1.0, 2.0)
        raise torch.OutOfMemoryError("out of memory")

    works = lambda: [report("two", 1.0, 2.0)]  # noqa: E731
    monkeypatch.setattr(gpu, "parts", lambda on_cuda: [("a", fails), ("b", works)])
    machine, *found = gpu.cases()
    assert torch.__version__ in machine["case"]
    assert [case["case"] for case in found] == ["a: one", "a", "b: two", "all of it"]
    assert [case.get("within_bar") for case in found] == [None, False, None, True]
    assert "out of memory" in found[1]["error"]
    _, *found = gpu.cases(most_seconds=0.0)
    assert [case["case"] for case in found] == ["a", "b", "all of it"]
    assert not any(case["within_bar"] for case in found)


def test_two_runs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_step.TOWERS, "small", SMALL)
    case = gpu.two_runs("small", ON_CPU, repeat=1)
    assert case["off"] == 0
    assert case["within_bar"]
    assert not torch.are_deterministic_algorithms_enabled()
    rng = torch.Generator().manual_seed(0)

    def other_batch(setting: train_step.Setting) -> Any:
        batch = random_batch(setting)
        return batch | {"query": torch.randint(256, batch["query"].shape, generator=rng, dtype=torch.uint8)}

    monkeypatch.setattr(gpu, "random_batch", other_batch)
    case = gpu.two_runs("small", ON_CPU, repeat=1)
    assert case["off"] > 0
    assert not case["within_bar"]


@pytest.mark.slow
def test_what_is_measured_on_a_gpu_runs_in_small_without_what_it_needs_not(tmp_path: Path) -> None:
    files = tmp_path / "cases.json", tmp_path / "table.md"
    command = [sys.executable, "-c", WITHOUT, "gpu", "--json", str(files[0]), "--table", str(files[1])]
    root = Path(__file__).resolve().parents[2]
    subprocess.run(command, check=False, cwd=root, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    cases = json.loads(files[0].read_text())
    assert not [case for case in cases if "error" in case]
    of_parts = {case["case"].partition(": ")[0] for case in cases[1:-1]}
    assert of_parts == {name for name, _ in gpu.parts(on_cuda=False)}
    twice = [case["off"] for case in cases if case["case"].startswith("determinism: ")]
    assert twice == [0, 0]
    assert len(files[1].read_text().splitlines()) == len(cases) + 2


@pytest.mark.parametrize(("ratio", "status"), [(8.0, 0), (2.0, 1)])
def test_the_command_writes_json_and_ends_with_1_below_the_bar(
    ratio: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases() -> Iterator[dict[str, Any]]:
        yield report("one", 1.0, ratio, bar=4.0)

    monkeypatch.setattr(matching, "cases", cases)
    monkeypatch.setattr("sys.argv", ["benchmarks", "matching", "--json", str(tmp_path / "cases.json")])
    assert main() == status
    (case,) = json.loads((tmp_path / "cases.json").read_text())
    assert case == {"case": "one", "ours": 1.0, "plain": ratio, "ratio": ratio, "bar": 4.0, "within_bar": not status}
    assert capsys.readouterr().out.startswith("one ")


def test_reading_a_manifest_is_measured() -> None:
    case = prepare.of_manifest(500)
    assert case["case"] == "500 rows"
    assert min(case["ours"], case["plain"], case["mebibytes"]) > 0
