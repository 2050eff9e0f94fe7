"""Low-rank adapters: their mathematics, what a run with them trains, keeps and writes, and their file in diffusers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from flax import traverse_util
from oracles import random_wan, save_wan
from safetensors.numpy import load_file
from tiny_runs import TINY, digits_config, killed_after, tiny_batch, tiny_config, tiny_model

from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.errors import InputError
from rehyat_jax.models.lora import (
    LORA_TARGETS,
    LoraConfig,
    adapted_layers,
    is_adapter,
    joined,
    merged,
    split_tree,
)
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.models.wan.flops import adapter_flops, forward_flops, training_flops
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.planning.train_step import abstract_step
from rehyat_jax.train import train as train_on
from rehyat_jax.training import finetune
from rehyat_jax.training.noising import noise_batch
from rehyat_jax.training.setup import initial_model
from rehyat_jax.training.stages import STAGES
from rehyat_jax.training.velocity import make_teacher
from rehyat_jax.weights import load_params, save_model
from rehyat_jax.weights.adapters import ADAPTERS_FILE, save_adapters

LORA = LoraConfig(rank=2, alpha=3.0, targets=LORA_TARGETS)
STUDENT = TINY.replace(hybrid_blocks=(0, 2), hybrid=HybridConfig(chunk_frames=2))
NULL_TEXT = jnp.full((TINY.text_length, TINY.text_dim), 0.5)
NAMES = dict(codec="space_to_depth", text_encoder="word_vectors")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compiling is nearly all that these tests cost."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def train(config, workdir, devices=1):
    return train_on(config, workdir, jax.devices()[:devices])


def logged(workdir, name):
    return [json.loads(line).get(name) for line in (workdir / "metrics.jsonl").open()]


def base_of(params):
    return split_tree(params, is_adapter)[1]


# ---------------------------------------------------------------------------------------------------------- mathematics


def test_a_model_whose_b_is_zero_is_its_base():
    adapted, params = tiny_model(STUDENT, lora=LORA)
    base, base_params = tiny_model(STUDENT)
    assert jax.tree.structure(base_params) == jax.tree.structure(base_of(params))
    zero = {path: 0 * leaf if path[-2:] == ("lora", "b") else leaf for path, leaf in flat(params).items()}
    zero = traverse_util.unflatten_dict(zero)
    inputs = jnp.asarray(tiny_batch()["latents"]), jnp.array([700.0, 30.0]), jnp.asarray(tiny_batch()["text"])
    expected = jax.jit(apply_model(base))(base_of(params), *inputs)
    np.testing.assert_array_equal(jax.jit(apply_model(adapted))(zero, *inputs), expected)
    assert np.abs(jax.jit(apply_model(adapted))(params, *inputs) - expected).max() > 1e-3


def test_outputs_and_gradients_are_those_of_the_merged_model():
    adapted, params = tiny_model(TINY, lora=LORA)
    base, _ = tiny_model(TINY)
    context, key, config = {"null_text": NULL_TEXT}, jax.random.key(3), tiny_config("finetune")

    def metrics_and_grads(model_def, params):
        loss = finetune.make_loss(apply_model(model_def), config)
        return jax.jit(finetune.make_grad_fn(loss))(params, context, tiny_batch(), key)

    metrics, grads = metrics_and_grads(adapted, params)
    merged_metrics, merged_grads = metrics_and_grads(base, merged(params, LORA))
    # Float32 products in another order.
    np.testing.assert_allclose(metrics["loss"], merged_metrics["loss"], rtol=1e-6)
    kernels, found = flat(merged_grads), dict((path, (a, b)) for path, a, b in adapted_layers(grads))
    layers = list(adapted_layers(params))
    assert len(layers) == 2 * 4 + 2
    scale = LORA.alpha / LORA.rank
    for path, a, b in layers:
        dw = kernels[*path, "kernel"]
        expected = scale * dw @ b.swapaxes(1, 2), scale * a.swapaxes(1, 2) @ dw
        for got, wanted in zip(found[path], expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-4 * float(jnp.abs(wanted).max()))


def flat(tree):
    return traverse_util.flatten_dict(tree)


@pytest.mark.parametrize("own", [False, True], ids=["frozen_base", "own_teacher"])
def test_the_teacher_does_not_see_adapters(own):
    adapted, params = tiny_model(STUDENT, lora=LORA)
    config = tiny_config("finetune", **{"velocity.guidance_scale": 2.0})
    noisy = noise_batch(tiny_batch(), NULL_TEXT, jax.random.key(3), config)
    softmax, teacher = tiny_model(TINY)
    teacher = jax.tree.map(lambda leaf: np.float32(1.1) * np.asarray(leaf), teacher) if own else base_of(params)
    context = {"null_text": NULL_TEXT} | ({"teacher": teacher} if own else {})
    teacher = {name: tree for name, tree in teacher.items() if name != "feature_maps"}
    predict = jax.jit(lambda text: apply_model(softmax)(teacher, noisy.latents, noisy.timestep, text))
    null = predict(jnp.stack([NULL_TEXT] * 2))
    found = jax.jit(make_teacher(adapted, config))(params, context, noisy)
    # The same products, fused differently.
    np.testing.assert_allclose(found, null + 2 * (predict(noisy.text) - null), rtol=1e-5, atol=1e-5)


def test_a_split_tree_is_joined_again():
    _, params = tiny_model(STUDENT, lora=LORA)
    for stage in ("velocity", "finetune"):
        trained, frozen = STAGES[stage].split(params)
        assert trained.keys() == {"blocks", "feature_maps"}
        assert {path[-2] for path in flat(trained["blocks"])} == {"lora"}
        assert not any(is_adapter(path) or path[0] == "feature_maps" for path in flat(frozen))
        jax.tree.map(np.testing.assert_array_equal, STAGES[stage].join(trained, frozen), params)


# -------------------------------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    wan = WAN_PRESETS["tiny"].replace(num_layers=2, ffn_dim=64, num_heads=2, head_dim=12)
    path = tmp_path_factory.mktemp("teacher") / "model"
    save_model(path, wan, tiny_model(wan)[1], **NAMES)
    return str(path)


def lora_run(tmp_path, teacher, stage="velocity", **changes):
    config = digits_config(tmp_path, stage, **{"init_from": teacher, "lora.rank": 2, "lora.alpha": 4.0} | changes)
    if config.hybrid.blocks:
        config.hybrid.chunk_frames, config.hybrid.feature_map.features = 2, 16
    config.optimizer.learning_rate = 1e-2
    return config


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, teacher):
    """(configuration, workdir) of a complete run."""
    folder = tmp_path_factory.mktemp("run")
    changes = {"lora.targets": ("value", "output", "up", "down"), "hybrid.blocks": "all"}
    config = lora_run(folder, teacher, **changes, **{"velocity.guidance_scale": 3.0})
    train(config, folder / "whole")
    return config, folder / "whole"


def test_only_adapters_and_feature_maps_are_trained(whole_run, teacher):
    config, workdir = whole_run
    file = load_file(workdir / "adapter" / ADAPTERS_FILE)
    wan, after, _ = load_params(workdir / "model")
    before, after = flat(load_params(teacher)[1]), flat(after)
    adapted = {"self_attention.value": "attn1.to_v", "cross_attention.value": "attn2.to_v"}
    adapted |= {"self_attention.output": "attn1.to_out.0", "cross_attention.output": "attn2.to_out.0"}
    adapted |= {"feed_forward.up": "ffn.net.0.proj", "feed_forward.down": "ffn.net.2"}
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {("blocks", *path.split("."), "kernel") for path in adapted}
    assert len(file) == 2 * wan.num_layers * len(adapted)
    for path, name in adapted.items():
        key = ("blocks", *path.split("."), "kernel")
        for block in range(wan.num_layers):
            a, b = (file[f"transformer.blocks.{block}.{name}.lora_{part}.weight"] for part in "AB")
            assert a.shape[0] == b.shape[1] == config.lora.rank
            np.testing.assert_allclose(after[key][block], before[key][block] + (b @ a).T, atol=1e-6)
    fresh = initial_maps(config)
    assert all((np.abs(after["feature_maps", *path] - leaf) > 0).any() for path, leaf in fresh.items())


def initial_maps(config):
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        return flat(initial_model(config).params["feature_maps"])


def test_a_stopped_run_resumes_bit_for_bit(whole_run, tmp_path):
    config, workdir = whole_run
    killed_after(3, workdir, tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    places = workdir, tmp_path / "stopped"
    both = [load_params(place / "model")[1] for place in places]
    both = zip(both, [load_file(place / "adapter" / ADAPTERS_FILE) for place in places], strict=True)
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_a_resumed_run_refuses_other_adapters_and_another_base(whole_run, tmp_path):
    config, workdir = whole_run
    changed = config.copy_and_resolve_references()
    changed.lora.rank = 3
    with pytest.raises(InputError, match=r"config\.lora\.rank +2 +3 +refused"):
        train(changed, workdir)
    changed = config.copy_and_resolve_references()
    changed.init_from = str(tmp_path / "base")
    wan, params, _ = load_params(config.init_from)
    save_model(changed.init_from, wan, jax.tree.map(lambda leaf: np.float32(1.1) * leaf, params), **NAMES)
    with pytest.raises(InputError, match=r"files of config\.init_from .*refused"):
        train(changed, workdir)


def test_adapters_learn_from_their_own_base_on_any_mesh(whole_run, tmp_path):
    """Adapters of products whose inputs, and of ones whose outputs, are sharded over "tensor"."""
    config, one = whole_run[0].copy_and_resolve_references(), whole_run[1]
    errors = logged(one, "velocity_error")
    assert errors[-1] < errors[0]
    config.mesh.fsdp, config.mesh.tensor = 2, 2
    train(config, tmp_path / "many", 4)
    # The same float32 sums in another order.
    np.testing.assert_allclose(logged(tmp_path / "many", "loss"), logged(one, "loss"), rtol=1e-5)
    found, expected = (load_file(place / "adapter" / ADAPTERS_FILE) for place in (tmp_path / "many", one))
    # Adam's first steps divide by the sizes of such sums.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, expected)


# ----------------------------------------------------------------------------------------------------- memory and cost


def test_moments_and_average_are_those_of_the_trained_parameters_alone(tmp_path, teacher):
    config = lora_run(tmp_path, teacher, "finetune", ema_decay=0.9)
    wan = load_params(teacher)[0].replace(hybrid_blocks="all", hybrid=HybridConfig(chunk_frames=2))
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        memory = abstract_step(config, wan, (4, 4, 4)).memory
    params = tiny_model(wan, lora=LoraConfig(2, 2.0, config.lora.targets))[1]
    trained, frozen = STAGES["finetune"].split(params)
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert memory["parameters"] == memory["average (EMA)"] == size(trained)
    assert 2 * size(trained) <= memory["optimizer state"] < 2 * size(trained) + 100  # and counters
    assert memory["frozen teacher"] == size(frozen) > 5 * size(trained["blocks"])


def test_flops_of_adapters_are_those_of_their_matrices():
    wan = WAN_PRESETS["tiny"].replace(num_layers=3, text_length=5)
    latents, tokens = (6, 8, 8), 6 * 4 * 4
    assert wan.patch_size == (1, 2, 2)
    for targets in (LORA_TARGETS, ("key", "down")):
        lora = LoraConfig(4, 4.0, targets)
        count = 0
        for path, a, b in adapted_layers(tiny_model(wan, lora=lora)[1]):
            is_text = path[-2] == "cross_attention" and path[-1] in ("key", "value")
            count += 2 * (5 if is_text else tokens) * (a.size + b.size)
        assert adapter_flops(wan, latents, lora) == count
        forward = forward_flops(wan, latents)
        flops = lambda remat, lora=lora: training_flops(wan, latents, remat=remat, trains_weights=False, lora=lora)
        expected = forward.outside + 2 * forward.blocks + sum(form.total for form in forward.attention) + 3 * count
        assert flops("none") == (expected, 0)
        # Gates are frozen, so a block's last product is not computed again.
        again = forward.blocks - wan.num_layers * forward.last_product + count
        assert flops("block") == (expected, again)


def test_flops_of_a_step_are_those_of_the_compiled_gradient():
    wan = TINY.replace(num_heads=2, head_dim=64, ffn_dim=512, num_layers=2, text_length=16)
    latents, remat = (4, 16, 16), "block"
    model_def, params = tiny_model(wan, lora=LORA, scan_layers=False, remat=remat)
    trained, frozen = STAGES["finetune"].split(params)

    def loss(trained, frozen, *inputs):
        return jnp.square(apply_model(model_def)(STAGES["finetune"].join(trained, frozen), *inputs)).mean()

    shapes = ((1, *latents, wan.in_channels), (1,), (1, wan.text_length, wan.text_dim))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(jax.grad(loss)).lower(trained, frozen, *inputs).compile().cost_analysis()["flops"]
    expected = sum(training_flops(wan, latents, remat=remat, trains_weights=False, lora=LORA))
    # Additions, norms and softmax are not counted, and the first block's input has no gradient.
    np.testing.assert_allclose(compiled, expected, rtol=0.02)


# ------------------------------------------------------------------------------------------------------------ the file


def test_diffusers_reads_the_adapters_and_gives_the_merged_model_s_outputs(tmp_path):
    oracle = random_wan(head_dim=32)
    wan, params, _ = load_params(save_wan(oracle, tmp_path / "oracle"))
    drawn = split_tree(tiny_model(wan, lora=LORA)[1], is_adapter)[0]
    adapters = jax.tree.map(lambda leaf: 3 * leaf, drawn)
    save_adapters(tmp_path / "adapter", wan, adapters, LORA)
    pipeline = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer=oracle)

    rng = np.random.default_rng(0)
    latents, text = rng.standard_normal((2, 3, 6, 8, 16), np.float32), rng.standard_normal((2, 512, 48), np.float32)
    timestep = np.array([737.0, 12.5], np.float32)

    def of_diffusers():
        channels_first = torch.tensor(latents).permute(0, 4, 1, 2, 3)
        with torch.no_grad():
            velocity = pipeline.transformer(channels_first, torch.tensor(timestep), torch.tensor(text)).sample
        return velocity.permute(0, 2, 3, 4, 1).numpy()

    of_base = of_diffusers()
    pipeline.load_lora_weights(tmp_path / "adapter")
    found = of_diffusers()
    params = merged(joined(jax.tree.map(jnp.asarray, params), adapters), LORA)
    graphdef, _ = tiny_model(wan)
    expected = jax.jit(apply_model(graphdef))(params, latents, timestep, text)
    assert np.abs(found - of_base).max() > 0.1
    # Upstream's sinusoids of the timestep are good to 3e-5.
    assert np.abs(found - expected).max() < 1e-4


def test_something_else_in_the_adapters_place_is_not_replaced(tmp_path, teacher):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"adapter: expected pytorch_lora_weights.safetensors alone, found notes.txt"):
        train(lora_run(tmp_path, teacher), tmp_path / "run")
