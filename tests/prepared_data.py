"""Small folders of prepared examples."""

import numpy as np

from rehyat_jax.preparation.units import Hosts, Plan, prepare

SMALL, LARGE = (2, 4, 4, 16), (3, 4, 8, 16)


def example(number, shape=SMALL):
    """An example that says in all of its numbers which it is."""
    text = np.zeros((8, 64), np.float32)
    text[: 1 + number % 8] = number + 1
    return {"latents": np.full(shape, number, np.float32), "text": text}


def write_data_set(folder, examples, *, unit=4, codec="wan_vae", kind="examples", teacher=None):
    """Fills a folder with the given examples, `unit` to a shard; of codec "wan_vae" without a contact sheet."""

    def fill(writer, numbers, progress):
        for number in numbers:
            writer.add(examples[number], {"name": f"{number}.mp4", "caption": f"number {number}"})
            progress.update()

    plan = Plan(kind, codec, "word_vectors", {}, list(range(len(examples))), unit, teacher)
    prepare(folder, plan, fill, lambda: np.zeros_like(examples[0]["text"]), Hosts(), item="example")
    return folder


def flip_a_bit(shard, name):
    """Damages the record of one example in a shard."""
    content = bytearray(shard.read_bytes())
    content[content.index(f'"{name}'.encode().replace(b'"', b'\\"')) + 3] ^= 1
    shard.write_bytes(content)
