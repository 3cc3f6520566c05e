"""Reads files one after the other from http(s), object stores (fsspec), commands (`pipe:`) and local paths.

Transient errors are retried from the byte at which they occurred. A URL may hold credentials (a password, a signed query
string): messages name it by `show_url`, and do not repeat what a library says of an error, which may contain the whole URL.
"""

import base64
import errno
import io
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast
from urllib.parse import unquote, urlsplit, urlunsplit

import fsspec
import webdataset

PIPE = "pipe:"
_Result = TypeVar("_Result")
_HTTP = ("http", "https")
_CHUNK = 1 << 20  # bytes

# Timeouts, too many requests, and errors of servers and of the proxies before them.
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_REFUSED = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT}


class Access(NamedTuple):
    """How to reach files.

    `options` are fsspec's for the file system (s3: `key`, `secret`, `endpoint_url`, ...); of http(s), `headers` alone.
    """

    options: Mapping[str, Any] = {}
    attempts: int = 5  # to open a file, or to read on after an error
    pause: float = 1.0  # seconds before the second attempt; doubled before each further one
    timeout: float = 60.0  # seconds without a byte from a server, http(s)

    def __repr__(self) -> str:
        return f"Access(attempts={self.attempts}, pause={self.pause}, timeout={self.timeout})"  # options may be secret


def show_url(url: str) -> str:
    """The URL for messages: without user, password, query and fragment; of a command only that it is one."""
    if url.startswith(PIPE):
        return "pipe:(command)"
    if "://" not in url:
        return url
    scheme, _, rest = url.partition("://")
    place = rest.partition("?")[0].partition("#")[0]
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def open_url(url: str, access: Access) -> BinaryIO:
    """Open a file for reading from its start to its end.

    Args:
        url: `http(s)://`, any protocol of fsspec (`s3://`, `gs://`, `memory://`, `file://`, ...), a local path, or `pipe:` and
            a shell command that prints the file: never pass one that comes from data.

    Raises:
        FileNotFoundError, PermissionError: the file is not there, or may not be read.
        OSError: the server still failed after all attempts; also raised by reading.
        ValueError: no file system has the URL's protocol.
        ModuleNotFoundError: the protocol needs a package that is not installed.
    """
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(url, access), _CHUNK))


def fetch(url: str, access: Access) -> bytes:
    """The whole content of a file; see `open_url`."""
    with open_url(url, access) as file:
        return file.read()


class _Unusable(Exception):
    """An answer of a server that cannot be used; its text contains no URL."""


class _Transient(Exception):
    """An error that may not occur again; its text contains no URL."""


class _RemoteFile(io.RawIOBase):
    """A file that is opened again, at the byte after the last one read, after a transient error."""

    def __init__(self, url: str, access: Access) -> None:
        self._url = url
        self._access = access
        self._position = 0
        self._stream: Any = None
        self._size: int | None = None
        self._retry(self._reopen)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._retry(lambda: self._read(memoryview(buffer)))
        self._position += count
        return count

    def close(self) -> None:
        if self._stream is not None:
            # Everything that was needed has been read; the error of a command that ends early would contain the command.
            with suppress(Exception):
                self._stream.close()
        super().close()

    def _retry(self, work: Callable[[], _Result]) -> _Result:
        why = ""
        # A command cannot start in the middle.
        for attempt in range(1 if self._url.startswith(PIPE) else self._access.attempts):
            if attempt:
                time.sleep(self._access.pause * 2 ** (attempt - 1))
            try:
                return work()
            except _Transient as error:
                self._stream = None
                why = str(error)
        place = f" after {self._position} bytes" if self._position else ""
        raise OSError(errno.EIO, f"cannot be read{place} ({why})", show_url(self._url))

    def _reopen(self) -> None:
        with _translated(self._url):
            self._stream, self._size = _open_at(self._url, self._position, self._access)

    def _read(self, view: memoryview) -> int:
        if self._stream is None:
            self._reopen()
        with _translated(self._url):
            data = self._stream.read(len(view))
            if not data and self._url.startswith(PIPE):
                self._stream.close()  # waits for the command, whose failure is an error
        if not data and self._size is not None and self._position < self._size:
            # http.client reports a connection that ended too early as the end of the file.
            raise _Transient(f"the connection ended, of {self._size} bytes")
        view[: len(data)] = data
        return len(data)


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """A block whose errors are raised again without the URL: as `_Transient`, or as what `open_url` documents."""
    try:
        yield
    except _Transient:
        raise
    except Exception as error:
        if "://" not in url and not url.startswith(PIPE):
            raise  # of a local file: it has no credentials, and trying again would not help
        raise _translate(error, url) from None


