"""Several servers that share the work: who gets what, and what happens when one of them goes."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import unittest
from types import SimpleNamespace
from typing import Any
from unittest import mock

import embedgen
from embedgen import Batch, Exchange, Scheduler, ServerAway, ServerProfile, ServerState, Stop
from tests.ollama import blob
from tests.simulation import Slots, simulate_fleet
from tests.support import SLOW_ENGINES, Case, another_double, with_engines

NAN = "embedding contains NaN or Inf values"
RATES = (50, 50, 100, 200)


def four(away: tuple[float, float] = (0.0, 0.0)) -> list[Slots]:
    """Return servers of these speeds, the fastest of which is away for a while."""
    return [Slots(1, 1 / rate, away=away if rate == max(RATES) else (0.0, 0.0)) for rate in RATES]


class ServersInVirtualTime(unittest.TestCase):
    def check(self, servers: list[Slots], rows: int, share: float) -> Scheduler:
        """All rows must be embedded, once each, in so much of what the servers could have done."""
        run = simulate_fleet(servers, rows)
        self.assertEqual(sorted(run.embedded), list(range(rows)))
        self.assertGreaterEqual(run.share(servers), share)
        return run.scheduler

    def test_four_servers_of_three_speeds(self) -> None:
        for rows in (400, 2000, 4000, 20_000):
            with self.subTest(rows=rows):
                scheduler = self.check(four(), rows, 0.97)
                for server, rate in zip(scheduler.servers, RATES):
                    self.assertAlmostEqual(server.embedded / rows, rate / sum(RATES), delta=0.02)

    def test_the_fastest_is_killed_and_started_again(self) -> None:
        for away in ((1.0, 3.0), (3.0, 5.0), (4.2, 4.7), (2.0, 7.0)):
            with self.subTest(away=away):
                self.check(four(away), 4000, 0.95)

    def test_a_slow_server_does_not_hold_up_a_fast_one(self) -> None:
        self.check([Slots(1, 0.35), Slots(1, 3.0)], 60, 0.95)
        self.check([Slots(1, 0.005), Slots(1, 3.0)], 2000, 0.95)
        self.check([Slots(4, 0.02), Slots(1, 0.35)], 3000, 0.97)

    def test_a_fixed_number_in_flight_is_that_of_all_servers_together(self) -> None:
        for most in (1, 3, 10):
            scheduler = simulate_fleet(four(), 400, most).scheduler
            self.assertGreaterEqual(sum(server.pace.in_flight for server in scheduler.servers), most)
            in_flight = 0
            while choice := scheduler.choose(lambda: 1000):
                scheduler.launch(choice[0], [embedgen.Row(0, "", b"")] * choice[1])
                in_flight += 1
            self.assertEqual(in_flight, most)


ROWS = [embedgen.Row(key, f"text {key}", b"") for key in range(8)]


class SchedulerByHand(unittest.TestCase):
    def scheduler(self, count: int, *rates: float, accept_drift: bool = False) -> Scheduler:
        """Return a scheduler of servers, for some of which the texts/s are known."""
        protocols: list[Any] = [SimpleNamespace(address=f"server {index}", model="m") for index in range(count)]
        settings: Any = SimpleNamespace(
            concurrent=2 * count, batch_size=8, timeout=300.0, accept_drift=accept_drift, engine="async"
        )
        scheduler = Scheduler(settings, protocols)
        for server, rate in zip(scheduler.servers, rates):
            server.rate = rate
        return scheduler

    def test_one_server_gets_what_its_pace_says_to_the_last_row(self) -> None:
        scheduler = self.scheduler(1, 10.0)
        for _ in range(2):
            self.assertEqual(scheduler.choose(lambda: 3), (scheduler.servers[0], 8))
            scheduler.launch(scheduler.servers[0], ROWS)
        self.assertIsNone(scheduler.choose(lambda: 3))

    def test_a_server_that_is_not_known_is_tried_first_and_with_little(self) -> None:
        scheduler = self.scheduler(2, 100.0)
        self.assertEqual(scheduler.choose(lambda: 1000), (scheduler.servers[1], 2))

    def test_near_the_end_a_slow_server_gets_nothing_that_a_fast_one_has_done_before(self) -> None:
        scheduler = self.scheduler(2, 100.0, 1.0)
        scheduler.launch(scheduler.servers[0], ROWS)
        scheduler.launch(scheduler.servers[0], ROWS)
        self.assertIsNone(scheduler.choose(lambda: 24))  # which are a quarter of a second's work
        choice = scheduler.choose(lambda: 1000)
        assert choice
        self.assertIs(choice[0], scheduler.servers[1])

    def test_what_a_server_leaves_undone_goes_to_the_others_in_their_sizes(self) -> None:
        scheduler = self.scheduler(2, 10.0, 10.0)
        batch = scheduler.launch(scheduler.servers[0], ROWS)
        scheduler.land(batch)
        self.assertIn("server 0 is away", scheduler.lose(batch, ServerAway("refused"), 1.0))
        choice = scheduler.choose(lambda: 8)
        assert choice
        self.assertIs(choice[0], scheduler.servers[1])
        self.assertEqual(scheduler.returned, ROWS)

    def test_a_server_is_probed_less_and_less_often(self) -> None:
        scheduler = self.scheduler(2)
        scheduler.lose(Batch(scheduler.servers[0], [], True, ROWS), ServerAway("refused"), 0.0)
        now, probes = 0.0, []
        while now < 100:
            for question in scheduler.probes(now):
                probes.append(now)
                scheduler.lose(question, ServerAway("refused"), now)
            now += 0.05
        self.assertLess(len(probes), 60)
        self.assertLess(max(later - one for one, later in zip(probes, probes[1:])), 100 / 8 + 0.1)
        self.assertEqual(scheduler.probes(now), [])  # not before it is due
        news = scheduler.greet(scheduler.servers[0], ServerProfile(blob("x")), 100.0)
        self.assertEqual(news, "server 0 is back after 100.0 s")

    def test_the_run_is_given_up_when_all_have_been_away_for_long(self) -> None:
        scheduler = self.scheduler(2)
        scheduler.lose(Batch(scheduler.servers[0], [], True, ROWS), ServerAway("refused"), 0.0)
        self.assertIsNone(scheduler.given_up(1000.0))
        scheduler.lose(Batch(scheduler.servers[1], [], True, ROWS), ServerAway("refused"), 1000.0)
        self.assertIsNone(scheduler.given_up(1119.0))
        stop = scheduler.given_up(1121.0)
        assert stop
        self.assertIn("server 0 since 1121 s: refused; server 1 since 121 s: refused", stop.message)

    def test_waiting_as_long_as_it_is_asked_to_is_not_trying(self) -> None:
        scheduler = self.scheduler(2)
        for server in scheduler.servers:
            scheduler.lose(Batch(server, [], True, ROWS), ServerAway("busy", retry_after=300.0), 0.0)
        self.assertEqual(scheduler.probes(299.0), [])
        self.assertIsNone(scheduler.given_up(400.0))
        self.assertIsNotNone(scheduler.given_up(421.0))

    def test_a_server_of_no_use_is_not_asked_again(self) -> None:
        scheduler = self.scheduler(2)
        question = Batch(scheduler.servers[0], None, True)
        scheduler.lose(question, ServerAway("refused"), 0.0)
        self.assertIn("another model", scheduler.lose(question, Stop("server 0 has another model."), 1.0))
        self.assertEqual((scheduler.lose(question, ServerAway("refused"), 2.0), scheduler.probes(1000.0)), ("", []))

    def test_a_batch_that_every_server_leaves_undone_ends_the_run(self) -> None:
        scheduler, moves, away = self.scheduler(2), 0, ServerAway("crashed")
        while (batch := scheduler.launch(scheduler.servers[0], ROWS)).movable:
            embedgen.handle(scheduler, mock.Mock(), batch, away)
            moves += 1
        self.assertEqual(moves, 3)
        self.assertFalse(scheduler.launch(scheduler.servers[1], [ROWS[0], ROWS[0]._replace(key=99)]).movable)
        self.assertTrue(scheduler.launch(scheduler.servers[1], [ROWS[0]._replace(key=99)]).movable)
        with self.assertRaises(ServerAway):
            embedgen.handle(scheduler, mock.Mock(), batch, away)

    def test_what_comes_from_a_server_that_is_missed_is_embedded_by_others(self) -> None:
        scheduler = self.scheduler(2)
        first, second = (scheduler.launch(scheduler.servers[0], ROWS) for _ in range(2))
        answers: list[Any] = [embedgen.Embedding(blob("x"))] * 8
        run = mock.Mock()
        embedgen.handle(scheduler, run, first, ServerAway("refused"))
        [(_, news)] = [call.args for call in run.log_event.mock_calls]
        self.assertIn("is away", news)
        embedgen.handle(scheduler, run, second, answers)
        run.take.assert_not_called()
        self.assertEqual(scheduler.returned, ROWS * 2)

    def test_a_fault_of_the_database_is_not_the_servers(self) -> None:
        scheduler, run = self.scheduler(2), mock.Mock()
        run.take.side_effect = Stop("the database is away")
        answers: list[Any] = [embedgen.Embedding(blob("x"))] * 8
        with self.assertRaisesRegex(Stop, "the database is away"):
            embedgen.handle(scheduler, run, scheduler.launch(scheduler.servers[0], ROWS), answers)
        self.assertEqual((len(scheduler.up), scheduler.returned), (2, []))

    def test_servers_that_do_not_give_the_same_vectors_do_not_work_together(self) -> None:
        one, other = blob("x"), blob("y")
        for first, second, words in (
            (ServerProfile(one), ServerProfile(one), ""),
            (ServerProfile(one, "sha256:a"), ServerProfile(one, "sha256:a"), ""),
            (ServerProfile(one, "sha256:a"), ServerProfile(one), ""),  # it does not tell
            (
                ServerProfile(one, "sha256:a"),
                ServerProfile(one, "sha256:b"),
                r'another model "m" \(b\) than server 0 \(a\)',
            ),
            (ServerProfile(one), ServerProfile(other), "other vectors than server 0 .*cosine"),
            (ServerProfile(one), ServerProfile(blob("x", 16)), "16 and 8 dimensions"),
        ):
            scheduler = self.scheduler(3)
            scheduler.greet(scheduler.servers[0], first, 0.0)
            if not words:
                scheduler.greet(scheduler.servers[1], second, 0.0)
                continue
            for server in scheduler.servers[1:]:  # one that was refused is no reason to refuse others, or not to
                with self.assertRaisesRegex(Stop, words):
                    scheduler.greet(server, second, 0.0)
            scheduler.greet(scheduler.servers[1], first, 0.0)
            with self.assertRaisesRegex(Stop, words.replace("server 0", "it did before") if "cosine" in words else ""):
                scheduler.greet(scheduler.servers[0], second, 0.0)
        scheduler = self.scheduler(2, accept_drift=True)
        for server, vector in zip(scheduler.servers, (one, other)):
            scheduler.greet(server, ServerProfile(vector), 0.0)
        with self.assertRaises(Stop):
            scheduler.greet(scheduler.servers[1], ServerProfile(blob("x", 16)), 0.0)

    def test_limits_that_two_batches_find_at_one_time(self) -> None:
        server = self.scheduler(1).servers[0]
        for most in (10, 20):
            server.learn({"most_texts": most})
        self.assertEqual((server.profile.most_texts, server.pace.batch_size), (10, 8))
        for long_from in (100, 151):  # but a text that was taken shows that longer ones are
            server.learn({"long_from": long_from})
        self.assertEqual(server.profile.long_from, 151)

    def test_the_rate_follows_the_answers(self) -> None:
        server = self.scheduler(1).servers[0]
        server.observe(Exchange(8, 2.0, "ok"), 16)
        self.assertEqual(server.rate, 8.0)
        server.observe(Exchange(8, 9.0, "failed"), 16)
        server.observe(Exchange(8, 1.0, "ok"), 18)
        self.assertAlmostEqual(server.rate, 8.0 + (18.0 - 8.0) * ServerState.WEIGHT)
        self.assertEqual(server.embedded, 16)


class SeveralServers(Case):
    def setUp(self) -> None:
        super().setUp()
        self.other = another_double()
        self.two: tuple[object, ...] = ("--server", self.ollama.url, "--server", self.other.url)

    def both(self, **settings: Any) -> None:
        """Change settings of both servers."""
        self.ollama.configure(**settings)
        self.other.configure(**settings)

    def again(self, engine: str) -> tuple[object, ...]:
        """Begin anew, and return the flags for an engine."""
        self.wipe()
        shutil.rmtree(self.folder / "logs", ignore_errors=True)
        self.ollama.reset()
        self.other.reset()
        return (*self.two, "--engine", engine)

    def start(self, engine: str, path: str = "", **settings: Any) -> subprocess.Popen[bytes]:
        """Start a run over 60 rows, and wait until both servers are at work and do not answer."""
        self.again(engine)
        self.make_movies(60)
        self.both(hold=["Film"], **settings)
        flags = ("--server", self.ollama.url + path, "--server", self.other.url + path, "--engine", engine)
        process = self.start_program(*flags, GRACE=3600.0)
        for server in (self.ollama, self.other):
            self.wait_for(lambda server=server: "Film" in " ".join(server.texts()), "both at work")
        return process

    def lose(self, process: subprocess.Popen[bytes]) -> None:
        """Have one of the servers go away, and wait until it is missed."""
        self.other.away()
        self.wait_for(lambda: "is away" in self.log(), "it is missed")

    def return_as(self, words: str, **model: str) -> None:
        """Have the server come back with another version of the model, which is to be turned down."""
        self.other.configure(models={"nomic-embed-text": model})
        self.other.back()
        self.wait_for(lambda: words in self.log(), "it is turned down")

    def test_they_share_the_work(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start(engine)
                self.both(hold=[])
                self.assertEqual(self.ended(process).tally, (60, 0, 0))
                self.assert_complete()
                asked = [server.texts() for server in (self.ollama, self.other)]
                known = 2  # the known-good text, in decimals and base64
                self.assertEqual(sum(len(texts) - known for texts in asked), 60)
                for server, texts in zip((self.ollama, self.other), asked):
                    said = rf"{server.url}: {len(texts) - known} texts, [\d.]+ texts/s; at the end \d+ in flight"
                    self.assertRegex(self.log(), said)

    def test_each_is_asked_over_the_paths_that_it_has(self) -> None:
        lean, usual = "base64 over /v1/embeddings", "decimals over /api/embed"
        for engine in SLOW_ENGINES:
            for way in (lean, usual):
                with self.subTest(engine=engine, way=way):
                    flags = self.again(engine)
                    self.make_movies(60)
                    self.both(shuffle=0.01)
                    self.other.configure(lean=way == lean)
                    self.assertEqual(self.succeed(*flags, "--batch-size", 5, "--concurrent", 2).tally, (60, 0, 0))
                    self.assert_complete()
                    ways = [f"{self.ollama.url}: vectors come as {lean}", f"{self.other.url}: vectors come as {way}"]
                    self.assertEqual(sorted(re.findall(r"http\S*: vectors come as .*", self.log())), sorted(ways))
                    self.assertEqual([entry["path"] for entry in self.ollama.log()].count("/api/embed"), 1)

    def test_a_server_that_answers_with_another_models_name(self) -> None:
        names = ("bge-m3", "nomic-ai/Nomic-Embed-Text-v1.5", "nomic-embed-text:latest")
        for named, (engine, path) in itertools.product(names, with_engines(("", "/v1"))):
            with self.subTest(engine=engine, path=path, named=named):
                flags = ("--server", self.ollama.url + path, *self.again(engine)[-2:])
                self.make_movies(3)
                self.ollama.configure(named=named)
                done = self.run_program(*flags)
                self.assertEqual((done.code, done.tally), (0, (3, 0, 0)))
                said = f"{self.ollama.url + path} answers as the model 'bge-m3', not as 'nomic-embed-text'"
                self.assertEqual(done.err, f"warning: {said}\n" if named == "bge-m3" else "")
                self.assertEqual(self.log().count(f" - WARNING - {said}\n"), int(named == "bge-m3"))

    def test_one_server_alone_in_the_flags(self) -> None:
        self.make_movies(3)
        self.refuse(2, *self.two, "--server", self.ollama.url + "/", words=[self.ollama.url, "twice"])
        self.refuse(2, "--server", "hash:", "--server", self.ollama.url, words=["hash:"])
        self.refuse(2, "--server", self.ollama.url, "--server", " ", words=["is not a value"])
        self.refuse(2, *self.two, "--server", "ftp://x", words=["ftp://x"])

    def test_another_model_of_that_name(self) -> None:
        self.make_movies(3)
        for engine in SLOW_ENGINES:
            for name in ("nomic-embed-text", "nomic-embed-text:latest"):
                with self.subTest(engine=engine, name=name):
                    self.other.configure(models={"nomic-embed-text": {"digest": "sha256:" + "5" * 64}})
                    words = [self.ollama.url, self.other.url, '"nomic-embed-text"', "555555555555", "ollama pull"]
                    self.refuse(3, *self.two, "--engine", engine, "--model", name, words=words)
        self.assertEqual({*self.ollama.texts(), *self.other.texts()}, {embedgen.KNOWN_GOOD})
        self.other.configure(models={"bge-m3": {}})
        self.refuse(3, *self.two, words=[self.other.url, "ollama pull nomic-embed-text"])

    def test_one_is_away_from_the_beginning(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                flags = self.again(engine)
                self.make_movies(40)
                self.ollama.away()
                done = self.run_program(*flags)
                self.assertEqual((done.code, done.tally), (0, (40, 0, 0)))
                warning = f"{self.ollama.url} is away (connection refused); the other servers do its work\n"
                self.assertEqual(done.err, f"warning: {warning}")
                self.assertIn(warning, self.log())
                self.assert_complete()

    def test_none_is_there(self) -> None:
        self.make_movies(3)
        for engine in SLOW_ENGINES:
            flags = self.again(engine)
            self.make_movies(3)
            self.ollama.away()
            self.other.away()
            self.refuse(3, *flags, words=[self.ollama.url, self.other.url, "connection refused", "--server"])
            self.assertEqual(self.execute("SELECT name FROM sqlite_master"), [("movies",)])

    def test_one_goes_and_comes_back(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start(engine)
                self.lose(process)
                self.other.back()
                self.wait_for(lambda: "is back after" in self.log(), "it is found again")
                self.both(hold=[])
                done = self.ended(process)
                self.assertEqual((done.code, done.err), (0, ""))
                self.assert_complete()

    def test_one_goes_for_good(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start(engine)
                self.lose(process)
                self.ollama.configure(hold=[])
                done = self.ended(process)
                self.assertEqual(done.code, 0)
                said = rf"\Awarning: {self.other.url} did not do its share to the end: .*connection.*\n\Z"
                self.assertRegex(done.err, said)
                self.assert_complete()

    def test_one_comes_back_with_another_model(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start(engine)
                self.lose(process)
                self.return_as("has another model", digest="5" * 64, seed="another")
                self.ollama.configure(hold=[])
                done = self.ended(process)
                self.assertEqual(done.code, 0)
                self.assertRegex(done.err, rf"\Awarning: .*{self.other.url} has another model .*\n\Z")
                self.assert_complete()

    def test_one_without_a_digest_comes_back_with_other_vectors(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start(engine, "/v1", api=False)
                self.lose(process)
                self.return_as("gives other vectors than", seed="another")
                self.ollama.configure(hold=[])
                self.assertEqual(self.ended(process).code, 0)
                self.assert_complete()

    def test_one_that_is_busy_when_vectors_are_compared(self) -> None:
        for engine in SLOW_ENGINES:
            flags = self.again(engine)
            self.make_movies(20)
            self.succeed(*flags, "--limit", 10)
            self.other.configure(faults={"503": 1.0}, retry_after=30)
            done = self.run_program(*flags)
            self.assertEqual((done.code, done.tally), (0, (10, 10, 0)))
            self.assertRegex(done.err, rf"\Awarning: {self.other.url} is away .*\n\Z")

    def test_all_go(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                flags = self.again(engine)
                self.make_movies(100)
                self.both(next=["ok"] * 6, faults={"reset": 1.0})
                with mock.patch.multiple(embedgen, PATIENCE=0.1):
                    done = self.run_program(*flags, "--batch-size", 4)
                self.assertEqual(done.code, 3)
                self.assertRegex(
                    done.err, r"\Aerror: No server is left .*reset.*; .*reset.* Left to do: \d+ movies\.\n\Z"
                )
                self.assertIn(self.ollama.url, done.err)
                self.assertIn(self.other.url, done.err)
                self.assertEqual(done.tally, (len(self.stored()), 0, 0))
                self.assertGreater(len(self.stored()), 8)

    def test_a_bad_row_is_cornered_on_the_server_that_has_it(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                flags = self.again(engine)
                self.make_movies(60)
                self.both(refuse=[{"contains": "Film 33 ", "status": 400, "error": NAN}], shuffle=0.01)
                done = self.run_program(*flags)
                self.assertEqual((done.code, done.tally), (1, (59, 0, 1)))
                self.assert_complete(but=[33])

    def test_other_dimensions_from_one_of_them(self) -> None:
        for engine in SLOW_ENGINES:
            for settings in ({"show": False}, {"show": True}):
                with self.subTest(engine=engine, settings=settings):
                    flags = self.again(engine)
                    self.make_movies(60)
                    self.both(**settings)
                    same = "5" * 64  # the digest does not tell
                    self.ollama.configure(models={"nomic-embed-text": {"digest": same}})
                    self.other.configure(models={"nomic-embed-text": {"digest": same, "dimensions": 16}})
                    self.refuse(3, *flags, words=[self.other.url, "16 and 8 dimensions"])
                    self.assertEqual(self.execute("SELECT name FROM sqlite_master"), [("movies",)])

    @unittest.skipIf(os.name == "nt", "Windows has no such signals")
    def test_an_interrupt_while_one_is_away(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start(engine)
                self.lose(process)
                os.killpg(process.pid, signal.SIGINT)
                self.ollama.configure(hold=[])
                done = self.ended(process)
                self.assertEqual((done.code, done.err), (130, ""))
                self.other.back()
                self.both(hold=[])
                self.succeed(*self.two, "--engine", engine)
                self.assert_complete()


if __name__ == "__main__":
    unittest.main()
