"""Models of the hub without the hub: what the cache holds is drawn with, and what it lacks is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from worker_builders import some_settings

from gpu_worker.engine.diffusers_engine import DiffusersEngine
from gpu_worker.engine.stand_in import stand_in_folder
from gpu_worker.models import Models
from tests.stand_in import stand_in_models

pytestmark = [
    pytest.mark.engine,
    # diffusers hands torch tensors to numpy in a way that numpy 2 will no longer take.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

_COMMIT, _PARTIAL = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What loading each of some models said, in a process that is offline: empty where it loaded."""
    folder = tmp_path_factory.mktemp("hub")
    repository = folder / "hub" / "models--some-lab--small"
    shutil.copytree(stand_in_folder(folder / "cache"), repository / "snapshots" / _COMMIT)
    shutil.copytree(repository / "snapshots" / _COMMIT, repository / "snapshots" / _PARTIAL)
    for weights in (repository / "snapshots" / _PARTIAL / "unet").glob("*.safetensors"):
        weights.unlink()
    (repository / "refs").mkdir()
    for name, commit in (("main", _COMMIT), ("partial", _PARTIAL)):
        (repository / "refs" / name).write_text(commit)
    program = f"""
        import json, warnings
        from dataclasses import replace
        from pathlib import Path

        warnings.simplefilter("ignore")
        import torch
        from gpu_worker.engine.loading import loaded_model, to_be_had
        from gpu_worker.run import EngineFailure
        from tests.stand_in import stand_in_models

        known = replace(stand_in_models().default, name="small", ip_adapter="", source="some-lab/small")
        said = {{}}
        for case, entry in {{
            "main": known,
            "branch": replace(known, revision="main"),
            "commit": replace(known, revision={_COMMIT!r}),
            "no such revision": replace(known, revision="v2"),
            "partial": replace(known, revision="partial"),
            "no such model": replace(known, source="some-lab/other"),
        }}.items():
            assert to_be_had(entry) == (not case.startswith("no such")), case
            try:
                loaded_model(entry, torch.device("cpu"), Path({str(folder / "cache")!r}))
                said[case] = ""
            except EngineFailure as failure:
                said[case] = str(failure)
        print(json.dumps(said))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("case", ["main", "branch", "commit"])
def test_what_the_cache_holds_is_loaded_without_the_hub(said: dict[str, str], case: str) -> None:
    assert said[case] == ""


@pytest.mark.parametrize(
    ("case", "name", "command"),
    [
        ("no such model", "some-lab/other", "hf download some-lab/other"),
        ("no such revision", "some-lab/small at v2", "hf download some-lab/small --revision v2"),
    ],
)
def test_what_the_cache_lacks_is_missing_and_the_sentence_says_what_to_do(
    said: dict[str, str], case: str, name: str, command: str
) -> None:
    assert said[case] == (
        f"MODEL_MISSING: Model small is not to be had: {name} is not whole in this worker's cache, and "
        f"HF_HUB_OFFLINE keeps it from being fetched; run '{command}' on this machine where the hub can be "
        "reached."
    )


def test_a_download_that_was_broken_off_is_not_drawn_with(said: dict[str, str]) -> None:
    assert said["partial"].startswith("MODEL_")


def test_an_engine_names_only_the_models_whose_files_are_there(tmp_path: Path) -> None:
    stand_in = stand_in_models().default
    elsewhere = replace(stand_in, name="elsewhere", ip_adapter="", source=str(tmp_path / "none"))
    models = Models(default=stand_in, entries={each.name: each for each in (stand_in, elsewhere)})
    engine = DiffusersEngine(models, some_settings(tmp_path, engine="diffusers"))
    assert engine.models() == ("stand-in",)
