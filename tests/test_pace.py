"""The pace, in virtual time against simulated servers: it finds by itself what a search of fixed pairs finds."""

from __future__ import annotations

import random
import unittest

from embedgen import Pace
from tests.simulation import SCENARIOS, Scenario, simulate
from tests.support import FULL

SECONDS = 120.0  # virtual, start-up included
# Fixed pairs among which each server's best is, or one within a percent of it; the whole grid takes minutes:
# python -m tests.simulation
PAIRS = [(8, 1), (8, 64), (64, 8), (64, 32)] + [(2, 1), (2, 8), (2, 256), (16, 32), (32, 16)] * FULL


def scenario(name: str) -> Scenario:
    """Return the scenario of that name."""
    (found,) = [one for one in SCENARIOS if " ".join(one.name.split()) == name]
    return found


class PaceAgainstServers(unittest.TestCase):
    def check(self, name: str, share: float = 0.95, timeouts: int = 0) -> Pace:
        """Auto must reach that share of the best fixed pair's throughput, whatever the chances drawn."""
        one = scenario(name)
        for seed in (11, 12, 13) if FULL else (11,):
            best = max(simulate(one, Pace(*pair), SECONDS, seed).rate for pair in PAIRS)
            pace = Pace(None, None, one.timeout)
            auto = simulate(one, pace, SECONDS, seed)
            self.assertGreaterEqual(auto.rate / best, share, (name, seed, auto))
            self.assertEqual(auto.timeouts, timeouts)
        return pace

    def test_one_text_at_a_time(self) -> None:
        pace = self.check("a one text at a time, 0.35 s")
        self.assertLessEqual(pace.in_flight, 4)  # more would only wait
        self.assertLessEqual(pace.in_flight * pace.batch_size * 0.35, 10.0)

    def test_four_at_a_time(self) -> None:
        self.check("b1 4 texts at a time, 20 ms")
        if FULL:
            self.check("b2 4 requests at a time, 20 ms")

    def test_requests_are_short(self) -> None:
        """A request takes one to two seconds, so that Ctrl-C is quick; an experiment may take several times that."""
        for name in (
            "a one text at a time, 0.35 s",
            "b2 4 requests at a time, 20 ms",
            "d2 50 requests at once, 100 ms",
        ):
            one = scenario(name)
            auto = simulate(one, Pace(None, None, one.timeout), 600.0, 11)
            self.assertLess(auto.served, 2.5, name)
            self.assertLess(auto.longest, 15.0, name)

    def test_noise_does_not_add_up(self) -> None:
        """In hours of a server whose times vary, the number in flight stays near what it needs."""
        one = scenario("f a, log-normal 0.5, 3000 s")
        pace = Pace(None, None, one.timeout)
        self.assertLess(simulate(one, pace, 20_000.0, 11).served, 8.0)
        self.assertLessEqual(pace.in_flight, 16)

    def test_a_batching_server(self) -> None:
        pace = self.check("c sharp, peak 500")
        self.assertGreaterEqual(pace.in_flight * pace.batch_size, 4 * 64)

    def test_a_server_far_away(self) -> None:
        self.check("d1 50 texts at once, 100 ms")
        if FULL:
            self.check("d2 50 requests at once, 100 ms")

    def test_a_server_that_falls_to_a_fifth_and_recovers(self) -> None:
        self.check("e a, a fifth from 40 to 70 s")
        if FULL:
            self.check("e b2, a fifth from 40 to 70 s")

    def test_a_server_that_becomes_faster(self) -> None:
        self.check("e a, five times faster from 40 s")
        if FULL:
            self.check("e d2 100 ms, five times faster")

    def test_a_server_that_refuses_above_eight(self) -> None:
        self.check("f 16 slots, 503 above 8", share=0.93)

    def test_a_server_that_fails_one_request_in_five(self) -> None:
        self.check("f b2, one in five fails", share=0.6)  # every retry waits in its place; a collapse would be 0.1

    def test_a_cold_start(self) -> None:
        self.check("f a, cold start of 60 s", share=0.93)


