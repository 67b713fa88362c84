"""The README is true: its commands run as they stand, and its outputs, flags and models are the program's.

A block marked "run" is executed in a folder that has the program and the films, one after the other, as a reader would;
those marked "run postgres" on Postgres only. A text block right after one is the end of what it prints.

    python -m tests.test_readme     prints the table of flags as it belongs into the README
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import py_compile
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import embedgen
from tests import bench
from tests.databases import SQLite
from tests.support import (
    AUTHORITY,
    FULL,
    MOVIES,
    PROGRAM,
    ROOT,
    Case,
    Finished,
    OnPostgres,
    another_double,
    command,
    environment,
    tls_double,
    without_progress,
)

README = (ROOT / "README.md").read_text("utf-8")
HEAD, _, FOLDS = README.partition("<details>")
POSTGRES_URL = "postgresql://user@db.example.net/shop"

MODELS = {
    "nomic-embed-text": {
        "dimensions": 768,
        "digest": "0a109f422b47e3a30ba2b10eca18548e944e8a23073ee3f3e947efcf3c45e59f",
    },
    "all-minilm": {"dimensions": 384, "context": 256},
    "BAAI/bge-m3": {"dimensions": 1024},
    "text-embedding-3-small": {"dimensions": 1536},
}
# What the reader has: a shop, and a table with rows that fail.
SHOP = """
    CREATE TABLE brands (name TEXT PRIMARY KEY, story TEXT);
    INSERT INTO brands VALUES ('Acme', 'Since 1920.'), ('Lux', 'Light for everybody.');
    CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, brand TEXT, description TEXT);
    INSERT INTO products VALUES (1, 'Kettle', 'Acme', 'Boils water'), (2, 'Lamp', 'Lux', 'Warm light');
    CREATE TABLE drafts (id INTEGER PRIMARY KEY, title TEXT);
    INSERT INTO drafts VALUES (1, 'Chair'), (2, NULL), (3, ''), (4, ' ');
