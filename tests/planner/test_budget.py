import pytest

from autoremat.planner import parse_budget
from autoremat.program.units import format_bytes


@pytest.mark.parametrize(
    ("budget", "nbytes"),
    [
        (123, 123),
        ("123", 123),
        ("123B", 123),
        ("512MB", 512_000_000),
        ("1.5 GB", 1_500_000_000),
        ("2tb", 2_000_000_000_000),
        ("100KiB", 102_400),
        ("10GiB", 10 * 2**30),
        (" 0.5 TiB ", 2**39),
        (".5MiB", 2**19),
        ("9007199254740993", 9007199254740993),
        ("50%", 500),
        ("12.5 %", 125),
        (0.25, 250),
        (1.0, 1000),
    ],
)
def test_what_a_person_may_write(budget, nbytes):
    assert parse_budget(budget, 1000) == nbytes


@pytest.mark.parametrize(
    "budget",
    [True, False, 0, -1, 0.0, -0.5, 1.5, 1e10, float("nan"), float("inf"), "", "GB", "ten GB", "10 XB", "-5MB", "0",
     "0%", "101%", "nan", "1e9", None, [1]],
)  # fmt: skip
def test_the_refusal_says_what_is_accepted(budget):
    with pytest.raises(ValueError, match=r"cannot read .* as a budget; accepted are bytes as an int .*10GiB.*50%"):
        parse_budget(budget, 1000)


def test_auto_needs_a_device():
    with pytest.raises(ValueError, match="needs a device"):
        parse_budget("auto", 1000)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 KB"),
        (999_960, "1.0 MB"),
        (33_700_000, "33.7 MB"),
        (4 * 10**12, "4.00 TB"),
    ],
)
def test_sizes_for_people(nbytes, text):
    assert format_bytes(nbytes) == text
