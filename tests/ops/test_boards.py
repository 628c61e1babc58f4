"""The boards are what their program makes, and each panel says what it asks, in which unit, and why."""

from __future__ import annotations

import json
import re

import yaml

from deploy.grafana import boards
from deploy.grafana.drawing import as_json
from scheduler.metrics.page import exemplar
from tests.ops.shipped import BOARDS, ROOT
from tests.ops.shipped import boards as committed

_WRITE = "python -m deploy.grafana.boards"


def test_committed_boards_are_what_the_program_makes() -> None:
    made = {
        f"{board.uid}.json": as_json(board, [other for other in boards.BOARDS if other is not board])
        for board in boards.BOARDS
    }
    assert {path.name: path.read_text() for path in BOARDS} == made, f"run {_WRITE}"


def test_five_boards_of_at_most_nine_panels() -> None:
    assert len(committed()) == 5
    assert all(1 <= len(board["panels"]) <= 9 for board in committed())


def test_every_panel_is_a_question_with_a_unit_and_a_meaning() -> None:
    for board in committed():
        for panel in board["panels"]:
            where = f"{board['uid']}, panel {panel['id']}"
            assert panel["title"].endswith("?"), where
            assert len(panel["description"].split()) >= 8, where
            assert panel["fieldConfig"]["defaults"]["unit"], where


def test_panels_and_queries_are_numbered_and_lie_beside_each_other() -> None:
    for board in committed():
        assert [panel["id"] for panel in board["panels"]] == list(range(1, len(board["panels"]) + 1))
        taken = set()
        for panel in board["panels"]:
            references = [target["refId"] for target in panel["targets"]]
            assert references == list("ABCDEFGH")[: len(references)]
            assert references, "a panel without a query is empty"
            at = panel["gridPos"]
            cells = {
                (x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
            }
            assert at["x"] + at["w"] <= 24
            assert not cells & taken, f"{board['uid']}, panel {panel['id']} lies on another"
            taken |= cells


def test_every_board_can_be_turned_to_another_cluster_and_leads_to_the_other_four() -> None:
    uids = {board["uid"] for board in committed()}
    for board in committed():
        assert [one["name"] for one in board["templating"]["list"]] == ["datasource", "job", "cluster"]
        assert {link["url"] for link in board["links"]} == {f"/d/{uid}" for uid in uids - {board["uid"]}}
        assert all(link["includeVars"] and link["keepTime"] for link in board["links"])


def test_every_query_goes_to_the_source_that_is_chosen() -> None:
    for board in committed():
        sources = json.dumps(board).count('"uid": "${datasource}"')
        named = json.dumps(board).count('"uid": "') - sources
        assert named == 1, "only the board has a fixed uid"


def test_a_dot_leads_to_the_source_of_traces_that_the_page_describes() -> None:
    (source,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    (leads,) = source["jsonData"]["exemplarTraceIdDestinations"]
    assert {leads["name"]} == (exemplar("4bf92f3577b34da6") or {}).keys()
    page = (ROOT / "deploy/README.md").read_text().partition("## Traces")[2].partition("\n## ")[0]
    (described,) = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])["datasources"]
    assert described["uid"] == leads["datasourceUid"]
    asked = {
        panel["title"]
        for board in committed()
        for panel in board["panels"]
        if any(target.get("exemplar") for target in panel["targets"])
    }
    assert asked == set(re.findall('"([^"]+[?])"', page)), "the page says which panels have dots"


def test_rates_are_over_what_grafana_takes_for_right() -> None:
    provisioned = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text()
    )
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (source,) = provisioned["datasources"]
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
