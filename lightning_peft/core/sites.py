"""Where a method acts: `sites(model, "q,v")` turns roles, globs and regexes into modules, and is strict about it."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_peft.core import architectures as arch
from lightning_peft.core.architectures import Node

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o", "qkv"),
    "cross": ("cross.q", "cross.k", "cross.v", "cross.o", "cross.qkv"),
    "ffn": ("up", "gate", "down"),
    "all-linear": (),
}
ROLES = (
    "q", "k", "v", "o", "qkv", "cross.q", "cross.k", "cross.v", "cross.o", "cross.qkv", "attend", "cross.attend",
    "up", "gate", "down", "block", "norm", "norm.qk", "embed", "head",
)  # fmt: skip
LONG = {"query": "q", "key": "k", "value": "v", "output": "o"}
ALIASES = {
    **{f"attention.{long}": short for long, short in LONG.items()},
    **{f"cross_attention.{long}": f"cross.{short}" for long, short in LONG.items()},
    **{f"ffn.{name}": name for name in ("up", "gate", "down")},
    "cross_attention": "cross",
    "embedding.token": "embed",
    "embedding.patch": "embed",
    "attention.qkv": "qkv",
}


Key = tuple[int, "Columns | None", "str | None"]


class TargetError(ValueError):
    """A target, exclusion, layer or role that does not fit the model."""


@dataclass(frozen=True)
class Columns:
    """The output features of a packed projection that belong to one site.

    y.unflatten(-1, (groups, -1))[..., start:stop].flatten(-2)
    """

    start: int
    stop: int
    groups: int = 1

    @property
    def size(self) -> int:
        """How many output features."""
        return (self.stop - self.start) * self.groups

    def take(self, y: Tensor, dim: int = -1) -> Tensor:
        """The part of `y` along `dim`: (..., packed, ...) -> (..., size, ...)."""
        y = y.movedim(dim, -1).unflatten(-1, (self.groups, -1))[..., self.start : self.stop]
        return y.flatten(-2).movedim(-1, dim)

    def put(self, y: Tensor, part: Tensor, dim: int = -1) -> Tensor:
        """A new tensor: `y` with its part replaced; gradients reach both."""
        y = y.movedim(dim, -1).unflatten(-1, (self.groups, -1))
        part = part.movedim(dim, -1).unflatten(-1, (self.groups, -1))
        whole = torch.cat([y[..., : self.start], part, y[..., self.stop :]], -1)
        return whole.flatten(-2).movedim(-1, dim)


@dataclass(frozen=True)
class Facts:
    """What the model says about the stack that a site is in; None where it does not say."""

    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    causal: bool | None = None


@dataclass(frozen=True, eq=False)
class Site:
    """A place where an adapter can go: a module, a slice of one (`columns`), or a place inside one (`part`)."""

    name: str
    module: nn.Module
    role: str | None
    columns: Columns | None = None
    part: str | None = None
    block: str = ""
    layer: int | None = None
    layers: int | None = None
    stack: str = ""
    facts: Facts = Facts()

    @property
    def in_features(self) -> int:
        """Width of what goes in."""
        return self._features()[0]

    @property
    def out_features(self) -> int:
        """Width of what comes out, of the slice where there is one."""
        return self.columns.size if self.columns else self._features()[1]

    def _features(self) -> tuple[int, int]:
        m = self.module
        if isinstance(m, nn.MultiheadAttention) and self.part in ("q", "k", "v", "o"):
            return {"k": m.kdim, "v": m.vdim}.get(self.part, m.embed_dim), m.embed_dim
        if pair := arch.features(m):
            return pair
        width = self.facts.hidden if self.role in ("block", "embed", "attend", "cross.attend") else None
        if self.role in ("norm", "norm.qk"):
            width = arch.norm_width(m)
        if width:
            return width, width
        raise TargetError(
            f"{self.name} ({type(m).__name__}) has no in_features and out_features. Known: Linear, Conv1D, Embedding, "
            "ConvNd, norms, and blocks and attention modules of a known width. Target a projection inside it."
        )


class Sites(list[Site]):
    """The selected sites in module order, and how many each pattern gave."""

    def __init__(
        self,
        items: Iterable[Site] = (),
        report: dict[str, int] | None = None,
        known: Iterable[Site] = (),
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(items)
        self.report: dict[str, int] = report or {}
        self.known: tuple[Site, ...] = tuple(known)
        self.model = model if model is not None else nn.Module()  # of a list made by hand nothing is known

    def sibling(self, site: Site, role: str) -> Site | None:
        """The site of another role in the same block, selected or not; of several the one nearest by name."""
        role = ALIASES.get(role, role)
        same = [s for s in self.known if s.role == role and s.block == site.block]
        return max(same, key=lambda s: _shared(s.name, site.name), default=None)


def _shared(a: str, b: str) -> int:
    pairs = list(zip(a.split("."), b.split("."), strict=False))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))


def sites(
    model: nn.Module,
    targets: str | list[str],
    *,
    layers: str | int | list[int] | None = None,
    exclude: str | list[str] | None = None,
    roles: dict[str, str] | None = None,
) -> Sites:
    """The places that `targets` names in `model`.

    A token is a role (`q`), a group (`attention`, `ffn`, `all-linear`), a glob or dotted name (the whole name or its
    last components; `*` crosses dots), or `re:...` (full match, takes the rest of the string). A trailing `?` makes it
    optional. Errors: TargetError for a token that matches nothing, a layer out of range, an unreadable pattern.
    """
    known = _Map(model, roles or {})
    chosen = {token: known.match(token, f"targets={targets!r}") for token in tokens(targets, "targets")}
    dropped = [] if exclude is None else tokens(exclude, "exclude")
    out = {_key(s) for token in dropped for s in known.match(token, f"exclude={exclude!r}")}
    keep = {_key(s): s for found in chosen.values() for s in found if not out & {_key(s), (id(s.module), None, None)}}
    if layers is not None:
        keep = _in_layers(keep, layers)
    if not keep and any(chosen.values()):
        before = ", ".join(f"{token} ({len(found)})" for token, found in chosen.items())
        raise TargetError(f"exclude={exclude!r} and layers={layers!r} leave no site of targets={targets!r}: {before}.")
    report = {token: len({_key(s) for s in found} & set(keep)) for token, found in chosen.items()}
    return Sites(sorted(keep.values(), key=known.order), report, known.sites, model)


def find(model: nn.Module, patterns: str | list[str]) -> dict[str, nn.Module]:
    """Dotted name -> module for the same tokens as `sites`, over all modules: heads to train, modules to save."""
    known, found = _Map(model, {}), set()
    for token in tokens(patterns, "patterns"):
        here = known.match(token, f"patterns={patterns!r}")
        found |= {s.name for s in here} if known.is_word(token) else {n.name for n in known.named(_bare(token))}
    return {node.name: node.module for node in known.nodes if node.name in found}


def roles(model: nn.Module, given: dict[str, str] | None = None) -> dict[str, list[Site]]:
    """Everything that is known about the model: role -> its sites in module order. given: the user's own names."""
    return _Map(model, given or {}).roles


