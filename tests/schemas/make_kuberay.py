"""Makes `kuberay-<version>.json.gz` of the custom resources that a KubeRay release publishes.

    python tests/schemas/make_kuberay.py helm-chart/kuberay-operator/crds kuberay-1.7.0.json.gz

Of each kind that `deploy/` uses it keeps the schema of version v1, without the descriptions, which
are most of the text and refuse nothing.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

KINDS = ("RayCluster", "RayJob")


def without_descriptions(schema: Any) -> Any:
    """A schema without what is told to people; a field that is called so stays."""
    if isinstance(schema, list):
        return [without_descriptions(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {k: v for k, v in schema.items() if not (k == "description" and isinstance(v, str))}
    return {key: without_descriptions(value) for key, value in kept.items()}


def main(directory: str, output: str) -> None:
    """Writes the schemas by kind, in the same bytes each time."""
    schemas = {}
    for kind in KINDS:
        text = Path(directory, f"ray.io_{kind.lower()}s.yaml").read_text(encoding="utf-8")
        crd = yaml.load(text, yaml.CSafeLoader)
        (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
        schemas[kind] = without_descriptions(version["schema"]["openAPIV3Schema"])
    content = json.dumps(schemas, sort_keys=True, separators=(",", ":")).encode()
    Path(output).write_bytes(gzip.compress(content, compresslevel=9, mtime=0))


if __name__ == "__main__":
    main(*sys.argv[1:])
