"""Print how long the functions and lines of each module are, and how dense: `python docs/style.py`.

Density is the number of AST nodes per line of a function's body, its docstring left out; the table shows the
median over functions. Nothing enforces these figures; they are there to be looked at.
"""

import ast
import statistics
from pathlib import Path

ACT = Path(__file__).parents[1] / "act"
LONGEST = 110  # characters in a line


def functions(tree):
    """Every function of a module, methods and nested functions included."""
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def body_of(function):
    """The statements of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    return function.body[documented:]


def measured(function):
    """Lines of a function's body, and AST nodes per line."""
    body = body_of(function)
    if not body:
        return None
    lines = body[-1].end_lineno - body[0].lineno + 1
    nodes = sum(1 for statement in body for _ in ast.walk(statement))
    return lines, nodes / lines


def row(path):
    """What the table shows of one module, and what its last line needs."""
    source = path.read_text(encoding="utf-8")
    lines = [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]
    sizes = [m for m in map(measured, functions(ast.parse(source))) if m]
    return path.stem, lines, [n for n, _ in sizes], [density for _, density in sizes]


def printed(name, lines, lengths, densities):
    long = sum(len(line) > LONGEST for line in lines)
    if not lengths:
        return f"{name:12} {len(lines):6} {0:9}"
    tenth = sorted(lengths)[int(0.9 * (len(lengths) - 1))]
    spread = f"{statistics.median(lengths):6.0f} {tenth:4} {max(lengths):4}"
    density = f"{statistics.median(densities):8.1f} {100 * long / len(lines):6.1f} %"
    return f"{name:12} {len(lines):6} {len(lengths):9} {spread} {density}"


def main():
    rows = [row(path) for path in sorted(ACT.glob("*.py")) if path.stem != "_modidx"]
    longer = f"> {LONGEST}"
    sizes = f"{'median':>6} {'p90':>4} {'max':>4}"
    print(f"{'module':12} {'lines':>6} {'functions':>9} {sizes} {'density':>8} {longer:>8}")
    for each in rows:
        print(printed(*each))
    together = [sum((each[i] for each in rows), []) for i in (1, 2, 3)]
    print(printed("all", *together))


if __name__ == "__main__":
    main()
