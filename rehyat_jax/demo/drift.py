"""Compares how long videos of the demo decay if they are sampled in either order.

Every model samples one video for each caption, many times as long as the videos of training: once with all steps for
the complete video (`--stream`), and once chunk by chunk. A classifier reads every frame. The command prints the share
of frames that show the caption's digit, by segments of 21 frames, with 95% intervals over the videos. OUT gets
drift.json with the shares by frame, and frames.png.

Options name the models, the length and the number of captions. Models that were not trained by chunk are measured too:
they show what that training is for. A model of few steps is sampled with its own steps, others with 25 and guidance 3.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.cli import CommandParser, print_message, report_input_errors
from rehyat_jax.demo.digits import CAPTIONS, FRAME_SIZE, NUM_FRAMES
from rehyat_jax.demo.judge import Judge
from rehyat_jax.demo.measure import solver_of
from rehyat_jax.errors import InputError
from rehyat_jax.evaluation.bootstrap import Estimate, Resampling
from rehyat_jax.evaluation.plots import save_plots
from rehyat_jax.evaluation.results import Curve, Evaluation
from rehyat_jax.files.json_files import write_json
from rehyat_jax.files.write import reported_write_errors
from rehyat_jax.generation.chunks import sample_by_chunk
from rehyat_jax.generation.codecs import SpaceToDepth
from rehyat_jax.generation.noise import host_noise
from rehyat_jax.generation.options import number
from rehyat_jax.generation.streaming import stream_latents
from rehyat_jax.generation.text_encoders import WordVectors
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.models.wan.streaming import check_causal
from rehyat_jax.weights.load import load_wan, read_model_metadata

ORDERS: dict[str, Callable[..., np.ndarray]] = {"video": stream_latents, "chunks": sample_by_chunk}


def frame_verdicts(
    model: WanTransformer, order: str, judge: Judge, *, captions: int, times: int, longest: int, solver: dict[str, Any]
) -> np.ndarray:
    """Samples long videos, and reads every frame.

    Args:
      model: causal hybrid attention in every block.
      order: a key of `ORDERS`.
      judge: the classifier.
      captions: number of videos, one for each of the first captions.
      times: length of the videos, as a multiple of 21 frames.
      longest: limit of positions, see `stream_latents`.
      solver: steps, guidance scale, flow shift and sampler.

    Returns:
      Boolean [captions, 21 * times]: True if the frame shows the caption's digit.
    """
    asked, codec, encoder = list(CAPTIONS)[:captions], SpaceToDepth(), WordVectors()
    noise = host_noise(0, captions, codec.latent_shape(times * NUM_FRAMES, FRAME_SIZE, FRAME_SIZE))
    texts = encoder(asked), encoder([""] * captions)
    latents = ORDERS[order](model, *texts, noise, longest=longest, progress=True, **solver)
    return judge.verdicts(codec.decode(latents), asked)["frame_accuracy"]


def compare_orders(checkpoints: list[Path], *, captions: int, times: int, longest: int) -> tuple[Evaluation, str]:
    """The shares by frame of every model in every order, and the Markdown table of shares by segment.

    Raises:
      InputError: a checkpoint cannot be read, is not the demo's, or is not causal in every block.
    """
    for path in checkpoints:
        config, metadata = read_model_metadata(path)
        if metadata["codec"] != "space_to_depth":
            raise InputError(f"{path}: expected a model of the demo, found one of codec {metadata['codec']!r}")
        check_causal(config, str(path))
    judge, resampling = Judge.fit(), Resampling(captions)
    by_frame: dict[str, Estimate] = {}
    solvers: dict[str, dict[str, Any]] = {}
    sizes = dict(captions=captions, times=times, longest=longest)
    rows = [
        f"| model | order | {' | '.join(f'{i * NUM_FRAMES + 1} to {(i + 1) * NUM_FRAMES}' for i in range(times))} |",
        "|---" * (times + 2) + "|",
    ]
    for path in checkpoints:
        model, solvers[str(path)] = load_wan(path), solver_of(path)
        for order in ORDERS:
            print_message(f"sampling {path} in the order of {order}")
            right = frame_verdicts(model, order, judge, solver=solvers[str(path)], **sizes)
            by_frame[f"{path}, {order}"] = resampling.mean(right.astype(float))
            segments = resampling.mean(right.reshape(captions, times, NUM_FRAMES).mean(2))
            rows.append(f"| {path} | {order} | {' | '.join(map(_shown, *_ends(segments)))} |")
    frames = list(range(1, times * NUM_FRAMES + 1))
    curve = Curve("frames that show the digit", "frame", "share of videos", frames, by_frame)
    about = {"captions": captions, "frames": len(frames), "longest": longest, "solvers": solvers}
    return Evaluation(about=about, curves={"frame_accuracy_by_frame": curve}), "\n".join(rows)


def _ends(segments: Estimate) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return segments.value, segments.low, segments.high


def _shown(value: float, low: float, high: float) -> str:
    return f"{value:.0%} ({100 * low:.0f} to {100 * high:.0f})"


def run(arguments: argparse.Namespace) -> None:
    """Runs the command. Raises InputError."""
    sizes = dict(captions=arguments.captions, times=arguments.times, longest=arguments.longest)
    with reported_write_errors(arguments.out):
        arguments.out.mkdir(parents=True, exist_ok=True)
    found, table = compare_orders(arguments.checkpoint, **sizes)
    write_json(arguments.out / "drift.json", found.to_json())
    save_plots(arguments.out, found)
    print(table)
    print_message(f"wrote {arguments.out}", result=True)


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and measures; returns the exit code, 2 if the user's input is wrong."""
    example = "--checkpoint runs/demo/finetune/model runs/demo/chunks/model --out runs/demo/drift"
    parser = CommandParser("demo.drift", __doc__, example)
    option = parser.add_argument
    option("--checkpoint", type=Path, nargs="+", required=True, metavar="DIR", help="students of the demo")
    option("--out", type=Path, required=True, metavar="FOLDER", help="folder of the results")
    option("--times", type=number(int, 1, 1000), default=10, help="length, in videos of training (default: 10)")
    option("--captions", type=number(int, 2, len(CAPTIONS)), default=len(CAPTIONS), help="videos (default: 20)")
    longest = f"positions stay below it, see docs/sampling.md (default: {NUM_FRAMES})"
    option("--longest", type=number(int, 3, 10**9), default=NUM_FRAMES, metavar="N", help=longest)
    arguments = parser.parse_args(argv)
    return report_input_errors(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
