"""Every variant compiles for TPU v5e, fits its chips, and has nothing in it that should not be.

Needs libtpu and no TPU. Each program takes minutes of one core, hence slow; what reads a compiled
program's text is tested on a small one, and what was recorded by its sense.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from reference import compile_tpu, cost_at_scale, tpu_program

from tinyvit_jax import mesh as meshes
from tinyvit_jax.models import cost

TOOL = Path(compile_tpu.__file__)
MARGIN = 1.03  # of the recorded cycles
CASES = [(name, chips) for name in compile_tpu.PLANS for chips in (4, 8)
         if not name.startswith("teacher")]
# Float32 by design: the classifier, whose logits the loss reads. And the gradients of attention
# scores, which are float32 as the scores are; the MXU rounds both to bfloat16 as it reads them.
FLOAT32 = {"head/dot_general", "head/dot_general [backward]",
           *(f"layers_{i}/attn/bhnd,bhmd->bhnm/dot_general [backward]" for i in (1, 2, 3))}
METRICS = 4096  # bytes: loss, accuracies, the finite test


def compile_case(name: str, chips: int) -> dict:
    """The tool's figures, from a process of its own: this one's jax has made up its mind."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install '.[tpu]'")
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    out = subprocess.run([sys.executable, str(TOOL), "--plan", name, "--chips", str(chips)],
                         env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-4000:]
    return json.loads(out.stdout.splitlines()[-1])


def exchanged_bytes(name: str) -> int:
    """At the most: every gradient in float32, and two statistics of BatchNorm in each direction.

    The gradients of the attention biases are added up as they are used, [h, N, N] for the h * N
    entries of a table: XLA adds over the chips what it has added over the batch.
    """
    plan = compile_tpu.PLANS[name]
    model = compile_tpu.make_model(compile_tpu.make_config(plan, 1))
    statistics = sum(x.size for x in jax.tree.leaves(model.variable_shapes()["batch_stats"]))
    biases = sum(depth * heads * window**4 for depth, heads, window in zip(
        model.depths[1:], model.num_heads[1:], model.window_sizes[1:], strict=True))
    return 4 * (cost.count_parameters(model) + 2 * statistics + biases) + METRICS


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chips"), CASES)
def test_program_for_tpu(name, chips):
    now = compile_case(name, chips)
    assert now["memory"]["peak"] < tpu_program.CHIP_BYTES
    assert set(now["float32_products"]) <= FLOAT32
    kinds = {kind.split()[0] for kind in now["collectives"]}
    assert kinds == ({"all-reduce"} if now["train"] else set())
    assert sum(part["bytes"] for part in now["collectives"].values()) <= exchanged_bytes(name)
    check_record(now)


def check_record(now: dict) -> None:
    """Fails where the compiler expects more cycles than it did; skips where it is another one."""
    rows = json.loads(compile_tpu.RECORD.read_text())
    before = compile_tpu.find_recorded(now, rows)
    again = f"python {TOOL.relative_to(TOOL.parents[2])} --record --plan {now['plan']} --chips " \
            f"{now['chips']}"
    if before is None:
        pytest.skip(f"no figures of this program are recorded; record them: {again}")
    if before["versions"] != now["versions"]:
        pytest.skip(f"recorded with {before['versions']}, here are {now['versions']}; all else is "
                    f"as it should be. Record anew: {again}")
    assert now["cycles"] <= MARGIN * before["cycles"], again
    assert now["memory"]["peak"] <= MARGIN * before["memory"]["peak"], again


