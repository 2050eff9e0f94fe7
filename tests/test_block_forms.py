"""Several forms of attention in one model: every block has its own, in training, conversion and the PyTorch export."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_runs import TINY, digits_config, pretrained, tiny_batch, tiny_config, tiny_model

from rehyat_jax import FeatureMapConfig, HybridConfig, hybrid_attention, load_wan, make_student, softmax_attention
from rehyat_jax.attention.form import FORMS
from rehyat_jax.attention.forms.base import Form, FormFlops, Sizes
from rehyat_jax.attention.forms.causal_softmax import CausalSoftmaxForm
from rehyat_jax.attention.forms.hybrid import TwoBranchForm
from rehyat_jax.attention.forms.linear import LinearForm
from rehyat_jax.attention.forms.softmax import SOFTMAX
from rehyat_jax.attention.forms.strided import StridedForm
from rehyat_jax.attention.forms.window import WindowForm
from rehyat_jax.attention.softmax.chunk_causal import chunk_causal_attention
from rehyat_jax.convert import main as convert
from rehyat_jax.evaluation.attention_error import attention_errors
from rehyat_jax.generation.generate import generate_latents
from rehyat_jax.generation.streaming import stream_latents
from rehyat_jax.models.student import calibrated_maps
from rehyat_jax.models.wan.flops import forward_flops
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.parallel.mesh import AXES, make_mesh
from rehyat_jax.pytorch.rehyat_torch import load_student
from rehyat_jax.train import train as train_on
from rehyat_jax.training import distill
from rehyat_jax.training.config import check_config
from rehyat_jax.training.setup import initial_model, wanted_forms
from rehyat_jax.training.stages import STAGES
from rehyat_jax.weights import load_params, save_model

SMALL_MAP, HEDGEHOG = FeatureMapConfig(features=16), FeatureMapConfig(features=16, kind="hedgehog")
WIDE, NARROW = HybridConfig(3, 1, feature_map=SMALL_MAP), HybridConfig(2, 0, causal=False, feature_map=SMALL_MAP)
OTHER_MAP = HybridConfig(1, 1, stabilizer="joint", feature_map=HEDGEHOG)

MIXED = TINY.replace(num_layers=4, hybrid_blocks=(0, 2, 3), hybrid=(NARROW, OTHER_MAP, WIDE))


def test_every_block_attends_in_its_own_form():
    graphdef, params = tiny_model(MIXED)
    batch, timestep = tiny_batch(), jnp.array([100.0, 900.0])
    model = nnx.merge(tiny_model(MIXED, scan_layers=False)[0], params)
    blocks = iter(range(MIXED.num_layers))
    # Blocks 0 and 3 share the stack of one feature map, block 2 has the other.
    rows = {0: ("0", 0), 3: ("0", 1), 2: ("1", 0)}

    def attend(inputs, _):
        form = MIXED.block_forms.of_block[block := next(blocks)]
        if form == SOFTMAX:
            return softmax_attention(inputs.query, inputs.key, inputs.value), None
        stack, row = rows[block]
        maps = nnx.merge(
            nnx.graphdef(model.feature_maps[stack]), jax.tree.map(lambda x: x[row], params["feature_maps"][stack])
        )
        features = maps.query(inputs.query), maps.key(inputs.key)
        sizes = dict(chunk_frames=form.chunk_frames, overlap_frames=form.overlap_frames, causal=form.causal)
        arguments = dict(tokens_per_frame=inputs.tokens_per_frame, stabilizer=form.stabilizer, **sizes)
        arrays = inputs.query, inputs.key, inputs.value
        return hybrid_attention(*arrays, *features, **arguments, implementation="reference"), None

    expected = jax.jit(lambda *arrays: model.forward(*arrays, attend, {})[0])(batch["latents"], timestep, batch["text"])
    found = jax.jit(apply_model(graphdef))(params, batch["latents"], timestep, batch["text"])
    # float32 rounding of another order of summation.
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_configuration_is_read_back_from_its_json_however_it_was_written():
    assert type(MIXED).from_dict(json.loads(json.dumps(MIXED.to_dict()))) == MIXED
    assert MIXED.replace(hybrid_blocks=(0, 3)).hybrid == (NARROW, WIDE)
    assert MIXED.replace(hybrid_blocks=(3,)).hybrid == WIDE
    assert TINY.replace(hybrid_blocks=(1,), hybrid=(WIDE,)) == TINY.replace(hybrid_blocks=(1,), hybrid=WIDE)
    assert "attention" not in TINY.to_dict() and "hybrid" not in TINY.to_dict()
    with pytest.raises(ValueError, match="one for each of the 2 hybrid_blocks, found 3 forms"):
        TINY.replace(hybrid_blocks=(0, 1), hybrid=(WIDE, NARROW, WIDE))


def test_frames_are_padded_to_whole_chunks_of_every_form():
    assert MIXED.block_forms.chunk_frames == 6
    assert TINY.block_forms.chunk_frames == 1


def test_flops_are_those_of_each_form():
    sizes, latents = Sizes(7, 9, MIXED.num_heads, MIXED.head_dim), (7, 6, 6)
    expected = [form.flops(sizes) for form in (NARROW, SOFTMAX, OTHER_MAP, WIDE)]
    assert forward_flops(MIXED, latents).attention == expected
    assert len(set(expected)) == 4


CONFIGURED = (
    {"blocks": (0,), "chunk_frames": 3, "causal": False},
    {"blocks": (2,), "chunk_frames": 1, "stabilizer": "joint", "feature_map": {"kind": "hedgehog"}},
    {"blocks": (3,), "kind": "softmax"},
)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    config = digits_config(folder, "distill", init_from=pretrained(folder / "deep", num_layers=5), forms=CONFIGURED)
    return config, train_on(config, folder / "run", jax.devices()[:1])


def test_forms_of_a_training_configuration(distilled):
    config, _ = distilled
    base = HybridConfig(2, 1, feature_map=SMALL_MAP)
    bidirectional = HybridConfig(3, 1, causal=False, feature_map=SMALL_MAP)
    assert wanted_forms(config, 5) == (bidirectional, base, OTHER_MAP, SOFTMAX, base)


def model_to_train(config):
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        return initial_model(config)


def test_stage_1_trains_every_form_and_stage_2_goes_on(distilled, tmp_path):
    config, path = distilled
    student, params, _ = load_params(path)
    assert student.block_forms.of_block == wanted_forms(config, 5)
    start = model_to_train(config).params["feature_maps"]
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), start, params["feature_maps"])
    assert all(change > 0 for change in jax.tree.leaves(moved))

    finetuning = digits_config(tmp_path, "finetune", init_from=str(path), steps=3)
    finetuned, tuned, _ = load_params(train_on(finetuning, tmp_path / "run", jax.devices()[:1]))
    assert finetuned == student
    assert not np.array_equal(tuned["blocks"]["modulation"], params["blocks"]["modulation"])

    # Fewer blocks: those chosen keep their own maps, also where only one stack is left.
    kept = {"hybrid.blocks": None, "forms": ({**CONFIGURED[1], "blocks": (2,)},), "hybrid.feature_map.features": 16}
    fewer = model_to_train(digits_config(tmp_path, "finetune", init_from=str(path), **kept))
    assert fewer.config.block_forms.converted == (2,)
    jax.tree.map(np.testing.assert_array_equal, fewer.params["feature_maps"], params["feature_maps"]["1"])


def test_an_export_to_pytorch_and_back(distilled, tmp_path):
    _, path = distilled
    assert convert(["to-torch", str(path), str(tmp_path / "torch"), "--layout", "diffusers"]) == 0
    assert convert(["from-torch", str(tmp_path / "torch"), str(tmp_path / "back")]) == 0
    (config, params, _), (config_back, params_back, _) = load_params(path), load_params(tmp_path / "back")
    assert config_back == config
    jax.tree.map(np.testing.assert_array_equal, params_back, params)

    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 7, 4, 6, 16), np.float32)
    text, timestep = rng.standard_normal((1, 8, 64), np.float32), np.array([500.0], np.float32)
    expected = jax.jit(load_wan(path).__call__)(latents, timestep, text)
    with torch.no_grad():
        inputs = torch.tensor(latents).permute(0, 4, 1, 2, 3), torch.tensor(timestep), torch.tensor(text)
        found = load_student(tmp_path / "torch")(*inputs).sample.permute(0, 2, 3, 4, 1)
    # float32 through six blocks in another order of summation; diffusers' sinusoids are float32 too.
    np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        (({"blocks": (9,)},), "block indices below 5"),
        (({"chunk_frames": 2},), 'must be "all" or indices'),
        (({"blocks": (0,)}, {"blocks": (0,), "chunk_frames": 2}), "block 0 is in two entries"),
        (({"blocks": (0,), "chunk_frame": 2},), "chunk_frame"),
        (({"blocks": (0,), "kind": "ring"},), "kind must be one of"),
        (({"blocks": (0,), "chunk_frames": 0},), r"config\.forms\[0\]\.chunk_frames must be an integer from 1"),
    ],
)
def test_wrong_forms_are_named(tmp_path, forms, message):
    config = digits_config(tmp_path, "distill", forms=forms)
    with pytest.raises(Exception, match=message):
        check_config(config)
        wanted_forms(config, 5)


@dataclasses.dataclass(frozen=True)
class FramesForm(Form):
    """Softmax attention to every frame whose index is a multiple of one of `strides`: a form without feature maps."""

    strides: tuple[int, ...] = (2,)

    kind = "frames"

    def keys(self, num_frames):
        kept = np.any([np.arange(num_frames) % stride == 0 for stride in self.strides], axis=0)
        softmax = np.broadcast_to(kept, (num_frames, num_frames))
        return softmax, np.zeros_like(softmax)

    def attend(self, inputs, features, *, implementation):
        frames = np.flatnonzero(self.keys(inputs.num_frames)[0][0])
        tokens = (frames[:, None] * inputs.tokens_per_frame + np.arange(inputs.tokens_per_frame)).ravel()
        return softmax_attention(inputs.query, inputs.key[:, tokens], inputs.value[:, tokens])

    def flops(self, sizes):
        return FormFlops(softmax=int(self.keys(sizes.frames)[0].sum()))


def test_a_form_of_ones_own_without_maps_is_trained_measured_and_shown(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMS, "frames", FramesForm)
    strided = {"kind": "frames", "strides": [2, 3]}
    config = digits_config(tmp_path, "finetune", steps=3, forms=({"blocks": (1,), **strided},))
    student, params, _ = load_params(train_on(config, tmp_path / "run", jax.devices()[:1]))
    assert student.block_forms.of_block == (SOFTMAX, FramesForm((2, 3))) and "feature_maps" not in params

    # Its own attention is exactly softmax over the frames that it attends to, which are not all.
    mixed = TINY.replace(hybrid_blocks=(0, 1), hybrid=(FramesForm(), WIDE))
    graphdef, params = tiny_model(mixed)
    null_text = np.zeros((mixed.text_length, mixed.text_dim), np.float32)
    batch, key = tiny_batch(), jax.random.key(0)
    errors = jax.jit(lambda params: attention_errors(graphdef, params, batch, null_text, key, config))(params)
    assert errors["exact"][0] > 0.01
    np.testing.assert_allclose(errors["exact"][0], errors["hybrid"][0], rtol=1e-5)
    assert [form.label for form in mixed.block_forms.forms] == ["softmax", "frames", "hybrid 3+1"]


def test_stage_1_of_videos_without_linear_keys_is_refused(tmp_path):
    config = digits_config(tmp_path, "distill", forms=({"blocks": (1,), "chunk_frames": 21, "overlap_frames": 0},))
    with pytest.raises(Exception, match=r"block 1: its chunks of 21 frames hold all 21 latent frames"):
        train_on(config, tmp_path / "run", jax.devices()[:1])


def test_make_student_shares_the_teacher_and_calibrates_its_maps():
    teacher = nnx.merge(*tiny_model())
    batch = tiny_batch()
    inputs = batch["latents"], jnp.array([100.0, 900.0]), batch["text"]
    student = make_student(teacher, {0: NARROW, 2: OTHER_MAP}, calibrate_on=inputs)
    assert student.config.block_forms.converted == (0, 2)
    assert student.blocks.modulation[...] is teacher.blocks.modulation[...]
    plain = make_student(teacher, {0: NARROW, 2: OTHER_MAP})
    shifts = [
        student.feature_maps[key].query.log_scale[...] - plain.feature_maps[key].query.log_scale[...] for key in "01"
    ]
    assert all(jnp.abs(shift).max() > 0.01 for shift in shifts)
    with pytest.raises(ValueError, match="expected no converted blocks"):
        make_student(student, WIDE)


# ---------------------------------------------------------------------------------------------------------- every kind

EVERY_KIND = (
    HybridConfig(2, 1, anchor_frames=1, decay=True, feature_map=FeatureMapConfig(features=16, gate=True)),
    TwoBranchForm(2, 1, causal=False, linear_window=True, feature_map=FeatureMapConfig(features=16, input="unnormed")),
    WindowForm(2, 1, anchor_frames=2),
    LinearForm(2, feature_map=FeatureMapConfig(features=16, kind="silu_l2", input="unrotated")),
    LinearForm(2, causal=False, feature_map=FeatureMapConfig(features=16, kind="silu_l2", gate=True)),
    StridedForm(4, feature_map=SMALL_MAP),
    CausalSoftmaxForm(2),
)
ALL_KINDS = TINY.replace(num_layers=len(EVERY_KIND), hybrid_blocks="all", hybrid=EVERY_KIND)


def test_every_kind_is_here():
    assert {form.kind for form in EVERY_KIND} | {"softmax"} == set(FORMS)


def test_a_model_of_every_kind_runs_in_pytorch_and_on_a_mesh(tmp_path):
    graphdef, params = tiny_model(ALL_KINDS)
    # Gates and decays that matter.
    scales = {"gate": 5, "decay": 5, "branch_gate": 5}
    scaled = lambda path, leaf: scales.get(path[-1].key, 1) * leaf
    params["feature_maps"] = jax.tree_util.tree_map_with_path(scaled, params["feature_maps"])
    batch, timestep = tiny_batch(frames=7), jnp.array([100.0, 900.0])
    arrays = batch["latents"], timestep, batch["text"]
    ours = jax.jit(apply_model(graphdef))(params, *arrays)
    with jax.set_mesh(make_mesh(dict(zip(AXES, (1, 2, 2, 2), strict=True)), jax.devices())):
        found = jax.jit(apply_model(graphdef))(params, *arrays)
    np.testing.assert_allclose(found, ours, atol=2e-5)

    save_model(tmp_path / "model", ALL_KINDS, params, codec="wan_vae", text_encoder="umt5")
    assert convert(["to-torch", str(tmp_path / "model"), str(tmp_path / "torch"), "--layout", "diffusers"]) == 0
    transformer = load_student(tmp_path / "torch")
    with torch.no_grad():
        latents = torch.tensor(np.asarray(arrays[0])).permute(0, 4, 1, 2, 3)
        inputs = latents, torch.tensor(np.asarray(timestep)), torch.tensor(np.asarray(arrays[2]))
        theirs = transformer(*inputs).sample.permute(0, 2, 3, 4, 1).numpy()
    assert np.abs(theirs - ours).max() < 5e-5
    config, back, _ = load_params(tmp_path / "model")
    assert config == ALL_KINDS
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_causal_softmax_is_softmax_with_a_mask_of_chunks():
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 14, 2, 8))
    # Seven frames of two tokens, in chunks of three frames.
    chunk = np.arange(14) // 6
    with jax.enable_x64(True):
        found = jax.jit(functools.partial(chunk_causal_attention, chunk_tokens=6))(query, key, value)
        scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(8)
        weights = np.exp(np.where(chunk[:, None] >= chunk, scores, -np.inf))
        expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)
        np.testing.assert_allclose(found, expected, atol=1e-6)  # weights are float32
    assert (CausalSoftmaxForm(3).keys(7)[0] == (chunk[::2, None] >= chunk[::2])).all()


def test_gradients_of_every_kind_reach_its_parameters():
    """Stage 1, in one model of all kinds: every learned array has a gradient, and the window has none to get."""
    graphdef, params = tiny_model(ALL_KINDS)
    config = tiny_config("distill", caption_dropout=0.0)
    maps, frozen = STAGES["distill"].split(params)
    context = {"frozen": frozen, "null_text": jnp.zeros((4, 8))}
    grad_fn = jax.jit(distill.make_grad_fn(graphdef, config))
    metrics, gradients = grad_fn(maps, context, tiny_batch(frames=7), jax.random.key(0))
    assert metrics["block_loss"].shape == (len(EVERY_KIND),)
    zero = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if not np.abs(np.asarray(leaf)).max() > 0
    ]
    assert not zero
    # Calibration changes the scale of the maps alone.
    calibrate = jax.jit(lambda params, inputs: calibrated_maps(nnx.merge(graphdef, params), inputs))
    calibrated = calibrate(params, (tiny_batch(frames=7)["latents"], jnp.full(2, 500.0), tiny_batch()["text"]))
    changed = {
        path[-1].key
        for (path, before), after in zip(
            jax.tree_util.tree_leaves_with_path(params["feature_maps"]), jax.tree.leaves(calibrated), strict=True
        )
        if np.any(np.asarray(before) != np.asarray(after))
    }
    assert changed == {"log_scale"}


IN_PARTS = [form for form in EVERY_KIND if form.attends_in_parts]


# The causal forms go part by part; with others in the model, it goes layer by layer.
@pytest.mark.parametrize("forms", [[form for form in IN_PARTS if form.causal], IN_PARTS], ids=["causal", "all"])
def test_every_kind_that_can_attend_in_parts_gives_the_complete_video(forms):
    config = TINY.replace(num_layers=len(forms), hybrid_blocks="all", hybrid=tuple(forms))
    graphdef, params = tiny_model(config)
    model = nnx.merge(graphdef, params)
    noise = np.asarray(tiny_batch(frames=7)["latents"])
    text = jnp.asarray(tiny_batch()["text"])
    options = dict(steps=1, guidance_scale=1.0, flow_shift=3.0, sampler="euler")
    expected = generate_latents(model, text, text, jnp.asarray(noise), **options)
    found = stream_latents(model, text, text, noise, part_chunks=1, **options)
    np.testing.assert_allclose(found, expected, atol=5e-5)
