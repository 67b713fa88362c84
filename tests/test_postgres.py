"""What only Postgres has: a table that several machines fill together, roles, restarts, the index."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import shutil
import signal
import tempfile
import time
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import embedgen
from tests.databases import Postgres, postgres_url, start_server
from tests.ollama import Ollama
from tests.support import ENGINES, FULL, Case, Finished, OnPostgres

ROWS = 20_000 if FULL else 1_500
SPEED = 1_000.0 if FULL else 250.0  # texts per second of a usual machine's server


class PostgresCase(OnPostgres, Case):
    db: Postgres

    def finish(self, process: Any) -> Finished:
        """Return how a program has ended."""
        out, err = process.communicate(timeout=300)
        return Finished(process.returncode, out.decode(), err.decode())

    def embedded(self) -> int:
        """Return how many rows have their embedding."""
        if "movie_embeddings" not in self.db.tables():
            return 0
        return int(self.execute("SELECT count(*) FROM movie_embeddings")[0][0])


class Fleet(PostgresCase):
    """Four programs, both engines, each with a server of its own, the last of which is four times slower."""

    def setUp(self) -> None:
        super().setUp()
        self.servers = [self.ollama]
        for _ in range(3):
            self.servers.append(Ollama())
            self.addCleanup(self.servers[-1].close)
        self.begin()

    def begin(self) -> None:
        """Have the servers forget what they were asked."""
        for number, server in enumerate(self.servers):
            server.reset()
            server.configure(seconds_per_text=(4 if number == 3 else 1) / SPEED, slots=1)

    def start_all(self, *flags: object, **constants: object) -> list[Any]:
        """Start the four programs."""
        return [
            self.start_program("--engine", ENGINES[number % 2], "--server", server.url, *flags, **constants)
            for number, server in enumerate(self.servers)
        ]

    def finish_all(self, processes: list[Any]) -> tuple[list[Finished], list[float]]:
        """Return how each program has ended, and when."""

        def finish(process: Any) -> tuple[Finished, float]:
            return self.finish(process), time.monotonic()

        with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
            done, ended = zip(*pool.map(finish, processes))
        return list(done), list(ended)

    def asked(self) -> list[str]:
        """Return the texts of rows that the servers were asked for."""
        return [text for server in self.servers for text in server.texts() if text != embedgen.KNOWN_GOOD]

    def test_each_row_is_embedded_once(self) -> None:
        self.make_movies(ROWS)
        for flags in ([], ["--force"]):
            with self.subTest(flags=flags):
                self.begin()
                done, ended = self.finish_all(self.start_all(*flags))
                for one in done:
                    self.assertEqual((one.code, one.err), (0, ""), one.out)
                    self.assertEqual(sum(one.tally), ROWS)
                self.assert_complete()
                asked = self.asked()
                self.assertEqual(len(set(asked)), ROWS)
                # A machine that comes when others have begun embeds three of their rows again to compare them.
                self.assertLessEqual(len(asked), ROWS * 1.01)
                generated = [one.tally[0] for one in done]
                self.assertEqual(sum(generated), ROWS)
                self.assertLess(generated[3], min(generated[:3]))
                # The slow one's last requests, at most.
                self.assertLess(max(ended) - min(ended), 10.0)

    def test_a_machine_that_dies_leaves_its_share_to_the_others(self) -> None:
        self.make_movies(ROWS)
        processes = self.start_all("--limit", ROWS)
        self.wait_for(lambda: self.embedded() > ROWS / 4, "a quarter of the rows", seconds=120)
        os.killpg(processes[0].pid, signal.SIGKILL)
        for process in processes[1:]:
            done = self.finish(process)
            self.assertEqual((done.code, done.err), (0, ""), done.out)
            self.assertEqual(sum(done.tally), ROWS)
        self.assert_complete()
        # What the dead one had under way was asked for twice, and no more: what it had not saved, and its requests.
        under_way = embedgen.UNSAVED_ROWS + 16 * embedgen.Pace.LARGEST_BATCH
        self.assertLess(len(self.asked()), ROWS + under_way)

    def test_a_machine_that_is_stopped_leaves_its_share_at_once(self) -> None:
        self.make_movies(ROWS)
        processes = self.start_all()
        self.wait_for(lambda: self.embedded() > ROWS / 4, "a quarter of the rows", seconds=120)
        for process in processes[:2]:
            os.kill(process.pid, signal.SIGTERM)
        ended = [self.finish(process) for process in processes]
        self.assertEqual([(done.code, done.err) for done in ended], [(143, ""), (143, ""), (0, ""), (0, "")])
        self.assert_complete()
        self.assertLessEqual(len(self.asked()), ROWS * 1.05 + 4 * embedgen.PAGE_ROWS)

    def test_failures_are_known_to_all(self) -> None:
        self.make_movies(400, lambda key: "Poison" if key % 50 == 7 else f"Film {key}")
        for server in self.servers:
            server.configure(refuse=[{"contains": "Poison", "status": 400, "error": "no"}])
        for done in [self.finish(process) for process in self.start_all()]:
            self.assertEqual((done.code, done.err), (1, ""), done.out)
            self.assertEqual(sum(done.tally), 400)
            self.assertEqual(done.tally[2], 8)
        self.assert_complete(but=range(7, 400, 50))

    def test_who_comes_late_looks_at_the_beginning_too(self) -> None:
        self.make_movies(400)
        self.servers[0].configure(seconds_per_text=0.01)
        first = self.start_program("--server", self.servers[0].url)
        self.wait_for(lambda: self.embedded() > 50, "the first rows")
        self.execute("INSERT INTO movies VALUES (-1, 'Before the first', 'x')")
        second = self.start_program("--server", self.servers[1].url)
        self.assertEqual([self.finish(process).code for process in (first, second)], [0, 0])
        self.assert_complete()

    def test_another_model_at_the_same_time_is_refused(self) -> None:
        self.make_movies(400)
        self.ollama.configure(seconds_per_text=0.01)
        first = self.start_program("--batch-size", 2)
        self.wait_for(lambda: "embedgen_machines" in self.db.tables(), "the first run")
        self.refuse(2 if self.embedded() else 3, "--model", "all-minilm", words=["nomic-embed-text", "all-minilm"])
        self.assertEqual(self.finish(first).code, 0)

    def test_a_role_without_a_place_for_leases_works_alone(self) -> None:
        self.make_movies(30)
        self.succeed("--limit", 10)
        self.execute("DROP TABLE embedgen_leases, embedgen_machines, embedgen_passes")
        with self.role("GRANT SELECT ON movies TO {role}",
                       "GRANT SELECT, INSERT, UPDATE ON movie_embeddings TO {role}") as url:  # fmt: skip
            self.assertEqual(self.succeed("--database", url).tally, (20, 10, 0))
        self.assertIn("shares the table with no other", self.log())
        self.assert_complete()

    @contextlib.contextmanager
    def role(self, *grants: str) -> Iterator[str]:
        """Make a role that may use the schema, and what is granted; give its URL."""
        role = f"{self.db.name}_reader"
        self.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        try:
            for grant in ("GRANT USAGE ON SCHEMA public, extensions TO {role}", *grants):
                self.execute(grant.format(role=role))
            yield re.sub(r"//([^@/]*@)?", f"//{role}:secret@", self.db.url, count=1)
        finally:
            self.execute(f"DROP OWNED BY {role}")
            self.execute(f"DROP ROLE {role}")

    def test_a_source_that_may_only_be_read(self) -> None:
        self.make_movies(30)
        self.execute("CREATE SCHEMA vectors")
        with self.role("GRANT SELECT ON movies TO {role}", "GRANT ALL ON SCHEMA vectors TO {role}") as url:
            self.refuse(3, "--database", url, words=["permission denied", "public"])
            flags = ("--database", url, "--target", "vectors.films")
            self.assertEqual(self.succeed(*flags).tally, (30, 0, 0))
            self.assertEqual(self.succeed(*flags).tally, (0, 30, 0))
            self.assertEqual(self.execute("SELECT count(*) FROM vectors.films"), [(30,)])
            self.execute(f"REVOKE SELECT ON movies FROM {self.db.name}_reader")
            self.refuse(3, *flags, words=["movies", "SELECT"])
        self.execute("DROP SCHEMA vectors CASCADE")


ALIVE = embedgen.Fleet.ALIVE


class Interleaved(PostgresCase):
    """Machines in one process, so that each statement of one can be put before or after one of the other's."""

    def setUp(self) -> None:
        super().setUp()
        for name, value in {"LOOK": 0.001, "RENEWAL": 0.001}.items():
            patch = mock.patch.object(embedgen, name, value)
            patch.start()
            self.addCleanup(patch.stop)
        # Without the time that everybody is given after a start of the server, which may be just now.
        patch = mock.patch.object(embedgen.Fleet, "ALIVE", "(NOT m.gone AND m.expires > now())")
        patch.start()
        self.addCleanup(patch.stop)

    def ready(self, *flags: str) -> Any:
        """Return a store that is ready to take part in filling the table, as a run makes one."""
        options = embedgen.parse_arguments(["--database", self.db.url, "--server", "hash:", *flags])
        store = embedgen.open_store(options)
        self.addCleanup(store.close)
        store.prepare()
        store.count()
        store.create_target(lambda: 256)
        return store

    def machine(self, *flags: str) -> Any:
        """Return a store that is ready to take rows."""
        store = self.ready(*flags)
        store.join()
        return store

    def take(self, store: Any, most: int = 1000) -> list[embedgen.Row]:
        """Return the rows that a machine is given until there are none right now, or none any more."""
        rows: list[embedgen.Row] = []
        for row in store.pending(None, lambda: 10):
            if row is None:
                break
            rows.append(row)
            if len(rows) == most:
                break
        time.sleep(0.002)  # so that the next look is due
        return rows

    def save(self, store: Any, rows: list[embedgen.Row]) -> None:
        """Save vectors for rows."""
        store.save([(row, embedgen.hash_embedding("", row.text)) for row in rows])

    def finish(self, store: Any) -> None:
        """Do all that is left."""
        for _ in range(100):
            rows: list[embedgen.Row] = []
            for row in store.pending(None, lambda: 10):
                if row is None:
                    break
                rows.append(row)
            else:
                self.save(store, rows)
                return
            self.save(store, rows)
            time.sleep(0.002)
        self.fail("there is no end to it")

    def die(self, store: Any) -> None:
        """Let a machine give no sign of life for too long."""
        self.execute(f"UPDATE embedgen_machines SET expires = now() - interval '1 s' WHERE id = {store.machine}")

    @contextlib.contextmanager
    def lost_answer(self, store: Any, word: str) -> Iterator[None]:
        """Have the connection break after the first statement with that word, which has been executed."""
        real = store.execute
        lost: list[str] = []

        def execute(sql: str, *parameters: Any) -> Any:
            found = real(sql, *parameters)
            if word in sql and not lost:
                lost.append(sql)
                store.connection.close()
                raise store.psycopg.OperationalError("the connection is lost")
            return found

        with mock.patch.object(store, "execute", execute):
            yield
        self.assertTrue(lost, word)

    def leases(self) -> int:
        """Return how many leases there are."""
        return int(self.execute("SELECT count(*) FROM embedgen_leases")[0][0])

    def keys(self) -> list[int]:
        """Return the keys of the rows that have their embedding."""
        return [key for (key,) in self.execute("SELECT movie_id FROM movie_embeddings ORDER BY 1")]

    def test_a_signal_is_heard_while_another_builds_the_index(self) -> None:
        self.make_movies(1)
        store = self.machine()
        store.stopping = lambda: True
        with mock.patch.object(store, "indexes", return_value=[(False, "theirs")]):
            with mock.patch.object(store, "share_indexed", return_value=0.5):
                self.assertEqual(list(store.build_index()), [0.5])

    def test_a_sign_of_life_lasts_for_a_lease(self) -> None:
        self.make_movies(30)
        one, other = self.machine(), self.machine()
        self.take(one, 10)
        self.die(one)
        one.tend()
        sql = f"SELECT extract(epoch FROM expires - now()) FROM embedgen_machines WHERE id = {one.machine}"
        [(seconds,)] = self.execute(sql)
        self.assertTrue(embedgen.LEASE - 1 < seconds <= embedgen.LEASE, seconds)
        self.assertEqual([row.key for row in self.take(other)], list(range(11, 31)))

    def test_everybody_has_time_for_a_sign_after_a_start_of_postgres(self) -> None:
        self.make_movies(30)
        one, other = self.machine(), self.machine()
        self.take(one, 10)
        self.die(one)
        for ago, keys in (("0 s", range(11, 31)), ("1 hour", range(1, 11))):
            since = ALIVE.replace("pg_postmaster_start_time()", f"(now() - interval '{ago}')")
            self.assertNotEqual(since, ALIVE)
            with mock.patch.object(embedgen.Fleet, "ALIVE", since):
                self.assertEqual([row.key for row in self.take(other)], [*keys], ago)

    def test_each_row_goes_to_one_machine(self) -> None:
        self.make_movies(100)
        one, other = self.machine(), self.machine()
        first, second = self.take(one, 10), self.take(other, 10)
        self.assertEqual([row.key for row in first + second], list(range(1, 21)))
        self.save(one, first)
        self.save(other, second)
        self.finish(one)
        self.finish(other)
        self.assertEqual(self.keys(), list(range(1, 101)))
        self.assertEqual((one.elsewhere(), other.elsewhere()), ((10, 0), (90, 0)))

    def test_what_could_not_be_saved_goes_to_another(self) -> None:
        self.make_movies(50)
        one, other = self.machine(), self.machine()
        rows = self.take(one, 10)
        with mock.patch.object(one, "rows", side_effect=embedgen.Stop("no room")):
            with self.assertRaises(embedgen.Stop):
                self.save(one, rows)
        one.close()
        self.finish(other)
        self.assertEqual(self.keys(), list(range(1, 51)))

    def test_what_comes_back_while_it_is_being_embedded_is_not_embedded_twice(self) -> None:
        self.make_movies(50)
        one, other = self.machine(), self.machine()
        under_way = self.take(one, 5)  # of ten
        self.die(one)
        self.assertEqual([row.key for row in self.take(other, 5)], list(range(1, 6)))
        other.close()
        one.tend()
        rows = self.take(one)
        self.assertEqual([row.key for row in rows], list(range(6, 51)))
        self.save(one, under_way + rows)
        self.finish(one)
        self.assertEqual(self.keys(), list(range(1, 51)))
        self.assertEqual((one.generated, self.leases()), (50, 0))

    def test_a_connection_lost_in_a_transaction(self) -> None:
        self.make_movies(20)
        self.machine().close()  # so that there are vectors of a version, and it is looked for
        for turn in ("before the tables are there", "after"):
            with self.subTest(turn):
                if turn != "after":
                    self.execute("DROP TABLE embedgen_passes, embedgen_machines, embedgen_leases")
                store = self.ready()
                entered: list[bool] = []

                def check_version(store: Any = store, entered: list[bool] = entered) -> None:
                    entered.append(store.in_transaction)
                    if len(entered) == 1:
                        self.execute(f"SELECT pg_terminate_backend({store.connection.info.backend_pid})")
                    store.columns(store.provenance)  # asks the database

                with mock.patch.object(store, "check_version", check_version):
                    store.join()
                self.assertEqual(entered, [True, True], "all of it again")
                self.assertFalse(store.in_transaction)
                self.finish(store)
                self.assertEqual(len(self.keys()), 20)

    def test_the_share_of_one_that_is_taken_for_dead(self) -> None:
        self.make_movies(50)
        one, other = self.machine(), self.machine()
        rows = self.take(one, 5)  # of ten
        self.die(one)
        self.assertEqual([row.key for row in self.take(other, 10)], list(range(1, 11)))
        one.tend()  # it was only asleep
        self.save(one, rows)
        self.assertNotIn(6, [row.key for row in self.take(one, 10)])

    def test_a_lease_whose_answer_was_lost(self) -> None:
        self.make_movies(30)
        one = self.machine()
        one.look()
        one.move(10, False, True)  # executed, but the connection broke before the answer came
        one.look()
        self.finish(one)
        self.assertEqual(self.keys(), list(range(1, 31)))

    def test_a_save_whose_answer_was_lost_counts_once(self) -> None:
        self.make_movies(30)
        one, other = self.machine(), self.machine()
        first, second = self.take(one, 10), self.take(one, 10)
        one.give_up(first[0])
        one.give_up(first[1], failed=False)
        one.give_up(second[0])  # of a lease that is not at its end
        with self.lost_answer(one, "saved"):
            self.save(one, first[2:] + second[1:9])
        other.renew()
        self.assertEqual(other.elsewhere(), (17, 1))
        self.assertEqual(self.leases(), 1)
        self.save(one, second[9:])
        other.renew()
        self.assertEqual(other.elsewhere(), (18, 2))
        self.assertEqual(self.leases(), 0)

    def test_a_sign_of_life_whose_answer_was_lost_counts_once(self) -> None:
        self.make_movies(30)
        one, other = self.machine(), self.machine()
        first, second = self.take(one, 10), self.take(one, 10)
        for place, row in enumerate(first):
            one.give_up(row, failed=place > 2)
        self.assertEqual(self.leases(), 2)
        with self.lost_answer(one, "FROM sign"):
            one.tend()
        self.assertEqual(self.leases(), 1)
        self.save(one, second)
        one.close()
        other.renew()
        self.assertEqual(other.elsewhere(), (13, 7))
        self.finish(other)
        self.assertEqual(self.keys(), list(range(11, 31)))

    def test_a_machine_that_leaves_says_what_has_failed(self) -> None:
        self.make_movies(30)
        one, other = self.machine(), self.machine()
        first, second = self.take(one, 10), self.take(one, 10)
        for row in first:
            one.give_up(row)
        one.give_up(second[0])
        with mock.patch.object(one, "rows", side_effect=embedgen.Stop("no room")):
            with self.assertRaises(embedgen.Stop):
                self.save(one, second[1:])
        one.close()
        self.assertEqual(self.leases(), 1)
        other.renew()
        self.assertEqual(other.elsewhere(), (0, 10))
        self.finish(other)
        self.assertEqual(self.keys(), list(range(11, 31)))

    def test_an_error_after_a_row_was_deleted_is_not_taken_for_another_one(self) -> None:
        self.make_movies(1)
        one = self.machine()
        errors = [one.psycopg.errors.ForeignKeyViolation("gone"), one.psycopg.errors.UndefinedTable("no such table")]

        def action() -> None:
            raise errors.pop(0)

        with self.assertRaisesRegex(embedgen.Stop, "no such table"):
            one.patiently(action)

    def test_a_second_pass_whose_answer_was_lost(self) -> None:
        self.make_movies(30)
        one = self.machine()
        self.take(one, 10)
        self.execute("INSERT INTO movies VALUES (-1, 'Before the first', 'x')")
        late = self.machine()
        one.close()
        real = embedgen.PostgresStore.rows

        def rows(store: Any, sql: str, *parameters: Any) -> Any:
            found = real(store, sql, *parameters)
            return [] if "AND ended RETURNING round" in sql else found

        with mock.patch.object(embedgen.PostgresStore, "rows", rows):
            self.finish(late)
        self.assertEqual(self.keys(), [-1, *range(1, 31)])

    def test_rows_that_another_does_before_this_one_joins(self) -> None:
        self.make_movies(30)
        one = self.machine()
        options = embedgen.parse_arguments(["--database", self.db.url, "--server", "hash:"])
        slow = embedgen.open_store(options)
        self.addCleanup(slow.close)
        slow.prepare()
        self.assertEqual(slow.count(), (30, 0))
        self.finish(one)
        one.close()
        slow.create_target(lambda: 256)
        slow.join()
        self.finish(slow)
        self.assertEqual(slow.elsewhere(), (30, 0))

    def test_failures_of_one_that_died_are_not_counted_twice(self) -> None:
        self.make_movies(20)
        one, other = self.machine(), self.machine()
        one.give_up(self.take(one, 1)[0])
        self.die(one)
        rows = self.take(other, 10)
        self.assertEqual(rows[0].key, 1)
        for row in rows:
            other.give_up(row)
        self.finish(other)
        self.assertEqual(other.elsewhere(), (0, 0))

    def test_counts_stay_right_where_rows_are_done_twice(self) -> None:
        counts = embedgen.Counts(100, 20, None)
        counts.generated = 50
        counts.elsewhere(40, 0)  # of 80, with ten that this one had, too
        self.assertEqual((counts.skipped, counts.total, counts.left), (50, 100, 0))


