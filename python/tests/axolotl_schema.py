"""The options of axolotl's YAML, read from the source of its schema without importing it.

pip download --no-deps axolotl==0.21.0
python axolotl_schema.py axolotl-0.21.0-py3-none-any.whl > axolotl_keys.txt
"""

from __future__ import annotations

import ast
import sys
import zipfile

SCHEMAS = "axolotl/utils/schemas/"
MODELS = {"": "AxolotlInputConfig", "datasets.": "SFTDataset"}
"""What stands before a key, and the class that declares it."""


def keys(wheel: str) -> list[str]:
    """Every option's name, and those of an entry of `datasets` as `datasets.NAME`."""
    classes: dict[str, ast.ClassDef] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(SCHEMAS) and name.endswith(".py"):
                for node in ast.walk(ast.parse(archive.read(name))):
                    if isinstance(node, ast.ClassDef):
                        classes[node.name] = node
    found = {prefix + field for prefix, model in MODELS.items() for field in fields(model, classes)}
    return sorted(found)


def fields(name: str, classes: dict[str, ast.ClassDef]) -> set[str]:
    """The annotated names of a class and of those that it derives from."""
    if name not in classes:
        return set()
    node = classes[name]
    own = {
        statement.target.id
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    bases = (base.id for base in node.bases if isinstance(base, ast.Name))
    return own.union(*(fields(base, classes) for base in bases))


if __name__ == "__main__":
    print("# The options of axolotl's YAML; made by axolotl_schema.py from " + sys.argv[1].rpartition("/")[2])
    print("\n".join(keys(sys.argv[1])))
