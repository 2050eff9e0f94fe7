"""Runs the commands with hostile arguments and damaged files as processes, and checks how each of them ends.

    python tests/fuzz_commands.py [--cases 200] [--first 0] [--seed 0] [--only NUMBER ...]

A case is a valid command line with one or two changes: of an argument, or of a file that the command reads. Seed and
number determine a case. Processes are forked from this one, which has imported the program, so that a case takes a
second and not five. A command must

- end with one of its documented exit codes, without a traceback,
- explain exit code 2 on standard error, shortly, without control characters,
- then have written no result, and left no temporary files,
- stay within 2 GiB of memory and a minute, unless an argument asks for more work. Ctrl-C must end that work.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import numpy as np

from rehyat_jax import HybridConfig, compare, convert, evaluate, plan, prepare, sample, study, train
from rehyat_jax.cli import INTERRUPTED
from rehyat_jax.files.mp4 import write_video
from rehyat_jax.training.config import default_config
from rehyat_jax.weights import load_params, save_model

# Twice what a valid command needs on a slow machine.
SECONDS, MORE_SECONDS = 60, 45
MEMORY = 2 * 2**30
ADDRESSES = 24 * 2**30
LARGEST_FILE = 2**30
LONGEST_REPORT = 8000
"""Characters that a failed command may print. argparse repeats its usage."""

HOSTILE = (
    *(
        "",
        " ",
        "-1",
        "0",
        "1",
        "7",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "0.5",
        "1e-300",
        "99999999999999999999",
        "2147483648",
    ),
    *("True", "None", "[]", "{}", "(", "')", "a'b", "--", "--help", "-h", "all", "()", "(0.5,)", "('a',)", "0x10"),
    *("\udcff\udcfe", "\x1b[31mred\x1b[0m", "line\nbreak", "\r", "é", "日本", "x" * 300, "y" * 70_000),
    *("1x1x1", "0x0x0", "99999x99999x99999", "5x-1x8", "v5e:4x4", "h100:8", "v5e:0x0", "v5e:99999x99999", "bfloat16"),
)
"""Values of any argument."""

PATHS = (
    "missing",
    "missing/deep/down",
    "file",
    "file/below",
    "pipe",
    "loop",
    "zero",
    "null",
    "empty",
    ".",
    "..",
    "huge",
)
"""Values of arguments that are paths, in the folder of the case; see `hostile_places`."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command and valid arguments of it.

    Attributes:
      inputs: files and folders that it reads.
      results: files and folders that only success creates.
      codes: exit codes that it may end with, in addition to 0, 2 and Ctrl-C's.
      weight: how often it is drawn. Commands that take five seconds when all is well are drawn less often.
    """

    main: Callable[[list[str]], int]
    arguments: tuple[tuple[str, ...], ...]
    inputs: tuple[str, ...]
    results: tuple[str, ...]
    codes: tuple[int, ...] = ()
    weight: float = 1.0


SMALL_VIDEO = (("--steps", "2"), ("--frames", "2"), ("--height", "8"), ("--width", "16"))
SMALL_WAN_VIDEO = (("--steps", "2"), ("--frames", "5"), ("--size", "32x32"))
COMMANDS = {
    "from-torch": Command(convert.main, (("from-torch",), ("torch",), ("new",)), ("torch",), ("new",)),
    "to-torch": Command(
        convert.main, (("to-torch",), ("model",), ("new",), ("--layout", "original")), ("model",), ("new",)
    ),
    "without-base": Command(
        convert.main,
        (("to-torch",), ("student",), ("new",), ("--layout", "diffusers"), ("--without-base", "base")),
        ("student", "base"),
        ("new",),
    ),
    "publish": Command(convert.main, (("publish",), ("branch",), ("--repo", "me/student")), ("branch",), ()),
    "sample": Command(
        sample.main,
        (("--checkpoint", "model"), ("--prompt", "a seven"), ("--out", "new.mp4"), *SMALL_VIDEO),
        ("model",),
        ("new.mp4",),
    ),
    "sample-prompts": Command(
        sample.main,
        (
            ("--checkpoint", "model"),
            ("--prompts", "prompts.txt"),
            ("--out", "new"),
            ("--seeds", "1", "2"),
            *SMALL_VIDEO,
        ),
        ("model", "prompts.txt"),
        (),
    ),
    "sample-wan": Command(
        sample.main,
        (("--models", "pipeline"), ("--prompt", "a cat"), ("--out", "new.mp4"), ("--contact-sheet",), *SMALL_WAN_VIDEO),
        ("pipeline",),
        ("new.mp4",),
        weight=0.3,
    ),
    "sample-latents": Command(
        sample.main,
        (("--models", "pipeline"), ("--latents", "latents.safetensors"), ("--out", "new.mp4")),
        ("pipeline", "latents.safetensors"),
        ("new.mp4",),
    ),
    "sample-continue": Command(
        sample.main,
        (
            ("--checkpoint", "student"),
            ("--stream",),
            ("--continue", "student.mp4"),
            ("--prompt", "a seven"),
            ("--longest", "4"),
            ("--out", "new.mp4"),
            *SMALL_VIDEO,
        ),
        ("student", "student.mp4"),
        ("new.mp4",),
    ),
    "sample-show": Command(sample.main, (("--show", "student.mp4"),), ("student.mp4",), ()),
    "prepare": Command(
        prepare.main,
        (("videos",), ("new",), ("--size", "5x8x8"), ("--workers", "2")),
        ("videos",),
        ("new/dataset.json",),
    ),
    "prepare-wan": Command(
        prepare.main,
        (
            ("videos",),
            ("new",),
            ("--codec", "wan_vae"),
            ("--text-encoder", "umt5"),
            ("--models", "pipeline"),
            ("--size", "5x16x16"),
            ("--store", "bfloat16"),
        ),
        ("videos", "pipeline/vae", "pipeline/text_encoder", "pipeline/tokenizer", "pipeline/model_index.json"),
        ("new/dataset.json",),
        weight=0.3,
    ),
    "prepare-shards": Command(
        prepare.main,
        (("tar_shards",), ("new",), ("--size", "5x8x8"), ("--caption", "caption"), ("--workers", "2")),
        ("tar_shards",),
        ("new/dataset.json",),
    ),
    "prepare-table": Command(
        prepare.main,
        (("table",), ("new",), ("--size", "5x8x8"), ("--video", "video"), ("--caption", "caption")),
        ("table",),
        ("new/dataset.json",),
    ),
    "latents-table": Command(
        prepare.main,
        (
            *(("latents",), ("saved_table",), ("new",), ("--codec", "space_to_depth")),
            *(("--text-encoder", "word_vectors"), ("--normalised", "yes"), ("--layout", "THWC")),
        ),
        ("saved_table",),
        ("new/dataset.json",),
    ),
    "latents-fastvideo": Command(
        prepare.main,
        (
            *(("latents",), ("fastvideo",), ("new",), ("--codec", "wan_vae")),
            *(("--text-encoder", "umt5"), ("--normalised", "no"), ("--unit", "2")),
        ),
        ("fastvideo",),
        ("new/dataset.json",),
    ),
    "trajectories": Command(
        prepare.main,
        (("teacher-trajectories",), ("model",), ("new",), ("--prompts", "prompts.txt"), ("--keep", "1"), *SMALL_VIDEO),
        ("model", "prompts.txt"),
        ("new/dataset.json",),
    ),
    "train": Command(
        train.main,
        (
            ("--config", "config.py"),
            ("--workdir", "new"),
            ("--config.init_from=model",),
            ("--config.data.source=prepared",),
            ("--config.data.path=data",),
            ("--config.steps=2",),
        ),
        ("config.py", "model", "data"),
        ("new/model",),
        (4,),
        weight=0.3,
    ),
    "evaluate": Command(
        evaluate.main,
        (
            *(("--teacher", "model"), ("--student", "student"), ("--out", "new"), ("--data", "data")),
            *(("--examples", "2"), ("--levels", "1"), ("--samples", "2"), ("--prompts", "prompts.txt")),
            *SMALL_VIDEO,
        ),
        ("model", "student", "data", "prompts.txt"),
        ("new/evaluation.json",),
        weight=0.3,
    ),
    "plan": Command(
        plan.main,
        (("--config", "config.py"), ("--topology", "v5e:1x1"), ("--json", "new.json"), ("--frames", "x")),
        ("config.py",),
        ("new.json",),
        (3,),
    ),
    "plan-sample": Command(
        plan.main,
        (
            ("--sample",),
            ("--preset", "tiny"),
            ("--topology", "v5e:1x1"),
            ("--hybrid-blocks", "all"),
            ("--stream",),
            ("--json", "new.json"),
            ("--frames", "x"),
        ),
        (),
        ("new.json",),
        (3,),
    ),
    "compare": Command(compare.main, (("run_a",), ("run_b",), ("--out", "new.md")), ("run_a", "run_b"), ("new.md",)),
    "study-render": Command(study.main, (("--render", "new.md"), ("study.json",)), ("study.json",), ("new.md",)),
}
"""Plans compile for minutes, so their own command lines are never valid."""

CONFIG = """
from rehyat_jax.training.config import default_config
from rehyat_jax.weights import load_params, save_model

