"""The page of a plan in headless Chromium: pointed at, typed at, sorted, filtered, folded; figures against the plan.

Needs Chromium and its driver (Debian: ``apt install chromium chromium-driver``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

import autoremat
from autoremat.demo.models import GPT, GPTConfig
from autoremat.planner import classics_of, frontier, solve
from autoremat.program import END, Link, Op, Plan, Program, Value, simulate
from autoremat.show.explanation import explanation_of
from autoremat.show.residents import name_of, residents_at
from autoremat.show.text import format_bytes
from autoremat.show.traffic import traffic_of
from tests.planner.chains import gpt
from tests.program.hand import chain_plan
from tests.show.browser import CHROMIUM, DRIVER, PHONE, Page, browser
from tests.show.large import large_plan

__all__ = ["browser"]  # a fixture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no Chromium with its driver here: apt install chromium chromium-driver"
    ),
]


@pytest.fixture(scope="module")
def plan() -> Plan:
    torch.manual_seed(0)
    model = GPT(GPTConfig(blocks=4, width=32, heads=2, context=32))
    tokens = torch.zeros(16, 32, dtype=torch.int64)
    return autoremat.plan(
        lambda x: F.cross_entropy(model(x).flatten(0, 1), x.flatten()), tokens, budget=0.6, time_limit_seconds=2
    )


@pytest.fixture(scope="module")
def file(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "plan.html"
    classics = classics_of(plan.program, plan.budget_bytes)
    return plan.save_html(path, frontier=frontier(plan.program, points=3, time_limit_seconds=1), beside=classics)


@pytest.fixture
def page(browser: webdriver.Chrome, file: Path) -> Iterator[Page]:
    page = Page(browser)
    page.open(file)
    browser.get_log("browser")  # those of an earlier page
    yield page
    assert browser.get_log("browser") == []


def assert_moment_is_the_plans(page: Page, plan: Plan, run: int) -> None:
    """What the page says of a run of the plan is what the simulator and the explanation say."""
    residents = residents_at(plan.program, plan.schedule, run)
    op = plan.program.ops[plan.schedule.order[run]]
    assert page.bytes_of("#moment-bytes") == [simulate(plan.program, plan).resident_bytes[run]]
    by_category: dict[str, int] = {}
    for r in residents:
        by_category[r.category] = by_category.get(r.category, 0) + r.nbytes
    shown = dict(zip(page.texts_of("#moment-categories li"), page.bytes_of("#moment-categories li"), strict=True))
    assert {t.splitlines()[0]: n for t, n in shown.items() if n} == by_category
    largest = [r for r in residents if r.category != "scratch"]
    assert page.bytes_of("#moment-values li")[:8] == [r.nbytes for r in largest[:8]]
    assert page.texts_of("#moment-values li")[0].startswith(largest[0].name)
    assert sum(page.bytes_of("#moment-values li")) == sum(r.nbytes for r in largest)
    assert page.one("#moment-op").text == op.name.removeprefix("aten.").removesuffix(".default")
    assert page.one("#moment-module").text == op.module
    assert page.one("#moment-source").text.endswith(op.source.rpartition("/")[2])
    assert op.phase in page.one("#moment-phase").text


def test_it_opens_at_the_peak_and_asks_for_nothing(page: Page, plan: Plan) -> None:
    assert page.run_shown() == simulate(plan.program, plan).peak_run
    assert page.bytes_of("#moment-bytes") == [plan.peak_bytes]
    assert_moment_is_the_plans(page, plan, page.run_shown())
    assert page.ask("return performance.getEntriesByType('resource').length") == 0
    shown = [plan.budget_bytes, plan.peak_bytes, plan.plain_peak_bytes, plan.floor_bytes]
    assert page.bytes_of("#figures dd[data-bytes]") == shown
    assert page.texts_of("#figures dd[data-bytes]") == [format_bytes(n) for n in shown]


def test_pointing_at_the_chart_says_what_is_in_memory(page: Page, plan: Plan) -> None:
    runs = []
    for share in (0.2, 0.5, 0.8, 0.95):
        page.point_at("#planned", share)
        runs.append(page.run_shown())
        assert_moment_is_the_plans(page, plan, runs[-1])
    assert runs == sorted(set(runs))
    page.point_at("#plain", 0.5)
    assert page.bytes_of("#moment-bytes") == [simulate(plan.program).resident_bytes[page.run_shown()]]
    assert page.one("#moment-run").text.startswith("Plain: run ")


def test_the_tier_of_a_moment_and_the_copies_of_the_link(browser: webdriver.Chrome, tmp_path: Path) -> None:
    program = replace(gpt(4), link=Link(3e10, 3e10, 1e-6, name="disk:/scratch"))
    plan = solve(program, 0.45, effort=0.05)
    traffic = traffic_of(program, plan.schedule)
    page = Page(browser)
    page.open(plan.save_html(tmp_path / "plan.html"))
    assert len(page.all("#tier .copy")) == len(traffic.copies) > 4
    for share in (0.3, 0.6, 0.9):
        page.point_at("#planned", share)
        assert page.bytes_of("#moment-tier") == [traffic.tier_bytes[page.run_shown()]]
    page.one("[data-axis=runs]").click()
    assert len(page.all("#tier .copy")) == len(traffic.copies)
    assert browser.get_log("browser") == []


def test_a_budget_far_above_the_peak_leaves_the_chart_its_height(browser: webdriver.Chrome, tmp_path: Path) -> None:
    page = Page(browser)
    page.open(chain_plan(budget_bytes=10**18).save_html(tmp_path / "far.html"))
    top, bottom = page.ask(
        "const at = (css) => document.querySelector(css).getBoundingClientRect();"
        "return [at('#plain .peak').top - at('#plain').top, at('#plain').height]"
    )
    assert top < bottom / 3
    label = page.ask("return document.querySelector('#plain .budget-text').textContent")
    assert label == "budget 1000000.00 TB, above ↑"


def test_the_name_of_a_peak_at_the_budget_is_not_crossed_out(browser: webdriver.Chrome, tmp_path: Path) -> None:
    plan, page = chain_plan(), Page(browser)
    page.open(replace(plan, budget_bytes=plan.peak_bytes).save_html(tmp_path / "tight.html"))
    foot, line = page.ask(
        "const at = (css) => document.querySelector(css).getBoundingClientRect();"
        "const name = [...document.querySelectorAll('#planned text')].find((t) => t.textContent.startsWith('peak'));"
        "return [name.getBoundingClientRect().bottom, at('#planned line.budget').top]"
    )
    assert foot <= line


def test_the_chart_obeys_the_keyboard(page: Page, plan: Plan) -> None:
    last = len(plan.schedule.order) - 1
    page.focus("#planned")
    for key, run in ((Keys.HOME, 0), (Keys.ARROW_RIGHT, 1), (Keys.END, last), (Keys.ARROW_LEFT, last - 1)):
        page.press(key)
        assert page.run_shown() == run
        assert_moment_is_the_plans(page, plan, run)
    ActionChains(page.browser).key_down(Keys.SHIFT).send_keys(Keys.ARROW_LEFT).key_up(Keys.SHIFT).perform()
    assert page.run_shown() == last - 11
    page.press("p")
    assert page.bytes_of("#moment-bytes") == [plan.peak_bytes]
    assert page.one("#planned").get_attribute("aria-valuenow") == str(page.run_shown())
    page.press(Keys.PAGE_UP)
    assert page.run_shown() > simulate(plan.program, plan).peak_run


def test_the_axis_counts_runs_where_asked_to(page: Page, plan: Plan) -> None:
    page.one("[data-axis=runs]").click()
    assert page.one("[data-axis=runs]").get_attribute("aria-pressed") == "true"
    page.point_at("#planned", 0.5)
    assert abs(page.run_shown() / len(plan.schedule.order) - 0.5) < 0.1


def test_the_table_sorts_and_filters(page: Page, plan: Plan) -> None:
    program = plan.program
    sizes = sorted((v.nbytes for v in program.values), reverse=True)
    assert page.bytes_of("#table tbody td[data-bytes]") == sizes[:100]
    page.one("[data-sort=bytes]").click()
    assert page.bytes_of("#table tbody td[data-bytes]") == sizes[::-1][:100]
    assert page.one("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    page.one("[data-sort=name]").click()
    names = [name_of(program, v) for v in range(len(program.values))]
    page.one("#filter").send_keys("MLP gelu")
    found = [v for v, name in enumerate(names) if "mlp" in name and "gelu" in name]
    assert [t.splitlines()[0] for t in page.texts_of("#table tbody th")] == sorted(names[v] for v in found)
    assert page.one("#count").text.startswith(f"{len(found)} of {len(names)} values")
    assert page.bytes_of("#count") == [sum(program.values[v].nbytes for v in found)]
    page.one("#filter").clear()
    page.one("#filter").send_keys("no such thing")
    assert page.all("#table tbody tr") == []


def test_the_table_knows_what_the_plan_does(page: Page, plan: Plan) -> None:
    program, savings = plan.program, explanation_of(plan.program, plan).savings
    again = {a.op for a in savings.again}
    assert again
    made_again = [v for v in range(len(program.values)) if program.producer[v] in again]
    at_peak = [r for r in residents_at(program, plan.schedule, simulate(program, plan).peak_run) if r.value >= 0]
    fixed = [v for v, value in enumerate(program.values) if value.fixed]
    for choice, values in (
        ("computed again", made_again),
        ("in memory at the peak", [r.value for r in at_peak]),
        ("always there", fixed),
    ):
        Select(page.one("#fate")).select_by_visible_text(choice)
        assert page.bytes_of("#count") == [sum(program.values[v].nbytes for v in values)]
        assert page.one("#count").get_attribute("data-count") == str(len(values))


def test_more_rows_come_when_asked_for(page: Page, plan: Plan) -> None:
    assert len(plan.program.values) > 100
    page.ask("document.querySelector('#more').click()")
    assert len(page.bytes_of("#table tbody td[data-bytes]")) == min(600, len(plan.program.values))


def test_the_tree_folds_and_adds_up(page: Page, plan: Plan) -> None:
    e = explanation_of(plan.program, plan)
    page.one("#unfold").click()
    rows = page.ask(
        "return [...document.querySelectorAll('#tree tbody tr')].map((r) => [Number(r.ariaLevel), r.dataset.name,"
        " ...['peak', 'saved', 'kept'].map((what) => Number(r.querySelector(`[data-what=${what}]`).dataset.bytes))])"
    )
    assert rows[0] == [1, "the whole step", plan.peak_bytes, e.saved_bytes, e.kept_bytes]
    own = e.modules.own_peak_bytes
    assert own + sum(peak for level, _, peak, _, _ in rows if level == 2) == plan.peak_bytes
    assert len(rows) > len(e.modules.modules) + 1
    page.one("#fold").click()
    assert len(page.all("#tree tbody tr")) == 1


def test_the_tree_obeys_the_keyboard(page: Page) -> None:
    page.one("#fold").click()
    page.focus("#tree tbody tr")
    page.press(Keys.ARROW_RIGHT)
    opened = page.texts_of("#tree tbody th")
    assert len(opened) > 1
    assert page.one("#tree tbody tr").get_attribute("aria-expanded") == "true"
    page.press(Keys.ARROW_DOWN)
    here = page.ask("return document.activeElement.dataset.name")
    assert here
    assert here in opened[1]
    page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert len(page.all("#tree tbody tr")) == 1
    assert page.ask("return document.activeElement.dataset.name") == "the whole step"


def test_the_theme_follows_the_system_until_it_is_chosen(page: Page, file: Path) -> None:
    light = page.background()
    page.prefer("dark")
    dark = page.background()
    assert dark != light
    page.one("#theme").click()
    assert (page.one("#theme").text, page.background()) == ("Theme: light", light)
    page.one("#theme").click()
    page.prefer("light")
    assert (page.one("#theme").text, page.background()) == ("Theme: dark", dark)
    page.browser.get(file.as_uri())
    assert page.background() == dark  # it is remembered


def test_the_frontier_marks_every_plan(page: Page, plan: Plan) -> None:
    rows, dots = page.all("#points tbody tr"), page.all("#frontier-chart .dot")
    assert len(rows) == len(dots) >= 1 + len(plan.candidates)
    assert page.bytes_of("#points tbody tr:first-child td[data-bytes]") == [plan.peak_bytes]
    names = page.texts_of("#points tbody th")
    assert any(name.startswith("every-block") for name in names)
    page.focus("#points tbody tr:nth-child(2)")
    assert "on" in (page.one("#frontier-chart .dot[data-point='1']").get_attribute("class") or "").split()


MARKS = """
const chart = document.querySelector('#frontier-chart').getBoundingClientRect();
return [...document.querySelectorAll('#frontier-chart .dot[visibility=visible] circle')].map((circle) => {
  const at = circle.getBoundingClientRect();
  return [at.left - chart.left, chart.right - at.right, at.top - chart.top, chart.bottom - at.bottom];
});
"""


def test_where_nothing_can_be_had_for_time_the_frontier_stands_in_the_middle(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    """Floor, budget and plain peak are one then; the marks would be one on top of another, at the edge."""
    values = (Value("x", 8, fixed=True), Value("y", 16, held=END))
    program, page = Program("copy", values, (Op("copy", (0,), (1,), seconds=1.0),)), Page(browser)
    plan = replace(solve(program, 1.0), candidates=(("greedy", 24, 0.0), ("evicting", 24, 0.0)))
    page.open(plan.save_html(tmp_path / "one.html"))
    marks = page.ask(MARKS)
    assert len(marks) == 3
    assert all(min(left, right) > 100 and min(above, below) >= 0 for left, right, above, below in marks)


def test_marks_stand_beside_one_another_only_where_plans_are_possible(
    browser: webdriver.Chrome, plan: Plan, tmp_path: Path
) -> None:
    """Not in the hatched area, and not beyond the chart."""
    page = Page(browser)
    many = replace(plan, candidates=tuple((f"plan {i}", plan.peak_bytes, plan.overhead) for i in range(12)))
    page.open(many.save_html(tmp_path / "many.html", frontier=frontier(plan.program, points=3, time_limit_seconds=1)))
    impossible = page.ask(
        "const never = document.querySelector('#frontier-chart .never'), svg = never.ownerSVGElement;"
        "return [...document.querySelectorAll('#frontier-chart .dot')].filter((dot) => {"
        "  if (!dot.querySelector('.lead')) return false;"
        "  const at = svg.createSVGPoint(), circle = dot.querySelector('circle');"
        "  [at.x, at.y] = [circle.cx.baseVal.value, circle.cy.baseVal.value];"
        "  return never.isPointInFill(at); }).length"
    )
    assert impossible == 0
    assert all(min(sides) >= 0 for sides in page.ask(MARKS))


def test_everything_can_be_reached_by_tabbing(page: Page) -> None:
    page.ask("document.body.focus()")
    seen = set()
    for _ in range(60):
        page.press(Keys.TAB)
        seen.add(
            page.ask("const e = document.activeElement; return e.id || e.dataset.sort || e.dataset.axis || e.tagName")
        )
    assert {"theme", "seconds", "runs", "plain", "planned", "fold", "unfold", "filter", "fate", "name", "bytes"} <= seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(page: Page, plan: Plan, file: Path, scheme: str) -> None:
    page.open(file, PHONE, scheme)
    assert page.ask("return document.documentElement.scrollWidth") == PHONE
    for table in ("#tree", "#table", "#points"):  # none has to be moved sideways
        assert page.ask("return document.querySelector(arguments[0]).getBoundingClientRect().right", table) <= PHONE
    page.point_at("#planned", 0.6)
    assert_moment_is_the_plans(page, plan, page.run_shown())
    assert page.one("#planned").size["width"] > 300


def test_ten_thousand_ops_are_there_within_two_seconds(browser: webdriver.Chrome, tmp_path: Path) -> None:
    plan, page = large_plan(), Page(browser)
    page.open(plan.save_html(tmp_path / "large.html"))
    assert page.bytes_of("#moment-bytes") == [plan.peak_bytes]
    assert page.ready_after_milliseconds < 2000
    assert_moment_is_the_plans(page, plan, page.run_shown())
