"""HTTP on the wire: framing, kept connections, TLS."""

from __future__ import annotations

import asyncio
import socket
import threading
import unittest
from unittest import mock

import embedgen
from embedgen import Endpoint, Request, Response
from tests.support import AUTHORITY, ENGINES, TLS, Case, said_to_all, tls_double, with_engines

BODY = b'{"answer": "' + b"x" * 5000 + b'"}'
CHUNKED = (
    b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (BODY[:7], BODY[7:100], BODY[100:])) + b"0\r\n\r\n"
)
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


def exchange(port: int, count: int = 1, timeout: float = 60.0, body: bytes = b"{}") -> list[Response]:
    """Return what comes of `count` requests over one connection."""
    endpoint = Endpoint("http", "127.0.0.1", port, "/x")
    request = Request("/y", body, timeout)

    async def streams() -> list[Response]:
        connection = embedgen.Connection(endpoint)
        responses = [await connection.exchange(request) for _ in range(count)]
        connection.close()
        return responses

    return asyncio.run(streams())


class Framing(unittest.TestCase):
    """A server that says exactly these bytes."""

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
        }.items():
            with self.subTest(name):
                [reply] = exchange(self.serve([answer]))
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
                [reply] = exchange(self.serve([answer]))
                self.assertEqual((reply.status, reply.timed_out), (0, False))
                self.assertTrue(reply.reason)

    def test_a_connection_is_kept(self) -> None:
        self.assertEqual([reply.status for reply in exchange(self.serve([PLAIN] * 3), count=3)], [200] * 3)

    def test_a_kept_connection_that_was_closed_meanwhile_is_replaced(self) -> None:
        self.assertEqual([reply.status for reply in exchange(self.serve([PLAIN], [PLAIN]), count=2)], [200] * 2)

    def test_but_only_once(self) -> None:
        self.assertEqual([reply.status for reply in exchange(self.serve([PLAIN], [b""]), count=2)], [200, 0])

    def test_silence(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as mute:  # connects, and says nothing
            [reply] = exchange(mute.getsockname()[1], timeout=0.2)
            self.assertEqual((reply.status, reply.timed_out), (0, True))
            self.assertEqual(reply.reason, "no answer within 0.2 s")

    def test_a_connection_that_takes_too_long_is_no_silence(self) -> None:
        async def never(*_: object, **__: object) -> None:
            await asyncio.sleep(60)

        with mock.patch("asyncio.open_connection", never), mock.patch.object(embedgen, "CONNECT_SECONDS", 0.2):
            [reply] = exchange(1)
        self.assertEqual((reply.status, reply.timed_out), (0, False))
        self.assertEqual(reply.reason, "no connection within 0.2 s")

    def test_a_redirect_and_what_serves(self) -> None:
        answer = b"HTTP/1.1 301 Moved\r\nLocation: https://h/\r\nServer: nginx\r\nContent-Length: 0\r\n\r\n"
        [reply] = exchange(self.serve([answer]))
        self.assertEqual(
            (reply.status, reply.headers["location"], reply.headers["server"]), (301, "https://h/", "nginx")
        )

    def test_retry_after(self) -> None:
        answer = b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n"
        [reply] = exchange(self.serve([answer]))
        self.assertEqual((reply.status, reply.headers["retry-after"]), (503, "7"))

    def test_a_server_that_reads_nothing(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        [response] = exchange(listener.getsockname()[1], timeout=0.1, body=b"x" * 8_000_000)  # more than is buffered
        self.assertEqual((response.status, response.timed_out), (0, True))
        self.assertEqual(response.reason, "no answer within 0.1 s")


class Tls(Case):
    """A real TLS server on loopback, whose certificate is from an authority of its own."""

    def test_a_private_authority_by_flag_or_environment_over_each_protocol_behind_a_path(self) -> None:
        self.make_movies(5)
        server = tls_double("good")
        for engine, (prefix, path) in with_engines((("", ""), ("/ollama", ""), ("", "/v1"), ("/x", "/v1"))):
            server.configure(prefix=prefix, api=not path)
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
            ("good", (), ["issuer certificate", "--ca-file"]),
            ("elsewhere", ("--ca-file", AUTHORITY), ["not valid for", "'127.0.0.1'"]),
            ("expired", ("--ca-file", AUTHORITY), ["has expired"]),
        ):
            server = tls_double(name)
            for engine, path in with_engines(("", "/v1")):
                with self.subTest(engine=engine, name=name, path=path):
                    words = ["its certificate", server.url, *words]
                    said = self.refuse(3, "--server", server.url + path, "--engine", engine, *flags, words=words)
                    self.assertNotIn("ollama serve", said)  # it is running
            self.assertEqual(server.log(), [])

    def test_the_flag_replaces_the_systems_authorities(self) -> None:
        self.make_movies(1)
        other = self.folder / "other.pem"
        other.write_bytes((TLS / "good.pem").read_bytes())  # an authority of nobody
        server = tls_double("elsewhere")
        flags = ("--server", server.url, "--ca-file", other)
        self.refuse(3, *flags, real=True, env={"SSL_CERT_FILE": AUTHORITY}, words=["issuer certificate"])

    def test_a_file_without_authorities_is_refused_before_anything_else(self) -> None:
        empty, junk = self.folder / "empty", self.folder / "junk"
        empty.write_bytes(b"")
        junk.write_bytes(b"certificate")
        none, key = self.folder / "none", TLS / "good.key"
        for path, words in ((empty, "no certificate"), (junk, "no certificate"), (key, "no certificate"),
                            (none, "o such file"), (self.folder, "")):  # fmt: skip
            self.refuse(2, "--ca-file", path, "--database", "sqlite:///nowhere/x.db", words=["--ca-file", words])
        self.refuse(2, "--ca-file", "", words=["is not a value"])

    def test_one_context_for_the_whole_process_and_it_verifies(self) -> None:
        import ssl

        embedgen.tls_context.cache_clear()
        self.make_movies(20)
        server = tls_double("good")
        with mock.patch("ssl.create_default_context", wraps=ssl.create_default_context) as made:
            self.succeed("--server", server.url, "--ca-file", AUTHORITY, "--concurrent", 4, "--batch-size", 1)
            self.assertGreater(len({entry["connection"] for entry in server.log()}), 1)
        made.assert_called_once_with(cafile=AUTHORITY)
        for ca_file in ("", AUTHORITY):
            context = embedgen.tls_context(ca_file)
            self.assertTrue(context.check_hostname)
            self.assertEqual(context.verify_mode, ssl.CERT_REQUIRED)

    def test_http_to_a_server_that_speaks_tls(self) -> None:
        self.make_movies(5)
        server = tls_double("good")
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
        server = tls_double("good")
        flags = ("--server", server.url, "--ca-file", AUTHORITY, "--engine", "process")
        process = self.start_program(*flags, START_METHOD="spawn")
        done = self.ended(process)
        self.assertEqual((done.code, done.err), (0, ""), done.out)
        self.assert_complete()

    def test_https_to_a_server_that_speaks_http(self) -> None:
        self.make_movies(5)
        with said_to_all(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
            for engine in ENGINES:
                address = f"https://127.0.0.1:{port}"
                self.refuse(3, "--server", address, "--engine", engine, words=["does the server speak http?"])


if __name__ == "__main__":
    unittest.main()
