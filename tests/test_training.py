"""The recipe: what a step computes, what it leaves alone, and that a stopped run goes on as if nothing had happened."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import (
    TINY,
    abstract_model,
    digits_config,
    interrupt_at,
    one_at_a_time,
    pretrained,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from tpu_topologies import compiled_for_tpu

from rehyat_jax.attention import hybrid_attention, softmax_attention
from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.errors import InputError, RunDivergedError
from rehyat_jax.evaluation.attention_error import attention_errors
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.models.wan.modeling import REMAT_POLICIES, WanTransformer, apply_model
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.train import main, parse_arguments
from rehyat_jax.train import train as train_on
from rehyat_jax.training import distill, finetune
from rehyat_jax.training.config import check_config
from rehyat_jax.training.metrics import MetricWriter
from rehyat_jax.training.optimizer import learning_rate_schedule, make_optimizer
from rehyat_jax.training.run_control import RunControl, ScheduledEvaluator
from rehyat_jax.training.setup import hybrid_config, initial_model
from rehyat_jax.training.stages import STAGES
from rehyat_jax.training.step import accumulate, gradient_update, init_state, make_step
from rehyat_jax.weights import load_params, model_checkpoint, save_model
from rehyat_jax.weights.wan.spec import WAN


def train(config, workdir):
    """On one device."""
    return train_on(config, workdir, jax.devices()[:1])


def on_one_device(function, config):
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        return function(config)


NULL_TEXT = jnp.zeros((TINY.text_length, TINY.text_dim))


# ---------------------------------------------------------------------------------------------- blocks of two kinds


@pytest.mark.parametrize("blocks, num_layers", [((1,), 3), ((0, 2), 3), ("all", 3), ((1, 3), 4)])
def test_mixed_blocks_equal_the_same_blocks_one_by_one(blocks, num_layers):
    config = TINY.replace(hybrid_blocks=blocks, hybrid=HybridConfig(chunk_frames=2), num_layers=num_layers)
    graphdef, params = tiny_model(config)
    batch = tiny_batch()
    timestep = jnp.array([100.0, 900.0])

    model = nnx.merge(graphdef, params)
    rows = iter(range(len(config.hybrid_block_indices)))
    row_of_block = [next(rows) if i in config.hybrid_block_indices else None for i in range(config.num_layers)]
    seen = iter(row_of_block)

    def attend(inputs, _):
        row = next(seen)
        if row is None:
            return softmax_attention(inputs.query, inputs.key, inputs.value), None
        maps = jax.tree.map(lambda leaf: leaf[row], params["feature_maps"])
        features = model.features(model.config.hybrid, inputs, maps)
        kwargs = dict(tokens_per_frame=inputs.tokens_per_frame, chunk_frames=2, overlap_frames=1)
        return hybrid_attention(
            inputs.query, inputs.key, inputs.value, features.query, features.key, **kwargs, implementation="reference"
        ), None

    unrolled = nnx.merge(tiny_model(config, scan_layers=False)[0], params)
    forward = lambda latents, text: unrolled.forward(latents, timestep, text, attend, {})[0]
    expected = jax.jit(forward)(batch["latents"], batch["text"])
    found = jax.jit(apply_model(graphdef))(params, batch["latents"], timestep, batch["text"])
    # float32 rounding of another order of summation.
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_every_block_s_feature_maps_get_their_own_gradient():
    config = TINY.replace(hybrid_blocks=(0, 2), hybrid=HybridConfig(chunk_frames=2))
    graphdef, params = tiny_model(config)
    batch = tiny_batch()
    loss = lambda p: jnp.square(
        apply_model(graphdef)(p, batch["latents"], jnp.array([100.0, 900.0]), batch["text"])
    ).sum()
    kernels = jax.jit(jax.grad(loss))(params)["feature_maps"]["query"]["layer_0"]["kernel"]
    first, second = (float(jnp.linalg.norm(kernel)) for kernel in kernels)
    assert first > 0 and second > 0 and first != second


def test_remat_saves_less_and_changes_no_gradient():
    config = TINY.replace(num_layers=4, hybrid_blocks="all")
    batch = tiny_batch()

    def grads(remat):
        graphdef, params = tiny_model(config, remat=remat)
        inputs = batch["latents"], jnp.array([100.0, 900.0]), batch["text"]
        compiled = (
            jax.jit(jax.grad(lambda p: jnp.square(apply_model(graphdef)(p, *inputs)).mean())).lower(params).compile()
        )
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    results = {remat: grads(remat) for remat in REMAT_POLICIES}
    for result, _ in results.values():
        # The same float32 operations in another order.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), result, results["none"][0])
    assert results["block"][1] < results["dots"][1] < results["none"][1]


def test_offloaded_block_inputs_are_in_the_host_s_memory_alone():
    wan = WAN_PRESETS["tiny"].replace(num_heads=1, ffn_dim=128, in_channels=4, out_channels=4)
    # Videos so short that XLA does their attention, which takes less to compile than kernels.
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(8, 4, 8, 16, 4), (8,), (8, 8, 64)]]

    def memory(num_layers):
        graphdef, params = abstract_model(wan.replace(num_layers=num_layers), remat="offload", dtype=jnp.bfloat16)
        loss = lambda *arguments: jnp.square(apply_model(graphdef)(*arguments)).mean()
        weights = sum(leaf.size for leaf in jax.tree.leaves(params["blocks"]))
        return compiled_for_tpu("v5e:2x2", jax.grad(loss), params, *inputs, quickly=True).memory_analysis(), weights

    (few, few_weights), (many, many_weights) = memory(2), memory(8)
    block_input = 8 * 4 * 4 * 8 * wan.width * 2  # videos x tokens x width, bfloat16
    assert (few.host_temp_size_in_bytes, many.host_temp_size_in_bytes) == (2 * block_input, 8 * block_input)
    # Weights are converted to bfloat16, and copied once.
    copies = 2 * 2 * (many_weights - few_weights)
    assert many.temp_size_in_bytes - few.temp_size_in_bytes < copies + 6 * block_input / 4


@pytest.mark.parametrize(
    "remat, hybrid_blocks, shape, forward_kernels",
    [
        ("attention", (0, 1), (4, 16, 16), {"hybrid_states": 1, "hybrid_attend": 1}),
        # Softmax attention is a kernel only for videos that are long enough. So is attention to the text, which is not
        # kept and so runs twice. Each has two kernels before it for the largest norms, and one in the backward pass.
        ("attention_offload", (), (5, 16, 32), {"softmax_attend": 1 + 2, "token_dots": 2 + 2 * 2 + 2}),
    ],
)
def test_attention_that_is_kept_is_not_computed_twice(remat, hybrid_blocks, shape, forward_kernels):
    wan = WAN_PRESETS["tiny"].replace(
        num_layers=2, in_channels=4, out_channels=4, text_length=512, hybrid_blocks=hybrid_blocks
    )
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(1, *shape, 4), (1,), (1, 8, 64)]]
    graphdef, params = abstract_model(wan, remat=remat, dtype=jnp.bfloat16)
    loss = lambda *arguments: jnp.square(apply_model(graphdef)(*arguments)).mean()
    program = compiled_for_tpu("v5e:2x2", jax.grad(loss), params, *inputs, quickly=True).as_text()
    for name, count in forward_kernels.items():
        calls = re.findall(rf'%{name}\.\d+ = .*custom_call_target="tpu_custom_call"', program)
        assert len(calls) == count, name


# ------------------------------------------------------------------------------------------------------------ distil


@pytest.fixture
def student():
    config = TINY.replace(hybrid_blocks=(0, 2), hybrid=HybridConfig(chunk_frames=2))
    return *tiny_model(config), tiny_config("distill", caption_dropout=0.5)


@pytest.mark.parametrize(
    ("name", "block_loss"),
    [
        ("l1", lambda output, target: jnp.abs(output - target).mean()),
        ("l2", lambda output, target: jnp.square(output - target).mean()),
        ("energy_l2", lambda output, target: jnp.square(output - target).mean() / jnp.square(target).mean()),
    ],
)
def test_distillation_gradients_are_those_of_each_block_on_the_teacher_s_inputs(student, name, block_loss):
    graphdef, params, config = student
    config.distill.loss = name
    feature_maps, frozen = STAGES["distill"].split(params)
    context = {"frozen": frozen, "null_text": NULL_TEXT}
    key = jax.random.key(3)
    metrics, grads = jax.jit(distill.make_grad_fn(graphdef, config))(feature_maps, context, tiny_batch(), key)

    # Independently: collect the teacher's inputs in an unrolled pass, then differentiate the dense definition.
    @jax.jit
    def of_each_block(params, feature_maps):
        captured = []

        def attend(inputs, _):
            captured.append(inputs)
            return softmax_attention(inputs.query, inputs.key, inputs.value), None

        model = nnx.merge(tiny_model(nnx.merge(graphdef, params).config, scan_layers=False)[0], params)
        noisy = distill.noise_batch(tiny_batch(), NULL_TEXT, key, config)
        model.forward(noisy.latents, noisy.timestep, noisy.text, attend, {})

        def loss(maps, inputs):
            features = model.features(model.config.hybrid, inputs, maps)
            kwargs = dict(tokens_per_frame=inputs.tokens_per_frame, chunk_frames=2, overlap_frames=1)
            arrays = inputs.query, inputs.key, inputs.value
            output = hybrid_attention(*arrays, features.query, features.key, **kwargs, implementation="reference")
            target = softmax_attention(*arrays)
            return block_loss(output, target), jnp.abs(output - target).mean() / jnp.abs(target).mean()

        results = []
        for row, block in enumerate((0, 2)):
            maps = jax.tree.map(lambda leaf, row=row: leaf[row], feature_maps)
            results.append(jax.value_and_grad(loss, has_aux=True)(maps, captured[block]))
        return results

    for row, ((loss, relative_error), expected) in enumerate(of_each_block(params, feature_maps)):
        found = jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), grads)
        # Sums of float32 terms with signs (L1): relative to the largest entry.
        check = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * float(np.abs(b).max()))
        jax.tree.map(check, found, expected)
        # A mean of a few hundred float32 terms.
        np.testing.assert_allclose(metrics["block_loss"][row], loss, rtol=1e-4)
        np.testing.assert_allclose(metrics["relative_error"][row], relative_error, rtol=1e-4)


def distillation(config, *forms):
    """(feature maps, optimizer -> the compiled update of a step) of a model of three blocks, two of them hybrid."""
    architecture = TINY.replace(hybrid_blocks=(0, 2), hybrid=forms if len(forms) > 1 else forms[0])
    graphdef, params = tiny_model(architecture)
    maps, frozen = STAGES["distill"].split(params)
    context = {"frozen": frozen, "null_text": NULL_TEXT}
    arguments = context, one_at_a_time(tiny_batch()), jax.random.key(3)
    return maps, lambda optimizer: jax.jit(
        lambda maps, state: distill.make_update(graphdef, config, optimizer)(maps, state, *arguments)
    )


def test_each_block_s_gradient_is_clipped_to_its_own_norm():
    config = tiny_config("distill", **{"distill.loss": "l2"})
    descent = optax.sgd(1.0)  # its updates are the gradients
    maps, make = distillation(config, HybridConfig(chunk_frames=2))
    free = make(descent)(maps, descent.init(maps))
    gradients = lambda new: [
        jnp.concatenate([(old - new)[row].ravel() for old, new in zip(*map(jax.tree.leaves, (maps, new)), strict=True)])
        for row in range(2)
    ]
    before = gradients(free.params)
    norms = [float(jnp.linalg.norm(gradient)) for gradient in before]
    np.testing.assert_allclose(free.norm, np.hypot(*norms), rtol=1e-3)
    small, large = np.argsort(norms)
    # Above the smaller norm, below the larger one.
    config.distill.clip_norm = float(np.sqrt(norms[small] * norms[large]))
    clipped = make(descent)(maps, descent.init(maps))
    after = gradients(clipped.params)
    # Differences of float32 parameters of about 1.
    np.testing.assert_allclose(after[small], before[small], atol=1e-6)
    np.testing.assert_allclose(after[large], before[large] * config.distill.clip_norm / norms[large], atol=1e-6)
    np.testing.assert_allclose(clipped.norm, np.hypot(norms[small], config.distill.clip_norm), rtol=1e-3)


@pytest.mark.parametrize(
    "forms",
    [
        (HybridConfig(chunk_frames=2),),
        (HybridConfig(chunk_frames=2), HybridConfig(feature_map=FeatureMapConfig(features=16))),
    ],
    ids=["one form", "two forms"],
)
def test_several_updates_are_those_of_all_blocks_on_one_batch(forms):
    changes = {"distill.clip_norm": 0.01, "distill.updates_per_batch": 3, "optimizer.clip_norm": 0.0}
    config = tiny_config("distill", **changes, **{"optimizer.learning_rate": 1e-2, "optimizer.weight_decay": 0.1})
    optimizer = make_optimizer(config, 3)
    maps, make = distillation(config, *forms)
    found = make(optimizer)(maps, optimizer.init(maps))

    config.distill.updates_per_batch = 1
    expected, norms, once = (maps, optimizer.init(maps)), [], make(optimizer)
    for number in range(3):
        proposal = once(*expected)
        expected = proposal.params, proposal.opt_state
        norms.append(float(proposal.norm))
        if number == 0:
            check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
            jax.tree.map(check, found.metrics, proposal.metrics)
    # Adam divides gradients by their size, so that rounding of tiny ones shows; its update is at most 1e-2.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found.params, expected[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found.opt_state, expected[1])
    np.testing.assert_allclose(found.norm, max(norms), rtol=1e-4)


def test_a_step_knows_if_a_later_update_of_it_is_not_finite():
    config = tiny_config("distill", **{"distill.updates_per_batch": 2})
    maps, make = distillation(config, HybridConfig(chunk_frames=2))
    proposal = make(optax.sgd(1e38))(maps, optax.sgd(1e38).init(maps))
    assert np.isfinite(proposal.metrics["loss"]) and not np.isfinite(proposal.norm)


def count_score_products(jaxpr, shapes):
    """Matrix products in a jaxpr, nested ones included, of which an operand or the result has the size of scores."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            sizes = [sorted(size for size in v.aval.shape if size > 1) for v in (*equation.invars, *equation.outvars)]
            count += any(size in shapes for size in sizes)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr"):
                count += count_score_products(getattr(parameter, "jaxpr", parameter), shapes)
    return count


