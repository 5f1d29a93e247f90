"""Channel shuffles: reshape, transpose, reshape that together only permute channels.

Inside, a unit varies along two axes, and what is left of it is in general no block. So the chain is seen as one
permutation; where something is cut it becomes a Gather with the permutation of what is left, else it stays as it is.
Which permutation it is, and that nothing else moves, is seen by sending the positions along each axis through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from relief_export.graph.layout import LayoutError, constant_axes, drop_axes, varying
from relief_export.graph.views import View

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from relief_export.graph.cutting import Cut
    from relief_export.graph.flow import Rule, Site
    from relief_export.graph.liveness import Liveness


def mark_shuffles(liveness: Liveness) -> None:
    """Mark the nodes of every chain of views between two tensors of the same shape with one unit axis."""
    sites = {site.node: (site, rule) for site, rule in liveness.sites}
    flows = liveness.trace.flows
    for site, rule in liveness.sites:
        source = site.node.inputs[0] if site.node.inputs else None
        if source not in flows or not _splits(site, rule):
            continue
        chain = _chain(site, sites)
        end = chain[-1].node.outputs[0] if chain else None
        if end is None or source is None or end.shape is None or source.shape is None:
            continue
        axes = varying(flows[source].ids)
        if axes != varying(flows[end].ids) or len(axes) != 1 or list(source.shape)[1:] != list(end.shape)[1:]:
            continue
        order = _order(chain, sites, axes[0])
        if order is None:
            continue
        for inner in chain[:-1]:
            inner.cache["shuffled"] = tuple(inner.node.outputs)
        chain[-1].cache["permutes"] = (source, axes[0], order)


def replace_shuffle(site: Site, cut: Cut) -> bool:
    """Replace the shuffle that ends at this node by a Gather where channels are cut; return whether it was."""
    if "permutes" not in site.cache:
        return False
    source, axis, order = site.cache["permutes"]
    end = site.result
    kept = cut.kept(end)
    if not kept:
        return True  # the chain stays as it is
    indices = cut.constant_value(f"{end.name}_order", cut.places(source, axis, order[kept[axis]]))
    node = ir.node("Gather", [source, indices], attributes={"axis": axis}, name=site.node.name)
    cut.substitute(site.node, node)
    return True


def _splits(site: Site, rule: Rule) -> bool:
    flows = site.trace.flows
    return (
        isinstance(rule, View)
        and rule.permutes
        and len(varying(flows[site.result].ids)) > 1
        and len(varying(flows[site.source].ids)) == 1
    )


def _chain(site: Site, sites: dict[ir.Node, tuple[Site, Rule]]) -> list[Site]:
    """Follow single uses from a splitting view to the one that merges again; empty where there is none."""
    chain = [site]
    while len(varying(site.trace.flows[chain[-1].node.outputs[0]].ids)) > 1:
        value = chain[-1].node.outputs[0]
        users = list(value.uses())
        if len(users) != 1 or value.is_graph_output() or users[0].node not in sites:
            return []
        following, rule = sites[users[0].node]
        if not isinstance(rule, View) or not rule.permutes or users[0].idx != 0:
            return []
        chain.append(following)
    return chain


def _order(chain: list[Site], sites: dict[ir.Node, tuple[Site, Rule]], channel: int) -> NDArray[np.int64] | None:
    """Return where each channel behind a chain comes from, None where positions along another axis move too."""
    shape = chain[0].trace.flows[chain[0].source].shape
    order = None
    for axis, length in enumerate(shape):
        line = np.arange(length or 1).reshape([-1 if k == axis else 1 for k in range(len(shape))])
        moved = line
        try:
            for site in chain:
                rule, flow = sites[site.node][1], site.flow(0)
                assert isinstance(rule, View)  # noqa: S101 - as _chain has it
                assert flow is not None  # noqa: S101
                moved = rule.move(site, flow, moved)[0]
        except LayoutError:
            return None
        moved = drop_axes(moved, constant_axes(moved))
        if axis == channel and varying(moved) == (axis,):
            order = moved.reshape(-1)
        elif not np.array_equal(moved, line):
            return None
    return order
