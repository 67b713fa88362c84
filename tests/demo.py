"""Draws the README's demonstration: a run over 2,000 rows, recorded in a terminal.

    python -m tests.demo

The program runs as its user would run it, in a terminal of 92 columns, against the double. What it writes, and when,
becomes an animated picture, tests/figures/demo.svg. Needs a system with pseudo-terminals.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path
from xml.sax.saxutils import escape

from tests.bench import PLOT, make_movies
from tests.ollama import Ollama
from tests.support import PROGRAM, ROOT, environment

ROWS, COLUMNS = 2_000, 92
SECONDS_PER_TEXT = 0.005
COMMAND = "python embedgen.py"
FRAME_SECONDS = 0.2  # between two pictures of the progress line, at least
HOLD_SECONDS = 5.0  # that the end is shown before the picture begins again
CELL, LINE, MARGIN = 8.4, 19, 14  # pixels: width and height of a character's cell, and the space around the text

PICTURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">
<title>A run over {rows:,} rows in a terminal</title>
<style>
text {{ font: 14px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #e6edf3; white-space: pre; }}
.bar {{ fill: #3fb27f; }} .prompt {{ fill: #9198a1; }}
.line, .frames {{ animation-duration: {seconds:.2f}s; animation-timing-function: step-end;
animation-iteration-count: infinite; }}
.frames {{ transform: translateY({last}px); animation-name: frames; }}
@keyframes frames {{ {steps} }}
{appearances}
@media (prefers-reduced-motion: reduce) {{ .line, .frames {{ animation: none; }} }}
</style>
<rect width="{width}" height="{height}" rx="8" fill="#161b22" stroke="#57606a"/>
{lines}
</svg>
"""


def record(folder: Path, url: str) -> list[tuple[float, bytes]]:
    """Run the program in a terminal; return what it wrote, with the seconds since it was started."""
    import fcntl
    import pty
    import termios

    began, pieces = time.monotonic(), list[tuple[float, bytes]]()
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(folder)
        os.execve(sys.executable, [sys.executable, "embedgen.py"], environment({"OLLAMA_HOST": url, "no_proxy": "*"}))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # on Linux, the end
            break
        if not piece:
            break
        pieces.append((time.monotonic() - began, piece))
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError(b"".join(piece for _, piece in pieces).decode())
    return pieces


def lines_of(pieces: list[tuple[float, bytes]]) -> list[list[tuple[float, str]]]:
    """Return the screen's lines; each is what stood there one after the other, with the seconds from when on."""
    lines: list[list[tuple[float, str]]] = [[]]
    unfinished = b""
    for seconds, piece in pieces:
        *whole, unfinished = re.split(rb"(?<=[\r\n])", unfinished + piece)
        for text in [*whole, unfinished]:
            shown = text.decode("utf-8", "ignore").rstrip("\r\n").rstrip()
            if shown:
                lines[-1].append((seconds, shown))
            if text.endswith(b"\n"):
                lines.append([])
    return lines


def thinned(states: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return as many of a line's states as an eye can follow, the last one included."""
    kept: list[tuple[float, str]] = []
    for seconds, text in states[:-1]:
        if not kept or (seconds - kept[-1][0] >= FRAME_SECONDS and text != kept[-1][1]):
            kept.append((seconds, text))
    return [*kept, states[-1]]


def text_at(row: int, text: str, more: str = "") -> str:
    """Return a line of text in the picture."""
    shown = re.sub(r"[█▏▎▍▌▋▊▉]+", r'<tspan class="bar">\g<0></tspan>', escape(text))
    return f'<text x="{MARGIN}" y="{MARGIN + row * LINE + 14}"{more}>{shown}</text>'


def draw(lines: list[list[tuple[float, str]]]) -> str:
    """Return the picture of what stood in a terminal."""
    total = max(states[-1][0] for states in lines if states) + HOLD_SECONDS
    height, width = 2 * MARGIN + (len(lines) + 1) * LINE, round(2 * MARGIN + COLUMNS * CELL)
    shown, appearances, steps, last = [text_at(0, f"$ {COMMAND}", ' class="prompt"')], {}, "", 0
    for row, states in enumerate(lines, 1):
        if not states:
            continue
        share = f"{100 * states[0][0] / total:.2f}"
        name = "at" + share.replace(".", "_")
        appearances[name] = f"@keyframes {name} {{ 0% {{ opacity: 0; }} {share}% {{ opacity: 1; }} }}"
        states, style = thinned(states), f' class="line" style="animation-name: {name}"'
        if len(states) == 1:
            shown.append(text_at(row, states[0][1], style))
            continue
        fit = f' textLength="{len(states[0][1]) * CELL:.0f}" lengthAdjust="spacingAndGlyphs"'
        frames = "\n".join(text_at(index, text, fit) for index, (_, text) in enumerate(states))
        top, last = row * LINE, -LINE * (len(states) - 1)
        shown.append(
            f'<g{style}><svg y="{MARGIN + top}" width="{width}" height="{LINE}" overflow="hidden">'
            f'<g transform="translate(0 -{MARGIN})"><g class="frames">\n{frames}\n</g></g></svg></g>'
        )
        steps = " ".join(
            f"{100 * seconds / total:.2f}% {{ transform: translateY({-LINE * index}px); }}"
            for index, (seconds, _) in enumerate(states)
        )
    return PICTURE.format(
        width=width, height=height, rows=ROWS, seconds=total, last=last, steps=f"0% {{ transform: none; }} {steps}",
        appearances="\n".join(appearances.values()), lines="\n".join(shown),
    )  # fmt: skip


def main() -> None:
    """Record a run and draw it."""
    with (
        tempfile.TemporaryDirectory(prefix="embedgen-demo-") as name,
        Ollama(seconds_per_text=SECONDS_PER_TEXT, slots=1) as server,
    ):
        folder = Path(name)
        shutil.copy(PROGRAM, folder)
        make_movies(folder / "movies.db", ROWS, PLOT)
        picture = draw(lines_of(record(folder, server.url)))
    path = ROOT / "tests" / "figures" / "demo.svg"
    path.write_text(picture, "utf-8")
    print(f"{path.relative_to(ROOT)}: {len(picture.encode()):,} bytes")


if __name__ == "__main__":
    main()
