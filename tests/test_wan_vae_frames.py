"""Frames of Wan2.1's VAE that are sharded over devices, or coded in tiles."""

import re

import jax
import numpy as np
import pytest
from oracles import random_wan_vae
from test_wan_vae import (
    FORM_TOLERANCE,
    SMALL,
    TOLERANCE,
    abstract_small_vae,
    oracle_decode,
    oracle_encode,
    random_small_vae,
    random_video,
)

import rehyat_jax
from rehyat_jax.errors import InputError
from rehyat_jax.models.wan_vae.modeling import WanAutoencoder
from rehyat_jax.models.wan_vae.vae import decode_clip, decode_stream, encode_stream
from rehyat_jax.parallel.mesh import AXES, make_mesh

pytestmark = pytest.mark.usefixtures("programs_compiled_once")


@pytest.fixture(scope="module")
def small():
    return random_small_vae(*abstract_small_vae())


def random_latents(*shape):
    return np.random.default_rng(0).standard_normal((*shape, 16), np.float32)


# ---------------------------------------------------------------------------------------------------------- sharding


def mesh_of(*sizes):
    return make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[: int(np.prod(sizes))])


# Neither 2 rows nor 2 columns of devices divide 5x3 latents, and 4 devices divide neither the batch nor 5 rows.
@pytest.mark.parametrize("sizes", [(1, 1, 2, 2), (1, 4, 1, 1)], ids=str)
def test_devices_together_give_the_frames_and_latents_of_one(small, sizes):
    latents, video = random_latents(2, 4, 5, 3), random_video(9, 20, 12)
    expected = small.decode(latents), small.encode(video)
    with jax.set_mesh(mesh_of(*sizes)):
        first, state = small.decode_chunk(latents[:, :2])
        second, _ = small.decode_chunk(latents[:, 2:], state)  # by the same program
        found = np.concatenate([first, second], axis=1), small.encode(video)
        whole = small.decode(latents, whole=True), small.encode(video, whole=True)
    for ours, theirs in zip((*found, *whole), (*expected, *expected), strict=True):
        assert np.abs(np.asarray(ours) - theirs).max() < FORM_TOLERANCE


def test_a_batch_and_its_frames_are_sharded_together(small):
    latents = random_latents(2, 2, 5, 3)
    with jax.set_mesh(mesh_of(1, 2, 2, 1)):
        found = small.decode(latents)
        _, state = small.decode_chunk(latents)
    assert np.abs(np.asarray(found) - small.decode(latents)).max() < FORM_TOLERANCE
    # 6 of 5 latent rows, with padding, on two devices; one of the two clips each.
    assert {cache.sharding.shard_shape(cache.shape)[:1] for cache in state.caches} == {(1,)}
    assert state.caches[0].sharding.shard_shape(state.caches[0].shape) == (1, 2, 3, 3, 16)


def test_devices_exchange_rows_and_gather_only_keys_and_values(small):
    with jax.set_mesh(mesh_of(1, 1, 2, 1)):
        hlo = decode_clip.lower(small.graphdef, small.params, random_latents(1, 2, 4, 7)).compile().as_text()
    moved = re.findall(r"= \S*\[([\d,]+)\]\S* (all-gather|collective-permute|all-to-all|all-reduce)(?:-start)?\(", hlo)
    assert {kind for _, kind in moved} == {"all-gather", "collective-permute"}
    gathered = [size for size, kind in moved if kind == "all-gather"]
    lowest = SMALL.base_dim * SMALL.dim_mult[-1]
    # Two frames of the middle's keys and values; 4x7 latents may stand as tokens.
    assert {np.prod([int(n) for n in size.split(",")]) for size in gathered} <= {
        2 * 4 * 7 * lowest,
        2 * 4 * 7 * 2 * lowest,
    }
    # A row at a time: no exchange has more than one row of frames.
    rows = [[int(n) for n in size.split(",")] for size, kind in moved if kind == "collective-permute"]
    assert rows and all(1 in size[1:-2] or size[-3] == 1 for size in rows)


# ------------------------------------------------------------------------------------------------------------- tiles


@pytest.fixture(scope="module")
def oracle():
    """diffusers' VAE with tiles of 32 pixels, 24 apart."""
    model = random_wan_vae()
    model.enable_tiling(32, 32, 24, 24)
    return model


@pytest.fixture(scope="module")
def vae(oracle, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    oracle.save_pretrained(path)
    return rehyat_jax.load_vae(path)


# The last tiles have 2, 1 and 2 latents of 4; 1 is no more than a tile shares, and 3 are one row of tiles.
SIZES = [(5, 7), (3, 5)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiled_videos_and_latents_match_diffusers(oracle, vae, size):
    latents, video = random_latents(1, 2, *size), random_video(5, 8 * size[0], 8 * size[1])[:1]
    for ours, theirs in (
        (vae.decode(latents, tile=32), oracle_decode(oracle, latents)),
        (vae.encode(video, tile=32), oracle_encode(oracle, video)),
    ):
        assert ours.shape == theirs.shape and ours.dtype == np.float32
        assert np.abs(ours - theirs).max() < TOLERANCE


def test_blended_frames_are_clipped_after_blending(oracle, vae):
    latents = 20 * random_latents(1, 1, 5, 7)
    video = vae.decode(latents, tile=32)
    assert np.abs(video).max() == 1
    expected = oracle_decode(oracle, latents)
    assert np.abs(video - expected).max() < TOLERANCE
    # Without tiles, the frames differ: the tests would notice if nothing were tiled.
    assert np.abs(vae.decode(latents) - expected).max() > 10 * TOLERANCE


def test_one_program_serves_all_tiles_lengths_and_sizes(small, monkeypatch):
    traced = []
    for name in ("encode", "decode"):
        code = getattr(WanAutoencoder, name)
        monkeypatch.setattr(
            WanAutoencoder, name, lambda *inputs, code=code, name=name: traced.append(name) or code(*inputs)
        )
    for function in (decode_stream, encode_stream):
        function.clear_cache()
    for frames, height, width in ((1, 6, 5), (3, 9, 11)):
        small.decode(random_latents(1, frames, height, width), tile=16)
        small.encode(random_video(4 * frames - 3, 4 * height, 4 * width), tile=16)
    # The shapes of the caches may take another one, without a program.
    assert {name: traced.count(name) <= 2 for name in ("encode", "decode")} == {"encode": True, "decode": True}


def test_frames_within_a_tile_are_coded_as_usual(small):
    latents = random_latents(1, 2, 4, 3)
    np.testing.assert_array_equal(small.decode(latents, tile=16), small.decode(latents))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tile": 40}, "tile must be a positive multiple of 16 pixels, found 40"),
        ({"tile": 0}, "tile must be a positive multiple of 16 pixels, found 0"),
        ({"tile": 16, "whole": True}, "whole=True and tile exclude each other"),
    ],
)
def test_tiles_that_cannot_be_used_are_refused(small, options, expected):
    with pytest.raises(InputError, match=expected):
        small.decode(random_latents(1, 1, 9, 9), **options)
    with pytest.raises(InputError, match=expected):
        small.encode(random_video(1, 36, 36), **options)


# ------------------------------------------------------------------------------------------------------------- state


def test_a_consumed_state_is_refused(small):
    latents = random_latents(1, 1, 3, 5)
    _, state = small.decode_chunk(latents)
    small.decode_chunk(latents, state)
    with pytest.raises(InputError, match="state was consumed by an earlier call"):
        small.decode_chunk(latents, state)
