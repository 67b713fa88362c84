"""What differs between Linux, macOS and Windows: limits, the words of errors, the addresses of a name."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import unittest
from typing import Any
from unittest import mock

import embedgen
from tests.support import (
    AUTHORITY,
    ENGINES,
    MOVIES,
    PROGRAM,
    START_METHOD,
    Case,
    decoded,
    environment,
    press_control_c,
    tls_double,
)
from tests.test_readme import blocks, without_times

# How often Ctrl-C is pressed: it may come at a moment when a process is just being started.
CONTROL_C_TURNS = int(os.environ.get("EMBEDGEN_TEST_CONTROL_C", 1))

REFUSED = "The remote computer refused the network connection"


def windows_error(winerror: int, words: str) -> OSError:
    """Return an error as Windows raises it: with the number of an errno that often fits badly, and words of its own."""
    if os.name == "nt":
        return OSError(None, words, None, winerror)
    error = mock.MagicMock(spec=OSError)
    error.__str__.return_value = f"[WinError {winerror}] {words}"
    return error


class Words(unittest.TestCase):
    def test_of_network_errors(self) -> None:
        lost = "The specified network name is no longer available"
        lines = ("[Errno 111] Connect call failed ('::1', 1, 0, 0)", "[Errno 113] Connect call failed ('1.2.3.4', 1)")
        for error, words in (
            (windows_error(64, lost), "the specified network name is no longer available"),
            (windows_error(10054, "Verbindung zurückgesetzt"), "verbindung zurückgesetzt"),
            (
                OSError(f"Multiple exceptions: [WinError 1225] {REFUSED}, [WinError 121] x"),
                REFUSED.replace("The", "the"),
            ),
            (ConnectionRefusedError(61, "Connection refused"), "connection refused"),
            (ConnectionResetError(104, "x"), os.strerror(104).replace("C", "c")),
            (OSError(f"Multiple exceptions: {', '.join(lines)}"), os.strerror(111).replace("C", "c")),
            (OSError(28, "x"), "no space left on device"),
        ):
            self.assertEqual(embedgen.describe(error).lower(), words.lower(), repr(error))


class Loops(unittest.TestCase):
    def test_what_nobody_waits_for_is_not_printed(self) -> None:
        """As of a connection that Windows resets after its answer; the loop is that of both engines."""
        loop = embedgen.Conversations([]).loop
        self.addCleanup(loop.close)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            loop.call_exception_handler({"message": "x", "exception": ConnectionResetError()})
        self.assertEqual(said.getvalue(), "")


class Refused(Case):
    def test_a_server_that_is_not_there(self) -> None:
        self.make_movies(1)
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{unused.getsockname()[1]}"
            for engine in ENGINES:
                self.refuse(3, "--server", address, "--engine", engine,
                            words=[f"cannot reach Ollama at {address} (connection refused). "])  # fmt: skip


class Limits(Case):
    """As many workers and connections as the system allows, and one sentence if that is fewer than asked for."""

    def check(self, engine: str, asked: int, allowed: int, **more: Any) -> None:
        """Run with that many requests in flight, of which the system allows fewer."""
        self.make_movies(200)
        flags = ("--engine", engine, "--workers", asked, "--batch-size", 1)
        done = self.run_program(*flags, real=True, **more)
        said = f"the system allows {allowed} requests in flight, not {asked}; going on with {allowed}"
        self.assertEqual((done.code, done.err), (0, f"warning: {said}\n"))
        self.assertIn(f"Workers/Concurrent: {allowed}\n", done.out)
        self.assertIn(f" - WARNING - {said}\n", self.log())
        self.assert_complete()


if os.name == "nt":

    class Windows(Limits):
        def test_more_workers_than_can_be_waited_for(self) -> None:
            self.check("process", 64, 60)

    class QuickStart(Case):
        def test_the_readmes_first_commands_under_cmd(self) -> None:
            shutil.copy(PROGRAM, self.folder)
            (self.folder / "tests" / "data").mkdir(parents=True)
            shutil.copy(MOVIES, self.folder / "tests" / "data")
            env = environment({"OLLAMA_HOST": self.ollama.url})
            env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]
            first, second, *_ = blocks()
            for block in (first, second):
                for line in block.text.splitlines():
                    if line.startswith("python "):
                        with self.subTest(line):
                            done = subprocess.run(
                                f"cmd /c {line}", cwd=self.folder, env=env,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            )  # fmt: skip
                            self.assertEqual((done.returncode, decoded(done.stderr)), (0, ""))
                wanted = without_times(block.output.replace("logs/", "logs\\"))
                given = without_times(decoded(done.stdout))[-len(wanted) :]
                for line, want in zip(given, wanted):
                    self.assertTrue(line.startswith(want.rstrip("…")), line)  # a longer one goes on there
                self.assertEqual(len(given), len(wanted))

    class Drives(Case):
        def test_a_drive_stands_after_three_slashes_or_four(self) -> None:
            self.make_movies(2)
            for slashes in ("///", "////"):
                self.succeed("--database", f"sqlite:{slashes}{self.database.as_posix()}")
            self.assert_complete()

    class CodePage(Case):
        def test_redirected_output_is_in_the_systems_code_page(self) -> None:
            self.make_movies(10)
            done = self.start_program(env={"PYTHONUTF8": "0"})
            out, err = done.communicate(timeout=300)
            self.assertEqual((done.returncode, err), (0, b""))
            self.assertIn(b"+=10, -=0, x=0]", out)

    class OpenLog(Case):
        def test_a_log_that_another_program_has_open_grows(self) -> None:
            self.make_movies(50)
            self.execute("UPDATE movies SET title = NULL, overview = NULL")
            self.run_program()
            with open(self.folder / "logs" / "generate_embeddings_async.log", encoding="utf-8"):
                with mock.patch.object(embedgen, "LOG_BYTES", 1500):
                    self.assertEqual(self.run_program().err, "")
            self.assertEqual(len(re.findall(r"movie \d+ failed: no text\n", self.log())), 100)

else:

    class OpenFiles(Limits):
        def limited(self) -> None:
            """Have few open files, in a new process."""
            import resource

            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

        def test_more_workers_than_there_may_be_open_files(self) -> None:
            self.check("process", 90, (64 - embedgen.SPARE_FILES) // 3, preexec_fn=self.limited)

        def test_more_connections_than_there_may_be_open_files(self) -> None:
            self.ollama.configure(network=0.02)
            self.check("async", 90, 64 - embedgen.SPARE_FILES, preexec_fn=self.limited)


class ControlC(Case):
    def test_it_ends_the_run_with_its_summary_and_workers_are_silent(self) -> None:
        for engine in ENGINES:
            for turn in range(CONTROL_C_TURNS):
                with self.subTest(engine=engine, turn=turn):
                    self.wipe()
                    self.ollama.reset()
                    self.make_movies(1000)
                    self.ollama.configure(seconds_per_text=0.01, slots=1)
                    flags = ("--engine", engine, "--workers", 3, "--batch-size", 4)
                    process = self.start_program(*flags, UNSAVED_SECONDS=0.1)
                    self.wait_for(lambda: "movie_embeddings" in self.db.tables() and self.stored(), "the first rows")
                    press_control_c(process)
                    done = self.ended(process)
                    self.assertEqual((done.code, done.err), (130, ""))
                    self.assertIn("Movie Embedding Generator Stopped", done.out)
                    stored = len(self.stored())
                    self.assertEqual(done.tally, (stored, 0, 0))
                    self.assertLess(stored, 1000)


class Addresses(Case):
    """A name with an address that refuses before the one that answers: on Windows, each refusal takes two seconds."""

    def resolve(self, host: str, port: Any, family: int = 0, *more: Any, **others: Any) -> list[Any]:
        """Resolve a name as many systems resolve localhost; note who was given the address that refuses."""
        found: list[Any] = []
        if family in (0, socket.AF_INET6) and host == "localhost":
            found.append((socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)))
            with open(self.folder / "tried", "a") as tried:
                tried.write("x")
        if family in (0, socket.AF_INET):
            found.append((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)))
        return found

    def run_resolved(self, *flags: object) -> int:
        """Run over a server's name; return how often the address that refuses was tried."""
        with mock.patch("socket.getaddrinfo", self.resolve):
            self.succeed("--force", "--batch-size", 1, "--concurrent", 3, *flags)
        tried = self.folder / "tried"
        count = len(tried.read_text())
        tried.unlink()
        return count

    def test_one_that_refuses_is_tried_once_and_not_for_each_connection(self) -> None:
        self.make_movies(20)
        for engine in ENGINES if START_METHOD != "spawn" and os.name != "nt" else ENGINES[:1]:
            with self.subTest(engine=engine):
                server = self.ollama.url.replace("127.0.0.1", "localhost")
                before = len({entry["connection"] for entry in self.ollama.log()})
                self.assertEqual(self.run_resolved("--server", server, "--engine", engine), 1)
                self.assertGreater(len({entry["connection"] for entry in self.ollama.log()}), before + 1)
                self.assert_complete()

    def test_the_name_stays_what_certificates_are_for(self) -> None:
        self.make_movies(20)
        server = tls_double("good")
        flags = ("--server", server.url.replace("127.0.0.1", "localhost"), "--ca-file", AUTHORITY)
        self.assertEqual(self.run_resolved(*flags), 1)
        self.assert_complete()


class Help(Case):
    def test_an_absolute_path_is_shown_as_the_system_has_it(self) -> None:
        form = "sqlite:///C:/absolute.db" if os.name == "nt" else "sqlite:////absolute.db"
        self.assertIn(form, " ".join(self.run_program("--help", real=True).out.split()))
        self.refuse(2, "--database", "mysql://x", words=[form])


if __name__ == "__main__":
    unittest.main()
