"""Elementwise PyTorch functions as Triton source: the definition of a terminal stays in one place, and the GPU runs it.

`trace` turns a function of same-shaped tensors into a graph of primitive operations, `split` separates what depends on
per-head coefficients alone, and `emit` writes a graph as lines of Triton, float32 throughout. The lines call `reciprocal`, `logarithm`
and `exponential` of `kernels.tiles`, because exactly rounded ones cost many instructions more.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, fx

Value = Any  # the Triton expression of a node: a variable's name, a literal, or a list of them


def trace(function: Callable, inputs: int) -> fx.GraphModule:
    """The graph of `function(*tensors) -> list of tensors`, all float32 of one shape, without dead or repeated work."""
    from torch.fx.experimental.proxy_tensor import make_fx  # imported late: it loads the compiler's front end

    examples = [torch.full((3,), 0.5) for _ in range(inputs)]
    # without overwritten values, whose clones would be merged with those of their neighbours
    traced = make_fx(torch.func.functionalize(function, remove="mutations"), decomposition_table=_decompositions())
    with ThreadPoolExecutor(1) as alone:  # hooks and modes of autograd that the caller has set are those of its thread
        module = alone.submit(traced, *examples).result()
    _merge_equal(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


@functools.cache
def _decompositions() -> dict[Any, Callable]:
    """How operations become primitive ones; making the table takes longer than tracing a small function."""
    from torch._decomp import core_aten_decompositions  # imported late, too

    lists = (torch.ops.aten.stack.default, torch.ops.aten.unbind.int)
    return {name: rule for name, rule in core_aten_decompositions().items() if name not in lists}


def _merge_equal(graph: fx.Graph) -> None:
    """Let equal operations on equal inputs be one node, so that a constant of a head is handed over once."""
    known: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            first = known.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
            if first is not node:
                node.replace_all_uses_with(first)


def split(module: fx.GraphModule, coefficients: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Separate a graph whose last `coefficients` inputs are per-head constants: (prelude, body).

    prelude(*coefficients) -> list of derived constants; body(*other inputs, *derived constants) -> the outputs.
    """
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    constant = set(places[len(places) - coefficients :])
    for node in module.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and all(source in constant for source in node.all_input_nodes):
            constant.add(node)
    handed = [node for node in module.graph.nodes if node in constant and any(user not in constant for user in node.users)]

    prelude, copies = fx.Graph(), {}
    for node in module.graph.nodes:
        if node in constant:
            copies[node] = prelude.node_copy(node, copies.__getitem__)
    prelude.output([copies[node] for node in handed])

    body, copies = fx.Graph(), {}
    for node in places:
        if node not in constant:
            copies[node] = body.node_copy(node)
    for node in handed:
        copies[node] = body.placeholder(f"constant_{node.name}")
    for node in module.graph.nodes:
        if node.op != "placeholder" and node not in constant:
            copies[node] = body.node_copy(node, copies.__getitem__)
    graphs = (fx.GraphModule(module, prelude), fx.GraphModule(module, body))
    for graph in graphs:
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return graphs


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    value = float(value)
    if math.isinf(value) or math.isnan(value):
        return f'float("{value}")'
    return repr(value)


def _binary(symbol: str) -> Callable[..., str]:
    return lambda a, b: f"({a} {symbol} {b})"


def _clamp(x: str, low: str | None = None, high: str | None = None) -> str:
    if low is not None and low != "None":
        x = f"tl.maximum({x}, {low})"
    return x if high is None or high == "None" else f"tl.minimum({x}, {high})"


def _pow(x: str, exponent: str) -> str:
    known = {
        "2.0": f"({x} * {x})",
        "3.0": f"({x} * {x} * {x})",
        "-1.0": f"reciprocal({x})",
        "0.5": f"tl.sqrt({x})",
        "-0.5": f"(1.0 / tl.sqrt({x}))",
    }
    return known[exponent]


# Near zero exp(x) - 1 loses its digits, so it takes a series there. tanh keeps its absolute accuracy, which is all a bias needs.
EXPM1 = (
    "tl.where(tl.abs({x}) < 0.1, {x} * (1.0 + {x} * (0.5 + {x} * (1.0 / 6 + {x} * (1.0 / 24 + {x} * (1.0 / 120 + {x} / 720))))), "
    "exponential({x}) - 1.0)"
)


