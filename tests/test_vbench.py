"""The videos for VBench: prompts in its formats, names, folders and seeds, and the command on a tiny random model."""

import hashlib
import json
import os

import pytest
from test_sample_cli import pixels, save_random_model

from rehyat_jax.evaluate import main as evaluate
from rehyat_jax.evaluation.vbench.benchmarks import BENCHMARKS, VBENCH, VBENCH_2
from rehyat_jax.evaluation.vbench.layout import check_case, list_videos
from rehyat_jax.evaluation.vbench.prompts import augmented_prompts, read_info
from rehyat_jax.files.mp4 import read_settings
from rehyat_jax.files.temporary import new_token, temporary_path
from rehyat_jax.sample import main as sample

ROWS = [
    {"prompt_en": "a static bench", "dimension": ["temporal_flickering"]},
    {"prompt_en": "the bay, oil painting", "dimension": ["appearance_style"], "auxiliary_info": {}},
    {"prompt_en": "the bay, oil painting", "dimension": ["overall_consistency", "aesthetic_quality"]},
]


@pytest.fixture
def info(tmp_path):
    return write_info(tmp_path / "VBench_full_info.json", ROWS)


def write_info(file, rows):
    file.write_text(json.dumps(rows))
    return file


def write_lines(file, *lines):
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def refusal(capsys, *arguments):
    assert evaluate(["vbench-videos", *map(str, arguments), "--negative-prompt", "", "--checkpoint", "none"]) == 2
    return capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- names and seeds


def test_videos_have_the_names_folders_and_seeds_of_vbench(info):
    benchmark, entries = read_info(info)
    videos = {str(video.name): video.seed for video in list_videos(benchmark, entries, entries)}
    assert benchmark is VBENCH and len(videos) == 25 + 5 + 5
    assert videos["temporal_flickering/a static bench-24.mp4"] == 24
    assert videos["appearance_style/the bay, oil painting-0.mp4"] == 100_000
    # aesthetic_quality is measured on the videos of overall_consistency.
    assert videos["overall_consistency/the bay, oil painting-4.mp4"] == 200_004


def test_in_one_folder_the_first_of_equal_prompts_makes_the_video_whatever_is_chosen(info):
    benchmark, entries = read_info(info)
    videos = list_videos(benchmark, entries, entries, flat=True)
    assert len(videos) == 25 + 5 and videos[-1].seed == 100_004
    assert [video.seed for video in list_videos(benchmark, entries, entries[2:], flat=True)] == [
        *range(100_000, 100_005)
    ]


def test_vbench_2_cuts_names_and_makes_twenty_videos_for_diversity(tmp_path):
    long = "x" * 200
    rows = [{"prompt_en": long, "dimension": ["Complex_Plot"]}, {"prompt_en": long, "dimension": ["Diversity"]}]
    benchmark, entries = read_info(write_info(tmp_path / "VBench2_full_info.json", rows))
    assert benchmark is VBENCH_2
    names = [str(video.name) for video in list_videos(benchmark, entries, entries)]
    assert names[:4] == [*(f"Complex_Plot/{'x' * 180}-{n}.mp4" for n in range(3)), f"Diversity/{'x' * 180}-0.mp4"]
    assert len(names) == 3 + 20
    seeds = [video.seed for video in list_videos(benchmark, entries, entries, flat=True)]
    assert seeds == [0, 1, 2, *range(100_003, 100_020)]


def test_every_dimension_is_measured_on_a_folder_of_videos():
    assert [len(benchmark.folders) for benchmark in BENCHMARKS] == [16, 18]
    for benchmark in BENCHMARKS:
        assert all(benchmark.folders[folder] == folder for folder in benchmark.folders.values())
        assert set(benchmark.more_videos) <= set(benchmark.folders.values())


@pytest.mark.parametrize(("prompt", "message"), [("a/b", "because it has '/'"), ("é" * 130, "255 bytes, found 266")])
def test_a_prompt_that_is_no_file_name_is_refused(tmp_path, capsys, prompt, message):
    file = write_info(tmp_path / "info.json", [{"prompt_en": prompt, "dimension": ["scene"]}])
    error = refusal(capsys, "--info", file, "--out", tmp_path / "out")
    assert "entry 0 of --info" in error and message in error


def test_names_that_differ_in_case_need_a_file_system_that_does(tmp_path, monkeypatch):
    rows = [{"prompt_en": prompt, "dimension": ["scene"]} for prompt in ("A hill", "a hill")]
    benchmark, entries = read_info(write_info(tmp_path / "info.json", rows))
    videos = list_videos(benchmark, entries, entries)
    check_case(tmp_path, videos)
    monkeypatch.setattr("rehyat_jax.evaluation.vbench.layout._ignores_case", lambda folder: True)
    with pytest.raises(ValueError, match=r"'scene/A hill-0\.mp4' and 'scene/a hill-0\.mp4'"):
        check_case(tmp_path, videos)


