"""--load: files into the table, all of their rows or none."""

from __future__ import annotations

import json
import unittest

import embedgen
from tests.support import MOVIES, Case, OnPostgres


class Load(Case):
    def load(self, name: str, content: str | bytes, *flags: object) -> list[tuple[object, ...]]:
        """Load a file of that content and return the table."""
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        self.run_program("--load", path, "--server", "hash:", "--columns", "title", *flags)
        return self.execute("SELECT * FROM movies ORDER BY 1")

    def refuse_file(self, name: str, content: str | bytes, *words: str) -> None:
        """Load a file that must be refused, into a new database and into one that exists; both stay as they are."""
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        self.refuse(2, "--load", path, "--server", "hash:", words=[name, *words])
        self.assertFalse(self.database.exists())
        self.assertEqual(self.db.tables(), [])
        self.make_movies(3)
        before = self.execute("SELECT * FROM movies")
        self.refuse(2, "--load", path, "--server", "hash:", words=[name, *words])
        self.assertEqual(self.execute("SELECT * FROM movies"), before)
        self.wipe()

    def test_the_sample_films(self) -> None:
        self.assertEqual(self.succeed("--load", MOVIES, "--server", "hash:").tally, (200, 0, 0))
        declared = {name: kind for name, (kind, _) in self.db.types("movies").items()}
        self.assertEqual(declared, {
            "id": self.db.loaded[0], "title": self.db.loaded[1], "year": self.db.loaded[0], "genres": self.db.loaded[1],
            "cast": self.db.loaded[1], "language": self.db.loaded[1], "rating": self.db.loaded[2],
            "overview": self.db.loaded[1],
        })  # fmt: skip
        row = self.execute("SELECT id, title, year, rating FROM movies WHERE id = 1")[0]
        self.assertEqual([type(value) for value in row], [int, str, int, float])
        self.assertEqual(self.execute("SELECT count(DISTINCT title), min(id), max(id) FROM movies"), [(200, 1, 200)])

    def test_types(self) -> None:
        content = "id,title,code,big,share,mixed,none\n1,a,007,9223372036854775808,1.5,1,\n2,b,8,1,2,x,\n"
        self.assertEqual(self.load("b.csv", "id,title\n1,1.9\n2,1.10\n"), [(1, "1.9"), (2, "1.10")])
        self.wipe()
        rows = self.load("a.csv", content)
        self.assertEqual(rows, [
            (1, "a", "007", "9223372036854775808", 1.5, "1", None), (2, "b", "8", "1", 2.0, "x", None),
        ])  # fmt: skip

    def test_rows_are_replaced_by_key(self) -> None:
        self.load("a.csv", "id,title\n1,one\n2,two\n")
        self.execute("ALTER TABLE movies ADD COLUMN seen INTEGER")
        self.execute("UPDATE movies SET seen = 1")
        rows = self.load("b.csv", "title,id\nTWO,2\nthree,3\n")
        self.assertEqual(rows, [(1, "one", 1), (2, "TWO", 1), (3, "three", None)])
        self.assertEqual(self.succeed("--server", "hash:").tally, (0, 3, 0))

    def test_a_replaced_row_keeps_its_embedding_until_the_text_differs(self) -> None:
        self.load("a.csv", "id,title\n1,one\n2,two\n")
        (self.folder / "b.csv").write_text("id,title\n1,one\n2,TWO words\n", "utf-8")
        done = self.succeed("--load", "b.csv", "--server", "hash:", "--columns", "title")
        self.assertEqual(done.tally, (1, 1, 0))

    def test_csv_with_byte_order_mark_quotes_newlines_and_crlf(self) -> None:
        content = '\ufeffid,title\r\n1,"two\nlines, ""quoted"""\r\n\r\n2,Zoë 🎬\r\n'
        self.assertEqual(self.load("a.csv", content), [(1, 'two\nlines, "quoted"'), (2, "Zoë 🎬")])

    def test_a_field_larger_than_the_csv_modules_default(self) -> None:
        self.assertEqual(self.load("a.csv", f"id,title\n1,{'x' * 500_000}\n"), [(1, "x" * 500_000)])

    def test_tsv(self) -> None:
        self.assertEqual(self.load("a.TSV", 'id\ttitle\n1\ta, b "c"\n'), [(1, 'a, b "c"')])

    def test_json_and_jsonl(self) -> None:
        objects = [
            {"id": 1, "title": "a", "tags": ["x", "y"], "n": 1.5, "ok": True},
            {"id": 2, "title": "12", "tags": None, "more": {"k": [1]}},
        ]
        expected = [(1, "a", "x, y", 1.5, 1, None), (2, "12", None, None, None, '{"k": [1]}')]
        self.assertEqual(self.load("a.json", json.dumps(objects, indent=2)), expected)
        self.wipe()
        self.assertEqual(self.load("a.jsonl", "\n".join(map(json.dumps, objects)) + "\n\n"), expected)
        self.wipe()

    def test_a_json_array_is_read_piece_by_piece(self) -> None:
        path = self.folder / "a.json"
        objects = [{"id": key, "title": '[{\\"' + "é" * (key % 50)} for key in range(2000)]
        text = json.dumps(objects, ensure_ascii=False, indent=1)
        path.write_text(text, "utf-8")
        whole = embedgen.JSON_PIECE
        self.addCleanup(setattr, embedgen, "JSON_PIECE", whole)
        for piece in (7, 1000, whole):
            embedgen.JSON_PIECE = piece
            rows = list(embedgen.read_file(str(path)))
            self.assertEqual([row for _, row in rows], objects)
            # Line 1 has the bracket; each object takes four lines.
            self.assertEqual([line for line, _ in rows], [2 + 4 * key for key in range(2000)])

    def test_ragged_rows(self) -> None:
        self.refuse_file("a.csv", "id,title,overview\n1,a,b\n2,a\n3,a,b\n", "line 3", "2 fields", "3")
        self.refuse_file("b.csv", 'id,title\n1,"two\nlines"\n2,a,b\n', "line 4")
        self.refuse_file("c.tsv", "id\ttitle\n1\n", "line 2")

    def test_broken_files(self) -> None:
        self.refuse_file("a.csv", b"id,title\n1,fine\n2,caf\xe9\n", "line 3", "UTF-8")
        self.refuse_file("b.csv", 'id,title\n1,a\n2,"unclosed\n', "line 3")
        self.refuse_file("c.csv", "id,title,title\n1,a,b\n", "line 1", "header")
        self.refuse_file("d.csv", "id,title\n,a\n", "line 2", "key")
        self.refuse_file("e.json", '[{"id": 1},\n {"id": 2}\n {"id": 3}]', "line 3")
        self.refuse_file("f.json", '[{"id": 1},\n {"id": 2', "line 2")
        self.refuse_file("g.json", '{"id": 1}', "line 1", "array")
        self.refuse_file("h.json", '[{"id": 1}, 2]', "object")
        self.refuse_file("i.jsonl", '{"id": 1, "title": "a"}\n{"id": 2,}\n', "line 2", "JSON")
        self.refuse_file("j.jsonl", '{"id": 1, "title": "a"}\n[2]\n', "line 2", "object")
        self.refuse_file("k.jsonl", '{"id": 1, "title": "\\ud800"}\n', "line 1")
        self.refuse_file("l.csv", "", "empty")
        self.refuse_file("m.json", "", "line 1")

    def test_files_that_are_none(self) -> None:
        self.refuse(2, "--load", "nothing.csv", words=["nothing.csv", "o such file"])
        self.refuse(2, "--load", "a.xlsx", words=["a.xlsx", ".csv, .tsv, .json, .jsonl"])
        self.assertFalse(self.database.exists())

    def test_unknown_columns_and_keys(self) -> None:
        path = self.folder / "a.csv"
        path.write_text("slug,title\nx,a\n", "utf-8")
        self.refuse(2, "--load", path, words=["a.csv", "slug, title", "--id"])
        self.assertFalse(self.database.exists())
        self.make_movies(1)
        path.write_text("id,title,stars\n1,a,5\n", "utf-8")
        self.refuse(2, "--load", path, words=["stars", "id, title, overview"])
        path.write_text("slug,title\nx,a\n", "utf-8")
        self.wipe()
        self.succeed("--load", path, "--id", "slug", "--server", "hash:")
        self.assertEqual(self.execute("SELECT movie_id FROM movie_embeddings"), [("x",)])

    def test_a_table_of_another_name(self) -> None:
        (self.folder / "a.csv").write_text("id,the title\n1,x\n", "utf-8")
        self.succeed("--load", "a.csv", "--table", 'my "books"', "--columns", "the title", "--server", "hash:")
        self.assertEqual(self.execute('SELECT "the title" FROM "my ""books"""'), [("x",)])
        (self.folder / "b.csv").write_text("id,title\n1,x\n", "utf-8")
        self.succeed("--load", "b.csv", "--table", f"{self.db.schema}.books", "--server", "hash:")
        self.assertEqual(self.execute("SELECT * FROM books"), [(1, "x")])
        self.assertEqual(len(self.stored("book_embeddings", "book_id")), 1)


