"""When a recurring run starts: cron's fields or an interval, from and until when."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from shike_core.errors import ShikeError

_MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
_DAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]
_FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("second", 0, 59, {}),
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of the month", 1, 31, {}),
    ("month", 1, 12, {name: number for number, name in enumerate(_MONTHS, start=1)}),
    ("day of the week", 0, 6, {name: number for number, name in enumerate(_DAYS)}),
)


class ScheduleError(ShikeError):
    """A recurring run was asked for at times that mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Times of a recurring run.

    Raises:
        ScheduleError: the values contradict each other or have no meaning.
    """

    cron: str | None = None
    """Second, minute, hour, day of the month, month, day of the week."""
    interval_seconds: int = 0
    """Seconds from start to start, without ``cron``."""
    start: datetime | None = None
    """Nothing starts before it."""
    end: datetime | None = None
    """Nothing starts after it."""

    def __post_init__(self) -> None:
        if self.cron is not None:
            check_cron(self.cron)
        elif self.interval_seconds < 1:
            raise ScheduleError(f"the interval is {self.interval_seconds} s; it has to be positive")
        if self.end and self.end <= (self.start or datetime.now(UTC)):
            other = f"the start, {timestamp(self.start)}" if self.start else "now"
            raise ScheduleError(f"the end, {timestamp(self.end)}, is not after {other}")

    def __str__(self) -> str:
        return f"at {self.cron}" if self.cron else f"every {self.interval_seconds} s"


def check_cron(expression: str) -> None:
    """Refuse what KFP's scheduler does not read as it was meant.

    Its first field is the second. It takes a cron of five fields as well, but as one that lacks
    the day of the week: "0 2 * * *" would run every hour.

    Raises:
        ScheduleError: with the field that is wrong.
    """
    words = expression.split()
    if len(words) != len(_FIELDS):
        hint = f"; the first is the second: '0 {expression}'" if len(words) == 5 else ""
        raise ScheduleError(
            f"the cron expression {expression!r} has {len(words)} fields, not 6{hint}"
        )
    for word, (name, low, high, names) in zip(words, _FIELDS, strict=True):
        for part in word.split(","):
            if not _is_range(part, low, high, names, question_mark=name.startswith("day")):
                raise ScheduleError(
                    f"the cron expression {expression!r} has {part!r} as the {name}; it takes "
                    f"{low} to {high}, ranges as 1-3, steps as */2, lists as 1,3, or *"
                )


def _is_range(part: str, low: int, high: int, names: dict[str, int], question_mark: bool) -> bool:
    span, slash, step = part.partition("/")
    if slash and not (re.fullmatch("[0-9]+", step) and int(step) > 0):
        return False
    if span == "*" or (span == "?" and question_mark):
        return True
    ends = [_number(word, names) for word in span.split("-")]
    return len(ends) <= 2 and low <= ends[0] <= ends[-1] <= high


def _number(word: str, names: dict[str, int]) -> int:
    return int(word) if re.fullmatch("[0-9]+", word) else names.get(word.upper(), -1)


def moment(text: str) -> datetime:
    """A point in time, as in 2027-01-31T02:00:00Z.

    Raises:
        ScheduleError: it is something else, or the time zone is missing.
    """
    try:
        value = datetime.fromisoformat(text)
    except ValueError:
        value = None
    if value is None or value.tzinfo is None:
        raise ScheduleError(
            f"{text!r} is not a time with its zone, such as 2027-01-31T02:00:00Z or "
            "2027-01-31T03:00:00+01:00"
        )
    return value


def timestamp(value: datetime | None) -> str | None:
    """The form in which the API takes a point in time."""
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if value else None
