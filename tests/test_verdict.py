"""A run gives one verdict, once, and for what really happened: exit code, standard output and the log agree."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sqlite3
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from tests.databases import Postgres
from tests.ollama import blob
from tests.support import Case, Finished, OnPostgres

NOMIC = "nomic-embed-text"
MANY = 100  # rows


class VerdictCase(Case):
    engine: ClassVar[str] = "async"

    def arguments(self, *given: object, **constants: object) -> list[str]:
        return super().arguments("--engine", self.engine, *given, **constants)

    def run_until(self, words: str, then: Callable[[], object], *given: object) -> Finished:
        """Run the program; the first time that it has written certain words, something happens at that very moment."""
        happened: list[bool] = []

        def watch(written: str) -> None:
            if words in written and not happened:
                happened.append(True)
                then()

        done = self.run_here(*given, watch=watch)
        self.assertTrue(happened, done)
        return done

    def index(self) -> list[Any]:
        """Return how the index on the vectors is defined."""
        return self.execute("SELECT indexdef FROM pg_indexes WHERE indexdef LIKE '%hnsw%'")


class AfterTheVerdict(VerdictCase):
    """What happens once the summary is printed changes neither the exit code nor what was said."""

    def setUp(self) -> None:
        super().setUp()
        self.fill()

    def fill(self) -> None:
        """Have many films, of which only the last one is without its embedding."""
        self.make_movies(1)
        self.succeed()
        text = "Title: Film {0} | Description: What happens in {0}.".format
        self.execute(
            "INSERT INTO movies VALUES (?, ?, ?)",
            [(key, f"Film {key}", f"What happens in {key}.") for key in range(2, MANY + 1)],
        )
        maker, moment = self.execute("SELECT provenance, updated_at FROM movie_embeddings")[0]
        self.execute(
            "INSERT INTO movie_embeddings (movie_id, embedding, model, text_sha256, updated_at, provenance) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            [
                (
                    key,
                    self.db.vector(blob(text(key))),
                    NOMIC,
                    hashlib.sha256(text(key).encode()).digest(),
                    moment,
                    maker,
                )
                for key in range(2, MANY)
            ],
        )

    def lock(self) -> None:
        """Be another program that locks the database for long."""
        blocker = sqlite3.connect(self.database, isolation_level=None)
        self.addCleanup(blocker.close)
        blocker.execute("BEGIN EXCLUSIVE")

    def assert_one_verdict(self, done: Finished) -> None:
        """The run must have ended well, and said so once."""
        self.assertEqual((done.code, done.err), (0, ""), done.out)
        facts = json.loads(done.out)  # one object, and nothing else
        self.assertEqual((facts["exit_code"], facts["generated"]), (0, 1))

    def test_a_lock_right_after_the_verdict_in_json(self) -> None:
        self.assert_one_verdict(self.run_until('"exit_code"', self.lock, "--json"))

    def test_a_lock_right_after_the_summary(self) -> None:
        done = self.run_until("Generator Completed", self.lock)
        self.assertEqual((done.code, done.err), (0, ""))
        self.assertEqual(done.out.count("Generator Completed"), 1)
        self.assertNotIn("Stopped", done.out)
        self.assertEqual(done.tally, (1, MANY - 1, 0))

    @unittest.skipIf(os.name == "nt", "Windows has no such signals")
    def test_a_signal_right_after_the_verdict(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.execute(f"DELETE FROM movie_embeddings WHERE movie_id = {MANY}")
            interrupt = functools.partial(os.kill, os.getpid(), number)
            self.assert_one_verdict(self.run_until('"exit_code"', interrupt, "--json"))

    def test_a_log_that_cannot_be_written_after_the_verdict(self) -> None:
        def take_away() -> None:
            for path in (self.folder / "logs").iterdir():
                path.unlink()
                path.mkdir()

        if os.name == "nt":
            self.skipTest("Windows keeps files that are open")
        self.assert_one_verdict(self.run_until('"exit_code"', take_away, "--json"))


class AfterTheVerdictByProcesses(AfterTheVerdict):
    """The same with worker processes."""

    engine = "process"


class AfterTheVerdictOnPostgres(OnPostgres, AfterTheVerdict):
    """The same on Postgres, which may also go away."""

    db: Postgres

    def lock(self) -> None:
        blocker = self.db.psycopg.connect(self.db.url)
        self.addCleanup(blocker.close)
        tables = ", ".join(self.db.tables())
        blocker.execute(f"SET lock_timeout = '60s'; LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE")

    def break_connections(self) -> None:
        """End all connections to the database, and let nobody in for now."""
        name = self.db.name
        with self.db.psycopg.connect(self.db.admin, autocommit=True) as admin:
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            self.addCleanup(self.let_in)
            admin.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")

    def let_in(self) -> None:
        with self.db.psycopg.connect(self.db.admin, autocommit=True) as admin:
            admin.execute(f"ALTER DATABASE {self.db.name} ALLOW_CONNECTIONS true")

    def test_connections_lost_right_after_the_verdict(self) -> None:
        self.assert_one_verdict(self.run_until('"exit_code"', self.break_connections, "--json"))


class AfterTheVerdictOnPostgresByProcesses(AfterTheVerdictOnPostgres):
    """The same with worker processes."""

    engine = "process"


class NothingToIndex(OnPostgres, VerdictCase):
    """--index where there is nothing to build one from: the verdict is that of the rows."""

    def give_nothing_to_index(self, *flags: object, code: int = 0) -> None:
        """Run with --index; what ends is a run over rows, with the summary, and without another word."""
        done = self.run_program(*flags, "--index")
        self.assertEqual((done.code, done.err), (code, ""), done.out)
        self.assertEqual(done.out.count("Generator Completed"), 1)
        self.assertNotIn("fault of embedgen", self.log())
        quiet = self.run_program(*flags, "--index", "--json")
        self.assertEqual((quiet.code, quiet.err, json.loads(quiet.out)["exit_code"]), (code, "", code))

    def tearDown(self) -> None:
        """Whatever was there, the index is built as soon as there is something to build it from."""
        self.ollama.configure(refuse=[], models={NOMIC: {}})
        self.execute("INSERT INTO movies VALUES (100, 'Something', 'at last')")
        self.assertEqual(self.run_program("--index", "--where", "id = 100").code, 0)
        self.assertEqual(len(self.index()), 1)
        super().tearDown()

    def test_an_empty_table(self) -> None:
        self.make_movies(0)
        self.give_nothing_to_index()

    def test_a_limit_of_none(self) -> None:
        self.make_movies(3)
        self.give_nothing_to_index("--limit", 0)

    def test_a_limit_of_none_with_force(self) -> None:
        self.make_movies(3)
        self.give_nothing_to_index("--limit", 0, "--force")

    def test_a_condition_that_no_row_fulfils(self) -> None:
        self.make_movies(3)
        self.give_nothing_to_index("--where", "id > 3")

    def test_rows_without_text(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT, overview TEXT)")
        self.execute("INSERT INTO movies VALUES (1, '', NULL), (2, ' ', '')")
        self.give_nothing_to_index(code=1)

    def test_rows_that_all_fail(self) -> None:
        self.make_movies(3)
        self.ollama.configure(refuse=[{"contains": "Film", "status": 400, "error": "no"}])
        self.give_nothing_to_index(code=1)

    def test_rows_that_are_all_left_out(self) -> None:
        self.make_movies(3)
        self.ollama.configure(models={NOMIC: {"context": 6}})
        self.give_nothing_to_index("--on-long", "skip")

    def test_a_target_that_is_empty(self) -> None:
        self.make_movies(3)
        self.succeed()
        self.execute("DELETE FROM movie_embeddings")
        self.give_nothing_to_index("--limit", 0)

    def test_a_target_whose_rows_are_gone(self) -> None:
        self.make_movies(3)
        self.succeed()
        self.execute("DELETE FROM movies")
        self.give_nothing_to_index()


class NothingToIndexByProcesses(NothingToIndex):
    """The same with worker processes."""

    engine = "process"


class BrokenHashes(VerdictCase):
    """What goes wrong in the function by which SQLite hashes texts."""

    def setUp(self) -> None:
        super().setUp()
        self.make_movies(5)
        self.succeed()

    def run_with(self, happen: Callable[[], object]) -> Finished:
        """Run the program; something happens when the text of film 3 is to be hashed."""
        real = hashlib.sha256

        def sha256(data: bytes = b"", **more: Any) -> Any:
            if b"Title: Film 3 " in data:
                happen()
            return real(data, **more)

        with mock.patch("hashlib.sha256", sha256):
            return self.run_program()

    def test_an_error_is_no_interrupt(self) -> None:
        for error in (ValueError("odd"), RecursionError("odd"), OSError(5, "odd")):
            with self.subTest(error):
                done = self.run_with(mock.Mock(side_effect=error))
                self.assertEqual(done.code, 3, done)
                self.assertRegex(done.err, r"\Aerror: .+\n\Z")
                self.assertNotIn("Traceback", done.err)
                self.assertIn("odd", done.err + self.log())
                self.assertNotIn("ended at once by a signal", self.log())
        self.assert_complete()

    @unittest.skipIf(os.name == "nt", "Windows has no such signals")
    def test_an_interrupt_is_one(self) -> None:
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with self.subTest(number):
                done = self.run_with(functools.partial(os.kill, os.getpid(), number))
                self.assertEqual((done.code, done.err), (code, ""))
        self.assert_complete()


class BrokenTexts(VerdictCase):
    """What goes wrong in a database while it reads a text."""

    def test_a_view_that_cannot_be_read(self) -> None:
        self.make_movies(3)
        self.succeed()
        broken = "json('{' || id)" if self.db.schema == "main" else "(1 / (id - id))::text"
        self.execute(f"CREATE VIEW broken AS SELECT id, title, {broken} AS overview FROM movies")
        flags = ("--table", "broken", "--id", "id", "--target", "movie_embeddings")
        self.refuse(3, *flags, words=["JSON" if self.db.schema == "main" else "division by zero"])
        self.assert_complete()


class BrokenTextsOnPostgres(OnPostgres, BrokenTexts):
    """The same on Postgres."""


class NoFaultOfOurs(VerdictCase):
    """What is the user's to mend is in the log as one line, and no traceback makes it look like a fault of ours."""

    def refuse_in_one_line(self, code: int, *given: object, words: list[str]) -> None:
        """Run the program; it must be refused, with the same sentence on standard error and in the log."""
        said = self.refuse(code, *given, words=words)
        log = self.log()
        self.assertNotIn("Traceback", log)
        self.assertIn(said.removeprefix("error: ").strip(), log)

    def file(self, name: str, text: str) -> Path:
        """Write a file to be loaded."""
        path = self.folder / name
        path.write_text(text, "utf-8")
        return path

    def test_a_file_with_a_row_that_does_not_fit(self) -> None:
        self.make_movies(1)
        for name, text, word in (
            ("few.csv", "id,title,overview\n2,Film 2,x\n3,Film 3,x,too many\n", "few.csv"),
            ("none.csv", "id,title,overview\n", "none.csv"),
            ("nokey.csv", "id,title,overview\n2,Film 2,x\n,Film 3,x\n", "nokey.csv"),
            ("other.csv", "id,name\n2,Film 2\n", '"name"'),
            ("bad.jsonl", '{"id": 2, "title": "Film 2"}\n{"id": 3, "title": \n', "bad.jsonl"),
            ("notes.txt", "nothing", "notes.txt"),
        ):
            with self.subTest(name):
                self.refuse_in_one_line(2, "--load", self.file(name, text), words=[word])
        self.assertEqual(self.execute("SELECT count(*) FROM movies"), [(1,)])


