"""The blueprints in prompts/ and the code agree on names: equations, functions, knobs, links, literature and figures.

Each check is a function from the texts to a list of faults, so that planted faults show that it finds something.
"""

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from bio_inspired_nanochat.config import PRESETS, GPTConfig, SynapticConfig
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.config.knobs import knobs_of
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.optim import OptimConfig
from bio_inspired_nanochat.registry import MECHANISMS
from bio_inspired_nanochat.synaptic.genome import EFFECTS
from bio_inspired_nanochat.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "bio_inspired_nanochat/"
LONGEST_PAGE = 450
# The page of each letter, and the rooms of the package in which its equations may be implemented.
PAGES = {
    "P": ("presynapse.md", ("kernels", "synaptic")),
    "D": ("synaptic_unit.md", ("kernels", "synaptic")),
    "H": ("hybrid.md", ("kernels", "synaptic", "optim", "benchmarks")),
    "L": ("life_cycle.md", ("synaptic", "structural")),
}
EQUATION = re.compile(r"\(([PDHL])(\d+)\)")
WHERE = re.compile(r"^\| ((?:\([PDHL]\d+\)(?:, )?)+) \| `([\w/]+\.py)` \| `?([\w.]+)`? \|$", re.MULTILINE)


class Texts(NamedTuple):
    """pages: those of prompts/ by name; code: Python sources by path; tests: the same of the tests; results: RESULTS.md."""

    pages: dict[str, str]
    code: dict[str, str]
    tests: dict[str, str]
    results: str

    @classmethod
    def read(cls) -> "Texts":
        def sources(*rooms: str) -> dict[str, str]:
            return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for room in rooms for path in (ROOT / room).rglob("*.py")}

        pages = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "prompts").iterdir())}
        return cls(pages, sources(PACKAGE, "scripts"), sources("tests"), (ROOT / "RESULTS.md").read_text("utf-8"))


TEXTS = Texts.read()


def fences(page: str) -> list[str]:
    return re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def equations(texts: Texts) -> set[tuple[str, str]]:
    """Letter and number of every equation that a page defines: the last thing on a line of a block."""
    found = set()
    for letter, (name, _) in PAGES.items():
        for block in fences(texts.pages[name]):
            found |= {(letter, number) for number in re.findall(rf" \({letter}(\d+)\)$", block, re.MULTILINE)}
    return found


def numbering(texts: Texts) -> Iterator[str]:
    """Numbers run without gaps, in order and once; every equation has its anchor; every mention is of one that exists."""
    known = equations(texts)
    for letter, (name, _) in PAGES.items():
        page = texts.pages[name]
        numbers = [int(n) for block in fences(page) for n in re.findall(rf" \({letter}(\d+)\)$", block, re.MULTILINE)]
        anchors = [int(n) for n in re.findall(rf'<a id="{letter.lower()}(\d+)"></a>', page)]
        if numbers != list(range(1, len(numbers) + 1)) or not numbers:
            yield f"{name}: equations are numbered {numbers}"
        if anchors != numbers:
            yield f"{name}: anchors {anchors} are not its equations {numbers}"
    for name, page in texts.pages.items():
        yield from (f"{name}: ({a}{n}) is no equation" for a, n in EQUATION.findall(page) if (a, n) not in known)


def citations(texts: Texts) -> Iterator[str]:
    """Every number in the code is an equation, and the module that cites it names its page."""
    known = equations(texts)
    for path, source in texts.code.items():
        heading = ast.get_docstring(ast.parse(source)) or ""
        for letter, number in EQUATION.findall(source):
            if (letter, number) not in known:
                yield f"{path}: ({letter}{number}) is no equation"
            if f"prompts/{PAGES[letter][0]}" not in heading:
                yield f"{path}: cites ({letter}{number}) without naming prompts/{PAGES[letter][0]} in its docstring"
        yield from (f"{path}: no page {name}" for name in re.findall(r"prompts/(\w+\.md)", source) if name not in texts.pages)


def implementations(texts: Texts) -> Iterator[str]:
    """Every equation has a function, in a room where it belongs, whose docstring cites it."""
    missing = equations(texts)
    for letter, (name, rooms) in PAGES.items():
        for numbers, file, function in WHERE.findall(texts.pages[name]):
            docstring = docstring_of(texts.code.get(PACKAGE + file, ""), function)
            if docstring is None:
                yield f"{name}: there is no {function} in {file}"
                continue
            if file.split("/")[0] not in rooms:
                yield f"{name}: {file} is not in {', '.join(rooms)}"
            for a, number in EQUATION.findall(numbers):
                missing.discard((a, number))
                if a != letter or (a, number) not in EQUATION.findall(docstring):
                    yield f"{name}: {function} in {file} does not cite ({a}{number})"
    yield from (f"{PAGES[letter][0]}: no function is named for ({letter}{number})" for letter, number in sorted(missing))


