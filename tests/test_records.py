"""Prepared examples on disk: records, manifests, what is done about damaged ones, and batches of several shapes."""

import json

import ml_dtypes
import numpy as np
import pytest
from prepared_data import LARGE, SMALL, example, flip_a_bit, write_data_set
from safetensors.numpy import save, save_file

from rehyat_jax.data.pipeline import SKIPPED, batches
from rehyat_jax.data.prepared import PreparedExamples
from rehyat_jax.data.records import CorruptRecord, describe, pack, unpack
from rehyat_jax.errors import InputError

SHAPES = {"latents": (2, 4, 4, 16), "text": (8, 64)}


# -------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("number", [0, 3, 7])
def test_an_example_comes_back_from_its_record(dtype, number):
    wanted = {name: tensor.astype(dtype) for name, tensor in example(number).items()}
    record = pack(wanted, {"caption": "a séven", "name": "x.mp4"})
    found = unpack(record, SHAPES)
    for name, tensor in wanted.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], tensor.astype(np.float32))
    assert describe(record) == {"caption": "a séven", "name": "x.mp4"}
    # The zero vectors that pad the text are not stored.
    assert len(record) < sum(tensor.nbytes for tensor in wanted.values()) + 400 - (7 - number) * 64 * 2
    assert record == pack(wanted, {"name": "x.mp4", "caption": "a séven"})


def test_text_without_any_token_is_zeros():
    record = pack({**example(0), "text": np.zeros((8, 64), np.float32)}, {})
    np.testing.assert_array_equal(unpack(record, SHAPES)["text"], np.zeros((8, 64)))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"", "safetensors record"),
        (pack(example(0), {})[:-1], "safetensors record"),
        # A header that claims a petabyte is refused before anything is allocated.
        ((2**50).to_bytes(8, "little") + b"{}", "safetensors record"),
        (pack(example(0), {}).replace(b'"shape":[2,4,4,16]', b'"shape":[9,4,4,16]'), "safetensors record"),
        (pack(example(0, LARGE), {}), r"latents: expected shape \(2, 4, 4, 16\), found \(3, 4, 8, 16\)"),
        (pack({**example(0), "text": np.ones((9, 64), np.float32)}, {}), r"text: expected shape \(8, 64\), found"),
        (pack({**example(0), "text": np.ones((2, 32), np.float32)}, {}), r"text: expected shape \(8, 64\), found"),
        (save({**example(0), "latents": np.full(SMALL, np.nan, np.float32)}), "latents: expected finite"),
        (save({**example(0), "latents": np.zeros(SMALL, np.int32)}), "latents: expected one of F32, BF16, F16"),
        (save({"latents": np.zeros(SMALL, np.float32)}), r"expected the tensors \['latents', 'text'\], found"),
        (save({**example(0), "timestep": np.zeros(1, np.float32)}), "expected the tensors"),
    ],
)
def test_what_is_not_a_record_is_refused(record, message):
    with pytest.raises(CorruptRecord, match=message):
        unpack(record, SHAPES)


def test_nothing_that_is_not_finite_is_packed():
    with pytest.raises(CorruptRecord, match="text: expected finite"):
        pack({**example(0), "text": np.full((8, 64), np.inf, np.float32)}, {})


# ------------------------------------------------------------------------------------------------------------- manifest


def test_a_data_set_is_read_in_the_order_it_was_written(tmp_path):
    source = PreparedExamples(write_data_set(tmp_path, [example(n) for n in range(10)]))
    (bucket,) = source.buckets
    assert (
        len(source) == len(bucket) == 10
        and bucket.latents_shape == SMALL
        and len(list(tmp_path.glob("*.array_record"))) == 3
    )
    assert (source.kind, source.codec, source.text_encoder) == ("examples", "wan_vae", "word_vectors")
    for number in range(10):
        for name, tensor in example(number).items():
            np.testing.assert_array_equal(bucket[number][name], tensor)
        assert bucket.description(number) == {"name": f"{number}.mp4", "caption": f"number {number}"}


