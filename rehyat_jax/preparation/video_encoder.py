"""Clips to latents, on the devices of this process."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.generation.codecs import LATENT_SIZES, Array, Codec
from rehyat_jax.generation.opening import get_codec, given_models
from rehyat_jax.generation.wan_codec import WanCodec, default_dtype, load_wan_codec
from rehyat_jax.models.wan_vae.vae import WanVae
from rehyat_jax.parallel.memory import check_device_memory, device_bytes
from rehyat_jax.preparation.clips import Size
from rehyat_jax.weights.load import checkpoint_files
from rehyat_jax.weights.models import VAES
from rehyat_jax.weights.torch_checkpoint import open_torch_checkpoint


class VideoEncoder(Protocol):
    """A codec for the preparation of videos.

    Attributes:
      rows: number of clips that are encoded at once.
      options: JSON values that identify the codec, in addition to its name.
    """

    rows: int
    options: dict[str, Any]

    def check(self, sizes: Sequence[Size]) -> None:
        """Raises InputError if clips of these sizes do not fit into memory. Called before any weights are read."""

    def codec(self) -> Codec:
        """The codec with its weights, on one device."""

    def __call__(self, clips: np.ndarray) -> Array:
        """uint8 [rows, frames, height, width, 3] -> latents [rows, T, H, W, C] float32.

        An accelerator may still compute them.
        """


def open_video_encoder(name: str, models: Path | None, dtype: str | None) -> VideoEncoder:
    """The encoder of a codec's name; no weights are read. Arguments as in `prepare_videos`. Raises InputError."""
    if name in VAES:
        return VaeEncoder(name, given_models(models, f"codec {name!r}"), dtype)
    return HostEncoder(get_codec(name))


class HostEncoder:
    """A codec without weights, computed by NumPy."""

    rows = 1

    def __init__(self, codec: Codec):
        self._codec = codec
        self.options: dict[str, Any] = {}

    def check(self, sizes: Sequence[Size]) -> None:
        pass

    def codec(self) -> Codec:
        return self._codec

    def __call__(self, clips: np.ndarray) -> Array:
        return self._codec.encode(clips.astype(np.float32) / 255)


class VaeEncoder:
    """A VAE on every device of this process; each device encodes one clip at a time.

    A device runs the same program for any number of devices, so a clip's latents do not depend on the number, or on the
    other clips. They do depend on the kind of device, on the compute dtype and on the versions of JAX and its compiler.

    Args:
      name: name of the codec.
      models: path of the weights, as for `load_vae`.
      dtype: compute dtype; None for `wan_codec.default_dtype`.
    """

    def __init__(self, name: str, models: Path, dtype: str | None):
        models = VAES[name].find(models)
        dtype = dtype or default_dtype()
        self._models, self._dtype, self._name = models, dtype, name
        model = open_torch_checkpoint(models, specs=VAES)
        folder, files = checkpoint_files(models, VAES[name].part)
        self.options = {"codec_dtype": dtype, "codec_files": fingerprint(files, folder, blocks=BLOCKS)}
        abstract = nnx.eval_shape(lambda: VAES[name].model(model.config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
        graphdef, state = nnx.split(abstract)
        devices = jax.local_devices()
        # The axis is none of `parallel.mesh.AXES`: within `shard_map`, the VAE must not shard its clip any further.
        mesh = Mesh(np.array(devices), ("clips",), axis_types=(AxisType.Auto,))
        self.rows = len(devices)
        self._everywhere, self._per_device = (
            NamedSharding(mesh, PartitionSpec()),
            NamedSharding(mesh, PartitionSpec("clips")),
        )

        def encode(params: Any, clips: jax.Array) -> jax.Array:
            return WanCodec(WanVae(nnx.merge(graphdef, params))).encode(clips.astype(jnp.float32) / 255)

        specs = self._everywhere.spec, self._per_device.spec
        self._encode = jax.jit(jax.shard_map(encode, mesh=mesh, in_specs=specs, out_specs=specs[1], check_vma=False))
        self._shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._everywhere),
            nnx.to_pure_dict(state),
        )
        self._programs: dict[Size, jax.stages.Compiled] = {}
        self._codec: WanCodec | None = None
        self._params: Any = None

    def check(self, sizes: Sequence[Size]) -> None:
        for size in sizes:
            self._check_memory(size, self._program(size))

    def codec(self) -> Codec:
        if self._codec is None:
            self._codec = load_wan_codec(self._models, dtype=self._dtype)
        return self._codec

    def __call__(self, clips: np.ndarray) -> Array:
        if self._params is None:
            self.codec()
            self._params = jax.device_put(self._codec.vae.params, self._everywhere)
        program = self._program(clips.shape[1:4])
        latents = program(self._params, jax.device_put(clips, self._per_device))
        latents.copy_to_host_async()
        return latents

    def _program(self, size: Size) -> jax.stages.Compiled:
        if size not in self._programs:
            clips = jax.ShapeDtypeStruct((self.rows, *size, 3), np.uint8, sharding=self._per_device)
            self._programs[size] = self._encode.lower(self._shapes, clips).compile()
        return self._programs[size]

    def _check_memory(self, size: Size, program: jax.stages.Compiled) -> None:
        """Compares a device's memory with what the program needs: weights, a clip, the next clip, and temporaries."""
        sizes = program.memory_analysis()
        if sizes is None:
            return
        clip = 3 * math.prod(size)
        needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + 2 * sizes.output_size_in_bytes + clip
        device = jax.local_devices()[0]
        free, fixed = device_bytes(device), 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self._shapes))
        remedy = "use devices with more memory"
        if free is not None:
            free //= self.rows if device.platform == "cpu" else 1
            # Nothing that grows with the frame grows less than its area.
            scale = math.sqrt(max(free - fixed, 0) / max(needed - fixed, 1))
            height, width = (int(side * scale) // 16 * 16 for side in size[1:])
            if min(height, width) > 0:
                remedy = f"choose smaller videos (--size {size[0]}x{height}x{width} would fit), or {remedy}"
        what = f"--size {'x'.join(map(str, size))}: codec {self._name}"
        check_device_memory(needed, what, remedy, devices=self.rows)


def latent_sizes(name: str) -> Any:
    """`fps`, `default_size` and `latent_shape` of a codec, without its weights. Raises InputError if it is unknown."""
    return LATENT_SIZES[name] if name in LATENT_SIZES else get_codec(name)
