"""The server's version is part of what made a vector: another one is used once its vectors were compared."""

from __future__ import annotations

import json
import random
import re
import signal
import unittest
from typing import Any

from tests.databases import Postgres
from tests.ollama import is_turned
from tests.support import ENGINES, FULL, Case, OnPostgres, shared_double

MODEL = "nomic-embed-text"
OLD, NEW = "0.24.0", "0.32.15"
# Of the table as it was before versions were recorded.
OLD_FORM = (
    "target text NOT NULL, model text NOT NULL, digest text NOT NULL, prefix text NOT NULL, fit text NOT NULL, "
    "accepted integer NOT NULL, UNIQUE (target, model, digest, prefix, fit)"
)
LETTERS = "éíüáöóıúëäñèâïåğşçøčž"


class VersionCase(Case):
    """100 films, of which every fourth has a letter outside ASCII; most of them embedded by one version."""

    ROWS, STORED = 100, 90

    def setUp(self) -> None:
        super().setUp()
        self.serve(OLD)
        self.make_movies(self.ROWS, self.title)

    def title(self, key: int) -> str:
        """Return the title of a film."""
        return f"Film {key}" + ("" if key % 4 else f" {LETTERS[key // 4 % len(LETTERS)]}t{LETTERS[key % 7]}")

    def serve(self, version: str, turned: float = 0.0, **model: Any) -> None:
        """Have a server of some version, whose tokenizer gives a share of the texts with accents other vectors."""
        self.ollama.reset()
        self.ollama.configure(
            version=version, tokenizer=[turned, 0], models={MODEL: {"digest": "sha256:aaaa", **model}}
        )

    def compared(self) -> set[str]:
        """Return the texts that were asked for although they were embedded."""
        stored = {
            f"Title: {self.title(key)} | Description: What happens in {key}." for key in range(1, self.STORED + 1)
        }
        return stored.intersection(self.asked())

    def made(self) -> list[Any]:
        """Return how many vectors there are of each version, None where it is not known."""
        if "embedgen_provenance" not in self.db.tables():
            return []
        return self.execute(
            "SELECT p.version, count(*) FROM movie_embeddings AS e "
            "LEFT JOIN embedgen_provenance AS p ON p.id = e.provenance GROUP BY 1 ORDER BY COALESCE(p.version, '')"
        )

    def turn_back(self) -> None:
        """Have the table of provenance in the form that it had before versions were recorded."""
        identity = "INTEGER PRIMARY KEY"
        if isinstance(self.db, Postgres):
            identity = "integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY"
        found = self.execute("SELECT target, model, digest, prefix, fit, accepted FROM embedgen_provenance ORDER BY id")
        self.execute("DROP TABLE embedgen_provenance")
        self.execute(f"CREATE TABLE embedgen_provenance (id {identity}, {OLD_FORM})")
        names = "target, model, digest, prefix, fit, accepted"
        self.execute(f"INSERT INTO embedgen_provenance ({names}) VALUES (?, ?, ?, ?, ?, ?)", found)