def get_config():
    config = default_config()
    config.stage, config.dtype, config.batch_size, config.optimizer.warmup_steps = "distill", "float32", 2, 1
    config.hybrid.blocks, config.hybrid.chunk_frames, config.hybrid.feature_map.features = "all", 2, 16
    config.log_every = 1
    return config
"""


def make_inputs(folder: Path) -> None:
    """Valid inputs of all commands, made by the commands themselves."""
    sys.path.insert(0, str(Path(__file__).parent))
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from test_compare import make_run
    from test_pipeline import save_random_pipeline
    from test_prepare_sources import fastvideo_row, write_fastvideo, write_shards
    from test_sample_cli import CONFIG as MODEL
    from test_sample_cli import save_random_model
    from test_study import record, write_record

    os.chdir(folder)
    save_random_model(folder / "model")
    form = HybridConfig(chunk_frames=1, overlap_frames=1, causal=True)
    save_random_model(folder / "student", config=dataclasses.replace(MODEL, hybrid_blocks="all", hybrid=form))
    wan, params, names = load_params("student")
    del params["feature_maps"]
    save_model("base", wan.replace(hybrid_blocks=()), params, **names)
    branch = ["to-torch", "student", "branch", "--layout", "diffusers", "--without-base", "base"]
    assert convert.main([*branch, "--base-name", "owner/wan"]) == 0
    save_random_pipeline(folder)
    os.rename("folder", "pipeline")
    make_run(Path("run_a"), [3.0, 2.0])
    make_run(Path("run_b"), [3.0, 1.0], seed=1)
    write_record(record({"Tc 1": [0.4, 0.6], "Tc 3": [0.2, 0.3]}), Path("study.json"))
    Path("config.py").write_text(CONFIG)
    Path("prompts.txt").write_text("a seven\na three\n")
    Path("videos").mkdir()
    for number in range(4):
        write_video(Path(f"videos/{number}.mp4"), np.random.default_rng(number).random((8, 16, 16, 3)))
    rows = [json.dumps({"file": f"{number}.mp4", "caption": f"number {number}"}) for number in range(4)]
    Path("videos/captions.jsonl").write_text("\n".join(rows))
    videos = [Path(f"videos/{number}.mp4").read_bytes() for number in range(4)]
    write_shards(Path("tar_shards"), [*videos, *videos[:2]])
    Path("table").mkdir()
    pq.write_table(pa.table({"video": videos, "caption": list("abcd")}), "table/0.parquet", row_group_size=2)
    latents = np.random.default_rng(0).normal(size=(4, 2, 2, 2, 16)).tolist()
    datasets.Dataset.from_dict({"latents": latents, "caption": list("abcd")}).save_to_disk("saved_table")
    write_fastvideo(Path("fastvideo"), [fastvideo_row(number) for number in range(4)])
    assert convert.main(["to-torch", "model", "torch", "--layout", "diffusers"]) == 0
    assert prepare.main(["videos", "data", "--size", "5x8x8"]) == 0
    small = [text for option in SMALL_VIDEO for text in option]
    student = ["--checkpoint", "student", "--stream", "--prompt", "a seven", "--out", "student.mp4", *small]
    assert sample.main(student) == 0
    small = [text for option in SMALL_WAN_VIDEO for text in option]
    wan = ["--models", "pipeline", "--prompt", "a cat", "--out", "latents.mp4", "--keep-latents", *small]
    assert sample.main(wan) == 0


def hostile_places(folder: Path) -> None:
    """What `PATHS` names. Devices are the case's own, since a faulty program could replace the machine's."""
    (folder / "file").write_text("not what was expected")
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    with (folder / "huge").open("wb") as huge:
        huge.truncate(2**40)
    for name, minor in (("null", 3), ("zero", 5)):
        with contextlib.suppress(PermissionError):
            os.mknod(folder / name, 0o666 | 0o020000, os.makedev(1, minor))


def damaged(path: Path, draw: random.Random) -> str:
    """Damages one file; returns what was done."""
    content = path.read_bytes()
    at = draw.randrange(len(content) + 1)
    match draw.choice(
        ("flip", "cut", "longer", "noise", "nothing", "delete", "folder", "pipe", "loop", "huge", "swap")
    ):
        case "flip" if content:
            at = min(at, len(content) - 1)
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
            return f"bit of byte {at} flipped"
        case "cut":
            path.write_bytes(content[:at])
            return f"cut to {at} bytes"
        case "longer":
            path.write_bytes(content + draw.randbytes(1000))
            return "1000 bytes appended"
        case "noise":
            path.write_bytes(draw.randbytes(1000))
            return "replaced by 1000 random bytes"
        case "delete":
            path.unlink()
            return "deleted"
        case "folder":
            path.unlink()
            path.mkdir()
            return "replaced by a folder"
        case "pipe":
            path.unlink()
            os.mkfifo(path)
            return "replaced by a pipe"
        case "loop":
            path.unlink()
            path.symlink_to(path.name)
            return "replaced by a link to itself"
        case "huge":
            with path.open("r+b") as file:
                file.truncate(2**40)
            return "made 1 TiB long"
        case "swap":
            words = [word for word in (b"1", b"2", b"8", b'"', b"{", b"[", b"F32", b"a") if word in content]
            if words:
                word, other = (
                    draw.choice(words),
                    draw.choice((b"-1", b"9" * 30, b"NaN", b"\x1b[31m", b"\xff", b"null", b"[]")),
                )
                path.write_bytes(content.replace(word, other, draw.choice((1, 1, -1))))
                return f"{word!r} replaced by {other!r}"
    path.write_bytes(b"")
    return "emptied"


@dataclasses.dataclass
class Case:
    command: str
    argv: list[str]
    changes: list[str]
    asks_for_more: bool


def make_case(draw: random.Random, inputs: Path, folder: Path) -> Case:
    """Draws a case, and fills its folder with the inputs."""
    name = draw.choices(list(COMMANDS), [command.weight for command in COMMANDS.values()])[0]
    command = COMMANDS[name]
    for path in command.inputs:
        source = inputs / path
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copytree(source, folder / path) if source.is_dir() else shutil.copy(source, folder / path)
    hostile_places(folder)
    groups, changes, asks_for_more = [list(group) for group in command.arguments], [], True
    for _ in range(draw.choice((1, 1, 2))):
        if draw.random() < 0.5 and command.inputs and name != "plan":
            files = sorted(
                file
                for path in command.inputs
                for file in ([folder / path] if (folder / path).is_file() else (folder / path).rglob("*"))
                if file.is_file() and not file.is_symlink() and file.stat().st_size < LARGEST_FILE
            )
            if files:
                file = draw.choice(files)
                changes.append(f"{file.relative_to(folder)} {damaged(file, draw)}")
                asks_for_more = False
            continue
        value = draw.choice(HOSTILE) if draw.random() < 0.7 else draw.choice(PATHS)
        match draw.choice(("replace", "replace", "replace", "drop", "twice", "unknown", "field")):
            case "replace" if groups:
                group = draw.choice(groups)
                key, equals, _ = group[-1].partition("=")
                group[-1] = f"{key}={value}" if equals else value
                change = group
            case "drop" if groups:
                change = ["without", *groups.pop(draw.randrange(len(groups)))]
            case "twice" if groups:
                change = list(draw.choice(groups))
                groups.append(change)
            case "field" if name in ("train", "plan"):
                fields = sorted(_fields(default_config().to_dict()))
                change = [f"--config.{draw.choice(fields)}={value}"]
                groups.append(change)
            case _:
                change = [draw.choice(("--unknown", "--force", "extra", "--steps", "--config.unknown")), value]
                groups.append(change)
        changes.append(" ".join(change))
    argv = [text for group in groups for text in group]
    return Case(name, argv, changes, asks_for_more)


def _fields(config: dict, prefix: str = "") -> list[str]:
    names = []
    for name, value in config.items():
        names += _fields(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return names


@dataclasses.dataclass
class End:
    """How a process ended: exit code, negative for a signal; what it printed; seconds; peak memory in bytes."""

    code: int
    out: str
    err: str
    seconds: float
    memory: int
    interrupted: bool


def run_forked(main: Callable[[list[str]], int], argv: list[str], folder: Path, cwd: Path) -> End:
    """Runs a command in a process of its own. After `SECONDS` it gets Ctrl-C, and is killed if that does not end it."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(main, argv, folder, cwd)
    interrupted = False
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        seconds = time.monotonic() - started
        if seconds > SECONDS and not interrupted:
            interrupted = True
            os.kill(child, signal.SIGINT)
        if seconds > SECONDS + MORE_SECONDS:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):  # workers that outlived it
        os.killpg(child, signal.SIGKILL)
    read = lambda name: (folder / name).read_text(errors="surrogateescape")
    seconds = time.monotonic() - started
    return End(
        os.waitstatus_to_exitcode(status), read("out"), read("err"), seconds, usage.ru_maxrss * 1024, interrupted
    )


