"""Is the clock kept right?"""

from __future__ import annotations

from megatron_r1reward.cluster import commands
from megatron_r1reward.doctor.finding import Finding, note, ok, warning


def check_clock() -> Finding:
    """Time synchronisation as systemd or chrony report it."""
    output = commands.run(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
    answer = output.stdout.strip()
    if output.code != 0 or answer not in ("yes", "no"):
        chrony = commands.run(["chronyc", "tracking"])
        if chrony.code != 0:
            return note("clock.synchronised", "timedatectl and chronyc do not tell here whether the clock is right")
        answer = "no" if "Not synchronised" in chrony.stdout else "yes"
    if answer == "yes":
        return ok("clock.synchronised", "the clock is synchronised")
    return warning(
        "clock.synchronised",
        "the clock is not synchronised: walltime saves and heartbeats depend on it",
        "have the site start chronyd or systemd-timesyncd on the nodes",
    )
