"""Files of rows that are not what they should be: damaged, compressed, in another encoding, too deep. One line each."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adhere.cli import main
from adhere.data import read_rows
from adhere.errors import UserError
from adhere.row_files import MAX_DEPTH
from adhere.toy import model_path

ROW = b'{"prompt": "where is mary ?"}\n'


def told(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


def damaged(path: Path, where: Callable[[bytes], slice], **options: Any) -> Path:
    """A Parquet file of three row groups, whose footer is whole, with zeros in a part of it."""
    rng = random.Random(0)
    rows = [{"prompt": "".join(rng.choice("abcdefgh ") for _ in range(300))} for _ in range(3000)]
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=1000, **options)
    data = bytearray(path.read_bytes())
    part = where(bytes(data))
    data[part] = bytes(len(data[part]))
    path.write_bytes(data)
    return path


def middle(data: bytes) -> slice:
    return slice(len(data) // 2, len(data) // 2 + 4000)


@pytest.mark.parametrize("compression", ["snappy", "gzip", "zstd"])
def test_a_damaged_page_is_told_with_file_and_row_group(tmp_path: Path, compression: str) -> None:
    path = damaged(tmp_path / "rows.parquet", middle, compression=compression)
    message = told(path)
    assert message.startswith(f"{path}:row group 2: cannot be read (")
    assert message.endswith("); the file is damaged: fetch or write it again") and "\n" not in message


def test_a_page_whose_checksum_fails_is_told_though_it_can_be_unpacked(tmp_path: Path) -> None:
    path = damaged(tmp_path / "rows.parquet", middle, compression="none", write_page_checksum=True)
    assert told(path).startswith(f"{path}:row group 2: cannot be read (")


def test_a_page_that_holds_no_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(
        arrow.table({"prompt": ["café noir"] * 5}),
        path,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff", 1))
    assert told(path).startswith(f"{path}:row group 1: cannot be read ('utf-8' codec")


def test_parquet_that_is_cut_or_has_a_column_twice(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.table([["a"], ["b"]], names=["prompt", "prompt"]), path)
    assert told(path) == f"{path}: two columns have one name; rename one"
    whole = damaged(path, lambda data: slice(0, 0)).read_bytes()
    for cut in (whole[: len(whole) // 2], whole[:3], b"", whole[:-8] + bytes(8)):
        path.write_bytes(cut)
        assert told(path) == f"{path}: is not a Parquet file; check the file, or give JSON Lines"


def test_nothing_is_written_of_a_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = damaged(tmp_path / "rows.parquet", middle), tmp_path / "out.jsonl"
    options = ["--prompts", str(path), "--output", str(output), "--device", "cpu"]
    assert main(["rank", "--model", str(model_path("causal")), *options]) == 2
    assert "row group 2" in " ".join(capsys.readouterr().err.split())
    assert [item.name for item in tmp_path.iterdir()] == ["rows.parquet"]


def zipped(data: bytes, folder: Path) -> bytes:
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.writestr("rows.jsonl", data)
    return (folder / "x.zip").read_bytes()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.jsonl.gz", "rows.parquet"])
@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (gzip.compress, "is compressed (gzip); unpack it: gunzip FILE"),
        (bz2.compress, "is compressed (bzip2)"),
        (lzma.compress, "is compressed (xz)"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "is compressed (zstd)"),
        (lambda data: data.decode().encode("utf-16"), "is UTF-16; save the file as UTF-8"),
        (lambda data: b"\xfe\xff" + data.decode().encode("utf-16-be"), "is UTF-16"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "is a pointer of Git LFS"),
    ],
)
def test_a_file_of_another_kind_says_which(
    tmp_path: Path, name: str, packed: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(packed(ROW))
    assert told(path).startswith(f"{path}: {message}")


def test_other_kinds_that_their_name_hides(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(zipped(ROW, tmp_path))
    assert told(path) == f"{path}: is a ZIP archive (or a spreadsheet); unpack it, or save it as CSV"
    path.write_bytes(ROW.decode().encode("utf-16-le"))
    assert told(path) == f"{path}: holds bytes that are no text (UTF-16?); save the file as UTF-8"
    parquet.write_table(arrow.table({"prompt": ["a"]}), path)
    assert told(path) == f"{path}: is a Parquet file; let its name end in .parquet"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_marks_and_line_ends_of_windows_do_no_harm(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    lines = ROW.rstrip() + b"\r\n" if name.endswith("jsonl") else b"prompt\r\nwhere is mary ?\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + lines)
    assert [row.prompt for row in read_rows(path)] == ["where is mary ?"]


def test_objects_inside_objects_have_a_bound(tmp_path: Path) -> None:
    def nested(depth: int) -> str:
        return '{"prompt": "a", "more": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"

    path = tmp_path / "rows.jsonl"
    path.write_text(nested(MAX_DEPTH) + "\n")
    assert len(read_rows(path)) == 1
    wide = json.dumps({"prompt": "a", "more": [[]] * 5 * MAX_DEPTH})  # many lists beside each other are not deep
    for depth in (MAX_DEPTH + 1, 900, 100_000):
        path.write_text(wide + "\n" + nested(depth) + "\n")
        assert told(path).startswith(f"{path}:2: ") and "simplify it" in told(path)


WHOLE = {
    "rows.jsonl": b'{"prompt": [{"role": "user", "content": "hi"}], "chosen": [{"role": "assistant", "content": "x"}], '
    b'"rejected": "no", "answers": {"text": ["a"]}, "candidates": [{"response": "a"}, "b"]}\n' * 2,
    "rows.csv": b"prompt,answers,chosen,candidates\n\"[{'role': 'user', 'content': 'x'}]\",\"['a' 'b']\",c,\"['a']\"\n"
    b"hi,\"{'text': array(['a'], dtype=object)}\",x,\"('a', 'b')\"\n",
}
pieces = st.sampled_from([b"", b"[", b"{", b'"', b"'", b"\n", b"\0", b"\xff", b"nan"])
broken = st.tuples(st.integers(0, 300), st.integers(0, 8), pieces)


@pytest.mark.parametrize("name", WHOLE)
@given(changes=st.lists(broken, min_size=1, max_size=4))
@settings(max_examples=300)
def test_whatever_is_broken_is_read_or_told(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[Any]
) -> None:
    data = bytearray(WHOLE[name])
    for place, length, instead in changes:
        data[place : place + length] = instead
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        assert read_rows(path)
