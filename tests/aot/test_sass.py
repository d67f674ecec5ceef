"""Counting machine code, on a listing small enough to count by hand."""

import re

import pytest

from tests.aot.sass import Kernel, count, parse

# nvdisasm's form. Instructions 0 to 14 can be reached, the rest is the trap and the padding behind every kernel.
LISTING = """
\t.section\t.text.looping,"ax",@progbits
looping:
.text.looping:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P3 MOV R2, R3 ;
.L_x_outer:
        /*0020*/                   S2R R12, SR_TID.X ;
.L_x_main:
        /*0030*/                   LDG.E.128 R4, desc[UR16][R4.64] ;
        /*0040*/                   PRMT R5, R4, 0x40, R6 ;
        /*0050*/               @P2 BRA `(.L_x_aside) ;
.L_x_back:
        /*0060*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0070*/               @P1 BRA `(.L_x_main) ;
        /*0080*/                   STL [R1], R5 ;
.L_x_rest:
        /*0090*/                   FADD R5, R5, R6 ;
        /*00a0*/                   BRA.U !UP0, `(.L_x_rest) ;
        /*00b0*/               @P0 BRA `(.L_x_outer) ;
        /*00c0*/                   EXIT ;
.L_x_aside:
        /*00d0*/                   LDL.64 R6, [R1] ;
        /*00e0*/                   BRA `(.L_x_back) ;
.L_x_trap:
        /*00f0*/                   BRA `(.L_x_trap);
        /*0100*/                   NOP;
.L_x_end:
\t.section\t.text.straight,"ax",@progbits
straight:
.text.straight:
        /*0000*/                   MOV R1, R2 ;
        /*0010*/               @P0 EXIT ;
        /*0020*/                   FADD R1, R1, R2 ;
        /*0030*/                   EXIT ;
.L_x_trap2:
        /*0040*/                   BRA `(.L_x_trap2);
"""
REPORT = """
ptxas info    : Compiling entry function 'looping' for 'sm_90a'
ptxas info    : Function properties for looping
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 50 registers, used 1 barriers
ptxas info    : Compiling entry function 'straight' for 'sm_90a'
ptxas info    : Function properties for straight
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
"""


@pytest.fixture
def kernels() -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in parse(LISTING, REPORT)}


def test_the_hot_loop_has_its_moved_block_and_nothing_of_the_loops_around_and_after_it(kernels):
    main = ("LDG.E.128", "PRMT", "BRA", "HMMA.16816.F32.BF16", "BRA", "LDL.64", "BRA")
    assert kernels["looping"].hot == main
    assert sorted(kernels["looping"].loops) == [("FADD", "BRA.U"), main]


def test_a_kernel_without_a_loop_is_hot_as_a_whole(kernels):
    assert kernels["straight"].loops == ()
    assert kernels["straight"].hot == ("MOV", "EXIT", "FADD", "EXIT")


def test_the_trap_and_the_padding_are_no_code(kernels):
    assert len(kernels["looping"].code) == 15
    assert count(kernels["looping"].code, "NOP") == 0


def test_registers_spills_and_local_memory(kernels):
    assert (kernels["looping"].registers, kernels["looping"].spilled, kernels["looping"].local_memory) == (50, 12, 2)
    assert (kernels["straight"].registers, kernels["straight"].spilled, kernels["straight"].local_memory) == (10, 0, 0)


def test_between_two_loops_the_one_with_matrix_instructions_counts():
    text = LISTING.replace("FADD R5, R5, R6 ;", "FADD R5, R5, R6 ;\n" + "        /*0098*/   FMUL R5, R5, R6 ;\n" * 20)
    looping = parse(text, REPORT)[0]
    assert [len(loop) for loop in sorted(looping.loops)] == [22, 7]
    assert len(looping.hot) == 7
    without = parse(text.replace("HMMA.16816.F32.BF16", "FFMA"), REPORT)[0]
    assert len(without.hot) == 22


def test_what_is_not_understood_is_an_error():
    with pytest.raises(NotImplementedError, match="jump table"):
        parse(LISTING.replace("@P2 BRA `(.L_x_aside)", "BRX R4 -0x10"), REPORT)
    with pytest.raises(AssertionError, match="reported nothing about straight"):
        parse(LISTING, re.sub("'straight'", "'other'", REPORT))