def change_manifest(folder, change):
    file = folder / "dataset.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def first_shard(manifest):
    return manifest["buckets"][0]["shards"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=2), "expected format_version 1, found 2"),
        (lambda m: m.update(kind="pictures"), "expected a kind of examples, trajectories, found 'pictures'"),
        (lambda m: m.update(codec=7), "expected codec to be a name"),
        (lambda m: m.update(buckets=[]), "expected buckets to be a list that is not empty"),
        (lambda m: m.update(bucketz=[]), "unknown field 'bucketz', the closest known one is 'buckets'"),
        (lambda m: m.pop("kind"), "field 'kind' is missing"),
        (lambda m: m["buckets"][0].update(latents_shape=[2, 4, 4]), "four positive numbers"),
        (lambda m: m["buckets"][0].update(latents_shape=[2**20, 2**20, 4, 4]), "four positive numbers"),
        (lambda m: m["buckets"].append(m["buckets"][0]), "every shard once, found one twice"),
        (lambda m: first_shard(m).update(file="../secret.array_record"), "in the same folder, found '../secret"),
        (lambda m: first_shard(m).update(file="/etc/passwd"), "in the same folder, found '/etc/passwd'"),
        (lambda m: first_shard(m).update(file=["x"]), "expected shards NAME"),
        (lambda m: first_shard(m).update(file="none.array_record"), "none.array_record: expected a shard .* found no"),
        (lambda m: first_shard(m).update(examples=True), "positive numbers of examples and bytes"),
        (lambda m: first_shard(m).update(examples=3), "000000-.*: expected 3 records.*found 4"),
        (lambda m: m["buckets"][0].update(latents_shape=[2, 4, 4, 8]), None),
    ],
)
def test_a_wrong_manifest_is_named(tmp_path, change, message):
    write_data_set(tmp_path, [example(n) for n in range(6)])
    change_manifest(tmp_path, change)
    if message:
        with pytest.raises(InputError, match=message):
            PreparedExamples(tmp_path)
    else:  # Only the records know.
        with pytest.raises(CorruptRecord, match=r"array_record: record 1: tensor latents: expected shape"):
            PreparedExamples(tmp_path).buckets[0][1]


def test_a_folder_that_is_not_a_data_set_is_named(tmp_path):
    with pytest.raises(InputError, match="missing: expected a folder"):
        PreparedExamples(tmp_path / "missing")
    with pytest.raises(InputError, match=r"dataset\.json: expected the manifest"):
        PreparedExamples(tmp_path)
    write_data_set(tmp_path, [example(0)])
    (tmp_path / "dataset.json").write_text('{"format_version": 1,')
    with pytest.raises(InputError, match=r"dataset\.json: is not JSON"):
        PreparedExamples(tmp_path)


def test_wrong_null_text_is_named(tmp_path):
    write_data_set(tmp_path, [example(0)])
    nan = np.full((8, 64), np.nan, np.float32)
    for tensors in ({"text": np.zeros(3, np.float32)}, {"text": nan}, {"text": np.zeros((8, 64))}, {"txt": np.ones(1)}):
        save_file(tensors, tmp_path / "null_text.safetensors")
        with pytest.raises(InputError, match=r"null_text\.safetensors: expected one tensor text"):
            PreparedExamples(tmp_path)
    (tmp_path / "null_text.safetensors").unlink()
    with pytest.raises(InputError, match=r"null_text\.safetensors: expected a safetensors file"):
        PreparedExamples(tmp_path)


def test_a_missing_or_truncated_shard_is_found_before_training_starts(tmp_path):
    write_data_set(tmp_path, [example(n) for n in range(10)])
    shard = sorted(tmp_path.glob("*.array_record"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=rf"000001-.*: expected a shard of {len(whole)} bytes.*found {len(whole) - 1}"):
        PreparedExamples(tmp_path)
    # As long as it should be, but its index is gone.
    shard.write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))
    with pytest.raises(InputError, match=r"000001-.*: expected an ArrayRecord file, found: "):
        PreparedExamples(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match=r"000001-.*: expected a shard of .* found no file"):
        PreparedExamples(tmp_path)


# ------------------------------------------------------------------------------------------------------ corrupt records


@pytest.fixture
def damaged(tmp_path):
    """(a folder of 12 examples, of which number 5 has a flipped bit; the same without)."""
    for name in ("whole", "damaged"):
        write_data_set(tmp_path / name, [example(n) for n in range(12)])
    flip_a_bit(tmp_path / "damaged" / "000001-2x4x4x16.array_record", "5.mp4")
    return tmp_path / "damaged", tmp_path / "whole"


def numbers_of(batch):
    """Which examples are in a batch."""
    return np.floor(batch["latents"][..., 0, 0, 0, 0]).astype(int)


