"""Prompts to videos with a transformer, a VAE and a text encoder that take turns in memory."""

import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from rehyat_jax.cli import print_message
from rehyat_jax.diffusion.samplers import Coefficients
from rehyat_jax.errors import InputError
from rehyat_jax.extras import check_installed
from rehyat_jax.generation.calibration import calibrated_ranges, residual_ratios
from rehyat_jax.generation.chunks import sample_by_chunk
from rehyat_jax.generation.codecs import LATENT_SIZES, Codec
from rehyat_jax.generation.generate import generate_latents, latent_shape
from rehyat_jax.generation.hub import Models, open_models
from rehyat_jax.generation.needs import (
    decoder_bytes,
    streaming_host_bytes,
    text_encoder_bytes,
    tiled_host_bytes,
    transformer_bytes,
)
from rehyat_jax.generation.noise import host_noise
from rehyat_jax.generation.opening import get_codec, get_text_encoder, given_models
from rehyat_jax.generation.options import DEFAULT_SHIFT, WAN, Order, SamplingOptions
from rehyat_jax.generation.pipeline_folder import check_pipeline, find_part, scheduler_shift
from rehyat_jax.generation.reuse import skipped_steps
from rehyat_jax.generation.streaming import PART_CHUNKS, stream_latents
from rehyat_jax.generation.text_encoders import TextEncoder
from rehyat_jax.generation.umt5 import MAX_TOKENS, FoundTextEncoder, find_text_encoder, sharding_mesh
from rehyat_jax.generation.wan_codec import default_dtype, load_wan_codec
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.models.wan.quantized import INPUTS, quantized
from rehyat_jax.models.wan.streaming import check_causal, check_streams
from rehyat_jax.parallel.memory import check_device_memory, check_host_memory, fits_device, free_dropped_models
from rehyat_jax.parallel.mesh import AXES, check_batch, check_heads, make_mesh
from rehyat_jax.weights.load import load_module, open_checkpoint
from rehyat_jax.weights.models import VAES
from rehyat_jax.weights.streamed import BY_CHUNK, NOISE_LEVELS, SAMPLING, StreamedModel
from rehyat_jax.weights.torch_checkpoint import open_torch_checkpoint
from rehyat_jax.weights.umt5.spec import UMT5
from rehyat_jax.weights.wan_vae.spec import WAN_VAE

Part = Literal["text encoder", "transformer", "VAE"]


class _Held(NamedTuple):
    """A model in memory, and the bytes of its weights."""

    model: Any
    nbytes: int