class Neighbours(PostgresCase):
    """Other programs that use the table at the same time."""

    def test_updates_do_not_wait_and_are_seen_by_the_next_run(self) -> None:
        self.make_movies(600)
        for engine in ENGINES:
            with self.subTest(engine=engine):
                self.execute("DROP TABLE IF EXISTS movie_embeddings")
                self.ollama.reset()
                self.ollama.configure(seconds_per_text=0.002, slots=1)
                process = self.start_program("--engine", engine, "--batch-size", 10, UNSAVED_SECONDS=0.05)
                changed = 0
                self.wait_for(self.embedded, "the first rows")
                while process.poll() is None:
                    key = changed * 37 % 600 + 1
                    # Raises if it waits for a lock.
                    self.db.execute_with(
                        "lock_timeout = '100ms'", f"UPDATE movies SET title = '{engine}' WHERE id = {key}"
                    )
                    changed += 1
                self.assertEqual(self.finish(process).code, 0)
                self.assertGreater(changed, 5)
                self.succeed("--accept-drift")
                self.assert_complete()

    def test_no_transaction_is_open_during_a_request(self) -> None:
        self.make_movies(60)
        for engine in ENGINES:
            with self.subTest(engine=engine):
                self.ollama.reset()
                self.ollama.configure(network=1.5)
                process = self.start_program("--engine", engine, "--force", "--batch-size", 60, RENEWAL=60.0)
                self.wait_for(self.asked, "the request")
                self.wait_for(self.is_idle, "a connection without a transaction and without locks")
                self.assertEqual(self.finish(process).code, 0)

    def is_idle(self) -> bool:
        """Whether the program's connection has neither a transaction nor a lock."""
        found = self.execute(
            "SELECT state, (SELECT count(*) FROM pg_locks l WHERE l.pid = a.pid) FROM pg_stat_activity a "
            "WHERE application_name = 'embedgen' AND datname = current_database()"
        )
        return found == [("idle", 0)]

    def test_rows_deleted_under_way_leave_nothing(self) -> None:
        self.make_movies(600)
        self.ollama.configure(seconds_per_text=0.002, slots=1)
        process = self.start_program("--batch-size", 10, UNSAVED_SECONDS=0.05)
        self.wait_for(self.embedded, "the first rows")
        key = 1
        while process.poll() is None and key < 300:
            self.db.execute_with("lock_timeout = '10s'", f"DELETE FROM movies WHERE id IN ({key}, {600 - key})")
            key += 2
        self.assertEqual(self.finish(process).code, 0)
        self.assert_complete()


