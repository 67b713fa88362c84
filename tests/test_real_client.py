"""The double is not trusted alone: a real client of Ollama must take its answers for Ollama's."""

from __future__ import annotations

import unittest

from tests.ollama import blob, vector
from tests.support import Case

try:
    import ollama
except ImportError:
    ollama = None  # type: ignore[assignment]


@unittest.skipIf(ollama is None, "the package ollama is not installed; it is needed for development only")
class RealClient(Case):
    def setUp(self) -> None:
        super().setUp()
        self.client = ollama.Client(host=self.ollama.url)
        self.addCleanup(self.client._client.close)  # or its connections are complained about in another test

    def test_embed(self) -> None:
        answer = self.client.embed(model="nomic-embed-text", input=["one", "two"])
        for vectors, text in zip(answer.embeddings, ("one", "two")):
            for given, expected in zip(vectors, vector(text)):
                self.assertAlmostEqual(given, expected, places=6)
        self.assertEqual(answer.model, "nomic-embed-text")
        self.assertGreater(answer.prompt_eval_count or 0, 0)

    def test_what_the_client_sends_and_what_embedgen_sends_are_alike(self) -> None:
        options = {"num_ctx": 512}
        self.client.embed(
            model="nomic-embed-text", input=["Title: Film 1"], truncate=False, options=options, dimensions=4
        )
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO movies VALUES (1, 'Film 1')")
        self.succeed("--option", "num_ctx=512", "--dimensions", 4)
        theirs, *_, ours = (entry for entry in self.ollama.log() if entry["path"] == "/api/embed")
        self.assertEqual(ours["texts"], theirs["texts"])
        self.assertEqual(ours["body"], {name: theirs["body"][name] for name in ours["body"]})
        self.assertEqual(self.stored(), {1: blob("Title: Film 1", 4)})

    def test_the_older_path(self) -> None:
        answer = self.client.embeddings(model="nomic-embed-text", prompt="one")
        self.assertEqual(len(answer.embedding), 8)

    def test_show_list_and_status(self) -> None:
        shown = self.client.show("nomic-embed-text")
        assert shown.modelinfo and shown.capabilities
        lengths = [value for name, value in shown.modelinfo.items() if name.endswith(".embedding_length")]
        self.assertEqual(lengths, [8])
        self.assertIn("embedding", shown.capabilities)
        names = {model.model for model in self.client.list().models}
        self.assertIn("nomic-embed-text:latest", names)
        self.client.ps()

    def test_errors(self) -> None:
        with self.assertRaises(ollama.ResponseError) as caught:
            self.client.embed(model="bge-m3", input="one")
        self.assertEqual(caught.exception.status_code, 404)
        self.assertIn("not found", caught.exception.error)
        for fault, status in [("503", 503), ("500", 500), ("eof", 400)]:
            self.ollama.configure(next=[fault])
            with self.assertRaises(ollama.ResponseError) as caught:
                self.client.embed(model="nomic-embed-text", input="one")
            self.assertEqual(caught.exception.status_code, status)
        self.ollama.configure(models={"nomic-embed-text": {"context": 5}})
        with self.assertRaises(ollama.ResponseError) as caught:
            self.client.embed(model="nomic-embed-text", input="one two three four five six", truncate=False)
        self.assertIn("context length", caught.exception.error)

    def test_an_empty_text_and_an_empty_list(self) -> None:
        self.assertEqual(self.client.embed(model="nomic-embed-text", input="").embeddings, [])
        self.assertEqual(self.client.embed(model="nomic-embed-text", input=[]).embeddings, [])
