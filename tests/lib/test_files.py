"""Files that are whole or not there."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lib.files import clear_leftovers, remove, write_whole


def test_what_was_there_stays_until_the_new_is_whole_and_when_it_fails(tmp_path):
    """Half a file under the right name is read by whoever comes next, and what it has replaced is gone."""
    file = tmp_path / "summary.json"
    file.write_text("old")
    with pytest.raises(OSError, match="disk is full"):
        with write_whole(file) as partial:
            partial.write_text("half of the n")
            assert file.read_text() == "old"
            raise OSError("the disk is full")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(KeyboardInterrupt):  # no Exception
        with write_whole(file) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    with write_whole(file) as partial:
        partial.write_text("new")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_a_folder_replaces_a_folder(tmp_path):
    """A model folder that is written over keeps shards of the old one, which are loaded with the new ones."""
    folder = tmp_path / "best"
    for names in (["config.json", "shard-1"], ["config.json"]):
        with write_whole(folder) as partial:
            partial.mkdir()
            for name in names:
                (partial / name).write_text(str(len(names)))
    assert [file.name for file in folder.iterdir()] == ["config.json"] and (folder / "config.json").read_text() == "1"
    with pytest.raises(ValueError):
        with write_whole(folder) as partial:
            partial.mkdir()
            (partial / "config.json").write_text("half")
            raise ValueError("a tensor that cannot be written")
    assert (folder / "config.json").read_text() == "1" and list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_cannot_be_replaced_keeps_its_name(tmp_path, monkeypatch):
    """The best model so far under another name is lost to whoever looks for it."""
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "weights").write_text("old")

    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        with write_whole(folder) as partial:
            partial.mkdir()
    assert (folder / "weights").read_text() == "old" and list(tmp_path.iterdir()) == [folder]


def test_a_file_never_replaces_a_folder(tmp_path):
    """`--out` that names a folder of somebody's must not cost the folder."""
    path = tmp_path / "x"
    path.mkdir()
    (path / "y").touch()
    with pytest.raises(IsADirectoryError, match="x is a folder"):
        with write_whole(path) as partial:
            partial.write_text("x")
    assert (path / "y").exists() and list(tmp_path.iterdir()) == [path]


def test_leftovers_of_a_killed_process_go(tmp_path):
    """They would fill the disk, a model each time. And a kill between two renames has left the folder without its name:
    what had it before is all that there is, and gets it back."""
    def write(folder, text):
        folder.mkdir()
        (folder / "config.json").write_text(text)

    write(tmp_path / "final", "final")
    for name, text in (("partial-7-8-final", "half"), ("replaced-7-8-final", "older"), ("replaced-7-8-best", "best"),
                       ("partial-7-8-best", "half")):
        write(tmp_path / name, text)
    clear_leftovers(tmp_path)
    assert {path.name: (path / "config.json").read_text() for path in tmp_path.iterdir()} == {"final": "final", "best": "best"}


def test_threads_that_write_the_same_file_do_not_meet(tmp_path):
    """Two decoders that keep the same clip: under one name each would rename the half of the other."""
    start = threading.Barrier(4)

    def write(k):
        with write_whole(tmp_path / "clip") as partial:
            partial.write_text(f"{k}" * 1000)
            start.wait(10)
            partial.write_text(f"{k}" * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    (file,) = tmp_path.iterdir()
    assert file.name == "clip" and file.read_text() in {f"{k}" * 1000 for k in range(4)}


def test_folders_above_are_made(tmp_path):
    with write_whole(tmp_path / "runs" / "toy" / "config.json") as partial:
        partial.write_text("{}")
    assert (tmp_path / "runs" / "toy" / "config.json").read_text() == "{}"


def test_what_is_not_there_can_be_removed(tmp_path):
    remove(tmp_path / "x")
    (tmp_path / "x").symlink_to(tmp_path / "nothing")
    remove(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
