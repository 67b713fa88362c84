"""One batch's conversation: what is said for every kind of answer, driven by a list, in no time at all."""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import math
import random
import struct
import sys
import unittest
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import embedgen
from embedgen import LEAN, LEGACY, USUAL, Exchange, Reply, Send, Stop, Wait
from tests.ollama import blob, vector

Serve = Callable[[list[str]], Reply]


def good(texts: list[str], seconds: float = 0.1) -> Reply:
    """Return a sound answer."""
    return Reply(200, json.dumps({"embeddings": [vector(text) for text in texts]}).encode(), seconds)


def error(status: int, words: object, **more: float) -> Reply:
    """Return an error's answer."""
    return Reply(status, json.dumps({"error": words}).encode(), 0.1, **more)


SILENCE = Reply(0, seconds=300.0, reason="no answer within 300 s", timed_out=True)
REFUSED = Reply(0, seconds=0.0, reason="connection refused")
NAN = "embedding contains NaN or Inf values"
PROBE = [embedgen.KNOWN_GOOD]


lean_bytes = 0  # of each new wire: what its greeting would have learned
protocol: type[embedgen.HTTPWire] = embedgen.OllamaWire


def wire(**options: object) -> Any:
    """Return a wire to nowhere."""
    settings = {
        "model": "m",
        "timeout": 300.0,
        "option": [],
        "dimensions": None,
        "prefix": "",
        "context": 0,
        "on_long": "cut",
        **options,
    }
    path = "" if protocol is embedgen.OllamaWire else "/v1"
    made: Any = protocol(embedgen.Server("http", "h", 1, path, ""), argparse.Namespace(**settings))
    made.lean_bytes, made.base64 = lean_bytes, True
    return made


OPENAI = (LEAN, embedgen.OpenAIWire.path)


def as_asked(path: str, reply: Reply) -> Reply:
    """Return a reply in the form of the path that it was asked for over."""
    try:
        answer = json.loads(reply.body)
        if path in OPENAI and "error" in answer:
            answer = {"error": {"message": answer["error"], "type": "api_error", "param": None, "code": None}}
        elif path in OPENAI and isinstance(answer["embeddings"], list):
            data = [{"index": i, "embedding": in_base64(one)} for i, one in enumerate(answer["embeddings"])]
            answer = {"object": "list", "data": data}
        return reply._replace(body=json.dumps(answer).encode())
    except (ValueError, LookupError, TypeError):
        return reply


def in_base64(numbers: Any) -> Any:
    """Return a vector as the lean path has it, or as it is where float32 cannot have it."""
    try:
        return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
    except (struct.error, OverflowError):
        return numbers


class Talked:
    """A whole conversation: its answers, and what was said and waited on the way."""

    def __init__(self, texts: Sequence[str], serve: Serve, on: Any = None) -> None:
        self.sent: list[list[str]] = []
        self.paths: list[str] = []
        self.timeouts: list[float] = []
        self.waits: list[float] = []
        self.exchanges: list[Exchange] = []
        self.seconds = 0.0
        self.stop: Stop | None = None
        self.answers: list[bytes | str] = []
        on = on or wire(dimensions=8)
        conversation = embedgen.Talk(on, jitter=lambda: 0.5).embed(list(texts), on.on_long)
        reply: Reply | None = None
        try:
            while True:
                step = conversation.send(reply)
                reply = None
                if isinstance(step, Send):
                    body = json.loads(step.body)
                    asked = body["input"] if "input" in body else [body["prompt"]]
                    self.sent.append(asked)
                    self.paths.append(step.path)
                    self.timeouts.append(step.timeout)
                    reply = as_asked(step.path, serve(asked))
                    self.seconds += reply.seconds
                elif isinstance(step, Wait):
                    self.waits.append(step.seconds)
                    self.seconds += step.seconds
                else:
                    self.exchanges.append(step)
                if len(self.sent) > 5000:
                    raise AssertionError("the conversation does not end")
        except StopIteration as end:
            self.answers = end.value
        except Stop as stop:
            self.stop = stop


def script(*replies: Reply | None) -> Serve:
    """Return a server that gives these answers in turn, None for a good one, and good ones after them."""
    left = list(replies)

    def serve(texts: list[str]) -> Reply:
        reply = left.pop(0) if left else None
        return good(texts) if reply is None else reply

    return serve


TEXTS = [f"text {number}" for number in range(8)]
VECTORS = [blob(text) for text in TEXTS]


