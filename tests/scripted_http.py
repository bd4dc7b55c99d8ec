"""A server on the loopback address that answers DynamoDB's requests by a script: replies in, what came out. Faults are real ones."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["CUT", "RESET", "SILENCE", "Came", "Scripted", "serving"]

#: Instead of an answer: the connection is reset, ends within the answer, or nothing comes.
RESET, CUT, SILENCE = "reset", "cut", "silence"
#: A status and a body, or one of these.
Reply = tuple[int, Any] | str


@dataclass(frozen=True, slots=True)
class Came:
    """A request. Names of *headers* in small letters."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Scripted:
    """``script``: replies to come, the last one for ever; when empty, every statement is taken and no key is there."""

    script: list[Reply] = field(default_factory=list)
    came: list[Came] = field(default_factory=list)
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def next_reply(self, came: Came) -> Reply:
        with self.lock:
            self.came.append(came)
            if self.script:
                return self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if came.headers["x-amz-target"].endswith("BatchGetItem"):
            return 200, {"Responses": {}}
        return 200, {"Responses": [{"TableName": "fs.view"}] * came.body.count(b'"Statement":')}


@contextmanager
def serving(certificate: tuple[Path, Path] | None = None) -> Iterator[Scripted]:
    """A server of its own, with TLS if it has a certificate and its key."""
    scripted = Scripted()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = scripted.next_reply(Came(self.path, headers, self.rfile.read(int(headers["content-length"]))))
            if reply == SILENCE:
                scripted.ended.wait(30)
            if isinstance(reply, str) and reply != CUT:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return
            status, body = (200, b'{"Resp') if isinstance(reply, str) else reply
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/x-amz-json-1.0")
            self.send_header("Content-Length", str(len(content) + 100 * (reply == CUT)))
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = reply == CUT

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Clients go when they like."""

        def shutdown_request(self, request: Any) -> None:
            """Without the polite half: a reset is one."""
            self.close_request(request)

    server = Server(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scripted.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield scripted
    finally:
        scripted.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
