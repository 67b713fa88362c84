"""Names are names, keys are keys, and a text is whatever stands in the row."""

from __future__ import annotations

import datetime
import decimal
import json
import re
import sqlite3
import uuid

import embedgen
from tests.ollama import blob
from tests.support import ENGINES, Case, OnPostgres


class Names(Case):
    def test_tables_and_columns_of_any_name(self) -> None:
        for table, columns in [
            ("my movies", ("the id", "the title")),
            ("qu\"ote'd", ('k"ey', "ti'tle")),
            ("select", ("from", "where")),
            ("фильмы", ("номер", "название")),
            ("映画", ("番号", "題名")),
            ("semi;colon--", ("a;b", "c/*d")),
            ("per%cent?s", ("%s", "?1")),
            ("dotted.name", ("a.b", "c.d")),
        ]:
            with self.subTest(table=table):
                key, text = (name.replace('"', '""') for name in columns)
                quoted = table.replace('"', '""')
                self.execute(f'CREATE TABLE "{quoted}" ("{key}" INTEGER PRIMARY KEY, "{text}" TEXT)')
                self.execute(f'INSERT INTO "{quoted}" VALUES (?, ?)', [(1, "one"), (2, "two")])
                template = "<{" + columns[1] + "}>"
                done = self.succeed("--table", table, "--text", template, "--target", f"{table} vectors")
                self.assertEqual(done.tally, (2, 0, 0))
                noun = embedgen.singular(table).replace('"', '""')
                stored = self.stored(f"{quoted} vectors", f"{noun}_id")
                self.assertEqual(stored, {1: blob("<one>"), 2: blob("<two>")})
                done = self.succeed("--table", table, "--text", template, "--target", f"{table} vectors")
                self.assertEqual(done.tally, (0, 2, 0))

    def test_rows_are_called_by_the_name_of_the_table(self) -> None:
        self.execute("CREATE TABLE big_stories (id INTEGER PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO big_stories VALUES (1, 'one')")
        for given in ("big_stories", "BIG_STORIES"):  # as the database takes it, too
            out = self.succeed("--table", given).out
            self.assertIn("🧠 Big Story Embedding Generator\n", out)
            self.assertIn("📊 Total big stories to process: 1\n", out)

    def test_a_name_is_never_code(self) -> None:
        self.make_movies(3)
        for name in ['movies"; DROP TABLE movies; --', "movies'; DROP TABLE movies; --", "movies; DROP TABLE movies"]:
            with self.subTest(name=name):
                self.refuse(2, "--table", name, words=["has no table", "movies"])
                self.refuse(2, "--id", name, words=["has no column", "id, title, overview"])
                self.refuse(2, "--columns", f'"{name}"'.replace('"movies"', '"movies""'), words=["overview"])
        self.refuse(2, "--where", "1); DROP TABLE movies; --", words=["--where"])
        self.succeed()
        self.succeed("--target", 'v"; DROP TABLE movies; --', "--force")
        self.assert_complete()

    def test_a_schema_before_the_name(self) -> None:
        self.make_movies(3)
        schema = self.db.schema
        self.assertEqual(self.succeed("--table", f"{schema}.movies").tally, (3, 0, 0))
        self.assertEqual(self.succeed("--table", "movies", "--target", f"{schema}.movie_embeddings").tally, (0, 3, 0))
        self.refuse(2, "--table", "elsewhere.movies", words=["elsewhere.movies"])

    def test_case_does_not_matter_where_it_does_not_in_sql(self) -> None:
        self.make_movies(3)
        done = self.succeed("--table", "MOVIES", "--id", "ID", "--columns", "TITLE,Overview")
        self.assertEqual(done.tally, (3, 0, 0))
        self.assertEqual(self.stored()[1], blob("Title: Film 1 | Overview: What happens in 1."))

    def test_the_nouns_of_the_report(self) -> None:
        for table, noun, plural in [
            ("articles", "Article", "articles"),
            ("stories", "Story", "stories"),
            ("user_reviews", "User Review", "user reviews"),
            ("boxes", "Box", "boxes"),
            ("courses", "Course", "courses"),
            ("address", "Address", "address"),
            ("cities", "City", "cities"),
            ("companies", "Company", "companies"),
        ]:
            with self.subTest(table=table):
                self.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, title TEXT)")
                done = self.succeed("--table", table)
                self.assertIn(f"\n🧠 {noun} Embedding Generator\n", done.out)
                self.assertIn(f"\n📊 Total {plural} to process: 0\n", done.out)
                self.assertIn(f"\n✅ {noun} Embedding Generator Completed\n", done.out)
        done = self.succeed("--table", "courses", "--noun", "story")
        self.assertIn("🧠 Story Embedding Generator\n", done.out)
        self.assertIn("📊 Total stories processed: 0\n", done.out)

    def test_singulars(self) -> None:
        for word, one in {
            "movies": "movie", "stories": "story", "properties": "property", "parties": "party", "copies": "copy",
            "entities": "entity", "ties": "tie", "my cookies": "my cookie", "series": "series", "news": "news",
            "boxes": "box", "branches": "branch", "caches": "cache", "dishes": "dish", "classes": "class",
            "buses": "bus", "viruses": "virus", "statuses": "status", "houses": "house", "databases": "database",
            "courses": "course", "sizes": "size", "quizzes": "quizz", "address": "address", "analysis": "analysis",
            "people": "people", "Articles": "Article", "STORIES": "STORY", "user_reviews": "user_review",
        }.items():  # fmt: skip
            self.assertEqual(embedgen.singular(word), one)
        for word, many in {
            "movie": "movies",
            "story": "stories",
            "box": "boxes",
            "day": "days",
            "class": "classes",
        }.items():
            self.assertEqual(embedgen.plural(word), many)

    def test_the_targets_name_comes_from_the_table(self) -> None:
        self.execute("CREATE TABLE stories (id INTEGER PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO stories VALUES (?, ?)", [(1, "x")])
        self.succeed("--table", "stories", "--noun", "tale")
        self.assertEqual(list(self.stored("story_embeddings", "story_id")), [1])


