"""Cases of a property test: as many as it asks for, and ten times as many with ``--hypothesis-profile=more``."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

USUAL = 100
"""Cases of a test that asks for no number, in the usual profile (tests/conftest.py)."""


def cases(number: int, **options: Any) -> settings:
    """Decorator: so many cases in `make test`."""
    more = (settings.default.max_examples if settings.default else USUAL) // USUAL
    return settings(max_examples=number * more, deadline=None, **options)
