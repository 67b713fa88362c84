"""--status, --dry-run and --prune; and that whatever only looks leaves no trace."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import embedgen
from tests.databases import Postgres
from tests.ollama import blob
from tests.support import Case, OnPostgres, environment

LOOKING = (
    ("--search", "Film"),
    ("--similar", 1),
    ("--status",),
    ("--dry-run",),
    ("--dry-run", "--force", "--limit", 2),
    ("--prune", "--dry-run"),
)


class Usage(Case):
    """What goes with what is said in one sentence."""

    def test_flags_that_do_not_go_together(self) -> None:
        for flags, words in (
            (("--search", ""), ["--search"]),
            (("--similar", " "), ["--similar"]),
            (("--search", "x", "--similar", "1"), ["--similar", "--search"]),
            (("--status", "--prune"), ["--prune", "--status"]),
            (("--search", "x", "--force"), ["--force", "--search"]),
            (("--search", "x", "--limit", "0"), ["--limit", "--search"]),
            (("--status", "--load", "x.csv"), ["--load", "--status"]),
            (("--similar", "1", "--index"), ["--index", "--similar"]),
            (("--similar", "1", "--workers", "2"), ["--concurrent", "--similar"]),
            (("--search", "x", "--dry-run"), ["--dry-run", "--search"]),
            (("--dry-run", "--load", "x.csv"), ["--load", "--dry-run"]),
            (("--prune", "--where", "id > 1"), ["--where", "--prune"]),
            (("--prune", "--top", "3"), ["--top", "--prune"]),
            (("--top", "3"), ["--top", "--search", "--similar"]),
            (("--search", "x", "--top", "0"), ["--top", "0"]),
            (("--status", "--quiet"), ["--quiet", "--status"]),
        ):
            with self.subTest(flags=flags):
                self.refuse(2, *flags, words=words)


class Status(Case):
    """How much is embedded, and by what."""

    def status(self, *flags: object) -> dict[str, Any]:
        """Return what --status --json says."""
        return dict(json.loads(self.succeed("--status", "--json", *flags).out))

    def figures(self, *flags: object) -> tuple[int, ...]:
        """Return rows, embedded, missing, stale, orphaned."""
        facts = self.status(*flags)
        return tuple(facts[name] for name in ("rows", "embedded", "missing", "stale", "orphaned"))

    def test_figures(self) -> None:
        self.make_movies(10)
        self.assertEqual(self.figures(), (10, 0, 10, 0, 0))
        self.succeed("--limit", 7)
        self.assertEqual(self.figures(), (10, 7, 3, 0, 0))
        self.execute("UPDATE movies SET title = 'Another' WHERE id IN (2, 9)")
        self.assertEqual(self.figures(), (10, 6, 3, 1, 0))
        self.assertEqual(self.figures("--where", "id > 6"), (4, 1, 3, 0, 0))
        self.assertEqual(self.figures("--document-prefix", "other: "), (10, 0, 3, 7, 0))
        self.assertEqual(self.figures("--model", "all-minilm"), (10, 0, 3, 7, 0))
        self.succeed()
        self.assertEqual(self.figures(), (10, 10, 0, 0, 0))
        self.assertEqual(self.status()["updated"][:2], "20")

    def test_it_needs_no_server(self) -> None:
        self.make_movies(3)
        self.succeed()
        self.ollama.reset()
        self.assertEqual(self.figures(), (3, 3, 0, 0, 0))
        self.assertEqual(self.ollama.log(), [])
        self.assertEqual(self.figures("--server", "http://127.0.0.1:9"), (3, 3, 0, 0, 0))

    def test_what_it_prints(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO movies VALUES (?, ?)", [(key, f"Film {key}") for key in range(1, 1201)])
        self.ollama.configure(models={"nomic-embed-text": {"digest": "sha256:0123456789abcdef"}})
        self.succeed("--limit", 900, "--document-prefix", "search_document: ")
        self.execute("UPDATE movies SET title = 'x' WHERE id <= 50")
        done = self.succeed("--status", "--document-prefix", "search_document: ")
        rule, head, _, share, good, missing, stale, model, updated, end = done.out.splitlines()
        self.assertEqual((rule, end), ("=" * 60, "=" * 60))
        self.assertTrue(head.startswith("🧠 Movie Embeddings in "))
        self.assertEqual(share, "📊 70%|█████████████████       | 850 of 1,200 movies")
        self.assertEqual(
            (good, missing, stale),
            (
                "   ✓  Embedded: 850",
                "   …  Missing:  300",
                "   ↻  Stale:     50   (embedded from another text, prefix or model)",
            ),
        )
        made = 'nomic-embed-text (0123456789ab), 8 dimensions, prefix "search_document: ", server 0.14.0'
        self.assertEqual(model, f"🧩 Model: {made}")
        self.assertRegex(updated, r"^🕑 Last updated: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")

    def test_the_tables_only_model_is_meant_unless_one_is_named(self) -> None:
        self.make_movies(3)
        self.prefixed = True
        self.ollama.configure(models={"embeddinggemma": {}, "nomic-embed-text": {}})
        self.succeed("--model", "embeddinggemma")
        facts = self.status()
        self.assertEqual((facts["model"], facts["embedded"]), ("embeddinggemma", 3))
        self.assertEqual(facts["prefix"], "title: none | text: ")
        self.assertEqual(facts["models"][0]["prefix"], "title: none | text: ")
        self.assertEqual(self.figures("--model", "nomic-embed-text"), (3, 0, 0, 3, 0))
        done = self.run_program("--status", "--json", env={"EMBEDGEN_MODEL": "nomic-embed-text"})
        self.assertEqual(json.loads(done.out)["stale"], 3)

    def test_texts_that_were_cut(self) -> None:
        self.make_movies(3)
        self.execute(f"UPDATE movies SET overview = '{'word ' * 3000}' WHERE id = 2")
        self.succeed()
        facts = self.status()
        self.assertEqual((facts["cut"], facts["split"], facts["embedded"]), (1, 0, 3))
        self.assertIn("   ✂  Cut:      1\n", self.succeed("--status").out)

    def test_a_reader_that_has_gone(self) -> None:
        self.make_movies(3)
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(self.arguments("--status"), cwd=self.folder, env=environment(), stdin=subprocess.DEVNULL,
                              stdout=writer, stderr=subprocess.PIPE)  # fmt: skip
        os.close(writer)
        self.assertEqual((done.returncode, done.stderr), (embedgen.EXIT_SIGPIPE, b""))

    def test_several_models(self) -> None:
        self.make_movies(4)
        self.succeed()
        self.execute("UPDATE movie_embeddings SET model = 'old' WHERE movie_id = 4")
        facts = self.status()
        self.assertEqual(
            [(one["model"], one["rows"]) for one in facts["models"]], [("nomic-embed-text", 3), ("old", 1)]
        )
        self.assertEqual((facts["embedded"], facts["stale"]), (3, 1))

    def test_a_foreign_target(self) -> None:
        self.make_movies(4)
        self.execute(f"CREATE TABLE vectors (movie_id {self.db.integer} PRIMARY KEY, embedding {self.db.vector_type})")
        rows = [(key, self.db.vector(blob(str(key)))) for key in (1, 2, 3, 99)]
        self.execute("INSERT INTO vectors VALUES (?, ?)", rows)
        self.assertEqual(self.figures("--target", "vectors"), (4, 3, 1, 0, 1))
        facts = self.status("--target", "vectors")
        self.assertEqual((facts["dimensions"], facts["model"]), (8, None))
        self.assertIn("75%", self.succeed("--status", "--target", "vectors").out)
        self.execute("ALTER TABLE vectors ADD COLUMN model TEXT")
        facts = self.status("--target", "vectors")
        self.assertEqual((facts["model"], [one["model"] for one in facts["models"]]), (None, [None]))
        self.assertIn("🧩 Model: unknown, 8 dimensions\n", self.succeed("--status", "--target", "vectors").out)

    def test_vectors_of_several_lengths(self) -> None:
        self.make_movies(2)
        self.execute(f"CREATE TABLE vectors (movie_id {self.db.integer} PRIMARY KEY, embedding {self.db.any_vector})")
        self.execute(
            "INSERT INTO vectors VALUES (?, ?)", [(1, self.db.vector(blob("1"))), (2, self.db.vector(bytes(8)))]
        )
        self.assertIsNone(self.status("--target", "vectors")["dimensions"])

    def test_whole_per_cent(self) -> None:
        for done, shown in ((29, "29%"), (57, "57%"), (58, "58%"), (99, "99%"), (100, "100%")):
            counts = embedgen.Counts(100, done, None)
            self.assertIn(f" {shown}|", embedgen.progress_line(counts, 1.0, None))

    def test_an_error_that_nobody_has_thought_of(self) -> None:
        self.make_movies(1)
        connect = "psycopg.connect" if isinstance(self.db, Postgres) else "sqlite3.connect"
        with mock.patch(connect, side_effect=LookupError("never\nmind")):
            self.refuse(3, "--status", words=["LookupError: never.", "--verbose"])
            self.assertIn("Traceback", self.run_program("--status", "--verbose").err)

    def test_names_with_control_characters(self) -> None:
        self.execute('CREATE TABLE "a\x1b[31mb" (id INTEGER PRIMARY KEY, title TEXT)')
        for flags in (("--status",), ("--dry-run",), ("--search", "x"), ("--similar", "\x1b[31m")):
            done = self.run_program(*flags, "--table", "a\x1b[31mb")
            self.assertNotIn("\x1b", done.out + done.err)

    def test_an_empty_table(self) -> None:
        self.make_movies(0)
        self.assertEqual(self.figures(), (0, 0, 0, 0, 0))
        self.assertIn("0 of 0 movies", self.succeed("--status").out)


class StatusOnPostgres(OnPostgres, Status):
    """The same on Postgres."""


class DryRun(Case):
    """What a run would do."""

    def facts(self, *flags: object, **more: Any) -> dict[str, Any]:
        """Return what --dry-run --json says."""
        return dict(json.loads(self.succeed("--dry-run", "--json", *flags, **more).out))

    def test_figures(self) -> None:
        self.make_movies(10)
        names = ("rows", "would_generate", "would_skip", "left")
        for flags, expected in (
            ((), (10, 10, 0, 0)),
            (("--limit", 4), (10, 4, 0, 6)),
            (("--where", "id > 8"), (2, 2, 0, 0)),
        ):
            facts = self.facts(*flags)
            self.assertEqual(tuple(facts[name] for name in names), expected)
        self.succeed("--limit", 7)
        self.execute("UPDATE movies SET title = 'Another' WHERE id = 2")
        for flags, expected in (
            ((), (10, 4, 6, 0)),
            (("--force",), (10, 10, 0, 0)),
            (("--force", "--limit", 3), (10, 3, 0, 7)),
            (("--limit", 0), (10, 0, 6, 4)),
        ):
            facts = self.facts(*flags)
            self.assertEqual(tuple(facts[name] for name in names), expected)
        self.refuse(2, "--dry-run", "--model", "all-minilm", words=["nomic-embed-text", "all-minilm"])

    def test_the_time_is_reckoned_from_a_few_texts(self) -> None:
        self.make_movies(300)
        facts = self.facts()
        self.assertLessEqual(len(self.asked()), 100)
        self.assertAlmostEqual(facts["seconds"], 300 / facts["rate"], delta=0.1)
        self.assertIn("Estimated time: ", self.succeed("--dry-run").out)

    def test_it_needs_no_server_for_nothing(self) -> None:
        self.make_movies(3)
        nobody = ("--server", "http://127.0.0.1:9")
        self.assertIsNone(self.facts("--limit", 0, *nobody)["seconds"])
        self.refuse(3, "--dry-run", *nobody, words=["cannot reach", "127.0.0.1:9"])
        self.succeed()
        self.assertIsNone(self.facts(*nobody)["seconds"])

    def test_what_would_stop_the_run_is_said(self) -> None:
        self.make_movies(3)
        self.ollama.configure(models={"nomic-embed-text": {"digest": "sha256:aaaa"}})
        self.succeed("--limit", 1)
        self.facts()
        self.ollama.configure(models={"nomic-embed-text": {"digest": "sha256:bbbb"}})
        self.refuse(3, "--dry-run", words=["another version", "aaaa", "bbbb"])
        self.facts("--force")
        self.facts("--accept-drift")

    def test_a_column_that_is_missing(self) -> None:
        self.make_movies(3)
        for flags in ((), ("--dry-run",)):
            self.refuse(2, "--out-column", "vector", *flags, words=["ALTER TABLE", 'ADD COLUMN "vector"'])

    def test_an_index_where_there_is_none(self) -> None:
        self.make_movies(3)
        for flags in ((), ("--dry-run",)):
            done = self.run_program("--index", *flags)
            self.assertEqual(done.code, 0 if isinstance(self, OnPostgres) else 2, done.err)

    def test_rows_without_text(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT)")
        self.execute("INSERT INTO movies VALUES (1, ''), (2, ' ')")
        self.assertIsNone(self.facts()["seconds"])

    def test_what_it_prints(self) -> None:
        self.make_movies(10)
        self.succeed("--limit", 7)
        lines = self.succeed("--dry-run", "--limit", 2).out.splitlines()
        self.assertEqual(
            lines[3:7],
            [
                "📊 Total movies: 10",
                "   ✓  Would be generated: 2",
                "   ⊘  Would be skipped (already exist): 7",
                "   …  Would be left by --limit: 1",
            ],
        )
        self.assertIn("Nothing was written.", lines)


class DryRunOnPostgres(OnPostgres, DryRun):
    """The same on Postgres."""


class Prune(Case):
    """Embeddings whose row is gone."""

    def delete(self, condition: str) -> None:
        """Delete rows, and leave their embeddings behind, as SQLite does by default."""
        if isinstance(self.db, Postgres):
            self.execute("ALTER TABLE movie_embeddings DROP CONSTRAINT IF EXISTS movie_embeddings_movie_id_fkey")
        self.execute(f"DELETE FROM movies WHERE {condition}")

    def test_what_is_gone_and_nothing_else(self) -> None:
        self.make_movies(10)
        self.succeed()
        self.assertEqual(
            self.succeed("--prune").out, "🧹 Removed 0 of 10 embeddings, since all their movies are there.\n"
        )
        self.delete("id IN (3, 7)")
        done = self.succeed("--prune", "--dry-run")
        self.assertEqual(done.out, "🧹 Would remove 2 of 10 embeddings, whose movies are gone.\n")
        done = self.succeed("--prune", "--dry-run", "--json")
        self.assertEqual(json.loads(done.out), {"would_remove": 2, "left": 8, "dry_run": True})
        self.assertEqual(len(self.stored()), 10)
        done = self.succeed("--prune", "--json")
        self.assertEqual(json.loads(done.out), {"removed": 2, "left": 8, "dry_run": False})
        self.assertEqual(sorted(self.stored()), [1, 2, 4, 5, 6, 8, 9, 10])
        self.assertEqual(self.succeed("--prune", "--quiet").out, "")
        self.assert_complete()

    def test_all_of_them_is_rather_a_slip(self) -> None:
        self.make_movies(3)
        self.succeed()
        self.delete("id > 0")
        for flags in ((), ("--dry-run",)):
            self.refuse(2, "--prune", *flags, words=["none of the 3", "--force"])
        self.assertEqual(len(self.stored()), 3)
        self.assertIn("Removed 3 of 3", self.succeed("--prune", "--force").out)
        self.assertEqual(self.stored(), {})

    def test_no_target(self) -> None:
        self.make_movies(3)
        self.refuse(2, "--prune", words=["nothing to prune", "movie_embeddings"])

    def test_rows_that_only_the_view_or_another_table_does_not_have(self) -> None:
        self.make_movies(4)
        self.succeed()
        self.execute("CREATE VIEW few AS SELECT * FROM movies WHERE id < 3")
        self.execute("CREATE TABLE others AS SELECT * FROM movies WHERE id < 3")
        self.execute(f"CREATE TABLE vectors (movie_id {self.db.integer} PRIMARY KEY, embedding {self.db.vector_type})")
        self.execute("INSERT INTO vectors VALUES (?, ?)", [(key, self.db.vector(blob(str(key)))) for key in (1, 2, 3)])
        for table, target in (("few", "movie_embeddings"), ("few", "vectors"), ("others", "vectors")):
            flags = ("--table", table, "--id", "id", "--target", target)
            for more in ((), ("--dry-run",)):
                self.refuse(2, "--prune", *flags, *more, words=[f'"{table}"', f'"{target}"', "--force"])
        self.assertEqual((len(self.stored()), len(self.stored("vectors"))), (4, 3))
        self.assertIn(" 2   (without a row in few; see --prune)", self.succeed("--status", "--table", "few", "--target",
                                                                             "movie_embeddings").out)  # fmt: skip
        self.assertIn("Removed 1 of 3", self.succeed("--prune", "--force", *flags).out)
        # What the table's own name says needs no foreign key.
        self.succeed("--table", "few")
        self.execute("DELETE FROM movies WHERE id = 2")
        self.assertIn("Removed 1 of 2", self.succeed("--prune", "--table", "few").out)

    def test_neither_text_nor_model_matters(self) -> None:
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, a TEXT)")
        self.execute("INSERT INTO movies VALUES (1, 'x'), (2, 'y')")
        self.succeed("--columns", "a")
        self.delete("id = 1")
        self.assertIn("Removed 1 of 2", self.succeed("--prune", "--server", "hash:").out)


class PruneInSQLite(Case):
    def test_keys_are_compared_as_the_table_compares_them(self) -> None:
        self.execute("CREATE TABLE movies (code TEXT PRIMARY KEY COLLATE NOCASE, title TEXT)")
        self.execute("INSERT INTO movies VALUES ('ABC', 'One'), ('def', 'Two')")
        self.succeed()
        self.execute("UPDATE movies SET code = lower(code)")
        self.assertIn("Would remove 0 of 2", self.succeed("--prune", "--dry-run").out)
        plan = self.execute(
            "EXPLAIN QUERY PLAN SELECT count(*) FROM movie_embeddings AS e WHERE NOT EXISTS "
            "(SELECT 1 FROM movies AS s WHERE s.code = e.movie_id)"
        )
        self.assertRegex(str(plan), "SEARCH (TABLE movies AS )?s USING", "the table's own index serves")

    def test_the_first_of_several_foreign_keys_counts(self) -> None:
        self.execute("CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT)")
        self.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY REFERENCES items, title TEXT)")
        self.execute(
            "CREATE TABLE movie_embeddings (movie_id INTEGER PRIMARY KEY REFERENCES items(id), embedding BLOB, "
            "FOREIGN KEY (movie_id) REFERENCES movies(id))"
        )
        self.execute("INSERT INTO items VALUES (1, 'x'), (2, 'y')")
        self.execute("INSERT INTO movies VALUES (1, 'x'), (2, 'y')")
        self.assertEqual(self.succeed().tally, (2, 0, 0))
        self.execute("DELETE FROM movies WHERE id = 2")
        self.assertIn("Removed 1 of 2", self.succeed("--prune").out)


class StatusOnlyOnPostgres(OnPostgres, Case):
    """Types that SQLite takes for one another."""

    def test_keys_that_do_not_compare(self) -> None:
        self.make_movies(2)
        self.execute("CREATE TABLE vectors (movie_id text PRIMARY KEY, embedding vector(8))")
        self.refuse(2, "--status", "--target", "vectors", words=["text = integer", "--target"])


class PruneOnPostgres(OnPostgres, Prune):
    """The same on Postgres."""

    db: Postgres

    def test_all_of_them_stay_even_if_their_rows_go_in_that_moment(self) -> None:
        self.make_movies(3)
        self.succeed()
        self.delete("id = 1")
        with self.db.psycopg.connect(self.db.url) as other:
            other.execute("LOCK TABLE movie_embeddings IN SHARE MODE")
            process = self.start_program("--prune")
            waits = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'movie_embeddings'::regclass"
            self.wait_for(lambda: self.execute(waits), "it has counted, and wants to remove")
            other.execute("DELETE FROM movies")
        done = self.ended(process)
        self.assertEqual(done.code, 2, done.err)
        self.assertIn("none of the 3", done.err)
        self.assertEqual(len(self.stored()), 3)

    def test_rows_that_are_hidden_from_this_user(self) -> None:
        self.make_movies(4)
        self.succeed()
        self.execute("ALTER TABLE movies ENABLE ROW LEVEL SECURITY")
        self.execute("CREATE POLICY few ON movies USING (id < 3)")
        with self.db.role(
            "GRANT SELECT ON movies TO {role}", "GRANT SELECT, DELETE ON movie_embeddings TO {role}"
        ) as url:
            for more in ((), ("--dry-run",), ("--force",)):
                self.refuse(
                    3, "--prune", *more, "--database", url, words=["row-level security", "movies", "--database"]
                )
        self.assertEqual(len(self.stored()), 4)


class TracesInSQLite(Case):
    """Not a byte of the file changes, and no file appears beside it, but for the index of a log of changes."""

    def setUp(self) -> None:
        super().setUp()
        self.make_movies(5)
        self.succeed("--limit", 3)
        (self.folder / "movies.db.embedgen-lock").unlink()

    def traces(self, folder: Path) -> dict[str, str]:
        """Return a digest of each file in a folder, but for the index of a log of changes and an empty log."""
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.iterdir()
            if path.is_file()
            and not path.name.endswith("-shm")
            and not (path.name.endswith("-wal") and not path.stat().st_size)
        }

    def look(self, *more: object, rows: int = 5) -> None:
        """Have everything look that only looks; it must see that many rows."""
        folder = self.folder
        before = self.traces(folder)
        for flags in LOOKING:
            with self.subTest(flags=flags):
                done = self.run_program(*flags, "--json", *more)
                self.assertEqual(done.code, 0, done.err)
                facts = json.loads(done.out)
                self.assertEqual(facts.get("rows", rows), rows)
                self.assertEqual(self.traces(folder), before)

    def write(self, code: str, wait: bool = True) -> subprocess.Popen[bytes]:
        """Have another process write to the database, as `c`, and kill itself or wait."""
        code = f"import os, sqlite3, sys; c = sqlite3.connect({str(self.database)!r}, isolation_level=None); {code}"
        process = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin and process.stdout
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.addCleanup(process.stdin.close)
        if wait:
            process.wait()
        else:
            process.stdout.readline()
        return process

    WAL = "c.execute('PRAGMA journal_mode=wal'); c.execute(\"INSERT INTO movies VALUES (6, 'Film 6', '')\"); "
    STAY = "print(1, flush=True); sys.stdin.read()"
    DIE = "os.kill(os.getpid(), 9)"

    def test_at_rest(self) -> None:
        self.look()

    def test_no_log_is_begun(self) -> None:
        self.succeed("--status", "--log-dir", self.folder / "other")
        self.assertFalse((self.folder / "other").exists())

    def test_while_a_run_is_under_way(self) -> None:
        lock = sqlite3.connect(str(self.database) + ".embedgen-lock", isolation_level=None)
        self.addCleanup(lock.close)
        lock.execute("BEGIN EXCLUSIVE")
        self.refuse(3, words=["another run"])
        self.look()

    def test_wal_at_rest(self) -> None:
        self.write(self.WAL + "c.close()")
        self.assertEqual(set(self.traces(self.folder)), {"movies.db"})
        self.look(rows=6)

    @unittest.skipUnless(hasattr(signal, "SIGKILL"), "needs kill -9")
    def test_wal_of_a_program_that_was_killed(self) -> None:
        self.write(self.WAL + self.DIE)
        self.assertEqual(set(self.traces(self.folder)), {"movies.db", "movies.db-wal"})
        self.look(rows=6)

    def test_wal_of_a_program_that_is_at_work(self) -> None:
        self.write(self.WAL + "c.execute('BEGIN IMMEDIATE'); c.execute('DELETE FROM movies'); " + self.STAY, wait=False)
        self.look(rows=6)

    @unittest.skipUnless(hasattr(signal, "SIGKILL"), "needs kill -9")
    def test_a_hot_journal(self) -> None:
        self.write(
            "c.execute('PRAGMA cache_size=5'); c.execute('BEGIN'); rows = [(n, 'x' * 1000, '') for n in range(9, 500)];"
            "c.executemany('INSERT INTO movies VALUES (?, ?, ?)', rows); " + self.DIE
        )
        before = self.traces(self.folder)
        self.assertIn("movies.db-journal", before)
        for flags in LOOKING:
            self.refuse(3, *flags, words=["movies.db", "killed", "embedgen"])
        self.assertEqual(self.traces(self.folder), before)
        self.succeed()
        self.look()

    def test_names_that_mean_something_in_a_uri(self) -> None:
        for name in ("a?b.db", "a#b.db", "a%41b.db", "a b&c=d.db", "é.db"):
            with self.subTest(name=name):
                if os.name == "nt" and "?" in name:
                    continue
                path = self.folder / name
                path.write_bytes(self.database.read_bytes())
                before = self.traces(self.folder)
                done = self.succeed("--status", "--json", "--database", path)
                self.assertEqual(json.loads(done.out)["rows"], 5)
                self.assertEqual(self.traces(self.folder), before)

    def test_a_file_that_may_only_be_read(self) -> None:
        self.database.chmod(0o444)
        self.folder.chmod(0o555)
        self.addCleanup(self.folder.chmod, 0o755)
        self.look()

    def test_no_database(self) -> None:
        for flags in LOOKING:
            self.refuse(3, *flags, "--database", "other.db", words=["no database other.db"])
        self.assertFalse((self.folder / "other.db").exists())

    def test_pruning_takes_the_lock(self) -> None:
        lock = sqlite3.connect(str(self.database) + ".embedgen-lock", isolation_level=None)
        self.addCleanup(lock.close)
        lock.execute("BEGIN EXCLUSIVE")
        self.refuse(3, "--prune", words=["another run"])


class TracesInPostgres(OnPostgres, Case):
    """Nothing in the schema changes, and no right is needed but to read."""

    db: Postgres

    def setUp(self) -> None:
        super().setUp()
        self.make_movies(5)
        self.succeed("--limit", 3)

    def traces(self) -> dict[str, Any]:
        """Return all that is in the schema, and how it is described in the catalog."""
        found = {
            name: sorted(map(repr, self.execute(f'SELECT t.ctid, t.xmin, t.* FROM "{name}" AS t')))
            for name in self.db.tables()
        }
        found["pg_class"] = self.execute(
            "SELECT oid, relname, relkind, relnatts, relchecks, relacl::text FROM pg_class "
            "WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
        )
        return found

    def look(self, *more: object) -> None:
        """Have everything look that only looks."""
        before = self.traces()
        for flags in LOOKING:
            with self.subTest(flags=flags):
                done = self.run_program(*flags, "--json", *more)
                self.assertEqual(done.code, 0, done.err)
                self.assertEqual(self.traces(), before)

    def test_nothing_is_written(self) -> None:
        self.look()

    def test_before_the_first_run(self) -> None:
        self.wipe()
        self.make_movies(2)
        before = self.traces()
        self.succeed("--status")
        self.succeed("--dry-run")
        self.assertEqual(self.traces(), before)

    def test_a_condition_that_writes(self) -> None:
        self.execute(
            "CREATE FUNCTION note() RETURNS boolean LANGUAGE sql AS "
            "'INSERT INTO movies (id) SELECT max(id) + 1 FROM movies RETURNING true'"
        )
        self.addCleanup(self.execute, "DROP FUNCTION note")
        before = self.traces()
        for flags in (("--status",), ("--dry-run",), ("--search", "x")):
            self.refuse(3, *flags, "--where", "note()", words=["read-only"])
        self.assertEqual(self.traces(), before)

    def test_a_role_that_may_only_read(self) -> None:
        for tables in ("movies, movie_embeddings", "ALL TABLES IN SCHEMA public"):
            with self.db.role(f"GRANT SELECT ON {tables} TO {{role}}") as url:
                self.look("--database", url)

    def test_a_role_that_may_not_read_the_target(self) -> None:
        with self.db.role("GRANT SELECT ON movies TO {role}") as url:
            for flags in LOOKING:
                self.refuse(3, *flags, "--database", url, words=["movie_embeddings", "no columns that may be read"])


if __name__ == "__main__":
    unittest.main()
