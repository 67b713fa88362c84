"""What only Postgres has: a table that several machines fill together, roles, restarts, the index."""

from __future__ import annotations

import atexit
import concurrent.futures
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
from array import array
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import embedgen
from tests.databases import LossyProxy, Postgres, postgres_url, start_server, with_database
from tests.ollama import Ollama
from tests.support import ENGINES, FULL, SLOW_ENGINES, Case, Finished, OnPostgres, another_double

ROWS = 5_000 if FULL else 500
SPEED = 400.0 if FULL else 200.0  # texts per second of a usual machine's server
# Claims that last so short that a test need not wait for long, or so long that it would notice who waits for their end.
SHORT = {"CLAIM_SECONDS": 3.0, "RENEWAL_SECONDS": 0.3}
LONG = {"CLAIM_SECONDS": 300.0, "RENEWAL_SECONDS": 0.3}
CUT_ALL = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE application_name = 'embedgen' AND datname = current_database()"
)


class PostgresCase(OnPostgres, Case):
    db: Postgres

    def embedded(self) -> int:
        """Return how many rows have their embedding."""
        if "movie_embeddings" not in self.db.tables():
            return 0
        return int(self.execute("SELECT count(*) FROM movie_embeddings")[0][0])


class Fleet(PostgresCase):
    """Four programs, both engines, each with a server of its own, the last of which is much slower."""

    flags: ClassVar[tuple[str, ...]] = ()

    def setUp(self) -> None:
        super().setUp()
        self.servers = [self.ollama, *map(another_double, (1, 2, 3))]
        for number, server in enumerate(self.servers):
            server.configure(seconds_per_text=(20 if number == 3 else 1) / SPEED, slots=1, hold=["Film"])

    def start_all(self) -> list[subprocess.Popen[bytes]]:
        """Start the four programs, and let their servers answer when all have begun."""
        processes = [
            self.start_program("--engine", ENGINES[number % 2], "--server", server.url, *self.flags, **LONG)
            for number, server in enumerate(self.servers)
        ]
        for server in self.servers:
            self.wait_for(lambda server=server: "Film" in " ".join(server.texts()), "rows for each")
        for server in self.servers:
            server.configure(hold=[])
        return processes

    def end_all(self, processes: list[subprocess.Popen[bytes]]) -> tuple[list[Finished], list[float]]:
        """Return how each program has ended, and when."""

        def ended(process: subprocess.Popen[bytes]) -> tuple[Finished, float]:
            return self.ended(process), time.monotonic()

        with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
            done, moments = zip(*pool.map(ended, processes))
        return list(done), list(moments)

    def asked(self) -> list[str]:
        """Return the texts of rows that the servers were asked for."""
        return [text for server in self.servers for text in server.texts() if "Film" in text]

    def test_each_row_is_embedded_once(self) -> None:
        self.make_movies(ROWS)
        done, ended = self.end_all(self.start_all())
        for one in done:
            self.assertEqual((one.code, one.err), (0, ""), one.out)
            self.assertEqual(sum(one.tally), ROWS)
        self.assert_complete()
        asked = self.asked()
        self.assertEqual(len(set(asked)), ROWS)
        # A machine that comes when others have begun embeds a few of their rows again to compare them.
        self.assertLessEqual(len(asked), ROWS * 1.01)
        generated = [one.tally[0] for one in done]
        self.assertEqual(sum(generated), ROWS)
        self.assertLess(generated[3], sum(generated[:3]) / 3)
        # The slow one's last requests, at most; who waited for a claim to expire would take five minutes.
        self.assertLess(max(ended) - min(ended), 200.0)

    @unittest.skipUnless(FULL, "two machines show it, too")
    def test_failures_are_known_to_all(self) -> None:
        self.make_movies(400, lambda key: "Poison" if key % 50 == 7 else f"Film {key}")
        for server in self.servers:
            server.configure(refuse=[{"contains": "Poison", "status": 400, "error": "no"}])
        for done in map(self.ended, self.start_all()):
            self.assertEqual((done.code, done.err), (1, ""), done.out)
            self.assertEqual(sum(done.tally), 400)
            self.assertEqual(done.tally[2], 8)
        self.assert_complete(but=range(7, 400, 50))


class FleetByForce(Fleet):
    """The same where all rows are to be embedded again."""

    flags = ("--force",)

    def make_movies(self, count: int, *title: Any) -> None:
        super().make_movies(count, *title)
        vectors = [(key, self.db.vector(bytes(31) + b"?")) for key in range(1, count + 1)]
        self.execute("CREATE TABLE movie_embeddings (movie_id bigint PRIMARY KEY, embedding vector(8))")
        self.execute("INSERT INTO movie_embeddings VALUES (?, ?)", vectors)

    test_failures_are_known_to_all = None  # their old vectors stay


