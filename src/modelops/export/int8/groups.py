"""Groups of layers with weights and of attention's products, by role and block, for any denoiser.

A node's place is the torch module path that the exporter noted on it. UNets and diffusion
transformers name their parts alike, so a few words decide the role. A path without any of them
gets a group by its block. No list of models is needed.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from modelops.base.errors import ExportError
from modelops.export.graphs.external import load_structure

WEIGHTED_OPS = ("Conv", "Gemm", "MatMul")
MAX_GROUPS = 16  # a scan makes and runs a graph for each

# "concat_inputs" are convolutions that read a skip connection's Concat. OpenVINO 2026.4 gets them
# wrong by 0.2 to 0.5 unless a Clip stands before their rounding (see `qdq`); a group of their own
# catches it if that comes back.
_CONCAT_INPUTS = "concat_inputs"
# Queries times keys and weights times values. Left in float they were most of what NNCF's graph of
# a wide UNet was faster by; rounded they nearly doubled the error there.
_PRODUCTS = "attention_products"
_STAGED = ("attention_qkv", "attention_out", _PRODUCTS, "feed_forward", "resnets", "layers")
# What may stand between the scores and their Softmax, and between that and the values.
_BEFORE_SOFTMAX = ("Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Transpose", "Where")
_AFTER_SOFTMAX = ("Cast", "Identity", "Reshape", "Transpose", "Where")
_EMBEDDINGS = re.compile(
    r"(^|_)(time|timestep|label|class|text|size|resolution|aspect|guidance|caption|context|add|"
    r"pooled|txt|vector)\w*(emb|embed|embedder|embedding|embeddings|projection)($|_)"
    r"|emb_proj|^(time|txt|text|vector|guidance|caption|context)_(in|proj)$|^encoder_hid_proj"
)
# Of a path's words, the first row with a match is the role.
_INSIDE: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("embeddings", _EMBEDDINGS),
    ("modulation", re.compile(r"^(ada|norm|modulation$|mod$|img_mod|txt_mod)", re.IGNORECASE)),
    ("shortcuts", re.compile(r"shortcut|^skip")),
    ("resampling", re.compile(r"samplers?$|^(down|up|re)sample")),
    ("attention_out", re.compile(r"^to_(add_)?out|^attn_out|^out_proj$|^proj_attn$")),
    ("attention_qkv", re.compile(r"^(to|add)_[qkv]+(_|$)|(^|_)([qkv]|kv|qkv)(_proj)?$")),
    ("attention_qkv", re.compile(r"^(query|key|value)$")),
    ("feed_forward", re.compile(r"^(ff|ffn|mlp|feed_forward)(_|$)|^proj_mlp$|^fc\d$|_mlp$")),
)  # fmt: skip
_ATTENTION = re.compile(r"^attn|attention")
_EDGES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("conv_out", re.compile(r"^(conv_out|proj_out|final|head$|out$|output)")),
    ("conv_in", re.compile(r"^(conv_in|proj_in|pos_embed|patch|x_embed|img_in|input|stem)")),
)


def module_path(scopes: str) -> str:
    """Return the torch module of a node, from its `name_scopes`: a list of paths from the root to
    the module, and then the operation."""
    names = re.findall(r"'([^']*)'", scopes)
    return names[-2] if len(names) > 1 else ""


def stage_of(path: str) -> str:
    """Return the outermost numbered block, such as "down_blocks.1", or the middle."""
    words = path.split(".")
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if following.isdigit():
            return f"{word}.{following}"
        if word.startswith("mid"):
            return word
    return ""


def role_of(path: str) -> str:
    """Return the role of a layer: "conv_in", "conv_out", "embeddings", "modulation",
    "attention_qkv", "attention_out", "feed_forward", "resnets", "resampling", "shortcuts", "layers"
    (of a block, unknown) or "other".
    """
    words, inside = path.split("."), bool(stage_of(path))
    for role, pattern in _INSIDE:
        if any(pattern.search(word) for word in words):
            return role
    if inside:
        if any(_ATTENTION.search(word) for word in words):
            return "attention_out"  # a spatial transformer's own projections in and out
        if words[-1] == "proj_out":
            return "feed_forward"  # of a block that computes attention and MLP side by side
        if any(word.startswith("res") or word in ("conv1", "conv2") for word in words):
            return "resnets"
        return "layers"
    for role, pattern in _EDGES:
        if any(pattern.search(word) for word in words):
            return role
    return "other"


def group_of(scopes: str) -> str:
    """Return the group of a node, from the `name_scopes` that torch's exporter notes on it: its
    role, and "role/block" for the roles with most of the work."""
    path = module_path(scopes)
    role, stage = role_of(path), stage_of(path)
    return f"{role}/{stage}" if stage and role in _STAGED else role


def role_of_group(group: str) -> str:
    return group.split("/", maxsplit=1)[0]


def node_groups(path: Path, *, max_groups: int = MAX_GROUPS) -> dict[str, list[str]]:
    """Return {group: names of its nodes} in the order of the graph: nodes with constant weights,
    and attention's products.

    Deep networks have more blocks than a scan can afford; neighbouring blocks of a role are merged
    ("feed_forward/transformer_blocks.0..transformer_blocks.5") until `max_groups` are left, or one
    group for each role.

    Raises:
        ExportError: no node has constant weights.
    """
    groups = group_nodes(load_structure(path), max_groups=max_groups)
    if not groups:
        raise ExportError(f"{path}: no layer with constant weights to quantise")
    return groups


def group_nodes(model: Any, *, max_groups: int = MAX_GROUPS) -> dict[str, list[str]]:
    """Return `node_groups` of a loaded ModelProto; may be empty."""
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    groups: dict[str, list[str]] = {}
    for node in weighted_nodes(model):
        if producers.get(node.input[0]) == "Concat" and node.op_type == "Conv":
            group = _CONCAT_INPUTS
        else:
            group = group_of(_scopes(node))
        groups.setdefault(group, []).append(node.name)
    for node in product_nodes(model) if groups else []:
        stage = stage_of(module_path(_scopes(node)))
        groups.setdefault(f"{_PRODUCTS}/{stage}" if stage else _PRODUCTS, []).append(node.name)
    return _merge(groups, max_groups)


def included_nodes(groups: dict[str, list[str]], keep_fp32: Collection[str]) -> list[str]:
    """Return the names of the nodes that are not in a group to keep."""
    return [name for group, names in groups.items() if group not in keep_fp32 for name in names]


def weighted_nodes(model: Any) -> list[Any]:
    """Return Conv, Gemm and MatMul nodes whose second operand is a constant of 2 or more axes."""
    ranks = {item.name: len(item.dims) for item in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type in WEIGHTED_OPS and ranks.get(node.input[1], 0) >= 2
    ]


def product_nodes(model: Any) -> list[Any]:
    """Return both MatMul nodes of every softmax attention, in the order of the graph: the one that
    makes the scores and the one that reads the weights. Neither has a constant operand.

    Other products, such as of positions and frequencies, are not rounded: a sine may follow.
    """
    constants = {item.name for item in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def makers_of(node: Any) -> list[Any]:
        return [producers[name] for name in node.input if name in producers]

    def readers_of(node: Any) -> list[Any]:
        return [reader for name in node.output for reader in readers.get(name, [])]

    found: set[str] = set()
    for neighbours, through in ((makers_of, _BEFORE_SOFTMAX), (readers_of, _AFTER_SOFTMAX)):
        todo = [node for node in model.graph.node if node.op_type == "Softmax"]
        seen: set[str] = set()
        while todo:
            for node in neighbours(todo.pop()):
                if node.op_type == "MatMul" and not constants.intersection(node.input):
                    found.add(node.name)
                elif node.op_type in through and node.output[0] not in seen:
                    seen.add(node.output[0])
                    todo.append(node)
    return [node for node in model.graph.node if node.name in found]


def _scopes(node: Any) -> str:
    return next((str(p.value) for p in node.metadata_props if p.key.endswith("name_scopes")), "")


def _merge(groups: dict[str, list[str]], limit: int) -> dict[str, list[str]]:
    """Merge into at most `limit` groups: every role gets at most k runs of neighbouring blocks,
    with k as large as possible."""
    roles: dict[str, list[str]] = {}
    for group in groups:
        roles.setdefault(role_of_group(group), []).append(group)
    parts = max((len(members) for members in roles.values()), default=1)
    while parts > 1 and sum(min(parts, len(m)) for m in roles.values()) > limit:
        parts -= 1
    merged: dict[str, list[str]] = {}
    for role, members in roles.items():
        count = min(parts, len(members))
        for index in range(count):
            run = members[index * len(members) // count : (index + 1) * len(members) // count]
            merged[_run_name(role, run)] = [name for group in run for name in groups[group]]
    return merged


def _run_name(role: str, run: list[str]) -> str:
    first, last = (group.partition("/")[2] for group in (run[0], run[-1]))
    if len(run) == 1:
        return run[0]
    return f"{role}/{first}..{last}"
