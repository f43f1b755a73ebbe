"""Changes to a captured network on its way to a graph, where the libraries get it wrong."""

from __future__ import annotations

from typing import Any

import torch


def drop_empty_squeezes(program: torch.export.ExportedProgram) -> None:
    """Remove every `squeeze(dim)` of a dimension that is not 1.

    torch leaves such a tensor as it is; the exporter writes a Squeeze node, which no runtime takes
    (PixArt's output layer has one).
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.squeeze.dim:
            continue
        tensor = node.args[0]
        if tensor.meta["val"].ndim == node.meta["val"].ndim:
            node.replace_all_uses_with(tensor)
            graph.erase_node(node)
    program.graph_module.recompile()


def simplify(model: Any) -> None:
    """Fold constants and rewrite an onnx_ir.Model in place, as torch.onnx.export does by itself.

    All of onnxscript's rules are used but one, which replaces `x + c` by `x` if c is within 1e-8 of
    0. With it a network that divides by `x + 1e-15` would divide by 0 (Sana's linear attention).
    """
    from onnx_ir import passes
    from onnx_ir.passes import common
    from onnxscript import rewriter
    from onnxscript.optimizer import _constant_folding as folding
    from onnxscript.rewriter.rules.common import _no_op

    unsafe = set(map(id, _no_op.rules))
    rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if id(rule) not in unsafe]
    inner: list[Any] = [
        folding.FoldConstantsPass(
            shape_inference=True,
            input_size_limit=folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
            output_size_limit=folding.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
        ),
        rewriter.RewritePass(rules),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    ]
    passes.Sequential(
        common.InlinePass(),
        passes.PassManager(inner, steps=2, early_stop=True),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
    _drop_exact_no_ops(model)
    common.RemoveUnusedNodesPass()(model)


def _drop_exact_no_ops(model: Any) -> None:
    """Remove x * 1, x / 1, x + 0 and x - 0 where the number is exactly that."""
    neutral = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0}
    kept = set(model.graph.outputs)
    for node in model.graph.all_nodes():
        if node.op_type not in neutral or node.domain or node.outputs[0] in kept:
            continue
        sides = [(node.inputs[0], node.inputs[1])]
        if node.op_type in ("Mul", "Add"):
            sides.append((node.inputs[1], node.inputs[0]))
        for value, other in sides:
            constant = None if other is None else other.const_value
            if constant is None or len(constant.shape):  # another rank could change the result's
                continue
            if float(constant.numpy()) == neutral[node.op_type]:
                node.outputs[0].replace_all_uses_with(value)
                break