class Machines(PostgresCase):
    """Two machines, each with a server of its own, and their 40 rows; what each server is asked for can be held."""

    engine: ClassVar[str] = "async"

    def setUp(self) -> None:
        super().setUp()
        self.other = another_double()
        self.make_movies(40)

    def machine(self, server: Ollama, *flags: object, path: str = "", **constants: object) -> subprocess.Popen[bytes]:
        """Start a machine that works with a server, under a path of its address."""
        return self.start_program(
            "--server", server.url + path, "--batch-size", 2, "--concurrent", 2, *flags, **{**LONG, **constants}
        )

    def asked_of(self, *servers: Ollama) -> list[str]:
        """Return the texts of rows that servers were asked for."""
        return [text for server in servers for text in server.texts() if "Title: " in text]

    def start_held(self, server: Ollama, *flags: object, **constants: Any) -> subprocess.Popen[bytes]:
        """Start a machine, and wait until it waits for the vectors of rows."""
        server.configure(hold=["Film"])
        process = self.machine(server, *flags, **constants)
        self.wait_for(lambda: len(self.asked_of(server)) == 4, "two requests")
        return process

    def let_go(self, *servers: Ollama) -> None:
        """Let servers answer."""
        for server in servers:
            server.configure(hold=[])

    def claims(self, condition: str = "true") -> int:
        """Return how many rows are claimed."""
        sql = f"SELECT count(*) FROM movie_embeddings_claims WHERE movie_id IS NOT NULL AND {condition}"
        return int(self.execute(sql)[0][0])

    def wait_for_the_rest(self, rows: int = 40) -> None:
        """Wait until all rows are done but those that are claimed."""
        self.wait_for(lambda: self.embedded() and self.embedded() + self.claims() == rows, "the rest of the rows")

    def assert_ended(self, process: subprocess.Popen[bytes], failed: int = 0, rows: int = 40) -> Finished:
        """A machine must end by itself, and account for each row once."""
        done = self.ended(process)
        self.assertEqual((done.code, done.err), (1 if failed else 0, ""), done.out)
        self.assertEqual((sum(done.tally), done.tally[2]), (rows, failed))
        return done

    def assert_once(self, *servers: Ollama) -> None:
        """Each row must have its vector, after its text was asked for once, and no claim must be left."""
        self.assert_complete()
        asked = self.asked_of(*servers)
        self.assertEqual(sorted(asked), sorted(set(asked)))

    def bury(self) -> None:
        """Have a later run, which removes what a killed machine has left of its job."""
        sql = "SELECT 1 FROM movie_embeddings_claims WHERE now() < expires AND expires < 'infinity'"
        self.wait_for(lambda: not self.execute(sql), "the end of the last sign of life")
        self.execute("INSERT INTO movies VALUES (99, 'Another', 'x')")
        self.succeed("--server", another_double(2).url, "--where", "id = 99")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """End a machine as a power cut would."""
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def test_each_row_is_embedded_once(self) -> None:
        both = [self.start_held(self.ollama), self.start_held(self.other)]
        self.let_go(self.ollama, self.other)
        done = [self.assert_ended(process) for process in both]
        self.assertEqual(sum(one.tally[0] for one in done), 40)
        self.assert_once(self.ollama, self.other)
        self.assertEqual(len(self.asked_of(self.ollama, self.other)), 40)

    def test_with_force_each_row_is_embedded_once_together(self) -> None:
        self.succeed()
        self.ollama.reset()
        both = [self.start_held(self.ollama, "--force"), self.start_held(self.other, "--force")]
        self.let_go(self.ollama, self.other)
        done = [self.assert_ended(process) for process in both]
        self.assertEqual(sum(one.tally[0] for one in done), 40)
        self.assert_once(self.ollama, self.other)
        self.assertEqual(len(self.asked_of(self.ollama, self.other)), 40)

    def test_with_force_vectors_stay_whose_server_tells_no_digest(self) -> None:
        self.succeed()
        self.ollama.reset()
        self.other.configure(api=False)
        both = [self.start_held(self.ollama, "--force"), self.start_held(self.other, "--force", path="/v1")]
        self.let_go(self.ollama, self.other)
        done = [self.assert_ended(process) for process in both]
        self.assertEqual(sum(one.tally[0] for one in done), 40)
        self.assert_once(self.ollama, self.other)

    def test_with_force_what_another_has_made_by_the_new_model_counts_once(self) -> None:
        self.succeed()
        self.ollama.configure(hold=["Film 40"])
        force = "--force", "--model", "all-minilm"
        first = self.machine(self.ollama, *force)
        made = "SELECT count(*) FROM movie_embeddings WHERE model = 'all-minilm'"
        self.wait_for(lambda: self.execute(made)[0][0] >= 38, "the rows that are not held, with the batch of the last")
        second = self.machine(self.other, *force)
        here = "SELECT count(*) FROM movie_embeddings_claims WHERE movie_id IS NULL"
        self.wait_for(lambda: self.execute(here) == [(2,)], "both")
        signs = "SELECT min(expires), max(expires) FROM movie_embeddings_claims WHERE movie_id IS NULL"
        began = self.execute(signs)[0][1]
        self.wait_for(lambda: self.execute(signs)[0][0] > began, "both at work")
        os.kill(second.pid, signal.SIGINT)
        done = self.ended(second)
        self.assertEqual((done.code, done.tally[0], done.tally[2]), (130, 0, 0))
        self.assertIn(done.tally[1], (38, 39))
        self.let_go(self.ollama)
        self.assertEqual(self.assert_ended(first).tally, (40, 0, 0))

    def test_one_that_is_killed_leaves_its_rows_to_the_other(self) -> None:
        self.assertLessEqual(embedgen.CLAIM_SECONDS + 2 * embedgen.RENEWAL_SECONDS, 10.0)  # as is promised
        first = self.start_held(self.ollama, **SHORT)
        second = self.machine(self.other, **SHORT)
        self.wait_for_the_rest()
        self.kill(first)
        self.assertEqual(self.assert_ended(second).tally[0], 40)
        self.bury()
        self.assert_once(self.other)

    def test_one_that_is_interrupted_gives_its_rows_back_at_once(self) -> None:
        first = self.start_held(self.ollama, GRACE=0.1)
        second = self.machine(self.other)
        self.wait_for_the_rest()
        os.kill(first.pid, signal.SIGINT)
        done = self.ended(first)
        self.assertEqual((done.code, done.err), (130, ""))
        self.assertEqual(self.assert_ended(second).tally[0], 40)
        self.assert_once(self.other)

    def test_one_that_was_asleep_finds_all_done(self) -> None:
        first = self.start_held(self.ollama, **SHORT)
        os.killpg(first.pid, signal.SIGSTOP)
        self.assertEqual(self.assert_ended(self.machine(self.other, **SHORT)).tally[0], 40)
        self.let_go(self.ollama)
        os.killpg(first.pid, signal.SIGCONT)
        self.assert_ended(first)
        self.assert_once(self.other)
        self.assertEqual(len(self.asked_of(self.ollama)), 4)

    def start_one_asleep(self) -> tuple[Any, Any]:
        """Return a machine that is asleep, and another that has taken over its rows and waits for their vectors."""
        first = self.start_held(self.ollama, **SHORT)
        os.killpg(first.pid, signal.SIGSTOP)
        self.other.configure(hold=self.asked_of(self.ollama))
        second = self.machine(self.other, **SHORT)
        self.wait_for(lambda: len(self.asked_of(self.other)) == 40 and self.embedded() == 36, "the sleeper's rows, too")
        return first, second

    def test_one_that_was_asleep_finds_its_rows_with_another(self) -> None:
        first, second = self.start_one_asleep()
        self.let_go(self.ollama)
        os.killpg(first.pid, signal.SIGCONT)
        self.wait_for(lambda: self.embedded() == 40, "the sleeper's rows from itself")
        self.let_go(self.other)
        self.assert_ended(first)
        self.assert_ended(second)
        self.assert_once(self.other)
        self.assertEqual(len(self.asked_of(self.ollama)), 4)

    def test_what_comes_back_while_it_is_embedded_is_not_embedded_twice(self) -> None:
        first, second = self.start_one_asleep()
        self.kill(second)
        os.killpg(first.pid, signal.SIGCONT)
        self.let_go(self.ollama)
        self.assertEqual(self.assert_ended(first).tally, (4, 36, 0))
        self.bury()
        self.assert_once(self.ollama)

    def start_with_poison(self, **constants: object) -> subprocess.Popen[bytes]:
        """Start a machine which knows that the first four rows fail, and waits for the next ones."""
        self.execute("UPDATE movies SET title = 'Poison' || id WHERE id <= 4")
        for server in (self.ollama, self.other):
            server.configure(refuse=[{"contains": "Poison", "status": 400, "error": "no"}])
        self.ollama.configure(hold=["Film"])
        process = self.machine(self.ollama, **constants)
        self.wait_for(lambda: "movie_embeddings_claims" in self.db.tables() and self.claims("failed") == 4, "failures")
        return process

    def assert_untouched(self) -> None:
        """What has failed on one machine must not be tried by the other, and have no vector."""
        self.assertEqual([text for text in self.asked_of(self.other) if "Poison" in text], [])
        self.assert_complete(but=range(1, 5))

    def test_rows_that_failed_are_not_tried_by_the_other_and_count_for_both(self) -> None:
        first = self.start_with_poison()
        second = self.machine(self.other)
        self.wait_for(lambda: self.embedded() >= 30, "the rest of the rows")
        self.let_go(self.ollama)
        self.assert_ended(first, failed=4)
        self.assert_ended(second, failed=4)
        self.assert_untouched()
        # The next run is another job, which tries them anew.
        self.ollama.configure(refuse=[])
        self.assertEqual(self.succeed().tally, (4, 36, 0))

    def test_failures_of_one_that_is_killed_count(self) -> None:
        first = self.start_with_poison(**SHORT)
        second = self.start_held(self.other, **SHORT)
        self.kill(first)
        self.let_go(self.other)
        self.assert_ended(second, failed=4)
        self.bury()
        self.assert_untouched()

    def test_failures_of_one_that_is_interrupted_count(self) -> None:
        first = self.start_with_poison()
        second = self.start_held(self.other)
        self.let_go(self.ollama)
        os.kill(first.pid, signal.SIGTERM)
        self.assertEqual(self.ended(first).code, 143)
        self.let_go(self.other)
        self.assert_ended(second, failed=4)
        self.assert_untouched()

    def test_one_that_comes_late_looks_at_the_beginning_too(self) -> None:
        first = self.start_held(self.ollama)
        self.execute("INSERT INTO movies VALUES (-1, 'Before the first', 'x')")
        second = self.machine(self.other)
        self.wait_for(lambda: -1 in self.stored(), "the new row")
        self.let_go(self.ollama)
        self.assert_ended(second, rows=41)
        self.ended(first)
        self.assert_once(self.ollama, self.other)

    def test_rows_that_the_other_does_before_one_joins(self) -> None:
        self.ollama.configure(hold=[""])
        first = self.machine(self.ollama)
        self.wait_for(self.ollama.texts, "the handshake, after the rows were counted")
        self.assertEqual(self.assert_ended(self.machine(self.other)).tally, (40, 0, 0))
        self.let_go(self.ollama)
        self.assertEqual(self.assert_ended(first).tally, (0, 40, 0))
        self.assert_complete()

    def test_connections_that_are_cut_lose_nothing(self) -> None:
        both = [self.start_held(self.ollama), self.start_held(self.other)]
        self.execute(CUT_ALL)
        for server in (self.ollama, self.other):
            server.configure(hold=["Film 3", "Film 4"])
        self.wait_for(self.embedded, "the first rows")
        self.execute(CUT_ALL)
        self.let_go(self.ollama, self.other)
        done = [self.assert_ended(process) for process in both]
        self.assertEqual(sum(one.tally[0] for one in done), 40)
        self.assert_once(self.ollama, self.other)

    def test_another_model_at_the_same_time_is_refused(self) -> None:
        first = self.start_held(self.ollama)
        self.refuse(3, "--server", self.other.url, "--model", "all-minilm", words=["nomic-embed-text", "all-minilm"])
        self.let_go(self.ollama)
        self.assert_ended(first)
        self.assert_complete()

    def test_rows_that_failed_in_a_database_without_an_encoding(self) -> None:
        name = f"{self.db.name}_ascii"  # as a server has it that was set up in the locale C
        self.db.url = with_database(self.db.admin, name)
        self.db.flags = ("--database", self.db.url)
        with self.db.psycopg.connect(self.db.admin, autocommit=True) as connection:
            connection.execute(
                f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
            )
        self.addCleanup(self.db.drop)
        self.db.name = name
        self.db.execute("CREATE TABLE movies (id text PRIMARY KEY, title text)")
        self.db.execute("INSERT INTO movies VALUES (convert_from('\\xc3a9', 'SQL_ASCII'), ''), ('b', 'Film b')")
        done = self.run_program()
        self.assertEqual((done.code, done.tally), (1, (1, 0, 1)), done.err)

    def test_one_without_a_place_for_claims_works_alone(self) -> None:
        self.succeed("--limit", 10)
        self.execute("DROP TABLE movie_embeddings_claims")
        grants = ("GRANT SELECT ON movies TO {role}", "GRANT SELECT, INSERT, UPDATE ON movie_embeddings TO {role}")
        with self.db.role(*grants) as url:
            self.assertEqual(self.succeed("--database", url).tally, (30, 10, 0))
        self.assertIn("shares the table with no other", self.log())
        self.assert_complete()


