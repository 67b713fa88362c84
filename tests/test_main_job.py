"""The main job, as its user sees it: rows in, vectors out, by either engine."""

from __future__ import annotations

import hashlib
import itertools
import re
import unittest
from array import array
from collections.abc import Callable
from typing import Any, ClassVar

from tests.ollama import EMBED_PATHS
from tests.support import ENGINES, FULL, MOVIES, Case, OnPostgres, without_progress

# The report that both engines print, with the parts that differ between runs taken out.
REPORT = """\
============================================================
🧠 Movie Embedding Generator
============================================================
📊 Total movies to process: 100
⚡ Workers/Concurrent: 10
🔄 Skip existing: Yes
📝 Detailed logs: LOG

Generating embeddings: 100%|████████| 100/100 [TIME<00:00, ✓=50, ⊘=45, ✗=5]

💾 Saving embeddings to database...

============================================================
✅ Movie Embedding Generator Completed
============================================================
📊 Total movies processed: 100
   ✓  Successfully generated: 50
   ⊘  Skipped (already exist): 45
   ✗  Failed: 5
⏱️  Time elapsed: SECONDS seconds
⚡ Average speed: SPEED embeddings/second
============================================================
"""


def masked(out: str) -> str:
    """Return a report without its times, its speed and the log's name."""
    out = re.sub(r"(?m)^(📝 Detailed logs: ).*$", r"\1LOG", without_progress(out))
    out = re.sub(r"\[\d\d:\d\d<", "[TIME<", out)
    out = re.sub(r"elapsed: \d+\.\d\d ", "elapsed: SECONDS ", out)
    return re.sub(r"speed: \d+\.\d\d ", "speed: SPEED ", out)