def _become(main: Callable[[list[str]], int], argv: list[str], folder: Path, cwd: Path) -> None:
    """The forked process; it does not return."""
    os.setsid()
    os.chdir(cwd)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        errors = "strict" if number == 1 else "backslashreplace"
        setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False), errors=errors, write_through=True))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["command", *argv]
    code = 1
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code or 0)


def faults(case: Case, end: End, cwd: Path, before: set[str]) -> list[str]:
    """What is wrong about how a command ended."""
    command, found = COMMANDS[case.command], []
    printed = end.out + end.err
    if end.interrupted:
        if not case.asks_for_more:
            found.append(f"ran for more than {SECONDS} s")
        if end.code not in (INTERRUPTED, 0, 2):
            found.append(f"ended with {end.code} after Ctrl-C")
    elif end.code not in (0, 2, *command.codes):
        found.append(f"ended with {end.code}")
    if "Traceback (most recent call last)" in printed:
        found.append("printed a traceback")
    if control := sorted({character for character in printed if not character.isprintable()} - set("\n\r\t")):
        found.append(f"printed {control}")
    if end.memory > MEMORY:
        found.append(f"took {end.memory / 2**20:,.0f} MiB")
    if end.code == 2 and not end.interrupted:
        if not end.err.strip():
            found.append("explained nothing")
        if len(end.err) > LONGEST_REPORT:
            found.append(f"printed {len(end.err)} characters")
        if made := [result for result in command.results if result not in before and (cwd / result).exists()]:
            found.append(f"left a result {made} with exit code 2")
    if end.code == 0 and "--help" not in case.argv and "-h" not in case.argv:
        # Lines that begin so are this program's own.
        lines = [
            line for line in printed.splitlines() if "warning" in line.lower() and not line.startswith("warning: ")
        ]
        if lines:
            found.append(f"warned: {lines[0][:200]}")
    if not end.interrupted:
        left = [path for path in cwd.rglob(".*") if path.suffix in (".partial", ".incomplete", ".replaced")]
        if left:
            found.append(f"left {[str(path.relative_to(cwd)) for path in left][:3]}")
    return found


