"""A student against its teacher: the measures against short definitions, and the command as a user runs it."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_runs import TINY, digits_config, pretrained, tiny_batch, tiny_model

from rehyat_jax import evaluate
from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.form import FORMS, make_form
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.attention.hybrid.api import hybrid_attention_weights
from rehyat_jax.errors import InputError
from rehyat_jax.evaluation.attention_error import attention_differences
from rehyat_jax.evaluation.attention_mass import attention_mass, by_distance, moved_mass
from rehyat_jax.evaluation.bootstrap import Resampling
from rehyat_jax.evaluation.compare_models import evaluate_models
from rehyat_jax.evaluation.consistency import chunk_changes, frame_changes, sharpness
from rehyat_jax.evaluation.distribution import features, frechet_distance, spreads
from rehyat_jax.evaluation.draws import Draws, Examples
from rehyat_jax.evaluation.options import EvaluationOptions
from rehyat_jax.evaluation.velocity import compare_velocities
from rehyat_jax.generation.options import SamplingOptions
from rehyat_jax.generation.pipeline import Pipeline
from rehyat_jax.models.student import make_student
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.train import train
from rehyat_jax.weights import load_wan, save_model

FORM = HybridConfig(chunk_frames=2, overlap_frames=1, feature_map=FeatureMapConfig(features=16))

# ----------------------------------------------------------------------------------------------------------- intervals


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(size=400)
    found = Resampling(400).mean(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    # 2,000 resamples know each end to about 4% of its distance.
    assert [found.value - found.low, found.high - found.value] == pytest.approx([half, half], rel=0.12)


def test_ratios_are_of_sums_and_places_without_data_are_unknown():
    numerators, denominators = np.array([[1.0, 0], [9, 0]]), np.array([[1.0, 0], [3, 0]])
    found = Resampling(2).ratio(numerators, denominators)
    assert found.value[0] == 10 / 4 and (found.low[0], found.high[0]) == (1, 3)
    assert found.to_json()["value"] == [2.5, None]


def test_figures_of_the_same_units_are_resampled_in_pairs():
    first = np.random.default_rng(0).normal(size=50)
    second = first + 0.1
    teacher, student, difference = map(Resampling(50).mean, (first, second, second - first))
    assert difference.high - difference.low < 1e-9 < teacher.high - teacher.low
    assert student.low - teacher.low == pytest.approx(0.1)


# ----------------------------------------------------------------------------------------------------------- attention


def test_the_mass_between_frames_is_that_of_the_dense_weights():
    # Thirteen frames are more than a head is wide: two calls of the attention.
    config = TINY.replace(hybrid_blocks=(0, 2), hybrid=FORM)
    model = nnx.merge(*tiny_model(config))
    batch = tiny_batch(frames=13)
    inputs = batch["latents"], jnp.array([300.0, 900.0]), batch["text"]
    mass = np.asarray(jax.jit(lambda model, inputs: attention_mass(model, inputs))(model, inputs))
    assert mass.shape == (3, 2, 13, 13)

    def attend(inputs, per_block):
        phi = model.features(FORM, inputs, per_block["feature_maps"])
        arguments = dict(chunk_frames=2, overlap_frames=1, tokens_per_frame=inputs.tokens_per_frame)
        hybrid = sum(hybrid_attention_weights(inputs.query, inputs.key, phi.query, phi.key, **arguments))
        scores = jnp.einsum("bqhd,bkhd->bhqk", inputs.query, inputs.key) / inputs.query.shape[-1] ** 0.5
        return model.attend(inputs, per_block)[0], (hybrid, jax.nn.softmax(scores))

    hybrid, softmax = jax.jit(lambda *inputs: model.forward(*inputs, attend, model.per_block_attention())[1])(*inputs)
    per_frame = hybrid.shape[-1] // 13
    for block, weights in enumerate((hybrid[0], softmax[1], hybrid[2])):
        dense = np.asarray(weights).reshape(2, -1, 13, per_frame, 13, per_frame).sum(-1).mean((1, 3))
        # float32 rounding of sums over a few tokens
        np.testing.assert_allclose(mass[block], dense, atol=2e-6)
    # A causal chunk ends at most one frame after its query.
    assert np.triu(mass[0], 2).max() == 0 < mass[1].min()


def test_the_mass_of_every_form_is_complete():
    maps, sizes = dict(feature_map=FeatureMapConfig(features=16)), dict(chunk_frames=2, overlap_frames=1)
    forms = (
        HybridConfig(**sizes, **maps, anchor_frames=1, decay=True),
        make_form("window", sizes),
        make_form("linear", dict(chunk_frames=2)),
        make_form("strided", dict(stride=3)),
        make_form("causal_softmax", dict(chunk_frames=2)),
        make_form("two_branch", sizes),
    )
    config = TINY.replace(num_layers=len(forms), hybrid_blocks=tuple(range(len(forms))), hybrid=forms)
    model, batch = nnx.merge(*tiny_model(config)), tiny_batch(frames=5)
    inputs = batch["latents"], jnp.array([300.0, 900.0]), batch["text"]
    mass = np.asarray(jax.jit(lambda model, inputs: attention_mass(model, inputs))(model, inputs))
    # The separate branches are not normalised together.
    np.testing.assert_allclose(mass[:-1].sum(-1), 1, atol=1e-5)  # float32 rounding
    assert set(FORMS) == {form.kind for form in forms} | {"softmax"} and np.isfinite(mass).all()


def test_attention_over_devices_is_compared_without_its_padding():
    model = nnx.merge(*tiny_model(TINY.replace(hybrid_blocks="all", hybrid=FORM)))
    batch = tiny_batch(frames=5)
    inputs = batch["latents"], jnp.array([300.0, 900.0]), batch["text"]
    measure = lambda model, inputs: {"mass": attention_mass(model, inputs), **attention_differences(model, inputs)}
    alone = jax.jit(measure)(model, inputs)
    # Two devices hold two chunks of two frames each: eight frames.
    with jax.set_mesh(make_mesh(dict(data=1, fsdp=1, context=2, tensor=1), jax.devices()[:2])):
        shared = jax.jit(measure)(model, inputs)
    for name, values in alone.items():
        # float32 rounding, in another order
        np.testing.assert_allclose(shared[name], values, atol=1e-5, err_msg=name)


def test_mass_by_distance_is_positive_for_the_past_and_moved_mass_is_a_share():
    own, past = np.eye(4), np.eye(4, k=-1)
    past[0, 0] = 1  # the first frame has no past
    distances, shares = by_distance(past)
    assert dict(zip(distances, shares, strict=True)) == {-3: 0, -2: 0, -1: 0, 0: 0.25, 1: 0.75, 2: 0, 3: 0}
    assert moved_mass(own, past) == 0.75 and moved_mass(own, own) == 0


# -------------------------------------------------------------------------------------------------------------- draws


def test_draws_are_stratified_and_do_not_depend_on_the_batch():
    latents, text = np.zeros((3, 2, 2, 2, 1), np.float32), np.zeros((3, 1, 1), np.float32)
    draws = {batch: Draws(Examples(latents, text, None), 4, 5.0, 0, batch) for batch in (2, 3)}
    seen = {}
    for found in draws.values():
        for draw in found.every_level():
            for row, level, timestep, noisy in zip(draw.rows, draw.levels, draw.timestep, draw.latents, strict=True):
                seen.setdefault((row, level), []).append((float(timestep), np.asarray(noisy)))
    assert len(seen) == 12
    for (_, level), found in seen.items():
        assert len({timestep for timestep, _ in found}) == 1
        assert all((noisy == found[0][1]).all() for _, noisy in found)
        # The inverse of the shift 5: the place on the path is within its quarter.
        sigma = found[0][0] / 1000
        place = sigma / (5 - 4 * sigma)
        assert level / 4 <= place + 1e-6 and place <= (level + 1) / 4 + 1e-6


def test_velocities_are_compared_at_every_level_and_frame():
    latents, text = np.random.default_rng(0).normal(size=(3, 4, 2, 2, 1)).astype(np.float32), np.zeros((3, 1, 1))
    draws = Draws(Examples(latents, text, None), 2, 5.0, 0, 2)
    teacher = lambda scale, latents, timestep, text: scale * latents
    late = lambda scale, latents, timestep, text: jnp.where(jnp.arange(4)[:, None, None, None] > 1, scale, 1) * latents
    found = compare_velocities((teacher, 1.0), (late, 1.1), draws)
    error = found.curves["velocity_error_by_frame"].series["student"].value
    assert error.tolist() == pytest.approx([0, 0, 0.1, 0.1], abs=1e-6)  # float32 rounding
    assert 0.03 < found.metrics["velocity_error"].value < 0.07
    for broken, models in (("teacher", (jnp.nan, 1.1)), ("student", (1.0, jnp.nan))):
        with pytest.raises(InputError, match=f"--{broken}: expected finite"):
            compare_velocities((teacher, models[0]), (late, models[1]), draws)


# ------------------------------------------------------------------------------------------------------------- videos


def test_changes_at_chunk_boundaries_are_those_into_the_first_frame_of_a_chunk():
    # Wan's VAE: latent frame 0 is frame 0, latent frame 1 is frames 1 to 4, and so on. Chunks of two latent frames
    # begin at latent frames 2 and 4, at frames 5 and 13.
    at, within = chunk_changes(17, 4, 2)
    assert (np.flatnonzero(at) + 1).tolist() == [5, 13]
    assert (np.flatnonzero(within) + 1).tolist() == [1, 9]
    at, within = chunk_changes(7, 1, 3)
    assert (np.flatnonzero(at) + 1).tolist() == [3, 6] and (at ^ within).all()


def test_frame_measures_by_hand():
    video = np.zeros((1, 2, 2, 3, 3))
    video[0, 1, :, 1:] = 0.6
    assert frame_changes(video)[0].tolist() == pytest.approx([0.4])
    # One of two steps between columns is 0.6, none between rows.
    assert sharpness(video)[0].tolist() == pytest.approx([0, 0.15])


def test_frechet_distance_is_unbiased_near_zero_and_one_for_a_shift_by_a_deviation():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 120, 8))
    near, far = (frechet_distance(first, rows, paired=False) for rows in (second, second + 1))
    assert near.low <= 0 <= near.high and abs(near.value) < 0.05
    assert far.low <= 1 <= far.high and far.value == pytest.approx(1, abs=0.2)
    same = frechet_distance(first, first, paired=True)
    assert max(abs(same.low), abs(same.high)) < 1e-9


def test_spread_is_within_prompts():
    rows = np.array([[0.0, 0], [3, 3], [10, 10], [10, 14], [99, 99]])
    found = spreads(rows, ["a", "a", "b", "b", "only one"])
    assert found.tolist() == pytest.approx([3, np.sqrt(8)])


def test_features_are_fixed_and_see_motion():
    still = np.zeros((6, 8, 8, 3), np.float32)
    still[:, 2:5, 2:5] = 1
    moving = np.stack([np.roll(frame, shift, axis=1) for shift, frame in enumerate(still)])
    assert (features(still) == features(still.copy())).all()
    assert np.abs(features(still) - features(moving)).max() > 1e-3
    # The seed's first weight, which no version of numpy may change.
    assert features(still).shape == (32,)


# ------------------------------------------------------------------------------------------------------------- command

SMALL = {"examples": 3, "levels": 2, "batch": 2, "samples": 4, "steps": 2, "judge": "none"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(teacher, student): random weights of the digits' size; the student's first block is hybrid."""
    folder = tmp_path_factory.mktemp("pair")
    teacher = pretrained(folder)
    save_student(folder / "student", load_wan(teacher))
    return teacher, str(folder / "student")


