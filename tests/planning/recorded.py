"""A program as libtpu writes it after code generation, cut down to a few lines of each kind."""

from pathlib import Path

PROGRAM = (Path(__file__).parent / "recorded.txt").read_text()
