"""What the README says of speed is what was measured."""

from __future__ import annotations

import json

from bench import __main__ as bench
from bench.pairs import Arm, compare
from bench.rows import ROWS


def test_the_readme_shows_the_measured_results():
    results = json.loads(bench.NUMBERS.read_text())
    text = bench.README.read_text()
    assert bench.shown(text, results) == text
    assert set(results["rows"]) <= {row.name for row in ROWS}


def test_results_are_judged_by_their_goals():
    results = json.loads(bench.NUMBERS.read_text())
    for row in (row for row in ROWS if row.name in results["rows"]):
        seen = results["rows"][row.name]
        assert seen["is_met"] == row.is_met(seen["wall_ratio"]), row.name
        assert seen["pairs"] >= 5


def test_arms_take_turns_after_a_warm_up():
    turns: list[str] = []
    arms = [Arm(name, lambda name=name: turns.append(name), list) for name in "AB"]
    measured = compare(*arms, pairs=3)
    assert "".join(turns) == "AB" + "AB" * 3
    assert measured.wall_ratio > 0
