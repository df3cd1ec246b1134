import pytest

from megatron_gkd.data.cache import CacheFolder
from megatron_gkd.errors import UserError


@pytest.fixture
def cache(tmp_path):
    return CacheFolder(tmp_path / "deep" / "key")


def write(text):
    return lambda folder: (folder / "rows").write_text(text)


def fail(folder):
    (folder / "rows").write_text("half")
    raise UserError("line 3 is bad")


def names(cache):
    return sorted(path.name for path in cache.folder.parent.iterdir())


def test_it_is_built_once(cache):
    cache.build(write("first"))
    cache.build(write("second"))
    assert (cache.open() / "rows").read_text() == "first"
    assert names(cache) == ["key"]


def test_a_failure_is_told_to_who_opens_it_and_leaves_no_half_a_folder(cache):
    with pytest.raises(UserError, match="line 3 is bad"):
        cache.build(fail)
    assert names(cache) == ["key.error"]
    with pytest.raises(UserError, match="^line 3 is bad$"):
        cache.open()


def test_a_failure_is_forgotten_when_it_is_built_again(cache):
    with pytest.raises(UserError):
        cache.build(fail)
    cache.build(write("good"))
    assert (cache.open() / "rows").read_text() == "good"
    assert names(cache) == ["key"]


def test_two_runs_may_build_the_same_folder(cache):
    def write_while_another_run_publishes(folder):
        write("mine")(folder)
        cache.folder.mkdir()
        write("theirs")(cache.folder)

    cache.build(write_while_another_run_publishes)
    assert (cache.open() / "rows").read_text() == "theirs"
    assert names(cache) == ["key"]


def test_a_folder_that_this_process_does_not_see(cache):
    with pytest.raises(UserError, match="key: not there; dataset_cache_dir must be a folder that every process sees"):
        cache.open()
