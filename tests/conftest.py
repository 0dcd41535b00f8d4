"""How many cases property tests try: a fixed set in `make test`, fresh and ten times as many in `make test-more`."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("default", derandomize=True, deadline=None)
settings.register_profile("more", max_examples=1000, derandomize=False, deadline=None, print_blob=True)
settings.load_profile("default")  # pytest's --hypothesis-profile=more comes after it
