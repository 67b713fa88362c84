"""Kill the program again and again, with a server full of faults, and prove that nothing is lost.

    python -m tests.soak [--rows 20000] [--seed 1] [--kills 20] [--engine async|process|both] [--database URL]

A table with some rows that the server refuses is embedded through a double of Ollama that dies,
hangs and goes away. The program is killed without warning, its whole group or the parent alone,
and started again; then it may come to its end. No vector may ever be stored that is not its
row's own, and none may disappear; in the end every row that can have its vector must have it,
and the others must be named in the log. Prints a line for each event; the exit code is 1 if
anything was wrong. Takes some minutes, and needs a system with process groups and `ps`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.ollama import Ollama, blob
from tests.support import ENGINES, command, environment

# fmt: off
FAULTS = {"500": 0.10, "reset": 0.05, "cut": 0.05, "503": 0.02, "eof": 0.02,
          "hang": 0.01, "short": 0.01, "zero": 0.005, "nan": 0.005}
REFUSALS = {  # a title with the word is refused, with that error
    "cursed": "embedding contains NaN or Inf values (cursed)",
    "endless": "words of no model (endless)",
}
# fmt: on
KILL_AFTER = (0.5, 4.0)  # seconds
AWAY = 5.0  # seconds that the server is away, twice
LEAVE = 5.0  # seconds that workers have to see that their parent is dead
MOST_ENDS = 10  # runs that may end with code 3, and with 1, before all is done
MOST_ASKED = 10  # texts asked for by row


class SQLite:
    """A table movies in an SQLite file, and what a reader beside the program sees of its target."""

    def __init__(self, folder: Path, rows: list[tuple[int, str, str]]) -> None:
        self.path, self.url = folder / "movies.db", str(folder / "movies.db")
        with contextlib.closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT, overview TEXT)")
            connection.executemany("INSERT INTO movies VALUES (?, ?, ?)", rows)

    def look(self, path: Path | None = None, mode: str = "ro") -> dict[int, bytes]:
        """Return the vectors stored; an error if the file is not sound."""
        uri = f"{(path or self.path).as_uri()}?mode={mode}"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=60)) as connection:
                if (sound := connection.execute("PRAGMA integrity_check").fetchone()) != ("ok",):
                    raise ValueError(f"integrity_check: {sound}")
                target = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'movie_embeddings'").fetchone()
                return dict(connection.execute("SELECT movie_id, embedding FROM movie_embeddings")) if target else {}
        except sqlite3.OperationalError as error:
            if path or "readonly" not in str(error):
                raise
        # Killed in the middle of a commit. The next run is to roll that back; for now, a copy is.
        with tempfile.TemporaryDirectory() as folder:
            for file in self.path.parent.glob(self.path.name + "*"):
                shutil.copy(file, folder)
            return self.look(Path(folder) / self.path.name, "rw")

    def close(self) -> None:
        """There is nothing to do: the file goes with its folder."""


class Postgres:
    """The same in a Postgres that has no table movies yet, by way of psql."""

    def __init__(self, url: str, rows: list[tuple[int, str, str]]) -> None:
        self.url = url
        self.execute("CREATE TABLE movies (id bigint PRIMARY KEY, title text, overview text)")
        self.execute("COPY movies FROM STDIN", "".join(f"{key}\t{title}\t{text}\n" for key, title, text in rows))

    def execute(self, sql: str, given: str = "") -> str:
        """Execute a statement and return what it gives, with commas between the columns."""
        psql = ["psql", "-XqAt", "-F,", "-vON_ERROR_STOP=1", "-c", sql, self.url]
        return subprocess.run(psql, input=given, stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout

    def look(self) -> dict[int, bytes]:
        """Return the vectors stored."""
        if not self.execute("SELECT to_regclass('movie_embeddings')").strip():
            return {}
        lines = self.execute("SELECT movie_id, embedding FROM movie_embeddings").splitlines()
        found = (re.sub(r"[\[\]]", "", line).split(",") for line in lines)
        return {int(key): struct.pack(f"<{len(vector)}f", *map(float, vector)) for key, *vector in found}

    def close(self) -> None:
        """Leave the database as it was."""
        tables = "movie_embeddings, movies, movie_embeddings_claims, embedgen_provenance"
        self.execute(f"DROP TABLE IF EXISTS {tables}")


def members(group: int) -> list[int]:
    """Return the living processes of a group."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,pid=,stat="], stdout=subprocess.PIPE, text=True, check=True)
    processes = (line.split() for line in listed.stdout.splitlines())
    return [int(pid) for pgid, pid, state in processes if int(pgid) == group and not state.startswith("Z")]


