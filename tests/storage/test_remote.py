"""Files at URLs: transient errors are retried from the byte where they occurred, and no message has a credential."""

import base64
import errno
import io
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from file_server import serve
from fsspec.implementations.memory import MemoryFileSystem

from stm.storage.remote import Access, fetch, open_url, show_url

QUICK = Access(attempts=3, pause=0.0)
SECRETS = ("hunter2", "signature", "alice", "token")


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = os.urandom(3_000_000)  # several of the pieces in which files are read
    (tmp_path / "a.tar").write_bytes(data)
    return data


def refused(url: str, error: type[Exception], access: Access = QUICK) -> str:
    """The error's message, after a check that neither it nor what is printed with it has a secret."""
    with pytest.raises(error) as caught:
        fetch(url, access)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert not any(secret in f"{caught.value!r} {caught.value}" for secret in SECRETS)
    return str(caught.value)


def test_files_are_read_whole_from_servers_object_stores_folders_and_commands(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    fsspec.filesystem("memory").pipe("/remote/a.tar", content)
    with serve(tmp_path) as server:
        urls = [f"{server.url}/a.tar", "memory://remote/a.tar", f"file://{path}", str(path), f"pipe:cat '{path}'"]
        for url in urls:
            assert fetch(url, QUICK) == content, url


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_is_cut_goes_on_at_its_byte(tmp_path: Path, content: bytes, ranges: bool) -> None:
    with serve(tmp_path, ranges) as server:
        server.faults["a.tar"] = ["cut", 503, "cut"]
        assert fetch(f"{server.url}/a.tar", QUICK._replace(attempts=4)) == content
        starts = [headers.get("Range") for _, headers in server.requests]
        assert starts[0] is None and starts[1] == starts[2] == f"bytes={len(content) // 2}-" and len(starts) == 4


def test_answers_that_are_not_what_was_asked_for(tmp_path: Path, content: bytes) -> None:
    with serve(tmp_path) as server:
        server.faults["a.tar"] = ["cut", "whole"]
        assert fetch(server.url.replace("http", "HTTP") + "/a.tar", QUICK) == content
        server.faults["a.tar"] = ["gzip"]
        assert "compressed (Content-Encoding: gzip)" in refused(f"{server.url}/a.tar", OSError)
        assert len(server.requests) == 3


def test_an_error_that_stays_is_raised_after_all_attempts(tmp_path: Path, content: bytes) -> None:
    with serve(tmp_path) as server:
        server.faults["a.tar"] = [503, 429, 500, 200]
        message = refused(f"{server.url.replace('//', '//alice:hunter2@')}/a.tar?signature=1", OSError)
        assert message == f"[Errno {errno.EIO}] cannot be read (HTTP status 500): '{server.url}/a.tar'"
        assert len(server.requests) == 3
        closed = server.url
    assert "cannot be read (ConnectionRefusedError: Connection refused)" in refused(f"{closed}/a.tar?token", OSError)


@pytest.mark.parametrize("status, error", [(404, FileNotFoundError), (403, PermissionError), (401, PermissionError)])
def test_an_error_that_will_not_pass_is_raised_at_once(tmp_path: Path, status: int, error: type[Exception]) -> None:
    with serve(tmp_path) as server:
        server.faults["a.tar"] = [status]
        assert f"{server.url}/a.tar" in refused(f"{server.url}/a.tar?signature=1", error)
        assert len(server.requests) == 1


def test_user_password_and_headers_reach_the_server(tmp_path: Path, content: bytes) -> None:
    access = Access({"headers": {"X-Key": "token"}}, 1)
    with serve(tmp_path) as server:
        assert fetch(f"{server.url.replace('//', '//alice:hunter%402@')}/a.tar", access) == content
        headers = server.requests[0][1]
    assert headers["X-Key"] == "token" and "token" not in repr(access)
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")) == b"alice:hunter@2"


class UnreliableFile(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        UnreliableStore.fail()
        return super().read(size)


class UnreliableStore(MemoryFileSystem):
    """An object store in memory; opening a file and each read of it raise the next of the faults."""

    protocol = "unreliable"
    faults: ClassVar[list[Exception | None]] = []

    @classmethod
    def fail(cls) -> None:
        if cls.faults and (fault := cls.faults.pop(0)) is not None:
            raise fault

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self.fail()
        file = super().open(path, mode, **options)
        return UnreliableFile(file.getvalue()) if mode == "rb" else file


def test_errors_of_an_object_store_are_retried_and_not_repeated(content: bytes) -> None:
    fsspec.register_implementation("unreliable", UnreliableStore, clobber=True)
    UnreliableStore().pipe("unreliable://remote/b.tar", content)
    secret = "https://bucket/remote/b.tar?signature=hunter2"
    cut = OSError(errno.ECONNRESET, f"reset: {secret}")
    UnreliableStore.faults = [cut, None, None, cut, TimeoutError(secret), None, None]
    assert fetch("unreliable://remote/b.tar", QUICK) == content and not UnreliableStore.faults
    UnreliableStore.faults = [cut] * 3
    assert "cannot be read (ConnectionResetError: Connection reset by peer)" in refused(
        "unreliable://alice@remote/b.tar", OSError
    )
    UnreliableStore.faults = [RuntimeError(secret)]
    assert "cannot be opened (RuntimeError): 'unreliable://remote/b.tar'" in refused(
        "unreliable://remote/b.tar", OSError
    )


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it was not installed
    assert "s3://b/a.tar: fsspec needs another package for this protocol: Install s3fs" in refused(
        "s3://alice:hunter2@b/a.tar", ModuleNotFoundError
    )


def test_a_command_that_fails_is_an_error_after_what_it_printed(tmp_path: Path) -> None:
    message = refused("pipe:printf hello; TOKEN=hunter2; exit 3", OSError)
    assert message.replace(" after 5 bytes", "") == "[Errno 5] cannot be read (the command failed): 'pipe:(command)'"


def test_what_no_file_system_opens_is_named(tmp_path: Path) -> None:
    assert "memory://nothing.tar" in refused("memory://nothing.tar", FileNotFoundError)
    assert "nothing://b/a.tar: not a valid URL, or no file system" in refused("nothing://alice@b/a.tar", ValueError)
    assert "http://h/a b: not a valid URL" in refused("http://alice@h/a b?token", ValueError)
    with pytest.raises(FileNotFoundError, match=r"none\.tar"):
        open_url(str(tmp_path / "none.tar"), QUICK)


def test_shown_urls_have_neither_users_nor_queries_nor_commands() -> None:
    assert show_url("https://u:p@h:80/a/b.tar?X-Signature=s#f") == "https://h:80/a/b.tar"
    assert show_url("simplecache::s3://key:secret@bucket/a.tar") == "simplecache::s3://bucket/a.tar"
    assert show_url("s3://bucket/a@b.tar") == "s3://bucket/a@b.tar"
    assert show_url("pipe:curl -H 'Authorization: x' h") == "pipe:(command)"
    assert show_url("/data/a?b.tar") == "/data/a?b.tar"
