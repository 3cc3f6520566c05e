"""Files are written atomically, deterministically, and never outside their folder."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile

import pyarrow as pa
import pytest

from stm.jobs.journal import Journal
from stm.pretrained.local_files import hash_weights, local_model_files
from stm.storage.files import UnsafePathError, atomic_path, safe_join
from stm.storage.receipts import make_receipt
from stm.storage.tables import DamagedError, read_receipt, read_table, write_table
from stm.storage.tars import TarWriter, read_member


@pytest.mark.parametrize("bad", ["../x", "/etc/passwd", "a/../../x", "a\x00b"])
def test_paths_that_leave_their_root_are_rejected(tmp_path, bad):
    with pytest.raises(UnsafePathError):
        safe_join(tmp_path, bad)


def test_links_that_leave_the_root_are_rejected_and_others_are_not(tmp_path):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "in").symlink_to(root / "a")
    with pytest.raises(UnsafePathError):
        safe_join(root, "out")
    assert safe_join(root, "in") == root / "in"


def test_an_interrupted_write_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_tar_is_deterministic_and_its_member_locations_are_correct(tmp_path):
    contents = {"b.json": b"{}", "a.jpg": bytes(range(256)) * 7, "c.npy": b"", "d.bin": b"x" * 512}
    for name in ("one.tar", "two.tar"):
        with TarWriter(tmp_path / name) as tar:
            members = [tar.add(member, data) for member, data in contents.items()]
            assert not tar._tar.getmembers()  # the list of members does not grow
    raw = (tmp_path / "one.tar").read_bytes()
    assert raw == (tmp_path / "two.tar").read_bytes()
    for member in members:
        data = raw[member.offset : member.offset + member.size]
        assert data == contents[member.name]
        assert hashlib.sha256(data).hexdigest() == member.sha256
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == contents
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar.getmembers()} == {(0, 0, 0, "")}


def test_a_table_is_deterministic_and_contains_its_receipt(tmp_path):
    receipt = make_receipt("frames", {"every": 2}, ["pyarrow", "no-such-library"], seed=3)
    table = pa.table({"key": ["a", "b"], "map": pa.array([[0.5], [1.0]], pa.list_(pa.float16()))})
    for name in ("one", "two"):
        write_table(tmp_path / name, table, receipt)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert read_receipt(tmp_path / "one") == receipt
    assert receipt["versions"]["no-such-library"] == "missing"
    assert read_table(tmp_path / "one").to_pydict() == table.to_pydict()


def test_the_error_for_a_truncated_table_names_the_file(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(path, pa.table({"a": [1]}), {})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t\.parquet"):
        read_table(path)
    with pytest.raises(ValueError, match=r"missing\.parquet"):
        read_table(tmp_path / "missing.parquet")


def test_the_journal_survives_a_kill_and_is_discarded_for_other_settings(tmp_path):
    output = tmp_path / "out.tar"
    code = (
        "import os, sys; from pathlib import Path; from stm.jobs.journal import Journal\n"
        "j = Journal(Path(sys.argv[1]), {'a': 1}); j.put('x', b'one'); j.put('y', b'two'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(output)], check=False).returncode == -9
    journal = Journal(output, {"a": 1})
    assert journal.get("x") == b"one"
    assert journal.get("z") is None
    [part] = [path for path in journal.folder.iterdir() if path.name != "lock"]
    part.write_bytes(part.read_bytes()[:-1])
    journal = Journal(output, {"a": 1})
    assert journal.get("y") is None
    assert journal.get("x") == b"one"
    assert Journal(output, {"a": 2}).get("x") is None
    Journal(output, {"a": 2}).close()
    assert list(tmp_path.iterdir()) == []


def test_local_models_are_inputs_and_hub_ids_are_not(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/model.safetensors").write_bytes(b"1")
    (tmp_path / "m/.hidden").write_bytes(b"2")
    file = (tmp_path / "m/model.safetensors").as_posix()
    assert local_model_files((tmp_path / "m").as_posix()) == [file]
    assert local_model_files(f"local-dir:{tmp_path / 'm'}") == [file]
    assert local_model_files(f"ViT-B-32@{file}") == [file]
    monkeypatch.setenv("HOME", tmp_path.as_posix())  # the stages expand `~`, so this must, too
    assert local_model_files("~/m") == local_model_files("local-dir:~/m") == [file]
    (tmp_path / "run@2").mkdir()
    (tmp_path / "run@2/config.json").write_bytes(b"{}")
    assert local_model_files((tmp_path / "run@2").as_posix()) == [(tmp_path / "run@2/config.json").as_posix()]
    assert local_model_files("ViT-B-32@openai") == local_model_files("owner/name") == local_model_files(None) == []
    before = hash_weights(tmp_path / "m")
    (tmp_path / "m/model.safetensors").write_bytes(b"3")
    assert hash_weights(tmp_path / "m") != before


@pytest.mark.parametrize("offset", [2**63 - 1, -1, 5])
def test_reading_outside_a_tar_is_a_damaged_error(tmp_path, offset):
    (tmp_path / "a.tar").write_bytes(b"123456")
    file = os.open(tmp_path / "a.tar", os.O_RDONLY)
    try:
        assert read_member(file, 2, 3) == b"345"
        with pytest.raises(DamagedError):
            read_member(file, offset, 3)
    finally:
        os.close(file)


def test_reading_a_directory_instead_of_a_tar_is_a_damaged_error(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(DamagedError, match="directory"):
            read_member(folder, 0, 3)
    finally:
        os.close(folder)
