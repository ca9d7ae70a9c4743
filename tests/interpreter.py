"""Triton's interpreter, a third faster."""

from triton.runtime import interpreter


def patch_once():
    """`triton.language` is put into the interpreter's form once, and stays so.

    The interpreter does so anew at every launch, and at every call of a function within a kernel:
    a third of the tests' time. Nothing here needs the language as it was, for where the interpreter
    is on, nothing is compiled in the same process.
    """
    patch, patched = interpreter._patch_lang, set()

    def once(function):
        module = function.__globals__["__name__"]
        if module not in patched:
            patched.add(module)
            patch(function)
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = once