def _key(site: Site) -> Key:
    return id(site.module), site.columns, site.part


def tokens(spec: object, option: str) -> list[str]:
    """ "a, b, re:c,d" -> a, b, re:c,d; a list is taken item by item."""
    items = [spec] if isinstance(spec, str) else spec
    if not isinstance(items, Iterable) or not all(isinstance(item, str) for item in items):
        raise TargetError(f"{option}={spec!r} is not a string or a list of strings.")
    found = [token for item in items for token in _split(item)]
    if not found:
        raise TargetError(f"{option}={spec!r} is empty. Name a role, a glob or a regex, such as 'q,v' or '*.q_proj'.")
    return found


def _split(text: str) -> Iterator[str]:
    head, _, tail = text.partition(",")
    if text.lstrip().startswith("re:"):
        head, tail = text, ""
    if head.strip():
        yield head.strip()
    if tail:
        yield from _split(tail)


def _in_layers(found: dict[Key, Site], layers: object) -> dict[Key, Site]:
    """Those whose block is among `layers` of its stack; what is outside of all blocks is not."""
    inside = {key: s for key, s in found.items() if s.layer is not None}
    counts = {s.stack: s.layers or 0 for s in inside.values()}
    wanted = {stack: _indices(layers, count, stack) for stack, count in counts.items()}
    return {key: s for key, s in inside.items() if s.layer in wanted[s.stack]}


def _indices(layers: object, count: int, stack: str) -> set[int]:
    """Numbers of blocks: "last:6", "first:4", "2-5", "9-", "0,3,7", 3 or [0, 3, 7] in a stack of `count`."""
    items = layers.split(",") if isinstance(layers, str) else layers if isinstance(layers, Iterable) else [layers]
    numbers = {number for item in items for number in _range(str(item).strip(), count, layers)}
    if wrong := sorted(n for n in numbers if not 0 <= n < count):
        raise TargetError(
            f"layers={layers!r} asks for block {wrong[0]}, but {f'the stack {stack!r}' if stack else 'the model'} has "
            f"{count}, 0 to {count - 1}. For one stack of several narrow the targets, such as 're:decoder.*q'."
        )
    return numbers


