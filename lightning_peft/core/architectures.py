"""What the families call things: module names -> roles, packed layouts, configuration keys, and how blocks are found.

The tables are tried on every module of every model, since no two families use one name in one place for two things.
A new family is a new word in a table; what no table knows falls back on structure (`structural`), then on the user's
own map. In a gated feed-forward layer, `down(act(gate(x)) * up(x))`, the gate is the half that is activated.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import nn

SELF = r"(?:attention|attn|self_attn|self_attention|SelfAttention|attn1)(?:\.self|\.attention)?"
CROSS = r"(?:crossattention|cross_attention|cross_attn|encoder_attn|EncDecAttention|multihead_attn|attn2)(?:\.self)?"
ATTENTION = rf"(?:{SELF}|{CROSS})"
OUTPUT = rf"(?:{SELF}|{CROSS})(?:\.output)?"
FFN = r"(?:mlp|ffn|feed_forward|DenseReluDense|experts\.\d+|shared_experts?)"

# parent path (its last components) -> child -> role; the packed ones ("qkv", "gate_up", ...) are split below
PROJECTIONS: dict[str, dict[str, str]] = {
    ATTENTION: {
        **dict.fromkeys(("query", "query_proj", "q_proj", "q_lin", "q", "q_attn", "wq", "to_q"), "q"),
        **dict.fromkeys(("key", "key_proj", "k_proj", "k_lin", "k", "wk", "to_k"), "k"),
        **dict.fromkeys(("value", "value_proj", "v_proj", "v_lin", "v", "wv", "to_v"), "v"),
        **dict.fromkeys(("qkv", "qkv_proj", "Wqkv"), "qkv"),  # timm, Phi-3, ModernBERT: all q, all k, all v
        "query_key_value": "heads",  # NeoX, BLOOM, Falcon: q, k, v of the first head group, then of the next
    },
    SELF: {"c_attn": "qkv"},
    CROSS: {"c_attn": "kv"},  # GPT-2: there q has a projection of its own, q_attn
    OUTPUT: dict.fromkeys(("dense", "o_proj", "out_proj", "out_lin", "o", "c_proj", "proj", "Wo", "wo"), "o"),
    rf"{ATTENTION}\.to_out": {"0": "o"},
    FFN: {
        **dict.fromkeys(("up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "lin1", "wi", "wi_1"), "up"),
        **dict.fromkeys(("gate_proj", "wi_0"), "gate"),
        **dict.fromkeys(("gate_up_proj", "Wi", "w12"), "gate_up"),
        **dict.fromkeys(("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "lin2", "wo", "Wo"), "down"),
    },
    r"feed_forward": {"w1": "gate", "w2": "down", "w3": "up", "intermediate_dense": "up", "output_dense": "down"},
    r"mlp": {"w3": "down"},
    r"ff\.net": {"2": "down"},  # diffusers
    r"ff\.net\.0": {"proj": "up"},  # "up_gate" where the activation is gated
    r"intermediate": {"dense": "up"},
    r"(?:layer|blocks)\.\d+\.output": {"dense": "down"},
    r"layers?\.\d+": {"fc1": "up", "linear1": "up", "fc2": "down", "linear2": "down"},
    r"albert_layers\.\d+": {"ffn": "up", "ffn_output": "down"},
}
PACKED = {
    "qkv": ("q", "k", "v"),
    "heads": ("q", "k", "v"),
    "kv": ("k", "v"),
    "gate_up": ("gate", "up"),
    "up_gate": ("up", "gate"),
}
GATED = {"GEGLU", "SwiGLU"}  # classes that hold both halves as one `proj`, the activated one last
SIBLING = {"w3": "w12"}  # the child name that counts only beside another one, under `mlp` (DINOv2's SwiGLU)
OPAQUE = {"CodeGenAttention", "GPTBigCodeAttention"}  # packed in an order that no slice describes: one role, "qkv"
PROJECTED = {"q", "k", "v", "o", "cross.q", "cross.k", "cross.v", "cross.o", "up", "gate", "down"}

TOKENS = re.compile(
    r"word_embeddings?|tok_embeddings?|token_embeddings?|embed_tokens|wte|embed_in|tok_emb|token_emb|embed(?:ding)?s?|emb"
)
PATCHES = re.compile(r"patch_embeddings?|patch_embed")
HEADS = re.compile(r"(?:\w+_)?classifier|score|qa_outputs|classification_head|multiple_choice_head|logits_proj")
TOP_HEADS = re.compile(r"heads?|fc|head_dist")  # too common a name to count below the top of a model, or beside HEADS
NOT_HEADS = re.compile(r"\w*(?:Prediction|Pooling|LM)Head")  # classes
QK_NORM = re.compile(r"(?:q|k|query|key)_?(?:layer_?)?norm|[qk]_ln")
STACKS = ("encoder", "decoder")

# attributes of an attention module, then keys of a configuration: the first that is there
ATTRIBUTES = {
    "hidden": ("embed_dim", "hidden_size"),
    "heads": ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim"),
}
CONFIG = {
    "hidden": ("hidden_size", "d_model", "n_embd", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "d_kv"),
}
# where the attention module does not say (or, CLIP's text tower, says otherwise): class of the module or an ancestor
CAUSAL = {
    "BloomAttention": True,
    "FalconAttention": True,
    "CLIPTextModel": True,
    "CLIPTextTransformer": True,
} | dict.fromkeys(("DisentangledSelfAttention", "VisionTransformer"), False)


Count = int | None


@dataclass(eq=False)
class Node:
    """A module in the tree of a model, each module once, adapters left out."""

    name: str
    module: nn.Module
    parent: "Node | None" = None
    children: list["Node"] = field(default_factory=list)
    block: "Node | None" = None
    layer: int | None = None
    layers: int | None = None
    stack: str = ""

    @property
    def leaf(self) -> str:
        """The last component of the name."""
        return self.name.rpartition(".")[2]

    def ancestors(self) -> Iterator["Node"]:
        """The node itself, its parent, and so on up to the root."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def below(self) -> Iterator["Node"]:
        """The node itself and everything under it, in module order."""
        yield self
        for child in self.children:
            yield from child.below()


