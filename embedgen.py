#!/usr/bin/env python3
"""Fill a database table with text embeddings through an Ollama server.

Rows that have an embedding of the same text are skipped: running the same
command again embeds only what is missing or has changed.

Needs Python 3.9 or later; psycopg 3 for Postgres, nothing else. MIT licence.

Exit codes: 0 all rows have their embedding; 1 finished, but some rows failed;
2 wrong usage; 3 could not start or could not go on; 129, 130 or 143 stopped by
SIGHUP, SIGINT or SIGTERM; 141 standard output was closed. In every case what
was generated is saved.

Examples:
  python embedgen.py                                      table movies in movies.db, local Ollama
  python embedgen.py --load movies.csv --server hash:     try it without Ollama
  python embedgen.py --database shop.db --table products  embed a table of your own
  python embedgen.py --search "a robot learns to love"    find the rows nearest to a text
"""

# How it works, in the order of this file: settings, text, protocols, one batch, pace and scheduling, engines,
# files to load, storage, report, actions, main.
#
#   claims.pending() --rows--> batches --> engine, up to N requests in flight
#                                            |
#   table.save() <-----vectors---------------+
#
# Only this process touches the database, the log and the terminal. Storage does not know about engines, and engines do
# not know about HTTP statuses, so that every engine works the same with every database and every server.

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import csv
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import operator
import os
import random
import re
import signal
import string
import struct
import sys
import threading
import time
import unicodedata
import warnings
from array import array as Array
from collections import Counter
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TextIO, TypeVar, Union, cast
from urllib.parse import quote, unquote

# Modules that take milliseconds to import, and that not every run needs, are imported where they are used:
# asyncio, logging, multiprocessing, sqlite3 and ssl are the dearest.

__version__ = "0.1.0"

EXIT_DONE, EXIT_FAILED_ROWS, EXIT_USAGE, EXIT_STOPPED = 0, 1, 2, 3
EXIT_SIGINT, EXIT_SIGPIPE = 130, 141  # 128 + the signal's number, as shells report it

T = TypeVar("T")


class Stop(Exception):
    """The run cannot start or cannot go on: one sentence for the user, and the exit code."""

    code = EXIT_STOPPED
    message = property(str)


class UsageError(Stop):
    """The command line, or something it names, is wrong."""

    code = EXIT_USAGE


class ServerAway(Stop):
    """A server is unreachable or out of order for now: other servers may take over, and it may come back.

    `reason` is the cause in a few words; `retry_after` is the pause that the server asks for, in seconds.
    """

    def __init__(self, message: str, reason: str = "", retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


SIGNALS = signal.valid_signals() & {1, 2, 15}  # that end a run: SIGHUP, which Windows does not have, SIGINT, SIGTERM


class Interrupt:
    """A request to end the run early: made by signals and closed pipes, seen by every loop that waits."""

    def __init__(self) -> None:
        self.code = 0  # exit code of the request; 0: go on
        self.gentle = False  # whether a loop looks at `code`; before that, the first signal ends the run at once
        self.forced = False  # whether KeyboardInterrupt was raised: a second one would break the clean-up
        self.wake: Callable[[], object] = lambda: None  # ends an engine's wait, which a handler alone does not

    def set_handler(self, handler: Any) -> None:
        """Have the signals that end a run handled so, except those that are ignored, as by nohup."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)

    def on_signal(self, number: int, frame: Any) -> None:
        """Ask for a gentle end; at the second signal, or if no loop would see it, raise KeyboardInterrupt, once."""
        force = not self.forced and (not self.gentle or bool(self.code))
        self.code = self.code or 128 + number
        if force:
            self.forced = True
            warnings.simplefilter("ignore")  # of coroutines that are made and then never awaited
            raise KeyboardInterrupt
        with contextlib.suppress(OSError, RuntimeError):  # of an engine that is closed
            self.wake()

    def on_unraisable(self, unraisable: Any) -> None:
        """Let the next signal raise again if KeyboardInterrupt was lost, as it is in a destructor."""
        if unraisable.exc_type is KeyboardInterrupt:
            self.forced = False
        else:
            sys.__unraisablehook__(unraisable)


# ============================ settings ============================

HASH_MODEL, HASH_DIMENSIONS = "hash-256", 256  # of --server hash:, which has no digest
SQLITE_ENDINGS = (".db", ".sqlite", ".sqlite3")  # of a path that is taken for a database
DATABASE_FORMS = (
    f"sqlite:///relative.db, sqlite:///{'C:' * (os.name == 'nt')}/absolute.db, a path ending in "
    f"{', '.join(SQLITE_ENDINGS)}, or postgresql://..."
)

# Names of actions, none of which is a part of another's.
READING = "search similar status dry_run"  # actions that write nothing
RUN = "generate dry_run"  # the main job and its rehearsal
ALL = "generate search similar status prune dry_run"


def key_value(text: str) -> tuple[str, Any]:
    """Split KEY=VALUE; the value is read as JSON where it is JSON (4096, true, 0.5)."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


# For each metavar: the pattern of a value, its description for errors, and the conversion from text. A blank value is
# refused: it is probably a variable that a script has not set.
FILLED = (r".*\S.*", "a value. Give one, or leave the flag out", str)
KINDS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "N": (r"0*[1-9]\d{0,17}", "a whole number from 1 upwards", int),
    "limit": (r"\d{1,18}", "a whole number from 0 upwards", int),
    "N|auto": (
        r"0*[1-9]\d{0,17}|auto",
        "a whole number from 1 upwards, or auto",
        lambda text: None if text == "auto" else int(text),
    ),
    "SECONDS": (r"(?=.*[1-9])\d{1,5}(\.\d*)?", "a number of seconds above 0", float),
    "KEY=VALUE": ("[^=]+=.*", "of the form KEY=VALUE", key_value),
    "P": (".*", "a text", str),
}


def value_of(kind: str, text: str) -> Any:
    """Return the value of a flag; raise an error for argparse."""
    choice = (kind, f"one of {kind}", str) if "|" in kind else FILLED
    pattern, wanted, convert = KINDS.get(kind, choice)
    if not re.fullmatch(pattern, text, re.ASCII | re.DOTALL):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return convert(text)


class Flag(NamedTuple):
    """A flag, as the parser, the checks and --help need it."""

    metavar: str  # "" for a switch, else one of KINDS, a choice such as a|b|c, or any text that is not blank
    help: str
    actions: str = ALL  # that it goes with
    default: Any = None
    repeated: bool = False  # whether it may be given several times
    alias: str = ""
    title: str = ""  # of the group that begins with this flag


flag: Any = Flag  # as the default of fields that will hold the flag's value


class Settings(NamedTuple):
    """The settings of a run, from flags and environment. Made once, by `parse_arguments`.

    The fields with a Flag are the command line, in the order of --help: the most common flags first.
    """

    action: str  # one of ALL
    model_is_named: bool  # by a flag or the environment

    # fmt: off
    database: str = flag("URL", f"{DATABASE_FORMS} (default: $DATABASE_URL, else sqlite:///movies.db)",
                         title="What to embed")
    table: str = flag("NAME", "table or view to read (default: movies)", default="movies")
    columns: str | None = flag("A,B", "columns that make up the text (default: title, year, genres, ...)")
    text: str | None = flag("TEMPLATE", 'the text itself, such as "{title} ({year}): {overview}"')
    where: str | None = flag("SQL", "only rows that fulfil this condition", "generate " + READING)
    load: str | None = flag("FILE", "first load a .csv, .tsv, .json or .jsonl file into the table", "generate")
    id: str | None = flag("COLUMN", "key of the table, integer or text (default: its primary key, else id)")
    target: str | None = flag("NAME", "table that receives the vectors (default: movie_embeddings for movies)")
    out_column: str | None = flag("COLUMN", "store each vector in this column of its own row instead",
                                  "generate " + READING)

    force: bool = flag("", "embed every row again, existing or not", RUN + " prune", title="How to embed")
    limit: int | None = flag("N", "generate at most N embeddings in this run", RUN)
    engine: str = flag("async|process", "one event loop, or worker processes (default: async)", RUN, "async")
    concurrent: int | None = flag("N|auto", "requests in flight at most; auto adapts to the server (default: auto)",
                                  RUN, alias="--workers")
    batch_size: int | None = flag("N|auto", "texts per request (default: auto)", RUN)
    index: bool = flag("", "Postgres: build the HNSW index for cosine distance after the run", RUN)  # type: ignore
    accept_drift: bool = flag("", "go on although the server's vectors differ from the stored ones", RUN)

    server: tuple[str, ...] = flag(
        "URL", "Ollama; a server of the OpenAI protocol, if the path ends in /v1; or hash: for the built-in embedder, "
        "which finds shared words, not meaning; may be given several times, for servers that share the work "
        "(default: $OLLAMA_HOST, else http://localhost:11434)", repeated=True, title="Server and model")
    model: str = flag("NAME", "embedding model (default: $EMBEDGEN_MODEL, else nomic-embed-text)")
    timeout: float = flag("SECONDS", "longest silence of one request (default: 300)", RUN + " search", 300.0)
    on_long: str = flag("cut|split|fail|skip", "texts longer than the model takes: embed their beginning; or the mean "
                        "of their parts; or fail; or skip them (default: cut)", RUN + " search", "cut")
    document_prefix: str | None = flag("P", "put before every text; empty for none (default: the model's)")
    query_prefix: str | None = flag("P", "put before the text of --search; empty for none (default: the model's)")
    dimensions: int | None = flag("N", "length of the vectors, for models that offer a choice")
    option: tuple[tuple[str, Any], ...] = flag("KEY=VALUE", "model option for the server, such as num_ctx=8192; may be "
                                               "given several times", repeated=True)
    ca_file: str | None = flag("FILE", "certificates of your own authorities, in place of the system's")

    status: bool = flag("", "show what is embedded, missing or stale", "status", title="Instead of embedding")
    search: str | None = flag("TEXT", "list the rows nearest to a text, by cosine similarity", "search")
    similar: str | None = flag("ID", "list the rows nearest to the row with this key", "similar")
    top: int = flag("N", "rows to list (default: 10)", "search similar", 10)
    dry_run: bool = flag("", "show what would be done, and write nothing", "prune dry_run")
    prune: bool = flag("", "remove embeddings whose row is gone", "prune")

    quiet: bool = flag("", "print nothing when all went well", "generate search similar prune", title="Output")
    json: bool = flag("", "print one JSON object at the end and nothing else")
    verbose: bool = flag("", "log every request")
    log_dir: str | None = flag("DIR", "folder of the logs (default: logs, beside embedgen.py)")
    noun: str | None = flag("WORD", "what a row is called in the report (default: from the table's name)")
    # fmt: on

    @property
    def reads_only(self) -> bool:
        """Whether nothing is written, neither to the database nor to a log."""
        return self.dry_run or self.action in READING

    @property
    def context(self) -> int:
        """Tokens of a text that the model takes, by its card; 0 if not known."""
        return card_of(self.model).context

    @property
    def row_prefix(self) -> str:
        """The prefix of the rows' texts: as given, else by the model's card."""
        return card_of(self.model).document if self.document_prefix is None else self.document_prefix

    @property
    def prefix(self) -> str:
        """The prefix of the texts that this run embeds."""
        if self.action != "search":
            return self.row_prefix
        return card_of(self.model).query if self.query_prefix is None else self.query_prefix


FLAGS: dict[str, Flag] = Settings._field_defaults
EXCLUSIVE = (("columns", "text"), ("quiet", "json"), ("target", "out_column"))  # each pair says one thing twice


def flag_of(setting: str) -> str:
    """Return the flag of a setting."""
    return "--" + setting.replace("_", "-")


def suggestion(name: str, names: Iterable[str]) -> str:
    """Return the question whether the nearest of some names was meant, "" if none is like it."""
    import difflib

    return "".join(f" Did you mean {near}?" for near in difflib.get_close_matches(name, list(names), 1))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, without the usage before it."""

    def error(self, message: str) -> Any:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = suggestion(unknown[1], map(flag_of, FLAGS)) if unknown else ""
        message = re.sub(r"\S*@", "***@", message)  # the password in a URL after a misspelt flag
        raise UsageError(f"{message}.{near} See --help.")


def create_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        usage="python embedgen.py [flags]",
        epilog=__doc__,
        # A given width also keeps argparse from importing shutil to ask for the terminal's.
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=98),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"embedgen {__version__}", help="show the version")
    group: Any = parser
    for setting, flag in FLAGS.items():
        group = parser.add_argument_group(flag.title) if flag.title else group
        more: dict[str, Any] = {"action": "append" if flag.repeated else "store" if flag.metavar else "store_true"}
        if flag.metavar:
            kind = setting if setting in KINDS else flag.metavar
            more.update(metavar=flag.metavar, type=functools.partial(value_of, kind), default=flag.default)
        group.add_argument(flag_of(setting), *flag.alias.split(), help=flag.help, **more)
    return parser


def hide_password(url: str) -> str:
    """Return a URL with asterisks for its password and for secrets in its parameters."""
    url = re.sub(r"(?s)^(.*?://)?.*@", r"\1***@", url)
    return re.sub(r"((?:password|token|secret|key)=)[^&\s]+", r"\1***", url)


def database_url(text: str) -> str:
    """Return the value of --database as sqlite:///PATH or postgresql://...; raise UsageError for other forms."""
    if not re.match(r"[\w+]{2,}:", text) and text.lower().endswith(SQLITE_ENDINGS):
        return f"sqlite:///{text}"
    if os.name == "nt":  # C:\ stands after three slashes, and is often written after four
        text = re.sub(r"^sqlite:////(?=[A-Za-z]:)", "sqlite:///", text)
    shown = hide_password(text)
    if driver := re.match(r"(?s)(sqlite|postgres(?:ql)?)\+\w+(:.*)", shown):
        raise UsageError(f"--database {shown} names a driver, too. Write {driver[1]}{driver[2]}")
    if re.match(r"postgres\w*://[^/?]*@[^/?]*@", text):
        raise UsageError(f"--database {shown} has more than one @. Write %40 for an @ in the name or the password.")
    if not re.match("(sqlite:///|postgres(ql)?://).", text):
        raise UsageError(f"--database {shown} is not the address of a database. Give {DATABASE_FORMS}")
    return text


def action_of(given: set[str]) -> str:
    """Return the action; raise UsageError for flags that do not go with it, or with each other."""
    action = next((name for name in ALL.split() if name in given), "generate")
    wrong = [(setting, action) for setting in sorted(given) if action not in FLAGS[setting].actions]
    for setting, other in wrong + [pair for pair in EXCLUSIVE if given.issuperset(pair)]:
        actions = " or ".join(map(flag_of, FLAGS[setting].actions.split()))
        which = f"goes with {actions}" if other == "generate" else f"does not go with {flag_of(other)}"
        raise UsageError(f"{flag_of(setting)} {which}. Leave it out.")
    return action


def parse_arguments(given: Sequence[str]) -> Settings:
    """Return the settings: from flags, then the environment, then the defaults."""
    parser, env = create_parser(), os.environ
    # Bytes that are not UTF-8 become question marks.
    values = vars(parser.parse_args([text.encode("utf-8", "replace").decode() for text in given]))
    action = action_of({name for name, value in values.items() if value != parser.get_default(name)})
    if values["ca_file"]:
        tls_context(values["ca_file"])
    host = env.get("OLLAMA_HOST", "").strip(" \t'\"")
    servers = tuple(values["server"] or [host or "http://localhost:11434"])
    model, dimensions = values["model"], values["dimensions"]
    if "hash:" in servers:
        if servers[1:] or model not in (None, HASH_MODEL) or dimensions not in (None, HASH_DIMENSIONS):
            raise UsageError(
                f"--server hash: goes with no other --server, no --model but {HASH_MODEL} and no --dimensions but "
                f"{HASH_DIMENSIONS}. Leave them out."
            )
        model = HASH_MODEL
    model = model or env.get("EMBEDGEN_MODEL")
    values.update(
        action=action,
        database=database_url(values["database"] or env.get("DATABASE_URL") or "sqlite:///movies.db"),
        server=servers,
        option=tuple(values["option"] or ()),
        model=(model or "nomic-embed-text").removesuffix(":latest"),  # which Ollama adds to names without a tag
        model_is_named=bool(model),
    )
    return Settings(**values)


# =============================== text ===============================


class Card(NamedTuple):
    """Facts about a model that servers do not report: prefixes and context, as it was trained."""

    document: str = ""  # prefix of stored texts
    query: str = ""  # prefix of search texts
    context: int = 0  # longest text, in tokens; 0 if not known


PASSAGES = "Represent this sentence for searching relevant passages: "
QWEN_QUERY = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
# Regular expression for the beginning of a model's name, in Ollama's library and on Hugging Face, and the model's Card,
# from the page that is named. The first match counts.
CARDS = {
    "nomic-embed-text-v2": Card("search_document: ", "search_query: ", 512),  # hf.co/nomic-ai/nomic-embed-text-v2-moe
    # hf.co/nomic-ai/nomic-embed-text-v1.5; trained for 8,192, of which Ollama's build takes 2,048
    "nomic-embed-text": Card("search_document: ", "search_query: ", 2048),
    # ai.google.dev/gemma/docs/embeddinggemma/model_card
    "embeddinggemma": Card("title: none | text: ", "task: search result | query: ", 2048),
    # hf.co/intfloat/multilingual-e5-large; those with instructions have other prefixes
    "(multilingual-)?e5-(?!mistral|.*instruct)": Card("passage: ", "query: ", 512),
    # hf.co/Snowflake/snowflake-arctic-embed-l-v2.0, -m-long and -l
    "snowflake-arctic-embed(2|-[lm]-v2)": Card("", "query: ", 8192),
    "snowflake-arctic-embed[^:]*long": Card("", PASSAGES, 2048),
    # mixedbread.ai/docs/embeddings/mxbai-embed-large-v1; github.com/FlagOpen/FlagEmbedding, the English models
    "snowflake-arctic-embed|mxbai-embed-large|bge-(small|base|large)(?!-zh)": Card("", PASSAGES, 512),
    "bge-m3": Card(context=8192),  # hf.co/BAAI/bge-m3: "no need to add instructions"
    "qwen3-embedding": Card("", QWEN_QUERY, 32768),  # github.com/QwenLM/Qwen3-Embedding, with its own task for a search
    "all-minilm": Card(context=256),  # hf.co/sentence-transformers/all-MiniLM-L6-v2
    # hf.co/ibm-granite/granite-embedding-278m-multilingual
    # hf.co/sentence-transformers/paraphrase-multilingual-mpnet-base-v2
    "granite-embedding|paraphrase-multilingual": Card(context=512),
}


def card_of(model: str) -> Card:
    """Return the card of a model by its name, such as nomic-embed-text:v1.5 or hf.co/nomic-ai/nomic-embed-text."""
    for name, card in CARDS.items():
        if re.match(rf"(.*/)?(text-embedding-)?({name})", model.lower()):  # with LM Studio's prefix, too
            return card
    return Card()


# The default text: labels with their candidate columns, of which the first that is not blank counts.
LABELS = {
    "Title: ": ("title", "name"),
    "Year: ": ("year",),
    "Genres: ": ("genres", "genre"),
    "Description: ": ("overview", "plot", "summary", "description"),
    "Cast: ": ("cast",),
    "Language: ": ("language",),
    "Rating: ": ("rating",),
}
REQUIRED_LABELS = {"Title: ", "Description: "}  # at least one of them: years and ratings alone describe no row


class Recipe(NamedTuple):
    """How a row becomes a text: literals and columns in turn.

    `parts` are (literal, columns) pairs: the literal, then the value of the first of the columns that is
    not blank; no columns for the literal at the end of a template. If the literals are labels, a part
    without a value is left out, and the others are joined by " | ".
    """

    parts: tuple[tuple[str, tuple[str, ...]], ...]
    labelled: bool

    def __str__(self) -> str:
        """The recipe for people, in the form of --text."""
        fields = (before + " or ".join(f"{{{column}}}" for column in columns) for before, columns in self.parts)
        return (" | " if self.labelled else "").join(fields)

    @property
    def columns(self) -> list[str]:
        """All columns of the text."""
        return [column for _, columns in self.parts for column in columns]

    def sql(self, value: Callable[[str], str], literal: Callable[[str], str]) -> str:
        """Return the SQL expression of the text; '' for a row whose columns are all blank.

        `value(column)` must give the SQL of the column's text, NULL where it is blank, and
        `literal(text)` that of a string. The database builds the text, so that it can hash
        and compare texts without moving them.
        """

        def first(columns: Iterable[str]) -> str:
            return f"COALESCE({', '.join([*map(value, columns), 'NULL', 'NULL'])})"  # of two values at least

        if self.labelled:
            pieces = [f"COALESCE({literal(' | ' + label)} || {first(columns)}, '')" for label, columns in self.parts]
            return f"ltrim({' || '.join(pieces)}, ' |')"
        pieces = [f"{literal(before)} || COALESCE({first(columns)}, '')" for before, columns in self.parts]
        return f"CASE WHEN {first(self.columns)} IS NULL THEN '' ELSE {' || '.join(pieces)} END"


# White space and characters of zero width: a text of nothing else counts as blank.
BLANKS = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200C))) + "\u2028\u2029\u202f\u205f\u3000\ufeff"


def match(name: str, names: Iterable[str]) -> str | None:
    """Return the equal one of `names`, or else the only one that differs in case alone."""
    alike = [other for other in names if other.casefold() == name.casefold()]
    return name if name in alike else alike[0] if len(alike) == 1 else None


def listed(names: Iterable[str], most: int = 30) -> str:
    """Return names for an error's sentence."""
    names = [name if name.strip() == name else f'"{name}"' for name in names]
    return ", ".join(names[:most] + ["..."] * (len(names) > most)) or "none"


def column_of(name: str, columns: Iterable[str], table: str) -> str:
    """Return the column called `name`, or raise a UsageError that lists the columns."""
    column = match(name, columns)
    if column is None:
        raise UsageError(f'"{table}" has no column "{name}". It has: {listed(columns)}.{suggestion(name, columns)}')
    return column


def default_recipe(columns: Sequence[str], table: str) -> Recipe:
    """Return the recipe for a table with the well-known columns."""
    parts = []
    for label, names in LABELS.items():
        if found := tuple(filter(None, (match(name, columns) for name in names))):
            parts.append((label, found))
    if not REQUIRED_LABELS & dict(parts).keys():
        raise UsageError(
            f'"{table}" has no column such as title or description to make a text of. It has: {listed(columns)}. '
            f'Say which to use, with --columns A,B or --text "{{A}}: {{B}}".'
        )
    return Recipe(tuple(parts), labelled=True)


def columns_recipe(given: str, columns: Sequence[str], table: str) -> Recipe:
    """Return the recipe for --columns a,b: `A: ... | B: ...`; a name with a comma in it is written "a,b"."""
    parts = []
    for name in next(csv.reader([given], skipinitialspace=True)):
        column = column_of(name, columns, table)
        label = column.replace("_", " ")  # release_year: "Release year: "
        parts.append((f"{label[:1].upper()}{label[1:]}: ", (column,)))
    return Recipe(tuple(parts), labelled=True)


def template_recipe(template: str, columns: Sequence[str], table: str) -> Recipe:
    """Return the recipe for --text, a template as for str.format: braces in the text itself are doubled."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"--text {template!r} is no template: {error}. Write {{{{ or }}}} for a brace.") from None
    if any(form or conversion or name == "" for _, name, form, conversion in fields):
        raise UsageError(f"--text {template!r} has an odd field. Give plain {{column}} fields: a name, no : and no !.")
    parts = [(text, () if name is None else (column_of(name, columns, table),)) for text, name, _, _ in fields]
    recipe = Recipe(tuple(parts), labelled=False)
    if not recipe.columns:
        raise UsageError(f"--text {template!r} names no column. Put one in braces, such as {{{columns[0]}}}.")
    return recipe


# Nouns in -ie. Other plurals in -ies are taken for nouns in -y (stories, story).
IE_NOUNS = r"(?<![a-z])(mov|cook|calor|zomb|self|t|p|brown|rook|hood)ies$"


def singular(word: str) -> str:
    """Return the singular of an English noun, by rule: movies, movie; stories, story; boxes, box."""
    low = word.lower()
    if re.search(r"(ss|us|is|series|species|news|[^s])$", low):
        return word
    if re.search(r"(?s)..ies$", low) and not re.search(IE_NOUNS, low):
        return word[:-3] + ("Y" if word.isupper() else "y")
    if re.search(r"(ss|x|(?<!ca)ch|sh|zz|tus|bus|virus)es$", low):
        return word[:-2]
    return word[:-1]


def plural(word: str) -> str:
    """Return the plural of an English noun, by rule."""
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|ch|sh)$", word) else "s")


def counted(number: int, noun: str) -> str:
    """Return a number of things: `1 text`, `3 texts`."""
    return f"{number} {noun if number == 1 else plural(noun)}"


def one_line(text: str) -> str:
    """Return a text with its line breaks and other control characters as escapes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def digest_of(text: str) -> bytes:
    """Return the identity of a text: the SHA-256 of its UTF-8 form, 32 bytes."""
    return hashlib.sha256(text.encode()).digest()


class Row(NamedTuple):
    """One row to embed: its key, its text without the prefix, and the SHA-256 of the prefixed text."""

    key: Any
    text: str
    digest: bytes


class Embedding(NamedTuple):
    """The vector of a text, float32 little-endian, and which part of the text it represents."""

    vector: bytes
    fit: str = "whole"  # or "cut": the text's beginning; or "split": the mean of its parts' vectors


class Failure(NamedTuple):
    """Why a text gets no vector."""

    reason: str
    kind: str = "failed"  # or that of the server's answer; if it is "too_long", --on-long skip has skipped the text


Answer = Union[Embedding, Failure]  # what an engine returns for each row
LATER = Failure("it is too long", "later")  # it is to be asked for again, on its own


# ============================ protocols ============================
# Requests to a server, and the meaning of its answers; no I/O and no clock here. Sources for Ollama: its docs/api.md,
# server/routes.go and openai/openai.go.


class Request(NamedTuple):
    """One HTTP request, a GET if it has no body; `timeout` is the longest silence, in seconds.

    `longest` is the most tokens that one of the texts may have if vectors are asked for as base64, else 0.
    """

    path: str
    body: bytes
    timeout: float
    longest: int = 0


class Response(NamedTuple):
    """The outcome of a Request; without a complete answer, status 0 and a reason in words."""

    status: int
    body: bytes = b""
    seconds: float = 0.0
    headers: dict[str, str] = {}  # by their names in lower case
    reason: str = ""
    timed_out: bool = False
    family: int = 0  # of the address that has answered, as socket.AF_INET


class Wait(NamedTuple):
    """Let this many seconds pass."""

    seconds: float


class Exchange(NamedTuple):
    """One finished request, for pace and log; `outcome` is ok, overloaded, timeout or failed.

    `texts` is 0 for the known-good text, which is no row's; `encoding` says how vectors came, and over which path.
    """

    texts: int
    seconds: float
    outcome: str
    reason: str = ""
    encoding: str = ""


class Learned(NamedTuple):
    """A batch's discovery about its server: new values for fields of the ServerProfile."""

    changes: dict[str, int]


# The steps of a conversation with a server. Its driver sends back the Response to a Request, and None to all else;
# a string is a remark for the log.
Steps = Generator[Union[Request, Wait, Exchange, Learned, str], Any, T]


class ServerProfile(NamedTuple):
    """All that is known about one server. The parent owns it, sends it with each task, and updates it by events."""

    sample: bytes = b""  # the vector of the known-good text; b"" before the handshake
    digest: str = ""  # of the model as this server has it, and of its weights and template; "" if not told
    weights: str = ""
    version: str = ""  # of the server; "" if not told
    base64_tokens: int = 0  # texts that cannot have more tokens than these are asked for in base64
    most_texts: int = sys.maxsize  # that one request can carry; with 1, it is sent as a string and not as a list
    long_from: int = sys.maxsize  # characters from which a text is likely to be too long
    note: str = ""  # what a person should know about it
    family: int = 0  # of the address that has answered; 0 for any

    @property
    def dimensions(self) -> int:
        """The length of this server's vectors."""
        return len(self.sample) // 4


def short_digest(digest: str) -> str:
    """Return the beginning of a digest without its algorithm, as Ollama shows it."""
    return digest.rpartition(":")[2][:12]


class Endpoint(NamedTuple):
    """Where a server is. `authorization` is the header's value, `ca_file` "" for the system's roots."""

    scheme: str
    host: str
    port: int
    path: str
    authorization: str = ""
    ca_file: str = ""

    @property
    def shown(self) -> str:
        """The address as it may be printed."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    def hide(self, text: str) -> str:
        """Return a server's or an error's words without the secrets of the request, which some proxies echo."""
        import html

        kind, _, secret = self.authorization.partition(" ")
        secrets = [secret]
        if kind == "Basic":
            userinfo = base64.b64decode(secret).decode()
            secrets += [userinfo, userinfo.partition(":")[2]]
        for form in (form for one in filter(None, secrets) for form in (one, html.escape(one), json.dumps(one)[1:-1])):
            # A short secret may be part of a word.
            text = re.sub(re.escape(form) if len(form) >= 8 else rf"(?<!\w){re.escape(form)}(?!\w)", "***", text)
        return text


# What --server and OLLAMA_HOST may say; without brackets, two colons make an IPv6 address.
ADDRESS = (
    r"(?ai)(?!hash(?::\w*)?\Z)(?:(https?)://)?(?:([^/]*)@)?"  # scheme, user and password
    r"(?:\[([^]/]*)\]|((?:[^][/\s?#\\@,]*:){2}[^][/\s?#\\@,]*|[^][/:\s?#\\@,]*))"  # IPv6 in brackets or not, or a name
    r"(?::(\d{1,5}))?(/[^\s?#\\@,]*)?"  # port and path
)


def parse_endpoint(text: str, ca_file: str = "") -> Endpoint:
    """Return the endpoint of a URL or any of OLLAMA_HOST's forms: host, host:port, :port, scheme://host:port/path.

    As in Ollama's envconfig, the port is 11434 unless a scheme is given, which brings its own; an address that means
    "all interfaces" is this machine to a client.
    """
    found = re.fullmatch(ADDRESS, text.strip())
    if not found or int(found[5] or 0) > 65535:
        raise UsageError(
            f"--server {hide_password(text)} is not an address. Give http(s)://HOST:PORT, each server in a flag of "
            'its own; the built-in embedder is called "hash:".'
        )
    given, userinfo, bracketed, host, port, path = found.groups("")
    scheme, path, host = given.lower() or "http", path.rstrip("/"), bracketed or host
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    usual = 11434 if not given else 443 if scheme == "https" else 80
    return Endpoint(scheme, host, int(port or usual), path, authorization_for(userinfo, path), ca_file)


def authorization_for(userinfo: str, path: str) -> str:
    """Return the Authorization header for an address's user and password, or else for a token in the environment."""
    if userinfo:
        return "Basic " + base64.b64encode(unquote(userinfo).encode()).decode()
    for setting in ("OLLAMA_API_KEY", "OPENAI_API_KEY")[: 1 + path.endswith("/v1")]:  # Ollama gets no token of OpenAI's
        if token := os.environ.get(setting, "").strip():
            if not re.fullmatch(r"[\x20-\x7e]*", token):
                raise UsageError(f"{setting} holds characters that no token has, as a line break. Set it anew.")
            return f"Bearer {token}"
    return ""