class LoadInSQLite(Case):
    def test_a_file_without_rows(self) -> None:
        files = {"a.csv": "id,title\n", "a.jsonl": "\n", "a.json": "[]"}
        for name, content in files.items():
            (self.folder / name).write_text(content, "utf-8")
            self.refuse(2, "--load", name, words=[name, "no rows"])
        self.make_movies(1)
        for name in files:
            self.refuse(2, "--load", name, words=[name, "no rows"])

    def test_what_the_columns_do_not_take(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT NOT NULL)")
        for content, words in (("id,title\n1,a\nx,b\n", "'x'"), ("id,title\n1,a\n2,\n", "NOT NULL")):
            (self.folder / "a.csv").write_text(content, "utf-8")
            self.refuse(2, "--load", "a.csv", words=["a.csv", words])
        self.assertEqual(self.execute("SELECT count(*) FROM movies"), [(0,)])

    def test_a_value_nested_too_deeply(self) -> None:
        for name in ("a.json", "a.jsonl"):
            (self.folder / name).write_text("[" * 200_000, "utf-8")
            self.refuse(2, "--load", name, words=[name, "line 1"])

    def test_columns_that_are_one_in_the_table(self) -> None:
        self.make_movies(1)
        (self.folder / "a.csv").write_text("id,title,TITLE\n1,One,Two\n", "utf-8")
        self.refuse(2, "--load", "a.csv", words=["a.csv", "title, title", '"movies"'])
        self.assertEqual(self.execute("SELECT title FROM movies"), [("Film 1",)])


class LoadOnPostgres(OnPostgres, Load):
    def test_a_name_that_postgres_cuts(self) -> None:
        long = "a_question_of_a_survey_that_has_more_than_the_sixty_three_bytes_of_a_name"
        (self.folder / "a.csv").write_text(f"id,title,{long}\n1,One,yes\n2,Two,no\n", "utf-8")
        self.succeed("--load", "a.csv", "--columns", "title")
        self.assertEqual(self.execute(f'SELECT id, "{long[:63]}" FROM movies ORDER BY id'), [(1, "yes"), (2, "no")])

    def test_what_the_columns_do_not_take(self) -> None:
        self.make_movies(1)
        for content, words in [("id,title\nx,a\n", ["x"]), ("id,title\n1,a\0b\n", ["NUL"])]:
            (self.folder / "a.csv").write_text(content, "utf-8")
            self.refuse(2, "--load", "a.csv", words=["a.csv", *words])
        self.assertEqual(self.execute("SELECT id, title FROM movies"), [(1, "Film 1")])


if __name__ == "__main__":
    unittest.main()
