"""ReHyAt students in PyTorch: diffusers' Wan transformer with recurrent hybrid attention in some of its blocks.

    from rehyat_torch import load_student

    transformer = load_student("student", torch_dtype=torch.bfloat16)
    pipeline = WanPipeline.from_pretrained(teacher, transformer=transformer, torch_dtype=torch.bfloat16)

The folder holds diffusers' `config.json` and `diffusion_pytorch_model*.safetensors`, in which hybrid blocks have a few
more tensors. It also holds `rehyat.json`, which lists these blocks and the form of their attention.

A student without a copy of its base has only these tensors, in `rehyat_branch.safetensors`, and perhaps low-rank
adapters. The other weights are those of the base, a folder or a name on the Hugging Face Hub:

    transformer = load_student("student", base="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16)

This file needs only torch, diffusers and safetensors. The method is that of ReHyAt (arXiv 2601.04342).
"""

import functools
import hashlib
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

WEIGHTS = "diffusion_pytorch_model.safetensors"
FORM = "rehyat.json"
BRANCH = "rehyat_branch.safetensors"
ADAPTER = "pytorch_lora_weights.safetensors"

IMPLEMENTATIONS = ("auto", "plain", "sdpa", "flex")

FUSED_QUERIES = 512
"""Queries of a chunk from which "auto" is "sdpa". Below, its copies cost more than they save, as measured on a CPU."""

FLEX_BLOCK = 128
"""Queries and keys of a block of flex attention's masks."""

IDENTITY_VALUES = 64
"""Values of every tensor in the identity of a base."""

HIDDEN_ACTIVATIONS = {"gelu": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "relu": F.relu}
OUTPUT_ACTIVATIONS = {"relu": F.relu, "softplus": F.softplus, "elu_plus_one": lambda x: F.elu(x) + 1}


class HeadwiseLinear(nn.Module):
    """A separate linear layer for every head, without bias: a 1x1 convolution with groups = heads."""

    def __init__(self, heads: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, in_features, out_features) * (2 / in_features) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, heads, in_features] -> [batch, tokens, heads, out_features]."""
        return torch.einsum("bnhi,hio->bnho", x, self.weight.to(x.dtype))


class HeadwiseMap(nn.Module):
    """A feature map. With a parameter gate [heads, head_dim], features are multiplied by 2 sigmoid(gate.x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Queries or keys [batch, tokens, heads, head_dim] -> features [batch, tokens, heads, features], at least 0."""
        features = self.features(x)
        if not hasattr(self, "gate"):
            return features
        dtype = _accumulation_dtype(x)
        gain = 2 * torch.einsum("bnhd,hd->bnh", x.to(dtype), self.gate.to(x.dtype).to(dtype)).sigmoid()
        return (features * gain[..., None]).to(x.dtype)


class FeatureMap(HeadwiseMap):
    """ReHyAt's map: a network per head, whose output is split into `degree` parts; part i is raised to the power i.

    Parameters: layers.I.weight [heads, in, features] and log_scale [heads]. The features are multiplied by
    exp(log_scale) / sqrt(features).
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        features: int = 256,
        num_layers: int = 2,
        degree: int = 2,
        hidden_activation: str = "gelu",
        output_activation: str = "relu",
    ):
        super().__init__()
        self.degree = degree
        self.hidden_activation = _choose("hidden_activation", hidden_activation, HIDDEN_ACTIVATIONS)
        self.output_activation = _choose("output_activation", output_activation, OUTPUT_ACTIVATIONS)
        widths = [head_dim] + [features] * num_layers
        self.layers = nn.ModuleList(HeadwiseLinear(heads, *pair) for pair in itertools.pairwise(widths))
        self.log_scale = nn.Parameter(torch.zeros(heads))

    def features(self, x: Tensor) -> Tensor:
        """The features without the gate."""
        dtype, accumulation = x.dtype, _accumulation_dtype(x)
        for layer in self.layers[:-1]:
            x = self.hidden_activation(layer(x).to(accumulation)).to(dtype)
        x = self.output_activation(self.layers[-1](x).to(accumulation))
        powers = [part**power for power, part in enumerate(x.chunk(self.degree, dim=-1), start=1)]
        scale = self.log_scale.to(accumulation).exp() / x.shape[-1] ** 0.5
        return (torch.cat(powers, dim=-1) * scale[:, None]).to(dtype)


