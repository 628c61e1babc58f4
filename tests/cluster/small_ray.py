"""What the local Ray of these tests is called."""

from __future__ import annotations

NAMESPACE = "test-cluster"
NODE = "node-a"
