"""tools/check_sass.py: what it reads in a disassembly, and that it complains."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import check_sass
from check_sass import Rule

# A loop of whole vectors between an entry and an exit, as cuobjdump prints it: the encodings beside and below.
LISTING = """
Fatbin elf code:
================
arch = sm_90

	code for sm_90
		Function : double_kernel
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC.64 R2, c[0x0][0x220] ;                  /* 0x00008800ff027b82 */
                                                                               /* 0x000e240000000a00 */
        /*0010*/               @P0 EXIT ;                                      /* 0x000000000000094d */
        /*0020*/                   LDG.E.128.CONSTANT R16, desc[UR14][R2.64] ; /* 0x0000000e02107981 */
        /*0030*/                   DADD R56, R30, R56 ;                        /* 0x000000001e387229 */
        /*0040*/                   DADD R58, R68, R58 ;                        /* 0x00000000443a7229 */
        /*0050*/                   STG.E.128 desc[UR14][R4.64], R16 ;          /* 0x0000001004007986 */
        /*0060*/              @!P1 BRA 0x20 ;                                  /* 0x0000001000000947 */
        /*0070*/                   EXIT ;                                      /* 0x000000000000794d */
"""
RULE = Rule("double_kernel", "doubles", ("LDG.128", "STG.128"), ("I2F",), ratio=("DADD", 2))


def complaints_about(listing: str, rule: Rule = RULE) -> list[str]:
    """What the checker says about a listing."""
    return check_sass.complaints(check_sass.parse(listing.splitlines()), [rule])


def test_a_disassembly_is_read() -> None:
    (kernel,) = check_sass.parse(LISTING.splitlines())
    assert (kernel.architecture, kernel.name) == ("sm_90", "double_kernel")
    assert len(kernel.instructions) == 8
    assert kernel.instructions[1].opcode == "EXIT"
    assert kernel.instructions[6].target == 0x20
    assert list(kernel.loops()) == [Counter({"DADD": 2, "LDG.E.128.CONSTANT": 1, "STG.E.128": 1, "BRA": 1})]


def test_whole_vectors_pass() -> None:
    assert complaints_about(LISTING) == []


def test_a_narrow_load_and_local_memory_are_named_with_their_kernel() -> None:
    broken = LISTING.replace("LDG.E.128.CONSTANT", "LDG.E.64").replace("EXIT ;  ", "STL [R1+0x4], R0 ;")
    assert complaints_about(broken) == [
        "sm_90: double_kernel: STL, an access to local memory",
        "sm_90: double_kernel: no loop for doubles; the nearest: no LDG.128",
    ]


@pytest.mark.parametrize(
    ("line", "other", "complaint"),
    [
        ("STG.E.128 ", "STG.E ", "no STG.128"),
        ("LDC.64 R2, c[0x0][0x220]", "LDL.LU R2, [R1]", "LDL.LU, an access to local memory"),
        ("DADD R58, R68, R58", "I2F.F64 R58, R68", "I2F in it"),
        ("DADD R58, R68, R58", "DMUL R58, R68, R58", "not 2 DADD for each LDG.128"),
        ("@!P1 BRA 0x20 ", "@!P1 BRA 0x70 ", "there is no loop"),
        ("@!P1 BRA 0x20 ", "@!P1 BRA 0x30 ", "no LDG.128"),
    ],
)
def test_every_fault_is_found(line: str, other: str, complaint: str) -> None:
    assert line in LISTING
    (found,) = complaints_about(LISTING.replace(line, other))
    assert found.startswith("sm_90: double_kernel: ")
    assert found.endswith(complaint)


def test_each_architecture_is_looked_at() -> None:
    older = LISTING.replace("sm_90", "sm_80").replace("LDG.E.128", "LDG.E")
    assert complaints_about(LISTING + older) == ["sm_80: double_kernel: no loop for doubles; the nearest: no LDG.128"]


def test_a_rule_without_a_kernel_is_a_fault() -> None:
    assert complaints_about(LISTING, Rule("other_kernel", "doubles", ())) == ["other_kernel: no kernel has this name"]


@pytest.mark.parametrize(
    ("opcode", "pattern", "expected"),
    [
        ("LDG.E.128.CONSTANT", "LDG.128", True),
        ("LDG.E.64", "LDG.128", False),
        ("LDGSTS.E.128", "LDG.128", False),
        ("STG.E", "STG.32", True),
        ("STG.E.U16", "STG.32", False),
        ("F2F.F64.F32", "F2F.F64.F32", True),
        ("F2F.F32.F64", "F2F.F64.F32", False),
    ],
)
def test_an_opcode_matches_by_its_modifiers(opcode: str, pattern: str, expected: bool) -> None:
    assert check_sass.matches(opcode, pattern) is expected


def test_kernels_have_readable_names() -> None:
    name = (
        "void fastagg::cuda::encode_whole<(fastagg::Code)1, (fastagg::Rounding)0, fastagg::cuda::(anonymous "
        "namespace)::CastWork>(fastagg::cuda::(anonymous namespace)::CastWork)"
    )
    assert check_sass.readable(name) == "encode_whole<float32, nearest, CastWork>"
    assert check_sass.readable(name.replace("Code)1,", "Code)15,")).startswith("encode_whole<wire_int8,")


def test_a_build_without_kernels_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_sass.main([str(tmp_path)]) == 0
    assert "skipped" in capsys.readouterr().out
