"""The command line: exit status, JSON, quiet pipes, and help where something goes wrong."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf.json_format import ParseDict

from scheduler.v1 import job_pb2
from scheduler.v1.account_pb2 import Account
from scheduler.v1.job_pb2 import Failure, Job, ListFeedResponse, ListJobsResponse, Receipt, WatchJobResponse
from tests.client.scripted_service import (
    HANG,
    JOB,
    UID,
    Refuse,
    ScriptedService,
    a_file,
    a_job,
    a_png,
    an_event,
)
from tests.client.typed_commands import darkroom, one_document

ENDED = Receipt(gpu_ms=3_400, billed_gpu_ms=3_400, balance_before_ms=60_000, balance_after_ms=56_600)
DONE = an_event(3, job_pb2.JOB_STATE_SUCCEEDED, receipt=ENDED, tier=job_pb2.TIER_FAST)
PICTURE = a_png((10, 20, 30))


def says_a_whole_job(service: ScriptedService) -> None:
    service.says("CreateJob", a_job(warnings=["Words past 60 have no effect."]))
    service.says("WatchJob", [an_event(1, job_pb2.JOB_STATE_QUEUED), DONE])
    service.says("DownloadImages", [*a_file(1, PICTURE), *a_file(2, PICTURE)])
    service.says("GetJob", a_job())


def test_imagine_saves_the_pictures_and_prints_their_files_and_the_receipt(
    service: ScriptedService, environment: dict[str, str], in_folder: Path
) -> None:
    says_a_whole_job(service)
    result = darkroom(environment, "imagine", "a lighthouse", "--fast", "--private")
    assert result.exit_code == 0, result.output
    first, second, receipt = result.stdout.splitlines()
    assert first == f"darkroom-images/{UID}_a-lighthouse_1.png"
    assert (in_folder / second).read_bytes() == PICTURE
    assert receipt == "GPU time 3.4 s, charged 3.4 s of fast time; fast time before 1 min, after 56.6 s"
    assert result.stderr == "Words past 60 have no effect.\n"
    (request,) = service.asked("CreateJob")
    assert (request.tier, request.visibility) == (job_pb2.TIER_FAST, job_pb2.VISIBILITY_PRIVATE)
    assert not service.asked("WatchJob")[0].previews


def test_a_prompt_needs_no_quotes_and_keeps_its_own_parameters(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("CreateJob", a_job())
    words = ["imagine", "a", "red", "cat", "--w", "256", "--seed", "7", "--relax", "--no-wait"]
    assert darkroom(environment, *words).exit_code == 0
    (request,) = service.asked("CreateJob")
    assert request.imagine.prompt == "a red cat --w 256 --seed 7"
    assert request.tier == job_pb2.TIER_RELAX


def test_no_wait_prints_the_id(service: ScriptedService, environment: dict[str, str]) -> None:
    status = job_pb2.QueueStatus(sentence="2 jobs are ahead of it.", position=3)
    service.says("CreateJob", a_job(queue_status=status))
    result = darkroom(environment, "imagine", "a lighthouse", "--no-wait")
    assert (result.stdout, result.stderr) == (f"{UID}\n", "2 jobs are ahead of it.\n")


def test_a_dry_run_submits_nothing(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("CreateJob", a_job(price=job_pb2.Price(sentence="About 4 s of fast time.")))
    result = darkroom(environment, "imagine", "a lighthouse", "--dry-run")
    assert "About 4 s of fast time." in result.stdout
    assert service.asked("CreateJob")[0].validate_only


def test_pictures_can_be_forced_into_a_pipe(
    service: ScriptedService, environment: dict[str, str], in_folder: Path
) -> None:
    says_a_whole_job(service)
    assert "38;2;10;20;30" in darkroom(environment, "imagine", "a lighthouse", "--pictures").stdout


def test_vary_and_reroll_take_an_id(
    service: ScriptedService, environment: dict[str, str], in_folder: Path
) -> None:
    says_a_whole_job(service)
    says_a_whole_job(service)
    assert darkroom(environment, "vary", UID, "2").exit_code == 0
    assert darkroom(environment, "reroll", JOB, "--out", "elsewhere").exit_code == 0
    vary, reroll = service.asked("CreateJob")
    assert vary.variation.source_image == f"accounts/-/jobs/{UID}/images/2"
    assert reroll.reroll.source_job == JOB
    assert (in_folder / "elsewhere" / f"{UID}_a-lighthouse_1.png").exists()


def test_watch_in_a_pipe_prints_a_line_an_event(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("GetJob", a_job())
    service.says("WatchJob", [an_event(1, job_pb2.JOB_STATE_QUEUED), DONE])
    lines = darkroom(environment, "watch", UID).stdout.splitlines()
    assert [line.split("\t")[1:] for line in lines[:2]] == [["queued", "Event 1."], ["succeeded", "Event 3."]]


@pytest.mark.parametrize(
    ("command", "field", "value"),
    [
        (["fast"], "mode", job_pb2.TIER_FAST),
        (["relax"], "mode", job_pb2.TIER_RELAX),
        (["private"], "visibility", job_pb2.VISIBILITY_PRIVATE),
        (["public"], "visibility", job_pb2.VISIBILITY_PUBLIC),
        (["overage", "off"], "overage_allowed", False),
    ],
)
def test_modes_are_one_word(
    service: ScriptedService, environment: dict[str, str], command: list[str], field: str, value: object
) -> None:
    service.says("UpdateAccount", Account(name="accounts/ada"))
    assert darkroom(environment, *command).exit_code == 0
    (request,) = service.asked("UpdateAccount")
    assert list(request.update_mask.paths) == [field]
    assert getattr(request.account, field) == value


def test_lists_stop_at_their_limit(service: ScriptedService, environment: dict[str, str]) -> None:
    page = [a_job(), a_job(), a_job()]
    service.says("ListJobs", ListJobsResponse(jobs=page, next_page_token="more"))
    service.says("ListFeed", ListFeedResponse(jobs=page))
    jobs = darkroom(environment, "jobs", "--limit", "2", "--state", "queued", "--state", "running")
    assert len(jobs.stdout.splitlines()) == 2
    assert list(service.asked("ListJobs")[0].states) == [job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING]
    assert len(darkroom(environment, "feed").stdout.splitlines()) == 3


def test_other_peoples_text_cannot_control_the_terminal(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("ListFeed", ListFeedResponse(jobs=[a_job(prompt="a cat\x1b[2J [red]loud[/red]\nline")]))
    result = darkroom(environment, "feed")
    assert "a cat [2J [red]loud[/red] line" in result.stdout
    assert "\x1b" not in result.output


# JSON


def test_json_is_one_document_in_protobufs_names(
    service: ScriptedService, environment: dict[str, str], in_folder: Path
) -> None:
    says_a_whole_job(service)
    service.says("GetJob", a_job())
    service.says("CancelJob", a_job())
    service.says("ListJobs", ListJobsResponse(jobs=[a_job()]))
    service.says("GetAccount", Account(name="accounts/ada"))
    service.says("DownloadImages", a_file(1, PICTURE))
    made = one_document(darkroom(environment, "imagine", "a lighthouse", "--json"))
    assert ParseDict(made["job"], Job()).receipt.gpu_ms == 3_400
    assert [Path(file).name for file in made["files"]] == [f"{UID}_a-lighthouse_{n}.png" for n in (1, 2)]
    assert one_document(darkroom(environment, "show", UID, "--json"))["state"] == "JOB_STATE_QUEUED"
    assert one_document(darkroom(environment, "cancel", UID, "--json"))["cancelRequested"] is False
    assert one_document(darkroom(environment, "jobs", "--json"))["jobs"][0]["uid"] == UID
    assert one_document(darkroom(environment, "info", "--json"))["name"] == "accounts/ada"
    assert len(one_document(darkroom(environment, "download", UID, "1", "--json"))["files"]) == 1


def test_a_stream_is_one_document_a_line(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("GetJob", a_job())
    service.says("WatchJob", [an_event(1, job_pb2.JOB_STATE_QUEUED), DONE])
    lines = darkroom(environment, "watch", UID, "--json").stdout.splitlines()
    updates = [ParseDict(json.loads(line), WatchJobResponse()) for line in lines]
    assert [update.event.sequence for update in updates] == [1, 3]


def test_an_error_is_json_too_and_stdout_stays_empty(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    answer = Refuse(
        code=grpc.StatusCode.RESOURCE_EXHAUSTED,
        reason="QUEUE_FULL",
        sentence="10 of 10.",
        metadata={"depth": "10", "limit": "10"},
        retry_after_ms=5_000,
    )
    service.says("CreateJob", answer)
    result = darkroom(environment, "imagine", "a lighthouse", "--json")
    assert result.stdout == ""
    error = json.loads(result.stderr)["error"]
    assert error["reason"] == "QUEUE_FULL"
    assert error["happened"] == "10 of 10."
    assert error["metadata"] == {"depth": "10", "limit": "10"}
    assert error["retryAfterMs"] == 5_000


# Exit status


def test_a_refusal_exits_1_with_what_to_do(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("CreateJob", Refuse(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL"))
    result = darkroom(environment, "imagine", "a lighthouse")
    assert result.exit_code == 1
    assert "darkroom cancel JOB" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["show", "lighthouse"],
        ["vary", UID, "5"],
        ["unheard-of"],
        ["imagine"],
        ["jobs", "--state", "asleep"],
        ["config", "set", "colour", "red"],
        ["config", "set", "plain_text", "maybe"],
    ],
)
def test_what_is_not_understood_exits_2(environment: dict[str, str], command: list[str]) -> None:
    result = darkroom(environment, *command)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_a_settings_file_that_is_wrong_exits_2(environment: dict[str, str]) -> None:
    path = Path(environment["XDG_CONFIG_HOME"]) / "darkroom" / "client.toml"
    path.parent.mkdir(parents=True)
    path.write_text("colour = 'red'\n", encoding="utf-8")
    result = darkroom(environment, "info")
    assert result.exit_code == 2
    assert "colour" in result.stderr


def test_an_unreachable_service_exits_3_with_what_to_check(environment: dict[str, str]) -> None:
    result = darkroom(environment | {"DARKROOM_ADDRESS": "127.0.0.1:1"}, "info")
    assert result.exit_code == 3
    assert "127.0.0.1:1" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [["imagine", "a lighthouse"], ["watch", UID], ["watch", UID, "--json"]])
def test_a_job_without_pictures_exits_4(
    service: ScriptedService, environment: dict[str, str], command: list[str]
) -> None:
    failure = Failure(reason="ENGINE_ERROR", sentence="The engine gave up.")
    service.says("CreateJob", a_job())
    service.says("GetJob", a_job())
    service.says("WatchJob", [an_event(2, job_pb2.JOB_STATE_FAILED, failure=failure)])
    result = darkroom(environment, *command)
    assert result.exit_code == 4
    assert "The engine gave up." in result.stderr


def test_a_folder_that_cannot_be_written_is_said_without_a_traceback(
    service: ScriptedService, environment: dict[str, str], in_folder: Path
) -> None:
    service.says("DownloadImages", a_file(1, PICTURE))
    (in_folder / "file").write_bytes(b"")
    result = darkroom(environment, "download", UID, "--out", "file")
    assert result.exit_code == 1
    assert "another folder" in result.stderr


# The client's own settings


def test_settings_are_stored_and_shown_with_their_source(environment: dict[str, str]) -> None:
    del environment["DARKROOM_KEY"]
    stored = darkroom(environment, "config", "set", "key", "-", stdin="dk_7f3a_verysecret\n")
    assert stored.exit_code == 0
    shown = one_document(darkroom(environment, "config", "show", "--json"))
    assert shown["key"]["value"] == "dk_7f3a_…"
    assert shown["key"]["source"].endswith("client.toml")
    assert shown["address"]["source"] == "DARKROOM_ADDRESS"
    assert "verysecret" not in stored.output


def test_flags_go_before_the_command(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("GetAccount", Account(name="accounts/ada"))
    assert darkroom(environment, "--key", "dk_other_key", "info").exit_code == 0
    assert service.metadata[0]["authorization"] == "Bearer dk_other_key"


def test_help_names_the_servers_commands(environment: dict[str, str]) -> None:
    text = darkroom(environment, "--help").stdout
    for command in ("imagine", "serve", "demo", "migrate", "Exit status"):
        assert command in text


# Real processes: signals, pipes, terminals, imports


@pytest.fixture
def process_environment(environment: dict[str, str]) -> dict[str, str]:
    return {**os.environ, **environment, "TERM": "xterm-256color", "COLUMNS": "100"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "scheduler.client.cli", *arguments]


def test_ctrl_c_says_that_the_job_goes_on_and_exits_130(
    service: ScriptedService, process_environment: dict[str, str], in_folder: Path
) -> None:
    service.says("CreateJob", a_job())
    service.says("WatchJob", [an_event(1, job_pb2.JOB_STATE_QUEUED), HANG])
    process = subprocess.Popen(
        command("imagine", "a lighthouse"),
        env=process_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert service.hanging.wait(timeout=30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert f"darkroom watch {UID}" in err
    assert f"darkroom cancel {UID}" in err
    assert "Traceback" not in err


def test_nothing_but_text_goes_into_a_pipe(
    service: ScriptedService, process_environment: dict[str, str], in_folder: Path
) -> None:
    says_a_whole_job(service)
    done = subprocess.run(
        command("imagine", "a lighthouse"),
        env=process_environment,
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"\r" not in done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize("stdin_is_a_terminal", [True, False])
def test_a_terminal_gets_a_live_line_and_pictures_whether_or_not_it_can_be_asked(
    service: ScriptedService, process_environment: dict[str, str], in_folder: Path, stdin_is_a_terminal: bool
) -> None:
    progress = job_pb2.Progress(step=12, steps=20, preview=PICTURE)
    service.says("CreateJob", a_job())
    service.says(
        "WatchJob",
        [an_event(1, job_pb2.JOB_STATE_RUNNING), WatchJobResponse(progress=progress), DONE],
    )
    service.says("DownloadImages", a_file(1, PICTURE))
    service.says("GetJob", a_job())
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("imagine", "a lighthouse"),
        env={**process_environment, "COLORTERM": "truecolor"},
        stdin=theirs if stdin_is_a_terminal else subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    output = b""
    try:
        while block := os.read(ours, 65536):
            output += block
    except OSError:
        pass  # how a pseudo-terminal says that nobody holds the other end any more
    finally:
        os.close(ours)
    assert process.wait(timeout=30) == 0, output
    assert service.asked("WatchJob")[0].previews
    assert "▀".encode() in output
    assert b"GPU time 3.4 s" in output


WALL = """
import sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED or name.startswith(BLOCKED_HERE):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = ("ray", "torch", "diffusers", "asyncpg", "pydantic_settings", "numpy", "fsspec", "gpu_worker")
BLOCKED_HERE = ("scheduler.store", "scheduler.cluster", "scheduler.frontdoor", "scheduler.policy")
sys.meta_path.insert(0, Wall())
"""


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_client_runs_without_anything_of_the_server() -> None:
    # The command line has pydantic with it, through typer; the library alone does without.
    library = python(
        WALL + "BLOCKED += ('pydantic', 'typer')\nimport scheduler.client.aio, scheduler.client.sync"
    )
    assert library.returncode == 0, library.stderr
    commands = WALL + "import scheduler.demo\nfrom scheduler.client.commands import app\napp(sys.argv[1:])"
    listed = python(commands, "--help")
    assert listed.returncode == 0, listed.stderr


def test_a_server_command_without_the_servers_packages_says_what_to_install() -> None:
    serve = python(WALL + "from scheduler.client.commands import app\napp(sys.argv[1:])", "serve")
    assert serve.returncode == 2, serve.stderr
    assert "pip install -c constraints.txt '.[server,worker]'" in serve.stderr
    assert "Traceback" not in serve.stderr


def test_settings_and_doctor_are_the_clients_alone_without_the_servers_packages(tmp_path: Path) -> None:
    typed = WALL + f"import os\nos.environ['XDG_CONFIG_HOME'] = {str(tmp_path)!r}\n"
    typed += "from scheduler.client.commands import app\napp(sys.argv[1:])"
    shown = python(typed, "--address", "127.0.0.1:1", "config", "show", "--json")
    assert (shown.returncode, set(json.loads(shown.stdout))) == (0, {"address"}), shown.stderr
    found = python(typed, "--address", "127.0.0.1:1", "doctor", "--json")
    checks = [each["what"] for each in json.loads(found.stdout)["checks"]]
    assert (found.returncode, checks) == (6, ["client", "room here", "settings", "address"]), found.stderr


def test_a_server_command_gets_its_arguments_as_they_came() -> None:
    help_of_serve = python(
        "import sys\nfrom scheduler.client.commands import app\napp(sys.argv[1:])", "serve", "--help"
    )
    assert help_of_serve.returncode == 0, help_of_serve.stderr
    assert "--ray-address" in help_of_serve.stdout