@unittest.skipUnless(FULL, "the engines themselves know nothing of the database")
class MachinesByProcesses(Machines):
    """The same with worker processes."""

    engine = "process"


class LostAnswers(PostgresCase):
    """A connection that breaks when the database has done what it was asked for, but not said so yet."""

    def setUp(self) -> None:
        super().setUp()
        self.make_movies(30, lambda key: "Poison" if key == 17 else f"Film {key}")
        # A save and a sign of life after each request.
        for name, value in {"UNSAVED_SECONDS": 0.0, "RENEWAL_SECONDS": 0.0, "RETRY_SECONDS": 0.0}.items():
            patch = mock.patch.object(embedgen, name, value)
            patch.start()
            self.addCleanup(patch.stop)

    def run_and_lose(self, number: int) -> int:
        """Run over all rows while an answer is lost; return how many there were."""
        self.ollama.reset()
        self.ollama.configure(refuse=[{"contains": "Poison", "status": 400, "error": "no"}])
        self.execute("DROP TABLE IF EXISTS movie_embeddings, movie_embeddings_claims, embedgen_provenance")
        proxy = LossyProxy(self.db.url, number)
        self.addCleanup(proxy.close)
        done = self.run_program("--database", proxy.url, "--batch-size", 10, "--concurrent", 1)
        self.assertEqual((done.code, done.err, done.tally), (1, "", (29, 0, 1)))
        stored, expected = self.stored(), self.expected()
        del expected[17]
        self.assertEqual(stored, expected)
        return proxy.answers

    def test_nothing_is_lost_and_nothing_is_counted_twice(self) -> None:
        last = self.run_and_lose(0)  # about: how many there are depends on the clock, too
        for number in range(1, last + 1, 1 if FULL else 9):
            with self.subTest(number=number, of=last):
                self.run_and_lose(number)