@pytest.mark.parametrize("implementation", ["scan", "xla"])
def test_distillation_runs_no_softmax_backward(implementation):
    """Two score-sized products (q.k and weights.v) of the student's window and two of the teacher: forward only."""
    architecture = TINY.replace(hybrid_blocks=(0, 2), hybrid=HybridConfig(chunk_frames=2))
    graphdef, params = tiny_model(architecture, attention_implementation=implementation)
    config = tiny_config("distill")
    feature_maps, frozen = STAGES["distill"].split(params)
    context = {"frozen": frozen, "null_text": NULL_TEXT}
    batch = tiny_batch(frames=4)
    grad_fn = distill.make_grad_fn(graphdef, config)
    # 6 tokens a frame, 2 heads, batch 2: chunks of 12 queries with windows of 18 keys (one chunk at a time in a scan, 2
    # at once in "xla"), and 24 tokens in all.
    scores = [[2, 2, 12, 18], [2, 2, 2, 12, 18], [2, 2, 24, 24]]
    program = jax.make_jaxpr(grad_fn)(feature_maps, context, batch, jax.random.key(0)).jaxpr
    assert count_score_products(program, scores) == 4

    # The counter does see a softmax backward where there is one.
    def loss(params):
        inputs = batch["latents"], jnp.array([100.0, 900.0]), batch["text"]
        return apply_model(graphdef)(params, *inputs).sum()

    assert count_score_products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr, scores) > 4