def docstring_of(source: str, function: str) -> str | None:
    """The docstring of a function, class or method (`Class.method`), or of the `module`; None where there is no such thing."""
    node: ast.AST = ast.parse(source)
    for name in [] if function == "module" else function.split("."):
        node = next((child for child in getattr(node, "body", []) if getattr(child, "name", None) == name), ast.Pass())
    return None if isinstance(node, ast.Pass) or not source else ast.get_docstring(node) or ""  # type: ignore[arg-type]


def knobs(texts: Texts) -> Iterator[str]:
    """Names in backticks exist, settings are valid, flags exist, and every knob and mechanism of a synapse is on a page."""
    fields = {field.name for config in (SynapticConfig, GPTConfig, OptimConfig, TrainConfig) for field in dataclasses.fields(config)}
    code = "\n".join(texts.code.values())
    known = fields | set(MECHANISMS) | set(PRESETS) | set(re.findall(r"^ *(?:def|class) (\w+)", code, re.MULTILINE))
    known |= (
        {"module"}
        | {choice for knob in knobs_of(SynapticConfig).values() for choice in knob.choices or ()}
        | set(re.findall(r"def (test_\w+)", "\n".join(texts.tests.values())))
    )
    named: set[str] = set()
    for name, page in texts.pages.items():
        for word, setting in re.findall(r"`(\w+)((?:=[^`\s]+)?)`", page):
            named.add(word)
            if word not in known:
                yield f"{name}: `{word}` is neither a knob nor a mechanism nor defined in the code"
            elif setting and (reason := invalid(word + setting)):
                yield f"{name}: {reason}"
        flags = re.findall(r"`--(\w+)[=`]", page)
        yield from (f"{name}: there is no flag --{flag}" for flag in flags if not re.search(rf"^    {flag}: ", code, re.MULTILINE))
    wanted = {field.name for field in dataclasses.fields(SynapticConfig)} | set(MECHANISMS)
    yield from (f"{word} is on no page" for word in sorted(wanted - named))


def invalid(setting: str) -> str | None:
    """Why a setting of a synapse is not valid, or None."""
    try:
        parse(SynapticConfig, [f"--{setting}"], prog="", description="")
    except UserError as error:
        return str(error)
    return None


def links(texts: Texts) -> Iterator[str]:
    """Links, paths and tests that a page names exist; pages are readable in one sitting."""
    for name, page in texts.pages.items():
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page):
            if target and not (ROOT / "prompts" / target).exists():
                yield f"{name}: {target} does not exist"
            elif anchor and f'id="{anchor}"' not in texts.pages.get(target or name, ""):
                yield f"{name}: {target}#{anchor} does not exist"
        yield from (
            f"{name}: {path} does not exist"
            for path in re.findall(r"`((?:tests|scripts|prompts)/[\w/.]+)`", page)
            if not (ROOT / path).exists()
        )
        if (lines := page.count("\n")) > LONGEST_PAGE:
            yield f"{name}: {lines} lines, the limit is {LONGEST_PAGE}"
    yield from (
        f"README.md does not name {name}" for name in texts.pages if name != "README.md" and f"({name})" not in texts.pages["README.md"]
    )


def literature(texts: Texts) -> Iterator[str]:
    """What is cited is in the list, and nothing is in the list for show."""
    listed = re.findall(r"^- \*\*([^*]+)\*\*\. ", texts.pages["references.md"], re.MULTILINE)
    found = re.findall(r"\[([^]]+)\]\(references\.md\)", "\n".join(texts.pages.values()))
    cited = {" ".join(key.split()) for key in found} - {"references.md"}
    yield from (f"{key} is cited but not listed" for key in sorted(cited - set(listed)))
    yield from (f"{key} is listed but not cited" for key in sorted(set(listed) - cited))


def figures(texts: Texts) -> Iterator[str]:
    """Every decimal of lessons.md is a figure of RESULTS.md, but those of the pilot, whose program is not here."""
    page = re.sub(r"\n## The pilot\n.*?(?=\n## )", "", texts.pages["lessons.md"], flags=re.DOTALL)
    known = set(re.findall(r"\d+\.\d+", texts.results))
    yield from (f"lessons.md: {number} is not in RESULTS.md" for number in re.findall(r"\d+\.\d+", page) if number not in known)


