"""Videos an hour of `prepare` with a VAE and umT5: python -m rehyat_jax.benchmarks.prepare [--videos 24].

Writes videos, and a tiny VAE and umT5 with random weights in diffusers' layout. Measures each part
of the preparation on this machine, and the complete preparation. Prints a markdown table. A second table plans Wan's
own models on TPUs and GPUs from their FLOPs; nothing of it has run.
"""

import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import sentencepiece
from flax import nnx, traverse_util

from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.cli import CommandParser, report_input_errors
from rehyat_jax.cost_model.chips import chip_of, device_count
from rehyat_jax.files.mp4 import write_video
from rehyat_jax.generation.options import number
from rehyat_jax.generation.tokenizer import MAX_TOKENS
from rehyat_jax.models.umt5.config import UMT5_PRESETS, UMT5Config
from rehyat_jax.models.wan_vae.config import WanVaeConfig
from rehyat_jax.models.wan_vae.flops import encode_flops
from rehyat_jax.preparation.caption_embeddings import CaptionEmbeddings, open_caption_encoder
from rehyat_jax.preparation.clips import ClipReader, read_best_clip
from rehyat_jax.preparation.units import Hosts
from rehyat_jax.preparation.video_encoder import VaeEncoder
from rehyat_jax.preparation.video_sources import VideoFolder
from rehyat_jax.preparation.videos import prepare_videos
from rehyat_jax.weights.models import spec_of
from rehyat_jax.weights.streamed import StreamedArray, StreamedModel
from rehyat_jax.weights.torch_checkpoint import write_torch_checkpoint

VAE = WanVaeConfig(base_dim=8)
TEXT_ENCODER = UMT5Config(vocab_size=96, model_dim=64, num_heads=2, head_dim=32, ffn_dim=128, num_layers=2)
SIZE = 17, 64, 112
WORDS = "a cat runs across the green field while dogs watch the camera pans left over ocean waves"

PLANNED = {
    ("v5e:4x4", "bfloat16"): (chip_of("v5e:4x4").peak_flops, (1.5, 2.4)),
    ("v5e:4x4", "float32"): (chip_of("v5e:4x4").peak_flops / 6, (1.5, 7)),
    ("h100:8", "bfloat16"): (chip_of("h100:8").peak_flops, (2, 4)),
    ("h100:8", "float32"): (67e12, (1.25, 2)),
}
"""(topology, compute dtype of the VAE) -> (FLOP/s of a device, times its peak that encoding takes, at best and worst).

A TPU multiplies float32 at full precision in six passes of bfloat16. An H100 does so outside its tensor cores (NVIDIA's
data sheet, SXM). The factors are assumptions. On TPUs, 1.5 are the static cycles of encoding in bfloat16, and 7 those
of XLA's convolutions (docs/static_cycles.md). The others are usual for convolutions.
"""

TEXT_SHARE = 0.3
"""Assumed share of the bfloat16 peak that umT5 reaches: each group of captions gathers the weights of every block."""


def write_models(folder: Path) -> None:
    """The VAE, umT5 and a tokenizer, as diffusers writes them."""
    rng = np.random.default_rng(0)
    for part, config in (("vae", VAE), ("text_encoder", TEXT_ENCODER)):
        (folder / part).mkdir(parents=True)
        model = spec_of(config).model
        state = nnx.state(nnx.eval_shape(lambda model=model, config=config: model(config, rngs=nnx.Rngs(0))))
        leaves = traverse_util.flatten_dict(nnx.to_pure_dict(state), sep=".")
        read = lambda shape: lambda: rng.standard_normal(shape, np.float32) / math.sqrt(math.prod(shape[:-1]))
        params = {
            name: StreamedArray(leaf.shape, np.dtype(np.float32), read(leaf.shape)) for name, leaf in leaves.items()
        }
        write_torch_checkpoint(folder / part, StreamedModel(config, {}, params), "diffusers")
    tokenizer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 100),
        model_writer=tokenizer,
        vocab_size=90,
        hard_vocab_limit=False,
        minloglevel=2,
        **dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
    )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(tokenizer.getvalue())


