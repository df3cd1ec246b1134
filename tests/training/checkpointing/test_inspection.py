"""What `checkpoint list` and `verify` say of a run's folder, and the links `best` and `last`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

from megatron_gkd import cli
from megatron_gkd.errors import UserError
from megatron_gkd.training.checkpointing.folder import CheckpointFolder, digest
from megatron_gkd.training.checkpointing.inspection import InspectedRun, layout_in_words
from megatron_gkd.training.checkpointing.marks import Marks

LAYOUT = {"processes": 4, "tensor": 2, "pipeline": 2, "context": 1, "expert": 1, "expert_tensor": 1}
LAYOUT |= {"virtual_pipeline": None, "sequence_parallel": True}
SCORES = {2: 0.5, 4: 0.25, 6: None, 8: float("nan")}


def write(folder, step, validation=None, with_optimizer=True):
    run = {"layout": LAYOUT, "with_optimizer": with_optimizer, "identity": {}, "validation": validation}
    unfinished = folder.prepare(step, run | {"progress": {"step": step, "updates": step}})
    (unfinished / "__0_0.distcp").write_bytes(bytes(2000))
    return folder.publish(step, {path.name: digest(path) for path in unfinished.iterdir()})


@pytest.fixture
def output_dir(tmp_path):
    """A run with four checkpoints, a save that was interrupted, one that was set aside, and one without a manifest."""
    folder = CheckpointFolder(tmp_path / "x/checkpoints")
    for step, score in SCORES.items():
        write(folder, step, score, with_optimizer=step > 2)
    write(folder, 7)
    assert folder.set_aside_after(7) == [folder.path / "step-000008.1"]
    folder.prepare(9, {})
    folder.final(10).mkdir()
    assert list(Marks(folder).update()) == []
    return tmp_path / "x"


def test_the_list_shows_all_checkpoints(output_dir, capsys):
    (output_dir / "checkpoints/step-000006/__0_0.distcp").unlink()
    assert cli.main(["checkpoint", "list", str(output_dir)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "step size saved layout optimizer state"
    words = "TP2+SP x PP2, 4 processes"
    states = [(line.split()[0], line.split(":", 1)[-1][3:]) for line in lines[1:]]
    assert states == [
        ("2", f"{words} no whole"),
        ("4", f"{words} yes whole, best"),
        ("6", f"{words} yes damaged: __0_0.distcp: missing"),
        ("7", f"{words} yes whole, last"),
        ("8", f"{words} yes set aside (step-000008.1): the run went back to an earlier step"),
        ("9", "unknown unknown unfinished: being saved, or interrupted"),
        ("10", "unknown unknown manifest.json missing: not a checkpoint"),
    ]
    assert " kB " in lines[1]


def test_a_folder_without_checkpoints(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert cli.main(["checkpoint", "list", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: no checkpoint yet\n"
    assert cli.main(["checkpoint", "verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: no whole checkpoint; there is none\n"
    assert cli.main(["checkpoint", "list", str(tmp_path / "nothing")]) == 2
    assert "no checkpoints there; must be a run's output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(("wanted", "step"), [(None, 7), ("last", 7), ("best", 4), ("2", 2), ("000006", 6)])
def test_a_step_by_its_name(wanted, step, output_dir):
    assert InspectedRun.find(str(output_dir)).choose(wanted) == step
    assert InspectedRun.find(str(output_dir / "checkpoints")).choose(wanted) == step


@pytest.mark.parametrize("place", ["step-000004", "best"])
def test_a_checkpoint_by_its_path(place, output_dir):
    run = InspectedRun.find(str(output_dir / "checkpoints" / place))
    assert run.choose(None) == 4 and run.output_dir == output_dir


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("5", "no whole checkpoint of step 5; there are 2, 4, 6, 7"),
        ("10", "no whole checkpoint of step 10; there are 2, 4, 6, 7"),
        ("x", "STEP = x: must be the number of a step, best or last"),
    ],
)
def test_a_missing_step(wanted, message, output_dir, capsys):
    assert cli.main(["checkpoint", "verify", str(output_dir), wanted]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_no_step_is_the_best_without_a_validation(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    write(folder, 3)
    with pytest.raises(UserError, match="no checkpoint is the best: none was saved in a step with a validation"):
        InspectedRun.find(str(tmp_path)).choose("best")


def test_every_damaged_file_is_named(output_dir, capsys):
    path = output_dir / "checkpoints/step-000004"
    (path / "__0_0.distcp").write_bytes(bytes(1999) + b"\x01")
    (path / "run.json").write_text("{}")
    assert cli.main(["checkpoint", "verify", str(output_dir)]) == 2
    captured = capsys.readouterr()
    assert [line.split(":")[0] for line in captured.out.splitlines()] == [
        str(output_dir / f"checkpoints/step-00000{step}") for step in (2, 6, 7)
    ]
    assert (
        captured.err.splitlines()[0]
        == f"{path / '__0_0.distcp'}: damaged: its SHA-256 is not the one that it was written with"
    )
    assert captured.err.splitlines()[1].startswith(f"{path / 'run.json'}: has 2 bytes; it was written with ")
    assert cli.main(["checkpoint", "verify", str(output_dir), "7"]) == 0
    assert capsys.readouterr().out == f"{output_dir / 'checkpoints/step-000007'}: intact (2 files, 2.3 kB)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list"], "checkpoint list : must be list RUN"),
        (["list", "x", "3"], "checkpoint list x 3: must be list RUN"),
        (["verify", "x", "3", "--lr", "2"], "checkpoint verify x 3 --lr 2: must be verify RUN [STEP]"),
        (["verfy", "x"], "checkpoint verfy: unknown action; the actions are list, verify, export"),
        ([], "checkpoint: the action must come first: list, verify, export"),
        (["export", "x", "--output"], "--output = : must be a folder that does not exist"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert cli.main(["checkpoint", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_help_names_the_options(capsys):
    assert cli.main(["checkpoint", "--help"]) == 0
    text = capsys.readouterr().out
    assert "checkpoint verify RUN [STEP]" in text and "options of checkpoint:\n  --output  " in text


@pytest.mark.parametrize(
    ("action", "code"), [(["list"], 0), (["verify"], 0), (["verify", "5"], 2), (["export", "4"], 2)]
)
def test_no_torch_is_imported(action, code, output_dir):
    """Of `export` that is the refusal: there is no recipe."""
    program = (
        "import sys; from megatron_gkd.cli import main\n"
        f"code = main(['checkpoint', {action[0]!r}, {str(output_dir)!r}, *{action[1:]}])\n"
        "heavy = {'torch', 'transformers', 'megatron.core', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    if action[0] == "export":
        assert f"{output_dir / 'recipe.yaml'}: can't be read" in done.stderr


def test_a_layout_in_words():
    import megatron_gkd.runtime.preload  # noqa: F401  (before Megatron-Core)
    from megatron_gkd.runtime.mesh import Layout

    assert {field.name for field in fields(Layout)} | {"processes"} == LAYOUT.keys() | {"token_multiple"}
    one = {"processes": 1} | vars(Layout())
    assert layout_in_words(one) == "1 process"
    assert layout_in_words(one | {"processes": 6, "context": 3}) == "CP3 x DP2, 6 processes"
    assert layout_in_words(one | {"processes": 2, "expert": 2}) == "EP2 x DP2, 2 processes"
    assert layout_in_words(one | {"processes": 2, "pipeline": 2, "virtual_pipeline": 3}) == "PP2 x VPP3, 2 processes"
    assert layout_in_words([2, 1]) == "unknown"


def test_the_links_follow_the_checkpoints(output_dir):
    folder = CheckpointFolder(output_dir / "checkpoints")
    links = {name: folder.path / name for name in ("best", "last")}
    assert {name: str(link.readlink()) for name, link in links.items()} == {
        "best": "step-000004",
        "last": "step-000007",
    }
    write(folder, 8, 0.25)  # no better
    write(folder, 9, 0.125)
    assert list(Marks(folder).update()) == []
    assert {str(link.readlink()) for link in links.values()} == {"step-000009"}
    shutil.rmtree(folder.final(9))
    assert (Marks(folder).best(), Marks(folder).last()) == (4, 8)
    assert folder.steps() == [2, 4, 6, 7, 8] and folder.newest() == folder.final(8)
    assert not any(path.name in links for path in folder.remove_leftovers())
    moved = output_dir.rename(output_dir.with_name("moved"))
    list(Marks(CheckpointFolder(moved / "checkpoints")).update())
    assert (moved / "checkpoints/best").resolve() == moved / "checkpoints/step-000004"


def test_the_best_is_kept_and_the_newest(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step, score in SCORES.items():
        write(folder, step, score)
    folder.remove_old(1, keep=Marks(folder).best())
    assert folder.steps() == [4, 8]
    folder.remove_old(2, keep=8)
    assert folder.steps() == [4, 8]
    folder.remove_old(1, keep=None)
    assert folder.steps() == [8]


def test_a_file_system_without_links_is_reported_once(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    write(folder, 3)

    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.symlink", refuse)
    marks = Marks(folder)
    (line,) = marks.update()
    assert "the links best and last can't be kept ([Errno 1] Operation not permitted)" in line
    assert list(marks.update()) == [] and marks.last() == 3
