"""--out-column: vectors in a column of the table itself."""

from __future__ import annotations

import contextlib
import json
import random
import re
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar
from unittest import mock

import embedgen
from tests.ollama import blob
from tests.support import ENGINES, FULL, Case, OnPostgres, shared_double

ROWS = 10_000 if FULL else 300
COLUMN = ("--table", "items", "--columns", "name", "--out-column", "embedding")


class ColumnCase(Case):
    """A table items with a column for vectors."""

    def make_items(self, count: int = 10, more: str = "") -> None:
        """Make the table, with the keys from 1 to `count`, and `more` behind its columns."""
        columns = f"id INTEGER PRIMARY KEY, name TEXT, price INTEGER, embedding {self.db.vector_type}"
        self.execute(f"CREATE TABLE items ({columns}{more})")
        rows = [(key, f"Item {key}", 5) for key in range(1, count + 1)]
        self.execute("INSERT INTO items (id, name, price) VALUES (?, ?, ?)", rows)

    def stored(self, target: str = "items", key: str = "id") -> dict[Any, bytes]:
        """Return the vectors in the column, but for NULLs."""
        self.execute(f"CREATE VIEW filled AS SELECT * FROM {target} WHERE embedding IS NOT NULL")
        try:
            return self.db.vectors("filled", key)
        finally:
            self.execute("DROP VIEW filled")

    def expected(self) -> dict[Any, bytes]:
        """Return the vectors that belong to the rows as they are."""
        return {key: blob(f"Name: {name}") for key, name in self.execute("SELECT id, name FROM items")}

    def assert_complete(self, but: Iterable[int] = ()) -> None:
        """Every row must have its own vector, but for some that must have none."""
        expected, but = self.expected(), set(but)
        self.assertEqual(self.stored(), {key: vector for key, vector in expected.items() if key not in but})


