"""The program against a real Ollama, for people who have one; the usual run takes the double for it.

    EMBEDGEN_TEST_OLLAMA=http://localhost:11434 python -m unittest tests.test_real_ollama

With the model of $EMBEDGEN_TEST_MODEL, or the first that the server has for embeddings.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import unittest
import urllib.request
from typing import Any

from tests.support import ENGINES, FULL, MOVIES, ROOT, Case, environment

URL = os.environ.get("EMBEDGEN_TEST_OLLAMA", "").rstrip("/")
FILMS = 40


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    """Leave the real one out when all tests are looked for, unless there is a server: it is no gap in the suite."""
    return loader.loadTestsFromTestCase(OnTheDouble) if pattern and not URL else tests


def ask(path: str, **body: Any) -> Any:
    """Return what the server answers."""
    request = urllib.request.Request(URL + path, json.dumps(body).encode() if body else None)
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def model() -> str:
    """Return the model to test with."""
    if given := os.environ.get("EMBEDGEN_TEST_MODEL"):
        return given
    for entry in ask("/api/tags")["models"]:
        if "embedding" in ask("/api/show", model=entry["name"]).get("capabilities", []):
            return str(entry["name"])
    raise unittest.SkipTest(f"{URL} has no model for embeddings: ollama pull all-minilm")


def cosine(one: bytes, numbers: list[float]) -> float:
    """Return the cosine of a stored vector and one that the server has sent."""
    stored = struct.unpack(f"<{len(one) // 4}f", one)
    return sum(x * y for x, y in zip(stored, numbers)) / math.hypot(*stored) / math.hypot(*numbers)


@unittest.skipUnless(URL, "set EMBEDGEN_TEST_OLLAMA to the address of an Ollama, such as http://localhost:11434")
class RealOllama(Case):
    flags: tuple[object, ...] = ()

    def setUp(self) -> None:
        super().setUp()
        self.flags = ("--server", URL, "--model", model())

    def text(self, key: int) -> str:
        """Return what is embedded for a film."""
        [(title, year)] = self.execute(f"SELECT title, year FROM movies WHERE id = {key}")
        return f"{title} ({year})"

    def test_the_main_job_a_search_and_a_run_with_nothing_to_do(self) -> None:
        for engine in ENGINES:
            with self.subTest(engine=engine):
                self.wipe()
                flags = (*self.flags, "--text", "{title} ({year})", "--where", f"id <= {FILMS}")
                done = self.succeed(*flags, "--engine", engine, "--load", MOVIES)
                self.assertEqual(done.tally, (FILMS, 0, 0))
                stored = self.stored()
                for key in range(1, FILMS + 1):
                    [alone] = ask("/api/embed", model=self.flags[-1], input=self.text(key))["embeddings"]
                    self.assertGreater(cosine(stored[key], alone), 0.999, key)
                self.assertEqual(self.succeed(*flags, "--engine", engine).tally, (0, FILMS, 0))
                self.assertEqual(self.stored(), stored)
                search = (*flags, "--query-prefix", "", "--json", "--search", self.text(7))
                best = json.loads(self.succeed(*search).out)["results"][0]
                self.assertEqual((best["key"], round(best["similarity"], 2)), (7, 1.0))
                facts = json.loads(self.succeed(*flags, "--status", "--json").out)
                self.assertEqual(facts["models"][0]["version"], ask("/api/version")["version"])

    def test_texts_that_are_cut(self) -> None:
        self.make_movies(5)
        self.execute(f"UPDATE movies SET overview = '{'A very long story. ' * 200}' WHERE id = 3")
        flags = (*self.flags, "--option", "num_ctx=128")
        done = self.succeed(*flags, "--on-long", "skip")
        self.assertEqual(done.tally, (4, 1, 0))
        self.assertIn("✂  Skipped for their length: 1\n", done.out)
        self.assertIn("✂  Cut to the model's context: 1\n", self.succeed(*flags).out)
        self.assertEqual(self.succeed(*flags, "--on-long", "split", "--force").tally, (5, 0, 0))
        self.assertEqual(set(self.stored()), {1, 2, 3, 4, 5})


@unittest.skipUnless(FULL, "takes seconds; every run tests the same by the double alone")
class OnTheDouble(Case):
    def test_the_tests_for_a_real_one(self) -> None:
        done = subprocess.run(
            [sys.executable, "-S", "-m", "unittest", "tests.test_real_ollama.RealOllama"],
            cwd=ROOT, env=environment({"EMBEDGEN_TEST_OLLAMA": self.ollama.url}),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", timeout=300,
        )  # fmt: skip
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stderr, r"Ran 2 tests in .*\n\nOK\n\Z")  # and none was skipped


if __name__ == "__main__":
    unittest.main()