class Losses(PostgresCase):
    """A connection that breaks, a server that restarts."""

    def test_a_connection_that_is_cut_is_made_again(self) -> None:
        for engine in ENGINES:
            with self.subTest(engine=engine):
                self.wipe()
                self.ollama.reset()
                self.make_movies(400)
                self.ollama.configure(seconds_per_text=0.005, slots=1)
                process = self.start_program("--engine", engine)
                for part in (1, 100, 200):
                    self.wait_for(lambda part=part: self.embedded() >= part, "progress")
                    self.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE application_name = 'embedgen' AND datname = current_database()"
                    )
                done = self.finish(process)
                self.assertEqual((done.code, done.err, sum(done.tally)), (0, "", 400))
                self.assert_complete()
                self.assertEqual(len(self.asked()), 400)

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


class Restarts(Case):
    """A Postgres of its own, which can be stopped at once, as by `pg_ctl restart -m immediate`."""

    def setUp(self) -> None:
        super().setUp()
        postgres_url()  # skips where there is none
        self.data = tempfile.mkdtemp(prefix="embedgen-pg-")
        self.addCleanup(shutil.rmtree, self.data, ignore_errors=True)
        self.server = start_server(self.data)
        self.addCleanup(self.server.cleanup)
        with mock.patch.dict("tests.databases.SERVER", {"url": str(self.server.get_uri())}):
            self.db = Postgres(self.folder)

    def restart(self) -> None:
        """Restart the server without a checkpoint, as after a crash."""
        pid = self.server.get_pid()
        os.kill(pid, signal.SIGQUIT)
        self.wait_for(lambda: not Path(f"/proc/{pid}").exists() or is_zombie(pid), "the server's end")
        self.server.ensure_postgres_running()

    def test_a_restart_in_mid_run(self) -> None:
        for engine in ENGINES:
            with self.subTest(engine=engine):
                self.wipe()
                self.ollama.reset()
                self.make_movies(600)
                self.ollama.configure(seconds_per_text=0.01, slots=1)
                process = self.start_program("--engine", engine)
                for part in (1, 250):
                    self.wait_for(lambda part=part: self.count() >= part, "progress")
                    self.restart()
                out, err = process.communicate(timeout=120)
                done = Finished(process.returncode, out.decode(), err.decode())
                self.assertEqual((done.code, done.err, sum(done.tally)), (0, "", 600))
                self.assert_complete()

    def count(self) -> int:
        """Return how many rows have their embedding."""
        if "movie_embeddings" not in self.db.tables():
            return 0
        return int(self.execute("SELECT count(*) FROM movie_embeddings")[0][0])


