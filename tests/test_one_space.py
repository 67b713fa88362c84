"""One target holds one vector space: model, version and dimensions fit the whole target, whatever the source shows."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any, ClassVar

from tests.databases import Postgres
from tests.ollama import blob
from tests.support import FULL, Case, OnPostgres, another_double

NOMIC, MINI = "nomic-embed-text", "all-minilm"
Content = list[tuple[Any, ...]]


class SpaceCase(Case):
    """Ten films, and a view of the first three of them."""

    engine: ClassVar[str] = "async"

    def setUp(self) -> None:
        super().setUp()
        self.make_movies(10)
        self.execute("CREATE VIEW shown AS SELECT * FROM movies WHERE id <= 3")

    def arguments(self, *given: object, **constants: object) -> list[str]:
        return super().arguments("--engine", self.engine, *given, **constants)

    def content(self, target: str = "movie_embeddings") -> Content:
        """Return all that a target holds."""
        return sorted(self.execute(f"SELECT * FROM {target}"), key=lambda row: int(row[0]))

    def models(self) -> dict[str, int]:
        """Return how many vectors the target has of each model."""
        return dict(self.execute("SELECT model, count(*) FROM movie_embeddings GROUP BY 1"))

    def refused(self, *given: object, codes: tuple[int, ...] = (2, 3), words: tuple[str, ...] = ()) -> str:
        """Run the program; it must be refused with one of these codes, for a reason, before the first row.

        A few rows may be embedded to be compared with what is stored for them.
        """
        before = len(self.ollama.texts())
        done = self.run_program(*given)
        self.assertIn(done.code, codes, (given, done.out, done.err))
        self.assertRegex(done.err, r"\Aerror: .*\n\Z")
        self.assertNotRegex(done.err, "fault of embedgen")
        for word in words:
            self.assertIn(word, done.err)
        self.assertLessEqual(len({text for text in self.ollama.texts()[before:] if "Film" in text}), 3, given)
        return done.err

    def their_target(self, dimensions: int, keys: range, declared: str = "") -> bytes:
        """Have a target that somebody else made, with one vector for some films; return that vector."""
        kind = declared or self.db.any_vector
        self.execute(f"CREATE TABLE theirs (movie_id INTEGER PRIMARY KEY, embedding {kind} NOT NULL)")
        vector = blob("theirs", dimensions)
        self.execute("INSERT INTO theirs VALUES (?, ?)", [(key, self.db.vector(vector)) for key in keys])
        return vector

    def lengths(self, target: str = "movie_embeddings") -> set[int]:
        """Return the lengths that vectors in a target have."""
        there = self.stored(target) if target in self.db.tables() else {}
        return {len(vector) // 4 for vector in there.values()}


class Space(SpaceCase):
    PARTS: ClassVar[tuple[tuple[object, ...], ...]] = (
        ("--table", "shown", "--target", "movie_embeddings", "--id", "id"),
        ("--table", "shown", "--target", "movie_embeddings", "--where", "id < 3"),
        ("--where", "id <= 3"),
        ("--limit", 3),
    )

    def test_another_model_is_refused_whatever_the_source_shows(self) -> None:
        self.succeed("--where", "id >= 4")
        before = self.content()
        for part in self.PARTS:
            for flags in ((), ("--limit", 2), ("--limit", 0), ("--dry-run",), ("--accept-drift",)):
                self.refused(*part, "--model", MINI, *flags, codes=(2,), words=(NOMIC, MINI, "--target"))
                self.assertEqual(self.content(), before)

    def test_the_same_model_goes_on_through_a_view(self) -> None:
        self.succeed("--where", "id >= 4")
        self.assertEqual(self.succeed(*self.PARTS[0]).tally, (3, 0, 0))
        self.assertEqual(self.succeed().tally, (0, 10, 0))
        self.assert_complete()

    def test_another_version_is_refused_whatever_the_source_shows(self) -> None:
        self.ollama.configure(models={NOMIC: {"digest": "sha256:aaaa"}})
        self.succeed("--where", "id >= 4")
        before = self.content()
        self.ollama.configure(models={NOMIC: {"digest": "sha256:bbbb", "seed": "other"}})
        for part in self.PARTS:
            for flags in ((), ("--dry-run",)):
                self.refused(*part, *flags, words=(NOMIC, "aaaa", "bbbb"))
                self.assertEqual(self.content(), before)

    def test_other_dimensions_are_refused_whatever_the_source_shows(self) -> None:
        self.succeed("--where", "id >= 4")
        before = self.content()
        self.ollama.configure(models={NOMIC: {"dimensions": 16}})
        for part in self.PARTS:
            self.refused(*part, words=("8", "16", "dimensions"))
            self.assertEqual(self.content(), before)

    def test_force_with_another_model_spares_what_its_source_does_not_show(self) -> None:
        self.succeed()
        before = self.content()
        for part in self.PARTS:
            self.refused(*part, "--force", "--model", MINI, codes=(2,), words=(NOMIC, MINI))
            self.assertEqual(self.content(), before)

    def test_force_with_another_version_spares_what_its_source_does_not_show(self) -> None:
        self.ollama.configure(models={NOMIC: {"digest": "sha256:aaaa"}})
        self.succeed()
        before = self.content()
        self.ollama.configure(models={NOMIC: {"digest": "sha256:bbbb", "seed": "other"}})
        for part in self.PARTS:
            self.refused(*part, "--force", words=(NOMIC,))
            self.assertEqual(self.content(), before)

    def test_force_with_other_dimensions_spares_what_its_source_does_not_show(self) -> None:
        self.succeed()
        before = self.content()
        self.ollama.configure(models={NOMIC: {"dimensions": 16}})
        for part in self.PARTS:
            self.refused(*part, "--force", words=("dimensions",))
            self.assertEqual(self.content(), before)

    def test_force_with_the_same_model_deletes_nothing(self) -> None:
        self.succeed()
        for part in self.PARTS:
            self.assertIn(self.run_program(*part, "--force").code, (0, 2))
            self.assert_complete()

    def test_force_through_a_view_of_everything_replaces_everything(self) -> None:
        self.succeed()
        self.execute("CREATE VIEW everything AS SELECT * FROM movies")
        flags = ("--table", "everything", "--target", "movie_embeddings", "--id", "id")
        self.assertEqual(self.succeed(*flags, "--force", "--model", MINI).tally, (10, 0, 0))
        self.assertEqual(self.models(), {MINI: 10})

    def test_one_address_with_two_deployments(self) -> None:
        self.ollama.configure(deployments=[{"dimensions": 8}, {"dimensions": 16}], network=0.02)
        done = self.run_program("--concurrent", 4, "--batch-size", 1)
        self.assertEqual(done.code, 3, done.out)
        self.assertRegex(done.err, r"\Aerror: .*\bdimensions\b.*\n\Z")
        self.assertRegex(done.err, r"\b8\b.*\b16\b|\b16\b.*\b8\b")
        stored = self.stored() if "movie_embeddings" in self.db.tables() else {}
        expected = self.expected()
        self.assertEqual(stored, {key: expected[key] for key in stored})

    def test_one_address_with_two_deployments_and_vectors_stored(self) -> None:
        self.succeed("--limit", 2)
        self.test_one_address_with_two_deployments()
        self.assertGreaterEqual(len(self.stored()), 2)

    def test_vectors_of_somebody_else_decide_the_dimensions(self) -> None:
        self.their_target(768, range(1, 2))
        before = self.content("theirs")
        for part in ((), ("--where", "id > 5"), ("--table", "shown", "--id", "id", "--where", "id = 3")):
            for server in ("hash:", self.ollama.url):
                for flags in ((), ("--dry-run",)):
                    words = ("768", "256" if server == "hash:" else "8", "dimensions")
                    self.refused(*part, *flags, "--target", "theirs", "--server", server, words=words)
                    self.assertEqual(self.content("theirs"), before)

    def test_a_limit_of_none_changes_nothing(self) -> None:
        self.succeed()
        before = self.content()
        for flags in (("--model", MINI), ("--force",), ("--force", "--model", MINI)):
            for source in ((), self.PARTS[0]):
                done = self.run_program(*source, *flags, "--limit", 0)
                self.assertIn(done.code, (0, 2))
                self.assertEqual(self.content(), before)

    def test_a_limit_of_none_decides_nothing(self) -> None:
        self.succeed("--limit", 0)
        self.ollama.configure(models={NOMIC: {"dimensions": 16}})
        self.assertEqual(self.succeed().tally, (10, 0, 0))
        self.assertEqual(self.lengths(), {16})

    def with_two_servers(self, digest: str) -> None:
        """Run with two servers that differ in nothing but the dimensions; there is room in the target for one kind."""
        self.ollama.configure(models={NOMIC: {"digest": digest}})
        other = another_double(models={NOMIC: {"digest": digest, "dimensions": 16}})
        done = self.run_program("--server", self.ollama.url, "--server", other.url, "--batch-size", 1)
        self.assertIn(done.code, (0, 3), done.err)  # without the second one, or not at all
        self.assertRegex(done.err, r"\A(warning|error): .*\bdimensions\b")
        self.assertLessEqual(len(self.lengths()), 1)

    def test_two_servers_of_different_dimensions(self) -> None:
        self.with_two_servers("sha256:aaaa")

    def test_two_servers_of_different_dimensions_that_tell_no_digest(self) -> None:
        self.with_two_servers("")

    def in_the_middle(self, change: Callable[[], object]) -> Any:
        """Have a run under way, with a vector of theirs in its target, change something, and return how it ended."""
        self.their_target(8, range(1, 2))
        self.ollama.configure(hold=["Film 7"])
        process = self.start_program("--target", "theirs", "--concurrent", 1, "--batch-size", 1)
        self.wait_for(lambda: [text for text in self.ollama.texts() if "Film 7" in text], "the request that is held")
        change()
        self.ollama.configure(hold=[])
        return self.ended(process)

    def test_a_target_emptied_in_the_middle(self) -> None:
        done = self.in_the_middle(lambda: self.execute("DELETE FROM theirs"))
        self.assertEqual((done.code, done.err), (0, ""))
        expected, stored = self.expected(), self.stored("theirs")
        self.assertEqual(stored, {key: expected[key] for key in stored})
        self.assertLessEqual({7, 8, 9, 10}, set(stored))

    def test_a_target_filled_anew_in_the_middle_with_other_dimensions(self) -> None:
        def fill() -> None:
            self.execute("DELETE FROM theirs")
            self.execute("INSERT INTO theirs VALUES (?, ?)", [(1, self.db.vector(blob("new", 16)))])

        done = self.in_the_middle(fill)
        self.assertEqual(done.code, 3, done.out)
        self.assertRegex(done.err, r"\Aerror: .*\bdimensions\b.*\n\Z")
        self.assertEqual(self.stored("theirs"), {1: blob("new", 16)})


@unittest.skipUnless(FULL, "takes seconds; the other engine is tested in every run")
class SpaceByProcesses(Space):
    """The same with worker processes."""

    engine = "process"


class SpaceOnPostgres(OnPostgres, Space):
    """The same on Postgres, whose columns have dimensions, and whose roles may see a part of the rows."""

    db: Postgres

    def test_a_column_declared_with_dimensions_is_enough(self) -> None:
        for kind in ("vector", "halfvec"):
            self.their_target(16, range(0), f"{kind}(16)")
            for server, given in (("hash:", "256"), (self.ollama.url, "8")):
                for flags in ((), ("--dry-run",), ("--force",), ("--limit", 1)):
                    words = ("16", given, "dimensions")
                    self.refused("--target", "theirs", "--server", server, *flags, words=words)
            self.assertEqual(self.content("theirs"), [])
            self.ollama.configure(models={NOMIC: {"dimensions": 16}})
            self.assertEqual(self.succeed("--target", "theirs").tally, (10, 0, 0))
            self.ollama.configure(models={NOMIC: {}})
            self.execute("DROP TABLE theirs")

    GRANTS = (
        "GRANT CREATE ON SCHEMA public TO {role}",
        "GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
    )

    def test_a_role_that_sees_a_part_of_the_target(self) -> None:
        self.succeed("--where", "id > 3")
        before = self.content()
        with self.db.role(*self.GRANTS) as url:
            self.execute("ALTER TABLE movie_embeddings ENABLE ROW LEVEL SECURITY")
            for seen in ("false", "movie_id <= 3"):
                self.execute(f"CREATE POLICY part ON movie_embeddings USING ({seen}) WITH CHECK (true)")
                for flags in (("--model", MINI), ("--model", MINI, "--force"), ("--server", "hash:")):
                    for part in (("--where", "id <= 3"), ()):
                        said = self.refused("--database", url, *flags, *part)
                        self.assertRegex(said, r"(?i)row.level security|policy")  # nothing that it may read says why
                        self.assertEqual(self.content(), before)
                self.execute("DROP POLICY part ON movie_embeddings")

    def test_a_role_that_sees_a_part_of_the_source(self) -> None:
        self.succeed()
        before = self.content()
        with self.db.role(*self.GRANTS) as url:
            self.execute("ALTER TABLE movies ENABLE ROW LEVEL SECURITY")
            self.execute("CREATE POLICY part ON movies USING (id <= 3)")
            self.refused("--database", url, "--model", MINI, "--force", codes=(2, 3))
            self.assertEqual(self.content(), before)


class SpaceOnPostgresByProcesses(SpaceOnPostgres):
    """The same with worker processes."""

    engine = "process"
