"""Servers of the OpenAI protocol: the main job over it, and what is of it alone, from the command line to the table."""

from __future__ import annotations

import re
import shutil
import unittest
from array import array
from collections.abc import Sequence
from typing import Any
from unittest import mock

import embedgen
from tests.support import ENGINES, SLOW_ENGINES, Case, another_double, with_engines


class Choice(Case):
    def protocols(self, *flags: str, env: dict[str, str] | None = None) -> Sequence[Any]:
        """Return what speaks to the servers of a command line."""
        with mock.patch.dict("os.environ", env or {}):
            return embedgen.protocols_for(embedgen.parse_arguments(flags))

    def test_the_path_tells_the_protocol(self) -> None:
        for address, openai in (("h/v1", True), ("https://h/v1/", True), ("http://h:1/x/v1", True), ("h", False),
                                ("http://h/v1/x", False), ("http://h/xv1", False), ("h/v10", False)):  # fmt: skip
            (protocol,) = self.protocols("--server", address)
            self.assertIs(type(protocol), embedgen.OpenAI if openai else embedgen.Ollama)
        (protocol,) = self.protocols(env={"OLLAMA_HOST": "https://h/v1"})
        self.assertIs(type(protocol), embedgen.OpenAI)

    def test_which_token_goes_where(self) -> None:
        both = {"OLLAMA_API_KEY": "ours", "OPENAI_API_KEY": "theirs"}
        basic = "Basic dTpw"  # u:p
        for address, env, expected in (
            ("h", both, "Bearer ours"),
            ("h/v1", both, "Bearer ours"),
            ("h/v1", {"OPENAI_API_KEY": " theirs\n"}, "Bearer theirs"),
            ("h/v1", {**both, "OLLAMA_API_KEY": " "}, "Bearer theirs"),
            ("h", {"OPENAI_API_KEY": "theirs"}, ""),
            ("h/v1/x", {"OPENAI_API_KEY": "theirs"}, ""),
            ("http://u:p@h/v1", both, basic),
            ("u:p@h", both, basic),
            ("h/v1", {}, ""),
        ):
            with self.subTest(address=address, env=env):
                (protocol,) = self.protocols(
                    "--server", address, env={"OLLAMA_API_KEY": "", "OPENAI_API_KEY": "", **env}
                )
                self.assertEqual(protocol.endpoint.authorization, expected)
        for name in both:
            self.refuse(2, "--server", "h/v1", env={name: "t\u00f6ken"}, words=[name])

    def test_options_are_not_in_this_protocol(self) -> None:
        self.refuse(2, "--server", "h/v1", "--option", "num_ctx=512", words=["--option", "h:11434/v1", "OpenAI"])


