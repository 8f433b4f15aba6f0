"""The proofs that need the run's results from disk, as checks: the ledgers, the reference run, and its control.

Called by `launch.summary` once the run itself is over. Imports torch.
"""

from collections.abc import Callable
from dataclasses import replace

from collectives.errors import UsageError
from launch import ledger, reference
from launch.config import JobConfig
from launch.verdict import Check, Proofs

Tell = Callable[[str], None]


def prove(config: JobConfig, *, against_reference: bool, control: bool, tell: Tell) -> Proofs:
    """Verify the ledgers; where asked, compare with a fault-free run and show that the comparison can fail.

    `tell` is given a line before what takes time.
    """
    try:
        report = ledger.verify(config.out_dir)
    except UsageError as error:
        return Proofs((Check("ledger", False, str(error)),))
    checks = [_ledger(report, config)]
    found = Proofs(
        tuple(checks),
        report.losses[-1] if report.losses else None,
        repeated=report.repeated,
        epochs=report.epochs,
        first_step=report.first_step,
        losses=tuple(report.losses),
    )
    if not against_reference:
        return found
    tell(f"running the reference: {config.steps} steps in one process, without faults")
    undisturbed = reference.run(config)
    compared = reference.compare(report.losses, undisturbed.losses, config.dtype)
    last = undisturbed.losses[-1]
    detail = f"{compared}; last loss {report.losses[-1]:.6f}, reference {last:.6f}" if report.losses else str(compared)
    checks.append(Check("reference", compared.ok, detail))
    if config.reproducible:
        checks.append(_bits(report.hash, undisturbed.hash))
    if control:
        checks.append(_control(config, undisturbed))
    return replace(found, checks=tuple(checks), reference_loss=last, reference=undisturbed.losses)


def _ledger(report: ledger.LedgerReport, config: JobConfig) -> Check:
    problems = list(report.problems)
    if report.first_step + report.steps != config.steps:
        problems.append(f"{report.first_step + report.steps} of {config.steps} steps are on record")
    if not report.complete:
        problems.append("no member ended in order")
    if problems:
        return Check("ledger", False, "; ".join(problems))
    detail = (
        f"each of {report.samples} samples of {report.steps} steps was used exactly once, by {report.members} members "
        f"in {report.epochs} epochs; {report.repeated} attempts repeated"
    )
    if report.withdrawn:
        detail += f"; {report.withdrawn} steps were lost with a member's state and taken again from a checkpoint"
    return Check("ledger", True, detail)


def _bits(found: str, expected: str) -> Check:
    """A reproducible run ends with the very bits of the reference."""
    if found == expected:
        return Check("bits", True, f"the final state is that of the reference to the bit, BLAKE3 {expected[:16]}")
    return Check("bits", False, f"the final state has hash {found[:16] or 'unknown'}, the reference {expected[:16]}")


def _control(config: JobConfig, undisturbed: reference.Reference) -> Check:
    """A comparison that cannot fail proves nothing: a wrongly averaged run has to be refused."""
    try:
        compared = reference.control(config, undisturbed)
    except UsageError as error:
        return Check("negative control", False, str(error))
    if compared.ok:
        return Check(
            "negative control", False, "a run with a wrong divisor passed the comparison, which proves nothing"
        )
    detail = f"a run with a wrong divisor is refused: off by {compared.worst:.1e} at step {compared.first_bad_step}"
    return Check("negative control", True, detail)
