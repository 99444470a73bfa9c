"""Reads `cargo metadata` and fails if a dependency of the library asks for a newer compiler than the library states."""

import json
import sys


def version(text):
    return tuple(int(part) for part in (text + ".0.0").split(".")[:3])


metadata = json.load(sys.stdin)
packages = {package["id"]: package for package in metadata["packages"]}
nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
root = metadata["resolve"]["root"]
stated = packages[root]["rust_version"]

seen, todo = set(), [root]
while todo:
    current = todo.pop()
    if current in seen:
        continue
    seen.add(current)
    for dependency in nodes[current]["deps"]:
        kinds = {kind["kind"] for kind in dependency["dep_kinds"]}
        # Development dependencies do not reach the users of the library.
        if kinds & {None, "build"}:
            todo.append(dependency["pkg"])

newer = [
    f'{packages[id]["name"]} {packages[id]["version"]} wants {packages[id]["rust_version"]}'
    for id in seen
    if packages[id]["rust_version"] and version(packages[id]["rust_version"]) > version(stated)
]
print(f"{len(seen) - 1} dependencies against rust-version {stated}")
if newer:
    sys.exit("newer than stated:\n" + "\n".join(newer))