def save_student(path, teacher, **names):
    student = make_student(teacher, {0: FORM})
    names = dict(codec="space_to_depth", text_encoder="word_vectors") | names
    save_model(path, student.config, nnx.to_pure_dict(nnx.state(student)), **names)


@pytest.fixture(scope="module")
def evaluated(pair, tmp_path_factory):
    """(folder, command line) of an evaluation."""
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a seven moves sideways\na two moves up and down\n")
    line = [
        "--teacher",
        pair[0],
        "--student",
        pair[1],
        "--out",
        str(folder),
        "--prompts",
        str(prompts),
        "--durations",
        "1",
        "4",
    ]
    line += [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    assert evaluate.main(line) == 0
    return folder, line


def test_the_command_writes_figures_with_intervals_and_plots(evaluated, pair):
    folder, _ = evaluated
    found = json.loads((folder / "evaluation.json").read_text())
    for name, figure in found["metrics"].items():
        if not name.startswith("frechet"):
            assert figure["low"] <= figure["value"] <= figure["high"], name
    metrics = {name: figure["value"] for name, figure in found["metrics"].items()}
    excess = metrics["loss_student"] - metrics["loss_teacher"]
    assert metrics["excess_vs_teacher"] == pytest.approx(excess, abs=1e-6)
    assert 0 < metrics["attention_moved"] < 1 and metrics["velocity_error"] > 0
    curves = found["curves"]
    assert [len(curve["x"]) for curve in (curves["velocity_error_by_noise"], curves["velocity_error_by_frame"])] == [
        2,
        21,
    ]
    assert curves["attention_error_by_block"]["x"] == [0]
    # Softmax blocks of the student see other inputs, but only slightly so.
    moved = curves["attention_moved_by_block"]["series"]["student"]["value"]
    assert moved[0] > moved[1]
    teacher, student = (curves["flops_by_duration"]["series"][name]["value"] for name in ("teacher", "student"))
    assert teacher[1] / teacher[0] > student[1] / student[0] > 4
    about = found["about"]
    assert about["command"].endswith("--judge none") and about["options"]["sampling"]["seed"] == 0
    assert about["models"]["teacher"]["fingerprint"] != about["models"]["student"]["fingerprint"]
    report = (folder / "evaluation.md").read_text()
    for picture in ("samples", "velocity", "attention", "attention_by_distance", "frames", "cost"):
        assert f"({picture}.png)" in report and (folder / f"{picture}.png").stat().st_size > 1000
    assert "unknown" not in report


def test_a_repeated_command_samples_nothing_again_and_finds_the_same(evaluated, monkeypatch):
    folder, line = evaluated
    before = json.loads((folder / "evaluation.json").read_text())
    sampled = []
    original = Pipeline.sample_latents

    def counted(self, text, *arguments, **options):
        sampled.append(len(text))
        return original(self, text, *arguments, **options)

    monkeypatch.setattr(Pipeline, "sample_latents", counted)
    (folder / "samples" / "student" / "00002.safetensors").unlink()
    assert evaluate.main(line) == 0
    assert sampled == [2]  # one, padded to the batch
    assert json.loads((folder / "evaluation.json").read_text()) == before


def test_samples_of_other_options_are_refused_and_the_difference_is_shown(evaluated, capsys):
    folder, line = evaluated
    report = (folder / "evaluation.md").read_bytes()
    assert evaluate.main([*line, "--seed", "1", "--guidance-scale", "2"]) == 2
    error = capsys.readouterr().err
    assert "00000.safetensors" in error and "seed '0', expected '1'" in error and "guidance_scale" in error
    assert (folder / "evaluation.md").read_bytes() == report


def test_a_model_equals_itself(pair):
    found = evaluate_models(
        pair[0], pair[0], EvaluationOptions(examples=2, levels=1, sampling=SamplingOptions(batch=2))
    )
    for name in ("velocity_error", "excess_vs_teacher", "attention_moved"):
        # XLA may fuse the two runs differently: float32 rounding of figures of about 1.
        assert abs(found.metrics[name].value) < 1e-6, name
    assert "attention_error" not in found.metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "{other_size}"], "ffn_dim"),
        (["--student", "{other_codec}"], "expected the teacher's codec, 'space_to_depth', found 'wan_vae'"),
        (["--teacher", "missing"], "missing"),
        (["--data", "missing"], "missing"),
        (["--out", "{file}"], "{file}"),
        (["--samples", "1"], "--samples 1"),
        (["--samples", "2"], "--prompts"),
        (["--samples", "2", "--judge", "digits", "--size", "8x8"], "--size 8x8"),
        (["--samples", "2", "--judge", "digits", "--prompts", "{prompts}"], "'a cat'"),
        (["--samples", "2", "--prompts", "{prompts}", "--order", "chunks"], "student: --order chunks: expected causal"),
        (["--topology", "v9:2x2"], "v9:2x2"),
        (["--topology", "h100:8"], "h100:8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_refused_before_anything_is_computed(pair, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("rehyat_jax.evaluation.compare_models.load_wan", None)  # nothing is loaded
    places = {name: str(tmp_path / name) for name in ("other_size", "other_codec", "file", "prompts")}
    teacher = load_wan(pair[0])
    save_student(places["other_codec"], teacher, codec="wan_vae")
    config, params = teacher.config.replace(ffn_dim=32), tiny_model(teacher.config.replace(ffn_dim=32))[1]
    save_model(places["other_size"], config, params, codec="space_to_depth", text_encoder="word_vectors")
    (tmp_path / "file").write_text("")
    (tmp_path / "prompts").write_text("a cat\n")
    options = {"--teacher": pair[0], "--student": pair[1], "--out": str(tmp_path / "out"), "--judge": "none"}
    words = [word.format(**places) for word in arguments]
    options |= dict(zip(words[::2], words[1::2], strict=True))
    assert evaluate.main([word for option in options.items() for word in option]) == 2
    assert message.format(**places) in capsys.readouterr().err
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_samples_for_vbench_are_another_program(monkeypatch):
    command = types.ModuleType("rehyat_jax.evaluation.vbench.command")
    command.main = lambda argv: argv
    package = types.ModuleType("rehyat_jax.evaluation.vbench")
    package.command = command
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, command.__name__, command)
    assert evaluate.main(["vbench-videos", "--help"]) == ["--help"]


