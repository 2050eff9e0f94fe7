"""The backends of hybrid attention: their common interface, their requests, and the choice among them."""

import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.attention.features.inline import InlineFeatures, as_array
from rehyat_jax.attention.hybrid.geometry import ChunkGeometry, without_padding
from rehyat_jax.attention.hybrid.linear_products import sum_keys
from rehyat_jax.attention.hybrid.state import HybridState, LinearState, StateForm
from rehyat_jax.attention.platform import target_platform
from rehyat_jax.attention.product import accumulation_dtype


@dataclasses.dataclass(frozen=True)
class Request:
    """Hybrid attention of a video, or of a part of one, with arguments that fit together.

    Attributes:
      query, key, value, phi_query, phi_key, causal, stabilizer, return_state: see `hybrid_attention`.
      geometry: geometry of these frames.
      initial_state: state after the frames before these, for bidirectional attention too; None at the start.
      later: sums over the frames after these, for bidirectional attention. Needs an initial_state.
      num_frames: number of frames that are not padding, int32 scalar, at least 1; None if there is no padding. Needs an
        initial_state.
      log_decay, branch_gate: see `hybrid_attention`.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    phi_query: jax.Array | InlineFeatures
    phi_key: jax.Array | InlineFeatures
    geometry: ChunkGeometry
    causal: bool
    stabilizer: str
    initial_state: HybridState | None = None
    return_state: bool = False
    later: LinearState | None = None
    num_frames: jax.Array | None = None
    log_decay: jax.Array | None = None
    branch_gate: jax.Array | None = None

    @property
    def start(self) -> HybridState:
        """`initial_state`, or the state before the first chunk of a video."""
        return self.zero_state if self.initial_state is None else self.initial_state

    @property
    def zero_state(self) -> HybridState:
        """The state before the first chunk of a video like this one."""
        batch, _, heads, head_dim = self.query.shape
        return HybridState.zeros(
            batch,
            heads,
            head_dim,
            self.phi_key.shape[-1],
            tokens_per_frame=self.geometry.tokens_per_frame,
            overlap_frames=self.geometry.overlap_frames,
            anchor_frames=self.geometry.anchor_frames,
            dtype=self.query.dtype,
        )

    @property
    def state_form(self) -> StateForm:
        """The form of attention that a state of this video must have."""
        geometry = self.geometry
        sizes = geometry.tokens_per_frame, geometry.chunk_frames, geometry.overlap_frames
        return StateForm(*sizes, self.stabilizer, geometry.anchor_frames, geometry.linear_window)

    def key_gain(self, *, future: bool = False) -> jax.Array | None:
        """What multiplies phi_key in the sums of the past or of the future, [tokens, heads]; None if nothing does.

        Anchors have the gain zero, and decay lowers the gain of frames that are far from the window at first. Sums
        are multiplied by exp(`chunk_log_decay`) from chunk to chunk.
        """
        is_start: bool | jax.Array = self.initial_state is None or self.initial_state.chunks == 0
        return self.gain(self.geometry.decay_exponents(future=future), is_start)

    def gain(self, exponents: np.ndarray, is_start: bool | jax.Array) -> jax.Array | None:
        """`key_gain` with the powers of the decay of every frame, int [frames].

        Args:
          is_start: True if these frames are the first of the video.
        """
        geometry, gain = self.geometry, None
        dtype = accumulation_dtype(self.query.dtype)
        if geometry.anchor_frames:
            is_anchor = np.arange(geometry.num_frames) < geometry.anchor_frames
            gain = jnp.where(is_anchor & is_start, 0.0, 1.0)[:, None]
        if self.log_decay is not None:
            decay = jnp.exp(exponents[:, None] * self.log_decay)
            gain = decay if gain is None else gain * decay
        if gain is None:
            return None
        gain = jnp.broadcast_to(gain.astype(dtype), (len(gain), self.query.shape[2]))
        return jnp.repeat(gain, geometry.tokens_per_frame, axis=0)

    @property
    def chunk_log_decay(self) -> jax.Array | None:
        """The logarithm of the factor [heads] of sums from one chunk to the next; None without decay."""
        if self.log_decay is None:
            return None
        return self.geometry.chunk_frames * self.log_decay.astype(accumulation_dtype(self.query.dtype))

    def with_arrays(self) -> "Request":
        """The request with its features computed; phi_key is zero for padding."""
        phi_key = without_padding(as_array(self.phi_key), self.geometry, self.num_frames)
        return dataclasses.replace(self, phi_query=as_array(self.phi_query), phi_key=phi_key)


def sums_by_xla(
    phi_key: jax.Array | InlineFeatures, value: jax.Array, geometry: ChunkGeometry, num_frames: jax.Array | None
) -> tuple[LinearState, LinearState]:
    """`Backend.video_sums` by XLA."""
    phi_key = without_padding(as_array(phi_key), geometry, num_frames)
    split = max(value.shape[1] - geometry.overlap_frames * geometry.tokens_per_frame, 0)
    before = sum_keys(phi_key[:, :split], value[:, :split])
    overlap = sum_keys(phi_key[:, split:], value[:, split:])
    return before, jax.tree.map(jax.numpy.add, before, overlap)


def _can_do_all(request: Request) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of hybrid attention, called on a `Request`.

    Attributes:
      name: its name in `hybrid_attention(implementation=...)`.
      run: Request -> (output, state after the last chunk). The state is meaningful only if the request asks for it and
        that chunk is complete.
      why_not: Request -> the reason why the backend cannot do it, and the remedy; None if it can.
      takes_inline_features: True if `run` takes `InlineFeatures`; otherwise they are computed before.
      keeps_state: True if it can start from a state and return one.
      video_sums: (phi_key, value, geometry, num_frames) -> (sums over the frames before the video's last
        overlap_frames, sums over all its frames).
    """

    name: str
    run: Callable[[Request], tuple[jax.Array, HybridState | None]]
    why_not: Callable[[Request], str | None] = _can_do_all
    takes_inline_features: bool = False
    keeps_state: bool = True
    video_sums: Callable[..., tuple[LinearState, LinearState]] = sums_by_xla

    def __call__(self, request: Request) -> tuple[jax.Array, HybridState | None]:
        """Runs the backend. Raises ValueError if it cannot do the request."""
        self.check(request)
        return self.run(request if self.takes_inline_features else request.with_arrays())

    def check(self, request: Request) -> None:
        """Raises ValueError if the backend cannot do the request."""
        is_part = request.initial_state is not None or request.return_state or request.later is not None
        if not self.keeps_state and is_part:
            raise ValueError(f'implementation "{self.name}" keeps no state: use "scan" or "xla" to continue a video')
        if problem := self.why_not(request):
            raise ValueError(f'implementation "{self.name}" cannot do this: {problem}')


