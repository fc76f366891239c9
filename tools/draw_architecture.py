"""Draws docs/architecture.png: the rooms of the package on the floors that their imports put them on.

    python tools/draw_architecture.py [PICTURE.png]

Imports are read from the source, also those inside of functions and those for type checkers only. A room is a folder or a
file of `esolm_megatron/`, or `checkpoints_conversion/`; it stands one floor above the highest room that it imports. Lines
are imports that do not follow from the others.
"""

import ast
import hashlib
import json
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "architecture.png"
FACTS = "esolm rooms"
"""Name of the text in the picture that holds the hash of what was drawn; tests/test_house.py compares it."""

Graph = dict[str, set[str]]

PACKAGES = ("esolm_megatron", "checkpoints_conversion")
DOORS = {"esolm_megatron", "esolm_megatron.__main__", "esolm_megatron.sample", "esolm_megatron.score"}
"""Names for users, handed on from the rooms; nothing inside goes through them but for the version."""


def imports(root: Path = ROOT) -> Graph:
    """Module -> the modules of these packages that it imports."""
    files = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: Graph = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {each.name for each in node.names if each.name in files}
            elif isinstance(node, ast.ImportFrom) and node.module in files:
                for each in node.names:
                    inner = "version" if each.name == "__version__" else each.name
                    whole = f"{node.module}.{inner}"
                    found[name].add(whole if whole in files else node.module)
        found[name].discard(name)
    return found


def floors(graph: Graph) -> list[list[str]]:
    """Names by floor, from the ground: each above all that it imports.

    Raises:
        ValueError: some import each other in a circle; it names them.
    """
    left, out = {name: set(targets) for name, targets in graph.items()}, []
    while left:
        floor = sorted(name for name, targets in left.items() if not targets & left.keys())
        if not floor:
            raise ValueError(f"these import each other in a circle: {', '.join(sorted(_circle(left)))}")
        out.append(floor)
        left = {name: targets for name, targets in left.items() if name not in floor}
    return out


def _circle(graph: Graph) -> set[str]:
    """One circle of a graph in which every name imports another one of it."""
    path = [min(graph)]
    while (then := min(graph[path[-1]] & graph.keys())) not in path:
        path.append(then)
    return set(path[path.index(then) :])


def room_of(module: str) -> str:
    """The room that a module is in."""
    package, _, rest = module.partition(".")
    return package if package == PACKAGES[1] else rest.partition(".")[0]


def rooms(graph: Graph) -> Graph:
    """Room -> the rooms that its modules import."""
    found: Graph = {}
    for module, targets in graph.items():
        if module not in DOORS:
            own = found.setdefault(room_of(module), set())
            own |= {room_of(target) for target in targets if target not in DOORS} - {room_of(module)}
    return found


def facts(root: Path = ROOT) -> dict:
    """All that is drawn: floors, what each room holds, and the lines between them."""
    graph = imports(root)
    between = rooms(graph)

    def below(room: str) -> set[str]:
        return between[room].union(*map(below, between[room]))

    held = {
        room: [
            m.split(".", 2)[-1] for m in graph if room_of(m) == room and not any(f"{m}." in other for other in graph)
        ]
        for room in between
    }
    return {
        "floors": floors(between),
        "holds": {room: _folders(names) for room, names in held.items()},
        "lines": {
            room: sorted(t for t in targets if not any(t in below(other) for other in targets - {t}))
            for room, targets in between.items()
        },
    }


def _folders(names: list[str]) -> list[str]:
    """Files of a room; of a folder inside it only its name."""
    return sorted({f"{name.partition('.')[0]}/" if "." in name else name for name in names})


def digest(drawn: dict) -> str:
    """Hash of what was drawn."""
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def draw(path: Path = PICTURE) -> None:
    """Write the picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn = facts()
    figure, plot = plt.subplots(figsize=(12, 1.02 * len(drawn["floors"])), facecolor="white")
    middle, width, height = {}, 2.3, 0.72
    for level, floor in enumerate(drawn["floors"]):
        wished = {room: [middle[t][0] for t in drawn["lines"][room]] or [0] for room in floor}
        ordered = sorted(floor, key=lambda room: sum(wished[room]) / len(wished[room]))
        for number, room in enumerate(ordered):
            middle[room] = ((number + 0.5 + 0.18 * (level % 2) - 0.09) * 12 / len(floor), level)
    for room, targets in drawn["lines"].items():
        for target in targets:
            (x, y), (to_x, to_y) = middle[room], middle[target]
            plot.plot([x, to_x], [y - height / 2, to_y + height / 2], color="#a9b4c0", linewidth=0.9, zorder=0)
    for room, (x, y) in middle.items():
        names = [name for name in drawn["holds"][room] if name.rstrip("/") != room]
        corner = (x - width / 2, y - height / 2)
        plot.add_patch(plt.Rectangle(corner, width, height, facecolor="#eef3f8", edgecolor="#2f6fb0", linewidth=1.0))
        text = "\n".join(textwrap.wrap("  ".join(names), 38)[:4])
        plot.text(x, y + (0.22 if text else 0), room, ha="center", va="center", fontsize=10, weight="bold")
        plot.text(x, y + 0.12, text, ha="center", va="top", fontsize=6.8, color="#22272e", linespacing=1.15)
    plot.set(xlim=(0, 12), ylim=(-0.5, len(drawn["floors"]) - 0.5))
    plot.axis("off")
    figure.subplots_adjust(left=0.005, right=0.995, top=0.995, bottom=0.005)
    figure.savefig(path, dpi=110, metadata={FACTS: digest(drawn), "Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
