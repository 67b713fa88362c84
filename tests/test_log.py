"""The log: one line for one event, no line lost however many runs write in one folder, and a bound on its size."""

from __future__ import annotations

import os
import re
import sqlite3
import sys
import unittest
from pathlib import Path
from unittest import mock

import embedgen
from tests.support import DEV_FULL, FULL, Case


class Lines(Case):
    def test_each_line_has_a_time_a_process_and_a_level(self) -> None:
        self.make_movies(3)
        self.execute("UPDATE movies SET title = NULL, overview = NULL WHERE id = 2")
        self.run_program("--verbose")
        line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - MainProcess - (\w+) - \S.*"
        levels = [re.fullmatch(line, text) for text in self.log().splitlines()]
        self.assertEqual({found and found[1] for found in levels}, {"INFO", "WARNING", "DEBUG"})

    def test_they_cannot_be_forged(self) -> None:
        self.execute("CREATE TABLE movies (id TEXT PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO movies VALUES (?, ?)", [("a\n2026 - Main - ERROR - forged\x1b[2J", "")])
        self.assertEqual(self.run_program().code, 1)
        self.assertNotIn("\n2026 - Main", self.log())
        self.assertNotIn("\x1b", self.log())

    def test_a_run_that_only_reads_leaves_none(self) -> None:
        self.make_movies(3)
        self.run_program("--status")
        self.run_program("--dry-run")
        self.assertFalse((self.folder / "logs").exists())

    def test_a_database_that_cannot_be_opened_is_in_the_log(self) -> None:
        self.refuse(3)
        self.assertIn(" - ERROR - there is no database", self.log())


class Trouble(Case):
    def test_a_folder_that_cannot_be_made(self) -> None:
        self.make_movies(5)
        (self.folder / "logs").write_text("a file where the folder should be")
        done = self.run_program()
        self.assertEqual((done.code, done.tally), (0, (5, 0, 0)))
        self.assertRegex(done.err, r"\Awarning: cannot write the log .*\n\Z")
        self.assertIn("Detailed logs: none\n", done.out)

    @unittest.skipUnless(DEV_FULL, "needs /dev/full")
    def test_a_full_disk(self) -> None:
        self.make_movies(3)
        (self.folder / "logs").mkdir()
        (self.folder / "logs" / "generate_embeddings_async.log").symlink_to("/dev/full")
        done = self.run_program()
        self.assertEqual((done.code, done.tally), (0, (3, 0, 0)))
        self.assertRegex(done.err, r"\Awarning: cannot write the log .*no space left.*\n\Z")

    def test_a_log_that_cannot_be_renamed_grows(self) -> None:
        """As on Windows, where a file that somebody reads cannot be renamed."""
        self.make_movies(50)
        self.execute("UPDATE movies SET title = NULL, overview = NULL")
        rename = mock.patch("os.rename", side_effect=PermissionError(13, "in use"))
        with mock.patch.object(embedgen, "LOG_BYTES", 1500), rename:
            self.assertEqual(self.run_program().err, "")
        self.assertEqual(len(set(re.findall(r"movie (\d+) failed: no text\n", self.log()))), 50)


class Folder(Case):
    def names(self) -> list[str]:
        """Return the names of the logs in the folder."""
        return sorted(path.name for path in (self.folder / "logs").glob("*.log*"))

    def make_failing_rows(self, path: Path, rows: int) -> None:
        """Make a database whose rows all fail, each with a line in the log."""
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT)")
            connection.executemany("INSERT INTO movies VALUES (?, NULL)", [(key,) for key in range(rows)])
        connection.close()

    def test_a_log_is_put_aside_at_a_size_and_the_oldest_goes(self) -> None:
        self.make_failing_rows(self.database, 50)
        with mock.patch.multiple(embedgen, LOG_BYTES=1500, LOG_FILES=2):
            for _ in range(3):
                self.run_program()
        name = "generate_embeddings_async.log"
        self.assertEqual(self.names(), [name, f"{name}.1", f"{name}.2"])
        texts = [(self.folder / "logs" / (name + more)).read_text("utf-8") for more in (".2", ".1", "")]
        self.assertLessEqual(max(map(len, texts)), 1500)
        keys = re.findall(r"movie (\d+) failed: no text\n", "".join(texts))
        self.assertEqual(keys, [str(key) for key in range(50 - len(keys), 50)])  # the newest, and none missing
        self.assertGreater(len(keys), 20)

    def test_four_runs_at_once_lose_no_line(self) -> None:
        # 50 MB in all with the log's real size, or less. One log has room for all, should no two runs overlap.
        rows, width, most = (25_000, 400, embedgen.LOG_BYTES) if FULL else (400, 100, 80_000)
        for number in range(4):
            self.make_failing_rows(self.folder / f"{number}.db", rows)
        runs = [
            self.start_program("--database", f"{number}.db", "--noun", f"run{number}" + width * "x", LOG_BYTES=most)
            for number in range(4)
        ]
        for run in runs:
            done = self.ended(run, 300)
            self.assertEqual((done.code, done.err), (1, ""))
        found = sorted(re.findall(r" - run(\d)x+ (\d+) failed: no text\n", self.log()))
        self.assertEqual(found, sorted((str(number), str(key)) for number in range(4) for key in range(rows)))
        # What has ended is written again: no more files than runs at one time need.
        before = {name.rstrip(".123456789") for name in self.names()}
        with mock.patch.object(embedgen, "LOG_BYTES", most):
            for number in range(2):
                self.run_program("--database", f"{number}.db")
        self.assertEqual({name.rstrip(".123456789") for name in self.names()}, before)
        self.assertLessEqual(len(before), 4)

    @unittest.skipIf(sys.platform == "win32", "the current folder cannot be removed there")
    def test_the_report_names_the_log_that_is_written(self) -> None:
        self.make_movies(40)
        self.ollama.configure(hang=["Film"])
        first = self.start_program()
        self.wait_for(lambda: self.asked(), "the first run's first request")
        self.make_failing_rows(self.folder / "other.db", 3)
        done = self.run_program("--database", "other.db")
        self.assertIn(f"Detailed logs: {os.path.join('logs', 'generate_embeddings_async.2.log')}\n", done.out)
        self.end(first)
        done = self.run_program("--database", "other.db")
        self.assertIn(f"Detailed logs: {os.path.join('logs', 'generate_embeddings_async.log')}\n", done.out)


if __name__ == "__main__":
    unittest.main()
