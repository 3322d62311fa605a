"""The panel of notebook 06: choose a strategy and a load, run it, watch it, see its figure.

The only module that knows ipywidgets. Its handlers read the controls and show what comes back;
what they call stands in `labkit.lab.live`.
"""

from __future__ import annotations

from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from IPython.display import display

from labkit.errors import LabError
from labkit.lab.live import (
    CHOICES,
    Ended,
    Order,
    Progress,
    Session,
    ended_html,
    figure_html,
    live_html,
    message_html,
    stop_newest,
)
from labkit.lab.measure import RUNS
from labkit.load.strategies import DOUBLE_MAP

_STATIC = (
    "Here JupyterLab (make lab) shows a panel that runs one strategy under a load of your choice, "
    "with its latency and losses while it runs."
)
_LABELS = widgets.Layout(width="24em")
_STYLE = {"description_width": "12em"}


class LivePanel:
    """Controls, live figures and the figure of the newest run; `show` displays it.

    Making one stops what an older panel of this notebook runs.

    Parameters
    ----------
    runs_folder : Path
        Where runs are saved.
    """

    def __init__(self, runs_folder: Path = RUNS) -> None:
        stop_newest()
        self._folder = runs_folder
        self._session: Session | None = None
        self._turn, self._starting = 0, False
        usual = Order("events", 10_000)

        def number(value: int, words: str) -> Any:
            control = widgets.IntText(value=value, description=words, style=_STYLE, layout=_LABELS)
            control.observe(self._entered, "value")
            return control

        # Buttons: JupyterLab keeps the arrow keys and letters of a drop-down for itself.
        self.strategy = widgets.ToggleButtons(
            options=list(CHOICES), value=usual.strategy, description="Strategy",
            style={**_STYLE, "button_width": "auto"},
        )  # fmt: skip
        self.rate = number(usual.rate, "Rate (changes/s)")
        self.value_bytes = number(usual.value_bytes, "Value size (B)")
        self.ring_bytes = number(usual.ring_bytes, "Ring size (B)")
        self.seconds = number(usual.seconds, "At most (s)")
        self.run = widgets.Button(description="Run", button_style="primary")
        self.stop = widgets.Button(description="Stop")
        self.message = widgets.HTML(message_html("Ready."))
        self.live = widgets.HTML(live_html(None))
        self.figure = widgets.HTML()
        self.strategy.observe(self._chosen, "value")
        self.run.on_click(lambda _button: self.start())
        self.stop.on_click(lambda _button: self.halt())
        self.box = widgets.VBox(
            [
                self.strategy, self.rate, self.value_bytes, self.ring_bytes, self.seconds,
                widgets.HBox([self.run, self.stop]), self.message, self.live, self.figure,
            ]
        )  # fmt: skip

    def show(self) -> None:
        """Display the panel; where there are no widgets, a sentence stands in its place."""
        bundle = {
            **self.box._repr_mimebundle_(),
            "text/html": f"<p><i>{escape(_STATIC)}</i></p>",
            "text/plain": _STATIC,
        }
        display(bundle, raw=True)  # type: ignore[no-untyped-call]

    def start(self) -> None:
        """Begin the run that the controls ask for; a run that still goes on is stopped."""
        try:
            order = Order(
                self.strategy.value,
                self.rate.value,
                self.value_bytes.value,
                self.ring_bytes.value,
                self.seconds.value,
            )
            # What an older run still tells must not be taken for this one's.
            self._turn += 1
            self._starting = True
            self.live.value = live_html(None)
            self.message.value = message_html(f"{order.strategy} starts, which takes some seconds.")
            self._session = Session(
                order,
                partial(self._tell, self._turn),
                partial(self._ended, self._turn),
                folder=self._folder,
            )
        except LabError as error:
            self.message.value = message_html(str(error), bad=True)

    def halt(self) -> None:
        """Stop the run; what it has measured is saved and drawn."""
        if self._session is None or not self._session.running:
            self.message.value = message_html("Nothing runs.")
            return
        self._starting = False
        self.message.value = message_html("Stopping; what was measured is saved and drawn.")
        self._session.stop()

    def _chosen(self, change: Any) -> None:
        self.ring_bytes.disabled = change["new"] == DOUBLE_MAP
        self.message.value = message_html(f"{change['new']} is chosen for the next run.")

    def _entered(self, change: Any) -> None:
        """Say what has arrived: a press of Run may come before a number that was typed in front."""
        words = f"{change['owner'].description}: {change['new']:,} for the next run."
        self.message.value = message_html(words)

    def _tell(self, turn: int, progress: Progress) -> None:
        if turn == self._turn:
            self.live.value = live_html(progress)
            if self._starting:
                self._starting = False
                self.message.value = message_html("Running.")

    def _ended(self, turn: int, ended: Ended) -> None:
        if turn == self._turn:
            self.figure.value = figure_html(ended) or self.figure.value
            self.message.value = ended_html(ended)


def live_panel(runs_folder: Path = RUNS) -> LivePanel:
    """Make a `LivePanel` and show it."""
    panel = LivePanel(runs_folder)
    panel.show()
    return panel