class HedgehogMap(HeadwiseMap):
    """Hedgehog's map (arXiv 2402.04347): softmax over the features of x W and of -x W.

    Parameters: layers.0.weight [heads, head_dim, features / 2] and log_scale [heads]. The features are multiplied by
    exp(log_scale) * sqrt(features) / 2.
    """

    def __init__(self, heads: int, head_dim: int, *, features: int = 256, **fields_of_other_kinds):
        super().__init__()
        layer = HeadwiseLinear(heads, head_dim, features // 2)
        layer.weight = nn.Parameter(torch.eye(head_dim, features // 2).repeat(heads, 1, 1))
        self.layers = nn.ModuleList([layer])
        self.log_scale = nn.Parameter(torch.zeros(heads))

    def features(self, x: Tensor) -> Tensor:
        """The features without the gate."""
        scores = self.layers[0](x).to(_accumulation_dtype(x))
        features = torch.cat([scores.softmax(dim=-1), (-scores).softmax(dim=-1)], dim=-1)
        scale = self.log_scale.to(features.dtype).exp() * features.shape[-1] ** 0.5 / 2
        return (features * scale[:, None]).to(x.dtype)


class SiluMap(HeadwiseMap):
    """SiLU of x W, shifted to be non-negative and divided by its L2 norm.

    Parameters: layers.0.weight [heads, head_dim, features] and log_scale [heads]. The features are multiplied by
    exp(log_scale).
    """

    def __init__(self, heads: int, head_dim: int, *, features: int = 256, **fields_of_other_kinds):
        super().__init__()
        self.layers = nn.ModuleList([HeadwiseLinear(heads, head_dim, features)])
        self.log_scale = nn.Parameter(torch.zeros(heads))

    def features(self, x: Tensor) -> Tensor:
        """The features without the gate."""
        features = F.silu(self.layers[0](x).to(_accumulation_dtype(x))) + 0.27847
        features = features * (features.square().sum(dim=-1, keepdim=True) + 1e-12).rsqrt()
        return (features * self.log_scale.to(features.dtype).exp()[:, None]).to(x.dtype)


FEATURE_MAPS = {"mlp": FeatureMap, "hedgehog": HedgehogMap, "silu_l2": SiluMap}


def make_feature_map(heads: int, head_dim: int, *, kind: str = "mlp", gate: bool = False, **fields) -> nn.Module:
    """The feature map of all heads that "feature_map" in rehyat.json describes; its "input" is not given here."""
    feature_map = _choose("feature_map.kind", kind, FEATURE_MAPS)(heads, head_dim, **fields)
    if gate:
        feature_map.gate = nn.Parameter(torch.zeros(heads, head_dim))
    return feature_map


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_query: Tensor,
    phi_key: Tensor,
    *,
    tokens_per_frame: int,
    chunk_frames: int,
    overlap_frames: int,
    causal: bool = True,
    stabilizer: str = "row_max",
    anchor_frames: int = 0,
    linear_window: bool = False,
    log_decay: Tensor | None = None,
    branch_gate: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Softmax attention inside a temporal window, linear attention outside it, and one normalisation over both.

    The video is divided into chunks of Tc = chunk_frames frames. Queries of chunk t attend by softmax to the frames
    [max(t*Tc - To, 0), (t+1)*Tc), To = overlap_frames, and by their features to all frames before that window (and,
    unless causal, to those after it):

        y = (sum_S exp(q.k_j / sqrt(head_dim) - c) v_j + scale * phi_query(q) sum_L phi_key(k_j) v_j^T)
          / (sum_S exp(q.k_j / sqrt(head_dim) - c)     + scale * phi_query(q) sum_L phi_key(k_j))

    A frame enters the linear sums when it leaves the window, so the causal form's memory, except inputs and output,
    does not grow with the video; only that of "flex" does. All arithmetic is float32 (float64 for float64 inputs), also
    under autocast. With bfloat16 inputs on a GPU, `torch.set_float32_matmul_precision("high")` loses nothing in the
    scores: a bfloat16 fits into TF32.

    Args:
      query, key, value: [batch, tokens, heads, head_dim], tokens frame-major; the last chunk may be shorter.
      phi_query, phi_key: non-negative features [batch, tokens, heads, features].
      tokens_per_frame: tokens of one latent frame.
      chunk_frames: Tc, at least 1.
      overlap_frames: To, between 0 and chunk_frames.
      causal: whether linear attention is only to the past.
      stabilizer: "row_max": c is the row's largest score in the window and scale is 1. "joint": scale is exp(-c), so
        that c cancels. These are two different functions; a student needs the one with which it was trained.
      anchor_frames: the video's first frames, at most Tc, are softmax keys of every chunk, and no linear keys.
      linear_window: whether linear attention reads the frames of the window too.
      log_decay: [heads]; the linear weight of a key is multiplied by exp(log_decay) for each frame between it and the
        window. None for no decay.
      branch_gate: [heads]; the branches are normalised separately, (1 - gate) softmax + gate linear. None for one
        normalisation.
      implementation: "plain" writes scores into arrays, [batch, heads, a chunk's tokens, its window's tokens]. "sdpa"
        is `scaled_dot_product_attention` for each window, and keeps no such arrays for the backward pass. "flex" is one
        call of `flex_attention` for the windows of all chunks. It needs PyTorch 2.9, and is compiled on a GPU. On a CPU
        it is not, writes an array of all scores, and has no gradients. "auto" is "sdpa" if a chunk has at least
        `FUSED_QUERIES` tokens, else "plain". All compute the same, to rounding.

    Returns: y, [batch, tokens, heads, head_dim] in the dtype of `query`.

    Raises:
      ValueError: the arguments do not fit together, or "flex" cannot compute this.
    """
    tokens = query.shape[1]
    if tokens_per_frame < 1 or tokens % tokens_per_frame:
        raise ValueError(f"expected whole frames of {tokens_per_frame} tokens, found {tokens} tokens")
    if chunk_frames < 1 or not 0 <= overlap_frames <= chunk_frames:
        raise ValueError(f"expected 0 <= overlap_frames <= chunk_frames, found {overlap_frames} and {chunk_frames}")
    if not 0 <= anchor_frames <= chunk_frames:
        raise ValueError(f"expected 0 <= anchor_frames <= chunk_frames, found {anchor_frames} and {chunk_frames}")
    if stabilizer not in ("row_max", "joint"):
        raise ValueError(f'stabilizer must be "row_max" or "joint", found {stabilizer!r}')
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, found {implementation!r}")
    frames = tokens // tokens_per_frame
    bounds = [(start, min(start + chunk_frames, frames)) for start in range(0, frames, chunk_frames)]
    dtype = _accumulation_dtype(query)

    def part(x: Tensor, start: int, end: int) -> Tensor:
        """Frames as [batch, heads, tokens, ...]."""
        return x[:, start * tokens_per_frame : end * tokens_per_frame].transpose(1, 2).to(dtype)

    # A column of ones next to the values: every weighted sum of them then has its normaliser in one more column.
    values = lambda start, end: F.pad(part(value, start, end), (0, 1), value=1.0)

    def decayed(x: Tensor, exponents: Tensor) -> Tensor:
        """x [batch, heads, n, ...] times exp(log_decay * exponents), [n] or [1]."""
        return x if log_decay is None else x * (log_decay.to(dtype)[:, None] * exponents).exp()[..., None]

    def linear_sums(start: int, end: int, *, future: bool = False) -> Tensor:
        """The sums over frames that are no anchors, decayed by their distance to the end, or to the start."""
        first = max(start, anchor_frames)
        frame = torch.arange(first, max(end, first), device=query.device).repeat_interleave(tokens_per_frame)
        phi = decayed(part(phi_key, first, max(end, first)), frame - start if future else end - 1 - frame)
        return phi.mT @ values(first, max(end, first))

    count = lambda n: torch.full((1,), n, device=query.device)

    def linear_reads() -> Iterator[Tensor]:
        """For each chunk, what its queries read from the linear branch: the argument `linear` of `_merged`."""
        past, seen = linear_sums(0, 0), 0
        future = [past]  # the sums over all later chunks, for the chunks from last to first
        for start, end in [] if causal else reversed(bounds[1:]):
            future.append(decayed(future[-1], count(end - start)) + linear_sums(start, end, future=True))
        for start, end in bounds:
            window = max(start - overlap_frames, 0)
            past, seen = decayed(past, count(window - seen)) + linear_sums(seen, window), window
            sums = past if causal else past + future.pop()
            if linear_window:
                sums = sums + linear_sums(window, end)
            yield part(phi_query, start, end) @ sums

    with torch.autocast(query.device.type, enabled=False):
        reads = linear_reads() if phi_key.shape[-1] else itertools.repeat(None)
        if _takes_flex(implementation, query, key, value):
            sizes = (n * tokens_per_frame for n in (frames, chunk_frames, overlap_frames, anchor_frames))
            arrays = (part(x, 0, frames) for x in (query, key, value))
            linear = torch.cat(list(reads), dim=2) if phi_key.shape[-1] else None
            y = _merged_by_flex(*arrays, linear, _window_mask(*sizes, query.device), stabilizer, branch_gate)
            return y.transpose(1, 2).to(query.dtype)

        outputs = []
        for (start, end), linear in zip(bounds, reads, strict=False):
            window = max(start - overlap_frames, 0)
            anchors = min(anchor_frames, window)
            keys = torch.cat([part(key, 0, anchors), part(key, window, end)], dim=2)
            window_values = torch.cat([part(value, 0, anchors), part(value, window, end)], dim=2)
            queries, own_keys = part(query, start, end), part(key, start, end)
            y = _merged(queries, keys, window_values, linear, own_keys, stabilizer, branch_gate, implementation)
            outputs.append(y.transpose(1, 2).to(query.dtype))
    return torch.cat(outputs, dim=1)


def strided_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_query: Tensor,
    phi_key: Tensor,
    *,
    tokens_per_frame: int,
    stride: int,
    stabilizer: str = "row_max",
    implementation: str = "auto",
) -> Tensor:
    """Attention Surgery's form (arXiv 2509.24899): softmax over every R-th token, linear attention to the others.

    Args: as `hybrid_attention`, and stride: R. tokens_per_frame is not used. There are no windows, so "flex" is "sdpa".
    """
    dtype = _accumulation_dtype(query)
    with torch.autocast(query.device.type, enabled=False):
        query_, key, value, phi_query, phi_key = (
            x.transpose(1, 2).to(dtype) for x in (query, key, value, phi_query, phi_key)
        )
        position = torch.arange(key.shape[2], device=key.device)
        is_linear = position % stride > 0
        linear = phi_key[:, :, is_linear].mT @ F.pad(value[:, :, is_linear], (0, 1), value=1.0)
        keys, values = key[:, :, ::stride], value[:, :, ::stride]
        outputs = []
        for queries, phi, nearest in zip(
            query_.split(1024, dim=2), phi_query.split(1024, dim=2), (position // stride).split(1024), strict=True
        ):
            y = _merged(queries, keys, values, phi @ linear, keys[:, :, nearest], stabilizer, None, implementation)
            outputs.append(y.transpose(1, 2).to(query.dtype))
    return torch.cat(outputs, dim=1)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_query: Tensor,
    phi_key: Tensor,
    *,
    tokens_per_frame: int,
    chunk_frames: int = 1,
    causal: bool = True,
    implementation: str = "auto",
) -> Tensor:
    """Linear attention alone: to all frames up to the end of the query's chunk or, unless causal, to all frames.

    Args: as `hybrid_attention`. query, key and implementation are not used.
    """
    del key
    dtype, size = _accumulation_dtype(query), chunk_frames * tokens_per_frame
    with torch.autocast(query.device.type, enabled=False):
        value, phi_query, phi_key = (x.transpose(1, 2).to(dtype) for x in (value, phi_query, phi_key))
        values = F.pad(value, (0, 1), value=1.0)
        parts = [phi.mT @ part for phi, part in zip(phi_key.split(size, dim=2), values.split(size, dim=2), strict=True)]
        sums = list(itertools.accumulate(parts)) if causal else [sum(parts)] * len(parts)
        reads = torch.cat([phi @ s for phi, s in zip(phi_query.split(size, dim=2), sums, strict=True)], dim=2)
        mass = reads[..., -1:]
        y = reads[..., :-1] / torch.where(mass > 0, mass, 1)
    return y.transpose(1, 2).to(query.dtype)


def _merged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    linear: Tensor | None,
    own_key: Tensor,
    stabilizer: str,
    branch_gate: Tensor | None,
    implementation: str,
) -> Tensor:
    """Softmax attention and what was read from the linear branch, with one normalisation or with a gate.

    Args:
      query: [batch, heads, queries, head_dim].
      key, value: those of the softmax branch [batch, heads, keys, head_dim].
      linear: [batch, heads, queries, head_dim + 1]; the last column is the linear mass. None if there
        are no features.
      own_key: for every query one of the softmax keys, near it in the video [batch, heads, queries, head_dim].
      stabilizer, branch_gate, implementation: as in `hybrid_attention`.
    """
    fused = implementation in ("sdpa", "flex") or (implementation == "auto" and query.shape[2] >= FUSED_QUERIES)
    if linear is not None and branch_gate is None:
        merge = _merged_by_sdpa if fused else _merged_plainly
        return merge(query, key, value, linear, own_key, stabilizer)
    if fused:
        softmax = F.scaled_dot_product_attention(query, key, value)
    else:
        softmax = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value
    return softmax if linear is None else _gated(softmax, linear, branch_gate)


def _gated(softmax: Tensor, linear: Tensor, branch_gate: Tensor) -> Tensor:
    """Both branches normalised separately, (1 - gate) softmax + gate linear. Args: as `_merged`."""
    read, mass = linear[..., :-1], linear[..., -1:]
    gate = torch.where(mass > 0, branch_gate.to(softmax.dtype)[:, None, None], 0)
    return softmax + gate * (read / torch.where(mass > 0, mass, 1) - softmax)


def _merged_plainly(
    query: Tensor, key: Tensor, value: Tensor, linear: Tensor, own_key: Tensor, stabilizer: str
) -> Tensor:
    """One normalisation over both branches, with an array of scores. Args: as `_merged`; own_key is not used."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    c, scale = scores.detach().amax(-1, keepdim=True), 1.0
    if stabilizer == "joint":
        # c also depends on the linear mass: otherwise exp(-c) would overflow where all scores are low.
        c = torch.maximum(c, linear.detach()[..., -1:].log())
        scale = (-c.clamp(min=-64.0)).exp()
    total = (scores - c).exp() @ F.pad(value, (0, 1), value=1.0) + scale * linear
    return total[..., :-1] / total[..., -1:]


def _merged_by_sdpa(
    query: Tensor, key: Tensor, value: Tensor, linear: Tensor, own_key: Tensor, stabilizer: str
) -> Tensor:
    """One normalisation over both branches, from one call of `scaled_dot_product_attention`. Args: as `_merged`.

    PyTorch returns the softmax branch normalised, without its mass. One more key recovers the mass: its score is a
    number c for each query, and its value is zero, except in one more column, where it is 1. That column is then
    p = exp(c) / (mass + exp(c)), and the others are p exp(-c) times the sum over the window. So

        y = (others + p scale L) / (1 - p + p scale M),  L and M the linear branch's sum and mass,

    with scale = 1 and c the largest score for "row_max", and scale = exp(-c) with any c for "joint". There, c is log M
    or the score of one key, if that is larger. Where c is far above all scores, it is log M, so the lost digits of
    1 - p do not matter. Where it is so far below that p is 0, the linear branch has no weight. Gradients are exact with
    a constant c, as in `_merged_plainly`.
    """
    size, scale = query.shape[-1], query.shape[-1] ** -0.5
    with torch.no_grad():
        if stabilizer == "row_max":
            parts = [(part @ key.mT).amax(-1, keepdim=True) for part in query.split(FUSED_QUERIES, dim=2)]
            c, linear_scale = torch.cat(parts, dim=2) * scale, 1.0
        else:
            own_score = (query * own_key).sum(-1, keepdim=True) * scale
            c = torch.maximum(own_score, linear[..., -1:].log())
            linear_scale = (-c.clamp(min=-64.0)).exp()
    # Kernels want sizes that are multiples of 8.
    columns = 8 - size % 8
    query = torch.cat([query, c / scale, query.new_zeros(*query.shape[:-1], columns - 1)], dim=-1)
    one_more = F.one_hot(torch.tensor(size, device=query.device), size + columns).to(query.dtype)
    one_more = one_more.expand(*key.shape[:2], 1, -1)
    key, value = (torch.cat([F.pad(x, (0, columns)), one_more], dim=2) for x in (key, value))
    softmax = F.scaled_dot_product_attention(query, key, value, scale=scale)
    p = softmax[..., size : size + 1]
    return (softmax[..., :size] + p * linear_scale * linear[..., :-1]) / (1 - p + p * linear_scale * linear[..., -1:])


def _takes_flex(implementation: str, *arrays: Tensor) -> bool:
    """Whether `flex_attention` computes the windows. Raises ValueError if it should, and cannot for these arrays."""
    if implementation != "flex":
        return False
    device, reason = arrays[0].device, None
    if not hasattr(flex, "AuxRequest"):
        reason = f"needs PyTorch 2.9 or later, found {torch.__version__}"
    elif device.type != "cuda" and torch.is_grad_enabled() and any(x.requires_grad for x in arrays):
        reason = f"has no gradients on the device {device.type!r} in PyTorch"
    if reason:
        raise ValueError(f'implementation "flex" {reason}; use "sdpa" or "auto"')
    return True


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # or the backward pass could not use it
def _window_mask(tokens: int, chunk: int, overlap: int, anchors: int, device: torch.device) -> flex.BlockMask:
    """The windows and anchors of a video's chunks for `flex_attention`; all sizes are in tokens.

    A block of keys is skipped, read with the mask, or read completely. `create_block_mask` finds the same from an array
    [tokens, tokens]. Here it follows from the first and the last query of a block, since windows only move forward.
    """

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        start = query // chunk * chunk
        return (key >= start - overlap) & (key < start + chunk) | (key < anchors)

    first = torch.arange(0, tokens, FLEX_BLOCK, device=device)
    last = first + FLEX_BLOCK - 1
    starts, ends = (x.clamp(max=tokens - 1)[:, None] // chunk * chunk for x in (first, last))
    some = (last >= starts - overlap) & (first < ends + chunk) | (first < anchors)
    every = (first >= ends - overlap) & (last < starts + chunk) | (last < anchors)
    every &= (last < tokens) & (last[:, None] < tokens)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks of keys each block of queries reads, and their indices before all others."""
        blocks = blocks[None, None].int()
        return blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()

    lists = (*listed(some & ~every), *listed(every))
    return flex.BlockMask.from_kv_blocks(*lists, FLEX_BLOCK, mask, seq_lengths=(tokens, tokens))


@functools.cache
def _flex_attention(device: str):
    """`flex_attention`, compiled on a GPU. PyTorch's compiler for CPUs does not return the log-sum-exp."""
    return torch.compile(flex.flex_attention) if device == "cuda" else torch.compiler.disable(flex.flex_attention)


def _merged_by_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    linear: Tensor | None,
    windows: flex.BlockMask,
    stabilizer: str,
    branch_gate: Tensor | None,
) -> Tensor:
    """Result of `_merged` for all chunks, from one call of `flex_attention` and its log-sum-exp.

    Args: as `_merged`, but with all queries and keys of the video; windows: result of `_window_mask`.
    """
    one_normalisation = linear is not None and branch_gate is None
    row_max = one_normalisation and stabilizer == "row_max"
    wanted = flex.AuxRequest(lse=one_normalisation, max_scores=row_max and query.is_cuda)
    softmax, aux = _flex_attention(query.device.type)(query, key, value, block_mask=windows, return_aux=wanted)
    if not one_normalisation:
        return softmax if linear is None else _gated(softmax, linear, branch_gate)
    c, scale = aux.max_scores, 1.0
    with torch.no_grad():
        if not row_max:
            c = torch.maximum(aux.lse, linear[..., -1].log())
            scale = (-c.clamp(min=-64.0)).exp()[..., None]
        elif c is None:  # PyTorch returns the largest scores only on GPUs.
            position = torch.arange(query.shape[2], device=query.device)
            outside = ~windows.mask_mod(None, None, position[:, None], position)
            c = (query @ key.mT).masked_fill(outside, -torch.inf).amax(-1) / query.shape[-1] ** 0.5
    mass = (aux.lse - c).exp()[..., None]
    return (mass * softmax + scale * linear[..., :-1]) / (mass + scale * linear[..., -1:])


def window_attention(*arrays: Tensor, **form) -> Tensor:
    """Softmax in the window and to the anchors, nothing outside: `hybrid_attention` with no features."""
    return hybrid_attention(*arrays, **form)


def chunk_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *unused: Tensor,
    tokens_per_frame: int,
    chunk_frames: int = 3,
    implementation: str = "auto",
) -> Tensor:
    """Softmax attention of the tokens of every chunk of frames to all tokens up to the chunk's end.

    Args: as `hybrid_attention`; features and implementation are not used.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    size = chunk_frames * tokens_per_frame
    outputs = []
    for start in range(0, query.shape[2], size):
        end = start + size
        part = F.scaled_dot_product_attention(query[:, :, start:end], key[:, :, :end], value[:, :, :end])
        outputs.append(part.transpose(1, 2))
    return torch.cat(outputs, dim=1)


KINDS = {
    "causal_softmax": chunk_causal_attention,
    "hybrid": hybrid_attention,
    "two_branch": hybrid_attention,
    "window": window_attention,
    "strided": strided_attention,
    "linear": linear_attention,
}
"""The attention of each kind of form in rehyat.json."""


class HybridAttnProcessor:
    """Self-attention of converted blocks, which replaces diffusers' `WanAttnProcessor`.

    Projections, norms and RoPE are the same; only the attention itself differs. The attention module must have the
    submodules and parameters of `add_parameters`. One processor serves all blocks with the same form.
    """

    def __init__(
        self,
        kind: str = "hybrid",
        *,
        feature_map_input: str | None = "rotated",
        implementation: str = "auto",
        **form,
    ):
        """`feature_map_input`: "rotated" (after RoPE), "unrotated" (before it), "unnormed" (before the norm too), or
        None for a form without feature maps; `implementation` and `form`: keywords of the kind's function in `KINDS`.
        """
        self.attend = functools.partial(_choose("kind", kind, KINDS), implementation=implementation)
        if feature_map_input is not None:
            _choose("input", feature_map_input, {"rotated": 0, "unrotated": 0, "unnormed": 0})
        self.input = feature_map_input
        self.form = form
        self.grid = (0, 0, 0)

    def record_grid(self, patch_embedding: nn.Module, args: tuple, patches: Tensor) -> None:
        """Forward hook of the patch embedding; its output [batch, channels, frames, height, width] gives the grid."""
        self.grid = tuple(patches.shape[2:])

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Self-attention of hidden_states [batch, tokens, channels]; rotary_emb comes from `WanRotaryPosEmbed`."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("hybrid attention is self-attention without a mask")
        frames, height, width = self.grid
        if frames * height * width != hidden_states.shape[1]:
            raise ValueError(
                f"expected {frames}x{height}x{width} tokens, as many as were last embedded, found "
                f"{hidden_states.shape[1]}; run backward before the next video if gradients are checkpointed"
            )
        heads = lambda x: x.unflatten(2, (attn.heads, -1))
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), heads(attn.to_v(hidden_states))
        sources = {"unnormed": (heads(query), heads(key))}
        sources["unrotated"] = heads(attn.norm_q(query)), heads(attn.norm_k(key))
        sources["rotated"] = tuple(rotate(x, *rotary_emb) for x in sources["unrotated"])
        if self.input is None:
            phis = tuple(x[..., :0] for x in sources["rotated"])
        else:
            phi_query, phi_key = sources[self.input]
            phis = attn.feature_map_query(phi_query), attn.feature_map_key(phi_key)
        learned = {}
        if hasattr(attn, "linear_decay"):
            learned["log_decay"] = -F.softplus(attn.linear_decay)
        if hasattr(attn, "branch_gate"):
            learned["branch_gate"] = attn.branch_gate
        y = self.attend(*sources["rotated"], value, *phis, tokens_per_frame=height * width, **learned, **self.form)
        return attn.to_out[1](attn.to_out[0](y.flatten(2)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on adjacent pairs (2i, 2i+1) of x [batch, tokens, heads, head_dim]; the tables repeat each angle twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 0::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def attach_hybrid_attention(
    transformer: WanTransformer3DModel, hybrid_blocks: list[int] | str, hybrid: dict, *, implementation: str = "auto"
) -> None:
    """Gives blocks of a Wan transformer hybrid attention with new feature maps, in place.

    The maps become submodules of the blocks' self-attention, so that devices, dtypes, parameters and the state dict
    include them: `blocks.N.attn1.feature_map_query.layers.I.weight`, `...log_scale`, and `feature_map_key` likewise.

    Args:
      transformer: a transformer of any size.
      hybrid_blocks: indices of the blocks, or "all".
      hybrid: the form, as in rehyat.json.
      implementation: as in `hybrid_attention`.
    """
    form = dict(hybrid)
    kind, maps = form.pop("kind", "hybrid"), form.pop("feature_map", None)
    add = lambda attn: None
    if maps is not None:
        maps = dict(maps)
        options = dict(decay=form.pop("decay", False), branch_gate=kind == "two_branch")
        form["feature_map_input"] = maps.pop("input", "rotated")
        add = lambda attn: add_parameters(attn, maps, **options)
    else:
        form["feature_map_input"] = None
    processor = HybridAttnProcessor(kind, implementation=implementation, **form)
    # A bound method, so that a copy of the model records in its own processor; a closure would not.
    transformer.patch_embedding.register_forward_hook(processor.record_grid)
    for index in range(len(transformer.blocks)) if hybrid_blocks == "all" else hybrid_blocks:
        attn = transformer.blocks[index].attn1
        add(attn)
        attn.set_processor(processor)


def add_parameters(attn: nn.Module, maps: dict, *, decay: bool, branch_gate: bool) -> None:
    """Gives an attention module the learned parameters of its linear branch.

    Args:
      maps: keywords of `make_feature_map`.
      decay: also `linear_decay` [heads], where log_decay = -softplus(linear_decay).
      branch_gate: also `branch_gate` [heads].
    """
    for name in ("feature_map_query", "feature_map_key"):
        setattr(attn, name, make_feature_map(attn.heads, attn.inner_dim // attn.heads, **maps))
    if decay:
        attn.linear_decay = nn.Parameter(torch.full((attn.heads,), -4.0))
    if branch_gate:
        attn.branch_gate = nn.Parameter(torch.zeros(attn.heads))


def hybrid_forms(content: dict) -> list[tuple[list[int] | str, dict]]:
    """(blocks, form) of every form in rehyat.json of format version 2, or of the one form of version 1."""
    version = content.get("format_version", 1)
    if version == 1:
        return [(content["hybrid_blocks"], content["hybrid"])] if content.get("hybrid_blocks") else []
    if version != 2:
        raise ValueError(f"{FORM}: format_version should be 1 or 2, found {version!r}; get a newer rehyat_torch.py")
    forms = []
    for entry in content.get("attention", []):
        form = dict(entry)
        blocks = form.pop("blocks")
        if form["kind"] not in KINDS:
            raise ValueError(
                f"{FORM}: kind of attention should be one of {list(KINDS)}, found {form['kind']!r}; get a newer "
                f"rehyat_torch.py"
            )
        forms.append((blocks, form))
    return forms


def load_student(
    folder: str | Path,
    torch_dtype: torch.dtype = torch.float32,
    *,
    base: str | Path | None = None,
    implementation: str = "auto",
) -> WanTransformer3DModel:
    """Loads a student as diffusers' transformer, on the CPU and in evaluation mode.

    Call it like any Wan transformer. diffusers' transformer does not pad the text. `WanPipeline` zero-pads embeddings
    to 512 tokens; without it, pad them yourself to `text_length` of rehyat.json (512 if not given there).

    Args:
      folder: the student's folder, in diffusers' layout.
      torch_dtype: dtype of the weights, except those that diffusers keeps in float32 and the feature maps' log_scale.
      base: for a student without a copy of its base: the folder of the base's transformer or pipeline, or the
        pipeline's name on the Hub, "owner/name" or "owner/name@revision", which is downloaded if it is not in the Hub's
        cache. None for the name in rehyat.json. Adapters are added to the base's weights in float32.
      implementation: of the hybrid attention, as in `hybrid_attention`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the folder is not a student's, the base is another one than in training, or tensors are missing or
        unexpected.
      RuntimeError: a tensor has a wrong shape; raised by `load_state_dict`.
    """
    folder = Path(folder)
    if not (folder / FORM).exists():
        raise FileNotFoundError(f"{folder / FORM} is missing: without it, this is no student's folder; get it again")
    config, form = json.loads((folder / "config.json").read_text()), json.loads((folder / FORM).read_text())
    if config.get("_class_name") != WanTransformer3DModel.__name__:
        raise ValueError(
            f"{folder / 'config.json'}: expected _class_name WanTransformer3DModel, "
            f"found {config.get('_class_name')!r}; export the student in diffusers' layout"
        )
    forms, record = hybrid_forms(form), form.pop("base", None)
    if not forms:
        raise ValueError(f"{folder / FORM}: has no hybrid blocks; load it with WanTransformer3DModel.from_pretrained")
    if record is None and base is not None:
        raise ValueError(f"{folder}: has all weights, expected no base, found {str(base)!r}; leave base out")
    place = None if record is None else _base_folder(folder, record, base, config)
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(config)
        for blocks, hybrid in forms:
            attach_hybrid_attention(transformer, blocks, hybrid, implementation=implementation)
    # The tables of RoPE are computed, not loaded, so they must not stay on the meta device.
    model = transformer.config
    transformer.rope = type(transformer.rope)(model.attention_head_dim, model.patch_size, model.rope_max_seq_len)
    if place is None:
        _load_weights(transformer, folder, _weight_files(folder), torch_dtype)
    else:
        adapter = _read_adapter(folder / ADAPTER) if record["adapter"] else {}
        _load_weights(transformer, folder, [folder / BRANCH], torch_dtype, base=place, record=record, adapter=adapter)
    transformer.rehyat = form
    return transformer.eval()


def save_student(transformer: WanTransformer3DModel, folder: str | Path) -> None:
    """Writes a student from `load_student`, perhaps trained further, to a new folder that `load_student` reads.

    The folder has all weights, also those of a base.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} already exists; choose another folder")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        student = Path(temporary) / folder.name
        transformer.save_pretrained(student)
        (student / FORM).write_text(json.dumps(transformer.rehyat, indent=2, sort_keys=True) + "\n")
        shutil.copy(__file__, student / "rehyat_torch.py")
        student.rename(folder)


def _base_folder(folder: Path, record: dict, base: str | Path | None, config: dict) -> Path:
    """The folder of the base's weights, whose config.json was compared with the student's.

    Args:
      folder: the student's folder.
      record: "base" of its rehyat.json: {"name": str or None, "identity": str, "adapter": bool}.
      base: as in `load_student`.
      config: content of the student's config.json.
    """
    if not isinstance(record, dict) or record.keys() != {"name", "identity", "adapter"}:
        raise ValueError(
            f"{folder / FORM}: base should have name, identity and adapter, found {record!r}; get the folder again, "
            f"with its own rehyat_torch.py"
        )
    base = base or record["name"]
    if base is None:
        raise ValueError(
            f"{folder}: has no copy of its base, and does not name it; give base=, the folder or the Hub name of the "
            f"model that the student was made from"
        )
    place = Path(base)
    if not place.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(base)) or str(base).startswith("."):
            raise FileNotFoundError(f"{base}: does not exist; give the base's folder, or a Hub name such as owner/name")
        from huggingface_hub import snapshot_download

        repository, _, revision = str(base).partition("@")
        patterns = ["*.json", "transformer/*.safetensors", "diffusion_pytorch_model*.safetensors"]
        try:
            place = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
        except Exception as error:
            raise FileNotFoundError(
                f"{base}: is no folder here, and could not be fetched from the Hugging Face Hub ({error}); check the "
                f"name, or download it elsewhere and give its folder"
            ) from error
    if (place / "transformer").is_dir():
        place = place / "transformer"
    found = json.loads((place / "config.json").read_text())
    for name, expected in config.items():
        if name in found and found[name] != expected and not name.startswith("_"):
            raise ValueError(
                f"{base}: is not the base of {folder}: {name} should be {expected!r}, found {found[name]!r}; give "
                f"{record['name'] or 'the model that the student was made from'}"
            )
    return place


