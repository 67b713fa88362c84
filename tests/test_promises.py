"""Promises about a run under way: it keeps nobody waiting, and what is known is not found out again."""

from __future__ import annotations

import unittest
from typing import Any, ClassVar

from tests.databases import Postgres
from tests.support import FULL, Case, OnPostgres

NOMIC = "nomic-embed-text"


class UnderWay(Case):
    """While the server takes its time, the database is everybody's."""

    engine: ClassVar[str] = "async"

    def setUp(self) -> None:
        super().setUp()
        self.make_movies(40)
        self.succeed("--limit", 10)
        self.ollama.configure(hold=[f"Film {key}" for key in range(20, 30)])
        self.process = self.start_program("--engine", self.engine, "--batch-size", 2)
        self.wait_for(lambda: "Film 20 |" in " ".join(self.ollama.texts()), "a request that is held")

    def finish(self) -> None:
        """Let the server answer; the run must end well."""
        self.ollama.configure(hold=[])
        done = self.ended(self.process)
        self.assertEqual((done.code, done.err), (0, ""), done.out)

    def test_others_write_meanwhile(self) -> None:
        self.execute("UPDATE movies SET overview = 'New' WHERE id = 30")
        self.execute("INSERT INTO movies VALUES (41, 'Late', 'x')")
        self.execute("DELETE FROM movies WHERE id = 29")
        self.finish()
        self.assertEqual(self.succeed().tally[2], 0)
        self.assert_complete_but_orphans()

    def assert_complete_but_orphans(self) -> None:
        """Every row must have its vector; that of one deleted meanwhile may be there where nothing removes it."""
        expected, stored = self.expected(), self.stored()
        self.assertEqual({key: stored.get(key) for key in expected}, expected)

    def test_a_row_changed_while_its_text_is_embedded(self) -> None:
        self.execute("UPDATE movies SET overview = 'New' WHERE id = 20")
        self.finish()
        self.succeed()
        self.assert_complete()


class UnderWayByProcesses(UnderWay):
    """The same with worker processes."""

    engine = "process"


class UnderWayOnPostgres(OnPostgres, UnderWay):
    """The same on Postgres, where transactions can be seen."""

    db: Postgres

    def is_idle(self) -> bool:
        """Whether the program is connected, and has neither a transaction nor a lock."""
        found = self.execute(
            "SELECT state, xact_start, (SELECT count(*) FROM pg_locks l WHERE l.pid = a.pid) FROM pg_stat_activity a "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        return bool(found) and set(found) == {("idle", None, 0)}

    def test_no_transaction_is_open(self) -> None:
        self.wait_for(self.is_idle, "neither a transaction nor a lock")
        self.finish()
        self.assert_complete()

    def test_locks_are_not_in_the_way_of_a_new_column(self) -> None:
        with self.db.psycopg.connect(self.db.url) as other:
            other.execute("SET lock_timeout = '60s'")
            other.execute("ALTER TABLE movies ADD COLUMN added integer")
        self.finish()
        self.assert_complete()


@unittest.skipUnless(FULL, "the engine and the database are each tested with the other of either")
class UnderWayOnPostgresByProcesses(UnderWayOnPostgres):
    """The same with worker processes."""

    engine = "process"


class KnownToAll(Case):
    """What one request has found out about a server, no worker finds out again."""

    engine: ClassVar[str] = "async"

    def run_with(self, **settings: Any) -> list[dict[str, Any]]:
        """Run over 200 films with four requests in flight, and return the requests that had their texts."""
        self.make_movies(200)
        self.ollama.configure(**settings)
        self.succeed("--engine", self.engine, "--concurrent", 4, "--batch-size", 8)
        self.assert_complete()
        return [entry for entry in self.ollama.log() if "Film" in " ".join(entry["texts"])]

    def test_a_server_without_the_leaner_path(self) -> None:
        requests = self.run_with(lean=False)
        self.assertEqual({entry["path"] for entry in requests}, {"/api/embed"})

    def test_a_server_without_base64(self) -> None:
        requests = self.run_with(base64=False)
        self.assertEqual({entry["path"] for entry in requests}, {"/api/embed"})


class KnownToAllByProcesses(KnownToAll):
    """The same with worker processes."""

    engine = "process"


class MostTexts(Case):
    """The same of a server that takes so many texts at once and no more."""

    engine: ClassVar[str] = "async"
    path = "/v1"

    def test_it_is_found_out_once(self) -> None:
        self.make_movies(200)
        words = "batch size {given} > maximum allowed batch size {most}"
        self.ollama.configure(most_inputs={"most": 4, "status": 422, "error": words})
        self.succeed("--engine", self.engine, "--concurrent", 4, "--batch-size", 8)
        self.assert_complete()
        refused = [entry for entry in self.ollama.log() if entry["status"] == 422]
        self.assertLessEqual(len(refused), 4)  # those that were in flight with the first one


class MostTextsByProcesses(MostTexts):
    """The same with worker processes."""

    engine = "process"


if __name__ == "__main__":
    unittest.main()