def _divide(a: str, b: str) -> str:
    try:
        return f"({a} * {_number(1 / float(b))})"
    except (ValueError, ZeroDivisionError):
        return f"({a} * reciprocal({b}))"


def _power(factor: float, x: str, known: dict[str, str]) -> str:
    """e ** (factor * x); a constant factor of x joins the other one."""
    definition = next((expression for expression, name in known.items() if name == x), "")
    scaled = re.fullmatch(r"\((\w+) \* (-?[\d.e+-]+)\)", definition)
    x, factor = (scaled[1], factor * float(scaled[2])) if scaled else (x, factor)
    return f"power2({x} * {factor * math.log2(math.e)!r})"


# Rules that look at how their argument was made.
_POWERS: dict[str, Callable[..., str]] = {
    "exp": lambda a, known: _power(1.0, a, known),
    "tanh": lambda a, known: f"(1.0 - 2.0 * reciprocal(1.0 + {_power(2.0, a, known)}))",
}
_RULES: dict[str, Callable[..., str]] = {
    "add": _binary("+"),
    "sub": _binary("-"),
    "rsub": lambda a, b: f"({b} - {a})",
    "mul": _binary("*"),
    "div": _divide,
    "gt": _binary(">"),
    "ge": _binary(">="),
    "lt": _binary("<"),
    "le": _binary("<="),
    "eq": _binary("=="),
    "ne": _binary("!="),
    "logical_and": _binary("&"),
    "bitwise_and": _binary("&"),
    "logical_or": _binary("|"),
    "bitwise_or": _binary("|"),
    "logical_not": lambda a: f"({a} == 0)",
    "bitwise_not": lambda a: f"({a} == 0)",
    "neg": lambda a: f"(-{a})",
    "abs": lambda a: f"tl.abs({a})",
    "sign": lambda a: f"tl.where({a} > 0, 1.0, tl.where({a} < 0, -1.0, 0.0))",
    "expm1": lambda a: EXPM1.format(x=a),
    "log": lambda a: f"logarithm({a})",
    "log1p": lambda a: f"logarithm(1.0 + {a})",
    "sqrt": lambda a: f"tl.sqrt({a})",
    "rsqrt": lambda a: f"(1.0 / tl.sqrt({a}))",
    "reciprocal": lambda a: f"reciprocal({a})",
    "sigmoid": lambda a: f"reciprocal(1.0 + exponential(-{a}))",
    "pow": _pow,
    "minimum": lambda a, b: f"tl.minimum({a}, {b})",
    "maximum": lambda a, b: f"tl.maximum({a}, {b})",
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda a, high: f"tl.minimum({a}, {high})",
    "where": lambda c, a, b: f"tl.where({c}, {a}, {b})",
    "masked_fill": lambda a, mask, value: f"tl.where({mask}, {value}, {a})",
    "sigmoid_backward": lambda g, y: f"({g} * {y} * (1.0 - {y}))",
    "tanh_backward": lambda g, y: f"({g} * (1.0 - {y} * {y}))",
    "zeros_like": lambda *_: "0.0",
    "ones_like": lambda *_: "1.0",
    "full_like": lambda _, value, *rest: value,
    "scalar_tensor": lambda value, *rest: value,
    "full": lambda _, value, *rest: value,
}
_LITERALS = {"zeros_like", "ones_like", "full_like", "scalar_tensor", "full"}
_SAME = {"alias", "detach", "clone", "lift_fresh_copy", "_to_copy", "view", "expand", "squeeze", "unsqueeze"}


def _operation(node: fx.Node) -> str:
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "overloadpacket", target).__name__
    return name