# ---- vectors ----


def pack(numbers: Sequence[float]) -> bytes:
    """Return a vector as it is stored: float32, little-endian, nothing else."""
    return struct.pack(f"<{len(numbers)}f", *numbers)


def unpack(vector: bytes) -> Sequence[float]:
    """Return the numbers of a stored vector."""
    return struct.unpack(f"<{len(vector) // 4}f", vector)


def normalised(numbers: Sequence[float]) -> bytes:
    """Return a vector as it is stored, scaled to length 1; nothing if it is all zero."""
    norm = math.hypot(*numbers)
    return pack([number / norm for number in numbers]) if norm else b""


def cosine(one: bytes, other: bytes) -> float:
    """Return the cosine of the angle between two stored vectors; NaN if they have no angle."""
    a, b = unpack(one), unpack(other)
    p, q = math.hypot(*a), math.hypot(*b)
    if len(a) != len(b) or not 0 < p * q < math.inf:
        return math.nan
    # By the law of cosines: math.dist takes a fraction of the time of a sum of products.
    return min(max((p * p + q * q - math.dist(a, b) ** 2) / (2 * p * q), -1.0), 1.0)


# Cosine above which two vectors of one text are of one model. Measured with all-MiniLM-L6-v2 on llama-server, on 600
# texts: in any batch, quantised or not, at least 0.9996; f16 for f32 0.999999, q8_0 0.9987; but q4_0 0.96 at the
# median, and another prefix 0.89.
ALIKE = 0.99


def validate_vectors(vectors: list[Any], texts: list[str]) -> list[bytes]:
    """Return vectors, given as lists of numbers or base64, as they are stored; raise Trouble unless all are valid.

    A status of 200 proves nothing: servers have sent it with too few vectors, all zeros, NaN as null, and one vector
    for every text. No loop looks at single numbers: that would take longer than all other work on them.
    """
    if len(vectors) != len(texts):
        raise Trouble("garbled", f"{len(vectors)} vectors came for {len(texts)} texts")
    try:
        packed = [binascii.a2b_base64(v) if isinstance(v, str) else pack(v) for v in vectors]
    except (TypeError, ValueError, OverflowError, struct.error):
        raise Trouble("garbled", "a vector holds something that is no number") from None
    for vector in packed:
        if not any(vector):
            raise Trouble("garbled", "a vector is all zero")
        high = vector[3::4]  # the highest bytes of float32 (IEEE 754): these two begin NaN, infinity, and 2**127
        if b"\x7f" in high or b"\xff" in high:
            raise Trouble("garbled", "a vector holds NaN or infinity")
    # Different beginnings tell vectors apart nearly always, and sooner. Texts that differ by case and punctuation alone
    # may share a vector, and so may those with the same beginning, of which a server cuts the rest.
    is_odd = len({vector[:64] for vector in packed}) < len(packed)
    if is_odd and len(set(packed)) < len({re.sub(r"\W+", "", text[:1000].casefold()) for text in texts}):
        raise Trouble("garbled", "different texts were given one vector")
    return packed


# ---- errors ----


class Policy(NamedTuple):
    """The treatment of one kind of trouble.

    `together` and `alone`: so many failures are enough to blame one of several texts, or a single text; None: never.
    Before a single text is tried again that can be blamed, the server must embed a known-good text.
    `fault`: who seems to be at fault, the server or the texts.
    `outcome`: what the pace is told.
    """

    together: int | None
    alone: int | None
    fault: str
    outcome: str


POLICIES = {
    "changed": Policy(None, None, "server", "failed"),  # the server needs another form of request
    "unreachable": Policy(4, None, "server", "failed"),  # nobody answers, or not to the end
    "busy": Policy(None, None, "server", "overloaded"),
    "late": Policy(2, None, "server", "overloaded"),  # what stands before the server has lost patience
    "unavailable": Policy(4, None, "server", "overloaded"),
    "crashed": Policy(4, 8, "server", "overloaded"),  # which servers do by themselves, too, and for most of a minute
    "timeout": Policy(1, 3, "server", "timeout"),
    "dimensions": Policy(None, None, "server", "failed"),  # vectors of another length; see BatchRequest.insist
    "garbled": Policy(2, 2, "texts", "failed"),  # an answer that must not be stored
    "too_long": Policy(1, 1, "texts", "failed"),
    "refused": Policy(1, 2, "texts", "failed"),
}


class Trouble(Exception):
    """A request gave no vectors; `kind` is one of POLICIES, the message is for people.

    If it is "changed", `changes` to the server's profile make the form of request that the server takes.
    """

    def __init__(self, kind: str, message: str, retry_after: float = 0.0, **changes: int) -> None:
        super().__init__(message)
        self.kind, self.policy, self.retry_after, self.changes = kind, POLICIES[kind], retry_after, changes


# The words of Ollama, llama-server, vLLM, OpenAI, TEI and others, by what they mean.
TOO_LONG = (
    r"(?i)context (?:length|size|window)"
    r"|(?:input|prompt|text|sequence)s?(?: \([^)]*\))? (?:is |are )?too (?:long|big|large to process)"
    r"|less than \d+ tokens|maximum (?:input|model|sequence|token) length|too many tokens"
    r"|exceed\w* (?:the )?(?:max\w*|available) (?:\w+ ){0,3}(?:tokens|length)"
)
TOO_MANY = (
    r"(?i)maximum allowed batch size|array too long|too many (?:inputs|items|texts)"
    r"|max\w* number of (?:inputs|items|texts)|at most \d+ (?:inputs|items|requests|texts)|tokens per request"
    r"|batch size (?:is )?(?:\d+ )?(?:invalid|exceeds|too large)"
)
ONE_STRING = r"(?i)(?:must|should) be a (?:valid )?string|expect\w* (?:a )?string|array into .*\bstring"
NO_MODEL = r"(?i)\bmodels?\b.*not (?:found|exist|loaded|available)|no models? |(?:invalid|unknown|unsupported) model\b"
DEAD_RUNNER = r"\bEOF\b|do embedding request|connection (?:refused|reset)|forcibly closed"
ANY, CONTENT = range(1000), (400, 413, 422, 500)

# The kind of an error: that of the first row whose statuses and pattern match. Before 0.14 Ollama answered 500 for NaN,
# and from 0.13.3 on it answers 400 for a runner that died.
ERRORS: tuple[tuple[Container[int], str, str], ...] = (
    (ANY, r"HTTP request (?:was sent )?to (?:an )?HTTPS", "speaks_tls"),
    (ANY, r"(?i)not support (?:the )?embedding", "cannot_embed"),
    (CONTENT, TOO_LONG, "too_long"),
    (CONTENT, r"\bNaN\b", "refused"),
    ((400, 413, 422), TOO_MANY, "too_many"),
    ((400, 422), ONE_STRING, "one_string"),
    ((429, 503), "", "busy"),
    ((408, 504, 524), "", "late"),
    ((500,), "", "crashed"),
    (range(501, 600), "", "unavailable"),
    (ANY, DEAD_RUNNER, "crashed"),
    ((400, 404), NO_MODEL, "no_model"),
    ((404, 405), "", "no_path"),
    ((400, 422), "encoding_format", "no_base64"),
    ((401, 403), "", "no_access"),
    (range(300, 400), "", "moved"),
    (ANY, "", "refused"),
)
# The kinds that end the run, in words for the user; `p` is the protocol.
STOPS = {
    "speaks_tls": "{p.address} speaks TLS ({said}). Give --server https://...",
    "cannot_embed": 'the model "{p.model}" cannot embed ({said}). Give --model nomic-embed-text, for example.',
    "no_model": '{p.address} has no model "{p.model}" ({said}). {p.get_model}',
    "no_path": "{p.address} has no {path} ({said}). {p.get_path}",
    "no_access": "{p.address} refuses access ({said}). Set {p.tokens} to the token.",
    "moved": "{p.address} sends elsewhere ({said}). Give --server {location}.",
}


MALFORMED = (ValueError, RecursionError, LookupError, TypeError, AttributeError)  # raised for unexpected JSON
KNOWN_GOOD = "a short text"  # which no model has a reason to refuse


def words_of(body: bytes) -> str:
    """Return the message in an error's body, on one line.

    Ollama has {"error": words}, OpenAI {"error": {"message": words}}, FastAPI {"detail": words} or {"detail": [{"msg":
    words}]}, TEI and others {"message": words}.
    """
    text = body.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError):
        text = json.dumps(json.loads(text), ensure_ascii=False)  # without escapes, which would hide a secret
        found = [re.search(rf'"{name}": ("(?:[^"\\]|\\.)+")', text) for name in ("message", "error", "detail", "msg")]
        text = next((json.loads(one[1]) for one in found if one), text)
    if text.lstrip()[:1] == "<":
        title = re.search("(?is)<title>(.{1,200}?)</title>", text)
        text = f'an HTML page, "{title[1].strip()}"' if title else "an HTML page"
    return " ".join(text.split())


# A token is made of at least one byte, so that a text of no more bytes than the context has tokens cannot be cut. No
# less crude bound is sure without the vocabulary: a rare word takes a token for each letter, and an answer counts the
# tokens of all its texts together. Some tokenizers spell out ligatures (NFKC); models add two tokens of their own.
CONTEXT_MARGIN = 16
# A model's context may be longer than what Ollama gives it unasked: 2,048 tokens for long, and still in one piece.
CONTEXT_MOST = 2048


