"""A double of the Ollama embedding server, for the tests.

It answers what a client of the embedding endpoints can ask, with the status codes and the
words of the real server, and misbehaves on demand. The vectors are a known function of the text,
so that a test can tell whether each row got its own.

As a command, it serves until it is killed:

    python -m tests.ollama [--port N] [--settings JSON] [--cert FILE --key FILE] [--until-eof]

From a test, where the server is a process of its own:

    with Ollama(faults={"503": 0.2}) as server:
        ...run something against server.url...
        server.configure(faults={}, next=["reset", "ok"])
        server.log(), server.texts()

DEFAULTS below lists every setting. With --until-eof the double takes orders as JSON lines on
stdin, answers them on stdout, and ends with stdin: no double outlives its test.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import base64
import contextlib
import copy
import hashlib
import html
import itertools
import json
import logging
import math
import os
import random
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

Vector = list[float]
Entry = dict[str, Any]

# fmt: off
DEFAULTS: dict[str, Any] = {
    # What the server is.
    "version": "0.14.0",
    "tokenizer": [0.0, 0],  # share of the texts with a letter outside ASCII whose vectors are others; and which: a seed
    "models": {  # of each: dimensions, context, digest, weights, template, seed, capabilities; MODEL has the defaults
        "nomic-embed-text": {},
        "all-minilm": {"context": 256, "seed": "all-minilm"},
    },
    "embed": True,    # False: older than 0.2.6, has only /api/embeddings
    "show": True,     # False: has no /api/show
    "api": True,      # False: not Ollama but another server, has only /v1
    "lean": True,     # False: has no /v1/embeddings, or stands behind a proxy that does not let it through
    "base64": True,   # False: older than 0.12.7, ignores encoding_format; "refused"; "mangled"
    "context_length": None,  # OLLAMA_CONTEXT_LENGTH: of all models, where theirs is not smaller
    "ps": True,       # whether /api/ps tells the context; "asked": as 0.12 does, which may be more than the model has
    "truncates": True,  # False: refuses long texts whatever it is asked, as some versions do
    "token": None,    # wanted as "Authorization: Bearer TOKEN" in every request
    "basic": None,    # or as "Authorization: Basic ...", user:password
    "named": "",      # the model's name in answers; "": as it is in the request
    "prefix": "",     # a path under which everything is served
    # What other servers of the OpenAI protocol do; of /v1 alone.
    "scale": 1.0,     # length of the vectors
    "server": None,        # the header Server of every answer
    "fingerprint": None,   # the system_fingerprint of every good answer
    "shape": "openai",     # of errors, by the names in SHAPES
    "most_inputs": None,   # {"most": number, "status": number, "error": words}: for more inputs than that
    "too_long": None,      # {"status": number, "error": words}: for texts that would be cut
    # What a proxy in front of it may do.
    "deployments": [],  # {"dimensions": ...}: of each model; each new connection that embeds is led to the next of them
    "echo": None,     # {"status": number, "as": text, json or html}: every answer repeats the request's headers
    # Texts it cannot bear.
    "refuse": [],     # {"contains": substring, "status": number, "error": words}
    "crash": [],      # substrings that kill the runner
    "hang": [],       # substrings whose requests are never answered
    "hold": [],       # substrings whose requests, unless they are refused, wait until they stand here no more
    "flaky": {},      # path -> statuses, used up one for each request there
    # Faults, by the names in FAULTS.
    "faults": {},     # name -> probability, drawn for each embed request
    "next": [],       # names, used up one for each embed request before any are drawn; "ok" is none
    "seed": 0,        # of the draws
    "retry_after": None,   # header of 503 and 429
    "slow_seconds": 1.0,   # how late a "slow" answer is
    # Speed; no setting here means as fast as possible.
    "network": 0.0,            # seconds added to each request, outside the slots
    "connecting": 0.0,         # seconds added to each connection's first request, as for TLS over a long way
    "load_seconds": 0.0,       # for the first request, and when model or options change
    "seconds_per_text": 0.0,
    "slots": None,             # texts computed at once, the others queue; None: all at once
    "batching": None,          # {"batch": texts, "in_flight": requests, "peak": texts per second}
    "slowdowns": [],           # [from second, to second, factor], counted from start or reset
    "shuffle": 0.0,            # up to that many seconds at random, so that answers overtake
    "continue_after_hangup": True,  # work for a client that went away is still done
}
MODEL = {"dimensions": 8, "context": 2048, "template": "{{ .Prompt }}", "seed": "", "capabilities": ["embedding"]}

FAULTS = {
    "500": "the runner died", "503": "busy", "429": "too many requests",
    "eof": "400, though the runner is to blame and not the text",
    "html": "200 with a page of HTML", "error200": "200 with an error in the body",
    "short": "one vector too few", "zero": "a vector of zeros", "nan": "a null or NaN in a vector",
    "long": "vectors of wrong dimension", "twin": "one vector for all texts", "odd": "sound vectors of no text",
    "disorder": "/v1 only: items in reverse, with the right index",
    "slow": "late", "hang": "never answered", "reset": "connection reset, no answer",
    "cut": "half of the body, then the end", "torn": "chunked, ends before the last chunk",
    "chunked": "a good answer in chunks", "close": "a good answer, announced as the last one",
    "drop": "a good answer, and the connection closes without a word",
}
# fmt: on

SHAPES: dict[str, Callable[[str], Any]] = {
    "openai": lambda words: {"error": {"message": words, "type": "api_error", "param": None, "code": None}},
    "string": lambda words: {"error": words, "error_type": "Validation"},
    "message": lambda words: {"object": "error", "message": words, "type": "Validation", "code": 422},
    "detail": lambda words: {"detail": words},
    "pydantic": lambda words: {"detail": [{"type": "value_error", "loc": ["body", "input"], "msg": words, "input": 0}]},
}

CRASHED = 'do embedding request: Post "http://127.0.0.1:1/embedding": EOF'
ERRORS = {
    "500": (500, "llama runner process has terminated: exit status 2"),
    "503": (503, "server busy, please try again.  maximum pending requests exceeded"),
    "429": (429, "too many requests"),
    "eof": (400, CRASHED),
}
GET, POST = ("GET", "HEAD"), ("POST",)
METHODS = {
    "/": GET, "/api/version": GET, "/api/tags": GET, "/api/ps": GET, "/v1/models": GET,
    "/api/show": POST, "/api/embed": POST, "/api/embeddings": POST, "/v1/embeddings": POST,
}  # fmt: skip
EMBED_PATHS = ("/api/embed", "/api/embeddings", "/v1/embeddings")
PHRASES = {status.value: status.phrase for status in HTTPStatus}
HTML = b"<!DOCTYPE html><html><body><h1>It works!</h1></body></html>"
SPECIAL_TOKENS = 2  # a text is one token per word, and one each for its begin and its end
CHUNK_ABOVE = 2048  # Go's net/http announces no length for longer bodies, but sends chunks


# --- Vectors ------------------------------------------------------------------------------------


def normalised(numbers: Vector) -> Vector:
    """The numbers, scaled to length one."""
    length = math.hypot(*numbers)
    return [n / length for n in numbers]


def vector(text: str, dimensions: int = 8, seed: str = "") -> Vector:
    """The embedding of a text; another seed is another model's space.

    Fewer dimensions give the beginning of the longer vector, normalised anew, as the
    `dimensions` of a request do.
    """
    start = hashlib.sha256(f"{seed}\0{text}\0".encode("utf-8", "surrogatepass"))
    digests = b""
    for counter in range((dimensions + 7) // 8):
        block = start.copy()
        block.update(counter.to_bytes(4, "big"))
        digests += block.digest()
    numbers = struct.unpack_from(f"<{dimensions}I", digests)
    return normalised([n / 2**31 - 1 for n in numbers])


def is_turned(text: str, share: float, seed: int = 0) -> bool:
    """Whether a change of the tokenizer gives a text another vector: it does for a share of those with letters outside
    ASCII, by the seed, whenever it is asked."""
    if not any(letter.isalpha() and not letter.isascii() for letter in text):
        return False
    return random.Random(f"{seed} {text}").random() < share


def blob(text: str, dimensions: int = 8, seed: str = "") -> bytes:
    """The embedding as a table must hold it: float32, little-endian."""
    return struct.pack(f"<{dimensions}f", *vector(text, dimensions, seed))


def cut(text: str, context: int = 2048) -> str:
    """What a model with that context sees of a text: its first words."""
    words = text.split(None, context - SPECIAL_TOKENS)
    if len(words) <= context - SPECIAL_TOKENS:
        return text
    return text.rstrip()[: -len(words[-1].rstrip())].rstrip()


def decimals(numbers: Vector) -> str:
    """A JSON array of float32 numbers; nine digits are enough to get each of them back.

    Infinity, which only a fault produces, is written as null: that is what llama-server does.
    """
    written = ("%.9g," * len(numbers))[:-1] % tuple(array.array("f", numbers))
    return "[" + written.replace("nan", "NaN").replace("inf", "null") + "]"


def packed(numbers: Vector) -> str:
    """Base64 of little-endian float32, as a JSON string."""
    return '"' + base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode() + '"'


# --- Requests and replies -----------------------------------------------------------------------


@dataclass
class Request:
    """One request as received; header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Reply:
    """One answer; `fault` says how its transport goes wrong."""

    status: int = 200
    body: bytes = b""
    kind: str = "application/json; charset=utf-8"
    headers: dict[str, str] = field(default_factory=dict)
    fault: str = ""


