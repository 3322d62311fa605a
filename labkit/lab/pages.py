"""HTML of the lab, from the templates beside this file: all text is escaped where it is shown."""

from __future__ import annotations

import functools
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

LOOKS: Final = {
    "holds": "good", "FAILS": "bad", "undecided": "open", "NO FINDING": "bad",
    "true": "good", "false": "bad", "depends": "mixed",
}  # fmt: skip
"""How a word looks, by the class of parts.css; any other one stands aside."""


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("labkit.lab"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.globals["looks"] = LOOKS
    return made


def render(template: str, **values: Any) -> Markup:
    """Fill a template.

    Parameters
    ----------
    template : str
        Its file's name below ``templates/``.
    **values
        What it speaks of; text is escaped, unless it is HTML that another template made.

    Returns
    -------
    Markup
        HTML, or the content of a style or script.
    """
    return Markup(_environment().get_template(template).render(values))


def table(titles: list[str], rows: list[list[str]], *, words: int) -> Markup:
    """A table whose first columns hold words, to the left, and the others numbers.

    Parameters
    ----------
    titles, rows
        Of the columns, and their cells.
    words : int
        How many columns hold words.
    """
    return render("table.html", titles=titles, rows=rows, words=words)