class Pipeline:
    """A text-to-video model with its options of sampling. `from_pretrained` opens one; no weights are read then.

    The parts take turns in memory. `embed` loads the text encoder and frees it. The transformer and the VAE are loaded
    when they are first used, and stay until `free`.

    Attributes:
      options: the options, without None.
      config: architecture of the transformer.
      codec_name, text_encoder_name: names of its codec and text encoder.
      found_encoder: files of the text encoder; None if it has no weights.
      latent_shape: (T, H, W, C) of the videos to sample.
      fps: frames per second of the videos.
      settings: everything that decides a video, except its prompt and its noise, as JSON values.
    """

    def __init__(self, checkpoint: Path, model: StreamedModel, models: Models | None, options: SamplingOptions):
        self._checkpoint, self._model, self._models = checkpoint, model, models
        self.config = config = model.config
        self.codec_name, self.text_encoder_name = model.metadata["codec"], model.metadata["text_encoder"]
        if self.codec_name not in LATENT_SIZES:
            get_codec(self.codec_name)  # raises, with the known names
        sizes = LATENT_SIZES[self.codec_name]
        self.fps = sizes.fps
        self._vae = self._open_vae()
        self.found_encoder = self._open_text_encoder()
        self._check_text()

        shift = None if models is None else scheduler_shift(models.folder)
        asked = options.frames, options.height, options.width
        size = [given or default for given, default in zip(asked, sizes.default_size, strict=True)]
        order: Order = "chunks" if NOISE_LEVELS in model.metadata and not options.stream else "video"
        solver = WAN | {"flow_shift": shift or DEFAULT_SHIFT} | model.metadata.get(SAMPLING, {})
        self.options = dataclasses.replace(
            options,
            **dict(zip(("frames", "height", "width"), size, strict=True)),
            **{name: value for name, value in solver.items() if getattr(options, name) is None},
            order=options.order or order,
            dtype=options.dtype or sizes.default_dtype,
            vae_dtype=options.vae_dtype or default_dtype(),
        )
        self.latent_shape = latent_shape(config, sizes, *size)
        self._mesh = make_mesh(dict.fromkeys(AXES, 1) | dict(options.mesh)) if options.mesh else None
        self._check_options()
        self._check_memory()
        self._held: dict[Part, _Held] = {}
        self._skipped: list[bool] | None = None

    @classmethod
    def from_pretrained(
        cls,
        models: str | os.PathLike | None = None,
        options: SamplingOptions | None = None,
        *,
        student: str | os.PathLike | None = None,
    ) -> "Pipeline":
        """Opens a pipeline, and checks the options against it.

        Args:
          models: the folder of a pipeline in diffusers' layout (`model_index.json`, `transformer/`, `vae/`,
            `text_encoder/`, `tokenizer/`, `scheduler/`), or of one of Wan's original repositories with safetensors
            files; or a name on the Hugging Face Hub, as "owner/name" or "owner/name@revision". None for the pipeline
            that the student names, that it is itself, or for none.
          options: options of sampling; None for the defaults.
          student: checkpoint of another transformer than the folder's: a model checkpoint or a PyTorch folder.

        Raises:
          InputError: a part is missing, damaged or another model's; an option is wrong for it; or the videos cannot
            fit into memory, and the message has what would fit.
        """
        if models is None and student is None:
            raise ValueError("expected a pipeline's folder or a student's checkpoint, found neither")
        opened = None
        if student is None:
            opened = open_models(models)
            check_pipeline(opened.folder)
            checkpoint = opened.folder
        else:
            checkpoint = Path(student)
        model = open_checkpoint(checkpoint)
        is_pipeline = (checkpoint / "model_index.json").is_file()
        place = models or model.metadata.get("models") or (checkpoint if is_pipeline else None)
        if opened is None and place:
            opened = open_models(place)
            check_pipeline(opened.folder)
        return cls(checkpoint, model, opened, options or SamplingOptions())

    def with_options(self, options: SamplingOptions) -> "Pipeline":
        """The same pipeline with other options; nothing is in memory. Raises InputError as `from_pretrained`."""
        return Pipeline(self._checkpoint, self._model, self._models, options)

    def __call__(self, prompts: Sequence[str], noise: np.ndarray | None = None) -> np.ndarray:
        """One video for every prompt, uint8 [B, frames, height, width, 3].

        The text encoder is freed before the transformer is loaded, and the transformer before the VAE. `options.batch`
        videos are sampled at once.

        Args:
          prompts: B prompts.
          noise: [B, *latent_shape] float32 standard normal. None for that of the options' seed.
        """
        noise = self.noise(range(len(prompts))) if noise is None else noise
        *text, negative_text = self.embed([*prompts, self.options.negative_prompt])
        groups = [slice(first, first + self.options.batch) for first in range(0, len(prompts), self.options.batch)]
        negative = lambda group: np.stack([negative_text] * len(prompts[group]))
        latents = [self.sample_latents(np.stack(text[group]), negative(group), noise[group]) for group in groups]
        self.free("transformer")
        return np.concatenate([np.concatenate(list(self.frames(part)), axis=1) for part in latents])

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides a video, except its prompt and its noise, as JSON values."""
        options = self.options
        names = ("negative_prompt", "steps", "guidance_scale", "flow_shift", "sampler", "frames", "height", "width")
        in_parts = {"order": options.order} if options.order != "video" else {"stream": True}
        in_parts = in_parts | {"longest": options.longest} if options.in_parts else {}
        models = {} if self._models is None else {"models": self._models.name, "revision": self._models.revision}
        vae: dict[str, Any] = {}
        if self._vae is not None:
            vae |= {"vae_dtype": options.vae_dtype} if options.vae_dtype != "float32" else {}
            vae |= {"vae_tile": options.vae_tile} if options.vae_tile is not None else {}
        return {
            "program": f"rehyat_jax {importlib.metadata.version('rehyat_jax')}",
            "transformer": str(self._checkpoint),
            **models,
            **{"codec": self.codec_name, "text_encoder": self.text_encoder_name},
            **{name: getattr(options, name) for name in names},
            **{"dtype": options.dtype, "fps": self.fps, **vae, **in_parts, **options.approximations},
        }

    # ------------------------------------------------------------------------------------------------------- the parts

    def embed(self, prompts: Sequence[str], *, progress: bool = False) -> np.ndarray:
        """The embeddings of prompts, float32 [B, L, text_dim]. The text encoder is loaded for this, and then freed.

        Args:
          prompts: B prompts; equal ones are encoded once.
          progress: show the rate and the remaining time.
        """
        different = list(dict.fromkeys(prompts))
        with self._on(self._text_mesh()):
            encoder = self._load_text_encoder(progress)
            bar = tqdm(different, desc="encoding prompts", unit="prompt", disable=not progress, delay=1)
            embeddings = {prompt: encoder([prompt])[0] for prompt in bar}
        return np.stack([embeddings[prompt] for prompt in prompts])

    def sample_latents(
        self,
        text: np.ndarray,
        negative_text: np.ndarray,
        noise: np.ndarray,
        *,
        before: np.ndarray | None = None,
        progress: bool = False,
        on_step: Callable[[int, Coefficients, jax.Array], None] | None = None,
    ) -> np.ndarray:
        """Latents of videos, float32 [B, *latent_shape]; loads the transformer if it is not in memory.

        Args:
          text, negative_text: embeddings [B, L, text_dim] from `embed`.
          noise: [B, *latent_shape] float32.
          before: latents [B, T0, H, W, C] with which the videos begin, see `stream_latents` and `chunk_by_chunk`.
          progress: show the rate and the remaining time.
          on_step: see `generate_latents`.
        """
        options = self.options
        names = ("steps", "guidance_scale", "flow_shift", "sampler")
        solver = {name: getattr(options, name) for name in names} | {"progress": progress}
        with self._on(self._mesh):
            model = self.transformer(negative_text[0], progress=progress)
            texts = jnp.asarray(text), jnp.asarray(negative_text)
            if options.order == "chunks":
                return sample_by_chunk(model, *texts, noise, before=before, longest=options.longest, **solver)
            if options.stream:
                return stream_latents(model, *texts, noise, before=before, longest=options.longest, **solver)
            solver |= {
                "guidance_every": options.guidance_every,
                "skipped": self._skipped_steps(model, negative_text[0]),
            }
            return np.asarray(generate_latents(model, *texts, jnp.asarray(noise), on_step=on_step, **solver))

    def _skipped_steps(self, model: WanTransformer, negative_text: np.ndarray) -> list[bool] | None:
        """The steps that `step_cache` skips, from a calibration in the first call; None without this option."""
        options = self.options
        if options.step_cache is not None and self._skipped is None:
            how = {name: getattr(options, name) for name in ("steps", "flow_shift", "sampler")}
            ratios = residual_ratios(model, jnp.asarray(negative_text), self.latent_shape, **how)
            self._skipped = skipped_steps(ratios, options.step_cache)
        return self._skipped

    def frames(self, latents: np.ndarray, *, progress: bool = False) -> Iterator[np.ndarray]:
        """The videos of latents [B, T, H, W, C] in successive pieces, uint8 [B, F, height, width, 3]; see `Codec`.

        Loads the VAE if it is not in memory.
        """
        with self._on(self._mesh):
            codec = self.codec(progress=progress)
        total = self.frame_count(latents.shape[1])
        with tqdm(total=total, desc="decoding", unit="frame", disable=not progress, delay=1) as bar:
            pieces = codec.frames(latents)
            while True:
                # The caller's code between two pieces may use another mesh.
                with self._on(self._mesh):
                    piece = next(pieces, None)
                if piece is None:
                    return
                yield piece
                bar.update(piece.shape[1])

    def encode(self, video: np.ndarray, *, progress: bool = False) -> np.ndarray:
        """Latents float32 [T, H, W, C] of a video, uint8 [frames, height, width, 3]. Loads the VAE if needed."""
        with self._on(self._mesh):
            return np.asarray(self.codec(progress=progress).encode(np.float32(video)[None] / 255))[0]

    @property
    def time_factor(self) -> int:
        """Frames of a latent frame, except the first one, which is a single frame."""
        return 1 if self._vae is None else self._vae[1].config.time_factor

    def frame_count(self, latent_frames: int) -> int:
        """Frames of a video of so many latent frames."""
        return self.time_factor * (latent_frames - 1) + 1

    def noise(self, numbers: Sequence[int], seed: int | None = None) -> np.ndarray:
        """The noise of these numbers, float32 [B, *latent_shape]; see `host_noise`. The seed is the options' own."""
        return host_noise(self.options.seed if seed is None else seed, list(numbers), self.latent_shape)

    def transformer(self, negative_text: np.ndarray | None = None, *, progress: bool = False) -> WanTransformer:
        """The transformer, in memory until `free`. Its weights are in the compute dtype, see `WanTransformer`.

        Args:
          negative_text: embedding [L, text_dim] of the options' negative prompt. Only `quantize` needs it, for its
            calibration.
          progress: show the rate and the remaining time.
        """
        options, dtype = self.options, jnp.dtype(self.options.dtype)

        def load(update: Callable[[int], object]) -> WanTransformer:
            model = load_module(self._checkpoint, self._model, progress=update, dtype=dtype, param_dtype=dtype)
            if options.quantize is None:
                return model
            if negative_text is None or options.flow_shift is None:
                raise ValueError("quantize: expected the negative prompt's embedding for its calibration, found none")
            ranges = calibrated_ranges(model, jnp.asarray(negative_text), self.latent_shape, options.flow_shift)
            if progress:
                layers = ", ".join(name for name in INPUTS if name not in options.exact)
                print_message(f"{options.quantize} in every block: {layers}; all other layers stay {options.dtype}")
            return quantized(model, options.quantize, ranges, exact=options.exact)

        return self._hold("transformer", self._model.nbytes, load, progress)

    def codec(self, *, progress: bool = False) -> Codec:
        """The codec, in memory until `free("VAE")`."""
        if self._vae is None:
            return get_codec(self.codec_name)
        source, vae = self._vae
        load = lambda update: load_wan_codec(
            source, dtype=self.options.vae_dtype, tile=self.options.vae_tile, progress=update
        )
        return self._hold("VAE", vae.nbytes, load, progress)

    def free(self, *parts: Part) -> None:
        """Forgets parts. Their memory is free as soon as the caller has no reference to them either."""
        dropped = [self._held.pop(part) for part in parts if part in self._held]
        nbytes = sum(held.nbytes for held in dropped)
        del dropped
        free_dropped_models(nbytes)

    def fits_together(self) -> bool:
        """True if the VAE fits next to the transformer, which is in memory.

        The least that the VAE needs is doubled, because compilers need more.
        """
        if self._vae is None:
            return True
        with self._on(self._mesh):
            needed = self._needs(self.options, self.latent_shape, self._devices)["VAE"]
            return fits_device(2 * needed, devices=self._devices)

    # --------------------------------------------------------------------------------------------------------- opening

    def _open_vae(self) -> tuple[Path, StreamedModel] | None:
        if self.codec_name != WAN_VAE.architecture:
            return None
        source = find_part(given_models(self._folder, f"codec {self.codec_name!r}"), WAN_VAE)
        return source, open_torch_checkpoint(source, specs=VAES)

    def _open_text_encoder(self) -> FoundTextEncoder | None:
        if self.text_encoder_name != UMT5.architecture:
            return None
        folder = given_models(self._folder, f"text encoder {self.text_encoder_name!r}")
        found = find_text_encoder(find_part(folder, UMT5))
        found.prompt_tokenizer()
        return found

    @property
    def _folder(self) -> Path | None:
        return None if self._models is None else self._models.folder

    @property
    def _devices(self) -> int:
        return 1 if self._mesh is None else self._mesh.size

    def _check_text(self) -> None:
        """Raises InputError unless the text encoder's embeddings fit the transformer."""
        config, encoder = self.config, self.found_encoder
        if encoder is None:
            plain = get_text_encoder(self.text_encoder_name)
            length, text_dim = plain.length, plain.text_dim
        else:
            length, text_dim = min(MAX_TOKENS, config.text_length), encoder.model.config.model_dim
        if text_dim != config.text_dim or length > config.text_length:
            where = "" if encoder is None else f" from {encoder.source}"
            raise InputError(
                f"{self._checkpoint}: expected text_dim {text_dim} and a text_length of at least {length}, which its "
                f"text encoder {self.text_encoder_name!r}{where} makes, found {config.text_dim} and "
                f"{config.text_length}; name the text encoder that the model was trained with"
            )

    def _check_options(self) -> None:
        options, config = self.options, self.config
        if self._mesh is not None:
            check_batch(self._mesh, self._evaluated(options))
            check_heads(self._mesh, config.num_heads)
            if options.guidance_every > 1:
                check_batch(self._mesh, options.batch)
        self._check_approximations()
        if not options.in_parts:
            if options.longest is not None:
                raise InputError(
                    f"--longest {options.longest}: expected with --stream or --order chunks, found without; give one"
                )
            return
        how = "--stream"
        if options.order == "chunks":
            how = "--order chunks"
            self._check_order()
        else:
            check_streams(config)
        if (devices := dict(options.mesh).get("context", 1)) != 1:
            raise InputError(
                f"--mesh context={devices} {how}: expected context=1, because the parts of a video follow one "
                f"another in time; shard along data or tensor, or sample without {how}"
            )
        part = min(config.block_forms.chunk_frames, self.latent_shape[0] // config.patch_size[0])
        if options.longest is not None and options.longest < part:
            raise InputError(
                f"--longest {options.longest}: expected at least the {part} frames of a chunk; choose a larger one, "
                f"such as the latent frames of a training video"
            )

    def _check_approximations(self) -> None:
        """Raises InputError unless the options that make sampling cheaper fit the others and one another."""
        options = self.options
        if options.quantize is not None:
            check_installed(f"--quantize {options.quantize}", "qwix")
        elif options.exact:
            raise InputError(f"--exact {' '.join(options.exact)}: expected with --quantize, found without; give one")
        reuse = [
            *[f"--guidance-every {options.guidance_every}"] * (options.guidance_every > 1),
            *[f"--step-cache {options.step_cache}"] * (options.step_cache is not None),
        ]
        if len(reuse) > 1:
            raise InputError(f"{' '.join(reuse)}: expected one of them, found both; choose one")
        if reuse and options.in_parts:
            how = "--order chunks" if options.order == "chunks" else "--stream"
            raise InputError(
                f"{reuse[0]} {how}: expected the complete video at every step, found parts of it, for each of which "
                f"an earlier step would have to be kept; sample without {reuse[0].split()[0]}, or without {how}"
            )
        if options.guidance_every > 1 and options.guidance_scale == 1:
            raise InputError(
                f"{reuse[0]}: expected guidance, found --guidance-scale 1, which evaluates no negative prompt; leave "
                f"one of them out"
            )

    def _check_order(self) -> None:
        """Raises InputError unless the model samples chunk by chunk."""
        check_causal(self.config, f"{self._checkpoint}: --order chunks")
        if self._model.metadata.get(NOISE_LEVELS) != BY_CHUNK:
            raise InputError(
                f"{self._checkpoint}: --order chunks: expected a model that was trained with a noise level for every "
                f"chunk, found one that knows one level for all frames; finetune it with config.noise_by_chunk=True, "
                f"or sample with --stream"
            )

    # ---------------------------------------------------------------------------------------------------------- memory

    def _evaluated(self, options: SamplingOptions) -> int:
        """Videos that the model evaluates at once: guidance evaluates every video twice."""
        return options.batch * (1 if options.guidance_scale == 1 else 2)

    def _needs(self, options: SamplingOptions, shape: tuple[int, int, int, int], devices: int) -> dict[Part, int]:
        """The least bytes that each part needs on each device."""
        part = self.config.chunk_frames * (1 if options.order == "chunks" else PART_CHUNKS)
        on_device = (min(shape[0], part), *shape[1:]) if options.in_parts else shape
        # Parts of a video follow one another: only other axes than time divide them.
        sampled = transformer_bytes(
            self.config, on_device, videos=options.batch, evaluated=self._evaluated(options), dtype=options.dtype
        )
        needs: dict[Part, int] = {"transformer": sampled // devices}
        if self.found_encoder is not None:
            needs["text encoder"] = text_encoder_bytes(self.found_encoder.model.config) // devices
        if self._vae is not None:
            vae, dtype = self._vae[1].config, jnp.dtype(options.vae_dtype)
            needs["VAE"] = decoder_bytes(
                vae, shape, videos=options.batch, dtype=dtype, tile=options.vae_tile, devices=devices
            )
        return needs

    def _check_memory(self) -> None:
        """Raises InputError, with what would fit, if a part needs more memory than is free. Nothing is loaded yet."""
        options, devices = self.options, self._devices
        what = f"--batch {options.batch} --frames {options.frames} --height {options.height} --width {options.width}"
        for part, needed in self._needs(options, self.latent_shape, devices).items():
            fits = fits_device(needed, devices=devices)
            remedy = "" if fits else self._remedy(part)
            where = "" if part == "transformer" else f": the {part}"
            check_device_memory(needed, f"{what}{where}", remedy, devices=devices)
        if self._vae is not None and options.vae_tile is not None:
            host = tiled_host_bytes(self._vae[1].config, self.latent_shape, options.batch)
            check_host_memory(host, f"{what} --vae-tile", "choose fewer or shorter videos at once")
        if options.in_parts:
            host = streaming_host_bytes(self.latent_shape, options.batch)
            check_host_memory(host, what, "choose fewer or shorter videos at once")

    def _remedy(self, part: Part) -> str:
        """Changes of single options with which a part would fit, in words."""
        options, config, devices = self.options, self.config, self._devices
        frames, height, width = options.frames, options.height, options.width
        changes: list[tuple[str, dict[str, Any], int]] = []
        if part == "transformer":
            changes += [("--dtype bfloat16", {"dtype": "bfloat16"}, devices)] * (options.dtype != "bfloat16")
            with contextlib.suppress(InputError):
                check_streams(config)
                changes += [("--stream", {"stream": True}, devices)] * (not options.in_parts)
        if part == "VAE" and options.vae_dtype != "bfloat16":
            changes += [("--vae-dtype bfloat16", {"vae_dtype": "bfloat16"}, devices)]
        if part == "VAE" and options.vae_tile is None:
            changes += [("--vae-tile 256", {"vae_tile": 256}, devices)]
        others = jax.device_count()
        changes += [(f"a mesh of {others} devices", {}, others)] * (others > devices)
        batch = options.batch
        while (batch := batch // 2) >= 1:
            changes += [(f"--batch {batch}", {"batch": batch}, devices)]
        if part != "text encoder":
            changes += [(f"--frames {f}", {"frames": f}, devices) for f in _halved(frames - 1, 4, add=1)]
            halves = zip(_halved(height, 16), _halved(width, 16), strict=False)
            changes += [(f"--size {h}x{w}", {"height": h, "width": w}, devices) for h, w in halves]
        fitting: dict[str, str] = {}
        for words, change, on in changes:
            kind = words.split()[0] + words.split()[-1] * words.startswith("a mesh")
            if kind in fitting:
                continue
            with contextlib.suppress(InputError):
                changed = dataclasses.replace(options, **change)
                shape = latent_shape(
                    config, LATENT_SIZES[self.codec_name], changed.frames, changed.height, changed.width
                )
                if fits_device(self._needs(changed, shape, on)[part], devices=on):
                    fitting[kind] = words
        if fitting:
            return f"each of these alone would fit: {', '.join(fitting.values())}"
        return "no smaller video fits either: choose a machine with more memory, or more devices"

    # --------------------------------------------------------------------------------------------------------- loading

    def _load_text_encoder(self, progress: bool) -> TextEncoder:
        if self.found_encoder is None:
            return get_text_encoder(self.text_encoder_name)
        found = self.found_encoder
        with _loading("text encoder", found.model.nbytes, progress) as update:
            return found.load(progress=update).for_prompts(min(MAX_TOKENS, self.config.text_length))

    def _hold(self, part: Part, nbytes: int, load: Callable[[Callable[[int], object]], Any], progress: bool) -> Any:
        if part not in self._held:
            with self._on(self._mesh), _loading(part, nbytes, progress) as update:
                self._held[part] = _Held(load(update), nbytes)
        return self._held[part].model

    def _on(self, mesh: Mesh | None) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)

    def _text_mesh(self) -> Mesh | None:
        if self._mesh is None or self.found_encoder is None:
            return None
        return sharding_mesh(self.found_encoder.model.config, list(self._mesh.devices.flat))


@contextlib.contextmanager
def _loading(part: Part, nbytes: int, progress: bool) -> Iterator[Callable[[int], object]]:
    with tqdm(
        total=nbytes, desc=f"loading the {part}", unit="B", unit_scale=True, disable=not progress, delay=1
    ) as bar:
        yield bar.update


def _halved(size: int, multiple: int, *, add: int = 0) -> Iterator[int]:
    """Half a size, a quarter and so on, each rounded down to a multiple, plus `add`."""
    while (size := size // 2 // multiple * multiple) >= multiple:
        yield size + add