class NoFaultOfOursOnPostgres(OnPostgres, NoFaultOfOurs):
    """The same on Postgres, which checks more."""

    db: Postgres

    def test_a_value_that_the_column_does_not_take(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT, year INTEGER)")
        path = self.file("movies.csv", "id,title,year\n1,Film 1,1999\n2,Film 2,soon\n")
        self.refuse_in_one_line(2, "--load", path, words=["movies.csv", "soon"])
        self.assertEqual(self.execute("SELECT count(*) FROM movies"), [(0,)])

    def test_another_run_is_under_way_with_another_version(self) -> None:
        self.make_movies(5)
        self.ollama.configure(models={NOMIC: {"digest": "sha256:aaaa"}}, hold=["Film"])
        first = self.start_program(CLAIM_SECONDS=300.0)
        self.wait_for(lambda: "Film 1 " in " ".join(self.ollama.texts()), "the first run's request")
        self.ollama.configure(models={NOMIC: {"digest": "sha256:bbbb"}})
        self.refuse_in_one_line(3, words=["aaaa", "bbbb"])
        self.ollama.configure(models={NOMIC: {"digest": "sha256:aaaa"}}, hold=[])
        self.assertEqual(self.ended(first).code, 0)
        self.assert_complete()

    def test_a_role_that_may_not_see_all_cannot_prune(self) -> None:
        self.make_movies(3)
        self.succeed()
        with self.db.role("GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}") as url:
            self.execute("ALTER TABLE movies ENABLE ROW LEVEL SECURITY")
            self.execute("CREATE POLICY part ON movies USING (id = 1)")
            done = self.run_program("--database", url, "--prune")
        self.assertEqual(done.code, 3, done)
        self.assertNotIn("Traceback", done.err)
        self.assertEqual(len(self.stored()), 3)


if __name__ == "__main__":
    unittest.main()
