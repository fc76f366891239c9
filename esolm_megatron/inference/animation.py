"""How texts were written, place by place: drawn live in a terminal, or as a page that plays it."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.text import Text

from esolm_megatron.terminal import Terminal

_HOLE = "\u00b7"


class Animation:
    """The `watch` argument of sampling, which keeps what it is told.

    rows: for each text its pieces, None where nothing is written yet. given: {position: id} of the prompt. passes: for
    each pass a list of [row, position, piece].
    """

    def __init__(self, num_rows: int, length: int, decode: Callable[[list[int]], str], given: dict[int, int]):
        self.decode = decode
        self.given = {position: decode([token]) for position, token in given.items()}
        self.rows: list[list[str | None]] = [[self.given.get(i) for i in range(length)] for _ in range(num_rows)]
        self.passes: list[list[list[Any]]] = []
        self.display: Live | None = None
        self.seconds = 0.0

    def __call__(
        self, count: int, rows: NDArray[np.int64], positions: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> None:
        """Take in what a pass has filled, and draw it if somebody looks."""
        new = [
            [row, position, self.decode([token])]
            for row, position, token in zip(rows.tolist(), positions.tolist(), tokens.tolist(), strict=True)
        ]
        for row, position, piece in new:
            self.rows[row][position] = piece
        self.passes.append(new)
        if self.display is not None:
            self.display.update(self.drawn(), refresh=True)
            time.sleep(self.seconds)

    def drawn(self) -> Group:
        """The texts as they stand: the prompt dim, what the last pass made bright, holes as dots."""
        newest = {(row, position) for row, position, _ in self.passes[-1]} if self.passes else set()
        parts: list[Any] = []
        for row, pieces in enumerate(self.rows):
            made = sum(piece is not None for piece in pieces)
            parts.append(Rule(f"text {row}   pass {len(self.passes)}   {made} of {len(pieces)} tokens"))
            text = Text()
            for position, piece in enumerate(pieces):
                style = "bold black on green" if (row, position) in newest else "dim" if position in self.given else ""
                text.append(_HOLE if piece is None else piece, style="dim" if piece is None else style)
            parts.append(text)
        return Group(*parts)

    @contextmanager
    def live(self, seconds: float, console: Console | None = None) -> Iterator[None]:
        """Draw in the terminal while the block runs, waiting `seconds` after each pass."""
        where = console or Terminal(stderr=True)
        with Live(self.drawn(), console=where, auto_refresh=False, vertical_overflow="visible") as self.display:
            self.seconds = seconds
            try:
                yield
            finally:
                self.display = None

    def write_html(self, path: Path, title: str) -> None:
        """A page that needs nothing else: a slider over the passes, and a button that plays them."""
        data = {"given": self.given, "rows": len(self.rows), "length": len(self.rows[0]), "passes": self.passes}
        safe = json.dumps(data).replace("<", "\\u003c").replace("&", "\\u0026").replace("\u2028", "\\u2028")
        path.write_text(_PAGE.replace("@TITLE@", html.escape(title)).replace("@DATA@", safe), encoding="utf-8")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title><style>
body { font: 15px/1.6 ui-monospace, monospace; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid #ccc; padding-left: 1rem; font: inherit }
.hole { color: #bbb } .given { color: #777 } .new { background: #9fd89f }
input { width: 60%; vertical-align: middle }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } .new { color: #000 } }
</style></head><body>
<h1>@TITLE@</h1>
<p><button id="play">play</button> <input id="at" type="range" min="0" value="0" aria-label="pass"> <span id="count"></span></p>
<div id="texts"></div>
<script type="application/json" id="data">@DATA@</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent), at = document.getElementById("at")
const filled = data.passes.map(() => [])
data.passes.forEach((made, n) => made.forEach(([row, place, piece]) => filled[n].push([row, place, piece])))
const cells = [...Array(data.rows)].map(() => {
  const box = document.getElementById("texts").appendChild(document.createElement("pre"))
  return [...Array(data.length)].map(() => box.appendChild(document.createElement("span")))
})
function show() {
  const pass = Number(at.value)
  cells.forEach(row => row.forEach((cell, place) => {
    const given = place in data.given
    cell.textContent = given ? data.given[place] : "\\u00b7"
    cell.className = given ? "given" : "hole"
  }))
  for (let n = 0; n < pass; n++) for (const [row, place, piece] of filled[n]) {
    cells[row][place].textContent = piece
    cells[row][place].className = n == pass - 1 ? "new" : ""
  }
  document.getElementById("count").textContent = "pass " + pass + " of " + data.passes.length
}
let timer = null
const button = document.getElementById("play")
function stop() { clearInterval(timer); timer = null; button.textContent = "play" }
button.onclick = () => {
  if (timer) return stop()
  if (Number(at.value) >= data.passes.length) at.value = 0
  button.textContent = "stop"
  timer = setInterval(() => { at.value = Number(at.value) + 1; show(); if (Number(at.value) >= data.passes.length) stop() }, 120)
}
at.max = data.passes.length
at.oninput = () => { stop(); show() }
at.value = data.passes.length
show()
</script></body></html>
"""
