"""What stands before a text, by the model: the cards in the program, and the flags that replace them."""

from __future__ import annotations

import hashlib
import unittest

import embedgen
from tests.support import ENGINES, Case, OnPostgres

TEXT = "Title: Film 1 | Description: What happens in 1."


class Cards(unittest.TestCase):
    """A card is found by the model's name, whoever serves it."""

    def test_names(self) -> None:
        nomic, bge = ("search_document: ", "search_query: "), ("", embedgen.PASSAGES)
        for name, prefixes, context in (
            ("nomic-embed-text", nomic, 2048),
            ("nomic-embed-text:v1.5", nomic, 2048),
            ("someone/Nomic-Embed-Text:latest", nomic, 2048),
            ("hf.co/nomic-ai/nomic-embed-text-v1.5-GGUF:Q4_K_M", nomic, 2048),
            ("text-embedding-nomic-embed-text-v1.5", nomic, 2048),
            ("nomic-embed-text-v2-moe", nomic, 512),
            ("embeddinggemma:300m", ("title: none | text: ", "task: search result | query: "), 2048),
            ("mxbai-embed-large:335m", bge, 512),
            ("snowflake-arctic-embed:m-long", bge, 512),  # the tag says it, which is not looked at
            ("Snowflake/snowflake-arctic-embed-m-long", bge, 2048),
            ("snowflake-arctic-embed2", ("", "query: "), 8192),
            ("Snowflake/snowflake-arctic-embed-l-v2.0", ("", "query: "), 8192),
            ("bge-m3", ("", ""), 8192),
            ("BAAI/bge-small-en-v1.5", bge, 512),
            ("bge-large-zh-v1.5", ("", ""), 0),
            ("all-minilm:33m", ("", ""), 256),
            ("intfloat/multilingual-e5-large", ("passage: ", "query: "), 512),
            ("intfloat/multilingual-e5-large-instruct", ("", ""), 0),
            ("granite-embedding:278m", ("", ""), 512),
            ("text-embedding-3-small", ("", ""), 0),
            ("a-model-of-my-own", ("", ""), 0),
        ):
            card = embedgen.card_of(name)
            self.assertEqual((card.document, card.query, card.context), (*prefixes, context), name)

    def test_a_search_with_instructions(self) -> None:
        query = embedgen.card_of("qwen3-embedding:0.6b").query
        self.assertRegex(query, r"\AInstruct: .*\nQuery:\Z")


class Prefixes(Case):
    """What the server is sent, and what the stored digest is of."""

    prefixed = True

    def sent(self, *flags: str) -> list[str]:
        """Run the program and return what it had embedded."""
        self.ollama.reset()
        self.succeed(*flags)
        return sorted(self.asked())

    def digests(self) -> list[str]:
        """Return the stored digests, in hexadecimal."""
        return [bytes(digest).hex() for (digest,) in self.execute("SELECT text_sha256 FROM movie_embeddings")]

    def test_the_models_own(self) -> None:
        self.make_movies(1)
        for engine in ENGINES:
            for model, prefix in (("nomic-embed-text", "search_document: "), ("all-minilm", "")):
                target = f"{model}_{engine}"
                flags = ("--engine", engine, "--model", model, "--target", target)
                self.assertEqual(self.sent(*flags), [prefix + TEXT])
                found = self.execute(f'SELECT text_sha256 FROM "{target}"')
                self.assertEqual(bytes(found[0][0]), hashlib.sha256((prefix + TEXT).encode()).digest())
        self.assertIn("text: search_document: Title: {title}", self.log())

    def test_over_every_path(self) -> None:
        self.make_movies(1)
        paths = []
        for settings in ({}, {"lean": False}):
            self.ollama.configure(**settings)
            self.succeed("--force")
            paths += [entry["path"] for entry in self.ollama.log() if TEXT in " ".join(entry["texts"])][-1:]
            self.assertEqual(self.asked()[-1], "search_document: " + TEXT)
        self.assertEqual(paths, ["/v1/embeddings", "/api/embed"])

    def test_a_change_makes_every_row_stale_and_only_a_change(self) -> None:
        self.make_movies(3)
        self.assertEqual(len(self.sent()), 3)
        self.assertEqual(self.sent(), [])
        self.assertEqual(self.sent("--document-prefix", "search_document: "), [])
        self.assertEqual(self.sent("--query-prefix", "something else: "), [])
        self.assertEqual(len(self.sent("--document-prefix", "it's: ")), 3)
        self.assertEqual(self.sent("--document-prefix", "it's: "), [])
        self.assertEqual(self.sent("--document-prefix", "")[0], TEXT)
        self.assertEqual(self.digests()[0], hashlib.sha256(TEXT.encode()).hexdigest())

    def test_a_row_of_nothing_but_a_prefix_has_no_text(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT, overview TEXT)")
        self.execute("INSERT INTO movies VALUES (1, ' ', NULL)")
        for server in ((), ("--server", "hash:", "--document-prefix", "words: ", "--target", "words")):
            done = self.run_program(*server)
            self.assertEqual((done.code, done.tally), (1, (0, 0, 1)))
        self.assertEqual(self.asked(), [])

    def test_the_built_in_embedder_sees_it(self) -> None:
        self.make_movies(1)
        self.succeed("--server", "hash:")
        plain = self.stored()[1]
        self.succeed("--server", "hash:", "--document-prefix", "dragons: ")
        self.assertNotEqual(self.stored()[1], plain)


class PrefixesOnPostgres(OnPostgres, Prefixes):
    """The same on Postgres."""