_MODULES = {
    "reference": "reference",
    "scan": "scan",
    "xla": "xla",
    "cudnn": "cudnn",
    "pallas_tpu": "tpu.op",
    "pallas_gpu": "pallas_gpu",
}

IMPLEMENTATIONS = tuple(_MODULES)

PREFERRED = {"tpu": ("pallas_tpu", "xla"), "gpu": ("cudnn", "xla"), "cpu": ("scan",)}
"""The preferred backends of each platform, best first. The first one that can do a request runs.

On CPUs the scan's small arrays stay in cache. `benchmarks.cpu` measured 16 videos of 21 frames x 9 tokens, 2 heads x 64
and 256 features on two cores. The scan took 26 ms forward and 110 ms with the backward pass; "xla" took 48 and 118 ms.
The scan's forward pass needed half the memory.
"""


@functools.cache
def get_backend(name: str) -> Backend:
    """The backend of that name. Its module is imported here, so that kernels are loaded only where they are used.

    Raises:
      ValueError: an unknown name, or one whose module this installation cannot import.
    """
    if name not in _MODULES:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, found {name!r}")
    try:
        return importlib.import_module(f"rehyat_jax.attention.hybrid.{_MODULES[name]}").BACKEND
    except ImportError as error:
        raise ValueError(f'implementation "{name}" cannot be imported here: {error}; use "xla"') from error


def choose_backend(request: Request, implementation: str | None) -> Backend:
    """The backend of that name; for None, the first preferred one that can do the request.

    The preferences depend on the platform that the program is compiled for.

    Raises:
      ValueError: an unknown name, or no preferred backend can do the request.
    """
    if implementation is not None:
        return get_backend(implementation)
    declined = []
    for name in PREFERRED.get(target_platform(), ("xla",)):
        backend = get_backend(name)
        if (reason := backend.why_not(request)) is None:
            return backend
        declined.append(f'"{name}": {reason}')
    raise ValueError(f"no implementation that {target_platform()} prefers can do this: {'; '.join(declined)}")
