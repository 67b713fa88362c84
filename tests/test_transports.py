"""HTTP on the wire, by both transports: framing, kept connections, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
import unittest
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import embedgen
from embedgen import Reply, Send, run_now
from tests.ollama import Ollama
from tests.support import ENGINES, ROOT, Case

BODY = b'{"answer": "' + b"x" * 5000 + b'"}'
CHUNKED = (
    b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (BODY[:7], BODY[7:100], BODY[100:])) + b"0\r\n\r\n"
)
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


def exchange(port: int, count: int = 1, timeout: float = 5.0, connect: float = 5.0) -> list[list[Reply]]:
    """Return what each transport makes of `count` requests over one connection."""
    server = embedgen.Server("http", "127.0.0.1", port, "/x", "")
    send = Send("/y", b"{}", timeout, connect)
    blocking = embedgen.BlockingTransport(server, lambda: False)
    replies = [[run_now(blocking.exchange(send)) for _ in range(count)]]
    blocking.close()

    async def streams() -> list[Reply]:
        transport = embedgen.StreamTransport(server, lambda: False)
        found = [await transport.exchange(send) for _ in range(count)]
        transport.close()
        return found

    return [*replies, asyncio.run(streams())]


class Framing(unittest.TestCase):
    """Both transports against a server that says exactly these bytes."""

    def serve(self, *scripts: list[bytes]) -> int:
        """Answer each connection's requests with the next script's bytes, then close it; return the port."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)

        def work() -> None:
            for script in scripts:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    for answer in script:
                        received = b""
                        while not received.endswith(b"{}"):
                            piece = connection.recv(65536)
                            if not piece:
                                break
                            received += piece
                        connection.sendall(answer)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return int(listener.getsockname()[1])

    def test_all_framings(self) -> None:
        for name, answer in {
            "length": PLAIN,
            "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
            "trailers": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED[:-2] + b"A: b\r\n\r\n",
            "until the end": b"HTTP/1.1 200 OK\r\n\r\n" + BODY,
            "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
            "interim": b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN,
        }.items():
            with self.subTest(name):
                for (reply,) in exchange(self.serve([answer], [answer])):
                    self.assertEqual((reply.status, reply.body), (200, BODY))

    def test_answers_that_are_not_whole(self) -> None:
        for name, answer in {
            "nothing": b"",
            "half a status line": PLAIN[:10],
            "half a body": PLAIN[:-9],
            "half a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED[:50],
            "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            "no http": b"SSH-2.0-OpenSSH\r\n\r\n",
            "endless head": b"HTTP/1.1 200 OK\r\n" + b"x" * 300_000,
            "endless chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 300_000,
        }.items():
            with self.subTest(name):
                for (reply,) in exchange(self.serve([answer], [answer])):
                    self.assertEqual((reply.status, reply.timed_out), (0, False))
                    self.assertTrue(reply.reason)

    def test_a_connection_is_kept(self) -> None:
        for replies in exchange(self.serve([PLAIN] * 3, [PLAIN] * 3), count=3):
            self.assertEqual([reply.status for reply in replies], [200] * 3)

    def test_a_kept_connection_that_was_closed_meanwhile_is_replaced(self) -> None:
        for replies in exchange(self.serve([PLAIN], [PLAIN], [PLAIN], [PLAIN]), count=2):
            self.assertEqual([reply.status for reply in replies], [200] * 2)

    def test_but_only_once(self) -> None:
        for replies in exchange(self.serve([PLAIN], [b""], [PLAIN], [b""]), count=2):
            self.assertEqual([reply.status for reply in replies], [200, 0])

    def test_silence(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as mute:  # connects, and says nothing
            for (reply,) in exchange(mute.getsockname()[1], timeout=0.2):
                self.assertEqual((reply.status, reply.timed_out), (0, True))
                self.assertEqual(reply.reason, "no answer within 0.2 s")

    def test_a_connection_that_takes_too_long_is_no_silence(self) -> None:
        async def never(*_: object, **__: object) -> None:
            await asyncio.sleep(60)

        late = mock.Mock(side_effect=socket.timeout("timed out"))
        with mock.patch("socket.create_connection", late), mock.patch("asyncio.open_connection", never):
            for (reply,) in exchange(1, connect=0.2):
                self.assertEqual((reply.status, reply.timed_out), (0, False))
                self.assertEqual(reply.reason, "no connection within 0.2 s")

    def test_retry_after(self) -> None:
        answer = b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n"
        for (reply,) in exchange(self.serve([answer], [answer])):
            self.assertEqual((reply.status, reply.retry_after), (503, 7.0))


@contextlib.contextmanager
def said_to_all(answer: bytes) -> Iterator[int]:
    """Say this to whoever connects, whatever is asked, within the block; gives the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def work() -> None:
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    if over.is_set():
                        return
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):  # what is left unread would turn the end into a reset
                        pass

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:  # without the thread, since later tests fork
            over.set()
            socket.create_connection(listener.getsockname()).close()
            thread.join()


class Loop:
    """An event loop whose clock is moved by hand: the calls that it was asked for, with their times."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, function: Callable[..., None], *arguments: object) -> mock.Mock:
        call = (self.now + seconds, lambda: function(*arguments))
        self.calls.append(call)
        return mock.Mock(cancel=lambda: call in self.calls and self.calls.remove(call))

    def call_soon(self, function: Callable[..., None], *arguments: object) -> mock.Mock:
        return self.call_later(0.0, function, *arguments)

    def turn(self) -> None:
        """Make the calls that are due, and not those that they ask for."""
        due = [call for call in self.calls if call[0] <= self.now]
        self.calls = [call for call in self.calls if call[0] > self.now]
        for _, function in due:
            function()


class Silences(unittest.TestCase):
    """How long a connection may be silent."""

    def setUp(self) -> None:
        self.loop, self.connection = Loop(), mock.Mock()
        patch = mock.patch("asyncio.get_running_loop", lambda: self.loop)
        patch.start()
        self.addCleanup(patch.stop)

    def test_any_sign_of_life_begins_the_time_anew(self) -> None:
        with embedgen.Watch(self.connection, 5.0) as watch:
            for _ in range(4):
                self.loop.now += 4.0
                self.loop.turn()
                self.loop.turn()
                watch.heard()
        self.connection.abort.assert_not_called()
        self.assertEqual(self.loop.calls, [])

    def test_what_arrived_while_the_loop_was_held_up_is_heard_first(self) -> None:
        with embedgen.Watch(self.connection, 5.0) as watch:
            self.loop.now = 60.0
            self.loop.turn()
            watch.heard()
            self.loop.turn()
        self.connection.abort.assert_not_called()

    def test_silence_drops_the_connection(self) -> None:
        for error in (ConnectionError, EOFError):  # as which that shows
            with self.assertRaises(TimeoutError):
                with embedgen.Watch(self.connection, 5.0):
                    self.loop.now += 5.0
                    self.loop.turn()
                    self.loop.turn()
                    self.connection.abort.assert_called_once_with()
                    raise error
            self.connection.reset_mock()


TLS = ROOT / "tests" / "data" / "tls"  # made by the script `make` that lies there; valid to 2120 but for one
AUTHORITY = str(TLS / "root.pem")


def tls_double(name: str, **settings: Any) -> Ollama:
    """Return a double that speaks TLS with one of the certificates."""
    return Ollama(cert=str(TLS / f"{name}.pem"), key=str(TLS / f"{name}.key"), **settings)


class Tls(Case):
    """A real TLS server on loopback, whose certificate is from an authority of its own."""

    def test_a_private_authority_by_flag_or_environment_over_each_protocol_behind_a_path(self) -> None:
        self.make_movies(5)
        with tls_double("good") as server:
            for prefix, path in (("", ""), ("/ollama", ""), ("", "/v1"), ("/x", "/v1")):
                server.configure(prefix=prefix, api=not path)
                for engine in ENGINES:
                    with self.subTest(engine=engine, prefix=prefix, path=path):
                        flags = ("--server", server.url + path, "--engine", engine, "--force")
                        self.succeed(*flags, "--ca-file", AUTHORITY)
                        self.assert_complete()
            self.assertTrue(server.url.startswith("https://"))
            self.succeed("--server", server.url + path, "--force", real=True, env={"SSL_CERT_FILE": AUTHORITY})
            self.assertEqual({e["path"].partition("/embeddings")[0] for e in server.log()[-2:]}, {"/x/v1"})

    def test_certificates_that_are_not_to_be_trusted(self) -> None:
        self.make_movies(5)
        for name, flags, words in (
            ("good", (), ["unknown issuer", "--ca-file"]),
            ("elsewhere", ("--ca-file", AUTHORITY), ["is for another host", "'127.0.0.1'"]),
            ("expired", ("--ca-file", AUTHORITY), ["has expired"]),
        ):
            with tls_double(name) as server:
                for engine, path in itertools.product(ENGINES, ("", "/v1")):
                    with self.subTest(engine=engine, name=name, path=path):
                        words = ["its certificate", server.url, *words]
                        said = self.refuse(3, "--server", server.url + path, "--engine", engine, *flags, words=words)
                        self.assertNotIn("ollama serve", said)  # it is running
                self.assertEqual(server.log(), [])

    def test_the_flag_replaces_the_systems_authorities(self) -> None:
        self.make_movies(1)
        other = self.folder / "other.pem"
        other.write_bytes((TLS / "good.pem").read_bytes())  # an authority of nobody
        with tls_double("elsewhere") as server:
            flags = ("--server", server.url, "--ca-file", other)
            self.refuse(3, *flags, real=True, env={"SSL_CERT_FILE": AUTHORITY}, words=["unknown issuer"])

    def test_a_file_without_authorities_is_refused_before_anything_else(self) -> None:
        empty, junk = self.folder / "empty", self.folder / "junk"
        empty.write_bytes(b"")
        junk.write_bytes(b"certificate")
        none, key = self.folder / "none", TLS / "good.key"
        for path, words in ((empty, "no certificate"), (junk, "no certificate"), (key, "no certificate"),
                            (none, "o such file"), (self.folder, "")):  # fmt: skip
            self.refuse(2, "--ca-file", path, "--database", "sqlite:///nowhere/x.db", words=["--ca-file", words])
        self.refuse(2, "--ca-file", "", words=["--ca-file is empty"])

    def test_one_context_for_the_whole_process_and_it_verifies(self) -> None:
        import ssl

        embedgen.tls_context.cache_clear()
        self.make_movies(20)
        with (
            tls_double("good") as server,
            mock.patch("ssl.create_default_context", wraps=ssl.create_default_context) as made,
        ):
            self.succeed("--server", server.url, "--ca-file", AUTHORITY, "--concurrent", 4, "--batch-size", 1)
            self.assertGreater(len({entry["connection"] for entry in server.log()}), 1)
        made.assert_called_once_with(cafile=AUTHORITY)
        for ca_file in ("", AUTHORITY):
            context = embedgen.tls_context(ca_file)
            self.assertTrue(context.check_hostname)
            self.assertEqual(context.verify_mode, ssl.CERT_REQUIRED)

    def test_http_to_a_server_that_speaks_tls(self) -> None:
        self.make_movies(5)
        with tls_double("good") as server:
            for engine in ENGINES:
                self.refuse(3, "--server", server.url.replace("https", "http"), "--engine", engine, words=["https"])
        with said_to_all(
            b"\x15\x03\x03\x00\x02\x02\x46"
        ) as port:  # as OpenSSL has it: "alert, fatal, protocol version"
            for engine in ENGINES:
                self.refuse(3, "--server", f"http://127.0.0.1:{port}", "--engine", engine, words=["https://"])
        with said_to_all(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n") as port:
            for engine in ENGINES:  # as Go has it
                self.refuse(3, "--server", f"127.0.0.1:{port}", "--engine", engine, words=["speaks TLS", "https://"])

    def test_workers_that_are_spawned_make_their_own_context(self) -> None:
        self.make_movies(5)
        with tls_double("good") as server:
            flags = ("--server", server.url, "--ca-file", AUTHORITY, "--engine", "process")
            process = self.start_program(*flags, START_METHOD="spawn")
            out, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, err), (0, b""), out)
        self.assert_complete()

    def test_https_to_a_server_that_speaks_http(self) -> None:
        self.make_movies(5)
        with said_to_all(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
            for engine in ENGINES:
                address = f"https://127.0.0.1:{port}"
                self.refuse(3, "--server", address, "--engine", engine, words=["does the server speak http?"])


if __name__ == "__main__":
    unittest.main()