"""
# Commands that a machine may lack, with what stands in for them here. The program runs as a module, since Python keeps
# what it has compiled of modules alone.
PYTHON = 'case "$1" in *embedgen.py) shift; set -- -m embedgen "$@";; esac; exec {python} "$@"'
OURS = r"(?:(\w+)=(\S+) )?python embedgen\.py(.*)"  # a line that needs no shell
STAND_INS = {
    "python": PYTHON,
    "python3": PYTHON,
    "ollama": "exit 0",
    "pip": "exit 0",
    "ssh": 'shift; exec "$@"',
    "sqlite3": 'exec {python} -c "import sqlite3, sys; sqlite3.connect(sys.argv[1]).executescript(sys.argv[2])" "$@"',
    "psql": 'exec {python} -c "import psycopg, sys; psycopg.connect(sys.argv[1], autocommit=1).execute(sys.argv[3])" '
    '"$@"',
}
# What differs between two runs of one command.
TIMES = (
    (r"\d+\.\d+ (seconds|embeddings/second)", r"0.00 \1"),
    (r"\[\d+:\d\d<\d+:\d\d, ", "[00:00<00:00, "),
    (r'"(seconds|rate)": [\d.]+', r'"\1": 0.0'),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(Z|,\d+)", "2026-01-31T12:00:00Z"),
)


class Block(NamedTuple):
    """A block of code in the README."""

    language: str
    marks: str  # what stands behind the language
    text: str
    output: str  # of the block of text right after it, "" if there is none


def blocks() -> Iterator[Block]:
    """Yield the blocks of code."""
    for language, marks, text, output in re.findall(
        r"^```(\w+) ?([^\n]*)\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", README, re.MULTILINE | re.DOTALL
    ):
        yield Block(language, marks, text, output)


def script_of(block: Block) -> str:
    """Return a block as a script for the shell."""
    if block.language == "cron":
        return re.sub(r"(?m)^(?:\S+ +){5}", "", block.text)
    if block.language == "ini":
        settings = dict(re.findall(r"^(\w+)=(.*)$", block.text, re.MULTILINE))
        return f"export {settings['Environment']}\n{settings['ExecStart']}"
    if block.language == "python":
        return f"python -c {shlex.quote(block.text)}"
    return block.text


def cell(text: str) -> str:
    """Return a text as it stands in a table."""
    return text.replace("|", r"\|")


def flag_table() -> str:
    """Return the table of flags, in the order of --help and with its words."""
    rows = ["| flag | meaning |", "| --- | --- |"]
    for setting, flag in embedgen.FLAGS.items():
        names = ", ".join(f"`{cell(f'{name} {flag.metavar}'.strip())}`" for name in names_of(setting))
        rows.append(f"| {names} | {cell(flag.help)} |")
    return "\n".join(rows) + "\n"


def names_of(setting: str) -> list[str]:
    """Return all names of a flag."""
    return [embedgen.flag_of(setting), *embedgen.FLAGS[setting].alias.split()]


def without_times(text: str) -> list[str]:
    """Return the lines of an output, the same for each run."""
    text = without_progress(text)
    for pattern, same in TIMES:
        text = re.sub(pattern, same, text)
    return text.splitlines()


class TestReadme(unittest.TestCase):
    """What can be seen without running a command."""

    maxDiff = None

    def test_it_is_short(self) -> None:
        self.assertLessEqual(len(HEAD.splitlines()), 330)
        self.assertLessEqual(len(HEAD.split()), 2700)
        self.assertLessEqual(len(FOLDS.splitlines()), 120)

    def test_flags_are_those_of_the_program(self) -> None:
        table = README.partition("\n## Flags\n")[2].partition("| flag |")
        self.assertEqual("".join(table[1:]).partition("\n\n")[0] + "\n", flag_table())
        shown = subprocess.run(command("--help"), stdout=subprocess.PIPE, check=True).stdout.decode()
        shown = "".join(shown.split())
        for setting, flag in embedgen.FLAGS.items():
            # Python 3.13 on, a flag with two names shows what stands for its value once.
            names = [separator.join(names_of(setting)) + flag.metavar for separator in (f"{flag.metavar},", ",")]
            self.assertTrue(any("".join((one + flag.help).split()) in shown for one in names), setting)

    def test_models_are_those_of_the_program(self) -> None:
        table = README.partition("| model | dimensions |")[2].partition("\n\n")[0].splitlines()[2:]
        self.assertGreater(len(table), 8)
        query = ""
        for row in table:
            names, _, tokens, document, asked = re.split(r" *(?<!\\)\| *", row.replace("` |", "`|"))[1:6]
            query = query if asked == "the same" else asked.strip("`")
            for name in names.split(", "):
                with self.subTest(name=name):
                    card = embedgen.card_of(name)
                    self.assertEqual(
                        (card.context, cell(card.document)), (int(tokens.replace(",", "")), document.strip("`"))
                    )
                    self.assertEqual(cell(card.query)[: len(query.rstrip("…"))], query.rstrip("…"))
                    self.assertTrue(query.endswith("…") or len(query) == len(cell(card.query)))

    def test_exit_codes_are_those_of_the_help(self) -> None:
        table = README.partition("| code | meaning |")[2].partition("\n\n")[0]
        codes = re.findall(r"\d+", " ".join(re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE)))
        said = (embedgen.__doc__ or "").partition("Exit codes:")[2]
        self.assertEqual(codes, re.findall(r"\b\d+\b", said))

    def test_quoted_messages_are_those_of_the_program(self) -> None:
        program = PROGRAM.read_text("utf-8")
        tables = README.partition("| symptom |")[2].partition("\n\n")[0], README.partition("| `--on-long` |")[2][:800]
        quoted = re.findall(r"^\| (`.*?`) \|", tables[0], re.M), re.findall(r"`(✂[^:`]+)", tables[1])
        for words in [*re.findall(r"`([^`…]+)", " ".join(quoted[0])), *quoted[1]]:
            words = words.removeprefix("cannot reach Ollama ").strip(' "').replace("movies.db.", "").replace("✂  ", "")
            with self.subTest(words):
                self.assertIn(words, program)

    def test_links_lead_somewhere(self) -> None:
        anchors = {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", README, re.M)
        }
        anchors.update(re.findall(r'id="([\w-]+)"', README))
        for link in re.findall(r"\]\(#([\w-]+)\)", README):
            self.assertIn(link, anchors)
        for path in re.findall(r"\]\((tests/[^)]+)\)", README):
            self.assertTrue((ROOT / path).exists(), path)


class TestPictures(Case):
    """The demonstration and the figures."""

    def test_the_demonstration_shows_what_is_printed(self) -> None:
        picture = (ROOT / "tests" / "figures" / "demo.svg").read_text("utf-8")
        self.assertLess(len(picture.encode()), 60_000)
        texts = [
            "".join(text.itertext()) for text in ElementTree.fromstring(picture).iter() if text.tag.endswith("text")
        ]
        self.assertEqual(texts.pop(0), "$ python embedgen.py")
        frames = [text for text in texts if text.startswith("Generating")]
        self.assertGreater(len(frames), 20)
        self.assertEqual(len(set(frames)), len(frames))
        self.make_movies(2000)
        printed = filter(None, self.succeed("--server", "hash:").out.splitlines())
        ours = [text for text in texts if text not in frames]
        theirs = [line for line in printed if not line.startswith("Generating")]
        self.assertEqual(without_times("\n".join(ours)), without_times("\n".join(theirs)))
        self.assertIn("2000/2000 [00:00<00:00, ✓=2000, ⊘=0, ✗=0]", "".join(without_times(frames[-1])))

    def test_figures_are_drawn(self) -> None:
        with mock.patch.object(bench, "drawn", [self.folder]):
            bench.draw("some", "seconds", {"async": 1.5, "other": 3.0})
        drawn = ElementTree.parse(self.folder / "some.svg").getroot()
        widths = [int(bar.get("width", 0)) for bar in drawn.iter() if bar.tag.endswith("rect")]
        self.assertEqual(widths[1], 2 * widths[0])
        for name in ("throughput", "cpu", "memory"):
            text = (ROOT / "tests" / "figures" / f"{name}.svg").read_text("utf-8")
            self.assertRegex(text, r"(?s)>process<.*>ollama-python \d+\.\d+")

    def test_the_benchmark_has_answers(self) -> None:
        for path in ("/api/embed", "/v1/embeddings"):
            body = bench.ready_made(path, 2).partition(b"\r\n\r\n")[2]
            self.assertGreater(len(body), 2 * bench.DIMENSIONS * 4)


@unittest.skipUnless(shutil.which("sh"), "the commands are written for a shell")
class TestCommands(Case):
    """The blocks that are marked to be run."""

    marks = "run"

    def setUp(self) -> None:
        super().setUp()
        self.ollama.configure(models=MODELS)
        self.second, self.secure = another_double(models=MODELS), tls_double("good", models=MODELS)
        py_compile.compile(shutil.copy(PROGRAM, self.folder))
        (self.folder / "tests" / "data").mkdir(parents=True)
        shutil.copy(MOVIES, self.folder / "tests" / "data")
        with contextlib.closing(sqlite3.connect(self.folder / "shop.db")) as shop:
            shop.executescript(SHOP)
        self.bin = Path(tempfile.mkdtemp(prefix="embedgen-test-"))
        self.addCleanup(shutil.rmtree, self.bin)
        for name, script in STAND_INS.items():
            path = self.bin / name
            python = shlex.quote(sys.executable) + " -S" * isinstance(self.db, SQLite)
            path.write_text("#!/bin/sh\n" + script.format(python=python) + "\n")
            path.chmod(0o755)

    def substituted(self, text: str) -> str:
        """Return a text with this machine's paths and servers for the README's."""
        folder = shlex.quote(str(self.folder))
        for theirs, ours in {
            "/usr/bin/python3": "python3",
            "/opt/embedgen": folder,
            "/srv": folder,
            "/var/log/embedgen": f"{folder}/logs",
            "/etc/ssl/private-ca.pem": shlex.quote(AUTHORITY),
            "gpu.example.net:11434": self.ollama.url,
            "gpu1:11434": self.ollama.url,
            "gpu2:11434": self.second.url,
            "http://localhost:8080": self.ollama.url,
            "https://api.openai.com": self.ollama.url,
            "https://ollama.example.net": self.secure.url,
            POSTGRES_URL: shlex.quote(getattr(self.db, "url", "")),
        }.items():
            text = text.replace(theirs, ours)
        return text

    def run_script(self, script: str) -> Finished:
        """Run a script in the folder."""
        script, env = self.substituted(script), {"OLLAMA_HOST": self.ollama.url, "no_proxy": "*"}
        if not FULL and re.fullmatch(rf"(?:(?:{OURS}|(?:grep|ollama) .*)\n)+", script):
            codes, outs, errs = zip(*(self.run_line(line, env) for line in script.splitlines()))
            return Finished(max(codes), "".join(outs), "".join(errs))
        return self.run_in_shell(script, env)

    def run_line(self, line: str, env: dict[str, str]) -> Finished:
        """Run a script of one line, the program in this process, which is quicker."""
        found = re.fullmatch(OURS, line)
        if not found:
            return self.run_in_shell(line, env)
        name, value, flags = found.groups()
        with mock.patch.object(embedgen, "__file__", str(self.folder / "embedgen.py")):
            return self.call(shlex.split(flags, comments=True), {**env, name: value} if name else env)

    def run_in_shell(self, script: str, env: dict[str, str]) -> Finished:
        """Run a script as it is written."""
        env = dict(env)
        env["PATH"] = f"{self.bin}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-e", "-c", script], cwd=self.folder, env=environment(env), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", timeout=600,
        )  # fmt: skip
        return Finished(done.returncode, done.stdout, done.stderr)

    def test_commands(self) -> None:
        self.run_script("python embedgen.py --server hash: --database shop.db --table drafts --quiet || true")
        found = [block for block in blocks() if block.marks == self.marks]
        self.assertGreater(len(found), 2)
        for block in found:
            with self.subTest(block.text):
                if block.language == "sql":
                    self.run_sql(block.text)
                    continue
                done = self.run_script(script_of(block))
                self.assertEqual((done.code, done.err), (0, ""), done.out)
                self.compare(block.output, done.out)
        count = "SELECT count(*) - count(embedding) FROM items"
        self.assertEqual(self.in_shop(count), [(0,)])
        self.in_shop("UPDATE items SET description = 'Boils milk' WHERE id = 1")
        self.assertEqual(self.in_shop(count), [(1,)], "the trigger")

    def in_shop(self, sql: str) -> list[Any]:
        """Execute a statement in the shop's database."""
        with contextlib.closing(sqlite3.connect(self.folder / "shop.db")) as shop, shop:
            return shop.execute(sql).fetchall()

    def run_sql(self, sql: str) -> None:
        """Run a statement on the films in SQLite; it must find something."""
        with contextlib.closing(sqlite3.connect(self.folder / "movies.db")) as movies:
            if "vec_" in sql:
                if not importlib.util.find_spec("sqlite_vec"):
                    return
                import sqlite_vec  # type: ignore[import-not-found,unused-ignore]

                movies.enable_load_extension(True)
                sqlite_vec.load(movies)
                self.assertEqual(len(movies.execute(sql).fetchall()), 5)
            movies.execute(sql)

    def compare(self, expected: str, printed: str) -> None:
        """An output must end as the README has it; a line that ends with … there goes on."""
        wanted = without_times(expected)
        given = without_times(printed)[-len(wanted) :] if wanted else []
        given = [line[: len(want) - 1] + "…" if want.endswith("…") else line for line, want in zip(given, wanted)]
        self.assertEqual("\n".join(given), "\n".join(wanted))


class TestCommandsOnPostgres(OnPostgres, TestCommands):
    """Those for Postgres."""

    marks = "run postgres"

    def run_sql(self, sql: str) -> None:
        """Run a statement."""
        self.execute(sql)

    def in_shop(self, sql: str) -> list[Any]:
        return self.execute(sql)


if __name__ == "__main__":
    print(flag_table(), end="")
