"""HTTP on the wire, by both transports: framing, kept connections, TLS."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import threading
import unittest
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import embedgen
from embedgen import Reply, Send, run_now
from tests.ollama import Ollama
from tests.support import ENGINES, Case

BODY = b'{"answer": "' + b"x" * 5000 + b'"}'
CHUNKED = (
    b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (BODY[:7], BODY[7:100], BODY[100:])) + b"0\r\n\r\n"
)
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


def exchange(port: int, count: int = 1, timeout: float = 5.0) -> list[list[Reply]]:
    """Return what each transport makes of `count` requests over one connection."""
    server = embedgen.Server("http", "127.0.0.1", port, "/x", "")
    send = Send("/y", b"{}", timeout)
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

    def test_retry_after(self) -> None:
        answer = b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n"
        for (reply,) in exchange(self.serve([answer], [answer])):
            self.assertEqual((reply.status, reply.retry_after), (503, 7.0))


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


@unittest.skipUnless(shutil.which("openssl"), "the command openssl is needed, to make certificates")
class Tls(Case):
    """A real TLS server on loopback, with a root of its own."""

    def certificate(self, name: str, days: str = "2") -> tuple[Path, Path]:
        """Make a self-signed certificate for a name; return it and its key."""
        files = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", days, "-subj", f"/CN={name}",
             "-addext", f"subjectAltName=DNS:{name}" + ",IP:127.0.0.1" * (name == "localhost"),
             "-out", str(files[0]), "-keyout", str(files[1])],
            check=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return files

    def test_a_trusted_certificate(self) -> None:
        self.make_movies(5)
        root, key = self.certificate("localhost")
        with Ollama(cert=str(root), key=str(key)) as server:
            for engine in ENGINES:
                self.assertTrue(server.url.startswith("https://"))
                done = self.run_program("--server", server.url, "--engine", engine, "--force", real=True,
                                        env={"SSL_CERT_FILE": str(root)})  # fmt: skip
                self.assertEqual((done.code, done.err), (0, ""))
                self.assert_complete()

    def test_certificates_that_are_not_to_be_trusted(self) -> None:
        self.make_movies(5)
        root, key = self.certificate("localhost")
        other, other_key = self.certificate("elsewhere")
        for served, served_key, trusted in [(root, key, other), (other, other_key, other)]:
            with Ollama(cert=str(served), key=str(served_key)) as server:
                for engine in ENGINES:
                    with self.subTest(engine=engine, served=served):
                        self.refuse(3, "--server", server.url, "--engine", engine, real=True,
                                    env={"SSL_CERT_FILE": str(trusted)}, words=["certificate"])  # fmt: skip
                self.assertEqual(server.texts(), [])

    def test_https_to_a_server_that_speaks_http(self) -> None:
        self.make_movies(5)
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def work() -> None:
                for _ in ENGINES:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

            threading.Thread(target=work, daemon=True).start()
            for engine in ENGINES:
                address = f"https://127.0.0.1:{listener.getsockname()[1]}"
                self.refuse(3, "--server", address, "--engine", engine, words=["does the server speak http?"])


if __name__ == "__main__":
    unittest.main()
