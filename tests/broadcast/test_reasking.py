"""When a chunk is asked for again."""

from hypothesis import given
from hypothesis import strategies as st

from shoal.broadcast.reasking import ASSUMED_BYTES_PER_S, RETRY_S, SLACK, AskTime

SIZE = 131_072
IN_FLIGHT = 24
SLOWEST = 65_536.0
LONGEST = RETRY_S + SLACK * IN_FLIGHT * SIZE / SLOWEST


def after(seconds: float, chunks: int) -> AskTime:
    """A transfer in which so many chunks came in so many seconds."""
    ask_time = AskTime(IN_FLIGHT, SLOWEST, 0.0)
    for number in range(1, chunks + 1):
        ask_time.arrived(SIZE, seconds * number / chunks)
    return ask_time


def test_without_experience_a_rate_is_assumed() -> None:
    expected = RETRY_S + SLACK * IN_FLIGHT * SIZE / ASSUMED_BYTES_PER_S
    assert after(1.0, 0).seconds(SIZE) == after(1.0, IN_FLIGHT - 1).seconds(SIZE) == expected


def test_a_quick_link_is_asked_again_soon() -> None:
    assert after(4.0, 80).seconds(SIZE) == RETRY_S + SLACK * IN_FLIGHT * 4.0 / 80


@given(st.floats(0.01, 1000), st.integers(0, 500), st.integers(0, 40))
def test_the_time_is_bounded_and_long_enough(seconds: float, chunks: int, times_late: int) -> None:
    ask_time = after(seconds, chunks)
    for number in range(times_late):
        ask_time.late(SIZE, seconds + 1000.0 * number)
    asked_s = ask_time.seconds(SIZE)
    assert RETRY_S <= asked_s <= LONGEST
    if chunks >= IN_FLIGHT:
        assert asked_s >= min(LONGEST, IN_FLIGHT * seconds / chunks), "what is in flight can come in time"


def test_a_round_of_late_answers_doubles_once_and_a_slower_link_is_waited_for() -> None:
    ask_time = after(4.0, 80)
    before = ask_time.seconds(SIZE) - RETRY_S
    for _ in range(IN_FLIGHT):
        ask_time.late(SIZE, 20.0)
    assert ask_time.seconds(SIZE) - RETRY_S == 2 * before
    for number in range(10):
        ask_time.late(SIZE, 100.0 * (number + 1))
    assert ask_time.seconds(SIZE) == LONGEST
