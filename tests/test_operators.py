"""What the runtime reads of an ONNX file by itself: as the onnx package does, and under attack."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tinygiant.runtime import bundle as b
from tinygiant.runtime import load
from tinygiant.runtime.errors import BundleError
from tinygiant.runtime.operators import MAX_GRAPH_BYTES, GraphContents, graph_contents
from tinygiant.runtime.ort.pool import GraphPool
from tinygiant.runtime.ort.sessions import Graph, SessionSettings


def by_onnx(model: onnx.ModelProto) -> GraphContents:
    """Operators and weight files of a graph, as the onnx package reads it.

    Graphs inside it are the two branches of an ``If``, or it fails.
    """
    branches = [
        attribute.g
        for node in model.graph.node
        if name_of(node) == "ai.onnx:If"
        for attribute in node.attribute
    ]
    assert not any(branch.initializer or branch.sparse_initializer for branch in branches)
    tensors = [*model.graph.initializer]
    for sparse in model.graph.sparse_initializer:
        tensors += [sparse.values, sparse.indices]
    operators = set()
    for graph in (model.graph, *branches):
        for node in graph.node:
            operators.add(name_of(node))
            is_if = graph is model.graph and name_of(node) == "ai.onnx:If"
            holding = {attribute.name for attribute in node.attribute if attribute.HasField("g")}
            assert holding == ({"then_branch", "else_branch"} if is_if else set())
            for attribute in node.attribute:
                assert not attribute.graphs
                tensors += [attribute.t, *attribute.tensors]
                for sparse in [attribute.sparse_tensor, *attribute.sparse_tensors]:
                    tensors += [sparse.values, sparse.indices]
    return GraphContents(
        frozenset(operators),
        frozenset(
            entry.value
            for tensor in tensors
            for entry in tensor.external_data
            if entry.key == "location"
        ),
    )


def name_of(node: onnx.NodeProto) -> str:
    return f"{node.domain or 'ai.onnx'}:{node.op_type}"


def external(location: str, name: str = "w") -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "4"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model_of(
    nodes: Iterable[onnx.NodeProto], weights: Iterable[onnx.TensorProto] = ()
) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph(list(nodes), "g", values[:1], values[1:], list(weights))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def branch(*nodes: onnx.NodeProto, weights: Iterable[onnx.TensorProto] = ()) -> onnx.GraphProto:
    """A branch that gives ``b``."""
    value = helper.make_tensor_value_info("b", TensorProto.FLOAT, [1])
    return helper.make_graph(list(nodes), "branch", [], [value], list(weights))


def choice(
    then: onnx.GraphProto | None = None, otherwise: onnx.GraphProto | None = None
) -> onnx.NodeProto:
    """An ``If`` on ``c``; a branch that is not given gives ``x``."""
    plain = branch(helper.make_node("Identity", ["x"], ["b"]))
    return helper.make_node(
        "If", ["c"], ["y"], then_branch=then or plain, else_branch=otherwise or plain
    )


def everywhere() -> onnx.ModelProto:
    """A model with weights in every place where onnx.proto allows one, and branches."""
    constant = helper.make_node("Constant", [], ["c"])
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(external("t"))
    tensors = constant.attribute.add(name="more", type=onnx.AttributeProto.TENSORS)
    tensors.tensors.extend([external("t1"), external("t2")])
    sparse = onnx.SparseTensorProto(values=external("v"), indices=external("i"), dims=[1])
    constant.attribute.add(name="s").sparse_tensor.CopyFrom(sparse)
    constant.attribute.add(name="ss").sparse_tensors.append(
        onnx.SparseTensorProto(values=external("v2"), indices=external("i2"))
    )
    inside = helper.make_node("Constant", [], ["b"])
    inside.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(external("b"))
    model = model_of(
        [helper.make_node("Add", ["x", "w"], ["y"], domain="com.microsoft"), constant,
         choice(branch(inside))],
        [external("w"), external("", "empty")],
    )  # fmt: skip
    model.graph.sparse_initializer.append(
        onnx.SparseTensorProto(values=external("v3"), indices=external("i3"))
    )
    return model


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(number: int) -> bytes:
    encoded = b""
    while number >= 0x80:
        encoded += bytes([number & 0x7F | 0x80])
        number >>= 7
    return encoded + bytes([number])


def refusal(content: bytes) -> str:
    with pytest.raises(BundleError) as caught:
        graph_contents(content)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


# --- agreement with the onnx package


def test_every_graph_of_a_bundle_reads_as_onnx_reads_it(tiny_bundle: Path) -> None:
    manifest = b.Bundle.open(tiny_bundle).manifest
    for entry in manifest.graphs.values():
        content = (tiny_bundle / entry.file).read_bytes()
        expected = by_onnx(onnx.load_from_string(content))
        assert graph_contents(content) == expected
        assert set(entry.operators) == expected.operators
        assert {f"onnx/{name}" for name in expected.weight_files} == set(entry.external_data)


def test_the_installed_bundle_lists_what_it_uses() -> None:
    path = Path(b.__file__).parent / "bundles" / "nano"
    for entry in b.Bundle.open(path).manifest.graphs.values():
        found = by_onnx(onnx.load_from_string((path / entry.file).read_bytes()))
        assert tuple(sorted(found.operators)) == entry.operators


def test_weights_are_found_wherever_they_may_be() -> None:
    found = graph_contents(everywhere().SerializeToString())
    assert found.weight_files == {"w", "v", "i", "t", "t1", "t2", "v2", "i2", "v3", "i3", "b", ""}
    assert found.operators == {
        "com.microsoft:Add", "ai.onnx:Constant", "ai.onnx:If", "ai.onnx:Identity"
    }  # fmt: skip


def test_the_two_names_of_the_default_domain_are_one() -> None:
    nodes = [helper.make_node("Abs", ["x"], ["y"], domain=domain) for domain in ("", "ai.onnx")]
    assert graph_contents(model_of(nodes).SerializeToString()).operators == {"ai.onnx:Abs"}


@settings(max_examples=200)
@given(st.data())
def test_nothing_that_onnx_sees_is_overlooked(data: st.DataObject) -> None:
    """Damaged in any way, a file is refused or read as the onnx package reads it."""
    content = bytearray(everywhere().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        end = start + data.draw(st.integers(0, 3))
        content[start:end] = data.draw(st.binary(max_size=4))
        if not content:
            break
    try:
        found = graph_contents(bytes(content))
    except BundleError:
        return
    try:
        model = onnx.load_from_string(bytes(content))
        expected = by_onnx(model)
    except (DecodeError, UnicodeDecodeError):
        return  # then onnxruntime refuses it
    assert found.operators == expected.operators
    assert found.weight_files == expected.weight_files


# --- control flow


@pytest.mark.parametrize("operator", ["If", "Loop", "Scan", "SequenceMap"])
def test_control_flow_is_refused_by_name(operator: str) -> None:
    node = helper.make_node(operator, ["x"], ["y"])
    assert "control flow" in refusal(model_of([node]).SerializeToString())
    node.domain = "ai.onnx"
    assert "control flow" in refusal(model_of([node]).SerializeToString())


def test_operators_in_branches_are_counted() -> None:
    then, otherwise = (
        branch(helper.make_node(kind, ["x"], ["b"], domain=domain))
        for kind, domain in (("Det", ""), ("Gelu", "com.microsoft"))
    )
    content = model_of([choice(then, otherwise)]).SerializeToString()
    assert graph_contents(content) == by_onnx(onnx.load_from_string(content))
    assert graph_contents(content).operators == {
        "ai.onnx:If", "ai.onnx:Det", "com.microsoft:Gelu"
    }  # fmt: skip


@pytest.mark.parametrize("which", ["then", "otherwise"])
@pytest.mark.parametrize("operator", ["If", "Loop", "Scan", "SequenceMap"])
@pytest.mark.parametrize("with_graphs", [False, True])
def test_control_flow_in_a_branch_is_refused(which: str, operator: str, with_graphs: bool) -> None:
    inner = choice() if with_graphs else helper.make_node(operator, ["x"], ["b"])
    inner.op_type = operator
    node = choice(**{which: branch(inner)})
    assert "control flow" in refusal(model_of([node]).SerializeToString())


@pytest.mark.parametrize("which", ["then", "otherwise"])
def test_initializers_of_a_branch_are_refused(which: str) -> None:
    """Also such as lie in the file: the exporter writes none."""
    inside = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    node = helper.make_node("Identity", ["w"], ["b"])
    for weight in (inside, external("w.data")):
        held = choice(**{which: branch(node, weights=[weight])})
        assert "a branch with initializers" in refusal(model_of([held]).SerializeToString())
    sparse = branch(node)
    sparse.sparse_initializer.append(onnx.SparseTensorProto(values=inside))
    held = choice(**{which: sparse})
    assert "a branch with initializers" in refusal(model_of([held]).SerializeToString())


def test_only_the_two_branches_of_an_if_may_be_graphs() -> None:
    def told(node: onnx.NodeProto) -> str:
        return refusal(model_of([node]).SerializeToString())

    for name in ("then_branch", "else_branch"):
        node = choice()
        missing = next(i for i, part in enumerate(node.attribute) if part.name == name)
        del node.attribute[missing]
        assert "without its two branches" in told(node)
    third = choice()
    third.attribute.add(name="body").g.CopyFrom(branch())
    twice = choice()
    twice.attribute.add(name="then_branch").g.CopyFrom(branch())
    nameless = choice()
    nameless.attribute[0].name = ""
    many = choice()
    many.attribute.add(name="more").graphs.append(branch())
    other = choice()
    other.op_type = "Abs"
    foreign = choice()
    foreign.domain = "com.microsoft"
    for node in (third, twice, nameless, many, other, foreign):
        assert "inside a node" in told(node)


def test_the_order_of_fields_hides_nothing() -> None:
    """Attributes before the operator, and the name of one behind its graph."""
    inner = field(1, field(4, b"Det"))

    def branches_of(graph: bytes) -> bytes:
        names = (b"then_branch", b"else_branch")
        return b"".join(field(5, field(6, graph) + field(1, name)) for name in names)

    branches = branches_of(inner)
    for node in (branches + field(4, b"If"), field(4, b"If") + branches):
        content = field(7, field(1, node))
        assert graph_contents(content).operators == {"ai.onnx:If", "ai.onnx:Det"}
    assert "inside a node" in refusal(field(7, field(1, branches + field(4, b"Abs"))))
    nested = field(1, branches + field(4, b"If"))
    hidden = field(1, branches_of(nested) + field(4, b"If"))
    assert "inside a node" in refusal(field(7, hidden))


@pytest.mark.parametrize("name", [b"then_branch", b"body"])
def test_an_attribute_with_two_names_or_graphs_is_refused(name: bytes) -> None:
    graph = field(6, field(1, field(4, b"Det")))
    for attribute in (
        field(1, b"then_branch") + graph + field(1, name),
        field(1, b"then_branch") + graph + graph,
    ):
        assert "several" in refusal(field(7, field(1, field(4, b"If") + field(5, attribute))))


@pytest.mark.parametrize("several", [False, True])
def test_a_graph_inside_a_node_is_refused_whatever_the_operator(several: bool) -> None:
    inner = model_of([helper.make_node("Abs", ["x"], ["y"])]).graph
    node = helper.make_node("BeamSearch", ["x"], ["y"], domain="com.microsoft")
    attribute = node.attribute.add(name="decoder")
    if several:
        attribute.graphs.append(inner)
    else:
        attribute.g.CopyFrom(inner)
    assert "control flow" in refusal(model_of([node]).SerializeToString())


def test_functions_and_training_are_refused() -> None:
    model = model_of([helper.make_node("Twice", ["x"], ["y"], domain="own")])
    function = helper.make_function(
        "own", "Twice", ["x"], ["y"], [helper.make_node("Abs", ["x"], ["y"])],
        [helper.make_opsetid("", 21)],
    )  # fmt: skip
    model.functions.append(function)
    assert "functions" in refusal(model.SerializeToString())
    del model.graph.node[:]
    called = helper.make_node("Twice", ["x"], ["b"], domain="own")
    model.graph.node.append(choice(branch(called)))
    assert "functions" in refusal(model.SerializeToString())
    del model.functions[:]
    model.training_info.add().algorithm.CopyFrom(model.graph)
    assert "training" in refusal(model.SerializeToString())


def test_deep_nesting_costs_nothing() -> None:
    """Node in attribute in graph in node, 3,000 deep: refused at the first or second level."""
    for operator in (b"Abs", b"If"):
        content = b""
        for _ in range(3_000):
            inner = field(5, field(1, b"then_branch") + field(6, content))
            empty = field(5, field(1, b"else_branch") + field(6, b""))
            content = field(1, field(4, operator) + inner + empty)
        start = time.process_time()
        assert "control flow" in refusal(field(7, content))
        assert time.process_time() - start < 1.0


def test_an_endless_loop_of_a_bundle_never_reaches_onnxruntime(bundle_copy: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []),
         helper.make_tensor_value_info("go", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, [])],
    )  # fmt: skip
    loop = helper.make_node("Loop", ["", ""], [], body=body)
    replace_graph(bundle_copy, model_of([loop]).SerializeToString())
    with pytest.raises(BundleError, match="control flow"):
        load(bundle_copy, threads=1)


# --- damaged and hostile files


@pytest.mark.parametrize(
    "content",
    [
        b"\x80",
        b"\xff" * 20,
        b"\x3a",
        b"\x3a\x05\x00",
        b"\x3a\xff\xff\xff\xff\x7f",
        b"\x3a\x80\x80\x80\x80\x80\x80\x00",
        b"\x08" + b"\x80" * 10 + b"\x00",
        b"\x09\x00\x00",
        b"\x0d\x00",
        b"\x0b\x0c",
        b"\x0e",
        b"\x02\x00",
        field(7, field(1, b"")),
        field(7, field(1, field(4, b"Abs") + field(4, b"If"))),
        field(7, field(1, field(4, b"Abs") + field(7, b"a") + field(7, b""))),
        field(7, field(1, field(4, b"Abs\n\x1b[2J"))),
        field(7, field(1, field(4, b"\xff\xfe"))),
        field(7, field(1, field(4, b"a:b") + field(7, b"x"))),
        field(7, field(1, field(4, b"A" * 5_000))),
        field(7, field(5, field(13, field(1, b"location") + field(2, b"a") + field(2, b"b")))),
    ],
    ids=["tag cut", "tag too long", "no length", "length too large", "length of 2^35",
         "length too long", "number too long", "64 bits cut", "32 bits cut", "group",
         "wire type 6", "field 0", "no operator", "two operators", "two domains",
         "unprintable", "not utf-8", "colon", "long name", "two locations"],
)  # fmt: skip
def test_hand_made_files(content: bytes) -> None:
    refusal(content)


def test_every_truncation_is_refused_or_smaller() -> None:
    content = everywhere().SerializeToString()
    whole = graph_contents(content)
    for size in range(len(content)):
        try:
            part = graph_contents(content[:size])
        except BundleError:
            continue
        assert part.operators <= whole.operators
        assert part.weight_files <= whole.weight_files


def test_two_graphs_count_as_protobuf_merges_them() -> None:
    nodes = [helper.make_node(name, ["x"], ["y"]) for name in ("Abs", "Neg")]
    content = b"".join(model_of([node]).SerializeToString() for node in nodes)
    expected = by_onnx(onnx.load_from_string(content))
    assert graph_contents(content) == expected
    assert expected.operators == {"ai.onnx:Abs", "ai.onnx:Neg"}


def test_size_and_work_are_bounded() -> None:
    assert "bytes" in refusal(bytes(MAX_GRAPH_BYTES + 1))
    start = time.process_time()
    assert "fields" in refusal(b"\x08\x00" * (MAX_GRAPH_BYTES // 4))
    assert time.process_time() - start < 10.0


def test_another_format_in_a_graphs_file_is_not_taken(tmp_path: Path) -> None:
    """onnxruntime has a format of its own, which it knows by the letters at offset 4."""
    content = field(2, b"\0\0ORTM" + bytes(40)) + model_of([]).SerializeToString()
    assert content[4:8] == b"ORTM"
    with pytest.raises(Exception, match="ORT model verification"):
        onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    with pytest.raises(BundleError) as caught:
        Graph(tmp_path / "g.onnx", SessionSettings(threads=1), content=content)
    assert "ORT model" not in str(caught.value)


# --- bundles


def replace_graph(root: Path, content: bytes, **entry: object) -> None:
    """Put ``content`` in place of the projector, in the manifest's list of files as well."""
    (root / "onnx/projector.onnx").write_bytes(content)
    path = root / b.MANIFEST_NAME
    data = json.loads(path.read_text())
    data["graphs"]["projector"] |= entry
    listed = [file["path"] for file in data["files"]]
    data["files"] = [vars(b.describe_file(root, file)) for file in listed]
    path.write_text(json.dumps(data))


