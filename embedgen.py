#!/usr/bin/env python3
"""Fill a database table with text embeddings through an Ollama server.

  python embedgen.py                                        movies.db, its table movies, Ollama on this machine
  python embedgen.py --load movies.csv --server hash:       try it, with nothing installed
  python embedgen.py --database shop.db --table products    embed a table of your own
  python embedgen.py --engine process --workers 10          worker processes
  python embedgen.py --engine async --concurrent 10 --force one event loop, all rows again

Rows that have an embedding of the same text are skipped, so the same command
run again embeds only what is missing or has changed.

Exit codes: 0 all rows have their embedding; 1 finished, but some rows failed;
2 wrong usage; 3 could not start or could not go on; 130 and 143 stopped by
SIGINT and SIGTERM; 141 standard output was closed. Whatever happens, what was
generated is saved.

How it works, in the order of this file: settings and command line, text,
wire, one batch's conversation, pace, engines, files to load, stores, progress
and report, the run, main.

  store.pending() --rows--> Run.batches() --batches--> Engine.run()
                                                          |  up to N conversations with the
                                                          |  server at once, as Pace has it
  store.save() <--vectors-- Run.take() <---results--------+

Only this process touches the database, the log and the terminal. A store knows
nothing of engines and an engine nothing of HTTP statuses, so that every pair of
them behaves the same.

Needs Python 3.9 or later and nothing else. MIT licence.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Optional, TextIO, TypeVar, Union

# Modules that only some runs need (asyncio, multiprocessing, http.client, logging, sqlite3 ...)
# are imported where they are used: --help and a run with nothing to do start in half the time.

if sys.version_info < (3, 9):  # noqa: UP036 - said in words, before a type alias fails
    print("error: embedgen needs Python 3.9 or later; this is " + sys.version.split()[0] + ".", file=sys.stderr)
    sys.exit(3)

__version__ = "0.1.0"

EXIT_DONE, EXIT_FAILED_ROWS, EXIT_USAGE, EXIT_STOPPED = 0, 1, 2, 3
EXIT_SIGINT, EXIT_SIGTERM, EXIT_SIGPIPE = 130, 143, 141  # 128 + the signal, as shells have it

T = TypeVar("T")


class Stop(Exception):
    """The run cannot start or cannot go on: one sentence for the user, and the exit code."""

    def __init__(self, message: str, code: int = EXIT_STOPPED) -> None:
        super().__init__(message, code)  # both, so that it pickles
        self.message, self.code = message, code

    def __str__(self) -> str:
        return self.message


class Reported(Stop):
    """A Stop after which the report has been printed."""


class UsageError(Stop):
    """The command line, or what it names, is wrong."""

    def __init__(self, message: str, code: int = EXIT_USAGE) -> None:
        super().__init__(message, code)


# ============================ settings and command line ============================


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, without the usage before it."""

    def error(self, message: str) -> Any:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            import difflib

            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        message = re.sub(r"\S*@", "***@", message)  # a password in the URL of a misspelt flag
        raise UsageError(f"{message} (see --help)")


def number(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `least` upwards."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} upwards")
        return int(text)

    return parse


def number_or_auto(text: str) -> int | None:
    """Parse a whole number from 1 upwards, or `auto`, which is None."""
    return None if text == "auto" else number(1)(text)


def seconds(text: str) -> float:
    """Parse a duration in seconds, above 0 and at most a day."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds between 0 and 86400")
    return value


def key_value(text: str) -> tuple[str, Any]:
    """Parse KEY=VALUE; the value is read as JSON where it is JSON (4096, true, 0.5)."""
    import json

    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def create_parser() -> Parser:
    """Return the parser of the command line; everything is a flag."""
    parser = Parser(
        prog="embedgen.py",
        description=(__doc__ or "").partition("\nHow it works")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    rows = parser.add_argument_group("what is embedded")
    add = rows.add_argument
    add("--database", metavar="URL", help="sqlite:///relative.db, sqlite:////absolute.db or a path ending in .db, "
        ".sqlite or .sqlite3 (default: $DATABASE_URL, else sqlite:///movies.db)")  # fmt: skip
    add("--table", metavar="NAME", default="movies", help="table or view to read (default: movies)")
    add("--id", metavar="COLUMN", help="its key, integer or text (default: the primary key, else id)")
    add("--columns", metavar="A,B", help="columns that make up the text (default: Title, Year, Genres, ...)")
    add("--text", metavar="TEMPLATE", help='the text itself, such as "{title} ({year}): {overview}"')
    add("--where", metavar="SQL", help="only rows that fulfil this condition")
    add("--target", metavar="NAME", help="table that receives the vectors (default: movie_embeddings for movies)")
    add("--load", metavar="FILE", help="first load a .csv, .tsv, .json or .jsonl file into --table")
    add("--force", action="store_true", help="embed every row again, existing or not")
    add("--limit", metavar="N", type=number(0), help="generate at most N embeddings in this run")

    way = parser.add_argument_group("how")
    add = way.add_argument
    add(
        "--engine",
        choices=sorted(ENGINES),
        default="async",
        help="one event loop, or worker processes (default: async)",
    )
    add("--concurrent", "--workers", dest="in_flight", metavar="N", type=number_or_auto,
        help="requests in flight at most; auto adapts to the server (default: auto)")  # fmt: skip
    add("--batch-size", metavar="N", type=number_or_auto, help="texts per request (default: auto)")

    server = parser.add_argument_group("the server")
    add = server.add_argument
    add("--server", metavar="URL", help="Ollama, or hash: for the built-in embedder, which finds shared words, not "
        "meaning (default: $OLLAMA_HOST, else http://localhost:11434)")  # fmt: skip
    add("--model", metavar="NAME", help="(default: $EMBEDGEN_MODEL, else nomic-embed-text)")
    add(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=300.0,
        help="longest silence of one request (default: 300)",
    )
    add("--dimensions", metavar="N", type=number(1), help="length of the vectors, for models that offer a choice")
    add("--option", metavar="KEY=VALUE", type=key_value, action="append", default=[],
        help="model option passed to the server, such as num_ctx=8192; may be given several times")  # fmt: skip

    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--noun", metavar="WORD", help="what a row is called in the report (default: from the table's name)")
    add("--quiet", action="store_true", help="print nothing when all went well")
    add("--json", action="store_true", help="print one JSON object at the end and nothing else")
    add("--log-dir", metavar="DIR", help="where the log goes (default: logs/ beside embedgen.py)")
    add("--verbose", action="store_true", help="log every request")
    add("--version", action="version", version=f"embedgen {__version__}")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the settings: flags first, then the environment, then the defaults."""
    options = create_parser().parse_args(argv)
    for name in ("database", "table", "id", "columns", "text", "where", "target", "load", "server", "model", "noun"):
        # As from a script's unset variable; taking it for "not given" would embed what was not meant.
        if getattr(options, name) is not None and not getattr(options, name).strip():
            raise UsageError(f"--{name} is empty. Give it a value, or leave it out.")
    if options.columns and options.text:
        raise UsageError("--columns and --text both say what the text is. Give one of them.")
    if options.quiet and options.json:
        raise UsageError("--quiet and --json both say what is printed. Give one of them.")
    options.database = options.database or os.environ.get("DATABASE_URL") or "sqlite:///movies.db"
    options.server = options.server or os.environ.get("OLLAMA_HOST", "").strip(" \t'\"") or "http://localhost:11434"
    if options.server == "hash:":
        if options.model not in (None, HashWire.model):
            raise UsageError(f"--server hash: has one model, {HashWire.model}. Leave out --model.")
        if options.dimensions not in (None, HashWire.dimensions):
            raise UsageError(f"--server hash: gives {HashWire.dimensions} dimensions. Leave out --dimensions.")
        options.model = HashWire.model
    options.model = options.model or os.environ.get("EMBEDGEN_MODEL") or "nomic-embed-text"
    # Ollama's names carry :latest or leave it out; both are one model.
    if options.model.endswith(":latest"):
        options.model = options.model[: -len(":latest")]
    return options


# =============================== text ===============================

# The default text: label, and the columns that it is taken from, the first that is not blank.
LABELS = (
    ("Title", ("title", "name")),
    ("Year", ("year",)),
    ("Genres", ("genres", "genre")),
    ("Description", ("overview", "plot", "summary", "description")),
    ("Cast", ("cast",)),
    ("Language", ("language",)),
    ("Rating", ("rating",)),
)
TELLING = {"Title", "Description"}  # without one of them there is no text worth embedding

# Nouns that only add an s to -ie; all others in -ies are taken for -y (stories, story).
IE_NOUNS = {"movies", "cookies", "calories", "zombies", "selfies", "ties", "pies", "brownies", "rookies", "hoodies"}


class Recipe(NamedTuple):
    """How a row becomes a text: literals and columns in turn.

    `parts` are (literal, columns) pairs, the literal standing before the value: the
    first of the columns that is not blank; without columns it ends the text. If
    `labelled`, a part without a value is left out and the others are joined by " | ".
    """

    parts: tuple[tuple[str, tuple[str, ...]], ...]
    labelled: bool

    def __str__(self) -> str:
        """The recipe for people, in the form of --text."""
        fields = [(before, "{" + " or ".join(columns) + "}" if columns else "") for before, columns in self.parts]
        if self.labelled:
            return " | ".join(f"{label}: {field}" for label, field in fields)
        return "".join(before + field for before, field in fields)

    def sql(self, value: Callable[[str], str], literal: Callable[[str], str]) -> str:
        """Return the SQL expression of the text; '' for a row whose columns are all blank.

        `value(column)` must give the SQL of the column's text, NULL where it is blank,
        and `literal(text)` that of a string. Built in the database so that a text can
        be hashed and compared there, without being moved.
        """
        values = [self.first(list(map(value, columns))) for _, columns in self.parts]
        known = [f"{one} IS NOT NULL" for one in values if one]
        pieces = []
        if self.labelled:
            for position, ((label, _), one) in enumerate(zip(self.parts, values)):
                piece = f"{literal(label + ': ')} || {one}"
                if position:
                    piece = f"CASE WHEN {' OR '.join(known[:position])} THEN ' | ' ELSE '' END || {piece}"
                pieces.append(f"COALESCE({piece}, '')")
            return " || ".join(pieces)
        for (before, _), one in zip(self.parts, values):
            pieces.append(f"{literal(before)} || COALESCE({one}, '')" if one else literal(before))
        return f"CASE WHEN {' OR '.join(known)} THEN {' || '.join(pieces)} ELSE '' END"

    @staticmethod
    def first(values: list[str]) -> str:
        """Return the SQL of the first value that is not NULL."""
        return f"COALESCE({', '.join(values)})" if len(values) > 1 else "".join(values)


# White space, and what takes no space at all: a text of these alone is no text.
BLANKS = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200C))) + "\u2028\u2029\u202f\u205f\u3000\ufeff"


def match(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that is meant by `name`: the same, or the same but for case."""
    names = list(names)
    if name in names:
        return name
    alike = [other for other in names if other.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else None


def listed(names: Iterable[str], most: int = 30) -> str:
    """Return names for an error's sentence."""
    names = list(names)
    return (", ".join(names[:most]) + (", ..." if len(names) > most else "")) or "none"


def column_of(name: str, columns: Sequence[str], table: str) -> str:
    """Return the column that is meant by `name`, or raise a UsageError that lists what there is."""
    column = match(name, columns)
    if column is None:
        raise UsageError(f'"{table}" has no column "{name}". It has: {listed(columns)}.')
    return column


def default_recipe(columns: Sequence[str], table: str) -> Recipe:
    """Return the recipe for a table with the well-known columns."""
    parts = []
    for label, candidates in LABELS:
        found = tuple(column for name in candidates if (column := match(name, columns)))
        if found:
            parts.append((label, found))
    if not TELLING.intersection(label for label, _ in parts):
        raise UsageError(
            f'"{table}" has no column such as title or description to make a text of. It has: {listed(columns)}. '
            f'Say which to use, with --columns A,B or --text "{{A}}: {{B}}".'
        )
    return Recipe(tuple(parts), labelled=True)


def columns_recipe(given: str, columns: Sequence[str], table: str) -> Recipe:
    """Return the recipe for --columns a,b: `A: ... | B: ...`; a comma in a name is written "a,b"."""
    import csv

    names = [name.strip() for name in next(csv.reader([given], skipinitialspace=True), [])]
    if not all(names) or not names:
        raise UsageError(f"--columns {given!r} has an empty name in it. Give names with commas between, such as a,b.")
    found = [column_of(name, columns, table) for name in names]
    return Recipe(tuple((label_of(column), (column,)) for column in found), labelled=True)


def label_of(column: str) -> str:
    """Return a column's label in the text: release_year is `Release year`."""
    words = column.replace("_", " ").strip() or column
    return words[:1].upper() + words[1:]


def template_recipe(template: str, columns: Sequence[str], table: str) -> Recipe:
    """Return the recipe for --text; braces are doubled to stand for themselves, as in str.format."""
    import string

    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(
            f"--text {template!r} is not a template: {error}. A brace itself is written {{{{ or }}}}."
        ) from None
    parts: list[tuple[str, tuple[str, ...]]] = []
    for before, name, form, conversion in fields:
        if name == "":
            raise UsageError(f"--text {template!r} has an empty field. Put a column's name between the braces.")
        if form or conversion:
            raise UsageError(
                f"--text takes plain {{column}} fields, without the format in {{{name}:{form or conversion}}}."
            )
        parts.append((before, (column_of(name, columns, table),) if name is not None else ()))
    if not any(named for _, named in parts):
        raise UsageError(f"--text {template!r} names no column. Put one in braces, such as {{{listed(columns, 1)}}}.")
    return Recipe(tuple(parts), labelled=False)


def singular(word: str) -> str:
    """Return the singular of an English noun, by rule: movies, movie; stories, story; boxes, box."""
    low = word.lower()
    if low.endswith(("ss", "us", "is", "series", "species", "news")) or not low.endswith("s"):
        return word
    if low.endswith("ies") and len(low) > 4 and re.split(r"[^a-z]", low)[-1] not in IE_NOUNS:
        return word[:-3] + ("Y" if word.isupper() else "y")
    if low.endswith(("sses", "xes", "ches", "shes", "zzes", "tuses", "buses", "viruses")) and low[-6:] != "caches":
        return word[:-2]
    return word[:-1]


def plural(word: str) -> str:
    """Return the plural of an English noun, by rule."""
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|ch|sh)$", word) else "s")


def digest_of(text: str) -> bytes:
    """Return the identity of a text: the SHA-256 of its UTF-8 form, 32 bytes."""
    import hashlib

    return hashlib.sha256(text.encode("utf-8")).digest()


class Row(NamedTuple):
    """One row to embed: its key, its text, and the text's SHA-256."""

    key: Any
    text: str
    digest: bytes


# =============================== wire ===============================
# Bytes in, vectors out: what is sent to a server, and what its answers mean. No I/O here.
# Ollama's forms are those of its docs/api.md and server/routes.go.


class Send(NamedTuple):
    """One HTTP request; `timeout` is the longest silence and `connect` the longest dialling, in seconds."""

    path: str
    body: bytes
    timeout: float
    connect: float = 10.0


class Reply(NamedTuple):
    """What came of a Send: status 0 and a reason in words where no whole answer came."""

    status: int
    body: bytes = b""
    seconds: float = 0.0
    retry_after: float = 0.0
    reason: str = ""
    timed_out: bool = False


class Trouble(Exception):
    """A request did not give vectors; the message is for people, the outcome for the pace."""

    outcome = "failed"  # as such, no sign that less should be asked for


