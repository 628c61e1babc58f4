"""Writes the rules of deploy/prometheus as the Prometheus operator takes them, into rules.yaml beside it.

Kustomize reads no file outside its folders, so they are there twice; tests/deploy asks whether they agree.
"""

from __future__ import annotations

from pathlib import Path

import yaml

_HERE = Path(__file__).resolve().parent
_RULES = _HERE.parents[2] / "prometheus"


def written() -> str:
    """Return rules.yaml: a PrometheusRule for each file of rules."""
    texts = ["# Written by write_rules.py; what it says is changed in deploy/prometheus.\n"]
    for file in sorted(_RULES.glob("*rules*.yml")):
        name = "darkroom-" + file.stem.replace("_", "-")
        resource = {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": name},
            "spec": yaml.safe_load(file.read_text()),
        }
        texts.append(yaml.safe_dump(resource, sort_keys=False, width=120, allow_unicode=True))
    return "---\n".join(texts)


if __name__ == "__main__":
    (_HERE / "rules.yaml").write_text(written())
