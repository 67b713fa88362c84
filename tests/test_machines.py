"""Several machines and several servers: what they have to agree on, and that nobody who waits is busy."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import unittest
from pathlib import Path
from typing import ClassVar

from tests.databases import Postgres
from tests.ollama import Ollama, blob
from tests.support import FULL, PROC, SLOW_ENGINES, Case, OnPostgres, another_double

NOMIC = "nomic-embed-text"
ROWS = 200


class Elsewhere(OnPostgres, Case):
    """Two machines that write dates and times each in its own way fill one table, whose keys are such values."""

    db: Postgres
    # 200 instants, half an hour apart, around the hour that Berlin's clocks show twice.
    key_type: ClassVar[str] = "timestamptz"
    keys: ClassVar[str] = "timestamptz '2024-10-26 00:00+00' + n * interval '30 minutes'"
    here: ClassVar[dict[str, str]] = {"PGTZ": "UTC", "PGDATESTYLE": "ISO, MDY"}
    there: ClassVar[dict[str, str]] = {"PGTZ": "Europe/Berlin", "PGDATESTYLE": "SQL, DMY"}

    def setUp(self) -> None:
        super().setUp()
        self.other = another_double()
        self.execute(f"CREATE TABLE movies (id {self.key_type} PRIMARY KEY, title text)")
        self.execute(f"INSERT INTO movies SELECT {self.keys}, 'Film ' || n FROM generate_series(1, {ROWS}) AS n")

    def machine(
        self, server: Ollama, place: dict[str, str], engine: str, claim_seconds: float = 300.0
    ) -> subprocess.Popen[bytes]:
        """Start a machine in some place of the world."""
        flags = ("--server", server.url, "--engine", engine, "--batch-size", 4)
        return self.start_program(*flags, env=place, CLAIM_SECONDS=claim_seconds, RENEWAL_SECONDS=0.3)

    def titles(self, server: Ollama) -> list[str]:
        """Return the texts of rows that a server was asked for."""
        return [text for text in server.texts() if text.startswith("Title: ")]

    def assert_each_has_its_own(self) -> None:
        """Each row must have its own vector."""
        found = self.execute(
            "SELECT title, extensions.vector_send(embedding)::text = extensions.vector_send(wanted)::text, count(*) "
            "FROM movies JOIN movie_embeddings ON movie_id = id JOIN wanted USING (title) GROUP BY 1, 2"
        )
        self.assertEqual({(alike, count) for _, alike, count in found}, {(True, 1)})
        self.assertEqual(len(found), ROWS)

    def want(self) -> None:
        """Have a table of the vectors that the titles must have."""
        self.execute("CREATE TABLE wanted (title text, wanted vector(8))")
        titles = [f"Film {number}" for number in range(1, ROWS + 1)]
        rows = [(title, self.db.vector(blob(f"Title: {title}"))) for title in titles]
        self.execute("INSERT INTO wanted VALUES (?, ?)", rows)

    def test_each_row_is_embedded_once(self) -> None:
        self.ollama.configure(hold=["Film"])
        self.other.configure(hold=["Film"])
        both = [self.machine(self.ollama, self.here, "async"), self.machine(self.other, self.there, "process")]
        for server in (self.ollama, self.other):
            self.wait_for(lambda server=server: self.titles(server), "rows for both")
        for server in (self.ollama, self.other):
            server.configure(hold=[], seconds_per_text=0.002, slots=1)
        for done in map(self.ended, both):
            self.assertEqual((done.code, done.err), (0, ""), done.out)
            self.assertEqual(sum(done.tally), ROWS)
        asked = self.titles(self.ollama) + self.titles(self.other)
        self.assertEqual((len(asked), len(set(asked))), (ROWS, ROWS))
        self.want()
        self.assert_each_has_its_own()

    def killed(self, victim: dict[str, str], heir: dict[str, str], engine: str) -> None:
        """Kill a machine in the middle of its work; the other one must do the rest, and come to an end."""
        self.ollama.configure(hold=["Film 5"])  # it has saved some of its rows, and is at others
        first = self.machine(self.ollama, victim, engine, 3.0)
        self.wait_for(lambda: [text for text in self.titles(self.ollama) if "Film 5" in text], "the victim's rows")
        self.other.configure(seconds_per_text=0.005, slots=1)
        second = self.machine(self.other, heir, engine, 3.0)
        self.wait_for(lambda: self.titles(self.other), "the heir's rows")
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
        done = self.ended(second)
        self.assertEqual((done.code, done.err), (0, ""), done.out)
        self.assertEqual(sum(done.tally), ROWS)
        asked = self.titles(self.other)
        # What exists when a machine comes is compared with its server's vectors, by a few rows.
        self.assertLessEqual(len(asked) - len(set(asked)), 3)
        self.want()
        self.assert_each_has_its_own()

    @unittest.skipIf(os.name == "nt", "Windows has no such signals")
    def test_one_is_killed(self) -> None:
        self.killed(self.here, self.there, "async")

    @unittest.skipIf(os.name == "nt", "Windows has no such signals")
    def test_the_other_one_is_killed(self) -> None:
        self.killed(self.there, self.here, "process")


class ElsewhereByDate(Elsewhere):
    """The same with days, of which 3 April and 4 March are written alike."""

    key_type = "date"
    keys = "date '2024-01-01' + n"
    here: ClassVar[dict[str, str]] = {"PGTZ": "UTC", "PGDATESTYLE": "SQL, MDY"}
    there: ClassVar[dict[str, str]] = {"PGTZ": "Asia/Kolkata", "PGDATESTYLE": "SQL, DMY"}


class ElsewhereByTime(Elsewhere):
    """The same with times without a zone."""

    key_type = "timestamp"
    keys = "timestamp '2024-01-01 12:00' + n * interval '1 day'"
    here: ClassVar[dict[str, str]] = {"PGDATESTYLE": "German"}
    there: ClassVar[dict[str, str]] = {"PGDATESTYLE": "Postgres, MDY"}


@unittest.skipUnless(FULL, "takes seconds; other versions are refused in test_servers, too")
class OtherVersions(Case):
    """Two servers, on which the model is replaced by another version while they are at work."""

    engine: ClassVar[str] = "async"

    def setUp(self) -> None:
        super().setUp()
        self.other = another_double()
        self.servers = [self.ollama, self.other]
        self.make_movies(60)

    def start_with_both(self) -> subprocess.Popen[bytes]:
        """Start a run, and wait until both servers are at work."""
        for server in self.servers:
            server.configure(models={NOMIC: {"digest": "sha256:aaaa"}}, hold=["Film"])
        flags = [flag for server in self.servers for flag in ("--server", server.url)]
        process = self.start_program("--engine", self.engine, "--batch-size", 2, *flags)
        for server in self.servers:
            self.wait_for(lambda server=server: "Film" in " ".join(server.texts()), "both are at work")
        return process

    def replace(self, server: Ollama, digest: str, seed: str) -> None:
        """Have a server come back with another version of the model, and wait until that has been looked at."""
        server.away()
        server.configure(models={NOMIC: {"digest": digest, "seed": seed}})
        looked = len(server.log())
        server.back()
        self.wait_for(lambda: "/api/tags" in [entry["path"] for entry in server.log()[looked:]], "it is looked at")

    def test_one_that_was_refused_still_tells_what_the_other_must_have(self) -> None:
        process = self.start_with_both()
        self.replace(self.ollama, "sha256:bbbb", "second")
        self.wait_for(lambda: "bbbb" in self.log(), "it is refused")
        self.replace(self.other, "sha256:cccc", "third")
        for server in self.servers:
            server.configure(hold=[])
        done = self.ended(process)
        self.assertEqual(done.code, 3, done.out)
        self.assertIn("cccc", self.log())
        expected, stored = self.expected(), self.stored() if "movie_embeddings" in self.db.tables() else {}
        self.assertEqual(stored, {key: expected[key] for key in stored})

    def test_one_that_was_refused_is_asked_for_nothing_more(self) -> None:
        process = self.start_with_both()
        self.replace(self.other, "sha256:bbbb", "second")
        self.wait_for(lambda: "bbbb" in self.log(), "it is refused")
        asked = len(self.other.texts())
        for server in self.servers:
            server.configure(hold=[])
        done = self.ended(process)
        self.assertEqual((done.code, done.tally), (0, (60, 0, 0)), done.err)
        self.assertRegex(done.err, r"\Awarning: .*\n\Z")
        self.assertEqual([text for text in self.other.texts()[asked:] if "Film" in text], [])
        self.assert_complete()

    def test_the_same_version_is_welcome_after_another_was_refused(self) -> None:
        process = self.start_with_both()
        self.replace(self.ollama, "sha256:bbbb", "second")
        self.wait_for(lambda: "bbbb" in self.log(), "it is refused")
        self.replace(self.other, "sha256:aaaa", "")
        for server in self.servers:
            server.configure(hold=[])
        done = self.ended(process)
        self.assertEqual((done.code, done.tally), (0, (60, 0, 0)), done.err)
        self.assert_complete()


@unittest.skipUnless(FULL, "takes seconds; the other engine is tested in every run")
class OtherVersionsByProcesses(OtherVersions):
    """The same with worker processes."""

    engine = "process"


class OtherVersionsOnPostgres(OnPostgres, OtherVersions):
    """The same on Postgres."""


@unittest.skipUnless(PROC, "/proc is needed to count how often a process wakes up")
class Asleep(Case):
    """Who waits for workers, and these for a server, sleeps."""

    def wake_ups(self, pid: int) -> int:
        """Return how often a process has gone to sleep, with all its threads."""
        found = 0
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            found += int(lines["voluntary_ctxt_switches"])
        return found

    def cpu(self, pid: int) -> int:
        """Return the ticks of the clock that a process has computed for."""
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def is_asleep(self, pid: int) -> bool:
        """Whether a process sleeps for a while."""
        before = self.wake_ups(pid), self.cpu(pid)
        time.sleep(0.5)
        return self.wake_ups(pid) - before[0] <= 2 and self.cpu(pid) - before[1] <= 1

    def test_an_idle_parent_sleeps_and_hears_signals(self) -> None:
        self.make_movies(20)
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                self.ollama.reset()
                self.ollama.configure(hold=["Film"])
                process = self.start_program("--engine", engine, "--workers", 2, "--batch-size", 2, GRACE=0.1)
                self.wait_for(lambda: len(self.asked()) >= 4, "both workers' requests")
                # Without a terminal to draw on, and with nothing to save, there is nothing to wake up for.
                self.wait_for(lambda pid=process.pid: self.is_asleep(pid), "a while of sleep")
                process.send_signal(signal.SIGTERM)
                self.assertEqual(self.ended(process).code, 143)


if __name__ == "__main__":
    unittest.main()
