"""The statistics of a comparison of two commits: the order of the runs, intervals of ratios, the verdict.

Pure functions, no measurement here. In each round both commits are measured once, so a round gives one
ratio new/old, and whatever changes slowly on the machine affects both sides of a ratio alike.

The interval is that of paired observations (R. Jain, The Art of Computer Systems Performance Analysis,
1991, section 13.4.1): mean ± t·s/√n, where t is the quantile of Student's distribution with n - 1 degrees
of freedom. It is taken of the logarithms of the ratios and transformed back, because a ratio and its
inverse are equally far from 1 only on that scale. The mean is therefore the geometric mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from text_table import ms, table

ROUNDS = 5
STUDENT_T = 2.776  # two-sided 95 %, ROUNDS - 1 = 4 degrees of freedom
LOWEST_RATIO = 0.97  # of throughput; an interval wholly below it is a loss of speed


THROUGHPUT, P99 = "answers/s", "p99 ms"


@dataclass(frozen=True)
class Interval:
    """The geometric mean of the ratios of all rounds and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Compared:
    """One figure of one scenario: a value of each commit for each round, all above zero."""

    scenario: str
    figure: str
    new: Sequence[float]
    old: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """new/old of each round."""
        return [new / old for new, old in zip(self.new, self.old, strict=True)]

    @property
    def slower(self) -> bool:
        """Whether this is a throughput, and lower with confidence."""
        return self.figure == THROUGHPUT and interval(self.ratios).high < LOWEST_RATIO


def order(round_index: int) -> tuple[str, str]:
    """Which commit is measured first: new old, old new, new old, ... so that a linear drift cancels out."""
    return ("new", "old") if round_index % 2 == 0 else ("old", "new")


def interval(ratios: Sequence[float]) -> Interval:
    """The interval of the mean of `ROUNDS` ratios, one for each round; ValueError for any other number."""
    if len(ratios) != ROUNDS:
        raise ValueError(f"the interval needs {ROUNDS} ratios, got {len(ratios)}")
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    half_width = STUDENT_T * statistics.stdev(logs) / math.sqrt(ROUNDS)
    return Interval(math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width))


def report(figures: Sequence[Compared]) -> str:
    """The table and the verdict, in Markdown."""
    head = ["scenario", "figure", "new", "old", *(f"round {n + 1}" for n in range(ROUNDS)), "mean", "95 %"]
    explained = (
        "Columns new and old: medians of the rounds. The others: ratios new/old, their geometric mean and "
        "its interval (paired, Student's t on the logarithms, 4 degrees of freedom)."
    )
    return f"{table(head, [_row(each) for each in figures])}\n\n{explained}\n\n{verdict(figures)}"


def verdict(figures: Sequence[Compared]) -> str:
    """One sentence."""
    slower = [each.scenario for each in figures if each.slower]
    if slower:
        return f"Slower, with an interval wholly below {LOWEST_RATIO}: {', '.join(slower)}."
    return f"No throughput ratio has an interval that lies wholly below {LOWEST_RATIO}."


def _row(compared: Compared) -> list[str]:
    each = interval(compared.ratios)
    return [
        compared.scenario,
        compared.figure,
        ms(statistics.median(compared.new)),
        ms(statistics.median(compared.old)),
        *(f"{ratio:.3f}" for ratio in compared.ratios),
        f"{each.mean:.3f}",
        f"{each.low:.3f} to {each.high:.3f}",
    ]
