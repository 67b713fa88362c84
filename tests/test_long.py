"""Texts longer than the model takes: cut, split, failed or skipped, and never in silence."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import struct
import unittest
from collections.abc import Iterable
from typing import Any, ClassVar
from unittest import mock

import embedgen
from tests.ollama import SPECIAL_TOKENS, blob, cut, normalised, vector
from tests.support import ENGINES, FULL, SLOW_ENGINES, Case, OnPostgres, with_engines

CONTEXT = 300  # tokens; the double's are words
MOST = CONTEXT - SPECIAL_TOKENS  # words of a text
ROWS = 1000 if FULL else 100
LONG = range(3, ROWS, ROWS // 20)  # keys of the rows that are too long, and
EXACT = LONG[0] + 1  # of one that is not
SENTENCES = 4  # of a long text


def long_text(key: int) -> str:
    """Return a text of some sentences, more than the model takes and less than twice that."""
    return " ".join(" ".join([f"Film{key}.{part}", *["and"] * 98, "on."]) for part in range(SENTENCES))


def middle(numbers: list[float], others: list[float]) -> bytes:
    """Return the mean of two vectors of equal weight, as it must be stored."""
    mean = normalised([(one + other) / 2 for one, other in zip(numbers, others)])
    return struct.pack(f"<{len(mean)}f", *mean)


class LongTexts(Case):
    """Over Ollama's own protocol."""

    refusal = "the input length exceeds the context length"

    def setUp(self) -> None:
        super().setUp()
        self.serve()
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, overview TEXT)")
        texts = {key: f"Film {key} is short." for key in range(1, ROWS + 1)}
        texts.update({key: long_text(key) for key in LONG})
        texts[EXACT] = " ".join(["film"] * MOST)
        self.assertEqual(len(LONG), 20)
        self.execute("INSERT INTO movies VALUES (?, ?)", list(texts.items()))
        self.texts = texts

    def serve(self) -> None:
        """Have a server whose model takes so much."""
        self.ollama.configure(models={"nomic-embed-text": {"context": CONTEXT}})

    def flags(self, on_long: str, engine: str) -> tuple[str, ...]:
        """Return the flags of a run."""
        given = () if on_long == "cut" else ("--on-long", on_long)
        return ("--text", "{overview}", "--engine", engine, "--target", f"{on_long}_{engine}", *given)

    def logged(self, words: str) -> list[int]:
        """Return the keys of the rows of which the log says so."""
        return sorted(int(key) for key in re.findall(rf"movie (\d+) {words}", self.log()))

    def run_each(self, on_long: str, code: int, tally: tuple[int, int, int]) -> None:
        """Run both engines, the second time with nothing left of what they did."""
        for engine in ENGINES:
            with self.subTest(engine=engine):
                for path in (self.folder / "logs").glob("*"):
                    path.unlink()
                self.ollama.reset()
                self.serve()
                done = self.run_program(*self.flags(on_long, engine))
                self.assertEqual((done.code, done.tally), (code, tally), done.err)
                self.look(done.out, self.stored(f"{on_long}_{engine}"))

    def look(self, out: str, stored: dict[int, bytes]) -> None:
        raise NotImplementedError

    def good(self, stored: dict[int, bytes]) -> dict[int, bytes]:
        """Check the vectors of all texts that are not too long, and return the others."""
        for key, text in self.texts.items():
            if key not in LONG:
                self.assertEqual(stored.pop(key), blob(text), key)
        return stored

    def beginnings(self, stored: dict[int, bytes]) -> None:
        """Check the vectors of the beginnings of long texts, as the server cuts them."""
        self.assertEqual(stored, {key: blob(cut(self.texts[key], CONTEXT)) for key in LONG})

    def test_cut(self) -> None:
        def look(out: str, stored: dict[int, bytes]) -> None:
            self.beginnings(self.good(stored))
            lines = out.splitlines()
            line = lines.index("   ✂  Cut to the model's context: 20")
            self.assertEqual(lines[line - 1], f"   ✓  Successfully generated: {ROWS}")
            self.assertEqual(self.logged("is longer than the model takes: cut"), [*LONG])

        self.look = look  # type: ignore[method-assign]
        self.run_each("cut", 0, (ROWS, 0, 0))
        again = self.succeed(*self.flags("cut", "async"))
        self.assertEqual(again.tally, (0, ROWS, 0))
        self.assertNotIn("✂", again.out)
        fits = self.execute(
            "SELECT fit, count(*) FROM cut_async AS e JOIN embedgen_provenance AS p ON p.id = provenance "
            "GROUP BY fit ORDER BY fit"
        )
        self.assertEqual(fits, [("cut", 20), ("whole", ROWS - 20)])
        done = self.succeed(*self.flags("cut", "async"), "--force", "--json")
        self.assertEqual(json.loads(done.out)["cut"], 20)

    def test_split(self) -> None:
        def look(out: str, stored: dict[int, bytes]) -> None:
            stored = self.good(stored)
            self.assertEqual(sorted(stored), [*LONG])
            for key, found in stored.items():
                words = self.texts[key].split()
                half = len(words) // 2  # two sentences each, with the space behind the first two
                one, two = " ".join(words[:half]) + " ", " ".join(words[half:])
                self.assertEqual(one + two, self.texts[key])
                mean = struct.unpack("<8f", middle(vector(one), vector(two)))
                for number, wanted in zip(struct.unpack("<8f", found), mean):
                    self.assertAlmostEqual(number, wanted, places=2)  # the parts differ in length by a space
            self.assertNotIn("✂", out)
            self.assertEqual(self.logged("is longer than the model takes: split"), [*LONG])

        self.look = look  # type: ignore[method-assign]
        self.run_each("split", 0, (ROWS, 0, 0))

    def test_fail(self) -> None:
        def look(out: str, stored: dict[int, bytes]) -> None:
            self.assertEqual(self.good(stored), {})
            self.assertEqual(self.logged(f"failed: .*{self.refusal}"), [*LONG])
            self.assertNotIn("✂", out)

        self.look = look  # type: ignore[method-assign]
        self.run_each("fail", 1, (ROWS - 20, 0, 20))

    def test_skip(self) -> None:
        def look(out: str, stored: dict[int, bytes]) -> None:
            self.assertEqual(self.good(stored), {})
            self.assertEqual(self.logged(r"is longer than the model takes: skipped \(.*" + self.refusal), [*LONG])
            self.assertIn("   ✂  Skipped for their length: 20\n", out)
            self.assertIn(f"✓={ROWS - 20}, ⊘=20, ✗=0]", out)

        self.look = look  # type: ignore[method-assign]
        self.run_each("skip", 0, (ROWS - 20, 20, 0))
        limited = self.succeed(*self.flags("skip", "async"), "--force", "--limit", str(ROWS - 20))
        self.assertEqual(limited.tally, (ROWS - 20, 20, 0))  # what is skipped does not use up the limit
        self.succeed(*self.flags("cut", "async")[:-2], "--target", "skip_async")
        self.beginnings(self.good(self.stored("skip_async")))

    def test_a_server_that_finds_everything_too_long_is_not_believed(self) -> None:
        refuse = [{"contains": "", "status": 400, "error": self.refusal}]
        self.ollama.configure(refuse=refuse)
        with mock.patch.object(embedgen, "PATIENCE", 0.5), mock.patch.object(embedgen, "FIRST_WAIT", 0.01):
            for on_long in ("cut", "split", "skip"):
                done = self.run_program(*self.flags(on_long, "async"))
                self.assertEqual(done.code, 3)
                self.assertIn(f"does not embed even a short text: {self.refusal}", done.err)

    def test_requests_for_a_corpus_of_long_texts(self) -> None:
        self.ollama.reset()
        self.serve()
        self.execute("DELETE FROM movies")
        self.execute("INSERT INTO movies VALUES (?, ?)", [(key, long_text(key % 100)) for key in range(200)])
        self.succeed(*self.flags("cut", "async"), "--concurrent", "1", "--batch-size", "10")
        # Each twice, once not to be cut and once to be; but those that stand twice in a batch, and few to find out.
        self.assertLess(len(self.asked()), 200 * 2 + 60)


