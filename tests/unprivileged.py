"""What the commands do where they may not read or write. tests/test_permissions.py runs this file without rights."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from test_compare import make_run
from test_sample_cli import arguments as sampling
from test_sample_cli import save_random_model
from tiny_runs import digits_config, write_config

from rehyat_jax import compare, convert, evaluate, plan, prepare, sample, study, surgery, train
from rehyat_jax.files.mp4 import write_video
from rehyat_jax.generation.pipeline import Pipeline


@contextlib.contextmanager
def mode(path: Path, permissions: int):
    """A path with other permissions."""
    before = path.stat().st_mode
    path.chmod(permissions)
    try:
        yield
    finally:
        path.chmod(before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def refused(capsys):
    """(main, arguments, what the error names) -> None, if the command ends with 2 and one line that names it."""

    def run(main, arguments, *words):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and all(str(word) in error for word in words), error

    return run


def test_rights_are_really_missing(tmp_path):
    (tmp_path / "file").write_text("")
    with mode(tmp_path / "file", 0), pytest.raises(PermissionError):
        (tmp_path / "file").read_text()
    with mode(tmp_path, 0o555), pytest.raises(PermissionError):
        (tmp_path / "other").write_text("")


@pytest.mark.parametrize(
    "name", ["model.json", "params", "params/head.modulation/0.0", "params/head.modulation/.zarray"]
)
def test_a_model_that_may_not_be_read_is_named(model, tmp_path, refused, name):
    own = shutil.copytree(model, tmp_path / "own")
    with mode(own / name, 0):
        words = (own / name).name if name != "params/head.modulation/0.0" else "params"
        refused(convert.main, ["to-torch", own, tmp_path / "new", "--layout", "original"], words)
        refused(sample.main, sampling(own, tmp_path / "new.mp4"), words)
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.mp4").exists()


def test_a_pytorch_folder_that_may_not_be_read_is_named(model, tmp_path, refused):
    torch = tmp_path / "torch"
    assert convert.main(["to-torch", str(model), str(torch), "--layout", "diffusers"]) == 0
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        with mode(torch / name, 0):
            refused(convert.main, ["from-torch", torch, tmp_path / "new"], name)
    with mode(torch, 0):
        refused(convert.main, ["from-torch", torch, tmp_path / "new"], torch)
    assert not (tmp_path / "new").exists()


def test_a_conversion_that_may_not_be_replaced_stays_as_it_is(model, tmp_path, refused):
    place = tmp_path / "place"
    command = ["to-torch", model, place / "new", "--layout", "original"]
    place.mkdir()
    with mode(place, 0o555):
        refused(convert.main, command, place / "new")
    assert convert.main([str(argument) for argument in command]) == 0
    before = contents(place)
    with mode(place, 0o555):
        refused(convert.main, [*command, "--force"], place / "new")
    assert contents(place) == before


def test_outputs_that_may_not_be_written_are_found_before_the_work(model, tmp_path, refused, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(Pipeline, "sample_latents", lambda *_, **__: pytest.fail("sampled"))
    monkeypatch.setattr(plan, "make_plan", lambda *_: pytest.fail("planned"))
    write_config(tmp_path / "config.py", digits_config(tmp_path, "finetune"))
    with mode(place, 0o555):
        refused(sample.main, sampling(model, place / "new.mp4"), place / "new.mp4")
        planning = [f"--config={tmp_path / 'config.py'}", "--topology=v5e:1x1", f"--json={place / 'plan.json'}"]
        refused(plan.main, planning, place / "plan.json")
        refused(evaluate.main, ["--teacher", model, "--student", model, "--out", place / "new"], place / "new")


def test_a_run_that_may_not_write_or_read_says_where(tmp_path, refused):
    workdir = tmp_path / "run"
    config = digits_config(tmp_path, "finetune", steps=3, checkpoint_every=100, batch_size=8)
    write_config(tmp_path / "config.py", config)
    command = [f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}"]
    with mode(tmp_path / "config.py", 0):
        refused(train.main, command, "config.py")
    workdir.mkdir()
    with mode(workdir, 0o555):
        refused(train.main, command, workdir)
    assert train.main(command) == 0

    # The same run with three more steps.
    more, before = [*command, "--config.steps=6"], contents(workdir / "checkpoints")
    for name, permissions in (("checkpoints", 0o555), ("checkpoints/3", 0)):
        with mode(workdir / name, permissions):
            refused(train.main, more, *name.split("/"))
        assert contents(workdir / "checkpoints").items() >= before.items(), name
    assert train.main(more) == 0


def test_a_video_that_may_not_be_read_is_read_later(tmp_path, refused, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(3):
        write_video(videos / f"{number}.mp4", np.full((8, 16, 16, 3), number / 3))
    rows = [json.dumps({"file": f"{number}.mp4", "caption": f"number {number}"}) for number in range(3)]
    (videos / "captions.jsonl").write_text("\n".join(rows))
    command = [videos, tmp_path / "data", "--size", "5x16x16"]
    with mode(videos / "captions.jsonl", 0):
        refused(prepare.main, command, "captions.jsonl")
    with mode(videos / "1.mp4", 0):
        refused(prepare.main, command, "1.mp4")
    with mode(tmp_path / "data", 0o555):
        refused(prepare.main, command, "data")
    assert prepare.main([str(argument) for argument in command]) == 0
    assert "3 examples" in capsys.readouterr().out


def test_shards_and_tables_that_may_not_be_read_are_read_later(tmp_path, refused):
    source = tmp_path / "source"
    source.mkdir()
    write_video(source / "0.mp4", np.zeros((4, 8, 8, 3)))
    video = (source / "0.mp4").read_bytes()
    (source / "0.mp4").unlink()
    for name, write in {
        "0.parquet": lambda file: pq.write_table(pa.table({"video": [video], "caption": ["a"]}), file),
        "0.tar": lambda file: write_shard(file, video),
    }.items():
        write(source / name)
        command = [source / name, tmp_path / f"data of {name}", "--size", "4x8x8"]
        with mode(source / name, 0):
            refused(prepare.main, command, name)
        assert prepare.main([str(argument) for argument in command]) == 0


def write_shard(file: Path, video: bytes) -> None:
    with webdataset.TarWriter(str(file)) as writer:
        writer.write({"__key__": "0", "mp4": video, "txt": "a"})


def test_comparisons_and_studies_that_may_not_read_or_write_say_where(tmp_path, refused):
    runs, place = [make_run(tmp_path / name, [2.0, 1.0]) for name in ("a", "b")], tmp_path / "place"
    events = next((runs[0] / "tensorboard").iterdir()).name
    for name in ("config.json", "metrics.jsonl", f"tensorboard/{events}"):
        with mode(runs[0] / name, 0):
            refused(compare.main, runs, Path(name).name)
    place.mkdir()
    with mode(place, 0o555):
        refused(compare.main, [*runs, "--out", place / "new.md"], place / "new.md")
        refused(study.main, ["configs/studies/stabilizer.py", "--workdir", place / "study"], place / "study")
        options = ["--config.init_from=assets/demo_teacher", "--budget", "0.5", "--workdir", place / "surgery"]
        refused(surgery.main, ["--config", "configs/demo_distill.py", *options], place / "surgery")
    with mode(place, 0):
        refused(study.main, ["--render", tmp_path / "new.md", place / "study.json"], "study.json")
    assert not (tmp_path / "new.md").exists()
