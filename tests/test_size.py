"""The size is part of the contract: people read this file before they trust it with their database."""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
import unittest
from typing import Union

from tests.support import PROGRAM

LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip
# The aim is 4,000 lines and 28,000 tokens. Until the file is there, these two only go down.
MOST_LINES, MOST_TOKENS = 5_330, 34_750
SOURCE = PROGRAM.read_text("utf-8")
Definition = Union[ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef]


def lines_of(node: Definition) -> int:
    """Return the lines of a function or class, from its first decorator to its last line."""
    assert node.end_lineno
    return node.end_lineno - min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) + 1


class Size(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        nodes = list(ast.walk(ast.parse(SOURCE)))
        functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        cls.functions = {f"{node.name}, line {node.lineno}": lines_of(node) for node in functions}
        cls.classes = {node.name: lines_of(node) for node in nodes if isinstance(node, ast.ClassDef)}

    def test_lines(self) -> None:
        self.assertLessEqual(SOURCE.count("\n"), MOST_LINES)
        self.assertLessEqual(max(map(len, SOURCE.splitlines())), 120)

    def test_code_tokens(self) -> None:
        count = nested = 0
        for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline):
            name = tokenize.tok_name[token.type]  # from Python 3.12 on, an f-string comes in pieces
            nested -= name == "FSTRING_END"
            count += token.type not in LAYOUT and not nested and name != "FSTRING_END"
            nested += name == "FSTRING_START"
        self.assertLessEqual(count, MOST_TOKENS)

    def test_functions(self) -> None:
        self.assertEqual({name: lines for name, lines in self.functions.items() if lines > 50}, {})
        self.assertLessEqual(statistics.median(self.functions.values()), 9)

    def test_classes(self) -> None:
        self.assertEqual({name: lines for name, lines in self.classes.items() if lines > 300}, {})


if __name__ == "__main__":
    unittest.main()
