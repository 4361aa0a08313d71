"""Inputs that once fell short, where CLIP_M2DF_CASES names their folder."""

import os
from pathlib import Path

import pytest

from tests.cases import CHECKS, run_case

CASES = Path(os.environ.get("CLIP_M2DF_CASES", ""))


@pytest.mark.slow
@pytest.mark.skipif("CLIP_M2DF_CASES" not in os.environ, reason="CLIP_M2DF_CASES is not set")
@pytest.mark.parametrize("number", CHECKS)
def test_a_case_gives_the_right_value_or_the_named_refusal(number: str) -> None:
    run_case(number, CASES)


@pytest.mark.skipif("CLIP_M2DF_CASES" not in os.environ, reason="CLIP_M2DF_CASES is not set")
def test_every_case_has_a_check() -> None:
    assert {path.name[:2] for path in CASES.glob("[0-9][0-9]-*")} <= {"00", *CHECKS}
