"""The paper's method, one file an algorithm (arXiv 2503.07680, Section 4)."""