@dataclass
class Question:
    """What an embed request asks for, whichever of the three paths it came by."""

    path: str
    name: str
    named: str  # in the answer
    model: dict[str, Any]
    texts: list[str]
    tokens: int
    dimensions: int
    base64: bool
    context: int  # as /api/ps tells it


class Refusal(Exception):
    """An error answer: status and words (or any JSON value, for servers that send others)."""

    def __init__(self, status: int, error: Any) -> None:
        super().__init__(status, error)
        self.status = status
        self.error = error


def compact(value: Any) -> str:
    """JSON without spaces, as Go writes it."""
    return json.dumps(value, separators=(",", ":"))


def json_reply(value: Any, status: int = 200) -> Reply:
    """A reply with a JSON body."""
    return Reply(status, compact(value).encode())


def text_reply(words: str, status: int = 200) -> Reply:
    """A reply in plain text."""
    return Reply(status, words.encode(), "text/plain; charset=utf-8")


def error_reply(path: str, shape: str, refusal: Refusal) -> Reply:
    """An error in the shape of its path: a string under /api, an object or what is set under /v1."""
    error = refusal.error
    if path.startswith("/v1/") and isinstance(error, str):
        return json_reply(SHAPES[shape](error), refusal.status)
    return json_reply({"error": error}, refusal.status)