class Conversations(unittest.TestCase):
    """Over the usual path; the same tests run over the lean one below."""

    path, way, lean_bytes = USUAL, "decimals over /api/embed", 0
    unit_length = True

    def setUp(self) -> None:
        patch = mock.patch(f"{__name__}.lean_bytes", self.lean_bytes)
        patch.start()
        self.addCleanup(patch.stop)

    def test_a_good_answer(self) -> None:
        talked = Talked(TEXTS, good)
        self.assertEqual((talked.answers, talked.sent, talked.waits), (VECTORS, [TEXTS], []))
        self.assertEqual(talked.exchanges, [Exchange(8, 0.1, "ok", way=self.way)])
        self.assertEqual(talked.paths, [self.path])

    def test_what_passes_is_tried_again_with_growing_waits(self) -> None:
        for reply in (
            REFUSED,
            Reply(0, reason="connection reset"),
            Reply(0, reason="the answer was cut off"),
            error(429, "slow down"),
            error(500, "llama runner process has terminated"),
            error(502, "bad gateway"),
            error(503, "server busy, please try again.  maximum pending requests exceeded"),
            error(400, 'do embedding request: Post "http://127.0.0.1:1/embedding": EOF'),
            error(500, {}),
        ):
            with self.subTest(reply=reply):
                talked = Talked(TEXTS, script(reply, reply, reply))
                self.assertEqual((talked.answers, talked.sent), (VECTORS, [TEXTS] * 4))
                self.assertEqual(talked.waits, [0.5, 1.0, 2.0])
                outcome = "overloaded" if reply.status else "failed"  # who is not there is not overloaded
                self.assertEqual([one.outcome for one in talked.exchanges], [outcome] * 3 + ["ok"])

    def test_waits_are_jittered(self) -> None:
        talk = embedgen.Talk(wire(), jitter=random.Random(1).random)
        waits = [next(talk.pause(embedgen.Silent(""))) for _ in range(9)]
        self.assertEqual(len({round(step.seconds, 3) for step in waits}), 9)
        for number, step in enumerate(waits):
            middle = min(0.5 * 2**number, 15.0)
            self.assertTrue(middle * 0.5 <= step.seconds <= middle * 1.5)

    def test_retry_after_is_heeded(self) -> None:
        talked = Talked(TEXTS, script(error(503, "busy", retry_after=30.0), error(429, "busy", retry_after=9999.0)))
        self.assertEqual(talked.waits, [30.0, 600.0])
        self.assertEqual(talked.answers, VECTORS)
        # Waiting as it is asked to is no reason to give the server up.
        talked = Talked(TEXTS, script(*[error(429, "busy", retry_after=60.0)] * 4))
        self.assertEqual((talked.waits, talked.answers), ([60.0] * 4, VECTORS))

    def test_load_is_never_blamed_on_a_row(self) -> None:
        for reply in (error(503, "busy"), error(429, "busy"), error(502, "bad gateway"), REFUSED):
            with self.subTest(reply=reply):
                talked = Talked(["text 0"], lambda asked, reply=reply: good(asked) if asked == PROBE else reply)
                self.assertIsNotNone(talked.stop)
                self.assertEqual(talked.answers, [])

    def test_words_of_load_are_no_words_about_the_text(self) -> None:
        for reply in (error(504, "upstream took too long to respond"), error(503, "the queue is too long")):
            self.assertEqual(Talked(["text 0"], script(reply)).answers, VECTORS[:1])

    def test_a_gateway_that_times_out_gets_less(self) -> None:
        late = Reply(504, b"", 60.0)
        talked = Talked(TEXTS, lambda asked: late if len(asked) > 2 else good(asked))
        self.assertEqual(talked.answers, VECTORS)
        self.assertEqual([len(sent) for sent in talked.sent if sent != PROBE], [8, 8, 4, 4, 2, 2, 4, 4, 2, 2])

    def test_a_bad_text_on_a_server_that_answers_every_other_request(self) -> None:
        turn = [0]

        def serve(asked: list[str]) -> Reply:
            turn[0] += 1
            return (
                error(400, NAN)
                if asked == ["bad"] and turn[0] % 2
                else error(429, "slow down")
                if turn[0] % 2 == 0
                else good(asked)
            )

        self.assertEqual(Talked(["bad"], serve).answers, [NAN])

    def test_two_conversations_do_not_confirm_each_others_odd_answers(self) -> None:
        on = wire(dimensions=None)
        on.expected = 8
        odd = Reply(200, json.dumps({"embeddings": [vector("x", 16)]}).encode())
        one, two = (
            embedgen.Talk(on, lambda: 0.5).embed(["a"], "cut"),
            embedgen.Talk(on, lambda: 0.5).embed(["b"], "cut"),
        )
        next(one)
        next(two)
        for conversation in (one, two):  # both hear the same odd answer before either has asked again
            step = conversation.send(as_asked(self.path, odd))
            assert isinstance(step, Send)
            self.assertEqual(json.loads(step.body)["input"], PROBE)
        self.assertEqual((on.dimensions, on.expected), (None, 8))

    def test_one_time_out_and_one_refusal_do_not_end_the_run(self) -> None:
        talked = Talked(TEXTS, script(SILENCE, error(503, "busy")))
        self.assertEqual(talked.answers, VECTORS)

    def test_one_answer_of_other_dimensions_to_the_known_good_text_is_not_believed(self) -> None:
        other = Reply(200, json.dumps({"embeddings": [[*vector(PROBE[0]), 0.0]]}).encode(), 0.1)
        talked = Talked(TEXTS[:1], script(SILENCE, other))
        self.assertEqual(talked.answers, VECTORS[:1])
        self.assertEqual(talked.sent, [TEXTS[:1], PROBE, PROBE, TEXTS[:1]])
        stop = Talked(TEXTS[:1], script(SILENCE, other, other)).stop
        self.assertIn("9 dimensions came instead of 8", str(stop))
        self.assertIn("Leave out --dimensions", str(stop))  # since they were asked for
        stored = wire(dimensions=None)
        stored.settle(8)
        stop = Talked(TEXTS[:1], script(SILENCE, other, other), stored).stop
        self.assertIn("what the table holds: vectors of 9 dimensions came instead of 8. Give the --model", str(stop))

    def test_one_answer_of_other_dimensions_is_not_believed(self) -> None:
        longer = [[0.6] + [number * 0.8 for number in vector(text)] for text in TEXTS]  # of length 1, too
        odd = Reply(200, json.dumps({"embeddings": longer}).encode(), 0.1)
        for dimensions in (8, 99, None):  # what the model card says
            for before in (0, 1, 3):
                with self.subTest(dimensions=dimensions, before=before):
                    on = wire(dimensions=None)
                    on.expected = dimensions
                    serve = script(*[None] * before, odd)
                    for _ in range(3):
                        self.assertEqual(Talked(TEXTS, serve, on).answers, VECTORS)

    def test_a_server_that_stays_away_stops_the_run(self) -> None:
        for reply in (REFUSED, error(503, "busy"), error(400, "EOF"), SILENCE):
            with self.subTest(reply=reply):
                talked = Talked(TEXTS, lambda texts, reply=reply: reply)
                assert talked.stop
                self.assertEqual(talked.stop.code, 3)
                self.assertIn("no good answer", talked.stop.message)
                self.assertGreaterEqual(talked.seconds, 120.0)
                self.assertLess(talked.seconds, 120.0 + 30.0 if reply is not SILENCE else 1000.0)

    def test_a_server_that_comes_back_after_ninety_seconds(self) -> None:
        for texts in (TEXTS, TEXTS[:1]):
            for away in (REFUSED, error(502, "bad gateway")):
                clock = [0.0]

                def serve(asked: list[str], away: Reply = away, clock: list[float] = clock) -> Reply:
                    return good(asked) if clock[0] > 90 else away

                conversation = embedgen.Talk(wire(dimensions=8), jitter=lambda: 0.5).embed(list(texts), "cut")
                reply: Reply | None = None
                try:
                    while True:
                        step = conversation.send(reply)
                        reply = None
                        if isinstance(step, Send):
                            reply = as_asked(step.path, serve(json.loads(step.body)["input"]))
                        elif isinstance(step, Wait):
                            clock[0] += step.seconds
                except StopIteration as end:
                    self.assertEqual(end.value, VECTORS[: len(texts)])
                self.assertLess(clock[0], 120.0)

    def test_refused_rows_are_cornered_and_all_others_embedded(self) -> None:
        bad = {"text 2", "text 6"}
        for status, words in [(400, NAN), (500, "failed to encode response: json: unsupported value: NaN"),
                              (400, "the input length exceeds the context length"),
                              (413, "Request Entity Too Large"), (422, {"message": "no"})]:  # fmt: skip
            with self.subTest(words=words):

                def serve(asked: list[str], status: int = status, words: object = words) -> Reply:
                    return error(status, words) if bad.intersection(asked) else good(asked)

                talked = Talked(TEXTS, serve, wire(dimensions=8, on_long="fail"))
                said = "no" if isinstance(words, dict) else words
                expected = [said if text in bad else blob(text) for text in TEXTS]
                self.assertEqual(talked.answers, expected)
                self.assertEqual(talked.waits, [])
                self.assertEqual(talked.sent.count(PROBE), 2)

    def test_no_row_is_failed_for_a_400_before_a_known_good_text_succeeds(self) -> None:
        # The server refuses everything for a while: that is no row's fault.
        talked = Talked(["text 0"], script(*[error(400, "broken")] * 5))
        self.assertEqual(talked.answers, [blob("text 0")])
        self.assertIn(PROBE, talked.sent)
        talked = Talked(["text 0"], lambda asked: error(400, "broken"))
        self.assertIsNotNone(talked.stop)

    def test_a_text_that_kills_the_server_each_time(self) -> None:
        def serve(asked: list[str]) -> Reply:
            return error(400, "do embedding request: EOF") if "text 5" in asked else good(asked)

        talked = Talked(TEXTS, serve)
        self.assertEqual(talked.answers[:5] + talked.answers[6:], VECTORS[:5] + VECTORS[6:])
        self.assertEqual(talked.answers[5], "HTTP 400: do embedding request: EOF")
        self.assertLess(talked.seconds, 120.0)

    def test_such_a_text_anywhere_in_a_large_batch(self) -> None:
        texts = [f"text {number}" for number in range(128)]
        for bad in ("text 0", "text 64", "text 127"):
            for reply in (error(500, "llama runner process has terminated"), error(400, "EOF")):

                def serve(asked: list[str], bad: str = bad, reply: Reply = reply) -> Reply:
                    return reply if bad in asked else good(asked)

                talked = Talked(texts, serve)
                self.assertIsNone(talked.stop)
                self.assertEqual([text for text, answer in zip(texts, talked.answers) if answer != blob(text)], [bad])

    def test_unusable_answers_are_never_stored(self) -> None:
        sound = [vector(text) for text in TEXTS]
        for name, body in {
            "too few": {"embeddings": sound[:-1]},
            "too many": {"embeddings": [*sound, sound[0]]},
            "none": {"embeddings": []},
            "null": {"embeddings": None},
            "zero": {"embeddings": [*sound[:-1], [0.0] * 8]},
            "a null": {"embeddings": [*sound[:-1], [None, *sound[0][1:]]]},
            "nan": {"embeddings": [*sound[:-1], [float("nan"), *sound[0][1:]]]},
            "infinite": {"embeddings": [*sound[:-1], [float("inf"), *sound[0][1:]]]},
            "too large": {"embeddings": [*sound[:-1], [1e300, *sound[0][1:]]]},
            "a string": {"embeddings": [*sound[:-1], ["x", *sound[0][1:]]]},
            "longer": {"embeddings": [[*numbers, 0.0] for numbers in sound]},
            "one longer": {"embeddings": [*sound[:-1], [*sound[0], 0.0]]},
            **({"not normalised": {"embeddings": [[n * 2 for n in one] for one in sound]}} if self.unit_length else {}),
            "twins": {"embeddings": [sound[0]] * 8},
            "an error": {"error": "something"},
            "no object": [1, 2],
        }.items():
            with self.subTest(name):
                reply = Reply(200, json.dumps(body).encode(), 0.1)
                # Once: as for a cut-off answer.
                once = Talked(TEXTS, script(reply))
                self.assertEqual(once.answers, VECTORS)
                self.assertLessEqual(len([sent for sent in once.sent if sent != PROBE]), 2)
                # Twice: the batch is halved.
                twice = Talked(TEXTS, script(reply, *[None] * (name == "longer"), reply))
                self.assertEqual(twice.answers, VECTORS)

        for junk in (b"", b"<html>", b"{", b"\xff\xfe", b"null", b'"x"'):
            with self.subTest(junk=junk):
                self.assertEqual(Talked(TEXTS, script(Reply(200, junk), Reply(200, junk))).answers, VECTORS)

    def test_one_text_whose_answer_is_always_unusable_fails_alone(self) -> None:
        def serve(asked: list[str]) -> Reply:
            vectors = [[0.0] * 8 if text == "text 3" else vector(text) for text in asked]
            return Reply(200, json.dumps({"embeddings": vectors}).encode(), 0.1)

        talked = Talked(TEXTS, serve)
        self.assertEqual(talked.answers, [*VECTORS[:3], "a vector is all zero", *VECTORS[4:]])

    def test_texts_that_a_tokenizer_cannot_tell_apart_may_share_a_vector(self) -> None:
        same = json.dumps({"embeddings": [vector("x"), vector("x")]}).encode()
        talked = Talked(["The Café", "the cafe!"], lambda asked: Reply(200, same))
        self.assertEqual((talked.answers, len(talked.sent)), ([blob("x")] * 2, 1))

    def test_silence_asks_for_less_and_waits_longer(self) -> None:
        def serve(asked: list[str]) -> Reply:
            return SILENCE if len(asked) > 2 else good(asked)

        talked = Talked(TEXTS, serve)
        self.assertEqual(talked.answers, VECTORS)
        sizes = [len(sent) for sent in talked.sent if sent != PROBE]
        self.assertEqual(sizes, [8, 4, 2, 2, 4, 2, 2])
        # Before each further request, a short text has shown that the server has time again.
        self.assertEqual(talked.sent[1], PROBE)
        self.assertGreater(talked.timeouts[1], talked.timeouts[0])
        self.assertEqual([one.outcome for one in talked.exchanges if one.outcome != "ok"], ["timeout"] * 3)

    def test_a_row_fails_when_alone_it_times_out_three_times(self) -> None:
        def serve(asked: list[str]) -> Reply:
            return SILENCE if "text 6" in asked else good(asked)

        talked = Talked(TEXTS, serve)
        self.assertEqual(talked.answers, [*VECTORS[:6], "no answer within 300 s", VECTORS[7]])
        self.assertEqual(talked.sent.count(["text 6"]), 3)

    def test_an_older_server(self) -> None:
        def serve(asked: list[str]) -> Reply:
            return next(paths)(asked)

        def missing(asked: list[str]) -> Reply:
            return Reply(404, b"404 page not found")

        def single(asked: list[str]) -> Reply:
            return Reply(200, json.dumps({"embedding": [number * 7 for number in vector(asked[0])]}).encode())

        newer = [LEAN, USUAL][-1 - bool(self.lean_bytes) :]
        paths = iter([*[missing] * len(newer), *[single] * 8])
        talked = Talked(TEXTS, serve)
        self.assertEqual(talked.paths, newer + [LEGACY] * 8)
        for answer, expected in zip(talked.answers, VECTORS):
            assert isinstance(answer, bytes)
            for one, other in zip(array("f", answer), array("f", expected)):
                self.assertAlmostEqual(one, other, places=6)

    def test_what_no_retry_can_mend_stops_at_once(self) -> None:
        for reply, words in [
            (error(401, "unauthorized"), "OLLAMA_API_KEY"),
            (error(403, "forbidden"), "OLLAMA_API_KEY"),
            (error(404, 'model "m" not found, try pulling it first'), "ollama pull m"),
            (error(404, "model 'm' not found"), "ollama pull m"),
            (error(400, "this model does not support embeddings"), "cannot embed"),
            (Reply(301, b""), "final address"),
        ]:
            with self.subTest(reply=reply):
                talked = Talked(TEXTS, lambda asked, reply=reply: reply)
                assert talked.stop
                self.assertEqual((talked.stop.code, set(Counter(talked.paths).values())), (3, {1}))
                if b"model" in reply.body:
                    self.assertEqual(talked.paths, [self.path])
                self.assertIn(words, talked.stop.message)

    def test_a_small_soak(self) -> None:
        """Every fault at once, at random, in virtual time."""
        draw = random.Random(7)
        texts = [f"row {number}" for number in range(600)]
        poison = set(draw.sample(texts, 6))

        def serve(asked: list[str]) -> Reply:
            chance = draw.random()
            for share, reply in [
                (0.10, error(500, "out of memory")), (0.05, Reply(0, reason="connection reset")),
                (0.05, Reply(0, reason="the answer was cut off")), (0.01, SILENCE), (0.02, error(503, "busy")),
                (0.02, error(400, "EOF")), (0.01, Reply(200, b'{"embeddings": []}')),
                (0.01, Reply(200, json.dumps({"embeddings": [[0.0] * 8] * len(asked)}).encode())),
            ]:  # fmt: skip
                if chance < share:
                    return reply
                chance -= share
            return error(400, NAN) if poison.intersection(asked) else good(asked)

        for start in range(0, 600, 24):
            batch = texts[start : start + 24]
            talked = Talked(batch, serve)
            self.assertEqual(talked.answers, [NAN if text in poison else blob(text) for text in batch])


