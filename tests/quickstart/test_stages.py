"""Stages run once for the same inputs."""

import io

import pytest
from quickstart.stages import Runner, Stage, fingerprint
from rich.console import Console


@pytest.fixture
def bench(tmp_path):
    """A source file, and a function that runs the stage made of it and says how often its work was done so far."""
    source, output, runs = tmp_path / "source.txt", tmp_path / "out" / "result.txt", []
    source.write_text("one")

    def work():
        runs.append(source.read_text())
        output.parent.mkdir(exist_ok=True)
        output.write_text("done")

    def run(fresh=False, work=work) -> int:
        runner = Runner(tmp_path / "out" / "stages", Console(file=io.StringIO()), fresh)
        runner.run(Stage("Working", [source], output, work))
        return len(runs)

    return source, output, run


def test_a_second_run_skips_what_is_done(bench):
    _, _, run = bench
    assert [run(), run()] == [1, 1]


def test_changed_inputs_a_missing_output_and_fresh_run_again(bench):
    source, output, run = bench
    assert run() == 1
    source.write_text("two")
    assert run() == 2
    output.unlink()
    assert run() == 3
    assert run(fresh=True) == 4
    assert run() == 4


def test_failed_work_is_not_taken_for_done(bench):
    _, output, run = bench
    run()

    def fail():
        output.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run(fresh=True, work=fail)
    assert run() == 2


def test_a_fingerprint_knows_names_and_contents_of_files_in_folders(tmp_path):
    (tmp_path / "a").write_text("x")
    before = fingerprint([tmp_path])
    (tmp_path / "a").rename(tmp_path / "b")
    renamed = fingerprint([tmp_path])
    (tmp_path / "b").write_text("y")
    assert len({before, renamed, fingerprint([tmp_path])}) == 3