class NamesOnPostgres(OnPostgres, Names):
    def test_a_name_with_a_dot_beside_a_schema_of_that_name(self) -> None:
        self.execute("CREATE SCHEMA dotted")
        self.addCleanup(self.execute, "DROP SCHEMA dotted CASCADE")
        self.execute('CREATE TABLE "dotted.movies" (id integer PRIMARY KEY, title text)')
        self.execute("INSERT INTO \"dotted.movies\" VALUES (1, 'one'), (2, 'two')")
        self.assertEqual(self.succeed("--table", "dotted.movies").tally, (2, 0, 0))
        self.assertEqual(self.succeed("--table", "dotted.movies").tally, (0, 2, 0))
        self.assertIn("dotted.movie_embeddings", self.db.tables())


class KeyCase(Case):
    def keys(self, definition: str, keys: list[object], *flags: object, after: str = "") -> list[object]:
        """Make a table with such a key, fill it, and return the keys that were stored, twice the same."""
        self.execute(f"CREATE TABLE movies ({definition}, title TEXT) {after}")
        self.execute("INSERT INTO movies VALUES (?, ?)", [(key, f"Film {key!r}") for key in keys])
        for engine in ENGINES:
            self.assertEqual(self.succeed(*flags, "--engine", engine, "--force").tally, (len(keys), 0, 0))
            self.assertEqual(self.succeed(*flags, "--engine", engine).tally, (0, len(keys), 0))
        stored = self.stored()
        for key in keys:
            self.assertEqual(stored[key], blob(f"Title: Film {key!r}"))
        return sorted(stored, key=repr)


