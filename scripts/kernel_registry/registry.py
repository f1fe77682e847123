"""The form in which kernels are listed for compiling ahead of time.

A `KernelSpec` names a kernel and lists every variant of it that may be launched, so that each can be compiled without
a GPU, and its spills and shared memory read, before anybody runs it.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class KernelVariant(NamedTuple):
    """One specialisation of a kernel.

    name: what is switched on in it, for reports, e.g. "elu, lrpe, mask".
    types: type of each pointer and float parameter, e.g. {"query_ptr": "*bf16", "eps": "fp32"}; parameters that are
        neither here nor in constexprs are integers (sizes and strides).
    constexprs: value of each constexpr parameter, and None for each pointer that is not passed.
    options: num_warps and num_stages.
    """

    name: str
    types: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]


class KernelSpec(NamedTuple):
    """A kernel and the function that lists its variants for a target ("sm_90"), a dtype ("bf16") and a head_dim."""

    name: str
    function: Any  # a triton.JITFunction
    variants: Callable[[str, str, int], Iterator[KernelVariant]]


class CompileArguments(NamedTuple):
    """What `triton.compiler.ASTSource` takes."""

    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]


def make_variant(
    kernel: Any, name: str, types: dict[str, str | None], constexprs: dict[str, Any], options: dict[str, int]
) -> KernelVariant:
    """A variant from more types and constexprs than the kernel has; a pointer of type None is not passed."""
    names = set(kernel.arg_names)
    absent = {argument: None for argument, type_ in types.items() if argument in names and type_ is None}
    return KernelVariant(
        name,
        {argument: type_ for argument, type_ in types.items() if argument in names and type_ is not None},
        {argument: value for argument, value in constexprs.items() if argument in names} | absent,
        options,
    )


def compile_arguments(spec: KernelSpec, variant: KernelVariant) -> CompileArguments:
    """Signature, constants and attributes of a variant, as the run time would specialise it.

    Pointers are multiples of 16, and so are the strides of whole rows; sizes are not, and nothing is known of what a
    kernel does not specialise.
    """
    unknown = set(getattr(spec.function, "do_not_specialize", ()))
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(spec.function.arg_names):
        if name in variant.constexprs:
            signature[name] = "constexpr"
            continue
        signature[name] = variant.types.get(name, "i32")
        if signature[name].startswith("*") or ("stride" in name and name not in unknown):
            attrs[(index,)] = [["tt.divisibility", 16]]
    return CompileArguments(signature, dict(variant.constexprs), attrs)
