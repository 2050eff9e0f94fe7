"""What the compiler is told, for chips that are not there, and where its programs are kept."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from rehyat_jax.parallel.compile_cache import keep_compiled_programs
from rehyat_jax.training.compiler_options import compiler_options


@pytest.mark.parametrize(
    ("kind", "platform", "kib"),
    [
        ("TPU v5 lite", "tpu", 57344),
        ("TPU v6 lite", "tpu", 57344),
        ("TPU v5p", "tpu", 28672),
        ("TPU v4", "tpu", None),  # 16 MiB in all
        ("TPU of tomorrow", "tpu", None),
        ("cpu", "cpu", None),
    ],
)
def test_products_are_given_more_memory_where_there_is_more(kind, platform, kib):
    device = AbstractDevice(kind, None, platform) if platform != "cpu" else None
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("chip",), abstract_device=device)):
        assert compiler_options() == ({} if kib is None else {"xla_tpu_scoped_vmem_limit_kib": str(kib)})


@pytest.mark.parametrize(
    ("platform", "chosen", "folder"),
    [("tpu", None, "/caches/rehyat_jax/compiled"), ("tpu", "/mine", "/mine"), ("cpu", None, None)],
)
def test_compiled_programs_are_kept_on_disk_unless_on_a_cpu_or_elsewhere(monkeypatch, platform, chosen, folder):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    try:
        jax.config.update("jax_compilation_cache_dir", chosen)
        keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir == folder
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