def write_videos(folder: Path, count: int) -> None:
    """Noise of twice the size, every second caption for two videos."""
    rng, (frames, height, width) = np.random.default_rng(0), SIZE
    words = WORDS.split()
    with (folder / "captions.jsonl").open("w") as captions:
        for index in range(count):
            coarse = rng.uniform(size=(frames, height // 4, width // 4, 3)).astype(np.float32)
            write_video(folder / f"{index}.mp4", coarse.repeat(8, 1).repeat(8, 2))
            caption = f"{words[index // 2 % len(words)]} {index // 2}"
            captions.write(json.dumps({"file": f"{index}.mp4", "caption": caption}) + "\n")


def measured(folder: Path, count: int, workers: int) -> Iterator[tuple[str, int, float]]:
    """(part, number of its items, seconds)."""
    source, models = folder / "videos", folder / "models"
    source.mkdir()
    write_models(models)
    write_videos(source, count)
    videos = VideoFolder(source)

    encoder = VaeEncoder("wan_vae", models, "float32")
    with ClipReader(lambda n: read_best_clip(videos, n, [SIZE], 16), range(count), workers=workers, waiting=1) as clips:
        yield "decoding the videos", count, seconds(lambda: [clips.take(n) for n in range(count)])
    batch = np.zeros((encoder.rows, *SIZE, 3), np.uint8)
    np.asarray(encoder(batch))  # compiles
    batches = -(-count // encoder.rows)
    yield "the VAE", batches * encoder.rows, seconds(lambda: [np.asarray(encoder(batch)) for _ in range(batches)])

    texts = list(dict.fromkeys(str(video.caption) for video in videos.videos))
    embeddings = CaptionEmbeddings(folder / "text", open_caption_encoder("umt5", models), np.dtype(np.float32))
    yield "umT5, loaded and compiled, different captions", len(texts), seconds(lambda: embeddings.compute(texts))

    options: dict[str, Any] = dict(codec="wan_vae", text_encoder="umt5", models=models, sizes=[SIZE], unit=64)
    options |= dict(compute_dtype="float32", dtype="float32", workers=workers, hosts=Hosts())
    yield (
        "the complete command, which compiles and loads",
        count,
        seconds(lambda: prepare_videos(source, folder / "data", **options)),
    )


def seconds(run: Callable[[], Any]) -> float:
    """Duration of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def planned() -> Iterator[tuple[str, str, float, float, float, float]]:
    """(topology, dtype, seconds of the VAE on a device at best and worst, videos an hour at worst and best)."""
    config = UMT5_PRESETS["umt5-xxl"]
    table = spec_of(config).table(config)
    weights = sum(math.prod(row.stacked_shape) for row in table if row.path.startswith("blocks."))
    attention = 4 * MAX_TOKENS**2 * config.width * config.num_layers
    text_flops = 2 * weights * MAX_TOKENS + attention
    for (topology, dtype), (peak, factors) in PLANNED.items():
        text = text_flops / (TEXT_SHARE * chip_of(topology).peak_flops)
        best, worst = (factor * encode_flops(WanVaeConfig(), 81, 480, 832) / peak for factor in factors)
        rates = [3600 * device_count(topology) / (vae + text) for vae in (worst, best)]
        yield topology, dtype, best, worst, *rates


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = CommandParser("benchmarks.prepare", __doc__, "--videos 24 --workers 2")
    parser.add_argument("--videos", type=number(int, 4, 10_000), default=24, help="to prepare (default: %(default)s)")
    parser.add_argument("--workers", type=number(int, 1, 1000), default=2, help="decoded at a time")
    parser.add_argument("--planned", action="store_true", help="print only the table that is planned")
    arguments = parser.parse_args(argv)
    return report_input_errors(lambda: run(arguments.videos, arguments.workers, only_planned=arguments.planned))


def run(count: int, workers: int, *, only_planned: bool) -> None:
    """Prints the tables."""
    if not only_planned:
        print(
            f"{describe_environment()}, {jax.local_device_count()} devices; {'x'.join(map(str, SIZE))}, tiny models\n"
        )
        print("| part | items | seconds | an hour |\n|---|---|---|---|")
        with tempfile.TemporaryDirectory(prefix="prepare-") as folder:
            for part, items, taken in measured(Path(folder), count, workers):
                print(f"| {part} | {items} | {taken:.2f} | {3600 * items / taken:,.0f} |", flush=True)
        print()
    print("| planned | VAE computes in | VAE, seconds a video and device | videos an hour |\n|---|---|---|---|")
    for topology, dtype, best, worst, low, high in planned():
        print(f"| {topology} | {dtype} | {best:.2g} to {worst:.2g} | {low:,.0f} to {high:,.0f} |")


if __name__ == "__main__":
    sys.exit(main())