def walk(model: nn.Module) -> list[Node]:
    """All modules in the order of `named_modules`, without adapters and the places that adapters made."""
    nodes, seen = [], {id(model)}
    stack = [Node("", model)]
    while stack:
        node = stack.pop()
        nodes.append(node)
        for key, child in node.module._modules.items():
            if child is not None and id(child) not in seen and not _foreign(key, child):
                seen.add(id(child))
                node.children.append(Node(f"{node.name}.{key}" if node.name else key, child, node))
        stack.extend(reversed(node.children))
    return nodes


def _foreign(key: str, module: nn.Module) -> bool:
    kind = type(module)
    return (key == "adapters" and kind.__name__ == "Adapters") or getattr(kind, "is_host", False) is True


def is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's transposed Linear, whose weight is (in, out)."""
    return hasattr(module, "nf") and any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def is_convolution(module: nn.Module) -> bool:
    """Conv1d, Conv2d, Conv3d; none that is transposed."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, Conv1D, and the quantised layers that have their face."""
    return is_conv1d(module) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a projection, an embedding or a convolution."""
    if is_conv1d(module):
        return module.nx, module.nf  # type: ignore[return-value]
    for pair in ("in_features", "out_features"), ("num_embeddings", "embedding_dim"), ("in_channels", "out_channels"):
        if hasattr(module, pair[0]) and hasattr(module, pair[1]):
            return getattr(module, pair[0]), getattr(module, pair[1])
    return None


def is_norm(node: Node) -> bool:
    """LayerNorm, RMSNorm, and the families' own; a wrapper such as `PreNorm(fn)` is none."""
    named = type(node.module).__name__.endswith("Norm") and not node.children
    return named or isinstance(node.module, (nn.LayerNorm, nn.RMSNorm))


def norm_width(module: nn.Module) -> int | None:
    """How many features a norm normalises; it may have no weight, or no `normalized_shape`."""
    shape = getattr(module, "normalized_shape", None) or getattr(getattr(module, "weight", None), "shape", None)
    return shape[-1] if shape else None


def _ends(pattern: str) -> Callable[[str], object]:
    return re.compile(rf"(?:.*\.)?{pattern}").fullmatch


def _by_child() -> dict[str, list[tuple[Callable[[str], object], str]]]:
    table: dict[str, list[tuple[Callable[[str], object], str]]] = {}
    for parent, children in PROJECTIONS.items():
        for child, role in children.items():
            table.setdefault(child, []).append((_ends(parent), role))
    return table


_TABLE = _by_child()
_CROSS = re.compile(rf"(?:.*\.)?{CROSS}(?:\.output|\.to_out)?")