@pytest.mark.parametrize(("updates", "results"), [(1, 1), (4, 3)])
def test_distillation_memory_does_not_grow_with_depth(updates, results):
    """Beyond gradients of the feature maps, or new feature maps with two moments. Activations would be far more."""

    def temporary_bytes(num_layers):
        architecture = TINY.replace(num_layers=num_layers, hybrid_blocks="all", hybrid=HybridConfig(chunk_frames=2))
        graphdef, params = tiny_model(architecture)
        feature_maps, frozen = STAGES["distill"].split(params)
        config = tiny_config("distill", **{"distill.updates_per_batch": updates, "optimizer.clip_norm": 0.0})
        optimizer = make_optimizer(config)
        update = jax.jit(distill.make_update(graphdef, config, optimizer), donate_argnums=(0, 1))
        context, batches = {"frozen": frozen, "null_text": NULL_TEXT}, one_at_a_time(tiny_batch(8, 8))
        arguments = feature_maps, optimizer.init(feature_maps), context, batches, jax.random.key(0)
        maps_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(feature_maps))
        return update.lower(*arguments).compile().memory_analysis().temp_size_in_bytes, maps_bytes

    (few, few_maps), (many, many_maps) = temporary_bytes(3), temporary_bytes(12)
    assert many - few <= (results + 0.5) * (many_maps - few_maps)