def echo(request: Request, **way: Any) -> Reply:
    """A proxy's error page that repeats the request."""
    given = request.headers.get("authorization", "None")
    if given.startswith("Basic "):
        given += " = " + base64.b64decode(given[6:]).decode()
    words = f"no good: {given} for {request.path}"
    if way["as"] == "json":
        return Reply(way["status"], compact({"request": given}).replace("/", "\\/").encode())
    if way["as"] == "html":
        return Reply(way["status"], f"<html><title>{html.escape(words)}</title></html>".encode(), "text/html")
    return text_reply(words, way["status"])


def full_name(name: str) -> str:
    """The model's name with its tag."""
    return name if ":" in name else name + ":latest"


# --- Speed --------------------------------------------------------------------------------------


class Job:
    """The work of one request: so many pieces of so many seconds each."""

    def __init__(self, pieces: int, seconds: float) -> None:
        self.left = pieces
        self.seconds = seconds
        self.arrived = time.monotonic()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Slots:
    """A limited number of places to work; the pieces wait in one queue, first come, first served.

    Each place keeps its own account of when its last piece ended, and sleeps until then rather
    than for a piece's time: late timers don't add up, and the speed is right on a busy machine.
    """

    def __init__(self, count: int, server: Server) -> None:
        self.server = server
        self.queue: asyncio.Queue[Job | None] = asyncio.Queue()
        self.tasks = [asyncio.create_task(self.serve()) for _ in range(count)]

    async def compute(self, pieces: int, seconds: float) -> None:
        """Wait until all pieces are done."""
        job = Job(pieces, seconds)
        for _ in range(pieces):
            self.queue.put_nowait(job)
        await job.done

    async def serve(self) -> None:
        """One place's work."""
        free = 0.0
        while True:
            job = await self.queue.get()
            if job is None:
                return
            if job.done.done():  # its client hung up, and the server noticed
                continue
            begin = max(free, job.arrived)
            free = begin + job.seconds * self.server.slowdown(begin)
            await asyncio.sleep(max(0.0, free - time.monotonic()))
            job.left -= 1
            if job.left == 0 and not job.done.done():
                job.done.set_result(None)

    def close(self) -> None:
        """Finish what is queued, and no more."""
        for _ in self.tasks:
            self.queue.put_nowait(None)


