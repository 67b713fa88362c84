"""How a run can end: signals, killed workers, kill -9, locks, full disks. What was generated is saved."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import embedgen
from tests.support import ENGINES, FULL, PROC, SLOW_ENGINES, START_METHOD, Case, Finished, environment

# A library that stands before the C library's, and has each lock of a file refused with $LOCK_ERROR.
WITHOUT_LOCKS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>

static int call(const char *name, int file, int command, void *argument) {
    int (*theirs)(int, int, ...) = dlsym(RTLD_NEXT, name);
    if (command == F_SETLK || command == F_SETLKW || command == F_GETLK) {
        errno = atoi(getenv("LOCK_ERROR"));
        return -1;
    }
    return theirs(file, command, argument);
}

#define REPLACE(name) int name(int file, int command, ...) { \\
    va_list more; va_start(more, command); void *argument = va_arg(more, void *); va_end(more); \\
    return call(#name, file, command, argument); }
REPLACE(fcntl)
REPLACE(fcntl64)
"""


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


def three_of(workers: list[int]) -> list[int]:
    """Return all workers of a run that has three, [] as long as some of them are missing."""
    return workers if len(workers) == 3 else []


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
    def start_held(self, engine: str, **constants: object) -> subprocess.Popen[bytes]:
        """Start a run over 100 rows, and wait until it has saved 84, waits for 12, and has not asked for 4."""
        self.wipe()
        shutil.rmtree(self.folder / "logs", ignore_errors=True)
        self.ollama.reset()
        self.make_movies(100)
        self.ollama.configure(hold=["Film 9"])  # of the batches from 9, 89 and 93
        constants.setdefault("UNSAVED_SECONDS", 0.1)
        process = self.start_program("--engine", engine, "--workers", 3, "--batch-size", 4, **constants)
        self.wait_for(lambda: self.execute("SELECT 1 FROM sqlite_master WHERE name = 'movie_embeddings'")
                      and len(self.stored()) == 84 and len(self.asked()) >= 96, "the first rows")  # fmt: skip
        return process

    def finish(self, process: subprocess.Popen[bytes]) -> Finished:
        """Wait for the end; nothing of the process group may be left."""
        done = self.ended(process)
        self.assertNotIn("Traceback", done.err)
        if PROC:
            self.wait_for(lambda: not of_group(process.pid), "the end of all workers")
        return done

    def test_the_first_signal_saves_and_sums_up(self) -> None:
        for engine in SLOW_ENGINES:
            for number, code in [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]:
                with self.subTest(engine=engine, signal=number):
                    process = self.start_held(engine)
                    # To the whole group, as a terminal and a supervisor do.
                    os.killpg(process.pid, number)
                    self.ollama.configure(hold=[])
                    done = self.finish(process)
                    self.assertEqual((done.code, done.err), (code, ""))
                    self.assertIn("Movie Embedding Generator Stopped", done.out)
                    # What was in flight was finished and saved, and nothing was asked for after that.
                    self.assertEqual((done.tally, len(self.asked())), ((96, 0, 0), 96))
                    self.assertEqual(self.succeed("--engine", engine).tally, (4, 96, 0))
                    self.assert_complete()

    def test_signals_of_any_kind_at_any_moment(self) -> None:
        self.make_movies(300)
        chance = random.Random(7)
        for turn in range(40 if FULL else 3):
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
                process = self.start_held(engine, GRACE=0.1)
                began = time.monotonic()
                os.kill(process.pid, signal.SIGTERM)
                done = self.finish(process)
                self.assertGreaterEqual(time.monotonic() - began, 0.1)
                self.assertEqual((done.code, done.tally, len(self.stored())), (143, (84, 0, 0), 84))

    def interrupt_twice(self, process: subprocess.Popen[bytes]) -> None:
        """Send two signals to a run that would not end by the first; of different kinds, since equal ones may merge."""
        os.killpg(process.pid, signal.SIGINT)
        with self.assertRaises(subprocess.TimeoutExpired):
            process.wait(0.2)
        os.killpg(process.pid, signal.SIGTERM)

    def test_the_second_interrupt_ends_at_once(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start_held(engine, GRACE=3600.0)
                self.interrupt_twice(process)
                self.assertEqual(self.finish(process).code, 130)
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
        done = self.finish(process)
        self.assertEqual((done.code, done.err), (130, ""))

    def test_nothing_is_sent_after_the_first_interrupt(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                # Who waited for the next try would wait for longer than the test.
                process = self.start_held(engine, FIRST_WAIT=3600.0, LONGEST_WAIT=3600.0, GRACE=3600.0)
                self.ollama.configure(faults={"503": 1.0}, hold=[])  # for what is not asked for yet
                self.wait_for(lambda: "HTTP 503" in self.log(), "a refusal")
                os.killpg(process.pid, signal.SIGINT)
                done = self.finish(process)
                self.assertEqual((done.code, done.tally), (130, (96, 0, 0)))
                if START_METHOD != "spawn":  # where workers wait as usual
                    self.assertEqual(len(self.asked()), 100)

    def test_the_second_interrupt_does_not_wait_for_a_lock(self) -> None:
        process = self.start_held("async", GRACE=3600.0, STOPPING_PATIENCE=3600.0, LOCK_PATIENCE=3600.0)
        blocker = sqlite3.connect(self.database, isolation_level=None, timeout=30)
        self.addCleanup(blocker.close)
        blocker.execute("BEGIN IMMEDIATE")
        self.ollama.configure(hold=[])
        self.wait_for(lambda: len(self.asked()) == 100, "rows that cannot be saved")
        self.interrupt_twice(process)
        done = self.finish(process)
        self.assertEqual((done.code, done.err), (130, ""))

    def test_an_interrupt_while_workers_start(self) -> None:
        for method in ("fork", "spawn"):
            with self.subTest(method=method):
                self.wipe()
                self.ollama.reset()
                self.make_movies(100)
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
        process = self.start_held("process")
        for count in (1, 1, 1, 1, 3) if FULL else (1, 3):  # all at once, too
            workers = self.wait_for(lambda: three_of(children(process.pid)), "the workers")
            for victim in workers[:count]:
                os.kill(victim, signal.SIGKILL)
            self.wait_for(lambda gone={*workers[:count]}: not gone & {*children(process.pid)}, "their end")
        self.ollama.configure(hold=[])
        done = self.finish(process)
        self.assertEqual((done.code, done.err, done.tally), (0, "", (100, 0, 0)))
        self.assert_complete()

    def test_a_worker_that_does_not_start_at_first(self) -> None:
        self.make_movies(20)
        start = embedgen.start_worker
        for refusals in (3, 1000):
            refused = iter([OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))] * refusals)

            def start_later(*given: Any, refused: Any = refused) -> Any:
                for error in refused:
                    raise error
                return start(*given)

            with (
                mock.patch.object(embedgen, "start_worker", start_later),
                mock.patch.object(embedgen, "RETRY_SECONDS", 0.0),
            ):
                flags = ("--engine", "process", "--force")
                if refusals == 3:
                    self.assertEqual(self.succeed(*flags).tally, (20, 0, 0))
                else:
                    self.refuse(3, *flags, words=["no worker process can be started", "Give fewer --workers"])
        self.assert_complete()

    @unittest.skipUnless(PROC, "/proc is needed to find the workers")
    def test_workers_that_die_again_and_again_end_the_run(self) -> None:
        self.make_movies(20)
        code = (
            f"import sys, os; sys.path.insert(0, {str(Path(embedgen.__file__).parent)!r}); import embedgen\n"
            "embedgen.BatchRequest.embed = lambda *_: os._exit(9)\n"  # which a handshake does without
            "embedgen.START_METHOD = 'fork'\n"
            "sys.exit(embedgen.main())"
        )
        flags = ["--log-dir", str(self.folder / "logs"), "--engine", "process", "--server", self.ollama.url]
        done = subprocess.run([sys.executable, "-S", "-c", code, *flags], cwd=self.folder, env=environment(),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        self.assertEqual(done.returncode, 3)
        self.assertRegex(done.stderr.decode(), r"\Aerror: worker processes keep dying.*Left to do: 20 movies\.\n\Z")

    @unittest.skipUnless(PROC, "/proc is needed to find the workers")
    def test_kill_9_leaves_whole_rows_no_lock_and_no_workers(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start_held(engine)
                process.kill()
                process.communicate()
                # Workers end by themselves, even those that wait for an answer.
                self.wait_for(lambda process=process: not of_group(process.pid), "the end of all workers")
                self.ollama.configure(hold=[])
                stored, expected = self.stored(), self.expected()
                self.assertEqual(stored, {key: expected[key] for key in stored})
                self.assertEqual(self.succeed("--engine", engine).tally, (16, 84, 0))
                self.assert_complete()

    def test_a_second_run_on_one_database_is_refused(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start_held(engine)
                link = self.folder / "link.db"
                link.symlink_to(self.database)
                for flags in ([], ["--force"], ["--database", str(self.database)], ["--database", "link.db"]):
                    self.refuse(3, *flags, words=["another run", "movies.db" if len(flags) < 2 else ".db"])
                link.unlink()
                self.end(process)

    def test_the_server_killed_and_started_again(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start_held(engine, FIRST_WAIT=0.1, LONGEST_WAIT=0.1)
                self.ollama.kill()
                self.wait_for(lambda: "connection refused" in self.log(), "a try in vain")
                self.ollama.start()
                self.ollama.configure(hold=[])
                done = self.finish(process)
                self.assertEqual((done.code, done.err, done.tally), (0, "", (100, 0, 0)))
                self.assert_complete()

    def test_a_server_that_does_not_come_back(self) -> None:
        # Spawned workers would not know of the patience that is shortened here.
        for engine in ENGINES if START_METHOD != "spawn" else ENGINES[:1]:
            with self.subTest(engine=engine):
                self.wipe()
                self.ollama.reset()
                self.make_movies(60)
                with mock.patch.multiple(embedgen, PATIENCE=0.1, FIRST_WAIT=0.02):
                    self.ollama.configure(next=["ok"] * 7, faults={"503": 1.0})
                    done = self.run_program("--engine", engine, "--concurrent", 1, "--batch-size", 4)
                self.assertEqual((done.code, done.tally), (3, (20, 0, 0)))
                self.assertRegex(done.err, r"\Aerror: Ollama at http.* no good answer .*Left to do: 40 movies\.\n\Z")
                self.assertEqual(len(self.stored()), 20)


class Databases(Ending):
    def test_what_arrives_while_rows_are_saved_is_not_late(self) -> None:
        """However long that takes, as where another program has locked the database."""
        real, save, late = time.monotonic, embedgen.EmbeddingTable.save, [0.0]

        def save_slowly(table: embedgen.EmbeddingTable, *given: Any) -> Any:
            self.ollama.configure(hold=[])
            self.wait_for(lambda: all(entry["end"] for entry in self.ollama.log()), "all answers")
            late[0] += 50.0
            return save(table, *given)

        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                self.wipe()
                self.ollama.reset()
                self.make_movies(12)
                self.ollama.configure(hold=["Film 2", "Film 3", "Film 4"])
                flags = ("--engine", engine, "--timeout", 40, "--concurrent", 4, "--batch-size", 1)
                with (
                    mock.patch.object(embedgen, "UNSAVED_ROWS", 8),
                    mock.patch.object(embedgen.EmbeddingTable, "save", save_slowly),
                    mock.patch("time.monotonic", lambda: real() + late[0]),
                ):
                    self.succeed(*flags)
                self.assertGreaterEqual(late[0], 50.0)
                self.assertNotIn("no answer", self.log())
                self.assert_complete()

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
                done = self.ended(process)
                self.assertEqual((done.code, done.err), (0, ""))
        self.assertEqual(len(self.stored()), 30)

    def test_locked_for_too_long(self) -> None:
        self.make_movies(50)
        self.succeed("--limit", 10)
        blocker = sqlite3.connect(self.database, isolation_level=None)
        self.addCleanup(blocker.close)
        impatient = [rule._replace(patience=min(rule.patience, 0.1)) for rule in embedgen.SQLite.errors]
        for statement in ("BEGIN EXCLUSIVE", "BEGIN IMMEDIATE"):
            with (
                self.subTest(statement=statement),
                mock.patch.object(embedgen.SQLite, "errors", impatient),
                mock.patch.object(embedgen, "open_sqlite", without_wait),
            ):
                blocker.execute(statement)
                self.refuse(3, words=["locked", "movies.db"])
                blocker.execute("ROLLBACK")
        self.assertEqual(len(self.stored()), 10)
        self.assertEqual(self.execute("PRAGMA integrity_check"), [("ok",)])

    @unittest.skipUnless(sys.platform.startswith("linux") and shutil.which("cc"), "needs the C compiler of a Linux")
    def test_a_disk_without_locks(self) -> None:
        self.make_movies(1)
        self.succeed()
        folder = Path(tempfile.mkdtemp(prefix="embedgen-test-"))
        self.addCleanup(shutil.rmtree, folder)
        source, library = folder / "locks.c", folder / "locks.so"
        source.write_text(WITHOUT_LOCKS)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        for code in (errno.ENOLCK, errno.EIO, errno.EOPNOTSUPP)[: None if FULL else 1]:
            env = {"LD_PRELOAD": str(library), "LOCK_ERROR": str(code)}
            self.refuse(3, real=True, env=env, words=["movies.db", "locks", "network share", "local disk"])

    @unittest.skipUnless(sys.platform.startswith("linux"), "the size limit is set as Linux has it")
    def test_a_full_disk(self) -> None:
        import resource

        self.make_movies(1500)
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
                self.assertRegex(err, r"\Aerror: .*(full|may not grow).* Left to do: \d+ movies\.\n\Z")
                self.assertEqual(self.execute("PRAGMA integrity_check"), [("ok",)])
        self.succeed()
        self.assertEqual(len(self.stored()), 1500)

    def test_a_database_that_may_only_be_read(self) -> None:
        self.make_movies(5)
        os.chmod(self.database, 0o444)
        if may_be_written(self.database):  # root may write whatever the mode says
            with mock.patch.object(embedgen, "open_sqlite", read_only):
                self.refuse(3, words=["movies.db", "cannot be written"])
        else:
            self.refuse(3, words=["movies.db"])
        self.assertEqual(self.execute("SELECT count(*) FROM sqlite_master"), [(1,)])


def may_be_written(path: Path) -> bool:
    """Return whether a file may be written; to root, its mode says nothing."""
    with contextlib.suppress(PermissionError), open(path, "r+b"):
        return True
    return False


def without_wait(path: str, mode: str = "rwc", timeout: float = 0, *more: Any) -> Any:
    """Connect, and leave all waiting for locks to the program."""
    return OPEN_SQLITE(path, mode, 0, *more)


def read_only(path: str, mode: str = "rwc", *more: Any) -> Any:
    """Connect as to a file that may only be read."""
    return OPEN_SQLITE(path, "ro" if path.endswith("movies.db") else mode, *more)


OPEN_SQLITE = embedgen.open_sqlite


if __name__ == "__main__":
    unittest.main()
