"""Each reader of files that others may have made ends in a result or in one clear error, whatever is in them."""

import sys

import pytest

from tests.project.fuzz import KINDS, fuzz

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its processes don't take a limit of memory")


# Those that each take a model or a parser are among the many alone.
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"checkpoint", "config", "weights"}))
def test_some_damaged_inputs(kind: str) -> None:
    outcomes, bugs = fuzz(kind, seed=0, inputs=100)
    assert not bugs, "\n".join(bugs)
    assert outcomes["refused"] > 20, outcomes
    assert sum(outcomes.values()) == 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_inputs(kind: str) -> None:
    outcomes, bugs = fuzz(kind, seed=1, inputs=2000)
    assert not bugs, "\n".join(bugs)
    assert len(outcomes) > 1, outcomes
