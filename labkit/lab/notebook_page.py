"""A notebook as a page: numbered sections, links between them, code that opens when asked for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, Final

_HEADING: Final = re.compile(r"^## (?:(\d+)\. )?(.+)$", re.MULTILINE)
# "Section 4.2" is one of the article's.
_PLACES: Final = re.compile(r"\b[Ss]ections? \d+(?:(?:, | and | to )\d+)*(?!\.?\d)")
_WIDGET: Final = "application/vnd.jupyter.widget-view+json"
_NO_ALT: Final = 'alt="No description has been provided for this image"'
_TEMPLATE: Final = """{% extends 'basic/index.html.j2' %}
{% block input_group %}
<details class='code'><summary>Code</summary>{{ super() }}</details>
{% endblock %}"""


@dataclass(frozen=True)
class Section:
    """One section of a notebook's page.

    Attributes
    ----------
    number
        Of the notebook and of the section in it: ``"5.3"``.
    title
        In plain text.
    address
        Page and place: ``"05-watching-writes.html#cell-id=exp-44-prose"``.
    experiment
        Number of the experiment that it is about; 0 where it is about none.
    """

    number: str
    title: str
    address: str
    experiment: int = 0


def sections(notebook: Any, name: str) -> Iterator[Section]:
    """Number the sections of a notebook, as they follow each other.

    Parameters
    ----------
    notebook : nbformat.NotebookNode
        Executed or not.
    name : str
        Its file name without the ending, which begins with its number.
    """
    place = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (found := _HEADING.search(cell.source)):
            place += 1
            yield Section(
                f"{int(name[:2])}.{place}",
                found[2].strip(),
                f"{name}.html#cell-id={cell.id}",
                int(found[1] or 0),
            )


def body(notebook: Any, own: list[Section], every: Mapping[int, Section]) -> str:
    """Turn an executed notebook into HTML.

    Parameters
    ----------
    notebook : nbformat.NotebookNode
        It is changed on the way.
    own : list of Section
        Of this notebook, from `sections`.
    every : mapping
        The sections of all notebooks, by the number of their experiment: prose that names
        "section 44" leads there.

    Returns
    -------
    str
        HTML that loads nothing.
    """
    from nbconvert import HTMLExporter

    # papermill's own marks; the page has a better one.
    notebook.cells = [
        cell
        for cell in notebook.cells
        if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])
    ]
    numbers = iter(own)
    pictures = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _linked(cell.source, every)
            if _HEADING.search(cell.source):
                number = next(numbers).number
                cell.source = _HEADING.sub(rf"## {number} \2", cell.source, count=1)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop(_WIDGET, None)  # its words for a static page remain
            if "image/png" in data and "text/html" not in data:
                pictures.append(data.get("text/plain", ""))
    exporter = HTMLExporter(
        raw_template=_TEMPLATE, exclude_input_prompt=True, exclude_output_prompt=True
    )
    with warnings.catch_warnings():  # it warns of pictures without words; they follow
        warnings.simplefilter("ignore")
        made: str = exporter.from_notebook_node(notebook)[0]
    for words in pictures:
        made = made.replace(_NO_ALT, f'alt="{escape(words)}"', 1)
    return made


def _linked(text: str, every: Mapping[int, Section]) -> str:
    """Make links of sections that are named by their experiment's number."""

    def link(number: re.Match[str]) -> str:
        known = every.get(int(number[0]))
        return f"[{known.number}]({known.address})" if known else number[0]

    return _PLACES.sub(lambda found: re.sub(r"\d+", link, found[0]), text)
