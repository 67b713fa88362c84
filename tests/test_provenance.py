"""What made the vectors: told beside the target, and compared with what would make the next ones."""

from __future__ import annotations

import unittest
from typing import Any

from tests.support import ENGINES, Case, OnPostgres, another_double, press_control_c

MODEL = "nomic-embed-text"
OTHER_SEED = {MODEL: {"seed": "another version"}}


class Provenance(Case):
    """Everything is about the one target of movies unless it says otherwise."""

    def setUp(self) -> None:
        super().setUp()
        self.serve("sha256:aaaa", seed="")

    def serve(self, digest: str, seed: str) -> None:
        """Have the model in some version, by its digest, whose vectors are of that seed."""
        self.ollama.reset()
        self.ollama.configure(models={MODEL: {"digest": digest, "seed": seed}})

    def made(self, target: str = "movie_embeddings") -> list[Any]:
        """Return how many vectors were made in which way: model, digest, prefix, fit, count."""
        return self.execute(
            f"SELECT p.model, p.digest, p.prefix, p.fit, count(*) FROM {target} AS e "
            "LEFT JOIN embedgen_provenance AS p ON p.id = e.provenance GROUP BY 1, 2, 3, 4 ORDER BY 2, 3, 4"
        )

    def versions(self) -> list[Any]:
        """Return the digests that are on record."""
        return [digest for (digest,) in self.execute("SELECT digest FROM embedgen_provenance ORDER BY id")]

    def test_each_vector_tells_what_made_it(self) -> None:
        self.make_movies(5)
        for engine in ENGINES:
            with self.subTest(engine=engine):
                self.succeed("--engine", engine, "--force")
                self.assertEqual(self.made(), [(MODEL, "sha256:aaaa", "", "whole", 5)])
        self.succeed("--limit", 2, "--document-prefix", "it's a film: ")
        made = [(MODEL, "sha256:aaaa", "", "whole", 3), (MODEL, "sha256:aaaa", "it's a film: ", "whole", 2)]
        self.assertEqual(self.made(), made)

    def test_another_version_stops_the_run_before_the_first_row(self) -> None:
        self.make_movies(5)
        self.succeed("--limit", 3)
        for seed in ("", "other"):  # whether or not its vectors differ
            self.serve("sha256:bbbb", seed)
            for engine in ENGINES:
                for flags in ((), ("--force", "--limit", 2), ("--force", "--where", "id > 1")):
                    words = [MODEL, "aaaa", "bbbb", "--force", "--accept-drift", "--target"]
                    self.refuse(3, "--engine", engine, *flags, words=words)
        self.assertEqual(self.asked(), [])
        self.assertEqual(self.made(), [(MODEL, "sha256:aaaa", "", "whole", 3)])

    def test_accepted_it_is_mixed_and_told_apart(self) -> None:
        self.make_movies(5)
        self.succeed("--limit", 3)
        self.serve("sha256:bbbb", "other")
        self.assertEqual(self.succeed("--accept-drift").tally, (2, 3, 0))
        self.assertEqual([row[1::3] for row in self.made()], [("sha256:aaaa", 3), ("sha256:bbbb", 2)])
        self.execute("INSERT INTO movies VALUES (6, 'One more', 'x')")
        self.assertEqual(self.succeed().tally, (1, 5, 0))  # once is enough
        self.execute("INSERT INTO movies VALUES (7, 'And one', 'x')")
        self.serve("sha256:bbbb", "and drifted")
        self.refuse(3, words=["cosine"])
        self.serve("sha256:aaaa", "")
        self.assertEqual(self.succeed().tally, (1, 6, 0))
        self.serve("sha256:cccc", "")
        self.execute("INSERT INTO movies VALUES (8, 'The last', 'x')")
        self.refuse(3, words=["cccc", "another version"])

    def test_force_replaces_it(self) -> None:
        self.make_movies(5)
        self.succeed()
        self.serve("sha256:bbbb", "other")
        self.ollama.configure(refuse=[{"contains": "Film 4", "status": 400, "error": "not that"}])
        done = self.run_program("--force")
        self.assertEqual((done.code, done.tally), (1, (4, 0, 1)))
        self.assertEqual(self.made(), [(MODEL, "sha256:bbbb", "", "whole", 4)])  # what is left of it would not compare
        self.assertEqual(self.versions(), ["sha256:bbbb"])
        self.serve("sha256:bbbb", "other")
        self.assertEqual(self.succeed().tally, (1, 4, 0))

    def test_a_force_that_was_broken_off_does_not_pass_for_done(self) -> None:
        self.make_movies(200)
        self.succeed()
        self.serve("sha256:bbbb", "other")
        self.ollama.configure(hold=["Film 11"])
        process = self.start_program("--force", "--batch-size", 4, GRACE=0.1, UNSAVED_SECONDS=0.05)
        count = "SELECT count(DISTINCT provenance) FROM movie_embeddings"
        self.wait_for(lambda: self.execute(count) == [(2,)], "the first new vectors")
        press_control_c(process)
        self.assertEqual(self.ended(process).code, 130)
        self.ollama.configure(hold=[])
        self.execute("INSERT INTO movies VALUES (0, 'New', 'x')")
        self.refuse(3, words=["another version", "aaaa", "bbbb"])
        self.assertEqual(self.succeed("--force").tally, (201, 0, 0))
        self.assertEqual(self.versions(), ["sha256:bbbb"])

    def test_a_run_that_was_refused_leaves_no_word(self) -> None:
        self.serve("", "")
        self.make_movies(5)
        self.succeed("--limit", 3)
        self.serve("sha256:bbbb", "other")
        self.refuse(3, words=["cosine"])
        self.serve("sha256:aaaa", "")
        self.assertEqual(self.succeed().tally, (2, 3, 0))

    def test_a_part_that_is_forced_must_go_with_the_rest(self) -> None:
        self.make_movies(5)
        self.succeed()
        self.serve("sha256:aaaa", "other")
        for flags in (("--limit", 2), ("--where", "id > 3")):
            self.refuse(3, "--force", *flags, words=["cosine"])
        self.assert_complete()

    def test_drift_is_seen_beyond_the_first_rows(self) -> None:
        self.make_movies(1300)
        self.succeed("--where", "id <= 1200", "--batch-size", 100)
        self.serve("sha256:aaaa", "other")
        self.refuse(3, "--where", "id > 1190", words=["cosine"])

    def test_texts_that_do_not_fit_any_more_are_no_drift(self) -> None:
        self.make_movies(5, lambda key: "and so on " * 20 + str(key))
        self.succeed("--limit", 3)
        self.ollama.configure(models={MODEL: {"digest": "sha256:aaaa", "context": 20}})
        self.assertEqual(self.succeed().tally, (2, 3, 0))

    def test_a_moments_trouble_does_not_hide_the_version(self) -> None:
        self.make_movies(5)
        self.succeed("--limit", 3)
        self.serve("sha256:bbbb", "")
        self.ollama.configure(flaky={"/api/tags": [503]})
        self.refuse(3, words=["another version", "aaaa", "bbbb"])

    def test_drift_stops_the_run_before_the_first_row(self) -> None:
        self.make_movies(20)
        self.succeed("--limit", 10)
        self.serve("sha256:aaaa", "another build of the server")
        for engine in ENGINES:
            with self.subTest(engine=engine):
                address = self.ollama.url.partition("//")[2]
                self.refuse(3, "--engine", engine, words=[address, MODEL, "--accept-drift", "cosine", "--force"])
        self.assertEqual(len(self.stored()), 10)
        self.assertLessEqual(len(set(self.asked())), 3)
        self.assertEqual(self.succeed("--accept-drift").tally, (10, 10, 0))

    def test_a_server_that_tells_no_digest(self) -> None:
        self.serve("", "")
        self.make_movies(5)
        self.succeed("--limit", 2)
        self.serve("sha256:aaaa", "")  # it does now, after an upgrade
        self.succeed("--limit", 2)
        self.serve("", "")
        self.succeed()
        self.assertEqual([row[1::3] for row in self.made()], [("", 3), ("sha256:aaaa", 2)])

    def test_a_target_that_was_dropped_is_forgotten(self) -> None:
        self.make_movies(5)
        self.succeed("--target", "kept")
        self.succeed()
        self.execute("DROP TABLE movie_embeddings")
        self.serve("sha256:bbbb", "other")
        self.succeed()
        self.assertEqual(self.made(), [(MODEL, "sha256:bbbb", "", "whole", 5)])
        self.assertEqual(self.made("kept"), [(MODEL, "sha256:aaaa", "", "whole", 5)])

    def test_a_target_without_a_place_for_it(self) -> None:
        self.make_movies(5)
        self.execute(
            f"CREATE TABLE vectors (movie INTEGER PRIMARY KEY, embedding {self.db.vector_type}, provenance TEXT)"
        )
        self.succeed("--target", "vectors", "--limit", 3)
        self.serve("sha256:bbbb", "")
        self.succeed("--target", "vectors")
        self.assertEqual(self.execute("SELECT DISTINCT provenance FROM vectors"), [(None,)])
        self.assertNotIn("embedgen_provenance", self.db.tables())
        self.execute(
            f"CREATE TABLE other (movie INTEGER PRIMARY KEY, embedding {self.db.vector_type}, provenance INTEGER)"
        )
        self.succeed("--target", "other")
        self.assertEqual(self.execute("SELECT DISTINCT provenance FROM other"), [(None,)])

    def test_another_model_is_forgotten_with_its_vectors(self) -> None:
        self.make_movies(5)
        self.succeed()
        self.ollama.configure(models={MODEL: {}, "all-minilm": {"digest": "sha256:mini"}})
        self.succeed("--model", "all-minilm", "--force")
        self.assertEqual(self.made(), [("all-minilm", "sha256:mini", "", "whole", 5)])
        self.assertEqual(self.versions(), ["sha256:mini"])


class ProvenanceOnPostgres(OnPostgres, Provenance):
    """The same on Postgres."""

    def test_two_versions_at_one_time(self) -> None:
        self.make_movies(300)
        self.ollama.configure(hold=["Film"])
        first = self.start_program("--batch-size", 2, "--force", CLAIM_SECONDS=300.0)
        self.wait_for(lambda: "Film" in " ".join(self.ollama.texts()), "the first run's request")
        other = another_double(models={MODEL: {"digest": "sha256:bbbb"}})
        for flags in ((), ("--force",)):
            self.refuse(3, "--server", other.url, *flags, words=["another run", "sha256:aaaa", "sha256:bbbb"])
        self.ollama.configure(hold=[])
        done = self.ended(first)
        self.assertEqual((done.code, done.err), (0, ""))
        self.assertEqual(self.made(), [(MODEL, "sha256:aaaa", "", "whole", 300)])


if __name__ == "__main__":
    unittest.main()
