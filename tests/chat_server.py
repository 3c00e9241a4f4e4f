"""An OpenAI-compatible server on this machine that keeps what it is asked and misbehaves on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer(ThreadingHTTPServer):
    """behave(number of the request from 1, handler): answers in its own way, or returns False to leave it to `reply`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.paid: list[str] = []
        self.together = self.most_together = 0
        self.lock = threading.Lock()
        self.behave: Callable[[int, Handler], bool] = lambda number, handler: False
        self.reply: Callable[[str], str] = lambda text: f"Said: {text}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append(body)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.paths.append(self.path)
            number = len(server.asked)
            server.together += 1
            server.most_together = max(server.most_together, server.together)
        try:
            if not server.behave(number, self):
                self.good(body)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.lock:
                server.together -= 1

    def good(self, body: dict[str, Any]) -> None:
        asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        text = self.server.reply(asked)
        choice = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        with self.server.lock:
            self.server.paid.append(asked)
        self.send(200, {"choices": [{**choice, "finish_reason": "stop"}], "usage": {"prompt_tokens": 10, "completion_tokens": 5}})

    def send(self, status: int, body: Any, kind: str = "application/json", length: int | None = None, **headers: str) -> bool:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()
        return True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[ChatServer]:
    with ChatServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
