"""How the benchmarks time and report."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Case = dict[str, Any]
"""``case``, a name; ``ours`` and ``plain``, seconds; ``ratio``, plain to ours; ``within_bar`` where there is a bar;
``floor``, the seconds that the work takes at the least, where they can be told."""
TIMES = ("ours", "plain", "floor")


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes, a GPU's part of it included."""
    _finish()
    started = time.perf_counter()
    function()
    _finish()
    return time.perf_counter() - started


def _finish() -> None:
    """Wait for the GPU, where torch is loaded and has begun to use one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def compare(
    name: str, ours: Callable[[], object], plain: Callable[[], object], *, repeat: int = 7, calls: int = 5, **more: Any
) -> Case:
    """Time two functions in turn, since a machine's speed wanders.

    Args:
        name: of the case.
        ours: what is measured.
        plain: the plain version.
        repeat: how often.
        calls: how often ``ours`` is called each time.
        **more: what else to report, see :func:`report`.

    Returns:
        The case, with medians.
    """
    ours(), plain()  # once to warm up
    times = [(statistics.median(seconds(ours) for _ in range(calls)), seconds(plain)) for _ in range(repeat)]
    of_ours, of_plain = (statistics.median(column) for column in zip(*times, strict=True))
    return report(name, of_ours, of_plain, **({"ratio": statistics.median(slow / fast for fast, slow in times)} | more))


def report(name: str, ours: float, plain: float, *, bar: float | None = None, **more: Any) -> Case:
    """A case of what was timed.

    Args:
        name: of the case.
        ours: seconds.
        plain: seconds.
        bar: the ratio that is wanted.
        **more: what else to report; what is wanted beside the ratio as ``within_bar``.
    """
    case = {"case": name, "ours": ours, "plain": plain, "ratio": plain / ours, **more}
    if bar is not None:
        case["bar"] = bar
        case["within_bar"] = case["ratio"] >= bar and more.get("within_bar", True)
    return case


def line(case: Case) -> str:
    """A case as it is printed."""
    cells = [f"{case['case']:32}"]
    for name, value in case.items():
        if name in TIMES:
            cells.append(f"{name} {1000 * value:9.2f} ms")
        elif name != "case":
            cells.append(f"{name} {_short(value)}")
    return "  ".join(cells)


def table(cases: Sequence[Case]) -> str:
    """Cases as a table in Markdown: times, ratio and whether the bar is met, and in the last column all else."""
    columns = ("case", "ours", "floor", "plain", "ratio", "within_bar")
    rows = [[*columns, "further"], ["---"] * (len(columns) + 1)]
    for case in cases:
        cells = [_cell(name, case[name]) if name in case else "" for name in columns]
        further = ", ".join(f"{name} {_short(value)}" for name, value in case.items() if name not in columns)
        rows.append([*cells, further])
    return "".join(f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in row)} |\n" for row in rows)


def _cell(name: str, value: Any) -> str:
    if name not in TIMES:
        return _short(value)
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
