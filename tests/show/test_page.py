"""The page of a plan without a browser: its data say what ``simulate`` says, and it needs nothing from outside."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html import unescape
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from autoremat import cli
from autoremat.planner import frontier
from autoremat.planner.solving import SOLVERS, classics_of, solve
from autoremat.program import Plan, Program, Schedule, Value, simulate
from autoremat.show.explanation import explanation_of
from autoremat.show.report.data import bounds_of, line_of
from autoremat.show.report.render import page_of
from autoremat.show.residents import CATEGORIES, name_of, op_text
from tests.planner.chains import gpt
from tests.program.hand import LINK, away, chain, chain_plan
from tests.show.large import large_plan
from tests.show.placed import placed, schedules


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def totals(program: Program, order: list[int], spans: dict[str, Any], values: dict[str, Any]) -> list[int]:
    """Bytes at every run, added up from the data of the page alone (but for scratch)."""
    bytes_at = [program.ops[i].scratch_bytes for i in order]
    begins = accumulate(spans["begin"])
    for k, (v, begin, length) in enumerate(zip(spans["value"], begins, spans["length"], strict=True)):
        for run in range(begin, begin + length + 1):
            bytes_at[run] += spans["bytes"].get(str(k), values["bytes"][v])
    return bytes_at


@given(st.data())
def test_the_page_has_the_bytes_of_every_run(data: st.DataObject) -> None:
    program = data.draw(placed())
    schedule = data.draw(schedules(program))
    plan = replace(chain_plan(), program=program, schedule=schedule)
    shown = data_of(page_of(plan))
    order = list(accumulate(shown["planned"]["order"]))
    assert order == list(schedule.order)
    assert totals(program, order, shown["planned"]["spans"], shown["values"]) == [
        *simulate(program, plan).resident_bytes
    ]
    plain = totals(program, [*range(len(program.ops))], shown["plain"]["spans"], shown["values"])
    assert plain == [*simulate(program).resident_bytes]
    assert shown["modules"][2] == simulate(program, plan).peak_bytes
    assert shown["categories"] == list(CATEGORIES)


@given(st.data())
def test_names_and_fates_are_those_of_the_explanation(data: st.DataObject) -> None:
    program = data.draw(placed())
    plan = replace(chain_plan(), program=program, schedule=data.draw(schedules(program)))
    shown, savings = data_of(page_of(plan)), explanation_of(program, plan).savings
    values, texts = shown["values"], shown["texts"]
    again = {a.op: a.runs for a in savings.again}
    for v, (name, made) in enumerate(zip(values["name"], accumulate(values["made"]), strict=True)):
        assert made == program.producer[v]
        assert (op_text(program.ops[made]) if name < 0 else texts[name]) == name_of(program, v)
        assert values["again"].get(str(v)) == again.get(made)
        fate = shown["fates"][values["fate"][v]]
        assert (fate == "computed again") == (made in again)
        assert (fate == "always there") == program.values[v].fixed
        assert fate != "kept" or v in savings.kept
    assert list(accumulate(values["kept"])) == list(savings.kept)


def test_the_tables_of_the_page_add_up_to_the_peaks() -> None:
    plan = chain_plan()
    table = page_of(plan).split('id="peaks"')[1].split("</table>")[0]
    cells = [int(n) for n in re.findall(r'data-bytes="(\d+)"', table)]
    *rows, plain, planned = cells
    assert (plain, planned) == (plan.plain_peak_bytes, plan.peak_bytes) == (sum(rows[::2]), sum(rows[1::2]))


def test_the_page_has_the_tier_and_the_traffic_of_the_link() -> None:
    program, schedule = away()
    program = replace(program, link=replace(LINK, name="disk:/scratch"))
    plan = replace(chain_plan(), program=program, schedule=schedule)
    page, timeline = page_of(plan), simulate(program, schedule)
    tier, values = data_of(page)["tier"], data_of(page)["values"]
    assert tier["name"] == "disk:/scratch"
    assert list(accumulate(tier["bytes"])) == [0, 0, 20, 20, 0]
    assert tier["waits"] == {"4": timeline.waited_seconds}
    assert tier["copies"] == [[1, 0, 3.0, 4.5], [1, 1, 7.0, 9.5]]
    assert data_of(page)["fates"][values["fate"][1]] == "moved to the tier"
    assert f'data-bytes="{timeline.sent_bytes}"' in page.split('id="figures"')[1].split("</dl>")[0]
    assert 'id="tier"' in page
    assert "disk:/scratch: 20 B a second out, 10 B in" in page
    assert 'id="tier"' not in page_of(chain_plan())
    assert data_of(page_of(chain_plan()))["tier"] is None


def test_the_figures_are_the_plans() -> None:
    plan = chain_plan()
    figures = page_of(plan).split('id="figures"')[1].split("</dl>")[0]
    assert [int(n) for n in re.findall(r'data-bytes="(\d+)"', figures)] == [90, 87, 2 << 20, 95, 87]
    assert [float(n) for n in re.findall(r'data-share="([\d.]+)"', figures)] == [0.125, 0.125]
    assert "no plan can be below 87 B" in figures


def test_nothing_comes_from_outside() -> None:
    page = page_of(chain_plan())
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"<link|@import|\burl\((?!#)|<img|<iframe|\bfetch\(|import\(|src=", page)
    assert "default-src 'none'" in page


def test_a_name_cannot_end_the_script() -> None:
    evil = "</script><script>alert(1)</script><!--"
    program = replace(chain(), name=evil, values=(*chain().values[:-1], Value("da", 20, label=evil)))
    page = page_of(replace(chain_plan(), program=program, solver="<b>"))
    assert evil not in page
    assert evil in data_of(page)["texts"]
    assert evil in unescape(page.split("<h1>")[1].split("</h1>")[0])
    assert page.count("<script") == page.count("</script>") == 2


def test_the_folders_of_the_machine_are_not_on_the_page() -> None:
    ops = tuple(replace(op, source="/home/someone/project/models/gpt.py:12") for op in chain().ops)
    page = page_of(replace(chain_plan(), program=replace(chain(), ops=ops)))
    assert "models/gpt.py:12" in page
    assert "someone" not in page


def test_the_line_and_the_bounds_of_a_frontier() -> None:
    program = chain()
    front = frontier(program, points=3)
    plan = solve(program, 90)
    assert line_of(plan, front) == line_of(plan, None) == [(87, 0.125), (95, 0.0)]
    assert bounds_of(plan, None) == [(90, 0.125)]
    bounds = bounds_of(plan, front)
    assert bounds[0] == (87, 0.125)
    assert bounds[-1] == (95, 0.0)
    assert [b for _, b in bounds] == sorted((b for _, b in bounds), reverse=True)
    page = page_of(plan, frontier=front, beside=classics_of(program, plan.budget_bytes))
    assert "joins the best plan for every budget" in page
    assert "joins the best plan for every budget" not in page_of(plan)


def test_classics_are_marked_with_what_the_simulator_says() -> None:
    program = gpt(4)
    budget = simulate(program).peak_bytes * 7 // 10
    marks = classics_of(program, budget)
    assert [name for name, _, _ in marks] == [s for s in SOLVERS[3:] if s != "keep-everything"]
    for name, peak, overhead in marks:
        if peak <= budget:
            plan = solve(program, budget, solver=name)
            assert (plan.peak_bytes, plan.overhead) == (peak, overhead)
    assert classics_of(program, budget, time_limit_seconds=0) == ()


def test_programs_without_ops_have_a_page() -> None:
    program = Program("", (Value("x", 4, fixed=True),), ())
    plan = replace(chain_plan(), program=program, schedule=Schedule.plain(program))
    assert data_of(page_of(plan))["modules"][2] == 4


def test_ten_thousand_ops_make_a_small_page() -> None:
    plan = large_plan()
    assert len(plan.program.ops) >= 10_000
    assert len(page_of(plan).encode()) < 3_000_000  # 5 MB are promised


def test_the_page_is_written_where_folders_are_missing(tmp_path: Path) -> None:
    path = chain_plan().save_html(tmp_path / "new" / "plan.html")
    assert path.read_text(encoding="utf-8") == page_of(chain_plan())


def test_without_jinja_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'autoremat\[html\]'"):
        page_of(chain_plan())


@pytest.mark.parametrize("wishes", [(), ("--keep", "f0")])
def test_solve_writes_the_page(wishes: tuple[str, ...], tmp_path: Path) -> None:
    step, page = tmp_path / "chain.json", tmp_path / "new" / "plan.html"
    chain().to_json(step)
    arguments = ["solve", str(step), "--budget", "100%", *wishes, "--html", str(page), "--json", "-"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output
    assert f"Page written to {page}" in result.stderr
    plan = Plan.from_json(result.stdout)
    text = page.read_text(encoding="utf-8")
    assert data_of(text)["peak"] == plan.peak_bytes
    assert "joins the best plan for every budget" in text
    assert ">every-block" in text


def test_the_command_needs_jinja_before_it_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(
        cli.main, ["plan", "nothing:at_all", "--budget", "1", "--html", str(tmp_path / "p.html")]
    )
    assert result.exit_code == 1
    assert result.output == "Error: this needs jinja2; run: pip install 'autoremat[html]'\n"