def show(number: int, case: Case, end: End, found: list[str]) -> None:
    """Prints all that is needed to understand a case, escaped."""
    print(f"case {number}: {case.command} {ascii(case.argv)[:1500]}")
    print(f"  changes: {ascii(case.changes)[:1500]}")
    print(f"  found: {found!a}")
    print(f"  exit code {end.code}, {end.seconds:.1f} s; printed {end.out[-500:]!a} {end.err[-1500:]!a}", flush=True)


def table(ends: Counter) -> str:
    """How often each command ended with each exit code, as Markdown."""
    codes = sorted({code for _, code in ends})
    rows = [["command", *(f"exit code {code}" for code in codes)], ["---"] * (len(codes) + 1)]
    rows += [[name, *(str(ends[name, code]) for code in codes)] for name in COMMANDS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="continue from this case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="run these cases, and show each")
    options = parser.parse_args(arguments)
    numbers = options.only or range(options.first, options.first + options.cases)
    failures, ends, started, reported = 0, Counter(), time.monotonic(), 0.0
    with tempfile.TemporaryDirectory(prefix="fuzz_commands_") as temporary:
        root, inputs = Path(temporary), Path(temporary, "inputs")
        inputs.mkdir()
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        made = run_forked(lambda _: make_inputs(inputs) or 0, [], root, inputs)
        assert made.code == 0, made.out + made.err
        for done, number in enumerate(numbers, start=1):
            folder = root / "case"
            cwd = folder / "here"
            cwd.mkdir(parents=True)
            case = make_case(random.Random(f"{options.seed}/{number}"), inputs, cwd)
            before = {str(path.relative_to(cwd)) for path in cwd.rglob("*")}
            end = run_forked(COMMANDS[case.command].main, case.argv, folder, cwd)
            ends[case.command, end.code] += 1
            found = faults(case, end, cwd, before)
            failures += bool(found)
            if found or options.only:
                show(number, case, end, found)
            shutil.rmtree(folder)
            elapsed = time.monotonic() - started
            if elapsed - reported > 30 or done == len(numbers):
                reported, left = elapsed, elapsed / done * (len(numbers) - done)
                print(
                    f"{done} of {len(numbers)} cases, {failures} failed, {elapsed / done:.1f} s a case, "
                    f"{left / 60:.0f} minutes left",
                    flush=True,
                )
    print(f"\n{table(ends)}\n\n{len(numbers)} cases, seed {options.seed}: {failures} failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