def reading(root: Path, *, verify: bool = True) -> str:
    """How the projector's bytes are refused."""
    opened = b.Bundle.open(root, verify=verify)
    with pytest.raises(BundleError) as caught:
        opened.read_graph("projector")
    message = str(caught.value)
    assert "graph projector" in message
    assert message.isprintable()
    return message


def test_an_operator_that_the_manifest_does_not_list(bundle_copy: Path) -> None:
    node = helper.make_node("Det", ["x"], ["y"])
    replace_graph(bundle_copy, model_of([node]).SerializeToString())
    assert "operator ai.onnx:Det" in reading(bundle_copy)
    replace_graph(bundle_copy, model_of([node]).SerializeToString(), operators=["ai.onnx:Det"])
    b.Bundle.open(bundle_copy).read_graph("projector")


def test_an_operator_in_a_branch_that_the_manifest_does_not_list(bundle_copy: Path) -> None:
    content = model_of([choice(branch(helper.make_node("Det", ["x"], ["b"])))]).SerializeToString()
    known = ["ai.onnx:If", "ai.onnx:Identity"]
    replace_graph(bundle_copy, content, operators=known)
    assert "operator ai.onnx:Det" in reading(bundle_copy)
    replace_graph(bundle_copy, content, operators=[*known[1:], "ai.onnx:Det"])
    assert "operator ai.onnx:If" in reading(bundle_copy)
    replace_graph(bundle_copy, content, operators=[*known, "ai.onnx:Det"])
    b.Bundle.open(bundle_copy).read_graph("projector")


