"""Files: whole or absent after any failure, a full disk told in one line, run folders never mixed up."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from adhere import files
from adhere.errors import RunFailed, UserError
from adhere.files import (
    GrowingFile,
    append_jsonl,
    atomic_dir,
    atomic_write,
    require_space,
    sweep,
    to_json,
)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    atomic_write(target, "old")
    atomic_write(target, "né")
    assert target.read_bytes() == b"n\xc3\xa9"
    assert names(target.parent) == ["a.txt"]


def test_who_is_reading_the_old_file_reads_it_to_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    atomic_write(target, "old")
    with target.open() as reader:
        atomic_write(target, "new")
        assert reader.read() == "old"


def test_a_failed_write_keeps_the_old_file_and_no_partial_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    atomic_write(target, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match=r"no room on disk at .*a\.txt: needs 0\.0 MB, has [\d,.]+ MB; free some space"):
        atomic_write(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_is_written_to_directly_and_a_truly_full_one_is_told() -> None:
    with pytest.raises(RunFailed, match="no room on disk at /dev/full"):
        atomic_write("/dev/full", "x")
    assert not Path("/dev/full").is_file()


def test_a_symbolic_link_stays_and_its_target_changes(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic_write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_writing_to_a_folder_or_below_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a folder, a file was to be written"):
        atomic_write(tmp_path, "x")
    with pytest.raises(UserError, match="a part of its path is a file"):
        atomic_write(tmp_path / "file" / "below", "x")
    with pytest.raises(UserError, match="the name is too long"):
        atomic_write(tmp_path / ("n" * 300), "x")
    with pytest.raises(UserError, match="is a file, a folder was to be written"), atomic_dir(tmp_path / "file"):
        pass


def test_no_permission_is_an_input_error_not_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no permission") as caught, files.disk_errors(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert caught.value.exit_code == 2


def test_a_folder_appears_whole_under_its_name_only(tmp_path: Path) -> None:
    with atomic_dir(tmp_path / "step-1") as building:
        (building / "sub").mkdir()
        (building / "sub" / "a").write_text("1")
        assert not (tmp_path / "step-1").exists()
    assert names(tmp_path) == ["step-1"]
    assert (tmp_path / "step-1" / "sub" / "a").read_text() == "1"


def test_a_folder_whose_making_failed_leaves_what_was_there(tmp_path: Path) -> None:
    with atomic_dir(tmp_path / "model") as building:
        (building / "a").write_text("old")

    def fail() -> None:
        with atomic_dir(tmp_path / "model") as building:
            (building / "a").write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "a").read_text() == "old"


def test_a_folder_is_replaced_not_merged(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with atomic_dir(tmp_path / "model") as building:
            (building / name).write_text(name)
    assert names(tmp_path / "model") == ["b"] and names(tmp_path) == ["model"]


def test_a_full_disk_reported_in_words_by_a_library_is_understood(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="no room on disk"), atomic_dir(tmp_path / "model"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert names(tmp_path) == []


def test_a_kill_leaves_only_a_partial_that_the_sweep_removes(tmp_path: Path) -> None:
    script = (
        "import os, sys; from adhere.files import atomic_dir\n"
        "with atomic_dir(sys.argv[1]) as b:\n    (b / 'a').write_text('x'); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "step-1")], env=environment, check=False)
    assert not (tmp_path / "step-1").exists() and len(names(tmp_path)) == 1
    sweep(tmp_path)
    assert names(tmp_path) == []


def test_the_sweep_puts_back_a_folder_that_was_about_to_be_replaced(tmp_path: Path) -> None:
    (tmp_path / ".model.v2.12345678.old").mkdir()
    sweep(tmp_path)
    assert names(tmp_path) == ["model.v2"]
    (tmp_path / ".model.v2.12345678.old").mkdir()
    (tmp_path / ".x.12345678.partial").write_text("")
    sweep(tmp_path)
    assert names(tmp_path) == ["model.v2"]


def test_too_little_space_names_both_figures(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(RunFailed, match=r"needs 1,000,000,000,000\.0 MB, has [\d,.]+ MB") as caught:
        require_space(tmp_path / "not" / "yet", 10**18)
    assert caught.value.exit_code == 1


@dataclass(frozen=True)
class Estimate:
    mean: float
    low: float


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:-3]), "is not as it was written: 16 bytes, and 13"),
    "extended": (
        lambda file: file.write_bytes(file.read_bytes() + b"{}"),
        "is not as it was written",
    ),
    "changed at its end": (lambda file: file.write_bytes(b'{"a": 1}\n{"a":7}'), "is not as it was written"),
    "removed": (lambda file: file.unlink(), "was removed while it was written"),
    "its folder removed": (lambda file: shutil.rmtree(file.parent), "was removed while it was written"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_growing_file_that_is_not_what_it_was_is_never_extended(how: str, tmp_path: Path) -> None:
    change, told = DAMAGE[how]
    file = GrowingFile(tmp_path / "run" / "rows.jsonl")
    file.append(b'{"a": 1}\n')
    file.append(b'{"a":2}')
    change(file.path)
    left = file.path.read_bytes() if file.path.exists() else None
    with pytest.raises(RunFailed, match=told):
        file.append(b"{}\n")
    assert (file.path.read_bytes() if file.path.exists() else None) == left


def test_a_line_is_never_added_to_an_unfinished_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"a": 1})
    append_jsonl(path, {"a": 2})
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(RunFailed, match=r"rows\.jsonl: ends in the middle of a line"):
        append_jsonl(path, {"a": 3})


def test_json_holds_no_nan_and_reads_tensors_paths_and_records() -> None:
    value = {
        "a": float("nan"),
        "b": torch.tensor([1.0, float("inf")]),
        "c": Path("x"),
        "d": Estimate(0.5, 0.25),
        "e": (1,),
    }
    expected = {"a": None, "b": [1.0, None], "c": "x", "d": {"mean": 0.5, "low": 0.25}, "e": [1]}
    assert json.loads(to_json(value)) == expected
    with pytest.raises(TypeError, match="object has no JSON form"):
        to_json({"a": object()})