class Keys(KeyCase):
    def test_text_keys(self) -> None:
        keys = ["tt0133093", "", "ünï", "a'b", 'a"b', "007", "7", "10", "9" * 300]
        self.assertEqual(self.keys("id TEXT PRIMARY KEY", keys), sorted(keys, key=repr))
        self.assertEqual(self.db.types("movie_embeddings")["movie_id"][0].upper(), "TEXT")

    def test_negative_and_extreme_keys(self) -> None:
        keys: list[object] = [-(2**63), -5, 0, 5, 2**63 - 1]
        self.assertEqual(len(self.keys(f"id {self.db.integer} PRIMARY KEY", keys)), 5)

    def test_an_undeclared_integer_column_as_key(self) -> None:
        self.assertEqual(len(self.keys("number INTEGER", [3, 1, 2], "--id", "number")), 3)

    def test_many_keys_that_span_pages(self) -> None:
        keys: list[object] = [f"k{number % 7}{number}" for number in range(1500)]
        self.assertEqual(len(self.keys("id TEXT PRIMARY KEY", keys)), 1500)

    def test_a_view(self) -> None:
        self.make_movies(20)
        self.execute("CREATE VIEW recent AS SELECT id, title, overview FROM movies WHERE id > 10")
        for tally in [(10, 0, 0), (0, 10, 0)]:
            self.assertEqual(self.succeed("--table", "recent").tally, tally)
        stored, expected = self.stored("recent_embeddings", "recent_id"), self.expected()
        self.assertEqual(stored, {key: expected[key] for key in range(11, 21)})

    def test_a_view_with_a_computed_key(self) -> None:
        self.make_movies(1200)
        self.execute("CREATE VIEW coded AS SELECT 'm' || id AS id, title FROM movies")
        self.assertEqual(self.succeed("--table", "coded").tally, (1200, 0, 0))
        stored = self.stored("coded_embeddings", "coded_id")
        self.assertEqual(stored["m7"], blob("Title: Film 7"))
        self.assertEqual(self.succeed("--table", "coded").tally, (0, 1200, 0))

    def test_keys_that_tell_nothing_apart_are_refused(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER, title TEXT)")
        self.execute("INSERT INTO movies VALUES (?, ?)", [(1, "a"), (7, "b"), (7, "c")])
        self.refuse(2, words=["id", "7", "--id"])
        self.execute("DELETE FROM movies WHERE title = 'c'")
        self.execute("INSERT INTO movies VALUES (NULL, 'd')")
        self.refuse(2, words=["id", "without a value"])
        self.assertEqual(self.succeed("--where", "id IS NOT NULL").tally, (2, 0, 0))

    def test_keys_that_only_a_condition_tells_apart(self) -> None:
        self.execute(f"CREATE TABLE movies (id INTEGER, title TEXT, lang TEXT, embedding {self.db.any_vector})")
        films = [(1, "a", "en"), (1, "b", "de"), (2, "c", "en"), (None, "d", "de")]
        self.execute("INSERT INTO movies (id, title, lang) VALUES (?, ?, ?)", films)
        english = "--columns", "title", "--where", "lang = 'en'"
        self.assertEqual(self.succeed(*english).tally, (2, 0, 0))
        self.assertEqual(self.stored(), {1: blob("Title: a"), 2: blob("Title: c")})
        # By its key, a vector would come to the rows in other languages, too.
        self.refuse(2, *english, "--out-column", "embedding", words=['"id"', "several rows", "--id"])
        self.execute("UPDATE movies SET id = 3 WHERE title = 'b'")
        self.assertEqual(self.succeed(*english, "--out-column", "embedding").tally, (2, 0, 0))
        found = self.execute("SELECT title FROM movies WHERE embedding IS NOT NULL ORDER BY title")
        self.assertEqual(found, [("a",), ("c",)])

    def test_no_key_at_all(self) -> None:
        self.execute("CREATE TABLE movies (title TEXT, slug TEXT)")
        self.refuse(2, words=["--id", "title, slug"])
        self.execute("CREATE TABLE pairs (a INTEGER, b INTEGER, title TEXT, PRIMARY KEY (a, b))")
        self.refuse(2, "--table", "pairs", words=["a, b", "--id"])


