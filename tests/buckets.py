"""An S3 on loopback, and a proxy before it that spoils one request."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("busy", "reset before", "reset after", "short", "slow", "error after")
_HOP = {"transfer-encoding", "connection", "content-length"}


class FaultyProxy:
    """Passes requests on to an S3 server; request number `at` meets the fault `kind`.

    busy: 503, not passed on. reset before, reset after: the connection ends without an answer, before or after the
    request was passed on: the answer to a successful put is lost. error after: it is passed on and answered by 500.
    short: the answer breaks off in the middle. slow: it takes its time.
    """

    def __init__(self, upstream_port: int) -> None:
        self.num_requests, self.at, self.kind = 0, -1, ""
        self.lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                """Silence."""

            def handle_one(self) -> None:
                with proxy.lock:
                    number, proxy.num_requests = proxy.num_requests, proxy.num_requests + 1
                kind = proxy.kind if number == proxy.at else ""
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if kind == "busy":
                    self.answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
                    return
                if kind == "reset before":
                    self.close_connection = True
                    self.connection.close()
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", upstream_port, timeout=60)
                upstream.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k != "Host"})
                response = upstream.getresponse()
                data = response.read()
                if kind == "reset after":
                    self.close_connection = True
                    self.connection.close()
                    return
                if kind == "error after":
                    self.answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
                    return
                if kind == "slow":
                    threading.Event().wait(0.5)
                headers = {k: v for k, v in response.getheaders() if k.lower() not in _HOP}
                length = response.getheader("Content-Length") if self.command == "HEAD" else len(data)
                self.answer(response.status, headers, data, short=kind == "short", length=length)

            def answer(self, status, headers, data, short=False, length=None) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(length if length is not None else len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if short else data)
                    self.wfile.flush()
                if short:
                    self.close_connection = True
                    self.connection.close()

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_one  # names of http.server

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def spoil(self, at: int, kind: str) -> None:
        """Begin to count anew, and spoil that request."""
        with self.lock:
            self.num_requests, self.at, self.kind = 0, at, kind


@contextmanager
def s3(monkeypatch) -> Iterator[FaultyProxy]:
    """A server with one bucket, "bucket", behind a proxy; the environment leads there."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    proxy = FaultyProxy(port)
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT": proxy.url,
        "AWS_ALLOW_HTTP": "true",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        request = http.client.HTTPConnection("127.0.0.1", port)
        # All of moto's servers in a process have the same buckets.
        for method, path in (("POST", "/moto-api/reset"), ("PUT", "/bucket")):
            request.request(method, path)
            response = request.getresponse()
            response.read()
            assert response.status == 200
        yield proxy
    finally:
        proxy.server.shutdown()
        server.stop()