TEXT = """HloModule jit_step, is_scheduled=true

%fused (p: bf16[8,4], q: f32[4,2]) -> bf16[8,2] {
  %p = bf16[8,4]{1,0} parameter(0)
  %q = f32[4,2]{1,0} parameter(1)
  ROOT %dot = bf16[8,2]{1,0} convolution(%p, %q), dim_labels=bf_io->bf, metadata={op_name="jit(step)/jvp(TinyViT)/layers_1/blocks_0/mlp/fc1/dot_general" stack_frame_id=1}
}

%body (s: (f32[2])) -> (f32[2]) {
  %s = (f32[2]{0}) parameter(0)
  %ar-start = f32[2]{0} all-reduce-start(%s), to_apply=%add
  %ar-done = f32[2]{0} all-reduce-done(%ar-start)
  ROOT %f = (f32[2]{0}) fusion(%ar-done), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/transpose(jvp(TinyViT))/TinyViT.features/layers_1/CheckpointMBConvblocks_1/bn/mul"}, backend_config={"window_config":{"estimated_cycles":"10"}}
}

%cond (t: (f32[2])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %three), direction=LT
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %w = (f32[2]{0}) while(%a), condition=%cond, body=%body
  %all-reduce.1 = (bf16[3,5]{1,0}, f32[]) all-reduce(%a, %a), to_apply=%add
  ROOT %fusion = f32[2]{0} fusion(%w), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/jvp(TinyViT)/head/add"}, backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_turn():
    assert tpu_program.count_cycles(TEXT) == 3 * 10 + 7
    with pytest.raises(ValueError, match="turns its text does not tell"):
        tpu_program.count_cycles(TEXT.replace("direction=LT", "direction=NE"))
    assert tpu_program.rank_cycles(TEXT) == [("layers_1/bn/mul [backward]", 30), ("head/add", 7)]


def test_collectives_are_counted_by_kind_and_type():
    assert tpu_program.count_collectives(TEXT) == {
        "all-reduce f32": {"count": 4, "bytes": 3 * 8 + 4},
        "all-reduce bf16": {"count": 1, "bytes": 30}}


def test_a_product_has_the_wider_type_of_its_inputs():
    assert tpu_program.find_products(TEXT) == {"f32": {"layers_1/mlp/fc1/dot_general": 1}}


def test_recorded_programs_are_known_and_fit():
    rows = json.loads(compile_tpu.RECORD.read_text())
    assert {row["plan"] for row in rows} <= set(compile_tpu.PLANS)
    for row in rows:
        assert row["memory"]["peak"] < tpu_program.CHIP_BYTES, row["plan"]
        assert row["cycles"] > 0


def test_record_replaces_the_same_program(tmp_path):
    file = tmp_path / "record.json"
    row = {"plan": "5m:train", "chips": 4, "rows": 64, "accumulate": 1, "remat": False}
    for cycles, rows in ((1, 64), (2, 64), (3, 32)):
        compile_tpu.record({**row, "rows": rows, "cycles": cycles}, file)
    assert [r["cycles"] for r in json.loads(file.read_text())] == [3, 2]


def test_cost_at_scale_adds_up():
    machine = cost_at_scale.Machine("two", 2, 100.0, {"5m": 50.0}, "made up")
    run = cost_at_scale.Run(images=360_000, epochs=2)
    first, whole = cost_at_scale.format_hours(run, [machine]).splitlines()[2:]
    # 720,000 views: one hour of the teacher on both, two of the student.
    assert [cell.strip() for cell in first.split("|")[4:9]] == ["1", "2", "3", "2", "1.5x"]
    assert [cell.strip() for cell in whole.split("|")[4:9]] == ["1", "2", "3", "3", "1.0x"]


def test_missing_figures_are_named(tmp_path):
    record = tmp_path / "record.json"
    record.write_text("[]")
    with pytest.raises(ValueError, match=r"lacks teacher:infer, 5m:train. Run compile_tpu.py"):
        cost_at_scale.read_tpu(record, 64, 200e9, ["5m"])


def test_the_real_update_is_traced():
    config = compile_tpu.make_config(compile_tpu.Plan("5m", "22k_distill", rows=2), chips=1)
    lowered = compile_tpu.lower_train(config, meshes.make_mesh())
    _, batch = lowered.args_info[0]
    assert batch["image"].shape == (2, 224, 224, 3)
    assert batch["prob"].shape == (2, 100)
    assert {str(x.dtype) for x in jax.tree.leaves(lowered.out_info)} == {"float32", "int32"}