class Neighbours(PostgresCase):
    """Other programs that use the table at the same time."""

    engine: ClassVar[str] = "async"

    def start(self) -> subprocess.Popen[bytes]:
        """Start a run that saves all the time."""
        self.make_movies(600)
        self.ollama.configure(seconds_per_text=0.002, slots=1)
        process = self.start_program("--batch-size", 10, UNSAVED_SECONDS=0.05)
        self.wait_for(self.embedded, "the first rows")
        return process

    def test_updates_do_not_wait_and_are_seen_by_the_next_run(self) -> None:
        process = self.start()
        changed = 0
        while process.poll() is None or changed < 5:
            key = changed * 37 % 600 + 1
            # Raises if it waits for a lock that is not given back at once.
            self.db.execute_with("lock_timeout = '60s'", f"UPDATE movies SET title = 'New' WHERE id = {key}")
            changed += 1
        self.assertEqual(self.ended(process).code, 0)
        self.succeed("--accept-drift")
        self.assert_complete()

    def test_a_deadlock_with_another_program_is_not_the_end(self) -> None:
        self.make_movies(10)
        self.succeed("--limit", 1)
        # As Postgres ends the statement of one of the two; numbers of a sequence are not rolled back with it.
        self.execute("CREATE SEQUENCE deadlocks")
        self.execute("""
            CREATE FUNCTION lock_up() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF nextval('deadlocks') = 1 THEN RAISE deadlock_detected; END IF;
            IF currval('deadlocks') = 2 THEN RAISE serialization_failure; END IF;
            RETURN NULL; END $$
        """)
        self.execute("""
            CREATE TRIGGER lock_up AFTER INSERT ON movie_embeddings FOR EACH STATEMENT EXECUTE FUNCTION lock_up()
        """)
        done = self.succeed("--limit", 5)
        self.assertEqual(done.tally, (5, 1, 0))
        self.execute("DROP TRIGGER lock_up ON movie_embeddings")
        self.succeed()
        self.assert_complete()

    def test_rows_deleted_under_way_leave_nothing(self) -> None:
        process = self.start()
        key = 1
        while process.poll() is None and key < 300:
            self.db.execute_with("lock_timeout = '60s'", f"DELETE FROM movies WHERE id IN ({key}, {600 - key})")
            key += 2
        self.assertEqual(self.ended(process).code, 0)
        self.assert_complete()

    def test_who_reads_all_tables_for_hours_keeps_no_run_from_its_end(self) -> None:
        self.make_movies(5)
        self.succeed()
        self.execute("INSERT INTO movies VALUES (6, 'Film 6', 'x')")
        with self.db.psycopg.connect(self.db.url) as reader:  # as pg_dump does
            reader.execute("SELECT * FROM movie_embeddings_claims")
            done = self.ended(self.start_program())
        self.assertEqual((done.code, done.err, done.tally), (0, "", (1, 5, 0)))

    def test_a_connection_that_is_cut_is_made_again(self) -> None:
        process = self.start()
        for part in (1, 200, 400):
            self.wait_for(lambda part=part: self.embedded() >= part, "progress")
            self.execute(CUT_ALL)
        done = self.ended(process)
        self.assertEqual((done.code, done.err, sum(done.tally)), (0, "", 600))
        self.assert_complete()
        asked = [text for text in self.ollama.texts() if "Film" in text]
        self.assertEqual((len(asked), len(set(asked))), (600, 600))


