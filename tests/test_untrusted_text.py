"""Names, values and files of others: a terminal gets no control characters, and no reader waits or takes all memory."""

import errno
import gc
import io
import json
import os
import shutil
import signal
import sys
import time
import weakref

import jax
import pytest
from test_sample_cli import save_random_model

from rehyat_jax import convert
from rehyat_jax.cli import INTERRUPTED, NO_READER, report_input_errors
from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.regular import SMALL, check_regular_file
from rehyat_jax.files.shown import closest, shown
from rehyat_jax.files.write import written_whole

# ------------------------------------------------------------------------------------------------------------- text


def test_shown_text_has_no_control_characters_and_a_bounded_size():
    assert shown("a seven, 数字 é") == "a seven, 数字 é"
    assert shown("\x1b[2J\n\t\x07\x9b\u202e\ud800") == r"\x1b[2J\n\t\x07\x9b\u202e\ud800"
    long = shown("begin" + "x" * 10**7 + "end")
    assert len(long) == 200 and long.startswith("begin") and long.endswith("end") and "10000008 characters" in long
    assert len(shown("\x1b" * 199)) <= 200


def test_the_closest_name_to_a_very_long_one_is_found_at_once():
    assert closest("wan_va" + "e" * 10**8, ("space_to_depth", "wan_vae")) == ["wan_vae", "space_to_depth"]


def fail(error):
    raise error


def test_errors_on_the_terminal_are_bounded_and_without_control_characters(capsys):
    name = "\x1b]0;title\x07" + "n" * 50_000_000
    assert report_input_errors(lambda: fail(InputError(f"file.json: found {name}\nerror: forged; correct it"))) == 2
    message = capsys.readouterr().err
    assert message.startswith(r"error: file.json: found \x1b]0;title\x07nnn") and len(message) < 5000
    assert message.endswith("\n  error: forged; correct it\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the system: No space left on device; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/file"), "/a/file: Permission denied; "),
        (MemoryError("cannot allocate 9 TB"), "too little memory (cannot allocate 9 TB); choose smaller"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "too little memory (RESOURCE_EXHAUSTED"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_faults_of_the_machine_are_errors_of_one_line(capsys, error, message):
    assert report_input_errors(lambda: fail(error)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}" if message[0] != "t" or "system" in message else "error: there is ")
    assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize("error", [OSError("an error of a library"), RuntimeError("a bug")], ids=repr)
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        report_input_errors(lambda: fail(error))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_while_python_searches_for_garbage_ends_the_command(capsys):
    def press(phase, _):
        if phase == "start":
            signal.raise_signal(signal.SIGINT)

    def search_and_wait():
        gc.callbacks.append(press)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(press)
        time.sleep(10)
        pytest.fail("was not interrupted")

    assert report_input_errors(search_and_wait) == INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_in_a_finalizer_of_a_search_ends_the_command():
    class InCycle:
        pass

    def search_and_wait():
        found = InCycle()
        found.itself = found
        weakref.finalize(found, signal.raise_signal, signal.SIGINT)
        del found
        gc.collect()
        time.sleep(10)
        pytest.fail("was not interrupted")

    assert report_input_errors(search_and_wait) == INTERRUPTED


@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "PYTHONUNBUFFERED"])
def test_output_without_a_reader_ends_the_command_quietly(capsys, monkeypatch, buffering):
    reader, writer = os.pipe()
    os.close(reader)
    output = io.TextIOWrapper(os.fdopen(writer, "wb", buffering), write_through=not buffering)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        assert report_input_errors(lambda: print("x" * 100_000)) == NO_READER
    output.close()  # the command has replaced the pipe by the null device
    assert capsys.readouterr().err == ""


def test_a_broken_pipe_elsewhere_keeps_its_traceback():
    with pytest.raises(BrokenPipeError):
        report_input_errors(lambda: fail(BrokenPipeError(32, "of a data worker")))


def test_names_that_are_no_text_can_be_printed(capsys):
    assert report_input_errors(lambda: print("wrote \udcff.mp4")) == 0
    assert capsys.readouterr().out == "wrote \\udcff.mp4\n"


# ------------------------------------------------------------------------------------------------------------ files


