"""Sampling with numbers of 8 bits, with reused guidance and with skipped blocks: all off by default."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_sample_cli import save_random_model
from tiny_runs import TINY, pretrained, tiny_model

from rehyat_jax import Pipeline, SamplingOptions
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.diffusion.samplers import Coefficients, coefficient_table, initial_state
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.errors import InputError
from rehyat_jax.generation import pipeline as pipelines
from rehyat_jax.generation.calibration import calibrated_ranges, residual_ratios
from rehyat_jax.generation.generate import generate_latents
from rehyat_jax.generation.reuse import BlockReuse, GuidanceReuse, skipped_steps
from rehyat_jax.models.linear import linear
from rehyat_jax.models.lora import LoraConfig
from rehyat_jax.models.wan.modeling import WanTransformer, apply_model
from rehyat_jax.models.wan.quantized import INPUTS, QuantizedLinear, input_ranges, quantized
from rehyat_jax.models.wan.residual import apply_residual, apply_with_residual
from rehyat_jax.parallel.mesh import AXES, make_mesh
from rehyat_jax.parallel.sharding import param_specs, shardings
from rehyat_jax.planning.sampling import programs

HYBRID = TINY.replace(hybrid_blocks="all", hybrid=HybridConfig(chunk_frames=2))
DIGITS = HYBRID.replace(in_channels=16, out_channels=16, text_dim=64, text_length=8)
SHAPE = (4, 4, 4, TINY.in_channels)


def random(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def velocity_of(model, *inputs):
    """The model's velocity, compiled: operation by operation, JAX compiles many more programs."""
    graphdef, params = nnx.split(model)
    return jax.jit(apply_model(graphdef))(params, *inputs)


TEXTS = random(1, TINY.text_length, TINY.text_dim), random(1, TINY.text_length, TINY.text_dim) + 1


@pytest.fixture(scope="module")
def model():
    return nnx.merge(*tiny_model(HYBRID))


@pytest.fixture(scope="module")
def ranges(model):
    return calibrated_ranges(model, TEXTS[1][0], SHAPE, 5.0)


@pytest.mark.parametrize("numbers", ["int8", "fp8"])
def test_a_quantized_layer_is_as_near_as_its_numbers(numbers):
    layer = linear(24, 40, ("fsdp", "tensor"), rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(1))
    x = random(2, 50, 24)
    kernel, largest = np.abs(layer.kernel[...]), {"int8": 127, "fp8": 448}[numbers]
    scale = jnp.abs(x).max() / largest
    found = QuantizedLinear(layer, nnx.Param(scale[None, None, None]), numbers)
    of_x, of_kernel = np.abs(x), kernel.max(0) / largest
    if numbers == "int8":
        # Half a unit of every number: x and W are wrong by at most half a scale.
        wrong_x, wrong_kernel = np.full_like(of_x, scale / 2), np.broadcast_to(of_kernel / 2, kernel.shape)
    else:
        # Three bits after the first one: half a unit is 2^-4 of a number, and 2^-10 scales below the normal ones.
        wrong_x, wrong_kernel = of_x / 16 + scale * 2**-10, kernel / 16 + of_kernel * 2**-10
    bound = of_x @ wrong_kernel + wrong_x @ (kernel + wrong_kernel)
    error = np.abs(found(x) - layer(x))
    # 1e-5 for the rounding of sums in float32. The bound is of worst cases, so it must not be far from the errors.
    assert (error <= bound + 1e-5).all() and error.max() > 0.05 * bound.max()
    gate = random(2, 1, 40)
    np.testing.assert_allclose(found.gated(x, gate), found(x) * gate, rtol=1e-6)


def test_larger_inputs_than_those_of_the_calibration_are_clipped():
    layer = linear(4, 3, (None, None), rngs=nnx.Rngs(0))
    found = QuantizedLinear(layer, nnx.Param(jnp.full((1, 1, 1), 1 / 127)), "int8")
    np.testing.assert_allclose(found(jnp.full((1, 1, 4), 9.0)), found(jnp.ones((1, 1, 4))), rtol=1e-6)


def test_ranges_are_those_of_the_inputs(model):
    latents, timestep = random(1, *SHAPE), jnp.array([300.0])
    velocity, found = jax.jit(lambda: input_ranges(model, latents, timestep, TEXTS[0]))()
    # Float32 rounding of another program.
    np.testing.assert_allclose(velocity, velocity_of(model, latents, timestep, TEXTS[0]), rtol=1e-4, atol=1e-5)
    assert set(found) == set(INPUTS.values())

    @jax.jit
    def first_input():
        embedded = model.embedded(latents, timestep, TEXTS[0])
        first = nnx.merge(nnx.graphdef(model.blocks), jax.tree.map(lambda x: x[0], nnx.state(model.blocks)))
        seen = []
        first.self_attention.query = lambda x, layer=first.self_attention.query: seen.append(x) or layer(x)
        first.attention_inputs(embedded.x, embedded.conditions.time_modulation, embedded.rope, embedded.frames)
        return jnp.abs(seen[0]).max()

    np.testing.assert_allclose(found["self_attention"][0], first_input(), rtol=1e-5)