def emit(module: fx.GraphModule, inputs: Sequence[str], prefix: str) -> tuple[list[str], list[str]]:
    """Lines of Triton that compute the graph, and the expression of each of its outputs.

    inputs: an expression per placeholder. prefix: start of the names of new variables. Equal operations are computed once.
    Raises NotImplementedError for an operation that has no Triton form here.
    """
    values: dict[fx.Node, Value] = {}
    known: dict[str, str] = {}
    lines: list[str] = []
    names = iter(inputs)

    def resolve(argument: Any) -> Value:
        if isinstance(argument, fx.Node):
            return values[argument]
        if isinstance(argument, (list, tuple)):
            return [resolve(item) for item in argument]
        return _number(argument) if isinstance(argument, (int, float)) else str(argument)

    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(names)
        elif node.op == "get_attr":
            values[node] = _number(getattr(module, node.target).item())
        elif node.op == "output":
            return lines, [resolve(argument) for argument in _flat(node.args[0])]
        else:
            values[node] = _call(node, [resolve(argument) for argument in node.args], lines, known, prefix)
    raise AssertionError("a graph ends with its output")


def _flat(arguments: Any) -> Iterable[Any]:
    return arguments if isinstance(arguments, (list, tuple)) else [arguments]


def _call(node: fx.Node, arguments: list[Value], lines: list[str], known: dict[str, str], prefix: str) -> Value:
    name = _operation(node)
    if name in _SAME:
        return arguments[0]
    if name in ("stack", "unbind"):  # the only lists are the slots of a ring, put together and taken apart
        return arguments[0]
    if name == "getitem":
        return arguments[0][node.args[1]]
    if name in ("select", "select_copy"):
        return arguments[0][node.args[2]]
    if name in ("add", "sub") and node.kwargs.get("alpha", 1) != 1:
        arguments[1] = f"({_number(node.kwargs['alpha'])} * {arguments[1]})"
    if name not in _RULES and name not in _POWERS:
        raise NotImplementedError(f"no Triton form of {node.target}")
    expression = _RULES[name](*arguments) if name in _RULES else _POWERS[name](*arguments, known)
    if name in _LITERALS:
        return expression
    if expression not in known:
        known[expression] = f"{prefix}{len(known)}"
        lines.append(f"{known[expression]} = {expression}")
    return known[expression]


def derivative(body: fx.GraphModule, fixed: int, inputs: int, outputs: int) -> fx.GraphModule:
    """The graph of the vector-Jacobian product of `body` with respect to its inputs from number `fixed` on.

    Takes the `inputs` inputs of the body and one cotangent per output; returns one gradient per differentiated input.
    """

    def product(*tensors: Tensor) -> list[Tensor]:
        held, moved, cotangents = tensors[:fixed], tensors[fixed:inputs], tensors[inputs:]
        pull: Any = torch.func.vjp(lambda *moving: tuple(body(*held, *moving)), *moved)[1]
        return list(pull(tuple(cotangents)))

    return trace(product, inputs + outputs)


def kernel_text(name: str, arguments: str, lines: Iterable[str]) -> list[str]:
    """The source lines of a Triton kernel."""
    return ["", "@triton.jit", f"def {name}({arguments}):", *(f"    {line}" for line in lines)]


def finish_text(constants: int, derived: Sequence[str], lines: Iterable[str], gradients: Iterable[str]) -> list[str]:
    """The kernel `finish`: one program per head sums the partial gradients of the derived constants and pulls them back.

    derived: their names; lines and gradients: the emitted adjoint of the prelude in terms of r0, r1, ... (the `constants`
    parameters) and d<name>. Partial gradients are [P, B * H, blocks], parameters [C, H].
    """
    body = [
        "head = tl.program_id(0)",
        *(f"r{i} = tl.load(constant_ptr + {i} * heads + head)" for i in range(constants)),
        "items = batch * blocks",
        *(f"d{name} = 0.0" for name in derived),
        "for begin in range(0, items, BLOCK):",
        "    item = begin + tl.arange(0, BLOCK)",
        "    place = (item // blocks * heads + head) * blocks + item % blocks",
        *(
            f"    d{name} += tl.sum(tl.load(gh_ptr + {i} * items * heads + place, mask=item < items, other=0.0), 0)"
            for i, name in enumerate(derived)
        ),
        *lines,
        *(f"tl.store(gconstant_ptr + {i} * heads + head, {value})" for i, value in enumerate(gradients)),
    ]
    return kernel_text("finish", "constant_ptr, gh_ptr, gconstant_ptr, batch, heads, blocks, BLOCK: tl.constexpr", body)
