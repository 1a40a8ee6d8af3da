"""What the README says of speed is what was measured."""

from __future__ import annotations

import json
import multiprocessing
import os
import time

import pytest

from bench import __main__ as bench
from bench.pairs import Arm, Measured, Spent, compare, cpu_seconds, family, megabytes, timed
from bench.rows import ROWS
from bench.stage import Row
from tests.conftest import wait_until


def test_the_readme_shows_the_measured_results():
    results = json.loads(bench.NUMBERS.read_text())
    text = bench.README.read_text()
    assert bench.shown(text, results) == text
    assert set(results["rows"]) <= {row.name for row in ROWS}


def test_results_are_judged_by_their_goals():
    results = json.loads(bench.NUMBERS.read_text())
    for row in (row for row in ROWS if row.name in results["rows"]):
        seen = results["rows"][row.name]
        assert seen["is_met"] == row.is_met(seen["ratio"]), row.name
        assert seen["pairs"] >= (5 if seen["unit"] == "s" else 1)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_goal_in_words_is_the_goal(row):
    sign, number = row.goal.split()
    bound = float(number)
    assert row.is_met(bound)
    assert row.is_met(bound * 1.01) == (sign == ">=")
    assert row.is_met(bound * 0.99) == (sign == "<=")


def test_arms_take_turns_after_a_warm_up():
    turns: list[str] = []
    arms = [timed(name, lambda name=name: turns.append(name), list) for name in "AB"]
    measured = compare(*arms, pairs=3)
    assert "".join(turns) == "AB" + "AB" * 3
    assert measured.ratio > 0


def test_a_row_of_memory_has_megabytes_and_no_cpu():
    arms = (Arm("one", lambda: Spent(300.0)), Arm("four", lambda: Spent(900.0)))
    measured = compare(*arms, pairs=1, unit="MB", warm_up=False)
    assert measured == Measured("one", "four", Spent(300.0), Spent(900.0), 1, "MB")
    row = Row("j", "one / four", "<= 0.4", lambda ratio: ratio <= 0.4, lambda _: measured)
    results = {
        "machine": bench.machine(),
        "shape": "tiny",
        "rows": {"j": bench.record(row, measured)},
    }
    line = "| j | one / four | 0.33 |  | <= 0.4 | yes | one: 300 MB; four: 900 MB | 1 |"
    assert line in bench.table(results).splitlines()


def test_what_a_living_child_takes_counts():
    """A worker's decode server is such a child: nobody waits for it until the worker ends."""
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    try:
        wait_until(lambda: cpu_seconds([child.pid]) > 0, 30, "it has started")
        assert child.pid in family([os.getpid()])
        assert cpu_seconds([os.getpid()]) >= cpu_seconds([child.pid])
        assert megabytes([os.getpid()]) > megabytes([child.pid]) > 0
    finally:
        child.kill()
        child.join()
