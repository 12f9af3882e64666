"""The operators and weight files of an ONNX file, read before onnxruntime sees it.

The contract: :func:`graph_contents` takes the bytes of a file and returns the operators that its
nodes name and the files that hold its weights. It reads the protobuf wire format itself (the
runtime has no onnx package) and skips every field that it does not need. A graph inside a node is
refused, and with it every loop, except the two branches of an ``If``, which hold neither
initializers nor another ``If``: so the depth is fixed, and every run of a graph ends. It holds to
onnx.proto3 of ONNX 1.23 and refuses anything that a usual writer would not write.

Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import BundleError
from .text import printable

__all__ = ["CONTROL_FLOW", "MAX_GRAPH_BYTES", "OPERATOR", "GraphContents", "graph_contents"]

CONTROL_FLOW = frozenset(f"ai.onnx:{name}" for name in ("Loop", "Scan", "SequenceMap"))
"""Operators that choose how often something runs. They are refused even without a graph inside."""

OPERATOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}:[A-Za-z][A-Za-z0-9_]{0,63}")
"""An operator as a manifest writes it, domain and name: ``ai.onnx:MatMul``."""

MAX_GRAPH_BYTES = 64 * 2**20  # the file without its weights; the largest of this project has 1 MB
_MAX_FIELDS = 1_000_000  # about a second of work; the largest graph has some ten thousand
_MAX_STRING_BYTES = 1_024

_TAG_BYTES, _VARINT_BYTES = 5, 10
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5

_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE_INITIALIZER = 1, 5, 15
_NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 1, 6, 11
_ATTRIBUTE_TENSORS = (5, 10)
_ATTRIBUTE_SPARSE_TENSORS = (22, 23)
_SPARSE_TENSORS = (1, 2)  # values, indices
_TENSOR_EXTERNAL_DATA = 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

_IF, _BRANCHES = "ai.onnx:If", frozenset({"then_branch", "else_branch"})

_Span = tuple[int, int]  # where a message or a string starts and ends


@dataclass(frozen=True)
class GraphContents:
    """Operators as ``domain:name``, and the files that weights are read from, as they are named."""

    operators: frozenset[str]
    weight_files: frozenset[str]


def graph_contents(content: bytes) -> GraphContents:
    """Read the bytes of an ONNX file.

    Raises:
        BundleError: it is too large or damaged, or holds loops, branches within branches or with
            initializers, functions or training.
    """
    if len(content) > MAX_GRAPH_BYTES:
        raise BundleError(f"the graph has {len(content)} bytes, at most {MAX_GRAPH_BYTES} are read")
    found = _Reader(content)
    found.model()
    return GraphContents(frozenset(found.operators), frozenset(found.weight_files))


class _Reader:
    """One pass over a file; a method for each kind of message, which takes its place."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._n_fields = 0
        self.operators: set[str] = set()
        self.weight_files: set[str] = set()

    def model(self) -> None:
        for number, part in self._fields((0, len(self._content))):
            if number == _MODEL_GRAPH:
                self._graph(part)
            elif number in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
                raise BundleError("the graph brings functions or training of its own")

    def _graph(self, span: _Span, *, is_branch: bool = False) -> None:
        for number, part in self._fields(span):
            if number == _GRAPH_NODE:
                self._node(part, in_branch=is_branch)
            elif number in (_GRAPH_INITIALIZER, _GRAPH_SPARSE_INITIALIZER):
                if is_branch:
                    raise _control_flow("a branch with initializers")
                if number == _GRAPH_INITIALIZER:
                    self._tensor(part)
                else:
                    self._sparse(part)

    def _node(self, span: _Span, *, in_branch: bool) -> None:
        names: list[str] = []
        domains: list[str] = []
        branches: dict[str, _Span] = {}
        for number, part in self._fields(span):
            if number == _NODE_OP_TYPE:
                names.append(self._string(part))
            elif number == _NODE_DOMAIN:
                domains.append(self._string(part))
            elif number == _NODE_ATTRIBUTE:
                found = self._attribute(part)
                if found is None:
                    continue
                name, graph = found
                if in_branch or name not in _BRANCHES or name in branches:
                    raise _control_flow("a graph inside a node")
                branches[name] = graph
        if len(names) != 1 or len(domains) > 1:
            raise _damaged("a node has no operator, or several")
        operator = f"{''.join(domains) or 'ai.onnx'}:{names[0]}"
        if OPERATOR.fullmatch(operator) is None:
            raise BundleError(f"the graph uses an impossible operator, {printable(operator):.80}")
        if operator in CONTROL_FLOW:
            raise _control_flow(operator)
        if operator == _IF and set(branches) != _BRANCHES:
            raise _control_flow("an If without its two branches")
        if operator != _IF and branches:
            raise _control_flow("a graph inside a node")
        self.operators.add(operator)
        for graph in branches.values():  # of a node outside of branches: this goes one level down
            self._graph(graph, is_branch=True)

    def _attribute(self, span: _Span) -> tuple[str, _Span] | None:
        """The name of an attribute that holds a graph, and where that is."""
        names: list[str] = []
        graphs: list[_Span] = []
        for number, part in self._fields(span):
            if number == _ATTRIBUTE_NAME:
                names.append(self._string(part))
            elif number == _ATTRIBUTE_GRAPH:
                graphs.append(part)
            elif number == _ATTRIBUTE_GRAPHS:
                raise _control_flow("graphs inside a node")
            elif number in _ATTRIBUTE_TENSORS:
                self._tensor(part)
            elif number in _ATTRIBUTE_SPARSE_TENSORS:
                self._sparse(part)
        if len(names) > 1 or len(graphs) > 1:
            raise _damaged("an attribute has several names or graphs")
        return ("".join(names), graphs[0]) if graphs else None

    def _sparse(self, span: _Span) -> None:
        for number, part in self._fields(span):
            if number in _SPARSE_TENSORS:
                self._tensor(part)

    def _tensor(self, span: _Span) -> None:
        for number, part in self._fields(span):
            if number == _TENSOR_EXTERNAL_DATA:
                self._external(part)

    def _external(self, span: _Span) -> None:
        keys: list[str] = []
        values: list[str] = []
        for number, part in self._fields(span):
            if number == _ENTRY_KEY:
                keys.append(self._string(part))
            elif number == _ENTRY_VALUE:
                values.append(self._string(part))
        if len(keys) > 1 or len(values) > 1:
            raise _damaged("a weight says twice where it lies")
        if keys == ["location"]:
            self.weight_files.update(values or [""])

    def _string(self, span: _Span) -> str:
        start, end = span
        if end - start > _MAX_STRING_BYTES:
            raise _damaged(f"a name of {end - start} bytes")
        # Whatever is no UTF-8 is no name on any list, and is shown escaped.
        return self._content[start:end].decode("utf-8", "backslashreplace")

    def _fields(self, span: _Span) -> Iterator[tuple[int, _Span]]:
        """Number and place of each length-delimited field of a message.

        Other fields are numbers, which do not matter here. A field of another wire type than
        onnx.proto's is skipped, as every protobuf reader skips it.
        """
        position, end = span
        while position < end:
            self._n_fields += 1
            if self._n_fields > _MAX_FIELDS:
                raise BundleError(f"the graph has more than {_MAX_FIELDS} fields")
            tag, position = self._varint(position, end, _TAG_BYTES)
            number, wire_type = tag >> 3, tag & 7
            if not 0 < number < 2**29:
                raise _damaged(f"field number {number}")
            if wire_type == _LENGTH_DELIMITED:
                size, position = self._varint(position, end, _TAG_BYTES)
                if size > end - position:
                    raise _damaged(f"a field of {size} bytes where {end - position} are left")
                yield number, (position, position + size)
                position += size
            elif wire_type == _VARINT:
                _, position = self._varint(position, end, _VARINT_BYTES)
            elif wire_type in (_FIXED64, _FIXED32):
                position += 8 if wire_type == _FIXED64 else 4
                if position > end:
                    raise _damaged("a number is cut short")
            else:
                raise _damaged(f"wire type {wire_type}")

    def _varint(self, position: int, end: int, max_bytes: int) -> tuple[int, int]:
        """The number at ``position``, seven bits a byte, and where it ends."""
        if position < end and self._content[position] < 0x80:  # nearly always
            return self._content[position], position + 1
        value = shift = 0
        for index in range(position, min(end, position + max_bytes)):
            byte = self._content[index]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, index + 1
            shift += 7
        raise _damaged("a number is cut short or too long")


def _damaged(what: str) -> BundleError:
    return BundleError(f"the graph is damaged or not an ONNX file: {what}")


def _control_flow(what: str) -> BundleError:
    return BundleError(f"the graph has control flow ({what}), not allowed")
