"""Measures what the program costs: memory, processor time, throughput, pace, and its start.

    python -m tests.bench [SECTION ...] [--quick] [--svg]

Without a SECTION, all of them. Machines differ and are shared, so what counts are the ratios:
both sides of each are measured in turns, in the same run, and the medians of three compared.
Nothing needs to be installed; where the packages that a script of others needs can be imported,
it is measured, too. --svg draws the figures of the README anew, in tests/figures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from xml.sax.saxutils import escape

from tests.databases import Postgres
from tests.ollama import EMBED_PATHS, MODEL, Connection, Ollama, Question, Server, vector
from tests.support import ENGINES, PROGRAM, ROOT, environment

# --- Running and measuring ----------------------------------------------------------------------

SAMPLING = 0.005, 0.05  # seconds between two looks at the memory, at first and later


class Measured(NamedTuple):
    """What one run cost: seconds, seconds of processor time, and MiB."""

    seconds: float
    cpu: float = math.nan  # nan is what could not be measured
    peak: float = math.nan


def command(*arguments: object) -> list[str]:
    """Return the command line that runs the program as its user does: a script, which Python compiles at each start."""
    return [sys.executable, str(PROGRAM), *map(str, arguments)]


def pss(pid: int | str) -> float:
    """Return the MiB of a process and its descendants; what n of them share counts 1/n in each."""
    with contextlib.suppress(OSError):  # it has just ended
        found = re.search(r"\nPss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
        return (int(found[1]) / 1024 if found else 0.0) + sum(map(pss, children.split()))
    return 0.0


def measure(arguments: Sequence[str], folder: Path) -> Measured:
    """Run a command to its good end."""
    begin, peak, cpu, ended = time.monotonic(), 0.0, math.nan, threading.Event()
    env, nowhere = environment({"no_proxy": "*"}), subprocess.DEVNULL
    process = subprocess.Popen(arguments, cwd=folder, env=env, stdin=nowhere, stdout=nowhere)

    def watch() -> None:
        nonlocal peak
        peak = pss(process.pid)
        while not ended.wait(SAMPLING[time.monotonic() - begin > 1]):
            peak = max(peak, pss(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    if sys.platform != "win32":
        _, status, usage = os.wait4(process.pid, 0)  # with the processes that it has waited for
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu = usage.ru_utime + usage.ru_stime
    process.wait()
    seconds = time.monotonic() - begin
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}")
    return Measured(seconds, cpu, peak or math.nan)


def program(database: object, url: str, *flags: object) -> Measured:
    """Run the program over a database; it must succeed, so that all rows have their embedding."""
    with tempfile.TemporaryDirectory(prefix="embedgen-bench-") as folder:
        flags = ("--log-dir", folder, "--quiet", "--database", database, "--server", url, *flags)
        return measure(command(*flags), Path(folder))


def both_engines(fresh: Callable[[], str], url: str, *flags: object) -> dict[str, Callable[[], Measured]]:
    """Return for each engine the job to run the program over a database that has no vectors yet."""

    def run(engine: str) -> Measured:
        return program(fresh(), url, "--engine", engine, *flags)

    return {engine: functools.partial(run, engine) for engine in ENGINES}


def copies_of(database: Path) -> Callable[[], str]:
    """Return what makes a copy of an SQLite database, over the last one, and returns its path."""
    return lambda: str(shutil.copy(database, database.with_suffix(".copy.db")))


def in_turns(jobs: Mapping[str, Callable[[], Measured]], times: int = 3) -> dict[str, Measured]:
    """Do all jobs in turn, so many times, and return the median of each figure."""
    done: dict[str, list[Measured]] = {name: [] for name in jobs}
    for _, name in itertools.product(range(times), jobs):
        done[name].append(jobs[name]())
    return {name: Measured(*map(statistics.median, zip(*runs))) for name, runs in done.items()}


MARK = "What happens in"  # stands once in the text of each row
PLOT = " A stranger comes to town, and nothing stays as it was." * 5  # makes a text as long as real ones


def make_movies(database: Path, count: int, more: str = "") -> Path:
    """Make a database with the table movies, with the keys from 1 to `count`, and return its path."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE movies (id INTEGER PRIMARY KEY, title TEXT, overview TEXT)")
        rows = ((key, f"Film {key}", f"{MARK} {key}.{more}") for key in range(1, count + 1))
        connection.executemany("INSERT INTO movies VALUES (?, ?, ?)", rows)
    return database


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print an aligned table."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "not measured" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        return str(value)

    lines = [list(header), *(list(map(cell, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for first, *others in lines:
        print("  " + "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip(), flush=True)


drawn: list[Path] = []  # the folder for figures, if any are wanted
LABELS, BARS = 330, 340  # pixels: what the names take, and the longest bar
FIGURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 {height}" width="740" height="{height}" role="img">
<title>{title}, by client</title>
<style>
text {{ font: 13px system-ui, sans-serif; fill: #24292f; }} .more {{ fill: #57606a; }}
rect {{ fill: #b6bcc4; }} rect.ours {{ fill: #1f7a4d; }} line {{ stroke: #57606a; }} line.grid {{ opacity: 0.3; }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3; }} .more {{ fill: #9198a1; }} rect {{ fill: #545d68; }} rect.ours {{ fill: #3fb27f; }}
line {{ stroke: #9198a1; }}
}}
</style>
{bars}
{axis}
<text class="more" x="{middle}" y="{foot}" text-anchor="middle">{title}</text>
</svg>
"""
BAR = """<text x="{label}" y="{text}" text-anchor="end">{name}</text>
<rect{ours} x="{left}" y="{top}" width="{width:.0f}" height="16"/>
<text x="{right:.0f}" y="{text}">{value:,.0f}</text>"""


def versioned(name: str) -> str:
    """Return the name of a client with the versions of its packages."""
    for package in SCRIPTS[name][0] if name in SCRIPTS else ():
        name = re.sub(rf"\b{package}(-python)?\b", rf"\g<0> {metadata.version(package)}", name, count=1)
    return name


def draw(name: str, title: str, values: Mapping[str, float]) -> None:
    """Draw one bar for each value, the program's own in another colour; `title` is the axis', with its unit."""
    most, bars, axis = max(values.values()), [], []
    step = next(step for power in range(9) for step in (10**power, 2 * 10**power, 5 * 10**power) if most / step <= 6)
    foot = 14 + 24 * len(values)
    for tick in range(0, int(most) + 1, step):
        x, grid = LABELS + BARS * tick / most, ' class="grid"' * bool(tick)
        axis.append(
            f'<line{grid} x1="{x:.0f}" y1="4" x2="{x:.0f}" y2="{foot - 8}"/>'
            f'<text class="more" x="{x:.0f}" y="{foot + 8}" text-anchor="middle">{tick:,}</text>'
        )
    for number, (label, value) in enumerate(values.items()):
        top, width, ours = 8 + 24 * number, BARS * value / most, ' class="ours"' * label.startswith(ENGINES)
        bars.append(
            BAR.format(
                name=escape(versioned(label)), value=value, ours=ours, label=LABELS - 8, left=LABELS, top=top,
                text=top + 13, width=width, right=LABELS + 6 + width,
            )
        )  # fmt: skip
    picture = FIGURE.format(
        title=escape(title), height=foot + 34, bars="\n".join(bars), axis="\n".join(axis), middle=LABELS + BARS // 2,
        foot=foot + 28,
    )  # fmt: skip
    for folder in drawn:
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.svg").write_text(picture, "utf-8")


# --- A server and a client that cost next to nothing --------------------------------------------

DIMENSIONS = 768


@functools.lru_cache(None)
def ready_made(path: str, texts: int) -> bytes:
    """Return a whole answer, as Ollama gives it, with a vector for each of so many texts."""
    if path in EMBED_PATHS:
        vectors = [vector(str(number), DIMENSIONS) for number in range(texts)]
        name = "nomic-embed-text"
        question = Question(
            path=path, name=name, named=name, model=MODEL, texts=[""] * texts, tokens=texts, dimensions=DIMENSIONS,
            base64=True, context=2048,
        )  # fmt: skip
        body = Server.encode(question, vectors, {}, "")
    else:
        body = json.dumps(
            {
                "model_info": {"double.embedding_length": DIMENSIONS, "double.context_length": 2048},
                "capabilities": ["embedding"],
                "models": [{"name": "nomic-embed-text:latest", "digest": "0a109f422b47", "context_length": 2048}],
            }
        )
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + Connection.chunks(body.encode(), 1)


class Responder(asyncio.Protocol):
    """Gives each request its ready-made answer, without a look at more than the number of its texts."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a connection."""
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        """Answer a request that is complete; clients do not send the next one before."""
        self.buffer += data
        head, blank, body = self.buffer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)|^GET", head, re.IGNORECASE)
        if blank and length and len(body) >= int(length[1] or 0):
            path = head.split(b" ", 2)[1].decode()
            self.transport.write(ready_made(path, body.count(MARK.encode()) or 1))
            self.buffer = b""


async def respond() -> None:
    """Be the responder's process, until stdin ends."""
    server = await asyncio.get_running_loop().create_server(Responder, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


@contextlib.contextmanager
def responder() -> Iterator[str]:
    """Run the responder in a process of its own; gives its address."""
    code = "import asyncio; from tests.bench import respond; asyncio.run(respond())"
    arguments = [sys.executable, "-c", code]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()


def raw_loop(url: str, total: int, batch: int, in_flight: int, path: str = "/api/embed") -> Measured:
    """Measure what a client can get, in this process, that throws the answers away."""
    texts = [f"Title: Film {key} | Description: {MARK} {key}.{PLOT}" for key in range(total)]
    common = {"model": "nomic-embed-text", "encoding_format": "base64"}
    bodies = [json.dumps({**common, "input": texts[i : i + batch]}) for i in range(0, total, batch)]

    async def converse() -> None:
        reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port, limit=1 << 24)
        while bodies:
            body = bodies.pop()
            writer.write(f"POST {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            length = re.search(rb"Content-Length: (\d+)", await reader.readuntil(b"\r\n\r\n"))
            await (reader.readexactly(int(length[1])) if length else reader.readuntil(b"\r\n0\r\n\r\n"))
        writer.close()

    async def all_at_once() -> None:
        await asyncio.gather(*(converse() for _ in range(in_flight)))

    begin, busy = time.monotonic(), time.process_time()
    asyncio.run(all_at_once())
    return Measured(time.monotonic() - begin, time.process_time() - busy)


# --- The sections -------------------------------------------------------------------------------


def memory(folder: Path, quick: bool) -> None:
    """Peak memory, which must not depend on the number of rows."""
    sizes = (1_000, 30_000 if quick else 300_000)
    rows: list[list[Any]] = []
    with responder() as url:
        for engine in ENGINES:
            flags = ("--engine", engine, "--concurrent", 10, "--batch-size", 32)
            peaks = []
            for size in sizes:
                database = make_movies(folder / "memory.db", size, PLOT)
                peaks.append(program(database, url, *flags, "--force").peak)
                again = functools.partial(program, database, url, *flags)
                peaks.append(in_turns({"": again})[""].peak)
                database.unlink()
            rows.append([f"{engine}, all to do", peaks[0], peaks[2], peaks[2] / peaks[0]])
            rows.append([f"{engine}, nothing to do", peaks[1], peaks[3], peaks[3] / peaks[1]])
    header = ("peak PSS, MiB", *(f"{size:,} rows" for size in sizes), "ratio")
    show("memory: ten requests of 32 texts in flight; the goal is a ratio within 10 % of 1", header, rows)


# Scripts of others. Each is given the server's and the database's address; Movies is what it does with the latter.
MOVIES_IN_SQLITE = """
import sqlite3

class Movies:
    def __init__(self, database):
        self.connection = sqlite3.connect(database)
        self.connection.execute("CREATE TABLE movie_embeddings (movie_id INTEGER PRIMARY KEY, embedding BLOB)")

    def read(self):
        rows = self.connection.execute("SELECT id, title, overview FROM movies")
        return [(key, f"Title: {title} | Description: {overview}") for key, title, overview in rows]

    def save(self, vectors):
        self.connection.executemany("INSERT INTO movie_embeddings VALUES (?, ?)", vectors)
        self.connection.commit()
"""
# Binary COPY straight into the empty table, put together by hand: faster than write_row and an adapter for each value.
MOVIES_IN_POSTGRES = """
import struct
import numpy, psycopg

class Movies:
    def __init__(self, database):
        self.connection = psycopg.connect(database)
        self.connection.execute("CREATE TABLE movie_embeddings (movie_id bigint PRIMARY KEY, embedding vector(768))")
        self.connection.commit()

    def read(self):
        rows = self.connection.execute("SELECT id, title, overview FROM movies").fetchall()
        self.unsaved, self.left = [], len(rows)
        return [(key, f"Title: {title} | Description: {overview}") for key, title, overview in rows]

    def save(self, vectors):
        self.unsaved += vectors
        self.left -= len(vectors)
        if self.left and len(self.unsaved) < 1000:
            return
        vectors, self.unsaved = self.unsaved, []
        rows = [b"PGCOPY\\n\\xff\\r\\n\\0" + bytes(8)]
        for key, vector in vectors:
            rows.append(struct.pack(">hiqihh", 2, 8, key, len(vector) + 4, len(vector) // 4, 0))
            rows.append(numpy.frombuffer(vector, "<f4").astype(">f4").tobytes())
        copying = "COPY movie_embeddings FROM STDIN (FORMAT BINARY)"
        with self.connection.cursor() as cursor, cursor.copy(copying) as copy:
            copy.write(b"".join(rows) + struct.pack(">h", -1))
        self.connection.commit()
"""
WITH_URLLIB = """
import array, json, multiprocessing, sys, urllib.request

def ask(body):
    with urllib.request.urlopen(sys.argv[1] + "/api/embed", json.dumps(body).encode()) as answer:
        return json.load(answer)
"""
WITH_REQUESTS = """
import array, multiprocessing, sys, requests

def ask(body):
    return requests.post(sys.argv[1] + "/api/embed", json=body).json()
"""
POOL = """
def embed(row):
    answer = ask({"model": "nomic-embed-text", "input": row[1]})
    return row[0], array.array("f", answer["embeddings"][0]).tobytes()

if __name__ == "__main__":
    movies = Movies(sys.argv[2])
    with multiprocessing.Pool(10) as pool:
        vectors = pool.map(embed, movies.read())
        pool.close()
        pool.join()
    movies.save(vectors)
"""
TEN_AT_ONCE = """
async def main():
    movies = Movies(sys.argv[2])
    rows = movies.read()
    starts = iter(range(0, len(rows), 32))
    client = make_client(sys.argv[1])

    async def work():
        for start in starts:
            batch = rows[start : start + 32]
            vectors = await embed(client, [text for _, text in batch])
            movies.save([(key, vector) for (key, _), vector in zip(batch, vectors)])

    await asyncio.gather(*(work() for _ in range(10)))

asyncio.run(main())
"""
EXPERT = f"""
import asyncio, base64, sys
import httpx, numpy, orjson

def make_client(url):
    return httpx.AsyncClient(base_url=url, timeout=300)

async def embed(client, texts):
    body = orjson.dumps({{"model": "nomic-embed-text", "input": texts, "encoding_format": "base64"}})
    answer = await client.post("/v1/embeddings", content=body, headers={{"Content-Type": "application/json"}})
    answer.raise_for_status()
    data = orjson.loads(answer.content)["data"]
    return [numpy.frombuffer(base64.b64decode(one["embedding"]), "<f4").tobytes() for one in data]
{TEN_AT_ONCE}"""
OLLAMA_PYTHON = f"""
import array, asyncio, sys
import ollama

def make_client(url):
    return ollama.AsyncClient(host=url)

async def embed(client, texts):
    answer = await client.embed(model="nomic-embed-text", input=texts)
    return [array.array("f", vector).tobytes() for vector in answer.embeddings]
{TEN_AT_ONCE}"""
SCRIPTS = {  # name: packages and text
    "script: httpx, orjson, numpy": (("httpx", "orjson", "numpy"), EXPERT),
    "ollama-python": (("ollama",), OLLAMA_PYTHON),
    "requests, Pool(10), one by one": (("requests",), WITH_REQUESTS + POOL),
    "urllib, Pool(10), one by one": ((), WITH_URLLIB + POOL),
}
LAST = "urllib, Pool(10), one by one"  # what all are compared with: the way it is done today


def scripts(
    folder: Path, url: str, fresh: Callable[[], str], movies: str = MOVIES_IN_SQLITE, names: str = ""
) -> dict[str, Callable[[], Measured]]:
    """Return the jobs to run the scripts of others, those whose packages there are, and whose name begins so."""

    def run(script: Path) -> Measured:
        return measure([sys.executable, str(script), url, fresh()], folder)

    jobs = {}
    chosen = [(name, script) for name, script in SCRIPTS.items() if name.startswith(names)]
    for number, (name, (packages, text)) in enumerate(chosen):
        missing = [package for package in packages if not importlib.util.find_spec(package)]
        if missing:
            print(f"{name}: not measured, without {', '.join(missing)}", flush=True)
            continue
        script = folder / f"script{number}.py"
        script.write_text(movies + text)
        jobs[name] = functools.partial(run, script)
    return jobs


def throughput(folder: Path, quick: bool) -> None:
    """What the client itself costs, where the server answers at once."""
    count = 5_000 if quick else 20_000
    fresh = copies_of(make_movies(folder / "throughput.db", count, PLOT))
    fixed = ("--concurrent", 10, "--batch-size", 32)
    with responder() as url:
        jobs: dict[str, Callable[[], Measured]] = {}
        for name, path in (("base64", "/v1/embeddings"), ("decimals", "/api/embed")):
            raw_loop(url, 330, 32, 10, path)  # makes the answers ready
            jobs[f"the server's ceiling, {name}"] = functools.partial(raw_loop, url, count, 32, 10, path)
        jobs.update(both_engines(fresh, url, *fixed))
        decimals = both_engines(fresh, url, *fixed, "--option", "num_ctx=2048")
        jobs.update({f"{engine}, decimals": job for engine, job in decimals.items()})
        jobs.update(scripts(folder, url, fresh))
        done = in_turns(jobs)
    base, rows = done[LAST], []
    for name, run in done.items():
        cpu = run.cpu / count * 1e6
        rows.append([name, count / run.seconds, base.seconds / run.seconds, cpu, run.cpu / base.cpu, run.peak])
    header = ("", "embeddings/s", "ratio", "CPU, µs each", "ratio", "peak PSS, MiB")
    show(f"throughput: {count:,} rows, {DIMENSIONS} dimensions, ready-made answers, 10 x 32", header, rows)
    clients = {name: run for name, run in done.items() if "ceiling" not in name}
    for figure, axis, value in (
        ("throughput", "embeddings per second: more is better", lambda run: count / run.seconds),
        ("cpu", "processor time per embedding, in µs: less is better", lambda run: run.cpu / count * 1e6),
        ("memory", "memory at the peak, in MiB: less is better", lambda run: run.peak),
    ):
        draw(figure, axis, {name: value(run) for name, run in clients.items()})


def copy(folder: Path, quick: bool) -> None:
    """The same into Postgres, beside a script that saves by COPY."""
    try:
        database = Postgres(folder)
    except unittest.SkipTest as reason:
        print(f"\ncopy: left out, since {reason}")
        return
    count = 5_000 if quick else 20_000
    database.execute("CREATE TABLE movies (id BIGINT PRIMARY KEY, title TEXT, overview TEXT)")
    database.execute(f"INSERT INTO movies SELECT n, 'Film ' || n, '{MARK} ' || n || '.{PLOT}' "
                     f"FROM generate_series(1, {count}) AS n")  # fmt: skip
    database.execute("ANALYZE")

    def fresh() -> str:
        for table in database.tables():
            if table != "movies":
                database.execute(f"DROP TABLE {table} CASCADE")
        database.execute("CHECKPOINT")  # what one has written is not to be the next one's burden
        return database.url

    with responder() as url:
        raw_loop(url, 330, 32, 10, "/v1/embeddings")  # makes the answers ready
        jobs = both_engines(fresh, url, "--concurrent", 10, "--batch-size", 32)
        jobs.update(scripts(folder, url, fresh, MOVIES_IN_POSTGRES, "script"))
        done = in_turns(jobs)
    base, rows = done["async"], []
    for name, run in done.items():
        cpu = run.cpu / count * 1e6
        rows.append([name, count / run.seconds, base.seconds / run.seconds, cpu, run.cpu / base.cpu, run.peak])
    header = ("", "embeddings/s", "ratio", "CPU, µs each", "ratio", "peak PSS, MiB")
    show(f"copy: {count:,} rows into Postgres, ready-made answers, 10 x 32", header, rows)


def paced(folder: Path, quick: bool) -> None:
    """How much of a steady server's time is used, without a flag."""
    count = 1_000 if quick else 2_000
    database = make_movies(folder / "paced.db", count, PLOT)
    with Ollama(seconds_per_text=0.005, slots=1) as server:
        best = {"raw loop, 2 x 32": lambda: raw_loop(server.url, count, 32, 2)}
        done = in_turns({**best, **both_engines(copies_of(database), server.url)})
    most = done["raw loop, 2 x 32"].seconds
    rows = [[name, count / run.seconds, most / run.seconds] for name, run in done.items()]
    show(f"paced: a server of 200 embeddings/s, {count:,} rows", ("", "embeddings/s", "share"), rows)


SERVERS: dict[str, tuple[int, int, dict[str, Any]]] = {  # rows for 40 s at best, --timeout, and settings
    "a: one at a time, 0.35 s each": (114, 120, {"seconds_per_text": 0.35, "slots": 1}),
    "b: four at a time, 20 ms each": (8_000, 300, {"seconds_per_text": 0.02, "slots": 4}),
    "c: 8 requests of 64 at once": (80_000, 300, {"batching": {"batch": 64, "in_flight": 8, "peak": 2000}}),
    "d: far away, 50 at a time": (100_000, 300, {"network": 0.15, "seconds_per_text": 0.02, "slots": 50}),
    "e: slow from second 10 to 30": (2_400, 300, {"seconds_per_text": 0.01, "slots": 1, "slowdowns": [[10, 30, 5]]}),
}
PAIRS = ((1, 8), (2, 8), (2, 32), (8, 8), (8, 64), (16, 32), (64, 4))  # requests in flight, texts in each


def served(folder: Path, count: int, settings: dict[str, Any], *flags: object) -> tuple[float, int]:
    """Return the embeddings/s that a run got from a server, and how many requests it gave up."""
    database = make_movies(folder / "pace.db", count)
    with Ollama(**settings) as server:
        program(database, server.url, *flags)
        log = [entry for entry in server.log() if entry["path"] in EMBED_PATHS]
    database.unlink()
    seconds = max(entry["end"] for entry in log) - min(entry["start"] for entry in log)
    return count / seconds, sum(entry["hung_up"] for entry in log)


def pace(folder: Path, quick: bool) -> None:
    """What the automatic pace gets out of servers of several kinds, beside the best of some fixed ones."""
    rows: list[list[Any]] = []
    for name, (count, timeout, settings) in SERVERS.items():
        slow = settings.get("slowdowns", [])
        if quick and not slow:  # whose times would no longer fit
            count //= 4
        speed, hung_up = served(folder, count, settings, "--timeout", timeout)
        # The fixed pairs get ten rounds of requests, or a quarter of the rows and of the times.
        shorter = {**settings, "slowdowns": [[begin / 4, end / 4, factor] for begin, end, factor in slow]}
        fixed = {}
        for in_flight, batch in PAIRS:
            few = count // 4 if slow else min(count // 4, 10 * in_flight * batch)
            flags = ("--timeout", timeout, "--concurrent", in_flight, "--batch-size", batch)
            fixed[f"{in_flight} x {batch}"] = served(folder, few, shorter, *flags)[0]
        best = max(fixed, key=lambda pair: fixed[pair])
        rows.append([name, count, speed, fixed[best], best, speed / fixed[best], hung_up])
    header = ("server", "rows", "embeddings/s", "best fixed", "which", "ratio", "time-outs")
    show("pace: no flag set, beside the best fixed pair of requests in flight and texts in each", header, rows)


def idle(folder: Path, quick: bool) -> None:
    """A run with nothing to do, beside one statement that only joins the two tables."""
    count = 100_000 if quick else 1_000_000
    database, flags = make_movies(folder / "idle.db", count), ("--document-prefix", "")
    with Ollama(models={"nomic-embed-text": {"dimensions": 64}}) as server:
        program(database, server.url, *flags, "--limit", 1)
        url = server.url
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        texts = ((key, f"Title: Film {key} | Description: {MARK} {key}.") for key in range(2, count + 1))
        connection.executemany(
            "INSERT INTO movie_embeddings (movie_id, embedding, model, text_sha256, updated_at) "
            "VALUES (?, zeroblob(256), 'nomic-embed-text', ?, '2026-01-01T00:00:00Z')",
            ((key, hashlib.sha256(text.encode()).digest()) for key, text in texts),
        )

    def join() -> Measured:
        begin = time.monotonic()
        with contextlib.closing(sqlite3.connect(database)) as connection:
            sql = "SELECT count(*) FROM movies m JOIN movie_embeddings e ON e.movie_id = m.id"
            assert connection.execute(sql).fetchone() == (count,)
        return Measured(time.monotonic() - begin)

    def written() -> Measured:
        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("UPDATE movie_embeddings SET updated_at = ? WHERE movie_id = 1", (str(time.time()),))
        return program(database, url, *flags)

    # The server is gone: the run would fail if it had anything to do.
    unwritten = functools.partial(program, database, url, *flags)
    done = in_turns({"the join alone": join, "after somebody has written": written, "after nobody has": unwritten})
    shortest = done["the join alone"].seconds
    rows = [[name, run.seconds, run.seconds / shortest, run.peak] for name, run in done.items()]
    show(f"idle: nothing to do in {count:,} rows", ("", "seconds", "ratio", "peak PSS, MiB"), rows)


def postgres(folder: Path, quick: bool) -> None:
    """The same in Postgres, if there is one to test with; in two sizes, to see that the memory stays."""
    try:
        database = Postgres(folder)
    except unittest.SkipTest as reason:
        print(f"\npostgres: left out, since {reason}")
        return
    rows, flags = [], ("--document-prefix", "")
    for count in (1_000, 100_000 if quick else 1_000_000):
        database.wipe()
        database.execute("CREATE TABLE movies (id BIGINT PRIMARY KEY, title TEXT, overview TEXT)")
        database.execute(f"INSERT INTO movies SELECT n, 'Film ' || n, '{MARK} ' || n || '.' "
                         f"FROM generate_series(1, {count}) AS n")  # fmt: skip
        with Ollama(models={"nomic-embed-text": {"dimensions": 64}}) as server:
            program(database.url, server.url, *flags, "--limit", 1)
            url = server.url
        database.execute(
            "INSERT INTO movie_embeddings SELECT id, array_fill(0.125, ARRAY[64])::vector, 'nomic-embed-text', "
            "sha256(convert_to('Title: ' || title || ' | Description: ' || overview, 'UTF8')), now() "
            "FROM movies WHERE id > 1"
        )
        database.execute("ANALYZE")
        with database.psycopg.connect(database.url) as connection:

            def join(connection: Any = connection, count: int = count) -> Measured:
                begin = time.monotonic()
                sql = "SELECT count(*) FROM movies m JOIN movie_embeddings e ON e.movie_id = m.id"
                assert connection.execute(sql).fetchone() == (count,)
                return Measured(time.monotonic() - begin)

            done = in_turns({"the join alone": join, "the run": functools.partial(program, database.url, url, *flags)})
        shortest = done["the join alone"].seconds
        rows += [
            [f"{count:,} rows: {name}", run.seconds, run.seconds / shortest, run.peak] for name, run in done.items()
        ]
    show("postgres: nothing to do", ("", "seconds", "ratio", "peak PSS, MiB"), rows)


def search(folder: Path, quick: bool) -> None:
    """How long it takes to find the nearest rows in SQLite, beside one statement that only reads the vectors."""
    rows: list[list[Any]] = []
    for count in (10_000, 20_000 if quick else 100_000):
        database = make_movies(folder / f"search {count}.db", count, PLOT)
        with Ollama(models={"nomic-embed-text": {"dimensions": DIMENSIONS}}) as server:
            program(database, server.url, "--limit", 1)
            url = server.url  # nobody will be asked
        some = [struct.pack(f"<{DIMENSIONS}f", *vector(str(number), DIMENSIONS)) for number in range(200)]

        def turned(key: int, some: list[bytes] = some) -> bytes:
            """Return another vector for each row, made faster than by chance."""
            one, place = some[key % len(some)], key // len(some) % DIMENSIONS * 4
            return one[place:] + one[:place]

        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            connection.executemany(
                "INSERT INTO movie_embeddings (movie_id, embedding, model, text_sha256, updated_at) "
                "VALUES (?, ?, 'nomic-embed-text', zeroblob(32), '2026-01-01T00:00:00Z')",
                ((key, turned(key)) for key in range(2, count + 1)),
            )

        def read(database: Path = database, count: int = count) -> Measured:
            begin = time.monotonic()
            with contextlib.closing(sqlite3.connect(database)) as connection:
                assert sum(1 for _ in connection.execute("SELECT movie_id, embedding FROM movie_embeddings")) == count
            return Measured(time.monotonic() - begin)

        jobs = {"reading alone": read, "--similar": functools.partial(program, database, url, "--similar", 2)}
        done = in_turns(jobs)
        least = done["reading alone"].seconds
        rows += [[f"{count:,} rows: {name}", run.seconds, run.seconds / least, run.peak] for name, run in done.items()]
    show(f"search: {DIMENSIONS} dimensions", ("", "seconds", "ratio", "peak PSS, MiB"), rows)


def start(folder: Path, quick: bool) -> None:
    """How soon the program is there."""
    database = make_movies(folder / "start.db", 100)
    flags = ("--database", database, "--server", "hash:", "--quiet", "--log-dir", folder)
    measure(command(*flags), folder)
    python = os.path.realpath(sys.executable)  # the interpreter itself, not what stands before it on the way
    commands = {
        "python -c pass": [python, "-c", "pass"],
        "--help": [python, *command("--help")[1:]],
        "--version": [python, *command("--version")[1:]],
        "nothing to do in 100 rows": [python, *command(*flags)[1:]],
    }
    jobs = {name: functools.partial(measure, arguments, folder) for name, arguments in commands.items()}
    done = in_turns(jobs, 5 if quick else 15)
    least = done["python -c pass"].seconds
    rows = [[name, run.seconds * 1000, run.seconds / least] for name, run in done.items()]
    show("start", ("", "ms", "ratio"), rows)


FOUR = (50, 50, 100, 200)  # embeddings/s of four servers
OUTAGE = 3.0, 2.0  # seconds until the fastest is killed, and until it is started again


def servers(folder: Path, quick: bool) -> None:
    """How much of four servers' time is used, without a flag; and when the fastest is killed in mid-run."""
    count = 2_000 if quick else 4_000
    database = make_movies(folder / "servers.db", count, PLOT)
    fresh = copies_of(database)
    rows: list[list[Any]] = []
    for name, engine, killed in [(f"{e}{', one killed' if k else ''}", e, k) for k in (False, True) for e in ENGINES]:
        shares, speeds, used = [], [], []
        for _ in range(3):
            with contextlib.ExitStack() as stack:
                four = [stack.enter_context(Ollama(seconds_per_text=1 / rate, slots=1)) for rate in FOUR]
                away = [0.0]

                def outage(fastest: Ollama = four[-1], away: list[float] = away) -> None:
                    time.sleep(OUTAGE[0])
                    begin = time.monotonic()
                    fastest.kill()
                    time.sleep(OUTAGE[1])
                    fastest.start()
                    away[0] = time.monotonic() - begin

                killer = threading.Thread(target=outage)
                if killed:
                    killer.start()
                others = itertools.chain.from_iterable(("--server", one.url) for one in four[1:])
                run = program(fresh(), four[0].url, *others, "--engine", engine)
                if killed:
                    killer.join()
                entries = [entry for one in four for entry in one.log() if entry["texts"]]
                working = max(e["end"] for e in entries if e["end"]) - min(e["start"] for e in entries)
            with contextlib.closing(sqlite3.connect(database.with_suffix(".copy.db"))) as connection:
                assert connection.execute("SELECT count(*) FROM movie_embeddings").fetchone() == (count,)
            speeds.append(count / run.seconds)
            shares.append(count / (sum(FOUR) * run.seconds - FOUR[-1] * away[0]))
            used.append(count / (sum(FOUR) * working - FOUR[-1] * away[0]))
        rows.append([name, *map(statistics.median, (speeds, shares, used))])
    header = ("", "embeddings/s", "of what is possible", "start-up left out")
    show(f"servers: of {', '.join(map(str, FOUR))} embeddings/s, {count:,} rows", header, rows)


SECTIONS = {
    section.__name__: section
    for section in (memory, throughput, copy, paced, servers, pace, idle, postgres, search, start)
}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="with fewer rows")
    parser.add_argument("--svg", action="store_true", help="draw the figures of the README, too")
    options = parser.parse_args()
    if options.svg:
        drawn.append(ROOT / "tests" / "figures")
    if not SECTIONS.keys() >= set(options.sections):
        parser.error(f"the sections are {', '.join(SECTIONS)}")
    print(f"Python {platform.python_version()} on {platform.system()}, {os.cpu_count()} cores", flush=True)
    for name in options.sections or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="embedgen-bench-") as folder:
            SECTIONS[name](Path(folder), options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
