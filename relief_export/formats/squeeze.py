"""What a graph can do without: long names, node names, shapes that follow from others, attributes at their defaults."""

from __future__ import annotations

from collections import Counter

import onnx

from relief_export.formats.builder import short_names
from relief_export.formats.onnx_file import graphs

_WINDOWS = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"}
_WINDOW_DEFAULTS = {"strides": 1, "dilations": 1, "pads": 0}


def squeeze(proto: onnx.ModelProto) -> set[str]:
    """Drop, in place, what ``proto`` needs not; return the names of its values."""
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    for graph in graphs(proto.graph):
        del graph.value_info[:], graph.quantization_annotation[:]
        if graph is not proto.graph:
            graph.name = "g"
        for node in graph.node:
            node.name = ""
            _drop_defaults(node, versions)
    return set(_uses(proto))


def shorten(proto: onnx.ModelProto) -> None:
    """Rename the values of ``proto`` in place, the most used get the shortest names; inputs and outputs keep theirs."""
    fixed = {value.name for value in (*proto.graph.input, *proto.graph.output)} | {""}
    fresh = short_names(fixed)
    names = {name: name if name in fixed else next(fresh) for name, _ in _uses(proto).most_common()}
    for graph in graphs(proto.graph):
        for part in (*graph.initializer, *graph.value_info, *graph.input, *graph.output):
            part.name = names.get(part.name, part.name)
        for node in graph.node:
            for side in (node.input, node.output):
                side[:] = [names[name] for name in side]


def _uses(proto: onnx.ModelProto) -> Counter[str]:
    """Count how often each value is named; first in a tie is what is named first."""
    uses: Counter[str] = Counter()
    for graph in graphs(proto.graph):
        for node in graph.node:
            uses.update([*node.input, *node.output])
        uses.update(part.name for part in (*graph.initializer, *graph.value_info, *graph.input, *graph.output))
    return uses


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
        if default is not None and default.SerializeToString() == plain.SerializeToString():
            continue
        if node.domain or not _is_inferred(node.op_type, plain):
            kept.append(plain)
    del node.attribute[:]
    node.attribute.extend(kept)


def _is_inferred(op: str, attribute: onnx.AttributeProto) -> bool:
    """Say whether a window's attribute is what the runtime takes without it; no schema states these defaults."""
    if op == "Conv" and attribute.name == "kernel_shape":  # by the weight's shape
        return True
    default = _WINDOW_DEFAULTS.get(attribute.name)
    return op in _WINDOWS and default is not None and all(value == default for value in attribute.ints)
