"""`darkroom top`: a board that stays on the screen until q or Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.live import Live

from scheduler.client.aio import DarkroomClient, RetryPolicy
from scheduler.client.errors import DarkroomError, ExitCode
from scheduler.client.printing import Printer
from scheduler.client.running import Json, run
from scheduler.client.top import Board, look

# The board itself says that nobody answers, and asks again.
_NO_RETRIES = RetryPolicy(times=0)


def top(
    context: typer.Context,
    every: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print it once and end, as into anything but a terminal.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show queues, workers and who holds the GPUs, live; without the role operator, your own jobs.

    q or Ctrl-C ends it. With --json it is one document, printed once.
    """
    printer = Printer(as_json=as_json)

    async def print_once(client: DarkroomClient) -> None:
        seen = await look(client)
        if as_json:
            printer.document({"address": client.address} | seen.document())
        else:
            seen.print(printer)

    async def stay(client: DarkroomClient) -> None:
        board = Board(client.address, every_s=every, clock=lambda: datetime.now(UTC))
        board.show(await look(client))  # trouble before anything was seen is the command's
        await _until_told_to_end(_keep_up(client, board, printer, every))

    live = printer.out.is_terminal and not (once or as_json)
    if live:
        run(context, printer, stay, retries=_NO_RETRIES)
    else:
        run(context, printer, print_once)


async def _keep_up(client: DarkroomClient, board: Board, printer: Printer, every_s: float) -> None:
    # Drawn twice a second whatever comes, so that ages grow while nothing is answered.
    with Live(board, console=printer.out, screen=True, refresh_per_second=2, vertical_overflow="crop"):
        while True:
            await asyncio.sleep(every_s)
            try:
                board.show(await look(client))
            except DarkroomError as error:
                if error.exit_code is not ExitCode.UNAVAILABLE:
                    raise
                board.lose(error.happened)


async def _until_told_to_end(work: Coroutine[Any, Any, None]) -> None:
    """Do `work` until it fails, or somebody presses q or Ctrl-C."""
    working = asyncio.create_task(work)
    told = asyncio.Event()
    telling = asyncio.create_task(told.wait())
    try:
        with _keys(lambda key: told.set() if key in ("q", "Q") else None), _interrupts(told.set):
            done, _ = await asyncio.wait({working, telling}, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            working.result()
    finally:
        telling.cancel()
        working.cancel()
        await asyncio.gather(working, telling, return_exceptions=True)


@contextmanager
def _interrupts(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` for Ctrl-C while the context is open, where the event loop can."""
    if sys.platform == "win32":
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, act)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextmanager
def _keys(pressed: Callable[[str], None]) -> Iterator[None]:
    """Call `pressed` for each key while the context is open, where there is a keyboard to be read."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    loop, keyboard = asyncio.get_running_loop(), sys.stdin.fileno()

    def read() -> None:
        if key := os.read(keyboard, 1):
            pressed(key.decode(errors="replace"))
        else:
            loop.remove_reader(keyboard)  # nobody is there any more

    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    loop.add_reader(keyboard, read)
    try:
        yield
    finally:
        loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
