"""One batch's conversation: what is said for every kind of answer, driven by a list, in no time at all."""

from __future__ import annotations

import base64
import json
import math
import random
import struct
import sys
import unittest
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import embedgen
from embedgen import KNOWN_GOOD, Embedding, Exchange, Failure, Learned, Request, Response, ServerAway, Stop, Wait
from tests.ollama import blob, vector

Serve = Callable[[list[str]], Response]
LEAN, USUAL = "/v1/embeddings", "/api/embed"


def good(texts: list[str], seconds: float = 0.1) -> Response:
    """Return a sound answer."""
    return Response(200, json.dumps({"embeddings": [vector(text) for text in texts]}).encode(), seconds)


def error(status: int, words: object, retry_after: str = "") -> Response:
    """Return an error's answer."""
    return Response(status, json.dumps({"error": words}).encode(), 0.1, {"retry-after": retry_after})


def loaded(context: object) -> Response:
    """Return an answer to /api/ps; the context None is not told."""
    told = {} if context is None else {"context_length": context}
    return Response(200, json.dumps({"models": [{"name": "m:latest", **told}, {"name": "other"}]}).encode())


SILENCE = Response(0, seconds=300.0, reason="no answer within 300 s", timed_out=True)
REFUSED = Response(0, seconds=0.0, reason="connection refused")
NAN = "embedding contains NaN or Inf values"
PROBE = [KNOWN_GOOD]


def setUpModule() -> None:
    """Have all waits take the middle of their time."""
    patch = mock.patch("random.random", return_value=0.5)
    patch.start()
    unittest.addModuleCleanup(patch.stop)


class Settings(NamedTuple):
    """What a protocol is made of."""

    model: str = "m"
    timeout: float = 300.0
    option: Sequence[tuple[str, Any]] = ()
    dimensions: int | None = None
    prefix: str = ""
    context: int = 0
    on_long: str = "cut"


class Server:
    """A server as the parent knows it after the handshake: its protocol and its profile, which batches change."""

    def __init__(self, kind: type[embedgen.Protocol], base64_tokens: int = 0, **settings: Any) -> None:
        path = "/v1" if kind is embedgen.OpenAI else ""
        self.protocol = kind(embedgen.Endpoint("http", "h", 1, path), Settings(**settings))
        self.profile = embedgen.ServerProfile(sample=blob(KNOWN_GOOD), base64_tokens=base64_tokens)
        self.context: object = 4096  # of the loaded model, as /api/ps tells it


OPENAI = (LEAN, "/embeddings")