def test_calibration_gives_every_block_the_softmax_mass(student):
    graphdef, params, config = student
    batch = tiny_batch(4, 6)
    once = distill.calibrated(graphdef, params, one_at_a_time(batch), NULL_TEXT, config)
    twice = distill.calibrated(graphdef, once, one_at_a_time(batch), NULL_TEXT, config)
    scales = [tree["feature_maps"]["query"]["log_scale"] for tree in (params, once, twice)]
    assert float(jnp.abs(scales[1] - scales[0]).max()) > 0.1
    # The linear mass is proportional to the scale: a second calibration on the same batch finds nothing to correct.
    np.testing.assert_allclose(scales[2], scales[1], atol=1e-4)


def test_attention_errors_have_references_that_are_zero_for_a_single_chunk(student):
    graphdef, params, config = student
    batch, key = tiny_batch(2, 6), jax.random.key(0)
    measure = lambda graphdef: jax.jit(lambda p: attention_errors(graphdef, p, batch, NULL_TEXT, key, config))(params)
    errors = measure(graphdef)
    assert all(value.shape == (2,) for value in errors.values())
    assert (errors["exact"] > 0).all() and (errors["window_only"] > 0).all()

    # With one chunk for the whole video there is nothing left to approximate.
    config_one_chunk = TINY.replace(hybrid_blocks=(0, 2), hybrid=HybridConfig(chunk_frames=6))
    graphdef = nnx.graphdef(WanTransformer(config_one_chunk, rngs=nnx.Rngs(0)))
    errors = measure(graphdef)
    for value in errors.values():
        np.testing.assert_allclose(value, 0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- the shared step


def test_one_update_at_a_small_learning_rate_moves_the_float32_parameters():
    """In bfloat16, 1e-5 is lost in the rounding of almost every parameter."""
    graphdef, params = tiny_model(TINY.replace(hybrid_blocks=(1,)), dtype=jnp.bfloat16)
    config = tiny_config("finetune", **{"optimizer.learning_rate": 1e-5, "optimizer.warmup_steps": 0, "batch_size": 2})
    optimizer = make_optimizer(config)
    grad_fn = accumulate(finetune.make_grad_fn(finetune.make_loss(apply_model(graphdef), config)), 1)
    step = make_step(gradient_update(grad_fn, optimizer), seed=0, ema_decay=0.9, spike_factor=10.0)
    state = jax.jit(lambda params: init_state(params, optimizer, keep_ema=True))(params)
    new, _ = jax.jit(step)(state, {"null_text": NULL_TEXT}, one_at_a_time(tiny_batch()))
    params, new = jax.device_get((params, new))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((new["params"], new["ema"])))
    moved = [np.mean(a != b) for a, b in zip(*map(jax.tree.leaves, (params, new["params"])), strict=True)]
    # A key's bias shifts every score of a query alike, so softmax blocks give it almost no gradient; all else moves.
    assert np.mean(moved) > 0.98
    # The average moves a tenth of the way; both are differences of nearly equal float32 numbers of size up to one.
    ema = lambda old, new: 0.9 * old + 0.1 * new
    jax.tree.map(lambda e, a, b: np.testing.assert_allclose(e, ema(a, b), atol=1e-6), new["ema"], params, new["params"])


