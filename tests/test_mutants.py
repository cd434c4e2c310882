"""The list of mutants stays one that can be run."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, ROOT, Mutant, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_has_its_place_in_the_code(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    assert mutated(mutant, text) != text
    compile(mutated(mutant, text), mutant.file, "exec")
