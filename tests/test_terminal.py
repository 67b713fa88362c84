"""The progress line: a pure string, and what a real terminal shows of it."""

from __future__ import annotations

import os
import re
import time
import unittest
from unittest import mock

import embedgen
from embedgen import Counts, progress_line, width_of
from tests.support import ENGINES, SLOW_ENGINES, Case, captured, environment, text_of

try:
    import fcntl
    import pty
    import struct
    import termios
except ImportError:  # Windows
    pty = None  # type: ignore[assignment]


def counts(generated: int, skipped: int, failed: int, left: int = 0) -> Counts:
    """Return such counts."""
    made = Counts(generated + skipped + failed + left, skipped, None)
    made.generated = generated
    made.reasons["no text"] = failed
    return made


class ProgressLine(unittest.TestCase):
    def test_in_a_pipe_the_bar_has_eight_cells(self) -> None:
        for given, elapsed, line in [
            ((50, 45, 5), 10.4, "Generating embeddings: 100%|████████| 100/100 [00:10<00:00, ✓=50, ⊘=45, ✗=5]"),
            ((0, 45, 0, 55), 0.0, "Generating embeddings:  45%|███▌    | 45/100 [00:00<?, ✓=0, ⊘=45, ✗=0]"),
            # 55 rows are left, and the 5 that were worked on took 10 s: the 40 skipped are no measure.
            ((4, 40, 1, 55), 10.0, "Generating embeddings:  45%|███▌    | 45/100 [00:10<01:50, ✓=4, ⊘=40, ✗=1]"),
            ((0, 0, 0), 0.0, "Generating embeddings: 100%|████████| 0/0 [00:00<00:00, ✓=0, ⊘=0, ✗=0]"),
            (
                (9_999, 0, 0, 1),
                7322.0,
                "Generating embeddings:  99%|███████▉| 9999/10000 [2:02:02<00:00, ✓=9999, ⊘=0, ✗=0]",
            ),
        ]:
            with self.subTest(given=given):
                self.assertEqual(progress_line(counts(*given), elapsed, None), line)

    def test_it_fits_every_width(self) -> None:
        for given in [(0, 0, 0, 5), (50, 45, 5), (123_456, 7_890_123, 45, 6_000_000)]:
            for columns in range(1, 300):
                line = progress_line(counts(*given), 3700.0, columns)
                self.assertLess(width_of(line), max(columns, 2), (columns, line))

    def test_a_wide_terminal_is_filled_by_the_bar(self) -> None:
        for columns in (100, 200):
            self.assertEqual(width_of(progress_line(counts(1, 2, 3, 4), 1.0, columns)), columns - 3)

    def test_a_narrow_one_keeps_the_figures(self) -> None:
        line = progress_line(counts(50, 45, 5, 28_000), 61.0, 60)
        for part in ("100/28100", "✓=50", "⊘=45", "✗=5"):
            self.assertIn(part, line)

    def test_the_bars_steps(self) -> None:
        for share, shown in [(0, "    "), (1 / 32, "▏   "), (0.5, "██  "), (0.99, "███▉"), (1, "████")]:
            self.assertEqual(embedgen.bar(share, 4), shown)

    def test_counts_add_up(self) -> None:
        for limit in (None, 0, 3, 100):
            made = Counts(20, 5, limit)
            for _ in range(15):
                if limit is None or made.generated < limit:
                    made.generated += 1
                    if made.generated % 3 == 0:
                        made.reasons["x"] += 1
                self.assertGreaterEqual(made.total, made.done)
                self.assertEqual(made.done, made.generated + made.skipped + made.failed)

    def test_a_row_that_two_machines_generate_counts_once(self) -> None:
        made = Counts(40, 0, None)
        made.set_peers(4, 0)
        made.generated = 40  # among them those of the other machine, which was taken for dead
        made.set_peers(4, 0)
        self.assertEqual((made.done, made.total, made.left), (40, 40, 0))


class Clock(Case):
    """The bar and the summary count from the same moment, when the program was started."""

    def test_one_clock(self) -> None:
        out, settings = captured(), embedgen.parse_arguments(["--dry-run"])
        console, started = embedgen.Console(out, embedgen.Interrupt()), time.monotonic() - 1000
        report = embedgen.Report(console, settings, embedgen.Log(settings), "movies", started, {})
        report.start(Counts(3, 3, None))
        report.finish(Counts(3, 3, None), 0)
        [bar], [summary] = re.findall(r"\[(\d+:\d\d)<", text_of(out)), re.findall(r"elapsed: (\d+)\.", text_of(out))
        minutes, seconds = map(int, bar.split(":"))
        self.assertEqual(60 * minutes + seconds, int(summary))
        self.assertGreaterEqual(int(summary), 1000)

    def test_in_a_pipe_there_is_a_line_every_half_minute(self) -> None:
        out, settings, now = captured(), embedgen.parse_arguments(["--dry-run"]), [1000.0]
        with mock.patch("time.monotonic", lambda: now[0]):
            console = embedgen.Console(out, embedgen.Interrupt())
            report = embedgen.Report(console, settings, embedgen.Log(settings), "movies", now[0], {})
            report.start(Counts(9, 0, None))
            for _ in range(100):
                now[0] += 1.0
                report.update(Counts(9, 0, None))
        self.assertEqual(re.findall(r"\[(\d+:\d\d)<", text_of(out)), ["00:30", "01:00", "01:30"])

    def test_one_is_singular(self) -> None:
        self.make_movies(1)
        self.succeed("--verbose", "--server", self.ollama.url)
        self.assertRegex(self.log(), r": 1 text in [\d.]+ s\n|- 1 text in [\d.]+ s\n")
        self.assertNotRegex(self.log(), r"(?<![\d.])1 (texts|rows|movies)\b")  # 2.1 texts/s are plural