@pytest.fixture
def alarm():
    """A reader that waits for a pipe fails its test."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for ever"))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def a_pipe(file):
    file.unlink()
    os.mkfifo(file)


def a_device(file):
    file.unlink()
    file.symlink_to("/dev/zero")


def a_directory(file):
    file.unlink()
    file.mkdir()


def of_a_terabyte(file):
    os.truncate(file, 10**12)


KINDS = {
    a_pipe: "found a named pipe",
    a_device: "found a device",
    a_directory: "found a directory",
    of_a_terabyte: "1,000,000,000,000",
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_only_regular_files_of_bounded_size_are_read(tmp_path, alarm, kind):
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    assert read_json_object(file) == {"a": 1}
    check_regular_file(file, largest_bytes=8)
    kind(file)
    with pytest.raises(InputError, match=KINDS[kind]) as error:
        read_json_object(file)
    assert str(file) in str(error.value)


def test_a_file_that_is_missing_or_too_large_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none: cannot be read \(No such file"):
        check_regular_file(tmp_path / "none")
    (tmp_path / "a").write_bytes(bytes(9))
    with pytest.raises(InputError, match="at most 8 bytes, found 9"):
        check_regular_file(tmp_path / "a", largest_bytes=8)
    assert SMALL == 2**26


@pytest.mark.parametrize("kind", [a_pipe, a_directory], ids=lambda kind: kind.__name__)
def test_only_regular_files_are_replaced(tmp_path, kind):
    file = tmp_path / "plan.json"
    file.write_text("")
    kind(file)
    with pytest.raises(InputError, match=r"plan\.json: expected a regular file"), written_whole(file) as temporary:
        temporary.write_text("{}")
    assert not file.is_file() and [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A model checkpoint and the same as a sharded PyTorch folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_random_model(folder / "model")
    convert.convert_to_torch(folder / "model", folder / "torch", "diffusers", max_shard_bytes=10_000)
    return folder


FILES = [
    ("model", "model.json"),
    ("model", "params/_METADATA"),
    ("model", "params/*/.zarray"),
    ("model", "params/*/0*"),
    ("torch", "config.json"),
    ("torch", "rehyat.json"),
    ("torch", "*.index.json"),
    ("torch", "*00001*.safetensors"),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("checkpoint", "pattern"), FILES, ids=str)
def test_no_file_of_a_checkpoint_is_waited_for(checkpoints, tmp_path, capsys, alarm, checkpoint, pattern, kind):
    # Links, because these files are many.
    for file in (checkpoints / checkpoint).rglob("*"):
        place = tmp_path / "source" / file.relative_to(checkpoints / checkpoint)
        place.mkdir(parents=True) if file.is_dir() else place.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            place.symlink_to(file)
    file = next((tmp_path / "source").glob(pattern))
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    kind(file)
    command = {"model": ["to-torch", "--layout", "original"], "torch": ["from-torch"]}[checkpoint]
    assert convert.main([*command, str(tmp_path / "source"), str(tmp_path / "destination")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and file.name in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def params(checkpoints, tmp_path):
    """Arrays of a copy of the model."""
    shutil.copytree(checkpoints / "model", tmp_path / "source")
    return sorted((tmp_path / "source" / "params").glob("*/.zarray"))


def test_chunks_larger_than_their_array_are_refused(params, tmp_path, capsys):
    # TensorStore would end the process, because it cannot allocate them.
    described = json.loads(params[0].read_text())
    params[0].write_text(json.dumps(described | {"chunks": [10**6 for _ in described["chunks"]]}))
    assert convert.main(["to-torch", str(tmp_path / "source"), str(tmp_path / "out"), "--layout", "original"]) == 2
    assert ".zarray: chunks (1000000" in capsys.readouterr().err


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("is_missing", [False, True])
def test_many_damaged_arrays_give_one_message(params, tmp_path, capfd, is_missing):
    # Orbax opens all at once. After the first error, those of the others would be printed by their threads.
    for file in params:
        if is_missing:
            file.parent.rename(file.parent.with_name(f"{file.parent.name}s"))
        else:
            file.write_text(file.read_text().replace("compressor", "compRessor"))
    assert convert.main(["to-torch", str(tmp_path / "source"), str(tmp_path / "out"), "--layout", "original"]) == 2
    gc.collect()
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert ("does not exist" if is_missing else '"compressor"') in error
