"""Traces of steps, and a TPU's trace beside static cycles."""

import contextlib
import types

import jax
import pytest
from tiny_runs import tiny_config

from rehyat_jax.benchmarks import trace_cycles
from rehyat_jax.cost_model.static_cycles import ProgramCost
from rehyat_jax.errors import InputError
from rehyat_jax.training.config import check_config
from rehyat_jax.training.profile import StepTrace

TPU_TRACE = """
planes { name: "/device:TPU:0"
  lines { name: "XLA Ops"
    events { metadata_id: 1 duration_ps: 3000000 }
    events { metadata_id: 1 duration_ps: 5000000 }
    events { metadata_id: 2 duration_ps: 1000000 }
  }
  lines { name: "XLA Modules" events { metadata_id: 3 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "%softmax_attend.1 = bf16[8]{0} custom-call(%q)" } }
  event_metadata { key: 2 value { id: 2 name: "fusion.7" } }
  event_metadata { key: 3 value { id: 3 name: "jit_step" } }
}
planes { name: "/host:CPU" lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 7 } }
  event_metadata { key: 1 value { id: 1 name: "fusion.7" } } }
"""


@pytest.fixture
def tpu_trace(tmp_path):
    file = tmp_path / "plugins" / "profile" / "1" / "host.xplane.pb"
    file.parent.mkdir(parents=True)
    file.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(TPU_TRACE))
    return tmp_path


def test_an_operations_static_cycles_lie_beside_its_time_in_the_trace(tpu_trace):
    seconds = trace_cycles.mean_seconds(tpu_trace)
    assert seconds == pytest.approx({"softmax_attend.1": 4e-6, "fusion.7": 1e-6})
    kernel = types.SimpleNamespace(name="softmax_attend.1", calls=30, cycles=90_000)
    fusion, other = (
        types.SimpleNamespace(name=name, source="mul", executions=2, estimated_cycles=500)
        for name in ("fusion.7", "fusion.8")
    )
    rows = trace_cycles.side_by_side(ProgramCost([kernel], [fusion, other]), seconds, clock=1e9)
    assert rows == [
        pytest.approx(("softmax_attend.1", "kernel", 30, 0.09, 0.12)),
        pytest.approx(("fusion.7", "mul", 2, 0.001, 0.002)),
    ]
    *_, total = trace_cycles.table(rows)
    assert total == "| all of these |  | 0.091 | 0.122 | 1.34 |  |"


def test_a_folder_without_a_tpus_trace_is_refused(tpu_trace, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(InputError, match=r"expected a trace, \*\.xplane\.pb, found none; see config.profile"):
        trace_cycles.mean_seconds(empty)
    file = next(tpu_trace.rglob("*.pb"))
    file.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace('planes { name: "/host:CPU" }'))
    with pytest.raises(InputError, match="expected the operations of a TPU, found none"):
        trace_cycles.mean_seconds(tpu_trace)


@pytest.mark.parametrize("first, traced", [(1, [2, 3]), (3, [3])], ids=["from its start", "resumed"])
def test_the_steps_of_a_trace_have_their_numbers(tmp_path, first, traced):
    step = jax.jit(lambda x: x + 1)
    with contextlib.closing(StepTrace((2, 3), tmp_path)) as trace:
        for number in range(first, 5):
            with trace.step(number):
                result = step(number)
            trace.after(number, result)
    (file,) = tmp_path.rglob("*.xplane.pb")
    events = [
        (event.name, dict(event.stats).get("step_num"))
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
    ]
    assert [number for name, number in events if name == "train"] == traced


@pytest.mark.parametrize("steps", [(3,), (3, 2), (1, 2, 3)])
def test_steps_of_a_trace_that_make_no_sense_are_refused(steps):
    config = tiny_config(stage="pretrain")
    config.profile = steps
    with pytest.raises(InputError, match=r"config.profile must be empty or the first and the last step"):
        check_config(config)