@unittest.skipUnless(FULL, "the engines themselves know nothing of the database")
class NeighboursByProcesses(Neighbours):
    """The same with worker processes."""

    engine = "process"


class Addresses(PostgresCase):
    """Where there is no database, or no driver."""

    def test_no_database_at_that_address(self) -> None:
        self.refuse(3, "--database", "postgresql://user:secret@127.0.0.1:1/x", words=["127.0.0.1", "refused"])
        other = self.db.url.replace(self.db.name, "no_such_database")
        self.refuse(3, "--database", other, words=["no_such_database"])
        for code, url in [
            (2, "postgresql://user:secret@host/x?nonsense=1"),
            (2, "postgresql://user:secret@[host/x"),
            (3, "postgresql://user:secret@host:port/x"),
        ]:
            with self.subTest(url=url):
                self.assertNotIn("secret", self.refuse(code, "--database", url))

    def test_without_psycopg(self) -> None:
        with mock.patch.dict("sys.modules", {"psycopg": None}):
            self.refuse(3, words=['pip install "psycopg[binary]"'])

    def test_a_source_that_may_only_be_read(self) -> None:
        self.make_movies(30)
        self.execute("CREATE SCHEMA vectors")
        self.addCleanup(self.execute, "DROP SCHEMA vectors CASCADE")
        with self.db.role("GRANT SELECT ON movies TO {role}", "GRANT ALL ON SCHEMA vectors TO {role}") as url:
            self.refuse(3, "--database", url, words=["permission denied", "public"])
            flags = ("--database", url, "--target", "vectors.films")
            self.assertEqual(self.succeed(*flags).tally, (30, 0, 0))
            self.assertEqual(self.succeed(*flags).tally, (0, 30, 0))
            self.assertEqual(self.execute("SELECT count(*) FROM vectors.films"), [(30,)])
            self.execute(f"REVOKE SELECT ON movies FROM {self.db.name}_role")
            self.refuse(3, *flags, words=["movies", "SELECT"])


