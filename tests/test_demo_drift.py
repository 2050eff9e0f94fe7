"""The command that compares how long videos of the demo decay in both orders."""

import itertools
import json

import numpy as np
import pytest
from tiny_runs import tiny_model

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.demo import drift, measure
from rehyat_jax.demo.digits import CAPTIONS, DigitVideos
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.weights import save_model

SMALL = WAN_PRESETS["tiny"].replace(num_layers=1, ffn_dim=16, num_heads=1, head_dim=12)
STUDENT = SMALL.replace(hybrid_blocks="all", hybrid=HybridConfig(feature_map=FeatureMapConfig(features=16)))


def saved(path, config=STUDENT, codec="space_to_depth"):
    save_model(path, config, tiny_model(config)[1], codec=codec, text_encoder="word_vectors")
    return path


def real_latents(count):
    """A video of digits for each of the first captions, [count, 21, 6, 6, 16]."""
    source, found = DigitVideos("judge"), {}
    for index in itertools.count():
        found.setdefault(source.draw(index).caption, index)
        if len(found) == len(CAPTIONS):
            return np.stack([source[found[caption]]["latents"] for caption in list(CAPTIONS)[:count]])


def drift_of(tmp_path, *checkpoints):
    given = ["--checkpoint", *map(str, checkpoints), "--out", str(tmp_path / "out"), "--captions", "4", "--times", "2"]
    return drift.main(given)


def test_the_table_has_the_share_of_right_frames_of_every_segment(tmp_path, monkeypatch, capsys):
    latents, asked = real_latents(4), {}
    empty = np.full_like(latents, -0.52)  # black

    def sampler(order, *halves):
        def sample(model, text, negative_text, noise, **how):
            asked[order] = noise.shape, how["longest"]
            return np.concatenate(halves, axis=1)

        return sample

    monkeypatch.setitem(drift.ORDERS, "video", sampler("video", latents, empty))
    monkeypatch.setitem(drift.ORDERS, "chunks", sampler("chunks", latents, latents[:, ::-1]))
    student = saved(tmp_path / "student")
    assert drift_of(tmp_path, student) == 0
    assert asked == dict.fromkeys(("video", "chunks"), ((4, 42, 6, 6, 16), 21))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model | order | 1 to 21 | 22 to 42 |"
    shares = [[int(cell.split("%")[0]) for cell in line.split("|")[3:5]] for line in lines[2:4]]
    # The judge reads 97.9% of real frames right.
    assert shares[0][0] > 90 and shares[0][1] == 0 and shares[1][0] == shares[1][1] == shares[0][0]
    curve = json.loads((tmp_path / "out/drift.json").read_text())["curves"]["frame_accuracy_by_frame"]
    by_frame = curve["series"][f"{student}, video"]["value"]
    assert len(by_frame) == 42 and not any(by_frame[21:])
    assert (tmp_path / "out/frames.png").stat().st_size > 1000


def test_both_orders_sample_the_length_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(measure.SOLVER, "steps", 1)
    assert drift_of(tmp_path, saved(tmp_path / "student")) == 0
    curve = json.loads((tmp_path / "out/drift.json").read_text())["curves"]["frame_accuracy_by_frame"]
    assert [len(series["value"]) for series in curve["series"].values()] == [42, 42]


@pytest.mark.parametrize(
    ("config", "codec", "message"),
    [
        (STUDENT, "wan_vae", "model: expected a model of the demo, found one of codec 'wan_vae'"),
        (SMALL, "space_to_depth", "model: expected causal hybrid attention in every block"),
    ],
)
def test_other_models_are_refused_before_sampling(config, codec, message, tmp_path, capsys):
    assert drift_of(tmp_path, saved(tmp_path / "model", config, codec)) == 2
    assert message in capsys.readouterr().err
