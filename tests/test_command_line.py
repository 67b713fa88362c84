"""Usage, errors and surroundings: one sentence, the right exit code, nothing lost."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import unittest
from typing import Any
from unittest import mock

import embedgen
from tests.ollama import held_socket
from tests.support import (
    DEV_FULL,
    ENGINES,
    FULL,
    MOVIES,
    PROGRAM,
    SLOW_ENGINES,
    Case,
    command,
    decoded,
    environment,
    with_engines,
)


class Usage(Case):
    def test_wrong_flags(self) -> None:
        for flags, words in [
            (["--engine", "thread"], ["--engine", "async", "process"]),
            (["--workers", "0"], ["--workers", "0"]),
            (["--concurrent", "-1"], ["--concurrent"]),
            (["--concurrent", "many"], ["many"]),
            (["--batch-size", "1.5"], ["1.5"]),
            (["--limit", "-1"], ["--limit"]),
            (["--timeout", "0"], ["--timeout"]),
            (["--timeout", "nan"], ["--timeout"]),
            (["--option", "num_ctx"], ["KEY=VALUE"]),
            (["--nonsense"], ["--nonsense"]),
            (["stray"], ["stray"]),
            (["--forc"], ["--forc", "Did you mean --force?"]),
            (["--where", ""], ["--where", "Give one"]),
            (["--columns", " "], ["--columns", "Give one"]),
            (["--server", ""], ["--server", "Give one"]),
            (["--columns", "a", "--text", "{a}"], ["--columns", "--text"]),
            (["--target", "a", "--out-column", "b"], ["--target", "--out-column"]),
            (["--prune", "--out-column", "b"], ["--prune", "--out-column"]),
            (["--search", "x", "--status"], ["--search", "--status"]),
            (["--status", "--dry-run"], ["--status", "--dry-run"]),
            (["--top", "3"], ["--top", "--search or --similar"]),
            (["--on-long", "leave"], ["--on-long", "cut|split|fail|skip"]),
            (["--server", "hash"], ['"hash:"']),
            (["--quiet", "--json"], ["--quiet", "--json"]),
            (["--server", "ftp://host"], ["ftp://host", "http(s)://"]),
            (["--server", "http://host:99999"], ["99999"]),
            (["--server", "http://ho st"], ["ho st"]),
            (["--server", "http://host/a b"], ["http://host/a b"]),
            (["--database", "mysql://host/db"], ["mysql://host/db", "sqlite:///"]),
            (["--database", "movies"], ["movies", ".db"]),
            (["--database", "sqlite:///"], ["sqlite:///"]),
            (["--database", "sqlite+aiosqlite:///x.db"], ["Write sqlite:///x.db"]),
            (["--database", "postgresql+asyncpg://u:p@host/db"], ["Write postgresql://***@host/db"]),
            (["--database", "postgresql://user:p@ss@host/db"], ["postgresql://***@host/db", "%40"]),
        ]:
            with self.subTest(flags=flags):
                self.refuse(2, *flags, words=words)

    def test_help(self) -> None:
        script = [sys.executable, "-S", str(PROGRAM), "--help"]
        shown = decoded(subprocess.run(script, stdout=subprocess.PIPE, check=True).stdout)
        readme = (PROGRAM.parent / "README.md").read_text("utf-8")
        for flag in re.findall(r"^\| `(--[a-z-]+)", readme, re.MULTILINE):
            self.assertRegex(shown, rf"\n  {flag}\b")
        self.assertLessEqual(max(map(len, shown.splitlines())), 100)
        groups = re.findall(r"^(\w[\w ]+):$", shown, re.MULTILINE)
        self.assertEqual(groups[1:], ["What to embed", "How to embed", "Server and model", "Instead of embedding",
                                      "Output", "Examples"])  # fmt: skip
        self.assertEqual(shown.partition("Examples:")[2].count("\n  python embedgen.py"), 4)
        self.assertIn("Exit codes: 0 ", shown)

    def test_version(self) -> None:
        version = decoded(subprocess.run(command("--version"), stdout=subprocess.PIPE, check=True).stdout)
        self.assertEqual(version, f"embedgen {embedgen.__version__}\n")

    def test_names_that_do_not_exist(self) -> None:
        self.refuse(3, words=["movies.db", "--database", "--load"])
        self.assertFalse(self.database.exists())
        self.make_movies(1)
        self.refuse(3, "--database", "other.db", words=["other.db", "--database", "--load"])
        self.refuse(2, "--table", "films", words=["films", "movies"])
        self.refuse(2, "--id", "key", words=["key", "id, title, overview"])
        self.refuse(2, "--where", "yaer > 1", words=["yaer"])
        self.refuse(2, "--columns", "name", words=["name", "id, title, overview"])

    def test_files_that_are_no_database(self) -> None:
        self.database.write_text("This is a text, and a long one, but not what SQLite writes. " * 20)
        self.refuse(3, words=["movies.db", "not a"])
        self.database.unlink()
        self.database.mkdir()
        self.refuse(3, words=["movies.db"])

    def test_what_sqlite_says_is_not_mistaken(self) -> None:
        self.make_movies(3)
        self.execute("CREATE VIEW broken AS SELECT id, fullname AS title FROM movies")
        self.refuse(3, "--table", "broken", words=["no such column: fullname"])
        self.execute("CREATE VIEW locked AS SELECT id, is_locked AS title FROM movies")
        self.refuse(3, "--table", "locked", words=["no such column: is_locked"])
        error = self.refuse(3, "--where", "json_extract(overview, '$.a') = 1", words=["malformed JSON"])
        self.assertNotIn("not a sound", error)

    def test_forms_of_the_databases_address(self) -> None:
        self.make_movies(2)
        for address in ("movies.db", "sqlite:///movies.db", f"sqlite:///{self.database}", str(self.database)):
            with self.subTest(address=address):
                self.succeed("--database", address)
                self.succeed(env={"DATABASE_URL": address})
        os.rename(self.database, self.folder / "m.SQLite3")
        self.succeed("--database", "m.SQLite3")

    def test_a_drive_of_windows_after_three_slashes_or_four(self) -> None:
        with mock.patch.object(os, "name", "nt"):
            for address in ("sqlite:///C:/temp/x.db", "sqlite:////C:/temp/x.db", "C:/temp/x.db"):
                self.assertEqual(embedgen.database_url(address), "sqlite:///C:/temp/x.db")

    def test_environment_and_flags(self) -> None:
        self.make_movies(2)
        self.succeed("--server", self.ollama.url, env={"OLLAMA_HOST": "127.0.0.1:1"})
        address = self.ollama.url.replace("http://", "")
        extra = {"OLLAMA_HOST": f' "{address}" ', "EMBEDGEN_MODEL": "all-minilm"}
        done = subprocess.run(
            command("--log-dir", self.folder / "logs", "--target", "minis"),
            cwd=self.folder, env=environment(extra), stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
        self.assertIn("Successfully generated: 2\n", decoded(done.stdout))
        self.assertEqual(self.execute("SELECT DISTINCT model FROM minis"), [("all-minilm",)])


class ServerAddresses(unittest.TestCase):
    def test_the_forms_of_ollama_host(self) -> None:
        for text, shown in [
            ("localhost", "http://localhost:11434"),
            ("example.com:1234", "http://example.com:1234"),
            (":1234", "http://127.0.0.1:1234"),
            ("0.0.0.0", "http://127.0.0.1:11434"),
            ("0.0.0.0:80", "http://127.0.0.1:80"),
            ("[::1]:1234", "http://[::1]:1234"),
            ("[::]", "http://[::1]:11434"),
            ("::1", "http://[::1]:11434"),
            ("http://example.com", "http://example.com:80"),
            ("HTTPS://example.com/", "https://example.com:443"),
            ("https://example.com:8443/a/b/", "https://example.com:8443/a/b"),
            ("example.com/path", "http://example.com:11434/path"),
            (" http://user:secret@example.com/x ", "http://example.com:80/x"),
        ]:
            with self.subTest(text=text):
                self.assertEqual(embedgen.parse_endpoint(text).shown, shown)


class Unreachable(Case):
    def closed_port(self) -> int:
        """Return a port at which nothing listens, nor will until the test's end."""
        closed = held_socket(0)
        self.addCleanup(closed.close)
        return int(closed.getsockname()[1])

    def test_nothing_listens(self) -> None:
        self.make_movies(3)
        address = f"http://127.0.0.1:{self.closed_port()}"
        for engine in ENGINES:
            with self.subTest(engine=engine):
                self.refuse(3, "--server", address, "--engine", engine,
                            words=[address, "connection refused", "ollama serve", "--server"])  # fmt: skip
        self.assertEqual(self.execute("SELECT name FROM sqlite_master"), [("movies",)])

    def test_a_name_that_resolves_to_nothing(self) -> None:
        self.make_movies(3)
        for engine in ENGINES:
            self.refuse(
                3, "--server", "http://no-such-host.invalid:1", "--engine", engine, words=["no-such-host.invalid"]
            )

    def test_nothing_to_do_needs_no_server(self) -> None:
        self.make_movies(3)
        self.succeed()
        self.assertEqual(self.succeed("--server", f"http://127.0.0.1:{self.closed_port()}").tally, (0, 3, 0))

    def test_a_missing_model(self) -> None:
        self.make_movies(3)
        for show in (True, False):
            self.ollama.configure(show=show)
            for engine in ENGINES:
                with self.subTest(engine=engine, show=show):
                    said = self.refuse(3, "--model", "bge-m3", "--engine", engine, words=["ollama pull bge-m3"])
                    self.assertNotIn("mean", said)
        for engine in ENGINES:
            words = ["ollama pull nomic-embed-txt", "Did you mean nomic-embed-text?"]
            self.refuse(3, "--model", "nomic-embed-txt", "--engine", engine, words=words)
        self.assertEqual(self.asked(), [])

    def test_a_server_behind_a_token(self) -> None:
        self.make_movies(3)
        self.ollama.configure(token="s3cr3t-token")
        for engine in ENGINES:
            with self.subTest(engine=engine):
                self.execute("DROP TABLE IF EXISTS movie_embeddings")
                self.refuse(3, "--engine", engine, words=["401", "OLLAMA_API_KEY"])
                wrong = self.run_program("--verbose", env={"OLLAMA_API_KEY": "wr0ng"})
                self.assertEqual(wrong.code, 3)
                self.assertNotIn("wr0ng", wrong.out + wrong.err + self.log())
                self.succeed("--force", "--engine", engine,
                             env={"OLLAMA_API_KEY": "s3cr3t-token"})  # fmt: skip
        self.assertNotIn("s3cr3t-token", self.log())

    def test_a_password_in_the_address_is_shown_nowhere(self) -> None:
        self.make_movies(3)
        address = self.ollama.url.replace("http://", "http://user:s3cr3t@")
        done = self.succeed("--server", address, "--verbose")
        refused = self.refuse(3, "--server", f"http://user:s3cr3t@127.0.0.1:{self.closed_port()}", "--force")
        self.refuse(2, "--server", "ftp://user:s3cr3t@host", words=["***"])
        for flags in (
            ["--server", "http://user:p@s3cr3t@host:99999"],
            ["--server", "http://user:pa/s3cr3t@localhost:1"],
            ["--database", "mysql://user:pa/s3cr3t@host/db"],
            ["--servr", "http://user:s3cr3t@host"],
            ["--server", "user:s3cr3t@host:99999"],
            ["--server", "http://user:my s3cr3t@host:99999"],
            ["--server", "ftp//user:s3cr3t@host"],
        ):
            refused += self.refuse(2, *flags)
        self.assertNotIn("s3cr3t", done.out + refused + self.log())
        headers = {name.lower(): value for name, value in self.ollama.log()[0]["headers"].items()}
        self.assertEqual(headers["authorization"], "Basic dXNlcjpzM2NyM3Q=")