@functools.lru_cache(None)
def own_server() -> tuple[Any, str]:
    """Return a Postgres server that only these tests use, and its URL."""
    data = tempfile.mkdtemp(prefix="embedgen-pg-")
    server = start_server(data)
    atexit.register(shutil.rmtree, data, ignore_errors=True)
    atexit.register(server.cleanup)
    return server, str(server.get_uri())


class Restarts(Case):
    """A Postgres of its own, which can be stopped at once, as by `pg_ctl restart -m immediate`."""

    engine: ClassVar[str] = "async"

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        postgres_url()  # skips where there is none
        cls.server, cls.url = own_server()

    def open_database(self) -> None:
        with mock.patch.dict("tests.databases.SERVER", {"url": self.url}):
            self.db = Postgres(self.folder)

    def setUp(self) -> None:
        super().setUp()
        self.make_movies(600)

    def restart(self) -> None:
        """Restart the server without a checkpoint, as after a crash."""
        pid = self.server.get_pid()
        os.kill(pid, signal.SIGQUIT)
        self.wait_for(lambda: has_ended(pid), "the server's end")
        self.server.ensure_postgres_running()

    def count(self) -> int:
        """Return how many rows have their embedding."""
        if "movie_embeddings" not in self.db.tables():
            return 0
        return int(self.execute("SELECT count(*) FROM movie_embeddings")[0][0])

    def test_a_restart_in_mid_run(self) -> None:
        self.ollama.configure(seconds_per_text=0.003, slots=1)
        process = self.start_program()
        for part in (1, 250):
            self.wait_for(lambda part=part: self.count() >= part, "progress")
            self.restart()
        done = self.ended(process)
        self.assertEqual((done.code, done.err, sum(done.tally)), (0, "", 600))
        self.assert_complete()

    def test_a_restart_takes_no_rows_from_machines(self) -> None:
        """Who could not give a sign of life, since there was no database, is not taken for dead."""
        other = another_double()
        for server in (self.ollama, other):
            server.configure(hold=["Film"])
        flags = ("--batch-size", 10, "--server")
        both = [self.start_program(*flags, server.url, CLAIM_SECONDS=60.0) for server in (self.ollama, other)]
        for server in (self.ollama, other):
            self.wait_for(lambda server=server: "Film" in " ".join(server.texts()), "rows for both")
        for process in both:
            os.killpg(process.pid, signal.SIGSTOP)  # or one might renew its claims, or take the other's, right now
        self.execute("UPDATE movie_embeddings_claims SET expires = now() - interval '1 s'")
        self.restart()
        for process in both:
            os.killpg(process.pid, signal.SIGCONT)
        for server in (self.ollama, other):
            server.configure(hold=[])
        for done in map(self.ended, both):
            self.assertEqual((done.code, done.err, sum(done.tally)), (0, "", 600))
        self.assert_complete()
        asked = [text for text in self.ollama.texts() + other.texts() if "Film" in text]
        self.assertEqual((len(asked), len(set(asked))), (600, 600))