class Screen:
    """As much of a terminal as a progress line needs: text, carriage returns and newlines, wrapped at its width."""

    def __init__(self, columns: int, written: str) -> None:
        self.columns = columns
        self.rows: list[list[str]] = [[]]  # a cell is a character, or "" right of one that is two wide
        self.at = 0
        for character in written:
            self.put(character)

    def put(self, character: str) -> None:
        """Show one character."""
        if character == "\r":
            self.at = 0
            return
        if character == "\n" or self.at + width_of(character) > self.columns:
            self.rows.append([])
            self.at = 0
        if character != "\n":
            row = self.rows[-1]
            row.extend(" " * (self.at + width_of(character) - len(row)))
            row[self.at : self.at + width_of(character)] = [character, ""][: width_of(character)]
            self.at += width_of(character)

    @property
    def lines(self) -> list[str]:
        """What can be read."""
        return ["".join(row).rstrip() for row in self.rows]


@unittest.skipIf(pty is None, "pseudo-terminals are needed")
class Terminal(Case):
    def run_in_terminal(
        self, columns: int, *flags: object, interrupt: bool = False, **constants: float
    ) -> tuple[int, str]:
        """Run the program in a terminal of that width; return its exit status and all that it wrote."""
        # Drawn at each event, so that a machine that is busy for a while does not miss any.
        redraw = embedgen.REDRAW_SECONDS if interrupt else 0.0
        arguments = self.arguments(*flags, UNSAVED_SECONDS=redraw, REDRAW_SECONDS=redraw, **constants)
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(self.folder)
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            os.execve(arguments[0], arguments, environment({"TERM": "xterm"}))
        written = b""
        interrupted = False
        while True:
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # Linux says so when the other side is closed
                break
            if not piece:
                break
            written += piece
            if interrupt and not interrupted and re.search("✓=[1-9]".encode(), written):
                os.write(terminal, b"\x03")
                interrupted = True
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
        self.assertTrue(os.WIFEXITED(status), written)
        return os.WEXITSTATUS(status), written.decode("utf-8")

    def test_the_line_is_redrawn_in_place(self) -> None:
        self.make_movies(60)
        for engine, columns in zip(ENGINES, (60, 200)):
            with self.subTest(engine=engine, columns=columns):
                code, written = self.run_in_terminal(
                    columns, "--engine", engine, "--force", "--batch-size", 4, "--noun", "映画"
                )
                self.assertEqual(code, 0, written)
                self.assertGreater(written.count("\r"), written.count("\n") + 2)  # the terminal makes \n into \r\n
                lines = Screen(columns, written).lines
                # Seven lines of head, one of progress, however often that was drawn.
                self.assertEqual(lines[1], "🧠 映画 Embedding Generator")
                self.assertEqual(lines[7], "")
                self.assertIn("60/60", lines[8])
                self.assertLess(width_of(lines[8]), columns)
                self.assertEqual(lines[9:12], ["", "💾 Saving embeddings to database...", ""])

    def test_a_model_that_is_being_loaded(self) -> None:
        self.make_movies(3)
        self.ollama.configure(load_seconds=0.5)
        code, written = self.run_in_terminal(100, PATIENT_SECONDS=0.1)
        self.assertEqual(code, 0, written)
        lines = Screen(100, written).lines
        self.assertRegex(lines[0], r"^Waiting for the server, which may be loading the model \[\d\d:\d\d\]$")
        self.assertEqual(lines[2], "🧠 Movie Embedding Generator")

    def test_control_c_leaves_the_terminal_tidy(self) -> None:
        self.make_movies(400)
        self.ollama.configure(seconds_per_text=0.02, slots=1)
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                code, written = self.run_in_terminal(
                    100, "--engine", engine, "--batch-size", 4, "--workers", 2, interrupt=True
                )
                self.assertEqual(code, 130, written)
                self.assertNotIn("Traceback", written)
                lines = Screen(100, written).lines
                heading = lines.index("⏹️  Movie Embedding Generator Stopped")
                self.assertEqual(lines[heading - 4 : heading - 1], ["", "💾 Saving embeddings to database...", ""])
                notice = lines.index("Stopping within 10 s. Ctrl-C again ends at once.")
                self.assertEqual(heading - notice, 6)  # one progress line, redrawn, between the two
                found = re.search(r"✓  Successfully generated: (\d+)", written)
                assert found
                self.assertEqual(lines[-1], "")
                self.assertEqual(int(found[1]), len(self.stored()))
                self.execute("DROP TABLE movie_embeddings")
