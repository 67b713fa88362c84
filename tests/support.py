"""What the tests share: running the program as its user does, and looking at what it left."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import itertools
import os
import py_compile
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar
from unittest import mock

import embedgen
from tests.databases import Postgres, SQLite, postgres_url
from tests.ollama import Ollama, blob

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "embedgen.py"
MOVIES = ROOT / "tests" / "data" / "movies.csv"
ENGINES = ("async", "process")
T = TypeVar("T")

# Under Wine, paths of the Linux below exist, too.
PROC = os.name == "posix" and Path("/proc/self/stat").exists()
DEV_FULL = os.name == "posix" and Path("/dev/full").exists()

# Set in continuous integration: the sizes that the promises name, where the suite takes smaller ones.
FULL = os.environ.get("EMBEDGEN_TEST_FULL") == "1"
# For tests that take seconds, since they wait for what processes do: elsewhere the engine that has more of them.
SLOW_ENGINES = ENGINES if FULL else ("process",)


def with_engines(values: Iterable[T]) -> Iterable[tuple[str, T]]:
    """Return each engine with each value in the full size, else each value with one of the engines, in turn."""
    return itertools.product(ENGINES, values) if FULL else zip(itertools.cycle(ENGINES), values)


# In a shell's background Ctrl-C is ignored, under nohup a hang-up; programs started from there ignore them, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How worker processes are started: the program's own choice, or fork or spawn.
START_METHOD = os.environ.get("EMBEDGEN_TEST_START_METHOD", "")
if START_METHOD:
    embedgen.START_METHOD = START_METHOD

# Seconds for which a run in the tests' own process waits before it tries again.
SHORT_WAITS = {"FIRST_WAIT": 0.02, "RETRY_SECONDS": 0.02}

# For databases, whose commits need not wait for a disk there; what is to be executed belongs elsewhere.
SHM = Path("/dev/shm")
IN_MEMORY = SHM if os.name == "posix" and SHM.is_dir() and shutil.disk_usage(SHM).free > 2 << 30 else None

# What may be skipped on Windows, by the words of the skip: all else that is skipped there counts as a failure.
SKIPPED_ON_WINDOWS = {
    "the package psycopg is not installed; it is needed for Postgres only": "its server does not run under Wine",
    "Windows has no such signals": "SIGTERM and SIGHUP cannot be sent there; Ctrl-C is tested in test_systems",
    "needs kill -9": "no signal is so called there",
    "an empty environment starts no Python on Windows": "it needs SYSTEMROOT",
    "a POSIX shell is needed": "as for closing a stream, or as the other end of a pipe",
    "the current folder cannot be removed there": "nor a file that is open",
    "needs /dev/full": "nothing else is full at once",
    "the size limit is set as Linux has it": "nothing else makes a disk full at once",
    "needs the C compiler of a Linux": "for a disk without locks",
    "needs a device that is full": "nothing else is full at once",
}

# A script is compiled at each start, which takes as long as most of what is run here: processes import it instead.
py_compile.compile(str(PROGRAM), quiet=2)


def command(*arguments: object, **constants: object) -> list[str]:
    """Return the command line that runs the program, with other values for some of its constants.

    Without the packages that are installed, which only Postgres needs, Python starts sooner.
    """
    if START_METHOD:
        constants.setdefault("START_METHOD", START_METHOD)
    changes = "".join(f"embedgen.{name} = {value!r}; " for name, value in constants.items())
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; import embedgen; {changes}sys.exit(embedgen.main())"
    given = list(map(str, arguments))
    alone = [] if any(one.startswith("postgres") for one in given) else ["-S"]
    return [sys.executable, *alone, "-c", code, *given]


OURS = ("OLLAMA_", "EMBEDGEN_", "DATABASE_URL", "OPENAI_", "PYTHONIOENCODING", "PYTHONUTF8")  # what the program reads
# On Windows, redirected output is in the code page, cp1252, whatever the console has.
ALWAYS = {"PYTHONUTF8": "1"} if os.name == "nt" else {}


@contextlib.contextmanager
def changed_environment(extra: Mapping[str, str] | None) -> Iterator[None]:
    """Have this process's environment as environment() has it, within the block."""
    changes = {name: None for name in os.environ if name.startswith(OURS)}
    wanted: dict[str, str | None] = {**changes, **ALWAYS, **(extra or {})}
    before = {name: os.environ.get(name) for name in wanted}

    def change(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    change(wanted)
    try:
        yield
    finally:
        change(before)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without what the program would read, and with `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return {**kept, **ALWAYS, **(extra or {})}


def decoded(written: bytes) -> str:
    """Return what a program has written to a pipe, with the line ends of every other system."""
    return written.decode("utf-8").replace(os.linesep, "\n")


def without_progress(out: str) -> str:
    """Return an output without the progress lines before the last, which only runs of half a minute print."""
    return re.sub(r"(?m)^Generating embeddings: .*\n(?=Generating embeddings: )", "", out)


# On Windows, Ctrl-C goes to all processes of a console: whoever presses it leaves its own console for that one.
PRESS_CONTROL_C = """
import ctypes, sys
kernel = ctypes.windll.kernel32
kernel.FreeConsole()
assert kernel.AttachConsole(int(sys.argv[1])) and kernel.SetConsoleCtrlHandler(None, True)
assert kernel.GenerateConsoleCtrlEvent(0, 0)
"""


def press_control_c(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a started program and its workers, as Ctrl-C in its terminal does."""
    if os.name == "nt":
        subprocess.run([sys.executable, "-c", PRESS_CONTROL_C, str(process.pid)], check=True)
    else:
        os.killpg(process.pid, signal.SIGINT)


class Watched(io.BytesIO):
    """Bytes in memory; after each write, whoever watches is shown all that was written so far."""

    def __init__(self, watch: Callable[[str], object]) -> None:
        super().__init__()
        self.watch = watch

    def write(self, data: Any) -> int:
        written = super().write(data)
        self.watch(self.getvalue().decode("utf-8"))
        return written


def captured(watch: Callable[[str], object] | None = None) -> io.TextIOWrapper:
    """Return a stream such as standard output is, into memory."""
    buffer = Watched(watch) if watch else io.BytesIO()
    return io.TextIOWrapper(buffer, encoding="utf-8", newline="\n", write_through=True)


def text_of(stream: io.TextIOWrapper) -> str:
    """Return what was written to a captured stream."""
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode("utf-8")


class Finished(NamedTuple):
    """How a run of the program ended."""

    code: int
    out: str
    err: str

    @property
    def tally(self) -> tuple[int, int, int]:
        """The summary's ✓, ⊘ and ✗."""
        found = [re.search(rf"   {mark}  .*: (\d+)", self.out) for mark in "✓⊘✗"]
        assert all(found), self.out + self.err
        good, skipped, failed = (int(match[1]) for match in found if match)
        return good, skipped, failed


@functools.lru_cache(None)
def shared_double(number: int = 0, *tls: str) -> Ollama:
    """Return a double that all tests share: to start one for each class would take as long as the tests do."""
    double = Ollama(*tls)
    atexit.register(double.close)
    return double


def another_double(number: int = 1, *tls: str, **settings: Any) -> Ollama:
    """Return another double than the test's own, as if it had just been started with these settings."""
    double = shared_double(number, *tls)
    double.reset()
    double.configure(**settings)
    return double


@contextlib.contextmanager
def said_to_all(answer: bytes) -> Iterator[int]:
    """Say this to whoever connects, whatever is asked, within the block; gives the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def work() -> None:
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    if over.is_set():
                        return
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):  # what is left unread would turn the end into a reset
                        pass

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:  # without the thread, since later tests fork
            over.set()
            socket.create_connection(listener.getsockname()).close()
            thread.join()


TLS = ROOT / "tests" / "data" / "tls"  # made by the script `make` that lies there; valid to 2120 but for one
AUTHORITY = str(TLS / "root.pem")


def tls_double(name: str, **settings: Any) -> Ollama:
    """Return a double that speaks TLS with one of the certificates."""
    return another_double(0, str(TLS / f"{name}.pem"), str(TLS / f"{name}.key"), **settings)


class Case(unittest.TestCase):
    """A test with a folder of its own, in which the program runs, a database, and a double of Ollama.

    The same tests are run on Postgres by a subclass `class XOnPostgres(OnPostgres, X)`.
    """

    ollama: Ollama
    db: SQLite | Postgres
    engine: ClassVar[str] = ""  # that runs are told to use; "" for the program's own choice
    prefixed = False  # whether texts get the prefix of their model's card
    path = ""  # of the server's address
    maxDiff = None

    @classmethod
    def setUpClass(cls) -> None:
        cls.ollama = shared_double()

    def setUp(self) -> None:
        self.ollama.reset()
        self.folder = Path(tempfile.mkdtemp(prefix="embedgen-test-", dir=IN_MEMORY))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.database = self.folder / "movies.db"
        self.open_database()

    def open_database(self) -> None:
        """Have an empty database."""
        self.db = SQLite(self.folder)

    # Running the program

    def arguments(self, *given: object, **constants: object) -> list[str]:
        """Return a command line, with the double as the server unless another is given.

        Without a prefix before the texts, so that the double sees them as they are, unless `self.prefixed`.
        """
        flags = [] if "--server" in given else ["--server", self.ollama.url + self.path]
        flags += [] if self.prefixed or "--document-prefix" in given else ["--document-prefix", ""]
        if self.engine and not {"--engine", "--search", "--similar", "--status", "--prune"}.intersection(
            map(str, given)
        ):
            flags += ["--engine", self.engine]
        flags += [] if "--database" in given else self.db.flags
        return command("--log-dir", self.folder / "logs", *flags, *given, **constants)

    def run_program(
        self,
        *given: object,
        env: Mapping[str, str] | None = None,
        real: bool = False,
        timeout: float = 300,
        **more: Any,
    ) -> Finished:
        """Run the program to its end: in this process, which is quick, or a `real` one of its own."""
        if not real:
            return self.run_here(*given, env=env)
        done = subprocess.run(
            self.arguments(*given),
            cwd=self.folder,
            env=environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=timeout,
            **more,
        )
        return Finished(done.returncode, decoded(done.stdout), decoded(done.stderr))

    def run_here(
        self,
        *given: object,
        env: Mapping[str, str] | None = None,
        watch: Callable[[str], object] | None = None,
    ) -> Finished:
        """Run the program in this process; `watch` is shown its standard output as it grows."""
        arguments = self.arguments(*given)
        return self.call(arguments[arguments.index("--log-dir") :], env, watch)

    def call(
        self,
        flags: list[str],
        env: Mapping[str, str] | None = None,
        watch: Callable[[str], object] | None = None,
    ) -> Finished:
        """Run the program in this process with these flags and no more."""
        here, out, err = os.getcwd(), captured(watch), captured()
        handlers = {number: signal.getsignal(number) for number in embedgen.SIGNALS}
        waits = {name: min(getattr(embedgen, name), most) for name, most in SHORT_WAITS.items()}
        os.chdir(self.folder)
        try:
            with changed_environment(env), mock.patch.multiple(embedgen, **waits):
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
                    # The threads are the double's; the program's own process has none when it forks.
                    warnings.filterwarnings("ignore", ".*multi-threaded")
                    code = embedgen.main(flags)
        finally:
            os.chdir(here)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Finished(code, text_of(out), text_of(err))

    def start_program(
        self, *given: object, env: Mapping[str, str] | None = None, **constants: object
    ) -> subprocess.Popen[bytes]:
        """Start the program, in a process group or a console of its own, and return at once."""
        process = subprocess.Popen(
            self.arguments(*given, **constants),
            cwd=self.folder,
            env=environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self.addCleanup(self.end, process)
        return process

    def ended(self, process: subprocess.Popen[bytes], seconds: float = 300) -> Finished:
        """Return how a program has ended; the time only bounds a test that fails."""
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.fail(f"it did not end within {seconds} s: {self.log()[-2000:]}")
        return Finished(process.returncode, decoded(out), decoded(err))

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill what is left of a process group, and close its pipes."""
        if hasattr(os, "killpg"):
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.kill()
        process.communicate()

    def succeed(self, *given: object, **more: Any) -> Finished:
        """Run the program; it must end with 0 and say nothing on standard error."""
        done = self.run_program(*given, **more)
        self.assertEqual((done.code, done.err), (0, ""), done.out)
        return done

    def refuse(self, code: int, *given: object, words: Sequence[str] = (), **more: Any) -> str:
        """Run the program; it must end with this code and one sentence that has these words in it."""
        done = self.run_program(*given, **more)
        self.assertEqual(done.code, code, done.err + done.out)
        self.assertNotIn("Traceback", done.err)
        self.assertRegex(done.err, r"\Aerror: .*\n\Z")
        for word in words:
            self.assertIn(word, done.err)
        return done.err

    def log(self) -> str:
        """Return what the program has logged, with both engines; it may be about to write a character."""
        return "".join(path.read_text("utf-8", "replace") for path in sorted((self.folder / "logs").glob("*.log*")))

    def asked(self) -> list[str]:
        """Return the texts that the server was asked for, but for the known-good one, which is no row's."""
        return [text for text in self.ollama.texts() if not text.endswith(embedgen.KNOWN_GOOD)]

    # The database

    def wipe(self) -> None:
        """Start anew, without a table."""
        self.db.wipe()

    def execute(self, sql: str, parameters: Iterable[Sequence[Any]] | None = None) -> list[Any]:
        """Execute a statement, once or for each of `parameters`, and return its rows."""
        return self.db.execute(sql, parameters)

    def make_movies(self, count: int, title: Callable[[int], str] = "Film {}".format) -> None:
        """Make the table movies, with the keys from 1 to `count`."""
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT, overview TEXT)")
        rows = [(key, title(key), f"What happens in {key}.") for key in range(1, count + 1)]
        self.execute("INSERT INTO movies VALUES (?, ?, ?)", rows)

    def expected(self) -> dict[Any, bytes]:
        """Return the vector that each row of movies must have."""
        return {
            key: blob(f"Title: {title} | Description: {overview}")
            for key, title, overview in self.execute("SELECT id, title, overview FROM movies")
        }

    def stored(self, target: str = "movie_embeddings", key: str = "movie_id") -> dict[Any, bytes]:
        """Return the vectors in a target."""
        return self.db.vectors(target, key)

    def assert_complete(self, but: Iterable[int] = ()) -> None:
        """Every row of movies must have its own vector, but for some that must have none."""
        expected, stored, but = self.expected(), self.stored(), set(but)
        self.assertEqual(set(expected) - but, set(stored))
        wrong = [key for key in stored if stored[key] != expected[key]]
        self.assertEqual(wrong, [])
        self.assertEqual(self.db.check(), "ok")

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 300.0) -> Any:
        """Wait until something is the case; the time only bounds a test that fails."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = condition()
            if found:
                return found
            time.sleep(0.02)
        raise AssertionError(f"not within {seconds} s: {what}")


class OnPostgres(Case):
    """Put before another Case, it has that one's tests run on Postgres."""

    def setUp(self) -> None:
        postgres_url()  # skips the test where there is none
        super().setUp()

    def open_database(self) -> None:
        self.db = Postgres(self.folder)