class Unavailable(Trouble):
    """The server cannot now, or is not there: worth another try. `crashed` if it broke under this request."""

    def __init__(self, message: str, status: int = 0, retry_after: float = 0.0) -> None:
        """`status` is that of the server's answer, 0 if none came."""
        super().__init__(message)
        self.retry_after = retry_after
        self.outcome = "overloaded" if status else "failed"
        self.crashed = status in (400, 500)  # the other codes speak of load, or of what stands in front
        self.busy = status in (429, 503)
        self.slow = status in (408, 504, 524)  # a time-out on the way: less may go through


class Silent(Trouble):
    """No answer within the time."""

    outcome = "timeout"


class Refused(Trouble):
    """The server will not embed this content."""


class Garbled(Trouble):
    """The answer is not what was asked for, and must not be stored."""


class OtherDimensions(Garbled):
    """The vectors have another length than those already stored."""


class Superseded(Trouble):
    """The server lacks this path; the wire has changed to an older one, to be tried at once."""


class Server(NamedTuple):
    """Where a server is. `shown` is its address without secrets."""

    scheme: str
    host: str
    port: int
    path: str
    authorization: str

    @property
    def shown(self) -> str:
        """The address as it may be printed."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


def parse_server(text: str) -> Server:
    """Return the server for a URL or any of OLLAMA_HOST's forms: host, host:port, :port, scheme://host:port/path.

    As in Ollama's envconfig, the port is 11434 unless a scheme is given, which brings its
    own; an address that means "all interfaces" is this machine to a client.
    """
    from urllib.parse import unquote

    if re.fullmatch(r"hash(:\w+)?", text):
        raise UsageError(f'--server {text} is no server. The built-in embedder is called "hash:".')
    scheme, given, rest = text.strip().rpartition("://")
    scheme = scheme.lower() or "http"
    if scheme not in ("http", "https"):
        raise UsageError(f'--server {hide_password(text)} must begin with http:// or https://, or be "hash:".')
    netloc, slash, path = rest.partition("/")
    userinfo, _, hostport = netloc.rpartition("@")
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", hostport)
    if bracketed:
        host, port = bracketed[1], bracketed[2] or ""
    elif hostport.count(":") > 1:  # a bare IPv6 address
        host, port = hostport, ""
    else:
        host, _, port = hostport.partition(":")
    default = 11434 if not given else 443 if scheme == "https" else 80
    if port and not (re.fullmatch(r"\d{1,5}", port, re.ASCII) and int(port) < 65536):
        raise UsageError(f"--server {hide_password(text)} has no number of a port. Give --server http://HOST:PORT.")
    if re.search(r"[\s?#\\]", host + path) or "@" in path:
        raise UsageError(f"--server {hide_password(text)} is not an address. Give --server http://HOST:PORT.")
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    token = os.environ.get("OLLAMA_API_KEY", "").strip()
    authorization = f"Bearer {token}" if token else ""
    if userinfo:
        import base64

        authorization = "Basic " + base64.b64encode(unquote(userinfo).encode()).decode()
    if not re.fullmatch(r"[\x20-\x7e]*", authorization):
        raise UsageError("OLLAMA_API_KEY holds characters that a token cannot have.")
    return Server(scheme, host, int(port or default), (slash + path).rstrip("/"), authorization)


def hide_password(url: str) -> str:
    """Return a URL without the secret before its last @."""
    return re.sub(r"^(.*?://)?.*@", r"\1***@", url, flags=re.DOTALL)


def pack(numbers: Sequence[float]) -> bytes:
    """Return a vector as it is stored: float32, little-endian, nothing else."""
    import struct

    return struct.pack(f"<{len(numbers)}f", *numbers)


def length_of(vector: bytes) -> float:
    """Return the L2 norm of a vector as it is stored; NaN and infinity come out as such.

    Piece by piece: Python makes an object of every number, and 64 of them stay in the processor's nearest cache.
    """
    import math
    import struct

    pieces = struct.iter_unpack("<64f", vector + bytes(-len(vector) % 256))
    return math.hypot(*[math.hypot(*piece) for piece in pieces])


def words_of(body: bytes) -> str:
    """Return what an error's body says, on one line: `error` is a string on /api, an object on /v1."""
    import json

    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) and error.get("message") else error
    except (ValueError, RecursionError, KeyError, TypeError):
        text = body.decode("utf-8", "replace")
        if text.lstrip()[:1] == "<":
            text = "an HTML page"
    text = " ".join(str(text).split())
    return text if len(text) <= 300 else text[:300] + "..."


def describe(error: Exception) -> str:
    """Return a network error in words."""
    name = type(error).__name__
    if name == "gaierror":
        return "the host's name cannot be resolved"
    if name == "SSLCertVerificationError":
        return f"the certificate is not trusted: {getattr(error, 'verify_message', error)}"
    if name == "SSLError":
        return f"TLS failed, does the server speak http? {getattr(error, 'reason', None) or error}"
    if isinstance(error, EOFError):
        return "the connection was closed without an answer"
    text = getattr(error, "strerror", None) or str(error) or name
    # asyncio puts its own words about the address around the number that says it all.
    number = re.search(r"\[Errno (\d+)\]", text) or (re.match(r"(\d+)", str(getattr(error, "errno", None))))
    if number:
        text = os.strerror(int(number[1]))
    return text[:1].lower() + text[1:]


def headers_for(server: Server) -> dict[str, str]:
    """Return the headers of every request."""
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "User-Agent": f"embedgen/{__version__}",
    }
    if server.authorization:
        headers["Authorization"] = server.authorization
    return headers


def retry_after(value: str) -> float:
    """Return the seconds of a Retry-After header; its form as a date is not worth a parser and counts as none."""
    return float(value) if re.fullmatch(r"\d{1,6}", value.strip(), re.ASCII) else 0.0


# A 400 with one of these is a runner that died under the request, not a bad text (0.13.3 on);
# and these, whatever their status, speak of the content (NaN was a 500 before 0.14).
DEAD_RUNNER = re.compile(r"\bEOF\b|do embedding request|connection (?:refused|reset)|forcibly closed")
BAD_CONTENT = re.compile(r"\bNaN\b|context length|context size|input (?:is )?too long|too large to process")


# Paths for vectors, newest first. The first gives 4 bytes a number instead of some 12, and no decimals to parse (from
# 0.12.7 on), but cuts long texts without a word; the last, for servers before 0.2.6, takes one text at a time.
LEAN, USUAL, LEGACY = "/v1/embeddings", "/api/embed", "/api/embeddings"
# Bytes of UTF-8. A token is made of at least one, so that a text of no more of them than the context has tokens cannot
# be cut. Models add two tokens of their own, tokenizers a space; the rest is for words that they spell out. A model's
# context may be longer than what Ollama gives it unasked: that was 2,048 tokens for long, and is still so in one piece.
LEAN_MARGIN, LEAN_MOST = 16, 2048


