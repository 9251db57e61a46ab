"""The facts as text: small, since classes share most of their modules, and made of lines, so that changes can be read."""

HEAD = """\
# What transformers {version} makes of every tensor of its models, by their names on disk; made by `scripts/make facts`.
# src/models/facts/table.rs says how it is read.
"""

LETTERS = {
    "linear": "L", "cut": "C", "fp32": "F", "head": "H", "labels": "N", "last": "Z", "tied": "T",
    "in_router": "R", "conv1d": "O", "subclass": "S", "embedding": "E", "router": "Q", "experts": "X", "convolution": "V",
    "parameter": "P", "buffer": "U", "bias": "B",
}


class Table:
    """Lines, each once: what refers to another has its number."""

    def __init__(self):
        self.lines, self.places = [], {}

    def place(self, line):
        if line not in self.places:
            self.places[line] = len(self.lines)
            self.lines.append(line)
        return self.places[line]


def text(version, described):
    """The two files' texts: facts, and what couldn't be built."""
    modules, names, classes, not_built = Table(), Table(), [], []
    for one in described:
        model_type = one["model_type"]
        for name, found in one["built"].items():
            root = tree(modules, found["rows"])
            others = names.place(" ".join(f"{tensor}>{','.join(to)}" for tensor, to in other_names(found["rows"])))
            off_disk = names.place(" ".join(found["off_disk"]))
            classes.append(f"{model_type} {name} {root} {others} {off_disk}")
        not_built += [f"{model_type} {name}: {why}\n" for name, why in one["failed"].items()]
        if not one["built"] and not one["failed"]:
            not_built.append(f"{model_type}: transformers has no class for it\n")
    parts = [HEAD.format(version=version)]
    for title, lines in (("modules", modules.lines), ("names", names.lines), ("classes", classes)):
        parts.append(f"[{title}]\n" + "".join(f"{line}\n" for line in lines))
    return "".join(parts), "".join(not_built)


def tree(modules, rows):
    """The line of a module that has the tensors of `rows`."""
    children, tensors = {}, {}
    for row in rows:
        add(children, tensors, row[0].split("."), row)
    return place(modules, children, tensors)


def add(children, tensors, parts, row):
    if len(parts) == 1 or parts[1:] == ["weight"]:
        name = parts[0] if len(parts) > 1 else f".{parts[0]}"
        tensors.setdefault(name, set()).add(LETTERS[row[2]] + (str(row[1]) if row[1] != 2 else ""))
    else:
        inner = children.setdefault(parts[0], ({}, {}))
        add(*inner, parts[1:], row)


def place(modules, children, tensors):
    entries = [f"{name}={''.join(sorted(kinds))}" for name, kinds in tensors.items()]
    entries += [f"{name}/{place(modules, *inner)}" for name, inner in children.items()]
    return modules.place(" ".join(sorted(entries)))


def other_names(rows):
    """Tensors whose modules are called otherwise, and how."""
    found = {}
    for row in rows:
        if row[3]:
            found.setdefault(row[0].removesuffix(".weight"), set()).update(row[3])
    return sorted((name, sorted(to)) for name, to in found.items())
