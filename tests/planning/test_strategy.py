"""Strategies are named in one place, and nobody asks for a name to know what a strategy does."""

from __future__ import annotations

import ast
from pathlib import Path

import hbp
from hbp.config import STRATEGIES as NAMES
from hbp.planning.planner import STRATEGIES


def test_the_configuration_names_every_strategy_and_no_other() -> None:
    assert tuple(STRATEGIES) == NAMES
    assert all(name == strategy.name for name, strategy in STRATEGIES.items())


def test_help_is_one_line_a_strategy() -> None:
    for strategy in STRATEGIES.values():
        assert 0 < len(strategy.summary) <= 110
        assert strategy.summary == strategy.summary.strip().splitlines()[0]
    assert len({strategy.summary for strategy in STRATEGIES.values()}) == len(STRATEGIES)


def test_nothing_branches_on_a_strategy_s_name() -> None:
    """No comparison with a name anywhere; what others need to know is a field of the strategy."""
    for file in Path(hbp.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                constants = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                assert not constants & set(NAMES), f"{file.name}:{node.lineno} compares with {constants & set(NAMES)}"