def test_layers_that_are_named_stay_exact(model, ranges):
    graphdef, params = nnx.split(model)
    latents, timestep = random(1, *SHAPE), jnp.array([300.0])
    exact = velocity_of(model, latents, timestep, TEXTS[0])
    same = quantized(nnx.merge(graphdef, params), "int8", ranges, exact=tuple(INPUTS))
    np.testing.assert_array_equal(velocity_of(same, latents, timestep, TEXTS[0]), exact)
    part = quantized(nnx.merge(graphdef, params), "int8", ranges, exact=("feed_forward.down",))
    assert not isinstance(part.blocks.feed_forward.down, QuantizedLinear)
    assert part.blocks.feed_forward.up.kernel[...].dtype == jnp.int8
    assert part.blocks.cross_attention.key.kernel[...].dtype == jnp.float32
    assert not np.array_equal(velocity_of(part, latents, timestep, TEXTS[0]), exact)
    with pytest.raises(ValueError, match=r"exact: expected some of self_attention.query, .*, found up"):
        quantized(part, "int8", ranges, exact=("up",))


def test_adapters_are_refused_by_name():
    lora = LoraConfig(rank=2, alpha=2.0, targets=("up",))
    adapted = nnx.eval_shape(lambda: WanTransformer(TINY, rngs=nnx.Rngs(0), lora=lora))
    ones = {name: jnp.ones(TINY.num_layers) for name in INPUTS.values()}
    with pytest.raises(ValueError, match=r"feed_forward.up: expected a layer without an adapter"):
        quantized(adapted, "int8", ones)


def test_a_sharded_quantized_model_gives_the_same_velocity(model, ranges):
    latents, timestep, texts = random(4, *SHAPE), jnp.full(4, 300.0), jnp.concatenate([*TEXTS, *TEXTS])
    graphdef, params = nnx.split(quantized(nnx.merge(*nnx.split(model)), "int8", ranges))
    one = jax.jit(apply_model(graphdef))(params, latents, timestep, texts)
    with jax.set_mesh(make_mesh(dict.fromkeys(AXES, 1) | {"data": 2, "fsdp": 2, "tensor": 2})):
        placed = jax.device_put(nnx.to_pure_dict(params), shardings(param_specs(params)))
        several = jax.jit(apply_model(graphdef))(placed, latents, timestep, texts)
        again = calibrated_ranges(model, TEXTS[1][0], SHAPE, 5.0)
    # Sums of another order in float32 before a rounding to integers: a few inputs take the neighbouring number.
    assert float(jnp.linalg.norm(several - one) / jnp.linalg.norm(one)) < 2e-3
    jax.tree.map(lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-3), again, ranges)


def test_a_planned_program_has_weights_of_one_byte():
    with jax.set_mesh(make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])):
        case = dict(model=HYBRID, latents=(4, 4, 4), guided=True, stream=False)
        plain, narrow = (programs.transformer(**case, quantize=numbers) for numbers in (None, "int8"))
    kernels = [found.arguments["weights"]["blocks"]["feed_forward"]["up"]["kernel"] for found in (plain, narrow)]
    assert [kernel.dtype for kernel in kernels] == [jnp.bfloat16, jnp.int8] and kernels[0].shape == kernels[1].shape


def test_steps_are_skipped_by_magcaches_rule():
    # The first fifth is computed, then no more than two in a row are skipped.
    flat = skipped_steps(np.ones(10), 0.1)
    assert flat == [False, False, True, True, False, True, True, False, True, True]
    assert not any(skipped_steps(np.ones(10), 0.0)) and not any(skipped_steps(np.ones(1), 0.1))
    # Errors add up: 0.04, then 0.04 + |1 - 0.96^2| = 0.12.
    assert skipped_steps(np.full(10, 0.96), 0.1)[2:] == [True, False] * 4
    assert skipped_steps(np.full(10, 0.96), 0.13)[2:5] == [True, True, False]
    assert not any(skipped_steps(np.full(10, 0.8), 0.1))


