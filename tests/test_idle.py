"""A run with nothing to do hashes nothing; but whatever anybody has changed, it notices."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

import embedgen
from tests.databases import SQLite
from tests.support import Case

Tally = tuple[int, int, int]


class Idle(Case):
    """Tests on three films; two are as many as are worth a note here."""

    db: SQLite

    def setUp(self) -> None:
        super().setUp()
        self.make_movies(3)
        patch = mock.patch.object(embedgen, "NOTE_ROWS", 2)
        patch.start()
        self.addCleanup(patch.stop)

    def look(self, *flags: object) -> tuple[Tally, int]:
        """Run the program, and return what it did and how many texts it hashed."""
        with mock.patch("hashlib.sha256", wraps=hashlib.sha256) as spy:
            done = self.run_program(*flags)
        self.assertEqual(done.err, "")
        texts = [call.args[0] for call in spy.call_args_list if call.args[0].startswith(b"Title: ")]
        return done.tally, len(texts)

    def finish(self, *flags: object) -> None:
        """Run until nothing is left to do, and nothing is hashed any more."""
        self.run_program(*flags)
        self.look(*flags)
        self.assertEqual(self.look(*flags), ((0, 3, 0), 0))

    def elsewhere(self, *statements: str) -> None:
        """Execute statements in one connection of another process."""
        code = "import sqlite3, sys; [*map(sqlite3.connect(sys.argv[1], isolation_level=None).execute, sys.argv[2:])]"
        subprocess.run([sys.executable, "-c", code, str(self.database), *statements], check=True)

    def change_before(self, name: str) -> Any:
        """Patch a store's method: somebody else changes a title right before it."""
        method: Callable[..., Any] = getattr(embedgen.SQLiteStore, name)

        def after_a_change(*arguments: Any, **named: Any) -> Any:
            self.execute("UPDATE movies SET title = title || '!' WHERE id = 2")
            return method(*arguments, **named)

        return mock.patch.object(embedgen.SQLiteStore, name, after_a_change)

    def counter(self) -> int:
        """Return the file's change counter."""
        return int.from_bytes(self.database.read_bytes()[24:28], "big")


