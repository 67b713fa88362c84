"""Several servers that share the work: who gets what, and what happens when one of them goes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
import unittest
from types import SimpleNamespace
from typing import Any
from unittest import mock

import embedgen
from embedgen import Away, Batch, Exchange, Lane, Pace, Servers, Stop
from tests.ollama import Ollama
from tests.simulation import Slots, simulate_fleet
from tests.support import ENGINES, SLOW_ENGINES, Case
from tests.test_conversation import NAN, PROBE, REFUSED, TEXTS, VECTORS, Serve, error, good, script, wire

RATES = (50, 50, 100, 200)


def four(away: tuple[float, float] = (0.0, 0.0)) -> list[Slots]:
    """Return servers of these speeds, the fastest of which is away for a while."""
    return [Slots(1, 1 / rate, away=away if rate == max(RATES) else (0.0, 0.0)) for rate in RATES]


class ServersInVirtualTime(unittest.TestCase):
    def check(self, servers: list[Slots], rows: int, share: float) -> Servers:
        """All rows must be embedded, once each, in so much of what the servers could have done."""
        run = simulate_fleet(servers, rows)
        self.assertEqual(sorted(run.embedded), list(range(rows)))
        self.assertGreaterEqual(run.share(servers), share)
        return run.fleet

    def test_four_servers_of_three_speeds(self) -> None:
        for rows in (400, 2000, 4000, 20_000):
            with self.subTest(rows=rows):
                fleet = self.check(four(), rows, 0.97)
                for lane, rate in zip(fleet.lanes, RATES):
                    self.assertAlmostEqual(lane.embedded / rows, rate / sum(RATES), delta=0.02)

    def test_the_fastest_is_killed_and_started_again(self) -> None:
        for away in ((1.0, 3.0), (3.0, 5.0), (4.2, 4.7), (2.0, 7.0)):
            with self.subTest(away=away):
                fleet = self.check(four(away), 4000, 0.95)
                self.assertGreater(fleet.lanes[3].absent, away[1] - away[0] - 0.1)

    def test_a_slow_server_does_not_hold_up_a_fast_one(self) -> None:
        self.check([Slots(1, 0.35), Slots(1, 3.0)], 60, 0.95)
        self.check([Slots(1, 0.005), Slots(1, 3.0)], 2000, 0.95)
        self.check([Slots(4, 0.02), Slots(1, 0.35)], 3000, 0.97)

    def test_a_fixed_number_in_flight_is_that_of_all_servers_together(self) -> None:
        for most in (1, 3, 10):
            fleet = simulate_fleet(four(), 400, most).fleet
            self.assertGreaterEqual(sum(lane.pace.in_flight for lane in fleet.lanes), most)
            now, flying = 0.0, 0
            while choice := fleet.choose(lambda: 1000, now):
                fleet.launch(choice[0], [Any] * choice[1], 0, now)
                flying += 1
            self.assertEqual(flying, most)


def fleet_of(count: int, *rates: float) -> Servers:
    """Return a fleet of servers, for some of which the texts/s are known."""
    lanes = [Lane(place, SimpleNamespace(address=f"server {place}"), Pace(2, 8)) for place in range(count)]
    for lane, rate in zip(lanes, rates):
        lane.rate = rate
    return Servers(lanes)


ROWS: list[Any] = [None] * 8


class FleetByHand(unittest.TestCase):
    def test_one_server_gets_what_its_pace_says_to_the_last_row(self) -> None:
        fleet = fleet_of(1, 10.0)
        for _ in range(2):
            self.assertEqual(fleet.choose(lambda: 3, 0.0), (fleet.lanes[0], 8))
            fleet.launch(fleet.lanes[0], ROWS, 0, 0.0)
        self.assertIsNone(fleet.choose(lambda: 3, 0.0))

    def test_a_server_that_is_not_known_is_tried_first_and_with_little(self) -> None:
        fleet = fleet_of(2, 100.0)
        self.assertEqual(fleet.choose(lambda: 1000, 0.0), (fleet.lanes[1], 2))

    def test_near_the_end_a_slow_server_gets_nothing_that_a_fast_one_has_done_before(self) -> None:
        fleet = fleet_of(2, 100.0, 1.0)
        fleet.launch(fleet.lanes[0], ROWS, 0, 0.0)
        fleet.launch(fleet.lanes[0], ROWS, 0, 0.0)
        self.assertIsNone(fleet.choose(lambda: 8, 0.0))  # 24 texts are a quarter of a second's work
        choice = fleet.choose(lambda: 1000, 0.0)
        assert choice
        self.assertIs(choice[0], fleet.lanes[1])

    def test_near_the_end_nobody_waits_for_a_fast_server_that_is_late(self) -> None:
        fleet = fleet_of(2, 100.0, 1.0)
        fleet.launch(fleet.lanes[0], ROWS, 0, 0.0)
        fleet.launch(fleet.lanes[0], ROWS, 0, 0.0)
        self.assertIsNone(fleet.choose(lambda: 1, 0.2))
        choice = fleet.choose(lambda: 1, 5.0)
        assert choice
        self.assertIs(choice[0], fleet.lanes[1])

    def test_what_a_server_leaves_undone_goes_to_the_others_in_their_sizes(self) -> None:
        fleet = fleet_of(2, 10.0, 10.0)
        batch = fleet.launch(fleet.lanes[0], list(range(8)), 0, 0.0)  # type: ignore[arg-type]
        fleet.land(batch, 1.0)
        self.assertIn("server 0 is away", fleet.lose(batch, Away("refused"), 1.0))
        choice = fleet.choose(lambda: 8, 1.0)
        assert choice
        self.assertIs(choice[0], fleet.lanes[1])
        self.assertEqual(fleet.take_returned(5), ([0, 1, 2, 3, 4], 1))
        self.assertEqual(fleet.take_returned(5), ([5, 6, 7], 1))
        self.assertEqual(fleet.returned, [])

    def test_a_server_is_probed_less_and_less_often(self) -> None:
        fleet = fleet_of(2)
        fleet.lose(Batch(ROWS, 8, fleet.lanes[0]), Away("refused"), 0.0)
        now, probes = 0.0, []
        while now < 100:
            for question in fleet.to_probe(now):
                probes.append(now)
                fleet.lose(question, Away("refused"), now)
            now += 0.05
        self.assertLess(len(probes), 60)
        self.assertLess(max(later - one for one, later in zip(probes, probes[1:])), 100 / 8 + 0.1)
        self.assertEqual(fleet.to_probe(now), [])  # not before it is due
        self.assertEqual(fleet.welcome(fleet.lanes[0], 100.0), "server 0 is back after 100.0 s")

    def test_the_run_is_given_up_when_all_have_been_away_for_long(self) -> None:
        fleet = fleet_of(2)
        fleet.lose(Batch(ROWS, 8, fleet.lanes[0]), Away("refused"), 0.0)
        self.assertIsNone(fleet.given_up(1000.0))
        fleet.lose(Batch(ROWS, 8, fleet.lanes[1]), Away("refused"), 1000.0)
        self.assertIsNone(fleet.given_up(1119.0))
        stop = fleet.given_up(1121.0)
        assert stop
        self.assertIn("server 0 since 1121 s: refused; server 1 since 121 s: refused", stop.message)

    def test_waiting_as_long_as_it_is_asked_to_is_not_trying(self) -> None:
        fleet = fleet_of(2)
        busy = Away("busy")
        busy.wait = 300.0
        for lane in fleet.lanes:
            fleet.lose(Batch(ROWS, 8, lane), busy, 0.0)
        self.assertEqual(fleet.to_probe(299.0), [])
        self.assertIsNone(fleet.given_up(400.0))
        self.assertIsNotNone(fleet.given_up(421.0))

    def test_a_server_of_no_use_is_not_asked_again(self) -> None:
        fleet = fleet_of(2)
        question = Batch([], 0, fleet.lanes[0])
        fleet.lose(question, Away("refused"), 0.0)
        self.assertIn("another model", fleet.lose(question, Stop("server 0 has another model."), 1.0))
        self.assertEqual((fleet.lose(question, Away("refused"), 2.0), fleet.to_probe(1000.0)), ("", []))

    def test_a_batch_that_every_server_leaves_undone_ends_the_run(self) -> None:
        fleet, moves = fleet_of(2), 0
        while fleet.can_spare(Batch(ROWS, 8, fleet.lanes[0], moves)):
            moves += 1
        self.assertEqual(moves, 6)

    def test_what_comes_from_a_server_that_is_missed_counts_only_once_it_is_known_to_be_the_same(self) -> None:
        fleet = fleet_of(2)
        engine = embedgen.Engine(fleet, embedgen.Interrupt())
        first, second, third = (fleet.launch(fleet.lanes[0], ROWS, 0, 0.0) for _ in range(3))
        answers: list[Any] = [b"1234" * 8] * 8
        list(engine.hear(first, Away("refused")))
        self.assertEqual(list(engine.hear(second, answers)), [])
        news, result = engine.hear(Batch([], 0, fleet.lanes[0]), answers[:1])
        self.assertIn("is back", news.what)  # type: ignore[union-attr]
        self.assertEqual(result, embedgen.Result(ROWS, answers))
        self.assertEqual(fleet.returned, [(ROWS, 1)])
        list(engine.hear(fleet.launch(fleet.lanes[0], ROWS, 0, 0.0), Away("refused")))
        self.assertEqual(list(engine.hear(third, answers)), [])
        list(engine.hear(Batch([], 0, fleet.lanes[0]), Stop("another model")))
        self.assertEqual(len(fleet.returned), 3)

    def test_servers_are_greeted_side_by_side(self) -> None:
        for name in ENGINES:
            with self.subTest(engine=name):
                fleet, begun = fleet_of(3), []

                def greet(place: int, begun: list[int] = begun) -> embedgen.Conversation:
                    begun.append(place)
                    for _ in range(200):  # one after another, none would ever see the others begin
                        if len(begun) == 3:
                            raise Away(f"gone {place}")
                        yield embedgen.Wait(0.01)
                    return []

                for lane in fleet.lanes:
                    lane.wire.server = embedgen.parse_server("localhost")
                engine = embedgen.ENGINES[name](fleet, embedgen.Interrupt())
                with contextlib.closing(engine):
                    said = engine.hold(*((lane, greet(lane.place)) for lane in fleet.lanes))
                self.assertEqual([str(one) for one in said], ["gone 0", "gone 1", "gone 2"])

    def test_vectors_of_another_length_are_not_taken(self) -> None:
        fleet = fleet_of(2)
        self.assertIsNone(fleet.check(Batch(ROWS, 8, fleet.lanes[0]), ["failed", b"1234" * 8]))
        self.assertIsNone(fleet.check(Batch(ROWS, 8, fleet.lanes[1]), [b"1234" * 8]))
        stop = fleet.check(Batch(ROWS, 8, fleet.lanes[1]), [b"1234" * 16])
        assert stop
        self.assertIn("server 1 gives vectors of 16 dimensions, and the others of 8", stop.message)

    def test_the_rate_follows_the_answers(self) -> None:
        lane = fleet_of(1).lanes[0]
        lane.observe(Exchange(8, 2.0, "ok"), 16)
        self.assertEqual(lane.rate, 8.0)
        lane.observe(Exchange(8, 9.0, "failed"), 16)
        lane.observe(Exchange(8, 1.0, "ok"), 18)
        self.assertAlmostEqual(lane.rate, 8.0 + (18.0 - 8.0) * Lane.WEIGHT)
        self.assertEqual(lane.embedded, 16)


class Leaving(unittest.TestCase):
    """When a conversation leaves its texts to other servers."""

    def talk(self, serve: Serve) -> tuple[Any, float]:
        """Return the answers, or what was raised instead, and the seconds waited."""
        conversation = embedgen.Talk(wire(dimensions=8), lambda: 0.5, movable=True).embed(list(TEXTS), "cut")
        waited, reply = 0.0, None
        try:
            while True:
                step = conversation.send(reply)
                reply = None
                if isinstance(step, embedgen.Send):
                    reply = serve(PROBE if embedgen.KNOWN_GOOD.encode() in step.body else TEXTS)
                elif isinstance(step, embedgen.Wait):
                    waited += step.seconds
        except StopIteration as end:
            return end.value, waited
        except Stop as stop:
            return stop, waited

    def test_at_once_if_nobody_is_there(self) -> None:
        stop, waited = self.talk(script(REFUSED))
        self.assertIsInstance(stop, Away)
        self.assertEqual((stop.reason, waited), ("connection refused", 0.0))

    def test_after_some_seconds_if_it_is_busy(self) -> None:
        stop, waited = self.talk(lambda texts: error(503, "server busy"))
        self.assertIsInstance(stop, Away)
        self.assertTrue(3.0 < waited < 15.0)
        self.assertEqual(self.talk(script(error(503, "server busy")))[0], VECTORS)  # but not for once

    def test_at_once_if_it_asks_for_a_long_wait(self) -> None:
        stop, waited = self.talk(script(error(429, "slow down", retry_after=60.0)))
        self.assertEqual((type(stop), stop.wait, waited), (Away, 60.0, 0.0))

    def test_not_if_the_texts_may_be_to_blame(self) -> None:
        dead = error(500, "llama runner process has terminated")
        answers, _ = self.talk(lambda texts: good(texts) if texts == PROBE else dead)
        self.assertNotIsInstance(answers, Away)
        stop, waited = self.talk(lambda texts: dead)  # but the server is: it cannot bear the known-good text either
        self.assertIsInstance(stop, Away)
        self.assertLess(waited, 30.0)


class SeveralServers(Case):
    def setUp(self) -> None:
        super().setUp()
        self.other.reset()
        self.two: tuple[object, ...] = ("--server", self.ollama.url, "--server", self.other.url)

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.other = Ollama()
        cls.addClassCleanup(cls.other.close)

    def both(self, **settings: Any) -> None:
        """Change settings of both servers."""
        self.ollama.configure(**settings)
        self.other.configure(**settings)

    def again(self, engine: str) -> tuple[object, ...]:
        """Begin anew, and return the flags for an engine."""
        self.database.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "logs", ignore_errors=True)
        self.ollama.reset()
        self.other.reset()
        return (*self.two, "--engine", engine)

    def test_they_share_the_work(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                flags = self.again(engine)
                self.make_movies(300)
                self.both(seconds_per_text=0.002, slots=1)
                self.assertEqual(self.succeed(*flags).tally, (300, 0, 0))
                self.assert_complete()
                asked = [server.texts() for server in (self.ollama, self.other)]
                self.assertEqual(len(asked[0] + asked[1]), len({*asked[0], *asked[1]}))
                self.assertGreater(min(map(len, asked)), 50)
                for server, texts in zip((self.ollama, self.other), asked):
                    said = (
                        rf"{server.url}: {len(texts)} texts, [\d.]+ texts/s, away for 0.0 s; at the end \d+ in flight"
                    )
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
                    self.assertNotIn("/api/embed", [entry["path"] for entry in self.ollama.log()])

    def test_one_server_alone_in_the_flags(self) -> None:
        self.make_movies(3)
        self.refuse(2, *self.two, "--server", self.ollama.url + "/", words=[self.ollama.url, "twice"])
        self.refuse(2, "--server", "hash:", "--server", self.ollama.url, words=["hash:"])
        self.refuse(2, "--server", self.ollama.url, "--server", " ", words=["--server is empty"])
        self.refuse(2, *self.two, "--server", "ftp://x", words=["ftp://x"])

    def test_another_model_of_that_name(self) -> None:
        self.make_movies(3)
        for engine in SLOW_ENGINES:
            for name in ("nomic-embed-text", "nomic-embed-text:latest"):
                with self.subTest(engine=engine, name=name):
                    self.other.configure(models={"nomic-embed-text": {"digest": "sha256:" + "5" * 64}})
                    words = [self.ollama.url, self.other.url, '"nomic-embed-text"', "555555555555", "ollama pull"]
                    self.refuse(3, *self.two, "--engine", engine, "--model", name, words=words)
        self.assertEqual(self.ollama.texts() + self.other.texts(), [])
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

    def start(self, engine: str, rows: int = 600, seconds: float = 0.005) -> Any:
        """Start a run, and wait until both servers are at work."""
        flags = self.again(engine)
        self.make_movies(rows)
        self.both(seconds_per_text=seconds, slots=1)
        process = self.start_program(*flags, UNSAVED_SECONDS=0.1)
        self.wait_for(lambda: len(self.other.texts()) > 20 and len(self.ollama.texts()) > 20, "both at work")
        return process

    def test_one_goes_and_comes_back(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start(engine)
                self.other.kill()
                self.wait_for(lambda: "is away" in self.log(), "it is missed")
                self.other.start()
                self.wait_for(lambda: "is back after" in self.log(), "it is found again")
                self.both(seconds_per_text=0)
                _, err = process.communicate(timeout=60)
                self.assertEqual((process.returncode, err), (0, b""))
                self.assert_complete()

    def test_one_goes_for_good(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start(engine)
                self.other.kill()
                self.wait_for(lambda: "is away" in self.log(), "it is missed")
                self.ollama.configure(seconds_per_text=0)
                _, err = process.communicate(timeout=60)
                self.assertEqual(process.returncode, 0)
                self.assertRegex(
                    err.decode(), rf"\Awarning: {self.other.url} did not do its share to the end: .*connection.*\n\Z"
                )
                self.assert_complete()

    def test_one_comes_back_with_another_model(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start(engine)
                self.other.kill()
                self.wait_for(lambda: "is away" in self.log(), "it is missed")
                self.other.current["models"] = {"nomic-embed-text": {"digest": "5" * 64, "seed": "another"}}
                self.other.start()
                self.wait_for(lambda: "has another model" in self.log(), "it is turned down")
                self.ollama.configure(seconds_per_text=0)
                _, err = process.communicate(timeout=60)
                self.assertEqual(process.returncode, 0)
                self.assertRegex(err.decode(), rf"\Awarning: .*{self.other.url} has another model .*\n\Z")
                self.assert_complete()

    def test_one_without_a_digest_comes_back_with_other_vectors(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                self.again(engine)
                self.make_movies(600)
                self.both(seconds_per_text=0.005, slots=1, api=False)
                flags = ("--server", f"{self.ollama.url}/v1", "--server", f"{self.other.url}/v1", "--engine", engine)
                process = self.start_program(*flags, UNSAVED_SECONDS=0.1)
                self.wait_for(lambda: len(self.other.texts()) > 20 and len(self.ollama.texts()) > 20, "both at work")
                self.other.kill()
                self.wait_for(lambda: "is away" in self.log(), "it is missed")
                self.other.current["models"] = {"nomic-embed-text": {"seed": "another"}}
                self.other.start()
                self.wait_for(lambda: "come back with other vectors" in self.log(), "it is turned down")
                self.ollama.configure(seconds_per_text=0)
                process.communicate(timeout=60)
                self.assertEqual(process.returncode, 0)
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
                self.both(next=["ok"] * 4, faults={"reset": 1.0})
                with mock.patch.multiple(embedgen, PATIENCE=0.4):
                    done = self.run_program(*flags, "--batch-size", 4)
                self.assertEqual(done.code, 3)
                self.assertRegex(done.err, r"\Aerror: No server is left .*reset.*; .*reset.* movies are left\.\n\Z")
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
            with self.subTest(engine=engine):
                flags = self.again(engine)
                self.make_movies(60)
                self.both(show=False, shuffle=0.01)
                same = "5" * 64  # nothing tells before the first vectors come
                self.ollama.configure(models={"nomic-embed-text": {"digest": same}})
                self.other.configure(models={"nomic-embed-text": {"digest": same, "dimensions": 16}})
                done = self.run_program(*flags)
                self.assertEqual((done.code, done.tally), (0, (60, 0, 0)))
                self.assertRegex(done.err, r"\Awarning: .* dimensions.*\n\Z")
                self.assertEqual(len(set(map(len, self.stored().values()))), 1)
                self.database.unlink()
                self.make_movies(60)
                done = self.run_program(*flags, "--dimensions", 8)
                self.assertEqual((done.code, done.tally), (0, (60, 0, 0)))
                self.assert_complete()

    @unittest.skipIf(os.name == "nt", "Windows has no such signals")
    def test_an_interrupt_while_one_is_away(self) -> None:
        for engine in SLOW_ENGINES:
            with self.subTest(engine=engine):
                process = self.start(engine)
                self.other.kill()
                self.wait_for(lambda: "is away" in self.log(), "it is missed")
                os.killpg(process.pid, signal.SIGINT)
                began = time.monotonic()
                _, err = process.communicate(timeout=60)
                self.assertLess(time.monotonic() - began, 8.0)
                self.assertEqual((process.returncode, err), (130, b""))
                self.other.start()
                self.both(seconds_per_text=0)
                self.succeed(*self.two, "--engine", engine)
                self.assert_complete()


if __name__ == "__main__":
    unittest.main()
