"""What a graph can do without: long names, node names, shapes that follow from others, attributes at their defaults."""

from __future__ import annotations

import onnx

from relief_export.formats.builder import short_names
from relief_export.formats.container import graphs


def squeeze(proto: onnx.ModelProto) -> dict[str, str]:
    """Shorten ``proto`` in place; graph inputs and outputs keep their names. Return old name -> new name."""
    fixed = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    fresh = short_names(fixed)
    names: dict[str, str] = {name: name for name in sorted(fixed)} | {"": ""}

    def renamed(name: str) -> str:
        if name not in names:
            names[name] = next(fresh)
        return names[name]

    versions = {entry.domain: entry.version for entry in proto.opset_import}
    for graph in graphs(proto.graph):
        del graph.value_info[:], graph.quantization_annotation[:]
        for tensor in graph.initializer:
            tensor.name = renamed(tensor.name)
        if graph is not proto.graph:
            graph.name = "g"
            for value in (*graph.input, *graph.output):
                value.name = renamed(value.name)
        for node in graph.node:
            node.name = ""
            _drop_defaults(node, versions)
            for side in (node.input, node.output):
                short = [renamed(name) for name in side]
                del side[:]
                side.extend(short)
    return names


def _drop_defaults(node: onnx.NodeProto, versions: dict[str, int]) -> None:
    version = versions.get(node.domain)
    if version is None or not onnx.defs.has(node.op_type, node.domain):
        return
    schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=version, domain=node.domain)
    kept = []
    for attribute in node.attribute:
        known = schema.attributes.get(attribute.name)
        default = known.default_value if known is not None and not known.required else None
        plain = onnx.AttributeProto()
        plain.CopyFrom(attribute)
        plain.ClearField("doc_string")
        inferred = (
            node.op_type == "Conv" and not node.domain and attribute.name == "kernel_shape"
        )  # by the weight's shape
        if inferred:
            continue
        if default is None or default.SerializeToString() != plain.SerializeToString():
            kept.append(plain)
    del node.attribute[:]
    node.attribute.extend(kept)
