"""How a run can end: signals, killed workers, kill -9, locks, full disks. What was generated is saved."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import unittest
from pathlib import Path
from unittest import mock

import embedgen
from tests.support import ENGINES, FULL, SLOW_ENGINES, START_METHOD, Case, Finished, environment

PROC = Path("/proc/self/stat").exists()


def living(field: int, value: int) -> list[int]:
    """Return the processes that live and have that value in a field of /proc/PID/stat (after the name)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes()
            except OSError:  # it has just ended
                continue
            # multiprocessing's own helper of spawned workers is none of them.
            if int(fields[field]) == value and fields[0] != "Z" and b"resource_tracker" not in command:
                found.append(int(entry.name))
    return found


def children(pid: int) -> list[int]:
    """Return the worker processes of a process."""
    return living(1, pid)


def of_group(group: int) -> list[int]:
    """Return the processes of a process group."""
    return living(2, group)


class Ending(Case):
    def wait_until_open(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until a run has opened the database, and has had time to do something with it."""
        if PROC:
            database, files = os.path.realpath(self.database), Path(f"/proc/{process.pid}/fd")
            self.wait_for(lambda: database in map(os.path.realpath, files.iterdir()), "the database is opened")
        time.sleep(0.2 if PROC else 1.0)


@unittest.skipIf(os.name == "nt", "Windows has no such signals")
class Signals(Ending):
    def start_slow(self, engine: str, **constants: object) -> subprocess.Popen[bytes]:
        """Start a run that takes a while, and wait until it has saved something."""
        self.database.unlink(missing_ok=True)
        self.ollama.reset()
        self.make_movies(1000)
        self.ollama.configure(seconds_per_text=0.01, slots=1)
        constants.setdefault("UNSAVED_SECONDS", 0.1)
        process = self.start_program("--engine", engine, "--workers", 3, "--batch-size", 4, **constants)
        self.wait_for(lambda: self.execute("SELECT 1 FROM sqlite_master WHERE name = 'movie_embeddings'")
                      and self.stored(), "the first rows")  # fmt: skip
        return process

    def hang(self) -> None:
        """Have the server answer no more, and wait until it has been asked then."""
        self.ollama.configure(hang=["Film"])
        asked = len(self.ollama.log())
        self.wait_for(lambda: len(self.ollama.log()) > asked, "a request that hangs")

    def finish(self, process: subprocess.Popen[bytes], seconds: float = 30) -> Finished:
        """Wait for the end; nothing of the process group may be left."""
        out, err = process.communicate(timeout=seconds)
        done = Finished(process.returncode, out.decode(), err.decode())
        self.assertNotIn("Traceback", done.err)
        if PROC:
            self.wait_for(lambda: not of_group(process.pid), "the end of all workers", 5)
        return done

    def test_the_first_signal_saves_and_sums_up(self) -> None:
        for engine in SLOW_ENGINES:
            for number, code in [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]:
                with self.subTest(engine=engine, signal=number):
                    process = self.start_slow(engine)
                    # To the whole group, as a terminal and a supervisor do.
                    os.killpg(process.pid, number)
                    done = self.finish(process)
                    self.assertEqual((done.code, done.err), (code, ""))
                    self.assertIn("Movie Embedding Generator Stopped", done.out)
                    stored = len(self.stored())
                    self.assertEqual(done.tally, (stored, 0, 0))
                    # What was in flight was finished and saved, and nothing was asked for after that.
                    self.assertEqual(stored, len(self.asked()))
                    self.assertLess(stored, 1000)
                    self.ollama.configure(seconds_per_text=0)
                    self.assertEqual(self.succeed("--engine", engine).tally, (1000 - stored, stored, 0))
                    self.assert_complete()

    def test_signals_of_any_kind_at_any_moment(self) -> None:
        self.make_movies(300)
        chance = random.Random(7)
        for turn in range(200 if FULL else 3):
            self.ollama.configure(seconds_per_text=0.001, slots=1)
            log = self.folder / f"logs{turn}" / ".generate_embeddings.lock"
            flags = ("--engine", "process", "--workers", 2, "--force", "--json", "--log-dir", log.parent)
            if turn % 2:
                log = log.with_name(".generate_embeddings_async.lock")
                flags = ("--engine", "async", *flags[2:])
            process = self.start_program(*flags)
            self.wait_for(log.exists, "the start")
            for _ in range(chance.randint(1, 4)):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(chance.choice([0, 0.01, 0.2, 0.7]) * chance.random())
                process.send_signal(chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]))
            done = self.finish(process)
            self.assertIn(done.code, (0, 129, 130, 143), done.err)
            self.assertEqual(done.err, "")
            self.assertEqual(json.loads(done.out)["exit_code"], done.code)

    def test_requests_that_do_not_end_are_given_up_after_a_while(self) -> None:
        self.assertEqual(embedgen.GRACE, 10.0)
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start_slow(engine, GRACE=0.3)
                self.hang()
                os.kill(process.pid, signal.SIGTERM)
                started = time.monotonic()
                done = self.finish(process)
                self.assertEqual(done.code, 143)
                self.assertGreaterEqual(time.monotonic() - started, 0.3)
                self.assertEqual(done.tally[0], len(self.stored()))

    def test_the_second_interrupt_ends_at_once(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start_slow(engine)
                self.hang()
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(0.3)
                self.assertIsNone(process.poll())
                os.killpg(process.pid, signal.SIGINT)
                done = self.finish(process, seconds=5)
                self.assertEqual(done.code, 130)
                self.assertIn("ended at once by a signal", self.log().splitlines()[-1])
                self.assertEqual(self.execute("PRAGMA integrity_check"), [("ok",)])

    def test_an_interrupt_before_the_work_begins(self) -> None:
        self.make_movies(20)
        self.ollama.configure(hang=[""])
        blocker = sqlite3.connect(self.database, isolation_level=None)
        self.addCleanup(blocker.close)
        blocker.execute("BEGIN EXCLUSIVE")
        process = self.start_program()
        self.wait_until_open(process)
        self.assertIsNone(process.poll())
        os.kill(process.pid, signal.SIGINT)
        done = self.finish(process, seconds=5)
        self.assertEqual((done.code, done.err), (130, ""))

    def test_nothing_is_sent_after_the_first_interrupt(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start_slow(engine)
                self.ollama.configure(seconds_per_text=0, faults={"503": 1.0})
                self.wait_for(lambda: self.ollama.log()[-1]["status"] == 503, "the first refusal")
                os.killpg(process.pid, signal.SIGINT)
                started = time.monotonic()
                self.assertEqual(self.finish(process).code, 130)
                # No conversation waits for its next try, and none makes one.
                self.assertLess(time.monotonic() - started, 5.0)

    def test_the_second_interrupt_does_not_wait_for_a_lock(self) -> None:
        process = self.start_slow("async")
        blocker = sqlite3.connect(self.database, isolation_level=None, timeout=30)
        self.addCleanup(blocker.close)
        blocker.execute("BEGIN IMMEDIATE")
        time.sleep(0.4)  # it saves each 0.1 s
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
        self.assertIsNone(process.poll())
        os.kill(process.pid, signal.SIGINT)
        done = self.finish(process, seconds=5)
        self.assertEqual((done.code, done.err), (130, ""))

    def test_an_interrupt_while_workers_start(self) -> None:
        for method in ("fork", "spawn"):
            with self.subTest(method=method):
                self.database.unlink(missing_ok=True)
                self.ollama.reset()
                self.make_movies(500)
                self.ollama.configure(seconds_per_text=0.05, slots=1)
                process = self.start_program(
                    "--engine", "process", "--workers", 5, "--batch-size", 2, START_METHOD=method
                )
                self.wait_for(lambda: len(self.ollama.texts()) > 1, "the first request")
                os.killpg(process.pid, signal.SIGINT)
                done = self.finish(process)
                self.assertEqual((done.code, done.err), (130, ""))

    @unittest.skipUnless(PROC, "/proc is needed to find the workers")
    def test_killed_workers_cost_nothing_but_time(self) -> None:
        process = self.start_slow("process")
        for _ in range(10):
            victims = self.wait_for(lambda: children(process.pid), "a worker")
            os.kill(victims[0], signal.SIGKILL)
            time.sleep(0.05)
        self.ollama.configure(seconds_per_text=0)
        done = self.finish(process, seconds=60)
        self.assertEqual((done.code, done.err, done.tally), (0, "", (1000, 0, 0)))
        self.assert_complete()

    @unittest.skipUnless(PROC, "/proc is needed to find the workers")
    def test_all_workers_killed_at_once(self) -> None:
        process = self.start_slow("process")
        for worker in children(process.pid):
            os.kill(worker, signal.SIGKILL)
        self.ollama.configure(seconds_per_text=0)
        done = self.finish(process, seconds=60)
        self.assertEqual((done.code, done.err, done.tally), (0, "", (1000, 0, 0)))
        self.assert_complete()

    @unittest.skipUnless(PROC, "/proc is needed to find the workers")
    def test_workers_that_die_again_and_again_end_the_run(self) -> None:
        self.make_movies(20)
        code = (
            f"import sys, os; sys.path.insert(0, {str(Path(embedgen.__file__).parent)!r}); import embedgen\n"
            "embedgen.embed_batch = lambda *_: os._exit(9)\n"  # which a handshake does without
            "embedgen.START_METHOD = 'fork'\n"
            "sys.exit(embedgen.main())"
        )
        flags = ["--log-dir", str(self.folder / "logs"), "--engine", "process", "--server", self.ollama.url]
        done = subprocess.run([sys.executable, "-c", code, *flags], cwd=self.folder, env=environment(),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)  # fmt: skip
        self.assertEqual(done.returncode, 3)
        self.assertRegex(done.stderr.decode(), r"\Aerror: worker processes keep dying.*20 movies are left\.\n\Z")

    @unittest.skipUnless(PROC, "/proc is needed to find the workers")
    def test_kill_9_leaves_whole_rows_no_lock_and_no_workers(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start_slow(engine)
                self.hang()
                process.kill()
                process.communicate()
                # Workers end by themselves, even those that wait for an answer.
                self.wait_for(lambda process=process: not of_group(process.pid), "the end of all workers", 10)
                self.ollama.configure(hang=[], seconds_per_text=0)
                stored, expected = self.stored(), self.expected()
                self.assertTrue(all(expected[key] == vector for key, vector in stored.items()))
                done = self.succeed("--engine", engine)
                self.assertEqual(done.tally, (1000 - len(stored), len(stored), 0))
                self.assert_complete()

    def test_a_second_run_on_one_database_is_refused(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start_slow(engine)
                for flags in ([], ["--force"], ["--database", str(self.database)]):
                    self.refuse(3, *flags, words=["another run", "movies.db"])
                link = self.folder / "link.db"
                link.symlink_to(self.database)
                self.refuse(3, "--database", "link.db", words=["another run"])
                link.unlink()
                os.kill(process.pid, signal.SIGKILL)
                process.communicate()
                self.ollama.configure(seconds_per_text=0)
                self.succeed("--engine", engine)

    def test_the_server_killed_and_started_again(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start_slow(engine, FIRST_WAIT=0.1, LONGEST_WAIT=0.1)
                self.ollama.kill()
                time.sleep(0.3)
                self.ollama.start()
                self.ollama.configure(seconds_per_text=0)
                done = self.finish(process, seconds=60)
                self.assertEqual((done.code, done.err, done.tally), (0, "", (1000, 0, 0)))
                self.assert_complete()

    def test_a_server_that_does_not_come_back(self) -> None:
        # Spawned workers would not know of the patience that is shortened here.
        for engine in ENGINES if START_METHOD != "spawn" else ENGINES[:1]:
            with self.subTest(engine=engine):
                self.database.unlink(missing_ok=True)
                self.ollama.reset()
                self.make_movies(60)
                self.ollama.configure(next=["ok"] * 7)
                with mock.patch.multiple(embedgen, PATIENCE=0.5, FIRST_WAIT=0.1):
                    self.ollama.configure(next=["ok"] * 7, faults={"503": 1.0})
                    done = self.run_program("--engine", engine, "--concurrent", 1, "--batch-size", 4)
                self.assertEqual((done.code, done.tally), (3, (20, 0, 0)))
                self.assertRegex(done.err, r"\Aerror: Ollama at http.* no good answer .*40 movies are left\.\n\Z")
                self.assertEqual(len(self.stored()), 20)


class Databases(Ending):
    def test_what_arrives_while_the_database_is_locked_is_not_late(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                self.database.unlink(missing_ok=True)
                self.ollama.reset()
                self.make_movies(12)
                self.ollama.configure(network=0.2)
                flags = ("--engine", engine, "--timeout", 0.7, "--concurrent", 4, "--batch-size", 1)
                process = self.start_program(*flags, UNSAVED_ROWS=8)
                self.wait_for(lambda: len(self.ollama.texts()) > 3, "the first requests")
                blocker = sqlite3.connect(self.database, isolation_level=None, timeout=30)
                blocker.execute("BEGIN IMMEDIATE")
                time.sleep(1.2)
                blocker.close()
                _, err = process.communicate(timeout=60)
                self.assertEqual((process.returncode, err), (0, b""))
                self.assertNotIn("no answer", self.log())

    def test_locked_for_a_while(self) -> None:
        self.make_movies(50)
        self.succeed("--limit", 10)
        blocker = sqlite3.connect(self.database, isolation_level=None)
        self.addCleanup(blocker.close)
        for statement in ("BEGIN EXCLUSIVE", "BEGIN IMMEDIATE"):
            with self.subTest(statement=statement):
                blocker.execute(statement)
                process = self.start_program("--limit", 10)
                self.wait_until_open(process)
                self.assertIsNone(process.poll())
                blocker.execute("ROLLBACK")
                _, err = process.communicate(timeout=30)
                self.assertEqual((process.returncode, err), (0, b""))
        self.assertEqual(len(self.stored()), 30)

    def test_locked_for_too_long(self) -> None:
        self.make_movies(50)
        self.succeed("--limit", 10)
        blocker = sqlite3.connect(self.database, isolation_level=None)
        self.addCleanup(blocker.close)
        impatient = [rule._replace(patience=min(rule.patience, 0.4)) for rule in embedgen.SQLite.errors]
        for statement in ("BEGIN EXCLUSIVE", "BEGIN IMMEDIATE"):
            with self.subTest(statement=statement), mock.patch.object(embedgen.SQLite, "errors", impatient):
                blocker.execute(statement)
                self.refuse(3, words=["locked", "movies.db"])
                blocker.execute("ROLLBACK")
        self.assertEqual(len(self.stored()), 10)
        self.assertEqual(self.execute("PRAGMA integrity_check"), [("ok",)])

    @unittest.skipUnless(sys.platform.startswith("linux"), "the size limit is set as Linux has it")
    def test_a_full_disk(self) -> None:
        import resource

        self.make_movies(3000)
        self.ollama.configure(models={"nomic-embed-text": {"dimensions": 64}})
        limit = os.path.getsize(self.database) + 200_000
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                done = subprocess.run(
                    self.arguments("--engine", engine), cwd=self.folder, env=environment(),
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
                )  # fmt: skip
                err = done.stderr.decode()
                self.assertEqual(done.returncode, 3, err)
                self.assertRegex(err, r"\Aerror: .*(full|may not grow).* are left\.\n\Z")
                self.assertEqual(self.execute("PRAGMA integrity_check"), [("ok",)])
        self.succeed()
        self.assertEqual(len(self.stored()), 3000)

    def test_a_database_that_may_only_be_read(self) -> None:
        self.make_movies(5)
        os.chmod(self.database, 0o444)
        if os.access(self.database, os.W_OK):  # root may write whatever the mode says
            with mock.patch.object(embedgen.SQLite, "connect", read_only):
                self.refuse(3, words=["movies.db", "cannot be written"])
        else:
            self.refuse(3, words=["movies.db"])
        self.assertEqual(self.execute("SELECT count(*) FROM sqlite_master"), [(1,)])


def read_only(store: embedgen.SQLite, path: str, mode: str, timeout: float, first: str) -> sqlite3.Connection:
    """Connect as to a file that may only be read."""
    mode = "ro" if path.endswith("movies.db") else "rwc"
    connection = sqlite3.connect(f"file:{path}?mode={mode}", uri=True, timeout=timeout, isolation_level=None)
    connection.execute(first)
    return connection


if __name__ == "__main__":
    unittest.main()
