"""`ringhold report`: what happened in a run, as one page to look at."""

import tempfile
from pathlib import Path

import click

from collectives.errors import CorruptFile, UsageError
from launch import console
from launch.record import Entry, read_log
from launch.report_page import page
from launch.story import tell


@click.command("report")
@click.argument("log", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="The page.  [default: LOG.html]")
@click.option("--from", "start", type=console.Finite(0), help="Draw from this second on.")
@click.option("--to", "stop", type=console.Finite(0), help="Draw up to this second.")
def command(log: Path, output: Path | None, start: float | None, stop: float | None) -> None:
    """Make a self-contained page of a run's log: `run.jsonl` in the folder of a train, demo or churn.

    It shows the verdict, the members over time with the faults that struck them, how long recoveries took, the loss
    against the run without faults, the bytes between members, and the command that does it again.
    """
    log = log / "run.jsonl" if log.is_dir() else log
    entries = _read(log)
    try:
        story = tell(entries)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFile(f"{log} is no log of this release ({error!r}); make the page with the one that ran") from None
    window = None
    if start is not None or stop is not None:
        window = (start or 0.0, story.seconds if stop is None else stop)
        if window[0] >= window[1]:
            raise UsageError(
                f"nothing lies between second {window[0]:g} and {window[1]:g}; the run has {story.seconds:.1f}"
            )
    target = output or log.with_suffix(".html")
    if target.exists() and target.samefile(log):
        raise UsageError(f"-o {target} is the log itself; name another file")
    _write(target, page(story, log.name, window))
    click.echo(str(target))


def _read(path: Path) -> list[Entry]:
    """The entries of a run, those of other supervisors of it beside them too."""
    try:
        others = sorted(path.parent.glob("run.[0-9]*.jsonl")) if path.name == "run.jsonl" else []
        entries = [entry for one in (path, *others) for entry in read_log(one)]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; name the run.jsonl of a run") from None
    if not entries:
        raise UsageError(f"{path} is empty: nothing was logged")
    return sorted(entries, key=lambda entry: float(entry["time"]))


def _write(target: Path, text: str) -> None:
    """Whole or not at all, but for what is no file, such as /dev/stdout."""
    data = text.encode(errors="replace")
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)
        else:
            _replace(target, data)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from None


def _replace(target: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False, prefix=".report-") as file:
        draft = Path(file.name)
        try:
            file.write(data)
            file.flush()
            draft.chmod(0o644)
            draft.replace(target)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