def take(iterator, count):
    """[count, B] numbers of the examples of the next batches."""
    return np.stack([numbers_of(next(iterator)) for _ in range(count)])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_record_stops_the_run_and_is_named(damaged, workers):
    iterator = batches(PreparedExamples(damaged[0]), batch_size=4, seed=0, workers=workers)
    with pytest.raises(InputError, match=r"000001-2x4x4x16\.array_record: record 1: .*hash mismatch.*corrupt=skip"):
        take(iterator, 3)
    iterator.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_in_place_of_a_corrupt_record_comes_the_next_good_one(damaged, workers, capfd):
    whole = take(batches(PreparedExamples(damaged[1]), batch_size=4, seed=0), 7).reshape(-1)
    iterator = batches(PreparedExamples(damaged[0]), batch_size=4, seed=0, workers=workers, skip_corrupt=True)
    found = [next(iterator) for _ in range(6)]
    skipped = np.concatenate([batch[SKIPPED] for batch in found])
    # Two epochs: the rest is where it would be.
    expected = np.where(whole == 5, np.roll(whole, -1), whole)[:24]
    np.testing.assert_array_equal(np.concatenate([numbers_of(batch) for batch in found]), expected)
    np.testing.assert_array_equal(skipped, whole[:24] == 5)

    # Resumed in the middle of an epoch, by another number of workers.
    state = iterator.get_state()
    uninterrupted = take(iterator, 4)
    iterator.close()
    resumed = batches(PreparedExamples(damaged[0]), batch_size=4, seed=0, skip_corrupt=True)
    resumed.set_state(state)
    np.testing.assert_array_equal(take(resumed, 4), uninterrupted)
    resumed.close()
    told = capfd.readouterr().err
    assert "skipped a corrupt record" in told and "000001-2x4x4x16.array_record: record 1" in told


def test_nothing_but_corrupt_records_is_an_error(tmp_path):
    write_data_set(tmp_path, [example(0)])
    flip_a_bit(tmp_path / "000000-2x4x4x16.array_record", "0.mp4")
    with pytest.raises(InputError, match=r"all 1 records of .* are corrupt"):
        next(batches(PreparedExamples(tmp_path), batch_size=1, seed=0, skip_corrupt=True))


# -------------------------------------------------------------------------------------------------------------- buckets


@pytest.fixture
def mixed(tmp_path):
    """30 examples of a small and 10 of a large shape."""
    return write_data_set(tmp_path, [example(n, LARGE if n % 4 == 3 else SMALL) for n in range(40)], unit=16)


def shapes_of(iterator, count):
    return [next(iterator)["latents"].shape for _ in range(count)]


def test_every_batch_is_of_one_shape_and_shapes_take_turns_by_examples(mixed):
    source = PreparedExamples(mixed)
    assert [len(bucket) for bucket in source.buckets] == [30, 10]
    iterator = batches(source, batch_size=5, seed=0)
    found = [next(iterator) for _ in range(8)]
    assert [batch["latents"].shape[1:] for batch in found] == [SMALL, SMALL, SMALL, LARGE] * 2
    # One epoch of each.
    assert sorted(np.concatenate([numbers_of(batch) for batch in found])) == list(range(40))


def test_weights_change_how_often_a_shape_comes(mixed):
    source = PreparedExamples(mixed)
    shapes = shapes_of(batches(source, batch_size=2, seed=0, weights=(1, 3)), 8)
    assert shapes.count((2, *SMALL)) == 2 and shapes.count((2, *LARGE)) == 6
    assert set(shapes_of(batches(source, batch_size=2, seed=0, weights=(0, 1)), 8)) == {(2, *LARGE)}
    for wrong in ((1,), (1, 2, 3), (0, 0), (-1, 2)):
        with pytest.raises(InputError, match=r"config\.data\.weights: .*2x4x4x16, 3x4x8x16"):
            batches(source, batch_size=2, seed=0, weights=wrong)


def test_all_batches_of_an_update_are_of_one_shape(mixed):
    iterator = batches(PreparedExamples(mixed), batch_size=2, seed=0, accumulation_steps=3)
    assert shapes_of(iterator, 4) == [(3, 2, *SMALL)] * 3 + [(3, 2, *LARGE)]


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_and_workers_read_the_same_batches_and_resume_as_any_other_number_of_them(mixed, workers):
    source = PreparedExamples(mixed)
    whole = batches(source, batch_size=4, seed=3)
    expected = [next(whole) for _ in range(12)]
    parts = [batches(source, batch_size=4, seed=3, part=part, parts=2, workers=workers) for part in (0, 1)]
    for batch in expected[:5]:
        halves = [next(part) for part in parts]
        for name, tensor in batch.items():
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), tensor)
    states = [part.get_state() for part in parts]
    assert states[0] == states[1]
    for part in parts:
        part.close()
    # Two processes' run goes on in one, in the middle of an epoch.
    resumed = batches(source, batch_size=4, seed=3)
    resumed.set_state(states[0])
    for batch in expected[5:]:
        np.testing.assert_array_equal(next(resumed)["latents"], batch["latents"])