def test_accumulated_gradients_are_those_of_the_whole_batch():
    def grad_fn(params, context, batch, key):
        loss, grads = jax.value_and_grad(lambda p: jnp.square(batch["x"] @ p - context["y"]).mean())(params)
        return {"loss": loss}, grads

    batch = {"x": jax.random.normal(jax.random.key(0), (12, 5))}
    arguments = jnp.ones(5), {"y": 2.0}, batch, jax.random.key(1)
    params, context, batch, key = arguments
    parts = jax.tree.map(lambda x: x.reshape(3, 4, -1), batch)
    whole, parts = grad_fn(*arguments), accumulate(grad_fn, 3)(params, context, parts, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), parts, whole)


def test_parts_of_an_accumulated_batch_draw_different_noise():
    draw = lambda params, context, batch, key: ({"noise": jax.random.normal(key, (2,))}, params)
    metrics, _ = accumulate(draw, 2)(jnp.ones(1), {}, {"x": jnp.ones((2, 1, 1))}, jax.random.key(0))
    first, second = (jax.random.normal(key, (2,)) for key in jax.random.split(jax.random.key(0), 2))
    assert not np.allclose(first, second)
    np.testing.assert_allclose(metrics["noise"], (first + second) / 2, rtol=1e-6)


def test_finetuning_loss_is_flow_matching_with_shift_and_dropped_captions():
    config = tiny_config("finetune", caption_dropout=0.5, flow_shift=7.0)
    seen = {}

    def apply(params, latents, timestep, text):
        seen.update(latents=latents, timestep=timestep, text=text)
        return params * latents

    batch, null = tiny_batch(64, 1), jnp.full((TINY.text_length, TINY.text_dim), 9.0)
    grad_fn = finetune.make_grad_fn(finetune.make_loss(apply, config))
    metrics, grads = grad_fn(jnp.array(0.5), {"null_text": null}, batch, jax.random.key(5))

    sigma = np.asarray(seen["timestep"])[:, None, None, None, None] / 1000
    noise = (seen["latents"] - (1 - sigma) * batch["latents"]) / sigma
    error = 0.5 * seen["latents"] - (noise - batch["latents"])
    np.testing.assert_allclose(metrics["loss"], jnp.square(error).mean(), rtol=1e-4)
    np.testing.assert_allclose(grads, (2 * error * seen["latents"]).mean(), rtol=1e-3)
    # The median of a logit-normal is 1/2, shifted by 7 to 7/8.
    assert 0.75 < np.median(sigma) < 0.95
    dropped = (np.asarray(seen["text"]) == 9).all((1, 2))
    assert 0.25 < dropped.mean() < 0.75
    np.testing.assert_array_equal(np.asarray(seen["text"])[~dropped], batch["text"][~dropped])


