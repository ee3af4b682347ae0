"""`bench device` without a card: its files, its limits, and how instructions are counted."""

import json

import pytest

from jax_entropy.attention.blocks import blocks_for
from jax_entropy.bench import device, kernels
from jax_entropy.bench.blocks import bench_blocks
from jax_entropy.bench.device import bench_device, markdown
from jax_entropy.chips import CHIPS
from jax_entropy.errors import UserError
from tests import REPOSITORY


def test_a_part_is_measured_in_a_process_of_its_own_and_written_down(tmp_path):
    told = []
    result = bench_device(tmp_path, parts=["versions"], minutes=5, notify=told.append)
    assert json.loads((tmp_path / "device.json").read_text()) == json.loads(json.dumps(result))
    (row,) = result["parts"]["versions"]["rows"]
    assert row["platform"] == "cpu" and row["jax"]
    assert result["parts"]["versions"]["ended"] == "complete"
    page = (tmp_path / "device.md").read_text()
    assert f"| {row['device']} |" in page and page == markdown(result)
    assert [line.partition(":")[0] for line in told] == ["versions", "versions"]


def test_every_row_is_on_disk_when_its_part_is_cut_off(tmp_path, monkeypatch):
    """Parts that take their time after the first row: each ends at its limit, and the others have theirs."""
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho '{\"part\": \"'$3'\"}'\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(device.sys, "executable", str(slow))
    bench_device(tmp_path, parts=["step", "memory"], minutes=0.1, notify=lambda line: None)
    parts = json.loads((tmp_path / "device.json").read_text())["parts"]
    assert {name: (part["rows"], part["ended"]) for name, part in parts.items()} == {
        "step": ([{"part": "step"}], "out of time"),
        "memory": ([{"part": "memory"}], "out of time"),
    }


def test_a_part_that_fails_says_why_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    result = bench_device(tmp_path, parts=["versions"], minutes=1, notify=lambda line: None)
    assert "failed with code 1" in result["parts"]["versions"]["ended"]
    assert "nonsense" in result["parts"]["versions"]["ended"]


def test_what_cannot_be_measured_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no part 'stp'; did you mean 'step'"):
        bench_device(tmp_path, parts=["stp"])
    with pytest.raises(UserError, match="minutes=0 must be above 0"):
        bench_device(tmp_path, minutes=0)


def test_tiles_are_measured_on_a_gpu_only():
    with pytest.raises(UserError, match="no kernels with tiles for this cpu"):
        next(bench_blocks(lambda line: None))


@pytest.mark.parametrize("name", kernels.TARGETS)
def test_every_tile_is_compiled_ahead_of_time(name):
    asked = [p for p in kernels.programs() if p.implementation == name]
    compiled = [blocks_for(name, CHIPS[p.chip].kind, p.dtype, p.H, p.S) for p in asked]
    written = json.loads((REPOSITORY / "jax_entropy/attention/blocks.json").read_text())[name]
    assert all({kernel: row[kernel] for kernel in ("forward", "dq", "dkv")} in compiled for row in written)


LISTING = """
.L_x_1:
        /*0010*/                   FADD R1, R2, R3 ;
        /*0020*/               @P0 BRA `(.L_x_2) ;
        /*0030*/                   FSEL R1, R2, R3 ;
        /*0040*/                   FSEL R1, R2, R3 ;
.L_x_2:
EXPONENTIALS
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""


def test_instructions_are_those_of_the_shortest_way_round_a_loop():
    code = LISTING.replace("EXPONENTIALS", "\n".join(f"        /*{i:04x}*/ MUFU.EX2 R1, R2 ;" for i in range(80, 92)))
    assert list(kernels._loops(code)) == [(15, 12)]