class PaceByHand(unittest.TestCase):
    def test_fixed_numbers_stay(self) -> None:
        pace = Pace(10, 32)
        for outcome in ("ok", "overloaded", "timeout", "failed") * 50:
            pace.observe(32, 0.5, outcome, 320)
        self.assertEqual((pace.in_flight, pace.batch_size), (10, 32))

    def test_one_fixed_number_stays(self) -> None:
        for given in [(10, None), (None, 32)]:
            pace = Pace(*given)
            for _ in range(500):
                full = pace.in_flight * pace.batch_size
                pace.observe(pace.batch_size, 0.01, "ok", full)
                for now, fixed in zip((pace.in_flight, pace.batch_size), given):
                    self.assertIn(fixed, (None, now))
            for _ in range(10):
                pace.observe(pace.batch_size, 10.0, "timeout", pace.in_flight * pace.batch_size)
            self.assertIn(given[0], (None, pace.in_flight))
            self.assertIn(given[1], (None, pace.batch_size))

    def test_time_outs_and_overload_make_it_smaller_down_to_one(self) -> None:
        for outcome in ("timeout", "overloaded"):
            pace = Pace(None, None)
            pace.in_flight, pace.batch_size = 64, 512
            for _ in range(250):
                pace.observe(pace.batch_size, 1.0, outcome, pace.in_flight * pace.batch_size)
            self.assertEqual((pace.in_flight, pace.batch_size), (1, 1))

    def test_what_is_no_sign_of_too_much_changes_nothing(self) -> None:
        pace = Pace(None, None)
        settings = (pace.in_flight, pace.batch_size)
        for _ in range(50):
            pace.observe(4, 0.01, "failed", 8)
        for _ in range(2):  # nor do one or two time-outs
            pace.observe(4, 10.0, "timeout", 8)
        self.assertEqual((pace.in_flight, pace.batch_size), settings)

    def test_a_server_that_fails_now_and_then(self) -> None:
        draw = random.Random(3)
        pace = Pace(None, None)
        for _ in range(3000):
            outcome = draw.choices(("ok", "overloaded", "failed", "timeout"), (85, 8, 6, 1))[0]
            pace.observe(
                pace.batch_size, pace.in_flight * pace.batch_size * 0.01, outcome, pace.in_flight * pace.batch_size
            )
        self.assertGreaterEqual(pace.in_flight * pace.batch_size, 16)

    def test_it_says_why(self) -> None:
        pace = Pace(None, None)
        for _ in range(200):
            before = pace.in_flight, pace.batch_size
            pace.observe(pace.batch_size, 0.1, "ok", pace.in_flight * pace.batch_size)
            if before != (pace.in_flight, pace.batch_size):
                self.assertRegex(
                    pace.reason, rf"^(trying .+ texts/s, .+ per request|.+ did not pay) with {before[0]} x"
                )
                self.assertIn(pace.reason, str(pace))

    def test_what_a_request_can_carry_is_never_exceeded(self) -> None:
        draw = random.Random(5)
        for fixed in (None, 64):
            pace = Pace(None, fixed)
            for most in (100, 40, 60, 7):
                for _ in range(draw.randrange(300)):  # in the middle of whatever is tried just then
                    pace.observe(pace.batch_size, draw.uniform(0.1, 5), "ok", pace.in_flight * pace.batch_size)
                pace.limit(most)
                for _ in range(300):
                    self.assertLessEqual(pace.batch_size, most)
                    pace.observe(pace.batch_size, draw.uniform(0.1, 5), "ok", pace.in_flight * pace.batch_size)

    def test_an_instant_server_gets_large_batches_at_once(self) -> None:
        pace = Pace(None, None)
        texts = 0
        while pace.batch_size < 64 and texts < 2000:
            texts += pace.batch_size
            pace.observe(pace.batch_size, 0.001, "ok", pace.in_flight * pace.batch_size)
        self.assertLess(texts, 500)

    def test_the_bounds(self) -> None:
        pace = Pace(None, None, 120.0, 20)
        for _ in range(5000):  # the more is asked of it, the more it does
            pace.observe(pace.batch_size, 0.1, "ok", pace.in_flight * pace.batch_size)
            self.assertLessEqual(pace.in_flight, 20)
            self.assertLessEqual(pace.batch_size, Pace.LARGEST_BATCH)

    def test_failures_sent_under_earlier_settings_do_not_count(self) -> None:
        pace = Pace(None, None)
        for _ in range(3):
            pace.observe(4, 1.0, "timeout", 8)
        settings = (pace.in_flight, pace.batch_size)
        self.assertEqual(settings, (1, 2))
        for _ in range(3):
            pace.observe(4, 1.0, "timeout", 8)
        self.assertEqual((pace.in_flight, pace.batch_size), settings)


if __name__ == "__main__":
    unittest.main()