class Output(Case):
    def test_quiet(self) -> None:
        self.make_movies(10)
        self.assertEqual(self.succeed("--quiet").out, "")
        self.assertEqual(self.succeed("--quiet").out, "")
        self.execute("INSERT INTO movies VALUES (11, NULL, NULL)")
        done = self.run_program("--quiet")
        self.assertEqual((done.code, done.err, done.tally), (1, "", (0, 10, 1)))
        self.assertIn("\n1 failed: no text\n", done.out)  # a mail from cron that says why

    def test_json(self) -> None:
        self.make_movies(10)
        self.execute("INSERT INTO movies VALUES (11, NULL, NULL)")
        done = self.run_program("--json")
        self.assertEqual((done.code, done.err), (1, ""))
        summary = json.loads(done.out)
        expected = {"total": 11, "generated": 10, "skipped": 0, "failed": 1, "exit_code": 1, "failures": {"no text": 1}}
        self.assertEqual({name: summary[name] for name in expected}, expected)
        others = {"left", "cut", "too_long", "seconds", "rate", "model", "log"}
        self.assertEqual(set(summary), expected.keys() | others)

    def ends_by(self, error: BaseException, *flags: str, finished: bool = True) -> tuple[int, dict[str, Any], str]:
        """Return exit code, JSON object and standard error of a run that ends so, after its summary or without one."""

        def action(*given: object) -> int:
            [report] = [one for one in (*given, getattr(given[0], "report", None)) if isinstance(one, embedgen.Report)]
            if finished:
                report.finish(embedgen.Counts(0, 0, None), 0)
            raise error

        self.make_movies(1)
        with mock.patch.dict(embedgen.ACTIONS, generate=action):
            done = self.run_program("--json", *flags)
        self.execute("DROP TABLE movies")
        self.assertEqual(done.out.count("\n"), 1)
        return done.code, json.loads(done.out), done.err

    def test_nothing_changes_a_verdict_that_was_printed(self) -> None:
        for error in (embedgen.Stop("too late."), RuntimeError("too late"), KeyboardInterrupt()):
            code, printed, err = self.ends_by(error)
            self.assertEqual((code, printed["exit_code"]), (0, 0))
            self.assertRegex(err, r"\A(warning: .*too late.*\n)?\Z")

    def test_one_json_object_however_a_run_ends(self) -> None:
        for error, code in ((embedgen.Stop("x."), 3), (embedgen.UsageError("x."), 2), (RuntimeError("x\ny"), 3),
                            (KeyboardInterrupt(), 130), (MemoryError(), 3)):  # fmt: skip
            ended, printed, _ = self.ends_by(error, finished=False)
            self.assertEqual((ended, printed["exit_code"]), (code, code))
            self.assertTrue(printed["error"])

    def test_a_mistake_of_the_user_leaves_no_traceback_in_the_log(self) -> None:
        mistake, full = embedgen.UsageError("a mistake."), embedgen.Stop("the disk is full.")
        mistake.__cause__ = mistake
        full.__cause__ = OSError("no space")
        self.ends_by(mistake, finished=False)
        self.assertNotIn("Traceback", self.log())
        self.ends_by(full, finished=False)
        self.assertIn("OSError: no space\n", self.log())

    def test_json_when_the_run_could_not_start_or_not_go_on(self) -> None:
        self.make_movies(10)
        done = self.run_program("--json", "--model", "bge-m3")
        said = json.loads(done.out)
        self.assertEqual((done.code, said["exit_code"]), (3, 3))
        self.assertEqual(done.err, f"error: {said['error']}\n")
        done = self.run_program("--json", "--limit", "x")
        self.assertEqual((done.code, json.loads(done.out)["exit_code"]), (2, 2))
        done = self.run_program("--json", "--table", "films")
        self.assertEqual((done.code, json.loads(done.out)["exit_code"]), (2, 2))

    def test_no_carriage_returns_in_a_pipe(self) -> None:
        self.make_movies(30)
        self.assertNotIn("\r", self.succeed().out)

    def test_encodings_that_cannot_show_the_report(self) -> None:
        self.make_movies(10)
        for extra in ({"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}):
            with self.subTest(extra=extra):
                done = subprocess.run(
                    self.arguments("--force", "--noun", "фильм"), cwd=self.folder, env=environment(extra),
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )  # fmt: skip
                self.assertEqual((done.returncode, done.stderr), (0, b""))
                self.assertIn(b"+=10, -=0, x=0]", done.stdout)

    @unittest.skipUnless(os.name == "posix", "an empty environment starts no Python on Windows")
    def test_an_empty_environment(self) -> None:
        self.make_movies(10)
        surroundings = ({}, "process"), ({"LANG": "C"}, "async"), ({"LC_ALL": "POSIX"}, "process")
        for extra, engine in surroundings[: None if FULL else 2]:
            with self.subTest(extra=extra, engine=engine):
                done = subprocess.run(
                    self.arguments("--force", "--engine", engine), cwd=self.folder, env=extra,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )  # fmt: skip
                self.assertEqual((done.returncode, done.stderr), (0, b""))

    @unittest.skipUnless(os.name == "posix", "a POSIX shell is needed")
    def test_a_reader_who_leaves(self) -> None:
        self.make_movies(100)
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                line = shlex.join(self.arguments("--force", "--engine", engine))
                done = subprocess.run(["/bin/sh", "-c", f"{line} | head -1"], cwd=self.folder, env=environment(),
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")  # fmt: skip
                self.assertEqual((done.stdout, done.stderr), ("=" * 60 + "\n", ""))

    def test_a_reader_who_has_left_ends_the_run_and_nothing_is_lost(self) -> None:
        self.make_movies(20)
        for engine in SLOW_ENGINES:
            process = self.start_program("--force", "--engine", engine)
            assert process.stdout
            process.stdout.close()
            self.assertEqual(process.wait(), embedgen.EXIT_SIGPIPE)
            self.assertRegex(self.log(), r"exit code 141\n\Z")
        self.succeed()
        self.assert_complete()

    def test_a_reader_who_leaves_before_the_last_lines_is_told_by_the_exit_code(self) -> None:
        self.make_movies(3)
        self.ollama.configure(hold=["Film"])
        process = self.start_program()
        self.wait_for(lambda: "Film" in " ".join(self.ollama.texts()), "a request that is held")
        assert process.stdout
        process.stdout.close()
        self.ollama.configure(hold=[])
        self.assertEqual(process.wait(), embedgen.EXIT_SIGPIPE)
        self.assert_complete()

    @unittest.skipUnless(DEV_FULL, "needs a device that is full")
    def test_an_object_that_cannot_be_printed_does_not_change_the_verdict(self) -> None:
        self.make_movies(20)
        with open("/dev/full", "wb") as full:
            done = subprocess.run(self.arguments("--json"), cwd=self.folder, env=environment(), stdout=full,
                                  stderr=subprocess.PIPE)  # fmt: skip
        self.assertEqual(done.returncode, 0)
        self.assertRegex(decoded(done.stderr), r"\Awarning: cannot write to standard output .*\n\Z")
        self.assert_complete()

    @unittest.skipUnless(os.name == "posix", "a POSIX shell is needed")
    def test_streams_that_are_closed_or_full(self) -> None:
        self.make_movies(20)
        full = ">/dev/full" if DEV_FULL else ">&-"
        redirections = ("<&-", ">&-", "2>&-", "<&- >&- 2>&-", full)
        for engine, redirection in with_engines(redirections):
            with self.subTest(engine=engine, redirection=redirection):
                line = shlex.join(self.arguments("--force", "--engine", engine))
                shell = ["/bin/sh", "-c", f"{line} {redirection}"]
                done = subprocess.run(shell, cwd=self.folder, env=environment(),
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")  # fmt: skip
                self.assertEqual(done.returncode, 0)
                self.assertNotIn("Traceback", done.stderr + self.log())
                self.assertLessEqual(done.stderr.count("\n"), 1)
                self.assert_complete()

    def test_the_log_beside_the_program_is_the_default(self) -> None:
        import shutil

        here = self.folder / "copied"
        here.mkdir()
        shutil.copy(PROGRAM, here)
        line = [sys.executable, "-S", str(here / "embedgen.py"), "--load", str(MOVIES), "--server", "hash:"]
        done = subprocess.run(line, cwd=here, env=environment(), stdout=subprocess.PIPE, check=True)
        self.assertIn(
            "📝 Detailed logs: logs/generate_embeddings_async.log\n".replace("/", os.sep), decoded(done.stdout)
        )
        self.assertTrue((here / "logs" / "generate_embeddings_async.log").exists())

    @unittest.skipIf(sys.platform == "win32", "the current folder cannot be removed there")
    def test_a_current_folder_that_is_gone(self) -> None:
        self.make_movies(5)
        (self.folder / "gone").mkdir()
        flags = ["--database", str(self.database), "--log-dir", str(self.folder / "logs"), "--server", self.ollama.url]
        script = f"cd gone && rmdir ../gone && exec {shlex.join([sys.executable, '-S', str(PROGRAM), *flags])}"
        done = subprocess.run(
            ["sh", "-c", script], cwd=self.folder, env=environment(), capture_output=True, check=False
        )
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertIn("5 generated", self.log())

    def test_a_fault_of_its_own_is_one_sentence_and_its_traceback_is_in_the_log(self) -> None:
        self.make_movies(3)
        with mock.patch.object(embedgen.Coverage, "count", side_effect=RuntimeError("so.\nwhat")):
            self.refuse(3, words=["RuntimeError: so. This is a fault of embedgen itself"])
        self.assertRegex(
            self.log(), r" - ERROR - RuntimeError: so\.\\nwhat\nTraceback \(most recent call last\):\n  File "
        )


class StartUp(unittest.TestCase):
    def test_help_imports_little(self) -> None:
        code = "import sys, embedgen\ntry: embedgen.main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
        shown = subprocess.run(
            [sys.executable, "-S", "-c", code], cwd=PROGRAM.parent, stdout=subprocess.PIPE, check=True
        )
        loaded = set(decoded(shown.stdout).splitlines()[-1].split())
        dear = {"asyncio", "multiprocessing", "http.client", "logging", "sqlite3", "ssl"}
        self.assertEqual(loaded & dear, set())

    def test_a_run_with_nothing_to_do_imports_little(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--database", "x.db", "--log-dir", ".", "--server", "hash:", "--quiet"]
            subprocess.run(command(*flags, "--load", MOVIES), cwd=folder, check=True)
            code = f"import sys, embedgen\nembedgen.main({flags!r})\nprint(*sys.modules)"
            env = environment({"PYTHONPATH": str(PROGRAM.parent)})
            arguments = [sys.executable, "-S", "-c", code]
            shown = subprocess.run(arguments, cwd=folder, env=env, stdout=subprocess.PIPE, check=True)
        dear = {"asyncio", "multiprocessing", "http.client", "ssl"}
        self.assertEqual(set(shown.stdout.decode().split()) & dear, set())

    def test_only_the_standard_library_is_imported(self) -> None:
        import ast

        tree = ast.parse(PROGRAM.read_text("utf-8"))
        names = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        if sys.version_info >= (3, 10):
            self.assertEqual(names - set(sys.stdlib_module_names) - {"psycopg"}, set())
        self.assertIn("sqlite3", names)
