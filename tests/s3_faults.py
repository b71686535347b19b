"""A proxy before an S3 server that goes wrong on a seeded schedule, as S3 and the network before it do."""

from __future__ import annotations

import hashlib
import http.client
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KINDS = ("slow_down", "internal", "drop", "lost_answer", "truncate", "stall", "stale_listing")

ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
MESSAGES = {"ExpiredToken": "The provided token has expired.", "AccessDenied": "Access Denied"}
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class FaultyS3:
    """Forwards requests to `endpoint`, and lets a share of them fail.

    rate: share of requests that fail, one of `kinds` at random (the same seed and order of requests: the same faults);
    deny: (code, status) that every request is answered with instead, once one whose path holds `deny_from` has come;
    stalls: how many stalls of `stall_seconds` at most.
    ignore_conditions: answer conditional puts as a store that knows none.
    counts: faults injected so far, by kind. Usable as a context manager.
    """

    def __init__(
        self, endpoint: str, rate: float = 0.0, seed: int = 0, kinds: tuple[str, ...] = KINDS,
        stalls: int = 3, stall_seconds: float = 10.0, ignore_conditions: bool = False,
    ) -> None:  # fmt: skip
        self._target = urlsplit(endpoint).netloc
        self.rate, self.kinds, self.deny = rate, kinds, None
        self.deny: tuple[str, int] | None
        self.deny_from = ""
        self.counts: Counter[str] = Counter()
        self.requests = 0
        self._stalls, self._stall_seconds = stalls, stall_seconds
        self._ignore_conditions = ignore_conditions
        self._random, self._lock, self._listings = random.Random(seed), threading.Lock(), dict[str, tuple[Any, bytes]]()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def _any(self) -> None:
                proxy._handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any  # noqa: N815 - http.server's names

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyS3:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _choose(self, method: str, is_list: bool) -> str:
        with self._lock:
            self.requests += 1
            if self._random.random() >= self.rate:
                return ""
            kind = self._random.choice(self.kinds)
            fits = {"truncate": method == "GET", "stale_listing": is_list, "stall": self.counts["stall"] < self._stalls}
            if not fits.get(kind, True):
                kind = "slow_down"
            self.counts[kind] += 1
            return kind

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = self._body(handler)
        query = parse_qs(urlsplit(handler.path).query)
        is_list = handler.command == "GET" and ("list-type" in query or "delimiter" in query)
        if self.deny is not None and self.deny_from in handler.path:
            self.deny_from = ""
            self._answer_error(handler, *self.deny)
            return
        if self._ignore_conditions and handler.command == "PUT" and {"If-Match", "If-None-Match"} & set(handler.headers):
            # As a store that knows no conditions: whatever they say, the put succeeds.
            handler.send_response_only(200)
            handler.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        kind = self._choose(handler.command, is_list)
        if kind == "slow_down":
            self._answer_error(handler, "SlowDown", 503)
        elif kind == "internal":
            self._answer_error(handler, "InternalError", 500)
        elif kind == "drop":
            self._hang_up(handler)
        else:
            if kind == "stall":
                time.sleep(self._stall_seconds)
            response, data = self._forward(handler, body)
            if kind == "lost_answer":
                self._hang_up(handler)
                return
            if kind == "stale_listing" and handler.path in self._listings:
                response, data = self._listings[handler.path]
            elif is_list and response.status == 200:
                self._listings.setdefault(handler.path, (response, data))
            self._answer(handler, response, data, cut=kind == "truncate")

    @staticmethod
    def _body(handler: BaseHTTPRequestHandler) -> bytes:
        if "chunked" not in handler.headers.get("Transfer-Encoding", ""):
            return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        results = b""
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            results += handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
        return results

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(self._target, timeout=60)
        connection.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
        for name, value in handler.headers.items():  # the Host header too: it is signed
            if name.lower() not in HOP and name.lower() != "expect":
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return response, data

    @staticmethod
    def _answer(handler: BaseHTTPRequestHandler, response: http.client.HTTPResponse, data: bytes, cut: bool) -> None:
        handler.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() not in HOP:
                handler.send_header(name, value)
        length = response.headers.get("Content-Length") if handler.command == "HEAD" else str(len(data))
        handler.send_header("Content-Length", length or "0")
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            handler.close_connection = True
            handler.wfile.flush()

    @staticmethod
    def _answer_error(handler: BaseHTTPRequestHandler, code: str, status: int) -> None:
        data = (
            b""
            if handler.command == "HEAD"
            else ERROR.format(code=code, message=MESSAGES.get(code, "Please try again.")).encode()
        )
        handler.send_response_only(status)
        handler.send_header("Content-Type", "application/xml")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    @staticmethod
    def _hang_up(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.connection.close()
