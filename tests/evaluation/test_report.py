import csv
from pathlib import Path

import torch
from rich.console import Console

from clip_m2df.training.callbacks import hardest_classes, write_report

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
