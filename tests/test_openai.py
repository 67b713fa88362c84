"""Servers of the OpenAI protocol: what is asked of them, what they answer, and the main job over their wire."""

from __future__ import annotations

import json
import re
import unittest
from array import array
from collections.abc import Sequence
from typing import Any
from unittest import mock

import embedgen
from embedgen import KNOWN_GOOD, Away, Reply, Send, Stop
from tests import test_conversation as conversations
from tests import test_endings, test_main_job
from tests.ollama import Ollama, blob, vector
from tests.support import ENGINES, Case
from tests.test_conversation import PROBE, REFUSED, SILENCE, TEXTS, VECTORS, Talked, error, good, in_base64, script

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
# And of too many texts at once: the words, and the number that they name.
TOO_MANY = (
    (422, "batch size {given} > maximum allowed batch size {most}", True),
    (413, "batch size {given} > maximum allowed batch size {most}", True),
    (400, "Invalid 'input': array too long. Expected an array with maximum length {most}, but got an array with length "
          "{given} instead.", True),
    (400, "Too many inputs. The max number of inputs is {most}.  We hope to increase the number soon.", True),
    (422, "List should have at most {most} items after validation, not {given}", True),
    (400, "batch size is invalid, it should not be larger than {most}.: input.contents", True),
    (400, "* BatchEmbedContentsRequest.requests: at most {most} requests can be in one batch", True),
    (400, "Too many inputs in request, split into more batches.", False),
    (400, "Requested 316842 tokens, max 300000 tokens per request", False),  # all texts together
)  # fmt: skip