class Run:
    """One run of the program, as a process group of its own, with a folder for all that it writes."""

    def __init__(self, folder: Path, *given: object) -> None:
        folder.mkdir()
        self.folder, self.began = folder, time.monotonic()
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            self.process = subprocess.Popen(command("--log-dir", folder, *given), env=environment(), stdout=out,
                stderr=err, stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip

    def wrote(self, pattern: str) -> str:
        """Return what it has written into the files of that pattern."""
        return "".join(path.read_text("utf-8", "replace") for path in sorted(self.folder.glob(pattern)))

    def figures(self) -> list[int]:
        """Return the report's total, ✓, ⊘ and ✗; an empty list if there is none."""
        found = [re.search(rf"{label}.*: (\d+)", self.wrote("out")) for label in ("processed", "✓ ", "⊘ ", "✗ ")]
        return [int(match[1]) for match in found if match]

    def kill(self, whole: bool) -> None:
        """Kill the whole group, or the parent alone."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if whole else os.kill)(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """Kill it if it still runs."""
        if self.process.poll() is None:
            self.kill(whole=True)


class Soak:
    """What one engine goes through."""

    def __init__(self, engine: str, options: argparse.Namespace, ollama: Ollama, folder: Path) -> None:
        self.engine, self.kills, self.ollama, self.folder = engine, options.kills, ollama, folder
        self.random = random.Random(f"{options.seed} {engine}")
        keys = range(1, options.rows + 1)
        bad = self.random.sample(keys, min(60, max(2, options.rows // 300)))
        self.poison = {key: list(REFUSALS)[place % 2] for place, key in enumerate(bad)}
        rows = [(key, f"Film {key} {self.poison.get(key, 'sound')}", f"What happens in {key}.") for key in keys]
        self.texts = {key: f"Title: {title} | Description: {overview}" for key, title, overview in rows}
        self.expected = {key: blob(text) for key, text in self.texts.items() if key not in self.poison}
        self.store = Postgres(options.database, rows) if options.database else SQLite(folder, rows)
        self.cleanup = contextlib.ExitStack()
        self.cleanup.callback(self.store.close)
        self.stored: dict[int, bytes] = {}
        self.problems: list[str] = []
        self.ends: Counter[int] = Counter()  # runs that were not killed, by exit code
        self.started = self.killed = self.hits = self.looks = self.failed = 0
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        """Print an event."""
        print(f"{time.monotonic() - self.began:6.1f} s {len(self.stored):6} rows  {text}", flush=True)

    def expect(self, condition: object, problem: str) -> None:
        """Note a problem unless the condition holds."""
        if not condition:
            self.problems.append(problem.splitlines()[0])
            self.say(f"WRONG: {problem}")

    def look(self) -> None:
        """Look at the database: no vector may be wrong, and none of those seen before may be missing."""
        before = self.stored
        try:
            self.stored = self.store.look()
        except (sqlite3.Error, ValueError) as error:
            self.expect(False, f"the database cannot be read: {error}")
            return
        wrong = [key for key, vector in self.stored.items() if self.expected.get(key) != vector]
        self.expect(not wrong, f"{len(wrong)} rows have a vector that is not theirs: {wrong[:10]}")
        lost = sorted(before.keys() - self.stored.keys())
        self.expect(not lost, f"{len(lost)} rows have lost their vector: {lost[:10]}")
        self.looks += 1

    def start(self, seconds: float) -> Run:
        """Start the program, with a server so slow that what is left takes about so long."""
        self.started += 1
        rate = max(50.0, (len(self.expected) - len(self.stored)) / seconds)
        self.ollama.configure(seconds_per_text=1 / rate)
        given = ["--document-prefix", "", "--server", self.ollama.url]
        given += ["--database", self.store.url, "--engine", self.engine]
        given += ["--timeout", str(max(2.0, 400 / rate))]  # enough for the queue that ten requests make
        given += ["--concurrent", "10", "--batch-size", "16"] if self.started % 2 else []
        run = Run(self.folder / f"run-{self.started}", *given)
        self.cleanup.callback(run.end)  # if this program is interrupted, that one must not go on
        return run

    def watch(self, run: Run, seconds: float, away_after: float | None) -> bool:
        """Let it run for so long at most, looking at random moments; return whether it came to its end."""
        due, before = self.random.uniform(0.3, 1), len(self.stored)
        while (elapsed := time.monotonic() - run.began) < seconds and run.process.poll() is None and not self.problems:
            time.sleep(0.02)
            if away_after is not None and elapsed >= away_after:
                self.ollama.away(AWAY)
                self.say(f"the server goes away for {AWAY:g} s")
                away_after = None
            if elapsed >= due:
                self.look()
                due = elapsed + self.random.uniform(0.3, 1)
        if run.process.poll() is None:
            return False
        self.look()
        self.judge_end(run, before)
        time.sleep(1)
        return True

    def judge_end(self, run: Run, before: int) -> None:
        """Judge a run that came to its end by itself, `before` rows having been stored when it began."""
        code, figures, error = run.process.returncode, run.figures(), run.wrote("err").strip()
        self.ends[code] += 1
        self.say(f"run {self.started} ended with {code}: {figures} {error}")
        self.expect(code in (1, 3), f"exit code {code}, though rows are refused")
        self.expect(self.ends[code] <= MOST_ENDS, f"too many runs ended with {code}")
        one_sentence = re.fullmatch("error: .*", error) and "fault of embedgen" not in error
        self.expect(one_sentence if code == 3 else not error, f"on standard error with exit code {code}: {error!r}")
        self.expect(code == 3 or "Traceback" not in run.wrote("*.log*"), f"a traceback in {run.folder}")
        self.expect(not members(run.process.pid), "processes were left after the end")
        if figures or code == 1:
            generated, missing = len(self.stored) - before, len(self.texts) - len(self.stored)
            failed = missing if code == 1 else figures[-1]
            right = [generated + before + failed, generated, before, failed]
            self.expect(figures == right, f"the report has {figures} instead of {right}")
        if code == 1 and (good := len(self.expected) - len(self.stored)):
            self.failed += good
            lines = re.findall(r"(?m)((\d+) failed: .*)$", run.wrote("*.log*"))
            self.say(f"good rows that failed: {[line for line, key in lines if int(key) in self.expected]}")

    def kill(self, run: Run) -> None:
        """Kill it, and look at what is left."""
        family, whole, moment = members(run.process.pid), self.random.random() < 0.5, time.monotonic()
        run.kill(whole)
        while (left := members(run.process.pid)) and time.monotonic() - moment < LEAVE:
            time.sleep(0.02)
        gone = time.monotonic() - moment
        requests = [entry for entry in self.ollama.log() if entry["texts"] and run.began <= entry["start"] < moment]
        hit = any((entry["end"] or moment) >= moment for entry in requests)
        self.killed += 1
        self.hits += hit
        self.look()
        who = f"{'the whole group' if whole else 'the parent alone'} of {len(family)} processes"
        when = f"after {moment - run.began:.1f} s, {'at work' if hit else 'not at work'}, all gone {gone:.1f} s later"
        self.say(f"kill {self.killed}: {who}, {when}")
        if left:
            self.expect(False, f"{len(left)} processes are left {LEAVE:g} s after the kill")
            run.kill(whole=True)
        self.expect("Traceback" not in run.wrote("err") + run.wrote("*.log*"), f"a traceback in {run.folder}")

    def kill_often(self) -> None:
        """Start and kill, until enough kills have hit a run at work; the server goes away once."""
        away_at = self.random.randrange(self.kills) if self.kills else 0
        while self.hits < self.kills and self.killed < 3 * self.kills and not self.problems:
            # Half as long again as the kills take, so that something is left for the end.
            run = self.start((self.kills - self.hits) * sum(KILL_AFTER) / 2 * 1.5)
            seconds, away_after = self.random.uniform(*KILL_AFTER), None
            if self.killed >= away_at:
                away_at, away_after = sys.maxsize, self.random.uniform(0.3, seconds)
            if not self.watch(run, seconds, away_after):
                self.kill(run)
        self.expect(self.hits >= self.kills or self.problems, f"only {self.hits} kills hit a run at work")

    def finish(self) -> None:
        """Let the program come to its end, as often as good rows are left, and judge what came of it."""
        away_after: float | None = self.random.uniform(1, 4)
        while not self.problems:
            run = self.start(20)
            limit = 300 + len(self.texts) / 50
            if not self.watch(run, limit, away_after):
                end = "\n".join(run.wrote("*.log").splitlines()[-10:])
                self.expect(self.problems, f"run {self.started} is not done after {limit:.0f} s; its log ends:\n{end}")
                run.end()
            away_after = None
            if run.process.returncode == 1 and self.stored.keys() >= self.expected.keys():
                break
        if not self.problems:
            # A run that takes over from one just killed need not try again what failed there: its log has that.
            logs = run.folder.parent.rglob("*.log*")
            log = "".join(path.read_text("utf-8", "replace") for path in logs)
            unnamed = [key for key, word in self.poison.items() if f" {key} failed: {REFUSALS[word]}\n" not in log]
            self.expect(not unnamed, f"rows without a line in the log: {unnamed}")
            asked = Counter(self.ollama.texts())
            ratio = sum(asked[text] for text in self.texts.values()) / len(self.texts)
            most = max(asked[self.texts[key]] for key in self.expected)
            self.say(f"{ratio:.2f} texts were asked for by row, that of a good row {most} times at most")
            self.expect(1 <= ratio <= MOST_ASKED, f"{ratio:.2f} texts were asked for by row")

    def run(self) -> bool:
        """Go through it all, say how it went, and return whether it went well."""
        refuse = [{"contains": word, "status": 400, "error": error} for word, error in REFUSALS.items()]
        self.ollama.configure(refuse=refuse, faults=FAULTS, slots=1)
        with self.cleanup:
            self.kill_often()
            self.finish()
        print(f"soak {self.engine}: {len(self.texts)} rows, {self.killed} kills, {self.hits} of them at work, "
              f"{self.looks} looks, {self.ends[3]} ends with 3, {self.failed} good rows failed and were done later, "
              f"{time.monotonic() - self.began:.0f} s: {'; '.join(self.problems) or 'ok'}", flush=True)  # fmt: skip
        return not self.problems


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Kill embedgen again and again, and prove that nothing is lost.")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20, help="that hit a run at work, for each engine")
    parser.add_argument("--engine", choices=[*ENGINES, "both"], default="both")
    parser.add_argument("--database", metavar="URL", help="a Postgres without a table movies (default: SQLite)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # tidies up, as Ctrl-C does
    code = 0
    for engine in ENGINES if options.engine == "both" else [options.engine]:
        folder = Path(tempfile.mkdtemp(prefix=f"embedgen-soak-{engine}-"))
        with Ollama(seed=options.seed) as ollama:
            fine = Soak(engine, options, ollama, folder).run()
        if fine:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"what it left is in {folder}", flush=True)
        code = code if fine else 1
    return code


if __name__ == "__main__":
    sys.exit(main())
