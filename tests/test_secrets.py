"""Passwords and tokens appear nowhere: not in output, log or process list, however the run goes."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import unittest
from collections.abc import Iterator
from typing import ClassVar
from unittest import mock

import embedgen
from tests.support import (
    AUTHORITY,
    FULL,
    START_METHOD,
    Case,
    Finished,
    OnPostgres,
    command,
    environment,
    said_to_all,
    tls_double,
)

MARK = "S3CR3T"  # is in every secret
PASSWORD, TOKEN, OTHER = f"pw?/{MARK}~~>>", f"tok-{MARK}/one", f"sk-{MARK}-two"
USERINFO = "us%65r:" + PASSWORD.replace("?", "%3F").replace("/", "%2F") + "@"
BASIC = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
PATIENCE = {"PATIENCE": 0.05, "FIRST_WAIT": 0.02}
BY_TOKEN, BY_OTHER = {"OLLAMA_API_KEY": TOKEN}, {"OPENAI_API_KEY": OTHER}


def with_password(url: str) -> str:
    """Return a URL with user and password in it."""
    return url.replace("://", f"://{USERINFO}", 1)


class Secrets(Case):
    """In every way to give a secret, over both protocols."""

    engine: ClassVar[str] = "async"

    def setUp(self) -> None:
        super().setUp()
        self.make_movies(3)

    def assert_hidden(self, *texts: str) -> None:
        """None of the secrets is in there, as such or in the forms that it is sent in, nor is a part of one."""
        for text in texts:
            for secret in (MARK, BASIC, BASIC[:12], USERINFO[:-1]):
                self.assertNotIn(secret, text)
        self.assertNotEqual(texts, ())

    def ways(self, url: str) -> Iterator[tuple[tuple[object, ...], dict[str, str]]]:
        """Yield the flags and the environment of each protocol and way to give a secret."""
        for path in ("", "/v1"):
            for server, env in ((with_password(url + path), {}), (url + path, BY_TOKEN), (url + path, BY_OTHER)):
                with self.subTest(server=server, env=env):
                    yield ("--server", server, "--force", "--verbose"), env

    def run_hidden(self, code: int, *given: object, env: dict[str, str], words: str = "") -> Finished:
        """Run the program, which must end so and keep its secrets; `words` must be in its error or in its log."""
        shutil.rmtree(self.folder / "logs", ignore_errors=True)  # of the run before, which may have had the words
        with mock.patch.multiple(embedgen, **PATIENCE):
            done = self.run_program(*given, env=env)
        self.assertEqual(done.code, code, done.err + done.out)
        self.assert_hidden(done.out, done.err, self.log())
        self.assertIn(words, done.err + self.log())
        return done

    def test_a_good_run(self) -> None:
        for flags, env in self.ways(self.ollama.url):
            self.run_hidden(0, *flags, env=env)
            sent = {entry["headers"].get("authorization") for entry in self.ollama.log()}
            expected = f"Basic {BASIC}" if not env else f"Bearer {env.get('OLLAMA_API_KEY', OTHER)}"
            if env is BY_OTHER and "/v1" not in str(flags[1]):
                expected = None
            self.assertEqual(sent, {expected})
            self.ollama.reset()

    def test_a_server_that_is_not_there_or_refuses(self) -> None:
        self.ollama.kill()
        for flags, env in self.ways(self.ollama.url):
            self.run_hidden(3, *flags, env=env, words="connection refused")
        self.ollama.start()
        self.ollama.configure(token="another")
        for flags, env in self.ways(self.ollama.url):
            self.run_hidden(3, *flags, env=env, words="HTTP 401")

    def test_a_proxy_that_repeats_the_request_in_its_answer(self) -> None:
        answers = ((200, "text"), (302, "text"), (400, "json"), (400, "html"), (401, "json"), (403, "html"),
                   (404, "text"), (422, "json"), (429, "text"), (502, "html"), (503, "json"))  # fmt: skip
        for turn, (status, form) in enumerate(answers):
            self.ollama.configure(echo={"status": status, "as": form})
            for number, (flags, env) in enumerate(self.ways(self.ollama.url)):
                nothing = env is BY_OTHER and not str(flags[1]).endswith("/v1")  # is sent
                if (number + turn) % 3 == 0:  # each way in some turns, to save time
                    self.run_hidden(3, *flags, env=env, words="" if nothing else "***")

    def test_as_json_and_html_spell_it(self) -> None:
        for secret in ('hunter2"secret', "hunter2&secret"):
            given = secret.replace('"', "%22")
            server = self.ollama.url.replace("://", f"://user:{given}@", 1)
            for form in ("text", "json", "html"):
                self.ollama.configure(echo={"status": 400, "as": form})
                with self.subTest(secret=secret, form=form):
                    done = self.run_hidden(3, "--server", server, env={}, words="***")
                    self.assertNotIn("secret", done.out + done.err + self.log())

    def test_a_secret_in_what_should_be_the_status_line(self) -> None:
        for secret in (f"Basic {BASIC}", f"Bearer {TOKEN}"):
            with said_to_all(f"what is {secret}? ".encode() + b"\r\n\r\n") as port:
                for flags, env in self.ways(f"http://127.0.0.1:{port}"):
                    if env == ({} if secret.endswith(BASIC) else BY_TOKEN):
                        self.run_hidden(3, *flags, env=env, words="***")

    def test_tls_that_fails(self) -> None:
        server = tls_double("elsewhere")
        for flags, env in self.ways(server.url):
            self.run_hidden(3, *flags, env=env, words="issuer certificate")
            self.run_hidden(3, *flags, "--ca-file", AUTHORITY, env=env, words="is not valid for")
        for flags, env in self.ways(server.url.replace("https", "http")):
            self.run_hidden(3, *flags, env=env, words="https://")

    def test_wrong_usage(self) -> None:
        for flags in (
            ("--server", f"http://{USERINFO}ho st/v1"),
            ("--server", f"http://{USERINFO}host:port/v1"),
            ("--server", f"htp://{USERINFO}host"),
            ("--server", f"http://user:{PASSWORD}@host"),  # not quoted as a URL has it
            ("--server", f"https://host/v1?api_key={TOKEN}"),
            ("--server", with_password("http://h"), "--server", with_password("http://h")),
            ("--server", with_password("http://h/v1"), "--option", "a=1"),
            ("--sever", f"http://{USERINFO}host"),
            ("--database", f"mysql://{USERINFO}host/shop"),
            ("--database", f"mysql://host/shop?password={PASSWORD}"),
            ("--database", f"postgresql://{USERINFO}host:port/shop?nonsense=1"),
        ):
            with self.subTest(flags=flags):
                done = self.run_program(*flags, env={**BY_TOKEN, **BY_OTHER})
                self.assertIn(done.code, (2, 3))
                self.assert_hidden(done.out, done.err, self.log())
        for name in ("OLLAMA_API_KEY", "OPENAI_API_KEY"):
            done = self.run_program("--server", "h/v1", env={name: TOKEN + "\u00e9"})
            self.assertEqual(done.code, 2)
            self.assert_hidden(done.err)

    def test_a_fault_of_the_programs_own(self) -> None:
        for address in ("http://127.0.0.1", with_password("http://127.0.0.1")):
            server = address + self.ollama.url[self.ollama.url.rindex(":") :] + "/v1"
            with mock.patch("json.loads", side_effect=RuntimeError("a fault")):
                flags = ("--server", server, "--force")
                self.run_hidden(3, *flags, env={**BY_TOKEN, **BY_OTHER}, words="Traceback")

    def start(self, env: dict[str, str], *flags: str, **constants: object) -> subprocess.Popen[bytes]:
        """Start the program in a process group of its own, with these flags alone."""
        flags = ("--log-dir", str(self.folder / "logs"), "--force", "--verbose", *flags)
        line = [word for word in command(*flags, **constants) if word != "-S"]  # but with psycopg
        process = subprocess.Popen(
            line, cwd=self.folder, env=environment(env), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.addCleanup(self.end, process)
        return process


@unittest.skipUnless(FULL and START_METHOD != "spawn", "spawned workers would know nothing of a constant changed here")
class SecretsByProcesses(Secrets):
    """The same with worker processes."""

    engine = "process"


class SecretsOnPostgres(OnPostgres, Secrets):
    """With a password in the database's URL, too."""

    test_a_server_that_is_not_there_or_refuses = None
    test_a_proxy_that_repeats_the_request_in_its_answer = None
    test_a_secret_in_what_should_be_the_status_line = None
    test_tls_that_fails = None
    test_as_json_and_html_spell_it = None
    test_wrong_usage = None

    def open_database(self) -> None:
        super().open_database()
        self.db.flags = ("--database", re.sub(r"//[^@/]*@", f"//postgres:{MARK}@", self.db.url, count=1))

    def test_a_database_that_is_not_there(self) -> None:
        for flags, env in (((), {"DATABASE_URL": f"postgresql://user:{MARK}@127.0.0.1:1/shop"}),
                           (("--database", f"postgresql://user@127.0.0.1:1/shop?password={MARK}"), {})):  # fmt: skip
            process = self.start(env, *flags)
            done = self.ended(process)
            self.assertEqual(done.code, 3, done.err)
            self.assert_hidden(done.out, done.err, self.log())


if __name__ == "__main__":
    unittest.main()