class MainJob(ColumnCase):
    """The main job, for each engine."""

    engine: ClassVar[str] = "async"

    def test_every_vector_belongs_to_its_row(self) -> None:
        self.make_items(ROWS)
        self.assertEqual(self.succeed(*COLUMN).tally, (ROWS, 0, 0))
        self.assert_complete()
        before = len(self.asked())
        self.assertEqual(self.succeed(*COLUMN).tally, (0, ROWS, 0))
        self.assertEqual(len(self.asked()), before)
        self.execute("UPDATE items SET embedding = NULL WHERE id % 100 = 0")
        self.assertEqual(self.succeed(*COLUMN).tally, (ROWS // 100, ROWS - ROWS // 100, 0))
        again = {f"Name: Item {key}" for key in range(100, ROWS + 1, 100)}
        self.assertEqual(set(self.asked()[before:]), again)
        self.assert_complete()

    def test_force_where_and_limit(self) -> None:
        self.make_items()
        self.assertEqual(self.succeed(*COLUMN, "--limit", 4).tally, (4, 0, 0))
        self.assert_complete(but=range(5, 11))
        self.assertEqual(self.succeed(*COLUMN, "--where", "id > 8").tally, (2, 0, 0))
        self.execute("UPDATE items SET name = 'New' WHERE id IN (3, 9)")
        self.assertEqual(self.succeed(*COLUMN, "--force", "--where", "id = 3").tally, (1, 0, 0))
        self.assertEqual(self.stored()[3], blob("Name: New"))
        self.assertEqual(self.stored()[9], blob("Name: Item 9"))
        self.assertEqual(self.succeed(*COLUMN, "--force").tally, (10, 0, 0))
        self.assert_complete()

    def test_a_row_that_changes_or_goes_while_it_is_embedded_is_not_written(self) -> None:
        self.make_items()
        self.ollama.configure(hold=["Item"])
        process = self.start_program(*COLUMN)
        self.wait_for(self.asked, "a request")
        self.execute("UPDATE items SET name = 'New' WHERE id = 3")
        self.execute("UPDATE items SET price = 7 WHERE id = 4")
        self.execute("DELETE FROM items WHERE id = 5")
        self.ollama.configure(hold=[])
        done = self.ended(process)
        self.assertEqual((done.code, done.err), (0, ""), done.out)
        # Rows that were not read yet are embedded as they are now.
        fresh = [key for key in (3,) if "Name: New" in self.asked()]
        self.assert_complete(but={3}.difference(fresh))
        self.succeed(*COLUMN)
        self.assert_complete()


class MainJobByProcesses(MainJob):
    """The same with worker processes."""

    engine = "process"


class MainJobOnPostgres(OnPostgres, MainJob):
    """The same on Postgres."""


class MainJobOnPostgresByProcesses(MainJobOnPostgres):
    """The same with worker processes."""

    engine = "process"


class Column(ColumnCase):
    """What a column can do, whatever the engine."""

    table = '"items"'

    def test_a_column_that_is_missing(self) -> None:
        self.make_items()
        flags = ("--table", "items", "--columns", "name", "--out-column", "my vector")
        statements = set()
        for more in ((), ("--dry-run",)):
            refused = self.refuse(2, *flags, *more, words=['"items" has no column "my vector"'])
            statements.add(re.search("run: (.*);", refused)[1])  # type: ignore[index]
        [statement] = statements
        self.assertEqual(statement.partition(" ADD")[0], f"ALTER TABLE {self.table}")
        self.execute(statement)
        self.assertEqual(self.succeed(*flags).tally, (10, 0, 0))
        self.execute("ALTER TABLE items DROP COLUMN embedding")
        self.execute('ALTER TABLE items RENAME COLUMN "my vector" TO embedding')
        self.assert_complete()

    def test_unusable_columns(self) -> None:
        self.make_items()
        self.execute("CREATE VIEW shown AS SELECT * FROM items")
        for flags, words in (
            ("items --columns name --out-column price", ["type", self.db.vector_type[:4]]),
            ("items --columns price,name --out-column name", ['"name"', "part of the text"]),
            ("items --columns name --out-column id", ['"id"', "key"]),
            ("shown --columns name --out-column embedding", ["view", "--target"]),
        ):
            with self.subTest(flags):
                self.refuse(2, "--table", *flags.split(), words=words)
        self.assertEqual(self.stored(), {})

    def test_status(self) -> None:
        self.make_items()
        self.execute("UPDATE items SET price = 6 WHERE id = 3")
        self.succeed(*COLUMN, "--limit", 7)
        shown = self.succeed(*COLUMN, "--status").out
        self.assertRegex(shown, r"Embedded: +7\n.*Missing: +3\n")
        self.assertNotIn("Stale", shown)
        self.assertIn("Changed texts cannot be told", shown)
        [mark] = re.findall("UPDATE .*;", shown)
        self.assertEqual(mark, f'UPDATE {self.table} SET "embedding" = NULL WHERE "id" = ...;')
        facts = json.loads(self.succeed(*COLUMN, "--status", "--json").out)
        self.assertEqual([facts[name] for name in ("rows", "embedded", "missing", "stale")], [10, 7, 3, None])
        self.execute(mark.replace("...;", "2"))
        self.assertEqual(self.succeed(*COLUMN).tally, (4, 6, 0))
        self.assert_complete()

    def test_search_and_similar(self) -> None:
        self.make_items()
        self.refuse(3, *COLUMN, "--search", "x", words=["no embeddings yet"])
        self.refuse(3, *COLUMN, "--similar", 3, words=["no embedding yet"])
        self.succeed(*COLUMN, "--where", "id > 1")
        done = self.run_program(*COLUMN, "--search", "Name: Item 7", "--query-prefix", "", "--json")
        [first, *others] = json.loads(done.out)["results"]
        self.assertEqual((first["key"], first["similarity"], len(others)), (7, 1.0, 8))
        done = self.run_program(*COLUMN, "--similar", 7, "--top", 3)
        self.assertEqual((done.code, done.out.count("Item")), (0, 4), done.out)
        self.assertIn("of 10 items, 1 not searched", done.err)

    def test_dry_run(self) -> None:
        self.make_items()
        self.succeed(*COLUMN, "--limit", 4)
        facts = json.loads(self.succeed(*COLUMN, "--dry-run", "--json").out)
        self.assertEqual((facts["would_generate"], facts["would_skip"]), (6, 4))
        self.assertEqual(len(self.stored()), 4)

    def test_long_texts(self) -> None:
        for choice, code, facts in (
            ("cut", 0, {"generated": 10, "cut": 1}),
            ("split", 0, {"generated": 10, "cut": 0}),
            ("skip", 0, {"generated": 9, "too_long": 1}),
            ("fail", 1, {"generated": 9, "failed": 1}),
        ):
            with self.subTest(choice):
                self.wipe()
                self.make_items()
                self.execute("UPDATE items SET name = '" + "word " * 3000 + "' WHERE id = 4")
                done = self.run_program(*COLUMN, "--on-long", choice, "--json")
                self.assertEqual(done.code, code, done.err)
                said = json.loads(done.out)
                self.assertEqual({name: said[name] for name in facts}, facts)
                self.assertEqual(4 in self.stored(), code == 0 and choice != "skip")
                self.assertEqual(len(self.stored()), facts["generated"])

    def test_lengths_never_mix(self) -> None:
        self.make_items()
        self.execute("ALTER TABLE items RENAME COLUMN embedding TO declared")
        self.execute(f"ALTER TABLE items ADD COLUMN embedding {self.db.any_vector}")
        self.succeed(*COLUMN, "--limit", 4)
        before = self.stored()
        self.ollama.configure(models={"nomic-embed-text": {"dimensions": 16}})
        for flags in ((), ("--force", "--limit", 2), ("--force", "--where", "id > 2"), ("--dry-run",)):
            self.refuse(3, *COLUMN, *flags, words=["8 dimensions", "16 dimensions"])
        self.assertEqual(self.stored(), before)
        # All are replaced, but for one that fails.
        self.ollama.configure(refuse=[{"contains": "Item 2", "status": 400, "error": "no"}])
        self.assertEqual(self.run_program(*COLUMN, "--force").tally, (9, 0, 1))
        self.assertEqual({len(vector) for vector in self.stored().values()}, {64})
        self.assertEqual(len(self.stored()), 9)

    def test_other_lengths_that_come_while_a_run_saves(self) -> None:
        self.make_items()
        self.execute("ALTER TABLE items RENAME COLUMN embedding TO declared")
        self.execute(f"ALTER TABLE items ADD COLUMN embedding {self.db.any_vector}")
        self.ollama.configure(hold=["Item"])
        process = self.start_program(*COLUMN)
        self.wait_for(self.asked, "a request")
        other = self.db.vector(blob("theirs", 16))
        self.execute(f"CREATE TABLE one (vector {self.db.any_vector})")
        self.execute("INSERT INTO one VALUES (?)", [(other,)])
        self.execute("UPDATE items SET embedding = (SELECT vector FROM one) WHERE id = 1")
        self.ollama.configure(hold=[])
        done = self.ended(process)
        self.assertEqual(done.code, 3)
        self.assertIn("16 dimensions", done.err)
        self.assertEqual(self.stored(), {1: blob("theirs", 16)})

    def make_trigger(self, timing: str, body: str, condition: str = "") -> None:
        """Have a trigger for changes of the column."""
        when = f"WHEN ({condition})" if condition else ""
        self.execute(f"CREATE TRIGGER t {timing} UPDATE OF embedding ON items FOR EACH ROW {when} BEGIN {body}; END")

    def refuse_some(self) -> None:
        """Have a trigger that refuses the rows 3 and 7."""
        self.make_trigger("BEFORE", "SELECT RAISE(ABORT, 'not this one')", "NEW.id IN (3, 7)")

    def test_triggers_fire(self) -> None:
        self.make_items()
        self.execute("CREATE TABLE changes (id INTEGER)")
        self.make_trigger("AFTER", "INSERT INTO changes VALUES (NEW.id)")
        self.assertEqual(self.succeed(*COLUMN).tally, (10, 0, 0))
        self.assertEqual(sorted(self.execute("SELECT id FROM changes")), [(key,) for key in range(1, 11)])

    def test_a_row_that_a_trigger_refuses_fails_alone(self) -> None:
        self.make_items()
        self.refuse_some()
        done = self.run_program(*COLUMN, "--json")
        facts = json.loads(done.out)
        self.assertEqual((done.code, facts["generated"], facts["failed"]), (1, 8, 2), done.err)
        self.assertRegex(str(facts["failures"]), "not this one")
        self.assertRegex(self.log(), r"item 7 failed: \w+ says: not this one")
        self.assert_complete(but=(3, 7))

    def test_quoted_names_and_text_keys(self) -> None:
        self.execute(
            'CREATE TABLE "My ""Shop""" ("the key" VARCHAR(30) PRIMARY KEY, "a name" TEXT, '
            f'"a ""vector""" {self.db.vector_type})'
        )
        keys = ["a", "b'c", 'd"e', "%s", "$1", "ü", "0", " 1"]
        self.execute('INSERT INTO "My ""Shop""" ("the key", "a name") VALUES (?, ?)', [(key, key) for key in keys])
        flags = ("--table", 'My "Shop"', "--columns", "a name", "--out-column", 'a "vector"')
        self.assertEqual(self.succeed(*flags).tally, (8, 0, 0))
        self.execute('CREATE VIEW seen AS SELECT "the key" AS id, "a ""vector""" AS embedding FROM "My ""Shop"""')
        self.assertEqual(self.db.vectors("seen", "id"), {key: blob(f"A name: {key}".rstrip()) for key in keys})
        self.assertEqual(self.succeed(*flags).tally, (0, 8, 0))

    def test_a_generated_column_as_text(self) -> None:
        self.execute(
            "CREATE TABLE items (id INTEGER PRIMARY KEY, a TEXT, name TEXT GENERATED ALWAYS AS ('Item ' || a) STORED, "
            f"embedding {self.db.vector_type})"
        )
        self.execute("INSERT INTO items (id, a) VALUES (?, ?)", [(key, str(key)) for key in range(1, 6)])
        self.assertEqual(self.succeed(*COLUMN).tally, (5, 0, 0))
        self.assert_complete()


class ColumnOnPostgres(OnPostgres, Column):
    """The same on Postgres."""

    table = '"public"."items"'

    def make_trigger(self, timing: str, body: str, condition: str = "") -> None:
        done = f"IF {condition or 'true'} THEN {body}; END IF; RETURN NEW"
        self.execute(f"CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {done}; END $$")
        self.execute(f"CREATE TRIGGER t {timing} UPDATE OF embedding ON items FOR EACH ROW EXECUTE FUNCTION f()")

    def refuse_some(self) -> None:
        self.make_trigger("BEFORE", "RAISE EXCEPTION 'not this one'", "NEW.id IN (3, 7)")


class Neighbours(ColumnCase):
    """Other programs that use the table at the same time, and runs that are killed."""

    trigger = """
        CREATE TRIGGER items_changed AFTER UPDATE OF name ON items
        BEGIN UPDATE items SET embedding = NULL WHERE id = NEW.id; END
    """

    def setUp(self) -> None:
        super().setUp()
        self.make_items(ROWS)
        self.ollama.configure(seconds_per_text=0.001, slots=1)

    def test_texts_that_change_all_the_time(self) -> None:
        self.execute(self.trigger)
        self.ollama.configure(hold=["Item"])
        process, changes = self.start_program(*COLUMN, "--batch-size", 10, UNSAVED_SECONDS=0.05), 0
        self.wait_for(self.asked, "texts that are asked for")
        while process.poll() is None:
            self.execute(f"UPDATE items SET name = 'New {changes}' WHERE id = {random.randint(1, ROWS)}")
            changes += 1
            if changes == 6:  # however quick the rest is
                self.ollama.configure(hold=[])
        done = self.ended(process)
        self.assertEqual((done.code, done.err), (0, ""))
        expected = self.expected()
        self.assertGreaterEqual(changes, 6)
        # With the trigger, no row may have the vector of a text that it does not have.
        self.assertEqual({key: vector for key, vector in self.stored().items() if vector != expected[key]}, {})
        self.succeed(*COLUMN)
        self.assert_complete()

    def test_runs_that_are_killed(self) -> None:
        for part in range(1, 11) if FULL else (6,):
            process = self.start_program(*COLUMN, "--batch-size", 10, UNSAVED_SECONDS=0.05)
            self.wait_for(lambda part=part: len(self.stored()) >= part * ROWS // 12, "progress")  # type: ignore[misc]
            self.end(process)
            expected = self.expected()
            self.assertEqual([key for key, vector in self.stored().items() if vector != expected[key]], [])
        self.succeed(*COLUMN)
        self.assert_complete()


class NeighboursOnPostgres(OnPostgres, Neighbours):
    """The same on Postgres."""

    trigger = """
        CREATE FUNCTION clear() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN NEW.embedding := NULL; RETURN NEW; END $$;
        CREATE TRIGGER items_changed BEFORE UPDATE OF name ON items FOR EACH ROW EXECUTE FUNCTION clear()
    """


class ColumnOfPostgres(OnPostgres, ColumnCase):
    """What only Postgres has."""

    @contextlib.contextmanager
    def locked(self, condition: str) -> Iterator[Any]:
        """Hold rows in a transaction; gives its connection."""
        with self.db.psycopg.connect(self.db.url) as application:
            application.execute(f"UPDATE items SET price = 6 WHERE {condition}")
            yield application
            application.rollback()

    def test_rows_that_others_have_locked_come_again(self) -> None:
        self.make_items(100)
        with self.locked("id % 10 = 3") as application:
            process = self.start_program(*COLUMN)
            self.wait_for(lambda: len(self.stored()) == 90, "the other rows")
            self.assertIsNone(process.poll())
            application.execute("UPDATE items SET name = 'New' WHERE id = 33")
            application.commit()
        done = self.ended(process)
        self.assertEqual((done.code, done.err, done.tally), (0, "", (99, 0, 0)))
        self.assert_complete(but=[33])
        self.assertEqual(len(self.asked()), 100)

    def test_a_lock_that_is_held_for_too_long_ends_the_run(self) -> None:
        self.make_items(100)
        for more in ((), ("--limit", 100)):
            with self.locked("id > 97"), mock.patch("embedgen.ROW_LOCK_SECONDS", 0.5):
                done = self.run_program(*COLUMN, *more)
            self.assertEqual(done.code, 3)
            self.assertRegex(done.err, "another transaction holds rows for too long.*: 3 items")
            self.assert_complete(but=(98, 99, 100))
        self.assertEqual(self.succeed(*COLUMN).tally, (3, 97, 0))
        self.assert_complete()

    def test_who_has_given_up_on_a_lock_does_not_wait_for_it_once_more(self) -> None:
        self.make_items(600)
        constants = mock.patch.multiple("embedgen", ROW_LOCK_SECONDS=0, UNSAVED_SECONDS=1e6)
        save = mock.patch("embedgen.Claims.save", autospec=True, side_effect=embedgen.Claims.save)
        with self.locked("true"), constants, save as saves:
            done = self.run_program(*COLUMN)
        self.assertEqual(done.code, 3)
        self.assertRegex(done.err, "another transaction holds rows for too long.*: 600 items")
        tried = [row.key for call in saves.call_args_list for row, *_ in call.args[1]]
        self.assertGreaterEqual(len(tried), 500)
        self.assertEqual(len(set(tried)), len(tried))

    def test_what_is_saved_counts_though_another_part_of_its_batch_ends_the_run(self) -> None:
        self.make_items()
        self.execute("""CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.id = 3 THEN RAISE EXCEPTION 'not this one'; END IF;
            IF NEW.id = 9 AND EXISTS (SELECT 1 FROM items WHERE embedding IS NOT NULL)
            THEN RAISE EXCEPTION 'full' USING ERRCODE = 'disk_full'; END IF;
            RETURN NEW; END $$""")
        self.execute("CREATE TRIGGER t BEFORE UPDATE ON items FOR EACH ROW EXECUTE FUNCTION f()")
        done = self.run_program(*COLUMN)
        self.assertEqual((done.code, done.tally), (3, (4, 0, 1)), done.err)
        self.assertRegex(done.err, "no room.*Left to do: 5 items")
        self.assert_complete(but=(3, 6, 7, 8, 9, 10))

    def test_a_table_that_is_locked_as_a_whole_holds_the_run_up(self) -> None:
        self.make_items(600)
        with self.locked("true") as application:
            process, looks = self.start_program(*COLUMN, "--batch-size", 10, UNSAVED_ROWS=20), [0]

            def stands_still() -> bool:
                looks.append(len(self.asked()))
                return looks[-1] >= 20 and len(set(looks[-20:])) == 1

            self.wait_for(stands_still, "it has asked for something, and asks for nothing more")
            self.assertLess(looks[-1], 600)
            application.rollback()
        self.assertEqual(self.ended(process).tally, (600, 0, 0))
        self.assert_complete()

    def test_a_lock_for_a_reference_to_a_row_is_none(self) -> None:
        self.make_items()
        self.execute("CREATE TABLE orders (item integer REFERENCES items)")
        with self.db.psycopg.connect(self.db.url) as application:
            application.execute("INSERT INTO orders VALUES (3)")
            self.assertEqual(self.succeed(*COLUMN).tally, (10, 0, 0))

    def test_four_machines(self) -> None:
        self.make_items(ROWS)
        servers = [shared_double(number) for number in range(4)]
        for server in servers:
            server.reset()
            server.configure(seconds_per_text=0.002, slots=1, hold=["Item"])
        processes = [
            self.start_program("--engine", ENGINES[number % 2], "--server", server.url, *COLUMN, CLAIM_SECONDS=300.0)
            for number, server in enumerate(servers)
        ]
        for server in servers:
            self.wait_for(lambda server=server: "Item" in " ".join(server.texts()), "rows for each")
        for server in servers:
            server.configure(hold=[])
        done = [self.ended(process) for process in processes]
        self.assertEqual([(one.code, one.err, sum(one.tally)) for one in done], [(0, "", ROWS)] * 4)
        self.assertEqual(sum(one.tally[0] for one in done), ROWS)
        self.assert_complete()
        asked = [text for server in servers for text in server.texts() if "Item" in text]
        self.assertLessEqual(len(asked), ROWS * 1.01)
        self.assertEqual(self.execute("SELECT * FROM items_embedding_claims"), [])

    def test_names_that_claims_have_too(self) -> None:
        self.execute("CREATE TABLE items_claims (amount integer)")
        self.execute(f"CREATE TABLE items (machine integer PRIMARY KEY, name text, embedding {self.db.vector_type})")
        self.execute("INSERT INTO items VALUES (1, 'Item')")
        self.assertEqual(self.succeed(*COLUMN).tally, (1, 0, 0))
        self.assertEqual(self.execute("SELECT * FROM items_claims"), [])

    def test_uuid_keys(self) -> None:
        self.execute(f"CREATE TABLE items (id uuid PRIMARY KEY, name text, embedding {self.db.vector_type})")
        rows = [(uuid.UUID(int=key), f"Item {key}") for key in range(50)]
        self.execute("INSERT INTO items (id, name) VALUES (?, ?)", rows)
        self.assertEqual(self.succeed(*COLUMN).tally, (50, 0, 0))
        self.assert_complete()

    def test_partitions(self) -> None:
        columns = f"id bigint, name text, embedding {self.db.vector_type}"
        for key in ("PRIMARY KEY (id)", "UNIQUE (name, id)"):
            with self.subTest(key):
                self.wipe()
                self.execute(f"CREATE TABLE items ({columns}, {key}) PARTITION BY HASH (id)")
                for part in range(3):
                    self.execute(
                        f"CREATE TABLE items_{part} PARTITION OF items FOR VALUES WITH (MODULUS 3, REMAINDER {part})"
                    )
                self.execute("INSERT INTO items SELECT n, 'Item ' || n FROM generate_series(1, 50) AS n")
                self.assertEqual(self.succeed(*COLUMN).tally, (50, 0, 0))
                self.assert_complete()
        self.execute("UPDATE items SET embedding = NULL")
        self.refuse(2, *COLUMN, "--index", words=["items", "partitioned", "run a plain CREATE INDEX"])
        self.assertEqual(self.execute("SELECT count(embedding) FROM items"), [(0,)])  # not only after all the work

    def test_a_role_that_may_update_the_column_alone(self) -> None:
        self.make_items()
        with self.db.role("GRANT SELECT (id, name, embedding), UPDATE (embedding) ON items TO {role}") as url:
            self.assertEqual(self.succeed(*COLUMN, "--database", url, "--where", "id > 3").tally, (7, 0, 0))
            self.assertEqual(self.succeed(*COLUMN, "--database", url).tally, (3, 7, 0))
            self.execute(f"REVOKE UPDATE (embedding) ON items FROM {self.db.name}_role")
            self.refuse(3, *COLUMN, "--database", url, "--force", words=["permission denied", "items"])
        self.assert_complete()

    def test_row_level_security(self) -> None:
        self.make_items()
        self.execute("ALTER TABLE items ENABLE ROW LEVEL SECURITY")
        self.execute("CREATE POLICY even ON items USING (id % 2 = 0)")
        with self.db.role("GRANT SELECT, UPDATE ON items TO {role}") as url:  # which sees the half of them
            self.refuse(3, *COLUMN, "--database", url, words=["row-level security", "items"])
        self.assertEqual(self.stored(), {})
        self.assertEqual(self.succeed(*COLUMN).tally, (10, 0, 0))
        self.assert_complete()

    def test_the_index(self) -> None:
        self.make_items()
        self.assertEqual(self.succeed(*COLUMN, "--index").tally, (10, 0, 0))
        self.assertEqual(self.succeed(*COLUMN, "--index").tally, (0, 10, 0))
        found = self.execute("SELECT indexdef FROM pg_indexes WHERE tablename = 'items' AND indexdef LIKE '%hnsw%'")
        self.assertRegex(str(found), r"\(embedding (extensions\.)?vector_cosine_ops\)")
        self.assertEqual(len(found), 1)

    def test_half_precision(self) -> None:
        self.make_items()
        self.execute("ALTER TABLE items ALTER COLUMN embedding TYPE halfvec(8)")
        self.assertEqual(self.succeed(*COLUMN).tally, (10, 0, 0))
        self.assertEqual(self.execute("SELECT count(embedding) FROM items"), [(10,)])

    def test_a_declared_model(self) -> None:
        self.make_items()
        [declare] = re.findall("COMMENT .*;", self.succeed(*COLUMN, "--status").out)
        self.assertEqual(declare, 'COMMENT ON COLUMN "public"."items"."embedding" IS \'embedgen: nomic-embed-text\';')
        self.execute(declare)
        self.assertNotIn("COMMENT", self.succeed(*COLUMN, "--status").out)
        self.succeed(*COLUMN, "--limit", 4)
        for flags in ((), ("--force",), ("--dry-run",), ("--limit", 1)):
            words = ["all-minilm", '"nomic-embed-text"', "--model nomic-embed-text"]
            self.refuse(2, *COLUMN, "--model", "all-minilm", *flags, words=words)
        self.refuse(2, *COLUMN, "--model", "all-minilm", "--search", "x", words=['"nomic-embed-text"', '"all-minilm"'])
        self.assertEqual(self.succeed(*COLUMN).tally, (6, 4, 0))
        self.assert_complete()
        self.execute("COMMENT ON COLUMN items.embedding IS 'What it means. embedgen: all-minilm:latest, since May'")
        self.refuse(2, *COLUMN, words=["--model all-minilm,"])
        facts = json.loads(self.succeed(*COLUMN, "--status", "--json").out)
        self.assertEqual((facts["model"], facts["embedded"]), ("all-minilm", 10))
        self.assertIn("by all-minilm", self.succeed(*COLUMN, "--similar", 3).out)

    def test_a_run_that_only_reads_creates_no_extension(self) -> None:
        self.execute("CREATE TABLE items (id bigint PRIMARY KEY, name text)")
        self.execute("INSERT INTO items VALUES (1, 'Item')")
        self.execute("DROP EXTENSION vector CASCADE")
        self.addCleanup(self.execute, "CREATE EXTENSION IF NOT EXISTS vector SCHEMA extensions")
        self.refuse(3, *COLUMN, "--dry-run", words=["CREATE EXTENSION vector;"])
