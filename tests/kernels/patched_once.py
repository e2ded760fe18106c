"""Importing this makes Triton's interpreter call functions of a kernel about twice as fast.

For every call of one jitted function by another, the interpreter searches the whole of `triton.language` for what it has to replace,
although the launch of the kernel has replaced it already. Here it looks only whether that was done.
"""

import inspect

import triton.language as tl
from triton.runtime import interpreter

_search = interpreter._patch_lang


def _patch_once(fn):
    modules = [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
    if not modules or any(tl.core.is_builtin(module.load) for module in modules):
        return _search(fn)
    return interpreter._LangPatchScope()  # nothing to put back: the launch does that


if hasattr(interpreter, "_LangPatchScope"):  # older versions have other ways
    interpreter._patch_lang = _patch_once