class OverTheLeanPath(Conversations):
    path, way, lean_bytes = LEAN, "base64 over /v1/embeddings", 100

    def test_what_is_asked_for(self) -> None:
        step = next(embedgen.Talk(wire(dimensions=8)).embed(TEXTS, "cut"))
        assert isinstance(step, Send)
        expected = {"model": "m", "input": TEXTS, "dimensions": 8, "encoding_format": "base64"}
        self.assertEqual((step.path, json.loads(step.body)), (LEAN, expected))

    def test_a_batch_with_a_text_that_might_be_cut_takes_the_usual_path(self) -> None:
        on = wire(dimensions=8)
        for text, path in (("x" * 100, LEAN), ("x" * 101, USUAL), ("é" * 50, LEAN), ("é" * 51, USUAL), ("y", LEAN)):
            talked = Talked(["short", text], good, on)
            self.assertEqual((talked.paths, talked.answers), ([path], [blob("short"), blob(text)]))

    def test_the_index_gives_the_order(self) -> None:
        def serve(asked: list[str]) -> Reply:
            data = [{"index": i, "embedding": in_base64(vector(text))} for i, text in enumerate(asked)]
            return Reply(200, json.dumps({"data": data[::-1]}).encode())

        self.assertEqual(Talked(TEXTS, serve).answers, VECTORS)

    def test_a_server_without_base64_is_asked_over_the_usual_path_from_then_on(self) -> None:
        def serve(asked: list[str]) -> Reply:
            data = [{"index": i, "embedding": vector(text)} for i, text in enumerate(asked)]
            return Reply(200, json.dumps({"data": data}).encode())

        on = wire(dimensions=8)
        talked = Talked(TEXTS, serve, on)
        self.assertEqual((talked.answers, talked.paths), (VECTORS, [LEAN]))
        self.assertEqual([one.way for one in talked.exchanges], ["decimals over /v1/embeddings"])
        talked = Talked(TEXTS, good, on)
        self.assertEqual((talked.answers, talked.paths), (VECTORS, [USUAL]))

    def test_a_server_without_the_path_costs_one_request_and_no_time(self) -> None:
        for reply in (Reply(404, b"404 page not found"), Reply(403, b"<html>"), Reply(405), Reply(200, b"<html>"),
                      Reply(301), error(400, "unknown field"), Reply(200, b'{"data": [{"embedding": "?"}]}'),
                      Reply(200, b'{"data": [{"index": 0, "embedding": "AAA="}]}')):  # fmt: skip
            with self.subTest(reply=reply):
                on = wire(dimensions=8)
                talked = Talked(TEXTS, script(reply), on)
                self.assertEqual((talked.answers, talked.paths), (VECTORS, [LEAN, USUAL]))
                self.assertEqual((talked.waits, len(talked.exchanges)), ([], 1))
                self.assertEqual(Talked(TEXTS, good, on).paths, [USUAL])

    def test_the_path_may_go_away_in_mid_run_but_is_not_left_for_a_fault(self) -> None:
        on = wire(dimensions=8)
        for reply in (error(503, "busy"), error(500, "crashed"), error(400, NAN), Reply(200, b"<html>"), SILENCE):
            self.assertEqual(Talked(TEXTS, script(None, reply), on).paths, [LEAN])  # has shown that it is there
            self.assertEqual(set(Talked(TEXTS, script(reply), on).paths), {LEAN})
        self.assertEqual(Talked(TEXTS, script(Reply(404, b"404 page not found")), on).paths, [LEAN, USUAL])
        self.assertEqual(Talked(TEXTS, good, on).paths, [USUAL])

    def test_trouble_at_the_start_does_not_tell_of_an_older_server(self) -> None:
        for reply in (error(503, "busy"), error(429, "busy"), error(400, "EOF"), error(400, NAN), REFUSED, SILENCE):
            self.assertEqual(set(Talked(TEXTS, script(reply)).paths), {LEAN})

    def test_each_number_counts_in_the_gate(self) -> None:
        for dimensions in (1, 63, 64, 65, 768):
            for place in {0, dimensions // 2, dimensions - 1}:
                unit = [0.0] * dimensions
                unit[place] = 1.0
                self.assertEqual(embedgen.length_of(embedgen.pack(unit)), 1.0)
                unit[place] = 3.0
                self.assertEqual(embedgen.length_of(embedgen.pack(unit)), 3.0)
                for bad in (float("nan"), float("inf")):
                    unit[place] = bad
                    with self.assertRaises(embedgen.Garbled):
                        embedgen.gate([embedgen.pack(unit)], ["text"], True)

    def test_what_the_gate_tells_by_bytes_alone_is_so(self) -> None:
        # One of each kind of float32: sign, each exponent, and a fraction of none, a little, and all.
        for sign, exponent, fraction in itertools.product((0, 1), range(256), (0, 1, 0x7FFFFF)):
            one = (sign << 31 | exponent << 23 | fraction).to_bytes(4, "little")
            number = struct.unpack("<f", one)[0]
            first, second = embedgen.pack([0.6, 0.8]), one + bytes(4)
            sound = math.isfinite(number) and number != 0
            for unit_length in (False, True):
                try:
                    self.assertEqual(embedgen.gate([first, second], ["one", "other"], unit_length), [first, second])
                    self.assertTrue(sound and (abs(number) < 2 or not unit_length), number)
                except embedgen.Garbled as garbled:
                    self.assertFalse(sound and not unit_length, (number, garbled))

    def test_a_damaged_vector_is_found_wherever_it_stands(self) -> None:
        draw = random.Random(1)
        sound = []
        for _ in range(4):
            numbers = [draw.gauss(0, 1) for _ in range(768)]
            sound.append([n / math.hypot(*numbers) for n in numbers])
        texts = ["a", "b", "c", "d"]
        packed = list(map(embedgen.pack, sound))
        self.assertEqual(embedgen.gate(packed, texts, True), packed)
        self.assertTrue(all(map(embedgen.looks_sound, packed)))
        for damage in (
            lambda one: one[:384] + [0.0] * 384,
            lambda one: one[:700] + [0.0] * 68,
            lambda one: [n * 1e-2 for n in one],
            lambda one: [n * 1e2 for n in one],
            lambda one: [0.001] + [0.0] * 767,
        ):
            for place in range(4):
                vectors = list(packed)
                vectors[place] = embedgen.pack(damage(sound[place]))
                with self.assertRaises(embedgen.Garbled):
                    embedgen.gate(vectors, texts, True)
        # Many zeros in themselves are no fault.
        sparse = embedgen.pack([0.6, 0.8] + [0.0] * 766)
        self.assertEqual(embedgen.gate([packed[0], sparse], ["a", "b"], True), [packed[0], sparse])

    def test_a_server_that_does_not_normalise_is_told_by_any_of_its_vectors(self) -> None:
        twice = [[n * 2 for n in vector(text)] for text in TEXTS]
        for vectors in (twice, list(map(embedgen.pack, twice))):
            with self.assertRaisesRegex(embedgen.Garbled, "length 2 instead of 1"):
                embedgen.gate(vectors, TEXTS, True)
            self.assertEqual(embedgen.gate(vectors, TEXTS, False), list(map(embedgen.pack, twice)))


NO_TAGS = error(404, "404 page not found")


class Long(unittest.TestCase):
    """What is learnt from texts that are too long, and how parts are put together."""

    def test_texts_as_long_as_one_that_was_too_long_are_asked_for_alone(self) -> None:
        def serve(texts: list[str]) -> Reply:
            too_long = any(text.startswith("long ") for text in texts)
            return error(400, "the input length exceeds the context length") if too_long else good(texts)

        on = wire(dimensions=8, on_long="skip")
        self.assertEqual(on.long_from, sys.maxsize)
        Talked([*TEXTS, "long " * 20], serve, on)
        self.assertEqual(on.long_from, 100)
        talked = Talked(["long " * 20, *TEXTS, "long " * 30], serve, on)
        self.assertEqual(talked.sent[0], ["long " * 30])
        self.assertEqual([sent for sent in talked.sent if sent != PROBE][1:], [["long " * 20], TEXTS])
        self.assertEqual([type(answer) for answer in talked.answers[::9]], [embedgen.TooLongFor] * 2)
        self.assertEqual(talked.answers[1:9], VECTORS)
        Talked(["long " * 15], serve, on)  # less is too long, too
        self.assertEqual(on.long_from, 75)
        taken = ["other" * 20, "other" * 16]
        self.assertEqual(Talked(taken, serve, on).sent, [taken[:1], taken[1:]])
        self.assertEqual(on.long_from, 101)  # what was taken is not too long
        self.assertEqual(Talked(taken, serve, on).sent, [taken])

    def test_a_part_counts_by_its_length(self) -> None:
        one, other = embedgen.pack([1.0, 0.0]), embedgen.pack([0.0, 1.0])
        mean = embedgen.unpack(embedgen.mean([(30, one), (40, other)]))
        self.assertAlmostEqual(mean[0], 0.6, 6)
        self.assertAlmostEqual(mean[1], 0.8, 6)

    def test_the_parts_of_a_text_are_weighted(self) -> None:
        text = "one two three four. " * 3 + "five six seven eight nine ten."
        sent: list[str] = []

        def serve(texts: list[str]) -> Reply:
            sent.extend(texts)
            too_long = max(map(len, texts)) > 70
            return error(400, "the input length exceeds the context length") if too_long else good(texts)

        answer = Talked([text], serve, wire(dimensions=8, on_long="split")).answers[0]
        parts = [part for part in sent if part not in (text, *PROBE)]
        self.assertEqual("".join(parts), text)
        self.assertEqual(len(set(map(len, parts))), 2, "they must differ to show it")
        sums = [sum(len(part) * vector(part)[i] for part in parts) for i in range(8)]
        norm = math.hypot(*sums)
        for number, expected in zip(embedgen.unpack(answer), sums):
            self.assertAlmostEqual(number, expected / norm, 6)


class Greetings(unittest.TestCase):
    def greet(self, reply: Reply, on: Any = None, tags: Reply = NO_TAGS) -> embedgen.OllamaWire:
        on = on or wire()
        conversation = on.greet()
        sent = next(conversation)
        assert isinstance(sent, Send)
        self.assertEqual(sent.path, "/api/show")
        sent = conversation.send(reply)
        assert isinstance(sent, Send)
        self.assertEqual(sent.path, "/api/tags")
        with self.assertRaises(StopIteration):
            conversation.send(tags)
        return on

    def test_the_model_card_tells_the_dimensions(self) -> None:
        card = {"model_info": {"general.architecture": "bert", "bert.embedding_length": 768}}
        self.assertEqual(self.greet(Reply(200, json.dumps(card).encode())).expected, 768)

    def test_the_model_card_tells_which_texts_cannot_be_cut(self) -> None:
        margin = embedgen.LEAN_MARGIN
        for context, parameters, most in (
            (512, "", 512 - margin),
            (2048, "", 2048 - margin),
            (32768, "", 2048 - margin),  # Ollama may not use all of it
            (512, "num_ctx                        256\ntemperature 1", 256 - margin),
            (2048, "num_ctx 8192", 2048 - margin),
            (10, "", 0),
            (None, "num_ctx 8192", 0),
        ):
            card = {"model_info": {"bert.context_length": context}, "parameters": parameters}
            reply = Reply(200, json.dumps(card).encode())
            self.assertEqual(self.greet(reply).lean_bytes, most)
            # Options go over the usual path alone.
            self.assertEqual(self.greet(reply, wire(option=[("num_ctx", 512)])).lean_bytes, 0)

    def test_servers_that_show_nothing(self) -> None:
        for reply in (Reply(404, b"404 page not found"), Reply(200, b"{}"), Reply(200, b"[]"), Reply(200, b"<html>"),
                      Reply(200, b'{"model_info": null}'), error(400, "what?"), error(503, "busy")):  # fmt: skip
            with self.subTest(reply=reply):
                on = self.greet(reply)  # a busy server is not an absent one
                self.assertIsNone(on.dimensions or on.expected)
                self.assertFalse(on.legacy or on.lean_bytes)

    def test_the_models_digest(self) -> None:
        models = [
            {"name": "other:latest", "digest": "a"},
            {"name": "m:latest", "digest": "b"},
            {"name": "m:1", "digest": "c"},
        ]
        card = Reply(200, b"{}")
        for name, digest in (("m", "b"), ("m:1", "c"), ("m:2", "")):
            on = self.greet(card, wire(model=name), Reply(200, json.dumps({"models": models}).encode()))
            self.assertEqual(on.digest, digest)
        for body in (b"{}", b"[]", b"null", b'{"models": [{}]}', b"<html>"):
            self.assertEqual(self.greet(card, tags=Reply(200, body)).digest, "")

    def test_a_server_that_is_not_there(self) -> None:
        for reply in (REFUSED, SILENCE):
            conversation = wire().greet()
            next(conversation)
            with self.assertRaises(Stop) as caught:
                conversation.send(reply)
            self.assertIn("ollama serve", caught.exception.message)


if __name__ == "__main__":
    unittest.main()