class Protocol:
    """What all protocols share: they build requests, check the answers, and read the vectors.

    Frozen after its constructor: changing facts about a server are in its ServerProfile.
    """

    product = "a server"  # as an error calls it
    path = base64_path = "/embeddings"  # for vectors as decimals, and as base64
    list_path = "/models"  # of the models that the server has
    truncates = False  # whether it can be asked to cut long texts itself, at the last token that the model takes
    tokens = "OPENAI_API_KEY or OLLAMA_API_KEY"  # the settings that carry the token
    # Advice for: a server that cannot be reached, a missing model, a missing path, an answer without vectors.
    get_server = "Start it, or give --server URL."
    get_model = "Its path /models lists what it has; give --model NAME."
    get_path = get_answer = "Does it serve embeddings?"

    def __init__(self, endpoint: Endpoint, settings: Settings) -> None:
        self.endpoint, self.address, self.prefix = endpoint, endpoint.shown, settings.prefix
        self.model, self.timeout, self.on_long = settings.model, settings.timeout, settings.on_long
        self.get_model = self.get_model.format(self.model)
        self.context = settings.context  # tokens, by the model's card; 0 if not known
        # In every request for vectors. Ollama reloads the model where the options differ.
        common = {"model": self.model, "dimensions": settings.dimensions, "options": dict(settings.option)}
        self.common = {name: value for name, value in common.items() if value}

    def build(self, profile: ServerProfile, texts: list[str], timeout: float, truncate: bool = False) -> Request:
        """Return the request for the vectors of `texts`; with `truncate` the server may cut them, if it can."""
        texts = [self.prefix + text for text in texts]
        asked = {**self.common, "input": texts[0] if profile.most_texts == 1 else texts}
        path, base64_tokens = self.path, 0
        forms = (form for text in texts for form in (text, unicodedata.normalize("NFKC", text)))
        longest = CONTEXT_MARGIN + max(map(len, map(str.encode, forms)))
        if longest <= profile.base64_tokens:
            path, base64_tokens, asked["encoding_format"] = self.base64_path, longest, "base64"
        elif self.truncates:
            asked["truncate"] = truncate
        return Request(path, json.dumps(asked).encode(), timeout, base64_tokens)

    def check(self, request: Request, response: Response, texts: list[str]) -> None:
        """Raise the error in the answer to a request for the vectors of `texts`, unless its status is 200."""
        status = response.status
        if status == 200:
            return
        if status == 0:
            raise Trouble("timeout" if response.timed_out else "unreachable", response.reason)
        words = self.said(response.body)
        said = f"HTTP {status}: {words}" if words else f"HTTP {status}"
        kind = next(kind for statuses, pattern, kind in ERRORS if status in statuses and re.search(pattern, words))
        if kind == "too_many" and len(texts) > 1:
            raise Trouble("changed", words, most_texts=len(texts) // 2)
        if kind == "one_string" and b'"input": [' in request.body:
            raise Trouble("changed", words, most_texts=1)
        if kind in ("no_base64", "no_path") and request.longest:
            raise Trouble("changed", words, base64_tokens=0)
        if kind == "no_model" and status != 404 and texts != [KNOWN_GOOD]:
            kind = "refused"  # the words may be about the text: the known-good one will show
        if kind in STOPS:
            location = self.endpoint.hide(response.headers.get("location") or "the final address")
            raise Stop(STOPS[kind].format(p=self, said=said, path=request.path, location=location))
        kind = kind if kind in POLICIES else "refused"
        after = response.headers.get("retry-after", "")  # a date is ignored: servers send seconds
        words = said if POLICIES[kind].fault == "server" else words or said
        raise Trouble(kind, words, float(after) if after.isdecimal() else 0.0)

    def said(self, body: bytes) -> str:
        """Return the message in an answer's body, short and without secrets."""
        text = self.endpoint.hide(words_of(body))
        return text if len(text) <= 300 else text[:300] + "..."

    def read(self, response: Response) -> list[Any]:
        """Return the vectors in a good answer, as base64 or lists of numbers, or raise Trouble."""
        try:
            answer = json.loads(response.body)
            if "embeddings" in answer:
                return list(answer["embeddings"])
            found = {item.get("index", position): item["embedding"] for position, item in enumerate(answer["data"])}
            return [found[index] for index in range(len(found))]
        except MALFORMED:
            raise Trouble("garbled", f"the answer holds no embeddings: {self.said(response.body)!r}") from None

    def unreachable(self, reason: str) -> ServerAway:
        """Return the error for a server that cannot be reached at the start."""
        advice = "" if re.search("TLS|certificate", reason) else f" {self.get_server}"
        # A server that speaks TLS hangs up or sends an alert, and one that does not waits for more.
        words = f"{self.endpoint.scheme}: {reason}"
        if re.search(r"^http:.*(without an answer|\\x15\\x03)|^https:.*no connection", words):
            advice = " Give --server https://... if it speaks TLS, http://... if not."
        return ServerAway(f"cannot reach {self.product} at {self.address} ({reason}).{advice}", reason)


class Ollama(Protocol):
    """Ollama's own protocol: POST /api/embed, and /v1/embeddings for texts that cannot be too long.

    From 0.12.7 on, the latter gives 4 bytes a number instead of some 12, and no decimals to parse. But it cuts long
    texts silently, and takes no options.
    """

    product, path, base64_path, list_path = "Ollama", "/api/embed", "/v1/embeddings", "/api/tags"
    truncates = True
    tokens = "OLLAMA_API_KEY"
    get_server = 'Start it with "ollama serve", or give --server URL.'
    get_model = 'Fetch it with "ollama pull {}".'
    get_answer = "Is it Ollama? For a server that speaks the OpenAI protocol, add /v1 to the address."
    get_path = "Upgrade it if it is older than 0.2.6 (June 2024). " + get_answer

    def look_up(self) -> Steps[dict[str, Any]]:
        """Return what the server reports about itself and the model, as fields of its ServerProfile."""
        card = yield from self.fetch("/api/show", json.dumps({"model": self.model}).encode())
        entry = yield from self.entry("/api/tags")
        version = (yield from self.fetch("/api/version")).get("version")
        weights = re.findall(r"(?m)^(?:FROM|ADAPTER) .*sha256-(\w+)", str(card.get("modelfile")))
        trained = re.findall(r'\.context_length": (\d+)', json.dumps(card))
        # A model may come with a shorter context set than it could have (all-minilm does).
        contexts = re.findall(r"num_(?:ctx|batch) +(\d+)", str(card.get("parameters")))
        most = min(map(int, [*trained, *contexts, self.context or CONTEXT_MOST, CONTEXT_MOST]))
        return {
            "digest": str(entry.get("digest") or ""),
            "weights": "".join([*weights, str(card.get("template") or "")]),
            "version": str(version or ""),
            "base64_tokens": most if trained and "options" not in self.common else 0,
        }

    def fetch(self, path: str, body: bytes = b"") -> Steps[dict[str, Any]]:
        """Return the JSON object that the server has under a path, {} if it tells none."""
        for _ in range(3):  # a moment's trouble must not hide that versions differ
            response: Response = yield Request(path, body, min(self.timeout, 30.0))
            if 0 < response.status < 429:
                break
            yield Wait(FIRST_WAIT)
        with contextlib.suppress(*MALFORMED):
            return dict(json.loads(response.body))
        return {}

    def entry(self, path: str) -> Steps[dict[str, Any]]:
        """Return the model's entry in the list that the server has under a path, {} if there is none."""
        answer = yield from self.fetch(path)
        with contextlib.suppress(*MALFORMED):
            models = {model["name"]: model for model in answer["models"]}
            return dict(models.get(self.model) or models[f"{self.model}:latest"])
        return {}

    def loaded_context(self) -> Steps[int]:
        """Return how many tokens of a text the model takes as it is loaded now; 0 if that is not told."""
        # These may be fewer than its own (OLLAMA_CONTEXT_LENGTH).
        context = (yield from self.entry("/api/ps")).get("context_length")
        return context if isinstance(context, int) else 0


class OpenAI(Protocol):
    """The protocol of OpenAI, POST /v1/embeddings, as llama-server, vLLM, TEI, LM Studio and others have it."""


class FeatureHashing(Protocol):
    """No server: signed feature hashing of words and word pairs, computed in this process.

    K. Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009. It finds shared words, not
    meaning: for trying the program, not for real search.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(Endpoint("hash", "", 0, ""), settings)
        self.address, self.model = "hash:", HASH_MODEL

    def hash(self, text: str) -> bytes:
        """Return the vector of a text, or nothing for one without words."""
        words = re.findall(r"\w+", text.casefold())
        words = words and re.findall(r"\w+", self.prefix.casefold()) + words
        vector = [0.0] * HASH_DIMENSIONS
        # Long words are rare words, in any language and without a list of them: they say the most. Pairs weigh
        # little: they break ties, and 256 places are few. Chosen on the sample films, where the three longest
        # words of a description find its film first in 97 % of cases.
        features = {word: float(len(word)) for word in words}
        features.update({f"{one} {two}": min(len(one), len(two)) / 5 for one, two in zip(words, words[1:])})
        for feature, weight in features.items():
            code = int.from_bytes(hashlib.blake2b(feature.encode("utf-8", "replace"), digest_size=4).digest(), "little")
            vector[code % HASH_DIMENSIONS] += weight if code >> 31 else -weight
        return normalised(vector)


def protocols_for(settings: Settings) -> list[Protocol]:
    """Return the protocol for each --server."""
    if settings.server == ("hash:",):
        return [FeatureHashing(settings)]
    protocols: dict[str, Protocol] = {}
    for text in settings.server:
        endpoint = parse_endpoint(text, settings.ca_file or "")
        if endpoint.shown in protocols:  # probably a slip: another one was meant
            raise UsageError(f"--server {endpoint.shown} is given twice. Give each server once.")
        protocol = OpenAI if endpoint.path.endswith("/v1") else Ollama
        if protocol is OpenAI and settings.option:
            raise UsageError(f"--option is for Ollama's own protocol; {endpoint.shown} speaks OpenAI's. Leave it out.")
        protocols[endpoint.shown] = protocol(endpoint, settings)
    return list(protocols.values())


# ============================ one batch ============================
# A conversation with a server is a generator without I/O or clock: it yields requests and waits, and is sent the
# responses. So both engines make the same decisions, and tests can drive it with a list of answers.

PATIENCE = 120.0  # seconds of trying without one good answer, after which the server is given up
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0  # seconds between tries; the cap bounds the delay after a server has come back
LONGEST_RETRY_AFTER = 600.0  # seconds; longer pauses are cut to this
LEAVE_AFTER = 5.0  # seconds of trying, after which the texts go to another server, if there is one
ODD_ANSWERS = 3  # answers in a row with other dimensions, after which the server is not trusted
PARTS_TOGETHER = 16  # parts of a split text in one request

# Where a text may be split, best first: after a sentence or a line, between words, and anywhere.
BORDERS = (r"(?:(?<=[.!?…]\s)|(?<=[\n。！？]))", r"(?<=\s)", "")


def parts_of(text: str, most: int) -> list[str]:
    """Return a text in parts of at most `most` characters and at least half of that, without blank parts."""
    forms = [rf".{{{most - most // 2},{most}}}{border}" for border in BORDERS]
    parts = re.findall("|".join([rf"(?s).{{1,{most}}}\Z", *forms]), text)
    return [part for part in parts if part.strip(BLANKS)]


def mean(vectors: list[tuple[int, bytes]]) -> bytes:
    """Return the weighted mean of vectors, scaled to length 1."""
    return normalised([sum(values) for values in zip(*([w * x for x in unpack(vector)] for w, vector in vectors))])


def embed_batch(
    protocol: Protocol, profile: ServerProfile, texts: list[str] | None, movable: bool, long: bool | None
) -> Steps[Any]:
    """Return the answer for each text, or without texts a handshake's profile; raise Stop if the server cannot be used.

    `movable`: raise ServerAway rather than wait for long, so that the texts go to other servers. `long`: see Batch.
    """
    if isinstance(protocol, FeatureHashing):  # no server at all
        vectors = [protocol.hash(text) for text in texts or [KNOWN_GOOD]]
        if texts is None:
            return ServerProfile(vectors[0])
        return [Embedding(vector) if vector else Failure("no words in the text") for vector in vectors]
    if texts is None:
        return (yield from handshake(protocol, movable))
    batch = BatchRequest(protocol, profile, movable)
    return [(yield from batch.embed_long(texts[0]))] if long else (yield from batch.embed(texts, long is False))


def handshake(protocol: Protocol, movable: bool = False) -> Steps[ServerProfile]:
    """Return a server's profile after it has embedded a known-good text; raise Stop if it cannot be used.

    A busy server is waited for, as in a batch.
    """
    batch = BatchRequest(protocol, ServerProfile(), movable)
    try:
        sample = yield from batch.wait_until_healthy()
    except Stop as stop:
        if protocol.get_model not in stop.message:
            raise
        listing: Response = yield Request(protocol.list_path, b"", 10.0)
        names = re.findall(r'"(?:name|id)": ?"([^"]+?)(?::latest)?"', listing.body.decode("utf-8", "replace"))
        raise Stop(stop.message + suggestion(protocol.model, names)) from None
    good, size = batch.last, len(sample) // 4
    asked = protocol.common.get("dimensions", size)
    if asked != size:
        raise Stop(
            f"{protocol.address} does not give what was asked for: vectors of {size} dimensions came instead of "
            f"{asked}. Leave out --dimensions, or give another --model."
        )
    # Only Ollama tells more than vectors; and only Ollama cuts a long text without a word.
    facts = (yield from protocol.look_up()) if isinstance(protocol, Ollama) else {"base64_tokens": sys.maxsize}
    batch.profile = batch.profile._replace(sample=sample, **facts)
    base64_sample = b""
    if batch.profile.base64_tokens:
        with contextlib.suppress(Trouble, Stop):  # as a proxy that lets only /api through
            [base64_sample] = yield from batch.ask([KNOWN_GOOD])
    if not cosine(sample, base64_sample) >= ALIKE:
        batch.profile = batch.profile._replace(base64_tokens=0)  # refused, or mangled on the way
    answer = json.loads(good.body)
    version = batch.profile.version or str(answer.get("system_fingerprint") or good.headers.get("server", ""))
    named, model = str(answer.get("model") or ""), protocol.model
    note = f"{protocol.address} answers as the model {protocol.endpoint.hide(named)!r}, not as {model!r}"
    if named.lower() in model.lower() or model.lower() in named.lower():  # as with a tag, or its author before it
        note = ""
    return batch.profile._replace(version=version, note=note, family=good.family)


class BatchRequest:
    """One batch with one server: the server's profile, and for how long it has given no good answer."""

    def __init__(self, protocol: Protocol, profile: ServerProfile, movable: bool = False) -> None:
        self.protocol, self.profile, self.movable = protocol, profile, movable
        self.timeout = protocol.timeout
        self.trying = 0.0  # seconds since the last good answer
        self.waits = 0  # during these seconds
        self.last = Response(0)

    def embed(self, texts: list[str], later: bool = False) -> Steps[list[Answer]]:
        """Return the answer for each text; equal texts are sent once.

        A batch with a text at fault is halved until such texts stand alone; by length, so that those that are too long
        are soon among themselves. With `later` they are answered by LATER, so that others need not wait until they are
        cut or split.
        """
        answers: dict[str, Answer] = {}
        groups = [sorted(dict.fromkeys(texts), key=len)]
        while groups:
            group = groups.pop()
            middle = len(group) // 2
            if middle and len(group[-1]) >= self.profile.long_from:
                groups += [group[:-1], group[-1:]]  # the longest goes alone; if it fits, so do the others
                continue
            try:
                answers.update(zip(group, map(Embedding, (yield from self.insist(group, last=not middle)))))
            except Trouble as trouble:
                if middle:
                    groups += [group[:middle], group[middle:]]
                elif trouble.kind != "too_long" or self.protocol.on_long == "skip":
                    answers[group[0]] = Failure(str(trouble), trouble.kind)
                elif self.protocol.on_long == "fail":
                    yield from self.wait_until_healthy()  # or the server may be to blame
                    answers[group[0]] = Failure(str(trouble))
                else:
                    answers[group[0]] = LATER if later else (yield from self.embed_long(group[0]))
        return [answers[text] for text in texts]

    def embed_long(self, text: str) -> Steps[Answer]:
        """Return the answer for a text that is known to be too long."""
        try:
            return (yield from self.cut(text) if self.protocol.on_long == "cut" else self.split(text))
        except Trouble as trouble:
            return Failure(str(trouble))

    def insist(self, texts: list[str], last: bool = True, truncate: bool = False) -> Steps[list[bytes]]:
        """Return the vectors of `texts`, after as many tries as it takes; raise Trouble if a text is at fault.

        `last`: the texts will not be tried in smaller groups.
        """
        vectors: list[bytes] = []
        tries, longest = Counter[str](), max(map(len, texts))
        while len(vectors) < len(texts):
            try:
                vectors += yield from self.ask(texts[len(vectors) :][: self.profile.most_texts], truncate)
            except Trouble as trouble:
                tries[trouble.kind] += 1
                if tries["dimensions"] == ODD_ANSWERS:
                    raise Stop(
                        f"{self.protocol.address} does not keep to one model: {trouble}. Are there several servers "
                        "behind that address? Give each a --server of its own, or one alone."
                    ) from None
                policy = trouble.policy
                suspected = tries[trouble.kind] >= ((policy.alone if last else policy.together) or sys.maxsize)
                if trouble.kind == "too_long" and last:
                    yield from self.learn(long_from=min(longest, self.profile.long_from))
                if suspected and (last or policy.fault == "texts"):
                    raise
                if not suspected and trouble.kind != "refused":
                    if last:
                        self.waits = sum(tries.values()) - 1  # known-good texts between do not make waits shorter
                    yield from self.pause(trouble)
                # A server that is down proves nothing. After a time-out it may still be computing the lost answer:
                # another request would only lengthen its queue, until it has time for a short text.
                if suspected or (last and policy.alone):
                    yield from self.wait_until_healthy()
                if suspected:
                    raise
        if longest >= self.profile.long_from and not truncate:
            yield from self.learn(long_from=longest + 1)
        return vectors

    def beginning(self, text: str) -> Steps[tuple[int, bytes]]:
        """Return the length of the longest beginning of a text that the server takes, and its vector.

        Bisection begins at the limit known from other texts, or at four characters a token, and ends within a sixteenth
        of the length: each further step would cost a request and add fewer words.
        """
        low, high, known, vector = 0, len(text), self.profile.long_from, b""
        middle = known - 1 if 1 < known < high else min(high // 2, 4 * self.protocol.context or high)
        while high - low > max(low // 16, 1):
            space = text.rfind(" ", low + 1, middle)
            middle = space if space > 0 else middle
            try:
                [vector] = yield from self.insist([text[:middle]])
                low = middle
            except Trouble as trouble:
                if trouble.kind != "too_long":
                    raise
                high = middle
            middle = (low + min(high, 2 * low + 1 if low else high)) // 2
        if not vector:
            raise Trouble("too_long", "no beginning of the text is short enough")
        return low, vector

    def cut(self, text: str) -> Steps[Embedding]:
        """Return the vector of the longest beginning of a text that the server takes, or raise Trouble."""
        if self.protocol.truncates:
            try:
                [vector] = yield from self.insist([text], truncate=True)
                return Embedding(vector, "cut")
            except Trouble as trouble:
                if trouble.kind != "too_long":  # some versions of Ollama refuse to cut
                    raise
        _, vector = yield from self.beginning(text)
        return Embedding(vector, "cut")

    def split(self, text: str) -> Steps[Embedding]:
        """Return the mean of the vectors of a text's parts, weighted by their length, or raise Trouble.

        Several parts go in one request; if they are too long, all are made smaller, since finding the one at fault
        would take longer. After other trouble there are fewer in a request.
        """
        most, _ = yield from self.beginning(text)
        # A sixteenth is kept free: other parts may have more tokens to the character.
        parts, vectors = parts_of(text, most - most // 16), list[tuple[int, bytes]]()
        yield f"a text of {len(text)} characters is split into {len(parts)} parts: {text[:50]!r}..."
        together = PARTS_TOGETHER
        while parts:
            group, parts = parts[:together], parts[together:]
            try:
                vectors += zip(map(len, group), (yield from self.insist(group, last=together == 1)))
            except Trouble as trouble:
                most = max(map(len, group)) // 2
                if trouble.kind == "too_long" and most:
                    parts += [smaller for part in group for smaller in parts_of(part, most)]
                elif together > 1:
                    together, parts = together // 2, group + parts
                else:
                    raise
        return Embedding(mean(vectors), "split")

    def ask(self, texts: list[str], truncate: bool = False) -> Steps[list[bytes]]:
        """Return the vectors of `texts` from one request, or raise Trouble."""
        protocol, known, probe = self.protocol, self.profile.dimensions, texts == [KNOWN_GOOD]
        count = 0 if probe else len(texts)
        request = protocol.build(self.profile, texts, self.timeout, truncate)
        response = self.last = yield request
        try:
            protocol.check(request, response, texts)
            numbers = protocol.read(response)
            vectors = validate_vectors(numbers, texts)
            if request.longest:  # in base64
                # The context is asked for afterwards: the server may have reloaded the model for this request.
                most = (yield from protocol.loaded_context()) if isinstance(protocol, Ollama) else sys.maxsize
                useful = most if isinstance(numbers[0], str) else 0  # this server does not send base64
                if useful < self.profile.base64_tokens:
                    yield from self.learn(base64_tokens=useful)
                if most < request.longest:
                    raise Trouble("changed", "the loaded model may have cut a text")
            for dimensions in {len(vector) / 4 for vector in vectors} - {known or len(vectors[0]) / 4}:
                raise Trouble("dimensions", f"vectors of {dimensions:g} dimensions came instead of {known}")
        except Trouble as trouble:
            yield from self.learn(**trouble.changes)
            yield Exchange(count, response.seconds, "failed" if probe else trouble.policy.outcome, str(trouble))
            if trouble.kind == "timeout":
                self.timeout = min(self.timeout * 2, protocol.timeout * 4)
            if probe or trouble.kind not in ("timeout", "late"):  # the silence may be due to the size of the request
                self.trying += response.seconds
            raise
        self.trying = self.waits = 0
        if not probe:
            encoding = f"{'base64' if request.longest else 'decimals'} over {protocol.endpoint.path}{request.path}"
            yield Exchange(count, response.seconds, "ok", encoding=encoding)
        return vectors

    def learn(self, **changes: int) -> Steps[None]:
        """Update the server's profile, here and in the parent."""
        if changes:
            self.profile = self.profile._replace(**cast(Any, changes))
            yield Learned(changes)

    def wait_until_healthy(self) -> Steps[bytes]:
        """Wait until the server embeds a known-good text; return its vector."""
        self.waits = 0
        while True:
            try:
                [vector] = yield from self.ask([KNOWN_GOOD])
                return vector
            except Trouble as trouble:
                yield from self.pause(trouble, known_good=True)

    def pause(self, trouble: Trouble, known_good: bool = False) -> Steps[None]:
        """Wait before another try: longer each time, jittered, or as long as the server asks for.

        Jitter as in M. Brooker, "Exponential Backoff And Jitter", AWS, 2015. Movable texts go to other servers instead,
        except texts that may have crashed this server: they would crash the others. If it fails with the known-good
        text, too, the texts are not to blame.
        """
        if trouble.kind == "changed":
            return
        protocol, asked = self.protocol, min(trouble.retry_after, LONGEST_RETRY_AFTER)
        if not self.profile.sample and self.waits:  # in the handshake, with a person waiting
            if trouble.kind == "unreachable":
                raise protocol.unreachable(str(trouble))
            if trouble.policy.fault == "texts":
                said = str(trouble).rstrip(".")
                raise Stop(f"{protocol.address} does not embed even a short text: {said}. {protocol.get_answer}")
        hopeless = trouble.kind == "unreachable" or self.trying + asked >= LEAVE_AFTER
        leave = self.movable and hopeless and (known_good or trouble.kind != "crashed")
        if leave or self.trying >= PATIENCE:
            message = (
                f"{protocol.product} at {protocol.address} has given no good answer for {self.trying / 60:.0f} minutes "
                f"({trouble}). Run the same command again when it does."
            )
            raise ServerAway(message, str(trouble), asked)
        wait = min(FIRST_WAIT * 2**self.waits, LONGEST_WAIT) * (0.5 + random.random())
        self.trying += wait  # a wait that the server asks for does not count as trying
        self.waits += 1
        yield Wait(max(wait, asked))


# ============================ pace and scheduling ============================


class Pace:
    """Controls how many requests are in flight to a server, and how many texts each carries. No clock, no I/O.

    One experiment at a time: change a setting, measure the throughput, and undo the change unless it pays. When
    nothing pays, rest for a while, or until the throughput changes by itself. Trouble halves both settings, as the
    decrease of AIMD does. By Little's law, texts/s are texts in flight / seconds per request.
    """

    MOST_IN_FLIGHT = 60  # as Windows can wait for; a server that gains from more gains from larger batches, too
    LARGEST_BATCH = 128  # texts; their answer is some 1.5 MB of JSON, and larger ones hardly gain any more
    TARGET = 1.0  # seconds; requests take one to two of these: Ctrl-C is quick, the bar moves, overhead is small
    KEEP = 0.96  # times the throughput that shorter requests must leave, or longer ones below the target
    GAIN = 1.03  # times the throughput that longer requests must bring; less is lost in the noise
    LEAP = 1.4  # the same for a load several times as large: beyond the noise, so that two answers tell
    PAUSE = 60.0  # seconds of rest; a round of experiments costs some 2 s of work
    # What may pay, most urgent first: name, times in flight, times the batch size, times the throughput that it must
    # leave or bring, and for requests of how many targets' time, from and up to, it is tried.
    EXPERIMENTS = (
        ("smaller requests", 1, 0.5, KEEP, 2, math.inf),
        ("fewer in flight", 0.5, 1, KEEP, 2, math.inf),  # or noise would let in more and more
        ("more of both", 2, 4, LEAP, 0, 1.25),
        ("many more in flight", 4, 1, LEAP, 0, 2),
        ("more in flight", 2, 1, GAIN, 0, 2),
        ("larger requests", 1, 2, KEEP, 0, 1),
        ("larger requests", 1, 2, GAIN, 1, 2),
    )

    def __init__(
        self, in_flight: int | None, batch_size: int | None, timeout: float = 300.0, most: int = MOST_IN_FLIGHT
    ) -> None:
        """A number fixes that setting, None leaves it to Pace, up to `most` in flight. `timeout` is in seconds."""
        self.in_flight = in_flight or 2  # one being computed, one waiting: the shortest pipe without a gap
        self.batch_size = batch_size or 4  # a few seconds' work on the slowest laptop
        self.reason = "start"
        self._fewest, self._most = in_flight or 1, in_flight or most
        self._smallest, self._largest = batch_size or 1, batch_size or self.LARGEST_BATCH
        self._target = min(self.TARGET, timeout / 60)
        self._troubled = 0.0  # share of the answers that speak of trouble, a moving average
        self._search = self._find_settings()
        next(self._search)

    def __str__(self) -> str:
        """The settings and their reason, for the log."""
        return f"{self.in_flight} in flight, batches of {self.batch_size}: {self.reason}"

    def observe(self, texts: int, seconds: float, outcome: str, load: int) -> None:
        """Take in the end of a request: ok, overloaded, timeout, or failed for another reason.

        `load` is the number of texts that were in flight when it was sent, its own included.
        """
        full = self.in_flight * self.batch_size
        if outcome == "failed" or load > full:
            return  # no sign of overload, or sent before the last reduction
        weight = 0.25 if outcome == "timeout" else 0.05  # so 3 in a row are trouble, or 14 refusals; not one in five
        self._troubled += ((outcome != "ok") - self._troubled) * weight
        if self._troubled > 0.5:
            self._troubled = 0.0
            self._search.send((0, seconds))
        elif outcome == "ok" and load >= 0.75 * full and 0.75 <= texts / self.batch_size <= 1:  # by today's settings
            self._search.send((load, max(seconds, 0.001)))

    def limit(self, max_texts: int) -> None:
        """Limit requests to `max_texts` texts."""
        if max_texts < self._largest:
            self._largest = max_texts
            self._change(self.in_flight, self.batch_size, f"no more than {max_texts} texts are taken")

    def _change(self, in_flight: float, batch_size: float, reason: str) -> bool:
        """Change the settings within their bounds; return whether that made a difference."""
        before = self.in_flight, self.batch_size
        self.in_flight = min(max(int(in_flight), self._fewest), self._most)
        self.batch_size = min(max(int(batch_size), self._smallest), self._largest)
        if before == (self.in_flight, self.batch_size):
            return False
        self.reason = f"{reason} with {before[0]} x {before[1]}"
        return True

    def _find_settings(self) -> Generator[None, tuple[int, float], None]:
        """Experiment until nothing pays any more, rest, and begin again. Takes what `_measure` takes."""
        rate, seconds = yield from self._measure(2)
        while True:
            untried = list(self.EXPERIMENTS)  # since the settings changed
            while rate and untried:
                name, more, larger, gain, least, most = untried.pop(0)
                before = self.in_flight, self.batch_size
                why = f"trying {name}: {rate:.1f} texts/s, {seconds:.1f} s per request"
                if least <= seconds / self._target < most and self._change(before[0] * more, before[1] * larger, why):
                    tried = yield from self._measure(2 * (gain == self.LEAP))
                    if tried[0] >= gain * rate:
                        (rate, seconds), untried = tried, list(self.EXPERIMENTS)
                    else:
                        self._change(*before, f"{name} did not pay")
                        rate, seconds = yield from self._measure()  # anew: the server may have changed
            settled, rested = rate, 0.0
            while rested < self.PAUSE and settled / self.LEAP < rate < settled * self.LEAP:
                rate, seconds = yield from self._measure()
                rested += seconds  # at least: every place in flight has answered
            while not rate:
                self._change(self.in_flight / 2, self.batch_size / 2, "requests are refused or time out")
                rate, seconds = yield from self._measure()

    def _measure(self, answers: int = 0) -> Generator[None, tuple[int, float], tuple[float, float]]:
        """Take load and seconds of the next answers; return texts/s and seconds per request. 0: there is trouble."""
        texts, total, count = 0, 0.0, 0
        while count < (answers or max(16, self.in_flight)):  # 16 even out the noise of single answers
            load, seconds = yield
            if not load:
                return 0.0, seconds
            texts, total, count = texts + load, total + seconds, count + 1
        return texts / total, total / count


NEVER = float("inf")  # a moment that does not come


class ServerState:
    """One server of a run: its profile, its pace and its work in flight. Moments are seconds of any one clock.

    `status` is up; away, until a handshake with it succeeds; or barred, for the rest of the run.
    """

    WEIGHT = 0.3  # of the last answer in the rate

    def __init__(self, index: int, protocol: Protocol, pace: Pace) -> None:
        self.index, self.protocol, self.pace = index, protocol, pace
        self.profile = ServerProfile()
        self.status, self.reason = "up", ""  # `reason` says why it is not up
        self.in_flight = self.texts = 0  # batches and texts in flight
        self.rate = 0.0  # texts/s; 0: not known
        self.embedded = 0  # texts
        self.since = 0.0  # when it went away
        self.trying = 0.0  # since when no try has succeeded
        self.next_probe = NEVER  # when a handshake is due; never during a handshake, or while none is needed

    def observe(self, exchange: Exchange, load: int) -> None:
        """Take in the end of a request; Little's law gives the rate, as it does in Pace."""
        self.pace.observe(exchange.texts, exchange.seconds, exchange.outcome, load)
        if exchange.outcome == "ok":
            self.embedded += exchange.texts
            rate = load / max(exchange.seconds, 0.001)
            self.rate += (rate - self.rate) * (self.WEIGHT if self.rate else 1.0)

    def learn(self, changes: dict[str, int]) -> None:
        """Update the profile; if two batches find different limits at the same time, the lower one counts."""
        limits = {name: min(n, getattr(self.profile, name)) for name, n in changes.items() if name != "long_from"}
        self.profile = self.profile._replace(**{**changes, **limits})
        self.pace.limit(self.profile.most_texts)


class Batch(NamedTuple):
    """Texts that go to a server together, or None for a handshake.

    `load` is the number of texts in flight to the server when it was sent, its own included. `rows` are the rows of the
    texts, if they come from a table. `long`: the only text is known to be too long; None: texts that are too long are
    cut or split at once.
    """

    server: ServerState
    texts: list[str] | None
    movable: bool
    rows: Sequence[Row] = ()
    load: int = 0
    long: bool | None = None

    @property
    def task(self) -> Task:
        """What a conversation needs to know."""
        return self.server.index, self.server.profile, self.texts, self.movable, self.long


class Scheduler:
    """Decides which server gets the next batch, how large it is, and which servers are away. No clock, no I/O.

    A server with room gets a batch of its pace's size. Towards the end of the table it gets half of its share of the
    remaining rows, by its speed, so that all servers finish at nearly the same moment.
    """

    SMALLEST = 8  # the last batches are at most so many times smaller than the pace's: each has its overhead
    UNKNOWN = 4  # the first batches are so many times smaller, until the server has answered
    PROBE, LATE = 0.25, 8  # a server is probed PROBE seconds after it went, then at intervals of 1/LATE of its absence
    MOVES = 3  # servers that may fail to do a batch; the next one must find out which text is at fault

    def __init__(self, settings: Settings, protocols: Sequence[Protocol]) -> None:
        """Give each server its own pace and its share of the requests in flight."""
        fixed, many = settings.concurrent, len(protocols)
        allowed = min(Pace.MOST_IN_FLIGHT, most_in_flight(settings.engine)) // many
        self.servers: list[ServerState] = []
        for index, protocol in enumerate(protocols):
            in_flight = fixed and max(1, fixed // many + (index < fixed % many))
            pace = Pace(in_flight, settings.batch_size, settings.timeout, max(1, allowed))
            self.servers.append(ServerState(index, protocol, pace))
        self.most = fixed or sys.maxsize  # requests in flight to all servers together
        self.accept_drift = settings.accept_drift
        self.alone = many == 1  # then there is nobody to take over its work
        self.returned: list[Row] = []  # that servers have failed to do
        self.long: list[Row] = []  # that are too long: each gets a batch of its own
        self.moves = Counter[Any]()  # how many servers have failed to do a row, by its key

    @property
    def up(self) -> list[ServerState]:
        """The servers that can be used now."""
        return [server for server in self.servers if server.status == "up"]

    @property
    def profile(self) -> ServerProfile:
        """The profile of a server that tells its model's digest, or at least has answered, with the versions of all."""
        told = max((server.profile for server in self.servers), key=operator.itemgetter(1, 0))  # digest, sample
        return told._replace(version=" + ".join(sorted({server.profile.version for server in self.up})))

    def choose(self, left: Callable[[], int]) -> tuple[ServerState, int] | None:
        """Return the server for the next batch and its size, or None if there is room nowhere.

        `left` returns how many rows have no answer yet, in flight or not, as far as is known.
        """
        up, in_flight = self.up, sum(server.in_flight for server in self.servers)
        room = [server for server in up if server.in_flight < server.pace.in_flight]
        if not room or in_flight >= self.most:
            return None
        if len(up) == 1:
            return up[0], up[0].pace.batch_size
        if new := [server for server in room if not server.rate]:
            return new[0], -(-new[0].pace.batch_size // self.UNKNOWN)
        rate = sum(server.rate for server in up)
        seconds = (max(left(), 0) or sys.maxsize) / rate  # until all are done at one moment
        for server in sorted(room, key=lambda server: (server.texts + 1) / server.rate):  # the soonest idle first
            most, share = server.pace.batch_size, seconds * server.rate - server.texts
            size = int(min(most, max(-(-most // self.SMALLEST), share / 2)))
            if share >= size / 2 or not in_flight:  # otherwise others are done before it would be
                return server, size
        return None

    def launch(self, server: ServerState, rows: list[Row], long: bool = False) -> Batch:
        """Return a batch that counts as in flight."""
        server.in_flight += 1
        server.texts += len(rows)
        movable = not self.alone and max(self.moves[row.key] for row in rows) < self.MOVES
        return Batch(server, [row.text for row in rows], movable, rows, server.texts, long)

    def land(self, batch: Batch) -> None:
        """Count a batch as no longer in flight."""
        if batch.rows:
            batch.server.in_flight -= 1
            batch.server.texts -= len(batch.rows)

    def lose(self, batch: Batch, stop: Stop, now: float) -> str:
        """Take a failed batch back and mark its server as away or barred; return the news for the log."""
        server, was = batch.server, batch.server.status
        self.returned += batch.rows
        self.moves.update(row.key for row in batch.rows)
        if was == "barred":
            return ""
        if was == "up":
            server.since = server.trying = now
        if not isinstance(stop, ServerAway):
            server.status, server.reason, server.next_probe = "barred", stop.message, NEVER
            return f"{stop.message} The other servers do its work."
        server.status, server.reason = "away", stop.reason or stop.message
        server.profile = server.profile._replace(family=0)
        if stop.retry_after:
            server.trying = now + stop.retry_after  # a wait that the server asks for does not count as trying
        if was == "up" or not batch.rows:
            server.next_probe = now + max(self.PROBE, (now - server.since) / self.LATE, stop.retry_after)
        away = f"{server.protocol.address} is away ({server.reason}); the other servers do its work"
        return away if was == "up" else ""

    def probes(self, now: float) -> list[Batch]:
        """Return the handshakes that are due with servers that are away."""
        due = [server for server in self.servers if server.next_probe <= now]
        for server in due:
            server.next_probe = NEVER
        return [Batch(server, None, movable=True) for server in due]

    def greet(self, server: ServerState, profile: ServerProfile, now: float) -> str:
        """Take a server into service after a handshake, and return the news; raise Stop if its vectors do not fit.

        They must be as they were before, and as the others' are. The model's digest tells; where it is not told, the
        name alone proves nothing, and the vectors of the known-good text do.
        """
        address, model = server.protocol.address, server.protocol.model
        for other in self.servers:
            known, its = other.profile, "it did before" if other is server else other.protocol.address
            alike = cosine(known.sample, profile.sample) if known.dimensions == profile.dimensions else 0.0
            is_same = known.digest == profile.digest or known.weights == profile.weights != ""
            if known.digest and profile.digest and not is_same:
                raise Stop(
                    f'{address} has another model "{model}" ('
                    f"{short_digest(profile.digest)}) than {its} ({short_digest(known.digest)}). "
                    f'Fetch the same one on both with "ollama pull {model}", or leave out one --server.'
                )
            if known.sample and not alike >= ALIKE and not (alike and self.accept_drift):
                raise Stop(
                    f"{address} gives other vectors than {its} (of {profile.dimensions} and {known.dimensions} "
                    f"dimensions, with cosine {alike:.3f} for the same text; {ALIKE} or more is usual). It may hold "
                    f'another version of "{model}". Leave out one --server, or give --accept-drift.'
                )
        server.profile = profile
        server.pace.limit(profile.most_texts)
        was, server.status = server.status, "up"
        return f"{address} is back after {now - server.since:.1f} s" if was != "up" else ""

    def given_up(self, now: float) -> Stop | None:
        """Return the error that ends the run if every server is barred or has been away for PATIENCE seconds."""
        if any(s.status == "up" or (s.status == "away" and now - s.trying < PATIENCE) for s in self.servers):
            return None
        said = "; ".join(f"{s.protocol.address} since {now - s.since:.0f} s: {s.reason}" for s in self.servers)
        return Stop(f"No server is left that gives good answers ({said}). Run the same command again when one does.")

    def shares(self, elapsed: float) -> list[str]:
        """Return a line for the log about each server's work in `elapsed` seconds."""
        return [
            f"{s.protocol.address}: {counted(s.embedded, 'text')}, {s.embedded / max(elapsed, 0.001):.1f} texts/s; "
            f"at the end {s.pace}"
            for s in self.servers
        ]


SPARE_FILES = 40  # open files beside those of an engine


def most_in_flight(engine: str) -> int:
    """Return how many requests the system lets an engine have in flight."""
    if os.name == "nt":
        return 60 if engine == "process" else sys.maxsize  # Windows waits for 63 handles at once
    files = os.sysconf("SC_OPEN_MAX") % sys.maxsize  # at one time; 256 on macOS, -1 if there is no limit
    # A worker takes three: its pipe, and two by which multiprocessing knows it. A connection takes one.
    return max((files - SPARE_FILES) // (3 if engine == "process" else 1), 1)


# ============================ engines ============================
# An engine keeps batches in flight: submit() starts one, wait() returns events. The engines differ only in where a
# batch's conversation runs: as a task of one event loop, or in a worker process.

GRACE = 10.0  # seconds for the requests in flight when the run is to stop
# The longest wait: an hour, or on Windows, which runs a signal's handler only afterwards, a tenth of a second.
LONGEST_SLEEP = 0.1 if os.name == "nt" else 3600.0


# ---- connections ----


def describe(error: Exception) -> str:
    """Return a network or file error in words."""
    name = type(error).__name__  # of errors whose modules need not be loaded
    if name == "gaierror":
        return "the host's name cannot be resolved"
    if name == "SSLCertVerificationError":
        said = str(getattr(error, "verify_message", error)).rstrip(".")
        return f"its certificate is not accepted: {said}; if it is of your own authority, give --ca-file FILE"
    if name == "SSLError":
        return f"TLS failed, does the server speak http? {getattr(error, 'reason', None) or error}"
    if isinstance(error, EOFError):
        return "the connection was closed without an answer"
    if isinstance(error, ConnectionRefusedError):  # for which the systems have different words
        return "connection refused"
    text = str(error) or name
    # asyncio puts its own words around the number that says it all. Windows' numbers have words of their own.
    if found := re.search(r"\[(Errno|WinError) (\d+)\] ([^,:[]*)", text):
        text = os.strerror(int(found[2])) if found[1] == "Errno" else found[3]
    return text[:1].lower() + text[1:]


@functools.lru_cache(None)
def tls_context(ca_file: str) -> Any:
    """Return the TLS context, with the roots in a file or the system's; raise UsageError for a wrong file.

    There is one for the whole process, because loading the roots takes 10 to 20 ms.
    """
    import ssl

    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:
        problem = "it holds no certificate" if isinstance(error, ssl.SSLError) else describe(error)
        raise UsageError(
            f"--ca-file {ca_file} cannot be used: {problem}. Give a file of certificates as PEM."
        ) from None


CONNECT_SECONDS = 6.0  # allow for two lost packets, or a name server that is down: resolvers ask the next after 5 s
STREAM_BYTES = 1 << 22  # of an answer that asyncio buffers before it pauses reading; answers are seldom longer


class Connection:
    """A kept connection by asyncio streams, with as much HTTP/1.1 as a client of an API needs (RFC 9112)."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.reader, self.writer = cast(Any, None), cast(Any, None)  # None if there is no connection
        # Only addresses of this family are tried, 0 for all: on Windows, one that refuses costs two seconds.
        self.family = 0

    async def exchange(self, request: Request) -> Response:
        """Return the outcome of a request; network errors become a Response of status 0.

        A kept connection that the server has closed is replaced, once: embedding is idempotent.
        """
        import asyncio

        endpoint, started, kept = self.endpoint, time.monotonic(), bool(self.writer)
        while True:
            step, seconds = "connection", CONNECT_SECONDS
            try:
                if not self.writer:
                    context = tls_context(endpoint.ca_file) if endpoint.scheme == "https" else None
                    opening = asyncio.open_connection(
                        endpoint.host, endpoint.port, ssl=context, limit=STREAM_BYTES, family=self.family
                    )
                    self.family = 0  # if it fails, the next try is for all
                    self.reader, self.writer = await asyncio.wait_for(opening, seconds)
                    self.family = self.writer.get_extra_info("socket").family
                step, seconds = "answer", request.timeout
                response = await asyncio.wait_for(self.send(request), seconds)
                return response._replace(seconds=time.monotonic() - started, family=self.family)
            except Exception as error:
                self.close()
                if kept and isinstance(error, (ConnectionError, EOFError)):
                    kept = False
                    continue
                late = isinstance(error, (TimeoutError, asyncio.TimeoutError))  # not related before Python 3.11
                reason = f"no {step} within {seconds:g} s" if late else endpoint.hide(describe(error))[:200]
                is_busy = late and step == "answer"  # only a server that was reached may be busy with the request
                return Response(0, b"", time.monotonic() - started, reason=reason, timed_out=is_busy)

    async def send(self, request: Request) -> Response:
        """Return the response to a request.

        Raises ConnectionError or EOFError if no answer began, another OSError if it broke off.
        """
        import asyncio

        endpoint, body, head = self.endpoint, request.body, b""
        headers = {
            "Host": endpoint.shown.split("/")[2],
            "User-Agent": f"embedgen/{__version__}",
            "Accept": "application/json",
            "Authorization": endpoint.authorization,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)) if body else "",
        }
        lines = [f"{'POST' if body else 'GET'} {endpoint.path}{request.path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers.items() if value]
        self.writer.write("\r\n".join([*lines, "\r\n"]).encode("latin-1") + body)
        await self.writer.drain()
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            return await self.receive(head)
        except (EOFError, ConnectionError, ValueError, asyncio.LimitOverrunError) as error:
            if head:
                raise OSError("the answer was cut off") from None
            if began := getattr(error, "partial", b""):
                raise OSError(f"malformed answer: {began!r}") from None
            raise

    async def receive(self, head: bytes) -> Response:
        """Return the response that begins with these headers; raise EOFError or ValueError if it is not whole."""
        found = re.match(rb"\s*HTTP/1\.\d (\d{3})\b", head)
        if not found:
            raise OSError(f"malformed answer: {head[:100]!r}")
        fields = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        size = headers.get("content-length")
        chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        body = await (self.chunks() if chunked else self.reader.readexactly(int(size)) if size else self.reader.read())
        if "close" in headers.get("connection", "").lower() or not (chunked or size):
            self.close()
        return Response(int(found[1]), body, headers=headers)

    async def chunks(self) -> bytes:
        """Return a chunked body; raise EOFError or ValueError if it is not whole."""
        chunks = []
        while size := int((await self.reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            chunks.append(await self.reader.readexactly(size))
            await self.reader.readexactly(2)
        while await self.reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailers
        return b"".join(chunks)

    def close(self) -> None:
        """Drop the connection, if there is one."""
        if self.writer:
            self.writer.transport.abort()  # nothing is left to be sent
            self.writer = None


# ---- the two engines ----

# An event of a batch: any number of the first three; then its answers, a handshake's profile, or an exception.
Event = Union[Exchange, Learned, str, list[Answer], ServerProfile, Exception]
PROGRESS = (Exchange, Learned, str)
Events = list[tuple["Batch", Event]]
# A server's index, and what embed_batch needs to know for a batch.
Task = tuple[int, ServerProfile, Union[list[str], None], bool, Union[bool, None]]


class Conversations:
    """Conversations with servers, as tasks of an event loop."""

    def __init__(self, protocols: Sequence[Protocol]) -> None:
        import asyncio

        self.protocols, self.loop = protocols, asyncio.new_event_loop()
        # It would print what nobody waits for: tasks that a second signal breaks off, connections reset on Windows.
        self.loop.set_exception_handler(lambda loop, context: None)
        self.halted: Any = self.loop.create_future()  # done when nothing more is to be sent
        self.idle: list[list[Connection]] = [[] for _ in protocols]

    async def converse(self, task: Task, report: Callable[[Event], None]) -> None:
        """Carry out a task over a connection of its own, and report its events; after a halt, [] for its answers."""
        import asyncio
        import traceback

        index, profile, texts, movable, long = task
        protocol, idle = self.protocols[index], self.idle[index]
        connection = idle.pop() if idle else Connection(protocol.endpoint)
        connection.family = profile.family
        conversation: Steps[Any] = embed_batch(protocol, profile, texts, movable, long)
        response: Response | None = None
        try:
            while True:
                step = conversation.send(response)
                response = None
                if not isinstance(step, (Request, Wait)):
                    report(step)
                elif self.halted.done() and getattr(step, "body", True):  # but a question about an answer may be asked
                    return report([])
                elif isinstance(step, Wait):
                    await asyncio.wait({self.halted}, timeout=step.seconds)
                else:
                    response = await connection.exchange(step)
        except StopIteration as end:
            report(end.value)
        except Stop as stop:
            report(stop)
        except Exception as error:  # in a form that a pipe can carry
            report(RuntimeError(f"{error!r} in a conversation with a server\n{traceback.format_exc()}"))
        finally:
            idle.append(connection)


class AsyncEngine(Conversations):
    """Conversations in this process, which go on whenever something is waited for."""

    def __init__(self, scheduler: Scheduler, interrupt: Interrupt) -> None:
        super().__init__([server.protocol for server in scheduler.servers])
        self.scheduler, self.interrupt = scheduler, interrupt
        signal.set_wakeup_fd(-1)  # the loop of Windows sets one, and says so if it cannot be written
        # The loop's clock stops while the run reads or saves, so that an answer that arrives meanwhile is not late.
        self.stopped, self.stood_still = time.monotonic(), 0.0  # since when, and for how long in all
        cast(Any, self.loop).time = lambda: time.monotonic() - self.stood_still
        self.events: Events = []
        interrupt.wake = functools.partial(self.loop.call_soon_threadsafe, self.loop.stop)

    def submit(self, batch: Batch) -> None:
        """Send a batch on its way."""

        def report(event: Event) -> None:
            self.events.append((batch, event))
            self.loop.stop()

        self.loop.create_task(self.converse(batch.task, report))

    def wait(self, seconds: float) -> Events:
        """Return the events since the last call; none after `seconds` or a signal."""
        self.stood_still += time.monotonic() - self.stopped
        timer = self.loop.call_later(seconds, self.loop.stop)
        self.loop.run_forever()
        timer.cancel()
        self.stopped = time.monotonic()
        events, self.events = self.events, []
        return events

    def halt(self) -> None:
        """See to it that conversations send nothing more."""
        self.halted.set_result(None)

    def close(self) -> None:
        """Cancel the batches in flight and release all resources."""
        import asyncio

        tasks: Any = True
        while tasks:
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            for connection in itertools.chain(*self.idle):
                connection.close()
            self.loop.stop()  # after one turn, which ends what was cancelled and closed
            self.loop.run_forever()
        self.loop.close()


# Forked workers share the parent's memory, which makes ten of them cost little; where forking
# is unsafe (macOS) or absent (Windows) they are spawned.
START_METHOD = "fork" if sys.platform.startswith("linux") else "spawn"
DEATHS_IN_A_ROW = 20  # workers that die, or do not start, without one batch done between; then the run is given up


def start_worker(protocols: list[Protocol]) -> Any:
    """Return the parent's end of a pipe to a new worker process."""
    import multiprocessing

    context: Any = multiprocessing.get_context(START_METHOD)
    pipe, child = context.Pipe()
    # A forked child inherits the parent's end. As long as it is open there, the worker would not see that the parent
    # has died. Workers that are forked later have it too; they end before this one.
    inherited = pipe if START_METHOD == "fork" else None
    with signals_held_back():
        context.Process(target=work, args=(child, protocols, inherited), daemon=True).start()
    child.close()
    return pipe


def signals_held_back() -> contextlib.ExitStack:
    """Hold signals back while a process starts: one would end the child with a traceback before it ignores them."""
    release = contextlib.ExitStack()
    if os.name == "nt":  # where a child inherits that Ctrl-C is ignored
        import ctypes

        ignore_control_c = cast(Any, ctypes).windll.kernel32.SetConsoleCtrlHandler
        ignore_control_c(None, True)
        release.callback(ignore_control_c, None, False)
        return release
    if START_METHOD == "spawn":
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # or the first spawn would start it, which lets signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    release.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
    return release


def work(pipe: Any, protocols: list[Protocol], inherited: Any) -> None:
    """Run a worker process: carry out the tasks from the pipe, or halt at None, and send their events back."""
    # Ctrl-C in a terminal, and systemd, signal the whole group; the parent alone decides what ends.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if inherited:
        inherited.close()
    conversations = Conversations(protocols)
    loop, halted = conversations.loop, conversations.halted
    threading.Thread(target=loop.run_forever, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = pipe.recv()
            if task:
                conversation = conversations.converse(task, pipe.send)
                loop.call_soon_threadsafe(loop.create_task, conversation)
            else:
                loop.call_soon_threadsafe(halted.set_result, None)
    os._exit(0)  # the parent has closed the pipe, or died: at once, even in the middle of a request


class ProcessEngine:
    """Conversations in worker processes, which are started as they are needed and replaced if they die."""

    def __init__(self, scheduler: Scheduler, interrupt: Interrupt) -> None:
        import asyncio  # noqa: F401 - forked workers share what is loaded now
        import multiprocessing.connection

        self.scheduler, self.interrupt, self.wait_for = scheduler, interrupt, multiprocessing.connection.wait
        self.workers: dict[Any, Batch | None] = {}  # each worker's pipe, and the batch that it has
        self.deaths = 0
        self.signalled, signaller = multiprocessing.Pipe(duplex=False)
        interrupt.wake = functools.partial(signaller.send, None)

    def submit(self, batch: Batch) -> None:
        """Send a batch on its way."""
        pipe = next((pipe for pipe, its_batch in self.workers.items() if its_batch is None), None)
        while pipe is None:
            try:
                pipe = start_worker([server.protocol for server in self.scheduler.servers])
            except OSError as error:  # which may pass, as when memory is short for a moment
                self.deaths += 1
                if self.deaths > DEATHS_IN_A_ROW:
                    problem = f"no worker process can be started ({describe(error)})"
                    raise Stop(f"{problem}. Give fewer --workers.") from error
                time.sleep(RETRY_SECONDS)
        self.workers[pipe] = batch
        self.send(pipe, batch.task)

    def send(self, pipe: Any, task: Task | None) -> None:
        """Send a worker a task, or None to halt. If it is dead, that is noticed when it is waited for."""
        with contextlib.suppress(OSError):
            pipe.send(task)

    def wait(self, seconds: float) -> Events:
        """Return the events since the last call; none after `seconds` or a signal."""
        events: Events = []
        busy = [pipe for pipe, batch in self.workers.items() if batch]
        with contextlib.suppress(InterruptedError):  # of Windows, after the handler has run
            for ready in self.wait_for([*busy, self.signalled], max(seconds, 0.0)):
                if ready is self.signalled:
                    self.signalled.recv()
                else:
                    events += self.receive(ready)
        return events

    def receive(self, pipe: Any) -> Events:
        """Return the next event of a worker; if it has died, another gets its batch."""
        batch = self.workers[pipe]
        assert batch
        try:
            event: Event = pipe.recv()
        except (EOFError, OSError):
            del self.workers[pipe]
            self.deaths += 1
            if self.interrupt.code:
                return [(batch, [])]
            if self.deaths > DEATHS_IN_A_ROW:
                raise Stop("worker processes keep dying. Is memory short? Give fewer --workers.") from None
            self.submit(batch)
            return []
        if not isinstance(event, PROGRESS):
            self.workers[pipe], self.deaths = None, 0
        return [(batch, event)]

    def halt(self) -> None:
        """See to it that conversations send nothing more."""
        for pipe in self.workers:
            self.send(pipe, None)

    def close(self) -> None:
        """End all workers, whatever they do."""
        kill_workers()


def kill_workers() -> None:
    """Kill the worker processes: Python waits for them at its exit, and they ignore its signals."""
    multiprocessing: Any = sys.modules.get("multiprocessing")
    for worker in multiprocessing.active_children() if multiprocessing else []:
        worker.kill()
        worker.join()


Engine = Union[AsyncEngine, ProcessEngine]


ENGINES: dict[str, type[Engine]] = {"async": AsyncEngine, "process": ProcessEngine}


# ---- the loop that both engines share ----


def embed_on_all(
    engine: Engine, texts: list[str] | None, show_waiting: Callable[[], None] = lambda: None
) -> list[tuple[ServerState, Any, float]]:
    """Return each server that is up, with its answers for the same texts, and the seconds they took.

    Without texts, the answer is a handshake's profile. A server that is away is left to the run, unless it is the only
    one; other exceptions are raised, and Stop if no server can be reached. `show_waiting` is called while all are
    silent.
    """
    scheduler, answers, began = engine.scheduler, dict[int, tuple[Event, float]](), time.monotonic()
    waiting = len(scheduler.up)
    for server in scheduler.up:
        engine.submit(Batch(server, texts, movable=not scheduler.alone))
    while waiting:
        if not (events := engine.wait(min(PATIENT_SECONDS, LONGEST_SLEEP))):
            show_waiting()
        for batch, event in events:
            server = batch.server
            waiting -= not isinstance(event, PROGRESS)
            if isinstance(event, ServerAway) and batch.movable:
                server.profile = server.profile._replace(note=scheduler.lose(batch, event, time.monotonic()))
            elif isinstance(event, Exception):
                raise event
            else:
                answers[server.index] = event, time.monotonic() - began
    if not scheduler.up:
        places = ", ".join(f"{server.protocol.address} ({server.reason})" for server in scheduler.servers)
        raise Stop(f"cannot reach any of the servers: {places}. Start one, or give another --server URL.")
    return [(server, *answers[server.index]) for server in scheduler.up]


def embed_rows(engine: Engine, run: Run) -> None:
    """Embed the rows of a run, which gets the answers in any order, and a turn after each event.

    After an interrupt or an exception, no more rows are taken, and the requests in flight get GRACE seconds; then the
    exception, if any, is raised.
    """
    scheduler, interrupt = engine.scheduler, engine.interrupt
    failure: Exception | None = None
    more, deadline = True, NEVER
    while True:
        run.turn()
        now = time.monotonic()
        if not (interrupt.code or failure):
            more = submit_batches(engine, run)
            for probe in scheduler.probes(now):
                engine.submit(probe)
            failure = scheduler.given_up(now)
        if deadline == NEVER and (interrupt.code or failure):
            more, deadline = False, now + GRACE
            engine.halt()
        if now >= deadline or not (more or any(server.in_flight for server in scheduler.servers)):
            break
        moment = min([now + LONGEST_SLEEP, deadline, *(server.next_probe for server in scheduler.servers)])
        for batch, event in engine.wait(min(run.due(), moment - now)):
            try:
                handle(scheduler, run, batch, event)
            except Exception as error:
                failure = failure or error
            run.turn()
    if failure:
        raise failure


def submit_batches(engine: Engine, run: Run) -> bool:
    """Submit batches while there is room; return whether there may be more rows."""
    scheduler = engine.scheduler
    while choice := scheduler.choose(run.left):
        server, size = choice
        queue, size = (scheduler.long, 1) if scheduler.long else (scheduler.returned, size)
        rows, is_long = queue[:size] or run.next_rows(size), queue is scheduler.long
        del queue[:size]
        if not rows:
            return rows is not None
        engine.submit(scheduler.launch(server, rows, is_long))
    return True


def handle(scheduler: Scheduler, run: Run, batch: Batch, event: Event) -> None:
    """Handle an event of a batch; raise the exceptions that end the run."""
    server, news, now = batch.server, "", time.monotonic()
    if not isinstance(event, PROGRESS):
        scheduler.land(batch)
    if isinstance(event, Learned):
        server.learn(event.changes)
    elif isinstance(event, Exchange):
        server.observe(event, batch.load)
        run.log_event(server, event)
    elif isinstance(event, str):
        news = event
    elif isinstance(event, list) and server.status == "up":
        scheduler.long += [row for row, answer in zip(batch.rows, event) if answer == LATER]
        run.take([pair for pair in zip(batch.rows, event) if pair[1] != LATER])
    elif isinstance(event, list):  # it may have restarted with another model: the next handshake will show
        scheduler.returned += batch.rows
    else:
        try:
            if isinstance(event, Exception):
                raise event
            news = scheduler.greet(server, event, now)
        except Stop as stop:
            if not batch.movable:
                raise
            news = scheduler.lose(batch, stop, now)
    if news:
        run.log_event(server, news)


# =============================== files to load ===============================
# Cells are texts, "" for empty ones, until their column's type is known to hold them exactly. A file is read twice: for
# its columns, and to stage its rows in a temporary table, where the database finds types and checks cells.

STAGED = "embedgen_load"  # the temporary table, called f in statements
Cells = Iterator[tuple[int, dict[str, Any]]]  # each row's line, in a .json file its number, and its cells by column
UNSTORABLE = (  # characters that no database takes
    ("\0", "it has a NUL character"),
    ("[\udc80-\udcff]", "it is not UTF-8. Save the file as UTF-8"),  # Python's sign for a byte that is no UTF-8
    ("[\ud800-\udfff]", "it has half of a surrogate pair"),
)


class Written(str):
    """A cell that may be a number, exactly as it is written in the file; other cells are texts."""


ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")


class DataFile:
    """A file to load; the ending of its name tells how it is read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.ending = os.path.splitext(path.lower().removesuffix(".gz"))[1]
        if self.ending not in ENDINGS:
            raise UsageError(f"--load {path}: only {listed(ENDINGS)} files can be loaded, and each as .gz. Convert it.")
        self.unit = "object" if self.ending == ".json" else "line"  # json.load tells no line numbers

    def error(self, number: int, problem: str) -> UsageError:
        """Return the error for a row."""
        return UsageError(f"{self.path}, {self.unit} {number}: {problem}.")

    def rows(self) -> Cells:
        """Yield the rows, their cells as texts; the first column's name is "" if it holds row names of R or pandas."""
        import gzip
        import zlib

        try:
            with open(self.path, "rb") as file:
                start = file.read(4)
            if start.startswith((b"PK\3\4", b"\xff\xfe", b"\xfe\xff")):
                kind = "a zip archive or an Excel workbook" if start[:1] == b"P" else "encoded in UTF-16"
                raise UsageError(f"{self.path} is {kind}. Save it as CSV in UTF-8.")
            opened: Any = gzip.open if start.startswith(b"\x1f\x8b") else open
            with opened(self.path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
                for number, row in (self.read_json if "js" in self.ending else self.read_csv)(text):
                    yield number, {self.cell(number, name, name): self.cell(number, name, row[name]) for name in row}
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"--load {self.path}: {getattr(error, 'strerror', None) or error}. Check it.") from None

    def cell(self, number: int, column: str, value: Any) -> str:
        """Return a value as the text of its cell; UsageError if a database cannot hold it."""
        try:
            text = cell_text(value)
            for characters, problem in UNSTORABLE:
                if re.search(characters, text):
                    raise ValueError(problem)
            return text
        except (ValueError, RecursionError) as error:  # NaN, for one
            raise self.error(number, f"column {column!r} cannot be loaded: {error}") from None

    def read_csv(self, text: TextIO) -> Cells:
        """Yield the rows of a file with a header, its fields separated by comma, semicolon, bar or tab."""
        csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a text may have
        first = re.sub(r'"[^"]*"', "", next(filter(str.strip, text), ""))
        separator = "\t" if self.ending == ".tsv" else max(",;|\t", key=first.count)
        quoting: Any = csv.QUOTE_NONE if self.ending == ".tsv" and self.is_dump(text) else csv.QUOTE_MINIMAL
        null = r"\N" if separator == "\t" else ""  # of MySQL, Postgres and IMDb
        text.seek(0)
        header: list[str] = []
        line = 1
        reader = csv.reader(text, delimiter=separator, quoting=quoting, strict=True)
        try:
            for fields in reader:
                is_unclosed = separator == "\t" and any("\t" in field and "\n" in field for field in fields)
                if any(fields) and not header:
                    header = self.header(line, fields)
                elif any(fields):  # spreadsheets end in empty rows
                    if len(fields) != len(header) or is_unclosed:
                        problem = f"{len(fields)} fields, but the header has {len(header)}; or a quote is not closed"
                        raise self.error(line, problem)
                    yield line, {name: Written("" if field == null else field) for name, field in zip(header, fields)}
                line = reader.line_num + 1  # where the next row begins; one with quoted newlines has several lines
        except csv.Error as error:
            raise self.error(line, str(error)) from None

    def is_dump(self, text: TextIO) -> bool:
        """Whether quotes in a .tsv file are part of its values, as in dumps of databases; UsageError if unclear."""
        width = unclear = 0
        is_dump = False
        text.seek(0)
        for line, row in enumerate(text, 1):
            fields = row.rstrip("\r\n").split("\t")
            quotes = [field for field in fields if field.startswith('"')]
            width = width or len(fields)
            if (quotes and line == 1) or (row.strip() and len(fields) != width):
                return False  # a dump's header has no quotes, and its values have no tabs or line ends
            for field in quotes:
                unclear = unclear or line
                is_dump = is_dump or not re.fullmatch('"([^"]|"")*"', field)
        if unclear and not is_dump:
            raise self.error(unclear, "are the quotes around a value part of it? If not, rename the file to .csv")
        return True

    def header(self, line: int, fields: list[str]) -> list[str]:
        """Return the names of the columns, without the blanks around them; only the first may be ""."""
        names = [self.cell(line, name, name.strip()) for name in fields]
        for index, name in enumerate(names):
            problem = "has no name" if index and not name else "is there twice" if match(name, names[:index]) else ""
            if problem:
                hint = ". Remove the sep= line of Excel" if names[0].lower() == "sep=" else ""
                raise self.error(line, f"column {index + 1} of the header, {name!r}, {problem}: {fields}{hint}")
        return names

    def read_json(self, text: TextIO) -> Cells:
        """Yield objects: one to a line; or those of an array, or of an object's only array, as GeoJSON's features."""
        found: Iterable[tuple[int, Any]] = (
            (line, self.parse(value, line)) for line, value in enumerate(text, 1) if value.strip()
        )
        if self.ending == ".json":
            data = self.parse(text.read(), 1)
            lists = data.values() if isinstance(data, dict) else [data]
            arrays = [one for one in lists if isinstance(one, list) and one and isinstance(one[0], dict)]
            if len(arrays) != 1:
                raise UsageError(f"{self.path}, line 1: there are no rows. The file must hold one array of objects.")
            found = enumerate(arrays[0], 1)
        for number, value in found:
            if not isinstance(value, dict) or "" in value:
                raise self.error(number, "an object with a name for every value was expected")
            if value.get("type") == "Feature" and isinstance(value.get("properties"), dict):
                value.update(value.pop("properties"))  # of GeoJSON, beside id and geometry
            yield number, value

    def parse(self, text: str, line: int) -> Any:
        """Return the value of JSON that begins on a line; its numbers are Written, but NaN and Infinity float."""
        try:
            return json.loads(text, object_pairs_hook=unique, parse_int=Written, parse_float=Written)
        except (ValueError, RecursionError) as error:
            line += getattr(error, "lineno", 1) - 1
            problem = re.sub(r": line \d+ (.*) \(.*", r" at \1", str(error))
            raise UsageError(f"{self.path}, line {line}: not JSON: {problem}.") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; ValueError if it has a name twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"an object has a name twice: {listed(name for name, _ in pairs)}")
    return dict(pairs)


def cell_text(value: Any) -> str:
    """Return a value as the text of its cell: lists of plain values joined by ", ", all others as JSON."""
    if isinstance(value, list) and not any(item is None or isinstance(item, (list, dict)) for item in value):
        return ", ".join(map(cell_text, value))
    return value if isinstance(value, str) else "" if value is None else json_text(value)


def json_text(value: Any) -> str:
    """Return a value as JSON, with its numbers as they were written; ValueError for NaN."""
    if isinstance(value, list):
        return f"[{', '.join(map(json_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json_text(name)}: {json_text(item)}' for name, item in value.items())}}}"
    return value if isinstance(value, Written) else json.dumps(value, ensure_ascii=False, allow_nan=False)


def numeric_columns(file: DataFile) -> dict[str, bool | None]:
    """Return a file's columns, and whether each may be one of numbers, None if it is empty; reads the whole file."""
    found: dict[str, bool | None] = {}
    for _, row in file.rows():
        for column, cell in row.items():
            found.setdefault(column, None)
            if cell and found[column] is not False:
                found[column] = isinstance(cell, Written)
    if not found:
        raise UsageError(f"--load {file.path}: the file is empty, it has no rows. Check how it was made.")
    return found


def load(db: AnyDatabase, settings: Settings, path: str) -> dict[str, Any]:
    """Load a file into --table: all of its rows or, if this raises, none.

    Returns how many rows of the table have the file's values now, how many of the file a later one with the same key
    replaced, how many of the table had other values before, and sentences about these and what was made up.
    """
    try:
        return db.transaction(lambda: StagedFile(db, settings, DataFile(path)).insert())
    except RowsRefused as error:
        raise UsageError(f"--load {path}: {error.message}") from None


class StagedFile:
    """A file's rows in a temporary table, and the table they go to, created if need be; within a transaction."""

    def __init__(self, db: AnyDatabase, settings: Settings, file: DataFile) -> None:
        self.db, self.file, self.settings = db, file, settings
        self.notes: list[str] = []
        numeric = numeric_columns(file)
        unnamed = ("row" if match("id", numeric) else "id") if "" in numeric else ""
        if unnamed:
            self.notes.append(f'the first column of {file.path} has no name and is taken for the key, as "{unnamed}"')
        names = [db.cut(name or unnamed) for name in numeric]
        cells = [f"f.c{index}" for index in range(1, len(names) + 1)]
        texts = ", ".join(f"c{index} text" for index in range(len(names) + 1))
        db.execute(f"CREATE TEMP TABLE {STAGED} (line bigint, {texts})")
        rows = ([line, str(n), *map(row.get, numeric)] for n, (line, row) in enumerate(file.rows(), 1))
        db.fill(STAGED, len(names) + 2, rows)
        self.table = db.find_table(settings.table)  # `exists` stays as it is here: whether there was a table before
        if not self.table.exists:
            self.create(settings.id or unnamed, dict(zip(names, map(self.type_of, cells, numeric.values()))))
        self.described = db.columns(self.table)
        columns = [column_of(name, self.described, self.table.name) for name in names]
        self.cells = dict(zip(columns, cells))
        if len(self.cells) < len(names):
            raise UsageError(f'{file.path}: columns are one in "{self.table.name}": {listed(columns)}. Rename one.')
        self.key = key_column(settings.id, self.described, self.table.name)
        if self.key not in columns:
            self.number_rows()
        self.values = {column: self.value_sql(column, cell) for column, cell in self.cells.items()}

    def type_of(self, cell: str, is_numeric: bool | None) -> str:
        """Return the first type for a new column in which all its cells read back as they are written."""
        for kind in ("INTEGER", "REAL", "NUMERIC") if is_numeric else ():
            value = self.db.exact_sql(cell, self.db.type_name(kind))
            # A number without letters, unlike NaN.
            is_exact = f"CAST({value} AS text) = {cell} AND lower({cell}) = upper({cell})"
            # Ends at the first cell that is another, as the first of most columns of texts is.
            sql = f"SELECT 1 FROM {STAGED} AS f WHERE {cell} <> '' AND ({is_exact}) IS NOT TRUE LIMIT 1"
            if not self.db.execute(sql):
                return kind
        return "TEXT"

    def create(self, key: str, types: dict[str, str]) -> None:
        """Create the table for the columns of the file, with the key given, or id, which is made if it is missing."""
        key = column_of(key, types, self.file.path) if key else match("id", types) or "id"
        if key not in types:
            types = {key: "INTEGER", **types}
        if types[key] != "INTEGER":
            types[key] = "TEXT NOT NULL"  # never a floating-point number
        columns = ", ".join(f"{quoted(name)} {self.db.type_name(kind)}" for name, kind in types.items())
        self.db.execute(f"CREATE TABLE {self.table.sql} ({columns}, PRIMARY KEY ({quoted(key)}))")

    def number_rows(self) -> None:
        """Make the number of each row its key; UsageError if a column could be the key."""
        path, key = self.file.path, self.key
        if not self.table.exists:
            counts = ", ".join(f"count(*) = count(DISTINCT NULLIF({cell}, ''))" for cell in self.cells.values())
            (are_unique,) = self.db.execute(f"SELECT {counts} FROM {STAGED} AS f")
            if unique := list(itertools.compress(self.cells, are_unique)):
                raise UsageError(f"{path} has no column id. Say which is the key, with --id COLUMN: {listed(unique)}.")
        elif not (self.settings.force and self.described.keys() == {key, *self.cells}):
            raise UsageError(
                f'{path} has no column "{key}", the key of "{self.table.name}". If the table was made of such a file, '
                "replace all of its rows with --force."
            )
        # The table may have been made of a longer file.
        self.db.execute(f"DELETE FROM {self.table.sql} WHERE {quoted(key)} > (SELECT count(*) FROM {STAGED})")
        self.cells[key] = "f.c0"
        self.notes.append(f'{path} has no key: its rows are numbered from 1, in the column "{key}"')

    def value_sql(self, column: str, cell: str) -> str:
        """Return the SQL of a cell's value in its column, NULL if the cell is empty.

        Raise UsageError for a row without a key, and for a cell that its column cannot hold exactly.
        """
        kind = self.described[column].type
        value = self.db.exact_sql(f"NULLIF({cell}, '')", kind)
        wrong = f"{value} IS NULL" + ("" if column == self.key else f" AND {cell} <> ''")
        sql = f"SELECT line, {cell} FROM {STAGED} AS f WHERE {wrong} ORDER BY line LIMIT 1"
        for line, text in self.db.execute(sql):
            problem = f"{text!r} cannot be stored exactly as {kind}. Change it, or the column's type"
            raise self.file.error(line, f'column "{column}": {problem if text else "the key has no value"}')
        return value

    def count_rows(self) -> tuple[int, int]:
        """Return how many rows there are, and how many have a later one of the same key; UsageError if most have."""
        key, value = self.cells[self.key], self.values[self.key]
        ((rows, repeated, cell, before, line),) = self.db.execute(f"""
            WITH k AS (
                SELECT {key} AS cell, line, lag(line) OVER (PARTITION BY {value} ORDER BY line) AS before
                FROM {STAGED} AS f
            ), one AS (SELECT * FROM k WHERE before IS NOT NULL ORDER BY line LIMIT 1)
            SELECT count(*), count(k.before), one.cell, one.before, one.line
            FROM k LEFT JOIN one ON 1 = 1 GROUP BY 3, 4, 5
        """)
        if repeated:
            first = f"first: {cell}, {self.file.unit}s {before} and {line}"
            keys = counted(rows - repeated, "key")
            note = f"{self.file.path}: {rows} rows, {keys}: {repeated} replaced by a later one ({first})"
            if 2 * repeated > rows and not self.settings.force:
                raise UsageError(
                    f"{note}. Give the column that tells rows apart with --id COLUMN, or --force to have it so."
                )
            self.notes.append(note)
        return rows, repeated

    def insert(self) -> dict[str, Any]:
        """Insert the last row of each key; what an object does not mention stays as it is in the table."""
        rows, repeated = self.count_rows()
        table, key, value = self.table.sql, quoted(self.key), self.values[self.key]
        source = f"""
            FROM {STAGED} AS f LEFT JOIN {table} AS old ON old.{key} = {value}
            WHERE f.line IN (SELECT max(line) FROM {STAGED} AS f GROUP BY {value})
        """
        new = {
            quoted(column): f"CASE WHEN {cell} IS NULL THEN old.{quoted(column)} ELSE {self.values[column]} END"
            for column, cell in self.cells.items()
        }
        text = "COALESCE(CAST({} AS text), '')".format
        differs = " OR ".join(f"{text(f'old.{column}')} <> {text(new[column])}" for column in new)
        ((replaced,),) = self.db.execute(f"SELECT count(*) {source} AND old.{key} IS NOT NULL AND ({differs})")
        if replaced:
            self.notes.append(f'rows of "{self.table.name}" replaced by others from {self.file.path}: {replaced}')
        self.db.execute(f"""
            INSERT INTO {table} ({", ".join(new)}) SELECT {", ".join(new.values())} {source}
            ORDER BY f.line {upsert(self.key, self.cells)}
        """)
        self.db.execute(f"DROP TABLE {STAGED}")
        Source.resolve(self.db, self.settings)  # raises if there is nothing to make a text of
        return {"rows": rows - repeated, "repeated": repeated, "replaced": replaced, "notes": self.notes}


# ============================ storage ============================
# From the database upward: SQLite and Postgres behind one interface, the table to read (Source), the table or column
# for its vectors (Target), which rows have an embedding (Coverage), the models that made them (Provenance), what saves
# the vectors of a run (EmbeddingTable), and which machine works on which rows (Claims).

PAGE_ROWS = 512  # rows read at a time
PAGE_CHARACTERS = 1 << 20  # of text, after which a page ends early: memory stays flat however long the texts are
PROVENANCE_TABLE = "embedgen_provenance"  # in the target's schema: which model versions made the vectors
# `accepted`: the vectors were compared with all others that were stored, or are mixed with them on purpose.
PROVENANCE_COLUMNS = """id {}, target text NOT NULL, model text NOT NULL, digest text NOT NULL, prefix text NOT NULL,
    fit text NOT NULL, accepted integer NOT NULL, version text, weights text"""
RETRY_SECONDS = 0.2  # between two tries
STOPPING_PATIENCE = 5.0  # seconds for which a run that has been interrupted still waits for its database


class Table(NamedTuple):
    """A table or view; SQLite has no schemas."""

    schema: str
    name: str
    is_table: bool = True
    exists: bool = True  # False if it may have to be created

    @property
    def sql(self) -> str:
        """Its qualified name in a statement."""
        return f"{quoted(self.schema)}.{quoted(self.name)}" if self.schema else quoted(self.name)


class Column(NamedTuple):
    """A column: its type as declared, its position in the primary key or 0, and whether it is unique by itself."""

    type: str
    pk_position: int
    is_unique: bool
    model: str | None = None  # of its vectors, by a comment `embedgen: MODEL`; "" without one, None where none can be


Embeddings = list["tuple[Row, Embedding]"]
# Rows with their vectors and the ids of their provenance.
Vectors = Sequence["tuple[Row, bytes, int | None]"]
# Saves them; returns how many of the rows still existed, and the positions of those that other programs have locked.
VectorWriter = Callable[[Vectors], "tuple[int, list[int]]"]


class Forbidden(Stop):
    """The database user lacks a privilege."""


class RowsRefused(Stop):
    """A constraint or a trigger refuses at least one of the rows."""


def quoted(name: str) -> str:
    """Return a name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return a text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def upsert(key: str, columns: Iterable[str]) -> str:
    """Return the clause of an INSERT that updates these columns where the key exists."""
    changes = ", ".join(f"{quoted(column)} = excluded.{quoted(column)}" for column in columns if column != key)
    return f"ON CONFLICT ({quoted(key)}) DO " + (f"UPDATE SET {changes}" if changes else "NOTHING")


def insert_sql(coverage: Coverage, rows: str, vector: str, digest: str, now: str, provenance: str) -> str:
    """Return the statement that stores vectors in a target table; `rows` is the FROM clause, with the source as s."""
    target, model = coverage.target, literal(coverage.settings.model)
    values = dict(zip(OWN_COLUMNS, (vector, model, digest, now, provenance)))
    return f"""
        INSERT INTO {target.table.sql} ({quoted(target.key)}, {", ".join(target.columns)})
        SELECT {coverage.source.key_sql}, {", ".join(values[name] for name in target.columns)} {rows}
        {upsert(target.key, target.columns)}
    """


def page_sql(coverage: Coverage, condition: str, rows: int) -> str:
    """Return the query for the next pending rows in the order of their keys: key and text.

    Rows beyond PAGE_CHARACTERS of text are left to the next page, within the database.
    """
    source, key = coverage.source, coverage.source.key_sql
    return f"""
        SELECT key, text FROM (
            SELECT key, text, sum(length(text)) OVER (ORDER BY key) - length(text) AS before FROM (
                SELECT {key} AS key, {source.text_sql} AS text FROM {source.from_sql} AS s
                WHERE {condition} AND {coverage.pending_sql} ORDER BY {key} LIMIT {rows}
            ) AS page
        ) AS sized WHERE before < {PAGE_CHARACTERS} ORDER BY key
    """


def primary_key(columns: dict[str, Column]) -> list[str]:
    """Return the columns of the primary key."""
    return [name for name, column in columns.items() if column.pk_position]


class Catalogue(NamedTuple):
    """Queries about tables and columns; the parameters of most are a table's schema and name."""

    table_names: str  # names of the tables and views that can be read
    find_table: str  # parameters and result as of Database.find_table
    columns: str  # the readable columns: name, and the fields of Column
    references: str  # parameters: schema, name, column; table and column that its foreign key refers to
    may_refer: str  # parameters: schema, name, column; true if this user may create foreign keys to it


class ErrorRule(NamedTuple):
    """How to treat a kind of database error."""

    pattern: str  # matched against "lost=" True or False, the names of the exception's classes, and its text
    words: str  # for the user
    kind: type[BaseException] = Stop  # to raise
    patience: float = 0.0  # seconds of further tries before that


class Database:
    """What both databases share: retries, transactions, and queries about tables and columns."""

    catalogue: ClassVar[Catalogue]
    errors: ClassVar[Sequence[ErrorRule]]  # the first that matches counts
    mark: ClassVar[str]  # placeholder of a parameter, without its number
    type_names: ClassVar[dict[str, str]] = {}  # types of new columns for types by SQLite's names, and for narrow ones
    identity: ClassVar[str]  # type of a key that numbers its rows
    exclusion: ClassVar[str] = ""  # statement by which a transaction excludes those of other runs, if one is needed
    target_columns: ClassVar[str]  # of a new target, after its key; {} is the type of its vectors
    vector_types: ClassVar[str]  # pattern of types that hold vectors; its groups are the name and the dimensions
    vectors_are: ClassVar[str]  # these types, for the user
    name_bytes: ClassVar[int] = sys.maxsize  # of a name are kept
    create_index: Any  # of Postgres alone
    connection: Any = None

    def __init__(self, shown: str, driver_error: type[Exception], stopping: Callable[[], bool]) -> None:
        """`shown` is the address without secrets, `driver_error` the base of the driver's exceptions.

        Retries end early when `stopping()` returns true.
        """
        self.shown, self.driver_error, self.stopping = shown, driver_error, stopping
        self.in_action = False
        self.function_error: BaseException | None = None  # raised in a function that a statement called

    def judge(self, error: Exception) -> tuple[float, BaseException]:
        """Return for how many seconds to retry after one of the driver's errors, and the exception to raise then."""
        text = one_line(str(error).strip().partition("\n")[0])
        facts = f"lost={getattr(self.connection, 'closed', False)} {type(error).__mro__} {text}"
        rule = next(rule for rule in self.errors if re.search(rule.pattern, facts))
        return rule.patience, rule.kind(rule.words.format(shown=self.shown, text=text))

    def reconnect(self) -> None:
        """Open the connection again if it is lost."""

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def begin(self) -> Any:
        """Return a context manager that commits at its end, or rolls back."""

    def retry(self, action: Callable[[], T]) -> T:
        """Return the action's result; repeat it while the database is locked or away, and raise Stop if that lasts.

        Nothing is repeated inside an action, because the whole action is.
        """
        if self.in_action:
            return action()
        deadline = math.inf
        while True:
            try:
                self.reconnect()
                self.in_action = True
                return action()
            except self.driver_error as error:
                patience, stop = self.judge(error)
                now = time.monotonic()
                deadline = min(deadline, now + (min(patience, STOPPING_PATIENCE) if self.stopping() else patience))
                if now >= deadline:
                    raise self.function_error or stop from error
            finally:
                self.in_action = False
            time.sleep(RETRY_SECONDS)

    def transaction(self, action: Callable[[], T], first: str = "") -> T:
        """Return the action's result, from one transaction, which is repeated as a whole; `first` is a statement."""

        def whole() -> T:
            with self.begin():
                if first:
                    self.execute(first)
                return action()

        return self.retry(whole)

    def exclusively(self, action: Callable[[], T]) -> T:
        """Return the action's result, from a transaction that excludes those of other runs of this program."""
        return self.transaction(action, self.exclusion)

    def execute(self, sql: str, *parameters: Any) -> list[Any]:
        """Return all rows of a statement, without retries; of one that returns none, the number of changed rows."""
        cursor = self.connection.execute(sql, parameters)
        return list(cursor.fetchall() if cursor.description else [(cursor.rowcount,)])

    def query(self, sql: str, *parameters: Any) -> list[Any]:
        """Return all rows of a statement."""
        return self.retry(lambda: self.execute(sql, *parameters))

    def query_all(self, sql: str) -> list[Any]:
        """Do as `query`; raise Stop if row-level security hides rows from this user."""
        return self.query(sql)

    def value(self, sql: str, *parameters: Any) -> Any:
        """Return the first column of a query's first row, or None without rows."""
        return next((row[0] for row in self.query(f"{sql} LIMIT 1", *parameters)), None)

    def find_table(self, name: str, schema: str = "", anywhere: bool = True) -> Table:
        """Return the table or view called name or schema.name, or else the one to create.

        `schema` is where it would be created, and looked for at last; if not `anywhere`, only there.
        """
        return Table(*self.query(self.catalogue.find_table, name, schema, anywhere)[0])

    def create_table(self, table: Table, columns: str) -> None:
        """Create a table unless it exists; within a transaction."""
        if not self.columns(table):  # IF NOT EXISTS alone asks for the right to create even where the table exists
            self.execute(f"CREATE TABLE IF NOT EXISTS {table.sql} ({columns})")

    def columns(self, table: Table) -> dict[str, Column]:
        """Return the readable columns by name; raise Stop if a table that exists has none."""
        found = self.query(self.catalogue.columns, table.schema, table.name)
        if table.exists and not found:
            raise Stop(f'"{table.name}" has no columns that may be read. Have SELECT on it granted.')
        return {name: Column(*facts) for name, *facts in found}

    def vectors_of(self, declared: str) -> tuple[str, int]:
        """Return a type's name and the dimensions that it demands, 0 for any; raise UsageError for a wrong type."""
        if found := re.fullmatch(self.vector_types, declared, re.IGNORECASE):
            return found[1], int(found[2] or 0)
        raise UsageError(
            f"the column for the vectors has the type {declared}, not {self.vectors_are}. "
            "Give another with --target or --out-column, or change its type."
        )

    def cut(self, name: str, ending: str = "") -> str:
        """Return a name with an ending, in as many bytes as the database keeps of a name."""
        return name.encode()[: self.name_bytes - len(ending)].decode("utf-8", "ignore") + ending

    def type_name(self, declared: str) -> str:
        """Return the type of a new column that holds values of a declared type."""
        return self.type_names.get(declared.partition("(")[0], declared)


CACHE_KIB = 512  # of SQLite's page cache: rows are read once, in order, so its default of 2,000 only costs memory
LOCK_PATIENCE = 60.0  # seconds to wait for a database that another program has locked
SQLITE_ERRORS = (
    ErrorRule(
        "is locked", "another run is under way on {shown}, a program has it locked, or its disk has no file locks, as "
        "some network shares. Wait for the end of the others, or use a local disk.",
        patience=LOCK_PATIENCE,
    ),
    # By a signal's exception in the progress handler, or in a function that a statement calls.
    ErrorRule("interrupted|user-defined function", "{text}", KeyboardInterrupt),
    ErrorRule("IntegrityError", "SQLite says: {text}", RowsRefused),
    ErrorRule("disk is full|disk I/O|locking protocol",
              "{shown} cannot be used ({text}): the disk is full, failing, or a network share without file locks. Make "
              "room, or use a sound local disk."),
    ErrorRule("unable to open|access permission", "{shown} cannot be opened. Check its permissions and its folder's."),
    # The second for a run that only reads, which cannot roll back what another has left.
    ErrorRule("readonly", "{shown} cannot be written ({text}): it is protected, or a program was killed while it "
              "wrote. Check its permissions, or run embedgen for it once."),
    ErrorRule("not a database|image is malformed|malformed database",
              "{shown} is not a sound SQLite database ({text}). Give --database URL."),
    ErrorRule("", "SQLite says of {shown}: {text}."),
)  # fmt: skip


def open_sqlite(path: str, mode: str = "rwc", timeout: float = 0, first: str = "BEGIN EXCLUSIVE") -> Any:
    """Return a connection without Python's own transactions, after its first statement, which is tried once.

    On an empty database, the usual one is a lock: on every system, and until the process ends.
    """
    import sqlite3

    uri = f"file:{quote(os.fsencode(path))}?mode={mode}"
    connection = sqlite3.connect(uri, timeout=timeout, isolation_level=None, uri=True)
    try:
        connection.execute(first)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


class SQLite(Database):
    """An SQLite file."""

    catalogue = Catalogue(
        table_names="SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%'",
        # There is but one place to look in: ?3 is only mentioned, since each parameter has to be.
        find_table="""
            SELECT ?2, name, type = 'table', ?3 IS NOT NULL FROM sqlite_master WHERE type IN ('table', 'view')
            AND name COLLATE NOCASE IN (?1, CASE WHEN ?1 LIKE 'main.%' THEN substr(?1, 6) END)
            UNION ALL SELECT ?2, CASE WHEN ?1 LIKE 'main.%' THEN substr(?1, 6) ELSE ?1 END, 1, 0 LIMIT 1
        """,
        # Unique are columns with an index of their own, and the INTEGER PRIMARY KEY, which needs none.
        columns="""
            SELECT t.name, t.type, t.pk, t.name IN (
                SELECT max(c.name) FROM pragma_index_list(?2) AS i JOIN pragma_index_info(i.name) AS c
                WHERE i."unique" AND NOT i.partial GROUP BY i.name HAVING count(*) = 1
                UNION ALL SELECT max(name) FROM pragma_table_xinfo(?2) WHERE pk GROUP BY '' HAVING count(*) = 1
            ) FROM pragma_table_xinfo(?2) AS t WHERE t.hidden <> 1
        """,
        references="""
            SELECT t.name, c.name FROM pragma_foreign_key_list(?2) AS f
            JOIN sqlite_master AS t ON t.name = f."table" COLLATE NOCASE AND t.type IN ('table', 'view')
            JOIN pragma_table_xinfo(t.name) AS c
            ON CASE WHEN f."to" IS NULL THEN c.pk = f.seq + 1 ELSE c.name = f."to" COLLATE NOCASE END
            WHERE f."from" = ?3 ORDER BY f.id
        """,
        may_refer="SELECT ?3 IS NOT NULL",
    )
    errors = SQLITE_ERRORS
    mark = "?"
    identity = "INTEGER PRIMARY KEY"
    vector_types, vectors_are = "(?!.*(?:INT|CHAR|CLOB|TEXT|REAL|FLOA|DOUB))(.*)()", "BLOB"
    octets = "length(CAST({} AS BLOB))"  # SQL of a text's length in bytes
    sha256 = "embedgen_sha256(CAST({} AS BLOB))"  # bytes, because a text may hold NUL or invalid bytes
    dimensions = "CASE WHEN typeof({0}) = 'blob' AND length({0}) % 4 = 0 THEN length({0}) / 4 END"  # NULL: no vector
    # Gives a provenance table of before versions were recorded its new columns, and takes its constraint.
    renewal = f"""CREATE TEMP TABLE embedgen_old AS SELECT * FROM {{0}}; DROP TABLE {{0}};
        CREATE TABLE {{0}} ({PROVENANCE_COLUMNS.format(identity)});
        INSERT INTO {{0}} SELECT *, NULL, NULL FROM embedgen_old; DROP TABLE embedgen_old"""
    target_columns = (
        "embedding {} NOT NULL, model TEXT NOT NULL, text_sha256 BLOB NOT NULL, updated_at TEXT NOT NULL, "
        "provenance INTEGER"
    )

    def __init__(self, path: str, reads_only: bool, may_create: bool, stopping: Callable[[], bool]) -> None:
        """Open a file; a run that writes locks out other runs. `may_create`: the file need not be there."""
        import sqlite3

        super().__init__(path, sqlite3.Error, stopping)
        self.is_new = not os.path.exists(path)
        if self.is_new and not may_create:
            raise Stop(f"there is no database {path}. Give --database URL, or --load FILE to make one.")
        real, mode = os.path.realpath(path), "ro" if reads_only else "rwc"
        with contextlib.ExitStack() as opened:
            try:
                if not reads_only:
                    # An empty database beside the file, locked so that a second run is refused: SQLite's own lock works
                    # on every system, ends with the process, and is not inherited by forked workers.
                    opened.callback(open_sqlite(f"{real}.embedgen-lock").close)
                self.connection = open_sqlite(real, mode, 0.5, "")  # `retry`, which sees signals, waits longer
            except sqlite3.Error as error:
                raise self.judge(error)[1] from error
            opened.callback(self.connection.close)
            self.encoding = self.value("SELECT encoding FROM pragma_encoding")  # fails unless it is a database
            self.opened = opened.pop_all()
        self.query(f"PRAGMA cache_size = -{CACHE_KIB}")
        self.connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        self.connection.create_function("embedgen_sha256", 1, self.hash_text, deterministic=True)
        self.connection.create_function("embedgen_text", 1, text_of_blob, deterministic=True)
        # Does nothing, but gives Python a turn in long statements, so that signals are heard.
        self.connection.set_progress_handler(lambda: 0, 200_000)

    def close(self) -> None:
        """Close the file; remove it if this run has created it and left it empty."""
        super().close()
        if self.is_new and not os.path.getsize(self.shown):
            os.remove(self.shown)
        self.opened.close()

    def hash_text(self, raw: bytes) -> bytes:
        """Return the SHA-256 of a text in the database's encoding; invalid bytes count as U+FFFD, as they are sent."""
        try:
            return digest_of(raw.decode(self.encoding, "replace"))
        except BaseException as error:  # which sqlite3 replaces by words of its own
            self.function_error = error
            raise

    def begin(self) -> Any:
        self.connection.rollback()  # of a commit that failed, which Python before 3.9.8 leaves open
        self.connection.execute("BEGIN IMMEDIATE")
        return self.connection

    def text_sql(self, column: str, declared: str) -> str:
        """Return the SQL of a column's value as text, NULL where it is blank."""
        name = f"s.{quoted(column)}"
        # Nearly always the first character decides, in a third of the time.
        visible = f"unicode({name}) BETWEEN 33 AND 126 OR trim({name}, {literal(BLANKS)}) <> ''"
        text = f"CASE typeof({name}) WHEN 'blob' THEN embedgen_text({name}) ELSE CAST({name} AS TEXT) END"
        return f"CASE WHEN {visible} THEN {text} END"

    def vector_type(self, dimensions: int) -> str:
        """Return the type of a column for vectors."""
        return "BLOB"

    def read_vector(self, value: Any) -> bytes | None:
        """Return a vector as it came from the database, as float32, little-endian; None if it is none."""
        return value if isinstance(value, bytes) and value and len(value) % 4 == 0 else None

    def vector_writer(self, coverage: Coverage) -> VectorWriter:
        """Return what saves vectors in one transaction."""
        source, target = coverage.source, coverage.target
        if target.is_column:
            sql = f"""
                UPDATE {source.table.sql} AS s SET {quoted(target.columns["embedding"])} = :vector
                WHERE {source.key_sql} = :key AND {self.sha256.format(source.whole_text_sql)} = :digest
            """
        else:
            rows = f"FROM {source.rows_sql} AS s WHERE {source.key_sql} = :key"
            now = "strftime('%Y-%m-%dT%H:%M:%SZ', 'now')"
            sql = insert_sql(coverage, rows, ":vector", ":digest", now, ":provenance")

        def save(vectors: Vectors) -> tuple[int, list[int]]:
            rows = [{**row._asdict(), "vector": vector, "provenance": made_by} for row, vector, made_by in vectors]
            return self.transaction(lambda: int(self.connection.executemany(sql, rows).rowcount)), []

        return save

    def nearest(self, coverage: Coverage, rows: str, vector: bytes, most: int) -> list[tuple[Any, bytes]]:
        """Return keys and vectors of the rows nearest to a vector by cosine, in that order; `rows`: the FROM clause.

        Of multiples of one vector only the last digits differ; then the keys decide.
        """
        self.connection.create_function("embedgen_cosine", 1, lambda stored: cosine(vector, stored))
        key, stored = coverage.source.key_sql, coverage.target.column_sql("embedding")
        order = f"round(embedgen_cosine({stored}), 9) DESC, {key}"
        return self.query(f"SELECT {key}, {stored} {rows} ORDER BY {order} LIMIT {most}")

    def check_index(self, target: Target, dimensions: int = 0) -> None:
        """Raise UsageError: only Postgres has an index for vectors."""
        raise UsageError("--index is for Postgres; a search in SQLite is exact and needs none. Leave it out.")

    def fill(self, table: str, width: int, rows: Iterable[Sequence[Any]]) -> None:
        """Insert rows of so many values into a table."""
        self.connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * width)})", rows)

    def exact_sql(self, cell: str, declared: str) -> str:
        """Return the SQL of a staged cell as a column of this type stores it, NULL if it would be another value.

        https://sqlite.org/datatype3.html#determination_of_column_affinity; a type such as DATE takes any text.
        """
        self.connection.create_function("embedgen_number", 1, exact_number, deterministic=True)
        whole = f"CASE WHEN CAST(CAST({cell} AS INTEGER) AS TEXT) = {cell} THEN CAST({cell} AS INTEGER) END"
        number = f"embedgen_number(COALESCE({cell}, ''))"
        text = f"CASE WHEN {cell} <> CAST({cell} AS NUMERIC) THEN {cell} END"  # if it does not look like a number
        values = {
            "INT": whole, "CHAR|CLOB|TEXT|BLOB|^$": cell, "REAL|FLOA|DOUB": f"CAST({number} AS REAL)",
            "": f"COALESCE({whole}, {number}, {text})",
        }  # fmt: skip
        return next(value for types, value in values.items() if re.search(types, declared.upper()))


NO_TEXT = "\ufdd0\uffff"  # stands in a row's text for a BLOB that is not UTF-8; characters for internal use only
REPLACED = "\ufffd"  # for bytes that are not UTF-8, which SQLite stores as TEXT all the same


def text_of_blob(raw: bytes) -> str:
    """Return a BLOB as text, NO_TEXT if it is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return NO_TEXT


def exact_number(text: str) -> float | None:
    """Return the number that a text is, an integer if it is whole; None if it is none, or another in double precision.

    SQLite's own conversion may be off in the last digit.
    """
    from decimal import Decimal

    if not re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d{1,3})?", text, re.ASCII):
        return None
    number = float(text)
    if Decimal(repr(number)) != Decimal(text):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


RECONNECT_PATIENCE = 120.0  # seconds to wait for a Postgres that has gone away
ROW_LOCK_SECONDS = 60  # to wait for a row that another transaction holds
EF_SEARCH = 400  # candidates in an HNSW index: ten times pgvector's default misses less, and costs milliseconds
MOST_INDEXED = {"vector": 2000, "halfvec": 4000}  # dimensions that pgvector's HNSW index takes, by type
INDEX_LOOK = 0.5  # seconds between two looks at an index that is being built
POSTGRES_ERRORS = (
    # PgBouncer's words, after which it hangs up.
    ErrorRule("pooling mode", "the pooler in front of Postgres refuses: {text}. Let it work in transaction mode."),
    ErrorRule("lost=True", "the connection to Postgres is lost ({text}). Run again later.", Stop, RECONNECT_PATIENCE),
    ErrorRule("DeadlockDetected|SerializationFailure", "Postgres says: {text}.", Stop, RECONNECT_PATIENCE),
    # Of a save whose row was deleted just between the look at it and the reference to it.
    ErrorRule("ForeignKeyViolation", "Postgres says: {text}", RowsRefused, 1.0),
    ErrorRule('extension "vector"|CREATE EXTENSION',
              "pgvector is missing and cannot be created ({text}). Install it on the server "
              "(https://github.com/pgvector/pgvector), and have an administrator run: CREATE EXTENSION vector;"),
    ErrorRule("InsufficientPrivilege",
              "Postgres refuses: {text}. Ask its administrator, or give another user in --database.", Forbidden),
    ErrorRule("UndefinedFunction",
              "Postgres says: {text}. If keys do not compare, give another --target NAME or --id COLUMN.", UsageError),
    ErrorRule("DiskFull", "Postgres has no room ({text}). Make room, and run again."),
    ErrorRule("LockNotAvailable", "another transaction holds rows for too long ({text}). Run again later."),
    ErrorRule("ReadOnlySql", "Postgres takes no writes ({text}). Give the primary server's address in --database."),
    ErrorRule("IntegrityError|DataError|RaiseException", "Postgres says: {text}", RowsRefused),
    ErrorRule("", "Postgres says: {text}."),
)  # fmt: skip
# When a column of a type that begins so has stored a cell as it is: the same text, number or moment.
EXACT_CONDITIONS = (
    ("smallint|integer|bigint|character", "value::text = cell"),
    ("numeric|real|double", r"value::text::numeric = cell::numeric AND cell !~ '^-?0\d'"),
    ("date|timestamp", r"value::timestamptz = cell::timestamptz AND cell !~ '\.\d{7}'"),  # to the microsecond
    ("", "true"),
)


POSTGRES_CATALOGUE = Catalogue(
    table_names=r"""
        SELECT CASE WHEN pg_table_is_visible(c.oid) THEN '' ELSE n.nspname || '.' END || c.relname
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'f', 'v', 'm') AND n.nspname <> 'information_schema'
        AND n.nspname NOT LIKE 'pg\_%' AND has_table_privilege(c.oid, 'SELECT') ORDER BY 1
    """,
    # As given, then in the lower case that SQL makes of a name without quotes.
    find_table="""
        WITH given AS (
            SELECT quote_ident($1) AS one, quote_ident($2) || '.' || quote_ident($1) AS exact,
            quote_ident(split_part($1, '.', 1)) || '.' || quote_ident(substr($1, strpos($1, '.') + 1)) AS two
        ), found AS (
            SELECT COALESCE(
                CASE WHEN $3 THEN COALESCE(
                    to_regclass(one), to_regclass(two), to_regclass(lower(one)), to_regclass(lower(two))
                ) END, CASE WHEN $2 <> '' THEN to_regclass(exact) END
            ) AS oid FROM given
        )
        SELECT n.nspname, c.relname, c.relkind IN ('r', 'p', 'f'), true
        FROM found JOIN pg_class c ON c.oid = found.oid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'f', 'v', 'm')
        UNION ALL SELECT nspname, substr($1, strpos($1, '.') + 1), true, false FROM pg_namespace
        WHERE $3 AND $1 LIKE '%.%' AND nspname = split_part($1, '.', 1)
        UNION ALL SELECT COALESCE(NULLIF($2, ''), current_schema(), 'public'), $1, true, false LIMIT 1
    """,
    columns="""
        SELECT a.attname, format_type(a.atttypid, a.atttypmod),
            COALESCE(array_position(i.indkey::smallint[], a.attnum) + 1, 0),
            EXISTS (
                SELECT 1 FROM pg_index u WHERE u.indrelid = a.attrelid AND u.indkey[0] = a.attnum AND u.indnkeyatts = 1
                AND u.indisunique AND u.indisvalid AND u.indimmediate AND u.indpred IS NULL
            ),
            regexp_replace(
                COALESCE(substring(col_description(a.attrelid, a.attnum), 'embedgen: ([^[:space:],;]+)'), ''),
                ':latest$', ''
            )
        FROM pg_attribute a LEFT JOIN pg_index i ON i.indrelid = a.attrelid AND i.indisprimary
        WHERE a.attrelid = to_regclass(quote_ident($1) || '.' || quote_ident($2)) AND a.attnum > 0
        AND NOT a.attisdropped AND has_column_privilege(a.attrelid, a.attnum, 'SELECT') ORDER BY a.attnum
    """,
    references="""
        SELECT c.relname, t.attname FROM pg_constraint f JOIN pg_class c ON c.oid = f.confrelid
        JOIN pg_attribute a ON a.attrelid = f.conrelid AND f.conkey = ARRAY[a.attnum]
        JOIN pg_attribute t ON t.attrelid = f.confrelid AND t.attnum = f.confkey[1]
        WHERE f.contype = 'f' AND f.conrelid = to_regclass(quote_ident($1) || '.' || quote_ident($2)) AND a.attname = $3
    """,
    may_refer="SELECT has_column_privilege(quote_ident($1) || '.' || quote_ident($2), $3, 'REFERENCES')",
)


class Postgres(Database):
    """A Postgres database with pgvector, through psycopg 3."""

    catalogue = POSTGRES_CATALOGUE
    errors = POSTGRES_ERRORS
    mark = "$"
    type_names: ClassVar[dict[str, str]] = {
        "INTEGER": "bigint", "REAL": "numeric", "smallint": "bigint", "integer": "bigint", "character varying": "text",
    }  # fmt: skip
    identity = "integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY"
    vector_types, vectors_are = r"(?:.*\.)?(vector|halfvec)(?:\((\d+)\))?", "vector or halfvec"
    name_bytes = 63
    exclusion = "SELECT pg_advisory_xact_lock(0x656D6265646765)"  # one lock for all: "embedge" in ASCII
    octets = "octet_length({})"
    sha256 = "sha256(convert_to({}, 'UTF8'))"
    renewal = f"""ALTER TABLE {{0}} ADD version text, ADD weights text,
        DROP CONSTRAINT {PROVENANCE_TABLE}_target_model_digest_prefix_fit_key"""
    target_columns = (
        "embedding {} NOT NULL, model text NOT NULL, text_sha256 bytea NOT NULL, updated_at timestamptz NOT NULL, "
        "provenance integer"
    )

    def __init__(self, url: str, reads_only: bool, stopping: Callable[[], bool]) -> None:
        """Connect; raise Stop where that fails, UsageError where the URL is wrong."""
        try:
            import psycopg
            from psycopg import RawCursor  # noqa: F401 - of version 3.2
        except ImportError as error:
            raise Stop(
                f'Postgres needs psycopg, 3.2 or newer ({error}). Run: pip install "psycopg[binary]" --upgrade'
            ) from None
        super().__init__("postgresql://", psycopg.Error, stopping)
        self.url, self.reads_only = url, reads_only
        try:
            self.connection = self.connect()
        except psycopg.ProgrammingError:  # its text may hold the password
            raise UsageError("--database is not a URL as Postgres takes it. Put special characters as %XX.") from None
        except psycopg.Error as error:
            raise Stop(f"cannot connect to Postgres ({' '.join(str(error).split())}). Check --database URL.") from None
        info = self.connection.info
        self.shown = f"postgresql://{info.host}:{info.port}/{info.dbname}"
        # The schema that pgvector is in, or will be; and what of BLANKS is known to a database in another encoding.
        ((self.pgvector, encoding),) = self.query("""
            SELECT quote_ident(COALESCE((SELECT n.nspname FROM pg_extension e JOIN pg_namespace n
            ON n.oid = e.extnamespace WHERE e.extname = 'vector'), current_schema(), 'public')),
            current_setting('server_encoding')
        """)
        self.dimensions = f"{self.pgvector}.vector_dims({{}})"
        self.blanks = literal(BLANKS if encoding == "UTF8" else BLANKS.encode("ascii", "ignore").decode())

    def connect(self) -> Any:
        """Return a new connection."""
        import psycopg

        for name in ("PGTZ", "PGDATESTYLE"):  # a text must not depend on the machine that embeds it
            os.environ.pop(name, None)
        settings: Any = {
            "connect_timeout": 10,  # seconds; libpq would wait without end
            "tcp_user_timeout": 30_000,  # milliseconds, likewise for a host that dies later
            "fallback_application_name": "embedgen",
            **psycopg.conninfo.conninfo_to_dict(self.url),
            "client_encoding": "utf8",
        }
        connection = psycopg.connect(
            **settings,
            autocommit=True,
            cursor_factory=psycopg.RawCursor,  # parameters are $1, and a % is a %
            prepare_threshold=None,  # statements prepared by name do not survive a pooler such as PgBouncer
        )

        connection.read_only = self.reads_only or None  # in transactions, not in the session, which a pooler shares

        class BinaryDumper(psycopg.types.string.BytesBinaryDumper):
            """Sends bytes as the binary form of whatever type the statement says."""

            oid = 0

        connection.adapters.register_dumper(bytes, BinaryDumper)
        return connection

    def reconnect(self) -> None:
        if self.connection.closed:
            self.connection = self.connect()

    def begin(self) -> Any:
        return self.connection.transaction()

    def query(self, sql: str, *parameters: Any) -> list[Any]:
        # Where a run only reads, in a transaction that does: a condition may call a function that writes.
        run = self.transaction if self.reads_only else self.retry
        return run(lambda: self.execute(sql, *parameters))

    def query_all(self, sql: str) -> list[Any]:
        # An error where a policy would filter.
        return self.transaction(lambda: self.execute(sql), "SET LOCAL row_security = off")

    def text_sql(self, column: str, declared: str) -> str:
        """Return the SQL of a column's value as text, NULL where it is blank."""
        if declared == "bytea":
            raise UsageError(f'the column "{column}" holds bytes, not text. Choose others with --columns or --text.')
        name = f"s.{quoted(column)}"
        value = f"array_to_string({name}, ', ')" if declared.endswith("[]") else f"{name}::text"
        return f"CASE WHEN btrim({value}, {self.blanks}) <> '' THEN {value} END"

    def vector_type(self, dimensions: int) -> str:
        """Return the type of a column for vectors; create pgvector if need be."""
        if not self.value("SELECT 1 FROM pg_extension WHERE extname = 'vector'"):
            extension = f"CREATE EXTENSION IF NOT EXISTS vector SCHEMA {self.pgvector}"
            self.exclusively(lambda: self.execute(extension))
        return f"{self.pgvector}.vector({dimensions})"

    def read_vector(self, value: Any) -> bytes | None:
        """Return a vector as it came from the database, a JSON array, as float32, little-endian; None if none did."""
        return None if value is None else pack(json.loads(value))

    def vector_writer(self, coverage: Coverage, more: str = "") -> VectorWriter:
        """Return what saves vectors in one statement; `more` are further CTEs of it.

        An array of vectors in binary form is as fast as COPY, and one statement: no temporary table, and no transaction
        to keep open behind a pooler. Rows are locked in the order of their keys, as other programs are likely to do; in
        a column those that are locked already are left out, so that nobody waits in a circle.
        """
        source, target, key = coverage.source, coverage.target, coverage.source.key_sql
        digest, vectors = "substr($3::bytea, 32 * b.position::int - 31, 32)", f"$2::{self.pgvector}.vector[]"
        rows, same_key = f"{source.rows_sql} AS s", f"{key} = b.key::{source.key_type}"
        if target.is_column:
            same = f"{same_key} AND {digest} = {self.sha256.format(source.whole_text_sql)}"
            batch = "unnest($1::text[]) WITH ORDINALITY AS b(key, position)"
            # IS TRUE keeps Postgres from joining by the digests, for which it would compute those of all rows.
            write = f"""
                free AS (
                    SELECT {key} AS key, b.position FROM patience, {batch} JOIN {rows} ON {same_key}
                    WHERE ({same}) IS TRUE ORDER BY 1 FOR NO KEY UPDATE OF s SKIP LOCKED
                ), saved AS (
                    UPDATE {target.table.sql} AS s SET {quoted(target.columns["embedding"])} = b.embedding
                    FROM free JOIN unnest({vectors}) WITH ORDINALITY AS b(embedding, position)
                    ON b.position = free.position WHERE {key} = free.key RETURNING 1
                ), locked AS (
                    SELECT b.key, b.position FROM {batch} WHERE b.position NOT IN (SELECT position FROM free)
                    AND (SELECT true FROM {rows} WHERE {same} LIMIT 1)
                )
            """
        else:
            batch = f"""
                FROM patience, unnest($1::text[], {vectors}, $4::int[]) WITH ORDINALITY
                AS b(key, embedding, provenance, position) JOIN {rows} ON {same_key} ORDER BY 1
            """
            write = insert_sql(coverage, batch, "b.embedding", digest, "now()", "b.provenance")
            write = f"saved AS ({write} RETURNING 1), locked AS (SELECT '' AS key, 0 AS position LIMIT 0)"
        # Beside the setting, the types of parameters that not every statement uses.
        patience = f"set_config('lock_timeout', '{ROW_LOCK_SECONDS}s', true), $3::bytea IS NULL, $4::int[] IS NULL"
        sql = f"""
            WITH patience AS (SELECT {patience}), {write}{more}
            SELECT (SELECT count(*) FROM saved), ARRAY(SELECT position - 1 FROM locked)
        """
        element = int(self.value(f"SELECT '{self.pgvector}.vector'::regtype::oid::bigint"))

        def save(vectors: Vectors) -> tuple[int, list[int]]:
            rows, embeddings, provenance_ids = zip(*vectors)
            digests = b"".join(row.digest for row in rows)  # in one piece, which psycopg sends 100 times sooner
            keys, array = [str(row.key) for row in rows], vector_array(embeddings, element)
            ((count, locked),) = self.query(sql, keys, array, digests, list(provenance_ids))
            return count, locked

        return save

    def nearest(self, coverage: Coverage, rows: str, vector: bytes, most: int) -> list[tuple[Any, bytes]]:
        """Return keys and vectors of the rows nearest to a vector by cosine, in that order; `rows`: the FROM clause."""
        key, stored = coverage.source.key_sql, coverage.target.column_sql("embedding")
        distance = f"{stored} OPERATOR({self.pgvector}.<=>) $1::{self.pgvector}.{coverage.target.vector_kind}"
        # From 0.8 on, pgvector looks on where a condition has left too little.
        setting = f"""
            SELECT set_config('hnsw.ef_search', '{EF_SEARCH}', true), CASE WHEN string_to_array(extversion, '.')::int[]
                >= ARRAY[0, 8] THEN set_config('hnsw.iterative_scan', 'strict_order', true) END
            FROM pg_extension WHERE extname = 'vector'
        """

        def look(order: str) -> list[Any]:
            sql = f"""
                SELECT key, vector FROM (
                    SELECT {key} AS key, {stored} AS vector, {distance} AS distance {rows} ORDER BY {order} LIMIT {most}
                ) AS e ORDER BY round(distance::numeric, 5), key
            """
            return self.transaction(lambda: self.execute(sql, json.dumps(unpack(vector))), setting)

        is_indexed = True in self.indexes(coverage.target).values()
        found = look(distance) if is_indexed else []  # an index gives the order of nothing but the bare distance
        if len(found) < most:  # few rows, or an index that has given up looking for them
            found = look(f"round(({distance})::numeric, 5), {key}")
        return [(key, pack(json.loads(text))) for key, text in found]

    def fill(self, table: str, width: int, rows: Iterable[Sequence[Any]]) -> None:
        """Insert rows into a table."""
        with self.connection.cursor().copy(f"COPY {table} FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)

    def exact_sql(self, cell: str, declared: str) -> str:
        """Return the SQL of a staged cell as a column of this type stores it, NULL if it would be another value.

        A function, since only one can go on after an error; and it assigns, since a cast to varchar(3) cuts.
        """
        if declared in ("text", "character varying"):
            return cell
        name = "pg_temp." + quoted(f"embedgen {declared}")
        same = next(condition for types, condition in EXACT_CONDITIONS if re.match(types, declared))
        self.execute(f"""
            CREATE OR REPLACE FUNCTION {name}(cell text) RETURNS {declared} STABLE STRICT LANGUAGE plpgsql AS $$
            DECLARE value {declared}; BEGIN value := cell; RETURN CASE WHEN {same} THEN value END;
            EXCEPTION WHEN OTHERS THEN RETURN NULL; END $$
        """)
        return f"{name}({cell})"

    def indexes(self, target: Target) -> dict[str, bool]:
        """Return the names of the HNSW indexes for cosine distance, and whether each is valid."""
        sql = """
            SELECT i.indexrelid::regclass::text, i.indisvalid FROM pg_index i
            JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
            JOIN pg_opclass o ON o.oid = i.indclass[0]
            JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
            WHERE i.indrelid = $1::regclass AND a.attname = $2 AND m.amname = 'hnsw'
            AND o.opcname LIKE '%cosine_ops' AND i.indpred IS NULL
        """
        return dict(self.query(sql, target.table.sql, target.columns["embedding"]))

    def check_index(self, target: Target, dimensions: int = 0) -> None:
        """Raise UsageError if a target's vectors cannot be indexed; `dimensions` are those of one to be created."""
        kind, size = target.vector_kind, target.dimensions if target.exists else dimensions
        parted = f"SELECT 1 FROM pg_class WHERE oid = to_regclass({literal(target.table.sql)}) AND relkind = 'p'"
        if self.value(parted):
            raise UsageError(
                f'--index: "{target.table.name}" is partitioned, and Postgres indexes no such table while others use '
                "it. Leave out --index, and run a plain CREATE INDEX."
            )
        if (target.exists or size) and not 0 < size <= MOST_INDEXED[kind]:
            raise UsageError(
                f"--index: pgvector takes at most {MOST_INDEXED[kind]:,} declared dimensions of the type {kind}, not "
                f"{size:,}. Use fewer --dimensions; no index (an exact search needs none); or run: ALTER TABLE "
                f"{target.table.sql} ALTER COLUMN {target.columns['embedding']} TYPE halfvec({size or 'N'});"
            )

    def create_index(self, target: Target) -> Iterator[float]:
        """Build the HNSW index for cosine distance unless it is there or another run builds it; yield the share built.

        CONCURRENTLY, so that other programs can read and write the table.
        """
        from concurrent.futures import ThreadPoolExecutor, wait

        table, column = target.table.sql, target.columns["embedding"]
        building = f"""
            SELECT COALESCE(blocks_done::float8 / NULLIF(blocks_total, 0), 0) FROM pg_stat_progress_create_index
            WHERE relid = {literal(table)}::regclass
        """
        found = self.indexes(target)
        if True in found.values() or self.value(building) is not None:
            return
        for invalid in found:  # of a run that was interrupted
            self.query(f"DROP INDEX CONCURRENTLY {invalid}")
        name = self.cut(f"{target.table.name}_{column}", "_hnsw")
        create = f"""
            CREATE INDEX CONCURRENTLY IF NOT EXISTS {quoted(name)} ON {table}
            USING hnsw ({quoted(column)} {self.pgvector}.{target.vector_kind}_cosine_ops)
        """
        with contextlib.closing(self.connect()) as builder, ThreadPoolExecutor() as threads:
            build: Any = threads.submit(builder.execute, create)
            try:
                while not (build.done() or self.stopping()):
                    yield self.value(building) or 0.0
                    wait([build], INDEX_LOOK)
                if build.done():
                    if error := build.exception():
                        raise self.judge(error)[1] from error
                    yield 1.0
            finally:
                with contextlib.suppress(self.driver_error):
                    builder.cancel()


def vector_array(vectors: Sequence[bytes], element: int) -> bytes:
    """Return vectors as an array of pgvector's type, whose OID is `element`, in Postgres' binary form.

    An array is its dimensions, a flag, the element's OID, its length and lower bound, then each element behind its
    length (array_recv in Postgres); a vector is the number of its dimensions, two bytes of zero, and float32, all
    big-endian (vector_recv in pgvector).
    """
    pieces = [struct.pack(">5I", 1, 0, element, len(vectors), 1)]
    for vector in vectors:
        swapped = Array("I", vector)  # four bytes each, whatever they mean
        swapped.byteswap()
        pieces += (struct.pack(">IHxx", len(vector) + 4, len(vector) // 4), swapped.tobytes())
    return b"".join(pieces)


class Source(NamedTuple):
    """The table or view to read, and how its rows become texts. In SQL it is called s."""

    table: Table
    key: str
    key_type: str  # as declared
    is_referable: bool  # whether the key is declared unique: foreign keys may refer to it, and it has an index
    recipe: Recipe
    text_sql: str  # the text without its prefix, '' for a row without text
    prefix: str
    from_sql: str  # the table's name, or a subquery with the condition of --where

    @property
    def key_sql(self) -> str:
        """The SQL of the key."""
        return f"s.{quoted(self.key)}"

    @property
    def rows_sql(self) -> str:
        """The table; or `from_sql`, if the key may be unique only among the rows of --where."""
        return self.table.sql if self.is_referable else self.from_sql

    @property
    def whole_text_sql(self) -> str:
        """The SQL of the text with its prefix, which is embedded and hashed."""
        return f"{literal(self.prefix)} || ({self.text_sql})" if self.prefix else self.text_sql

    def row(self, key: Any, text: str) -> Row:
        """Return a row to embed, given its key and its text without the prefix."""
        if isinstance(key, str) and REPLACED in key:
            raise Stop(f"the key {key!r} is not valid UTF-8, and could not be found again. Exclude it with --where.")
        return Row(key, text, digest_of(self.prefix + text))

    @classmethod
    def resolve(cls, db: AnyDatabase, settings: Settings) -> Source:
        """Return the source of the settings; raise UsageError if table, key, columns or condition are wrong."""
        table = db.find_table(settings.table)
        if not table.exists:
            tables = listed(name for (name,) in db.query(db.catalogue.table_names))
            raise UsageError(f'the database has no table "{settings.table}". It has: {tables}. Give --table NAME.')
        columns = db.columns(table)
        key = key_column(settings.id, columns, table.name)
        looks_at_texts = settings.action != "prune"
        recipe = recipe_for(settings, list(columns), table.name) if looks_at_texts else Recipe((), labelled=True)
        text = recipe.sql(lambda column: db.text_sql(column, columns[column].type), literal)
        # As a subquery, so that the names in the condition are the source's alone. The newline ends a comment.
        names = ", ".join(map(quoted, columns))  # no *, which asks for the right to read all columns
        rows = f"(SELECT {names} FROM {table.sql} WHERE ({settings.where}\n))" if settings.where else table.sql
        is_referable = table.is_table and columns[key].is_unique
        source = cls(table, key, columns[key].type, is_referable, recipe, text, settings.row_prefix, rows)
        if settings.where:
            try:
                db.query(f"SELECT 1 FROM {rows} AS s LIMIT 0")
            except (Stop, db.driver_error) as error:  # the second within a transaction
                raise UsageError(
                    f"--where {settings.where!r} is not a condition on {table.name}: {error} "
                    f"It has the columns {listed(columns)}."
                ) from None
        check_key(db, source)
        return source


def key_column(given: str | None, columns: dict[str, Column], table: str) -> str:
    """Return the key column: the one given, else the primary key, else id."""
    if given:
        return column_of(given, columns, table)
    primary = primary_key(columns)
    key = primary[0] if len(primary) == 1 else match("id", columns)
    if key is None:
        raise UsageError(
            f'"{table}" has no primary key of one column, and no column id. '
            f"Say which column tells its rows apart, with --id COLUMN: {listed(columns)}. If none does, make a view; "
            f"in SQLite: CREATE VIEW v AS SELECT rowid AS id, * FROM {quoted(table)}"
        )
    return key


def recipe_for(settings: Settings, columns: list[str], table: str) -> Recipe:
    """Return the recipe for a row's text, by --text, --columns or the names of the columns."""
    if settings.text:
        return template_recipe(settings.text, columns, table)
    return columns_recipe(settings.columns, columns, table) if settings.columns else default_recipe(columns, table)


def check_key(db: AnyDatabase, source: Source) -> None:
    """Raise UsageError if the key does not tell the rows apart."""
    key, name = quoted(source.key), f'the key "{source.key}" of "{source.table.name}"'
    if re.search(r"\[\]$|^(bytea|jsonb?)$", source.key_type):
        raise UsageError(
            f"{name} is of the type {source.key_type}, whose values have no one form as text. "
            "Give --id COLUMN, of numbers, texts, UUIDs or dates."
        )
    rows = f"{source.from_sql} AS s"
    if source.is_referable:  # NULL is the only value that may stand in several rows
        rows += f" WHERE {key} IS NULL"
    for (value,) in db.query(f"SELECT {key} FROM {rows} GROUP BY 1 HAVING count(*) > 1 OR {key} IS NULL LIMIT 1"):
        why = "some are without a value" if value is None else f"{value!r} stands in several rows"
        raise UsageError(
            f"{name} does not tell the rows apart: {why}. Give --id COLUMN; or, without --out-column, exclude rows "
            "with --where."
        )


OWN_COLUMNS = ("embedding", "model", "text_sha256", "updated_at", "provenance")  # of a target as it is created


class Target(NamedTuple):
    """The table, called e in SQL, or the source's own column that receives the vectors."""

    table: Table
    key: str
    columns: dict[str, str]  # by the names in OWN_COLUMNS, its own names, which differ for --out-column only
    belongs: bool  # whether it is for this source alone, so that a row the source does not have is gone for good
    is_column: bool = False
    exists: bool = False
    vector_kind: str = "vector"  # the name of the vectors' type
    dimensions: int = 0  # demanded by this type, 0 for any
    model: str | None = None  # of all vectors, as in Column

    def has(self, name: str) -> bool:
        """Whether it exists and has one of OWN_COLUMNS."""
        return self.exists and name in self.columns

    def column_sql(self, name: str) -> str:
        """Return the SQL of one of OWN_COLUMNS; NULL if the target lacks it."""
        if self.model and name == "model":
            return literal(self.model)
        return f"{'s' if self.is_column else 'e'}.{quoted(self.columns[name])}" if self.has(name) else "NULL"

    @property
    def has_vector_sql(self) -> str:
        """The condition that there is a vector."""
        return f"{self.column_sql('embedding')} IS NOT NULL"

    @property
    def vectors_sql(self) -> str:
        """The FROM clause for all vectors, also those of rows that the source does not show."""
        return f"{self.table.sql} AS {'s' if self.is_column else 'e'}"

    def notes(self, key: str, model: str) -> list[str]:
        """Return what a column cannot tell, and the SQL that helps."""
        table, column = self.table.sql, quoted(self.columns["embedding"])
        mark = f"UPDATE {table} SET {column} = NULL WHERE {quoted(key)} = ...;"
        notes = [f"Changed texts cannot be told in such a column. To have them embedded again, mark their rows: {mark}"]
        if self.model == "":
            declare = f"COMMENT ON COLUMN {table}.{column} IS {literal(f'embedgen: {model}')};"
            notes.append(f"Nor can the model. If all vectors are by {model}, have others refused: {declare}")
        return notes

    @classmethod
    def resolve(cls, db: AnyDatabase, source: Source, settings: Settings) -> Target:
        """Return the target of the settings; raise UsageError if it cannot be used."""
        if settings.out_column:
            return cls.in_source(db, source, settings.out_column)
        noun, given, schema = singular(source.table.name), settings.target, source.table.schema
        table = db.find_table(given or f"{noun}_embeddings", schema, anywhere=bool(given))
        if table == source.table or not table.is_table:
            raise UsageError(f'--target "{table.name}" is the table to read, or a view. Give another name.')
        is_usual = table[:2] == (schema, f"{noun}_embeddings")
        new = cls(table, f"{noun}_id", {name: name for name in OWN_COLUMNS}, is_usual)
        return new.as_found(db, source) if table.exists else new

    def as_found(self, db: AnyDatabase, source: Source) -> Target:
        """Return this target with the columns and the key that its existing table has."""
        name, described = self.table.name, db.columns(self.table)
        columns = {ours: ours for ours in OWN_COLUMNS if ours in described}
        if "text_sha256" not in columns:
            columns.pop("provenance", None)  # somebody else's table, with another meaning of the word
        others, primary = [column for column in described if column not in columns], primary_key(described)
        # A column with the usual name is the key, even if the primary key is another one.
        keys = [self.key] if self.key in others else primary if len(primary) == 1 else others
        if "embedding" not in columns or len(keys) != 1 or not described[keys[0]].is_unique:
            raise UsageError(
                f'"{name}" needs a column "embedding", and one column with a primary key or unique index to store '
                f"vectors under. It has: {listed(described)}. Give --target NAME."
            )
        belongs = self.belongs
        for theirs, column in db.query(db.catalogue.references, *self.table[:2], keys[0])[:1]:
            belongs = (theirs, column) == (source.table.name, source.key)
            if not belongs and source.table.is_table:
                raise UsageError(
                    f'"{name}" belongs to the table "{theirs}": its key refers to the column "{column}" of "{theirs}". '
                    f"Give --table {theirs} --id {column}, or --target NAME."
                )
        kind = db.vectors_of(described["embedding"].type)
        return Target(self.table, keys[0], columns, belongs, False, True, *kind)

    @classmethod
    def in_source(cls, db: AnyDatabase, source: Source, name: str) -> Target:
        """Return the target for --out-column."""
        if not source.table.is_table:
            raise UsageError(f'--out-column goes with a table; "{source.table.name}" is a view. Give --target NAME.')
        if not source.is_referable:  # whatever --where says: all rows with a key get its vector
            key = quoted(source.key)
            check_key(db, source._replace(from_sql=f"(SELECT {key} FROM {source.table.sql} WHERE {key} IS NOT NULL)"))
        described = db.columns(source.table)
        column = match(name, described)
        if column in [source.key, *source.recipe.columns]:
            raise UsageError(f'--out-column "{column}" is the key or part of the text. Give a column for the vectors.')
        new = cls(source.table, f"{singular(source.table.name)}_id", {"embedding": column or name}, True, True)
        if column is None:
            return new
        kind, dimensions = db.vectors_of(described[column].type)
        return new._replace(exists=True, vector_kind=kind, dimensions=dimensions, model=described[column].model)

    def create(self, db: AnyDatabase, source: Source, settings: Settings, dimensions: int) -> Target:
        """Return this target, created if it is a table that does not exist yet."""
        if self.exists or self.is_column:
            return self
        key, table = f"{quoted(self.key)} {db.type_name(source.key_type)} PRIMARY KEY", source.table
        if source.is_referable and db.value(db.catalogue.may_refer, table.schema, table.name, source.key):
            key += f" REFERENCES {table.sql}({quoted(source.key)}) ON DELETE CASCADE"
        columns = f"{key}, {db.target_columns.format(db.vector_type(dimensions))}"
        db.exclusively(lambda: db.create_table(self.table, columns))
        return self.resolve(db, source, settings)  # anew: another machine may have created it first


# Rows that are embedded again, to compare the server's vectors with the stored ones. Of the large sample up to twice as
# many, if they have letters outside ASCII: where a tenth of those differ, 32 would miss it once in 30 times.
SAMPLES, MANY_SAMPLES = 3, 32
ASCII = " etaoinshrdlucmfwypvbgkjqxz" + "".join(map(chr, range(1, 128)))  # the frequent ones first, for speed


class Coverage:
    """Which rows of a source have an embedding: SQL conditions, and what is asked of the database by them."""

    def __init__(self, db: AnyDatabase, source: Source, target: Target, settings: Settings) -> None:
        self.db, self.source, self.target, self.settings = db, source, target, settings
        stored, key, model = target.column_sql, f"e.{quoted(target.key)}", literal(settings.model)
        # In this order: SQLite takes the left side's affinity, and so can use the index of the target's key.
        self.join_on = f"{key} = {source.key_sql}"
        is_beside = target.exists and not target.is_column
        self.left_join = f" LEFT JOIN {target.vectors_sql} ON {self.join_on}" if is_beside else ""
        self.from_sql = f"{source.from_sql} AS s{self.left_join}"
        # The condition that a vector's row is gone from the table, not only hidden by --where.
        self.is_orphan = f"NOT EXISTS (SELECT 1 FROM {source.table.sql} AS s WHERE {source.key_sql} = {key})"
        self.dimensions_sql = db.dimensions.format(stored("embedding"))
        self.is_by = f"COALESCE({stored('model')}, {model}) = {model}"  # the vector is by this model or an unknown one
        current = f"{target.has_vector_sql} AND {self.is_by}"
        if target.has("text_sha256"):
            current += f" AND COALESCE({stored('text_sha256')} = {db.sha256.format(source.whole_text_sql)}, 1 = 0)"
        self.current_sql = current  # the condition that the row's present text has an embedding
        # With --force no embedding counts as existing. But if it changes the model, those by the new model do: an
        # interrupted run with --force has made them.
        self.starts_over = settings.force and not self.stored(self.differs_sql(0))
        self.exists_sql = "1 = 0" if self.starts_over else current
        # The same for a page of rows, as one look into the target's index for each row: Postgres might plan a join as a
        # merge, which walks that index from its beginning for each page.
        found = f"(SELECT 1 FROM {target.vectors_sql} WHERE {self.join_on} AND {current} LIMIT 1)"
        self.pending_sql = f"{found} IS NULL" if is_beside and not self.starts_over else f"NOT ({self.exists_sql})"
        # Whether the run replaces every vector of the target.
        self.replaces_all = settings.force and settings.limit is None and not settings.where and self.shows_all()

    def shows_all(self) -> bool:
        """Whether the source, without --where, shows the row of every vector in the target."""
        if self.target.belongs or not self.target.exists:
            self.db.query_all(f"SELECT 1 FROM {self.source.table.sql} LIMIT 0")  # raises Stop where rows are hidden
            return True
        return not self.db.query_all(f"SELECT 1 FROM {self.target.vectors_sql} WHERE {self.is_orphan} LIMIT 1")

    def count(self) -> tuple[int, int]:
        """Return the number of rows, and of those with an embedding."""
        counted = f"count(*), count(CASE WHEN {self.exists_sql} THEN 1 END)"
        return tuple(self.db.query(f"SELECT {counted} FROM {self.from_sql}")[0])

    def pending(self) -> Iterator[Row]:
        """Yield the rows without an embedding by ascending key; with --force all rows.

        They are read in pages, so that no statement is open, and no lock held, during requests.
        """
        above, after = "1 = 1", list[Any]()
        while found := self.db.query(page_sql(self, above, PAGE_ROWS), *after):
            yield from (self.source.row(key, text) for key, text in found)
            above, after = f"{self.source.key_sql} > {self.db.mark}1", [found[-1][0]]

    # All vectors of the target, also those of rows that the source does not show

    def differs_sql(self, dimensions: int) -> str:
        """Return the condition that a vector is by another model or has other dimensions (0: not known yet)."""
        stored = self.target.dimensions or self.dimensions_sql
        return f"NOT ({self.is_by})" + (f" OR {stored} <> {dimensions}" if dimensions else "")

    def comparable_sql(self, dimensions: int) -> str:
        """Return the condition that there is a vector by this model and of these dimensions (0: any)."""
        return f"{self.target.has_vector_sql} AND NOT ({self.differs_sql(dimensions)})"

    def stored(self, condition: str = "1 = 1") -> tuple[str, int] | None:
        """Return the model ("": unknown) and dimensions of any stored vector that fulfils a condition."""
        if not self.target.exists:
            return None
        found = self.db.query(f"""
            SELECT COALESCE({self.target.column_sql("model")}, ''), {self.dimensions_sql}
            FROM {self.target.vectors_sql} WHERE {self.target.has_vector_sql} AND ({condition}) LIMIT 1
        """)
        return tuple(found[0]) if found else None

    def check(self, dimensions: int = 0) -> None:
        """Raise UsageError or Stop if there is no column, or vectors by another model or dimensions (0: any) stay."""
        target, settings = self.target, self.settings
        if not target.exists:
            if dimensions and target.is_column:
                name, kind = target.columns["embedding"], self.db.vector_type(dimensions)
                change = f"ALTER TABLE {target.table.sql} ADD COLUMN {quoted(name)} {kind};"
                raise UsageError(f'"{target.table.name}" has no column "{name}". To add it, run: {change}')
            return
        if target.model and target.model != settings.model:
            raise UsageError(
                f'the comment of the column "{target.columns["embedding"]}" says that its vectors are by '
                f'"{target.model}", not by "{settings.model}". Give --model {target.model}, or another --out-column.'
            )
        self.db.query_all(f"SELECT 1 FROM {target.vectors_sql} LIMIT 0")  # raises Stop where rows are hidden
        other = None if self.replaces_all else self.stored(self.differs_sql(dimensions))
        if dimensions and target.dimensions not in (0, dimensions):
            other = other or ("", target.dimensions)
        if other:
            is_usage = settings.dimensions or other[0] not in ("", settings.model)
            raise (UsageError if is_usage else Stop)(self.mismatch(other, dimensions))

    def mismatch(self, other: tuple[str, int], dimensions: int) -> str:
        """Return the error's words for a stored vector, given by model and dimensions, of another vector space."""
        theirs = f'of the model "{other[0]}" ' if other[0] else ""
        ours = f'"{self.settings.model}"' + (f" with {dimensions} dimensions" if dimensions else "")
        if not self.stored():
            column = f"{self.target.table.sql} ALTER COLUMN {quoted(self.target.columns['embedding'])}"
            return (
                f'"{self.target.table.name}" takes vectors with {other[1]} dimensions, not those of {ours}. '
                f"Give another --model, or run: ALTER TABLE {column} TYPE {self.target.vector_kind}({dimensions});"
            )
        return (
            f'"{self.target.table.name}" holds vectors {theirs}with {other[1]} dimensions, '
            f"which do not compare with those of {ours}. Give --target NAME for a second table; or the --server, "
            "--model and --dimensions of the first; or --force, without --limit and --where, for all rows again, if "
            "the column takes their vectors."
        )

    # What --status, --search, --similar and --prune ask

    def tally(self, condition: str) -> tuple[int, int, int, int]:
        """Return how many rows there are, have a vector, have one that fulfils a condition, and are up to date then."""
        found = self.db.query(f"""
            SELECT count(*), count({self.target.column_sql("embedding")}), count(CASE WHEN {condition} THEN 1 END),
                count(CASE WHEN {condition} AND {self.current_sql} THEN 1 END)
            FROM {self.from_sql}""")
        return tuple(found[0])

    def vectors(self) -> tuple[int, int, int, Any]:
        """Return the number of vectors, of those whose row is gone; their dimensions (0: several), the last save."""
        target = self.target
        if not target.exists:
            return 0, 0, 0, None
        [(total, gone, least, most, updated)] = self.db.query(f"""
            SELECT count(*), count(CASE WHEN {"1 = 0" if target.is_column else self.is_orphan} THEN 1 END),
                min({self.dimensions_sql}), max({self.dimensions_sql}), max({target.column_sql("updated_at")})
            FROM {target.vectors_sql}""")
        return total, gone, most if least == most and most else target.dimensions, updated

    def check_searchable(self, dimensions: int = 0) -> None:
        """Raise Stop without any vectors, UsageError without any by this model and of these dimensions (0: any)."""
        if self.stored(self.comparable_sql(dimensions)):
            return
        if (other := self.stored()) is None:
            raise Stop(
                f'there are no embeddings yet in "{self.target.table.name}". '
                "Run the same command without --search or --similar first, which fills it."
            )
        raise UsageError(self.mismatch(other, dimensions))

    def row_named(self, key: str) -> tuple[Any, bytes | None, str]:
        """Return key, vector and model ("": unknown) of the row whose key as text is `key`, or raise UsageError."""
        source, target = self.source, self.target
        # In SQLite a column of no type may hold both 7 and '7': take the text, which sorts after the number.
        sql = f"""
            SELECT {source.key_sql}, {target.column_sql("embedding")}, {target.column_sql("model")}
            FROM {source.table.sql} AS s{self.left_join} WHERE CAST({source.key_sql} AS text) = {self.db.mark}1
            ORDER BY {source.key_sql} DESC
        """
        for found, vector, model in self.db.query(sql, key):
            return found, self.db.read_vector(vector), model or ""
        raise UsageError(f'"{source.table.name}" has no row with the {source.key} {key}. Give another --similar KEY.')

    def nearest(self, vector: bytes, top: int, but: Any = None) -> list[dict[str, Any]]:
        """Return the rows nearest to a vector, as in --json: nearest first, ties by key, without the row `but`.

        The database's order is good to five digits, and an index may miss rows. So it gives some more than are wanted,
        which are put in order here; rounded, because multiples of one vector differ in the last digits.
        """
        rows = f"FROM {self.from_sql} WHERE {self.comparable_sql(len(vector) // 4)}"
        found = self.db.nearest(self, rows, vector, 2 * top + 20)
        near = [(alike, key) for key, other in found if key != but and (alike := cosine(vector, other)) >= -2]  # no NaN
        near.sort(key=lambda one: -round(one[0], 12))
        names = list(dict.fromkeys(self.source.recipe.columns))
        row = f"{self.source.from_sql} AS s WHERE {self.source.key_sql} = {self.db.mark}1"
        sql = f"SELECT {', '.join(map(quoted, names))} FROM {row}"
        return [
            {"rank": rank, "similarity": round(similarity, 6), "key": key, "columns": dict(zip(names, values))}
            for rank, (similarity, key) in enumerate(near[:top], 1)
            for values in self.db.query(sql, key) or [()]  # of a row that is gone
        ]


class Provenance:
    """The models and server versions that made the vectors: rows of a table beside the target, which has their ids."""

    def __init__(self, coverage: Coverage, profile: ServerProfile) -> None:
        """`profile` is that of this run's servers, an empty one if it embeds nothing."""
        self.db, self.target, self.coverage, self.profile = coverage.db, coverage.target, coverage, profile
        self.table = Table(self.target.table.schema, PROVENANCE_TABLE, exists=False)
        self.ids: dict[str, int | None] = {}  # of this run's own rows, by fit
        self.is_compared = False  # whether this run has compared its vectors with stored ones of another version
        self.id_sql, model = self.target.column_sql("provenance"), literal(coverage.settings.model)
        this, self.weights = literal(profile.digest), literal(profile.weights or profile.digest)
        columns = self.db.columns(self.table) if self.target.has("provenance") else {}
        # The older form of the table, without versions, is read until the next save renews it.
        added = "version, weights" if "version" in columns else "NULL AS version, NULL AS weights"
        rows = f"SELECT id, target, model, digest, prefix, fit, accepted, {added} FROM {self.table.sql}"
        none = """SELECT 0 AS id, '' AS target, '' AS model, '' AS digest, '' AS prefix, '' AS fit, 0 AS accepted,
            '' AS version, '' AS weights"""
        # The target's rows, p, of this model and version or not. A server that tells no digest may be at work beside
        # one that does: their vectors go together.
        self.rows_sql = f"""(
            SELECT made.*, NOT (is_this OR '' IN (digest, {this})) AS is_another FROM (
                SELECT r.*, r.digest = {this} OR COALESCE(r.weights, r.digest) = {self.weights} AS is_this
                FROM ({rows if columns else none}) AS r WHERE r.target = {literal(self.target.table.name)}
            ) AS made
        ) AS p"""
        self.of_model = f"FROM {self.rows_sql} WHERE p.model = {model}"
        self.others = f"FROM {self.rows_sql} WHERE (p.model <> {model} OR p.is_another)"

    def check_version(self) -> None:
        """Raise Stop if another version of the model has made vectors, unless it was mixed with this one on purpose."""
        if self.coverage.replaces_all or self.coverage.settings.accept_drift or not self.target.exists:
            return
        # No EXISTS, for which Postgres may look through all of the target where the first vector will do.
        first = f"SELECT 1 FROM {self.target.vectors_sql} WHERE {self.id_sql} = p.id LIMIT 1"
        used = f"{self.of_model} AND ({first}) IS NOT NULL"
        is_mixed = f"p.accepted = 1 AND EXISTS (SELECT 1 {used} AND p.is_this AND p.accepted = 1)"
        if other := self.db.value(f"SELECT p.digest {used} AND p.is_another AND NOT ({is_mixed})"):
            raise Stop(
                f'"{self.target.table.name}" holds vectors of another version of "{self.coverage.settings.model}" '
                f"(digest {short_digest(other)}) than the server has now ({short_digest(self.profile.digest)}). Give "
                "--target NAME for a second table; or --force, without --limit and --where, for all rows again; or "
                "--accept-drift, if the two compare."
            )

    def samples(self, is_bare: bool) -> tuple[list[tuple[Any, str, bytes]], bool]:
        """Return rows to embed again (key, text, vector), and whether this is the large sample.

        Three rows by this version are enough if it has been compared with all others. Otherwise a large sample is to
        show a changed tokenizer: of a thousand texts, for each letter outside ASCII those with the largest share of
        such letters; and the longest text; and the shortest. `is_bare`: also rows without a vector.
        """
        db, source = self.db, self.coverage.source
        is_own = f"(p.digest = {literal(self.profile.digest)} AND p.version = {literal(self.profile.version)})"
        is_compared = db.value(f"""SELECT max(own) = 1 AND (min(accepted) = 1 OR count(*) = 1) FROM (
            SELECT max(CASE WHEN {is_own} THEN 1 ELSE 0 END) AS own, max(p.accepted) AS accepted
            {self.of_model} GROUP BY p.digest, p.version) AS made""")
        own = f"COALESCE({self.id_sql} IN (SELECT p.id {self.of_model} AND {is_own}), 1 = 0)"
        unlike = f"SELECT p.id {self.of_model} AND (p.fit <> 'whole' OR p.is_another)"
        whole = f"COALESCE({self.id_sql} NOT IN ({unlike}), 1 = 1) AND {self.coverage.current_sql}"
        key, text = source.key_sql, source.text_sql
        table = f"{source.rows_sql} AS s{self.coverage.left_join}"  # also of rows that --where does not show
        rows = f"{own} AND {whole} LIMIT {SAMPLES}"
        if is_many := is_bare or not is_compared:
            rows = f"""{key} IN (
                WITH sized AS (SELECT {key} AS key, {own} AS is_last, {self.target.column_sql("text_sha256")} AS random,
                    length({text}) AS size, {db.octets.format(text)} - length({text}) AS beyond
                    FROM {table} WHERE {f"{text} <> ''" if is_bare else whole}),
                likely AS (SELECT key, is_last, 1.0 * beyond / (size + 1) AS share FROM sized
                    ORDER BY is_last, beyond = 0, random LIMIT 1000),
                lettered AS (SELECT k.*, substr(ltrim({text}, {literal(ASCII)}), 1, 1) AS letter
                    FROM likely AS k JOIN {source.rows_sql} AS s ON {key} = k.key),
                ranked AS (SELECT *, row_number() OVER (PARTITION BY is_last, letter ORDER BY share DESC) AS rank
                    FROM lettered),
                placed AS (SELECT *, row_number() OVER (ORDER BY is_last, letter = '', rank, share DESC) AS place
                    FROM ranked)
                SELECT key FROM placed
                    WHERE place <= {MANY_SAMPLES - 2} OR letter <> '' AND place <= {2 * MANY_SAMPLES - 2}
                UNION SELECT key FROM (SELECT key FROM sized ORDER BY size LIMIT 1) AS shortest
                UNION SELECT key FROM (SELECT key FROM sized ORDER BY size DESC LIMIT 1) AS longest)"""
        found = db.query(f"""SELECT {key}, {text}, {"NULL" if is_bare else self.target.column_sql("embedding")}
            FROM {table} WHERE {rows}""")
        return [(key, text, db.read_vector(vector) or b"") for key, text, vector in found], is_many

    def id_of(self, fit: str) -> int | None:
        """Return the id to store with a vector of this run, None if the target has no place for it."""
        if fit not in self.ids:
            self.ids[fit] = None
            if self.target.has("provenance"):
                with contextlib.suppress(Forbidden):
                    self.ids[fit] = self.db.exclusively(lambda: self.record(fit))
        return self.ids[fit]

    def record(self, fit: str) -> int:
        """Record this run's model, version, prefix and fit, and return the row's id; within a transaction."""
        name, settings, profile = self.table.sql, self.coverage.settings, self.profile
        self.db.create_table(self.table, PROVENANCE_COLUMNS.format(self.db.identity))
        if "version" not in self.db.columns(self.table):
            for statement in self.db.renewal.format(name).split(";"):
                self.db.execute(statement)
        made = (self.target.table.name, settings.model, profile.digest, profile.version, settings.row_prefix, fit)
        names, values = "target, model, digest, version, prefix, fit", ", ".join(map(literal, made))
        same = f"SELECT id FROM {name} WHERE ({names}) = ({values})"
        self.db.execute(f"""INSERT INTO {name} ({names}, weights, accepted)
            SELECT {values}, {self.weights}, 0 WHERE NOT EXISTS ({same})""")
        if settings.accept_drift or self.is_compared:  # of this version, and of all that it is mixed with
            mixed = f"SELECT p.id {self.of_model} AND p.accepted = 0"
            self.db.execute(f"UPDATE {name} SET accepted = 1 WHERE id IN ({mixed})")
        return int(self.db.execute(same)[0][0])

    def origins(self) -> list[dict[str, Any]]:
        """Return what made the vectors of existing rows, as in --status --json, the most first."""
        names = ("model", "digest", "version", "prefix", "fit", "rows")
        found = self.db.query(f"""
            SELECT NULLIF({self.target.column_sql("model")}, ''), COALESCE(p.digest, ''), COALESCE(p.version, ''),
                COALESCE(p.prefix, ''), COALESCE(p.fit, ''), count(*)
            FROM {self.coverage.from_sql} LEFT JOIN {self.rows_sql} ON p.id = {self.id_sql}
            WHERE {self.target.has_vector_sql} GROUP BY 1, 2, 3, 4, 5 ORDER BY 6 DESC, 1, 2, 3, 4, 5""")
        return [dict(zip(names, row)) for row in found] if self.target.model or self.target.has("model") else []


LOCKED_ROWS = 100  # of the source at most, in one statement: other programs must not wait for long


class EmbeddingTable:
    """Saves the vectors of a run."""

    def __init__(self, provenance: Provenance, claims: Claims | Alone) -> None:
        self.coverage, self.provenance, self.claims = provenance.coverage, provenance, claims
        self.dimensions = provenance.profile.dimensions  # of every vector to be saved

    def save(self, embeddings: Embeddings) -> Iterator[tuple[int, int, list[tuple[Row, Embedding, str]]]]:
        """Save embeddings; yield for each transaction the number of rows saved, and of those deleted or changed since.

        And the rows that could not be saved: with the database's words if it refuses them, with none if other programs
        have locked them. To find a refused row, the batch is halved until it stands alone.
        """
        if not (self.coverage.target.dimensions or self.coverage.replaces_all):
            other = self.coverage.stored()
            if other and other[1] not in (None, self.dimensions):  # by another program, since the run began
                raise Stop(self.coverage.mismatch(other, self.dimensions))
        rows = [(row, embedding.vector, self.provenance.id_of(embedding.fit)) for row, embedding in embeddings]
        try:
            if len(rows) <= LOCKED_ROWS or not self.coverage.target.is_column:
                count, locked = self.claims.save(rows)
                unsaved = [(*embeddings[position], "") for position in locked]
                yield count, len(rows) - count - len(unsaved), unsaved
                return
        except RowsRefused as refusal:
            if len(rows) == 1:
                yield 0, 0, [(*embeddings[0], refusal.message)]
                return
        middle = len(rows) // 2
        yield from self.save(embeddings[:middle])
        yield from self.save(embeddings[middle:])

    def finish(self) -> None:
        """After a run over all rows: remove vectors of an earlier model, version or dimension."""
        coverage, target = self.coverage, self.coverage.target
        if not coverage.replaces_all:
            return
        others = f"(SELECT p.id {self.provenance.others})"
        stale = f"{coverage.differs_sql(self.dimensions)} OR {self.provenance.id_sql} IN {others}"
        if coverage.stored(stale):
            remove = f"DELETE FROM {target.vectors_sql}"
            if target.is_column:
                remove = f"UPDATE {target.vectors_sql} SET {quoted(target.columns['embedding'])} = NULL"
            coverage.db.query_all(f"{remove} WHERE {stale}")
        if self.provenance.id_of("whole"):  # there is a table
            with contextlib.suppress(Forbidden):
                coverage.db.query_all(f"DELETE FROM {self.provenance.table.sql} WHERE id IN {others}")


class Alone:
    """In place of Claims, in a run that shares its table with no other machine."""

    next_renewal = math.inf

    def __init__(self, coverage: Coverage) -> None:
        self.coverage, self.save = coverage, coverage.db.vector_writer(coverage)

    def pending(self, wanted: Callable[[], int]) -> Iterator[Row | None]:
        """Yield the rows to embed."""
        return self.coverage.pending()

    def settle(self, row: Row, failed: bool) -> None:
        """Do nothing: no other machine would try the row."""

    def heartbeat(self) -> tuple[int, int]:
        """Return that others have done nothing."""
        return 0, 0

    def close(self) -> None:
        """Do nothing: there is nobody to leave the work to."""


CLAIM_SECONDS = 6.0  # after which the claims of a machine that does not renew them go to others
RENEWAL_SECONDS = 1.0  # between two renewals, which also read what the other machines have done
CLAIM_WORK_SECONDS = 0.5  # of work that a machine claims at a time: slower machines claim less
SCAN_ROWS = 5_000  # of the source, embedded or not, that one statement scans: some ten milliseconds


class Claims:
    """Which machine works on which row, so that any number of them fill one Postgres table together.

    The claims table beside the target has a row for each machine, which the machine renews, and a row for each claimed
    key. Its key column has the key's own type: the database compares keys, not texts. A claim is valid as long as its
    machine is alive. The statement that saves a batch removes its claims. A row is settled if it has failed, was
    skipped, or was saved with --force: its claim stays until the last machine of the job is gone, so that no machine
    tries it again. No transaction stays open between two statements, and nothing depends on a session, which a pooler
    such as PgBouncer may share.
    """

    def __init__(self, db: Postgres, coverage: Coverage, digest: str) -> None:
        """Join the machines that fill a target.

        Raises Stop if they do so with another model, Forbidden if there is no claims table and none can be created.
        """
        self.db, self.coverage = db, coverage
        settings, target, source = coverage.settings, coverage.target, coverage.source
        name = f"{target.table.name}_{target.columns['embedding']}" if target.is_column else target.table.name
        self.table = Table(target.table.schema, db.cut(name, "_claims"), exists=False)
        self.key, self.key_type = quoted(target.key), db.type_name(source.key_type)
        self.machine = literal(os.urandom(8).hex())
        work = (settings.model, digest, source, target.columns, settings.dimensions, settings.option, settings.force)
        self.job = literal(digest_of(repr(work)).hex())
        self.space = f"{settings.model} {digest[:19]}"  # the vector space; no name has a blank in it
        self.claims, self.is_mine = f"{self.table.sql} AS c", f"c.machine = {self.machine}"
        self.until = f"now() + interval '{CLAIM_SECONDS} s'"
        # After a restart of Postgres every machine gets one claim period to renew.
        grace = f"greatest(m.expires, pg_postmaster_start_time() + interval '{CLAIM_SECONDS} s')"
        is_alive = f"m.{self.key} IS NULL AND m.expires <> '-infinity' AND {grace} > now()"
        self.live_machines = f"FROM {self.table.sql} AS m WHERE {is_alive}"
        # Whether a claim is valid. A new one is, for a while, by itself: a statement that began before its machine came
        # does not see that machine.
        self.is_good = f"(c.settled OR c.expires > now() OR c.machine IN (SELECT m.machine {self.live_machines}))"
        # The statement that saves also removes the claims; with --force it settles them, so that no row is done again.
        done = f"UPDATE {self.claims} SET settled = true" if settings.force else f"DELETE FROM {self.claims}"
        keys = "SELECT unnest($1::text[]) EXCEPT SELECT key FROM locked"
        of_batch = f"c.{self.key} = ANY (ARRAY({keys})::{self.key_type}[]) AND {self.is_mine}"
        # And counts at that moment, so that to a machine that joins no row is done and not yet counted.
        machine = f"{self.is_mine} AND c.{self.key} IS NULL"
        count = f"UPDATE {self.claims} SET saved = saved + (SELECT count(*) FROM saved) WHERE {machine}"
        also = f", released AS ({done} WHERE {of_batch}), counted AS ({count})"
        self.write = db.vector_writer(coverage, also)
        self.began, self.saved = time.monotonic(), 0  # rows, by this machine
        # Claimed keys: None while the row is being worked on; whether it has failed, until the database is told.
        self.held: dict[Any, bool | None] = {}
        self.peers = (0, 0)  # rows that other machines have saved since this one began, and rows that failed there
        self.others_at_work = self.abandoned = 0  # claims of other machines that are alive, and of dead ones
        self.next_renewal, self.saved_before = 0.0, 0
        db.exclusively(self.join)
        # Rows saved before count as existing, unless --force lets no embedding count.
        self.saved_before = 0 if coverage.starts_over else self.peers[0]

    def join(self) -> None:
        """Create the claims table if need be, and add this machine; within a transaction."""
        db = self.db
        if not db.columns(self.table):
            columns = f"""{self.key} {self.key_type} UNIQUE, job text NOT NULL, machine text NOT NULL,
                settled boolean NOT NULL DEFAULT false, failed boolean NOT NULL DEFAULT false, expires timestamptz,
                space text, saved bigint"""  # the last two of a machine
            db.create_table(self.table, columns)
            db.execute(f"CREATE INDEX ON {self.table.sql} (machine) WHERE failed OR NOT settled")
        same = "(starts_with(m.space, $1) OR starts_with($1, m.space))"  # an unknown digest goes with any
        for (other,) in db.execute(f"SELECT m.space {self.live_machines} AND NOT {same}", self.space):
            raise Stop(
                f'another run fills "{self.coverage.target.table.name}" with vectors of the model {other}, which do '
                f"not compare with those of {self.space}. Wait for its end, or give --target NAME."
            )
        self.forget_ended_jobs()
        self.renew()

    def forget_ended_jobs(self) -> None:
        """Remove the rows of jobs without a live machine."""
        self.db.execute(f"DELETE FROM {self.claims} WHERE c.job NOT IN (SELECT m.job {self.live_machines})")

    def pending(self, wanted: Callable[[], int]) -> Iterator[Row | None]:
        """Yield the rows that this machine claims; None if there is none right now, but other machines may leave some.

        `wanted` returns how many rows the next batch is to have. It ends after a scan of the whole table
        when no other machine is at work and dead machines have left no claims but those, counted by `ignored`, that the
        last scan did not take over because their rows are not pending.
        """
        ignored = 0
        while True:
            yield from self.scan(wanted)
            self.renew()  # for the latest counts of the others
            while self.others_at_work and self.abandoned <= ignored:
                ignored = self.abandoned
                yield None  # until the next heartbeat
            if self.abandoned <= ignored:
                return
            ignored = self.abandoned

    def scan(self, wanted: Callable[[], int]) -> Iterator[Row]:
        """Yield pending rows, claimed in the order of their keys, from the beginning of the table to its end."""
        source, after, bound = self.coverage.source, None, None
        # The key that is SCAN_ROWS rows above another, or above the beginning; none if there are fewer.
        next_bound = f"""
            SELECT {source.key_sql} FROM {source.from_sql} AS s WHERE {source.key_sql} > $1 OR $1 IS NULL
            ORDER BY 1 OFFSET {SCAN_ROWS - 1}
        """
        while True:
            if after == bound:
                bound = self.db.value(next_bound, after)
            rate = self.saved / max(time.monotonic() - self.began, 1.0)
            count = max(wanted(), int(rate * CLAIM_WORK_SECONDS))
            found = self.claim(after, bound, min(count, PAGE_ROWS))
            rows = [source.row(key, text) for key, text, is_mine in found if is_mine and key not in self.held]
            self.held.update((row.key, None) for row in rows)
            self.heartbeat()
            yield from rows
            if not found and bound is None:
                return
            after = found[-1][0] if found else bound

    def claim(self, after: Any, bound: Any, count: int) -> list[Any]:
        """Claim the next pending and unclaimed rows between two keys.

        Returns for each candidate its key, its text, and whether it is ours: another machine may have been faster.
        """
        key = self.coverage.source.key_sql
        within = f"({key} > $1 OR $1 IS NULL) AND ({key} <= $2 OR $2 IS NULL)"
        # A claim of ours that we do not know of comes from a statement whose answer was lost: it is made again.
        taken = f"({self.is_good} AND (c.settled OR NOT {self.is_mine}))"
        is_free = f"(SELECT c.job FROM {self.claims} WHERE c.{self.key} = {key} AND {taken} LIMIT 1) IS NULL"
        page = page_sql(self.coverage, f"{within} AND {is_free}", count)
        sql = f"""
            WITH page AS MATERIALIZED ({page}),
            claimed AS (
                INSERT INTO {self.claims} ({self.key}, job, machine, expires)
                SELECT key, {self.job}, {self.machine}, {self.until} FROM page ORDER BY key
                ON CONFLICT ({self.key}) DO UPDATE SET job = excluded.job, machine = excluded.machine,
                    expires = excluded.expires, settled = false, failed = false
                WHERE NOT {taken} RETURNING c.{self.key} AS key
            )
            SELECT key, text, key IN (SELECT key FROM claimed) FROM page ORDER BY key
        """
        return self.db.query(sql, after, bound)

    def heartbeat(self) -> tuple[int, int]:
        """Renew this machine's claims if it is time; return `peers`."""
        if time.monotonic() >= self.next_renewal:
            self.renew()
        return self.peers

    def renew(self) -> None:
        """Renew this machine's claims, settle its rows, and read what the other machines have done."""
        at_work, ours = f"c.{self.key} IS NOT NULL AND NOT c.settled", f"c.job = {self.job}"
        sql = f"""
            WITH settled AS (
                UPDATE {self.claims} SET settled = true, failed = u.failed::boolean
                FROM json_each_text($1::json) AS u (key, failed)
                WHERE c.{self.key} = u.key::{self.key_type} AND {self.is_mine}
            ),
            alive AS (
                UPDATE {self.claims} SET expires = {self.until}, saved = $2
                WHERE c.{self.key} IS NULL AND {self.is_mine} RETURNING 1
            ),
            again AS (
                INSERT INTO {self.table.sql} (job, machine, space, expires, saved)
                SELECT {self.job}, {self.machine}, $3, {self.until}, $2 WHERE NOT EXISTS (SELECT 1 FROM alive)
            )
            SELECT COALESCE(sum(c.saved) FILTER (WHERE {ours}), 0)::bigint,
                count(*) FILTER (WHERE {ours} AND c.failed),
                count(*) FILTER (WHERE {at_work} AND {self.is_good}),
                count(*) FILTER (WHERE {at_work} AND NOT {self.is_good})
            FROM {self.claims} WHERE (c.failed OR NOT c.settled) AND NOT {self.is_mine}
        """
        told = {str(key): failed for key, failed in self.held.items() if failed is not None}
        settled = json.dumps(told, ensure_ascii=False)  # escapes would need a database in UTF-8
        saved, failures, self.others_at_work, self.abandoned = self.db.query(sql, settled, self.saved, self.space)[0]
        self.peers = (saved - self.saved_before, failures)
        self.held = {key: None for key, failed in self.held.items() if failed is None}
        self.next_renewal = time.monotonic() + RENEWAL_SECONDS

    def settle(self, row: Row, failed: bool) -> None:
        """Mark a row as failed or skipped, so that no machine of this job tries it again."""
        self.held[row.key] = failed
        self.saved += not failed  # other machines count a skipped row as done

    def save(self, vectors: Vectors) -> tuple[int, list[int]]:
        """Save rows with their vectors and provenance, as a VectorWriter; the locked ones stay claimed."""
        count, locked = self.write(vectors)
        self.saved += count
        for position, (row, _, _) in enumerate(vectors):
            if position not in locked:
                self.held.pop(row.key, None)
        return count, locked

    def close(self) -> None:
        """Leave the remaining work to the others at once; if Postgres is away, they wait for the claims to expire."""
        if not self.db.connection.closed:
            with contextlib.suppress(Stop):
                self.renew()
                self.db.exclusively(self.leave)

    def leave(self) -> None:
        """Mark this machine as gone, and empty the table if it was the last; within a transaction."""
        self.db.execute(f"UPDATE {self.claims} SET expires = '-infinity' WHERE {self.is_mine}")
        self.forget_ended_jobs()
        if not self.db.execute(f"SELECT 1 FROM {self.claims} LIMIT 1"):
            # Frees the dead rows, too, if this user may, and if nobody reads the table, as pg_dump does for hours.
            with contextlib.suppress(self.db.driver_error), self.db.begin():
                self.db.execute(f"LOCK TABLE {self.table.sql} NOWAIT")
                self.db.execute(f"TRUNCATE {self.table.sql}")


AnyDatabase = Union[SQLite, Postgres]


def open_database(settings: Settings, stopping: Callable[[], bool]) -> AnyDatabase:
    """Return the database of --database; `stopping` returns whether the run is to stop."""
    path = settings.database.removeprefix("sqlite:///")
    if path != settings.database:
        return SQLite(path, settings.reads_only, bool(settings.load), stopping)
    return Postgres(settings.database, settings.reads_only, stopping)


# =============================== report ===============================


PEER_FAILURE = "failed on another machine, whose log has the reason"


class Counts:
    """The counts of rows by outcome; at the end generated + skipped + failed is the total."""

    def __init__(self, rows: int, existing: int, limit: int | None) -> None:
        self.rows = rows  # of the source, less those that were deleted during the run
        self.existing, self.limit = existing, limit
        self.generated = 0
        self.cut = self.damaged = 0  # of those generated
        self.too_long = 0  # skipped for their length
        self.peers = 0  # generated by other machines during this run, so skipped by this one
        self.reasons: Counter[str] = Counter()  # for failures

    @property
    def skipped(self) -> int:
        """Rows that this run does not embed."""
        return self.existing + self.peers + self.too_long

    @property
    def failed(self) -> int:
        """Rows that get no embedding, here or on another machine."""
        return sum(self.reasons.values())

    @property
    def done(self) -> int:
        """Rows whose outcome is known."""
        return self.generated + self.skipped + self.failed

    @property
    def left(self) -> int:
        """Rows that have no embedding yet and have not failed."""
        return max(self.rows - self.done, 0)

    @property
    def total(self) -> int:
        """Rows that this run has to process; a failed row does not count towards --limit."""
        return self.done + (self.left if self.limit is None else min(self.left, self.limit - self.generated))

    def set_peers(self, generated: int, failed: int) -> None:
        """Set how many rows other machines have generated so far, and how many failed there."""
        self.reasons[PEER_FAILURE] = failed
        # Two machines may have generated the same row, if the claims of one have expired.
        self.peers = 0
        self.peers = min(generated, self.left)

    def account_for_rest(self, rows: int) -> None:
        """At the end of the table, count the rows without a known outcome as generated by other machines, or, if the
        table has fewer `rows` now, as deleted."""
        self.rows = min(self.rows, rows)
        self.peers += self.left


RULE = "=" * 60
PIPE_BAR = 8  # cells of the bar where there is no terminal
REDRAW_SECONDS, PIPE_SECONDS = 0.1, 30.0  # between two progress lines, on a terminal and elsewhere
PATIENT_SECONDS = 2.0  # after which a person at a terminal is told what is waited for
EIGHTHS = " ▏▎▍▌▋▊▉█"
# Substitutes for encodings without these characters; any other character they lack becomes a question mark.
PLAIN = str.maketrans("✓⊘✗✂…·▏▎▍▌▋▊▉█", "+-x<.-########")


def bar(share: float, cells: int) -> str:
    """Return a bar of `cells` cells, filled to `share` in steps of an eighth of a cell."""
    full, eighth = divmod(int(share * cells * 8), 8)
    return ("█" * full + EIGHTHS[eighth]).ljust(cells)[:cells]


def percent_of(share: float) -> int:
    """Return a share in whole per cent, rounded down: 29 of 100 are 29, though 0.29 * 100 is less."""
    return int(share * 100 + 1e-9)


def clock(seconds: float) -> str:
    """Return a duration as 00:10 or 1:02:03."""
    hours, rest = divmod(int(seconds), 3600)
    return (f"{hours}:" if hours else "") + f"{rest // 60:02}:{rest % 60:02}"


def width_of(text: str) -> int:
    """Return the width of a text in terminal cells."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def progress_line(counts: Counts, elapsed: float, columns: int | None, start_up: float = 0.0) -> str:
    """Return the progress line, fitted to a terminal's columns, or for a pipe (None).

    The time left is extrapolated from the rows that this run has worked on and the seconds `elapsed` since the start,
    less the `start_up` before the first row.
    """
    worked, left = counts.done - counts.existing, counts.total - counts.done
    share = counts.done / counts.total if counts.total else 1.0
    eta = clock((elapsed - start_up) / worked * left) if worked else "?" if left else "00:00"
    tally = f"✓={counts.generated}, ⊘={counts.skipped}, ✗={counts.failed}"
    figures = f"{counts.done}/{counts.total} [{clock(elapsed)}<{eta}, {tally}]"
    head = f"Generating embeddings: {percent_of(share):3}%"
    room = (columns or 0) - 3  # so that ^C, which the terminal echoes, does not wrap the line
    cells = room - len(f"{head}|| {figures}") if columns else PIPE_BAR
    return f"{head}|{bar(share, cells)}| {figures}" if cells >= 4 else figures[: max(room, 1)]


def complain(text: str) -> None:
    """Write one line to standard error, if there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class Console:
    """Standard output that survives limited encodings, closed pipes and full disks."""

    def __init__(self, out: TextIO | None, interrupt: Interrupt) -> None:
        self.out, self.interrupt = out, interrupt
        self.verdict: int | None = None  # the exit code, once it is settled: nothing later changes it
        self.is_lost = False  # whether output was lost
        self.drawn = 0  # length of the line that can be redrawn in place
        encoding = getattr(out, "encoding", None) or "utf-8"
        self.replaced = PLAIN if b"?" in "✓█".encode(encoding, "replace") else {}
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="replace")

    @property
    def columns(self) -> int | None:
        """The terminal's present width, None without a terminal."""
        return os.get_terminal_size(self.out.fileno()).columns or 80 if self.out and self.out.isatty() else None

    def write(self, text: str) -> None:
        """Write and flush. A closed pipe ends the run; any other error only loses the output."""
        if self.out is None:
            return
        try:
            self.out.write(text.translate(self.replaced))
            self.out.flush()
        except (OSError, ValueError) as error:
            self.out = sys.stdout = None  # or Python would flush it at exit, and fail again
            if getattr(error, "errno", 0) in (errno.EPIPE, errno.EINVAL):  # the latter on Windows
                self.verdict = self.interrupt.code = self.interrupt.code or EXIT_SIGPIPE
            else:
                self.is_lost = True
                complain(f"warning: cannot write to standard output ({describe(error)}); going on without it")

    def lines(self, *texts: str) -> None:
        """Print lines below the progress line, which stays as it is."""
        self.write("\n" * bool(self.drawn) + "".join(text + "\n" for text in texts))
        self.drawn = 0

    def redraw(self, text: str) -> None:
        """Print the text over the last one; below it, without a terminal."""
        if self.columns is None:
            self.lines(text)
        else:  # with blanks over the ^C that the terminal may have echoed
            self.write("\r" + text + " " * (self.drawn + 2 - len(text)))
            self.drawn = len(text)


class Report:
    """Prints a run's head, progress and summary, the result of another action, or one JSON object.

    The noun for a row comes from `table`; `started` is the program's start by time.monotonic().
    """

    def __init__(
        self, console: Console, settings: Settings, log: Log, table: str, started: float, loaded: dict[str, Any]
    ) -> None:
        self.console, self.settings, self.log, self.started = console, settings, log, started
        self.loaded = loaded
        table = one_line(table).replace("_", " ").strip()
        noun = one_line(settings.noun or singular(table))
        self.noun, self.nouns = noun.lower(), (plural(noun) if settings.noun else table).lower()
        self.title = f"{noun.title()} Embedding"
        silent = settings.quiet or settings.json
        self.screen = Console(None, console.interrupt) if silent else console  # for all that comes before the result
        self.start_up = 0.0  # seconds until the first row
        self.shown = started  # time of the last progress line
        self.elapsed: float | None = None  # seconds until the last row was done
        self.said_stopping = False

    def give(self, facts: dict[str, Any], lines: Iterable[str], code: int = EXIT_DONE) -> None:
        """Print the result: with --json as one object, else its lines that are not empty."""
        if self.settings.json:
            text = json.dumps(facts, default=str)
            # Python writes NaN and Infinity, which JSON does not have: they become strings.
            lines = [json.dumps(json.loads(text, parse_constant=lambda name: str(float(name))))]
        self.console.verdict = self.console.verdict or code
        self.console.lines(*filter(None, lines))
        if self.console.is_lost and self.settings.action != "generate":  # whose result is in the database
            self.console.verdict = EXIT_STOPPED

    def start(self, counts: Counts) -> None:
        """Print the head of the report."""
        self.shown = time.monotonic()
        self.start_up = self.shown - self.started
        self.screen.lines(
            RULE,
            f"🧠 {self.title} Generator",
            RULE,
            f"📊 Total {self.nouns} to process: {counts.total}",
            f"⚡ Workers/Concurrent: {self.settings.concurrent or 'auto'}",
            f"🔄 Skip existing: {'No' if self.settings.force else 'Yes'}",
            f"📝 Detailed logs: {self.log.shown}",
            "",
        )

    def show_waiting(self) -> None:
        """Print on a terminal that the first answer is waited for."""
        waited = time.monotonic() - self.started
        if self.screen.columns and waited >= PATIENT_SECONDS:
            self.screen.redraw(f"Waiting for the server, which may be loading the model [{clock(waited)}]")

    def update(self, counts: Counts) -> None:
        """Print the progress line if it is time, and once that the run is stopping."""
        if self.screen.interrupt.code and self.screen.columns and not self.said_stopping:
            self.said_stopping = True
            self.screen.redraw(f"Stopping within {GRACE:.0f} s. Ctrl-C again ends at once.")
            self.screen.lines()
        if self.due() <= 0:
            self.show(counts)

    def due(self) -> float:
        """Return the seconds until the next progress line."""
        return self.shown + (REDRAW_SECONDS if self.screen.columns else PIPE_SECONDS) - time.monotonic()

    def show(self, counts: Counts) -> float:
        """Print the progress line; return the seconds since the program's start."""
        self.shown = time.monotonic()
        elapsed = round(self.shown - self.started, 2)
        self.screen.redraw(progress_line(counts, elapsed, self.screen.columns, self.start_up))
        return elapsed

    def end(self, counts: Counts) -> float:
        """Return the run's seconds until its last row; print the final progress line when first called."""
        if self.elapsed is None:
            self.elapsed = self.show(counts)
            self.screen.lines("", "💾 Saving embeddings to database...")
        return self.elapsed

    def show_index(self, share: float) -> None:
        """Print the share of the index that is built; without a terminal only when it is complete."""
        if self.screen.columns or share == 1:
            self.screen.redraw(f"🔎 Building the index: {percent_of(share):3}%|{bar(share, PIPE_BAR)}|")

    def finish(self, counts: Counts, code: int, error: str = "") -> None:
        """Print the summary; `code` is the run's exit code from now on."""
        elapsed, settings = self.end(counts), self.settings
        speed = counts.generated / elapsed if elapsed else 0.0
        facts: dict[str, Any] = {
            "total": counts.done, "generated": counts.generated, "skipped": counts.skipped, "failed": counts.failed,
            "left": counts.left, "cut": counts.cut, "too_long": counts.too_long, "seconds": elapsed,
            "rate": round(speed, 2), "exit_code": code, "failures": +counts.reasons, "model": settings.model,
            "log": self.log.shown,
        }  # fmt: skip
        rare = {"not_utf8": counts.damaged, "error": error, "loaded": self.loaded}
        facts.update((name, value) for name, value in rare.items() if value)
        complete = code in (EXIT_DONE, EXIT_FAILED_ROWS)
        lines = [
            RULE if settings.quiet else "\n" + RULE,
            f"✅ {self.title} Generator Completed" if complete else f"⏹️  {self.title} Generator Stopped",
            RULE,
            f"📊 Total {self.nouns} processed: {counts.done}",
            f"   ✓  Successfully generated: {counts.generated}",
            f"   ✂  Cut to the model's context: {counts.cut}" if counts.cut else "",
            f"   !  With U+FFFD for bytes that are not UTF-8: {counts.damaged}" if counts.damaged else "",
            f"   ⊘  Skipped (already exist): {counts.skipped}",
            f"   ✂  Skipped for their length: {counts.too_long}" if counts.too_long else "",
            f"   ✗  Failed: {counts.failed}",
            "" if complete else f"   …  Left {'as before' if settings.force else 'for the next run'}: {counts.left}",
            f"⏱️  Time elapsed: {elapsed:.2f} seconds",
            f"⚡ Average speed: {speed:.2f} embeddings/second",
            RULE,
        ]
        if settings.quiet and counts.failed:  # this is all that a mail from cron will say
            lines += [f"{times} failed: {one_line(reason)}" for reason, times in (+counts.reasons).most_common(5)]
            lines.append(f"Each {self.noun}'s reason is in the log: {self.log.shown}")
        self.give(facts, [] if settings.quiet and code == EXIT_DONE else lines, code)


LOG_NAMES = {"async": "generate_embeddings_async", "process": "generate_embeddings"}
LOG_FORMAT = "%(asctime)s - %(processName)s - %(levelname)s - %(message)s"
LOG_BYTES, LOG_FILES = 10_000_000, 5  # size at which a log is rotated, and rotated files kept
LOGS_AT_ONCE = 100  # runs that can have a log of their own in one folder at the same time


class Log:
    """The log of a run; there is none in a run that only reads, or if it cannot be written."""

    def __init__(self, settings: Settings) -> None:
        import logging

        self.logger = logging.Logger("embedgen", logging.DEBUG if settings.verbose else logging.INFO)
        self.debug, self.info = self.logger.debug, self.logger.info
        self.warn, self.error = self.logger.warning, self.logger.error
        self.folder = os.path.realpath(settings.log_dir or os.path.join(os.path.dirname(__file__), "logs"))
        self.shown = "none"  # the file's name for people
        self.cleanup = contextlib.ExitStack()
        self.logger.disabled = settings.reads_only
        if not settings.reads_only:
            try:
                self.open(LOG_NAMES[settings.engine])
            except OSError:
                self.give_up()

    def open(self, name: str) -> None:
        """Open the first of NAME.log, NAME.2.log, ... that no other run writes: only one process may rotate a log.

        Without locks in that folder, open the first.
        """
        import logging.handlers
        import sqlite3

        os.makedirs(self.folder, exist_ok=True)
        for free in (name, *(f"{name}.{number}" for number in range(2, LOGS_AT_ONCE))):
            with contextlib.suppress(sqlite3.Error):
                self.cleanup.enter_context(contextlib.closing(open_sqlite(os.path.join(self.folder, f".{free}.lock"))))
                name = free
                break
        path = os.path.join(self.folder, f"{name}.log")
        handler: Any = logging.handlers.RotatingFileHandler(
            path, "a", LOG_BYTES, LOG_FILES, "utf-8", errors="backslashreplace"
        )
        self.cleanup.callback(handler.close)

        def put_aside(log: str, target: str) -> None:
            try:
                os.rename(log, target)
            except OSError:  # on Windows, while another program has it open: the log grows on
                handler.maxBytes = 0

        formatter: Any = logging.Formatter(LOG_FORMAT)
        formatter.formatMessage = lambda record: one_line(LOG_FORMAT % vars(record))
        handler.setFormatter(formatter)
        handler.rotator, handler.handleError = put_aside, self.give_up
        self.logger.addHandler(handler)
        self.shown = path
        with contextlib.suppress(OSError):  # the current folder may have been removed
            self.shown = path.removeprefix(os.path.join(os.getcwd(), ""))

    def give_up(self, record: Any = None) -> None:
        """Warn that the log cannot be written, because of the error being handled, and go on without it."""
        reason = describe(cast(Exception, sys.exc_info()[1]))
        self.close()
        self.logger.disabled, self.shown = True, "none"
        complain(f"warning: cannot write the log in {self.folder} ({reason}); going on without it. Give --log-dir DIR.")

    def alert(self, text: str) -> None:
        """Log a warning that is also for standard error."""
        self.warn(text)
        complain(f"warning: {text}")

    def close(self) -> None:
        """Close the file and release its lock."""
        with contextlib.suppress(OSError, ValueError):  # of what could not be written
            self.cleanup.close()


# ============================ actions ============================
# Each action is a function that does what the command line asks for, and prints the result with the exit code.


class Job(NamedTuple):
    """The parts that every action works with."""

    settings: Settings
    db: AnyDatabase
    source: Source
    target: Target
    protocols: Sequence[Protocol]
    report: Report
    log: Log
    interrupt: Interrupt

    def coverage(self) -> Coverage:
        """Return the Coverage of the source by the target."""
        return Coverage(self.db, self.source, self.target, self.settings)

    def for_model(self, model: str) -> Job:
        """Return the same job for another model, unless that is ""."""
        settings = self.settings._replace(model=model or self.settings.model)
        return self._replace(settings=settings, source=self.source._replace(prefix=settings.row_prefix))


MOST_CHARACTERS = 1_000_000  # in one request, after which it gets no more texts
# Answers are saved when there are so many of them, or one has waited so long. Twice as many rows would take 2 MiB more,
# and save a twentieth of the time with a server that answers at once.
UNSAVED_ROWS, UNSAVED_SECONDS = 500, 1.0


class Run:
    """One pass over the pending rows, the same for both engines and both databases."""

    def __init__(self, table: EmbeddingTable, counts: Counts, job: Job) -> None:
        self.table, self.claims, self.counts, self.report, self.log = table, table.claims, counts, job.report, job.log
        self.interrupt, self.limit = job.interrupt, job.settings.limit
        self.has_several_servers = len(job.protocols) > 1
        self.rows = self.claims.pending(lambda: self.batch_size)
        self.batch_size = 0  # texts wanted for the next batch
        self.is_exhausted = False  # whether all pending rows have been read
        self.in_flight = 0  # rows given to the engine and not answered yet
        self.unsaved: Embeddings = []
        self.save_at = math.inf  # when they are to be saved, by time.monotonic()
        self.logged = set[str]()  # lines about servers, each of which is logged once

    def work(self, engine: Engine) -> None:
        """Embed the pending rows. However this ends, except by a second signal, all answers are saved."""
        try:
            embed_rows(engine, self)
        except Exception:  # not KeyboardInterrupt: a save could wait for a lock
            self.save(0)
            raise
        self.save(0)
        self.tick()
        if self.is_exhausted and not self.interrupt.code:
            if self.counts.left:
                self.counts.account_for_rest(self.table.coverage.count()[0])
            self.table.finish()

    def turn(self) -> None:
        """Save if it is time, and tick."""
        if len(self.unsaved) >= UNSAVED_ROWS or time.monotonic() >= self.save_at:
            self.save()
        self.tick()

    def tick(self) -> None:
        """Renew this machine's claims if it is time, and show what has been done."""
        self.counts.set_peers(*self.claims.heartbeat())
        self.report.update(self.counts)

    def room(self) -> int:
        """Return how many more rows --limit allows in flight."""
        taken = self.counts.generated + len(self.unsaved) + self.in_flight
        return sys.maxsize if self.limit is None else self.limit - taken

    def left(self) -> int:
        """Return how many rows have no answer yet, in flight or not, as far as is known."""
        return self.counts.total - self.counts.done - len(self.unsaved)

    def due(self) -> float:
        """Return the seconds until a save, a heartbeat or a progress line is due."""
        return min(min(self.save_at, self.claims.next_renewal) - time.monotonic(), self.report.due())

    def next_rows(self, size: int) -> list[Row] | None:
        """Return up to `size` rows to embed; [] if there are none right now, None if there will be none."""
        self.batch_size = size
        if not (self.room() or self.in_flight):
            self.save()  # rows that turn out to be deleted leave room for others
        size = min(size, self.room())
        if not size:
            return [] if self.in_flight else None
        batch: list[Row] = []
        characters = 0
        for row in self.rows:
            if row is None or self.interrupt.code:
                return batch
            if NO_TEXT in row.text or not row.text.strip(BLANKS):
                self.fail(row, "a BLOB that is not UTF-8" if NO_TEXT in row.text else "no text")
                self.report.update(self.counts)
                continue
            characters += len(row.text)
            batch.append(row)
            self.in_flight += 1
            if len(batch) == size or characters > MOST_CHARACTERS:
                return batch
        self.is_exhausted = True
        return batch or None

    def take(self, answered: list[tuple[Row, Answer]]) -> None:
        """Count and log failed and skipped rows, and keep the embeddings for the next save."""
        self.in_flight -= len(answered)
        for row, answer in answered:
            if isinstance(answer, Embedding):
                self.unsaved.append((row, answer))
                if answer.fit != "whole":
                    self.counts.cut += answer.fit == "cut"
                    self.log.warn(f"{self.name(row)} is longer than the model takes: {answer.fit}")
                if REPLACED in row.text:
                    self.counts.damaged += 1
                    self.log.warn(f"{self.name(row)} holds U+FFFD, which stands for bytes that are not UTF-8")
            elif answer.kind == "too_long":
                self.counts.too_long += 1
                self.claims.settle(row, failed=False)
                self.log.warn(f"{self.name(row)} is longer than the model takes: skipped ({answer.reason})")
            else:
                self.fail(row, answer.reason)
        if self.unsaved:
            self.save_at = min(self.save_at, time.monotonic() + UNSAVED_SECONDS)

    def name(self, row: Row) -> str:
        """Return the name of a row for the log."""
        return f"{self.report.noun} {repr(row.key) if isinstance(row.key, (str, bytes)) else row.key}"

    def fail(self, row: Row, reason: str) -> None:
        """Count and log a row that gets no embedding."""
        self.counts.reasons[reason] += 1
        self.claims.settle(row, failed=True)
        self.log.warn(f"{self.name(row)} failed: {reason}")

    def log_event(self, server: ServerState, event: Exchange | str) -> None:
        """Log a request or a remark, and the server's pace if it has changed."""
        at = f"{server.protocol.address}: " if self.has_several_servers else ""
        news = [f"{at}{server.pace}"]
        if isinstance(event, str):
            self.log.warn(event)
        elif event.outcome == "ok":
            self.log.debug(f"{at}{counted(event.texts, 'text')} in {event.seconds:.2f} s")
            news.append(f"{at}vectors come as {event.encoding}")
        else:
            texts = f"with {counted(event.texts, 'text')}" if event.texts else "with the known-good text"
            self.log.warn(f"{at}a request {texts} gave no embeddings after {event.seconds:.2f} s: {event.reason}")
        for line in news:
            if line not in self.logged:
                self.logged.add(line)
                self.log.info(line)

    def save(self, most: int = UNSAVED_ROWS // 2) -> None:
        """Save the answers, which count as generated only then. Rows that other programs have locked are kept for the
        next time; while there are more than `most` of them, the run waits, for ROW_LOCK_SECONDS.
        """
        deadline = time.monotonic() + ROW_LOCK_SECONDS
        while embeddings := self.unsaved:
            self.unsaved, self.save_at = [], math.inf  # an embedding that cannot be saved is not tried again
            for count, gone, unsaved in self.table.save(embeddings):
                self.counts.generated += count
                self.counts.rows -= gone
                for row, embedding, reason in unsaved:
                    if reason:
                        self.fail(row, reason)
                    else:
                        self.unsaved.append((row, embedding))
                        self.save_at = time.monotonic() + UNSAVED_SECONDS
            if len(self.unsaved) <= most or self.interrupt.code:
                break
            if time.monotonic() > deadline:
                self.unsaved = []  # or the end of the run would wait for them once more
                raise Stop("another transaction holds rows for too long. Run again later.")
            time.sleep(RETRY_SECONDS)
            self.tick()


def survey(job: Job) -> tuple[Coverage, Counts]:
    """Return which rows have their embedding, and how many; raise UsageError or Stop if no run can go on with them."""
    if job.settings.index:
        job.db.check_index(job.target)
    coverage = job.coverage()
    coverage.check()
    return coverage, Counts(*coverage.count(), job.settings.limit)


def generate(job: Job) -> None:
    """Do the main job."""
    settings, log, interrupt, report = job.settings, job.log, job.interrupt, job.report
    _, counts = survey(job)
    log.info(
        f"{settings.engine} engine, {job.db.shown}, table {settings.table}, model {settings.model} at "
        f"{', '.join(protocol.address for protocol in job.protocols)}: {counted(counts.total, 'row')}, "
        f"{counts.skipped} with their embedding"
    )
    log.info(f"text: {settings.row_prefix}{job.source.recipe}")
    target = job.target
    try:
        if counts.total > counts.done:
            target = embed(job, counts)
        else:
            report.start(counts)
        if settings.index and target.exists and not interrupt.code:
            report.end(counts)
            interrupt.gentle = True
            for share in job.db.create_index(target):
                report.show_index(share)
    except Stop as stop:
        if not interrupt.gentle:  # it has not begun
            raise
        message = f"{stop.message} What was generated is saved. Left to do: {counted(counts.left, report.noun)}."
        report.finish(counts, interrupt.code or stop.code, message)
        raise Stop(message) from stop.__cause__
    code = interrupt.code or (EXIT_FAILED_ROWS if counts.failed else EXIT_DONE)
    report.finish(counts, code)
    log.info(f"{counts.generated} generated, {counts.skipped} skipped, {counts.failed} failed; exit code {code}")


def embed(job: Job, counts: Counts) -> Target:
    """Embed the pending rows and return the target."""
    interrupt = job.interrupt
    with open_engine(job) as engine, open_table(job, engine) as table:
        scheduler, present = engine.scheduler, engine.scheduler.up
        for note in filter(None, (server.profile.note for server in scheduler.servers)):
            job.log.alert(note)
        job.report.start(counts)
        interrupt.gentle = True
        began = time.monotonic()
        try:
            Run(table, counts, job).work(engine)
        finally:
            for line in scheduler.shares(time.monotonic() - began):
                job.log.info(line)
        for server in present:  # one that came back is in the log; one that did not may need somebody to look
            if server.status != "up" and not interrupt.code:
                job.log.alert(f"{server.protocol.address} did not do its share to the end: {server.reason}")
        return table.coverage.target


@contextlib.contextmanager
def open_engine(job: Job) -> Iterator[Engine]:
    """Give an engine after a handshake with all servers; raise Stop if one cannot do the work, or all are away."""
    engine = ENGINES[job.settings.engine](Scheduler(job.settings, job.protocols), job.interrupt)
    with contextlib.closing(engine):
        for server, profile, _ in embed_on_all(engine, None, job.report.show_waiting):
            engine.scheduler.greet(server, profile, time.monotonic())
        yield engine


@contextlib.contextmanager
def open_table(job: Job, engine: Engine) -> Iterator[EmbeddingTable]:
    """Give the table of the run, with the target created if need be; at the end, leave the rest to other machines."""
    db, settings, profile = job.db, job.settings, engine.scheduler.profile
    if settings.index:
        db.check_index(job.target, profile.dimensions)
    job = job._replace(target=job.target.create(db, job.source, settings, profile.dimensions))
    coverage = job.coverage()
    coverage.check(profile.dimensions)
    provenance = Provenance(coverage, profile)
    provenance.check_version()
    check_drift(engine, provenance)  # before the claims, which nothing renews meanwhile
    claims: Claims | Alone = Alone(coverage)
    try:
        if isinstance(db, Postgres):  # a file of SQLite is locked by the run
            claims = Claims(db, coverage, profile.digest)
    except Forbidden as forbidden:
        job.log.info(f"this run shares the table with no other, since it has no place for claims: {forbidden.message}")
    with contextlib.closing(claims):
        coverage.check(profile.dimensions)  # again: others may have been at work
        yield EmbeddingTable(provenance, claims)


def check_drift(engine: Engine, provenance: Provenance) -> None:
    """Raise Stop if a server gives other vectors than are stored for the same texts, or if none are, than the first."""
    coverage = provenance.coverage
    is_bare = coverage.replaces_all or not coverage.stored()
    is_comparable = " + " in provenance.profile.version if is_bare else coverage.target.has("text_sha256")
    if coverage.settings.accept_drift or not is_comparable:
        return
    samples, is_many = provenance.samples(is_bare)
    size = min(coverage.settings.batch_size or MANY_SAMPLES, MANY_SAMPLES)
    for _ in range(2):  # again if any differs: one answer may be an accident
        compared = []
        for batch in (samples[begin : begin + size] for begin in range(0, len(samples), size)):
            answered = embed_on_all(engine, [text for _, text, _ in batch])
            compared += [
                (cosine(answer.vector, vector or getattr(first, "vector", b"")), key, server)
                for server, answers, _ in answered
                for (key, _, vector), answer, first in zip(batch, answers, answered[0][1])
                if isinstance(answer, Embedding) and answer.fit == "whole"
            ]
        found = [one for one in compared if one[0] < ALIKE]
        if not found:
            provenance.is_compared = is_many and not is_bare and bool(compared)
            return
    versions = coverage.db.value(f"""SELECT min(v) || CASE WHEN min(v) <> max(v) THEN ' and ' || max(v) ELSE '' END
        FROM (SELECT COALESCE(p.version, 'unknown') AS v {provenance.of_model}) AS versions""")
    stored, server = f'those stored as of the model "{coverage.settings.model}" (version {versions})', found[0][2]
    raise Stop(
        f"{server.protocol.address} (version {server.profile.version}) gives other vectors than "
        f"{'another server' if is_bare else stored}: of the same text, the cosine is "
        f"{listed((f'{alike:.3f} for {coverage.source.key} {key}' for alike, key, _ in found), 8)}; {ALIKE} or more is "
        "usual. Give another --server, --target NAME for a second table, --force for all rows again, or --accept-drift."
    )


TIMED_TEXTS = (4, 32)  # embedded by --dry-run to measure the speed: first a few, then more if that was quick
QUICK_SECONDS = 0.5


def dry_run(job: Job) -> None:
    """Print what a run would do, with an estimate of its time from a few texts; write nothing."""
    report = job.report
    coverage, counts = survey(job)
    to_do = counts.total - counts.done
    left = counts.left - to_do
    speed = measure_speed(job, coverage) if to_do else 0.0
    seconds = to_do / speed if speed else 0.0
    facts = {
        "rows": counts.rows, "would_generate": to_do, "would_skip": counts.skipped, "left": left,
        "seconds": round(seconds, 1) if speed else None, "rate": round(speed, 2) if speed else None,
        "model": job.settings.model,
    }  # fmt: skip
    time_left = f"{clock(max(round(seconds), 1))}, at {speed:.1f} embeddings/second as just measured"
    lines = [
        RULE,
        f"🧠 {report.title} Generator: what it would do",
        RULE,
        f"📊 Total {report.nouns}: {counts.rows}",
        f"   ✓  Would be generated: {to_do}",
        f"   ⊘  Would be skipped (already exist): {counts.skipped}",
        f"   …  Would be left by --limit: {left}" if left else "",
        f"⏱️  Estimated time: {time_left}" if speed else "",
        "Nothing was written.",
        RULE,
    ]
    report.give(facts, lines)


def measure_speed(job: Job, coverage: Coverage) -> float:
    """Return the speed of all servers together, measured with texts of the table, in embeddings per second.

    It is 0 if no row has a text.
    """
    some = (row.text for row in itertools.islice(coverage.pending(), PAGE_ROWS) if row.text.strip(BLANKS))
    texts = list(dict.fromkeys(some))  # equal ones are sent once
    speed = 0.0
    if texts:
        with open_engine(job) as engine:
            profile = engine.scheduler.profile
            coverage.check(profile.dimensions)
            Provenance(coverage, profile).check_version()
            ones = {server.index: seconds for server, _, seconds in embed_on_all(engine, texts[:1])}
            speed = sum(1 / max(one, 1e-6) for one in ones.values())
            for more in sorted({min(count, len(texts) - 1) for count in TIMED_TEXTS} - {0}):
                timed = [(ones[server.index], took) for server, _, took in embed_on_all(engine, texts[: 1 + more])]
                # Without the fixed cost of a request; where a server answers at once, the rest is mostly noise.
                speed = sum(more / max(took - one, took / 10) for one, took in timed)
                if max(took for _, took in timed) > QUICK_SECONDS:
                    break
    return speed


def search(job: Job) -> None:
    """List the rows nearest to a text."""
    coverage = job.coverage()
    coverage.check_searchable()
    query = str(job.settings.search)
    for protocol in job.protocols:  # one answer is enough
        try:
            with open_engine(job._replace(protocols=[protocol])) as engine:
                [(_, [answer], _)] = embed_on_all(engine, [query])
            break
        except ServerAway:
            if protocol is job.protocols[-1]:
                raise
    if isinstance(answer, Failure):
        said = answer.reason.rstrip(".")
        raise Stop(f"{protocol.address} does not embed the text that is searched for: {said}.")
    coverage.check_searchable(len(answer.vector) // 4)
    Provenance(coverage, engine.scheduler.profile).check_version()
    show_hits(job, {"query": query}, f'"{query}"', answer.vector, job.settings.model)


def similar(job: Job) -> None:
    """List the rows nearest to one of them, by its stored vector."""
    given = str(job.settings.similar)
    key, vector, model = job.coverage().row_named(given)
    row = f"{job.report.noun} {given}"
    if vector is None:
        raise Stop(f"the {row} has no embedding yet. Run embedgen without --similar first.")
    if not cosine(vector, vector) > 0:  # NaN is not
        raise Stop(
            f"the {row} has a vector without a direction (all zeros, or NaN or infinity in it), so that nothing is "
            "near it. Run embedgen with --force, which replaces it."
        )
    show_hits(job.for_model(model), {"similar_to": key}, row, vector, model, but=key)


def show_hits(job: Job, asked: dict[str, Any], what: str, vector: bytes, model: str, but: Any = None) -> None:
    """Print the rows nearest to the vector of `what`; on standard error how many rows were not searched."""
    report, settings, coverage = job.report, job.settings, job.coverage()
    hits = coverage.nearest(vector, settings.top, but)
    cells, nouns = report.console.columns or PIPE_WIDTH, report.nouns
    head = f"🔎 {nouns[:1].upper()}{nouns[1:]} nearest to {what}, by {model or 'an unknown model'}"
    head = "" if settings.quiet else truncate_to_width(head, cells)
    lines = [head, *hit_lines(hits, cells)] if hits else [f"No {nouns} to compare with were found."]
    report.give({**asked, "model": model or None, "results": hits}, lines)
    if settings.quiet:
        return
    rows, stored, found, current = coverage.tally(coverage.comparable_sql(len(vector) // 4))
    counts = {
        "not searched, without an embedding": rows - stored,
        "not searched, with one that does not compare": stored - found,
        "found by an older text": found - current,
    }
    if note := "; ".join(f"{count} {why}" for why, count in counts.items() if count):
        complain(f"note: of {rows} {nouns}, {note}. Run embedgen without --{settings.action} to embed them.")


PIPE_WIDTH = 200  # cells of a result's line without a terminal
KEY_WIDTH = 40  # most cells of a key


def hit_lines(hits: list[dict[str, Any]], cells: int) -> list[str]:
    """Return a line of at most `cells` cells for each result of Coverage.nearest: rank, similarity, key, columns."""
    keys = [truncate_to_width(str(hit["key"]), KEY_WIDTH) for hit in hits]
    key_width, digits = max(map(width_of, keys)), len(str(len(hits)))
    lines = []
    for hit, key in zip(hits, keys):
        gap = " " * (key_width - width_of(key))
        key = key + gap if isinstance(hit["key"], str) else gap + key
        text = " | ".join(filter(None, (str(v).strip(BLANKS) for v in hit["columns"].values() if v is not None)))
        line = f"{hit['rank']:{digits}}  {hit['similarity']:.4f}  {key}  {text}"
        lines.append(truncate_to_width(line, cells).rstrip())
    return lines


def truncate_to_width(text: str, cells: int) -> str:
    """Return a text on one line, cut to `cells` terminal cells."""
    text = one_line(text[: 4 * cells])
    if width_of(text) <= cells:
        return text
    text = text[:cells]
    while width_of(text) >= cells:
        text = text[:-1]
    return text + "…"


def status(job: Job) -> None:
    """Print how many rows are embedded, missing or stale, and by which models."""
    origins = Provenance(job.coverage(), ServerProfile()).origins()
    models = {made["model"] for made in origins}
    if len(models) == 1 and not job.settings.model_is_named:
        job = job.for_model(max(models))
    settings, coverage = job.settings, job.coverage()
    total, _, found, current = coverage.tally(job.target.has_vector_sql)
    _, orphaned, dimensions, updated = coverage.vectors()
    if getattr(updated, "tzinfo", None):
        updated = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(updated.timestamp()))
    is_unknown = found and not any(models) and not settings.model_is_named
    facts = {
        "table": settings.table, "target": job.target.table.name, "rows": total, "embedded": current,
        "missing": total - found, "stale": None if job.target.is_column else found - current, "orphaned": orphaned,
        **{fit: sum(made["rows"] for made in origins if made["fit"] == fit) for fit in ("cut", "split")},
        "model": None if is_unknown else settings.model, "prefix": settings.row_prefix,
        "dimensions": dimensions or None, "updated": updated and str(updated), "models": origins,
        "notes": job.target.notes(job.source.key, settings.model) if job.target.is_column else [],
    }  # fmt: skip
    job.report.give(facts, status_lines(facts, job.report, job.db.shown))


def status_lines(facts: dict[str, Any], report: Report, database: str) -> list[str]:
    """Return what --status prints."""
    total, done = facts["rows"], facts["embedded"]
    share = done / total if total else 1.0
    lines = [RULE, one_line(f"🧠 {report.title}s in {database}"), RULE]
    lines.append(f"📊 {percent_of(share)}%|{bar(share, 24)}| {done:,} of {total:,} {report.nouns}")
    marks = {"embedded": "✓", "missing": "…", "stale": "↻", "orphaned": "∅", "cut": "✂", "split": "÷"}
    hints = {
        "stale": "   (embedded from another text, prefix or model)",
        "orphaned": f"   (without a row in {facts['table']}; see --prune)",
    }
    width = max(len(f"{facts[name] or 0:,}") for name in marks)
    for name, mark in marks.items():
        count = facts[name]  # None: not known
        if count or (count == 0 and name in ("embedded", "missing", "stale")):
            hint = hints.get(name, "") if count else ""
            lines.append(f"   {mark}  {name.title() + ':':<10}{count:>{width},}{hint}")
    made: Counter[tuple[str, str, str, str]] = Counter()
    for one in facts["models"]:
        made[one["model"], short_digest(one["digest"]), one["version"], one["prefix"]] += one["rows"]
    dimensions = f", {facts['dimensions']} dimensions" if facts["dimensions"] else ""
    for (model, digest, version, prefix), count in made.items():
        words = f"🧩 Model: {model or 'unknown'}{f' ({digest})' if digest else ''}{dimensions}"
        words += f', prefix "{prefix}"' if prefix else ""
        words += f"{f', server {version}' if version else ''}{f': {count:,}' if len(made) > 1 else ''}"
        lines.append(one_line(words))
    if facts["updated"]:
        lines.append(f"🕑 Last updated: {facts['updated']}")
    return [*lines, *facts["notes"], RULE]


def prune(job: Job) -> None:
    """Remove the embeddings whose row is gone."""
    settings, target, source = job.settings, job.target, job.source.table
    name = f'"{target.table.name}"'
    if not target.exists:
        raise UsageError(f"there is nothing to prune: no table {name}. Give --target NAME.")
    if not (target.belongs or settings.force):
        raise UsageError(
            f'rows that "{source.name}" does not have may still exist: nothing says that {name} belongs to it. '
            "Give another --table; or --force, to remove the embeddings of all others."
        )
    coverage = job.coverage()
    rows = f"FROM {target.vectors_sql} WHERE {coverage.is_orphan}"
    if not settings.force:  # to remove all of them is probably a mistake
        rows += f" AND EXISTS (SELECT 1 FROM {target.vectors_sql} JOIN {source.sql} AS s ON {coverage.join_on})"
    ((removed,),) = job.db.query_all(f"{'SELECT count(*)' if settings.dry_run else 'DELETE'} {rows}")
    total, gone, *_ = coverage.vectors()
    if gone and not removed:
        raise UsageError(
            f'none of the {total} embeddings in {name} belongs to a row of "{source.name}", so that all would be '
            "removed. Give another --table or --target; or --force, if that is meant."
        )
    total += 0 if settings.dry_run else removed
    job.log.info(f"pruned {job.db.shown}, {target.table.name}: {removed} of {total} embeddings removed")
    did = "would_remove" if settings.dry_run else "removed"
    why = f"whose {job.report.nouns} are gone" if removed else f"since all their {job.report.nouns} are there"
    line = f"🧹 {did.replace('_', ' ').capitalize()} {removed} of {total} embeddings, {why}."
    facts = {did: removed, "left": total - removed, "dry_run": settings.dry_run}
    job.report.give(facts, [line] if removed or not settings.quiet else [])


ACTIONS: dict[str, Callable[[Job], None]] = {
    "generate": generate,
    "dry_run": dry_run,
    "search": search,
    "similar": similar,
    "status": status,
    "prune": prune,
}


# =============================== main ===============================


def run(settings: Settings, protocols: Sequence[Protocol], console: Console, log: Log, started: float) -> None:
    """Carry out the settings' action; raise Stop if it cannot be done."""
    interrupt, most = console.interrupt, most_in_flight(settings.engine)
    if settings.concurrent and settings.concurrent > most:
        log.alert(f"the system allows {most} requests in flight, not {settings.concurrent}; going on with {most}")
        settings = settings._replace(concurrent=most)
    with contextlib.closing(open_database(settings, lambda: bool(interrupt.code))) as db:
        loaded = load(db, settings, settings.load) if settings.load else {}
        for note in loaded.get("notes", []):
            log.info(note)
            complain(f"{note}.")
        source = Source.resolve(db, settings)
        target = Target.resolve(db, source, settings)
        report = Report(console, settings, log, source.table.name, started, loaded)
        ACTIONS[settings.action](Job(settings, db, source, target, protocols, report, log, interrupt))


def fail(error: BaseException, console: Console, log: Log | None, given: Sequence[str]) -> None:
    """Log and print the error that has ended the run; without a verdict so far, its exit code is that."""
    code, message, interrupt = EXIT_STOPPED, f"{type(error).__name__}: {error}", console.interrupt
    cause: BaseException | None = error  # whose traceback the log gets; a user's mistake has none
    if stopped := interrupt.forced or isinstance(error, KeyboardInterrupt):  # or an error that it caused
        code, message = interrupt.code or EXIT_SIGINT, "ended at once by a signal; what was generated is saved"
        cause = None
    elif isinstance(error, Stop):
        code, message, cause = error.code, error.message, error.__cause__
    if log:
        log.error(message, exc_info=None if isinstance(cause, Stop) else cause)
    if cause is error:
        message = message.splitlines()[0].rstrip(".")
        message += ". This is a fault of embedgen itself; the log and --verbose have more."
        if "--verbose" in given:
            sys.excepthook(type(error), error, error.__traceback__)
    level = "warning" if console.verdict in (EXIT_DONE, EXIT_FAILED_ROWS) else "error"
    console.lines()
    if console.verdict is None:
        console.verdict = code
        if "--json" in given:
            console.lines(json.dumps({"exit_code": code, "error": message}))
    if not stopped:
        complain(f"{level}: {one_line(message)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    started = time.monotonic()
    given = sys.argv[1:] if argv is None else argv
    interrupt = Interrupt()
    console, log = Console(sys.stdout, interrupt), None
    with contextlib.suppress(KeyboardInterrupt):  # of a first signal, while another error is being reported
        try:
            interrupt.set_handler(interrupt.on_signal)
            sys.unraisablehook = interrupt.on_unraisable
            settings = parse_arguments(given)
            protocols = protocols_for(settings)
            log = Log(settings)
            run(settings, protocols, console, log, started)
        except (Exception, KeyboardInterrupt) as error:
            fail(error, console, log, given)
        finally:
            interrupt.forced = True  # from now on no signal interrupts, not even Python's own exit
            interrupt.set_handler(signal.SIG_IGN)
            kill_workers()
            if log:
                log.close()
    return interrupt.code if console.verdict is None else console.verdict


if __name__ == "__main__":
    sys.exit(main())