def test_schedule_warms_up_and_decays_to_zero():
    schedule = learning_rate_schedule(1.0, tiny_config("finetune", steps=10, **{"optimizer.warmup_steps": 3}))
    rates = [float(schedule(step)) for step in range(11)]
    assert 0 < rates[0] < rates[1] < rates[2] < rates[3] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[10] == 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_shrinks_kernels_or_muon_s_matrices_alone(name):
    _, params = tiny_model(TINY.replace(hybrid_blocks=(1,)))
    config = tiny_config("finetune", **{"optimizer.name": name, "optimizer.weight_decay": 0.1})
    optimizer = make_optimizer(config)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        is_decayed = path[-1].key == "kernel" and (name == "adamw" or path[0].key == "blocks")
        assert bool(np.any(update != 0)) == is_decayed, path


def test_muon_takes_the_blocks_matrices_and_adam_the_rest():
    _, params = tiny_model(TINY.replace(hybrid_blocks=(1,)))
    config = tiny_config(
        "finetune", **{"optimizer.name": "muon", "optimizer.warmup_steps": 0, "optimizer.clip_norm": 0.0}
    )
    config.optimizer.muon_learning_rate, config.optimizer.weight_decay = 1.0, 0.0
    optimizer = make_optimizer(config)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    # Muon's update of every layer's matrix is nearly orthogonal; its five Newton-Schulz steps leave singular values
    # between about 0.7 and 1.2.
    for kernel in updates["blocks"]["feed_forward"]["up"]["kernel"]:
        singular = np.linalg.svd(np.asarray(kernel), compute_uv=False)
        assert singular.min() / singular.max() > 0.5
    # Adam's first update has one size, whatever the gradient's.
    adam = jnp.abs(updates["feature_maps"]["query"]["layer_0"]["kernel"])
    np.testing.assert_allclose(adam, adam.mean(), rtol=1e-3)
    assert 1 <= adam.mean() / config.optimizer.learning_rate < 2


class NeverAsked:
    """A `StopSignal` that no SIGTERM reaches."""

    def is_requested(self, steps):
        return False


def test_logged_metrics_are_means_of_useful_updates_since_the_last_log(tmp_path, capsys):
    config = tiny_config("finetune", steps=6, log_every=3, checkpoint_every=5, max_skipped=2)
    writer = MetricWriter(tmp_path, first_step=0, steps=6, description="test")
    evaluators = [ScheduledEvaluator("probe", 2, lambda params: [("size", params)])]
    control = RunControl(config, 0, writer, NeverAsked(), lambda step: 0.5, evaluators)
    losses = [1.0, 3.0, 7.0, jnp.nan, 5.0, jnp.inf]
    in_a_row = [0, 0, 0, 1, 0, 2]
    decisions = []
    for step, (loss, skipped) in enumerate(zip(losses, in_a_row, strict=True), start=1):
        metrics = {"loss": jnp.array(loss), "gradient_norm": jnp.array(loss), "block_loss": jnp.array([loss, 0.0])}
        metrics["skipped_in_a_row"] = jnp.array(skipped)
        decisions.append(control.after_step(step, metrics, params=lambda step=step: 10 * step))
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    mean = lambda loss: {"loss": loss, "gradient_norm": loss, "block_loss": [loss, 0.0]}
    assert lines == [
        {"step": 1, **mean(1.0), "learning_rate": 0.5, "skipped": 0},
        {"step": 2, "probe/size": 20},
        {"step": 3, **mean(5.0), "learning_rate": 0.5, "skipped": 0},
        {"step": 4, "probe/size": 40},
        {"step": 6, **mean(5.0), "learning_rate": 0.5, "skipped": 2, "probe/size": 60},
    ]
    errors = capsys.readouterr().err
    assert "step 4: update skipped; loss nan, gradient norm nan" in errors
    assert "step 6: update skipped; loss inf" in errors
    assert [decision.save for decision in decisions] == [False] * 4 + [True, True]
    assert [decision.loss for decision in decisions] == [None] * 4 + [np.mean([1, 3, 7]), 5]
    assert [decision.skipped for decision in decisions] == [0] * 5 + [2]
    assert not any(decision.stop for decision in decisions)


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (
            "distill",
            {"optimizer.clip_norm": 0.0, "distill.updates_per_batch": 2, "distill.clip_norm": 0.1},
        ),
        ("finetune", {"ema_decay": 0.9, "optimizer.name": "muon", "accumulation_steps": 2}),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, stage, changes):
    config = digits_config(tmp_path, stage, **changes)
    config.profile = (2, 3)
    whole = train(config, tmp_path / "whole")
    assert len(list((tmp_path / "whole" / "profile").rglob("*.xplane.pb"))) == 1

    # Interrupted after its fourth step; the newest checkpoint is that of the third.
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricWriter, "write", interrupt_at(4, MetricWriter.write))
        train(config, stopped)
    resumed = train(config, stopped)

    jax.tree.map(np.testing.assert_array_equal, load_params(resumed)[1], load_params(whole)[1])
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (tmp_path / "whole", stopped)]
    assert [entry["step"] for entry in logs[1]] == list(range(1, 7))
    assert logs[0] == logs[1]
    # TensorBoard shows every step once, too.
    curve = EventAccumulator(str(stopped / "tensorboard")).Reload().Scalars("loss")
    np.testing.assert_array_equal([[point.step, point.value] for point in curve], losses_of(logs[1]))

    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # as a kill leaves it
    train(config, stopped)
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == 6