# ------------------------------------------------------------------------------------------------------ while training


def test_evaluators_compare_a_run_with_its_teacher(tmp_path):
    config = digits_config(tmp_path, "distill", batch_size=8)
    teacher = {"every": 6, "teacher": config.init_from}
    config.evals = tuple({"type": name, **teacher} for name in ("velocity_error", "excess_vs_teacher"))
    train(config, tmp_path / "run")
    *_, last = map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())
    assert 0 < last["velocity_error/error"] < 1 and np.isfinite(last["excess_vs_teacher/loss"])


def test_an_evaluator_s_teacher_must_be_the_student_s(tmp_path, pair):
    config = digits_config(tmp_path, "finetune", batch_size=8)
    other = load_wan(pair[0]).config.replace(ffn_dim=32)
    names = dict(codec="space_to_depth", text_encoder="word_vectors")
    save_model(tmp_path / "other", other, tiny_model(other)[1], **names)
    config.evals = ({"type": "velocity_error", "every": 3, "teacher": str(tmp_path / "other")},)
    with pytest.raises(InputError, match="the model in training: expected the teacher's ffn_dim"):
        train(config, tmp_path / "run")
    config.evals = ({"type": "velocity_error", "every": 3},)
    with pytest.raises(InputError, match="teacher"):
        train(config, tmp_path / "run")