# --- HTTP ---------------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """One client's connection: requests are answered one after the other."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.buffer = bytearray()
        self.request: Request | None = None  # head read, body awaited
        self.entry: Entry | None = None  # of the request being answered
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the connection, unless it was accepted at the moment the server went away."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self.server.gone:
            transport.abort()
            return
        self.number = next(self.server.numbers)
        self.server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client hung up, or we did."""
        self.server.connections.discard(self)
        if self.entry is None:
            return
        self.entry["hung_up"] = True
        self.server.end(self.entry)
        if self.task and not self.server.settings["continue_after_hangup"]:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        """Take bytes; while a request is being answered they wait."""
        self.buffer += data
        if self.entry is None:
            self.advance()

    def advance(self) -> None:
        """Read one request from the buffer, if it is complete, and begin to answer it."""
        try:
            if self.request is None:
                end = self.buffer.find(b"\r\n\r\n")
                if end < 0:
                    return
                self.request = self.head(self.buffer[:end].decode("latin-1"))
                del self.buffer[: end + 4]
            length = int(self.request.headers.get("content-length", 0))
        except ValueError:
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
            self.transport.close()
            return
        if len(self.buffer) < length:
            return
        request, self.request = self.request, None
        request.body = bytes(self.buffer[:length])
        del self.buffer[:length]
        self.entry = self.server.begin(request, self.number)
        self.task = self.server.spawn(self.serve(request, self.entry))

    @staticmethod
    def head(text: str) -> Request:
        """Request line and headers; ValueError if they are none."""
        lines = text.split("\r\n")
        method, target, protocol = lines[0].split(" ")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if "transfer-encoding" in headers:
            raise ValueError("the double reads no chunked requests")
        if protocol != "HTTP/1.1":
            headers["connection"] = "close"
        return Request(method, target.partition("?")[0], headers)

    async def serve(self, request: Request, entry: Entry) -> None:
        """Answer one request, then look for the next."""
        try:
            reply = await self.server.answer(request, entry)
        except Exception:
            logging.getLogger("double").exception("a bug in the double")
            reply = text_reply("bug in the double", 500)
        if reply is None or self.transport.is_closing():
            return
        entry["status"] = reply.status if reply.fault != "reset" else None
        if self.server.settings["server"]:
            reply.headers["Server"] = self.server.settings["server"]
        self.server.end(entry)
        self.entry = None
        self.send(request, reply)
        if self.buffer and not self.transport.is_closing():
            self.advance()

    def send(self, request: Request, reply: Reply) -> None:
        """Write a reply, with its transport's fault."""
        fault, body = reply.fault, reply.body
        if fault == "reset":
            no_linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
            self.transport.abort()
            return
        last = fault == "close" or request.headers.get("connection", "").lower() == "close"
        chunked = fault in ("chunked", "torn") or (len(body) > CHUNK_ABOVE and fault != "cut")
        phrase = PHRASES.get(reply.status, "Unknown")
        head = [f"HTTP/1.1 {reply.status} {phrase}", f"Content-Type: {reply.kind}"]
        head += [f"{name}: {value}" for name, value in reply.headers.items()]
        head.append("Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}")
        if last:
            head.append("Connection: close")
        if request.method == "HEAD":
            body = b""
        elif chunked:
            body = self.chunks(body, 7 if fault in ("chunked", "torn") else 1)
        if fault in ("cut", "torn"):
            body = body[: len(body) // 2]
        self.transport.write("\r\n".join([*head, "", ""]).encode() + body)
        if last or fault in ("cut", "torn", "drop"):
            self.transport.close()

    @staticmethod
    def chunks(body: bytes, count: int) -> bytes:
        """The body in about so many chunks, and the last, empty one."""
        size = max(1, len(body) // count)
        parts = [body[i : i + size] for i in range(0, len(body), size)]
        return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


# --- The server ---------------------------------------------------------------------------------


def held_socket(port: int) -> socket.socket:
    """A socket that has the port, but doesn't listen: connections are refused.

    Were the port free while the server is away, another process could be given it. A client
    could even be given it as its own end, and so be connected with itself.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name == "posix":  # elsewhere the option means something else
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    return sock


class Server:
    """The state of the double, and what it answers."""

    def __init__(self, port: int, tls: ssl.SSLContext | None) -> None:
        self.socket = held_socket(port)
        self.port: int = self.socket.getsockname()[1]
        self.tls = tls
        self.gone = True
        self.listener: asyncio.AbstractServer | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.connections: set[Connection] = set()
        self.numbers = itertools.count(1)  # of connections
        self.slots: Slots | None = None
        self.changed = asyncio.Event()  # set when settings change, and then replaced
        self.tasks: set[asyncio.Task[None]] = set()  # the loop itself holds them only weakly

    # Settings, listening, and the log.

    def reset(self, settings: dict[str, Any]) -> None:
        """Begin anew with the defaults and these settings."""
        self.settings = copy.deepcopy(DEFAULTS)
        self.entries: list[Entry] = []
        self.open: set[int] = set()  # ids of the entries that are not ended
        self.led: dict[int, int] = {}  # connection -> which of the deployments it is led to
        self.started = time.monotonic()
        self.loaded: Any = None
        self.loaded_at = 0.0
        self.configure({"seed": 0, "slots": None, **settings})

    def configure(self, settings: dict[str, Any]) -> None:
        """Change some settings; each replaces its former value as a whole."""
        unknown = set(settings) - set(DEFAULTS)
        names = list(settings.get("faults", {})) + list(settings.get("next", []))
        unknown |= set(names) - set(FAULTS) - {"ok"}
        if unknown:
            raise ValueError(f"no such setting or fault: {', '.join(sorted(unknown))}")
        self.settings.update(settings)
        self.models = {}
        for name, given in self.settings["models"].items():
            digest = hashlib.sha256(name.encode()).hexdigest()
            self.models[full_name(name)] = {**MODEL, "digest": digest, **given}
        if "seed" in settings:
            self.random = random.Random(settings["seed"])
        if "slots" in settings or "batching" in settings:
            if self.slots:
                self.slots.close()
            batching = self.settings["batching"]
            count = batching["in_flight"] if batching else self.settings["slots"]
            self.slots = Slots(count, self) if count else None
        self.changed.set()
        self.changed = asyncio.Event()

    async def back(self) -> None:
        """Listen, if we don't."""
        if self.timer:
            self.timer.cancel()
        if self.gone:
            self.gone = False
            self.listener = await asyncio.get_running_loop().create_server(
                lambda: Connection(self), sock=self.socket, ssl=self.tls, backlog=1024
            )

    def away(self, seconds: float | None) -> None:
        """Refuse connections and drop those there are, for a time or until called back."""
        if self.timer:
            self.timer.cancel()
        if self.listener and not self.gone:
            self.gone = True
            self.listener.close()
            self.socket = held_socket(self.port)
        for connection in list(self.connections):
            connection.transport.abort()
        if seconds:
            loop = asyncio.get_running_loop()
            self.timer = loop.call_later(seconds, lambda: self.spawn(self.back()))

    async def forget_clients(self) -> None:
        """Read what clients had sent before they ended, so that no later log has it; drop the connections, and end all
        work for them."""
        for _ in range(5):  # turns of the loop: to accept, to read, and to answer
            await asyncio.sleep(0)
        for connection in list(self.connections):
            connection.transport.abort()
        for task in self.tasks - {asyncio.current_task()}:
            task.cancel()

    def begin(self, request: Request, connection: int) -> Entry:
        """Log a request that has arrived."""
        entry: Entry = {
            "method": request.method,
            "path": request.path,
            "headers": request.headers,
            "body": {},  # of embed requests, but for the texts
            "texts": [],
            "status": None,  # None also when no answer was sent
            "fault": "",
            "hung_up": False,  # the connection ended before the answer
            "loaded": False,  # it made the server load the model
            "connection": connection,
            "in_flight": len(self.open) + 1,  # with this one
            "start": time.monotonic(),
            "end": None,
        }
        self.entries.append(entry)
        self.open.add(id(entry))
        return entry

    def end(self, entry: Entry) -> None:
        """A request is answered, or its client has gone; the first of both counts."""
        if entry["end"] is None:
            entry["end"] = time.monotonic()
            self.open.discard(id(entry))

    # Orders from the test.

    def spawn(self, work: Any) -> asyncio.Task[None]:
        """Run a coroutine to its end."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def obey(self, line: bytes) -> None:
        """Begin to carry out one order."""
        self.spawn(self.carry_out(*json.loads(line)))

    async def carry_out(self, order: str, argument: Any) -> None:
        """Carry out one order, and print the answer as one line of JSON."""
        try:
            answer: Any = None
            if order == "configure":
                self.configure(argument)
            elif order == "reset":
                await self.back()
                await self.forget_clients()
                self.reset(argument)
            elif order == "log":
                answer = self.entries
            elif order == "away":
                self.away(argument)
            elif order == "back":
                await self.back()
            else:
                raise ValueError(f"no such order: {order}")
            print(json.dumps({"answer": answer}), flush=True)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            OSError,
            TypeError,
            ValueError,
        ) as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)

    # Answers.

    async def answer(self, request: Request, entry: Entry) -> Reply | None:
        """The reply to a request; None for never."""
        settings = self.settings
        prefix, token = settings["prefix"].rstrip("/"), settings["token"]
        given = request.headers.get("authorization")
        if settings["connecting"] and self.is_first(entry):
            await self.sleep(settings["connecting"])
        if settings["echo"]:
            return echo(request, **settings["echo"])
        if token and given != f"Bearer {token}":
            return json_reply({"error": "unauthorized"}, 401)
        if settings["basic"] and given != "Basic " + base64.b64encode(settings["basic"].encode()).decode():
            return json_reply({"error": "unauthorized"}, 401)
        if not request.path.startswith(prefix):
            return text_reply("404 page not found", 404)
        path = request.path[len(prefix) :] or "/"
        if path not in METHODS or not self.has(path):
            return text_reply("404 page not found", 404)
        if request.method not in METHODS[path]:
            return text_reply("405 method not allowed", 405)
        if settings["flaky"].get(path):
            return json_reply({"error": "not now"}, settings["flaky"][path].pop(0))
        try:
            if path in EMBED_PATHS:
                return await self.embed(path, request, entry)
            if path == "/api/show":
                return self.show(self.parse(request))
            return self.page(path)
        except Refusal as refusal:
            reply = error_reply(path, settings["shape"], refusal)
            if refusal.status in (429, 503) and settings["retry_after"] is not None:
                reply.headers["Retry-After"] = str(settings["retry_after"])
            return reply

    def has(self, path: str) -> bool:
        """Whether a server with these settings knows the path."""
        if path in ("/api/embed", "/v1/embeddings") and not self.settings["embed"]:
            return False
        if path == "/api/show" and not self.settings["show"]:
            return False
        if path == "/v1/embeddings" and not self.settings["lean"]:
            return False
        return path.startswith("/v1/") or self.settings["api"]

    def page(self, path: str) -> Reply:
        """What can be asked for with GET."""
        if path == "/":
            return text_reply("Ollama is running")
        if path == "/api/version":
            return json_reply({"version": self.settings["version"]})
        if path == "/v1/models":
            items = [{"id": name, "object": "model"} for name in self.models]
            return json_reply({"object": "list", "data": items})
        models = [{"name": n, "model": n, "digest": m["digest"]} for n, m in self.models.items()]
        if path == "/api/ps":
            models = [model for model in models if self.loaded and model["name"] == self.loaded[0]]
            if self.settings["ps"]:
                models = [{**model, "context_length": self.loaded[2]} for model in models]
        return json_reply({"models": models})

    @staticmethod
    def parse(request: Request) -> dict[str, Any]:
        """The body, which must be a JSON object."""
        if not request.body.strip():
            raise Refusal(400, "missing request body")
        try:
            body = json.loads(request.body)
        except ValueError as error:
            raise Refusal(400, f"invalid character: {error}") from None
        if not isinstance(body, dict):
            raise Refusal(400, "json: cannot unmarshal into Go value")
        return body

    def show(self, body: dict[str, Any]) -> Reply:
        """What is known about a model."""
        name = body.get("model") or body.get("name") or ""
        model = self.models.get(full_name(name))
        if model is None:
            raise Refusal(404, f"model '{name}' not found")
        info = {
            "general.architecture": "double",
            "double.context_length": model["context"],
            "double.embedding_length": model["dimensions"],
        }
        weights = model.get("weights", model["digest"] and hashlib.sha256(model["digest"].encode()).hexdigest())
        modelfile = f"# FROM {name}\n\nFROM /root/.ollama/models/blobs/sha256-{weights}\nTEMPLATE {model['template']}\n"
        card = {"modelfile": modelfile, "template": model["template"], "capabilities": model["capabilities"]}
        return json_reply({**card, "model_info": info})

    async def embed(self, path: str, request: Request, entry: Entry) -> Reply | None:
        """Answer one of the three embedding paths."""
        body = self.parse(request)
        given = body.pop("prompt" if path == "/api/embeddings" else "input", None)
        listed = given if isinstance(given, list) else [given]
        texts = [text for text in listed if isinstance(text, str)]
        fault = self.draw()
        entry.update(body=body, texts=texts, fault=fault)
        await self.sleep(self.settings["network"])
        while any(part in text for part in self.settings["hold"] for text in texts):
            self.question(path, given, body)  # what is refused is not held
            await self.changed.wait()
        if fault in ERRORS:
            raise Refusal(*ERRORS[fault])
        if fault == "html":
            return Reply(200, HTML, "text/html")
        if fault == "error200":
            return json_reply({"error": "upstream timed out"})
        if fault == "reset":
            return Reply(fault=fault)
        if fault == "hang" or any(part in text for part in self.settings["hang"] for text in texts):
            entry["fault"] = "hang"
            return None

        question = self.question(path, given, body)
        if deployments := self.settings["deployments"]:
            place = self.led.setdefault(entry["connection"], len(self.led) % len(deployments))
            question.dimensions = deployments[place]["dimensions"]
        loaded = await self.load(question.name, body.get("options"), question.context, entry)
        if question.texts:
            await self.compute(len(question.texts))
            self.refuse(texts)
        await self.sleep(self.random.uniform(0, self.settings["shuffle"]))
        await self.sleep(self.settings["slow_seconds"] if fault == "slow" else 0)
        seed, changed = question.model["seed"], self.settings["tokenizer"]
        seeds = [f"{seed} turned" if is_turned(text, *changed) else seed for text in question.texts]
        vectors = [vector(text, question.dimensions, seed) for text, seed in zip(question.texts, seeds)]
        if path == "/v1/embeddings" and self.settings["scale"] != 1.0:
            vectors = [[n * self.settings["scale"] for n in numbers] for numbers in vectors]
        if question.base64 and self.settings["base64"] == "mangled":  # as big-endian, say
            vectors = [list(struct.unpack(f">{len(v)}f", struct.pack(f"<{len(v)}f", *v))) for v in vectors]
        spent = time.monotonic() - entry["start"]
        durations = {"total_duration": int(spent * 1e9), "load_duration": int(loaded * 1e9)}
        answer = self.encode(question, self.distort(vectors, fault), durations, fault)
        if self.settings["fingerprint"] and path == "/v1/embeddings":
            answer = f'{answer[:-1]},"system_fingerprint":{compact(self.settings["fingerprint"])}}}'
        return Reply(200, answer.encode(), fault=fault)

    def is_first(self, entry: Entry) -> bool:
        """Whether a request is the first one of its connection."""
        return entry is next(one for one in self.entries if one["connection"] == entry["connection"])

    def draw(self) -> str:
        """The name of the next request's fault, "" for none."""
        if self.settings["next"]:
            name: str = self.settings["next"].pop(0)
            return "" if name == "ok" else name
        point = self.random.random() if self.settings["faults"] else 0.0
        for name, probability in self.settings["faults"].items():
            if point < probability:
                return name
            point -= probability
        return ""

    def question(self, path: str, given: Any, body: dict[str, Any]) -> Question:
        """Read a request, in the order of the real server's checks."""
        openai = path == "/v1/embeddings"
        encoding = (body.get("encoding_format") or "float").lower() if openai else "float"
        if encoding == "base64" and self.settings["base64"] == "refused":
            raise Refusal(422, "encoding_format: Input should be 'float'")
        if encoding not in ("float", "base64"):
            raise Refusal(
                400,
                f"Invalid value for 'encoding_format' = {body['encoding_format']}. "
                "Supported values: ['float', 'base64'].",
            )
        if openai and (given is None or given == []):
            raise Refusal(400, "invalid input")
        if given is None or (given == "" and not openai):  # an empty request loads the model
            given = []
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Refusal(400, "invalid input type")
        name = body.get("model") or ""
        model = self.models.get(full_name(name))
        if model is None and path == "/api/embeddings":
            raise Refusal(404, f'model "{name}" not found, try pulling it first')
        if model is None:
            raise Refusal(404, f"model '{name}' not found")

        options = {} if openai else body.get("options") or {}
        asked = options.get("num_ctx") or self.settings["context_length"] or 4096
        context = min(asked, model["context"])
        shortened = [cut(text, context) for text in texts]
        whole = body.get("truncate") is False or not self.settings["truncates"]
        if path == "/api/embed" and whole and shortened != texts:
            raise Refusal(400, "the input length exceeds the context length")
        self.check_limits(openai, texts, shortened, context)
        texts = shortened
        tokens = sum(len(text.split()) + SPECIAL_TOKENS for text in texts)
        dimensions = model["dimensions"]
        if path != "/api/embeddings" and 0 < (body.get("dimensions") or 0) < dimensions:
            dimensions = body["dimensions"]
        as_base64 = encoding == "base64" and bool(self.settings["base64"])
        told = asked if self.settings["ps"] == "asked" else context
        named = self.settings["named"] or name
        return Question(path, name, named, model, texts, tokens, dimensions, as_base64, told)

    def check_limits(self, openai: bool, texts: list[str], shortened: list[str], context: int) -> None:
        """Refuse too many texts, or those too long, as some servers do."""
        most, long = self.settings["most_inputs"], self.settings["too_long"]
        if openai and most and len(texts) > most["most"]:
            raise Refusal(most["status"], most["error"].format(given=len(texts), most=most["most"]))
        if openai and long and texts != shortened:
            given = max(len(text.split()) + SPECIAL_TOKENS for text in texts)
            raise Refusal(long["status"], long["error"].format(given=given, context=context))

    def refuse(self, texts: list[str]) -> None:
        """One bad text fails the request, and nobody says which; the others' work is lost."""
        for text in texts:
            if any(part in text for part in self.settings["crash"]):
                raise Refusal(400, CRASHED)
            for rule in self.settings["refuse"]:
                if rule["contains"] in text:
                    raise Refusal(rule["status"], rule["error"])

    async def load(self, name: str, options: Any, context: int, entry: Entry) -> float:
        """Load the model unless it is loaded with these options and this context; the seconds that took."""
        begin = time.monotonic()
        if self.loaded != (full_name(name), options or None, context):
            self.loaded = (full_name(name), options or None, context)
            self.loaded_at = begin + self.settings["load_seconds"]
            entry["loaded"] = True
        await self.sleep(self.loaded_at - begin)
        return time.monotonic() - begin

    async def compute(self, texts: int) -> None:
        """Take the time that so many texts take, queueing included.

        A batching server spends on a request the time of a full batch, however small it is, and
        that time is such that all its places together, with full batches, reach the peak.
        """
        pieces, seconds = texts, self.settings["seconds_per_text"]
        batching = self.settings["batching"]
        if batching:
            full = max(texts, batching["batch"])
            pieces, seconds = 1, full * batching["in_flight"] / batching["peak"]
        if self.slots and seconds:
            await self.slots.compute(pieces, seconds)
        elif seconds:
            await self.sleep(seconds * self.slowdown(time.monotonic()))

    def slowdown(self, moment: float) -> float:
        """The factor on all computing at a moment."""
        second = moment - self.started
        factor = 1.0
        for begin, end, times in self.settings["slowdowns"]:
            factor *= times if begin <= second < end else 1.0
        return factor

    @staticmethod
    async def sleep(seconds: float) -> None:
        """Sleep, or go on at once."""
        if seconds > 0:
            await asyncio.sleep(seconds)

    def distort(self, vectors: list[Vector], fault: str) -> list[Vector]:
        """The vectors as the fault has them."""
        result = list(vectors)
        if not result:
            return result
        chosen = self.random.randrange(len(result)) if fault in ("short", "zero", "nan") else 0
        if fault == "short":
            del result[chosen]
        elif fault == "zero":
            result[chosen] = [0.0] * len(result[chosen])
        elif fault == "nan":
            result[chosen][-1] = self.random.choice([math.inf, math.nan])
        elif fault == "long":
            result = [[*numbers, 0.5] for numbers in result]
        elif fault == "odd":
            result = [numbers[::-1] for numbers in result]
        elif fault == "twin":
            result = [result[0]] * len(result)
        return result

    @staticmethod
    def encode(question: Question, vectors: list[Vector], durations: Entry, fault: str) -> str:
        """The JSON of a good answer, in which only the vectors need a writer of their own."""
        model, tokens = compact(question.named), question.tokens
        if question.path == "/api/embeddings":  # not normalised, and in double precision
            longer = [n * 3.0 for n in vectors[0]] if vectors else []
            return compact({"embedding": longer})
        if question.path == "/api/embed":
            counts = {**durations, "prompt_eval_count": tokens} if question.texts else {}
            rest = compact(counts)[1:-1]  # zeros are left out, as Go does
            arrays = ",".join(map(decimals, vectors))
            return f'{{"model":{model},"embeddings":[{arrays}]{"," * bool(rest)}{rest}}}'
        write = packed if question.base64 else decimals
        items = [
            f'{{"object":"embedding","embedding":{write(numbers)},"index":{index}}}'
            for index, numbers in enumerate(vectors)
        ]
        if fault == "disorder":
            items.reverse()
        usage = compact({"prompt_tokens": tokens, "total_tokens": tokens})
        data = ",".join(items)
        return f'{{"object":"list","data":[{data}],"model":{model},"usage":{usage}}}'


# --- The command --------------------------------------------------------------------------------


def listen_to_orders(server: Server, loop: asyncio.AbstractEventLoop) -> None:
    """Hand on each line of stdin, and end the process with it.

    In a thread, since asyncio cannot read stdin on every system.
    """
    for line in sys.stdin.buffer:
        loop.call_soon_threadsafe(server.obey, line)
    os._exit(0)


async def serve(options: argparse.Namespace) -> None:
    """Serve until killed."""
    tls = None
    if options.cert:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(options.cert, options.key)
    server = Server(options.port, tls)
    server.reset(json.loads(options.settings))
    await server.back()
    print(f"listening on {'https' if tls else 'http'}://127.0.0.1:{server.port}", flush=True)
    if options.until_eof:
        loop = asyncio.get_running_loop()
        threading.Thread(target=listen_to_orders, args=(server, loop), daemon=True).start()
    await asyncio.Event().wait()  # for ever


def main(argv: list[str] | None = None) -> int:
    """Run the double as a command."""
    parser = argparse.ArgumentParser(description="A double of the Ollama embedding server.")
    parser.add_argument("--port", type=int, default=0, help="0 takes any free port")
    parser.add_argument("--settings", default="{}", metavar="JSON", help="see DEFAULTS")
    parser.add_argument("--cert", metavar="FILE", help="speak TLS with this certificate")
    parser.add_argument("--key", metavar="FILE", help="its private key")
    parser.add_argument("--until-eof", action="store_true", help="take orders from stdin")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(parser.parse_args(argv)))
    return 0


# --- For tests ----------------------------------------------------------------------------------


class Ollama(contextlib.AbstractContextManager["Ollama"]):
    """A double in a process of its own; runs from the making of the object until close()."""

    def __init__(self, cert: str = "", key: str = "", **settings: Any) -> None:
        self.tls = ["--cert", cert, "--key", key] if cert else []
        self.given = settings
        self.current = dict(settings)
        self.earlier: list[Entry] = []  # log of processes that were killed
        self.port = 0
        self.held: socket.socket | None = None
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()
        self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where the server is, prefix included."""
        scheme = "https" if self.tls else "http"
        return f"{scheme}://127.0.0.1:{self.port}{self.current.get('prefix', '')}"

    def start(self) -> None:
        """Start the server, after kill() on the same port and with the same settings."""
        if self.process:
            return
        if self.held:
            self.held.close()
        # Imported, since what Python runs as a script it compiles each time.
        here = os.path.dirname(os.path.abspath(__file__))
        code = f"import sys; sys.path.insert(0, {here!r}); import ollama; ollama.main()"
        command = [sys.executable, "-I", "-S", "-c", code, "--until-eof", *self.tls]
        command += ["--port", str(self.port), "--settings", json.dumps(self.current)]
        # In a session of its own, so that a signal meant for the test's group spares the double.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="ascii",
            start_new_session=True,
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line.startswith("listening on "):
            self._end()
            raise RuntimeError("the double did not start; stderr has its traceback")
        self.port = int(line.rpartition(":")[2])

    def configure(self, **settings: Any) -> None:
        """Change some settings, from the next request on."""
        self._order("configure", settings)
        self.current.update(settings)

    def reset(self) -> None:
        """Go back to the settings of the beginning, with an empty log."""
        self.start()
        self._order("reset", self.given)
        self.current, self.earlier = dict(self.given), []

    def log(self) -> list[Entry]:
        """All requests, in the order of their arrival; Server.begin() has the keys."""
        entries: list[Entry] = self._order("log") if self.process else []
        return self.earlier + entries

    def texts(self) -> list[str]:
        """All texts that were sent to be embedded, each as often as it was sent."""
        return [text for entry in self.log() for text in entry["texts"]]

    def away(self, seconds: float | None = None) -> None:
        """Drop all connections and refuse new ones, for a time or until back()."""
        self._order("away", seconds)

    def back(self) -> None:
        """End an away() now."""
        self._order("back")

    def kill(self) -> None:
        """Kill the process; start() brings it back, with none of its `next` faults left."""
        if not self.process:
            return
        self.earlier = self.log()
        self.current.pop("next", None)
        self.process.kill()
        self._end()
        self.held = held_socket(self.port)

    def close(self) -> None:
        """End the process, and forget the port."""
        if self.process:
            self._end()
        if self.held:
            self.held.close()

    def _end(self) -> None:
        """Let the process end: it does when its stdin ends."""
        process, self.process = self.process, None
        assert process and process.stdin and process.stdout
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _order(self, order: str, argument: Any = None) -> Any:
        """Have the process do something, and return its answer."""
        with self.lock:
            if not self.process:
                raise RuntimeError("the double is not running: start() it first")
            assert self.process.stdin and self.process.stdout
            self.process.stdin.write(json.dumps([order, argument]) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(f"the double refused to {order}: {answer['error']}")
        return answer["answer"]


if __name__ == "__main__":
    sys.exit(main())