def _range(item: str, count: int, layers: object) -> range:
    if re.fullmatch(r"\d+-", item):
        return range(int(item[:-1]), max(count, int(item[:-1]) + 1))
    match = re.fullmatch(r"(first:|last:|\d+-)?(\d+)", item)
    if match is None:
        raise TargetError(
            f"layers={layers!r} is not understood. Write 'last:6', 'first:4', '2-5', '9-', '0,3,7' or [0, 3]."
        )
    kind, number = match[1] or "", int(match[2])
    if kind == "first:":
        return range(number)
    if kind == "last:":
        return range(count - number, count)
    return range(int(kind[:-1]) if kind else number, number + 1)


class _Map:
    """One reading of a model: its nodes, the sites they are, and the matching of tokens."""

    def __init__(self, model: nn.Module, given: dict[str, str]) -> None:
        self.nodes = arch.walk(model)
        self.index = {id(node.module): i for i, node in enumerate(self.nodes)}
        self.roles: dict[str, list[Site]] = {}
        self.given = {ALIASES.get(role, role): self._own(model, role, pattern) for role, pattern in given.items()}
        self.found, self.attention = arch.projections(self.nodes, self.given)
        lists = arch.siblings(self.given.get("block", [])) or arch.blocks(self.nodes, self.attention)
        arch.place(self.nodes, lists)
        self.blocks = {block for elements in lists for block in elements}
        arch.settle(self.found, self.attention, self.blocks, self.given)
        self.owners = arch.owners(self.attention)
        self.facts: dict[Node, Facts] = {}
        self.heads = arch.heads(self.nodes)
        self.sites = sorted((site for node in self.nodes for site in self._sites(node)), key=self.order)
        self.roles = self._roles()
        self.by_module: dict[int, list[Site]] = {}
        for site in self.sites:
            self.by_module.setdefault(id(site.module), []).append(site)

    def _own(self, model: nn.Module, role: str, pattern: str) -> list[Node]:
        """The modules that the user's own map gives a role."""
        option = f"roles[{role!r}]"
        if ALIASES.get(role, role) in GROUPS:
            raise TargetError(f"{option}: {role!r} is a group of roles. Name single ones, such as 'q', 'o' or 'up'.")
        found = [node for token in tokens(pattern, option) for node in self.named(token)]
        if not found:
            self.roles = _Map(model, {}).roles
            raise TargetError(f"No module matches {option}={pattern!r}. {self._nearest(pattern)}")
        return found

    def _sites(self, node: Node) -> Iterator[Site]:
        """The sites that are at one module: what the user says, then what the tables say of the roles left to them."""
        for role, nodes in self.given.items():
            if node in nodes:
                yield self._site(node, role, part="attend" if "attend" in role else None)
        for role, part, span in self._table(node):
            if role not in self.given:
                yield self._site(node, role, part, Columns(*span) if span else None)

    def _table(self, node: Node) -> Iterator[tuple[str, str | None, tuple[int, int, int] | None]]:
        if node in self.found:
            yield from self._projection(node)
        if node in self.attention:
            cross = "cross." if self.attention[node] else ""
            parts = ("q", "k", "v", "o") if isinstance(node.module, nn.MultiheadAttention) else ()
            yield from ((cross + part, part, None) for part in (*parts, "attend"))
        if role := arch.whole(node, self.blocks, self.heads):
            yield role, None, None

    def _projection(self, node: Node) -> Iterator[tuple[str, None, tuple[int, int, int] | None]]:
        """A role, or the slices of a packed layout, or the role "qkv" for one that cannot be cut."""
        layout = self.found[node].removeprefix("cross.")
        cross = self.found[node].removesuffix(layout)
        if layout not in arch.PACKED and layout != "opaque":
            yield cross + layout, None, None
            return
        facts = self._facts(node, cross + layout)
        _, out = arch.features(node.module) or (0, 0)
        spans = {} if layout == "opaque" else arch.columns(layout, out, facts.heads, facts.kv_heads, facts.head_dim)
        yield from ((cross + role, None, span) for role, span in spans.items())
        if not spans:
            yield f"{cross}qkv", None, None

    def _site(self, node: Node, role: str | None, part: str | None = None, columns: Columns | None = None) -> Site:
        block = node.block.name if node.block else ""
        facts = self._facts(node, role)
        return Site(node.name, node.module, role, columns, part, block, node.layer, node.layers, node.stack, facts)

    def _facts(self, node: Node, role: str | None) -> Facts:
        start = node.block if node.block and role in ("norm", "block") else node
        owner = next((self.owners[n] for n in start.ancestors() if n in self.owners), None)
        if owner is None:
            return Facts(*arch.configured(node))
        if owner not in self.facts:
            facts = Facts(*arch.facts(owner, self.found))
            self.facts[owner] = replace(facts, causal=False) if self.attention[owner] else facts
        return self.facts[owner]

    def _roles(self) -> dict[str, list[Site]]:
        found: dict[str, list[Site]] = {role: [] for role in (*ROLES, *self.given)}
        for site in self.sites:
            found[str(site.role)].append(site)
        return {role: sites for role, sites in found.items() if sites}

    def order(self, site: Site) -> tuple[int, int]:
        """Module order, and within a module the order of the roles."""
        return self.index[id(site.module)], ROLES.index(site.role) if site.role in ROLES else len(ROLES)

    def match(self, token: str, option: str) -> list[Site]:
        """The sites that one token names; TargetError where there is none and the token does not end in `?`."""
        found = self._lookup(_bare(token))
        if not found and token == _bare(token):
            raise TargetError(f"No module matches {token!r} in {option}. {self._nearest(token)}")
        return found

    def is_word(self, token: str) -> bool:
        """Whether it is a role or a group rather than a pattern."""
        name = ALIASES.get(_bare(token), _bare(token))
        return name in GROUPS or name in ROLES or name in self.given

    def _lookup(self, token: str) -> list[Site]:
        name = ALIASES.get(token, token)
        if not self.is_word(token):
            return [self._whole(node) for node in self.named(token)]
        if name == "all-linear":
            return self._linear()
        return [s for role in GROUPS.get(name, (name,)) for s in self.roles.get(role, ())]

    def _linear(self) -> list[Site]:
        """Every projection in a block, known by role or not; every one outside of heads where there are no blocks."""
        roles = set(arch.PROJECTED) | {"qkv", "cross.qkv"}
        known = [s for s in self.sites if s.role in roles]
        taken = {id(s.module) for s in known} | {id(m) for s in self.roles.get("head", ()) for m in s.module.modules()}
        rest = [n for n in self.nodes if arch.is_linear(n.module) and id(n.module) not in taken and not _inner(n)]
        return known + [self._site(n, None) for n in rest if n.block or not self.blocks]

    def _whole(self, node: Node) -> Site:
        """The site that a whole module is; for the out_proj of a MultiheadAttention, never called, its part "o"."""
        node, part = (node.parent, "o") if _inner(node) and node.parent else (node, None)
        here = (s for s in self.by_module.get(id(node.module), ()) if s.columns is None and s.part == part)
        return next(here, None) or self._site(node, None, part)

    def named(self, pattern: str) -> list[Node]:
        """Nodes whose dotted name, or its last components, match a glob; or the whole of it a `re:` regex."""
        try:
            regex = re.compile(pattern[3:] if pattern.startswith("re:") else f"(?:.*\\.)?{fnmatch.translate(pattern)}")
        except re.error as error:
            raise TargetError(f"{pattern!r} is not a regular expression: {error}.") from None
        return [node for node in self.nodes[1:] if regex.fullmatch(node.name)]

    def _nearest(self, token: str) -> str:
        """What is known, for an error: roles with their counts, and the names that look like `token`."""
        names = sorted({node.name if "." in token else node.leaf for node in self.nodes[1:]})
        near = difflib.get_close_matches(token, [*ALIASES, *GROUPS, *names], n=4, cutoff=0.5)
        same = ["re:" + re.escape(node.name) for node in self.nodes[1:] if node.leaf == token][:2]
        known = ", ".join(f"{role} ({len(sites)})" for role, sites in self.roles.items()) or "none"
        return (
            f"Roles known for this model: {known}. Nearest names: {', '.join(same + near) or 'none'}. A glob matches "
            "the whole dotted name or its last components; roles={'q': '*.to_query'} names a role yourself."
        )


def _bare(token: str) -> str:
    """The token without the `?` that makes it optional."""
    return token[:-1] if token.endswith("?") and not token.startswith("re:") else token


def _inner(node: Node) -> bool:
    return node.parent is not None and isinstance(node.parent.module, nn.MultiheadAttention)