class KeysOnPostgres(OnPostgres, Keys):
    pass


class KeysOfSQLite(KeyCase):
    def test_a_table_without_a_declared_key(self) -> None:
        self.assertEqual(len(self.keys("id", [3, 1, 2, "2", "x", -1, 2.5])), 7)

    def test_without_rowid(self) -> None:
        self.assertEqual(len(self.keys("id TEXT PRIMARY KEY", ["b", "a"], after="WITHOUT ROWID")), 2)

    def test_a_case_insensitive_key(self) -> None:
        self.assertEqual(len(self.keys("id TEXT PRIMARY KEY COLLATE NOCASE", ["b", "A", "c", "D"])), 4)

    def test_a_text_in_a_column_for_integers(self) -> None:
        self.assertEqual(len(self.keys("id INT PRIMARY KEY", [1, 2, "x3"])), 3)


class KeysOfPostgres(OnPostgres, KeyCase):
    def test_uuid_keys(self) -> None:
        keys: list[object] = [uuid.UUID(int=number * 7**40) for number in range(1, 30)]
        self.assertEqual(len(self.keys("id UUID PRIMARY KEY", keys)), 29)
        self.assertEqual(self.db.types("movie_embeddings")["movie_id"][0], "uuid")

    def test_other_types_of_keys(self) -> None:
        for kind, keys in {
            "SMALLINT": [3, -1, 2],
            "VARCHAR(9)": ["b", "a", "B"],
            "NUMERIC(20, 3)": [decimal.Decimal("1.500"), decimal.Decimal("-2.000")],
            "DATE": [datetime.date(2024, 2, 29), datetime.date(1999, 1, 1)],
        }.items():
            with self.subTest(kind=kind):
                self.wipe()
                self.assertEqual(len(self.keys(f"id {kind} PRIMARY KEY", list(keys))), len(keys))

    def test_keys_that_have_no_one_form_as_text_are_refused(self) -> None:
        for kind in ("BYTEA", "INTEGER[]", "JSONB"):
            self.wipe()
            self.execute(f"CREATE TABLE movies (id {kind} PRIMARY KEY, title TEXT)")
            self.refuse(2, words=['"id"', kind.lower(), "--id"])

    def test_the_logs_name_of_a_row(self) -> None:
        self.execute("CREATE TABLE movies (id UUID PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO movies VALUES (?, ?)", [(uuid.UUID(int=5), "")])
        self.assertEqual(self.run_program().code, 1)
        self.assertIn("movie 00000000-0000-0000-0000-000000000005 failed: no text", self.log())


