"""Adds the toy experiments to the catalogue of every Python process that a test starts."""

from pathlib import Path

import experiments

experiments.__path__.append(str(Path(__file__).parent / "experiments"))