@unittest.skipUnless(FULL, "the engines themselves know nothing of the database")
class RestartsByProcesses(Restarts):
    """The same with worker processes."""

    engine = "process"
    test_a_restart_takes_no_rows_from_machines = None


def has_ended(pid: int) -> bool:
    """Whether a process has ended, even if it still waits to be buried."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


class Targets(PostgresCase):
    """Columns and indexes for vectors."""

    def test_other_dimensions_are_noticed_before_a_row_is_read(self) -> None:
        self.make_movies(5)
        self.execute("CREATE TABLE movie_embeddings (movie_id bigint PRIMARY KEY, embedding vector(768))")
        for engine in ENGINES:
            self.refuse(3, "--engine", engine, words=["768", "8 dimensions"])
        self.assertEqual([text for text in self.ollama.texts() if "Film" in text], [])
        self.assertEqual(self.db.types("movie_embeddings")["embedding"][0], "vector(768)")
        self.execute("INSERT INTO movie_embeddings VALUES (1, array_fill(1, ARRAY[768])::vector)")
        self.refuse(3, "--force", words=["--target", "if the column takes"])  # which --force alone does not change

    def test_half_precision(self) -> None:
        self.make_movies(40)
        self.execute("CREATE TABLE movie_embeddings (movie_id bigint PRIMARY KEY, embedding halfvec(8), "
                     "model text, text_sha256 bytea)")  # fmt: skip
        self.assertEqual(self.succeed("--limit", 20).tally, (20, 0, 0))
        self.assertEqual(self.succeed("--index").tally, (20, 20, 0))
        expected = self.expected()
        for key, stored in self.stored().items():
            for one, other in zip(array("f", stored), array("f", expected[key])):
                self.assertAlmostEqual(one, other, places=3)
        self.assertIn("halfvec_cosine_ops", self.index())

    def test_a_column_without_dimensions(self) -> None:
        self.make_movies(10)
        self.execute("CREATE TABLE movie_embeddings (movie_id bigint PRIMARY KEY, embedding vector)")
        self.assertEqual(self.succeed().tally, (10, 0, 0))
        self.assert_complete()
        self.refuse(2, "--index", words=["dimensions", "ALTER TABLE"])

    def test_a_column_of_another_type(self) -> None:
        self.make_movies(3)
        self.execute("CREATE TABLE movie_embeddings (movie_id bigint PRIMARY KEY, embedding real[])")
        self.refuse(2, words=["real[]", "vector"])

    def drop_extension(self) -> None:
        """Have no pgvector in the database until the test's end."""
        self.execute("DROP EXTENSION vector")
        self.addCleanup(self.execute, "CREATE EXTENSION vector SCHEMA extensions")
        self.addCleanup(self.execute, "DROP EXTENSION IF EXISTS vector CASCADE")

    def test_the_extension_is_created(self) -> None:
        self.make_movies(3)
        self.drop_extension()
        self.assertEqual(self.succeed().tally, (3, 0, 0))
        self.assertEqual(self.execute("SELECT extname FROM pg_extension WHERE extname = 'vector'"), [("vector",)])

    def test_an_extension_that_cannot_be_created(self) -> None:
        self.make_movies(3)
        self.drop_extension()
        with self.db.role("GRANT SELECT ON movies TO {role}", "GRANT CREATE ON SCHEMA public TO {role}") as url:
            self.refuse(3, "--database", url, words=["pgvector", "CREATE EXTENSION vector;", "administrator"])

    def index(self) -> str:
        """Return how the index is defined."""
        sql = "SELECT indexdef FROM pg_indexes WHERE tablename = 'movie_embeddings' AND indexdef LIKE '%hnsw%'"
        return "".join(row[0] for row in self.execute(sql))

    def test_the_index(self) -> None:
        self.make_movies(50)
        done = self.succeed("--index")
        self.assertIn("Building the index: 100%", done.out)
        self.assertIn(
            "USING hnsw (embedding extensions.vector_cosine_ops)",
            self.index().replace("(embedding vector_", "(embedding extensions.vector_"),
        )
        self.assertNotIn("Building", self.succeed("--index").out)
        name = "'movie_embeddings_embedding_hnsw'::regclass"
        # One that a broken build has left is built anew.
        self.execute(f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = {name}")
        self.assertIn("Building the index: 100%", self.succeed("--index").out)
        self.assertEqual(self.execute(f"SELECT indisvalid FROM pg_index WHERE indexrelid = {name}"), [(True,)])

    def test_an_interrupt_while_the_index_is_built(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                self.wipe()
                self.make_movies(20)
                self.succeed("--limit", 19)
                blocker = self.db.psycopg.connect(self.db.url)  # CONCURRENTLY waits for older transactions
                self.addCleanup(blocker.close)
                blocker.execute("UPDATE movie_embeddings SET model = model")
                process = self.start_program("--engine", engine, "--index")
                self.wait_for(self.index, "the index that is being built")
                os.kill(process.pid, signal.SIGINT)
                done = self.ended(process)
                self.assertEqual((done.code, done.err, done.tally), (130, "", (1, 19, 0)))
                building = "SELECT * FROM pg_stat_progress_create_index"
                self.wait_for(lambda sql=building: not self.execute(sql), "the end of the build")
                blocker.rollback()
                self.assertIn("Building the index: 100%", self.succeed("--index").out)

    def test_rows_are_found_by_key_whatever_the_statistics_say(self) -> None:
        """What is done is not read again for each batch of what is missing."""
        self.execute("CREATE TABLE movies (id BIGINT PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO movies SELECT n, 'Film ' || n FROM generate_series(1, 31000) n")
        self.execute("CREATE TABLE movie_embeddings (movie_id BIGINT PRIMARY KEY, embedding vector(8))")
        self.execute("INSERT INTO movie_embeddings SELECT n, '[1,0,0,0,0,0,0,0]' FROM generate_series(1, 30000) n")
        for analyzed in (False, True):
            with self.subTest(analyzed=analyzed):
                if analyzed:
                    self.execute("ANALYZE")
                before = self.read()
                flags = ("--batch-size", 10, "--limit", 500, "--accept-drift", "--concurrent", 1)
                self.assertEqual(self.succeed(*flags).tally[0], 500)
                self.wait_for(lambda before=before: self.read() > before, "the statistics")
                self.assertLess(self.read() - before, 5 * 31000)

    def read(self) -> int:
        """Return how many rows of the target were ever read."""
        sql = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'movie_embeddings'"
        return int(self.execute(sql)[0][0])

    def test_no_index_of_a_partitioned_target(self) -> None:
        self.make_movies(3)
        columns = f"movie_id bigint PRIMARY KEY, embedding {self.db.vector_type}"
        self.execute(f"CREATE TABLE movie_embeddings ({columns}) PARTITION BY HASH (movie_id)")
        self.execute("CREATE TABLE part PARTITION OF movie_embeddings FOR VALUES WITH (MODULUS 1, REMAINDER 0)")
        self.refuse(2, "--index", words=["movie_embeddings", "partitioned", "run a plain CREATE INDEX"])
        self.assertEqual(self.stored(), {})
        self.assertEqual(self.succeed().tally, (3, 0, 0))

    def test_too_many_dimensions_for_an_index(self) -> None:
        self.make_movies(3)
        self.ollama.configure(models={"nomic-embed-text": {"dimensions": 2500}})
        self.refuse(2, "--index", words=["2,000", "2,500", "halfvec(2500)", "--dimensions"])
        self.assertEqual([text for text in self.ollama.texts() if "Film" in text], [])
        self.assertNotIn("movie_embeddings", self.db.tables())
        self.assertEqual(self.succeed().tally, (3, 0, 0))
        self.refuse(2, "--index", words=["2,000", "2,500"])


if __name__ == "__main__":
    unittest.main()