class Texts(Case):
    def text(self, *flags: object, definition: str, values: tuple[object, ...]) -> str:
        """Return the text that is made of a row of such a table."""
        self.wipe()
        self.ollama.reset()
        self.execute(f"CREATE TABLE movies (id INTEGER PRIMARY KEY, {definition})")
        self.execute(f"INSERT INTO movies VALUES ({', '.join('?' * (len(values) + 1))})", [(1, *values)])
        self.run_program(*flags)
        texts = self.asked()
        self.assertEqual(len(texts), 1)
        return texts[0]

    def test_the_default_text(self) -> None:
        definition = 'language TEXT, title TEXT, year INTEGER, genres TEXT, overview TEXT, rating REAL, "cast" TEXT'
        row = ("English", "Inception", 2010, "Action, Sci-Fi", "A thief who steals.", 8.8, "Leonardo DiCaprio")
        self.assertEqual(
            self.text(definition=definition, values=row),
            "Title: Inception | Year: 2010 | Genres: Action, Sci-Fi | Description: A thief who steals. | "
            "Cast: Leonardo DiCaprio | Language: English | Rating: 8.8",
        )

    def test_empty_parts_are_left_out(self) -> None:
        definition = "title TEXT, year INTEGER, genres TEXT, plot TEXT, language TEXT"
        for values, text in [
            (("T", None, "", " \t\n", "L"), "Title: T | Language: L"),
            (("\xa0", None, "\u3000", "\u200b\ufeff", "L"), "Language: L"),
            ((None, 1999, None, "P", None), "Year: 1999 | Description: P"),
            (("", None, "", "", "L"), "Language: L"),
        ]:
            self.assertEqual(self.text(definition=definition, values=values), text)

    def test_the_first_description_that_is_not_blank(self) -> None:
        definition = "name TEXT, title TEXT, description TEXT, overview TEXT"
        for values, text in [
            (("N", "T", "D", "O"), "Title: T | Description: O"),
            (("N", None, "D", " "), "Title: N | Description: D"),
            ((None, None, None, "O"), "Description: O"),
        ]:
            self.assertEqual(self.text(definition=definition, values=values), text)

    def test_the_names_of_the_description(self) -> None:
        for name in ("overview", "plot", "summary", "description", "Overview", "PLOT"):
            self.assertEqual(self.text(definition=f"{name} TEXT", values=("D",)), "Description: D")

    def test_no_telling_column(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, year INTEGER, code TEXT)")
        self.refuse(2, words=["id, year, code", "--columns", "--text"])

    def test_columns(self) -> None:
        row = ("a", "b", "c")
        definition = 'alpha TEXT, release_year TEXT, "x,y" TEXT'
        for flag, text in [
            ("alpha", "Alpha: a"),
            ("release_year, alpha", "Release year: b | Alpha: a"),
            ('"x,y",alpha', "X,y: c | Alpha: a"),
        ]:
            self.assertEqual(self.text("--columns", flag, definition=definition, values=row), text)
        self.refuse(2, "--columns", "alpha,beta", words=["beta", "alpha, release_year"])
        self.refuse(2, "--columns", "alpha,,beta", words=["no column"])
        self.refuse(2, "--columns", "alpha", "--text", "{alpha}", words=["--columns", "--text"])

    def test_templates(self) -> None:
        definition = "title TEXT, year INTEGER"
        for template, values, text in [
            ("{title} ({year})", ("T", 1999), "T (1999)"),
            ("{title} ({year})", ("T", None), "T ()"),
            ("{{{title}}}", ("T", 1), "{T}"),
            ("it's 100% {TITLE}?", ("T", 1), "it's 100% T?"),
            ("{title}{title}", ("T", 1), "TT"),
        ]:
            self.assertEqual(self.text("--text", template, definition=definition, values=values), text)

    def test_bad_templates(self) -> None:
        self.make_movies(1)
        for template, words in [
            ("{nothing}", ["nothing", "id, title, overview"]),
            ("plain", ["names no column"]),
            ("{title", ["--text"]),
            ("{title!r}", ["plain"]),
            ("{title:>9}", ["plain"]),
            ("{}", ["--text"]),
        ]:
            self.refuse(2, "--text", template, words=words)

    def test_a_template_of_blank_columns_is_no_text(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT, year INTEGER)")
        self.execute("INSERT INTO movies VALUES (?, ?, ?)", [(1, "", None)])
        self.assertEqual(self.run_program("--text", "{title} ({year})").tally, (0, 0, 1))

    def test_any_text(self) -> None:
        texts = {
            2: "emoji 🎬👩‍👩‍👧 and ✓",
            3: "ימין לשמאל من اليمين",
            4: "long " * 200_000,
            5: "quote ' \" \\ \n tab\t <>&",
            6: " leading and trailing ",
            7: "﻿bom \u2028 separators \x1f\x7f",
            8: "combining é é",
        }
        self.embed_texts(texts)

    def embed_texts(self, texts: dict[int, str]) -> None:
        """Each text must arrive at the server as it is, and its vector in its row."""
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO movies VALUES (?, ?)", list(texts.items()))
        self.ollama.configure(models={"nomic-embed-text": {"context": 10**9}}, context_length=10**9)
        for engine in ENGINES:
            self.assertEqual(self.succeed("--engine", engine, "--force").tally, (len(texts), 0, 0))
            for key, text in texts.items():
                self.assertEqual(self.stored()[key], blob(f"Title: {text}"), key)
            self.assertEqual(self.succeed("--engine", engine).tally, (0, len(texts), 0))