def _translate(error: Exception, url: str) -> Exception:
    shown = show_url(url)
    if url.startswith(PIPE):
        return _Transient("the command failed")
    if isinstance(error, _Unusable):
        return OSError(errno.EINVAL, str(error), shown)
    if isinstance(error, urllib.error.HTTPError):
        if error.code in _TRANSIENT:
            return _Transient(f"HTTP status {error.code}")
        code = _REFUSED.get(error.code, errno.EINVAL)
        advice = ": are credentials missing, wrong or expired?" if code == errno.EACCES else ""
        return OSError(code, f"HTTP status {error.code}{advice}", shown)
    if isinstance(error, FileNotFoundError | PermissionError):
        code = errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EACCES
        return OSError(code, os.strerror(code), shown)
    if isinstance(error, ImportError):
        return ModuleNotFoundError(f"{shown}: fsspec needs another package for this protocol: {error.msg}")
    if isinstance(error, ValueError | InvalidURL):
        return ValueError(
            f"{shown}: not a valid URL, or no file system of fsspec has its protocol; spaces and letters beyond ASCII must be "
            "percent-encoded, as in a%20b"
        )
    if isinstance(error, OSError | HTTPException | EOFError):
        return _Transient(_describe(error))
    return OSError(errno.EINVAL, f"cannot be opened ({type(error).__name__})", shown)


def _describe(error: Exception) -> str:
    """The error's kind, without its text."""
    reason = getattr(error, "reason", None)  # urllib wraps the errors of connections
    cause = reason if isinstance(reason, Exception) else error
    code = getattr(cause, "errno", None)
    own = isinstance(code, int) and code > 0 and not isinstance(cause, ssl.SSLError)  # ssl has numbers of its own
    return f"{type(cause).__name__}: {os.strerror(code)}" if own and code else type(cause).__name__


def _open_at(url: str, offset: int, access: Access) -> tuple[Any, int | None]:
    """The stream from byte `offset` on, and the whole file's size in bytes if it is known."""
    scheme, separator, _ = url.partition("://")
    if url.startswith(PIPE):
        return webdataset.gopen(url), None
    if not separator:
        return Path(url).open("rb"), None
    if scheme.lower() in _HTTP:
        return _open_http(url, offset, access)
    system, path = fsspec.url_to_fs(url, **access.options)
    stream = system.open(path, "rb", block_size=8 * _CHUNK)
    stream.seek(offset)
    return stream, getattr(stream, "size", None)


def _open_http(url: str, offset: int, access: Access) -> tuple[Any, int | None]:
    parts = urlsplit(url)
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))  # noqa: S310
    # Not sent on to the host of a redirect, which may be another one.
    for name, value in dict(access.options.get("headers", {})).items():
        request.add_unredirected_header(name, value)
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    response = urllib.request.urlopen(request, timeout=access.timeout)  # noqa: S310 (the scheme is checked)
    coding = response.headers.get("Content-Encoding", "identity")
    if coding.lower() != "identity":
        # Not what was asked for, and of a compressed file neither the size nor the byte to go on from is known.
        raise _Unusable(
            f"the server sends it compressed (Content-Encoding: {coding}): let it send the file as it is stored"
        )
    length = response.headers.get("Content-Length")
    size = int(length) if length and length.isdecimal() else None
    first = _first_byte(response, offset) if response.status == 206 else 0
    if first > offset:
        raise _Unusable(f"the server sends it from byte {first} on instead of byte {offset}")
    _skip(response, offset - first)  # some servers send the whole file again
    return response, None if size is None else first + size


def _first_byte(response: Any, asked: int) -> int:
    """The first byte of a partial answer; the one that was asked for if the server does not say."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return asked if found is None else int(found[1])


def _skip(stream: Any, count: int) -> None:
    while count > 0:
        data = stream.read(min(count, _CHUNK))
        if not data:
            raise EOFError
        count -= len(data)