class Versions(VersionCase):
    def test_vectors_tell_the_version_of_their_server(self) -> None:
        for engine in ENGINES:
            with self.subTest(engine=engine):
                self.succeed("--engine", engine, "--force")
                self.assertEqual(self.made(), [(OLD, self.ROWS)])

    def test_the_same_version_is_asked_for_three(self) -> None:
        self.succeed("--limit", self.STORED)
        self.serve(OLD)
        self.succeed("--limit", 1)
        self.assertEqual(len(self.compared()), 3)

    def test_a_condition_does_not_hide_what_is_compared(self) -> None:
        self.succeed("--limit", self.STORED)
        self.serve(NEW, turned=1.0)
        for flags in (("--where", f"id > {self.STORED}"), ()):
            self.refuse(3, *flags, words=[OLD, NEW, "--accept-drift"])
        self.assertEqual(self.made(), [(OLD, self.STORED)])

    def test_another_version_is_compared_once(self) -> None:
        self.succeed("--limit", self.STORED)
        for engine in ENGINES:
            version = f"{NEW}-{engine}"
            self.serve(version)
            self.assertEqual(self.succeed("--engine", engine, "--limit", 1).tally[0], 1)
            self.assertIn(len(self.compared()), range(16, 33))
            self.assertLessEqual(sum(bool(set(entry["texts"]) & self.compared()) for entry in self.ollama.log()), 2)
            self.serve(version)
            self.assertEqual(self.succeed("--engine", engine, "--limit", 1).tally[0], 1)
            self.assertLessEqual(len(self.compared()), 3)
        self.assertEqual(self.made(), [(OLD, 90), (f"{NEW}-async", 2), (f"{NEW}-process", 2)])
        self.serve(OLD)
        self.succeed("--limit", 1)
        self.assertEqual(len(self.compared()), 3)

    def test_it_is_compared_in_requests_of_the_batch_size(self) -> None:
        self.succeed("--limit", self.STORED)
        for engine in ENGINES:
            self.serve(f"{NEW}-{engine}")
            self.succeed("--engine", engine, "--limit", 1, "--batch-size", 4)
            self.assertIn(len(self.compared()), range(16, 33))
            self.assertLessEqual(max(len(entry["texts"]) for entry in self.ollama.log()), 4)

    def test_it_is_compared_by_accents_and_the_longest_and_the_shortest(self) -> None:
        self.execute("UPDATE movies SET overview = 'x' WHERE id = 50")
        self.execute("UPDATE movies SET overview = 'and so on, and so on, and so on' WHERE id = 51")
        self.succeed("--limit", self.STORED)
        self.serve(NEW)
        self.succeed("--limit", 1)
        asked = set(self.asked())
        for text in self.execute(
            "SELECT 'Title: ' || title || ' | Description: ' || overview FROM movies WHERE id IN (50, 51)"
        ):
            self.assertIn(text[0], asked)
        accents = {self.title(key) for key in range(4, self.STORED + 1, 4)}
        self.assertEqual({title for title in accents if any(title in text for text in asked)}, accents)

    def test_vectors_that_differ_stop_the_run(self) -> None:
        self.succeed("--limit", self.STORED)
        before = self.stored()
        for engine in ENGINES:
            self.serve(NEW, turned=0.3)
            words = [NEW, OLD, "cosine", "--force", "--target", "--accept-drift", self.ollama.url, MODEL]
            said = self.refuse(3, "--engine", engine, words=words)
            turned = [key for key in range(4, self.STORED + 1, 4) if self.is_turned(key)]
            self.assertGreater(len(turned), 1)
            self.assertTrue([key for key in turned if re.search(rf" for id {key}\b", said)], said)
            self.assertEqual(
                [key for key in range(1, 91) if re.search(rf" for id {key}\b", said) and key not in turned], []
            )
        self.assertEqual(self.stored(), before)
        self.assertEqual(self.made(), [(OLD, self.STORED)])
        self.serve(NEW, turned=0.3)
        self.refuse(3, "--force", "--limit", 1, words=["cosine"])
        self.serve(OLD)
        self.assertEqual(self.succeed("--limit", 1).tally[0], 1)  # back to the old one: nothing was noted of the other
        self.assertEqual(len(self.compared()), 3)

    def is_turned(self, key: int, share: float = 0.3) -> bool:
        """Whether the new version gives a film another vector."""
        return is_turned(f"Title: {self.title(key)} | Description: What happens in {key}.", share)

    def test_the_ways_out(self) -> None:
        self.succeed("--limit", self.STORED)
        self.serve(NEW, turned=0.3)
        self.succeed("--target", "another")
        self.assertEqual(self.succeed("--accept-drift", "--limit", 1).tally[0], 1)
        self.assertEqual(self.made(), [(OLD, 90), (NEW, 1)])
        self.assertEqual(self.succeed("--limit", 1).tally[0], 1)  # to say so once is enough
        self.assertEqual(self.succeed("--force").tally[0], self.ROWS)
        self.assertEqual(self.made(), [(NEW, self.ROWS)])
        self.serve(NEW, turned=0.3)
        self.execute("INSERT INTO movies VALUES (101, 'One more', 'x')")
        self.succeed()
        self.assertEqual(len(self.compared()), 3)

    def test_a_force_that_was_broken_off_is_no_comparison(self) -> None:
        self.succeed("--limit", self.STORED)
        self.serve(NEW, turned=1.0)
        self.ollama.configure(hold=["Film 31"])
        process = self.start_program("--force", "--concurrent", 1, "--batch-size", 4, GRACE=0.1, UNSAVED_ROWS=4)
        self.wait_for(lambda: len(self.made()) == 2, "the first vectors of the new version")
        process.send_signal(signal.SIGINT)
        self.assertEqual(self.ended(process).code, 130)
        self.ollama.configure(hold=[])
        self.refuse(3, words=[NEW, OLD, "cosine"])
        self.serve(OLD)
        self.refuse(3, words=[NEW, OLD, "cosine"])

    def test_one_vector_of_three_that_differs_is_drift(self) -> None:
        self.succeed("--limit", 3)
        other = "(SELECT embedding FROM movie_embeddings WHERE movie_id = 3)"
        self.execute(f"UPDATE movie_embeddings SET embedding = {other} WHERE movie_id = 1")
        for engine in ENGINES:
            said = self.refuse(3, "--engine", engine, words=["cosine", " for id 1;", OLD])
            self.assertNotIn(" for id 2", said)
        self.assertEqual(len(self.stored()), 3)

    def test_an_odd_answer_is_asked_for_again(self) -> None:
        self.succeed("--limit", 10)
        for version in (OLD, NEW):
            self.serve(version)
            self.ollama.configure(next=["ok", "ok", "odd"])  # two for the handshake
            self.assertEqual(self.succeed("--limit", 1).tally[0], 1)
            self.assertEqual([entry["fault"] for entry in self.ollama.log() if entry["fault"]], ["odd"])

    def test_a_target_of_before_versions_were_recorded(self) -> None:
        for turned in (0.3, 0.0):
            self.wipe()
            self.make_movies(self.ROWS, self.title)
            self.serve(OLD)
            self.succeed("--limit", 2, "--on-long", "split")
            self.succeed("--limit", self.STORED - 2, "--document-prefix", "")
            self.turn_back()
            ids = self.execute("SELECT movie_id, provenance FROM movie_embeddings ORDER BY 1")
            facts = json.loads(self.succeed("--status", "--json").out)
            self.assertEqual([(one["digest"], one["version"]) for one in facts["models"]], [("sha256:aaaa", "")])
            self.succeed("--search", "Film 3", "--quiet")
            self.serve(NEW, turned)
            if turned:
                self.refuse(3, words=[NEW, "cosine", "--force"])
                continue
            self.succeed("--limit", 1)
            self.assertIn(len(self.compared()), range(16, 33))
            self.serve(NEW)
            self.succeed("--limit", 1)
            self.assertLessEqual(len(self.compared()), 3)
            self.assertEqual(self.made(), [(None, self.STORED), (NEW, 2)])
            again = self.execute("SELECT movie_id, provenance FROM movie_embeddings ORDER BY 1")
            self.assertEqual(again[: self.STORED], ids)
            self.assertEqual(self.succeed("--force").tally, (self.ROWS, 0, 0))
            self.assertEqual(self.made(), [(NEW, self.ROWS)])

    def test_a_tag_made_again_from_the_same_weights(self) -> None:
        self.serve(OLD, weights="beef")
        self.succeed("--limit", self.STORED)
        self.serve(OLD, weights="beef", digest="sha256:bbbb")
        self.succeed("--search", "Film 7", "--quiet")
        self.succeed("--dry-run")
        self.assertEqual(self.compared(), set())
        self.ollama.reset()
        self.serve(OLD, weights="beef", digest="sha256:bbbb")
        self.succeed("--limit", 1)
        self.assertIn(len(self.compared()), range(16, 33))
        self.serve(OLD, weights="beef", digest="sha256:cccc", turned=0.3)
        self.refuse(3, words=["cosine"])
        for other in ({"weights": "dead"}, {"weights": "beef", "template": "embed: {{ .Prompt }}"}):
            self.serve(OLD, **{**other, "digest": "sha256:dddd"})
            for flags in ((), ("--search", "x"), ("--dry-run",)):
                self.refuse(3, *flags, words=["another version", "dddd"])

    def test_a_server_of_the_openai_protocol(self) -> None:
        self.path = "/v1"
        for setting in ("server", "fingerprint"):
            with self.subTest(setting=setting):
                self.execute("DROP TABLE IF EXISTS movie_embeddings")
                self.serve("")
                self.ollama.configure(**{setting: "llama.cpp b1"})
                self.succeed("--limit", self.STORED)
                self.assertEqual(self.made(), [("llama.cpp b1", self.STORED)])
                self.serve("", turned=0.3)
                self.ollama.configure(**{setting: "llama.cpp b2"})
                self.refuse(3, words=["llama.cpp b1", "llama.cpp b2", "cosine"])

    def test_status_lists_the_versions(self) -> None:
        self.succeed("--limit", self.STORED)
        self.serve(NEW)
        self.succeed("--limit", 5)
        facts = json.loads(self.succeed("--status", "--json").out)
        found = [(one["model"], one["digest"], one["version"], one["rows"]) for one in facts["models"]]
        self.assertEqual(found, [(MODEL, "sha256:aaaa", OLD, 90), (MODEL, "sha256:aaaa", NEW, 5)])
        said = self.succeed("--status").out
        self.assertRegex(said, rf"(?m)^🧩 Model: {MODEL} .*\b{OLD}\b.*: 90$")
        self.assertRegex(said, rf"(?m)^🧩 Model: {MODEL} .*\b{NEW}\b.*: 5$")


