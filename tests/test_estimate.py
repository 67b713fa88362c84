"""--dry-run says how long the run will take: within a quarter of what the server's pace makes of so many rows."""

from __future__ import annotations

import itertools
import json
import time
import unittest
from typing import Any
from unittest import mock

import embedgen
from tests.support import AUTHORITY, FULL, Case, OnPostgres, tls_double

ROWS = 20_000  # so many that what comes before the first of them is not worth mentioning


class EstimateCase(Case):
    """The server computes one text at a time, in the same time for each, so that no run can be quicker."""

    def setUp(self) -> None:
        super().setUp()
        self.make_movies(ROWS)

    def pace(self, rate: float, **more: float) -> None:
        """Have the server embed so many texts a second."""
        self.ollama.configure(slots=1, seconds_per_text=1 / rate, **more)

    def assert_honest(self, rate: float, rows: int = ROWS, *given: object) -> None:
        """The estimate must be near rows / rate; of some, since what a busy machine adds is measured, too."""
        found = []
        for _ in range(20):
            facts = json.loads(self.succeed("--dry-run", "--json", *given).out)
            self.assertEqual(facts["would_generate"], rows)
            found.append(facts["seconds"])
            if 0.75 * rows / rate <= facts["seconds"] <= 1.25 * rows / rate:
                return
        self.fail(f"{rows} rows at {rate} a second take {rows / rate:.1f} s; estimated were {found}")


class Paces(EstimateCase):
    """Whatever the server's pace, and however far away it is; the clock is moved by what the server would take."""

    SLOW, QUICK = 0.5, 12.0  # texts a second: a few are enough to measure the one, but not the other

    def pace(self, rate: float, connecting: float = 0.0, network: float = 0.0, load_seconds: float = 0.0) -> None:
        self.text, self.request, self.beginning = 1 / rate, network, connecting + load_seconds

    def assert_honest(self, *given: Any) -> None:
        real, embed, late = time.monotonic, embedgen.embed_on_all, [0.0]

        def embed_in_time(engine: embedgen.Engine, texts: list[str] | None, *given: Any) -> Any:
            answers = embed(engine, texts, *given)
            seconds = self.request + self.text * len(texts or "x") + self.beginning * (texts is None)
            late[0] += seconds
            return [(server, answer, took + seconds) for server, answer, took in answers]

        with (
            mock.patch.object(embedgen, "embed_on_all", embed_in_time),
            mock.patch("time.monotonic", lambda: real() + late[0]),
        ):
            super().assert_honest(*given)

    def test_a_server_of_each_pace(self) -> None:
        for rate in (self.SLOW, self.QUICK):
            with self.subTest(rate=rate):
                self.pace(rate)
                self.assert_honest(rate)

    def test_a_server_far_away(self) -> None:
        self.pace(self.QUICK, connecting=20.0)
        self.assert_honest(self.QUICK)

    def test_a_server_whose_answers_come_from_far(self) -> None:
        self.pace(self.QUICK, network=1.0)  # while one request is under way the next is computed
        self.assert_honest(self.QUICK)

    def test_a_model_that_must_be_loaded(self) -> None:
        self.pace(self.QUICK, load_seconds=20.0)
        self.assert_honest(self.QUICK)


class PacesOverOpenAI(Paces):
    """The same over the other protocol."""

    path = "/v1"


class FewRows(EstimateCase):
    """What is measured is not more than there is."""

    def test_no_server_is_measured_quicker_than_it_is(self) -> None:
        self.pace(50)
        for rows in (1, 3, 10):
            facts = json.loads(self.succeed("--dry-run", "--json", "--where", f"id <= {rows}").out)
            self.assertEqual(facts["would_generate"], rows)
            self.assertLess(facts["rate"], 60)

    def test_texts_that_are_too_long_take_their_time_too(self) -> None:
        self.pace(50)
        for on_long, most in (("cut", 60), ("split", 30)):  # two parts at least
            flags = ("--text", "{title}" + " word" * 3000, "--where", "id <= 20", "--on-long", on_long)
            facts = json.loads(self.succeed("--dry-run", "--json", *flags).out)
            self.assertLess(facts["rate"], most)


@unittest.skipUnless(FULL, "takes seconds; a clock moved by hand shows the same in every run")
class PacesInRealTime(EstimateCase):
    """By servers that take their time."""

    def test_each(self) -> None:
        for path, setting in itertools.product(("", "/v1"), ({}, {"connecting": 0.3}, {"network": 0.1})):
            with self.subTest(path=path, **setting):
                self.path = path
                self.ollama.reset()
                self.pace(50, **setting)
                self.assert_honest(50)


@unittest.skipUnless(FULL, "takes seconds; the pace alone is compared in every run")
class PaceOverTLS(EstimateCase):
    """Handshakes are not rows."""

    def test_a_server_behind_tls(self) -> None:
        server = tls_double("good", slots=1, seconds_per_text=1 / 50, connecting=0.2)
        for path in ("", "/v1"):
            with self.subTest(path=path):
                self.assert_honest(50, ROWS, "--server", server.url + path, "--ca-file", AUTHORITY)


@unittest.skipUnless(FULL, "takes seconds; the pace alone is compared in every run")
class Counted(EstimateCase):
    """Whatever is left to do."""

    def test_rows_that_are_done_and_a_limit(self) -> None:
        self.succeed("--where", "id <= 600")
        self.pace(50)
        self.assert_honest(50, ROWS - 600)
        self.assert_honest(50, 1000, "--limit", 1000)

    def test_the_run_takes_as_long(self) -> None:
        self.execute("DELETE FROM movies WHERE id > 60")
        self.pace(50, connecting=0.1)
        taken = json.loads(self.succeed("--json").out)["seconds"]
        self.assertGreaterEqual(taken, 1.0)  # of 1.2: the first texts are embedded before the clock starts
        self.assert_honest(50, 60, "--force")


class CountedOnPostgres(OnPostgres, Counted):
    """The same on Postgres."""


if __name__ == "__main__":
    unittest.main()
