"""How the benchmarks time and report."""

import statistics
import time
from collections.abc import Callable
from typing import Any

Case = dict[str, Any]
"""``case``, a name; ``ours`` and ``plain``, seconds; ``ratio``, plain to ours; ``within_bar`` where there is a bar."""


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


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
        if name in ("ours", "plain"):
            cells.append(f"{name} {1000 * value:9.2f} ms")
        elif isinstance(value, float):
            cells.append(f"{name} {value:.3g}")
        elif name != "case":
            cells.append(f"{name} {value}")
    return "  ".join(cells)