class TextsOnPostgres(OnPostgres, Texts):
    def test_arrays_and_other_types(self) -> None:
        definition = "title TEXT, genres TEXT[], year DATE, rating NUMERIC(4, 2), overview JSONB, new BOOLEAN"
        row = ("T", ["Action", "Sci-Fi"], "2010-07-16", 8.8, '{"a": [1]}', True)
        self.assertEqual(
            self.text("--columns", "title,genres,year,rating,overview,new", definition=definition, values=row),
            'Title: T | Genres: Action, Sci-Fi | Year: 2010-07-16 | Rating: 8.80 | Overview: {"a": [1]} | New: true',
        )

    def test_an_empty_column_of_other_dimensions(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT, embedding extensions.vector(5))")
        self.execute("INSERT INTO movies VALUES (1, 'a', NULL)")
        words = ['"movies" takes vectors with 5 dimensions', "with 8 dimensions"]
        self.refuse(3, "--out-column", "embedding", words=words)

    def test_bytes_are_no_text(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT, overview BYTEA)")
        self.refuse(2, words=['"overview"', "bytes", "--columns"])


class TextsOfSQLite(Texts):
    def test_any_text(self) -> None:
        self.embed_texts({1: "nul \0 inside \0", 2: "x"})

    def test_text_that_is_not_utf_8_is_counted_and_named(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO movies VALUES (1, CAST(x'61ff62c3' AS TEXT)), (2, 'fine'), (3, '\ufffd')")
        done = self.succeed()
        self.assertEqual(done.tally, (3, 0, 0))
        self.assertIn("   !  With U+FFFD for bytes that are not UTF-8: 2\n", done.out)
        self.assertEqual(
            self.stored(), {1: blob("Title: a\ufffdb\ufffd"), 2: blob("Title: fine"), 3: blob("Title: \ufffd")}
        )
        self.assertEqual(re.findall(r"movie (\d+) holds U\+FFFD, .* not UTF-8", self.log()), ["1", "3"])
        self.assertEqual(self.succeed().tally, (0, 3, 0))
        self.assertEqual(json.loads(self.succeed("--force", "--json").out)["not_utf8"], 2)

    def test_a_blob_is_a_text_or_fails_its_row(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT, overview BLOB)")
        self.execute("INSERT INTO movies VALUES (1, 'a', x'ffd8ffe0'), (2, 'b', x'c3a9'), (3, x'f09f', NULL)")
        done = self.run_program()
        self.assertEqual((done.code, done.tally), (1, (1, 0, 2)))
        self.assertEqual(self.stored(), {2: blob("Title: b | Description: é")})
        self.assertEqual(re.findall("movie (\\d+) failed: .*BLOB.*not UTF-8", self.log()), ["1", "3"])
        self.assertEqual(self.run_program().tally, (0, 1, 2))

    def test_a_database_in_utf_16(self) -> None:
        connection = sqlite3.connect(self.database)
        connection.execute("PRAGMA encoding = 'UTF-16le'")
        connection.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT)")
        connection.execute("INSERT INTO movies VALUES (1, 'Amélie 🎬'), (2, 'Amelie')")
        connection.commit()
        connection.close()
        self.assertEqual(self.succeed().tally, (2, 0, 0))
        self.assertEqual(self.stored(), {1: blob("Title: Amélie 🎬"), 2: blob("Title: Amelie")})
        self.assertEqual(self.succeed().tally, (0, 2, 0))