def projection(node: Node) -> str | None:
    """Role or packed layout of a Linear by its path; "opaque" for a packed one that no slices describe."""
    parent = node.parent
    if parent is None or node.leaf not in _TABLE or _is_torch_attention(parent) or not is_linear(node.module):
        return None
    role = next((r for matches, r in _TABLE[node.leaf] if matches(parent.name) and _beside(parent, node.leaf, r)), None)
    if role == "up" and node.leaf == "proj" and type(parent.module).__name__ in GATED:
        role = "up_gate"
    if role in PACKED and type(parent.module).__name__ in OPAQUE:
        role = "opaque"
    return f"cross.{role}" if role and _CROSS.fullmatch(parent.name) else role


def _beside(parent: Node, child: str, role: str) -> bool:
    needed = SIBLING.get(child) if role == "down" else None
    return needed is None or hasattr(parent.module, needed)


def _is_torch_attention(node: Node) -> bool:
    return isinstance(node.module, nn.MultiheadAttention)


def projections(nodes: list[Node], given: dict[str, list[Node]]) -> tuple[dict[Node, str], dict[Node, bool]]:
    """The known projections -> role or layout, and the modules that attend -> whether to another sequence.

    What attends is the module that owns the query projection. What the user says goes before what the tables say.
    """
    found = {node: role for node in nodes if (role := projection(node)) and role not in given}
    found.update({node: role for role, own in given.items() if role in PROJECTED for node in own})
    owners = {n: _CROSS.fullmatch(n.name) is not None for n in nodes if _is_torch_attention(n)}
    for node, role in found.items():
        if node.parent and role.removeprefix("cross.") in ("q", "qkv", "heads", "opaque"):
            owners[node.parent] = role.startswith("cross.")
    for role in {"attend", "cross.attend"} & set(given):
        owners = {n: cross for n, cross in owners.items() if cross != (role == "cross.attend")}
        owners.update(dict.fromkeys(given[role], role == "cross.attend"))
    return found, owners


def settle(
    found: dict[Node, str], attention: dict[Node, bool], blocks: set[Node], given: dict[str, list[Node]]
) -> None:
    """Drop what is outside of the blocks (poolers, heads), and look at shapes for the roles that no name has shown."""
    mine = {node for nodes in given.values() for node in nodes}
    for table in (found, attention):
        for node in [n for n in table if blocks and n.block is None and n not in mine]:
            del table[node]
    taken = _taken(found, attention, given)
    if taken >= {"o", "up", "down"}:
        return
    for block in blocks:
        new = {n: role for n, role in structural(block).items() if role not in taken and n not in found}
        found.update(new)
        attention.update({n.parent: False for n, role in new.items() if role == "o" and n.parent not in (None, block)})


def _taken(found: dict[Node, str], attention: dict[Node, bool], given: dict[str, list[Node]]) -> set[str]:
    """The roles that names have shown."""
    names = {role.removeprefix("cross.") for role in found.values()} | set(given)
    names |= {role for layout, roles in PACKED.items() if layout in names for role in roles}
    return names | ({"opaque"} if attention else set()) | {"o" for n in attention if _is_torch_attention(n)}


def owners(attention: dict[Node, bool]) -> dict[Node, Node]:
    """Node -> the first attention module in it, self-attention before cross-attention."""
    first: dict[Node, Node] = {}
    for node in sorted(attention, key=attention.__getitem__):
        for above in node.ancestors():
            first.setdefault(above, node)
    return first


def heads(nodes: list[Node]) -> set[Node]:
    """The task heads: by a name that only heads have, else by a common one at the top of the model."""
    free = [n for n in nodes if n.block is None and n.parent and not NOT_HEADS.fullmatch(type(n.module).__name__)]
    named = [n for n in free if HEADS.fullmatch(n.leaf)]
    top = [n for n in free if TOP_HEADS.fullmatch(n.leaf) and n.name.count(".") < 2]
    found = set(named or top)
    return {n for n in found if n.parent and not found & set(n.parent.ancestors())}


def whole(node: Node, blocks: set[Node], heads: set[Node]) -> str | None:
    """The role of a module that is no projection."""
    if node in blocks:
        return "block"
    if is_norm(node):
        return "norm.qk" if QK_NORM.fullmatch(node.leaf) else "norm"
    if node.block is None and is_embedding(node):
        return "embed"
    return "head" if node in heads else None


def is_embedding(node: Node) -> bool:
    """Token embeddings, and the modules that make patches of an image; not positions, not types."""
    tokens = isinstance(node.module, nn.Embedding) and TOKENS.fullmatch(node.leaf)
    return bool(tokens or PATCHES.fullmatch(node.leaf))


def siblings(nodes: list[Node]) -> list[list[Node]]:
    """Nodes grouped by parent."""
    groups: dict[Node | None, list[Node]] = {}
    for node in nodes:
        groups.setdefault(node.parent, []).append(node)
    return list(groups.values())


