"""A web server of a folder's files that fails as it is told to."""

import gzip
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FileServer:
    """Its address, the requests so far, and what to do to the next requests of a file.

    `faults[name]` lists, for the next requests: a status to answer with; `cut` to close the connection in the middle; `gzip`
    to send it compressed; `whole` to send all bytes as the part that was asked for.
    """

    def __init__(self, folder: Path, ranges: bool) -> None:
        self.folder = folder
        self.ranges = ranges
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.url = ""

    def names(self) -> list[str]:
        return [name for name, _ in self.requests]


@contextmanager
def serve(folder: Path, ranges: bool = True) -> Iterator[FileServer]:
    """Serve the folder's files on this machine; with `ranges`, from the byte that a client asks for."""
    state = FileServer(folder, ranges)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("?")[0].lstrip("/")
            state.requests.append((name, dict(self.headers.items())))
            fault = state.faults[name].pop(0) if state.faults[name] else None
            path = state.folder / name
            if isinstance(fault, int) or not path.is_file():
                self.send_error(fault if isinstance(fault, int) else 404)
                return
            start, data = self.headers.get("Range") if state.ranges else None, path.read_bytes()
            first = int(start.removeprefix("bytes=").removesuffix("-")) if start and fault != "whole" else 0
            data = gzip.compress(data) if fault == "gzip" else data
            self.send_response(206 if start else 200)
            if fault == "gzip":
                self.send_header("Content-Encoding", "gzip")
            if start:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - first))
            self.end_headers()
            end = first + (len(data) - first) // 2 if fault == "cut" else len(data)
            self.wfile.write(data[first:end])

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
