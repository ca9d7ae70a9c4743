"""Triton's interpreter, without a GPU: a third faster, and with less to do."""

from contextlib import contextmanager

import pytest


def patch_once():
    """`triton.language` is put into the interpreter's form once, and stays so.

    The interpreter does so anew at every launch, and at every call of a function within a kernel:
    a third of the tests' time. Nothing here needs the language as it was, for where the interpreter
    is on, nothing is compiled in the same process.
    """
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def once(function):
        module = function.__globals__["__name__"]
        if module not in patched:
            patched.add(module)
            patch(function)
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = once


@contextmanager
def programs(spans, parts):
    """Triton's selection shares a line among so many programs at most, and what they meet again.

    Its interpreter takes one program after the other. And a program's way from one piece of its
    work to the next shows only where it has several.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.gpu.layout.SPANS", spans)
        patch.setattr("kernels.gpu.layout.PARTS", spans * parts)
        patch.setattr("kernels.gpu.launch.PROGRAMS", 16)
        patch.setattr("kernels.gpu.attend.RESIDENT", 16)
        yield
