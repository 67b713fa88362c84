#!/usr/bin/env python3
"""Fill a database table with text embeddings through an Ollama server.

  python embedgen.py                                        movies.db, its table movies, Ollama on this machine
  python embedgen.py --load movies.csv --server hash:       try it, with nothing installed
  python embedgen.py --database shop.db --table products    embed a table of your own
  python embedgen.py --database postgresql://db/shop        in Postgres, on any number of machines at once
  python embedgen.py --engine process --workers 10          worker processes
  python embedgen.py --engine async --concurrent 10 --force one event loop, all rows again
  python embedgen.py --server gpu1 --server gpu2            servers that share the work
  python embedgen.py --search "a robot learns to love"      the rows nearest to that, by the embeddings
  python embedgen.py --status                               what is embedded, and by which model

Rows that have an embedding of the same text are skipped, so the same command
run again embeds only what is missing or has changed.

Exit codes: 0 all rows have their embedding; 1 finished, but some rows failed;
2 wrong usage; 3 could not start or could not go on; 130 and 143 stopped by
SIGINT and SIGTERM; 141 standard output was closed. Whatever happens, what was
generated is saved.

How it works, in the order of this file: settings and command line, text,
wire, one batch's conversation, pace, engines, files to load, stores, progress
and report, search and status, the run, main.

  store.pending() --rows--> Run.batches() --batches--> Engine.run()
                                                          |  up to N conversations at once with
                                                          |  each server, as Pace and Servers have it
  store.save() <--vectors-- Run.take() <---results--------+

Only this process touches the database, the log and the terminal. A store knows
nothing of engines and an engine nothing of HTTP statuses, so that every pair of
them behaves the same.

Needs Python 3.9 or later and nothing else, but for Postgres psycopg 3. MIT licence.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TextIO, TypeVar, Union

# Modules that only some runs need (asyncio, multiprocessing, http.client, sqlite3 ...)
# are imported where they are used: --help and a run with nothing to do start in three quarters of the time.

if sys.version_info < (3, 9):  # noqa: UP036 - said in words, before a type alias fails
    print("error: embedgen needs Python 3.9 or later; this is " + sys.version.split()[0] + ".", file=sys.stderr)
    sys.exit(3)

__version__ = "0.1.0"

EXIT_DONE, EXIT_FAILED_ROWS, EXIT_USAGE, EXIT_STOPPED = 0, 1, 2, 3
EXIT_SIGINT, EXIT_SIGPIPE = 130, 141  # 128 + the signal, as shells have it

T = TypeVar("T")


class Stop(Exception):
    """The run cannot start or cannot go on: one sentence for the user, and the exit code."""

    code = EXIT_STOPPED

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Away(Stop):
    """A server is not there, or does nothing useful now: others may do its work, and it may come back."""

    reason = ""  # in a few words
    wait = 0.0  # seconds that the server asks to be left alone


class Reported(Stop):
    """A Stop after which the report has been printed."""


class UsageError(Stop):
    """The command line, or what it names, is wrong."""

    code = EXIT_USAGE


# ============================ settings and command line ============================


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A formatter that knows its width: argparse imports shutil to find it, even if no help is wanted."""

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size(1).columns)
        except (ValueError, OSError):
            columns = 80
        super().__init__(prog, width=(columns or 80) - 2)


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


def number(least: int, text: str) -> int:
    """Parse a whole number from `least` upwards."""
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} upwards")
    return int(text)


def number_or_auto(text: str) -> int | None:
    """Parse a whole number from 1 upwards, or `auto`, which is None."""
    return None if text == "auto" else number(1, text)


def seconds(text: str) -> float:
    """Parse a duration in seconds, above 0 and at most a day."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0 and up to 86400")
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


def sendable(text: str) -> str:
    """Return a text without what bytes on the command line may leave in it that is no text."""
    return text.encode("utf-8", "replace").decode()


# All flags, in groups: their names, what stands for their value if they take one, and what --help says.
FLAGS: dict[str, dict[str, str]] = {
    "what is embedded": {
        "--database URL": "sqlite:///relative.db, sqlite:////absolute.db, a path ending in .db, .sqlite or .sqlite3, "
            "or postgresql://... (default: $DATABASE_URL, else sqlite:///movies.db)",
        "--table NAME": "table or view to read (default: movies)",
        "--id COLUMN": "its key, integer or text (default: the primary key, else id)",
        "--columns A,B": "columns that make up the text (default: Title, Year, Genres, ...)",
        "--text TEMPLATE": 'the text itself, such as "{title} ({year}): {overview}"',
        "--where SQL": "only rows that fulfil this condition",
        "--target NAME": "table that receives the vectors (default: movie_embeddings for movies)",
        "--load FILE": "first load a .csv, .tsv, .json or .jsonl file into --table",
        "--index": "Postgres: build the HNSW index for cosine distance after the run",
        "--force": "embed every row again, existing or not",
        "--limit N": "generate at most N embeddings in this run",
    },
    "instead of embedding": {
        "--search TEXT": "list the rows nearest to a text, by cosine similarity",
        "--similar ID": "list the rows nearest to one of them, given by its key; needs no server",
        "--status": "say what is embedded, missing or stale; needs no server",
        "--prune": "remove embeddings whose row is gone",
        "--top N": "rows to list (default: 10)",
        "--dry-run": "say what would be done, and write nothing",
    },
    "how": {
        "--engine": "one event loop, or worker processes (default: async)",
        "--concurrent,--workers N": "requests in flight at most; auto adapts to each server (default: auto)",
        "--batch-size N": "texts per request (default: auto)",
    },
    "the server": {
        "--server URL": "Ollama; or, if its path ends in /v1, a server of the OpenAI protocol; or hash: for the "
            "built-in embedder, which finds shared words, not meaning; may be given several times, for servers that "
            "share the work (default: $OLLAMA_HOST, else http://localhost:11434)",
        "--model NAME": "(default: $EMBEDGEN_MODEL, else nomic-embed-text)",
        "--timeout SECONDS": "longest silence of one request (default: 300)",
        "--ca-file FILE": "certificates of your own authorities, in place of the system's, for https",
        "--dimensions N": "length of the vectors, for models that offer a choice",
        "--document-prefix P": "put before every text; empty for none (default: the model's own)",
        "--query-prefix P": "put before what is searched for; empty for none (default: the model's own)",
        "--option KEY=VALUE": "model option passed to the server, such as num_ctx=8192; may be given several times",
        "--on-long": "texts longer than the model takes: embed their beginning, counted and logged; or all parts, to "
            "store their mean; or fail; or skip them (default: cut)",
        "--accept-drift": "go on although the server's model or vectors differ from what made the stored ones",
    },
    "output": {
        "--noun WORD": "what a row is called in the report (default: from the table's name)",
        "--quiet": "print nothing when all went well",
        "--json": "print one JSON object at the end and nothing else",
        "--log-dir DIR": "where the log goes (default: logs/ beside embedgen.py)",
        "--verbose": "log every request",
        "--version": "show program's version number and exit",
    },
}  # fmt: skip

ACTION_FLAGS = ("search", "similar", "status", "prune")  # of which one at most may be given


def create_parser() -> Parser:
    """Return the parser of the command line; everything is a flag."""
    parser = Parser(
        prog="embedgen.py",
        description=(__doc__ or "").partition("\nHow it works")[0],
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    # How a value is read, where it is more than a word.
    types: dict[str, Callable[[str], Any]] = {
        "limit": functools.partial(number, 0),
        **dict.fromkeys(("top", "dimensions"), functools.partial(number, 1)),
        **dict.fromkeys(("concurrent", "batch_size"), number_or_auto),
        "timeout": seconds,
        "option": key_value,
        **dict.fromkeys(("search", "similar", "document_prefix", "query_prefix"), sendable),
    }
    # What else argparse must know. A flag that takes no value and is not here is a switch.
    more: dict[str, dict[str, Any]] = {
        "--engine": {"choices": sorted(ENGINES)},
        "--server": {"action": "append"},
        "--option": {"action": "append"},
        "--on-long": {"choices": ON_LONG},
        "--version": {"action": "version", "version": f"embedgen {__version__}"},
    }
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        actions = group.add_mutually_exclusive_group() if "--search TEXT" in flags else group
        for usage, said in flags.items():
            names, _, value = usage.partition(" ")
            kind = more.get(names, {})
            if value:
                kind = {"metavar": value, **kind}
            elif not kind:
                kind = {"action": "store_true"}
            where = actions if names[2:] in ACTION_FLAGS else group
            flag = where.add_argument(*names.split(","), help=said, **kind)
            flag.type = types.get(flag.dest)
    parser.set_defaults(table="movies", top=10, engine="async", timeout=300.0, option=[], on_long="cut")
    return parser


READING = ("search", "similar", "status", "dry_run")  # actions that write nothing
# What a flag goes with: the main job, "generate", or what is done instead. One that is not here goes with everything.
GOES_WITH = {
    "top": ("search", "similar"),
    "dry_run": ("dry_run", "prune"),
    "where": ("generate", *READING),
    "force": ("generate", "dry_run", "prune"),
    "quiet": ("generate", "search", "similar", "prune"),
    "timeout": ("generate", "dry_run", "search"),
    "on_long": ("generate", "dry_run", "search"),
    "load": ("generate",),
    **dict.fromkeys(
        ("limit", "index", "engine", "concurrent", "batch_size", "accept_drift"), ("generate", "dry_run")
    ),
}  # fmt: skip


def flag_of(name: str) -> str:
    """Return the flag that sets an option."""
    return "--" + name.replace("_", "-")


def choose_action(options: argparse.Namespace) -> None:
    """Note what is to be done; raise UsageError for flags that do not go with it."""
    options.action = next((name for name in (*ACTION_FLAGS, "dry_run") if name in options.given), "generate")
    options.reads_only = options.action in READING or options.dry_run
    for name in sorted(options.given):
        actions = GOES_WITH.get(name, (options.action,))
        if options.action in actions:
            continue
        if options.action == "generate":
            raise UsageError(f"{flag_of(name)} goes with {' or '.join(map(flag_of, actions))}. Leave it out.")
        raise UsageError(f"{flag_of(name)} does not go with {flag_of(options.action)}. Leave out one of them.")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the settings: flags first, then the environment, then the defaults."""
    parser = create_parser()
    options = parser.parse_args(argv)
    options.given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    for name in sorted(options.given - {"document_prefix", "query_prefix", "log_dir"}):
        # As from a script's unset variable; taking it for "not given" would embed what was not meant.
        value = getattr(options, name)
        if any(isinstance(text, str) and not text.strip() for text in (value if name == "server" else [value])):
            raise UsageError(f"{flag_of(name)} is empty. Give it a value, or leave it out.")
    if options.columns and options.text:
        raise UsageError("--columns and --text both say what the text is. Give one of them.")
    if options.quiet and options.json:
        raise UsageError("--quiet and --json both say what is printed. Give one of them.")
    if options.ca_file:
        check_roots(options.ca_file)
    choose_action(options)
    options.database = options.database or os.environ.get("DATABASE_URL") or "sqlite:///movies.db"
    host = os.environ.get("OLLAMA_HOST", "").strip(" \t'\"")
    options.server = options.server or [host or "http://localhost:11434"]
    if "hash:" in options.server:
        if len(options.server) > 1:
            raise UsageError("--server hash: computes here and goes with no other server. Give it alone.")
        if options.model not in (None, HashWire.model):
            raise UsageError(f"--server hash: has one model, {HashWire.model}. Leave out --model.")
        if options.dimensions not in (None, HashWire.dimensions):
            raise UsageError(f"--server hash: gives {HashWire.dimensions} dimensions. Leave out --dimensions.")
        options.model = HashWire.model
    named = options.model or os.environ.get("EMBEDGEN_MODEL")
    options.model_is_named = bool(named)
    apply_card(options, named or "nomic-embed-text")
    return options


def apply_card(options: argparse.Namespace, model: str) -> None:
    """Set the model, and what its card says and no flag says otherwise."""
    # Ollama's names carry :latest or leave it out; both are one model.
    options.model = model.removesuffix(":latest")
    card = card_of(options.model)
    options.context = card.context
    for name, own in (("document_prefix", card.document), ("query_prefix", card.query)):
        if name not in options.given:
            setattr(options, name, own)
    options.prefix = options.query_prefix if options.action == "search" else options.document_prefix


# =============================== text ===============================


class Card(NamedTuple):
    """What a model was trained with, and no server tells: what stands before a document and before a query.

    `context` is the tokens of a text that it takes, 0 if not known.
    """

    document: str = ""
    query: str = ""
    context: int = 0


PASSAGES = "Represent this sentence for searching relevant passages: "
# By the beginning of a model's name, in Ollama's library and on Hugging Face, what its Card says; the first that fits.
CARDS = (
    # https://huggingface.co/nomic-ai/nomic-embed-text-v2-moe
    ("nomic-embed-text-v2", "search_document: ", "search_query: ", 512),
    # https://huggingface.co/nomic-ai/nomic-embed-text-v1.5; trained for 8,192, of which Ollama's build takes 2,048
    ("nomic-embed-text", "search_document: ", "search_query: ", 2048),
    # https://ai.google.dev/gemma/docs/embeddinggemma/model_card
    ("embeddinggemma", "title: none | text: ", "task: search result | query: ", 2048),
    # https://huggingface.co/intfloat/multilingual-e5-large; those with instructions have other prefixes
    ("(multilingual-)?e5-(?!mistral|.*instruct)", "passage: ", "query: ", 512),
    # https://www.mixedbread.ai/docs/embeddings/mxbai-embed-large-v1
    ("mxbai-embed-large", "", PASSAGES, 512),
    # https://huggingface.co/Snowflake/snowflake-arctic-embed-l-v2.0
    ("snowflake-arctic-embed(2|-[lm]-v2)", "", "query: ", 8192),
    # https://huggingface.co/Snowflake/snowflake-arctic-embed-m-long
    ("snowflake-arctic-embed.*long", "", PASSAGES, 2048),
    # https://huggingface.co/Snowflake/snowflake-arctic-embed-l
    ("snowflake-arctic-embed", "", PASSAGES, 512),
    # https://huggingface.co/BAAI/bge-m3: "no need to add instructions"
    ("bge-m3", "", "", 8192),
    # https://github.com/FlagOpen/FlagEmbedding, the English models
    ("bge-(small|base|large)(?!-zh)", "", PASSAGES, 512),
    # https://github.com/QwenLM/Qwen3-Embedding, with its own task for a search
    ("qwen3-embedding", "", "Instruct: Given a web search query, retrieve relevant passages "
        "that answer the query\nQuery:", 32768),
    # https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
    ("all-minilm", "", "", 256),
    # https://huggingface.co/ibm-granite/granite-embedding-278m-multilingual
    ("granite-embedding", "", "", 512),
    # https://huggingface.co/sentence-transformers/paraphrase-multilingual-mpnet-base-v2
    ("paraphrase-multilingual", "", "", 512),
)  # fmt: skip


def card_of(model: str) -> Card:
    """Return the card of a model by its name, such as nomic-embed-text:v1.5 or hf.co/nomic-ai/nomic-embed-text."""
    name = model.lower().rpartition("/")[2].partition(":")[0].removeprefix("text-embedding-")  # as LM Studio has it
    return next((Card(*card[1:]) for card in CARDS if re.match(card[0], name)), Card())


# The default text: label, and the columns that it is taken from, the first that is not blank.
LABELS = (
    ("Title: ", ("title", "name")),
    ("Year: ", ("year",)),
    ("Genres: ", ("genres", "genre")),
    ("Description: ", ("overview", "plot", "summary", "description")),
    ("Cast: ", ("cast",)),
    ("Language: ", ("language",)),
    ("Rating: ", ("rating",)),
)
TELLING = {"Title: ", "Description: "}  # without one of them there is no text worth embedding

# Nouns that only add an s to -ie; all others in -ies are taken for -y (stories, story).
IE_NOUNS = r"(?<![a-z])(mov|cook|calor|zomb|self|t|p|brown|rook|hood)ies$"


class Recipe(NamedTuple):
    """How a row becomes a text: literals and columns in turn.

    `parts` are (literal, columns) pairs, the literal standing before the value: the
    first of the columns that is not blank; without columns it ends the text. If the literals
    are labels, a part without a value is left out, and the others are joined by " | ".
    """

    parts: tuple[tuple[str, tuple[str, ...]], ...]
    labelled: bool

    def __str__(self) -> str:
        """The recipe for people, in the form of --text."""
        fields = [before + ("{" + " or ".join(columns) + "}" if columns else "") for before, columns in self.parts]
        return (" | " if self.labelled else "").join(fields)

    def sql(self, value: Callable[[str], str], literal: Callable[[str], str]) -> str:
        """Return the SQL expression of the text; '' for a row whose columns are all blank.

        `value(column)` must give the SQL of the column's text, NULL where it is blank,
        and `literal(text)` that of a string. Built in the database so that a text can
        be hashed and compared there, without being moved.
        """
        pieces: list[str] = []
        known: list[str] = []
        for before, columns in self.parts:
            one = ", ".join(map(value, columns))
            one = f"COALESCE({one})" if len(columns) > 1 else one  # the first that there is
            if self.labelled:
                bar = f"CASE WHEN {' OR '.join(known)} THEN ' | ' ELSE '' END || " if known else ""
                pieces.append(f"COALESCE({bar}{literal(before)} || {one}, '')")
            else:
                pieces.append(f"{literal(before)} || COALESCE({one}, '')" if columns else literal(before))
            if columns:
                known.append(f"{one} IS NOT NULL")
        text = " || ".join(pieces)
        return text if self.labelled else f"CASE WHEN {' OR '.join(known)} THEN {text} ELSE '' END"


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
    parts = {}
    for label, candidates in LABELS:
        if found := tuple(column for name in candidates if (column := match(name, columns))):
            parts[label] = found
    if not TELLING & parts.keys():
        raise UsageError(
            f'"{table}" has no column such as title or description to make a text of. It has: {listed(columns)}. '
            f'Say which to use, with --columns A,B or --text "{{A}}: {{B}}".'
        )
    return Recipe(tuple(parts.items()), labelled=True)


def columns_recipe(given: str, columns: Sequence[str], table: str) -> Recipe:
    """Return the recipe for --columns a,b: `A: ... | B: ...`; a comma in a name is written "a,b"."""
    import csv

    names = [name.strip() for name in next(csv.reader([given], skipinitialspace=True), [])]
    if not names or "" in names:
        raise UsageError(f"--columns {given!r} has an empty name in it. Give names with commas between, such as a,b.")
    found = [column_of(name, columns, table) for name in names]
    return Recipe(tuple((label_of(column), (column,)) for column in found), labelled=True)


def label_of(column: str) -> str:
    """Return a column's label in the text: of release_year `Release year: `."""
    words = column.replace("_", " ").strip() or column
    return f"{words[:1].upper()}{words[1:]}: "


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
        raise UsageError(f"--text {template!r} names no column. Put one in braces, such as {{{columns[0]}}}.")
    return Recipe(tuple(parts), labelled=False)


def singular(word: str) -> str:
    """Return the singular of an English noun, by rule: movies, movie; stories, story; boxes, box."""
    low = word.lower()
    if re.search(r"(ss|us|is|series|species|news|[^s])$", low):
        return word
    if re.search(r"(?s)..ies$", low) and not re.search(IE_NOUNS, low):
        return word[:-3] + ("Y" if word.isupper() else "y")
    if re.search(r"(ss|x|ch|sh|zz|tus|bus|virus)es$", low) and not low.endswith("caches"):
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


ON_LONG = ("cut", "split", "fail", "skip")  # what becomes of a text that is longer than the model takes


class Fitted(bytes):
    """A vector of a text that the model does not take as a whole; `fit` is what was done about it."""

    fit: ClassVar[str]


class Cut(Fitted):
    """The vector of a text's beginning."""

    fit = "cut"


class Split(Fitted):
    """The mean of the vectors of a text's parts."""

    fit = "split"


class TooLongFor(str):
    """Why a text that is longer than the model takes is left out."""


# Where a text may be split, best first: behind a sentence or a line, and between words.
BORDERS = (r"(?<=[.!?…])\s+|(?<=[。！？])|\n\s*", r"\s+")


def halves(text: str) -> tuple[str, str]:
    """Return the two parts of a text, split at the border nearest to its middle, within the middle half of it."""
    middle, margin = len(text) // 2, len(text) // 4
    for border in BORDERS:
        ends = [found.end() for found in re.compile(border).finditer(text, middle - margin, middle + margin)]
        if ends:
            middle = min(ends, key=lambda end: abs(end - middle))
            break
    return text[:middle], text[middle:]


class Row(NamedTuple):
    """One row to embed: its key, its text, and the text's SHA-256."""

    key: Any
    text: str
    digest: bytes


# =============================== wire ===============================
# Bytes in, vectors out: what is sent to a server, and what its answers mean. No I/O here.
# Ollama's forms are those of its docs/api.md and server/routes.go.


class Send(NamedTuple):
    """One HTTP request, a GET if it has no body; longest silence and longest dialling, `connect`, in seconds."""

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
    kind = "refusal"  # what is counted together
    enough = enough_alone = 1  # points, until texts that were sent together are suspected, or a text alone
    slow = False  # whether less may go through where this did not
    gone = False  # whether nobody answers, or not to the end
    crashed = False  # whether the server broke under this request
    retry_after = 0.0  # seconds that the server asks for

    def points(self, alone: bool) -> int:
        """Return how much this says against the texts, where `enough` is proof."""
        return 1


class Unavailable(Trouble):
    """The server cannot now, or is not there: worth another try."""

    kind = "crash"
    # Crashes in a row: some seconds in all for several texts, which are halved then, and most of a minute for one that
    # would fail. Servers do crash by themselves.
    enough, enough_alone = 4, 8

    def __init__(self, message: str, status: int = 0, retry_after: float = 0.0) -> None:
        """`status` is that of the server's answer, 0 if none came."""
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.outcome = "overloaded" if status else "failed"
        self.gone = not status
        self.crashed = status in (400, 500)  # the other codes speak of load, or of what stands in front
        self.slow = status in (408, 504, 524)  # a time-out on the way

    def points(self, alone: bool) -> int:
        if alone:
            return int(self.crashed)
        return self.enough // 2 if self.slow else int(self.status not in (429, 503))  # which are mere load


class Silent(Trouble):
    """No answer within the time."""

    outcome = kind = "timeout"
    enough_alone = 3  # in a request of its own, a text that times out so often has failed
    slow = True


class Refused(Trouble):
    """The server will not embed this content."""


class TooLong(Refused):
    """The server will not embed this content because of its length."""


class Garbled(Trouble):
    """The answer is not what was asked for, and must not be stored."""

    kind = "garbled"
    enough = enough_alone = 2


class OtherDimensions(Garbled):
    """The vectors have another length than those already stored."""


class Superseded(Exception):
    """The server lacks this path, or takes fewer texts; the wire has changed to what it does, to be tried at once."""


