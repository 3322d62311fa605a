"""Adds the toy experiments to the catalogue of every Python process that a test starts."""

from pathlib import Path

import labkit.failures

labkit.failures.__path__.append(str(Path(__file__).parent / "experiments"))