def test_the_longest_names_have_temporary_files(tmp_path):
    for name in ("x" * 251 + ".mp4", "é" * 125 + ".mp4"):
        temporary = temporary_path(tmp_path / name, new_token(), "partial")
        temporary.write_text("")
        assert len(os.fsencode(temporary.name)) <= 255


# --------------------------------------------------------------------------------------------------------- prompts


def test_augmented_prompts_are_matched_line_by_line(info, tmp_path):
    _, entries = read_info(info)
    prompts = write_lines(tmp_path / "all_dimension.txt", *(row["prompt_en"] for row in reversed(ROWS)))
    augmented = write_lines(tmp_path / "augmented.txt", "A sea.", "A bay.", "A bench that never moves.", "", "")
    texts, files = augmented_prompts(entries, {"scene"}, prompts, augmented)
    # Equal prompts have the lines in their order.
    assert texts == {0: "A bench that never moves.", 1: "A sea.", 2: "A bay."} and files == [prompts, augmented]


def test_equal_prompts_of_a_list_without_repetitions_share_a_line(info, tmp_path):
    _, entries = read_info(info)
    prompts = write_lines(tmp_path / "p.txt", "the bay, oil painting", "a static bench", "an old prompt")
    texts, _ = augmented_prompts(entries, (), prompts, write_lines(tmp_path / "a.txt", "Bay.", "Bench.", "Old."))
    assert texts == {0: "Bench.", 1: "Bay.", 2: "Bay."}


def test_augmented_prompts_may_be_in_a_folder_with_a_file_for_each_dimension(info, tmp_path, capsys):
    _, entries = read_info(info)
    for folder, line in (("p", "the bay, oil painting"), ("a", "Bay.")):
        write_lines(tmp_path / folder / "overall_consistency.txt", line)
    folders = {"overall_consistency"}
    assert augmented_prompts(entries, folders, tmp_path / "p", tmp_path / "a")[0] == {2: "Bay."}
    write_lines(tmp_path / "p" / "overall_consistency.txt", "another prompt")
    with pytest.raises(ValueError, match=r"consistency.txt: line 1: expected 'the bay, oil painting', as in --info"):
        augmented_prompts(entries, folders, tmp_path / "p", tmp_path / "a")
    write_lines(tmp_path / "p" / "overall_consistency.txt", "the bay, oil painting", "more")
    write_lines(tmp_path / "a" / "overall_consistency.txt", "Bay.", "More.")
    with pytest.raises(
        ValueError, match="expected the 1 prompts of dimension 'overall_consistency' in --info, found 2"
    ):
        augmented_prompts(entries, folders, tmp_path / "p", tmp_path / "a")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one", "two"], "augmented.txt: expected 3 lines, one for each line of"),
        (["one", "two", "three", "four"], "line 4 of"),
        (["one", "", "three"], "augmented.txt: line 2: expected a prompt, found an empty line"),
        ([], "augmented.txt: expected one prompt a line, found none"),
    ],
)
def test_lines_without_partner_are_refused(info, tmp_path, capsys, lines, message):
    prompts = write_lines(tmp_path / "all_dimension.txt", *(row["prompt_en"] for row in ROWS))
    augmented = write_lines(tmp_path / "augmented.txt", *lines)
    assert message in refusal(
        capsys, "--info", info, "--out", tmp_path / "out", "--prompts", prompts, "--augmented", augmented
    )


def test_prompts_of_another_benchmark_are_refused(info, tmp_path, capsys):
    prompts = write_lines(tmp_path / "other.txt", "a cat", "a dog", "a bird")
    error = refusal(capsys, "--info", info, "--out", tmp_path, "--prompts", prompts, "--augmented", prompts)
    assert "other.txt: expected a line for entry 0 of --info, 'a static bench', found none" in error


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": 1}, "expected VBench_full_info.json or VBench2_full_info.json"),
        (["a prompt"], "entry 0: expected VBench_full_info.json"),
        ([{"prompt_en": "a"}], "entry 0: expected VBench_full_info.json"),
        (
            [ROWS[0], {"prompt_en": "a", "dimension": ["scenes"]}],
            "entry 1: expected a dimension of VBench, found 'scenes'",
        ),
        ([{"prompt_en": "a", "dimension": ["scene", "color"]}], "measured on the same videos, found scene, color"),
    ],
)
def test_another_format_of_the_list_is_refused(tmp_path, capsys, rows, message):
    error = refusal(capsys, "--info", write_info(tmp_path / "info.json", rows), "--out", tmp_path / "out")
    assert f"info.json: {message}" in error or message in error