class VeryLongTexts(Case):
    """Split into many parts, of a model that takes 256 tokens."""

    def serve(self, path: str) -> None:
        """Have a server of either protocol."""
        self.path = path
        self.wipe()
        shutil.rmtree(self.folder / "logs", ignore_errors=True)
        self.ollama.reset()
        limit = {"status": 413, "error": "`inputs` must have less than {context} tokens. Given: {given}"}
        openai: dict[str, Any] = {"api": False, "too_long": limit} if path else {}
        self.ollama.configure(models={"all-minilm": {"context": 256}}, **openai)
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, overview TEXT)")

    def split(self, *more: object) -> tuple[object, ...]:
        """Return the flags of a run."""
        return ("--text", "{overview}", "--model", "all-minilm", "--on-long", "split", *more)

    def test_few_requests(self) -> None:
        dense = [chr(first) + chr(second) for first in range(97, 123) for second in range(97, 123)]
        ways = itertools.product(("", "/v1"), ENGINES)
        texts = (20_000, dense), (200_000, dense), (20_000, []), (200_000, [])
        for (path, engine), (size, words) in itertools.product(ways, texts) if FULL else zip(ways, texts):
            with self.subTest(path=path, engine=engine, size=size, dense=bool(words)):
                self.serve(path)
                sentences = (
                    f"This is number {number}, which is told of in a sentence." for number in itertools.count()
                )
                text = " ".join(itertools.islice(itertools.cycle(words) if words else sentences, size))[:size]
                self.execute("INSERT INTO movies VALUES (?, ?)", [(1, text)])
                self.assertEqual(self.succeed(*self.split("--engine", engine)).tally, (1, 0, 0))
                full = -(-len(text.split()) // (256 - SPECIAL_TOKENS))  # parts of full length
                asked = [entry for entry in self.ollama.log() if entry["texts"]]
                self.assertLess(len(asked), 1.3 * full)
                taken = [text for entry in asked if entry["status"] == 200 for text in entry["texts"]]
                self.assertLess(len(taken), 1.3 * full + 5)
                self.assertRegex(
                    self.log(), rf"a text of {size} characters is split into \d+ parts: '{text[:50]}'\.\.\."
                )

    def test_others_do_not_wait_for_it(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                self.serve("")
                text = " ".join(f"word{number}" for number in range(20_000))
                rows = [(key, text if key == 5 else f"Film {key} is short.") for key in range(1, 33)]
                self.execute("INSERT INTO movies VALUES (?, ?)", rows)
                self.ollama.configure(hold=["word1"])  # its parts; the whole is refused at once
                flags = self.split("--engine", engine, "--batch-size", 32, "--concurrent", 1)
                process = self.start_program(*flags, UNSAVED_SECONDS=0.1)
                self.wait_for(lambda: "movie_embeddings" in self.db.tables() and len(self.stored()) >= 31, "the others")
                self.assertIn(([text], 400), [(entry["texts"], entry["status"]) for entry in self.ollama.log()])
                self.ollama.configure(hold=[])
                done = self.ended(process)
                self.assertEqual((done.code, done.err, done.tally), (0, "", (32, 0, 0)))
                self.assertEqual(len(self.stored()), 32)
                self.assertIn("movie 5 is longer than the model takes: split", self.log())


class NothingIsCutUnsaid(Case):
    """Where the server gives the model a smaller context than its own, over the path that cuts without a word."""

    FORMS: ClassVar[tuple[dict[str, Any], ...]] = (
        {"version": "0.12.7", "ps": "asked"},
        {"version": "0.24.0"},
        {"version": "0.32.15"},
        {"version": "0.24.0", "ps": False},  # a proxy, say, that does not let it through
    )

    def setUp(self) -> None:
        super().setUp()
        # Of one and two letters a word, so that bytes and tokens are as near to each other as they can be.
        words = [(key, key * 7 % 200 + 1) for key in range(1, 101)]
        self.texts = {key: " ".join([f"k{key}", *["aa" if key % 3 else "b"] * count]) for key, count in words}
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, overview TEXT)")
        self.execute("INSERT INTO movies VALUES (?, ?)", list(self.texts.items()))

    def assert_all_said(self, out: str, whole: Iterable[int] = ()) -> None:
        """Each vector must be that of its whole text, or the text must be counted and logged as cut.

        `whole` are the keys of those that a larger context took before.
        """
        told = {int(key) for key in re.findall(r"movie (\d+) is longer than the model takes: cut", self.log())}
        self.assertEqual(told, {key for key, text in self.texts.items() if cut(text, 128) != text}.difference(whole))
        self.assertEqual(
            self.stored(), {key: blob(cut(text, 128) if key in told else text) for key, text in self.texts.items()}
        )
        self.assertIn(f"✂  Cut to the model's context: {len(told)}\n", out)
        shutil.rmtree(self.folder / "logs")

    def test_a_smaller_context_from_the_beginning(self) -> None:
        for engine, form in with_engines(self.FORMS):
            with self.subTest(engine=engine, form=form):
                self.ollama.reset()
                self.ollama.configure(context_length=128, **form)
                done = self.succeed("--text", "{overview}", "--engine", engine, "--force")
                self.assert_all_said(done.out)
                asked = [entry for entry in self.ollama.log() if entry["path"] == "/v1/embeddings"]
                self.assertEqual(len(asked) > 1, form.get("ps", True) is not False)

    def test_the_model_is_loaded_again_with_a_smaller_context_in_mid_run(self) -> None:
        for engine, form in with_engines(self.FORMS):
            with self.subTest(engine=engine, form=form):
                self.ollama.reset()
                self.ollama.configure(hold=["k41 "], **form)
                flags = ("--engine", engine, "--force", "--concurrent", 1, "--batch-size", 10)
                process = self.start_program("--text", "{overview}", *flags)
                self.wait_for(lambda: self.texts[41] in self.ollama.texts(), "the batch that is held")
                self.ollama.configure(context_length=128, hold=[])
                done = self.ended(process)
                self.assertEqual((done.code, done.err), (0, ""))
                self.assert_all_said(done.out, whole=range(1, 41))


class LongTextsWhereTheServerDoesNotCut(LongTexts):
    """Over Ollama's protocol with a version that refuses to cut, so that the beginning has to be found."""

    def serve(self) -> None:
        super().serve()
        self.ollama.configure(truncates=False)

    def beginnings(self, stored: dict[int, bytes]) -> None:
        self.assertEqual(sorted(stored), [*LONG])
        for key, found in stored.items():
            words = self.texts[key].split(" ")
            fitting = [" ".join(words[:count]) for count in range(MOST * 15 // 16 - 1, MOST + 1)]
            self.assertIn(found, [blob(text) for text in fitting])

    test_split = test_fail = test_skip = test_requests_for_a_corpus_of_long_texts = None  # type: ignore[assignment]
    test_a_server_that_finds_everything_too_long_is_not_believed = None  # type: ignore[assignment]


class LongTextsOverOpenAI(LongTextsWhereTheServerDoesNotCut):
    """Over the protocol of OpenAI, in which no server is asked to cut."""

    path = "/v1"
    refusal = "`inputs` must have less than"
    test_split, test_fail, test_skip = LongTexts.test_split, LongTexts.test_fail, LongTexts.test_skip

    def serve(self) -> None:
        super().serve()
        limit = {"status": 413, "error": "`inputs` must have less than {context} tokens. Given: {given}"}
        self.ollama.configure(api=False, too_long=limit)


class LongTextsOnPostgres(OnPostgres, LongTexts):
    """The same on Postgres."""

    def test_several_machines_that_skip(self) -> None:
        self.ollama.configure(seconds_per_text=0.01, slots=1)
        flags = (*self.flags("skip", "async"), "--json", "--batch-size", "4")
        first = self.start_program(*flags)
        self.wait_for(lambda: len(self.asked()) > ROWS / 3, "the first at work")
        for process in (first, self.start_program(*flags)):
            done = self.ended(process)
            told = json.loads(done.out)
            self.assertEqual((done.code, done.err, told["failed"]), (0, "", 0))
            self.assertEqual((told["total"], told["generated"] + told["skipped"]), (ROWS, ROWS))
        self.assertEqual(self.good(self.stored("skip_async")), {})


if __name__ == "__main__":
    unittest.main()