@pytest.mark.parametrize(
    "location",
    ["../../secret", "/etc/passwd", "whisper_encoder.onnx.data", "", "*/_ORT_MEM_ADDR_/*",
     "./projector.onnx.data", "x\n\x1b[2J"],
)  # fmt: skip
def test_weights_that_the_manifest_does_not_list_for_the_graph(
    bundle_copy: Path, location: str
) -> None:
    node = helper.make_node("Add", ["x", "w"], ["y"])
    content = model_of([node], [external(location)]).SerializeToString()
    replace_graph(bundle_copy, content, operators=["ai.onnx:Add"])
    assert "weights in" in reading(bundle_copy)


@pytest.mark.parametrize("operator", ["ai.onnx:Loop", "MatMul", ":MatMul", "a:b c", "a:\n", ""])
def test_a_manifest_cannot_list_control_flow_or_nonsense(bundle_copy: Path, operator: str) -> None:
    replace_graph(bundle_copy, b"", operators=[operator])
    with pytest.raises(BundleError, match="is not allowed"):
        b.Bundle.open(bundle_copy)


def test_a_graph_changed_after_the_bundle_was_opened(bundle_copy: Path) -> None:
    opened = b.Bundle.open(bundle_copy)
    path = bundle_copy / "onnx/projector.onnx"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="was changed"):
        opened.read_graph("projector")
    assert "was changed" in reading(bundle_copy, verify=False)
    path.unlink()
    with pytest.raises(BundleError, match="graph projector"):
        opened.read_graph("projector")


def test_onnxruntime_gets_the_bytes_that_were_checked(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies at the path by then."""
    opened = b.Bundle.open(bundle_copy)
    checked = opened.read_graph("projector")
    shutil.copyfile(bundle_copy / "onnx/whisper_encoder.onnx", bundle_copy / "onnx/projector.onnx")
    monkeypatch.setattr(b.Bundle, "read_graph", lambda self, name: checked)
    with GraphPool(opened, SessionSettings(threads=1)).use("projector") as graph:
        assert "instruction_embeds" in graph.input_names


def test_weights_are_still_read_beside_the_graph(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(np.array([2.0], np.float32).tobytes())
    content = model_of([helper.make_node("Add", ["x", "w"], ["y"])], [external("w.data")])
    graph = Graph(
        tmp_path / "gone.onnx", SessionSettings(threads=1), content=content.SerializeToString()
    )
    assert graph.run({"x": np.array([1.0], np.float32)})["y"].tolist() == [3.0]
