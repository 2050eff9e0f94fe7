"""Codecs, text encoders, the moving digits, the batch pipeline, and video files."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from videos import read_mp4

from rehyat_jax.data.pipeline import batches
from rehyat_jax.demo.digits import CAPTIONS, NUM_FRAMES, DigitVideos, load_scans, render
from rehyat_jax.errors import InputError
from rehyat_jax.files.mp4 import write_video
from rehyat_jax.files.write import written_whole
from rehyat_jax.generation.codecs import SpaceToDepth
from rehyat_jax.generation.opening import get_codec, get_text_encoder
from rehyat_jax.generation.text_encoders import WordVectors

# ---------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with written_whole(path) as temporary:
        temporary.write_text("old")
    assert path.read_text() == "old"
    with pytest.raises(KeyboardInterrupt), written_whole(path) as temporary:
        temporary.write_text("half of the ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


# --------------------------------------------------------------------------------------------------------------- codecs


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_space_to_depth_round_trip_gives_the_grey_video_back(array):
    grey = np.random.default_rng(0).uniform(size=(2, 3, 8, 12, 1)).astype(np.float32)
    video = array(grey.repeat(3, -1))
    latents = SpaceToDepth().encode(video)
    assert type(latents) is type(video) and latents.dtype == np.float32
    assert latents.shape[1:] == SpaceToDepth().latent_shape(3, 8, 12) == (3, 2, 3, 16)
    # Four float32 operations on values below 4: a few roundings of 2**-24 * 4.
    np.testing.assert_allclose(SpaceToDepth().decode(latents), video, atol=1e-6)


def test_space_to_depth_orders_channels_by_row_then_column():
    video = np.zeros((1, 1, 8, 12, 3), np.float32)
    video[0, 0, 5, 10] = 1
    frame, row, column, channel = np.argwhere(SpaceToDepth().encode(video)[0] > 0)[0]
    assert (frame, row, column, channel) == (0, 5 // 4, 10 // 4, 5 % 4 * 4 + 10 % 4)


def test_space_to_depth_decodes_into_the_range_of_pixels():
    video = SpaceToDepth().decode(np.linspace(-9, 9, 16, dtype=np.float32).reshape(1, 1, 1, 1, 16))
    assert video.min() == 0 and video.max() == 1


@pytest.mark.parametrize("size", [(1, 23, 24), (1, 24, 22), (0, 24, 24), (1, 0, 24)])
def test_space_to_depth_rejects_sizes_it_cannot_represent(size):
    with pytest.raises(InputError, match="multiples of 4"):
        SpaceToDepth().latent_shape(*size)


def test_codec_and_text_encoder_names():
    assert isinstance(get_codec("space_to_depth"), SpaceToDepth)
    assert isinstance(get_text_encoder("word_vectors"), WordVectors)
    for get, name in ((get_codec, "wan_vae"), (get_text_encoder, "umt5")):
        with pytest.raises(InputError, match=f"{name}.*give --models"):
            get(name)
    with pytest.raises(InputError, match="closest first: space_to_depth, wan_vae"):
        get_codec("space2depth")
    with pytest.raises(InputError, match="closest first: umt5, word_vectors"):
        get_text_encoder("t5")


# -------------------------------------------------------------------------------------------------------- text encoders


def test_word_vectors_are_zero_padded_and_the_empty_prompt_is_zero():
    embeddings = WordVectors()(["", "a Seven", "seven"])
    assert embeddings.shape == (3, 8, 64) and embeddings.dtype == np.float32
    assert not embeddings[0].any() and not embeddings[1, 2:].any()
    np.testing.assert_array_equal(embeddings[1, 1], embeddings[2, 0])


def test_word_vectors_never_change():
    # A trained model's vocabulary: these are the first 4 bytes of SHAKE-256("seven"), as `openssl dgst -shake256`
    # prints them, scaled to mean 0 and variance 1.
    first = WordVectors()(["seven"])[0, 0, 0]
    assert first == np.float32((int.from_bytes(bytes.fromhex("7dc09a05"), "little") / 2**32 - 0.5) * 12**0.5)


def test_word_vectors_of_different_words_are_nearly_orthogonal():
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vectors = np.stack([WordVectors()([word])[0, 0] for word in words])
    similarity = vectors @ vectors.T / 64
    # Independent entries of unit variance: a squared length varies by sqrt(0.8 / 64), an inner product by sqrt(1 / 64);
    # 4 standard deviations.
    np.testing.assert_allclose(similarity, np.eye(len(words)), atol=0.5)


def test_word_vectors_refuse_what_they_cannot_hold():
    with pytest.raises(InputError, match="at most 8 words, found 9"):
        WordVectors()(["one two three four five six seven eight nine"])
    with pytest.raises(ValueError, match="wrap it in a list"):
        WordVectors()("seven")


# -------------------------------------------------------------------------------------------------------- moving digits


def test_scans_are_enlarged_bilinearly():
    from sklearn.datasets import load_digits

    first = load_digits().images[1] / 16  # Scan 0 is the judge's.
    expected = scipy.ndimage.zoom(first, 2, order=1, mode="nearest", grid_mode=True)
    # float32 against float64.
    np.testing.assert_allclose(load_scans("train").images[0], expected, atol=1e-6)
    both = np.concatenate([load_scans("train").digits, load_scans("judge").digits])
    assert np.array_equal(np.bincount(both), np.bincount(load_digits().target))


def test_digits_are_placed_bilinearly_at_sub_pixel_positions():
    image = load_scans("judge").images[3]
    top, left = np.array([0.0, 2.3, 8.0]), np.array([8.0, 5.75, 0.4])
    padded = np.pad(image, ((0, 8), (0, 8)))
    expected = [
        scipy.ndimage.shift(padded, shift, order=1, mode="grid-constant") for shift in zip(top, left, strict=True)
    ]
    # float32 against float64.
    np.testing.assert_allclose(render(image, top, left), expected, atol=1e-6)


def test_judge_and_training_scans_are_disjoint_and_complete():
    train, judge = load_scans("train"), load_scans("judge")
    assert len(train.digits) == 1297 and len(judge.digits) == 500
    everything = np.concatenate([train.images, judge.images]).reshape(1797, -1)
    assert len(np.unique(everything, axis=0)) == 1797
    assert np.bincount(train.digits).min() >= 100 and np.bincount(judge.digits).min() >= 40


def test_digit_videos_are_a_function_of_index_and_seed():
    same, other = DigitVideos(seed=3), DigitVideos(seed=4)
    for index in (0, 5, 2**20 - 1):
        first, second = DigitVideos(seed=3)[index], same[index]
        assert first.keys() == {"latents", "text"}
        assert first["latents"].shape == (NUM_FRAMES, 6, 6, 16) and first["text"].shape == (8, 64)
        assert first["latents"].dtype == first["text"].dtype == np.float32
        np.testing.assert_array_equal(first["latents"], second["latents"])
        np.testing.assert_array_equal(first["text"], second["text"])
        assert (first["latents"] != other[index]["latents"]).any()
    assert (same[0]["latents"] != same[1]["latents"]).any()


def test_digit_videos_encode_their_draw():
    source = DigitVideos("judge", seed=1)
    video, caption = source.draw(7)
    np.testing.assert_array_equal(source[7]["text"], WordVectors()([caption])[0])
    # Encoding and decoding round a few times in float32.
    np.testing.assert_allclose(SpaceToDepth().decode(source[7]["latents"][None])[0, ..., 0], video, atol=1e-6)
    np.testing.assert_array_equal(source.null_text, WordVectors()([""])[0])


def test_digits_cross_from_edge_to_edge_along_the_captions_axis():
    source, starts = DigitVideos(seed=0), []
    for index in range(60):
        video, caption = source.draw(index)
        assert video.min() >= 0 and video.max() <= 1
        axis = 2 if CAPTIONS[caption][1] == "sideways" else 1
        along, across = np.moveaxis(video, axis, 2), np.moveaxis(video, axis, 1)
        # The digit is the same picture 8 pixels on, and it never moves across its axis.
        if along[0, :, 16:].any():
            along = along[::-1]
            starts.append((axis, "far"))
        else:
            starts.append((axis, "near"))
        np.testing.assert_allclose(along[0, :, :16], along[-1, :, 8:], atol=1e-6)  # float32 placement at other offsets
        assert not along[0, :, 16:].any() and not along[-1, :, :8].any()
        np.testing.assert_allclose(across[0].sum(0), across[-1].sum(0), rtol=1e-4, atol=1e-5)  # sums of 24 float32
    # Each of the four motions has probability 1/4: fewer than 5 of 60 has probability 0.0004.
    assert min(starts.count(motion) for motion in {(a, s) for a in (1, 2) for s in ("near", "far")}) >= 5


def test_latents_are_as_large_as_noise():
    latents = np.stack([DigitVideos()[index]["latents"] for index in range(200)])
    # Zero mean and unit variance up to the spread between sets of 200 scans.
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.1


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"rehyat-jax\[demo\]"):
        load_scans("train")


def test_missing_scans_are_named(monkeypatch, tmp_path):
    package = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package)
    with pytest.raises(InputError, match=r"digits\.csv\.gz: expected scikit-learn's scans .* --force-reinstall"):
        load_scans("train")


# ------------------------------------------------------------------------------------------------------------- pipeline


class Numbers:
    """Example i holds the number i, so that a batch tells which examples are in it."""

    kind, codec, text_encoder = "examples", "space_to_depth", "word_vectors"
    null_text = np.zeros((1, 1), np.float32)
    latents_shape = (1, 1, 1, 1)

    def __init__(self, length):
        self.length, self.buckets = length, [self]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"latents": np.full((1, 1, 1, 1), index, np.float32), "text": np.full((1, 1), index, np.float32)}


def take(iterator, count):
    """[count, B] example numbers of the next batches."""
    return np.stack([next(iterator)["latents"][:, 0, 0, 0, 0] for _ in range(count)]).astype(int)


def test_every_epoch_visits_every_example_in_a_new_order_and_never_ends():
    epochs = take(batches(Numbers(20), batch_size=5, seed=0), 12).reshape(3, 20)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(20), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_run_over_the_end_of_an_epoch():
    numbers = take(batches(Numbers(5), batch_size=3, seed=0), 5).reshape(-1)
    np.testing.assert_array_equal(np.bincount(numbers), [3] * 5)


def test_batches_depend_on_the_seed_alone():
    first = take(batches(Numbers(100), batch_size=4, seed=0), 8)
    np.testing.assert_array_equal(take(batches(Numbers(100), batch_size=4, seed=0), 8), first)
    assert (take(batches(Numbers(100), batch_size=4, seed=1), 8) != first).any()


def test_processes_parts_put_together_are_what_one_process_reads():
    whole = take(batches(Numbers(100), batch_size=6, seed=0), 10)
    parts = [take(batches(Numbers(100), batch_size=6, seed=0, part=part, parts=2), 10) for part in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_batches_that_are_accumulated_come_together():
    whole = take(batches(Numbers(100), batch_size=4, seed=0), 6).reshape(2, 3, 4)
    for part in (0, 1):
        iterator = batches(Numbers(100), batch_size=4, seed=0, accumulation_steps=3, part=part, parts=2)
        found = np.stack([next(iterator)["latents"][..., 0, 0, 0, 0] for _ in range(2)])
        np.testing.assert_array_equal(found, whole[:, :, 2 * part : 2 * part + 2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restored_iterator_continues_with_the_same_batches(workers):
    uninterrupted = take(batches(Numbers(50), batch_size=4, seed=1), 20)
    iterator = batches(Numbers(50), batch_size=4, seed=1, workers=workers)
    np.testing.assert_array_equal(take(iterator, 7), uninterrupted[:7])
    state = json.loads(json.dumps(iterator.get_state()))
    # Going on after the save must not move the saved position.
    np.testing.assert_array_equal(take(iterator, 3), uninterrupted[7:10])

    iterator.close()
    # Any number of workers goes on from there.
    restored = batches(Numbers(50), batch_size=4, seed=1)
    restored.set_state(state)
    np.testing.assert_array_equal(take(restored, 13), uninterrupted[7:])
    restored.close()


def test_batches_may_hold_a_single_example():
    numbers = take(batches(Numbers(5), batch_size=1, seed=0), 5)
    assert numbers.shape == (5, 1) and sorted(numbers.ravel()) == [0, 1, 2, 3, 4]


def test_batches_of_an_empty_source_are_refused():
    with pytest.raises(ValueError, match="at least one example"):
        batches(Numbers(0), batch_size=1, seed=0)


# ---------------------------------------------------------------------------------------------------------------- video


def smooth_video():
    """[9, 24, 24, 3] in [0, 1]: coloured ramps that drift, easy for a video format."""
    frame, row, column = np.meshgrid(np.arange(9), np.arange(24), np.arange(24), indexing="ij")
    return np.stack([row, column, frame * 2.5], -1) / 24


def test_a_video_file_shows_what_was_written(tmp_path):
    video = smooth_video()
    write_video(tmp_path / "new" / "a.mp4", video, fps=12, scale=4)
    frames, fps = read_mp4(tmp_path / "new" / "a.mp4")
    assert frames.shape == (9, 96, 96, 3) and fps == 12
    # Chroma is stored at half the resolution and everything is quantised: a few levels of 255.
    np.testing.assert_allclose(frames[:, 2::4, 2::4] / 255, video, atol=0.05)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.mp4"]


def test_odd_sizes_and_bytes_are_written(tmp_path):
    write_video(tmp_path / "a.mp4", np.full((3, 7, 17, 3), 200, np.uint8))
    frames, fps = read_mp4(tmp_path / "a.mp4")
    assert frames.shape == (3, 8, 18, 3) and fps == 16
    # A constant frame survives up to the rounding of its colour.
    np.testing.assert_allclose(frames.astype(float), 200, atol=3)


def test_float_pixels_are_clipped_not_wrapped(tmp_path):
    video = np.stack([np.full((16, 16, 3), -0.5), np.full((16, 16, 3), 1.5)]).astype(np.float32)
    write_video(tmp_path / "a.mp4", jnp.asarray(video, jnp.bfloat16))
    frames, _ = read_mp4(tmp_path / "a.mp4")
    # Black and white survive up to the rounding of their colour.
    assert frames[0].max() <= 3 and frames[1].min() >= 252


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((4, 8, 8)), "expected .frames, height, width, 3."),
        (np.zeros((0, 8, 8, 3)), "expected .frames, height, width, 3."),
        (np.zeros((4, 8, 8, 3), np.int32), "found int32"),
        (np.full((4, 8, 8, 3), np.nan), "NaN"),
    ],
)
def test_what_is_not_a_video_is_refused(tmp_path, video, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", video)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_video_alone(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(InputError, match=r"a\.mp4: could not be encoded \(.*Invalid argument"):
        write_video(tmp_path / "a.mp4", smooth_video(), fps=-1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"old"