def losses_of(log):
    return [[entry["step"], np.float32(entry["loss"])] for entry in log]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """(configuration, resulting model, {step: line of the log}) of a run of stage 1 with evaluators."""
    folder = tmp_path_factory.mktemp("distilled")
    changes = {"steps": 40, "checkpoint_every": 20, "optimizer.learning_rate": 1e-2}
    config = digits_config(folder, "distill", **changes)
    config.evals = ({"type": "attention_error", "every": 20}, {"type": "flow_loss", "every": 40, "name": "held_out"})
    model = train(config, folder / "run")
    return config, model, {line["step"]: line for line in map(json.loads, (folder / "run" / "metrics.jsonl").open())}


def test_distillation_changes_the_feature_maps_alone(distilled):
    config, model, _ = distilled
    teacher, (student_wan, student, metadata) = load_params(config.init_from)[1], load_params(model)
    assert student_wan.hybrid_blocks == "all" and metadata["codec"] == "space_to_depth"
    del student["feature_maps"]
    jax.tree.map(np.testing.assert_array_equal, student, teacher)


def test_distillation_lowers_every_block_s_error(distilled):
    errors = np.array([line["relative_error"] for line in distilled[2].values()])
    assert len(errors) == 40
    assert (errors[-10:].mean(0) < 0.9 * errors[0]).all()


def test_finetuning_may_keep_some_of_the_distilled_blocks(distilled, tmp_path):
    config, path, _ = distilled
    trained = load_params(path)[1]["feature_maps"]
    finetuning = digits_config(tmp_path, "finetune", init_from=str(path))
    finetuning.hybrid.blocks, finetuning.hybrid.chunk_frames = (1,), config.hybrid.chunk_frames
    finetuning.hybrid.feature_map.features = config.hybrid.feature_map.features
    model = on_one_device(initial_model, finetuning)
    assert model.config.hybrid_blocks == (1,) and not model.fresh_feature_maps
    maps = model.params["feature_maps"]
    jax.tree.map(lambda kept, all_: np.testing.assert_array_equal(kept[0], all_[1]), maps, trained)

    finetuning.hybrid.chunk_frames = 3
    with pytest.raises(InputError, match="chunk_frames=3"):
        on_one_device(initial_model, finetuning)


def test_data_that_the_model_cannot_take_is_named(tmp_path):
    config = WAN_PRESETS["tiny"].replace(num_layers=1, ffn_dim=8, num_heads=1, head_dim=12, text_dim=48)
    params = tiny_model(config)[1]
    save_model(tmp_path / "other", config, params, codec="wan_vae", text_encoder="umt5")
    finetuning = tiny_config("finetune", init_from=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"text width 64, but the model expects 48.*umt5"):
        train(finetuning, tmp_path / "run")


