import csv
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from clip_m2df.evaluation.metrics import OPEN_SET
from clip_m2df.evaluation.open_set import SCORES
from clip_m2df.training.callbacks import chosen_score, hardest_classes, open_set_table, result_table, write_report

NAMES = ["draw sword", "hug", "run, fast", "sit"]
COUNTS = torch.tensor([[6, 1, 3, 0], [0, 10, 0, 0], [2, 2, 1, 0], [0, 0, 0, 0]])


def test_the_files_say_how_often_each_class_is_recognised_and_for_what_it_is_taken(tmp_path: Path) -> None:
    classes, confusion = write_report(tmp_path, "test", NAMES, COUNTS)
    assert [path.name for path in (classes, confusion)] == ["test_classes.csv", "test_confusion.csv"]
    with classes.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["class", "queries", "correct", "accuracy"],
        ["draw sword", "10", "6", "0.6000"],
        ["hug", "10", "10", "1.0000"],
        ["run, fast", "5", "1", "0.2000"],
        ["sit", "0", "0", ""],
    ]
    with confusion.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["class", *NAMES]
    assert rows[1] == ["draw sword", "6", "1", "3", "0"]


def test_the_hardest_classes_come_first() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(hardest_classes(NAMES, COUNTS, most=2))
    lines = [line for line in captured.get().splitlines() if "%" in line]
    assert len(lines) == 2
    assert all(word in lines[0] for word in ("run, fast", "20.0%", "draw sword (40.0%)"))
    assert all(word in lines[1] for word in ("draw sword", "60.0%", "run, fast (30.0%)"))


def test_each_score_has_a_row_beside_the_closed_accuracy() -> None:
    numbers = {"accuracy": 0.625, "interval": 0.0123, **{name: 0.1 + k / 100 for k, name in enumerate(OPEN_SET)}}
    console = Console(width=100)
    with console.capture() as captured:
        console.print(open_set_table(numbers, "5 unknown queries an episode", "margin"))
        console.print(result_table("test", numbers, "some episodes"))
    text = captured.get()
    assert "62.5 %, is the upper bound of OSCR" in text
    assert "5 unknown queries an episode" in text
    for k, score in enumerate(SCORES):
        (row,) = [line for line in text.splitlines() if score in line]
        assert ("chosen by val" in row) == (score == "margin")
        found = [float(cell.split("%")[0]) for cell in row.split("│")[2:5]]
        assert found == pytest.approx([10 + k, 14 + k, 18 + k])


def test_the_score_that_val_chooses_is_said_and_by_how_much() -> None:
    said = chosen_score({"distance": 0.7, "probability": 0.71, "margin": 0.745, "energy": 0.6})
    assert "the score margin" in said
    assert "AUROC 74.5 % on val, 3.5 points more than probability" in said
    assert "as much as margin" in chosen_score({"distance": 0.1, "probability": 0.8, "margin": 0.8, "energy": 0.1})
    assert "energy" in chosen_score({"distance": math.nan, "probability": 0.2, "margin": 0.1, "energy": 0.3})