def test_an_unknown_dimension_is_refused(info, tmp_path, capsys):
    error = refusal(capsys, "--info", info, "--out", tmp_path / "out", "--dimensions", "colour")
    assert "--dimensions colour: expected dimensions of VBench" in error and "'color'" in error


def test_the_negative_prompt_must_be_given(info, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate(["vbench-videos", "--info", str(info), "--out", str(tmp_path), "--models", "wan"])
    assert end.value.code == 2 and "required: --negative-prompt" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


def arguments(info, checkpoint, out, *more):
    size = ["--steps", "1", "--frames", "2", "--height", "8", "--width", "16", "--negative-prompt", "a two"]
    named = ["--info", info, "--checkpoint", checkpoint, "--out", out, "--dimensions", "appearance_style"]
    return ["vbench-videos", *map(str, named), *size, *map(str, more)]


def test_the_command_makes_a_dimension_and_resumes(info, checkpoint, tmp_path, capsys):
    prompts = write_lines(tmp_path / "all_dimension.txt", *(row["prompt_en"] for row in ROWS))
    augmented = write_lines(tmp_path / "augmented.txt", "a bench", "a bay", "a sea")
    out = tmp_path / "videos" / "student"
    command = [*arguments(info, checkpoint, out), "--prompts", str(prompts), "--augmented", str(augmented)]
    host = lambda number: [*command, "--num-hosts", "2", "--host", str(number)]
    assert evaluate(host(1)) == 0
    assert not out.with_name("student.json").exists()
    assert "3 of 5 videos are those of other hosts" in capsys.readouterr().err
    assert evaluate(host(0)) == 0
    names = [f"appearance_style/the bay, oil painting-{index}.mp4" for index in range(5)]
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.mp4")) == names
    assert {path.suffix for path in out.rglob("*") if path.is_file()} == {".mp4"}

    manifest = json.loads(out.with_name("student.json").read_text())
    assert manifest["settings"]["guidance_scale"] == 6 and manifest["settings"]["flow_shift"] == 3
    assert manifest["settings"]["negative_prompt"] == "a two" and manifest["settings"]["benchmark"] == "VBench"
    digest = lambda file: hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest["inputs"] == {str(file): digest(file) for file in (info, prompts, augmented)}
    last = {"file": names[4], "sha256": digest(out / names[4]), "seed": 100_004, "index": 4}
    assert manifest["videos"][4] == {**last, "original_prompt": "the bay, oil painting", "prompt": "a bay"}

    # The video is that of `sample` with this prompt and seed.
    size = ["--steps", "1", "--frames", "2", "--height", "8", "--width", "16", "--negative-prompt", "a two"]
    own = ["--checkpoint", str(checkpoint), "--guidance-scale", "6", "--flow-shift", "3", "--seed", "100004"]
    assert sample([*own, *size, "--prompt", "a bay", "--out", str(tmp_path / "one.mp4")]) == 0
    assert (pixels(out / names[4]) == pixels(tmp_path / "one.mp4")).all()
    assert read_settings(out / names[4])["original_prompt"] == "the bay, oil painting"

    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    (out / names[2]).unlink()
    capsys.readouterr()
    assert evaluate(command) == 0
    assert "4 of 5 videos are finished already" in capsys.readouterr().out
    assert sum(path.stat().st_mtime_ns == time for path, time in times.items()) == 4

    # Another augmentation, and other weights at the same path, are other videos.
    write_lines(augmented, "a bench", "a cove", "a sea")
    assert evaluate(command) == 2
    assert "was made with prompt 'a bay', expected 'a cove'" in capsys.readouterr().err


def test_other_weights_at_the_same_path_are_another_model(info, tmp_path, capsys):
    model = save_random_model(tmp_path / "model")
    command = arguments(info, model, tmp_path / "out", "--batch", "5")
    short = write_info(info, [{"prompt_en": "a bay", "dimension": ["appearance_style"]}])
    assert short == info and evaluate(command) == 0
    save_random_model(tmp_path / "other", scale=0.2)
    model.rename(tmp_path / "first")
    (tmp_path / "other").rename(model)
    capsys.readouterr()
    assert evaluate(command) == 2
    assert "was made with transformer_files" in capsys.readouterr().err


def test_a_file_that_hides_the_videos_from_vbench_is_named(info, checkpoint, tmp_path, capsys):
    write_info(info, [{"prompt_en": "a bay", "dimension": ["appearance_style"]}])
    write_lines(tmp_path / "out" / "notes.txt", "notes")
    assert evaluate(arguments(info, checkpoint, tmp_path / "out", "--layout", "flat", "--batch", "5")) == 0
    assert "notes.txt: is no video; VBench may take its suffix" in capsys.readouterr().err
