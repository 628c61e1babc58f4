"""Machines that Ray's autoscaler rents for a test: each is a node here, with one logical GPU.

Ray's process that scales the cluster imports this module by its name, so it imports little.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

HEAD_TYPE, GPU_TYPE = "head", "gpu"
_ROOT = Path(__file__).parents[2]


def autoscaling(config: Path, *, most: int, idle_s: float) -> tuple[list[str], dict[str, str]]:
    """Write a configuration for machines of one GPU, `most` at once, each taken back after `idle_s`.

    Returns what the head's `ray start` is to be told, and its environment.
    """
    config.write_text(
        json.dumps(
            {
                "cluster_name": "rented",
                "max_workers": most,
                "provider": {
                    "type": "external",
                    "module": f"{__name__}.Machines",
                    "disable_node_updaters": True,
                    "disable_launch_config_check": True,
                },
                "available_node_types": {
                    HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
                    GPU_TYPE: {
                        "resources": {"CPU": 1, "GPU": 1},
                        "node_config": {},
                        "min_workers": 0,
                        "max_workers": most,
                    },
                },
                "head_node_type": HEAD_TYPE,
                "upscaling_speed": 1.0,
                "idle_timeout_minutes": idle_s / 60,
                "auth": {},
                "file_mounts": {},
                "cluster_synced_files": [],
                "initialization_commands": [],
                "setup_commands": [],
                "head_setup_commands": [],
                "worker_setup_commands": [],
                "head_start_ray_commands": [],
                "worker_start_ray_commands": [],
            }
        )
    )
    return ["--autoscaling-config", str(config)], {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "PYTHONPATH": str(_ROOT),
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_TYPE,
        "RAY_NODE_TYPE_NAME": HEAD_TYPE,
    }


class Machines(NodeProvider):
    """What Ray asks for machines, and tells which it needs no more."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._tags: dict[str, dict[str, str]] = {
            HEAD_TYPE: {
                TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
                TAG_RAY_USER_NODE_TYPE: HEAD_TYPE,
                TAG_RAY_NODE_NAME: HEAD_TYPE,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._rented = 0

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any] | None:
        """Start nodes that join the cluster by themselves."""
        for _ in range(count):
            self._rented += 1
            name = f"rented-{self._rented}"
            self._tags[name] = {
                **tags,
                TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                TAG_RAY_USER_NODE_TYPE: GPU_TYPE,
                TAG_RAY_NODE_NAME: name,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
            self._processes[name] = subprocess.Popen(
                [
                    *(str(Path(sys.executable).with_name("ray")), "start", "--block"),
                    *("--address", _gcs_address(), "--node-name", name, "--num-cpus", "1", "--num-gpus", "1"),
                ],
                env={**os.environ, "RAY_CLOUD_INSTANCE_ID": name, "RAY_NODE_TYPE_NAME": GPU_TYPE},
            )
        return None

    def terminate_node(self, node_id: str) -> dict[str, Any] | None:
        """End a node as whoever rents out a machine does."""
        if node_id in self._tags:
            del self._tags[node_id]
            self._processes.pop(node_id).send_signal(signal.SIGTERM)
        return None

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        """Return the machines that are rented and have these tags.

        Ray's processes give each other 30 s to come up, and on a busy machine a start may fail. A machine
        that did not come up, or died, is gone, as with whoever rents them out; Ray asks for another then.
        """
        for node_id, process in list(self._processes.items()):
            if process.poll() is not None:
                del self._tags[node_id], self._processes[node_id]
        return [node_id for node_id, tags in dict(self._tags).items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        """Return whether a machine is rented."""
        return node_id in self._tags

    def is_terminated(self, node_id: str) -> bool:
        """Return whether a machine was given back."""
        return node_id not in self._tags

    def node_tags(self, node_id: str) -> dict[str, str]:
        """Return what Ray told of a machine."""
        return self._tags[node_id]

    def external_ip(self, node_id: str) -> str:
        """Return a name: there is one address for all."""
        return node_id

    def internal_ip(self, node_id: str) -> str:
        """Return a name: there is one address for all."""
        return node_id


def _gcs_address() -> str:
    command = sys.argv
    (address,) = [one.partition("=")[2] for one in command if one.startswith("--gcs-address=")]
    return address
