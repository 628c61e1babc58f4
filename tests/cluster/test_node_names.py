"""A node's name, and so its workers', is decided once."""

from __future__ import annotations

from typing import Any

from scheduler.cluster.ray_fleet import gpu_slots, node_names

_A, _B, _C = "a" * 56, "b" * 56, "c" * 56


def a_node(node_id: str, *, name: str = "10.0.0.1", gpus: int = 1, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": node_id, "NodeName": name, "Alive": alive, "Resources": {"GPU": float(gpus)}}


def test_node_keeps_its_name_when_another_of_that_name_joins_and_when_it_leaves() -> None:
    alone = node_names([a_node(_B)], {}, ())
    assert alone == {_B: "10.0.0.1"}
    both = node_names([a_node(_A), a_node(_B)], alone, ())
    assert both == {_B: "10.0.0.1", _A: "10.0.0.1-aaaaaaaa"}
    assert node_names([a_node(_A), a_node(_B, alive=False)], both, ()) == {_A: "10.0.0.1-aaaaaaaa"}


def test_name_of_a_node_that_left_is_free_again() -> None:
    known = {_A: "10.0.0.1-aaaaaaaa", _B: "10.0.0.1"}
    assert node_names([a_node(_A), a_node(_C)], known, ()) == {_A: "10.0.0.1-aaaaaaaa", _C: "10.0.0.1"}


def test_next_scheduler_gives_the_names_that_the_living_workers_have() -> None:
    workers = {"10.0.0.1/gpu-0", "10.0.0.1-aaaaaaaa/gpu-0"}
    assert node_names([a_node(_A), a_node(_B)], {}, workers) == {_B: "10.0.0.1", _A: "10.0.0.1-aaaaaaaa"}


def test_each_gpu_of_a_living_node_is_a_slot() -> None:
    nodes = [a_node(_A, name="node-a", gpus=2), a_node(_B, name="node-b", alive=False), a_node(_C, gpus=0)]
    slots = gpu_slots(nodes, node_names(nodes, {}, ()))
    assert [(slot.worker_id, slot.node_id) for slot in slots] == [("node-a/gpu-0", _A), ("node-a/gpu-1", _A)]