class VersionsOnPostgres(OnPostgres, Versions):
    """The same on Postgres."""

    db: Postgres

    def test_without_the_right_to_bring_the_table_up_to_date(self) -> None:
        self.succeed("--limit", self.STORED)
        self.turn_back()
        before = self.execute("SELECT * FROM embedgen_provenance")
        with self.db.role(
            "GRANT CREATE ON SCHEMA public TO {role}", "GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}"
        ) as url:
            self.assertEqual(self.succeed("--database", url, "--limit", 2).tally[0], 2)
            self.serve(NEW, turned=0.3)
            self.refuse(3, "--database", url, words=["cosine", NEW])
        self.assertEqual(self.execute("SELECT * FROM embedgen_provenance"), before)

    def test_two_machines_bring_the_table_up_to_date(self) -> None:
        self.succeed("--limit", self.STORED)
        self.turn_back()
        runs = [self.start_program("--batch-size", 1) for _ in range(2)]
        for run in runs:
            done = self.ended(run)
            self.assertEqual((done.code, done.err), (0, ""), done.out)
        self.assertEqual(self.made(), [(None, self.STORED), (OLD, self.ROWS - self.STORED)])


class SeveralVersions(VersionCase):
    """Two servers of one run, of different versions."""

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.other = shared_double(1)

    def serve_two(self, turned: float, engine: str) -> tuple[object, ...]:
        """Have the other server in another version; return the flags."""
        self.serve(OLD)
        self.other.reset()
        self.other.configure(version=NEW, tokenizer=[turned, 0], models={MODEL: {"digest": "sha256:aaaa"}})
        return "--server", self.ollama.url, "--server", self.other.url, "--engine", engine, "--batch-size", 1

    def test_the_other_differs_from_what_is_stored(self) -> None:
        self.succeed("--limit", self.STORED)
        for engine in ENGINES:
            flags = self.serve_two(0.3, engine)
            self.refuse(3, *flags, words=[self.other.url, NEW, "cosine"])
        self.assertEqual(len(self.stored()), self.STORED)

    def test_the_other_differs_and_nothing_is_stored(self) -> None:
        self.execute("UPDATE movies SET title = NULL, overview = NULL WHERE id IN (4, 7)")
        for flags in ((), ("--force",)):
            self.refuse(3, *self.serve_two(0.3, "async"), *flags, words=[self.other.url, NEW, "cosine"])
            self.assertEqual(self.stored() if "movie_embeddings" in self.db.tables() else {}, {})

    def test_both_agree(self) -> None:
        for engine in ENGINES:
            self.execute("DROP TABLE IF EXISTS movie_embeddings")
            flags = self.serve_two(0.0, engine)
            for server in (self.ollama, self.other):
                server.configure(seconds_per_text=0.002, slots=1)
            self.succeed(*flags)
            self.assertEqual(self.made(), [(f"{OLD} + {NEW}", self.ROWS)])
            self.assert_complete()