def as_asked(path: str, reply: Response) -> Response:
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

    def __init__(self, on: Server, texts: Sequence[str], serve: Serve, movable: bool = False) -> None:
        self.sent: list[list[str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.timeouts: list[float] = []
        self.waits: list[float] = []
        self.exchanges: list[Exchange] = []
        self.remarks: list[str] = []
        self.seconds = 0.0
        self.stop: Stop | None = None
        self.results: list[embedgen.Answer] = []
        batch = embedgen.BatchRequest(on.protocol, on.profile, movable)
        conversation = batch.embed(list(texts))
        response: Response | None = None
        try:
            while True:
                step = conversation.send(response)
                response = None
                if isinstance(step, Request) and not step.body:
                    response = loaded(on.context)
                elif isinstance(step, Request):
                    body = json.loads(step.body)
                    asked = [body["input"]] if isinstance(body["input"], str) else body["input"]
                    self.sent.append(asked)
                    self.bodies.append(body)
                    self.paths.append(step.path)
                    self.timeouts.append(step.timeout)
                    response = as_asked(step.path, serve(asked))
                    self.seconds += response.seconds
                elif isinstance(step, Wait):
                    self.waits.append(step.seconds)
                    self.seconds += step.seconds
                elif isinstance(step, Exchange):
                    self.exchanges.append(step)
                elif isinstance(step, Learned):
                    on.profile = on.profile._replace(**step.changes)  # type: ignore[arg-type]
                else:
                    self.remarks.append(step)
                if len(self.sent) > 5000:
                    raise AssertionError("the conversation does not end")
        except StopIteration as end:
            self.results = end.value
        except Stop as stop:
            self.stop = stop

    @property
    def answers(self) -> list[bytes | str]:
        """The vectors, and the reasons why there is none."""
        return [one.vector if isinstance(one, Embedding) else one.reason for one in self.results]


def script(*replies: Response | None) -> Serve:
    """Return a server that gives these answers in turn, None for a good one, and good ones after them."""
    left = list(replies)

    def serve(texts: list[str]) -> Response:
        reply = left.pop(0) if left else None
        return good(texts) if reply is None else reply

    return serve


TEXTS = [f"text {number}" for number in range(8)]
VECTORS = [blob(text) for text in TEXTS]


class Conversations(unittest.TestCase):
    """Over Ollama's usual path; the same tests run over the others below."""

    kind: type[embedgen.Protocol] = embedgen.Ollama
    path, encoding, base64_tokens = USUAL, "decimals over /api/embed", 0

    def server(self, **settings: Any) -> Server:
        """Return a server after its handshake."""
        return Server(self.kind, self.base64_tokens, **settings)

    def talk(self, texts: Sequence[str], serve: Serve, on: Server | None = None, **more: bool) -> Talked:
        """Hold a conversation about a batch."""
        return Talked(on or self.server(), texts, serve, **more)

    def test_a_good_answer(self) -> None:
        talked = self.talk(TEXTS, good)
        self.assertEqual((talked.answers, talked.sent, talked.waits), (VECTORS, [TEXTS], []))
        self.assertEqual(talked.exchanges, [Exchange(8, 0.1, "ok", encoding=self.encoding)])
        self.assertEqual(talked.paths, [self.path])

    def test_what_passes_is_tried_again_with_growing_waits(self) -> None:
        for reply in (
            REFUSED,
            Response(0, reason="connection reset"),
            Response(0, reason="the answer was cut off"),
            error(429, "slow down"),
            error(500, "llama runner process has terminated"),
            error(502, "bad gateway"),
            error(503, "server busy, please try again.  maximum pending requests exceeded"),
            error(400, 'do embedding request: Post "http://127.0.0.1:1/embedding": EOF'),
            error(500, {}),
        ):
            with self.subTest(reply=reply):
                talked = self.talk(TEXTS, script(reply, reply, reply))
                self.assertEqual((talked.answers, talked.sent), (VECTORS, [TEXTS] * 4))
                self.assertEqual(talked.waits, [0.5, 1.0, 2.0])
                outcome = "overloaded" if reply.status else "failed"  # who is not there is not overloaded
                self.assertEqual([one.outcome for one in talked.exchanges], [outcome] * 3 + ["ok"])

    def test_waits_are_jittered(self) -> None:
        on = self.server()
        batch = embedgen.BatchRequest(on.protocol, on.profile)
        with mock.patch("random.random", random.Random(1).random):
            steps = [step for _ in range(9) for step in batch.pause(embedgen.Trouble("busy", ""))]
        waits = [step for step in steps if isinstance(step, Wait)]
        self.assertEqual(len({round(step.seconds, 3) for step in waits}), 9)
        for number, step in enumerate(waits):
            middle = min(0.5 * 2**number, 15.0)
            self.assertTrue(middle * 0.5 <= step.seconds <= middle * 1.5)

    def test_retry_after_is_heeded(self) -> None:
        talked = self.talk(TEXTS, script(error(503, "busy", retry_after="30"), error(429, "busy", retry_after="9999")))
        self.assertEqual(talked.waits, [30.0, 600.0])
        self.assertEqual(talked.answers, VECTORS)
        # Waiting as it is asked to is no reason to give the server up.
        talked = self.talk(TEXTS, script(*[error(429, "busy", retry_after="60")] * 4))
        self.assertEqual((talked.waits, talked.answers), ([60.0] * 4, VECTORS))

    def test_load_is_never_blamed_on_a_row(self) -> None:
        for reply in (error(503, "busy"), error(429, "busy"), error(502, "bad gateway"), REFUSED):
            with self.subTest(reply=reply):
                talked = self.talk(["text 0"], lambda asked, reply=reply: good(asked) if asked == PROBE else reply)
                self.assertIsNotNone(talked.stop)
                self.assertEqual(talked.answers, [])

    def test_words_of_load_are_no_words_about_the_text(self) -> None:
        for reply in (error(504, "upstream took too long to respond"), error(503, "the queue is too long")):
            self.assertEqual(self.talk(["text 0"], script(reply)).answers, VECTORS[:1])

    def test_a_gateway_that_times_out_gets_less(self) -> None:
        late = Response(504, b"", 60.0)
        talked = self.talk(TEXTS, lambda asked: late if len(asked) > 2 else good(asked))
        self.assertEqual(talked.answers, VECTORS)
        self.assertEqual([len(sent) for sent in talked.sent if sent != PROBE], [8, 8, 4, 4, 2, 2, 4, 4, 2, 2])

    def test_a_bad_text_on_a_server_that_answers_every_other_request(self) -> None:
        turn = [0]

        def serve(asked: list[str]) -> Response:
            turn[0] += 1
            return (
                error(400, NAN)
                if asked == ["bad"] and turn[0] % 2
                else error(429, "slow down")
                if turn[0] % 2 == 0
                else good(asked)
            )

        self.assertEqual(self.talk(["bad"], serve).answers, [NAN])

    def test_one_time_out_and_one_refusal_do_not_end_the_run(self) -> None:
        talked = self.talk(TEXTS, script(SILENCE, error(503, "busy")))
        self.assertEqual(talked.answers, VECTORS)

    def test_single_answers_of_other_dimensions_are_not_believed_and_repeated_ones_end_the_run(self) -> None:
        longer = [[0.6] + [number * 0.8 for number in vector(text)] for text in TEXTS]  # of length 1, too
        odd = Response(200, json.dumps({"embeddings": longer}).encode(), 0.1)
        other = Response(200, json.dumps({"embeddings": [[*vector(PROBE[0]), 0.0]]}).encode(), 0.1)
        for before in (0, 1, 3):
            serve = script(*[None] * before, odd)
            for _ in range(3):
                self.assertEqual(self.talk(TEXTS, serve).answers, VECTORS)
        self.assertEqual(self.talk(TEXTS[:1], script(SILENCE, other)).answers, VECTORS[:1])
        for texts, reply in ((TEXTS, odd), (TEXTS[:1], other)):
            stop = self.talk(texts, script(reply, reply, reply)).stop
            self.assertIn("http://h:1", str(stop))
            self.assertIn("vectors of 9 dimensions came instead of 8", str(stop))

    def test_a_server_that_stays_away_stops_the_run(self) -> None:
        for reply in (REFUSED, error(503, "busy"), error(400, "EOF"), SILENCE):
            with self.subTest(reply=reply):
                talked = self.talk(TEXTS, lambda texts, reply=reply: reply)
                assert talked.stop
                self.assertEqual(talked.stop.code, 3)
                self.assertIn("no good answer", talked.stop.message)
                self.assertGreaterEqual(talked.seconds, 120.0)
                self.assertLess(talked.seconds, 120.0 + 30.0 if reply is not SILENCE else 1000.0)

    def test_a_server_that_comes_back_after_ninety_seconds(self) -> None:
        for texts in (TEXTS, TEXTS[:1]):
            for away in (REFUSED, error(502, "bad gateway")):
                clock = [0.0]

                def serve(asked: list[str], away: Response = away, clock: list[float] = clock) -> Response:
                    return good(asked) if clock[0] > 90 else away

                on = self.server()
                conversation = embedgen.BatchRequest(on.protocol, on.profile).embed(list(texts))
                reply: Response | None = None
                try:
                    while True:
                        step = conversation.send(reply)
                        reply = None
                        if isinstance(step, Request) and not step.body:
                            reply = loaded(4096)
                        elif isinstance(step, Request):
                            reply = as_asked(step.path, serve(json.loads(step.body)["input"]))
                        elif isinstance(step, Wait):
                            clock[0] += step.seconds
                except StopIteration as end:
                    self.assertEqual([one.vector for one in end.value], VECTORS[: len(texts)])
                self.assertLess(clock[0], 120.0)

    def test_refused_rows_are_cornered_and_all_others_embedded(self) -> None:
        bad = {"text 2", "text 6"}
        for status, words in [(400, NAN), (500, "failed to encode response: json: unsupported value: NaN"),
                              (400, "the input length exceeds the context length"),
                              (413, "Request Entity Too Large"), (422, {"message": "no"})]:  # fmt: skip
            with self.subTest(words=words):

                def serve(asked: list[str], status: int = status, words: object = words) -> Response:
                    return error(status, words) if bad.intersection(asked) else good(asked)

                talked = self.talk(TEXTS, serve, self.server(on_long="fail"))
                said = "no" if isinstance(words, dict) else words
                expected = [said if text in bad else blob(text) for text in TEXTS]
                self.assertEqual(talked.answers, expected)
                self.assertEqual(talked.waits, [])
                self.assertEqual(talked.sent.count(PROBE), 2)

    def test_no_row_is_failed_for_a_400_before_a_known_good_text_succeeds(self) -> None:
        # The server refuses everything for a while: that is no row's fault.
        talked = self.talk(["text 0"], script(*[error(400, "broken")] * 5))
        self.assertEqual(talked.answers, [blob("text 0")])
        self.assertIn(PROBE, talked.sent)
        talked = self.talk(["text 0"], lambda asked: error(400, "broken"))
        self.assertIsNotNone(talked.stop)

    def test_a_text_that_kills_the_server_each_time(self) -> None:
        def serve(asked: list[str]) -> Response:
            return error(400, "do embedding request: EOF") if "text 5" in asked else good(asked)

        talked = self.talk(TEXTS, serve)
        self.assertEqual(talked.answers[:5] + talked.answers[6:], VECTORS[:5] + VECTORS[6:])
        self.assertEqual(talked.answers[5], "HTTP 400: do embedding request: EOF")
        self.assertLess(talked.seconds, 120.0)

    def test_a_text_that_kills_the_server_for_most_of_a_minute_is_waited_for(self) -> None:
        for reply in (error(500, "CUDA out of memory"), error(400, "EOF")):
            talked = self.talk(["text 5"], lambda asked, reply=reply: good(asked) if asked == PROBE else reply)
            self.assertEqual(talked.waits, sorted(talked.waits))
            self.assertGreater(sum(talked.waits), 40.0)

    def test_such_a_text_anywhere_in_a_large_batch(self) -> None:
        texts = [f"text {number}" for number in range(128)]
        for bad in ("text 0", "text 64", "text 127"):
            for reply in (error(500, "llama runner process has terminated"), error(400, "EOF")):

                def serve(asked: list[str], bad: str = bad, reply: Response = reply) -> Response:
                    return reply if bad in asked else good(asked)

                talked = self.talk(texts, serve)
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
            "twins": {"embeddings": [sound[0]] * 8},
            "an error": {"error": "something"},
            "no object": [1, 2],
        }.items():
            with self.subTest(name):
                reply = Response(200, json.dumps(body).encode(), 0.1)
                # Once: as for a cut-off answer.
                once = self.talk(TEXTS, script(reply))
                self.assertEqual(once.answers, VECTORS)
                self.assertLessEqual(len([sent for sent in once.sent if sent != PROBE]), 2)
                # Twice: the batch is halved.
                twice = self.talk(TEXTS, script(reply, *[None] * (name == "longer"), reply))
                self.assertEqual(twice.answers, VECTORS)

        for junk in (b"", b"<html>", b"{", b"\xff\xfe", b"null", b'"x"'):
            with self.subTest(junk=junk):
                self.assertEqual(self.talk(TEXTS, script(Response(200, junk), Response(200, junk))).answers, VECTORS)

    def test_one_text_whose_answer_is_always_unusable_fails_alone(self) -> None:
        def serve(asked: list[str]) -> Response:
            vectors = [[0.0] * 8 if text == "text 3" else vector(text) for text in asked]
            return Response(200, json.dumps({"embeddings": vectors}).encode(), 0.1)

        talked = self.talk(TEXTS, serve)
        self.assertEqual(talked.answers, [*VECTORS[:3], "a vector is all zero", *VECTORS[4:]])

    def test_texts_that_a_tokenizer_cannot_tell_apart_may_share_a_vector(self) -> None:
        same = json.dumps({"embeddings": [vector("x"), vector("x")]}).encode()
        talked = self.talk(["The Cafe", "the cafe!"], lambda asked: Response(200, same))
        self.assertEqual((talked.answers, len(talked.sent)), ([blob("x")] * 2, 1))

    def test_silence_asks_for_less_and_waits_longer(self) -> None:
        def serve(asked: list[str]) -> Response:
            return SILENCE if len(asked) > 2 else good(asked)

        talked = self.talk(TEXTS, serve)
        self.assertEqual(talked.answers, VECTORS)
        sizes = [len(sent) for sent in talked.sent if sent != PROBE]
        self.assertEqual(sizes, [8, 4, 2, 2, 4, 2, 2])
        # Before each further request, a short text has shown that the server has time again.
        self.assertEqual(talked.sent[1], PROBE)
        self.assertGreater(talked.timeouts[1], talked.timeouts[0])
        self.assertEqual([one.outcome for one in talked.exchanges if one.outcome != "ok"], ["timeout"] * 3)

    def test_a_row_fails_when_alone_it_times_out_three_times(self) -> None:
        def serve(asked: list[str]) -> Response:
            return SILENCE if "text 6" in asked else good(asked)

        talked = self.talk(TEXTS, serve)
        self.assertEqual(talked.answers, [*VECTORS[:6], "no answer within 300 s", VECTORS[7]])
        self.assertEqual(talked.sent.count(["text 6"]), 3)

    def test_a_server_that_takes_one_string_only(self) -> None:
        def serve(asked: list[str]) -> Response:
            return next(refusals, None) or good(asked)

        for words in (
            "Input should be a valid string",
            "json: cannot unmarshal array into Go struct field of type string",
        ):
            refusals = iter([error(422, words)])
            on = self.server()
            talked = self.talk(TEXTS, serve, on)
            self.assertEqual((talked.answers, talked.waits, on.profile.most_texts), (VECTORS, [], 1))
            self.assertEqual(talked.bodies[0]["input"], TEXTS)
            self.assertEqual(sorted(body["input"] for body in talked.bodies[1:]), TEXTS)

    def test_what_no_retry_can_mend_stops_at_once(self) -> None:
        for reply, words in [
            (error(401, "unauthorized"), "OLLAMA_API_KEY"),
            (error(403, "forbidden"), "OLLAMA_API_KEY"),
            (error(404, 'model "m" not found, try pulling it first'), "ollama pull m"),
            (error(404, "model 'm' not found"), "ollama pull m"),
            (error(400, "this model does not support embeddings"), "cannot embed"),
            (Response(301, b""), "final address"),
            (Response(302, b"", headers={"location": "https://h/ollama/"}), "Give --server https://h/ollama/."),
        ]:
            with self.subTest(reply=reply):
                talked = self.talk(TEXTS, lambda asked, reply=reply: reply)
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

        def serve(asked: list[str]) -> Response:
            chance = draw.random()
            for share, reply in [
                (0.10, error(500, "out of memory")), (0.05, Response(0, reason="connection reset")),
                (0.05, Response(0, reason="the answer was cut off")), (0.01, SILENCE), (0.02, error(503, "busy")),
                (0.02, error(400, "EOF")), (0.01, Response(200, b'{"embeddings": []}')),
                (0.01, Response(200, json.dumps({"embeddings": [[0.0] * 8] * len(asked)}).encode())),
            ]:  # fmt: skip
                if chance < share:
                    return reply
                chance -= share
            return error(400, NAN) if poison.intersection(asked) else good(asked)

        for start in range(0, 600, 24):
            batch = texts[start : start + 24]
            talked = self.talk(batch, serve)
            self.assertEqual(talked.answers, [NAN if text in poison else blob(text) for text in batch])


class OverBase64(Conversations):
    """Over the path that gives vectors as base64, which every text here is short enough for."""

    path, encoding, base64_tokens = LEAN, "base64 over /v1/embeddings", 100 + embedgen.CONTEXT_MARGIN

    def test_what_is_asked_for(self) -> None:
        on = self.server(dimensions=8, prefix="doc: ")
        expected = {"model": "m", "dimensions": 8, "encoding_format": "base64"}
        self.assertEqual(self.talk(TEXTS, good, on).bodies, [{**expected, "input": ["doc: " + text for text in TEXTS]}])

    def test_a_batch_with_a_text_that_might_be_cut_takes_the_usual_path(self) -> None:
        on = self.server()
        for text, path in (("x" * 100, LEAN), ("x" * 101, USUAL), ("é" * 50, LEAN), ("é" * 51, USUAL), ("y", LEAN)):
            talked = self.talk(["short", text], good, on)
            self.assertEqual((talked.paths, talked.answers), ([path], [blob("short"), blob(text)]))

    def test_what_a_smaller_context_may_have_cut_is_asked_for_again(self) -> None:
        for context, kept in ((64, 64), (10, 10), (None, 0), ("many", 0)):
            on = self.server()
            on.context = context
            talked = self.talk(["short", "x" * 60], good, on)
            self.assertEqual((talked.paths, talked.waits), ([LEAN, USUAL], []))
            self.assertEqual((talked.answers, on.profile.base64_tokens), ([blob("short"), blob("x" * 60)], kept))
            self.assertEqual(self.talk(["short"], good, on).paths, [LEAN if kept == 64 else USUAL])

    def test_a_tokenizer_may_spell_out_one_character(self) -> None:
        for text, path in (("\ufdfa" * 3, LEAN), ("\ufdfa" * 4, USUAL)):  # one of them is eighteen letters, 33 bytes
            self.assertEqual(self.talk([text], good).paths, [path])

    def test_a_server_without_base64_is_asked_over_the_usual_path_from_then_on(self) -> None:
        def serve(asked: list[str]) -> Response:
            return data(*map(vector, asked))

        on = self.server()
        talked = self.talk(TEXTS, serve, on)
        self.assertEqual((talked.answers, talked.paths), (VECTORS, [LEAN]))
        talked = self.talk(TEXTS, good, on)
        self.assertEqual((talked.answers, talked.paths), (VECTORS, [USUAL]))

    def test_the_path_may_go_away_in_mid_run_but_is_not_left_for_a_fault(self) -> None:
        on = self.server()
        for reply in (error(503, "busy"), error(500, "crashed"), error(400, NAN), Response(200, b"<html>"), SILENCE):
            self.assertEqual(set(self.talk(TEXTS, script(reply), on).paths), {LEAN})
        talked = self.talk(TEXTS, script(Response(404, b"404 page not found")), on)
        self.assertEqual((talked.paths, talked.waits, talked.answers), ([LEAN, USUAL], [], VECTORS))
        self.assertEqual(self.talk(TEXTS, good, on).paths, [USUAL])

    def test_what_no_retry_can_mend_stops_at_once(self) -> None:
        """As over the usual path."""


def data(*vectors: Any) -> Response:
    """Return an answer in OpenAI's form with these vectors, lists of numbers or base64."""
    return Response(200, json.dumps({"data": [{"index": i, "embedding": v} for i, v in enumerate(vectors)]}).encode())


# What servers say of a text that is too long, in their own words: of Ollama's, llama-server's, vLLM's, OpenAI's, TEI's
# and others' sources and issues.
TOO_LONG = (
    (400, "the input length exceeds the context length"),
    (400, "input exceeds maximum context length and cannot be truncated further"),
    (500, "input is too large to process. increase the physical batch size"),
    (500, "input (600 tokens) is too large to process. increase the physical batch size (current batch size: 512)"),
    (400, "the request exceeds the available context size. try increasing the context size or enable context shift"),
    (500, "input prompt is too big compared to KV size. Please try increasing KV size."),
    (400, "input (2183 tokens) is larger than the max context size (2048 tokens). skipping"),
    (400, "This model's maximum context length is 512 tokens. However, you requested 600 tokens in the input for "
          "embedding generation. Please reduce the length of the input."),
    (400, "The decoder prompt (length 600) is longer than the maximum model length of 512."),
    (400, "Invalid 'input[0]': maximum input length is 8192 tokens."),
    (413, "`inputs` must have less than 512 tokens. Given: 600"),
    (422, "Input text exceeds maximum length of 8194 tokens"),
    (400, "The input token count exceeds the maximum number of tokens allowed (2048)."),
)  # fmt: skip
# And of too many texts at once.
TOO_MANY = (
    (422, "batch size {given} > maximum allowed batch size {most}"),
    (413, "batch size {given} > maximum allowed batch size {most}"),
    (400, "Invalid 'input': array too long. Expected an array with maximum length {most}, but got an array with length "
          "{given} instead."),
    (400, "Too many inputs. The max number of inputs is {most}.  We hope to increase the number soon."),
    (422, "List should have at most {most} items after validation, not {given}"),
    (400, "batch size is invalid, it should not be larger than {most}.: input.contents"),
    (400, "* BatchEmbedContentsRequest.requests: at most {most} requests can be in one batch"),
    (400, "Too many inputs in request, split into more batches."),
    (400, "Requested 316842 tokens, max 300000 tokens per request"),  # all texts together
)  # fmt: skip


class OverOpenAI(Conversations):
    """All that holds of a conversation with Ollama, over the other protocol."""

    kind = embedgen.OpenAI
    path, encoding, base64_tokens = "/embeddings", "base64 over /v1/embeddings", sys.maxsize

    def test_what_no_retry_can_mend_stops_at_once(self) -> None:
        for reply, words in [
            (error(401, "Incorrect API key provided"), "OPENAI_API_KEY or OLLAMA_API_KEY"),
            (error(403, "forbidden"), "OPENAI_API_KEY or OLLAMA_API_KEY"),
            (error(404, "The model `m` does not exist or you do not have access to it."), 'no model "m"'),
            (error(404, 'model "m" not found, try pulling it first'), 'no model "m"'),
            (error(400, "/embeddings: Invalid model name passed in model=m. Call `/v1/models`"), 'no model "m"'),
            (error(404, "No models loaded. Please load a model"), 'no model "m"'),
            (error(501, "This server does not support embeddings. Start it with `--embeddings`"), "cannot embed"),
            (error(400, "The model does not support Embeddings API"), "cannot embed"),
            (Response(308, b""), "final address"),
        ]:
            with self.subTest(reply=reply):
                talked = self.talk(TEXTS, lambda asked, reply=reply: reply)
                assert talked.stop
                self.assertEqual(talked.stop.code, 3)
                # Of words about a model in a 400, the known-good text is asked for before they are believed.
                self.assertEqual(len(talked.sent) > 1, reply.status == 400 and b"model name" in reply.body)
                self.assertIn(words, talked.stop.message)

    def test_what_is_asked_for(self) -> None:
        on = self.server(dimensions=8, prefix="doc: ")
        expected = {"model": "m", "input": ["doc: " + text for text in TEXTS], "dimensions": 8}
        self.assertEqual(self.talk(TEXTS, good, on).bodies, [{**expected, "encoding_format": "base64"}])
        on.profile = on.profile._replace(base64_tokens=0)
        self.assertEqual(self.talk(TEXTS, good, on).bodies, [expected])

    def test_vectors_are_stored_as_they_come(self) -> None:
        long = [[3 * number for number in vector(text)] for text in TEXTS]
        reply = Response(200, json.dumps({"embeddings": long}).encode())
        self.assertEqual(self.talk(TEXTS, script(reply)).answers, [embedgen.pack(numbers) for numbers in long])

    def test_items_in_any_order_with_an_index_or_none_in_either_form(self) -> None:
        items = [{"index": i, "embedding": in_base64(vector(text))} for i, text in enumerate(TEXTS)]
        items[3]["embedding"] = vector(TEXTS[3])  # as from another server behind one address
        plain = [{"embedding": item["embedding"]} for item in items]
        for some in (items, items[::-1], items[4:] + items[:4], plain):
            reply = Response(200, json.dumps({"data": some}).encode())
            self.assertEqual(self.talk(TEXTS, script(reply)).answers, VECTORS)
        items[7]["index"] = 6  # twice
        self.assertEqual(len(self.talk(TEXTS, script(Response(200, json.dumps({"data": items}).encode()))).sent), 2)

    def test_too_long_in_all_words(self) -> None:
        for status, words in TOO_LONG:
            with self.subTest(words=words):

                def serve(asked: list[str], status: int = status, words: str = words) -> Response:
                    return error(status, words) if "text 3" in asked else good(asked)

                for kind in (embedgen.OpenAI, embedgen.Ollama):
                    talked = self.talk(TEXTS, serve, Server(kind, on_long="skip"))
                    self.assertEqual(talked.answers, [*VECTORS[:3], words, *VECTORS[4:]])
                    self.assertEqual(talked.results[3], Failure(words, "too_long"))
                    self.assertEqual(talked.waits, [])
        for status, words in ((400, "batch size too large"), (500, "out of memory"), (400, "string too long to parse")):
            on = self.server(on_long="skip")
            talked = self.talk(
                ["a"], lambda asked, s=status, w=words: good(asked) if asked == PROBE else error(s, w), on
            )
            [answer] = talked.results
            self.assertNotIn(getattr(answer, "kind", "too_long"), ("too_long", "later"))

    def test_the_most_texts_that_a_server_takes_are_learned_once(self) -> None:
        for status, words in TOO_MANY:
            with self.subTest(words=words):
                on = self.server()
                texts = [f"text {number}" for number in range(30)]

                def serve(asked: list[str], status: int = status, words: str = words) -> Response:
                    return error(status, words.format(given=len(asked), most=10)) if len(asked) > 10 else good(asked)

                talked = self.talk(texts, serve, on)
                self.assertEqual((talked.answers, talked.waits), ([blob(text) for text in texts], []))
                self.assertNotIn(PROBE, talked.sent)
                refused = [len(sent) for sent in talked.sent if len(sent) > 10]
                self.assertEqual(refused, [30, 15])
                self.assertEqual((talked.exchanges[0].texts, talked.exchanges[0].outcome), (30, "failed"))
                self.assertLessEqual(max(map(len, self.talk(texts, serve, on).sent)), 10)
                self.assertEqual(on.profile.most_texts, 7)

    def test_encoding_format_refused_in_mid_run(self) -> None:
        on = self.server()
        refused = error(422, "encoding_format: no such field")
        self.assertEqual(self.talk(TEXTS, script(refused), on).answers, VECTORS)
        self.assertEqual(on.profile.base64_tokens, 0)
        failed = self.talk(["a"], lambda asked: good(asked) if asked == PROBE else refused, on)
        self.assertEqual(failed.answers, ["encoding_format: no such field"])  # of one that did not ask for it

    def test_errors_of_all_shapes(self) -> None:
        for body, words in (
            ({"error": "words"}, "words"),
            ({"error": {"message": "words", "type": "x", "code": None}}, "words"),
            ({"object": "error", "message": "words", "code": 40001}, "words"),
            ({"statusCode": 400, "error": "Bad Request", "message": "words"}, "words"),
            ({"detail": "words"}, "words"),
            ({"detail": [{"loc": ["body", "input"], "msg": "words", "input": []}]}, "words"),
            ({"detail": {"error": {"message": "words"}}}, "words"),
            ([{"error": {"code": 400, "message": "words"}}], "words"),
            ({"error": {}}, '{"error": {}}'),
            ({"errors": "é\n/"}, '{"errors": "é\\n/"}'),
            ([], "[]"),
        ):
            with self.subTest(body=body):
                self.assertEqual(embedgen.words_of(json.dumps(body).encode()), words)
        page = b"<html>\n<head><title> 413 Request\nEntity Too Large </title></head></html>"
        self.assertEqual(embedgen.words_of(page), 'an HTML page, "413 Request Entity Too Large"')


class Leaving(unittest.TestCase):
    """When a conversation leaves its texts to other servers."""

    def leave(self, serve: Serve) -> Talked:
        """Hold a conversation that may leave its texts to others."""
        return Talked(Server(embedgen.Ollama), TEXTS, serve, movable=True)

    def test_at_once_if_nobody_is_there(self) -> None:
        talked = self.leave(script(REFUSED))
        assert isinstance(talked.stop, ServerAway)
        self.assertEqual((talked.stop.reason, talked.waits), ("connection refused", []))

    def test_after_some_seconds_if_it_is_busy(self) -> None:
        talked = self.leave(lambda texts: error(503, "server busy"))
        self.assertIsInstance(talked.stop, ServerAway)
        self.assertTrue(3.0 < talked.seconds < 15.0)
        self.assertEqual(self.leave(script(error(503, "server busy"))).answers, VECTORS)  # but not for once

    def test_at_once_if_it_asks_for_a_long_wait(self) -> None:
        talked = self.leave(script(error(429, "slow down", retry_after="60")))
        assert isinstance(talked.stop, ServerAway)
        self.assertEqual((talked.stop.retry_after, talked.waits), (60.0, []))

    def test_not_if_the_texts_may_be_to_blame(self) -> None:
        dead = error(500, "llama runner process has terminated")
        self.assertIsNone(self.leave(lambda texts: good(texts) if texts == PROBE else dead).stop)
        talked = self.leave(lambda texts: dead)  # but the server is: it cannot bear the known-good text either
        self.assertIsInstance(talked.stop, ServerAway)
        self.assertLess(talked.seconds, 30.0)


class Long(unittest.TestCase):
    """What is learnt from texts that are too long, and how parts are put together."""

    REFUSAL = "the input length exceeds the context length"

    def test_texts_as_long_as_one_that_was_too_long_are_asked_for_alone(self) -> None:
        def serve(texts: list[str]) -> Response:
            return error(400, self.REFUSAL) if any(text.startswith("long ") for text in texts) else good(texts)

        on = Server(embedgen.Ollama, on_long="skip")
        Talked(on, [*TEXTS, "long " * 20], serve)
        self.assertEqual(on.profile.long_from, 100)
        talked = Talked(on, ["long " * 20, *TEXTS, "long " * 30], serve)
        self.assertEqual([sent for sent in talked.sent if sent != PROBE], [["long " * 30], ["long " * 20], TEXTS])
        self.assertEqual(talked.results[::9], [Failure(self.REFUSAL, "too_long")] * 2)
        self.assertEqual(talked.answers[1:9], VECTORS)
        Talked(on, ["long " * 15], serve)  # less is too long, too
        self.assertEqual(on.profile.long_from, 75)
        taken = ["other" * 20, "other" * 16]
        self.assertEqual(Talked(on, taken, serve).sent, [taken[:1], taken[1:]])
        self.assertEqual(on.profile.long_from, 101)  # what was taken is not too long
        self.assertEqual(Talked(on, taken, serve).sent, [taken[::-1]])

    def test_texts_that_fail_for_their_length_are_asked_for_alone(self) -> None:
        def serve(texts: list[str]) -> Response:
            return error(400, self.REFUSAL) if any(text.startswith("long ") for text in texts) else good(texts)

        on = Server(embedgen.Ollama, on_long="fail")
        Talked(on, ["long " * 20], serve)
        talked = Talked(on, ["long " * 20, *TEXTS, "long " * 30], serve)
        self.assertEqual(talked.sent, [["long " * 30], PROBE, ["long " * 20], PROBE, TEXTS])
        self.assertEqual(talked.results[::9], [Failure(self.REFUSAL)] * 2)
        self.assertEqual(talked.answers[1:9], VECTORS)

    def test_a_part_counts_by_its_length(self) -> None:
        one, other = embedgen.pack([1.0, 0.0]), embedgen.pack([0.0, 1.0])
        mean = embedgen.unpack(embedgen.mean([(30, one), (40, other)]))
        self.assertAlmostEqual(mean[0], 0.6, 6)
        self.assertAlmostEqual(mean[1], 0.8, 6)

    def split(self, text: str, most: int) -> tuple[bytes, list[list[str]], list[str]]:
        """Have a text split by a server that takes so many characters: its vector, what was sent, and the remarks."""

        def serve(texts: list[str]) -> Response:
            return error(400, self.REFUSAL) if max(map(len, texts)) > most else good(texts)

        talked = Talked(Server(embedgen.Ollama, on_long="split"), [text], serve)
        [answer] = talked.results
        assert isinstance(answer, Embedding) and answer.fit == "split"
        return answer.vector, [sent for sent in talked.sent if sent not in (PROBE, [text])], talked.remarks

    def test_the_parts_of_a_text_are_weighted(self) -> None:
        text = " ".join(f"{number} " + "is a number." * (number % 7) for number in range(30))
        stored, sent, _ = self.split(text, 200)
        parts = sent[-1]  # all in one request, after those that have found out how long they may be
        self.assertEqual("".join(sorted(parts, key=text.index)), text)
        self.assertGreater(len(set(map(len, parts))), 2, "they must differ to show it")
        sums = [sum(len(part) * vector(part)[i] for part in parts) for i in range(8)]
        norm = math.hypot(*sums)
        for number, expected in zip(embedgen.unpack(stored), sums):
            self.assertAlmostEqual(number, expected / norm, 6)

    def test_a_very_long_text_takes_few_requests_and_is_remarked_on(self) -> None:
        text = "".join(f"This is sentence {number:5} of them all. " for number in range(5000))
        _, sent, remarks = self.split(text, 1000)
        parts = [part for parts in sent for part in parts if len(parts) > 1]
        self.assertEqual("".join(sorted(parts, key=text.index)), text)
        self.assertLess(len(sent), len(parts) / embedgen.PARTS_TOGETHER + 14)
        self.assertEqual(remarks, [f"a text of 180000 characters is split into {len(parts)} parts: {text[:50]!r}..."])

    def test_parts_that_the_server_finds_too_long_are_made_smaller_together(self) -> None:
        text = "wide words of letters " * 400 + "a " * 4000  # the second half has more tokens to the character

        def serve(texts: list[str]) -> Response:
            return error(400, self.REFUSAL) if max(len(text.split()) for text in texts) > 250 else good(texts)

        on = Server(embedgen.Ollama, on_long="split")
        talked = Talked(on, [text], serve)
        self.assertEqual([answer.fit for answer in talked.results if isinstance(answer, Embedding)], ["split"])
        self.assertLess(len(talked.sent), 1.3 * (1600 + 4000) / 250)

    def test_parts_that_take_too_long_together_go_in_smaller_requests(self) -> None:
        text = "".join(f"This is sentence {number:5} of them all. " for number in range(100))

        def serve(texts: list[str]) -> Response:
            return error(400, self.REFUSAL) if max(map(len, texts)) > 250 else SILENCE if texts[2:] else good(texts)

        [answer] = Talked(Server(embedgen.Ollama, on_long="split"), [text], serve).results
        self.assertIsInstance(answer, Embedding, answer)

    def test_where_a_text_is_divided(self) -> None:
        for sentence in ("One two three. ", "One two three four five. ", "第一句第二句。", "one line\n", "word "):
            text = (sentence * 1000)[:3000]
            for most in (200, 1000, 2500, 2999):
                parts = embedgen.parts_of(text, most)
                self.assertEqual("".join(parts), text)
                self.assertTrue(all(part.endswith(sentence) for part in parts[:-1]), parts)
                self.assertLessEqual(max(map(len, parts)), most)
                self.assertLessEqual(len(parts), len(text) / most * 1.2 + 1)
        self.assertEqual(embedgen.parts_of("x" * 10, 5), ["xxxxx", "xxxxx"])  # there is no border
        self.assertEqual(embedgen.parts_of("ab", 1), ["a", "b"])
        self.assertEqual(embedgen.parts_of("a", 1), ["a"])
        self.assertEqual(embedgen.parts_of("a" + " " * 100 + "b", 20)[1:-1], [])  # blanks alone are no text


class Handshake(unittest.TestCase):
    """What is found out about a server before the first row, and how one of no use ends it."""

    def shake(self, kind: type[embedgen.Protocol], *replies: Response, **settings: Any) -> embedgen.ServerProfile:
        """Do a handshake with a server that answers so; return its profile."""
        on = Server(kind, **settings)
        self.sent: list[tuple[str, Any]] = []
        self.seconds = 0.0
        left, reply = list(replies), None
        conversation = embedgen.handshake(on.protocol)
        try:
            while True:
                step = conversation.send(reply)
                reply = None
                if isinstance(step, Request):
                    self.sent.append((step.path, json.loads(step.body) if step.body else None))
                    reply = self.loaded if step.path == "/api/ps" else left.pop(0)
                    self.seconds += reply.seconds
                elif isinstance(step, Wait):
                    self.seconds += step.seconds
        except StopIteration as end:
            self.assertEqual(left, [])
            profile: embedgen.ServerProfile = end.value
            return profile

    def stop(self, kind: type[embedgen.Protocol], *replies: Response, **settings: Any) -> Stop:
        """Do a handshake with a server that is of no use; return the end, which must be soon."""
        with self.assertRaises(Stop) as caught:
            self.shake(kind, *replies, **settings)
        self.assertLess(self.seconds, 5.0)
        return caught.exception

    loaded = loaded(4096)
    numbers = vector(KNOWN_GOOD)
    decimals = Response(200, json.dumps({"embeddings": [vector(KNOWN_GOOD)]}).encode())
    none = Response(404, b"404 page not found")

    def card(self, context: int | None = 512, parameters: str = "", **more: Any) -> Response:
        """Return an answer to /api/show."""
        info = {"general.architecture": "bert", "bert.embedding_length": 8, "bert.context_length": context}
        return Response(200, json.dumps({"model_info": info, "parameters": parameters, **more}).encode())

    def test_all_that_an_ollama_tells(self) -> None:
        models = [{"name": f"{name}:latest", "digest": digest} for name, digest in (("other", "a"), ("m", "b"))]
        self.loaded = loaded(128)
        profile = self.shake(
            embedgen.Ollama,
            self.decimals,
            self.card(modelfile="# comment\nFROM /blobs/sha256-77\n"),
            Response(200, json.dumps({"models": models}).encode()),
            Response(200, b'{"version": "0.14.0"}'),
            data(in_base64(self.numbers)),
            prefix="doc: ",
        )
        expected = embedgen.ServerProfile(blob(KNOWN_GOOD), "b", "77", "0.14.0", 128)
        self.assertEqual(profile, expected)
        paths = ["/api/embed", "/api/show", "/api/tags", "/api/version", "/v1/embeddings", "/api/ps"]
        self.assertEqual([path for path, _ in self.sent], paths)
        self.assertEqual(self.sent[0][1], {"model": "m", "input": ["doc: " + KNOWN_GOOD], "truncate": False})

    def test_the_model_card_and_the_loaded_model_tell_which_texts_cannot_be_cut(self) -> None:
        lean = data(in_base64(self.numbers))
        for context, parameters, told, most in (
            (512, "", 4096, 512),
            (2048, "", 4096, 2048),
            (32768, "", 32768, 2048),  # Ollama may not use all of it
            (512, "num_ctx                        256\ntemperature 1", 256, 256),
            (2048, "num_ctx 8192", 8192, 2048),
            (2048, "num_batch 512", 2048, 512),
            (2048, "", 128, 128),
            (2048, "", None, 0),
            (2048, "", "many", 0),
        ):
            card = self.card(context, parameters)
            self.loaded = loaded(told)
            profile = self.shake(embedgen.Ollama, self.decimals, card, self.none, self.none, lean)
            self.assertEqual(profile.base64_tokens, most)
        # Options go over the usual path alone.
        option = [("num_ctx", 512)]
        profile = self.shake(embedgen.Ollama, self.decimals, card, self.none, self.none, option=option)
        self.assertEqual(profile.base64_tokens, 0)
        card = self.card(None)
        self.assertEqual(self.shake(embedgen.Ollama, self.decimals, card, self.none, self.none).base64_tokens, 0)

    def test_servers_that_show_nothing(self) -> None:
        for reply in (Response(404, b"404 page not found"), Response(200, b"{}"),
                      Response(200, b"[]"), error(400, "what?"), Response(200, b"<html>"),
                      Response(200, b'{"model_info": null}')):  # fmt: skip
            with self.subTest(reply=reply):
                profile = self.shake(embedgen.Ollama, self.decimals, reply, reply, reply)
                self.assertEqual(profile, embedgen.ServerProfile(blob(KNOWN_GOOD)))

    def test_a_moments_trouble_does_not_hide_what_an_ollama_tells(self) -> None:
        tags = Response(200, b'{"models": [{"name": "m:latest", "digest": "b"}]}')
        replies = [self.decimals, self.none, error(503, "busy"), error(500, "crashed"), tags, self.none]
        self.assertEqual(self.shake(embedgen.Ollama, *replies).digest, "b")
        busy = [error(503, "busy")] * 3
        self.assertEqual(self.shake(embedgen.Ollama, self.decimals, *busy, *busy, *busy).digest, "")

    def test_base64_only_where_it_gives_the_same_vector_without_trouble(self) -> None:
        swapped = struct.unpack(">8f", struct.pack("<8f", *self.numbers))
        for name, reply in {
            "ignored": data(self.numbers),
            "big-endian": data(in_base64(swapped)),
            "doubles": data(in_base64(self.numbers + self.numbers)),
            "half": data(in_base64(self.numbers[:4])),
            "no whole number": data("AAAA"),
            "a byte more": data(base64.b64encode(struct.pack("<8f", *self.numbers) + b"x").decode()),
            "zeros": data(in_base64([0.0] * 8)),
            "another vector": data(in_base64(vector("other"))),
            "no path": self.none,
            "no access": Response(403, b"<html>"),
            "no method": Response(405),
            "redirect": Response(301),
            "a page": Response(200, b"<html>"),
            "400": error(400, "unknown field encoding_format"),
            "422": error(422, "Input should be 'float'"),
            "500": error(500, "internal server error"),
        }.items():
            with self.subTest(name):
                card = [self.card(), self.none, self.none]
                self.assertEqual(self.shake(embedgen.Ollama, self.decimals, *card, reply).base64_tokens, 0)
                self.assertEqual(self.shake(embedgen.OpenAI, data(self.numbers), reply).base64_tokens, 0)
        first = data(self.numbers)._replace(headers={"server": "vLLM"})  # of the second, a proxy may be the author
        profile = self.shake(
            embedgen.OpenAI, first, data(in_base64(self.numbers))._replace(headers={"server": "nginx"})
        )
        self.assertEqual(profile, embedgen.ServerProfile(blob(KNOWN_GOOD), version="vLLM", base64_tokens=sys.maxsize))
        self.assertEqual([body for _, body in self.sent], [{"model": "m", "input": PROBE},
                         {"model": "m", "input": PROBE, "encoding_format": "base64"}])  # fmt: skip

    def test_a_busy_server_is_waited_for(self) -> None:
        for reply in (error(503, "Loading model"), error(429, "overloaded"), error(500, "crashed"),
                      Response(200, b"<html>"), data([0.0] * 8)):  # fmt: skip
            with self.subTest(reply=reply):
                profile = self.shake(embedgen.OpenAI, reply, data(self.numbers), data(in_base64(self.numbers)))
                self.assertEqual((profile.base64_tokens, profile.dimensions), (sys.maxsize, 8))

    def test_a_server_that_is_not_there(self) -> None:
        away = self.stop(embedgen.OpenAI, REFUSED, REFUSED)
        self.assertIsInstance(away, ServerAway)
        self.assertIn("cannot reach a server at http://h:1/v1 (connection refused)", away.message)
        self.assertNotIn("ollama", away.message)
        away = self.stop(embedgen.Ollama, REFUSED, REFUSED)
        self.assertIn("connection refused", away.message)
        self.assertIn("ollama serve", away.message)

    def test_answers_that_are_no_embeddings_end_it_at_once_with_the_likely_cause(self) -> None:
        for reply in (Response(200, b"<html><title>Sign in</title>"), error(200, "Unexpected endpoint or method.")):
            said = self.stop(embedgen.Ollama, *[reply] * 5).message
            self.assertIn("add /v1 to the address", said)
            self.assertRegex(said, "Sign in|Unexpected endpoint")
            self.assertIn("embeddings", self.stop(embedgen.OpenAI, reply, reply).message)
        self.assertRegex(self.stop(embedgen.OpenAI, *[error(400, "No.")] * 2).message, r": No\. \w")  # one full stop

    def test_an_older_ollama_is_to_be_upgraded(self) -> None:
        said = self.stop(embedgen.Ollama, self.none).message
        self.assertRegex(said, r"no /api/embed .*Upgrade it .*/v1")

    def test_a_server_that_takes_one_string_only(self) -> None:
        profile = self.shake(embedgen.OpenAI, error(422, "Input should be a valid string"), data(self.numbers),
                             data(in_base64(self.numbers)))  # fmt: skip
        self.assertEqual((profile.most_texts, profile.dimensions), (1, 8))

    def test_a_missing_model_and_other_refusals_that_no_row_is_to_blame_for(self) -> None:
        missing = error(404, "The model `m` does not exist.")
        said = self.stop(embedgen.OpenAI, missing, error(404, "no list")).message
        self.assertRegex(said, r'no model "m" .*does not exist.*--model NAME\.$')
        models = Response(200, b'{"data": [{"id": "other"}, {"id": "m:latest"}, {"id": "m2"}]}', 0.1)
        self.assertRegex(self.stop(embedgen.OpenAI, missing, models).message, r"Did you mean m\?$")
        words = 'Model "m" does not support matryoshka representation'
        self.assertIn(words, self.stop(embedgen.OpenAI, *[error(400, words)] * 2, dimensions=4).message)
        self.assertIn("OPENAI_API_KEY", self.stop(embedgen.OpenAI, error(401, "no")).message)
        self.assertIn("/embeddings", self.stop(embedgen.OpenAI, error(404, "Not Found")).message)

    def test_other_dimensions_than_were_asked_for(self) -> None:
        longer = [*self.numbers, 1.0]
        said = self.stop(embedgen.OpenAI, data(longer), data(in_base64(longer)), dimensions=8).message
        self.assertIn("vectors of 9 dimensions came instead of 8", said)
        self.assertIn("Leave out --dimensions", said)


if __name__ == "__main__":
    unittest.main()
