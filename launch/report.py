"""`ringhold report`: what happened in a run, as one page to look at."""

import json
import tempfile
from pathlib import Path

import click

from collectives.errors import CorruptFile, UsageError
from launch.record import Entry, read_log
from launch.report_page import page
from launch.story import tell


@click.command("report")
@click.argument("log", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="The page.  [default: LOG.html]")
@click.option("--from", "start", type=click.FloatRange(0), help="Draw from this second on.")
@click.option("--to", "stop", type=click.FloatRange(0), help="Draw up to this second.")
def command(log: Path, output: Path | None, start: float | None, stop: float | None) -> None:
    """Make a self-contained page of a run's log: `run.jsonl` in the folder of a train, demo or churn.

    It shows the verdict, the members over time with the faults that struck them, how long recoveries took, the loss
    against the run without faults, the bytes between members, and the command that does it again.
    """
    log = log / "run.jsonl" if log.is_dir() else log
    story = tell(_read(log))
    window = None
    if start is not None or stop is not None:
        window = (start or 0.0, story.seconds if stop is None else stop)
        if window[0] >= window[1]:
            raise UsageError(
                f"nothing lies between second {window[0]:g} and {window[1]:g}; the run has {story.seconds:.1f}"
            )
    target = output or log.with_suffix(".html")
    _write(target, page(story, log.name, window))
    click.echo(str(target))


def _read(path: Path) -> list[Entry]:
    """The entries of a run, those of other supervisors of it beside them too."""
    try:
        entries = [entry for one in (path, *sorted(path.parent.glob("run.*.jsonl"))) for entry in read_log(one)]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; name the run.jsonl of a run") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} is no log of a run ({error!r}); name the run.jsonl of a run") from None
    if not entries:
        raise UsageError(f"{path} is empty: nothing was logged")
    return sorted(entries, key=lambda entry: float(entry["time"]))


def _write(target: Path, text: str) -> None:
    """Whole or not at all."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, prefix=".report-") as file:
            file.write(text)
        draft = Path(file.name)
        draft.chmod(0o644)
        draft.replace(target)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from None