def proteins(texts: Texts) -> Iterator[str]:
    """Every effect of a protein of the genome is in the row of that protein."""
    rows = {cells[-2].strip(): row for row in texts.pages["presynapse.md"].splitlines() if len(cells := row.split("|")) == 7}
    for effect in EFFECTS:
        if f"`{effect.quantity}`" not in rows.get(effect.protein, ""):
            yield f"presynapse.md: {effect.protein} has no row with `{effect.quantity}`"


CHECKS: tuple[Callable[[Texts], Iterator[str]], ...] = (
    *(numbering, citations, implementations),
    *(knobs, links, literature, figures, proteins),
)


@pytest.mark.parametrize("check", CHECKS)
def test_the_blueprints_and_the_code_agree(check: Callable[[Texts], Iterator[str]]) -> None:
    assert sorted(set(check(TEXTS))) == []


PLANTED = [
    (numbering, "presynapse.md", "(P9)\n```", "(P99)\n```", "numbered"),
    (numbering, "hybrid.md", '<a id="h2"></a>', "", "anchors"),
    (numbering, "life_cycle.md", "of (P18).", "of (P81).", "(P81) is no equation"),
    (citations, "kernels/terminal.py", "Equation (P9).", "Equation (P99).", "(P99) is no equation"),
    (citations, "kernels/terminal.py", "prompts/presynapse.md", "the page", "without naming"),
    (citations, "kernels/terminal.py", "prompts/presynapse.md", "prompts/presynapse.md and prompts/gone.md", "no page gone.md"),
    (implementations, "presynapse.md", "| `calcium_step` |", "| `potassium_step` |", "no potassium_step"),
    (implementations, "presynapse.md", "| (P9) | `kernels/terminal.py` | `calcium_step` |\n", "", "named for (P9)"),
    (implementations, "kernels/terminal.py", "Equation (P9).", "", "does not cite (P9)"),
    (
        implementations,
        "synaptic_unit.md",
        "| (D14) | `kernels/molecules.py` | `latch_rates` |",
        "| (D14) | `gpt.py` | `module` |",
        "not in",
    ),
    (knobs, "presynapse.md", "`alpha_ca`", "`alpha_calcium`", "`alpha_calcium` is neither"),
    (knobs, "presynapse.md", "`tau_nsf`", "τ", "tau_nsf is on no page"),
    (knobs, "life_cycle.md", "`contrast_push`", "it", "contrast_push is on no page"),
    (knobs, "hybrid.md", "`barrier=linear`", "`barrier=round`", "barrier"),
    (knobs, "life_cycle.md", "`--splitmerge_every`", "`--splitmerge_often`", "--splitmerge_often"),
    (links, "README.md", "(hybrid.md)", "(hybrids.md)", "hybrids.md does not exist"),
    (links, "synaptic_unit.md", "(life_cycle.md)", "(life_cycle.md#l99)", "life_cycle.md#l99 does not exist"),
    (links, "life_cycle.md", "`tests/synaptic/test_moe.py`", "`tests/synaptic/test_moo.py`", "test_moo.py does not exist"),
    (links, "lessons.md", "# What", "\n" * LONGEST_PAGE + "# What", "the limit is"),
    (literature, "synaptic_unit.md", "[Lisman 1985]", "[Lisman 1984]", "Lisman 1984 is cited but not listed"),
    (literature, "presynapse.md", "[Salmon et al. 2011](references.md)", "Philox", "Salmon et al. 2011 is listed but not cited"),
    (figures, "lessons.md", "−0.0361", "−0.0363", "0.0363 is not in RESULTS.md"),
    (proteins, "presynapse.md", "| (P9), (P13) | `alpha_ca`, `tau_rrp` | RIM |", "| (P9), (P13) | `alpha_ca` | RIM |", "RIM has no row"),
]


@pytest.mark.parametrize(("check", "file", "old", "new", "said"), PLANTED)
def test_a_planted_fault_is_found(check: Callable[[Texts], Iterator[str]], file: str, old: str, new: str, said: str) -> None:
    texts = TEXTS._replace(pages=dict(TEXTS.pages), code=dict(TEXTS.code))
    place, key = (texts.pages, file) if file in texts.pages else (texts.code, PACKAGE + file)
    assert old in place[key], f"{file} no longer has {old!r}: plant the fault elsewhere"
    place[key] = place[key].replace(old, new)
    found = list(check(texts))
    assert any(said in fault for fault in found), found
