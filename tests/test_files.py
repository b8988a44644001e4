"""Whole files or none."""
import errno
import os

import pytest

from freqseg.files import InputError, atomic_write, sha256, shipped


def names(folder): return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_under_its_name_with_ordinary_permissions(tmp_path):
    with atomic_write(tmp_path/"deep"/"table.md") as partial:
        assert partial.suffix == ".md" and partial.parent == tmp_path/"deep"
        partial.write_text("whole")
    assert names(tmp_path/"deep") == ["table.md"]
    (tmp_path/"plain").write_text("")
    assert (tmp_path/"deep"/"table.md").stat().st_mode == (tmp_path/"plain").stat().st_mode


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_failed_writer_leaves_the_old_file_and_no_litter(tmp_path, failure):
    (tmp_path/"a.txt").write_text("old")
    with pytest.raises(failure):
        with atomic_write(tmp_path/"a.txt") as partial:
            partial.write_text("half")
            raise failure
    assert (tmp_path/"a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_an_input_error_that_names_the_file(tmp_path):
    with pytest.raises(InputError, match="cannot write .*big.npz.*No space left.*choose another folder"):
        with atomic_write(tmp_path/"big.npz"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_a_missing_input_inside_the_writer_is_not_blamed_on_the_disk(tmp_path):
    with pytest.raises(FileNotFoundError):
        with atomic_write(tmp_path/"out.txt"): open(tmp_path/"missing")


def test_a_file_where_a_folder_should_be_says_so(tmp_path):
    (tmp_path/"taken").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        with atomic_write(tmp_path/"taken"/"x.txt"): pass


def test_a_really_full_file_system_leaves_nothing(tmp_path):
    """On a device that is always full, opening for writing works and writing does not."""
    if not os.path.exists("/dev/full"): pytest.skip("this system has no /dev/full")
    with pytest.raises(InputError, match="No space left"):
        with atomic_write(tmp_path/"x.txt") as partial:
            with open("/dev/full", "w") as full: full.write("x"*100_000)
            partial.write_text("never reached")
    assert names(tmp_path) == []


def test_sha256_of_a_known_file(tmp_path):
    (tmp_path/"abc").write_bytes(b"abc")
    assert sha256(tmp_path/"abc").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_shipped_files_are_found_and_missing_ones_are_named():
    assert shipped("README.md").is_file()
    with pytest.raises(InputError, match="nothing.bin should ship"): shipped("nothing.bin")