def blocks(nodes: list[Node], attention: dict[Node, bool]) -> list[list[Node]]:
    """Lists of blocks: outermost lists whose elements hold at most one self-attention each; else repeated modules.

    A list element that is only a container of a list (ALBERT's layer groups) is no block.
    """
    count: Counter[Node] = Counter()
    for node, cross in attention.items():
        for above in node.ancestors():
            count[above] += 1 if not cross else 0
    some = {above for node in attention for above in node.ancestors()}
    found = _outermost(nodes[0], lambda e: e in some, lambda e: count[e] <= 1)
    return found or _outermost(nodes[0], _has_linear, lambda e: bool(e.children), repeated=True)


def _has_linear(node: Node) -> bool:
    return any(is_linear(n.module) for n in node.below())


def _outermost(
    root: Node, some: Callable[[Node], bool], each: Callable[[Node], bool], repeated: bool = False
) -> list[list[Node]]:
    found: list[list[Node]] = []
    stack = [root]
    while stack:
        node = stack.pop()
        if _is_block_list(node, some, each, repeated):
            found.append(node.children)
        elif _is_layer(node):
            found.append([node])
        else:
            stack.extend(reversed(node.children))
    return found


def _is_layer(node: Node) -> bool:
    return isinstance(node.module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))


def _is_list(node: Node) -> bool:
    return isinstance(node.module, (nn.ModuleList, nn.Sequential)) and bool(node.children)


def _is_group(node: Node, some: Callable[[Node], bool]) -> bool:
    """Nothing but a list of blocks (ALBERT), unlike a block that keeps its own parts in a list (T5)."""
    return len(node.children) == 1 and _is_list(node.children[0]) and all(map(some, node.children[0].children))


def _is_block_list(node: Node, some: Callable[[Node], bool], each: Callable[[Node], bool], repeated: bool) -> bool:
    if not _is_list(node) or any(_is_group(e, some) for e in node.children):
        return False
    if repeated and (len(node.children) < 2 or len({type(e.module) for e in node.children}) > 1):
        return False
    mixed = any if isinstance(node.module, nn.ModuleList) else all  # a Sequential may hold an embedding and a head too
    return mixed(map(some, node.children)) and all(map(each, node.children))


def structural(block: Node) -> dict[Node, str]:
    """Roles that follow from shapes alone: the output of an attention, and a feed-forward pair.

    Which of several equal projections is q, k or v, or which of two is the gate, cannot be seen: those are left out.
    """
    found: dict[Node, str] = {}
    for parent in block.below():
        linears = [n for n in parent.children if isinstance(n.module, nn.Linear)]
        pair = _feed_forward(linears)
        rest = linears[: -len(pair)] if pair else linears
        found.update({n: role for n, role in pair.items() if role})
        found.update(_output(rest))
    return found


def _shape(node: Node) -> tuple[int, int]:
    return features(node.module) or (0, 0)


def _feed_forward(linears: list[Node]) -> dict[Node, str]:
    """The last two (or three, of which nobody can tell up from gate: "") of a wide pair: d -> k, k -> d."""
    if len(linears) < 2:
        return {}
    *before, up, down = linears
    width, inner = _shape(up)
    if _shape(down) != (inner, width) or inner <= width:
        return {}
    if before and _shape(before[-1]) == (width, inner):
        return {before[-1]: "", up: "", down: "down"}
    return {up: "up", down: "down"}


def _output(linears: list[Node]) -> dict[Node, str]:
    """The last projection beside at least two others that read the same width, or beside one that is three times it."""
    shapes = [_shape(n) for n in linears]
    if len(shapes) < 2 or len({s[0] for s in shapes}) > 1 or shapes[-1][0] != shapes[-1][1]:
        return {}
    if len(shapes) == 2:
        return {linears[0]: "opaque", linears[1]: "o"} if shapes[0][1] == 3 * shapes[0][0] else {}
    return {linears[-1]: "o"}


def place(nodes: list[Node], lists: list[list[Node]]) -> None:
    """Number the blocks of each stack and tell every node its block and its stack.

    Lists that differ by an index in their path (ALBERT's groups, Swin's stages) are one stack, numbered through.
    """
    stacks: dict[str, list[Node]] = {}
    for elements in lists:
        path = elements[0].parent.name if elements[0].parent else ""
        stacks.setdefault(re.sub(r"\.\d+(?=\.|$)", ".#", path), []).extend(elements)
    towers = _towers(list(stacks))
    for node in nodes:
        inside = [path for path in towers if f"{node.name}.".startswith(f"{path}.")]
        tower = towers[max(inside, key=len)] if inside else ""
        node.stack = ".".join(filter(None, (tower, _nearest(node.name))))
    for elements in stacks.values():
        for layer, element in enumerate(elements):
            for node in element.below():
                node.block, node.layer, node.layers = element, layer, len(elements)


