from datetime import UTC, datetime, timedelta

import pytest

from pipelines.schedule import Schedule, ScheduleError, check_cron, moment, timestamp

NEXT_YEAR = datetime.now(UTC) + timedelta(days=365)


@pytest.mark.parametrize(
    "expression",
    ["0 0 2 * * *", "*/30 0-10/2 1,13 ? JAN-mar mon", "59 59 23 31 12 6", "0 0 0 1 * ?"],
)
def test_cron_of_six_fields_is_taken(expression):
    check_cron(expression)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("0 2 * * *", r"has 5 fields, not 6; the first is the second: '0 0 2 \* \* \*'"),
        ("0 0 2 * * * *", "has 7 fields, not 6"),
        ("", "has 0 fields, not 6"),
        ("@daily", "has 1 fields, not 6"),
        ("60 0 2 * * *", "has '60' as the second; it takes 0 to 59"),
        ("0 0 24 * * *", "has '24' as the hour; it takes 0 to 23"),
        ("0 0 2 0 * *", "has '0' as the day of the month"),
        ("0 0 2 * 13 *", "has '13' as the month"),
        ("0 0 2 * * 7", "has '7' as the day of the week; it takes 0 to 6"),
        ("0 0 2 * * FUN", "has 'FUN' as the day of the week"),
        ("0 ? 2 * * *", "has '[?]' as the minute"),
        ("0 9-5 2 * * *", "has '9-5' as the minute"),
        ("0 1-2-3 2 * * *", "has '1-2-3' as the minute"),
        ("0 */0 2 * * *", "has '.*/0' as the minute"),
        ("0 1,,2 2 * * *", "has '' as the minute"),
        ("0 -1 2 * * *", "has '-1' as the minute"),
    ],
)
def test_any_other_cron_is_refused_with_the_field(expression, message):
    with pytest.raises(ScheduleError, match=message):
        check_cron(expression)


@pytest.mark.parametrize("seconds", [0, -60])
def test_an_interval_is_positive(seconds):
    with pytest.raises(ScheduleError, match=f"the interval is {seconds} s; it has to be positive"):
        Schedule(interval_seconds=seconds)


def test_the_end_is_after_the_start_and_after_now():
    with pytest.raises(ScheduleError, match="is not after the start"):
        Schedule(interval_seconds=60, start=NEXT_YEAR, end=NEXT_YEAR)
    with pytest.raises(ScheduleError, match="is not after now"):
        Schedule(cron="0 0 2 * * *", end=datetime(2020, 1, 1, tzinfo=UTC))
    assert Schedule(interval_seconds=60, end=NEXT_YEAR).end == NEXT_YEAR


@pytest.mark.parametrize("text", ["2027-01-31", "2027-01-31T02:00:00", "tomorrow", ""])
def test_a_time_without_its_zone_is_refused(text):
    with pytest.raises(ScheduleError, match="is not a time with its zone"):
        moment(text)


def test_a_time_reaches_the_api_in_utc():
    assert timestamp(moment("2027-01-31T03:00:00+01:00")) == "2027-01-31T02:00:00Z"
    assert timestamp(None) is None