class OllamaWire:
    """Ollama's own protocol: POST /api/embed, or what else of the paths above serves better."""

    product = "Ollama"
    unit_length = True  # both newer paths promise L2-normalised vectors

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        self.server, self.model, self.timeout = server, str(options.model), float(options.timeout)
        self.address = server.shown
        self.common: dict[str, Any] = {"model": self.model}
        if options.dimensions:
            self.common["dimensions"] = options.dimensions
        if options.option:  # the same in every request: Ollama reloads the model where they differ
            self.common["options"] = dict(options.option)
        self.lean_bytes = 0  # a batch takes the lean path if no text is longer; 0: none does
        self.lean_seen = False  # whether the server has given vectors over it
        self.legacy = False
        # Vectors must have this length: as asked for, as stored, or as the server's model card says.
        self.dimensions: int | None = options.dimensions
        self.certain = options.dimensions is not None  # a model card may be wrong

    @property
    def most_texts(self) -> int:
        """Texts that one request can carry."""
        return 1 if self.legacy else sys.maxsize

    def converse(self, texts: list[str]) -> Conversation:
        """Return the conversation that embeds `texts`."""
        return Talk(self).embed(texts)

    def greet(self) -> Conversation:
        """Return the conversation that checks, before a row is read, that the server has the model."""
        import json

        body = json.dumps({"model": self.model, "name": self.model}).encode()  # "name" is the older form
        # Two seconds and a half allow for one lost packet; whoever waits here is a person at a prompt.
        reply = yield Send("/api/show", body, min(self.timeout, 30.0), connect=2.5)
        assert reply is not None
        if reply.status == 0:
            raise Stop(f"cannot reach {self.product} at {self.server.shown} ({reply.reason}). {self.advice()}")
        try:
            self.check(reply, "/api/show")
            card = json.loads(reply.body)
            figures = [(key, n) for key, n in card["model_info"].items() if isinstance(n, int)]
            # A model may come with a shorter context set than it could have (all-minilm does).
            contexts = [int(n) for n in re.findall(r"^num_ctx +(\d+)", card.get("parameters") or "", re.MULTILINE)]
        except (Trouble, ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return []  # busy, or older, or another server with Ollama's protocol: it will show
        lengths = [n for key, n in figures if key.endswith(".embedding_length")]
        if self.dimensions is None and lengths:
            self.dimensions = lengths[0]
        own = [n for key, n in figures if key.endswith(".context_length")]
        if own and "options" not in self.common:  # which the lean path does not take
            self.lean_bytes = max(min(*own, *contexts, LEAN_MOST) - LEAN_MARGIN, 0)
        return []

    def advice(self) -> str:
        """Return what to do about a server that cannot be reached."""
        return 'Start it with "ollama serve", or give --server URL.'

    def request(self, texts: list[str], timeout: float) -> Send:
        """Return the request that asks for the vectors of `texts`."""
        import json

        asked: dict[str, Any]
        if self.legacy:
            path, asked = LEGACY, {"prompt": texts[0]}
        elif 0 < max(map(len, map(str.encode, texts))) <= self.lean_bytes:
            path, asked = LEAN, {"input": texts, "encoding_format": "base64"}
        else:
            path, asked = USUAL, {"input": texts, "truncate": True}
        return Send(path, json.dumps({**self.common, **asked}).encode(), timeout)

    def way(self, path: str) -> str:
        """Return for the log how vectors come over a path."""
        return f"{'base64' if path == LEAN and self.lean_bytes else 'decimals'} over {path}"

    def read(self, path: str, reply: Reply, texts: list[str]) -> list[bytes]:
        """Return the vectors in a reply, one for each text, fit to be stored; or raise what is wrong with it.

        `path` is where the request went: another conversation may have changed the protocol meanwhile.
        """
        self.check(reply, path)
        try:
            vectors = self.vectors(path, reply.body)
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            if path == LEAN and not self.lean_seen:
                raise self.without_lean("no embeddings") from None
            said = words_of(reply.body)
            raise Garbled(f"the answer holds no embeddings: {said[:100]!r}") from None
        return gate(vectors, texts, self.unit_length)

    def vectors(self, path: str, body: bytes) -> list[Any]:
        """Return the vectors in an answer's body, packed or as lists of numbers, or raise any of JSON's surprises."""
        import binascii
        import json

        answer = json.loads(body)
        if path == LEGACY:
            return [normalised(answer["embedding"])]
        if path == USUAL:
            return list(answer["embeddings"])
        items: list[Any] = [None] * len(answer["data"])
        for item in answer["data"]:
            items[item["index"]] = item["embedding"]
        if any(isinstance(item, list) for item in items):  # from before 0.12.7: nothing is gained by this path
            self.lean_bytes = 0
        else:
            items = [binascii.a2b_base64(item) for item in items]
            if any(len(item) % 4 for item in items):
                raise ValueError("not a whole number of floats")
        self.lean_seen = True
        return items

    def without_lean(self, words: str) -> Superseded:
        """Leave the lean path for the rest of the run."""
        self.lean_bytes = 0
        return Superseded(words)

    def check(self, reply: Reply, path: str) -> None:
        """Raise what the reply's status means, unless it is 200."""
        if reply.status == 200:
            return
        if reply.status == 0:
            raise Silent(reply.reason) if reply.timed_out else Unavailable(reply.reason)
        words = words_of(reply.body)
        said = f"HTTP {reply.status}: {words}" if words else f"HTTP {reply.status}"
        if reply.status == 404 and "model" in words and "not found" in words:
            raise Stop(f'{self.server.shown} has no model "{self.model}". Fetch it with "ollama pull {self.model}".')
        if "does not support embeddings" in words:
            raise Stop(f'the model "{self.model}" cannot embed ({said}). Give --model nomic-embed-text, for example.')
        if reply.status in (400, 413, 422, 500) and BAD_CONTENT.search(words):
            raise Refused(words)
        if reply.status in (408, 429) or reply.status >= 500 or DEAD_RUNNER.search(words):
            raise Unavailable(said, reply.status, reply.retry_after)
        if path == LEAN and (reply.status == 404 or not self.lean_seen):
            raise self.without_lean(said)  # an older server, or one behind a proxy that lets through only /api
        if path == USUAL and reply.status == 404:
            self.legacy = True
            raise Superseded(said)
        if path == LEGACY and reply.status == 404:
            raise Stop(f"{self.server.shown} is no Ollama server ({said}). Give --server URL.")
        if reply.status in (401, 403):
            raise Stop(f"{self.server.shown} refuses access ({said}). Set OLLAMA_API_KEY to the token.")
        if 300 <= reply.status < 400:
            raise Stop(f"{self.server.shown} sends elsewhere ({said}). Give --server the final address.")
        raise Refused(words or said)


def normalised(vector: Any) -> Any:
    """Return a vector scaled to length 1 (the legacy path does not); what is none is left to the gate."""
    import math

    try:
        norm = math.hypot(*vector)
        return [number / norm for number in vector] if 0 < norm < math.inf else vector
    except TypeError:
        return vector


def gate(vectors: list[Any], texts: list[str], unit_length: bool) -> list[bytes]:
    """Return vectors, lists of numbers or packed already, packed if each is sound, or raise Garbled: 200 is no proof.

    Servers have answered 200 with too few vectors, all zeros, NaN as null, and one vector
    for every text. `unit_length`: the server promises L2 norm 1.
    """
    import math
    import struct

    if len(vectors) != len(texts):
        raise Garbled(f"{len(vectors)} vectors came for {len(texts)} texts")
    packed = []
    for vector in vectors:
        try:
            ready = isinstance(vector, bytes)
            norm = length_of(vector) if ready else math.hypot(*vector)
            packed.append(vector if ready else pack(vector))
        except (TypeError, OverflowError, struct.error):
            raise Garbled("a vector holds something that is no number") from None
        if not 0 < norm < math.inf:
            raise Garbled("a vector is all zero" if norm == 0 else "a vector holds NaN or infinity")
        # float32 and a server's printing of it are good to 1e-4; what is off by more was not normalised.
        if unit_length and abs(norm - 1) > 0.01:
            raise Garbled(f"a vector has length {norm:.3g} instead of 1")
    if len({len(vector) for vector in packed}) > 1:
        raise Garbled("vectors of different dimensions came in one answer")
    if len(set(packed)) < len(packed) and len(set(packed)) < len(set(map(plain, texts))):
        raise Garbled("different texts were given one vector")
    return packed


def plain(text: str) -> str:
    """Return what an uncased tokenizer sees of a text: texts alike in this may share a vector.

    Only the beginning, since a text longer than the context is cut there.
    """
    import unicodedata

    decomposed = unicodedata.normalize("NFKD", text[:1000])
    return "".join(character for character in decomposed.casefold() if character.isalnum())


class HashWire:
    """No server: signed feature hashing of words and word pairs, computed in this process.

    K. Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009.
    It finds shared words, not meaning: for trying the program, not for real search.
    """

    product = address = "hash:"
    model = "hash-256"
    dimensions = 256
    certain = True
    server = Server("hash", "", 0, "", "")

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        pass

    def greet(self) -> Conversation:
        """There is nobody to greet."""
        return []
        yield  # makes it a generator

    def converse(self, texts: list[str]) -> Conversation:
        """Return a conversation that knows the answers without asking anyone."""
        return [hash_embedding(text) or "no words in the text" for text in texts]
        yield  # makes it a generator


def hash_embedding(text: str) -> bytes:
    """Return the vector of 256 float32, or nothing for a text without words."""
    import hashlib
    import math

    words = re.findall(r"\w+", text.casefold())
    vector = [0.0] * HashWire.dimensions
    # Long words are rare words, in any language and without a list of them: they say the most. Pairs weigh
    # little: they break ties, and 256 places are few. Chosen on the sample films, where the three longest
    # words of a description find its film first in 97 % of cases.
    features = {word: float(len(word)) for word in words}
    features.update({f"{one} {two}": min(len(one), len(two)) / 5 for one, two in zip(words, words[1:])})
    for feature, weight in features.items():
        code = int.from_bytes(hashlib.blake2b(feature.encode("utf-8", "replace"), digest_size=4).digest(), "little")
        vector[code % HashWire.dimensions] += weight if code >> 31 else -weight
    norm = math.hypot(*vector)
    return pack([number / norm for number in vector]) if norm else b""


def wire_for(options: argparse.Namespace) -> OllamaWire | HashWire:
    """Return the wire that speaks to --server."""
    if options.server == "hash:":
        return HashWire(HashWire.server, options)
    return OllamaWire(parse_server(options.server), options)


# =============================== one batch's conversation ===============================
# A generator without I/O or clock: it yields what is to be done and is sent back what came.
# Whoever drives it, with streams, a blocking connection or a list, it decides the same.


class Wait(NamedTuple):
    """Let this many seconds pass."""

    seconds: float


class Exchange(NamedTuple):
    """What happened to one request, for the pace and the log; `outcome` is ok, overloaded, timeout or failed.

    `texts` is 0 for the known-good text, which is none of the table's; `way` is how vectors came, in words.
    """

    texts: int
    seconds: float
    outcome: str
    reason: str = ""
    way: str = ""


Answers = list[Union[bytes, str]]  # for each text its vector, or in words why it has none
Conversation = Generator[Union[Send, Wait, Exchange], Optional[Reply], Answers]

PATIENCE = 120.0  # seconds of trying without one good answer, until the server is given up
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0  # seconds; the cap bounds the delay after a server has come back
LONGEST_RETRY_AFTER = 600.0  # seconds; who asks for more may as well be away
SILENCES = 3  # a text that alone, in a request of its own, times out so often has failed
# Crashes of the server under a request, in a row, until its texts are suspected: some seconds in all for several,
# which are halved then, and most of a minute for one that would fail. Servers do crash by themselves.
CRASHES, CRASHES_ALONE = 4, 8
SUSPICIONS = 3  # of one text, before it fails although the server was not well right after it either
KNOWN_GOOD = "a short text"  # no model has a reason to refuse this


class Talk:
    """One conversation with a server, about one batch of texts."""

    def __init__(self, wire: OllamaWire, jitter: Callable[[], float] | None = None) -> None:
        """`jitter` gives numbers from 0 to 1 that spread the waits of many clients."""
        if jitter is None:
            import random

            jitter = random.random
        self.wire, self.jitter, self.timeout = wire, jitter, wire.timeout
        self.trying = 0.0  # seconds since the last good answer
        self.waits = 0  # and waits in that time

    def embed(self, texts: list[str]) -> Conversation:
        """Return the answers for `texts`; raise Stop where the server is away or of no use.

        A batch that is refused, or keeps failing, is halved until the texts at fault stand
        alone. A single text is failed only when the server embeds a known-good text right after
        it, or after the last of SUSPICIONS: then the fault is not the server's.
        """
        if len(texts) > self.wire.most_texts:
            return (yield from self.halve(texts))
        single = len(texts) == 1
        garbled = silences = crashes = suspicions = 0
        while True:
            try:
                return list((yield from self.ask(texts)))
            except Superseded:
                return (yield from self.embed(texts))
            except Refused as refused:
                trouble: Trouble = refused
                suspect = True
            except Garbled as unusable:
                trouble = unusable
                garbled += 1
                suspect = garbled > 1
                if isinstance(unusable, OtherDimensions):
                    yield from self.until_sane()  # raises Stop if all vectors of this server are like that
            except Silent as silent:
                trouble = silent
                silences += 1
                suspect = not single or silences >= SILENCES
                # The server may go on computing what nobody waits for any more: asking again
                # before it has time for a short text would only lengthen its queue.
                yield from self.until_sane()
            except Unavailable as away:
                trouble = away
                crashes += away.crashed if single else CRASHES // 2 if away.slow else not away.busy
                suspect = crashes >= (CRASHES_ALONE if single else CRASHES)
            if not suspect:
                yield from self.pause(trouble)
                continue
            if not single:
                if crashes:
                    yield from self.until_sane()  # halves sent to a server that is down would prove nothing
                return (yield from self.halve(texts))
            # Is it the text, or the server? Only the server's word on a known-good text tells.
            suspicions += 1
            if (yield from self.until_sane()) or suspicions >= SUSPICIONS:
                return [str(trouble)]
            crashes = 0

    def halve(self, texts: list[str]) -> Conversation:
        """Return the answers for each half of `texts`, asked for on its own."""
        middle = len(texts) // 2
        first = yield from self.embed(texts[:middle])
        return first + (yield from self.embed(texts[middle:]))

    def ask(self, texts: list[str], probe: bool = False) -> Generator[Any, Reply | None, list[bytes]]:
        """Return the vectors of `texts` from one request, or raise the Trouble with it."""
        request = self.wire.request(texts, self.timeout)
        reply = yield request
        assert reply is not None
        try:
            vectors = self.wire.read(request.path, reply, texts)
            yield from self.check_dimensions(len(vectors[0]) // 4, probe)
        except Superseded:
            raise
        except Trouble as trouble:
            if isinstance(trouble, Silent):
                self.timeout = min(self.timeout * 2, self.wire.timeout * 4)
            # A long silence may mean that much was asked for.
            if probe or not (isinstance(trouble, Silent) or getattr(trouble, "slow", False)):
                self.trying += reply.seconds
            if probe:
                yield Exchange(0, reply.seconds, "failed", str(trouble))
            else:
                yield Exchange(len(texts), reply.seconds, trouble.outcome, str(trouble))
            raise
        self.trying = self.waits = 0
        if not probe:
            yield Exchange(len(texts), reply.seconds, "ok", way=self.wire.way(request.path))
        return vectors

    def check_dimensions(self, dimensions: int, probe: bool) -> Generator[Any, Reply | None, None]:
        """Raise OtherDimensions if vectors of that length do not belong with the others."""
        wire = self.wire
        if probe and not wire.certain:
            return  # nothing is known yet that it could differ from
        if not wire.certain and dimensions != wire.dimensions:
            # The model card says otherwise, or nothing. One answer may be a fault, two in a row are the model.
            vectors = yield from self.ask([KNOWN_GOOD], probe=True)
            if not wire.certain and len(vectors[0]) // 4 == dimensions:  # no other conversation has settled it
                wire.dimensions = dimensions
        if dimensions != wire.dimensions:
            raise OtherDimensions(f"vectors of {dimensions} dimensions came instead of {wire.dimensions}")
        wire.certain = True

    def until_sane(self) -> Generator[Any, Reply | None, bool]:
        """Wait until the server embeds a known-good text; return whether it did so at once."""
        at_once = True
        while True:
            try:
                yield from self.ask([KNOWN_GOOD], probe=True)
                return at_once
            except OtherDimensions as error:
                raise Stop(f"{self.wire.server.shown} does not give what the table holds: {error}.") from None
            except Superseded:
                continue
            except Trouble as trouble:
                at_once = False
                yield from self.pause(trouble)

    def pause(self, trouble: Trouble) -> Generator[Any, Reply | None, None]:
        """Wait before another try: longer each time, jittered, or as long as the server asks for.

        Full jitter about the middle: M. Brooker, "Exponential Backoff And Jitter", AWS, 2015.
        """
        if self.trying >= PATIENCE:
            raise Stop(
                f"{self.wire.product} at {self.wire.server.shown} has given no good answer for "
                f"{self.trying / 60:.0f} minutes ({trouble}). Run the same command again when it does."
            )
        wait = min(FIRST_WAIT * 2**self.waits, LONGEST_WAIT) * (0.5 + self.jitter())
        asked_for = min(getattr(trouble, "retry_after", 0.0), LONGEST_RETRY_AFTER)
        self.trying += wait  # waiting as long as the server asks for is not trying
        self.waits += 1
        yield Wait(max(wait, asked_for))


# =============================== pace ===============================


class Pace:
    """How many requests may be in flight, and how large the next batch is.

    One experiment at a time: a setting is changed, the throughput measured, and the change undone unless it pays.
    What makes requests wait longer (more in flight, or larger ones beyond the target time) must raise the
    throughput; what makes them wait less must not lower it. When nothing is left to try, it rests; it starts
    over after a while, or at once if the throughput changes by itself. Little's law gives the throughput
    without a clock: texts under way when a request was sent / seconds until its answer.
    """

    MOST_IN_FLIGHT = 64  # connections; a server that gains from more of them gains from larger batches, too
    LARGEST_BATCH = 128  # texts; their answer is some 1.5 MB of JSON, and larger ones hardly gain any more
    TARGET = 1.0  # seconds; requests take one to two of these: Ctrl-C is quick, the bar moves, overhead is small
    GAIN = 1.03  # times the throughput a change must bring that costs waiting; less is lost in the noise
    KEEP = 0.96  # times the throughput a change must leave that saves waiting
    LEAP = 1.4  # times the throughput: beyond any noise; also what the start, a leap of 8, must bring
    PAUSE, LONGEST_PAUSE = 60.0, 600.0  # seconds of rest, doubling: looking around costs 2 s of work in a pause
    RECOVERY = 10.0  # seconds of the first rest after an overload
    # How fast trouble counts: more than half of it, from none, takes 14 answers that speak of overload, or 3 time-outs
    # in a row. Some servers fail now and then whatever is asked of them, and a slow-down would not help them.
    WEIGHT: ClassVar[dict[str, float]] = {"ok": 0.05, "overloaded": 0.05, "timeout": 0.25}
    ROUND = ("smaller requests", "more in flight", "larger requests", "fewer in flight")  # experiments, in order

    def __init__(self, in_flight: int | None, batch_size: int | None, timeout: float = 300.0) -> None:
        """A number fixes that setting, None leaves it to Pace."""
        self.in_flight = in_flight or 2  # one being computed, one waiting: the shortest pipe without a gap
        self.batch_size = batch_size or 4  # a few seconds' work on the slowest laptop
        self.reason = "start"
        self._auto_in_flight, self._auto_batch = in_flight is None, batch_size is None
        self._target, self._timeout = min(self.TARGET, timeout / 60), timeout
        self._rate = self._took = 0.0  # texts/s (0: not known) and seconds per request before the experiment
        self._move, self._needed = "", 0.0  # the experiment under way, and times the throughput it must reach
        self._before = self.in_flight, self.batch_size  # the settings to go back to
        self._moves = ["more of both", *self.ROUND]  # what to try next
        self._step = 2  # times as many in flight next time; 4 while that nearly doubles the throughput
        self._costly = False  # every request takes the same time, however small: only larger ones help
        self._rested, self._pause = 0.0, self.PAUSE
        self._trouble = 0.0  # from 0, all is well, to 1, nothing is
        self._first = self.in_flight  # answers that may have waited for the model to load
        self._count = self._texts = self._load = 0  # the measurement so far
        self._seconds = 0.0

    def observe(self, texts: int, seconds: float, outcome: str, under_way: int | None = None) -> None:
        """Learn that an exchange ended: ok, overloaded, timeout, or failed for another reason.

        `under_way` are the texts that were in flight when it was sent, its own included.
        """
        full = self.in_flight * self.batch_size
        load = full if under_way is None else under_way
        self._first -= 1
        if load > full or outcome == "failed" or not (self._auto_in_flight or self._auto_batch):
            return  # sent before the last reduction; or no sign of too much; or nothing to decide
        self._trouble += ((outcome != "ok") - self._trouble) * self.WEIGHT.get(outcome, 0.0)
        if outcome != "ok":
            if self._trouble > 0.5:
                self._back_off(outcome)
        elif self._first >= 0 and seconds > self._target:
            return
        elif load >= 0.75 * full and abs(texts - self.batch_size) <= 0.2 * self.batch_size:  # sent as things are now
            self._count, self._texts = self._count + 1, self._texts + texts
            self._load, self._seconds = self._load + load, self._seconds + max(seconds, 0.001)
            if self._count >= self._enough(self._load / self._seconds):
                self._decide(self._load / self._seconds)

    def _measure_anew(self) -> None:
        self._count, self._texts, self._load, self._seconds = 0, 0, 0, 0.0

    def _enough(self, rate: float) -> int:
        """Return how many answers settle the matter: few if the difference is far beyond noise."""
        import math

        if self._moves[:1] == ["more of both"] or self._move == "more of both":
            return 2
        if not self._rate:
            return max(8, self.in_flight)
        few = max(4, self.in_flight // 8)
        many = 32 if self._move == "more in flight" else 16  # a wrong "more" is the error that adds up
        noise = max(0.3, 1.2 / math.sqrt(self._count))
        return few if abs(math.log(rate / self._rate)) > noise else max(many, self.in_flight)

    def _decide(self, rate: float) -> None:
        """A measurement is complete: judge the experiment, then start the next one or rest."""
        ratio, took, elapsed = rate / (self._rate or rate), self._seconds / self._count, self._texts / rate
        move, self._move = self._move, ""
        self._measure_anew()
        if move and ratio < self._needed:
            self._undo(move, rate, ratio)
        elif (ratio > self.LEAP and self._needed < 1) or (not move and ratio < 1 / self.LEAP):
            self._pause, self._rate = self.PAUSE, 0.0  # no experiment explains that: the server has changed
            self._start_round()
        else:
            self._rate, self._took = rate, took
            if move:  # it worked: once more, but short requests come first, unless throughput soars
                self._step = 4 if ratio > 1.7 else 2
                self._put_first(*((move, "more in flight") if self._step == 4 else ("smaller requests", move)))
            elif not self._moves:
                self._rested += elapsed
                if self._rested >= self._pause:
                    self._pause = min(2 * self._pause, self.LONGEST_PAUSE)
                    self._start_round()
            while self._moves and not self._move:
                self._try(self._moves.pop(0))
        self._needed = self._needed if self._move else 0.0

    def _undo(self, move: str, rate: float, ratio: float) -> None:
        """Back to the settings before; measured anew, as the server may have changed meanwhile."""
        if move == "smaller requests" and ratio < 1.25 * self.batch_size / self._before[1]:
            self._costly = True
            self._put_first("larger requests")
        elif move != "larger requests":
            self._step = 2
        self._change(*self._before, f"{move} did not pay: {rate:.1f} against {self._rate:.1f} texts/s")
        self._rate = 0.0

    def _put_first(self, *moves: str) -> None:
        self._moves = [*dict.fromkeys([*moves, *self._moves])]

    def _start_round(self) -> None:
        self._moves, self._costly, self._rested = list(self.ROUND), False, 0.0

    def _try(self, move: str) -> None:
        """Start an experiment, unless it does not apply."""
        in_flight, batch, took, target, needed = self.in_flight, self.batch_size, self._took, self._target, self.GAIN
        if move == "more of both" and took < 1.25 * target and self._auto_in_flight and self._auto_batch:
            in_flight, batch, needed = 2 * in_flight, 4 * batch, self.LEAP
        elif move == "more in flight":
            in_flight = int(in_flight * min(self._step, max(1.0, self._timeout / 4 / took)))
            needed = self.KEEP if self.in_flight == 1 else self.GAIN if took < 2 * target else 1.2
        elif move == "fewer in flight" and (took > 2 * target or self._pause > self.PAUSE):
            in_flight, needed = min(in_flight, max(2, in_flight // 2)), self.KEEP
        elif move == "smaller requests" and took > 2 * target and not self._costly:
            batch, needed = int(batch * max(0.25, 1.5 * target / took)), self.KEEP
        elif move == "larger requests" and took < target:
            batch, needed = int(batch * min(4.0, 1.5 * target / took)), self.KEEP
        elif move == "larger requests" and (took < 2 * target or self._costly):
            batch, needed = 2 * batch, self.LEAP if self._costly else self.GAIN
        in_flight = min(self.MOST_IN_FLIGHT, in_flight) if self._auto_in_flight else self.in_flight
        batch = min(self.LARGEST_BATCH, max(1, batch)) if self._auto_batch else self.batch_size
        if (in_flight, batch) != (self.in_flight, self.batch_size):
            self._move, self._needed, self._before = move, needed, (self.in_flight, self.batch_size)
            self._change(in_flight, batch, f"trying {move}: {self._rate:.1f} texts/s, {took:.1f} s per request")

    def _change(self, in_flight: int, batch: int, reason: str) -> None:
        was = f" with {self.in_flight} x {self.batch_size}"
        self.in_flight, self.batch_size, self.reason = in_flight, batch, reason + was
        self._measure_anew()

    def _back_off(self, outcome: str) -> None:
        """Half as much; or, if only an experiment went too far, back to where it started."""
        in_flight, batch = self.in_flight, self.batch_size
        if self._move and outcome == "overloaded":
            in_flight, batch = self._before
        else:
            in_flight = max(1, in_flight // 2) if self._auto_in_flight else in_flight
            if self._auto_batch and (outcome == "timeout" or in_flight == self.in_flight):
                batch = max(1, batch // 2)
            self._pause = self.RECOVERY
        self._move, self._needed, self._moves, self._step = "", 0.0, [], 2
        self._rate = self._rested = self._trouble = 0.0
        self._change(in_flight, batch, "requests time out" if outcome == "timeout" else "the server is overloaded")


# =============================== engines ===============================
# An engine turns batches into results, in any order, holding a bounded number in flight.
# Engine.run is that loop; a subclass says how one batch is sent on its way and waited for.


class Batch(NamedTuple):
    """Rows whose texts go to the server together; `under_way` texts were in flight when they did, these included."""

    rows: list[Row]
    under_way: int

    @property
    def texts(self) -> list[str]:
        """What is to be embedded."""
        return [row.text for row in self.rows]


class Result(NamedTuple):
    """A batch's rows with their answers."""

    rows: list[Row]
    answers: Answers


# What is heard of a batch: a request of its conversation, its answers, or the exception that ended it.
Event = tuple[Batch, Union[Exchange, Answers, Exception]]

TICK = 0.1  # seconds; how often the run saves, redraws and looks at its signals while nothing comes
GRACE = 10.0  # seconds that requests in flight are given when the run is to stop


class Abandoned(Exception):
    """A conversation ended because the run is to stop."""


class Interrupt:
    """The wish to end early: set by signals and closed pipes, looked at by the loops."""

    def __init__(self) -> None:
        self.code = 0  # the exit code that it asks for
        self.gentle = False  # whether a loop is there to see it; before, a signal ends at once
        self.over = False  # whether the run has ended, so that there is nothing to interrupt

    def on_signal(self, number: int, frame: Any) -> None:
        """Be a signal's handler: ask for an end; the second time, or where no loop would see it, insist."""
        if self.over:
            return
        insist = bool(self.code) or not self.gentle
        self.code = self.code or 128 + number
        if insist:
            raise KeyboardInterrupt


class Transport:
    """One connection to a server, kept alive. Subclasses have `open`, `talk` and `close` for it."""

    connected = False

    def __init__(self, server: Server, stopping: Callable[[], bool]) -> None:
        """`stopping` tells whether the run is to stop, so that nothing more is to be sent."""
        self.server, self.stopping = server, stopping

    async def open(self, seconds: float) -> None:
        """Connect within that time."""
        raise NotImplementedError

    async def talk(self, send: Send) -> Reply:
        """Send one request over the connection and return the reply.

        Raises ConnectionError or EOFError where nothing of an answer came, any other OSError
        where it broke off, TimeoutError where it took too long.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Drop the connection, if there is one."""

    async def sleep(self, seconds: float) -> None:
        """Let time pass."""
        raise NotImplementedError

    async def pause(self, seconds: float) -> None:
        """Let time pass, in short steps, or raise Abandoned."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.go_on()
            await self.sleep(min(left, TICK))

    def go_on(self) -> None:
        """Raise Abandoned if the run is to stop."""
        if self.stopping():
            raise Abandoned

    async def exchange(self, send: Send) -> Reply:
        """Return what comes of a request; never raises for what a network can do.

        A kept connection that the server has closed meanwhile is replaced without a word,
        once: embedding is idempotent.
        """
        self.go_on()
        started = time.monotonic()
        kept = self.connected
        while True:
            try:
                if not self.connected:
                    await self.connect(send.connect)
                reply = await self.talk(send)
                return reply._replace(seconds=time.monotonic() - started)
            except (OSError, EOFError, ValueError) as error:
                self.close()
                if kept and isinstance(error, (ConnectionError, EOFError)):
                    kept = False
                    continue
                timed_out = isinstance(error, TimeoutError)
                reason = f"no answer within {send.timeout:g} s" if timed_out else describe(error)
                return Reply(0, seconds=time.monotonic() - started, reason=reason, timed_out=timed_out)

    async def connect(self, seconds: float) -> None:
        """Open the connection; taking too long is not the silence of a server that is at work."""
        try:
            await self.open(seconds)
        except TimeoutError:
            raise ConnectionError(f"no connection within {seconds:g} s") from None
        self.connected = True


class BlockingTransport(Transport):
    """A connection by http.client, for worker processes; its coroutines never wait for one another."""

    async def open(self, seconds: float) -> None:
        import http.client

        server = self.server
        kind = http.client.HTTPSConnection if server.scheme == "https" else http.client.HTTPConnection
        self.connection = kind(server.host, server.port, timeout=seconds)
        with builtin_timeout():
            self.connection.connect()

    async def talk(self, send: Send) -> Reply:
        import http.client

        with builtin_timeout():
            self.connection.sock.settimeout(send.timeout)
            try:
                self.connection.request("POST", self.server.path + send.path, send.body, headers_for(self.server))
                response = self.connection.getresponse()
            except http.client.RemoteDisconnected:
                raise EOFError from None
            except http.client.HTTPException as error:
                raise OSError(f"malformed answer: {error!r}") from None
            try:
                body = response.read()
            except (http.client.HTTPException, ConnectionError):
                raise OSError("the answer was cut off") from None
        if response.will_close:
            self.close()
        return Reply(response.status, body, retry_after=retry_after(response.headers.get("Retry-After", "")))

    def close(self) -> None:
        if self.connected:
            self.connected = False
            self.connection.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class builtin_timeout:
    """Translates the timeouts of older Pythons (socket's before 3.10, asyncio's before 3.11) to TimeoutError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None and kind.__name__ in ("timeout", "TimeoutError") and kind is not TimeoutError:
            raise TimeoutError(str(error)) from None


class Watch:
    """Within it, a connection that is silent for so many seconds is dropped, which raises TimeoutError.

    The run holds up the loop while it reads or saves. What has arrived meanwhile is heard
    first: only the turn after the one in which the time is up decides.
    """

    def __init__(self, transport: Any, seconds: float) -> None:
        import asyncio

        self.transport, self.seconds, self.loop = transport, seconds, asyncio.get_running_loop()
        self.too_late = False
        self.timer: Any = None

    def __enter__(self) -> Watch:
        self.heard()
        self.look()
        return self

    def heard(self) -> None:
        """Begin the time anew; one timer for all pieces of an answer, since they may be many."""
        self.until = self.loop.time() + self.seconds

    def look(self, again: bool = False) -> None:
        """Wait for the rest of the time, or end it."""
        left = self.until - self.loop.time()
        if left > 0:
            self.timer = self.loop.call_later(left, self.look)
        elif not again:
            self.timer = self.loop.call_soon(self.look, True)
        else:
            self.too_late = True
            self.transport.abort()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.timer.cancel()
        if self.too_late and (kind is None or issubclass(kind, (OSError, EOFError))):
            raise TimeoutError from None


STREAM_BYTES = 1 << 18  # what asyncio buffers of an answer before it stops reading; most answers fit in twice of it


class StreamTransport(Transport):
    """A connection by asyncio streams, with as much HTTP/1.1 as a client of an API needs (RFC 9112)."""

    async def open(self, seconds: float) -> None:
        import asyncio

        server = self.server
        context = None
        if server.scheme == "https":
            import ssl

            context = ssl.create_default_context()
        with builtin_timeout():
            self.reader, self.writer = await asyncio.wait_for(
                asyncio.open_connection(server.host, server.port, ssl=context, limit=STREAM_BYTES), seconds
            )
        headers = {"Host": server.shown.split("/")[2], **headers_for(server)}
        self.headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

    async def talk(self, send: Send) -> Reply:
        import asyncio

        head = f"POST {self.server.path}{send.path} HTTP/1.1\r\n{self.headers}Content-Length: {len(send.body)}\r\n\r\n"
        with Watch(self.writer.transport, send.timeout) as self.watch:
            self.writer.write(head.encode("latin-1") + send.body)
            await self.writer.drain()
            self.watch.heard()
            status = 100
            while 100 <= status < 200:  # interim answers
                lines = (await self.head()).decode("latin-1").split("\r\n")
                version, code = (lines[0].split() + ["", ""])[:2]
                if not version.startswith("HTTP/1.") or not code.isdigit():
                    raise OSError(f"malformed answer: {lines[0][:80]!r}")
                status = int(code)
            fields = (line.partition(":") for line in lines[1:] if line)
            headers = {name.strip().lower(): value.strip() for name, _, value in fields}
            try:
                body = await self.body(headers)
            except (EOFError, ConnectionError, ValueError, asyncio.LimitOverrunError):
                raise OSError("the answer was cut off") from None
        keep = headers.get("connection", "").lower()
        if keep == "close" or (version == "HTTP/1.0" and keep != "keep-alive") or not self.framed(headers):
            self.close()
        return Reply(status, body, retry_after=retry_after(headers.get("retry-after", "")))

    async def head(self) -> bytes:
        """Return an answer up to the end of its headers."""
        import asyncio

        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise OSError("the answer was cut off") from None
            raise
        except asyncio.LimitOverrunError:
            raise OSError("malformed answer: endless headers") from None
        self.watch.heard()
        return head

    @staticmethod
    def framed(headers: dict[str, str]) -> bool:
        """Whether the body's end shows without the connection being closed."""
        return "content-length" in headers or "chunked" in headers.get("transfer-encoding", "").lower()

    async def body(self, headers: dict[str, str]) -> bytes:
        """Return the body that follows the headers; EOFError or ValueError if it is not whole."""
        if "chunked" in headers.get("transfer-encoding", "").lower():
            pieces = []
            while size := int((await self.reader.readuntil(b"\r\n")).partition(b";")[0], 16):
                pieces += await self.exactly(size)
                await self.reader.readexactly(2)
            while await self.reader.readuntil(b"\r\n") != b"\r\n":
                pass  # trailers
            return b"".join(pieces)
        if "content-length" in headers:
            return b"".join(await self.exactly(int(headers["content-length"])))
        pieces = []
        while piece := await self.reader.read(STREAM_BYTES):
            self.watch.heard()
            pieces.append(piece)
        return b"".join(pieces)

    async def exactly(self, size: int) -> list[bytes]:
        """Return that many bytes, in pieces as they come."""
        pieces = []
        while size:
            piece = await self.reader.read(size)
            if not piece:
                raise EOFError
            self.watch.heard()
            pieces.append(piece)
            size -= len(piece)
        return pieces

    def close(self) -> None:
        if self.connected:
            self.connected = False
            self.writer.transport.abort()  # without ceremony: nothing is left to be sent

    async def sleep(self, seconds: float) -> None:
        import asyncio

        await asyncio.sleep(seconds)


async def drive(
    conversation: Conversation, transport: BlockingTransport | StreamTransport, tell: Callable[[Exchange], None]
) -> Answers:
    """Carry out a conversation's steps and return its answers; each Exchange is passed on to `tell`."""
    reply: Reply | None = None
    try:
        while True:
            step = conversation.send(reply)
            reply = None
            if isinstance(step, Send):
                reply = await transport.exchange(step)
            elif isinstance(step, Wait):
                await transport.pause(step.seconds)
            else:
                tell(step)
    except StopIteration as end:
        answers: Answers = end.value
        return answers


def run_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that never waits, as those over a BlockingTransport."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise RuntimeError("a coroutine waited where nothing can wake it")


class Engine:
    """Turns batches into results with a bounded number in flight. Subclasses submit, wait and close."""

    log_name = ""

    def __init__(self, wire: OllamaWire | HashWire, pace: Pace, interrupt: Interrupt) -> None:
        self.wire, self.pace, self.interrupt = wire, pace, interrupt
        self.failure: Exception | None = None

    def stopping(self) -> bool:
        """Whether the run is to stop."""
        return bool(self.interrupt.code or self.failure)

    def halt(self) -> None:
        """See to it that conversations send nothing more; called once, when the run is to stop."""

    def greet(self) -> None:
        """Check that the server can do the work; raise Stop if not."""
        raise NotImplementedError

    def submit(self, batch: Batch) -> None:
        """Send one batch on its way."""
        raise NotImplementedError

    def wait(self, seconds: float) -> list[Event]:
        """Return what has happened, after that time at the latest; answers or an exception for each batch, once."""
        raise NotImplementedError

    def close(self) -> None:
        """End what is still under way and free everything; nothing is left running."""
        raise NotImplementedError

    def run(self, batches: Iterator[list[Row]]) -> Iterator[Result | Exchange | None]:
        """Yield a Result for each batch, in any order, every Exchange, and None each TICK at the latest.

        Nothing is taken from `batches` before there is room for it; an empty batch means that there
        is nothing right now, and it is asked again by and by. After an interrupt, or a conversation
        that raised, no more is taken and what is in flight has GRACE seconds to end; then the
        exception, if there was one, is raised.
        """
        flying = texts = 0  # batches and texts
        more, deadline = True, 0.0
        while True:
            stopping = self.stopping()
            while more and not stopping and flying < self.pace.in_flight:
                rows = next(batches, None)
                if rows is None:
                    more = False
                elif not rows:
                    break
                else:
                    flying, texts = flying + 1, texts + len(rows)
                    self.submit(Batch(rows, texts))
            if not flying and (stopping or not more):
                break
            if stopping and not deadline:
                deadline = time.monotonic() + GRACE
                self.halt()
            if stopping and time.monotonic() >= deadline:
                break
            for batch, said in self.wait(TICK):
                if isinstance(said, Exchange):
                    self.pace.observe(said.texts, said.seconds, said.outcome, batch.under_way)
                    yield said
                    continue
                flying, texts = flying - 1, texts - len(batch.rows)
                if isinstance(said, list):
                    yield Result(batch.rows, said)
                elif not isinstance(said, Abandoned):
                    self.failure = self.failure or said
            yield None
        if self.failure:
            raise self.failure


class AsyncEngine(Engine):
    """Conversations as tasks of one event loop, which runs whenever the run waits for results."""

    log_name = "generate_embeddings_async.log"

    def __init__(self, wire: OllamaWire | HashWire, pace: Pace, interrupt: Interrupt) -> None:
        import asyncio

        super().__init__(wire, pace, interrupt)
        self.loop = asyncio.new_event_loop()
        self.idle: list[StreamTransport] = []
        self.tasks: set[Any] = set()
        self.events: list[Event] = []
        self.waiting = False  # whether the loop runs for `wait`, to be stopped when something has happened

    def greet(self) -> None:
        self.loop.run_until_complete(self.converse(self.wire.greet(), lambda exchange: None))

    async def converse(self, conversation: Conversation, tell: Callable[[Exchange], None]) -> Answers:
        """Drive one conversation over a connection that no other uses meanwhile."""
        transport = self.idle.pop() if self.idle else StreamTransport(self.wire.server, self.stopping)
        try:
            return await drive(conversation, transport, tell)
        except BaseException:
            transport.close()  # what is on its way over it belongs to nobody now
            raise
        finally:
            self.idle.append(transport)

    def deliver(self, event: Event) -> None:
        """Hand an event to the run, and let it have its turn."""
        self.events.append(event)
        if self.waiting:
            self.loop.stop()

    def submit(self, batch: Batch) -> None:
        async def embed() -> None:
            def tell(exchange: Exchange) -> None:
                self.deliver((batch, exchange))

            try:
                said: Answers | Exception = await self.converse(self.wire.converse(batch.texts), tell)
            except Exception as error:
                said = error
            self.deliver((batch, said))

        task = self.loop.create_task(embed())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def wait(self, seconds: float) -> list[Event]:
        if not self.events:
            timer = self.loop.call_later(seconds, self.loop.stop)
            self.waiting = True
            self.loop.run_forever()
            self.waiting = False
            timer.cancel()
        events, self.events = self.events, []
        return events

    def close(self) -> None:
        import asyncio

        self.waiting = False
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            self.loop.run_until_complete(asyncio.gather(*self.tasks, return_exceptions=True))
        for transport in self.idle:
            transport.close()
        self.loop.run_until_complete(asyncio.sleep(0))  # lets the closed transports say goodbye to the loop
        self.loop.close()


# Forked workers share the parent's memory, which makes ten of them cost little; where forking
# is unsafe (macOS) or absent (Windows) they are spawned.
START_METHOD = "fork" if sys.platform.startswith("linux") else "spawn"
DEATHS_IN_A_ROW = 20  # workers that die without one batch done between them: something kills them all


class Worker:
    """A worker process, the parent's end of the pipe to it, and the batch that it is at."""

    def __init__(self, context: Any, name: str, wire: OllamaWire | HashWire, kin: Sequence[Worker]) -> None:
        """`kin` are the workers that live already."""
        self.pipe, child = context.Pipe()
        # A forked child inherits the parent's ends of all pipes. As long as one copy is open,
        # no worker would see that the parent has died.
        inherited = [worker.pipe for worker in kin] + [self.pipe] if START_METHOD == "fork" else []
        self.process = context.Process(target=work, args=(child, wire, inherited), name=name, daemon=True)
        with signals_held_back():
            self.process.start()
        child.close()
        self.batch: Batch | None = None

    def submit(self, batch: Batch) -> None:
        """Give it a batch. If it is dead, that shows when it is waited for."""
        self.batch = batch
        with contextlib.suppress(OSError):
            self.pipe.send(batch.texts)

    def halt(self) -> None:
        """Tell it to send nothing more to the server."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)

    def receive(self) -> Any:
        """Return what it says, or None if it has died."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def end(self) -> None:
        """Let it go: it ends when its pipe is closed; if it does not within a second, it is killed."""
        self.pipe.close()
        self.process.join(1.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Hold signals back while a process is started: one would end the child with a traceback before it ignores them."""
    import signal

    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    if START_METHOD == "spawn":
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # or the first spawn would start it, which lets signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work(pipe: Any, wire: OllamaWire | HashWire, inherited: Sequence[Any]) -> None:
    """Be a worker process: embed the texts that come over the pipe, until it is closed."""
    import queue
    import signal
    import threading

    # Ctrl-C in a terminal, and systemd, signal the whole group; the parent alone decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for other in inherited:
        other.close()
    inbox: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    halted = threading.Event()
    threading.Thread(target=listen, args=(pipe, inbox.put, halted.set), daemon=True).start()
    transport = BlockingTransport(wire.server, halted.is_set)
    while True:
        try:
            pipe.send(answer(wire, inbox.get(), transport, pipe.send))
        except OSError:
            os._exit(0)  # the parent has closed the pipe


def answer(
    wire: OllamaWire | HashWire, texts: list[str], transport: BlockingTransport, tell: Callable[[Exchange], None]
) -> Answers | Exception:
    """Return what came of a conversation, an exception in a form that a pipe can carry."""
    try:
        return run_now(drive(wire.converse(texts), transport, tell))
    except (Stop, Abandoned) as end:
        return end
    except OSError:  # from the pipe; a transport raises none
        raise
    except Exception:
        import traceback

        return RuntimeError(f"a worker process failed\n{traceback.format_exc()}")


def listen(pipe: Any, put: Callable[[list[str]], None], halt: Callable[[], None]) -> None:
    """Pass on what the parent sends, texts or None for halt; end this process when the pipe is closed or broken."""
    try:
        while True:
            texts = pipe.recv()
            if texts is None:
                halt()
            else:
                put(texts)
    except (EOFError, OSError):
        os._exit(0)  # at once, even in the middle of a request


class ProcessEngine(Engine):
    """Conversations in worker processes, which are started as they are needed and replaced if they die."""

    log_name = "generate_embeddings.log"

    def __init__(self, wire: OllamaWire | HashWire, pace: Pace, interrupt: Interrupt) -> None:
        import gc
        import multiprocessing

        super().__init__(wire, pace, interrupt)
        # Forked workers share what is loaded now. What they import themselves, and what the garbage
        # collector writes to, each of them gets a copy of.
        for name in ("array", "http.client", "json", "multiprocessing.connection", "queue", "random", "threading"):
            importlib.import_module(name)
        gc.collect()
        gc.freeze()
        self.context = multiprocessing.get_context(START_METHOD)
        self.workers: list[Worker] = []
        self.started = self.deaths = 0

    def greet(self) -> None:
        transport = BlockingTransport(self.wire.server, self.stopping)
        try:
            run_now(drive(self.wire.greet(), transport, lambda exchange: None))
        finally:
            transport.close()

    def submit(self, batch: Batch) -> None:
        idle = next((worker for worker in self.workers if worker.batch is None), None)
        if idle is None:
            self.started += 1
            idle = Worker(self.context, f"Worker-{self.started}", self.wire, self.workers)
            self.workers.append(idle)
        idle.submit(batch)

    def wait(self, seconds: float) -> list[Event]:
        from multiprocessing.connection import wait

        events: list[Event] = []
        busy = {worker.pipe: worker for worker in self.workers if worker.batch is not None}
        if not busy:
            time.sleep(seconds)
        for pipe in wait(list(busy), seconds):
            worker = busy[pipe]
            said, batch = worker.receive(), worker.batch
            assert batch is not None
            if said is not None:
                events.append((batch, said))
                if not isinstance(said, Exchange):
                    worker.batch, self.deaths = None, 0
                continue
            self.bury(worker)
            if self.stopping():
                events.append((batch, Abandoned()))
            elif self.deaths <= DEATHS_IN_A_ROW:
                self.submit(batch)
            else:
                events.append((batch, Stop("worker processes keep dying. Is the machine out of memory?")))
        return events

    def halt(self) -> None:
        for worker in self.workers:
            worker.halt()

    def bury(self, dead: Worker) -> None:
        """Forget a worker that has died; the next batch submitted starts another."""
        dead.end()
        self.workers.remove(dead)
        self.deaths += 1

    def close(self) -> None:
        for worker in self.workers:
            worker.pipe.close()  # all first, so that they end side by side
        for worker in self.workers:
            worker.end()


ENGINES: dict[str, type[Engine]] = {"async": AsyncEngine, "process": ProcessEngine}


# =============================== files to load ===============================

Record = tuple[int, dict[str, Any]]  # line number, and the row by column
JSON_PIECE = 1 << 18  # characters read at a time
JSON_MOST = 1 << 26  # characters of one object; a longer one is rather a missing bracket


def read_file(path: str) -> Iterator[Record]:
    """Yield the rows of a .csv, .tsv, .json or .jsonl file, one by one; values are strings or JSON's, None for empty.

    Raises UsageError, with the line number, for what is not such a file.
    """
    reader = READERS.get(os.path.splitext(path)[1].lower())
    if reader is None:
        raise UsageError(f"--load {path}: only {listed(READERS)} files can be loaded.")
    try:
        # Bytes that are no UTF-8 become lone surrogates, which `clean` finds in their line.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for line, row in reader(file, path):
                try:
                    yield line, {column: clean(value) for column, value in row.items()}
                except UnicodeEncodeError:
                    raise UsageError(f"{path}, line {line}: not valid UTF-8. Save the file as UTF-8.") from None
    except OSError as error:
        raise UsageError(f"--load {path}: {describe(error)}.") from None


def clean(value: Any) -> Any:
    """Return a value as a database can hold it; UnicodeEncodeError for text that is no Unicode."""
    import json

    if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
        value = ", ".join(map(str, value))
    elif isinstance(value, (list, dict)):
        value = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    return value if value != "" else None


def read_csv(file: TextIO, path: str, delimiter: str = ",") -> Iterator[Record]:
    """Yield the rows of a CSV file (RFC 4180) with a header line."""
    import csv

    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a text may have
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            if not header:
                header = fields
                if len(header) == 1 and re.search(r"[;\t]", header[0]):
                    raise UsageError(
                        f"{path}, line {line}: the fields must be separated by {delimiter!r}: {header[0]!r}."
                    )
                if not all(header) or len(set(header)) < len(header):
                    raise UsageError(f"{path}, line {line}: the header must name every column, each once.")
            elif fields and len(fields) != len(header):
                raise UsageError(f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)}.")
            elif fields:
                yield line, {name: field if field else None for name, field in zip(header, fields)}
            line = reader.line_num + 1  # where the next row begins; one with quoted newlines has several lines
    except csv.Error as error:
        raise UsageError(f"{path}, line {line}: {error}.") from None
    if not header:
        raise UsageError(f"--load {path}: the file is empty.")


def read_tsv(file: TextIO, path: str) -> Iterator[Record]:
    """Yield the rows of a file with tabs between its fields."""
    return read_csv(file, path, delimiter="\t")


def read_jsonl(file: TextIO, path: str) -> Iterator[Record]:
    """Yield the objects of a file with one to a line."""
    import json

    for line, text in enumerate(file, 1):
        if text.strip():
            try:
                yield line, an_object(json.loads(text), path, line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, line {line}: not JSON: {error.msg} at column {error.colno}.") from None


def read_json(file: TextIO, path: str) -> Iterator[Record]:
    """Yield the objects of one JSON array, read piece by piece: the file may be larger than memory."""
    import json

    decoder = json.JSONDecoder()
    text, position, line = "", 0, 1
    expected, ended = "[", False  # what must come next: the bracket, a comma (or the end), an object

    def fail(problem: str) -> UsageError:
        return UsageError(f"{path}, line {line}: {problem}. The file must hold one array of objects.")

    while True:
        blank = re.compile(r"\s*").match(text, position)
        assert blank is not None
        line += text.count("\n", position, blank.end())
        position = blank.end()
        if position < len(text) and expected in "[,":
            if text[position] == "]" and expected == ",":
                if text[position + 1 :].strip() or file.read().strip():
                    raise fail("something follows the array")
                return
            if text[position] != expected:
                raise fail(f"{text[position]!r} stands where {expected!r} should")
            expected, position = ("object or ]" if expected == "[" else "object"), position + 1
            continue
        if position < len(text) and expected == "object or ]" and text[position] == "]":
            expected = ","
            continue
        if position < len(text):
            try:
                value, end = decoder.raw_decode(text, position)
                yield line, an_object(value, path, line)
                line += text.count("\n", position, end)
                expected, position = ",", end
                continue
            except json.JSONDecodeError as error:
                if ended or len(text) - position > JSON_MOST:
                    line += text.count("\n", position, error.pos)
                    raise fail(f"not JSON: {error.msg}") from None
        if ended:
            raise fail("the file ends too early")
        piece = file.read(JSON_PIECE)
        text, position, ended = text[position:] + piece, 0, not piece


def an_object(value: Any, path: str, line: int) -> dict[str, Any]:
    """Return the value if it is a JSON object."""
    if not isinstance(value, dict) or not all(value):
        raise UsageError(f"{path}, line {line}: an object with a name for every value was expected.")
    return value


READERS: dict[str, Callable[[TextIO, str], Iterator[Record]]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".json": read_json,
    ".jsonl": read_jsonl,
}

TYPES = ("INTEGER", "REAL", "TEXT")  # each can hold the ones before it


def type_of(value: Any, typed: bool) -> int:
    """Return the index in TYPES of the narrowest type for a value; a string is a number only if `typed` is false."""
    if isinstance(value, int):
        return 0
    if isinstance(value, float):
        return 1
    # A number with leading zeros is a code: 007 must stay what it is. 18 digits fit into 64 bits.
    if not typed and re.fullmatch(r"-?(0|[1-9]\d{0,17})", value, re.ASCII):
        return 0
    if not typed and re.fullmatch(r"-?\d+\.\d+", value, re.ASCII) and repr(float(value)) == value:
        return 1  # and not 1.10, which is more likely a version
    return 2


def column_types(path: str) -> dict[str, str]:
    """Return the columns of a file, with the type that holds all their values; reads the whole file."""
    typed = path.lower().endswith((".json", ".jsonl"))
    found: dict[str, int] = {}
    for _, row in read_file(path):
        for column, value in row.items():
            found[column] = max(found.get(column, -1), type_of(value, typed) if value is not None else -1)
    return {column: TYPES[index] if index >= 0 else "TEXT" for column, index in found.items()}


def records(path: str, columns: list[str], key: int) -> Iterator[list[Any]]:
    """Yield a file's rows as lists in the order of `columns`; the one at the index `key` must not be empty."""
    for line, row in read_file(path):
        values = [row.get(column) for column in columns]
        if values[key] is None:
            raise UsageError(f'{path}, line {line}: no value in the key "{columns[key]}".')
        yield values


# =============================== stores ===============================
# A store yields the rows to embed and saves what came of them. What is said to every database
# in the same words is in Store; what only one of them says is in its subclass.

PAGE_ROWS = 512  # rows read at a time, and
PAGE_BYTES = 1 << 20  # bytes of text after which a page ends early: memory stays flat whatever the rows


class Relation(NamedTuple):
    """A table or view that exists."""

    schema: str
    name: str
    is_table: bool

    @property
    def sql(self) -> str:
        """Its name in a statement."""
        return f"{quoted(self.schema)}.{quoted(self.name)}"


class Column(NamedTuple):
    """A column: its type as declared, and its place in the primary key, 0 if it has none."""

    type: str
    place: int


def quoted(name: str) -> str:
    """Return a name as SQL has it; whatever stands in it, it is a name and nothing else."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return a text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def primary_key(columns: dict[str, Column]) -> list[str]:
    """Return the columns of the primary key."""
    return [name for name, column in columns.items() if column.place]


class Store:
    """The table to read, called s in statements, and the table to fill, called e."""

    own_columns = ("embedding", "model", "text_sha256", "updated_at")  # of a target as it is created

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.force: bool = options.force
        self.model: str = options.model
        self.stopping: Callable[[], bool] = lambda: False  # whether the run is to stop, so that waits be short
        self.changing_model = False  # --force, and the target still has vectors of another model

    # What a subclass says to its database:

    def close(self) -> None:
        """Let go of the database."""
        raise NotImplementedError

    def rows(self, sql: str, *parameters: Any) -> list[Any]:
        """Return all rows of a statement that gives few; raise Stop where the database fails."""
        raise NotImplementedError

    def complaint(self, sql: str) -> str:
        """Return what the database has against a statement of the user's, "" if nothing."""
        raise NotImplementedError

    def mark(self, number: int) -> str:
        """Return the place of a statement's parameter, counted from 1."""
        raise NotImplementedError

    def referenced(self, relation: Relation, column: str) -> str | None:
        """Return the name of the table that a column refers to by a foreign key."""
        raise NotImplementedError

    def find(self, name: str) -> Relation | None:
        """Return the table or view that is meant by name or schema.name."""
        raise NotImplementedError

    def place(self, name: str, beside: str) -> Relation:
        """Return where a table of that name, possibly schema.name, is to be created, by default in a schema."""
        raise NotImplementedError

    def tables(self) -> list[str]:
        """Return the names of all tables and views that can be read."""
        raise NotImplementedError

    def columns(self, relation: Relation) -> dict[str, Column]:
        """Return the columns that can be read, by name."""
        raise NotImplementedError

    def is_unique(self, relation: Relation, column: str) -> bool:
        """Whether the column alone is declared to tell rows apart."""
        raise NotImplementedError

    def value_sql(self, column: str, declared: str) -> str:
        """Return the SQL of a column's value as text, NULL where it is blank."""
        raise NotImplementedError

    def digest_sql(self) -> str:
        """Return the SQL of the SHA-256 of a row's text, `self.text`."""
        raise NotImplementedError

    def key_type(self, declared: str) -> str:
        """Return the type of the target's key, for that of the source's key."""
        raise NotImplementedError

    def create_sql(self, dimensions: int | None) -> str:
        """Return the columns of a new target behind its key."""
        raise NotImplementedError

    def stored_dimensions(self) -> int | None:
        """Return the length that vectors in the target have, None if it may be any."""
        raise NotImplementedError

    def page(self, after: Any) -> tuple[list[Row], bool]:
        """Return pending rows above a key, by ascending key, a page of them, and whether there may be more."""
        raise NotImplementedError

    def save(self, vectors: list[tuple[Row, bytes]]) -> int:
        """Save embeddings in one transaction and return how many; those of rows deleted meanwhile are dropped."""
        raise NotImplementedError

    def load(self, path: str) -> int:
        """Load a file into --table and return how many rows it has; all of them or, if it raises, none."""
        raise NotImplementedError

    # What is the same for all:

    def value(self, sql: str, *parameters: Any) -> Any:
        """Return the first column of a query's first row, None if there is none."""
        return next((row[0] for row in self.rows(f"{sql} LIMIT 1", *parameters)), None)

    def prepare(self) -> None:
        """Find the tables and columns, and check everything that can be checked without a server."""
        options = self.options
        relation = self.find(options.table)
        if relation is None:
            raise UsageError(
                f'the database has no table "{options.table}". It has: {listed(self.tables())}. Give --table NAME.'
            )
        self.relation = relation
        described = self.columns(relation)
        columns = list(described)
        self.key = self.key_name(columns, primary_key(described), relation.name)
        self.key_declared = described[self.key].type
        self.how = self.recipe(columns, relation.name)
        self.text = self.how.sql(lambda column: self.value_sql(column, described[column].type), literal)
        # As a subquery, so that the names in the condition are the source's alone. The newline ends a comment.
        self.source = f"(SELECT * FROM {relation.sql} WHERE ({options.where}\n))" if options.where else relation.sql
        self.referable = relation.is_table and self.is_unique(relation, self.key)
        self.check_where()
        self.check_key()
        self.find_target()
        self.check_dimensions()

    def recipe(self, columns: list[str], table: str) -> Recipe:
        """Return how a text is made, as the flags or the columns have it."""
        if self.options.text:
            return template_recipe(self.options.text, columns, table)
        if self.options.columns:
            return columns_recipe(self.options.columns, columns, table)
        return default_recipe(columns, table)

    def key_name(self, columns: list[str], primary: list[str], table: str) -> str:
        """Return the key column: as given, the primary key, or the column id."""
        if self.options.id:
            return column_of(self.options.id, columns, table)
        if len(primary) == 1:
            return primary[0]
        key = match("id", columns) if not primary else None
        if key is None:
            has = f"the key {listed(primary)}, more than one column" if primary else "no primary key and no column id"
            raise UsageError(
                f'"{table}" has {has}. Say which column tells its rows apart, with --id COLUMN: {listed(columns)}.'
            )
        return key

    def check_where(self) -> None:
        """Raise UsageError if --where is no condition."""
        if self.options.where:
            complaint = self.complaint(f"SELECT 1 FROM {self.source} AS s LIMIT 0")
            if complaint:
                table = self.relation.name
                raise UsageError(f"--where {self.options.where!r} is not a condition on {table}: {complaint}.")

    def check_key(self) -> None:
        """Raise UsageError if the key does not tell the rows apart."""
        key, table = quoted(self.key), self.relation.name
        if self.value(f"SELECT 1 FROM {self.source} AS s WHERE {key} IS NULL"):
            raise UsageError(
                f'"{table}" has rows without a value in its key "{self.key}". '
                f"Leave them out with --where '{key} IS NOT NULL', or give --id COLUMN."
            )
        if not self.referable:
            twice = self.value(f"SELECT {key} FROM {self.source} AS s GROUP BY {key} HAVING count(*) > 1")
            if twice is not None:
                raise UsageError(
                    f'"{self.key}" does not tell the rows of "{table}" apart: {twice!r} stands in several. '
                    f"Give --id COLUMN: {listed(self.columns(self.relation))}."
                )

    def find_target(self) -> None:
        """Find the table that receives the vectors, and what can be stored in it."""
        noun = singular(self.relation.name)
        found = self.find(self.options.target) if self.options.target else None
        wanted = self.place(self.options.target or f"{noun}_embeddings", self.relation.schema)
        found = found or self.find_exactly(wanted)
        self.has_target = found is not None
        self.target = found or wanted
        self.target_key = f"{noun}_id"
        self.target_columns = {name: name for name in self.own_columns}
        if found:
            if found == self.relation or not found.is_table:
                what = "the table to read" if found == self.relation else "a view"
                raise UsageError(f'--target "{found.name}" is {what}. Give another name.')
            self.use_target()
            self.check_model()

    def find_exactly(self, relation: Relation) -> Relation | None:
        """Return the table or view of that schema and name, if it exists."""
        raise NotImplementedError

    def use_target(self) -> None:
        """Take an existing target as it is: its own names for the key and for what it has of our columns."""
        described = self.columns(self.target)
        columns = list(described)
        self.target_columns = {ours: theirs for ours in self.own_columns if (theirs := match(ours, columns))}
        if "embedding" not in self.target_columns:
            raise UsageError(
                f'"{self.target.name}" has no column "embedding" to fill. It has: {listed(columns)}. '
                "Give --target NAME."
            )
        others = [column for column in columns if column not in self.target_columns.values()]
        primary, named = primary_key(described), match(self.target_key, others)
        # A column that is named for it is the key, even beside a primary key of the target's own.
        candidates = [named] if named else primary if len(primary) == 1 else others
        if len(candidates) != 1 or not self.is_unique(self.target, candidates[0]):
            raise UsageError(
                f'"{self.target.name}" has no key to store vectors under: one column with a primary key or unique '
                f"index is needed. It has: {listed(columns)}. Give --target NAME."
            )
        self.target_key = candidates[0]
        other = self.referenced(self.target, self.target_key)
        if self.relation.is_table and other not in (None, self.relation.name):
            raise UsageError(f'"{self.target.name}" belongs to the table "{other}". Give --target NAME.')

    def check_model(self) -> None:
        """Raise UsageError if the target holds vectors of another model that this run will not replace."""
        if "model" not in self.target_columns:
            return
        column = quoted(self.target_columns["model"])
        # Of rows that exist: what is left of deleted ones is in nobody's way.
        on = f"e.{quoted(self.target_key)} = s.{quoted(self.key)}"
        tables = f"{self.target.sql} AS e JOIN {self.relation.sql} AS s ON {on}"
        other = self.value(f"SELECT e.{column} FROM {tables} WHERE e.{column} <> {self.mark(1)}", self.model)
        if other is None:
            return
        name = f'"{self.target.name}" holds vectors of the model "{other}"'
        if not self.force:
            raise UsageError(
                f'{name}, which do not compare with those of "{self.model}". '
                "Give --target NAME for a second table, or --force to replace them."
            )
        if self.partial:
            raise UsageError(
                f'{name}, and some of them would be left beside those of "{self.model}". '
                "Leave out --limit and --where, or give --target NAME."
            )
        self.changing_model = True

    def end_change(self) -> None:
        """After --force has changed the model, remove what the new one gave no vector for: it compares with nothing."""
        if self.changing_model:
            column = quoted(self.target_columns["model"])
            self.rows(f"DELETE FROM {self.target.sql} WHERE {column} <> {self.mark(1)}", self.model)

    @property
    def partial(self) -> bool:
        """Whether some rows of the table are none of this run's business."""
        return self.options.limit is not None or bool(self.options.where)

    def check_dimensions(self) -> None:
        """Raise UsageError if the vectors asked for have another length than those that stay."""
        wanted, stored = self.options.dimensions, self.stored_dimensions()
        if wanted and stored and wanted != stored:
            raise UsageError(
                f'the vectors in "{self.target.name}" have {stored} dimensions; those of --dimensions {wanted} do not '
                "compare. Give --target NAME for a second table, or --force for all rows to replace them."
            )

    def create_target(self, dimensions: int | None) -> None:
        """Create the target unless it exists; `dimensions` is the length of the vectors, if it is known."""
        if self.has_target:
            return
        references = ""
        # Only a declared key can be referred to, and SQLite's references cannot reach into another schema.
        if self.referable and self.relation.schema == self.target.schema:
            references = f" REFERENCES {quoted(self.relation.name)}({quoted(self.key)}) ON DELETE CASCADE"
        key = f"{quoted(self.target_key)} {self.key_type(self.key_declared)} PRIMARY KEY{references}"
        self.rows(f"CREATE TABLE {self.target.sql} ({key}, {self.create_sql(dimensions)})")
        self.has_target = True

    def joined(self) -> tuple[str, str]:
        """Return the FROM clause of the rows with their embeddings, and the condition that one exists.

        With --force none does; but where that changes the model, what has the new one already
        was done by a run that did not come to its end.
        """
        if not self.has_target or (self.force and not self.changing_model):
            return f"{self.source} AS s", "1 = 0"
        exists = f"e.{quoted(self.target_columns['embedding'])} IS NOT NULL"
        if self.changing_model:
            exists += f" AND e.{quoted(self.target_columns['model'])} = {literal(self.model)}"
        if "text_sha256" in self.target_columns:
            stored = f"e.{quoted(self.target_columns['text_sha256'])}"
            exists += f" AND COALESCE({stored} = {self.digest_sql()}, 1 = 0)"
        on = f"e.{quoted(self.target_key)} = s.{quoted(self.key)}"
        return f"{self.source} AS s LEFT JOIN {self.target.sql} AS e ON {on}", exists

    def count(self) -> tuple[int, int]:
        """Return how many rows there are, and how many of them have their embedding."""
        tables, exists = self.joined()
        total, existing = self.rows(f"SELECT count(*), count(CASE WHEN {exists} THEN 1 END) FROM {tables}")[0]
        return total, existing

    def page_sql(self, key: str, text: str, above: bool) -> str:
        """Return the query of one page: the key and text of pending rows."""
        tables, exists = self.joined()
        after = f"{key} > {self.mark(1)} AND" if above else ""
        return f"SELECT {key}, {text} FROM {tables} WHERE {after} NOT ({exists}) ORDER BY {key} LIMIT {PAGE_ROWS}"

    def pending(self, after: Any = None) -> Iterator[Row]:
        """Yield the rows without their embedding, by ascending key, those above `after`; all rows with --force.

        Read by pages, so that no statement is open, and no lock held, while requests are under way.
        """
        more = True
        while more:
            page, more = self.page(after)
            yield from page
            after = page[-1].key if page else after

    def load_columns(self, path: str, columns: list[str], relation: Relation | None) -> tuple[str, list[str]]:
        """Return the key and the columns that a file's columns go to, in the table if there is one."""
        if relation is None:
            if not columns:
                raise UsageError(f"--load {path}: the file has no rows.")
            return self.key_name(columns, [], path), columns
        described = self.columns(relation)
        columns = [column_of(column, list(described), relation.name) for column in columns]
        key = self.key_name(columns, [name for name in primary_key(described) if name in columns], path)
        if not self.is_unique(relation, key):
            raise UsageError(
                f'"{relation.name}" cannot be loaded into: its key "{key}" needs a primary key or unique index.'
            )
        return key, columns


SQLITE_ENDINGS = (".db", ".sqlite", ".sqlite3")  # of a path that is taken for a database
CACHE_KIB = 512  # of SQLite's pages; the default is 2,000
LOCK_PATIENCE = 60.0  # seconds to wait for a locked database


class SQLiteStore(Store):
    """A table in an SQLite file."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        import sqlite3

        self.sqlite3 = sqlite3
        self.path = options.database[len("sqlite:///") :] if "://" in options.database else options.database
        self.check_file()
        self.is_new = not os.path.exists(self.path)
        # Waiting is done in `patiently`, where signals are seen; half a second here keeps it from spinning.
        self.connection = self.connect(self.path, timeout=0.5)
        self.encoding = "utf-8"
        self.connection.create_function("embedgen_sha256", 1, self.sha256, deterministic=True)
        # Does nothing, but gives Python a turn in long statements, so that Ctrl-C is heard.
        self.connection.set_progress_handler(lambda: 0, 200_000)
        self.rows("SELECT count(*) FROM sqlite_master")  # is it a database, and may it be read?
        self.lock = self.take_lock()

    def connect(self, path: str, timeout: float) -> Any:
        """Return a connection to an SQLite file, without Python's own transactions."""
        try:
            return self.sqlite3.connect(path, timeout=timeout, isolation_level=None)
        except self.sqlite3.Error as error:
            raise self.translated(error) from None

    def check_file(self) -> None:
        """Raise Stop for a database that is not there; only --load makes a new one."""
        folder = os.path.dirname(self.path) or "."
        if os.path.exists(self.path) or (self.options.load and os.path.isdir(folder)):
            return
        if not os.path.isdir(folder):
            raise Stop(f"there is no folder {folder} for the database {self.path}. Give --database URL.")
        names = sorted(os.listdir(folder))
        raise Stop(
            f"there is no database {self.path} (databases in {folder}: "
            f"{listed(name for name in names if name.endswith(SQLITE_ENDINGS))}). "
            "Give --database URL, or --load FILE to make one."
        )

    def take_lock(self) -> Any:
        """Refuse a second run on the same database.

        An empty database beside it is locked through SQLite itself: works on every system,
        ends with the process however that ends, and is not inherited by forked workers.
        """
        lock = self.connect(os.path.realpath(self.path) + ".embedgen-lock", timeout=0)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except self.sqlite3.OperationalError as error:
            lock.close()
            if is_locked(error):
                raise Stop(f"another run is under way on {self.path}. Wait for its end, or stop it.") from None
            raise self.translated(error) from None
        return lock

    def close(self) -> None:
        self.connection.close()
        if self.is_new and os.path.exists(self.path) and not os.path.getsize(self.path):
            os.remove(self.path)  # made by connecting; the file that was to be loaded had an error
        self.lock.close()

    def sha256(self, raw: bytes) -> bytes:
        """Return the identity of a text as it stands in the database; the SQL function of that name."""
        return digest_of(raw.decode(self.encoding, "replace"))

    def patiently(self, action: Callable[[], T]) -> T:
        """Return what the action returns; try for a minute while the database is locked by somebody else."""
        deadline, hurried = time.monotonic() + LOCK_PATIENCE, False
        while True:
            try:
                return action()
            except self.sqlite3.Error as error:
                if self.stopping() and not hurried:
                    deadline, hurried = min(deadline, time.monotonic() + GRACE / 2), True
                if not is_locked(error) or time.monotonic() >= deadline:
                    raise self.translated(error) from error

    def translated(self, error: Exception) -> BaseException:
        """Return the exception to raise for one of SQLite's."""
        text, path = str(error), self.path
        if text == "interrupted" or "user-defined function raised" in text:
            return KeyboardInterrupt()
        if is_locked(error):
            return Stop(
                f"{path} has been locked by another program for {LOCK_PATIENCE:.0f} s. Close it, and run again."
            )
        if text in ("database or disk is full", "disk I/O error"):
            return Stop(f"{path} cannot grow ({text}): the disk is full, or failing. Make room, and run again.")
        if text == "unable to open database file":
            return Stop(f"{path} cannot be opened. Check that it is a file, its permissions and those of its folder.")
        if text.startswith("attempt to write a readonly database"):
            return Stop(f"{path} cannot be written ({text}). Check its permissions and those of its folder.")
        if text == "file is not a database" or text.startswith(
            ("database disk image is malformed", "malformed database")
        ):
            return Stop(f"{path} is not a sound SQLite database ({text}). Give --database URL.")
        return Stop(f"SQLite says of {path}: {text}.")

    def rows(self, sql: str, *parameters: Any) -> list[Any]:
        return self.patiently(lambda: self.connection.execute(sql, parameters).fetchall())

    def complaint(self, sql: str) -> str:
        try:
            self.connection.execute(sql)
        except (self.sqlite3.Error, self.sqlite3.Warning) as error:
            return str(error)
        return ""

    def mark(self, number: int) -> str:
        return "?"

    def referenced(self, relation: Relation, column: str) -> str | None:
        sql = 'SELECT "table" FROM pragma_foreign_key_list(?, ?) WHERE "from" = ?'
        found = self.rows(sql, relation.name, relation.schema, column)
        target = self.find_exactly(Relation(relation.schema, found[0][0], True)) if found else None
        return target.name if target else None

    def find(self, name: str) -> Relation | None:
        schema, _, rest = name.partition(".")
        return self.find_exactly(Relation("main", name, True)) or self.find_exactly(Relation(schema, rest, True))

    def find_exactly(self, relation: Relation) -> Relation | None:
        if not relation.name or relation.schema not in self.schemas():
            return None
        found = self.rows(
            f"SELECT name, type FROM {quoted(relation.schema)}.sqlite_master "
            "WHERE type IN ('table', 'view') AND name = ? COLLATE NOCASE",
            relation.name,
        )
        return Relation(relation.schema, found[0][0], found[0][1] == "table") if found else None

    def place(self, name: str, beside: str) -> Relation:
        schema, _, rest = name.partition(".")
        return Relation(schema, rest, True) if rest and schema in self.schemas() else Relation(beside, name, True)

    def schemas(self) -> set[str]:
        """Return main and temp; there are no others without ATTACH."""
        return {row[1] for row in self.rows("PRAGMA database_list")}

    def tables(self) -> list[str]:
        found = self.rows("SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%'")
        return [name for (name,) in found]

    def columns(self, relation: Relation) -> dict[str, Column]:
        sql = "SELECT name, type, pk FROM pragma_table_xinfo(?, ?) WHERE hidden <> 1"
        return {
            name: Column(declared, place) for name, declared, place in self.rows(sql, relation.name, relation.schema)
        }

    def is_unique(self, relation: Relation, column: str) -> bool:
        if primary_key(self.columns(relation)) == [column]:
            return True
        indexes = self.rows(
            'SELECT name FROM pragma_index_list(?, ?) WHERE "unique" AND NOT partial', relation.name, relation.schema
        )
        sql = "SELECT name FROM pragma_index_info(?, ?)"
        return any(self.rows(sql, index, relation.schema) == [(column,)] for (index,) in indexes)

    def value_sql(self, column: str, declared: str) -> str:
        name = f"s.{quoted(column)}"
        return f"CASE WHEN trim({name}, char({', '.join(str(ord(blank)) for blank in BLANKS)})) <> '' THEN {name} END"

    def text_sql(self) -> str:
        """Return the SQL of a row's text as bytes: it may hold NUL, or bytes that are no text at all."""
        return f"CAST({self.text} AS BLOB)"

    def digest_sql(self) -> str:
        return f"embedgen_sha256({self.text_sql()})"

    def key_type(self, declared: str) -> str:
        """Return the key's type by SQLite's rule (https://sqlite.org/datatype3.html, section 3.1)."""
        upper = declared.upper()
        if "INT" in upper:
            # Only INTEGER PRIMARY KEY keeps texts out of the source; the target's own would refuse them.
            other = f"SELECT 1 FROM {self.relation.sql} WHERE typeof({quoted(self.key)}) <> 'integer'"
            return "INTEGER" if self.value(other) is None else "BLOB"
        if any(word in upper for word in ("CHAR", "CLOB", "TEXT")):
            return "TEXT"
        return "BLOB" if not upper or "BLOB" in upper else "NUMERIC"

    def create_sql(self, dimensions: int | None) -> str:
        return "embedding BLOB NOT NULL, model TEXT NOT NULL, text_sha256 BLOB NOT NULL, updated_at TEXT NOT NULL"

    def stored_dimensions(self) -> int | None:
        if not self.has_target or (self.force and not self.partial):
            return None
        column = quoted(self.target_columns["embedding"])
        size = self.value(f"SELECT length({column}) FROM {self.target.sql} WHERE typeof({column}) = 'blob'")
        return size // 4 if size and size % 4 == 0 else None

    def prepare(self) -> None:
        self.encoding = self.value("SELECT encoding FROM pragma_encoding")
        # Rows are read once and in order, so that a larger cache would only fill up and be of no use.
        self.rows(f"PRAGMA cache_size = -{CACHE_KIB}")
        super().prepare()

    def page(self, after: Any) -> tuple[list[Row], bool]:
        sql = self.page_sql(f"s.{quoted(self.key)}", self.text_sql(), above=after is not None)

        def read() -> tuple[list[Row], bool]:
            page: list[Row] = []
            size = 0
            with contextlib.closing(self.connection.execute(sql, () if after is None else (after,))) as cursor:
                for key, raw in cursor:
                    text = raw.decode(self.encoding, "replace")
                    page.append(Row(key, text, digest_of(text)))
                    size += len(raw)
                    if size >= PAGE_BYTES:
                        return page, True
            return page, len(page) == PAGE_ROWS

        return self.patiently(read)

    def save(self, vectors: list[tuple[Row, bytes]]) -> int:
        import itertools

        names, now = list(self.target_columns), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        columns = [quoted(self.target_columns[name]) for name in names]
        key = quoted(self.target_key)
        sql = (
            f"INSERT INTO {self.target.sql} ({', '.join([key, *columns])}) SELECT ?{', ?' * len(columns)} "
            f"WHERE EXISTS (SELECT 1 FROM {self.relation.sql} WHERE {quoted(self.key)} = ?) "
            f"ON CONFLICT ({key}) DO UPDATE SET {', '.join(f'{column} = excluded.{column}' for column in columns)}"
        )
        keys = [row.key for row, _ in vectors]
        known: dict[str, Iterable[Any]] = {
            "embedding": [vector for _, vector in vectors],
            "model": itertools.repeat(self.model),
            "text_sha256": [row.digest for row, _ in vectors],
            "updated_at": itertools.repeat(now),
        }
        parameters = list(zip(keys, *(known[name] for name in names), keys))
        return self.transaction(lambda: int(self.connection.executemany(sql, parameters).rowcount))

    def transaction(self, action: Callable[[], T]) -> T:
        """Return what the action returns, done as a whole or not at all."""

        def whole() -> T:
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                result = action()
                self.connection.execute("COMMIT")
                return result
            except BaseException:
                if self.connection.in_transaction:  # SQLite itself rolls back on some errors, a full disk for one
                    self.connection.execute("ROLLBACK")
                raise

        return self.patiently(whole)

    def load(self, path: str) -> int:
        types = column_types(path)
        relation = self.find(self.options.table)
        key, columns = self.load_columns(path, list(types), relation)
        table = (relation or self.place(self.options.table, "main")).sql
        declared = (f"{quoted(c)} {types[c]}{' PRIMARY KEY NOT NULL' if c == key else ''}" for c in types)
        create = f"CREATE TABLE {table} ({', '.join(declared)})"
        others = [quoted(column) for column in columns if column != key]
        update = "UPDATE SET " + ", ".join(f"{name} = excluded.{name}" for name in others) if others else "NOTHING"
        insert = (
            f"INSERT INTO {table} ({', '.join(map(quoted, columns))}) VALUES ({', '.join('?' * len(columns))}) "
            f"ON CONFLICT ({quoted(key)}) DO {update}"
        )

        def insert_all() -> int:
            if relation is None:
                self.connection.execute(create)
            values = records(path, list(types), columns.index(key))
            return max(int(self.connection.executemany(insert, values).rowcount), 0)

        return self.transaction(insert_all)


def is_locked(error: Exception) -> bool:
    """Whether SQLite says that somebody else is at work on the database."""
    return str(error).startswith(("database is locked", "database table is locked", "database schema is locked"))


def open_store(options: argparse.Namespace) -> Store:
    """Return the store for --database."""
    url = options.database
    if re.match(r"sqlite:///.", url) or (not re.match(r"\w{2,}:", url) and url.lower().endswith(SQLITE_ENDINGS)):
        return SQLiteStore(options)
    raise UsageError(
        f"--database {hide_password(url)} is not a database's address. Give sqlite:///relative.db, "
        f"sqlite:////absolute.db or a path ending in {', '.join(SQLITE_ENDINGS)}."
    )


# =============================== progress and report ===============================


class Counts:
    """What has become of the rows; generated + skipped + failed is the total."""

    def __init__(self, rows: int, existing: int, limit: int | None) -> None:
        self.skipped, self.to_do, self.limit = existing, rows - existing, limit
        self.generated = self.failed = 0
        self.reasons: dict[str, int] = {}

    @property
    def done(self) -> int:
        """Rows that are decided."""
        return self.generated + self.skipped + self.failed

    @property
    def total(self) -> int:
        """Rows that this run is about; a failed row does not use up the limit."""
        expected = self.to_do if self.limit is None else min(self.to_do, self.limit + self.failed)
        return max(self.skipped + expected, self.done)

    @property
    def left(self) -> int:
        """Rows that have no embedding yet and did not fail."""
        return max(self.to_do - self.generated - self.failed, 0)

    def fail(self, reason: str) -> None:
        """Count a failed row."""
        self.failed += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1


RULE = "=" * 60
PIPE_BAR = 8  # cells of the bar where there is no terminal to fit it to
REDRAW, PIPE_INTERVAL = 0.1, 30.0  # seconds between two progress lines, on a terminal and elsewhere
EIGHTHS = " ▏▎▍▌▋▊▉█"
# For terminals that cannot show them; all else that they cannot show becomes a question mark.
LEGIBLE = {"✓": "+", "⊘": "-", "✗": "x", **dict.fromkeys(EIGHTHS[1:], "#")}


def bar(share: float, cells: int) -> str:
    """Return a bar of that many cells, filled to the share, in steps of an eighth of a cell."""
    full, eighth = divmod(int(share * cells * 8), 8)
    return ("█" * full + (EIGHTHS[eighth] if full < cells else "")).ljust(cells)[:cells]


def clock(seconds: float) -> str:
    """Return a duration as 00:10 or 1:02:03."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute:02}:{second:02}"


def width_of(text: str) -> int:
    """Return the terminal cells that a text takes."""
    import unicodedata

    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def progress_line(counts: Counts, elapsed: float, columns: int | None) -> str:
    """Return the progress line, fitted to a terminal of that many columns, or with the bar of a pipe.

    The time left is reckoned from the rows that were really worked on.
    """
    worked = counts.generated + counts.failed
    share = counts.done / counts.total if counts.total else 1.0
    left = counts.total - counts.done
    eta = clock(elapsed / worked * left) if worked else "?" if left else "00:00"
    tally = f"✓={counts.generated}, ⊘={counts.skipped}, ✗={counts.failed}"
    figures = f"{counts.done}/{counts.total} [{clock(elapsed)}<{eta}, {tally}]"
    percent = f"{int(share * 100):3}%"
    head = "Generating embeddings: "
    if columns is None:
        return f"{head}{percent}|{bar(share, PIPE_BAR)}| {figures}"
    room = max(columns - 3, 1)  # a terminal's own ^C, of two cells, must not make the line wrap
    for before in (f"{head}{percent}", percent.strip()):
        cells = room - len(f"{before}|| {figures}")
        if cells >= 4:
            return f"{before}|{bar(share, cells)}| {figures}"
    for line in (f"{percent.strip()} {figures}", f"{counts.done}/{counts.total} {tally}", tally):
        if len(line) <= room:
            return line
    return percent.strip()[:room]


class Console:
    """Standard output: survives encodings, closed pipes and full devices."""

    def __init__(self, out: TextIO | None, interrupt: Interrupt) -> None:
        self.out, self.interrupt = out, interrupt
        self.drawn = 0  # cells of the line that is to be redrawn in place
        if out is not None and hasattr(out, "reconfigure"):
            import codecs

            codecs.register_error("legible", self.legible)
            out.reconfigure(errors="legible")

    @staticmethod
    def legible(error: UnicodeError) -> tuple[str, int]:
        """Return something that the encoding can show instead of what it cannot; a codec's error handler."""
        assert isinstance(error, UnicodeEncodeError)
        missing = error.object[error.start : error.end]
        return "".join(LEGIBLE.get(character, "?") for character in missing), error.end

    @property
    def is_terminal(self) -> bool:
        """Whether a line can be redrawn in place."""
        return self.out is not None and self.out.isatty()

    @property
    def columns(self) -> int | None:
        """The terminal's width now, None where there is no terminal."""
        if not self.is_terminal:
            return None
        try:
            assert self.out is not None
            return os.get_terminal_size(self.out.fileno()).columns or 80
        except OSError:
            return 80

    def write(self, text: str) -> None:
        """Write at once, or lose it: what happens to the output must not touch the work, except that a
        reader who has gone away wants no more of it."""
        if self.out is None:
            return
        try:
            self.out.write(text)
            self.out.flush()
        except BrokenPipeError:
            self.interrupt.code = self.interrupt.code or EXIT_SIGPIPE
            self.abandon()
        except (OSError, ValueError) as error:
            self.abandon()
            complain(f"warning: cannot write to standard output ({describe(error)}); going on without it")

    def abandon(self) -> None:
        """Write no more; and let Python's own flush at the exit go nowhere."""
        out, self.out = self.out, None
        try:
            assert out is not None
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, out.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            pass  # it was no file to begin with

    def line(self, text: str = "") -> None:
        """Print one line, below the one that was being redrawn."""
        self.end_line()
        self.write(text + "\n")

    def end_line(self) -> None:
        """Leave the line that was being redrawn as it is."""
        if self.drawn:
            self.drawn = 0
            self.write("\n")

    def erase(self) -> None:
        """Take back the line that was being redrawn, and the ^C that a terminal puts behind it."""
        self.write("\r" + " " * (self.drawn + 2) + "\r")
        self.drawn = 0

    def redraw(self, text: str) -> None:
        """Put the text in place of the last one."""
        width = width_of(text)
        self.write("\r" + text + " " * (self.drawn - width))
        self.drawn = width


def complain(text: str) -> None:
    """Write one line to standard error, if there is one."""
    try:
        if sys.stderr is not None:
            print(text.encode("utf-8", "replace").decode("utf-8"), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass  # there is nowhere left to say it


class Report:
    """What a run prints: the head, the progress, the summary, or one JSON object."""

    def __init__(self, console: Console, options: argparse.Namespace, table: str, log_path: str) -> None:
        self.console, self.options, self.log_path = console, options, log_path
        noun = options.noun or singular(table.replace("_", " ").strip())
        self.noun = noun.lower()
        self.nouns = (plural(noun) if options.noun else table.replace("_", " ").strip()).lower()
        self.title = " ".join(word[:1].upper() + word[1:] for word in noun.split()) + " Embedding Generator"
        self.started = self.shown = time.monotonic()
        self.worked_from = self.started
        self.talkative = not (options.quiet or options.json)
        self.stopping = False  # whether it was said that the run is to stop

    def start(self, counts: Counts) -> None:
        """Print what is going to be done."""
        self.worked_from = self.shown = time.monotonic()
        if not self.talkative:
            return
        say = self.console.line
        for text in (RULE, f"🧠 {self.title}", RULE, f"📊 Total {self.nouns} to process: {counts.total}"):
            say(text)
        say(f"⚡ Workers/Concurrent: {self.options.in_flight or 'auto'}")
        say(f"🔄 Skip existing: {'No' if self.options.force else 'Yes'}")
        say(f"📝 Detailed logs: {self.log_path}")
        say()

    def update(self, counts: Counts) -> None:
        """Show the progress, if it is time to."""
        now = time.monotonic()
        if self.console.interrupt.code and self.console.is_terminal and self.talkative and not self.stopping:
            self.stopping = True
            self.console.erase()
            self.console.line(f"Stopping within {GRACE:.0f} s. Ctrl-C again ends at once.")
        if not self.talkative or now - self.shown < (REDRAW if self.console.is_terminal else PIPE_INTERVAL):
            return
        self.shown = now
        self.show(counts, now)

    def show(self, counts: Counts, now: float) -> None:
        """Show the progress."""
        text = progress_line(counts, now - self.worked_from, self.console.columns)
        if self.console.is_terminal:
            self.console.redraw(text)
        else:
            self.console.line(text)

    def finish(self, counts: Counts, code: int, error: str = "") -> None:
        """Print what was done, or how far it came."""
        now = time.monotonic()
        # Rounded first, so that the speed is what a reader gets from the figures printed.
        elapsed = round(now - self.started, 2) or now - self.started
        speed = counts.generated / elapsed if elapsed else 0.0
        if self.options.json:
            self.finish_json(counts, elapsed, speed, code, error)
            return
        if self.talkative:
            self.show(counts, now)
            self.console.line()
            self.console.line("💾 Saving embeddings to database...")
            self.console.line()
        elif code == EXIT_DONE:
            return
        complete = code in (EXIT_DONE, EXIT_FAILED_ROWS)
        say = self.console.line
        say(RULE)
        say(f"✅ {self.title} Completed" if complete else f"⏹️  {self.title} Stopped")
        say(RULE)
        say(f"📊 Total {self.nouns} processed: {counts.done}")
        say(f"   ✓  Successfully generated: {counts.generated}")
        say(f"   ⊘  Skipped (already exist): {counts.skipped}")
        say(f"   ✗  Failed: {counts.failed}")
        if not complete:
            say(f"   …  Left for the next run: {counts.left}")
        say(f"⏱️  Time elapsed: {elapsed:.2f} seconds")
        say(f"⚡ Average speed: {speed:.2f} embeddings/second")
        say(RULE)
        if self.options.quiet and counts.failed:  # nobody has watched: this is all that a mail from cron will say
            for reason, times in sorted(counts.reasons.items(), key=lambda item: -item[1])[:5]:
                say(f"{times} failed: {one_line(reason)}")
            say(f"Each {self.noun}'s reason is in the log: {self.log_path}")

    def finish_json(self, counts: Counts, elapsed: float, speed: float, code: int, error: str) -> None:
        """Print one JSON object."""
        import json

        summary: dict[str, Any] = {
            "total": counts.done, "generated": counts.generated, "skipped": counts.skipped, "failed": counts.failed,
            "left": counts.left, "seconds": round(elapsed, 2), "rate": round(speed, 2), "exit_code": code,
            "failures": counts.reasons, "model": self.options.model, "log": self.log_path,
        }  # fmt: skip
        if error:
            summary["error"] = error
        self.console.line(json.dumps(summary, ensure_ascii=True))


LOG_BYTES, LOG_FILES = 10_000_000, 3  # a log is put aside at this size, and so many old ones are kept
WARNINGS_OF_A_KIND = 20  # warnings with one reason; further ones are info, and summed up at the end


class Log:
    """The log of a run: a file, rotated by size; without one if it cannot be written."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        import logging
        import logging.handlers

        folder = options.log_dir or os.path.join(os.path.dirname(os.path.abspath(__file__)), "logs")
        path = os.path.join(folder, name)
        here = os.path.join(os.path.realpath(os.curdir), "")
        whole = os.path.realpath(path)
        # Relative where that is short and clear: from the root folder, everything would be.
        self.shown = os.path.relpath(whole, here) if whole.startswith(here) and os.path.dirname(here[:-1]) else whole
        self.seen: dict[str, int] = {}
        self.logger = logging.Logger("embedgen", logging.DEBUG if options.verbose else logging.INFO)
        self.logger.addHandler(logging.NullHandler())
        try:
            os.makedirs(folder, exist_ok=True)
            handler = logging.handlers.RotatingFileHandler(
                path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8", errors="backslashreplace"
            )
        except OSError as error:
            complain(
                f"warning: cannot write the log {whole} ({describe(error)}); going on without it. Give --log-dir DIR."
            )
            self.shown = "none"
            return
        handler.setFormatter(logging.Formatter("%(asctime)s - %(processName)s - %(levelname)s - %(message)s"))
        handler.handleError = self.give_up  # type: ignore[method-assign]
        self.logger.addHandler(handler)

    def give_up(self, record: Any) -> None:
        """Go on without the log when it cannot be written any more; the handler's own way is a traceback."""
        error = sys.exc_info()[1]
        for handler in list(self.logger.handlers):
            self.logger.removeHandler(handler)
        complain(f"warning: cannot write the log {self.shown} ({error}); going on without it")

    def info(self, text: str) -> None:
        """Log what happened."""
        self.logger.info("%s", one_line(text))

    def debug(self, text: str) -> None:
        """Log what only --verbose wants."""
        self.logger.debug("%s", one_line(text))

    def warn(self, text: str, reason: str) -> None:
        """Log what went wrong; as a warning only the first few times for one reason."""
        import logging

        self.seen[reason] = self.seen.get(reason, 0) + 1
        level = logging.WARNING if self.seen[reason] <= WARNINGS_OF_A_KIND else logging.INFO
        self.logger.log(level, "%s", one_line(text))

    def sum_up(self) -> None:
        """Log how often each reason came up beyond the warnings written."""
        for reason, times in self.seen.items():
            if times > WARNINGS_OF_A_KIND:
                self.logger.warning("%s", one_line(f"{times} times in all: {reason}"))

    def error(self, text: str, traceback: bool = False) -> None:
        """Log why the run ends."""
        self.logger.error("%s", one_line(text), exc_info=traceback)

    def close(self) -> None:
        """Close the file."""
        for handler in self.logger.handlers:
            handler.close()


def one_line(text: str) -> str:
    """Return a text without line breaks and control characters: one event, one line."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


# =============================== the run ===============================

MOST_CHARACTERS = 1_000_000  # of one request's texts together; one text alone may be longer
UNSAVED_ROWS, UNSAVED_SECONDS = 1000, 1.0  # finished work is saved when there is so much of it, or it is so old


class Run:
    """One run over the table: the loop that both engines and all stores share."""

    def __init__(self, store: Store, engine: Engine, counts: Counts, report: Report, log: Log) -> None:
        self.store, self.engine, self.counts, self.report, self.log = store, engine, counts, report, log
        self.unsaved: list[tuple[Row, bytes]] = []
        self.oldest = 0.0  # when the first of them came
        self.handed_out = 0  # rows given to the engine, less those that failed: what may yet count for the limit
        self.last_key: Any = None
        self.more = True  # whether the table may hold rows that were not looked at
        self.reason = engine.pace.reason  # the pace's last one that was logged
        self.ways: set[str] = set()  # in which vectors came, as logged

    def work(self) -> None:
        """Embed what is pending. Whatever ends it, what was finished is saved."""
        try:
            self.rounds()
        except KeyboardInterrupt:
            raise  # at once: saving could mean to wait for a lock
        except BaseException:
            self.save()
            raise
        else:
            self.save()
            if not self.more and not self.engine.interrupt.code:
                self.counts.to_do = (
                    self.counts.generated + self.counts.failed
                )  # others were deleted before they were read
                self.store.end_change()

    def rounds(self) -> None:
        """Embed what is pending, in a second round only where rows of the first have failed and left room."""
        try:
            while self.more and self.room():
                for event in self.engine.run(self.batches()):
                    if isinstance(event, Result):
                        self.take(event)
                    elif isinstance(event, Exchange):
                        self.note(event)
                    self.save_if_due()
                    self.report.update(self.counts)
                if self.engine.interrupt.code:
                    return
                self.save()  # what is dropped here leaves room in the limit
        finally:
            pace = self.engine.pace
            self.log.info(f"at the end {pace.in_flight} in flight, batches of {pace.batch_size}: {pace.reason}")

    def room(self) -> int:
        """Return how many more rows may be handed out."""
        return sys.maxsize if self.counts.limit is None else self.counts.limit - self.handed_out

    def batches(self) -> Iterator[list[Row]]:
        """Yield batches of pending rows, each as large as the pace has it when it is taken."""
        batch: list[Row] = []
        size = 0
        for row in self.store.pending(self.last_key):
            self.last_key = row.key
            if not row.text.strip(BLANKS):
                self.fail(row, "no text")
                self.report.update(self.counts)
                if self.engine.interrupt.code:
                    return
                continue
            if batch and size + len(row.text) > MOST_CHARACTERS:
                yield batch
                batch, size = [], 0
            self.handed_out += 1
            batch.append(row)
            size += len(row.text)
            if len(batch) >= self.engine.pace.batch_size or not self.room():
                yield batch
                batch, size = [], 0
                if not self.room():
                    return
        self.more = False
        if batch:
            yield batch

    def take(self, result: Result) -> None:
        """Count and log the rows that failed, and keep the others to be saved."""
        if not self.unsaved:
            self.oldest = time.monotonic()
        for row, answer in zip(result.rows, result.answers):
            if isinstance(answer, bytes):
                self.unsaved.append((row, answer))
            else:
                self.handed_out -= 1
                self.fail(row, answer)

    def fail(self, row: Row, reason: str) -> None:
        """Count and log a row that gets no embedding."""
        self.counts.fail(reason)
        self.log.warn(f"{self.report.noun} {row.key!r} failed: {reason}", reason)

    def note(self, exchange: Exchange) -> None:
        """Log one request."""
        if exchange.outcome == "ok":
            self.log.debug(f"{exchange.texts} texts in {exchange.seconds:.2f} s")
            if exchange.way not in self.ways:
                self.ways.add(exchange.way)
                self.log.info(f"vectors come as {exchange.way}")
        else:
            what = f"with {exchange.texts} texts" if exchange.texts else "with the known-good text"
            text = f"a request {what} gave no embeddings after {exchange.seconds:.2f} s"
            self.log.warn(f"{text}: {exchange.reason}", exchange.reason)
        pace = self.engine.pace
        if pace.reason != self.reason:
            self.reason = pace.reason
            self.log.info(f"{pace.in_flight} in flight, batches of {pace.batch_size}: {pace.reason}")

    def save_if_due(self) -> None:
        """Save what is finished, often enough that little is lost and seldom enough that it costs little."""
        if len(self.unsaved) >= UNSAVED_ROWS or (self.unsaved and time.monotonic() - self.oldest >= UNSAVED_SECONDS):
            self.save()

    def save(self) -> None:
        """Save what is finished; only then is it counted."""
        vectors, self.unsaved = self.unsaved, []  # at once: what cannot be saved now is not tried again at the end
        if vectors:
            saved = self.store.save(vectors)
            self.counts.generated += saved
            dropped = len(vectors) - saved  # rows that were deleted meanwhile
            self.counts.to_do -= dropped
            self.handed_out -= dropped


def generate(
    options: argparse.Namespace,
    wire: OllamaWire | HashWire,
    store: Store,
    log: Log,
    console: Console,
    interrupt: Interrupt,
) -> int:
    """Do the main job and return the exit code."""
    report = Report(console, options, options.table.rpartition(".")[2], log.shown)
    if options.load:
        log.info(f"loaded {store.load(options.load)} rows from {options.load}")
    store.prepare()
    counts = Counts(*store.count(), options.limit)
    log.info(
        f"{options.engine} engine, {hide_password(options.database)}, table {options.table}, model {options.model} "
        f"at {wire.address}: {counts.total} rows, {counts.skipped} with their embedding"
    )
    log.info(f"text: {store.how}")
    if not store.referable:
        log.info(f'the key "{store.key}" is not declared unique; without an index behind it, reading by pages is slow')
    if counts.total > counts.done:
        embed(options, store, wire, counts, report, log, interrupt)
    else:
        report.start(counts)
    code = interrupt.code or (EXIT_FAILED_ROWS if counts.failed else EXIT_DONE)
    report.finish(counts, code)
    log.sum_up()
    log.info(f"{counts.generated} generated, {counts.skipped} skipped, {counts.failed} failed; exit code {code}")
    return code


def embed(
    options: argparse.Namespace,
    store: Store,
    wire: OllamaWire | HashWire,
    counts: Counts,
    report: Report,
    log: Log,
    interrupt: Interrupt,
) -> None:
    """Start an engine and let it work on what is pending; a Stop leaves with the summary printed."""
    stored = store.stored_dimensions()
    if stored:
        wire.dimensions, wire.certain = stored, True
    started = False
    engine = ENGINES[options.engine](wire, Pace(options.in_flight, options.batch_size, options.timeout), interrupt)
    try:
        engine.greet()
        store.create_target(wire.dimensions)
        report.start(counts)
        started = interrupt.gentle = True
        Run(store, engine, counts, report, log).work()
    except Stop as stop:
        if not started:
            raise
        message = f"{stop.message} What was generated is saved; {counts.left} {report.nouns} are left."
        code = interrupt.code or stop.code
        report.finish(counts, code, message)
        raise Reported(message, code) from stop
    finally:
        engine.close()


# =============================== main ===============================


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    import signal

    interrupt = Interrupt()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # ignored as in a shell's background: so it stays
            signal.signal(number, interrupt.on_signal)
    log: Log | None = None
    console = Console(sys.stdout, interrupt)
    try:
        options = parse_arguments(argv)
        wire = wire_for(options)
        with contextlib.closing(open_store(options)) as store:
            store.stopping = lambda: bool(interrupt.code)
            log = Log(options, ENGINES[options.engine].log_name)
            return generate(options, wire, store, log, console, interrupt)
    except Stop as stop:
        if log:
            log.error(stop.message, traceback=stop.__cause__ is not None)
        if "--json" in (sys.argv if argv is None else argv) and not isinstance(stop, Reported):
            import json

            console.line(json.dumps({"exit_code": stop.code, "error": stop.message}))
        complain(f"error: {stop}")
        return stop.code
    except KeyboardInterrupt:
        console.end_line()
        return interrupt.code or EXIT_SIGINT
    except Exception as error:
        if log is None:
            raise
        log.error(f"{type(error).__name__}: {error}", traceback=True)
        first = one_line(str(error).partition("\n")[0])
        complain(
            f"error: {type(error).__name__}: {first}. This is a fault of embedgen itself; the log {log.shown} has more."
        )
        return EXIT_STOPPED
    finally:
        interrupt.over = True
        if log:
            log.close()


if __name__ == "__main__":
    sys.exit(main())