def _nearest(path: str) -> str:
    return next((part for part in reversed(path.split(".")) if part in STACKS), "")


def _root(path: str) -> str:
    """Path of the tower that a list of blocks belongs to, without the `encoder` or `decoder` that names its stack."""
    parts = path.split(".")[:-1]
    cut = max((i for i, part in enumerate(parts) if part in STACKS), default=len(parts))
    return ".".join(parts[:cut])


def _towers(paths: list[str]) -> dict[str, str]:
    """Root -> its own part of the name, for the stacks which `encoder` or `decoder` alone would not tell apart."""
    names = [_nearest(path) for path in paths]
    double = [path for path, name in zip(paths, names, strict=True) if names.count(name) > 1]
    roots = [_root(path) if len({_root(p) for p in double}) == len(double) else path for path in double]
    split = [root.split(".") for root in roots]
    shared = 0
    while split and all(len(s) > shared + 1 for s in split) and len({s[shared] for s in split}) == 1:
        shared += 1
    return {root: ".".join(s[shared:]) for root, s in zip(roots, split, strict=True)}


def facts(node: Node, found: dict[Node, str]) -> tuple[Count, Count, Count, Count, bool | None]:
    """Of the attention module `node`: hidden, heads, kv_heads, head_dim, causal.

    From its shapes, else from its attributes, else from the nearest configuration.
    """
    shape = {found[n].removeprefix("cross."): _shape(n) for n in node.children if n in found}
    reads = (shape[role][0] for role in ("q", "qkv", "heads", "opaque") if role in shape)
    hidden = next(reads, None) or _number(node, "hidden") or shape.get("o", (0, None))[1]
    heads = _number(node, "heads")
    head_dim = _number(node, "head_dim") or (hidden // heads if hidden and heads else None)
    if heads and "q" in shape:
        head_dim = shape["q"][1] // heads
    kv_heads = shape["k"][1] // head_dim if head_dim and "k" in shape else _number(node, "kv_heads") or heads
    return hidden, heads, kv_heads, head_dim, _causal(node)


def configured(node: Node) -> tuple[Count, Count, Count, Count]:
    """The same, without causal, where no attention module is known: from the nearest configuration only."""
    hidden, heads, kv_heads, head_dim = (_configured(node, CONFIG[key]) for key in ATTRIBUTES)
    return hidden, heads, kv_heads, head_dim


def _number(node: Node, fact: str) -> int | None:
    return _first(node.module, ATTRIBUTES[fact]) or _configured(node, CONFIG[fact])


def _configured(node: Node, names: tuple[str, ...]) -> int | None:
    """The first of `names` in the configuration nearest to `node` that has one."""
    values = (_first(getattr(n.module, "config", None), names) for n in node.ancestors())
    return next((value for value in values if value), None)


def _first(owner: object, names: tuple[str, ...]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def _causal(node: Node) -> bool | None:
    said = (CAUSAL.get(type(n.module).__name__) for n in node.ancestors())
    own = (getattr(node.module, name, None) for name in ("is_causal", "is_decoder"))
    return next((value for value in (*said, *own) if isinstance(value, bool)), None)


def columns(
    layout: str, out: int, heads: int | None, kv: int | None, head_dim: int | None
) -> dict[str, tuple[int, int, int]]:
    """Role -> (start, stop, groups) of a packed projection with `out` features; empty where the widths do not fit.

    q, k and v of a grouped-query projection are heads, kv and kv head sizes wide. "heads" repeats that for each
    key/value head; the others hold their parts one after the other.
    """
    groups, unit = 1, [1] * len(PACKED[layout])
    if layout in ("qkv", "heads") and heads and kv:
        groups = kv if layout == "heads" else 1
        unit = [heads // groups, kv // groups, kv // groups]
    size, left = divmod(out, groups * sum(unit))
    unsure = layout == "heads" and not heads
    if left or unsure or (len(set(unit)) > 1 and size != head_dim):
        return {}
    stops = [sum(unit[: i + 1]) * size for i in range(len(unit))]
    return {role: (stop - n * size, stop, groups) for role, stop, n in zip(PACKED[layout], stops, unit, strict=True)}