def test_pretraining_from_scratch_lowers_the_loss(tmp_path, monkeypatch):
    monkeypatch.setitem(WAN_PRESETS, "tiny", WAN_PRESETS["tiny"].replace(num_layers=2, ffn_dim=64, num_heads=1))
    config = tiny_config("pretrain", steps=24, **{"optimizer.learning_rate": 3e-3})
    train(config, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").open()]
    # Other batches and noise: the means of untrained losses are within 3 percent of one another, of these 26 apart.
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
    saved, _, metadata = load_params(tmp_path / "model")
    assert not saved.hybrid_blocks and metadata["text_encoder"] == "word_vectors"


# ------------------------------------------------------------------------------------------------------- user's errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.optimizer.learning_rat=1"], ["learning_rat", "learning_rate"]),
        (["--config.stepz=1"], ["stepz", "steps"]),
        (["--config.steps=many"], ["steps", "many"]),
        (["--config.stage=finetine"], ["stage", "finetine", "finetune"]),
        (["--config.init_from=nowhere"], ["nowhere"]),
        (["--config.init_from="], ["init_from"]),
        (["--config.accumulation_steps=5"], ["batch_size", "accumulation_steps"]),
        (["--config.optimizer.warmup_steps=1000"], ["warmup_steps", "steps"]),
        (["--config.optimizer.name=sgd"], ["optimizer.name", "sgd", "adamw"]),
        (["--config.data.source=webvid"], ["data.source", "webvid"]),
        (["--config.hybrid.overlap_frames=9"], ["overlap_frames", "9"]),
        (["--config.remat=some"], ["remat", "some"]),
        (["--config.timestep_sampling=often"], ["timestep_sampling", "often"]),
        (["--config.dtype=float31"], ["dtype", "float31"]),
        (["--config.hybrid.blocks=(0,9)"], ["config.hybrid.blocks", "9"]),
        (
            ["--config.stage=finetune", "--config.hybrid.blocks=()", "--config.hybrid.chunk_frames=5"],
            ["blocks is unset"],
        ),
        (["--config.attention_implementation=flash"], ["attention_implementation", "flash", "scan"]),
        (["--config.seed=-1"], ["seed", "-1"]),
        (["--config.ema_decay=1.0"], ["ema_decay"]),
        (["--config.data.source=prepared"], ["data.path"]),
        (["stray"], ["stray"]),
    ],
)
def test_wrong_configuration_is_named_and_exits_with_2(tmp_path, capsys, arguments, words):
    file = tmp_path / "config.py"
    file.write_text(
        "from rehyat_jax.training.config import check_config, default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.stage, config.steps, config.dtype = 'distill', 200, 'float32'\n"
        "    config.hybrid.blocks = 'all'\n"
        f"    config.init_from = {pretrained(tmp_path)!r}\n"
        "    return config\n"
    )
    assert main([f"--config={file}", f"--workdir={tmp_path / 'run'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    for word in words:
        assert word in error


def test_parameters_that_overflow_are_never_saved(tmp_path):
    # The gradient is finite, so the update is not skipped.
    changes = {"optimizer.learning_rate": 3e38, "optimizer.warmup_steps": 0, "optimizer.weight_decay": 10.0}
    config = digits_config(tmp_path, "distill", steps=4, checkpoint_every=1, **changes)
    with pytest.raises(RunDivergedError, match=r"parameters are not finite after step .*learning_rate"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        config.steps = int(step.name)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_params(train(config, tmp_path / "run"))[1]))


def test_missing_configuration_file_is_named(tmp_path, capsys):
    assert main(["--config=configs/nope.py", f"--workdir={tmp_path}"]) == 2
    assert "configs/nope.py" in capsys.readouterr().err


def test_fields_on_the_command_line_reach_the_configuration():
    arguments = ["train", "--config=configs/demo_distill.py", "--workdir=somewhere"]
    config, workdir, *_ = parse_arguments(
        [*arguments, "--config.optimizer.learning_rate=0.5", "--config.hybrid.blocks=(0,2)"]
    )
    assert config.optimizer.learning_rate == 0.5 and tuple(config.hybrid.blocks) == (0, 2)
    assert config.steps == 300 and workdir == Path("somewhere")


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.py")), ids=lambda path: path.stem)
def test_shipped_configurations_can_be_run(path):
    config, *_ = parse_arguments(["train", f"--config={path}", "--workdir=somewhere"])
    check_config(config)
    hybrid_config(config)
    assert "python -m rehyat_jax.train --config configs/" + path.name in path.read_text()


def test_evaluators_log_their_figures_next_to_the_metrics(distilled):
    lines = distilled[2]
    assert [step for step, line in lines.items() if "attention_error/hybrid" in line] == [20, 40]
    assert [step for step, line in lines.items() if "held_out/loss" in line] == [40]
    # Per hybrid block, on the same batch and noise: what stage 1 lowers.
    assert len(lines[40]["attention_error/hybrid"]) == 2
    assert np.mean(lines[40]["attention_error/hybrid"]) < np.mean(lines[20]["attention_error/hybrid"])
    assert lines[20]["attention_error/exact"] == lines[40]["attention_error/exact"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "fvd", "every": 3}, "type must be one of"),
        ({"type": "flow_loss", "every": 1, "batchs": 3}, "batchs"),
        ({"type": "attention_error", "every": 1}, "no hybrid blocks"),
    ],
)
def test_wrong_evaluators_are_named_before_training(tmp_path, entry, message):
    config = digits_config(tmp_path, "finetune")
    config.evals = (entry,)
    with pytest.raises(InputError, match=message):
        train(config, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    assert not log.exists() or log.read_text() == ""


def test_missing_flags_are_named(capsys):
    assert main([]) == 2
    assert "--config" in capsys.readouterr().err


def test_parameters_that_could_not_be_saved_are_found_before_training(tmp_path, monkeypatch):
    config = digits_config(tmp_path, "finetune")
    shorter = dataclasses.replace(WAN, table=lambda config: WAN.table(config)[:-1])

    def loaded(*arguments, **options):
        model = initial_model(*arguments, **options)
        # From now on, the table lacks what the model has.
        monkeypatch.setattr(model_checkpoint, "spec_of", lambda config: shorter)
        return model

    monkeypatch.setattr("rehyat_jax.train.initial_model", loaded)
    with pytest.raises(ValueError, match=r"head\.projection\.bias is not a parameter of this configuration"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
