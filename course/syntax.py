"""Functions in the text of a Python file: find them, blank them, put others in their place.

The syntax tree says where a function stands. Everything else keeps its text, comments included.
"""

import ast
import textwrap

COLUMNS = 100


def functions(text: str):
    """Qualified name -> node of every function and method: `name`, `Class.name`."""
    found = {}

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef):
                found[prefix + node.name] = node
            elif isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(text).body, "")
    return found


def function(text: str, name: str):
    """The node of one function. Raises KeyError if the file has none of that name."""
    found = functions(text)
    if name not in found:
        raise KeyError(f"no function {name}; there are {', '.join(sorted(found))}")
    return found[name]


def docstring_node(node):
    """The statement that is the docstring, or None."""
    first = node.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first if is_text and isinstance(first.value.value, str) else None


def replace_lines(text: str, first: int, last: int, new: str):
    """The lines first to last, counted from 1, become `new`."""
    lines = text.splitlines(keepends=True)
    return "".join(lines[: first - 1]) + new + "".join(lines[last:])


def quoted(docstring: str, indent: str):
    """A docstring as it stands in a file. Its paragraphs are filled anew."""
    paragraphs = f'"""{textwrap.dedent(docstring).strip()}'.split("\n\n")
    margins = {"initial_indent": indent, "subsequent_indent": indent}
    filled = [textwrap.fill(one, COLUMNS, break_on_hyphens=False, **margins) for one in paragraphs]
    inside = "\n\n".join(filled)
    fits = "\n" not in inside and len(inside) + 3 <= COLUMNS
    return inside + ('"""\n' if fits else f'\n{indent}"""\n')


def blank(text: str, name: str, message: str, docstring: str | None = None):
    """Empty one function: its signature and docstring stay, its body raises NotImplementedError.

    `docstring` replaces the docstring where the real one gives the answer away.
    """
    node = function(text, name)
    indent = " " * (node.col_offset + 4)
    old = docstring_node(node)
    new = ""
    if docstring is not None:
        new = quoted(docstring, indent)
    elif old is not None:
        lines = text.splitlines(keepends=True)
        new = "".join(lines[old.lineno - 1 : old.end_lineno])
    new += f'{indent}raise NotImplementedError("{message}")\n'
    start = node.body[0].lineno
    # A comment between the signature and the first statement goes too.
    start = min(start, header_end(text, node) + 1)
    return replace_lines(text, start, node.end_lineno, new)


def header_end(text: str, node):
    """The last line of a function's signature."""
    lines = text.splitlines()
    at = node.lineno
    while at < node.body[0].lineno and not lines[at - 1].split("#")[0].rstrip().endswith(":"):
        at += 1
    return at


def set_docstring(text: str, name: str, docstring: str):
    """Another docstring of a function or a class; of the file, if `name` is empty."""
    node = ast.parse(text)
    for part in name.split(".") if name else ():
        named = [one for one in node.body if getattr(one, "name", None) == part]
        if not named:
            raise KeyError(f"nothing is called {name}")
        node = named[0]
    old = docstring_node(node)
    indent = " " * old.col_offset
    return replace_lines(text, old.lineno, old.end_lineno, quoted(docstring, indent))


def body_lines(text: str, name: str):
    """The lines of a function's body without its docstring, stripped; comments included."""
    node = function(text, name)
    old = docstring_node(node)
    start = old.end_lineno + 1 if old else header_end(text, node) + 1
    lines = text.splitlines()[start - 1 : node.end_lineno]
    return [line.strip() for line in lines if line.strip()]


def first_line(node):
    """Of a function, its decorators included."""
    return min([node.lineno, *(one.lineno for one in node.decorator_list)])


def source(text: str, name: str):
    """The text of one function, its decorators included."""
    node = function(text, name)
    return "".join(text.splitlines(keepends=True)[first_line(node) - 1 : node.end_lineno])


def graft(text: str, name: str, donor: str):
    """The function `name` of the file `donor` takes the place of that in `text`."""
    node = function(text, name)
    return replace_lines(text, first_line(node), node.end_lineno, source(donor, name))