def _read_adapter(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Low-rank adapters: name of the adapted weight -> (A [rank, in], B [out, rank]), float32."""
    tensors, adapters = load_file(file), {}
    for name in sorted(tensors):
        match = re.fullmatch(r"transformer\.(.+)\.lora_([AB])\.weight", name)
        if not match or f"transformer.{match[1]}.lora_{'BA'[match[2] == 'B']}.weight" not in tensors:
            raise ValueError(f"{file}: unexpected: {[name]}; expected pairs of transformer.*.lora_A.weight and lora_B")
        adapters[f"{match[1]}.weight"] = tuple(tensors[f"transformer.{match[1]}.lora_{s}.weight"].float() for s in "AB")
    return adapters


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder in diffusers' layout."""
    index = folder / f"{WEIGHTS}.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [WEIGHTS]
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index}: names {outside[0]!r}, expected files of the same folder; get the index again")
    return [folder / name for name in names]


def _load_weights(
    transformer: WanTransformer3DModel,
    folder: Path,
    files: list[Path],
    torch_dtype: torch.dtype,
    *,
    base: Path | None = None,
    record: dict | None = None,
    adapter: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Fills a transformer on the meta device, file by file.

    Args:
      transformer: the transformer.
      folder: the student's folder, for messages.
      files: the student's own files.
      torch_dtype: as in `load_student`.
      base: folder of the weights that the student's files lack, whose `record` is that of `_base_folder`.
      adapter: result of `_read_adapter`, for the base's weights.
    """
    in_float32 = {*transformer._keep_in_fp32_modules, "log_scale", "linear_decay", "branch_gate"}
    missing, unexpected, samples, adapter = set(transformer.state_dict()), [], {}, dict(adapter or {})
    for file in [*(_weight_files(base) if base else []), *files]:
        tensors = load_file(file)
        if twice := sorted(tensors.keys() & samples.keys()):
            raise ValueError(f"{file}: has tensors of the base or of another file: {twice}; get the folder again")
        for name, tensor in tensors.items():
            if base and file.parent == base:
                samples[name] = _sample(tensor)
                if pair := adapter.pop(name, None):
                    tensor = tensor.float() + pair[1] @ pair[0]
            dtype = torch.float32 if in_float32.intersection(name.split(".")) else torch_dtype
            # A copy, because a loaded tensor is a view of the file, which may be replaced while the model exists.
            tensors[name] = tensor.to(dtype, copy=True)
        unexpected += transformer.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
        missing -= tensors.keys()
    if base and (found := _identity(samples)) != record["identity"]:
        raise ValueError(
            f"{base}: is not the base of {folder}: its weights are others (identity {found[:12]}, expected "
            f"{record['identity'][:12]}); give {record['name'] or 'the model that the student was made from'}"
        )
    if missing or unexpected or adapter:
        raise ValueError(
            f"{folder}: the tensors are not those that config.json and {FORM} describe; missing: {sorted(missing)}, "
            f"unexpected: {sorted([*unexpected, *adapter])}; get the folder again"
        )


def _sample(tensor: Tensor) -> bytes:
    """`IDENTITY_VALUES` values of a tensor, spread over it and rounded to bfloat16."""
    chosen = torch.arange(IDENTITY_VALUES) * 2654435761 % tensor.numel()
    return tensor.reshape(-1)[chosen].to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes()


def _identity(samples: dict[str, bytes]) -> str:
    """SHA-256 of the samples of all tensors by name. Copies in float32 and bfloat16 have the same one."""
    found = hashlib.sha256()
    for name in sorted(samples):
        found.update(name.encode() + samples[name])
    return found.hexdigest()


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _choose(name: str, found: str, choices: dict):
    if found not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, found {found!r}")
    return choices[found]
