"""--load: a file goes into the table as it is written, or is refused with line, column and value."""

from __future__ import annotations

import gzip
import json
import unittest
from typing import Any, ClassVar

from tests.support import MOVIES, Case, Finished, OnPostgres


class Load(Case):
    def write(self, name: str, content: str | bytes) -> str:
        """Write a file and return its name."""
        (self.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return name

    def load(self, name: str, content: str | bytes, *flags: object, columns: str = "title") -> Finished:
        """Load a file of that content."""
        flags = ("--columns", columns, *flags) if columns else flags
        return self.run_program("--load", self.write(name, content), "--server", "hash:", *flags)

    def table(self, name: str, content: str | bytes, *flags: object, columns: str = "title") -> list[Any]:
        """Load a file that must be taken, and return the table as text, by key."""
        done = self.load(name, content, *flags, columns=columns)
        self.assertEqual(done.code, 0, done.err)
        return self.texts()

    def texts(self) -> list[Any]:
        """Return the table as text, by its key."""
        names = list(self.db.types("movies"))
        columns = ", ".join(f'CAST("{name}" AS text)' for name in names)
        return self.execute(f'SELECT {columns} FROM movies ORDER BY movies."{names[0]}"')

    def refuse_file(self, name: str, content: str | bytes, *words: str, flags: tuple[object, ...] = ()) -> None:
        """Load a file that must be refused, into a new database and into one that exists; both stay as they are."""
        given = ("--load", self.write(name, content), "--server", "hash:", *flags)
        self.refuse(2, *given, words=[name, *words])
        self.assertFalse(self.database.exists())
        self.assertEqual(self.db.tables(), [])
        self.make_movies(3)
        before = self.execute("SELECT * FROM movies")
        self.refuse(2, *given, words=[name])
        self.assertEqual(self.execute("SELECT * FROM movies"), before)
        self.wipe()

    def refuse_second(self, content: str, *words: str, name: str = "b.csv") -> None:
        """Load a file that must be refused into the table that is there, which stays as it is."""
        before = self.texts()
        self.refuse(2, "--load", self.write(name, content), "--server", "hash:", words=[name, *words])
        self.assertEqual(self.texts(), before)


class Values(Load):
    """What is read back is what the file says."""

    def test_the_sample_films(self) -> None:
        self.assertEqual(self.succeed("--load", MOVIES, "--server", "hash:").tally, (200, 0, 0))
        declared = {name: kind for name, (kind, _) in self.db.types("movies").items()}
        integer, text, real = self.db.loaded
        self.assertEqual(declared, {
            "id": integer, "title": text, "year": integer, "genres": text, "cast": text, "language": text,
            "rating": real, "overview": text,
        })  # fmt: skip
        row = self.execute("SELECT id, title, year, CAST(rating AS text) FROM movies WHERE id = 1")[0]
        self.assertEqual(row, (1, "The Kid", 1921, "8.2"))
        self.assertEqual(self.execute("SELECT count(DISTINCT title), min(id), max(id) FROM movies"), [(200, 1, 200)])

    def test_codes_versions_and_numbers_that_a_column_would_change(self) -> None:
        cells = {
            "code": ["007", "8"], "big": ["9223372036854775808", "1"], "version": ["1.9", "1.10"],
            "mixed": ["1", "x"], "zip": ["90210", "00501"], "exponent": ["1e5", "2"], "plus": ["+5", "5"],
            "minus": ["-0", "1"], "point": ["1.", "2"], "third": ["0.3333333333333333", "2.5"],
            "tiny": ["0.00001", "0.5"], "sixes": ["6", "6.0"], "none": ["", ""],
        }  # fmt: skip
        rows = list(zip(*cells.values()))
        lines = [f"{key},t,{','.join(row)}" for key, row in enumerate(rows, 1)]
        found = self.table("a.csv", "\n".join([f"id,title,{','.join(cells)}", *lines]))
        self.assertEqual(found, [(str(key), "t", *(cell or None for cell in row)) for key, row in enumerate(rows, 1)])
        kept = {"big", "version", "third", "tiny", "sixes"} if self.db.exact_numbers else set()
        for column, (kind, _) in list(self.db.types("movies").items())[2:]:
            self.assertEqual(kind, self.db.loaded[2 if column in kept else 1], column)

    def test_numbers(self) -> None:
        content = "id,lat,r,n,title\n1,18.443384,12345678901234567,6,a\n2,2.5,2.5,-6.5,b\n3,-8.0,1,0,c\n"
        rows = self.table("a.csv", content)
        self.assertEqual(rows, [
            ("1", "18.443384", "12345678901234567", "6", "a"), ("2", "2.5", "2.5", "-6.5", "b"),
            ("3", "-8.0", "1", "0", "c"),
        ])  # fmt: skip
        self.assertEqual(float(self.execute("SELECT lat FROM movies WHERE id = 1")[0][0]), 18.443384)
        self.assertEqual(self.execute("SELECT id FROM movies ORDER BY r"), [(3,), (2,), (1,)])
        self.assertNotIn(self.db.loaded[1], [self.db.types("movies")[name][0] for name in ("lat", "r", "n")])

    def test_the_text_that_is_embedded_is_the_cell_as_written(self) -> None:
        path = self.write("a.csv", "id,title,n,rating\n1,a,6,8.0\n2,b,6.5,7.5\n")
        self.succeed("--load", path, "--columns", "title,n,rating", "--document-prefix", "")
        self.assertEqual(sorted(self.asked()), [
            "Title: a | N: 6 | Rating: 8.0", "Title: b | N: 6.5 | Rating: 7.5",
        ])  # fmt: skip

    def test_json(self) -> None:
        objects = [
            {"id": 1, "title": "a", "tags": ["x", "y"], "n": 1.5, "ok": True, "oks": [True, 2]},
            {"id": 2, "title": "12", "tags": None, "more": {"k": [1, None]}},
        ]
        expected = [
            ("1", "a", "x, y", "1.5", "true", "true, 2", None), ("2", "12", None, None, None, None, '{"k": [1, null]}'),
        ]  # fmt: skip
        lines = "\n".join(map(json.dumps, objects)) + "\n\n"
        contents = {
            "a.json": json.dumps(objects, indent=2), "b.jsonl": lines, "c.ndjson": lines,
            "d.json": json.dumps({"count": 2, "tags": ["x"], "movies": objects}),
        }  # fmt: skip
        for name, content in contents.items():
            with self.subTest(name):
                self.assertEqual(self.table(name, content), expected)
                self.wipe()

    def test_numbers_of_json(self) -> None:
        content = (
            '[{"id": 1, "title": "a", "r": 9007199254740993, "s": 1.10, "zip": "90210", "deep": {"k": 1.10}},'
            '{"id": 2, "title": "b", "r": 0.5, "s": 1E400, "zip": "10115", "deep": [[12345678901234567890.5]]}]'
        )
        self.assertEqual(self.table("a.json", content), [
            ("1", "a", "9007199254740993", "1.10", "90210", '{"k": 1.10}'),
            ("2", "b", "0.5", "1E400", "10115", "[[12345678901234567890.5]]"),
        ])  # fmt: skip
        self.assertEqual(self.db.types("movies")["zip"][0], self.db.loaded[1])  # JSON said that it is a text

    def test_geojson(self) -> None:
        features = [
            {"type": "Feature", "id": key, "properties": {"title": f"Film {key}", "type": "x"},
             "geometry": {"type": "Point", "coordinates": [1.50, key]}}
            for key in (1, 2)
        ]  # fmt: skip
        self.load("a.json", json.dumps({"type": "FeatureCollection", "features": features}))
        self.assertEqual(self.execute("SELECT id, title, type, geometry FROM movies WHERE id = 2"), [
            (2, "Film 2", "x", '{"type": "Point", "coordinates": [1.5, 2]}'),
        ])  # fmt: skip

    def test_csv_with_byte_order_mark_quotes_newlines_and_crlf(self) -> None:
        content = '\ufeffid,title\r\n1,"two\nlines, ""quoted"""\r\n\r\n2,Zoë 🎬\r\n'
        self.assertEqual(self.table("a.csv", content), [("1", 'two\nlines, "quoted"'), ("2", "Zoë 🎬")])

    def test_a_field_larger_than_the_csv_modules_default(self) -> None:
        self.assertEqual(self.table("a.csv", f"id,title\n1,{'x' * 500_000}\n"), [("1", "x" * 500_000)])

    def test_other_separators(self) -> None:
        for separator in ";|\t":
            with self.subTest(separator):
                rows = self.table("a.csv", "id_title_note\n1_a_2,5\n".replace("_", separator))
                self.assertEqual(rows, [("1", "a", "2,5")])
                self.wipe()

    def test_packed_files(self) -> None:
        contents = {
            "a.csv.gz": "id,title\n1,a\n", "b.TSV.gz": "id\ttitle\n1\ta\n", "c.json.gz": '[{"id": 1, "title": "a"}]',
            "d.jsonl.gz": '{"id": 1, "title": "a"}\n', "e.csv": "id,title\n1,a\n",
        }  # fmt: skip
        for name, content in contents.items():
            with self.subTest(name):
                self.assertEqual(self.table(name, gzip.compress(content.encode())), [("1", "a")])
                self.wipe()
        self.refuse_file("f.csv.gz", gzip.compress(b"id,title\n1,a\n")[:-9])

    def test_an_empty_tail_and_blanks_in_the_header(self) -> None:
        self.assertEqual(self.table("a.csv", "id, title\n1, a\n,\n,\n"), [("1", " a")])
        self.assertEqual(list(self.db.types("movies")), ["id", "title"])


class Tabs(Load):
    """The two conventions of .tsv files: quotes around values, as in CSV, and none, as in dumps of databases."""

    def test_a_dump(self) -> None:
        content = 'id\ttitle\ttagline\n1\ta\t"Hi there\n2\tb\tbye"\n3\tc\tz\n'
        self.assertEqual(self.table("a.tsv", content), [("1", "a", '"Hi there'), ("2", "b", 'bye"'), ("3", "c", "z")])
        self.wipe()
        self.assertEqual(self.table("b.TSV", 'id\ttitle\n1\ta, b "c"\n2\t"d" e\n'), [("1", 'a, b "c"'), ("2", '"d" e')])

    def test_quoted(self) -> None:
        for content, expected in (
            ('"id"\t"title"\n1\t"said ""so"""\n2\t"x"\n', [("1", 'said "so"'), ("2", "x")]),
            ('id\ttitle\n1\t"two\nlines"\n', [("1", "two\nlines")]),
            ('id\ttitle\n1\t"a\tb"\n', [("1", "a\tb")]),
            ('"id"\t"title"\n"1"\t"a"\n', [("1", "a")]),
        ):
            with self.subTest(content):
                self.assertEqual(self.table("a.tsv", content), expected)
                self.wipe()

    def test_rows_within_quotes(self) -> None:
        self.refuse_file("a.tsv", 'id\ttitle\ttagline\n1\ta\t"Hi there\n2\tb\n3\tc\tbye"\n', "line 2", "quote")

    def test_where_it_cannot_be_told(self) -> None:
        content = 'id\ttitle\n1\ta\n2\t"Rome"\n'
        self.refuse_file("a.tsv", content, "line 3", ".csv")
        self.assertEqual(self.table("a.csv", content), [("1", "a"), ("2", "Rome")])

    def test_null(self) -> None:
        path = self.write("a.tsv", "id\ttitle\tyear\n1\ta\\N\t\\N\n2\tb\t1999\n")
        self.succeed("--load", path, "--columns", "title,year", "--document-prefix", "")
        self.assertEqual(self.texts(), [("1", "a\\N", None), ("2", "b", "1999")])
        self.assertEqual(sorted(self.asked()), ["Title: a\\N", "Title: b | Year: 1999"])


class Keys(Load):
    """Which column is the key, and what becomes of rows that have the same."""

    def test_a_key_is_an_integer_or_a_text(self) -> None:
        self.assertEqual(self.table("a.csv", "id,title\n1,a\n1.0,b\n"), [("1", "a"), ("1.0", "b")])
        self.wipe()
        self.assertEqual(self.table("a.csv", "id,title\n1.5,a\n2.5,b\n"), [("1.5", "a"), ("2.5", "b")])
        self.assertEqual(self.db.types("movies")["id"][0], self.db.loaded[1])

    def test_rows_with_the_same_key_are_counted(self) -> None:
        content = "id,title\n1,a\n2,x\n3,y\n1,b\n"
        done = self.load("a.csv", content, "--json")
        self.assertEqual((done.code, self.texts()), (0, [("1", "b"), ("2", "x"), ("3", "y")]))
        words = "4 rows, 3 keys: 1 replaced by a later one (first: 1, lines 2 and 5)"
        self.assertIn(words, done.err)
        loaded = json.loads(done.out)["loaded"]
        self.assertEqual((loaded["rows"], loaded["repeated"], loaded["replaced"]), (3, 1, 0))
        self.assertIn(words, self.log())

    def test_most_rows_with_the_same_key_are_refused(self) -> None:
        content = "id,title\n1,a\n1,b\n1,c\n"
        words = "3 rows, 1 key: 2 replaced by a later one (first: 1, lines 2 and 3)"
        self.refuse_file("a.csv", content, words, "--id", "--force")
        done = self.load("a.csv", content, "--force")
        self.assertEqual((done.code, self.texts()), (0, [("1", "c")]))
        self.assertIn(words, done.err)

    def test_rows_are_replaced_by_key(self) -> None:
        self.load("a.csv", "id,title\n1,one\n2,two\n")
        self.execute("ALTER TABLE movies ADD COLUMN seen INTEGER")
        self.execute("UPDATE movies SET seen = 1")
        done = self.load("b.csv", "title,id\nTWO,2\nthree,3\n", "--json")
        self.assertEqual(
            self.execute("SELECT * FROM movies ORDER BY 1"), [(1, "one", 1), (2, "TWO", 1), (3, "three", None)]
        )
        self.assertIn('rows of "movies" replaced by others from b.csv: 1', done.err.replace(str(self.folder) + "/", ""))
        self.assertEqual(json.loads(done.out)["loaded"]["replaced"], 1)
        self.assertEqual(self.succeed("--server", "hash:").tally, (0, 3, 0))
        self.succeed("--load", "b.csv", "--server", "hash:")  # nothing changes, nothing is said

    def test_a_replaced_row_keeps_its_embedding_until_the_text_differs(self) -> None:
        self.load("a.csv", "id,title\n1,one\n2,two\n")
        self.assertEqual(self.load("b.csv", "id,title\n1,one\n2,TWO words\n").tally, (1, 1, 0))

    def test_an_object_that_does_not_mention_a_column(self) -> None:
        self.load("a.json", '[{"id": 1, "title": "a", "note": "x"}, {"id": 2, "title": "b", "note": "y"}]')
        self.load("b.json", '[{"id": 1, "title": "A"}, {"id": 2, "note": null}, {"id": 3, "note": "z"}]')
        self.assertEqual(self.texts(), [("1", "A", "x"), ("2", "b", None), ("3", None, "z")])

    def test_an_unnamed_first_column_is_the_key(self) -> None:
        done = self.load("a.csv", '"","title"\n"Mazda RX4","a"\n"Datsun 710","b"\n')
        self.assertIn('"id"', done.err)
        self.assertEqual(self.texts(), [("Datsun 710", "b"), ("Mazda RX4", "a")])
        self.wipe()
        self.assertEqual(self.table("b.csv", ",id,title\n0,x,a\n1,x,b\n"), [("0", "x", "a"), ("1", "x", "b")])
        self.assertEqual(list(self.db.types("movies")), ["row", "id", "title"])
        self.assertEqual(self.table("b.csv", ",id,title\n1,x,c\n"), [("0", "x", "a"), ("1", "x", "c")])
        self.assertEqual(len(self.stored("movie_embeddings")), 2)

    def test_a_file_without_a_key(self) -> None:
        content = "title,note\na,x\na,y\nb,y\n"
        done = self.load("a.csv", content)
        self.assertIn("numbered from 1", done.err)
        self.assertEqual(self.texts(), [("1", "a", "x"), ("2", "a", "y"), ("3", "b", "y")])
        self.refuse_second(content, "--force")
        self.assertEqual(self.load("b.csv", "title,note\nc,x\nc,y\n", "--force").tally, (2, 0, 0))
        self.assertEqual(self.texts(), [("1", "c", "x"), ("2", "c", "y")])

    def test_force_does_not_number_rows_of_a_table_of_other_columns(self) -> None:
        self.make_movies(3)
        before = self.texts()
        self.refuse(
            2, "--load", self.write("a.csv", "title\nx\n"), "--server", "hash:", "--force", words=["a.csv", "id"]
        )
        self.assertEqual(self.texts(), before)

    def test_unknown_columns_and_keys(self) -> None:
        self.refuse(2, "--load", self.write("a.csv", "slug,title\nx,a\n"), words=["a.csv", "slug, title", "--id"])
        self.assertFalse(self.database.exists())
        self.assertEqual(self.db.tables(), [])
        self.make_movies(1)
        self.refuse(2, "--load", self.write("a.csv", "id,title,stars\n1,a,5\n"), words=["stars", "id, title, overview"])
        self.wipe()
        self.succeed("--load", self.write("a.csv", "slug,title\nx,a\n"), "--id", "slug", "--server", "hash:")
        self.assertEqual(self.execute("SELECT movie_id FROM movie_embeddings"), [("x",)])

    def test_a_table_of_another_name(self) -> None:
        self.write("a.csv", "id,the title\n1,x\n")
        self.succeed("--load", "a.csv", "--table", 'my "books"', "--columns", "the title", "--server", "hash:")
        self.assertEqual(self.execute('SELECT "the title" FROM "my ""books"""'), [("x",)])
        self.write("b.csv", "id,title\n1,x\n")
        self.succeed("--load", "b.csv", "--table", f"{self.db.schema}.books", "--server", "hash:")
        self.assertEqual(self.execute("SELECT * FROM books"), [(1, "x")])
        self.assertEqual(len(self.stored("book_embeddings", "book_id")), 1)


class Refused(Load):
    """Files with an error: nothing of them is loaded, and nothing is created."""

    def test_a_second_file_that_the_columns_do_not_hold(self) -> None:
        self.load("a.csv", "id,zip,r,title\n1,90210,2.5,a\n")
        for cell in ("00501", "1e5", "1.10", "12345678901234567890", "+5", " 5", "x", "true"):
            self.refuse_second(f"id,zip,title\n3,501,b\n2,{cell},b\n", "line 3", "zip", repr(cell))
        for cell in ("007.5", "x"):
            self.refuse_second(f"id,r,title\n2,{cell},b\n", "line 2", '"r"', repr(cell))
        self.assertEqual(self.table("c.csv", "id,r,title\n2,-0.25,b\n")[1], ("2", None, "-0.25", "b"))

    def test_keys_that_the_column_does_not_hold(self) -> None:
        self.load("a.csv", "id,title\n1,a\n")
        for cell in ("x", "1.0", "01"):
            self.refuse_second(f"id,title\n2,c\n{cell},b\n", "line 3", '"id"', repr(cell))
        self.refuse_second("id,title\n2,c\n,b\n", "line 3", "key")

    def test_ragged_rows(self) -> None:
        self.refuse_file("a.csv", "id,title,overview\n1,a,b\n2,a\n3,a,b\n", "line 3", "2 fields", "3")
        self.refuse_file("b.csv", 'id,title\n1,"two\nlines"\n2,a,b\n', "line 4")
        self.refuse_file("c.tsv", "id\ttitle\n1\n", "line 2")

    def test_broken_files(self) -> None:
        for name, content, words in (
            ("a.csv", b"id,title\n1,fine\n2,caf\xe9\n", ["line 3", "title", "UTF-8"]),
            ("b.csv", 'id,title\n1,a\n2,"unclosed\n', ["line 3"]),
            ("d.csv", "id,title\n,a\n", ["line 2", "key"]),
            ("e.json", '[{"id": 1},\n {"id": 2}\n {"id": 3}]', ["line 3"]),
            ("f.json", '[{"id": 1},\n {"id": 2', ["line 2"]),
            ("g.json", '{"id": 1}', ["line 1", "array"]),
            ("h.json", '[{"id": 1}, 2]', ["object 2"]),
            ("i.jsonl", '{"id": 1, "title": "a"}\n{"id": 2,}\n', ["line 2", "JSON"]),
            ("j.jsonl", '{"id": 1, "title": "a"}\n[2]\n', ["line 2", "object"]),
            ("l.csv", "", ["empty"]),
            ("m.json", "", ["line 1"]),
            ("n.json", '{"a": [{"id": 1}], "b": [{"id": 2}]}', ["line 1", "array"]),
            ("o.json", '[{"id": 1, "title": "a", "title": "b"}]', ["id, title, title"]),
            ("p.json", '[{"id": 1, "title": "a", "": "b"}]', ["object 1"]),
            ("q.csv", "id,title\n1,a\0b\n", ["line 2", "NUL"]),
            ("r.jsonl", '{"id": 1, "title": "a\\u0000b"}\n', ["line 1", "title", "NUL"]),
        ):
            with self.subTest(name):
                self.refuse_file(name, content, *words)

    def test_json_that_is_no_number(self) -> None:
        for value in ("NaN", "-Infinity", "[NaN]", '{"k": [Infinity]}'):
            self.refuse_file("a.json", f'[{{"id": 1, "title": "a"}}, {{"id": 2, "n": {value}}}]', "object 2", "'n'")

    def test_half_of_a_surrogate_pair(self) -> None:
        self.write("a.jsonl", '{"id": 1, "title": "\\ud800"}\n')
        said = self.refuse(2, "--load", "a.jsonl", words=["a.jsonl", "line 1", "title"])
        self.assertNotIn("UTF-8", said)
        self.refuse_file("b.json", '[{"id": 1, "ti\\ud800t": "x"}]', "object 1")

    def test_a_header_that_is_wrong(self) -> None:
        for header, words in (
            ("id,title,", ["column 3", "no name"]), ("id,,title", ["column 2", "no name"]),
            ("id,title,title", ["column 3", "title", "twice"]), ("id,title,TITLE", ["column 3", "TITLE", "twice"]),
            ("sep=;\nid;title", ["line 1", "Remove the sep= line"]),
        ):  # fmt: skip
            self.refuse_file("a.csv", f"{header}\n1,a,b\n", "line 1", "header", *words)
        done = self.load("b.csv", "id,titré\n1,a\n".encode("latin-1"), "--json", columns="")
        self.assertEqual((done.code, json.loads(done.out)["exit_code"]), (2, 2))
        self.assertIn("line 1", done.err)
        self.assertIn("UTF-8", done.err)
        self.assertEqual(self.db.tables(), [])

    def test_files_of_another_kind(self) -> None:
        self.refuse_file("a.csv", b"PK\x03\x04 and so on", "Excel")
        self.refuse_file("b.csv", "id,title\n1,a\n".encode("utf-16"), "UTF-16")

    def test_files_that_are_none(self) -> None:
        self.refuse(2, "--load", "nothing.csv", words=["nothing.csv", "o such file"])
        self.refuse(2, "--load", "a.xlsx", words=["a.xlsx", ".csv, .tsv, .json, .jsonl"])
        self.assertFalse(self.database.exists())

    def test_a_file_without_rows(self) -> None:
        for name, content in {"a.csv": "id,title\n", "a.jsonl": "\n", "a.json": "[]"}.items():
            self.refuse_file(name, content, "no rows")

    def test_a_value_nested_too_deeply(self) -> None:
        for name in ("a.json", "a.jsonl"):
            self.refuse_file(name, "[" * 200_000, "line 1")
        deep = "[" * 100_000 + "]" * 100_000
        self.refuse_file("b.jsonl", f'{{"id": 1, "title": "a"}}\n{{"id": 2, "n": {deep}}}', "line 2")

    def test_a_file_without_a_text_leaves_no_table(self) -> None:
        self.refuse(2, "--load", self.write("a.csv", "id,name of it\n1,a\n"), words=["name of it", "--columns"])
        self.assertEqual(self.db.tables(), [])
        self.assertEqual(self.table("a.csv", "id,title\n1,a\n"), [("1", "a")])

    def test_columns_that_are_one_in_the_table(self) -> None:
        self.make_movies(1)
        self.refuse_second('[{"id": 1, "title": "One", "TITLE": "Two"}]', "title, title", '"movies"', name="a.json")

    def test_a_value_that_a_constraint_refuses(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT NOT NULL)")
        self.refuse_second("id,title\n1,a\n2,\n", "title")
        self.assertEqual(self.texts(), [])


class ValuesOnPostgres(OnPostgres, Values):
    def test_a_name_that_postgres_cuts(self) -> None:
        long = "a_question_of_a_survey_that_has_more_than_the_sixty_three_bytes_of_a_name"
        self.write("a.csv", f"id,title,{long}\n1,One,yes\n2,Two,no\n")
        for _ in range(2):  # into a new table, and into the one that is there then
            self.succeed("--load", "a.csv", "--columns", "title")
            self.assertEqual(self.execute(f'SELECT id, "{long[:63]}" FROM movies ORDER BY id'), [(1, "yes"), (2, "no")])


class TabsOnPostgres(OnPostgres, Tabs):
    pass


class KeysOnPostgres(OnPostgres, Keys):
    pass


# A type, cells that it holds with what is read back, and cells that it does not hold.
Types = dict[str, tuple[dict[str, str], list[str]]]


class Existing(Load):
    """A table that is there, with columns of other types than a loaded file would get."""

    TYPES: ClassVar[Types] = {
        "INTEGER": ({"9223372036854775807": "9223372036854775807"}, ["9223372036854775808", "-0"]),
        "REAL": ({"5": "5.0", "19.90": "19.9", "1e3": "1000.0"}, ["9007199254740993", "12345678901234567", "x"]),
        "NUMERIC": ({"-7": "-7", "1.10": "1.1", "6.0": "6", "1.2.3": "1.2.3"}, ["007", " 5", "12345678901234567890"]),
        "DATE": ({"2020-02-29": "2020-02-29", "2020": "2020"}, ["02020"]),
        "VARCHAR(3)": ({"abcdef": "abcdef", "007": "007"}, []),
    }  # fmt: skip

    def test_values_of_other_types(self) -> None:
        for declared, (good, bad) in self.TYPES.items():
            with self.subTest(declared):
                self.wipe()
                self.execute(f"CREATE TABLE movies (id int PRIMARY KEY, title text, v {declared})")
                rows = [f'{key},a,"{cell}"'.replace('{"a"', '{""a""') for key, cell in enumerate(good, 1)]
                found = self.table("a.csv", "\n".join(["id,title,v", *rows]))
                self.assertEqual([row[2] for row in found], list(good.values()))
                for cell in bad:
                    self.refuse_second(f'id,title,v\n7,a,\n8,a,"{cell}"\n', "line 3", '"v"', repr(cell))


class ExistingOnPostgres(OnPostgres, Existing):
    TYPES: ClassVar[Types] = {
        "varchar(3)": ({"abc": "abc", "ä": "ä"}, ["abcdef", "ab  "]),
        "char(3)": ({"abc": "abc"}, ["abcd"]),
        "smallint": ({"-5": "-5"}, ["40000", "1.0", "x"]),
        "bigint": ({"9223372036854775807": "9223372036854775807"}, ["9223372036854775808", "007"]),
        "numeric(5,2)": ({"1.5": "1.50", "1.50": "1.50"}, ["1.555", "1234.5", "01"]),
        "numeric": ({"1.10": "1.10", "0.12345678901234567890": "0.12345678901234567890"}, ["x", "007"]),
        "real": ({"0.1": "0.1", "8.0": "8"}, ["16777217", "0.123456789"]),
        "double precision": ({"8.0": "8", "19.90": "19.9"}, ["12345678901234567", "00501"]),
        "boolean": ({"true": "true", "f": "false"}, ["perhaps", "2"]),
        "date": ({"2020-02-29": "2020-02-29"}, ["2021-02-29", "2020-01-01 10:30", "x"]),
        "timestamp": ({"2020-02-29T10:30": "2020-02-29 10:30:00"}, ["2020-01-01 00:00+13", "2020-01-01 0:0:0.1234567"]),
        "uuid": ({"A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"}, ["a0eebc99"]),
        "jsonb": ({'{"a": 1}': '{"a": 1}'}, ["{"]),
    }  # fmt: skip


class RefusedOnPostgres(OnPostgres, Refused):
    def test_a_key_that_would_be_cut(self) -> None:
        self.execute("CREATE TABLE movies (id varchar(7) PRIMARY KEY, title text)")
        self.execute("INSERT INTO movies VALUES ('ABCDEFG', 'x')")
        self.refuse_second("id,title\nABCDEFGH,a\n", "line 2", '"id"', "ABCDEFGH")

    def test_keys_that_are_one_in_their_type(self) -> None:
        self.execute("CREATE TABLE movies (id uuid PRIMARY KEY, title text)")
        key = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
        done = self.load("a.csv", f"id,title\n{key},a\n{key.upper()},b\n")
        self.assertEqual((done.code, self.texts()), (0, [(key, "b")]))
        self.assertIn("2 rows, 1 key: 1 replaced by a later one", done.err)


if __name__ == "__main__":
    unittest.main()