def is_zombie(pid: int) -> bool:
    """Whether a process has ended and only waits to be buried."""
    return ") Z " in Path(f"/proc/{pid}/stat").read_text()


class Targets(PostgresCase):
    def test_other_dimensions_are_noticed_before_a_row_is_read(self) -> None:
        self.make_movies(5)
        self.execute("CREATE TABLE movie_embeddings (movie_id bigint PRIMARY KEY, embedding vector(768))")
        for engine in ENGINES:
            self.refuse(3, "--engine", engine, words=["768", "8 dimensions"])
        self.assertEqual(self.asked(), [])
        self.assertEqual(self.db.types("movie_embeddings")["embedding"][0], "vector(768)")

    def test_half_precision(self) -> None:
        self.make_movies(40)
        self.execute("CREATE TABLE movie_embeddings (movie_id bigint PRIMARY KEY, embedding halfvec(8), "
                     "model text, text_sha256 bytea)")  # fmt: skip
        self.assertEqual(self.succeed("--limit", 20).tally, (20, 0, 0))
        self.assertEqual(self.succeed("--index").tally, (20, 20, 0))
        expected = self.expected()
        for key, stored in self.stored().items():
            for one, other in zip(embedgen.unpack(stored), embedgen.unpack(expected[key])):
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

    def test_the_extension_is_created(self) -> None:
        self.make_movies(3)
        self.execute("DROP EXTENSION vector")
        self.addCleanup(self.execute, "ALTER EXTENSION vector SET SCHEMA extensions")
        self.assertEqual(self.succeed().tally, (3, 0, 0))
        self.assertEqual(self.execute("SELECT extname FROM pg_extension WHERE extname = 'vector'"), [("vector",)])

    def test_an_extension_that_cannot_be_created(self) -> None:
        self.make_movies(3)
        missing = "SELECT 1, 2, 3 WHERE false"
        real = embedgen.PostgresStore.rows

        def rows(store: Any, sql: str, *parameters: Any) -> Any:
            return real(store, missing if "pg_depend" in sql else sql, *parameters)

        def alone(store: Any, action: Callable[[], Any]) -> Any:
            raise embedgen.Forbidden("Postgres refuses: permission denied to create extension.")

        with mock.patch.object(embedgen.PostgresStore, "rows", rows):
            with mock.patch.object(embedgen.PostgresStore, "alone", alone):
                self.refuse(3, words=["pgvector", "CREATE EXTENSION vector;", "administrator"])

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
        self.make_movies(20)
        self.succeed()
        blocker = self.db.psycopg.connect(self.db.url)  # CONCURRENTLY waits for older transactions
        self.addCleanup(blocker.close)
        blocker.execute("UPDATE movie_embeddings SET model = model")
        process = self.start_program("--index")
        self.wait_for(self.index, "the index that is being built")
        os.kill(process.pid, signal.SIGINT)
        done = self.finish(process)
        self.assertEqual((done.code, done.err), (130, ""))
        self.assertEqual(self.execute("SELECT * FROM pg_stat_progress_create_index"), [])
        blocker.rollback()
        self.assertIn("Building the index: 100%", self.succeed("--index").out)

    def test_a_page_is_found_by_key_whatever_the_statistics_say(self) -> None:
        self.execute("CREATE TABLE movies (id BIGINT PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO movies SELECT n, 'Film ' || n FROM generate_series(1, 30000) n")
        self.execute("CREATE TABLE movie_embeddings (movie_id BIGINT PRIMARY KEY, embedding vector(8))")
        self.execute("INSERT INTO movie_embeddings SELECT n, '[1,0,0,0,0,0,0,0]' FROM generate_series(1, 30000) n")
        options = embedgen.parse_arguments(["--database", self.db.url, "--server", "hash:"])
        for statement in ("", "ANALYZE"):
            with self.subTest(statement=statement):
                if statement:
                    self.execute(statement)
                store = embedgen.open_store(options)
                self.addCleanup(store.close)
                store.prepare()
                tables, exists = store.joined(page=True)
                sql = f"SELECT s.id FROM {tables} WHERE s.id > 29000 AND NOT ({exists}) ORDER BY s.id LIMIT 512"
                plan = "\n".join(line for (line,) in store.rows(f"EXPLAIN (ANALYZE, TIMING OFF, COSTS OFF) {sql}"))
                self.assertNotIn("Merge", plan)
                self.assertRegex(plan, r"movie_embeddings\S* .*loops=1000")

    def test_too_many_dimensions_for_an_index(self) -> None:
        self.make_movies(3)
        self.ollama.configure(models={"nomic-embed-text": {"dimensions": 2500}})
        self.refuse(2, "--index", words=["2,000", "2,500", "halfvec(2500)", "--dimensions"])
        self.assertEqual(self.asked(), [])
        self.assertNotIn("movie_embeddings", self.db.tables())
        self.assertEqual(self.succeed().tally, (3, 0, 0))
        self.refuse(2, "--index", words=["2,000", "2,500"])

    def test_a_run_with_nothing_to_do_reads_no_text(self) -> None:
        self.make_movies(300)
        self.succeed()
        real = embedgen.PostgresStore.rows
        most = 0

        def rows(store: Any, sql: str, *parameters: Any) -> Any:
            nonlocal most
            found = real(store, sql, *parameters)
            most = max(most, len(found))
            self.assertNotIn("What happens", repr(found))
            return found

        with mock.patch.object(embedgen.PostgresStore, "rows", rows):
            self.assertEqual(self.succeed().tally, (0, 300, 0))
        self.assertLess(most, 20)


if __name__ == "__main__":
    unittest.main()