class Spared(Idle):
    def test_the_run_that_embeds_all_spares_the_next_one_the_hashing(self) -> None:
        self.succeed()
        before = self.database.read_bytes()
        self.assertEqual(self.look(), ((0, 3, 0), 0))
        self.assertEqual(self.database.read_bytes(), before)

    def test_so_does_a_run_that_only_looked(self) -> None:
        self.succeed()
        self.elsewhere("CREATE TABLE other (x)")
        self.assertEqual(self.look(), ((0, 3, 0), 3))
        self.assertEqual(self.look(), ((0, 3, 0), 0))

    def test_a_small_table_is_not_worth_a_note(self) -> None:
        with mock.patch.object(embedgen, "NOTE_ROWS", 4):
            self.succeed()
            self.assertEqual(self.look(), ((0, 3, 0), 3))
        names = [name for (name,) in self.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        self.assertEqual(names, ["embedgen_provenance", "movie_embeddings", "movies"])

    def test_rows_without_text_fail_each_time_and_need_no_hash(self) -> None:
        self.execute("INSERT INTO movies VALUES (4, '', NULL)")
        self.assertEqual(self.run_program().tally, (3, 0, 1))
        done, hashed = self.look(), self.run_program()
        self.assertEqual((done, hashed.code, hashed.tally), (((0, 3, 1), 0), 1, (0, 3, 1)))

    def test_a_limit_takes_the_next_rows_without_hashing_the_others(self) -> None:
        self.succeed("--limit", 1)
        tallies = [self.look("--limit", 1) for _ in range(3)]
        self.assertEqual([tally for tally, _ in tallies], [(1, 1, 0), (1, 2, 0), (0, 3, 0)])
        self.assertEqual(tallies[2][1], 0)

    def test_two_targets_do_not_take_the_notes_from_each_other(self) -> None:
        other = ("--target", "others", "--columns", "title")
        for _ in range(2):
            self.succeed()
            self.succeed(*other)
        self.assertEqual(self.look(), ((0, 3, 0), 0))
        self.assertEqual(self.look(*other), ((0, 3, 0), 0))
        self.elsewhere("UPDATE movies SET title = 'New' WHERE id = 2")
        self.assertEqual(self.look()[0], (1, 2, 0))
        self.assertEqual(self.look(*other)[0], (1, 2, 0))

    def test_a_condition_is_evaluated_all_the_same(self) -> None:
        self.finish()
        self.assertEqual(self.look("--where", "id > 1"), ((0, 2, 0), 0))

    def test_what_cannot_leave_a_note_works_without(self) -> None:
        for statement in ("CREATE VIEW embedgen_notes AS SELECT 1", "CREATE TABLE embedgen_notes (mine)"):
            with self.subTest(statement):
                self.execute(statement)
                self.run_program()
                self.assertEqual(self.look(), ((0, 3, 0), 3))
                self.execute(f"DROP {statement.split()[1]} embedgen_notes")

    def test_a_database_locked_at_the_end_is_no_matter(self) -> None:
        self.succeed()
        self.elsewhere("CREATE TABLE other (x)")
        note = embedgen.SQLiteStore.note

        def locked(store: embedgen.SQLiteStore, complete: bool) -> None:
            with contextlib.closing(sqlite3.connect(self.database, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                note(store, complete)

        with mock.patch.object(embedgen.SQLiteStore, "note", locked):
            self.assertEqual(self.look(), ((0, 3, 0), 3))
        self.assertEqual(self.look(), ((0, 3, 0), 3))


class Noticed(Idle):
    def test_whatever_was_changed_is_noticed(self) -> None:
        changes: list[tuple[str, Tally]] = [
            ("UPDATE movies SET title = 'New' WHERE id = 2", (1, 2, 0)),
            ("REPLACE INTO movies VALUES (1, 'New', 'too')", (1, 2, 0)),
            ("UPDATE movies SET title = overview, overview = title", (3, 0, 0)),
            ("UPDATE movies SET title = '', overview = NULL WHERE id = 2", (0, 2, 1)),
            ("UPDATE movie_embeddings SET text_sha256 = zeroblob(32) WHERE movie_id = 2", (1, 2, 0)),
            ("DELETE FROM movie_embeddings WHERE movie_id = 2", (1, 2, 0)),
            ("DELETE FROM movies WHERE id = 2", (0, 2, 0)),
            ("INSERT INTO movies VALUES (4, 'Film 4', 'x')", (1, 3, 0)),
            ("ALTER TABLE movies ADD COLUMN year DEFAULT 1999", (3, 0, 0)),
            ("VACUUM", (0, 3, 0)),
        ]
        self.finish()
        original = self.database.read_bytes()
        for mode in ("DELETE", "TRUNCATE", "PERSIST", "MEMORY", "OFF"):
            for statement, tally in changes[: None if mode == "DELETE" else 2]:
                with self.subTest(mode=mode, statement=statement):
                    self.database.write_bytes(original)
                    with contextlib.closing(sqlite3.connect(self.database, isolation_level=None)) as connection:
                        connection.execute(f"PRAGMA journal_mode = {mode}")
                        connection.execute(statement)
                    self.assertEqual(self.look()[0], tally)

    def test_the_change_of_another_process_is_noticed(self) -> None:
        self.finish()
        self.elsewhere("UPDATE movies SET title = 'New' WHERE id = 2")
        self.assertEqual(self.look()[0], (1, 2, 0))
        self.assert_complete()

    def test_transactions_under_one_exclusive_lock_are_noticed(self) -> None:
        self.finish()
        changes = [f"UPDATE movies SET title = 'New {number}' WHERE id = {number}" for number in (1, 2)]
        self.elsewhere("PRAGMA locking_mode = EXCLUSIVE", *changes)
        self.assertEqual(self.look()[0], (2, 1, 0))

    def test_a_model_put_in_by_hand_is_refused(self) -> None:
        self.finish()
        self.execute("UPDATE movie_embeddings SET model = 'other' WHERE movie_id = 3")
        self.refuse(2, words=["other"])

    def test_in_wal_mode_all_is_hashed(self) -> None:
        with contextlib.closing(sqlite3.connect(self.database, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            self.succeed()
            self.assertEqual(self.look(), ((0, 3, 0), 3))
            for number in (1, 2, 3):  # the file itself does not change: the log beside it is not yet merged into it
                connection.execute(f"UPDATE movies SET title = 'New' WHERE id = {number}")
                self.assertEqual(self.look()[0], (1, 2, 0))
        for title in ("Newer", "Newest"):  # nor does what it counts, when it is merged at the end of each program
            self.elsewhere(f"UPDATE movies SET title = '{title}' WHERE id = 2")
            self.assertEqual(self.look()[0], (1, 2, 0))
            for _ in range(2):
                self.assertEqual(self.look(), ((0, 3, 0), 3))

    def test_a_change_made_while_the_mode_was_another_is_noticed(self) -> None:
        self.finish()
        change = "UPDATE movies SET title = 'New' WHERE id = 2"
        self.elsewhere("PRAGMA journal_mode = WAL", change, "PRAGMA journal_mode = DELETE")
        self.assertEqual(self.look()[0], (1, 2, 0))
        self.elsewhere("PRAGMA journal_mode = WAL")
        self.assertEqual(self.look(), ((0, 3, 0), 3))

    def test_what_a_view_shows_may_change_by_itself(self) -> None:
        self.execute("CREATE VIEW films AS SELECT id, title || strftime('%f', 'now') AS title FROM movies")
        for tally in [(3, 0, 0), (3, 0, 0), (3, 0, 0)]:
            self.assertEqual(self.look("--table", "films")[0], tally)

    def test_a_virtual_table_may_show_what_is_elsewhere(self) -> None:
        try:
            self.execute("CREATE VIRTUAL TABLE films USING fts5(id UNINDEXED, title, content='movies')")
        except sqlite3.OperationalError as error:
            self.skipTest(str(error))
        self.look("--table", "films")
        for _ in range(2):
            self.assertEqual(self.look("--table", "films"), ((0, 3, 0), 3))

    def test_a_run_over_a_part_says_nothing_of_the_others(self) -> None:
        self.succeed()
        self.elsewhere("UPDATE movies SET title = 'New' WHERE id = 2")
        for _ in range(2):
            self.assertEqual(self.look("--where", "id <> 2")[0], (0, 2, 0))
        self.assertEqual(self.look()[0], (1, 2, 0))

    def test_a_limit_leaves_nothing_unnoticed(self) -> None:
        self.finish()
        self.elsewhere("UPDATE movies SET title = 'New'")
        tallies = [self.look("--limit", 1)[0] for _ in range(4)]
        self.assertEqual(tallies, [(1, 0, 0), (1, 1, 0), (1, 2, 0), (0, 3, 0)])
        self.assert_complete()

    def test_force_takes_all_whatever_a_note_says(self) -> None:
        self.finish()
        self.assertEqual(self.look("--force")[0], (3, 0, 0))
        self.assertEqual(self.look("--force", "--limit", 2)[0], (2, 0, 0))
        self.assertEqual(self.look()[0], (0, 3, 0))

    def test_a_changed_text_that_fails_fails_again(self) -> None:
        self.finish()
        self.execute("UPDATE movies SET title = '', overview = '' WHERE id = 2")
        for _ in range(3):
            self.assertEqual(self.look()[0], (0, 2, 1))

    def test_another_text_another_key_another_version_of_sqlite(self) -> None:
        self.finish()
        self.assertEqual(self.look("--columns", "title")[0], (3, 0, 0))
        self.finish()
        with mock.patch("sqlite3.sqlite_version", "3.99.0"):  # it may write numbers in another way
            self.assertEqual(self.look(), ((0, 3, 0), 3))
        self.execute("ALTER TABLE movies ADD COLUMN number INTEGER")
        self.execute("UPDATE movies SET number = 4 - id")
        self.finish()
        self.refuse(2, "--id", "number", words=['"id"', "--id id", "--target"])

    def test_rows_that_were_skipped_for_their_length_are_no_part_of_the_note(self) -> None:
        self.finish()
        self.ollama.configure(models={"nomic-embed-text": {"context": 30}})
        self.execute(f"UPDATE movies SET overview = '{'long ' * 40}' WHERE id = 2")
        self.assertEqual(self.run_program("--on-long", "skip").tally, (0, 3, 0))
        self.assertEqual(self.run_program().tally, (1, 2, 0))

    def test_a_change_between_the_count_and_the_note(self) -> None:
        self.finish()
        self.elsewhere("CREATE TABLE other (x)")
        with self.change_before("note"):
            self.assertEqual(self.look(), ((0, 3, 0), 3))
        self.assertEqual(self.look()[0], (1, 2, 0))
        self.finish()
        self.execute("INSERT INTO movies VALUES (4, 'Film 4', 'x')")
        with self.change_before("save"):
            self.assertEqual(self.look()[0], (1, 3, 0))
        self.assertEqual(self.look()[0], (1, 3, 0))

    def test_a_change_while_what_is_saved_is_what_was_there(self) -> None:
        with mock.patch("time.strftime", return_value="2026-01-01T00:00:00Z"):
            self.succeed()
            self.succeed("--force")  # saved once more, it leaves the file untouched, and its counter
            with self.change_before("save"):
                self.assertEqual(self.look("--force")[0], (3, 0, 0))
        self.assertEqual(self.look()[0], (1, 2, 0))

    def test_what_a_trigger_changes_is_noticed(self) -> None:
        self.finish()
        self.execute(
            "CREATE TRIGGER marks AFTER INSERT ON movie_embeddings BEGIN "
            "UPDATE movies SET title = title || '!' WHERE id = new.movie_id; END"
        )
        self.execute("INSERT INTO movies VALUES (4, 'Film 4', 'x')")
        self.assertEqual(self.look()[0], (1, 3, 0))
        self.assertEqual(self.look()[0], (1, 3, 0))

    def test_keys_that_become_one_in_somebody_elses_target(self) -> None:
        for definition, keys in (("INTEGER", ("1", "01", "2")), ("TEXT COLLATE NOCASE", ("a", "A", "b"))):
            with self.subTest(definition):
                self.execute("DROP TABLE IF EXISTS books")
                self.execute("DROP TABLE IF EXISTS pages")
                self.execute("CREATE TABLE books (id TEXT PRIMARY KEY, title TEXT)")
                self.execute("INSERT INTO books VALUES (?, ?)", [(key, f"Book {key}") for key in keys])
                self.execute(f"CREATE TABLE pages (book_id {definition} PRIMARY KEY, embedding, text_sha256)")
                self.assertEqual(self.look("--table", "books", "--target", "pages")[0], (3, 0, 0))
                for _ in range(2):
                    self.assertEqual(self.look("--table", "books", "--target", "pages")[0], (1, 2, 0))


class Replaced(Idle):
    """Files that were put in the place of others."""

    def test_an_older_copy(self) -> None:
        self.finish()
        older = self.database.read_bytes()
        self.elsewhere("UPDATE movies SET title = 'New'")
        self.finish()
        self.database.write_bytes(older)
        self.assertEqual(self.look()[0], (0, 3, 0))
        self.elsewhere("UPDATE movies SET title = 'Newer' WHERE id = 2")
        self.assertEqual(self.look()[0], (1, 2, 0))

    def made_by_sqlite(self) -> None:
        """Put in the database's place what SQLite's backup makes of it, changed until its counter is the note's."""
        self.finish()
        wanted, copy = self.counter(), self.folder / "copy.db"
        with contextlib.closing(sqlite3.connect(self.database)) as source:
            with contextlib.closing(sqlite3.connect(copy)) as target:
                source.backup(target)
        original = self.database
        self.database = self.db.path = copy
        while self.counter() < wanted:
            self.execute("UPDATE movies SET title = title || '!' WHERE id = 2")
        self.assertEqual(self.counter(), wanted)
        self.database = self.db.path = original

    def test_a_backup_by_sqlite_counts_anew(self) -> None:
        self.made_by_sqlite()
        os.replace(self.folder / "copy.db", self.database)
        self.assertEqual(self.look()[0], (1, 2, 0))

    def test_a_backup_by_sqlite_copied_into_the_same_file(self) -> None:
        self.made_by_sqlite()
        now = self.database.stat().st_mtime
        shutil.copyfile(self.folder / "copy.db", self.database)
        os.utime(self.database, (now + 10, now + 10))  # as one does it, and not within the test's two seconds
        self.assertEqual(self.look()[0], (1, 2, 0))


if __name__ == "__main__":
    unittest.main()