class SeveralVersionsOnPostgres(OnPostgres, SeveralVersions):
    """The same on Postgres."""


class Detection(Case):
    """How often a change of the tokenizer is found that gives 5 % of all texts other vectors."""

    SEEDS = range(100 if FULL else 10)
    ROWS = 400 if FULL else 200

    def test_it_is_found(self) -> None:
        for share in (0.05, 0.16, 0.5):  # of all texts have a letter outside ASCII; of the sample films 0.16
            self.wipe()
            numbers = random.Random(0)
            accents = set(numbers.sample(range(self.ROWS), round(share * self.ROWS)))
            titles = [f"{numbers.choice(LETTERS if key in accents else 'abc')} {key}" for key in range(self.ROWS + 1)]
            self.make_movies(self.ROWS, titles.__getitem__)
            self.execute("INSERT INTO movies VALUES (?, 'New', 'x')", [(self.ROWS + 1 + seed,) for seed in self.SEEDS])
            self.ollama.reset()
            self.ollama.configure(version=OLD)
            self.succeed("--limit", self.ROWS)
            found = 0
            for seed in self.SEEDS:
                self.ollama.configure(version=f"{NEW}-{seed}", tokenizer=[0.05 / share, seed])
                found += self.run_program("--limit", 1).code == 3
            self.assertGreaterEqual(found, 0.99 * len(self.SEEDS), share)


class DetectionOnPostgres(OnPostgres, Detection):
    """The same on Postgres."""


if __name__ == "__main__":
    unittest.main()