def test_a_residual_stands_for_the_blocks(model):
    graphdef, params = nnx.split(model)
    inputs = random(1, *SHAPE), jnp.array([300.0]), TEXTS[0]
    velocity, residual = jax.jit(apply_with_residual(graphdef))(params, *inputs)
    # Float32 rounding of another program; and x + (y - x) is y to rounding.
    close = dict(rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(velocity, velocity_of(model, *inputs), **close)
    np.testing.assert_allclose(jax.jit(apply_residual(graphdef))(params, *inputs, residual), velocity, **close)
    ratios = residual_ratios(model, TEXTS[1][0], SHAPE, steps=4, flow_shift=5.0, sampler="unipc")
    assert ratios.shape == (4,) and ratios[0] == 1 and (ratios[1:] > 0).all() and (ratios[1:] != 1).all()


def _sampled(advance, steps=4):
    state = initial_state(random(1, *SHAPE))
    table = coefficient_table(wan_grid(steps, 5.0), "unipc")
    for index in range(steps):
        program, arguments = advance.call(index, state, Coefficients(*(column[index] for column in table)))
        state = advance.after(program(*arguments))
    return state.latents


def test_reuse_at_no_step_changes_nothing(model):
    graphdef, params = nnx.split(model)
    solver = dict(steps=4, guidance_scale=3.0, flow_shift=5.0)
    plain = generate_latents(model, *TEXTS, random(1, *SHAPE), **solver)
    none = generate_latents(model, *TEXTS, random(1, *SHAPE), skipped=[False] * 4, **solver)
    np.testing.assert_allclose(none, plain, rtol=1e-4, atol=1e-4)
    conditions = (*TEXTS, 3.0)
    for advance in (
        GuidanceReuse(graphdef, params, conditions, 1),
        BlockReuse(graphdef, params, conditions, [False] * 4),
    ):
        # The same operations in programs with one more result; float32 rounding.
        np.testing.assert_allclose(_sampled(advance), plain, rtol=1e-4, atol=1e-4)
    skipping = BlockReuse(graphdef, params, conditions, [False, True, False, True])
    assert float(jnp.abs(_sampled(skipping) - plain).max()) > 1e-2


def test_reused_guidance_is_exact_if_the_difference_does_not_change():
    evaluated = []

    class Model(nnx.Module):
        def __call__(self, latents, timestep, text):
            evaluated.append(len(latents))
            return jnp.tanh(latents) + text.mean((1, 2))[:, None, None, None, None]

    graphdef, params = nnx.split(Model())
    conditions = (*TEXTS, 3.0)
    every, third = (_sampled(GuidanceReuse(graphdef, params, conditions, k)) for k in (1, 3))
    np.testing.assert_allclose(third, every, rtol=1e-5, atol=1e-5)
    assert evaluated == [2, 1]  # one trace each: a doubled batch, and a plain one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exact": ("feed_forward.up",)}, "--exact feed_forward.up: expected with --quantize"),
        ({"guidance_every": 2, "step_cache": 0.1}, "--guidance-every 2 --step-cache 0.1: expected one of them"),
        ({"guidance_every": 2, "guidance_scale": 1.0}, "--guidance-every 2: expected guidance, found"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "".join(value),
)
def test_options_that_do_not_fit_together_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        Pipeline.from_pretrained(None, SamplingOptions(**changes), student=pretrained(tmp_path))


def test_parts_of_a_video_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    student = save_random_model(tmp_path / "student", config=DIGITS)
    for changes in ({"guidance_every": 2}, {"step_cache": 0.1}):
        with pytest.raises(InputError, match=r"--stream: expected the complete video at every step"):
            Pipeline.from_pretrained(None, SamplingOptions(stream=True, **changes), student=student)
    plain = Pipeline.from_pretrained(None, SamplingOptions(), student=student)
    assert not {"quantize", "exact", "guidance_every", "step_cache"} & set(plain.settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--quantize int8 needs qwix, not installed here: pip install .*\[quantize\]"):
        Pipeline.from_pretrained(None, SamplingOptions(quantize="int8"), student=student)


def test_a_pipeline_measures_residuals_once_and_skips_steps(tmp_path, monkeypatch):
    student = save_random_model(tmp_path / "student", config=DIGITS, scale=0.1)
    measured = []

    def ratios(*arguments, steps, **more):
        measured.append(steps)
        return np.ones(steps, np.float32)

    monkeypatch.setattr(pipelines, "residual_ratios", ratios)

    def latents(calls=1, **changes):
        options = SamplingOptions(**dict(frames=3, height=8, width=8, steps=5) | changes)
        pipeline = Pipeline.from_pretrained(None, options, student=student)
        text, negative = pipeline.embed(["a seven", ""])
        sample = lambda: pipeline.sample_latents(text[None], negative[None], pipeline.noise([0]))
        return [sample() for _ in range(calls)]

    (plain,), found = latents(), latents(2, step_cache=0.1)
    np.testing.assert_array_equal(*found)
    assert measured == [5] and np.abs(found[0] - plain).max() > 1e-3


def test_a_quantized_pipeline_samples_whole_and_in_parts(tmp_path):
    student = save_random_model(tmp_path / "student", config=DIGITS, scale=0.1)
    size = dict(frames=11, height=8, width=16, steps=2, quantize="int8", exact=("self_attention.value",))

    def latents(**changes):
        pipeline = Pipeline.from_pretrained(None, SamplingOptions(**size | changes), student=student)
        assert pipeline.settings["quantize"] == size["quantize"]
        text, negative = pipeline.embed(["a seven", ""])
        return pipeline.sample_latents(text[None], negative[None], pipeline.noise([0]))

    whole = latents()
    # A few inputs of layers take the neighbouring integer, because sums in float32 have another order.
    np.testing.assert_allclose(latents(stream=True), whole, atol=2e-2)
