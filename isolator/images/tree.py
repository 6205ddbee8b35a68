"""What a stack of layers makes of the paths that matter, without unpacking anything.

Layers are laid over each other in the manifest's order, with whiteouts. Engines differ in what happens when
a layer writes through a symbolic link (one storage driver follows it, another puts a folder in its place),
so that is refused rather than decided: honest builders write real paths.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from isolator.images.links import resolve

_MAX_PATH = 4096
_OPAQUE = ".wh..wh..opq"


class TreeError(ValueError):
    """A layer does something that can't be told apart from an attack.

    Attributes:
        path: where, absolute.
    """

    def __init__(self, path: str, why: str) -> None:
        super().__init__(why)
        self.path = f"/{path}"[:200]
        self.why = why


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a layer, in the layer's order. `kind` as in the tar header."""

    path: str
    kind: str
    link: str
    mode: int


@dataclass(slots=True)
class Node:
    """A path's state: folders have children, links a target."""

    kind: str
    link: str = ""
    mode: int = 0o755
    children: dict[str, Node] = field(default_factory=dict)
    layer: int = -1


class Tree:
    """The merged tree. Bounded by `max_nodes`, implied folders included."""

    def __init__(self, max_nodes: int) -> None:
        self.root = Node("5")
        self._room = max_nodes
        self._layer = -1

    def apply(self, entries: list[Entry]) -> None:
        """Lay one layer over what is there.

        Raises:
            TreeError: see the class.
        """
        self._layer += 1
        for entry in entries:
            self._apply(entry)

    def find(self, path: str) -> Node | None:
        """The node at exactly this path, following no links."""
        node: Node | None = self.root
        for part in path.split("/"):
            if part:
                node = node.children.get(part) if node else None
        return node

    def resolve(self, path: str) -> Node | None:
        """The node `path` leads to when links are followed, or None."""

        def link_of(name: str) -> str | None:
            node = self.find(name)
            return node.link if node is not None and node.kind == "2" else None

        final = resolve(path, link_of)
        return None if final is None else self.find(final)

    def _apply(self, entry: Entry) -> None:
        if not entry.path:
            if entry.kind != "5":
                raise TreeError("", "the root is not a folder")
            return
        folder, _, name = entry.path.rpartition("/")
        if name.startswith(".wh."):
            self._white_out(entry, folder, name)
            return
        parent = self._parent(entry.path, folder)
        old = parent.children.get(name)
        if entry.kind == "5" and old is not None and old.kind == "5":
            old.mode, old.layer = entry.mode, self._layer
            return
        new = Node(entry.kind, entry.link, entry.mode, layer=self._layer)
        if entry.kind == "1":
            target = self.find(clean_path(entry.link))
            if target is None or target.kind == "5":
                raise TreeError(entry.path, "a hard link to nothing")
            new = Node(target.kind, target.link, target.mode, layer=self._layer)
        self._take_room(entry.path)
        parent.children[name] = new

    def _white_out(self, entry: Entry, folder: str, name: str) -> None:
        if name == _OPAQUE:
            parent = self._parent(entry.path, folder)
            self._hide_lower(parent)
            return
        hidden = name.removeprefix(".wh.")
        if hidden.startswith(".wh.") or hidden in {"", ".", ".."}:
            raise TreeError(entry.path, "an unknown kind of whiteout")
        parent = self._parent(entry.path, folder)
        old = parent.children.pop(hidden, None)
        if old is not None and old.layer == self._layer:
            raise TreeError(entry.path, "hides what its own layer put there")

    def _hide_lower(self, folder: Node) -> None:
        """An opaque folder hides what lower layers put there, not what its own layer did."""
        pending = [folder]
        while pending:
            node = pending.pop()
            for name, child in list(node.children.items()):
                if child.layer != self._layer:
                    del node.children[name]
                elif child.kind == "5":
                    pending.append(child)

    def _parent(self, path: str, folder: str) -> Node:
        node = self.root
        for part in folder.split("/") if folder else ():
            child = node.children.get(part)
            if child is None:
                self._take_room(path)
                child = node.children[part] = Node("5", layer=self._layer)
            elif child.kind != "5":
                raise TreeError(path, "written through something that is not a folder")
            else:
                child.layer = self._layer
            node = child
        return node

    def _take_room(self, path: str) -> None:
        self._room -= 1
        if self._room < 0:
            raise TreeError(path, "too many entries")


def clean_path(name: str) -> str:
    """A tar name without leading "./" and "/" and without empty parts.

    Raises:
        TreeError: it goes upwards, is too long, or holds a NUL.
    """
    if len(name) > _MAX_PATH or "\x00" in name:
        raise TreeError(name[:80].replace("\x00", ""), "a malformed name")
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise TreeError("/".join(parts), "a name that goes upwards")
    return "/".join(parts)
