"""The double is not trusted alone: a real server of the OpenAI protocol must be understood, too."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import unittest
import urllib.request
from typing import Any

from tests.real_v1 import CONTEXT, DIMENSIONS, MISSING, RealServer
from tests.support import ENGINES, MOVIES, Case

KEY = "a secret of the tests"


def cosine(one: bytes, other: bytes) -> float:
    """Return the cosine of two stored vectors."""
    a, b = (struct.unpack(f"<{len(vector) // 4}f", vector) for vector in (one, other))
    return sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)


@unittest.skipIf(MISSING, MISSING)
class RealLlamaServer(Case):
    """llama.cpp's server, with a model whose vectors mean nothing."""

    def start(self, **settings: Any) -> RealServer:
        """Start a server, to be stopped after the test."""
        server = RealServer(self.folder, **settings)
        self.addCleanup(server.stop)
        return server

    def vector(self, server: RealServer, text: str) -> bytes:
        """Return the server's vector of a text, asked for alone and in decimals."""
        body = json.dumps({"model": server.model, "input": text}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}
        request = urllib.request.Request(f"{server.url}/v1/embeddings", body, headers)
        with contextlib.closing(urllib.request.urlopen(request)) as answer:
            return struct.pack(f"<{DIMENSIONS}f", *json.load(answer)["data"][0]["embedding"])

    def flags(self, server: RealServer, *more: str) -> tuple[str, ...]:
        """Return the flags of a run with it."""
        return ("--server", f"{server.url}/v1", "--model", server.model, *more)

    def test_the_whole_job(self) -> None:
        server = self.start(key=KEY)
        env = {"OPENAI_API_KEY": KEY}
        for engine in ENGINES:
            with self.subTest(engine=engine):
                self.wipe()
                flags = self.flags(server, "--engine", engine, "--text", "{title}")
                self.succeed(*flags, "--load", MOVIES, "--limit", "60", env=env)
                self.assertEqual(self.succeed(*flags, env=env).tally[1], 60)  # compared with them, in other batches
                self.assertIn("vectors come as base64 over /v1/embeddings", self.log())
                stored = self.stored()
                for key, title in self.execute("SELECT id, title FROM movies ORDER BY id LIMIT 20"):
                    self.assertGreater(cosine(stored[key], self.vector(server, title)), 0.99999)
                self.assertNotIn(KEY, self.log())

    def test_without_the_key_nothing_begins(self) -> None:
        server = self.start(key=KEY)
        self.make_movies(3)
        for env in ({}, {"OPENAI_API_KEY": "another"}):
            said = self.refuse(3, *self.flags(server), env=env, words=["OPENAI_API_KEY"])
            self.assertNotIn("another", said)

    def test_texts_that_are_too_long(self) -> None:
        # The special tokens of begin and end are two; each word of a letter is one.
        for batch, status in ((512, "max context size"), (64, "too large to process")):
            server = self.start(batch=batch)
            most = min(batch, CONTEXT) - 2
            self.wipe()
            self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT)")
            texts = [f"{chr(97 + key)} " + "a " * (most - 1) for key in range(5)]
            texts[3] += "b "
            self.execute("INSERT INTO movies VALUES (?, ?)", list(enumerate(texts)))
            flags = self.flags(server, "--text", "{title}")
            failed = self.run_program(*flags, "--on-long", "fail")
            self.assertEqual((failed.code, failed.tally), (1, (4, 0, 1)))
            self.assertIn(status, self.log())
            self.assertEqual(self.succeed(*flags, "--on-long", "skip").tally, (0, 5, 0))
            self.assertIn("✂  Cut to the model's context: 1\n", self.succeed(*flags).out)
            self.assertGreater(cosine(self.stored()[3], self.vector(server, texts[3][:-2])), 0.9)
            self.succeed(*flags, "--on-long", "split", "--force")
            self.assertEqual(len(self.stored()), 5)

    def test_search(self) -> None:
        server = self.start()
        self.make_movies(30)
        flags = self.flags(server, "--text", "{title}")
        self.succeed(*flags)
        found = json.loads(self.succeed(*flags, "--json", "--search", "Film 7").out)["results"]
        self.assertEqual((found[0]["key"], round(found[0]["similarity"], 4)), (7, 1.0))

    def test_it_is_restarted_in_mid_run(self) -> None:
        self.make_movies(3000)
        for engine in ENGINES:
            with self.subTest(engine=engine):
                server = self.start()
                port = int(server.url.rpartition(":")[2])
                process = self.start_program(
                    *self.flags(server, "--engine", engine, "--target", engine), FIRST_WAIT=0.05
                )
                self.wait_for(
                    lambda engine=engine: engine in self.db.tables() and self.stored(engine), "the first rows"
                )
                server.stop()
                self.start(port=port)
                done = self.ended(process)
                self.assertEqual((done.code, done.err), (0, ""), done.out)
                self.assertEqual(len(self.stored(engine)), 3000)


if __name__ == "__main__":
    unittest.main()