class Server(NamedTuple):
    """Where a server is. `shown` is its address without secrets."""

    scheme: str
    host: str
    port: int
    path: str
    authorization: str
    ca_file: str = ""  # roots of its certificate, "" for the system's

    @property
    def openai(self) -> bool:
        """Whether it speaks the OpenAI protocol rather than Ollama's own."""
        return self.path.endswith("/v1")

    @property
    def shown(self) -> str:
        """The address as it may be printed."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    def hide(self, text: str) -> str:
        """Return what a server says, or an error, without the secrets that were sent: some proxies echo a request."""
        import base64
        import html
        import json

        kind, _, secret = self.authorization.partition(" ")
        secrets = [secret]
        if kind == "Basic":
            userinfo = base64.b64decode(secret).decode()
            secrets += [userinfo, userinfo.partition(":")[2]]
        for secret in filter(None, secrets):
            found = "|".join({re.escape(form) for form in (secret, json.dumps(secret)[1:-1], html.escape(secret))})
            alone = f"(?:{found})" if len(secret) >= 8 else rf"(?<!\w)(?:{found})(?!\w)"  # short ones are words
            text = re.sub(alone, "***", text)
        return text


def parse_server(text: str, ca_file: str = "") -> Server:
    """Return the server for a URL or any of OLLAMA_HOST's forms: host, host:port, :port, scheme://host:port/path.

    As in Ollama's envconfig, the port is 11434 unless a scheme is given, which brings its
    own; an address that means "all interfaces" is this machine to a client.
    """
    if re.fullmatch(r"hash(:\w+)?", text):
        raise UsageError(f'--server {text} is no server. The built-in embedder is called "hash:".')
    scheme, given, rest = text.strip().rpartition("://")
    scheme = scheme.lower() or "http"
    if scheme not in ("http", "https"):
        raise UsageError(f'--server {hide_password(text)} must begin with http:// or https://, or be "hash:".')
    netloc, slash, path = rest.partition("/")
    userinfo, _, hostport = netloc.rpartition("@")
    # In brackets, or with several colons, it is an IPv6 address.
    [(inner, bare, port)] = re.findall(r"(?s)^(?:\[([^\]]*)\]|(.*:.*:.*|[^:]*))(?::(.*))?\Z", hostport)
    host = inner or bare
    default = 11434 if not given else 443 if scheme == "https" else 80
    if port and not (re.fullmatch(r"\d{1,5}", port, re.ASCII) and int(port) < 65536):
        raise UsageError(f"--server {hide_password(text)} has no number of a port. Give --server http://HOST:PORT.")
    if re.search(r"[\s?#\\]", host + path) or "@" in path:
        raise UsageError(f"--server {hide_password(text)} is not an address. Give --server http://HOST:PORT.")
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    server = Server(scheme, host, int(port or default), (slash + path).rstrip("/"), "", ca_file)
    return server._replace(authorization=authorization_for(userinfo, server.openai))


def authorization_for(userinfo: str, openai: bool) -> str:
    """Return what goes into a request's header: of an address's user and password, or of a token in the environment."""
    if userinfo:
        import base64
        from urllib.parse import unquote

        return "Basic " + base64.b64encode(unquote(userinfo).encode()).decode()
    for setting in ("OLLAMA_API_KEY", "OPENAI_API_KEY")[: 1 + openai]:  # OpenAI's is none of Ollama's business
        if token := os.environ.get(setting, "").strip():
            if not re.fullmatch(r"[\x20-\x7e]*", token):
                raise UsageError(f"{setting} holds characters that a token cannot have.")
            return f"Bearer {token}"
    return ""


def hide_password(url: str) -> str:
    """Return a URL without the secret before its last @, or in a parameter."""
    return re.sub(
        r"((?:password|token|secret|key)=)[^&\s]+", r"\1***", re.sub(r"^(.*?://)?.*@", r"\1***@", url, flags=re.DOTALL)
    )


def pack(numbers: Sequence[float]) -> bytes:
    """Return a vector as it is stored: float32, little-endian, nothing else."""
    import struct

    return struct.pack(f"<{len(numbers)}f", *numbers)


# As a vector is stored, 64 numbers of it; where the machine has them in that order, too, they are read twice as fast.
PIECE = "64f" if sys.byteorder == "little" else "<64f"


def length_of(vector: bytes) -> float:
    """Return the L2 norm of a vector as it is stored; NaN and infinity come out as such.

    Piece by piece: Python makes an object of every number, and 64 of them stay in the processor's nearest cache.
    """
    import math
    import struct

    pieces = struct.iter_unpack(PIECE, vector + bytes(-len(vector) % 256))
    return math.hypot(*[math.hypot(*piece) for piece in pieces])


# The highest bytes of a float32 (IEEE 754), of either sign: of 2 or more, infinity and NaN among them, and of less
# than 2**-7. A vector of length 1 has some number that is larger, if it has no more than 2**14 of them.
FROM_TWO_UP = bytes([*range(0x40, 0x80), *range(0xC0, 0x100)])
SMALL = bytes([*range(0x3C), *range(0x80, 0xBC)])


def looks_sound(vector: bytes) -> bool:
    """Whether a stored vector may well have length 1: no number of 2 or more, some that are not small, hardly any 0.

    By its bytes alone, which takes a quarter of the time; what does not look sound may be so, and is to be measured.
    """
    high = vector[3::4]
    if high.count(0) + high.count(0x80) > len(high) // 16:
        return False
    return len(high.translate(None, FROM_TWO_UP)) == len(high) and high.translate(None, SMALL) != b""


def unpack(vector: bytes) -> Sequence[float]:
    """Return the numbers of a stored vector."""
    import struct

    return struct.unpack(f"<{len(vector) // 4}f", vector)


def cosine(one: bytes, other: bytes) -> float:
    """Return the cosine of the angle between two stored vectors, NaN if one has no direction.

    To the last digit but one: products of two float32 are exact in double precision, and fsum rounds once.
    """
    import math
    from operator import mul

    def dot(x: Sequence[float], y: Sequence[float]) -> float:
        return math.fsum(map(mul, x, y))

    a, b = unpack(one), unpack(other)
    try:
        quotient = dot(a, b) / (math.sqrt(dot(a, a)) * math.sqrt(dot(b, b)))
        return min(max(quotient, -1.0), 1.0)
    except (ZeroDivisionError, ValueError, OverflowError):  # the last two of infinity
        return math.nan


def innermost(said: Any) -> Any:
    """Return what an error says without the lists and objects around it."""
    if isinstance(said, list):
        return innermost(said[0]) if said else said
    if isinstance(said, dict):
        return next((innermost(said[name]) for name in ("message", "error", "detail", "msg") if said.get(name)), said)
    return said


def words_of(body: bytes, hide: Callable[[str], str] = str) -> str:
    """Return what an error's body says, on one line, with `hide` applied.

    Ollama has {"error": words}, OpenAI {"error": {"message": words}}, FastAPI {"detail": words} or {"detail": [{"msg":
    words}]}, TEI and others {"message": words}.
    """
    import json

    try:
        said = innermost(json.loads(body))
        text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = body.decode("utf-8", "replace")
        if text.lstrip()[:1] == "<":
            title = re.search("<title>(.{1,200}?)</title>", text, re.IGNORECASE | re.DOTALL)
            text = f'an HTML page, "{title[1].strip()}"' if title else "an HTML page"
    text = " ".join(hide(text).split())
    return text if len(text) <= 300 else text[:300] + "..."


UNKNOWN_ISSUER = "is of an unknown issuer; if that is one of your own, give its certificate with --ca-file FILE"
CERTIFICATE_ERRORS = {  # X509_V_ERR_ of OpenSSL
    9: "is not valid yet, or this machine's clock is wrong",
    10: "has expired",
    **dict.fromkeys((18, 19, 20, 21), UNKNOWN_ISSUER),
    **dict.fromkeys((62, 64), "is for another host"),
}


def describe(error: Exception) -> str:
    """Return a network error in words."""
    name = type(error).__name__
    if name == "gaierror":
        return "the host's name cannot be resolved"
    if name == "SSLCertVerificationError":
        said = CERTIFICATE_ERRORS.get(getattr(error, "verify_code", 0), "is not to be trusted")
        return f"its certificate {said}: {getattr(error, 'verify_message', error)}".rstrip(".")
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


@functools.lru_cache(None)
def tls_context(ca_file: str) -> Any:
    """Return what verifies the certificates and names of servers, by the roots in a file, or by the system's.

    One for the whole process: to load the roots takes 10 to 20 ms. Made where it is used: it cannot be pickled.
    """
    import ssl

    return ssl.create_default_context(cafile=ca_file or None)


def check_roots(ca_file: str) -> None:
    """Raise a UsageError if there are no roots in a file."""
    try:
        tls_context(ca_file)
    except OSError as error:
        problem = "it holds no certificate" if type(error).__name__ == "SSLError" else describe(error)
        raise UsageError(
            f"--ca-file {ca_file} cannot be used: {problem}. Give a file of certificates as PEM."
        ) from None


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
# and these, whatever their status, speak of the content (NaN was a 500 before 0.14), or of its length: Ollama,
# llama-server, vLLM, OpenAI, TEI, and those that word it otherwise.
DEAD_RUNNER = r"\bEOF\b|do embedding request|connection (?:refused|reset)|forcibly closed"
BAD_CONTENT = r"\bNaN\b"
TOO_LONG = (
    r"(?i)context (?:length|size|window)"
    r"|(?:input|prompt|text|sequence)s?(?: \([^)]*\))? (?:is |are )?too (?:long|big|large to process)"
    r"|less than \d+ tokens|maximum (?:input|model|sequence|token) length|too many tokens"
    r"|exceed\w* (?:the )?(?:max\w*|available) (?:\w+ ){0,3}(?:tokens|length)"
)
# Of too many texts: TEI, OpenAI, servers with pydantic, and others.
TOO_MANY = (
    r"(?i)maximum allowed batch size|array too long|too many (?:inputs|items|texts)"
    r"|max\w* number of (?:inputs|items|texts)|at most \d+ (?:inputs|items|requests|texts)|tokens per request"
    r"|batch size (?:is )?(?:\d+ )?(?:invalid|exceeds|too large)"
)
SPEAKS_TLS = r"HTTP request (?:was sent )?to (?:an )?HTTPS"
CANNOT_EMBED = r"(?i)not support (?:the )?embedding"


# Cosine above which two vectors of one text are of one model. Measured with all-MiniLM-L6-v2 on llama-server, on 600
# texts: in any batch, quantised or not, at least 0.9996; f16 for f32 0.999999, q8_0 0.9987; but q4_0 0.96 at the
# median, and another prefix 0.89.
ALIKE = 0.99


class Wire:
    """What turns texts into vectors. As it stands here, there is nobody to greet, and nothing to be learned."""

    product = ""  # what the server is called in an error
    address = ""  # for people
    model: str
    server: Server
    prefix: str  # before every text
    digest = ""  # of the model, as this server has it; "" if it does not tell
    dimensions: int | None  # that vectors must have: as asked for, as stored, or as they came; None: not known yet
    kin: Sequence[Wire] = ()  # the wires to all servers of the run

    def settle(self, dimensions: int) -> None:
        """Know how long the vectors are: of this server, and so of all."""
        for wire in self.kin:
            wire.dimensions = dimensions

    def greet(self) -> Conversation:
        """Return the conversation that checks, before a row is read, that the server has the model."""
        return []
        yield  # makes it a generator

    def agree(self) -> Conversation:
        """Return the conversation that raises Stop if a server, once it is greeted, does not go with the others."""
        return []
        yield

    def probe(self) -> Conversation:
        """Return the conversation that finds out whether a server that was away is back, and still the same."""
        return []
        yield

    def converse(self, texts: list[str], movable: bool) -> Conversation:
        """Return the conversation that embeds `texts`; `movable`: rather than wait, it may leave them to others."""
        raise NotImplementedError


MALFORMED = (ValueError, RecursionError, LookupError, TypeError, AttributeError)  # what comes of JSON that is none


class HTTPWire(Wire):
    """What all protocols over HTTP share. A subclass says what is sent, what comes, and how a server is greeted."""

    unit_length = False  # whether it promises L2-normalised vectors
    cuts = False  # whether it can be asked to cut long texts itself, at the last token that the model takes
    tokens = "OLLAMA_API_KEY"  # the setting that carries the token
    advice = ""  # what to do about a server that cannot be reached

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        self.server, self.address, self.prefix = server, server.shown, options.prefix
        self.model, self.timeout = str(options.model), float(options.timeout)
        self.context: int = options.context  # tokens, as the model's card has it; 0 if it does not
        self.common: dict[str, Any] = {"model": self.model}  # in every request
        if options.dimensions:
            self.common["dimensions"] = options.dimensions
        self.dimensions = options.dimensions
        self.expected: int | None = None  # dimensions as the server's model card or first answer has it: may be wrong
        self.on_long: str = options.on_long
        self.long_from = sys.maxsize  # characters of a text that is likely to be too long, as far as is known
        self.most_texts = sys.maxsize  # that one request can carry
        self.kin = [self]

    def converse(self, texts: list[str], movable: bool) -> Conversation:
        return Talk(self, movable=movable).embed(texts, self.on_long)

    def probe(self) -> Conversation:
        return Talk(self).probe()

    def call(self, send: Send, patient: bool = False) -> Steps[Reply]:
        """Return the reply to a greeting; raise Away if nobody answers it. `patient`: who is silent may be at work."""
        # Two seconds and a half allow for one lost packet; whoever waits here is a person at a prompt.
        reply: Reply = yield send._replace(timeout=min(self.timeout, 30.0), connect=2.5)
        if reply.status == 0 and not (patient and reply.timed_out):
            advice = "" if re.search("TLS|certificate", reply.reason) else f" {self.advice}"
            if self.server.scheme == "http" and re.search(r"without an answer|\\x15\\x03", reply.reason):  # a TLS alert
                advice = " If it speaks TLS, give --server https://..."
            away = Away(f"cannot reach {self.product} at {self.address} ({reply.reason}).{advice}")
            away.reason = reply.reason
            raise away
        return reply

    def request(self, texts: list[str], timeout: float, truncate: bool = False) -> Send:
        """Return the request that asks for the vectors of `texts`; `truncate`: the server may cut them, if it can."""
        raise NotImplementedError

    def way(self, path: str) -> str:
        """Return for the log how vectors come over a path."""
        raise NotImplementedError

    def read(self, request: Send, reply: Reply, texts: list[str]) -> list[bytes]:
        """Return the vectors in a reply, one for each text, fit to be stored; or raise what is wrong with it.

        `request` is what was asked: another conversation may have changed the protocol meanwhile.
        """
        import json

        self.check(request, reply, len(texts))
        try:
            vectors = self.vectors(request.path, json.loads(reply.body))
        except MALFORMED:
            words = words_of(reply.body, self.server.hide)
            self.explain(request, reply.status, words, "no embeddings")
            raise Garbled(f"the answer holds no embeddings: {words[:100]!r}") from None
        return gate(vectors, texts, self.unit_length)

    def vectors(self, path: str, answer: Any) -> list[Any]:
        """Return the vectors in an answer, packed or as lists of numbers, or raise any of MALFORMED."""
        raise NotImplementedError

    def check(self, request: Send, reply: Reply, texts: int = 1) -> None:
        """Raise what the reply's status means, unless it is 200; it is an answer to so many texts."""
        status = reply.status
        if status == 200:
            return
        if status == 0:
            raise Silent(reply.reason) if reply.timed_out else Unavailable(reply.reason)
        words = words_of(reply.body, self.server.hide)
        said = f"HTTP {status}: {words}" if words else f"HTTP {status}"
        if re.search(SPEAKS_TLS, words):
            raise Stop(f"{self.address} speaks TLS ({said}). Give --server https://...")
        if re.search(CANNOT_EMBED, words):
            raise Stop(f'the model "{self.model}" cannot embed ({said}). Give --model nomic-embed-text, for example.')
        if status in (400, 413, 422, 500):
            if re.search(TOO_LONG, words):
                raise TooLong(words)
            if re.search(BAD_CONTENT, words):
                raise Refused(words)
            if texts > 1 and status != 500 and re.search(TOO_MANY, words):
                # Of the numbers in the words, the largest below what was sent.
                below = [int(number) for number in re.findall(r"\d{1,9}", words) if 0 < int(number) < texts]
                self.most_texts = min(self.most_texts, max(below, default=texts // 2))
                raise Superseded(words)
        if status in (408, 429) or status >= 500 or re.search(DEAD_RUNNER, words):
            raise Unavailable(said, status, reply.retry_after)
        self.explain(request, status, words, said)
        if status in (401, 403):
            raise Stop(f"{self.address} refuses access ({said}). Set {self.tokens} to the token.")
        if 300 <= status < 400:
            raise Stop(f"{self.address} sends elsewhere ({said}). Give --server the final address.")
        raise Refused(words or said)

    def explain(self, request: Send, status: int, words: str, said: str) -> None:
        """Raise what a status of 3xx or 4xx, or a 200 without vectors, means in this protocol alone."""


# Ollama's paths for vectors, newest first. The first gives 4 bytes a number instead of some 12, and no decimals to
# parse (from 0.12.7 on), but cuts long texts without a word; the last, for servers before 0.2.6, takes one text at a
# time.
LEAN, USUAL, LEGACY = "/v1/embeddings", "/api/embed", "/api/embeddings"
# Bytes of UTF-8. A token is made of at least one, so that a text of no more of them than the context has tokens cannot
# be cut. Models add two tokens of their own, tokenizers a space; the rest is for words that they spell out. A model's
# context may be longer than what Ollama gives it unasked: that was 2,048 tokens for long, and is still so in one piece.
LEAN_MARGIN, LEAN_MOST = 16, 2048


class OllamaWire(HTTPWire):
    """Ollama's own protocol: POST /api/embed, or what else of the paths above serves better."""

    product = "Ollama"
    unit_length = True  # both newer paths promise L2-normalised vectors
    cuts = True
    advice = 'Start it with "ollama serve", or give --server URL.'

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        super().__init__(server, options)
        if options.option:  # the same in every request: Ollama reloads the model where they differ
            self.common["options"] = dict(options.option)
        self.lean_bytes = 0  # a batch takes the lean path if no text is longer; 0: none does
        self.lean_seen = False  # whether the server has given vectors over it
        self.legacy = False

    def greet(self) -> Conversation:
        import json

        body = json.dumps({"model": self.model, "name": self.model}).encode()  # "name" is the older form
        request = Send("/api/show", body, self.timeout)
        reply = yield from self.call(request)
        try:
            self.check(request, reply)
            card = json.loads(reply.body)
            # A model may come with a shorter context set than it could have (all-minilm does).
            contexts = [int(n) for n in re.findall(r"^num_ctx +(\d+)", card.get("parameters") or "", re.MULTILINE)]
            figures = [(key, n) for key, n in card["model_info"].items() if isinstance(n, int)]
        except (Trouble, *MALFORMED):
            contexts, figures = [], []  # busy, or older, or another server with Ollama's protocol: it will show
        own = [n for key, n in figures if key.endswith(".context_length")]
        lean = own and "options" not in self.common  # which the lean path does not take
        most = min(*own, *contexts, self.context or LEAN_MOST, LEAN_MOST) if lean else 0
        self.lean_bytes = max(most - LEAN_MARGIN, 0)
        self.expected = next((n for key, n in figures if key.endswith(".embedding_length")), None)
        yield from self.identify()
        return []

    def agree(self) -> Conversation:
        # What tells is the model's digest; a server without one is taken at its word about the model's name.
        other = next((wire for wire in self.kin if wire.digest and wire is not self), self)
        if self.digest and other.digest != self.digest:
            mine, its = (one.rpartition(":")[2] for one in (self.digest, other.digest))
            self.digest = ""  # for others to be compared with
            raise Stop(
                f'{self.address} has another model "{self.model}" ({mine[:12]}) than {other.address} '
                f"({its[:12]}): their vectors do not compare. Fetch the same one on both "
                f'with "ollama pull {self.model}", or leave out one --server.'
            )
        # Those asked for are chosen, the card's are not.
        if self.dimensions not in (None, self.expected) and "dimensions" not in self.common:
            yield from Talk(self).until_sane()  # raises Stop if its vectors really have another length
        return []

    def identify(self) -> Steps[None]:
        """Learn the model's digest from GET /api/tags, if the server tells it; only Ollama does."""
        import json

        request = Send("/api/tags", b"", min(self.timeout, 30.0), connect=2.5)
        for wait in (0.0, FIRST_WAIT, 2 * FIRST_WAIT):  # a moment's trouble must not hide that versions differ
            if wait:
                yield Wait(wait)
            reply: Reply = yield request
            try:
                self.check(request, reply)
                digests = {model["name"]: str(model["digest"]) for model in json.loads(reply.body)["models"]}
            except (Unavailable, Silent):
                continue
            except (Trouble, Stop, *MALFORMED):
                return
            self.digest = digests.get(self.model) or digests.get(f"{self.model}:latest", "")
            return

    def request(self, texts: list[str], timeout: float, truncate: bool = False) -> Send:
        import json

        asked: dict[str, Any]
        texts = [self.prefix + text for text in texts]
        if self.legacy:
            path, asked = LEGACY, {"prompt": texts[0]}
        elif 0 < max(map(len, map(str.encode, texts))) <= self.lean_bytes:
            path, asked = LEAN, {"input": texts, "encoding_format": "base64"}
        else:
            path, asked = USUAL, {"input": texts, "truncate": truncate}
        return Send(path, json.dumps({**self.common, **asked}).encode(), timeout)

    def way(self, path: str) -> str:
        return f"{'base64' if path == LEAN and self.lean_bytes else 'decimals'} over {path}"

    def vectors(self, path: str, answer: Any) -> list[Any]:
        if path == LEGACY:
            return [normalised(answer["embedding"])]
        if path == USUAL:
            return list(answer["embeddings"])
        vectors = in_order(answer["data"])
        if any(isinstance(vector, list) for vector in vectors):  # from before 0.12.7: nothing is gained by this path
            self.lean_bytes = 0
        self.lean_seen = True
        return vectors

    def explain(self, request: Send, status: int, words: str, said: str) -> None:
        if status == 404 and "model" in words and "not found" in words:
            raise Stop(f'{self.address} has no model "{self.model}". Fetch it with "ollama pull {self.model}".')
        path = request.path
        if path == LEAN and (status == 404 or not self.lean_seen):
            self.lean_bytes = 0  # an older server, or one behind a proxy that lets through only /api
            raise Superseded
        if path == USUAL and status == 404:
            self.legacy, self.most_texts = True, 1
            raise Superseded
        if path == LEGACY and status == 404:
            raise Stop(
                f"{self.address} is no Ollama server ({said}). Give --server URL without a path, or with /v1 "
                "at its end for one that speaks the OpenAI protocol."
            )


def in_order(items: list[Any]) -> list[Any]:
    """Return the vectors of an OpenAI answer's `data`, packed where they come as base64; each item has its place."""
    import binascii

    vectors: list[Any] = [None] * len(items)
    for place, item in enumerate(items):
        vector = item["embedding"]
        if isinstance(vector, str):
            vector = binascii.a2b_base64(vector)
            if not vector or len(vector) % 4:
                raise ValueError("not a number of floats")
        vectors[item.get("index", place)] = vector
    return vectors


class NoModel(Stop):
    """The server does not have the model."""


NO_MODEL = r"(?i)\bmodels?\b.*not (?:found|exist|loaded|available)|no models? |(?:invalid|unknown|unsupported) model\b"


class OpenAIWire(HTTPWire):
    """The protocol of OpenAI, POST /v1/embeddings, as llama-server, vLLM, TEI, LM Studio, LiteLLM and others have it.

    It does not tell what a model is like, and not every server has base64: a known-good text shows both.
    """

    product = "a server"
    tokens = "OPENAI_API_KEY or OLLAMA_API_KEY"
    advice = "Start it, or give --server URL."
    path = "/embeddings"

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        super().__init__(server, options)
        if options.option:
            raise UsageError(f"--option is for Ollama's own protocol; {server.shown} speaks OpenAI's, which has none.")
        self.base64 = False  # whether vectors are asked for, and come, in that form

    def greet(self) -> Conversation:
        before, self.base64 = self.base64, False  # one that was away may be another now
        try:
            first = yield from self.sample(base64=False)
        except NoModel as missing:
            names = yield from self.models()
            raise Stop(f"{missing} It has: {listed(names)}. Give --model NAME." if names else missing.message) from None
        except Refused as refused:
            raise Stop(f"{self.address} does not embed even a short text: {refused}.") from None
        if not first:
            self.base64 = before  # busy: it will show
            return []
        second = b""
        with contextlib.suppress(Refused, Superseded):
            second = yield from self.sample(base64=True)
        if len(second) != len(first) or cosine(first, second) < ALIKE:
            self.base64 = False  # refused, or mangled on the way
        self.expected = len(first) // 4
        if self.dimensions is None and len(second) == len(first):  # one answer may be a fault, two are the model
            self.settle(self.expected)
        elif self.dimensions not in (None, self.expected):
            yield from Talk(self).until_sane()  # raises Stop if its vectors really have another length
        return []

    def sample(self, base64: bool) -> Steps[bytes]:
        """Return the vector of a known-good text, or nothing of a server that cannot now."""
        request = self.request_as(base64, [KNOWN_GOOD], self.timeout)
        reply = yield from self.call(request, patient=True)
        if reply.status == 200:
            self.base64 = base64
        try:
            return self.read(request, reply, [KNOWN_GOOD])[0]
        except (Unavailable, Silent, Garbled):
            return b""

    def models(self) -> Steps[list[str]]:
        """Return the names of the server's models, if it tells them."""
        import json

        reply = yield from self.call(Send("/models", b"", self.timeout), patient=True)
        try:
            return [str(model["id"]) for model in json.loads(reply.body)["data"]]
        except MALFORMED:
            return []

    def request(self, texts: list[str], timeout: float, truncate: bool = False) -> Send:
        return self.request_as(self.base64, texts, timeout)

    def request_as(self, base64: bool, texts: list[str], timeout: float) -> Send:
        """Return a request for vectors in one of the two forms: other conversations may go on during a greeting."""
        import json

        asked = {**self.common, "input": [self.prefix + text for text in texts]}
        if base64:
            asked["encoding_format"] = "base64"
        return Send(self.path, json.dumps(asked).encode(), timeout)

    def way(self, path: str) -> str:
        return f"{'base64' if self.base64 else 'decimals'} over {self.server.path}{path}"

    def vectors(self, path: str, answer: Any) -> list[Any]:
        vectors = in_order(answer["data"])
        if not all(isinstance(vector, bytes) for vector in vectors):
            self.base64 = False  # so as not to ask for what is not given
        return vectors

    def explain(self, request: Send, status: int, words: str, said: str) -> None:
        if status in (400, 404) and re.search(NO_MODEL, words):
            raise NoModel(f'{self.address} has no model "{self.model}" ({said}).')
        if status == 404:
            raise Stop(f"{self.address} has no {request.path} ({said}). Does it serve embeddings?")
        if status != 200 and b'"encoding_format"' in request.body and "encoding_format" in words:
            self.base64 = False
            raise Superseded


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
    for every text. `unit_length`: the server promises L2 norm 1. It is measured in the first vector,
    since a server that does not normalise does so in none, and in those that do not look sound.
    """
    import math
    import struct

    if len(vectors) != len(texts):
        raise Garbled(f"{len(vectors)} vectors came for {len(texts)} texts")
    try:
        packed = [vector if isinstance(vector, bytes) else pack(vector) for vector in vectors]
    except (TypeError, OverflowError, struct.error):
        raise Garbled("a vector holds something that is no number") from None
    for place, vector in enumerate(packed):
        if looks_sound(vector) and not (unit_length and place == 0):
            continue
        norm = length_of(vector)
        if not 0 < norm < math.inf:
            raise Garbled("a vector is all zero" if norm == 0 else "a vector holds NaN or infinity")
        # float32 and a server's printing of it are good to 1e-4; what is off by more was not normalised.
        if unit_length and abs(norm - 1) > 0.01:
            raise Garbled(f"a vector has length {norm:.3g} instead of 1")
    if len({len(vector) for vector in packed}) > 1:
        raise Garbled("vectors of different dimensions came in one answer")
    # Different beginnings tell that nearly always, and sooner.
    if len({vector[:64] for vector in packed}) < len(packed) and len(set(packed)) < len(set(map(plain, texts))):
        raise Garbled("different texts were given one vector")
    return packed


def plain(text: str) -> str:
    """Return what an uncased tokenizer sees of a text: texts alike in this may share a vector.

    Only the beginning, since a text longer than the context is cut there.
    """
    import unicodedata

    decomposed = unicodedata.normalize("NFKD", text[:1000])
    return "".join(character for character in decomposed.casefold() if character.isalnum())


class HashWire(Wire):
    """No server: signed feature hashing of words and word pairs, computed in this process.

    K. Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009.
    It finds shared words, not meaning: for trying the program, not for real search.
    """

    product = address = "hash:"
    model = "hash-256"  # the name says it all, and there is no digest
    dimensions = 256
    server = Server("hash", "", 0, "", "")

    def __init__(self, options: argparse.Namespace) -> None:
        self.prefix = options.prefix

    def converse(self, texts: list[str], movable: bool) -> Conversation:
        return [hash_embedding(self.prefix, text) or "no words in the text" for text in texts]
        yield  # makes it a generator


def hash_embedding(prefix: str, text: str) -> bytes:
    """Return the vector of 256 float32, or nothing for a text without words."""
    import hashlib
    import math

    words = re.findall(r"\w+", text.casefold())
    words = words and re.findall(r"\w+", prefix.casefold()) + words
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


def wires_for(options: argparse.Namespace) -> list[Wire]:
    """Return the wires that speak to the servers of --server."""
    if options.server == ["hash:"]:
        return [HashWire(options)]
    wires: list[Wire] = []
    for text in options.server:
        server = parse_server(text, options.ca_file or "")
        wire = (OpenAIWire if server.openai else OllamaWire)(server, options)
        if wire.address in [other.address for other in wires]:  # rather a slip than a wish: another would stay idle
            raise UsageError(f"--server {wire.address} is given twice. Give each server once.")
        wires.append(wire)
        wire.kin = wires
    return wires


# =============================== one batch's conversation ===============================
# A generator without I/O or clock: it yields what is to be done and is sent back what came.
# Whoever drives it, with streams, a blocking connection or a list, it decides the same.


class Wait(NamedTuple):
    """Let this many seconds pass."""

    seconds: float


class Exchange(NamedTuple):
    """What happened to one request, for the pace and the log; `outcome` is ok, overloaded, timeout or failed.

    `texts` is 0 for the known-good text, which is none of the table's; `way` is how vectors came, in words;
    `most` is how many texts one request can carry.
    """

    texts: int
    seconds: float
    outcome: str
    reason: str = ""
    way: str = ""
    most: int = sys.maxsize


Steps = Generator[Union[Send, Wait, Exchange], Any, T]  # what it is sent back is the Reply to a Send, None otherwise
Answers = list[Union[bytes, str]]  # for each text its vector, or in words why it has none
Conversation = Steps[Answers]

PATIENCE = 120.0  # seconds of trying without one good answer, until the server is given up
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0  # seconds; the cap bounds the delay after a server has come back
LONGEST_RETRY_AFTER = 600.0  # seconds; who asks for more may as well be away
LEAVE = 5.0  # seconds of trying, where there are other servers, until the texts go there; at once if nobody is there
SUSPICIONS = 3  # of one text, before it fails although the server was not well right after it either
KNOWN_GOOD = "a short text"  # no model has a reason to refuse this


def in_half(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return the two halves of a list."""
    middle = len(texts) // 2
    return texts[:middle], texts[middle:]


def mean(vectors: list[tuple[int, bytes]]) -> bytes:
    """Return the mean of vectors, each with its weight, scaled to length 1."""
    sums = [sum(values) for values in zip(*([weight * x for x in unpack(vector)] for weight, vector in vectors))]
    return pack(normalised(sums))


class Talk:
    """One conversation with a server, about one batch of texts."""

    def __init__(self, wire: HTTPWire, jitter: Callable[[], float] | None = None, movable: bool = False) -> None:
        """`jitter` gives numbers from 0 to 1 that spread the waits of many clients; `movable` is as in converse()."""
        import random

        self.wire, self.timeout, self.movable, self.jitter = wire, wire.timeout, movable, jitter or random.random
        self.trying = 0.0  # seconds since the last good answer
        self.waits = 0  # and waits in that time

    def embed(self, texts: list[str], on_long: str) -> Conversation:
        """Return the answers for `texts`; raise Stop where the server is away or of no use.

        `on_long` is one of ON_LONG; or "truncate": the server cuts; or "whole": as "skip", of a part of a text.

        A batch that is refused, or keeps failing, is halved until the texts at fault stand
        alone. A single text is failed only when the server embeds a known-good text right after
        it, or after the last of SUSPICIONS: then the fault is not the server's.
        """
        wire, single, longest = self.wire, len(texts) == 1, max(map(len, texts))
        if len(texts) > wire.most_texts:
            return (yield from self.apart(texts, on_long, *in_half(texts)))
        if not single and longest >= wire.long_from:
            *others, last = sorted(texts, key=len)  # if it is taken, so will be the others
            return (yield from self.apart(texts, on_long, [last], others))
        points: dict[str, int] = {}  # against the texts, of each kind of trouble
        suspicions = 0
        while True:
            try:
                vectors = yield from self.ask(texts, truncate=on_long == "truncate")
                if single and on_long != "truncate":
                    wire.long_from = max(wire.long_from, longest + 1)
                return vectors
            except Superseded:
                return (yield from self.embed(texts, on_long))
            except Trouble as caught:
                trouble = caught
            if isinstance(trouble, (Silent, OtherDimensions)):
                # After a silence, the server may go on computing what nobody waits for any more: asking again before
                # it has time for a short text would only lengthen its queue. After other dimensions, this raises Stop
                # if all vectors of this server are like that.
                yield from self.until_sane()
            points[trouble.kind] = points.get(trouble.kind, 0) + trouble.points(single)
            if points[trouble.kind] < (trouble.enough_alone if single else trouble.enough):
                yield from self.pause(trouble)
                continue
            too_long = isinstance(trouble, TooLong)
            if not single:
                if points.get("crash") and not too_long:
                    yield from self.until_sane()  # halves sent to a server that is down would prove nothing
                # By length, if that is it, so that those at fault are soon among themselves.
                return (yield from self.apart(texts, on_long, *in_half(sorted(texts, key=len) if too_long else texts)))
            # Is it the text, or the server? Only the server's word on a known-good text tells; but of the length of
            # a part, or of a text as long as others that were refused, it is believed.
            believed = too_long and on_long != "fail" and (on_long == "whole" or longest >= wire.long_from)
            if not believed:
                suspicions += 1
                if not (yield from self.until_sane()) and suspicions < SUSPICIONS:
                    points["crash"] = 0
                    continue
            if not too_long:
                return [str(trouble)]
            wire.long_from = min(wire.long_from, longest)
            return [(yield from self.fit(texts[0], on_long, str(trouble)))]

    def apart(self, texts: list[str], on_long: str, *groups: list[str]) -> Conversation:
        """Return the answers for `texts`, asked for in groups; to the same text the same answer."""
        answers: dict[str, bytes | str] = {}
        for group in groups:
            if group := list(dict.fromkeys(text for text in group if text not in answers)):
                answers.update(zip(group, (yield from self.embed(group, on_long))))
        return [answers[text] for text in texts]

    def fit(self, text: str, on_long: str, refusal: str) -> Steps[bytes | str]:
        """Return the answer for a text that the server does not take as a whole."""
        if on_long == "cut":
            answer = yield from self.cut(text, refusal)
            return Cut(answer) if isinstance(answer, bytes) else answer
        if on_long == "split":
            return (yield from self.split(text))
        return refusal if on_long == "fail" else TooLongFor(refusal)

    def cut(self, text: str, refusal: str) -> Steps[bytes | str]:
        """Return the vector of a text's beginning, as long as the server takes it, found by bisection.

        Within a sixteenth of its length: each further step costs a request and adds fewer words.
        """
        if self.wire.cuts:
            [answer] = yield from self.embed([text], "truncate")
            if not isinstance(answer, TooLongFor):  # some versions of Ollama refuse to cut, too
                return answer
        best: bytes | str = refusal
        low, high = 0, len(text)
        while high - low > max(low // 16, 1):
            middle = (low + high) // 2
            space = text.rfind(" ", low + 1, middle)
            middle = space if space > 0 else middle
            [answer] = yield from self.embed([text[:middle]], "whole")
            if isinstance(answer, bytes):
                low, best = middle, answer
            elif isinstance(answer, TooLongFor):
                high = middle
            else:
                return answer
        return best

    def split(self, text: str) -> Steps[bytes | str]:
        """Return the mean of the vectors of a text's parts: its halves, or the halves of what is still too long."""
        found: list[tuple[int, bytes]] = []  # each part's length and vector
        parts = [*halves(text)]
        while parts:
            part = parts.pop(0)
            if not part.strip(BLANKS):
                continue
            [answer] = yield from self.embed([part], "whole")
            if isinstance(answer, bytes):
                found.append((len(part), answer))
            elif isinstance(answer, TooLongFor) and len(part) > 1:
                parts[:0] = halves(part)
            else:
                return str(answer)
        vector = mean(found)
        return Split(vector) if any(vector) else "the vectors of its parts cancel each other out"

    def ask(self, texts: list[str], probe: bool = False, truncate: bool = False) -> Conversation:
        """Return the vectors of `texts` from one request, or raise the Trouble with it."""
        request = self.wire.request(texts, self.timeout, truncate)
        reply: Reply = yield request
        try:
            vectors: Answers = [*self.wire.read(request, reply, texts)]
            yield from self.check_dimensions(len(vectors[0]) // 4, probe)
        except Superseded as learned:
            if str(learned):
                yield Exchange(len(texts), reply.seconds, "failed", str(learned), most=self.wire.most_texts)
            raise
        except Trouble as trouble:
            if isinstance(trouble, Silent):
                self.timeout = min(self.timeout * 2, self.wire.timeout * 4)
            if probe or not trouble.slow:  # a long silence may mean that much was asked for
                self.trying += reply.seconds
            outcome = "failed" if probe else trouble.outcome
            yield Exchange(0 if probe else len(texts), reply.seconds, outcome, str(trouble))
            raise
        self.trying = self.waits = 0
        if not probe:
            yield Exchange(len(texts), reply.seconds, "ok", way=self.wire.way(request.path), most=self.wire.most_texts)
        return vectors

    def check_dimensions(self, dimensions: int, probe: bool) -> Steps[None]:
        """Raise OtherDimensions if vectors of that length do not belong with the others."""
        wire = self.wire
        if wire.dimensions is None:
            if probe:
                return  # nothing is known yet that it could differ from
            if dimensions != wire.expected:
                # The model card says otherwise, or nothing. One answer may be a fault, two in a row are the model.
                [vector] = yield from self.ask([KNOWN_GOOD], probe=True)
                if len(vector) // 4 == dimensions:
                    wire.expected = dimensions
        known = wire.dimensions or wire.expected  # another conversation may have settled it meanwhile
        if dimensions != known:
            raise OtherDimensions(f"vectors of {dimensions} dimensions came instead of {known}")
        wire.settle(dimensions)

    def known_good(self) -> Conversation:
        """Return the vector of a known-good text, or raise the Trouble with it; Stop if it has other dimensions."""
        wrong = 0
        while True:
            try:
                return (yield from self.ask([KNOWN_GOOD], probe=True))
            except Superseded:
                continue
            except OtherDimensions as error:
                wrong += 1
                if wrong == 2:  # one answer may be a fault, two in a row are the model
                    what = "the table holds"
                    cure = (
                        "Give the --model and --dimensions that made its vectors, or --target NAME for a second table."
                    )
                    if "dimensions" in self.wire.common:
                        what, cure = "was asked for", "Leave out --dimensions, or give another --model."
                    raise Stop(f"{self.wire.address} does not give what {what}: {error}. {cure}") from None

    def probe(self) -> Conversation:
        """Return the vector of a known-good text, from a server that was away; raise Away if it still is."""
        yield from self.wire.greet()
        yield from self.wire.agree()
        try:
            return (yield from self.known_good())
        except Trouble as trouble:
            raise self.away(trouble) from None

    def until_sane(self) -> Steps[bool]:
        """Wait until the server embeds a known-good text; return whether it did so at once."""
        at_once = True
        while True:
            try:
                yield from self.known_good()
                return at_once
            except Trouble as trouble:
                at_once = False
                yield from self.pause(trouble, known_good=True)

    def away(self, trouble: Trouble) -> Away:
        """Return the end of this conversation."""
        away = Away(
            f"{self.wire.product} at {self.wire.address} has given no good answer for "
            f"{self.trying / 60:.0f} minutes ({trouble}). Run the same command again when it does."
        )
        away.reason = str(trouble)
        away.wait = min(trouble.retry_after, LONGEST_RETRY_AFTER)
        return away

    def pause(self, trouble: Trouble, known_good: bool = False) -> Steps[None]:
        """Wait before another try: longer each time, jittered, or as long as the server asks for.

        Full jitter about the middle: M. Brooker, "Exponential Backoff And Jitter", AWS, 2015.
        Rather than wait, texts that are movable are left to other servers; but not those under which
        the server may have broken, unless it cannot bear the known-good text either: they would break the others.
        """
        away = self.away(trouble)
        blameless = known_good or not trouble.crashed
        leave = self.movable and blameless and (trouble.gone or self.trying + away.wait >= LEAVE)
        if leave or self.trying >= PATIENCE:
            raise away
        wait = min(FIRST_WAIT * 2**self.waits, LONGEST_WAIT) * (0.5 + self.jitter())
        self.trying += wait  # waiting as long as the server asks for is not trying
        self.waits += 1
        yield Wait(max(wait, away.wait))


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

    def __init__(
        self, in_flight: int | None, batch_size: int | None, timeout: float = 300.0, most: int = MOST_IN_FLIGHT
    ) -> None:
        """A number fixes that setting, None leaves it to Pace, up to `most` in flight."""
        self.in_flight = in_flight or 2  # one being computed, one waiting: the shortest pipe without a gap
        self.batch_size = batch_size or 4  # a few seconds' work on the slowest laptop
        self.reason = "start"
        self._auto_in_flight, self._auto_batch, self._most = in_flight is None, batch_size is None, most
        self._largest = batch_size or self.LARGEST_BATCH
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
        self._measure_anew()

    def __str__(self) -> str:
        """The settings, and why they are so."""
        return f"{self.in_flight} in flight, batches of {self.batch_size}: {self.reason}"

    def observe(self, texts: int, seconds: float, outcome: str, load: int) -> None:
        """Learn that an exchange ended: ok, overloaded, timeout, or failed for another reason.

        `load` are the texts that were in flight when it was sent, its own included.
        """
        full = self.in_flight * self.batch_size
        self._first -= 1
        if load > full or outcome == "failed" or not (self._auto_in_flight or self._auto_batch):
            return  # sent before the last reduction; or no sign of too much; or nothing to decide
        self._trouble += ((outcome != "ok") - self._trouble) * self.WEIGHT[outcome]
        if outcome != "ok":
            if self._trouble > 0.5:
                self._back_off(outcome)
        elif self._first >= 0 and seconds > self._target:
            return
        elif load >= 0.75 * full and abs(texts - self.batch_size) <= 0.2 * self.batch_size:  # sent as things are now
            self._count += 1
            self._texts += texts
            self._load += load
            self._seconds += max(seconds, 0.001)
            rate = self._load / self._seconds
            if self._count >= self._enough(rate):
                self._decide(rate)

    def limit(self, most: int) -> None:
        """Learn that a request can carry no more texts than that."""
        if most < self._largest:
            self._largest, self._before = most, (self._before[0], min(self._before[1], most))
            if most < self.batch_size:
                self._move, self._rate = "", 0.0
                self._change(self.in_flight, most, f"no more than {most} texts are taken")

    def _measure_anew(self) -> None:
        self._count = self._texts = self._load = 0
        self._seconds = 0.0

    def _enough(self, rate: float) -> int:
        """Return how many answers settle the matter: few if the difference is far beyond noise."""
        import math

        if "more of both" in (self._move, *self._moves[:1]):
            return 2
        if not self._rate:
            return max(8, self.in_flight)
        few = max(4, self.in_flight // 8)
        many = 32 if self._move == "more in flight" else 16  # a wrong "more" is the error that adds up
        noise = max(0.3, 1.2 / math.sqrt(self._count))
        return few if abs(math.log(rate / self._rate)) > noise else max(many, self.in_flight)

    def _decide(self, rate: float) -> None:
        """A measurement is complete: judge the experiment, then start the next one or rest."""
        ratio = rate / (self._rate or rate)
        move, self._move = self._move, ""
        needed = self._needed if move else 0.0
        if ratio < needed:
            self._undo(move, rate, ratio)
        elif (ratio > self.LEAP and needed < 1) or (not move and ratio < 1 / self.LEAP):
            self._pause, self._rate = self.PAUSE, 0.0  # no experiment explains that: the server has changed
            self._start_round()
        else:
            self._rate, self._took = rate, self._seconds / self._count
            if move:  # it worked: once more, but short requests come first, unless throughput soars
                if ratio > 1.7:
                    self._step = 4
                    self._put_first(move, "more in flight")
                else:
                    self._step = 2
                    self._put_first("smaller requests", move)
            elif not self._moves:
                self._rested += self._texts / rate
                if self._rested >= self._pause:
                    self._pause = min(2 * self._pause, self.LONGEST_PAUSE)
                    self._start_round()
            while self._moves and not self._move:
                self._try(self._moves.pop(0))
        self._measure_anew()

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
        in_flight = min(self._most, in_flight) if self._auto_in_flight else self.in_flight
        batch = min(self._largest, max(1, batch)) if self._auto_batch else self.batch_size
        if (in_flight, batch) != (self.in_flight, self.batch_size):
            self._move, self._needed, self._before = move, needed, (self.in_flight, self.batch_size)
            self._change(in_flight, batch, f"trying {move}: {self._rate:.1f} texts/s, {took:.1f} s per request")

    def _change(self, in_flight: int, batch: int, reason: str) -> None:
        self.reason = f"{reason} with {self.in_flight} x {self.batch_size}"
        self.in_flight, self.batch_size = in_flight, batch
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
        self._move, self._moves, self._step = "", [], 2
        self._rate = self._rested = self._trouble = 0.0
        self._change(in_flight, batch, "requests time out" if outcome == "timeout" else "the server is overloaded")


class Result(NamedTuple):
    """A batch's rows with their answers."""

    rows: list[Row]
    answers: Answers


NEVER = float("inf")  # a moment that does not come


class Lane:
    """One server of a run: its wire, its pace, and what is under way to it. Moments are seconds of any one clock."""

    WEIGHT = 0.3  # of the last answer in the rate

    def __init__(self, place: int, wire: Wire, pace: Pace) -> None:
        """`place` is its number among the servers."""
        self.place, self.wire, self.pace = place, wire, pace
        self.logged = pace.reason  # the last one that the log has
        self.flying = self.texts = 0  # batches and texts under way
        self.rate = 0.0  # texts/s; 0: not known
        self.free = 0.0  # the moment at which all that is under way should be done
        self.embedded = 0  # texts
        self.trouble = ""  # why it gets nothing now; "" while it does
        self.barred = False  # whether it is of no use for the rest of the run
        self.since = self.absent = 0.0  # when it went away, and seconds that it was away before
        self.trying = 0.0  # since when it has been tried in vain
        self.next_probe = NEVER  # where one is under way, or none is needed
        # Answers that came after it went: it may have been started again with another model, which a probe will tell.
        self.held: list[Result] = []

    def observe(self, exchange: Exchange, under_way: int) -> None:
        """Learn how a request went; Little's law gives the rate, as it does in Pace."""
        self.pace.limit(exchange.most)
        self.pace.observe(exchange.texts, exchange.seconds, exchange.outcome, under_way)
        if exchange.outcome == "ok":
            self.embedded += exchange.texts
            rate = under_way / max(exchange.seconds, 0.001)
            self.rate += (rate - self.rate) * (self.WEIGHT if self.rate else 1.0)


class Batch(NamedTuple):
    """Rows whose texts go to a server together; `under_way` texts were in flight to it when they did, these included.

    One without rows asks a server whether it is back. `moves` is how many servers have left it undone.
    """

    rows: list[Row]
    under_way: int
    lane: Lane
    moves: int = 0


class Servers:
    """Which server the next batch goes to, and how large it is; and which servers are away.

    As long as there is enough to do, each server that has room gets a batch as its pace has it. Towards the end
    of the table each gets so much that all are done at one moment, in ever smaller batches: half of its share at a
    time, as in factoring (S. Hummel et al., "Factoring: a method for scheduling parallel loops", CACM 35, 1992).
    A server that is away is probed, and what was under way to it goes to the others. No clock, no I/O.
    """

    SMALLEST = 8  # times smaller than the pace's are the last batches at least: each has its overhead
    UNKNOWN = 4  # times smaller are the first batches, until a server has answered
    PROBE, LATE = 0.25, 8  # a server is probed so many seconds after it went, then each 1/LATE of its time away
    MOVES = 3  # servers that may leave a batch undone; the next one has to find out what is wrong with it

    def __init__(self, lanes: list[Lane], most: int | None = None) -> None:
        """`most` requests are in flight to all servers together."""
        self.lanes, self.most = lanes, most or sys.maxsize
        self.alone = len(lanes) == 1  # then it is used as it is, and what ends it ends the run
        self.returned: list[tuple[list[Row], int]] = []  # rows that a server has left undone, and how many have
        self.dimensions: int | None = None  # of the vectors, once one has come
        self.known = b""  # the vector of the known-good text, where it is needed to tell whether a server is the same

    @property
    def texts(self) -> int:
        """Texts under way."""
        return sum(lane.texts for lane in self.lanes)

    @property
    def present(self) -> list[Lane]:
        """The servers that are not away."""
        return [lane for lane in self.lanes if not lane.trouble]

    def choose(self, left: Callable[[], int], now: float) -> tuple[Lane, int] | None:
        """Return the server for the next batch and its size, or None if there is room nowhere.

        `left` gives how many rows are not under way yet, as far as that is known.
        """
        there = self.present
        roomy = [lane for lane in there if lane.flying < lane.pace.in_flight]
        if not roomy or sum(lane.flying for lane in self.lanes) >= self.most:
            return None
        if len(there) == 1:
            return there[0], there[0].pace.batch_size
        known = [lane.rate for lane in there if lane.rate]
        usual = sum(known) / len(known) if known else 1.0

        def rate(lane: Lane) -> float:
            return lane.rate or usual

        def begin(lane: Lane) -> float:  # who is late is taken to be late by as much again: it may never answer
            return now + abs(lane.free - now) if lane.flying else now

        # When would all be done together? A server that is busy for longer than that gets nothing more.
        rows, end, begins, rates = max(left(), 0) or sys.maxsize, NEVER, 0.0, 0.0
        for lane in sorted(there, key=begin):
            if begin(lane) < end:
                begins += rate(lane) * begin(lane)
                rates += rate(lane)
                end = (rows + begins) / rates
        found = []
        for lane in there:
            usual_size = lane.pace.batch_size
            share = (end - begin(lane)) * rate(lane)
            # The soonest first; before all others those not known yet, with little, since they may be slow.
            most = usual_size if lane.rate else -(-usual_size // self.UNKNOWN)
            size = int(min(most, max(-(-usual_size // self.SMALLEST), share / 2)))
            found.append((begin(lane) + size / lane.rate if lane.rate else 0.0, lane.place, lane, size, share))
        found.sort()
        for _, _, lane, size, share in found:
            if lane in roomy and (share >= size / 2 or lane is found[0][2]):
                return lane, size
        return None

    def launch(self, lane: Lane, rows: list[Row], moves: int, now: float) -> Batch:
        """Note that a batch is on its way, and return it."""
        begin = max(lane.free, now) if lane.flying else now
        lane.free = begin + len(rows) / lane.rate if lane.rate else now
        lane.flying += 1
        lane.texts += len(rows)
        return Batch(rows, lane.texts, lane, moves)

    def land(self, batch: Batch, now: float) -> None:
        """Note that a batch is no longer under way."""
        lane = batch.lane
        if batch.rows:
            lane.flying -= 1
            lane.texts -= len(batch.rows)
            lane.free = now + lane.texts / lane.rate if lane.rate else now

    def take_returned(self, size: int) -> tuple[list[Row], int]:
        """Return up to so many rows that a server has left undone, and how many have."""
        rows, moves = self.returned.pop()
        if rows[size:]:
            self.returned.append((rows[size:], moves))
        return rows[:size], moves

    def can_spare(self, batch: Batch) -> bool:
        """Whether the work goes on where a server has left a batch undone; not if they have done so again and again."""
        return not self.alone and batch.moves < 2 * self.MOVES

    def lose(self, batch: Batch, stop: Stop, now: float) -> str:
        """Note that a server left a batch undone, for others to do; return what is news about the server."""
        lane, known = batch.lane, batch.lane.trouble
        if batch.rows:
            self.returned.append((batch.rows, batch.moves + 1))
        if lane.barred:
            return ""
        if not known:
            lane.since = lane.trying = now
        if not isinstance(stop, Away):
            lane.trouble, lane.barred, lane.next_probe = stop.message, True, NEVER
            self.redo(lane)
            return f"{stop.message} The other servers do its work."
        lane.trouble = stop.reason or stop.message
        if stop.wait:
            lane.trying = now + stop.wait  # waiting as long as the server asks for is not trying
        if not known or not batch.rows:
            lane.next_probe = now + max(self.PROBE, (now - lane.since) / self.LATE, stop.wait)
        return "" if known else f"{lane.wire.address} is away ({lane.trouble}); the other servers do its work"

    def redo(self, *lanes: Lane) -> None:
        """Give the rows of answers that cannot be trusted to other servers."""
        for lane in lanes:
            self.returned += [(result.rows, 0) for result in lane.held]
            lane.held = []

    def to_probe(self, now: float) -> list[Batch]:
        """Return the questions that are due to servers that are away."""
        due = [lane for lane in self.lanes if lane.next_probe <= now]
        for lane in due:
            lane.next_probe = NEVER
        return [Batch([], 0, lane) for lane in due]

    def welcome(self, lane: Lane, now: float) -> str:
        """Take a server into service again that is back and still the same, and return the news."""
        gone = now - lane.since
        lane.absent, lane.trouble = lane.absent + gone, ""
        return f"{lane.wire.address} is back after {gone:.1f} s"

    def check(self, batch: Batch, answers: Answers) -> Stop | None:
        """Return the end of the work with a server whose vectors are not like those of the others, or like before."""
        if self.alone:
            return None
        address = batch.lane.wire.address
        vectors = [answer for answer in answers if isinstance(answer, bytes)]
        lengths = {len(vector) // 4 for vector in vectors}
        if self.dimensions is None and len(lengths) == 1:
            self.dimensions = min(lengths)
        if wrong := lengths - {self.dimensions}:
            return Stop(f"{address} gives vectors of {min(wrong)} dimensions, and the others of {self.dimensions}.")
        if self.known and vectors and not batch.rows and cosine(vectors[0], self.known) < ALIKE:
            return Stop(f"{address} has come back with other vectors than before.")
        return None

    def given_up(self, now: float) -> Stop | None:
        """Return the end of the run if all servers have been away for long, or are of no use."""
        for lane in self.lanes:
            if not lane.barred and (not lane.trouble or now - lane.trying < PATIENCE):
                return None
        said = "; ".join(f"{lane.wire.address} since {now - lane.since:.0f} s: {lane.trouble}" for lane in self.lanes)
        return Stop(f"No server is left that gives good answers ({said}). Run the same command again when one does.")

    def shares(self, elapsed: float, now: float) -> list[str]:
        """Return for the log what each server has done in that many seconds."""
        if self.alone:
            return [f"at the end {self.lanes[0].pace}"]
        lines = []
        for lane in self.lanes:
            away = lane.absent + (now - lane.since if lane.trouble else 0.0)
            speed = lane.embedded / max(elapsed - away, 0.001)
            lines.append(
                f"{lane.wire.address}: {lane.embedded} texts, {speed:.1f} texts/s, away for {away:.1f} s; "
                f"at the end {lane.pace}"
            )
        return lines


# =============================== engines ===============================
# An engine turns batches into results, in any order, holding a bounded number in flight.
# Engine.run is that loop; a subclass says how one batch is sent on its way and waited for.


class Task(NamedTuple):
    """A batch as a worker is told of it: the server's place, and what its conversation needs; no texts to probe."""

    place: int
    texts: list[str]
    movable: bool
    dimensions: int | None

    def begin(self, wires: Sequence[Wire]) -> Conversation:
        """Return the conversation."""
        wire = wires[self.place]
        if self.dimensions:
            wire.settle(self.dimensions)  # what the run knows counts, not what this process may have learnt
        return wire.converse(self.texts, self.movable) if self.texts else wire.probe()


class Heard(NamedTuple):
    """What the log is told: a request to a server, or news about one."""

    lane: Lane
    what: Exchange | str


Said = Union[Exchange, Answers, Exception]  # a request of a batch's conversation, its answers, or what ended it
Event = tuple[Batch, Said]

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
    """One connection to a server, kept alive. Subclasses have `open`, `talk`, `close` and `sleep` for it."""

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
        where it broke off, a time-out where it took too long.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Drop the connection, if there is one."""

    async def sleep(self, seconds: float) -> None:
        """Let time pass."""
        raise NotImplementedError

    async def hold(
        self, conversation: Conversation, tell: Callable[[Exchange], None] = lambda exchange: None
    ) -> Answers:
        """Carry out a conversation's steps and return its answers; each Exchange is passed on to `tell`."""
        reply: Reply | None = None
        try:
            while True:
                step = conversation.send(reply)
                reply = None
                if isinstance(step, Send):
                    reply = await self.exchange(step)
                elif isinstance(step, Wait):
                    await self.pause(step.seconds)
                else:
                    tell(step)
        except StopIteration as end:
            answers: Answers = end.value
            return answers

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
        started, kept = time.monotonic(), self.connected
        while True:
            try:
                if not self.connected:
                    await self.open(send.connect)
                    self.connected = True
                reply = await self.talk(send)
                return reply._replace(seconds=time.monotonic() - started)
            except (OSError, EOFError, ValueError) as error:
                connected = self.connected
                self.close()
                if kept and isinstance(error, (ConnectionError, EOFError)):
                    kept = False
                    continue
                late = type(error).__name__ in ("TimeoutError", "timeout")  # the latter is socket's before Python 3.10
                if not late:
                    reason = self.server.hide(describe(error))[:200]
                elif connected:
                    reason = f"no answer within {send.timeout:g} s"
                else:  # which is not the silence of a server that is at work
                    reason = f"no connection within {send.connect:g} s"
                seconds = time.monotonic() - started
                return Reply(0, seconds=seconds, reason=reason, timed_out=late and connected)


class BlockingTransport(Transport):
    """A connection by http.client, for worker processes; its coroutines never wait for one another."""

    connection: Any

    async def open(self, seconds: float) -> None:
        import http.client

        make: Any = http.client.HTTPConnection
        if self.server.scheme == "https":
            make = functools.partial(http.client.HTTPSConnection, context=tls_context(self.server.ca_file))
        self.connection = make(self.server.host, self.server.port, timeout=seconds)
        self.connection.connect()

    async def talk(self, send: Send) -> Reply:
        import http.client

        self.connection.sock.settimeout(send.timeout)
        try:
            path, method = self.server.path + send.path, "POST" if send.body else "GET"
            self.connection.request(method, path, send.body or None, headers_for(self.server))
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


class Watch:
    """Within it, a connection that is silent for so many seconds is dropped, which raises TimeoutError.

    The run holds up the loop while it reads or saves. What has arrived meanwhile is heard
    first: only the turn after the one in which the time is up decides.
    """

    timer: Any  # the call of `look` that comes next

    def __init__(self, transport: Any, seconds: float) -> None:
        import asyncio

        self.transport, self.seconds, self.loop = transport, seconds, asyncio.get_running_loop()
        self.too_late = False

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
        context = tls_context(server.ca_file) if server.scheme == "https" else None
        opened = asyncio.open_connection(server.host, server.port, ssl=context, limit=STREAM_BYTES)
        try:
            self.reader, self.writer = await asyncio.wait_for(opened, seconds)
        except asyncio.TimeoutError:  # which is one of its own before Python 3.11
            raise TimeoutError from None
        headers = {"Host": server.shown.split("/")[2], **headers_for(server)}
        self.headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

    async def talk(self, send: Send) -> Reply:
        import asyncio

        length = f"Content-Length: {len(send.body)}\r\n" if send.body else ""
        start = f"{'POST' if send.body else 'GET'} {self.server.path}{send.path} HTTP/1.1"
        with Watch(self.writer.transport, send.timeout) as self.watch:
            self.writer.write(f"{start}\r\n{self.headers}{length}\r\n".encode("latin-1") + send.body)
            await self.writer.drain()
            self.watch.heard()
            status = 100
            while 100 <= status < 200:  # interim answers
                version, status, headers = await self.head()
            chunked = "chunked" in headers.get("transfer-encoding", "").lower()
            size = headers.get("content-length")
            try:
                pieces = await (self.chunks() if chunked else self.pieces(None if size is None else int(size)))
            except (EOFError, ConnectionError, ValueError, asyncio.LimitOverrunError):
                raise OSError("the answer was cut off") from None
        keep = headers.get("connection", "").lower()
        if keep == "close" or (version == "1.0" and keep != "keep-alive") or not (chunked or size):
            self.close()
        return Reply(status, b"".join(pieces), retry_after=retry_after(headers.get("retry-after", "")))

    async def head(self) -> tuple[str, int, dict[str, str]]:
        """Return the version, the status and the headers of an answer, their names in lower case."""
        import asyncio

        try:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                raise
            said = error.partial.decode("latin-1")
            whole = said.startswith("HTTP/")
            raise OSError("the answer was cut off" if whole else f"malformed answer: {said!r}") from None
        except asyncio.LimitOverrunError:
            raise OSError("malformed answer: endless headers") from None
        self.watch.heard()
        start, *lines = head.split("\r\n")
        found = re.match(r"\s*HTTP/(1\.\S*)\s+(\d+)(?!\S)", start)
        if not found:
            raise OSError(f"malformed answer: {start!r}")
        fields = (line.partition(":") for line in lines)
        return found[1], int(found[2]), {name.strip().lower(): value.strip() for name, _, value in fields}

    async def chunks(self) -> list[bytes]:
        """Return a chunked body in pieces as they come; EOFError or ValueError if it is not whole."""
        pieces = []
        while size := int((await self.reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            pieces += await self.pieces(size)
            await self.reader.readexactly(2)
        while await self.reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailers
        return pieces

    async def pieces(self, size: int | None) -> list[bytes]:
        """Return that many bytes in pieces as they come, EOFError if there are fewer; None: all until the end."""
        pieces, left = [], sys.maxsize if size is None else size
        while left and (piece := await self.reader.read(left)):
            self.watch.heard()
            pieces.append(piece)
            left -= len(piece)
        if left and size is not None:
            raise EOFError
        return pieces

    def close(self) -> None:
        if self.connected:
            self.connected = False
            self.writer.transport.abort()  # without ceremony: nothing is left to be sent

    async def sleep(self, seconds: float) -> None:
        import asyncio

        await asyncio.sleep(seconds)


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

    def __init__(self, servers: Servers, interrupt: Interrupt) -> None:
        self.servers, self.interrupt = servers, interrupt
        self.wires = [lane.wire for lane in servers.lanes]
        self.batch_size = 0  # texts that the next batch is to have
        self.failure: Exception | None = None

    def stopping(self) -> bool:
        """Whether the run is to stop."""
        return bool(self.interrupt.code or self.failure)

    def halt(self) -> None:
        """See to it that conversations send nothing more; called once, when the run is to stop."""

    def hold(self, *talks: tuple[Lane, Conversation]) -> list[Answers | Exception]:
        """Hold conversations with servers, all at once, before or apart from the run; return what came of each."""
        raise NotImplementedError

    def greet(self) -> None:
        """Check that the servers can do the work; raise Stop if one cannot, or none is there."""
        self.each(lambda wire: wire.greet())
        self.each(lambda wire: wire.agree())

    def each(self, begin: Callable[[Wire], Conversation]) -> list[tuple[Lane, Answers]]:
        """Hold a conversation with each server that is there, all at once, and return their answers.

        One that is away is left to the run, unless it is the only one; raises what else ends a conversation.
        """
        servers, lanes = self.servers, self.servers.present
        found = []
        for lane, said in zip(lanes, self.hold(*((lane, begin(lane.wire)) for lane in lanes))):
            if isinstance(said, Away) and not servers.alone:
                servers.lose(Batch([], 0, lane), said, time.monotonic())
            elif isinstance(said, Exception):
                raise said
            else:
                found.append((lane, said))
        if not found:
            places = ", ".join(f"{lane.wire.address} ({lane.trouble})" for lane in servers.lanes)
            raise Stop(f"cannot reach any of the servers: {places}. Start one, or give another --server URL.")
        return found

    def dimensions(self) -> int:
        """Return the length of the vectors, as a server's vector for a known-good text has it."""
        wire = self.wires[0]  # they all know it as soon as one does
        if wire.dimensions is None:
            lane, [answer] = self.each(lambda wire: wire.converse([KNOWN_GOOD], not self.servers.alone))[0]
            if isinstance(answer, str):
                raise Stop(f"{lane.wire.address} does not embed even a short text: {answer}.")
            wire.settle(len(answer) // 4)
        self.servers.dimensions = wire.dimensions
        return wire.dimensions or 0

    def task(self, batch: Batch) -> Task:
        """Return what is to be done for a batch."""
        servers = self.servers
        movable = not servers.alone and batch.moves < servers.MOVES
        return Task(batch.lane.place, [row.text for row in batch.rows], movable, servers.dimensions)

    def submit(self, batch: Batch) -> None:
        """Send one batch on its way."""
        raise NotImplementedError

    def wait(self, seconds: float) -> list[Event]:
        """Return what has happened, after that time at the latest; answers or an exception for each batch, once."""
        raise NotImplementedError

    def close(self) -> None:
        """End what is still under way and free everything; nothing is left running."""
        raise NotImplementedError

    def run(self, batches: Iterator[list[Row]], left: Callable[[], int]) -> Iterator[Result | Heard | None]:
        """Yield a Result for each batch, in any order, all that is Heard, and None each TICK at the latest.

        Nothing is taken from `batches` before there is room for it; an empty batch means that there
        is nothing right now, and it is asked again by and by. After an interrupt, or a conversation
        that raised, no more is taken and what is in flight has GRACE seconds to end; then the
        exception, if there was one, is raised. `left` is as in Servers.choose.
        """
        servers, more, deadline = self.servers, True, NEVER
        while True:
            stopping = self.stopping()
            while not stopping and (more or servers.returned) and (choice := servers.choose(left, time.monotonic())):
                lane, self.batch_size = choice
                rows, moves = servers.take_returned(self.batch_size) if servers.returned else (next(batches, None), 0)
                if not rows:  # at the end of the table, or nothing right now
                    more = rows is not None
                    break
                self.submit(servers.launch(lane, rows, moves, time.monotonic()))
            flying = any(lane.flying for lane in servers.lanes)
            if not (flying or more):
                servers.redo(*servers.lanes)  # nothing else is left to be done: others do it sooner
            if not flying and (stopping or not (more or servers.returned)):
                break
            if not stopping:
                for question in servers.to_probe(time.monotonic()):
                    self.submit(question)
                self.failure = servers.given_up(time.monotonic())
            elif deadline == NEVER:
                deadline = time.monotonic() + GRACE
                self.halt()
            elif time.monotonic() >= deadline:
                break
            for batch, said in self.wait(TICK):
                yield from self.hear(batch, said)
            yield None
        if self.failure:
            raise self.failure

    def hear(self, batch: Batch, said: Said) -> Iterator[Result | Heard]:
        """Take in what was heard of a batch."""
        servers, lane, now = self.servers, batch.lane, time.monotonic()
        if isinstance(said, Exchange):
            lane.observe(said, batch.under_way)
            yield Heard(lane, said)
            return
        servers.land(batch, now)
        if isinstance(said, list):
            said = servers.check(batch, said) or said
        if isinstance(said, Stop) and servers.can_spare(batch):
            if not self.stopping() and (news := servers.lose(batch, said, now)):
                yield Heard(lane, news)
        elif isinstance(said, list):
            result = Result(batch.rows, said)
            if not lane.trouble:
                yield result
            elif batch.rows:
                lane.held.append(result)
                if lane.barred:
                    servers.redo(lane)
            elif not lane.barred:
                yield Heard(lane, servers.welcome(lane, now))
                yield from lane.held
                lane.held = []
        elif not isinstance(said, Abandoned):
            self.failure = self.failure or said


class AsyncEngine(Engine):
    """Conversations as tasks of one event loop, which runs whenever the run waits for results."""

    log_name = "generate_embeddings_async.log"

    def __init__(self, servers: Servers, interrupt: Interrupt) -> None:
        import asyncio

        super().__init__(servers, interrupt)
        self.loop = asyncio.new_event_loop()
        self.idle: list[list[StreamTransport]] = [[] for _ in self.wires]
        self.tasks: set[Any] = set()
        self.events: list[Event] = []
        self.waiting = False  # whether the loop runs for `wait`, to be stopped when something has happened

    def hold(self, *talks: tuple[Lane, Conversation]) -> list[Answers | Exception]:
        import asyncio

        tasks = [self.start(self.converse(lane.place, talk)) for lane, talk in talks]
        said: list[Any] = self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        return said

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Start a task, and return it."""
        task = self.loop.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def converse(
        self, place: int, conversation: Conversation, tell: Callable[[Exchange], None] = lambda exchange: None
    ) -> Answers:
        """Hold one conversation over a connection that no other uses meanwhile."""
        idle = self.idle[place]
        transport = idle.pop() if idle else StreamTransport(self.wires[place].server, self.stopping)
        try:
            return await transport.hold(conversation, tell)
        except BaseException:
            transport.close()  # what is on its way over it belongs to nobody now
            raise
        finally:
            idle.append(transport)

    def submit(self, batch: Batch) -> None:
        self.start(self.embed(batch))

    async def embed(self, batch: Batch) -> None:
        """Hold the conversation about a batch, and tell the run all that comes of it."""
        task, tell = self.task(batch), functools.partial(self.deliver, batch)
        try:
            tell(await self.converse(task.place, task.begin(self.wires), tell))
        except Exception as error:
            tell(error)

    def deliver(self, batch: Batch, said: Said) -> None:
        """Hand an event to the run, and let it have its turn."""
        self.events.append((batch, said))
        if self.waiting:
            self.loop.stop()

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
        for idle in self.idle:
            for transport in idle:
                transport.close()
        self.loop.run_until_complete(asyncio.sleep(0))  # lets the closed transports say goodbye to the loop
        self.loop.close()


# Forked workers share the parent's memory, which makes ten of them cost little; where forking
# is unsafe (macOS) or absent (Windows) they are spawned.
START_METHOD = "fork" if sys.platform.startswith("linux") else "spawn"
DEATHS_IN_A_ROW = 20  # workers that die without one batch done between them: something kills them all


class Worker:
    """A worker process, the parent's end of the pipe to it, and the batch that it is at."""

    def __init__(self, name: str, wires: Sequence[Wire], kin: Sequence[Worker]) -> None:
        """`kin` are the workers that live already."""
        import multiprocessing

        context: Any = multiprocessing.get_context(START_METHOD)
        self.pipe, child = context.Pipe()
        # A forked child inherits the parent's ends of all pipes. As long as one copy is open,
        # no worker would see that the parent has died.
        inherited = [worker.pipe for worker in kin] + [self.pipe] if START_METHOD == "fork" else []
        self.process = context.Process(target=work, args=(child, wires, inherited), name=name, daemon=True)
        with signals_held_back():
            self.process.start()
        child.close()
        self.batch: Batch | None = None
        self.place = -1  # of the server that it spoke to last

    def send(self, task: Task | None) -> None:
        """Tell it what to do, or None: to send nothing more. If it is dead, that shows when it is waited for."""
        with contextlib.suppress(OSError):
            self.pipe.send(task)

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


def work(pipe: Any, wires: Sequence[Wire], inherited: Sequence[Any]) -> None:
    """Be a worker process: do the tasks that come over the pipe, and say what comes of them, until it is closed."""
    import queue
    import signal
    import threading

    # Ctrl-C in a terminal, and systemd, signal the whole group; the parent alone decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for other in inherited:
        other.close()
    inbox: queue.SimpleQueue[Task] = queue.SimpleQueue()
    halted = threading.Event()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                task = pipe.recv()
                if task is None:
                    halted.set()
                else:
                    inbox.put(task)
        os._exit(0)  # the parent has closed the pipe, or died: at once, even in the middle of a request

    threading.Thread(target=listen, daemon=True).start()
    transports = [BlockingTransport(wire.server, halted.is_set) for wire in wires]
    with contextlib.suppress(OSError):  # of the pipe; a transport raises none
        while True:
            task = inbox.get()
            try:
                said: Any = run_now(transports[task.place].hold(task.begin(wires), pipe.send))
            except (Stop, Abandoned) as end:
                said = end
            except OSError:
                raise
            except Exception:  # in a form that a pipe can carry
                said = RuntimeError(f"a worker process failed\n{traceback_now()}")
            pipe.send(said)
    os._exit(0)


class ProcessEngine(Engine):
    """Conversations in worker processes, which are started as they are needed and replaced if they die."""

    log_name = "generate_embeddings.log"

    def __init__(self, servers: Servers, interrupt: Interrupt) -> None:
        import gc

        super().__init__(servers, interrupt)
        # Forked workers share what is loaded now. What they import themselves, and what the garbage
        # collector writes to, each of them gets a copy of.
        for name in ("http.client", "json", "multiprocessing.connection", "queue", "random", "threading"):
            importlib.import_module(name)
        gc.collect()
        gc.freeze()
        self.workers: list[Worker] = []
        self.started = self.deaths = 0

    def hold(self, *talks: tuple[Lane, Conversation]) -> list[Answers | Exception]:
        import threading

        said: list[Answers | Exception] = [Abandoned()] * len(talks)

        def converse(place: int, lane: Lane, conversation: Conversation) -> None:
            with contextlib.closing(BlockingTransport(lane.wire.server, self.stopping)) as transport:
                try:
                    said[place] = run_now(transport.hold(conversation))
                except Exception as error:
                    said[place] = error

        first, *others = ((place, *talk) for place, talk in enumerate(talks))
        threads = [threading.Thread(target=converse, args=other, daemon=True) for other in others]
        for thread in threads:
            thread.start()
        converse(*first)
        for thread in threads:
            thread.join()
        return said

    def submit(self, batch: Batch) -> None:
        task = self.task(batch)
        idle = [worker for worker in self.workers if worker.batch is None]
        chosen = min(idle, key=lambda worker: worker.place != task.place, default=None)  # it is still connected
        if chosen is None:
            self.started += 1
            chosen = Worker(f"Worker-{self.started}", self.wires, self.workers)
            self.workers.append(chosen)
        chosen.batch, chosen.place = batch, task.place
        chosen.send(task)

    def wait(self, seconds: float) -> list[Event]:
        from multiprocessing.connection import wait

        events: list[Event] = []
        busy = {worker.pipe: (worker, worker.batch) for worker in self.workers if worker.batch is not None}
        if not busy:
            time.sleep(seconds)
        for pipe in wait(list(busy), seconds):
            worker, batch = busy[pipe]
            try:
                said = worker.pipe.recv()
                if not isinstance(said, Exchange):
                    worker.batch, self.deaths = None, 0
            except (EOFError, OSError):
                said = Abandoned()
                self.bury(worker)
                if not self.stopping():
                    self.submit(batch)
                    continue
            events.append((batch, said))
        return events

    def halt(self) -> None:
        for worker in self.workers:
            worker.send(None)

    def bury(self, dead: Worker) -> None:
        """Forget a worker that has died; the next batch submitted starts another, unless all have died for long."""
        dead.end()
        self.workers.remove(dead)
        self.deaths += 1
        if self.deaths > DEATHS_IN_A_ROW and not self.stopping():
            self.failure = Stop("worker processes keep dying. Is the machine out of memory?")

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
                if not isinstance(row, dict) or not all(row):
                    raise UsageError(f"{path}, line {line}: an object with a name for every value was expected.")
                try:
                    yield line, {column: clean(value) for column, value in row.items()}
                except UnicodeEncodeError:
                    raise UsageError(f"{path}, line {line}: not valid Unicode. Save the file as UTF-8.") from None
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


def read_csv(file: TextIO, path: str, delimiter: str = ",") -> Iterator[tuple[int, Any]]:
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
            elif fields:
                if len(fields) != len(header):
                    raise UsageError(f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)}.")
                yield line, dict(zip(header, fields))
            line = reader.line_num + 1  # where the next row begins; one with quoted newlines has several lines
    except csv.Error as error:
        raise UsageError(f"{path}, line {line}: {error}.") from None
    if not header:
        raise UsageError(f"--load {path}: the file is empty.")


def read_jsonl(file: TextIO, path: str) -> Iterator[tuple[int, Any]]:
    """Yield the values of a file with one to a line."""
    import json

    for line, text in enumerate(file, 1):
        if text.strip():
            try:
                yield line, json.loads(text)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, line {line}: not JSON: {error.msg} at column {error.colno}.") from None
            except RecursionError:
                raise UsageError(f"{path}, line {line}: nested too deeply.") from None


def read_json(file: TextIO, path: str) -> Iterator[tuple[int, Any]]:
    """Yield the values of one JSON array, read piece by piece: the file may be larger than memory."""
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
                yield line, value
                line += text.count("\n", position, end)
                expected, position = ",", end
                continue
            except json.JSONDecodeError as error:
                if ended or len(text) - position > JSON_MOST:
                    line += text.count("\n", position, error.pos)
                    raise fail(f"not JSON: {error.msg}") from None
            except RecursionError:
                raise fail("nested too deeply") from None
        if ended:
            raise fail("the file ends too early")
        piece = file.read(JSON_PIECE)
        text, position, ended = text[position:] + piece, 0, not piece


READERS: dict[str, Callable[[TextIO, str], Iterator[tuple[int, Any]]]] = {
    ".csv": read_csv,
    ".tsv": functools.partial(read_csv, delimiter="\t"),
    ".json": read_json,
    ".jsonl": read_jsonl,
}

TYPES = ("INTEGER", "REAL", "TEXT")  # each can hold the ones before it


def type_of(value: Any, typed: bool) -> int:
    """Return the index in TYPES of the narrowest type for a value, -1 for None; if `typed`, a string is no number."""
    if value is None:
        return -1
    if isinstance(value, str):
        # A number with leading zeros is a code: 007 must stay what it is. 18 digits fit into 64 bits.
        if not typed and re.fullmatch(r"-?(0|[1-9]\d{0,17})", value, re.ASCII):
            return 0
        # And so is a number with trailing ones: 1.10 is more likely a version.
        is_real = not typed and re.fullmatch(r"-?\d+\.\d+", value, re.ASCII) and repr(float(value)) == value
        return 1 if is_real else 2
    return 1 if isinstance(value, float) else 0


def column_types(path: str) -> dict[str, str]:
    """Return the columns of a file, with the type that holds all their values; reads the whole file."""
    typed = path.lower().endswith((".json", ".jsonl"))
    found: dict[str, int] = {}
    for _, row in read_file(path):
        for column, value in row.items():
            found[column] = max(found.get(column, -1), type_of(value, typed))
    return {column: TYPES[index] for column, index in found.items()}  # TEXT, by -1, if all are empty


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


def replacing(key: str, columns: Iterable[str]) -> str:
    """Return the clause of an INSERT of columns by which a row takes the place of the one with the same key."""
    news = ", ".join(f"{quoted(column)} = excluded.{quoted(column)}" for column in columns if column != key)
    return f"ON CONFLICT ({quoted(key)}) DO UPDATE SET {news}" if news else f"ON CONFLICT ({quoted(key)}) DO NOTHING"


def primary_key(columns: dict[str, Column]) -> list[str]:
    """Return the columns of the primary key."""
    return [name for name, column in columns.items() if column.place]


class Forbidden(Stop):
    """The database refuses something to this user."""


PROVENANCE = "embedgen_provenance"  # the table of what made the vectors, in the target's schema
SAMPLES, SAMPLED = 3, 1000  # embedded rows that a server's vectors are compared with, and rows to look for them in


class Store:
    """The table to read, called s in statements, and the table to fill, called e.

    Beside the target is the table of its provenance: a row for each way in which vectors in it were
    made, by which version of the model, with which prefix, and from the whole text or not. Its id
    stands with each vector; a target without a column for it is filled all the same.
    """

    own_columns = ("embedding", "model", "text_sha256", "updated_at", "provenance")  # of a target as it is created
    # What the database is asked about its tables and views:
    TABLES: str  # the names of those that can be read
    RELATION: str  # of an address: schema and name, and whether it is a table
    COLUMNS: str  # of an address: those that can be read, their types, and their places in the primary key or 0
    UNIQUE: str  # of an address: the columns of which each alone is declared to tell rows apart
    REFERENCES: str  # of an address and a column: the table and the column that it refers to by a foreign key

    connection: Any
    mark = "?"  # the place of a statement's parameter; with {} in it, of the one of a number, counted from 1
    identity = ""  # the type of a table's own number
    type_names: ClassVar[dict[str, str]] = {}  # of TYPES, where the database has others
    other_dimensions = ", or --force for all rows to replace them"  # a way out where vectors have another length

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shown = hide_password(options.database)  # the database, as it may be logged
        self.force: bool = options.force
        self.model: str = options.model
        self.prefix: str = options.document_prefix
        self.stopping: Callable[[], bool] = lambda: False  # whether the run is to stop, so that waits be short
        self.digest = ""  # of the model as the server has it, "" if that is not known
        self.makers: dict[str, int | None] = {}  # the ids in PROVENANCE of what this run makes, by fit
        self.reads_only: bool = options.reads_only
        self.changing_model = False  # the target may have vectors of another model: none of them exists for this one
        self.unchanged = False  # whether all digests in the target are known to fit, without a look at the texts

    # What a subclass says to its database:

    def close(self) -> None:
        """Let go of the database."""
        raise NotImplementedError

    def rows(self, sql: str, *parameters: Any) -> list[Any]:
        """Return all rows of a statement that gives few; raise Stop where the database fails."""
        raise NotImplementedError

    def transaction(self, action: Callable[[], T]) -> T:
        """Return what the action returns, done as a whole or not at all."""
        raise NotImplementedError

    def complaint(self, sql: str) -> str:
        """Return what the database has against a statement of the user's, "" if nothing."""
        raise NotImplementedError

    def find(self, name: str) -> Relation | None:
        """Return the table or view that is meant by name or schema.name."""
        raise NotImplementedError

    def address(self, relation: Relation) -> str:
        """Return how the questions above speak of a table or view."""
        return relation.sql

    def place(self, name: str, beside: str = "") -> Relation:
        """Return where a table of that name, possibly schema.name, is to be created; if not said, in that schema."""
        raise NotImplementedError

    def value_sql(self, column: str, declared: str) -> str:
        """Return the SQL of a column's value as text, NULL where it is blank."""
        raise NotImplementedError

    def digest_sql(self) -> str:
        """Return the SQL of the SHA-256 of a row's text with its prefix, `self.whole_text`."""
        raise NotImplementedError

    def key_type(self, declared: str) -> str:
        """Return the type of the target's key, for that of the source's key."""
        raise NotImplementedError

    def references_sql(self) -> str:
        """Return how a new target's key refers to the source's, "" if it cannot."""
        raise NotImplementedError

    def create_sql(self, measure: Callable[[], int]) -> str:
        """Return the columns of a new target behind its key; `measure` tells the length of the vectors."""
        raise NotImplementedError

    def stored_dimensions(self, model: str = "") -> int | None:
        """Return the length that vectors in the target have, or those of a model, None if it may be any."""
        raise NotImplementedError

    def known_texts(self, tables: str) -> list[tuple[str, bytes]]:
        """Return the texts and vectors of a few rows, given by the FROM clause and what follows it."""
        raise NotImplementedError

    def vector_sql(self) -> str:
        """Return the SQL of a stored vector, for `vector_of`."""
        return self.stored("embedding")

    def vector_of(self, value: Any) -> bytes | None:
        """Return a stored vector as the database gave it, None if there is none or it is of no use."""
        raise NotImplementedError

    def with_key(self, sql: str, text: str) -> list[Any]:
        """Return the rows of a statement whose parameter is a key, given as text, whatever its type."""
        raise NotImplementedError

    def has_length(self, dimensions: int) -> str:
        """Return the condition that a stored vector is there and has this length."""
        raise NotImplementedError

    def nearest(self, vector: bytes, model: str, most: int) -> list[tuple[Any, bytes]]:
        """Return the keys and vectors of the rows nearest to a vector, the nearest first, and of equal ones by key."""
        raise NotImplementedError

    def page(self, after: Any) -> tuple[list[Row], bool]:
        """Return pending rows above a key, by ascending key, a page of them, and whether there may be more."""
        raise NotImplementedError

    def save(self, vectors: list[tuple[Row, bytes]]) -> int:
        """Save embeddings in one transaction and return how many; those of rows deleted meanwhile are dropped."""
        raise NotImplementedError

    def insert(self, table: Relation, columns: dict[str, str], key: str, records: Iterable[list[Any]]) -> int:
        """Insert the rows of --load, each in the place of the one of the same key, and return how many.

        The records are in the order of the columns, which come with their types. Within a transaction.
        """
        raise NotImplementedError

    # What some stores have something to say to, by several machines at once, an index, or a note for the next run:

    def join(self) -> str:
        """Take part in filling the table, from now on to `close`; return a remark for the log."""
        return ""

    def tend(self) -> None:
        """Do what is due by and by; called every TICK or so."""

    def give_up(self, row: Row, failed: bool = True) -> None:
        """Note that a pending row has failed, or is left out, and will not be saved."""

    def elsewhere(self) -> tuple[int, int]:
        """Return how many rows other machines have generated, and how many have failed there, since `count`."""
        return 0, 0

    def build_index(self) -> Iterator[float]:
        """Build the index that --index asks for; yield the share that is done, from 0 to 1."""
        raise NotImplementedError

    def note(self, complete: bool) -> None:
        """At a run's end, leave word for the next one that nothing need be hashed until somebody writes.

        `complete` says that every row has its embedding now. A store that cannot be sure to learn
        of every write leaves none.
        """

    # What is the same for all: statements, and what is asked about tables.

    def value(self, sql: str, *parameters: Any) -> Any:
        """Return the first column of a query's first row, None if there is none."""
        return next((row[0] for row in self.rows(f"{sql} LIMIT 1", *parameters)), None)

    def execute(self, sql: str, *parameters: Any) -> list[Any]:
        """Return all rows of a statement, tried once, as within a transaction."""
        cursor = self.connection.execute(sql, parameters)
        return list(cursor.fetchall()) if cursor.description else []

    def alone(self, action: Callable[[], T]) -> T:
        """Return what the action returns, in a transaction that no other embedgen has at the same time."""
        return self.transaction(action)

    def relation_at(self, address: str) -> Relation | None:
        """Return the table or view of an address."""
        found = self.rows(self.RELATION, address)
        return next((Relation(schema, name, bool(is_table)) for schema, name, is_table in found), None)

    def is_there(self, relation: Relation) -> bool:
        """Whether a table exists; within a transaction."""
        return self.relation_at(self.address(relation)) is not None

    def create(self, relation: Relation, columns: str) -> None:
        """Create a table unless it is there, as it is where another machine was quicker; within a transaction."""
        if not self.is_there(relation):
            self.execute(f"CREATE TABLE {relation.sql} ({columns})")

    def columns(self, relation: Relation) -> dict[str, Column]:
        """Return the columns that can be read, by name."""
        found = self.rows(self.COLUMNS, self.address(relation))
        return {name: Column(declared, place) for name, declared, place in found}

    def is_unique(self, relation: Relation, column: str) -> bool:
        """Whether the column alone is declared to tell rows apart."""
        return (column,) in self.rows(self.UNIQUE, self.address(relation))

    def referenced(self, relation: Relation, column: str) -> tuple[str, str] | None:
        """Return the table and the column that a column refers to by a foreign key."""
        return next((tuple(row) for row in self.rows(self.REFERENCES, self.address(relation), column)), None)

    # The table to read, and the one to fill.

    def prepare(self) -> None:
        """Find the tables and columns, and check everything that can be checked without a server."""
        options = self.options
        relation = self.find(options.table)
        if relation is None:
            tables = listed(name for (name,) in self.rows(self.TABLES))
            raise UsageError(f'the database has no table "{options.table}". It has: {tables}. Give --table NAME.')
        self.relation = relation
        described = self.readable(relation)
        self.key = self.key_name(described, relation.name)
        self.key_sql, self.key_declared = f"s.{quoted(self.key)}", described[self.key].type
        self.how = self.recipe(list(described), relation.name)
        self.text = self.how.sql(lambda column: self.value_sql(column, described[column].type), literal)
        # As a subquery, so that the names in the condition are the source's alone. The newline ends a comment.
        self.source = f"(SELECT * FROM {relation.sql} WHERE ({options.where}\n))" if options.where else relation.sql
        self.referable = relation.is_table and self.is_unique(relation, self.key)
        self.check_where()
        self.check_key()
        self.find_target()
        self.check_dimensions()

    def readable(self, relation: Relation) -> dict[str, Column]:
        """Return the columns that can be read, by name; raise Stop if there are none."""
        if described := self.columns(relation):
            return described
        raise Stop(f'"{relation.name}" has no columns that may be read. Have SELECT on it granted.')

    @property
    def whole_text(self) -> str:
        """The SQL of what is embedded, and so of what the digest is of."""
        return f"{literal(self.prefix)} || ({self.text})" if self.prefix else self.text

    def recipe(self, columns: list[str], table: str) -> Recipe:
        """Return how a text is made, as the flags or the columns have it."""
        if self.options.action == "prune":
            return Recipe((("", (self.key,)),), labelled=False)  # no text is looked at
        if self.options.text:
            return template_recipe(self.options.text, columns, table)
        if self.options.columns:
            return columns_recipe(self.options.columns, columns, table)
        return default_recipe(columns, table)

    def key_name(self, described: dict[str, Column], table: str) -> str:
        """Return the key column: as given, the primary key, or the column id."""
        if self.options.id:
            return column_of(self.options.id, list(described), table)
        primary = primary_key(described)
        if len(primary) == 1:
            return primary[0]
        key = match("id", described) if not primary else None
        if key is None:
            has = f"the key {listed(primary)}, more than one column" if primary else "no primary key and no column id"
            raise UsageError(
                f'"{table}" has {has}. Say which column tells its rows apart, with --id COLUMN: {listed(described)}.'
            )
        return key

    def check_where(self) -> None:
        """Raise UsageError if --where is no condition."""
        if self.options.where:
            complaint = self.complaint(f"SELECT 1 FROM {self.source} AS s LIMIT 0")
            if complaint:
                table = self.relation.name
                raise UsageError(
                    f"--where {self.options.where!r} is not a condition on {table}: {complaint}. "
                    f"It has the columns {listed(self.columns(self.relation))}."
                )

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
        noun, given = singular(self.relation.name), self.options.target
        self.usual_target = self.place(f"{noun}_embeddings", self.relation.schema)
        wanted = self.place(given, self.relation.schema) if given else self.usual_target
        found = (self.find(given) if given else None) or self.relation_at(self.address(wanted))
        self.has_target, self.target = found is not None, found or wanted
        self.provenance = Relation(self.target.schema, PROVENANCE, True)
        self.target_key = f"{noun}_id"
        self.target_columns = {name: name for name in self.own_columns}
        if found:
            if found == self.relation or not found.is_table:
                what = "the table to read" if found == self.relation else "a view"
                raise UsageError(f'--target "{found.name}" is {what}. Give another name.')
            self.use_target()
        self.on = f"e.{quoted(self.target_key)} = {self.key_sql}"  # the condition that an embedding is that of a row
        if self.options.action in ("generate", "dry_run"):
            self.check_model()
        else:
            self.changing_model = "model" in self.target_columns

    def use_target(self) -> None:
        """Take an existing target as it is: its own names for the key and for what it has of our columns."""
        described = self.readable(self.target)
        columns, name = list(described), self.target.name
        self.target_columns = {ours: theirs for ours in self.own_columns if (theirs := match(ours, columns))}
        if "embedding" not in self.target_columns:
            raise UsageError(
                f'"{name}" has no column "embedding" to fill. It has: {listed(columns)}. Give --target NAME.'
            )
        maker = self.target_columns.get("provenance")
        if maker and not (described[maker].type.upper().startswith("INT") and "text_sha256" in self.target_columns):
            del self.target_columns["provenance"]  # somebody else's, for something else
        others = [column for column in columns if column not in self.target_columns.values()]
        primary, named = primary_key(described), match(self.target_key, others)
        # A column that is named for it is the key, even beside a primary key of the target's own.
        candidates = [named] if named else primary if len(primary) == 1 else others
        if len(candidates) != 1 or not self.is_unique(self.target, candidates[0]):
            raise UsageError(
                f'"{name}" has no key to store vectors under: one column with a primary key or unique '
                f"index is needed. It has: {listed(columns)}. Give --target NAME."
            )
        self.target_key = candidates[0]
        other = self.referenced(self.target, self.target_key) if self.relation.is_table else None
        table, column = other or (self.relation.name, self.key)
        if table != self.relation.name:
            raise UsageError(f'"{name}" belongs to the table "{table}". Give --target NAME.')
        if column != self.key:
            raise UsageError(
                f'"{name}" has its vectors under the column "{column}" of "{table}", '
                f'not "{self.key}". Give --id {column}, or --target NAME.'
            )

    def check_model(self) -> None:
        """Raise UsageError if the target holds vectors of another model that this run will not replace."""
        if not self.has("model"):
            return
        model, target = self.stored("model"), f"{self.target.sql} AS e"
        differs = f"{model} <> {literal(self.model)}"
        if not self.value(f"SELECT 1 FROM {target} WHERE {differs}"):
            return  # most tables hold one model, which shows without a look at the rows
        # Of rows that exist: what is left of deleted ones is in nobody's way.
        other = self.value(f"SELECT {model} FROM {target} JOIN {self.relation.sql} AS s ON {self.on} WHERE {differs}")
        if other is None:
            return
        name = f'"{self.target.name}" holds vectors of the model "{other}"'
        if not self.force:
            raise UsageError(
                f'{name}, which do not compare with those of "{self.model}". '
                "Give --target NAME for a second table, or --force to replace them."
            )
        if not self.replaces_all:
            raise UsageError(
                f'{name}, and some of them would be left beside those of "{self.model}". '
                "Leave out --limit and --where, or give --target NAME."
            )
        self.changing_model = True

    @property
    def replaces_all(self) -> bool:
        """Whether every vector in the target is to be replaced."""
        return self.force and self.options.limit is None and not self.options.where

    # What made the vectors.

    @property
    def has_provenance(self) -> bool:
        """Whether the provenance of what is in the target can be read."""
        return self.has("provenance") and bool(self.columns(self.provenance))

    @property
    def is_used(self) -> str:
        """The condition that a record of provenance, p, is that of a vector."""
        # No EXISTS, for which Postgres may look through all of the target where the first vector will do.
        return f"(SELECT 1 FROM {self.target.sql} AS e WHERE {self.stored('provenance')} = p.id LIMIT 1) IS NOT NULL"

    def version(self, condition: str) -> str:
        """Return a digest of this run's model that is on record for the target and fulfils a condition, "" if none.

        It may be that of a run that was refused, or whose vectors have been replaced: see `is_used`.
        """
        ours = f"target = {literal(self.target.name)} AND model = {literal(self.model)} AND digest <> ''"
        return self.value(f"SELECT digest FROM {self.provenance.sql} AS p WHERE {ours} AND {condition}") or ""

    def refuse_others(self, unless: str, ways: str) -> None:
        """Raise Stop if another version of the model than that of `self.digest` has made vectors in the target.

        Unless what is on record of this one fulfils a condition. `ways` are those out, for the user.
        """
        if not self.digest or not self.has_provenance:
            return
        is_this = f"digest = {literal(self.digest)}"
        other = self.version(f"NOT {is_this} AND {self.is_used}")
        if other and not self.version(f"{is_this} AND {unless}"):
            theirs, ours = (digest.rpartition(":")[2][:12] for digest in (other, self.digest))
            raise Stop(
                f'"{self.target.name}" holds vectors of another version of "{self.model}" (digest {theirs}) than the '
                f"server has now ({ours}), and the two may not compare. {ways}"
            )

    def check_version(self) -> None:
        """Raise Stop if another version of the model than that of `self.digest` has made vectors that would stay."""
        if not self.options.accept_drift and not self.replaces_all:
            self.refuse_others(
                "accepted = 1",
                "Give --force, without --limit and --where, for all rows again, --target NAME for a second table, or "
                "--accept-drift to mix them.",
            )

    def maker(self, vector: bytes) -> int | None:
        """Return the id in PROVENANCE of a vector made by this run, None if there is no place for it."""
        fit = getattr(vector, "fit", "whole")
        if fit not in self.makers:
            self.makers[fit] = None
            if "provenance" in self.target_columns:
                with contextlib.suppress(Forbidden):
                    self.makers[fit] = self.alone(lambda: self.record(fit))
        return self.makers[fit]

    def record(self, fit: str) -> int:
        """Put on record what this run makes, and return its id in PROVENANCE; within a transaction."""
        name = self.provenance.sql
        self.create(
            self.provenance,
            f"id {self.identity}, target text NOT NULL, model text NOT NULL, digest text NOT NULL, "
            "prefix text NOT NULL, fit text NOT NULL, accepted integer NOT NULL, "
            "UNIQUE (target, model, digest, prefix, fit)",
        )
        made = self.target.name, self.model, self.digest, self.prefix, fit
        values = dict(zip(("target", "model", "digest", "prefix", "fit"), map(literal, made)))
        find = f"SELECT id FROM {name} WHERE {' AND '.join(f'{column} = {value}' for column, value in values.items())}"
        if not self.execute(find):
            self.execute(f"INSERT INTO {name} ({', '.join(values)}, accepted) VALUES ({', '.join(values.values())}, 0)")
        if self.options.accept_drift:  # and so are all that are mixed there
            both = f"target = {values['target']} AND model = {values['model']}"
            self.execute(f"UPDATE {name} SET accepted = 1 WHERE {both} AND accepted = 0")
        return int(self.execute(find)[0][0])

    def samples(self) -> list[tuple[str, bytes]]:
        """Return a few texts with the vectors that are stored for them, to tell whether a server's are the same.

        Of whole texts, and, where versions of the model are mixed, of this one.
        """
        if self.replaces_all or not self.has("text_sha256"):
            return []  # all are replaced, or may be of another text
        ours = self.has_vector
        if self.has_provenance:
            ids = f"SELECT id FROM {self.provenance.sql} WHERE target = {literal(self.target.name)}"
            maker, this_version = self.stored("provenance"), f"digest = {literal(self.digest)}"
            ours += f" AND COALESCE({maker} NOT IN ({ids} AND fit <> 'whole'), 1 = 1)"
            if self.version(this_version):
                ours += f" AND {maker} IN ({ids} AND {this_version})"
        found: list[tuple[str, bytes]] = []
        for most in (f"LIMIT {SAMPLED}", ""):  # nearly always the first will do; else all is looked through
            found = found or self.known_texts(
                f"FROM (SELECT * FROM {self.target.sql} AS e WHERE {ours} {most}) AS e "
                f"JOIN {self.source} AS s ON {self.on} WHERE {self.existing} LIMIT {SAMPLES}"
            )
        return found

    def end_change(self) -> None:
        """After --force, remove what there is no new vector for, since it compares with none; and all word of it."""
        target, model, digest = self.target.sql, literal(self.model), literal(self.digest)
        if self.changing_model:
            self.rows(f"DELETE FROM {target} AS e WHERE {self.stored('model')} <> {model}")
        if not self.replaces_all or not self.has_provenance:
            return
        others = f"target = {literal(self.target.name)} AND NOT (model = {model} AND digest = {digest})"
        with contextlib.suppress(Forbidden):
            if self.value(f"SELECT 1 FROM {self.provenance.sql} WHERE {others}") is None:
                return
            if self.digest:
                ids = f"(SELECT id FROM {self.provenance.sql} WHERE {others} AND digest <> '')"
                self.rows(f"DELETE FROM {target} AS e WHERE {self.stored('provenance')} IN {ids}")
            self.rows(f"DELETE FROM {self.provenance.sql} AS p WHERE {others} AND NOT {self.is_used}")

    # The rows, and what is stored with them.

    def check_dimensions(self) -> None:
        """Raise UsageError if the vectors asked for have another length than those that stay."""
        wanted, stored = self.options.dimensions, self.stored_dimensions()
        if wanted and stored and wanted != stored:
            raise UsageError(
                f'the vectors in "{self.target.name}" have {stored} dimensions; those of --dimensions {wanted} do not '
                f"compare. Give --target NAME for a second table{self.other_dimensions}."
            )

    def create_target(self, measure: Callable[[], int]) -> None:
        """Create the target unless it exists; `measure` asks the server for the length of its vectors."""
        if self.has_target:
            return
        references = self.references_sql() if self.referable else ""  # only a declared key can be referred to
        key = f"{quoted(self.target_key)} {self.key_type(self.key_declared)} PRIMARY KEY{references}"
        columns = f"{key}, {self.create_sql(measure)}"
        self.alone(lambda: self.create(self.target, columns))
        self.has_target = True

    def has(self, name: str) -> bool:
        """Whether there is a target, with a column for what we call by a name."""
        return self.has_target and name in self.target_columns

    def stored(self, name: str) -> str:
        """Return the SQL of what is stored with a row, by our own name for the column; NULL where nothing is."""
        return f"e.{quoted(self.target_columns[name])}" if self.has(name) else "NULL"

    @property
    def has_vector(self) -> str:
        """The condition that there is a vector."""
        return f"{self.stored('embedding')} IS NOT NULL"

    def is_by(self, model: str) -> str:
        """Return the condition that a model has made a vector, as far as the target tells; "" is any model."""
        return f"{self.stored('model')} = {literal(model)}" if model and self.has("model") else "1 = 1"

    @property
    def pairs(self) -> str:
        """The rows that have an embedding beside it, for a FROM clause."""
        return f"{self.source} AS s JOIN {self.target.sql} AS e ON {self.on}"

    @property
    def orphaned(self) -> str:
        """The condition that an embedding's row is gone from the table, whatever --where says."""
        # In this order: SQLite compares as the left one does, and so by the index of the row's own key.
        row = f"SELECT 1 FROM {self.relation.sql} AS s WHERE {self.key_sql} = e.{quoted(self.target_key)}"
        return f"NOT EXISTS ({row})"

    def beside(self, page: bool) -> str:
        """Return the join that puts a row's embedding beside it, if there is one; `page`: for few rows, by key."""
        return f"LEFT JOIN {self.target.sql} AS e ON {self.on}" if self.has_target else ""

    def joined(self, page: bool = False) -> tuple[str, str]:
        """Return the FROM clause of the rows with their embeddings, and the condition that one exists.

        With --force none does; but where that changes the model, what has the new one already
        was done by a run that did not come to its end.
        """
        if not self.has_target or (self.force and not self.changing_model):
            return f"{self.source} AS s", "1 = 0"
        return f"{self.source} AS s {self.beside(page)}", self.existing

    @property
    def existing(self) -> str:
        """The condition that there is an embedding of the row's text as it is now."""
        exists = self.has_vector
        if self.changing_model:
            exists += f" AND {self.is_by(self.model)}"
        if self.has("text_sha256") and not self.unchanged:
            exists += f" AND COALESCE({self.stored('text_sha256')} = {self.digest_sql()}, 1 = 0)"
        return exists

    def count(self) -> tuple[int, int]:
        """Return how many rows there are, and how many of them have their embedding."""
        tables, exists = self.joined()
        total, existing = self.rows(f"SELECT count(*), count(CASE WHEN {exists} THEN 1 END) FROM {tables}")[0]
        return total, existing

    def tally(self, having: str) -> tuple[int, ...]:
        """Return how many rows there are, with a vector, with one that fulfils a condition, and of these the fresh."""
        tables, exists = self.joined()
        conditions = (self.has_vector, having, f"{having} AND {exists}")
        cases = ", ".join(f"count(CASE WHEN {condition} THEN 1 END)" for condition in conditions)
        return tuple(self.rows(f"SELECT count(*), {cases} FROM {tables}")[0])

    def comparable(self, dimensions: int, model: str) -> str:
        """Return the condition that a stored vector can be compared with one of that length and model."""
        return f"{self.has_length(dimensions)} AND {self.is_by(model)}"

    @property
    def common_dimensions(self) -> int | None:
        """The length of all vectors in the target, None if there are several."""
        if stored := self.stored_dimensions():
            other = f"{self.has_vector} AND NOT ({self.has_length(stored)})"
            if self.value(f"SELECT 1 FROM {self.target.sql} AS e WHERE {other}") is not None:
                return None
        return stored

    # What --search and --similar, --status, and --prune ask for.

    def check_searchable(self, model: str) -> None:
        """Raise Stop if there is nothing to compare a vector with, UsageError if there is only another model's."""
        name = f'"{self.target.name}"'
        again = "Run the same command without --search or --similar first, which fills it."
        if not self.has_target:
            raise Stop(f"there are no embeddings yet: no table {name}. {again}")
        if self.value(f"SELECT 1 FROM {self.target.sql} AS e WHERE {self.is_by(model)}") is not None:
            return
        other = self.value(f"SELECT {self.stored('model')} FROM {self.target.sql} AS e")
        if other is None:
            raise Stop(f"there are no embeddings yet: {name} is empty. {again}")
        raise UsageError(
            f'{name} holds vectors of the model "{other}", which do not compare with those of "{model}". '
            f"Give {'--server hash:' if other == HashWire.model else f'--model {other}'}, or --target NAME."
        )

    def check_query(self, dimensions: int, digest: str) -> None:
        """Raise Stop if a vector of that length, by that version of the model, compares with none stored."""
        stored, name = self.stored_dimensions(self.model), f'"{self.target.name}"'
        if stored not in (None, dimensions):
            raise UsageError(
                f"the vectors in {name} have {stored} dimensions, and that of the text has {dimensions}: they do not "
                "compare. Give --target NAME, or the --model and the --dimensions that made them."
            )
        self.digest = digest
        self.refuse_others(self.is_used, "Give another --server, or run with --force first.")

    def row_named(self, text: str) -> tuple[Any, bytes | None, str]:
        """Return key, vector and its model ("": unknown) of the row with a key given as text, or raise UsageError."""
        shown = f"{self.key_sql}, {self.vector_sql()}, {self.stored('model')}"
        tables = f"{self.relation.sql} AS s {self.beside(page=False)}"
        found = self.with_key(f"SELECT {shown} FROM {tables} WHERE {self.key_sql} = {self.mark.format(1)}", text)
        if not found:
            raise UsageError(
                f'"{self.relation.name}" has no row with the {self.key} {text}. Give another --similar {self.key}.'
            )
        key, vector, model = found[0]
        return key, self.vector_of(vector), model or ""

    def columns_of(self, keys: list[Any]) -> dict[Any, dict[str, Any]]:
        """Return the columns that make up the text, by name and as they are, of the rows with these keys, by key."""
        names = dict.fromkeys(column for _, columns in self.how.parts for column in columns)
        shown = ", ".join(f"s.{quoted(name)}" for name in [self.key, *names])
        found = {}
        for start in range(0, len(keys), PAGE_ROWS):
            some = keys[start : start + PAGE_ROWS]
            marks = ", ".join(self.mark.format(place + 1) for place in range(len(some)))
            sql = f"SELECT {shown} FROM {self.source} AS s WHERE {self.key_sql} IN ({marks})"
            for key, *values in self.rows(sql, *some):
                found[key] = dict(zip(names, values))
        return found

    def origins(self) -> list[tuple[str, str, str, str, int]]:
        """Return what made the vectors of rows that exist: model, its digest, prefix, fit, and how many; most first."""
        if not self.has("model"):
            return []
        tables, made = self.pairs, "'', '', ''"
        if self.has_provenance:
            tables += f" LEFT JOIN {self.provenance.sql} AS p ON p.id = {self.stored('provenance')}"
            made = "COALESCE(p.digest, ''), COALESCE(p.prefix, ''), COALESCE(p.fit, '')"
        return self.rows(
            f"SELECT COALESCE({self.stored('model')}, ''), {made}, count(*) FROM {tables} "
            "GROUP BY 1, 2, 3, 4 ORDER BY 5 DESC, 1, 2, 3, 4"
        )

    def check_belonging(self) -> None:
        """Raise UsageError unless a row that is missing in this very table is what its embedding was made of.

        Through a view, or another table of the same keys, rows are missing that are there.
        """
        other = self.referenced(self.target, self.target_key)
        belongs = other == (self.relation.name, self.key) if other else self.target[:2] == self.usual_target[:2]
        if not belongs and not self.force:
            why = (
                f'belongs to the table "{other[0]}"' if other else "does not say by a foreign key that it belongs to it"
            )
            raise UsageError(
                f'rows that "{self.relation.name}" does not have may still be there: "{self.target.name}" {why}. '
                "Give another --table; or --force, to remove the embeddings of all others."
            )

    def orphans(self) -> tuple[int, int]:
        """Return how many embeddings there are, and of how many the row is gone."""
        if not self.has_target:
            return 0, 0
        sql = f"SELECT count(*), count(CASE WHEN {self.orphaned} THEN 1 END) FROM {self.target.sql} AS e"
        total, gone = (self.seeing_all if self.options.action == "prune" else self.rows)(sql)[0]
        return total, gone

    def seeing_all(self, sql: str) -> list[Any]:
        """Return all rows of a statement; raise Stop where the database would hide rows of a table from this user."""
        return self.rows(sql)

    def prune(self) -> int:
        """Remove the embeddings whose row is gone, unless that would be all of them; with --force all the same."""
        stays = f"SELECT 1 FROM {self.target.sql} AS e JOIN {self.relation.sql} AS s ON {self.on}"
        unless = "" if self.force else f" AND EXISTS ({stays})"
        return self.delete(f"DELETE FROM {self.target.sql} AS e WHERE {self.orphaned}{unless}")

    def delete(self, sql: str) -> int:
        """Carry out a deletion, in a transaction of its own, and return how many rows are gone."""
        return int(self.transaction(lambda: self.connection.execute(sql).rowcount))

    def updated_at(self) -> Any:
        """Return when the target was last written to, as stored, None if it does not tell."""
        last = f"SELECT max({self.stored('updated_at')}) FROM {self.target.sql} AS e"
        return self.value(last) if self.has_target else None

    # What a run reads, and what it loads before.

    def pending(self, after: Any, wanted: Callable[[], int]) -> Iterator[Row | None]:
        """Yield the rows without their embedding, by ascending key, those above `after`; all rows with --force.

        Read by pages, so that no statement is open, and no lock held, while requests are under way.
        Where several machines share the table, at least `wanted` rows are taken at a time, and None
        means that there is nothing to take right now.
        """
        more = True
        while more:
            page, more = self.page(after)
            yield from page
            after = page[-1].key if page else after

    def load(self, path: str) -> int:
        """Load a file into --table and return how many rows it has; all of them or, if it raises, none."""
        types = column_types(path)
        found = self.find(self.options.table)
        if not types:
            raise UsageError(f"--load {path}: the file has no rows.")
        table = found or self.place(self.options.table)
        new = {name: Column(self.type_names.get(kind, kind), 0) for name, kind in types.items()}
        described = self.columns(table) if found else new
        names = [column_of(name, list(described), table.name) for name in types]
        if len(set(names)) < len(names):
            raise UsageError(f'--load {path}: several of its columns are one in "{table.name}": {listed(names)}.')
        key = self.key_name({name: described[name] for name in names}, path)
        if found and not self.is_unique(table, key):
            raise UsageError(
                f'"{table.name}" cannot be loaded into: its key "{key}" needs a primary key or unique index.'
            )

        columns = {name: described[name].type for name in names}

        def insert_all() -> int:
            if not found:
                kinds = {**columns, key: f"{columns[key]} PRIMARY KEY NOT NULL"}
                self.execute(f"CREATE TABLE {table.sql} ({', '.join(f'{quoted(c)} {kinds[c]}' for c in kinds)})")
            return self.insert(table, columns, key, records(path, list(types), names.index(key)))

        return self.transaction(insert_all)


SQLITE_ENDINGS = (".db", ".sqlite", ".sqlite3")  # of a path that is taken for a database
CACHE_KIB = 512  # of SQLite's pages; the default is 2,000
LOCK_PATIENCE = 60.0  # seconds to wait for a locked database
NOTES = "embedgen_notes"  # the table of what runs leave for the next ones, and
NOTE_ROWS = 10_000  # the rows from which on that is worth a table: fewer are hashed in 20 ms
NOTE_SECONDS = 2.0  # between a note and the file's time of change, at most; FAT counts in steps of two


class SQLiteStore(Store):
    """A table in an SQLite file."""

    TABLES = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%'"
    RELATION = (
        "SELECT 'main', name, type = 'table' FROM sqlite_master "
        "WHERE type IN ('table', 'view') AND name = ? COLLATE NOCASE"
    )
    COLUMNS = "SELECT name, type, pk FROM pragma_table_xinfo(?) WHERE hidden <> 1"
    # Those with an index, and what is another name of the rowid, which has none. Of groups of one, max() is that one.
    UNIQUE = (
        "WITH given(address) AS (VALUES (?)) "
        "SELECT max(c.name) FROM given JOIN pragma_index_list(address) AS i JOIN pragma_index_info(i.name) AS c "
        'WHERE i."unique" AND NOT i.partial GROUP BY i.name HAVING count(*) = 1 '
        "UNION ALL "
        "SELECT max(name) FROM given JOIN pragma_table_xinfo(address) WHERE pk GROUP BY '' HAVING count(*) = 1"
    )
    REFERENCES = (
        "SELECT t.name, c.name FROM pragma_foreign_key_list(?) AS f "
        "JOIN sqlite_master AS t ON t.name = f.\"table\" COLLATE NOCASE AND t.type IN ('table', 'view') "
        "JOIN pragma_table_xinfo(t.name) AS c "
        'ON CASE WHEN f."to" IS NULL THEN c.pk = f.seq + 1 ELSE c.name = f."to" COLLATE NOCASE END '
        'WHERE f."from" = ? ORDER BY f.id'
    )
    identity = "INTEGER PRIMARY KEY"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        if options.index:
            raise UsageError("--index is for Postgres; a search in SQLite is exact and needs none. Leave it out.")
        import sqlite3

        self.sqlite3 = sqlite3
        self.path = options.database.removeprefix("sqlite:///")
        self.check_file()
        self.is_new = not os.path.exists(self.path)
        self.frozen: Any = None  # the file's state, if it is read as one that does not change
        self.connection = self.open()
        self.file: Any = None  # beside the connection, for what stands in the file's header
        self.start: int | None = None  # the change counter when the run began to look, and
        self.commits = 0  # what the run has added to it since
        self.large = self.sound = False  # whether a note is worth its place, and no digest was found unfit
        self.encoding = "utf-8"
        # Does nothing, but gives Python a turn in long statements, so that Ctrl-C is heard.
        self.connection.set_progress_handler(lambda: 0, 200_000)
        try:
            self.rows("SELECT count(*) FROM sqlite_master")  # is it a database, and may it be read?
            self.lock = None if self.reads_only else self.take_lock()
        except BaseException:
            self.connection.close()  # nobody else will: 3.13 complains of that
            raise

    def open(self) -> Any:
        """Return the run's connection; of one that only reads, such that no byte changes in the file or beside it.

        In WAL mode (https://sqlite.org/wal.html#read_only_databases) a reader makes the files -wal and -shm where they
        are missing, and writes to -shm where they are not: unless that is said to be read-only, or the database to be
        immutable, which is then watched.
        """
        # Waiting is done in `patiently`, where signals are seen; half a second here keeps it from spinning.
        if not self.reads_only:
            return self.connect(self.path, timeout=0.5)
        from urllib.parse import quote

        real, how = os.path.realpath(self.path), ""
        log, index = real + "-wal", real + "-shm"
        with contextlib.suppress(OSError):  # SQLite will say it
            with open(real, "rb") as file:  # https://sqlite.org/fileformat2.html#file_format_version_numbers
                is_wal = file.read(20)[18:] == b"\2\2"
            if is_wal and os.path.exists(log) and os.path.exists(index):
                how = "&readonly_shm=1"
            elif is_wal and os.path.exists(log) and os.path.getsize(log):
                raise self.unfinished()
            elif is_wal:
                how = "&immutable=1"
                self.frozen = self.file_state()
        path = real.replace(os.sep, "/")
        uri = f"file://{'' if path.startswith('/') else '/'}{quote(os.fsencode(path), safe='/:')}?mode=ro{how}"
        connection = self.connect(uri, timeout=0.5, uri=True)
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")  # what is shown may be no text
        return connection

    def file_state(self) -> tuple[int, ...]:
        """Return what tells that the database was written to."""
        stat = os.stat(self.path)
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def unfinished(self) -> Stop:
        """Return the end of a run that only reads, and cannot without finishing what another program has left."""
        return Stop(
            f"{self.path} was left in the middle of a change by a program that was killed, and to read it would "
            "change it. Run embedgen, or open it once with any other program that may write to it."
        )

    def connect(self, path: str, timeout: float, uri: bool = False) -> Any:
        """Return a connection to an SQLite file, without Python's own transactions."""
        try:
            return self.sqlite3.connect(path, timeout=timeout, isolation_level=None, uri=uri)
        except self.sqlite3.Error as error:
            raise self.translated(error) from None

    def check_file(self) -> None:
        """Raise Stop for a database that is not there; only --load makes a new one."""
        folder = os.path.dirname(self.path) or "."
        if not os.path.isdir(folder):
            raise Stop(f"there is no folder {folder} for the database {self.path}. Give --database URL.")
        if not os.path.exists(self.path) and not self.options.load:
            names = sorted(name for name in os.listdir(folder) if name.endswith(SQLITE_ENDINGS))
            raise Stop(
                f"there is no database {self.path} (databases in {folder}: {listed(names)}). "
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
        if self.file:
            self.file.close()
        if self.is_new and os.path.exists(self.path) and not os.path.getsize(self.path):
            os.remove(self.path)  # made by connecting; the file that was to be loaded had an error
        if self.lock:
            self.lock.close()

    def add_sha256(self) -> None:
        """Add the SQL function embedgen_sha256: the identity of a text, given as it stands in the database."""
        from hashlib import sha256

        encoding, is_utf8 = self.encoding, self.encoding == "UTF-8"

        def digest(raw: bytes) -> bytes:
            # ASCII is its own UTF-8; anything else may be no text at all, which becomes what is sent for it.
            if not (is_utf8 and raw.isascii()):
                raw = raw.decode(encoding, "replace").encode("utf-8")
            return sha256(raw).digest()

        self.connection.create_function("embedgen_sha256", 1, digest, deterministic=True)

    def patiently(self, action: Callable[[], T]) -> T:
        """Return what the action returns; try for a minute while the database is locked by somebody else."""
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                result = action()
                if self.frozen and self.frozen != self.file_state():
                    raise Stop(f"{self.path} was written to while it was read. Run the same command again.")
                return result
            except self.sqlite3.Error as error:
                if self.stopping():
                    deadline = min(deadline, time.monotonic() + GRACE / 2)
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
            if self.reads_only:
                return self.unfinished()
            return Stop(f"{path} cannot be written ({text}). Check its permissions and those of its folder.")
        if text.startswith(("file is not a database", "database disk image is malformed", "malformed database")):
            return Stop(f"{path} is not a sound SQLite database ({text}). Give --database URL.")
        return Stop(f"SQLite says of {path}: {text}.")

    def rows(self, sql: str, *parameters: Any) -> list[Any]:
        return self.patiently(lambda: self.execute(sql, *parameters))

    def complaint(self, sql: str) -> str:
        try:
            self.connection.execute(sql)
        except (self.sqlite3.Error, self.sqlite3.Warning) as error:
            return str(error)
        return ""

    def address(self, relation: Relation) -> str:
        return relation.name

    def find(self, name: str) -> Relation | None:
        return self.relation_at(name) or self.relation_at(self.place(name).name)

    def place(self, name: str, beside: str = "") -> Relation:
        return Relation("main", name.removeprefix("main.") or name, True)  # without ATTACH there is no other schema

    def value_sql(self, column: str, declared: str) -> str:
        name, blanks = f"s.{quoted(column)}", ", ".join(str(ord(blank)) for blank in BLANKS)
        # Nearly always the first character says it, in a third of the time.
        visible = f"unicode({name}) BETWEEN 33 AND 126 OR trim({name}, char({blanks})) <> ''"
        return f"CASE WHEN {visible} THEN {name} END"

    def digest_sql(self) -> str:
        return f"embedgen_sha256({as_bytes(self.whole_text)})"

    def key_type(self, declared: str) -> str:
        """Return the key's type by SQLite's rule (https://sqlite.org/datatype3.html, section 3.1)."""
        upper = declared.upper()
        if "INT" in upper:
            # Only INTEGER PRIMARY KEY keeps texts out of the source; the target's own would refuse them.
            other = f"SELECT 1 FROM {self.relation.sql} WHERE typeof({quoted(self.key)}) <> 'integer'"
            return "INTEGER" if self.value(other) is None else "BLOB"
        if re.search("CHAR|CLOB|TEXT", upper):
            return "TEXT"
        return "BLOB" if not upper or "BLOB" in upper else "NUMERIC"

    def references_sql(self) -> str:
        return f" REFERENCES {quoted(self.relation.name)}({quoted(self.key)}) ON DELETE CASCADE"

    def create_sql(self, measure: Callable[[], int]) -> str:
        return (
            "embedding BLOB NOT NULL, model TEXT NOT NULL, text_sha256 BLOB NOT NULL, updated_at TEXT NOT NULL, "
            "provenance INTEGER"
        )

    def create_target(self, measure: Callable[[], int]) -> None:
        self.commits += not self.has_target
        super().create_target(measure)

    def stored_dimensions(self, model: str = "") -> int | None:
        if not self.has_target or self.replaces_all:
            return None
        vector = self.stored("embedding")
        are_meant = f"typeof({vector}) = 'blob' AND {self.is_by(model)}"
        size = self.value(f"SELECT length({vector}) FROM {self.target.sql} AS e WHERE {are_meant}")
        return size // 4 if size and size % 4 == 0 else None

    def prepare(self) -> None:
        self.encoding = self.value("SELECT encoding FROM pragma_encoding")
        # Rows are read once and in order, so that a larger cache would only fill up and be of no use.
        self.rows(f"PRAGMA cache_size = -{CACHE_KIB}")
        self.add_sha256()
        # Closed after the connection and not before: with any handle on a file that it closes, a process
        # loses all its locks there (https://sqlite.org/howtocorrupt.html, section 2.2).
        with contextlib.suppress(OSError):
            self.file = open(self.path, "rb", buffering=0)  # noqa: SIM115
        with self.snapshot():
            self.start, self.commits = self.counter(), 0
        super().prepare()

    # What spares a run with nothing to do the hashing of every text. SQLite counts in the file's header the
    # transactions that have changed it. A run that found or made every digest in the target fit its text
    # says so in a note, with that count, in the database itself; while the count is the same, so is all else.
    # Rows are counted, and --where is evaluated, in every run.

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Hold the database as it is: nobody's change is committed meanwhile."""
        self.rows("BEGIN")
        try:
            self.rows("SELECT count(*) FROM sqlite_master")  # BEGIN alone takes no lock
            yield
        finally:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

    def counter(self) -> int | None:
        """Return the file's change counter, None where there is none to rely on; to be called in a transaction.

        https://sqlite.org/fileformat2.html#file_change_counter; it stands still in WAL mode. A switch of the
        mode is itself a change, so a note from before does not outlive it.
        """
        if not self.file or self.connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
            return None
        self.file.seek(24)
        return int.from_bytes(self.file.read(4), "big")

    def state(self, counter: int) -> str:
        """Return what a note is bound to beside its time: SQLite's own copies of a file count anew, and copy notes."""
        return f"{os.fstat(self.file.fileno()).st_ino}/{counter}"

    @property
    def claim(self) -> str:
        """Everything that a note's truth depends on but for the rows, as a digest.

        SQLite's version is there because its way to write a REAL as text has changed before.
        """
        target = (self.target, self.target_key, sorted(self.target_columns.items()))
        source = (self.relation, self.key, self.whole_text, self.model)
        return digest_of(repr((__version__, self.sqlite3.sqlite_version, source, target))).hex()

    def note_holds(self) -> bool:
        """Whether nobody has written to the file since a note of this table and target; to be called in a snapshot."""
        counter = self.counter()
        if counter is None or not self.has_target:
            return False
        sql = f"SELECT 1 FROM {NOTES} WHERE target = ? AND claim = ? AND state = ? AND abs(written - ?) <= ?"
        known = (self.target.name, self.claim, self.state(counter), self.changed_at, NOTE_SECONDS)
        try:
            return bool(self.connection.execute(sql, known).fetchall())
        except self.sqlite3.Error:
            return False  # no such table, or somebody else's

    @property
    def changed_at(self) -> float:
        """When the file was written to last, in seconds since 1970: a second witness beside the counter."""
        return os.fstat(self.file.fileno()).st_mtime

    def check_model(self) -> None:
        with self.snapshot():
            holds = self.note_holds()
        if not holds:
            super().check_model()

    def count(self) -> tuple[int, int]:
        with self.snapshot():
            self.unchanged = self.note_holds()
            total, existing = super().count()
            self.sound = self.unchanged or existing == total
            if not self.sound and not self.force:  # rows without an embedding do not make those that have one unfit
                self.unchanged = True
                self.sound = super().count()[1] == existing
                self.unchanged = False
        self.large = total >= NOTE_ROWS
        return total, existing

    def note(self, complete: bool) -> None:
        if self.start is None or not self.large or self.force or self.options.where:
            return
        if (self.unchanged and not self.commits) or not (self.sound or complete) or not self.can_be_noted():
            return
        try:
            self.whole(self.write_note)
        except self.sqlite3.Error:
            pass  # locked, or read-only: the next run hashes again

    def can_be_noted(self) -> bool:
        """Whether the truth of a note would depend on nothing but this file, and what was saved stayed as it was."""
        find = "SELECT rootpage FROM main.sqlite_master WHERE type = 'table' AND name = ?"
        for table in (self.relation, self.target):
            if table.schema != "main" or not self.value(find, table.name):  # views and virtual tables have no root
                return False
        if not self.commits:
            return True
        # A trigger may change texts; keys of another kind may become one.
        ours, theirs = self.key_declared.upper(), self.columns(self.target)[self.target_key].type.upper()
        same = theirs in ("INTEGER", "BLOB") if "INT" in ours else theirs == self.key_type(ours)
        other = (
            "SELECT 1 FROM main.sqlite_master WHERE tbl_name = ? COLLATE NOCASE "
            "AND (type = 'trigger' OR sql LIKE '%COLLATE%')"
        )
        return same and self.value(other, self.target.name) is None

    def write_note(self) -> None:
        """Write the note, in a transaction, unless somebody else has written since the run began to look."""
        assert self.start is not None
        before = self.counter()
        if before != self.start + self.commits:
            return
        execute = self.connection.execute
        execute(
            f"CREATE TABLE IF NOT EXISTS {NOTES} "
            "(target TEXT PRIMARY KEY, claim TEXT NOT NULL, state TEXT NOT NULL, written REAL NOT NULL)"
        )
        now, state = time.time(), self.state(before + 1)
        # Those of other targets that hold now, hold afterwards.
        others = f"UPDATE {NOTES} SET state = ?, written = ? WHERE state = ? AND abs(written - ?) <= ?"
        execute(others, (state, now, self.state(before), self.changed_at, NOTE_SECONDS))
        execute(f"REPLACE INTO {NOTES} VALUES (?, ?, ?, ?)", (self.target.name, self.claim, state, now))

    def page(self, after: Any) -> tuple[list[Row], bool]:
        tables, exists = self.joined()
        above, parameters = ("1 = 1", ()) if after is None else (f"{self.key_sql} > ?", (after,))
        sql = (
            f"SELECT {self.key_sql}, {as_bytes(self.text)} FROM {tables} WHERE {above} AND NOT ({exists}) "
            f"ORDER BY {self.key_sql} LIMIT {PAGE_ROWS}"
        )

        def read() -> tuple[list[Row], bool]:
            page: list[Row] = []
            room = PAGE_BYTES
            with contextlib.closing(self.connection.execute(sql, parameters)) as cursor:
                for key, raw in cursor:
                    text = raw.decode(self.encoding, "replace")
                    page.append(Row(key, text, digest_of(self.prefix + text)))
                    room -= len(raw)
                    if room <= 0:
                        break
            return page, room <= 0 or len(page) == PAGE_ROWS

        return self.patiently(read)

    def save(self, vectors: list[tuple[Row, bytes]]) -> int:
        columns = {quoted(theirs): f":{ours}" for ours, theirs in self.target_columns.items()}
        sql = (
            f"INSERT INTO {self.target.sql} ({quoted(self.target_key)}, {', '.join(columns)}) "
            f"SELECT :key, {', '.join(columns.values())} "
            f"WHERE EXISTS (SELECT 1 FROM {self.relation.sql} AS s WHERE {self.key_sql} = :key) "
            f"{replacing(self.target_key, self.target_columns.values())}"
        )
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        rows = [
            {"key": row.key, "embedding": vector, "model": self.model, "text_sha256": row.digest, "updated_at": now,
             "provenance": self.maker(vector)} for row, vector in vectors
        ]  # fmt: skip
        return self.transaction(lambda: int(self.connection.executemany(sql, rows).rowcount))

    def transaction(self, action: Callable[[], T]) -> T:
        """Return what the action returns, done as a whole or not at all; wait for a locked database."""
        return self.patiently(lambda: self.whole(action))

    def vector_of(self, value: Any) -> bytes | None:
        return value if isinstance(value, bytes) and value and len(value) % 4 == 0 else None

    def with_key(self, sql: str, text: str) -> list[Any]:
        found = self.rows(sql, text)
        if not found and re.fullmatch(r"0|-?[1-9]\d{0,17}", text, re.ASCII):
            found = self.rows(sql, int(text))  # a column of no type takes 7 and '7' for two values
        return found

    def has_length(self, dimensions: int) -> str:
        vector = self.vector_sql()
        return f"typeof({vector}) = 'blob' AND length({vector}) = {dimensions * 4}"

    def tally(self, having: str) -> tuple[int, ...]:
        with self.snapshot():
            self.unchanged = self.note_holds()
            return super().tally(having)

    def nearest(self, vector: bytes, model: str, most: int) -> list[tuple[Any, bytes]]:
        key, stored = self.key_sql, self.vector_sql()
        sql = f"SELECT {key}, {stored} FROM {self.pairs} WHERE {self.comparable(len(vector) // 4, model)}"
        if self.has_sqlite_vec():
            order = f"COALESCE(round(vec_distance_cosine({stored}, ?), 5), 3)"  # NULL is a vector's without a direction
            return self.rows(f"{sql} ORDER BY {order}, {key} LIMIT {most}", vector)
        return self.patiently(lambda: nearest_of(self.connection.execute(sql), vector, most))

    def has_sqlite_vec(self) -> bool:
        """Whether vectors can be compared in SQLite, with the package sqlite-vec, which is loaded then."""
        try:
            sqlite_vec: Any = importlib.import_module("sqlite_vec")
            self.connection.enable_load_extension(True)  # is missing in Pythons that were built without
            sqlite_vec.load(self.connection)
            self.connection.enable_load_extension(False)
        except (ImportError, AttributeError, self.sqlite3.Error):
            return False
        return True

    def known_texts(self, tables: str) -> list[tuple[str, bytes]]:
        found = self.rows(f"SELECT {as_bytes(self.text)}, {self.vector_sql()} {tables}")
        return [(raw.decode(self.encoding, "replace"), vector) for raw, vector in found if isinstance(vector, bytes)]

    def whole(self, action: Callable[[], T]) -> T:
        """Return what the action returns, done as a whole or not at all."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            changes = self.connection.total_changes
            result = action()
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:  # SQLite itself rolls back on some errors, a full disk for one
                self.connection.execute("ROLLBACK")
            raise
        self.commits += self.connection.total_changes > changes
        return result

    def insert(self, table: Relation, columns: dict[str, str], key: str, records: Iterable[list[Any]]) -> int:
        names, marks = ", ".join(map(quoted, columns)), ", ".join("?" * len(columns))
        sql = f"INSERT INTO {table.sql} ({names}) VALUES ({marks}) {replacing(key, columns)}"
        row: list[Any] = []

        def noted() -> Iterator[list[Any]]:
            for record in records:
                row[:] = record
                yield record

        try:
            return max(int(self.connection.executemany(sql, noted()).rowcount), 0)
        except self.sqlite3.IntegrityError as error:  # such as a word where the key is a number
            which = f"the row with the {key} {row[list(columns).index(key)]!r}"
            raise UsageError(f"--load {self.options.load}: SQLite says of {which}: {error}.") from None


def place_of(key: Any) -> tuple[int, Any]:
    """Return what keys of any types sort by: numbers, texts, blobs (https://sqlite.org/datatype3.html#sort_order)."""
    if hasattr(key, "__float__"):
        return 0, key
    if isinstance(key, (str, bytes)):
        return 1 + isinstance(key, bytes), key
    return 3, str(key)  # such as a UUID or a date


def nearest_of(rows: Iterable[tuple[Any, bytes]], vector: bytes, most: int) -> list[tuple[Any, bytes]]:
    """Return those of many keys with vectors that are nearest to one of the same length, as Store.nearest does.

    One pass, and never more of them in memory than are wanted. The cosine is that of the law of cosines, since Python
    has a function in C for the distance of two points, which takes half the time of a sum of products.
    """
    import heapq
    import math
    import struct

    numbers = unpack(vector)
    norm = math.hypot(*numbers)
    unit = tuple(number / norm for number in numbers)
    unpacked, dist, hypot = struct.Struct(f"<{len(unit)}f").unpack, math.dist, math.hypot

    def ranked() -> Iterator[tuple[float, tuple[int, Any], bytes]]:
        for key, stored in rows:
            numbers = unpacked(stored)
            length = hypot(*numbers)
            if 1e-3 < length < 1e3:
                distance = dist(unit, numbers)
                likeness = (length * length + 1 - distance * distance) / (length + length)
            else:  # where the difference of squares has no digits left
                likeness = cosine(vector, stored)
            if likeness == likeness:  # NaN is not
                yield -round(likeness, NEAR_DIGITS), place_of(key), stored

    return [(key, stored) for _, (_, key), stored in heapq.nsmallest(most, ranked())]


NEAR_DIGITS = 9  # of a cosine by which candidates are chosen: fewer than multiples of one vector differ in


def as_bytes(text: str) -> str:
    """Return the SQL of a text as bytes: it may hold NUL, or bytes that are no text at all."""
    return f"CAST({text} AS BLOB)"


def is_locked(error: Exception) -> bool:
    """Whether SQLite says that somebody else is at work on the database."""
    return str(error).startswith(("database is locked", "database table is locked", "database schema is locked"))


RECONNECT_PATIENCE = 120.0  # seconds to wait for a Postgres that has gone away
ROW_LOCK_PATIENCE = 60  # seconds to wait for a row that another transaction holds
EF_SEARCH = 400  # candidates in an HNSW index: ten times pgvector's default misses less, and costs milliseconds
TROUBLES: tuple[tuple[str, type[Stop], str], ...] = (  # by their names in psycopg
    (
        "InsufficientPrivilege", Forbidden,
        "Postgres refuses: {}. Ask its administrator, or give another user in --database.",
    ), (
        "UndefinedFunction", UsageError,
        "Postgres says: {}. If keys do not compare, give another --target NAME, or --id COLUMN.",
    ), (
        "DiskFull", Stop,
        "Postgres has no room ({}). Make room, and run the same command again.",
    ), (
        "LockNotAvailable", Stop,
        f"rows have been locked by another transaction for {ROW_LOCK_PATIENCE} s. Run again later.",
    ), (
        "ReadOnlySqlTransaction", Stop,
        "Postgres takes no writes ({}). Give the address of the primary server in --database.",
    ),
)  # fmt: skip
MOST_INDEXED = {"vector": 2000, "halfvec": 4000}  # dimensions that pgvector's HNSW takes, by type


class PostgresStore(Store):
    """A table in Postgres with pgvector, through psycopg 3."""

    TABLES = (
        "SELECT CASE WHEN pg_table_is_visible(c.oid) THEN '' ELSE n.nspname || '.' END || c.relname "
        "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE c.relkind IN ('r', 'p', 'f', 'v', 'm') AND n.nspname <> 'information_schema' "
        "AND n.nspname NOT LIKE 'pg\\_%' AND has_table_privilege(c.oid, 'SELECT') ORDER BY 1"
    )
    RELATION = (
        "SELECT n.nspname, c.relname, c.relkind IN ('r', 'p', 'f') FROM pg_class c "
        "JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE c.oid = to_regclass($1) AND c.relkind IN ('r', 'p', 'f', 'v', 'm')"
    )
    COLUMNS = (
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod), "
        "COALESCE(array_position(i.indkey::smallint[], a.attnum) + 1, 0) FROM pg_attribute a "
        "LEFT JOIN pg_index i ON i.indrelid = a.attrelid AND i.indisprimary "
        "WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped "
        "AND has_column_privilege(a.attrelid, a.attnum, 'SELECT') ORDER BY a.attnum"
    )
    UNIQUE = (
        "SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] "
        "WHERE i.indrelid = to_regclass($1) AND i.indnkeyatts = 1 "
        "AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL"
    )
    REFERENCES = (
        "SELECT c.relname, t.attname FROM pg_constraint f JOIN pg_class c ON c.oid = f.confrelid "
        "JOIN pg_attribute a ON a.attrelid = f.conrelid AND f.conkey = ARRAY[a.attnum] "
        "JOIN pg_attribute t ON t.attrelid = f.confrelid AND t.attnum = f.confkey[1] "
        "WHERE f.contype = 'f' AND f.conrelid = to_regclass($1) AND a.attname = $2"
    )
    mark = "${}"
    identity = "integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY"
    type_names: ClassVar[dict[str, str]] = {"INTEGER": "bigint", "REAL": "double precision", "TEXT": "text"}
    other_dimensions = ""  # the target's column is declared with its dimensions, and never altered

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        try:
            import psycopg
        except ImportError as error:
            raise Stop(f'Postgres needs the package psycopg ({error}). Run: pip install "psycopg[binary]"') from None
        if not hasattr(psycopg, "RawCursor"):
            raise Stop(f'psycopg {psycopg.__version__} is too old. Run: pip install --upgrade "psycopg[binary]"')
        self.psycopg: Any = psycopg
        self.in_transaction = False
        self.connection = self.connect()
        info = self.connection.info
        self.shown = f"postgresql://{info.host}:{info.port}/{info.dbname}"
        self.blanks = BLANKS
        if self.value("SELECT current_setting('server_encoding')") != "UTF8":
            self.blanks = BLANKS.encode("ascii", "ignore").decode()  # others are unknown to that database

    def connect(self) -> Any:
        """Return a new connection; raise Stop where that fails."""
        psycopg, url = self.psycopg, self.options.database
        try:
            settings = {
                # Seconds; libpq would wait for a dead host without end.
                "connect_timeout": os.environ.get("PGCONNECT_TIMEOUT") or 10,
                "tcp_user_timeout": 30_000,  # milliseconds, likewise for one that dies later
                "fallback_application_name": "embedgen",
                **psycopg.conninfo.conninfo_to_dict(url),
                "client_encoding": "utf8",
            }
            connection = psycopg.connect(
                **settings,
                autocommit=True,
                cursor_factory=psycopg.RawCursor,  # parameters are $1, and a % is a %
                prepare_threshold=None,  # statements prepared by name do not survive a pooler such as PgBouncer
            )
            # In transactions, not in the session, which a pooler may give to others.
            connection.read_only = self.reads_only or None
            if connection.info.parameter_status("standard_conforming_strings") == "off":
                connection.execute("SET standard_conforming_strings = on")  # a backslash is a backslash
            return connection
        except psycopg.Error as error:
            reason = one_line(re.sub(r"\s*\n\s*", " ", str(error).strip()))
            password = url.partition("//")[2].partition("/")[0].rpartition("@")[0].partition(":")[2]
            for secret in [*password.split("@"), *re.findall(r"password=([^&\s]+)", url)]:
                reason = reason.replace(secret, "***") if len(secret) > 2 else reason
            kind = UsageError if isinstance(error, psycopg.ProgrammingError) else Stop  # the first if the URL is wrong
            raise kind(f"cannot connect to Postgres ({reason}). Check --database URL.") from None

    def close(self) -> None:
        self.connection.close()

    def patiently(self, action: Callable[[], T]) -> T:
        """Return what the action returns; if the connection is lost, connect again, for two minutes, and repeat it.

        A part of a transaction is tried once: what is repeated is the whole of it.
        """
        if self.in_transaction:
            return action()
        deadline, wait, orphans = 0.0, FIRST_WAIT, 0
        errors = self.psycopg.errors
        while True:
            try:
                if self.connection.closed:
                    self.connection = self.connect()
                return action()
            except (self.psycopg.Error, Stop) as error:
                # A row may be deleted between the look at it and the reference to it; not thrice.
                orphan = isinstance(error, errors.ForeignKeyViolation)
                orphans += orphan
                again = isinstance(error, errors.TransactionRollback) or (orphan and orphans < 3)  # or a deadlock
                if "pooling mode" in str(error):  # PgBouncer's words, after which it hangs up
                    raise Stop(
                        "the pooler in front of Postgres works in statement mode, which tears transactions apart. "
                        "Let it work in transaction mode, or give Postgres itself in --database."
                    ) from error
                if not again and not self.connection.closed:
                    raise self.translated(error) from error
                deadline = deadline or time.monotonic() + RECONNECT_PATIENCE
                until = time.monotonic() + (0 if orphan else wait)
                while time.monotonic() < until:
                    if self.stopping():
                        deadline = min(deadline, time.monotonic() + GRACE / 2)
                    if time.monotonic() >= deadline:
                        raise self.translated(error) from error
                    time.sleep(TICK)
                wait = min(wait * 2, LEASE / 2)  # not so long that others take us for dead

    def translated(self, error: Exception) -> Exception:
        """Return the exception to raise for one of psycopg's."""
        if isinstance(error, Stop):
            return error
        text = one_line(str(error).strip().partition("\n")[0])
        for name, kind, words in TROUBLES:
            if isinstance(error, getattr(self.psycopg.errors, name)):
                return kind(words.format(text))
        if self.connection.closed:
            return Stop(f"the connection to Postgres is lost ({text}). Run the same command again when it is back.")
        return Stop(f"Postgres says: {text}.")

    def rows(self, sql: str, *parameters: Any) -> list[Any]:
        run = self.transaction if self.reads_only else self.patiently
        return run(lambda: self.execute(sql, *parameters))

    def transaction(self, action: Callable[[], T]) -> T:
        """Return what the action returns, done as a whole or not at all."""

        def whole() -> T:
            with self.connection.transaction():
                self.in_transaction = True
                try:
                    return action()
                finally:
                    self.in_transaction = False

        return action() if self.in_transaction else self.patiently(whole)

    def alone(self, action: Callable[[], T]) -> T:
        def locked() -> T:
            self.connection.execute("SELECT pg_advisory_xact_lock($1)", [ONE_AT_A_TIME])
            return action()

        return self.transaction(locked)

    def is_there(self, relation: Relation) -> bool:
        # Not by to_regclass, which may answer from what this session has looked up before, whoever has been here since.
        sql = (
            "SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = $1 AND c.relname = $2"
        )
        return bool(self.execute(sql, relation.schema, relation.name))

    def complaint(self, sql: str) -> str:
        try:
            self.connection.execute(sql, binary=True)  # the form that takes one statement only
        except self.psycopg.Error as error:
            return one_line(str(error).partition("\n")[0])
        return ""

    def find(self, name: str) -> Relation | None:
        # As given, then in the lower case that SQL makes of a name without quotes; along the search path.
        paths = [quoted(name), ".".join(map(quoted, name.split(".", 1)))]
        paths += [path.lower() for path in paths]
        return next(filter(None, map(self.relation_at, paths)), None)

    def place(self, name: str, beside: str = "") -> Relation:
        schema, _, rest = name.partition(".")
        if rest and self.rows("SELECT 1 FROM pg_namespace WHERE nspname = $1", schema):
            return Relation(schema, rest, True)
        return Relation(beside or self.value("SELECT current_schema()") or "public", name, True)

    def check_key(self) -> None:
        if self.key_declared.endswith("[]") or self.key_declared in ("bytea", "json", "jsonb"):
            raise UsageError(
                f'the key "{self.key}" of "{self.relation.name}" is of the type {self.key_declared}, '
                "whose values have no one form as text. Give --id COLUMN, of numbers, texts, UUIDs or dates."
            )
        super().check_key()

    def value_sql(self, column: str, declared: str) -> str:
        name = f"s.{quoted(column)}"
        value = f"array_to_string({name}, ', ')" if declared.endswith("[]") else f"{name}::text"
        return f"CASE WHEN btrim({value}, {literal(self.blanks)}) <> '' THEN {value} END"

    def digest_sql(self) -> str:
        return f"sha256(convert_to({self.whole_text}, 'UTF8'))"

    def key_type(self, declared: str) -> str:
        wider = {"smallint": "bigint", "integer": "bigint", "character varying": "text"}
        return wider.get(declared.partition("(")[0], declared)

    def references_sql(self) -> str:
        sql = "SELECT has_column_privilege(to_regclass($1), $2, 'REFERENCES')"
        if not self.value(sql, self.relation.sql, self.key):
            return ""
        return f" REFERENCES {self.relation.sql}({quoted(self.key)}) ON DELETE CASCADE"

    def find_vector(self) -> tuple[str, int, int]:
        """Return pgvector's schema, quoted, and the OIDs of its type vector and its array; create it if need be."""
        sql = (
            "SELECT quote_ident(n.nspname), t.oid::bigint, t.typarray::bigint FROM pg_type t "
            "JOIN pg_namespace n ON n.oid = t.typnamespace JOIN pg_depend d ON d.objid = t.oid AND d.deptype = 'e' "
            "JOIN pg_extension e ON e.oid = d.refobjid WHERE e.extname = 'vector' AND t.typname = 'vector'"
        )
        found = self.rows(sql)
        if not found:
            try:
                self.alone(lambda: self.connection.execute("CREATE EXTENSION IF NOT EXISTS vector"))
            except Stop as stop:
                raise Stop(
                    f"the extension pgvector is missing, and cannot be created here ({stop.message}) "
                    "Have it installed on the database server (https://github.com/pgvector/pgvector), and let an "
                    "administrator run in this database: CREATE EXTENSION vector;"
                ) from None
            found = self.rows(sql)
        schema, element, array = found[0]
        return schema, element, array

    def create_sql(self, measure: Callable[[], int]) -> str:
        schema, _, _ = self.find_vector()
        self.check_index("vector", measure())
        return (
            f"embedding {schema}.vector({measure()}) NOT NULL, model text NOT NULL, "
            "text_sha256 bytea NOT NULL, updated_at timestamptz NOT NULL, provenance integer"
        )

    def use_target(self) -> None:
        super().use_target()
        declared, kind, length = self.vector_type()
        if kind not in MOST_INDEXED:
            raise UsageError(
                f'the column "embedding" of "{self.target.name}" is of the type {declared}, '
                "not vector or halfvec. Give --target NAME."
            )
        self.check_index(kind, length)
        filled = [*self.target_columns.values(), self.target_key]
        sql = (
            "SELECT attname, attname = ANY($2) FROM pg_attribute a WHERE attrelid = to_regclass($1) AND attnum > 0 "
            "AND NOT attisdropped AND CASE WHEN attname = ANY($2) THEN attgenerated <> '' OR attidentity = 'a' "
            "ELSE attnotnull AND NOT atthasdef AND attidentity = '' END"
        )
        for column, ours in self.rows(sql, self.target.sql, filled):
            why = "is generated by Postgres" if ours else "must not be empty, and embedgen has nothing for it"
            raise UsageError(f'the column "{column}" of "{self.target.name}" {why}. Give --target NAME.')

    def check_index(self, kind: str, dimensions: int) -> None:
        """Raise UsageError if --index is asked for and cannot be had for a column of that type."""
        most = MOST_INDEXED[kind]
        if not self.options.index:
            return
        if dimensions > most:
            wider = f"a target made with halfvec({dimensions}), " if dimensions <= MOST_INDEXED["halfvec"] else ""
            raise UsageError(
                f"--index: pgvector indexes at most {most:,} dimensions of the type {kind}; these vectors have "
                f"{dimensions:,}. Ways out: {wider}--dimensions {most} or fewer if the model offers it, "
                "or no index: an exact search needs none."
            )
        if not dimensions:
            raise UsageError(
                f'--index: the column "embedding" of "{self.target.name}" must say its dimensions. '
                f"Run: ALTER TABLE {self.target.sql} ALTER COLUMN embedding TYPE {kind}(N);"
            )

    def stored_dimensions(self, model: str = "") -> int | None:
        if not self.has_target:
            return None
        if length := self.vector_type()[2]:
            return length
        if self.replaces_all:
            return None
        # As text, which both types have in the same form.
        are_meant = f"{self.has_vector} AND {self.is_by(model)}"
        text = self.value(f"SELECT {self.vector_sql()} FROM {self.target.sql} AS e WHERE {are_meant}")
        return text.count(",") + 1 if text else None

    def beside(self, page: bool) -> str:
        # A plain join may be made by walking the target's index from its beginning, for each page again. OFFSET 0 keeps
        # Postgres from turning this into one: it is a look at the index for each row, whatever the statistics say.
        key = quoted(self.target_key)
        probe = f"(SELECT * FROM {self.target.sql} AS t WHERE t.{key} = {self.key_sql} OFFSET 0)"
        return f"LEFT JOIN LATERAL {probe} AS e ON true" if page else super().beside(page)

    def page(self, above: Any, upto: Any = None, most: int = PAGE_ROWS) -> tuple[list[Row], bool]:
        tables, exists = self.joined(page=True)
        key = self.key_sql
        bounds = [(sign, value) for sign, value in ((">", above), ("<=", upto)) if value is not None]
        within = "".join(f"{key} {sign} ${place} AND " for place, (sign, _) in enumerate(bounds, 1))
        # The sum ends a page early where its texts are long, before they are sent.
        sql = (
            "SELECT key, text, found FROM (SELECT key, text, count(*) OVER () AS found, "
            "sum(octet_length(text)) OVER (ORDER BY key) - octet_length(text) AS before FROM ("
            f"SELECT {key} AS key, {self.text} AS text FROM {tables} WHERE {within} NOT ({exists}) "
            f"ORDER BY {key} LIMIT {most}) AS page) AS sized WHERE before < {PAGE_BYTES} ORDER BY key"
        )
        found = self.rows(sql, *(value for _, value in bounds))
        page = [Row(key, text, digest_of(self.prefix + text)) for key, text, _ in found]
        seen = found[0][2] if found else 0
        return page, len(page) < seen or seen == most

    def key_after(self, above: Any, count: int) -> Any:
        """Return the key of the row that is `count` rows after a key (None: the beginning), None if there are fewer."""
        key = self.key_sql
        within, parameters = ("", []) if above is None else (f"WHERE {key} > $1", [above])
        return self.value(
            f"SELECT {key} FROM {self.source} AS s {within} ORDER BY {key} OFFSET {count - 1}", *parameters
        )

    @functools.cached_property
    def vectors(self) -> Any:
        """The type of a list of stored vectors that psycopg sends as a binary array of pgvector's.

        An array is its dimensions, a flag, the element's OID, its length and lower bound, then each element
        behind its length (array_recv in Postgres); a vector is the number of its dimensions, two bytes of
        zero, and float32, all big-endian (vector_recv in pgvector).
        """
        from array import array as numbers
        from struct import pack as packed

        _, element, array = self.find_vector()

        class Vectors(list):  # type: ignore[type-arg]
            pass

        class Dumper(self.psycopg.adapt.Dumper):  # type: ignore[misc,name-defined]
            format = self.psycopg.pq.Format.BINARY
            oid = array

            def dump(self, vectors: list[bytes]) -> bytes:
                pieces = [packed(">5I", 1, 0, element, len(vectors), 1)]
                for vector in vectors:
                    swapped = numbers("I", vector)  # four bytes, whatever they mean
                    if sys.byteorder == "little":
                        swapped.byteswap()
                    pieces += (packed(">IHxx", len(vector) + 4, len(vector) // 4), swapped.tobytes())
                return b"".join(pieces)

        for adapters in (self.psycopg.adapters, self.connection.adapters):  # of connections to come, and of this one
            adapters.register_dumper(Vectors, Dumper)
        return Vectors

    def save(self, vectors: list[tuple[Row, bytes]], more: str = "") -> int:
        # `more` stands for CTEs that are to be part of the statement, behind its CTE `saved`.
        known = {
            "embedding": "b.embedding",
            "model": literal(self.model),
            "text_sha256": "substr($3, 32 * b.place::int - 31, 32)",
            "updated_at": "now()",
            "provenance": "b.provenance",
        }
        names = {quoted(theirs): known[ours] for ours, theirs in self.target_columns.items()}
        key = quoted(self.target_key)
        rows = [row for row, _ in vectors]
        # An array of vectors in binary form is as fast as COPY, and one statement: no temporary table, no
        # transaction to keep open, and nothing for a pooler to tear apart. In the order of the keys, which
        # is the one in which other programs are likely to lock them.
        sql = (
            f"WITH patience AS (SELECT set_config('lock_timeout', '{ROW_LOCK_PATIENCE}s', true)), saved AS ("
            f"INSERT INTO {self.target.sql} ({key}, {', '.join(names)}) "
            f"SELECT {self.key_sql}, {', '.join(names.values())} "
            "FROM patience, unnest($1::text[], $2, $4::int[]) WITH ORDINALITY AS b(key, embedding, provenance, place) "
            f"JOIN {self.relation.sql} AS s ON {self.key_sql} = b.key::{self.key_declared} ORDER BY 1 "
            f"{replacing(self.target_key, self.target_columns.values())} RETURNING 1"
            f"){more} SELECT count(*) FROM saved"
        )
        keys = [str(row.key) for row in rows]
        embeddings = self.vectors([vector for _, vector in vectors])
        makers = [self.maker(vector) for _, vector in vectors]
        digests = b"".join(row.digest for row in rows)  # in one piece, which psycopg sends 100 times sooner than a list
        return int(self.rows(sql, keys, embeddings, digests, makers)[0][0])

    def vector_sql(self) -> str:
        return f"{self.stored('embedding')}::text"  # vector and halfvec alike: a JSON array

    def vector_of(self, value: Any) -> bytes | None:
        import json

        return None if value is None else pack(json.loads(value))

    def with_key(self, sql: str, text: str) -> list[Any]:
        try:
            return self.rows(sql, text)  # psycopg leaves it to Postgres which type that is
        except Stop as stop:
            if isinstance(stop.__cause__, self.psycopg.DataError):  # no number, no UUID ...
                return []
            raise

    def vector_type(self) -> tuple[str, str, int]:
        """Return the type of the target's vectors as declared, its name, and their length, 0 if that may be any."""
        declared = self.columns(self.target)[self.target_columns["embedding"]].type
        kind, _, length = declared.rpartition(".")[2].rstrip(")").partition("(")
        return declared, kind, int(length) if length.isdigit() else 0

    def has_length(self, dimensions: int) -> str:
        if self.vector_type()[2]:
            return self.has_vector
        return f"{self.find_vector()[0]}.vector_dims({self.stored('embedding')}) = {dimensions}"

    def seeing_all(self, sql: str) -> list[Any]:
        def look() -> list[Any]:
            self.execute("SET LOCAL row_security = off")  # an error where a policy would filter
            return self.execute(sql)

        return self.transaction(look)

    def delete(self, sql: str) -> int:
        return int(self.seeing_all(f"WITH gone AS ({sql} RETURNING 1) SELECT count(*) FROM gone")[0][0])

    def nearest(self, vector: bytes, model: str, most: int) -> list[tuple[Any, bytes]]:
        schema, kind, key = self.find_vector()[0], self.vector_type()[1], self.key_sql
        stored = self.stored("embedding")
        given = "[" + ",".join(f"{number:.9g}" for number in unpack(vector)) + "]"
        distance = f"{stored} OPERATOR({schema}.<=>) $1::{schema}.{kind}"
        indexed = any(valid for valid, _ in self.indexes())
        comparable = self.comparable(len(vector) // 4, model)

        def look(approximately: bool) -> list[Any]:
            # An index gives the order of nothing but the bare distance. Only what is found is sent as text.
            by, ties = (distance, "") if approximately else (f"round(({distance}) * 100000)", f", {key}")
            sql = (
                f"SELECT e.key, {self.vector_sql()} FROM (SELECT {key} AS key, {stored}, {by} AS distance "
                f"FROM {self.pairs} WHERE {comparable} ORDER BY {by}{ties} LIMIT {most}"
                ") AS e ORDER BY e.distance, e.key"
            )
            # For this transaction only. The index looks on where a condition has left too little (pgvector 0.8).
            if approximately:
                candidates = min(max(2 * most, EF_SEARCH), 1000)  # pgvector takes no more
                self.execute(f"SET LOCAL hnsw.ef_search = {candidates}")
                version = self.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'")[0][0]
                if [int(number) for number in re.findall(r"\d+", version)[:2]] >= [0, 8]:
                    self.execute("SET LOCAL hnsw.iterative_scan = strict_order")
            return self.execute(sql, given)

        found = self.transaction(lambda: look(indexed))
        if indexed and len(found) < most:  # few rows, or an index that has given up looking for them
            found = self.transaction(lambda: look(False))
        return [(key, packed) for key, text in found if (packed := self.vector_of(text))]

    def known_texts(self, tables: str) -> list[tuple[str, bytes]]:
        found = self.rows(f"SELECT {self.text}, {self.vector_sql()} {tables}")
        return [(text, vector) for text, stored in found if (vector := self.vector_of(stored))]

    def insert(self, table: Relation, columns: dict[str, str], key: str, records: Iterable[list[Any]]) -> int:
        execute, line = self.connection.execute, 0
        names = ", ".join(map(quoted, columns))
        texts = "".join(f", {quoted(name)} text" for name in columns)
        casts = ", ".join(f"{quoted(name)}::{kind}" for name, kind in columns.items())
        execute(f'CREATE TEMP TABLE embedgen_load ("embedgen line" bigint{texts}) ON COMMIT DROP')
        try:
            with self.connection.cursor().copy("COPY pg_temp.embedgen_load FROM STDIN") as copy:
                for line, values in enumerate(records, 1):
                    copy.write_row([line, *(None if value is None else as_text(value) for value in values)])
            # The last row of a key counts; one statement must not change a row twice.
            execute(
                f"INSERT INTO {table.sql} ({names}) SELECT {casts} FROM (SELECT DISTINCT ON ({quoted(key)}) * "
                f'FROM pg_temp.embedgen_load ORDER BY {quoted(key)}, "embedgen line" DESC) AS last '
                f"{replacing(key, columns)}"
            )
        except self.psycopg.DataError as error:  # such as a NUL, or a word where the column has numbers
            raise UsageError(f"--load {self.options.load}: Postgres says: {one_line(str(error).strip())}.") from None
        return line

    def indexes(self) -> list[tuple[bool, str]]:
        """Return the HNSW indexes for cosine distance, whether each is valid and its name; valid ones last."""
        sql = (
            "SELECT i.indisvalid, i.indexrelid::regclass::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
            "JOIN pg_am m ON m.oid = c.relam JOIN pg_opclass o ON o.oid = i.indclass[0] JOIN pg_attribute a "
            "ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] WHERE i.indrelid = to_regclass($1) "
            "AND a.attname = $2 AND m.amname = 'hnsw' AND o.opcname LIKE '%cosine_ops' AND i.indpred IS NULL "
            "ORDER BY i.indisvalid"
        )
        return self.rows(sql, self.target.sql, self.target_columns["embedding"])

    def build_index(self) -> Iterator[float]:
        """Build the HNSW index for cosine distance unless there is one; yield the share that is done, from 0 to 1.

        CONCURRENTLY: the table can be read and written meanwhile.
        """
        import threading

        found = self.indexes()
        while found and not found[-1][0] and (share := self.share_indexed()) is not None:  # by another run
            yield share
            time.sleep(LOOK)
            if self.stopping():
                return
            found = self.indexes()
        if found and found[-1][0]:
            return
        schema, kind, column = self.find_vector()[0], self.vector_type()[1], quoted(self.target_columns["embedding"])
        statements = [f"DROP INDEX CONCURRENTLY IF EXISTS {name}" for _, name in found]  # left by one broken off
        statements.append(
            f"CREATE INDEX CONCURRENTLY {self.index_name} ON {self.target.sql} "
            f"USING hnsw ({column} {schema}.{kind}_cosine_ops)"
        )
        failure: list[Exception] = []
        builder = self.connect()

        def build() -> None:
            try:
                for statement in statements:
                    builder.execute(statement)
            except Exception as error:
                failure.append(error)

        thread = threading.Thread(target=build, daemon=True)
        thread.start()
        try:
            while thread.is_alive() and not self.stopping():
                yield self.share_indexed() or 0.0
                thread.join(LOOK)
        finally:
            if thread.is_alive():
                self.break_off(builder, thread)
            builder.close()
        errors = self.psycopg.errors
        for error in failure:
            if isinstance(error, (errors.DeadlockDetected, errors.DuplicateTable, errors.UniqueViolation)):
                yield from self.build_index()  # another run was at it in the same moment: see what became of it
                return
            if not self.stopping():
                raise self.translated(error) from error
        yield 1.0

    def share_indexed(self) -> float | None:
        """Return the share of a build under way that is done, from 0 to 1, None if there is none."""
        sql = (
            "SELECT COALESCE(blocks_done::float8 / NULLIF(blocks_total, 0), 0) FROM pg_stat_progress_create_index "
            "WHERE relid = to_regclass($1)"
        )
        share: float | None = self.value(sql, self.target.sql)
        return share

    @property
    def index_name(self) -> str:
        """The name of our index, quoted; a name has 63 bytes at most."""
        stem = f"{self.target.name}_{self.target_columns['embedding']}".encode()[:58].decode("utf-8", "ignore")
        return quoted(f"{stem}_hnsw")

    def break_off(self, builder: Any, thread: Any) -> None:
        """End a build under way, and remove what it leaves: half an index is of use to nobody."""
        import threading

        builder.cancel()
        thread.join(GRACE)
        if thread.is_alive():
            return
        timer = threading.Timer(GRACE / 2, builder.cancel)  # if this has to wait for others, the next --index does it
        timer.start()
        with contextlib.suppress(self.psycopg.Error):
            builder.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {quoted(self.target.schema)}.{self.index_name}")
        timer.cancel()


def as_text(value: Any) -> str:
    """Return a value of a loaded file as COPY takes it for a column of any type."""
    return str(int(value)) if isinstance(value, bool) else str(value)


LEASE = 6.0  # seconds without a sign of life after which a machine's share goes to the others
RENEWAL = 2.0  # seconds between two such signs
LOOK = 0.5  # seconds between two looks at what the others have left
STRETCH = 20_000  # rows of the table, embedded or not, that one statement looks through: some ten milliseconds
SHARE = 0.5  # seconds of work that a machine takes at a time: a slower one takes less
ONE_AT_A_TIME = 0x656D6265646765  # the advisory lock of what only one embedgen at a time may do: "embedge" in ASCII


TO_FIND: Any = object()  # a key that is not known yet


class Lease:
    """A stretch of keys whose rows are this machine's to embed."""

    def __init__(self, number: int, rows: int) -> None:
        self.number, self.rows = number, rows  # those that are neither saved nor given up
        self.failed = self.left_out = 0  # counted at its end: whoever inherits it tries these rows again


class Fleet(PostgresStore):
    """A table in Postgres that any number of machines fill together, without knowing of one another.

    One pass goes through the table, shared by all: whoever needs work reads the next pending
    rows behind the point that the pass has `reached`, and moves that point behind them, which
    only one of several can do at once (compare and set). The stretch of keys so taken is
    noted as a lease. When its rows are saved, the lease goes; when its machine gives no sign
    of life for LEASE seconds, another takes it over. The pass is over at the end of the table
    when no lease is left.

    Leases in tables, rather than advisory locks: those belong to a session, which a pooler
    such as PgBouncer shares out by the transaction, and a machine that loses power would
    keep them until TCP gives up, hours later. No transaction is open between two statements.
    """

    OWN_TABLES: ClassVar[dict[str, str]] = {
        # One for each kind of work: table, text, model, target.
        "embedgen_passes": "job bytea PRIMARY KEY, target text NOT NULL, model text NOT NULL, "
        "round bigint NOT NULL DEFAULT 0, reached text, ended boolean NOT NULL DEFAULT false",
        "embedgen_machines": "id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, job bytea NOT NULL, "
        "name text NOT NULL, round bigint NOT NULL, expires timestamptz NOT NULL, gone boolean NOT NULL DEFAULT false, "
        "generated bigint NOT NULL DEFAULT 0, failed bigint NOT NULL DEFAULT 0, left_out bigint NOT NULL DEFAULT 0",
        # The keys above `above` and up to `upto`; NULL is the table's beginning.
        "embedgen_leases": "id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, job bytea NOT NULL, "
        "machine bigint NOT NULL, above text, upto text NOT NULL",
    }
    # After Postgres itself was away, everybody has time to say something again.
    ALIVE = f"(NOT m.gone AND greatest(m.expires, pg_postmaster_start_time() + interval '{LEASE} s') > now())"
    EXPIRY = f"now() + interval '{LEASE} s'"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.machine = 0  # our row in the table of machines, 0 as long as we take no part
        self.to_do = 0  # rows without their embedding when they were counted, and
        self.before: dict[int, int] = {}  # how many each machine had generated then
        self.others = 0, 0  # rows that the others have generated since, and that have failed with them in this pass
        self.generated = self.failed = self.left_out = 0  # rows that this machine has, of leases at their end
        self.round = 0  # of the pass that we take part in
        self.round_seen, self.reached, self.ended = 0, None, False  # of the pass, as last seen
        self.late = False  # whether the pass was under way when we joined: it proves nothing about its beginning
        self.ready: list[Row] = []  # rows taken, not yet given to the engine
        self.undecided: dict[Any, Lease] = {}  # our rows neither saved nor given up, by key: the lease of each
        self.handed_out: set[Any] = set()  # keys given to the engine and not back yet, whoever has their lease now
        self.done: list[int] = []  # leases at their end, to be given back
        self.hopeless: set[Any] = set()  # keys that failed here, not to be tried again in a second pass
        self.bound: Any = TO_FIND  # the end of the stretch that is being looked through, None at the table's end
        self.stretch, self.looking = STRETCH, 0.0  # rows to look through at a time, and the seconds that took
        self.rate, self.last_save = 0.0, time.monotonic()  # rows per second that are being saved
        self.next_sign = self.next_look = 0.0  # when the next sign of life and the next look are due

    def count(self) -> tuple[int, int]:
        work = [
            self.source, self.key, self.whole_text, self.target.sql, self.model, self.options.dimensions,
            sorted(map(repr, self.options.option)), self.force,
        ]  # fmt: skip
        self.job = digest_of(repr(work))
        schema = quoted(self.target.schema)
        names = [f"{schema}.{quoted(name)}" for name in self.OWN_TABLES]
        self.passes, self.machines, self.leases = names
        usable = (
            "SELECT bool_and(COALESCE(has_table_privilege(to_regclass(name), 'SELECT, INSERT, UPDATE, DELETE'), "
            "false)) FROM unnest($1::text[]) AS name"
        )
        # In one statement, and so of one moment: what the others do from then on is counted by them.
        # With --force, what exists is what they do in this pass.
        before = "NULL::bigint[]"
        if not self.force and self.value(usable, names):
            job = f"decode('{self.job.hex()}', 'hex')"
            before = f"(SELECT array_agg(ARRAY[m.id, m.generated]) FROM {self.machines} AS m WHERE m.job = {job})"
        tables, exists = self.joined()
        sql = f"SELECT count(*), count(CASE WHEN {exists} THEN 1 END), {before} FROM {tables}"
        total, existing, generated = self.rows(sql)[0]
        self.to_do, self.before = total - existing, dict(generated or [])
        return total, existing

    # Coming and going

    def join(self) -> str:
        try:
            self.alone(self.enter)
        except Forbidden as forbidden:
            return f"this run shares the table with no other, since it has no place to say so: {forbidden.message}"
        return "joined a pass over the table that is under way" if self.late else ""

    def enter(self) -> None:
        """Take part in the pass that is under way, or begin one, as a new machine; within a transaction."""
        import socket

        execute, schema, target = self.execute, self.target.schema, self.target.name
        for name, columns in self.OWN_TABLES.items():
            if not self.is_there(Relation(schema, name, True)):
                execute(f"CREATE TABLE {quoted(schema)}.{name} ({columns})")
        model = self.model + (f"\n{self.digest}" if self.digest else "")  # no name has that in it
        alive = f"EXISTS (SELECT 1 FROM {self.machines} AS m WHERE m.job = p.job AND {self.ALIVE})"
        other = execute(
            f"SELECT p.model FROM {self.passes} AS p WHERE p.target = $1 AND {alive} AND p.model <> $2 AND ("
            "split_part(p.model, chr(10), 1) <> split_part($2, chr(10), 1) OR "
            "(p.model LIKE '%' || chr(10) || '%' AND $2 LIKE '%' || chr(10) || '%'))",
            target, model,
        )  # fmt: skip
        if other:
            theirs, ours = (name.replace("\n", " with the digest ") for name in (other[0][0], model))
            raise Stop(
                f'another run fills "{target}" with vectors of the model {theirs}, which do not compare with '
                f"those of {ours}. Wait for its end, or give --target NAME."
            )
        self.check_version()  # one that has ended since we looked may have filled it
        execute(f"INSERT INTO {self.passes} (job, target, model) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
                self.job, target, model)  # fmt: skip
        left = f"EXISTS (SELECT 1 FROM {self.leases} AS l WHERE l.job = p.job)"
        fresh = execute(
            f"UPDATE {self.passes} AS p SET round = round + 1, reached = NULL, ended = false, model = $2 "
            f"WHERE job = $1 AND (NOT {alive} OR (ended AND NOT {left})) RETURNING 1",
            self.job, model,
        )  # fmt: skip
        if fresh:  # whoever took part is gone: what they left is found anew
            execute(f"DELETE FROM {self.leases} WHERE job = $1", self.job)
        # What machines did may still be counted by one that has just come; not after a day.
        execute(f"DELETE FROM {self.machines} WHERE expires < now() - interval '1 day'")
        execute(f"DELETE FROM {self.passes} AS p WHERE job <> $1 AND NOT EXISTS ("
                f"SELECT 1 FROM {self.machines} AS m WHERE m.job = p.job)", self.job)  # fmt: skip
        sql = f"SELECT round, ended OR reached IS NOT NULL FROM {self.passes} WHERE job = $1"
        self.round, self.late = execute(sql, self.job)[0]
        sql = f"INSERT INTO {self.machines} (job, name, round, expires) VALUES ($1, $2, $3, {self.EXPIRY}) RETURNING id"
        self.machine = execute(sql, self.job, f"{socket.gethostname()}:{os.getpid()}", self.round)[0][0]
        self.generated = self.failed = self.left_out = 0  # of this machine as the others know it
        self.next_sign = time.monotonic() + RENEWAL

    def close(self) -> None:
        # What is not done is given back; what was generated and failed stays for the others to count.
        if self.machine:
            with contextlib.suppress(Stop, self.psycopg.Error):  # else the others wait until LEASE is over
                self.execute(f"WITH {self.sign(', gone = true')} SELECT 1")
        super().close()

    def tend(self) -> None:
        if self.machine and time.monotonic() >= self.next_sign:
            self.renew()

    def sign(self, more: str = "", ending: Sequence[Lease] = ()) -> str:
        """Return the CTEs by which this machine says that it lives and what it has done, and gives back leases.

        Those are the leases `done` and those that come to their end in this very statement. It may be repeated
        where its answer was lost: it has the totals in it, and nothing is noted as given back before it has
        been executed. `more` is what else there is to set.
        """
        failed = self.failed + sum(lease.failed for lease in ending)
        left_out = self.left_out + sum(lease.left_out for lease in ending)
        given = ", ".join(map(str, [*self.done, *(lease.number for lease in ending)]))
        return (
            f"sign AS (UPDATE {self.machines} SET expires = {self.EXPIRY}, round = {self.round}, failed = {failed}, "
            f"left_out = {left_out}{more} WHERE id = {self.machine} RETURNING 1), given AS (DELETE FROM {self.leases} "
            f"WHERE id = ANY(ARRAY[{given}]::bigint[]) AND machine = {self.machine})"
        )

    def renew(self) -> None:
        """Give the others a sign of life and learn what they have done."""
        sql = (
            f"WITH {self.sign()} SELECT m.id, m.generated, m.failed, m.left_out, m.round >= $2, "
            f"EXISTS (SELECT 1 FROM sign), ARRAY(SELECT l.id FROM {self.leases} AS l WHERE l.machine = $3) "
            f"FROM {self.machines} AS m WHERE m.job = $1"
        )
        found = self.rows(sql, self.job, self.round, self.machine)
        self.next_sign, self.done = time.monotonic() + RENEWAL, []
        known = bool(found) and found[0][5]
        # Others have taken over what is not ours any more, since we gave no sign of life for too long.
        ours = set(found[0][6] if known else ())
        self.undecided = {key: lease for key, lease in self.undecided.items() if lease.number in ours}
        if not known:
            self.alone(self.enter)
            return
        generated = failed = 0
        for machine, theirs, fails, skips, in_this_pass, *_ in found:
            if machine == self.machine:
                continue
            if in_this_pass or not self.force:  # then only what was done in this pass counts
                generated += theirs - self.before.get(machine, 0)
            if in_this_pass:
                generated += skips
                failed += fails
        self.others = generated, failed

    def elsewhere(self) -> tuple[int, int]:
        return self.others

    # Taking rows

    def pending(self, after: Any, wanted: Callable[[], int]) -> Iterator[Row | None]:
        if not self.machine:
            yield from super().pending(after, wanted)
            return
        while True:
            while self.ready:
                row = self.ready.pop(0)
                if row.key in self.undecided:  # not lost meanwhile
                    self.handed_out.add(row.key)
                    yield row
            # A table that is slow to look through is looked through less often.
            count = max(wanted(), int(self.rate * max(SHARE, 4 * self.looking)))
            self.tend()
            if time.monotonic() >= self.next_look:  # see what the others have left
                self.ready = self.inherit()
                if not self.ready and self.is_over():
                    self.renew()  # so that the count of what the others have done is the last
                    return
                if not self.ready:
                    self.next_look = time.monotonic() + LOOK
            self.ready = self.ready or self.advance(count)
            if not self.ready and self.next_look:
                yield None

    def inherit(self) -> list[Row]:
        """Return the rows of a lease whose machine gives no sign of life any more."""
        kind = self.key_declared
        sql = (  # or one of ours that we know nothing of, since the connection broke as we took it
            f"UPDATE {self.leases} SET machine = $2 WHERE id = ANY (ARRAY(SELECT l.id FROM {self.leases} AS l "
            f"WHERE l.job = $1 AND l.id <> ALL($3) AND (l.machine = $2 OR NOT EXISTS ("
            f"SELECT 1 FROM {self.machines} AS m WHERE m.id = l.machine AND {self.ALIVE})) "
            f"ORDER BY l.id LIMIT 1 FOR UPDATE SKIP LOCKED)) RETURNING id, above::{kind}, upto::{kind}"
        )
        while True:
            known = [*{*self.done, *(lease.number for lease in self.undecided.values())}]
            found = self.rows(sql, self.job, self.machine, known)
            if not found:
                return []
            lease, above, upto = found[0]
            rows, more = self.page(above, upto)
            while more:
                page, more = self.page(rows[-1].key, upto)
                rows += page
            if rows := self.hold(lease, rows):
                return rows

    def hold(self, number: int, rows: list[Row]) -> list[Row]:
        """Note that a lease is ours, with those of its rows that we have not failed at; return what is to be embedded.

        Not those that were taken from us while they were being embedded, and come back with what another has left.
        """
        rows = [row for row in rows if row.key not in self.hopeless]
        lease = Lease(number, len(rows))
        self.undecided.update((row.key, lease) for row in rows)
        if not rows:
            self.rows(f"DELETE FROM {self.leases} WHERE id = $1", number)
        return [row for row in rows if row.key not in self.handed_out]

    def look(self) -> bool:
        """See how far the pass is; return whether other machines hold leases."""
        sql = (
            f"SELECT p.round, p.reached::{self.key_declared}, p.ended, EXISTS (SELECT 1 FROM {self.leases} AS l "
            f"WHERE l.job = p.job AND l.machine <> $2) FROM {self.passes} AS p WHERE p.job = $1"
        )
        self.round_seen, self.reached, self.ended, others = self.rows(sql, self.job, self.machine)[0]
        self.bound = TO_FIND
        return bool(others)

    def is_over(self) -> bool:
        """Whether nothing is left to take and nothing may come back from another machine."""
        others = self.look()
        again = self.late and not self.force  # whether another pass is needed, or a proof that it is not
        if self.round_seen != self.round:  # ours had its end, and somebody has begun another since
            if again:
                self.begin_again()
            return not again
        if others or not self.ended:
            return False
        if not again:
            return True
        if self.undecided:
            return False  # wait, or ours would be found pending
        self.renew()
        if self.to_do <= sum(self.others) + self.generated + self.failed + self.left_out:
            return True
        # Some rows before the point at which we came have been changed, or are new, since they were passed.
        sql = (
            f"UPDATE {self.passes} SET round = round + 1, reached = NULL, ended = false "
            "WHERE job = $1 AND round = $2 AND ended RETURNING round"
        )
        if self.rows(sql, self.job, self.round):
            self.round_seen += 1
            self.begin_again()
        return False

    def begin_again(self) -> None:
        """Take part in the pass after ours, which looks at what ours had passed when we came."""
        self.round, self.late = self.round_seen, False
        self.renew()
        self.look()

    def advance(self, count: int) -> list[Row]:
        """Take the next pending rows of the pass, none if there are none right now."""
        began = time.monotonic()
        while self.round_seen == self.round and not self.ended and time.monotonic() - began < SHARE:
            started = time.monotonic()
            if self.bound is TO_FIND:
                self.bound = self.key_after(self.reached, self.stretch)
            rows, more = self.page(self.reached, self.bound, min(count, PAGE_ROWS))
            self.looking = time.monotonic() - started
            self.stretch = min(STRETCH, max(STRETCH // 50, int(self.stretch * min(2, 0.1 / (self.looking + 0.001)))))
            ended = not more and self.bound is None
            last = rows[-1].key if rows else self.reached
            upto = last if more or ended else self.bound
            lease = self.move(upto, ended, bool(rows))
            if lease is None:  # somebody else was quicker
                self.look()
            else:
                self.reached, self.ended = upto, ended
                self.bound = self.bound if more else TO_FIND
                if ended:
                    self.next_look = 0.0  # at once: there is nothing but what the others may leave
                if rows and (rows := self.hold(lease, rows)):
                    return rows
        return []

    def move(self, upto: Any, ended: bool, take: bool) -> int | None:
        """Move the pass from `reached` to `upto`; return the lease of what is between, 0 if none, None if it failed."""
        kind = self.key_declared
        sql = (
            f"WITH moved AS (UPDATE {self.passes} SET reached = $3::{kind}::text, ended = $4 "
            f"WHERE job = $1 AND round = $6 AND NOT ended AND reached IS NOT DISTINCT FROM $2::{kind}::text "
            f"RETURNING 1), taken AS (INSERT INTO {self.leases} (job, machine, above, upto) "
            f"SELECT $1, $5, $2::{kind}::text, $3::{kind}::text FROM moved WHERE $7 RETURNING id) "
            "SELECT COALESCE((SELECT id FROM taken), 0) FROM moved"
        )
        found = self.rows(sql, self.job, self.reached, upto, ended, self.machine, self.round, take)
        return int(found[0][0]) if found else None

    # Giving them back

    def decided(self, row: Row, failed: bool = False, left_out: bool = False) -> None:
        """Note that one of our rows is saved, has failed, or is left out."""
        self.handed_out.discard(row.key)
        if lease := self.undecided.pop(row.key, None):
            lease.rows -= 1
            lease.failed += failed
            lease.left_out += left_out
            if not lease.rows:
                self.failed += lease.failed
                self.left_out += lease.left_out
                self.done.append(lease.number)

    def give_up(self, row: Row, failed: bool = True) -> None:
        if self.late:
            self.hopeless.add(row.key)
        self.decided(row, failed, not failed)

    def save(self, vectors: list[tuple[Row, bytes]], more: str = "") -> int:
        # A lease is given back, and a row counted, in the moment in which it is saved.
        now = time.monotonic()
        self.rate, self.last_save = len(vectors) / max(now - self.last_save, 0.1), now
        saved = Counter(self.undecided[row.key] for row, _ in vectors if row.key in self.undecided)
        ending = [lease for lease, count in saved.items() if count == lease.rows]
        if self.machine:
            more = ", " + self.sign(f", generated = {self.generated} + (SELECT count(*) FROM saved)", ending)
        count = super().save(vectors, more)
        self.generated += count
        for row, _ in vectors:
            self.decided(row)
        self.done = []  # given back
        return count


def open_store(options: argparse.Namespace) -> Store:
    """Return the store for --database."""
    url = options.database
    if re.match(r"sqlite:///.", url) or (not re.match(r"\w{2,}:", url) and url.lower().endswith(SQLITE_ENDINGS)):
        return SQLiteStore(options)
    if re.match(r"postgres(ql)?://", url):
        return PostgresStore(options) if options.reads_only else Fleet(options)
    raise UsageError(
        f"--database {hide_password(url)} is not a database's address. Give sqlite:///relative.db, "
        f"sqlite:////absolute.db, a path ending in {', '.join(SQLITE_ENDINGS)}, or postgresql://..."
    )


# =============================== progress and report ===============================


ELSEWHERE = "failed on another machine, whose log has the reason"


class Counts:
    """What has become of the rows; generated + skipped + failed is the total at the end."""

    def __init__(self, rows: int, existing: int, limit: int | None) -> None:
        self.existing, self.others, self.too_long = existing, 0, 0  # skipped: others have generated some meanwhile
        self.to_do, self.limit = rows - existing, limit
        self.generated = self.failed = 0
        self.cut = 0  # of those generated
        self.reasons: Counter[str] = Counter()

    @property
    def skipped(self) -> int:
        """Rows that this run has nothing to do with."""
        return self.existing + self.others + self.too_long

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

    def elsewhere(self, generated: int, failed: int) -> None:
        """Take in how many rows other machines have generated, which exist for this one, and how many failed there."""
        self.failed += failed - self.reasons.pop(ELSEWHERE, 0)
        if failed:
            self.reasons[ELSEWHERE] = failed
        # One that was taken for dead may have generated the same rows as another.
        generated = min(generated, max(self.others + self.left, 0))
        self.to_do -= generated - self.others
        self.others = generated

    def leave_out(self) -> None:
        """Count a row whose text is too long, and which is skipped for it."""
        self.too_long += 1
        self.to_do -= 1

    def fail(self, reason: str) -> None:
        """Count a failed row."""
        self.failed += 1
        self.reasons[reason] += 1


RULE = "=" * 60
PIPE_BAR = 8  # cells of the bar where there is no terminal to fit it to
REDRAW, PIPE_INTERVAL = 0.1, 30.0  # seconds between two progress lines, on a terminal and elsewhere
EIGHTHS = " ▏▎▍▌▋▊▉█"
# For terminals that cannot show them; all else that they cannot show becomes a question mark.
LEGIBLE = {"✓": "+", "⊘": "-", "✗": "x", "✂": "<", "…": ".", "·": "-", **dict.fromkeys(EIGHTHS[1:], "#")}


def bar(share: float, cells: int) -> str:
    """Return a bar of that many cells, filled to the share, in steps of an eighth of a cell."""
    full, eighth = divmod(int(share * cells * 8), 8)
    return ("█" * full + (EIGHTHS[eighth] if full < cells else "")).ljust(cells)[:cells]


def percent_of(share: float) -> int:
    """Return a share in whole per cent, rounded down: 29 of 100 are 29, though 0.29 * 100 is less."""
    return int(share * 100 + 1e-9)


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
    worked = counts.done - counts.existing
    share = counts.done / counts.total if counts.total else 1.0
    left = counts.total - counts.done
    eta = clock(elapsed / worked * left) if worked else "?" if left else "00:00"
    tally = f"✓={counts.generated}, ⊘={counts.skipped}, ✗={counts.failed}"
    figures = f"{counts.done}/{counts.total} [{clock(elapsed)}<{eta}, {tally}]"
    percent = f"{percent_of(share)}%"
    head = f"Generating embeddings: {percent:>4}"
    if columns is None:
        return f"{head}|{bar(share, PIPE_BAR)}| {figures}"
    room = max(columns - 3, 1)  # a terminal's own ^C, of two cells, must not make the line wrap
    for before in (head, percent):
        cells = room - len(f"{before}|| {figures}")
        if cells >= 4:
            return f"{before}|{bar(share, cells)}| {figures}"
    for line in (f"{percent} {figures}", f"{counts.done}/{counts.total} {tally}", tally):
        if len(line) <= room:
            return line
    return percent[:room]


class Console:
    """Standard output: survives encodings, closed pipes and full devices."""

    def __init__(self, out: TextIO | None, interrupt: Interrupt) -> None:
        self.out, self.interrupt = out, interrupt
        self.is_lost = False  # whether something could not be written
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
        if self.out is None or not self.is_terminal:
            return None
        with contextlib.suppress(OSError):
            return os.get_terminal_size(self.out.fileno()).columns or 80
        return 80

    def write(self, text: str) -> None:
        """Write at once, or lose it: what happens to the output must not touch the work, except that a
        reader who has gone away wants no more of it."""
        if self.out is None:
            return
        try:
            self.out.write(text)
            self.out.flush()
        except (OSError, ValueError) as error:
            out, self.out = self.out, None
            with contextlib.suppress(OSError, ValueError):  # or it was no file to begin with
                # Where Python's own flush at the exit goes, too.
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, out.fileno())
                os.close(nowhere)
            if isinstance(error, BrokenPipeError):
                self.interrupt.code = self.interrupt.code or EXIT_SIGPIPE
            else:
                self.is_lost = True
                complain(f"warning: cannot write to standard output ({describe(error)}); going on without it")

    def lines(self, *texts: str) -> None:
        """Print lines, below the one that was being redrawn, which stays as it is."""
        if self.drawn:
            self.drawn = 0
            self.write("\n")
        for text in texts:
            self.write(text + "\n")

    def json(self, value: dict[str, Any]) -> None:
        """Print one JSON object; what JSON does not know is given as text."""
        import json

        text = json.dumps(value, default=str)
        # Python's NaN and Infinity are no JSON.
        self.lines(json.dumps(json.loads(text, parse_constant=lambda name: str(float(name)))))

    def erase(self) -> None:
        """Take back the line that was being redrawn, and the ^C that a terminal puts behind it."""
        self.write("\r" + " " * (self.drawn + 2) + "\r")
        self.drawn = 0

    def redraw(self, text: str) -> None:
        """Put the text in place of the last one; below it, where there is no terminal."""
        if not self.is_terminal:
            self.lines(text)
            return
        width = width_of(text)
        self.write("\r" + text + " " * (self.drawn - width))
        self.drawn = width


def complain(text: str) -> None:
    """Write one line to standard error, if there is one."""
    with contextlib.suppress(OSError, ValueError):  # there is nowhere left to say it
        if sys.stderr is not None:
            print(text.encode("utf-8", "replace").decode("utf-8"), file=sys.stderr, flush=True)


class Report:
    """What is printed: a run's head, progress and summary, what an action has found, or one JSON object."""

    def __init__(self, console: Console, options: argparse.Namespace, log: Log) -> None:
        self.console, self.options, self.log = console, options, log
        self.talkative = not (options.quiet or options.json)
        self.started = time.monotonic()
        self.stopping = False  # whether it was said that the run is to stop
        self.ended = 0.0  # when the last row was done

    def name_rows(self, table: str) -> None:
        """Take what a row is called, also in headings, from --noun or the table's name."""
        table = one_line(table).replace("_", " ").strip()
        noun = one_line(self.options.noun or "") or singular(table)
        self.noun, self.nouns = noun.lower(), (plural(noun) if self.options.noun else table).lower()
        self.title = " ".join(word[:1].upper() + word[1:] for word in noun.split()) + " Embedding"

    def give(self, facts: dict[str, Any], lines: Iterable[str]) -> None:
        """Print the facts as one JSON object if that is wanted, and else the lines, without those that are empty."""
        if self.options.json:
            self.console.json(facts)
        else:
            self.console.lines(*filter(None, lines))

    def start(self, counts: Counts) -> None:
        """Print what is going to be done."""
        self.worked_from = self.shown = time.monotonic()
        if self.talkative:
            self.console.lines(
                RULE,
                f"🧠 {self.title} Generator",
                RULE,
                f"📊 Total {self.nouns} to process: {counts.total}",
                f"⚡ Workers/Concurrent: {self.options.concurrent or 'auto'}",
                f"🔄 Skip existing: {'No' if self.options.force else 'Yes'}",
                f"📝 Detailed logs: {self.log.shown}",
                "",
            )

    def update(self, counts: Counts) -> None:
        """Show the progress, if it is time to."""
        if not self.talkative:
            return
        now, in_place = time.monotonic(), self.console.is_terminal
        if in_place and self.console.interrupt.code and not self.stopping:
            self.stopping = True
            self.console.erase()
            self.console.lines(f"Stopping within {GRACE:.0f} s. Ctrl-C again ends at once.")
        if now - self.shown >= (REDRAW if in_place else PIPE_INTERVAL):
            self.show(counts, now)

    def show(self, counts: Counts, now: float) -> None:
        """Show the progress."""
        self.shown = now
        self.console.redraw(progress_line(counts, now - self.worked_from, self.console.columns))

    def end(self, counts: Counts) -> None:
        """Show that the last row is done, once."""
        if not self.ended:
            self.ended = time.monotonic()
            if self.talkative:
                self.show(counts, self.ended)
                self.console.lines("", "💾 Saving embeddings to database...")

    def show_index(self, share: float) -> None:
        """Show how far the index is; where there is no terminal, only that it is done."""
        if self.talkative and (self.console.is_terminal or share == 1):
            self.console.redraw(f"🔎 Building the index: {percent_of(share):3}%|{bar(share, PIPE_BAR)}|")

    def finish(self, counts: Counts, code: int, error: str = "") -> None:
        """Print what was done, or how far it came."""
        self.end(counts)
        # Rounded first, so that the speed is what a reader gets from the figures printed.
        elapsed = round(self.ended - self.started, 2) or self.ended - self.started
        speed = counts.generated / elapsed if elapsed else 0.0
        facts: dict[str, Any] = {
            "total": counts.done, "generated": counts.generated, "skipped": counts.skipped, "failed": counts.failed,
            "left": counts.left, "cut": counts.cut, "too_long": counts.too_long, "seconds": round(elapsed, 2),
            "rate": round(speed, 2), "exit_code": code, "failures": counts.reasons, "model": self.options.model,
            "log": self.log.shown,
        }  # fmt: skip
        if error:
            facts["error"] = error
        complete = code in (EXIT_DONE, EXIT_FAILED_ROWS)
        lines = [
            RULE,
            f"✅ {self.title} Generator Completed" if complete else f"⏹️  {self.title} Generator Stopped",
            RULE,
            f"📊 Total {self.nouns} processed: {counts.done}",
            f"   ✓  Successfully generated: {counts.generated}",
            f"   ✂  Cut to the model's context: {counts.cut}" if counts.cut else "",
            f"   ⊘  Skipped (already exist): {counts.skipped}",
            f"   ✂  Skipped for their length: {counts.too_long}" if counts.too_long else "",
            f"   ✗  Failed: {counts.failed}",
            "" if complete else f"   …  Left for the next run: {counts.left}",
            f"⏱️  Time elapsed: {elapsed:.2f} seconds",
            f"⚡ Average speed: {speed:.2f} embeddings/second",
            RULE,
        ]
        if self.talkative:
            self.console.lines("")
        elif self.options.quiet and counts.failed:  # nobody has watched: this is all that a mail from cron will say
            lines += [f"{times} failed: {one_line(reason)}" for reason, times in counts.reasons.most_common(5)]
            lines.append(f"Each {self.noun}'s reason is in the log: {self.log.shown}")
        self.give(facts, [] if self.options.quiet and code == EXIT_DONE else lines)


LOG_BYTES, LOG_FILES = 10_000_000, 3  # a log is put aside at this size, and so many old ones are kept
WARNINGS_OF_A_KIND = 20  # warnings with one reason; further ones are info, and summed up at the end


class Log:
    """The log of a run: a file, rotated by size; none before it is begun, and where it cannot be written.

    Its lines are as those of `logging`, without the 15 ms that the import of that and of its handlers takes.
    """

    path = shown = ""  # shown: as it may be printed; "" before it is begun
    verbose = False
    file: Any = None

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def begin(self, options: argparse.Namespace) -> None:
        """Begin to write, into the file that the engine has."""
        folder = options.log_dir or os.path.join(os.path.dirname(os.path.abspath(__file__)), "logs")
        self.path, self.verbose = os.path.join(folder, ENGINES[options.engine].log_name), options.verbose
        self.shown = whole = os.path.realpath(self.path)
        with contextlib.suppress(OSError):  # the current folder may be gone
            here = os.path.join(os.path.realpath(os.curdir), "")
            if os.path.dirname(here[:-1]):  # relative where that is short and clear: from the root, everything would be
                self.shown = whole.removeprefix(here)
        try:
            os.makedirs(folder, exist_ok=True)
            self.open()
        except OSError as error:
            complain(
                f"warning: cannot write the log {whole} ({describe(error)}); going on without it. Give --log-dir DIR."
            )
            self.shown = "none"

    def open(self) -> None:
        """Open the file; each line goes there in one piece, between those of another run."""
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def write(self, level: str, text: str, after: str = "") -> None:
        """Write one line, and what belongs after it; go on without the log when it cannot be written any more."""
        if not self.file:
            return
        now = time.time()
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)) + f",{int(now % 1 * 1000):03}"
        # Only the main process writes the log.
        line = f"{moment} - MainProcess - {level} - {one_line(text)}\n{after}".encode("utf-8", "backslashreplace")
        try:
            if os.fstat(self.file.fileno()).st_size + len(line) > LOG_BYTES and os.path.isfile(self.path):
                self.rotate()
            self.file.write(line)
        except OSError as error:
            self.close()
            complain(f"warning: cannot write the log {self.shown} ({error}); going on without it")

    def rotate(self) -> None:
        """Put the file aside, as .1, and those put aside before as .2 and so on."""
        self.file.close()
        for number in range(LOG_FILES - 1, 0, -1):
            if os.path.exists(f"{self.path}.{number}"):
                os.replace(f"{self.path}.{number}", f"{self.path}.{number + 1}")
        os.replace(self.path, f"{self.path}.1")
        self.open()

    def info(self, text: str) -> None:
        """Log what happened."""
        self.write("INFO", text)

    def debug(self, text: str) -> None:
        """Log what only --verbose wants."""
        if self.verbose:
            self.write("DEBUG", text)

    def warn(self, text: str, reason: str) -> None:
        """Log what went wrong; as a warning only the first few times for one reason."""
        self.seen[reason] += 1
        self.write("WARNING" if self.seen[reason] <= WARNINGS_OF_A_KIND else "INFO", text)

    def sum_up(self) -> None:
        """Log how often each reason came up beyond the warnings written."""
        for reason, times in self.seen.items():
            if times > WARNINGS_OF_A_KIND:
                self.write("WARNING", f"{times} times in all: {reason}")

    def close(self) -> None:
        """Close the file."""
        file, self.file = self.file, None
        if file:
            file.close()


def one_line(text: str) -> str:
    """Return a text without line breaks and control characters: one event, one line."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


# =============================== search and status ===============================
# What looks at the table and writes nothing; and --prune, which only takes away.

PIPE_WIDTH = 200  # cells of a result's line where there is no terminal to fit it to
KEY_WIDTH = 40  # cells of a key, at most
TIMED_TEXTS = 8  # embedded by --dry-run to see how long it takes


class Hit(NamedTuple):
    """A row that was found: its cosine similarity, its key, and its columns by name."""

    similarity: float
    key: Any
    columns: dict[str, Any]


def embed_here(wire: Wire, texts: list[str], stopping: Callable[[], bool]) -> Answers:
    """Return a server's answers for a few texts, or raise Stop; without an engine, which takes longer to start."""
    with contextlib.closing(BlockingTransport(wire.server, stopping)) as transport:
        run_now(transport.hold(wire.greet()))
        return run_now(transport.hold(wire.converse(texts, movable=False)))


def embed_query(wires: Sequence[Wire], text: str, store: Store) -> bytes:
    """Return the vector of a text, from the first server that is there; raise Stop if it cannot compare."""
    for wire in wires:
        try:
            [answer] = embed_here(wire, [text], store.stopping)
            break
        except Away:
            if wire is wires[-1]:
                raise
    if isinstance(answer, str):
        raise Stop(f"{wire.address} does not embed the text that is searched for: {answer}.")
    store.check_query(len(answer) // 4, wire.digest)
    return answer


def hits_of(store: Store, vector: bytes, model: str, but: Any = None) -> list[Hit]:
    """Return the rows nearest to a vector, the nearest first, those equally near by key; without that of the key `but`.

    The database's own order is good to five digits, and an index's only nearly complete: somewhat more than
    are wanted are taken from it, and put in order here. The last digits differ between multiples of one vector.
    """
    top: int = store.options.top
    near = [(cosine(vector, other), key) for key, other in store.nearest(vector, model, 2 * top + 20) if key != but]
    near = [one for one in near if one[0] == one[0]]
    near = sorted(near, key=lambda one: (-round(one[0], 12), place_of(one[1])))[:top]
    columns = store.columns_of([key for _, key in near])
    return [Hit(similarity, key, columns[key]) for similarity, key in near if key in columns]


def search(store: Store, wires: Sequence[Wire], report: Report) -> int:
    """List the rows nearest to a text."""
    text, model = report.options.search, report.options.model
    store.check_searchable(model)
    show_hits(store, report, {"query": text}, f'"{text}"', embed_query(wires, text, store), model)
    return EXIT_DONE


def similar(store: Store, wires: Sequence[Wire], report: Report) -> int:
    """List the rows nearest to one of them, by the vector that it has already."""
    key, vector, model = store.row_named(report.options.similar)
    row = f"{report.noun} {report.options.similar}"
    if vector is None:
        raise Stop(f"the {row} has no embedding yet. Run embedgen without --similar first.")
    if not cosine(vector, vector) > 0:  # NaN is not
        raise Stop(
            f"the {row} has a vector without a direction (all zeros, or NaN or infinity in it), and nothing is near to "
            "that. Run embedgen with --force, which replaces it."
        )
    speak_of(model, store)
    show_hits(store, report, {"similar_to": key}, row, vector, model, but=key)
    return EXIT_DONE


def show_hits(
    store: Store, report: Report, asked: dict[str, Any], what: str, vector: bytes, model: str, but: Any = None
) -> None:
    """Print the rows nearest to a vector, that of `what` was asked for; on standard error what was not searched."""
    hits = hits_of(store, vector, model, but)
    results = [
        {"rank": rank, "similarity": round(hit.similarity, 6), "key": hit.key, "columns": hit.columns}
        for rank, hit in enumerate(hits, 1)
    ]
    cells = report.console.columns or PIPE_WIDTH
    nouns, quiet = report.nouns, report.options.quiet
    head = f"🔎 {nouns[:1].upper()}{nouns[1:]} nearest to {what}, by {model or 'an unknown model'}"
    head = "" if quiet else fitted(head, cells)
    lines = [head, *lines_of(hits, cells)] if hits else [f"No {nouns} to compare with were found."]
    report.give({**asked, "model": model or None, "results": results}, lines)
    if not quiet:
        note_unsearched(store, report, store.comparable(len(vector) // 4, model))


def note_unsearched(store: Store, report: Report, comparable: str) -> None:
    """Say on standard error which rows were not searched, or by an older text; those that are `comparable` were."""
    total, stored, found, fresh = store.tally(comparable)
    words: list[str] = []
    for count, what in (
        (total - stored, "not searched: no embedding yet"),
        (stored - found, "not searched: what is stored cannot be compared"),
        (found - fresh, "found by an older text"),
    ):
        if count:
            whose = "" if words else f" {report.nouns}"
            words.append(f"{count} of {total}{whose} {'is' if count == 1 else 'are'} {what}")
    if words:
        cure = f" Run embedgen without --{report.options.action} to embed them."
        complain(f"note: {'; '.join(words)}.{cure if total - stored or found - fresh else ''}")


def lines_of(hits: list[Hit], cells: int) -> list[str]:
    """Return a line of so many cells for each row that was found: rank, similarity, key, and its columns."""
    keys = [fitted(str(hit.key), KEY_WIDTH) for hit in hits]
    room, places = max(map(width_of, keys), default=0), len(str(len(hits)))
    lines = []
    for rank, (hit, key) in enumerate(zip(hits, keys), 1):
        gap = " " * (room - width_of(key))
        key = key + gap if isinstance(hit.key, str) else gap + key
        values = [str(value).strip(BLANKS) for value in hit.columns.values() if value is not None]
        text = " | ".join(value for value in values if value)
        lines.append(fitted(f"{rank:{places}}  {hit.similarity:.4f}  {key}  {text}", cells).rstrip())
    return lines


def fitted(text: str, cells: int) -> str:
    """Return a text on one line, cut to so many cells of a terminal."""
    text = one_line(text[: 4 * cells])
    if width_of(text) <= cells:
        return text
    text = text[:cells]
    while width_of(text) >= cells:
        text = text[:-1]
    return text + "…"


def speak_of(model: str, store: Store) -> None:
    """Take a model that vectors are of, if it is known, for the one that a run would use."""
    if model:
        apply_card(store.options, model)
        store.model, store.prefix = store.options.model, store.options.document_prefix


def status(store: Store, wires: Sequence[Wire], report: Report) -> int:
    """Say what is embedded, by which model, and what is left to be done."""
    options, origins = report.options, store.origins()
    models = {model for model, *_ in origins}
    if len(models) == 1 and not options.model_is_named:
        speak_of(max(models), store)
    total, _, found, fresh = store.tally(store.has_vector)
    unknown = found and not any(models) and not options.model_is_named
    facts = {
        "table": options.table, "target": store.target.name, "rows": total, "embedded": fresh,
        "missing": total - found, "stale": found - fresh, "orphaned": store.orphans()[1],
        **{fit: sum(count for *_, of, count in origins if of == fit) for fit in ("cut", "split")},
        "model": None if unknown else options.model, "prefix": options.document_prefix,
        "dimensions": store.common_dimensions,
        "updated": moment(store.updated_at()),
        "models": [
            {"model": model or None, "digest": digest, "prefix": prefix, "fit": fit, "rows": count}
            for model, digest, prefix, fit, count in origins
        ],
    }  # fmt: skip
    report.give(facts, status_lines(facts, report, store.shown))
    return EXIT_DONE


def status_lines(facts: dict[str, Any], report: Report, database: str) -> list[str]:
    """Return what --status prints."""
    total, done = facts["rows"], facts["embedded"]
    share = done / total if total else 1.0
    lines = [RULE, one_line(f"🧠 {report.title}s in {database}"), RULE]
    lines.append(f"📊 {percent_of(share)}%|{bar(share, 24)}| {done:,} of {total:,} {report.nouns}")
    figures = {
        "Embedded": ("✓", ""),
        "Missing": ("…", ""),
        "Stale": ("↻", "embedded from another text, prefix or model"),
        "Orphaned": ("∅", f"without a row in {facts['table']}; see --prune"),
        "Cut": ("✂", ""),
        "Split": ("÷", ""),
    }
    width = max(len(f"{facts[name.lower()]:,}") for name in figures)
    for name, (mark, hint) in figures.items():
        count = facts[name.lower()]
        if count or name in ("Embedded", "Missing", "Stale"):
            why = f"   ({hint})" if count and hint else ""
            lines.append(f"   {mark}  {name + ':':<10}{count:>{width},}{why}")
    made: Counter[tuple[str, str, str]] = Counter()
    for one in facts["models"]:
        made[one["model"], one["digest"].rpartition(":")[2][:12], one["prefix"]] += one["rows"]
    dimensions = f", {facts['dimensions']} dimensions" if facts["dimensions"] else ""
    for (model, digest, prefix), count in list(made.items())[:3]:
        words = f"🧩 Model: {model or 'unknown'}{f' ({digest})' if digest else ''}{dimensions}"
        words += f', prefix "{prefix}"' if prefix else ""
        lines.append(one_line(words + (f": {count:,}" if len(made) > 1 else "")))
    if facts["updated"]:
        lines.append(f"🕑 Last updated: {facts['updated']}")
    return [*lines, RULE]


def moment(value: Any) -> str | None:
    """Return a stored time as text, in UTC where its zone is known."""
    from datetime import datetime, timezone

    if isinstance(value, datetime) and value.tzinfo:
        return f"{value.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
    return None if value is None else str(value)


def rehearse(store: Store, wires: Sequence[Wire], report: Report) -> int:
    """Say what a run would do, and how long it may take by a few texts measured; write nothing."""
    counts = Counts(*store.count(), report.options.limit)
    rows, to_do = counts.skipped + counts.to_do, counts.total - counts.done
    left = counts.to_do - to_do
    speed = measured_speed(wires, store) if to_do else 0.0
    meet(store, wires)
    lasting = to_do / speed if speed else 0.0
    facts = {
        "rows": rows, "would_generate": to_do, "would_skip": counts.skipped, "left": left,
        "seconds": round(lasting, 1) if speed else None, "rate": round(speed, 2) if speed else None,
        "model": report.options.model,
    }  # fmt: skip
    time_left = f"{clock(max(round(lasting), 1))}, at {speed:.1f} embeddings/second as just measured"
    lines = [
        RULE,
        f"🧠 {report.title} Generator: what it would do",
        RULE,
        f"📊 Total {report.nouns}: {rows}",
        f"   ✓  Would be generated: {to_do}",
        f"   ⊘  Would be skipped (already exist): {counts.skipped}",
        f"   …  Would be left by --limit: {left}" if left else "",
        f"⏱️  Estimated time: {time_left}" if speed else "",
        "Nothing was written.",
        RULE,
    ]
    report.give(facts, lines)
    return EXIT_DONE


def measured_speed(wires: Sequence[Wire], store: Store) -> float:
    """Return the embeddings per second that the servers may give, by a few texts of the table; 0 if none has a text."""
    import itertools

    rows = itertools.islice(store.pending(None, lambda: TIMED_TEXTS), PAGE_ROWS)
    texts = [row.text for row in rows if row and row.text.strip(BLANKS)][: TIMED_TEXTS + 1]
    if stored := store.stored_dimensions():
        wires[0].settle(stored)
    speed, timed = 0.0, texts[1:] or texts
    for wire in wires if texts else []:
        try:
            embed_here(wire, texts[:1], store.stopping)  # which may have to load the model first
            began = time.monotonic()
            embed_here(wire, timed, store.stopping)
            speed += len(timed) / max(time.monotonic() - began, 1e-6)
        except Away:
            if wire is wires[-1] and not speed:
                raise
    return speed


def prune(store: Store, wires: Sequence[Wire], report: Report) -> int:
    """Remove the embeddings whose row is gone."""
    if not store.has_target:
        raise UsageError(f'there is nothing to prune: no table "{store.target.name}". Give --target NAME.')
    store.check_belonging()
    options, (total, gone) = report.options, store.orphans()
    refused = UsageError(
        f'none of the {total} embeddings in "{store.target.name}" belongs to a row of "{store.relation.name}", so that '
        "all would be removed. Give another --table or --target; or --force, if that is meant."
    )
    if gone and gone == total and not options.force:
        raise refused
    if not options.dry_run and gone:
        gone = store.prune()
        if not gone and store.orphans()[1]:
            raise refused  # somebody else was at work meanwhile
    report.log.info(f"pruned {store.shown}, {store.target.name}: {gone} of {total} embeddings removed")
    did, what = ("would_remove", "Would remove") if options.dry_run else ("removed", "Removed")
    why = f"whose {report.nouns} are gone" if gone else f"since all their {report.nouns} are there"
    line = f"🧹 {what} {gone} of {total} embeddings, {why}."
    facts = {did: gone, "left": total - gone, "dry_run": options.dry_run}
    report.give(facts, [line] if gone or not options.quiet else [])
    return EXIT_DONE


# =============================== the run ===============================

MOST_CHARACTERS = 1_000_000  # of one request's texts together; one text alone may be longer
# Finished work is saved when there is so much of it, or it is so old. Twice as many rows would take 2 MiB more, and
# save a twentieth of the time where the server answers at once.
UNSAVED_ROWS, UNSAVED_SECONDS = 500, 1.0


class Run:
    """One run over the table: the loop that both engines and all stores share."""

    def __init__(self, store: Store, engine: Engine, counts: Counts, report: Report) -> None:
        self.store, self.engine, self.counts, self.report, self.log = store, engine, counts, report, report.log
        self.unsaved: list[tuple[Row, bytes]] = []
        self.oldest = 0.0  # when the first of them came
        self.handed_out = 0  # rows given to the engine, less those that failed: what may yet count for the limit
        self.last_key: Any = None
        self.more = True  # whether the table may hold rows that were not looked at
        self.ways: set[str] = set()  # in which vectors came, as logged

    def work(self) -> None:
        """Embed what is pending. Whatever ends it, but for a second signal, what was finished is saved."""
        try:
            self.rounds()
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):  # at once, then: saving could mean to wait for a lock
                self.save()
            raise
        self.save()
        self.counts.elsewhere(*self.store.elsewhere())
        if not self.more and not self.engine.interrupt.code:
            self.counts.to_do = self.counts.generated + self.counts.failed  # others were deleted before they were read
            self.store.end_change()

    def rounds(self) -> None:
        """Embed what is pending, in a second round only where rows of the first have failed and left room."""
        began = time.monotonic()
        try:
            while self.more and self.room():
                for event in self.engine.run(self.batches(), self.left):
                    if isinstance(event, Result):
                        self.take(event)
                    elif isinstance(event, Heard):
                        self.note(*event)
                    self.save_if_due()
                    self.store.tend()
                    self.counts.elsewhere(*self.store.elsewhere())
                    self.report.update(self.counts)
                if self.engine.interrupt.code:
                    return
                self.save()  # what is dropped here leaves room in the limit
        finally:
            now = time.monotonic()
            for line in self.engine.servers.shares(now - began, now):
                self.log.info(line)

    def room(self) -> int:
        """Return how many more rows may be handed out."""
        return sys.maxsize if self.counts.limit is None else self.counts.limit - self.handed_out

    def left(self) -> int:
        """Return how many rows no server has been given yet, as far as is known."""
        return min(self.room(), self.counts.left - len(self.unsaved)) - self.engine.servers.texts

    def batches(self) -> Iterator[list[Row]]:
        """Yield batches of pending rows, each as large as the engine wants it when it is taken."""
        batch: list[Row] = []
        size = 0
        for row in self.store.pending(self.last_key, lambda: self.engine.batch_size):
            if row is None:  # nothing right now: what there is need not wait for more
                yield batch
                batch, size = [], 0
                continue
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
            if len(batch) >= self.engine.batch_size or not self.room():
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
                if isinstance(answer, Fitted):
                    self.log.warn(f"{self.name(row)} is longer than the model takes: {answer.fit}", answer.fit)
                continue
            self.handed_out -= 1
            if isinstance(answer, TooLongFor):
                self.counts.leave_out()
                self.store.give_up(row, failed=False)
                self.log.warn(f"{self.name(row)} is longer than the model takes: skipped ({answer})", "skipped")
            else:
                self.fail(row, answer)

    def name(self, row: Row) -> str:
        """Return what a row is called in the log."""
        return f"{self.report.noun} {repr(row.key) if isinstance(row.key, (str, bytes)) else row.key}"

    def fail(self, row: Row, reason: str) -> None:
        """Count and log a row that gets no embedding."""
        self.counts.fail(reason)
        self.store.give_up(row)
        self.log.warn(f"{self.name(row)} failed: {reason}", reason)

    def note(self, lane: Lane, what: Exchange | str) -> None:
        """Log one request, or news about a server."""
        if isinstance(what, str):
            self.log.warn(what, f"{lane.wire.address} came or went")
            return
        at = "" if self.engine.servers.alone else f"{lane.wire.address}: "
        if what.outcome == "ok":
            self.log.debug(f"{at}{what.texts} texts in {what.seconds:.2f} s")
            way = f"{at}vectors come as {what.way}"
            if way not in self.ways:
                self.ways.add(way)
                self.log.info(way)
        else:
            texts = f"with {what.texts} texts" if what.texts else "with the known-good text"
            text = f"{at}a request {texts} gave no embeddings after {what.seconds:.2f} s"
            self.log.warn(f"{text}: {what.reason}", f"a request gave no embeddings: {what.reason}")
        if lane.pace.reason != lane.logged:
            lane.logged = lane.pace.reason
            self.log.info(f"{at}{lane.pace}")

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
            self.counts.cut += min(saved, sum(isinstance(vector, Cut) for _, vector in vectors))
            dropped = len(vectors) - saved  # rows that were deleted meanwhile
            self.counts.to_do -= dropped
            self.handed_out -= dropped


def generate(store: Store, wires: Sequence[Wire], report: Report) -> int:
    """Do the main job and return the exit code."""
    options, log, interrupt = report.options, report.log, report.console.interrupt
    counts = Counts(*store.count(), options.limit)
    log.info(
        f"{options.engine} engine, {store.shown}, table {options.table}, model {options.model} "
        f"at {', '.join(wire.address for wire in wires)}: {counts.total} rows, {counts.skipped} with their embedding"
    )
    log.info(f"text: {options.document_prefix}{store.how}")
    if not store.referable:
        log.info(f'the key "{store.key}" is not declared unique; without an index behind it, reading by pages is slow')
    if counts.total > counts.done:
        embed(store, wires, report, counts)
    else:
        report.start(counts)
    if options.index and not interrupt.code:
        report.end(counts)
        interrupt.gentle = True
        for share in store.build_index():
            report.show_index(share)
    code = interrupt.code or (EXIT_FAILED_ROWS if counts.failed else EXIT_DONE)
    report.finish(counts, code)
    store.note(complete=not (counts.left or counts.failed or counts.too_long))
    log.sum_up()
    log.info(f"{counts.generated} generated, {counts.skipped} skipped, {counts.failed} failed; exit code {code}")
    return code


def embed(store: Store, wires: Sequence[Wire], report: Report, counts: Counts) -> None:
    """Start an engine and let it work on what is pending; a Stop leaves with the summary printed."""
    options, log, interrupt = report.options, report.log, report.console.interrupt
    if stored := store.stored_dimensions():
        wires[0].settle(stored)
    servers = servers_for(options, wires)
    engine = ENGINES[options.engine](servers, interrupt)
    try:
        engine.greet()
        meet(store, wires)
        store.create_target(engine.dimensions)
        if not options.accept_drift:
            check_drift(engine, store.samples())
        present = servers.present
        for lane in servers.lanes:
            if lane.trouble:
                log.warn(text := f"{lane.wire.address} is away ({lane.trouble}); the other servers do its work", text)
                complain(f"warning: {text}")
        if remark := store.join():
            log.info(remark)
        report.start(counts)
        interrupt.gentle = True
        Run(store, engine, counts, report).work()
        for lane in present:  # who came back is in the log; who did not may wait to be seen to
            if lane.trouble and not interrupt.code:
                complain(f"warning: {lane.wire.address} did not do its share to the end: {lane.trouble}")
    except Stop as stop:
        if not interrupt.gentle:  # the run has not begun
            raise
        message = f"{stop.message} What was generated is saved; {counts.left} {report.nouns} are left."
        code = interrupt.code or stop.code
        report.finish(counts, code, message)
        reported = Reported(message)
        reported.code = code
        raise reported from stop
    finally:
        engine.close()


def meet(store: Store, wires: Sequence[Wire]) -> None:
    """Tell the store which version of the model the servers have; raise Stop if another made what would stay."""
    store.digest = next((wire.digest for wire in wires if wire.digest), "")
    store.check_version()


def check_drift(engine: Engine, samples: list[tuple[str, bytes]]) -> None:
    """Raise Stop if a server's vectors differ from those that are stored for the same texts, or from each other's.

    Where there are several servers, and not all tell the model's digest, its name alone proves nothing: they are
    compared by the known-good text, and so is who comes back later.
    """
    servers, first = engine.servers, ""
    compare = not servers.alone and not all(lane.wire.digest for lane in servers.lanes)
    texts = [text for text, _ in samples] + [KNOWN_GOOD] * compare
    for lane, answers in engine.each(lambda wire: wire.converse(texts, not servers.alone)) if texts else []:
        check_alike(lane, answers, samples, f'those stored as of the model "{lane.wire.model}"')
        known = answers[-1]
        if compare and isinstance(known, bytes):
            servers.known, first = servers.known or known, first or lane.wire.address
            check_alike(lane, [known], [(KNOWN_GOOD, servers.known)], f"{first} does")


def check_alike(lane: Lane, answers: Answers, samples: list[tuple[str, bytes]], whose: str) -> None:
    """Raise Stop if most of a server's vectors differ from those known for the same texts; a few may by accident."""
    cosines = [
        cosine(answer, vector) if len(answer) == len(vector) else 0.0
        for answer, (_, vector) in zip(answers, samples)
        if isinstance(answer, bytes) and not isinstance(answer, Fitted)
    ]
    different = [value for value in cosines if value < ALIKE]
    if 2 * len(different) > len(cosines):
        raise Stop(
            f"{lane.wire.address} gives other vectors than {whose} (cosine {max(different):.3f} for the same text; "
            f'{ALIKE} or more is usual). It may hold another version of "{lane.wire.model}". Give another '
            "--server, --target NAME for a second table, --force for all rows again, or --accept-drift."
        )


def servers_for(options: argparse.Namespace, wires: Sequence[Wire]) -> Servers:
    """Return the servers of a run, each with a pace of its own and its share of what may be in flight."""
    fixed, many = options.concurrent, len(wires)
    lanes = []
    for place, wire in enumerate(wires):
        in_flight = fixed and max(1, fixed // many + (place < fixed % many))
        pace = Pace(in_flight, options.batch_size, options.timeout, max(2, Pace.MOST_IN_FLIGHT // many))
        lanes.append(Lane(place, wire, pace))
    servers = Servers(lanes, fixed)
    servers.dimensions = wires[0].dimensions
    return servers


# =============================== main ===============================

# What can be done with a prepared store; each says what came of it, and returns the exit code.
ACTIONS: dict[str, Callable[[Store, Sequence[Wire], Report], int]] = {
    "generate": generate,
    "dry_run": rehearse,
    "search": search,
    "similar": similar,
    "status": status,
    "prune": prune,
}


def hide_arguments(urls: Sequence[str]) -> None:
    """Overwrite the passwords of URLs in what the process list shows of this process and of those forked from it.

    On Linux alone: proc(5) has the arguments from arg_start in /proc/self/stat on.
    """
    secrets = rb"(?s)^((?:.*?://)?[^:/]*:)(.*)(?=@)", rb"((?:password|token|secret|key)=)([^&\s]+)"
    with contextlib.suppress(Exception):  # what cannot be hidden is no reason not to run
        with open("/proc/self/cmdline", "rb") as file:
            hidden = shown = file.read()
        for url in map(os.fsencode, urls):
            starred = url
            for secret in secrets:
                starred = re.sub(secret, lambda found: found[1] + b"*" * len(found[2]), starred)
            hidden = hidden.replace(url, starred)
        if hidden == shown:
            return
        import ctypes

        with open("/proc/self/stat", "rb") as file:
            start = int(file.read().rpartition(b")")[2].split()[45])
        if ctypes.string_at(start, len(shown)) == shown:
            ctypes.memmove(start, hidden, len(hidden))


def leave_out_tls() -> None:
    """Have asyncio and http.client do without ssl, as they do in a Python that has none; spares 2 MiB and 10 ms."""
    modules: dict[str, Any] = sys.modules
    modules.setdefault("ssl", None)  # which says that it cannot be imported


def traceback_now() -> str:
    """Return the traceback of the exception that is being handled."""
    import traceback

    return traceback.format_exc()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    import signal

    interrupt, log = Interrupt(), Log()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # ignored as in a shell's background: so it stays
            signal.signal(number, interrupt.on_signal)
    given = sys.argv if argv is None else argv
    console = Console(sys.stdout, interrupt)
    try:
        options = parse_arguments(argv)
        if argv is None:
            hide_arguments([*options.server, options.database])
        wires = wires_for(options)
        if argv is None and not any(wire.server.scheme == "https" for wire in wires):  # this process is the program's
            leave_out_tls()
        with contextlib.closing(open_store(options)) as store:
            store.stopping = lambda: bool(interrupt.code)
            if not options.reads_only:  # there is nothing to be told of those later
                log.begin(options)
            report = Report(console, options, log)
            if options.load:
                log.info(f"loaded {store.load(options.load)} rows from {options.load}")
            store.prepare()
            report.name_rows(store.relation.name)
            code = ACTIONS[options.action](store, wires, report)
            lost = console.is_lost and options.reads_only  # what it was all for
            return interrupt.code or (EXIT_STOPPED if lost else code)
    except Stop as stop:
        log.write("ERROR", stop.message, traceback_now() if stop.__cause__ else "")
        if "--json" in given and not isinstance(stop, Reported):
            console.json({"exit_code": stop.code, "error": stop.message})
        complain(f"error: {one_line(stop.message)}")
        return stop.code
    except KeyboardInterrupt:
        log.write("WARNING", "ended at once by a signal; what was not saved yet is left for the next run")
        console.lines()
        return interrupt.code or EXIT_SIGINT
    except Exception as error:
        log.write("ERROR", f"{type(error).__name__}: {error}", traceback_now())
        first = one_line(str(error).partition("\n")[0])
        more = f"the log {log.shown} has more" if log.file else "--verbose shows more"
        complain(f"error: {type(error).__name__}: {first}. This is a fault of embedgen itself; {more}.")
        if not log.file and "--verbose" in given:
            complain(traceback_now().rstrip())
        return EXIT_STOPPED
    finally:
        interrupt.over = True
        log.close()


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        import gc

        gc.freeze()  # or Python would search all that there is for cycles, twice, before it ends: some 8 ms