class EachEngine(Case):
    """What each engine must do by itself, since it keeps the requests in flight."""

    engine: ClassVar[str] = "async"

    def test_the_report_of_fifty_skipped_and_refused(self) -> None:
        self.make_movies(100, lambda key: f"Film {key}" if key % 20 else f"Poison {key}")
        self.succeed("--where", "id % 20 BETWEEN 1 AND 9")
        refusal = {"contains": "Poison", "status": 400, "error": "embedding contains NaN or Inf values"}
        self.ollama.configure(refuse=[refusal])
        done = self.run_program("--workers", 10)
        self.assertEqual((done.code, done.err), (1, ""))
        self.assertEqual(masked(done.out), REPORT)
        self.assert_complete(but=[20, 40, 60, 80, 100])

    def test_each_refused_row_is_one_line_in_the_log_with_the_servers_words(self) -> None:
        words = "embedding contains NaN or Inf values"
        self.make_movies(30, lambda key: "Poison" if key in (7, 8) else "Good")
        self.ollama.configure(refuse=[{"contains": "Poison", "status": 400, "error": words}])
        self.assertEqual(self.run_program().tally, (28, 0, 2))
        name = {"async": "generate_embeddings_async.log", "process": "generate_embeddings.log"}[self.engine]
        lines = (self.folder / "logs" / name).read_text("utf-8").splitlines()
        failed = [line for line in lines if " failed: " in line]
        self.assertEqual([line.partition(" - WARNING - ")[2] for line in failed],
                         [f"movie 7 failed: {words}", f"movie 8 failed: {words}"])  # fmt: skip
        for line in lines:
            self.assertRegex(line, r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - \w+ - [A-Z]+ - .")

    def test_a_refusal_that_speaks_of_a_model_is_one_rows_all_the_same(self) -> None:
        self.make_movies(20, lambda key: "Poison" if key == 7 else f"Film {key}")
        self.ollama.configure(refuse=[{"contains": "Poison", "status": 400, "error": "words of no model (odd)"}])
        done = self.run_program()
        self.assertEqual((done.code, done.err, done.tally), (1, "", (19, 0, 1)))
        self.assertIn("movie 7 failed: words of no model (odd)\n", self.log())

    def test_every_vector_belongs_to_its_row(self) -> None:
        many = FULL and not isinstance(self, OnPostgres)
        rows = 2_000 if many else 200
        self.make_movies(rows)
        pairs = itertools.product((1, 10, 64), (1, 7, 128)) if many else ((1, 128), (10, 7), (20, 1))
        for concurrency, batch_size in pairs:
            # Each answer is late by chance, so that those of several requests come out of order.
            self.ollama.configure(shuffle=0.01 if concurrency > 1 else 0.0)
            with self.subTest(concurrency=concurrency, batch_size=batch_size):
                self.execute("DROP TABLE IF EXISTS movie_embeddings")
                flags = ("--concurrent", concurrency, "--batch-size", batch_size)
                self.assertEqual(self.succeed(*flags).tally, (rows, 0, 0))
                self.assert_complete()

    def test_in_flight_and_batch_size_are_kept_to(self) -> None:
        self.make_movies(60)
        self.ollama.configure(hold=["Film"])
        process = self.start_program("--concurrent", 3, "--batch-size", 4)
        self.wait_for(lambda: len(self.asked()) >= 12, "three requests")
        self.ollama.configure(hold=[], shuffle=0.02)
        self.assertEqual(self.ended(process).tally, (60, 0, 0))
        requests = [entry for entry in self.ollama.log() if "Film" in " ".join(entry["texts"])]
        self.assertEqual({len(entry["texts"]) for entry in requests}, {4})
        self.assertEqual(max(entry["in_flight"] for entry in requests), 3)
        # Kept alive: no more connections than requests in flight.
        self.assertLessEqual(len({entry["connection"] for entry in requests}), 3)

    def test_a_second_run_has_nothing_to_do_and_asks_nobody(self) -> None:
        self.make_movies(30)
        self.assertEqual(self.succeed().tally, (30, 0, 0))
        self.ollama.reset()
        self.assertEqual(self.succeed().tally, (0, 30, 0))
        self.assertEqual(self.ollama.log(), [])

    def test_failing_rows_do_not_use_up_the_limit(self) -> None:
        # Otherwise a few bad rows at the head would keep a nightly run from ever getting past them.
        self.make_movies(40, lambda key: "Poison" if key <= 12 else "Good")
        self.ollama.configure(refuse=[{"contains": "Poison", "status": 400, "error": "no"}])
        self.assertEqual(self.run_program("--limit", 10).tally, (10, 0, 12))
        self.assertEqual(sorted(self.stored()), list(range(13, 23)))

    def test_rows_deleted_while_their_text_is_embedded_are_dropped(self) -> None:
        self.make_movies(20)
        self.ollama.configure(hold=["Film"])
        process = self.start_program("--batch-size", 20)
        self.wait_for(lambda: "Film" in " ".join(self.ollama.texts()), "the request")
        self.execute("DELETE FROM movies WHERE id > 15")
        self.ollama.configure(hold=[])
        done = self.ended(process)
        self.assertEqual((done.code, done.err, done.tally), (0, "", (15, 0, 0)))
        self.assert_complete()

    def test_a_server_before_batches(self) -> None:
        self.ollama.configure(embed=False, version="0.2.5")
        self.make_movies(2)
        self.refuse(3, words=["Upgrade", "0.2.6"])
        self.assertNotIn("movie_embeddings", self.db.tables())

    def test_a_path_before_the_api(self) -> None:
        self.ollama.configure(prefix="/behind/proxy")
        self.make_movies(5)
        self.succeed("--server", f"{self.ollama.url}/")
        self.assert_complete()

    def test_the_readmes_first_command(self) -> None:
        flags = ("--load", MOVIES, "--server", "hash:")
        self.assertEqual(self.succeed(*flags).tally, (200, 0, 0))
        self.assertEqual(self.succeed(*flags).tally, (0, 200, 0))
        self.assertEqual(len(self.stored()), 200)
        self.assertEqual(self.ollama.log(), [])


class EachEngineByProcesses(EachEngine):
    """The same with worker processes."""

    engine = "process"


class EachEngineOnPostgres(OnPostgres, EachEngine):
    """The same on Postgres."""


@unittest.skipUnless(FULL, "the engine and the database are each tested with the other of either")
class EachEngineOnPostgresByProcesses(EachEngineOnPostgres):
    """The same on Postgres with worker processes."""

    engine = "process"


class MainJob(Case):
    """What the command line asks for, and what is in the tables before and after."""

    def test_each_text_is_asked_for_once(self) -> None:
        self.make_movies(100)
        self.succeed()
        self.assertEqual(len(self.asked()), 100)
        self.assertEqual(len(set(self.asked())), 100)

    def test_limit_takes_the_next_rows_each_time(self) -> None:
        self.make_movies(25)
        for start, tally in enumerate([(10, 0, 0), (10, 10, 0), (5, 20, 0)]):
            self.assertEqual(self.succeed("--limit", 10).tally, tally)
            self.assertEqual(sorted(self.stored()), list(range(1, min(start * 10 + 10, 25) + 1)))
        self.assertEqual(self.succeed("--limit", 0).tally, (0, 25, 0))

    def test_force_embeds_all_again(self) -> None:
        self.make_movies(25)
        self.succeed()
        self.ollama.reset()
        done = self.succeed("--force")
        self.assertEqual(done.tally, (25, 0, 0))
        self.assertIn("🔄 Skip existing: No\n", done.out)
        self.assertEqual(len(self.asked()), 25)

    def test_only_a_row_whose_text_changed_is_embedded_again(self) -> None:
        self.make_movies(25)
        self.succeed()
        self.execute("UPDATE movies SET title = 'Renamed' WHERE id = 7")
        self.ollama.reset()
        # Not compared with a few of those that are stored.
        self.assertEqual(self.succeed("--accept-drift").tally, (1, 24, 0))
        self.assertEqual(self.asked(), ["Title: Renamed | Description: What happens in 7."])
        self.assert_complete()

    def test_new_rows_are_embedded_and_deleted_ones_are_no_matter(self) -> None:
        self.make_movies(10)
        self.succeed()
        self.execute("INSERT INTO movies VALUES (-5, 'New', 'x')")
        self.execute("DELETE FROM movies WHERE id = 3")
        self.assertEqual(self.succeed().tally, (1, 9, 0))

    def test_a_second_model_is_refused_by_both_names(self) -> None:
        self.make_movies(5)
        self.succeed()
        self.ollama.reset()
        self.refuse(2, "--model", "all-minilm", words=["all-minilm", "nomic-embed-text", "--target", "--force"])
        self.refuse(2, "--model", "missing", words=['"missing"', "nomic-embed-text"])  # from the server, too
        self.assertEqual(self.ollama.log(), [])
        self.assert_complete()
        self.succeed("--model", "all-minilm", "--target", "other")
        self.assertEqual(self.succeed("--model", "all-minilm", "--force").tally, (5, 0, 0))
        self.assertEqual(self.execute("SELECT DISTINCT model FROM movie_embeddings"), [("all-minilm",)])
        self.assertEqual(self.stored(), self.stored("other"))

    def test_models_are_not_mixed_by_forcing_some_rows(self) -> None:
        self.make_movies(10)
        self.succeed()
        for flags in (["--limit", "5"], ["--where", "id > 3"]):
            with self.subTest(flags=flags):
                words = ["all-minilm", "nomic-embed-text", "--limit", "--where"]
                self.refuse(2, "--model", "all-minilm", "--force", *flags, words=words)
                self.assertEqual(self.succeed("--force", *flags).code, 0)
        self.assert_complete()

    def test_a_change_of_model_goes_on_where_it_was_stopped(self) -> None:
        self.make_movies(10)
        self.succeed()
        # As an interrupted change of the model leaves it.
        self.execute("UPDATE movie_embeddings SET model = 'all-minilm' WHERE movie_id <= 4")
        self.refuse(2, words=["all-minilm", "nomic-embed-text"])
        self.refuse(2, "--model", "all-minilm", words=["all-minilm", "nomic-embed-text"])
        self.assertEqual(self.succeed("--model", "all-minilm", "--force").tally, (6, 4, 0))
        self.assertEqual(self.succeed("--model", "all-minilm", "--force").tally, (10, 0, 0))

    def test_after_a_change_of_model_the_plain_command_goes_on(self) -> None:
        self.make_movies(10, lambda key: f"Film {key}.")
        self.succeed()
        self.execute("DELETE FROM movies WHERE id = 5")  # its vector stays, as SQLite has it by default
        self.ollama.configure(refuse=[{"contains": "Film 3.", "status": 400, "error": "no"}])
        self.assertEqual(self.run_program("--model", "all-minilm", "--force").tally, (8, 0, 1))
        self.assertEqual(self.execute("SELECT DISTINCT model FROM movie_embeddings"), [("all-minilm",)])
        self.assertEqual(self.run_program("--model", "all-minilm").tally, (0, 8, 1))

    def test_a_target_that_belongs_to_another_table_is_refused(self) -> None:
        self.make_movies(3)
        self.succeed()
        self.execute("CREATE TABLE movie (id INTEGER PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO movie VALUES (1, 'x')")
        self.refuse(2, "--table", "movie", words=["movie_embeddings", '"movies"', "--target"])
        self.execute("CREATE VIEW new_movies AS SELECT * FROM movies WHERE id > 1")
        self.assertEqual(self.succeed("--table", "new_movies", "--target", "movie_embeddings").tally, (0, 2, 0))

    def test_latest_is_the_same_model(self) -> None:
        self.make_movies(5)
        self.succeed()
        self.assertEqual(self.succeed("--model", "nomic-embed-text:latest").tally, (0, 5, 0))

    def test_other_dimensions_than_the_stored_are_refused(self) -> None:
        self.make_movies(5)
        self.succeed("--limit", 3)
        self.ollama.configure(models={"nomic-embed-text": {"dimensions": 16}})
        for engine in ENGINES:  # nothing is written, so that there is nothing to begin anew
            with self.subTest(engine=engine):
                self.refuse(3, "--engine", engine, words=["16 dimensions", "8"])
        self.assertEqual(sorted(self.stored()), [1, 2, 3])
        self.refuse(2, "--dimensions", "4", words=["8", "4", "--target"])
        self.refuse(2, "--dimensions", "4", "--force", "--limit", "2", words=["8", "4"])
        self.change_dimensions()

    def change_dimensions(self) -> None:
        """Vectors of another length can replace all others."""
        self.assertEqual(self.succeed("--force").tally, (5, 0, 0))

    def test_a_row_without_text_fails_and_is_not_sent(self) -> None:
        self.make_movies(6)
        self.execute("UPDATE movies SET title = NULL, overview = '' WHERE id = 2")
        self.execute("UPDATE movies SET title = ' \t', overview = NULL WHERE id = 4")
        done = self.run_program()
        self.assertEqual((done.code, done.tally), (1, (4, 0, 2)))
        self.assertEqual(len(self.asked()), 4)
        self.assertIn("movie 2 failed: no text\n", self.log())
        self.assertIn("movie 4 failed: no text\n", self.log())

    def test_where_restricts_the_rows(self) -> None:
        self.make_movies(20)
        self.assertEqual(self.succeed("--where", "id > 10 -- the newer ones").tally, (10, 0, 0))
        self.assertEqual(sorted(self.stored()), list(range(11, 21)))
        # Names in the condition are the source's, even where the target has the same.
        self.execute("ALTER TABLE movies ADD COLUMN model TEXT DEFAULT 'T'")
        self.assertEqual(self.succeed("--where", "model = 'T' AND movies.id > 5").tally, (5, 10, 0))

    def test_an_empty_table(self) -> None:
        self.make_movies(0)
        self.assertEqual(self.succeed().tally, (0, 0, 0))

    def test_what_the_run_embeds_is_in_the_log(self) -> None:
        self.make_movies(1)
        self.succeed()
        self.assertIn(" - INFO - text: Title: {title} | Description: {overview}\n", self.log())
        self.assertIn("1 generated, 0 skipped, 0 failed; exit code 0\n", self.log())

    def test_rows_deleted_meanwhile_do_not_use_up_the_limit(self) -> None:
        self.make_movies(20)
        self.ollama.configure(hold=["Film"])
        process = self.start_program("--limit", 8, "--batch-size", 8, "--concurrent", 1)
        self.wait_for(lambda: "Film" in " ".join(self.ollama.texts()), "the request")
        self.execute("DELETE FROM movies WHERE id <= 3")
        self.ollama.configure(hold=[])
        self.assertEqual(self.ended(process).tally[0], 8)
        self.assertEqual(sorted(self.stored()), list(range(4, 12)))

    def test_the_targets_columns_are_as_documented(self) -> None:
        self.make_movies(2)
        self.succeed()
        self.assertEqual(self.db.types("movie_embeddings"), self.db.target_types)
        self.assertEqual(list(self.db.types("movie_embeddings")), list(self.db.target_types))
        self.assertEqual(self.db.reference("movie_embeddings"), ("movies", "movie_id", "id", "CASCADE"))
        key, model, digest, when = self.execute(
            "SELECT movie_id, model, text_sha256, CAST(updated_at AS TEXT) FROM movie_embeddings LIMIT 1"
        )[0]
        self.assertEqual((key, model), (1, "nomic-embed-text"))
        self.assertEqual(digest, hashlib.sha256(b"Title: Film 1 | Description: What happens in 1.").digest())
        self.assertRegex(when, self.db.now)

    def test_a_target_made_by_somebody_else_is_used_as_it_is(self) -> None:
        self.make_movies(10)
        self.execute(f"CREATE TABLE vectors (film INTEGER PRIMARY KEY, embedding {self.db.vector_type})")
        vector = self.db.vector(b"a vector of eight float32 values")
        self.execute("INSERT INTO vectors VALUES (?, ?)", [(4, vector), (5, None)])
        before = self.db.types("vectors")
        self.assertEqual(self.succeed("--target", "vectors").tally, (9, 1, 0))
        stored = self.stored("vectors", "film")
        self.assertEqual(stored.pop(4), b"a vector of eight float32 values")
        expected = self.expected()
        del expected[4]
        self.assertEqual(stored, expected)
        self.assertEqual(self.db.types("vectors"), before)
        # By key alone: a changed text is no reason.
        self.execute("UPDATE movies SET title = 'Renamed' WHERE id = 7")
        self.assertEqual(self.succeed("--target", "vectors").tally, (0, 10, 0))

    def test_a_target_with_a_key_of_its_own_beside_the_rows(self) -> None:
        self.make_movies(5)
        self.execute(
            f"CREATE TABLE movie_embeddings (id {self.db.serial}, "
            f"movie_id INTEGER UNIQUE NOT NULL REFERENCES movies(id), embedding {self.db.vector_type})"
        )
        self.assertEqual(self.succeed().tally, (5, 0, 0))
        self.assert_complete()

    def test_unusable_targets_are_refused(self) -> None:
        self.make_movies(3)
        self.execute(f"CREATE TABLE vectors (film INTEGER, embedding {self.db.vector_type})")
        self.execute("CREATE TABLE texts (film INTEGER PRIMARY KEY, body TEXT)")
        self.execute("CREATE VIEW seen AS SELECT 1 AS film, NULL AS embedding")
        for target, words in [
            ("vectors", ["primary key", "film, embedding"]),
            ("texts", ["embedding", "film, body"]),
            ("seen", ["a view"]),
            ("movies", ["--target"]),
        ]:
            with self.subTest(target=target):
                self.refuse(2, "--target", target, words=words)
        self.execute("CREATE UNIQUE INDEX some_films ON vectors (film) WHERE film > 1")
        self.refuse(2, "--target", "vectors", words=["primary key"])
        self.execute("CREATE UNIQUE INDEX all_films ON vectors (film)")
        self.assertEqual(self.succeed("--target", "vectors").tally, (3, 0, 0))

    def test_targets_that_belong_to_other_rows_are_refused(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, code INTEGER UNIQUE, title TEXT)")
        self.execute("CREATE TABLE books (id INTEGER PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO movies VALUES (?, ?, ?)", [(1, 10, "One"), (2, 20, "Two")])
        for target, other in [("a", "movies"), ("b", "MOVIES (ID)"), ("c", "movies (code)"), ("d", "books")]:
            key = f"film INTEGER PRIMARY KEY REFERENCES {other}"
            self.execute(f"CREATE TABLE {target} ({key}, embedding {self.db.vector_type})")
        self.assertEqual(self.succeed("--target", "a").tally, (2, 0, 0))
        self.assertEqual(self.succeed("--target", "b").tally, (2, 0, 0))
        self.refuse(2, "--target", "c", words=['the column "code" of "movies"', "--id code"])
        self.assertEqual(self.succeed("--target", "c", "--id", "code").tally, (2, 0, 0))
        self.refuse(2, "--target", "d", words=['belongs to the table "books"'])

    def test_options_and_dimensions_reach_the_server_the_same_each_time(self) -> None:
        self.make_movies(20)
        self.succeed("--option", "num_ctx=512", "--option", "low=true", "--dimensions", 4, "--batch-size", 5)
        requests = [entry for entry in self.ollama.log() if entry["path"] in EMBED_PATHS]
        self.assertEqual({entry["path"] for entry in requests}, {"/api/embed"})  # the other does not take options
        for body in (entry["body"] for entry in requests):
            self.assertEqual((body["options"], body["dimensions"]), ({"num_ctx": 512, "low": True}, 4))
        self.assertEqual({len(vector) for vector in self.stored().values()}, {16})

    def test_a_server_that_shows_no_models(self) -> None:
        self.ollama.configure(show=False)
        self.make_movies(5)
        self.succeed()
        self.assert_complete()

    def test_a_batch_is_bounded_by_its_characters(self) -> None:
        self.make_movies(4, lambda key: "long " * 100_000 + str(key))
        self.succeed("--batch-size", 4)
        for entry in self.ollama.log():
            self.assertLessEqual(sum(map(len, entry["texts"][:-1])), 1_000_000)  # its last text may go beyond
        self.assertEqual(len(self.stored()), 4)


class MainJobOnPostgres(OnPostgres, MainJob):
    def change_dimensions(self) -> None:
        # The column is declared with its dimensions, and never altered.
        self.refuse(3, "--force", words=["16 dimensions", "8"])


class Paths(Case):
    """Over which of a server's paths vectors come; the database has no part in it."""

    engine: ClassVar[str] = "async"
    lean, usual = "/v1/embeddings", "/api/embed"

    def paths(self, title: Callable[[int], str] = "Film {}".format, **settings: Any) -> list[str]:
        """Return the paths by which the texts of 20 rows were asked for, five at a time."""
        self.make_movies(20, title)
        self.ollama.configure(**settings)
        self.assertEqual(self.succeed("--batch-size", 5, "--concurrent", 1).tally, (20, 0, 0))
        self.assert_complete()
        return [entry["path"] for entry in self.ollama.log() if "What happens" in " ".join(entry["texts"])]

    def test_vectors_come_as_base64(self) -> None:
        self.assertEqual(self.paths(), [self.lean] * 4)
        self.assertIn(f"vectors come as base64 over {self.lean}\n", self.log())

    def test_items_in_disorder(self) -> None:
        self.assertEqual(self.paths(faults={"disorder": 1.0}), [self.lean] * 4)

    def test_a_server_that_ignores_the_wish_for_base64(self) -> None:
        self.assertEqual(self.paths(base64=False), [self.usual] * 4)
        self.assertIn(f"vectors come as decimals over {self.usual}\n", self.log())

    def test_a_model_of_unknown_context(self) -> None:
        self.assertEqual(self.paths(show=False), [self.usual] * 4)

    def test_texts_that_may_be_too_long(self) -> None:
        self.assertEqual(self.paths(models={"nomic-embed-text": {"context": 30}}), [self.usual] * 4)

    def test_only_a_batch_with_a_long_text_takes_the_other_path(self) -> None:
        paths = self.paths(lambda key: "long " * 500 if key == 7 else f"Film {key}")
        self.assertEqual(sorted(paths), [self.usual] + [self.lean] * 3)


class PathsByProcesses(Paths):
    """The same with worker processes."""

    engine = "process"


class HashServer(Case):
    """--server hash: computes in the process."""

    def test_both_engines_leave_the_same_vectors(self) -> None:
        self.succeed("--load", MOVIES, "--server", "hash:")
        first = self.stored()
        self.succeed("--server", "hash:", "--engine", "process", "--force")
        self.assertEqual(self.stored(), first)

    def test_vectors_have_256_dimensions_length_1_and_the_model_hash_256(self) -> None:
        self.succeed("--load", MOVIES, "--server", "hash:")
        for vector in self.stored().values():
            numbers = array("f", vector)
            self.assertEqual(len(numbers), 256)
            self.assertAlmostEqual(sum(number * number for number in numbers), 1.0, places=5)
        self.assertEqual(self.execute("SELECT DISTINCT model FROM movie_embeddings"), [("hash-256",)])

    def test_it_has_one_model(self) -> None:
        self.make_movies(2)
        self.refuse(2, "--server", "hash:", "--model", "bge-m3", words=["hash-256"])
        self.refuse(2, "--server", "hash:", "--dimensions", "64", words=["256"])

    def test_it_is_no_fallback(self) -> None:
        self.make_movies(2)
        self.ollama.away()
        self.refuse(3)
        self.assertNotIn("movie_embeddings", self.db.tables())

    def test_a_text_without_words_fails(self) -> None:
        self.make_movies(2)
        self.execute("UPDATE movies SET title = '!!!' WHERE id = 1")
        done = self.run_program("--server", "hash:", "--text", "{title}")
        self.assertEqual((done.code, done.tally), (1, (1, 0, 1)))


class HashServerOnPostgres(OnPostgres, HashServer):
    pass


class Keys(Case):
    """What only SQLite stores as a text."""

    def test_a_key_that_is_no_text_ends_the_run(self) -> None:
        self.execute("CREATE TABLE movies (id TEXT PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO movies VALUES (CAST(x'ff41' AS TEXT), 'a'), ('b', 'b')")
        done = self.run_program()
        self.assertEqual(done.code, 3)
        self.assertIn("not valid UTF-8", done.err)


if __name__ == "__main__":
    unittest.main()