class OverOpenAI(conversations.Conversations):
    """All that holds of a conversation with Ollama, over the other wire."""

    path, way, unit_length = "/embeddings", "base64 over /v1/embeddings", False

    def setUp(self) -> None:
        super().setUp()
        patch = mock.patch.object(conversations, "protocol", embedgen.OpenAIWire)
        patch.start()
        self.addCleanup(patch.stop)

    def test_an_older_server(self) -> None:
        """There is but one path."""
        talked = Talked(TEXTS, lambda asked: Reply(404, b"404 page not found"))
        assert talked.stop
        self.assertIn("/embeddings", talked.stop.message)
        self.assertEqual(talked.paths, ["/embeddings"])

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
            (Reply(308, b""), "final address"),
        ]:
            with self.subTest(reply=reply):
                talked = Talked(TEXTS, lambda asked, reply=reply: reply)
                assert talked.stop
                self.assertEqual((talked.stop.code, len(talked.sent)), (3, 1))
                self.assertIn(words, talked.stop.message)

    def test_what_is_asked_for(self) -> None:
        on = conversations.wire(dimensions=8, prefix="doc: ")
        step = next(embedgen.Talk(on).embed(TEXTS, "cut"))
        assert isinstance(step, Send)
        expected = {"model": "m", "input": ["doc: " + text for text in TEXTS], "dimensions": 8}
        self.assertEqual((step.path, json.loads(step.body)), ("/embeddings", {**expected, "encoding_format": "base64"}))
        on.base64 = False
        step = next(embedgen.Talk(on).embed(TEXTS, "cut"))
        assert isinstance(step, Send)
        self.assertEqual(json.loads(step.body), expected)

    def test_vectors_are_stored_as_they_come(self) -> None:
        long = [[3 * number for number in vector(text)] for text in TEXTS]
        reply = Reply(200, json.dumps({"embeddings": long}).encode())
        self.assertEqual(Talked(TEXTS, script(reply)).answers, [embedgen.pack(numbers) for numbers in long])

    def test_items_in_any_order_with_an_index_or_none_in_either_form(self) -> None:
        data = [{"index": i, "embedding": in_base64(vector(text))} for i, text in enumerate(TEXTS)]
        data[3]["embedding"] = vector(TEXTS[3])  # as from another server behind one address
        plain = [{"embedding": item["embedding"]} for item in data]
        for items in (data, data[::-1], data[4:] + data[:4], plain):
            reply = Reply(200, json.dumps({"data": items}).encode())
            self.assertEqual(Talked(TEXTS, script(reply)).answers, VECTORS)
        data[7]["index"] = 6  # twice
        self.assertEqual(len(Talked(TEXTS, script(Reply(200, json.dumps({"data": data}).encode()))).sent), 2)

    def test_too_long_in_all_words(self) -> None:
        for status, words in TOO_LONG:
            with self.subTest(words=words):
                for on in (conversations.wire(), embedgen.OllamaWire(*nowhere(""))):
                    with self.assertRaisesRegex(embedgen.TooLong, re.escape(words)):
                        on.check(embedgen.Send("/any", b"", 1.0), error(status, words))
                talked = Talked(
                    TEXTS,
                    lambda asked, s=status, w=words: error(s, w) if "text 3" in asked else good(asked),
                    conversations.wire(dimensions=8, on_long="fail"),
                )
                self.assertEqual(talked.answers, [*VECTORS[:3], words, *VECTORS[4:]])
                self.assertEqual(talked.waits, [])
        for status, words in ((400, "batch size too large"), (500, "out of memory"), (400, "string too long to parse")):
            with self.assertRaises(embedgen.Trouble) as caught:
                conversations.wire().check(embedgen.Send("/embeddings", b"", 1.0), error(status, words))
            self.assertNotIsInstance(caught.exception, embedgen.TooLong)

    def test_the_most_texts_that_a_server_takes_are_learned_once(self) -> None:
        for status, words, named in TOO_MANY:
            with self.subTest(words=words):
                on = conversations.wire(dimensions=8)
                texts = [f"text {number}" for number in range(30)]

                def serve(asked: list[str], status: int = status, words: str = words) -> Reply:
                    return error(status, words.format(given=len(asked), most=10)) if len(asked) > 10 else good(asked)

                talked = Talked(texts, serve, on)
                self.assertEqual((talked.answers, talked.waits), ([blob(text) for text in texts], []))
                self.assertNotIn(PROBE, talked.sent)
                refused = [len(sent) for sent in talked.sent if len(sent) > 10]
                self.assertEqual(refused, [30] if named else [30, 15])
                again = Talked(texts, serve, on)
                self.assertLessEqual(max(map(len, again.sent)), 10)
                self.assertEqual({one.most for one in again.exchanges}, {10 if named else 7})
                # One that was under way meanwhile, and is told of more, does not undo it.
                with self.assertRaises(embedgen.Superseded):
                    on.read(on.request(texts, 1.0), error(status, words.format(given=30, most=20)), texts)
                self.assertEqual(on.most_texts, 10 if named else 7)

    def test_encoding_format_refused_in_mid_run(self) -> None:
        on = conversations.wire(dimensions=8)
        self.assertEqual(Talked(TEXTS, script(error(422, "encoding_format: no such field")), on).answers, VECTORS)
        self.assertFalse(on.base64)

    def test_encoding_format_refused_to_one_that_was_under_way(self) -> None:
        on = conversations.wire(dimensions=8)
        asked = on.request(TEXTS[:1], 1.0)
        refused = error(400, "encoding_format: no such field")
        self.assertEqual(Talked(TEXTS[:1], script(refused), on).answers, VECTORS[:1])
        with self.assertRaises(embedgen.Superseded):
            on.read(asked, refused, TEXTS[:1])
        with self.assertRaises(embedgen.Refused):  # of one that did not ask for it, it is no reason
            on.read(on.request(TEXTS[:1], 1.0), refused, TEXTS[:1])

    def test_too_many_texts_are_logged(self) -> None:
        talked = Talked(TEXTS, script(error(422, "batch size 8 > maximum allowed batch size 4")))
        first = talked.exchanges[0]
        self.assertEqual((first.texts, first.outcome, first.most), (8, "failed", 4))
        self.assertIn("maximum allowed batch size 4", first.reason)

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
            ({"error": 5}, "5"),
            ({"error": None, "message": ["words", 2]}, "words"),
        ):
            with self.subTest(body=body):
                self.assertEqual(embedgen.words_of(json.dumps(body).encode()), words)
        page = b"<html>\n<head><title> 413 Request\nEntity Too Large </title></head></html>"
        self.assertEqual(embedgen.words_of(page), 'an HTML page, "413 Request Entity Too Large"')


def nowhere(path: str, **options: object) -> Any:
    """Return what a wire is made of."""
    usual = {"model": "m", "timeout": 300.0, "option": [], "dimensions": None, "prefix": "", "context": 0}
    settings = {**usual, "on_long": "cut", **options}
    return embedgen.Server("http", "h", 1, path, ""), conversations.argparse.Namespace(**settings)


def data(*vectors: Any) -> Reply:
    """Return an answer with these vectors, lists of numbers or base64."""
    return Reply(200, json.dumps({"data": [{"index": i, "embedding": v} for i, v in enumerate(vectors)]}).encode())


