"""--search and --similar: what they list, in which order, and what they refuse."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
import unittest
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import embedgen
from tests.databases import Postgres, SQLite
from tests.ollama import blob
from tests.support import DEV_FULL, FULL, MOVIES, ROOT, Case, OnPostgres, another_double, environment

WHERE = "year >= 1960 AND id % 3 <> 1"


def numbers(vector: bytes) -> list[float]:
    """Return a stored vector's numbers."""
    return array("f", vector).tolist()


def likeness(one: list[float], other: list[float]) -> float:
    """Return the cosine of two vectors, reckoned as in a textbook."""
    product = sum(a * b for a, b in zip(one, other))
    return product / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def films() -> list[dict[str, str]]:
    """Return the sample films, as they stand in the file."""
    with open(MOVIES, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def three_words(overview: str) -> str:
    """Return the three longest distinct words of a text, in its order; of equally long ones the first."""
    words = list(dict.fromkeys(re.findall(r"\w+", overview.lower())))
    longest = sorted(words, key=lambda word: (-len(word), words.index(word)))[:3]
    return " ".join(sorted(longest, key=words.index))


class SearchCase(Case):
    """What the tests share."""

    def found(self, *flags: object, **more: Any) -> list[dict[str, Any]]:
        """Return the results of a run with --json."""
        done = self.run_program(*flags, "--json", **more)
        self.assertEqual(done.code, 0, done.err)
        return list(json.loads(done.out)["results"])

    def keys(self, *flags: object) -> list[Any]:
        """Return the keys that are listed, in order."""
        return [result["key"] for result in self.found(*flags)]

    def brute_force(self, query: bytes, keys: Iterable[Any] | None = None) -> list[tuple[float, Any]]:
        """Return similarity and key of all stored vectors, or of those of `keys`, in the order that is promised."""
        stored = self.stored()
        near = [(likeness(numbers(query), numbers(stored[key])), key) for key in (stored if keys is None else keys)]
        return sorted(near, key=lambda one: (-round(one[0], 12), one[1]))

    def load_films(self, *flags: object) -> None:
        """Have the sample films in the database."""
        self.succeed("--server", "hash:", "--load", MOVIES, *flags)

    def duplicate(self, film: int, *keys: int) -> None:
        """Have a film stand under more keys."""
        for key in keys:
            self.execute(
                f'INSERT INTO movies SELECT {key}, title, year, genres, "cast", language, rating, overview '
                f"FROM movies WHERE id = {film}"
            )


class Films(SearchCase):
    """The sample films, embedded by words."""

    made: ClassVar[bytes] = b""  # the file, as it is before each test

    def setUp(self) -> None:
        super().setUp()
        if self.made and isinstance(self.db, SQLite):
            self.database.write_bytes(self.made)
            return
        self.load_films()
        if isinstance(self.db, SQLite):
            Films.made = self.database.read_bytes()

    def test_three_words_of_an_overview_find_its_film(self) -> None:
        chosen = films()[:: 1 if FULL and isinstance(self.db, SQLite) else 20]
        first = 0
        for film in chosen:
            words = three_words(film["overview"])
            first += self.keys("--server", "hash:", "--search", words, "--top", 1) == [int(film["id"])]
        self.assertGreaterEqual(first, (0.95 if len(chosen) > 100 else 0.9) * len(chosen))

    def test_a_search_from_the_command_line(self) -> None:
        film = films()[41]
        done = self.succeed("--server", "hash:", "--search", three_words(film["overview"]), "--top", 3)
        head, *lines = done.out.splitlines()
        self.assertEqual(head, f'🔎 Movies nearest to "{three_words(film["overview"])}", by hash-256')
        self.assertEqual(len(lines), 3)
        self.assertRegex(lines[0], rf"^1  0\.\d{{4}} +42  {re.escape(film['title'])} \| {film['year']} \| ")
        self.assertTrue(all(len(line) <= 200 for line in lines))

    def test_json_has_what_a_program_wants_and_nothing_else(self) -> None:
        film = films()[41]
        done = self.succeed("--server", "hash:", "--search", three_words(film["overview"]), "--json")
        whole = json.loads(done.out)
        self.assertEqual(list(whole), ["query", "model", "results"])
        self.assertEqual((whole["query"], whole["model"]), (three_words(film["overview"]), "hash-256"))
        self.assertEqual([result["rank"] for result in whole["results"]], list(range(1, 11)))
        first = whole["results"][0]
        self.assertEqual(first["key"], 42)
        self.assertEqual(list(first["columns"]), ["title", "year", "genres", "overview", "cast", "language", "rating"])
        self.assertEqual(first["columns"]["overview"], film["overview"])
        self.assertEqual(first["columns"]["year"], int(film["year"]))

    def test_similar_equals_brute_force(self) -> None:
        self.duplicate(7, 300, 250, 201, 202)
        self.duplicate(100, 350, 203)
        self.succeed("--server", "hash:")
        stored = self.stored()
        allowed = {key for (key,) in self.execute(f"SELECT id FROM movies WHERE {WHERE}")}
        for key in (1, 7, 100, 203, 300):
            for where in (None, WHERE):
                with self.subTest(key=key, where=where):
                    expected = self.brute_force(stored[key], allowed if where else None)
                    expected = [one for one in expected if one[1] != key][:12]
                    flags = ("--similar", key, "--top", 12, *(("--where", where) if where else ()))
                    results = self.found("--server", "hash:", *flags)
                    self.assertEqual([one["key"] for one in results], [key for _, key in expected])
                    for one, (similarity, _) in zip(results, expected):
                        self.assertAlmostEqual(one["similarity"], similarity, places=5)
        self.assertEqual(self.keys("--server", "hash:", "--similar", 7, "--top", 4), [201, 202, 250, 300])

    def test_the_model_of_the_stored_vectors_is_meant(self) -> None:
        self.prefixed = True
        self.assertEqual(self.run_program("--similar", 7).err, "")
        self.execute("UPDATE movies SET title = 'Another' WHERE id = 12")
        self.assertIn("note: of 200 movies, 1 found by an older text. ", self.run_program("--similar", 7).err)

    def test_multiples_of_one_vector_come_by_key(self) -> None:
        self.duplicate(7, *range(400, 340, -1))
        self.succeed("--server", "hash:")
        vector = numbers(self.stored()[7])
        for key in range(341, 401):
            scaled = array("f", [(1 + key % 13 / 7) * number for number in vector]).tobytes()
            self.update(key, scaled, "")
        self.assertEqual(self.keys("--server", "hash:", "--similar", 7, "--top", 5), [*range(341, 346)])

    def test_a_vector_without_a_direction(self) -> None:
        self.update(7, bytes(1024), "")
        self.refuse(3, "--similar", 7, words=["movie 7 has a vector without a direction", "--force"])

    @unittest.skipUnless(DEV_FULL, "needs a device that is full")
    def test_an_output_that_takes_nothing(self) -> None:
        with open("/dev/full", "wb") as full:
            flags = self.arguments("--server", "hash:", "--search", "ship")
            done = subprocess.run(flags, cwd=self.folder, stdout=full, stderr=subprocess.PIPE)
        self.assertEqual(done.returncode, 3, done.stderr)

    def test_more_ties_than_are_wanted_come_by_key(self) -> None:
        self.duplicate(7, *range(400, 340, -1))
        self.succeed("--server", "hash:")
        self.assertEqual(self.keys("--server", "hash:", "--similar", 7, "--top", 2), [341, 342])

    def test_similar_never_lists_the_row_itself(self) -> None:
        for key in (1, 101):
            self.assertNotIn(key, self.keys("--server", "hash:", "--similar", key, "--top", 200))
        self.assertEqual(len(self.keys("--server", "hash:", "--similar", 5, "--top", 500)), 199)

    def test_rows_that_are_gone_are_not_listed(self) -> None:
        nearest = self.keys("--server", "hash:", "--similar", 5)[0]
        self.execute(f"DELETE FROM movies WHERE id = {nearest}")
        self.assertNotIn(nearest, self.keys("--server", "hash:", "--similar", 5, "--top", 500))

    def test_what_is_not_searched_is_said(self) -> None:
        self.duplicate(7, 301, 302)
        self.execute("UPDATE movies SET title = 'Another' WHERE id = 12")
        flags = ("--server", "hash:", "--similar", 5)
        done = self.run_program(*flags)
        self.assertEqual(
            done.err,
            "note: of 202 movies, 2 not searched, without an embedding; 1 found by an older text. "
            "Run embedgen without --similar to embed them.\n",
        )
        self.assertEqual(self.run_program(*flags, "--quiet").err, "")
        self.assertEqual(self.run_program(*flags, "--where", "id < 10").err, "")

    def test_no_results_are_no_error(self) -> None:
        done = self.succeed("--server", "hash:", "--search", "ship", "--where", "id < 0")
        self.assertEqual(done.out, "No movies to compare with were found.\n")
        done = self.succeed("--server", "hash:", "--search", "ship", "--where", "id < 0", "--json")
        self.assertEqual(json.loads(done.out)["results"], [])

    def test_vectors_need_not_be_of_length_one(self) -> None:
        stored = self.stored()
        before = self.brute_force(stored[5])
        for key, factor in ((9, 3.0), (10, 0.01), (11, 250.0), (5, 40.0)):
            scaled = array("f", [factor * number for number in numbers(stored[key])]).tobytes()
            kind = "?::extensions.vector" if isinstance(self.db, Postgres) else "?"
            self.update(key, scaled, kind)
        self.assertEqual(self.keys("--server", "hash:", "--similar", 5, "--top", 199), [k for _, k in before if k != 5])

    def update(self, key: int, vector: bytes, kind: str) -> None:
        """Replace a stored vector."""
        if isinstance(self.db, Postgres):
            self.execute(f"UPDATE movie_embeddings SET embedding = '{self.db.vector(vector)}' WHERE movie_id = {key}")
        else:
            self.execute(f"UPDATE movie_embeddings SET embedding = x'{vector.hex()}' WHERE movie_id = {key}")

    def test_lines_are_fitted(self) -> None:
        hits = [
            {"rank": rank, "similarity": similarity, "key": key, "columns": columns}
            for rank, similarity, key, columns in (
                (1, 0.91234, 7, {"title": "映画の題名がとても長い場合の表示", "overview": "a\nb\x1b[31m " * 20}),
                (2, 0.5, 12345, {"title": None, "year": 1999, "overview": "  "}),
            )
        ]
        for cells in (30, 41, 80):
            first, second = embedgen.hit_lines(hits, cells)
            self.assertLessEqual(embedgen.width_of(first), cells)
            self.assertGreaterEqual(embedgen.width_of(first), cells - 1)  # a wide character may not fit
            self.assertTrue(first.startswith("1  0.9123      7  映画"))
            self.assertEqual(second, "2  0.5000  12345  1999")
        self.assertNotRegex(embedgen.hit_lines(hits, 200)[0], r"[\x00-\x1f]")


class FilmsOnPostgres(OnPostgres, Films):
    """The same on Postgres."""


class Queries(SearchCase):
    """What a search asks the server for, and what it refuses."""

    def test_the_double_gets_the_query_with_its_prefix(self) -> None:
        self.make_movies(30)
        for model, prefix, seed in (("nomic-embed-text", "search_query: ", ""), ("all-minilm", "", "all-minilm")):
            target = ("--model", model, "--target", model)
            self.succeed(*target)
            self.ollama.reset()
            results = self.found(*target, "--search", "a film about dragons")
            self.assertEqual(self.asked(), [prefix + "a film about dragons"])
            stored = self.stored(model)
            query = numbers(blob(prefix + "a film about dragons", seed=seed))
            expected = sorted(stored, key=lambda key: (-likeness(query, numbers(stored[key])), key))[:10]
            self.assertEqual([one["key"] for one in results], expected)
        self.found("--search", "dragons", "--target", "all-minilm", "--model", "all-minilm", "--query-prefix", "q: ")
        self.assertEqual(self.asked()[-1], "q: dragons")

    def test_another_model_is_refused(self) -> None:
        self.make_movies(3)
        self.succeed()
        self.refuse(2, "--search", "x", "--model", "all-minilm", words=["nomic-embed-text", "all-minilm", "--model"])
        self.refuse(2, "--search", "x", "--server", "hash:", words=["nomic-embed-text", "hash-256"])
        self.assertNotIn("search_query: x", self.asked())

    def test_another_version_is_refused(self) -> None:
        self.make_movies(3)
        self.ollama.configure(models={"nomic-embed-text": {"digest": "sha256:aaaa"}})
        self.succeed()
        self.found("--search", "x")
        self.ollama.configure(models={"nomic-embed-text": {"digest": "sha256:bbbb"}})
        self.refuse(3, "--search", "x", words=["another version", "aaaa", "bbbb"])

    def test_a_version_of_which_nothing_is_left_is_refused(self) -> None:
        self.make_movies(3)
        for digest in ("aaaa", "bbbb"):
            self.ollama.configure(models={"nomic-embed-text": {"digest": f"sha256:{digest}"}})
            # Row by row, which leaves both on record.
            for key in (1, 2, 3):
                self.succeed("--force", "--accept-drift", "--where", f"id = {key}")
        self.assertEqual(len(self.execute("SELECT 1 FROM embedgen_provenance")), 2)
        self.found("--search", "x")
        self.ollama.configure(models={"nomic-embed-text": {"digest": "sha256:aaaa"}})
        self.refuse(3, "--search", "x", words=["another version", "aaaa", "bbbb"])

    def test_models_of_several_lengths(self) -> None:
        self.make_movies(3)
        columns = f"movie_id {self.db.integer} PRIMARY KEY, embedding {self.db.any_vector}, model TEXT"
        self.execute(f"CREATE TABLE vectors ({columns})")
        vectors = ((1, bytes(4)), (2, blob("2")), (3, blob("3")))
        rows = [(key, self.db.vector(vector), "nomic-embed-text" if key > 1 else "other") for key, vector in vectors]
        self.execute("INSERT INTO vectors VALUES (?, ?, ?)", rows)
        self.assertEqual({one["key"] for one in self.found("--search", "x", "--target", "vectors")}, {2, 3})

    def test_other_dimensions_are_refused(self) -> None:
        self.make_movies(3)
        self.succeed("--dimensions", 4)
        self.refuse(2, "--search", "x", words=["4 dimensions", "8", "--dimensions"])
        self.assertEqual(len(self.found("--search", "x", "--dimensions", 4)), 3)

    def test_nothing_to_search(self) -> None:
        self.make_movies(3)
        for flags in (("--search", "x"),):
            self.refuse(3, *flags, words=["no embeddings yet", "movie_embeddings", "without --search"])
        self.refuse(3, "--similar", 1, words=["movie 1 has no embedding"])
        self.succeed()
        self.execute("DELETE FROM movie_embeddings")
        self.refuse(3, "--search", "x", words=["no embeddings yet", "movie_embeddings"])
        self.refuse(2, "--similar", 9, words=["no row", "id 9"])
        self.refuse(2, "--similar", "seven", words=["no row", "id seven"])
        self.assertEqual(self.ollama.texts().count("search_query: x"), 0)

    def test_a_server_that_is_away(self) -> None:
        self.make_movies(3)
        self.succeed()
        away = "http://127.0.0.1:9"
        said = self.refuse(3, "--search", "x", "--server", away, words=[away, "ollama serve"])
        self.assertEqual(said, self.refuse(3, "--force", "--server", away))
        self.refuse(3, "--search", "x", "--model", "nomic-embed-text:v2", "--target", "movie_embeddings2",
                    words=["no embeddings yet"])  # fmt: skip
        self.assertEqual(len(self.found("--search", "x", "--server", away, "--server", self.ollama.url)), 3)
        other = another_double()
        self.assertEqual(len(self.found("--search", "x", "--server", self.ollama.url, "--server", other.url)), 3)
        self.assertEqual(other.log(), [])  # nobody waits for a second answer
        self.ollama.away()
        self.assertEqual(len(self.found("--similar", 1)), 2)  # asks nobody

    def test_over_the_other_protocol(self) -> None:
        self.make_movies(3)
        server = ("--server", self.ollama.url + "/v1")
        self.succeed(*server)
        self.assertEqual(len(self.found(*server, "--search", "x")), 3)
        self.assertEqual(self.ollama.log()[-1]["path"], "/v1/embeddings")
        self.assertEqual(self.asked()[-1], "search_query: x")

    def test_a_text_that_the_server_refuses(self) -> None:
        self.make_movies(3)
        self.succeed()
        self.ollama.configure(refuse=[{"contains": "dragons", "status": 400, "error": "no dragons here"}])
        self.refuse(3, "--search", "dragons", words=["does not embed", "no dragons here"])

    def test_a_query_that_is_no_text(self) -> None:
        self.make_movies(3)
        self.succeed()
        self.assertEqual(len(self.found("--search", "caf\udce9")), 3)
        self.refuse(2, "--similar", "caf\udce9", words=["no row", "caf?"])

    def test_keys_that_are_texts(self) -> None:
        self.execute("CREATE TABLE movies (id TEXT PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO movies VALUES (?, ?)", [(f"tt{n}'\"é", f"Film {n}") for n in range(9)])
        self.succeed()
        keys = self.keys("--similar", "tt3'\"é")
        self.assertEqual(sorted(keys), sorted(f"tt{n}'\"é" for n in range(9) if n != 3))

    def test_a_foreign_target(self) -> None:
        self.make_movies(4)
        self.execute(f"CREATE TABLE vectors (movie_id {self.db.integer} PRIMARY KEY, embedding {self.db.vector_type})")
        rows = [(key, self.db.vector(blob(str(key)))) for key in (1, 2, 3)]
        self.execute("INSERT INTO vectors VALUES (?, ?)", rows)
        done = self.run_program("--similar", 2, "--target", "vectors", "--json")
        self.assertEqual({one["key"] for one in json.loads(done.out)["results"]}, {1, 3})
        self.assertIsNone(json.loads(done.out)["model"])
        self.assertIn(", by an unknown model\n", self.run_program("--similar", 2, "--target", "vectors").out)
        self.assertIn("of 4 movies, 1 not searched", done.err)
        self.assertEqual(len(self.found("--search", "x", "--target", "vectors")), 3)

    def test_columns_with_names_of_our_own(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, rank TEXT, key TEXT)")
        self.execute("INSERT INTO movies VALUES (1, 'x', 'y'), (2, 'z', NULL)")
        flags = ("--columns", "rank,key")
        self.succeed(*flags)
        self.assertEqual(self.found(*flags, "--similar", 2)[0]["columns"], {"rank": "x", "key": "y"})


class QueriesOnPostgres(OnPostgres, Queries):
    """The same on Postgres."""


class OnlySQLite(SearchCase):
    """One pass over the table, in memory that does not grow with it."""

    def test_it_starts_no_worker_processes(self) -> None:
        self.make_movies(3)
        self.succeed()
        flags = self.arguments("--search", "x", "--quiet")
        code = "import sys, embedgen; print(embedgen.main(), 'multiprocessing' in sys.modules)"
        arguments = [sys.executable, "-S", "-c", code, *flags[flags.index("--log-dir") :]]
        env = environment({"PYTHONPATH": str(ROOT)})
        done = subprocess.run(arguments, cwd=self.folder, env=env, stdout=subprocess.PIPE, check=True)
        self.assertEqual(done.stdout.decode().splitlines()[-1], "0 False")

    def test_blobs_of_another_length_are_not_compared(self) -> None:
        self.load_films()
        self.execute("UPDATE movie_embeddings SET embedding = x'0000803f' WHERE movie_id = 9")
        self.execute("UPDATE movie_embeddings SET embedding = zeroblob(1024) WHERE movie_id = 10")
        done = self.run_program("--server", "hash:", "--similar", 5, "--top", 500, "--json")
        keys = [one["key"] for one in json.loads(done.out)["results"]]
        self.assertEqual(set(range(1, 201)) - set(keys), {5, 9, 10})
        self.assertEqual(
            done.err,
            "note: of 200 movies, 1 not searched, with one that does not compare. "
            "Run embedgen without --similar to embed them.\n",
        )

    def compare(self, rows: Sequence[tuple[Any, bytes]], *tops: int, key_type: str = "INTEGER") -> None:
        """Have films with these vectors, and look for the nearest to another one, film 0: as many as each of `tops`."""
        self.execute(f"CREATE TABLE movies (id {key_type} PRIMARY KEY NOT NULL, title TEXT)")
        self.execute(f"CREATE TABLE movie_embeddings (movie_id {key_type} PRIMARY KEY NOT NULL, embedding BLOB)")
        query = blob("query")
        self.execute("INSERT INTO movies VALUES (?, ?)", [(key, "x") for key, _ in [(0, query), *rows]])
        self.execute("INSERT INTO movie_embeddings VALUES (?, ?)", [(0, query), *rows])
        near = [(-round(likeness(numbers(query), numbers(vector)), 9), key) for key, vector in rows]
        expected = [key for _, key in sorted(near, key=lambda one: (one[0], isinstance(one[1], str), one[1]))]
        for top in tops:
            with self.subTest(top=top):
                self.assertEqual(self.keys("--similar", 0, "--top", top), expected[:top])

    def test_the_nearest_of_many(self) -> None:
        self.compare([(key, blob(str(key % 700))) for key in range(1, 2000)], 1, 2, 10, 1500, 5000)

    def test_equally_near_keys_of_several_types(self) -> None:
        self.compare([(key, blob("query")) for key in ("b", 2, "a", 1.5)], 5, key_type="")

    def test_very_long_and_very_short_vectors(self) -> None:
        scale = {key: 10.0 ** (key % 7 - 3) for key in range(1, 300)}
        rows = [(key, array("f", [by * number for number in numbers(blob(str(key)))])) for key, by in scale.items()]
        self.compare([(key, vector.tobytes()) for key, vector in rows], 20)

    def test_numbers_that_are_none(self) -> None:
        bad = [array("f", [value] * 8).tobytes() for value in (math.nan, math.inf, 0.0)]
        self.make_movies(5)
        self.execute("CREATE TABLE movie_embeddings (movie_id INTEGER PRIMARY KEY, embedding BLOB)")
        rows = list(enumerate([*bad, blob("x"), blob("y")], 1))
        self.execute("INSERT INTO movie_embeddings VALUES (?, ?)", rows)
        self.assertEqual(self.keys("--similar", 4, "--top", 5), [5])
        for key in (1, 2, 3):
            self.refuse(3, "--similar", key, words=["without a direction"])

    def test_keys_of_no_type(self) -> None:
        self.execute("CREATE TABLE movies (id PRIMARY KEY NOT NULL, title TEXT)")
        self.execute("INSERT INTO movies VALUES (?, ?)", [(7, "a"), ("7", "b"), ("x", "c"), (2.5, "d")])
        self.succeed()
        self.assertEqual(sorted(map(repr, self.keys("--similar", "7"))), ["'x'", "2.5", "7"])
        self.execute("DELETE FROM movies WHERE title = 'b'")
        self.assertEqual(sorted(map(repr, self.keys("--similar", "7"))), ["'x'", "2.5"])

    def test_numbers_that_json_does_not_have(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, rating REAL)")
        self.execute("INSERT INTO movies VALUES (1, 9e999), (2, -9e999), (3, 1.5), (4, 1e22)")
        flags = ("--columns", "rating")
        self.succeed(*flags)
        found = {one["key"]: one["columns"]["rating"] for one in self.found(*flags, "--similar", 3)}
        self.assertEqual(found, {1: "inf", 2: "-inf", 4: 1e22})

    def test_texts_that_are_none(self) -> None:
        self.make_movies(3)
        self.execute("UPDATE movies SET title = CAST(x'41ff42' AS TEXT) WHERE id = 2")
        self.succeed()
        titles = {one["columns"]["title"] for one in self.found("--similar", 1)}
        self.assertEqual(titles, {"A\ufffdB", "Film 3"})


class OnlyPostgres(OnPostgres, SearchCase):
    """Types and indexes that only Postgres has."""

    db: Postgres

    def test_keys_that_are_uuids(self) -> None:
        self.execute("CREATE TABLE movies (id uuid PRIMARY KEY, title text)")
        self.execute("INSERT INTO movies SELECT ('00000000-0000-0000-0000-00000000000' || n)::uuid, 'Film ' || n "
                     "FROM generate_series(1, 5) n")  # fmt: skip
        self.succeed()
        keys = self.keys("--similar", "00000000-0000-0000-0000-000000000003")
        self.assertEqual(sorted(keys), [f"00000000-0000-0000-0000-00000000000{n}" for n in (1, 2, 4, 5)])
        self.refuse(2, "--similar", "3", words=["no row"])

    def test_a_target_of_halfvec(self) -> None:
        self.make_movies(20)
        self.execute("CREATE TABLE movie_embeddings (movie_id bigint PRIMARY KEY, embedding extensions.halfvec(8))")
        self.succeed()
        stored = self.stored()
        expected = [key for _, key in self.brute_force(stored[3]) if key != 3][:10]
        self.assertEqual(self.keys("--similar", 3), expected)
        self.assertEqual(len(self.keys("--search", "x")), 10)

    def test_a_target_without_dimensions(self) -> None:
        self.make_movies(5)
        self.execute("CREATE TABLE movie_embeddings (movie_id bigint PRIMARY KEY, embedding extensions.vector)")
        self.succeed()
        self.execute("UPDATE movie_embeddings SET embedding = '[1,2,3]' WHERE movie_id = 2")
        done = self.run_program("--similar", 1, "--json")
        self.assertEqual({one["key"] for one in json.loads(done.out)["results"]}, {3, 4, 5})
        self.assertIn("of 5 movies, 1 not searched", done.err)

    def looks(self) -> int:
        """Return how often the index was used for a search."""
        sql = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'movie_embeddings_embedding_hnsw'"
        return int(self.execute(sql)[0][0])

    def test_the_index_is_used(self) -> None:
        self.make_movies(3000)
        self.succeed("--index")
        self.execute("ANALYZE")
        exact = [key for _, key in self.brute_force(self.stored()[7]) if key != 7]
        # Made to use the index, which Postgres would rather not for a table as small as this.
        made = {"PGOPTIONS": "-c enable_seqscan=off -c enable_sort=off -c enable_bitmapscan=off"}
        for condition, wanted in (("true", exact), ("id % 30 = 1", [key for key in exact if key % 30 == 1])):
            before = self.looks()
            found = self.found("--similar", 7, "--where", condition, env=made)
            # It is approximate.
            self.assertGreaterEqual(len({one["key"] for one in found} & {*wanted[:10]}), 8)
            self.wait_for(lambda before=before: self.looks() > before, "a use of the index")
        # Where it has found too few, all are looked at.
        found = self.found("--similar", 7, "--where", "id % 250 = 1", env=made)
        self.assertEqual([one["key"] for one in found], [key for key in exact if key % 250 == 1][:10])

    def test_without_an_index_the_order_is_exact(self) -> None:
        self.make_movies(300)
        self.succeed()
        exact = [key for _, key in self.brute_force(self.stored()[7]) if key != 7]
        self.assertEqual(self.keys("--similar", 7), exact[:10])


if __name__ == "__main__":
    unittest.main()
