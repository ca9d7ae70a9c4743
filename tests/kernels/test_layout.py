"""Into how many programs a selection's work is cut."""

from __future__ import annotations

import pytest

from kernels.gpu.launch import MULTIPROCESSORS
from kernels.gpu.layout import PARTS, ROOM, Layout
from kernels.gpu.scan import REGISTERS, registers_for

THREADS, FILE = 32, 65536
"""Of a program; registers of a multiprocessor."""


def room(registers):
    """Programs that begin at once."""
    return MULTIPROCESSORS * (FILE // (THREADS * registers))


@pytest.mark.parametrize("programs", [1, 2112, 2113, 2772, 3072, 3300, 3301, 4224])
def test_a_scans_programs_begin_at_once_with_as_many_registers_as_that_leaves(programs):
    registers = registers_for(programs)
    assert room(registers) >= programs
    assert all(room(more) < programs for more in REGISTERS if more > registers)


def test_more_programs_than_that_have_the_fewest():
    assert registers_for(ROOM) == registers_for(ROOM + 1) == min(REGISTERS)


@pytest.mark.parametrize(("lines", "pages", "expected"), [(8, 128, 32), (256, 128, 16)])
def test_few_lines_share_what_they_meet_among_many_programs(lines, pages, expected):
    layout = Layout(lines, 8, 4, 128, pages)
    assert layout.spans * layout.parts == expected <= PARTS


def test_a_line_of_many_programs_has_one_for_what_each_meets():
    layout = Layout(256, 8, 4, 128, 512)
    assert layout.spans == 16 and layout.parts == 1