class Greetings(unittest.TestCase):
    def greet(self, *replies: Reply, **options: object) -> Any:
        """Greet a server that answers so; return the wire."""
        on = embedgen.OpenAIWire(*nowhere("/v1", **options))
        self.sent: list[tuple[str, Any]] = []
        left, reply = list(replies), None
        conversation = on.greet()
        with self.assertRaises(StopIteration):
            while True:
                step = conversation.send(reply)
                reply = None
                if isinstance(step, Send):
                    self.sent.append((step.path, json.loads(step.body) if step.body else None))
                    reply = left.pop(0)
        self.assertEqual(left, [])
        return on

    def stop(self, *replies: Reply, **options: object) -> Stop:
        """Greet a server that is of no use; return the end."""
        with self.assertRaises(Stop) as caught:
            self.greet(*replies, **options)
        return caught.exception

    numbers = vector(KNOWN_GOOD)

    def test_base64_if_it_gives_the_same_vector(self) -> None:
        on = self.greet(data(self.numbers), data(in_base64(self.numbers)), prefix="doc: ")
        self.assertEqual((on.base64, on.dimensions, on.expected), (True, 8, 8))
        floats = {"model": "m", "input": ["doc: " + KNOWN_GOOD]}
        self.assertEqual(self.sent, [("/embeddings", floats),
                                     ("/embeddings", {**floats, "encoding_format": "base64"})])  # fmt: skip

    def test_a_second_greeting_compares_as_the_first_and_disturbs_nobody(self) -> None:
        swapped = array("f", self.numbers)
        swapped.byteswap()
        for before in (False, True):
            on = embedgen.OpenAIWire(*nowhere("/v1"))
            on.base64 = before
            greeting = on.greet()
            asked = [json.loads(step.body) for step in (next(greeting), greeting.send(data(self.numbers)))]
            self.assertEqual([body.get("encoding_format") for body in asked], [None, "base64"])
            self.assertNotIn(b"base64", on.request(["another conversation's"], 1.0).body)
            with self.assertRaises(StopIteration):
                greeting.send(data(in_base64(swapped)))
            self.assertNotIn(b"base64", on.request(["another conversation's"], 1.0).body)

    def test_floats_otherwise(self) -> None:
        swapped = array("f", self.numbers)
        swapped.byteswap()
        cases = {
            "ignored": (data(self.numbers), True),
            "big-endian": (data(in_base64(swapped)), True),
            "doubles": (data(in_base64(self.numbers + self.numbers)), False),
            "half": (data(in_base64(self.numbers[:4])), False),
            "no whole number": (data("AAAA"), False),
            "zeros": (data(in_base64([0.0] * 8)), False),
            "another vector": (data(in_base64(vector("other"))), True),
            "400": (error(400, "unknown field encoding_format"), False),
            "422": (error(422, "Input should be 'float'"), False),
            "500": (error(500, "internal server error"), False),
            "busy": (error(503, "busy"), False),
            "silent": (SILENCE, False),
        }
        for name, (reply, certain) in cases.items():
            with self.subTest(name):
                on = self.greet(data(self.numbers), reply)
                self.assertEqual((on.base64, on.dimensions, on.expected), (False, 8 if certain else None, 8))

    def test_a_busy_server_does_not_end_the_run(self) -> None:
        for reply in (error(503, "Loading model"), error(429, "overloaded"), error(500, "crashed"), SILENCE,
                      Reply(200, b"<html>"), data([0.0] * 8)):  # fmt: skip
            with self.subTest(reply=reply):
                on = self.greet(reply)
                self.assertEqual((on.base64, on.dimensions, on.expected), (False, None, None))

    def test_a_server_that_is_not_there(self) -> None:
        away = self.stop(REFUSED)
        self.assertIsInstance(away, Away)
        self.assertIn("cannot reach a server at http://h:1/v1 (connection refused)", away.message)
        self.assertNotIn("ollama", away.message)

    def test_a_missing_model_and_which_there_are(self) -> None:
        missing = error(404, "The model `m` does not exist.")
        models = Reply(200, b'{"object": "list", "data": [{"id": "bge-m3"}, {"id": "gte"}]}')
        self.assertIn("It has: bge-m3, gte. Give --model", self.stop(missing, models).message)
        self.assertEqual(self.sent[-1], ("/models", None))
        for reply in (Reply(404, b""), error(401, "no"), SILENCE, Reply(200, b'{"data": []}'), Reply(200, b"[1]")):
            self.assertRegex(self.stop(missing, reply).message, r'no model "m" \(HTTP 404: .*\)\.\Z')

    def test_a_refusal_that_no_row_is_to_blame_for(self) -> None:
        words = 'Model "m" does not support matryoshka representation'
        self.assertIn(words, self.stop(error(400, words), dimensions=4).message)
        self.assertIn("OPENAI_API_KEY", self.stop(error(401, "no")).message)
        self.assertIn("/embeddings", self.stop(error(404, "Not Found")).message)

    def test_other_dimensions_than_are_known(self) -> None:
        longer, packed = data([*self.numbers, 1.0]), data(in_base64([*self.numbers, 1.0]))
        self.assertIn("9 dimensions came instead of 8", self.stop(longer, *[packed] * 3, dimensions=8).message)
        for faults in ([packed], [packed, packed]):
            on = self.greet(longer, *faults, data(in_base64(self.numbers)), dimensions=8)
            self.assertEqual(on.dimensions, 8)

    def test_a_greeting_that_learns_nothing_leaves_what_is_known(self) -> None:
        for known in (True, False):
            on = embedgen.OpenAIWire(*nowhere("/v1"))
            on.base64 = known
            conversation = on.greet()
            conversation.send(None)
            with self.assertRaises(StopIteration):
                conversation.send(SILENCE)
            self.assertEqual(on.base64, known)


