"""A software bill of materials, CycloneDX 1.6 in JSON, of what is published: what is in it, or comes with it, in which version,
under which license, and what needs what.

    scripts/sbom wheel [FILE]     the Python package: what installing it brings, in the versions that it is tested with (client.lock)
    scripts/sbom binary [FILE]    the command: the crates that are compiled into it, from Cargo.lock

Into FILE, or to standard output. The same input gives the same bytes.
"""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    match sys.argv[1:]:
        case ["wheel", *out] if len(out) < 2:
            bill = wheel()
        case ["binary", *out] if len(out) < 2:
            bill = binary()
        case _:
            sys.exit(__doc__)
    text = json.dumps(bill, indent=2) + "\n"
    if out:
        Path(out[0]).write_text(text)
    else:
        sys.stdout.write(text)


def bill_of(root: dict[str, Any], components: list[dict[str, Any]], needs: dict[str, set[str]]) -> dict[str, Any]:
    components.sort(key=lambda component: component["bom-ref"])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": root},
        "components": components,
        "dependencies": [{"ref": ref, "dependsOn": sorted(needs[ref])} for ref in sorted(needs)],
    }


def component(kind: str, name: str, version: str | None, licenses: list[dict[str, Any]], hashes: list[str]) -> dict[str, Any]:
    """A library; `hashes` are SHA-256 of the files that it may come as."""
    ref = f"pkg:{kind}/{name}" + (f"@{version}" if version else "")
    found: dict[str, Any] = {"type": "library", "bom-ref": ref, "name": name, "purl": ref}
    if version:
        found["version"] = version
    if licenses:
        found["licenses"] = licenses
    if len(hashes) == 1:
        found["hashes"] = [{"alg": "SHA-256", "content": hashes[0]}]
    elif hashes:
        found["properties"] = [{"name": "prequant:file:sha256", "value": value} for value in hashes]
    return found


# The wheel


def wheel() -> dict[str, Any]:
    """From the environment that this runs in, which has what client.lock has, and nothing else."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "python/pyproject.toml").read_text())["project"]
    locked = lock(ROOT / "tests/conformance/requirements/client.lock")
    root = component("pypi", project["name"], project["version"], [{"expression": project["license"]}], [])
    components: dict[str, dict[str, Any]] = {}
    needs: dict[str, set[str]] = {}

    def follow(ref: str, requirements: list[str], extras: set[str]) -> None:
        needs.setdefault(ref, set())
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
                continue
            name = str(canonicalize_name(requirement.name))
            key = f"{name}[{','.join(sorted(requirement.extras))}]"
            if key not in components:
                components[key] = of_distribution(name)
                if "version" in components[key]:
                    follow(components[key]["bom-ref"], metadata.requires(name) or [], {"", *requirement.extras})
            needs[ref].add(components[key]["bom-ref"])

    def of_distribution(name: str) -> dict[str, Any]:
        # What the environment leaves out has no version here.
        if name not in locked:
            return component("pypi", name, None, [], [])
        version, hashes = locked[name]
        told = metadata.metadata(name)
        if told["Version"] != version:
            sys.exit(f"{name} is {told['Version']} here, and {version} in client.lock: run it by scripts/sbom")
        return component("pypi", name, version, licenses_of(told), hashes)

    follow(root["bom-ref"], project["dependencies"], set())
    return bill_of(root, list({found["bom-ref"]: found for found in components.values()}.values()), needs)


def licenses_of(told: metadata.PackageMetadata) -> list[dict[str, Any]]:
    """An SPDX expression, or the package's own words; of texts that were put there whole, nothing."""
    if expression := told.get("License-Expression"):
        return [{"expression": expression}]
    classifiers = [line.rpartition(" :: ")[2] for line in told.get_all("Classifier") or [] if line.startswith("License :: ")]
    words = (told.get("License") or "").strip()
    names = [words] if words and "\n" not in words and len(words) < 80 else classifiers
    return [{"license": {"name": name}} for name in names]


def lock(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each package of a lock, by its canonical name."""
    found: dict[str, tuple[str, list[str]]] = {}
    for entry in path.read_text().replace("\\\n", " ").splitlines():
        name, _, version = entry.split()[0].partition("==")
        hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})", entry)
        found[re.sub(r"[-_.]+", "-", name).lower()] = (version, hashes)
    return found


# The command


def binary() -> dict[str, Any]:
    """From Cargo's own resolution of the lock, with the default features, on any platform."""
    ran = subprocess.run(["cargo", "metadata", "--locked", "--format-version", "1"], cwd=ROOT, check=True, capture_output=True)
    told = json.loads(ran.stdout)
    sums = {
        (package["name"], package["version"]): package.get("checksum")
        for package in tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]
    }
    packages = {package["id"]: package for package in told["packages"]}
    nodes = {node["id"]: node for node in told["resolve"]["nodes"]}
    root = next(package for package in told["packages"] if Path(package["manifest_path"]) == ROOT / "Cargo.toml")
    found: dict[str, dict[str, Any]] = {}
    needs: dict[str, set[str]] = {}
    waiting = [root["id"]]
    while waiting:
        package = packages[waiting.pop()]
        if package["id"] in found:
            continue
        checksum = sums[package["name"], package["version"]]
        expression = (package["license"] or "").replace("/", " OR ")
        licenses = [{"expression": expression}] if expression else []
        found[package["id"]] = component("cargo", package["name"], package["version"], licenses, [checksum] if checksum else [])
        # What only tests need is in nothing that is published.
        is_shipped = lambda needed: any(kind["kind"] != "dev" for kind in needed["dep_kinds"])  # noqa: E731
        shipped = [needed["pkg"] for needed in nodes[package["id"]]["deps"] if is_shipped(needed)]
        refs = {f"pkg:cargo/{packages[needed]['name']}@{packages[needed]['version']}" for needed in shipped}
        needs[found[package["id"]]["bom-ref"]] = refs
        waiting += shipped
    own = found.pop(root["id"])
    return bill_of({**own, "type": "application"}, list(found.values()), needs)


if __name__ == "__main__":
    main()