class Job(Case):
    """What is of this wire alone, from the command line to the table."""

    path = "/v1"

    def setUp(self) -> None:
        super().setUp()
        self.ollama.configure(api=False)

    def again(self, **settings: Any) -> None:
        """Begin anew, with a server of these settings."""
        self.wipe()
        shutil.rmtree(self.folder / "logs", ignore_errors=True)
        self.ollama.reset()
        self.ollama.configure(api=False, **settings)

    def test_the_main_job(self) -> None:
        refuse = [{"contains": "Film 7 ", "status": 400, "error": "contains NaN"}]
        for engine in ENGINES:
            with self.subTest(engine=engine):
                self.again(refuse=refuse)
                self.make_movies(50)
                self.assertEqual(self.succeed("--engine", engine, "--limit", 5).tally, (5, 0, 0))
                self.assertEqual(len(self.asked()), 5)
                done = self.run_program("--engine", engine)
                self.assertEqual((done.code, done.err, done.tally), (1, "", (44, 5, 1)))
                self.assert_complete(but=[7])
                self.assertEqual(re.findall("movie 7 failed: (.*)", self.log())[-1], "contains NaN")
                self.execute("DELETE FROM movies WHERE id = 7")
                before = len(self.ollama.log())
                self.assertEqual(self.succeed("--engine", engine).tally, (0, 49, 0))
                self.assertEqual(len(self.ollama.log()), before)
                self.refuse(2, "--model", "all-minilm", "--engine", engine, words=["all-minilm", "nomic-embed-text"])
                self.ollama.configure(models={"nomic-embed-text": {"dimensions": 16}}, refuse=[])
                self.execute("INSERT INTO movies VALUES (99, 'New', 'x')")
                self.refuse(3, "--engine", engine, words=["16 dimensions", "8"])
                self.assertLessEqual({entry["path"] for entry in self.ollama.log()}, {"/v1/embeddings"})

    def test_any_kind_of_server(self) -> None:
        ways: tuple[tuple[dict[str, Any], str], ...] = (
            ({}, "base64"),
            ({"base64": False}, "decimals"),
            ({"base64": "refused"}, "decimals"),
            ({"base64": "mangled"}, "decimals"),
            ({"next": ["disorder"] * 9}, "base64"),
            ({"base64": False, "next": ["disorder"] * 9}, "decimals"),
        )
        for engine, (settings, way) in with_engines(ways):
            with self.subTest(engine=engine, settings=settings):
                self.again(**settings)
                self.make_movies(20)
                self.succeed("--engine", engine, "--batch-size", 5, "--log-dir", self.folder / repr(settings) / engine)
                self.assert_complete()
                logged = "".join(path.read_text("utf-8") for path in self.folder.glob("*/" + engine + "/*.log"))
                self.assertIn(f"vectors come as {way} over /v1/embeddings\n", logged)
                asked = [entry["body"] for entry in self.ollama.log()][2:]
                self.assertEqual(
                    {body.get("encoding_format") for body in asked}, {"base64" if way == "base64" else None}
                )
                self.assertEqual({tuple(set(body) - {"encoding_format"}) for body in asked}, {("model",)})

    def test_vectors_of_any_length_are_stored_as_they_come(self) -> None:
        self.ollama.configure(scale=3.0)
        for engine in ENGINES:
            self.wipe()
            self.make_movies(5)
            self.succeed("--engine", engine)
            for key, stored in self.stored().items():
                for one, other in zip(array("f", stored), array("f", self.expected()[key])):
                    self.assertAlmostEqual(one, 3 * other, places=5)

    def test_a_limit_of_inputs_is_found_out_by_halving_and_the_pace_keeps_to_it(self) -> None:
        refusal = {"most": 6, "status": 422, "error": "batch size {given} > maximum allowed batch size {most}"}
        for engine, shape in with_engines(("message", "string")):
            with self.subTest(engine=engine, shape=shape):
                self.again(most_inputs=refusal, shape=shape)
                self.make_movies(200)
                self.assertEqual(self.succeed("--engine", engine, "--concurrent", 2).tally, (200, 0, 0))
                self.assert_complete()
                refused = [entry for entry in self.ollama.log() if entry["status"] == 422]
                self.assertLessEqual(len(refused), 2 * 5)  # both that were in flight, from 128 to 4
                last = self.ollama.log()[-12:]
                self.assertLessEqual(max(len(entry["texts"]) for entry in last), 6)
                self.assertRegex(self.log(), r"batches of ([3-6]): no more than \1 texts are taken")

    def test_faults_of_every_kind(self) -> None:
        kinds = ("500", "503", "429", "disorder", "reset", "cut", "torn", "chunked", "close", "drop")
        # Answers without sound vectors fail a text that alone gets two of them: in order, one at a time, none does.
        unsound = [
            kind for one in ("html", "error200", "short", "zero", "nan", "twin") * 2 for kind in (one, "ok", "ok")
        ]
        for engine in ENGINES:
            with self.subTest(engine=engine):
                self.again(faults=dict.fromkeys(kinds, 0.03), next=unsound, seed=5, retry_after=0)
                self.make_movies(200, lambda key: f"Film {key}" if key % 50 else f"Poison {key}")
                self.ollama.configure(refuse=[{"contains": "Poison", "status": 400, "error": "contains NaN"}])
                with mock.patch.multiple(embedgen, FIRST_WAIT=0.01, LONGEST_WAIT=0.02):
                    flags = ("--engine", engine, "--batch-size", 4, "--concurrent", 1)
                    done = self.run_program(*flags)
                self.assertEqual((done.code, done.err, done.tally), (1, "", (196, 0, 4)))
                self.assert_complete(but=[50, 100, 150, 200])
                self.assertGreater(len([entry for entry in self.ollama.log() if entry["fault"]]), 10)

    def test_refused_texts_fail_with_the_servers_words_in_any_shape(self) -> None:
        words = "`inputs` must have less than 30 tokens. Given: 42"
        limit = {"status": 413, "error": "`inputs` must have less than {context} tokens. Given: {given}"}
        for engine, shape in with_engines(("openai", "string", "message", "detail", "pydantic")):
            with self.subTest(engine=engine, shape=shape):
                self.again(too_long=limit, shape=shape, models={"nomic-embed-text": {"context": 30}})
                self.make_movies(12, lambda key: "long " * 33 if key == 7 else f"Film {key}")
                done = self.run_program("--engine", engine, "--batch-size", 4, "--on-long", "fail")
                self.assertEqual((done.code, done.tally), (1, (11, 0, 1)))
                self.assert_complete(but=[7])
                self.assertEqual(self.log().splitlines()[-3].partition("WARNING - ")[2], f"movie 7 failed: {words}")

    def test_no_model_of_that_name(self) -> None:
        self.make_movies(2)
        for engine in ENGINES:
            words = [self.ollama.url + "/v1", '"bge-m3"', "/models", "--model"]
            self.assertNotIn("mean", self.refuse(3, "--model", "bge-m3", "--engine", engine, words=words))
            words = ['"nomic-embed-txt"', "Did you mean nomic-embed-text?"]
            self.refuse(3, "--model", "nomic-embed-txt", "--engine", engine, words=words)
        self.assertEqual(self.asked(), [])
        self.assertNotIn("movie_embeddings", self.db.tables())

    def test_dimensions_are_passed_on(self) -> None:
        self.make_movies(3)
        self.succeed("--dimensions", 4)
        self.assertEqual({entry["body"]["dimensions"] for entry in self.ollama.log()}, {4})
        self.assertEqual({len(stored) for stored in self.stored().values()}, {16})

    def test_tokens_and_passwords(self) -> None:
        self.make_movies(2)
        for settings, env, user in (
            ({"token": "t0ken"}, {"OPENAI_API_KEY": "t0ken"}, ""),
            ({"token": "t0ken"}, {"OLLAMA_API_KEY": "t0ken", "OPENAI_API_KEY": "x"}, ""),
            ({"basic": "me:p@ss"}, {"OPENAI_API_KEY": "x"}, "me:p%40ss@"),
        ):
            self.ollama.configure(token=None, basic=None)
            self.ollama.configure(**settings)
            address = f"{self.ollama.url}/v1".replace("//", "//" + user)
            for engine in ENGINES:
                self.succeed("--server", address, "--engine", engine, "--force", env=env)
        self.refuse(3, "--engine", engine, "--force", words=["401", "OPENAI_API_KEY", "OLLAMA_API_KEY"])

    def test_both_protocols_side_by_side(self) -> None:
        other = another_double()
        two: tuple[object, ...] = ("--server", self.ollama.url + "/v1", "--server", other.url)
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                self.again()
                other.reset()
                self.make_movies(60)
                for server in (self.ollama, other):
                    server.configure(hold=["Film"])
                process = self.start_program(*two, "--engine", engine)
                for server in (self.ollama, other):
                    self.wait_for(lambda server=server: "Film" in " ".join(server.texts()), "both at work")
                for server in (self.ollama, other):
                    server.configure(hold=[])
                self.assertEqual(self.ended(process).tally, (60, 0, 0))
                self.assert_complete()
                for server, path in ((self.ollama, "/v1/embeddings"), (other, "/api/show")):
                    self.assertIn(path, [entry["path"] for entry in server.log()])
        other.configure(models={"nomic-embed-text": {"dimensions": 16}})
        self.refuse(3, *two, "--force", words=["16 and 8 dimensions"])
        for engine in ENGINES:  # a name alone does not tell that a model is the same
            self.again()
            self.make_movies(5)
            other.configure(models={"nomic-embed-text": {"seed": "another one"}})
            flags = (*two, "--engine", engine)
            self.refuse(3, *flags, words=[self.ollama.url, other.url, "nomic-embed-text", "cosine"])
            self.assertEqual(self.asked(), [])
            self.assertEqual(self.succeed(*flags, "--accept-drift").tally, (5, 0, 0))


if __name__ == "__main__":
    unittest.main()