class Choice(Case):
    def wires(self, *flags: str, env: dict[str, str] | None = None) -> Sequence[Any]:
        """Return the wires for a command line."""
        with mock.patch.dict("os.environ", env or {}):
            return embedgen.wires_for(embedgen.parse_arguments(flags))

    def test_the_path_tells_the_protocol(self) -> None:
        for address, openai in (("h/v1", True), ("https://h/v1/", True), ("http://h:1/x/v1", True), ("h", False),
                                ("http://h/v1/x", False), ("http://h/xv1", False), ("h/v10", False)):  # fmt: skip
            (wire,) = self.wires("--server", address)
            self.assertIs(type(wire), embedgen.OpenAIWire if openai else embedgen.OllamaWire)
        (wire,) = self.wires(env={"OLLAMA_HOST": "https://h/v1"})
        self.assertIs(type(wire), embedgen.OpenAIWire)

    def test_which_token_goes_where(self) -> None:
        both = {"OLLAMA_API_KEY": "ours", "OPENAI_API_KEY": "theirs"}
        basic = "Basic dTpw"  # u:p
        for address, env, expected in (
            ("h", both, "Bearer ours"),
            ("h/v1", both, "Bearer ours"),
            ("h/v1", {"OPENAI_API_KEY": " theirs\n"}, "Bearer theirs"),
            ("h/v1", {**both, "OLLAMA_API_KEY": " "}, "Bearer theirs"),
            ("h", {"OPENAI_API_KEY": "theirs"}, ""),
            ("h/v1/x", {"OPENAI_API_KEY": "theirs"}, ""),
            ("http://u:p@h/v1", both, basic),
            ("u:p@h", both, basic),
            ("h/v1", {}, ""),
        ):
            with self.subTest(address=address, env=env):
                (wire,) = self.wires("--server", address, env={"OLLAMA_API_KEY": "", "OPENAI_API_KEY": "", **env})
                self.assertEqual(wire.server.authorization, expected)
        for name in both:
            self.refuse(2, "--server", "h/v1", env={name: "t\u00f6ken"}, words=[name])

    def test_options_are_not_in_this_protocol(self) -> None:
        self.refuse(2, "--server", "h/v1", "--option", "num_ctx=512", words=["--option", "h:11434/v1", "OpenAI"])


class MainJob(test_main_job.MainJob):
    """The main job over this wire; but for what is of Ollama's own protocol, or of the database alone."""

    path = "/v1"

    def setUp(self) -> None:
        super().setUp()
        self.ollama.configure(api=False)
        self.addCleanup(self.check_paths)

    def check_paths(self) -> None:
        paths = {entry["path"] for entry in self.ollama.log()}
        self.assertLessEqual(paths, {"/v1/embeddings", "/v1/models"})


