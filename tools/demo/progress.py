"""The demo's progress: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvferry.tools.demo.events import Generated, Prefilled, Ready, Received, Skipped, Started, Step

if TYPE_CHECKING:
    from rich.console import Console

    from kvferry.tools.demo.events import Event, Options


class DemoProgress:
    """Shows each event on `console`; a context manager."""

    def __init__(self, console: Console, options: Options) -> None:
        self._console = console
        self._options = options
        self._done: dict[str, int] = {}
        self._bars = (
            Progress(
                TextColumn("{task.description:22}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console,
            )
            if console.is_terminal
            else None
        )
        prompts, tokens = options.num_prompts, options.num_prompts * options.num_tokens
        self._totals = {
            "load the model twice": 2,
            "prefill prompts": prompts,
            **{f"{name} handoffs": prompts for name in options.transports},
            "reference tokens": tokens,
            **{f"{name} tokens": tokens for name in options.transports},
        }
        self._tasks = (
            {
                what: self._bars.add_task(what, total=total, start=number == 0)
                for number, (what, total) in enumerate(self._totals.items())
            }
            if self._bars
            else {}
        )

    def __enter__(self) -> DemoProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def show(self, event: Event) -> None:
        """Shows one event."""
        if isinstance(event, Started) and not self._bars:
            self._print(f"{event.role} is process {event.pid}")
        elif isinstance(event, Ready):
            self._advance("load the model twice", 1)
        elif isinstance(event, Prefilled):
            self._advance("prefill prompts", 1)
        elif isinstance(event, Received):
            self._advance(f"{event.transport} handoffs", 1)
        elif isinstance(event, Step):
            self._advance(f"{event.path} tokens", event.count)
        elif isinstance(event, Generated) and not self._bars:
            self._line(f"{event.path} tokens")
        elif isinstance(event, Skipped):
            self._print(f"{event.transport} is left out: {event.reason}")
            if self._bars:
                for what in (f"{event.transport} handoffs", f"{event.transport} tokens"):
                    self._bars.remove_task(self._tasks[what])

    def _advance(self, what: str, count: int) -> None:
        self._done[what] = self._done.get(what, 0) + count
        if self._bars:
            self._bars.start_task(self._tasks[what])
            self._bars.advance(self._tasks[what], count)
        elif not what.endswith("tokens") and self._done[what] % 16 in (0, self._totals[what]):
            self._line(what)

    def _line(self, what: str) -> None:
        self._print(f"{what}: {self._done[what]} of {self._totals[what]}")

    def _print(self, line: str) -> None:
        # A transport's reason may hold brackets, which rich would read as markup.
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
