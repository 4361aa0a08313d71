"""What an evaluation says of the classes: accuracies of each, and what is taken for what."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from torch import Tensor

from clip_m2df.files import whole_file


def write_report(folder: Path, stage: str, class_names: Sequence[str], confusion: Tensor) -> list[Path]:
    """Write ``<stage>_classes.csv`` and ``<stage>_confusion.csv``.

    Args:
        folder: where to.
        stage: ``val`` or ``test``.
        class_names: of the split, in its order.
        confusion: int64 ``(n_classes, n_classes)``, queries by their own class and by that which was predicted.

    Returns:
        The files.
    """
    classes, matrix = folder / f"{stage}_classes.csv", folder / f"{stage}_confusion.csv"
    with whole_file(classes) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["class", "queries", "correct", "accuracy"])
        for c, name in enumerate(class_names):
            queries, correct = int(confusion[c].sum()), int(confusion[c, c])
            table.writerow([name, queries, correct, f"{correct / queries:.4f}" if queries else ""])
    with whole_file(matrix) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["class", *class_names])
        table.writerows([name, *row] for name, row in zip(class_names, confusion.tolist(), strict=True))
    return [classes, matrix]


def hardest_classes(class_names: Sequence[str], confusion: Tensor, most: int = 5) -> Table:
    """A table of the classes that are recognised least often, and what each is most often taken for."""
    table = Table("hardest classes", "accuracy", "most often taken for")
    queries = confusion.sum(1)
    shares = confusion.diagonal() / queries.clamp(min=1)
    order = [c for c in shares.argsort(stable=True).tolist() if queries[c]]
    for c in order[:most]:
        wrong = confusion[c].clone()
        wrong[c] = 0
        other = f"{class_names[int(wrong.argmax())]} ({float(wrong.max() / queries[c]):.1%})" if wrong.any() else ""
        table.add_row(class_names[c], f"{float(shares[c]):.1%}", other)
    return table