for name in dir(MainJob):
    if name.startswith("test_") and name not in (
        "test_both_engines_print_the_report_of_fifty_skipped_and_refused",
        "test_each_refused_row_is_one_line_in_the_log_with_the_servers_words",
        "test_a_second_run_has_nothing_to_do_and_asks_nobody",
        "test_each_text_is_asked_for_once",
        "test_a_second_model_is_refused_by_both_names",
        "test_other_dimensions_than_the_stored_are_refused",
    ):
        setattr(MainJob, name, None)


class Job(Case):
    """What is of this wire alone, from the command line to the table."""

    path = "/v1"

    def setUp(self) -> None:
        super().setUp()
        self.ollama.configure(api=False)

    def again(self, **settings: Any) -> None:
        """Begin anew, with a server of these settings."""
        self.wipe()
        self.ollama.reset()
        self.ollama.configure(api=False, **settings)

    def test_any_kind_of_server(self) -> None:
        for settings, way in (
            ({}, "base64"),
            ({"base64": False}, "decimals"),
            ({"base64": "refused"}, "decimals"),
            ({"base64": "mangled"}, "decimals"),
            ({"next": ["disorder"] * 9}, "base64"),
            ({"base64": False, "next": ["disorder"] * 9}, "decimals"),
        ):
            for engine in ENGINES:
                with self.subTest(engine=engine):
                    self.again(**settings)
                    self.make_movies(20)
                    self.succeed(
                        "--engine", engine, "--batch-size", 5, "--log-dir", self.folder / repr(settings) / engine
                    )
                    self.assert_complete()
                    logged = "".join(path.read_text("utf-8") for path in self.folder.glob("*/" + engine + "/*.log"))
                    self.assertIn(f"vectors come as {way} over /v1/embeddings\n", logged)
                    asked = [entry["body"] for entry in self.ollama.log()][2:]
                    self.assertEqual(
                        {body.get("encoding_format") for body in asked}, {"base64" if way == "base64" else None}
                    )
                    self.assertEqual({tuple(set(body) - {"encoding_format"}) for body in asked}, {("model",)})

    def test_vectors_of_any_length_are_stored_as_they_come(self) -> None:
        self.ollama.configure(scale=3.0)
        for engine in ENGINES:
            self.wipe()
            self.make_movies(5)
            self.succeed("--engine", engine)
            for key, stored in self.stored().items():
                for one, other in zip(array("f", stored), array("f", self.expected()[key])):
                    self.assertAlmostEqual(one, 3 * other, places=5)

    def test_a_limit_of_inputs_is_found_out_by_each_worker_once_and_the_pace_keeps_to_it(self) -> None:
        refusal = {"most": 6, "status": 422, "error": "batch size {given} > maximum allowed batch size {most}"}
        for engine in ENGINES:
            with self.subTest(engine=engine):
                for shape in ("message", "string"):
                    self.again(most_inputs=refusal, shape=shape)
                    self.make_movies(200)
                    self.assertEqual(self.succeed("--engine", engine, "--concurrent", 2).tally, (200, 0, 0))
                    self.assert_complete()
                    refused = [entry for entry in self.ollama.log() if entry["status"] == 422]
                    self.assertIn(len(refused), (1, 2))  # both that were in flight
                    last = self.ollama.log()[-12:]
                    self.assertIn(6, {len(entry["texts"]) for entry in last})
                    self.assertIn("batches of 6: no more than 6 texts are taken", self.log())

    def test_faults_of_every_kind(self) -> None:
        kinds = ("500", "503", "429", "disorder", "reset", "cut", "torn", "chunked", "close", "drop")
        # Answers without sound vectors fail a text that alone gets two of them: in order, one at a time, none does.
        unsound = [
            kind for one in ("html", "error200", "short", "zero", "nan", "twin") * 2 for kind in (one, "ok", "ok")
        ]
        for engine in ENGINES:
            with self.subTest(engine=engine):
                self.again(faults=dict.fromkeys(kinds, 0.03), next=unsound, seed=5, retry_after=0)
                self.make_movies(200, lambda key: f"Film {key}" if key % 50 else f"Poison {key}")
                self.ollama.configure(refuse=[{"contains": "Poison", "status": 400, "error": "contains NaN"}])
                with mock.patch.multiple(embedgen, FIRST_WAIT=0.01, LONGEST_WAIT=0.05):
                    flags = ("--engine", engine, "--batch-size", 4, "--concurrent", 1)
                    done = self.run_program(*flags)
                self.assertEqual((done.code, done.err, done.tally), (1, "", (196, 0, 4)))
                self.assert_complete(but=[50, 100, 150, 200])
                self.assertGreater(len([entry for entry in self.ollama.log() if entry["fault"]]), 10)

    def test_refused_texts_fail_with_the_servers_words_in_any_shape(self) -> None:
        words = "`inputs` must have less than 30 tokens. Given: 42"
        limit = {"status": 413, "error": "`inputs` must have less than {context} tokens. Given: {given}"}
        for engine in ENGINES:
            with self.subTest(engine=engine):
                for shape in ("openai", "string", "message", "detail", "pydantic"):
                    self.wipe()
                    self.ollama.configure(api=False, too_long=limit, shape=shape,
                                          models={"nomic-embed-text": {"context": 30}})  # fmt: skip
                    self.make_movies(12, lambda key: "long " * 33 if key == 7 else f"Film {key}")
                    done = self.run_program("--engine", engine, "--batch-size", 4, "--on-long", "fail")
                    self.assertEqual((done.code, done.tally), (1, (11, 0, 1)))
                    self.assert_complete(but=[7])
                    self.assertEqual(self.log().splitlines()[-3].partition("WARNING - ")[2], f"movie 7 failed: {words}")

    def test_no_model_of_that_name(self) -> None:
        self.make_movies(2)
        for engine in ENGINES:
            words = [self.ollama.url + "/v1", '"bge-m3"', "nomic-embed-text", "all-minilm", "--model"]
            self.refuse(3, "--model", "bge-m3", "--engine", engine, words=words)
        self.assertEqual(self.asked(), [])
        self.assertNotIn("movie_embeddings", self.db.tables())

    def test_dimensions_are_passed_on(self) -> None:
        self.make_movies(3)
        self.succeed("--dimensions", 4)
        self.assertEqual({entry["body"]["dimensions"] for entry in self.ollama.log()}, {4})
        self.assertEqual({len(stored) for stored in self.stored().values()}, {16})

    def test_tokens_and_passwords(self) -> None:
        self.make_movies(2)
        for settings, env, user in (
            ({"token": "t0ken"}, {"OPENAI_API_KEY": "t0ken"}, ""),
            ({"token": "t0ken"}, {"OLLAMA_API_KEY": "t0ken", "OPENAI_API_KEY": "x"}, ""),
            ({"basic": "me:p@ss"}, {"OPENAI_API_KEY": "x"}, "me:p%40ss@"),
        ):
            self.ollama.configure(token=None, basic=None)
            self.ollama.configure(**settings)
            address = f"{self.ollama.url}/v1".replace("//", "//" + user)
            for engine in ENGINES:
                self.succeed("--server", address, "--engine", engine, "--force", env=env)
        self.refuse(3, "--engine", engine, "--force", words=["401", "OPENAI_API_KEY", "OLLAMA_API_KEY"])

    def test_both_protocols_side_by_side(self) -> None:
        with Ollama() as other:
            for engine in ENGINES:
                with self.subTest(engine=engine):
                    self.again()
                    other.reset()
                    for server in (self.ollama, other):
                        server.configure(seconds_per_text=0.002, slots=1)
                    self.make_movies(200)
                    two = ("--server", self.ollama.url + "/v1", "--server", other.url, "--engine", engine)
                    self.assertEqual(self.succeed(*two).tally, (200, 0, 0))
                    self.assert_complete()
                    for server, path in ((self.ollama, "/v1/embeddings"), (other, "/api/show")):
                        self.assertIn(path, [entry["path"] for entry in server.log()])
                        self.assertGreater(len(server.texts()), 20)
            other.configure(models={"nomic-embed-text": {"dimensions": 16}})
            self.refuse(3, *two, "--force", words=["16 dimensions", "8"])
            for engine in ENGINES:  # a name alone does not tell that a model is the same
                self.again()
                self.make_movies(5)
                other.configure(models={"nomic-embed-text": {"seed": "another one"}})
                two = ("--server", self.ollama.url + "/v1", "--server", other.url, "--engine", engine)
                self.refuse(3, *two, words=[self.ollama.url, other.url, "nomic-embed-text", "cosine"])
                self.assertEqual(self.asked(), [])
                self.assertEqual(self.succeed(*two, "--accept-drift").tally, (5, 0, 0))


class Endings(test_endings.Signals):
    """The server is killed and comes back; the rest of these is the engines' alone."""

    path = "/v1"


for name in dir(Endings):
    if name.startswith("test_") and "the_server_killed" not in name:
        setattr(Endings, name, None)


if __name__ == "__main__":
    unittest.main()
