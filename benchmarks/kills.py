"""How long survivors of a kill take until all of them hold a good result: all-reduces of up to 16 MiB, struck often.

    python -m benchmarks.kills --seconds 300 --seed 1 --transport shm

The churn lab (`ringhold churn`) with all-reduces only, kills only, and four peers most of the time.
"""

import sys

from launch import churn, console

SETTINGS = ("--ops", "all_reduce", "--faults", "kill", "--peers", "4..4", "--largest", "16M", "--every", "0.5..1.5")


if __name__ == "__main__":
    sys.exit(console.run(churn.command, [*SETTINGS, *sys.argv[1:]]))
